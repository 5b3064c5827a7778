"""The loop over updates: feed, watch, evaluate, save, and stop when told to."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from jaxtune import agreement, hosts
from jaxtune.batch import AnyBatch, HostBatch
from jaxtune.config import Config
from jaxtune.data.stream import Stream
from jaxtune.faults import Watchdog, stopping
from jaxtune.feeding import Feed
from jaxtune.memory import memory_explained
from jaxtune.metrics import MetricsLog, SourceLosses, Terminal
from jaxtune.saving.checkpoint import Checkpoints
from jaxtune.saving.rollbacks import Rollbacks
from jaxtune.step import EvalSums, TrainState
from jaxtune.watching import Done, Watcher


class Outcome(NamedTuple):
    """Where the loop ended; `exit_code` is 0 unless a signal ended it, losses are in nats.

    `step_seconds`: of an update, the median over the log's intervals but the first; None where there was only one.
    """

    step: int
    loss: float | None
    eval_loss: float | None
    exit_code: int
    tokens: int = 0
    seconds: float = 0.0
    step_seconds: float | None = None


def choose_eval_interval(config: Config, steps: int) -> int:
    """Returns after how many updates held-out loss is computed: as asked for, else ten times over the run."""
    return config.eval.every_steps or max(1, math.ceil(steps / 10))


@dataclass
class Loop:
    """Everything that the updates need besides the state that they change."""

    config: Config
    steps: int
    train_step: Any  # jax.stages.Compiled
    eval_step: Any | None
    stream: Stream
    eval_stream: Stream | None
    checkpoints: Checkpoints
    log: MetricsLog
    terminal: Terminal
    check_folder: Callable[[], None]  # raises when another run has taken OUTPUT
    watchdog: Watchdog
    mesh: Any
    flops_per_token: float
    base_fingerprint: str
    rollbacks: Rollbacks

    def run(
        self,
        state: TrainState,
        frozen: Any,
        data_state: dict,
        *,
        start: int,
        best: float | None,
        seen: Sequence[int] | None = None,
    ) -> tuple[TrainState, Outcome]:
        """Does updates `start` + 1 to `steps`, or fewer when a signal comes.

        On an accelerator the numbers of an update are read while the next one computes, so that the device never waits
        for the host; a CPU computes when asked, and waiting would only put the numbers down to the wrong update.

        Args:
            data_state: the stream's state after update `start`.
            best: lowest held-out loss of a saved checkpoint.
            seen: examples of each source in the updates before; None at the beginning.

        Raises:
            ValueError: too many updates in a row had a NaN or infinity; names the examples of the last one's batch.
        """
        self._start(start, best, seen)
        began, step, stops = time.perf_counter(), start, False
        done: Done | None = None
        runs_ahead = self.mesh.devices.flat[0].platform != "cpu"
        batches = self._feed.batches(data_state)
        with self.terminal.bar(self.steps, done=start) as self._bar, stopping() as stop, self.watchdog:
            while step < self.steps and not stops:
                step += 1
                waiting = time.perf_counter()
                batch, data_state = self._next(step, batches, data_state)
                waited = time.perf_counter() - waiting
                if step == start + 1:
                    agreement.check_first_batch(self._feed, batch)
                with memory_explained(self.config, self._needs):
                    state, metrics = self.train_step(state, frozen, self._put(batch))
                    self._read(done)
                done = Done(step, batch, metrics, waited)
                if not runs_ahead:
                    self._read(done)
                    done = None
                if self._goes_back:
                    state, step = self._go_back(state, data_state)
                    done = None
                    continue
                stops = stop.asked()
                evaluates = not stops and self._is_time_to_evaluate(step)
                saves = stops or self._is_time_to_save(step)
                copies = self._is_time_to_copy(step)
                if self._save_has_failed(step) or evaluates or saves or copies:
                    with memory_explained(self.config, self._needs):
                        self._read(done)
                    done = None
                    saves |= evaluates and self._evaluate(step, state, frozen)
                    if saves or copies or self._save_is_due:
                        only_copies = not saves and not self._save_is_due
                        self._save(step, state, data_state, only_copies=only_copies, wait=stops or step == self.steps)
                self.watchdog.beat()
            if not stops and step not in self.checkpoints.finished():  # the last updates were gone back from
                self._save(step, state, data_state, only_copies=False, wait=True)
            exit_code = stop.exit_code(self.config.train.preempted_exit_code) if stops and step < self.steps else 0
        seconds = time.perf_counter() - began
        watcher, intervals = self._watcher, self._watcher.step_seconds[1:]
        each = statistics.median(intervals) if intervals else None
        return state, Outcome(step, watcher.loss, self._eval_loss, exit_code, watcher.tokens, seconds, each)

    def _start(self, start: int, best: float | None, seen: Sequence[int] | None) -> None:
        self._feed = Feed(self.stream, self.mesh)
        self._eval_feed = Feed(self.eval_stream, self.mesh) if self.eval_stream is not None else None
        self._watcher = Watcher(
            self.config,
            self._feed,
            self.log,
            self.terminal,
            steps=self.steps,
            mesh=self.mesh,
            flops_per_token=self.flops_per_token,
            seen=[0] * len(self.stream.source_names) if seen is None else list(seen),
        )
        self._best = best
        self._eval_loss: float | None = None
        self._evaluated = -1  # the update after which that loss was
        self._needs = self.train_step.memory_analysis()
        self._save_is_due = False
        self._goes_back: tuple[int, int] | None = None  # from this update to before that one

    def _next(self, step: int, batches: Any, before: dict) -> tuple[HostBatch, dict]:
        batch, after = next(batches)
        if len(after.get("phases", ())) > len(before.get("phases", ())):
            self._watcher.tell_phase(step, after["phases"])
        return batch, after

    def _put(self, batch: HostBatch) -> AnyBatch:
        return self._feed.put(batch)

    def _read(self, done: Done | None) -> None:
        """Reads and tells the numbers of an update on its way, if there is one."""
        if done is not None:
            metrics = self._watcher.watch(done, self._bar)
            train = self.config.train
            if train.spike_factor is not None and metrics.spikes >= train.spike_patience:
                self._goes_back = done.step, done.step - metrics.spikes

    def _is_time_to_evaluate(self, step: int) -> bool:
        every = choose_eval_interval(self.config, self.steps)
        return self.eval_step is not None and (step % every == 0 or step == self.steps)

    def _is_time_to_save(self, step: int) -> bool:
        every = self.config.checkpoint.every_steps
        return step == self.steps or bool(every and step % every == 0)

    def _is_time_to_copy(self, step: int) -> bool:
        local = self.config.checkpoint.local
        return local.path is not None and step % local.every_steps == 0

    def _save_has_failed(self, step: int) -> bool:
        """Whether the last save failed behind training; several hosts ask one another when they log."""
        if hosts.count() == 1 or step % self.config.log.every_steps == 0:
            self._save_is_due = self.checkpoints.has_failed()
        return self._save_is_due

    def _evaluate(self, step: int, state: TrainState, frozen: Any) -> bool:
        """Logs held-out loss and accuracy; returns whether this state is the best so far."""
        assert self._eval_feed is not None and self.eval_step is not None
        stream, limit = self._eval_feed.stream, self.config.eval.max_batches
        sums: list[EvalSums] = []
        for number, (batch, _) in enumerate(self._eval_feed.batches(stream.initial_state())):
            if limit is not None and number >= limit:
                break
            with memory_explained(self.config, self._needs):
                sums.append(self.eval_step(state.trainable, frozen, self._eval_feed.put(batch)))
            self.watchdog.beat()
        found: list[EvalSums] = jax.device_get(sums)
        scalars = [[float(value) for value in one[:4]] for one in found]
        loss_sum, weight, correct, tokens = (math.fsum(column) for column in zip(*scalars, strict=True))
        weight = max(weight, 1e-9)
        loss, accuracy = loss_sum / weight, correct / weight
        by_source = SourceLosses(stream.source_names, stream.source_tags)
        for one in found:
            if one.sources is not None:
                by_source.add(one.sources)
        sources, tags = by_source.take()
        self.log.write(
            step,
            eval_loss=loss,
            eval_accuracy=accuracy,
            eval_tokens=int(tokens),
            eval_sources=sources,
            eval_tags=tags,
        )
        self.terminal.say(f"step {step}: held-out loss {loss:.4f}, token accuracy {accuracy:.1%}")
        self._eval_loss, self._evaluated = loss, step
        self._watcher.meter.reset()
        if math.isfinite(loss) and (self._best is None or loss < self._best):
            self._best = loss
            return True
        return False

    def _go_back(self, state: TrainState, data_state: dict) -> tuple[TrainState, int]:
        """Returns the state and step of the newest checkpoint from before the spikes; the data goes on after them.

        Chowdhery et al. 2022 (PaLM, section 5.1) did so by hand: the same batches did no harm to another state, and
        another state was not harmed by them.

        Raises:
            ValueError: there is no such checkpoint, or the run has gone back too often.
        """
        assert self._goes_back is not None
        (since, before), self._goes_back = self._goes_back, None
        self.checkpoints.settle()
        to = self.checkpoints.newest_usable(self.terminal.warn, before=before + 1)
        spikes = (
            f"step {since}: the last {since - before} updates in a row had a loss or gradient norm far beyond the usual"
        )
        often = len(self.rollbacks.records)
        if often >= self.config.train.max_rollbacks or to is None:
            why = (
                "there is no checkpoint from before them" if to is None else f"the run went back {often} times already"
            )
            raise hosts.ToldToAll(
                f"{spikes} (train.spike_factor), and {why}, so the run stops. Lower optimizer.learning_rate, look at "
                "the data, save more often (checkpoint.every_steps), or allow more (train.max_rollbacks, "
                "train.spike_factor)"
            )
        data = self._feed.whole_state(data_state)
        self.rollbacks.add(since=since, to=to, data=data, seen=self._watcher.seen)
        self.checkpoints.drop_after(to)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
        jax.tree.map(lambda leaf: leaf.delete(), state)  # two states may not fit
        restored = self.checkpoints.restore(to, shapes)
        left = self.stream.steps_left(data)
        if left is not None:  # what was skipped is not made up for
            self.steps = self._watcher.steps = min(self.steps, to + left)
        self._best, self._evaluated = self.checkpoints.best_loss(), -1
        self.log.go_back(to)
        self.log.write(to, went_back_from=since)
        self.terminal.warn(f"{spikes}; back to step {to}, and on with the data that follows")
        return restored.state, to

    def _save(self, step: int, state: TrainState, data_state: dict, *, only_copies: bool, wait: bool) -> None:
        """Starts saving. Before a stop it is storage's time alone: hosts, and their own disks, may be gone after it."""
        own = self._eval_loss if self._evaluated == step else None  # not that of an earlier state
        run = {
            "step": step,
            "base": self.base_fingerprint,
            "data": self._feed.whole_state(data_state),
            "stream": dict(self.stream.identity),
            "seen": list(self._watcher.seen),
            "eval_loss": own if own is not None and math.isfinite(own) else None,
            "config": self.config.model_dump(mode="json"),
        }
        with hosts.together():
            self.check_folder()
        if not wait:
            self.checkpoints.save_locally(step, state, run=run)
        if not only_copies:
            self.checkpoints.save(step, state, run=run, wait=wait)
            self._save_is_due = False
