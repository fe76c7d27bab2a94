from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from leibler.data import Addition, load
from leibler.divergence import ForwardKL, ReverseKL
from leibler.errors import RunError
from leibler.measure import compare, token_view
from leibler.measure.models import TokenView
from leibler.measure.report import collect, figures, write_report
from leibler.measure.report.measured import Measured, Reliability, Text
from leibler.measure.report.page import render
from leibler.measure.report.run import reward_against_divergence, section
from leibler.measure.report.views import text_section
from leibler.policy import CausalLM, character_tokenizer, tiny_llama
from leibler.train import fit

TASK = "task:addition:digits=1,n=40,part=train"
HELD_OUT = "task:addition:digits=1,n=6,part=heldout"
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'>&{{ 7*7 }}"
VOID = {"meta", "br", "img", "link", "input", "hr", "path"}


class Page(HTMLParser):
    """The page as a browser's tree would hold it, at least as far as these tests ask."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.words: list[str] = []
        self.tokens: list[str] = []
        self.unbalanced: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(text)
        self.close()
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if dict(attrs).get("class", "").split()[:1] == ["tok"]:  # type: ignore[union-attr]
            self.tokens.append("")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        if self.stack[-1:] == ["script"]:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self.stack[-1:] != ["style"]:
            self.words.append(data)
            if self.stack[-1:] == ["span"] and self.tags[-1][1].get("class", "").startswith("tok"):  # type: ignore[union-attr]
                self.tokens[-1] += data

    def code(self) -> list[str]:
        """Scripts that a browser would run."""
        return [body for attributes, body in self.scripts if attributes.get("type") != "application/json"]


def read(path: Path) -> Page:
    return Page(path.read_text("utf-8"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A distillation with everything on disk, and a run of GRPO."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = character_tokenizer(Addition().alphabet)
    for name, seed in (("student", 1), ("teacher", 2)):
        model = tiny_llama(tokenizer, hidden=16, layers=1, heads=2, seed=seed, tie=False)
        model.head()[0].data.mul_(20)  # random heads are almost uniform; make the laws differ
        model.save(folder / name)
    common: dict[str, Any] = {"data": TASK, "validation": HELD_OUT, "max_new_tokens": 3, "learning_rate": 1e-2}
    common["quiet"] = True
    student, teacher = folder / "student", folder / "teacher"
    fit("gkd", student=student, teacher=teacher, out=folder / "gkd", steps=5, batch_size=4, validate_every=2, **common)
    fit("grpo", student=student, out=folder / "grpo", steps=4, batch_size=8, **common)
    return folder


@pytest.fixture(scope="module")
def page(runs) -> Page:
    path = write_report(runs / "gkd")
    assert path == runs / "gkd" / "report.html"
    return read(path)


def made(folder: Path, metrics: list[dict[str, Any]], **changes: Any) -> Path:
    """A run directory written by hand, whose models were given in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    memory = "<CausalLM given in memory>"
    run = {"recipe": "grpo", "student": memory, "teacher": None, "models": {}, "data": "<list given in memory>"}
    run |= {"options": {"steps": 10, "seed": 3, "learning_rate": 0.5}, "description": "Recipe\n  source: X", **changes}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    write_lines(folder / "metrics.jsonl", metrics)
    return folder


def write_lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# -- the page as a file ----------------------------------------------------------------------------------------------


def test_the_page_is_whole_and_fetches_nothing(page, runs):
    assert page.unbalanced == []
    assert page.stack == []
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base"), tag
        assert not {"src", "srcset", "xlink:href", "action"} & set(attributes), (tag, attributes)
        assert (attributes.get("href") or "#").startswith("#"), (tag, attributes)
    text = (runs / "gkd" / "report.html").read_text("utf-8")
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"https?://", text)
    (code,) = page.code()
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    viewport = [a for t, a in page.tags if t == "meta" and a.get("name") == "viewport"]
    assert len(viewport) == 1


def test_every_section_of_a_distillation_is_there(page):
    headings = (
        "Learning curves", "Accuracy against divergence", "Where the model differs from the teacher",
        "Calibration and measurements", "Samples over training", "The recipe, and how to run it again",
        "Speed, data and versions",
    )  # fmt: skip
    for heading in headings:
        assert heading in page.text
    for name in ("Jensen–Shannon to teacher", "Entropy", "Length", "Grad norm", "Learning rate", "tokens per second"):
        assert name in page.text
    assert "5 of 5 steps · finished" in page.text
    assert "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes (2023)" in page.text
    assert "JensenShannon(teacher): Match(" in page.text  # the recipe's own description
    assert "Left out" not in page.text
    assert "Loss term" not in page.text  # the only term is the loss: shown once
    assert "Loss, " not in page.text


def test_the_text_is_shaded_by_the_divergence_at_each_token(page, runs):
    model, target = CausalLM.load(runs / "gkd" / "final"), CausalLM.load(runs / "teacher")
    views = [v for r in load(HELD_OUT) for v in token_view(model, target, r.completion, prompt=r.prompt)]
    tokens = [a for t, a in page.tags if t == "span" and (a.get("class") or "").startswith("tok")]
    assert page.tokens == [v.text for v in views]
    shades = [float(a["style"].removeprefix("--shade:")) for a in tokens]
    order = sorted(range(len(views)), key=lambda i: views[i].reverse_kl)
    assert [shades[i] for i in order] == sorted(shades)
    assert order != sorted(range(len(views)), key=lambda i: views[i].forward_kl)  # or either would pass
    assert 0.0 <= min(shades) < 0.5 < max(shades) <= 0.7
    differ = sum(v.model_top[0][0] != v.target_top[0][0] for v in views) / len(views)
    assert f"first choices differ at {100 * differ:.1f}".removesuffix(".0") in page.text
    detail = next(d for d in (json.loads(body) for a, body in page.scripts if a.get("type")) if "tokens" in d)
    assert len(detail["tokens"]) == len(views)
    for row, view in zip(detail["tokens"], views, strict=True):
        assert [text for text, _, _ in row[5]] == [text for text, _ in view.model_top]
        assert [share for _, _, share in row[6]] == pytest.approx([p for _, p in view.target_top], abs=1e-4)
    # one stop of the tab key, the rest by arrows
    assert [a["tabindex"] for a in tokens].count("0") == 1


def test_different_first_choices_are_marked_unless_nearly_all_are():
    def view(mine: str, theirs: str) -> TokenView:
        return TokenView("a", 1, -1.0, -1.0, 0.1, 0.1, ((mine, 0.9),), ((theirs, 0.9),))

    def marks(*views: TokenView) -> list[bool]:
        found = text_section([Text("", views)], "t")
        assert found is not None
        return [token["differ"] for token in found["texts"][0]["tokens"]]

    same, other = view("a", "a"), view("a", "b")
    calm = text_section([Text("", (same,))], "t")
    assert calm is not None
    assert 0 < float(calm["texts"][0]["tokens"][0]["shade"]) < 0.5  # 0.1 nats is little, also where nothing is more
    assert marks(same, other, same) == [False, True, False]
    assert marks(other, other, same) == [False, False, False]
    assert text_section([], "t") is None


def test_measured_numbers_are_those_of_compare(page, runs):
    model, target = CausalLM.load(runs / "gkd" / "final"), CausalLM.load(runs / "teacher")
    found = compare(model, target, load(HELD_OUT), [ForwardKL(), ReverseKL()])
    for label, key in (
        ("KL(target ‖ model), forward nats per token", "divergence/forward_kl"),
        ("KL(model ‖ target), reverse nats per token", "divergence/reverse_kl"),
        ("Negative log-likelihood nats per token", "model/nll"),
    ):
        shown = re.findall(re.escape(label) + r" ([\d.]+)", page.text)  # the table stands after the curves
        assert shown, label
        assert float(shown[-1]) == pytest.approx(found[key], rel=5e-3), label
    assert f"this model, ECE {100 * found['model/calibration_error']:.1f}".removesuffix(".0") in page.text


def test_how_to_run_it_again(page, runs):
    folder = runs / "gkd"
    assert f"leibler train {folder}/run.yaml out={folder}-repeat" in page.text
    assert "--resume" not in page.text
    assert "The run is finished" in page.text


def test_a_policy_run_is_compared_with_its_initial_weights(runs):
    page = read(write_report(runs / "grpo"))
    assert "Where the model differs from the initial weights" in page.text
    assert "Reward against divergence" in page.text
    assert "Loss term: Policy gradient" in page.text
    assert "Reverse KL to reference" in page.text
    assert "reward 0" in page.text
    assert page.unbalanced == []


@pytest.mark.parametrize("given", [{"teacher": "teacher"}, {"teacher": None, "models": {"teacher": "teacher"}}])
def test_a_run_folder_may_be_moved(runs, tmp_path, given):
    """Relative paths in run.yaml are looked up beside the run too; the teacher may stand among the models."""
    shutil.copytree(runs / "gkd", tmp_path / "all" / "gkd")
    shutil.copytree(runs / "teacher", tmp_path / "all" / "teacher")
    file = tmp_path / "all" / "gkd" / "run.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **given}))
    page = read(write_report(tmp_path / "all" / "gkd"))
    assert "Left out" not in page.text
    assert "Where the model differs from the teacher" in page.text
    assert page.tokens


# -- what may be missing -----------------------------------------------------------------------------------------------


def test_what_was_given_in_memory_is_left_out_with_a_sentence(tmp_path):
    tokenizer = character_tokenizer("0123456789+=")
    student = tiny_llama(tokenizer, hidden=16, layers=1, heads=2)
    records = [{"prompt": "2+2=", "completion": "4"}] * 4
    fit("sft", student=student, data=records, out=tmp_path / "r", steps=2, batch_size=2, quiet=True, learning_rate=0.25)
    page = read(write_report(tmp_path / "r"))
    assert "Left out: the initial weights of this run were given in memory and left nothing on disk." in page.text
    assert page.tokens == []
    assert "Learning curves" in page.text
    assert "fit( 'sft', student=..., data=...," in page.text
    assert "steps=2, batch_size=2, learning_rate=0.25," in page.text
    assert "leibler train" not in page.text


@pytest.mark.parametrize(
    ("lost", "why"),
    [
        ("teacher", "There is no directory"),
        ("data", "does not exist|no such file|There is no"),
    ],
)
def test_what_is_gone_is_left_out_with_a_sentence(runs, tmp_path, lost, why):
    folder = tmp_path / "gkd"
    shutil.copytree(runs / "gkd", folder)
    run = yaml.safe_load((folder / "run.yaml").read_text())
    run |= {"teacher": "/nowhere/teacher"} if lost == "teacher" else {"validation": "/nowhere/data.jsonl"}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    page = read(write_report(folder))
    assert re.search(rf"Left out: .*({why}).*/nowhere", page.text, re.IGNORECASE)
    assert "Learning curves" in page.text
    assert page.tokens == []


def test_an_interrupted_run_says_where_it_stands_and_how_to_go_on(runs, tmp_path):
    folder = tmp_path / "a run"
    shutil.copytree(runs / "gkd", folder)
    shutil.rmtree(folder / "final")
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:3]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "lo']))
    page = read(write_report(folder))
    assert "3 of 5 steps · not finished" in page.text
    assert f"leibler train --resume '{folder}'" in page.text
    assert "Left out: the run stands at step 3 of 5 and has no final model yet." in page.text
    assert "1 unreadable line in this run's logs was passed over" in page.text


def test_numbers_that_are_not_finite_leave_gaps(tmp_path):
    rows = [{"step": i, "loss": "nan" if i == 2 else "inf" if i == 4 else 1.0 * i, "loss/a": 2.0} for i in range(1, 7)]
    page = read(write_report(made(tmp_path / "r", rows)))
    assert "2 steps without a finite value" in page.text
    shown = next(d for d in (json.loads(b) for a, b in page.scripts if a.get("type")) if d.get("near") == "x")
    assert [label for _, _, label, _, _ in shown["points"]] == ["step 1", "step 3", "step 5", "step 6"]


def test_a_run_whose_numbers_are_all_broken_still_has_a_page(tmp_path):
    page = read(write_report(made(tmp_path / "r", [{"step": 1, "loss": "nan", "reward": None}])))
    assert "1 step without a finite value" in page.text


def test_rows_set_aside_are_counted_by_reason_with_the_first_of_each(tmp_path):
    folder = made(tmp_path / "r", [{"step": 1, "loss": 1.0}])
    rows = [{"file": "d.jsonl", "line": n, "reason": "no 'prompt'", "detail": "", "raw": f"raw {n}"} for n in (3, 9)]
    other = {"file": "d.jsonl", "line": 5, "reason": "not JSON", "detail": "Expecting value", "raw": "{"}
    write_lines(folder / "set_aside" / "train.jsonl", [*rows, other])
    page = read(write_report(folder))
    assert "train : 3 rows, all in" in page.text
    assert "2 no 'prompt' first: d.jsonl, line 3 raw 3" in page.text
    assert "1 not JSON first: d.jsonl, line 5, Expecting value" in page.text
    assert "None: every row" not in page.text


def test_given_measurements_are_shown_and_not_taken_again(runs, tmp_path, monkeypatch):
    import leibler.measure.models as models

    def evaluate(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(models, "evaluate", evaluate)
    with pytest.raises(AssertionError, match="measured again"):
        write_report(runs / "gkd")
    shutil.copytree(runs / "gkd", tmp_path / "gkd")
    page = read(write_report(tmp_path / "gkd", evaluation={"accuracy": 0.625, "target/accuracy": 0.75, "ok": True}))
    assert "Answer right, greedy share of questions 62.5 % 75 %" in page.text
    memory = made(tmp_path / "r", [{"step": 1, "loss": 1.0}])
    assert (
        "Answer right, greedy share of questions 62.5 %"
        in read(write_report(memory, evaluation={"accuracy": 0.625})).text
    )


def test_a_long_run_makes_a_page_of_ordinary_size(tmp_path):
    rows = [{"step": i, "loss": math.sin(i) + 2, "entropy": 1.0, "reward": i % 7} for i in range(1, 20_001)]
    path = write_report(made(tmp_path / "r", rows))
    assert path.stat().st_size < 600_000
    assert "mean of 63 steps" in path.read_text("utf-8")


# -- nothing that comes from data is markup ----------------------------------------------------------------------------


def hostile_run(folder: Path) -> Path:
    folder = made(
        folder, [{"step": i, "loss": 1.0, f"divergence/{HOSTILE}": 1.0, HOSTILE: 2.0, "reward": 0.1} for i in (1, 2)],
        recipe=HOSTILE, description=HOSTILE, command=HOSTILE, teacher=HOSTILE, overrides={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE}, data_hashes={HOSTILE: HOSTILE}, validation=HOSTILE, models={HOSTILE: HOSTILE},
        options={"steps": HOSTILE, "seed": HOSTILE, HOSTILE: HOSTILE, "max_new_tokens": HOSTILE},
    )  # fmt: skip
    sample = {"step": 1, "stream": HOSTILE, "prompt": HOSTILE, "completion": HOSTILE, "reward": 1.0}
    write_lines(folder / "samples.jsonl", [sample, {**sample, "stream": "b"}, {"step": 2, "reward": HOSTILE}])
    row = {"file": HOSTILE, "line": HOSTILE, "reason": HOSTILE, "detail": HOSTILE, "raw": HOSTILE}
    write_lines(folder / "set_aside" / "train.jsonl", [row])
    write_lines(folder / "validation.jsonl", [{"step": 1, f"ReverseKL({HOSTILE})": 1.0, "accuracy": 0.5}])
    return folder


def assert_harmless(page: Page, text: str) -> None:
    assert len(page.code()) == 1, "a script came from the data"
    assert page.unbalanced == []
    assert page.stack == []
    for tag, attributes in page.tags:
        assert tag != "img"
        assert not [name for name in attributes if name.startswith("on")]
    assert "49" not in re.findall(r"alert\(2\)>\"'>&(.{0,4})", page.text), "a template in the data was run"
    assert HOSTILE in page.text
    for attributes, body in page.scripts:
        if attributes.get("type"):
            json.loads(body)
    assert "<img" not in text


def test_hostile_text_in_a_run_is_shown_and_never_run(tmp_path):
    path = write_report(hostile_run(tmp_path / "r"))
    assert_harmless(read(path), path.read_text("utf-8"))


def test_hostile_tokens_are_shown_and_never_run(tmp_path):
    recorded = collect.read_run(made(tmp_path / "r", [{"step": 1, "loss": 1.0}]))
    top = ((HOSTILE, 0.9), ("\n", 0.1))
    token = TokenView(HOSTILE, 7, -0.1, -2.0, 0.5, math.inf, top, top[::-1])
    calm = TokenView("\n  x", 8, -0.1, -2.0, 0.5, 0.0, top, top)
    told = Measured(
        target=HOSTILE, data=HOSTILE, texts=(Text(HOSTILE, (token, calm), True),), numbers={"model": {HOSTILE: 1.0}},
        reliability=(Reliability(HOSTILE, (0.5,), (0.5,), (3,), 0.1),),
    )  # fmt: skip
    one = section(recorded, told)
    text = render({"title": HOSTILE, "demo": None, "runs": [one]})
    page = Page(text)
    assert_harmless(page, text)
    assert page.tokens == [HOSTILE, "↵\n  x"]  # the line break is seen, and breaks the line
    assert one["text"]["texts"][0]["tokens"][0]["shade"] == "0.680"  # infinitely far: the darkest


# -- what cannot be reported on ----------------------------------------------------------------------------------------


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(RunError, match=r"nowhere does not exist; give the directory that `leibler train` wrote"):
        write_report(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(RunError, match="file is a file; give the directory"):
        write_report(file)
    with pytest.raises(RunError, match="is not a run directory"):
        write_report(tmp_path)
    empty = made(tmp_path / "empty", [])
    with pytest.raises(RunError, match="has no metrics yet"):
        write_report(empty)
    (empty / "metrics.jsonl").write_text("torn\n[1]\n{}\n")
    with pytest.raises(RunError, match="has no metrics yet"):
        write_report(empty)
    (empty / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match=r"run\.yaml"):
        write_report(empty)
    (empty / "run.yaml").write_text("recipe: [")
    with pytest.raises(RunError, match="not valid YAML"):
        write_report(empty)
    blocked = made(tmp_path / "blocked", [{"step": 1, "loss": 1.0}])
    (blocked / "report.html").mkdir()
    with pytest.raises(RunError, match=r"report\.html cannot be written"):
        write_report(blocked)
    assert sorted(p.name for p in blocked.iterdir()) == ["metrics.jsonl", "report.html", "run.yaml"]


@pytest.mark.parametrize("content", ["{", "[]", '{"models": []}', '{"models": [3]}', '{"title": "x"}'])
def test_a_broken_demonstration_is_named(tmp_path, content):
    (tmp_path / "demo.json").write_text(content)
    with pytest.raises(RunError, match=r"demo\.json .*; make it again with `leibler demo`"):
        write_report(tmp_path)


# -- reward against divergence -----------------------------------------------------------------------------------------


def test_the_front_holds_the_points_that_no_other_beats(tmp_path):
    pairs = [(0.1, 0.2), (0.2, 0.1), (0.3, 0.6), (0.4, 0.5), (0.5, 0.9)]
    rows = [{"step": i, "divergence/ReverseKL(reference)": kl, "reward": r} for i, (kl, r) in enumerate(pairs, 1)]
    found = reward_against_divergence(collect.read_run(made(tmp_path / "r", rows)))
    assert [(row[0], row[2], row[3]) for row in found["front"]] == [
        ("step 1", "0.100", "0.200"),
        ("step 3", "0.300", "0.600"),
        ("step 5", "0.500", "0.900"),
    ]
    assert found["head"] == ("The front", "Reverse KL to reference", "Reward")
    # across to the next point, then up: between two points nothing better than the left one is known
    assert re.search(r'class="stairs c0" d="M[\d. ]+H[\d.]+V[\d.]+H[\d.]+V[\d.]+"', str(found["chart"]))


def test_many_steps_are_averaged_into_few_dots(tmp_path):
    rows = [{"step": i, "divergence/KL": 1.0 * i, "reward": 1.0 * i} for i in range(1, 401)]
    found = reward_against_divergence(collect.read_run(made(tmp_path / "r", rows)))
    assert found["note"] == "Each dot is the mean of 10 steps."
    assert str(found["chart"]).count('class="dot') == 40
    assert found["front"][-1][:3] == ("steps 391–400", "", "396")  # 395.5


def test_why_there_is_no_frontier(tmp_path):
    def why(**columns: Any) -> str:
        recorded = collect.read_run(made(tmp_path / "r", [{"step": i, **columns} for i in (1, 2)]))
        return reward_against_divergence(recorded)["missing"]

    assert "no divergence" in why(reward=1.0)
    assert "neither a reward" in why(loss=1.0)
    recorded = collect.read_run(made(tmp_path / "r", [{"step": 1, "reward": 1.0, "divergence/KL": 1.0}]))
    assert "fewer than two points" in reward_against_divergence(recorded)["missing"]


# -- several runs ------------------------------------------------------------------------------------------------------


def demo_folder(folder: Path, runs: Path) -> dict[str, Any]:
    for name in ("gkd", "grpo"):
        shutil.copytree(runs / name, folder / name)
    metrics = {
        "ForwardKL": {"ForwardKL": 0.5, "ReverseKL": 0.9, "accuracy": 0.25, "ece": 0.1},
        "ReverseKL": {"ForwardKL": 0.75, "ReverseKL": 0.6, "accuracy": 0.5, "ece": 0.2},
    }
    bins = {"confidence": [0.2, None, 0.9], "accuracy": [0.1, None, 1.0], "count": [4, 0, 6]}
    models = [
        {"name": name, "run": "gkd", "checkpoint": "gkd/final", "parameters": 12345, "metrics": m, "calibration": bins}
        for name, m in metrics.items()
    ]
    models.insert(0, {"name": "teacher", "run": None, "checkpoint": "grpo/final", "metrics": {"accuracy": 1.0}})
    return {
        "title": "Two divergences", "seconds": 61.0, "models": models, "divergences": list(metrics), "task": "adding",
        "findings": ["Each is nearest in its own."],
        "text": {"model": "gkd/final", "target": "grpo/final", "text": "1+1=2"},
        "rl": {"before": {"accuracy": 0.25, "entropy": 1.0}, "after": {"accuracy": 0.75}, "run": "grpo"},
    }  # fmt: skip


def test_a_demonstration_opens_with_the_comparison(runs, tmp_path):
    (tmp_path / "demo.json").write_text(json.dumps(demo_folder(tmp_path, runs)))
    path = write_report(tmp_path)
    page = read(path)
    assert page.unbalanced == []
    assert "adding · 3 models · made in 1 min 1 s" in page.text
    assert "Each is nearest in its own." in page.text
    assert "teacher 100 % – – –" in page.text
    assert "Forward KL 12,345 25 % 0.500 0.900 10 %" in page.text
    order = [
        page.text.index(x) for x in ("side by side", "measured in each", "learning from rewards changed", "The runs")
    ]
    assert order == sorted(order)
    assert "before 25 %" in page.text
    assert "after 75 %" in page.text
    assert page.tokens == ["1", "+", "1", "=", "2", "⟨eos⟩"]
    assert [a["id"] for t, a in page.tags if t == "article"] == ["run-1", "run-2"]
    identities = [a["id"] for _, a in page.tags if "id" in a]
    assert len(identities) == len(set(identities))


def test_the_least_of_each_column_is_marked(runs, tmp_path):
    from leibler.measure.report.demo import sections

    content = demo_folder(tmp_path, runs)
    matrix = sections(tmp_path, content)["demo"]["matrix"]
    marks = [
        [(cell["text"], cell["nearest"], cell["own"], cell["more"]) for cell in row["cells"]] for row in matrix["rows"]
    ]
    assert marks == [
        [("0.500", True, True, ""), ("0.900", False, False, "+50 %")],
        [("0.750", False, False, "+50 %"), ("0.600", True, True, "")],
    ]
    content["models"][1]["metrics"]["ForwardKL"] = "inf"  # the other becomes the nearest
    content["models"][2]["metrics"].pop("ReverseKL")
    matrix = sections(tmp_path, content)["demo"]["matrix"]
    assert [row["cells"][0]["nearest"] for row in matrix["rows"]] == [False, True]
    assert matrix["rows"][0]["cells"][0]["text"] == "∞"
    assert matrix["rows"][1]["cells"][1]["text"] == "–"


def test_a_demonstration_stands_without_its_runs_and_models(runs, tmp_path):
    content = demo_folder(tmp_path, runs)
    for name in ("gkd", "grpo"):
        shutil.rmtree(tmp_path / name)
    content["findings"] = [HOSTILE]
    content["models"][0]["name"] = content["task"] = content["title"] = HOSTILE
    (tmp_path / "demo.json").write_text(json.dumps(content))
    path = write_report(tmp_path)
    page = read(path)
    assert_harmless(page, path.read_text("utf-8"))
    assert "Left out: There is no directory" in page.text
    assert "gkd does not exist" in page.text
    (tmp_path / "demo.json").write_text(json.dumps({"models": [{}]}))
    assert "unnamed" in read(write_report(tmp_path)).text


# -- charts ------------------------------------------------------------------------------------------------------------

values = st.lists(st.floats(-1e9, 1e9) | st.just(math.nan) | st.just(math.inf), min_size=1, max_size=50)


@given(values, st.booleans())
def test_every_point_has_its_place_and_the_labels_are_few(numbers, log):
    axis = figures.axis_of(numbers, log)
    assert axis.low < axis.high
    for v in numbers:
        if math.isfinite(v) and (v > 0 or not log):
            assert -1e-9 <= axis.place(v) <= 1 + 1e-9
    ticks = axis.ticks()
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= 12
    assert all(axis.low * 0.99 - 1e-6 * abs(axis.low) <= t or t <= axis.high for t in ticks)
    if not log:
        assert ticks


@given(values)
def test_condensed_and_smoothed_curves_stay_between_the_extremes(numbers):
    finite = [v for v in numbers if math.isfinite(v)]
    long = numbers * 20
    x, y = figures.condense(range(len(long)), long)
    assert len(x) == len(y) <= figures.MOST_POINTS
    for row in (y, figures.smooth(numbers, 5)):
        for v in row:
            if math.isfinite(v):
                assert min(finite) - 1e-6 <= v <= max(finite) + 1e-6


def test_smoothing_takes_as_many_neighbours_on_both_sides():
    assert figures.smooth([0.0, 0.0, 3.0, 0.0, 0.0], 3) == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert figures.smooth([4.0, 0.0, math.nan, 2.0], 3) == [2.0, 2.0, 1.0, 2.0]


def test_a_curve_goes_through_its_points():
    drawn = str(figures.chart("T", "u", [figures.Series("s", [0, 1, 2], [0.0, 1.0, 0.5])], y_axis=figures.Axis(0, 1)))
    assert 'd="M0 1000L500 0L1000 500"' in drawn
    assert 'aria-label="T (u); s: 0 at step 0, 0.500 at step 2."' in drawn
    (points,) = re.findall(r'json">(.*?)</script>', drawn)
    assert [row[:2] for row in json.loads(points)["points"]] == [
        [0, 1000],
        [500, 0],
        [1000, 500],
    ]  # what hovering marks
    gap = str(figures.chart("T", "u", [figures.Series("s", [0, 1, 2, 3, 4], [0, 1, math.nan, 1, math.inf])]))
    assert gap.count("h.01") == 1  # the lonely point is a dot
    stairs = [figures.Series("s", [0, 1], [0.0, 1.0], "stairs")]
    assert "H1000V" in str(figures.chart("T", "u", stairs))


def test_a_term_that_only_repeats_a_divergence_is_drawn_once(tmp_path):
    rows = [
        {
            "step": i,
            "loss": 3.0,
            "loss/KL(t)@a": 1.0,
            "divergence/KL(t)@a": 1.0001,
            "loss/KL(t)@b": 2.0,
            "loss/other": 0.5,
        }
        for i in (1, 2)
    ]
    path = write_report(made(tmp_path / "r", rows))
    assert path.read_text("utf-8").count("<b>KL to t, a</b>") == 1
    page = read(path)
    assert "Loss term: KL to t, a" not in page.text
    assert "Loss term: KL to t, b" in page.text
    assert "Loss term: Other" in page.text


def test_a_table_takes_the_last_of_two_rows_with_one_step():
    rows = [{"step": 2, "a": 1.0}, {"step": 1, "a": 5.0, "b": True}, {"step": 2, "a": "inf"}, {"a": 9.0}, {"step": "x"}]
    table = collect.table(rows)
    assert table.steps == (1.0, 2.0)
    assert table.columns == {"a": (5.0, math.inf)}


def test_a_divergence_inside_the_reward_is_shown_per_response(tmp_path):
    name = "divergence_per_sequence/InReward"
    rows = [{"step": i, "loss": 1.0, name: i / 10, "reward": i / 5} for i in range(1, 5)]
    recorded = collect.read_run(made(tmp_path / "r", rows))
    found = reward_against_divergence(recorded)
    assert found["head"] == ("The front", "Divergence inside the reward", "Reward")
    assert "nats per response" in str(found["chart"])
    labels = [card["label"] for card in section(recorded, None)["headline"]]
    assert "Divergence inside the reward" in labels
