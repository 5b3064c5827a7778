"""What the hosts of a run prove to one another before its first update: one command, one code, one data set."""

import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxtune import hosts
from jaxtune.batch import HostBatch
from jaxtune.config import Config
from jaxtune.data.stream import Stream
from jaxtune.feeding import Feed
from jaxtune.run_folder import leaves_of

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers")


def check_command(config: Config) -> None:
    """Raises ValueError on all hosts when their configurations or packages differ, naming key and hosts."""
    if hosts.count() > 1:
        hosts.refuse_differences({name: importlib.metadata.version(name) for name in PACKAGES} | {"jaxtune": _code()})
        _refuse_other_leaves(leaves_of(config.model_dump(mode="json")))


def _code() -> str:
    """A digest of jaxtune's own files: a checkout has no version that could be trusted."""
    digest = hashlib.sha256()
    for file in sorted(pathlib.Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def check_inputs(base: str, streams: Mapping[str, Stream | None]) -> None:
    """Raises ValueError on all hosts when the base model or a stream's data is not the same everywhere.

    Args:
        base: the fingerprint of the base model.
        streams: by the name that errors call them.
    """
    if hosts.count() == 1:
        return
    hosts.refuse_differences({"the base model's files": base})
    _refuse_other_leaves(
        {
            f"{name}: {what}": value
            for name, stream in streams.items()
            if stream is not None
            for what, value in stream.identity.items()
        }
    )


def check_counted(config: Config, stream: Stream | None) -> None:
    """Raises ValueError on all hosts when only some know how many rows the run has, from what was prepared there."""
    if hosts.count() == 1 or stream is None or config.train.steps is not None:
        return
    known = hosts.gather(stream.rows_of_windows is not None)
    without = [name for name, knows in zip(hosts.names(), known, strict=True) if not knows]
    if 0 < len(without) < len(known):
        named = ", ".join(without[:5]) + (f" and {len(without) - 5:,} more" if len(without) > 5 else "")
        raise ValueError(
            f"data.prepared: {config.data.prepared} has all windows of this run on {len(known) - len(without)} of "
            f"{len(known)} hosts, but not on {named}, so these cannot count its steps; expected a folder that all "
            "hosts see, e.g. data.prepared=gs://BUCKET/prepared or one on a shared disk, the same command of "
            "jaxtune.prepare on every host, or train.steps"
        )


def _refuse_other_leaves(leaves: Mapping[str, Any]) -> None:
    """Compares one digest, and value by value only where it differs: a mixture has thousands of keys."""
    digest = hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()
    if len(set(hosts.gather(digest))) > 1:
        every = dict.fromkeys(key for keys in hosts.gather(sorted(leaves)) for key in keys)
        hosts.refuse_differences({key: leaves.get(key, "nothing") for key in every})


def check_first_batch(feed: Feed, batch: HostBatch) -> None:
    """Raises ValueError on all hosts unless hosts with the same rows have the same examples, and others have others.

    An example is known by its id and its tokens: a conversation that was split has one id in several rows.
    """
    if hosts.count() == 1:
        return
    rows = [_digests(batch, i) for i in range(len(batch.examples))]
    told = hosts.gather({"rows": list(feed.rows), "examples": rows})
    seen: dict[int, tuple[int, list[str]]] = {}
    for host, its in enumerate(told):
        for row, examples in zip(its["rows"], its["examples"], strict=True):
            first, expected = seen.setdefault(row, (host, examples))
            if examples != expected:
                raise ValueError(
                    f"{hosts.names()[host]} has other examples in row {row} of the first batch than "
                    f"{hosts.names()[first]}, and both hold that row; start every host with the same data and code"
                )
    owners: dict[str, int] = {}
    for row, (host, examples) in seen.items():
        for example in examples:
            other = owners.setdefault(example, row)
            if told[seen[other][0]]["rows"] != told[host]["rows"]:
                raise ValueError(
                    f"{hosts.names()[host]} and {hosts.names()[seen[other][0]]} have the same example in rows {row} "
                    f"and {other} of the first batch; expected each example once"
                )


def _digests(batch: HostBatch, row: int) -> list[str]:
    segments, tokens = batch.arrays.segment_ids[row], batch.arrays.tokens[row]
    return [
        hashlib.blake2b(repr(tuple(one)).encode() + tokens[segments == number].tobytes(), digest_size=8).hexdigest()
        for number, one in enumerate(batch.examples[row], start=1)
    ]
