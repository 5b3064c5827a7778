"""Flags of rows: what a person may want to look at, by name, from what was noted of each row."""

import numpy as np

from jaxtune.audit.facts import Facts, with_defect
from jaxtune.audit.statistics import LONG, SHORT
from jaxtune.data.lengths import RowTable
from jaxtune.data.quality.defects import DEFECTS

LOW_QUALITY = 0.5  # a mean score under this


def flags(table: RowTable, facts: Facts) -> dict[str, np.ndarray]:
    """Entries of a leaf's table that have a flag, int64 ascending, by the flag's name; those of nobody left out."""
    column, rows = table.columns, facts.rows
    asked = rows["turns"] > 0
    unstopped = (column["stops"] < column["turns"]) & (column["examples"] > 0)
    found = {
        "stop token not trained": np.flatnonzero(unstopped),
        "marks of reasoning left": np.flatnonzero(column["reasoning_left"]),
        **{name: np.flatnonzero(with_defect(rows, name)) for name in DEFECTS},
        "refuses": np.flatnonzero(rows["refuses"]),
        "copies the instruction": np.flatnonzero(rows["copies"]),
        "low quality": np.flatnonzero(asked & (rows["scores"][:, :5].mean(axis=1) < LOW_QUALITY)),
        f"answer under {SHORT} tokens": np.unique(facts.answer_rows[facts.answers < SHORT]),
        f"answer over {LONG:,} tokens": np.unique(facts.answer_rows[facts.answers > LONG]),
    }
    return {name: entries for name, entries in found.items() if len(entries)}
