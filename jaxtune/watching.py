"""What the loop tells of its updates: numbers to every log, warnings of updates that were not applied."""

from typing import Any, NamedTuple

import jax

from jaxtune import hosts
from jaxtune.batch import HostBatch
from jaxtune.config import Config
from jaxtune.cost_model.chips import CHIPS
from jaxtune.feeding import Feed
from jaxtune.metrics import Bar, Meter, MetricsLog, SourceLosses, Terminal, memory_bytes
from jaxtune.optimizer import make_schedule
from jaxtune.step import StepMetrics


class Done(NamedTuple):
    """An update on its way: number, batch (for the names of its examples), numbers to be, seconds waited for data."""

    step: int
    batch: HostBatch
    metrics: StepMetrics
    waited: float


class Watcher:
    """Reads the numbers of updates, which are the same on all hosts, and tells them.

    `seen`: examples of each source in the updates so far. `tokens`: in those of this process. `loss`: the last one.
    """

    def __init__(
        self,
        config: Config,
        feed: Feed,
        log: MetricsLog,
        terminal: Terminal,
        *,
        steps: int,
        mesh: Any,
        flops_per_token: float,
        seen: list[int],
    ) -> None:
        self.config, self.feed, self.log, self.terminal = config, feed, log, terminal
        self.stream, self.steps, self.mesh = feed.stream, steps, mesh
        self.seen, self.tokens, self.skipped = seen, 0, 0
        self.loss: float | None = None
        self.step_seconds: list[float] = []  # of an update, by interval of the log; the first has warm-up in it
        self.meter = Meter()
        self._flops_per_token = flops_per_token
        self._schedule = make_schedule(config, steps)
        self._sources = SourceLosses(self.stream.source_names, self.stream.source_tags)

    def watch(self, done: Done, bar: Bar) -> StepMetrics:
        """Reads an update's numbers, logs them when it is time, and stops a run that has gone wrong.

        Raises:
            ValueError: too many updates in a row had a NaN or infinity; names the examples of the last one's batch.
        """
        metrics = _on_host(done.metrics)
        self.seen = [before + int(now) for before, now in zip(self.seen, metrics.examples, strict=True)]
        self.tokens += metrics.tokens
        room = done.batch.arrays.room // len(done.batch.examples) * self.stream.batch_rows
        self.meter.count(
            tokens_all=room, tokens=metrics.tokens, trained_tokens=metrics.trained_tokens, waited=done.waited
        )
        if not metrics.applied:
            self._tell_not_applied(done.step, metrics)
        if metrics.finite:
            self._sources.add(metrics.sources)
        else:
            self._stop_if_all_are_bad(done, metrics)
        if self.config.log.examples:
            self._list_examples(done)
        bar.advance(done.step)
        if done.step == 1 or done.step % self.config.log.every_steps == 0 or done.step == self.steps:
            self._report(done.step, metrics, bar)
        self.loss = metrics.loss
        return metrics

    def _tell_not_applied(self, step: int, metrics: StepMetrics) -> None:
        self.skipped += 1
        limits = metrics.limits
        usual = f" (limits {limits.loss:.4g} and {limits.norm:.4g})" if metrics.finite else ""
        self.terminal.warn(
            f"step {step}: loss {metrics.loss}, gradient norm {metrics.grad_norm}{usual}; the update is not applied"
        )

    def _stop_if_all_are_bad(self, done: Done, metrics: StepMetrics) -> None:
        if metrics.bad_steps >= self.config.train.max_bad_steps:
            raise hosts.ToldToAll(
                f"step {done.step}: the last {metrics.bad_steps} updates in a row had a NaN or infinity in loss or "
                "gradient, so the run stops (train.max_bad_steps). Lower optimizer.learning_rate, or look at the "
                f"examples of this batch:\n{self.names(done.batch)}"
            )

    def names(self, batch: HostBatch) -> str:
        """Returns file and line of the examples in a batch, 20 of them at most; all hosts must call it."""
        ids = [example for row in self.feed.examples(batch) for example in row]
        shown = [f"  {self.stream.maker.readers[i.source].source.where(i.row)}" for i in ids[:20]]
        return "\n".join(shown + ([f"  … and {len(ids) - 20} more"] if len(ids) > 20 else []))

    def _list_examples(self, done: Done) -> None:
        names = self.stream.source_names
        rows = [[[names[one.source], one.row, one.epoch] for one in row] for row in self.feed.examples(done.batch)]
        self.log.list_examples(done.step, rows)

    def tell_phase(self, step: int, ends: list[int]) -> None:
        """Records where a phase of the mixture that ends after steps or tokens has ended."""
        self.log.write(step, phase=len(ends), phase_first_draw=ends[-1])
        self.terminal.say(f"step {step}: phase {len(ends) + 1} of the mixture begins with draw {ends[-1]:,}")

    def _report(self, step: int, metrics: StepMetrics, bar: Bar) -> None:
        kind = self.mesh.devices.flat[0].device_kind
        peak = CHIPS[kind].peak * self.mesh.devices.size if kind in CHIPS else None
        rates = self.meter.rates(flops_per_token=self._flops_per_token, peak_flops=peak)
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
            skipped_steps=self.skipped,
            memory_bytes=memory_bytes(self.mesh.local_devices[0]),
            sources=sources,
            tags=tags,
            **({"router": {k: float(v) for k, v in metrics.router._asdict().items()}} if metrics.router else {}),
            **rates,
        )
        self.step_seconds.append(rates["step_seconds"] or 0.0)
        rate = rates["tokens_per_second"] or 0.0
        bar.show(step, loss=metrics.loss, learning_rate=learning_rate, tokens_per_second=rate)
        self.meter.reset()

    def _tell_realised(self, sources: dict[str, Any] | None) -> None:
        """Adds what has come of the plan so far: each source's share of all examples, and its epochs."""
        if sources is None or self.stream.plan is None:
            return
        total = max(1, sum(self.seen))
        for leaf, seen in zip(self.stream.plan.leaves, self.seen, strict=True):
            if leaf.name in sources:
                sources[leaf.name] |= {"share": seen / total, "epochs": seen / max(1, leaf.examples)}


def _on_host(metrics: StepMetrics) -> StepMetrics:
    """Reads an update's numbers: scalars as plain numbers, sums by source as arrays."""
    found: StepMetrics = jax.device_get(metrics)
    arrays = ("sources", "examples", "limits", "router")
    return found._replace(**{name: value.item() for name, value in found._asdict().items() if name not in arrays})
