"""Copies on the hosts' own disks: what a run goes on from when machines are lost, and that it is the same run."""

import pathlib
import shutil

import pytest
import tiny_runs
from pods import assert_same_stream

PROCESSES, STEPS, SAVED = 4, 16, 4
SLICES = ("mesh.slice=2", "mesh.fsdp=2")  # hosts 2 and 3 hold what hosts 0 and 1 hold


def disk(root: pathlib.Path, host: int) -> pathlib.Path:
    return root / f"disk-{host}"


def words(root: pathlib.Path) -> tuple[str, ...]:
    local = (f"checkpoint.local.path={root}/disk-$JAX_PROCESS_ID", "checkpoint.local.every_steps=1")
    return (*SLICES, f"train.steps={STEPS}", f"checkpoint.every_steps={SAVED}", *local)


def on_all_disks(root: pathlib.Path) -> set[int]:
    """The steps of which every host has its copy."""
    return set.intersection(
        *({int(path.parent.name) for path in disk(root, host).glob(f"*/*/{host}")} for host in range(PROCESSES))
    )


class Killed:
    """A run of two slices, killed some updates after a save; `again` lays it out anew, to be harmed and resumed."""

    def __init__(self, mixture, root: pathlib.Path) -> None:
        self.mixture, self.root, self.kept = mixture, root / "pod", root / "kept"
        self.output = self.root / "out"
        with mixture.start(self.output, *words(self.root), processes=PROCESSES, devices=1) as run:
            run.wait_until(f"step {2 * SAVED - 2}/{STEPS}")
            run.kill()
        self.newest = max(on_all_disks(self.root))
        assert self.newest % SAVED, "killed at a save: what storage has is as new"
        shutil.copytree(self.root, self.kept)

    def again(self) -> pathlib.Path:
        shutil.rmtree(self.root)
        shutil.copytree(self.kept, self.root)
        return self.root

    def resume(self, *more: str) -> str:
        """Goes on to the end; returns what host 0 said."""
        run = self.mixture.finish(self.output, *words(self.root), *more, processes=PROCESSES, devices=1)
        return run.said(0, last=30000)


@pytest.fixture(scope="module")
def killed(mixture) -> Killed:
    return Killed(mixture, mixture.root / "killed")


@pytest.fixture(scope="module")
def unharmed(mixture) -> pathlib.Path:
    """The run that nothing happens to, without a local tier."""
    output = mixture.root / "unharmed"
    mixture.finish(output, *words(output), "checkpoint.local.path=null", processes=PROCESSES, devices=1)
    return output


def what_storage_has_is_lost(root):
    """The disks are not: nothing is read from storage."""
    shutil.rmtree(root / "out" / "checkpoints" / str(SAVED))


def slice_1_is_lost(root):
    for host in (2, 3):
        shutil.rmtree(disk(root, host))


def a_host_of_each_slice_is_lost(root):
    for host in (0, 3):
        shutil.rmtree(disk(root, host))


def new_numbers_and_slice_1_lost(root):
    """The two machines of slice 0 come back with each other's number."""
    slice_1_is_lost(root)
    disk(root, 0).rename(root / "aside")
    disk(root, 1).rename(disk(root, 0))
    (root / "aside").rename(disk(root, 1))


def bits_of_host_1_are_flipped(root):
    for file in disk(root, 1).rglob("arrays"):
        tiny_runs.flip_a_bit(file)


HARMS = [what_storage_has_is_lost, slice_1_is_lost, a_host_of_each_slice_is_lost, new_numbers_and_slice_1_lost]
HARMS += [bits_of_host_1_are_flipped]


@pytest.mark.long
@pytest.mark.parametrize("harm", HARMS)
def test_the_run_goes_on_from_the_disks_that_are_left_to_the_bit(killed, unharmed, harm):
    harm(killed.again())
    said = killed.resume()
    assert f"restoring step {killed.newest} from the hosts' own disks" in said
    assert ("a local copy is not usable" in said) == (harm is bits_of_host_1_are_flipped)
    assert_same_stream(killed.output, unharmed)
    assert tiny_runs.losses(killed.output) == tiny_runs.losses(unharmed)
    assert not list(killed.root.glob("disk-*/**/arrays")), "gone when the run is done"


@pytest.mark.long
def test_where_a_part_is_on_no_disk_storage_is_read(killed, unharmed):
    """Hosts 1 and 3 hold the same, and both are lost."""
    root = killed.again()
    for host in (1, 3):
        shutil.rmtree(disk(root, host))
    said = killed.resume()
    assert f"the local copies of step {killed.newest} are not used: a part of the state is on no disk" in said
    assert f"restoring step {SAVED}:" in said
    assert_same_stream(killed.output, unharmed)
    assert tiny_runs.losses(killed.output) == tiny_runs.losses(unharmed)


@pytest.mark.long
def test_copies_of_another_mesh_are_not_used_and_storage_is_read(killed, unharmed):
    killed.again()
    said = killed.resume("mesh.slice=1", "mesh.fsdp=4")
    assert "they are of a mesh slice 2 x fsdp 2, this run's is fsdp 4" in said and f"restoring step {SAVED}:" in said
    assert_same_stream(killed.output, unharmed)
