"""Batches with exact state: what training reads, from any state on.

A *window* is W consecutive draws of the mixture, rendered, tokenised and packed: a pure function of its number.
*Lane* v runs windows v, v + lanes, ...; row i of every global batch comes from lane `i * lanes // batch_rows`. The
state is one (window, row) per lane, so any number of hosts and workers gives the same batches, and any of them can
go on where another stopped. Windows never cross the plan's epochs: a run may be given more epochs later. Where a phase
of the mixture ends after steps or tokens, the first window that no lane has begun is the next phase's first; the draw
that this is becomes part of the state.
"""

import collections
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from jaxtune import hosts
from jaxtune.batch import ExampleId, HostBatch
from jaxtune.data import funnel
from jaxtune.data.examples import RowReader
from jaxtune.data.files import readers
from jaxtune.data.layouts import formats
from jaxtune.data.mixing import mixture
from jaxtune.data.mixing.plan import MixturePlan
from jaxtune.data.windows import LaneWindows, PhaseEnd, Window, WindowMaker

QUARANTINE = "quarantine.jsonl"
_TOLD_SOURCES = 30
Exchange = Callable[[list[int]], Sequence[list[int]]]  # a host's numbers in, every host's out


@dataclasses.dataclass(frozen=True)
class Stream:
    """Batches with exact state, and what is known about them beforehand.

    `steps_per_run`: batches until the plan's epochs are seen, None when rows are too many to count beforehand (then
    `train.steps` must say) or when `train.steps` says so: then batches never end. `rows_of_windows` int64, where
    counted. `fill`: share of positions that hold a token, on each side of a row. `warnings` are sentences for just
    before step 1. `identity` names everything that the batches are a function of, `fingerprint` sums it up.
    `phase_ends`: of every phase but the last. `told_prepared` says what was found of windows prepared ahead.
    """

    maker: WindowMaker
    batch_rows: int
    lanes: int
    funnel: funnel.Funnel
    source_names: tuple[str, ...]
    source_tags: tuple[tuple[str, ...], ...]
    layouts: tuple[formats.Layout, ...]
    rows_of_windows: np.ndarray | None
    fill: tuple[float, ...] | None
    warnings: tuple[str, ...]
    identity: Mapping[str, str]
    fingerprint: str
    workers: int
    on_bad_row: str
    output_dir: str | None
    plan: MixturePlan | None = None
    phase_ends: tuple[PhaseEnd, ...] = ()
    told_prepared: str = ""

    @property
    def steps_per_run(self) -> int | None:
        """Batches from the first to the last, None when they never end."""
        return self.steps_left(self.initial_state())

    def steps_left(self, state: Mapping[str, Any]) -> int | None:
        """Batches from `state` to the end, the same on every host; None when they never end."""
        if self.rows_of_windows is None:
            return None
        lanes = len(state["lanes"])
        left = [int(self.rows_of_windows[w::lanes].sum()) - row for w, row in state["lanes"]]
        return max(-(-rows // (self.batch_rows // lanes)) for rows in left)

    def initial_state(self) -> dict[str, Any]:
        """The state before the first batch; plain JSON."""
        lanes = [[lane, 0] for lane in range(self.lanes)]
        state = {"fingerprint": self.fingerprint, "batch": 0, "lanes": lanes}
        if self.phase_ends:
            draws = self.maker.draws
            assert isinstance(draws, mixture.Mixture)
            state |= {"tokens": 0, "phases": list(draws.ends)}
        return state

    def refuse_other(self, identity: Mapping[str, str]) -> None:
        """Raises ValueError naming what differs when `identity` is another stream's."""
        keys = [*identity, *(key for key in self.identity if key not in identity)]
        told = []
        for key in keys:
            if key not in self.identity:
                told.append(f"{key} is gone")
            elif key not in identity:
                told.append(f"{key} is new")
            elif identity[key] != self.identity[key]:
                told.append(f"{key} is another (its data, wording, rate or options)")
        if told:
            more = f" and {len(told) - 5} more" if len(told) > 5 else ""
            raise ValueError(
                f"the data stream has changed since this run was saved: {'; '.join(told[:5])}{more}. Go back to the "
                "old data and configuration, or give another output="
            )

    def batches(
        self, state: Mapping[str, Any], *, rows: Sequence[int] | None = None, exchange: Exchange | None = None
    ) -> Iterator[tuple[HostBatch, dict[str, Any]]]:
        """Yields (batch, the state after it) from `state` on.

        `rows` are the rows of the global batch that this host makes, in rising order, all by default. A state knows
        only the lanes that were run for it, None for the others; `merge_states` joins the hosts' states for a
        checkpoint. `exchange` hands some numbers of this host to all hosts and theirs to this one: several hosts need
        it where phases end after steps or tokens. Raises ValueError for a state of another stream.
        """
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                "the data stream has changed since this state was saved (files, sources, template, tokenizer, seed or "
                "data options); go back to the old configuration, or give another output="
            )
        lanes, rows = len(state["lanes"]), range(self.batch_rows) if rows is None else rows
        if self.batch_rows % lanes:
            raise ValueError(
                f"train.batch_rows: found {self.batch_rows}; expected a multiple of the run's {lanes} lanes"
            )
        needed = sorted({i * lanes // self.batch_rows for i in rows})
        missing = [lane for lane, cursor in enumerate(state["lanes"]) if cursor is None]
        if missing:
            raise ValueError(f"this state knows nothing of lanes {missing}: join the hosts' states with merge_states")
        if exchange is None and len(rows) < self.batch_rows and any(end.kind != "draws" for end in self.phase_ends):
            raise ValueError("phases that end after steps or tokens need `exchange` where a host has only some rows")
        cursors = {lane: list(state["lanes"][lane]) for lane in needed}
        return self._run(state, lanes, rows, cursors, exchange or (lambda numbers: [numbers]))

    def _run(
        self,
        state: Mapping[str, Any],
        lanes: int,
        rows: Sequence[int],
        cursors: dict[int, list[int]],
        exchange: Exchange,
    ) -> Iterator[tuple[HostBatch, dict[str, Any]]]:
        batch, left = int(state["batch"]), self.steps_left(state)
        tokens, ends = int(state.get("tokens", 0)), list(state.get("phases", ()))
        waiting: dict[int, collections.deque[tuple[int, Window]]] = {lane: collections.deque() for lane in cursors}
        windows = self._windows(lanes, cursors, ends)
        share = self.batch_rows // lanes
        last = None if left is None else batch + left
        while last is None or batch < last:
            taken = {lane: self._take(lane, cursors[lane], share, lanes, waiting, windows) for lane in cursors}
            # Row i is row i - lane * share of its lane's portion.
            picked = [taken[i * lanes // self.batch_rows][i % share] for i in rows]
            batch += 1
            made = self._batch(picked)
            after: dict[str, Any] = {"fingerprint": self.fingerprint, "batch": batch}
            if self.phase_ends:
                counts = any(end.kind == "tokens" for end in self.phase_ends[len(ends) :])
                tokens += _tokens_of_all(rows, made, exchange) if counts else 0
                if self._phase_is_over(batch, tokens, len(ends)):
                    # A window is begun once a row of it is taken; the first that no lane has begun opens the phase.
                    begun = max(window + (row > 0) for window, row in cursors.values())
                    first = self.maker.first_draw(max(n for [n] in exchange([begun])))
                    if not ends or first >= ends[-1]:  # else the phase before it, which ends at a draw, goes on
                        ends = self._ends_after(ends, first)
                        windows = self._windows(lanes, cursors, ends)
                        waiting = {lane: collections.deque() for lane in cursors}
                after |= {"tokens": tokens, "phases": list(ends)}
            after["lanes"] = [list(cursors[lane]) if lane in cursors else None for lane in range(lanes)]
            yield made, after

    def _phase_is_over(self, batch: int, tokens: int, phase: int) -> bool:
        """Whether a phase that ends after steps or tokens ends with this batch."""
        if phase >= len(self.phase_ends):
            return False
        end = self.phase_ends[phase]
        return {"steps": batch, "tokens": tokens, "draws": -1}[end.kind] >= end.at

    def _ends_after(self, ends: Sequence[int], reached: int) -> list[int]:
        """The known ends with one more, and those after it that were asked for in draws."""
        out = [*ends, reached]
        for end in self.phase_ends[len(out) :]:
            if end.kind != "draws":
                break
            out.append(max(out[-1], end.at))
        return out

    def _windows(
        self, lanes: int, cursors: Mapping[int, Sequence[int]], ends: Sequence[int]
    ) -> Iterator[tuple[int, Window]]:
        """Windows in order, made ahead by threads, or by processes with `data.workers`; `ends` of the phases known."""
        at = {lane: window for lane, (window, _) in cursors.items()}
        maker = self.maker.ending(ends) if self.phase_ends else self.maker
        ahead = grain.MapDataset.source(LaneWindows(maker, lanes=lanes, at=at)).to_iter_dataset(
            grain.ReadOptions(num_threads=2, prefetch_buffer_size=max(4, len(at)))
        )
        if self.workers:
            if not flags.FLAGS.is_parsed():  # Grain asks absl for its own settings, which only absl programs parse
                flags.FLAGS.mark_as_parsed()
            ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=2))
        return iter(ahead)

    def _take(
        self,
        lane: int,
        cursor: list[int],
        count: int,
        lanes: int,
        waiting: Mapping[int, collections.deque[tuple[int, Window]]],
        windows: Iterator[tuple[int, Window]],
    ) -> list[tuple[Window, int] | None]:
        """The lane's next rows as (window, row); None for each row past its end. Moves the cursor."""
        taken: list[tuple[Window, int] | None] = []
        counts = self.rows_of_windows
        # In the last window the cursor stays behind the last row taken: a longer run goes on from there.
        end = None if counts is None else [len(counts) - 1, int(counts[-1])]
        while len(taken) < count:
            if end is not None and cursor >= end:
                taken.append(None)
                continue
            while not waiting[lane]:
                number, window = next(windows)
                self._report(window)
                waiting[number % lanes].append((number, window))
            window = waiting[lane][0][1]
            if cursor[1] < len(window.splits) - 1:
                taken.append((window, cursor[1]))
                cursor[1] += 1
            else:
                waiting[lane].popleft()
                cursor[:] = [cursor[0] + lanes, 0]
        return taken

    def _report(self, window: Window) -> None:
        """Bad rows met while streaming: those of large data, which no pass has seen before; and a window's note."""
        if window.note:
            _warn_once(window.note)
        if window.bad and self.on_bad_row == "error":
            raise ValueError(f"{window.bad[0][2]}; repair it, or set data.on_bad_row=skip to go on without such rows")
        exact = all(s.exact for s in self.funnel.sources)
        if window.bad and self.on_bad_row == "quarantine" and not exact:
            found = [(self.maker.readers[s].source, row, message) for s, row, message in window.bad]
            name = f"{hosts.index()}-{QUARANTINE}" if hosts.index() else QUARANTINE  # two hosts may not share a file
            quarantine(found, self.output_dir, name, mode="a")  # evaluation is always counted

    def _batch(self, picked: Sequence[tuple[Window, int] | None]) -> HostBatch:
        rows, names = [], []
        for place in picked:
            row, ids = [], []
            if place is not None:
                window, r = place
                first = np.cumsum(window.lengths, axis=0) - window.lengths
                for e in window.order[window.splits[r] : window.splits[r + 1]].tolist():
                    ids.append(ExampleId(*window.ids[e].tolist()))
                    example = self.maker.rows.one_of(window.joined, first[e], window.lengths[e])
                    row.append((example, ids[-1].source))
            rows.append(row)
            names.append(tuple(ids))
        return HostBatch(self.maker.rows.lay_out(rows), tuple(names))

    def describe(self) -> str:
        """What will be learnt from, for a person: layouts, one rendered example, the plan and the funnel."""
        lines = []
        named = list(zip(self.source_names, self.layouts, self.maker.readers, strict=True))
        for name, layout, reader in named[:_TOLD_SOURCES]:
            lines.append(f"{name}: format {layout.describe()}; template {reader.template.name}")
        if len(named) > _TOLD_SOURCES:
            lines.append(f"... and {len(named) - _TOLD_SOURCES:,} more sources")
        reader = self.maker.readers[0]
        for told in dict.fromkeys(reader.template.checks.describe() for reader in self.maker.readers):
            lines.append(f"  {told}")
        lines.append("  one example, what is trained between « and »:")
        shown = example_text(reader)
        lines += [f"    {line}" for line in shown.splitlines()] + [self.funnel.table()]
        if self.plan is not None and len(self.plan.leaves) > 1:
            lines.append(self.plan.table())
        if self.fill is not None:
            lines.append(f"{self.maker.rows.describe(self.fill)}; {self.lanes} lanes")
        if self.told_prepared:
            lines.append(self.told_prepared)
        return "\n".join(lines)


@functools.lru_cache(maxsize=1024)  # a shard has many windows, and one note does for all
def _warn_once(note: str) -> None:
    print(f"warning: {note}", file=sys.stderr, flush=True)


def _tokens_of_all(rows: Sequence[int], made: HostBatch, exchange: Exchange) -> int:
    """The tokens of the global batch; a row that several hosts make counts once."""
    kind = type(made.arrays)
    of_rows = [int(kind(*(array[i : i + 1] for array in made.arrays)).token_count) for i in range(len(rows))]
    told = exchange([number for pair in zip(rows, of_rows, strict=True) for number in pair])
    return sum({row: n for numbers in told for row, n in zip(numbers[::2], numbers[1::2], strict=True)}.values())


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state from those of several hosts at the same batch, each knowing its own lanes."""
    if len({state["batch"] for state in states}) != 1:
        raise ValueError(f"states of different batches: {sorted({state['batch'] for state in states})}")
    lanes = [
        next((known for known in lane if known is not None), None)
        for lane in zip(*(s["lanes"] for s in states), strict=True)
    ]
    return {**states[0], "lanes": lanes}


def quarantine(bad: Sequence[tuple[readers.Source, int, str]], output_dir: str | None, name: str, *, mode: str) -> None:
    """Writes bad rows with where and why they were set aside to OUTPUT/`name`."""
    if output_dir is None:
        return
    os.makedirs(output_dir, exist_ok=True)
    with open(os.path.join(output_dir, name), mode, encoding="utf-8") as file:
        for source, row, message in bad:
            entry = {"where": source.where(row), "problem": message, "row": source.raw(row)}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def example_text(reader: RowReader) -> str:
    """The first row that trains anything, as the model sees it, with « » around what is trained."""
    for row in range(min(len(reader.source), 1000)):
        if not reader.read([row])[0].examples:
            continue
        return reader.shown(row)
    return "(none among the first 1,000 rows)"
