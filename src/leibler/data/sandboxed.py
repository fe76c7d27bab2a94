"""The inside of the sandbox: this process gives up what it could do harm with, then runs one program.

Run as ``python -I -S sandboxed.py SETTINGS`` by `leibler.data.sandbox`, never imported by it. Standard input holds the
length of the program, the program, and what the program shall read. Everything given up here is given up for good:
the kernel, not this file, refuses from then on, so a program that calls the kernel itself gets no further.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import platform
import resource
import struct
import sys

UNCONFINED = 97
"""Exit status when the kernel does not offer what was asked for: the program was not run."""

_THREAD = 0x10000
_LAST_CAPABILITY_VERSION = 0x20080522

# Calls refused with EPERM. By the kernel's tables of numbers, x86-64 and the common one of arm64.
_ABOVE_423 = {  # the same on every machine
    "pidfd_send_signal": 424, "io_uring_setup": 425, "open_tree": 428, "move_mount": 429, "fsopen": 430,
    "pidfd_open": 434, "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442, "memfd_secret": 447,
    "fchmodat2": 452, "setxattrat": 463, "removexattrat": 466,
}  # fmt: skip
_X86_64 = {
    "socket": 41, "socketpair": 53,
    "fork": 57, "vfork": 58, "execve": 59, "execveat": 322,
    "kill": 62, "tkill": 200, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297,
    "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "perf_event_open": 298,
    "setrlimit": 160, "prlimit64": 302, "setpriority": 141, "ioprio_set": 251,
    "sched_setparam": 142, "sched_setscheduler": 144, "sched_setaffinity": 203, "sched_setattr": 314,
    "chmod": 90, "fchmod": 91, "fchmodat": 268, "chown": 92, "fchown": 93, "lchown": 94, "fchownat": 260,
    "utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280,
    "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199,
    "memfd_create": 319, "shmget": 29, "shmat": 30, "shmctl": 31, "mq_open": 240, "mq_unlink": 241,
    "semget": 64, "semop": 65, "semctl": 66, "semtimedop": 220, "msgget": 68, "msgsnd": 69, "msgrcv": 70, "msgctl": 71,
    "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308, "personality": 135,
    "open_by_handle_at": 304, "bpf": 321, "userfaultfd": 323, "migrate_pages": 256, "move_pages": 279,
    "add_key": 248, "request_key": 249, "keyctl": 250,
}  # fmt: skip
_ARM64 = {
    "socket": 198, "socketpair": 199,
    "execve": 221, "execveat": 281,
    "kill": 129, "tkill": 130, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240,
    "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "perf_event_open": 241,
    "setrlimit": 164, "prlimit64": 261, "setpriority": 140, "ioprio_set": 30,
    "sched_setparam": 118, "sched_setscheduler": 119, "sched_setaffinity": 122, "sched_setattr": 274,
    "fchmod": 52, "fchmodat": 53, "fchown": 55, "fchownat": 54, "utimensat": 88,
    "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16,
    "memfd_create": 279, "shmget": 194, "shmctl": 195, "shmat": 196, "mq_open": 180, "mq_unlink": 181,
    "semget": 190, "semctl": 191, "semtimedop": 192, "semop": 193,
    "msgget": 186, "msgctl": 187, "msgrcv": 188, "msgsnd": 189,
    "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "unshare": 97, "setns": 268, "personality": 92,
    "open_by_handle_at": 265, "bpf": 280, "userfaultfd": 282, "migrate_pages": 238, "move_pages": 239,
    "add_key": 217, "request_key": 218, "keyctl": 219,
}  # fmt: skip
# By machine: the kernel's name of the architecture, capset, clone, tgkill, seccomp, and what is refused.
_MACHINES = {
    "x86_64": (0xC000003E, 126, 56, 234, 317, _X86_64 | _ABOVE_423),
    "aarch64": (0xC00000B7, 91, 220, 131, 277, _ARM64 | _ABOVE_423),
}
_CLONE3 = 435


class Refused(OSError):
    """The kernel does not offer a confinement."""


def main() -> None:
    settings = json.loads(sys.argv[1])
    stdin = os.fdopen(0, "rb", closefd=False)
    (length,) = struct.unpack(">Q", stdin.read(8))
    program, given = stdin.read(length).decode("utf-8"), stdin.read()
    try:
        _limits(settings)
        confine(settings["require"])
    except OSError as error:
        print(f"{error}", file=sys.stderr)
        os._exit(UNCONFINED)
    sys.stdin = io.TextIOWrapper(io.BytesIO(given), encoding="utf-8")
    sys.argv = ["program"]
    _run(program)


def _run(program: str) -> None:
    """Run the program as ``__main__``; a failure is told by the last line of standard error and status 1."""
    names = {"__name__": "__main__", "__builtins__": __builtins__}
    exec(compile(program, "<program>", "exec"), names)  # what this process is for; see confine()


def _limits(settings: dict[str, int]) -> None:
    for name, value in {
        "RLIMIT_CPU": settings["cpu"],
        "RLIMIT_AS": settings["memory"],
        "RLIMIT_FSIZE": 0,
        "RLIMIT_NOFILE": 32,
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": 1,
    }.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (AttributeError, ValueError, OSError) as error:
            # macOS knows no limit of the address space; where all confinement is required, it is not run at all.
            if settings["require"]:
                raise Refused(f"the limit {name} cannot be set ({error})") from error


def confine(require: bool) -> None:
    """Give up files, network, other processes and privileges, by Landlock and seccomp.

    Raises:
        Refused: the kernel lacks one of them and ``require`` is set.
    """
    steps = (_die_with_the_parent, _drop_privileges, _landlock, _seccomp)
    for step in steps:
        try:
            step()
        except Refused:
            if require:
                raise


def _system() -> ctypes.CDLL:
    if not sys.platform.startswith("linux"):
        raise Refused("programs can only be confined on Linux")
    return ctypes.CDLL(None, use_errno=True)


def _call(library: ctypes.CDLL, what: str, number: int, *arguments: object) -> int:
    result = library.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise Refused(f"{what} is not possible here ({os.strerror(ctypes.get_errno())})")
    return result


def _die_with_the_parent() -> None:
    parent = os.getppid()
    if _system().prctl(1, 9, 0, 0, 0) or os.getppid() != parent:
        raise Refused("the process cannot be tied to its parent")


def _machine() -> tuple[int, int, int, int, int, dict[str, int]]:
    try:
        return _MACHINES[platform.machine()]
    except KeyError:
        raise Refused(f"programs cannot be confined on a {platform.machine()} machine") from None


def _drop_privileges() -> None:
    """No capability stays, even if a superuser trains, and none can be gained."""
    library, (_, capset, *_rest) = _system(), _machine()
    if library.prctl(38, 1, 0, 0, 0):
        raise Refused("privileges cannot be given up")
    header, nothing = struct.pack("Ii", _LAST_CAPABILITY_VERSION, 0), bytes(24)
    _call(library, "giving up capabilities", capset, ctypes.c_char_p(header), ctypes.c_char_p(nothing))


def _landlock() -> None:
    """Files: Python's own library and the system's shared libraries may be read; nothing else, and nothing written."""
    library = _system()
    version = _call(library, "Landlock", 444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 3:
        raise Refused("this kernel's Landlock cannot forbid to truncate files (Linux 6.2 can)")
    every = (1 << 15) - 1 | (version >= 5) << 15
    network, scope = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    attributes = struct.pack("QQQ", every, network, scope)[:size]
    ruleset = _call(library, "Landlock", 444, ctypes.c_char_p(attributes), ctypes.c_size_t(size), ctypes.c_uint32(0))
    read = 1 << 2 | 1 << 3  # the contents of files and folders
    for folder in {os.path.dirname(os.path.realpath(os.__file__)), "/usr/lib", "/lib", "/lib64"}:
        if os.path.isdir(folder):
            handle = os.open(folder, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", read, handle)
            _call(library, "Landlock", 445, ruleset, ctypes.c_int(1), ctypes.c_char_p(rule), ctypes.c_uint32(0))
            os.close(handle)
    _call(library, "Landlock", 446, ruleset, ctypes.c_uint32(0))
    os.close(ruleset)


def _seccomp() -> None:
    """No network, no other process, no signals, no change of a file's owner, mode or time, no larger limits."""
    library = _system()
    architecture, _, clone, tgkill, seccomp, refused = _machine()
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, absent, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    number, arch, first = 0, 4, 16  # offsets in seccomp_data; the low half of the first argument

    def only_if(test: int, operand: int, call: int) -> list[tuple[int, int, int, int]]:
        """Allow a call if its first argument passes a test."""
        return [
            (equal, 0, 4, call),
            (load, 0, 0, first),
            (test, 1, 0, operand),
            (give, 0, 0, refuse),
            (give, 0, 0, allow),
        ]

    rules = [(load, 0, 0, arch), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, number)]
    rules += [(at_least, 0, 1, 0x40000000), (give, 0, 0, refuse)]  # the x32 numbers of x86-64
    for call in refused.values():
        rules += [(equal, 0, 1, call), (give, 0, 0, refuse)]
    # Its flags lie in memory, where a filter cannot look; the C library falls back to clone.
    rules += [(equal, 0, 1, _CLONE3), (give, 0, 0, absent)]
    rules += only_if(any_bit, _THREAD, clone)
    rules += only_if(equal, os.getpid(), tgkill)  # abort() signals the process itself
    rules += [(give, 0, 0, allow)]
    code = b"".join(struct.pack("HBBI", *rule) for rule in rules)
    held = ctypes.create_string_buffer(code, len(code))
    filter_ = struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(held))
    _call(library, "seccomp", seccomp, ctypes.c_uint(1), ctypes.c_uint(1), ctypes.c_char_p(filter_))


if __name__ == "__main__":
    main()
