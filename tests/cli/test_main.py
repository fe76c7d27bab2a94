"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from leibler import claims, cli
from leibler.claims.framework import Claim
from leibler.errors import RunError
from leibler.recipes.registry import METHODS

COMMANDS = ("methods", "show", "train", "cache", "verify", "report", "demo", "measure", "measure divergence",
            "measure accuracy")  # fmt: skip


@pytest.fixture
def leibler(capsys):
    """Run a command in this process: ``leibler("methods") -> (status, out, err)``."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def shell(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "leibler", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_answers_at_once_and_imports_nothing_heavy(tmp_path):
    code = (
        "import sys\nfrom leibler.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'rich', 'pydantic', 'numpy', 'transformers', 'yaml') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert out.endswith("[]\n"), out
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = shell("--help", cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time, not the clock on the wall: other tests run beside this one.
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0
    assert min(seconds) < 0.25, seconds


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example(leibler, command):
    status, out, _ = leibler(*command.split(), "--help")
    assert status == 0
    assert f"Example:\n    leibler {command} " in out


def test_no_arguments_is_a_question_about_usage(leibler):
    _, out, err = leibler()
    assert all(command in out + err for command in COMMANDS if " " not in command)


def test_version(leibler):
    import leibler as package

    assert leibler("--version") == (0, f"{package.__version__}\n", "")


def test_methods_lists_them_all(leibler):
    status, out, err = leibler("methods")
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(METHODS)


def test_methods_for_programs(leibler):
    status, out, _ = leibler("methods", "--family", "preference", "--json")
    listed = json.loads(out)
    assert status == 0
    assert [m["slug"] for m in listed] == [s for s, m in METHODS.items() if m.family == "preference"]
    assert set(listed[0]) >= {"slug", "title", "year", "family", "kind", "summary"}
    assert isinstance(listed[0]["year"], int)


def test_an_unknown_family_is_one_sentence(leibler):
    status, out, err = leibler("methods", "--family", "cooking")
    assert (status, out) == (2, "")
    families = "distillation, policy, preference, measurement"
    assert err == f"error: 'cooking' is not a family of methods; families: {families}.\n"


def test_an_unknown_method_suggests_the_nearest(leibler):
    status, _, err = leibler("show", "minilm")
    assert status == 2
    assert err.startswith("error: 'minilm' is not a known method (did you mean miniplm, minillm")
    assert err.count("\n") == 1


def test_an_unknown_command_or_option_is_a_usage_error(leibler):
    assert leibler("trian")[0] == 2
    status, _, err = leibler("methods", "--famly", "policy")
    assert status == 2
    assert "--famly" in err


def test_it_works_from_any_directory_without_a_terminal(tmp_path):
    done = shell("methods", cwd=tmp_path, TERM="dumb")
    assert done.returncode == 0
    assert "minillm" in done.stdout
    assert "\x1b" not in done.stdout
    done = shell("show", "nothing-like-it", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    command = f"{sys.executable} -m leibler methods | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("slug")
    assert done.stderr == ""


# ---- verify --------------------------------------------------------------------------------------------------------


def invented(slug: str, holds: bool, full: bool = False) -> Claim:
    return Claim(slug, f"about {slug}", "as expected", full, lambda: ("seen", holds))


@pytest.fixture
def some_claims(monkeypatch):
    def use(*chosen: Claim) -> None:
        monkeypatch.setattr(claims.framework, "claims", lambda: list(chosen))

    return use


def test_verify_exits_with_0_when_all_hold(leibler, some_claims):
    some_claims(invented("kd", True), invented("dpo", True), invented("dpo", False, full=True))
    status, out, _ = leibler("verify")
    assert status == 0
    assert "holds  kd: about kd" in out
    assert "       observed seen\n       expected as expected\n" in out
    assert "\ndpo     1     0     0.0      all hold\n" in out
    assert "2 of 2 claims about 2 methods hold" in out


def test_verify_exits_with_1_when_one_does_not(leibler, some_claims):
    some_claims(invented("kd", True), invented("dpo", False))
    status, out, _ = leibler("verify")
    assert status == 1
    assert "FAILS  dpo: about dpo" in out
    assert leibler("verify", "kd")[0] == 0
    assert leibler("verify", "--family", "preference")[0] == 1


def test_verify_for_programs(leibler, some_claims):
    some_claims(invented("kd", True), invented("kd", False, full=True))
    status, out, err = leibler("verify", "--json", "--full", "kd")
    results = json.loads(out)
    assert status == 1
    assert [r["holds"] for r in results] == [True, False]
    assert set(results[0]) == {"slug", "claim", "observed", "expected", "holds", "seconds"}
    assert err.count("kd: about kd") == 2, "slow claims say that they have begun"


def test_verify_tells_how_far_it_is_and_how_long_it_takes(leibler, some_claims):
    some_claims(invented("kd", True), invented("dpo", True, full=True), invented("dpo", True, full=True))
    _, _, err = leibler("verify", "--full")
    begun = err.splitlines()
    assert begun[0] == "[1/3] kd: about kd ..."
    assert begun[1] == "[2/3] dpo: about dpo ...", "nothing is known about slow claims yet"
    assert begun[2] == "[3/3, about 0:00 left] dpo: about dpo ..."


@pytest.mark.parametrize("as_json", [False, True])
def test_an_interrupted_verify_gives_what_is_done(leibler, some_claims, as_json):
    def stop() -> tuple[str, bool]:
        raise KeyboardInterrupt

    some_claims(invented("kd", True), Claim("dpo", "about dpo", "e", False, stop), invented("dpo", True))
    status, out, err = leibler("verify", *(["--json"] if as_json else []))
    assert status not in (0, 1, 2)
    assert "interrupted" in err
    if as_json:
        assert [r["slug"] for r in json.loads(out)] == ["kd"]
    else:
        assert "1 of 1 claims about 1 methods hold (0.0 s); interrupted with 2 still to run" in out


def test_verify_of_something_without_claims_is_a_mistake(leibler, some_claims):
    some_claims(invented("kd", True))
    status, _, err = leibler("verify", "minillm")
    assert status == 2
    assert err.startswith("error: 'minillm' has no claim")


def test_verify_of_nothing_is_no_success(leibler, some_claims):
    some_claims(invented("kd", True, full=True), invented("dpo", True))
    assert leibler("verify", "kd") == (2, "", "error: only slow claims match; add --full (full=True).\n")
    assert leibler("verify", "kd", "--family", "preference") == (2, "", "error: no claim matches.\n")
    some_claims()
    assert leibler("verify")[0] == 2


# ---- errors --------------------------------------------------------------------------------------------------------


def test_a_users_mistake_is_a_sentence_and_a_bug_is_a_traceback(leibler, monkeypatch):
    from leibler.cli import methods

    def mistake(*_):
        raise RunError("runs/a holds another run; choose another out=.")

    monkeypatch.setattr(methods, "list_methods", mistake)
    assert leibler("methods") == (2, "", "error: runs/a holds another run; choose another out=.\n")

    def bug(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(methods, "list_methods", bug)
    with pytest.raises(ZeroDivisionError):
        cli.main(["methods"])


def test_ctrl_c_exits_with_130(leibler, monkeypatch):
    from leibler.cli import methods

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(methods, "list_methods", interrupted)
    status, _, err = leibler("methods")
    assert status == 130
    assert "interrupted" in err
