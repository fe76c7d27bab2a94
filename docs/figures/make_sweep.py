"""The table, the picture and the findings of docs/distillation.md, from a sweep that was run.

    leibler train --sweep --out sweep
    python docs/figures/make_sweep.py sweep

puts the numbers into ``sweep.json`` beside this file, the picture into ``sweep.svg``, and the rest between the markers
of the page. Without a directory, the page is made again from the numbers beside this file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leibler.measure.report.sweep import figure
from leibler.sweep.table import as_markdown, findings

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "distillation.md"
BEGIN, END = "<!-- sweep: {} -->", "<!-- end -->"


def parts(content: Mapping[str, Any]) -> dict[str, str]:
    """What stands between the markers, by their names."""
    setup, settings, made = content["setup"], content["settings"], content["made_with"]
    scale, options = settings["scale"], content["options"]
    seeds = f"{content['seeds']} seed" + "s" * (content["seeds"] != 1)
    tried = settings.get("learning_rates")
    rates = (
        f"each method with the best of the learning rates {', '.join(f'{rate:g}' for rate in tried)}"
        if tried
        else f"learning rate {options['learning_rate']:g}"
    )
    run = (
        f"{setup['tokens']:,} tokens each (about {setup['steps']} steps of {options['batch_size']} completions of the "
        f"data), {rates}, {seeds}, {made['threads']} thread"
        f"{'s' * (made['threads'] != 1)}; Leibler {made['leibler']}, PyTorch {made['torch']}, {made['machine']}."
    )
    if scale < 1:
        run += f" **All steps were multiplied by {scale:g}: a quick look, from which nothing follows.**"
    findings = [f"- {sentence}" for sentence in content["findings"]]
    findings += [f"- {name} failed: {reason}" for name, reason in content["failed"].items()]
    left_out = [f"- `{slug}` needs {reason}." for slug, reason in content["left_out"].items()]
    return {
        "run": run,
        "table": as_markdown(content),
        "findings": "\n".join(findings),
        "left out": "\n".join(left_out) or "None.",
    }


def filled(page: str, content: Mapping[str, Any]) -> str:
    """The page with what a sweep found.

    Raises:
        ValueError: a marker is missing.
    """
    for name, text in parts(content).items():
        head, begin, rest = page.partition(BEGIN.format(name))
        _, end, tail = rest.partition(END)
        if not begin or not end:
            raise ValueError(f"{PAGE} lacks {BEGIN.format(name)} ... {END}")
        page = f"{head}{begin}\n{text}\n{end}{tail}"
    return page


def main(arguments: list[str]) -> None:
    """Copy the numbers, draw, and fill the page."""
    numbers = HERE / "sweep.json"
    if arguments:
        folder = Path(arguments[0]).resolve()
        text = (folder / "sweep.json").read_text(encoding="utf-8")
        numbers.write_text(text.replace(f"{folder}/", ""), encoding="utf-8")  # no paths of the machine that ran it
    content = json.loads(numbers.read_text(encoding="utf-8"))
    content["findings"] = findings(content["rows"])  # as they are put now
    numbers.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if not content["complete"]:
        print(f"the sweep is not complete: {', '.join([*content['missing'], *content['failed']])}", file=sys.stderr)
    (HERE / "sweep.svg").write_text(figure(content), encoding="utf-8")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), content), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
