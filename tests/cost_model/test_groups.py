"""Which axes of a mesh collectives run over, in every way that HLO has of writing their devices."""

import pytest

from jaxtune.cost_model.groups import axes_of, pairs, replica_groups

MESH = {"slice": 1, "data": 2, "fsdp": 4, "tensor": 2}  # device = 8 data + 2 fsdp + tensor


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, use_global_device_ids=true", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x=1", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=3] {'b'}, dimensions={1}", [[0, 1, 2], [3, 4, 5]]),
        ("replica_groups=mesh['a'=2,'b'=3] {'a'}", [[0, 3], [1, 4], [2, 5]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x=1", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups={}", []),
    ],
)
def test_groups_of_devices(text, groups):
    assert replica_groups(text) == groups


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7},{8,9},{10,11},{12,13},{14,15}}", ("tensor",)),
        ("replica_groups=[8,2]<=[2,8]T(1,0)", ("data",)),
        ("replica_groups=[2,8]<=[16]", ("fsdp", "tensor")),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'b'}", ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'a','b'}", ("data", "fsdp")),
        ("replica_groups=mesh['c'=2,'a'=2,'b'=4], device_ids=([8,2]T(1,0)) {'c'}", ("tensor",)),
        ("replica_groups=[16,1]<=[16]", ()),
        ("replica_groups=[1,32]<=[32]", ("?",)),
        ("dimensions={0}", ("?",)),
    ],
)
def test_axes_that_groups_run_over(text, axes):
    assert axes_of(replica_groups(text), MESH) == axes


def test_axes_that_a_permute_sends_along():
    around = "channel_id=3, source_target_pairs={{0,2},{2,4},{4,6},{6,0}}, metadata={}"
    assert pairs(around) == [[0, 2], [2, 4], [4, 6], [6, 0]]
    assert axes_of(pairs(around), MESH) == ("fsdp",)
    assert axes_of(pairs("source_target_pairs={{0,8}}"), MESH) == ("data",)
    assert axes_of(pairs("no pairs"), MESH) == ("?",)
