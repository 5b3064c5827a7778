"""The keys of `data`: sources, how they are mixed and worded, and what must hold among them."""

from collections.abc import Set
from typing import Annotated, Any, Literal

from pydantic import Field

from jaxtune.config_quality import DecontaminateConfig, Dedup, QualityConfig
from jaxtune.config_section import Fraction, Positive, Section

# Of an encoder-decoder's rows where the configuration says nothing: encoder and decoder, as FLAN-T5 was tuned.
PAIR_LENGTHS = (2048, 512)


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
    streaming: bool = Field(
        False, description="read the dataset as a stream: `jaxtune.prepare` writes its rows into the cache"
    )
    take: Positive | None = Field(None, description="so many rows of a stream, the first ones; default: all")
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
    quality: QualityConfig = QualityConfig()
    dedup: Dedup = Field(
        "keep",
        description="exact: of rows whose texts are the same but for case and white space, one is trained on; near: "
        "and of those that are nearly the same",
    )
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    verdicts: str | None = Field(
        None, description="file of verdicts saved from audit.html: rows dropped, or corrected, by hand"
    )
    window: Literal["auto"] | Annotated[int, Field(ge=1, le=65536)] = Field(
        "auto", description="draws packed together (W); auto makes about 64 rows of them, 256 to 4096 draws"
    )
    lanes: Literal["auto"] | Positive = Field("auto", description="independent streams of windows in one batch")
    workers: Annotated[int, Field(ge=0)] = Field(0, description="processes that render and pack; 0 uses threads")
    prepared: str = Field(
        "auto",
        description="where `jaxtune.prepare` puts packed windows and training looks for them: auto (this machine's "
        "cache), a folder, gs://, s3://, or off",
    )


def problems_of_data(data: DataConfig, *, steps: int | None) -> list[str]:
    """What does not fit together among the keys of `data`, a sentence for each; `steps` is train.steps."""
    out = []
    for key, sources in (("data.train", data.train), ("data.eval", data.eval)):
        out += _problems_of(sources, key)
    out += _weight_problems(data.train, "data.train", data.mixing)
    out += _unread_by_evaluation(data.eval, "data.eval")
    out += _phase_problems(data.phases, steps=steps)
    if data.eval and data.eval_fraction:
        out.append("data.eval_fraction: found beside data.eval; give one of the two")
    if data.hold_out.clusters and data.eval_fraction:
        out.append("data.eval_fraction: found beside data.hold_out.clusters; give one of the two")
    if data.phases and data.stop != "plan":
        out.append(f"data.stop: found {data.stop} beside data.phases; expected plan, or no phases")
    return out


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
        if source.sources and source.streaming:
            out.append(f"{here}.streaming: found on a group; expected on its members")
        if source.take is not None and not source.streaming:
            out.append(f"{here}.take: only read with streaming; set {here}.streaming=true, or remove it")
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
