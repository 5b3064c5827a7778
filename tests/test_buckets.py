"""A run whose output is a bucket: saved, gone on with, exported and asked as on a disk."""

import json
import os
import signal
import time

import gcs_server
import gcsfs
import jax
import pytest
import tiny_runs

from jaxtune import doctor, hub, run_folder, watching
from jaxtune.opening import open_model
from jaxtune.run_folder import RunFolder
from jaxtune.train import train


@pytest.fixture
def bucket(monkeypatch):
    """The objects of an empty bucket, by name."""
    gcsfs.GCSFileSystem.clear_instance_cache()  # or the last test's server would be asked
    with gcs_server.serve() as (objects, variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield objects


OUTPUT = f"gs://{gcs_server.BUCKET}/runs/mine"


def records(bucket) -> list[dict]:
    return [json.loads(line) for line in bucket.by_name["runs/mine/metrics.jsonl"].content.splitlines()]


@pytest.mark.long
def test_a_run_in_a_bucket_is_the_run_on_a_disk(bucket, tmp_path, monkeypatch):
    base = tiny_runs.write_model(tmp_path / "base")
    data = tiny_runs.write_rows(tmp_path / "data.jsonl", tiny_runs.rows(40))
    words = ("train.steps=4", "checkpoint.every_steps=2", "log.tensorboard=true", "export.hf=true")
    here = train(tiny_runs.config(base, data, tmp_path / "out", *words))

    def stop(*anything, **more):
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(watching.Watcher, "_tell_realised", stop)  # any moment of step 1
        first = train(tiny_runs.config(base, data, OUTPUT, *words))
    assert first.exit_code == 143 and first.step == 1
    assert [record["step"] for record in records(bucket)] == [1]
    there = train(tiny_runs.config(base, data, OUTPUT, *words))
    assert there.step == 4 and there.loss == pytest.approx(here.loss, abs=1e-6)
    assert there.hf == f"{OUTPUT}/hf" and there.adapter == f"{OUTPUT}/adapter"
    assert [record["step"] for record in records(bucket) if "loss" in record] == [1, 2, 3, 4]
    for file in sorted((tmp_path / "out").rglob("*")):
        name = file.relative_to(tmp_path / "out").as_posix()
        if file.is_file() and name.startswith(("hf/", "adapter/")) and name.endswith((".safetensors", ".json")):
            found = bucket.by_name[f"runs/mine/{name}"].content
            assert name.endswith("adapter_config.json") or found == file.read_bytes(), name
    assert not [name for name in bucket.by_name if "/.lock" in name]
    assert any("/events/" in name for name in bucket.by_name)
    opened = open_model(OUTPUT)
    assert jax.tree.leaves(opened.state)
    assert train(tiny_runs.config(base, data, OUTPUT, *words)).step == 4  # nothing left to do


def test_records_grow_in_the_bucket_while_the_run_goes_on(bucket, monkeypatch):
    monkeypatch.setattr(run_folder, "PUBLISH_SECONDS", 0.05)
    folder = RunFolder(OUTPUT)
    (folder.local / "metrics.jsonl").write_text("1\n")
    deadline = time.time() + 5
    while "runs/mine/metrics.jsonl" not in bucket.by_name and time.time() < deadline:
        time.sleep(0.02)
    assert bucket.by_name["runs/mine/metrics.jsonl"].content == b"1\n"
    folder.release()
    assert not folder.local.exists()


def test_what_others_write_is_seen_at_once(bucket):
    fs, root = hub.file_system(OUTPUT)
    assert not fs.exists(f"{root}/a")
    fs.find(root)
    bucket.write("runs/mine/a", b"1", {})  # as another host does
    assert fs.exists(f"{root}/a") and fs.find(root) == [f"{root}/a"]


def test_a_second_run_is_refused(bucket):
    folder = RunFolder(OUTPUT)
    with pytest.raises(ValueError, match="being written by another run"):
        RunFolder(OUTPUT)
    folder.release()


def test_a_store_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="found ftp://a/b; expected a folder, or one of gs://"):
        RunFolder("ftp://a/b")


def test_the_doctor_looks_at_the_bucket_and_leaves_nothing_there(bucket, tmp_path, capsys):
    base = tiny_runs.write_model(tmp_path / "base")
    data = tiny_runs.write_rows(tmp_path / "data.jsonl", tiny_runs.rows(8))
    words = (f"model.path={base}", f"data.train.0.path={data}", "data.template=plain", "train.batch_rows=8")
    assert doctor.main([*words, f"output={OUTPUT}", "--megabytes", "1"]) == 0
    assert f"output    ok       {OUTPUT}: seen by all hosts" in capsys.readouterr().out and not bucket.by_name
