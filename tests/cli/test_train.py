"""``leibler train``, end to end on a model of a few thousand weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from leibler import cli
from leibler.cli.building import recipe_from
from leibler.cli.train import Request, from_file
from leibler.data import Addition
from leibler.divergence import JensenShannon
from leibler.errors import RecipeError, RunError
from leibler.objective import Linear
from leibler.policy import CausalLM, character_tokenizer, tiny_llama
from leibler.recipes import names

TASK = "task:addition:digits=1,n=20"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    tiny_llama(character_tokenizer(Addition(digits=1).alphabet), hidden=16, layers=1, heads=2).save(folder)
    return folder


@pytest.fixture
def leibler(capsys, tmp_path, monkeypatch):
    """Run a command in this process from an empty directory: ``leibler("methods") -> (status, out, err)``."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def metrics(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def begin(leibler, model, *arguments: str, out: str = "runs/a") -> tuple[int, str, str]:
    return leibler(
        "train",
        "sft",
        f"student={model}",
        f"data={TASK}",
        f"out={out}",
        "steps=3",
        "batch_size=4",
        "quiet=true",
        *arguments,
    )


# ---- a new run -----------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_model_and_what_is_needed_to_repeat_it(leibler, model):
    status, out, err = begin(leibler, model, "learning_rate=1e-3")
    assert (status, err) == (0, "")
    assert out.startswith("runs/a/final: the trained model (loss ")
    assert [line["step"] for line in metrics("runs/a")] == [1, 2, 3]
    assert CausalLM.load("runs/a/final").hidden_size == 16
    content = yaml.safe_load(Path("runs/a/run.yaml").read_text())
    assert content["recipe"] == "sft"
    assert content["options"]["learning_rate"] == 1e-3
    assert content["data"] == {"train": TASK}
    assert content["student"] == str(model)


def test_a_run_file_repeats_the_run_to_the_last_digit(leibler, model):
    begin(leibler, model, "recipe.objective.terms.0.coefficient=0.5", "learning_rate=1e-3")
    status, out, _ = leibler("train", "runs/a/run.yaml")
    assert status == 0
    assert "a-repeat/final" in out
    assert Path("runs/a-repeat/metrics.jsonl").read_text() == Path("runs/a/metrics.jsonl").read_text()
    # again, from the directory, into the next free name, with a change
    assert leibler("train", "runs/a", "seed=1", "recipe.objective.terms.0.coefficient=1.0")[0] == 0
    content = yaml.safe_load(Path("runs/a-repeat-2/run.yaml").read_text())
    assert content["options"]["seed"] == 1
    assert content["overrides"] == {"recipe.objective.terms.0.coefficient": "1.0"}
    assert metrics("runs/a-repeat-2") != metrics("runs/a")


def test_relative_paths_are_written_so_that_any_directory_will_do(leibler, model, tmp_path, monkeypatch):
    (tmp_path / "here").symlink_to(model)
    rows = [{"prompt": "1+1=", "completion": "2"}] * 4
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    begun = leibler(
        "train", "sft", "student=here", "data=rows.jsonl", "out=runs/b", "steps=1", "batch_size=2", "quiet=1"
    )
    assert begun[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert leibler("train", "../runs/b/run.yaml", "out=c")[0] == 0
    assert metrics("c") == metrics("../runs/b")


def test_an_interrupted_run_is_saved_and_goes_on(leibler, model, tmp_path):
    begun = [
        *(sys.executable, "-m", "leibler", "train", "sft", f"student={model}", f"data={TASK}", "out=runs/long"),
        *("steps=1000000", "batch_size=2"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        begun, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    # The deadline is no claim about speed: it only keeps a broken run from being waited for without end.
    file, deadline = tmp_path / "runs/long/metrics.jsonl", time.monotonic() + 600
    try:
        while not (file.exists() and file.read_text().count("\n") >= 3):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "the run never began"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "leibler train --resume runs/long" in err
    assert "Traceback" not in err
    done = metrics("runs/long")[-1]["step"]
    assert f"step-{done:08d}" in err, "where it was saved"
    # A million steps are more than this test needs: let the run end two steps on.
    path = Path("runs/long/run.yaml")
    content = yaml.safe_load(path.read_text())
    content["options"]["steps"] = done + 2
    path.write_text(yaml.safe_dump(content))
    status, out, _ = leibler("train", "--resume", "runs/long")
    assert status == 0
    assert [line["step"] for line in metrics("runs/long")] == list(range(1, done + 3))
    assert "runs/long/final" in out


def test_ctrl_c_before_the_first_step_says_that_nothing_was_saved(leibler, model, monkeypatch):
    def interrupted(self, *, resume=False):
        raise KeyboardInterrupt  # no signal: a shell's background job is born with SIGINT ignored

    monkeypatch.setattr(Request, "run", interrupted)
    status, _, err = begin(leibler, model)
    assert status == 130
    assert err == "interrupted before the first checkpoint; nothing was saved in runs/a\n"


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no recipe was given; `leibler methods` lists them"),
        (["student=x"], "the recipe comes first, before student=x"),
        (["minilm"], "'minilm' is not a known method (did you mean miniplm, minillm"),
        (["sft"], "no student was given; add student=DIR"),
        (["sft", "student=x"], "no data was given"),
        (["sft", "student=x", f"data={TASK}"], "no run directory was given; add out=DIR"),
        (["sft", "stps=5"], "stps is not a known key (did you mean steps"),
        (["sft", "teachr=5"], "teachr is not a known key (did you mean teacher"),
        (["sft", "models=5"], "models is not a known key (did you mean models.NAME"),
        (["sft", "steps=many"], "steps=many: expected a whole number"),
        (["sft", "steps=0"], "steps=0 must be at least 1"),
        (["sft", "decay=steep"], "decay=steep: expected one of none, linear, cosine"),
        (["sft", "steps=1", "steps=2"], "steps is given twice"),
        (["sft", "quickly"], "'quickly' is not an override; write it as key=value"),
        (["grpo", "recipe.group_sise=4"], "recipe.group_sise is not a known key (did you mean recipe.group_size"),
        (["grpo", "recipe.group_size=x"], "recipe.group_size=x: expected a whole number"),
        (
            ["kd", "recipe.divergence=renni"],
            "recipe.divergence=renni: renni is not a part of the library (did you mean",
        ),
        (["kd", "recipe.objective.terms.5.on=x"], "recipe.objective.terms.5.on is not a known key"),
        (
            ["dpo", "recipe.objective.terms.0.score.divergence=TotalVariation()"],
            "TotalVariation gives no implicit reward",
        ),
        (["runs/none/run.yaml"], "runs/none/run.yaml does not exist"),
        (["--resume", "runs/none"], "runs/none does not exist"),
        (["--resume", "runs/none", "sft"], "--resume goes on with runs/none as it was begun"),
        (["sft", "student=nowhere", f"data={TASK}", "out=o"], "student=nowhere: "),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing_behind(leibler, tmp_path, arguments, message):
    status, out, err = leibler("train", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_holds_another_run_is_not_overwritten(leibler, model):
    begin(leibler, model)
    before = Path("runs/a/metrics.jsonl").read_text()
    status, _, err = begin(leibler, model, "seed=5")
    assert status == 2
    assert "out=runs/a holds another run" in err
    assert "leibler train --resume runs/a" in err
    assert Path("runs/a/metrics.jsonl").read_text() == before


def test_a_run_that_only_python_can_repeat_says_so(tmp_path):
    file = tmp_path / "run.yaml"
    for content, key in [
        ({"recipe": "custom"}, "recipe"),
        ({"recipe": "sft", "student": "<CausalLM given in memory>"}, "student"),
        ({"recipe": "sft", "data": {"train": "<list given in memory>"}}, "data.train"),
        ({"recipe": "kd", "models": {"base": "<CausalLM given in memory>"}}, "models.base"),
    ]:
        file.write_text(yaml.safe_dump(content))
        with pytest.raises(RunError, match=rf"records a {key} that was built in Python"):
            from_file(file)
    file.write_text(yaml.safe_dump({"recipe": "sft", "options": {"speed": 11}}))
    with pytest.raises(RunError, match="sets the option speed, which this version"):
        from_file(file)


# ---- requests and recipes ------------------------------------------------------------------------------------------


def test_keys_go_where_they_belong():
    request = Request("minillm").changed(
        {
            "student": "a",
            "teacher": "b",
            "models.base": "c",
            "data": "d.jsonl",
            "data.text": "e.jsonl",
            "validation": "none",
            "steps": "1e3",
            "micro_batch_size": "none",
            "recipe.clip": "0.1",
            "quiet": "yes",
        }
    )
    assert request == Request(
        "minillm",
        overrides={"recipe.clip": "0.1"},
        student="a",
        teacher="b",
        models={"base": "c"},
        data={"train": "d.jsonl", "text": "e.jsonl"},
        options={"steps": 1000, "micro_batch_size": None},
        quiet=True,
    )


def test_overrides_reach_parameters_and_places():
    recipe = recipe_from(
        "grpo",
        {
            "recipe.group_size": "4",
            "recipe.objective.terms.1.coefficient": "Linear(0.1, 0.0, steps=9)",
            "recipe.schedule.epochs": "2",
            "recipe.source.stage.by": "Answer()",
        },
    )
    assert recipe.source.source.group_size == 4
    assert recipe.objective.terms[1].coefficient == Linear(0.1, 0.0, steps=9)
    assert recipe.schedule.epochs == 2
    assert recipe.objective.terms[1].sampled_from == "behaviour", (
        "a batch used twice is stale: the recipe is checked anew"
    )


def test_a_divergence_can_be_exchanged():
    recipe = recipe_from("kd", {"recipe.divergence": "jensen_shannon(beta=0.1)"})
    assert recipe.objective.terms[0].divergence == JensenShannon(beta=0.1)
    with pytest.raises(RecipeError, match=r"K3\(\) descends ForwardKL, not ReverseKL"):
        recipe_from("kdrl", {"recipe.objective.terms.1.estimator": "K3()"})


@pytest.mark.parametrize("slug", names())
def test_every_key_that_is_shown_can_be_set_to_what_it_is(slug):
    from leibler.cli.overrides import leaves

    recipe = recipe_from(slug, {})
    simple = {p: v for p, v in leaves(recipe).items() if isinstance(v, (bool, int, float, str, type(None)))}
    assert len(simple) > 5
    assert recipe_from(slug, {f"recipe.{path}": str(value) for path, value in simple.items()}) == recipe


@pytest.mark.parametrize("slug", names())
def test_every_method_can_be_shown(leibler, slug):
    status, out, _ = leibler("show", slug, "--keys")
    assert status == 0
    assert out.startswith(f"{slug}: ")
    assert "recipe.KEY=VALUE" in out
    assert "Plan" in out
