"""Our logits are transformers' logits: every family and variant, far positions, padding and packing."""

import hf_folders
import models_helpers
import numpy as np
import pytest
import transformers
from hf_kinds import KINDS
from parity_helpers import FAR, TOLERANCE, T, tokens_of, tolerance_of, torch_logits


@pytest.fixture(scope="module", params=sorted(KINDS))
def pair(request, tmp_path_factory):
    path = hf_folders.tiny_folder(request.param, tmp_path_factory.mktemp(request.param))
    decoder, _ = models_helpers.load(path)
    return hf_folders.tiny_model(request.param), decoder, tolerance_of(request.param)


@pytest.mark.parametrize("attention", ["xla", "splash_interpreted"])
@pytest.mark.parametrize("start", [0, FAR])
def test_logits_equal_transformers(pair, attention, start):
    model, decoder, tolerance = pair
    tokens = tokens_of(2)
    positions = np.broadcast_to(np.arange(start, start + T), tokens.shape)
    ours = models_helpers.logits(decoder, tokens, positions, np.ones_like(tokens), attention=attention)
    theirs = torch_logits(model, tokens, positions)
    assert np.abs(theirs).max() > 1  # a test of zeros would pass anything
    np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("attention", ["xla", "splash_interpreted"])
def test_packed_and_padded_segments_equal_transformers_alone(pair, attention):
    """Rows: [pad pad | 9 tokens | 11 tokens from position 8500 | pad pad]; each segment as if it were alone."""
    model, decoder, tolerance = pair
    tokens = tokens_of(2)
    positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
    places = {1: slice(2, 11), 2: slice(11, 22)}
    for segment, place in places.items():
        positions[:, place] = np.arange(place.stop - place.start) + (FAR if segment == 2 else 0)
        segments[:, place] = segment
    ours = models_helpers.logits(decoder, tokens, positions, segments, attention=attention)
    for place in places.values():
        theirs = torch_logits(model, tokens[:, place], positions[:, place])
        np.testing.assert_allclose(ours[:, place], theirs, atol=tolerance, rtol=0)


def test_left_padding_equals_transformers_with_its_mask(pair):
    model, decoder, tolerance = pair
    tokens = tokens_of(2)
    mask = np.ones_like(tokens)
    mask[:, :5] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    ours = models_helpers.logits(decoder, tokens, positions, mask)
    theirs = torch_logits(model, tokens, positions, mask)
    np.testing.assert_allclose(ours[:, 5:], theirs[:, 5:], atol=tolerance, rtol=0)


@pytest.mark.parametrize("attention", ["xla", "splash_interpreted"])
def test_real_checkpoint_equals_transformers(shared, attention):
    path = shared / "models" / "stories260K"
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    decoder, _ = models_helpers.load(path)
    tokens = tokens_of(2, vocab=512, length=60)
    positions = np.broadcast_to(np.arange(60), tokens.shape)
    ours = models_helpers.logits(decoder, tokens, positions, np.ones_like(tokens), attention=attention)
    np.testing.assert_allclose(ours, torch_logits(model, tokens), atol=TOLERANCE, rtol=0)
