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


if __name__ == "__main__":
    main()
