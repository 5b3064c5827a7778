"""The house stands on its floors: imports go downward only, and none of them has an effect."""

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "jaxtune"

# From the roof to the ground. A name stands for its module, or for the whole folder; modules of one floor may import
# one another as long as they form no circle.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("train", "generate", "chat", "evaluate", "audit", "plan", "prepare", "doctor", "convert.__main__"),
    ("training", "answering", "conversions", "checking", "examining"),
    ("parity", "describing"),
    ("fitting",),
    ("loop", "opening", "choosing", "forecast"),
    ("assembly", "blueprint", "card", "exporting", "inputs", "watching", "agreement", "feeding"),
    ("convert",),
    ("step", "router_loss", "adapters", "decoding"),
    ("models",),
    ("data",),
    ("data.quality",),
    ("data.wording",),
    ("data.chat", "data.layouts", "data.files", "data.mixing"),
    ("data.reasoning", "data.tool_calls"),
    ("data.row_values",),
    ("data.records",),
    (
        "saving",
        "placement",
        "hosts",
        "sharding",
        "loss",
        "optimizer",
        "adafactor",
        "metrics",
        "run_folder",
        "memory",
        "guard",
        "faults",
        "planned",
    ),
    ("run_lock", "cost_model", "compiler_options"),
    ("decode",),
    ("config", "config_data", "config_quality", "config_section", "batch", "hub", "compat", "asking", "__init__"),
)
# A command checks what it was given before anything heavy is imported; nobody else imports inside a function.
IMPORTS_INSIDE_FUNCTIONS = (
    "train",
    "plan.__main__",
    "doctor",
    "prepare",
    "audit.__main__",
    "generate",
    "chat",
    "evaluate.__main__",
    "convert.__main__",
)
MAY_JIT = ("step", "decoding", "sharding", "placement")
OPTIONAL = ("wandb", "apache_beam", "lm_eval", "tokamax", "libtpu", "qwix", "matplotlib", "torch")
NOT_IN_MODELS = ("transformers", "tokenizers", "sentencepiece", "datasets", "grain", "jinja2", "pydantic")


class Import(NamedTuple):
    """One import: who (`data.loader`), whom (`jaxtune.hub` or `numpy`), where, and whether inside a function."""

    importer: str
    imported: str
    line: int
    inside: bool


def module_name(file: pathlib.Path, package: pathlib.Path) -> str:
    parts = file.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imports_of(package: pathlib.Path) -> Iterator[Import]:
    """Yields every import of the package; own modules as `jaxtune.x.y`, names in them left out."""
    files = {module_name(file, package): file for file in sorted(package.rglob("*.py"))}
    own = {f"jaxtune.{name}" for name in files} | {"jaxtune"}
    for name, file in files.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        inner = {id(node) for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}:{node.lineno}: relative import"
                inside = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = sorted({target if target in own else str(node.module) for target in inside})
            else:
                continue
            for target in targets:
                yield Import(name, target, node.lineno, id(node) in inner)


def floor_of(name: str) -> int | None:
    """Returns the number of a module's floor, 0 at the roof; the longest name that fits decides."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for number, floor in enumerate(FLOORS):
            if ".".join(parts[:length]) in floor:
                return number
    return None


def broken_rules(package: pathlib.Path) -> list[str]:
    """Returns a sentence for every import that the floors do not allow."""
    broken = []
    edges: dict[str, set[str]] = {}
    for importer, imported, line, inside in imports_of(package):
        where, library = f"{importer}:{line}", imported.partition(".")[0]
        if library != "jaxtune":
            if library in OPTIONAL and not inside:
                broken.append(f"{where} imports the optional {library} at the top")
            if importer.startswith("models.") and library in NOT_IN_MODELS:
                broken.append(f"{where}: a model knows arrays, and imports {library}")
            continue
        name = imported.removeprefix("jaxtune").removeprefix(".") or "__init__"
        mine, theirs = floor_of(importer), floor_of(name)
        if mine is None or theirs is None:
            broken.append(f"{importer if mine is None else name} has no floor; give it one in FLOORS")
            continue
        if theirs < mine:
            broken.append(f"{where} imports {name}, which is {mine - theirs} floors above it")
        if inside and importer not in IMPORTS_INSIDE_FUNCTIONS:
            broken.append(f"{where} imports {name} inside a function")
        if importer.startswith("models.") and name.partition(".")[0] in ("data", "config"):
            broken.append(f"{where}: a model knows arrays, and imports {name}")
        if importer.startswith("data.") and name.startswith("models"):
            broken.append(f"{where}: data knows no model, and imports {name}")
        edges.setdefault(importer, set()).add(name)
    return broken + [f"circle: {' -> '.join(circle)}" for circle in circles(edges)]


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Returns the circles that a walk along the imports runs into."""
    found, done = [], set()

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for other in sorted(edges.get(name, ())):
                walk(other, [*path, name])
            done.add(name)

    for name in sorted(edges):
        walk(name, [])
    return found


def test_imports_go_downward_only():
    broken = broken_rules(PACKAGE)
    assert not broken, "\n".join(broken)


def test_every_module_has_a_floor():
    homeless = [name for file in PACKAGE.rglob("*.py") if floor_of(name := module_name(file, PACKAGE)) is None]
    assert not homeless, f"give {homeless} a floor in FLOORS"


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("step.py", "import jaxtune.loop", "step:1 imports loop, which is 3 floors above it"),
        ("data/x.py", "from jaxtune.models import llama", "data knows no model"),
        ("models/x.py", "from jaxtune.data.stream import Stream", "a model knows arrays, and imports data.stream"),
        ("models/x.py", "from jaxtune import config", "a model knows arrays, and imports config"),
        ("models/x.py", "import transformers.models", "a model knows arrays, and imports transformers"),
        ("step.py", "def f():\n    from jaxtune import loss", "step:2 imports loss inside a function"),
        ("metrics.py", "import wandb", "metrics:1 imports the optional wandb at the top"),
        ("surprise.py", "from jaxtune import hub", "surprise has no floor"),
        ("loss.py", "import jaxtune.metrics", "circle: loss -> metrics -> loss"),
    ],
)
def test_a_broken_rule_is_seen(tmp_path, file, text, told):
    """The same check on a house of two rooms that breaks one rule."""
    for name in ("models", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    for name in ("loop", "loss", "config", "hub", "models/llama", "data/loader"):
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "metrics.py").write_text("import jaxtune.loss\n")
    assert broken_rules(tmp_path) == []
    (tmp_path / file).write_text(text + "\n")
    assert any(told in sentence for sentence in broken_rules(tmp_path)), broken_rules(tmp_path)


def test_only_a_few_modules_compile():
    compiling = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Attribute) and node.attr in ("jit", "pjit", "pmap")
            if named or (
                isinstance(node, ast.ImportFrom) and any(a.name in ("jit", "pjit", "pmap") for a in node.names)
            ):
                compiling.add(module_name(file, PACKAGE))
    assert compiling <= set(MAY_JIT), f"{sorted(compiling - set(MAY_JIT))} call jax.jit"


IMPORT_ALL = """
import os, pkgutil, importlib, signal, sys, threading
watched = ("JAX_", "XLA_", "TPU_", "HF_", "LIBTPU_")
import jax  # which itself says to an installed libtpu that there is no TPU
before = {k: v for k, v in os.environ.items() if k.startswith(watched)}
flags = dict(jax.config.values)
import jaxtune
names = [m.name for m in pkgutil.walk_packages(jaxtune.__path__, "jaxtune.") if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
from jax._src import xla_bridge
assert len(names) > 30, names
assert not xla_bridge.backends_are_initialized(), "a device was touched"
changed = {k for k, v in jax.config.values.items() if k in flags and flags[k] != v}
assert not changed, f"flags were set: {changed}"
after = {k: v for k, v in os.environ.items() if k.startswith(watched)}
assert after == before, f"the environment was changed: {set(after.items()) ^ set(before.items())}"
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
ours = [t.name for t in threading.enumerate() if t.name.startswith(("run-folder", "manifest"))]
assert not ours, ours
print("fine")
"""


def test_no_import_has_an_effect():
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "fine", done.stderr
