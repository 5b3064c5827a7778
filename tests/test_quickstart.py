"""The quickstart: its files come from their seed, its tokenizer is one in both forms, and it learns."""

import filecmp
import gzip
import json
import pathlib
import sys

import pytest
import sentencepiece

from jaxtune.data.chat.templates import load_tokenizer
from jaxtune.decode import decode
from jaxtune.train import train

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
ASSETS = REPOSITORY / "jaxtune" / "assets" / "quickstart"


def rows(file: pathlib.Path) -> list[dict]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_what_ships_is_what_the_seed_gives(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(REPOSITORY / "tools"), *sys.path])
    import make_quickstart

    make_quickstart.main(tmp_path)
    for folder in ("train", "eval"):
        for file in (ASSETS / folder).iterdir():
            assert rows(file) == rows(tmp_path / folder / file.name), file.name
    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert filecmp.cmpfiles(ASSETS, tmp_path, names, shallow=False)[0] == names
    pieces = [sentencepiece.SentencePieceProcessor(model_file=str(f / "tokenizer.model")) for f in (ASSETS, tmp_path)]
    assert [p.id_to_piece(i) for p in pieces[:1] for i in range(p.vocab_size())] == [
        p.id_to_piece(i) for p in pieces[1:] for i in range(p.vocab_size())
    ]


def test_nothing_that_is_evaluated_was_trained_on() -> None:
    trained = rows(ASSETS / "train" / "tasks.jsonl.gz")
    seen = {json.dumps(row["messages"]) for row in trained}
    wordings = {row["phrasing"] for row in trained}
    for name in ("examples", "phrasings"):
        held_out = rows(ASSETS / "eval" / f"{name}.jsonl.gz")
        assert len({row["task"] for row in held_out}) == 19
        assert not seen & {json.dumps(row["messages"]) for row in held_out}
    assert not wordings & {row["phrasing"] for row in rows(ASSETS / "eval" / "phrasings.jsonl.gz")}
    assert all(len({row["phrasing"] for row in trained if row["task"] == task}) > 10 for task in ("add", "remember"))


def test_both_forms_of_the_tokenizer_give_the_same_ids() -> None:
    fast = load_tokenizer(str(ASSETS))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(ASSETS / "tokenizer.model"))
    for row in rows(ASSETS / "train" / "tasks.jsonl.gz")[:2000]:
        text = fast.apply_chat_template(row["messages"], tokenize=False).removeprefix("<s>")
        ids = fast(text, add_special_tokens=False)["input_ids"]
        assert ids == pieces.encode(text)
        assert fast.decode(ids) == text


def test_a_shortened_quickstart_learns_and_exports(tmp_path: pathlib.Path) -> None:
    words = [str(REPOSITORY / "configs" / "quickstart.yaml"), f"output={tmp_path}/run", "train.steps=60"]
    result = train(decode([*words, "log.every_steps=1", "eval.every_steps=30"]))
    losses = [
        record["loss"]
        for record in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if "loss" in record
    ]
    assert len(losses) == 60 and result.exit_code == 0
    assert sum(losses[-5:]) / 5 < losses[0] / 2
    assert result.eval_loss is not None and result.eval_loss < losses[0] / 2
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()
