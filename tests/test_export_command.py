"""A run's folders written from one of its checkpoints later are those that its end would have written."""

import pathlib

import pytest
import tiny_runs

from jaxtune.convert import __main__ as command
from jaxtune.run_lock import RunLock
from jaxtune.train import train


@pytest.fixture(scope="module", params=["lora", "full"])
def runs(request, tmp_path_factory):
    """(a run of 4 updates that exported nothing, the same run stopped after 2 that exported all)"""
    root = tmp_path_factory.mktemp(request.param)
    base = tiny_runs.write_model(root / "base")
    data = tiny_runs.write_rows(root / "data.jsonl", tiny_runs.rows(40))
    words = (
        f"tuning.method={request.param}",
        "checkpoint.every_steps=2",
        "data.template=alpaca",
        "data.max_length=160",
    )
    none = ("export.hf=false", "export.adapter=false", "train.steps=4")
    train(tiny_runs.config(base, data, root / "whole", *words, *none))
    train(tiny_runs.config(base, data, root / "short", *words, "train.steps=2"))
    return root / "whole", root / "short"


def files(folder: pathlib.Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_checkpoint_is_exported_as_the_runs_end_would_have(runs, tmp_path, capsys):
    whole, short = runs
    before = files(whole)
    assert command.main(["export", str(whole), "--step", "2", "--output", str(tmp_path)]) == 0
    assert f"wrote {tmp_path}/hf from step 2" in capsys.readouterr().out
    for name in ("hf", "adapter"):
        assert (tmp_path / name).exists() == (short / name).exists()
        assert files(tmp_path / name) == files(short / name)
    assert files(whole) == before


def test_the_newest_goes_into_the_run_itself_and_is_not_replaced(runs, capsys):
    whole, short = runs
    assert command.main(["export", str(whole)]) == 0
    assert f"wrote {whole}/hf from step 4" in capsys.readouterr().out
    assert files(whole / "hf").keys() == files(short / "hf").keys() and files(whole / "hf") != files(short / "hf")
    assert command.main(["export", str(whole)]) == 1
    assert "already holds hf/" in capsys.readouterr().err


def test_what_cannot_be_exported_is_told(runs, tmp_path, capsys):
    whole, _ = runs
    for words, expected in (
        ([str(tmp_path)], "no such file"),
        ([str(whole), "--step", "3"], "--step: found 3, of which"),
        ([str(whole), "--step", "9"], "intact are: 2, 4"),
    ):
        assert command.main(["export", *words, "--output", str(tmp_path / "out")]) == 1
        assert expected in capsys.readouterr().err
    lock = RunLock(str(whole))
    assert command.main(["export", str(whole), "--output", str(tmp_path / "out")]) == 1
    lock.release()
    assert "being written by another run" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_not_exported(runs, tmp_path, capsys):
    whole, _ = runs
    file = max((whole / "checkpoints" / "2").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    sound = file.read_bytes()
    file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    assert command.main(["export", str(whole), "--step", "2", "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    file.write_bytes(sound)
    assert "its SHA-256 differs" in said.out + said.err and not (tmp_path / "out").exists()
