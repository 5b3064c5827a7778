"""The model card of a run: what it was made from, how, and what can open it."""

import os
import re
from typing import Any

from jaxtune import __version__
from jaxtune.config import Config
from jaxtune.convert.folder import HFFolder
from jaxtune.decode import to_yaml


def base_identity(config: Config, base: HFFolder) -> tuple[str, str | None]:
    """Returns the name and commit by which readers of an adapter find its base model.

    A hub id where one is known: the path asked for, or the one that config.json remembers; else the folder's path.
    """
    asked = config.model.path
    if is_hub_id(asked):
        return asked, config.model.revision
    remembered = str(base.config.get("_name_or_path", ""))
    return (remembered, None) if is_hub_id(remembered) else (os.path.abspath(base.path), None)


def is_hub_id(path: str) -> bool:
    """Returns whether a path is of the form `owner/name` and no folder here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", path)) and not os.path.exists(path)


def model_card(config: Config, base: HFFolder, stream: Any, outcome: Any) -> str:
    """Returns README.md with the hub's front matter: base, data, recipe, results, and who can load this."""
    name, _ = base_identity(config, base)
    lora = config.tuning.method == "lora"
    sources = [source.path for source in config.data.train]
    results = [f"- updates: {outcome.step}"]
    if outcome.loss is not None:
        results.append(f"- training loss of the last update: {outcome.loss:.4f}")
    if outcome.eval_loss is not None:
        results.append(f"- held-out loss: {outcome.eval_loss:.4f}")
    lines = [
        "---",
        f"base_model: {name}",
        f"library_name: {'peft' if lora else 'transformers'}",
        "tags: [jaxtune, instruction-tuning]",
        "---",
        f"# {os.path.basename(os.path.normpath(config.output))}",
        "",
        f"Instruction-tuned from `{name}` with jaxtune {__version__}"
        + (f" (LoRA, r {config.tuning.rank})." if lora else " (all weights)."),
        "The base model's licence applies to this model as well; read it where the base comes from.",
        "",
        "## Data",
        *(f"- `{path}`" for path in sources),
        *([f"- {stream.funnel.total('examples'):,} examples after filtering"] if stream is not None else []),
        "",
        "## Results",
        *results,
        "",
        "## Who can load this",
        "- `hf/`: transformers 4.57 and 5, vLLM, llama.cpp (convert_hf_to_gguf.py).",
        *(["- `adapter/`: PEFT, vLLM, llama.cpp (convert_lora_to_gguf.py)."] if lora else []),
        "",
        "## Recipe",
        "```yaml",
        to_yaml(config).rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)
