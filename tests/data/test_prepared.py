"""Windows prepared ahead: the same batches with and without them, and nothing half written or damaged is believed."""

import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import pickle
import random
import shutil

import numpy as np
import pytest
from conftest import make_config, pairs
from prepared_folders import TEMPLATES, serially

from jaxtune.data import lengths, loader, measuring
from jaxtune.data.ahead import attaching, pooling, prepared, preparing, window_records
from jaxtune.data.ahead.claims import Claims
from jaxtune.data.ahead.prepared import Folder, Shard, missing_ranges
from jaxtune.data.packing import Example, Pair
from jaxtune.data.rows import PairRows, SequenceRows
from jaxtune.data.windows import Window


@pytest.fixture
def open_(byte_tokenizer, tmp_path):
    def open_(config, **keys):
        options = {"tokenizer": byte_tokenizer, "max_length": 64, "cache_dir": str(tmp_path / "cache"), **keys}
        return loader.open_stream(config, **options)

    return open_


@pytest.fixture
def prepare(open_, tmp_path):
    """prepare(config) -> (folder, what was said, Outcome)."""

    def prepare(config, *, make=serially, **keys):
        said: list[str] = []
        stream = open_(config, **keys)
        folder = prepared.folder_of(config, stream.fingerprint, cache_dir=str(tmp_path / "cache"))
        outcome = preparing.prepare(config, stream, folder, make, say=said.append, progress=lambda done, total: None)
        return folder, said, outcome

    return prepare


def off(config):
    return config.model_copy(update={"data": config.data.model_copy(update={"prepared": "off"})})


def collect(stream, batches=None):
    out = []
    for batch, state in stream.batches(stream.initial_state()):
        out.append((batch, state))
        if batches is not None and len(out) == batches:
            break
    return out


def assert_same(some, others):
    assert len(some) == len(others) and some
    for (one, state), (other, other_state) in zip(some, others, strict=True):
        assert one.examples == other.examples and state == other_state
        for a, b in zip(one.arrays, other.arrays, strict=True):
            assert a.dtype == b.dtype and np.array_equal(a, b)


def forbid_making(monkeypatch):
    def make_anew(self, window):
        raise AssertionError(f"window {window} was made, though it was prepared")

    monkeypatch.setattr(loader.WindowMaker, "make_anew", make_anew)


# Records.


def window_of(kind, examples):
    """A window of some examples, each of its own draw but the last two, which are of one."""
    lengths = np.array([e.lengths for e in examples], np.int64)
    ids = np.array([(0, min(i, len(examples) - 2), 3) for i in range(len(examples))], np.int64)
    return Window(kind.joined(examples), lengths, ids, np.arange(len(examples))[::-1].copy(), np.array([0, 1, 3]),
                  ((0, 7, "file:8: a bad row, ü"),))  # fmt: skip


@pytest.mark.parametrize("vocabulary", [300, 70000])
@pytest.mark.parametrize("kind", [SequenceRows(16, True), PairRows(16, True, 16, 0)])
def test_a_record_gives_back_its_window_bit_for_bit(kind, vocabulary):
    random = np.random.default_rng(0)
    weights = [np.array(w, np.float32) for w in ([0.0, -0.0, 1.0], [1 / 3, 1 / 3], [1e-9, 2.5, 2.5, 0.0, 1.0])]
    examples = []
    for w in weights:
        tokens = random.integers(0, vocabulary, len(w) + 1).astype(np.int32)
        inputs = tokens[:-1] if isinstance(kind, SequenceRows) else tokens
        examples.append((Example if isinstance(kind, SequenceRows) else Pair)(inputs, tokens[1:], w))
    window = window_of(kind, examples)
    draws = loader.mixture.Draws(*(np.array(x, np.int64) for x in ([0, 0, 0], [0, 1, 2], [3, 3, 3])))
    record = window_records.encode(window, draws, 5, kind)
    assert window_records.is_same(window_records.decode(record, draws, 5, kind), window)
    with pytest.raises(window_records.OtherDraws):
        window_records.decode(record, draws, 6, kind)
    with pytest.raises(window_records.OtherDraws):
        window_records.decode(record, draws._replace(epoch=draws.epoch + 1), 5, kind)
    for at in range(len(record)):
        damaged = bytearray(record)
        damaged[at] ^= 4
        with pytest.raises(window_records.Damaged):
            window_records.decode(bytes(damaged), draws, 5, kind)


def test_a_window_without_examples_is_kept_too():
    kind, nothing = SequenceRows(16, True), np.zeros(0, np.int64)
    window = Window(kind.joined([]), np.zeros((0, 1), np.int64), np.zeros((0, 3), np.int64), nothing, np.array([0]), ())
    draws = loader.mixture.Draws(np.zeros(2, np.int64), np.arange(2), np.zeros(2, np.int64))
    record = window_records.encode(window, draws, 0, kind)
    assert window_records.is_same(window_records.decode(record, draws, 0, kind), window)


# The same batches.


@pytest.mark.parametrize(
    ("data", "train", "keys"),
    [
        ({}, {"epochs": 2.0}, {}),
        ({"packing": False}, {"epochs": 1.0}, {}),
        ({}, {"epochs": 1.5}, {}),
        ({}, {"steps": 9}, {}),
        pytest.param({"workers": 2}, {"epochs": 2.0}, {}, marks=pytest.mark.long),
        ({"template": "plain"}, {"epochs": 1.0}, {"encoder_length": 64}),
        ({"template": "plain", "packing": False}, {"steps": 4}, {"encoder_length": 64}),
        ({"overlong": "split", "on_bad_row": "skip", "lanes": 2}, {"epochs": 3.0}, {"max_length": 20}),
    ],
)
def test_batches_are_the_same_example_for_example(open_, prepare, write_rows, monkeypatch, data, train, keys):
    sources = (
        {"path": write_rows("a.jsonl", pairs(60)), "templates": TEMPLATES},
        {"path": write_rows("b.jsonl", pairs(31, start=100)), "epochs": 2.0},
    )
    config = make_config(*sources, train=train, window=8, **data)
    count = train.get("steps")
    plain = open_(off(config), **keys)
    expected = collect(plain, count)
    _, _, outcome = prepare(config, **keys)
    stream = open_(config, **keys)
    assert stream.maker.prepared is not None and stream.fingerprint == plain.fingerprint
    if not count:
        assert stream.steps_per_run == plain.steps_per_run and outcome.windows == plain.maker.count
        assert stream.told_prepared.startswith(f"prepared: {outcome.windows} of {outcome.windows} windows")
        if not data.get("workers"):
            forbid_making(monkeypatch)
    assert_same(collect(stream, count), expected)


def test_a_run_of_so_many_steps_finds_every_window_that_it_takes_rows_from(open_, prepare, write_rows, monkeypatch):
    config = make_config(write_rows("a.jsonl", pairs(50)), train={"steps": 40}, window=8, lanes=2)
    prepare(config)
    stream = open_(config)
    taken = {tuple(w) for _, state in collect(stream, 40) for w in state["lanes"]}
    last = max(window for window, _ in taken)
    forbid_making(monkeypatch)
    for number in range(last + 1):
        assert stream.maker.make(number).note == ""


@pytest.mark.parametrize(
    ("rows", "lanes", "each", "needed"),
    [([3, 5, 4], 2, 5, 3), ([3, 5, 4], 2, 10, 6), ([], 2, 5, 2), ([9], 1, 9, 1), ([9], 1, 10, 2), ([4, 4], 1, 0, 0)],
)
def test_windows_needed_are_those_whose_rows_the_lanes_give(rows, lanes, each, needed):
    assert preparing.windows_needed(np.array(rows, np.int64), lanes, each) == needed


def test_evaluation_and_training_with_more_epochs_go_on_from_what_is_there(open_, prepare, write_rows):
    path = write_rows("a.jsonl", pairs(60))
    first, _, one = prepare(make_config(path, train={"epochs": 1.0}, window=8))
    second, said, two = prepare(make_config(path, train={"epochs": 2.0}, window=8))
    assert first == second and said[0].startswith("partly: 8 of 16 windows")
    assert (one.made_windows, two.made_windows, two.windows) == (8, 8, 16)
    stream = open_(make_config(path, train={"epochs": 2.0}, window=8))
    assert_same(collect(stream), collect(open_(off(make_config(path, train={"epochs": 2.0}, window=8)))))


def test_data_too_large_to_be_counted_gets_its_steps_from_what_was_prepared(open_, prepare, write_rows, monkeypatch):
    config = make_config(write_rows("a.jsonl", pairs(90)), train={"epochs": 2.0}, window=8, lanes=2)
    exact = open_(off(config))
    expected = collect(exact)
    monkeypatch.setattr(measuring, "EXACT_ROWS", 10)
    assert open_(config).steps_per_run is None
    prepare(config)
    stream = open_(config)
    assert stream.steps_per_run == exact.steps_per_run
    assert stream.fill == pytest.approx(exact.fill)
    assert_same(collect(stream), expected)


def test_a_maker_with_what_was_prepared_travels_to_workers(open_, prepare, write_rows):
    config = make_config(write_rows("a.jsonl", pairs(20)), window=8)
    prepare(config)
    stream = open_(config)
    again = pickle.loads(pickle.dumps(stream.maker))
    assert window_records.is_same(again.make(1), stream.maker.make(1))


# Hits, misses, and what is only partly there.


def test_what_is_there_is_a_hit(prepare, write_rows):
    config = make_config(write_rows("a.jsonl", pairs(60)), window=8)
    folder, said, outcome = prepare(config)
    assert said[0] == f"miss: nothing is prepared of this stream. It goes into {folder.path}"
    before = {name: os.stat(folder.file(name)).st_mtime_ns for name in folder.names()}
    _, said, again = prepare(config)
    assert said == [f"hit: all 8 windows of this run are in {folder.path}; nothing to do"]
    assert again.made_windows == 0 and again[3:9] == outcome[3:9]
    assert before == {name: os.stat(folder.file(name)).st_mtime_ns for name in folder.names()}


@pytest.mark.parametrize(
    ("change", "keys", "told"),
    [
        ({"template": "plain"}, {}, "the template of source a has changed"),
        ({}, {"max_length": 63}, "the max_length (data.max_length) of source a has changed from 64 to 63"),
        ({"window": 9}, {}, "window, length, packing has changed from 8:64:True to 9:64:True"),
        ({"seed": 3}, {}, "seed has changed from 0 to 3"),
        ({"data": 61}, {}, "the data of source a has changed"),
    ],
)
def test_a_miss_says_what_has_changed(open_, prepare, write_rows, change, keys, told):
    path = write_rows("a.jsonl", pairs(60))
    folder, _, _ = prepare(make_config(path, window=8))
    if "data" in change:
        write_rows("a.jsonl", pairs(change["data"]))
        change = {}
    config = make_config(path, **{"window": 8, **change})
    stream = open_(config, **keys)
    assert f"since {folder.path} was prepared" in stream.told_prepared and told in stream.told_prepared
    _, said, _ = prepare(config, **keys)
    assert said[0].startswith("miss: ") and told in said[0]


def test_data_of_another_name_is_no_reason(open_, prepare, write_rows):
    prepare(make_config(write_rows("a.jsonl", pairs(60)), window=8))
    assert open_(make_config(write_rows("other.jsonl", pairs(9)), window=8)).told_prepared == ""


def test_off_neither_looks_nor_reads(open_, prepare, write_rows):
    config = make_config(write_rows("a.jsonl", pairs(60)), window=8)
    prepare(config)
    stream = open_(off(config))
    assert stream.maker.prepared is None and stream.told_prepared == ""


def test_what_is_partly_there_is_used_and_the_rest_made(open_, prepare, write_rows):
    config = make_config(write_rows("a.jsonl", pairs(60)), window=8, train={"epochs": 2.0})
    folder, _, _ = prepare(config)
    for shard in folder.shards()[::2]:
        folder.remove(shard.name)
    stream = open_(config)
    assert stream.told_prepared.startswith("prepared: 8 of 16 windows; the rest is made while training")
    assert_same(collect(stream), collect(open_(off(config))))
    _, said, outcome = prepare(config)
    assert said[0].startswith("partly: 8 of 16 windows") and outcome.made_windows == 8


@pytest.mark.parametrize(
    ("wanted", "there", "missing"),
    [
        ([(0, 4), (4, 8)], [(0, 3)], [(3, 4), (4, 8)]),
        ([(0, 4)], [(0, 2), (1, 4)], []),
        ([(0, 8)], [(2, 3), (5, 9)], [(0, 2), (3, 5)]),
        ([(0, 2), (2, 4)], [], [(0, 2), (2, 4)]),
    ],
)
def test_missing_windows_are_those_that_no_shard_covers(wanted, there, missing):
    found = missing_ranges([Shard(*w) for w in wanted], [Shard(*t) for t in there])
    assert [tuple(shard) for shard in found] == missing


def test_shards_that_overlap_are_read_all_the_same(open_, prepare, write_rows, tmp_path):
    config = make_config(write_rows("a.jsonl", pairs(60)), window=8)
    folder, _, _ = prepare(config)
    maker = open_(off(config)).maker
    prepared.write_shard(maker, folder, Shard(2, 5))
    found = prepared.Prepared.of(folder, str(tmp_path))
    assert found.covered(8) == 8
    assert [number for first, stop, _ in found.pieces for number in range(first, stop)] == list(range(8))
    for number in range(8):
        window, note = found.find(maker, number)
        assert not note and window_records.is_same(window, maker.make(number))


# Damage.


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "flipped":
        begin = next(i for i in range(len(content) // 3, len(content)) if content[i])
        for i in range(begin, begin + 40):
            content[i] ^= 1
    elif how == "cut":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = bytearray()
    else:
        content = bytearray(os.urandom(len(content)))
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "other"])
def test_a_damaged_shard_is_made_anew_with_one_word(open_, prepare, write_rows, capfd, how):
    config = make_config(write_rows("a.jsonl", pairs(200)), window=64, lanes=1)
    folder, _, _ = prepare(config)
    expected = collect(open_(off(config)))
    for shard in folder.shards():
        damage(pathlib.Path(folder.file(shard.name)), how)
    assert_same(collect(open_(config)), expected)
    told = capfd.readouterr().err
    for shard in folder.shards():
        assert told.count(f"{folder.file(shard.name)} is damaged") == 1
    said: list[str] = []
    stream = open_(config)
    assert preparing.check(stream, config, folder, cache="unused", say=said.append) == len(said) == 4
    _, _, outcome = prepare(config)
    assert outcome.made_windows == 4
    assert preparing.check(stream, config, folder, cache="unused", say=said.append) == 0


def test_a_shard_that_was_cut_is_seen_by_the_next_prepare(prepare, write_rows):
    config = make_config(write_rows("a.jsonl", pairs(60)), window=8)
    folder, _, _ = prepare(config)
    first = folder.shards()[0]
    damage(pathlib.Path(folder.file(first.name)), "cut")
    pathlib.Path(folder.file(folder.shards()[1].summary_name)).write_text("{")
    _, said, outcome = prepare(config)
    assert outcome.made_windows == 2 and f"{folder.file(first.name)} is not whole and is made again" in said


def test_windows_of_other_draws_are_made_anew(open_, prepare, write_rows, capfd):
    """Where a phase ends after steps is known only in the run: prepared are the windows of the first."""
    paths = write_rows("a.jsonl", pairs(90)), write_rows("b.jsonl", pairs(90, start=100))
    phases = ({"until": {"steps": 6}, "weights": {"a": 1.0}}, {"weights": {"b": 1.0}})
    config = make_config(*paths, train={"steps": 14}, window=8, lanes=2, phases=phases)
    expected = collect(open_(off(config)), 14)
    _, _, outcome = prepare(config)
    assert_same(collect(open_(config), 14), expected)
    assert capfd.readouterr().err.count("of other draws") <= 2
    assert outcome.windows < 14


def test_a_bad_row_stops_as_it_stops_training(prepare, write_rows, monkeypatch):
    rows = pairs(90)
    rows[50] = {"prompt": 3, "completion": None}
    path = write_rows("a.jsonl", rows)
    monkeypatch.setattr(measuring, "EXACT_ROWS", 10)
    monkeypatch.setattr(measuring, "SAMPLE_ROWS", 10)
    with pytest.raises(ValueError, match=r"a\.jsonl:51: .*on_bad_row=skip"):
        prepare(make_config(path, window=8))
    _, _, outcome = prepare(make_config(path, window=8, on_bad_row="skip"))
    assert outcome.examples == 89


# Several at once.


def test_a_pool_makes_the_same_shards(prepare, write_rows, tmp_path):
    config = make_config(write_rows("a.jsonl", pairs(60)), window=8, train={"epochs": 2.0})
    folder, _, one = prepare(config)
    alone = {name: pathlib.Path(folder.file(name)).read_bytes() for name in folder.names()}
    shutil.rmtree(folder.path)
    with pooling.Pool(2, cache_dir=str(tmp_path / "cache")) as pool:
        _, _, other = prepare(config, make=pool.make)
        mine = multiprocessing.active_children()
    assert one[:9] == other[:9]
    assert alone == {name: pathlib.Path(folder.file(name)).read_bytes() for name in folder.names()}
    for process in mine:
        process.join(timeout=20)
        assert not process.is_alive()


def test_a_pool_reads_rows_as_this_process_does(open_, write_rows, tmp_path, monkeypatch):
    """The length pass, in blocks: the tables are equal, and so is what is told of what was lost."""
    rows = pairs(700)
    rows[40], rows[650] = {"prompt": 3}, {"prompt": "long", "completion": "well " * 99}
    config = make_config({"path": write_rows("a.jsonl", rows), "templates": TEMPLATES}, on_bad_row="skip", window=64)
    monkeypatch.setattr(pooling, "_FEW", 0)
    monkeypatch.setattr(lengths, "_BLOCK", 128)
    here = open_(config, cache_dir=str(pathlib.Path(config.data.train[0].path).parent / "here"))
    with pooling.Pool(2, cache_dir=str(tmp_path / "cache")) as pool:
        there = open_(config, read_all=pool.read_all)
    assert here.funnel == there.funnel and here.funnel.table() == there.funnel.table()
    assert here.steps_per_run == there.steps_per_run and here.fill == there.fill
    assert np.array_equal(here.rows_of_windows, there.rows_of_windows)


def test_two_pools_at_once_make_each_shard_once(prepare, open_, write_rows, tmp_path):
    config = make_config(write_rows("a.jsonl", pairs(300)), window=8, train={"epochs": 2.0})
    folder, _, _ = prepare(config)
    wanted = folder.shards()
    shutil.rmtree(folder.path)
    maker, made = open_(config).maker, [[], []]
    with (
        pooling.Pool(1, cache_dir=str(tmp_path / "cache")) as one,
        pooling.Pool(1, cache_dir=str(tmp_path / "cache")) as other,
        concurrent.futures.ThreadPoolExecutor(2) as threads,
    ):
        running = [
            threads.submit(pool.make, maker, folder, wanted, lambda shard, summary, mine=mine: mine.append(shard))
            for pool, mine in zip((one, other), made, strict=True)
        ]
        for future in running:
            future.result()
    assert sorted(made[0] + made[1]) == wanted == folder.shards() and all(made)


def test_a_claimed_shard_is_left_to_its_claimer_until_that_is_gone(tmp_path):
    folder, shard = Folder(str(tmp_path)), Shard(0, 4)
    with Claims(folder) as mine, Claims(folder) as yours:
        assert mine.take(shard) and not yours.take(shard)
        mine.release(shard)
        assert yours.take(shard) and not mine.take(shard)
    assert folder.names() == []
    (tmp_path / "claim-00000000-00000004").write_text(
        json.dumps({"host": "elsewhere", "pid": 1, "start": "1", "heartbeat": 0.0})
    )
    with Claims(folder) as mine:
        assert mine.take(shard)
    (tmp_path / "claim-00000000-00000004").write_text("")  # cut off while it was written
    with Claims(folder) as mine:
        assert mine.take(shard)


def test_twenty_kills_leave_a_cache_that_the_next_preparer_completes(open_, prepare, write_rows, tmp_path):
    """SIGKILL at 20 random moments of the work itself, each on what the one before left; tests/test_prepare_command.py
    kills the whole command."""
    config = make_config(write_rows("a.jsonl", pairs(400)), window=8, train={"epochs": 2.0})
    folder, _, outcome = prepare(config)
    alone = {name: pathlib.Path(folder.file(name)).read_bytes() for name in folder.names()}
    shutil.rmtree(folder.path)
    stream, reached = open_(config), []

    def work():
        with Claims(folder) as claims:

            def make(maker, where, shards, done):
                for shard in shards:
                    assert claims.take(shard)
                    serially(maker, where, [shard], done)
                    claims.release(shard)

            preparing.prepare(config, stream, folder, make, say=str, progress=lambda done, total: None)

    chance = random.Random(0)
    for _ in range(20):
        worker = multiprocessing.get_context("fork").Process(target=work)
        worker.start()
        worker.join(timeout=chance.uniform(0, outcome.seconds / 8))
        worker.kill()
        worker.join()
        for shard in folder.shards():  # what has its name is whole
            assert prepared.read_summary(folder, shard) is not None
            assert pathlib.Path(folder.file(shard.name)).read_bytes() == alone[shard.name]
        reached.append(len(folder.shards()))
    assert reached == sorted(reached) and reached[5] < len(alone) // 2
    prepare(config)
    assert alone == {name: pathlib.Path(folder.file(name)).read_bytes() for name in folder.names()}


def test_what_a_killed_preparer_left_is_taken_away(prepare, write_rows):
    config = make_config(write_rows("a.jsonl", pairs(60)), window=8)
    folder, _, _ = prepare(config)
    host = prepared.socket.gethostname()
    for name in (f"aside-{host}-999999999-x", f"aside-{host}-{os.getpid()}-x", "aside-elsewhere-5-x"):
        pathlib.Path(folder.file(name)).write_text("half")
    prepare(config)
    left = sorted(name for name in folder.names() if name.startswith("aside-"))
    assert left == sorted([f"aside-{host}-{os.getpid()}-x", "aside-elsewhere-5-x"])


def test_the_parts_that_streams_are_compared_by_cover_their_identity(open_, write_rows):
    """A stream that differs is told apart by the parts, too."""
    path = write_rows("a.jsonl", pairs(60))
    one = attaching.about(open_(make_config(path, window=8)))
    assert attaching.differences(one, one) == []
    for other in ({"train_on": "all"}, {"reasoning": "drop"}, {"packing": False}, {"eval_fraction": 0.1}):
        stream = open_(make_config(path, window=8, **other))
        assert attaching.differences(attaching.about(stream), one), other
