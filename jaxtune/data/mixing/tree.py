"""The tree of sources that a configuration describes, down to the leaves that are drawn from.

A group's members, a table's tasks, a task's templates and a source's styles are all nodes of one kind: members that
share the draws of their parent by its `mixing`. What the shares come to is said in `shares.py`.
"""

import collections
import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from jaxtune import hub
from jaxtune.config import Config
from jaxtune.config_data import HoldOutConfig, MixingConfig, SourceConfig

# Keys of a group that its members have too, unless they say otherwise.
INHERITED = (
    *("revision", "name", "split", "format", "options", "columns", "template", "system", "templates", "each_template"),
    *("slots", "styles", "shots", "shot_tokens", "cluster", "order"),
)
_PATTERNS = ("path", "task", "name", "split", "templates", "cluster")  # what may hold a table's {columns}


@dataclasses.dataclass(frozen=True)
class Node:
    """A leaf, which rows are drawn from, or members that share draws.

    `name` is its path of ids, `where` its key in the configuration. Leaves that are styles of one source have the same
    `source` number; a leaf's `style` and `template` say how its rows are worded. `same_rows`: the members are styles of
    one source's rows, each row having one of them in an epoch.
    """

    name: str
    where: str
    config: SourceConfig
    tags: tuple[str, ...]
    weight: Fraction | None = None
    epochs: Fraction = Fraction(1)
    mixing: MixingConfig = dataclasses.field(default_factory=MixingConfig)
    members: tuple["Node", ...] = ()
    same_rows: bool = False
    source: int = -1
    style: str = "zero_shot"
    template: str | None = None

    @property
    def task(self) -> str:
        """The name that tables of templates and of clusters know it by."""
        return self.config.task or self.config.id or short_name(self.config.path or self.name)

    def leaves(self) -> Iterator["Node"]:
        """The leaves under it, in order."""
        if not self.members:
            yield self
        for member in self.members:
            yield from member.leaves()


def expand(
    config: Config,
    sources: Sequence[SourceConfig],
    *,
    key: str,
    template_names: Callable[[SourceConfig, str], list[str]],
) -> Node:
    """The tree of `data.train` or `data.eval`; `template_names` lists a source's templates for `each_template`.

    Raises ValueError for a table that cannot be read, a pattern that names no column, and for two nodes of one name.
    """
    numbers = iter(range(1 << 62))
    names = source_names(sources)
    members = tuple(
        _node(_rooted(source, config.data.root, f"{key}.{i}"), name, f"{key}.{i}", (), template_names, numbers)
        for i, (source, name) in enumerate(zip(sources, names, strict=True))
    )
    root = Node(name="", where=key, config=SourceConfig(), tags=(), mixing=config.data.mixing, members=members)
    refuse_one_name_twice(root)
    _refuse_unknown_tags(config, root)
    return root


def refuse_one_name_twice(root: Node) -> None:
    """Raises ValueError for two nodes of one name: plans, logs and checkpoints know a source by nothing else."""
    seen: dict[str, str] = {}
    waiting = list(root.members)
    while waiting:
        node = waiting.pop(0)
        if node.name in seen:
            raise ValueError(
                f"{node.where} and {seen[node.name]}: found two sources named {node.name!r}; expected names of their "
                "own, since plans, logs and checkpoints tell sources apart by them; give one of the two another `id`"
            )
        seen[node.name] = node.where
        waiting += node.members


def _node(
    source: SourceConfig,
    name: str,
    where: str,
    outer_tags: tuple[str, ...],
    template_names: Callable[[SourceConfig, str], list[str]],
    numbers: Iterator[int],
) -> Node:
    """A source with everything below it."""
    tags = tuple(dict.fromkeys((*outer_tags, *source.tags)))
    node = Node(
        name=name,
        where=where,
        config=source,
        tags=tags,
        weight=None if source.weight is None else Fraction(str(source.weight)),
        epochs=Fraction(str(source.epochs)),
        mixing=source.mixing,
    )
    inner = source.sources
    if source.table is not None:
        inner = _table_sources(source, where)
        where = f"{where}.table"
    if inner:
        ids = source_names(inner)
        members = tuple(
            _node(_inherit(m, source), f"{name}/{i}", f"{where}.sources.{n}", tags, template_names, numbers)
            for n, (m, i) in enumerate(zip(inner, ids, strict=True))
        )
        return dataclasses.replace(node, members=members)
    if source.each_template:
        found = template_names(source, node.task)
        equal = MixingConfig(rates="epochs" if node.mixing.rates == "auto" else node.mixing.rates)
        below = tuple(
            _styled(dataclasses.replace(node, name=f"{name}/{t}", template=t, weight=None, epochs=Fraction(1)), numbers)
            for t in found
        )
        return dataclasses.replace(node, members=below, mixing=equal)
    return _styled(node, numbers)


def _styled(node: Node, numbers: Iterator[int]) -> Node:
    """The node itself, or its styles as members that share its rows."""
    number = next(numbers)
    styles = node.config.styles
    if len(styles) < 2:
        return dataclasses.replace(node, source=number, style=next(iter(styles), "zero_shot"))
    members = tuple(
        dataclasses.replace(
            node,
            name=f"{node.name}/{style}",
            source=number,
            style=style,
            weight=Fraction(str(share)),
            epochs=Fraction(1),
            tags=tuple(dict.fromkeys((*node.tags, style))),
        )
        for style, share in styles.items()
    )
    return dataclasses.replace(node, members=members, same_rows=True, mixing=MixingConfig(rates="weights"))


def _inherit(member: SourceConfig, group: SourceConfig) -> SourceConfig:
    """The member with the group's keys where it says nothing itself; a default that is written down is said."""
    given = group.model_fields_set - member.model_fields_set
    return member.model_copy(update={key: getattr(group, key) for key in INHERITED if key in given})


def _rooted(source: SourceConfig, root: str | None, where: str) -> SourceConfig:
    """The source, and all below it, with {root} filled in."""
    update: dict[str, Any] = {}
    if source.sources:
        update["sources"] = tuple(_rooted(s, root, f"{where}.sources.{i}") for i, s in enumerate(source.sources))
    for field in ("path", "templates"):
        value = getattr(source, field)
        if isinstance(value, str):
            update[field] = _filled_root(value, root, f"{where}.{field}")
    if isinstance(source.templates, tuple):
        rows = enumerate(source.templates)
        update["templates"] = tuple(_rooted_template(row, root, f"{where}.templates.{i}") for i, row in rows)
    if source.table is not None:
        path = _filled_root(source.table.path, root, f"{where}.table.path")
        update["table"] = source.table.model_copy(update={"path": path})
    return source.model_copy(update=update)


def _rooted_template(row: Mapping[str, Any], root: str | None, where: str) -> dict[str, Any]:
    """An inline template with {root} filled in; without data.root a wording may name a column `root`, a path not."""
    return {
        key: _filled_root(value, root, f"{where}.{key}") if key == "promptsource" else _filled_texts(value, root)
        for key, value in row.items()
    }


def _filled_texts(value: Any, root: str | None) -> Any:
    if isinstance(value, Mapping):
        return {key: _filled_texts(item, root) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_filled_texts(item, root) for item in value)
    return value if root is None or not isinstance(value, str) else _filled_root(value, root, "")


def _filled_root(text: Any, root: str | None, where: str) -> Any:
    """The text with {root} replaced; raises ValueError when it stands there and data.root is not set."""
    if not isinstance(text, str) or "{root}" not in text:
        return text
    if root is None:
        raise ValueError(f"{where}: found {text}, and data.root is not set; set data.root=FOLDER")
    return text.replace("{root}", root.rstrip("/"))


def _table_sources(source: SourceConfig, where: str) -> tuple[SourceConfig, ...]:
    """A source for each row of the table that fits `where`."""
    table = source.table
    assert table is not None
    rows = read_table(table.path, where=f"{where}.table.path")
    wanted = {key: value if isinstance(value, list | tuple) else (value,) for key, value in table.where.items()}
    columns = list(rows[0]) if rows else []
    for key in (*wanted, *(column for column in (table.examples, table.weight) if column)):
        if key not in columns:
            raise ValueError(
                f"{where}.table: no column {key!r} in {table.path}; found {', '.join(columns) or 'no rows'}"
            )
    rows = [row for row in rows if all(row.get(key) in values for key, values in wanted.items())]
    if not rows:
        raise ValueError(f"{where}.table.where: no row of {table.path} has {table.where}; expected at least one")
    out = []
    for row in rows:
        filled: dict[str, Any] = {
            field: _fill(text, row, f"{where}.{field}", table.path)
            for field in _PATTERNS
            if isinstance(text := getattr(source, field), str)
        }
        filled["id"] = _fill(table.id, row, f"{where}.table.id", table.path)
        filled["examples"] = None if table.examples is None else int(_positive(row, table.examples, where, table.path))
        filled["weight"] = None if table.weight is None else _positive(row, table.weight, where, table.path)
        out.append(SourceConfig().model_copy(update=filled))
    return tuple(out)


def _positive(row: Mapping[str, Any], column: str, where: str, table: str) -> float:
    """The row's number in a column."""
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        value = math.nan
    if not 0 < value < math.inf:
        told = ", ".join(map(str, row.values()))
        raise ValueError(
            f"{where}.table: column {column!r} of {table} is {row[column]!r} in the row {told}; "
            "expected a number above 0"
        )
    return value


def _fill(text: str, row: Mapping[str, Any], where: str, table: str) -> str:
    """The text with {column} replaced by the row's values."""

    def value(match: re.Match) -> str:
        if match[1] not in row:
            raise ValueError(f"{where}: {{{match[1]}}} is no column of {table}; found {', '.join(row)}")
        return str(row[match[1]])

    return re.sub(r"\{(\w+)\}", value, text)


def read_table(path: str, *, where: str) -> list[dict[str, Any]]:
    """Rows of a small table: JSON lines, or CSV with a header. Raises ValueError naming `where`."""
    try:
        files = hub.resolve_files(path)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    with hub.open_file(files[0]) as file:
        text = file.read().decode("utf-8-sig")
    if files[0].endswith(".csv"):
        return list(csv.DictReader(io.StringIO(text)))
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {path} is neither JSON lines nor CSV ({error})") from error


def _refuse_unknown_tags(config: Config, root: Node) -> None:
    known = {tag for leaf in root.leaves() for tag in leaf.tags}
    asked = [(f"{root.where.rsplit('.', 1)[0]}.mixing.tags", config.data.mixing.tags)]
    asked += [(f"data.phases.{i}.tags", phase.tags) for i, phase in enumerate(config.data.phases)]
    for where, tags in asked:
        for tag in tags:
            if tag not in known and root.where == "data.train":
                raise ValueError(f"{where}.{tag}: no source has this tag; found {', '.join(sorted(known)) or 'none'}")
    ids = [member.name for member in root.members]
    for i, phase in enumerate(config.data.phases):
        for name in phase.weights:
            if name not in ids and root.where == "data.train":
                raise ValueError(f"data.phases.{i}.weights.{name}: no such source; found {', '.join(ids)}")


def prune(node: Node, gone: set[str]) -> Node | None:
    """The tree without the leaves named; None when nothing is left of it."""
    if not node.members:
        return None if node.name in gone else node
    members = tuple(kept for member in node.members if (kept := prune(member, gone)) is not None)
    return dataclasses.replace(node, members=members) if members else None


def renumbered(node: Node, first: int) -> Node:
    """The tree with its sources' numbers counted from `first`."""
    members = tuple(renumbered(member, first) for member in node.members)
    return dataclasses.replace(node, members=members, source=node.source + first)


def short_name(path: str) -> str:
    """A path's last part without its suffix; of a glob, the folder that it looks into."""
    plain = [part for part in path.rstrip("/").split("/") if not set(part) & set("*?[")]
    return (plain[-1].split(".")[0] if plain else "") or path


def source_names(chosen: Sequence[SourceConfig]) -> tuple[str, ...]:
    """A short name for each source: its id, else its path's last part, or the whole path where those are not unique."""
    short = [source.id or short_name(source.path or f"group{i}") for i, source in enumerate(chosen)]
    often = collections.Counter(short)
    names = [s if often[s] == 1 or c.path is None else c.path for s, c in zip(short, chosen, strict=True)]
    often = collections.Counter(names)
    return tuple(n if often[n] == 1 else f"{n}#{i}" for i, n in enumerate(names))


# FLAN 2021's rules of its inter-cluster protocol: to test one of a pair, train on neither (FLAN, task_splits.py).
EXCLUDED_WITH = {
    "reading_comprehension": ("read_comp_and_common_sense",),
    "common_sense": ("read_comp_and_common_sense",),
    "read_comp_and_common_sense": ("reading_comprehension", "common_sense"),
    "paraphrase": ("entailment",),
    "entailment": ("paraphrase",),
}


def hold_out(root: Node, options: HoldOutConfig, *, folder: str | None) -> tuple[set[str], set[str]]:
    """Names of the leaves to evaluate on, and of those that must not be trained on beside them.

    `folder` is what {root} stands for. Raises ValueError for a table that cannot be read, and for a cluster that no
    source belongs to.
    """
    if not options.clusters:
        return set(), set()
    clusters = _cluster_table(_filled_root(options.table, folder, "data.hold_out.table"))
    of_task = {task: cluster for cluster, tasks in clusters.items() for task in tasks}
    found = {leaf.name: leaf.config.cluster or of_task.get(leaf.task) for leaf in root.leaves()}
    for cluster in options.clusters:
        if cluster not in found.values():
            here = sorted({c for c in found.values() if c})
            raise ValueError(
                f"data.hold_out.clusters: no source is of cluster {cluster!r}; found {', '.join(here) or 'no cluster'} "
                "(a source's cluster is its `cluster`, or that of its `task` in data.hold_out.table)"
            )
    held = set(options.clusters)
    related = {other for cluster in held for other in EXCLUDED_WITH.get(cluster, ())} - held
    return (
        {name for name, cluster in found.items() if cluster in held},
        {name for name, cluster in found.items() if cluster in related},
    )


def _cluster_table(path: str) -> dict[str, list[str]]:
    """Cluster -> tasks; raises ValueError naming data.hold_out.table."""
    try:
        with hub.open_file(hub.resolve_files(path)[0]) as file:
            clusters = json.load(file)
    except ValueError as error:  # not there, or no JSON
        told = str(error) if path in str(error) else f"{path} is not JSON ({error})"
        raise ValueError(f"data.hold_out.table: {told}; expected a JSON file of cluster -> list of tasks") from error
    if not isinstance(clusters, dict) or not all(isinstance(tasks, list) for tasks in clusters.values()):
        raise ValueError(f"data.hold_out.table: {path} holds something else than cluster -> list of tasks")
    return clusters
