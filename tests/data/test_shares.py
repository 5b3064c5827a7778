"""Shares of nested mixtures: SeqIO's arithmetic, FLAN 2022's known answers, shares by tag, phases."""

import collections
import json
import math
import pathlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxtune.audit import __main__ as audit
from jaxtune.config import Config, ModelConfig, TrainConfig
from jaxtune.config_data import DataConfig, SourceConfig
from jaxtune.data import planning
from jaxtune.data.mixing import mixture, tree
from jaxtune.data.mixing.shares import Sizes, leaf_shares, style_parts
from jaxtune.decode import ConfigError, decode, from_tree, to_yaml

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"


def plan_of(sources, **data):
    """name -> share of a mixture of sources given as trees of keys."""
    config = config_of(sources, **data)
    root = tree.expand(config, config.data.train, key="data.train", template_names=lambda *given: [])
    sizes = Sizes({leaf.name: leaf.config.examples or 1 for leaf in root.leaves()})
    shares = leaf_shares(root, sizes)
    assert sum(shares) == 1
    return {leaf.name: share for leaf, share in zip(root.leaves(), shares, strict=True)}


def config_of(sources, *, train=None, **data):
    made = {"output": "o", "model": {"path": "m"}, "train": train or {}, "data": {"train": sources, **data}}
    return from_tree(made)


def leaf(id, examples=1, **keys):
    return {"id": id, "path": f"{id}.jsonl", "examples": examples, **keys}


def test_a_nested_rate_is_the_product_along_its_path():
    """Three leaves, the first by two paths: 1/24 + 1/3, 7/24, 1/3 (google/seqio, README, nested mixtures)."""
    shares = plan_of(
        [
            {"id": "a", "weight": 1, "sources": [leaf("x", weight=1), leaf("y", weight=7)]},
            {"id": "b", "weight": 2, "sources": [leaf("x", weight=5), leaf("z", weight=5)]},
        ]
    )
    assert shares["a/x"] + shares["b/x"] == Fraction(1, 24) + Fraction(1, 3)
    assert (shares["a/y"], shares["b/z"]) == (Fraction(7, 24), Fraction(1, 3))


@pytest.mark.parametrize(
    ("mixing", "rates"),
    [
        ({"rates": "proportional"}, [100, 900, 9000]),
        ({"rates": "proportional", "cap": 500}, [100, 500, 500]),
        ({"rates": "proportional", "scale": 0.1, "cap": 500}, [10, 90, 500]),
        ({"rates": "temperature", "temperature": 2}, [10, 30, math.sqrt(9000)]),
        ({"rates": "temperature", "temperature": 2, "cap": 400, "scale": 0.5}, [math.sqrt(50), 20, 20]),
        ({"rates": "temperature", "temperature": 1e9}, [1, 1, 1]),
        ({"rates": "equal"}, [1, 1, 1]),
        ({"rates": "epochs"}, [100, 900, 9000]),
        ({}, [100, 900, 9000]),
    ],
)
def test_rates_are_scaled_then_capped_then_taken_to_the_temperature(mixing, rates):
    shares = plan_of([leaf("a", 100), leaf("b", 900), leaf("c", 9000)], mixing=mixing)
    assert [float(share) for share in shares.values()] == pytest.approx([r / sum(rates) for r in rates], rel=1e-6)


def test_a_source_may_have_a_cap_and_epochs_of_its_own():
    capped = plan_of([leaf("a", 100), leaf("b", 900, cap=300)], mixing={"rates": "proportional"})
    assert list(capped.values()) == [Fraction(1, 4), Fraction(3, 4)]
    repeated = plan_of([leaf("a", 100, epochs=3), leaf("b", 900)])
    assert list(repeated.values()) == [Fraction(1, 4), Fraction(3, 4)]


def test_a_group_is_as_large_as_its_members():
    group = {"id": "g", "sources": [leaf("a", 100), leaf("b", 200)]}
    assert list(plan_of([group, leaf("c", 700)]).values()) == [Fraction(1, 10), Fraction(2, 10), Fraction(7, 10)]
    capped = {"id": "g", "mixing": {"rates": "proportional", "cap": 50}, "sources": [leaf("a", 100), leaf("b", 200)]}
    shares = plan_of([capped, leaf("c", 100)], mixing={"rates": "proportional"})
    assert list(shares.values()) == [Fraction(1, 4), Fraction(1, 4), Fraction(1, 2)], "its members' caps hold for it"


# FLAN 2022. The figures are those of the published table under the published recipe.


@pytest.fixture(scope="module")
def flan():
    plan = planning.mixture_plan(decode([str(CONFIGS / "flan2022.yaml")]))
    by_task = collections.defaultdict(float)
    for one in plan.leaves:
        by_task[one.name.split("/")[-1]] += 100 * float(one.rate)
    return plan, by_task


def test_flan_2022_has_1389_leaves(flan):
    plan, _ = flan
    tops = collections.Counter(one.name.split("/")[0] for one in plan.leaves)
    assert tops == {"flan2021": 71 * 5, "t0": 193 * 5, "cot": 18 * 3, "dialog": 4 * 3, "niv2": 3}
    assert len(plan.leaves) == 1389 and sum(one.rate for one in plan.leaves) == 1


def test_flan_2022_shares_of_styles(flan):
    tags = flan[0].by_tag()
    shown = {tag: f"{100 * tags[tag]:.1f}" for tag in ("zero_shot", "few_shot", "options", "no_options")}
    assert shown == {"zero_shot": "50.0", "few_shot": "50.0", "options": "64.0", "no_options": "36.0"}
    assert f"{100 * tags['inverted']:.3f}" == "1.846"


@pytest.mark.parametrize(
    ("task", "printed"),
    [
        ("tfds_natural_instructions", "20.0"),
        ("wiki_dialog", "2.196"),
        ("wiki_dialog_input_inversion", "0.659"),
        ("qrecc", "0.1117"),
        ("cot_esnli", "1.861"),
        ("cot_input_inversion_esnli", "0.558"),
        ("cot_gsm8k", "0.3845"),
        ("bool_q", "0.2489"),
        ("rte", "0.0618"),
        ("wsc", "0.0135"),
        ("cb", "0.0054"),
    ],
)
def test_flan_2022_share_of_a_task(flan, task, printed):
    digits = len(printed.split(".")[1])
    assert f"{flan[1][task]:.{digits}f}" == printed


def test_flan_2022_extremes(flan):
    plan, by_task = flan
    of = {
        top: {n.split("/")[-1] for n in (one.name for one in plan.leaves) if n.startswith(top)}
        for top in ("flan2021", "t0")
    }
    assert f"{max(by_task[t] for t in of['flan2021']):.3f}" == "0.810"
    assert min(by_task[t] for t in of["flan2021"]) == by_task["cb"]
    assert f"{max(by_task[t] for t in of['t0']):.3f}" == "0.240"
    assert f"{min(by_task[t] for t in of['t0']):.4f}" == "0.0125"
    rates = [float(one.rate) for one in plan.leaves]
    assert f"{min(rates):.1e}" == "6.8e-06" and max(rates) == pytest.approx(0.1)
    assert round(max(rates) / min(rates), -2) == 14_700


def test_flan_2022_capped_sizes():
    caps = {"Flan2021": 30_000, "T0": 20_000, "CoT": 100_000, "Dialog": 200_000}
    rows = tree.read_table("builtin:flan2022/task_sizes.csv", where="test")
    sums = {s: sum(min(cap, int(r["zero_shot"])) for r in rows if r["source"] == s) for s, cap in caps.items()}
    assert sums == {"Flan2021": 1_495_430, "T0": 2_724_840, "CoT": 74_730, "Dialog": 210_170}


def test_the_size_table_is_the_published_one(shared):
    published = [json.loads(line) for line in (shared / "flan" / "task_sizes.jsonl").read_text().splitlines()]
    ours = tree.read_table("builtin:flan2022/task_sizes.csv", where="test")
    assert [{k: str(v) for k, v in row.items()} for row in published] == ours
    clusters = json.loads((shared / "flan" / "flan2021_clusters.json").read_text())
    assert json.loads((CONFIGS.parent / "jaxtune/assets/flan2021/clusters.json").read_text()) == clusters


def test_flan_2022_is_realised_by_the_sampler(flan):
    """Every leaf within 0.1 % absolute over 200,000 draws; in fact within four draws of its share."""
    shares = [one.rate for one in flan[0].leaves]
    wheel = mixture.Wheel(shares, seed=0)
    asked = np.array([float(share) for share in shares])
    rates = np.array(wheel.rates, np.float64)
    assert np.abs(rates / rates.sum() / asked - 1).max() < 1e-6
    realised = np.bincount(wheel.leaves(12_345, 200_000), minlength=len(shares)) / 200_000
    assert np.abs(realised - asked).max() < 4 / 200_000


# Shares by tag.


def test_shares_by_tag_are_met_and_the_rest_keep_their_proportions():
    sources = [leaf("a", 10, tags=["cot"]), leaf("b", 30, tags=["cot"]), leaf("c", 100), leaf("d", 300)]
    shares = plan_of(sources, mixing={"tags": {"cot": 0.1}})
    assert shares == {"a": Fraction(1, 40), "b": Fraction(3, 40), "c": Fraction(9, 40), "d": Fraction(27, 40)}


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.sets(st.sampled_from("xyz"))), min_size=6, max_size=12),
    st.tuples(*(st.floats(0.05, 0.3) for _ in range(3))),
)
@example([*[(1, set())] * 5, (751, {"x", "y"}), (115_794, set())], (0.25, 0.25, 0.25))  # slow for one tag at a time
def test_overlapping_tags_are_solved_together(leaves, wanted):
    """Whatever leaves carry several tags, every tag gets its share as long as each has leaves of its own."""
    leaves = [*leaves, (5, set()), (5, {"x"}), (5, {"y"}), (5, {"z"})]
    sources = [leaf(f"s{i}", n, tags=sorted(tags)) for i, (n, tags) in enumerate(leaves)]
    asked = {tag: round(share, 3) for tag, share in zip("xyz", wanted, strict=True)}
    shares = plan_of(sources, mixing={"tags": asked})
    for tag, share in asked.items():
        found = sum(float(shares[f"s{i}"]) for i, (_, tags) in enumerate(leaves) if tag in tags)
        assert found == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize(
    ("sources", "tags", "told"),
    [
        ([leaf("a", tags=["x"]), leaf("b", tags=["y"])], {"x": 0.7, "y": 0.6}, "add up to 1.3; expected at most 1"),
        ([leaf("a", tags=["x"])], {"x": 0.7}, "every source has one of these tags"),
        ([leaf("a", tags=["x"]), leaf("b")], {"z": 0.1}, "no source has this tag; found x"),
        (
            [leaf("a", tags=["x", "y"]), leaf("b", tags=["y"])],
            {"x": 0.5, "y": 0.3},
            "cannot all be met, since sources have several of these tags",
        ),
    ],
)
def test_shares_by_tag_that_cannot_be_met(sources, tags, told):
    with pytest.raises(ValueError, match=told):
        plan_of(sources, mixing={"tags": tags})


def test_shares_may_count_tokens():
    """Half of the tokens each: the source of long examples is drawn a tenth as often."""
    config = config_of([leaf("a", 10, weight=1), leaf("b", 10, weight=1)], mixing={"unit": "tokens"})
    root = tree.expand(config, config.data.train, key="data.train", template_names=lambda *given: [])
    shares = leaf_shares(root, Sizes({"a": 10, "b": 10}, {"a": 500.0, "b": 50.0}))
    assert [float(share) for share in shares] == pytest.approx([1 / 11, 10 / 11])
    tagged = config_of([leaf("a", 10, tags=["x"]), leaf("b", 10)], mixing={"unit": "tokens", "tags": {"x": 0.5}})
    root = tree.expand(tagged, tagged.data.train, key="data.train", template_names=lambda *given: [])
    shares = leaf_shares(root, Sizes({"a": 10, "b": 10}, {"a": 500.0, "b": 50.0}))
    assert [float(share) for share in shares] == pytest.approx([1 / 11, 10 / 11])


# Trees.


def test_a_group_hands_its_keys_and_tags_down():
    group = {
        "id": "g",
        "tags": ["general"],
        "format": "alpaca",
        "system": "Be brief.",
        "sources": [leaf("a", tags=["short"]), leaf("b", system="Be long.")],
    }
    config = config_of([group])
    root = tree.expand(config, config.data.train, key="data.train", template_names=lambda *given: [])
    a, b = root.leaves()
    assert (a.config.format, a.config.system, a.tags) == ("alpaca", "Be brief.", ("general", "short"))
    assert (b.config.system, b.tags, b.where) == ("Be long.", ("general",), "data.train.0.sources.1")


GROUP = {
    "id": "g",
    "shots": 3,
    "system": "Be brief.",
    "styles": {"few_shot": 1},
    "sources": [
        leaf("a"),
        leaf("b", shots=5, system=None),
        {"id": "h", "shots": 4, "sources": [leaf("c"), leaf("d", shots=5)]},
    ],
}


def test_a_default_that_a_member_writes_down_holds():
    """Also in a group inside a group: what is written nearest is meant."""
    config = config_of([GROUP])
    leaves = list(tree.expand(config, config.data.train, key="data.train", template_names=lambda *given: []).leaves())
    assert {one.name: one.config.shots for one in leaves} == {"g/a": 3, "g/b": 5, "g/h/c": 4, "g/h/d": 5}
    assert [one.config.system for one in leaves] == ["Be brief.", None, "Be brief.", "Be brief."]


def test_a_configuration_written_back_means_the_same(tmp_path):
    """The file of a run has no more keys of a source than were given, or its members would take none of a group's."""
    config = config_of([GROUP], eval=[{"id": "e", "format": "alpaca", "sources": [{"path": "x"}, {"path": "y"}]}])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = decode([str(tmp_path / "config.yaml")])
    assert again == config
    for key in ("train", "eval"):
        trees = [
            tree.expand(one, getattr(one.data, key), key=f"data.{key}", template_names=lambda *given: [])
            for one in (config, again)
        ]
        assert trees[0] == trees[1]
    assert "shot_tokens" not in to_yaml(config) and to_yaml(again) == to_yaml(config)


def test_two_sources_of_one_name_are_refused(tmp_path):
    table = {"path": str(tmp_path / "tasks.csv"), "id": "{task}"}
    (tmp_path / "tasks.csv").write_text("task\nx\ny\n")
    for sources, name in (
        ([leaf("a/b"), {"id": "a", "sources": [leaf("b")]}], "a/b"),
        ([leaf("t/y"), {"id": "t", "table": table, "path": "{task}.jsonl"}], "t/y"),
        ([leaf("a", styles={"zero_shot": 1, "few_shot": 1}), leaf("a/few_shot")], "a/few_shot"),
        ([leaf("b"), leaf("b"), leaf("b.jsonl#1")], "b.jsonl#1"),
    ):
        with pytest.raises(ValueError, match=f"found two sources named '{name}'.*another `id`"):
            plan_of(sources)


def test_a_held_out_source_and_one_of_data_eval_have_names_of_their_own():
    sources = [leaf("xsum"), leaf("rte")]
    config = config_of(sources, hold_out={"clusters": ["entailment"]}, eval=[{"path": "rte.jsonl"}])
    with pytest.raises(ValueError, match=r"data\.train\.1 and data\.eval\.0: found two sources named 'rte'"):
        planning.evaluation_tree(config)
    config = config_of(sources, hold_out={"clusters": ["entailment"]}, eval=[{"path": "rte.jsonl", "id": "rte_test"}])
    assert [one.name for one in planning.evaluation_tree(config).leaves()] == ["rte_test", "rte"]


def test_styles_are_leaves_that_share_the_rows():
    shares = plan_of([leaf("a", 10, styles={"zero_shot": 1, "few_shot": 3}), leaf("b", 10)])
    assert list(shares.items()) == [
        ("a/zero_shot", Fraction(1, 10)),  # 2 or 3 of the 10 rows: whole rows
        ("a/few_shot", Fraction(4, 10)),
        ("b", Fraction(1, 2)),
    ]
    weighed = plan_of([leaf("a", 10, weight=1, styles={"zero_shot": 1, "few_shot": 3}), leaf("b", 10, weight=1)])
    assert list(weighed.values()) == [Fraction(1, 8), Fraction(3, 8), Fraction(1, 2)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1000), st.lists(st.integers(1, 20), min_size=2, max_size=5))
def test_parts_of_styles_cover_the_rows(rows, weights):
    members = tuple(
        tree.Node(name=str(i), where="", config=SourceConfig(), tags=(), weight=Fraction(w))
        for i, w in enumerate(weights)
    )
    node = tree.Node(name="n", where="", config=SourceConfig(), tags=(), members=members, same_rows=True)
    parts = style_parts(node, rows)
    assert all(0 <= a < b <= rows for a, b in parts)
    if rows >= sum(weights) * 2:
        assert [a for a, _ in parts] == [0, *(b for _, b in parts[:-1])] and parts[-1][1] == rows


def test_a_table_makes_a_source_of_each_of_its_rows(tmp_path):
    (tmp_path / "tasks.csv").write_text("task,kind,n\nadd,math,10\nsay,talk,20\nsum,math,30\n")
    table = {"path": str(tmp_path / "tasks.csv"), "id": "{task}", "where": {"kind": "math"}, "examples": "n"}
    shares = plan_of([{"id": "t", "table": table, "path": "{root}/{task}.jsonl", "tags": ["m"]}], root="/data")
    assert shares == {"t/add": Fraction(1, 4), "t/sum": Fraction(3, 4)}


def test_a_table_may_hold_the_weights(tmp_path):
    (tmp_path / "tasks.csv").write_text("task,n,w\nadd,10,3\nsay,20,1\n")
    table = {"path": str(tmp_path / "tasks.csv"), "id": "{task}", "examples": "n", "weight": "w"}
    assert plan_of([{"table": table, "path": "{task}.jsonl", "id": "t"}]) == {
        "t/add": Fraction(3, 4),
        "t/say": Fraction(1, 4),
    }
    with pytest.raises(ConfigError, match=r"0\.mixing\.rates: found equal beside table\.weight; remove one"):
        plan_of([{"table": table, "path": "{task}.jsonl", "mixing": {"rates": "equal"}}])


@pytest.mark.parametrize("value", ["", "0", "-1", "nan", "many"])
def test_a_table_s_weights_are_numbers_above_0(tmp_path, value):
    (tmp_path / "tasks.csv").write_text(f"task,w\nadd,{value}\n")
    table = {"path": str(tmp_path / "tasks.csv"), "id": "{task}", "weight": "w"}
    with pytest.raises(ValueError, match=f"column 'w' of .*tasks.csv is '{value}' in the row add, {value}; expected a"):
        plan_of([{"table": table, "path": "{task}.jsonl"}])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"where": {"sort": "math"}}, "no column 'sort'.*found task, kind, n"),
        ({"where": {"kind": "song"}}, "no row of .* has {'kind': 'song'}"),
        (
            {"where": {"kind": {"is": "math"}}},
            r"0\.table\.where\.kind: found {'is': 'math'}; expected a value, or a list",
        ),
        ({"where": {"kind": [["math"]]}}, r"0\.table\.where\.kind: found .*; expected a value, or a list"),
        ({"examples": "rows"}, "no column 'rows'"),
        ({"id": "{name}"}, "{name} is no column"),
        ({"path": "nowhere.csv"}, "data.train.0.table.path: nowhere.csv"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path, change, told):
    (tmp_path / "tasks.csv").write_text("task,kind,n\nadd,math,10\n")
    table = {"path": str(tmp_path / "tasks.csv"), "id": "{task}", "examples": "n", **change}
    with pytest.raises(ValueError, match=told):
        plan_of([{"id": "t", "table": table, "path": "/d/{task}.jsonl"}])


def test_root_is_needed_where_it_is_named():
    with pytest.raises(ValueError, match=r"data\.root is not set"):
        plan_of([{"path": "{root}/a.jsonl"}])
    with pytest.raises(ValueError, match=r"data\.train\.0\.sources\.1\.path: found .*data\.root is not set"):
        plan_of([{"id": "g", "sources": [leaf("a"), {"path": "{root}/a.jsonl"}]}])
    with pytest.raises(ValueError, match=r"data\.train\.0\.table\.path: found .*data\.root is not set"):
        plan_of([{"path": "{t}", "table": {"path": "{root}/tasks.csv", "id": "{t}"}}])
    with pytest.raises(ValueError, match=r"templates\.0\.promptsource: found .*data\.root is not set"):
        plan_of([leaf("a", templates=[{"promptsource": "{root}/p.yaml"}])])
    with pytest.raises(ValueError, match=r"data\.hold_out\.table: found .*data\.root is not set"):
        planning.training_tree(config_of([leaf("a")], hold_out={"clusters": ["x"], "table": "{root}/clusters.json"}))


def test_root_is_filled_in_wherever_a_path_may_stand(tmp_path):
    (tmp_path / "clusters.json").write_text('{"songs": ["a"]}')
    inline = [{"promptsource": "{root}/p.yaml", "skip": ["x"]}, {"input": "From {root}: {q}", "target": "{a}"}]
    config = config_of(
        [leaf("a", templates=inline), leaf("b")],
        root=f"{tmp_path}/",
        hold_out={"clusters": ["songs"], "table": "{root}/clusters.json"},
    )
    kept, held = planning.training_tree(config)
    assert [one.name for one in kept.leaves()] == ["b"]
    (one,) = held.leaves()
    assert one.config.templates == (
        {"promptsource": f"{tmp_path}/p.yaml", "skip": ("x",)},
        {"input": f"From {tmp_path}: {{q}}", "target": "{a}"},
    )
    named = config_of([leaf("a", templates=inline[1:])])  # without data.root, {root} in a wording is a column
    root = tree.expand(named, named.data.train, key="data.train", template_names=lambda *given: [])
    assert next(root.leaves()).config.templates == tuple(inline[1:])


@pytest.mark.parametrize(
    ("text", "told"),
    [(None, "no such file"), ("{", "is not JSON"), ('["a"]', "holds something else"), ('{"a": "b"}', "something else")],
)
def test_a_table_of_clusters_that_cannot_be_read_is_told_with_its_key(tmp_path, text, told):
    if text is not None:
        (tmp_path / "clusters.json").write_text(text)
    config = config_of([leaf("a")], hold_out={"clusters": ["x"], "table": str(tmp_path / "clusters.json")})
    with pytest.raises(ValueError, match=rf"data\.hold_out\.table: .*clusters\.json.*{told}"):
        planning.training_tree(config)


@pytest.mark.parametrize(
    ("held", "evaluated", "trained"),
    [
        (["paraphrase"], {"qqp"}, {"xsum", "copa", "cosmos"}),  # entailment is excluded with it
        (["common_sense"], {"copa"}, {"xsum", "qqp", "rte"}),  # and reading comprehension with common sense
        (["summarization", "entailment"], {"xsum", "rte"}, {"copa", "cosmos"}),
    ],
)
def test_clusters_are_held_out_with_flans_mutual_exclusions(held, evaluated, trained):
    sources = [
        leaf("xsum"),
        leaf("qqp", task="glue_qqp"),
        leaf("rte"),
        leaf("copa"),
        leaf("cosmos", task="cosmos_qa"),
    ]
    config = config_of(sources, hold_out={"clusters": held})
    kept, out = planning.training_tree(config)
    assert {one.name for one in out.leaves()} == evaluated
    assert {one.name for one in kept.leaves()} == trained


def test_a_cluster_that_no_source_is_of():
    config = config_of([leaf("xsum")], hold_out={"clusters": ["songs"]})
    with pytest.raises(ValueError, match="no source is of cluster 'songs'; found summarization"):
        planning.training_tree(config)


# Phases.


def test_phases_have_weights_and_tags_of_their_own():
    phases = [
        {"until": {"draws": 100}, "weights": {"a": 1}},
        {"until": {"draws": 300}, "weights": {"a": 1, "b": 3}},
        {"tags": {"x": 0.2}},
    ]
    config = config_of([leaf("a", 10, tags=["x"]), leaf("b", 30)], phases=phases)
    root = tree.expand(config, config.data.train, key="data.train", template_names=lambda *given: [])
    found = planning.phase_shares(config, root, Sizes({"a": 10, "b": 30}))
    assert found == [
        ("100 draws", [1, 0]),
        ("300 draws", [Fraction(1, 4), Fraction(3, 4)]),
        ("the end", [Fraction(1, 5), Fraction(4, 5)]),
    ]
    assert planning.known_ends(config, ()) == [100, 300]


@pytest.mark.parametrize(
    ("phases", "told"),
    [
        ([{"until": {"steps": 5}}, {}], "data.phases.0.until.steps: needs train.steps"),
        ([{"until": {"draws": 5, "steps": 5}}, {}], "found steps, draws; expected exactly one"),
        ([{}, {}], "data.phases.0.until: found none"),
        ([{"until": {"draws": 5}}], "found on the last phase"),
        ([{"until": {"draws": 5}}, {"until": {"draws": 5}}, {}], "expected more than the phase before, 5"),
    ],
)
def test_phases_that_make_no_sense(phases, told):
    with pytest.raises(ConfigError, match=told):
        config_of([leaf("a")], phases=phases)


def test_a_phase_names_sources_that_are_there():
    with pytest.raises(ValueError, match=r"data.phases.0.weights.c: no such source; found a, b"):
        plan_of([leaf("a"), leaf("b")], phases=[{"until": {"draws": 5}, "weights": {"c": 1}}, {}])


# The plan.


def test_the_plan_needs_no_data_where_sizes_are_given():
    config = Config(
        output="o",
        model=ModelConfig(path="m"),
        data=DataConfig(train=(SourceConfig(path="gone.jsonl", examples=10, tags=("t",)),)),
        train=TrainConfig(),
    )
    plan = planning.mixture_plan(config).as_json()
    assert plan["leaves"][0] | {"name": "gone", "rate": 1.0, "examples": 10, "tags": ["t"]} == plan["leaves"][0]


def test_the_plan_counts_what_is_there_and_names_what_is_not(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 7)
    sources = [
        {"path": str(tmp_path / "a.jsonl")},
        {"path": str(tmp_path / "b.jsonl")},
        {"path": str(tmp_path / "c.jsonl")},
    ]
    with pytest.raises(ValueError, match=r"(?s)b\.jsonl.*c\.jsonl"):
        planning.mixture_plan(config_of(sources), cache_dir=str(tmp_path / "cache"))
    plan = planning.mixture_plan(config_of(sources, missing="skip"), cache_dir=str(tmp_path / "cache"))
    assert [(one.name, one.examples, one.rate) for one in plan.leaves] == [("a", 7, 1)]
    assert plan.skipped == ("b", "c")


def test_a_plan_that_skips_looks_for_files_whose_sizes_are_given(tmp_path, capsys):
    """Their rows are not read: this one's cannot be."""
    (tmp_path / "a.jsonl").write_text("no JSON")
    given = [f"data.train.{i}.examples=10" for i in range(3)]
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl", "owner/name"]
    words = ["output=o", "model.path=m", *given, *(f"data.train.{i}.path={path}" for i, path in enumerate(paths))]
    plan = planning.mixture_plan(decode([*words, "data.missing=skip"]))
    assert ([one.name for one in plan.leaves], plan.skipped, plan.believed) == (["a", "name"], ("b",), 1)
    plan = planning.mixture_plan(decode(words))
    assert (len(plan.leaves), plan.skipped, plan.believed) == (3, (), 3)
    assert audit.main([*words, "data.missing=skip", "--mixture-only"]) == 0
    told = capsys.readouterr().out
    assert "1 sources are not there and are left out: b\n" in told
    assert "1 sources have their sizes from `examples` and were not looked for (they are hub ids or URLs)" in told
    assert audit.main([*words, "--mixture-only"]) == 0
    assert "3 sources have their sizes from `examples` and were not looked for" in capsys.readouterr().out
    gone = [word for word in words if not word.startswith(("data.train.0", "data.train.2"))]
    gone = [word.replace("train.1", "train.0") for word in gone]
    assert audit.main([*gone, "data.missing=skip", "--mixture-only"]) == 1
    assert "none of the sources is there; the first" in capsys.readouterr().err
