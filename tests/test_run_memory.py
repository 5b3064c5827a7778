"""Host memory of a whole run over 8 shards: import, updates and saves stay within what the arrays themselves take."""

import json
import os
import subprocess
import sys

import pytest
import tiny_runs

CHILD = """
import json, sys, threading, time
import jax
from jaxtune import assembly, blueprint, training
from jaxtune.saving import checkpoint
from jaxtune.decode import decode

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

peak, seen = [0], {}
def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.005)

def phase(owner, name, key):
    real = getattr(owner, name)
    def run(*args, **options):
        before = peak[0] = anonymous()
        out = real(*args, **options)
        if key == "save":
            args[0].wait()
        if key == "copy":
            args[0]._local.settle()
        seen.setdefault(key, {"before": before, "peak": 0})
        seen[key]["peak"] = max(seen[key]["peak"], peak[0])
        if key == "import":
            seen["weights"] = sum(leaf.nbytes for leaf in jax.tree.leaves(out))
        if key == "compile":
            seen["temporaries"] = len(jax.devices()) * out.memory_analysis().temp_size_in_bytes
        if key == "updates":
            seen["state"] = sum(leaf.nbytes for leaf in jax.tree.leaves(out[0]))
        return out
    setattr(owner, name, run)

phase(assembly, "load_trainable", "import")
phase(blueprint, "compile_update", "compile")
phase(checkpoint.Checkpoints, "save", "save")
phase(checkpoint.Checkpoints, "save_locally", "copy")
phase(checkpoint.Checkpoints, "restore", "restore")
phase(training.Loop, "run", "updates")
threading.Thread(target=watch, daemon=True).start()
result = training.run(decode(sys.argv[1:]))
print(json.dumps({**seen, "exit": result.exit_code, "step": result.step}))
"""
GIB = 2**30


def run(*words: str) -> dict:
    flags = "--xla_force_host_platform_device_count=8"
    env = {**os.environ, "XLA_FLAGS": flags, "NPROC": "32", "PYTHONPATH": os.pathsep.join(sys.path)}
    # One arena, so that what is freed is given back and the peak is what was held.
    env |= {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", CHILD, *words], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
def test_import_updates_and_saves_hold_their_shards_and_little_more(tmp_path):
    """0.6 GiB of float32 weights in 8 shards, all trained: the state is three times that."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 32000}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
    base = tiny_runs.write_model(tmp_path / "base", **sizes, **heads)
    data = tiny_runs.write_rows(tmp_path / "data.jsonl", tiny_runs.rows(80))
    more = ("tuning.method=full", "train.steps=2", "checkpoint.every_steps=2", "export.hf=false", "checkpoint.keep=1")
    copies = (f"checkpoint.local.path={tmp_path / 'disk'}", "checkpoint.local.every_steps=1")
    words = tiny_runs.words(base, data, tmp_path / "out", *more)
    first = run(*words, *copies)
    again = run(*words, "train.steps=3")
    weights = first["weights"]
    largest = 4 * sizes["vocab_size"] * sizes["hidden_size"]
    told = {key: f"{value / GIB:.2f}" for key, value in first.items() if key in ("weights", "state", "temporaries")}
    for key in ("import", "updates", "save", "copy"):
        told[key] = f"{(first[key]['peak'] - first[key]['before']) / GIB:.2f}"
    told["restore"] = f"{(again['restore']['peak'] - again['restore']['before']) / GIB:.2f}"
    print("GiB:", told)
    assert weights > 0.5 * GIB and first["state"] > 2.9 * weights and again["step"] == 3
    assert first["import"]["peak"] - first["import"]["before"] < weights + 3 * largest
    # What updates take beside the state is the compiler's temporaries; a save writes from where the arrays lie.
    assert first["save"]["peak"] - first["save"]["before"] < 0.5 * first["state"]
    # A copy for the hosts' own disks is written while updates go on, and so is held once.
    assert 0.5 * first["state"] < first["copy"]["peak"] - first["copy"]["before"] < 1.1 * first["state"]
    assert first["updates"]["peak"] - first["updates"]["before"] < first["temporaries"] + 1.5 * first["state"]
    assert again["restore"]["peak"] - again["restore"]["before"] < 1.25 * again["state"]
