"""One small run, on any mesh, in this process or as one of several (`python -m tests.processes OUT MESH`)."""

import json
import sys
from pathlib import Path
from typing import Any

import jax

from hypersteer_jax.config import DataConfig, HypernetConfig, MeshConfig, RunConfig, SteeringConfig, TrainConfig
from hypersteer_jax.data.pipeline import evaluation_batches, iterator, make_layout
from hypersteer_jax.data.sources import TrainData
from hypersteer_jax.sharding import join_processes, make_mesh, share_of
from hypersteer_jax.training.train import TrainState, train
from tests.conftest import random_rows
from tests.models.tiny import CONFIGS, random_lm

ROWS = random_rows([4, 5, 6, 7] * 12, [9, 12, 14, 16] * 12, [3, 5, 4, 6] * 12)
DATA = DataConfig(buckets=1)
STEPS = 100


def run(out: Path, axes: dict[str, int], resume: bool = False) -> TrainState:
    """Trains for 100 steps in float32, 16 rows each, saving now and then."""
    config = RunConfig(
        out=out,
        hypernet=HypernetConfig(blocks=2),
        steering=SteeringConfig(layers=(1,)),
        mesh=MeshConfig(**axes),
        data=DATA,
        train=TrainConfig(
            steps=STEPS,
            batch=16,
            learning_rate=1e-3,
            factor_range=(0.5, 1.5),
            compute_dtype="float32",
            eval_every=50,
            eval_share=1.0,
            save_every=40,
        ),
    )
    share, layout = share_of(make_mesh(**axes)), make_layout(ROWS, DATA, seed=0)
    batches = iterator(ROWS, layout, config.train.batch, seed=0, share=share)
    evaluation = {"held-in": evaluation_batches(ROWS, config.train.batch, 2, share)}
    lm = random_lm(CONFIGS["gemma2"])
    return train(config, lm, TrainData(ROWS, layout, batches, evaluation), resume)


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The run's metrics."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    join_processes()
    state = run(Path(sys.argv[1]), json.loads(sys.argv[2]))
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards)
    print(json.dumps({"processes": jax.process_count(), "devices": jax.local_device_count(), "bytes": held}))
