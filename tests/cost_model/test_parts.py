"""Every function that estimates know a part by exists, and every block of a model is known."""

import ast
import pathlib

import pytest

from jaxtune.cost_model.hlo import parse
from jaxtune.cost_model.parts import PARTS, part_of

PACKAGE = pathlib.Path(__file__).resolve().parents[2] / "jaxtune"
# Classes whose parts are blocks of their own, or that belong to the block that calls them.
WITHIN = ("Linear", "Router", "Layer", "Decoder", "T5", "_Tiling")


def qualified_names(tree: ast.AST, prefix: str = "") -> list[str]:
    """Names of functions as a stack frame has them: `Class.method`, `outer.<locals>.inner`."""
    names = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            names += [prefix + node.name, *qualified_names(node, f"{prefix}{node.name}.<locals>.")]
        elif isinstance(node, ast.ClassDef):
            names += qualified_names(node, f"{prefix}{node.name}.")
        else:
            names += qualified_names(node, prefix)
    return names


def names_of(*files: pathlib.Path) -> set[str]:
    return {name for file in files for name in qualified_names(ast.parse(file.read_text(encoding="utf-8")))}


def test_functions_that_tell_a_part_exist():
    assert set(PARTS) <= names_of(*PACKAGE.glob("*.py"), *(PACKAGE / "models").glob("*.py"))


def test_every_block_of_a_model_has_a_part():
    blocks = {name for name in names_of(*(PACKAGE / "models").glob("*.py")) if name.endswith(".__call__")}
    assert blocks - set(PARTS) == {f"{name}.__call__" for name in WITHIN}


@pytest.mark.parametrize(
    ("functions", "part"),
    [
        (["low_rank", "Linear.__call__", "Mlp.__call__", "Layer.__call__"], "adapters"),
        (["Linear.__call__", "Mlp.__call__", "SparseMlp.__call__"], "mlp"),  # a shared mlp is one
        (["low_rank_rows", "_apply", "SparseMlp.__call__"], "adapters"),
        (["choose_experts", "Router.__call__", "SparseMlp.__call__"], "experts"),
        (["RMSNorm.__call__", "Attention.__call__"], "norms"),
        (["_pass", "token_losses", "make_loss.<locals>.loss_sum"], "head"),
        (["_scan_group", "make_loss.<locals>.loss_sum", "make_train_step.<locals>.train_step"], "other"),
        (["scale_by_adam.<locals>.update_fn", "make_train_step.<locals>.train_step"], "optimizer"),
        (["main"], "other"),
    ],
)
def test_the_innermost_function_that_is_known_decides(functions, part):
    module = parse(f"HloModule m\n\n{frames(functions)}{LINES.replace('NUMBER', str(len(functions)))}")
    assert part_of(module, module.named["told"]) == part
    assert part_of(module, module.named["fused"]) == part, "what a fusion does not say itself, its ops do"
    assert part_of(module, module.named["untold"]) == "other"


def frames(functions: list[str]) -> str:
    """The tables of a stack with these functions, the innermost first."""
    outermost_first = list(enumerate(reversed(functions), 1))
    names = "\n".join(f'{n} "{name}"' for n, name in outermost_first)
    places = "\n".join(f"{n} {{file_name_id=1 function_name_id={n} line=1}}" for n, _ in outermost_first)
    stack = "\n".join(f"{n} {{file_location_id={n} parent_frame_id={n}}}" for n, _ in outermost_first)
    return f"FunctionNames\n{names}\n\nFileLocations\n{places}\n\nStackFrames\n{stack}\n\n"


LINES = """\
%inside (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %sum = f32[8]{0} add(%a, %a), metadata={op_name="x" stack_frame_id=NUMBER}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %told = f32[8]{0} add(%p, %p), metadata={op_name="x" stack_frame_id=NUMBER}
  %fused = f32[8]{0} fusion(%p), kind=kLoop, calls=%inside
  ROOT %untold = f32[8]{0} add(%p, %p)
}
"""
