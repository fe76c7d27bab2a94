"""Generated programs can compute and print; each attempt at more fails, is told why, and leaves nothing behind."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from leibler.data import Record
from leibler.data.sandbox import Limits, Outcome, PassesTests, confinement, extract_program, run_program
from leibler.errors import DataError
from leibler.objective import GroupNormalised, Objective, PolicyGradient, Reward
from leibler.policy import character_tokenizer, tiny_llama
from leibler.train import OnPolicy, Recipe, Score, fit

confined = pytest.mark.skipif(bool(confinement()), reason=f"programs cannot be confined here: {confinement()}")
QUICK = Limits(seconds=2.0)


def attempt(program: str, given: str = "", limits: Limits = QUICK) -> Outcome:
    return run_program(program, given, limits)


def left_over() -> list[str]:
    """Processes of the sandbox that are still there."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().decode("utf-8", "replace")
        except OSError:
            continue
        if "sandboxed.py" in line and str(os.getpid()) == _parent(folder):
            found.append(line)
    return found


def _parent(folder: Path) -> str:
    try:
        return (folder / "stat").read_text().rpartition(")")[2].split()[1]
    except OSError:
        return ""


# ---- what a program may do ---------------------------------------------------------------------------------------


@confined
def test_a_program_computes_reads_its_input_and_prints():
    program = "import sys, math, json, re, itertools, collections, hashlib, random, decimal\n"
    program += "n = int(input()); print(json.dumps([math.factorial(n), sys.stdin.read()]), end='')"
    assert attempt(program, "5\nrest\nä") == Outcome("ok", '[120, "rest\\n\\u00e4"]')


@confined
def test_a_failure_is_told_by_its_last_line():
    assert attempt("print('a')\n1/0") == Outcome("error", "a\n", "ZeroDivisionError: division by zero")
    assert attempt("raise SystemExit(3)").reason == "exit status 3"
    assert attempt("import os; os.abort()").reason == "stopped by SIGABRT"
    assert attempt("def f(:").reason == "SyntaxError: invalid syntax"
    assert attempt("x = '\ud800'").status in ("ok", "error")
    assert attempt("a\x00b").status == "error"


@confined
def test_threads_are_not_needed_to_be_quick():
    started = time.monotonic()
    assert attempt("pass").status == "ok"
    assert time.monotonic() - started < 30


# ---- time, memory, output ----------------------------------------------------------------------------------------

ENDLESS = {
    "a loop": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "waiting with closed streams": "import os, time\nfor n in (0, 1, 2): os.close(n)\ntime.sleep(1000)",
    "a loop that ignores signals": (
        "import signal\nfor n in range(1, 64):\n    try: signal.signal(n, signal.SIG_IGN)\n    except Exception: pass\n"
        "while True: pass"
    ),
    "a loop in C": "sum(iter(int, 1))",
    "a regular expression": "import re; re.match(r'(a+)+$', 'a' * 60 + 'b')",
}


@confined
@pytest.mark.parametrize("how", ENDLESS)
def test_what_does_not_end_is_ended(how):
    started = time.monotonic()
    outcome = attempt(ENDLESS[how], limits=Limits(seconds=0.5))
    assert (outcome.status, outcome.reason) == ("time", "ran longer than 0.5 seconds")
    assert time.monotonic() - started < 20
    assert left_over() == []


@confined
@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(10**10)",
        "x = []\nwhile True: x.append(bytearray(10**7))",
        "x = 'a'\nwhile True: x += x",
        "import mmap\nx = [mmap.mmap(-1, 2**28) for _ in range(100)]",
        "import ctypes\nwhile True:\n    if not ctypes.CDLL(None).malloc(10**8): raise MemoryError",
        "print(10**10**10)",
    ],
)
def test_memory_is_bounded(program):
    outcome = attempt(program, limits=Limits(seconds=4, memory=128 * 2**20))
    assert outcome.status in ("error", "time"), outcome
    assert "Permission" not in outcome.reason


@confined
def test_a_flood_of_output_is_cut():
    outcome = attempt("while True: print('x' * 10000)", limits=Limits(seconds=20, output=5000))
    assert (outcome.status, len(outcome.stdout)) == ("output", 5000)
    outcome = attempt("import sys\nfor _ in range(1000): sys.stderr.write('x' * 10000)\n1/0")
    assert outcome.reason.endswith("ZeroDivisionError: division by zero")


# ---- files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path) -> Path:
    path = tmp_path / "secret"
    path.write_text("a secret")
    path.chmod(0o666)
    return path


@confined
@pytest.mark.parametrize(
    "program",
    [
        "print(open({0!r}).read())",
        "import os; print(os.listdir(os.path.dirname({0!r})))",
        "import ctypes; f = ctypes.CDLL(None); n = f.open({0!r}.encode(), 0); assert n >= 0; print(n)",
        "import os; os.symlink({0!r}, 'here'); print(open('here').read())",
        "import os; os.link({0!r}, 'here'); print(open('here').read())",
        "print(open('/proc/self/environ').read())",
        "print(open('/proc/%d/environ' % __import__('os').getppid()).read())",
        "print(open('/etc/passwd').read())",
        "import os; print(os.listdir(os.path.expanduser('~')))",
        "import os; print(os.listdir('/'))",
        "print(open('/proc/self/mem', 'rb').read(1))",
    ],
)
def test_files_cannot_be_read(program, secret):
    outcome = attempt(program.format(str(secret)))
    assert outcome.status == "error"
    assert "secret" not in outcome.stdout


@confined
@pytest.mark.parametrize(
    "program",
    [
        "open({0!r}, 'w').write('mine')",
        "open({0!r}, 'a').write('mine')",
        "import os; os.truncate({0!r}, 0)",
        "import os; os.unlink({0!r})",
        "import os; os.rename({0!r}, {0!r} + '2')",
        "import os; os.chmod({0!r}, 0)",
        "import os; os.chown({0!r}, 1, 1)",
        "import os; os.utime({0!r}, (1, 1))",
        "import os; os.setxattr({0!r}, 'user.a', b'1')",
        "import os; os.mkdir({0!r} + '2')",
        "import os; os.mkfifo({0!r} + '2')",
        "import os; os.symlink('/etc', {0!r} + '2')",
        "import os; os.link({0!r}, {0!r} + '2')",
        "open('here', 'w').write('x')",
        "open('/tmp/leibler-was-here', 'w')",
        "open('/dev/shm/leibler-was-here', 'w')",
        "import ctypes; assert ctypes.CDLL(None).syscall(90, {0!r}.encode(), 0) == 0",
        "import ctypes; assert ctypes.CDLL(None).syscall(319, b'x', 0) >= 0",
    ],
)
def test_files_cannot_be_written_or_changed(program, secret):
    before = secret.stat()
    outcome = attempt(program.format(str(secret)))
    assert outcome.status == "error", outcome
    after = secret.stat()
    assert (after.st_mode, after.st_uid, after.st_mtime_ns) == (before.st_mode, before.st_uid, before.st_mtime_ns)
    assert secret.read_text() == "a secret"
    assert [p.name for p in secret.parent.iterdir()] == ["secret"]
    assert not Path("/tmp/leibler-was-here").exists()


@confined
def test_no_open_file_and_no_variable_of_ours_is_inherited(secret, monkeypatch):
    monkeypatch.setenv("TOKEN", "a secret")
    with secret.open() as file:
        os.set_inheritable(file.fileno(), True)
        program = "import os\nprint(dict(os.environ))\nfound = []\nfor n in range(3, 32):\n"
        program += "    try: os.fstat(n); found.append(n)\n    except OSError: pass\nprint(found)"
        outcome = attempt(program)
    assert "secret" not in outcome.stdout
    assert outcome.stdout.endswith("[]\n"), outcome


# ---- network and other processes ---------------------------------------------------------------------------------


@pytest.fixture
def server():
    """A server on this machine that counts its visitors."""
    visitors = []
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(60)

    def wait() -> None:
        try:
            visitors.append(listener.accept())
        except OSError:
            return

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    yield listener.getsockname()[1], visitors
    listener.close()


@confined
@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.create_connection(('127.0.0.1', {0}), 1)",
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'a', ('127.0.0.1', {0}))",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "import socket; socket.socketpair()",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{0}', timeout=1)",
        "import ctypes; assert ctypes.CDLL(None).syscall(425, 8, b'0' * 200) >= 0",
    ],
)
def test_no_connection_can_be_made(program, server):
    port, visitors = server
    assert attempt(program.format(port)).status == "error"
    assert visitors == []


@confined
@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        import time; time.sleep(60)",
        "import subprocess; subprocess.run(['/bin/echo', 'a'], check=True)",
        "import os; os.execv('/bin/echo', ['echo', 'a'])",
        "import os; os.system('echo a') and 1/0",
        "import os; os.posix_spawn('/bin/echo', ['echo'], {})",
        "import multiprocessing as m; p = m.Process(target=print); p.start()",
        "import ctypes; assert ctypes.CDLL(None).syscall(57) > 0",
        "import ctypes; assert ctypes.CDLL(None).fork() > 0",
        "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
        "import os, signal; os.kill(-1, signal.SIGKILL)",
        "import os, signal; os.killpg(os.getpgid(os.getppid()), signal.SIGKILL)",
        "import os, signal; signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)",
        "import ctypes; assert ctypes.CDLL(None).ptrace(16, __import__('os').getppid(), 0, 0) == 0",
        "import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "import os; os.sched_setaffinity(os.getppid(), [0])",
        "import resource, os; resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (3, 3))",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (999, 999))",
        "import os; os.setuid(0); open('/etc/shadow')",
        "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
        "import ctypes; assert ctypes.CDLL(None).mount(b'a', b'/tmp', b'tmpfs', 0, 0) == 0",
    ],
)
def test_other_processes_are_out_of_reach(program):
    outcome = attempt(program)
    assert outcome.status == "error", outcome
    assert left_over() == []


@pytest.fixture
def segment():
    """The number of a System V shared memory segment of this process, that holds a secret."""
    library = ctypes.CDLL(None, use_errno=True)
    library.shmat.restype = ctypes.c_void_p
    number = library.shmget(0, ctypes.c_size_t(4096), 0o1600)  # IPC_PRIVATE, IPC_CREAT
    assert number >= 0, os.strerror(ctypes.get_errno())
    ctypes.memmove(library.shmat(number, None, 0), b"a secret", 8)
    yield number
    library.shmctl(number, 0, None)


@confined
@pytest.mark.parametrize(
    "call",
    [
        "f.shmat({0}, None, 0)",
        "f.shmctl({0}, 0, None)",
        "f.shmctl({0}, 2, ctypes.create_string_buffer(4096))",
        "f.shmget(0, ctypes.c_size_t(4096), 0o1600)",
        "f.semctl(0, 0, 0)",
        "f.semop(0, None, 0)",
        "f.msgctl(0, 0, None)",
        "f.msgsnd(0, b'0' * 64, 8, 0o4000)",
        "f.msgrcv(0, ctypes.create_string_buffer(64), 8, 0, 0o4000)",
        "f.mq_unlink(b'/a')",
    ],
)
def test_shared_memory_and_queues_are_out_of_reach(call, segment):
    program = "import ctypes, errno\nf = ctypes.CDLL(None, use_errno=True)\nf.shmat.restype = ctypes.c_ssize_t\n"
    program += f"print({call.format(segment)}, errno.errorcode.get(ctypes.get_errno()))"
    assert attempt(program).stdout in ("-1 EPERM\n", "-1 EACCES\n")  # the C library calls it so for mq_unlink
    seen = ctypes.CDLL(None)
    seen.shmat.restype = ctypes.c_void_p
    assert ctypes.string_at(seen.shmat(segment, None, 0o10000), 8) == b"a secret"


@confined
def test_a_program_dies_with_whoever_runs_it(tmp_path):
    """A trainer that is killed leaves no program running."""
    code = "from leibler.data.sandbox import *; confinement(); print('on', flush=True); "
    code += "run_program('while True: pass', '', Limits(seconds=60))"
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert trainer.stdout is not None
    trainer.stdout.readline()
    child = None
    for _ in range(600):
        found = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(trainer.pid)], capture_output=True, text=True
        ).stdout.split()
        if found and "sandboxed" in Path(f"/proc/{found[0]}/cmdline").read_text():
            child = found[0]
            break
        time.sleep(0.05)
    assert child is not None
    time.sleep(0.5)
    trainer.kill()
    trainer.wait()
    for _ in range(600):
        if not Path(f"/proc/{child}").exists():
            return
        time.sleep(0.05)
    raise AssertionError("the program outlived its trainer")


# ---- verdicts ----------------------------------------------------------------------------------------------------

ADD = Record(
    "# adds two numbers", extra={"tests": [{"call": "add(2, 3)", "output": "5"}, {"call": "add(-1, 1)", "output": "0"}]}
)
ECHO = Record(
    "# twice", extra={"tests": [{"input": "4\n", "output": "8"}, {"input": "-3", "output": "-6\n", "call": None}]}
)


@confined
def test_rewards_of_right_wrong_and_broken_programs():
    programs = [
        "def add(a, b): return a + b",
        "def add(a, b): return 5",
        "def add(a): return a",
        "",
        "while True: pass",
    ]
    reward = PassesTests(QUICK)
    assert reward([ADD] * 5, programs) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert PassesTests(QUICK, partial=True)([ADD] * 2, programs[:2]) == [1.0, 0.5]
    assert reward([ECHO] * 2, ["print(int(input()) * 2)", "print(input() * 2)"]) == [1.0, 0.0]
    assert reward.verdicts(ADD, programs[1]) == ["", "printed '5', not '0'"]
    assert reward([ADD], ["Sure:\n```python\ndef add(a, b):\n    print('noise')\n    return a + b\n```\nThere."]) == [
        1.0
    ]
    assert extract_program("```\na\n```\n```py\nb\n```") == "b\n"


@confined
@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "import sys; print('5'); sys.exit(0)",
        "import os; os._exit(97)",
        "print('1.0'); print(True)",
        "class A(int):\n    def __eq__(self, o): return True\n    __hash__ = int.__hash__\ndef add(a, b): return A(7)",
        "import builtins; builtins.repr = lambda x: 'ok'\ndef add(a, b): return 1",
    ],
)
def test_a_program_cannot_write_its_own_verdict(program):
    assert PassesTests(QUICK)([ADD], [program]) == [0.0]


@pytest.mark.parametrize(
    "tests",
    [
        None,
        [],
        "add(1, 2)",
        [{}],
        [{"output": "5"}],
        [{"call": "f()", "input": "a", "output": "5"}],
        [{"call": 3, "output": "5"}],
        [["call"]],
    ],
)
def test_a_record_without_tests_is_named_before_anything_runs(tests):
    with pytest.raises(DataError, match=r"a.jsonl:7 has no tests in the column 'tests'"):
        PassesTests()([ADD, Record("p", source="a.jsonl:7", extra={"tests": tests})], ["while True: pass"] * 2)


@pytest.mark.parametrize(
    "given", [{"seconds": 0}, {"seconds": float("nan")}, {"seconds": 1e9}, {"memory": 5}, {"output": 0}]
)
def test_limits_that_limit_nothing_are_refused(given):
    with pytest.raises(DataError, match="a program cannot be given"):
        Limits(**given)


def test_without_confinement_nothing_is_run_unless_allowed(monkeypatch):
    monkeypatch.setattr("leibler.data.sandbox.confinement", lambda: "Landlock is not possible here")
    with pytest.raises(DataError, match=r"programs are not run here .* Landlock is not possible here; .*weaker=True"):
        run_program("print(1)")
    with pytest.raises(DataError, match="programs are not run here"):
        PassesTests()([ADD], ["def add(a, b): return a + b"])
    assert PassesTests(weaker=True)([ADD], ["def add(a, b): return a + b"]) == [1.0]


@pytest.mark.parametrize(
    ("there", "here", "says"),
    [
        ('"Landlock", 444', '"Landlock", 9999', "Landlock is not possible here"),
        ("version = _call(", "version = 2 or (", "this kernel's Landlock"),
    ],
    ids=["none", "too old"],
)
def test_a_kernel_without_landlock_runs_nothing(there, here, says, tmp_path):
    """The inside fails closed: it ends with its own status before the program begins."""
    from leibler.data import sandbox, sandboxed

    child = tmp_path / "sandboxed.py"
    text = Path(sandboxed.__file__).read_text()
    assert there in text
    child.write_text(text.replace(there, here))
    before, sandbox._CHILD = sandbox._CHILD, child
    try:
        outcome, status = sandbox._run("print('ran')", "", Limits(), require=True)
    finally:
        sandbox._CHILD = before
    assert (outcome.stdout, status) == ("", sandboxed.UNCONFINED)
    assert outcome.reason.startswith(says)


@confined
def test_programs_are_a_reward_of_a_run(tmp_path):
    alphabet = "def f(): return 0123456789\n#x"
    student = tiny_llama(character_tokenizer(alphabet), hidden=16, layers=1, heads=2)
    rows = [{"prompt": f"#{n}\n", "tests": [{"call": "1", "output": "1"}]} for n in range(4)]
    recipe = Recipe(
        OnPolicy(group_size=2) >> Score(PassesTests(QUICK)), Objective(PolicyGradient(Reward() >> GroupNormalised()))
    )
    run = fit(recipe, student=student, data=rows, out=tmp_path, steps=1, batch_size=4, max_new_tokens=4, quiet=True)
    assert 0.0 <= run.metrics["reward"] <= 1.0
