"""The model card of a run: what it was made from, how, and what can open it."""

import os
from typing import Any

from jaxtune import __version__, hub
from jaxtune.assembly import model_config
from jaxtune.config import Config
from jaxtune.convert.folder import HFFolder
from jaxtune.decode import to_yaml


def base_identity(config: Config, base: HFFolder) -> tuple[str, str | None]:
    """Returns the name and commit by which readers of an adapter find its base model.

    A hub id and the commit that was loaded where `model.path` is a hub id; else the folder's path. What a local
    config.json remembers in `_name_or_path` is where *its* weights began, not what they are.
    """
    asked = config.model.path
    if os.path.isdir(os.path.expanduser(asked)) or not hub.is_hub_id(asked):
        return os.path.abspath(base.path), None
    folder = os.path.normpath(base.path)  # the hub's cache keeps a model in .../snapshots/COMMIT
    is_snapshot = os.path.basename(os.path.dirname(folder)) == "snapshots"
    return asked, os.path.basename(folder) if is_snapshot else config.model.revision


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
        *_readers(base, lora=lora),
        "",
        "## Recipe",
        "```yaml",
        to_yaml(config).rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _readers(base: HFFolder, *, lora: bool) -> list[str]:
    """Returns a line for each folder of a run, with what opens it."""
    if model_config(base).is_encoder_decoder:
        hf, adapter = "transformers 4.57 and 5 (AutoModelForSeq2SeqLM)", "PEFT"
    else:
        hf = "transformers 4.57 and 5, vLLM, llama.cpp (convert_hf_to_gguf.py)"
        adapter = "PEFT, vLLM, llama.cpp (convert_lora_to_gguf.py)"
    return [f"- `hf/`: {hf}.", *([f"- `adapter/`: {adapter}."] if lora else [])]
