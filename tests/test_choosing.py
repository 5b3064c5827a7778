"""What is left to us is chosen: what fits before what does not, the fastest of it, and a run computes so."""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import jax
import plan_shapes
import pytest
import tiny_runs
import yaml

from jaxtune import blueprint, choosing, hub
from jaxtune.choosing import Choice, Ranked
from jaxtune.config import Config
from jaxtune.cost_model.chips import CHIPS
from jaxtune.decode import decode
from jaxtune.forecast import Forecast, Forecaster
from jaxtune.sharding import BATCH_AXES, MESH_AXES, make_mesh, mesh_sizes
from jaxtune.train import main

OPEN = ("mesh=auto", "train.microbatch_rows=auto")
H100 = CHIPS["NVIDIA H100 80GB HBM3"]
GIB = 2**30


def config(*words: str) -> Config:
    own = ["model.path=m", "output=o", "data.train.0.path=d", "data.max_length=1024", "train.batch_rows=16"]
    return decode([*own, *words])


def ranked(shape: dict[str, Any], *words: str, devices: int = 8, memory: float = H100.memory) -> list[Ranked]:
    found = forecaster("mixtral" if shape is plan_shapes.MIXTRAL else "llama", *words)
    return choosing.rank(found, devices=devices, left=choosing.open_keys(found.config), memory=memory)


@functools.cache
def forecaster(name: str, *words: str) -> Forecaster:
    shape = {"llama": plan_shapes.LLAMA, "mixtral": plan_shapes.MIXTRAL}[name]
    model, settled = choosing.plan_model(config(*words), shape, "gpu", "m")
    return Forecaster(settled, model, H100, "gpu")


def fake(*, memory: float, seconds: float, remat: str = "none", rows: int = 16, **axes: int) -> Ranked:
    """A way with a cost that we say."""
    sizes = {axis: axes.get(axis, 1) for axis in MESH_AXES}
    return Ranked(Choice(sizes, rows, remat), Forecast(memory, 0, 0, 0, 0, 1.0, seconds, {}, seconds))


def test_what_fits_comes_first_and_of_it_the_fastest() -> None:
    found = ranked(plan_shapes.LLAMA, *OPEN, "tuning.method=full")
    assert len(found) > 20
    seconds = [one.forecast.seconds for one in found]
    assert seconds == pytest.approx(sorted(seconds)), "all of them fit"
    median = sorted(one.forecast.memory for one in found)[len(found) // 2]
    tight = ranked(plan_shapes.LLAMA, *OPEN, "tuning.method=full", memory=median)
    limit = choosing.usable(median)
    assert limit < median
    fits = [one.forecast.memory <= limit for one in tight]
    assert fits == sorted(fits, reverse=True) and True in fits and False in fits
    fitting = [one.forecast for one in tight if one.forecast.memory <= limit]
    assert [one.seconds for one in fitting] == pytest.approx(sorted(one.seconds for one in fitting))
    beyond = [one.forecast.memory for one in tight if one.forecast.memory > limit]
    assert beyond == sorted(beyond)


def test_nothing_but_what_is_open_is_chosen() -> None:
    for words, key in (
        (["model.remat=mid", "train.microbatch_rows=8"], "mesh"),
        (["mesh.data=2", "mesh.fsdp=4", "train.microbatch_rows=8"], "remat"),
        (["model.remat=mid", "mesh.data=2", "mesh.fsdp=4"], "microbatch_rows"),
    ):
        opened = {"mesh": ["mesh=auto"], "remat": ["model.remat=auto"], "microbatch_rows": [OPEN[1]]}[key]
        found = [one.choice for one in ranked(plan_shapes.LLAMA, *words, *opened)]
        varied = {
            "mesh": len({tuple(one.sizes.values()) for one in found}),
            "remat": len({one.remat for one in found}),
            "microbatch_rows": len({one.rows for one in found}),
        }
        assert {name for name, number in varied.items() if number > 1} == {key}


@pytest.mark.parametrize("shape", [plan_shapes.LLAMA, plan_shapes.MIXTRAL])
@pytest.mark.parametrize("devices", [4, 8])
def test_meshes_divide_the_devices_the_model_and_the_rows(shape: dict[str, Any], devices: int) -> None:
    found = {tuple(one.choice.sizes.items()): one for one in ranked(shape, *OPEN, "model.remat=mid", devices=devices)}
    for one in found.values():
        sizes = one.choice.sizes
        assert math.prod(sizes.values()) == devices
        assert shape["num_key_value_heads"] % sizes["tensor"] == 0
        assert shape.get("num_local_experts", 1) % sizes["expert"] == 0
        assert sizes["context"] == 1, "a row of 1,024 is not worth splitting"
        assert 16 % one.choice.rows == 0 and one.choice.rows % math.prod(sizes[axis] for axis in BATCH_AXES) == 0
    assert any(one.choice.sizes["expert"] > 1 for one in found.values()) == ("num_local_experts" in shape)
    assert any(one.choice.sizes["tensor"] > 1 for one in found.values())


def test_long_rows_may_be_split_and_slices_are_what_they_are() -> None:
    long = ranked(plan_shapes.LLAMA, *OPEN, "data.max_length=4096", "model.remat=mid")
    assert {one.choice.sizes["context"] for one in long} == {1, 2, 4}
    model, settled = choosing.plan_model(config(*OPEN), plan_shapes.LLAMA, "gpu", "m")
    settled = settled.model_copy(update={"mesh": settled.mesh.model_copy(update={"slice": 2})})
    sliced, left = Forecaster(settled, model, H100, "gpu"), choosing.open_keys(settled)
    found = choosing.rank(sliced, devices=8, left=left, memory=H100.memory)
    assert {one.choice.sizes["slice"] for one in found} == {2}


@pytest.mark.parametrize("shape", [plan_shapes.LLAMA, plan_shapes.MIXTRAL])
def test_every_way_is_one_that_can_be_drawn(shape: dict[str, Any]) -> None:
    left = config(*OPEN)
    settled = choosing.plan_model(left, shape, "cpu", "m")[1]
    for one in choosing.different(ranked(shape, *OPEN), 99):
        given = one.choice.of(settled)
        assert not choosing.open_keys(given)
        assert given.rows_at_once == one.choice.rows and given.model.remat == one.choice.remat
        decode([*_as_words(given), "model.path=m", "output=o", "data.train.0.path=d"])
        mesh = make_mesh(given.mesh.model_dump(), jax.devices())
        assert dict(mesh.shape) == one.choice.sizes
        blueprint.check_rows(given, mesh)
        blueprint.check_lengths(given, mesh)


def test_the_best_way_is_drawn() -> None:
    settled = choosing.plan_model(config(*OPEN), plan_shapes.LLAMA, "cpu", "m")[1]
    given = ranked(plan_shapes.LLAMA, *OPEN)[0].choice.of(settled)
    mesh = make_mesh(given.mesh.model_dump(), jax.devices())
    drawn = blueprint.draw(given, plan_shapes.LLAMA, mesh, where="m", steps=1, sources=1)
    assert drawn.compute.remat == given.model.remat
    assert drawn.compute.microbatches == 16 // given.rows_at_once


def _as_words(given: Config) -> list[str]:
    sizes = [f"mesh.{axis}={getattr(given.mesh, axis)}" for axis in MESH_AXES]
    rows = given.train.microbatch_rows
    return [*sizes, f"model.remat={given.model.remat}", f"train.microbatch_rows={'null' if rows is None else rows}",
            f"train.batch_rows={given.train.batch_rows}"]  # fmt: skip


def test_alike_ways_count_once() -> None:
    first, same = fake(memory=4, seconds=1, rows=16), fake(memory=2, seconds=2, rows=8)
    other, third = fake(memory=3, seconds=3, remat="full"), fake(memory=3, seconds=4, fsdp=8)
    assert choosing.different([first, same, other, third], 9) == [first, other, third]
    assert choosing.different([first, same, other, third], 2) == [first, other]


def test_the_next_to_try_needs_clearly_less() -> None:
    ways = [fake(memory=m * GIB, seconds=n) for n, m in enumerate((80, 79, 60, 90, 55, 50, 30, 20, 10))]
    assert [one.forecast.memory / GIB for one in choosing.to_try(ways)] == [80, 60, 50, 30]


def test_what_does_not_divide_is_told_with_what_would() -> None:
    with pytest.raises(ValueError, match=r"train\.batch_rows: found 3, which no mesh of 8 devices divides") as told:
        ranked(plan_shapes.LLAMA, *OPEN, "train.batch_rows=3")
    assert "train.batch_rows=8" in str(told.value)


def test_what_was_found_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path))
    choice = Choice({axis: 2 if axis == "fsdp" else 1 for axis in MESH_AXES}, 4, "mid", {"option": 65536})
    assert choosing.recall("key") is None
    path = choosing.remember("key", choice)
    assert pathlib.Path(path).is_relative_to(tmp_path)
    assert choosing.recall("key") == choice
    assert [file.name for file in pathlib.Path(path).parent.iterdir()] == ["key.json"], "nothing left aside"
    for broken in ("", "{", '{"sizes": {}}', '{"other": 1}', "[]", "null", '"text"'):
        pathlib.Path(path).write_text(broken)
        assert choosing.recall("key") is None, broken


def key(*words: str, shape: dict[str, Any] = plan_shapes.LLAMA, kind: str = "TPU v5", devices: int = 8) -> str:
    return choosing.cache_key(config(*OPEN, *words), shape, kind, devices)


def test_another_model_row_device_or_jax_has_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [
        key(),
        key(shape={**plan_shapes.LLAMA, "num_hidden_layers": 5}),
        key("train.batch_rows=32"),
        key("data.max_length=2048"),
        key("tuning.method=full"),
        key("tuning.rank=8"),
        key("optimizer.name=lion"),
        key("model.remat=mid"),
        key("model.dtype=float32"),
        key("train.compiler_options.xla_x=1"),
        key(kind="TPU v5 lite"),
        key(devices=16),
    ]
    monkeypatch.setattr(jax, "__version__", "0.0.1")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_what_decides_nothing_is_not_in_the_key() -> None:
    elsewhere = ("output=there", "seed=3", "optimizer.learning_rate=1e-3", "train.steps=9", "data.train.0.path=e")
    assert key() == key(*elsewhere)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_runs.write_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_runs.write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", tiny_runs.rows(48))


def chosen(given: Config, hf_config: dict[str, Any]) -> tuple[Choice | None, list[str]]:
    said: list[str] = []
    return choosing.choose(given, hf_config, jax.devices(), where="m", say=said.append), said


def test_on_cpu_nothing_is_compiled_for_remat_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(blueprint, "compile_update", never)
    choice, said = chosen(config("model.remat=auto", "train.microbatch_rows=8"), plan_shapes.LLAMA)
    assert choice == Choice({}, 8, "none") and not said
    settled = choice.of(config("model.remat=auto", "train.microbatch_rows=8"))
    assert (settled.model.remat, settled.train.microbatch_rows) == ("none", 8)
    assert chosen(config("model.remat=full"), plan_shapes.LLAMA) == (None, [])


def test_a_search_before_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(blueprint, "compile_update", None)
    settled = choosing.plan_model(config(*OPEN), plan_shapes.LLAMA, "cpu", "m")[1]
    name = choosing.cache_key(settled, plan_shapes.LLAMA, jax.devices()[0].device_kind, 8)
    kept = Choice({axis: 8 if axis == "fsdp" else 1 for axis in MESH_AXES}, 8, "full", {})
    choosing.remember(name, kept)
    choice, said = chosen(config(*OPEN), plan_shapes.LLAMA)
    assert choice == kept
    assert said == ["chosen by a search before: fsdp 8, 8 rows at once, remat full"]


def test_a_way_that_does_not_fit_gives_way_to_one_that_needs_less(
    base: pathlib.Path, data: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention on a CPU keeps all T x T, which forecasts, made for fused kernels, do not expect."""
    words = ("data.max_length=256", "train.batch_rows=64", "train.microbatch_rows=auto", "model.remat=none")
    given = tiny_runs.config(base, data, base.parent / "out", *words, "data.window=512")
    hf_config = json.loads((base / "config.json").read_text())
    model, settled = choosing.plan_model(given, hf_config, "cpu", "m")
    real, sizes = choosing.chip_of(jax.devices()), mesh_sizes(given.mesh.model_dump(), 8, kind="cpu")
    whole = Forecaster(settled, model, real, "cpu").forecast(sizes, rows=64, remat="none")
    tight = dataclasses.replace(real, memory=whole.memory / 0.85)
    assert choosing.SURE * tight.memory < whole.memory < choosing.usable(tight.memory)
    monkeypatch.setattr(choosing, "chip_of", lambda _: tight)
    fewer, said = chosen(given, hf_config)
    assert fewer is not None and fewer.rows < 64
    assert said[0] == "does not fit: fsdp 8, 64 rows at once, remat none"
    assert said[1].startswith(f"chosen: fsdp 8, {fewer.rows} rows at once, remat none; ")


def test_what_needs_far_less_than_there_is_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blueprint, "compile_update", None)
    monkeypatch.setattr(choosing, "chip_of", lambda _: H100)
    choice, said = chosen(config("train.microbatch_rows=auto", "model.remat=full"), plan_shapes.LLAMA)
    assert choice is not None and len(said) == 1 and said[0].startswith(f"chosen: {choice.describe()}; ")


def test_a_device_too_small_for_anything_is_told(base: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = choosing.chip_of(jax.devices())
    monkeypatch.setattr(choosing, "chip_of", lambda _: dataclasses.replace(real, memory=1e5))
    monkeypatch.setattr(choosing, "TRIES", 1)
    hf_config = json.loads((base / "config.json").read_text())
    given = config("data.max_length=64", "train.microbatch_rows=auto", "model.remat=full")
    with pytest.raises(ValueError, match=r"the update needs 0\.0 GiB of a device that has 0\.0"):
        chosen(given, hf_config)


def test_a_run_on_a_chosen_mesh_is_the_run_with_it_given(
    base: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    words = ("train.steps=3", "export.hf=false", "checkpoint.every_steps=null")
    assert main(tiny_runs.words(base, data, tmp_path / "auto", *OPEN, *words)) == 0
    written = yaml.safe_load((tmp_path / "auto/config.yaml").read_text())
    assert written["mesh"]["auto"] is False and written["train"]["microbatch_rows"] != "auto"
    assert math.prod(written["mesh"][axis] for axis in MESH_AXES) == 8
    given = decode([str(tmp_path / "auto/config.yaml")])
    assert main(tiny_runs.words(base, data, tmp_path / "given", *words, *_as_words(given))) == 0
    assert tiny_runs.losses(tmp_path / "auto") == tiny_runs.losses(tmp_path / "given")
    assert set(tiny_runs.losses(tmp_path / "auto")) == {1, 2, 3}


def test_the_cache_lies_where_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path / "there"))
    assert choosing.remember("k", Choice({}, 1, "none")).startswith(hub.cache_dir())
