"""Rows left out on purpose: duplicates, benchmarks' texts, verdicts, low quality; the same rows in every epoch."""

import json
import types

import numpy as np
import pytest
from conftest import make_config, pairs

from jaxtune.config_quality import QualityConfig
from jaxtune.data import loader
from jaxtune.data.leaving_out import AllRows
from jaxtune.data.row_texts import row_key, texts_of

FIX = (
    '{"verdicts": [{"key": "00000000000000ff", "verdict": "fix", "messages": [{"role": "user", "content": "Why?"}, '
    '{"role": "assistant", "content": %s}]}]}'
)
LONG = "The old bridge over the river was built by seven masons in a single summer long ago, and it still stands."


@pytest.fixture
def open_(byte_tokenizer):
    def open_(config, *, eval=False, max_length=256, **keys):
        function = loader.open_eval_stream if eval else loader.open_stream
        return function(config, tokenizer=byte_tokenizer, max_length=max_length, **keys)

    return open_


def trained(stream):
    """The (source, row) pairs that are trained on, each once."""
    batches = list(stream.batches(stream.initial_state()))
    return {(e.source, e.row) for batch, _ in batches for row in batch.examples for e in row}


def losses(stream):
    """reason -> (rows, first line) of each source."""
    return [
        {reason: (lost.rows, int(lost.where.rsplit(":", 1)[1])) for reason, lost in source.lost.items()}
        for source in stream.funnel.sources
    ]


def save_verdicts(folder, *verdicts):
    path = folder / "verdicts.json"
    path.write_text(json.dumps({"verdicts": list(verdicts)}))
    return str(path)


def key_of(stream, row, source=0):
    reader = stream.maker.readers[source]
    return f"{row_key(texts_of(reader, row)):016x}"


# Duplicates.


@pytest.fixture
def copied(write_rows):
    """Two files; rows 3 of the first and 0, 2 of the second say what rows 0 and 1 of the first say."""
    first = pairs(6)
    first[3] = {"prompt": first[0]["prompt"].upper(), "completion": first[0]["completion"] + "  "}
    second = [first[1], *pairs(1, start=50), first[0], *pairs(2, start=60)]
    return write_rows("a.jsonl", first), write_rows("b.jsonl", second)


def test_duplicates_are_kept_unless_asked_for(open_, copied):
    assert len(trained(open_(make_config(*copied)))) == 11


def test_of_rows_that_say_the_same_the_first_is_trained_on(open_, copied):
    stream = open_(make_config(*copied, dedup="exact", train={"epochs": 2.0}))
    assert trained(stream) == {(0, row) for row in (0, 1, 2, 4, 5)} | {(1, row) for row in (1, 3, 4)}
    assert losses(stream) == [{"exact duplicate": (1, 4)}, {"exact duplicate": (2, 1)}]


def test_a_file_given_twice_is_a_duplicate_of_itself(open_, write_rows):
    path = write_rows("a.jsonl", pairs(5))
    more = {"path": write_rows("b.jsonl", [*pairs(5), *pairs(1, start=70)])}
    assert losses(open_(make_config(path, more, dedup="exact"))) == [{}, {"exact duplicate": (5, 1)}]
    with pytest.raises(ValueError, match=r"again: none of its 5 rows can be trained on .5 exact duplicate"):
        open_(make_config(path, {"path": path, "id": "again"}, dedup="exact"))


@pytest.mark.parametrize("dedup", ["exact", "near"])
def test_no_row_is_trained_on_that_says_what_a_held_out_row_says(open_, write_rows, dedup):
    rows = pairs(30) * 2
    config = make_config(write_rows("a.jsonl", rows), eval_fraction=0.3, dedup=dedup)
    training, held = open_(config), open_(config, eval=True)
    said = [{rows[row]["prompt"] for _, row in trained(stream)} for stream in (training, held)]
    assert said[0] and said[1] and not said[0] & said[1]


def test_near_duplicates_are_left_out_too(open_, write_rows):
    rows = pairs(4)
    rows[1] = {"prompt": "Tell me of the bridge.", "completion": LONG}
    rows[3] = {"prompt": "Tell me of the bridge.", "completion": LONG.replace("long ago", "years ago")}
    path = write_rows("a.jsonl", rows)
    assert len(trained(open_(make_config(path, dedup="exact")))) == 4
    stream = open_(make_config(path, dedup="near"))
    assert trained(stream) == {(0, 0), (0, 1), (0, 2)} and losses(stream) == [{"near duplicate": (1, 4)}]


def test_a_row_that_was_dropped_takes_no_near_duplicate_with_it(open_, write_rows, tmp_path):
    rows = pairs(2)
    rows[0] = {"prompt": "Tell me of the bridge.", "completion": LONG}
    rows[1] = {"prompt": "Tell me of the bridge.", "completion": LONG.replace("long ago", "years ago")}
    path = write_rows("a.jsonl", rows)
    verdicts = save_verdicts(tmp_path, {"key": key_of(open_(make_config(path)), 0), "verdict": "drop"})
    assert trained(open_(make_config(path, dedup="near", verdicts=verdicts))) == {(0, 1)}


def test_what_is_left_out_on_purpose_is_not_lost(open_, copied):
    plain, deduplicated = open_(make_config(*copied)), open_(make_config(*copied, dedup="exact", max_lost=0.0))
    assert deduplicated.funnel.total("tokens_lost") == 0 and not deduplicated.warnings
    gone = plain.funnel.total("tokens") - deduplicated.funnel.total("tokens")
    assert deduplicated.funnel.total("tokens_left_out") == gone > 0


def test_styles_of_one_source_leave_out_the_same_rows(open_, write_rows):
    rows = [{"q": f"{i} + {i}?", "a": f"{2 * i}"} for i in (*range(8), *range(4))]
    ask = {"name": "ask", "task": "*", "kind": "zero-shot", "input": "{q}", "target": "{a}"}
    tell = {**ask, "name": "tell", "input": "Please: {q}"}
    source = {"path": write_rows("a.jsonl", rows), "templates": (ask, tell), "each_template": True}
    stream = open_(make_config(source, dedup="exact", template="plain"))
    assert {row for _, row in trained(stream)} == set(range(8))


# Benchmarks.


def test_rows_that_share_thirteen_words_with_a_benchmark_are_left_out(open_, write_rows):
    rows = pairs(3)
    rows[1] = {"prompt": f"Is this so? {LONG.upper()}", "completion": "It is."}
    path, benchmark = write_rows("a.jsonl", rows), write_rows("bench.jsonl", [{"text": LONG}])
    stream = open_(make_config(path, decontaminate={"paths": (benchmark,)}))
    assert trained(stream) == {(0, 0), (0, 2)} and losses(stream) == [{"in a benchmark": (1, 2)}]


def test_a_benchmark_that_is_not_there_stops(open_, write_rows):
    with pytest.raises(ValueError, match=r"none\.jsonl"):
        open_(make_config(write_rows("a.jsonl", pairs(3)), decontaminate={"paths": ("none.jsonl",)}))


# Verdicts.


def test_a_row_is_dropped_by_a_verdict_wherever_it_has_moved(open_, write_rows, tmp_path):
    stream = open_(make_config(write_rows("a.jsonl", pairs(5))))
    verdicts = save_verdicts(
        tmp_path,
        {"key": key_of(stream, 2), "where": "a.jsonl:3", "verdict": "drop"},
        {"key": key_of(stream, 1), "where": "a.jsonl:2", "verdict": "keep"},
    )
    moved = write_rows("b.jsonl", pairs(5)[::-1])
    judged = open_(make_config(moved, verdicts=verdicts))
    assert trained(judged) == {(0, row) for row in (0, 1, 3, 4)}
    assert losses(judged) == [{"dropped by a verdict": (1, 3)}] and not judged.warnings


def test_a_corrected_row_is_trained_on_as_corrected(open_, write_rows, tmp_path, byte_tokenizer):
    path = write_rows("a.jsonl", pairs(3))
    stream = open_(make_config(path))
    messages = [{"role": "user", "content": "What is 1?"}, {"role": "assistant", "content": "It is one, mended."}]
    verdicts = save_verdicts(tmp_path, {"key": key_of(stream, 1), "verdict": "fix", "messages": messages})
    judged = open_(make_config(path, verdicts=verdicts))
    [result] = judged.maker.readers[0].read([1])
    assert "It is one, mended." in byte_tokenizer.decode(result.examples[0].targets[result.examples[0].weights > 0])
    assert trained(judged) == {(0, 0), (0, 1), (0, 2)} and judged.fingerprint != stream.fingerprint


def test_a_row_that_is_to_be_fixed_is_left_out_until_it_is(open_, write_rows, tmp_path):
    path = write_rows("a.jsonl", pairs(3))
    verdicts = save_verdicts(tmp_path, {"key": key_of(open_(make_config(path)), 0), "verdict": "fix"})
    assert losses(open_(make_config(path, verdicts=verdicts))) == [{"to be fixed, says a verdict": (1, 1)}]


def test_a_corrected_message_keeps_its_weight_fields_and_calls(open_, write_rows, tmp_path):
    path = write_rows("a.jsonl", pairs(2))
    call = {"type": "function", "function": {"name": "find", "arguments": {"what": "it"}}}
    messages = [
        {"role": "user", "content": "Add. 2 3", "instruction": "Add.", "input": "2 3"},
        {"role": "assistant", "content": "First.", "weight": 0},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Five.", "weight": 0.5, "tool_calls": [call]},
    ]
    verdicts = save_verdicts(
        tmp_path, {"key": key_of(open_(make_config(path)), 0), "verdict": "fix", "messages": messages}
    )
    [one] = open_(make_config(path, verdicts=verdicts)).maker.readers[0].examine([0])
    said = one.conversations[0].messages
    assert said[0].fields == {"instruction": "Add.", "input": "2 3"} and said[1].weight == 0
    assert said[3].tool_calls == (call,) and set(one.result.examples[0].weights.tolist()) == {0.0, 0.5}


def test_a_correction_of_a_row_that_templates_word_leaves_it_out(open_, write_rows, tmp_path):
    ask = {"name": "ask", "task": "*", "kind": "zero-shot", "input": "{q}", "target": "{a}"}
    path = write_rows("a.jsonl", [{"q": f"{i} + {i}?", "a": f"{2 * i}"} for i in range(4)])
    source = {"path": path, "templates": (ask,)}
    key = key_of(open_(make_config(source, template="plain")), 1)
    messages = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1!"}]
    verdicts = save_verdicts(tmp_path, {"key": key, "verdict": "fix", "messages": messages})
    stream = open_(make_config(source, template="plain", verdicts=verdicts))
    assert losses(stream) == [{"to be fixed, says a verdict": (1, 2)}]


def test_verdicts_on_rows_that_are_not_there_are_told(open_, write_rows, tmp_path):
    verdicts = save_verdicts(tmp_path, {"key": "00000000000000ff", "verdict": "drop"})
    stream = open_(make_config(write_rows("a.jsonl", pairs(3)), verdicts=verdicts))
    assert any("1 of 1 verdicts are on rows that are not there" in warning for warning in stream.warnings)


ONE = '{"verdicts": [{"key": "00000000000000ff", "verdict": %s}]}'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is not valid JSON"),
        ("[]", "has no list of verdicts"),
        (
            '{"verdicts": [{"key": "00000000000000ff", "verdict": "maybe"}]}',
            "verdict 1: found 'maybe'; expected keep, drop or fix",
        ),
        ('{"verdicts": [{"key": "xyz", "verdict": "drop"}]}', "key is 'xyz'"),
        ('{"verdicts": [{"verdict": "drop"}]}', "key is None"),
        ('{"verdicts": [{"key": "00000000000000000000", "verdict": "drop"}]}', "16 hexadecimal digits"),
        ('{"verdicts": [{"key": "-000000000000001", "verdict": "drop"}]}', "16 hexadecimal digits"),
        ('{"verdicts": [{"key": "00000000000000ff", "verdict": "fix", "messages": 5}]}', "expected a list"),
        (FIX % '"a", "weight": Infinity', "a weight is inf"),
        (FIX % '"\\ud800"', "half of a surrogate pair"),
        (FIX % '" "', "empty answer"),
        (ONE % '"drop", "messages": [{"role": "user", "content": "a"}]', "only a fix"),
        (ONE % '"fix", "messages": [{"role": "robot", "content": "a"}]', "robot"),
    ],
)
def test_a_file_that_holds_no_verdicts_is_refused(open_, write_rows, tmp_path, text, told):
    (tmp_path / "v.json").write_text(text)
    with pytest.raises(ValueError, match=r"data\.verdicts") as caught:
        open_(make_config(write_rows("a.jsonl", pairs(3)), verdicts=str(tmp_path / "v.json")))
    assert told in str(caught.value)


# Quality.


@pytest.mark.parametrize(
    ("quality", "kept", "reason"),
    [
        ({"drop": ("(?i)refund",)}, {0, 1}, "quality.drop '(?i)refund'"),
        ({"response_words": (5, None)}, {0, 2}, "quality.response_words"),
        ({"custom": "quality_functions:has_no_b"}, {0, 2}, "quality.custom"),
    ],
)
def test_filters_leave_conversations_out(open_, write_rows, tmp_path, monkeypatch, quality, kept, reason):
    (tmp_path / "quality_functions.py").write_text(
        "def has_no_b(messages):\n    return all('B' not in m['content'] for m in messages)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [
        {"prompt": "What is it?", "completion": "It is a well of deep water."},
        {"prompt": "What is it?", "completion": "B."},
        {"prompt": "Give it back?", "completion": "We give no Refund for what you broke."},
    ]
    stream = open_(make_config(write_rows("a.jsonl", rows), quality=QualityConfig(**quality)))
    assert {row for _, row in trained(stream)} == kept
    [lost] = losses(stream)
    assert list(lost) == [reason] and stream.funnel.sources[0].stages["kept"] == 2


def test_filters_are_not_for_evaluation(open_, write_rows):
    path, held = write_rows("a.jsonl", pairs(3)), write_rows("b.jsonl", pairs(3, start=9))
    config = make_config(path, eval=({"path": held},), quality=QualityConfig(response_words=(4, None)), dedup="exact")
    assert len(trained(open_(config, eval=True))) == 3


# Rows numbered on through sources.


def test_rows_of_all_sources_have_numbers_and_places(open_, copied):
    readers = open_(make_config(*copied)).maker.readers
    named = [types.SimpleNamespace(reader=r, node=types.SimpleNamespace(source=i)) for i, r in enumerate(readers)]
    rows = AllRows(named)
    assert len(rows) == 11 and rows.where(5).endswith("a.jsonl:6") and rows.where(6).endswith("b.jsonl:1")
    a, b = rows.names
    found = rows.by_source(np.array([0, 5, 6, 10]))
    assert {name: numbers.tolist() for name, numbers in found.items()} == {a: [0, 5], b: [0, 4]}
