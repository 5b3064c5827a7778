"""Folders written by several hosts, each its own files, are those that one writes; a failure of one is told by all."""

import pathlib

import launcher
import pytest
import tiny_runs
import transformers

from jaxtune.convert import __main__ as command
from jaxtune.train import train

EXPORT = "jaxtune.convert.__main__:main"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """A run on a base of many files, which has exported nothing; a merged adapter would differ in last bits."""
    root = tmp_path_factory.mktemp("export")
    base = tiny_runs.write_model(root / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="30KB")
    assert len(list(base.glob("*.safetensors"))) > 3
    data = tiny_runs.write_rows(root / "data.jsonl", tiny_runs.rows(40))
    words = ("tuning.method=full", "export.hf=false", "train.steps=2")
    train(tiny_runs.config(base, data, root / "run", *words))
    return root / "run"


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_hosts_write_what_one_writes(run, tmp_path):
    assert command.main(["export", str(run), "--output", str(tmp_path / "one")]) == 0
    words = ["export", str(run), "--output", str(tmp_path / "three")]
    launcher.finish(words, processes=3, devices=2, logs=tmp_path / "logs", main=EXPORT)
    assert files(tmp_path / "one") == files(tmp_path / "three")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "three" / "hf")
    assert sum(p.numel() for p in opened.parameters())


def test_a_file_that_one_host_cannot_write_ends_all(run, tmp_path):
    names = sorted(path.name for path in (run.parent / "base").glob("*.safetensors"))
    (tmp_path / "out" / "hf" / names[1]).mkdir(parents=True)  # of host 1
    words = ["export", str(run), "--output", str(tmp_path / "out")]
    ended = launcher.finish(words, expect=1, processes=2, devices=2, logs=tmp_path / "logs", main=EXPORT)
    for host in (0, 1):
        assert "error: host 1 (" in ended.said(host) and "Is a directory" in ended.said(host)
    assert not (tmp_path / "out" / "hf" / "config.json").exists(), "a folder cut off must not pass for a model"
