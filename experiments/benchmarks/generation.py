r"""Tokens per second of steered generation, ours against `transformers` with a forward hook, on a CPU or on one GPU.

    OMP_NUM_THREADS=1 taskset -c 0 python experiments/benchmarks/generation.py --clock cpu  # small Gemma-2, float32
    OMP_NUM_THREADS=1 taskset -c 0 python experiments/benchmarks/generation.py --clock cpu --preset tinyworld
    python experiments/benchmarks/generation.py --preset gemma-2-2b --dtype bfloat16 --batch 256  # an 80 GB GPU

Both sides have the same random weights (through `save_lm`) and continue the same random prompts, all of one length, to
the same number of tokens; greedy, and nothing ends a row. A hook adds each row's own vector to the output of the
steered block, as ours does. Prefill is timed, too. Compared with it, in JAX, at the same batch:

    unsteered         the same program, but for the addition
    with the network  the vectors are not given: the hypernetwork writes one for each row
    factor sweep      14 factors of each prompt in the batch, so that it holds a fourteenth of the prompts and of the
                      pairs. Against "with the network", of whose runs a sweep over all prompts would need 14, it is one
                      fourteenth of the sweep's cost to one fourteenth of theirs.

On a CPU all take turns in one process. On a GPU, where two frameworks do not share memory, ours take turns and then
transformers runs alone. Everything is warm; medians are reported. GFLOP are matrix products by formula.

Expected: 3 times transformers on a CPU, 10 times on an H200 at batch 256; 97 % of the unsteered speed. Measured: see
experiments/results/generation.md. Unmeasured: every GPU.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from jaxtyping import Int
from train_step import CLOCKS, SHAPES, Shape
from transformers import Gemma2ForCausalLM, GenerationConfig

from hypersteer_jax.config import RECIPES, LMConfig, RunConfig, SteeringConfig, TrainConfig
from hypersteer_jax.data.pipeline import Bucket
from hypersteer_jax.data.sources import base_shape
from hypersteer_jax.decoding import Concepts, Decoding, GenerationBatch, Vectors, generate
from hypersteer_jax.evaluation.speed import alone, machine, random_lm
from hypersteer_jax.models.weights import save_lm
from hypersteer_jax.training.flops import step_flops
from hypersteer_jax.training.train import init_state

FACTORS = 14  # of the released sweep
CONCEPT = 16  # tokens of a steering prompt
SCALE = 4.0  # of the random vectors: as long as a random residual, roughly


class Work(NamedTuple):
    """What both sides are given."""

    prompts: Int[np.ndarray, "B T"]
    concepts: Int[np.ndarray, "B P"]
    vector: np.ndarray  # [B, D]
    factor: np.ndarray  # [B]
    new: int  # tokens of each row


class Timed(NamedTuple):
    """One program: seconds of each repetition, and the tokens it made."""

    seconds: list[float]
    tokens: Int[np.ndarray, "B N"]


def shapes() -> dict[str, Shape]:
    """Those of the training benchmark, and the tiny world's, with which its evaluation runs."""
    recipe = RECIPES["tinyworld"][1]
    return SHAPES | {
        "tinyworld": Shape(base_shape("tinyworld"), recipe.steering.layers[0], {"release": recipe.hypernet})
    }


def make_work(lm: LMConfig, batch: int, prompt: int, new: int) -> Work:
    """Random rows; every prompt, steering prompt, vector and factor is another."""
    rng = np.random.default_rng(0)
    return Work(
        rng.integers(1, lm.vocab, (batch, prompt), np.int32),
        rng.integers(1, lm.vocab, (batch, CONCEPT), np.int32),
        SCALE * rng.normal(size=(batch, lm.width)).astype(np.float32),
        np.linspace(-2, 2, batch, dtype=np.float32),
        new,
    )


def unsteered(residual: Any, where: Any, layer: int) -> Any:
    """The steering that is none."""
    return residual


def our_programs(config: RunConfig, lm: LMConfig, work: Work, folder: Path) -> dict[str, Callable[[], np.ndarray]]:
    """Ours, by name; the base LM's weights are left in the folder."""
    weights = random_lm(lm, config.train.compute_dtype)
    save_lm(weights, folder)
    hypernet = jax.jit(partial(init_state, config))(weights).hypernet
    batch, rows = len(work.prompts), np.arange(len(work.prompts), dtype=np.int32)
    decoding = Decoding(max_new=work.new, batch=batch)

    def program(steering: Any, shared: int = 1) -> Callable[[], np.ndarray]:
        tokens = work.prompts[: batch // shared]
        real = np.ones(tokens.shape, bool)
        given = GenerationBatch(tokens, real, real, rows // shared, rows.astype(np.uint32), steering)
        given = jax.device_put(given)
        return lambda: np.asarray(generate(weights, given, work.new, config.steering, decoding, ()).new)

    def concepts(shared: int) -> Concepts:
        read, pairs = work.concepts[: batch // shared], rows[: batch // shared]
        return Concepts(hypernet, read, np.ones(read.shape, bool), pairs, rows // shared, work.factor)

    return {
        "JAX": program(Vectors(work.vector, work.factor)),
        "JAX, unsteered": program(jax.tree_util.Partial(unsteered)),
        "JAX, with the network": program(concepts(1)),
        "JAX, factor sweep": program(concepts(FACTORS), FACTORS),
    }


def their_program(layer: int, dtype: str, work: Work, folder: Path, device: str) -> Callable[[], np.ndarray]:
    """`transformers` on the weights of the folder, with a hook on the steered block."""
    lm = Gemma2ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    added = torch.tensor(work.factor[:, None] * work.vector, dtype=lm.dtype, device=device)[:, None]
    lm.model.layers[layer].register_forward_hook(lambda module, inputs, output: output + added)
    tokens = torch.tensor(work.prompts, dtype=torch.int64, device=device)
    settings = GenerationConfig(max_new_tokens=work.new, do_sample=False, eos_token_id=None, pad_token_id=0)

    def run() -> np.ndarray:
        with torch.inference_mode():
            made = lm.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
        return made[:, tokens.shape[1] :].cpu().numpy()

    return run


def timed(programs: dict[str, Callable[[], np.ndarray]], repeats: int, clock: str) -> dict[str, Timed]:
    """All programs in turns, after a turn that is not timed."""
    tokens = {name: run() for name, run in programs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, run in programs.items():
            begin = CLOCKS[clock]()
            run()
            seconds[name].append(CLOCKS[clock]() - begin)
    return {name: Timed(seconds[name], tokens[name]) for name in programs}


def ours_apart(config: RunConfig, lm: LMConfig, work: Work, folder: Path, repeats: int) -> dict[str, Timed]:
    """Ours, in a process of their own."""
    return timed(our_programs(config, lm, work, folder), repeats, "wall")


def theirs_apart(layer: int, dtype: str, work: Work, folder: Path, repeats: int) -> dict[str, Timed]:
    """Theirs, in a process of its own."""
    return timed({"transformers": their_program(layer, dtype, work, folder, "cuda")}, repeats, "wall")


def flops(config: RunConfig, lm: LMConfig, work: Work, shared: int | None) -> int:
    """Matrix products of one run with `shared` rows to a prompt and pair; None where no network writes vectors."""
    rows, length = work.prompts.shape
    prefill = step_flops(lm, config, Bucket(length, length, 1, CONCEPT, rows=1))
    token = step_flops(lm, config, Bucket(1, 1, 1, 1, rows=1))
    once = prefill.lower + (prefill.hypernet + prefill.cross if shared else 0)
    attention = 4 * lm.heads * lm.head_dim * lm.layers * (length + work.new)
    step = token.lower + token.upper + token.unembed + rows * attention
    return once // (shared or 1) + prefill.upper + prefill.unembed + (work.new - 1) * step


def report(args: argparse.Namespace, chip: bool) -> str:
    """The table, in Markdown."""
    shape = shapes()[args.preset]
    config = RunConfig(
        hypernet=shape.hypernets["release"],
        steering=SteeringConfig(layers=(shape.layer,)),
        train=TrainConfig(batch=args.batch, compute_dtype=args.dtype),
    )
    work = make_work(shape.lm, args.batch, args.prompt, args.new)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if chip:
            found = alone(ours_apart, config, shape.lm, work, folder, args.repeats)
            found |= alone(theirs_apart, shape.layer, args.dtype, work, folder, args.repeats)
        else:
            programs = our_programs(config, shape.lm, work, folder)
            programs["transformers"] = their_program(shape.layer, args.dtype, work, folder, "cpu")
            found = timed(programs, args.repeats, args.clock)
    counted = dict.fromkeys(found, flops(config, shape.lm, work, None))
    counted["JAX, with the network"] = flops(config, shape.lm, work, 1)
    counted["JAX, factor sweep"] = flops(config, shape.lm, work, FACTORS)
    medians = {name: float(np.median(side.seconds)) for name, side in found.items()}
    same = np.mean((found["JAX"].tokens == found["transformers"].tokens).all(axis=1))
    lines = [
        f"## {args.preset}, batch {args.batch}, {args.prompt} + {args.new} tokens, {args.dtype}",
        "",
        "| | seconds | fastest to slowest | tokens/s | to transformers | to unsteered | GFLOP | GFLOP/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, side in found.items():
        time_, count = medians[name], counted[name] / 1e9
        lines.append(
            f"| {name} | {time_:.2f} | {min(side.seconds):.2f} to {max(side.seconds):.2f} "
            f"| {args.batch * args.new / time_:.1f} | {medians['transformers'] / time_:.2f} "
            f"| {medians['JAX, unsteered'] / time_:.3f} | {count:.0f} | {count / time_:.0f} |"
        )
    sweep, network = "JAX, factor sweep", "JAX, with the network"
    lines += [
        "",
        f"{same:.0%} of the steered rows are the same, token by token, as transformers makes them. A sweep of "
        f"{FACTORS} factors costs {medians[sweep] / medians[network]:.3f} of {FACTORS} runs; by FLOPs "
        f"{counted[sweep] / counted[network]:.3f}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=shapes(), default="small")
    parser.add_argument("--batch", type=int, default=28, help="rows")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens generated for each row")
    parser.add_argument("--repeats", type=int, default=5, help="timed, of each program")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="on a CPU; cpu counts all threads' CPU seconds")
    args = parser.parse_args()
    facts = alone(machine)  # asked in another process, since the question alone makes JAX take a GPU's memory
    print("; ".join(f"{name} {value}" for name, value in facts.items()) + ".\n")
    print(report(args, torch.cuda.is_available()), flush=True)


if __name__ == "__main__":
    main()
