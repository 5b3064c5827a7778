"""Realised shares: over 200,000 draws within 0.1 % absolute of what is asked, for every rule."""

import numpy as np
import pytest

from jaxtune.data.mixing import mixture, tree
from jaxtune.data.mixing.shares import Sizes, leaf_shares
from jaxtune.decode import from_tree

COUNTS = (7, 120, 3_000, 45_000, 1_000_000)


def sources(**keys):
    return [{"id": f"s{n}", "path": f"s{n}.jsonl", "examples": n, **keys} for n in COUNTS]


def weighed(weights):
    return [{**one, "weight": weight} for one, weight in zip(sources(), weights, strict=True)]


RULES = {
    "weights": (weighed([0.4, 0.32, 0.2, 0.05, 0.03]), {}),
    "weights over a ratio of a million": (weighed([1, 10, 1e3, 1e5, 1e6]), {}),
    "epochs": (sources(), {}),
    "epochs of their own": ([{**one, "epochs": 1 + i} for i, one in enumerate(sources())], {}),
    "proportional": (sources(), {"rates": "proportional"}),
    "proportional, capped": (sources(), {"rates": "proportional", "cap": 3000}),
    "proportional, scaled and capped": (sources(), {"rates": "proportional", "scale": 0.3, "cap": 900.5}),
    "temperature": (sources(), {"rates": "temperature", "temperature": 3}),
    "equal": (sources(), {"rates": "equal"}),
    "tags": ([{**one, "tags": ["a"] if i < 2 else []} for i, one in enumerate(sources())], {"tags": {"a": 0.37}}),
    "tags that overlap": (
        [{**one, "tags": ["a", "b"][: i % 3]} for i, one in enumerate(sources())],
        {"tags": {"a": 0.4, "b": 0.15}},
    ),
    "tokens": (sources(), {"unit": "tokens", "rates": "proportional"}),
    "tokens by tag": (
        [{**one, "tags": ["a"] if i < 2 else []} for i, one in enumerate(sources())],
        {"unit": "tokens", "tags": {"a": 0.37}},
    ),
    "nested": (
        [{"id": "g", "weight": 0.7, "sources": sources()}, {"id": "h", "weight": 0.3, "sources": sources()}],
        {},
    ),
    "styles": (
        [{**one, "weight": 1 + i, "styles": {"zero_shot": 0.9, "few_shot": 0.1}} for i, one in enumerate(sources())],
        {},
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("first", [0, 1_234_567])
def test_shares_are_realised(rule, first):
    listed, mixing = RULES[rule]
    config = from_tree({"output": "o", "model": {"path": "m"}, "data": {"train": listed, "mixing": mixing}})
    root = tree.expand(config, config.data.train, key="data.train", template_names=lambda *given: [])
    leaves = list(root.leaves())
    tokens = {leaf.name: 20.0 + 30 * i for i, leaf in enumerate(leaves)}
    shares = leaf_shares(root, Sizes({leaf.name: leaf.config.examples for leaf in leaves}, tokens))
    asked = np.array([float(share) for share in shares])
    drawn = mixture.Wheel(shares, seed=5).leaves(first, 200_000)
    assert np.abs(np.bincount(drawn, minlength=len(asked)) / 200_000 - asked).max() < 1e-3
    if "tokens" in rule:
        brought = asked * np.array(list(tokens.values()))
        share = brought[:2].sum() / brought.sum()
        wanted = (
            0.37
            if "tag" in rule
            else np.dot(COUNTS[:2], list(tokens.values())[:2]) / np.dot(COUNTS, list(tokens.values()))
        )
        assert share == pytest.approx(wanted, rel=1e-6)
