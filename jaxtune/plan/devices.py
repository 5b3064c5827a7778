"""Devices that are not here: libtpu's description of a topology."""

import importlib.metadata
import importlib.util
import math
from typing import Any

import jax
import packaging.requirements
from jax.experimental import topologies

from jaxtune.cost_model.topologies import GENERATIONS, Topology


def abstract_devices(topology: Topology) -> list[Any]:
    """Returns the devices of a TPU topology, to compile for.

    Raises:
        ValueError: libtpu is missing or not the one that jax was built with, or knows no such shape.
    """
    check_libtpu()
    generation = GENERATIONS[topology.kind]
    options: dict[str, Any] = dict(generation.options)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if math.prod(topology.shape) != 4 and math.prod(topology.shape) <= generation.single:
        options["chips_per_host_bounds"] = (*topology.shape, 1)[:3]  # all of them in one machine
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.layout, **options)
    except Exception as error:
        told = str(error).splitlines()[0]
        raise ValueError(f"--topology: libtpu knows no {topology.layout} ({told}); expected another shape") from error
    return list(found.devices)


def check_libtpu() -> None:
    """Raises ValueError, saying what to install, when libtpu is missing or is not the one that jax pins."""
    version = jax.__version__
    wanted = f'pip install "jax[tpu]=={version}"'
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"libtpu is not installed, and compiles for TPUs; install it: {wanted}")
    needed = _pinned()
    found = importlib.metadata.version("libtpu")
    if needed is not None and not needed.specifier.contains(found, prereleases=True):
        raise ValueError(
            f"found libtpu {found}, but jax {version} needs libtpu{needed.specifier}, and compiles with no other; "
            f"install it: {wanted}"
        )


def _pinned() -> packaging.requirements.Requirement | None:
    """The libtpu that jax names in its tpu extra; None where it names none."""
    for line in importlib.metadata.requires("jax") or ():
        requirement = packaging.requirements.Requirement(line)
        if requirement.name == "libtpu":
            return requirement
    return None
