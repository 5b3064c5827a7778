"""Meshes, batches and parameters: what lies where, and what is said when it cannot."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxtune.sharding import (
    BATCH_AXES,
    MESH_AXES,
    PARAMETER_RULES,
    activation_spec,
    batch_sharding,
    check_batch,
    check_length,
    constrain,
    create_on_mesh,
    make_mesh,
    parameter_shardings,
    parameter_spec,
)


def test_one_axis_takes_the_devices_that_are_left():
    assert make_mesh({"fsdp": -1}).shape["fsdp"] == 8
    assert dict(make_mesh({"fsdp": -1, "tensor": 2}).shape) == {
        "slice": 1, "data": 1, "fsdp": 4, "tensor": 2, "context": 1, "expert": 1
    }  # fmt: skip


def test_axes_stand_in_one_order_and_are_partitioned_by_the_compiler():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert mesh.axis_names == MESH_AXES
    assert {kind.name for kind in mesh.axis_types} == {"Auto"}


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"fsdp": 3}, r"mesh: found fsdp=3, which makes 3 devices, but 8 cpu device\(s\) are here"),
        ({"fsdp": 3, "tensor": -1}, r"found fsdp=3, tensor=-1, which divides into 3 devices, but 8 cpu"),
        ({}, r"found size 1 on every axis, which makes 1 devices.*Set one axis to -1 \(mesh.fsdp=-1\)"),
        ({"data": 16}, "whose product is 8"),
        ({"data": 16, "fsdp": -1}, "whose product is 8"),
    ],
)
def test_a_mesh_that_does_not_make_the_devices_says_what_would(sizes, told):
    with pytest.raises(ValueError, match=told):
        make_mesh(sizes)


def test_rows_are_split_over_the_batch_axes_alone():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    check_batch(4, mesh)
    with pytest.raises(ValueError, match=r"train.batch_rows: found 6.*4 batch shards \(data=2 x fsdp=2\).*=8"):
        check_batch(6, mesh)
    with pytest.raises(ValueError, match=r"train\.microbatch_rows: found 2"):
        check_batch(2, mesh, key="train.microbatch_rows")
    assert batch_sharding(mesh).shard_shape((8, 16)) == (2, 16)
    assert batch_sharding(mesh, leading=1).shard_shape((3, 8, 16)) == (3, 2, 16)


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        (("layers", "embed", "mlp"), (3, 16, 24), (None, "fsdp", "tensor")),
        (("layers", "embed", "heads", "head_dim"), (3, 16, 4, 8), (None, "fsdp", "tensor", None)),
        (("vocab", "embed"), (40, 16), ("tensor", "fsdp")),
        (("vocab", "embed"), (97, 16), (None, "fsdp")),  # an odd vocabulary stays whole
        (("embed", "kv_heads", "head_dim"), (16, 1, 8), ("fsdp", None, None)),  # so does a single kv head
        (("embed", None), (16, 4), ("fsdp", None)),  # an adapter's r
        (("embed", "embed"), (16, 16), ("fsdp", None)),  # no mesh axis twice: the first has it
        (("mlp", "heads"), (24, 4), ("tensor", None)),
        ((), (), ()),
    ],
)
def test_a_parameter_lies_by_its_logical_axes(axes, shape, spec):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    assert parameter_spec(axes, shape, mesh) == PartitionSpec(*spec)


def test_an_axis_that_nobody_knows_is_named():
    with pytest.raises(ValueError, match="unknown logical axis 'widht'; expected one of vocab, embed"):
        parameter_spec(("widht",), (4,), make_mesh({"fsdp": -1}))


def test_no_rule_names_a_mesh_axis_that_is_none():
    assert {axis for axis in PARAMETER_RULES.values() if axis} | set(BATCH_AXES) <= set(MESH_AXES)


def test_activations_lie_by_rows_and_heads_where_these_divide():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    assert activation_spec(("batch", "seq", "heads", None), (8, 16, 4, 8), mesh) == PartitionSpec(
        BATCH_AXES, None, ("tensor",), None
    )
    assert activation_spec(("batch", None), (6, 16), mesh) == PartitionSpec(None, None)


def test_arrays_are_made_where_they_belong():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    state = nnx.from_flat_state([(("kernel",), nnx.Param(jnp.zeros((16, 24)), axes=("embed", "mlp")))])
    places = parameter_shardings(state, mesh)
    made = create_on_mesh(lambda: jax.tree.map(lambda leaf: leaf + 1, state), places)
    (kernel,) = jax.tree.leaves(made)
    assert kernel.sharding.spec == PartitionSpec("fsdp", "tensor") and len(kernel.addressable_shards) == 8
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(4, 12)}


def test_constraints_change_no_number_and_need_no_mesh():
    x = jnp.arange(8.0 * 4).reshape(8, 4)
    assert constrain(x, ("batch", None)) is x
    with jax.set_mesh(make_mesh({"fsdp": -1})):
        placed = jax.jit(lambda x: constrain(x, ("batch", None)))(x)
    assert (placed == x).all() and placed.sharding.shard_shape(x.shape) == (1, 4)


def test_a_row_must_divide_over_context():
    mesh = make_mesh({"context": 8})
    check_length(64, mesh)
    with pytest.raises(ValueError, match=r"data\.encoder_length: found 60, .*mesh\.context=8; .*encoder_length=56"):
        check_length(60, mesh, key="data.encoder_length")
