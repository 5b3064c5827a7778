"""From a stream to global arrays: every host makes the rows that its devices hold, and no others."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtune import hosts
from jaxtune.batch import AnyBatch, ExampleId, HostBatch
from jaxtune.data.stream import Stream, merge_states
from jaxtune.sharding import batch_sharding


class Feed:
    """A stream as arrays on a mesh.

    `rows`: which rows of each global batch this host makes. Where tensor, context or expert spans hosts, several hosts
    make the same rows; where the mesh deals its devices out in another order, they need not be neighbours.
    """

    def __init__(self, stream: Stream, mesh: Mesh) -> None:
        self.stream = stream
        self._where = batch_sharding(mesh)
        held = self._where.addressable_devices_indices_map((stream.batch_rows, mesh.shape["context"]))
        of_each = [range(*index[0].indices(stream.batch_rows)) for index in held.values() if index is not None]
        self.rows: tuple[int, ...] = tuple(sorted({row for rows in of_each for row in rows}))
        self._place = {row: place for place, row in enumerate(self.rows)}

    def batches(self, state: Mapping[str, Any]) -> Iterator[tuple[HostBatch, dict[str, Any]]]:
        """Yields (this host's part of the batch, the state after it) from `state` on; all hosts go at one pace."""
        return self.stream.batches(state, rows=self.rows, exchange=hosts.gather)

    def put(self, batch: HostBatch) -> AnyBatch:
        """Forms the global batch, `[B T]` arrays split as the mesh says, of every host's part."""
        if hosts.count() == 1:
            return jax.device_put(batch.arrays, self._where)
        return jax.tree.map(self._whole, batch.arrays)

    def _whole(self, part: np.ndarray) -> jax.Array:
        shape = (self.stream.batch_rows, *part.shape[1:])

        def piece(index: Any) -> np.ndarray:
            places = [self._place[row] for row in range(*index[0].indices(shape[0]))]
            return part[places][:, index[1]]

        return jax.make_array_from_callback(shape, self._where, piece, dtype=part.dtype)

    def whole_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the state with every lane, joined from all hosts' states; all must call it."""
        return merge_states(hosts.gather(dict(state)))

    def examples(self, batch: HostBatch) -> list[tuple[ExampleId, ...]]:
        """Returns the examples of every row of the global batch, in the rows' order; all hosts must call it."""
        if hosts.count() == 1:
            return list(batch.examples)
        rows: dict[int, tuple[ExampleId, ...]] = {}
        for told in hosts.gather(list(zip(self.rows, batch.examples, strict=True))):
            rows |= {row: tuple(ExampleId(*one) for one in examples) for row, examples in told}
        return [rows[row] for row in range(self.stream.batch_rows)]
