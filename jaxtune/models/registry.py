"""Which family a model folder belongs to: one line per family."""

import difflib
from typing import Any

from jaxtune.models.family import Family
from jaxtune.models.llama import LLAMA
from jaxtune.models.mistral import MISTRAL
from jaxtune.models.qwen2 import QWEN2
from jaxtune.models.reading import HFConfig
from jaxtune.models.t5_family import MT5, T5_FAMILY, UMT5

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "t5": T5_FAMILY,
    "mt5": MT5,
    "umt5": UMT5,
}


def family_of(hf_config: HFConfig, *, where: Any) -> Family:
    """Returns the family that a config.json names.

    Raises:
        ValueError: no `model_type`, or one that is not in `FAMILIES`; says `where`, the choices and the nearest.
    """
    found = hf_config.get("model_type")
    if found in FAMILIES:
        return FAMILIES[found]
    nearest = difflib.get_close_matches(str(found), FAMILIES, n=1, cutoff=0.5)
    hint = f" Nearest: {nearest[0]!r}." if nearest else ""
    raise ValueError(
        f"{where}: config.json says model_type = {found!r}; supported: {', '.join(sorted(FAMILIES))}.{hint} "
        f"A model of the same shape as one of these can be tuned under that name; else it needs a family file."
    )
