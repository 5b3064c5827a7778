"""Folders that jaxtune wrote open in this environment's transformers and peft, with the logits that jaxtune computed.

Runs in `make test-matrix`'s environment, which has no jax: `write_folders.py` has written folders and numbers before.
"""

import json
import os
import pathlib

import pytest

pytestmark = pytest.mark.matrix
FOLDERS = pathlib.Path(os.environ.get("JAXTUNE_MATRIX_FOLDERS", "build/matrix"))
VARIANTS = (
    *("deepseek_v2", "deepseek_v2_groups", "deepseek_v3", "gemma", "gemma2", "gemma3", "gpt2"),
    *("gpt_neox", "gpt_neox_serial", "gpt_oss", "granite", "llama2", "llama31", "llama32"),
    *("llama_biases", "llama_dynamic", "llama_linear", "llama_yarn", "mistral", "mixtral", "olmo2"),
    *("olmo3", "phi3", "phi4_longrope", "qwen2", "qwen25", "qwen3", "qwen3_moe", "qwen3_windows"),
    *("smollm3",),
)
PAIR_VARIANTS = ("t5_1_0", "t5_1_1", "ul2", "mt5", "umt5")


@pytest.fixture(scope="module")
def libraries():
    """torch, transformers and numpy of this environment."""
    import numpy
    import torch
    import transformers

    return torch, transformers, numpy


def open_model(transformers, folder, **options):
    """Opens a folder with plain attention: the fused one of this version knows neither soft-caps nor sinks."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options)


def largest_difference(model, folder, libraries):
    """Returns the largest difference between the model's logits and ours."""
    torch, _, numpy = libraries
    with numpy.load(folder / "expected.npz") as expected, torch.no_grad():
        if "encoder" in expected:
            encoder, decoder = (torch.tensor(expected[side]) for side in ("encoder", "decoder"))
            found = model.eval()(input_ids=encoder, decoder_input_ids=decoder).logits.numpy()
        else:
            found = model.eval()(torch.tensor(expected["tokens"])).logits.numpy()
        return float(numpy.abs(found - expected["logits"]).max())


def test_every_variant_that_was_written_is_tested():
    assert sorted(path.name for path in (FOLDERS / "models").iterdir()) == sorted(VARIANTS)
    assert sorted(path.name for path in (FOLDERS / "pairs").iterdir()) == sorted(PAIR_VARIANTS)


@pytest.mark.parametrize("kind", PAIR_VARIANTS)
def test_encoder_decoder_folders_have_our_logits(kind, libraries):
    """Heads of their own stay so, and only T5 1.0 scales what it gives its head."""
    import peft

    _, transformers, _ = libraries
    folder = FOLDERS / "pairs" / kind
    model, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / "hf", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert largest_difference(model, folder, libraries) < 1e-4
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / "base")
    assert largest_difference(base, folder, libraries) > 1e-3
    adapted = peft.PeftModel.from_pretrained(base, folder / "adapter")
    assert largest_difference(adapted, folder, libraries) < 1e-4


@pytest.mark.parametrize("kind", VARIANTS)
def test_the_merged_folder_has_our_logits(kind, libraries):
    _, transformers, _ = libraries
    folder = FOLDERS / "models" / kind
    model, info = open_model(transformers, folder / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert largest_difference(model, folder, libraries) < 1e-4


@pytest.mark.parametrize("kind", VARIANTS)
def test_base_and_adapter_have_our_logits(kind, libraries):
    import peft
    import safetensors

    _, transformers, _ = libraries
    folder = FOLDERS / "models" / kind
    # The base as jaxtune's config.json says it: a file by transformers 5 alone would lose its rope in transformers 4.
    model = open_model(transformers, folder / "base", config=transformers.AutoConfig.from_pretrained(folder / "hf"))
    assert largest_difference(model, folder, libraries) > 1e-2
    adapted = peft.PeftModel.from_pretrained(model, folder / "adapter")
    assert largest_difference(adapted, folder, libraries) < 1e-4
    layers = [name for name, _ in adapted.named_modules() if name.endswith("lora_A.default")]
    with safetensors.safe_open(folder / "adapter" / "adapter_model.safetensors", "np") as file:
        assert len(layers) == sum("lora_A" in name for name in file.keys()) > 0  # noqa: SIM118


def test_the_tokenizer_gives_the_ids_of_training(libraries):
    _, transformers, _ = libraries
    expected = json.loads((FOLDERS / "tokenizer" / "expected.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDERS / "tokenizer")
    text = tokenizer.apply_chat_template(expected["messages"], tokenize=False, add_generation_prompt=True)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected["ids"]
