"""A vocabulary extended by new tokens: their rows in a model, and a law over old tokens lifted onto them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from leibler.errors import ModelError
from leibler.fused import Lifted, Linear, TargetRows, VocabularyMap
from leibler.policy.model import CausalLM
from leibler.policy.randomness import generator
from leibler.policy.tokens import right_pad
from leibler.policy.vocabulary import Reading, TextAlignment

if TYPE_CHECKING:
    from transformers import PreTrainedModel

States = Callable[[Tensor, Tensor], Tensor]
"""Hidden states ``[batch length hidden]`` of tokens and attention."""


def extend(
    model: CausalLM, words: Sequence[str], init: Literal["mean", "last", "random"] = "mean", seed: int = 0
) -> CausalLM:
    """A copy of a model with new tokens for ``words``, its old rows unchanged.

    Source: KL-based self-distillation for large language models (2025) compares such beginnings.

    Args:
        model: stays as it is; so does its tokenizer.
        words: texts that become one token each; those that are one already are left as they are.
        init: rows of a new token in the embedding (and in a head of its own): ``"mean"`` of the rows of the pieces that
            it was before, the row of the ``"last"`` one, or ``"random"``, normal with the mean and the spread of the
            old rows.
        seed: of the random rows.

    Raises:
        ModelError: no word is new, or one is empty; the model carries an adapter.

    Examples:
        >>> from leibler.policy import tiny_llama, train_bpe
        >>> model = tiny_llama(train_bpe(["x"], size=259), hidden=16, layers=1, heads=2)
        >>> longer = extend(model, ["return", " return"])
        >>> longer.tokenizer.encode("a return"), longer.vocab_size - model.vocab_size
        ([67, 260], 2)
    """
    if model.has_adapter:
        raise ModelError("A model with an adapter cannot be extended; save it and load the merged checkpoint first.")
    if any(not word for word in words):
        raise ModelError("A new token must spell something; leave the empty word out.")
    encode = model.tokenizer.encode
    new = [word for word in dict.fromkeys(words) if len(encode(word, add_special_tokens=False)) > 1]
    if not new:
        raise ModelError("None of the words is new: each is one token already.")
    pieces = [encode(word, add_special_tokens=False) for word in new]
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.add_tokens(new)
    network = cast("PreTrainedModel", copy.deepcopy(model.causal))
    rows = model.head()[0].shape[0]
    ids = cast("list[int]", tokenizer.convert_tokens_to_ids(new))
    if max(ids) >= rows:  # padding rows are used first
        with torch.random.fork_rng(devices=[]):
            network.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    source = generator(seed, "extend")
    matrices = [network.get_input_embeddings().weight]
    head: Any = network.get_output_embeddings()
    if head is not None and head.weight is not matrices[0]:
        matrices.append(head.weight)
    with torch.no_grad():
        for matrix in (cast(Tensor, m) for m in matrices):
            old = matrix[: model.vocab_size]
            for number, parts in zip(ids, pieces, strict=True):
                if init == "random":
                    drawn = torch.randn(old.shape[1], generator=source, dtype=torch.float64).to(old)
                    matrix[number] = old.mean(0) + old.std(0) * drawn
                else:
                    matrix[number] = matrix[parts].mean(0) if init == "mean" else matrix[parts[-1]]
        bias = getattr(head, "bias", None)
        if bias is not None:
            bias[ids] = 0.0
    return CausalLM(network, tokenizer).train(model.training)


@dataclass
class _Node:
    """A sequence of the teacher's tokens that begins a new token; ``entry`` is the student's token that spells it."""

    path: tuple[int, ...]
    entry: int | None = None
    children: dict[int, _Node] = field(default_factory=dict)


class Lifting:
    """Lifts the law of a teacher onto the student's vocabulary, which extends the teacher's.

    With a new token n that the teacher reads as ``v_1 ... v_m``: ``tau(n | x) = prod_j p(v_j | x, v_<j)``, less what
    goes to longer new tokens that begin with it; and ``tau(v | x) = p(v | x)`` less what goes to new tokens that begin
    with v. That is a law, and adding the new tokens to their first pieces again gives p.

    Args:
        alignment: of the student with the teacher.

    Raises:
        ModelError: the teacher has entries that the student lacks.
    """

    def __init__(self, alignment: TextAlignment) -> None:
        self.alignment = alignment
        device = alignment.maps[0].cell.device
        mine, theirs = (m.cell.tolist() for m in alignment.twins)
        twin = {cell: number for number, cell in reversed(list(enumerate(mine))) if cell >= 0}
        of = [twin.get(cell, -1) for cell in theirs]
        special = alignment.spelt[1].special
        lacking = [n for n, (c, p) in enumerate(zip(of, alignment.spelt[1].pieces)) if c < 0 and p and n not in special]
        if lacking:
            raise ModelError(
                f"{len(lacking)} entries of the teacher, such as {alignment.spelt[1].pieces[lacking[0]]!r}, "
                "are missing from the student's tokenizer; a law is lifted onto a vocabulary that extends its own only."
            )
        size = len(mine)
        entries = torch.arange(size)
        entries[[n for n, p in enumerate(alignment.spelt[0].pieces) if p is None]] = -1
        self.maps = VocabularyMap(entries.to(device), size), VocabularyMap(torch.tensor(of, device=device), size)
        self.roots: dict[int, _Node] = {}
        known = set(of)
        for number, piece in enumerate(alignment.spelt[0].pieces):
            if piece is None or number in known or number in alignment.spelt[0].special:
                continue
            path, ends = alignment.encode(piece)
            if len(path) < 2 or ends[-1] != len(piece):
                continue
            node = self.roots.setdefault(path[0], _Node((path[0],), of[path[0]]))
            for token in path[1:]:
                node = node.children.setdefault(token, _Node((*node.path, token)))
            node.entry = number

    def target(self, law: TargetRows, reading: Reading, states: States, threshold: float, limit: int) -> Lifted:
        """The lifted law at the events of a reading.

        Args:
            law: of the teacher at these events, one head.
            reading: of the batch.
            states: runs the teacher.
            threshold: a beginning of a new token that the teacher gives less is not followed further.
            limit: tokens in one forward pass at most.
        """
        (leaf,), teacher = law.leaves, self.alignment.teacher
        found: list[tuple[Tensor, int, Tensor]] = []
        # What goes from a token to a longer one: (events, the token, its mass, the share of it).
        given: list[tuple[Tensor, int, Tensor, Tensor]] = []
        roots = list(self.roots.values())
        events = reading.present.nonzero()[:, 0]
        first = _logp(leaf, events, [node.path[0] for node in roots], teacher.vocab_size)
        level = [(node, events, first[:, i], node.entry, first[:, i]) for i, node in enumerate(roots)]
        floor = -torch.inf if threshold <= 0 else float(torch.log(torch.tensor(threshold, dtype=torch.float64)))
        while level:
            following = []
            for node, at, mass, above, mass_above in level:
                keep = (mass > floor).nonzero()[:, 0]
                if not len(keep) or not node.children:
                    continue
                at, mass, mass_above = at[keep], mass[keep], mass_above[keep]
                after = self._after(leaf, reading, at, node, states, limit)
                for i, child in enumerate(node.children.values()):
                    there = mass + after[:, i]
                    if child.entry is None:
                        following.append((child, at, there, above, mass_above))
                        continue
                    found.append((at, child.entry, there))
                    assert above is not None
                    given.append((at, above, mass_above, (there - mass_above).exp()))
                    following.append((child, at, there, child.entry, there))
            level = following
        return Lifted(self.maps[0], law, self.maps[1], reading.present, *self._settled(found, given, leaf))

    def _settled(
        self, found: list[tuple[Tensor, int, Tensor]], given: list[tuple[Tensor, int, Tensor, Tensor]], leaf: Linear
    ) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"], Float[Tensor, " m"]]:
        """Event, entry and log-probability of all that lifting changes: each token's mass less what it gave away."""
        size, device = self.maps[0].vocab, leaf.hidden.device
        keys = [at * size + entry for at, entry, _ in found] + [at * size + entry for at, entry, _, _ in given]
        if not keys:
            none = torch.zeros(0, dtype=torch.long, device=device)
            return none, none, torch.zeros(0, dtype=torch.float64, device=device)
        key, place = torch.unique(torch.cat(keys), return_inverse=True)
        mass = torch.cat([*(m for _, _, m in found), *(m for _, _, m, _ in given)])
        share = torch.cat([*(torch.zeros_like(m) for _, _, m in found), *(s for _, _, _, s in given)])
        value = mass.new_full((len(key),), -torch.inf).scatter_reduce_(0, place, mass, "amax")
        away = torch.zeros_like(value).index_add_(0, place, share).clamp(max=1.0)
        return key // size, key % size, value + torch.log1p(-away)

    def _after(
        self, leaf: Linear, reading: Reading, events: Tensor, node: _Node, states: States, limit: int
    ) -> Float[Tensor, "events children"]:
        """log p(child | what the event has read, the node's tokens)."""
        width = reading.tokens.shape[1]
        row, place = reading.place[events] // width, reading.place[events] % width
        lengths = (place + 1 + len(node.path)).tolist()
        teacher = self.alignment.teacher
        out = []
        step = max(limit // max(lengths), 1)
        for start in range(0, len(events), step):
            part = range(start, min(start + step, len(events)))
            pairs = [(reading.tokens[row[i], : int(place[i]) + 1].tolist(), list(node.path)) for i in part]
            tokens, attention, _ = (x.to(leaf.hidden.device) for x in right_pad(pairs, teacher.pad_id))
            fits = torch.tensor([teacher.context is None or lengths[i] <= teacher.context for i in part])
            if not bool(fits.all()):
                raise ModelError(
                    f"Following new tokens takes {max(lengths)} tokens, beyond the teacher's context of "
                    f"{teacher.context}; shorten the texts."
                )
            hidden = states(tokens, attention)
            ends = torch.tensor([lengths[i] - 1 for i in part], device=hidden.device)
            here = torch.arange(len(part), device=hidden.device)
            last = teacher.linear(hidden[here, ends], leaf.temperature)
            out.append(_logp(last, here, list(node.children), teacher.vocab_size))
        return torch.cat(out)


def _logp(head: Linear, rows: Int[Tensor, " m"], entries: list[int], vocab: int) -> Float[Tensor, "m entries"]:
    """Log-probabilities of some entries at some rows of a head, in float64; all logits of a few rows at a time."""
    out = []
    for part in rows.split(128):
        logits = sum((hidden[part] @ weight[:vocab].T for hidden, weight in head.products), torch.zeros(())).double()
        logits = (logits if head.bias is None else logits + head.bias[:vocab]) / head.temperature
        out.append(logits[:, entries] - logits.logsumexp(-1, keepdim=True))
    empty = torch.zeros((0, len(entries)), dtype=torch.float64, device=head.hidden.device)
    return torch.cat(out) if out else empty
