"""FLOPs of matrix products in the forms that a TPU's compiler gives them, against the product of their sizes."""

import pytest

from jaxtune.cost_model.flops import product_flops
from jaxtune.cost_model.hlo import parse

PRODUCT = 64 * 32 * 16


def flops(left: str, right: str, result: str, op: str) -> float:
    text = f"""\
HloModule m

%inner (a: {left}, b: {right}) -> {result} {{
  %a = {left}{{0}} parameter(0)
  %b = {right}{{0}} parameter(1)
  ROOT %c = {result}{{0}} {op}, metadata={{}}
}}

%outer (d: {left}, e: {right}) -> {result} {{
  %d = {left}{{0}} parameter(0)
  %e = {right}{{0}} parameter(1)
  ROOT %f = {result}{{0}} fusion(%d, %e), kind=kLoop, calls=%inner
}}

ENTRY %main (p: {left}) -> {result} {{
  ROOT %g = {result}{{0}} fusion(%p, %p), kind=kOutput, calls=%outer
}}
"""
    module = parse(text)
    return product_flops(module, module.named["g"])


@pytest.mark.parametrize(
    ("left", "right", "result", "op", "expected"),
    [
        # B T D by D F, and the gradients by x and by the kernel.
        ("bf16[2,64,32]", "bf16[32,16,1]", "bf16[2,64,16]", "window={size=1}, dim_labels=0bf_io0->0bf", 2 * PRODUCT),
        ("bf16[2,64,16]", "bf16[32,16,1]", "bf16[2,64,32]", "window={size=1}, dim_labels=0bf_oi0->0bf", 2 * PRODUCT),
        ("bf16[2,64,32]", "bf16[2,64,16]", "bf16[32,16,1]", "window={size=2}, dim_labels=0fb_0io->bf0", 2 * PRODUCT),
        ("bf16[64,32]", "bf16[32,16]", "bf16[64,16]", "dim_labels=bf_io->bf", PRODUCT),
        ("bf16[64,32]", "bf16[64,16]", "bf16[32,16]", "dim_labels=fb_io->bf", PRODUCT),
        # A reshape in front of the product: kernel places that fall on padding multiply nothing.
        (
            "bf16[64,32,1]",
            "bf16[2,8,32]",
            "bf16[64,2,8]",
            "window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=bf0_0oi->b0f",
            2 * 64 * 32 * 8,
        ),
        (
            "bf16[2,64,32,1]",
            "bf16[4,8,32,1]",
            "bf16[2,64,4,8]",
            "window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f",
            2 * 64 * 32 * 4 * 8,
        ),
        # A product for each of 3 heads, as a convolution of which each place has its own kernel.
        (
            "bf16[3,64,32]",
            "bf16[3,32,16]",
            "bf16[3,64,16]",
            "window={size=3 pad=2_2 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf",
            3 * PRODUCT,
        ),
    ],
)
def test_convolutions(left, right, result, op, expected):
    assert flops(left, right, result, f"convolution(%a, %b), {op}") == 2 * expected


def test_dots_and_what_is_no_product():
    dims = "lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}"
    assert flops("f32[3,64,32]", "f32[3,32,16]", "f32[3,64,16]", f"dot(%a, %b), {dims}") == 2 * 3 * 64 * 32 * 16
    assert flops("f32[8]", "f32[8]", "f32[8]", "add(%a, %b)") == 0
