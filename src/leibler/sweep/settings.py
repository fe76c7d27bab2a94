"""What is compared, as plain data: it stands in the sweep's directory, and each of its processes reads it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from leibler import durable
from leibler.errors import RunError

SETTINGS, SETUP, RESULTS, RUNS, LOGS = "settings.json", "setup", "results", "runs", "logs"
"""In the directory of a sweep."""
INTERRUPTED = 130
"""The status of a worker that was interrupted, and saved."""


@dataclass(frozen=True)
class Settings:
    """What all runs of a sweep share.

    Attributes:
        student, teacher, models, data, validation: as in ``leibler train``; without a student, a task, a text corpus
            and models for them are made on the spot.
        options: of every run, by name (see `leibler.train.Options`).
        overrides: of single methods: ``recipe.KEY`` to text, by slug.
        learning_rates: to try for each method; the best on ``tuning`` problems is compared. Empty: the options' alone.
        samples: answers sampled to each held-out problem.
        limit: held-out problems, at most.
        scale: multiplies every number of steps of the embedded set-up.
        threads: of torch in each process; None: as many as it takes by itself.
    """

    student: str | None = None
    teacher: str | None = None
    models: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    validation: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    learning_rates: Sequence[float] = ()
    samples: int = 8
    limit: int = 192
    scale: float = 1.0
    threads: int | None = None

    @property
    def embedded(self) -> bool:
        """Whether models and data are made on the spot."""
        return self.student is None

    def claim(self, out: Path) -> None:
        """Make the directory, or find the same settings there.

        Raises:
            RunError: it holds something else, or a sweep with other settings.
        """
        path = out / SETTINGS
        if out.is_file() or (out.exists() and not path.exists() and any(_foreign(p) for p in out.iterdir())):
            raise RunError(f"out={out} holds something else than a sweep; give another directory.")
        out.mkdir(parents=True, exist_ok=True)
        mine = json.loads(json.dumps(asdict(self)))
        if not path.exists():
            durable.write_text(path, json.dumps(mine, indent=1) + "\n")
            return
        there = read_json(path)
        for key in mine:
            if mine[key] != there.get(key):
                raise RunError(
                    f"{out} holds a sweep with {key}={there.get(key)}, not {mine[key]}; give another directory, or go "
                    "on with the settings that it was begun with."
                )

    @staticmethod
    def read(out: Path) -> Settings:
        """The settings of the sweep in a directory."""
        known = {f.name for f in dataclasses.fields(Settings)}
        return Settings(**{k: v for k, v in read_json(out / SETTINGS).items() if k in known})


@dataclass(frozen=True)
class Setup:
    """The models and data that all runs share.

    Attributes:
        student: what every run starts from.
        models: directories by the names that recipes read them under, ``teacher`` among them.
        data: specifications by the names that recipes draw from.
        held_out: what is measured on; no run sees it.
        tuning: held out of the training data too, for recipes that listen to a validation, and to choose learning
            rates by.
        text: general text that is measured on as well, if there is any.
        tokens: that each run trains on.
        steps: that a run on the data takes for it; schedules go by them.
        title: what it is, in a few words.
    """

    student: str
    models: Mapping[str, str]
    data: Mapping[str, str]
    held_out: str
    tuning: str
    text: str | None
    tokens: int
    steps: int
    title: str

    @staticmethod
    def read(out: Path) -> Setup:
        """The set-up of the sweep in a directory."""
        return Setup(**read_json(out / SETUP / "setup.json"))

    def write(self, out: Path) -> None:
        durable.write_text(out / SETUP / "setup.json", json.dumps(asdict(self), indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """An object of a file.

    Raises:
        RunError: there is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); begin the sweep again in another directory.") from error


def _foreign(path: Path) -> bool:
    return not path.name.startswith((durable.WRITING, ".lock"))
