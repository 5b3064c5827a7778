"""Tiny Hugging Face folders, one per family and variant, with every tensor redrawn so that nothing hides.

Default initial values are blind: biases are 0, norms 1, and many features then change nothing that a test can see.
"""

import json
import pathlib
import shutil
from typing import Any

import torch
import transformers
from hf_kinds import KINDS, SIZES


def tiny_model(kind: str, **changes: Any) -> transformers.PreTrainedModel:
    """Returns transformers' model of a kind in float32, every tensor drawn with std 0.2 (norms around 1)."""
    model_type, own = KINDS[kind]
    config = transformers.CONFIG_MAPPING[model_type](**{**SIZES, **own, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    redraw(model)
    return model


def redraw(model: torch.nn.Module) -> None:
    """Draws every tensor anew with std 0.2, norms around what leaves their input as it is: 1, or 0 where 1 is added."""
    plain = 0 if model.config.model_type.startswith("gemma") else 1
    generator = torch.Generator().manual_seed(7)
    statistics = [(name, buffer) for name, buffer in model.named_buffers() if "correction" in name]
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *statistics]:
            noise = torch.randn(tensor.shape, generator=generator) * 0.2
            tensor.copy_(plain + noise if "norm" in name or ".ln_" in name else noise)


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
