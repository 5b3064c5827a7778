"""Logits of a folder's own weights by transformers and by jaxtune, compared, one of the two models in memory at a time.

T tokens a row, V vocabulary, K positions whose logits are compared.
"""

import contextlib
import gc
import json
import pathlib
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.convert.hf import load_params
from jaxtune.fitting import COMPARED, ROWS, NotCheckedError, Plan, has_experts, text_of
from jaxtune.models import t5_layers
from jaxtune.models.attention import xla
from jaxtune.models.registry import family_of

TOLERANCE = 1e-4
EXPERTS_TOLERANCE = 2e-4
# A difference over the tolerance is float32's own where a last bit of the embedding moves the logits as much. In every
# family's tiny model the difference was 0.8 to 1.9 times what such a bit did.
ROUNDINGS, MOST_TOLERANCES = 4, 10
SEED = 0


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
    base = EXPERTS_TOLERANCE if has_experts(plan.config) else TOLERANCE
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


def random_rows(plan: Plan) -> list[tuple[np.ndarray, ...]]:
    """Draws the rows: tokens `[1 T]`, for an encoder-decoder those of both sides; no token that means something."""
    words = {**plan.folder.config, **text_of(plan.folder.config)}
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
