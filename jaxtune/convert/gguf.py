"""What llama.cpp's converter will ask of a folder, asked beforehand: it aborts late, and with few words."""

import json
from collections.abc import Iterator
from typing import Any

import fsspec

from jaxtune.asking import Finding
from jaxtune.convert.folder import HFFolder, open_folder
from jaxtune.convert.hf import table_of

# Architectures of ours that convert_hf_to_gguf.py registers.
CONVERTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def check(path: str) -> list[Finding]:
    """Returns what was found in a model folder, all of it.

    Raises:
        ValueError: it is no whole model folder (damaged files, or an index that disagrees with its shards).
    """
    folder = open_folder(path)
    fs, root = fsspec.core.url_to_fs(folder.path)
    names = {entry.rstrip("/").rpartition("/")[2] for entry in fs.ls(root, detail=False)}
    tokenizer = json.loads(fs.cat_file(f"{root}/tokenizer.json")) if "tokenizer.json" in names else {}
    return [
        Finding("ok", f"{len(folder.tensors)} tensors in {len(folder.headers)} file(s); index and files agree"),
        *_architecture(folder),
        *_tensors(folder),
        *_vocabulary(folder, tokenizer),
        *_tokenizer(names, tokenizer),
        *_template(fs, root, names),
    ]


def _architecture(folder: HFFolder) -> Iterator[Finding]:
    found = folder.config.get("architectures")
    if found and len(found) == 1 and found[0] in CONVERTED:
        yield Finding("ok", f"architecture {found[0]}")
    else:
        yield Finding("error", f"config.json: architectures is {found}; expected one of {', '.join(CONVERTED)}")


def _tensors(folder: HFFolder) -> Iterator[Finding]:
    table = table_of(folder)[1]
    missing = [name for name, place in table.items() if name not in folder.tensors and not place.optional]
    extra = [name for name in folder.tensors if name not in table]
    for what, names in (("missing", missing), ("not of this architecture", extra)):
        if names:
            yield Finding("error", f"{len(names)} tensors {what}: {', '.join(names[:3])}")
    tied = bool(folder.config.get("tie_word_embeddings", False))
    if tied and HEAD in folder.tensors:
        yield Finding("warning", f"{HEAD} is there although the embeddings are tied: the file is larger than needed")
    if not missing and not extra:
        yield Finding(
            "ok", "every tensor by its name" + ("; the embeddings are the head" if tied else f"; {HEAD} is there")
        )


def _vocabulary(folder: HFFolder, tokenizer: dict[str, Any]) -> Iterator[Finding]:
    size = int(folder.config.get("vocab_size", 0))
    if EMBEDDING in folder.tensors:
        rows = folder.tensors[EMBEDDING].shape[0]
        if rows == size:
            yield Finding("ok", f"vocabulary of {size:,}, the rows of the embedding")
        else:
            yield Finding("error", f"config.json: vocab_size is {size:,}, but the embedding has {rows:,} rows")
    known = tokenizer.get("model", {}).get("vocab", {})
    pieces = known.values() if isinstance(known, dict) else range(len(known))
    ids = [*pieces, *(int(token["id"]) for token in tokenizer.get("added_tokens", []))]
    if ids and max(ids) >= size:
        yield Finding("error", f"the tokenizer's last token is {max(ids):,}, beyond the vocabulary of {size:,}")


def _tokenizer(names: set[str], tokenizer: dict[str, Any]) -> Iterator[Finding]:
    if "tokenizer.model" in names:
        yield Finding("ok", "tokenizer.model, which the converter reads first")
    elif not tokenizer:
        yield Finding("error", "no tokenizer.model and no tokenizer.json; copy them from the base model")
    elif tokenizer.get("model", {}).get("type") == "BPE":
        yield Finding(
            "warning",
            "tokenizer.json is BPE: the converter knows pre-tokenizers by a hash and stops at an unknown one. It "
            "knows those of published bases, and a tokenizer of one's own only after it is added there",
        )
    else:
        kind = tokenizer.get("model", {}).get("type")
        yield Finding("error", f"tokenizer.json is of type {kind}; the converter reads BPE, or a tokenizer.model")


def _template(fs: Any, root: str, names: set[str]) -> Iterator[Finding]:
    config = json.loads(fs.cat_file(f"{root}/tokenizer_config.json")) if "tokenizer_config.json" in names else {}
    if "chat_template.jinja" in names or config.get("chat_template"):
        yield Finding("ok", "a chat template, which is stored in the GGUF file")
    else:
        yield Finding("warning", "no chat template: give llama.cpp one with --chat-template, or Ollama in a Modelfile")


def commands(path: str) -> str:
    """Returns the llama.cpp commands that convert and quantise the folder."""
    name = path.rstrip("/").rpartition("/")[2] or "model"
    return "\n".join(
        [
            f"python convert_hf_to_gguf.py {path} --outtype auto --outfile {name}.gguf",
            f"llama-quantize {name}.gguf {name}-Q4_K_M.gguf Q4_K_M",
            f"llama-cli -m {name}-Q4_K_M.gguf",
        ]
    )
