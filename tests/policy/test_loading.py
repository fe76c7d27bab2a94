from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from leibler.errors import ModelError
from leibler.policy import CausalLM
from leibler.policy.loading import is_local


@pytest.fixture
def directory(tmp_path: Path, model: CausalLM) -> Path:
    model.save(tmp_path / "model")
    return tmp_path / "model"


def message(source: str | Path, **options) -> str:
    """The one sentence that loading ``source`` ends in."""
    with pytest.raises(ModelError) as caught:
        CausalLM.load(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_missing_directory(tmp_path: Path) -> None:
    assert "no directory" in message(tmp_path / "none")
    assert "no directory" in message(str(tmp_path / "none"))
    assert "no directory './none'" in message("./none")


def test_not_a_checkpoint(tmp_path: Path, directory: Path) -> None:
    assert "no config.json" in message(tmp_path)
    assert "is a file" in message(directory / "config.json")


def test_no_tokenizer(directory: Path) -> None:
    for file in directory.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer" in message(directory)


def test_pickled_weights_are_never_read(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    CausalLM.load(directory)  # safetensors beside it: fine
    (directory / "model.safetensors").unlink()
    assert "pickled weights only (pytorch_model.bin)" in message(directory)


def test_other_safetensors_do_not_let_a_pickle_in(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    assert "cannot be loaded" in message(directory)


def test_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    assert "no weights" in message(directory)


def test_missing_tensors_are_not_made_up(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert "incomplete" in message(directory)


def test_damaged_files(directory: Path) -> None:
    weights = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "cannot be loaded" in message(directory)
    (directory / "config.json").write_text("{")
    assert "cannot be loaded" in message(directory)


def test_code_of_a_checkpoint_is_not_run(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "own.py").write_text("raise SystemExit('the code was run')\n")
    assert "trust_remote_code=True" in message(directory)


def test_other_kinds_of_model(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "t5", "architectures": ["T5Model"]}))
    assert "not a causal language model" in message(directory)


def test_the_source_is_named_when_the_model_is_refused(directory: Path) -> None:
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["!"] = 41
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = message(directory)
    assert str(directory) in text
    assert "42 entries but the model only 41" in text


def test_a_local_directory_wins_over_the_hub(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory.parent)
    assert is_local("model")
    assert CausalLM.load("model").vocab_size == 41
    assert not is_local("org/model")
    assert all(is_local(source) for source in ("./model", "/model", "~/model", "a/b/c", Path("org/model")))


def test_hub_id_without_network() -> None:
    assert "hub cannot be reached" in message("no-such-org/no-such-model")  # the tests run offline


def test_hub_id_when_the_connection_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class ConnectError(Exception):
        """Stands for the transport's own error, which depends on the HTTP library."""

    def refuse(self: object, source: str, **options: object) -> None:
        raise ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    assert "hub cannot be reached" in message("no-such-org/no-such-model")


def test_hub_repository_with_pickles_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.hf_api import ModelInfo

    info = ModelInfo(id="org/old", siblings=[{"rfilename": "config.json"}, {"rfilename": "pytorch_model.bin"}])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, source, **options: info)
    assert "no safetensors weights" in message("org/old")


def test_progress_bars_are_as_they_were(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    CausalLM.load(directory).save(directory)
    assert logging.is_progress_bar_enabled() == before
    out, err = capfd.readouterr()
    assert "%|" not in out + err
