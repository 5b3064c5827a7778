"""The local tier in one process: to the bit, two steps kept, damage and other meshes told; who reads what."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune import placement, training
from jaxtune.saving import local_copies, local_tier
from jaxtune.saving.attempts import Attempts
from jaxtune.saving.local_seats import Seats, find_seats
from jaxtune.saving.local_tier import ATTEMPTS, LocalTier
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


def save(tier: LocalTier, mesh, *steps: int, since: int = 0) -> None:
    tier.begin(since)
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
    tier.begin(0)
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
    assert said.count("the local copies of step 2 are not used: no disk has a whole copy of this attempt's") == 1
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
    (tmp_path / "store" / ATTEMPTS).unlink()  # OUTPUT was removed
    assert opened().newest(at_least=0, below=None) is None
    assert not old.folder.exists() and other.folder.exists()


def test_what_comes_after_the_step_gone_on_from_goes_and_all_of_it_when_the_run_is_done(opened, mesh):
    tier = opened()
    save(tier, mesh, 3, 4)
    tier.begin(3)
    assert tier.newest(at_least=0, below=None) == 3
    tier.clear()
    assert not tier.folder.exists() and not tier.has_any()


def test_a_copy_of_a_past_that_was_done_again_does_not_count_when_its_disk_comes_back(opened, mesh, tmp_path):
    """The machine that held step 3 is gone, the run goes on from 2, and the machine returns."""
    tier = opened()
    save(tier, mesh, 2, 3)
    shutil.move(tier.folder / "3", tmp_path / "away")
    save(opened(), mesh, since=2)
    shutil.move(tmp_path / "away", tier.folder / "3")
    again = opened()
    assert again.newest(at_least=0, below=None) == 2
    assert "step 3 are not used: no disk has a whole copy of this attempt's" in opened.said[-1]
    save(again, mesh, 3, since=2)
    assert again.newest(at_least=0, below=None) == 3


def test_attempts_know_whose_a_step_is(tmp_path):
    file = epath.Path(tmp_path / "attempts.json")
    attempts = Attempts(file)
    assert attempts.token_of(1) is None
    attempts.begin(0)
    first = attempts.current
    attempts.begin(100)
    second = attempts.current
    assert [attempts.token_of(step) for step in (1, 100, 101)] == [first, first, second]
    attempts.begin(50)
    third = attempts.current
    again = Attempts(file)
    assert again.run == attempts.run and len({first, second, third}) == 3
    assert [again.token_of(step) for step in (1, 50, 51, 100, 101)] == [first, first, third, third, third]
    again.begin(0)
    assert again.token_of(1) == again.token_of(500) == again.current


def test_a_disk_that_is_full_is_a_warning_at_the_next_copy_and_what_was_written_goes(opened, mesh, monkeypatch):
    tier = opened()
    real = local_copies.write_manifest

    def full(folder) -> None:
        if folder.parent.name == "2":
            raise OSError(28, "No space left on device")
        real(folder)

    monkeypatch.setattr(local_copies, "write_manifest", full)
    save(tier, mesh, 1, 2)
    assert not list((tier.folder / "2").iterdir())
    save(tier, mesh, 3, since=2)
    assert [line for line in opened.said if line.startswith("warning")] == [
        "warning: the local copy of step 2 could not be written: OSError: [Errno 28] No space left on device"
    ]
    assert tier.newest(at_least=0, below=None) == 3 and tier.newest(at_least=0, below=3) == 1


def test_a_disk_that_cannot_be_read_is_told_and_passed_over(opened, mesh, monkeypatch):
    save(opened(), mesh, 1)

    def broken(folder):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(local_copies, "check_manifest", broken)
    assert opened().newest(at_least=0, below=None) is None
    assert "a local copy is not usable: " in opened.said[0] and "Input/output error" in opened.said[0]


def test_what_is_being_written_is_waited_for_before_it_is_looked_for(opened, mesh):
    tier = opened()
    save(tier, mesh, 1, 2)
    tier.save(3, placed(values_of(3), mesh), {})
    assert tier.newest(at_least=0, below=3) == 2, "and 1 is gone by now, not after it was found"
    assert_same_bits(tier.restore(wanted(placed(values_of(0), mesh))), values_of(2))


def test_a_disk_too_small_is_told_before_training(opened, mesh, monkeypatch):
    tier = opened()
    usage = local_tier.shutil.disk_usage("/")
    monkeypatch.setattr(local_tier.shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(ValueError, match=r"checkpoint\.local\.path: .* GiB free; 3 copies of this host's part"):
        tier.check_room(placed(values_of(1), mesh))


def test_what_several_processes_need_of_one_disk_is_added_up_and_what_they_have_there_counts(opened, mesh, monkeypatch):
    """Two processes with a folder of their own each on the disk of this machine, a third on another machine's."""
    tier, arrays = opened(), placed(values_of(1), mesh)
    need = 3 * sum(value.nbytes for value in values_of(1).values())
    have = [0]

    def gather(value):
        (machine, disk), *_ = value
        return [value, [[machine, disk], need, "/other", have[0]], [["elsewhere", disk], 10 * need, "/third", 0]]

    monkeypatch.setattr(local_tier.hosts, "gather", gather)
    usage = local_tier.shutil.disk_usage("/")
    monkeypatch.setattr(local_tier.shutil, "disk_usage", lambda path: usage._replace(free=2 * need - 1))
    with pytest.raises(ValueError, match="GiB free"):
        tier.check_room(arrays)
    have[0] = 1
    tier.check_room(arrays)


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


@pytest.mark.parametrize("readers", [(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 1, 0), (1, 0, 1, 1)])
def test_shards_are_sent_to_those_that_hold_the_same_as_bits(mesh, readers):
    """Of each part one slice reads and the other is sent it, whole leaves too; NaN payloads and -0.0 come through."""
    sources = np.zeros(mesh.devices.shape, bool)
    for (fsdp, tensor), reader in zip(np.ndindex(2, 2), readers, strict=True):
        sources[reader, 0, fsdp, tensor, 0, 0] = True
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


def test_hosts_whose_disks_have_the_places_of_several_take_what_the_others_leave():
    found = find_seats({"fsdp": 4}, [], owners=[0, 1, 2, 3], held=[{0}, {2, 3}, {2}, {0, 1}])
    assert found == Seats([0, 3, 2, 1], [True] * 4, False)


def test_a_host_of_several_devices_reads_for_all_of_them():
    held = [{0, 1, 2, 3}, set()]
    found = find_seats({"slice": 2, "fsdp": 4}, ["slice"], owners=[0, 0, 0, 0, 1, 1, 1, 1], held=held)
    assert found == Seats(list(range(8)), [True] * 4 + [False] * 4, False)


# A run.


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return tiny_runs.write_model(folder / "base"), tiny_runs.write_rows(folder / "data.jsonl", tiny_runs.rows(40))


PLAIN = ("checkpoint.every_steps=100", "export.hf=false", "export.adapter=false")
DIES_AT_4 = """
import os, sys
from jaxtune import train
from jaxtune.saving import local_tier
real = local_tier.LocalTier.save
def save(self, step, *rest):
    real(self, step, *rest)
    self.settle()
    if step == 4:
        os._exit(9)
local_tier.LocalTier.save = save
train.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def left_at_4(inputs, tmp_path_factory):
    """What a run of 6 updates left that was killed when it had copied the 4th: its output, and its host's disk."""
    there = tmp_path_factory.mktemp("killed") / "run"
    copies = (f"checkpoint.local.path={there / 'disk'}", "checkpoint.local.every_steps=2")
    words = tiny_runs.words(*inputs, there / "out", *PLAIN, *copies)
    assert subprocess.run([sys.executable, "-c", DIES_AT_4, *words], capture_output=True).returncode == 9
    assert not list((there / "out" / "checkpoints").glob("[0-9]*"))
    shutil.copytree(there, there.parent / "kept")
    return there, copies


@pytest.fixture
def killed(inputs, left_at_4):
    """(root, configuration of what goes on): each test finds what was left as it was."""
    there, copies = left_at_4
    shutil.rmtree(there)
    shutil.copytree(there.parent / "kept", there)
    return there, lambda *more: tiny_runs.config(*inputs, there / "out", *PLAIN, *copies, *more)


def test_a_run_goes_on_from_the_copies_and_is_the_run_that_was_never_stopped(tmp_path, inputs, killed, capsys):
    root, going_on = killed
    training.run(tiny_runs.config(*inputs, tmp_path / "whole", *PLAIN))
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate"):
        training.run(going_on("optimizer.learning_rate=0.02"))
    capsys.readouterr()
    training.run(going_on())
    assert "restoring step 4 from the hosts' own disks" in capsys.readouterr().out
    assert tiny_runs.losses(root / "out") == tiny_runs.losses(tmp_path / "whole")
    assert json.loads((root / "out" / "checkpoints" / "6" / "run" / "metadata").read_text())["step"] == 6
    assert not list((root / "disk").rglob("arrays"))


def test_a_state_that_is_on_a_disk_alone_is_put_into_storage_when_the_run_ends_there(killed):
    """train.steps may be lowered to where the run is."""
    root, going_on = killed
    training.run(going_on("train.steps=4"))
    assert [path.name for path in (root / "out" / "checkpoints").glob("[0-9]*")] == ["4"]
    assert not list((root / "disk").rglob("arrays"))


def test_a_start_without_copies_makes_those_of_before_count_no_more(killed, capsys):
    _, going_on = killed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Loop, "run", lambda *anything, **more: (_ for _ in ()).throw(RuntimeError("stopped")))
        with pytest.raises(RuntimeError, match="stopped"):
            training.run(going_on("checkpoint.local.path=null"))
    capsys.readouterr()
    training.run(going_on())
    assert "restoring" not in capsys.readouterr().out


def test_a_save_that_failed_is_noticed_though_a_copy_is_made_at_every_update(tmp_path, inputs, failing, capsys):
    failing(1)
    words = ("checkpoint.every_steps=30", "train.steps=40", f"checkpoint.local.path={tmp_path / 'disk'}")
    more = ("checkpoint.local.every_steps=1", "export.hf=false", "export.adapter=false")
    training.run(tiny_runs.config(*inputs, tmp_path / "out", *words, *more))
    assert "saving step 30 failed" in capsys.readouterr().out
    saved = sorted(int(path.name) for path in (tmp_path / "out" / "checkpoints").glob("[0-9]*"))
    assert len(saved) == 2 and 30 < saved[0] < 40 and saved[1] == 40
