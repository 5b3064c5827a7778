"""Rows over length by each rule, shifting, loss weighting, and rows that cannot be read."""

import numpy as np
import pytest

from jaxtune.config_data import SourceConfig
from jaxtune.data.chat import templates
from jaxtune.data.examples import ExampleOptions, RowReader
from jaxtune.data.files import sources
from jaxtune.data.layouts import formats

LONG = [{"role": "system", "content": "Be brief."}]
for n in range(6):
    LONG += [
        {"role": "user", "content": f"Question {n}?"},
        {"role": "assistant", "content": f"Answer {n}." + " so" * n},
    ]


@pytest.fixture
def read(byte_tokenizer, write_rows):
    def read(*rows, template="chatml", **options):
        source = sources.open_source(SourceConfig(path=write_rows("a.jsonl", rows)))
        layout = formats.find_layout([rows[0]])
        template, plain = (templates.load_template(name, byte_tokenizer) for name in (template, "plain"))
        options = ExampleOptions(**{"max_length": 10_000, **options})
        reader = RowReader(source, layout, template, text_template=plain, options=options)
        return reader.read(range(len(rows))), reader

    return read


def answers(tokenizer, examples):
    """The trained text of examples."""
    return ["".join(tokenizer.decode(e.targets[e.weights > 0])) for e in examples]


def test_the_last_token_is_a_target_only(read):
    (result,), reader = read({"messages": LONG[1:3]})
    (example,) = result.examples
    rendered = reader.render(reader.conversations(0)[0])
    assert example.tokens.tolist() == rendered.tokens[:-1].tolist()
    assert example.targets.tolist() == rendered.tokens[1:].tolist()
    assert example.weights.tolist() == rendered.weights[1:].tolist()
    assert (result.tokens, result.lost_tokens, result.turns, result.stops) == (len(rendered.tokens), 0, 1, 1)


def test_a_row_that_just_fits_is_kept_and_one_token_more_is_not(read):
    (result,), _ = read({"messages": LONG})
    length = len(result.examples[0].tokens)
    assert len(read({"messages": LONG}, max_length=length)[0][0].examples) == 1
    (dropped,), _ = read({"messages": LONG}, max_length=length - 1)
    assert (dropped.examples, dropped.reason, dropped.lost_tokens) == ([], "over length", length + 1)
    assert not dropped.bad


def test_overlong_error_names_the_line(read):
    (result,), _ = read({"messages": LONG}, max_length=20, overlong="error")
    assert result.bad and "a.jsonl:1: " in result.message and "more than max_length 20; raise it" in result.message


def test_truncate_turns_keeps_the_system_and_the_newest_turns(read, byte_tokenizer):
    (whole,), _ = read({"messages": LONG})
    length = len(whole.examples[0].tokens) - 1
    (result,), _ = read({"messages": LONG}, max_length=length, overlong="truncate_turns")
    (example,) = result.examples
    text = byte_tokenizer.decode(example.tokens)
    assert "Be brief." in text and "Question 0?" not in text and "Question 1?" in text
    assert result.tokens + result.lost_tokens == whole.tokens and result.reason == "over length"
    (none,), _ = read({"messages": LONG}, max_length=15, overlong="truncate_turns")
    assert none.examples == [] and none.lost_tokens == whole.tokens


def test_truncate_right_needs_a_trained_token(read):
    (result,), _ = read({"messages": LONG}, max_length=70, overlong="truncate_right")
    (example,) = result.examples
    assert len(example.tokens) == 70 and example.weights.any()
    assert (result.tokens, result.turns, result.stops) == (71, 2, 1)  # the second answer is cut
    (none,), _ = read({"messages": LONG}, max_length=12, overlong="truncate_right")
    assert none.examples == []


@pytest.mark.parametrize("length", [20, 37, 60, 75, 90, 150])
@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_split_loses_no_trained_token(read, byte_tokenizer, length, train_on):
    (whole,), _ = read({"messages": LONG}, train_on="assistant")
    (result,), _ = read({"messages": LONG}, max_length=length, overlong="split", train_on=train_on)
    assert all(len(e.tokens) <= length for e in result.examples) and len(result.examples) > 1
    learnt = "".join(answers(byte_tokenizer, result.examples))
    if train_on == "assistant":
        assert learnt == "".join(answers(byte_tokenizer, whole.examples))
    else:
        assert learnt.count("Be brief.") == 1
    assert (result.lost_tokens, result.reason) == (0, None)
    assert result.stops == 6


def test_split_of_one_long_answer_trains_each_target_once(read):
    row = {"prompt": "Why?", "completion": "well " * 100}
    (whole,), _ = read(row)
    (result,), _ = read(row, max_length=40, overlong="split")
    targets = np.concatenate([e.targets[e.weights > 0] for e in result.examples])
    (one,) = whole.examples
    assert targets.tolist() == one.targets[one.weights > 0].tolist()


def test_example_weighting_sums_to_one(read):
    rows = [{"prompt": "a", "completion": "yes " * n} for n in (1, 5, 50)]
    results, _ = read(*rows, loss_weighting="example")
    assert [float(r.examples[0].weights.sum()) for r in results] == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("length", [15, 40, 75])
def test_the_pieces_of_a_split_example_together_weigh_one(read, length):
    options = {"max_length": length, "overlong": "split", "loss_weighting": "example"}
    rows = [{"messages": LONG}, {"messages": LONG[1:3]}]
    results, _ = read(*rows, **options)
    assert len(results[0].examples) > 1
    totals = [sum(float(e.weights.sum()) for e in r.examples) for r in results]
    assert totals == pytest.approx([1, 1])
    weights = np.concatenate([e.weights[e.weights > 0] for e in results[0].examples])
    assert weights.max() == pytest.approx(weights.min())  # each of its tokens counts the same


def test_each_conversation_of_one_row_is_an_example_of_its_own(read):
    instances = [{"input": "", "output": "yes " * n} for n in (1, 20)]
    (result,), _ = read({"instruction": "Say it.", "instances": instances}, loss_weighting="example")
    assert [float(e.weights.sum()) for e in result.examples] == pytest.approx([1, 1])


def test_reasoning_is_removed_by_the_rule_and_counted(read, byte_tokenizer):
    row = {"prompt": "Why?", "completion": "<think>\nhm\n</think>\n\nSo."}
    (kept,), _ = read(row)
    (dropped,), _ = read(row, reasoning="drop")
    assert (kept.reasoning_removed, dropped.reasoning_removed) == (0, 1)
    (with_it,), (without,) = answers(byte_tokenizer, kept.examples), answers(byte_tokenizer, dropped.examples)
    assert "hm" in with_it and without == "So.<|im_end|>"


def test_tokens_of_a_row_without_a_trained_token_are_counted_as_lost(read):
    mute = {"messages": [LONG[1], {**LONG[2], "train": False}]}
    (result,), reader = read(mute)
    assert result.lost_tokens == len(reader.render(reader.conversations(0)[0]).tokens) > 0


def test_nothing_trained_and_bad_rows_are_told_apart(read):
    good = {"messages": LONG[1:3]}
    mute = {"messages": [LONG[1], {**LONG[2], "train": False}]}
    results, _ = read(good, mute, {"messages": LONG[1:2]}, {"messages": LONG[2:3]})
    assert [r.reason for r in results] == [None, "no trained token", "no assistant turn", "roles out of order"]
    assert [r.bad for r in results] == [False, False, False, True]
    assert "a.jsonl:4: message 1: found assistant first" in results[3].message


def test_raw_text_beside_chats_is_rendered_plain(read, byte_tokenizer):
    (result,), _ = read({"text": "Once upon"})
    assert byte_tokenizer.decode(result.examples[0].targets[-1:]) == "<eos>"
    assert result.examples[0].weights.tolist() == [1.0] * len(result.examples[0].tokens)
