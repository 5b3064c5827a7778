"""Workers start quickly, and none outlives a killed trainer."""

import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest
from conftest import make_config, pairs

from jaxtune.data import loader

TRAINER = textwrap.dedent(
    """
    import sys
    sys.path.insert(0, {tests!r})
    from conftest import make_config, pairs
    from jaxtune.data import loader
    from jaxtune.data.chat import templates

    if __name__ == "__main__":
        tokenizer = templates.load_tokenizer({tokenizer!r})
        config = make_config({path!r}, template="plain", workers=2, window=8, train={{"steps": 1000}})
        stream = loader.open_stream(config, tokenizer=tokenizer, max_length=64)
        batches = stream.batches(stream.initial_state())
        next(batches)
        print("going", flush=True)
        {then}
    """
)


def is_alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("number", "then"), [(signal.SIGKILL, "import time; time.sleep(600)"), (signal.SIGTERM, "list(batches)")]
)
def test_no_worker_outlives_a_killed_trainer(tmp_path, write_rows, byte_tokenizer, number, then):
    byte_tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = write_rows("a.jsonl", pairs(200))
    script = tmp_path / "trainer.py"
    tests = str(pathlib.Path(__file__).parent)
    script.write_text(TRAINER.format(tests=tests, tokenizer=str(tmp_path / "tokenizer"), path=path, then=then))
    root = str(pathlib.Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as trainer:
        assert trainer.stdout.readline() == "going\n"
        family = psutil.Process(trainer.pid).children(recursive=True)
        assert len([child for child in family if "spawn_main" in " ".join(child.cmdline())]) == 2
        trainer.send_signal(number)
    deadline = time.monotonic() + 20
    while (alive := [child for child in family if is_alive(child)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    for child in alive:
        child.kill()
    assert not alive, f"{len(alive)} of {len(family)} processes went on without their trainer"


def test_a_worker_makes_windows_without_the_libraries_that_take_long_to_import(tmp_path, write_rows, byte_tokenizer):
    paths = [write_rows(f"{name}.jsonl", pairs(50)) for name in "ab"]
    config = make_config(str(tmp_path / "*.jsonl"), template="plain", train={"steps": 10})
    stream = loader.open_stream(config, tokenizer=byte_tokenizer, max_length=64)
    assert len(stream.maker.readers[0].source) == 50 * len(paths)
    (tmp_path / "maker").write_bytes(pickle.dumps(stream.maker))
    script = (
        "import json, pickle, sys; window = pickle.load(open(sys.argv[1], 'rb')).make(0); "
        "print(json.dumps([window.joined.tokens.tolist(), sorted(sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "maker")], capture_output=True, check=True)
    tokens, imported = json.loads(done.stdout)
    assert tokens == stream.maker.make(0).joined.tokens.tolist()
    assert not {"jax", "transformers", "datasets", "pandas", "torch"} & set(imported)
