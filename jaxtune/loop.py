"""The loop over updates: feed, watch, evaluate, save, and stop when told to."""

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from jaxtune.batch import AnyBatch, HostBatch
from jaxtune.checkpoint import Checkpoints
from jaxtune.config import Config
from jaxtune.data.stream import Stream
from jaxtune.memory import memory_explained
from jaxtune.metrics import PEAK_FLOPS, Meter, MetricsLog, SourceLosses, Terminal, memory_bytes
from jaxtune.optimizer import make_schedule
from jaxtune.sharding import batch_sharding
from jaxtune.step import EvalSums, StepMetrics, TrainState


class Outcome(NamedTuple):
    """Where the loop ended; `exit_code` is 0 unless a signal ended it, losses are in nats."""

    step: int
    loss: float | None
    eval_loss: float | None
    exit_code: int
    tokens: int = 0
    seconds: float = 0.0


class Done(NamedTuple):
    """An update on its way: its number, its batch (for the names of its examples) and its numbers to be."""

    step: int
    batch: HostBatch
    metrics: StepMetrics


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
    mesh: Any
    flops_per_token: float
    base_fingerprint: str

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
        self._schedule = make_schedule(self.config, self.steps)
        self._meter, self._skipped, self._best = Meter(), 0, best
        self._sources = SourceLosses(self.stream.source_names, self.stream.source_tags)
        self._seen = [0] * len(self.stream.source_names) if seen is None else list(seen)
        self._eval_loss: float | None = None
        self._needs = self.train_step.memory_analysis()
        self._evaluated = -1  # the update after which that loss was
        self._saved_step = start
        every_eval = choose_eval_interval(self.config, self.steps)
        began, tokens, step, loss = time.perf_counter(), 0, start, None
        done: Done | None = None
        runs_ahead = self.mesh.devices.flat[0].platform != "cpu"
        batches = self.stream.batches(data_state)
        with self.terminal.bar(self.steps, done=start) as bar, _signals() as caught:
            for step in range(start + 1, self.steps + 1):
                waiting = time.perf_counter()
                phase = len(data_state.get("phases", ()))
                batch, data_state = next(batches)
                if len(data_state.get("phases", ())) > phase:
                    self._tell_phase(step, data_state["phases"])
                waited = time.perf_counter() - waiting
                with memory_explained(self.config, self._needs):
                    state, metrics = self.train_step(state, frozen, self._put(batch))
                    if done is not None:
                        loss = self._watch(done, bar)
                done = Done(step, batch, metrics)
                for row in batch.examples:
                    for example in row:
                        self._seen[example.source] += 1
                real = int(batch.arrays.token_count)
                trained = int((batch.arrays.loss_weights > 0).sum())
                tokens += real
                self._meter.count(tokens_all=batch.arrays.room, tokens=real, trained_tokens=trained, waited=waited)
                if not runs_ahead:
                    loss, done = self._watch(done, bar), None
                evaluates = self.eval_step is not None and (step % every_eval == 0 or step == self.steps)
                every = self.config.checkpoint.every_steps
                saves = bool(every and step % every == 0)
                if evaluates or saves or step == self.steps or caught:
                    if done is not None:
                        with memory_explained(self.config, self._needs):
                            loss, done = self._watch(done, bar), None
                    if evaluates and not caught:
                        saves |= self._evaluate(step, state, frozen)
                    if saves or step == self.steps or caught:
                        self._save(step, state, data_state)
                if caught:
                    break
        self.checkpoints.wait()
        exit_code = 0
        if caught and step < self.steps:
            exit_code = self.config.train.preempted_exit_code if caught[0] == signal.SIGTERM else 130
        return state, Outcome(step, loss, self._eval_loss, exit_code, tokens, time.perf_counter() - began)

    def _tell_phase(self, step: int, ends: list[int]) -> None:
        """Records where a phase of the mixture that ends after steps or tokens has ended."""
        self.log.write(step, phase=len(ends), phase_first_draw=ends[-1])
        self.terminal.say(f"step {step}: phase {len(ends) + 1} of the mixture begins with draw {ends[-1]:,}")

    def _put(self, batch: HostBatch) -> AnyBatch:
        return jax.device_put(batch.arrays, batch_sharding(self.mesh))

    def _watch(self, done: Done, bar: Any) -> float:
        """Reads an update's numbers, logs them when it is time, and stops a run that has gone wrong."""
        metrics = _on_host(done.metrics)
        if metrics.finite:
            self._sources.add(metrics.sources)
        if not metrics.finite:
            self._skipped += 1
            self.terminal.warn(
                f"step {done.step}: loss {metrics.loss}, gradient norm {metrics.grad_norm}; the update is not applied"
            )
            if metrics.bad_steps >= self.config.train.max_bad_steps:
                raise ValueError(
                    f"step {done.step}: the last {metrics.bad_steps} updates in a row had a NaN or infinity in loss or "
                    "gradient, so the run stops (train.max_bad_steps). Lower optimizer.learning_rate, or look at the "
                    f"examples of this batch:\n{self._names(done.batch)}"
                )
        bar.advance(done.step)
        if done.step == 1 or done.step % self.config.log.every_steps == 0 or done.step == self.steps:
            self._report(done.step, metrics, bar)
        return metrics.loss

    def _report(self, step: int, metrics: StepMetrics, bar: Any) -> None:
        kind = self.mesh.devices.flat[0].device_kind
        peak = PEAK_FLOPS[kind] * self.mesh.devices.size if kind in PEAK_FLOPS else None
        rates = self._meter.rates(flops_per_token=self.flops_per_token, peak_flops=peak)
        learning_rate = float(self._schedule(step - 1))
        sources, tags = self._sources.take()
        self._tell_realised(sources)
        self.log.write(
            step,
            loss=metrics.loss,
            learning_rate=learning_rate,
            grad_norm=metrics.grad_norm,
            tokens=metrics.tokens,
            trained_tokens=metrics.trained_tokens,
            skipped_steps=self._skipped,
            memory_bytes=memory_bytes(self.mesh.devices.flat[0]),
            sources=sources,
            tags=tags,
            **({"router": {k: float(v) for k, v in metrics.router._asdict().items()}} if metrics.router else {}),
            **rates,
        )
        rate = rates["tokens_per_second"] or 0.0
        bar.show(step, loss=metrics.loss, learning_rate=learning_rate, tokens_per_second=rate)
        self._meter.reset()

    def _tell_realised(self, sources: dict[str, Any] | None) -> None:
        """Adds what has come of the plan so far: each source's share of all examples, and its epochs."""
        if sources is None or self.stream.plan is None:
            return
        total = max(1, sum(self._seen))
        for leaf, seen in zip(self.stream.plan.leaves, self._seen, strict=True):
            if leaf.name in sources:
                sources[leaf.name] |= {"share": seen / total, "epochs": seen / max(1, leaf.examples)}

    def _names(self, batch: HostBatch) -> str:
        """Returns file and line of the examples in a batch, 20 of them at most."""
        ids = [example for row in batch.examples for example in row]
        shown = [f"  {self.stream.maker.readers[i.source].source.where(i.row)}" for i in ids[:20]]
        return "\n".join(shown + ([f"  … and {len(ids) - 20} more"] if len(ids) > 20 else []))

    def _evaluate(self, step: int, state: TrainState, frozen: Any) -> bool:
        """Logs held-out loss and accuracy; returns whether this state is the best so far."""
        assert self.eval_stream is not None and self.eval_step is not None
        limit = self.config.eval.max_batches
        sums: list[EvalSums] = []
        for number, (batch, _) in enumerate(self.eval_stream.batches(self.eval_stream.initial_state())):
            if limit is not None and number >= limit:
                break
            with memory_explained(self.config, self._needs):
                sums.append(self.eval_step(state.trainable, frozen, self._put(batch)))
        found: list[EvalSums] = jax.device_get(sums)
        scalars = [[float(value) for value in one[:4]] for one in found]
        loss_sum, weight, correct, tokens = (math.fsum(column) for column in zip(*scalars, strict=True))
        weight = max(weight, 1e-9)
        loss, accuracy = loss_sum / weight, correct / weight
        by_source = SourceLosses(self.eval_stream.source_names, self.eval_stream.source_tags)
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
        self._meter.reset()
        if math.isfinite(loss) and (self._best is None or loss < self._best):
            self._best = loss
            return True
        return False

    def _save(self, step: int, state: TrainState, data_state: dict) -> None:
        own = self._eval_loss if self._evaluated == step else None  # not that of an earlier state
        run = {
            "step": step,
            "base": self.base_fingerprint,
            "data": data_state,
            "stream": dict(self.stream.identity),
            "seen": list(self._seen),
            "eval_loss": own if own is not None and math.isfinite(own) else None,
            "config": self.config.model_dump(mode="json"),
        }
        self.checkpoints.save(step, state, run=run)


def _on_host(metrics: StepMetrics) -> StepMetrics:
    """Reads an update's numbers: scalars as plain numbers, sums by source as arrays."""
    found: StepMetrics = jax.device_get(metrics)
    scalars = {name: value.item() for name, value in found._asdict().items() if name not in ("sources", "router")}
    return found._replace(**scalars)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying of them, so that the update under way ends and is saved.

    A second SIGINT interrupts at once. Outside the main thread signals cannot be caught, and nothing changes.
    """
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and caught:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
