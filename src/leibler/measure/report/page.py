"""Puts a page together: what was recorded and measured becomes sections, and a template lays them out."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from leibler.errors import RunError
from leibler.measure.report import collect, demo, run
from leibler.measure.report.measured import measure

TEMPLATES = Path(__file__).parent / "templates"
NAME = "report.html"
SWEEP = "sweep.json"
"""What `leibler.sweep.run_sweep` leaves."""


def write_report(run_dir: Path, *, evaluation: Mapping[str, Any] | None = None) -> Path:
    """Write ``report.html`` into a run directory: one file that opens from disk and needs nothing else.

    It shows the learning curves, reward against divergence, a text coloured by KL(model || target) at each token,
    calibration, samples over training, the recipe and how to repeat the run, rows set aside, versions and timings.
    The target is the run's teacher, or the student's initial weights. The sections that need the models are left out
    with a sentence when these are no longer there.

    Args:
        run_dir: what ``leibler train`` wrote, or a directory with a ``demo.json`` that describes several runs, or with
            the ``sweep.json`` of a sweep.
        evaluation: numbers measured before, as `leibler.measure.evaluate` or `leibler.measure.compare` return them;
            shown in place of measuring the accuracy again.

    Returns:
        The path of the page.

    Raises:
        RunError: ``run_dir`` is not a run directory, has no metrics, or cannot be written to.

    Examples:
        >>> import tempfile
        >>> from leibler.policy import character_tokenizer, tiny_llama
        >>> from leibler.train import fit
        >>> student = tiny_llama(character_tokenizer("0123456789+="), hidden=16, layers=1, heads=2)
        >>> records = [{"prompt": "2+2=", "completion": "4"}] * 4
        >>> out = tempfile.mkdtemp()
        >>> _ = fit("sft", student=student, data=records, out=out, steps=2, batch_size=4, quiet=True)
        >>> write_report(Path(out)).name
        'report.html'
    """
    run_dir = Path(run_dir)
    if (run_dir / SWEEP).is_file():
        from leibler.measure.report.sweep import report
        from leibler.sweep.settings import read_json

        return _write(run_dir / NAME, report(read_json(run_dir / SWEEP)))
    if collect.is_demo(run_dir):
        content = demo.sections(run_dir, collect.read_demo(run_dir))
    elif stages := collect.stages(run_dir):
        runs = []
        for folder in stages:
            recorded = collect.read_run(folder)
            # What the run is about is the last stage's model; the others are a way to it.
            measured = measure(recorded, evaluation) if folder == stages[-1] else None
            runs.append(run.section(recorded, measured, folder.name, f"{recorded.run.get('recipe')}, {folder.name}"))
        content = {"title": str(recorded.run.get("recipe")), "demo": None, "runs": runs}
    else:
        recorded = collect.read_run(run_dir)
        section = run.section(recorded, measure(recorded, evaluation))
        content = {"title": section["title"], "demo": None, "runs": [section]}
    return _write(run_dir / NAME, render(content))


def render(content: Mapping[str, Any], template: str = "report.html.j2") -> str:
    """The page as text. Whatever comes from data is escaped by the template, since ``content`` holds plain text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    import leibler

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script, style = (TEMPLATES / "report.js").read_text("utf-8"), (TEMPLATES / "report.css").read_text("utf-8")
    # The browser runs this script and no other, and fetches nothing, whatever a run's texts contain.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        **content,
        script=Markup(script),
        style=Markup(style),
        script_hash=digest,
        version=leibler.__version__,
        made=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0"),
    )


def _write(path: Path, text: str) -> Path:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Undecodable characters in names of files would otherwise stop the whole page.
        aside.write_bytes(text.encode("utf-8", errors="replace"))
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise RunError(f"{path} cannot be written ({error.strerror}); make the directory writable.") from error
    return path
