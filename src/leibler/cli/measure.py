"""``leibler measure``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from leibler.errors import RecipeError

if TYPE_CHECKING:
    from leibler.divergence import Divergence


def divergence_command(
    model: str, target: str, data: str, names: list[str], limit: int | None, batch_size: int, as_json: bool
) -> None:
    """Compare two models on held-out completions."""
    from leibler.data import load
    from leibler.divergence import ForwardKL, ReverseKL
    from leibler.measure import compare
    from leibler.policy import CausalLM

    chosen = {name: _divergence(name) for name in names} or {"forward_kl": ForwardKL(), "reverse_kl": ReverseKL()}
    records = load(data, needs=("prompt", "completion"), limit=limit)
    show(compare(CausalLM.load(model), CausalLM.load(target), records, chosen, batch_size), as_json)


def accuracy_command(
    model: str,
    data: str,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    commit: int,
    seed: int,
    limit: int | None,
    as_json: bool,
) -> None:
    """Ask a model questions whose answers can be checked."""
    from leibler import policy
    from leibler.data import load
    from leibler.measure import evaluate

    records = load(data, limit=limit)
    found = evaluate(policy.load(model), records, samples, temperature, max_new_tokens, seed, commit=commit)
    show(found, as_json)


def success_command(
    model: str,
    data: str,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    limit: int | None,
    as_json: bool,
) -> None:
    """Let a model play the tasks of an environment."""
    from leibler.data import load
    from leibler.measure import success
    from leibler.policy import CausalLM
    from leibler.train.log import Progress

    records = load(data, limit=limit)
    player = CausalLM.load(model)
    progress = Progress(len(records) * (1 + samples), label="episodes")
    try:
        found = success(
            player,
            records,
            samples,
            temperature,
            max_new_tokens,
            seed,
            after=lambda over: progress.update(over, {}, None),
        )
    finally:
        progress.close()
    show(found, as_json)


def memorisation_command(
    student: str,
    teacher: str,
    baseline: str,
    data: str,
    prefix: int,
    suffix: int,
    limit: int | None,
    as_json: bool,
) -> None:
    """What a distilled student recites of training texts, and from whom it has it."""
    from dataclasses import asdict

    from leibler.data import load
    from leibler.measure.memorisation import excerpts, foretold, inheritance, predictors, recited
    from leibler.policy import CausalLM

    records = load(data, needs=("prompt", "completion"), limit=limit)
    models = {name: CausalLM.load(where) for name, where in (("student", student), ("teacher", teacher))}
    models["baseline"] = CausalLM.load(baseline)
    places = excerpts(models["student"], records, prefix, suffix)
    recites = {name: [n == suffix for n in recited(model, places)] for name, model in models.items()}
    found = inheritance(recites["student"], recites["teacher"], recites["baseline"])
    result: dict[str, Any] = {"texts": len(places), **asdict(found), "student/baseline": found.of_baseline}
    columns = predictors(models["teacher"], models["baseline"], places)
    if min(found.student, len(places) - found.student) >= 5:
        result["auc"] = foretold(columns, recites["student"])[0]
    show(result, as_json)


def agreement_command(
    student: str, base: str, teacher: str, data: str, max_new_tokens: int, limit: int | None, as_json: bool
) -> None:
    """Whose answers a distilled student gives."""
    from dataclasses import asdict

    from leibler.data import load
    from leibler.measure.fidelity import of_models
    from leibler.policy import CausalLM

    records = load(data, limit=limit)
    one, before, other = (CausalLM.load(m) for m in (student, base, teacher))
    found = of_models(one, before, other, records, max_new_tokens)
    show({**asdict(found), "gain": found.gain, "gap_closed": found.gap_closed}, as_json)


def _divergence(text: str) -> Divergence:
    from leibler.cli.overrides import convert
    from leibler.divergence import Divergence, names

    if text.isidentifier() and text.islower() and text not in names():
        import difflib

        near = difflib.get_close_matches(text, names(), n=2, cutoff=0.5)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise RecipeError(f"'{text}' is not a known divergence{hint}; known: {', '.join(names())}.")
    return convert(text, Divergence, "divergence")


def show(found: Mapping[str, Any], as_json: bool) -> None:
    """Print measurements: one line each, or everything as one object."""
    if as_json:
        print(json.dumps({name: _plain(value) for name, value in found.items()}, indent=2))
        return
    numbers = {name: value for name, value in found.items() if isinstance(value, (int, float))}
    # Where nothing is infinite, its count says nothing.
    numbers = {n: v for n, v in numbers.items() if v or not n.endswith("/infinite")}
    width = max(map(len, numbers), default=0)
    for name, value in numbers.items():
        print(f"{name:<{width}}  {value:.6g}" if isinstance(value, float) else f"{name:<{width}}  {value}")


def _plain(value: Any) -> Any:
    import dataclasses

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(part) for name, part in dataclasses.asdict(value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no word for infinity
    return value
