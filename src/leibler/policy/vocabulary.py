"""Two models with different tokenizers, brought together by the text that both read.

Positions are matched where both tokenizations have read the same text; next-token laws are compared on common cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from leibler.errors import ModelError
from leibler.fused import Merged, TargetRows, VocabularyMap
from leibler.policy.model import CausalLM
from leibler.policy.spelling import Spelling, spelling, valid_text
from leibler.policy.tokens import right_pad

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from leibler.policy.extension import Lifting

Rest = Literal["first piece", "bucket", "left out"]


@dataclass(frozen=True, eq=False)
class _Side:
    """One tokenizer: what it spells, how it encodes, which tokens end a response."""

    tokenizer: PreTrainedTokenizerBase
    stop: tuple[int, ...]
    entries: int

    @cached_property
    def spelling(self) -> Spelling:
        return spelling(self.tokenizer)

    @property
    def added(self) -> list[int]:
        """Tokens that stand for their whole name in a text."""
        return sorted(self.tokenizer.added_tokens_decoder)

    def role(self, name: str) -> int | None:
        return cast("int | None", getattr(self.tokenizer, f"{name}_token_id"))

    def first_pieces(self, texts: Sequence[bytes]) -> list[int | None]:
        """The first token that this tokenizer reads in each text: a beginning of it, or the token for the unknown."""
        pieces, unknown = self.spelling.pieces, self.role("unk")
        by_text = {piece: n for n, piece in enumerate(pieces) if piece and n not in self.spelling.special}
        plain = [text if whole else "" for text, whole in map(valid_text, texts)]
        backend: Any = self.tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        out: list[int | None] = []
        for text, encoded in zip(texts, backend.encode_batch(plain, add_special_tokens=False), strict=True):
            token = encoded.ids[0] if encoded.ids and not self.spelling.lead else None
            begins = token is not None and token not in self.spelling.special and text.startswith(pieces[token] or b"?")
            if token is None or not (token == unknown or begins):
                # A part of a character, a name that is special here, a tokenizer that changes how texts begin: the
                # longest entry that fits.
                fits = (text[:n] for n in range(len(text), 0, -1) if text[:n] in by_text)
                token = by_text.get(next(fits, b""))
            out.append(token)
        return out


def common_cells(
    student: CausalLM, teacher: CausalLM, rest: Rest = "first piece"
) -> tuple[VocabularyMap, VocabularyMap]:
    """Cells in which the next-token laws of two tokenizers mean the same: one for each text that both can spell.

    The end of sequence is matched with the end of sequence, other special tokens by name, then by role. An entry that
    only one tokenizer has joins the cell of the first piece that the other one reads in it: as far as one token can
    tell, both then say with what the text goes on. What has no such piece either (a character unknown to the other)
    shares one cell with the unknown tokens, and is left out where the other side has nothing like it.

    Args:
        student, teacher: the models.
        rest: ``"first piece"`` as above; ``"bucket"``: all entries without a twin in one cell; ``"left out"``: nowhere.

    Returns:
        The maps of the student's and of the teacher's entries.

    Raises:
        ModelError: a tokenizer whose entries do not spell a text piece by piece, or nothing in common.

    Examples:
        >>> from leibler.policy import character_tokenizer, tiny_llama, train_bpe
        >>> one = tiny_llama(train_bpe(["the theme"] * 9, size=262), hidden=16, layers=1, heads=2)
        >>> two = tiny_llama(train_bpe(["the theme"] * 9, size=264), hidden=16, layers=1, heads=2)
        >>> here, there = common_cells(one, two)
        >>> here.cells, here.vocab, there.vocab
        (262, 262, 264)
    """
    sides = tuple(_Side(model.tokenizer, model.stop_ids, model.vocab_size) for model in (student, teacher))
    cell: tuple[list[int], list[int]] = ([-1] * sides[0].entries, [-1] * sides[1].entries)
    cells = 0

    def join(*members: Sequence[int]) -> None:
        nonlocal cells
        for side in (0, 1):
            for number in members[side]:
                cell[side][number] = cells
        cells += 1

    # Texts that both spell, in the student's order; several entries of one side may spell the same.
    texts: list[dict[bytes, list[int]]] = [{}, {}]
    for found, side in zip(texts, sides, strict=True):
        for number, piece in enumerate(side.spelling.pieces):
            if piece and number not in side.spelling.special:
                found.setdefault(piece, []).append(number)
    for text, numbers in texts[0].items():
        if text in texts[1]:
            join(numbers, texts[1][text])
    if not cells:
        raise ModelError("No text is spelt by an entry of both tokenizers, so their laws have nothing in common.")

    for one, other in _special_pairs(sides):
        if cell[0][one] == cell[1][other] == -1:
            join([one], [other])
    end = cell[0][cast(int, sides[0].role("eos"))]
    left: tuple[list[int], list[int]] = ([], [])
    open_: tuple[list[int], list[int]] = ([], [])
    for side in (0, 1):
        here = sides[side]
        roles = {here.role(name) for name in ("bos", "pad", "unk")}
        for number, piece in enumerate(here.spelling.pieces):
            if piece is None or cell[side][number] >= 0:
                continue
            if number in here.stop:
                cell[side][number] = end
            else:
                (left if number in roles or rest != "first piece" or not piece else open_)[side].append(number)
    for side, number, found in _by_first_piece(sides, open_, cell):
        if found >= 0:
            cell[side][number] = found
        else:
            left[side].append(number)
    if all(left) and rest != "left out":
        join(*left)
    maps = [VocabularyMap(torch.tensor(numbers), cells) for numbers in cell]
    return maps[0], maps[1]


def _special_pairs(sides: Sequence[_Side]) -> list[tuple[int, int]]:
    """Special tokens that mean the same: by role where it ends a text, by name, then by the other roles."""
    one, two = sides
    ends = [(cast(int, one.role("eos")), cast(int, two.role("eos")))]
    # Of the same name where at least one of the two counts as special.
    here, there = ({side.spelling.pieces[n]: n for n in side.added} for side in (one, two))
    named = [
        (here[name], there[name])
        for name in here.keys() & there.keys()
        if here[name] in one.spelling.special or there[name] in two.spelling.special
    ]
    roles = [(one.role(name), two.role(name)) for name in ("unk", "bos", "pad")]
    return [*ends, *sorted(named), *((a, b) for a, b in roles if a is not None and b is not None)]


def _by_first_piece(
    sides: Sequence[_Side], numbers: Sequence[Sequence[int]], cell: Sequence[Sequence[int]]
) -> list[tuple[int, int, int]]:
    """The cell (or -1) of the first piece of each entry, (side, number, cell); pieces grow shorter, so this ends."""
    leads_to: tuple[dict[int, int | None], dict[int, int | None]] = ({}, {})
    for side in (0, 1):
        pieces = [sides[side].spelling.pieces[number] or b"" for number in numbers[side]]
        leads_to[side].update(zip(numbers[side], sides[1 - side].first_pieces(pieces), strict=True))
    out = []
    for side in (0, 1):
        for number in numbers[side]:
            here, at = side, number
            while at is not None and cell[here][at] < 0:
                here, at = 1 - here, leads_to[here].get(at)
            out.append((side, number, -1 if at is None else cell[here][at]))
    return out


@dataclass(frozen=True, eq=False)
class Reading:
    """What another tokenizer makes of a batch.

    Attributes:
        tokens, attention: ``[batch length]`` the same texts in its tokens, padded on the right.
        place: ``[events]`` where in the flattened ``[batch length]`` it has read what the event's position has read.
        present: ``[events]`` whether there is such a position.
    """

    tokens: Int[Tensor, "batch length"]
    attention: Bool[Tensor, "batch length"]
    place: Int[Tensor, " events"]
    present: Bool[Tensor, " events"]


class TextAlignment:
    """Reads a student's batches with another model's tokenizer and compares both where they have read the same text.

    Prompt and response are encoded anew, each from what the student's tokens spell. Positions at which the two
    tokenizations do not both stand between tokens are left out, as are those beyond the teacher's context.

    Args:
        student, teacher: the models; the teacher is the one whose law serves as target.
        rest: what becomes of entries without a twin: see :func:`common_cells`.

    Raises:
        ModelError: see :func:`common_cells`.

    Examples:
        >>> from leibler.policy import right_pad, tiny_llama, train_bpe
        >>> texts = ["the theme"] * 9
        >>> one = tiny_llama(train_bpe(texts, size=262), hidden=16, layers=1, heads=2)
        >>> two = tiny_llama(train_bpe(texts, size=266), hidden=16, layers=1, heads=2)
        >>> batch = right_pad([(one.encode_prompt("a "), one.encode_completion("theme"))])
        >>> TextAlignment(one, two).read(*batch).present.tolist()
        [True, True, True]
    """

    def __init__(self, student: CausalLM, teacher: CausalLM, rest: Rest = "first piece") -> None:
        self.student, self.teacher = student, teacher
        self.maps = common_cells(student, teacher, rest)
        self.spelt = spelling(student.tokenizer), spelling(teacher.tokenizer)
        special = self.spelt[1].special
        # One byte each, below 0x80 or not: those that are text by themselves are never asked for.
        self._bytes = {p[0]: n for n, p in enumerate(self.spelt[1].pieces) if p and len(p) == 1 and n not in special}

    @cached_property
    def twins(self) -> tuple[VocabularyMap, VocabularyMap]:
        """Maps in which only entries that mean the same share a cell."""
        return common_cells(self.student, self.teacher, "left out")

    def to(self, device: torch.device | str) -> TextAlignment:
        self.maps = (self.maps[0].to(device), self.maps[1].to(device))
        return self

    def read(
        self,
        tokens: Int[Tensor, "batch time"],
        attention: Bool[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time-1"],
    ) -> Reading:
        """The batch in the teacher's tokens, and the place in it of each event (the positions that ``mask`` marks)."""
        pairs: list[tuple[list[int], list[int]]] = []
        at: list[list[int]] = []
        for row, there, events in zip(tokens.cpu(), attention.cpu(), mask.cpu(), strict=True):
            ids = row[there].tolist()
            # Positions count attended tokens, so that left padding does as well.
            where = (there.long().cumsum(0)[:-1][events] - 1).tolist()
            start = where[0] + 1 if where else len(ids)
            prompt, response, boundaries = self._row(ids[:start], ids[start:])
            limit = self.teacher.context or len(prompt) + len(response)
            pairs.append((prompt[:limit], response[: max(limit - len(prompt), 0)]))
            read = [boundaries[t - start + 1] if t - start + 1 < len(boundaries) else None for t in where]
            at.append([-1 if n is None or len(prompt) + n > limit else len(prompt) + n - 1 for n in read])
        batch, there, _ = right_pad(pairs, self.teacher.pad_id)
        width = batch.shape[1]
        flat = torch.tensor(
            [width * i + n if n >= 0 else -1 for i, row in enumerate(at) for n in row], dtype=torch.long
        )
        device = tokens.device
        return Reading(batch.to(device), there.to(device), flat.clamp(min=0).to(device), (flat >= 0).to(device))

    def _row(self, prompt: list[int], response: list[int]) -> tuple[list[int], list[int], list[int | None]]:
        """Prompt and response in the teacher's tokens and, for each number of the student's tokens of the response, how
        many of the teacher's have read the same (None: it stands inside one of them)."""
        begin = self.student.tokenizer.bos_token_id
        said, _ = self.spelt[0].read(prompt[1:] if prompt[0] == begin else prompt)
        ended = bool(response) and response[-1] in self.student.stop_ids
        text, ends = self.spelt[0].read(response[:-1] if ended else response)
        tokens, there = self.encode(text)
        count = dict(zip(there, range(len(there)), strict=True))
        return self.teacher.encode_prompt(valid_text(said)[0]), tokens, [count.get(at) for at in (0, *ends)]

    def encode(self, data: bytes) -> tuple[list[int], list[int]]:
        """What was written, in the teacher's tokens, and the bytes that are read before the first and after each.

        Where a student samples bytes that are no text, a teacher with tokens for single bytes reads them one by one;
        another one reads no further.
        """
        tokens, ends, at = [], [0], 0
        while True:
            text, whole = valid_text(data[at:])
            more, read = self._encode_text(text)
            tokens += more
            ends += [at + n if n >= 0 else -1 for n in read]
            at += len(text.encode())
            if whole or data[at] not in self._bytes:
                return tokens, ends
            tokens.append(self._bytes[data[at]])
            at += 1
            ends.append(at)

    def _encode_text(self, text: str) -> tuple[list[int], list[int]]:
        tokens = list(self.teacher.tokenizer.encode(text, add_special_tokens=False))
        spelt, ends = self.spelt[1].read(tokens)
        if spelt == text.encode() and len(ends) == len(tokens):
            return tokens, ends
        # It changes what it reads, or does not know it all: then its own account of which characters it took.
        given = self.teacher.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = cast("list[tuple[int, int]]", given["offset_mapping"])
        before = [0]
        for character in text:
            before.append(before[-1] + len(character.encode()))
        return tokens, [before[end] for _, end in spans]

    @cached_property
    def lifting(self) -> Lifting:
        """Of the teacher's law onto the student's vocabulary, where that extends the teacher's."""
        from leibler.policy.extension import Lifting

        return Lifting(self)

    def merged(self, law: TargetRows, reading: Reading) -> Merged:
        """A law over the teacher's entries at the events of a reading, as the target of the student's."""
        return Merged(self.maps[0], law, self.maps[1], reading.present)
