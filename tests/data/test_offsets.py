"""Where tokens stand, from their lengths in bytes: exactly where the tokenizer's own offsets put them."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers, processors

from jaxtune import hub
from jaxtune.data.chat import offsets
from jaxtune.data.chat.templates import load_tokenizer

CORPUS = ["Hello there, how are you? I am well.\n  The answer is 42: yes, e\u0301t\u00e9."] * 50
PIECES = st.sampled_from(
    [
        *"ab Ce1",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "é",
        "é",
        "漢",
        "🙂",
        "▁",
        "ﬁ",
        "\u200d",
        "</s>",
        "<s>",
        " the",
        "Hello",
        "x" * 20,
    ]
)
TEXTS = st.lists(PIECES, min_size=1, max_size=40).map("".join)


def byte_level(*, trim, normalizer=None, split=False):
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim, use_regex=not split)]
    if split:
        steps.insert(0, pre_tokenizers.Split(tokenizers.Regex(r"\\s?\\w+|[^\\w\\s]+|\\s+"), "isolated"))
    model.pre_tokenizer = pre_tokenizers.Sequence(steps)
    model.post_processor = processors.ByteLevel(trim_offsets=trim)
    if normalizer is not None:
        model.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    model.train_from_iterator(CORPUS, trainer)
    return model


def sentencepiece(normalizer, pre_tokenizer):
    """The quickstart's SentencePiece vocabulary under other rules for spaces."""
    told = json.loads(load_tokenizer(hub.resolve_folder("builtin:quickstart")).backend_tokenizer.to_str())
    added = [token for token in told["added_tokens"] if token["special"]]
    told |= {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "added_tokens": added}
    return tokenizers.Tokenizer.from_str(json.dumps(told))


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "split": False}
KINDS = {
    "byte level": lambda: byte_level(trim=False),
    "byte level, trimmed": lambda: byte_level(trim=True),
    "byte level, split by a pattern": lambda: byte_level(trim=True, split=True),
    "byte level, NFC": lambda: byte_level(trim=False, normalizer=normalizers.NFC()),
    "sentencepiece": lambda: sentencepiece(REPLACE, None),
    "sentencepiece, a space before every stretch": lambda: sentencepiece(
        {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, REPLACE]}, None
    ),
    "sentencepiece, a space before the first": lambda: sentencepiece(None, {**METASPACE, "prepend_scheme": "first"}),
    "sentencepiece, no space": lambda: sentencepiece(None, {**METASPACE, "prepend_scheme": "never"}),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    made = KINDS[request.param]()
    assert offsets._what_is_known(made, made.get_vocab_size())[0] is not None, "this kind goes the fast way"
    return made


@settings(max_examples=400, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3), data=st.data())
def test_places_are_those_of_the_offsets(tokenizer, texts, data):
    encoded = offsets.Encoder(tokenizer).encode(texts)
    for t, text in enumerate(texts):
        told = tokenizer.encode(text, add_special_tokens=False)
        begin, end = encoded.splits[t : t + 2]
        assert encoded.ids[begin:end].tolist() == told.ids
        starts = np.array([a for a, _ in told.offsets])
        ends = np.maximum([b for _, b in told.offsets], starts + 1)
        first, stop = sorted(data.draw(st.integers(0, len(text))) for _ in range(2))
        inside = np.flatnonzero((starts < stop) & (ends > first)) + begin
        begins, until = (encoded.place(t, text, position) for position in (first, stop))
        assert list(range(*encoded.first([begins]), *encoded.until([until]))) == inside.tolist()


def test_plain_texts_go_the_fast_way(tokenizer):
    assert offsets.Encoder(tokenizer).encode(["Hello there, \u00e9t\u00e9 is well.</s>\nYes"]).in_bytes == [True]


def test_real_texts_go_the_fast_way(shared, llama_tokenizer):
    rows = [json.loads(line)["question"] for line in (shared / "gsm8k" / "train.jsonl").read_text().splitlines()[:500]]
    assert all(offsets.Encoder(llama_tokenizer.backend_tokenizer).encode(rows).in_bytes)


def test_another_kind_of_tokenizer_is_asked_for_its_offsets():
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"Hello": 0, "there": 1, "?": 2}, unk_token="?"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    encoded = offsets.Encoder(model).encode(["there", "Hello there"])
    assert (encoded.ids.tolist(), encoded.splits, encoded.in_bytes) == ([1, 0, 1], [0, 1, 3], [False, False])
    places = [encoded.place(1, "Hello there", position) for position in (6, 5)]
    assert (encoded.first(places[:1]).tolist(), encoded.until(places[1:]).tolist()) == ([2], [2])
