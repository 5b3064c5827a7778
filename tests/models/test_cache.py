"""Decoding through the cache gives what the full forward gives: greedy tokens, logits, windows, padding on any side."""

import hf_folders
import jax
import jax.numpy as jnp
import models_helpers
import numpy as np
import pytest
import torch
from flax import nnx

from jaxtune.models.attention import xla
from jaxtune.models.decoder import init_cache

NEW, PROMPTS = 16, [[5, 9, 13], [7, 7, 20, 31, 44, 58, 60]]


@pytest.fixture(scope="module", params=["llama32", "mistral", "qwen25"])
def loaded(request, tmp_path_factory):
    return request.param, models_helpers.load(
        hf_folders.tiny_folder(request.param, tmp_path_factory.mktemp("model"), tie_word_embeddings=False)
    )


def padded(side):
    """Two prompts of 3 and 7 tokens as `[2 7]`, with positions from 0 and segment 0 on padding."""
    width = max(map(len, PROMPTS))
    tokens, positions, segments = (np.zeros((2, width), np.int32) for _ in range(3))
    for row, prompt in enumerate(PROMPTS):
        place = slice(0, len(prompt)) if side == "right" else slice(width - len(prompt), width)
        tokens[row, place], positions[row, place], segments[row, place] = prompt, np.arange(len(prompt)), 1
    return tokens, positions, segments


def greedy_with_cache(decoder, config, side):
    """Prefill, then one token at a time; returns tokens `[2 NEW]` and the logits they were chosen from."""
    tokens, positions, segments = padded(side)
    graph, state = nnx.split(decoder)

    @jax.jit
    def forward(state, cache, *arrays):
        model = nnx.merge(graph, state)
        hidden, cache, _ = model(*arrays, compute_dtype=jnp.float32, attention=xla, cache=cache)
        return model.logits(hidden), cache

    cache = init_cache(config, batch=2, capacity=tokens.shape[1] + NEW, dtype=jnp.float32)
    logits, cache = forward(state, cache, tokens, positions, segments)
    last = [len(prompt) - 1 if side == "right" else tokens.shape[1] - 1 for prompt in PROMPTS]
    logits, chosen, seen = logits[np.arange(2), last], [], []
    for step in range(NEW):
        seen.append(np.asarray(logits))
        chosen.append(np.asarray(logits.argmax(-1), np.int32))
        at = np.array([[len(prompt) + step] for prompt in PROMPTS], np.int32)
        logits, cache = forward(state, cache, chosen[-1][:, None], at, np.ones((2, 1), np.int32))
        logits = logits[:, 0]
    return np.stack(chosen, 1), np.stack(seen, 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_decoding_equals_the_full_forward(loaded, side):
    kind, (decoder, config) = loaded
    tokens, logits = greedy_with_cache(decoder, config, side)
    model = hf_folders.tiny_model(kind, tie_word_embeddings=False)
    for row, prompt in enumerate(PROMPTS):
        whole = np.array([prompt + tokens[row].tolist()])
        positions = np.arange(whole.shape[1])[None]
        full = models_helpers.logits(decoder, whole, positions, np.ones_like(whole))[0, len(prompt) - 1 : -1]
        np.testing.assert_allclose(logits[row], full, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(tokens[row], full.argmax(-1))
        with torch.no_grad():
            theirs = model(torch.tensor(whole)).logits.numpy()[0, len(prompt) - 1 : -1]
        np.testing.assert_allclose(logits[row], theirs, atol=1e-4, rtol=0)


def test_bfloat16_cache_holds_what_the_layer_reads(loaded):
    _, (decoder, config) = loaded
    cache = init_cache(config, batch=1, capacity=4, dtype=jnp.bfloat16)
    row = jnp.ones((1, 3), jnp.int32)
    _, cache, _ = decoder(row, jnp.arange(3)[None], row, compute_dtype=jnp.bfloat16, attention=xla, cache=cache)
    assert {array.dtype for array in (*cache.keys, *cache.values)} == {jnp.dtype(jnp.bfloat16)}
    assert int(cache.length) == 3
    np.testing.assert_array_equal(cache.segment_ids, [[1, 1, 1, 0]])
    assert sum(array.shape[0] for array in cache.keys) == config.num_layers
    assert all(np.any(np.asarray(array[:, :, :3]) != 0) for array in cache.keys)
    assert not any(np.any(np.asarray(array[:, :, 3:]) != 0) for array in cache.keys)
