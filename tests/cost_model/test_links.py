"""Bytes and times of collectives, against what a ring or a switch must send."""

import itertools

import pytest

from jaxtune.cost_model.chips import CHIPS, GPUS, TPUS
from jaxtune.cost_model.links import Network, directions, link_seconds, sent_bytes

V5P, V5E, H100 = CHIPS["TPU v5"], CHIPS["TPU v5 lite"], CHIPS["NVIDIA H100 80GB HBM3"]


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-gather", 7 / 8),  # every part of eight but its own passes a device once
        ("reduce-scatter", 7 / 8),
        ("all-reduce", 14 / 8),
        ("all-to-all", 7 / 8),
        ("ragged-all-to-all", 7 / 8),
        ("collective-permute", 1),
    ],
)
def test_bytes_that_leave_a_device(kind, sent):
    assert sent_bytes(kind, 800.0, 8) == pytest.approx(800 * sent)


def test_seconds_at_a_bandwidth():
    assert link_seconds("all-gather", 800.0, 8, 100.0) == pytest.approx(7.0)
    # On a ring of 8 with two links each, 8 x 800 bytes travel 2 hops on average over 16 links.
    assert link_seconds("all-to-all", 800.0, 8, 2 * 100.0) == pytest.approx(8 * 800 * 2 / (16 * 100))
    assert link_seconds("all-to-all", 800.0, 8, 100.0, hops=False) == pytest.approx(7.0)


def test_an_axis_uses_the_links_that_it_extends_over():
    network = Network(V5P, {"slice": 2, "fsdp": 8, "tensor": 2}, {"fsdp": 4, "tensor": 1})
    assert network.bandwidth(("fsdp",)) == 4 * V5P.link
    assert network.bandwidth(("fsdp", "tensor")) == 5 * V5P.link
    assert network.bandwidth(("data",)) == 2 * V5P.link  # not told: a ring along one dimension
    assert network.bandwidth(("slice",)) == V5P.dcn
    assert network.bandwidth(("slice", "fsdp")) == V5P.dcn
    assert Network(V5P, {}, {"fsdp": 9}).bandwidth(("fsdp",)) == 6 * V5P.link  # a chip has no more
    assert Network(CHIPS["TPU7x"], {}).bandwidth(("fsdp",)) == CHIPS["TPU7x"].link  # two devices share a chip's
    assert Network(H100, {}, {"fsdp": 4}).bandwidth(("fsdp",)) == H100.link


def test_cards_beyond_a_node_send_through_the_network_cards_of_their_group():
    """Nodes of 8: fsdp has whole nodes, or one card of each; tensor inside stays within."""
    assert Network(H100, {"fsdp": 2, "tensor": 4}).bandwidth(("fsdp",)) == H100.link
    assert Network(H100, {"data": 4, "fsdp": 4}).bandwidth(("data",)) == 2 * H100.dcn
    assert Network(H100, {"fsdp": 4, "tensor": 8}).bandwidth(("fsdp",)) == H100.dcn
    assert Network(H100, {"fsdp": 4, "tensor": 8}).bandwidth(("tensor",)) == H100.link
    assert Network(H100, {"fsdp": 4, "tensor": 8}).bandwidth(("fsdp", "tensor")) == H100.dcn
    assert Network(H100, {"fsdp": 64, "tensor": 1}).bandwidth(("fsdp",)) == min(8 * H100.dcn, H100.link)


def test_seconds_of_a_network():
    network = Network(V5P, {"fsdp": 8}, {"fsdp": 3})
    assert network.seconds("all-gather", 8e9, 8, ("fsdp",)) == pytest.approx(7e9 / (3 * V5P.link))
    assert network.seconds("collective-permute", 1e9, 2, ("fsdp",)) == pytest.approx(1e9 / V5P.link)
    assert network.seconds("all-gather", 8e9, 1, ()) == 0
    assert network.seconds("all-reduce", 1e9, 2, ("slice",)) == pytest.approx(1e9 / V5P.dcn)


def grid(*shape):
    return list(itertools.product(*map(range, shape)))


@pytest.mark.parametrize(
    ("shape", "mesh", "chip", "expected"),
    [
        ((2, 2, 2), {"data": 1, "fsdp": 8}, V5P, {"data": 1, "fsdp": 3}),  # a cube of 2 has no rings
        ((2, 2, 4), {"fsdp": 16}, V5P, {"fsdp": 3}),  # nor has what is no whole cube of 4
        ((4, 4, 4), {"fsdp": 16, "tensor": 4}, V5P, {"fsdp": 4, "tensor": 2}),
        ((4, 4, 4), {"fsdp": 32, "tensor": 2}, V5P, {"fsdp": 5, "tensor": 1}),  # half of a ring is a row
        ((4, 4), {"fsdp": 16}, V5E, {"fsdp": 2}),
        ((8, 16), {"fsdp": 8, "tensor": 16}, V5E, {"fsdp": 1, "tensor": 2}),
    ],
)
def test_links_of_an_axis_by_where_its_devices_stand(shape, mesh, chip, expected):
    assert directions(grid(*shape), shape, mesh, chip) == expected


def test_links_of_slices_and_of_chips_with_two_devices():
    twice = [place for place in grid(2, 2, 1) for _ in range(2)]
    assert directions(twice, (2, 2, 1), {"fsdp": 4, "tensor": 2}, CHIPS["TPU7x"]) == {"fsdp": 2, "tensor": 1}
    two_slices = [*grid(4, 4), *grid(4, 4)]
    assert directions(two_slices, (4, 4), {"slice": 2, "fsdp": 16}, V5E) == {"slice": 1, "fsdp": 2}


@pytest.mark.parametrize("kind", TPUS)
def test_what_is_written_down_of_a_chip_fits_together(kind):
    chip = CHIPS[kind]
    assert chip.clock is not None
    units = chip.peak / chip.clock / (2 * 128 * 128)  # each multiplies and adds 128 x 128 times a cycle
    assert units == pytest.approx(round(units), rel=0.01)
    assert 1e9 < chip.dcn < chip.link < chip.bandwidth


@pytest.mark.parametrize("kind", GPUS)
def test_gpus_have_no_clock_and_no_torus(kind):
    assert CHIPS[kind].clock is None
    assert CHIPS[kind].dimensions == 0
