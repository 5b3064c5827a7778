"""What is saved comes back to the bit, damage is found, and what is kept is kept."""

import json
import pathlib
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from jaxtune.saving.checkpoint import Checkpoints, Patience, flatten
from jaxtune.saving.manifest import CUT_OFF, MANIFEST, check_manifest
from jaxtune.sharding import make_mesh


def state_of(seed: float) -> dict:
    """Arrays of several kinds, not a number where one may be, and a scalar."""
    return {
        "weights": {"a": jnp.arange(64.0).reshape(16, 4) * seed, "b": jnp.full((3,), seed, jnp.bfloat16)},
        "moments": [jnp.array([jnp.nan, jnp.inf, -0.0, 1e-45]), jnp.arange(5, dtype=jnp.uint32)],
        "step": jnp.int32(seed),
    }


def specs(state, sharding=None):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(str(tmp_path / "checkpoints"), keep=2)
    yield opened
    opened.close()


def save(checkpoints, *steps, **run):
    for step in steps:
        checkpoints.save(step, state_of(float(step)), run={"step": step, **run})
    checkpoints.wait()


def biggest_file(checkpoints, step):
    files = [file for file in pathlib.Path(checkpoints.folder / str(step) / "state").rglob("*") if file.is_file()]
    return max(files, key=lambda file: file.stat().st_size)


def said_by(checkpoints):
    said = []
    return checkpoints.newest_usable(said.append), "\n".join(said)


def test_every_leaf_and_the_json_beside_it_come_back_to_the_bit(checkpoints):
    save(checkpoints, 7, data={"lanes": [[1, 2]]}, eval_loss=1.5)
    restored = checkpoints.restore(7, specs(state_of(7.0)))
    assert restored.step == 7 and restored.run == {"step": 7, "data": {"lanes": [[1, 2]]}, "eval_loss": 1.5}
    for there, here in zip(jax.tree.leaves(restored.state), jax.tree.leaves(state_of(7.0)), strict=True):
        assert there.dtype == here.dtype and np.asarray(there).tobytes() == np.asarray(here).tobytes()
    assert checkpoints.read_run(7) == restored.run


def test_arrays_come_back_onto_another_mesh(checkpoints):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    save(checkpoints, 1)
    wanted = {"weights": {"a": jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=split)}}
    (array,) = jax.tree.leaves(checkpoints.restore(1, wanted).state)
    assert array.sharding == split and {shard.data.shape for shard in array.addressable_shards} == {(4, 2)}
    np.testing.assert_array_equal(array, state_of(1.0)["weights"]["a"])


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"weights": {"a": jax.ShapeDtypeStruct((16, 5), jnp.float32)}}, r"weights/a has shape \(16, 4\).*\(16, 5\)"),
        ({"weights": {"c": jax.ShapeDtypeStruct((3,), jnp.float32)}}, "weights/c has shape no entry"),
    ],
)
def test_another_models_checkpoint_is_refused_by_name_and_shape(checkpoints, wanted, told):
    save(checkpoints, 1)
    with pytest.raises(ValueError, match=told):
        checkpoints.restore(1, wanted)


def test_the_newest_are_kept_and_the_best(checkpoints):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        save(checkpoints, step, eval_loss=loss)
    assert checkpoints.best_step() == 2
    assert sorted(int(path.name) for path in checkpoints.folder.iterdir()) == [2, 4, 5]


def test_a_new_manager_finds_what_an_earlier_one_saved(tmp_path, checkpoints):
    save(checkpoints, 1, 2)
    later = Checkpoints(str(tmp_path / "checkpoints"), keep=2)
    assert later.newest_usable() == 2 and later.best_step() is None
    later.close()


def test_nothing_saved_is_no_checkpoint(checkpoints):
    assert said_by(checkpoints) == (None, "")


# Damage.


def test_a_flipped_bit_is_found_and_the_checkpoint_before_it_used(checkpoints):
    save(checkpoints, 1, 2)
    tiny_runs.flip_a_bit(biggest_file(checkpoints, 2))
    step, said = said_by(checkpoints)
    assert step == 1
    assert "2 is not usable" in said and "SHA-256" in said and "the one before it" in said
    assert said_by(checkpoints) == (1, ""), "it is told once"


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "bytes instead of"),
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(b""), "has 0 bytes instead of"),
    ],
)
def test_a_cut_or_missing_file_is_named(checkpoints, damage, told):
    save(checkpoints, 1, 2)
    file = biggest_file(checkpoints, 2)
    damage(file)
    step, said = said_by(checkpoints)
    assert step == 1 and told in said and file.name in said


def test_a_save_that_was_cut_off_is_no_checkpoint(checkpoints):
    save(checkpoints, 1, 2)
    (checkpoints.folder / "2" / MANIFEST).unlink()
    step, said = said_by(checkpoints)
    assert step == 1 and CUT_OFF in said


def test_the_first_save_cut_off_starts_anew(checkpoints):
    save(checkpoints, 1)
    (checkpoints.folder / "1" / MANIFEST).unlink()
    assert said_by(checkpoints)[0] is None


@pytest.mark.parametrize("text", ["", "{}", "[]", "no json", '{"files": 3, "sha256": 1}', "\xff"])
def test_a_manifest_that_cannot_be_read_is_damage(checkpoints, text):
    save(checkpoints, 1, 2)
    (checkpoints.folder / "2" / MANIFEST).write_bytes(text.encode("latin-1"))
    step, said = said_by(checkpoints)
    assert step == 1 and "its manifest cannot be read" in said
    assert checkpoints.best_step() is None


def test_a_changed_number_in_the_manifest_is_damage(checkpoints):
    save(checkpoints, 1, eval_loss=2.0)
    manifest = checkpoints.folder / "1" / MANIFEST
    manifest.write_text(manifest.read_text().replace("2.0", "1.0"))
    assert check_manifest(checkpoints.folder / "1") == "its manifest cannot be read"


def test_when_all_are_damaged_nothing_is_started_over_them(checkpoints):
    save(checkpoints, 1, 2)
    for step in (1, 2):
        tiny_runs.flip_a_bit(biggest_file(checkpoints, step))
    with pytest.raises(ValueError, match=r"every checkpoint here is damaged \(1, 2\).*another output="):
        checkpoints.newest_usable(lambda text: None)


def test_a_damaged_checkpoint_takes_no_good_ones_place(tmp_path, checkpoints):
    save(checkpoints, 3, 5)
    tiny_runs.flip_a_bit(biggest_file(checkpoints, 5))
    again = Checkpoints(str(tmp_path / "checkpoints"), keep=1)
    assert again.newest_usable(lambda text: None) == 3
    save(again, 4)  # below the damaged one
    assert sorted(int(path.name) for path in again.folder.iterdir()) == [4]
    save(again, 5)
    assert said_by(again) == (5, "")
    again.close()


def test_a_damaged_step_can_be_saved_again(tmp_path, checkpoints):
    save(checkpoints, 1, 2)
    tiny_runs.flip_a_bit(biggest_file(checkpoints, 2))
    again = Checkpoints(str(tmp_path / "checkpoints"), keep=2)
    assert again.newest_usable(lambda text: None) == 1
    save(again, 2)
    assert said_by(again) == (2, "")
    again.close()


def test_every_file_but_the_manifest_is_in_it(checkpoints):
    save(checkpoints, 1)
    folder = pathlib.Path(checkpoints.folder / "1")
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    there = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} - {MANIFEST}
    assert set(listed) == there and all(len(entry["sha256"]) == 64 for entry in listed.values())


def patient(tmp_path, said, **more):
    return Checkpoints(str(tmp_path / "patient"), keep=2, patience=Patience(3, 0.01, **more), say=said.append)


def test_a_save_that_fails_is_tried_again_with_longer_and_longer_pauses(tmp_path, failing):
    said = []
    opened = patient(tmp_path, said)
    save(opened, 1)
    failing(2)
    opened.save(2, state_of(2.0), run={"step": 2}, wait=True)
    assert said_by(opened) == (2, "")
    assert [text.rpartition(" in ")[2] for text in said] == ["0.01 s", "0.02 s"]
    assert all("step 2 failed" in text and "No space left" in text for text in said)
    opened.close()


def test_a_save_that_failed_behind_training_is_told_and_the_next_is_waited_for(tmp_path, failing):
    said = []
    opened = patient(tmp_path, said)
    failing(1)
    opened.save(1, state_of(1.0), run={"step": 1})
    while not opened.has_failed():
        pass
    opened.save(2, state_of(2.0), run={"step": 2})
    assert said_by(opened) == (2, "") and "saving step 1 failed (OSError" in said[0] and "now step 2" in said[0]
    opened.close()


def test_a_save_that_goes_on_failing_stops_with_a_word_and_leaves_the_one_before(tmp_path, failing):
    said = []
    opened = patient(tmp_path, said)
    save(opened, 1)
    failing(4)
    with pytest.raises(ValueError, match=r"step 2 cannot be saved .* tried 4 times: .*No space left.* Step 1 is there"):
        opened.save(2, state_of(2.0), run={"step": 2}, wait=True)
    assert said_by(opened)[0] == 1
    restored = opened.restore(1, specs(state_of(1.0)))
    assert int(restored.state["step"]) == 1
    opened.close()


def test_a_file_system_that_takes_no_more_bytes_stops_the_save_and_not_the_one_before(tmp_path):
    """The kernel's own limit on the size of files: what TensorStore writes fails, not a stand-in of ours."""
    said = []
    opened = patient(tmp_path, said)
    save(opened, 1)
    large = {"x": jnp.arange(1 << 18, dtype=jnp.float32) ** 1.5}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, before[1]))
        with pytest.raises(ValueError, match=r"step 2 cannot be saved .* tried 4 times"):
            opened.save(2, large, run={"step": 2}, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert said_by(opened) == (1, "")
    opened.save(2, large, run={"step": 2}, wait=True)
    assert said_by(opened) == (2, "")
    opened.close()


def test_what_a_killed_process_left_unfinished_goes(tmp_path, checkpoints):
    save(checkpoints, 1)
    left = checkpoints.folder / "2.orbax-checkpoint-tmp"
    left.mkdir()
    Checkpoints(str(tmp_path / "checkpoints"), keep=2).close()
    assert not left.exists() and checkpoints.steps() == [1]


def test_two_leaves_of_one_name_are_refused():
    assert list(flatten({"a": [1, {"b": 2}]})) == ["a/0", "a/1/b"]
    with pytest.raises(ValueError, match="same name"):
        flatten({"a/b": 1, "a": {"b": 2}})
