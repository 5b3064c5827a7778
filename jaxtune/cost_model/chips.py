"""What one device, as jax counts devices, can do.

Peaks, bandwidths of HBM and of the network between slices are those of the page of each TPU at
cloud.google.com/tpu/docs, halved where a chip is two devices; clocks follow from the peak and the size of the matrix
units. What a program may use of the memory is what libtpu 0.0.50 names when a program needs too much ("exceeds
available HBM (95.73G)"; 0.0.42 says up to 0.01 more). Links: "How to Scale Your Model" (Austin et al. 2025, part 2),
which has what is reached of the 100 or 50 GB/s that the pages say, and 25 GB/s of network for a host, taken where a
page is silent (v2 to v4); v2 and v3: Jouppi et al. 2020, "A Domain-Specific Supercomputer for Training Deep Neural
Networks"; TPU7x, whose page says 1,200 GB/s for all links of a chip, as v5p's does, is taken as v5p. GPUs: NVIDIA's
datasheets of the SXM cards, dense peaks; the network is one card of 200 (A100) or 400 Gbit/s for each of them.
"""

import dataclasses
from dataclasses import dataclass

GIB = 2.0**30


@dataclass(frozen=True)
class Chip:
    """What a device has and does.

    `peak` dense bfloat16 FLOP/s; `memory` bytes that a program may use; `bandwidth` of the memory in bytes/s; `clock`
    in Hz, None for a GPU, whose compiler estimates no cycles. `link` bytes/s of one link one way, shared by the
    `devices` of a chip. A TPU's links lead to its neighbours in a torus of `dimensions`, closed to a ring where a side
    is a multiple of `ring` chips; 0 dimensions is a switch between all cards of a node. `dcn` bytes/s that a device
    sends out of its slice or node; `host` bytes/s between a device and the memory of its host, one way.
    """

    peak: float
    memory: float
    bandwidth: float
    clock: float | None
    link: float
    dcn: float
    dimensions: int = 0
    ring: int = 1
    devices: int = 1
    host: float = 16e9


# By jax's `device_kind`.
TPUS = {
    "TPU v2": Chip(23e12, 7.48 * GIB, 0.35e12, 0.7e9, link=62e9, dcn=3.1e9, dimensions=2, ring=16, devices=2),
    "TPU v3": Chip(61.5e12, 15.48 * GIB, 0.45e12, 0.94e9, link=82e9, dcn=3.1e9, dimensions=2, ring=32, devices=2),
    "TPU v4": Chip(275e12, 30.75 * GIB, 1.228e12, 1.05e9, link=45e9, dcn=6.25e9, dimensions=3, ring=4),
    "TPU v5 lite": Chip(197e12, 15.75 * GIB, 0.819e12, 1.5e9, link=45e9, dcn=3.125e9, dimensions=2, ring=16),
    "TPU v5": Chip(459e12, 95.73 * GIB, 2.765e12, 1.75e9, link=90e9, dcn=6.25e9, dimensions=3, ring=4),
    "TPU v6 lite": Chip(918e12, 31.24 * GIB, 1.64e12, 1.75e9, link=90e9, dcn=12.5e9, dimensions=2, ring=16, host=32e9),
    "TPU7x": Chip(
        1153e12, 94.74 * GIB, 3.69e12, 2.2e9, link=90e9, dcn=6.25e9, dimensions=3, ring=4, devices=2, host=32e9
    ),
}
GPUS = {
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2.039e12, None, link=300e9, dcn=25e9, host=25e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3.35e12, None, link=450e9, dcn=50e9, host=50e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4.8e12, None, link=450e9, dcn=50e9, host=50e9),
    "NVIDIA B200": Chip(2250e12, 180e9, 8.0e12, None, link=900e9, dcn=50e9, host=50e9),
}
_SMALLER = {
    "NVIDIA A100-SXM4-40GB": dataclasses.replace(GPUS["NVIDIA A100-SXM4-80GB"], memory=40e9, bandwidth=1.555e12),
    "NVIDIA H100 PCIe": Chip(756e12, 80e9, 2.0e12, None, link=300e9, dcn=50e9, host=50e9),
}
# Newer versions of jax name some in another way.
_ALIASES = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}
CHIPS = {**TPUS, **GPUS, **_SMALLER, **{name: TPUS[known] for name, known in _ALIASES.items()}}
