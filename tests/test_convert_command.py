"""Merging keeps an adapter's answers, in the base's dtypes; the check for llama.cpp finds what would stop it."""

import json
import pathlib
import shutil

import asking_helpers
import hf_folders
import pytest
import torch
from asking_helpers import answerer, random_prompts

from jaxtune.asking import Sampling
from jaxtune.convert import __main__ as command
from jaxtune.convert.folder import open_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(base, adapter)"""
    path = tmp_path_factory.mktemp("models")
    base = asking_helpers.folder(path / "base")
    return base, asking_helpers.adapter(base, path / "adapter")


def test_a_merged_folder_answers_as_its_adapter(folders, tmp_path, capsys):
    base, adapter = folders
    out = str(tmp_path / "merged")
    assert command.main(["merge", adapter, "--output", out]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    prompts = random_prompts(3)
    of = {path: [a.tokens for a in answerer(path).answer_prompts(prompts, Sampling(12))] for path in (*folders, out)}
    assert of[out] == of[adapter] != of[base]


def test_a_merged_folder_keeps_dtypes_and_brings_the_adapters_template(folders, tmp_path):
    _, adapter = folders
    changes = {"vocab_size": len(asking_helpers.tokenizer()), "max_position_embeddings": 128, "eos_token_id": 0}
    base = hf_folders.tiny_folder("llama32", tmp_path / "base", dtype=torch.bfloat16, **changes)
    asking_helpers.tokenizer(chat_template=None).save_pretrained(base)
    out = tmp_path / "merged"
    assert command.main(["merge", adapter, "--base", str(base), "--output", str(out)]) == 0
    assert {info.dtype for info in open_folder(out).tensors.values()} == {"BF16"}
    assert (out / "chat_template.jinja").read_text() == asking_helpers.CHAT
    end = asking_helpers.tokenizer().convert_tokens_to_ids("<end>")
    assert end in json.loads((out / "generation_config.json").read_text())["eos_token_id"]


def test_what_cannot_be_merged_is_told(folders, tmp_path, capsys):
    base, adapter = folders
    for words, expected in (
        ([base, "--output", str(tmp_path / "out")], "which needs no merging; expected a PEFT adapter"),
        ([adapter, "--output", base], "already holds a model; expected a new folder"),
        ([adapter, "--base", "/gone/away", "--output", str(tmp_path / "out")], "--base: /gone/away: no such folder"),
    ):
        assert command.main(["merge", *words]) == 1
        assert expected in capsys.readouterr().err


def edit(path: pathlib.Path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda p: None, None),
        (
            lambda p: edit(p / "config.json", architectures=["OtherModel"]),
            "config.json: architectures is ['OtherModel']",
        ),
        (lambda p: edit(p / "config.json", vocab_size=300), "config.json: vocab_size is 300, but"),
        (lambda p: edit(p / "config.json", num_hidden_layers=2), "9 tensors not of this architecture"),
        (lambda p: edit(p / "config.json", tie_word_embeddings=False), "1 tensors missing: lm_head.weight"),
        (lambda p: (p / "tokenizer.json").unlink(), "no tokenizer.model and no tokenizer.json"),
    ],
)
def test_the_check_for_llama_cpp_finds_what_would_stop_it(break_it, expected, folders, tmp_path, capsys):
    path = shutil.copytree(folders[0], tmp_path / "copy")
    break_it(path)
    code, printed = command.main(["gguf-check", str(path)]), capsys.readouterr().out
    assert code == (expected is not None)
    assert (f"error    {expected}" in printed) if expected else ("error" not in printed)
    assert (f"convert_hf_to_gguf.py {path}" in printed) == (expected is None)
