"""Compiled functions that all processes of a run on CPU find in the compilation cache, not the first alone."""

from jax._src import cache_key


def share_compilations() -> None:
    """Makes a function's key the same in every process of a run.

    jax hashes the devices by a topology that on CPU knows a process's own devices only. Host 0 alone writes to the
    cache, so the others would look for other keys and compile everything at every start. The devices' numbers are in
    the key beside it, and on TPU and GPU the topology is the whole run's.
    """
    cache_key._hash_accelerator_config = cache_key._hash_devices  # type: ignore[attr-defined]
