"""What to say when a device has too little memory."""

import contextlib
from collections.abc import Iterator
from typing import Any

from jaxtune.config import Config


class OutOfMemory(ValueError):
    """A device has too little memory; the message says what helps."""


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether XLA ended a computation or a compilation for lack of device memory.

    A kernel that asks for more of a TPU's vector memory than an option allows it is not meant.
    """
    text = str(error)
    if "vmem" in text.lower():
        return False
    return type(error).__name__ in ("XlaRuntimeError", "JaxRuntimeError") and (
        "RESOURCE_EXHAUSTED" in text or "Ran out of memory" in text
    )


@contextlib.contextmanager
def memory_explained(config: Config, analysis: Any) -> Iterator[None]:
    """Turns XLA's out-of-memory error into an `OutOfMemory` that says what filled the device and what helps."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(explain_out_of_memory(config, analysis, error)) from None


def explain_out_of_memory(config: Config, analysis: Any, error: BaseException) -> str:
    """Returns what filled the device and three settings that help, each with its effect.

    Args:
        analysis: the compiled step's memory analysis (bytes per device), or None when it did not compile.
        error: the error that XLA raised.
    """
    rows = config.rows_at_once
    lines = ["out of device memory."]
    if analysis is not None:
        gib = 2**30
        lines.append(
            f"Each device holds {analysis.argument_size_in_bytes / gib:.2f} GiB of weights, optimizer state and batch, "
            f"and the step needs {analysis.temp_size_in_bytes / gib:.2f} GiB beside them for activations and gradients."
        )
    lines.append(f"XLA said: {str(error).splitlines()[0][:300]}")
    lines.append("Settings that help, the cheapest first:")
    smaller = [part for part in range(1, rows // 2 + 1) if config.train.batch_rows % part == 0]
    if smaller:
        lines.append(
            f"  train.microbatch_rows={smaller[-1]}   fewer activations ({rows} rows at once now), same result"
        )
    if config.model.remat != "full":
        lines.append("  model.remat=full          keeps one activation a layer; a step takes about 1.3 times as long")
    if config.tuning.method == "full":
        lines.append("  tuning.method=lora        2 to 4 bytes a weight, not 16: no optimizer state for it")
    length = config.data.max_length or 2048
    lines.append(f"  data.max_length={length // 2}      halves activations; longer rows then go by data.overlong")
    if config.mesh.fsdp == 1:
        lines.append(
            "  mesh.fsdp=-1              splits weights and optimizer over all devices: the more, the less each"
        )
    return "\n".join(lines)
