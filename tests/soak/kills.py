"""Kill and resume: runs killed with SIGKILL, gone on with, and compared bit for bit with runs that nobody touched.

Importing torch takes seconds, a run of twelve steps one: so one process imports everything and forks a child for each
attempt. A child counts the calls to the function that stands for a place and kills itself in the middle of one. The
unbroken runs are made by another process with another hash seed, so that nothing may hang on the order of a set.

    python tests/soak/kills.py OUT unbroken kd grpo            writes OUT/unbroken/CASE
    python tests/soak/kills.py OUT kill --seed 0 --kills 20    prints one JSON line for each fault
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from soak.table import Row, different_bits

STEPS = 12
CASES = ("kd", "grpo", "replay", "ppo", "distillm", "inpo")
"""Off-policy; on-policy; a buffer with behaviour log-probs; several steps a draw, critic and controller; a buffer that
waits for validations; a model that is renewed each round. All with dropout and accumulated gradients, and 30 records,
so that an epoch of the data ends after the fourth draw of eight and again after the eighth."""


def start(case: str, out: Path, resume: bool) -> None:
    """Begin the run of a case, or go on with it."""
    from leibler.objective import Behaviour, Clip, GroupNormalised, Objective, PolicyGradient, Reward
    from leibler.train import OnPolicy, RaiseOnWorse, Recipe, Replay, Score
    from train.running import RECORDS, recipe, reward, run

    options: dict[str, Any] = {
        "steps": STEPS, "save_every": 3, "micro_batch_size": 3, "decay": "cosine", "warmup": 2, "weight_decay": 0.1,
    }  # fmt: skip
    if case == "kd":
        made = recipe("kd")
        options |= {"validation": RECORDS[:3], "validate_every": 5}
    elif case == "grpo":
        made = recipe("grpo", group_size=2)
    elif case == "ppo":
        made = recipe("ppo", minibatches=2, epochs=1, target=0.01, horizon=50.0)
    elif case == "inpo":
        made = recipe("inpo", group_size=4, steps_per_round=2)
    elif case == "distillm":
        made = recipe("distillm", capacity=20)
        # Every validation raises phi, so that fresh and replayed rows occur in a short run.
        made = replace(made, source=replace(made.source, phi=RaiseOnWorse(by=0.5, tolerance=-10.0)))
        options["validate_every"] = 2
    else:
        objective = Objective(PolicyGradient(Reward() >> GroupNormalised(), Clip(0.2, anchor=Behaviour())))
        made = Recipe(Replay(OnPolicy(2) >> Score(reward), capacity=24), objective)
    run(made, out, resume=resume, **options)


# ---- places ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a run is killed: before, after or in the middle of a call to ``module.name``."""

    fault: str
    module: str
    name: str
    when: str = "before"


PLACES = (
    Place("in a rollout", "leibler.policy.sampler:_Law", "draw"),
    Place("between a draw and its step", "leibler.train.engine:Engine", "annotate"),
    Place("in gradient accumulation", "leibler.train.engine:Engine", "_event_hidden", "after"),
    Place("before the weights move", "torch.optim:AdamW", "step"),
    Place("after the weights moved", "torch.optim:AdamW", "step", "after"),
    Place("in a line of metrics", "leibler.train.log:Lines", "write", "half"),
    Place("in a validation", "leibler.train.loop", "validate"),
    Place("between metrics and manifest", "leibler.train.checkpoint", "save"),
    Place("in a save, between its files", "leibler.train.checkpoint", "save_file", "after"),
    Place("in a save, before the manifest", "leibler.train.checkpoint", "_hash"),
    Place("in a save, while it is flushed", "leibler.durable", "flush"),
    Place("in a save, before the rename", "pathlib:Path", "rename"),
    Place("in a save, right after the rename", "pathlib:Path", "rename", "after"),
    Place("while an old checkpoint is removed", "shutil", "rmtree", "half"),
    Place("right after a save", "leibler.train.checkpoint", "save", "after"),
    Place("in set-up, before run.yaml", "leibler.train.run_file", "write"),
    Place("while the final model is written", "leibler.policy.model:CausalLM", "save", "after"),
)
SPOILT = ("truncated", "altered", "manifest gone")
"""What happens to the newest checkpoint between a kill and the resume, in some attempts."""


def owner(place: Place) -> Any:
    module, _, name = place.module.partition(":")
    found = import_module(module)
    return getattr(found, name) if name else found


@contextmanager
def counting(place: Place, at: int | None = None) -> Iterator[list[int]]:
    """Inside the block, calls to a place are counted; at number ``at`` this process is killed."""
    where = owner(place)
    original, calls = getattr(where, place.name), [0]

    def wrapped(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] != at:
            return original(*given, **named)
        if place.when == "half":
            half(*given, **named)
        elif place.when == "after":
            original(*given, **named)
        return os.kill(os.getpid(), signal.SIGKILL)

    setattr(where, place.name, wrapped)
    try:
        yield calls
    finally:
        setattr(where, place.name, original)


def half(first: Any, *_: Any, **values: Any) -> None:
    """Half of a line, or half of a folder's removal."""
    if isinstance(first, Path):
        for path in sorted(first.rglob("*"))[::2]:
            path.unlink()
        return
    line = json.dumps(values)
    file = first.open()
    file.write(line[: len(line) // 2])
    file.flush()
    os.fsync(file.fileno())


def spoil(out: Path, how: str) -> bool:
    """Damage the newest checkpoint, if another is left; False if there is none to damage."""
    kept = sorted((out / "checkpoints").glob("step-*"))
    if not kept:
        return False
    file = kept[-1] / ("manifest.json" if how == "manifest gone" else "optimizer.safetensors")
    if not file.exists():  # half removed when the run was killed
        return False
    raw = bytearray(file.read_bytes())
    if how == "manifest gone":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(raw[: len(raw) // 2])
    else:
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
    return True


# ---- attempts --------------------------------------------------------------------------------------------------------


def forked(work: Callable[[], None], log: Path, after: float | None = None) -> int:
    """The exit status of a child that does ``work``; it is killed ``after`` seconds if that is given."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                try:
                    work()
                    status = 0
                except BaseException:
                    traceback.print_exc(file=file)
        finally:
            os._exit(status)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def written(out: Path) -> dict[str, bytes]:
    """What must be equal: everything that a run leaves, but clocks and where it stands."""
    skipped = {"timings.jsonl", "run.yaml", "manifest.json"}
    found = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    kept = {name: raw for name, raw in found.items() if Path(name).name not in skipped}
    for name in [n for n in kept if n.endswith("state.json")]:
        state = json.loads(kept[name])
        del state["lengths"]["timings.jsonl"]
        kept[name] = json.dumps(state).encode()
    return kept


@dataclass(frozen=True)
class Fault:
    """An attempt: where it was killed (once or twice), and what became of it."""

    case: str
    fault: str
    at: int
    survived: bool
    rows_lost: int
    bits_different: int
    seconds: float
    files: str = ""


def compare(out: Path, whole: Path) -> tuple[int, int, str]:
    """Lines missing or too many, bits different, and in which files."""
    expected, found = written(whole), written(out)
    bits, lost, files = 0, 0, []
    for name in sorted(expected.keys() | found.keys()):
        one, two = expected.get(name, b""), found.get(name, b"")
        if one != two:
            bits += max(different_bits(one, two), 1)
            files.append(name)
            if name.endswith(".jsonl"):
                lost += abs(one.count(b"\n") - two.count(b"\n"))
    return lost, bits, ", ".join(files)


def attempt(case: str, place: Place | None, at: int, spoilt: str | None, whole: Path, out: Path, pause: float) -> Fault:
    """Kill a run of a case at call ``at`` of a place (or after a pause), go on with it, compare."""
    started, log = time.monotonic(), out.with_suffix(".log")

    def killed() -> None:
        if place is None:
            start(case, out, False)
        else:
            with counting(place, at):
                start(case, out, False)

    status = forked(killed, log, pause if place is None else None)
    name = "at a random moment" if place is None else place.fault
    if status != -signal.SIGKILL:
        # The run was over before the moment came; nothing was injected, and the caller chooses another.
        return Fault(case, name, 0, status == 0, 0, 0, time.monotonic() - started, f"exit status {status}")
    if spoilt is not None and spoil(out, spoilt):
        name = "with the newest checkpoint spoilt"
    resume = (out / "run.yaml").exists()
    ended = forked(lambda: start(case, out, resume), log)
    lost, bits, files = compare(out, whole)
    return Fault(case, name, at, ended == 0, lost, bits, time.monotonic() - started, files)


def unbroken(case: str, out: Path) -> None:
    """A run that nobody touches; beside it, how often it passes each place and how long it takes."""
    started = time.monotonic()
    with ExitStack() as stack:
        found = {p.fault: stack.enter_context(counting(p)) for p in PLACES}
        start(case, out / "unbroken" / case, False)
    seconds = time.monotonic() - started
    passed = {"passed": {fault: calls[0] for fault, calls in found.items()}, "seconds": seconds}
    (out / "unbroken" / f"{case}.json").write_text(json.dumps(passed))


# ---- sabotage --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sabotage:
    """A piece of state that a resumed run is denied: the comparison must then see a difference.

    Attributes:
        case: the run.
        step: it is killed after that many steps, and goes on from the checkpoint before.
        module: weights that are not put back, or ``optimizer``.
        state: changes what was read from the checkpoint.
    """

    case: str
    step: int
    module: str | None = None
    state: Callable[[dict[str, Any]], None] | None = None


def _without_behaviour(state: dict[str, Any]) -> None:
    state["source"]["buffer"]["columns"]["behaviour_logp"].zero_()


SABOTAGE: dict[str, Sabotage] = {
    "the weights": Sabotage("kd", 10, module="policy"),
    "the optimiser's state": Sabotage("kd", 10, module="optimizer"),
    "the position in the data": Sabotage("kd", 10, state=lambda s: s["source"].update(position=0)),
    "the number of steps": Sabotage("kd", 10, state=lambda s: s.update(step=s["step"] - 1)),
    "the lengths of the files": Sabotage(
        "kd", 10, state=lambda s: s.update(lengths=dict.fromkeys(s["lengths"], 1 << 30))
    ),
    "what was due last": Sabotage("kd", 7, state=lambda s: s.update(last_due=0)),
    "the number of draws": Sabotage("grpo", 10, state=lambda s: s.update(draw=0)),
    "the replay buffer": Sabotage("replay", 10, state=lambda s: s["source"].update(buffer=None)),
    "the buffer's behaviour log-probs": Sabotage("replay", 10, state=_without_behaviour),
    "the critic": Sabotage("ppo", 9, module="critic"),
    "the controller": Sabotage("ppo", 9, state=lambda s: s["signals"][0].update(coefficient=0.1)),
    "the model renewed each round": Sabotage("inpo", 10, module="previous"),
    "the share of own responses": Sabotage("distillm", 8, state=lambda s: s["source"]["phi"].update(phi=0.0)),
}


@contextmanager
def denied(sabotage: Sabotage) -> Iterator[None]:
    """Inside the block a loaded checkpoint lacks a piece."""
    from leibler.train import checkpoint

    original = checkpoint.load

    def load(path: Path, modules: Any, optimizer: Any) -> dict[str, Any]:
        kept = optimizer if sabotage.module == "optimizer" else modules.get(sabotage.module)
        before = copy.deepcopy(kept.state_dict()) if kept is not None else None
        state = original(path, modules, optimizer)
        if kept is not None:
            kept.load_state_dict(before)
        if sabotage.state is not None:
            sabotage.state(state)
        if (sabotage.module is None) == (sabotage.state is None) or (sabotage.module and kept is None):
            raise LookupError(f"there is no {sabotage.module} among {sorted(modules)}")
        return state

    checkpoint.load = load
    try:
        yield
    finally:
        checkpoint.load = original


def sabotaged(name: str | None, sabotage: Sabotage, out: Path) -> Fault:
    """Kill a run, deny the resumed one a piece of its state (or nothing, without a name), compare."""
    started = time.monotonic()
    folder = out / (name or f"nothing {sabotage.case} {sabotage.step}").replace(" ", "-")
    log = folder.with_suffix(".log")
    # Before the line of the step after the last one that is done.
    place = Place("before a step is written down", "leibler.train.journal:Journal", "step")

    def killed() -> None:
        with counting(place, sabotage.step + 1):
            start(sabotage.case, folder, False)

    def again() -> None:
        if name is None:
            start(sabotage.case, folder, True)
        else:
            with denied(sabotage):
                start(sabotage.case, folder, True)

    if forked(killed, log) != -signal.SIGKILL:
        raise RuntimeError(log.read_text()[-2000:])
    status = forked(again, log)
    if status and "LookupError" in log.read_text():
        raise RuntimeError(log.read_text()[-2000:])
    lost, bits, files = compare(folder, out / "unbroken" / sabotage.case)
    return Fault(sabotage.case, name or "nothing", 0, status == 0, lost, bits, time.monotonic() - started, files)


def kills(cases: tuple[str, ...], number: int, seed: int, out: Path) -> Iterator[Fault]:
    """``number`` kills of each case, at places and calls derived from the seed."""
    for case in cases:
        randomness = random.Random(f"{seed}/{case}")
        whole = out / "unbroken" / case
        known = json.loads(whole.with_suffix(".json").read_text())
        passed, duration = known["passed"], known["seconds"]
        order: list[Place | None] = [p for p in PLACES if passed[p.fault]]
        randomness.shuffle(order)
        # Every place once before any a second time; between them, moments that nobody chose.
        places = ([*order, None, None] * (number // len(order) + 1))[:number]
        for i, place in enumerate(places):
            at = randomness.randint(1, passed[place.fault]) if place else 0
            spoilt = randomness.choice(SPOILT) if randomness.random() < 0.2 else None
            folder = out / f"{case}-{i}"
            fault = attempt(case, place, at, spoilt, whole, folder, randomness.random() * duration * 0.9)
            if fault.at == 0 and place is None and fault.survived and fault.files:
                # It ended before its random moment: on a machine whose speed varies, an earlier one is tried.
                shutil.rmtree(folder)
                fault = attempt(case, place, at, spoilt, whole, folder, randomness.random() * duration * 0.3)
            yield fault
            if fault.survived and not fault.bits_different:
                shutil.rmtree(folder, ignore_errors=True)


# ---- the section -----------------------------------------------------------------------------------------------------


def run(out: Path, seed: int, scale: float, cases: tuple[str, ...] = CASES) -> list[Row]:
    faults = inject(out, seed, max(round(20 * scale), 1), cases)
    rows = []
    for name in dict.fromkeys(f.fault for f in sorted(faults, key=lambda f: _rank(f.fault))):
        these = [f for f in faults if f.fault == name]
        for f in these:
            if not f.survived or f.bits_different:
                print(f"{f.case}: {f}", file=sys.stderr)
        rows.append(
            Row(
                "kill and resume",
                f"SIGKILL {name}",
                len(these),
                sum(f.survived for f in these),
                sum(f.rows_lost for f in these),
                sum(f.bits_different for f in these),
                sum(f.seconds for f in these),
            )
        )
    if scale >= 1:
        # A full soak that never reached a place does not pass: nothing was survived there.
        reached = {f.fault for f in faults}
        rows += [Row("kill and resume", f"SIGKILL {p.fault}", 0, 0) for p in PLACES if p.fault not in reached]
    return rows


def _rank(fault: str) -> int:
    names = [p.fault for p in PLACES]
    return names.index(fault) if fault in names else len(names)


def inject(out: Path, seed: int, number: int, cases: tuple[str, ...]) -> list[Fault]:
    """The unbroken runs in one process, the kills in another."""
    _script(out, "unbroken", *cases, hash_seed=1)
    lines = _script(out, "kill", *cases, "--seed", str(seed), "--kills", str(number), hash_seed=2)
    return [Fault(**json.loads(line)) for line in lines.splitlines() if line.startswith("{")]


def _script(out: Path, *arguments: str, hash_seed: int) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        "PYTHONHASHSEED": str(hash_seed),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, str(Path(__file__).resolve()), str(out), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("what", choices=("unbroken", "kill", "sabotage"))
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=20)
    given = parser.parse_args()
    import torch

    import train.running  # noqa: F401  (once, before the forks)

    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.what == "unbroken":
        for case in given.cases:
            unbroken(case, given.out)
        return
    found: Iterator[Fault] = kills(tuple(given.cases), given.kills, given.seed, given.out)
    if given.what == "sabotage":
        controls = {(s.case, s.step): s for s in SABOTAGE.values()}
        every = [*((None, s) for s in controls.values()), *SABOTAGE.items()]
        found = (sabotaged(name, s, given.out) for name, s in every if s.case in given.cases)
    for fault in found:
        print(json.dumps(asdict(fault)), flush=True)


if __name__ == "__main__":
    main()
