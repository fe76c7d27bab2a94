"""vLLM's wire formats by a server and an engine of our own, which draw by the sampler here, and fail on demand."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from leibler.divergence import ReverseKL
from leibler.errors import LeiblerError, RunError
from leibler.estimate import K1, K2
from leibler.objective import Clip, GroupNormalised, Match, Objective, PolicyGradient, Ratio, Reference, Reward
from leibler.policy import CausalLM, Lora, character_tokenizer, logprobs, right_pad, sample, tiny_llama, uniforms
from leibler.policy.vllm import InProcess, Server, VllmRollouts, open_rollouts
from leibler.recipes import get
from leibler.train import Data, OnPolicy, Recipe, Score, fit
from leibler.train.options import Options
from leibler.train.rollouts import arrange


class Fake:
    """What a server holds: a model, what it was asked, and how it is to fail."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.asked: list[tuple[str, Any]] = []
        self.failures: list[Any] = []  # of /v1/completions: a status, "broken", "close"; used up one by one
        self.mode = "processed_logprobs"
        self.change = lambda choice: choice
        self.development = True

    def draw(self, settings: dict[str, Any], prompt: list[int]) -> list[dict[str, Any]]:
        # The law of a wrong request must differ: a forgotten stop or a penalty would show.
        assert settings["top_k"] == 0
        assert settings["repetition_penalty"] == 1.0
        assert set(self.model.stop_ids) <= set(settings["stop_token_ids"])
        assert settings["logprobs"] == 0
        numbers = uniforms(settings["seed"], "server", 0, rows=settings["n"], n=settings["max_tokens"])
        out = sample(
            self.model,
            [prompt],
            uniforms=numbers,
            group_size=settings["n"],
            temperature=settings["temperature"],
            top_p=settings["top_p"],
        )
        choices = []
        for number, tokens in enumerate(out.completions()):
            logp = out.logp[number, : len(tokens)].tolist()
            choices.append(
                {
                    "index": number,
                    "text": "",
                    "token_ids": tokens,
                    "logprobs": {"token_logprobs": logp, "tokens": [f"token_id:{t}" for t in tokens]},
                    "finish_reason": "stop" if out.finished[number] else "length",
                }
            )
        return choices

    def load(self, path: str) -> None:
        self.model = CausalLM.load(path)


@pytest.fixture
def student() -> CausalLM:
    return tiny_llama(character_tokenizer("0123456789+="), hidden=16, layers=1, heads=2)


@pytest.fixture
def fake(student: CausalLM):
    state = Fake(student.copy())

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Silent."""

        def answer(self, content: Any, status: int = 200, cut: int = 0) -> None:
            text = b"" if content is None else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text[: len(text) - cut])
            if cut:
                self.close_connection = True

        def do_GET(self) -> None:
            state.asked.append((self.path, None))
            if self.path == "/v1/models":
                self.answer({"object": "list", "data": [{"id": "student", "max_model_len": 256}]})
            elif self.path.startswith("/server_info") and state.development:
                self.answer({"vllm_config": {"model_config": {"logprobs_mode": state.mode}}})
            else:
                self.answer({"detail": "Not Found"}, 404)

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            state.asked.append((self.path, body))
            if self.path == "/v1/completions":
                failure = state.failures.pop(0) if state.failures else None
                if isinstance(failure, int):
                    self.answer({"error": {"message": "the prompt is too long.", "code": failure}}, failure)
                    return
                choices = [state.change(c) for c in state.draw(body, body["prompt"])]
                self.answer({"choices": choices[::-1]}, cut=20 if failure == "broken" else 0)
            elif self.path == "/collective_rpc":
                assert body["method"] == "reload_weights"
                state.load(body["kwargs"]["weights_path"])
                self.answer({"results": [None]})
            elif self.path == "/reset_prefix_cache":
                self.answer(None)
            else:
                self.answer({"detail": "Not Found"}, 404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


PROMPTS = [[1, 5, 6], [1, 7], [1, 8, 9, 10]]


def rollouts_of(fake: Fake, tmp_path: Path, **changes: Any) -> VllmRollouts:
    return VllmRollouts(Server(fake.url, pause=0.001, **changes), tmp_path / "weights")


# -- what comes back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_are_of_the_served_law_with_its_log_probs(fake, student, tmp_path: Path, temperature: float) -> None:
    rollouts = rollouts_of(fake, tmp_path)
    out = rollouts.sample(student, PROMPTS, seeds=[3, 4, 5], max_new_tokens=12, group_size=2, temperature=temperature)
    assert out.tokens.shape[0] == 6
    completions = out.completions()
    assert len({tuple(c) for c in completions}) > 3
    assert out.finished.tolist() == [c[-1] in student.stop_ids for c in completions]
    # Row i continues prompt i // 2: only then do the student's own log-probs agree with those reported.
    pairs = [(PROMPTS[i // 2], c) for i, c in enumerate(completions)]
    tokens, attention, mask = right_pad(pairs)
    with torch.no_grad():
        expected = logprobs(student, tokens, attention, mask, temperature=temperature)
    torch.testing.assert_close(out.logp[out.mask], expected, rtol=1e-4, atol=1e-5)
    assert (out.tokens[~out.mask] == student.pad_id).all()


def test_seeds_decide(fake, student, tmp_path: Path) -> None:
    rollouts = rollouts_of(fake, tmp_path)
    draw = lambda seeds: rollouts.sample(student, PROMPTS, seeds=seeds, max_new_tokens=8, group_size=2)  # noqa: E731
    first = draw([1, 2, 3]).completions()
    body = next(body for path, body in fake.asked if path == "/v1/completions" and body["seed"] == 1)
    assert first[:2] == [c["token_ids"] for c in fake.draw(body, PROMPTS[0])]  # by index, in whatever order they come
    assert draw([1, 2, 3]).completions() == first
    other = draw([9, 2, 3]).completions()
    assert other[:2] != first[:2]
    assert other[2:] == first[2:]


def test_weights_follow_the_student_and_old_files_go(fake, student, tmp_path: Path) -> None:
    rollouts = rollouts_of(fake, tmp_path)
    rollouts.follow(student, 0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.5)
    rollouts.follow(student, 0)  # the same version: nothing is written
    assert [path for path, _ in fake.asked].count("/collective_rpc") == 1
    rollouts.follow(student, 1)
    assert [path for path, _ in fake.asked][-2:] == ["/collective_rpc", "/reset_prefix_cache"]
    weights = [body["kwargs"]["weights_path"] for path, body in fake.asked if path == "/collective_rpc"]
    assert len(set(weights)) == 2  # never the same path twice: an engine may remember what it read there
    assert Path(weights[1]).is_absolute()
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, dict(fake.model.named_parameters())[name])
    assert [p.name for p in (tmp_path / "weights").iterdir()] == ["version-1"]


@pytest.mark.parametrize(("tie", "target"), [(True, "lm_head"), (False, "lm_head"), (True, "q_proj")])
def test_an_adapter_on_a_tied_head_is_refused_before_anything_is_written(
    fake, tmp_path: Path, tie: bool, target: str
) -> None:
    made = tiny_llama(character_tokenizer("0123456789+="), hidden=16, layers=1, heads=2, tie=tie)
    made = made.adapted(Lora(rank=2, targets=(target,)))
    rollouts = rollouts_of(fake, tmp_path)
    if not (tie and target == "lm_head"):
        rollouts.follow(made, 0)
        assert [path for path, _ in fake.asked] == ["/collective_rpc", "/reset_prefix_cache"]
        return
    with pytest.raises(RunError, match="vLLM keeps the tied head of the checkpoint it started from; leave the head"):
        rollouts.follow(made, 0)
    assert not fake.asked
    assert not rollouts.directory.exists()


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def draw(fake: Fake, student: CausalLM, tmp_path: Path, **changes: Any):
    settings = {"seeds": [1], "max_new_tokens": 6, "group_size": 2, **changes}
    return rollouts_of(fake, tmp_path, attempts=3).sample(student, PROMPTS[:1], **settings)


@pytest.mark.parametrize("failures", [[500], [503, "broken"], ["broken", 502]])
def test_what_may_pass_is_tried_again(fake, student, tmp_path: Path, failures: list) -> None:
    expected = draw(fake, student, tmp_path).completions()
    fake.failures = list(failures)
    assert draw(fake, student, tmp_path).completions() == expected
    assert not fake.failures


@pytest.mark.parametrize(
    ("failures", "message"),
    [
        ([500] * 3, "failed with status 500, 3 times in a row"),
        (["broken"] * 3, "broke off in the middle of an answer, 3 times in a row"),
        ([400], "refused /v1/completions with status 400: the prompt is too long"),
    ],
)
def test_what_does_not_pass_is_said_in_a_sentence(fake, student, tmp_path: Path, failures, message: str) -> None:
    fake.failures = [*failures, 500]
    with pytest.raises(RunError, match=message):
        draw(fake, student, tmp_path)
    assert fake.failures == [500]  # no attempt beyond the last


def test_waits_double_and_end(student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("leibler.policy.vllm.time.sleep", waits.append)
    with pytest.raises(RunError, match="4 times in a row"):
        Server("http://127.0.0.1:9", attempts=4, pause=0.5).check(1.0, None)
    assert waits == [0.5, 1.0, 2.0]


def test_nobody_there(student, tmp_path: Path) -> None:
    rollouts = VllmRollouts(Server("http://127.0.0.1:9", attempts=2, pause=0.001), tmp_path)
    with pytest.raises(RunError, match=r"cannot be reached \(.*\), 2 times in a row.*vllm serve"):
        rollouts.sample(student, PROMPTS, seeds=[0, 1, 2], max_new_tokens=4)


def without(*keys: str):
    def change(choice: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in choice.items() if key not in keys}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("logprobs"), "left out log-probs"),
        (lambda c: {**c, "logprobs": {"token_logprobs": c["logprobs"]["token_logprobs"][:-1]}}, "left out log-probs"),
        (lambda c: {**c, "logprobs": {"token_logprobs": [None] * len(c["token_ids"])}}, "left out log-probs"),
        (without("token_ids"), "gives no token ids"),
        (lambda c: {**c, "token_ids": [999], "logprobs": {"token_logprobs": [-1.0]}}, "drew token 999"),
        (lambda c: {**c, "token_ids": [], "logprobs": {"token_logprobs": []}}, "empty completion"),
        (
            lambda c: {**c, "token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "stop"},
            "--generation-config vllm",
        ),
    ],
)
def test_answers_that_cannot_be_used(fake, student, tmp_path: Path, change, message: str) -> None:
    fake.change = change
    with pytest.raises(RunError, match=message):
        draw(fake, student, tmp_path)


def test_servers_that_cannot_serve(fake, student, tmp_path: Path) -> None:
    fake.mode = "raw_logprobs"
    draw(fake, student, tmp_path)  # at temperature 1 both are the same
    for changes in ({"temperature": 0.5}, {"top_p": 0.9}):
        with pytest.raises(RunError, match="--logprobs-mode processed_logprobs"):
            draw(fake, student, tmp_path, **changes)
    fake.development = False
    with pytest.raises(RunError, match=r"has no /server_info; start it with: VLLM_SERVER_DEV_MODE=1"):
        draw(fake, student, tmp_path)


@pytest.mark.parametrize("spec", ["sglang", "vllm:localhost:8000", "vllm:"])
def test_other_words(spec: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="rollouts=vllm:http://HOST:PORT"):
        open_rollouts(spec, "student", tmp_path)


# -- in process --------------------------------------------------------------------------------------------------------


def test_without_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RunError, match=r"leibler\[vllm\]"):
        open_rollouts("vllm", "student", tmp_path)


def test_the_offline_engine(student: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`vllm.LLM` as far as it is used, with a model of ours inside."""
    made: dict[str, Any] = {}

    class LLM:
        def __init__(self, model: str, **options: Any) -> None:
            made.update(options, model=model)
            made["fake"] = self.fake = Fake(CausalLM.load(model))

        def generate(self, prompts: list, params: list, use_tqdm: bool = True) -> list:
            assert not use_tqdm
            made["settings"] = params[0]
            return [self.output(p["prompt_token_ids"], s) for p, s in zip(prompts, params, strict=True)]

        def output(self, prompt: list[int], settings: dict[str, Any]) -> types.SimpleNamespace:
            outputs = [
                types.SimpleNamespace(
                    index=c["index"],
                    token_ids=c["token_ids"],
                    finish_reason=c["finish_reason"],
                    logprobs=[
                        {t: types.SimpleNamespace(logprob=lp), 0: types.SimpleNamespace(logprob=-99.0)}
                        for t, lp in zip(c["token_ids"], c["logprobs"]["token_logprobs"], strict=True)
                    ],
                )
                for c in self.fake.draw(settings, prompt)
            ]
            return types.SimpleNamespace(outputs=outputs[::-1])

        def collective_rpc(self, method: str, kwargs: dict[str, str]) -> None:
            made[method] = kwargs["weights_path"]
            self.fake.load(kwargs["weights_path"])

        def reset_prefix_cache(self) -> None:
            made["reset"] = True

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    student.save(tmp_path / "student")
    rollouts = open_rollouts("vllm", str(tmp_path / "student"), tmp_path / "weights")
    assert isinstance(rollouts.engine, InProcess)
    assert made["logprobs_mode"] == "processed_logprobs"
    with torch.no_grad():
        student.head()[0].mul_(2.0)
    rollouts.follow(student, 1)
    assert made["reset"]
    out = rollouts.sample(student, PROMPTS, seeds=[1, 2, 3], max_new_tokens=5, group_size=2, temperature=0.8)
    settings = {**made["settings"], "seed": 1}
    assert out.completions()[:2] == [c["token_ids"] for c in made["fake"].draw(settings, PROMPTS[0])]
    tokens, attention, mask = right_pad([(PROMPTS[i // 2], c) for i, c in enumerate(out.completions())])
    with torch.no_grad():
        expected = logprobs(student, tokens, attention, mask, temperature=0.8)
    torch.testing.assert_close(out.logp[out.mask], expected, rtol=1e-4, atol=1e-5)


# -- in a run ----------------------------------------------------------------------------------------------------------


PLUS = [{"prompt": f"{a}+1=", "completion": "2"} for a in range(8)]
LENGTHS = Score(lambda records, responses: [float(len(text) % 3) for text in responses])


def test_a_run_samples_from_the_server(fake, student, tmp_path: Path) -> None:
    recipe = Recipe(
        OnPolicy(group_size=4) >> LENGTHS, Objective(PolicyGradient(Reward() >> GroupNormalised(), Ratio()))
    )
    run = fit(
        recipe, student=student, data=PLUS, out=tmp_path / "run", quiet=True, steps=3, batch_size=8,
        max_new_tokens=4, rollouts=f"vllm:{fake.url}", learning_rate=1e-2,
    )  # fmt: skip
    asked = [path for path, _ in fake.asked]
    assert asked.count("/collective_rpc") == 3  # the weights of each step
    seeds = [body["seed"] for path, body in fake.asked if path == "/v1/completions"]
    assert len(set(seeds)) == len(seeds)
    assert max(seeds) < 2**48
    # What the last step sampled from is what it stood at before, not the model that the server began with.
    served = dict(fake.model.named_parameters())
    assert any(not torch.equal(p, served[n]) for n, p in run.policy.named_parameters())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert not (tmp_path / "run" / "rollouts").exists()


def test_the_law_of_another_engine_is_weighted_for(tmp_path: Path) -> None:
    advantage = Reward() >> GroupNormalised()
    both = Objective(PolicyGradient(advantage, Clip(0.2)), Match(ReverseKL(), to=Reference(), estimator=K2()))
    here = Recipe(OnPolicy(group_size=2), both)
    there = Recipe(OnPolicy(group_size=2), both, elsewhere=True)
    gradient, match = there.objective.terms
    needs = {str(need) for term in (gradient, match) for need in term.needs()}
    assert here.objective.terms[0].weight == 1.0
    assert "behaviour" in str(gradient.weight)
    assert match.sampled_from == "behaviour"
    assert match.behaviour.name == "behaviour"
    assert any("behaviour" in need for need in needs)
    # Asked for twice, it is done once; and a recipe made here can be moved.
    assert dataclasses.replace(there, elsewhere=True).objective == there.objective
    assert dataclasses.replace(here, elsewhere=True).objective == there.objective


def test_weights_are_of_the_law_that_is_reported(fake, student, tmp_path: Path) -> None:
    def gradient(name: str, change) -> torch.Tensor:
        fake.change = change
        copy = student.copy().requires_grad_(True)
        recipe = Recipe(OnPolicy(group_size=4) >> LENGTHS, Objective(PolicyGradient(Reward(), Ratio())))
        fit(
            recipe, student=copy, data=PLUS, out=tmp_path / name, quiet=True, steps=1, batch_size=8,
            max_new_tokens=3, rollouts=f"vllm:{fake.url}", max_grad_norm=1e9,
        )  # fmt: skip
        return torch.cat([p.grad.flatten() for p in copy.parameters()])

    def louder(choice: dict[str, Any]) -> dict[str, Any]:
        return {**choice, "logprobs": {"token_logprobs": [lp + 0.5 for lp in choice["logprobs"]["token_logprobs"]]}}

    plain, shifted = gradient("plain", lambda choice: choice), gradient("shifted", louder)
    assert plain.abs().max() > 1e-3
    # Every token is reported as exp(0.5) times as likely as it is for the policy.
    torch.testing.assert_close(shifted, plain * torch.tensor(-0.5).exp(), rtol=1e-3, atol=1e-6)


def test_runs_that_cannot_use_it(fake, student, tmp_path: Path) -> None:
    options = Options(rollouts=f"vllm:{fake.url}")
    with pytest.raises(RunError, match="samples no responses of the policy"):
        arrange(Recipe(Data(), get("sft").objective), options, student, tmp_path, 1)
    with pytest.raises(RunError, match="one process, not 2"):
        arrange(get("grpo"), options, student, tmp_path, 2)
    whole = Objective(Match(ReverseKL(), to=Reference(), estimator=K1(), credit="sequence"))
    with pytest.raises(LeiblerError, match="leave out rollouts="):
        arrange(Recipe(OnPolicy(), whole), options, student, tmp_path, 1)
    assert arrange(get("grpo"), Options(), student, tmp_path, 2)[1] is None
