"""Draws: exact, random-access, evenly spread; permutations that are permutations."""

import collections
import itertools
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.data.mixing.mixture import InOrder, Leaf, Mixture, held_out_rows, integer_rates, permute

LEAVES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3)), min_size=1, max_size=6).filter(
    lambda leaves: any(n for n, _ in leaves)
)


def make(leaves, *, seed):
    """Leaves of (rows, epochs), each drawn in proportion to rows x epochs."""
    made = [Leaf(n, float(e), source=i) for i, (n, e) in enumerate(leaves)]
    return Mixture(made, [[Fraction(n * e) for n, e in leaves]], seed=seed)


def pass_of(mixture):
    """Draws in one pass over the plan."""
    return sum(round(leaf.rows * leaf.epochs) for leaf in mixture.leaves)


@settings(max_examples=60, deadline=None)
@given(LEAVES, st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_every_row_is_drawn_exactly_its_epochs(leaves, seed, epochs):
    mixture = make(leaves, seed=seed)
    draws = mixture.block(0, pass_of(mixture) * epochs)
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
        leaves = [Leaf(1000, source=i) for i in range(5)]
        mixture = Mixture(leaves, [[Fraction(str(w * scale)) for w in weights]], seed=1)
        source = mixture.block(0, 200_000).source
        counts = np.cumsum(source[:, None] == np.arange(5), axis=0)
        asked = np.arange(1, 200_001)[:, None] * np.array(weights)
        assert np.abs(counts[-1] / 200_000 - weights).max() < 1e-4
        assert np.abs(counts - asked).max() < 4


def test_thousands_of_sources_over_ratios_of_a_million():
    sizes = np.random.default_rng(0).integers(1, 10**6, 1836)
    mixture = make([(int(n), 1) for n in sizes], seed=3)
    started = time.perf_counter()
    source = mixture.block(10**7, 10**6).source
    assert time.perf_counter() - started < 10  # a million draws a second by far on a quiet machine
    realised = np.bincount(source, minlength=1836) / 10**6
    assert np.abs(realised - sizes / sizes.sum()).max() < 1e-5


def test_points_beyond_64_bits_of_product():
    assert sum(integer_rates([Fraction(3, 7**20), Fraction(5, 11**9), Fraction(1, 3)])) <= 1 << 40
    mixture = make([(10**9, 1), (3 * 10**11, 1)], seed=9)
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
    one = make([(100, 1)], seed=0).block(0, 200).row
    assert one[:100].tolist() != one[100:].tolist()


def test_held_out_rows_are_never_drawn():
    leaves = [Leaf(50, 1.0, held_out=7), Leaf(20, 2.0, source=1)]
    mixture = Mixture(leaves, [[Fraction(43), Fraction(40)]], seed=4)
    held = held_out_rows(50, 7, seed=4, source=0)
    draws = mixture.block(0, 2 * pass_of(mixture))
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


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(0, 1000))
def test_styles_of_one_source_show_each_row_once_an_epoch(rows, shares, seed):
    """Leaves with parts of the same rows: in an epoch each row has one style, in the next mostly another."""
    ends = [round(rows * sum(shares[:i]) / sum(shares)) for i in range(len(shares) + 1)]
    parts = [(a, b) for a, b in itertools.pairwise(ends) if b > a]
    leaves = [Leaf(rows, source=0, part=part) for part in parts]
    mixture = Mixture(leaves, [[Fraction(b - a) for a, b in parts]], seed=seed)
    for epoch in range(3):
        draws = mixture.block(epoch * rows, rows)
        assert sorted(draws.row.tolist()) == list(range(rows)) and set(draws.epoch.tolist()) == {epoch}


def test_phases_change_the_shares_and_go_on_counting_rows():
    """Three phases of two sources; over the whole run no row of an epoch is drawn twice or left out."""
    leaves = [Leaf(100, source=0), Leaf(70, source=1)]
    phases = [[Fraction(3), Fraction(1)], [Fraction(0), Fraction(1)], [Fraction(1), Fraction(1)]]
    mixture = Mixture(leaves, phases, seed=2, ends=[200, 260])
    draws = mixture.block(0, 1000)
    shares = [np.mean(draws.source[a:b] == 0) for a, b in ((0, 200), (200, 260), (260, 1000))]
    assert shares == pytest.approx([0.75, 0.0, 0.5], abs=0.01)
    for leaf, rows in enumerate((100, 70)):
        mine = draws.source == leaf
        seen = collections.Counter(zip(draws.epoch[mine].tolist(), draws.row[mine].tolist(), strict=True))
        assert set(seen.values()) == {1}
        whole = draws.epoch[mine].max()
        assert all(sum(e == epoch for e, _ in seen) == rows for epoch in range(whole))
    assert [mixture.drawn_before(1000, i) for i in (0, 1)] == [int((draws.source == i).sum()) for i in (0, 1)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 500), st.integers(1, 200), st.lists(st.integers(1, 400), max_size=2), st.integers(0, 99))
def test_blocks_across_phases_are_part_of_the_one_stream(first, count, ends, seed):
    phases = [[Fraction(1), Fraction(2)], [Fraction(5), Fraction(1)], [Fraction(0), Fraction(1)]]
    mixture = Mixture([Leaf(9, source=0), Leaf(50, source=1)], phases, seed=seed, ends=sorted(ends))
    block = mixture.block(first, count)
    one_by_one = [mixture.block(first + i, 1) for i in range(count)]
    for field, whole in zip(block._fields, block, strict=True):
        assert whole.tolist() == [int(getattr(d, field)[0]) for d in one_by_one]


def test_an_order_takes_the_place_of_the_shuffle():
    order = np.array([4, 2, 0])
    mixture = Mixture([Leaf(5, source=0, order=order), Leaf(3, source=1)], [[Fraction(1), Fraction(1)]], seed=0)
    draws = mixture.block(0, 12)
    assert draws.row[draws.source == 0].tolist() == [4, 2, 0, 4, 2, 0]


def test_the_draw_after_which_a_source_has_been_seen():
    mixture = Mixture([Leaf(30, 2.0, source=0), Leaf(7, source=1)], [[Fraction(1), Fraction(3)]], seed=1)
    for leaf, wanted in ((0, 60), (1, 7)):
        end = mixture.first_seen_whole(leaf)
        assert (mixture.drawn_before(end, leaf), mixture.drawn_before(end - 1, leaf)) == (wanted, wanted - 1)
