"""A model's own answers to the questions of data files, scored."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxtune.answering import Answer, Answerer
from jaxtune.asking import Sampling
from jaxtune.evaluate.cases import Case, Cases
from jaxtune.evaluate.scores import METRICS, Score

TOO_LONG = "prompt too long"
SPARE_TOKENS = 8  # beyond the longest right answer: whoever goes on that far is wrong already
EXAMPLES = 5


class Outcome(NamedTuple):
    """What became of one case; `stopped` as in `Answer`, or that the prompt leaves no room."""

    case: Case
    answer: str
    stopped: str
    tokens: int
    score: float


def evaluate(
    answerer: Answerer,
    files: Sequence[Cases],
    *,
    metric: str = "exact_match",
    max_new_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Answers every question greedily and returns the report: a plain tree, ready for JSON.

    Args:
        metric: a key of `METRICS`.
        max_new_tokens: default is the longest right answer and a few more.
        progress: called with (answered, in all).

    Returns:
        `metric`, `model`, `overall` and `files`: for each path its `overall`, `groups` (by name), `stopped` (counts),
        `skipped` (rows by reason) and `wrong`, the first few cases that are not right. A prompt that leaves the model
        no room counts as wrong.
    """
    cases = [case for file in files for case in file.cases]
    sampling = Sampling(max_new_tokens or _longest_reference(answerer, cases) + SPARE_TOKENS)
    outcomes = _answer(answerer, cases, sampling, metric, progress)
    report: dict[str, Any] = {
        "metric": metric,
        "model": answerer.opened.name,
        "template": answerer.opened.template.name,
        "max_new_tokens": sampling.max_new_tokens,
        "overall": _sum(outcomes).as_dict(metric),
        "tokens": sum(outcome.tokens for outcome in outcomes),
        "files": {},
    }
    first = 0
    for file in files:
        report["files"][file.path] = _report(file, outcomes[first : first + len(file.cases)], metric)
        first += len(file.cases)
    return report


def _longest_reference(answerer: Answerer, cases: Sequence[Case]) -> int:
    texts = [case.reference for case in cases]
    return max(map(len, answerer.opened.template.tokenizer(texts, add_special_tokens=False)["input_ids"]))


def _answer(
    answerer: Answerer,
    cases: Sequence[Case],
    sampling: Sampling,
    metric: str,
    progress: Callable[[int, int], None] | None,
) -> list[Outcome]:
    prompts: list[list[int]] = []
    asked: list[int] = []
    for number, case in enumerate(cases):
        if answerer.fits(case.messages, room=1, tools=case.tools):
            prompts.append(answerer.encode(case.messages, tools=case.tools))
            asked.append(number)
    given = dict(zip(asked, answerer.answer_prompts(prompts, sampling, progress=progress), strict=True))
    outcomes = []
    for number, case in enumerate(cases):
        answer = given.get(number, Answer("", (), TOO_LONG))
        score = METRICS[metric](answer.text, case.reference) if number in given else 0.0
        outcomes.append(Outcome(case, answer.text, answer.stopped, len(answer.tokens), score))
    return outcomes


def _sum(outcomes: Sequence[Outcome]) -> Score:
    return Score(sum(outcome.score for outcome in outcomes), len(outcomes))


def _report(file: Cases, outcomes: Sequence[Outcome], metric: str) -> dict[str, Any]:
    groups = sorted({outcome.case.group for outcome in outcomes if outcome.case.group is not None})
    stops = [outcome.stopped for outcome in outcomes]
    return {
        "format": file.layout,
        "overall": _sum(outcomes).as_dict(metric),
        "groups": {group: _sum([o for o in outcomes if o.case.group == group]).as_dict(metric) for group in groups},
        "stopped": {reason: stops.count(reason) for reason in sorted(set(stops))},
        "skipped": file.skipped,
        "wrong": [
            {
                "where": outcome.case.where,
                "messages": [message.as_dict() for message in outcome.case.messages],
                "expected": outcome.case.reference,
                "answer": outcome.answer,
                "stopped": outcome.stopped,
            }
            for outcome in outcomes
            if outcome.score < 1
        ][:EXAMPLES],
    }


def table(report: dict[str, Any]) -> str:
    """Returns the report as lines for a terminal: a row for each group, file and the whole."""
    rows: list[tuple[str, dict[str, Any]]] = []
    for path, file in report["files"].items():
        rows += [(f"  {group}", score) for group, score in file["groups"].items()]
        rows.append((path, file["overall"]))
    if len(report["files"]) > 1:
        rows.append(("all", report["overall"]))
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':{width}}  {report['metric']:>12}  {'count':>7}"]
    lines += [f"{name:{width}}  {score[report['metric']]:>12.1%}  {score['count']:>7,}" for name, score in rows]
    for path, file in report["files"].items():
        lines += [f"{path}: {count:,} rows skipped: {reason}" for reason, count in file["skipped"].items()]
        if too_long := file["stopped"].get(TOO_LONG):
            lines.append(f"{path}: {too_long:,} prompts too long for the model, counted as wrong")
    return "\n".join(lines)
