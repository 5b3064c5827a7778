"""A multimodal Gemma 3 folder is tuned as a text model: its logits, and its image tower written back untouched."""

import hf_folders
import jax
import models_helpers
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from hf_kinds import GEMMA3, SIZES
from parity_helpers import TOLERANCE, tokens_of, torch_logits

from jaxtune import adapters
from jaxtune.convert import peft as adapter_folders
from jaxtune.convert import writing
from jaxtune.convert.folder import open_folder
from jaxtune.models.layers import LoRAParam

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    text = transformers.Gemma3TextConfig(**{**SIZES, **GEMMA3})
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=VISION, mm_tokens_per_image=4, image_token_index=90
    )
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    hf_folders.redraw(model)
    path = tmp_path_factory.mktemp("gemma3")
    model.save_pretrained(path)
    return path, model


def test_text_logits_are_those_of_the_whole_model(folder):
    path, model = folder
    decoder, _ = models_helpers.load(path)
    tokens = tokens_of(2, vocab=89)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    ours = models_helpers.logits(decoder, tokens, positions, np.ones_like(tokens))
    np.testing.assert_allclose(ours, torch_logits(model, tokens), atol=TOLERANCE, rtol=0)


def test_image_tower_is_written_back(folder, tmp_path):
    path, _ = folder
    opened = open_folder(path)
    assert any("vision_tower" in name for name in opened.tensors)
    decoder, _ = models_helpers.load(path)
    writing.export_folder(opened, nnx.state(decoder), str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


def test_adapter_opens_on_the_whole_model(folder, tmp_path):
    path, _ = folder
    decoder, _ = models_helpers.load(path)
    adapters.attach(decoder, rank=2, alpha=4.0, dropout=0.0, targets=("q_proj",), key=jax.random.key(0))
    for place, variable in nnx.to_flat_state(nnx.state(decoder, LoRAParam)):
        if place[-1] == "lora_b":
            variable.set_value(0.1 * jax.random.normal(jax.random.key(1), variable.shape))
    adapter_folders.export_adapter(
        open_folder(path), nnx.state(decoder), str(tmp_path), base_name="org/base", revision=None
    )
    base = transformers.Gemma3ForConditionalGeneration.from_pretrained(path, attn_implementation="eager")
    tokens = tokens_of(2, vocab=89)
    before = torch_logits(base.eval(), tokens)
    model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    ours = models_helpers.logits(decoder, tokens, positions, np.ones_like(tokens))
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)
    assert np.abs(theirs - before).max() > 1e-2
