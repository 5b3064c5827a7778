"""Turns `CONFIG.yaml` and `key=value` words into a `Config`, or says everything that is wrong at once.

Scalars are YAML 1.2's: `1e-4` is a number, `no` and `on` are strings, only `true` and `false` are booleans.
`python -m jaxtune.decode > configs/schema.json` writes the schema for editors.
"""

import difflib
import json
import os
import pathlib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic
import yaml

from jaxtune.config import Config


class ConfigError(ValueError):
    """The configuration is unusable; the message lists every problem with its path."""


class _Yaml12Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalar rules of YAML 1.2's core schema (section 10.3.2 of its specification)."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  # a class attribute by PyYAML's design

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Builds a mapping; a key that stands twice is an error, for one of the two values would be lost."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, dict | list):
                raise yaml.constructor.ConstructorError(None, None, f"{key} is no key", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Yaml12Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)  # 010 is ten: YAML 1.2 has no leading-0 octal


_Yaml12Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


class _Yaml12Dumper(yaml.SafeDumper):
    """Writes what `_Yaml12Loader` reads: the string 1e-4, plain in YAML 1.1, is quoted because it is a number here."""

    yaml_implicit_resolvers = _Yaml12Loader.yaml_implicit_resolvers


def decode(words: Sequence[str], missing: Mapping[str, Any] | None = None) -> Config:
    """Returns the configuration that command-line words describe.

    Args:
        words: YAML files, and any number of `dotted.key=value`; later ones win over earlier ones, words over files. A
            list item is named by its number: `data.train.0.path=FILE`; a file's list takes the place of another's.
        missing: a tree of what stands where neither says anything.

    Raises:
        ConfigError: with every problem: path, value found, what was expected, nearest key.
    """
    tree: dict[str, Any] = {}
    for word in words:
        if "=" not in word:
            tree = _filled(read_yaml(word), tree)
    problems = []
    for word in words:
        if "=" in word:
            key, _, text = word.partition("=")
            problems += _assign(tree, key, text)
    if problems:
        raise ConfigError("\n".join(problems))
    return from_tree(_filled(tree, missing or {}))


def _filled(tree: Any, missing: Mapping[str, Any]) -> Any:
    """The tree with keys that it lacks; where it has something else than keys, that is left to be complained of."""
    if not isinstance(tree, dict):
        return tree
    inner = {key: _filled(tree.get(key, {}), value) for key, value in missing.items() if isinstance(value, Mapping)}
    return {**missing, **tree, **inner}


def from_tree(tree: Mapping[str, Any]) -> Config:
    """Returns the configuration of a tree of plain values; raises ConfigError with every problem.

    `${NAME}` in a text is the environment variable's value.
    """
    unset: list[str] = []
    tree = _with_environment(tree, "", unset)
    if unset:
        raise ConfigError("\n".join(unset))
    try:
        return Config.model_validate(_tuples(tree))
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_describe(item) for item in _without_echoes(error.errors()))) from None


def to_yaml(config: Config) -> str:
    """Returns the configuration as YAML that `decode` reads back to an equal one.

    Sources have the keys that were given and no others, for a key that stands there is not taken from the group.
    """
    tree = config.model_dump(mode="json")
    for key, sources in (("train", config.data.train), ("eval", config.data.eval)):
        tree["data"][key] = [source.model_dump(mode="json", exclude_unset=True) for source in sources]
    return yaml.dump(tree, Dumper=_Yaml12Dumper, sort_keys=False, allow_unicode=True, width=100)


def read_yaml(path: str) -> dict[str, Any]:
    """Returns the tree of plain values in a YAML file, which may be a URL; raises ConfigError where there is none."""
    try:
        tree = yaml.load(_read_text(path), Loader=_Yaml12Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: found a {type(tree).__name__} at the top; expected keys such as model: and data:")
    return tree


def _read_text(path: str) -> str:
    if "://" in path:
        import fsspec  # only for those who ask: it takes longer than all the rest

        try:
            with fsspec.open(path, "rb") as stream:
                return stream.read().decode("utf-8")
        except (OSError, ImportError) as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from None
    file = pathlib.Path(path)
    if not file.is_file():
        folder = file.parent if file.parent.is_dir() else pathlib.Path()
        near = difflib.get_close_matches(file.name, [p.name for p in folder.glob("*.yaml")], n=1)
        hint = f" Did you mean {folder / near[0]}?" if near else ""
        raise ConfigError(f"{path}: no such file; expected a YAML file, or key=value words.{hint}")
    return file.read_text(encoding="utf-8")


def _assign(tree: Any, key: str, text: str) -> list[str]:
    """Sets `key` (dotted) of `tree` to the YAML value of `text`; returns what is wrong with it, if anything."""
    try:
        value = yaml.load(text, Loader=_Yaml12Loader) if text else None
    except yaml.YAMLError:
        value = text  # a path such as `a: b.jsonl` is text, not broken YAML
    parts = key.split(".")
    if not all(parts):
        return [f"{key}={text}: found an empty part in the key; expected e.g. train.steps=100"]
    node = tree
    for at, part in enumerate(parts):
        last = at == len(parts) - 1
        here = ".".join(parts[: at + 1])
        if isinstance(node, list):
            if not part.isdigit() or int(part) > len(node):
                rest = ".".join(parts[at:] if not part.isdigit() else parts[at + 1 :])
                return [
                    f"{here}: found {part!r}; expected a list item's number, 0 to {len(node)} (the next new one), "
                    f"e.g. {'.'.join([*parts[:at], '0', rest]).rstrip('.')}={text}"
                ]
            index: Any = int(part)
            if index == len(node):
                node.append(None)
        elif isinstance(node, dict):
            index = part
        else:
            return [f"{here}: {'.'.join(parts[:at])} is {node!r}, which has no keys"]
        if last:
            node[index] = value
        else:
            child = node.get(index) if isinstance(node, dict) else node[index]
            if child is None:
                child = [] if parts[at + 1].isdigit() else {}
                node[index] = child
            node = child
    return []


def _with_environment(value: Any, path: str, unset: list[str]) -> Any:
    """Fills in environment variables; notes those that are not set."""
    if isinstance(value, Mapping):
        return {k: _with_environment(v, f"{path}.{k}".lstrip("."), unset) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_with_environment(v, f"{path}.{i}".lstrip("."), unset) for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value
    for name in re.findall(r"\$\{(\w+)\}", value):
        if name not in os.environ:
            unset.append(f"{path}: found ${{{name}}}, and no such environment variable; set it: export {name}=...")
        value = value.replace(f"${{{name}}}", os.environ.get(name, ""))
    return value


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _without_echoes(items: Sequence[Any]) -> list[Any]:
    """Drops all but the last of several errors at one place: a union reports each of its members."""
    by_place = {tuple(part for part in item["loc"] if not _is_union_tag(part)): item for item in items}
    return [{**item, "loc": place} for place, item in by_place.items()]


def _is_union_tag(part: Any) -> bool:
    """True for the words by which pydantic names a member of a union, which are no keys of ours."""
    tags = r"^(str|int|float|bool|literal\[|tuple\[|constrained-|function-)"
    return isinstance(part, str) and bool(re.match(tags, part))


def _describe(item: Mapping[str, Any]) -> str:
    path = ".".join(str(part) for part in item["loc"])
    found = item.get("input")
    model, key = _owner(item["loc"])
    if item["type"] == "extra_forbidden":
        known = list(model.model_fields) if model else []
        elsewhere = [place for place in _all_paths() if place.split(".")[-1] == key]
        near = [_sibling(path, name) for name in difflib.get_close_matches(key, known, n=1, cutoff=0.5)]
        guesses = [*elsewhere, *near]
        told = f"did you mean {guesses[0]}?" if guesses else f"known here: {', '.join(known)}"
        return f"{path}: unknown key (value {found!r}); {told}"
    if item["type"] == "missing":
        return f"{path}: missing; expected {_meaning(model, key)}"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    expected = re.sub(r"^Input should be ", "", item["msg"]).replace("a valid tuple", "a list")
    expected = expected.replace("a valid integer", "an integer").replace("a valid ", "a ")
    meaning = _meaning(model, key)
    about = f" ({meaning})" if meaning and meaning != "a value" else ""
    hint = ""
    section = _section_in(model.model_fields[key].annotation) if model and key in model.model_fields else None
    if section and item["type"] == "tuple_type":
        hint = f"; items are named by number, e.g. {path}.0.{next(iter(section.model_fields))}=VALUE"
    if isinstance(found, str) and "literal" in item["type"]:
        near = difflib.get_close_matches(found, re.findall(r"'([^']+)'", item["msg"]), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
    return f"{path}: found {found!r} ({_kind(found)}); expected {expected}{about}{hint}"


def _kind(value: Any) -> str:
    names = {
        str: "a string",
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        type(None): "null",
        dict: "keys",
        tuple: "a list",
    }
    return names.get(type(value), type(value).__name__)


def _sibling(path: str, key: str) -> str:
    return ".".join([*path.split(".")[:-1], key])


def _meaning(model: type[pydantic.BaseModel] | None, key: str) -> str:
    field = model.model_fields.get(key) if model else None
    section = _section_in(field.annotation) if field else None
    if section:
        return f"keys: {', '.join(section.model_fields)}"
    return (field.description or "a value") if field else "a value"


def _owner(loc: Sequence[Any]) -> tuple[type[pydantic.BaseModel] | None, str]:
    """Returns the section that the last key of `loc` belongs to, and that key."""
    model: type[pydantic.BaseModel] | None = Config
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if model else None
        model = _section_in(field.annotation) if field else None
    return model, str(loc[-1]) if loc else ""


def _section_in(annotation: Any) -> type[pydantic.BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    for inner in typing.get_args(annotation):
        if not isinstance(inner, types.EllipsisType) and (found := _section_in(inner)):
            return found
    return None


def _all_paths(model: type[pydantic.BaseModel] = Config, prefix: str = "", inside: tuple[Any, ...] = ()) -> list[str]:
    """Dotted paths of all keys; a section inside itself (a group's sources) is named, not entered again."""
    paths = []
    for name, field in model.model_fields.items():
        section = _section_in(field.annotation)
        if section is None or section in (model, *inside):
            paths.append(f"{prefix}{name}")
        else:
            paths += _all_paths(section, f"{prefix}{name}.", (model, *inside))
    return paths


def describe_keys(
    model: type[pydantic.BaseModel] = Config, prefix: str = "", inside: tuple[type[pydantic.BaseModel], ...] = ()
) -> str:
    """Returns a line for every key: its path, its default, and what it means."""
    lines = []
    for name, field in model.model_fields.items():
        section = _section_in(field.annotation)
        if section and section not in (model, *inside):
            item = "0." if typing.get_origin(field.annotation) is tuple else ""
            lines.append(describe_keys(section, f"{prefix}{name}.{item}", (model, *inside)))
        else:
            default = "required" if field.is_required() else f"= {field.get_default(call_default_factory=True)!r}"
            choices = [a for a in typing.get_args(field.annotation) if isinstance(a, str)]
            told = "; ".join(filter(None, [field.description or "", f"one of {', '.join(choices)}" if choices else ""]))
            lines.append(f"{prefix + name:32} {default:24} {told}".rstrip())
    return "\n".join(lines)


def json_schema() -> str:
    """Returns the JSON schema of a configuration file, for editors that complete and check YAML."""
    schema = Config.model_json_schema()
    schema["required"] = [key for key in schema["required"] if key != "output"]  # a file may leave it to the words
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=1) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
