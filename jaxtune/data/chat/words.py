"""Token ids of texts by their words, each of which the tokenizer is asked for once.

A SentencePiece BPE tokenizer (Llama 2, Mistral, Gemma) takes a whole text as one word, and merges it pair by pair. But
no merge reaches over two characters that no merge puts side by side: in all these none puts a space behind anything but
spaces, and in Llama 2's none puts a letter beside a comma. So a text's tokens are those of the parts between such
places, one after another. A part costs a look-up in place of its merges.
"""

import array
import collections
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

SPACE = "\u2581"  # SentencePiece's sign for a space
_ROOM = 1 << 23  # characters of the words remembered, each word counted as 64 more than it has


class WordEncoder:
    """Token ids of texts; for `model`, a tokenizer's BPE model, `added`, its added tokens, and `alphabets`, each of
    characters that merges put side by side.

    `prefix` says where the tokenizer writes a space that the text does not have: before "every" stretch between added
    tokens, before the "first" if that does not begin with a space, or "never".
    """

    def __init__(self, model: Any, *, added: Mapping[str, int], alphabets: Sequence[str], prefix: str) -> None:
        self._model, self._prefix = tokenizers.Tokenizer(model), prefix
        longest_first = sorted(map(re.escape, added), key=len, reverse=True)
        self._stretches = re.compile(f"({'|'.join(longest_first)})" if added else "((?!))").split
        runs = "|".join([*(f"[{re.escape(alphabet)}]+" for alphabet in alphabets), f"[^{SPACE}]"])
        self._words = re.compile(f"{SPACE}*(?:{runs})|{SPACE}+").findall
        # A word has no space, so that added tokens are never taken for words.
        self._added = {f" {token}": _as_bytes([index]) for token, index in added.items()}
        self._forget()

    def _forget(self) -> None:
        self._known, self._used = dict(self._added), 0

    def encode(self, texts: list[str]) -> list[bytes]:
        """The int32 token ids of each text, without special tokens but those that stand in it."""
        if self._used > _ROOM:
            self._forget()
        known = self._known  # another thread may forget meanwhile
        found = [self._parts(text) for text in texts]
        new = [word for word in set().union(*found) if word not in known]
        for word, encoding in zip(new, self._model.encode_batch_fast(new, add_special_tokens=False), strict=True):
            known[word] = _as_bytes(encoding.ids)
        self._used += sum(map(len, new)) + 64 * len(new)
        return [b"".join(map(known.__getitem__, words)) for words in found]

    def _parts(self, text: str) -> list[str]:
        """`Hello there</s>Yes` -> `▁Hello`, `▁there`, ` </s>`, `Yes`, where the first stretch gets a space."""
        parts: list[str] = []
        for i, stretch in enumerate(self._stretches(text)):
            if i % 2:
                parts.append(f" {stretch}")
            elif stretch:
                spaced = stretch.replace(" ", SPACE)
                first = self._prefix == "first" and i == 0 and spaced[0] != SPACE
                parts += self._words(SPACE + spaced if first or self._prefix == "every" else spaced)
        return parts


def _as_bytes(ids: list[int]) -> bytes:
    return array.array("i", ids).tobytes()


def word_encoder(tokenizer: Any, told: Mapping[str, Any], prefix: str) -> WordEncoder | None:
    """The encoder of a SentencePiece BPE tokenizer with byte fallback, of which `told` is the JSON; None where tokens
    may reach from word to word.
    """
    model, added = told["model"], told["added_tokens"]
    if any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")):
        return None
    if (told["pre_tokenizer"] or {}).get("split"):
        return None
    # The tokenizer looks for those of one kind before those of the other, and for all in one go where there is one.
    if len({token["normalized"] for token in added}) > 1 or not all(token["content"] for token in added):
        return None
    of_bytes = {f"<0x{byte:02X}>" for byte in range(256)}
    if not of_bytes <= model["vocab"].keys():  # else neighbours may become one unknown token
        return None
    merges = [(a, b) for a, b in model["merges"] if a and b]
    if any(b[0] == SPACE != a[-1] or {a, b} & of_bytes for a, b in merges):
        return None
    return WordEncoder(
        tokenizer.model,
        added={token["content"]: token["id"] for token in added},
        alphabets=_alphabets([(a[-1], b[0]) for a, b in merges if a[-1] != SPACE]),
        prefix=prefix,
    )


def _alphabets(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Characters that some merge puts side by side, directly or by way of others; those of most merges first.

    (t h) (h e) (a t) (. .) -> `aeht`, `.`
    """
    head: dict[str, str] = {}  # from character to character, to the one that stands for the alphabet

    def find(character: str) -> str:
        while head.setdefault(character, character) != character:
            head[character] = head[head[character]]
            character = head[character]
        return character

    uses: collections.Counter[str] = collections.Counter()
    for a, b in pairs:
        head[find(a)] = find(b)
        uses[b] += 1
    members: dict[str, list[str]] = collections.defaultdict(list)
    for character in sorted(head):
        members[find(character)].append(character)
    return ["".join(found) for found in sorted(members.values(), key=lambda found: -sum(uses[c] for c in found))]
