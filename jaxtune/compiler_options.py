"""What XLA is told besides its defaults, by kind of device."""

from typing import Any

# What a TPU's compiler is told besides its defaults: no windowed collective matmuls (1.7-1.8 times fewer estimated
# cycles on an 8B step), and 32 MiB of vector memory for fusions (another 1.1 times; 64 MiB gives 3 % more and takes
# half as long again to compile).
TPU_OPTIONS: dict[str, Any] = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 100000,
    "xla_tpu_scoped_vmem_limit_kib": 32768,
}
# Weights are gathered, and gradients added up, beside the matrix products; without these every gather waits, a sixth of
# an 8B LoRA step on v5p. Chips with sparse cores do it on them (libtpu from 0.0.50 on); v5e, which has none, gathers
# within fusions, which the newer libtpu refuses on every other chip.
_SPARSE_CORES: dict[str, Any] = {
    "xla_tpu_prefer_async_allgather_to_allreduce": True,  # else it adds up zeros and parts on many chips
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
    "xla_tpu_enable_all_gather_offload_tracing": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    "xla_tpu_enable_all_reduce_offload_tracing": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": False,
    "xla_tpu_use_tc_device_shape_on_sc": True,
    "xla_sc_disable_megacore_partitioning": True,
    "xla_sc_enable_instruction_fusion": False,
}
_FUSIONS: dict[str, Any] = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}
GATHERING: dict[str, dict[str, Any]] = {
    "TPU v5 lite": _FUSIONS,
    "TPU v5": _SPARSE_CORES,
    "TPU v6 lite": _SPARSE_CORES,
    "TPU7x": _SPARSE_CORES,
}


def compiler_options(device_kind: str) -> dict[str, Any]:
    """Returns what the compiler is told for devices of a kind, as jax names it, besides its defaults."""
    return {**TPU_OPTIONS, **GATHERING.get(device_kind, {})} if device_kind.startswith("TPU") else {}
