"""Tiny Hugging Face folders, one per family and variant, with every tensor redrawn so that nothing hides.

Default initial values are blind: biases are 0, norms 1, and many features then change nothing that a test can see.
"""

import json
import pathlib
import shutil
from typing import Any

import torch
import transformers

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# kind -> (model_type, keys that differ from SIZES)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama31": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama32": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 16}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": 5, "head_dim": 16}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "qwen25": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
}
MODELS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
}


def tiny_model(kind: str, **changes: Any) -> transformers.PreTrainedModel:
    """Returns transformers' model of a kind in float32, every tensor drawn with std 0.2 (norms around 1)."""
    model_type, own = KINDS[kind]
    config_class, model_class = MODELS[model_type]
    config = config_class(**{**SIZES, **own, **changes})
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator) * 0.2
            tensor.copy_(1 + noise if "norm" in name else noise)
    return model


def tiny_folder(
    kind: str,
    path: pathlib.Path,
    *,
    max_shard_size: str = "1GB",
    dtype: torch.dtype = torch.float32,
    tokenizer: pathlib.Path | None = None,
    **changes: Any,
) -> pathlib.Path:
    """Writes the folder of a kind at `path` and returns it; transformers itself does the writing.

    Args:
        tokenizer: folder whose tokenizer files are put beside the weights.
        changes: config.json keys to change.
    """
    model = tiny_model(kind, **changes).to(dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    for file in tokenizer.glob("*token*") if tokenizer is not None else ():
        shutil.copy(file, path / file.name)
        (path / file.name).chmod(0o644)
    return path


def rewrite_config(path: pathlib.Path, *, drop: tuple[str, ...] = (), **changes: Any) -> None:
    """Changes config.json of a folder in place."""
    config = json.loads((path / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in drop}
    (path / "config.json").write_text(json.dumps({**config, **changes}, indent=2))
