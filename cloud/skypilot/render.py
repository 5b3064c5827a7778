"""`python3 cloud/skypilot/render.py --name NAME --tpu v6e-8 [CONFIG.yaml] [key=value ...]`: prints a SkyPilot task.

`--gpus H100:8 --nodes 2` instead of `--tpu` asks for GPUs. The task installs this checkout on every machine and runs
`python -m jaxtune.train` there; the configuration is checked first, as training would.
"""

import argparse
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # a script: runs from a clone

from manifests import check_name, read_run, to_yaml  # noqa: E402
from tpu_names import slice_of  # noqa: E402

CONFIG_FILE = "~/jaxtune-config.yaml"
PORT = 8476
# Preempted and saved; killed; another machine gone. An error (1), usage (2) and Ctrl-C (130) are final.
RECOVERED_CODES = (143, 137, 134)

SETUP = """\
set -e
python3 -m pip install --quiet --user uv
export PATH=$HOME/.local/bin:$PATH
[ -x ~/jaxtune-venv/bin/python ] || uv venv --quiet --python 3.12 ~/jaxtune-venv
uv pip install --quiet --python ~/jaxtune-venv/bin/python '.[{extra}]'
"""
# GPUs on several machines: one process a machine. TPU machines find one another by themselves.
JOIN = """\
if [ "$SKYPILOT_NUM_NODES" -gt 1 ]; then
  export JAX_COORDINATOR_ADDRESS=$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{port}
  export JAX_NUM_PROCESSES=$SKYPILOT_NUM_NODES JAX_PROCESS_ID=$SKYPILOT_NODE_RANK
fi
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
"""


def task(words: Sequence[str]) -> dict[str, Any]:
    """Returns the task that the command line asks for.

    Raises:
        ValueError: a flag or the configuration is wrong.
    """
    flags = read_flags(words)
    config, file = read_run(flags.words)
    codes = sorted({config.train.preempted_exit_code, *RECOVERED_CODES})
    resources: dict[str, Any] = {
        "use_spot": flags.spot,
        "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": codes},
    }
    if flags.tpu:
        tpu = slice_of(flags.tpu)
        if tpu.kind.runtime is None:
            raise ValueError(f"--tpu: found {flags.tpu!r}; this kind is to be had by GKE only: cloud/gke")
        resources["accelerators"] = f"tpu-{tpu.accelerator_type}"
        resources["accelerator_args"] = {"runtime_version": tpu.kind.runtime}
    else:
        resources["accelerators"] = flags.gpus
    if flags.infra:
        resources["infra"] = flags.infra
    inside = [CONFIG_FILE if word == file else shlex.quote(word) for word in flags.words]
    join = "" if flags.tpu else JOIN.format(port=PORT)
    return {
        "name": flags.name,
        "resources": resources,
        "num_nodes": flags.nodes,
        "workdir": str(ROOT),
        **({"file_mounts": {CONFIG_FILE: str(pathlib.Path(file).resolve())}} if file else {}),
        "setup": SETUP.format(extra="tpu" if flags.tpu else "cuda,gcs"),
        "run": f"{join}exec ~/jaxtune-venv/bin/python -m jaxtune.train {' '.join(inside)}\n",
    }


def read_flags(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="render.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--name", required=True, help="of the managed job")
    parser.add_argument("--tpu", help="v4-N and v5p-N count TensorCores, v5e-N and v6e-N chips")
    parser.add_argument("--gpus", help="of each machine: H100:8")
    parser.add_argument("--nodes", type=int, default=1, help="machines with GPUs (1)")
    parser.add_argument("--spot", action="store_true")
    parser.add_argument("--infra", help="cloud, or cloud/region: gcp/us-central1")
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml|key=value")
    flags = parser.parse_intermixed_args(words)
    check_name(flags.name)
    if bool(flags.tpu) == bool(flags.gpus):
        raise ValueError("expected --tpu NAME (v6e-8) or --gpus KIND:NUMBER (H100:8), one of them")
    if flags.gpus and not re.fullmatch(r"[A-Za-z0-9-]+:\d+", flags.gpus):
        raise ValueError(f"--gpus: found {flags.gpus!r}; expected KIND:NUMBER, H100:8 say")
    if flags.nodes < 1 or (flags.tpu and flags.nodes > 1):
        raise ValueError(f"--nodes: found {flags.nodes}; expected machines with GPUs, at least 1")
    return flags


def main(words: Sequence[str]) -> int:
    """Prints the task; returns 2 where the flags or the configuration are wrong."""
    try:
        text = to_yaml([task(words)])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
