"""Counts that are known by hand, in programs compiled here and in the forms that only the TPU's compiler prints."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hypersteer_jax.hlo import Collective, read_traffic

TURNS = 7
F32 = 4  # bytes


def compiled_text(body: Callable[[Array], Array], turns: int = TURNS) -> str:
    """A loop of `body` on the part [4, 16] of an array [8, 64] that each device of a mesh of 2 by 4 has."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    spec = P("a", "b")

    def loop(x: Array) -> Array:
        return lax.scan(lambda x, _: (body(x), None), x, None, length=turns)[0]

    mapped = jax.jit(jax.shard_map(loop, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, spec))
    return mapped.lower(x).compile().as_text()


PART = 4 * 16 * F32
CASES = {  # what runs, kind, bytes of the whole array, bytes that a device sends
    "all-reduce": (lambda x: lax.psum(x, "b") / 4, PART, 2 * PART * 3 // 4),
    "all-gather": (lambda x: lax.all_gather(x, "a", tiled=True)[2:6], 2 * PART, PART),
    "reduce-scatter": (
        lambda x: jnp.tile(lax.psum_scatter(x, "b", scatter_dimension=0, tiled=True), (4, 1)),
        PART,
        PART * 3 // 4,
    ),
    "all-to-all": (
        lambda x: lax.all_to_all(x, "b", split_axis=1, concat_axis=1, tiled=True),
        PART,
        PART * 3 // 4,
    ),
    "collective-permute": (lambda x: lax.ppermute(x, "b", [(0, 1), (1, 2), (2, 3), (3, 0)]), PART, PART),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_collective_in_a_loop_counts_as_often_as_it_runs(kind: str) -> None:
    body, size, sent = CASES[kind]
    traffic = read_traffic(compiled_text(body))
    assert traffic.collectives == (Collective(kind, TURNS, TURNS * size, TURNS * sent, 0),)
    assert (traffic.ici, traffic.dcn, traffic.unknown_loops) == (TURNS * sent, 0, 0)


def test_one_collective_of_several_arrays() -> None:
    traffic = read_traffic(compiled_text(lambda x: jnp.add(*lax.psum((x, x[0]), ("a", "b")))))
    (each,) = traffic.collectives
    assert each.bytes == TURNS * (PART + 16 * F32)  # combined or not
    assert each.ici == TURNS * 2 * (PART + 16 * F32) * 7 // 8


@pytest.mark.parametrize(
    ("axes", "ici", "dcn"),
    [
        ("b", 2 * PART * 3 // 4, 0),  # within a slice
        ("a", 0, PART),  # two devices, one in each slice
        (("a", "b"), 2 * PART * 3 // 4, 2 * PART // 4 // 2),  # each of four sends a quarter across
    ],
)
def test_what_crosses_between_slices(axes: str | tuple[str, ...], ici: int, dcn: int) -> None:
    traffic = read_traffic(compiled_text(lambda x: lax.psum(x, axes) / 2), slices=2)
    assert (traffic.ici, traffic.dcn) == (TURNS * ici, TURNS * dcn)


def test_loops_in_loops_multiply() -> None:
    def inner(x: Array) -> Array:
        return lax.fori_loop(0, 3, lambda _, x: lax.psum(x, "b") / 4, x)

    (each,) = read_traffic(compiled_text(inner, turns=5)).collectives
    assert each.times == 15


def test_a_loop_of_unknown_length_counts_once_and_is_reported() -> None:
    def inner(x: Array) -> Array:
        return lax.while_loop(lambda x: jnp.any(x > 0), lambda x: lax.psum(x, "b") - 1, x)

    traffic = read_traffic(compiled_text(inner, turns=1))
    assert traffic.unknown_loops == 1
    assert [each.times for each in traffic.collectives] == [1]


def memory_of(function: Callable[..., Array], *shapes: tuple[int, ...]) -> int:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return read_traffic(jax.jit(function).lower(*arguments).compile().as_text()).memory


def test_memory_of_a_product_is_that_of_three_matrices() -> None:
    assert memory_of(jnp.dot, (64, 256), (256, 128)) == F32 * (64 * 256 + 256 * 128 + 64 * 128)


def test_memory_of_a_scan_reads_slices_of_its_stack() -> None:
    # The stack is read once, a slice a turn; a program that took it whole each turn would read it 24 times.
    def scan(x: Array, stack: Array) -> Array:
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    stack = 24 * 128 * 128 * F32
    assert stack < memory_of(scan, (8, 128), (24, 128, 128)) < 5 * stack


TPU = """HloModule step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%all-reduce-scatter.1 (input: bf16[1024,128]) -> bf16[128,128] {
  %input = bf16[1024,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[1024,128]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %partition-id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %part = bf16[128,128]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %partition-id, %zero), dynamic_slice_sizes={128,128}
}

%body (p: (s32[], bf16[1024,128], bf16[20,64,64])) -> (s32[], bf16[1024,128], bf16[20,64,64]) {
  %p = (s32[]{:T(128)}, bf16[1024,128]{1,0:T(8,128)(2,1)}, /*index=2*/bf16[20,64,64]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[1024,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %stack = bf16[20,64,64]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %start = ((bf16[64,64]{1,0}, bf16[32]{0}), (bf16[256,64]{1,0}, bf16[128]{0})) all-gather-start(%w, %v), channel_id=2, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}
  %done = (bf16[256,64]{1,0}, bf16[128]{0}) all-gather-done(%start)
  %w = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} bitcast(%stack)
  %v = bf16[32]{0:T(256)} bitcast(%stack)
  ROOT %out = (s32[]{:T(128)}, bf16[1024,128]{1,0}, bf16[20,64,64]{2,1,0}) tuple(%next, %x, %stack)
}

%condition (q: (s32[], bf16[1024,128], bf16[20,64,64])) -> pred[] {
  %q = (s32[]{:T(128)}, bf16[1024,128]{1,0:T(8,128)(2,1)}, bf16[20,64,64]{2,1,0}) parameter(0)
  %bound = s32[]{:T(128)} constant(20)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %bound), direction=LT
}

ENTRY %main (x: bf16[1024,128], s: bf16[20,64,64]) -> bf16[128,128] {
  %x.1 = bf16[1024,128]{1,0:T(8,128)(2,1)} parameter(0)
  %s.1 = bf16[20,64,64]{2,1,0:T(8,128)(2,1)} parameter(1)
  %from = s32[]{:T(128)} constant(2)
  %copied = s32[]{:T(128)} copy(%from)
  %init = (s32[]{:T(128)}, bf16[1024,128]{1,0}, bf16[20,64,64]{2,1,0}) tuple(%copied, %x.1, %s.1)
  %loop = (s32[]{:T(128)}, bf16[1024,128]{1,0}, bf16[20,64,64]{2,1,0}) while(%init), condition=%condition, body=%body
  %y = bf16[1024,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
  %moved = (bf16[1024,128]{1,0}, bf16[1024,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%y), channel_id=3, source_target_pairs={{0,1},{1,2},{2,3},{3,4}}
  %there = bf16[1024,128]{1,0:T(8,128)(2,1)} collective-permute-done(%moved)
  ROOT %fusion = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} fusion(%there), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501  # lines as the compiler prints them


def test_forms_that_only_the_tpu_compiler_prints() -> None:
    found = {each.kind: each for each in read_traffic(TPU, slices=2).collectives}
    turns, gathered, array = 18, 4 * (64 * 64 + 32) * 2, 1024 * 128 * 2  # the loop starts at 2
    assert found == {
        "all-gather": Collective("all-gather", turns, turns * gathered, turns * gathered * 3 // 4, 0),
        # Not an all-reduce: the fusion's result is a part of the sum. Four devices of each slice send their quarters.
        "reduce-scatter": Collective("reduce-scatter", 1, array, array * 3 // 4, array // 8),
        "collective-permute": Collective("collective-permute", 1, array, 0, array),  # 3 to 4 crosses
    }


def test_arrays_outside_main_memory_are_no_traffic() -> None:
    traffic = read_traffic(TPU)
    turns, array, counter = 18, 1024 * 128 * 2, 8 + 18 * (3 * 4 + 4 + 4 + 1)
    # Of the gathered arrays one is on the chip, S(1), and one is read; then the permuted and the summed one are read.
    assert traffic.memory == turns * 32 * 2 + 2 * array + counter


CHAIN = """HloModule step, is_scheduled=true, num_partitions=8

%begin (a: bf16[64,128]) -> (bf16[64,128], bf16[512,128], u32[]) {
  %a = bf16[64,128]{1,0} parameter(0)
  %all-gather.1 = bf16[512,128]{1,0} all-gather(%a), channel_id=96, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %started = (bf16[64,128]{1,0}, bf16[512,128]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%meanwhile (b: bf16[64,128], c: bf16[512,128], d: u32[], e: bf16[16,128]) -> (bf16[16,128], bf16[64,128], bf16[512,128], bf16[512,128], u32[]) {
  %e = bf16[16,128]{1,0} parameter(3)
  %twice = bf16[16,128]{1,0} add(%e, %e)
  %b = bf16[64,128]{1,0} parameter(0)
  %c = bf16[512,128]{1,0} parameter(1)
  %all-gather.2 = bf16[512,128]{1,0} all-gather(%b), channel_id=96, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="0"}
  %d = u32[]{:S(2)} parameter(2)
  ROOT %all = (bf16[16,128]{1,0}, bf16[64,128]{1,0}, bf16[512,128]{1,0}, bf16[512,128]{1,0}, u32[]{:S(2)}) tuple(%twice, %b, %c, %all-gather.2, %d)
}

%end (f: bf16[64,128], g: bf16[512,128], h: u32[]) -> bf16[512,128] {
  %f = bf16[64,128]{1,0} parameter(0)
  %g = bf16[512,128]{1,0} parameter(1)
  %all-gather.3 = bf16[512,128]{1,0} all-gather(%f), channel_id=96, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="0"}
  %h = u32[]{:S(2)} parameter(2)
  ROOT %ended = bf16[512,128]{1,0} custom-call(%f, %g, %all-gather.3, %h), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (w: bf16[64,128], x: bf16[16,128]) -> bf16[512,128] {
  %w = bf16[64,128]{1,0} parameter(0)
  %x = bf16[16,128]{1,0} parameter(1)
  %start = (bf16[64,128]{1,0}, bf16[512,128]{1,0}, u32[]{:S(2)}) fusion(%w), kind=kCustom, calls=%begin
  %w.1 = bf16[64,128]{1,0} get-tuple-element(%start), index=0
  %y.1 = bf16[512,128]{1,0} get-tuple-element(%start), index=1
  %s.1 = u32[]{:S(2)} get-tuple-element(%start), index=2
  %fusion = (bf16[16,128]{1,0}, bf16[64,128]{1,0}, bf16[512,128]{1,0}, bf16[512,128]{1,0}, u32[]{:S(2)}) fusion(%w.1, %y.1, %s.1, %x), kind=kCustom, calls=%meanwhile
  %w.2 = bf16[64,128]{1,0} get-tuple-element(%fusion), index=1
  %y.2 = bf16[512,128]{1,0} get-tuple-element(%fusion), index=3
  %s.2 = u32[]{:S(2)} get-tuple-element(%fusion), index=4
  ROOT %done = bf16[512,128]{1,0} fusion(%w.2, %y.2, %s.2), kind=kCustom, calls=%end
}
"""  # noqa: E501  # lines as the compiler prints them


def test_a_collective_spread_over_fusions_is_one() -> None:
    traffic = read_traffic(CHAIN)
    part, whole, other = 64 * 128 * 2, 512 * 128 * 2, 16 * 128 * 2
    assert traffic.collectives == (Collective("all-gather", 1, whole, whole * 7 // 8, 0),)
    # Read and written by the fusion that begins it, with its part handed on; what goes on meanwhile is its own.
    assert traffic.memory == part + (part + whole) + 2 * other


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['x'=2,'y'=4] {'x'}", 2),
        ("mesh['x'=2,'y'=4] {'x','y'}", 8),
        ("mesh['x'=8] {'x':(2)4}", 4),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", 4),
        ("{}", 8),
    ],
)
def test_sizes_of_groups(groups: str, devices: int) -> None:
    text = TPU.replace("replica_groups=mesh['x'=2,'y'=4] {'y'}", f"replica_groups={groups}")
    found = {each.kind: each for each in read_traffic(text).collectives}
    assert found["all-gather"].bytes == 18 * devices * (64 * 64 + 32) * 2


def test_devices_of_a_mesh_in_another_order() -> None:
    # Numbers 0 to 7 dealt into 2 by 4 and turned: the first of y are 0 and 4, in two slices; the first of x are 0 to 3.
    for axis, crosses in (("x", False), ("y", True)):
        groups = f"replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {{'{axis}'}}"
        text = TPU.replace("replica_groups=mesh['x'=2,'y'=4] {'y'}", groups)
        (gather,) = (each for each in read_traffic(text, slices=2).collectives if each.kind == "all-gather")
        assert (gather.dcn > 0) is crosses


def test_groups_in_an_unknown_form_are_no_guess() -> None:
    with pytest.raises(ValueError, match="form that is not known"):
        read_traffic(TPU.replace("replica_groups=mesh['x'=2,'y'=4] {'y'}", "replica_groups=cube[8]"))


def test_largest_arrays_are_named_with_their_operation() -> None:
    ((name, size), *_) = read_traffic(compiled_text(lambda x: lax.all_gather(x, ("a", "b"), tiled=True)[:4])).largest
    assert name.startswith("f32[32,16] all-gather")
    assert size == 32 * 16 * F32
