"""Pairs for an encoder-decoder: what is read and written, both lengths, and the stream of them."""

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
from jaxtune.data import loader
from jaxtune.data.chat import templates
from jaxtune.data.encoder_decoder import RAW_TEXT, PairReader
from jaxtune.data.examples import ExampleOptions
from jaxtune.data.files import sources
from jaxtune.data.layouts import formats
from jaxtune.data.stream import merge_states

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": role, "content": content}
    for n in range(4)
    for role, content in (("user", f"Question {n}? "), ("assistant", f"Answer {n}." + " so" * n))
]


@pytest.fixture
def read(byte_tokenizer, write_rows):
    def read(*rows, template="plain", **options):
        source = sources.open_source(SourceConfig(path=write_rows("a.jsonl", rows)))
        layout = formats.find_layout([rows[0]])
        template, plain = (templates.load_template(name, byte_tokenizer) for name in (template, "plain"))
        options = ExampleOptions(**{"max_length": 10_000, "encoder_length": 10_000, **options})
        reader = PairReader(source, layout, template, text_template=plain, options=options)
        return reader.read(range(len(rows)))

    return read


@pytest.fixture
def texts(byte_tokenizer):
    """texts(result) -> (what the encoder reads, what the decoder writes) of each pair."""

    def texts(result):
        decode = byte_tokenizer.decode
        return [(decode(pair.encoder_tokens), decode(pair.targets)) for pair in result.examples]

    return texts


# ---- rows to pairs ----


def test_a_pair_is_the_question_and_the_answer_each_with_eos(read, byte_tokenizer):
    (result,) = read({"prompt": "Why? ", "completion": "So it is."})
    (pair,) = result.examples
    question, answer = ([*byte_tokenizer(text)["input_ids"]] for text in ("Why? ", "So it is."))
    eos = byte_tokenizer.eos_token_id
    assert pair.encoder_tokens.tolist() == [*question, eos]
    assert pair.targets.tolist() == [*answer, eos]
    assert pair.weights.tolist() == [1.0] * (len(answer) + 1)
    assert [str(array.dtype) for array in pair] == ["int32", "int32", "float32"]
    assert pair.lengths == (len(question) + 1, len(answer) + 1)
    assert (result.tokens, result.trained, result.turns, result.stops) == (sum(pair.lengths), len(answer) + 1, 1, 1)


def test_each_answer_of_a_conversation_is_a_pair_after_all_earlier_turns(read, texts):
    (result,) = read({"messages": [SYSTEM, *TURNS[:4]]})
    assert texts(result) == [
        ("Be brief.Question 0? <eos>", "Answer 0.<eos>"),
        ("Be brief.Question 0? Answer 0.<eos>Question 1? <eos>", "Answer 1. so<eos>"),
    ]
    assert (result.turns, result.stops) == (2, 2)


def test_only_trained_answers_are_pairs(read, texts):
    rows = [{"messages": TURNS}, {"messages": [TURNS[0], {**TURNS[1], "train": False}, *TURNS[2:4]]}]
    last, quiet = read(*rows, train_on="last")[0], read(*rows)[1]
    assert [answer for _, answer in texts(last)] == ["Answer 3. so so so<eos>"]
    assert [answer for _, answer in texts(quiet)] == ["Answer 1. so<eos>"]
    assert texts(quiet)[0][0] == "Question 0? Answer 0.<eos>Question 1? <eos>"
    assert len(read(*rows, train_on="all")[0].examples) == 4


def test_a_messages_weight_is_that_of_its_targets(read):
    (result,) = read({"messages": [*TURNS[:3], {**TURNS[3], "weight": 0.25}]})
    assert [set(pair.weights.tolist()) for pair in result.examples] == [{1.0}, {0.25}]


def test_a_chat_template_asks_with_its_generation_prompt_and_trains_its_end_of_turn(read, texts):
    (result,) = read({"messages": TURNS[:2]}, template="chatml")
    assert texts(result) == [
        ("<|im_start|>user\nQuestion 0? <|im_end|>\n<|im_start|>assistant\n<eos>", "Answer 0.<|im_end|>")
    ]
    assert result.stops == 1


def test_tools_are_read_by_the_encoder_and_calls_are_written(read, texts):
    tool = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    row = {"messages": [TURNS[0], call, {"role": "tool", "content": "7"}, TURNS[1]], "tools": [tool]}
    ((asked, called), (given, answer)) = texts(read(row)[0])
    assert '"name": "add"' in asked and called.startswith("<tool_call>") and called.endswith("<eos>")
    assert given.startswith(asked.removesuffix("<eos>")) and "7" in given.removeprefix(asked) and "Answer 0." in answer


@pytest.mark.parametrize(("encoder_length", "max_length"), [(-1, 0), (0, -1)])
def test_a_pair_over_either_length_is_dropped_and_counted(read, encoder_length, max_length):
    row = {"prompt": "Why is it so? ", "completion": "It is so because it is."}
    (whole,) = read(row)
    m, n = whole.examples[0].lengths
    assert len(read(row, encoder_length=m, max_length=n)[0].examples) == 1
    (result,) = read(row, encoder_length=m + encoder_length, max_length=n + max_length)
    assert (result.examples, result.reason, result.lost_tokens, result.bad) == ([], "over length", m + n, False)


def test_overlong_error_names_the_line_and_both_lengths(read):
    (result,) = read({"prompt": "Why is it so? ", "completion": "Yes."}, encoder_length=4, overlong="error")
    assert result.bad and "a.jsonl:1: an answer of " in result.message
    assert "expected at most 10000 and 4; raise them" in result.message


def test_truncate_right_cuts_both_sides_and_keeps_the_encoders_eos(read, byte_tokenizer):
    row = {"prompt": "Why is it so? ", "completion": "It is so because it is."}
    (whole,), (cut,) = read(row), read(row, encoder_length=5, max_length=6, overlong="truncate_right")
    (long,), (short,) = whole.examples, cut.examples
    assert short.encoder_tokens.tolist() == [*long.encoder_tokens[:4], byte_tokenizer.eos_token_id]
    assert short.targets.tolist() == long.targets[:6].tolist() and len(short.weights) == 6
    assert (cut.turns, cut.stops, cut.reason) == (1, 0, "over length")  # it no longer teaches to stop
    assert cut.tokens == 11 and cut.tokens + cut.lost_tokens == whole.tokens


def test_truncate_turns_keeps_the_system_and_the_newest_turns_of_each_pair(read, texts):
    row = {"messages": [SYSTEM, *TURNS]}
    (whole,) = read(row)
    length = len(whole.examples[3].encoder_tokens)
    (result,) = read(row, encoder_length=length - 1, overlong="truncate_turns")
    assert texts(result)[:3] == texts(whole)[:3]
    asked, answer = texts(result)[3]
    assert asked.startswith("Be brief.Question 1?") and asked.endswith("Question 3? <eos>")
    assert answer == texts(whole)[3][1]
    assert result.tokens + result.lost_tokens == whole.tokens and result.reason == "over length"
    assert read(row, encoder_length=3, overlong="truncate_turns")[0].examples == []
    short = read(row, max_length=len(whole.examples[0].targets), overlong="truncate_turns")[0]
    assert texts(short) == texts(whole)[:1]  # an answer is never cut by this rule


def test_split_is_refused_with_the_rules_that_make_sense():
    with pytest.raises(ValueError, match=r"data.overlong: found split; expected drop, error, truncate_turns or trunc"):
        ExampleOptions(max_length=8, encoder_length=8, overlong="split")


def test_the_answers_of_a_conversation_together_weigh_one_by_their_tokens_and_own_weights(read):
    (result,) = read({"messages": TURNS}, loss_weighting="example")
    assert sum(float(pair.weights.sum()) for pair in result.examples) == pytest.approx(1)
    each = np.concatenate([pair.weights for pair in result.examples])
    assert each.max() == each.min()
    (result,) = read({"messages": [*TURNS[:3], {**TURNS[3], "weight": 0.25}]}, loss_weighting="example")
    one, quarter = result.examples
    assert float(one.weights.sum() + quarter.weights.sum()) == pytest.approx(1)
    assert quarter.weights[0] == pytest.approx(one.weights[0] / 4)


def test_rows_without_a_question_or_a_trained_answer_are_counted(read):
    (text,) = read({"text": "Once upon a time."})
    assert (text.examples, text.reason, text.bad) == ([], RAW_TEXT, False)
    (mute,) = read({"messages": [TURNS[0], {**TURNS[1], "train": False}]})
    assert (mute.examples, mute.reason) == ([], "no trained token")
    assert text.lost_tokens > 0 and mute.lost_tokens > 0


# ---- the stream ----


@pytest.fixture
def open_(byte_tokenizer):
    def open_(config, *, eval=False, max_length=48, encoder_length=40, **keys):
        function = loader.open_eval_stream if eval else loader.open_stream
        lengths = {"max_length": max_length, "encoder_length": encoder_length}
        return function(config, tokenizer=byte_tokenizer, **lengths, **keys)

    return open_


@pytest.fixture
def stream(open_, write_rows):
    """Two sources, one seen twice, one of conversations; windows of 8 draws on 4 lanes."""
    chats = [{"messages": [{**m, "content": m["content"] + str(i)} for m in TURNS[:4]]} for i in range(31)]
    paths = write_rows("a.jsonl", pairs(60)), {"path": write_rows("b.jsonl", chats), "epochs": 2.0}
    return open_(make_config(*paths, template="plain", train={"epochs": 2.0}, window=8))


def collect(stream, state=None, **keys):
    return list(stream.batches(stream.initial_state() if state is None else state, **keys))


def same(a, b):
    return a.examples == b.examples and all(
        np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a.arrays, b.arrays, strict=True)
    )


def test_every_pair_is_seen_exactly_its_epochs(stream):
    batches = collect(stream)
    assert len(batches) == stream.steps_per_run and stream.lanes == 4
    seen = collections.Counter(tuple(e) for batch, _ in batches for row in batch.examples for e in row)
    once = {(0, r, e): 1 for r in range(60) for e in range(2)}
    assert seen == {**once, **{(1, r, e): 2 for r in range(31) for e in range(4)}}  # two answers each


def test_rows_hold_what_their_pairs_say(stream):
    for batch, _ in collect(stream)[:6]:
        arrays, told = batch.arrays, collections.Counter()
        assert {a.shape for a in arrays[:3]} == {(4, 40)} and {a.shape for a in arrays[3:]} == {(4, 48)}
        for r, names in enumerate(batch.examples):
            for segment, name in enumerate(names, 1):
                read, written = arrays.encoder_segment_ids[r] == segment, arrays.segment_ids[r] == segment
                made = stream.maker.readers[name.source].read([name.row])[0].examples
                fits = [p for p in made if p.encoder_tokens.tolist() == arrays.encoder_tokens[r][read].tolist()]
                (pair,) = fits
                told[name] += 1
                assert arrays.targets[r][written].tolist() == pair.targets.tolist()
                assert arrays.tokens[r][written].tolist() == [0, *pair.targets[:-1]]
                assert arrays.loss_weights[r][written].tolist() == pair.weights.tolist()
                assert arrays.positions[r][written].tolist() == list(range(len(pair.targets)))
                assert arrays.encoder_positions[r][read].tolist() == list(range(len(pair.encoder_tokens)))
                assert set(arrays.source_ids[r][written].tolist()) == {name.source}
            assert max(arrays.segment_ids[r].max(), arrays.encoder_segment_ids[r].max()) == len(names)


def test_fill_is_told_of_both_sides(stream):
    arrays = [batch.arrays for batch, _ in collect(stream)]
    used = [(e, d) for a in arrays for e, d in zip(a.encoder_segment_ids, a.segment_ids, strict=True) if d.any()]
    assert stream.fill == pytest.approx(tuple(np.mean([[(s > 0).mean() for s in row] for row in used], axis=0)))
    told = stream.describe()
    encoder, decoder = stream.fill
    assert f"packing fills {encoder:.1%} of 40 encoder positions and {decoder:.1%} of 48 decoder positions" in told
    assert "    What is 0?<eos> -> «It is 0.<eos>»" in told


def test_a_plan_by_steps_counts_on_the_side_that_fills_first(open_, write_rows):
    config = make_config(write_rows("c.jsonl", pairs(200)), template="plain", train={"steps": 10})
    for encoder_length, max_length in ((60, 400), (400, 120)):
        stream = open_(config, encoder_length=encoder_length, max_length=max_length)
        batches = [b for (b, _), _ in zip(stream.batches(stream.initial_state()), range(10), strict=False)]
        assert stream.plan.draws == pytest.approx(sum(len(row) for b in batches for row in b.examples), rel=0.15)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_kill_point_and_restore_gives_the_same_pairs(stream, data):
    whole = collect(stream)
    kill = data.draw(st.integers(0, len(whole) - 1))
    rest = collect(stream, json.loads(json.dumps(whole[kill][1])))
    assert len(rest) == len(whole) - kill - 1
    assert all(same(a, b) and s == t for (a, s), (b, t) in zip(whole[kill + 1 :], rest, strict=True))


def test_workers_change_nothing_about_pairs(stream):
    whole, other = collect(stream), collect(dataclasses.replace(stream, workers=2))
    assert len(whole) == len(other)
    assert all(same(a, b) and s == t for (a, s), (b, t) in zip(whole, other, strict=True))


def test_two_hosts_together_make_the_same_pairs_and_state(stream):
    parts = [collect(stream, rows=range(h * 2, h * 2 + 2)) for h in range(2)]
    for (batch, state), *mine in zip(collect(stream), *parts, strict=True):
        assert batch.examples == tuple(row for part, _ in mine for row in part.examples)
        for name in batch.arrays._fields:
            joined = np.concatenate([getattr(part.arrays, name) for part, _ in mine])
            assert np.array_equal(joined, getattr(batch.arrays, name))
        assert merge_states([s for _, s in mine]) == state


def test_other_lengths_or_another_start_token_never_resume_silently(stream, open_, write_rows):
    config = make_config(write_rows("c.jsonl", pairs(20)), template="plain", window=8)
    first = open_(config)
    for keys in ({"encoder_length": 41}, {"max_length": 47}, {"start_token": 3}, {"encoder_length": None}):
        with pytest.raises(ValueError, match=r"data stream has changed since this state was saved"):
            open_(config, **keys).batches(first.initial_state())


def test_the_start_token_opens_every_segment(open_, write_rows):
    config = make_config(write_rows("c.jsonl", pairs(20)), template="plain")
    for batch, _ in collect(open_(config, start_token=7)):
        first = (batch.arrays.positions == 0) & (batch.arrays.segment_ids > 0)
        assert first.any() and set(batch.arrays.tokens[first].tolist()) == {7}


def test_the_length_pass_of_pairs_is_kept(open_, write_rows):
    config, calls = make_config(write_rows("c.jsonl", pairs(20, start=700)), template="plain"), []
    first = open_(config)
    again = open_(config, progress=lambda *a: calls.append(a))
    assert calls == [] and again.fill == first.fill and again.funnel == first.funnel
    open_(config, encoder_length=None, progress=lambda *a: calls.append(a))
    assert calls == [(20, 20)]


def test_phases_that_end_after_tokens_count_both_sides(open_, write_rows):
    paths = [{"path": write_rows(f"{n}.jsonl", pairs(60)), "id": n} for n in ("a", "b")]
    phases = ({"weights": {"a": 1, "b": 1}, "until": {"tokens": 300}}, {"weights": {"a": 1, "b": 3}})
    stream = open_(make_config(*paths, template="plain", train={"steps": 8}, window=8, phases=phases))
    tokens = 0
    for batch, state in stream.batches(stream.initial_state()):
        arrays = batch.arrays
        tokens += sum(int((ids > 0).sum()) for ids in (arrays.encoder_segment_ids, arrays.segment_ids))
        assert state["tokens"] == tokens
        if tokens >= 300:
            break
    assert len(state["phases"]) == 1


def test_evaluation_of_pairs_reads_every_row_once_in_a_fixed_order(open_, write_rows):
    config = make_config(write_rows("c.jsonl", pairs(60)), template="plain", eval_fraction=0.2)
    orders = [[e.row for b, _ in collect(open_(config, eval=True)) for r in b.examples for e in r] for _ in range(2)]
    assert orders[0] == orders[1] and len(set(orders[0])) == len(orders[0]) == 12


def test_example_weighting_holds_in_packed_rows_of_pairs(open_, write_rows):
    tuning = TuningConfig(loss_weighting="example")
    config = make_config(write_rows("c.jsonl", pairs(40)), template="plain", tuning=tuning)
    for batch, _ in collect(open_(config)):
        for row, segments in zip(batch.arrays.loss_weights, batch.arrays.segment_ids, strict=True):
            assert [row[segments == s].sum() for s in range(1, segments.max() + 1)] == pytest.approx(
                [1.0] * segments.max()
            )


def test_lost_tokens_are_warned_of_without_naming_split(open_, write_rows):
    rows = [*pairs(10), {"prompt": "x" * 400, "completion": "y"}]
    (warning,) = open_(make_config(write_rows("c.jsonl", rows), template="plain")).warnings
    assert "1 rows are over length; raise the encoder's length" in warning and "split" not in warning
    with pytest.raises(ValueError, match=r"data.overlong: found split"):
        open_(make_config(write_rows("c.jsonl", rows), template="plain", overlong="split"))
