"""Which examples a page shows, and each as the model sees it: token by token, with weights, and packed into rows."""

import collections
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune.audit.flags import flags
from jaxtune.audit.survey import Surveyed
from jaxtune.data.examples import RowReader
from jaxtune.data.packing import Example, Pair
from jaxtune.data.quality.kinds import KINDS
from jaxtune.data.quality.scores import Scores
from jaxtune.data.records import Message, NothingToLearn, RowError
from jaxtune.data.row_results import STAGES
from jaxtune.data.row_texts import row_key, texts_of

_EACH = 40  # examples shown of one problem of one source, at most; fewer where there are more than ten sources
_LEAST_EACH, _MOST = 2, 2000  # and of all problems together
_PACKED_ROWS = 12
_MOST_TOKENS = 4096  # shown of one example; the rest is counted
_RAW = 4000  # characters shown of a row that cannot be read
_LONG = 50_000  # and of a message; a longer one cannot be corrected on the page


class Samples:
    """Examples for a page, problems first: `count` drawn at random by `seed`, and of each problem some."""

    def __init__(self, surveyed: Surveyed, *, count: int, seed: int) -> None:
        self.surveyed = surveyed
        self.pieces: dict[int, tuple[str, str]] = {}
        self.tokenizer = surveyed.reading.tokenizer
        drawn = _drawn(surveyed, count, seed)
        self.examples = [self._example(*one) for one in drawn]
        self.rows = self._packed()

    def as_json(self) -> dict[str, Any]:
        """The `examples`, the packed `rows`, and the text of every token among them by its id."""
        special = sorted(set(self.tokenizer.all_special_ids) & set(self.pieces))
        return {
            "examples": self.examples,
            "rows": self.rows,
            "row_length": list(self.surveyed.stream.maker.rows.room),
            "pieces": {str(i): pair for i, pair in sorted(self.pieces.items())},
            "special": special,
        }

    def _example(self, leaf: int, entry: int, problems: Sequence[str], at_random: bool) -> dict[str, Any]:
        look = self.surveyed.look
        reader, table, facts = look.leaves[leaf].reader, look.tables[leaf], look.facts[leaf].rows[entry]
        row = int(table.rows[entry])
        epoch = 0 if table.epochs is None else int(table.epochs[entry])
        result, conversations = reader.examine([row], [epoch])[0]
        key = row_key(texts_of(reader, row))
        worded = reader.phrasing is not None and reader.phrasing.reads_fields
        shown: dict[str, Any] = {
            "source": self.surveyed.stream.source_names[leaf],
            "where": reader.source.where(row),
            "row": row,
            "epoch": epoch,
            "key": None if key is None else f"{key:016x}",
            "random": at_random,
            "problems": list(problems),
            "reason": result.reason,
            "stage": result.stage,
            "message": result.message,
            "tokens": result.tokens,
            "trained": result.trained,
            "messages": [_message(m) for c in conversations[:1] for m in c.messages],
            "editable": len(conversations) == 1 and not worded and not any(map(_is_cut, conversations[0].messages)),
            "parts": [part for example in result.examples for part in self._parts(example)],
            **_told(facts),
        }
        if not conversations:
            shown["raw"] = _raw(reader, row)
        elif not result.examples:
            shown["parts"] = self._rendered(reader, row, epoch)
        return shown

    def _rendered(self, reader: RowReader, row: int, epoch: int) -> list[dict[str, Any]]:
        """A row that is not trained on, as it would be seen."""
        try:
            rendered = reader.render(reader.conversations(row, epoch)[0])
        except (RowError, NothingToLearn):
            return []
        return [self._part("left out", rendered.tokens, rendered.weights)]

    def _parts(self, example: Example | Pair) -> Iterator[dict[str, Any]]:
        """The sides of an example: tokens with the weight that predicting each of them has."""
        if isinstance(example, Pair):
            yield self._part("encoder", example.encoder_tokens, np.zeros(len(example.encoder_tokens), np.float32))
            yield self._part("decoder", example.targets, example.weights)
        else:
            tokens = np.append(example.tokens, example.targets[-1:])
            yield self._part("sequence", tokens, np.concatenate([np.zeros(1, np.float32), example.weights]))

    def _part(self, side: str, tokens: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
        ids = tokens[:_MOST_TOKENS].tolist()
        for i in set(ids) - set(self.pieces):
            piece = str(self.tokenizer.convert_ids_to_tokens(i))
            # Alone, a piece of sentencepiece is decoded without the space that it begins with.
            self.pieces[i] = (piece.replace("▁", " ") if "▁" in piece else self.tokenizer.decode([i]), piece)
        text = self.tokenizer.decode(ids)  # where a character is several tokens, no box alone can show it
        told = text if any("\ufffd" in self.pieces[i][0] for i in ids) else None
        runs = _runs(weights[:_MOST_TOKENS])
        return {"side": side, "ids": ids, "weights": runs, "more": len(tokens) - len(ids), "text": told}

    def _packed(self) -> list[list[dict[str, Any]]]:
        """The first rows of the first window: the segments of each, side by side."""
        maker = self.surveyed.stream.maker
        window = maker.make(0)
        first = np.cumsum(window.lengths, axis=0) - window.lengths
        out = []
        for r in range(min(_PACKED_ROWS, len(window.splits) - 1)):
            segments = []
            for e in window.order[window.splits[r] : window.splits[r + 1]].tolist():
                source, row, epoch = window.ids[e].tolist()
                example = maker.rows.one_of(window.joined, first[e], window.lengths[e])
                where = maker.readers[source].source.where(row)
                name = self.surveyed.stream.source_names[source]
                parts = list(self._parts(example))
                segments.append({"source": name, "where": where, "epoch": epoch, "parts": parts})
            out.append(segments)
        return out


def _drawn(surveyed: Surveyed, count: int, seed: int) -> list[tuple[int, int, list[str], bool]]:
    """(leaf, entry, problems, whether drawn at random) of the examples shown: problems first, each row once."""
    draw = random.Random(seed)
    problems: dict[tuple[int, int], list[str]] = collections.defaultdict(list)
    leaves = len(surveyed.look.leaves)
    each = max(_LEAST_EACH, _EACH * 10 // max(10, leaves))
    for leaf in range(leaves):
        for problem, entries in _problems_of(surveyed, leaf).items():
            some = entries if len(entries) <= each else sorted(draw.sample(entries, each))
            for entry in some:
                problems[leaf, entry].append(problem)
    if len(problems) > _MOST:
        problems = {place: problems[place] for place in sorted(draw.sample(sorted(problems), _MOST))}
    sizes = [len(table.rows) for table in surveyed.look.tables]
    firsts = np.cumsum([0, *sizes])
    total = int(firsts[-1])
    numbers = draw.sample(range(total), min(count, total))
    at = [(leaf, n - int(firsts[leaf])) for n in numbers for leaf in [int(np.searchsorted(firsts, n, "right")) - 1]]
    chosen = set(at)
    shown = [(*place, told, place in chosen) for place, told in problems.items()]
    return shown + [(*place, [], True) for place in at if place not in problems]


def _problems_of(surveyed: Surveyed, leaf: int) -> Mapping[str, list[int]]:
    """Problems of a leaf, the worst first, with the entries of its table that have them."""
    look = surveyed.look
    table, facts = look.tables[leaf], look.facts[leaf]
    out: dict[str, list[int]] = {}
    by_stage = [(stage, code) for stage in range(1, len(STAGES) + 1) for code in range(1, len(table.reasons))]
    for stage, code in by_stage:
        found = np.flatnonzero((table.columns["reason"] == code) & (table.columns["stage"] == stage))
        if len(found):
            out[table.reasons[code]] = found.tolist()
    out |= {flag: entries.tolist() for flag, entries in flags(table, facts).items()}
    name = surveyed.exact.rows.names[leaf]
    for what, copies in (("exact duplicate of", surveyed.exact), ("near duplicate of", surveyed.near)):
        if copies is None:
            continue
        of = copies.rows.by_source(copies.again).get(name, np.zeros(0, np.int64))
        entries = np.flatnonzero(np.isin(table.rows, of))
        out[what.removesuffix(" of")] = entries.tolist()
    return {problem: entries for problem, entries in out.items() if entries}


def _message(message: Message) -> dict[str, Any]:
    """A message as a verdict may give it back."""
    weight = {} if message.weight is None else {"weight": message.weight}
    return {**message.as_dict(), **weight, "content": message.content[:_LONG]}


def _is_cut(message: Message) -> bool:
    return len(message.content) > _LONG


def _told(facts: np.void) -> dict[str, Any]:
    asked = facts["turns"] > 0
    scores = dict(zip(Scores._fields, (round(float(v), 3) for v in facts["scores"]), strict=True))
    return {
        "kind": KINDS[facts["kind"]] if asked else None,
        "language": facts["language"].decode() or None,
        "quality": {"mean": round(float(facts["scores"][:5].mean()), 3), **scores} if asked else None,
    }


def _raw(reader: RowReader, row: int) -> str:
    text = reader.source.raw(row)
    return text if len(text) <= _RAW else f"{text[:_RAW]} ... ({len(text):,} characters)"


def _runs(weights: np.ndarray) -> list[list[float]]:
    """[weight, how many] of runs of equal weights."""
    if not len(weights):
        return []
    starts = np.flatnonzero(np.concatenate([[True], weights[1:] != weights[:-1]]))
    counts = np.diff(np.append(starts, len(weights)))
    return [[round(float(weights[s]), 6), int(n)] for s, n in zip(starts, counts, strict=True)]
