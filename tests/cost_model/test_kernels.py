"""What Pallas calls are charged, by the shapes that they are called with."""

import math

import pytest

from jaxtune.cost_model.chips import CHIPS
from jaxtune.cost_model.estimate import estimate
from jaxtune.cost_model.hlo import Instruction, parse
from jaxtune.cost_model.kernels import kernel_cycles, kernel_flops

CHIP = CHIPS["TPU v5"]
CALL = 'custom_call_target="tpu_custom_call", operand_layout_constraints='
KERNEL = f"""\
HloModule jit_step

ENTRY %main (p: f32[8]) -> f32[8] {{
  %splash_mqa_fwd.3 = (bf16[2,4,512,128]{{3,2,1,0:T(8,128)(2,1)}}, f32[2,4,512]{{2,1,0}}) custom-call(%a, %b,
      /*index=2*/%c), {CALL}{{s8[1,4,2]{{2,1,0}},
      bf16[2,4,512,128]{{3,2,1,0}}, bf16[2,512,128]{{2,1,0}}, bf16[2,512,128]{{2,1,0}}}}, frontend_attributes={{told={{
  "a string": "with ( and \\" in it
over lines"}}}}
  %other.1 = bf16[1024,1024]{{1,0}} custom-call(
      %a), {CALL}{{bf16[1024,1024]{{1,0}}}}, backend_config={{}}
  ROOT %none = f32[8]{{0}} custom-call(%p), custom_call_target="Sharding"
}}
"""


def call(name: str, results: str, operands: str, more: str = "") -> Instruction:
    return Instruction(name, "custom-call", results, f"(%a), {CALL}{{{operands}}}, frontend_attributes={{{more}}}")


def test_kernels_are_charged_by_flops_or_bytes():
    found = estimate(parse(KERNEL), CHIP, mesh={})
    flops = 0.5 * 2 * 2 * (2 * 4) * 512 * 512 * 128
    size = 2 * (2 * 4 * 512 * 128) * 2 + 4 * 2 * 4 * 512 + 2 * 2 * (2 * 512 * 128) + 8
    assert found.flops == flops
    assert found.kernels["splash_mqa_fwd"].number == 1
    attention = max(flops / CHIP.peak, size / CHIP.bandwidth) * CHIP.clock
    assert found.kernels["splash_mqa_fwd"].cycles == pytest.approx(attention)
    moved = 2 * 2 * 1024 * 1024 / CHIP.bandwidth * CHIP.clock
    assert found.kernels["other"].cycles == pytest.approx(moved)
    assert found.cycles == pytest.approx(attention + moved)


@pytest.mark.parametrize(("name", "products"), [("fwd", 2), ("dkv", 5), ("dq", 3), ("bwd", 7)])
def test_passes_of_attention_have_their_products(name, products):
    kernel = call(f"splash_mqa_{name}.1", "bf16[2,4,256,128]", "bf16[2,4,256,128], bf16[2,256,128]")
    assert kernel_flops(kernel) == 0.5 * products * 2 * 8 * 256 * 256 * 128


def test_of_rows_split_over_devices_the_last_part_sees_most():
    """8 devices have 1,024 queries each of rows of 8,192: all of them half of the pairs, the last 15 of 16."""
    kernel = call("splash_mqa_fwd.1", "bf16[4,1024,128]", "bf16[1,4,1024,128], bf16[1,8192,128]")
    pairs = 1024 * 8192
    assert kernel_flops(kernel) == 0.5 * pairs * 2 * 2 * 4 * 128
    charged = 15 / 16 * pairs * 2 * 2 * 4 * 128 / CHIP.peak * CHIP.clock
    assert kernel_cycles(kernel, CHIP) == pytest.approx(charged)


@pytest.mark.parametrize(("name", "suffix"), [("fwd", ""), ("dkv", "_dkv"), ("dq", "_dq")])
def test_a_window_leaves_blocks_out(name, suffix):
    """A mask of 8 x 2 blocks of 512 x 512 is what a row of 4,096 has left of 8 x 8."""
    blocks = rf'metadata={{"x":"{{\"block_q{suffix}\": 512, \"block_kv{suffix}\": 512}}"}}'
    arrays = "s8[1,8,2], bf16[1,4,4096,64], bf16[1,4096,64]"
    whole, window = (
        kernel_flops(call(f"splash_mqa_{name}.1", "bf16[1,4,4096,64]", arrays, more)) for more in ("", blocks)
    )
    assert whole / window == (4096 * 4096 / 2) / (8 * 2 * 512 * 512)


GROUPED = "s32[], s32[4]{0}, s32[18]{0}, s32[18]{0}, s32[1]{0}, "


@pytest.mark.parametrize(
    ("name", "results", "operands"),
    [
        ("gmm.10", "bf16[8192,1024]", "bf16[8192,512]{1,0}, bf16[2,512,1024]{2,1,0}"),
        ("gmm.5", "bf16[8192,1024]", "bf16[8192,512]{1,0}, bf16[2,1024,512]{2,1,0}"),  # transposed
        ("tgmm.3", "bf16[2,512,1024]", "bf16[8192,512]{1,0}, bf16[8192,1024]{1,0}"),
    ],
)
def test_grouped_matmuls_multiply_every_row_once(name, results, operands):
    kernel = call(name, results, GROUPED + operands)
    flops = 2 * 8192 * 512 * 1024
    assert kernel_flops(kernel) == flops
    assert kernel_cycles(kernel, CHIP) == pytest.approx(flops / CHIP.peak * CHIP.clock)
    # Of the room that four devices have for all rows that could come, a quarter is taken.
    assert kernel_flops(kernel, experts=4) == flops / 4
    size = 2 * (8192 * (512 + 1024) / 4 + 2 * 512 * 1024)
    charged = max(flops / 4 / CHIP.peak, size / CHIP.bandwidth) * CHIP.clock
    assert kernel_cycles(kernel, CHIP, experts=4) == pytest.approx(charged, rel=1e-3)


def test_kernels_that_are_not_known_have_no_flops():
    assert kernel_flops(call("gmm_like.1", "bf16[8,8]", "bf16[8,8]")) == 0
    assert kernel_flops(call("splash.1", "bf16[8,8]", "s32[8]")) == 0
    assert math.isfinite(kernel_cycles(call("mine.1", "bf16[8,8]", "bf16[8,8]"), CHIP))
