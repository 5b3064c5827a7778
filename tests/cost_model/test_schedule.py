"""What of collectives is exposed, on schedules written by hand whose sums are known.

The chip has a clock of 1 Hz and links of 1 byte/s, so that a cycle is a second and a byte is a second.
"""

import pytest

from jaxtune.cost_model.chips import Chip
from jaxtune.cost_model.estimate import Estimate, estimate
from jaxtune.cost_model.hlo import parse

CHIP = Chip(1.0, 1.0, 1.0, 1.0, link=1.0, dcn=0.1, dimensions=3)
MESH = {"slice": 2, "fsdp": 4}
MODULE = """\
HloModule jit_step, is_scheduled=true

%fused (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
}
"""
RING = "replica_groups={{0,1,2,3},{4,5,6,7}}"


def work(name: str, cycles: int) -> str:
    told = f'backend_config={{"estimated_cycles":"{cycles}"}}'
    return f"  %{name} = f32[8]{{0}} fusion(%p), kind=kLoop, calls=%fused, {told}"


def gather(name: str, size: int) -> list[str]:
    """Begins and ends an all-gather to `size` bytes: 3/4 of them are sent."""
    kind = f"(u8[{size // 4}]{{0}}, u8[{size}]{{0}})"
    return [
        f"  %{name} = {kind} all-gather-start(%p), channel_id=1, {RING}, dimensions={{0}}",
        f"  %{name}.done = u8[{size}]{{0}} all-gather-done(%{name})",
    ]


def run(*lines: str, more: str = "", directions: float = 1.0) -> Estimate:
    text = "\n".join([MODULE, more, "ENTRY %main (p: u8[8]) -> u8[8] {", "  %p = u8[8]{0} parameter(0)", *lines, "}"])
    return estimate(parse(text), CHIP, mesh=MESH, directions={"fsdp": directions})


def exposed(found: Estimate) -> float:
    assert found.seconds == pytest.approx(found.cycles + found.exposed)
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    assert found.exposed == pytest.approx(sum(traffic.exposed for traffic in found.collectives.values()))
    return found.exposed


@pytest.mark.parametrize(("cycles", "left"), [(0, 30), (10, 20), (30, 0), (100, 0)])
def test_cycles_between_start_and_done_hide_the_collective(cycles, left):
    start, done = gather("g", 40)
    found = run(work("before", 50), start, work("between", cycles), done, work("after", 70))
    assert exposed(found) == left
    assert found.cycles == 120 + cycles
    assert found.collectives == {("all-gather", ("fsdp",)): (1, 30, 30, left)}


def test_one_that_is_waited_for_where_it_stands_is_exposed_whole():
    found = run(work("before", 50), f"  %g = u8[40]{{0}} all-gather(%p), {RING}, dimensions={{0}}", work("after", 70))
    assert exposed(found) == 30


def test_cycles_that_the_compiler_charges_a_collective_are_part_of_its_time():
    charged = f'  %g = u8[40]{{0}} all-gather(%p), {RING}, backend_config={{"estimated_cycles":"25"}}'
    found = run(charged)
    assert (found.cycles, exposed(found)) == (25, 5)


def test_two_in_flight_use_the_same_cycles_once():
    first, second = gather("a", 40), gather("b", 40)
    found = run(first[0], second[0], work("between", 40), first[1], second[1])
    assert exposed(found) == 20  # 60 seconds of one link, 40 of them hidden
    turned = run(first[0], second[0], work("between", 40), second[1], first[1])
    assert exposed(turned) == 20


def test_waiting_for_one_gives_time_to_the_other_network_alone():
    first = gather("a", 40)
    sent = 'frontend_attributes={_xla_host_transfer_rendezvous="r",_xla_megascale_transfer_type="ALL_REDUCE"}'
    host = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
    lines = [
        "  %token = token[] after-all()",
        f"  %send = (u8[5]{{0}}, u32[], token[]) send(%p, %token), channel_id=2, {host}, {sent}",
        f"  %recv = (u8[5]{{0}}, u32[], token[]) recv(%token), channel_id=3, {host}, {sent}",
        first[0],
        first[1],  # 30 seconds, all exposed; the send needs 5 bytes / 0.1 = 50
        f"  %recv-done = (u8[5]{{0}}, token[]) recv-done(%recv), channel_id=3, {host}",
    ]
    found = run(*lines)
    assert exposed(found) == 30 + 20
    assert found.collectives[("all-reduce", ("slice",))] == (1, 5, 50, 20)


BODY = """\
%body (b: (s32[], u8[8])) -> (s32[], u8[8]) {
  %b = (s32[], u8[8]{0}) parameter(0)
LINES
  ROOT %t = (s32[], u8[8]{0}) tuple(%b, %b)
}

%condition (c: (s32[], u8[8])) -> pred[] {
  %bound = s32[] constant(5)
  ROOT %less = pred[] compare(%c, %bound), direction=LT
}
"""
LOOP = "  %loop = (s32[], u8[8]{0}) while(%p), condition=%condition, body=%body"


def test_every_trip_of_a_loop_waits():
    start, done = gather("g", 40)
    body = BODY.replace("LINES", "\n".join([start, work("between", 10), done]))
    found = run(LOOP, more=body)
    assert exposed(found) == 5 * 20
    assert found.collectives == {("all-gather", ("fsdp",)): (5, 150, 150, 100)}


def test_a_loop_hides_what_began_before_it():
    start, done = gather("g", 40)
    body = BODY.replace("LINES", work("inside", 5))
    assert exposed(run(start, LOOP, done, more=body)) == 30 - 5 * 5


def test_what_a_trip_begins_is_waited_for_in_it():
    start, _ = gather("g", 40)
    body = BODY.replace("LINES", "\n".join([start, work("after", 10)]))
    assert exposed(run(LOOP, work("behind", 1000), more=body)) == 5 * 20


def test_nested_loops_multiply():
    start, done = gather("g", 40)
    inner = BODY.replace("LINES", "\n".join([start, done]))
    outer = "%outer" + BODY.replace("LINES", LOOP.replace("loop", "inner")).split("\n\n")[0].removeprefix("%body")
    loop = '  %far = (s32[], u8[8]{0}) while(%p), body=%outer, backend_config={"known_trip_count":{"n":"3"}}'
    found = run(loop, more=f"{inner}\n{outer}\n")
    assert found.collectives[("all-gather", ("fsdp",))].number == 15
    assert exposed(found) == 15 * 30


def test_the_costliest_branch_is_taken():
    branches = "\n".join(
        f"%{name} (x: u8[8]) -> u8[8] {{\n  %x{name} = u8[8]{{0}} parameter(0)\n{work('w' + name, cycles)}\n}}\n"
        for name, cycles in (("cheap", 3), ("dear", 8))
    )
    start, done = gather("g", 40)
    choice = "  %c = u8[8]{0} conditional(%p, %p, %p), branch_computations={%cheap, %dear}"
    found = run(start, choice, done, more=branches)
    assert (found.cycles, exposed(found)) == (8, 22)


CHAIN = f"""\
%first (x: u8[10]) -> (u8[10], u8[40], u32[]) {{
  %x = u8[10]{{0}} parameter(0)
  %g.1 = u8[40]{{0}} all-gather(%x), channel_id=7, {RING}, backend_config={{"async_collective_fusion_config":{{}}}}
  ROOT %s = (u8[10]{{0}}, u8[40]{{0}}, u32[]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}}

%between (y: u8[10]) -> u8[10] {{
  %y = u8[10]{{0}} parameter(0)
  ROOT %g.2 = u8[40]{{0}} all-gather(%y), channel_id=7, {RING}, backend_config={{"async_collective_fusion_config":{{}}}}
}}

%last (z: u8[10]) -> u8[40] {{
  %z = u8[10]{{0}} parameter(0)
  %g.3 = u8[40]{{0}} all-gather(%z), channel_id=7, {RING}, backend_config={{"async_collective_fusion_config":{{}}}}
  ROOT %d = u8[40]{{0}} custom-call(%z, %g.3), custom_call_target="AsyncCollectiveDone"
}}
"""


def test_a_chain_of_fusions_is_one_collective_that_they_hide():
    lines = [
        "  %a = (u8[10]{0}, u8[40]{0}, u32[]) fusion(%p), kind=kCustom, calls=%first",
        '  %b = u8[10]{0} fusion(%a), kind=kOutput, calls=%between, backend_config={"estimated_cycles":"12"}',
        work("beside", 6),
        "  %c = u8[40]{0} fusion(%b), kind=kCustom, calls=%last",
    ]
    found = run(*lines, more=CHAIN)
    assert exposed(found) == 30 - 12 - 6
    assert found.collectives == {("all-gather", ("fsdp",)): (1, 30, 30, 12)}


def test_a_fused_reduce_scatter_is_waited_for():
    fused = f"""\
%all-reduce-scatter.1 (x: u8[40]) -> u8[10] {{
  %x = u8[40]{{0}} parameter(0)
  %r = u8[40]{{0}} all-reduce(%x), channel_id=2, {RING}, to_apply=%add
  ROOT %s = u8[10]{{0}} dynamic-slice(%r, %x), dynamic_slice_sizes={{10}}
}}
"""
    found = run("  %f = u8[10]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1", more=fused)
    assert found.collectives == {("reduce-scatter", ("fsdp",)): (1, 30, 30, 30)}


def test_a_computation_begun_on_another_core_is_in_flight():
    other = f"""\
%elsewhere (x: u8[40]) -> u8[10] {{
  %x = u8[40]{{0}} parameter(0)
  ROOT %r = u8[10]{{0}} reduce-scatter(%x), {RING}, dimensions={{0}}, to_apply=%add
}}
"""
    for begin, end in (("async-start", "async-done"), ("call-start", "call-done")):
        calls = "calls" if begin == "async-start" else "to_apply"
        lines = [
            f"  %a = ((u8[40]{{0}}), u8[10]{{0}}, u32[]) {begin}(%p), {calls}=%elsewhere",
            work("beside", 10),
            "  %u = ((u8[40]{0}), u8[10]{0}, u32[]) async-update(%a)",
            f"  %d = u8[10]{{0}} {end}(%u)",
        ]
        found = run(*lines, more=other)
        assert found.collectives == {("reduce-scatter", ("fsdp",)): (1, 30, 30, 20)}
        assert exposed(found) == 20


def test_a_gather_that_the_sparse_cores_do_is_in_flight():
    """Its computation begins another one, and the thread is named behind the bracket."""
    sparse = f"""\
%gathering (x: u8[10]) -> u8[40] {{
  %x = u8[10]{{0}} parameter(0)
  ROOT %g = u8[40]{{0}} all-gather(%x), channel_id=4, {RING}, dimensions={{0}}
}}, execution_thread="sparsecore"

%around (y: u8[10]) -> u8[40] {{
  %y = u8[10]{{0}} parameter(0)
  %inner = ((u8[10]{{0}}), u8[40]{{0}}, u32[]) call-start(%y), async_execution_thread="sparsecore", to_apply=%gathering
  ROOT %end = u8[40]{{0}} call-done(%inner)
}}, execution_thread="sparsecore"
"""
    lines = [
        '  %a = ((u8[10]{0}), u8[40]{0}, s32[]) call-start(%p), async_execution_thread="sparsecore", to_apply=%around',
        work("beside", 12),
        "  %d = u8[40]{0} call-done(%a)",
    ]
    found = run(*lines, more=sparse)
    assert exposed(found) == 30 - 12
    assert found.collectives == {("all-gather", ("fsdp",)): (1, 30, 30, 18)}


def test_permutes_and_rows_sent_to_experts():
    lines = [
        "  %s = (u8[9]{0}, u8[9]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}",
        "  %e = u8[9]{0} collective-permute-done(%s)",
        f"  %r = u8[64]{{0}} ragged-all-to-all(%p, %e, %e, %e, %e, %e), {RING}",
    ]
    found = run(*lines, directions=2.0)
    assert found.collectives[("collective-permute", ("fsdp",))] == (1, 9, 9, 9)
    # Of the 8 bytes that stand here 6 leave; on a ring of four they travel one link on average.
    assert found.collectives[("ragged-all-to-all", ("fsdp",))] == (1, 6, 4, 4)


def test_all_devices_and_devices_that_are_not_known():
    lines = ["  %a = u8[80]{0} all-reduce(%p), replica_groups={}, to_apply=%add"]
    assert run(*lines).collectives[("all-reduce", ("slice", "fsdp"))].size == 2 * 7 / 8 * 80
    lines = ["  %a = u8[80]{0} all-reduce(%p), replica_groups={{0,99}}, to_apply=%add"]
    assert run(*lines).collectives[("all-reduce", ("?",))].size == 80
