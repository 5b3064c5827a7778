"""What names of accelerators stand for, as the public pages list them."""

import pytest

from jaxtune.cost_model.topologies import parse_topology


@pytest.mark.parametrize(
    ("name", "layout", "chips", "hosts", "devices"),
    [
        ("v2-8", "v2:2x2", 4, 1, 8),
        ("v3-32", "v3:4x4", 16, 4, 32),
        ("v4-8", "v4:2x2x1", 4, 1, 4),
        ("v4-32", "v4:2x2x4", 16, 4, 16),
        ("v4-512", "v4:4x8x8", 256, 64, 256),
        ("v5p-8", "v5p:2x2x1", 4, 1, 4),
        ("v5p-16", "v5p:2x2x2", 8, 2, 8),
        ("v5p-64", "v5p:2x4x4", 32, 8, 32),
        ("v5p-128", "v5p:4x4x4", 64, 16, 64),
        ("v5p-256", "v5p:4x4x8", 128, 32, 128),
        ("v5p-384", "v5p:4x4x12", 192, 48, 192),
        ("v5p-2048", "v5p:8x8x16", 1024, 256, 1024),
        ("v5e-1", "v5e:1x1", 1, 1, 1),
        ("v5e-8", "v5e:2x4", 8, 1, 8),
        ("v5e-64", "v5e:8x8", 64, 16, 64),
        ("v5litepod-16", "v5e:4x4", 16, 4, 16),
        ("v6e-256", "v6e:16x16", 256, 64, 256),
        ("tpu7x-64", "tpu7x:4x4x4", 64, 16, 128),
        ("V5P:4x4x8", "v5p:4x4x8", 128, 32, 128),
        ("v5e:4x4x1", "v5e:4x4", 16, 4, 16),
        ("h100-4", "h100:1x4", 4, 1, 4),
        ("b200-64", "b200:8x8", 64, 8, 64),
    ],
)
def test_a_name_is_what_people_mean_by_it(name: str, layout: str, chips: int, hosts: int, devices: int) -> None:
    found = parse_topology(name)
    assert (found.layout, found.chips, found.hosts, found.devices) == (layout, chips, hosts, devices)


def test_slices_multiply() -> None:
    found = parse_topology("v5p-256", slices=2)
    assert (found.chips, found.hosts, found.devices) == (256, 64, 256)
    assert found.describe() == (
        "v5p-256: 256 chips (512 TensorCores) v5p in 2 slices of 4x4x8, 64 hosts, 256 devices to jax"
    )


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v5p-7", "counts TensorCores, two a chip, and there is no slice of 7"),
        ("v5p-4", "expected v5p-8, v5p-16"),
        ("v5e-12", "counts chips, and there is no slice of 12"),
        ("v5e-512", "v5e-256"),
        ("v9-8", "kinds: v2, v3, v4"),
        ("v5p", "expected KIND-N such as v5p-128"),
        ("v5p:4x4", "expected 3 dimensions for v5p"),
        ("v5p:0x2x2", "expected 3 dimensions for v5p"),
        ("h100-12", "whole nodes"),
        ("h100:2x8", "whole nodes"),
    ],
)
def test_a_name_that_means_nothing_is_refused_with_those_that_do(name: str, told: str) -> None:
    with pytest.raises(ValueError, match="--topology") as refused:
        parse_topology(name)
    assert told in str(refused.value)


def test_no_slices_are_refused() -> None:
    with pytest.raises(ValueError, match="--slices: found 0"):
        parse_topology("v5p-8", slices=0)
