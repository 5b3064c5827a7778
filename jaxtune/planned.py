"""What a plan expected of a run, held against what the run then measured."""

import json
from typing import Any

FILE = "plan.json"


def compared(folder: Any, *, device_kind: str, devices: int, tokens: int, seconds: float | None) -> str | None:
    """Says how a run's updates compare with the plan in its folder, and notes it there; None where there is no plan.

    Args:
        folder: OUTPUT, a path that may be a bucket's.
        device_kind: jax's name of the devices.
        devices: how many.
        tokens: positions of an update, padding included.
        seconds: measured, of an update; None where too few were measured.
    """
    file = folder / FILE
    if seconds is None or not file.exists():
        return None
    try:
        plan = json.loads(file.read_text())
        expected = (plan["topology"]["device_kind"], plan["topology"]["devices"], plan["tokens_per_update"])
        planned = plan["seconds_per_update"]
    except (ValueError, KeyError, TypeError):
        return f"{file} cannot be read as a plan; it is not compared"
    if expected != (device_kind, devices, tokens):
        kind, number, size = expected
        return (
            f"{file} is a plan of {number} x {kind} with {size:,} tokens an update; this run had {devices} x "
            f"{device_kind} with {tokens:,}: not compared"
        )
    if planned is None:
        return f"{file} says that this does not fit, and it ran; not compared"
    plan["measured"] = {"seconds_per_update": seconds, "over_planned": seconds / planned}
    file.write_text(json.dumps(plan, indent=1) + "\n")
    return f"planned {planned:.3f} s an update ({plan['by']}), measured {seconds:.3f}: {seconds / planned:.2f} times"
