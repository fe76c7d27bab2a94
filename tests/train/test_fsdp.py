"""Weights shared out between two processes (FSDP2): the same runs, checkpoints that any number of processes can use."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from leibler import configs
from leibler.errors import RunError
from leibler.policy import CausalLM
from leibler.train import fit
from train.equal_runs import RECIPES, differences, go
from train.launching import SHARDED, TESTS, finish, started, workers
from train.running import RECORDS, recipe, run, student

EQUAL_RUNS = [sys.executable, str(TESTS / "train" / "equal_runs.py")]

SHARES = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from leibler.policy import sample
from leibler.policy.randomness import uniforms
from leibler.train import Options
from leibler.train.processes import Processes, leave
from leibler.train.sharding import Sharding, blank, fill, full, is_share, put_weights, weights
from train.running import student

p = Processes.start(Options(), Path("."))
cut = Processes(p.accelerator, Sharding())
seen = {}
for tie in (True, False):
    plain = student(dropout=0.0)
    if not tie:
        head = plain.causal.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone() * 2)
        plain.causal.config.tie_word_embeddings = False
    before = {n: t.detach().clone() for n, t in plain.state_dict().items()}
    prompts = [plain.encode_prompt("1+1=")] * (1 + p.rank)
    numbers = uniforms(5, "rollout", p.rank, rows=1 + p.rank, n=6)      # the second process samples more
    expected = sample(plain, prompts, uniforms=numbers).tokens
    empty = blank(plain)
    cut.place([plain], [])
    found = {"shares": all(is_share(q) for q in plain.parameters())}
    with cut.whole(plain):
        found["sampled"] = bool(torch.equal(sample(plain, prompts, uniforms=numbers).tokens, expected))
    found["shares again"] = all(is_share(q) for q in plain.parameters())
    held = weights(plain)
    found["weights"] = all(torch.equal(held[n], before[n]) for n in held)
    twice = {n: 2 * t for n, t in held.items()}
    found["missing"] = put_weights(plain, {n: t for n, t in twice.items() if "norm" not in n})
    found["put"] = all(torch.equal(t, (1 if "norm" in n else 2) * held[n]) for n, t in weights(plain).items())
    whole = fill(empty, plain)
    found["filled"] = p.rank != 0 or (not is_share(whole.head()[0]) and bool(
        torch.equal(whole.head()[0], full(plain.head()[0]))))
    if p.rank != 0:
        full(plain.head()[0])
    seen[str(tie)] = found
Path(sys.argv[1] + str(p.rank)).write_text(json.dumps(seen))
leave()
"""


@pytest.mark.slow
def test_shares(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SHARES)
    with workers([sys.executable, str(script), str(tmp_path / "seen-")], tmp_path / "said") as both:
        assert finish(both) == [0, 0], both[0].text + both[1].text
    for rank in (0, 1):
        for tie, found in json.loads((tmp_path / f"seen-{rank}").read_text()).items():
            missing = found.pop("missing")
            assert len(missing) == 3, missing
            assert all("norm" in name for name in missing)
            assert all(found.values()), (rank, tie, found)


@pytest.mark.slow
def test_sharded_runs_are_the_same_runs(tmp_path):
    with workers([*EQUAL_RUNS, str(tmp_path / "2"), *RECIPES], tmp_path / "said", **SHARDED) as both:
        for slug in RECIPES:
            go(tmp_path / "1", slug)
        assert finish(both) == [0, 0], both[0].text[-3000:] + both[1].text[-3000:]
    for slug in RECIPES:
        compared, found = differences(tmp_path / "1" / slug, tmp_path / "2" / slug)
        assert compared >= 5
        assert not found
        one, two = (CausalLM.load(tmp_path / n / slug / "final") for n in ("1", "2"))
        for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=f"{slug}: {name}")
        # What is written does not show how many wrote it.
        files = [{p.name for p in (tmp_path / n / slug).rglob("*")} for n in ("1", "2")]
        assert files[0] == files[1]


def back_to(out: Path, step: int) -> None:
    """The run as it was when the checkpoint of a step was its newest."""
    shutil.rmtree(out / "final")
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


RESUME = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from train.equal_runs import go
go(Path(sys.argv[1]), sys.argv[2], resume=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("slug", ["kdrl", "ppo"])
def test_one_process_goes_on_where_two_stopped_and_the_other_way_round(tmp_path, slug):
    go(tmp_path / "1", slug)
    shutil.copytree(tmp_path / "1", tmp_path / "1 then 2")
    back_to(tmp_path / "1 then 2" / slug, 2)
    script = tmp_path / "resume.py"
    script.write_text(RESUME)
    command = [sys.executable, str(script), str(tmp_path / "1 then 2"), slug]
    with workers(command, tmp_path / "said", **SHARDED) as both:
        assert finish(both) == [0, 0], both[0].text + both[1].text
    compared, found = differences(tmp_path / "1" / slug, tmp_path / "1 then 2" / slug)
    assert compared >= 5
    assert not found
    back_to(tmp_path / "1 then 2" / slug, 4)
    go(tmp_path / "1 then 2", slug, resume=True)
    compared, found = differences(tmp_path / "1" / slug, tmp_path / "1 then 2" / slug)
    assert compared >= 5
    assert not found


ADAPTED = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from train.test_fsdp import adapted
adapted(Path(sys.argv[1]))
"""


def adapted(out: Path) -> None:
    run(recipe("kd"), out, student=student(dropout=0.0), steps=3, batch_size=6, adapter_rank=2, save_every=2)


@pytest.mark.slow
def test_an_adapter_and_recomputed_activations(tmp_path):
    script = tmp_path / "adapted.py"
    script.write_text(ADAPTED)
    env = {**SHARDED, "FSDP_ACTIVATION_CHECKPOINTING": "true", "FSDP_RESHARD_AFTER_FORWARD": "false"}
    with workers([sys.executable, str(script), str(tmp_path / "two")], tmp_path / "said", **env) as both:
        adapted(tmp_path / "one")
        assert finish(both) == [0, 0], both[0].text[-3000:] + both[1].text[-3000:]
    compared, found = differences(tmp_path / "one", tmp_path / "two")
    assert compared == 3
    assert not found
    one, two = (CausalLM.load(tmp_path / n / "final") for n in ("one", "two"))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "two" / "final" / "adapter" / "adapter_model.safetensors").exists()


# ---- what Accelerate's settings may say ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FSDP_VERSION": "1"}, "set fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "set fsdp_offload_params: false"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "with the configuration fsdp2"),
    ],
)
def test_settings_that_cannot_be_followed(tmp_path, monkeypatch, settings, message):
    for name, value in {**SHARDED, **settings}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=message):
        fit("sft", student=student(), data=RECORDS, out=tmp_path / "run", quiet=True)


def launch_options() -> dict[str, Any]:
    """The options of ``accelerate launch`` by name, with what parses each."""
    from accelerate.commands.launch import launch_command_parser

    return {action.dest: action for action in launch_command_parser()._actions}


@pytest.mark.parametrize("name", configs.names())
def test_a_shipped_configuration_is_one_of_accelerate(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = configs.path(name)
    loaded = load_config_from_file(str(path))  # refuses unknown keys
    written = yaml.safe_load(path.read_text())
    options = launch_options()
    assert loaded.num_processes > 1
    assert loaded.mixed_precision == "no"
    assert loaded.use_cpu == name.endswith("_cpu")
    assert loaded.distributed_type.value == ("FSDP" if "fsdp" in name else "MULTI_GPU")
    assert f"leibler config {name}" in path.read_text()
    for key, value in (written.get("fsdp_config") or {}).items():
        # Accelerate copies these into options of its launcher, and ignores those it does not know.
        assert key in options, key
        kind = options[key].type
        assert isinstance(value, bool) if str(options[key].default) in ("true", "false") else True, key
        assert kind is None or kind(str(value)) is not None


def test_the_settings_that_a_sharded_configuration_makes():
    said = yaml.safe_load(configs.path("fsdp2").read_text())
    small = yaml.safe_load(configs.path("fsdp2_cpu").read_text())
    assert said["fsdp_config"] == small["fsdp_config"]
    assert said["fsdp_config"]["fsdp_version"] == 2
    assert said["fsdp_config"]["fsdp_cpu_ram_efficient_loading"] is False
    with pytest.raises(RunError, match="did you mean fsdp2"):
        configs.path("fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp_cpu", "fsdp2_cpu"])
def test_a_shipped_configuration_runs(tmp_path, name):
    student(dropout=0.0).save(tmp_path / "student")
    student(1, dropout=0.0).save(tmp_path / "teacher")
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    train = [
        "-m", "leibler", "train", "gkd", f"student={tmp_path / 'student'}", f"teacher={tmp_path / 'teacher'}",
        f"data={tmp_path / 'records.jsonl'}", "steps=3", "batch_size=6", "max_new_tokens=4", "learning_rate=0.01",
    ]  # fmt: skip
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configs.path(name))]
    with started([*launch, "--main_process_port", "0", *train, f"out={tmp_path / 'two'}"], tmp_path) as launcher:
        assert launcher.wait() == 0, launcher.text
        assert launcher.text.count("the trained model") == 1
    with started([sys.executable, *train, f"out={tmp_path / 'one'}"], tmp_path) as alone:
        assert alone.wait() == 0, alone.text
    compared, found = differences(tmp_path / "one", tmp_path / "two")
    assert compared == 3
    assert not found
    whole = CausalLM.load(tmp_path / "two" / "final")
    for a, b in zip(whole.parameters(), CausalLM.load(tmp_path / "one" / "final").parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
