"""Reading prompts and appending tokens: any Transformers model through its cache, some with far fewer operations.

Between two draws a small model spends more time around its matrix products than in them: masks and positions made
anew, modules wrapped in modules, attention kernels laid out for long queries. `Lean` calls the same linear layers and
does the rest itself; it serves the layers whose arithmetic it knows, on the CPU, and everything else goes through
`Cached`, the model's own forward pass.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from leibler.policy.cache import make_cache
from leibler.policy.model import CausalLM

_KNOWN_LAYERS = frozenset(
    f"transformers.models.{family.lower()}.modeling_{family.lower()}.{family}DecoderLayer"
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3")
)
_FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone, not on how long the sequence has become."""


class Decoder(Protocol):
    """A model's state for a batch of rows: what they read so far."""

    def read(
        self, tokens: Int[Tensor, "rows time"], attention: Bool[Tensor, "rows time"], room: int
    ) -> Float[Tensor, "rows hidden"]:
        """Read left-padded prompts, with room for so many further tokens; the final hidden state of each row."""
        ...

    def keep(self, index: Int[Tensor, " kept"]) -> None:
        """Go on with the rows ``index``, repeats allowed."""
        ...

    def advance(
        self, token: Int[Tensor, " rows"], attention: Bool[Tensor, "rows time"] | None, position: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows hidden"]:
        """Append one token to each row. ``attention`` says what is not padding, the new token included."""
        ...


def decoder(model: CausalLM) -> Decoder:
    """The fastest decoder that computes what ``model`` computes."""
    if _known(model) and not torch.is_autocast_enabled("cpu"):
        # Layers of a known name may still have been changed (another release, a patched class): compared once.
        if model.decodes_lean is None:
            model.decodes_lean = agree(Lean(model), Cached(model), model)
        if model.decodes_lean:
            return Lean(model)
    return Cached(model)


def _known(model: CausalLM) -> bool:
    """Whether the model is made of the parts that `Lean` was written for."""
    base = cast(Any, model.causal.base_model)
    weight = model.head()[0]
    layers = getattr(base, "layers", None)
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64) or not layers:
        return False
    # Hooks around whole layers (sharding, offloading, measurements) would not be called.
    around = [part for layer in layers for part in (layer, getattr(layer, "self_attn", layer))]
    return (
        all(f"{type(layer).__module__}.{type(layer).__qualname__}" in _KNOWN_LAYERS for layer in layers)
        and len(layers) == base.config.num_hidden_layers
        and getattr(base.config, "sliding_window", None) is None
        and getattr(base.rotary_emb, "rope_type", None) in _FIXED_ROTATIONS
        and not any(part._forward_hooks or part._forward_pre_hooks or hasattr(part, "_hf_hook") for part in around)
    )


def agree(first: Decoder, second: Decoder, model: CausalLM) -> bool:
    """Whether two decoders give equal hidden states on a short padded batch, up to rounding."""
    size = min(5, model.vocab_size)
    tokens = torch.arange(10, device=model.device).view(2, 5) % size
    attention = torch.ones_like(tokens, dtype=torch.bool)
    attention[1, :2] = False
    longer = torch.cat((attention, attention[:, -1:]), 1)
    states = []
    for one in (first, second):
        read = one.read(tokens, attention, 2)
        states.append(torch.stack((read, one.advance(tokens[:, 0], longer, attention.sum(1)))))
    return bool((states[0] - states[1]).abs().max() <= 1e-4 * states[1].abs().max())


class Cached:
    """Any model with a key-value cache, by its own forward pass."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model

    def read(self, tokens: Tensor, attention: Tensor, room: int) -> Tensor:
        self.cache = make_cache(self.model, room)
        self.used = tokens.shape[1]
        return self._forward(tokens, attention, (attention.long().cumsum(1) - 1).clamp_min(0))

    def keep(self, index: Tensor) -> None:
        self.cache.reorder_cache(cast(torch.LongTensor, index))

    def advance(self, token: Tensor, attention: Tensor | None, position: Tensor) -> Tensor:
        self.used += 1
        if attention is None:
            attention = torch.ones(1, 1, dtype=torch.bool, device=token.device).expand(len(token), self.used)
        return self._forward(token[:, None], attention, position[:, None])

    def _forward(self, tokens: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        output = self.model.hidden(tokens, attention, positions, past_key_values=self.cache, use_cache=True)
        return output.last_hidden_state[:, -1]


class Lean:
    """Layers of the Llama kind: RMS norms, rotary positions, grouped queries.

    Keys and values lie in one preallocated tensor per layer, ``[2, rows, heads, time, width]``. Prompts are read
    without their padding, and in the last layer only their last token is carried on. The linear layers are the model's
    own modules: biases, adapters and tied weights are theirs.
    """

    def __init__(self, model: CausalLM) -> None:
        self.base = cast(Any, model.causal.base_model)
        self.layers = list(self.base.layers)
        config = self.base.config
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.width = self.layers[0].self_attn.head_dim
        self.scale = float(self.layers[0].self_attn.scaling)
        self.store: list[Tensor] = []

    def read(self, tokens: Tensor, attention: Tensor, room: int) -> Tensor:
        rows, time = tokens.shape
        where = attention.flatten().nonzero()[:, 0]
        hidden = self.base.embed_tokens(tokens.flatten()[where])
        positions = torch.arange(time + room, device=tokens.device)[None]
        self.cos, self.sin = (angle[0, :, None] for angle in self.base.rotary_emb(hidden, position_ids=positions))
        position = (attention.cumsum(1) - 1).flatten()[where]
        cos, sin = self.cos[position], self.sin[position]
        # The tokens stand row by row: a row ends where the tokens up to it do.
        last = attention.sum(1).cumsum(0) - 1
        visible = None
        if len(where) < rows * time:
            visible = attention[:, None, None, :] & torch.ones_like(attention[0]).expand(time, time).tril()
        self.used = time
        # Zeros, not garbage: what padding holds is multiplied by 0.
        shape = (2, rows, self.groups, time + room, self.width)
        self.store = [hidden.new_zeros(shape) for _ in self.layers]
        for number, (layer, store) in enumerate(zip(self.layers, self.store, strict=True)):
            normed = _norm(layer.input_layernorm, hidden)
            for held, new in zip(store, self._key_value(layer, normed, cos, sin), strict=True):
                held[:, :, :time] = _padded(new, where, rows, time)
            mask = visible
            if number + 1 < len(self.layers):
                query = _padded(self._query(layer, normed, cos, sin), where, rows, time)
            else:
                hidden = hidden[last]
                query = self._query(layer, normed[last], cos[last], sin[last])[:, :, None]
                mask = None if visible is None else visible[:, :, -1:]
            attended = F.scaled_dot_product_attention(
                query, store[0][:, :, :time], store[1][:, :, :time], mask, scale=self.scale,
                is_causal=visible is None and query.shape[2] > 1, enable_gqa=self.heads != self.groups,
            )  # fmt: skip
            attended = attended.transpose(1, 2).reshape(-1, self.heads * self.width)
            hidden = self._rest(layer, hidden, attended if len(attended) == len(hidden) else attended[where])
        return _norm(self.base.norm, hidden)

    def keep(self, index: Tensor) -> None:
        for number, old in enumerate(self.store):
            new = old.new_empty((2, len(index), *old.shape[2:]))
            new[..., : self.used, :] = old[:, index, :, : self.used]
            self.store[number] = new

    def advance(self, token: Tensor, attention: Tensor | None, position: Tensor) -> Tensor:
        rows, self.used = len(token), self.used + 1
        bias = None
        if attention is not None:
            bias = torch.zeros_like(attention, dtype=self.cos.dtype).masked_fill_(~attention, -torch.inf)[:, None]
        hidden = self.base.embed_tokens(token)
        cos, sin = self.cos[position], self.sin[position]
        for layer, store in zip(self.layers, self.store, strict=True):
            normed = _norm(layer.input_layernorm, hidden)
            store[0, :, :, self.used - 1], store[1, :, :, self.used - 1] = self._key_value(layer, normed, cos, sin)
            keys, values = store.view(2, rows * self.groups, -1, self.width)[:, :, : self.used]
            query = self._query(layer, normed, cos, sin).view(rows * self.groups, -1, self.width)
            # For one query a plain product beats the attention kernels, which are laid out for many.
            scores = torch.bmm(query, keys.transpose(1, 2)).mul_(self.scale)
            if bias is not None:
                scores.view(rows, self.heads, self.used).add_(bias)
            hidden = self._rest(layer, hidden, torch.bmm(scores.softmax(-1), values).view(rows, -1))
        return _norm(self.base.norm, hidden)

    # One layer on tokens ``[n, hidden]``, in three parts.

    def _key_value(self, layer: Any, normed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        key = layer.self_attn.k_proj(normed).view(-1, self.groups, self.width)
        if hasattr(layer.self_attn, "k_norm"):
            key = _norm(layer.self_attn.k_norm, key)
        return _rotate(key, cos, sin), layer.self_attn.v_proj(normed).view(-1, self.groups, self.width)

    def _query(self, layer: Any, normed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query = layer.self_attn.q_proj(normed).view(-1, self.heads, self.width)
        if hasattr(layer.self_attn, "q_norm"):
            query = _norm(layer.self_attn.q_norm, query)
        return _rotate(query, cos, sin)

    def _rest(self, layer: Any, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + layer.self_attn.o_proj(attended)
        return hidden + layer.mlp(_norm(layer.post_attention_layernorm, hidden))


def _padded(x: Float[Tensor, "tokens heads width"], where: Tensor, rows: int, time: int) -> Tensor:
    """Tokens put back to their places between the padding: ``[rows, heads, time, width]``."""
    if len(x) < rows * time:
        x = x.new_zeros(rows * time, *x.shape[1:]).index_copy_(0, where, x)
    return x.view(rows, time, *x.shape[1:]).transpose(1, 2)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def _rotate(x: Float[Tensor, "tokens heads width"], cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: each pair (x_i, x_{i + width/2}) turned by its angle."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out
