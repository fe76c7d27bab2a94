"""The scripts explain themselves, and what they compute from their measurements is right; speed itself is no test."""

from __future__ import annotations

import ast
import gc
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from leibler.policy import CausalLM, character_tokenizer, sample, tiny_llama, uniforms

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("[a-z]*.py"))


def loaded(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    for script in FOLDER.glob("*.py"):  # a folder of tests has the name of one of them
        monkeypatch.delitem(sys.modules, script.stem, raising=False)
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


def test_the_usual_step_holds_nothing_of_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the baseline of its memory would be too high."""
    growth = loaded("growth", monkeypatch)
    held: list[list[tuple[int, ...]]] = []

    class Seen(growth.Steps):
        least = None

        def mark(self) -> None:
            gc.collect()
            tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
            held.append([tuple(x.shape) for x in tensors if x.dim() == 3 and x.shape[-1] == 61])

    monkeypatch.setattr(growth, "Steps", Seen)
    growth.usual(growth.Size(vocabulary=61, new=2, group=1, prompts=1), 3, float)
    assert held == [[], [], []]


def multiplications(run: Callable[[], None]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


@pytest.fixture
def weights() -> tuple[CausalLM, int, int, int]:
    """A model and its numbers of weights: all but the next two, those a prompt's end alone needs, the head."""
    model = tiny_llama(character_tokenizer("abc"), hidden=16, layers=2, heads=2)
    sizes = {n: p.numel() for n, p in model.causal.base_model.named_parameters() if "proj" in n}
    end = sum(sizes[n] for n in sizes if "layers.1." in n and "k_proj" not in n and "v_proj" not in n)
    return model, sum(sizes.values()) - end, end, model.head()[0].numel()


def test_the_limit_of_rollouts_is_what_no_sampler_avoids(
    weights: tuple[CausalLM, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 prompts of 5 tokens together, 3 completions of each, 4 new tokens of which the last is not read."""
    rollouts = loaded("rollouts", monkeypatch)
    model, most, end, head = weights
    run = rollouts.alone(rollouts.sampling(model, [[1, 2, 3], [4, 5]], rows=6, new=4))
    assert multiplications(run) == most * (5 + 6 * 3) + (end + head) * (2 + 6 * 3)


def test_the_limit_is_not_above_what_the_library_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts = loaded("rollouts", monkeypatch)
    model = rollouts.never_ending(64, 16, 2)
    prompts = [[4, 5, 4], [5, 6]]

    def draw() -> None:
        sample(model, prompts, uniforms=uniforms(0, "a", 0, rows=6, n=4), group_size=3)

    draw()  # the first also looks whether the model can be decoded lean
    drawn = multiplications(draw)
    limit = multiplications(rollouts.alone(rollouts.sampling(model, prompts, rows=6, new=4)))
    assert 0.8 * drawn < limit <= drawn


@pytest.mark.parametrize(("method", "prompts"), [("grpo", 4), ("gkd", 32)])
def test_the_limit_of_a_step_counts_a_prompt_once_for_its_group(
    method: str, prompts: int, weights: tuple[CausalLM, int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = loaded("training", monkeypatch)
    model, most, end, head = weights
    model.save(tmp_path)
    case = training.Case("", str(tmp_path), str(tmp_path), ["ab"] * 32, steps=1, new=3)
    given = len(model.encode_prompt("ab")) * prompts
    once = most * (given + 32 * 2) + (end + head) * (prompts + 32 * 2)
    assert multiplications(training.rollouts.alone(training.products(method, case))) == 5 * once


def test_the_limit_of_memory_has_the_gradients_that_a_row_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = loaded("fused", monkeypatch)
    problem = fused.Problem.make(512, 8, 16, 4096, torch.bfloat16)
    names = ["forward_kl", fused.FROZEN, fused.ADAPTED, fused.LONGER]
    assert set(names[1:]) < set(fused.variations(problem))
    limits = [fused.memory_limit(problem, name) for name in names]
    # In float32, whatever the numbers are; of the adapter only its factor by the vocabulary.
    assert [gradient * 2**20 for gradient, *_ in limits] == [4 * 8 * 4096, 0, 4 * fused.RANK * 4096, 4 * 8 * 4096]
    chunk = limits[0][2]
    assert [chunks * 2**20 for _, chunks, _ in limits[:3]] == [2 * 2 * chunk * 4096] * 3


def test_the_memory_of_a_gpu_is_measured_without_the_gradients_before(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = loaded("gpu", monkeypatch)
    problem = gpu.Problem.make(2, 4, 4, 8, torch.float32)
    problem.model.weight.sum().backward()
    problem.model.hidden.sum().backward()
    held: list[bool] = []

    def allocated() -> int:
        held.append(problem.model.weight.grad is not None or problem.model.hidden.grad is not None)
        return 0

    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    assert gpu.Watch("cuda").megabytes(problem, lambda: None) == 3
    assert held == [False]


def test_liger_stands_beside_what_it_computes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = loaded("gpu", monkeypatch)
    monkeypatch.setattr(gpu, "liger", lambda problem: lambda: None)
    sizes = {"tokens": 8, "hidden": 4, "target-hidden": 4, "vocab": 16, "repeats": 1, "dtype": "float32"}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    gpu.main([*options, "--device=cpu", "--only", "jensen_shannon", "forward_kl"])
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    float(rows["jensen_shannon"][3])
    assert rows["forward_kl"][3] == "-"
