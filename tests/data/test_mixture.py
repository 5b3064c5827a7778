"""Draws: exact, random-access, evenly spread; permutations that are permutations."""

import collections
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.data.mixture import InOrder, Leaf, Mixture, held_out_rows, integer_rates, permute

LEAVES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3)), min_size=1, max_size=6).filter(
    lambda leaves: any(n for n, _ in leaves)
)


def make(leaves, **keys):
    return Mixture([Leaf(n, Fraction(1), float(e)) for n, e in leaves], **keys)


@settings(max_examples=60, deadline=None)
@given(LEAVES, st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_every_row_is_drawn_exactly_its_epochs(leaves, seed, epochs):
    mixture = make(leaves, seed=seed, epochs=epochs)
    draws = mixture.block(0, mixture.total)
    seen = collections.Counter(zip(draws.source.tolist(), draws.row.tolist(), draws.epoch.tolist(), strict=True))
    expected = {(s, r, e) for s, (n, times) in enumerate(leaves) for r in range(n) for e in range(times * epochs)}
    assert set(seen) == expected and set(seen.values()) <= {1}


@settings(max_examples=60, deadline=None)
@given(LEAVES, st.integers(0, 2**32 - 1), st.integers(0, 10**6), st.integers(1, 200))
def test_any_block_is_part_of_the_one_stream(leaves, seed, first, count):
    mixture = make(leaves, seed=seed)
    block = mixture.block(first, count)
    one_by_one = [mixture.block(first + i, 1) for i in range(count)]
    for field, whole in zip(block._fields, block, strict=True):
        assert whole.tolist() == [int(getattr(d, field)[0]) for d in one_by_one]


def test_rank_counts_agree_with_counting():
    mixture = make([(7, 1), (0, 1), (13, 2), (1, 1)], seed=5)
    sources = mixture.block(0, 3000).source
    for draw in (0, 1, 2, 99, 2999):
        counted = np.bincount(sources[:draw], minlength=4).tolist()
        assert [mixture.drawn_before(draw, leaf) for leaf in range(4)] == counted


def test_shares_are_realised_and_drift_is_small():
    weights = [0.4, 0.32, 0.2, 0.05, 0.03]
    for scale in (1, 0.123457):
        leaves = [Leaf(1000, Fraction(str(w * scale)), 1.0) for w in weights]
        mixture = Mixture(leaves, seed=1, by_rows=False)
        source = mixture.block(0, 200_000).source
        counts = np.cumsum(source[:, None] == np.arange(5), axis=0)
        asked = np.arange(1, 200_001)[:, None] * np.array(weights)
        assert np.abs(counts[-1] / 200_000 - weights).max() < 1e-4
        assert np.abs(counts - asked).max() < 4


def test_thousands_of_sources_over_ratios_of_a_million():
    sizes = np.random.default_rng(0).integers(1, 10**6, 1836)
    mixture = Mixture([Leaf(int(n), Fraction(int(n))) for n in sizes], seed=3, by_rows=False)
    started = time.perf_counter()
    source = mixture.block(10**7, 10**6).source
    assert time.perf_counter() - started < 10  # a million draws a second by far on a quiet machine
    realised = np.bincount(source, minlength=1836) / 10**6
    assert np.abs(realised - sizes / sizes.sum()).max() < 1e-5


def test_points_beyond_64_bits_of_product():
    leaves = [Leaf(10, Fraction(3, 7**20)), Leaf(10, Fraction(5, 11**9)), Leaf(10, Fraction(1, 3))]
    assert sum(integer_rates([leaf.rate for leaf in leaves])) <= 1 << 40
    mixture = Mixture([Leaf(10**9, Fraction(10**9)), Leaf(3 * 10**11, Fraction(1))], seed=9)
    block = mixture.block(10**11, 1000)
    assert block.row.tolist() == [int(mixture.block(10**11 + i, 1).row[0]) for i in range(1000)]


def test_integer_rates_are_exact():
    assert integer_rates([Fraction("0.4"), Fraction("0.32"), Fraction("0.28")]) == [10, 8, 7]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    out = permute(np.arange(size), np.full(size, size), np.full(size, key, np.uint64))
    assert sorted(out.tolist()) == list(range(size))


def test_permutations_differ_between_epochs_and_seeds_and_look_shuffled():
    index, size = np.arange(1000), np.full(1000, 1000)
    orders = [permute(index, size, np.full(1000, k, np.uint64)) for k in range(5)]
    for a in range(5):
        assert abs(np.corrcoef(index, orders[a])[0, 1]) < 0.12
        assert all((orders[a] != orders[b]).mean() > 0.99 for b in range(a))
    one = make([(100, 1)], seed=0, epochs=2).block(0, 200).row
    assert one[:100].tolist() != one[100:].tolist()


def test_held_out_rows_are_never_drawn():
    mixture = Mixture([Leaf(50, Fraction(1), 1.0, held_out=7), Leaf(20, Fraction(1), 2.0)], seed=4, epochs=2)
    held = held_out_rows(50, 7, seed=4, source=0)
    draws = mixture.block(0, mixture.total)
    drawn = collections.Counter(draws.row[draws.source == 0].tolist())
    assert len(held) == 7 and not set(held.tolist()) & set(drawn)
    assert sorted([*held.tolist(), *drawn]) == list(range(50)) and set(drawn.values()) == {2}


def test_in_order_gives_each_row_once():
    order = InOrder([np.array([3, 1]), np.array([0, 5, 6])])
    draws = order.block(1, 10)
    assert (draws.source.tolist(), draws.row.tolist()) == ([0, 1, 1, 1], [1, 0, 5, 6])


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="no source has a row left"):
        make([(0, 1)], seed=0)
