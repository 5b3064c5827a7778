"""Which chat template a run uses: the tokenizer's own, a built-in, or a file; and the tokenizer itself."""

import os
from collections.abc import Mapping
from typing import Any

import transformers

from jaxtune import hub
from jaxtune.data.chat.chat_templates import BOS, BUILT_INS
from jaxtune.data.chat.rendering import ChatTemplate, Rendered

__all__ = ["ChatTemplate", "Rendered", "load_template", "load_tokenizer"]


def load_tokenizer(folder: str) -> Any:
    """The folder's fast tokenizer (local path or URL); code in the folder never runs."""
    try:
        here = hub.local_companions(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(here, trust_remote_code=False)
    except Exception as error:
        raise ValueError(
            f"{folder}: no tokenizer could be read ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "expected tokenizer.json or tokenizer.model with tokenizer_config.json"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"{folder}: {type(tokenizer).__name__} is a slow tokenizer and gives no character offsets, which the "
            "weights need; load it with use_fast=True and save it beside the model"
        )
    return tokenizer


def load_template(name: str, tokenizer: Any) -> ChatTemplate:
    """The template that `data.template` names, checked on this tokenizer: auto, a built-in, or a Jinja file."""
    if name == "auto":
        text = tokenizer.chat_template
        if isinstance(text, Mapping):
            text = text.get("default")
        if not text:
            raise ValueError(
                "data.template: this tokenizer has no chat template of its own; set data.template=alpaca (single "
                "turns) or data.template=vicuna (conversations), which need no new tokens"
            )
        return ChatTemplate(tokenizer, text, name="the tokenizer's own")
    if name not in BUILT_INS:
        if not os.path.isfile(name):
            raise ValueError(
                f"data.template: found {name!r}; expected auto, {', '.join(BUILT_INS)}, or an existing Jinja file"
            )
        with open(name, encoding="utf-8") as file:
            return ChatTemplate(tokenizer, file.read(), name=name)
    text, markers = BUILT_INS[name]
    missing = [m for m in markers if len(tokenizer(m, add_special_tokens=False)["input_ids"]) != 1]
    if missing:
        raise ValueError(
            f"data.template: {name} needs {', '.join(missing)} as single tokens, and this tokenizer would cut them to "
            "pieces; use data.template=auto, alpaca or vicuna, which need no new tokens"
        )
    if tokenizer.eos_token is None:
        raise ValueError(f"data.template: {name} ends answers with the EOS token, and this tokenizer has none")
    if tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id] or tokenizer.bos_token is None:
        text = text.removeprefix(BOS)
    return ChatTemplate(tokenizer, text, name=name)
