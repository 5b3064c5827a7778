"""Mixtures as they stream: shares realised, styles, phases, orders, held-out clusters, sources that are not there."""

import collections
import itertools
import json
import threading

import numpy as np
import pytest
from conftest import make_config, pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxtune.data import loader
from jaxtune.data.mixing.mixture import InOrder
from jaxtune.data.stream import merge_states
from jaxtune.data.windows import WindowMaker


@pytest.fixture
def open_(byte_tokenizer):
    def open_(config, *, eval=False, max_length=64, **keys):
        function = loader.open_eval_stream if eval else loader.open_stream
        return function(config, tokenizer=byte_tokenizer, max_length=max_length, **keys)

    return open_


def take(stream, count, state=None, **keys):
    batches = stream.batches(stream.initial_state() if state is None else state, **keys)
    return [next(batches) for _ in range(count)]


def examples_of(batches):
    """(source name number, row, epoch) of every example of some batches."""
    return [tuple(example) for batch, _ in batches for row in batch.examples for example in row]


def same(a, b):
    return a.examples == b.examples and all(np.array_equal(x, y) for x, y in zip(a.arrays, b.arrays, strict=True))


PHASES = (
    {"until": {"steps": 4}, "weights": {"a": 1, "b": 3}},
    {"until": {"tokens": 2500}, "weights": {"b": 1}},
    {"weights": {"a": 1}},
)


@pytest.fixture
def phased(open_, write_rows):
    """Two sources; phases that end after 4 steps and after 2,500 tokens; windows of 8 draws on 2 lanes."""
    sources = [
        {"id": "a", "path": write_rows("a.jsonl", pairs(90)), "weight": 1.0},
        {"id": "b", "path": write_rows("b.jsonl", pairs(80, start=500)), "weight": 1.0},
    ]
    return open_(make_config(*sources, train={"steps": 40}, window=8, lanes=2, phases=PHASES))


def test_a_phase_begins_with_the_first_window_that_no_lane_has_begun(phased):
    batches = take(phased, 25)
    ends = [state["phases"] for _, state in batches]
    assert ends[3] and not ends[2], "the boundary is found with the step it is asked for"
    after = next(i for i, e in enumerate(ends) if len(e) == 2)
    tokens = [state["tokens"] for _, state in batches]
    assert tokens[after] >= 2500 > tokens[after - 1]
    assert sum(int((batch.arrays.segment_ids > 0).sum()) for batch, _ in batches[: after + 1]) == tokens[after]
    shares = [
        np.mean([e[0] == 0 for e in examples_of(batches[span])])
        for span in (slice(4), slice(6, after), slice(after + 5, 25))
    ]
    assert shares == pytest.approx([0.25, 0.0, 1.0], abs=0.12) and shares[1:] == [0.0, 1.0]


def test_no_row_of_an_epoch_is_drawn_twice_over_phases(phased):
    seen = collections.Counter(examples_of(take(phased, 30)))
    assert set(seen.values()) == {1}


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kill=st.integers(0, 18))
def test_phases_go_on_from_any_kill_point(phased, kill):
    whole = take(phased, 22)
    state = json.loads(json.dumps(whole[kill][1]))
    rest = take(phased, 22 - kill - 1, state)
    assert all(same(a, b) and s == t for (a, s), (b, t) in zip(whole[kill + 1 :], rest, strict=True))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_agree_where_a_phase_ends(open_, write_rows, hosts):
    """Each host is a thread that knows its own rows and lanes; they exchange numbers as processes of a pod would."""
    sources = [
        {"id": "a", "path": write_rows("a.jsonl", pairs(90)), "weight": 1.0},
        {"id": "b", "path": write_rows("b.jsonl", pairs(80, start=500)), "weight": 1.0},
    ]
    stream = open_(make_config(*sources, train={"steps": 40}, window=8, lanes=4, phases=PHASES))
    expected = take(stream, 16)
    barrier, told, results = threading.Barrier(hosts), [[0]] * hosts, [None] * hosts

    def run(host):
        def exchange(numbers):
            barrier.wait(60)
            told[host] = numbers
            barrier.wait(60)
            return list(told)

        rows = range(host * 4 // hosts, (host + 1) * 4 // hosts)
        results[host] = take(stream, 16, rows=rows, exchange=exchange)

    threads = [threading.Thread(target=run, args=(host,)) for host in range(hosts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for step, (batch, state) in enumerate(expected):
        assert merge_states([results[h][step][1] for h in range(hosts)]) == state
        mine = np.concatenate([results[h][step][0].arrays.tokens for h in range(hosts)])
        assert np.array_equal(mine, batch.arrays.tokens)


def test_a_host_with_some_rows_needs_the_others_for_phases(phased):
    with pytest.raises(ValueError, match="need `exchange`"):
        next(phased.batches(phased.initial_state(), rows=range(2)))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing_over_phases(open_, write_rows, workers):
    sources = [
        {"id": "a", "path": write_rows("a.jsonl", pairs(90)), "weight": 1.0},
        {"id": "b", "path": write_rows("b.jsonl", pairs(80, start=500)), "weight": 1.0},
    ]
    made = [
        open_(make_config(*sources, train={"steps": 40}, window=8, lanes=2, phases=PHASES, workers=n))
        for n in (0, workers)
    ]
    for (a, s), (b, t) in zip(*(take(stream, 12) for stream in made), strict=True):
        assert same(a, b) and s == t


def test_phases_in_draws_are_exact_in_runs_of_epochs(open_, write_rows):
    sources = [
        {"id": "a", "path": write_rows("a.jsonl", pairs(60)), "weight": 1.0},
        {"id": "b", "path": write_rows("b.jsonl", pairs(60, start=500)), "weight": 1.0},
    ]
    phases = ({"until": {"draws": 37}, "weights": {"a": 1}}, {"weights": {"b": 1}})
    stream = open_(make_config(*sources, window=8, lanes=1, phases=phases))
    seen = examples_of(list(stream.batches(stream.initial_state())))
    assert collections.Counter(e[0] for e in seen) == {0: 37, 1: 83}


# Styles, orders, stops.


def test_each_row_has_one_style_an_epoch(open_, write_rows):
    rows = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(40)]
    source = {
        "path": write_rows("sum.jsonl", rows),
        "templates": ({"task": "*", "kind": "zero-shot", "input": "What is {question}", "target": "{answer}"},),
        "styles": {"zero_shot": 1, "few_shot": 1},
        "shots": 2,
    }
    stream = open_(make_config(source, train={"epochs": 2.0}, window=16), max_length=256)
    assert stream.source_names == ("sum/zero_shot", "sum/few_shot")
    assert stream.source_tags == (("zero_shot",), ("few_shot",))
    batches = list(stream.batches(stream.initial_state()))
    seen = examples_of(batches)
    assert len(batches) == stream.steps_per_run
    assert collections.Counter((row, epoch) for _, row, epoch in seen) == {
        (r, e): 1 for r in range(40) for e in range(2)
    }
    assert collections.Counter(s for s, *_ in seen) == {0: 40, 1: 40}


def test_each_template_is_a_source(open_, write_rows):
    rows = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(10)]
    templates = (
        {"name": "what", "task": "*", "kind": "zero-shot", "input": "What is {question}", "target": "{answer}"},
        {"name": "say", "task": "*", "kind": "zero-shot", "input": "Say {question}", "target": "It is {answer}"},
    )
    source = {"id": "sum", "path": write_rows("sum.jsonl", rows), "templates": templates, "each_template": True}
    stream = open_(make_config(source, window=16), max_length=256)
    assert stream.source_names == ("sum/what", "sum/say")
    seen = examples_of(list(stream.batches(stream.initial_state())))
    assert collections.Counter(seen) == {(s, r, 0): 1 for s in (0, 1) for r in range(10)}


@pytest.mark.parametrize("order", ["length", "-length", "score", "-score", "file"])
def test_rows_may_come_in_an_order(open_, write_rows, order):
    rows = [{"prompt": f"{i}?", "completion": "well " * (i + 1), "score": (i * 3 + 9) % 10} for i in range(10)]
    stream = open_(make_config({"path": write_rows("a.jsonl", rows), "order": order}, window=1), max_length=64)
    drawn = stream.maker.draws.block(0, 10).row.tolist()
    key = {
        "length": list(range(10)),
        "file": list(range(10)),
        "score": sorted(range(10), key=lambda i: rows[i]["score"]),
    }
    expected = key[order.removeprefix("-")]
    assert drawn == (expected[::-1] if order.startswith("-") else expected)


def test_an_order_by_a_column_that_holds_no_numbers(open_, write_rows):
    def order(rows, by="score", **data):
        source = {"path": write_rows("a.jsonl", rows), "order": by}
        stream = open_(make_config(source, window=1, **data))
        return stream.maker.draws.block(0, len(rows)).row.tolist()

    told = r"a\.jsonl:1: data\.train\.0\.order: no column 'score'; found columns prompt, completion; expected a number"
    for rule in ("error", "skip"):
        with pytest.raises(ValueError, match=told):
            order(pairs(3), on_bad_row=rule)
    for wrong in (float("nan"), "high", True):
        rows = [{**row, "score": value} for row, value in zip(pairs(3), (1, wrong, 2), strict=True)]
        with pytest.raises(ValueError, match=rf"a\.jsonl:2: .* is {wrong!r}; expected a finite number to order by"):
            order(rows, on_bad_row="skip")
    rows = [pairs(1)[0], *({**row, "score": i} for i, row in enumerate(pairs(3, start=5)))]
    with pytest.raises(ValueError, match=r"a\.jsonl:1: .*no column 'score'.*data\.on_bad_row=skip"):
        order(rows)
    assert order(rows, on_bad_row="skip") == [1, 2, 3, 0]
    assert order(rows, "-score", on_bad_row="skip") == [3, 2, 1, 0]


@pytest.mark.parametrize(("stop", "draws"), [("plan", 90), ("first_exhausted", 20), ("all_exhausted", 160)])
def test_an_epoch_ends_where_it_is_asked_to(open_, write_rows, stop, draws):
    """10 rows and 80 rows at equal shares: a small source repeats, unless the first exhausted ends the epoch."""
    sources = [
        {"path": write_rows("a.jsonl", pairs(10)), "weight": 1.0},
        {"path": write_rows("b.jsonl", pairs(80, start=500)), "weight": 1.0},
    ]
    stream = open_(make_config(*sources, window=8, stop=stop))
    assert stream.maker.total == pytest.approx(draws, abs=1)


def test_shares_of_tokens_are_realised(open_, write_rows):
    long = [{"prompt": f"{i}?", "completion": "well " * 20} for i in range(60)]
    short = [{"prompt": f"{i}?", "completion": "no"} for i in range(200)]
    sources = [
        {"path": write_rows("long.jsonl", long), "weight": 1.0},
        {"path": write_rows("short.jsonl", short), "weight": 1.0},
    ]
    stream = open_(make_config(*sources, window=64, train={"steps": 30}, mixing={"unit": "tokens"}))
    tokens = collections.Counter()
    for batch, _ in take(stream, 30):
        for source in (0, 1):
            tokens[source] += int(((batch.arrays.source_ids == source) & (batch.arrays.segment_ids > 0)).sum())
    assert tokens[0] / sum(tokens.values()) == pytest.approx(0.5, abs=0.03)


# What is held out, and what is not there.


def test_held_out_clusters_are_evaluated_and_nothing_of_them_is_trained(open_, write_rows):
    """Two rows of the held-out task stand in a training source too, one in other letters: neither is trained."""
    leaked = pairs(20, start=300)
    again = {"prompt": leaked[3]["prompt"].upper() + "  ", "completion": "Something else."}
    sources = [
        {"path": write_rows("xsum.jsonl", [*pairs(30), leaked[0], again])},
        {"path": write_rows("copa.jsonl", leaked)},
        {"path": write_rows("cosmos.jsonl", pairs(15, start=900)), "task": "cosmos_qa"},
    ]
    config = make_config(*sources, hold_out={"clusters": ("common_sense",)}, window=8)
    stream, held = open_(config), open_(config, eval=True)
    assert stream.source_names == ("xsum",) and held.source_names == ("copa",)
    assert stream.funnel.sources[0].lost["also held out"].rows == 2
    assert {row for _, row, _ in examples_of(list(stream.batches(stream.initial_state())))} == set(range(30))
    assert held.funnel.total("examples") == 20


def test_sources_that_are_not_there_are_one_listed_error_or_left_out(open_, write_rows, tmp_path):
    sources = [
        {"path": write_rows("a.jsonl", pairs(10)), "weight": 0.5},
        {"path": str(tmp_path / "gone.jsonl"), "weight": 0.25},
        {"path": str(tmp_path / "lost.jsonl"), "weight": 0.25},
    ]
    with pytest.raises(ValueError, match=r"(?s)gone\.jsonl.*lost\.jsonl.*2 of 3 sources are not there"):
        open_(make_config(*sources))
    stream = open_(make_config(*sources, missing="skip"))
    assert stream.source_names == ("a",) and stream.plan.skipped == ("gone", "lost")
    assert any("2 sources are not there and are left out" in warning for warning in stream.warnings)


def test_the_plan_says_what_the_run_then_does(open_, write_rows):
    sources = [
        {"path": write_rows("a.jsonl", pairs(10)), "weight": 0.3, "tags": ("x",)},
        {"path": write_rows("b.jsonl", pairs(70, start=500)), "weight": 0.7},
    ]
    stream = open_(make_config(*sources, train={"epochs": 2.0}, window=8))
    drawn = collections.Counter(e[0] for e in examples_of(list(stream.batches(stream.initial_state()))))
    for i, leaf in enumerate(stream.plan.leaves):
        assert leaf.draws == drawn[i] and leaf.epochs == pytest.approx(drawn[i] / leaf.examples)
        assert leaf.realised == pytest.approx(float(leaf.rate), abs=0.01)
    assert stream.plan.draws == 160 and "by tag: x 30.00%" in stream.describe()


def test_a_changed_mixture_is_refused_by_name(open_, write_rows):
    paths = write_rows("a.jsonl", pairs(10)), write_rows("b.jsonl", pairs(20, start=50))
    made = [
        open_(make_config(*({"path": path, "weight": w} for path, w in zip(paths, weights, strict=True))))
        for weights in ((1.0, 1.0), (1.0, 2.0))
    ]
    made[0].refuse_other(made[0].identity)
    with pytest.raises(ValueError, match="source b is another"):
        made[1].refuse_other(made[0].identity)
    one = open_(make_config(paths[0]))
    with pytest.raises(ValueError, match="source b is gone"):
        one.refuse_other(made[0].identity)


def test_a_window_makes_about_64_rows_however_long_the_run(open_, write_rows):
    path = write_rows("a.jsonl", pairs(400))
    made = [open_(make_config(path, train=train)) for train in ({"epochs": 1.0}, {"epochs": 3.0}, {"steps": 7})]
    assert len({stream.fingerprint for stream in made}) == 1
    per_row = 64 * 400 / made[0].funnel.total("tokens")
    assert made[0].maker.size == 256 and 256 / per_row >= 64, "the least"
    short = write_rows("b.jsonl", [{"prompt": f"{i}", "completion": "y"} for i in range(400)])
    many = open_(make_config(short, template="plain"), max_length=128)
    rows = many.maker.size * many.funnel.total("tokens") / 400 / 128
    assert many.maker.size > 512 and 48 <= rows <= 128
    assert open_(make_config(path, window=100)).maker.size == 100


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 40), st.integers(1, 4), st.floats(0.1, 1.0))
def test_windows_cover_the_draws_one_after_another(draws, size, epochs, part):
    """Also where an epoch is long enough to open with small windows."""
    maker = WindowMaker(
        readers=(),
        draws=InOrder([np.arange(draws)]),
        epoch_draws=draws,
        total=max(1, round(draws * (epochs - 1 + part))),
        size=size,
        rows=None,
        seed=0,
    )
    spans = [maker._span(window) for window in range(maker.count)]
    assert spans[0][0] == 0 and all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    assert spans[-1][0] < maker.total <= spans[-1][1]
    assert all(0 < last - first <= size for first, last in spans)
    sizes = [last - first for first, last in spans[:8]]
    assert sizes == [size // 4] * 8 if draws >= 64 * size and size >= 4 else sizes[0] == min(size, draws)


# What a reviewer found.

WORDINGS = (
    {"name": "what", "task": "*", "kind": "zero-shot", "input": "What is {prompt}", "target": "{completion}"},
    {"name": "say", "task": "*", "kind": "zero-shot", "input": "Say {prompt}", "target": "{completion}"},
)


def test_a_source_that_gets_no_draw_is_a_warning(open_, write_rows):
    sources = [
        {"path": write_rows("a.jsonl", pairs(40)), "weight": 1.0},
        {"path": write_rows("b.jsonl", pairs(40, start=50)), "weight": 1e-6, "templates": WORDINGS},
    ]
    stream = open_(make_config(*sources, window=8))
    assert any("1 sources get no draw in this run: b" in warning for warning in stream.warnings)
    assert {e[0] for e in examples_of(list(stream.batches(stream.initial_state())))} == {0}


@pytest.mark.parametrize("twice", [False, True])
def test_leaves_of_one_file_hold_out_the_same_rows(open_, write_rows, twice):
    path = write_rows("a.jsonl", pairs(40))
    sources = [{"path": path, "templates": WORDINGS, "each_template": True}]
    sources = [{"path": path}, {"path": path, "id": "again"}] if twice else sources
    config = make_config(*sources, eval_fraction=0.1, window=8)
    trained, held = (
        {row for _, row, _ in examples_of(list(stream.batches(stream.initial_state())))}
        for stream in (open_(config), open_(config, eval=True))
    )
    assert len(held) == 4 and len(trained) == 36 and not trained & held


def test_keys_that_contradict_one_another_are_refused():
    with pytest.raises(ValueError, match=r"data\.stop: found all_exhausted beside data\.phases"):
        make_config("a.jsonl", stop="all_exhausted", phases=({"until": {"draws": 5}}, {}))
    with pytest.raises(ValueError, match=r"data\.eval_fraction: found beside data\.hold_out\.clusters"):
        make_config("a.jsonl", eval_fraction=0.1, hold_out={"clusters": ("c",)})


def test_a_phase_of_steps_waits_for_the_phase_of_draws_before_it(open_, write_rows):
    sources = [
        {"id": "a", "path": write_rows("a.jsonl", pairs(90)), "weight": 1.0},
        {"id": "b", "path": write_rows("b.jsonl", pairs(80, start=500)), "weight": 1.0},
    ]
    phases = ({"until": {"draws": 64}, "weights": {"a": 1}}, {"until": {"steps": 2}, "weights": {"b": 1}}, {})
    stream = open_(make_config(*sources, train={"steps": 40}, window=8, lanes=2, phases=phases))
    batches = take(stream, 25)
    ends = [state["phases"] for _, state in batches]
    assert ends[2] == [64] and ends[-1][0] == 64 and ends[-1] == sorted(ends[-1]) and len(ends[-1]) == 2
    assert set(collections.Counter(examples_of(batches)).values()) == {1}


@pytest.mark.parametrize("order", ["length", "-length", "file"])
def test_ordered_styles_share_the_rows_evenly(open_, write_rows, order):
    rows = [{"question": "well " * (i % 37) + f"{i}", "answer": str(i)} for i in range(400)]
    template = {"task": "*", "kind": "zero-shot", "input": "{question}", "target": "{answer}"}
    source = {"path": write_rows("a.jsonl", rows), "templates": (template,), "order": order}
    source |= {"styles": {"zero_shot": 1, "few_shot": 3}, "shots": 1}
    stream = open_(make_config(source, window=32), max_length=512)
    draws = stream.maker.draws.block(0, 400)
    assert sorted(draws.row.tolist()) == list(range(400))
    assert np.bincount(draws.source).tolist() == [100, 300]
    lengths = np.array([len(row["question"]) for row in rows])[draws.row]
    assert abs(lengths[draws.source == 0].mean() - lengths[draws.source == 1].mean()) < 3


def test_rows_decide_epochs_whatever_examples_says(open_, write_rows):
    sources = [
        {"path": write_rows("a.jsonl", pairs(40)), "examples": 4000},
        {"path": write_rows("b.jsonl", pairs(40, start=500))},
    ]
    stream = open_(make_config(*sources, window=8))
    seen = collections.Counter(examples_of(list(stream.batches(stream.initial_state()))))
    assert len(seen) == 80 and set(seen.values()) == {1}
    assert any("e.g. a 40 rather than 4,000" in warning for warning in stream.warnings)


def test_what_of_the_evaluation_is_not_there_is_told(open_, write_rows, tmp_path):
    train = {"path": write_rows("a.jsonl", pairs(40))}
    held = [{"path": write_rows("b.jsonl", pairs(9, start=90)), "cluster": "c"}, {"path": "gone.jsonl", "cluster": "c"}]
    config = make_config(train, *held, hold_out={"clusters": ("c",)}, missing="skip")
    for stream in (open_(config), open_(config, eval=True)):
        told = [warning for warning in stream.warnings if "sources of the evaluation are not there" in warning]
        assert len(told) == 1 and told[0].endswith("gone")
