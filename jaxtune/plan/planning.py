"""What `python -m jaxtune.plan` does: one plan, two side by side, or the best of many."""

import json
import time
from typing import Any, NamedTuple

import yaml
from etils import epath
from rich.console import Console

from jaxtune import choosing, hub, planned
from jaxtune.choosing import Choice, Ranked
from jaxtune.config import Config
from jaxtune.convert.folder import read_config
from jaxtune.cost_model.chips import CHIPS
from jaxtune.cost_model.topologies import Topology
from jaxtune.forecast import Forecaster
from jaxtune.plan import report
from jaxtune.plan.costing import GPU_KINDS, HLO_FILE, Plan, compile_plan, forecast_plan
from jaxtune.plan.devices import abstract_devices

OVERRIDES = "overrides.yaml"
SHOWN = 10  # ways that a search lists
SEARCH_SECONDS = 540.0  # in which a search may begin to compile another way
# Options of the TPU's compiler worth trying (docs/performance.md has what they gave); with them it takes longer.
OPTIONS = ({"xla_tpu_scoped_vmem_limit_kib": 65536},)
SLOWER = 2.0


class _Subject(NamedTuple):
    """A configuration on a topology: with lengths filled in; what forecasts it; devices to compile for, or none."""

    config: Config
    hf_config: dict[str, Any]
    where: str
    topology: Topology
    devices: list[Any]
    forecaster: Forecaster


def plan(config: Config, topology: Topology, *, price: float | None, hlo: str | None) -> Plan:
    """Plans one configuration, says what it found, and keeps it in OUTPUT/plan.json."""
    console = Console(soft_wrap=True)
    found = _plan(_subject(config, topology), hlo=hlo, console=console).priced(price)
    report.show(found, console)
    _keep(found, console)
    return found


def compare(configs: list[Config], names: list[str], topology: Topology, *, price: float | None) -> list[Plan]:
    """Plans two configurations and shows them in two columns; each keeps its own plan.json."""
    console = Console(soft_wrap=True)
    console.print(topology.describe(), highlight=False)
    plans = []
    for config in configs:
        plans.append(_plan(_subject(config, topology), hlo=None, console=console).priced(price))
        _keep(plans[-1], console)
    report.show_side_by_side(plans, names, console)
    return plans


def search(config: Config, topology: Topology, *, price: float | None, hlo: str | None, overrides: str | None) -> Plan:
    """Finds the best way to compute an update, says so, and writes it as YAML that goes behind the configuration."""
    console = Console(soft_wrap=True)
    subject = _subject(_opened(config), topology)
    ranked = _ranked(subject, choosing.open_keys(subject.config))
    console.print(f"{len(ranked):,} ways divide; the best by forecast:", highlight=False)
    for one in choosing.different(ranked, SHOWN):
        console.print(f"  {_told(one, subject)}", highlight=False)
    best, choice = _best(subject, ranked, hlo=hlo, console=console)
    best = best.priced(price)
    report.show(best, console)
    _keep(best, console)
    path = overrides or str(epath.Path(config.output) / OVERRIDES)
    epath.Path(path).write_text(_overrides(best))
    kept = choosing.remember(_key(subject), choice)
    console.print(
        f"wrote {path}: python -m jaxtune.train CONFIG.yaml {path}\nkept in {kept}, for runs with mesh=auto "
        "train.microbatch_rows=auto",
        highlight=False,
    )
    return best


def _subject(config: Config, topology: Topology) -> _Subject:
    """Reads config.json, finds the devices to compile for, and makes OUTPUT: better now than when the plan is made."""
    epath.Path(config.output).mkdir(parents=True, exist_ok=True)
    where = hub.resolve_config(config.model.path, config.model.revision)
    hf_config = read_config(where)
    platform = "gpu" if topology.is_gpu else "tpu"
    devices = [] if topology.is_gpu else abstract_devices(topology)
    kind = GPU_KINDS[topology.kind] if topology.is_gpu else devices[0].device_kind
    model, config = choosing.plan_model(config, hf_config, platform, where)
    return _Subject(config, hf_config, where, topology, devices, Forecaster(config, model, CHIPS[kind], platform))


def _ranked(subject: _Subject, left: frozenset[str]) -> list[Ranked]:
    memory = subject.forecaster.chip.memory
    topology = subject.topology
    return choosing.rank(subject.forecaster, devices=topology.devices, left=left, memory=memory, kind=topology.kind)


def _plan(subject: _Subject, *, hlo: str | None, console: Console) -> Plan:
    """The plan of a configuration as it would train: what it leaves open is the best that fits."""
    ranked = choosing.to_try(_ranked(subject, choosing.open_keys(subject.config)))
    if subject.topology.is_gpu:
        return forecast_plan(ranked[0].choice.of(subject.config), subject.forecaster, subject.topology, ranked[0])
    found: Plan | None = None
    for one in ranked:
        tried = _compiled(subject, one.choice, hlo=hlo, console=console)
        if tried.fits:
            return tried
        found = found or tried
    assert found is not None
    return found


def _compiled(subject: _Subject, choice: Choice, *, hlo: str | None, console: Console) -> Plan:
    config = choice.of(subject.config)
    with console.status(f"compiling {choice.describe()}"):
        return compile_plan(config, subject.hf_config, subject.topology, subject.devices, where=subject.where, hlo=hlo)


def _best(subject: _Subject, ranked: list[Ranked], *, hlo: str | None, console: Console) -> tuple[Plan, Choice]:
    """Compiles the best ways by forecast, then those with other options of the compiler; the fastest that fits wins."""
    if subject.topology.is_gpu:
        choice = ranked[0].choice
        return forecast_plan(choice.of(subject.config), subject.forecaster, subject.topology, ranked[0]), choice
    start = time.perf_counter()
    waiting = [one.choice for one in choosing.different(ranked, choosing.TRIES // (1 + len(OPTIONS)))]
    smaller = [one.choice for one in choosing.to_try(ranked) if one.choice not in waiting]
    results: list[tuple[Plan, Choice]] = []
    varied = False
    while waiting and len(results) < choosing.TRIES:
        longest = max((plan.compile_seconds for plan, _ in results), default=0.0)
        needed = longest * (SLOWER if waiting[0].options else 1.0)
        if results and time.perf_counter() - start + needed > SEARCH_SECONDS:
            console.print(f"no time for {len(waiting)} more", highlight=False)
            break
        results.append(_tried(subject, waiting.pop(0), results, hlo=hlo, console=console))
        if not waiting and not varied:
            fitting = sorted((one for one in results if one[0].fits), key=_slowness)
            varied = bool(fitting)
            waiting = [choice._replace(options=options) for _, choice in fitting for options in OPTIONS]
            if not fitting and smaller:
                waiting = [smaller.pop(0)]
    return min(results, key=_slowness)


def _tried(
    subject: _Subject, choice: Choice, before: list[tuple[Plan, Choice]], *, hlo: str | None, console: Console
) -> tuple[Plan, Choice]:
    """Compiles one way and says what came of it; `hlo` keeps the module of the best so far."""
    aside = epath.Path(hlo) / "tried" if hlo is not None else None
    found = _compiled(subject, choice, hlo=str(aside) if aside is not None else None, console=console)
    told = f"{found.seconds:.3f} s, {found.memory.total / report.GIB:.1f} GiB" if found.seconds else found.problem
    console.print(f"compiled in {found.compile_seconds:.0f} s: {choice.describe()}: {told}", highlight=False)
    result = (found, choice)
    if aside is not None and aside.exists():
        if min([*before, result], key=_slowness) is result:
            (aside / HLO_FILE).rename(epath.Path(hlo or "") / HLO_FILE)
        aside.rmtree()
    return result


def _slowness(result: tuple[Plan, Choice]) -> tuple[bool, float]:
    plan = result[0]
    return (not plan.fits, plan.seconds if plan.seconds is not None else plan.memory.total)


def _opened(config: Config) -> Config:
    """The configuration with everything left open that a search chooses."""
    mesh = type(config.mesh)(auto=True, slice=config.mesh.slice)
    model = config.model.model_copy(update={"remat": "auto"})
    train = config.train.model_copy(update={"microbatch_rows": "auto"})
    return config.model_copy(update={"mesh": mesh, "model": model, "train": train})


def _key(subject: _Subject) -> str:
    device_kind = subject.devices[0].device_kind if subject.devices else GPU_KINDS[subject.topology.kind]
    return choosing.cache_key(subject.config, subject.hf_config, device_kind, subject.topology.devices)


def _overrides(plan: Plan) -> str:
    """What was found as YAML: `train CONFIG.yaml OVERRIDES.yaml` computes so."""
    train: dict[str, Any] = {"microbatch_rows": plan.config.train.microbatch_rows}
    if plan.config.train.compiler_options:
        train["compiler_options"] = plan.config.train.compiler_options
    tree = {"model": {"remat": plan.config.model.remat}, "train": train, "mesh": plan.mesh}
    head = f"# Found by a search for {plan.topology.name}; give it behind the configuration.\n"
    return head + yaml.safe_dump(tree, sort_keys=False)


def _told(one: Ranked, subject: _Subject) -> str:
    memory, limit = one.forecast.memory, subject.forecaster.chip.memory
    fits = "" if memory <= choosing.usable(limit) else ", too much"
    return f"{one.choice.describe()}: {one.forecast.seconds:.3f} s, {memory / report.GIB:.1f} GiB{fits}"


def _keep(plan: Plan, console: Console) -> None:
    """Writes OUTPUT/plan.json, which a run in that folder compares itself with."""
    folder = epath.Path(plan.config.output)
    (folder / planned.FILE).write_text(json.dumps(report.as_json(plan), indent=1) + "\n")
    console.print(f"wrote {folder / planned.FILE}", highlight=False)
