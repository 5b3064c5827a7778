"""Whole runs: they learn, go on to the bit where they stopped, and write folders that others open."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import hf_folders
import numpy as np
import orbax.checkpoint as ocp
import peft
import pytest
import tiny_runs
import torch
import transformers
import yaml
from etils import epath
from safetensors.numpy import load_file, save_file

from jaxtune import loop, run_lock, training
from jaxtune.train import main, train

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
FIELDS = {
    "step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "tokens_per_second_all",
    "tokens_per_second_trained", "step_seconds", "data_wait_seconds", "memory_bytes", "skipped_steps",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_runs.write_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_runs.write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", tiny_runs.rows(48))


@pytest.fixture(scope="module")
def more_data(tmp_path_factory):
    turns = [
        {"role": "system", "content": "name it"},
        {"role": "user", "content": "the first"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "the next"},
        {"role": "assistant", "content": "blue"},
    ]
    return tiny_runs.write_rows(tmp_path_factory.mktemp("data") / "more.jsonl", [{"messages": turns}] * 20)


@pytest.fixture(scope="module")
def learned(base, data, tmp_path_factory):
    """One LoRA run with held-out rows and everything logged, for several claims: (result, output)."""
    output = tmp_path_factory.mktemp("runs") / "lora"
    more = ("data.eval_fraction=0.2", "eval.every_steps=4", "train.steps=12", "log.tensorboard=true")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXTUNE_CACHE", str(output.parent / "cache"))
        result = train(tiny_runs.config(base, data, output, *more, "checkpoint.every_steps=5"))
    return result, output


@pytest.fixture(scope="module")
def learned_full(base, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "full"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXTUNE_CACHE", str(output.parent / "cache"))
        result = train(tiny_runs.config(base, data, output, "tuning.method=full", "train.steps=12"))
    return result, output


# A run.


def test_lora_and_full_tuning_lower_the_loss(learned, learned_full):
    for result, output in (learned, learned_full):
        losses = [loss for loss, _ in tiny_runs.losses(output).values()]
        assert result.exit_code == 0 and result.step == 12 and result.loss == losses[-1]
        assert losses[-1] < 0.6 * losses[0], losses


def test_the_run_folder_has_everything(learned, learned_full):
    _, output = learned
    files = {str(file.relative_to(output)) for file in output.rglob("*") if file.is_file()}
    assert {"config.yaml", "metrics.jsonl", "README.md", "adapter/adapter_config.json"} <= files
    assert {"adapter/adapter_model.safetensors", "adapter/tokenizer.json", "hf/config.json"} <= files
    assert {"hf/model.safetensors", "hf/tokenizer.json", "hf/generation_config.json"} <= files
    assert any(name.startswith("events/") for name in files)
    assert {path.name for path in (output / "checkpoints").iterdir()} == {"10", "12"}
    assert ".lock" not in files
    _, output = learned_full
    assert (output / "hf" / "model.safetensors").exists() and not (output / "adapter").exists()


def test_the_resolved_configuration_is_written_back(learned):
    written = yaml.safe_load((learned[1] / "config.yaml").read_text())
    assert written["data"]["max_length"] == 64 and written["tuning"]["rank"] == 16


def test_every_update_is_logged_with_its_numbers(learned):
    records = [record for record in tiny_runs.records(learned[1]) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, 13))
    assert all(set(record) >= FIELDS for record in records)
    assert records[0]["learning_rate"] == pytest.approx(0.005) and records[1]["learning_rate"] == pytest.approx(0.01)
    assert all(
        0 < r["tokens_per_second_trained"] < r["tokens_per_second"] < r["tokens_per_second_all"] for r in records
    )


def test_the_first_update_is_always_logged(base, data, tmp_path):
    train(tiny_runs.config(base, data, tmp_path / "out", "log.every_steps=4"))
    assert list(tiny_runs.losses(tmp_path / "out")) == [1, 4, 6]


def test_held_out_loss_falls_and_the_best_checkpoint_is_known(learned):
    result, output = learned
    evaluated = {r["step"]: r for r in tiny_runs.records(output) if "eval_loss" in r}
    assert list(evaluated) == [4, 8, 12] and result.eval_loss == evaluated[12]["eval_loss"]
    assert evaluated[12]["eval_loss"] < evaluated[4]["eval_loss"] and evaluated[12]["eval_tokens"] > 20
    assert 0 <= evaluated[12]["eval_accuracy"] <= 1
    manifests = {
        int(file.parent.name): json.loads(file.read_text())["eval_loss"]
        for file in (output / "checkpoints").glob("*/jaxtune_manifest.json")
    }
    assert manifests == {10: None, 12: evaluated[12]["eval_loss"]}, "a loss belongs to the state it was computed on"


def test_a_run_of_an_adapter_saves_the_adapter_alone(learned, learned_full):
    def saved(output):
        state = ocp.PyTreeCheckpointHandler().metadata(epath.Path(output / "checkpoints" / "12" / "state"))
        return [name for name in dict(state) if name.startswith("trainable/")]

    assert saved(learned[1]) and all("lora" in name for name in saved(learned[1]))
    assert len(saved(learned_full[1])) > 5


def test_the_best_checkpoint_outlives_newer_ones(base, data, tmp_path, monkeypatch):
    """Held-out loss is made to rise after update 2, which is then kept beside the newest."""
    output, rising = tmp_path / "out", iter([1.0, 2.0, 3.0, 4.0])

    def sums(*anything):
        return loop.EvalSums(loss=np.float64(next(rising)), weight=1.0, correct=0.0, tokens=1, sources=None)

    monkeypatch.setattr(training, "compile_eval_step", lambda *args, **options: sums)
    more = ("data.eval_fraction=0.1", "eval.every_steps=2", "checkpoint.every_steps=1", "checkpoint.keep=1")
    train(tiny_runs.config(base, data, output, *more, "eval.max_batches=1", "export.hf=false"))
    assert {path.name for path in (output / "checkpoints").iterdir()} == {"2", "6"}


def test_the_card_says_from_what_and_how(learned):
    card = (learned[1] / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "peft" and "base_model" in front
    assert "held-out loss" in card and "LoRA, r 16" in card and "train.jsonl" in card


# What is written is what was trained.


def logits_of(model, tokens):
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens)).logits.numpy()


def test_the_merged_folder_and_the_adapter_give_the_same_logits_in_transformers_and_peft(base, learned):
    _, output = learned
    tokens = np.random.default_rng(0).integers(3, 280, (2, 20))
    load = transformers.AutoModelForCausalLM.from_pretrained
    merged = logits_of(load(output / "hf"), tokens)
    before = logits_of(load(base), tokens)
    adapted = logits_of(peft.PeftModel.from_pretrained(load(base), output / "adapter"), tokens)
    np.testing.assert_allclose(adapted, merged, atol=1e-4)
    assert np.abs(merged - before).max() > 0.1, "the run changed nothing"
    for folder in ("hf", "adapter"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(output / folder)
        assert tokenizer.chat_template == tiny_runs.TEMPLATE


def test_the_exported_model_has_the_loss_that_was_logged(base, data, tmp_path):
    """Two runs of 2 and of 3 updates: transformers computes from the first folder what the second logs as update 3."""
    more = ("tuning.method=full", "data.packing=false")
    for steps in (2, 3):
        train(tiny_runs.config(base, data, tmp_path / f"out{steps}", f"train.steps={steps}", *more))
    with pytest.MonkeyPatch.context() as patch:
        batches = []
        real = loop.Loop._put
        patch.setattr(loop.Loop, "_put", lambda self, batch: batches.append(batch) or real(self, batch))
        train(tiny_runs.config(base, data, tmp_path / "again", "train.steps=3", *more))
    arrays = batches[2].arrays
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out2" / "hf")
    logits = torch.tensor(logits_of(model, arrays.tokens))
    losses = -torch.log_softmax(logits, -1).gather(-1, torch.tensor(arrays.targets).long()[..., None])[..., 0].numpy()
    expected = (losses * arrays.loss_weights).sum() / arrays.loss_weights.sum()
    assert tiny_runs.losses(tmp_path / "out3")[3][0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_at_all_gives_the_base_back_byte_for_byte(data, tmp_path, dtype):
    base = hf_folders.tiny_folder("llama2", tmp_path / "base", dtype=dtype, vocab_size=280)
    tiny_runs.write_tokenizer(base)
    more = ("train.steps=0", "tuning.method=full", "model.param_dtype=file")
    result = train(tiny_runs.config(base, data, tmp_path / "out", *more))
    assert (result.exit_code, result.step, result.loss) == (0, 0, None)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "out" / "hf" / name).read_bytes() == (base / name).read_bytes()


def test_an_import_needs_no_data(base, tmp_path):
    words = [f"model.path={base}", f"output={tmp_path / 'out'}", "train.steps=0", "tuning.method=full"]
    assert main(words) == 0
    assert (tmp_path / "out" / "hf" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


# Going on.


def stop_after(patch, step):
    """Sends this process SIGTERM while update `step` is under way, as a preempted machine does."""
    real = loop.Loop._put

    def put(self, batch):
        put.calls += 1
        if put.calls == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch)

    put.calls = 0
    patch.setattr(loop.Loop, "_put", put)


@pytest.fixture(scope="module")
def recipe(base, data, more_data):
    """recipe(output, *words): two weighted sources, packed, a schedule, dropout: all that has a state."""

    def make(output, *words):
        mixed = (f"data.train.1.path={more_data}", "data.train.0.weight=1", "data.train.1.weight=2")
        state = ("train.steps=8", "checkpoint.every_steps=2", "tuning.dropout=0.1", "data.window=8")
        return tiny_runs.config(base, data, output, *mixed, *state, "optimizer.schedule=cosine", *words)

    return make


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXTUNE_CACHE", str(output.parent / "cache"))
        train(recipe(output))
    return output


def assert_same_run(one, other):
    assert tiny_runs.losses(one) == tiny_runs.losses(other)
    tiny_runs.assert_same_bits(tiny_runs.weights(one), tiny_runs.weights(other))


def test_two_equal_runs_are_equal_to_the_bit(recipe, uninterrupted, tmp_path):
    train(recipe(tmp_path / "out"))
    assert_same_run(tmp_path / "out", uninterrupted)


def test_a_run_stopped_by_a_signal_goes_on_as_if_never_stopped(recipe, uninterrupted, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        result = train(recipe(output))
    assert (result.exit_code, result.step, result.hf) == (143, 3, None)
    assert "stopped at step 3 of 8, saved; the same command goes on from there" in capsys.readouterr().out
    assert list(tiny_runs.losses(output)) == [1, 2, 3] and not (output / "hf").exists()
    assert train(recipe(output)).exit_code == 0
    assert_same_run(output, uninterrupted)


def test_a_run_given_more_steps_goes_on_as_if_asked_for_them_at_once(recipe, tmp_path):
    for name, counts in (("whole", (6,)), ("parts", (2, 3, 6))):
        for steps in counts:
            train(recipe(tmp_path / name, "optimizer.schedule=constant", f"train.steps={steps}"))
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_full_tuning_by_epochs_goes_on_as_well(base, data, tmp_path, monkeypatch):
    more = ("tuning.method=full", "train.steps=null", "train.epochs=2", "optimizer.schedule=linear")
    train(tiny_runs.config(base, data, tmp_path / "whole", *more))
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert train(tiny_runs.config(base, data, tmp_path / "parts", *more)).exit_code == 143
    train(tiny_runs.config(base, data, tmp_path / "parts", *more))
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_damaged_checkpoint_is_passed_over_and_the_end_is_the_same(
    recipe, uninterrupted, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        train(recipe(output))
    newest = output / "checkpoints" / "5"
    tiny_runs.flip_a_bit(max(newest.glob("state/**/d/*"), key=lambda file: file.stat().st_size))
    capsys.readouterr()
    train(recipe(output))
    said = capsys.readouterr().out
    assert f"{newest} is not usable" in said and "SHA-256" in said
    assert_same_run(output, uninterrupted)


def test_a_crash_between_checkpoints_repeats_only_what_was_lost(recipe, uninterrupted, tmp_path, monkeypatch):
    output = tmp_path / "out"
    real = loop.Loop._put

    def put(self, batch):
        put.calls += 1
        if put.calls == 6:
            raise RuntimeError("the machine is gone")
        return real(self, batch)

    put.calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_put", put)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            train(recipe(output))
    assert list(tiny_runs.losses(output)) == [1, 2, 3, 4, 5]
    train(recipe(output))
    assert list(tiny_runs.losses(output)) == list(range(1, 9))
    assert_same_run(output, uninterrupted)


def test_a_finished_run_says_so_and_changes_nothing(recipe, uninterrupted, capsys):
    before = tiny_runs.weights(uninterrupted)
    lines = (uninterrupted / "metrics.jsonl").read_text()
    result = train(recipe(uninterrupted))
    assert (result.exit_code, result.step) == (0, 8)
    assert "is already at step 8; raise train.steps or train.epochs to go on" in capsys.readouterr().out
    tiny_runs.assert_same_bits(tiny_runs.weights(uninterrupted), before)
    assert (uninterrupted / "metrics.jsonl").read_text() == lines


def test_fewer_steps_than_done_are_refused(recipe, uninterrupted):
    with pytest.raises(ValueError, match=r"train\.steps: found 3, but .* is at step 8"):
        train(recipe(uninterrupted, "train.steps=3"))


def test_changed_keys_are_listed_and_the_run_is_left_alone(recipe, uninterrupted):
    before = (uninterrupted / "config.yaml").read_text()
    with pytest.raises(ValueError) as caught:
        train(recipe(uninterrupted, "tuning.rank=4", "optimizer.learning_rate=0.5", "data.train.0.weight=3"))
    told = str(caught.value)
    assert "tuning.rank: 16 there, 4 now" in told and "optimizer.learning_rate: 0.01 there, 0.5 now" in told
    assert "data.train.0.weight: 1.0 there, 3.0 now" in told and "another output=" in told
    assert (uninterrupted / "config.yaml").read_text() == before


def test_changed_rows_are_refused(recipe, tmp_path, data, monkeypatch):
    rows = tiny_runs.write_rows(tmp_path / "rows.jsonl", tiny_runs.rows(48))
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        train(recipe(tmp_path / "out", f"data.train.0.path={rows}"))
    tiny_runs.write_rows(rows, tiny_runs.rows(47))
    with pytest.raises(ValueError, match="since this run was saved: source rows is another"):
        train(recipe(tmp_path / "out", f"data.train.0.path={rows}"))


def test_a_preempted_process_saves_and_ends_with_its_code(base, data, tmp_path):
    """For real: a process of its own, stopped from outside, started again with the same words."""
    words = tiny_runs.words(base, data, tmp_path / "out", "train.steps=100000", "optimizer.warmup_steps=1")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "jaxtune.train", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY) as process:
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
    assert process.returncode == 143, rest
    (told,) = [line for line in rest.splitlines() if line.startswith("stopped at step")]
    step = int(told.split()[3])
    assert told.endswith("saved; the same command goes on from there")
    assert max(tiny_runs.losses(tmp_path / "out")) == step
    assert not (tmp_path / "out" / ".lock").exists()
    result = train(
        tiny_runs.config(base, data, tmp_path / "out", f"train.steps={step + 1}", "optimizer.warmup_steps=1")
    )
    assert result.step == step + 1 and list(tiny_runs.losses(tmp_path / "out")) == list(range(1, step + 2))


# Going wrong.


def test_updates_with_a_nan_are_not_applied_and_end_the_run_with_their_examples(base, data, tmp_path, capsys):
    words = tiny_runs.words(base, data, tmp_path / "out", "tuning.method=full", "train.max_bad_steps=3")
    assert main([*words, "optimizer.learning_rate=1e30", "train.steps=20"]) == 1
    out, said = capsys.readouterr()
    assert "the update is not applied" in out
    assert "the last 3 updates in a row had a NaN or infinity" in said and "train.max_bad_steps" in said
    assert "train.jsonl:" in said and "optimizer.learning_rate" in said
    records = [record for record in tiny_runs.records(tmp_path / "out") if "loss" in record]
    assert records[-1]["skipped_steps"] >= 2 and not (tmp_path / "out" / "hf").exists()


def test_a_poisoned_weight_stops_the_run_and_spoils_no_adapter(base, data, tmp_path):
    poisoned = tiny_runs.copied(base, tmp_path / "poisoned")
    tensors = load_file(poisoned / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = np.nan
    save_file(tensors, poisoned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"step 2: the last 2 updates in a row"):
        train(tiny_runs.config(poisoned, data, tmp_path / "out", "train.max_bad_steps=2"))


def test_a_single_bad_update_is_skipped_and_counted(base, data, tmp_path, monkeypatch, capsys):
    real = loop.Loop._put

    def put(self, batch):
        put.calls += 1
        arrays = batch.arrays
        if put.calls == 2:
            arrays = arrays._replace(loss_weights=arrays.loss_weights * np.float32(np.nan))
        return real(self, batch._replace(arrays=arrays))

    put.calls = 0
    monkeypatch.setattr(loop.Loop, "_put", put)
    result = train(tiny_runs.config(base, data, tmp_path / "out"))
    assert result.exit_code == 0 and "step 2: loss nan" in capsys.readouterr().out
    records = {record["step"]: record for record in tiny_runs.records(tmp_path / "out")}
    assert records[2]["loss"] == "nan"
    assert [records[step]["skipped_steps"] for step in range(1, 7)] == [0, 1, 1, 1, 1, 1]
    assert all(np.isfinite(tensor).all() for tensor in tiny_runs.weights(tmp_path / "out").values())


def test_a_run_whose_folder_was_taken_saves_no_more(base, data, tmp_path, monkeypatch):
    """Another host has waited for a sign of life for too long and has taken the folder over."""
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.02)
    output, real = tmp_path / "out", loop.Loop._is_time_to_save

    def taken(self, step):
        if step == 4:
            other = {"host": "elsewhere", "pid": 1, "start": None, "heartbeat": time.time()}
            (output / ".lock" / "7").write_text(json.dumps(other))
            time.sleep(0.5)
        return real(self, step)

    monkeypatch.setattr(loop.Loop, "_is_time_to_save", taken)
    with pytest.raises(ValueError, match=r"taken over by another run \(host elsewhere, process 1\).*stops here"):
        train(tiny_runs.config(base, data, output, "checkpoint.every_steps=2", "train.steps=6"))
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["2"]
    assert not (output / "hf").exists() and (output / ".lock" / "7").exists()


def test_other_data_is_gone_on_with_only_when_told(base, data, more_data, tmp_path, capsys):
    output = tmp_path / "out"
    train(tiny_runs.config(base, data, output, "train.steps=4"))
    seen = [record["step"] for record in tiny_runs.records(output) if "loss" in record]
    other = ("data.train.0.id=other", "train.steps=7")
    with pytest.raises(ValueError, match=r"data\.train\.0"):
        train(tiny_runs.config(base, more_data, output, *other))
    result = train(tiny_runs.config(base, more_data, output, *other, "checkpoint.changed_data=accept"))
    assert result.step == 7 and seen == [1, 2, 3, 4]
    assert "source train is gone" in capsys.readouterr().out.replace("\n", " ")
    assert [record["step"] for record in tiny_runs.records(output) if "loss" in record] == list(range(1, 8))
    again = train(tiny_runs.config(base, more_data, output, *other, "train.steps=9"))  # now this is the run's data
    assert again.step == 9


def test_an_option_that_the_compiler_does_not_have_is_told_by_its_key(tmp_path):
    base = tiny_runs.write_model(tmp_path / "base")
    data = tiny_runs.write_rows(tmp_path / "data.jsonl", tiny_runs.rows(8))
    with pytest.raises(ValueError, match=r"train\.compiler_options: found .*xla_nope.*No such compile option"):
        train(tiny_runs.config(base, data, tmp_path / "out", "train.steps=1", "train.compiler_options={xla_nope: 1}"))
