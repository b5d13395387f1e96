"""Text as tokens come: characters of many tokens, stop strings of many rounds, and a text's first tokens."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from specattn.text import TextStream, first_tokens

TEXT = "naïve café, 日本語 and 😀👍🏽 on\nthe  quick brown fox; 12.5 €"
LONG = "=" * 40


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as in Qwen and Llama 3: some tokens are parts of a character, one is 40 characters long."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    corpus = ["the quick brown fox, a naïve café on the river "] * 9 + [LONG] * 99
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """In the manner of SentencePiece, as in Llama 2, Mistral and Gemma: a token for each byte that has no character."""
    pieces = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefnotx", "▁th"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")


TOKENIZERS = [byte_level, byte_fallback]


def stream_of(text: str, stop: list[str], make=byte_level) -> tuple[TextStream, list[str]]:
    """A stream that has read ``text`` (or up to a stop string) and the pieces that it gave after each token."""
    tokenizer = make()
    stream, pieces = TextStream(tokenizer, stop), []
    for token in tokenizer(text)["input_ids"]:
        stream.push(token)
        pieces.append(stream.take())
        if stream.stopped:
            break
    pieces.append(stream.take(final=True))
    return stream, pieces


@pytest.mark.parametrize("make", TOKENIZERS)
def test_a_character_of_several_tokens_comes_whole(make):
    tokens = make()(TEXT)["input_ids"]
    singles = [make().decode([token]) for token in tokens]
    assert sum("\ufffd" in single for single in singles) > 10, "characters are split in this tokenizer"
    stream, pieces = stream_of(TEXT, [], make)
    assert stream.text == "".join(pieces) == TEXT
    assert len([piece for piece in pieces if piece]) > 20, "text comes as soon as it can"
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("make", TOKENIZERS)
@given(st.data())
def test_any_text_comes_back_whole(make, data):
    # SentencePiece does not tell its first space from the one that it puts there itself.
    text = data.draw(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd▁"), max_size=30))
    if make is byte_fallback:
        text = "x" + text
    stream, pieces = stream_of(text, [], make)
    assert stream.text == "".join(pieces) == text


@pytest.mark.parametrize("make", TOKENIZERS)
@given(st.lists(st.integers(0, 255), max_size=24), st.integers(0, 300))
def test_tokens_that_are_no_text_do_no_harm(make, ids, offset):
    """Random tokens are mostly invalid UTF-8. What follows them must come out again."""
    tokenizer = make()
    stream = TextStream(tokenizer)
    seen = ""
    for token in [(number + offset) % len(tokenizer) for number in ids]:
        stream.push(token)
        seen += stream.take()
    before = len(stream.text)
    for token in tokenizer("x and a fox")["input_ids"]:
        stream.push(token)
    assert stream.text[before:].endswith("and a fox")
    assert seen + stream.take(final=True) == stream.text


def test_an_ascii_byte_before_a_broken_character():
    """Byte tokens are read in runs: what the newline was is another thing once a wrong byte follows."""
    tokenizer = byte_fallback()
    stream = TextStream(tokenizer)
    for piece in ["a", "<0x0A>", "<0xF0>", "b", "c"]:
        stream.push(tokenizer.convert_tokens_to_ids(piece))
    assert stream.text.startswith("a\n")
    assert stream.text.endswith("bc")


def test_special_tokens_are_not_text():
    for make in TOKENIZERS:
        tokenizer = make()
        stream = TextStream(tokenizer, stop=["eos"])
        ids = tokenizer("cat on")["input_ids"]
        for token in [tokenizer.eos_token_id, *ids[:3], tokenizer.eos_token_id, *ids[3:]]:
            stream.push(token)
        assert stream.text == "cat on"
        assert not stream.stopped


def test_a_stop_string_that_spans_tokens():
    for make in TOKENIZERS:
        assert len(make()("quick brown")["input_ids"]) > 1
        stream, pieces = stream_of(TEXT, ["k brow", "never"], make)
        assert stream.stopped
        assert stream.text == "".join(pieces) == TEXT[: TEXT.index("k brow")]


def test_the_first_of_overlapping_stop_strings_ends_the_text():
    assert stream_of("a fox on the river", ["x on t", "ox"])[0].text == "a f"
    assert stream_of("a fox on the river", ["the riv", "e r"], byte_fallback)[0].text == "a fox on th"
    # Two that are complete at once: the text ends before the longer one.
    assert stream_of("abcdef", ["def", "cdef", "f"], byte_fallback)[0].text == "ab"


def test_a_stop_string_is_found_only_in_new_text():
    stream, _ = stream_of("abcabd", ["abd"], byte_fallback)
    assert stream.stopped
    assert stream.text == "abc"


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_none():
    tokenizer = tiny_tokenizer()  # a token a character
    stream = TextStream(tokenizer, stop=["<end>", "nd!"])
    given_out = []
    for token in tokenizer("a <en<end!")["input_ids"]:
        stream.push(token)
        given_out.append(stream.take())
        if stream.stopped:
            break
    assert given_out == ["a", " ", "", "", "", "<en", "", "", "", "<e"]
    assert stream.text == "a <en<e"


def test_a_text_that_is_all_held_back():
    """Shorter than the stop string that it may begin: nothing comes, and later nothing comes twice."""
    tokenizer = tiny_tokenizer()
    stream = TextStream(tokenizer, stop=["abcdefghij"])
    for token in tokenizer("abcdefg")["input_ids"]:
        stream.push(token)
        assert stream.take() == ""
    for token in tokenizer("hix")["input_ids"]:
        stream.push(token)
    assert stream.take() == "abcdefghix"


def test_what_was_held_back_is_flushed_at_the_end():
    stream, pieces = stream_of("see <en", ["<end>"])
    assert not stream.stopped
    assert "".join(pieces[:-1]) == "see "
    assert pieces[-1] == "<en"
    assert stream.take(final=True) == "", "it comes once"


@given(
    st.text("ab<", max_size=20),
    st.lists(st.text("ab<", min_size=1, max_size=6), max_size=3),
    st.lists(st.integers(1, 4), min_size=1),
)
def test_streamed_text_never_runs_ahead_of_a_stop_string(text, stops, rounds):
    """Against a search of the whole text, token by token; text is taken after rounds of several tokens."""
    tokenizer = tiny_tokenizer()
    stream, seen, number = TextStream(tokenizer, stops), "", 0
    for count, token in enumerate(tokenizer(text)["input_ids"], start=1):
        stream.push(token)
        ends = [text[:count].index(stop) for stop in stops if stop in text[:count]]
        assert stream.stopped == bool(ends)
        assert stream.text == text[: min(ends, default=count)]
        number -= 1
        if number <= 0:
            number = rounds[count % len(rounds)]
            seen += stream.take()
            assert stream.text.startswith(seen)
        if ends:
            break
    seen += stream.take(final=True)
    assert seen == stream.text


@pytest.mark.parametrize("make", TOKENIZERS)
@given(st.lists(st.sampled_from([TEXT, LONG, LONG[:31], " ", "the ", "日"]), max_size=40), st.integers(0, 60))
def test_first_tokens_are_those_of_the_whole_text(make, parts, count):
    text = "".join(parts)
    assert first_tokens(make(), text, count) == make()(text)["input_ids"][:count]


def test_first_tokens_of_long_ones():
    """A token of 40 characters is more than a cut at 16 a token leaves room for."""
    tokenizer, text = byte_level(), f"{LONG}\n" * 50
    whole = tokenizer(text)["input_ids"]
    assert len(whole) == 100
    for count in range(102):
        assert first_tokens(tokenizer, text, count) == whole[:count]


def test_a_long_text_is_not_encoded_as_a_whole():
    lengths = []

    def tokenizer(text):
        lengths.append(len(text))
        return {"input_ids": [ord(character) for character in text]}

    assert first_tokens(tokenizer, "book" * 50_000, 6) == [ord(character) for character in "bookbo"]
    assert max(lengths) < 1000
    assert first_tokens(tokenizer, "brief", 6) == [ord(character) for character in "brief"]


def test_token_ids_pass_through():
    assert first_tokens(None, (7, 8, 9), 2) == [7, 8]
    assert first_tokens(None, [7], 2) == [7]
