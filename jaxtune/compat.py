"""Differences between the versions and machines that we run on; nothing else knows a version.

jax 0.10 to 0.12 agree on all that we call (`set_mesh`, `shard_map`, explicit axis types), so this file is short.
"""

import logging
import os
import pathlib
import re


def prepare_environment() -> None:
    """Settles what libraries read from the environment; call it before jax and transformers are imported.

    transformers advises to install torch wherever it is missing; nothing here needs it. With libtpu installed (the
    `plan` extra) jax would ask for a TPU first and wait for a metadata server that a laptop does not have. A TPU VM
    shows its chips as device files; without them, and without a platform named by the user, jax is left the CPU.

    A CPU shown as several devices (`--xla_force_host_platform_device_count`) runs them on one pool of threads, one for
    each, and a collective that waits holds its thread: two at a time on one device leave another device none, and the
    process is aborted after 40 s. XLA reads the size of the pool from `NPROC`; four threads a device are enough.

    fsspec remembers what a bucket's folders hold, and does not hear of what TensorStore and other hosts write there:
    it is told to ask each time.
    """
    shown = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if shown and int(shown[1]) > 1:
        os.environ.setdefault("NPROC", str(4 * int(shown[1])))
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints the stack of errors that it raises as well
    for store in ("FSSPEC_GS", "FSSPEC_S3"):
        os.environ.setdefault(store, '{"use_listings_cache": false}')
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if not has_chips():
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        if "JAX_PLATFORMS" not in os.environ and not has_gpu():
            os.environ["JAX_PLATFORMS"] = "cpu"


def has_chips() -> bool:
    """Whether TPU chips show their device files here."""
    return any(pathlib.Path("/dev").glob("accel*")) or any(pathlib.Path("/dev/vfio").glob("[0-9]*"))


def has_gpu() -> bool:
    """Whether a GPU's driver shows itself here."""
    # NVIDIA, AMD, and either of them under WSL2
    return any(pathlib.Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))
