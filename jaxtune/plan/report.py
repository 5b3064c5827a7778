"""A plan as people and programs read it."""

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxtune.cost_model.topologies import GENERATIONS
from jaxtune.plan.costing import Plan
from jaxtune.sharding import mesh_words

GIB = 2**30
KINDS = ("weights", "optimizer", "gradients", "activations", "temporaries", "batch")


def as_json(plan: Plan) -> dict[str, Any]:
    """Returns everything a plan says as plain values: bytes, seconds, FLOPs."""
    topology, memory = plan.topology, plan.memory
    told: dict[str, Any] = {
        "topology": {
            "name": topology.name,
            "device_kind": plan.device_kind,
            "chips": topology.chips,
            "devices": topology.devices,
            "hosts": topology.hosts,
            "slices": topology.slices,
            "shape": list(topology.shape),
        },
        "by": plan.by,
        "fits": plan.fits,
        "problem": plan.problem,
        "model": {"path": plan.config.model.path, "parameters": plan.parameters, "trained": plan.trained},
        "mesh": plan.mesh,
        "remat": plan.config.model.remat,
        "rows_at_once": plan.config.rows_at_once,
        "batch_rows": plan.config.train.batch_rows,
        "compiler_options": plan.config.train.compiler_options,
        "tokens_per_update": plan.tokens,
        "memory_bytes": {kind: getattr(memory, kind) for kind in KINDS}
        | {"total": memory.total if math.isfinite(memory.total) else None, "limit": memory.limit},
        "host_memory_bytes": memory.host,
        "limited_by": limited_by(plan),
        "model_flops": plan.model_flops,
        "flops": plan.flops,
        "seconds_per_update": plan.seconds,
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
        "steps": plan.config.train.steps,
        "hours": plan.hours,
        "cost": plan.cost,
        "compile_seconds": plan.compile_seconds,
        "attention": plan.why,
    }
    if plan.estimate is not None:
        told |= _of_estimate(plan)
    if plan.forecast is not None:
        told["links_seconds"] = plan.forecast.links
    return told


def _of_estimate(plan: Plan) -> dict[str, Any]:
    """What the compiler's module tells."""
    estimate, clock = plan.estimate, plan.chip.clock
    assert estimate is not None and clock is not None
    per_chip = plan.tokens / plan.devices
    return {
        "cycles": estimate.cycles,
        "megacycles_per_token": estimate.cycles / per_chip / 1e6,
        "exposed_seconds": estimate.exposed,
        "parts": {part: cycles / clock for part, cycles in sorted(estimate.parts.items(), key=lambda item: -item[1])},
        "kernels": {
            name: {"calls": calls.number, "per_layer": round(calls_per_layer(plan, calls.number), 2)}
            for name, calls in estimate.kernels.items()
        },
        "collectives": [
            {
                "kind": kind,
                "axes": list(axes),
                "number": traffic.number,
                "bytes": traffic.size,
                "seconds": traffic.seconds,
                "exposed_seconds": traffic.exposed,
            }
            for (kind, axes), traffic in estimate.collectives.items()
        ],
    }


def calls_per_layer(plan: Plan, calls: int) -> float:
    """How often a layer of a microbatch calls a kernel."""
    return calls / plan.layers / (plan.config.train.batch_rows // plan.config.rows_at_once)


def limited_by(plan: Plan) -> str:
    """The kind that takes the most of the memory."""
    return max(KINDS, key=lambda kind: getattr(plan.memory, kind))


def show(plan: Plan, console: Console) -> None:
    """Prints a plan."""
    unit = "card" if plan.topology.is_gpu else "chip"
    if not plan.topology.is_gpu and GENERATIONS[plan.topology.kind].devices > 1:
        unit = "device (two a chip)"
    console.print(_head(plan), highlight=False)
    table = Table(title=f"memory of one {unit}, GiB", title_justify="left", box=None)
    for name in (*KINDS, "total", "limit"):
        table.add_column(name, justify="right")
    figures = [getattr(plan.memory, kind) for kind in KINDS] + [plan.memory.total, plan.memory.limit]
    table.add_row(*(f"{value / GIB:.2f}" for value in figures))
    console.print(table)
    console.print(_verdict(plan), highlight=False)
    if plan.seconds is None:
        return
    console.print(_times(plan), highlight=False)
    if plan.estimate is not None:
        console.print(_parts(plan))
        console.print(_kernels(plan), highlight=False)
    traffic = _traffic(plan)
    if traffic.row_count:
        console.print(traffic)


def _head(plan: Plan) -> str:
    config = plan.config
    axes = mesh_words(plan.mesh)
    lines = [
        plan.topology.describe(),
        f"{config.model.path}: {plan.parameters:,} parameters, {plan.trained:,} of them trained "
        f"({config.tuning.method}); {plan.why}",
        f"mesh {axes}; {config.rows_at_once} of {config.train.batch_rows} rows at once; remat {config.model.remat}; "
        f"{plan.tokens:,} tokens an update",
    ]
    if plan.by == "forecast":
        lines.append(
            "by an analytical model, not by a compiler: matrix products of the traced update at a stated share of the "
            "peak (docs/planning.md)"
        )
    else:
        lines.append(f"compiled in {plan.compile_seconds:.0f} s; a real run may differ: nothing has run")
    return "\n".join(lines)


def _verdict(plan: Plan) -> str:
    memory = plan.memory
    if plan.fits:
        away = f"; {memory.host / GIB:.2f} GiB of its host's memory" if memory.host else ""
        return f"fits: {(memory.limit - memory.total) / GIB:.2f} GiB are left; most goes to {limited_by(plan)}{away}"
    return f"DOES NOT FIT: {plan.problem}; most goes to {limited_by(plan)}. Try --search"


def _times(plan: Plan) -> str:
    seconds, rate, mfu = plan.seconds, plan.tokens_per_second, plan.mfu
    assert seconds is not None and rate is not None and mfu is not None
    lines = [
        f"{seconds:.3f} s an update; {rate:,.0f} tokens/s, {rate / plan.topology.chips:,.0f} a chip; MFU {mfu:.1%}",
        f"FLOPs of an update: {plan.model_flops:.3e} of the model, {plan.flops:.3e} computed",
    ]
    if plan.hours is not None:
        cost = f", costs {plan.cost:,.2f} at {plan.price:g} a chip and hour" if plan.cost is not None else ""
        lines.append(f"{plan.config.train.steps:,} updates: {plan.hours:.2f} hours{cost}")
    else:
        cost = ""
        if plan.price is not None:
            cost = f", costs {seconds / 3.6 * plan.price * plan.topology.chips:,.2f}"
        lines.append(f"1,000 updates: {seconds / 3.6:.2f} hours{cost} (train.steps says how many there are)")
    return "\n".join(lines)


def _parts(plan: Plan) -> Table:
    estimate, clock = plan.estimate, plan.chip.clock
    assert estimate is not None and clock is not None
    table = Table(title="where the time of an update goes", title_justify="left", box=None)
    for name in ("part", "ms", "share"):
        table.add_column(name, justify="left" if name == "part" else "right")
    whole = sum(estimate.parts.values())
    for part, cycles in sorted(estimate.parts.items(), key=lambda item: -item[1]):
        table.add_row(part, f"{cycles / clock * 1e3:.2f}", f"{cycles / whole:.1%}")
    return table


def _kernels(plan: Plan) -> str:
    assert plan.estimate is not None
    per_chip = plan.tokens / plan.devices
    listed = [
        f"{name} {calls_per_layer(plan, calls.number):.3g} a layer ({calls.cycles / 1e6:.1f} Mcycles)"
        for name, calls in plan.estimate.kernels.items()
    ]
    whole = f"{plan.estimate.cycles / per_chip / 1e6:.4f} Mcycles a token"
    return f"{whole}; Pallas kernels, charged max(FLOPs / peak, bytes / bandwidth): {', '.join(listed) or 'none'}"


def _traffic(plan: Plan) -> Table:
    table = Table(title="collectives of an update, of one device", title_justify="left", box=None)
    for name in ("axes", "kind", "number", "MiB", "ms of links", "ms not hidden"):
        table.add_column(name, justify="left" if name in ("axes", "kind") else "right")
    if plan.estimate is not None:
        for (kind, axes), traffic in sorted(plan.estimate.collectives.items(), key=lambda item: -item[1].seconds):
            table.add_row(
                " ".join(axes),
                kind,
                f"{traffic.number:,}",
                f"{traffic.size / 2**20:,.1f}",
                f"{traffic.seconds * 1e3:.2f}",
                f"{traffic.exposed * 1e3:.2f}",
            )
    elif plan.forecast is not None:
        for axis, seconds in plan.forecast.links.items():
            table.add_row(axis, "all", "", "", f"{seconds * 1e3:.2f}", "")
    return table


def show_side_by_side(plans: list[Plan], names: list[str], console: Console) -> None:
    """Prints plans in columns, a fact a row."""
    table = Table(title="side by side", title_justify="left", box=None)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for label, value in _FACTS:
        table.add_row(label, *(value(plan) for plan in plans))
    console.print(table)


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


_FACTS: list[tuple[str, Any]] = [
    ("fits", lambda plan: "yes" if plan.fits else "NO"),
    ("mesh", lambda plan: mesh_words(plan.mesh)),
    ("remat", lambda plan: plan.config.model.remat),
    ("rows at once", lambda plan: str(plan.config.rows_at_once)),
    ("tokens an update", lambda plan: f"{plan.tokens:,}"),
    *[(f"{kind}, GiB", lambda plan, kind=kind: f"{getattr(plan.memory, kind) / GIB:.2f}") for kind in KINDS],
    ("total, GiB", lambda plan: f"{plan.memory.total / GIB:.2f}"),
    ("limit, GiB", lambda plan: f"{plan.memory.limit / GIB:.2f}"),
    ("s an update", lambda plan: _or_dash(plan.seconds, ".3f")),
    ("tokens/s", lambda plan: _or_dash(plan.tokens_per_second, ",.0f")),
    ("MFU", lambda plan: _or_dash(plan.mfu, ".1%")),
    ("not hidden, s", lambda plan: _or_dash(plan.estimate.exposed if plan.estimate else None, ".3f")),
    ("hours", lambda plan: _or_dash(plan.hours, ".2f")),
    ("cost", lambda plan: _or_dash(plan.cost, ",.2f")),
]
