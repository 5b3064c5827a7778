"""Numbers reach the files that were asked for, and a terminal or a log file shows them as fits it."""

import json
import sys

import pytest

from jaxtune import metrics
from jaxtune.metrics import Meter, MetricsLog, Terminal, cut_records, duration


def log_in(folder, *, resumed_step=0, tensorboard=False, wandb=None):
    return MetricsLog(folder, resumed_step=resumed_step, tensorboard=tensorboard, wandb=wandb, config={"seed": 1})


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# metrics.jsonl.


def test_a_record_is_on_disk_as_soon_as_it_is_written(tmp_path):
    log = log_in(tmp_path)
    log.write(1, loss=2.5, mfu=None, skipped_steps=0)
    assert records(tmp_path) == [{"step": 1, "loss": 2.5, "skipped_steps": 0}]
    log.close()


def test_numbers_that_json_does_not_have_become_words(tmp_path):
    log = log_in(tmp_path)
    log.write(1, loss=float("nan"), grad_norm=float("inf"), other=float("-inf"))
    log.close()
    assert records(tmp_path) == [{"step": 1, "loss": "nan", "grad_norm": "inf", "other": "-inf"}]


def test_a_run_that_goes_on_cuts_off_what_it_will_do_again_and_appends(tmp_path):
    log = log_in(tmp_path)
    for step in range(1, 6):
        log.write(step, loss=float(step))
    log.close()
    log = log_in(tmp_path, resumed_step=3)
    log.write(4, loss=40.0)
    log.close()
    assert [(r["step"], r["loss"]) for r in records(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


@pytest.mark.parametrize("broken", ['{"step": 2, "lo', "null", "[1]", '{"loss": 1}', "7", ""])
def test_a_line_that_a_crash_left_behind_is_cut_off(tmp_path, broken):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 3.0}\n' + broken)
    cut_records(file, 5)
    assert file.read_text() == '{"step": 1, "loss": 3.0}\n'


def test_without_a_file_there_is_nothing_to_cut(tmp_path):
    cut_records(tmp_path / "metrics.jsonl", 5)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_has_the_same_numbers_and_hides_what_is_done_again(tmp_path, monkeypatch):
    made, scalars = [], []

    class Board:
        def __init__(self, folder, **options):
            made.append((folder, options))

        def add_scalar(self, key, value, step):
            scalars.append((key, value, step))

        def close(self):
            scalars.append("closed")

    monkeypatch.setattr(metrics.tensorboardX, "SummaryWriter", Board)
    log = log_in(tmp_path, tensorboard=True)
    log.write(3, loss=1.0, word="nan")
    log.close()
    log_in(tmp_path, tensorboard=True, resumed_step=3).close()
    assert scalars == [("loss", 1.0, 3), "closed", "closed"]
    assert [options for _, options in made] == [{}, {"purge_step": 4}]


def test_tensorboard_writes_event_files(tmp_path):
    log = log_in(tmp_path, tensorboard=True)
    log.write(1, loss=1.0)
    log.close()
    assert [file.name.split(".")[0] for file in (tmp_path / "events").iterdir()] == ["events"]


def test_nothing_is_sent_anywhere_unless_asked_for(tmp_path, monkeypatch):
    sent = []

    class Run:
        def log(self, numbers, step):
            sent.append((numbers, step))

        def finish(self):
            sent.append("finished")

    class Wandb:
        @staticmethod
        def init(**options):
            sent.append(options["project"])
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    log_in(tmp_path).close()
    assert sent == []
    log = log_in(tmp_path, wandb="mine")
    log.write(2, loss=1.0)
    log.close()
    assert sent == ["mine", ({"loss": 1.0}, 2), "finished"]


def test_wandb_that_is_not_installed_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"log\.wandb is set, but wandb is not installed; pip install wandb"):
        log_in(tmp_path, wandb="mine")


# The terminal.


def test_a_log_file_gets_plain_lines(capsys):
    terminal = Terminal()
    assert not terminal.interactive
    with terminal.bar(10, done=2) as bar:
        bar.advance(3)
        bar.show(3, loss=1.23456, learning_rate=2e-4, tokens_per_second=12345.6)
    with terminal.working("compiling"):
        pass
    terminal.warn("mind [this] step")
    out = capsys.readouterr().out
    assert "step 3/10  loss 1.2346  lr 2.00e-04  12,346 tokens/s  ETA " in out
    assert "compiling: 0.0 s" in out and "warning: mind [this] step" in out
    assert "\x1b" not in out and "\r" not in out


def test_long_lines_are_not_folded_and_markup_is_text(capsys):
    Terminal().say("[red]" + "word " * 100)
    assert capsys.readouterr().out == "[red]" + "word " * 100 + "\n"


def test_only_the_first_process_speaks(capsys):
    terminal = Terminal(quiet=True)
    terminal.say("x")
    with terminal.bar(2) as bar:
        bar.show(1, loss=1.0, learning_rate=1.0, tokens_per_second=1.0)
    assert capsys.readouterr().out == ""


def test_long_work_counts_up(capsys):
    with Terminal().working("compiling", every=0.02) as _:
        import time

        time.sleep(0.1)
    assert capsys.readouterr().out.count("compiling … 0 s") >= 2


def test_counting_says_how_far_it_is_and_nothing_if_never_called(capsys, monkeypatch):
    clock = iter(range(0, 10000, 11))
    with Terminal().counting("reading"):
        pass
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: float(next(clock)))
    with Terminal().counting("reading", unit="rows") as seen:
        seen(1000, 20000)
    assert capsys.readouterr().out == "reading: 1,000 of 20,000 rows, 11 s\n"


@pytest.mark.parametrize(
    ("seconds", "told"), [(0, "0 s"), (42.4, "42 s"), (59.6, "1:00"), (185, "3:05"), (3723, "1:02:03")]
)
def test_durations_are_told_as_people_do(seconds, told):
    assert duration(seconds) == told


# Rates.


def test_rates_are_per_second_of_the_interval_and_mfu_counts_real_tokens(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    meter = Meter()
    for _ in range(4):
        meter.count(tokens_all=1000, tokens=800, trained_tokens=200, waited=0.25)
    now[0] = 102.0
    assert meter.rates(flops_per_token=6e9, peak_flops=48e12) == {
        "tokens_per_second": 1600.0,
        "tokens_per_second_all": 2000.0,
        "tokens_per_second_trained": 400.0,
        "step_seconds": 0.5,
        "data_wait_seconds": 0.25,
        "mfu": pytest.approx(1600 * 6e9 / 48e12),
    }
    assert meter.rates(flops_per_token=6e9, peak_flops=None)["mfu"] is None
    meter.reset()
    now[0] = 103.0
    assert meter.rates(flops_per_token=1.0, peak_flops=1.0)["tokens_per_second"] == 0.0


def test_memory_is_known_on_a_cpu():
    class Device:
        def memory_stats(self):
            return None

    assert metrics.memory_bytes(Device()) > 10 * 2**20
    Device.memory_stats = lambda self: {"peak_bytes_in_use": 7}
    assert metrics.memory_bytes(Device()) == 7
