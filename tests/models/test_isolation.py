"""Packed examples do not see one another: logits and gradients as alone; a changed neighbour changes no bit."""

import hf_folders
import jax
import jax.numpy as jnp
import models_helpers
import numpy as np
import pytest
from flax import nnx

from jaxtune.models.attention import ATTENTIONS

KERNELS = ["xla", "splash_interpreted"]
# One row: [pad | a x 9 | b x 13 | pad pad], positions from 0 in each segment.
A, B, T = slice(1, 10), slice(10, 23), 25


@pytest.fixture(scope="module", params=["llama31", "qwen25"])
def decoder(request, tmp_path_factory):
    return models_helpers.load(hf_folders.tiny_folder(request.param, tmp_path_factory.mktemp("model")))[0]


def packed_row():
    tokens = np.random.default_rng(5).integers(3, 97, (1, T))
    positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
    for segment, place in enumerate((A, B), start=1):
        positions[0, place] = np.arange(place.stop - place.start)
        segments[0, place] = segment
    return tokens, positions, segments


def gradients(decoder, tokens, positions, segments, weights, attention):
    """Gradient of a weighted sum over the given positions, by every parameter, and the logits there."""
    graph, state = nnx.split(decoder)

    @jax.jit
    def of(state, tokens, positions, segments, weights):
        def loss(state):
            model = nnx.merge(graph, state)
            hidden = model(
                tokens, positions, segments, compute_dtype=jnp.float32, attention=ATTENTIONS[attention], remat="minimal"
            ).hidden
            logits = jax.nn.log_softmax(model.logits(hidden))
            picked = jnp.take_along_axis(logits, (tokens * 7 % 97)[..., None], -1)[..., 0]
            return jnp.sum(picked * weights), logits

        return jax.grad(loss, has_aux=True)(state)

    arrays = [jnp.asarray(x, jnp.int32) for x in (tokens, positions, segments)]
    gradient, logits = of(state, *arrays, jnp.asarray(weights, jnp.float32))
    return {path: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(gradient)}, np.asarray(logits)


@pytest.mark.parametrize("attention", KERNELS)
def test_packed_equals_alone(decoder, attention):
    tokens, positions, segments = packed_row()
    weights = np.zeros(tokens.shape)
    weights[0, B] = 1
    packed, packed_logits = gradients(decoder, tokens, positions, segments, weights, attention)
    alone_row = (x[:, B] for x in (tokens, positions, segments, weights))
    alone, alone_logits = gradients(decoder, *alone_row, attention)
    np.testing.assert_allclose(packed_logits[:, B], alone_logits, atol=1e-5, rtol=0)
    for path, gradient in alone.items():
        difference = np.linalg.norm(packed[path] - gradient) / max(np.linalg.norm(gradient), 1e-30)
        assert difference < 1e-5, (path, difference)


@pytest.mark.parametrize("attention", KERNELS)
def test_changed_neighbour_changes_no_bit(decoder, attention):
    tokens, positions, segments = packed_row()
    weights = np.zeros(tokens.shape)
    weights[0, B] = 1
    changed = tokens.copy()
    outside = np.ones(T, bool)
    outside[B] = False
    changed[0, outside] = (changed[0, outside] * 31 + 5) % 97
    before, before_logits = gradients(decoder, tokens, positions, segments, weights, attention)
    after, after_logits = gradients(decoder, changed, positions, segments, weights, attention)
    np.testing.assert_array_equal(before_logits[:, B], after_logits[:, B])
    assert np.any(before_logits[:, A] != after_logits[:, A])
    for path, gradient in before.items():
        np.testing.assert_array_equal(gradient, after[path], err_msg=str(path))


@pytest.mark.parametrize("attention", KERNELS)
def test_without_segments_the_neighbour_is_seen(decoder, attention):
    """The test above can fail: with one segment for all, the same change moves the logits."""
    tokens, _, _ = packed_row()
    positions, one = np.arange(T)[None], np.ones_like(tokens)
    changed = tokens.copy()
    changed[0, A] = (changed[0, A] * 31 + 5) % 97
    before = models_helpers.logits(decoder, tokens, positions, one, attention=attention)
    after = models_helpers.logits(decoder, changed, positions, one, attention=attention)
    assert np.abs(before[:, B] - after[:, B]).max() > 1e-3


@pytest.mark.parametrize(
    "remat",
    ["minimal", "offload", *(pytest.param(remat, marks=pytest.mark.long) for remat in ("dots", "mid", "full"))],
)
def test_remat_changes_no_gradient(decoder, remat):
    tokens, positions, segments = packed_row()
    graph, state = nnx.split(decoder)

    def gradient(policy):
        @jax.jit
        @jax.grad
        def of(state):
            model = nnx.merge(graph, state)
            arrays = [jnp.asarray(x, jnp.int32) for x in (tokens, positions, segments)]
            hidden = model(*arrays, compute_dtype=jnp.float32, attention=ATTENTIONS["xla"], remat=policy).hidden
            return jnp.sum(hidden[:, 1:23] ** 3)

        return of(state)

    for ours, plain in zip(jax.tree.leaves(gradient(remat)), jax.tree.leaves(gradient("none")), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5 * np.abs(plain).max())
