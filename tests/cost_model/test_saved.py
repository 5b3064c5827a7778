"""What forward loops keep for backward ones, on modules written by hand."""

from jaxtune.cost_model.hlo import Shape, parse
from jaxtune.cost_model.saved import saved, saved_bytes

CARRY = "(s32[], bf16[2,8], bf16[3,2,8], f32[3,8,8])"
FORWARD = f"""\
%write (a: bf16[3,2,8], b: bf16[2,8], c: s32[]) -> bf16[3,2,8] {{
  %a = bf16[3,2,8]{{2,1,0}} parameter(0)
  %b = bf16[2,8]{{1,0}} parameter(1)
  %c = s32[] parameter(2)
  %b1 = bf16[1,2,8]{{2,1,0}} bitcast(%b)
  ROOT %u = bf16[3,2,8]{{2,1,0}} dynamic-update-slice(%a, %b1, %c, %c, %c)
}}

%there (p: {CARRY}) -> {CARRY} {{
  %p = {CARRY} parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[2,8]{{1,0}} get-tuple-element(%p), index=1
  %stack = bf16[3,2,8]{{2,1,0}} get-tuple-element(%p), index=2
  %weights = f32[3,8,8]{{2,1,0}} get-tuple-element(%p), index=3
  %y = bf16[2,8]{{1,0}} fusion(%x, %weights, %i), kind=kLoop, calls=%layer
  %kept = bf16[3,2,8]{{2,1,0}} fusion(%stack, %x, %i), kind=kLoop, calls=%write
  %moved = (bf16[3,2,8]{{2,1,0}}, bf16[3,2,8]{{2,1,0}}, u32[]) copy-start(%kept)
  %back = bf16[3,2,8]{{2,1,0}} copy-done(%moved)
  ROOT %out = ({CARRY[1:-1]}) tuple(%i, %y, %back, /*index=3*/%weights)
}}

%condition (q: {CARRY}) -> pred[] {{
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%q, %three), direction=LT
}}

%layer (l: bf16[2,8]) -> bf16[2,8] {{
  ROOT %l = bf16[2,8]{{1,0}} parameter(0)
}}
"""
SLOPES = "(s32[], bf16[2,8], f32[3,8,8], bf16[3,2,8], f32[3,8,8])"
BACKWARD = f"""\
%add (d: f32[3,8,8], e: s32[]) -> f32[3,8,8] {{
  %d = f32[3,8,8]{{2,1,0}} parameter(0)
  %e = s32[] parameter(1)
  ROOT %v = f32[3,8,8]{{2,1,0}} dynamic-update-slice(%d, %d, %e, %e, %e)
}}

%again (r: {SLOPES}) -> {SLOPES} {{
  %r = {SLOPES} parameter(0)
  %j = s32[] get-tuple-element(%r), index=0
  %dx = bf16[2,8]{{1,0}} get-tuple-element(%r), index=1
  %gradient = f32[3,8,8]{{2,1,0}} get-tuple-element(%r), index=2
  %read = bf16[3,2,8]{{2,1,0}} get-tuple-element(%r), index=3
  %same = f32[3,8,8]{{2,1,0}} get-tuple-element(%r), index=4
  %filled = f32[3,8,8]{{2,1,0}} fusion(%gradient, %j), kind=kLoop, calls=%add
  ROOT %turn = ({SLOPES[1:-1]}) tuple(%j, %dx, %filled, %read, %same)
}}
"""


def loops(parameters: str) -> str:
    """A loop there and a loop back, of arrays that two of the lines make."""
    return f"""\
{parameters}
  %zero = s32[] constant(0)
  %empty = bf16[3,2,8]{{2,1,0}} broadcast(%zero), dimensions={{}}
  %none = f32[3,8,8]{{2,1,0}} broadcast(%zero), dimensions={{}}
  %begin = ({CARRY[1:-1]}) tuple(%zero, %x0, %empty, %w0)
  %first = ({CARRY[1:-1]}) while(%begin), condition=%condition, body=%there
  %h = bf16[2,8]{{1,0}} get-tuple-element(%first), index=1
  %s = bf16[3,2,8]{{2,1,0}} get-tuple-element(%first), index=2
  %s1 = bf16[3,2,8]{{2,1,0}} copy(%s)
  %turned = ({SLOPES[1:-1]}) tuple(%zero, %h, %none, %s1, %w0)
  %second = ({SLOPES[1:-1]}) while(%turned), condition=%condition, body=%again
  %g = f32[3,8,8]{{2,1,0}} get-tuple-element(%second), index=2
"""


INPUTS = """\
  %x0 = bf16[2,8]{1,0} parameter(0)
  %w0 = f32[3,8,8]{2,1,0} parameter(1)"""
TAKEN = """\
  %x0 = bf16[2,8]{1,0} get-tuple-element(%m), index=0
  %w0 = f32[3,8,8]{2,1,0} get-tuple-element(%m), index=1"""
HEAD = "HloModule jit_step, is_scheduled=true\n"


def test_what_the_loop_there_fills_and_the_loop_back_reads():
    """Neither the weights, which both read, nor the gradients, which the loop back fills."""
    module = parse(f"{HEAD}\n{FORWARD}\n{BACKWARD}\nENTRY %main (x0: bf16[2,8]) -> f32[3,8,8] {{\n{loops(INPUTS)}}}\n")
    assert saved(module) == [Shape("bf16", (3, 2, 8))]
    assert saved_bytes(module) == 3 * 2 * 8 * 2


def test_microbatches_use_the_same_memory_again():
    part = f"""\
%part (m: (bf16[2,8], f32[3,8,8])) -> (bf16[2,8], f32[3,8,8]) {{
  %m = (bf16[2,8]{{1,0}}, f32[3,8,8]{{2,1,0}}) parameter(0)
{loops(TAKEN)}
  ROOT %sums = (bf16[2,8]{{1,0}}, f32[3,8,8]{{2,1,0}}) tuple(%x0, %g)
}}
"""
    loop = '  %l = (bf16[2,8], f32[3,8,8]) while(%n), body=%part, backend_config={"known_trip_count":{"n":"4"}}'
    main = f"ENTRY %main (n: (bf16[2,8], f32[3,8,8])) -> bf16[2,8] {{\n  %n = (bf16[2,8]) parameter(0)\n{loop}\n}}\n"
    assert saved_bytes(parse("\n".join([HEAD, FORWARD, BACKWARD, part, main]))) == 3 * 2 * 8 * 2


def test_an_array_that_is_filled_and_not_read_by_a_loop_is_not_kept():
    lines = loops(INPUTS).split("  %turned")[0]
    module = parse(f"{HEAD}\n{FORWARD}\n{BACKWARD}\nENTRY %main (x0: bf16[2,8]) -> f32[3,8,8] {{\n{lines}}}\n")
    assert saved(module) == []
