"""Near duplicates are those that comparing all with all finds, and nothing else; by known similarities."""

import gzip
import json
import os
import random

import numpy as np
import pytest
import scipy.sparse

from jaxtune.data.quality import near
from jaxtune.data.quality.minhash import band_keys, bands_for, chance, signatures
from jaxtune.data.quality.near import near_duplicates
from jaxtune.data.quality.pairs import Pairs, neighbours
from jaxtune.data.quality.similarity import common_subsequence, jaccard, rouge_l, shingles
from jaxtune.data.quality.words import words
from jaxtune.data.wording.content import normal

LONG = "the quick brown fox jumps over the lazy dog while the cat sleeps in the warm afternoon sun of a long summer"
OTHER = "an entirely different sentence about ships that sail across northern seas with cargo and crews of many lands"


def found(texts, folder, **keys):
    return near_duplicates(lambda rows: [texts[i] for i in rows], len(texts), folder=str(folder), **keys).tolist()


def test_shingles_are_five_characters_with_ends():
    assert shingles("abcdef") == {"abcde", "bcdef", "cdef\0", "def\0\0", "ef\0\0\0", "f\0\0\0\0"}
    assert shingles("") == frozenset()


def test_jaccard_is_what_is_shared_of_all():
    assert jaccard(frozenset("abc"), frozenset("bcd")) == 0.5
    assert jaccard(frozenset(), frozenset()) == 1.0 and jaccard(frozenset("a"), frozenset()) == 0.0


@pytest.mark.parametrize(
    ("a", "b", "length"),
    [
        ("abcbdab", "bdcaba", 4),
        ("abc", "abc", 3),
        ("abc", "cba", 1),
        ("", "abc", 0),
        ("aaaa", "aa", 2),
        ("ab", "xy", 0),
    ],
)
def test_the_longest_common_subsequence_is_known(a, b, length):
    assert common_subsequence(a, b) == common_subsequence(b, a) == length


def test_the_longest_common_subsequence_is_that_of_the_table():
    rng = random.Random(0)
    for _ in range(50):
        a, b = ([rng.choice("abcde") for _ in range(rng.randrange(90))] for _ in range(2))
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
        assert common_subsequence(a, b) == table[-1, -1]


def test_rouge_l_is_an_f_measure_and_gives_up_where_lengths_forbid():
    assert rouge_l(["the", "cat", "sat"], ["the", "cat", "ran", "off"]) == pytest.approx(4 / 7)
    assert rouge_l([], []) == rouge_l(["a"], []) == 0.0
    assert rouge_l("abcd", "abcdefgh", above=0.7) == 0.0  # at most 2 * 4 / 12
    assert rouge_l("abcdefg", "abcdefghijklm", above=0.7) == 0.0  # 14 / 20 is not above 0.7
    assert rouge_l("abcdefgh", "abcdefghijklm", above=0.7) == pytest.approx(16 / 21)


def test_hashes_agree_as_often_as_texts_are_alike():
    a = " ".join(f"word{i}" for i in range(200))
    b = a.replace("word1", "ward1")
    expected = jaccard(shingles(a), shingles(b))
    one, other, same = signatures([a, b, a])
    assert 0.3 < expected < 0.9 and abs((one == other).mean() - expected) < 0.15
    assert (one == same).all()


def test_a_signature_does_not_know_its_block():
    texts = ["x", "some text", "y" * 100_000, LONG, "茶は\U0001f600", OTHER]
    together = signatures(texts)
    assert (together == np.concatenate([signatures([text]) for text in texts])).all()


def test_a_signature_is_the_same_on_every_machine():
    assert signatures(["hello world"])[0, :3].tolist() == [643571291, 1349583958, 239332511]


def test_bands_find_99_of_100_pairs_at_the_threshold():
    assert bands_for(0.8) == (16, 6) and chance(0.8, 16, 6) == pytest.approx(0.9923, abs=1e-4)
    for threshold in (0.3, 0.5, 0.9, 0.95):
        assert chance(threshold, *bands_for(threshold)) >= 0.99 and np.prod(bands_for(threshold)) <= 96


def test_a_bands_key_knows_its_own_hashes_only():
    signature = signatures([LONG, LONG])
    signature[1, 6] ^= 1
    same = np.equal(*band_keys(signature, 16, 6))
    assert same.sum() == 15 and not same[1]


def test_pairs_are_few_however_large_a_bucket_is():
    keys, finer = np.repeat(np.uint64([5, 9]), [1000, 1]), np.arange(1001, dtype=np.uint64) % 7
    pairs = neighbours(keys, finer)
    later, earlier = pairs >> np.uint64(32), pairs & np.uint64(0xFFFFFFFF)
    assert len(pairs) <= 3 * 1000 and (later > earlier).all() and (np.diff(pairs.astype(float)) > 0).all()
    assert set(later.tolist()) == set(range(1, 1000))  # each with some earlier one, the lone row with none
    assert {(7, 0), (14, 0), (14, 7), (21, 7), (8, 1)} <= set(zip(later.tolist(), earlier.tolist(), strict=True))
    assert neighbours(keys[-1:], finer[-1:]).tolist() == []


def test_pairs_come_back_in_blocks_once_each(tmp_path):
    pairs = Pairs(str(tmp_path), 10, 4)
    for written in ([(1, 0), (3, 1), (4, 0)], [(3, 1), (9, 8)], []):
        pairs.write(np.array([later << 32 | earlier for later, earlier in written], np.uint64))
    read = [[array.tolist() for array in pairs.read(block)] for block in range(pairs.blocks)]
    assert read == [[[1, 3], [0, 1]], [[4], [0]], [[9], [8]]]


def test_a_near_duplicate_names_the_first_that_is_kept(tmp_path):
    texts = [
        OTHER,
        LONG,
        LONG.replace("quick", "slick"),
        LONG.upper() + " ",
        LONG.replace("lazy", "hazy"),
        "",
        "",
        OTHER,
    ]
    assert found(texts, tmp_path) == [-1, -1, 1, 1, 1, -1, 5, 0]


def test_equal_texts_go_where_their_first_went(tmp_path):
    edited = LONG.replace("quick", "slick")
    assert found([LONG, edited, OTHER, edited, edited.upper()], tmp_path) == [-1, 0, -1, 0, 0]


def test_a_text_is_compared_with_what_is_kept_only(tmp_path):
    """b is near a, c is near b and not a: b goes, so that c stays."""
    parts = [f"sentence number {i} tells of thing {i * 7919 % 1000}" for i in range(60)]
    a, b, c = (". ".join(parts[:k] + [p[::-1] for p in parts[k:]]) for k in (60, 56, 52))
    sets = [shingles(normal(text)) for text in (a, b, c)]
    assert jaccard(sets[0], sets[1]) >= 0.8 <= jaccard(sets[1], sets[2]) and jaccard(sets[0], sets[2]) < 0.8
    assert found([a, b, c], tmp_path, rouge=1.0) == [-1, 0, -1]
    assert found([a, c, b], tmp_path, rouge=1.0) == [-1, -1, 0]  # near both: the first is named


def test_either_rule_is_enough(tmp_path):
    by_words = " ".join(word + ("s" if i % 4 == 0 else "") for i, word in enumerate(LONG.split()))
    sets = shingles(LONG), shingles(by_words)
    assert jaccard(*sets) < 0.8 and rouge_l(LONG.split(), by_words.split()) > 0.7
    assert found([LONG, by_words], tmp_path) == [-1, 0]
    assert found([LONG, by_words], tmp_path, rouge=1.0) == [-1, -1]
    edited = LONG.replace("quick", "slick")
    assert found([LONG, edited], tmp_path, rouge=1.0) == [-1, 0]
    assert found([LONG, edited], tmp_path, threshold=0.99, rouge=1.0) == [-1, -1]


def test_nothing_is_left_in_the_folder_and_no_texts_are_no_rows(tmp_path):
    assert found([], tmp_path) == [] and found([LONG, LONG], tmp_path) == [-1, 0] and not os.listdir(tmp_path)

    def broken(rows):
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        near_duplicates(broken, 3, folder=str(tmp_path))
    assert not os.listdir(tmp_path)


def test_progress_ends_with_all_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(near, "_READ", 2)
    told, asked = [], []
    texts = [LONG, OTHER, "third text of its own", LONG, "x"]

    def give(rows):
        asked.extend(rows)
        return [texts[i] for i in rows]

    near_duplicates(give, 5, folder=str(tmp_path), progress=lambda done, count: told.append((done, count)))
    assert told == [(1, 5), (2, 5), (2, 5), (5, 5)] and asked == [0, 1, 2, 3, 4]


def edited_rows(shared):
    """2,000 real rows, and 1,000 copies of some with words changed, dropped or doubled; in a mixed order."""
    rng = random.Random(0)
    with gzip.open(shared / "alpaca" / "alpaca_random_9k.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:2000]
    texts = [f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in rows]
    for text in rng.sample(texts, 1000):
        parts = text.split()
        for _ in range(rng.randint(1, 1 + len(parts) // 12)):
            at = rng.randrange(len(parts))
            parts[at : at + 1] = rng.choice([["changed"], [], [parts[at]] * 2])
            parts = parts or ["empty"]
        texts.append(" ".join(parts))
    rng.shuffle(texts)
    return texts


def compare_all(texts, threshold):
    """What comparing every pair finds, by Jaccard alone."""
    sets = [shingles(normal(text) or " ") for text in texts]
    known = {}
    cells = [(i, known.setdefault(shingle, len(known))) for i, one in enumerate(sets) for shingle in one]
    rows, columns = np.array(cells).T
    table = scipy.sparse.csr_matrix((np.ones(len(cells), np.int32), (rows, columns)))
    shared = (table @ table.T).tocoo()
    sizes = np.array([len(one) for one in sets])
    alike = shared.data / (sizes[shared.row] + sizes[shared.col] - shared.data) >= threshold
    near = {}
    for i, j in zip(shared.row[alike].tolist(), shared.col[alike].tolist(), strict=True):
        if j < i:
            near.setdefault(i, []).append(j)
    first = [-1] * len(texts)
    for i in range(len(texts)):
        first[i] = next((j for j in sorted(near.get(i, ())) if first[j] < 0), -1)
    return first


def test_what_comparing_all_with_all_finds_is_found_and_nothing_else(shared, tmp_path):
    texts = edited_rows(shared)
    expected = np.array(compare_all(texts, 0.8))
    by_jaccard = np.array(found(texts, tmp_path, rouge=1.0))
    right = (expected >= 0) & (by_jaccard == expected)
    assert (expected >= 0).sum() > 600 and right.sum() >= 0.98 * (expected >= 0).sum()
    assert (by_jaccard[expected < 0] < 0).mean() > 0.99  # a text whose kept one was missed may still be near another
    either = np.array(found(texts, tmp_path))
    assert ((either >= 0) >= (by_jaccard >= 0)).mean() > 0.99
    for i in np.flatnonzero(either >= 0).tolist():
        a, b = normal(texts[i]), normal(texts[either[i]])
        assert either[either[i]] == -1 and either[i] < i
        assert jaccard(shingles(a), shingles(b)) >= 0.8 or rouge_l(words(a).said, words(b).said) > 0.7


def test_worker_processes_change_nothing(shared, tmp_path, monkeypatch):
    texts = edited_rows(shared)[:1200]
    alone = found(texts, tmp_path)
    monkeypatch.setattr(near, "_READ", 100)
    monkeypatch.setattr(near, "_RESOLVED", 64)
    assert found(texts, tmp_path, workers=2) == alone and sum(first >= 0 for first in alone) > 100
