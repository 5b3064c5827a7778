"""Statistics with answers worked out by hand."""

import numpy as np
import pytest

from jaxtune.audit.facts import facts_of, joined, with_defect
from jaxtune.audit.findings import findings
from jaxtune.audit.statistics import largest_kind, spread, statistics
from jaxtune.data.packing import Example, Pair
from jaxtune.data.quality.defects import DefectFinder
from jaxtune.data.records import Conversation, Message
from jaxtune.data.row_results import Examined, RowResult

DEFECTS = DefectFinder(["</s>"])


def example(*weights):
    n = len(weights)
    return Example(np.zeros(n, np.int32), np.ones(n, np.int32), np.array(weights, np.float32))


def row(asked, said, *examples, category=None):
    meta = {} if category is None else {"category": category}
    conversation = Conversation((Message("user", asked), Message("assistant", said)), meta)
    return Examined(RowResult(list(examples)), [conversation])


def facts(*rows):
    return facts_of(rows, defects=DEFECTS, with_languages=False)


def test_numbers_are_spread_over_bins_that_double():
    told = spread(np.array([0, 1, 2, 3, 4, 7, 8]))
    assert [(b["from"], b["to"], b["count"]) for b in told["histogram"]] == [
        (0, 0, 1),
        (1, 1, 1),
        (2, 3, 2),
        (4, 7, 2),
        (8, 15, 1),
    ]
    assert (told["mean"], told["min"], told["max"], told["sum"]) == (25 / 7, 0, 8, 25)
    assert told["quantiles"]["0.5"] == 3 and spread(np.zeros(0)) == {"count": 0}


def test_answers_are_runs_of_trained_targets_each_with_its_row():
    found = facts(
        row("a", "b", example(0, 0, 1, 1, 1, 0, 0.5, 0.5)),
        row("a", "b"),
        row("a", "b", example(1, 1), example(1)),
        Examined(RowResult([Pair(np.zeros(9, np.int32), np.ones(4, np.int32), np.ones(4, np.float32))]), []),
    )
    assert found.answers.tolist() == [3, 2, 2, 1, 4] and found.answer_rows.tolist() == [0, 0, 2, 2, 3]


def test_what_is_noted_of_a_row():
    found = facts(
        row("Write a poem about geese.", "Grey geese fly.", category="poems"),
        row("WRITE  a poem about geese.", "Other."),
        Examined(RowResult([]), []),
        Examined(RowResult([]), [Conversation((Message("text", "Once </s> upon a time."),))]),
    )
    kinds = found.rows["kind"].tolist()
    assert kinds[0] == kinds[1] and kinds[2] == kinds[3] != kinds[0]
    assert found.rows["asked"][0] == found.rows["asked"][1] and found.rows["key"][0] != found.rows["key"][1]
    assert found.rows["key"][2] == 0 != found.rows["key"][3]
    assert with_defect(found.rows, "a special token in the text").tolist() == [False, False, False, True]
    assert found.categories == {"poems": 1}


def test_facts_of_blocks_are_joined_in_order():
    blocks = [facts(row("a", "b", example(1))), facts(row("c", "d"), row("e", "f", example(0, 1, 1)))]
    both = joined(blocks)
    assert len(both.rows) == 3 and both.answers.tolist() == [1, 2] and both.answer_rows.tolist() == [0, 2]


def test_nothing_has_statistics_too():
    told = statistics([], [])
    assert told["rows"] == 0 and told["kinds"]["diversity"] == 0 and told["quality"] == {}


def test_the_largest_kind_may_be_other():
    assert largest_kind({"qa": 1, "other": 3}) == ("other", 0.75) and largest_kind({"qa": 0})[1] == 0.0


def total(**changes):
    """Statistics with nothing to warn of."""
    counts = {"generation": 40, "qa": 30, "coding": 30}
    told = {
        "rows_with_instruction": 100,
        "duplicate_instructions": 5,
        "responses": {"trained": 100, "very_short": 10, "unanswered_questions": 0},
        "kinds": {"counts": counts, "diversity": 0.5},
        "defects": {},
    }
    return {**told, **changes}


def codes(told, **more):
    given = {"first_of": {}, "by_tag": {}, "stream_warnings": (), "problems": (), **more}
    return [(finding.level, finding.code) for finding in findings(told, **given)]


def test_at_the_thresholds_there_is_nothing_to_warn_of():
    assert codes(total(), by_tag={"safety": 0.05}) == codes(total(), by_tag={"safety": 0.10}) == []


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"duplicate_instructions": 6}, "duplicate instructions"),
        ({"responses": {"trained": 100, "very_short": 11, "unanswered_questions": 0}}, "very short answers"),
        ({"kinds": {"counts": {"qa": 61, "coding": 20, "math": 19}, "diversity": 0.6}}, "one kind"),
        ({"kinds": {"counts": {"qa": 50, "coding": 50}, "diversity": 0.6}}, "few kinds"),
        ({"kinds": {"counts": {"qa": 40, "coding": 30, "math": 30}, "diversity": 0.49}}, "diversity"),
    ],
)
def test_beyond_a_threshold_there_is_one_warning(changes, code):
    assert codes(total(**changes)) == [("warning", code)]


@pytest.mark.parametrize("share", [0.049, 0.101, 0.0])
def test_a_safety_share_outside_its_band_is_a_warning(share):
    assert codes(total(), by_tag={"safety": share}) == [("warning", "safety share")]


def test_other_shares_outside_general_mix_are_information():
    mixture = {"general": 0.5, "domain": 0.12, "code_math": 0.25, "poems": 0.9}
    assert codes(total(), by_tag=mixture) == [("information", "general_mix")]
    assert codes(total(), by_tag={"general": 0.5, "reasoning": 0.01}) == [], "that is no general mixture"


def test_defects_are_told_with_their_first_row_serious_ones_as_warnings():
    told = total(defects={"mojibake": 2, "HTML entities": 1})
    found = findings(
        told, first_of={"mojibake": "a:3", "HTML entities": "a:9"}, by_tag={}, stream_warnings=(), problems=()
    )
    assert [(f.level, f.text) for f in found] == [
        ("warning", "mojibake in 2 rows, the first at a:3"),
        ("information", "HTML entities in 1 row, the first at a:9"),
    ]


def test_what_stops_training_comes_first():
    assert codes(total(), problems=["it stops"], stream_warnings=["beware"]) == [
        ("error", "training stops"),
        ("warning", "before step 1"),
    ]
