"""OpenAssistant trees: no answer is lost, none is trained twice, and what is no tree is told by its message."""

import gzip
import json

import pytest

from jaxtune.data.layouts.formats import find_layout
from jaxtune.data.records import NothingToLearn, RowError


def message(name, *replies, **keys):
    """`u1`, `a2`: a prompter's or an assistant's message whose text is its name."""
    role = {"u": "prompter", "a": "assistant"}[name[0]]
    return {"message_id": name, "text": name, "role": role, "lang": "en", "replies": list(replies), **keys}


def tree(prompt, **keys):
    return {"message_tree_id": prompt["message_id"], "tree_state": "ready_for_export", "prompt": prompt, **keys}


def read(row, **options):
    """Each conversation as its texts, trained answers in capitals."""
    conversations = find_layout([row], options=options).convert(row)
    return [
        " ".join(m.content.upper() if m.role == "assistant" and m.weight is None else m.content for m in c.messages)
        for c in conversations
    ]


TREE = tree(
    message(
        "u0",
        message("a1", message("u2", message("a3", rank=0), message("a4", message("u5"), rank=1)), rank=1),
        message("a6", message("u7"), rank=0),
        message("a8", message("u9", message("a10", deleted=True)), rank=2),
    )
)


def test_a_path_keeps_its_answers_before_an_unanswered_question():
    assert read(tree(message("u0", message("a1", message("u2"))))) == ["u0 A1"]
    assert read(tree(message("u0", message("a1", message("u2", message("a3", message("u4"))))))) == ["u0 A1 u2 A3"]


def test_every_answer_is_trained_once_and_shared_turns_in_the_first_path_only():
    assert read(TREE) == ["u0 A6", "u0 A1 u2 A3", "u0 a1 u2 A4", "u0 A8"]
    weights = [[m.weight for m in c.messages] for c in find_layout([TREE]).convert(TREE)]
    assert weights[2] == [0.0, 0.0, 0.0, None] and weights[1] == [0.0, None, None, None]


def test_a_cut_path_that_another_begins_with_is_left_out():
    assert read(tree(message("u0", message("a1", message("u2"), message("u3", message("a4")))))) == ["u0 A1 u3 A4"]


def test_best_follows_the_best_ranked_answer_at_each_choice():
    assert read(TREE, paths="best") == ["u0 A6"]
    unranked = tree(message("u0", message("a1"), message("a2", rank=3)))
    assert read(unranked, paths="best") == ["u0 A2"]
    asked_on = tree(message("u0", message("a1", message("u2", message("a3")), message("u4", message("a5")))))
    assert read(asked_on, paths="best") == ["u0 A1 u2 A3", "u0 a1 u4 A5"]


def test_filters_by_rank_language_state_and_labels():
    assert read(TREE, max_rank=0) == ["u0 A6"]
    assert read(TREE, max_rank=1) == ["u0 A6", "u0 A1 u2 A3", "u0 a1 u2 A4"]
    german = tree(message("u0", message("a1", lang="de"), message("a2")))
    assert read(german, languages=["en"]) == ["u0 A2"]
    with pytest.raises(NothingToLearn, match="tree state growing"):
        find_layout([TREE], options={"states": ["ready_for_export"]}).convert({**TREE, "tree_state": "growing"})
    rated = tree(
        message(
            "u0",
            message("a1", labels={"quality": {"value": 0.7, "count": 3}, "toxicity": {"value": 0.1, "count": 3}}),
            message("a2", labels={"name": ["quality", "toxicity"], "value": [0.9, 0.6]}),
            message("a3"),
        )
    )
    assert read(rated, min_quality=0.5) == ["u0 A1", "u0 A2"]
    assert read(rated, labels={"quality": 0.8}) == ["u0 A2"]
    assert read(rated, labels={"toxicity": 0.5}) == ["u0 A1", "u0 A3"]


def test_a_tree_without_an_answer_teaches_nothing():
    for prompt in (message("u0"), message("u0", message("a1", deleted=True)), message("u0", message("a1", text=" "))):
        with pytest.raises(NothingToLearn, match="no assistant turn"):
            read(tree(prompt))


@pytest.mark.parametrize(
    ("prompt", "reason", "told"),
    [
        (
            message("u0", message("a1", message("u0", message("a3")))),
            "cycle in the tree",
            "message u0 stands among the replies to itself",
        ),
        (
            message("u0", message("a1", parent_id="u9")),
            "orphan in the tree",
            "message a1 has parent_id 'u9', but stands among the replies to 'u0'",
        ),
        (
            message("u0", message("a1", message("a2"))),
            "roles out of order",
            "message a2: found assistant in reply to assistant; expected prompter there",
        ),
        (message("a0"), "roles out of order", "message a0: found assistant first; expected prompter"),
        (message("u0", message("a1", role="bot")), "unknown role", "message a1: found role 'bot'"),
        (message("u0", message("a1", text=None)), "wrong type", "message a1: text is null; expected text"),
        # Even where it would be passed over.
        (
            message("u0", message("a1", message("a2"), deleted=True), message("a3")),
            "roles out of order",
            "message a2: found assistant",
        ),
    ],
)
def test_what_is_no_tree_is_told_by_its_message(prompt, reason, told):
    with pytest.raises(RowError, match=told) as error:
        read(tree(prompt))
    assert error.value.reason == reason


def test_a_tree_that_is_too_deep_to_read_is_a_row_and_not_a_crash():
    prompt = message("u400")
    for n in reversed(range(400)):
        prompt = message(f"{'ua'[n % 2]}{n}", prompt)
    with pytest.raises(RowError, match="message u200 has 200 messages above it"):
        read(tree(prompt))


def test_two_messages_that_say_the_same_are_two():
    same = {"text": "Yes", "role": "assistant", "replies": []}
    row = {"prompt": {"text": "Hi", "role": "prompter", "replies": [same, dict(same)]}, "message_tree_id": "t"}
    assert read(row) == ["Hi YES", "Hi YES"]


def flat(*pairs):
    return [{**message(name), "parent_id": parent} for name, parent in pairs]


def test_a_tree_may_be_a_list_of_messages_that_name_their_parents():
    row = {"message_tree_id": "u0", "messages": flat(("u0", None), ("a2", "u0"), ("a1", "u0"), ("u3", "a1"))}
    assert read(row) == ["u0 A2", "u0 A1"]
    layout = find_layout([row])
    for messages, told in (
        (flat(("u0", None), ("a1", "u3"), ("u3", "a1")), "message a1 is, by parent_id, among the replies to itself"),
        (flat(("u0", None), ("a1", "u9")), "message a1 has parent_id 'u9', which is not there"),
        (flat(("u0", None), ("u1", None)), "found u0, u1 without a parent_id"),
    ):
        with pytest.raises(RowError, match=told):
            layout.convert({**row, "messages": messages})


def test_single_messages_are_refused_with_what_to_do():
    row = {"message_id": "a1", "parent_id": "u0", "role": "assistant", "text": "Hi", "lang": "en"}
    for format in ("auto", "oasst"):
        with pytest.raises(ValueError, match=r"cannot be put together row by row; give the export of whole trees"):
            find_layout([row], format=format)
    assert find_layout([row], columns={"text": "text"}).format == "text"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"path": "best"}, r"options.path: format oasst has no such option \(nearest: paths\); its options are paths,"),
        ({"paths": "worst"}, r"options.paths: found 'worst'; input should be 'all' or 'best'"),
        ({"labels": {"qualty": 0.5}}, r"options.labels: .*no label 'qualty' \(nearest: quality\)"),
        ({"min_quality": 7}, r"options.min_quality: found 7; input should be less than or equal to 1"),
        ({"languages": "en"}, r"options.languages: found 'en'"),
    ],
)
def test_wrong_options_are_told(options, told):
    with pytest.raises(ValueError, match=told):
        find_layout([TREE], options=options)


def test_no_answer_of_the_real_trees_is_lost_or_trained_twice(shared):
    """140 of their 416 leaves are unanswered questions; a walk to answered leaves loses answers before these."""
    with gzip.open(shared / "multiturn" / "oasst_trees_en.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    layout = find_layout(rows)
    assert layout.describe() == "oasst (prompt, tree_state, tree_id <- message_tree_id)"

    def answers(node):
        return (node["role"] == "assistant") + sum(map(answers, node["replies"]))

    def leaves(node, role):
        return sum(leaves(reply, role) for reply in node["replies"]) if node["replies"] else int(node["role"] == role)

    def lost(node):
        gone = node["role"] == "assistant" and not leaves(node, "assistant")
        return gone + sum(map(lost, node["replies"]))

    conversations = [layout.convert(row) for row in rows]
    trained = [m for cs in conversations for c in cs for m in c.messages if m.role == "assistant" and m.weight is None]
    assert len(trained) == sum(answers(row["prompt"]) for row in rows) == 475
    assert all(c.messages[-1].role == "assistant" for cs in conversations for c in cs)
    assert [sum(leaves(row["prompt"], role) for row in rows) for role in ("assistant", "prompter")] == [276, 140]
    assert sum(lost(row["prompt"]) for row in rows) == 102
    assert sum(map(len, conversations)) == 374  # 4 of the 102 are on the way to others of them
    best = [find_layout(rows, options={"paths": "best"}).convert(row) for row in rows]
    assert all(cs[0].messages[1].content == rows[i]["prompt"]["replies"][0]["text"] for i, cs in enumerate(best))
