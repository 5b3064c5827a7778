"""Every planted defect is told with its line, and nothing is said of the rows between them."""

import collections
import json

import audits
import planted
import pytest


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The planted rows by line, and the audit of them."""
    folder = tmp_path_factory.mktemp("planted")
    rows = planted.write(folder / "planted.jsonl")
    (folder / "bench.jsonl").write_text(json.dumps({"question": planted.BENCHMARK}) + "\n")
    patch = pytest.MonkeyPatch()
    patch.setenv("JAXTUNE_CACHE", str(folder / "cache"))
    code, document = audits.run(
        audits.write_base(folder / "base"),
        folder / "out",
        f"data.train.0.path={folder / 'planted.jsonl'}",
        f"data.decontaminate.paths=[{folder / 'bench.jsonl'}]",
        "data.reasoning=drop",
    )
    patch.undo()
    return dict(enumerate(rows, 1)), code, document


def said_of(document):
    """All that an audit says of each line: reasons, flags, copies."""
    said = collections.defaultdict(set)
    for row in document["lost_rows"]:
        said[audits.line(row["where"])].add(("lost", row["reason"]))
    for row in document["flagged_rows"]:
        said[audits.line(row["where"])] |= {("flag", flag) for flag in row["flags"]}
    for kind in ("exact", "near"):
        for row in document["duplicates"][kind]["rows"]:
            said[audits.line(row["where"])].add(("copy", kind))
    for row in document["contamination"]:
        said[audits.line(row["where"])].add(("copy", "benchmark"))
    return said


def expected_of(row):
    said = {("flag", flag) for flag in row.flags}
    if row.copy == "benchmark":
        said.add(("lost", "in a benchmark"))
    return said | ({("lost", row.reason)} if row.reason else set()) | ({("copy", row.copy)} if row.copy else set())


def test_at_least_forty_kinds_are_planted(told):
    rows, *_ = told
    names = [row.name for row in rows.values() if not row.clean]
    assert len(names) == len(set(names)) >= 40


def test_each_defect_is_told_with_its_line_and_nothing_else_is_flagged(told):
    rows, _, document = told
    said = said_of(document)
    assert {line: said.get(line, set()) for line in rows} == {line: expected_of(row) for line, row in rows.items()}


def test_training_would_stop_at_the_first_row_that_cannot_be_read(told):
    rows, code, document = told
    first = next(line for line, row in rows.items() if row.reason)
    errors = [finding["text"] for finding in document["findings"] if finding["level"] == "error"]
    assert code == 1 and len(errors) == 1 and f"planted.jsonl:{first}:" in errors[0]


def test_the_funnel_counts_every_stage(told):
    rows, _, document = told
    funnel = document["funnel"]["total"]
    unreadable, malformed = list(planted.unreadable()), list(planted.malformed())
    parsed = len(rows) - len(unreadable)
    valid = parsed - len([row for row in malformed if row.reason != "over length"])
    assert funnel["rows"] == len(rows)
    assert funnel["stages"] == {"parsed": parsed, "valid": valid, "kept": valid - 1, "fits": valid - 2}
    assert funnel["kept"] == valid - 2


def test_every_loss_has_its_reason_and_its_first_line(told):
    rows, _, document = told
    lost = document["funnel"]["total"]["lost"]
    by_reason = collections.defaultdict(list)
    for line, row in rows.items():
        reason = "in a benchmark" if row.copy == "benchmark" else row.reason
        if reason:
            by_reason[reason].append(line)
    assert {reason: (one["rows"], audits.line(one["where"])) for reason, one in lost.items()} == {
        reason: (len(lines), lines[0]) for reason, lines in by_reason.items()
    }


def test_tokens_are_counted_at_every_stage(told):
    _, _, document = told
    total = document["funnel"]["total"]
    at = total["tokens_at_stages"]
    assert at["fits"] == total["tokens"] and at["kept"] == total["tokens"] + total["lost"]["over length"]["tokens"]
    assert at["valid"] == at["kept"] + total["tokens_left_out"]
    assert at["parsed"] == at["valid"] + total["lost"]["no trained token"]["tokens"]
    assert at["parsed"] == total["tokens"] + total["tokens_lost"] + total["tokens_left_out"]
