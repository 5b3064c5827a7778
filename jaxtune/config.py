"""Every key of a run, its type, its default and its meaning; defaults live here and nowhere else.

Only pydantic is imported, so that a command can check its configuration in a fraction of a second.
How YAML text and `key=value` words become a `Config` stands in `decode.py`.
"""

from collections.abc import Set
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
# Of an encoder-decoder's rows where the configuration says nothing: encoder and decoder, as FLAN-T5 was tuned.
PAIR_LENGTHS = (2048, 512)


class Section(BaseModel):
    """A frozen group of keys; unknown keys are errors and no value changes its type silently."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """Which model is tuned, and how it is computed."""

    path: str = Field(description="Hugging Face folder (local, gs://, s3://) or hub id")
    revision: str | None = Field(None, description="commit, tag or branch of a hub id")
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="random draws the weights from the seed; the folder then needs no safetensors"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="dtype of the computation; auto is bfloat16 on TPU and GPU, float32 on CPU"
    )
    param_dtype: Literal["auto", "file", "float32", "bfloat16"] = Field(
        "auto",
        description="dtype that weights are held in; auto is float32 for trained weights and `dtype` for frozen ones; "
        "file keeps each tensor's own",
    )
    attention: Literal["auto", "xla", "splash", "tokamax"] = Field("auto", description="attention kernel")
    remat: Literal["auto", "none", "dots", "minimal", "mid", "full"] = Field(
        "auto", description="what the backward pass recomputes; auto is none on CPU and minimal elsewhere"
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="dropout inside an encoder-decoder while it is trained; adapters have tuning.dropout"
    )


class TuningConfig(Section):
    """What is trained."""

    method: Literal["lora", "full"] = "lora"
    rank: Positive = Field(16, description="LoRA rank r")
    alpha: Annotated[float, Field(gt=0)] = Field(32.0, description="LoRA update is scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="dropout on the adapters' input")
    targets: str | tuple[str, ...] = Field(
        "all-linear", description="all-linear, or names (q_proj, ...) of the linear layers that get an adapter"
    )
    loss_weighting: Literal["token", "example"] = Field(
        "token", description="token: every trained token counts the same; example: every example counts the same"
    )
    routers: Literal["train", "freeze"] = Field(
        "train", description="full tuning of a mixture of experts: whether its routers are trained (LoRA freezes them)"
    )
    load_balance: Literal["auto"] | Annotated[float, Field(ge=0.0)] = Field(
        "auto",
        description="coefficient of the load-balance loss; auto is config.json's router_aux_loss_coef where it says "
        "output_router_logits, else 0, as transformers trains",
    )
    router_z: Annotated[float, Field(ge=0.0)] = Field(0.0, description="coefficient of the routers' z-loss")


class MixingConfig(Section):
    """How the members of a list of sources share the draws."""

    rates: Literal["auto", "epochs", "weights", "proportional", "temperature", "equal"] = Field(
        "auto",
        description="epochs: rows x epochs, so that each row is seen exactly its epochs; weights: as given; "
        "proportional, temperature: number of examples, scaled, capped, then to the power 1 / temperature; equal; "
        "auto: weights where they are given, else epochs",
    )
    scale: Annotated[float, Field(gt=0)] = Field(1.0, description="proportional, temperature: examples times this")
    cap: Annotated[float, Field(gt=0)] | None = Field(
        None, description="proportional, temperature: no rate is larger; applied after scale, before temperature"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="1 is proportional, infinity is equal")
    unit: Literal["examples", "tokens"] = Field("examples", description="what the shares count")
    tags: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=dict, description="share of all draws that sources with a tag get, e.g. {cot: 0.1}"
    )


class TableConfig(Section):
    """A table of tasks: one source for each of its rows, whose {columns} fill the pattern of the source's `path`."""

    path: str = Field(description="JSON lines or CSV, e.g. builtin:flan2022/task_sizes.csv")
    id: str = Field(description="name of each source, e.g. {task}")
    where: dict[str, Any] = Field(default_factory=dict, description="only rows with these values: {source: T0}")
    examples: str | None = Field(None, description="column with the number of examples")
    weight: str | None = Field(None, description="column with the weight of each source among the others of the table")


Style = Literal[
    "zero_shot",
    "few_shot",
    "zero_shot_no_options",
    "few_shot_no_options",
    "cot",
    "cot_few_shot",
    "inverted",
    "inverted_few_shot",
]
FORMATS = (
    "auto",
    "alpaca",
    "messages",
    "sharegpt",
    "prompt_completion",
    "text",
    "oasst",
    "dolly",
    "orca",
    "self_instruct",
    "cot",
    "natural_instructions",
    "lima",
    "fields",
)


class SourceConfig(Section):
    """One set of rows, a group of sources mixed among themselves, or a table of sources."""

    path: str | None = Field(None, description="file, folder, glob, gs://, s3:// or hub dataset id; may name {root}")
    id: str | None = Field(None, description="its name in plans and logs; default from its path")
    sources: tuple["SourceConfig", ...] = Field((), description="makes this a group: members instead of a path")
    mixing: MixingConfig = Field(MixingConfig(), description="how a group's or a table's members share its draws")
    table: TableConfig | None = Field(None, description="a source for each row of a table; path has its {columns}")
    revision: str | None = None
    name: str | None = Field(None, description="configuration name of a hub dataset")
    split: str | None = Field(None, description="split of a dataset; train where there is one")
    format: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:\w+$")] | Literal[FORMATS] = Field(  # type: ignore[valid-type]
        "auto", description="layout of the rows, or module:function that makes conversations of a row"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="of the format: docs/data-formats.md lists them")
    columns: dict[str, str] = Field(
        default_factory=dict, description="field of the format -> column of the rows, e.g. {prompt: question}"
    )
    template: str | None = Field(None, description="overrides data.template for this source")
    system: str | None = Field(None, description="system message for rows that have none")
    task: str | None = Field(None, description="its name in tables of templates and clusters; default: its id")
    templates: str | tuple[dict[str, Any], ...] | None = Field(
        None, description="phrasings of the task: a promptsource YAML, a table (YAML, JSONL), builtin:NAME, or inline"
    )
    each_template: bool = Field(False, description="a source for each of the templates, as T0 mixes them")
    slots: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="values that fill {name} in templates, chosen anew for each example"
    )
    styles: dict[Style, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="shares of the styles, e.g. {zero_shot: 0.5, few_shot: 0.5}"
    )
    shots: Positive = Field(5, description="exemplars of a few-shot prompt, at most")
    shot_tokens: Positive = Field(
        1920, description="tokens that a few-shot prompt may have; exemplars are pruned to fit"
    )
    weight: Annotated[float, Field(gt=0)] | None = Field(
        None, description="share of draws relative to the other sources; all or none have one"
    )
    cap: Annotated[float, Field(gt=0)] | None = Field(None, description="instead of mixing.cap for this source")
    epochs: Annotated[float, Field(gt=0)] = Field(
        1.0, description="times this source is seen while the others are seen once (without weights)"
    )
    examples: Positive | None = Field(None, description="how many it has; plans then need not read it")
    tags: tuple[str, ...] = Field((), description="for shares and losses by tag; a group's tags are its members' too")
    cluster: str | None = Field(None, description="its task cluster, for data.hold_out; default: by its task")
    order: str = Field("shuffle", description="shuffle, file, length, or a column with a score; -length: longest first")


class UntilConfig(Section):
    """Where a phase ends; exactly one key is given."""

    steps: Positive | None = None
    tokens: Positive | None = Field(None, description="tokens of data, padding not counted")
    draws: Positive | None = Field(None, description="examples drawn")


class PhaseConfig(Section):
    """A stretch of the run with its own mixture."""

    until: UntilConfig | None = Field(None, description="where it ends; only the last phase has none")
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="weights of the top sources by id; those not named get none"
    )
    tags: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=dict, description="instead of data.mixing.tags in this phase"
    )


class HoldOutConfig(Section):
    """Task clusters that are evaluated on and never trained on."""

    clusters: tuple[str, ...] = Field((), description="names in the table, or of sources' `cluster`")
    table: str = Field("builtin:flan2021/clusters.json", description="JSON of cluster -> task names")


class DataConfig(Section):
    """What the model learns from, and how rows become tokens."""

    train: tuple[SourceConfig, ...] = ()
    eval: tuple[SourceConfig, ...] = ()
    eval_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="share of each training source's rows held out for evaluation, drawn from the seed"
    )
    root: str | None = Field(None, description="what {root} stands for in paths")
    missing: Literal["error", "skip"] = Field(
        "error", description="skip leaves out sources whose files are not there, and says so"
    )
    mixing: MixingConfig = Field(MixingConfig(), description="how the sources of data.train share the draws")
    phases: tuple[PhaseConfig, ...] = Field((), description="mixtures one after another")
    stop: Literal["plan", "first_exhausted", "all_exhausted"] = Field(
        "plan",
        description="end of an epoch where shares decide: after as many draws as there are examples, or when the first "
        "or the last source has been seen",
    )
    hold_out: HoldOutConfig = HoldOutConfig()
    template: str = Field(
        "auto",
        description="auto (the tokenizer's own), alpaca, chatml, gemma, llama2, llama3, mistral, phi, plain, qwen3, "
        "vicuna, zephyr, or a Jinja file",
    )
    max_length: Positive | None = Field(
        None,
        description="tokens per row (T); default min(2048, the model's positions), of an encoder-decoder's answers 512",
    )
    encoder_length: Positive | None = Field(
        None, description="encoder-decoder: tokens per row that the encoder reads (S); default 2048"
    )
    packing: bool = Field(True, description="several examples a row, isolated from one another")
    train_on: Literal["assistant", "last", "all"] = "assistant"
    reasoning: Literal["keep", "drop", "last"] = Field(
        "keep", description="<think> blocks of answers: kept, dropped, or kept in the last answer only"
    )
    overlong: Literal["drop", "truncate_turns", "truncate_right", "split", "error"] = "drop"
    on_bad_row: Literal["error", "skip", "quarantine"] = "error"
    max_lost: Fraction | None = Field(None, description="stop when a larger share of tokens than this is lost")
    window: Literal["auto"] | Annotated[int, Field(ge=1, le=65536)] = Field(
        "auto", description="draws packed together (W); auto makes about 64 rows of them, 256 to 4096 draws"
    )
    lanes: Literal["auto"] | Positive = Field("auto", description="independent streams of windows in one batch")
    workers: Annotated[int, Field(ge=0)] = Field(0, description="processes that render and pack; 0 uses threads")


class OptimizerConfig(Section):
    """How weights are updated."""

    name: str = Field("adamw", description="any optimizer of optax by its name")
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="peak learning rate; default 2e-4 (lora), 1e-5 (full)"
    )
    schedule: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "cosine"
    warmup_ratio: Fraction = Field(0.03, description="share of the steps, rounded up, that the rate climbs over")
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(None, description="instead of warmup_ratio")
    decay_ratio: Fraction = Field(0.2, description="wsd: share of the steps, at the end, that the rate falls over")
    final_ratio: Fraction = Field(0.1, description="last learning rate over the peak (linear, cosine, wsd)")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="applied to matrices, not norms or biases")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(1.0, description="clip the global gradient norm")
    options: dict[str, Any] = Field(default_factory=dict, description="further arguments of the optax optimizer")


class TrainConfig(Section):
    """How long, in what portions."""

    epochs: Annotated[float, Field(gt=0)] = 3.0
    steps: Annotated[int, Field(ge=0)] | None = Field(None, description="optimizer updates; wins over epochs")
    batch_rows: Positive = Field(8, description="rows of max_length tokens in one update, over all devices")
    microbatch_rows: Positive | None = Field(
        None, description="rows computed at once; the rest of the batch is accumulated; default: the whole batch"
    )
    max_bad_steps: Positive = Field(5, description="stop after so many updates in a row with a NaN or infinity")
    preempted_exit_code: Annotated[int, Field(ge=1, le=255)] = 143


class MeshConfig(Section):
    """Devices along each axis; one axis may be -1, meaning all that are left."""

    slice: Annotated[int, Field(ge=-1)] = 1
    data: Annotated[int, Field(ge=-1)] = 1
    fsdp: Annotated[int, Field(ge=-1)] = -1
    tensor: Annotated[int, Field(ge=-1)] = 1
    context: Annotated[int, Field(ge=-1)] = 1
    expert: Annotated[int, Field(ge=-1)] = 1


class CheckpointConfig(Section):
    """When state is saved, and how a run goes on."""

    every_steps: Positive | None = Field(
        500, description="null saves at the end, and whenever the held-out loss is the best so far"
    )
    keep: Positive = Field(2, description="newest checkpoints kept, besides the best")
    resume: Literal["auto", "never"] = Field("auto", description="auto goes on where the folder's run stopped")


class EvalConfig(Section):
    """Held-out loss during training."""

    every_steps: Positive | None = Field(None, description="default: ten times over the run, and at its end")
    max_batches: Positive | None = Field(None, description="at most so many batches each time")


class LogConfig(Section):
    """What a run tells, and where."""

    every_steps: Positive = 10
    tensorboard: bool = True
    wandb: str | None = Field(None, description="Weights & Biases project; nothing is sent without it")


class ExportConfig(Section):
    """What is written when training ends."""

    adapter: bool = Field(True, description="LoRA runs: OUTPUT/adapter, a PEFT folder")
    hf: bool = Field(True, description="OUTPUT/hf, the full or merged model folder")


class Config(Section):
    """A whole run."""

    output: str = Field(description="folder for everything the run writes")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: ModelConfig
    tuning: TuningConfig = TuningConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        problems = []
        if not self.data.train and self.train.steps != 0:
            problems.append("data.train: found no source; expected at least one, e.g. data.train.0.path=FILE.jsonl")
        for key, sources in (("data.train", self.data.train), ("data.eval", self.data.eval)):
            problems += _problems_of(sources, key)
        problems += _weight_problems(self.data.train, "data.train", self.data.mixing)
        problems += _unread_by_evaluation(self.data.eval, "data.eval")
        problems += _phase_problems(self.data.phases, steps=self.train.steps)
        rows, micro = self.train.batch_rows, self.train.microbatch_rows
        if micro is not None and rows % micro:
            problems.append(f"train.microbatch_rows: found {micro}; expected a divisor of train.batch_rows = {rows}")
        if isinstance(self.data.lanes, int) and rows % self.data.lanes:
            problems.append(f"data.lanes: found {self.data.lanes}; expected a divisor of train.batch_rows = {rows}")
        axes = self.mesh.model_dump()
        if sum(size == -1 for size in axes.values()) > 1:
            problems.append(f"mesh: found {axes}; expected at most one axis with -1")
        empty = [axis for axis, size in axes.items() if size == 0]
        problems += [f"mesh.{axis}: found 0; expected a size of at least 1, or -1" for axis in empty]
        if self.data.eval and self.data.eval_fraction:
            problems.append("data.eval_fraction: found beside data.eval; give one of the two")
        if self.data.hold_out.clusters and self.data.eval_fraction:
            problems.append("data.eval_fraction: found beside data.hold_out.clusters; give one of the two")
        if self.data.phases and self.data.stop != "plan":
            problems.append(f"data.stop: found {self.data.stop} beside data.phases; expected plan, or no phases")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: as asked for, or the method's default."""
        if self.optimizer.learning_rate is not None:
            return self.optimizer.learning_rate
        return {"lora": 2e-4, "full": 1e-5}[self.tuning.method]


def _problems_of(sources: tuple[SourceConfig, ...], key: str) -> list[str]:
    """What is wrong with sources, and with the members of groups among them."""
    out = []
    for i, source in enumerate(sources):
        here = f"{key}.{i}"
        if source.sources and (source.path is not None or source.table is not None):
            what = "path" if source.path is not None else "table"
            out.append(f"{here}: found both sources and {what}; expected a group of sources, or one with a {what}")
        elif not source.sources and source.path is None:
            out.append(f"{here}.path: missing; expected {SourceConfig.model_fields['path'].description}, or sources")
        if source.table is None and not source.sources and source.mixing != MixingConfig():
            out.append(f"{here}.mixing: found on a single source; expected on a group or a table, whose members share")
        if (
            source.table is not None
            and source.table.weight is not None
            and source.mixing.rates not in ("auto", "weights")
        ):
            out.append(f"{here}.mixing.rates: found {source.mixing.rates} beside table.weight; remove one of the two")
        for column, wanted in source.table.where.items() if source.table is not None else ():
            inside = wanted if isinstance(wanted, list | tuple) else (wanted,)
            if any(isinstance(value, dict | list | tuple) for value in inside):
                out.append(f"{here}.table.where.{column}: found {wanted!r}; expected a value, or a list of values")
        if source.sources and source.examples is not None:
            out.append(f"{here}.examples: found on a group; expected on its members")
        if source.each_template and source.templates is None:
            out.append(f"{here}.each_template: found without templates; set {here}.templates")
        if source.sources:
            out += _problems_of(source.sources, f"{here}.sources")
            out += _weight_problems(source.sources, f"{here}.sources", source.mixing)
    return out


def _weight_problems(sources: tuple[SourceConfig, ...], key: str, mixing: MixingConfig) -> list[str]:
    """Weights must be on all sources of a list or none, and where the rule wants them."""
    missing = ", ".join(str(i) for i, source in enumerate(sources) if source.weight is None)
    some = any(source.weight is not None for source in sources)
    where = key.removesuffix(".sources") if key.endswith(".sources") else "data"
    if missing and (some or (mixing.rates == "weights" and sources)):
        return [f"{key}: sources {missing} have no weight; give every source one, or none"]
    if some and mixing.rates not in ("auto", "weights"):
        return [f"{where}.mixing.rates: found {mixing.rates} beside weights; remove one of the two"]
    by_size = mixing.rates in ("proportional", "temperature")
    unread = [k for k in ("cap", "scale", "temperature") if getattr(mixing, k) != MixingConfig.model_fields[k].default]
    if unread and not by_size:
        return [f"{where}.mixing.{unread[0]}: only read when mixing.rates is proportional or temperature"]
    capped = [i for i, source in enumerate(sources) if source.cap is not None]
    if capped and not by_size:
        return [f"{key}.{capped[0]}.cap: only read when {where}.mixing.rates is proportional or temperature"]
    return []


_FOR_TRAINING = ("weight", "cap", "epochs", "order", "mixing", "cluster")


def _unread_by_evaluation(sources: tuple[SourceConfig, ...], key: str, outer: Set[str] = frozenset()) -> list[str]:
    """Keys of data.eval's sources that say how often or in which order rows are drawn; `outer`: a group's styles."""
    out = []
    reads_once = "evaluation reads every row once, so remove it (it is for data.train)"
    for i, source in enumerate(sources):
        here = f"{key}.{i}"
        for name in _FOR_TRAINING:
            value = getattr(source, name)
            if value != SourceConfig.model_fields[name].default:
                told = value.model_dump(exclude_defaults=True) if isinstance(value, MixingConfig) else value
                out.append(f"{here}.{name}: found {told}; {reads_once}")
        if source.table is not None and source.table.weight is not None:
            out.append(f"{here}.table.weight: found {source.table.weight}; {reads_once}")
        if len(set(source.styles.values())) > 1:
            shares = dict.fromkeys(source.styles, 1)
            out.append(
                f"{here}.styles: found {source.styles}; evaluation reads every row in each style, whatever their "
                f"shares, so give equal ones, e.g. {shares}"
            )
        styles = source.styles.keys() if "styles" in source.model_fields_set else outer
        if not any("few_shot" in style for style in _styles_below(source, styles)):
            for name in ("shots", "shot_tokens"):
                value = getattr(source, name)
                if value != SourceConfig.model_fields[name].default:
                    out.append(f"{here}.{name}: found {value}; no few-shot style here reads it, so remove it")
        out += _unread_by_evaluation(source.sources, f"{here}.sources", styles)
    return out


def _styles_below(source: SourceConfig, styles: Set[str]) -> set[str]:
    """The styles of a source, or of a group's members, which have the group's where they name none."""
    if not source.sources:
        return set(styles)
    return {
        style
        for member in source.sources
        for style in _styles_below(member, member.styles.keys() if "styles" in member.model_fields_set else styles)
    }


def _phase_problems(phases: tuple[PhaseConfig, ...], *, steps: int | None) -> list[str]:
    """Every phase but the last ends somewhere, each after the one before it."""
    out, last = [], {"steps": 0, "tokens": 0, "draws": 0}
    for i, phase in enumerate(phases):
        here, given = f"data.phases.{i}", {}
        if phase.until is not None:
            given = {key: value for key, value in phase.until.model_dump().items() if value is not None}
        if i == len(phases) - 1:
            if phase.until is not None:
                out.append(f"{here}.until: found on the last phase, which goes on to the end; remove it")
            continue
        if len(given) != 1:
            found = ", ".join(given) or "none"
            out.append(f"{here}.until: found {found}; expected exactly one of steps, tokens, draws")
            continue
        kind, value = next(iter(given.items()))
        if value <= last[kind]:
            out.append(f"{here}.until.{kind}: found {value}; expected more than the phase before, {last[kind]}")
        last[kind] = value
        if kind != "draws" and steps is None:
            out.append(f"{here}.until.{kind}: needs train.steps, since the length of the run depends on it")
    return out


# Outside these a value still runs, with a warning; docs/recipes.md says where they come from.
USUAL_RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "lora": {"learning_rate": (1e-5, 2e-3), "tuning.rank": (4, 256), "train.epochs": (1, 10)},
    "full": {"learning_rate": (1e-6, 1e-3), "train.epochs": (1, 10)},
}


def unusual_values(config: Config) -> list[str]:
    """Sentences about values outside the field's usual range; empty when there are none."""
    values = {
        "learning_rate": config.learning_rate,
        "tuning.rank": float(config.tuning.rank),
        "train.epochs": float(config.train.epochs),
    }
    return [
        f"{key} = {values[key]:g} is outside the usual range for {config.tuning.method}: {low:g} to {high:g}"
        for key, (low, high) in USUAL_RANGES[config.tuning.method].items()
        if not low <= values[key] <= high
    ]
