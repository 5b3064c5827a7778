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
import unicodedata
from typing import Any, NamedTuple

import numpy as np

_SPACE = "\u2581"  # SentencePiece's sign for a space
_UNKNOWN = 1 << 40  # the length of a token whose text is not known: no sum with it is ever right


class Places(NamedTuple):
    """First character of each token and the one past its last, int64 [n] each, counted from `base`.

    `in_bytes`: bytes of UTF-8 stand for characters. Tokens without width, as some tokenizers leave them when they trim
    spaces, end where they begin; `some_empty` says that there may be such.
    """

    start: np.ndarray
    end: np.ndarray
    base: int
    in_bytes: bool
    some_empty: bool

    def first(self, text: str, position: int) -> int:
        """The number of the first token that is not wholly before a character; one without width counts as one wide."""
        end = np.maximum(self.end, self.start + 1) if self.some_empty else self.end
        return int(end.searchsorted(self._unit(text, position), side="right"))

    def until(self, text: str, position: int) -> int:
        """How many tokens begin before a character."""
        return int(self.start.searchsorted(self._unit(text, position), side="left"))

    def _unit(self, text: str, position: int) -> int:
        if self.in_bytes and not text.isascii():
            position = len(text[:position].encode("utf-8", "surrogatepass"))
        return self.base + position


class Encoder:
    """Token ids of texts, and where each token stands; for a `tokenizers.Tokenizer`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._lengths = tokenizer, _token_lengths(tokenizer)

    def encode(self, texts: list[str]) -> list[tuple[np.ndarray, Places]]:
        """(ids int32 [n], places) of each text, without special tokens but those that stand in it."""
        if not texts:
            return []
        if self._lengths is None:
            return [_with_offsets(e) for e in self._tokenizer.encode_batch(texts, add_special_tokens=False)]
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        placed = self._lengths.places([encoding.ids for encoding in found], texts)
        return [
            _with_offsets(self._tokenizer.encode(text, add_special_tokens=False)) if one is None else one
            for text, one in zip(texts, placed, strict=True)
        ]


def _with_offsets(encoding: Any) -> tuple[np.ndarray, Places]:
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    return np.array(encoding.ids, np.int32), Places(offsets[:, 0], offsets[:, 1], 0, in_bytes=False, some_empty=True)


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

    def places(self, ids: list[list[int]], texts: list[str]) -> list[tuple[np.ndarray, Places] | None]:
        """Where the tokens of texts stand, in bytes of UTF-8; None for a text whose tokens do not add up to it.

        All texts are one array here: a handful of numpy calls for each of thousands would take longer than the rest.
        """
        counts = np.array([len(one) for one in ids], np.int64)
        stop = np.cumsum(counts)
        first = stop - counts
        flat = np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(stop[-1]))
        lengths = self.lengths[flat] - self._written(flat, first, counts, texts)
        end = np.cumsum(lengths)
        start = end - lengths
        base = np.where(counts > 0, start[np.minimum(first, len(flat) - 1)], 0) if len(flat) else first
        sizes = np.array([len(t) if t.isascii() else len(t.encode("utf-8", "surrogatepass")) for t in texts], np.int64)
        found = np.where(counts > 0, end[np.minimum(stop, len(flat)) - 1] - base, -1) if len(flat) else counts - 1
        trims = bool(self.lead.any() or self.trail.any())
        some_empty = trims or self.prefix != "never"
        if trims:
            lead = self.lead[flat]
            if self.keeps_first:
                opening = first[counts > 0]
                lead[opening[lead[opening] == 1]] = 0
            start = np.minimum(start + lead, end)
            end = np.maximum(end - self.trail[flat], start)
        right = (found == sizes).tolist()
        out: list[tuple[np.ndarray, Places] | None] = []
        for i, (a, b, zero) in enumerate(zip(first.tolist(), stop.tolist(), base.tolist(), strict=True)):
            foreseen = right[i] and not (self.nfc and not unicodedata.is_normalized("NFC", texts[i]))
            here = slice(a, b)
            out.append((flat[here], Places(start[here], end[here], zero, True, some_empty)) if foreseen else None)
        return out

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


def _token_lengths(tokenizer: Any) -> _TokenLengths | None:
    """The lengths of a tokenizer's tokens; None for a kind that this does not know."""
    return _made_once(tokenizer, tokenizer.get_vocab_size(with_added_tokens=True))


@functools.lru_cache(maxsize=4)
def _made_once(tokenizer: Any, size: int) -> _TokenLengths | None:
    """Templates share a tokenizer, whose vocabulary takes a third of a second to go through."""
    told = json.loads(tokenizer.to_str())
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
    return len(token.replace(_SPACE, " ").encode())


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
        known = {f"Prepend {_SPACE}, Replace {_SPACE}": "every", f"Replace {_SPACE}": "never"}
        return known.get(", ".join(kinds))
    if before["type"] != "Metaspace" or before["replacement"] != _SPACE or kinds:
        return None
    return {"first": "first", "never": "never"}.get(before["prepend_scheme"])


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [step for one in part[inner] for step in _steps(one, inner)] if part["type"] == "Sequence" else [part]
