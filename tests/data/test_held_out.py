"""What is held out is found again under other labels, columns and wordings, and what many rows share is not counted."""

import numpy as np
import pytest
from conftest import make_config

from jaxtune.data import loader

PLACES = ("harbour", "station", "library", "market", "museum", "garden")
TEXTS = [f"The old {place} opened its doors to the crowd at number {n}." for n, place in enumerate(PLACES)]
SHARED = "Read what follows with care and then answer with a single word."
TEMPLATES = tuple(
    {"name": name, "input": name + " {text}", "target": "{label}"} for name in ("Judge:", "Rate this text:", "Say it:")
)


@pytest.fixture
def left_out(byte_tokenizer, write_rows, tmp_path):
    """left_out(held rows, trained rows) -> the trained rows that are left out, and how often progress was told."""

    def left_out(held, trained, more=None, **source):
        told = []
        sources = [
            {"path": write_rows("ours.jsonl", trained), "cluster": "ours", **(source or {})},
            {"path": write_rows("theirs.jsonl", held), "cluster": "theirs", **(more or {})},
        ]
        config = make_config(*sources, hold_out={"clusters": ("theirs",)}, train={"epochs": 1.0})
        stream = loader.open_stream(
            config,
            tokenizer=byte_tokenizer,
            max_length=512,
            cache_dir=str(tmp_path / "cache"),
            progress=lambda *done: told.append(done),
        )
        (reader,) = stream.maker.readers
        results = reader.read(range(len(trained)))
        return [i for i, result in enumerate(results) if result.reason == "also held out"], told

    return left_out


HELD = [{"instruction": SHARED, "options": [SHARED + " Yes.", "no"], "text": t, "label": 1} for t in TEXTS[:4]]
KEPT = {"prompt": "Why?", "completion": "So it is."}
FIELDS = {"templates": TEMPLATES[:1]}


@pytest.mark.parametrize(
    "leak",
    [
        {"text": TEXTS[2], "label": "good"},
        {"text": TEXTS[2], "label": 1, "note": "new"},
        {"text": TEXTS[2], "target": 1},
    ],
    ids=["label as text", "a column more", "label by another name"],
)
def test_a_long_text_of_a_held_out_row_is_enough(left_out, leak):
    other = {"text": TEXTS[5], "instruction": SHARED, "options": [SHARED + " Yes."], "note": "x"}
    name = "target" if "target" in leak else "label"
    templates = ({"name": "t", "input": "{text}?", "target": "{" + name + "}"},)
    rows = [{**other, name: 1}, leak, {**other, "text": TEXTS[4], name: 1}]
    found, told = left_out(HELD, rows, FIELDS, templates=templates, format="fields")
    assert found == [1]
    assert told[0] == (4, 4)  # the pass over held-out rows tells how far it is


def test_a_prompt_of_any_template_of_a_held_out_task_is_found(left_out):
    held = [{"text": text, "label": "x"} for text in ("Short one", "Short two")]
    rows = [{"prompt": f"{t['name']} Short two", "completion": "x"} for t in TEMPLATES] + [KEPT]
    assert left_out(held, rows, {"templates": TEMPLATES})[0] == [0, 1, 2]


def test_what_several_held_out_rows_share_and_what_rows_answer_leave_nothing_out(left_out):
    refusal = "I am sorry, but I cannot help you with that kind of request."
    held = [{"prompt": f"Ask {i}?", "completion": f"{i}", "instruction": SHARED} for i in range(3)]
    held.append({"prompt": "Do harm?", "completion": refusal})
    rows = [
        {"prompt": "Make trouble?", "completion": refusal},
        {"prompt": f"{SHARED} Now.", "completion": "x", "instruction": SHARED},
        KEPT,
    ]
    assert left_out(held, rows)[0] == []


def test_held_out_rows_that_are_alike_count_as_one(left_out):
    held = [{"prompt": TEXTS[0], "completion": "x"}] * 2
    rows = [{"prompt": "Now then.", "completion": "x", "source": TEXTS[0]}, KEPT]
    assert left_out(held, rows)[0] == [0]


@pytest.mark.parametrize("damage", ["cut", "text", "another", "empty"])
def test_a_damaged_file_of_hashes_or_lengths_is_made_anew(byte_tokenizer, write_rows, tmp_path, damage):
    sources = [
        {"path": write_rows("a.jsonl", [KEPT, {"prompt": TEXTS[0], "completion": "x"}]), "cluster": "ours"},
        {"path": write_rows("c.jsonl", [{"prompt": "Who?", "completion": "You."}]), "cluster": "ours"},
        {"path": write_rows("b.jsonl", [{"prompt": TEXTS[0], "completion": "y"}]), "cluster": "theirs"},
    ]
    config, cache = make_config(*sources, hold_out={"clusters": ("theirs",)}), tmp_path / "cache"

    def funnel():
        return loader.open_stream(config, tokenizer=byte_tokenizer, max_length=512, cache_dir=str(cache)).funnel

    first, files = funnel(), sorted((cache / "lengths").iterdir())
    assert len(files) == 4 and first.sources[0].lost["also held out"].rows == 1
    for path in files:
        whole = path.read_bytes()
        if damage == "another":
            np.savez(path, rows=np.zeros(3))
        else:
            path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"no such thing", "empty": b""}[damage])
    assert funnel() == first


# What is told of what was lost


def test_removed_reasoning_and_marks_left_are_told(byte_tokenizer, write_rows):
    rows = [{"prompt": f"{i}?", "completion": "<think>hm</think>So."} for i in range(3)]
    rows.append({"prompt": "And?", "completion": "So <think>hm</think> it is."})
    config = make_config(write_rows("a.jsonl", rows), reasoning="drop")
    stream = loader.open_stream(config, tokenizer=byte_tokenizer, max_length=512)
    assert "a: 3 reasoning blocks removed by data.reasoning=drop" in stream.funnel.table()
    assert stream.warnings[0].startswith("a: 1 answers still hold <think> or </think>, since data.reasoning=drop")


def test_the_largest_reason_of_lost_tokens_is_named_and_length_is_its_remedy_alone(byte_tokenizer, write_rows):
    mute = [{"role": "user", "content": "x" * 600}, {"role": "assistant", "content": "y", "train": False}]
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    long = [{"role": "user", "content": "x" * 80}, chat[1]]
    path = write_rows("a.jsonl", [{"messages": m} for m in (chat, chat, mute, long, long)])

    def opened(**data):
        return loader.open_stream(make_config(path, **data), tokenizer=byte_tokenizer, max_length=64)

    stream = opened()
    lost = stream.funnel.sources[0].lost
    assert sum(loss.tokens for loss in lost.values()) == stream.funnel.total("tokens_lost")
    told = f"most of them in 1 rows: no trained token, first at {path}:3; repair such rows"
    assert len(stream.warnings) == 1 and told in stream.warnings[0] and "max_length" not in stream.warnings[0]
    with pytest.raises(ValueError, match=rf"data\.max_lost: .* more than 1\.00%, {told}"):
        opened(max_lost=0.01)
