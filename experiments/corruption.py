"""Random damage to the newer of two checkpoints: is it noticed, and does the run go on from the older one?

    python experiments/corruption.py --trials 600

About 5 minutes on 2 cores. Each trial damages one random file of the newer checkpoint (a flipped bit, a cut at a random
length, or deletion), restores, and mends the file. Expected: not one trial in which anything comes back but what was
saved, and not one in which nothing can be restored.
What came out here: experiments/results/corruption.md, which this script writes.
"""

import argparse
import logging
import random
import re
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hypersteer_jax.config import HypernetConfig, LMConfig, RunConfig, SteeringConfig
from hypersteer_jax.models.lm import LM
from hypersteer_jax.sharding import make_mesh, shard_weights
from hypersteer_jax.training.checkpoint import (
    PACKAGES,
    CheckpointError,
    Checkpoints,
    Restored,
    open_checkpoints,
    restore,
    save,
    wait,
)
from hypersteer_jax.training.train import init_state

DEVICES = 4
SHAPE = LMConfig("gemma2", 64, layers=2, width=32, heads=4, kv_heads=2, head_dim=16, mlp_width=48, sandwich_norms=True)
CONFIG = RunConfig(hypernet=HypernetConfig(blocks=2), steering=SteeringConfig(layers=(1,)))
OLDER, NEWER = 100, 200  # steps
NOTICED, HARMLESS, WRONG = "named and stepped back", "harmless: restored bit for bit", "wrong"
FILES = {
    "_CHECKPOINT_METADATA": "the record, and Orbax's own: handlers, times",
    "commit_success.txt": "marker of the commit; read in buckets only, on a disk the name of the folder is the marker",
    "state/commit_success.txt": "the same of the state",
    "state/_METADATA": "names and kinds of the arrays; each name stands there twice, and one of the two is not read",
    "state/_sharding": "how the arrays were split; not read, because the new mesh says how they are to be split",
    "state/array_metadatas/process_0": "how the arrays were split into pieces; not all of it is needed",
    "state/manifest.ocdbt": "root of the index of all pieces",
    "state/d/*": "that index",
    "state/ocdbt.process_0/manifest.ocdbt": "root of the index of one process, not read after the commit",
    "state/ocdbt.process_0/d/*": "the arrays",
}


class Trial(NamedTuple):
    """One damage and what came of it."""

    damage: str
    file: str  # a key of FILES
    outcome: str
    names_array: bool
    message: str


def random_states(mesh: Mesh) -> tuple[Any, dict[int, Any]]:
    """Shapes of a small train state, and by step two of them, in which every number is another."""
    abstract = jax.eval_shape(lambda: init_state(CONFIG, LM(SHAPE, nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return np.asarray(rng.normal(size=leaf.shape) if leaf.shape else rng.integers(1, 99), leaf.dtype)

    return abstract, {step: shard_weights(jax.tree.map(draw, abstract), mesh) for step in (OLDER, NEWER)}


def damaged(data: bytes, rng: random.Random) -> tuple[str, bytes | None]:
    """A random damage, and what it makes of the file; None: the file is gone."""
    damage = rng.choice(["flipped bit", "cut", "deleted"])
    if damage == "deleted":
        return damage, None
    at = rng.randrange(len(data))
    if damage == "cut":
        return damage, data[:at]
    return damage, data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def is_as_saved(restored: Restored, states: dict[int, Any]) -> bool:
    """Whether everything that came back is bit for bit what was saved at that step."""
    pairs = zip(jax.tree.leaves(restored.state), jax.tree.leaves(states[restored.step]), strict=True)
    same = all(np.asarray(ours).tobytes() == np.asarray(theirs).tobytes() for ours, theirs in pairs)
    return same and restored.position == 2 * restored.step


def attempt(checkpoints: Checkpoints, abstract: Any, states: dict[int, Any], mesh: Mesh, rng: random.Random) -> Trial:
    """Damages, restores, mends."""
    newer = Path(checkpoints.directory / str(NEWER))
    path = rng.choice(sorted(path for path in newer.rglob("*") if path.is_file()))
    data = path.read_bytes()
    damage, left = damaged(data, rng)
    file = re.sub("[0-9a-f]{32}", "*", str(path.relative_to(newer)))
    said: list[str] = []
    try:
        if left is None:
            path.unlink()
        else:
            path.write_bytes(left)
        restored = restore(checkpoints, abstract, mesh, said.append)
    except CheckpointError as error:
        return Trial(damage, file, WRONG, False, str(error))
    finally:
        path.write_bytes(data)
    message = "".join(said)
    names = [jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in jax.tree.leaves_with_path(abstract)]
    named = any(f"{name}/" in message or f"{name}:" in message or f"{name}," in message for name in names)
    if not is_as_saved(restored, states):
        outcome = WRONG
    elif restored.step == NEWER and not said:
        outcome = HARMLESS
    else:
        outcome = NOTICED if restored.step == OLDER and str(newer) in message else WRONG
    return Trial(damage, file, outcome, named, message)


def counts(trials: list[Trial], field: str, keys: list[str]) -> str:
    """Markdown: a line for each value of a field, a column for each outcome."""
    lines = [f"| {field} | {NOTICED} | {HARMLESS} | {WRONG} |", "| --- | ---: | ---: | ---: |"]
    for key in keys:
        found = Counter(trial.outcome for trial in trials if getattr(trial, field) == key)
        lines.append(f"| {key} | {found[NOTICED]} | {found[HARMLESS]} | {found[WRONG]} |")
    return "\n".join(lines)


def report(trials: list[Trial], seed: int, arrays: int) -> str:
    """Everything as Markdown."""
    total = Counter(trial.outcome for trial in trials)
    hit = [trial for trial in trials if trial.file == "state/ocdbt.process_0/d/*" and trial.outcome == NOTICED]
    named = sum(trial.names_array for trial in hit)
    harmless = {trial.file for trial in trials if trial.outcome == HARMLESS}
    examples = {trial.file: trial for trial in trials if trial.outcome == NOTICED}
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    lines = [
        "# Damaged checkpoints",
        f"`python experiments/corruption.py --trials {len(trials)} --seed {seed}`; {versions}.",
        f"A train state of {arrays} arrays, split over {DEVICES} devices, "
        f"at steps {OLDER} and {NEWER}; each trial damages one random file of step {NEWER} and restores.",
        f"Of {len(trials)} trials {total[NOTICED]} were noticed: step {NEWER} was named with the reason, and step "
        f"{OLDER} came back bit for bit. {total[HARMLESS]} changed nothing that is read: step {NEWER} came back bit "
        f"for bit. {total[WRONG]} went wrong.",
        counts(trials, "damage", ["flipped bit", "cut", "deleted"]),
        counts(trials, "file", list(FILES)),
        f"Of the {len(hit)} damages to the file of the arrays that were noticed, {named} are reported with the name of "
        "an array. Damages to an index cannot be, for every array is found through it.",
        "What the files are (in bold those in which a damage was harmless):",
        "\n".join(f"- {f'**{file}**' if file in harmless else file}: {text}" for file, text in FILES.items()),
        "One message for each kind of file, without its path:",
        "\n".join(
            f"- {file}, {trial.damage}: {trial.message.partition(f'/{NEWER}: ')[2]}" for file, trial in examples.items()
        ),
    ]
    return "\n\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, default=Path(__file__).parent / "results/corruption.md")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    for name in ("absl", "asyncio"):  # which tell of each damage, too, in many more words
        logging.getLogger(name).setLevel(logging.CRITICAL)
    mesh, rng = make_mesh(fsdp=DEVICES), random.Random(args.seed)
    abstract, states = random_states(mesh)
    with tempfile.TemporaryDirectory() as folder, open_checkpoints(folder) as checkpoints:
        for step, state in states.items():
            save(checkpoints, step, state, 2 * step, config=CONFIG)
        wait(checkpoints)
        trials = [attempt(checkpoints, abstract, states, mesh, rng) for _ in range(args.trials)]
        args.report.write_text(report(trials, args.seed, len(jax.tree.leaves(abstract))).replace(folder, "RUN"))
    for trial in trials:
        if trial.outcome == WRONG:
            print(trial)
    print(counts(trials, "damage", ["flipped bit", "cut", "deleted"]))
    raise SystemExit(any(trial.outcome == WRONG for trial in trials))


if __name__ == "__main__":
    main()
