"""Texts are the same but for case and white space; repeats know their first."""

import gzip
import json

import numpy as np

from jaxtune.data.quality.duplicates import exact_key, first_of_equal


def test_a_key_knows_no_case_white_space_or_composition():
    assert exact_key(["Say  HI\n", "Café"]) == exact_key(["say hi", "CAFE\u0301"])
    assert 0 <= exact_key(["a"]) < 2**64


def test_a_key_knows_where_a_text_ends():
    keys = {exact_key(texts) for texts in (["a", "b"], ["ab"], ["a b"], ["b", "a"], ["a"], ["a", ""], [])}
    assert len(keys) == 7


def test_a_key_is_the_same_on_every_machine():
    assert exact_key(["hello world", "x"]) == 16076863688497210961


def test_repeats_name_the_first():
    keys = np.array([7, 5, 7, 7, 5, 2**64 - 1, 0], np.uint64)
    assert first_of_equal(keys).tolist() == [-1, -1, 0, 0, 1, -1, -1]
    assert first_of_equal(keys[:0]).tolist() == []
    assert first_of_equal(np.zeros(4, np.uint64)).tolist() == [-1, 0, 0, 0]


def test_repeats_are_those_a_dictionary_finds():
    keys = np.random.default_rng(0).integers(0, 300, 1000).astype(np.uint64)
    seen: dict[int, int] = {}
    expected = [seen.setdefault(int(key), i) for i, key in enumerate(keys)]
    found = first_of_equal(keys)
    assert found.dtype == np.int64
    assert found.tolist() == [-1 if first == i else first for i, first in enumerate(expected)]


def test_the_known_repeats_of_real_files_are_found(shared):
    with open(shared / "cot" / "strategyqa.tsv", encoding="utf-8") as file:
        lines = [exact_key([line]) for line in file]
    with gzip.open(shared / "multiturn" / "glaive_toolcall.jsonl.gz", "rt", encoding="utf-8") as file:
        talks = [exact_key([turn["value"] for turn in json.loads(line)["conversations"]]) for line in file]
    repeats = [int((first_of_equal(np.array(keys, np.uint64)) >= 0).sum()) for keys in (lines, talks)]
    assert repeats == [1, 20]
