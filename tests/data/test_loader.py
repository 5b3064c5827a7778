"""The stream: the same batches however it is run, exact state, every example its epochs, errors before step 1."""

import collections
import dataclasses
import json

import numpy as np
import pytest
from conftest import make_config, pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxtune.config import TuningConfig
from jaxtune.config_data import SourceConfig
from jaxtune.data import loader, measuring
from jaxtune.data.chat.chat_templates import BUILT_INS
from jaxtune.data.mixing import tree
from jaxtune.data.stream import merge_states


@pytest.fixture
def open_(byte_tokenizer):
    def open_(config, *, eval=False, max_length=64, **keys):
        function = loader.open_eval_stream if eval else loader.open_stream
        return function(config, tokenizer=byte_tokenizer, max_length=max_length, **keys)

    return open_


@pytest.fixture
def stream(open_, write_rows):
    """Two sources, one seen twice; windows of 8 draws on 4 lanes."""
    paths = write_rows("a.jsonl", pairs(60)), {"path": write_rows("b.jsonl", pairs(31, start=100)), "epochs": 2.0}
    return open_(make_config(*paths, train={"epochs": 2.0}, window=8))


def collect(stream, state=None, **keys):
    return list(stream.batches(stream.initial_state() if state is None else state, **keys))


def same(a, b):
    return a.examples == b.examples and all(
        np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a.arrays, b.arrays, strict=True)
    )


def test_every_example_is_seen_exactly_its_epochs(stream):
    batches = collect(stream)
    assert len(batches) == stream.steps_per_run and stream.lanes == 4
    seen = collections.Counter(e for batch, _ in batches for row in batch.examples for e in row)
    expected = {(0, r, e) for r in range(60) for e in range(2)} | {(1, r, e) for r in range(31) for e in range(4)}
    assert {tuple(e) for e in seen} == expected and set(seen.values()) == {1}


def test_rows_hold_what_their_examples_say(stream):
    batch, _ = collect(stream)[0]
    assert {a.shape for a in batch.arrays} == {(4, 64)}
    for r, names in enumerate(batch.examples):
        for segment, name in enumerate(names, 1):
            at = batch.arrays.segment_ids[r] == segment
            (example,) = stream.maker.readers[name.source].read([name.row])[0].examples
            assert batch.arrays.tokens[r][at].tolist() == example.tokens.tolist()
            assert batch.arrays.targets[r][at].tolist() == example.targets.tolist()
            assert batch.arrays.loss_weights[r][at].tolist() == example.weights.tolist()
            assert batch.arrays.positions[r][at].tolist() == list(range(len(example.tokens)))
            assert set(batch.arrays.source_ids[r][at].tolist()) == {name.source}


def test_fill_and_steps_are_those_of_the_run(stream):
    batches = [batch for batch, _ in collect(stream)]
    rows = [row for batch in batches for row in batch.arrays.segment_ids]
    used = [row for row in rows if row.any()]
    assert stream.fill == pytest.approx((np.mean([(row > 0).mean() for row in used]),))
    assert any(row.any() for row in batches[-1].arrays.segment_ids)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_kill_point_and_restore_gives_the_same_stream(stream, data):
    whole = collect(stream)
    kill = data.draw(st.integers(0, len(whole) - 1))
    state = json.loads(json.dumps(whole[kill][1]))
    rest = collect(stream, state)
    assert len(rest) == len(whole) - kill - 1
    assert all(same(a, b) and s == t for (a, s), (b, t) in zip(whole[kill + 1 :], rest, strict=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(stream, workers):
    whole = collect(stream)
    other = collect(dataclasses.replace(stream, workers=workers))
    assert len(whole) == len(other)
    assert all(same(a, b) and s == t for (a, s), (b, t) in zip(whole, other, strict=True))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_make_the_same_batches_and_state(stream, hosts):
    whole, share = collect(stream), stream.batch_rows // hosts
    parts = [collect(stream, rows=range(h * share, (h + 1) * share)) for h in range(hosts)]
    for (batch, state), *mine in zip(whole, *parts, strict=True):
        assert batch.examples == tuple(row for part, _ in mine for row in part.examples)
        for name in batch.arrays._fields:
            joined = np.concatenate([getattr(part.arrays, name) for part, _ in mine])
            assert np.array_equal(joined, getattr(batch.arrays, name))
        assert merge_states([s for _, s in mine]) == state


def test_hosts_may_share_a_lane(open_, write_rows):
    stream = open_(make_config(write_rows("a.jsonl", pairs(60)), window=8, lanes=1))
    whole = collect(stream)
    for (batch, _), (part, _) in zip(whole, collect(stream, rows=range(1, 3)), strict=True):
        assert part.examples == batch.examples[1:3]


def test_state_of_one_host_count_goes_on_with_another(stream):
    whole = collect(stream)
    halves = [collect(stream, rows=range(2)), collect(stream, rows=range(2, 4))]
    state = merge_states([halves[0][3][1], halves[1][3][1]])
    assert all(same(a, b) for (a, _), (b, _) in zip(whole[4:], collect(stream, state), strict=True))
    with pytest.raises(ValueError, match=r"knows nothing of lanes \[2, 3\]"):
        collect(stream, halves[0][3][1])


def test_more_epochs_or_steps_later_go_on_with_the_same_stream(open_, write_rows):
    path = write_rows("a.jsonl", pairs(50))
    short, long, steps = (
        open_(make_config(path, window=8, lanes=2, train=train))
        for train in ({"epochs": 1.0}, {"epochs": 2.0}, {"steps": 5})
    )
    assert short.fingerprint == long.fingerprint == steps.fingerprint
    first = collect(short)
    rest = collect(long, first[-1][1])
    seen = collections.Counter(e for batch, _ in [*first, *rest] for row in batch.examples for e in row)
    assert len(seen) == 100 and set(seen.values()) == {1}
    assert len(rest) == long.steps_left(first[-1][1])
    assert steps.steps_per_run is None
    endless = steps.batches(steps.initial_state())
    batches = [next(endless)[0] for _ in range(4 * len(first))]
    for batch, (ending, _) in zip(batches, first, strict=False):
        assert all(row in ((), mine) for row, mine in zip(ending.examples, batch.examples, strict=True))
    assert all(row for batch in batches for row in batch.examples)


@pytest.mark.parametrize(("window", "lanes"), [(8, 1), (8, 2), (256, 1)])
@pytest.mark.parametrize(("part", "whole"), [(0.5, 1.0), (1.3, 2.0), (0.27, 0.81)])
def test_part_of_an_epoch_and_then_more_lose_and_repeat_nothing(open_, write_rows, window, lanes, part, whole):
    path = write_rows("a.jsonl", pairs(200))
    short, long = (open_(make_config(path, window=window, lanes=lanes, train={"epochs": e})) for e in (part, whole))
    first = collect(short)
    assert len(first) == short.steps_per_run and short.steps_left(first[-1][1]) == 0
    rest = collect(long, json.loads(json.dumps(first[-1][1])))
    assert len(rest) == long.steps_left(first[-1][1])
    seen, all_, early = (
        collections.Counter(e for batch, _ in batches for row in batch.examples for e in row)
        for batches in ([*first, *rest], collect(long), first)
    )
    assert seen == all_ and set(seen.values()) == {1}
    assert sum(early.values()) == pytest.approx(200 * part, abs=12)
    rows = [row for batch, _ in first for row in batch.arrays.segment_ids if row.any()]
    assert short.fill == pytest.approx((np.mean([(row > 0).mean() for row in rows]),))


def test_another_configuration_never_resumes_silently(stream, open_, write_rows):
    other = open_(make_config(write_rows("a.jsonl", pairs(60)), window=16))
    with pytest.raises(ValueError, match=r"data stream has changed since this state was saved"):
        other.batches(stream.initial_state())


def test_weights_share_the_draws(open_, write_rows):
    a, b = write_rows("a.jsonl", pairs(90)), write_rows("b.jsonl", pairs(30, start=500))
    stream = open_(make_config({"path": a, "weight": 1.0}, {"path": b, "weight": 3.0}))
    seen = [e for batch, _ in collect(stream) for row in batch.examples for e in row]
    counts = collections.Counter(e.source for e in seen)
    assert len(seen) == 120 and counts[1] == 90 and max(e.epoch for e in seen if e.source == 1) == 2


def test_padding_only_has_one_example_a_row(open_, write_rows):
    stream = open_(make_config(write_rows("a.jsonl", pairs(21)), packing=False))
    batches = collect(stream)
    assert stream.steps_per_run == len(batches) == 6
    assert sorted(len(row) for batch, _ in batches for row in batch.examples) == [0] * 3 + [1] * 21


def test_example_weighting_holds_in_packed_rows(open_, write_rows):
    config = make_config(write_rows("a.jsonl", pairs(40)), tuning=TuningConfig(loss_weighting="example"))
    for batch, _ in collect(open_(config)):
        for row, segments in zip(batch.arrays.loss_weights, batch.arrays.segment_ids, strict=True):
            for s in range(1, segments.max() + 1):
                assert row[segments == s].sum() == pytest.approx(1.0)


@pytest.mark.parametrize("explicit", [False, True])
def test_evaluation_rows(open_, write_rows, explicit):
    path = write_rows("a.jsonl", pairs(60))
    if explicit:
        held = make_config(path).model_dump()["data"]["train"]
        config = make_config(path, eval=tuple(type(make_config(path).data.train[0])(**s) for s in held))
    else:
        config = make_config(path, eval_fraction=0.2)
    evaluation = open_(config, eval=True)
    seen = [e.row for batch, _ in collect(evaluation) for row in batch.examples for e in row]
    again = [e.row for batch, _ in collect(evaluation) for row in batch.examples for e in row]
    trained = {e.row for batch, _ in collect(open_(config)) for row in batch.examples for e in row}
    assert seen == again and len(seen) == len(set(seen)) == (60 if explicit else 12)
    assert trained == (set(range(60)) if explicit else set(range(60)) - set(seen))
    assert open_(make_config(path), eval=True) is None


def test_lanes_depend_on_config_and_data_alone(open_, write_rows):
    path = write_rows("a.jsonl", pairs(128))
    lanes = [
        open_(make_config(path, window=w, train={"batch_rows": rows})).lanes
        for w, rows in ((2, 8), (4, 8), (4, 6), (64, 8))
    ]
    assert lanes == [8, 4, 2, 1]


# ---- what is counted, and what stops a run ----


def test_funnel_counts_reasons_and_places(open_, write_rows):
    rows = [
        *pairs(10),
        {"prompt": "x", "completion": ""},
        {"prompt": "x" * 400, "completion": "y"},
        *pairs(3, start=50),
    ]
    stream = open_(make_config(write_rows("a.jsonl", rows)))
    (source,) = stream.funnel.sources
    assert (source.rows, source.kept, source.examples, source.turns, source.stops) == (15, 13, 13, 13, 13)
    assert {r: (loss.rows, loss.where.rsplit(":", 1)[1]) for r, loss in source.lost.items()} == {
        "empty answer": (1, "11"),
        "over length": (1, "12"),
    }
    tokens = sum(int((b.arrays.segment_ids > 0).sum()) for b, _ in collect(stream))
    trained = sum(int((b.arrays.loss_weights > 0).sum()) for b, _ in collect(stream))
    assert (source.tokens, source.trained_tokens) == (tokens + 13, trained)  # a token of each is a target only
    assert source.tokens_lost > 100 and "1 rows are over length" in stream.warnings[0]
    told = stream.describe()
    assert "format prompt_completion (prompt, completion)" in told and "«It is 0.<|im_end|>»" in told
    assert "1 rows: empty answer, first at" in told and "packing fills" in told


def test_the_length_pass_is_kept(open_, write_rows, monkeypatch):
    config = make_config(write_rows("a.jsonl", pairs(20)))
    first, calls = open_(config), []
    again = open_(config, progress=lambda *a: calls.append(a))
    assert again.funnel == first.funnel and calls == []
    open_(config, max_length=63, progress=lambda *a: calls.append(a))
    assert calls == [(20, 20)]


BAD = [{"prompt": "a", "completion": "b"}, {"prompt": 1, "completion": "b"}, {"prompt": "a"}, *pairs(5)]


def test_bad_rows_stop_the_run_are_skipped_or_set_aside(open_, write_rows, tmp_path):
    path = write_rows("a.jsonl", BAD)
    with pytest.raises(
        ValueError, match=r"a\.jsonl:2: prompt is the number 1; expected text \(1 more rows .*on_bad_row"
    ):
        open_(make_config(path))
    skipped = open_(make_config(path, on_bad_row="skip"))
    assert skipped.funnel.total("kept") == 6 and not (tmp_path / "out").exists()
    open_(make_config(path, on_bad_row="quarantine"), output_dir=str(tmp_path / "out"))
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["where"].rsplit(":", 1)[1], json.loads(line["row"])) for line in lines] == [
        ("2", BAD[1]),
        ("3", BAD[2]),
    ]


def test_evaluation_sets_its_bad_rows_aside_in_a_file_of_its_own(open_, write_rows, tmp_path):
    config = make_config(
        write_rows("a.jsonl", BAD),
        eval=(SourceConfig(path=write_rows("b.jsonl", [*pairs(3), {"prompt": 1}])),),
        on_bad_row="quarantine",
    )
    for evaluation in (False, True):
        open_(config, eval=evaluation, output_dir=str(tmp_path / "out"))
    wheres = [
        [json.loads(line)["where"].rsplit("/", 1)[1] for line in (tmp_path / "out" / name).read_text().splitlines()]
        for name in ("quarantine.jsonl", "quarantine_eval.jsonl")
    ]
    assert wheres == [["a.jsonl:2", "a.jsonl:3"], ["b.jsonl:4"]]


def test_held_out_rows_of_no_use_are_a_warning_while_others_are_of_use(open_, write_rows):
    one, many = write_rows("one.jsonl", pairs(1)), write_rows("many.jsonl", pairs(20, start=50))
    evaluation = open_(make_config(one, many, eval_fraction=0.2), eval=True)
    assert sum(len(row) for batch, _ in collect(evaluation) for row in batch.examples) == 4
    (warning,) = evaluation.warnings
    assert warning.startswith("one: none of its 0 rows held out can be evaluated (it has no row)")
    mute = write_rows("mute.jsonl", [*pairs(1), *[{"prompt": "x", "completion": ""}] * 30])
    assert "empty answer" in open_(make_config(mute, many, eval_fraction=0.1), eval=True).warnings[0]
    for alone, count in ((one, 0), (mute, 3)):
        with pytest.raises(ValueError, match=rf"data.eval_fraction: none of the {count} rows .* in data.eval$"):
            open_(make_config(alone, eval_fraction=0.1), eval=True)


def test_a_glob_is_named_by_its_folder():
    paths = ("builtin:quickstart/train/*.jsonl.gz", "d/valid/part-*.jsonl", "gs://b/c/**/x.jsonl", "*.jsonl")
    names = tree.source_names([SourceConfig(path=path) for path in paths])
    assert names == ("train", "valid", "x", "*.jsonl")


def test_only_a_source_left_with_no_row_stops_the_run(open_, write_rows):
    empty = write_rows("b.jsonl", [{"prompt": "x", "completion": " "}] * 3)
    with pytest.raises(
        ValueError, match=r"b: none of its 3 rows can be trained on \(3 empty answer, first at .*b\.jsonl:1\)"
    ):
        open_(make_config(write_rows("a.jsonl", pairs(5)), empty))
    mute = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "train": False}]}]
    with pytest.raises(ValueError, match=r"none of its 1 rows can be trained on \(1 no trained token"):
        open_(make_config(write_rows("c.jsonl", mute)))
    (write_rows("d.jsonl", []))
    with pytest.raises(ValueError, match=r"d\.jsonl: found no rows"):
        open_(make_config(write_rows("d.jsonl", [])))


def test_too_many_tokens_lost(open_, write_rows):
    rows = [*pairs(10), {"prompt": "x" * 400, "completion": "y"}]
    with pytest.raises(ValueError, match=r"data.max_lost: [\d.]+% of the tokens are lost, more than 1.00%"):
        open_(make_config(write_rows("a.jsonl", rows), max_lost=0.01))


def test_a_column_that_is_not_there_names_the_source(open_, write_rows):
    path = write_rows("a.jsonl", pairs(3))
    with pytest.raises(ValueError, match=r"a\.jsonl: columns.prompt: no column 'promt' \(nearest: prompt\)"):
        open_(make_config({"path": path, "columns": {"prompt": "promt"}}))


def test_large_data_is_sampled_and_says_so(open_, write_rows, monkeypatch):
    monkeypatch.setattr(measuring, "EXACT_ROWS", 50)
    monkeypatch.setattr(measuring, "SAMPLE_ROWS", 100)
    rows = [*pairs(300), {"prompt": 5, "completion": "x"}]
    stream = open_(make_config(write_rows("a.jsonl", rows), train={"steps": 3}, on_bad_row="skip"))
    (source,) = stream.funnel.sources
    assert not source.exact and source.rows == 301 and "estimate" in stream.funnel.table()
    assert (
        stream.steps_per_run is None
        and len([b for b, _ in zip(stream.batches(stream.initial_state()), range(3), strict=False)]) == 3
    )
    strict = dataclasses.replace(stream, on_bad_row="error")
    with pytest.raises(ValueError, match=r"a\.jsonl:301: prompt is the number 5"):
        for _, _ in zip(strict.batches(strict.initial_state()), range(200), strict=False):
            pass


def test_templates_differ_between_sources(open_, write_rows):
    a, b = write_rows("a.jsonl", pairs(5)), write_rows("b.jsonl", [{"text": "Once upon a time."}])
    stream = open_(make_config({"path": a, "template": "vicuna"}, b), max_length=200)
    assert [reader.template.name for reader in stream.maker.readers] == ["vicuna", "chatml"]
    assert stream.source_names == ("a", "b")


def test_templates_are_refused_before_any_row_is_read(open_, write_rows):
    path, calls = write_rows("a.jsonl", pairs(5)), []
    wrong = SourceConfig(path=path, template="chatlm")
    for config in (
        make_config(path, wrong.model_dump()),
        make_config(path, eval=(wrong,)),
        make_config({"path": path, "template": "vicuna"}, template="chatlm"),
    ):
        with pytest.raises(ValueError, match=r"found 'chatlm'; expected auto"):
            open_(config, progress=lambda *a: calls.append(a))
    assert calls == []


def test_templates_that_the_folder_cannot_carry_are_warned_of(open_, write_rows, byte_tokenizer, tmp_path):
    path = write_rows("a.jsonl", pairs(5))
    assert open_(make_config({"path": path, "template": "chatml"})).warnings == ()
    (warning,) = open_(make_config(path, {"path": path, "template": "vicuna"}), max_length=200).warnings
    assert warning.startswith("data.template: the exported folder carries chatml, but sources are trained with vicuna")
    dated = tmp_path / "dated.jinja"
    dated.write_text("{{ strftime_now('%Y') }}" + BUILT_INS["chatml"].text)
    (warning,) = open_(make_config(path, template=str(dated))).warnings
    assert "dated.jinja writes today's date (strftime_now): the data stream changes from day to day" in warning


def test_known_faults_of_real_data(shared, llama_tokenizer):
    files = ["alpaca/alpaca_random_9k.jsonl.gz", "dolly/dolly_filtered.jsonl.gz", "gsm8k/train.jsonl"]
    config = make_config(*(str(shared / f) for f in files), template="alpaca")
    stream = loader.open_stream(config, tokenizer=llama_tokenizer, max_length=1024)
    alpaca, dolly, gsm8k = stream.funnel.sources
    assert (alpaca.rows, dolly.rows, gsm8k.rows) == (9229, 2388, 7473)
    assert alpaca.lost["empty answer"].rows == 4 and "empty answer" not in gsm8k.lost
    assert gsm8k.kept == 7473 and all(s.turns == s.stops for s in stream.funnel.sources)
    assert stream.fill[0] > 0.98 and stream.steps_per_run > 500
    assert [reader.layout.format for reader in stream.maker.readers] == ["alpaca", "dolly", "prompt_completion"]
    with pytest.raises(ValueError, match="trec: none of its 1,200 rows can be trained on"):
        columns = {"prompt": "inputs", "completion": "targets"}
        source = {"path": str(shared / "t0" / "trec.jsonl.gz"), "columns": columns}
        loader.open_stream(make_config(source, template="alpaca"), tokenizer=llama_tokenizer, max_length=1024)
