"""How much of a model is compared on this machine: all of it or its first layers, in short rows or long ones.

T tokens a row, V vocabulary, K positions whose logits are compared.
"""

import json
import math
import os
import pathlib
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

import jax
from flax import nnx

from jaxtune import adapters
from jaxtune.convert.folder import HFFolder, is_local
from jaxtune.convert.hf import leaves_of, name_table
from jaxtune.models.registry import family_of

ROWS = 2
SHORT, COMPARED = 64, 256  # tokens a row where nothing asks for more; positions compared at the end of a row
PER_CORE = 3e12  # multiplications in one model, as if a token went to all experts: some minutes
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")
PER_LAYER_KEYS = ("layer_types", "no_rope_layers")
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What is compared, decided before anything is read.

    Attributes:
        folder: the whole one, or one whose config.json has only the first layers and which has their tensors only.
        config: of `folder`, as its family reads it.
        layers, all_layers: how many are compared (of an encoder-decoder, of each stack), and how many there are.
        left_out: what layers that are not compared have and the others have not.
        length: T.
        unreached: windows and lengths of first training that rows of T tokens are not longer than.
        needed, free: bytes.
    """

    folder: HFFolder
    config: Any
    layers: int
    all_layers: int
    left_out: tuple[str, ...]
    length: int
    unreached: tuple[int, ...]
    needed: int
    free: int


@dataclass(frozen=True)
class Size:
    """Counts of numbers: all parameters, tensors beside them (an image tower), the largest parameter of one layer."""

    config: Any
    parameters: int
    beside: int
    largest: int

    def needs(self, length: int) -> int:
        """Returns an estimate of the bytes that either model takes at its most, in float32, for rows of T tokens.

        One copy of all weights, of those beside too, which transformers loads (two with experts, which it stacks while
        reading: 5.7 GiB were seen for 3.0 of weights); three of the largest while they are read; then scores `[N T T]`,
        logits `[K V]` and a layer's activations, a few times each.
        """
        config = self.config
        copies = 2 if has_experts(config) else 1
        compared = length if config.is_encoder_decoder else min(length, COMPARED)
        widest = max(config.mlp_width, config.width, config.num_heads * config.head_dim)
        scores = 4 * config.num_heads * length**2
        activations = scores + 12 * length * widest + 4 * ROWS * compared * config.vocab_size
        return 4 * (copies * self.parameters + self.beside + 3 * self.largest + activations) + GIB // 4


class NotCheckedError(Exception):
    """Parity cannot be checked here; the text says why and what to do."""


def plan(folder: HFFolder, *, length: int | None = None) -> Plan:
    """Decides what fits this machine: the whole model if possible, else its first layers; short rows or long ones.

    Args:
        folder: with weights that fit its config.json.
        length: tokens a row; None takes as many as go past every window, if that is affordable.

    Raises:
        NotCheckedError: no torch, a folder that transformers cannot open, or too little memory for one layer.
        ValueError: a length that the model does not have.
    """
    _require_torch()
    if not is_local(folder.path):
        raise NotCheckedError("transformers opens local folders only; copy the folder to this machine and check it")
    config = family_of(folder.config, where=folder.path).read_config(folder.config)
    most = config.max_positions
    if length is not None and length > most:
        raise ValueError(f"--length: found {length}; expected at most the model's {most:,} positions")
    tokens, depth, free = length or min(SHORT, most), depth_of(folder.config), free_memory()
    layers, size = _fitting(folder, depth, tokens, free)
    left_out = tuple(sorted(_features(config) - _features(size.config)))
    if layers < depth:
        folder = first_layers(folder, layers)
    lengths = sorted({min(far + 8, most) for far in _far(size.config)}, reverse=True)
    budget = PER_CORE * (os.cpu_count() or 1) / (ROWS * size.parameters)  # of T
    affordable = (far for far in lengths if far <= budget and size.needs(far) <= free)
    if length is None:
        tokens = max(tokens, next(affordable, 0))
    unreached = tuple(far for far in _far(size.config) if far >= tokens)
    return Plan(folder, size.config, layers, depth, left_out, tokens, unreached, size.needs(tokens), free)


def _require_torch() -> None:
    try:
        import torch
        import transformers
    except (ImportError, OSError) as error:  # OSError: a library of torch's is not there
        name = "torch" if "torch" in str(error) else "transformers"
        raise NotCheckedError(
            f"{name} cannot be imported; `pip install torch` (a build for CPU is enough) and check again"
        ) from error
    if not transformers.is_torch_available():
        raise NotCheckedError(
            f"transformers {transformers.__version__} does not take torch {torch.__version__}; "
            "`pip install --upgrade torch` and check again"
        )


def text_of(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a config.json that is about layers of text."""
    nested = hf_config.get("text_config")
    return nested if isinstance(nested, dict) else hf_config


def depth_of(hf_config: dict[str, Any]) -> int:
    """Returns how many layers a config.json says; of two stacks, the deeper's."""
    text = text_of(hf_config)
    return max(int(text[key]) for key in DEPTH_KEYS if text.get(key) is not None)


def first_layers(folder: HFFolder, layers: int) -> HFFolder:
    """Returns the folder as if it had only its first layers: config.json says so, and the tensors of others are gone.

    Raises:
        NotCheckedError: a config.json that cannot be shortened.
    """
    hf_config = json.loads(json.dumps(folder.config))
    text = text_of(hf_config)
    for key in DEPTH_KEYS:
        if text.get(key) is not None:
            text[key] = min(int(text[key]), layers)
    for key in PER_LAYER_KEYS:
        if isinstance(text.get(key), list):
            text[key] = text[key][:layers]
    family = family_of(hf_config, where=folder.path)
    try:
        names = name_table(family, family.read_config(hf_config), folder.tensors)
    except ValueError as error:
        raise NotCheckedError(f"the model does not fit the memory, and not without its last layers: {error}") from error
    tensors = {name: info for name, info in folder.tensors.items() if name in names}
    return replace(folder, config=hf_config, tensors=tensors)


def _fitting(folder: HFFolder, depth: int, length: int, free: int) -> tuple[int, Size]:
    """Returns how many first layers fit the memory, with their size."""
    whole = weigh(folder)
    if whole.needs(length) <= free:
        return depth, whole
    low, high, best = 1, depth, weigh(first_layers(folder, 1))
    if best.needs(length) > free:
        raise NotCheckedError(
            f"{gib(free)} of memory are free; the first layer alone needs {gib(best.needs(length))}, the whole model "
            f"{gib(whole.needs(length))}"
        )
    while high - low > 1:
        middle = (low + high) // 2
        size = weigh(first_layers(folder, middle))
        if size.needs(length) <= free:
            low, best = middle, size
        else:
            high = middle
    return low, best


def weigh(folder: HFFolder) -> Size:
    """Returns the size of the model that a folder's config.json describes; nothing is read."""
    family = family_of(folder.config, where=folder.path)
    config = family.read_config(folder.config)
    state = nnx.state(nnx.eval_shape(lambda: family.build(config, key=jax.random.key(0))))
    beside = sum(
        math.prod(info.shape)
        for info in folder.tensors.values()
        if any(fnmatch(info.name, pattern) for pattern in family.ignored)
    )
    deep = {place.path for place in name_table(family, config).values() if place.index}
    leaves = leaves_of(state).items()
    largest = max(math.prod(leaf.shape[1:] if path in deep else leaf.shape) for path, leaf in leaves)
    return Size(config, adapters.count(state), beside, largest)


def _far(config: Any) -> list[int]:
    """Returns the lengths beyond which a model does something else: windows, and ropes that go by length."""
    if config.is_encoder_decoder:
        return [config.max_distance]
    kinds = config.layer_kinds()
    windows = {kind.window for kind in kinds if kind.window}
    return sorted(windows | {kind.rope.original_positions for kind in kinds if kind.rope and kind.rope.by_length})


def _features(config: Any) -> set[str]:
    """Returns what some layers of a model have and others may not."""
    if config.is_encoder_decoder:
        return set()
    told = set()
    for kind in config.layer_kinds():
        told |= {"experts"} if kind.sparse else set()
        told.add(f"a window of {kind.window:,}" if kind.window else "no window")
        told.add(f"rope {kind.rope.kind}" if kind.rope else "no rope")
    return told


def has_experts(config: Any) -> bool:
    return not config.is_encoder_decoder and config.experts is not None


def free_memory() -> int:
    """Returns the bytes that this process may still take: what the machine has left, or its container."""
    free = []
    try:
        text = pathlib.Path("/proc/meminfo").read_text()
        free.append(next(int(row.split()[1]) * 1024 for row in text.splitlines() if row.startswith("MemAvailable")))
    except (OSError, StopIteration):
        free.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)  # macOS does not say what is free
    try:
        group = pathlib.Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        used = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
        free.append(limit - int(used["anon"]))
    except (OSError, ValueError, KeyError):
        pass
    return max(0, min(free))


def gib(size: int) -> str:
    """Returns a size as people read it."""
    return f"{size / GIB:.1f} GiB" if size >= GIB // 10 else f"{size / 2**20:.1f} MiB"
