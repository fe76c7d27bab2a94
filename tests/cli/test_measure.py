"""``leibler measure``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leibler import cli
from leibler.data import Addition
from leibler.policy import character_tokenizer, tiny_llama

TASK = "task:addition:digits=1,n=10"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        tokenizer = character_tokenizer(Addition(digits=1).alphabet)
        tiny_llama(tokenizer, hidden=16, layers=1, heads=2, seed=seed).save(folder / name)
    return folder / "a", folder / "b"


@pytest.fixture
def leibler(capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def test_divergences_between_two_models(leibler, models):
    a, b = map(str, models)
    common = ("measure", "divergence", "--data", TASK, "--json")
    status, out, _ = leibler(*common, "--model", a, "--target", b)
    there = json.loads(out)
    assert status == 0
    assert there["divergence/reverse_kl"] > 0
    assert there["divergence/forward_kl"] == pytest.approx(there["divergence/reverse_kl/swapped"], rel=1e-4)
    assert there["tokens"] > 10
    back = json.loads(leibler(*common, "--model", b, "--target", a)[1])
    assert back["divergence/forward_kl"] == pytest.approx(there["divergence/reverse_kl"], rel=1e-4)
    assert there["model/nll"] == pytest.approx(back["target/nll"])


def test_divergences_by_name_and_by_expression(leibler, models):
    a, b = map(str, models)
    common = ("measure", "divergence", "--model", a, "--target", b, "--data", TASK, "--limit", "3")
    status, out, _ = leibler(*common, "--divergence", "renyi", "--divergence", "JensenShannon(beta=0.2)")
    assert status == 0
    names = [line.split()[0] for line in out.splitlines()]
    assert names[:3] == ["tokens", "divergence/renyi", "divergence/JensenShannon(beta=0.2)"]
    assert not any("infinite" in name for name in names), "nothing is infinite here"
    status, _, err = leibler(*common, "--divergence", "reny")
    assert status == 2
    assert err.startswith("error: 'reny' is not a known divergence (did you mean renyi")
    status, _, err = leibler(*common, "--divergence", "Renyi(order=2)")
    assert status == 2
    assert "Renyi" in err


def test_accuracy_of_answers(leibler, models):
    common = ("measure", "accuracy", "--model", str(models[0]), "--data", TASK, "--max-new-tokens", "3")
    status, out, _ = leibler(*common, "--samples", "2", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["questions"] == 10
    assert 0 <= found["accuracy"] <= 1
    assert found["pass@1"] <= found["pass@2"]
    out = leibler(*common, "--samples", "0", "--limit", "4")[1]
    assert [line.split()[0] for line in out.splitlines()] == ["questions", "accuracy"]
    assert "4" in out


def test_missing_things_are_one_sentence(leibler, models, tmp_path):
    a = str(models[0])
    for arguments, named in [
        (("accuracy", "--model", str(tmp_path / "none"), "--data", TASK), "none"),
        (("accuracy", "--model", a, "--data", str(tmp_path / "no.jsonl")), "no.jsonl"),
        (("divergence", "--model", a, "--target", str(tmp_path / "none"), "--data", TASK), "none"),
    ]:
        status, _, err = leibler("measure", *arguments)
        assert status == 2
        assert err.startswith("error: ")
        assert named in err
        assert err.count("\n") == 1


def test_infinity_is_written_as_text_in_json(capsys):
    from leibler.cli.measure import show

    show({"a": float("inf"), "a/infinite": 2, "b": [float("nan")]}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"a": "inf", "a/infinite": 2, "b": ["nan"]}
    show({"a": float("inf"), "a/infinite": 2, "b/infinite": 0}, as_json=False)
    assert capsys.readouterr().out == "a           inf\na/infinite  2\n"


def test_agreement_and_memorisation_of_models(leibler, models):
    a, b = map(str, models)
    status, out, _ = leibler(
        *("measure", "agreement", "--student", a, "--base", b, "--teacher", a),
        *("--data", TASK, "--max-new-tokens", "3", "--json"),
    )
    found = json.loads(out)
    assert status == 0
    assert found["agreement"] == 1.0
    assert found["gain"] == found["accuracy"] - found["base_accuracy"]
    three = ("--student", a, "--teacher", a, "--baseline", b)
    status, out, _ = leibler(
        "measure", "memorisation", *three, "--data", TASK, "--prefix", "3", "--suffix", "1", "--json"
    )
    found = json.loads(out)
    assert status == 0
    assert found["texts"] == 10
    assert found["student"] == found["teacher"] == found["easy"] + found["inherited"]
    assert (found["own"], found["new"]) == (0, 0)
    assert leibler("measure", "memorisation", *three, "--data", TASK)[0] == 2
