"""Whether and how a folder is supported: what was read of it, tensor by tensor, and the proof by its own weights."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from typing import Any

import fsspec
import jax
from flax import nnx

from jaxtune import adapters, fitting, parity
from jaxtune.convert.folder import HFFolder, open_folder
from jaxtune.convert.hf import leaf_shape, name_table, variables_of
from jaxtune.describing import Facts, describe, line, lines, some
from jaxtune.fitting import NotCheckedError, Plan
from jaxtune.models.family import Family
from jaxtune.models.registry import family_of
from jaxtune.opening import find
from jaxtune.parity import Comparison

Say = Callable[[str], None]


@dataclass(frozen=True)
class Tensors:
    """The folder's tensors by name.

    Attributes:
        matching: are read into a parameter.
        missing: name -> the shape that config.json asks for.
        unexpected: are no tensors of a model with this config.json.
        misshapen: name -> (shape found, shape expected).
        copies: hold a parameter a second time (a tied head): never read, written on export.
        ignored: belong to no text model (an image tower, buffers): copied on export.
        dtypes: dtype -> how many.
    """

    files: int
    matching: list[str] = field(default_factory=list)
    missing: dict[str, list[int]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    misshapen: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    copies: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    dtypes: dict[str, int] = field(default_factory=dict)

    @property
    def fit(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen)


@dataclass
class Report:
    """What was found, as `--json` writes it.

    Attributes:
        problems: why the folder is not supported; empty when it is.
        targets: linear layers that may have an adapter, by the name that `tuning.targets` takes.
        all_linear: those that `all-linear` means.
        attention: kernel -> where it runs; `no_attention`: kernel -> why not.
        parity: what was compared and found, or why it was not.
        at_parity: None where it was not checked.
    """

    folder: str
    adapter: str | None = None
    problems: list[str] = field(default_factory=list)
    model_type: str | None = None
    architecture: str | None = None
    model: Facts = field(default_factory=dict)
    tensors: Tensors | None = None
    targets: list[str] = field(default_factory=list)
    all_linear: list[str] = field(default_factory=list)
    attention: dict[str, str] = field(default_factory=dict)
    no_attention: dict[str, str] = field(default_factory=dict)
    parity: Facts = field(default_factory=dict)
    at_parity: bool | None = None

    @property
    def is_fine(self) -> bool:
        """Whether the folder is supported, and at parity where that was checked."""
        return not self.problems and self.at_parity is not False

    def as_json(self) -> dict[str, Any]:
        return {"supported": not self.problems, **asdict(self)}


def check(path: str, *, length: int | None = None, say: Say = print) -> Report:
    """Checks a folder and says what it finds as it finds it.

    Args:
        path: a Hugging Face folder, a hub id, a run (its `hf`), or an adapter (its base).
        length: tokens a row of the comparison; None chooses.

    Raises:
        ValueError: nothing there, or a length that the model does not have.
    """
    place = find(path)
    report = Report(place.base, adapter=place.adapter.folder.path if place.adapter is not None else None)
    say(line("folder", place.base + (f", the base of the adapter {report.adapter}" if report.adapter else "")))
    try:
        folder = _open(place.base)
        family, config, model = _read(folder)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
        report.problems.append(_refusal(place.base, error))
        _say_problems(report, say)
        return report
    _describe(report, folder, family, config, model, say)
    if folder.tensors:
        report.tensors = compare_tensors(folder, family, config, model)
        _say_tensors(report.tensors, folder, say)
        if not report.tensors.fit:
            report.problems.append(_misfit(folder, report.tensors))
    _say_tuning(report, family, config, say)
    if report.problems:
        _say_problems(report, say)
        return report
    say(line("supported", "yes" if folder.tensors else "yes, as far as config.json says"))
    if folder.tensors:
        _prove(report, folder, length, say)
    else:
        report.parity = {"checked": False, "reason": "the folder has no weights"}
        say(line("parity", "not checked: the folder has no weights"))
    return report


# --- The folder -------------------------------------------------------------------------------------------------------


def _open(path: str) -> HFFolder:
    """Opens a folder that may hold config.json alone, but no pickled weights in place of the others."""
    folder = open_folder(path, needs_weights=False)
    fs, root = fsspec.core.url_to_fs(path)
    has_pickles = any(entry.endswith((".bin", ".pth", ".pt")) for entry in fs.ls(root, detail=False))
    return open_folder(path) if has_pickles and not folder.tensors else folder


def _read(folder: HFFolder) -> tuple[Family, Any, nnx.Module]:
    """Returns the folder's family, its configuration and its module as shapes."""
    family = family_of(folder.config, where=folder.path)
    config = family.read_config(folder.config)
    return family, config, nnx.eval_shape(lambda: family.build(config, key=jax.random.key(0)))


def _refusal(path: str, error: Exception) -> str:
    """Returns what a reader says of the folder, or that it met a value which it did not expect at all."""
    if isinstance(error, ValueError) and (path in str(error) or "config.json" in str(error)):
        return str(error)
    return (
        f"{path}: config.json has a value of a kind that no model of this family has ({type(error).__name__}: "
        f"{error}); take the model's own config.json"
    )


def _describe(report: Report, folder: HFFolder, family: Family, config: Any, model: nnx.Module, say: Say) -> None:
    report.model_type, report.architecture = family.model_type, family.architecture
    report.model = describe(config, parameters=adapters.count(nnx.state(model)))
    say(line("model_type", f"{family.model_type}, read as {family.architecture}"))
    named = folder.config.get("architectures")
    if isinstance(named, list) and named and family.architecture not in named:
        say(line("", f"config.json names {', '.join(map(str, named))}; its weights are read as that of the family"))
    for text in lines(report.model):
        say(text)


def compare_tensors(folder: HFFolder, family: Family, config: Any, model: nnx.Module) -> Tensors:
    """Compares the folder's tensors with those that its config.json asks for, from their headers alone."""
    table = name_table(family, config, folder.tensors)
    variables = variables_of(nnx.state(model))
    found = Tensors(len(folder.headers), dtypes=dict(Counter(info.dtype for info in folder.tensors.values())))
    for name, place in table.items():
        info = folder.tensors.get(name)
        if place.optional:
            found.copies.extend([name] if info is not None else [])
            continue
        expected = leaf_shape(place, variables[place.path])
        if info is None:
            found.missing[name] = list(expected)
        elif info.shape != expected:
            found.misshapen[name] = (list(info.shape), list(expected))
        else:
            found.matching.append(name)
    for name in folder.tensors:
        if name not in table:
            is_ignored = any(fnmatch(name, pattern) for pattern in family.ignored)
            (found.ignored if is_ignored else found.unexpected).append(name)
    return found


def _say_tensors(tensors: Tensors, folder: HFFolder, say: Say) -> None:
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in sorted(tensors.dtypes.items()))
    files = f"{tensors.files} file{'s' if tensors.files != 1 else ''}"
    say(
        line("tensors", f"{len(folder.tensors)} in {files} ({dtypes}); {len(tensors.matching)} match by name and shape")
    )
    for names, text in (
        (tensors.copies, "second copies of a parameter, never read, written on export"),
        (tensors.ignored, "no part of the text model, copied on export"),
        (tensors.unexpected, "not of this architecture"),
    ):
        if names:
            say(line("", f"{len(names)} {text}: {some(names, most=4 if names is tensors.ignored else 12)}"))
    if tensors.missing:
        say(line("", f"{len(tensors.missing)} missing: {some([f'{n} {s}' for n, s in tensors.missing.items()])}"))
    if tensors.misshapen:
        told = [f"{name} {found} instead of {wanted}" for name, (found, wanted) in tensors.misshapen.items()]
        say(line("", f"{len(told)} of another shape: {some(told)}"))


def _misfit(folder: HFFolder, tensors: Tensors) -> str:
    counts = (
        (len(tensors.missing), "missing"),
        (len(tensors.unexpected), "not of this architecture"),
        (len(tensors.misshapen), "of another shape"),
    )
    told = ", ".join(f"{count} {text}" for count, text in counts if count)
    names = [*tensors.missing, *tensors.unexpected, *tensors.misshapen]
    return (
        f"{folder.path}: the weights do not fit config.json ({told}): {some(names, most=3)}. Download the "
        "folder again, or correct config.json. A model whose layers differ from its family's cannot be tuned under it"
    )


# --- How it can be tuned ----------------------------------------------------------------------------------------------


def _say_tuning(report: Report, family: Family, config: Any, say: Say) -> None:
    def adapted() -> nnx.Module:
        model = family.build(config, key=jax.random.key(0))
        report.targets = list(dict.fromkeys(layer.name for _, layer in adapters.linear_layers(model)))
        key, targets = jax.random.key(0), adapters.ALL_LINEAR
        report.all_linear = list(adapters.attach(model, rank=1, alpha=1.0, dropout=0.0, targets=targets, key=key))
        return model

    nnx.eval_shape(adapted)
    others = [name for name in report.targets if name not in report.all_linear]
    say(line("tuning", f"lora on {', '.join(report.all_linear)} (tuning.targets=all-linear)"))
    if others:
        say(line("", f"lora by name on {', '.join(others)} too"))
    if not config.is_encoder_decoder and config.experts is not None and config.experts.fused:
        say(
            line(
                "", "no lora on experts: one tensor holds all of a layer's, for which PEFT has no adapter of this form"
            )
        )
    say(line("", "full (tuning.method=full)"))
    _kernels(report, config)
    told = [f"{name} ({where})" for name, where in report.attention.items()]
    say(line("attention", ", ".join(told)))
    for name, why in report.no_attention.items():
        say(line("", f"no {name}: {why}"))


def _kernels(report: Report, config: Any) -> None:
    """Says which values of `model.attention` work; `models.attention` and `assembly.resolve_attention` refuse them."""
    report.attention["xla"] = "any device"
    if config.is_encoder_decoder:
        why = "the scores have biases for distances, which it does not take"
        report.no_attention = {"splash": why, "tokamax": why}
        return
    report.attention["splash"] = "TPU"
    if config.sinks:
        report.no_attention["tokamax"] = "it has no attention sinks"
    else:
        report.attention["tokamax"] = "GPU"


# --- The proof --------------------------------------------------------------------------------------------------------


def _prove(report: Report, folder: HFFolder, length: int | None, say: Say) -> None:
    try:
        plan = fitting.plan(folder, length=length)
        _say_plan(plan, say)
        found = parity.run(plan)
    except NotCheckedError as error:
        report.parity = {"checked": False, "reason": str(error)}
        say(line("parity", f"not checked: {error}"))
        return
    report.at_parity = found.is_at_parity
    report.parity = _as_facts(plan, found)
    _say_comparison(found, say)


def _say_plan(plan: Plan, say: Say) -> None:
    part = "all layers"
    if plan.layers < plan.all_layers:
        part = f"only the first {plan.layers} of {plan.all_layers} layers, which is what fits the memory"
    say(line("parity", f"{fitting.ROWS} rows of {plan.length:,} random tokens (seed {parity.SEED}), {part}"))
    say(
        line(
            "", f"about {fitting.gib(plan.needed)} of memory for one model at a time; {fitting.gib(plan.free)} are free"
        )
    )
    if plan.left_out:
        say(line("", f"not among these layers, so not checked: {', '.join(plan.left_out)}"))
    for far in plan.unreached:
        say(line("", f"not past {far:,} tokens, where this model changes; with time and memory: --length {far + 8}"))


def _say_comparison(found: Comparison, say: Say) -> None:
    say(line("", f"float32 on CPU, eager attention; {found.versions}"))
    base = f"{found.base_tolerance:.0e} times max(1, largest logit {found.largest_logit:.1f} / 10)"
    say(line("", f"largest difference {found.difference:.1e}; tolerance {found.tolerance:.1e}: {base}"))
    rows = ", ".join(f"{difference:.1e}" for difference in found.by_row)
    say(
        line(
            "",
            f"by row {rows}, at the last {found.compared} tokens of each; equal likeliest tokens {found.agreement:.2%}",
        )
    )
    if found.missing:
        say(line("", f"transformers misses tensors, and drew them: {some(found.missing)}"))
    if found.told:
        say(line("", f"transformers was told {found.told}"))
    if found.rounding is not None:
        say(line("", f"the last bit of the embedding alone moves the logits by {found.rounding:.1e}"))
    if found.is_rounding:
        say(line("", "the difference is over the tolerance, but no more than float32's rounding in this model"))
    if found.is_at_parity:
        say(line("at parity", "yes"))
        return
    say(line("at parity", "no"))
    if found.base_tolerance == parity.EXPERTS_TOLERANCE and min(found.by_row) <= found.tolerance:
        say(line("", "one row is: two experts of nearly the same score may have changed places in the other"))
    say(line("", "do not tune it before the reason is known; please report it with its config.json and these lines"))


def _as_facts(plan: Plan, found: Comparison) -> Facts:
    return {
        "checked": True,
        "layers": plan.layers,
        "all_layers": plan.all_layers,
        "left_out": list(plan.left_out),
        "rows": fitting.ROWS,
        "seed": parity.SEED,
        "length": plan.length,
        "not_past": list(plan.unreached),
        "bytes_needed": plan.needed,
        "bytes_free": plan.free,
        **{key: _finite(value) for key, value in asdict(found).items()},
        "tolerance": _finite(found.tolerance),
        "is_rounding": found.is_rounding,
    }


def _finite(value: Any) -> Any:
    """Returns what JSON can say: null for what is no number."""
    if isinstance(value, tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _say_problems(report: Report, say: Say) -> None:
    say(line("supported", "no"))
    for problem in report.problems:
        for text in problem.splitlines():
            say(line("", text))
