"""Our logits are transformers' logits: every family and variant, far positions, padding and packing."""

import dataclasses

import hf_folders
import models_helpers
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

TOLERANCE = 1e-4
T = 24
FAR = 8500  # beyond the 8,192 positions of Llama 3's first training


def torch_logits(model, tokens, positions=None, mask=None) -> np.ndarray:
    inputs = {"input_ids": torch.tensor(np.asarray(tokens))}
    if positions is not None:
        inputs["position_ids"] = torch.tensor(np.asarray(positions))
    if mask is not None:
        inputs["attention_mask"] = torch.tensor(np.asarray(mask))
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def tokens_of(rows: int, vocab: int = 97, length: int = T) -> np.ndarray:
    return np.random.default_rng(0).integers(3, vocab, (rows, length))


@pytest.fixture(scope="module", params=sorted(hf_folders.KINDS))
def pair(request, tmp_path_factory):
    path = hf_folders.tiny_folder(request.param, tmp_path_factory.mktemp(request.param))
    decoder, _ = models_helpers.load(path)
    return hf_folders.tiny_model(request.param), decoder


@pytest.mark.parametrize("attention", ["xla", "splash_interpreted"])
@pytest.mark.parametrize("start", [0, FAR])
def test_logits_equal_transformers(pair, attention, start):
    model, decoder = pair
    tokens = tokens_of(2)
    positions = np.broadcast_to(np.arange(start, start + T), tokens.shape)
    ours = models_helpers.logits(decoder, tokens, positions, np.ones_like(tokens), attention=attention)
    theirs = torch_logits(model, tokens, positions)
    assert np.abs(theirs).max() > 1  # a test of zeros would pass anything
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("attention", ["xla", "splash_interpreted"])
def test_packed_and_padded_segments_equal_transformers_alone(pair, attention):
    """Row: [pad pad | 9 tokens | 11 tokens from position 8500 | pad pad]; each segment as if it were alone."""
    model, decoder = pair
    tokens = tokens_of(1)
    positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
    places = {1: slice(2, 11), 2: slice(11, 22)}
    for segment, place in places.items():
        positions[0, place] = np.arange(place.stop - place.start) + (FAR if segment == 2 else 0)
        segments[0, place] = segment
    ours = models_helpers.logits(decoder, tokens, positions, segments, attention=attention)
    for place in places.values():
        theirs = torch_logits(model, tokens[:, place], positions[:, place])
        np.testing.assert_allclose(ours[:, place], theirs, atol=TOLERANCE, rtol=0)


def test_left_padding_equals_transformers_with_its_mask(pair):
    model, decoder = pair
    tokens = tokens_of(1)
    mask = np.ones_like(tokens)
    mask[:, :5] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    ours = models_helpers.logits(decoder, tokens, positions, mask)
    theirs = torch_logits(model, tokens, positions, mask)
    np.testing.assert_allclose(ours[:, 5:], theirs[:, 5:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("attention", ["xla", "splash_interpreted"])
def test_real_checkpoint_equals_transformers(shared, attention):
    path = shared / "models" / "stories260K"
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    decoder, _ = models_helpers.load(path)
    tokens = tokens_of(2, vocab=512, length=60)
    positions = np.broadcast_to(np.arange(60), tokens.shape)
    ours = models_helpers.logits(decoder, tokens, positions, np.ones_like(tokens), attention=attention)
    np.testing.assert_allclose(ours, torch_logits(model, tokens), atol=TOLERANCE, rtol=0)


def _rope(**changes):
    def change(config):
        def in_kind(kind):
            return dataclasses.replace(kind, rope=dataclasses.replace(kind.rope, **changes))

        return _kinds(config, in_kind)

    return change


def _kinds(config, change):
    groups = tuple(
        dataclasses.replace(group, pattern=tuple(change(kind) for kind in group.pattern)) for group in config.groups
    )
    return dataclasses.replace(config, groups=groups)


def _no_window(config):
    return _kinds(config, lambda kind: dataclasses.replace(kind, window=None))


def _wider_window(config):
    return _kinds(config, lambda kind: dataclasses.replace(kind, window=kind.window and kind.window + 1))


def _set(**changes):
    return lambda config: dataclasses.replace(config, **changes)


CONFIG_MUTATIONS = {
    "rope base": ("llama2", _rope(theta=9000.0)),
    "rope base of qwen2": ("qwen2", _rope(theta=10000.0)),
    "llama3 scaling": ("llama31", _rope(kind="default")),
    "llama3 scaling, tied": ("llama32", _rope(kind="default")),
    "llama3 factor": ("llama31", _rope(factor=4.0)),
    "llama3 low_freq_factor": ("llama31", _rope(low_freq_factor=2.0)),
    "llama3 high_freq_factor": ("llama31", _rope(high_freq_factor=2.0)),
    "llama3 original positions": ("llama31", _rope(original_positions=128)),
    "linear scaling": ("llama_linear", _rope(kind="default")),
    "linear factor": ("llama_linear", _rope(factor=2.0)),
    "window": ("mistral", _no_window),
    "window off by one": ("mistral", _wider_window),
    "window of late layers": ("qwen25", _no_window),
    "window off by one in late layers": ("qwen25", _wider_window),
    "norm eps": ("llama2", _set(norm_eps=1e-2)),
    "activation": ("llama2", _set(activation="gelu")),
}


@pytest.mark.parametrize("name", sorted(CONFIG_MUTATIONS))
def test_a_changed_config_is_seen(name, tmp_path):
    kind, change = CONFIG_MUTATIONS[name]
    decoder, config = models_helpers.load(hf_folders.tiny_folder(kind, tmp_path))
    graph, _ = nnx.split(models_helpers.abstract_decoder(change(config)))
    _assert_seen(kind, nnx.merge(graph, nnx.state(decoder)))


TENSOR_MUTATIONS = [
    (kind, part)
    for kind, parts in {
        "llama_biases": "q_proj/bias k_proj/bias v_proj/bias o_proj/bias gate_proj/bias up_proj/bias down_proj/bias",
        "qwen2": "q_proj/bias k_proj/bias v_proj/bias",
        "llama31": "attention_norm/weight mlp_norm/weight norm/weight q_proj/kernel o_proj/kernel lm_head/kernel",
        "llama32": "embed/embedding",
    }.items()
    for part in parts.split()
]


@pytest.mark.parametrize(("kind", "part"), TENSOR_MUTATIONS)
def test_a_removed_tensor_is_seen(kind, part, tmp_path):
    """A bias set to 0 or a norm to 1, in all layers: what a forgotten tensor would look like."""
    decoder, _ = models_helpers.load(hf_folders.tiny_folder(kind, tmp_path))
    state = nnx.state(decoder)
    found = 0
    for path, variable in nnx.to_flat_state(state):
        if "/".join(map(str, path)).endswith(part) and not (part == "norm/weight" and path[0] != "norm"):
            variable.set_value(variable.get_value() * 0 + (1 if "norm" in part else 0))
            found += 1
    assert found
    _assert_seen(kind, nnx.merge(nnx.graphdef(decoder), state))


def test_kv_heads_in_another_order_are_seen(tmp_path):
    """Query head n belongs to kv head n // G, not n % K."""
    decoder, config = models_helpers.load(hf_folders.tiny_folder("llama31", tmp_path))
    for layers in (decoder.groups[0][0],):
        kernel = layers.attention.q_proj.kernel
        heads = kernel[...].reshape(3, config.width, config.num_kv_heads, -1, config.head_dim)
        kernel.set_value(heads.swapaxes(2, 3).reshape(kernel.shape))
    _assert_seen("llama31", decoder)


def _assert_seen(kind, decoder):
    tokens = tokens_of(2)
    positions = np.broadcast_to(np.arange(FAR, FAR + T), tokens.shape)
    ours = models_helpers.logits(decoder, tokens, positions, np.ones_like(tokens))
    theirs = torch_logits(hf_folders.tiny_model(kind), tokens, positions)
    assert np.abs(ours - theirs).max() > 10 * TOLERANCE
