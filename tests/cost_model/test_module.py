"""Estimates of modules that libtpu makes, against arithmetic of another kind: what a small Llama must send and keep."""

import importlib.util
import pathlib
import re

import plan_shapes
import pytest
import tpu_plans

from jaxtune.cost_model.chips import CHIPS, Chip
from jaxtune.cost_model.estimate import Estimate, estimate
from jaxtune.cost_model.hlo import parse
from jaxtune.cost_model.saved import saved_bytes

pytestmark = [
    pytest.mark.plan,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jaxtune[plan]'"),
]
# plan_shapes' small Llama: layers, width, mlp, query and kv heads, head size, vocabulary; tokens of a row; rank.
L, D, F, N, K, H, V, T, R = 4, 512, 1024, 4, 2, 128, 4096, 1024, 16
LAYER = 2 * D * N * H + 2 * D * K * H + 3 * D * F
ADAPTERS = {"in": 7 * D * R, "out": R * (2 * N * H + 2 * K * H + 2 * F + F)}  # along the width, and the others
ATTENTION = 0.5 * 2 * T * T * N * H  # one of its products in a layer


def compile_small(folder: pathlib.Path, topology: str, *words: str, rows: int) -> str:
    """Returns the optimized module of the small Llama's step."""
    own = (f"data.max_length={T}", f"train.batch_rows={rows}", "--topology", topology)
    found = tpu_plans.plan(folder, plan_shapes.LLAMA, *words, *own)
    assert found.code == 0, found.error[-2000:]
    return found.module


def estimate_of(text: str, chip: Chip, devices: int) -> Estimate:
    return estimate(parse(text), chip, mesh={"slice": 1, "data": 1, "fsdp": devices, "tensor": 1})


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compile_small(tmp_path_factory.mktemp("lora"), "v5p-16", "model.remat=minimal", rows=8)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    words = ("tuning.method=full", "model.remat=minimal")
    return compile_small(tmp_path_factory.mktemp("full"), "v5e-16", *words, rows=16)


def summed_cycles(text: str) -> int:
    """Adds up the cycles of the lines of all computations that run, found by their names alone."""
    blocks = {}
    for block in re.split(r"\n(?=(?:ENTRY )?%[\w.\-]+ \()", text)[1:]:
        name = re.match(r"(?:ENTRY )?%([\w.\-]+)", block)
        assert name
        blocks["ENTRY" if block.startswith("ENTRY") else name[1]] = block

    def cycles(name: str) -> int:
        total = 0
        for line in blocks[name].split("\n  "):
            told = re.search(r'"estimated_cycles":"(\d{1,15})"', line)
            total += int(told[1]) if told else 0
            if " while(" in line:
                condition, body = (re.search(rf"{word}=%([\w.\-]+)", line) for word in ("condition", "body"))
                assert condition and body
                total += int(max(re.findall(r"constant\((\d+)\)", blocks[condition[1]]))) * cycles(body[1])
            elif " conditional(" in line:
                names = re.search(r"branch_computations=\{([^}]*)\}", line)
                assert names
                total += max(cycles(branch.strip(" %")) for branch in names[1].split(","))
            elif called := re.search(r" (?:call|call-start|async-start)\(.*(?:to_apply|calls)=%([\w.\-]+)", line):
                total += cycles(called[1])
        return total

    return cycles("ENTRY")


def test_cycles_are_those_of_the_lines_and_of_the_kernels(lora: str, full: str) -> None:
    for text, chip, devices in ((lora, "TPU v5", 8), (full, "TPU v5 lite", 16)):
        found = estimate_of(text, CHIPS[chip], devices)
        kernels = sum(calls.cycles for calls in found.kernels.values())
        assert found.cycles == pytest.approx(summed_cycles(text) + kernels)
        assert {calls.number for calls in found.kernels.values()} == {L}


def test_weights_are_gathered_once_for_each_pass(lora: str, full: str) -> None:
    """In bfloat16, there and back; the head once; of adapters the side along the width; and where the tokens stand."""
    tokens = 4 * T
    for text, chip, devices, own in (
        (lora, "TPU v5", 8, ADAPTERS["in"]),
        (full, "TPU v5 lite", 16, 0),  # these are begun in fusions that compute beside them
    ):
        found = estimate_of(text, CHIPS[chip], devices).collectives[("all-gather", ("fsdp",))]
        whole = 2 * 2 * L * (LAYER + own) + 2 * D * V + devices * tokens
        assert found.size == pytest.approx((devices - 1) / devices * whole, rel=0.01)
        assert 0 < found.exposed <= found.seconds


def test_flops_are_those_of_the_products(lora: str, full: str) -> None:
    """Frozen matrices: there, and back to what went in; trained ones back to themselves too; the head likewise."""
    adapters = L * sum(ADAPTERS.values())
    expected = 4 * T * L * LAYER + 4 * T * D * V + 6 * T * adapters + 7 * L * ATTENTION
    found = estimate_of(lora, CHIPS["TPU v5"], 8)
    assert found.flops == pytest.approx(expected, rel=0.03)
    all_trained = 6 * T * L * LAYER + 6 * T * D * V + 7 * L * ATTENTION
    assert estimate_of(full, CHIPS["TPU v5 lite"], 16).flops == pytest.approx(all_trained, rel=0.03)


def test_what_is_kept_is_what_remat_names(lora: str, full: str, tmp_path: pathlib.Path) -> None:
    kept = 2 * D + N * H + 2 * K * H + N * H + 2 * F  # in and mid, q, k and v, attention, gate and up
    for text in (lora, full):
        assert saved_bytes(parse(text)) == L * T * (2 * kept + 4 * N)  # and its log-sum-exp
    again = compile_small(tmp_path, "v5p-16", "model.remat=full", rows=8)
    assert saved_bytes(parse(again)) == L * T * D * 2
    calls = estimate_of(again, CHIPS["TPU v5"], 8).kernels
    assert sorted(one.number for one in calls.values()) == [L, 2 * L], "the kernel there runs again on the way back"


def test_every_part_has_its_share(lora: str) -> None:
    found = estimate_of(lora, CHIPS["TPU v5"], 8)
    assert sum(found.parts.values()) == pytest.approx(found.seconds * CHIPS["TPU v5"].clock)
    parts = {"attention", "mlp", "head", "embedding", "norms", "adapters", "optimizer", "collectives", "other"}
    assert set(found.parts) == parts
    assert found.parts["other"] < 0.25 * sum(found.parts.values())
    assert 0.05 < found.parts["adapters"] / found.cycles < 0.6
