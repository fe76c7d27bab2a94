"""A checkpoint from elsewhere cannot run code: no pickle is read, no code of its own is run unless asked for."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from leibler.errors import ModelError
from leibler.policy import CausalLM, character_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    tiny_llama(character_tokenizer("0123456789+="), hidden=16, layers=1, heads=2).save(folder)
    return folder


@pytest.fixture
def model(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


class Canary:
    """Whoever unpickles it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def poisoned(path: Path, canary: Path) -> None:
    """A pickle under every form that PyTorch reads: it runs code as soon as it is opened without care."""
    torch.save({"model.embed_tokens.weight": torch.zeros(1), "x": Canary(canary)}, path)


def test_the_canary_sings(tmp_path):
    poisoned(tmp_path / "a.bin", tmp_path / "canary")
    torch.load(tmp_path / "a.bin", weights_only=False)
    assert (tmp_path / "canary").exists()
    pickle.loads(pickle.dumps(Canary(tmp_path / "second")))
    assert (tmp_path / "second").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "consolidated.00.pth"])
def test_pickled_weights_alone_are_refused_with_the_remedy(model, tmp_path, name):
    (model / "model.safetensors").unlink()
    poisoned(model / name, tmp_path / "canary")
    with pytest.raises(ModelError, match=rf"pickled weights only \({name}\).*safe_serialization=True"):
        CausalLM.load(model)
    assert not (tmp_path / "canary").exists()


def test_pickles_beside_safetensors_are_not_touched(model, tmp_path):
    for name in (
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "tokenizer.pkl",
        "adapter_model.bin",
    ):
        poisoned(model / name, tmp_path / "canary")
    CausalLM.load(model)
    assert not (tmp_path / "canary").exists()


def test_a_decoy_of_safetensors_does_not_open_the_pickle(model, tmp_path):
    (model / "model.safetensors").rename(model / "decoy.safetensors")
    poisoned(model / "pytorch_model.bin", tmp_path / "canary")
    with pytest.raises(ModelError):
        CausalLM.load(model)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "shard", ["pytorch_model.bin", "../outside.safetensors", "/etc/passwd", "folder/model.safetensors"]
)
def test_an_index_names_safetensors_beside_it(model, tmp_path, shard):
    weights = load_file(model / "model.safetensors")
    save_file(weights, tmp_path / "outside.safetensors")
    (model / "model.safetensors").rename(model / "decoy.safetensors")
    poisoned(model / "pytorch_model.bin", tmp_path / "canary")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(weights, shard)}))
    with pytest.raises(ModelError, match=r"model.safetensors.index.json names the shard"):
        CausalLM.load(model)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 5000])
def test_a_broken_index_is_refused(model, content):
    (model / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"model.safetensors.index.json"):
        CausalLM.load(model)


def test_an_adapter_inside_a_checkpoint_is_refused(model, tmp_path):
    """Transformers would load it along with the model, from a pickle or over the base that it names."""
    poisoned(model / "adapter_model.bin", tmp_path / "canary")
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(model), "r": 2, "target_modules": ["q_proj"]}
    (model / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="adapter"):
        CausalLM.load(model)
    assert not (tmp_path / "canary").exists()


# ---- code that comes along ---------------------------------------------------------------------------------------


def with_code(model: Path, canary: Path) -> None:
    (model / "modeling_own.py").write_text(
        f"from pathlib import Path\nPath({str(canary)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"},
    }
    (model / "config.json").write_text(json.dumps(config))


def test_code_of_a_checkpoint_runs_only_when_asked_for(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with_code(model, tmp_path / "canary")
    with pytest.raises(ModelError, match="brings code of its own; pass trust_remote_code=True if you trust it"):
        CausalLM.load(model)
    assert not (tmp_path / "canary").exists()
    CausalLM.load(model, trust_remote_code=True)
    assert (tmp_path / "canary").exists(), "the test's own checkpoint does not do what it should"


def test_code_of_a_tokenizer_runs_only_when_asked_for(model, tmp_path):
    (model / "own.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'canary')!r}).touch()\n"
        "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): pass\n"
    )
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        CausalLM.load(model)
    assert not (tmp_path / "canary").exists()


def test_a_chat_template_cannot_reach_python(model, tmp_path):
    """Templates come with tokenizers and are run by Jinja; Transformers runs them in its sandbox."""
    canary = tmp_path / "canary"
    evil = "{{ cycler.__init__.__globals__.os.system('touch " + str(canary) + "') }}"
    loaded = CausalLM.load(model)
    loaded.tokenizer.chat_template = evil
    with pytest.raises(Exception, match=r"unsafe|security|undefined"):
        loaded.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert not canary.exists()
