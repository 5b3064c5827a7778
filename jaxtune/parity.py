"""Logits of a folder's own weights by transformers and by jaxtune, compared, one of the two models in memory at a time.

T tokens a row, V vocabulary, K positions whose logits are compared.
"""

import contextlib
import gc
import json
import math
import os
import pathlib
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune import adapters
from jaxtune.convert.folder import HFFolder, is_local
from jaxtune.convert.hf import leaves_of, load_params, name_table
from jaxtune.models import t5_layers
from jaxtune.models.attention import xla
from jaxtune.models.registry import family_of

TOLERANCE = 1e-4
EXPERTS_TOLERANCE = 2e-4
# A difference over the tolerance is float32's own where a last bit of the embedding moves the logits as much. In every
# family's tiny model the difference was 0.8 to 1.9 times what such a bit did.
ROUNDINGS, MOST_TOLERANCES = 4, 10
SEED, ROWS = 0, 2
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
        copies = 2 if _has_experts(config) else 1
        compared = length if config.is_encoder_decoder else min(length, COMPARED)
        widest = max(config.mlp_width, config.width, config.num_heads * config.head_dim)
        scores = 4 * config.num_heads * length**2
        activations = scores + 12 * length * widest + 4 * ROWS * compared * config.vocab_size
        return 4 * (copies * self.parameters + self.beside + 3 * self.largest + activations) + GIB // 4


@dataclass(frozen=True)
class Comparison:
    """What both models said of the same tokens.

    Attributes:
        difference: the largest of all logits; `by_row` the largest of each row.
        rounding: how far our logits move with the last bit of the embedding; None where nobody asked.
        agreement: share of positions with the same likeliest token.
        compared: K.
        missing: tensors that transformers wanted and the folder does not have.
        told: what transformers was told of config.json that it had not read.
    """

    difference: float
    by_row: tuple[float, ...]
    largest_logit: float
    base_tolerance: float
    rounding: float | None
    agreement: float
    compared: int
    missing: tuple[str, ...]
    told: str | None
    versions: str

    @property
    def tolerance(self) -> float:
        """What the difference may be: float32 has 7 digits, so large logits may differ by more."""
        return tolerance(self.base_tolerance, self.largest_logit)

    @property
    def is_rounding(self) -> bool:
        """Whether a difference over the tolerance is no more than float32's rounding in this model."""
        if self.rounding is None or not self.difference > self.tolerance:
            return False
        return self.difference <= min(ROUNDINGS * self.rounding, MOST_TOLERANCES * self.tolerance)

    @property
    def is_at_parity(self) -> bool:
        return (self.difference <= self.tolerance or self.is_rounding) and not self.missing  # nan is not


def tolerance(base: float, largest_logit: float) -> float:
    """Returns what logits may differ by."""
    return base * max(1.0, largest_logit / 10)


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


def run(plan: Plan) -> Comparison:
    """Loads the folder in transformers, then in jaxtune, and compares what they say of the same random tokens.

    Raises:
        NotCheckedError: transformers cannot open the folder.
    """
    import torch
    import transformers

    rows = random_rows(plan)
    try:
        theirs, missing, told = _transformers_logits(plan, rows)
    except (ImportError, OSError, ValueError, KeyError, AttributeError, RuntimeError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[0][:300]
        raise NotCheckedError(
            f"transformers {transformers.__version__} cannot open the folder ({type(error).__name__}: {reason}); "
            "a newer transformers may"
        ) from error
    gc.collect()  # modules refer to one another, and their weights would stay beside ours
    model = _load(plan)
    ours = _jaxtune_logits(plan, model, rows)
    by_row = tuple(float(np.max(np.abs(a - b))) for a, b in zip(theirs, ours, strict=True))
    agree = [np.mean(np.argmax(a, -1) == np.argmax(b, -1)) for a, b in zip(theirs, ours, strict=True)]
    difference, largest = float(np.max(by_row)), float(max(np.max(np.abs(a)) for a in theirs))  # max() would lose a nan
    base = EXPERTS_TOLERANCE if _has_experts(plan.config) else TOLERANCE
    rounding = None
    if difference > tolerance(base, largest):
        _nudge(model)
        nudged = _jaxtune_logits(plan, model, rows)
        rounding = max(float(np.max(np.abs(a - b))) for a, b in zip(ours, nudged, strict=True))
    return Comparison(
        difference=difference,
        by_row=by_row,
        largest_logit=largest,
        base_tolerance=base,
        rounding=rounding,
        agreement=float(np.mean(agree)),
        compared=theirs[0].shape[0],
        missing=missing,
        told=told,
        versions=f"transformers {transformers.__version__}, torch {torch.__version__}",
    )


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


# --- Which part of the model, and how many tokens ---------------------------------------------------------------------


def _text(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a config.json that is about layers of text."""
    nested = hf_config.get("text_config")
    return nested if isinstance(nested, dict) else hf_config


def depth_of(hf_config: dict[str, Any]) -> int:
    """Returns how many layers a config.json says; of two stacks, the deeper's."""
    text = _text(hf_config)
    return max(int(text[key]) for key in DEPTH_KEYS if text.get(key) is not None)


def first_layers(folder: HFFolder, layers: int) -> HFFolder:
    """Returns the folder as if it had only its first layers: config.json says so, and the tensors of others are gone.

    Raises:
        NotCheckedError: a config.json that cannot be shortened.
    """
    hf_config = json.loads(json.dumps(folder.config))
    text = _text(hf_config)
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


def _has_experts(config: Any) -> bool:
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


# --- The two models ---------------------------------------------------------------------------------------------------


def random_rows(plan: Plan) -> list[tuple[np.ndarray, ...]]:
    """Draws the rows: tokens `[1 T]`, for an encoder-decoder those of both sides; no token that means something."""
    words = {**plan.folder.config, **_text(plan.folder.config)}
    special = {
        token
        for key, value in words.items()
        if key.endswith(("_token_id", "_token_index"))
        for token in (value if isinstance(value, list) else [value])
        if isinstance(token, int)
    }
    tokens = np.setdiff1d(np.arange(plan.config.vocab_size), sorted(special))
    draw = np.random.default_rng(SEED)
    rows: list[tuple[np.ndarray, ...]] = []
    for _ in range(ROWS):
        row = draw.choice(tokens, (1, plan.length))
        if plan.config.is_encoder_decoder:
            answer = draw.choice(tokens, (1, plan.length))
            answer[:, 0] = plan.config.start_token
            rows.append((row, answer))
        else:
            rows.append((row,))
    return rows


def _transformers_logits(
    plan: Plan, rows: list[tuple[np.ndarray, ...]]
) -> tuple[list[np.ndarray], tuple[str, ...], str | None]:
    """Returns `[K V]` of every row in float32 with eager attention on CPU; what `Comparison` calls missing and told."""
    import torch
    import transformers

    pairs = plan.config.is_encoder_decoder
    make = transformers.AutoModelForSeq2SeqLM if pairs else transformers.AutoModelForCausalLM
    with _quiet(transformers), tempfile.TemporaryDirectory() as words:
        # Its config.json is the plan's: the whole one, or that of the first layers.
        (pathlib.Path(words) / "config.json").write_text(json.dumps(plan.folder.config))
        config = transformers.AutoConfig.from_pretrained(words, trust_remote_code=False)
        loaded: Any = make.from_pretrained(
            plan.folder.path,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, info = loaded
        ignored = family_of(plan.folder.config, where=plan.folder.path).ignored
        wanted = [str(name) for name in (*info["missing_keys"], *info["mismatched_keys"])]
        missing = tuple(sorted(name for name in wanted if not any(fnmatch(name, pattern) for pattern in ignored)))
        model.eval()
        told = _tell_ties(model, plan.folder.config) if pairs else None
        logits = []
        with torch.inference_mode():
            for row in rows:
                names = ("input_ids", "decoder_input_ids") if pairs else ("input_ids",)
                given: dict[str, Any] = {name: torch.tensor(tokens) for name, tokens in zip(names, row, strict=True)}
                if not pairs:
                    given["logits_to_keep"] = min(plan.length, COMPARED)
                logits.append(model(**given, use_cache=False).logits[0].float().numpy())
    return logits, missing, told


def _tell_ties(model: Any, hf_config: dict[str, Any]) -> str | None:
    """Tells transformers whether an encoder-decoder's head is tied; returns what was told, None where it knew.

    transformers 5 takes every head of the T5 line for tied, and so scales what umT5's reads; 4 believes config.json.
    """
    ties = hf_config.get("tie_word_embeddings")
    if ties is None or model.config.tie_word_embeddings == ties:
        return None
    model.config.tie_word_embeddings = ties
    return f"tie_word_embeddings = {json.dumps(ties)}, which this transformers does not read of an encoder-decoder"


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Leaves out progress bars and warnings of transformers, which here are about what is done on purpose."""
    logging = transformers.utils.logging
    level, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if has_bar:
            logging.enable_progress_bar()


def _load(plan: Plan) -> nnx.Module:
    """Returns our model in float32."""
    family = family_of(plan.folder.config, where=plan.folder.path)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: family.build(plan.config, key=jax.random.key(0))))
    return nnx.merge(graph, load_params(plan.folder, abstract))


def _nudge(model: Any) -> None:
    """Moves every number of the embedding by its last bit, up or down, in place."""
    embedding = model.embed.embedding
    value = embedding.get_value()
    up = jax.random.bernoulli(jax.random.key(SEED), shape=value.shape)
    embedding.set_value(jnp.nextafter(value, jnp.where(up, jnp.inf, -jnp.inf)))


def _jaxtune_logits(plan: Plan, model: Any, rows: list[tuple[np.ndarray, ...]]) -> list[np.ndarray]:
    """Returns `[K V]` of every row in float32, with the reference's attention."""
    config = plan.config
    attention = t5_layers.plain if config.is_encoder_decoder else xla
    kept = plan.length if config.is_encoder_decoder else min(plan.length, COMPARED)
    positions, ones = np.arange(plan.length, dtype=np.int32)[None], np.ones((1, plan.length), np.int32)

    def logits(row: tuple[jax.Array, ...]) -> jax.Array:
        arrays = [array for tokens in row for array in (tokens, positions, ones)]
        hidden = model(*arrays, compute_dtype=jnp.float32, attention=attention).hidden
        return model.logits(hidden[:, -kept:])[0]

    sides = tuple(jnp.asarray(np.stack(side), jnp.int32) for side in zip(*rows, strict=True))  # [rows 1 T] of each
    with jax.default_matmul_precision("highest"):  # or a GPU would round what it multiplies
        return list(np.asarray(jax.lax.map(logits, sides)))
