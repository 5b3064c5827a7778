"""Which family a model folder belongs to: one line per family."""

import difflib
from typing import Any

from jaxtune.models.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from jaxtune.models.family import Family
from jaxtune.models.gemma import GEMMA, GEMMA2, GEMMA3, GEMMA3_TEXT
from jaxtune.models.gpt2 import GPT2
from jaxtune.models.gpt_neox import GPT_NEOX
from jaxtune.models.gpt_oss import GPT_OSS
from jaxtune.models.granite import GRANITE
from jaxtune.models.llama import LLAMA
from jaxtune.models.mistral import MISTRAL
from jaxtune.models.mixtral import MIXTRAL
from jaxtune.models.olmo import OLMO2, OLMO3
from jaxtune.models.phi3 import PHI3
from jaxtune.models.qwen2 import QWEN2
from jaxtune.models.qwen3 import QWEN3, QWEN3_MOE
from jaxtune.models.reading import HFConfig
from jaxtune.models.smollm3 import SMOLLM3
from jaxtune.models.t5_family import MT5, T5_FAMILY, UMT5

_ALL: tuple[Family, ...] = (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GEMMA3_TEXT,
    GPT2,
    GPT_NEOX,
    GPT_OSS,
    GRANITE,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    MT5,
    OLMO2,
    OLMO3,
    PHI3,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    SMOLLM3,
    T5_FAMILY,
    UMT5,
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}


def family_of(hf_config: HFConfig, *, where: Any) -> Family:
    """Returns the family that a config.json names.

    Raises:
        ValueError: no `model_type`, or one that is not in `FAMILIES`; says `where`, the choices and the nearest.
    """
    found = hf_config.get("model_type")
    if hf_config.get("quantization_config"):
        method = hf_config["quantization_config"].get("quant_method")
        raise ValueError(
            f"{where}: config.json has a quantization_config ({method}); expected weights in float32, bfloat16 or "
            "float16. Take the release without quantization, or a copy that was written out in bfloat16"
        )
    if found in FAMILIES:
        return FAMILIES[found]
    nearest = difflib.get_close_matches(str(found), FAMILIES, n=1, cutoff=0.5)
    hint = f" Nearest: {nearest[0]!r}." if nearest else ""
    raise ValueError(
        f"{where}: config.json says model_type = {found!r}; supported: {', '.join(sorted(FAMILIES))}.{hint} "
        f"A model of the same shape as one of these can be tuned under that name; else it needs a family file."
    )
