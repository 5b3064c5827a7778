"""Several hosts as one run: finding one another, hearing what every host says, failing together.

A host here is a process of `jax.distributed`: on TPU one for each machine, on GPUs often one for each card. All of them
run the same code in the same order, so whatever is called here is called by all; with one host nothing is sent.
"""

import contextlib
import functools
import json
import os
import socket
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtune.compat import has_chips

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
METADATA_SECONDS = 3.0
_SHORTEST = 1024  # bytes that a message is padded to, so that few lengths are compiled


class ToldToAll(ValueError):
    """An error that every host raises at the same place, so that all can end in order."""


def start(environment: Mapping[str, str] | None = None) -> None:
    """Joins the other hosts where the environment says that there are any; call it before any computation.

    Told by, in this order: JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID; a SLURM step of several
    tasks; Open MPI; a TPU slice of several machines (GKE's variables, or the metadata server of a TPU VM), several
    slices (MEGASCALE_NUM_SLICES). jax reads the details itself. In a process that has joined already nothing happens.

    Raises:
        ValueError: some of the JAX_ variables are set and others are not, or they are no numbers.
    """
    env = os.environ if environment is None else environment
    if jax.distributed.is_initialized():
        return
    if any(name in env for name in EXPLICIT):
        address, processes, process = _explicit(env)
        if processes > 1:
            jax.distributed.initialize(address, processes, process, cluster_detection_method="deactivate")
    elif is_cluster(env):
        jax.distributed.initialize()


def _explicit(env: Mapping[str, str]) -> tuple[str, int, int]:
    missing = [name for name in EXPLICIT if not env.get(name)]
    if missing:
        raise ValueError(
            f"the environment has {', '.join(name for name in EXPLICIT if name not in missing)} but not "
            f"{', '.join(missing)}; expected all of {', '.join(EXPLICIT)} on every host, or none of them"
        )
    try:
        processes, process = int(env["JAX_NUM_PROCESSES"]), int(env["JAX_PROCESS_ID"])
    except ValueError:
        processes, process = 0, 0
    if not 0 <= process < processes:
        raise ValueError(
            f"JAX_NUM_PROCESSES={env['JAX_NUM_PROCESSES']} and JAX_PROCESS_ID={env['JAX_PROCESS_ID']}; expected whole "
            "numbers, the second from 0 to one less than the first"
        )
    return env["JAX_COORDINATOR_ADDRESS"], processes, process


def is_cluster(env: Mapping[str, str]) -> bool:
    """Whether a launcher that jax knows has started more than one process for this run."""
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES"):
        if env.get(name, "").isdigit() and int(env[name]) > 1:
            return True
    workers = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if workers is not None and not workers.startswith("WARNING"):  # libtpu's word where it knows no workers
        return "," in workers
    return has_chips() and "TPU_SKIP_MDS_QUERY" not in env and "," in _tpu_workers(env)


def _tpu_workers(env: Mapping[str, str]) -> str:
    """The machines of this TPU slice as its metadata server lists them, "" where there is no such server."""
    server = env.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=METADATA_SECONDS) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def count() -> int:
    """The number of hosts."""
    return jax.process_count()


def index() -> int:
    """This host's number, from 0; host 0 speaks, writes JSON and holds the output folder."""
    return jax.process_index()


@functools.cache
def names() -> tuple[str, ...]:
    """Every host as errors name it, "host 3 (its network name)"; all hosts must call it."""
    return tuple(f"host {number} ({name})" for number, name in enumerate(gather(socket.gethostname())))


def gather(value: Any) -> list[Any]:
    """Returns every host's value, in the hosts' order. Values are JSON; all hosts must call it, in the same order."""
    if count() == 1:
        return [value]
    message = json.dumps(value).encode()
    sizes = _every(np.array([len(message)], np.int32)).reshape(-1)
    room = max(_SHORTEST, 1 << int(sizes.max() - 1).bit_length())
    padded = np.zeros(room, np.uint8)
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    rows = _every(padded).reshape(count(), room)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def _every(array: np.ndarray) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(array))


def from_first(value: Any) -> Any:
    """Returns host 0's value on every host; what the others give is not looked at."""
    return gather(value if index() == 0 else None)[0]


def first_failure(error: BaseException | None) -> str | None:
    """Returns what went wrong on any host, the first one's error in a line with its name; all hosts must call it."""
    told = gather(None if error is None else f"{type(error).__name__}: {error}")
    failed = [host for host, message in enumerate(told) if message is not None]
    if not failed:
        return None
    message = " ".join(told[failed[0]].split())[:500]
    return message if count() == 1 else f"{names()[failed[0]]}: {message}"


def wait_for_all(what: str) -> None:
    """Returns when every host has come to `what`."""
    if count() > 1:
        multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Lets a block fail on all hosts when it fails on one: the others would wait for it forever.

    The block itself must not wait for other hosts. Only errors that a person can mend (ValueError, OSError) are told;
    others end their process, which jax tells the other hosts in its own time.

    Raises:
        ValueError: the block failed elsewhere; says on which hosts, and how.
    """
    failure: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        failure = error
    if count() > 1:
        told = gather(str(failure) if failure is not None else None)
        failed = [host for host, message in enumerate(told) if message is not None]
        if failed:
            everywhere = len(failed) == count() and len(set(told)) == 1
            lines = told[:1] if everywhere else [f"{names()[host]}: {told[host]}" for host in failed[:4]]
            more = f"\n... and {len(failed) - 4} more hosts" if len(failed) > 4 and not everywhere else ""
            raise ToldToAll("\n".join(lines) + more) from failure
    if failure is not None:
        raise failure


def refuse_differences(what: Mapping[str, Any]) -> None:
    """Raises ValueError on every host when hosts disagree on a value, saying which hosts, on what, and their values.

    A mapping inside is compared key by key.
    """
    told = [_flat(one) for one in gather(dict(what))]
    problems = []
    for key in dict.fromkeys(key for one in told for key in one):
        values = [json.dumps(one.get(key)) for one in told]
        common = max(values, key=values.count)  # of several, that of the first host
        others = [f"{names()[host]} has {value}" for host, value in enumerate(values) if value != common]
        if others:
            more = f" and {len(others) - 4} more" if len(others) > 4 else ""
            problems.append(f"{key}: {', '.join(others[:4])}{more}, the other {values.count(common)} have {common}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ToldToAll(
            f"the hosts of this run disagree on {'; '.join(problems[:5])}{more}. Start every host with the same "
            "command on the same files"
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, Mapping) and value
        out |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return out
