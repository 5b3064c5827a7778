"""The local tier in one process: to the bit, two steps kept, damage and other meshes told; who reads what."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune import local_tier, placement, training
from jaxtune.local_tier import LocalTier, Seats, find_seats
from jaxtune.sharding import make_mesh

SPECS = {
    "weights": PartitionSpec("fsdp", None),
    "wide": PartitionSpec(None, ("fsdp", "tensor")),
    "halves": PartitionSpec("tensor"),
    "moments": PartitionSpec("fsdp"),
    "bits": PartitionSpec(),
    "step": PartitionSpec(),
}


def values_of(seed: int) -> dict[str, np.ndarray]:
    """Numbers of several kinds, and among them what arithmetic would not leave as it is."""
    draw = np.random.default_rng(seed)
    moments = np.array([np.nan, np.inf, -0.0, 1e-45], np.float32)
    moments.view(np.uint32)[0] |= 0x1234  # a NaN with a payload
    return {
        "weights": draw.standard_normal((8, 3)).astype(np.float32),
        "wide": draw.standard_normal((3, 8)).astype(jnp.bfloat16),
        "halves": draw.standard_normal(4).astype(np.float16),
        "moments": moments,
        "bits": draw.integers(0, 2, 5).astype(bool),
        "step": np.int32(seed),
    }


def placed(values: dict[str, np.ndarray], mesh) -> dict[str, jax.Array]:
    return {name: jax.device_put(value, NamedSharding(mesh, SPECS[name])) for name, value in values.items()}


def wanted(arrays: dict[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for name, a in arrays.items()}


def assert_same_bits(arrays: dict[str, jax.Array], values: dict[str, np.ndarray]) -> None:
    for name, value in values.items():
        assert arrays[name].dtype == value.dtype
        for shard in arrays[name].addressable_shards:
            assert np.asarray(shard.data).tobytes() == value[shard.index].tobytes(), name


@pytest.fixture
def mesh():
    return make_mesh({"slice": 2, "fsdp": 2, "tensor": 2})


@pytest.fixture
def opened(tmp_path, mesh):
    (tmp_path / "store").mkdir()
    said: list[str] = []

    def open_(mesh=mesh, folder=str(tmp_path / "disk"), store="store") -> LocalTier:
        (tmp_path / store).mkdir(exist_ok=True)
        return LocalTier(folder, store=epath.Path(tmp_path / store), mesh=mesh, say=said.append)

    open_.said = said
    return open_


def save(tier: LocalTier, mesh, *steps: int) -> None:
    for step in steps:
        tier.save(step, placed(values_of(step), mesh), {"step": step, "data": {"lanes": [[step, 0]]}})
    tier.settle()


def test_the_newest_comes_back_to_the_bit_with_its_json(opened, mesh):
    save(opened(), mesh, 1, 2, 3)
    again = opened()
    assert again.newest(at_least=0, below=None) == 3 and again.has(3) and not again.has(2)
    assert again.read_run() == {"step": 3, "data": {"lanes": [[3, 0]]}}
    restored = again.restore(wanted(placed(values_of(0), mesh)))
    assert_same_bits(restored, values_of(3))
    assert {name: array.sharding.spec for name, array in restored.items()} == SPECS
    assert again.newest(at_least=0, below=3) == 2
    assert again.newest(at_least=4, below=None) is None and not again.has(3)


def test_what_is_saved_is_the_state_at_that_moment_though_its_buffers_are_given_away(opened, mesh):
    tier, arrays = opened(), placed(values_of(1), mesh)
    step = jax.jit(lambda tree: jax.tree.map(lambda a: (a + a).astype(a.dtype), tree), donate_argnums=0)
    tier.save(1, arrays, {})
    jax.block_until_ready(step(arrays))
    tier.settle()
    assert tier.newest(at_least=0, below=None) == 1
    assert_same_bits(tier.restore(wanted(placed(values_of(0), mesh))), values_of(1))


def test_the_two_newest_are_kept_and_what_devices_hold_twice_is_written_once(opened, mesh):
    tier = opened()
    save(tier, mesh, 1, 2, 3, 4)
    assert sorted(int(path.name) for path in tier.folder.iterdir()) == [3, 4]
    bytes_of_values = sum(value.nbytes for value in values_of(1).values())
    assert (tier.folder / "4" / "0" / "arrays").stat().st_size == bytes_of_values


def test_a_flipped_bit_is_told_once_and_the_step_before_it_used(opened, mesh):
    tier = opened()
    save(tier, mesh, 1, 2)
    tiny_runs.flip_a_bit(tier.folder / "2" / "0" / "arrays")
    assert tier.newest(at_least=0, below=None) == 1 and tier.newest(at_least=0, below=None) == 1
    said = "\n".join(opened.said)
    assert said.count("a local copy is not usable") == 1 and "SHA-256" in said
    assert said.count("the local copies of step 2 are not used: no host has a copy that is intact") == 1
    assert tier.newest(at_least=2, below=None) is None


def test_a_copy_that_was_cut_off_is_none(opened, mesh):
    tier = opened()
    save(tier, mesh, 1, 2)
    (tier.folder / "2" / "0").rename(tier.folder / "2" / "0.tmp")
    assert opened().newest(at_least=0, below=None) == 1


def test_another_mesh_is_told_with_both(opened, mesh):
    save(opened(), mesh, 1)
    assert opened(make_mesh({"fsdp": 8})).newest(at_least=0, below=None) is None
    assert "they are of a mesh slice 2 x fsdp 2 x tensor 2, this run's is fsdp 8" in opened.said[-1]


def test_a_run_begun_anew_in_the_same_place_finds_nothing_of_the_old_and_leaves_none_of_it(opened, mesh, tmp_path):
    old, other = opened(), opened(store="another run")
    save(old, mesh, 1)
    save(other, mesh, 2)
    (tmp_path / "store" / local_tier.IDENTITY).unlink()  # OUTPUT was removed
    assert opened().newest(at_least=0, below=None) is None
    assert not old.folder.exists() and other.folder.exists()


def test_what_comes_after_the_step_gone_on_from_goes_and_all_of_it_when_the_run_is_done(opened, mesh):
    tier = opened()
    save(tier, mesh, 3, 4)
    tier.drop_after(3)
    assert tier.newest(at_least=0, below=None) == 3
    tier.clear()
    assert not tier.folder.exists() and not tier.has_any()


def test_a_disk_that_is_full_is_a_warning_at_the_next_copy(opened, mesh, monkeypatch):
    tier = opened()
    real = local_tier.write_copy

    def full(folder: pathlib.Path, copy) -> None:
        if folder.parent.name == "2":
            raise OSError(28, "No space left on device")
        real(folder, copy)

    monkeypatch.setattr(local_tier, "write_copy", full)
    save(tier, mesh, 1, 2, 3)
    assert [line for line in opened.said if line.startswith("warning")] == [
        "warning: the local copy of step 2 could not be written: OSError: [Errno 28] No space left on device"
    ]
    assert tier.newest(at_least=0, below=None) == 3


def test_a_disk_too_small_is_told_before_training(opened, mesh, monkeypatch):
    tier = opened()
    usage = local_tier.shutil.disk_usage("/")
    monkeypatch.setattr(local_tier.shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(ValueError, match=r"checkpoint\.local\.path: .* GiB free; 3 copies of this host's part"):
        tier.check_room(placed(values_of(1), mesh))


@pytest.mark.parametrize(
    ("folder", "told"),
    [
        ("gs://bucket/copies", "found gs://bucket/copies; expected a folder on each host's own disk"),
        ("/tmp/$NO_SUCH_NAME/copies", "a variable in it is not set on this host"),
        ("/proc/copies", "cannot be written on this host"),
    ],
)
def test_a_folder_that_cannot_be_one_is_refused(opened, folder, told):
    with pytest.raises(ValueError, match=r"checkpoint\.local\.path: ") as error:
        opened(folder=folder)
    assert told in str(error.value)


def test_another_layout_of_a_leaf_is_refused_by_name(opened, mesh):
    save(opened(), mesh, 1)
    again = opened()
    assert again.newest(at_least=0, below=None) == 1
    other = jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(("fsdp", "tensor"))))
    with pytest.raises(ValueError, match=r"expected the shard .* of weights.*found no such shard"):
        again.restore({"weights": other})


@pytest.mark.parametrize("reader", [0, 1])
def test_shards_are_sent_to_those_that_hold_the_same_as_bits(mesh, reader):
    """One slice reads, the other is sent; a NaN's payload and -0.0 come through."""
    sources = np.zeros(mesh.devices.shape, bool)
    sources[reader] = True
    asked = []
    for name, value in values_of(5).items():

        def read(index, value=value):
            asked.append(index)
            return np.array(value[index])

        array = placement.from_sources(
            read,
            value.shape,
            value.dtype,
            NamedSharding(mesh, SPECS[name]),
            unsplit=("slice", "data", "context", "expert"),
            sources=sources,
        )
        assert_same_bits({name: array}, {name: value})
    assert len(asked) == len(SPECS) * mesh.size // 2


TWO_SLICES = {"slice": 2, "fsdp": 2}


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ([{0}, {1}, {2}, {3}], Seats([0, 1, 2, 3], [True, True, False, False], True)),
        ([{0}, {1}, set(), set()], Seats([0, 1, 2, 3], [True, True, False, False], False)),
        ([set(), {1}, {2}, set()], Seats([0, 1, 2, 3], [False, True, True, False], False)),
        ([{2}, {3}, {0}, {1}], Seats([0, 1, 2, 3], [True, True, False, False], True)),  # the slices changed places
        ([{1}, {0}, set(), set()], Seats([1, 0, 2, 3], [True, True, False, False], False)),
        ([{3}, set(), set(), {0}], Seats([3, 1, 2, 0], [True, False, False, True], False)),
        ([{0}, set(), {2}, set()], None),
        ([set(), set(), set(), set()], None),
    ],
)
def test_who_reads_what(held, expected):
    found = find_seats(TWO_SLICES, ["slice"], owners=[0, 1, 2, 3], held=held)
    assert found == expected


def test_a_host_of_several_devices_reads_for_all_of_them():
    held = [{0, 1, 2, 3}, set()]
    found = find_seats({"slice": 2, "fsdp": 4}, ["slice"], owners=[0, 0, 0, 0, 1, 1, 1, 1], held=held)
    assert found == Seats(list(range(8)), [True] * 4 + [False] * 4, False)


# A run.


def test_a_run_goes_on_from_the_copies_and_is_the_run_that_was_never_stopped(tmp_path, capsys):
    base = tiny_runs.write_model(tmp_path / "base")
    data = tiny_runs.write_rows(tmp_path / "data.jsonl", tiny_runs.rows(40))
    copies = (f"checkpoint.local.path={tmp_path / 'disk'}", "checkpoint.local.every_steps=2")
    plain = ("checkpoint.every_steps=100", "export.hf=false", "export.adapter=false")
    training.run(tiny_runs.config(base, data, tmp_path / "whole", *plain))
    words = tiny_runs.words(base, data, tmp_path / "out", *plain, *copies)
    stop = pathlib.Path(tmp_path / "stop.py")
    stop.write_text(
        "import os, sys\nfrom jaxtune import local_tier, train\nreal = local_tier.LocalTier.save\n"
        "def save(self, step, *rest):\n    real(self, step, *rest)\n    self.settle()\n    if step == 4: os._exit(9)\n"
        "local_tier.LocalTier.save = save\ntrain.main(sys.argv[1:])\n"
    )
    assert subprocess.run([sys.executable, str(stop), *words], capture_output=True).returncode == 9
    assert not list((tmp_path / "out" / "checkpoints").glob("[0-9]*"))
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate"):
        training.run(tiny_runs.config(base, data, tmp_path / "out", *plain, *copies, "optimizer.learning_rate=0.02"))
    capsys.readouterr()
    training.run(tiny_runs.config(base, data, tmp_path / "out", *plain, *copies))
    assert "restoring step 4 from the hosts' own disks" in capsys.readouterr().out
    assert tiny_runs.losses(tmp_path / "out") == tiny_runs.losses(tmp_path / "whole")
    assert json.loads((tmp_path / "out" / "checkpoints" / "6" / "run" / "metadata").read_text())["step"] == 6
    assert not list((tmp_path / "disk").rglob("arrays"))
