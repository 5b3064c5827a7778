"""Every kernel is the reference: windows, segments, groups, odd lengths, gradients, and over a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.models import attention
from jaxtune.sharding import make_mesh

B, N, K, H = 4, 4, 2, 16


def inputs(length, *, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (B, length, N, H), dtype)
    k, v = (jax.random.normal(key, (B, length, K, H), dtype) for key in keys[1:3])
    cuts = jax.random.randint(keys[3], (B, 3), 1, length - 1).sort(axis=1)
    index = jnp.arange(length)
    segments = (index[None] >= cuts[:, :1]).astype(jnp.int32) + (index[None] >= cuts[:, 1:2])
    segments = jnp.where(index[None] < cuts[:, 2:], segments + 1, 0)  # 1, 2, 3 and then padding
    starts = jnp.where(jnp.pad(segments[:, 1:] != segments[:, :-1], [(0, 0), (1, 0)]), index, 0)
    positions = index - jax.lax.cummax(starts, axis=1)
    return (q, k, v), segments, positions


def attend(kernel, arrays, segments, positions, window):
    out = kernel(
        *arrays,
        q_positions=positions,
        kv_positions=positions,
        q_segment_ids=segments,
        kv_segment_ids=segments,
        window=window,
        scale=H**-0.5,
    )
    return jnp.where((segments > 0)[:, :, None, None], out, 0)


def by_loops(arrays, segments, positions, window):
    """The definition, one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in arrays)
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        if segments[b, t] == 0:
            continue
        seen = [
            s
            for s in range(k.shape[1])
            if segments[b, s] == segments[b, t]
            and positions[b, s] <= positions[b, t]
            and (window is None or positions[b, t] - positions[b, s] < window)
        ]
        head = n // (N // K)
        scores = k[b, seen, head] @ q[b, t, n] * H**-0.5
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, head]
    return out


@pytest.mark.parametrize("window", [None, 1, 5])
def test_reference_is_the_definition(window):
    arrays, segments, positions = inputs(20)
    expected = by_loops(arrays, np.asarray(segments), np.asarray(positions), window)
    np.testing.assert_allclose(attend(attention.xla, arrays, segments, positions, window), expected, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 5, 200])
@pytest.mark.parametrize("length", [20, 128, 300])
def test_splash_is_the_reference_forward_and_backward(length, window):
    arrays, segments, positions = inputs(length)

    def run(kernel):
        def loss(arrays):
            out = attend(kernel, arrays, segments, positions, window)
            return jnp.sum(out * jnp.sin(jnp.arange(out.size).reshape(out.shape))), out

        return jax.jit(jax.grad(loss, has_aux=True))(arrays)

    (gradients, out), (expected_gradients, expected) = run(attention.splash_interpreted), run(attention.xla)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_splash_over_a_mesh_is_the_reference(sizes):
    arrays, segments, positions = inputs(128)
    arrays, segments, positions = jax.tree.map(lambda x: jnp.concatenate([x, x]), (arrays, segments, positions))
    run = functools.partial(attend, window=7)
    expected = run(attention.xla, arrays, segments, positions)
    with jax.set_mesh(make_mesh(sizes)):
        out = jax.jit(functools.partial(run, attention.splash_interpreted))(arrays, segments, positions)
    np.testing.assert_allclose(out, expected, atol=1e-5)


SPLIT = [{"context": 8}, {"context": 4, "tensor": 2}, {"fsdp": 4, "context": 2}]
SPLIT_AT_ONCE = [("xla", 40, 0), ("xla", 40, 1), ("xla", 40, 2), ("splash_interpreted", 1000, 1)]
SPLIT_LATER = [
    ("splash_interpreted", length, n) for length in (1000, 1024) for n in range(3) if (length, n) != (1000, 1)
]


@pytest.mark.parametrize(
    ("kernel", "length", "sizes"),
    [(kernel, length, SPLIT[n]) for kernel, length, n in SPLIT_AT_ONCE]
    + [pytest.param(kernel, length, SPLIT[n], marks=pytest.mark.long) for kernel, length, n in SPLIT_LATER],
    ids=str,
)
def test_queries_split_over_devices_see_what_one_device_sees(sizes, kernel, length):
    """Segments cross the devices' borders; a window, a soft-cap and sinks are at work, and gradients come back."""
    arrays, segments, positions = inputs(length)
    sinks = jnp.linspace(-1.0, 1.0, N)
    slope = jax.random.normal(jax.random.key(9), arrays[0].shape)

    def run(kernel, window, arrays, sinks):
        def loss(arrays, sinks):
            attend_with = functools.partial(kernel, softcap=3.0, sinks=sinks)
            out = attend(attend_with, arrays, segments, positions, window)
            return jnp.sum(out * slope), out

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(arrays, sinks)

    for window in (None, 70):
        expected = run(attention.xla, window, arrays, sinks)
        with jax.set_mesh(make_mesh(sizes)):
            found = run(attention.ATTENTIONS[kernel], window, arrays, sinks)
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_rows_too_long_for_partial_sums_have_a_kernel_each_way(monkeypatch):
    monkeypatch.setattr(attention, "MOST_PARTIAL_SUMS", 0)
    test_splash_is_the_reference_forward_and_backward(300, 5)


@pytest.mark.parametrize("window", [None, 1, 100, 128, 300])
def test_what_is_known_of_whole_blocks_is_what_the_mask_says(window):
    length = 640
    mask = attention._BandMask((length, length), (None if window is None else window - 1, 0), 0)
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    expected = (distance >= 0) & (distance < (window or length))
    for q in range(0, length, 128):
        for kv in range(0, length, 64):
            at = (slice(q, q + 128), slice(kv, kv + 64))
            np.testing.assert_array_equal(np.broadcast_to(mask[at], (128, 64)), expected[at])


def test_float64_stays_float64():
    with jax.enable_x64(True):
        arrays, segments, positions = inputs(20, dtype=jnp.float64)
        out = attend(attention.xla, arrays, segments, positions, 5)
        assert out.dtype == jnp.float64
        expected = by_loops(arrays, np.asarray(segments), np.asarray(positions), 5)
        np.testing.assert_allclose(out, expected, atol=1e-12)


def test_splash_needs_equal_lengths():
    arrays, segments, positions = inputs(20)
    q, k, v = arrays
    with pytest.raises(ValueError, match="20 queries and 10 keys"):
        attend(attention.splash_interpreted, (q, k[:, :10], v[:, :10]), segments, positions, None)


def test_table_of_platforms():
    assert attention.resolve("auto", platform="tpu")[0] is attention.splash
    assert attention.resolve("auto", platform="cpu")[0] is attention.xla
    kernel, why = attention.resolve("auto", platform="gpu")
    assert kernel is attention.xla and "tokamax" in why  # not installed here: named as the reason
    assert attention.resolve("splash", platform="cpu")[0] is attention.splash_interpreted
    assert attention.resolve("xla", platform="tpu")[0] is attention.xla


@pytest.mark.parametrize(
    ("name", "platform", "part"),
    [
        ("cudnn", "gpu", "no segments"),
        ("falsh", "cpu", "expected auto or one of xla, splash"),
        ("splash", "gpu", "runs on tpu"),
        ("tokamax", "gpu", "cannot be imported"),
    ],
)
def test_kernel_that_cannot_serve_is_refused(name, platform, part):
    with pytest.raises(ValueError, match=part):
        attention.resolve(name, platform=platform)
