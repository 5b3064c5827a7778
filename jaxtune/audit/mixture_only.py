"""The plan of a mixture without its texts."""

import json

from jaxtune.config import Config
from jaxtune.data.planning import mixture_plan


def tell_mixture(config: Config, json_path: str | None) -> int:
    """Prints the plan of `config`, and writes it as JSON (`-`: to the terminal alone); returns the exit code."""
    plan = mixture_plan(config)
    told = json.dumps(plan.as_json(), indent=1)
    if json_path == "-":
        print(told)
        return 0
    print(plan.table())
    if plan.skipped:
        more = ", ..." if len(plan.skipped) > 10 else ""
        print(f"{len(plan.skipped):,} sources are not there and are left out: {', '.join(plan.skipped[:10])}{more}")
    if plan.believed:
        skips = config.data.missing == "skip"
        hint = "they are hub ids or URLs" if skips else "data.missing=skip looks for local files"
        print(f"{plan.believed:,} sources have their sizes from `examples` and were not looked for ({hint})")
    if json_path:
        with open(json_path, "w", encoding="utf-8") as file:
            file.write(told + "\n")
    return 0
