"""Every snippet and command of the documentation runs; what the pages say is printed is printed."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from blocks import ROOT, Session, blocks, same
from prepare import prepare

DOCS = ROOT / "docs"
PAGES = (
    "index", "tutorial", "concepts", "choosing", "cli", "write-a-recipe", "run-directory", "reliability",
    "vocabularies", "agents", "masked",
)  # fmt: skip
PACKAGES = (
    "divergence", "fused", "estimate", "objective", "policy", "data", "cache", "train", "recipes", "measure", "theory",
    "claims", "environment", "sweep", "represent",
)  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    if page != "tutorial":  # it makes its own
        prepare(tmp_path)
    session, ran = Session(), 0
    for block in blocks((DOCS / f"{page}.md").read_text(encoding="utf-8")):
        if block.kind == "python":
            printed = session.python(block)
            if block.expected is not None:
                assert printed.split() == block.expected.split(), f"{page}.md shows another output of:\n{block.body}"
            ran += 1
        elif block.kind == "console":
            for line, shown, printed, status in session.console(block.body):
                expected = 2 if shown.startswith("error:") else 0
                assert status == expected, f"{line}\n{printed}"
                if shown.strip() and (same(line) or expected):
                    assert printed.split() == shown.split(), f"{page}.md shows another output of: {line}"
                ran += 1
    assert ran, f"{page}.md has no code that runs"


def test_numbers_of_the_pictures_are_those_of_the_library(tmp_path):
    sys.path.insert(0, str(DOCS / "figures"))
    figures = importlib.import_module("make_figures")
    figures.main(tmp_path)
    now, shown = ((folder / "numbers.txt").read_text().split() for folder in (tmp_path, DOCS / "figures"))
    assert len(now) == len(shown)
    for a, b in zip(now, shown, strict=True):
        assert a == b or float(a) == pytest.approx(float(b), rel=0.02, abs=0.002)  # another machine rounds otherwise
    for name in figures.FIGURES:
        assert (DOCS / "figures" / f"{name}.svg").exists()
        assert f"figures/{name}.svg" in (DOCS / "choosing.md").read_text()


def test_numbers_quoted_beside_the_pictures_are_printed():
    """Each decimal number in the prose of the page stands, rounded, among the printed ones."""
    page = re.sub(r"^```.*?^```$|`[^`]*`", "", (DOCS / "choosing.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    printed = [float(x) for x in re.findall(r"-?\d+\.\d+(?:e[-+]\d+)?", (DOCS / "figures" / "numbers.txt").read_text())]
    quoted = set(re.findall(r"-?\b\d+\.\d+\b", page))
    assert len(quoted) > 8
    for number in quoted:
        digits = len(number.split(".")[1])
        assert any(round(x, digits) == float(number) for x in printed), f"{number} is printed nowhere"


@pytest.mark.parametrize("package", PACKAGES)
def test_reference_names_everything_public(package):
    module = importlib.import_module(f"leibler.{package}")
    page = (DOCS / "reference" / f"{package}.md").read_text()
    listed = set(re.findall(rf"^(?:::: leibler\.{package}\.(?:\w+\.)?(\w+)$|- `(\w+)`)", page, re.MULTILINE))
    listed = {name for pair in listed for name in pair if name}
    assert listed == set(module.__all__)


def test_every_recipe_has_its_section():
    from leibler.recipes import METHODS

    page = (DOCS / "recipes.md").read_text()
    sections = set(re.findall(r"^### (\S+)$", page, re.MULTILINE))
    assert sections == set(METHODS)
    for slug, method in METHODS.items():
        module, name = method.where.split(":")
        module = f"leibler.recipes.{module}" if method.kind == "recipe" else module
        assert f"<!-- source: src/{module.replace('.', '/')}.py {name} -->" in page, slug


def test_sources_shown_exist():
    sys.path.insert(0, str(DOCS))
    hooks = importlib.import_module("hooks")
    shown = hooks.on_page_markdown((DOCS / "recipes.md").read_text())
    assert "<!-- source:" not in shown
    assert shown.count("```python\ndef ") >= shown.count("\n### ")
    assert '"""' not in shown, "docstrings are left out"
    with pytest.raises(KeyError):
        hooks.source("src/leibler/recipes/policy.py", "nothing")
