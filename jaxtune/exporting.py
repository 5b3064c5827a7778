"""The folders that a run leaves behind: OUTPUT/hf and OUTPUT/adapter, written at its end or from a checkpoint later."""

from typing import Any

from flax import nnx

from jaxtune import card
from jaxtune.config import Config
from jaxtune.convert.folder import HFFolder
from jaxtune.convert.peft import export_adapter
from jaxtune.convert.writing import export_folder
from jaxtune.data.chat.templates import ChatTemplate
from jaxtune.metrics import Terminal


def export(
    config: Config,
    base: HFFolder,
    template: ChatTemplate | None,
    trainable: nnx.State,
    frozen: nnx.State,
    output: str,
    *,
    readme: str,
    terminal: Terminal,
) -> tuple[str | None, str | None]:
    """Writes and re-opens `output`/hf and `output`/adapter, as `export` says; all hosts must call it.

    Args:
        template: what the model was tuned with; None where it was not tuned.
        trainable, frozen: all parameters, split as they were tuned.
        readme: the model card, for the adapter's folder.

    Returns:
        The paths of both, None for what was not asked for.
    """
    chosen = template is not None and config.data.template != "auto"
    shared: dict[str, Any] = {"chat_template": template.template_text if template and chosen else None}
    hf = adapter = None
    if config.tuning.method == "lora" and config.export.adapter:
        adapter = f"{output}/adapter"
        name, revision = card.base_identity(config, base)
        with terminal.working(f"writing {adapter}"):
            export_adapter(base, trainable, adapter, base_name=name, revision=revision, readme=readme, **shared)
    if config.export.hf:
        hf = f"{output}/hf"
        stop_ids = tuple(template.stop_ids) if template is not None else ()
        with terminal.working(f"writing {hf}"):
            export_folder(base, nnx.merge_state(trainable, frozen), hf, stop_ids=stop_ids, **shared)
    return hf, adapter
