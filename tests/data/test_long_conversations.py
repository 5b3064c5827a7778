"""Long conversations are split without the faults of FastChat's splitter, and no sample is masked in silence."""

import gzip
import json

import pytest

from jaxtune.config_data import SourceConfig
from jaxtune.data.chat import templates
from jaxtune.data.examples import ExampleOptions, RowReader
from jaxtune.data.files import sources
from jaxtune.data.layouts import formats

SHORT, LONG = "Hi there", "so it goes and " * 12


def rounds(*answers):
    turns = [({"from": "human", "value": f"Question {n}?"}, {"from": "gpt", "value": a}) for n, a in enumerate(answers)]
    return {"conversations": [turn for pair in turns for turn in pair]}


@pytest.fixture
def split(byte_tokenizer, write_rows):
    """split(rows, length) -> for each row its examples' trained text, and the row's result."""

    def split(rows, length, template="chatml"):
        source = sources.open_source(SourceConfig(path=write_rows("a.jsonl", rows)))
        template, plain = (templates.load_template(name, byte_tokenizer) for name in (template, "plain"))
        options = ExampleOptions(max_length=length, overlong="split")
        reader = RowReader(source, formats.find_layout(rows[:5]), template, text_template=plain, options=options)
        results = reader.read(range(len(rows)))
        texts = [[byte_tokenizer.decode(e.targets[e.weights > 0]) for e in result.examples] for result in results]
        return texts, results, reader

    return split


def test_the_last_round_is_kept_when_it_is_the_one_that_overflows(split):
    row = rounds(SHORT, SHORT, LONG)
    texts, (result,), reader = split([row], 110)
    whole = reader.render(reader.conversations(0)[0])
    assert len(whole.tokens) > 111 and len(texts[0]) > 1
    assert "".join(texts[0]) == f"{SHORT}<|im_end|>" * 2 + f"{LONG}<|im_end|>"
    assert (result.turns, result.stops, result.lost_tokens) == (3, 3, 0)


def test_a_first_round_that_alone_overflows_gives_no_empty_sample(split):
    texts, (result,), _ = split([rounds(LONG, SHORT, SHORT)], 60)
    assert all(text for text in texts[0]) and all(len(e.tokens) <= 60 for e in result.examples)
    assert "".join(texts[0]) == f"{LONG}<|im_end|>" + f"{SHORT}<|im_end|>" * 2


@pytest.mark.parametrize("name", ["chatml", "gemma", "zephyr", "phi", "qwen3"])
def test_every_answer_and_call_of_real_conversations_survives_splitting(name, split, shared, byte_tokenizer):
    with gzip.open(shared / "multiturn" / "glaive_toolcall.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file][:40]
    texts, results, _ = split(rows, 400, name)
    assert sum(len(text) > 1 for text in texts) > 10
    for row, text, result in zip(rows, texts, results, strict=True):
        assert not result.bad and result.examples and result.lost_tokens == 0
        joined = "".join(text)
        for turn in row["conversations"]:
            if turn["from"] == "gpt":
                assert turn["value"].strip() in joined
            elif turn["from"] == "function_call":
                assert json.dumps(json.loads(turn["value"]), ensure_ascii=False) in joined
        assert all(example.weights.any() for example in result.examples)


def test_the_newest_turns_that_fit_are_found_in_a_few_renderings(byte_tokenizer, write_rows, monkeypatch):
    rows = [rounds(*[f"answer {n}" for n in range(500)])]
    source = sources.open_source(SourceConfig(path=write_rows("a.jsonl", rows)))
    chatml, plain = (templates.load_template(name, byte_tokenizer) for name in ("chatml", "plain"))
    options = ExampleOptions(max_length=600, overlong="truncate_turns")
    reader = RowReader(source, formats.find_layout(rows), chatml, text_template=plain, options=options)
    tried = []
    render = RowReader.render
    monkeypatch.setattr(RowReader, "render", lambda self, said: tried.append(len(said.messages)) or render(self, said))
    [result] = reader.read([0])
    [example] = result.examples
    assert 0 < 601 - len(example.tokens) - 1 < 60 and len(tried) <= 10
    assert byte_tokenizer.decode(example.targets[example.weights > 0]).rstrip().endswith("answer 499<|im_end|>")
    kept = len(render(reader, reader.conversations(0)[0]).tokens) - result.lost_tokens
    assert kept == len(example.tokens) + 1
