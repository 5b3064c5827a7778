"""Where tokens begin in a text, without asking the tokenizer for offsets.

A tokenizer that gives ids alone is half as fast again as one that gives offsets too. For the two kinds that nearly all
models use, byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece BPE with byte fallback (Llama 2, Mistral), every
token stands for a known number of bytes, so the running sum of these is where tokens begin. Whatever a text does that
this does not foresee, its bytes do not add up; then the offsets are asked for after all.
"""

import dataclasses
import json
import unicodedata
from typing import Any, NamedTuple

import numpy as np

_SPACE = "\u2581"  # SentencePiece's sign for a space
_UNKNOWN = 1 << 40  # the length of a token whose text is not known: no sum with it is ever right


class Places(NamedTuple):
    """First character of each token and the one past its last, int64 [n] each, in `unit`s of the text.

    Tokens without width, as some tokenizers leave them when they trim spaces, end where they begin.
    """

    start: np.ndarray
    end: np.ndarray
    in_bytes: bool

    def first(self, text: str, position: int) -> int:
        """The number of the first token that is not wholly before a character; one without width counts as one wide."""
        return int(np.searchsorted(np.maximum(self.end, self.start + 1), self._unit(text, position), side="right"))

    def until(self, text: str, position: int) -> int:
        """How many tokens begin before a character."""
        return int(np.searchsorted(self.start, self._unit(text, position), side="left"))

    def _unit(self, text: str, position: int) -> int:
        return len(text[:position].encode()) if self.in_bytes and not text.isascii() else position


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
        out = []
        for text, encoding in zip(
            texts, self._tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True
        ):
            ids = np.array(encoding.ids, np.int32)
            places = self._lengths.places(ids, text)
            if places is None:
                out.append(_with_offsets(self._tokenizer.encode(text, add_special_tokens=False)))
            else:
                out.append((ids, places))
        return out


def _with_offsets(encoding: Any) -> tuple[np.ndarray, Places]:
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    return np.array(encoding.ids, np.int32), Places(offsets[:, 0], offsets[:, 1], in_bytes=False)


@dataclasses.dataclass(frozen=True)
class _TokenLengths:
    """Bytes that each token stands for.

    `lengths` int64 [V]; `added` bool [V]: tokens that stand alone; `lead`, `trail` int64 [V]: spaces at a token's ends
    that its offsets leave out. `prefix`: where the tokenizer writes a space that the text does not have, which the
    first token there has beside its own bytes: before "every" stretch between added tokens, before the "first" if that
    does not begin with a space, or "never". `nfc`: texts are normalised first. `keeps_first`: one space at the very
    beginning is not left out.
    """

    lengths: np.ndarray
    added: np.ndarray
    lead: np.ndarray
    trail: np.ndarray
    prefix: str
    nfc: bool
    keeps_first: bool

    def places(self, ids: np.ndarray, text: str) -> Places | None:
        """Where the tokens of a text stand, in bytes of UTF-8; None when their bytes do not add up to the text's."""
        ascii_only = text.isascii()
        if not len(ids) or (self.nfc and not ascii_only and not unicodedata.is_normalized("NFC", text)):
            return None
        lengths = self.lengths[ids]
        if self.prefix == "every":
            added = self.added[ids]
            opens = ~added
            opens[1:] &= added[:-1]
            lengths = lengths - opens
        elif self.prefix == "first" and text[0] != " " and not self.added[ids[0]]:
            lengths[0] -= 1
        end = np.cumsum(lengths)
        if end[-1] != (len(text) if ascii_only else len(text.encode("utf-8", "surrogatepass"))):
            return None
        lead = self.lead[ids]
        if self.keeps_first and lead[0]:
            lead[0] -= 1
        start = np.minimum(end - lengths + lead, end)
        return Places(start, np.maximum(end - self.trail[ids], start), in_bytes=True)


def _token_lengths(tokenizer: Any) -> _TokenLengths | None:
    """The lengths of a tokenizer's tokens; None for a kind that this does not know."""
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
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
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
