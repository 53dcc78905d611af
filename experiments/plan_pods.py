"""What 2B and 9B runs need of five TPU slices, and how long a step takes at least: compiled, not timed.

    pip install -e ".[plan]"
    python experiments/plan_pods.py --out runs/plan_pods

Compiles 20 train steps, one over two slices, the recipes on their pods, and 10 decode steps: 40 s each on two idle
cores of an x86 CPU, several minutes on busy ones. One JSON file for each case; those that are there are not compiled
again. The table is in experiments/results/plan.md, which this script writes, with all numbers in plan.json beside it.
Expected: everything fits, 9B with `train.remat`.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hypersteer_jax.topologies import ENVIRONMENT, find_topology

os.environ |= ENVIRONMENT  # before jax starts

from hypersteer_jax.config import RECIPES, HypernetConfig, MeshConfig, RunConfig
from hypersteer_jax.planner import PODS, TYPICAL, lm_shape, make_plan, plan_decode
from hypersteer_jax.planner_report import decode_json, to_json

ROWS = 4  # on each chip: two sequences of two
BLOCKS = {"gemma2-2b": (22, 4), "gemma2-9b": (34, 4)}
SLICES = {  # over 256 chips weights and moments are split 16 ways, so that they are gathered along one axis of the pod
    "v5e-16": MeshConfig(),
    "v6e-8": MeshConfig(),
    "v6e-256": MeshConfig(data=16),
    "v5p-8": MeshConfig(),
    "v4-32": MeshConfig(),
}
GIB = 2**30
EXAMPLES = 8_000 * 72 * 3


def run_config(recipe: str, blocks: int, chips: int, mesh: MeshConfig) -> RunConfig:
    """A recipe with so many blocks and `ROWS` rows a chip. 9B makes its activations again: they would not fit."""
    config = RECIPES[recipe][1]
    train = dataclasses.replace(config.train, batch=ROWS * chips, remat=recipe == "gemma2-9b")
    return dataclasses.replace(config, hypernet=HypernetConfig(blocks=blocks), mesh=mesh, train=train)


def train_case(recipe: str, blocks: int, name: str, mesh: MeshConfig) -> dict[str, Any]:
    """One train step."""
    topology = find_topology(name, mesh.slices)
    config = run_config(recipe, blocks, topology.chips, mesh)
    return to_json(make_plan(config, lm_shape(config.lm), topology, TYPICAL))


def pod_case(recipe: str) -> dict[str, Any]:
    """A recipe as it is, on its pod."""
    name, mesh = PODS[recipe]
    config = dataclasses.replace(RECIPES[recipe][1], mesh=mesh)
    return to_json(make_plan(config, lm_shape(config.lm), find_topology(name), TYPICAL))


def decode_case(recipe: str, name: str) -> dict[str, Any]:
    """One token for each of the rows of a decoding batch."""
    config, topology = RECIPES[recipe][1], find_topology(name)
    return decode_json(plan_decode(config, lm_shape(config.lm), topology, TYPICAL), topology)


def cases() -> dict[str, Callable[[], dict[str, Any]]]:
    """All of them by the name of their file, the most telling first."""
    deep, four = (
        {
            f"train_{recipe}_{depths[place]}_{name}": partial(train_case, recipe, depths[place], name, mesh)
            for recipe, depths in BLOCKS.items()
            for name, mesh in SLICES.items()
        }
        for place in range(2)
    )
    two = {"train_gemma2-2b_22_2xv6e-8": partial(train_case, "gemma2-2b", 22, "v6e-8", MeshConfig(data=2, slices=2))}
    decodes = {f"decode_{recipe}_{name}": partial(decode_case, recipe, name) for name in SLICES for recipe in BLOCKS}
    pods = {f"pod_{recipe}": partial(pod_case, recipe) for recipe in PODS}
    return deep | two | decodes | pods | four


REPORT = """# Plans of pods

    python experiments/plan_pods.py --out runs/plan_pods

Compiled, not timed: there was no TPU; {versions} on a CPU. All numbers are in [plan.json](plan.json).
`hypersteer plan RECIPE --topology NAME` makes the same for any run.

Gemma-2-2B and 9B, steering layer 20, {rows} rows a chip, two in a sequence of {tokens} tokens with {response} scored,
prompts of {context} and steering prompts of {concept} tokens: the longest shapes of AxBench's files
([padding.md](padding.md)), so a run's other batches need less. bfloat16 base LM, float32 hypernetwork and moments,
state donated; 9B with `train.remat`. A line with "pod" is a recipe as it is.

## Memory of a chip, GiB

Arguments, temporaries and peak are the compiler's `memory_analysis()`. Needed is arguments and temporaries together:
what it held against the chip's memory when it refused a program. The peak is lower, for not all of it is in use at one
time. Predicted is `planner.predict_memory`, a formula, whose arguments are the compiler's within {arguments:.2%}.
Needed is {low:.2f} to {high:.2f} times it: the formula knows nothing of arrays kept twice in two layouts, of gathers in
flight and of gaps between arrays, nor of what the compiler makes again or puts in the place of something else.

| run | data x fsdp x tensor | rows | predicted | arguments | temporaries | peak | needed | of | fits |
|---|---|---:|---:|---:|---:|---:|---:|---:|---|
{memory}

## Time of a step, at least

Math: FLOPs of `training/flops.py` at the peak of bfloat16. Memory: what the compiled program reads and writes. Links:
what a chip has to send within its slice (gathered, scattered, ...), over all its links at once; network: to another
slice, at 25 GB/s a host. The longest of them binds, as if the others were hidden behind it. Chip-hours are for 8,000
concepts x 72 rows x 3 epochs. Without `tensor`, weights and their gradients are sent, whatever the batch: the last
column says how many rows a chip needs for the arithmetic to take as long as the links.

| run | FLOPs, T | gathered, scattered, summed, other, GB | read and written, GB | math, ms \
| memory, ms | links, ms | network, ms | binds | examples/s, at most | chip-hours, at least \
| rows a chip |
|---|---:|---|---:|---:|---:|---:|---:|---|---:|---:|---:|
{times}

## Generation: one more token for each row

64 rows for each group of chips that holds the weights once, 192 slots of the cache.

| run | data x fsdp x tensor | rows | needed, GiB | of | ms a token, at least | binds | tokens/s, at most |
|---|---|---:|---:|---:|---:|---|---:|
{decodes}
"""


def report(found: dict[str, dict[str, Any]], missing: list[str]) -> str:
    """Markdown of all cases that were compiled."""
    trains = {name: case for name, case in found.items() if "flops" in case}
    whole = [case for case in trains.values() if case["compiled"]]
    ratios = [case["bytes_needed"] / case["bytes_predicted"]["total"] for case in whole]
    text = REPORT.format(
        arguments=max(map(argument_error, whole)),
        low=min(ratios),
        high=max(ratios),
        versions=", ".join(f"{package} {version(package)}" for package in ("jax", "libtpu", "flax")),
        **TYPICAL._asdict() | {"rows": ROWS},
        memory="\n".join(memory_row(name, case) for name, case in trains.items()),
        times="\n".join(time_row(name, case) for name, case in trains.items() if case["compiled"]),
        decodes="\n".join(decode_row(name, case) for name, case in found.items() if name not in trains),
    )
    return text if not missing else f"{text}\nNot compiled yet: {', '.join(missing)}.\n"


def argument_error(case: dict[str, Any]) -> float:
    """How far the predicted arguments are from the compiled ones, as a share."""
    predicted = sum(case["bytes_predicted"][part] for part in ("lm", "state", "batch"))
    return abs(case["compiled"]["arguments"] / predicted - 1)


def memory_row(name: str, case: dict[str, Any]) -> str:
    """One line of the table of memory."""
    parts = case["compiled"] or {}
    sizes = [case["bytes_predicted"]["total"], *(parts.get(part) for part in ("arguments", "temporaries", "peak"))]
    cells = ["–" if size is None else f"{size / GIB:.2f}" for size in (*sizes, case["bytes_needed"])]
    mesh = " x ".join(map(str, case["mesh"].values()))
    rows = case["config"]["train"]["batch"]
    fits = "yes" if case["fits"] else "**no**"
    return f"| {title(name)} | {mesh} | {rows} | {' | '.join(cells)} | {case['bytes_of_a_device'] / GIB:.2f} | {fits} |"


def time_row(name: str, case: dict[str, Any]) -> str:
    """One line of the table of times."""
    sent = {kind: (each["ici"] + each["dcn"]) / 1e9 for kind, each in case["collectives"].items()}
    named = [sent.pop(kind, 0.0) for kind in ("all-gather", "reduce-scatter", "all-reduce")]
    seconds = case["seconds_at_least"]
    times = [f"{1e3 * seconds[wait]:.1f}" for wait in ("math", "memory", "interconnect", "network")]
    rows = case["config"]["train"]["batch"] / case["topology"]["chips"]
    hours = EXAMPLES / case["examples_per_second"] * case["topology"]["chips"] / 3600
    cells = [
        title(name),
        f"{case['flops']['total'] / 1e12:.0f}",
        ", ".join(f"{size:.2f}" for size in (*named, sum(sent.values()))),
        f"{case['memory_traffic'] / 1e9:.0f}",
        *times,
        seconds["binds"],
        f"{case['examples_per_second']:,.0f}",
        f"{hours:.1f}",
        f"{rows * max(seconds['interconnect'], seconds['network']) / seconds['math']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def decode_row(name: str, case: dict[str, Any]) -> str:
    """One line of the table of generation."""
    mesh = " x ".join(map(str, case["mesh"].values()))
    memory = find_topology(name.rpartition("_")[2]).kind.memory
    start = f"| {title(name)} | {mesh} | {case['rows']} | {case['bytes_needed'] / GIB:.2f} | {memory / GIB:.2f} |"
    if not case["compiled"]:
        return f"{start} – | – | – |"
    seconds = case["seconds_at_least"]
    return f"{start} {1e3 * seconds['step']:.2f} | {seconds['binds']} | {case['tokens_per_second']:,.0f} |"


def title(name: str) -> str:
    """A case's name in words."""
    kind, recipe, *rest = name.split("_")
    words = {"train": "", "decode": "", "pod": "pod: "}[kind] + recipe.removeprefix("gemma2-")
    if kind == "pod":
        return f"{words}, {PODS[recipe][0]}"
    return ", ".join([words, *(f"{part} blocks" if part.isdigit() else part for part in rest)])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="part of the names of the cases to compile")
    parser.add_argument("--report", type=Path, default=Path("experiments/results/plan.md"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, compile_case in cases().items():
        path = args.out / f"{name}.json"
        if args.only not in name or path.exists():
            continue
        found = compile_case()
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1) + "\n")
        part.rename(path)  # a case that was interrupted leaves no file that looks whole
        print(name, "fits" if found["fits"] else "does not fit", f"{found['bytes_needed'] / GIB:.1f} GiB", flush=True)
    paths = {name: args.out / f"{name}.json" for name in cases()}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    args.report.write_text(report(found, [name for name in paths if name not in found]))
    args.report.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
