"""The arithmetic of estimates, on modules written by hand whose sums are known."""

import pytest

from jaxtune.cost_model.chips import CHIPS
from jaxtune.cost_model.estimate import estimate
from jaxtune.cost_model.hlo import parse, shapes

CHIP = CHIPS["TPU v5"]


def op(name: str, cycles: int, frame: int = 0, opcode: str = "fusion") -> str:
    told = f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
    return f"  %{name} = f32[8]{{0}} {opcode}(%p), metadata={{stack_frame_id={frame}}}, {told}"


LOOPS = f"""\
HloModule jit_step, is_scheduled=true

FileNames
1 "/x/model.py"

FunctionNames
1 "make_train_step.<locals>.train_step"
2 "Mlp.__call__"
3 "Linear.__call__"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=1}}
2 {{file_name_id=1 function_name_id=2 line=2 end_line=2 column=1 end_column=1}}
3 {{file_name_id=1 function_name_id=3 line=3 end_line=3 column=1 end_column=1}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=2}}
3 {{file_location_id=3 parent_frame_id=3}}

%fused (p: f32[8]) -> f32[8] {{
{op("never", 10**6)}
}}

%inner.body (p: f32[8]) -> f32[8] {{
{op("in.loop", 7, frame=3)}
}}

%inner.cond (p: f32[8]) -> pred[] {{
  %bound = s32[]{{:T(128)}} constant(5)
  ROOT %less = pred[] compare(%p, %bound), direction=LT
}}

%outer.body (p: f32[8]) -> f32[8] {{
  %again = (s32[], f32[8]{{0}}) while(%p), condition=%inner.cond, body=%inner.body
{op("beside", 11, frame=2)}
}}

%outer.cond (p: f32[8]) -> pred[] {{
  %far = s32[] constant(3)
  %less.1 = pred[] compare(%p, %far), direction=LT
}}

%cheap (p: f32[8]) -> f32[8] {{
{op("little", 1)}
}}

%dear (p: f32[8]) -> f32[8] {{
{op("much", 100)}
}}

%elsewhere (p: f32[8]) -> f32[8] {{
{op("unknown", 2**63 - 1)}
{op("known", 13)}
}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
{op("first", 1000, frame=1)}
  %loop = (s32[]{{:T(128)}}, /*index=1*/(f32[8]{{0}}, bf16[2]{{0}})) while(%p), condition=%outer.cond, body=%outer.body
  %known = f32[8] while(%p), condition=%inner.cond, body=%inner.body, backend_config={{"known_trip_count":{{"n":"2"}}}}
  %choice = f32[8] conditional(%p, %p, %p), branch_computations={{%cheap, %dear}}
  %begun = ((f32[8]), f32[8], u32[]) call-start(%p), to_apply=%elsewhere
  %ended = f32[8] call-done(%begun)
  %gathered = (f32[8]{{0}}, f32[32]{{0}}) all-gather-start(%p), replica_groups={{{{0,1,2,3}}}}
  ROOT %summed = f32[8]{{0}} all-reduce(%p), replica_groups=[1,8]<=[8]
}}
"""


def test_loops_branches_and_parts():
    found = estimate(parse(LOOPS), CHIP, mesh={"fsdp": 8})
    inner = 3 * 5 * 7 + 2 * 7
    exposed = found.parts.pop("collectives")
    assert found.parts == {"optimizer": 1000, "mlp": inner + 3 * 11, "other": 100 + 13}
    assert exposed == pytest.approx(found.exposed * CHIP.clock) and found.exposed > 0
    assert found.cycles == 1000 + inner + 33 + 113
    assert found.collectives[("all-gather", ("fsdp",))][:2] == (1, 3 / 4 * 32 * 4)
    assert found.collectives[("all-reduce", ("fsdp",))][:2] == (1, 2 * 7 / 8 * 32)


def test_trips_that_the_compiler_has_peeled_off_are_not_counted_twice():
    bound = "  %bound = s32[]{:T(128)} constant(5)"
    counted = LOOPS.replace(bound, f"  %at = s32[] get-tuple-element(%p), index=1\n{bound}")
    begun = """\
  %two = s32[]{:T(128)} constant(2)
  %moved = s32[] copy(%two)
  %begin = (f32[8]{0}, s32[]) tuple(%p, %moved)
  ROOT %peeled = (f32[8], s32[]) while(%begin), condition=%inner.cond, body=%inner.body
}
"""
    module = parse(counted.rpartition("  ROOT")[0] + begun)
    assert module.trips(module.named["peeled"]) == 5 - 2
    assert module.trips(module.named["again"]) == 5, "from 0 where the first value is not known"


def test_a_chip_without_a_clock_is_refused():
    with pytest.raises(ValueError, match="expected a TPU"):
        estimate(parse(LOOPS), CHIPS["NVIDIA H200"], mesh={})


def test_shapes_and_what_is_no_module():
    first, second = shapes("(bf16[2,3]{1,0:T(8,128)(2,1)}, s32[])")
    assert (first.dtype, first.dims, first.size, second.size) == ("bf16", (2, 3), 12, 4)
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse("hello\nworld")
