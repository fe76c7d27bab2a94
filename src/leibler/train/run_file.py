"""``run.yaml``: everything needed to repeat a run, written before its first step and read without believing it."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leibler import durable
from leibler.cache import PREFIX, fingerprint
from leibler.data.spec import FAMILIES
from leibler.errors import RunError
from leibler.train.options import Options
from leibler.train.recipe import Recipe

if TYPE_CHECKING:
    from leibler.cache import TeacherCache
    from leibler.data import Dataset
    from leibler.policy import CausalLM
    from leibler.train.pipeline import Pipeline

RUN_FILE = "run.yaml"
COMMANDS = ("leibler", "__main__.py")
LARGEST = 2**18
"""Bytes of a run file; one that leibler writes has a few thousand."""
DEEPEST = 32
"""Levels of nesting in YAML text; a run file has three."""
PACKAGES = ("leibler", "torch", "transformers", "accelerate", "datasets", "peft")
_GIT_SECONDS = 10


# ---- writing -----------------------------------------------------------------------------------------------------


def write(
    out: Path,
    origin: Mapping[str, Any],
    given: Mapping[str, Any],
    options: Options,
    recipe: Recipe | Pipeline,
    identity: Mapping[str, Mapping[str, str]],
    device: torch.device | str = "cpu",
    processes: int = 1,
) -> list[str]:
    """Write ``run.yaml``; returns what differs from the run that is repeated, if one is (``origin['repeats']``)."""
    import yaml

    from leibler.train.plan import describe

    inputs = {name: _plain(value) for name, value in given.items()}
    whole: dict[str, Any] = {
        **origin,
        **inputs,
        "out": absolute(str(out)),
        "options": asdict(options),
        **identity,
        "description": describe(recipe),
        "versions": {"python": sys.version.split()[0], **{p: version(p) for p in PACKAGES}},
        "hardware": hardware(device, processes),
        "git": git_states(),
        "directory": str(Path.cwd()),
        "command": shlex.join(["leibler", *sys.argv[1:]]) if Path(sys.argv[0]).name in COMMANDS else "",
        "rerun": _rerun(out, origin, inputs, options, device, processes),
    }
    differs = _differs(origin.get("repeats"), whole)
    if differs:
        whole["differs"] = differs

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True  # the reader takes none

    text = yaml.dump(whole, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    durable.write_text(out / RUN_FILE, text)
    return differs


def exists(text: str) -> bool:
    """Whether text is a path that exists; False for what cannot be a path at all."""
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL in it, no such user
        return False


def absolute(text: str) -> str:
    """A path that exists, made absolute, so that a run file means the same from every directory; else the text."""
    if text.startswith(PREFIX):  # cache:DIR or cache:DIR:tail=...
        folder, mark, tail = text.removeprefix(PREFIX).partition(":tail=")
        return PREFIX + absolute(folder) + mark + tail
    return str(Path(text).expanduser().resolve()) if exists(text) else text


def _plain(value: Any) -> Any:
    """Paths and specifications as text; what was given in memory, by what it is."""
    if value is None:
        return None
    if isinstance(value, (str, Path)):
        return absolute(str(value))
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    named = getattr(value, "name", None)
    # Records read from a file or made by a task are told by its name; their hash tells whether it makes them again.
    if isinstance(named, str) and (
        named.startswith((*FAMILIES, PREFIX)) or (Path(named).suffix and Path(absolute(named)).is_file())
    ):
        return absolute(named)
    return f"<{type(value).__name__} given in memory>"


def in_memory(value: Any) -> bool:
    """Whether an entry of a run file stands for something that only Python can give."""
    if isinstance(value, Mapping):
        return any(map(in_memory, value.values()))
    return isinstance(value, str) and value.endswith("given in memory>")


def _rerun(
    out: Path,
    origin: Mapping[str, Any],
    inputs: Mapping[str, Any],
    options: Options,
    device: torch.device | str,
    processes: int,
) -> str:
    if origin.get("recipe") == "custom" or any(map(in_memory, inputs.values())):
        return "only in Python, with fit(): the recipe, a model or data was given in memory"
    arguments = ["train", str((out / RUN_FILE).resolve())]
    if options.trust_remote_code:
        arguments.append("trust_remote_code=true")
    if processes == 1:
        return shlex.join(["leibler", *arguments])
    launch = shlex.join(["torchrun", "--nproc_per_node", str(processes), "-m", "leibler", *arguments])
    return f"ACCELERATE_USE_CPU=1 {launch}" if torch.device(device).type == "cpu" else launch


def hardware(device: torch.device | str, processes: int) -> dict[str, Any]:
    """What the last digits of a run may depend on."""
    device = torch.device(device)
    facts: dict[str, Any] = {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "device": device.type,
    }
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return facts


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def git_states() -> dict[str, dict[str, Any]]:
    """The state of the repositories of the working directory and, if it is not an installed copy, of leibler."""
    folders = {"directory": Path.cwd()}
    here = Path(__file__).resolve()
    if "site-packages" not in here.parts:
        folders["leibler"] = here.parent
    states = {name: git_state(folder) for name, folder in folders.items()}
    return {name: state for name, state in states.items() if state is not None}


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of a repository, whether anything in it is not committed, and a hash of that; None outside of one.

    The hash covers the changes to files under version control and the names of those that are not.
    """
    root = _git(folder, "rev-parse", "--show-toplevel")
    if root is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    status, changes = _git(folder, "status", "--porcelain"), _git(folder, *_DIFF, "HEAD" if commit else "--cached")
    state: dict[str, Any] = {
        "root": root.decode("utf-8", "replace").strip(),
        "commit": commit.decode("ascii", "replace").strip() if commit else "none yet",
    }
    if status is None or changes is None:
        return state | {"dirty": "not known"}
    if status or changes:
        return state | {"dirty": True, "changes_hash": hashlib.sha256(status + b"\0" + changes).hexdigest()}
    return state | {"dirty": False}


_DIFF = ("diff", "--binary", "--no-ext-diff", "--no-textconv")


def _git(folder: Path, *arguments: str) -> bytes | None:
    # A repository's own settings could name programs to run; the ones these commands would use are set aside.
    settings = ("-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(
            ["git", *settings, "-C", str(folder), *arguments],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=_GIT_SECONDS,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git here, or a repository too large to ask
    return done.stdout if done.returncode == 0 else None


def _differs(repeats: Any, whole: Mapping[str, Any]) -> list[str]:
    """In sentences, where a run cannot be the repetition it was meant to be."""
    if repeats is None:
        return []
    before, found = read_run_file(Path(repeats)), []
    for kind, what in (("data_hashes", "the records of data.{}"), ("weight_hashes", "the weights of {}")):
        earlier = mapping(before.get(kind))
        for name in sorted(set(earlier) & set(whole[kind])):
            if earlier[name] != whole[kind][name]:
                found.append(f"{what.format('student' if name == 'policy' else name)} are others")
    for kind, names in (("versions", None), ("hardware", ("cpu_capability", "device", "threads", "processes"))):
        earlier = mapping(before.get(kind))
        for name in names or earlier:
            if name in earlier and earlier[name] != whole[kind].get(name):
                found.append(f"{name} was {earlier[name]} and is {whole[kind].get(name)}")
    return found


# ---- reading -----------------------------------------------------------------------------------------------------


def read_yaml(text: str) -> Any:
    """YAML text of plain values: no tags, no anchors (which can stand for gigabytes), no key twice.

    Raises:
        ValueError: it is anything else; the message says where.

    Examples:
        >>> read_yaml("steps: 200")
        {'steps': 200}
        >>> read_yaml("a: !!python/object/apply:os.system [ls]")
        Traceback (most recent call last):
        ...
        ValueError: line 1: the tag tag:yaml.org,2002:python/object/apply:os.system is not read
    """
    import yaml

    if len(text) > LARGEST:
        raise ValueError(f"it is longer than {LARGEST // 1024} kB")
    try:
        _check_events(yaml.parse(text, Loader=yaml.SafeLoader))
        return _loader()(text).get_single_data()
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{where}{problem.splitlines()[0]}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # PyYAML hands texts that look like dates and numbers to Python's own constructors, whatever these make of them.
        raise ValueError(str(error).splitlines()[0] if str(error) else type(error).__name__) from None


def _check_events(events: Any) -> None:
    """Looks at the events before anything is built from them."""
    import yaml

    depth = 0
    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ValueError(f"line {line}: anchors and aliases are not read")
        if getattr(event, "tag", None):
            raise ValueError(f"line {line}: the tag {event.tag[:80]} is not read")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"line {line}: nested deeper than {DEEPEST} levels")


@cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            made = super().construct_mapping(node, deep)
            if len(made) < len(node.value):
                raise yaml.constructor.ConstructorError(None, None, "a key is given twice", node.start_mark)
            return made

    return Loader


def read_run_file(path: Path) -> dict[str, Any]:
    """A ``run.yaml``, or the one in a run directory.

    Raises:
        RunError: it cannot be read, or describes no run.
    """
    try:
        path = path / RUN_FILE if path.is_dir() else path
        if not path.exists():
            raise RunError(f"{path} does not exist; give a run directory or its {RUN_FILE}.")
        if not path.is_file():
            raise RunError(f"{path} is no ordinary file; give a run directory or its {RUN_FILE}.")
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise RunError(f"{str(path)[:200]} cannot be read ({why}); give a run directory or its {RUN_FILE}.") from error
    try:
        content = read_yaml(raw.decode("utf-8"))
    except ValueError as error:
        what = "UTF-8" if isinstance(error, UnicodeDecodeError) else "valid YAML"
        raise RunError(f"{path} is not {what} ({error}); restore it from the run.") from error
    if not isinstance(content, dict) or "recipe" not in content:
        raise RunError(f"{path} does not describe a run (no 'recipe'); give a {RUN_FILE} that leibler train wrote.")
    return content


def mapping(value: Any) -> Mapping[str, Any]:
    """The mapping, or an empty one where a file holds something else."""
    return value if isinstance(value, Mapping) else {}


# ---- identity ----------------------------------------------------------------------------------------------------


def identity(
    data: Mapping[str, Dataset], models: Mapping[str, CausalLM], stored: Mapping[str, TeacherCache]
) -> dict[str, dict[str, str]]:
    """What a resumed run must find again: the records, the weights before the first step, the teacher caches."""
    return {
        "data_hashes": {name: dataset.content_hash for name, dataset in data.items()},
        "weight_hashes": {name: fingerprint(model) for name, model in models.items()},
        "cache_hashes": {name: cache.hash for name, cache in stored.items()},
    }


def check_identity(out: Path, found: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse to go on with other records or other weights than the run in ``out`` was begun with."""
    written = read_run_file(out)
    kinds = {
        "data_hashes": "the records of data.",
        "weight_hashes": "the weights of the model ",
        "cache_hashes": "the contents of the teacher cache of ",
    }
    for kind, what in kinds.items():
        for name, before in mapping(written.get(kind)).items():
            if found[kind].get(name) not in (before, None):
                name = "student" if name == "policy" else name
                raise RunError(
                    f"{what}{name} are not those that the run in {out} was begun with; give the same again "
                    "(a model in memory that was trained since is another one)."
                )


def sentence(differs: Sequence[str], repeats: Any) -> str:
    """One sentence about a repetition that cannot be exact."""
    return f"not an exact repetition of {repeats}: {'; '.join(differs)}"
