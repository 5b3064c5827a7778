"""What Google Cloud calls a slice named v5p-16: `python3 cloud/tpu_names.py v5p-16` prints it for a shell to read.

How many chips and machines a name stands for is `jaxtune.cost_model.topologies`; here are the names besides, from the
pages "TPU software versions" and "TPUs in GKE" at cloud.google.com.
"""

import pathlib
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # a script: runs from a clone, nothing installed

from jaxtune.cost_model.topologies import ALIASES, GENERATIONS, Topology, parse_topology


@dataclass(frozen=True)
class Kind:
    """`vm` the word in gcloud's accelerator types; `runtime` the image of a TPU VM, none where only GKE has the kind.

    `gke` is the node label of GKE, `machine` its machine type less the number of chips.
    """

    vm: str
    runtime: str | None
    gke: str
    machine: str


KINDS = {
    "v4": Kind("v4", "tpu-ubuntu2204-base", "tpu-v4-podslice", "ct4p-hightpu-{}t"),
    "v5e": Kind("v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu-{}t"),
    "v5p": Kind("v5p", "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu-{}t"),
    "v6e": Kind("v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard-{}t"),
    "tpu7x": Kind("tpu7x", None, "tpu7x", "tpu7x-standard-{}t"),
}


@dataclass(frozen=True)
class Slice:
    """One slice, in the words of each service."""

    topology: Topology
    kind: Kind

    @property
    def hosts(self) -> int:
        """Machines of one slice."""
        return self.topology.hosts // self.topology.slices

    @property
    def chips_per_host(self) -> int:
        """Chips of one machine."""
        return self.topology.chips // self.topology.hosts

    @property
    def shape(self) -> str:
        """The slice's shape in chips, as GKE's label has it: 2x2x4."""
        return "x".join(map(str, self.topology.shape))

    @property
    def machine_type(self) -> str:
        """The machine type of a GKE node."""
        return self.kind.machine.format(self.chips_per_host)

    @property
    def accelerator_type(self) -> str:
        """The name that gcloud, SkyPilot and the TPU API take: v5litepod-16, v5p-16."""
        chips = self.topology.chips // self.topology.slices
        return f"{self.kind.vm}-{chips * GENERATIONS[self.topology.kind].counts}"


def slice_of(name: str, slices: int = 1) -> Slice:
    """Returns the slice that a name stands for.

    Raises:
        ValueError: no such TPU, or none that can be rented; says what there is.
    """
    word = re.split("[-:]", name.lower(), maxsplit=1)[0]
    if ALIASES.get(word, word) not in KINDS:
        raise ValueError(f"--tpu: found {name!r}; expected one of {', '.join(f'{kind}-N' for kind in KINDS)}")
    try:
        topology = parse_topology(name, slices)
    except ValueError as error:
        raise ValueError(str(error).replace("--topology", "--tpu", 1)) from error
    return Slice(topology, KINDS[topology.kind])


def main(words: Sequence[str]) -> int:
    """Prints the assignments; returns 2 for a name that stands for nothing."""
    if len(words) not in (1, 2) or (len(words) == 2 and not words[1].isdigit()):
        print("usage: tpu_names.py NAME [SLICES]", file=sys.stderr)
        return 2
    try:
        found = slice_of(words[0], *map(int, words[1:]))
        usual = slice_of(found.accelerator_type).shape
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for key, value in {
        "TPU_KIND": found.topology.kind,
        "TPU_ACCELERATOR_TYPE": found.accelerator_type,
        "TPU_RUNTIME": found.kind.runtime or "",
        "TPU_SHAPE": found.shape,
        "TPU_IS_USUAL_SHAPE": "yes" if found.shape == usual else "no",
        "TPU_HOSTS": found.hosts,
        "TPU_CHIPS_PER_HOST": found.chips_per_host,
        "TPU_GKE_ACCELERATOR": found.kind.gke,
        "TPU_GKE_MACHINE": found.machine_type,
        "TPU_DESCRIPTION": found.topology.describe(),
    }.items():
        print(f"{key}={shlex.quote(str(value))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
