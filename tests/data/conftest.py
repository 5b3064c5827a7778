"""Tokenizers, small files and configurations for the data tests."""

import json

import pytest
import tokenizers
import transformers

from jaxtune.config import Config, ModelConfig, TrainConfig
from jaxtune.config_data import DataConfig, SourceConfig
from jaxtune.data.chat import templates

SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|begin_of_text|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
]
CORPUS = ["Hello there, how are you? I am well. The answer is yes: 12 + 30 = 42.\nuser assistant system"] * 50


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A byte-level BPE tokenizer of 400 pieces; its pad token is its EOS token, and it adds no BOS."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<eos>"])
    model.train_from_iterator(CORPUS, trainer)
    model.add_special_tokens(SPECIAL)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="session")
def llama_tokenizer(shared):
    """The real Llama-2 tokenizer, without a chat template of its own."""
    return templates.load_tokenizer(str(shared / "tokenizer" / "llama2_hf"))


@pytest.fixture
def write_rows(tmp_path):
    """write_rows("a.jsonl", rows) -> path."""

    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def make_config(*paths, train=None, output="unused", seed=0, tuning=None, **data):
    """A configuration whose sources are paths or dicts of source keys."""
    sources = tuple(SourceConfig(**(p if isinstance(p, dict) else {"path": p})) for p in paths)
    more = {} if tuning is None else {"tuning": tuning}
    return Config(
        output=output,
        seed=seed,
        model=ModelConfig(path="unused"),
        data=DataConfig(train=sources, **{"template": "chatml", **data}),
        train=TrainConfig(**{"epochs": 1.0, "batch_rows": 4, **(train or {})}),
        **more,
    )


def pairs(count, start=0):
    """Question and answer rows of varied lengths, no two alike."""
    return [
        {"prompt": f"What is {i}?", "completion": f"It is {i}." + " well" * (i * 7 % 23)}
        for i in range(start, start + count)
    ]
