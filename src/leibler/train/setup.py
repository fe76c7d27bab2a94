"""What a run is made of before its first step: directory, data, models; every complaint comes here, not in hour six."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leibler import durable
from leibler.environment.dialogue import later_turns
from leibler.errors import DataError, ModelError, RunError
from leibler.objective.terms import Preference
from leibler.safety import plain_name, refuse_links
from leibler.train import rollouts
from leibler.train.models import Trained
from leibler.train.options import Options
from leibler.train.recipe import Recipe
from leibler.train.run_file import RUN_FILE
from leibler.train.stored import is_stored, opened

if TYPE_CHECKING:
    from leibler.data import Dataset, Record
    from leibler.policy import CausalLM

ASIDE = "set_aside"
RESERVED = ("responses", "validation")
"""Files in that folder that are of no data set."""
_LEFT = (ASIDE, rollouts.FOLDER)


def claim_directory(out: Path, *, resume: bool) -> bool:
    """Make the run directory, or refuse one that holds something else; True if it was not there before."""
    if resume:
        if not (out / RUN_FILE).exists():
            raise RunError(f"{out} holds no run to resume (it has no {RUN_FILE}); check the path.")
        refuse_links(out)
        return False
    if out.is_file():
        raise RunError(f"out={out} is a file; give a directory.")
    # What an attempt left that was refused or killed before its run.yaml was whole is no run.
    if out.exists() and any(p.name not in _LEFT and not p.name.startswith(durable.WRITING) for p in out.iterdir()):
        what = "holds another run" if (out / RUN_FILE).exists() else "is not empty"
        raise RunError(f"out={out} {what}; give another directory, or go on with `leibler train --resume {out}`.")
    made = not out.exists()
    if not made:
        refuse_links(out)
    out.mkdir(parents=True, exist_ok=True)
    return made


def remove_empty(out: Path) -> None:
    """Remove a directory tree unless it holds a file: what a refused run leaves behind."""
    if any(p.is_file() for p in out.rglob("*")):
        return
    for folder in sorted((p for p in out.rglob("*") if p.is_dir()), reverse=True):
        folder.rmdir()
    out.rmdir()


def load_model(source: Any, options: Options, *, trained: bool, key: str) -> Any:
    """A model from a directory or hub id, of the kind that its configuration says (a `LanguageModel` passes)."""
    from leibler.policy import LanguageModel, Lora, load

    adapter = Lora(rank=options.adapter_rank) if trained and options.adapter_rank else None
    if isinstance(source, LanguageModel):
        return source.adapted(adapter) if adapter else source
    try:
        return load(
            source,
            dtype=getattr(torch, options.dtype),
            trust_remote_code=options.trust_remote_code,
            adapter=adapter,
            gradient_checkpointing=trained and options.gradient_checkpointing,
        )
    except ModelError as error:
        raise ModelError(f"{key}={source}: {error}") from error


def models_read(recipe: Recipe) -> set[str]:
    """The names under which models can be given to a recipe."""
    return {n for name, rule in recipe.models.items() if not rule.side for n in (name, rule.source)}


def load_models(recipe: Recipe, teacher: Any, models: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """The models beside the student, or their teacher caches, by name; one that the recipe does not read stays out."""
    read = models_read(recipe) - {"initial"}  # that is the student as it was at the start, whatever is given
    for name in models:
        if name not in read:
            known = ", ".join(sorted(read)) or "none"
            raise ModelError(f"models.{name} is not used by this recipe, which reads: {known}; leave it out.")
    for name in recipe.models:
        plain_name(name, "the model")  # its weights stand under its name in checkpoints
    given = {name: load_given(m, options, f"models.{name}") for name, m in models.items()}
    if teacher is not None and "teacher" in read:
        given["teacher"] = load_given(teacher, options, "teacher")
    return given


def load_given(given: Any, options: Options, key: str) -> Any:
    """A model that is not trained, or the teacher cache that stands for it."""
    return opened(given) if is_stored(given) else load_model(given, options, trained=False, key=key)


def max_length(policy: CausalLM) -> int:
    return policy.context or 1 << 30


def load_data(
    recipe: Recipe, specs: Mapping[str, Any], policy: CausalLM, options: Options, out: Path | None
) -> dict[str, Dataset]:
    """Every data set that the recipe draws from, without the rows that cannot be used.

    They are kept aside in a file under ``out``; with ``out=None`` (another process writes it) they are only left out.
    """
    needed = dict(recipe.source.datasets())
    for name in specs:
        if name not in needed:
            known = ", ".join(needed) or "none"
            raise DataError(f"data.{name} is not used by this recipe, which draws from: {known}; leave it out.")
    pairs = paired(recipe)
    loaded = {}
    for name, kind in needed.items():
        if name not in specs:
            option = "data=FILE" if name == "train" else f"data.{name}=FILE"
            raise DataError(f"the recipe draws from the data {name!r}, which was not given; add {option}.")
        if name in RESERVED:
            raise DataError(f"the data {name!r} would share {ASIDE}/{name}.jsonl with the run; name it otherwise.")
        labels = ("chosen", "rejected") if name in pairs else ("completion",)
        needs = ("prompt",) if kind == "prompts" else ("prompt", *labels)
        aside = None if out is None else out / ASIDE / f"{plain_name(name, 'the data')}.jsonl"
        data = usable(specs[name], needs, policy, options, aside, kind)
        if name not in pairs and data.kind == "preferences":
            # A completion is asked for: a pair beside it is no second label, least of all its rejected half.
            data = replace(data, records=tuple(replace(r, chosen=None, rejected=None) for r in data.records))
        loaded[name] = data
    return loaded


def paired(recipe: Recipe) -> set[str]:
    """The data sets whose records must be pairs: a term compares their halves, or is about one of them."""
    streams, read = recipe.source.streams(), recipe.source.stream_data()
    about = [t.on for t in recipe.objective.terms if isinstance(t, Preference) or t.where in ("chosen", "rejected")]
    given = [s for s in about if s and streams[s].law is None and s not in recipe.source.fresh()]
    return {name for stream in given for name in read[stream]}


def load_validation(
    given: Any, recipe: Recipe, policy: CausalLM, options: Options, data: dict[str, Dataset], out: Path | None
) -> tuple[Options, dict[str, Dataset], Dataset | None]:
    """The held-out records, with the options and the data as they are beside them.

    A source that listens to the validation gets one if it was given none, a twentieth of the data, and twenty looks.
    """
    listens = recipe.source.needs_validation
    if listens and not options.validate_every:
        options = replace(options, validate_every=max(options.steps // 20, 1))
    if given is not None:
        needs = ("prompt", "completion") if listens else ("prompt",)
        aside = None if out is None else out / ASIDE / "validation.jsonl"
        # Prompts are answered and completions are read: a record must leave room for both.
        return options, data, usable(given, needs, policy, options, aside, "both")
    if not listens:
        return options, data, None
    name = next(iter(data))
    kept, held_out = data[name].split(0.05, options.seed)
    return options, {**data, name: kept}, held_out


def usable(
    spec: Any, needs: tuple[str, ...], policy: CausalLM, options: Options, aside: Path | None, kind: str = "labels"
) -> Dataset:
    """Load data; rows that are malformed or do not fit the model's context are set aside, in a file if one is given."""
    from leibler.data import load

    limit, new = max_length(policy), 0 if kind == "labels" else options.max_new_tokens

    def refuse(record: Record) -> str | None:
        long = _length(record, policy, new, labels=kind != "prompts") > limit
        return "longer than the model's context" if long else None

    with warnings.catch_warnings():
        if aside is None:
            warnings.simplefilter("ignore", UserWarning)  # the process that writes the file says so too
        return load(spec, needs=needs, set_aside=aside, refuse=refuse)


def optimizer(
    policy: CausalLM, modules: Mapping[str, torch.nn.Module], recipe: Recipe, options: Options
) -> torch.optim.AdamW:
    """AdamW over the policy's trained parameters and the side modules; ``scale`` is a group's rate by the run's."""
    groups: list[dict[str, Any]] = [{"params": [p for p in policy.parameters() if p.requires_grad], "scale": 1.0}]
    for name, module in modules.items():
        rule = recipe.models[name]
        if not isinstance(rule, Trained):
            continue
        scale = rule.learning_rate / options.learning_rate if rule.learning_rate else 1.0
        groups.append({"params": list(module.parameters()), "scale": scale})
    return torch.optim.AdamW(
        groups,
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        weight_decay=options.weight_decay,
        foreach=True,
    )


def _length(record: Record, policy: CausalLM, new: int, *, labels: bool) -> int:
    """Tokens of the longest row of a record, or an upper bound that is cheap to see.

    No tokenizer in use makes more tokens than there are UTF-8 bytes (and a few special ones); so short records are
    not encoded twice.
    """
    answers = [t for t in (record.completion, record.chosen, record.rejected) if t is not None and labels]
    later = later_turns(record) if answers else []
    ends = len(later)  # each action is ended
    answers += ["".join([*answers[:1], *(text + action for text, action in later)])] if later else []
    bound = len(record.prompt.encode()) + max([new, *(len(t.encode()) for t in answers)]) + ends + 8
    if bound <= max_length(policy):
        return bound
    longest = max([new, *(len(policy.encode_completion(t)) for t in answers)])
    return len(policy.encode_prompt(record.prompt)) + longest + ends
