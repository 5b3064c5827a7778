"""What devices can do: one table, for plans and for the utilisation that a run tells."""

from jaxtune.cost_model.chips import CHIPS, GPUS, TPUS


def test_peaks_are_of_one_device_in_bfloat16() -> None:
    assert CHIPS["TPU v5"].peak == CHIPS["TPU v5p"].peak == 459e12
    assert CHIPS["NVIDIA H100 80GB HBM3"].peak == 989e12
    assert all(2e13 < chip.peak < 3e15 for chip in CHIPS.values())


def test_a_tpu_has_a_clock_that_its_peak_follows_from_and_a_gpu_has_none() -> None:
    units = {name: chip.peak / chip.clock / 2**15 for name, chip in TPUS.items()}  # of 128 x 128 multiply-adds
    assert {name: round(number) for name, number in units.items()} == {
        "TPU v2": 1,
        "TPU v3": 2,
        "TPU v4": 8,
        "TPU v5 lite": 4,
        "TPU v5": 8,
        "TPU v6 lite": 16,
        "TPU7x": 16,
    }
    assert all(chip.clock is None for chip in GPUS.values())
