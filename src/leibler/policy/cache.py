"""A key-value cache with room for the whole completion, so that a decoding step copies one token and not all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import LongTensor, Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

if TYPE_CHECKING:
    from leibler.policy.model import CausalLM


class RoomyLayer(DynamicLayer):
    """Like ``DynamicLayer``, which concatenates at every step, but writing into room set aside in advance.

    ``keys`` and ``values`` remain views of the filled part, so every inherited method sees what it expects.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.capacity = 0
        self._store: tuple[Tensor, Tensor] | None = None

    def _reserve(self, capacity: int) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        used = self.keys.shape[-2]
        stores = []
        for states in (self.keys, self.values):
            store = states.new_empty((*states.shape[:-2], capacity, states.shape[-1]))
            store[..., :used, :] = states
            stores.append(store)
        self.capacity = capacity
        self._store = (stores[0], stores[1])
        return self._store

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            # The prompt is kept as it comes: room is made at the first new token, when the rows are known.
            self.keys, self.values = key_states, value_states
            self.capacity = key_states.shape[-2] + self.room
            return key_states, value_states
        assert self.keys is not None
        used, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        store = (
            self._store if self._store is not None and end <= self.capacity else self._reserve(max(self.capacity, end))
        )
        for room, states in zip(store, (key_states, value_states), strict=True):
            room[..., used:end, :] = states
        self.keys, self.values = (room[..., :end, :] for room in store)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(cast(LongTensor, beam_idx))
        self._store = None  # the rows are others now; the next update makes room for them


def make_cache(model: CausalLM, room: int) -> DynamicCache:
    """An empty cache for ``model`` whose ordinary layers have room for ``room`` tokens beyond the prompt.

    Sliding-window, linear-attention and other special layers keep the class that Transformers gives them.
    """
    cache = DynamicCache(config=model.causal.config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
