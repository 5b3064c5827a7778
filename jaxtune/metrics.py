"""What a run tells while it works: metrics.jsonl, TensorBoard, Weights & Biases, and the terminal."""

import contextlib
import json
import math
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
import rich.console
import rich.progress
import tensorboardX

_CHARTS = 50  # sources with charts of their own; metrics.jsonl has any number


class SourceLosses:
    """Sums by source between two reports."""

    def __init__(self, names: Sequence[str], tags: Sequence[Sequence[str]]) -> None:
        self._names = names
        every = sorted({tag for of_one in tags for tag in of_one})
        self._of_tag = {tag: [i for i, of_one in enumerate(tags) if tag in of_one] for tag in every}
        self._sums = np.zeros((3, len(names)))

    def add(self, sums: Sequence[Any]) -> None:
        """Adds (weight x loss, weight, weight x correct), each `[S]`."""
        self._sums += np.asarray(sums, np.float64)

    def take(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Mean loss (nats), accuracy and weight since the last time, by source and by tag, of those that were seen.

        None where there is nothing to tell apart: a single source, no tags.
        """
        sums, self._sums = self._sums, np.zeros_like(self._sums)
        columns = {name: sums[:, i] for i, name in enumerate(self._names)} if len(self._names) > 1 else {}
        tags = {tag: sums[:, at].sum(axis=1) for tag, at in self._of_tag.items()}
        return _means(columns), _means(tags)


def _means(sums: Mapping[str, Any]) -> dict[str, Any] | None:
    seen = {
        name: {"loss": loss / weight, "accuracy": correct / weight, "weight": weight}
        for name, (loss, weight, correct) in sums.items()
        if weight > 0
    }
    return seen or None


class MetricsLog:
    """Writes numbers of numbered updates to every place that was asked for."""

    def __init__(
        self, folder: pathlib.Path, *, resumed_step: int, tensorboard: bool, wandb: str | None, config: dict[str, Any]
    ) -> None:
        """Opens the logs; records past `resumed_step` are of updates that will be done again and are cut off."""
        self._folder, self._tensorboard = folder, tensorboard
        self._open(resumed_step)
        self._wandb = _start_wandb(wandb, folder, config) if wandb else None

    def _open(self, step: int) -> None:
        for name in ("metrics.jsonl", "examples.jsonl"):
            cut_records(self._folder / name, step)
        self._stream = (self._folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._examples: IO[str] | None = None
        cut = {"purge_step": step + 1} if step else {}  # TensorBoard hides what is done again
        self._board = tensorboardX.SummaryWriter(str(self._folder / "events"), **cut) if self._tensorboard else None

    def go_back(self, step: int) -> None:
        """Takes back the records after update `step`: those updates will be done again."""
        self._close_files()
        self._open(step)

    def write(self, step: int, **values: float | int | str | Mapping[str, Any] | None) -> None:
        """Writes one record of update `step`; a mapping (losses by source) is an object of the record."""
        record = {"step": step, **{key: _plain(value) for key, value in values.items() if value is not None}}
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()
        numbers = {key: value for key, value in _flat(record).items() if key != "step"}
        if self._board:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, step)
        if self._wandb:
            self._wandb.log(numbers, step=step)

    def list_examples(self, step: int, rows: Sequence[Any]) -> None:
        """Writes to examples.jsonl which examples (source, row, epoch) stood in each row of update `step`."""
        if self._examples is None:
            self._examples = (self._folder / "examples.jsonl").open("a", encoding="utf-8")
        self._examples.write(json.dumps({"step": step, "rows": rows}) + "\n")
        self._examples.flush()

    def close(self) -> None:
        """Finishes every log."""
        self._close_files()
        if self._wandb:
            self._wandb.finish()

    def _close_files(self) -> None:
        for file in (self._stream, self._examples, self._board):
            if file is not None:
                file.close()


class SilentLog(MetricsLog):
    """The log of a host that is not the first: it has heard the same numbers, and writes nothing."""

    def __init__(self) -> None:
        pass

    def write(self, step: int, **values: float | int | str | Mapping[str, Any] | None) -> None:
        pass

    def list_examples(self, step: int, rows: Sequence[Any]) -> None:
        pass

    def go_back(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def cut_records(file: pathlib.Path, step: int) -> None:
    """Keeps the records of updates up to `step`; a last line that was cut off by a crash goes too."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    aside = file.with_suffix(".tmp")
    aside.write_text("".join(kept), encoding="utf-8")
    aside.replace(file)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, str | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)  # JSON has no NaN: readers get the word


def _flat(record: Mapping[str, Any]) -> dict[str, float]:
    """The record's numbers; those of a mapping as key/name/what, unless it has more names than charts can show."""
    out = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            if len(value) <= _CHARTS:
                out.update({f"{key}/{name}": number for name, number in _flat(value).items()})
        elif isinstance(value, int | float):
            out[key] = value
    return out


def _start_wandb(project: str, folder: pathlib.Path, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise ValueError("log.wandb is set, but wandb is not installed; pip install wandb, or unset it") from None
    return wandb.init(project=project, dir=str(folder), config=config, resume="allow", id=folder.name)


class Terminal:
    """A bar on a terminal, plain lines elsewhere; only the first process of a pod speaks."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = rich.console.Console(highlight=False, emoji=False, soft_wrap=True, quiet=quiet)
        self._progress: rich.progress.Progress | None = None

    @property
    def interactive(self) -> bool:
        """Whether a person watches."""
        return self._console.is_terminal and sys.stdout.isatty()

    def say(self, text: str) -> None:
        """Prints a line or a paragraph, above the bar if there is one."""
        self._console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """Prints a line that should be noticed."""
        self._console.print(f"warning: {text}", markup=False, style="yellow")

    @contextlib.contextmanager
    def working(self, what: str, *, every: float = 15.0) -> Iterator[None]:
        """Says what is going on, with the seconds counting up, until the block ends."""
        start, done = time.perf_counter(), threading.Event()

        def seconds() -> str:
            return f"{what} … {time.perf_counter() - start:.0f} s"

        def tick() -> None:
            while not done.wait(1.0 if self.interactive else every):
                status.update(seconds()) if status else self.say(seconds())

        status = self._console.status(seconds()) if self.interactive else None
        thread = threading.Thread(target=tick, daemon=True)
        with status or contextlib.nullcontext():
            thread.start()
            try:
                yield
            finally:
                done.set()
                thread.join()
        self.say(f"{what}: {time.perf_counter() - start:.1f} s")

    @contextlib.contextmanager
    def counting(self, what: str, *, unit: str = "rows") -> Iterator[Any]:
        """Gives a callback (done, total) that shows how far work has come; says nothing if it is never called."""
        start = last = time.perf_counter()
        columns = (
            rich.progress.SpinnerColumn(),
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.fields[numbers]}"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("ETA"),
            rich.progress.TimeRemainingColumn(),
        )
        shown = rich.progress.Progress(*columns, console=self._console, transient=True) if self.interactive else None
        task = shown.add_task(what, total=None, numbers="", visible=False) if shown else None

        def seen(done: int, total: int) -> None:
            nonlocal last
            now = time.perf_counter()
            if shown is not None and task is not None:
                numbers = f"{done:,} of {total:,} {unit}"
                shown.update(task, completed=done, total=total, numbers=numbers, visible=True)
            elif now - last > 10.0:
                last = now
                self.say(f"{what}: {done:,} of {total:,} {unit}, {duration(now - start)}")

        with shown or contextlib.nullcontext():
            yield seen

    @contextlib.contextmanager
    def bar(self, total: int, *, done: int = 0) -> Iterator["Bar"]:
        """Shows progress over `total` updates, `done` of which were done before."""
        if not self.interactive:
            yield Bar(self, None, total, done)
            return
        columns = (
            rich.progress.TextColumn("step {task.completed}/{task.total}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.fields[numbers]}"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("ETA"),
            rich.progress.TimeRemainingColumn(elapsed_when_finished=False),
        )
        with rich.progress.Progress(*columns, console=self._console) as progress:
            task = progress.add_task("train", total=total, completed=done, numbers="")
            yield Bar(self, (progress, task), total, done)


class Bar:
    """Progress of the updates."""

    def __init__(self, terminal: Terminal, task: tuple[Any, Any] | None, total: int, done: int) -> None:
        self._terminal, self._task, self._total = terminal, task, total
        self._start, self._done = time.perf_counter(), done

    def advance(self, step: int) -> None:
        """Notes that update `step` is done."""
        if self._task:
            progress, task = self._task
            progress.update(task, completed=step)

    def show(self, step: int, *, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        """Shows the numbers of update `step`: on the bar, or as a line."""
        numbers = f"loss {loss:.4f}  lr {learning_rate:.2e}  {tokens_per_second:,.0f} tokens/s"
        if self._task:
            progress, task = self._task
            progress.update(task, completed=step, numbers=numbers)
            return
        elapsed = time.perf_counter() - self._start
        remaining = elapsed / max(step - self._done, 1) * (self._total - step)
        self._terminal.say(f"step {step}/{self._total}  {numbers}  ETA {duration(remaining)}")


class Meter:
    """Seconds, tokens and waiting for data between two reports."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begins a new interval."""
        self._start = time.perf_counter()
        self._steps = self._all = self._real = self._trained = 0
        self._waited = 0.0

    def count(self, *, tokens_all: int, tokens: int, trained_tokens: int, waited: float) -> None:
        """Adds one update."""
        self._steps += 1
        self._all += tokens_all
        self._real += tokens
        self._trained += trained_tokens
        self._waited += waited

    def rates(self, *, flops_per_token: float, peak_flops: float | None) -> dict[str, float | None]:
        """Returns rates over the interval: per second of wall clock, all hosts together.

        MFU counts model FLOPs of the non-padding tokens, as Chowdhery et al. 2022 (PaLM, appendix B) define it.
        """
        seconds = max(time.perf_counter() - self._start, 1e-9)
        return {
            "tokens_per_second": self._real / seconds,
            "tokens_per_second_all": self._all / seconds,
            "tokens_per_second_trained": self._trained / seconds,
            "step_seconds": seconds / max(self._steps, 1),
            "data_wait_seconds": self._waited / max(self._steps, 1),
            "mfu": self._real / seconds * flops_per_token / peak_flops if peak_flops else None,
        }


def memory_bytes(device: Any) -> int | None:
    """Returns the peak bytes in use on a device; on CPU the resident memory of this process."""
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    status = pathlib.Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else None


def duration(seconds: float) -> str:
    """Returns seconds as people say them: 42 s, 3:05, 1:02:03."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
