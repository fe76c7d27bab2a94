"""Rollouts by vLLM: a server or an engine in this process, behind the same `Samples` as the sampler here.

Start a server that lets weights be replaced and reports what it sampled from, then name it::

    VLLM_SERVER_DEV_MODE=1 vllm serve STUDENT_DIR --logprobs-mode processed_logprobs
    leibler train grpo ... rollouts=vllm:http://localhost:8000      # or rollouts=vllm: an engine in this process

Before a draw, weights that changed are written as a checkpoint below the run directory (which a server must see under
the same path) and loaded by vLLM's ``reload_weights``; its prefix cache, computed with the old ones, is dropped. Every
time the directory is a new one, since vLLM has been seen to read a path that it knew from memory.

Another engine computes in another order and often in bfloat16, so its law is not the policy's to the last bits: the
log-probs that it reports are the behaviour's, and a run weights its sampled terms by them (`Recipe.elsewhere`).

What has been exercised: requests, answers, seeds, weights and every failure below against a server and an engine made
for the tests that speak vLLM's formats; nothing of this on a GPU with vLLM itself.
"""

from __future__ import annotations

import http.client
import json
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from leibler.errors import RunError
from leibler.policy.adapters import adapts_tied_head
from leibler.policy.model import CausalLM
from leibler.policy.sampler import Samples

_NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Sent with every request: a checkpoint's generation settings would otherwise change the law that is sampled from."""
_SERVE = "VLLM_SERVER_DEV_MODE=1 vllm serve STUDENT --logprobs-mode processed_logprobs"


@dataclass(frozen=True)
class Completion:
    """What an engine says of one completion: its tokens, their log-probs (nats), whether it stopped by itself."""

    tokens: tuple[int, ...]
    logp: tuple[float, ...]
    finished: bool


class Engine(Protocol):
    """vLLM as it is reached: over HTTP or in this process."""

    def check(self, temperature: float, top_p: float | None) -> None:
        """Raise a ``RunError`` if it cannot serve at these settings."""
        ...

    def complete(self, prompts: Sequence[Sequence[int]], settings: Sequence[Mapping[str, Any]]) -> list[Completion]:
        """The completions of all prompts, ``n`` of each, prompt by prompt."""
        ...

    def load(self, checkpoint: Path) -> None:
        """Take the weights of a checkpoint from now on."""
        ...


@dataclass
class VllmRollouts:
    """Completions from vLLM that follow a model being trained.

    Args:
        engine: `Server` or `InProcess`.
        directory: where weights are written for the engine to read.

    Examples:
        A run makes its own (``rollouts=vllm:http://localhost:8000``); nothing is asked of the server before a draw.

        >>> rollouts = VllmRollouts(Server("http://localhost:8000"), Path("weights"))
        >>> rollouts.version is None
        True
    """

    engine: Engine
    directory: Path
    version: int | None = field(default=None, init=False)

    def follow(self, model: CausalLM, version: int) -> None:
        """Give the engine the weights of ``model``, unless it has this version of them.

        Raises:
            RunError: they cannot be given: an adapter on a tied head, which merged is a head of its own.
        """
        if version == self.version:
            return
        if adapts_tied_head(model.causal):
            raise RunError(
                "vLLM keeps the tied head of the checkpoint it started from; leave the head out of the adapter's "
                "targets, or sample here."
            )
        new = self.directory / f"version-{version}"
        model.save(new)
        self.engine.load(new.resolve())
        for old in self.directory.glob("version-*"):
            if old != new:
                shutil.rmtree(old)
        self.version = version

    def close(self) -> None:
        """Remove the weights that were written; the engine keeps what it read."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.version = None

    def sample(
        self,
        model: CausalLM,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float | None = None,
        group_size: int = 1,
        limits: Sequence[int] | None = None,
    ) -> Samples:
        """``group_size`` completions of each prompt, as `leibler.policy.sample` gives them.

        Args:
            model: says which tokens stop and pad, and how many there are.
            prompts: token ids.
            seeds: one number per prompt, below 2^48; the completions of a prompt are numbered from it by vLLM.
            max_new_tokens, temperature, top_p, group_size, limits: as for `leibler.policy.sample`.

        Raises:
            RunError: the engine cannot be reached, refuses, or answers with something that cannot be used.
        """
        self.engine.check(temperature, top_p)
        settings = [
            {
                **_NEUTRAL,
                "n": group_size,
                "seed": seed,
                "temperature": temperature,
                "top_p": 1.0 if top_p is None else top_p,
                "max_tokens": most,
                "stop_token_ids": list(model.stop_ids),
                "logprobs": 0,
            }
            for seed, most in zip(seeds, limits or [max_new_tokens] * len(seeds), strict=True)
        ]
        completions = self.engine.complete(prompts, settings)
        longest = max((len(c.tokens) for c in completions), default=0)
        tokens = torch.full((len(completions), longest), model.pad_id, dtype=torch.long)
        mask = torch.zeros(len(completions), longest, dtype=torch.bool)
        logp = torch.zeros(len(completions), longest)
        for row, completion in enumerate(completions):
            _usable(completion, model)
            length = len(completion.tokens)
            tokens[row, :length], logp[row, :length] = torch.tensor(completion.tokens), torch.tensor(completion.logp)
            mask[row, :length] = True
        finished = torch.tensor([c.finished for c in completions], dtype=torch.bool)
        return Samples(*(x.to(model.device) for x in (tokens, mask, logp, finished)))


def _usable(completion: Completion, model: CausalLM) -> None:
    if not completion.tokens:
        raise RunError("vLLM answered with an empty completion; look for the reason in its log.")
    if max(completion.tokens) >= model.vocab_size:
        raise RunError(
            f"vLLM drew token {max(completion.tokens)}, which the student's tokenizer does not have; serve the student "
            "itself, so that both have one vocabulary."
        )
    if completion.finished and completion.tokens[-1] not in model.stop_ids:
        raise RunError(
            f"vLLM ended a completion at token {completion.tokens[-1]}, which does not end one for the student; start "
            "the server with --generation-config vllm."
        )


def open_rollouts(spec: str, student: str, directory: Path) -> VllmRollouts:
    """What an option ``rollouts=`` names: ``vllm`` (an engine in this process) or ``vllm:URL`` (a server).

    Args:
        spec: the option.
        student: the checkpoint or hub id that an engine here starts from.
        directory: where weights are written.

    Raises:
        RunError: another word, no such server, or vLLM is not installed.
    """
    kind, colon, url = spec.partition(":")
    if kind != "vllm" or (colon and not url.startswith(("http://", "https://"))):
        raise RunError(f"rollouts={spec} is not known; write rollouts=vllm, or rollouts=vllm:http://HOST:PORT.")
    return VllmRollouts(Server(url.rstrip("/")) if colon else InProcess(student), directory)


# ---- over HTTP -------------------------------------------------------------------------------------------------------


@dataclass
class Server:
    """A server started by ``vllm serve`` in development mode, which is what lets weights be replaced.

    Calls ``/v1/models``, ``/server_info``, ``/v1/completions`` (token ids in and out), ``/collective_rpc`` with
    ``reload_weights``, and ``/reset_prefix_cache``.

    Args:
        url: without a path, such as ``http://localhost:8000``.
        attempts: how often a request is tried when the server cannot be reached, fails or breaks off.
        pause: seconds before the second attempt; twice as many before each further one.
        timeout: seconds to wait for an answer.
        parallel: requests under way at a time; vLLM batches them.
    """

    url: str
    attempts: int = 5
    pause: float = 1.0
    timeout: float = 600.0
    parallel: int = 64
    _model: str | None = field(default=None, init=False)
    _processed: bool = field(default=False, init=False)

    def check(self, temperature: float, top_p: float | None) -> None:
        if self._model is None:
            found = self._ask("GET", "/v1/models")
            self._model = str(_entry(found, "/v1/models", "data", 0, "id"))
            info = self._ask("GET", "/server_info?config_format=json")
            mode = _entry(info, "/server_info", "vllm_config", "model_config", "logprobs_mode")
            self._processed = mode == "processed_logprobs"
        if not self._processed and (temperature != 1.0 or top_p not in (None, 1.0)):
            raise RunError(
                f"The vLLM server at {self.url} reports log-probs before temperature and top_p; start it with "
                "--logprobs-mode processed_logprobs."
            )

    def complete(self, prompts: Sequence[Sequence[int]], settings: Sequence[Mapping[str, Any]]) -> list[Completion]:
        def one(prompt: Sequence[int], setting: Mapping[str, Any]) -> list[Completion]:
            body = {"model": self._model, "prompt": list(prompt), "return_token_ids": True, **setting}
            answer = self._ask("POST", "/v1/completions", body)
            choices = _entry(answer, "/v1/completions", "choices")
            if len(choices) != setting["n"]:
                raise RunError(
                    f"The vLLM server at {self.url} gave {len(choices)} completions instead of {setting['n']}; "
                    "look for the reason in its log."
                )
            return [self._completion(c) for c in sorted(choices, key=lambda c: int(c.get("index", 0)))]

        pool = ThreadPoolExecutor(max(1, min(self.parallel, len(prompts))))
        try:
            return [c for part in pool.map(one, prompts, settings) for c in part]
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure or Ctrl-C, what has not begun need not

    def load(self, checkpoint: Path) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(checkpoint)}}
        self._ask("POST", "/collective_rpc", body)
        self._ask("POST", "/reset_prefix_cache")

    def _completion(self, choice: Mapping[str, Any]) -> Completion:
        tokens, logp = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if tokens is None:
            raise RunError(f"The vLLM server at {self.url} gives no token ids; it needs vLLM 0.18 or newer.")
        if logp is None or len(logp) != len(tokens) or any(value is None for value in logp):
            raise RunError(
                f"The vLLM server at {self.url} left out log-probs of sampled tokens, which weight its samples; start "
                f"it with: {_SERVE}."
            )
        return Completion(tuple(tokens), tuple(map(float, logp)), choice.get("finish_reason") == "stop")

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        """One request, tried again when it could succeed the next time; the answer's JSON, None for an empty one."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        why = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            request = urllib.request.Request(self.url + path, data, headers, method=method)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    text = response.read()
                return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                if error.code < 500:
                    raise RunError(self._refused(path, error)) from error
                why = f"failed with status {error.code}"
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                why = f"cannot be reached ({getattr(error, 'reason', error)})"
            except (http.client.HTTPException, json.JSONDecodeError):
                why = "broke off in the middle of an answer"
        raise RunError(
            f"The vLLM server at {self.url} {why}, {self.attempts} times in a row, asked for {path}; see its log, and "
            f"start it with: {_SERVE}."
        )

    def _refused(self, path: str, error: urllib.error.HTTPError) -> str:
        if error.code == 404 and path != "/v1/completions":
            return f"The vLLM server at {self.url} has no {path.partition('?')[0]}; start it with: {_SERVE}."
        said = error.read(2000).decode(errors="replace")
        found = re.search(r'"message"\s*:\s*"((?:[^"\\]|\\.)*)"', said)
        said = " ".join((found[1] if found else said).split()).rstrip(".")
        return f"The vLLM server at {self.url} refused {path} with status {error.code}: {said}."


def _entry(answer: Any, path: str, *keys: str | int) -> Any:
    try:
        for key in keys:
            answer = answer[key]
    except (KeyError, IndexError, TypeError) as error:
        raise RunError(
            f"The answer of {path} has no {'.'.join(map(str, keys))}; is this a vLLM server, of version 0.18 or newer?"
        ) from error
    return answer


# ---- in this process -------------------------------------------------------------------------------------------------


class InProcess:
    """vLLM's offline engine beside the student, on the same device.

    Args:
        model: the checkpoint or hub id that it starts from.
        memory: share of the device's memory that it may take.

    Raises:
        RunError: vLLM is not installed.
    """

    def __init__(self, model: str, memory: float = 0.3) -> None:
        try:
            import vllm  # type: ignore[import-not-found]
        except ImportError as error:
            raise RunError("rollouts=vllm needs vLLM; install leibler[vllm], or name a server.") from error
        self._params = vllm.SamplingParams
        self._llm = vllm.LLM(
            model=model, gpu_memory_utilization=memory, logprobs_mode="processed_logprobs", enable_prefix_caching=True
        )

    def check(self, temperature: float, top_p: float | None) -> None:
        """Its log-probs are those of the law sampled from, at any settings."""

    def complete(self, prompts: Sequence[Sequence[int]], settings: Sequence[Mapping[str, Any]]) -> list[Completion]:
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [self._params(**setting) for setting in settings],
            use_tqdm=False,
        )
        found = []
        for output in outputs:
            for one in sorted(output.outputs, key=lambda o: o.index):
                if one.logprobs is None:
                    raise RunError("vLLM gave no log-probs; it needs version 0.18 or newer.")
                logp = [at[token].logprob for at, token in zip(one.logprobs, one.token_ids, strict=True)]
                found.append(Completion(tuple(one.token_ids), tuple(logp), one.finish_reason == "stop"))
        return found

    def load(self, checkpoint: Path) -> None:
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(checkpoint)})
        self._llm.reset_prefix_cache()
