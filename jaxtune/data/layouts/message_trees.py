"""OpenAssistant's trees of messages: each row a prompt with replies, replies to these, and so on.

A path from the prompt to a leaf is cut to its longest beginning that ends with an answer, so that a last question
nobody answered does not take the answers before it along. Turns that several paths share are trained in the first.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from jaxtune.data.records import Conversation, Message, NothingToLearn, RowError
from jaxtune.data.row_values import Row, kind, near

# Labels that speak for a message; all others that OpenAssistant has speak against it.
_GOOD = ("quality", "helpfulness", "creativity", "humor")
_BAD = (
    "toxicity",
    "violence",
    "spam",
    "fails_task",
    "lang_mismatch",
    "pii",
    "not_appropriate",
    "hate_speech",
    "sexual_content",
    "political_content",
    "moral_judgement",
)
_DEEPEST = 200
_ROLES = {"prompter": "user", "assistant": "assistant"}


class OasstOptions(BaseModel):
    """Which messages count, and which paths through them are conversations."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    paths: Literal["all", "best"] = "all"
    languages: tuple[str, ...] = ()
    max_rank: Annotated[int, Field(ge=0)] | None = None
    min_quality: Annotated[float, Field(ge=0, le=1)] | None = None
    labels: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    states: tuple[str, ...] = ()

    @field_validator("labels")
    @classmethod
    def _known(cls, labels: dict[str, float]) -> dict[str, float]:
        known = [*_GOOD, *_BAD]
        for label in labels:
            if label not in known:
                raise ValueError(f"no label {label!r}{near(label, known)}; the labels are {', '.join(known)}")
        return labels


@dataclasses.dataclass(frozen=True, eq=False)
class _Node:
    """A message with its replies, best first; two messages that say the same are still two."""

    id: str
    message: Message
    replies: tuple["_Node", ...]


def oasst(row: Row, options: OasstOptions) -> list[Conversation]:
    """`oasst`: one conversation for each path; raises RowError naming the message where the tree is not one.

    `meta["unanswered"]` of the first says how many paths end with a question, which is left out.
    """
    state = row.get("tree_state")
    if options.states and state not in options.states:
        raise NothingToLearn(f"tree state {state}")
    prompt = row["prompt"]
    if isinstance(prompt, list):
        prompt = _nested(prompt)
    root = _read(prompt, None, frozenset(), options)
    whole = [] if root is None else list(_paths(root, options.paths == "best"))
    unanswered = sum(path[-1].message.role == "user" for path in whole)
    paths = [_answered(path) for path in whole]
    kept: list[tuple[_Node, ...]] = []
    # The longest first: a path that another one begins with teaches nothing more.
    for path in sorted(paths, key=len, reverse=True):
        if path and not any(other[: len(path)] == path for other in kept):
            kept.append(path)
    if not kept:
        raise NothingToLearn("no assistant turn")
    out: list[Conversation] = []
    seen: set[int] = set()
    for path in sorted(kept, key=paths.index):
        messages = [dataclasses.replace(n.message, weight=0.0) if id(n) in seen else n.message for n in path]
        seen |= {id(node) for node in path}
        told = {"unanswered": unanswered} if unanswered and not out else {}
        out.append(Conversation(tuple(messages), {"tree": row.get("tree_id"), "message": path[-1].id, **told}))
    return out


def _paths(node: _Node, best: bool) -> Iterator[tuple[_Node, ...]]:
    """Every way from the node to a leaf; under `best` an answer is always the first of those that stand there."""
    replies = node.replies[:1] if best and node.message.role == "user" else node.replies
    if not replies:
        yield (node,)
    for reply in replies:
        for path in _paths(reply, best):
            yield (node, *path)


def _answered(path: Sequence[_Node]) -> tuple[_Node, ...]:
    """The path up to its last answer."""
    last = max((i for i, node in enumerate(path) if node.message.role == "assistant"), default=-1)
    return tuple(path[: last + 1])


def _read(value: Any, parent: Mapping[str, Any] | None, above: frozenset[str], options: OasstOptions) -> _Node | None:
    """The message with the replies that count, or None where it does not count itself. All of the tree is checked."""
    if not isinstance(value, Mapping):
        raise RowError("wrong type", f"a message of the tree is {kind(value)}; expected an object with text and role")
    name = str(value.get("message_id", f"number {len(above) + 1} of its path"))
    if name in above:
        raise RowError("cycle in the tree", f"message {name} stands among the replies to itself")
    if len(above) == _DEEPEST:
        raise RowError("tree too deep", f"message {name} has {_DEEPEST} messages above it; expected fewer")
    if parent is not None and value.get("parent_id") not in (None, parent.get("message_id")):
        raise RowError(
            "orphan in the tree",
            f"message {name} has parent_id {value['parent_id']!r}, but stands among the replies to "
            f"{parent.get('message_id')!r}",
        )
    expected = "prompter" if parent is None or parent["role"] == "assistant" else "assistant"
    role, text, replies = value.get("role"), value.get("text"), value.get("replies") or []
    if role not in _ROLES:
        raise RowError("unknown role", f"message {name}: found role {role!r}; expected prompter or assistant")
    if role != expected:
        after = "first" if parent is None else f"in reply to {parent['role']}"
        raise RowError("roles out of order", f"message {name}: found {role} {after}; expected {expected} there")
    if not isinstance(text, str) or not isinstance(replies, list | tuple):
        wrong = f"text is {kind(text)}" if not isinstance(text, str) else f"replies is {kind(replies)}"
        raise RowError("wrong type", f"message {name}: {wrong}; expected text, and a list of replies")
    order = sorted(range(len(replies)), key=lambda i: (_rank(replies[i]) is None, _rank(replies[i]) or 0, i))
    read = [(place, _read(replies[i], value, above | {name}, options)) for place, i in enumerate(order)]
    if not _counts(value, text, options):
        return None
    inner = []
    for place, reply in read:
        rank = _rank(replies[order[place]])
        # An answer that nobody ranked comes after those that somebody did.
        too_low = (
            options.max_rank is not None and role == "prompter" and (place if rank is None else rank) > options.max_rank
        )
        if reply is not None and not too_low:
            inner.append(reply)
    return _Node(name, Message(_ROLES[role], text), tuple(inner))


def _rank(value: Any) -> int | None:
    rank = value.get("rank") if isinstance(value, Mapping) else None
    return rank if isinstance(rank, int) else None


def _counts(value: Mapping[str, Any], text: str, options: OasstOptions) -> bool:
    if value.get("deleted") or not text.strip():
        return False
    if options.languages and value.get("lang") not in options.languages:
        return False
    asked = dict(options.labels)
    if options.min_quality is not None:
        asked["quality"] = max(options.min_quality, asked.get("quality", 0.0))
    given = _labels(value.get("labels")) if asked else {}
    for label, bound in asked.items():
        if label in _BAD and given.get(label, 0.0) > bound:
            return False
        if label in _GOOD and value["role"] == "assistant" and given.get(label, 0.0) < bound:
            return False
    return True


def _labels(labels: Any) -> dict[str, float]:
    """{name: value} of either form: {name: {value, count}}, or {name: [...], value: [...]}."""
    if not isinstance(labels, Mapping):
        return {}
    if isinstance(labels.get("name"), list) and isinstance(labels.get("value"), list):
        return {n: float(v) for n, v in zip(labels["name"], labels["value"], strict=False) if v is not None}
    values = {name: v.get("value") if isinstance(v, Mapping) else v for name, v in labels.items()}
    return {name: float(v) for name, v in values.items() if isinstance(v, int | float)}


def _nested(flat: list[Any]) -> dict[str, Any]:
    """A list of messages that name their parents, as one tree."""
    nodes: dict[str, dict[str, Any]] = {}
    for value in flat:
        if not isinstance(value, Mapping) or not isinstance(value.get("message_id"), str):
            raise RowError("wrong type", f"a message of the tree is {kind(value)}; expected an object with message_id")
        if value["message_id"] in nodes:
            raise RowError("cycle in the tree", f"message {value['message_id']} is there twice")
        nodes[value["message_id"]] = {**value, "replies": []}
    roots = []
    for name, node in nodes.items():
        parent = node.get("parent_id")
        if parent is None:
            roots.append(node)
        elif parent not in nodes:
            raise RowError("orphan in the tree", f"message {name} has parent_id {parent!r}, which is not there")
        else:
            nodes[parent]["replies"].append(node)
    for name, node in nodes.items():
        above, seen = node, set()
        while above.get("parent_id") is not None and above["message_id"] not in seen:
            seen.add(above["message_id"])
            above = nodes[above["parent_id"]]
        if above.get("parent_id") is not None:
            raise RowError("cycle in the tree", f"message {name} is, by parent_id, among the replies to itself")
    if len(roots) != 1:
        names = ", ".join(str(root["message_id"]) for root in roots) or "none"
        raise RowError("not one tree", f"found {names} without a parent_id; expected exactly one such message")
    return roots[0]
