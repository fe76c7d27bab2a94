"""Two tokenizers over one text: what entries spell, which cells they share, and where both stand between tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from leibler.errors import ModelError
from leibler.policy import CausalLM, character_tokenizer, right_pad, tiny_llama, train_bpe
from leibler.policy.spelling import spelling
from leibler.policy.vocabulary import TextAlignment, common_cells

TEXTS = [
    "the theme of the other theorem, ",
    "there and then: a thing is this. ",
    "é ü 漢字 def f(x):\n    return x\n",
] * 6


def tiny(tokenizer, seed: int = 0, max_length: int = 256) -> CausalLM:
    return tiny_llama(tokenizer, hidden=16, layers=1, heads=2, max_length=max_length, seed=seed)


SMALL, LARGE = tiny(train_bpe(TEXTS, size=275)), tiny(train_bpe(TEXTS, size=330), 1)


def sentencepiece() -> PreTrainedTokenizerFast:
    """Unigram pieces with a leading space and byte fallback, as Llama's first tokenizer has them."""
    plain = ["▁", "▁the", "▁a", "the", "me", "th", *"abcdefghijklmnopqrstuvwxyz,.:"]
    entries = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{b:02X}>", -9.0) for b in range(256))]
    tokenizer = Tokenizer(models.Unigram([*entries, *((p, -3.0) for p in plain)], unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


# ---- spelling ------------------------------------------------------------------------------------------------------


@given(st.text(max_size=30))
@settings(max_examples=60, deadline=None)
def test_byte_level_entries_spell_every_text(text: str) -> None:
    tokenizer = LARGE.tokenizer
    tokens = tokenizer.encode(text)
    data, ends = spelling_of_large.read(tokens)
    assert data == text.encode()
    assert len(ends) == len(tokens)
    assert ends == sorted(ends)
    assert (ends or [0])[-1] == len(data)


spelling_of_large = spelling(LARGE.tokenizer)


def test_sentencepiece_entries_spell_without_the_space_in_front() -> None:
    tokenizer = sentencepiece()
    spelt = spelling(tokenizer)
    assert spelt.lead == b" "
    data, ends = spelt.read(tokenizer.encode("the theme é", add_special_tokens=False))
    assert data == "the theme é".encode()
    assert ends[0] == 3
    assert ends[-2:] == [11, 12]  # two bytes of one letter


def test_what_has_no_spelling_is_refused() -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "[SEP]": 3}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]")
    with pytest.raises(ModelError, match="joins its entries by WordPiece"):
        spelling(wrapped)
    tokenizer.decoder = None
    with pytest.raises(ModelError, match="joins its entries by spaces"):
        spelling(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]"))


# ---- cells ---------------------------------------------------------------------------------------------------------


def _cells(student: CausalLM, teacher: CausalLM, **options) -> tuple[dict[str, int], dict[str, int]]:
    maps = common_cells(student, teacher, **options)
    names = [m.tokenizer.convert_ids_to_tokens(list(range(m.vocab_size))) for m in (student, teacher)]
    return tuple(dict(zip(n, m.cell.tolist(), strict=True)) for n, m in zip(names, maps, strict=True))  # type: ignore


def test_the_same_text_is_the_same_cell_and_the_rest_goes_to_its_first_piece() -> None:
    here, there = _cells(SMALL, LARGE)
    for entry in here.keys() & there.keys():
        assert here[entry] == there[entry] >= 0
    only = sorted(there.keys() - here.keys())
    assert only  # entries of the larger one, whose first piece the smaller one has
    for entry in only:
        text = spelling_of_large.pieces[LARGE.tokenizer.convert_tokens_to_ids(entry)]
        assert text is not None
        try:
            first = SMALL.tokenizer.encode(text.decode())[0]
        except UnicodeDecodeError:
            continue
        assert there[entry] == here[SMALL.tokenizer.convert_ids_to_tokens(first)]
    assert min(here.values()) == min(there.values()) == 0  # with all bytes in both, nothing is left out
    assert len(set(here.values())) == len(here)  # and nothing of the smaller one is merged


def test_what_both_lack_in_the_other_leads_on_to_a_common_piece() -> None:
    """'abc' is read as 'ab' + 'c' by the teacher, which the student lacks, and reads as 'a' + 'b'."""
    models_ = []
    for extra in (["abc"], ["ab"]):
        tokenizer = character_tokenizer("abc")
        tokenizer.add_tokens(extra)
        models_.append(tiny(tokenizer))
    here, there = _cells(*models_)
    assert here["abc"] == there["ab"] == here["a"] == there["a"]
    here, there = _cells(*models_, rest="bucket")
    assert here["abc"] == there["ab"] != here["a"]


def test_special_tokens_are_matched_by_their_part() -> None:
    one = character_tokenizer("ab")
    two = train_bpe(["ab"], size=259)
    two.add_special_tokens({"eos_token": "<|end|>"})
    two.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    one.add_tokens(["<|turn|>"])  # an ordinary entry here, a special one there
    student, teacher = tiny(one), tiny(two)
    here, there = _cells(student, teacher)
    assert here["⟨eos⟩"] == there["<|end|>"] >= 0
    assert here["⟨bos⟩"] == there["⟨bos⟩"] >= 0
    assert here["<|turn|>"] == there["<|turn|>"] >= 0
    assert len({here["⟨eos⟩"], here["⟨bos⟩"], here["⟨pad⟩"], here["<|turn|>"], here["a"]}) == 5


def test_the_end_is_the_end_whatever_its_name() -> None:
    """Each ends with a token that the other has too, for something else."""
    sides = []
    for end, other in (("<A>", "<B>"), ("<B>", "<A>")):
        tokenizer = train_bpe(["ab"], size=259)
        tokenizer.add_special_tokens({"eos_token": end, "additional_special_tokens": [other]})
        sides.append(tiny(tokenizer))
    here, there = _cells(*sides)
    assert here["<A>"] == there["<B>"] >= 0
    assert here["<B>"] != here["<A>"]
    assert there["<A>"] != there["<B>"]


def test_an_unknown_character_is_what_the_other_calls_unknown_or_left_out() -> None:
    narrow, wide = tiny(character_tokenizer("ab")), tiny(character_tokenizer("abc"))
    here, there = _cells(narrow, wide)
    assert there["c"] == here["⟨unk⟩"] == there["⟨unk⟩"] >= 0
    here, there = _cells(tiny(train_bpe(["ab"], size=259)), wide)
    assert here["z"] == here["Ã"] == there["⟨unk⟩"] >= 0  # a letter and a byte that are not in its alphabet
    assert there["c"] == here["c"] != here["z"]
    with_unknown = train_bpe(["ab"], size=259)
    with_unknown.add_special_tokens({"unk_token": "<unk>"})
    here, there = _cells(tiny(train_bpe(["ab"], size=259)), tiny(with_unknown))
    assert there["<unk>"] == -1


def test_nothing_in_common() -> None:
    with pytest.raises(ModelError, match="No text is spelt by an entry of both"):
        common_cells(tiny(character_tokenizer("ab")), tiny(character_tokenizer("xy")))


# ---- positions -----------------------------------------------------------------------------------------------------


def batch(model: CausalLM, *texts: tuple[str, str]):
    return right_pad([(model.encode_prompt(p), model.encode_completion(c)) for p, c in texts])


def read_so_far(model: CausalLM, tokens: torch.Tensor) -> bytes:
    return spelling(model.tokenizer).read(tokens.tolist())[0]


PAIRS = [("the ", "theorem of é"), ("a thing", ": 漢字 and then"), ("def", " f(x):\n    return x\n")]


@pytest.mark.parametrize("swap", [False, True])
def test_both_have_read_the_same_wherever_they_are_compared(swap: bool) -> None:
    student, teacher = (LARGE, SMALL) if swap else (SMALL, LARGE)
    tokens, attention, mask = batch(student, *PAIRS)
    reading = TextAlignment(student, teacher).read(tokens, attention, mask)
    row, time = mask.nonzero(as_tuple=True)
    width = reading.tokens.shape[1]
    shared = 0
    for event, (i, t) in enumerate(zip(row.tolist(), time.tolist(), strict=True)):
        mine = read_so_far(student, tokens[i, : t + 1])
        lengths = [
            len(read_so_far(teacher, reading.tokens[i, : n + 1])) for n in range(int(reading.attention[i].sum()))
        ]
        assert bool(reading.present[event]) == (len(mine) in lengths)
        if reading.present[event]:
            j, n = divmod(int(reading.place[event]), width)
            assert j == i
            assert read_so_far(teacher, reading.tokens[i, : n + 1]) == mine
            shared += 1
    assert shared > 0
    assert swap or shared < len(row)


def test_equal_tokenizers_share_every_position() -> None:
    tokens, attention, mask = batch(SMALL, *PAIRS)
    twin = tiny(train_bpe(TEXTS, size=275), 5)
    reading = TextAlignment(SMALL, twin).read(tokens, attention, mask)
    assert bool(reading.present.all())
    row, time = mask.nonzero(as_tuple=True)
    assert reading.place.tolist() == (row * reading.tokens.shape[1] + time).tolist()


def test_left_padding_changes_nothing() -> None:
    tokens, attention, mask = batch(SMALL, *PAIRS)
    alignment = TextAlignment(SMALL, LARGE)
    right = alignment.read(tokens, attention, mask)
    order = attention.int().argsort(dim=1, stable=True)  # padding first
    moved = (tokens.gather(1, order), attention.gather(1, order))
    ends = torch.zeros_like(attention)
    ends[:, 1:] = mask
    left = alignment.read(*moved, ends.gather(1, order)[:, 1:])
    for name in ("tokens", "place", "present"):
        assert torch.equal(getattr(left, name), getattr(right, name))


def test_bytes_that_are_no_text_are_read_as_bytes() -> None:
    student = SMALL
    (lead,) = (n for n, p in enumerate(spelling(student.tokenizer).pieces) if p == b"\xe6")
    completion = [*student.tokenizer.encode("the"), lead, *student.tokenizer.encode("me"), lead]
    rows = right_pad([(student.encode_prompt("a "), completion)])
    reading = TextAlignment(student, LARGE).read(*rows)
    assert bool(reading.present[-1])
    assert read_so_far(LARGE, reading.tokens[0, : int(reading.place[-1]) + 1]) == b"a the\xe6me"
    letters = tiny(character_tokenizer("abcdefghijklmnopqrstuvwxyz "))
    reading = TextAlignment(student, letters).read(*rows)  # it has no bytes: nothing after them is compared
    before = len(student.tokenizer.encode("the"))
    assert bool(reading.present[: before + 1].all())
    assert not reading.present[before + 1 :].any()


def test_a_character_that_the_teacher_does_not_know_is_still_read() -> None:
    letters = tiny(character_tokenizer("abcdefghijklmnopqrstuvwxyz "))
    student = tiny(train_bpe(["x"], size=259))
    reading = TextAlignment(student, letters).read(*batch(student, ("a", "bé c")))
    # before b, before é, (inside é), before the space, before c, at the end
    assert reading.present.tolist() == [True, True, False, True, True, True]


def test_sentencepiece_and_bytes_meet() -> None:
    model = tiny(sentencepiece())
    for student, teacher in ((model, SMALL), (SMALL, model)):
        tokens, attention, mask = batch(student, ("the a", "the me é."))
        reading = TextAlignment(student, teacher).read(tokens, attention, mask)
        assert bool(reading.present[0])
        assert bool(reading.present[-1])
        end = int(reading.place[-1]) + 1
        assert read_so_far(teacher, reading.tokens[0, :end]).replace(b" ", b"") == "theatheme\u00e9.".encode()


def test_beyond_the_teachers_context_nothing_is_compared() -> None:
    short = tiny(train_bpe(TEXTS, size=330), 1, max_length=6)
    rows = batch(SMALL, ("the ", "theorem of the thing and this"))
    reading, whole = (TextAlignment(SMALL, t).read(*rows) for t in (short, LARGE))
    assert reading.tokens.shape[1] == 6
    shown = whole.present & (whole.place < 6)
    assert torch.equal(reading.present, shown)
    assert bool(shown.any())
    assert not bool(shown.all())


def test_a_cut_response_asks_for_no_end() -> None:
    tokens = SMALL.encode_completion("the theme")[:-1]
    reading = TextAlignment(SMALL, LARGE).read(*right_pad([(SMALL.encode_prompt("a "), tokens)]))
    assert len(reading.present) == len(tokens)
    assert bool(reading.present[0])


def test_an_empty_prompt_and_an_empty_response() -> None:
    other = tiny(sentencepiece())  # whose begin token has another name
    reading = TextAlignment(SMALL, other).read(*batch(SMALL, ("", ""), ("", "the")))
    assert bool(reading.present[0])
    assert bool(reading.present[1])
    assert reading.tokens[:, 0].tolist() == [other.tokenizer.bos_token_id] * 2
    assert reading.attention.sum(1).tolist()[0] == 1


def test_a_tokenizer_that_changes_what_it_reads_tells_by_itself_where_it_stands() -> None:
    lower = train_bpe(["be é c"], size=259)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    letters = tiny(character_tokenizer("BÉC bec"))
    reading = TextAlignment(letters, tiny(lower)).read(*batch(letters, ("b", "BÉ C")))
    assert bool(reading.present.all())
    assert reading.place.tolist() == [0, 1, 3, 4, 5]  # both bytes of the letter are read at once
