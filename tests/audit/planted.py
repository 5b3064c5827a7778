"""A file of rows with planted defects, one a row, among clean ones: each with what an audit has to say of it.

python tests/audit/planted.py planted.jsonl
"""

import json
import pathlib
import random
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

_SAID = (
    "harbour library orchard station bakery museum garden bridge theatre market river valley lantern winter summer "
    "copper silver window kitchen blanket ladder saddle horse wagon candle pepper barley clover maple cedar willow "
    "raven falcon otter badger salmon oyster pebble canyon meadow island village castle tower cellar attic mirror "
    "carpet basket bottle kettle hammer chisel needle thread button ribbon collar pocket letter pencil paper journal "
    "morning evening shadow thunder breeze harvest festival journey captain sailor farmer baker weaver painter doctor "
    "teacher neighbour cousin traveller quiet narrow gentle ancient crooked polished golden distant hollow frozen early"
)
WORDS = _SAID.split()
BENCHMARK = (
    "A farmer keeps seventeen grey geese and sells four of them on the first market day of May, and buys two more."
)
LONG_ANSWER = "The path goes on past {i} old oaks, and beside it runs a narrow brook with {i} stones. "


class Planted(NamedTuple):
    """A defect: its name, the line, and what is said of it: a `reason` it is lost for, `flags`, or that it is a copy.

    `copy` is exact, near or benchmark; `clean` rows have none of these.
    """

    name: str
    line: bytes
    reason: str | None = None
    flags: tuple[str, ...] = ()
    copy: str | None = None

    @property
    def clean(self) -> bool:
        return self.reason is None and not self.flags and self.copy is None


def answer(i: int) -> str:
    """An answer of its own for each number, of about forty words."""
    draw = random.Random(i)
    said = [" ".join(["the", *draw.sample(WORDS, 7), "of", *draw.sample(WORDS, 3)]) for _ in range(3)]
    return " ".join(f"{text[0].upper()}{text[1:]}." for text in said) + f" That opens in {1800 + i}."


def question(i: int) -> str:
    """A question of its own for each number."""
    return f"Where is the {' '.join(random.Random(~i).sample(WORDS, 6))}?"


def chat(*turns: tuple[str, Any]) -> bytes:
    """A row of messages."""
    return json.dumps(
        {"messages": [{"role": role, "content": content} for role, content in turns]}, ensure_ascii=False
    ).encode()


def pair(i: int, said: str | None = None, *, asked: str | None = None) -> bytes:
    """A row with one question and its answer."""
    return chat(("user", question(i) if asked is None else asked), ("assistant", answer(i) if said is None else said))


def unreadable() -> Iterator[Planted]:
    """Lines that are no rows."""
    yield Planted("truncated JSON", pair(100)[:-9], "invalid JSON")
    yield Planted("plain text", b"Where is the harbour? It lies by the sea.", "invalid JSON")
    yield Planted("single quotes", b"{'messages': []}", "invalid JSON")
    yield Planted("two objects on a line", pair(101) + pair(102), "invalid JSON")
    yield Planted("trailing comma", pair(103)[:-1] + b",}", "invalid JSON")
    yield Planted("byte order mark within the file", b"\xef\xbb\xbf" + pair(104), "invalid JSON")
    yield Planted(
        "bytes that are no UTF-8",
        pair(105).replace(b"harbour", b"harb\xe9ur").replace(b"opens", b"op\xffns"),
        "not UTF-8",
    )
    yield Planted("a list", b'["messages"]', "not an object")
    yield Planted("a number", b"17", "not an object")
    yield Planted("null", b"null", "not an object")


def malformed() -> Iterator[Planted]:
    """Rows that are no conversations."""
    yield Planted("no messages column", b'{"text": "hello"}', "missing column")
    yield Planted("messages is null", b'{"messages": null}', "wrong type")
    yield Planted("messages is text", b'{"messages": "user: hello"}', "wrong type")
    yield Planted("messages is empty", b'{"messages": []}', "no assistant turn")
    yield Planted("a message is text", b'{"messages": ["hello", "hello to you"]}', "wrong type")
    yield Planted("unknown role", chat(("user", question(110)), ("robot", answer(110))), "unknown role")
    yield Planted("no role", json.dumps({"messages": [{"content": "a"}, {"content": "b"}]}).encode(), "wrong type")
    yield Planted("role is a number", chat((1, question(111)), ("assistant", answer(111))), "unknown role")  # type: ignore[arg-type]
    yield Planted("content is a number", chat(("user", 5), ("assistant", answer(112))), "wrong type")
    yield Planted("content is an object", chat(("user", {"a": 1}), ("assistant", answer(113))), "wrong type")
    yield Planted("answer is null", chat(("user", question(114)), ("assistant", None)), "empty answer")
    yield Planted("no assistant turn", chat(("user", question(115))), "no assistant turn")
    yield Planted("system alone", chat(("system", "Be brief.")), "no assistant turn")
    yield Planted("empty answer", chat(("user", question(116)), ("assistant", "")), "empty answer")
    yield Planted("answer of white space", chat(("user", question(117)), ("assistant", " \n\t ")), "empty answer")
    turn = {"role": "assistant", "content": answer(118), "weight": -1}
    weighed = json.dumps({"messages": [{"role": "user", "content": question(118)}, turn]}).encode()
    yield Planted("negative weight", weighed, "wrong type")
    yield Planted("weight is text", weighed.replace(b"-1", b'"one"').replace(b"118", b"119"), "wrong type")
    yield Planted("every weight zero", weighed.replace(b"-1", b"0").replace(b"118", b"120"), "no trained token")
    long = "".join(LONG_ANSWER.format(i=i) for i in range(900, 1100))
    yield Planted("over length", chat(("user", question(121)), ("assistant", long)), "over length")


def odd() -> Iterator[Planted]:
    """Rows that are trained on, with something to look at."""

    def flagged(name: str, line: bytes, *flags: str) -> Planted:
        return Planted(name, line, flags=flags)

    yield flagged("mojibake", pair(130, answer(130).replace("of", "cafÃ© of")), "mojibake")
    yield flagged("mojibake of quotes", pair(131, "Itâ€™s so. " + answer(131)), "mojibake")
    yield flagged("replacement characters", pair(132, answer(132).replace("o", "\ufffd", 1)), "replacement characters")
    yield flagged("control characters", pair(133, answer(133).replace(" ", "\x07", 1)), "control characters")
    yield flagged("a vertical tab", pair(134, answer(134).replace(" ", "\x0b", 1)), "control characters")
    yield flagged("zero-width spaces", pair(135, answer(135).replace(" ", "\u200b ", 1)), "invisible characters")
    yield flagged("text turned around", pair(136, "\u202e" + answer(136)), "invisible characters")
    yield flagged("accents by themselves", pair(137, answer(137).replace("e", "e\u0301", 1)), "letters not in NFC")
    yield flagged("chat mark", pair(138, answer(138) + "<|im_end|>"), "marks of a chat template")
    yield flagged("Llama mark", pair(139, asked="[INST] " + question(139) + " [/INST]"), "marks of a chat template")
    yield flagged("Alpaca mark", pair(140, answer(140) + "\n\n### Instruction:\nAnd then?"), "marks of a chat template")
    yield flagged("double BOS", pair(141, asked="<s>" + question(141)), "a special token in the text")
    yield flagged("end of text inside", pair(142, answer(142) + "</s> And more."), "a special token in the text")
    yield flagged("HTML entities", pair(143, answer(143).replace(" of ", " &amp; ", 1)), "HTML entities")
    yield flagged("a loop", pair(144, answer(144) + " and then on again" * 12), "repeats itself")
    yield flagged("code fence left open", pair(145, answer(145) + "\n```python\nprint(145)\n"), "code fence left open")
    yield flagged("empty question", pair(146, asked=" "), "empty question")
    twice = chat(
        *[("user", question(147)), ("assistant", answer(147)), ("user", question(147)), ("assistant", answer(148))]
    )
    yield flagged("the same question twice", twice, "the same question twice")
    refusal = "I'm sorry, but I cannot help with that request, since it is about a place that I know nothing of at all."
    yield flagged("refusal", pair(149, refusal), "refuses")
    longer = "Please tell me all that you know about the old lighthouse at the mouth of the river Elm."
    yield flagged("copies the question", pair(150, longer, asked=longer), "copies the instruction")
    yield flagged("very short answer", pair(151, "At ten."), "answer under 20 tokens")
    thinking = pair(152, "<think>\nIt must be far.\n" + answer(152))
    yield flagged("a thought that never ends", thinking, "marks of reasoning left")


def copies() -> Iterator[Planted]:
    """Rows that stand elsewhere already."""
    yield Planted("exact duplicate", pair(0), copy="exact")
    yield Planted("duplicate in capitals", pair(1, answer(1).upper(), asked=question(1).upper()), copy="exact")
    yield Planted("duplicate with other spaces", pair(2, answer(2).replace(" ", "  ")), copy="exact")
    yield Planted("near duplicate", pair(3, answer(3).replace("That opens", "It opens")), copy="near")
    yield Planted("a benchmark's question", pair(160, asked=BENCHMARK + " How many are left?"), copy="benchmark")


def planted() -> list[Planted]:
    """All rows, in the order of the file: clean rows before, between and after the defects."""
    defects = [*unreadable(), *malformed(), *odd(), *copies()]
    clean = [Planted(f"clean {i}", pair(i)) for i in range(len(defects) + 10)]
    rows = clean[:10]
    for defect, between in zip(defects, clean[10:], strict=True):
        rows += [defect, between]
    return rows


def write(path: pathlib.Path) -> list[Planted]:
    """Writes the file; returns its rows, line by line."""
    rows = planted()
    path.write_bytes(b"".join(row.line + b"\n" for row in rows))
    return rows


if __name__ == "__main__":
    kinds = [row for row in write(pathlib.Path(sys.argv[1])) if not row.clean]
    print(f"{sys.argv[1]}: {len(kinds)} kinds of defects")
