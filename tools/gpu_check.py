"""Checks on a GPU what the tests check on a CPU: that each attention kernel keeps packed examples apart and learns.

    python tools/gpu_check.py [--model FOLDER --data FILE]

Prints a line per check and exits 1 if one fails. For every kernel that this GPU can run: its output and gradients
against the plain reference in float32 and bfloat16, a changed neighbour leaving an example bit-equal, and ten updates
of a small model whose loss falls as the reference's does. With --model and --data also a short LoRA run.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxtune import assembly
from jaxtune.batch import Batch
from jaxtune.config import TuningConfig
from jaxtune.decode import decode
from jaxtune.models.attention import resolve, xla
from jaxtune.step import Compute, initial_state, make_train_step
from jaxtune.train import train

B, T, N, K, H = 2, 512, 8, 4, 64
SEGMENTS = np.repeat(np.array([1, 2, 3, 0]), [200, 150, 100, 62])
POSITIONS = np.concatenate([np.arange(200), np.arange(150), np.arange(100), np.zeros(62, np.int64)])
SHAPE = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024,
}  # fmt: skip


def attend(kernel: Callable, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Runs a kernel on the packed rows."""
    segments, positions = (jnp.broadcast_to(jnp.asarray(x, jnp.int32), (B, T)) for x in (SEGMENTS, POSITIONS))
    return kernel(
        q, k, v, q_positions=positions, kv_positions=positions, q_segment_ids=segments, kv_segment_ids=segments,
        window=None, scale=H**-0.5,
    )  # fmt: skip


def check_kernel(kernel: Callable, dtype: jnp.dtype) -> tuple[float, bool]:
    """Returns (largest error of output and gradients over the reference's norm, neighbours leave no trace)."""
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (B, T, N, H), dtype)
    k, v = (jax.random.normal(key, (B, T, K, H), dtype) for key in keys[1:3])
    real = jnp.asarray(SEGMENTS > 0)[None, :, None, None]
    weight = jax.random.normal(keys[3], (B, T, N, H), dtype) * real

    def scalar(kernel: Callable) -> Callable:
        return lambda q, k, v: jnp.sum((attend(kernel, q, k, v) * weight).astype(jnp.float32))

    errors = []
    for found, expected in zip(
        (attend(kernel, q, k, v) * real, *jax.grad(scalar(kernel), argnums=(0, 1, 2))(q, k, v)),
        (attend(xla, q, k, v) * real, *jax.grad(scalar(xla), argnums=(0, 1, 2))(q, k, v)),
        strict=True,
    ):
        wide = [x.astype(jnp.float32) for x in (found, expected)]
        errors.append(float(jnp.linalg.norm(wide[0] - wide[1]) / jnp.linalg.norm(wide[1])))
    neighbour = jnp.asarray(SEGMENTS == 2)[None, :, None, None]
    changed = attend(kernel, *(jnp.where(neighbour, x + 1, x) for x in (q, k, v)))
    others = jnp.asarray((SEGMENTS == 1) | (SEGMENTS == 3))[None, :, None, None]
    return max(errors), bool(jnp.all(jnp.where(others, changed == attend(kernel, q, k, v), True)))


def ten_updates(kernel: Callable, dtype: jnp.dtype) -> tuple[float, float]:
    """Returns the first and last loss of ten updates on one packed batch."""
    plan = assembly.plan_model(SHAPE, TuningConfig(method="full"), param_dtype=jnp.float32, seed=0, where="check")
    optimizer = optax.adam(1e-2)
    state = initial_state(optimizer, plan.make()[0])
    tokens = np.random.default_rng(0).integers(1, 1024, (B, T + 1)).astype(np.int32)
    row = np.ones((B, 1), np.int32)
    batch = Batch(
        tokens[:, :-1],
        tokens[:, 1:],
        row * POSITIONS,
        row * SEGMENTS,
        (row * (SEGMENTS > 0)).astype(np.float32),
        0 * row,
    )
    step = jax.jit(make_train_step(plan.graph, optimizer, Compute(dtype, kernel, "none", 1, True)))
    losses = []
    for _ in range(10):
        state, metrics = step(state, nnx.State({}), batch)
        losses.append(float(metrics.loss))
    return losses[0], losses[-1]


def main() -> int:
    """Runs every check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    options = parser.parse_args()
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.device_kind}")
    if device.platform != "gpu":
        print("this machine has no GPU that jax can use; expected one (pip install 'jaxtune[cuda]')")
        return 1
    failed = False
    kernel, reason = resolve("auto", platform="gpu")
    print(reason)
    for name, candidate in {"xla": xla, "chosen": kernel}.items():
        for dtype, tolerance in ((jnp.float32, 1e-3), (jnp.bfloat16, 2e-2)):  # float32 products may be TF32 here
            error, isolated = check_kernel(candidate, dtype)
            first, last = ten_updates(candidate, dtype)
            good = error < tolerance and isolated and last < 0.7 * first
            failed |= not good
            print(
                f"{'ok  ' if good else 'FAIL'} {name} {jnp.dtype(dtype).name}: error {error:.1e} (< {tolerance:g}), "
                f"neighbours {'isolated' if isolated else 'LEAK'}, ten updates {first:.3f} -> {last:.3f}"
            )
    if options.model and options.data:
        with tempfile.TemporaryDirectory() as output:
            result = train(decode([
                f"model.path={options.model}", f"data.train.0.path={options.data}", f"output={output}",
                "train.steps=20", "data.max_length=512", "data.template=alpaca", "data.overlong=truncate_right",
            ]))  # fmt: skip
        print(f"ok   LoRA run of {result.step} steps, loss {result.loss:.3f}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
