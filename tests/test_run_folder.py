"""One run writes a folder at a time, and only the run that it holds goes on."""

import pytest

from jaxtune import run_folder
from jaxtune.config import Config
from jaxtune.decode import decode, to_yaml
from jaxtune.run_folder import MAY_CHANGE, RunFolder, differences


def config(*words) -> Config:
    return decode(["model.path=m", "output=o", "train.steps=5", "data.train.0.path=d.jsonl", *words])


def held(tmp_path, *words) -> RunFolder:
    folder = RunFolder(str(tmp_path))
    folder.write_config(config(*words))
    return folder


def test_checkpoints_without_their_configuration_are_not_gone_on_with(tmp_path):
    folder = RunFolder(str(tmp_path))
    with pytest.raises(ValueError, match=r"holds checkpoints but no config.yaml"):
        folder.check_resume(config(), has_saved=True)
    folder.release()


def test_a_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = RunFolder("~/run")
    folder.release()
    assert folder.path == tmp_path / "run"


@pytest.mark.parametrize(
    "word",
    [
        "output=p",
        "train.steps=9",
        "train.epochs=9",
        "train.microbatch_rows=2",
        "log.every_steps=1",
        "eval.every_steps=1",
        "checkpoint.every_steps=1",
        "mesh.tensor=2",
        "model.remat=full",
        "data.workers=2",
        "export.hf=false",
    ],
)
def test_how_long_and_how_watched_may_change(tmp_path, word):
    folder = held(tmp_path)
    folder.check_resume(config(word), has_saved=True)
    folder.release()


@pytest.mark.parametrize(
    "word",
    [
        "model.path=n",
        "tuning.rank=8",
        "data.train.0.path=e.jsonl",
        "data.train.1.path=e.jsonl",
        "data.max_length=32",
        "optimizer.learning_rate=1.0",
        "optimizer.options.b1=0.5",
        "train.batch_rows=16",
        "seed=1",
        "model.dtype=bfloat16",
        "model.param_dtype=bfloat16",
    ],
)
def test_what_is_learned_may_not_change_and_both_values_are_told(tmp_path, word):
    folder = held(tmp_path)
    with pytest.raises(ValueError, match=rf"(?s){word.partition('=')[0]}\b.* there, .* now\nGive another output="):
        folder.check_resume(config(word), has_saved=True)
    folder.release()


def test_all_changed_keys_are_listed_at_once(tmp_path):
    folder = held(tmp_path)
    with pytest.raises(ValueError) as caught:
        folder.check_resume(config("tuning.rank=8", "seed=3", "data.window=9", "log.every_steps=3"), has_saved=True)
    told = str(caught.value)
    assert all(
        line in told for line in ("tuning.rank: 16 there, 8 now", "seed: 0 there, 3 now", "data.window: 'auto' there")
    )
    assert "log.every_steps" not in told
    folder.release()


def test_a_run_that_shall_not_go_on_is_refused(tmp_path):
    folder = held(tmp_path)
    with pytest.raises(ValueError, match=r"already holds a run and checkpoint.resume is never.*another output="):
        folder.check_resume(config("checkpoint.resume=never"), has_saved=True)
    folder.release()


def test_keys_that_may_change_are_keys():
    leaves = {key for key, _, _ in differences(config(), config())} | set(run_folder.leaves_of(config().model_dump()))
    for allowed in MAY_CHANGE:
        assert any(key == allowed or key.startswith(f"{allowed}.") for key in leaves), allowed


def test_the_configuration_of_a_folder_is_replaced_as_a_whole(tmp_path, monkeypatch):
    folder = held(tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    monkeypatch.setattr(type(folder.path), "replace", lambda *_: (_ for _ in ()).throw(OSError("power lost")))
    with pytest.raises(OSError):
        folder.write_config(config("train.steps=9"))
    assert (tmp_path / "config.yaml").read_text() == before == to_yaml(config())
    monkeypatch.undo()
    folder.release()


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors", "metrics.jsonl", "hf/"])
def test_a_folder_with_other_work_is_not_written_over(tmp_path, name):
    (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"holds {name.strip('/')} but no run.*another output="):
        RunFolder(str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == [name.strip("/")]


def test_a_folder_with_harmless_files_is_taken(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    RunFolder(str(tmp_path)).release()
