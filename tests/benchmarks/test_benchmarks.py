"""The scripts explain themselves, and what they compute from their measurements is right; speed itself is no test."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from leibler.policy import character_tokenizer, tiny_llama

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("[a-z]*.py"))


def loaded(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_say_how_they_are_run(script: Path) -> None:
    text = ast.get_docstring(ast.parse(script.read_text())) or ""
    assert f"python benchmarks/{script.name}" in text


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_answer_help(script: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_exponents_are_slopes_of_logarithms(monkeypatch: pytest.MonkeyPatch) -> None:
    growth = loaded("growth", monkeypatch)
    sizes = (3, 10, 50)
    assert growth.slope(sizes, [7.0 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert growth.slope(sizes, [2.0, 2.0, 2.0]) == pytest.approx(0.0)


def test_memory_of_a_step_is_what_it_took_at_its_highest(monkeypatch: pytest.MonkeyPatch) -> None:
    growth = loaded("growth", monkeypatch)
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    seen = growth.Steps(iter(range(100)).__next__)
    for megabytes in (1, 128, 64):
        seen.mark()
        torch.ones(megabytes * 2**18)  # freed at once: only the peak tells of it
    seen.mark()
    peaks = [peak / 2**20 for _, peak in seen.found]
    assert peaks[1] == pytest.approx(128, abs=8)
    assert peaks[2] == pytest.approx(64, abs=8)
    seen.found[0] = (0.0, 0.0)
    assert seen.least[1] / 2**20 == pytest.approx(peaks[2])  # of all but the first


def test_the_limit_of_rollouts_is_the_models_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations of what is timed: 2 per weight and token, for every token that has to be read."""
    rollouts = loaded("rollouts", monkeypatch)
    model = tiny_llama(character_tokenizer("abc"), hidden=16, layers=2, heads=2)
    weights = sum(p.numel() for n, p in model.causal.base_model.named_parameters() if "proj" in n)
    head = model.head()[0].numel()
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        rollouts.products(model, [[1, 2, 3], [4, 5]], rows=6, new=4)()
    assert counter.get_total_flops() == 2 * (weights * (5 + 6 * 3) + head * 6 * 4)
