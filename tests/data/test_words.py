"""Texts encoded by their words: the very ids that the tokenizer gives the whole texts."""

import json
import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.data.chat import words
from jaxtune.data.chat.offsets import Encoder

SPACE = "\u2581"
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, REPLACE]}
RULES = {
    "every": (PREPEND, None),
    "never": (REPLACE, None),
    "first": (None, {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}),
}
TEXTS = st.lists(
    st.one_of(
        st.sampled_from([" ", "  ", SPACE, "\n", ".", ",", "</s>", "<s>", " <s", "the", "The", " of", "42", "<0x0A>"]),
        st.text(max_size=5).filter(lambda text: text.isascii() or text.encode("utf-8", "ignore").decode() == text),
    ),
    max_size=30,
).map("".join)


def told_of(tokenizer, rule="first", **model):
    """The JSON of a tokenizer under another rule for spaces."""
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    told["normalizer"], told["pre_tokenizer"] = RULES[rule]
    for token in told["added_tokens"]:
        token["normalized"] = False
    told["model"] |= model
    return told


@pytest.fixture(scope="module", params=RULES)
def encoders(request, llama_tokenizer):
    """(the tokenizer, our encoder of its words)"""
    made = tokenizers.Tokenizer.from_str(json.dumps(told_of(llama_tokenizer, request.param)))
    encoder = Encoder(made)
    assert encoder._words is not None
    return made, encoder


@settings(max_examples=500, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4))
def test_ids_are_those_of_whole_texts(encoders, texts):
    tokenizer, encoder = encoders
    encoded = encoder.encode(texts)
    ours = [encoded.ids[a:b].tolist() for a, b in zip(encoded.splits, encoded.splits[1:], strict=False)]
    assert ours == [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def test_ids_are_those_of_whole_texts_under_any_merges():
    """Random vocabularies of few characters, in which most merges meet."""
    rng = random.Random(0)
    for trial in range(60):
        tokens, merges = [SPACE, *"abc.,"], []
        for _ in range(rng.randrange(1, 40)):
            a, b = rng.choice(tokens), rng.choice(tokens)
            if a + b not in tokens and not (b[0] == SPACE != a[-1]):
                tokens.append(a + b)
                merges.append((a, b))
        names = [*tokens, *(f"<0x{byte:02X}>" for byte in range(256))]
        model = tokenizers.models.BPE({t: i for i, t in enumerate(names)}, merges, byte_fallback=True)
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.normalizer = tokenizers.normalizers.Replace(" ", SPACE)
        encoder = Encoder(tokenizer)
        assert encoder._words is not None
        texts = ["".join(rng.choices("abc.,  x", k=rng.randrange(1, 60))) for _ in range(40)]
        encoded = encoder.encode(texts)
        ours = [encoded.ids[a:b].tolist() for a, b in zip(encoded.splits, encoded.splits[1:], strict=False)]
        assert ours == [e.ids for e in tokenizer.encode_batch(texts)], (trial, merges)


def test_what_was_forgotten_is_encoded_again(llama_tokenizer, monkeypatch):
    monkeypatch.setattr(words, "_ROOM", 100)
    encoder = Encoder(llama_tokenizer.backend_tokenizer)
    for text in ["Hello there", "an answer of some words", "Hello there</s>"]:
        assert encoder.encode([text]).ids.tolist() == llama_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(encoder._words._known) < 10


@pytest.mark.parametrize(
    "change",
    [
        {"ignore_merges": True},
        {"dropout": 0.1},
        {"merges": [["a", SPACE]]},
        {"merges": [["a", "<0x0A>"]]},
        {"vocab": {"a": 0}},
    ],
    ids=str,
)
def test_a_tokenizer_whose_tokens_may_reach_over_words_is_given_whole_texts(change, llama_tokenizer):
    told = told_of(llama_tokenizer)
    assert words.word_encoder(llama_tokenizer.backend_tokenizer, told, "first") is not None
    told["model"] |= change
    assert words.word_encoder(llama_tokenizer.backend_tokenizer, told, "first") is None


def test_characters_of_one_alphabet_are_those_that_merges_put_side_by_side():
    assert words._alphabets(["th", "he", "at", ".."]) == ["aeht", "."]
