"""Our T5 line is transformers': logits, loss, gradients, greedy answers; padded, packed, far apart."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import t5_folders
import torch
from flax import nnx
from transformers.models.t5.modeling_t5 import T5Attention

from jaxtune.batch import PairBatch
from jaxtune.convert import hf
from jaxtune.convert.folder import open_folder
from jaxtune.data.packing import Pair, lay_out_pairs
from jaxtune.models import t5
from jaxtune.models.registry import family_of
from jaxtune.models.t5_layers import plain, relative_buckets
from jaxtune.step import Compute, initial_state, make_eval_step, make_train_step

TOLERANCE = 1e-4
S, T = 40, 30  # both past the 12 positions from which all distances are alike


@pytest.fixture(scope="module", params=sorted(t5_folders.KINDS))
def opened(request, tmp_path_factory):
    """(transformers' model, ours, the folder) of each kind."""
    path = t5_folders.tiny_folder(request.param, tmp_path_factory.mktemp(request.param))
    ours, _ = t5_folders.load(path)
    return t5_folders.tiny_model(request.param), ours, path


@pytest.fixture
def one_kind(tmp_path):
    """(transformers' model, ours) of T5 1.1, for mistakes that no kind would hide."""
    return t5_folders.tiny_model("t5_1_1"), t5_folders.load(t5_folders.tiny_folder("t5_1_1", tmp_path))[0]


def tokens_of(rows: int, length: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 97, (rows, length))


def questions_and_answers(rows: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Encoder tokens `[rows S]` and decoder tokens `[rows T]` with the start token in front."""
    decoder = tokens_of(rows, T, seed=1)
    decoder[:, 0] = 0
    return tokens_of(rows, S), decoder


# ---- logits ----


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 12), (16, 20), (32, 100)])
def test_buckets_are_those_of_transformers_at_every_distance(bidirectional, buckets, max_distance):
    positions = np.arange(3 * max_distance)
    theirs = T5Attention._relative_position_bucket(
        torch.tensor(positions[None, :] - positions[:, None]), bidirectional, buckets, max_distance
    )
    options = {"buckets": buckets, "max_distance": max_distance, "bidirectional": bidirectional}
    ours = relative_buckets(jnp.asarray(positions[None]), jnp.asarray(positions[None]), **options)[0]
    np.testing.assert_array_equal(ours, theirs)


def test_logits_equal_transformers(opened):
    model, ours, _ = opened
    encoder, decoder = questions_and_answers()
    found = t5_folders.logits(ours, *t5_folders.whole(encoder), *t5_folders.whole(decoder))
    theirs = t5_folders.torch_logits(model, encoder, decoder)
    assert np.abs(theirs).max() > 0.5  # a test of zeros would pass anything
    np.testing.assert_allclose(found, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_question_equals_transformers_with_its_mask(opened, side):
    model, ours, _ = opened
    encoder, decoder = questions_and_answers()
    mask = np.ones_like(encoder)
    mask[0, slice(0, 9) if side == "left" else slice(S - 9, S)] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    found = t5_folders.logits(ours, encoder, positions, mask, *t5_folders.whole(decoder))
    theirs = t5_folders.torch_logits(model, encoder, decoder, mask)
    np.testing.assert_allclose(found, theirs, atol=TOLERANCE, rtol=0)


def pairs(count: int = 3) -> list[Pair]:
    """Pairs of many lengths, weights that are no mask."""
    rng = np.random.default_rng(3)
    lengths = [(15, 17), (16, 5), (7, 6), (4, 20), (22, 3)][:count]
    return [
        Pair(
            rng.integers(3, 97, m).astype(np.int32),
            rng.integers(3, 97, n).astype(np.int32),
            rng.choice([0.0, 0.5, 1.0, 2.0], n).astype(np.float32),
        )
        for m, n in lengths
    ]


def packed(*rows: list[Pair]) -> PairBatch:
    return lay_out_pairs([[(pair, 0) for pair in row] for row in rows], S, T, start_token=0)


def test_packed_pairs_equal_transformers_on_each_alone(opened):
    model, ours, _ = opened
    batch = packed(pairs())
    found = t5_folders.logits(ours, *batch.inputs)
    for segment, pair in enumerate(pairs(), 1):
        decoder = np.concatenate([[0], pair.targets[:-1]])[None]
        theirs = t5_folders.torch_logits(model, pair.encoder_tokens[None], decoder)
        np.testing.assert_allclose(found[batch.segment_ids == segment], theirs[0], atol=TOLERANCE, rtol=0)


# ---- loss and gradient ----


def torch_loss(model, all_pairs: list[Pair]):
    """The weighted mean of all pairs' tokens, each pair by itself."""
    total, weight = 0.0, 0.0
    for pair in all_pairs:
        decoder = torch.tensor(np.concatenate([[0], pair.targets[:-1]])[None].astype(np.int64))
        out = model(input_ids=torch.tensor(pair.encoder_tokens[None].astype(np.int64)), decoder_input_ids=decoder)
        nll = -torch.log_softmax(out.logits[0], -1)[range(len(pair.targets)), pair.targets]
        total, weight = total + (nll * torch.tensor(pair.weights)).sum(), weight + float(pair.weights.sum())
    return total / weight


def test_loss_and_every_gradient_equal_transformers(opened):
    _assert_gradients(*opened, remat="none")


@pytest.mark.parametrize("remat", ["minimal", pytest.param("full", marks=pytest.mark.long)])
def test_what_is_computed_again_changes_no_gradient(remat, tmp_path):
    path = t5_folders.tiny_folder("t5_1_1", tmp_path)
    _assert_gradients(t5_folders.tiny_model("t5_1_1"), t5_folders.load(path)[0], path, remat=remat)


def _assert_gradients(model, ours, path, *, remat):
    model.zero_grad()
    loss = torch_loss(model, pairs(5))
    loss.backward()
    gradients = {name: tensor.grad.numpy() for name, tensor in model.named_parameters()}
    graph, state = nnx.split(ours)
    descent = optax.sgd(1.0)  # the update is the gradient
    step = jax.jit(make_train_step(graph, descent, Compute(jnp.float32, plain, remat, 2, True)))
    batch = packed(pairs(5)[:3], pairs(5)[3:])
    after, metrics = step(initial_state(descent, state), nnx.State({}), batch)
    assert float(metrics.loss) == pytest.approx(loss.item(), rel=1e-5)
    assert int(metrics.tokens) == sum(sum(pair.lengths) for pair in pairs(5))
    config = open_folder(path).config
    family = family_of(config, where="test")
    before, moved = (hf.leaves_of(tree) for tree in (state, after.trainable))
    checked = set()
    for name, place in hf.name_table(family, family.read_config(config)).items():
        if place.optional or name not in gradients:
            continue
        ours_here = np.asarray(before[place.path]) - np.asarray(moved[place.path])
        ours_here = ours_here if place.index == () else ours_here[place.index]
        theirs = gradients[name].T if place.transpose else gradients[name]
        own = tuple(slice(size) for size in theirs.shape)  # the vocabulary is held with padding behind it
        assert np.count_nonzero(ours_here) == np.count_nonzero(ours_here[own])
        ours_here = ours_here[own]
        norm = np.linalg.norm(theirs)
        assert norm > 0, f"{name} has no gradient: the test would be blind to it"
        assert np.linalg.norm(ours_here - theirs) <= 1e-3 * norm, name
        checked.add(name)
    assert checked == set(gradients)


def test_evaluation_gives_the_loss_of_training(one_kind):
    model, ours = one_kind
    graph, state = nnx.split(ours)
    evaluate = jax.jit(make_eval_step(graph, Compute(jnp.float32, plain, "none", 2, False)))
    sums = evaluate(state, nnx.State({}), packed(pairs(5)[:3], pairs(5)[3:]))
    with torch.no_grad():
        assert float(sums.loss / sums.weight) == pytest.approx(torch_loss(model, pairs(5)).item(), rel=1e-5)


@pytest.mark.long
def test_bfloat16_is_as_close_to_float32_as_that_of_transformers(one_kind):
    """Weights and activations rounded to 8 bits; scores and norms' statistics in float32."""
    model, ours = one_kind
    graph, state = nnx.split(ours)
    rounded = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    encoder, decoder = questions_and_answers(8)
    arrays = [jnp.asarray(x) for x in (*t5_folders.whole(encoder), *t5_folders.whole(decoder))]
    exact = t5_folders.torch_logits(model, encoder, decoder)
    hidden = rounded(*arrays, compute_dtype=jnp.bfloat16, attention=plain, remat="minimal").hidden
    assert hidden.dtype == jnp.bfloat16
    found = np.asarray(rounded.logits(hidden))
    theirs = t5_folders.torch_logits(model.to(torch.bfloat16), encoder, decoder)
    assert 0 < np.linalg.norm(found - exact) < 1.05 * np.linalg.norm(theirs - exact)


# ---- greedy answers ----


def greedy(ours, encoder: np.ndarray, count: int) -> np.ndarray:
    """Tokens `[B count]` chosen one at a time through the cache."""
    graph, state = nnx.split(ours)
    options = {"compute_dtype": jnp.float32, "attention": plain}
    cache = ours.read(*map(jnp.asarray, t5_folders.whole(encoder)), capacity=count, **options)

    @jax.jit
    def advance(state, cache, tokens, position):
        model = nnx.merge(graph, state)
        ones = jnp.ones_like(tokens)
        out = model.answer(tokens, position * ones, ones, cache=cache, **options)
        return model.logits(out.hidden)[:, -1].argmax(-1), out.cache

    chosen = [np.zeros(len(encoder), np.int32)]
    for position in range(count):
        token, cache = advance(state, cache, jnp.asarray(chosen[-1])[:, None], position)
        chosen.append(np.asarray(token, np.int32))
    return np.stack(chosen[1:], axis=1)


def test_64_greedy_tokens_equal_transformers(opened):
    """Until the two likeliest tokens are closer than 1e-4, where rounding decides."""
    model, ours, _ = opened
    encoder, _ = questions_and_answers(1)
    given = {"min_new_tokens": 64, "max_new_tokens": 64, "do_sample": False, "output_logits": True}
    theirs = model.generate(
        torch.tensor(encoder), return_dict_in_generate=True, eos_token_id=None, decoder_start_token_id=0, **given
    )
    found = greedy(ours, encoder, 64)[0]
    for number, (token, logits) in enumerate(zip(theirs.sequences[0, 1:].tolist(), theirs.logits, strict=True)):
        best = torch.topk(logits[0], 2).values
        if float(best[0] - best[1]) < 1e-4:
            assert number > 8
            break
        assert found[number] == token, number


# ---- what a mistake would look like ----


def _set(**changes):
    return lambda config: dataclasses.replace(config, **changes)


CONFIG_MUTATIONS = {
    "number of buckets": ("t5_1_1", _set(buckets=4)),
    "largest distance": ("t5_1_1", _set(max_distance=13)),
    "largest distance of umt5": ("umt5", _set(max_distance=13)),
    "head scale of a tied head": ("t5_1_0", _set(head_scale=1.0)),
    "head scale of an untied head": ("t5_1_1", _set(head_scale=32**-0.5)),
    "relu": ("t5_1_0", _set(activation="gelu_tanh")),
    "exact gelu": ("t5_1_1", _set(activation="gelu")),
    "silu": ("ul2", _set(activation="gelu_tanh")),
    "norm eps": ("mt5", _set(norm_eps=1e-2)),
}


@pytest.mark.parametrize("name", sorted(CONFIG_MUTATIONS))
def test_a_changed_config_is_seen(name, tmp_path):
    kind, change = CONFIG_MUTATIONS[name]
    ours, config = t5_folders.load(t5_folders.tiny_folder(kind, tmp_path))
    graph, _ = nnx.split(t5_folders.abstract_model(change(config)))
    _assert_seen(kind, nnx.merge(graph, nnx.state(ours)))


def _anew(*arrays, **options):
    """The reference as another function, so that what was compiled before a mistake was made is not used again."""
    return plain(*arrays, **options)


def _scaled(q, k, v, **options):
    return plain(q * q.shape[-1] ** -0.5, k, v, **options)


def _unbiased(q, k, v, **options):
    return plain(q, k, v, **{**options, "bias": None})


def _sees_what_comes(q, k, v, **options):
    return plain(q, k, v, **{**options, "visible": jnp.ones_like(options["visible"])})


@pytest.mark.parametrize("attention", [_scaled, _unbiased, _sees_what_comes], ids=["scaled", "no bias", "not causal"])
def test_another_attention_is_seen(one_kind, attention):
    _assert_models_differ(*one_kind, attention=attention)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_of_the_wrong_side_are_seen(one_kind, monkeypatch, bidirectional):
    """Both stacks with the buckets of the encoder, or of the decoder."""

    def wrong(*positions, **options):
        return relative_buckets(*positions, **{**options, "bidirectional": bidirectional})

    monkeypatch.setattr(t5, "relative_buckets", wrong)
    _assert_models_differ(*one_kind, attention=partial(_anew))


def test_packed_pairs_that_see_one_another_are_seen(one_kind, monkeypatch):
    model, ours = one_kind
    batch = packed(pairs())
    monkeypatch.setattr(t5, "same_segment", lambda q, kv: jnp.ones((*q.shape, kv.shape[1]), bool))
    found = t5_folders.logits(ours, *batch.inputs, attention=_anew)
    first = pairs()[0]
    theirs = t5_folders.torch_logits(model, first.encoder_tokens[None], np.concatenate([[0], first.targets[:-1]])[None])
    assert np.abs(found[batch.segment_ids == 1] - theirs[0]).max() > 10 * TOLERANCE


@pytest.mark.parametrize(
    "part",
    [
        "encoder/position_bias",
        "decoder/position_bias",
        "attention/o/kernel",
        "cross_attention/k/kernel",
        "attention_norm/weight",
        "cross_norm/weight",
        "mlp_norm/weight",
        "encoder/norm/weight",
        "decoder/norm/weight",
        "wi_1/kernel",
        "embed/embedding",
        "lm_head/kernel",
    ],
)
def test_a_removed_tensor_is_seen(part, tmp_path):
    """A matrix set to 0 or a norm to 1: what a forgotten tensor would look like."""
    ours, _ = t5_folders.load(t5_folders.tiny_folder("t5_1_1", tmp_path))
    state, found = nnx.state(ours), 0
    for path, variable in nnx.to_flat_state(state):
        if "/".join(map(str, path)).endswith(part):
            variable.set_value(variable.get_value() * 0 + (1 if "norm" in part else 0))
            found += 1
    assert found
    _assert_seen("t5_1_1", nnx.merge(nnx.graphdef(ours), state))


def _assert_seen(kind, ours):
    _assert_models_differ(t5_folders.tiny_model(kind), ours)


def _assert_models_differ(model, ours, **options):
    encoder, decoder = questions_and_answers()
    found = t5_folders.logits(ours, *t5_folders.whole(encoder), *t5_folders.whole(decoder), **options)
    assert np.abs(found - t5_folders.torch_logits(model, encoder, decoder)).max() > 10 * TOLERANCE
