"""The training step compiles for TPUs that are not here, with the kernels and the memory that it should have."""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.plan,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jaxtune[plan]'"),
]
TOOL = pathlib.Path(__file__).resolve().parents[1] / "tools" / "compile_for_tpu.py"


def compile_small(tmp_path: pathlib.Path, *words: str) -> tuple[dict, str]:
    """Returns (what the tool prints, the optimized module) for the small Llama."""
    command = [sys.executable, str(TOOL), "--shape", "llama-small", "--length", "1024", "--rows", "1", *words]
    done = subprocess.run([*command, "--hlo", str(tmp_path / "hlo")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), (tmp_path / "hlo").read_text()


@pytest.mark.parametrize(
    ("method", "topology", "settings"),
    [
        ("lora", "v5p:2x2x2", []),
        ("full", "v5p:2x2x2", ["mesh.tensor=2"]),
        ("lora", "v5e:2x4", []),
        ("full", "v6e:2x4", []),
    ],
)
def test_the_step_compiles_with_two_attention_kernels_a_layer(
    method: str, topology: str, settings: list[str], tmp_path: pathlib.Path
) -> None:
    result, module = compile_small(tmp_path, "--method", method, "--topology", topology, *settings)
    kernels = re.findall(r"custom_call_target=\"tpu_custom_call\"", module)
    assert len(kernels) == 2, "one forward and one backward kernel in the scanned layer, nothing computed again"
    assert "estimated_cycles" in module
    assert result["temporaries_gib"] < 1


def test_long_rows_split_over_chips_compile(tmp_path: pathlib.Path) -> None:
    """Queries stay where they are and keys are gathered."""
    result, module = compile_small(tmp_path, "--length", "8192", "mesh.context=8", "mesh.fsdp=1")
    assert result["tokens_per_chip"] == 1024
    kernels = re.findall(r"custom_call_target=\"tpu_custom_call\"", module)
    assert len(kernels) == 2
    assert "all-gather" in module
    assert result["temporaries_gib"] < 2


def test_experts_compile_with_grouped_matmuls_and_send_rows_to_their_devices(tmp_path: pathlib.Path) -> None:
    words = ["--shape", "mixtral-small", "--method", "full", "mesh.expert=4"]
    _, module = compile_small(tmp_path, *words)
    sendings = re.findall(r"ragged-all-to-all\(", module)
    assert len(sendings) == 6, "there and back, computed again, and the gradient of each"
    kernels = re.findall(r"custom_call_target=\"tpu_custom_call\"", module)
    assert len(kernels) == 14, "two of attention; three products, computed again, and two gradients of each"


def test_depth_does_not_lengthen_the_module(tmp_path: pathlib.Path) -> None:
    lengths = [len(compile_small(tmp_path, "--layers", layers)[1].splitlines()) for layers in ("4", "16")]
    assert lengths[1] < 1.05 * lengths[0]
