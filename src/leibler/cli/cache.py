"""``leibler cache``: run a teacher once."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from leibler.cli import INTERRUPTED
from leibler.cli.output import Working
from leibler.errors import RunError

if TYPE_CHECKING:
    from leibler.policy import CausalLM


@dataclass(frozen=True)
class Rollouts:
    """Of a student, instead of the data's own completions."""

    student: str | None
    samples: int
    max_new_tokens: int
    seed: int


def cache_command(
    teacher: str | None,
    data: str | None,
    out: Path | None,
    top_k: int,
    temperature: float,
    dtype: str,
    rollouts: Rollouts,
    limit: int | None,
    batch_tokens: int,
    check: Path | None,
    quiet: bool,
) -> None:
    """Write a teacher cache, or go on with one, or look whether one is whole.

    Raises:
        LeiblerError: in one sentence, what does not fit.
        typer.Exit: 130 after Ctrl-C.
    """
    if check is not None:
        from leibler.cache import TeacherCache

        typer.echo(f"{check}: whole; {_described(TeacherCache(check, thorough=True))}")
        return
    if teacher is None or data is None or out is None:
        missing = next(n for n, v in (("--teacher", teacher), ("--data", data), ("--out", out)) if v is None)
        raise RunError(f"{missing} was not given; `leibler cache --help` has an example.")
    if limit is not None and limit < 1:
        raise RunError(f"--limit {limit} leaves no record of {data}; ask for at least 1.")
    from leibler.cache.writer import begun

    begun(out)  # before anything is loaded
    try:
        typer.echo(_write(teacher, data, out, top_k, temperature, dtype, rollouts, limit, batch_tokens, quiet))
    except KeyboardInterrupt:
        typer.echo(f"interrupted; what is finished stays in {out}: the same command goes on", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _write(
    teacher: str,
    data: str,
    out: Path,
    top_k: int,
    temperature: float,
    dtype: str,
    rollouts: Rollouts,
    limit: int | None,
    batch_tokens: int,
    quiet: bool,
) -> str:
    from leibler.cache import write
    from leibler.data import load
    from leibler.policy import same_tokenizer
    from leibler.train import Options
    from leibler.train.setup import usable

    reader = _load(teacher, "--teacher")
    kind, options = "labels" if rollouts.student is None else "prompts", Options(max_new_tokens=rollouts.max_new_tokens)
    records = usable(data, ("prompt",), reader, options, out / "set_aside" / "data.jsonl", kind)
    records = records if limit is None else records[:limit]
    lines = [records.set_aside_report()] if records.set_aside_count else []
    if rollouts.student is not None:
        from leibler.cache import roll_out

        student = _load(rollouts.student, "--student")
        same_tokenizer(student, reader)
        with Working("sampling", quiet) as shown:
            file, counts = roll_out(
                student,
                records,
                out,
                samples=rollouts.samples,
                max_new_tokens=rollouts.max_new_tokens,
                temperature=temperature,
                seed=rollouts.seed,
                progress=shown,
            )
        del student
        records = load(file, needs=("prompt", "completion"))
        lines.append(_sampled(file, counts))
    with ExitStack() as reading, Working("teacher", quiet) as shown:
        read = reading.enter_context(Working("reading", quiet))

        def computed(done: int, total: int) -> None:
            reading.close()  # one bar at a time
            shown(done, total, done)

        cache = write(
            reader,
            records,
            out,
            top_k=top_k,
            temperature=temperature,
            dtype=dtype,
            name=teacher,
            batch_tokens=batch_tokens,
            progress=computed,
            reading=read,
        )
    where = f" data={out / 'rollouts.jsonl'}" if rollouts.student is not None else ""
    lines.append(f"{out}: {_described(cache)}\ntrain with: teacher=cache:{out}{where}")
    return "\n".join(lines)


def _load(source: str, key: str) -> CausalLM:
    import torch

    from leibler.errors import ModelError
    from leibler.policy import CausalLM

    try:
        return CausalLM.load(source).to("cuda" if torch.cuda.is_available() else "cpu")
    except ModelError as error:
        raise ModelError(f"{key} {source}: {error}") from error


def _described(cache: Any) -> str:
    from leibler.cache.layout import INDEX, shard_name

    names = [INDEX, *(shard_name(number) for number in range(len(cache.manifest.shards)))]
    size = sum((cache.folder / name).stat().st_size for name in names)
    full = 2 * cache.manifest.vocab
    each = size / cache.tokens
    kept = f"top {cache.manifest.k} of {cache.manifest.vocab} entries"
    cost = f"{each:.0f} bytes per token (1/{full / each:.3g} of bf16 logits)"
    return f"{len(cache.index)} different completions, {cache.tokens} tokens, {kept}, {cost}"


def _sampled(file: Path, counts: dict[str, int]) -> str:
    notes = {
        "blank": "blank, left out",
        "unfinished": "cut at the limit",
        "changed": "tokenized otherwise when read back",
    }
    said = "".join(f", {counts[key]} {note}" for key, note in notes.items() if counts[key])
    return f"{file}: {counts['completions']} completions{said}"
