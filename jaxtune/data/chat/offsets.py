"""Where tokens begin in a text, without asking the tokenizer for offsets.

A tokenizer that gives ids alone is half as fast again as one that gives offsets too. For the two kinds that nearly all
models use, byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece BPE with byte fallback (Llama 2, Mistral), every
token stands for a known number of bytes, so the running sum of these is where tokens begin. Whatever a text does that
this does not foresee, its bytes do not add up; then the offsets are asked for after all.
"""

import dataclasses
import functools
import itertools
import json
import operator
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.data.chat.words import SPACE, WordEncoder, word_encoder

_UNKNOWN = 1 << 40  # the length of a token whose text is not known: no sum with it is ever right


class Encoded(NamedTuple):
    """Texts as tokens, end to end, and where each token stands.

    Text t has the tokens `splits[t]` .. `splits[t + 1]` of `ids`, int32 [tokens]. `start` and `end`, int64 [tokens],
    are a token's first character and the one past its last, counted on from text to text: text t begins at `base[t]`,
    and a gap of one keeps texts apart. `in_bytes[t]`: bytes of UTF-8 stand for characters. Tokens without width, as
    some tokenizers leave them when they trim spaces, count as one character wide.
    """

    ids: np.ndarray
    splits: list[int]
    start: np.ndarray
    end: np.ndarray
    base: list[int]
    in_bytes: list[bool]

    def place(self, t: int, text: str, position: int) -> int:
        """Where a character of text t, which is `text`, is counted."""
        if self.in_bytes[t] and not text.isascii():
            position = len(text[:position].encode("utf-8", "surrogatepass"))
        return self.base[t] + position

    def first(self, places: Sequence[int]) -> np.ndarray:
        """For each place the number of the first token of its text that is not wholly before it, int64."""
        return self.end.searchsorted(np.array(places, np.int64), side="right")

    def until(self, places: Sequence[int]) -> np.ndarray:
        """For each place the number of the first token that does not begin before it, int64."""
        return self.start.searchsorted(np.array(places, np.int64), side="left")


class Encoder:
    """Token ids of texts, and where each token stands; for a `tokenizers.Tokenizer`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lengths, self._words = _what_is_known(tokenizer, tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, texts: list[str]) -> Encoded:
        """The texts' tokens, without special ones but those that stand in a text.

        All texts are one array: a handful of numpy calls for each of thousands would take longer than the rest.
        """
        flat, counts, encodings = self._ids(texts)
        splits = [0, *np.cumsum(counts).tolist()]
        sizes = np.array([len(t) if t.isascii() else len(t.encode("utf-8", "surrogatepass")) for t in texts], np.int64)
        base = np.cumsum(sizes + 1) - (sizes + 1)
        if self._lengths is None:
            start, end = np.zeros((2, len(flat)), np.int64)
            adds_up = [False] * len(texts)
        else:
            start, end, adds_up = self._lengths.places(flat, counts, texts, sizes)
            start += np.repeat(base, counts)
            end += np.repeat(base, counts)
        for t in itertools.compress(range(len(texts)), map(operator.not_, adds_up)):
            asked = encodings[t] if encodings else self._tokenizer.encode(texts[t], add_special_tokens=False)
            here = slice(splits[t], splits[t + 1])
            start[here], end[here] = base[t] + np.array(asked.offsets, np.int64).reshape(-1, 2).T
        return Encoded(flat, splits, start, np.maximum(end, start + 1), base.tolist(), adds_up)

    def _ids(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray, Sequence[Any]]:
        """The ids of all texts, int32, how many each has, int64, and the encodings with offsets if there are any."""
        if self._words is not None:
            words = self._words.encode(texts)
            return np.frombuffer(b"".join(words), np.int32), np.array([len(one) // 4 for one in words], np.int64), ()
        known = self._lengths is not None
        encode_batch = self._tokenizer.encode_batch_fast if known else self._tokenizer.encode_batch
        encodings = encode_batch(texts, add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        counts = np.array([len(one) for one in ids], np.int64)
        flat = np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(counts.sum()))
        return flat, counts, () if known else encodings


@dataclasses.dataclass(frozen=True)
class _TokenLengths:
    """Bytes that each token stands for.

    `lengths` int64 [V]; `added` bool [V]: tokens that stand alone; `lead`, `trail` int64 [V]: spaces at a token's ends
    that its offsets leave out. `prefix`: where the tokenizer writes a space that the text does not have, which the
    first token there has beside its own bytes: before "every" stretch between added tokens, before the "first" if that
    does not begin with a space, or "never". `nfc`: texts are normalised first. `keeps_first`: a single space at
    the very beginning is not left out.
    """

    lengths: np.ndarray
    added: np.ndarray
    lead: np.ndarray
    trail: np.ndarray
    prefix: str
    nfc: bool
    keeps_first: bool

    def places(
        self, flat: np.ndarray, counts: np.ndarray, texts: list[str], sizes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, list[bool]]:
        """First byte of each token and the one past its last, each from its text's beginning, int64 [tokens]; and which
        texts their tokens add up to.

        Text t has `counts[t]` of the tokens `flat` and `sizes[t]` bytes of UTF-8.
        """
        if not len(flat):
            return *np.zeros((2, 0), np.int64), (sizes == 0).tolist()
        stop = np.cumsum(counts)
        first = stop - counts
        lengths = self.lengths[flat] - self._written(flat, first, counts, texts)
        end = np.cumsum(lengths)
        begin = np.concatenate([[0], end])[first]
        found = np.concatenate([[0], end])[stop] - begin
        end -= np.repeat(begin, counts)
        start = end - lengths
        if self.lead.any() or self.trail.any():
            lead = self.lead[flat]
            if self.keeps_first:
                opening = first[counts > 0]
                lead[opening[lead[opening] == 1]] = 0
            start = np.minimum(start + lead, end)
            end = np.maximum(end - self.trail[flat], start)
        adds_up = (found == sizes).tolist()
        if self.nfc:
            adds_up = [one and unicodedata.is_normalized("NFC", t) for one, t in zip(adds_up, texts, strict=True)]
        return start, end, adds_up

    def _written(self, flat: np.ndarray, first: np.ndarray, counts: np.ndarray, texts: list[str]) -> Any:
        """1 for each token that has a space of the tokenizer's own, else 0."""
        if self.prefix == "never" or not len(flat):
            return 0
        added = self.added[flat]
        if self.prefix == "every":
            opens = ~added
            opens[1:] &= added[:-1]
            opens[first[counts > 0]] = ~added[first[counts > 0]]
            return opens
        spaced = np.zeros(len(flat), bool)
        begins = np.array([text[:1] not in ("", " ") for text in texts]) & (counts > 0)
        spaced[first[begins]] = ~added[first[begins]]
        return spaced


@functools.lru_cache(maxsize=4)
def _what_is_known(tokenizer: Any, size: int) -> tuple[_TokenLengths | None, WordEncoder | None]:
    """The lengths of a tokenizer's tokens, and its words' encoder; None for kinds that this does not know.

    Templates share a tokenizer, whose vocabulary takes a third of a second to go through.
    """
    told = json.loads(tokenizer.to_str())
    lengths = _token_lengths(tokenizer, told, size)
    is_sentencepiece = lengths is not None and _trims(told) is None
    return lengths, word_encoder(tokenizer, told, lengths.prefix) if lengths and is_sentencepiece else None


def _token_lengths(tokenizer: Any, told: dict[str, Any], size: int) -> _TokenLengths | None:
    changed = told["normalizer"] is not None
    plain = all(
        not (t["lstrip"] or t["rstrip"] or t["single_word"] or (changed and t["normalized"]))
        for t in told["added_tokens"]
    )
    if told["model"]["type"] != "BPE" or not plain:
        return None
    trims = _trims(told)
    prefix = "never" if trims is not None else _prefix(told)
    if prefix is None:
        return None
    size = max(size, 1 + max(tokenizer.get_vocab(with_added_tokens=True).values()))
    lengths = np.full(size, _UNKNOWN, np.int64)
    lead, trail, added = np.zeros(size, np.int64), np.zeros(size, np.int64), np.zeros(size, bool)
    for token, index in told["model"]["vocab"].items():
        lengths[index] = _sentencepiece_bytes(token) if trims is None else len(token)
        if trims:
            lead[index], trail[index] = (len(token) - len(t) for t in (token.lstrip("\u0120"), token.rstrip("\u0120")))
    for token in told["added_tokens"]:
        index, unknown = token["id"], token["content"] == told["model"].get("unk_token")
        lengths[index] = _UNKNOWN if unknown else len(token["content"].encode())
        added[index], lead[index], trail[index] = True, 0, 0
    nfc = told["normalizer"] is not None and told["normalizer"]["type"] == "NFC"
    after = [s for s in _steps(told["post_processor"], "processors") if s["type"] == "ByteLevel"]
    keeps_first = any(s["trim_offsets"] and s["add_prefix_space"] for s in after)
    return _TokenLengths(lengths, added, lead, trail, prefix, nfc, keeps_first)


def _sentencepiece_bytes(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace(SPACE, " ").encode())


def _trims(told: dict[str, Any]) -> bool | None:
    """Whether a byte-level tokenizer trims spaces off its offsets; None when it is not byte-level as GPT-2's is."""
    if told["normalizer"] is not None and told["normalizer"]["type"] != "NFC":
        return None
    steps = _steps(told["pre_tokenizer"], "pretokenizers")
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if any(s["type"] not in ("Split", "Digits") or s.get("behavior", "Isolated") != "Isolated" for s in steps[:-1]):
        return None
    return any(s["type"] == "ByteLevel" and s["trim_offsets"] for s in _steps(told["post_processor"], "processors"))


def _prefix(told: dict[str, Any]) -> str | None:
    """Where a SentencePiece tokenizer writes a space of its own; None when it is of another kind."""
    if not told["model"]["byte_fallback"]:
        return None
    before = told["pre_tokenizer"]
    kinds = [f"{s['type']} {s.get('prepend') or s.get('content')}" for s in _steps(told["normalizer"], "normalizers")]
    if before is None:
        known = {f"Prepend {SPACE}, Replace {SPACE}": "every", f"Replace {SPACE}": "never"}
        return known.get(", ".join(kinds))
    if before["type"] != "Metaspace" or before["replacement"] != SPACE or kinds:
        return None
    return {"first": "first", "never": "never"}.get(before["prepend_scheme"])


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [step for one in part[inner] for step in _steps(one, inner)] if part["type"] == "Sequence" else [part]
