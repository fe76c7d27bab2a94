"""A language model as the engine sees it: final hidden states, a head, a tokenizer."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from leibler.errors import ModelError
from leibler.fused import Linear, LowRank
from leibler.policy.adapters import low_rank, untie
from leibler.policy.loading import first_line, load_pretrained, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from leibler.objective.soft import SoftTokens


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter: each adapted weight becomes W + (alpha / rank) B A, and only A and B are trained.

    Source: LoRA: Low-Rank Adaptation of Large Language Models (2022).

    Args:
        rank: rows of A.
        alpha: strength; the update is scaled by ``alpha / rank``.
        targets: names of the modules to adapt, such as ``("q_proj", "v_proj")``; every linear layer but the head when
            not given.
        dropout: on the adapter's input, in training only.
        seed: of A (B starts at 0, so the adapted model starts as the model itself).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None
    dropout: float = 0.0
    seed: int = 0


class LanguageModel(nn.Module):
    """A Transformers language model with its tokenizer, split where the vocabulary begins: what all kinds share.

    ``forward`` gives hidden states and ``head`` the matrix that turns them into logits, so that losses over the
    vocabulary can be computed without ever holding all logits. The hidden state at position ``t`` predicts token
    ``t + 1``, whatever kind of model it is. That ``hidden @ weight.T + bias`` *is* the model's logits is checked when
    the object is made.

    Args:
        network: a Transformers model with a language-model head, or a PEFT model around one.
        tokenizer: its tokenizer.

    Raises:
        ModelError: logits are not a linear function of the final hidden states (soft-capping, scaling), or the
            tokenizer has entries for which the model has none.
    """

    masked: ClassVar[bool] = False
    """Whether it fills in masked positions rather than reading from left to right."""
    task: ClassVar[str | None] = None
    """PEFT's name for what the model does, where it has one."""

    def __init__(self, network: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer
        self.decodes_lean: bool | None = None
        # Not len(tokenizer) alone: where ids have gaps, the last entry still has to be reachable.
        taken = set(tokenizer.get_vocab().values())
        self.vocab_size = max(len(tokenizer), 1 + max(taken, default=-1))
        if self.pretrained.base_model is self.pretrained:
            kind = type(self.pretrained).__name__
            raise ModelError(f"{kind} has no base model that gives hidden states without a head.")
        weight, _ = self._matrix()
        rows = weight.shape[0]
        if rows < self.vocab_size:
            raise ModelError(
                f"The tokenizer has {self.vocab_size} entries but the model only {rows}; "
                "take the tokenizer that came with it, or call resize_token_embeddings first."
            )
        # Ids that no token has are outside the support: a bias of -inf. (A buffer, so that it moves with the model.)
        taken -= self._never_predicted()
        gaps = None
        if len(taken) < self.vocab_size:
            there = torch.tensor(sorted(taken), dtype=torch.long, device=weight.device)
            gaps = weight.new_zeros(rows)
            gaps[: self.vocab_size] = -torch.inf
            gaps[there] = 0.0
        self.gaps: Tensor | None
        self.register_buffer("gaps", gaps, persistent=False)
        if self.eos_id is None:
            raise ModelError("The tokenizer has no end-of-sequence token; set tokenizer.eos_token.")
        self._check_head()

    def _never_predicted(self) -> set[int]:
        """Ids of tokens that stand in texts but that no law of this model may give anything."""
        return set()

    # -- loading and saving -------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
        adapter: Lora | None = None,
        gradient_checkpointing: bool = False,
    ) -> Self:
        """Read a checkpoint from a directory or, if there is none of that name, from the hub.

        Args:
            source: a directory that holds ``config.json``, safetensors weights and a tokenizer, or a hub id.
            dtype: of the weights.
            trust_remote_code: run Python code that comes with the checkpoint.
            adapter: train a low-rank adapter instead of the weights.
            gradient_checkpointing: recompute activations in the backward pass, trading time for memory.

        Raises:
            ModelError: in one sentence, why the checkpoint cannot be used.
        """
        network, tokenizer = load_pretrained(
            source, dtype=dtype, trust_remote_code=trust_remote_code, masked=cls.masked
        )
        try:
            model = cls(network, tokenizer)
        except ModelError as error:
            raise ModelError(f"{str(source)!r}: {error}") from error
        if adapter is not None:
            model = model.adapted(adapter)
        if gradient_checkpointing:
            model.checkpoint_gradients()
        return model.eval()

    def save(self, path: str | Path) -> None:
        """Write a Transformers checkpoint (safetensors) with its tokenizer.

        A model with an adapter is written *merged*, so that any tool can load the directory; the adapter itself is
        written beside it, in ``adapter/``, as PEFT writes it.
        """
        path = Path(path)
        network = self.pretrained
        if self.has_adapter:
            # "auto" would ask the hub whether the vocabulary was resized
            cast(Any, self.network).save_pretrained(path / "adapter", save_embedding_layers=False)
            merged = copy.deepcopy(cast(Any, self.network))
            untie(merged.get_base_model())
            network = merged.merge_and_unload()
        with quiet():
            network.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    def copy(self) -> Self:
        """A frozen copy: the same weights now, no gradient, evaluation mode; the tokenizer is shared."""
        twin = copy.deepcopy(self, {id(self.tokenizer): self.tokenizer})
        return twin.requires_grad_(False).eval()

    # -- the network --------------------------------------------------------------------------------------------------

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.network, "peft_config") and hasattr(self.network, "get_base_model")

    @property
    def pretrained(self) -> PreTrainedModel:
        """The Transformers model itself, without PEFT's wrapper (adapter layers stay in place)."""
        network = cast(Any, self.network)
        return network.get_base_model() if self.has_adapter else network

    @property
    def hidden_size(self) -> int:
        return self.head()[0].shape[1]

    @property
    def device(self) -> torch.device:
        return self.head()[0].device

    @property
    def context(self) -> int | None:
        """The longest sequence that the positions allow, if the model has such a limit."""
        return getattr(self.pretrained.config.get_text_config(decoder=True), "max_position_embeddings", None)

    @property
    def eos_id(self) -> int:
        """The token that ends a completion."""
        return cast(int, self.tokenizer.eos_token_id)

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.eos_id if pad is None else cast(int, pad)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion: the tokenizer's end of sequence and those of the generation settings.

        Of the latter only special tokens count: a configuration that kept its default would else stop at a letter.
        """
        extra = getattr(getattr(self.pretrained, "generation_config", None), "eos_token_id", None)
        extra = [] if extra is None else [extra] if isinstance(extra, int) else list(extra)
        added = self.tokenizer.added_tokens_decoder
        special = {number for number in extra if number in added and added[number].special}
        return tuple(sorted({self.eos_id, *special}))

    def head(self) -> tuple[Float[Tensor, "vocab hidden"], Float[Tensor, " vocab"] | None]:
        """The matrix (and bias) with ``logits = hidden @ weight.T + bias``; its rows may exceed ``vocab_size``.

        An adapter on the head comes on top: see :meth:`low_rank` and :meth:`linear`.
        Where the tokenizer's ids have gaps, the bias is -inf there: no law gives them anything.
        """
        weight, bias = self._matrix()
        if self.gaps is None:
            return weight, bias
        gaps = self.gaps.to(weight.dtype)
        return weight, gaps if bias is None else torch.where(gaps == 0, bias, gaps)

    def low_rank(self, hidden: Float[Tensor, "n hidden"]) -> tuple[LowRank, ...]:
        """What an adapter on the head adds to the logits of these hidden states; empty without one."""
        return low_rank(cast(nn.Module, self.pretrained.get_output_embeddings()), hidden)

    def linear(self, hidden: Float[Tensor, "n hidden"], temperature: float = 1.0) -> Linear:
        """The laws of the next token after these hidden states, for :mod:`leibler.fused`; the logits are not formed."""
        return Linear(hidden, *self.head(), temperature, self.low_rank(hidden))

    def _matrix(self) -> tuple[Tensor, Tensor | None]:
        head = self.pretrained.get_output_embeddings()
        weight = getattr(head, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise ModelError("The model has no linear output head, so its logits cannot be formed from hidden states.")
        return weight, getattr(head, "bias", None)

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        attention: Bool[Tensor, "batch time"],
        soft: SoftTokens | None = None,
    ) -> Float[Tensor, "batch time hidden"]:
        """Hidden states in front of the head; the one at ``t`` predicts token ``t + 1``.

        Padding may stand left or right: positions count the attended tokens. What comes out at padding is meaningless.

        Args:
            tokens: what is read.
            attention: the tokens that are there.
            soft: laws over the vocabulary that are read in place of some of the tokens; see `embed`.

        Raises:
            ModelError: a sequence is longer than the model's context.
        """
        if self.context is not None and tokens.shape[1] > self.context:
            self.check_length(int(attention.sum(1).max()))
        embedded = None if soft is None else self.embed(tokens, soft)
        return self._predicting(self._before_head(tokens, attention, embedded))

    def _before_head(self, tokens: Tensor, attention: Tensor, embedded: Tensor | None = None) -> Tensor:
        """What the head is applied to, at the places of the tokens."""
        return self.hidden(tokens, attention, embedded=embedded).last_hidden_state

    def _predicting(self, states: Tensor) -> Tensor:
        """The states, each at the place in front of the token that it predicts."""
        return states

    def embed(
        self, tokens: Int[Tensor, "batch time"], soft: SoftTokens | None = None
    ) -> Float[Tensor, "batch time hidden"]:
        """What the first layer reads: the embedding of each token, or ``sum_j w_j E[index_j]`` at a soft one.

        No gradient goes through a soft token into the embedding: with tied matrices, the law that it stands for would
        change its meaning while it is learned.
        """
        embedding = cast(nn.Module, self.pretrained.get_input_embeddings())
        hard = embedding(tokens)
        if soft is None or not bool((where := soft.there).any()):
            return hard
        index, weight = soft.index[where], soft.weight[where]
        with torch.no_grad():
            # Entry by entry: all k embeddings of each position at once would take k times the memory.
            mixed = torch.zeros(len(index), hard.shape[-1], dtype=torch.promote_types(hard.dtype, torch.float32))
            mixed = mixed.to(hard.device)
            for entry, share in zip(index.unbind(-1), weight.unbind(-1), strict=True):
                mixed += embedding(entry).to(mixed.dtype) * share[:, None].to(mixed.dtype)
        return hard.masked_scatter(where[..., None], mixed.to(hard.dtype))

    def hidden(
        self,
        tokens: Tensor,
        attention: Tensor | None,
        positions: Tensor | None = None,
        embedded: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The base model's raw output, for samplers that bring a cache; ``forward`` is this without one.

        Args:
            tokens: what is read.
            attention: ``[batch time]`` what is there, the cache included, or ``[batch 1 time time]``, what is added to
                the attention scores (then ``positions`` are needed).
            positions: of the tokens; counted along ``attention`` when not given.
            embedded: what the first layer reads in place of the tokens' embeddings.
            options: for the base model.
        """
        if positions is None and attention is not None:
            positions = (attention.long().cumsum(1) - 1).clamp_min(0)
        base = self.pretrained.base_model
        if positions is not None and "position_ids" in _accepts(type(base)):
            options["position_ids"] = positions
        if embedded is None:
            return base(input_ids=tokens, attention_mask=attention, **options)
        if "inputs_embeds" not in _accepts(type(base)):
            raise ModelError(f"{type(self.pretrained).__name__} reads tokens only, so it cannot read soft ones.")
        return base(inputs_embeds=embedded, attention_mask=attention, **options)

    def check_length(self, length: int) -> None:
        """Raise a ``ModelError`` when a sequence of ``length`` tokens does not fit the context."""
        if self.context is not None and length > self.context:
            raise ModelError(
                f"A sequence of {length} tokens exceeds the model's context of {self.context}; "
                "shorten the prompts or lower max_new_tokens."
            )

    def checkpoint_gradients(self) -> None:
        """Recompute activations in the backward pass from now on."""
        # The name it has in later releases of Transformers 5, where there is one.
        pretrained = cast(Any, self.pretrained)
        enable = getattr(pretrained, "activation_checkpointing_enable", None)
        enable = enable or pretrained.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def adapted(self, adapter: Lora) -> Self:
        """The same model with a trainable low-rank adapter and frozen weights; the layers are replaced in place.

        Raises:
            ModelError: the targets name no module, or the embedding.
        """
        from peft import LoraConfig, get_peft_model

        if self.has_adapter:
            raise ModelError("The model already has an adapter; save it and load the merged checkpoint first.")
        config = LoraConfig(
            r=adapter.rank,
            lora_alpha=cast(int, adapter.alpha),
            lora_dropout=adapter.dropout,
            target_modules=list(adapter.targets) if adapter.targets else "all-linear",
            task_type=self.task,
        )
        embedding = self.pretrained.get_input_embeddings()
        name = next(name for name, other in self.pretrained.named_modules() if other is embedding)
        if adapter.targets and any(name == target or name.endswith(f".{target}") for target in adapter.targets):
            raise ModelError(f"An adapter on the embedding {name!r} is not supported; leave it out of targets.")
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # PEFT's own use of older Transformers names
                warnings.filterwarnings("ignore", message="fan_in_fan_out")  # it sets this right for GPT-2 by itself
                torch.manual_seed(adapter.seed)
                network = get_peft_model(self.pretrained, config)
        except ValueError as error:
            raise ModelError(f"The adapter does not fit the model: {first_line(error)}.") from error
        return type(self)(network, self.tokenizer)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Inside the block the model is what it was before its adapter: a reference that costs no memory."""
        if not self.has_adapter:
            raise ModelError("The model has no adapter to switch off; keep a frozen copy() as the reference.")
        with cast(Any, self.network).disable_adapter():
            yield

    # -- text ---------------------------------------------------------------------------------------------------------

    def encode_prompt(self, text: str) -> list[int]:
        """Tokens of a prompt, with the begin token where the tokenizer adds one; never empty, never ended.

        An empty prompt becomes the begin token (the end token where there is none), so that a first token has
        something to be predicted from.
        """
        eos = self.eos_id
        tokens = list(self.tokenizer.encode(text))
        ending = cast(str, self.tokenizer.convert_ids_to_tokens(eos))
        while len(tokens) > 1 and tokens[-1] == eos and not text.endswith(ending):
            tokens.pop()  # some tokenizers end every text
        begin = self.tokenizer.bos_token_id
        return tokens or [eos if begin is None else cast(int, begin)]

    def encode_completion(self, text: str) -> list[int]:
        """Tokens of a completion, ended by the end-of-sequence token."""
        eos = self.eos_id
        tokens = list(self.tokenizer.encode(text, add_special_tokens=False))
        return tokens if tokens and tokens[-1] == eos else [*tokens, eos]

    def decode(self, tokens: Sequence[int] | Tensor) -> str:
        """Text without special tokens."""
        ids = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        return cast(str, self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    # -- checks -------------------------------------------------------------------------------------------------------

    def _check_head(self) -> None:
        """Compare the model's logits with ``hidden @ weight.T + bias`` on a short input, with the head made loud.

        Soft-capping hardly bends the small logits of an untrained model, so a hook scales the head's output to
        several hundred first: whatever stands between the head and the logits then shows.
        """
        seen: dict[str, Tensor] = {}

        def louder(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen["input"], seen["plain"] = inputs[0], output
            seen["loud"] = output * (500.0 / output.abs().max().clamp_min(1e-6))
            return seen["loud"]

        weight, bias = self._matrix()
        tokens = torch.arange(min(4, self.vocab_size), device=weight.device)[None]
        attention = torch.ones_like(tokens, dtype=torch.bool)
        handle = cast(nn.Module, self.pretrained.get_output_embeddings()).register_forward_hook(louder)
        try:
            with evaluating(self), torch.no_grad():
                hidden = self._before_head(tokens, attention)
                logits = self.pretrained(input_ids=tokens, attention_mask=attention.long()).logits
                expected = nn.functional.linear(hidden, weight, bias)
                for pair in self.low_rank(hidden[0]):
                    expected = expected + pair.hidden @ pair.weight.t()
        finally:
            handle.remove()
        if "loud" not in seen or hidden.shape[-1] != weight.shape[1]:
            raise ModelError("The model does not apply its output head to the final hidden states; it cannot be used.")
        if not torch.isfinite(logits).all():
            raise ModelError("The model's logits are not finite on a short input; its weights are damaged.")
        tolerance = 0.05 if weight.dtype in (torch.float16, torch.bfloat16) else 1e-4
        scale = expected.abs().max().clamp_min(1e-6)
        linear = (seen["plain"] - expected).abs().max() <= tolerance * scale
        untouched = (logits.float() - seen["loud"].float()).abs().max() <= tolerance * 500
        kind = type(self.pretrained).__name__
        if not linear:
            raise ModelError(
                f"{kind} changes its hidden states before the head, which cannot be reproduced from outside."
            )
        if not untouched:
            raise ModelError(
                f"{kind} changes its logits after the head (soft-capping or scaling), which hidden @ W.T does not "
                "reproduce; use a model without it."
            )


class CausalLM(LanguageModel):
    """A decoder-only model, which reads from left to right: see `LanguageModel`."""

    task: ClassVar[str | None] = "CAUSAL_LM"

    @property
    def causal(self) -> PreTrainedModel:
        """The Transformers model itself, without PEFT's wrapper."""
        return self.pretrained

    def _before_head(self, tokens: Tensor, attention: Tensor, embedded: Tensor | None = None) -> Tensor:
        return self.hidden(tokens, attention, embedded=embedded, use_cache=False).last_hidden_state

    def check_cache(self) -> None:
        """Raise a ``ModelError`` when the model cannot go on from a key-value cache, as sampling does."""
        if "past_key_values" not in _accepts(type(self.pretrained.base_model)):
            raise ModelError(
                f"{type(self.pretrained).__name__} keeps no key-value cache, so it cannot be sampled from here."
            )


def check_causal(*models: object) -> None:
    """Raise a ``ModelError`` for a model that reads a text from both sides: it would see the tokens it is asked for."""
    for model in models:
        if isinstance(model, LanguageModel) and model.masked:
            raise ModelError(
                f"{type(model.pretrained).__name__} fills in masked positions, and this reads from left to right; give "
                "a CausalLM, or see decode_masked, Masked and evaluate for what masked language models do."
            )


@functools.cache
def _accepts(kind: type) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """No dropout inside the block; each module's own mode is put back afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
