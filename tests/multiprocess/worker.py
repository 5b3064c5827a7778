"""One process of a run: the train command, with what a test wants changed in it.

FLOAT64 computes and keeps all in float64. FAILING_SHARES=n: the first n of host 1's shares of a manifest cannot be
written. FAILS_ALONE: host 1 cannot read its third batch.
SPIKES=a,b: the a-th and b-th batches ask for wrong tokens, so that their loss is far beyond the usual.
"""

import os
import types
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import adapters, assembly, loop, train
from jaxtune.saving import checkpoint


def in_float64() -> None:
    jax.config.update("jax_enable_x64", True)
    adapters.jnp = types.SimpleNamespace(**{**vars(jnp), "float32": jnp.float64})
    assembly.resolve_dtypes = lambda config, platform: (jnp.float64, jnp.float64)


def failing_shares(times: int) -> None:
    left, real = [times], checkpoint.write_share

    def write(*args):
        if left[0] > 0:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        real(*args)

    checkpoint.write_share = write


def fails_alone() -> None:
    calls, real = [0], loop.Loop._put

    def put(self, batch):
        calls[0] += 1
        if calls[0] == 3 and jax.process_index() == 1:
            raise OSError(5, "Input/output error", "data.jsonl")
        return real(self, batch)

    loop.Loop._put = put


def spikes(numbers: list[int]) -> None:
    calls, real = [0], loop.Loop._put

    def put(self, batch):
        calls[0] += 1
        if calls[0] in numbers:
            wrong = (batch.arrays.targets + 137) % 256
            batch = batch._replace(arrays=batch.arrays._replace(targets=wrong.astype(np.int32)))
        return real(self, batch)

    loop.Loop._put = put


def main(words: Sequence[str]) -> int:
    if os.environ.get("FLOAT64"):
        in_float64()
    if os.environ.get("FAILING_SHARES"):
        failing_shares(int(os.environ["FAILING_SHARES"]))
    if os.environ.get("FAILS_ALONE"):
        fails_alone()
    if os.environ.get("SPIKES"):
        spikes([int(number) for number in os.environ["SPIKES"].split(",")])
    return train.main(words)
