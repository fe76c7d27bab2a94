"""A student's own completions, sampled once, as a data set to make a cache of."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leibler import durable
from leibler.cache.identity import fingerprint
from leibler.data.records import told
from leibler.errors import RunError
from leibler.safety import refuse_links

if TYPE_CHECKING:
    from leibler.data import Dataset
    from leibler.policy import CausalLM

ROLLOUTS, SETTINGS, PARTIAL = "rollouts.jsonl", "rollouts.json", "rollouts.partial.jsonl"


def roll_out(
    student: CausalLM,
    prompts: Dataset,
    folder: str | Path,
    *,
    samples: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int, int, int], None] | None = None,
) -> tuple[Path, dict[str, int]]:
    """Sample completions of every prompt and write them as records, a line each.

    Each line keeps the prompt's record (its answer and other columns) and says whether the completion ended by itself
    (``finished``). A kill loses at most one batch: the same call goes on, and draws what it would have drawn. Files are
    text, so a completion is tokenized anew when it is read: ``changed`` counts those that then come out differently.

    Args:
        student: the model.
        prompts: records.
        folder: where ``rollouts.jsonl`` is written.
        samples: completions of each prompt.
        max_new_tokens, temperature, seed: of the samples.
        batch_size: prompts at a time (it decides the last bits of the sampler's arithmetic, so it is remembered too).
        progress: called with the prompts done, all of them, and the tokens sampled by this call.

    Returns:
        The file, and counts: ``completions``, ``blank`` (left out, for there is nothing to read), ``unfinished``,
        ``changed``.

    Raises:
        RunError: the folder holds rollouts of other arguments, or some whose settings are missing or damaged.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    refuse_links(folder)
    settings = {
        "student": fingerprint(student),
        "prompts": prompts.content_hash,
        "samples": samples,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "batch_size": batch_size,
    }
    counts = {"completions": 0, "blank": 0, "unfinished": 0, "changed": 0}
    out, partial = folder / ROLLOUTS, folder / PARTIAL
    if out.exists() or partial.exists() or (folder / SETTINGS).exists():
        before = _before(folder, finished=out.exists())
        _same(folder, before, settings)
        if out.exists():
            return out, before["counts"]
    else:
        durable.write_text(folder / SETTINGS, json.dumps(settings, indent=1))
    batches = _whole_batches(partial)
    done, drawn = len(batches) * batch_size, 0
    with partial.open("ab") as file:
        for start in range(done, len(prompts), batch_size):
            records = prompts.records[start : start + batch_size]
            lines, count = _sampled(student, records, start, samples, max_new_tokens, temperature, seed)
            drawn += count
            batches.append(lines)
            file.write(json.dumps(lines, default=told).encode() + b"\n")
            file.flush()
            if progress is not None:
                progress(min(start + batch_size, len(prompts)), len(prompts), drawn)
    kept = [line for batch in batches for line in batch]
    for line in kept:
        _count(counts, line)
    # Blank completions stand in the partial file alone: no reader of data takes them.
    durable.write_text(folder / SETTINGS, json.dumps({**settings, "counts": counts}, indent=1))
    text = "".join(
        json.dumps(line, ensure_ascii=False, default=told) + "\n" for line in kept if line["completion"].strip()
    )
    durable.write_text(out, text)
    partial.unlink()
    return out, counts


def _sampled(
    student: CausalLM, records: Sequence[Any], start: int, samples: int, longest: int, temperature: float, seed: int
) -> tuple[list[dict[str, Any]], int]:
    from leibler.policy import sample, uniforms

    table = uniforms(seed, "cache", 0, len(records) * samples, longest, first_row=start * samples)
    ids = [student.encode_prompt(r.prompt) for r in records]
    drawn = sample(student, ids, uniforms=table, temperature=temperature, group_size=samples)
    lines = []
    finished = drawn.finished.tolist()
    for i, tokens in enumerate(drawn.completions()):
        record = records[i // samples]
        text = student.decode(tokens)
        again = student.encode_completion(text)
        ended = tokens if finished[i] else [*tokens, student.tokenizer.eos_token_id]
        line = {"prompt": record.prompt, "completion": text, "finished": finished[i], "changed": again != ended}
        if record.answer is not None:
            line["answer"] = record.answer
        lines.append({**{k: v for k, v in record.extra.items() if k not in line}, **line})
    return lines, int(drawn.mask.sum())


def _count(counts: dict[str, int], line: dict[str, Any]) -> None:
    blank = not line["completion"].strip()
    counts["blank"] += blank
    counts["completions"] += not blank
    counts["unfinished"] += not blank and not line["finished"]
    counts["changed"] += not blank and line["changed"]


def _whole_batches(partial: Path) -> list[list[dict[str, Any]]]:
    """What an interrupted call has drawn; a line that was torn is cut away."""
    if not partial.exists():
        return []
    batches, whole = [], 0
    for line in partial.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        batches.append(json.loads(line))
        whole += len(line)
    with partial.open("r+b") as file:
        file.truncate(whole)
    return batches


def _before(folder: Path, *, finished: bool) -> dict[str, Any]:
    """The settings of what the folder holds, and the counts if it is finished."""
    try:
        before = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        whole = isinstance(before, dict) and (not finished or isinstance(before.get("counts"), dict))
    except (OSError, ValueError):
        whole = False
    if not whole:
        raise RunError(
            f"{folder} holds rollouts, but {SETTINGS} is missing or damaged, which says how they were made; remove "
            f"{ROLLOUTS}, {SETTINGS} and {PARTIAL} to sample again, or give another directory."
        )
    return before


def _same(folder: Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        if before.get(key) != value:
            shown = "" if key in ("student", "prompts") else f" ({before.get(key)} then, {value} now)"
            raise RunError(
                f"{folder} holds rollouts of another {key}{shown}; give the same again, or another directory."
            )
