"""What in the data is worth a person's attention before training: warnings by fixed thresholds, and information."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtune.audit.statistics import largest_kind
from jaxtune.data.quality.defects import SERIOUS

# Shares that general_mix takes to be usual, by tag (configs/general_mix.yaml).
GENERAL_BANDS = {
    "general": (0.30, 0.40),
    "code_math": (0.20, 0.30),
    "reasoning": (0.15, 0.20),
    "domain": (0.10, 0.15),
    "safety": (0.05, 0.10),
}


class Finding(NamedTuple):
    """`level` is error (training would stop), warning, or information; `code` names the rule."""

    level: str
    code: str
    text: str


def findings(
    total: Mapping[str, Any],
    *,
    first_of: Mapping[str, str],
    by_tag: Mapping[str, float],
    stream_warnings: Sequence[str],
    problems: Sequence[str],
    overlap: Mapping[str, Any] | None = None,
    contaminated: int = 0,
) -> list[Finding]:
    """All findings, the worst first.

    Args:
        total: the statistics of all rows (`statistics.statistics`).
        first_of: `file:line` of the first row with each flag.
        by_tag: share of draws that sources with a tag get.
        stream_warnings: what the training command would say before step 1.
        problems: why it would not start.
        overlap: rows that training has in common with evaluation (`survey.overlap`).
        contaminated: rows left out for the words of a benchmark.
    """
    out = [Finding("error", "training stops", text) for text in problems]
    out += [Finding("warning", "before step 1", text) for text in stream_warnings]
    out += _of_defects(total["defects"], first_of)
    out += _of_rows(total)
    out += _of_shares(by_tag)
    out += _of_others(overlap, contaminated)
    return out


def _of_defects(defects: Mapping[str, int], first_of: Mapping[str, str]) -> list[Finding]:
    return [
        Finding(
            "warning" if name in SERIOUS else "information",
            name,
            f"{name} in {count:,} row{'s' if count > 1 else ''}, the first at {first_of[name]}",
        )
        for name, count in defects.items()
    ]


def _of_rows(total: Mapping[str, Any]) -> list[Finding]:
    out = []
    asked, answers = total["rows_with_instruction"], total["responses"]
    if (share := _share(total["duplicate_instructions"], asked)) > 0.05:
        text = f"{share:.1%} of the instructions stand in an earlier row too (more than 5 %)"
        out.append(Finding("warning", "duplicate instructions", text))
    if (share := _share(answers["very_short"], answers["trained"])) > 0.1:
        text = f"{share:.1%} of the answers have fewer than 20 tokens (more than 10 %): the model learns to be brief"
        out.append(Finding("warning", "very short answers", text))
    if answers["unanswered_questions"]:
        text = f"{answers['unanswered_questions']:,} questions have no answer at the end of a conversation or of a path"
        out.append(Finding("information", "unanswered questions", text))
    if not asked:
        return out
    counts, diversity = total["kinds"]["counts"], total["kinds"]["diversity"]
    kind, share = largest_kind(counts)
    if share > 0.6:
        out.append(Finding("warning", "one kind", f"{share:.1%} of the instructions are {kind} (over 60 %)"))
    number = sum(count > 0 for count in counts.values())
    if number < 3:
        out.append(Finding("warning", "few kinds", f"the instructions are of {number} kinds (fewer than 3)"))
    if diversity < 0.5:
        text = f"the diversity of the instructions' kinds is {diversity:.2f} (under 0.5 of at most 1)"
        out.append(Finding("warning", "diversity", text))
    return out


def _of_shares(by_tag: Mapping[str, float]) -> list[Finding]:
    out = []
    if "safety" in by_tag and not 0.05 <= by_tag["safety"] <= 0.10:
        text = f"sources tagged safety get {by_tag['safety']:.1%} of the draws; expected 5 to 10 %"
        out.append(Finding("warning", "safety share", text))
    if len(by_tag.keys() & GENERAL_BANDS) < 3:  # a mixture of another make, with a tag in common
        return out
    for tag, (least, most) in GENERAL_BANDS.items():
        share = by_tag.get(tag)
        if share is not None and tag != "safety" and not least <= share <= most:
            text = f"tag {tag} gets {share:.1%} of the draws; general_mix's band for it is {least:.0%} to {most:.0%}"
            out.append(Finding("information", "general_mix", text))
    return out


def _of_others(overlap: Mapping[str, Any] | None, contaminated: int) -> list[Finding]:
    """What the data has in common with evaluation and benchmarks."""
    out = []
    nothing: dict[str, Any] = {"count": 0}
    whole, asked = (overlap["rows"], overlap["instructions"]) if overlap else (nothing, nothing)
    if whole["count"]:
        text = f"{whole['count']:,} training rows stand in the evaluation too, the first at {whole['rows'][0]}"
        out.append(Finding("warning", "evaluation", text))
    if asked["count"] > whole["count"]:
        text = f"{asked['count']:,} training rows ask what an evaluation row asks, the first at {asked['rows'][0]}"
        out.append(Finding("information", "evaluation", text))
    if contaminated:
        text = f"{contaminated:,} rows share words with a benchmark and are left out"
        out.append(Finding("information", "benchmarks", text))
    return out


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
