"""FastChat's rules for conversations that were collected from web pages, each an option of the sharegpt format."""

import dataclasses
import html.parser
import itertools
import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from jaxtune.data.records import Message, NothingToLearn

_SHORTEST = 16


class ShareGptOptions(BaseModel):
    """`clean` applies FastChat's rules: see `clean`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    clean: bool = False
    drop_listed: tuple[str, ...] = ()
    html_to_markdown: bool = False
    min_chars: Annotated[int, Field(ge=0)] | None = None


def clean(messages: Sequence[Message], options: ShareGptOptions) -> list[Message]:
    """The messages that the rules leave; raises NothingToLearn, saying why, for a conversation that they reject.

    In order: HTML becomes Markdown (`html_to_markdown`); turns before the first user turn are dropped, and the
    conversation ends before the first turn that is empty or begins with an unprintable character, and after its last
    answer (`clean`); turns that then do not alternate, fewer characters than `min_chars` (16 under `clean`), or a
    word of `drop_listed` anywhere, in any case, reject it.
    """
    out = list(messages)
    if options.html_to_markdown:
        out = [dataclasses.replace(m, content=html_to_markdown(m.content)) for m in out]
    if options.clean:
        out = _trimmed(out)
    said = [m for m in out if m.role != "system"]
    fewest = options.min_chars if options.min_chars is not None else _SHORTEST if options.clean else 0
    if sum(len(m.content) for m in said) < fewest and not any(m.tool_calls for m in said):
        raise NothingToLearn(f"fewer than {fewest} characters")
    text = "\n".join(m.content for m in said).casefold()
    for words in options.drop_listed:
        if words.casefold() in text:
            raise NothingToLearn(f"a word of drop_listed ({words})")
    return out


def _trimmed(messages: Sequence[Message]) -> list[Message]:
    system = [m for m in messages[:1] if m.role == "system"]
    turns = list(messages[len(system) :])
    while turns and turns[0].role != "user":
        del turns[0]
    for i, turn in enumerate(turns):
        first = turn.content.lstrip()[:1]
        if turn.is_blank or (first and not first.isprintable()):
            del turns[i:]
            break
    while turns and turns[-1].role != "assistant":
        del turns[-1]
    if any(a.role == b.role != "tool" or b.role == "system" for a, b in itertools.pairwise(turns)):
        raise NothingToLearn("turns do not alternate")
    return [*system, *turns]


_TAG = re.compile(r"\s*<(div|p|pre|ul|ol|table|blockquote|h[1-6]|span|br)\b[^>]*>", re.IGNORECASE)


def html_to_markdown(text: str) -> str:
    """HTML as Markdown, code and tables kept; a text that does not begin and end with a tag stays as it is."""
    if not _TAG.match(text) or not text.rstrip().endswith(">"):
        return text
    writer = _MarkdownWriter()
    writer.feed(text)
    writer.close()
    return writer.result()


_BLOCKS = ("p", "div", "ul", "ol", "table", "blockquote", "section", "article")
_AROUND = {"strong": "**", "b": "**", "em": "*", "i": "*"}


class _MarkdownWriter(html.parser.HTMLParser):
    """Writes Markdown as tags open and close; what it does not know it passes over, text never."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.out: list[str] = []
        self.lists: list[int | None] = []  # next number of each open list; None where it has bullets
        self.links: list[str] = []
        self.rows = 0
        self.cells: list[str] | None = None
        self.in_pre = False

    def result(self) -> str:
        return "".join(self.out).strip("\n ")

    def _line(self, blank: int = 1) -> None:
        """Ends the line that was begun; with 2, leaves a blank one."""
        written = "".join(self.out[-8:])
        if written:
            self.out.append("\n" * max(0, blank - (len(written) - len(written.rstrip("\n")))))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "pre":
            self._line(2)
            self.in_pre = True
            self.out.append("```")
        elif tag == "code":
            language = re.search(r"language-([\w+#-]+)", given.get("class") or "")
            if self.in_pre:
                # What stood between is the page's own heading of the block ("python", "Copy code").
                while self.out[-1] != "```":
                    self.out.pop()
                self.out.append((language[1] if language else "") + "\n")
            else:
                self.out.append("`")
        elif tag == "br":
            self.out.append("\n")
        elif re.fullmatch("h[1-6]", tag):
            self._line(2)
            self.out.append("#" * int(tag[1]) + " ")
        elif tag == "li":
            self._line()
            self.out.append("  " * (len(self.lists) - 1) + self._bullet())
        elif tag == "tr":
            self._line()
            self.cells = []
        elif tag in ("td", "th"):
            self.out.append("| ")
            self.cells = [*(self.cells or []), tag]
        elif tag == "a":
            self.links.append(given.get("href") or "")
            self.out.append("[")
        elif tag in _AROUND:
            self.out.append(_AROUND[tag])
        elif tag in _BLOCKS and not self.lists:
            self._line(2)
        if tag in ("ul", "ol"):
            self.lists.append(1 if tag == "ol" else None)
        if tag == "table":
            self.rows = 0

    def _bullet(self) -> str:
        number = self.lists[-1] if self.lists else None
        if number is None:
            return "- "
        self.lists[-1] = number + 1
        return f"{number}. "

    def handle_endtag(self, tag: str) -> None:
        if tag == "pre":
            self._line()
            self.out.append("```")
            self.in_pre = False
            self._line(2)
        elif tag == "code":
            if not self.in_pre:
                self.out.append("`")
        elif tag in ("td", "th"):
            self.out.append(" ")
        elif tag == "tr":
            self.out.append("|")
            self.rows += 1
            if self.rows == 1:
                self.out.append("\n|" + " --- |" * len(self.cells or []))
        elif tag == "a":
            link = self.links.pop() if self.links else ""
            self.out.append(f"]({link})")
        elif tag in _AROUND:
            self.out.append(_AROUND[tag])
        elif tag in ("ul", "ol"):
            if self.lists:
                self.lists.pop()
            self._line(1 if self.lists else 2)
        elif (tag in _BLOCKS or re.fullmatch("h[1-6]", tag)) and not self.lists:
            self._line(2)

    def handle_data(self, data: str) -> None:
        if self.in_pre:
            self.out.append(data)
            return
        text = re.sub(r"\s+", " ", data)
        if text != " " or (self.out and not self.out[-1].endswith(("\n", " "))):
            begun = not self.out or self.out[-1].endswith("\n")
            self.out.append(text.lstrip() if begun else text)
