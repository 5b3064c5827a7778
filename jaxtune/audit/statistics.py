"""Statistics of rows from what was noted of them: lengths, kinds, scores, languages, answers that refuse or copy."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune.audit.facts import UNASKED, Facts, joined, with_defect
from jaxtune.data.lengths import RowTable
from jaxtune.data.quality.defects import DEFECTS
from jaxtune.data.quality.duplicates import first_of_equal
from jaxtune.data.quality.kinds import KINDS, diversity
from jaxtune.data.quality.scores import Scores

SHORT, LONG = 20, 1024  # tokens: fewer is a very short answer, more a very long one
_QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
_FIVE = Scores._fields[:5]  # those whose mean is the quality


def statistics(tables: Sequence[RowTable], facts: Sequence[Facts]) -> dict[str, Any]:
    """Statistics of the rows of some leaves together; plain JSON.

    Shares are of the rows with an instruction, where nothing else is said; lengths are tokens of rows that are trained.
    """
    noted = joined(facts)
    rows = noted.rows
    asked = rows[rows["kind"] != UNASKED]
    used = np.concatenate([np.zeros(0, bool), *(t.columns["examples"] > 0 for t in tables)])
    once = np.concatenate([np.zeros(0, bool), *(_first_time(table) for table in tables)])
    read = _column(tables, "tokens") - _column(tables, "trained")
    return {
        "rows": len(rows),
        "rows_with_instruction": len(asked),
        "instruction_tokens": spread(read[used]),
        "response_tokens": spread(noted.answers),
        "response_tokens_by_row": spread(_column(tables, "trained")[used]),
        "turns": _counted(asked["turns"]),
        "responses": {
            "trained": len(noted.answers),
            "very_short": int(np.count_nonzero(noted.answers < SHORT)),
            "very_long": int(np.count_nonzero(noted.answers > LONG)),
            "empty_rows": _empty(tables),
            "refusing_rows": int(np.count_nonzero(asked["refuses"])),
            "copying_rows": int(np.count_nonzero(asked["copies"])),
            "unanswered_questions": int(rows["unanswered"][once].sum(dtype=np.int64)),
            "reasoning_rows": int(np.count_nonzero(asked["reasons"])),
        },
        "languages": _languages(rows),
        "duplicate_rows": _again(rows["key"][once]),
        "duplicate_instructions": _again(rows["asked"][once & (rows["kind"] != UNASKED)]),
        "kinds": kinds_of(asked["kind"]),
        "better_kinds": kinds_of(asked["better_kind"]),
        "categories": dict(noted.categories.most_common()),
        "difficulty": {name: spread(asked[name]) for name in ("words", "steps", "constraints")},
        "quality": _quality(asked["scores"]),
        "defects": {name: n for name in DEFECTS if (n := int(np.count_nonzero(with_defect(rows, name))))},
    }


def kinds_of(kinds: np.ndarray) -> dict[str, Any]:
    """How many rows are of each kind, and how diverse that is."""
    counts = {name: int(np.count_nonzero(kinds == i)) for i, name in enumerate(KINDS)}
    return {"counts": counts, "diversity": diversity(counts)}


def spread(values: np.ndarray) -> dict[str, Any]:
    """Mean, extremes, quantiles and a histogram of numbers; the bins double in width: [0], [1], [2 3], [4 .. 7], ..."""
    if not len(values):
        return {"count": 0}
    whole = np.asarray(values, np.int64)
    bins = np.where(whole <= 0, 0, np.frexp(np.maximum(whole, 1).astype(np.float64))[1])
    return {
        "count": len(whole),
        "sum": int(whole.sum()),
        "mean": float(whole.mean()),
        "min": int(whole.min()),
        "max": int(whole.max()),
        "quantiles": {f"{q:g}": float(np.quantile(whole, q)) for q in _QUANTILES},
        "histogram": [
            {"from": 0 if i == 0 else 2 ** (i - 1), "to": 0 if i == 0 else 2**i - 1, "count": int(n)}
            for i, n in enumerate(np.bincount(bins))
        ],
    }


def _quality(scores: np.ndarray) -> dict[str, Any]:
    if not len(scores):
        return {}
    means = scores[:, : len(_FIVE)].mean(axis=1)
    edges = np.linspace(0.0, 1.0, 11)
    return {
        "mean": float(means.mean()),
        **{name: float(scores[:, i].mean()) for i, name in enumerate(Scores._fields)},
        "histogram": [
            {"from": round(float(a), 1), "to": round(float(b), 1), "count": int(n)}
            for a, b, n in zip(edges, edges[1:], np.histogram(means, edges)[0], strict=False)
        ],
    }


def _languages(rows: np.ndarray) -> dict[str, int]:
    counts = collections.Counter(rows["language"].tolist())
    counts.pop(b"", None)
    return {language.decode(): count for language, count in counts.most_common()}


def _empty(tables: Sequence[RowTable]) -> int:
    """Rows that teach nothing because the answer is empty or missing."""
    reasons = ("empty answer", "no assistant turn", "questions without answers", "empty text")
    return sum(
        int(np.count_nonzero(t.columns["reason"] == code))
        for t in tables
        for code, reason in enumerate(t.reasons)
        if reason in reasons
    )


def _first_time(table: RowTable) -> np.ndarray:
    """Whether an entry is its row's first: rows that are worded anew are in a table once for each epoch."""
    first = np.zeros(len(table.rows), bool)
    first[np.unique(table.rows, return_index=True)[1]] = True
    return first


def _again(keys: np.ndarray) -> int:
    """How many keys have stood before; 0 stands for none."""
    return int(np.count_nonzero(first_of_equal(keys[keys != 0]) >= 0))


def _counted(values: np.ndarray) -> dict[str, int]:
    found, counts = np.unique(values, return_counts=True)
    return {str(int(value)): int(count) for value, count in zip(found, counts, strict=True)}


def _column(tables: Sequence[RowTable], name: str) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *(t.columns[name] for t in tables)])


def largest_kind(counts: Mapping[str, int]) -> tuple[str, float]:
    """The kind with most rows, and its share; `other` counts as a kind."""
    total = sum(counts.values())
    name = max(counts, key=lambda kind: counts[kind])
    return name, counts[name] / total if total else 0.0
