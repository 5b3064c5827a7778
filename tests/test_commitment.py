"""What binds a run to its folder, its base and its name, and what does not."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny_runs
from safetensors.numpy import load_file, save_file

from jaxtune import assembly, card
from jaxtune.batch import Batch
from jaxtune.config import TuningConfig
from jaxtune.convert.folder import open_folder
from jaxtune.models.attention import xla
from jaxtune.step import Compute, make_eval_step
from jaxtune.train import main, train


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_runs.write_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_runs.write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", tiny_runs.rows(24))


@pytest.mark.parametrize("mistake", ["optimizer.name=admw", "tuning.targets=q_prj"])
def test_a_run_that_failed_before_it_saved_binds_the_folder_to_nothing(mistake, base, data, tmp_path, capsys):
    assert main(tiny_runs.words(base, data, tmp_path / "run", mistake)) == 1
    assert "expected" in capsys.readouterr().err
    assert main(tiny_runs.words(base, data, tmp_path / "run", "train.steps=1")) == 0


def test_a_base_that_changed_is_not_gone_on_with(base, data, tmp_path):
    copy = shutil.copytree(base, tmp_path / "model")
    assert train(tiny_runs.config(copy, data, tmp_path / "run", "train.steps=1")).step == 1
    weights = load_file(copy / "model.safetensors")
    save_file({name: 3 * value for name, value in weights.items()}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"is not the model that .* began with"):
        train(tiny_runs.config(copy, data, tmp_path / "run", "train.steps=2"))


def test_an_adapter_of_a_local_model_never_names_what_its_config_remembers(base, data, tmp_path):
    copy = shutil.copytree(base, tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "_name_or_path": "org/other"}))
    result = train(tiny_runs.config(copy, data, tmp_path / "run", "train.steps=1"))
    written = json.loads((pathlib.Path(result.adapter) / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(copy)
    assert "org/other" not in (tmp_path / "run" / "README.md").read_text()


def test_an_adapter_of_a_hub_model_names_the_commit_that_was_loaded(base, tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abc"
    shutil.copytree(base, snapshot)
    config = tiny_runs.config(pathlib.Path("org/name"), tmp_path / "data", tmp_path / "run")
    assert card.base_identity(config, open_folder(snapshot)) == ("org/name", "0123abc")


def test_a_model_behind_a_url_is_tuned_like_a_local_one(base, data, tmp_path):
    results = [
        train(tiny_runs.config(path, data, tmp_path / name, "train.steps=2"))
        for path, name in ((base, "local"), (f"file://{base}", "remote"))
    ]
    assert results[0].loss == results[1].loss


def test_float16_weights_are_imported_but_not_trained(base, data, tmp_path):
    copy = shutil.copytree(base, tmp_path / "model")
    weights = load_file(copy / "model.safetensors")
    halves = {name: value.astype(np.float16) for name, value in weights.items()}
    save_file(halves, copy / "model.safetensors", {"format": "pt"})
    more = ("tuning.method=full", "model.param_dtype=file")
    with pytest.raises(ValueError, match="holds float16, which cannot be trained"):
        train(tiny_runs.config(copy, data, tmp_path / "run", *more))
    result = train(tiny_runs.config(copy, data, tmp_path / "import", *more, "train.steps=0"))
    written = load_file(pathlib.Path(result.hf) / "model.safetensors")
    assert all(np.array_equal(written[name], value) for name, value in halves.items())


def test_evaluation_in_portions_gives_the_same_sums(base):
    folder = open_folder(base)
    plan = assembly.plan_model(folder.config, TuningConfig(method="full"), param_dtype=np.float32, seed=0, where="")
    trainable, frozen = plan.make()
    tokens = np.random.default_rng(0).integers(3, 280, (8, 16)).astype(np.int32)
    ones = np.ones_like(tokens)
    weights = np.random.default_rng(1).random((8, 16)).astype(np.float32)
    batch = Batch(tokens, np.roll(tokens, -1, 1), np.arange(16, dtype=np.int32) * ones, ones, weights, 0 * ones)
    whole, parts = (
        jax.jit(make_eval_step(plan.graph, Compute(np.float32, xla, "none", count, True)))(trainable, frozen, batch)
        for count in (1, 4)
    )
    for name, a, b in zip(whole._fields, whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, err_msg=name)
