"""``leibler represent latent`` and ``leibler measure latent``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from leibler.cli import INTERRUPTED
from leibler.cli.output import Working

if TYPE_CHECKING:
    from leibler.policy import CausalLM


def compress_command(model: str, data: str, out: Path, limit: int | None, quiet: bool, **settings: Any) -> None:
    """Compress reasoning into thoughts, or go on with it.

    Raises:
        LeiblerError: in one sentence, what does not fit.
        typer.Exit: 130 after Ctrl-C.
    """
    from leibler.represent.compressing import Settings, compress

    chosen = Settings(**settings)
    records = _records(data, ("prompt", "completion"), limit)
    start = _load(model)
    try:
        with Working("train", quiet) as training, Working("write", quiet) as writing:
            found = compress(start, records, out, chosen, progress=training, exporting=writing)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; what is finished stays in {out}: the same command goes on", err=True)
        raise typer.Exit(INTERRUPTED) from None
    last = found.losses[-20:]
    typer.echo(
        f"{found.file}: {found.records} records, {found.thoughts} thoughts for {found.tokens} tokens of reasoning "
        f"({found.compression:.2f} each); the answers' loss given them is {sum(last) / len(last):.3f} nats a token\n"
        f"train with: leibler train latent-sft student={found.decoder} data={found.file}"
    )


def latent_command(model: str, data: str, limit: int | None, as_json: bool, **options: Any) -> None:
    """Measure a model that thinks in laws."""
    from leibler.cli.measure import show
    from leibler.measure.latent import evaluate_latent

    records = _records(data, ("prompt",), limit)
    thinker = _load(model)
    with Working("think") as progress:
        found = evaluate_latent(thinker, records, progress=progress, **options)
    show(found, as_json)


def _records(data: str, needs: tuple[str, ...], limit: int | None) -> Any:
    from leibler.data import load

    found = load(data, needs=needs, limit=limit)
    if found.set_aside_count:
        typer.echo(found.set_aside_report(), err=True)
    return found


def _load(source: str) -> CausalLM:
    import torch

    from leibler.policy import CausalLM

    return CausalLM.load(source).to("cuda" if torch.cuda.is_available() else "cpu")
