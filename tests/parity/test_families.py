"""Every family learns and writes as transformers does: loss, gradient of each tensor, 64 tokens through the cache."""

import functools

import hf_folders
import jax
import jax.numpy as jnp
import models_helpers
import numpy as np
import pytest
import torch
from flax import nnx
from hf_kinds import KINDS, ONE_OF_EACH
from parity_helpers import tokens_of

from jaxtune import placement
from jaxtune.convert.folder import open_folder
from jaxtune.convert.hf import leaf_shape, table_of
from jaxtune.decoding import Decoding, Rows
from jaxtune.loss import token_losses
from jaxtune.models.attention import xla

NEW = 64
PROMPTS = [[5, 9, 13], [7, 7, 20, 31, 44, 58, 60]]


@pytest.fixture(
    scope="module",
    params=[pytest.param(k, marks=() if k in ONE_OF_EACH else pytest.mark.long) for k in sorted(KINDS)],
)
def loaded(request, tmp_path_factory):
    path = hf_folders.tiny_folder(request.param, tmp_path_factory.mktemp(request.param))
    return hf_folders.tiny_model(request.param), models_helpers.load(path), path


# One kind for each sort of attention; the others answer in `make test-long`.
ANSWERING = ("llama31", "gemma3", "gpt2", "smollm3", "deepseek_v3", "gpt_oss")


@pytest.fixture(
    scope="module",
    params=[pytest.param(k, marks=() if k in ANSWERING else pytest.mark.long) for k in sorted(KINDS)],
)
def answering(request, tmp_path_factory):
    path = hf_folders.tiny_folder(request.param, tmp_path_factory.mktemp(request.param))
    return hf_folders.tiny_model(request.param), models_helpers.load(path), path


def _our_loss_and_gradient(decoder, tokens):
    graph, params, rest = nnx.split(decoder, nnx.Param, ...)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    ones = np.ones_like(tokens)
    targets = jnp.roll(jnp.asarray(tokens), -1, axis=1)
    weights = jnp.ones(tokens.shape, jnp.float32).at[:, -1].set(0)

    @functools.partial(jax.jit, compiler_options=models_helpers.QUICK_COMPILE)
    @jax.value_and_grad
    def loss(params):
        model = nnx.merge(graph, params, rest)
        hidden = model(tokens, positions, ones, compute_dtype=jnp.float32, attention=xla, remat="full").hidden
        head = model.head()
        losses = token_losses(
            hidden,
            head.kernel,
            targets=targets,
            weights=weights,
            train_head=True,
            vocab_size=head.vocab_size,
            logit_scale=head.scale,
            softcap=head.softcap,
        )
        return losses.total / weights.sum()

    return loss(params)


def test_loss_and_gradients_equal_transformers(loaded, tmp_path):
    model, (decoder, _), path = loaded
    tokens = tokens_of(2)
    mine, gradient = _our_loss_and_gradient(decoder, tokens)
    ids = torch.tensor(tokens)
    theirs = model(input_ids=ids, labels=ids).loss
    model.zero_grad()
    theirs.backward()
    assert float(mine) == pytest.approx(theirs.item(), rel=1e-5)
    # The gradients are saved in place of the weights: so they have the checkpoint's names, whatever the model's own.
    before = {name: parameter.data for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    model.save_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        parameter.data = before[name]
    written, leaves = open_folder(tmp_path), dict(nnx.to_flat_state(gradient))
    checked = 0
    for name, place in table_of(open_folder(path))[1].items():
        if place.path not in leaves or name not in written.tensors:
            continue
        leaf = leaves[place.path].get_value()
        ours = placement.take(leaf, place.index, transpose=place.transpose, dtype=np.float32)
        own = leaf_shape(place, leaves[place.path])[0]
        assert not ours[own:].any(), "padding of the vocabulary learns nothing"
        ours = ours[:own]
        expected = written.read_rows(name)
        norm = np.linalg.norm(expected)
        assert np.linalg.norm(ours - expected) <= 1e-3 * norm + 1e-7, name
        checked += norm > 0
    assert checked >= 0.8 * len(written.tensors)


def test_64_greedy_tokens_equal_transformers(answering):
    model, (decoder, config), _ = answering
    model.generation_config.eos_token_id = None
    graph, state = nnx.split(decoder)
    decoding = Decoding(graph, config, stop_ids=(), dtype=jnp.float32)
    width = max(map(len, PROMPTS))
    arrays = np.array([prompt + [0] * (width - len(prompt)) for prompt in PROMPTS], np.int32)
    rows = Rows(
        np.array([len(prompt) for prompt in PROMPTS], np.int32),
        np.full(2, NEW, np.int32),
        jax.random.split(jax.random.key(0), 2),
        np.float32(1),
        np.float32(1),
    )
    tokens, counts = decoding.batch(state, jnp.asarray(arrays), rows, new_tokens=NEW, draw="likeliest")
    assert np.asarray(counts).tolist() == [NEW, NEW]
    for row, prompt in enumerate(PROMPTS):
        told = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        theirs = told.sequences[0, len(prompt) :].tolist()
        best = torch.stack(told.logits)[:, 0].topk(2).values
        close = (best[:, 0] - best[:, 1] < 1e-4).nonzero().flatten().tolist()
        until = close[0] if close else NEW
        assert until > 0
        assert np.asarray(tokens)[row, :until].tolist() == theirs[:until]
