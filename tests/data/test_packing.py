"""Rows of examples and of pairs: the pictures in the docstrings, SeqIO's layout, and how full rows get."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.data.packing import Example, Pair, lay_out, lay_out_pairs, pack_pairs, pack_window


def example(tokens, weights):
    tokens = np.array(tokens, np.int32)
    return Example(tokens[:-1], tokens[1:], np.array(weights, np.float32))


def test_the_picture():
    a, b = example([10, 11, 12, 13], [0, 1, 1]), example([20, 21, 22], [0, 1])
    batch = lay_out([[(a, 4), (b, 0)]], 6)
    assert {name: getattr(batch, name)[0].tolist() for name in batch._fields} == {
        "tokens": [10, 11, 12, 20, 21, 0],
        "targets": [11, 12, 13, 21, 22, 0],
        "positions": [0, 1, 2, 0, 1, 0],
        "segment_ids": [1, 1, 1, 2, 2, 0],
        "loss_weights": [0, 1, 1, 0, 1, 0],
        "source_ids": [4, 4, 4, 0, 0, 0],
    }
    dtypes = {name: str(getattr(batch, name).dtype) for name in batch._fields}
    assert dtypes == {name: "float32" if name == "loss_weights" else "int32" for name in batch._fields}


def test_seqios_known_layout():
    """SeqIO packs inputs 8 7 1 and 2 3 4 1 into ten places; here each of them has one more token, its last target."""
    first, second = example([8, 7, 1, 99], [1, 1, 1]), example([2, 3, 4, 1, 99], [1, 1, 1, 1])
    batch = lay_out([[(first, 0), (second, 0)]], 10)
    assert batch.tokens[0].tolist() == [8, 7, 1, 2, 3, 4, 1, 0, 0, 0]
    assert batch.segment_ids[0].tolist() == [1, 1, 1, 2, 2, 2, 2, 0, 0, 0]
    assert batch.positions[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 0, 0]


def test_best_fit_of_the_docstring():
    rows = pack_window([5, 3, 4, 2, 2], 8, seed=0, window=0)
    assert sorted(rows) == [[0, 1], [2, 3, 4]]


def test_an_empty_row_is_all_padding():
    batch = lay_out([[]], 4)
    assert all(not getattr(batch, name).any() for name in batch._fields)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=80), st.integers(0, 9), st.integers(0, 9), st.booleans())
def test_every_example_is_in_one_row_that_holds_it(lengths, seed, window, packing):
    rows = pack_window(lengths, 50, seed=seed, window=window, packing=packing)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= 50 and row == sorted(row) for row in rows)
    assert packing or len(rows) == len(lengths)
    # Two rows that could be one are not left apart.
    room = sorted(50 - sum(lengths[i] for i in row) for row in rows)
    assert not packing or len(room) < 2 or 100 - room[-1] - room[-2] > 50


def test_rows_are_shuffled_by_seed_and_window():
    lengths = [50] * 30
    orders = {str(pack_window(lengths, 50, seed=s, window=w)) for s in range(3) for w in range(3)}
    assert len(orders) == 9
    assert pack_window(lengths, 50, seed=1, window=2) == pack_window(lengths, 50, seed=1, window=2)


def test_windows_fill_rows():
    lengths = np.minimum(2048, np.random.default_rng(0).lognormal(4.5, 0.9, 20_480).astype(int) + 1)
    rows = sum(len(pack_window(lengths[i : i + 512].tolist(), 2048, seed=0, window=i)) for i in range(0, 20_480, 512))
    assert lengths.sum() / rows / 2048 > 0.98


# ---- pairs for an encoder-decoder ----


def pair(encoder_tokens, targets, weights=None):
    weights = [1] * len(targets) if weights is None else weights
    return Pair(np.array(encoder_tokens, np.int32), np.array(targets, np.int32), np.array(weights, np.float32))


def test_seqios_known_pairs():
    """SeqIO's answer, to the array: each segment of the decoder begins with 0, and its targets follow one behind."""
    rows = [[(pair([8, 7, 1], [4, 1]), 3), (pair([2, 3, 4, 1], [5, 6, 1]), 0)]]
    batch = lay_out_pairs(rows, 10, 10, start_token=0)
    assert {name: getattr(batch, name)[0].tolist() for name in batch._fields} == {
        "encoder_tokens": [8, 7, 1, 2, 3, 4, 1, 0, 0, 0],
        "encoder_positions": [0, 1, 2, 0, 1, 2, 3, 0, 0, 0],
        "encoder_segment_ids": [1, 1, 1, 2, 2, 2, 2, 0, 0, 0],
        "tokens": [0, 4, 0, 5, 6, 0, 0, 0, 0, 0],
        "targets": [4, 1, 5, 6, 1, 0, 0, 0, 0, 0],
        "positions": [0, 1, 0, 1, 2, 0, 0, 0, 0, 0],
        "segment_ids": [1, 1, 2, 2, 2, 0, 0, 0, 0, 0],
        "loss_weights": [1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        "source_ids": [3, 3, 0, 0, 0, 0, 0, 0, 0, 0],
    }
    dtypes = {name: str(getattr(batch, name).dtype) for name in batch._fields}
    assert dtypes == {name: "float32" if name == "loss_weights" else "int32" for name in batch._fields}


def test_each_side_has_its_length_and_the_decoder_its_start_token():
    batch = lay_out_pairs([[(pair([5, 1], [6], [0.5]), 2), (pair([7, 1], [8, 1], [0, 1]), 2)], []], 5, 4, start_token=9)
    assert {array.shape for array in batch[:3]} == {(2, 5)} and {array.shape for array in batch[3:]} == {(2, 4)}
    assert batch.tokens[0].tolist() == [9, 9, 8, 0]
    assert batch.loss_weights[0].tolist() == [0.5, 0, 1, 0]
    assert all(not array[1].any() for array in batch)


def test_pairs_of_the_docstring():
    rows = pack_pairs(np.array([[6, 2], [2, 6], [5, 5]]), 8, 8, seed=0, window=0)
    assert sorted(rows) == [[0, 1], [2]]


def test_a_pair_joins_the_row_whose_room_is_shaped_like_it():
    """Rows begun by (6 5) and (3 7) have room (2 3) and (5 1): (2 1) leaves less of the first, but wastes less of the
    second."""
    rows = pack_pairs(np.array([[6, 5], [3, 7], [2, 1]]), 8, 8, seed=0, window=0)
    assert sorted(rows) == [[0], [1, 2]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 20)), max_size=80),
    st.integers(0, 9),
    st.integers(0, 9),
    st.booleans(),
)
def test_every_pair_is_whole_in_one_row_that_holds_both_its_sides(lengths, seed, window, packing):
    array = np.array(lengths, np.int64).reshape(-1, 2)
    rows = pack_pairs(array, 50, 20, seed=seed, window=window, packing=packing)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row and row == sorted(row) and (array[row].sum(axis=0) <= (50, 20)).all() for row in rows)
    assert packing or len(rows) == len(lengths)
    assert rows == pack_pairs(array, 50, 20, seed=seed, window=window, packing=packing)
    # A row that was begun last found none with room for its pairs.
    sums = [array[row].sum(axis=0) for row in rows]
    apart = all((a + b > (50, 20)).any() for n, a in enumerate(sums) for b in sums[:n])
    assert apart or not packing


def test_rows_of_pairs_are_shuffled_by_seed_and_window():
    lengths = np.full((30, 2), 50)
    orders = {str(pack_pairs(lengths, 50, 50, seed=s, window=w)) for s in range(3) for w in range(3)}
    assert len(orders) == 9


def test_windows_of_pairs_fill_the_side_that_fills_first():
    """Lengths much like those of T0 with chain of thought; the row with the least room left would fill 93 %."""
    random = np.random.default_rng(0)
    drawn = np.stack([random.lognormal(4.2, 0.8, 10_240), random.lognormal(2.6, 1.3, 10_240)], axis=1)
    lengths = np.minimum(drawn.astype(int) + 2, (1024, 256))
    rows = sum(len(pack_pairs(lengths[i : i + 1024], 1024, 256, seed=0, window=i)) for i in range(0, 10_240, 1024))
    assert (lengths.sum(axis=0) / rows / (1024, 256)).max() > 0.945
