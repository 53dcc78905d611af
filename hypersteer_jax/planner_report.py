"""`hypersteer plan`: a plan in words, as a table and as JSON."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hypersteer_jax.config import RunConfig, check, to_dict
from hypersteer_jax.planner import (
    Bound,
    Compiled,
    DecodePlan,
    Plan,
    TooLarge,
    find_change,
    fits,
    larger_slice,
    lm_shape,
    make_plan,
    plan_decode,
    run_shape,
)
from hypersteer_jax.sharding import AXES
from hypersteer_jax.topologies import Topology, find_topology


def run_plan(
    config: RunConfig,
    name: str,
    lengths: tuple[int, int, int, int] | None,
    price: float | None,
    decode: bool,
    file: Path | None,
    console: Console | None = None,
) -> bool:
    """`hypersteer plan`: compiles, prints what is known, and says whether the run fits.

    Args:
        config: the run.
        name: of the topology.
        lengths: T, C, R and P in tokens, see `run_shape`.
        price: of a chip for an hour.
        decode: whether to compile a step of generation, too.
        file: where to write everything as JSON.
        console: where to print.

    Raises:
        ConfigError: before anything is compiled.
    """
    console = console or Console()
    topology, lm = find_topology(name, config.mesh.slices), lm_shape(config.lm)
    check(config, lm)
    shape = run_shape(config, lengths, console.print)
    console.print(f"compiling the train step for {topology.name}: a minute or several")
    plan = make_plan(config, lm, topology, shape)
    found = to_json(plan, price)
    console.print(plan_table(plan, price))
    if not plan.fits:
        console.print("looking for a change that fits: each is compiled")
        change = find_change(plan, lm)
        larger = None if change else larger_slice(plan, lm)
        found["use"] = options(config, change.config) if change else larger and larger.name
        console.print(verdict(plan, change, larger))
    else:
        console.print(verdict(plan, None, None))
    if decode:
        generation = plan_decode(config, lm, topology, shape)
        found["decode"] = decode_json(generation, topology)
        console.print(decode_line(generation, topology))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
    return plan.fits


def verdict(plan: Plan, change: Plan | None, larger: Topology | None) -> str:
    """Whether the run fits, and what to do if not, in a sentence."""
    share = f"{_gib(plan.result.needed)} of {_gib(plan.topology.kind.memory)} GiB a {_device(plan.topology)}"
    if plan.fits:
        return f"[bold green]fits[/]: {share}"
    if change is not None:
        advice = f"use {options(plan.config, change.config)} ({_gib(change.result.needed)} GiB)"
    elif larger is not None:
        advice = f"no smaller batch, other mesh or remat was found that does; use {larger.name} (by estimate)"
    else:
        advice = "no smaller batch, other mesh or remat was found that does; use chips with more memory"
    return f"[bold red]does not fit[/]: {share}; {advice}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def _size(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def _device(topology: Topology) -> str:
    return "chip" if topology.kind.devices == 1 else "core, two to a chip"


def plan_table(plan: Plan, price: float | None) -> Table:
    """All that is known of a plan, for a terminal."""
    config, topology, result = plan.config, plan.topology, plan.result
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    slices = f" x {topology.slices} slices" if topology.slices > 1 else ""
    mesh = " x ".join(f"{name} {size}" for name, size in zip(AXES, plan.sizes, strict=True))
    table.add_row("slice", f"{topology.name}{slices}: chips {topology.chips}, hosts {topology.hosts}; mesh {mesh}")
    table.add_row(
        "batch",
        f"{config.train.batch} rows, {plan.shape.rows} in a sequence of {plan.shape.tokens} tokens, "
        f"{plan.shape.response} of them scored; {plan.shape.concept} of a steering prompt",
    )
    table.add_row("predicted", _named(plan.prediction._asdict(), plan.prediction.total))
    table.add_row("arguments", _named(dict(plan.largest)))
    flops = {name: value / plan.flops.total for name, value in plan.flops._asdict().items()}
    shares = ", ".join(f"{name} {share:.1%}" for name, share in flops.items() if share)
    table.add_row("FLOPs", f"{plan.flops.total / 1e12:.3g} T a step over all devices: {shares}")
    if isinstance(result, TooLarge) or plan.bound is None:
        return table
    bound, traffic = plan.bound, result.traffic
    parts = {"arguments": result.arguments, "temporaries": result.temporaries}
    table.add_row("memory", f"{_named(parts, result.needed)}; at most {_size(result.peak)} of it at one time")
    table.add_row("largest made", "\n".join(f"{_size(size)} {name}" for name, size in traffic.largest))
    sent = [f"{each.kind} {each.times} times, {(each.ici + each.dcn) / 1e9:.2f} GB" for each in traffic.collectives]
    table.add_row("sent", "; ".join(sent) or "nothing")
    waits = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in bound._asdict().items())
    table.add_row("a step, ms", f"at least {1e3 * bound.seconds:.1f}: {bound.binds} binds ({waits})")
    hours = config.train.steps * bound.seconds * topology.chips / 3600
    cost = "" if price is None else f", {price * hours:,.2f} at {price:g} an hour"
    table.add_row(
        "the run",
        f"at most {config.train.batch / bound.seconds:,.0f} examples/s; {config.train.steps} steps take at least "
        f"{hours:,.2f} chip-hours{cost}; evaluation, checkpoints and start not counted",
    )
    table.add_row(
        "assumed",
        "compiled, not timed: every device at the makers' peak for bfloat16, all links of a chip busy, and only the "
        "longest of arithmetic, memory and links waited for",
    )
    if traffic.unknown_loops:
        table.add_row("note", f"{traffic.unknown_loops} loops have no known length and were counted once")
    return table


def _named(sizes: dict[str, int], total: int | None = None) -> str:
    """Sizes by name, on one device, and their sum if it is given."""
    listed = ", ".join(f"{name} {_size(size)}" for name, size in sizes.items())
    return listed if total is None else f"{_size(total)}: {listed}"


def decode_line(plan: DecodePlan, topology: Topology) -> str:
    """What is known of a step of generation."""
    mesh = " x ".join(f"{name} {size}" for name, size in zip(AXES, plan.sizes, strict=True))
    share = f"{_gib(plan.result.needed)} of {_gib(topology.kind.memory)} GiB"
    text = f"generation, {plan.rows} rows of {plan.slots} tokens on mesh {mesh}: "
    if plan.bound is None:
        return f"{text}does not fit: {share}"
    return (
        f"{text}{share}; at least {1e3 * plan.bound.seconds:.2f} ms a token ({plan.bound.binds} binds), "
        f"at most {plan.rows / plan.bound.seconds:,.0f} tokens/s"
    )


def options(before: RunConfig, after: RunConfig) -> str:
    """What to write behind `hypersteer train RECIPE` for the settings of mesh and training that differ."""
    words = []
    for group in ("mesh", "train"):
        ours, theirs = (dataclasses.asdict(getattr(config, group)) for config in (after, before))
        for name in ours:
            if ours[name] != theirs[name]:
                words.append(f"--{group}.{name.replace('_', '-')}")
                words += [] if ours[name] is True else [str(ours[name])]
    return " ".join(words)


def to_json(plan: Plan, price: float | None = None) -> dict[str, Any]:
    """Everything that is known about a plan; bytes, FLOPs of all devices, seconds, and hours of a chip.

    Args:
        plan: from `make_plan`.
        price: of one chip for one hour, in whatever money it is given.
    """
    config, topology, result = plan.config, plan.topology, plan.result
    found: dict[str, Any] = {
        "topology": {
            "name": topology.name,
            "slices": topology.slices,
            "chips": topology.chips,
            "devices": topology.devices,
            "hosts": topology.hosts,
        },
        "config": to_dict(config),
        "shape": plan.shape._asdict(),
        "mesh": dict(zip(AXES, plan.sizes, strict=True)),
        "fits": plan.fits,
        "bytes_of_a_device": topology.kind.memory,
        "bytes_needed": result.needed,
        "bytes_predicted": {**plan.prediction._asdict(), "total": plan.prediction.total},
        "largest_arguments": dict(plan.largest),
        "flops": {**plan.flops._asdict(), "minimal": plan.flops.minimal, "total": plan.flops.total},
        **_result_json(result, plan.bound),
    }
    if plan.bound is not None:
        hours = config.train.steps * plan.bound.seconds * topology.chips / 3600
        found |= {"examples_per_second": config.train.batch / plan.bound.seconds, "chip_hours": hours}
        found |= {} if price is None else {"price": price * hours}
    return found


def decode_json(plan: DecodePlan, topology: Topology) -> dict[str, Any]:
    """Everything that is known about a step of generation."""
    found: dict[str, Any] = {
        "rows": plan.rows,
        "slots": plan.slots,
        "mesh": dict(zip(AXES, plan.sizes, strict=True)),
        "fits": fits(plan.result, topology),
        "bytes_needed": plan.result.needed,
        **_result_json(plan.result, plan.bound),
    }
    if plan.bound is not None:
        found["tokens_per_second"] = plan.rows / plan.bound.seconds
    return found


def _result_json(result: Compiled | TooLarge, bound: Bound | None) -> dict[str, Any]:
    if isinstance(result, TooLarge) or bound is None:
        return {"compiled": None}
    compiled = result._asdict()
    traffic = compiled.pop("traffic")
    return {
        "compiled": compiled,
        "collectives": {each.kind: each._asdict() for each in traffic.collectives},
        "memory_traffic": traffic.memory,
        "largest_made": dict(traffic.largest),
        "unknown_loops": traffic.unknown_loops,
        "seconds_at_least": {**bound._asdict(), "step": bound.seconds, "binds": bound.binds},
    }
