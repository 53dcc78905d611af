"""What a compiled program moves, read from its HLO text: collectives and memory traffic, loops as often as they run.

XLA's own `cost_analysis` takes the body of a loop once, and the blocks of our networks are loops. All numbers are one
device's: an SPMD program is written from one device's view.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](\{[^}]*\})?")
HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{")
LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.+)")
NAME = re.compile(r"%([\w.\-]+)")
SILENT = (  # these name arrays that are there already, or move nothing through the device's main memory
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all"),
    *("partition-id", "replica-id", "iota", "broadcast", "opt-barrier"),
)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str  # of the result, as printed: "bf16[8,128]{1,0}", or several in parentheses
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes, and what a constant or a parameter has in its parentheses


Computation = dict[str, Instruction]  # by name, in order; the root is the last to run


class Program(NamedTuple):
    """A parsed module."""

    computations: dict[str, Computation]
    roots: dict[str, str]  # name of the root of each computation
    entry: str
    devices: int


class Step(NamedTuple):
    """An instruction where it runs."""

    instruction: Instruction
    where: str  # its computation
    times: int  # how often a run of the program comes by
    fused: bool  # inside a fusion: its results never reach memory


class Collective(NamedTuple):
    """All collectives of one kind in one run of the program."""

    kind: str
    times: int  # that one runs
    bytes: int  # of the whole arrays: gathered, or summed over, by one group of devices
    ici: int  # bytes that a device has to send within its slice
    dcn: int  # bytes that a device has to send to other slices


class Traffic(NamedTuple):
    """What one run of a program moves on each device."""

    collectives: tuple[Collective, ...]  # by bytes sent, most first
    memory: int  # bytes read from and written to the device's main memory
    largest: tuple[tuple[str, int], ...]  # largest arrays that the program makes, and their bytes
    unknown_loops: int  # loops whose number of turns the text does not tell; their bodies are counted once

    @property
    def ici(self) -> int:
        """Bytes that a device sends within its slice."""
        return sum(each.ici for each in self.collectives)

    @property
    def dcn(self) -> int:
        """Bytes that a device sends to other slices."""
        return sum(each.dcn for each in self.collectives)


def read_traffic(text: str, slices: int = 1, largest: int = 5) -> Traffic:
    """Collectives, memory traffic and largest arrays of a program, from `compiled.as_text()`.

    A device has to send at least, of an array of A bytes over n devices: (n-1)/n A to gather or to scatter it, twice
    that to sum it. Over several slices the same holds between them for the part that one device stands for.

    Args:
        text: HLO of the optimised module.
        slices: into how many equal runs of device numbers the devices fall.
        largest: how many of the largest arrays to name.
    """
    program = parse(text)
    steps = list(_steps(program))
    found: dict[str, Collective] = {}
    for step in steps:
        opcode = step.instruction.opcode.removesuffix("-start")
        if opcode in COLLECTIVES and not _goes_on(program, step.where, step.instruction):
            each = _collective(program, step, opcode, slices)
            before = found.get(each.kind, Collective(each.kind, 0, 0, 0, 0))
            found[each.kind] = Collective(each.kind, *(a + b for a, b in zip(before[1:], each[1:], strict=True)))
    ordered = sorted(found.values(), key=lambda each: (each.ici + each.dcn, each.bytes), reverse=True)
    unknown = sum(step.instruction.opcode == "while" and _turns(program, step) is None for step in steps)
    memory = sum(step.times * _memory(program, step) for step in steps if not step.fused)
    return Traffic(tuple(ordered), memory, _largest(steps, largest), unknown)


def parse(text: str) -> Program:
    """Computations and instructions of a module, as printed with names of operands (jax's form)."""
    computations: dict[str, Computation] = {}
    roots: dict[str, str] = {}
    entry, here = "", ""
    devices = math.prod(
        int(count) for count in re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])
    )
    for line in text.splitlines():
        if match := LINE.match(line):
            root, name, rest = match.groups()
            computations[here][name] = _instruction(name, rest)
            if root:
                roots[here] = name
        elif match := HEADER.match(line):
            here = match[2]
            computations[here] = {}
            entry = here if match[1] else entry
    return Program(computations, roots, entry, devices)


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opcode, _, _ = text[end:].partition("(")
    first = end + len(opcode)
    last = _closing(text, first)
    inside = text[first + 1 : last]
    operands = tuple(NAME.findall(inside))
    return Instruction(name, text[:end], opcode.strip(), operands, text[last + 1 :] if operands else text[first:])


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` is closed."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced parentheses in HLO: {text[:100]!r}")


def _steps(program: Program) -> Iterator[Step]:
    """Every instruction that runs, inside what."""

    def inside(where: str, times: int, fused: bool) -> Iterator[Step]:
        for instruction in program.computations[where].values():
            step = Step(instruction, where, times, fused)
            yield step
            turns = _turns(program, step) or 1 if instruction.opcode == "while" else 1
            for called in _called(instruction):
                yield from inside(called, times * turns, fused or instruction.opcode == "fusion")

    yield from inside(program.entry, 1, False)


def _called(instruction: Instruction) -> list[str]:
    """Computations that an instruction runs; of a conditional all branches, since the text cannot tell which."""
    keys = {
        "while": "condition|body",
        "call": "to_apply",
        "conditional": "branch_computations|true_computation|false_computation",
        "fusion": "calls",
        "async-start": "calls",
    }.get(instruction.opcode)
    if keys is None:
        return []
    values = re.findall(rf"\b(?:{keys})=(\{{[^}}]*\}}|%[\w.\-]+)", instruction.rest)
    return [name for value in values for name in NAME.findall(value)]


def _turns(program: Program, loop: Step) -> int | None:
    """How often the body of a loop runs: what XLA says, or the counter's start, step and bound."""
    instruction = loop.instruction
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest):
        return int(known[1])
    condition, body = _called(instruction)
    test = program.computations[condition][program.roots[condition]]
    if test.opcode != "compare" or "direction=LT" not in test.rest:
        return None
    counter = program.computations[condition][test.operands[0]]
    index = re.search(r"index=(\d+)", counter.rest) if counter.opcode == "get-tuple-element" else None
    if index is None:
        return None
    at = int(index[1])
    bound = _constant(program, condition, test.operands[1])
    start = _constant(program, loop.where, program.computations[loop.where][instruction.operands[0]].operands[at])
    last = program.computations[body][program.roots[body]]
    following = program.computations[body][last.operands[at]] if last.opcode == "tuple" else last
    steps = [_constant(program, body, name) for name in following.operands] if following.opcode == "add" else []
    step = next((value for value in steps if value is not None), None)
    return None if bound is None or start is None or step is None else max(0, -(-(bound - start) // step))


def _constant(program: Program, where: str, name: str) -> int | None:
    """The whole number behind a name, through copies; None if it is computed."""
    instruction = program.computations[where][name]
    while instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        instruction = program.computations[where][instruction.operands[0]]
    value = re.match(r"\((-?\d+)\)", instruction.rest) if instruction.opcode == "constant" else None
    return int(value[1]) if value else None


def _collective(program: Program, step: Step, opcode: str, slices: int) -> Collective:
    """One collective, as often as it runs."""
    instruction, times = step.instruction, step.times
    computation = program.computations[step.where]
    size = sum(_bytes(computation[name].shape) for name in instruction.operands)
    root = computation[program.roots[step.where]]
    if opcode == "all-reduce" and step.fused and _bytes(root.shape) < size:
        opcode = "reduce-scatter"  # the TPU's form: a fusion that sums and keeps the device's own part
    group = _group(instruction.rest, program.devices, slices)
    devices = len(group)
    across = len({_slice(device, program.devices, slices) for device in group})
    near = devices // across  # of the group, in one slice
    if opcode == "all-gather":
        size *= devices
    if opcode in ("collective-permute", "collective-broadcast"):
        ici, dcn = (size, 0) if across == 1 else (0, size)
    elif opcode == "all-to-all":
        ici, dcn = size * (near - 1) // devices, size * (devices - near) // devices
    else:
        ways = 2 if opcode == "all-reduce" else 1
        ici, dcn = ways * size * (near - 1) // near, ways * size * (across - 1) // (near * across)
    return Collective(opcode, times, times * size, times * ici, times * dcn)


def _goes_on(program: Program, where: str, instruction: Instruction) -> bool:
    """Whether a collective is one that an earlier fusion has begun.

    The TPU compiler splits a collective into a chain of fusions that compute something else meanwhile, and it is named
    in each of them.
    """
    begins = "AsyncCollectiveStart" in program.computations[where][program.roots[where]].rest
    return "chain_id=" in instruction.rest and not begins


def _slice(device: int, devices: int, slices: int) -> int:
    return device * slices // devices


def _group(rest: str, devices: int, slices: int) -> list[int]:
    """Numbers of the devices of one group, which stands for all; of pairs, one that crosses slices if any does.

    Printed as pairs, as lists, as a shape that device numbers are dealt into, or as axes of a mesh.

    Raises:
        ValueError: in another form; a guess would make the count wrong unnoticed.
    """
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest):
        each = [[int(device) for device in pair] for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
        return max(each, key=lambda pair: len({_slice(device, devices, slices) for device in pair}), default=[0])
    if "replica_groups={}" in rest:
        return list(range(devices))
    if lists := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return _numbers(lists[1])
    if dealt := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return _dealt(dealt[2], dealt[3]).reshape(_numbers(dealt[1]))[0].tolist()
    mesh = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
    if found := re.search(mesh, rest):
        order = _dealt(found[2], found[3]) if found[2] else np.arange(devices)
        return _mesh_group(found[1], order, found[4])
    raise ValueError(f"groups of a collective are in a form that is not known: {rest[:200]!r}")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _dealt(shape: str, order: str | None) -> Int[np.ndarray, "..."]:
    """Device numbers in a shape, its axes in another order if one is given: "[2,4]T(1,0)"."""
    numbers = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return numbers if order is None else numbers.transpose(_numbers(order))


AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def _mesh_group(mesh: str, order: Int[np.ndarray, "..."], axes: str) -> list[int]:
    """Devices of a mesh that differ along some axes only, or along parts of an axis: 'a':(2)4 is 4 behind 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    along = {name: (int(before or 1), int(size or 0)) for name, before, size in AXIS.findall(axes)}
    shape: list[int] = []
    chosen: list[int] = []
    for name, size in sizes.items():
        before, part = along.get(name, (1, 1))
        part = part or size
        chosen += [len(shape) + 1] if name in along else []
        shape += [before, part, size // (before * part)]
    numbers = np.moveaxis(order.reshape(shape), chosen, range(len(chosen)))
    return numbers.reshape(math.prod(numbers.shape[: len(chosen)]), -1)[:, 0].tolist()


def _arrays(shape: str) -> list[tuple[int, bool]]:
    """Bytes of each array of a shape, and whether it lies in the device's main memory (memory space 0)."""
    found = []
    for dtype, bits, lengths, layout in ARRAY.findall(shape):
        count = math.prod(int(length) for length in lengths.split(",")) if lengths else 1
        found.append((count * (8 if dtype == "pred" else int(bits)) // 8, "S(" not in layout))
    return found


def _bytes(shape: str) -> int:
    return sum(size for size, _ in _arrays(shape))


def _main(shape: str) -> int:
    """Bytes of a shape that lie in main memory."""
    return sum(size for size, main in _arrays(shape) if main)


def _memory(program: Program, step: Step) -> int:
    """Bytes that one instruction reads from and writes to main memory."""
    instruction, computation = step.instruction, program.computations[step.where]
    opcode = instruction.opcode
    if opcode in SILENT or opcode.endswith("-done") or _is_view(instruction):
        return 0
    if opcode in ("copy-start", "slice-start"):  # the result names source and target
        (first, first_main), (second, second_main) = _arrays(instruction.shape)[:2]
        return min(first, second) * (first_main + second_main)
    operands = [computation[name].shape for name in instruction.operands]
    if opcode in ("slice", "dynamic-slice", "gather"):
        return min(_bytes(instruction.shape), _main(operands[0])) + _main(instruction.shape)
    if opcode == "dynamic-update-slice":  # in place: the part is read and written
        return _main(operands[1]) + min(_bytes(operands[1]), _main(operands[0]))
    if opcode == "fusion":
        return _fusion_memory(program, instruction, operands)
    return sum(map(_main, operands)) + (0 if opcode.endswith("-start") else _main(instruction.shape))


def _is_view(instruction: Instruction) -> bool:
    """Whether a custom call is but another name; kernels are not, and they are the only others that move anything."""
    return instruction.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' not in instruction.rest


def _fusion_memory(program: Program, fusion: Instruction, operands: list[str]) -> int:
    """Of operands that are only sliced, the slices are read; of results that are updated in place, the update."""
    (name,) = _called(fusion)
    inside = program.computations[name]
    read = sum(
        min(_main(shape), _read(program, name, parameter))
        for parameter, shape in zip(_parameters(inside), operands, strict=True)
    )
    results, arrays = _results(inside, program.roots[name]), _arrays(fusion.shape)
    if len(results) != len(arrays):  # the root is one instruction with several results: none is an update
        return read + _main(fusion.shape)
    for result, (size, main) in zip(results, arrays, strict=True):
        if result.opcode == "parameter" or "AsyncCollectiveDone" in result.rest or _goes_on(program, name, result):
            continue  # handed on
        inplace = result.opcode == "dynamic-update-slice"
        read += main * (_bytes(inside[result.operands[1]].shape) if inplace else size)
    return read


def _parameters(computation: Computation) -> list[str]:
    """Names of a computation's parameters, in order."""
    found = [each for each in computation.values() if each.opcode == "parameter"]
    return [each.name for each in sorted(found, key=lambda each: int(each.rest.strip("()").partition(")")[0]))]


def _read(program: Program, where: str, name: str) -> int:
    """Bytes of one array that the instructions of a fusion read; an array is read whole but for its slices."""
    inside, total = program.computations[where], 0
    for user in inside.values():
        for place in (at for at, operand in enumerate(user.operands) if operand == name):
            if user.opcode in ("slice", "dynamic-slice", "gather"):
                total += _bytes(user.shape)
            elif user.opcode in ("bitcast", "tuple"):
                total += _read(program, where, user.name)
            elif user.opcode == "fusion":
                (deeper,) = _called(user)
                total += _read(program, deeper, _parameters(program.computations[deeper])[place])
            elif "AsyncCollective" in user.rest or _goes_on(program, where, user):
                continue
            elif not (user.opcode == "dynamic-update-slice" and place == 0):
                return _bytes(inside[name].shape)
    return total


def _results(inside: Computation, root: str) -> list[Instruction]:
    """What a computation returns, one or several, behind bitcasts."""

    def behind(name: str) -> Instruction:
        instruction = inside[name]
        return behind(instruction.operands[0]) if instruction.opcode == "bitcast" else instruction

    first = inside[root]
    return [behind(name) for name in first.operands] if first.opcode == "tuple" else [behind(root)]


def _largest(steps: list[Step], count: int) -> tuple[tuple[str, int], ...]:
    """The largest arrays of different shapes that the program makes in main memory, and for which operation."""
    found: dict[str, tuple[str, int]] = {}
    for step in steps:
        instruction = step.instruction
        if step.fused or instruction.opcode in SILENT or instruction.opcode.endswith(("-start", "-done")):
            continue
        label = re.search(r'op_name="([^"]*)"', instruction.rest)
        for array, (size, main) in zip(ARRAY.finditer(instruction.shape), _arrays(instruction.shape), strict=True):
            kind = f"{array[1]}[{array[3]}]"
            if main and kind not in found:
                found[kind] = (f"{kind} {instruction.opcode}{f' ({label[1]})' if label else ''}", size)
    return tuple(sorted(found.values(), key=lambda item: item[1], reverse=True)[:count])
