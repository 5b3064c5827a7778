"""What one device, as jax counts devices, can do.

Figures of the pages for each version at cloud.google.com/tpu/docs (peak, bandwidth of HBM); the clock follows
from the peak and the size of the matrix units.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """`peak` dense bfloat16 FLOP/s; `bandwidth` of the memory in bytes/s; `clock` in Hz."""

    peak: float
    bandwidth: float
    clock: float


# By jax's `device_kind`.
CHIPS = {
    "TPU v4": Chip(275e12, 1.228e12, 1.05e9),
    "TPU v5 lite": Chip(197e12, 0.819e12, 1.5e9),
    "TPU v5": Chip(459e12, 2.765e12, 1.75e9),
    "TPU v6 lite": Chip(918e12, 1.64e12, 1.75e9),
    "TPU7x": Chip(1153e12, 7.37e12, 2.2e9),
}
