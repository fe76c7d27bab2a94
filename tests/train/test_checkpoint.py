"""Checkpoints: whole or not loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from leibler.errors import RunError
from leibler.train import checkpoint
from train.conformance import tiny


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = nn.Linear(3, 2)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(
        [{"params": [module.weight], "scale": 1.0}, {"params": [module.bias], "scale": 0.5}], lr=0.1, betas=(0.8, 0.95)
    )
    for _ in range(3):
        module(torch.ones(3)).square().sum().backward()
        optimizer.step()
    return module, optimizer


def write(folder: Path, step: int, seed: int = 0, keep: int = 2) -> Path:
    module, optimizer = trained(seed)
    return checkpoint.save(folder, step, {"policy": module}, optimizer, {"draw": step * 2}, keep)


def test_everything_comes_back(tmp_path):
    module, optimizer = trained(0)
    path = checkpoint.save(tmp_path, 7, {"policy": module}, optimizer, {"draw": 3, "source": {"phi": 0.1}})
    other, their = trained(1)
    state = checkpoint.load(path, {"policy": other}, their)
    assert (state["step"], state["draw"], state["source"]) == (7, 3, {"phi": 0.1})
    for optimiser, net in ((optimizer, module), (their, other)):
        net.zero_grad()
        net(torch.ones(3)).sum().backward()
        optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    assert their.param_groups[0]["betas"] == (0.8, 0.95)
    assert their.param_groups[1]["scale"] == 0.5


def test_the_settings_of_the_run_that_goes_on_hold(tmp_path):
    """The slots are those of the checkpoint; rates and betas are not taken from there."""
    module, optimizer = trained(0)
    path = checkpoint.save(tmp_path, 7, {"policy": module}, optimizer, {})
    other, their = trained(1)
    for group in their.param_groups:
        group.update(betas=(0.5, 0.6), weight_decay=0.25, scale=2.0)
    checkpoint.load(path, {"policy": other}, their)
    assert [(g["betas"], g["weight_decay"], g["scale"]) for g in their.param_groups] == [((0.5, 0.6), 0.25, 2.0)] * 2
    assert torch.equal(their.state[other.weight]["exp_avg"], optimizer.state[module.weight]["exp_avg"])


def test_only_the_process_that_writes_keeps_whole_tensors():
    _, optimizer = trained(0)
    assert checkpoint._flatten(optimizer, keep=False) == {}
    assert checkpoint._flatten(optimizer).keys() == {
        f"{i}.{k}" for i in (0, 1) for k in ("step", "exp_avg", "exp_avg_sq")
    }


def test_tied_weights_are_written_once_and_come_back_tied(tmp_path):
    model = tiny(0)
    optimizer = torch.optim.AdamW(model.parameters())
    path = checkpoint.save(tmp_path, 1, {"policy": model}, optimizer, {})
    other = tiny(2)
    checkpoint.load(path, {"policy": other}, torch.optim.AdamW(other.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert other.head()[0] is other.causal.get_input_embeddings().weight


def test_only_the_newest_stay(tmp_path):
    for step in (5, 10, 15, 20):
        write(tmp_path, step, keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000015", "step-00000020"]


def damage(path: Path, how: str) -> None:
    if how == "torn":
        file = path / "optimizer.safetensors"
        file.write_bytes(file.read_bytes()[:-5])
    elif how == "altered":
        file = path / "policy.safetensors"
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(bytes(raw))
    elif how == "missing":
        (path / "state.json").unlink()
    elif how == "no manifest":
        (path / checkpoint.MANIFEST).unlink()
    else:
        (path / checkpoint.MANIFEST).write_text(how)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("torn", "has an altered optimizer.safetensors"),
        ("altered", "has an altered policy.safetensors"),
        ("missing", "lacks state.json"),
        ("no manifest", "has no readable manifest"),
        ("{}", "has no readable manifest"),
        ("[1]", "has no readable manifest"),
        ('{"files": {', "has no readable manifest"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path, how, said):
    older, newest = write(tmp_path, 5), write(tmp_path, 10)
    assert checkpoint.latest(tmp_path) == (newest, [])
    damage(newest, how)
    path, complaints = checkpoint.latest(tmp_path)
    assert path == older
    assert complaints == [f"the checkpoint {newest} {said} and was passed over"]
    damage(older, how)
    path, complaints = checkpoint.latest(tmp_path)
    assert path is None
    assert len(complaints) == 2


def test_no_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path / "none") == (None, [])


def test_a_half_written_checkpoint_is_none(tmp_path):
    older = write(tmp_path, 5)
    (tmp_path / ".writing-00000010").mkdir()
    assert checkpoint.latest(tmp_path) == (older, [])
    newest = write(tmp_path, 10)
    assert checkpoint.latest(tmp_path) == (newest, [])
    assert write(tmp_path, 10, seed=1) == newest


def test_a_model_that_the_checkpoint_lacks(tmp_path):
    path = write(tmp_path, 5)
    module, optimizer = trained(0)
    with pytest.raises(RunError, match="has no weights for 'critic'; resume with the recipe it was made by"):
        checkpoint.load(path, {"policy": module, "critic": nn.Linear(1, 1)}, optimizer)


def test_the_manifest_names_every_file(tmp_path):
    path = write(tmp_path, 5)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    assert set(manifest["files"]) == {p.name for p in path.iterdir()} - {checkpoint.MANIFEST}
    assert manifest["step"] == 5


def test_another_version_of_the_format_is_refused(tmp_path):
    path = write(tmp_path, 5)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    for version in (checkpoint.VERSION - 1, checkpoint.VERSION + 1):
        (path / checkpoint.MANIFEST).write_text(json.dumps({**manifest, "version": version}))
        told = f"has the format {version}, and this version of leibler reads {checkpoint.VERSION}; go on with"
        with pytest.raises(RunError, match=told):
            checkpoint.latest(tmp_path)


@pytest.mark.parametrize("files", [{}, {"state.json": ""}, {"../outside": ""}])
def test_a_manifest_that_names_too_little_or_too_much(tmp_path, files):
    path = write(tmp_path, 5)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    named = manifest["files"] | files if "../outside" in files else files
    (path / checkpoint.MANIFEST).write_text(json.dumps({**manifest, "files": named}))
    found, (complaint,) = checkpoint.latest(tmp_path)
    assert found is None
    assert ("lacks ../outside" if "../outside" in files else "names too few files") in complaint


def test_tensors_in_a_state_stay_tensors(tmp_path):
    module, optimizer = trained(0)
    state = {
        "source": {
            "buffer": {"tokens": torch.arange(6).view(2, 3)[:, ::2], "mask": torch.tensor([True]), "none": None}
        },
        "signals": [{"x": torch.tensor(0.1, dtype=torch.float64)}, (1, 2)],
        "text": "tensor:no such thing",
    }
    path = checkpoint.save(tmp_path, 1, {"policy": module}, optimizer, state)
    back = checkpoint.load(path, {"policy": module}, optimizer)
    assert torch.equal(back["source"]["buffer"]["tokens"], torch.tensor([[0, 2], [3, 5]]))
    assert back["source"]["buffer"]["mask"].dtype == torch.bool
    assert back["source"]["buffer"]["none"] is None
    assert back["signals"][0]["x"].dtype == torch.float64
    assert back["signals"][1] == [1, 2]
    assert back["text"] == "tensor:no such thing"
    with pytest.raises(RunError, match="the state /source has keys that are not text; JSON would change them"):
        checkpoint.save(tmp_path, 2, {"policy": module}, optimizer, {"source": {1: 2}})
    assert checkpoint.latest(tmp_path)[0] == path


def test_what_a_killed_save_left_is_swept_away(tmp_path):
    (tmp_path / ".writing-step-00000010").mkdir()
    (tmp_path / ".writing-step-00000010" / "policy.safetensors").write_text("half")
    (tmp_path / ".removing-step-00000001").mkdir()
    path = write(tmp_path, 5)
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoints_of_steps_that_are_done_again_push_out_nothing(tmp_path):
    """With one kept, a spoilt newer one must not count as the one."""
    write(tmp_path, 5)
    damage(write(tmp_path, 15, keep=9), "torn")
    newest = write(tmp_path, 10, keep=1)
    assert checkpoint.latest(tmp_path) == (newest, [])
    assert list(tmp_path.iterdir()) == [newest]
