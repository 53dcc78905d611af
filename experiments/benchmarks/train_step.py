r"""Examples per second of training, ours against the PyTorch baseline's, on a CPU or on one GPU.

    python experiments/benchmarks/train_step.py  # small Gemma-2 in float32 on a CPU that has nothing else to do
    OMP_NUM_THREADS=1 taskset -c 0 python experiments/benchmarks/train_step.py --clock cpu  # on a shared CPU
    python experiments/benchmarks/train_step.py --preset gemma-2-2b --dtype bfloat16 --batch 16  # or 64; an 80 GB GPU
    XLA_PYTHON_CLIENT_MEM_FRACTION=.95 \
    python experiments/benchmarks/train_step.py --preset gemma-2-9b --dtype bfloat16 --batch 16  # a 141 GB GPU

Both sides train on the same rows, whose lengths follow AxBench's, from random weights. Each makes batches as it does in
training: ours lays two rows in a sequence and sequences in buckets, the baseline takes rows in random order and pads
them to the longest. "Cached" is ours given the residuals below the steered layer, as in every epoch with `train.cache`;
they are numpy arrays, and their way to the device is timed. Ours keeps the hypernetwork and its optimizer in float32;
the baseline is all in one dtype, as released.

On a CPU all sides step in turns in one process, and each once more alone for its memory. On a GPU, where two
frameworks do not share memory, they run one after another, each alone. Everything is warm, and making batches is not
timed. GFLOP are matrix products by formula; the utilisation of a GPU counts only those that the method needs.

PyTorch's threads wait for each other, so other work on the machine costs the baseline far more than ours. One thread on
one core, in CPU seconds, is fair even then.

Expected: 2.5 times the examples/s of `release` and 3 times those of `hyperstuff`, 4 times with the cache.
Measured by the second command with `--batches 3` (x86 with AVX-512, JAX 0.10.2, PyTorch 2.13.0, about 15 minutes):

    | | `release` | its FLOPs over ours | `hyperstuff` | its FLOPs over ours |
    | --- | ---: | ---: | ---: | ---: |
    | JAX | 2.78 times | 2.28 | 4.08 times | 3.26 |
    | JAX, cached | 3.80 times | 3.50 | 5.86 times | 5.16 |

Peak memory of `release` was 1.4 GB in JAX and 3.0 GB in PyTorch. Unmeasured: every GPU.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool

from hypersteer_jax.config import (
    HypernetConfig,
    LMConfig,
    RunConfig,
    SteeringConfig,
    TrainConfig,
    check,
)
from hypersteer_jax.data.batch import SteeringBatch
from hypersteer_jax.data.pipeline import BatchSource, Rows, evaluation_batches, make_layout
from hypersteer_jax.evaluation.speed import (
    Alone,
    alone,
    baseline_alone,
    in_turns,
    machine,
    our_flops,
    our_step,
    ours_alone,
    random_baseline,
    random_lm,
    read_residuals,
    their_flops,
)
from hypersteer_jax.models.presets import PRESETS
from hypersteer_jax.pytorch_baseline.hypernet import HYPERSTUFF_SIZES
from hypersteer_jax.pytorch_baseline.steering import FORMS, release_batch
from hypersteer_jax.pytorch_baseline.train import start, train_step

# Gemma-2-2B with every size scaled down, but few enough words that they weigh against the blocks as there.
SMALL = dataclasses.replace(
    PRESETS["gemma-2-2b"],
    vocab=17_920,
    layers=8,
    width=512,
    heads=4,
    kv_heads=2,
    head_dim=128,
    mlp_width=2048,
    attention_scale=128**-0.5,
)
HYPERSTUFF = HypernetConfig(
    blocks=8,
    init="random",
    embedding="shared",
    heads=HYPERSTUFF_SIZES["num_attention_heads"],
    kv_heads=HYPERSTUFF_SIZES["num_key_value_heads"],
    mlp_width=HYPERSTUFF_SIZES["intermediate_size"],
    attention_scale=HYPERSTUFF_SIZES["query_pre_attn_scalar"] ** -0.5,
)


class Shape(NamedTuple):
    """A base LM and the hypernetwork of each form."""

    lm: LMConfig
    layer: int
    hypernets: dict[str, HypernetConfig]


SHAPES = {
    "small": Shape(
        SMALL,
        6,
        {
            "release": HypernetConfig(blocks=7),
            "hyperstuff": dataclasses.replace(HYPERSTUFF, blocks=2, heads=8, kv_heads=8, mlp_width=5464),
        },
    ),
    "gemma-2-2b": Shape(PRESETS["gemma-2-2b"], 20, {"release": HypernetConfig(blocks=22), "hyperstuff": HYPERSTUFF}),
    "gemma-2-9b": Shape(PRESETS["gemma-2-9b"], 20, {"release": HypernetConfig(blocks=34), "hyperstuff": HYPERSTUFF}),
}
ROWS = 4096  # that batches are made of
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 FLOP/s, from the vendor's data sheets

# Tokens at these quantiles of AxBench's concept10 (Gemma-2-2B, layer 20; counted with another vocabulary, of 32,000).
QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1)
PROMPT = (13, 15, 17, 20, 26, 67, 98, 129)
RESPONSE = (5, 45, 96, 128, 128, 128, 128, 128)
CONCEPT = (8, 8, 8, 9, 13, 20, 20, 20)


def draw_rows(count: int, vocab: int, lengths: Path | None, seed: int) -> Rows:
    """Random tokens in rows of random lengths, or of those in a file: prompt, response and steering prompt, a row each.

    Args:
        count: of rows.
        vocab: tokens are below it.
        lengths: of a text file with three whole numbers on a line, of which lines are drawn.
        seed: of all draws.
    """
    rng = np.random.default_rng(seed)
    if lengths is None:
        tables = (PROMPT, RESPONSE, CONCEPT)
        drawn = np.stack([np.interp(rng.random(count), QUANTILES, table) for table in tables], axis=1)
        drawn = np.round(drawn).astype(int)
    else:
        drawn = rng.choice(np.loadtxt(lengths, dtype=int, ndmin=2), count)
    prompts, responses, concepts = drawn.T
    return Rows(
        tokens=[rng.integers(1, vocab, length, np.int32) for length in prompts + responses],
        prompt_lengths=prompts.astype(np.int32),
        concepts=[rng.integers(1, vocab, length, np.int32) for length in concepts],
        factors=np.ones(count, np.float32),
        prefix=4,
        pad_id=0,
        positions="after_prefix",
        context=True,
    )


class Batches(NamedTuple):
    """As many rows for each side, in batches as it makes them."""

    ours: list[SteeringBatch]
    theirs: list[SteeringBatch]  # not yet padded to the longest


def make_batches(config: RunConfig, rows: Rows, count: int) -> Batches:
    """The first batches of a long run over all rows: ours in its layout, the baseline's in their random order."""
    layout = make_layout(rows, config.data, config.train.seed)
    source = BatchSource(rows, layout, config.train.batch // layout.sequences.shape[1], config.train.seed)
    return Batches([source[i] for i in range(count)], evaluation_batches(rows, config.train.batch, count))


def in_one_process(
    form: str, config: RunConfig, lm: LMConfig, batches: Batches, clock: Callable[[], float]
) -> list[Alone]:
    """Ours, ours with the cache and the baseline, in turns; each alone for the memory of its largest batch."""
    weights = random_lm(lm, config.train.compute_dtype)
    residuals = read_residuals(config, weights, batches.ours)
    plain, cached = (our_step(config, weights)[0] for _ in range(2))
    training = start(random_baseline(form, config, lm), config.train.learning_rate, config.train.steps)
    work = [
        (partial(plain, batch), partial(cached, batch, residual), partial(train_step, training, release_batch(theirs)))
        for batch, residual, theirs in zip(batches.ours, residuals, batches.theirs, strict=True)
    ]
    seconds = in_turns(work, clock)
    largest = Batches(*([max(side, key=lambda batch: batch.mask.sum(1).max())] for side in batches))
    memory = [side.memory for side in apart(form, config, lm, largest, "cpu")]
    return [Alone(column.tolist(), peak) for column, peak in zip(seconds.T, memory, strict=True)]


def apart(form: str, config: RunConfig, lm: LMConfig, batches: Batches, device: str) -> list[Alone]:
    """Ours, ours with the cache and the baseline, one after another, each in a process of its own."""
    return [
        alone(ours_alone, config, lm, batches.ours),
        alone(ours_alone, config, lm, batches.ours, True),
        alone(baseline_alone, form, config, lm, batches.theirs, device),
    ]


def benchmark(form: str, args: argparse.Namespace, chip: str | None) -> str:
    """One form's part of the report, in Markdown; `chip` is the GPU, if that is what is measured."""
    shape = SHAPES[args.preset]
    config = RunConfig(
        hypernet=shape.hypernets[form],
        steering=SteeringConfig(layers=(shape.layer,)),
        train=TrainConfig(steps=10_000, batch=args.batch, clip=FORMS[form].clip, compute_dtype=args.dtype),
    )
    check(config, shape.lm)
    rows = draw_rows(ROWS, shape.lm.vocab, args.lengths, config.train.seed)
    batches = make_batches(config, rows, args.batches)
    measure = partial(apart, device="cuda") if chip else partial(in_one_process, clock=CLOCKS[args.clock])
    found = measure(form, config, shape.lm, batches)
    padded = [release_batch(batch) for batch in batches.theirs]
    plain, cached = ([our_flops(shape.lm, config, batch, given) for batch in batches.ours] for given in (False, True))
    theirs = [their_flops(FORMS[form], config, shape.lm, batch) for batch in padded]
    flops = [np.mean([step.total for step in steps]) for steps in (plain, cached, theirs)]
    lines = [
        f"## {args.preset}, `{form}`, batch {args.batch}, {args.dtype}",
        "",
        f"Layer {shape.layer}, {config.hypernet.blocks} hypernetwork blocks, {args.batches} batches. Padding is "
        f"{padding([batch.mask for batch in batches.ours]):.0%} of our tokens and "
        f"{padding([batch.mask.numpy() for batch in padded]):.0%} of the baseline's. "
        f"By FLOPs alone, the baseline would take {flops[2] / flops[0]:.2f} times as long as ours, and "
        f"{flops[2] / flops[1]:.2f} times as long as ours with the cache.",
        "",
        "| | seconds a step | fastest to slowest | examples/s | to the baseline's | GFLOP a step | GFLOP/s | peak GB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    means = [float(np.mean(side.seconds)) for side in found]
    for name, side, mean, count in zip(("JAX", "JAX, cached", "PyTorch"), found, means, flops, strict=True):
        memory = "not measured" if side.memory is None else f"{side.memory / 1e9:.2f}"
        lines.append(
            f"| {name} | {mean:.3f} | {min(side.seconds):.3f} to {max(side.seconds):.3f} | {args.batch / mean:.2f} "
            f"| {means[2] / mean:.2f} | {count / 1e9:.0f} | {count / mean / 1e9:.0f} | {memory} |"
        )
    peak = next((peak for name, peak in PEAK.items() if chip and name in chip), None)
    if peak:
        needed = np.mean([step.minimal for step in plain])
        shares = ", ".join(f"{needed / mean / peak:.1%}" for mean in (means[0], means[2]))
        lines += ["", f"Utilisation in FLOPs that the method needs without a cache, JAX and PyTorch: {shares}."]
    return "\n".join([*lines, ""])


def padding(masks: Sequence[Bool[np.ndarray, "S T"]]) -> float:
    """Share of the tokens of all batches that are not real."""
    return 1 - sum(mask.sum() for mask in masks) / sum(mask.size for mask in masks)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=SHAPES, default="small")
    parser.add_argument("--forms", choices=FORMS, nargs="+", default=list(FORMS))
    parser.add_argument("--batch", type=int, default=16, help="rows; an even number")
    parser.add_argument("--batches", type=int, default=6, help="timed, of each side")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--lengths", type=Path, help="file of prompt, response and steering-prompt tokens, a row a line"
    )
    args = parser.parse_args()
    facts = alone(machine)  # asked in another process, since the question alone makes JAX take a GPU's memory
    print("; ".join(f"{name} {value}" for name, value in facts.items()) + ".\n")
    for form in args.forms:
        print(benchmark(form, args, facts["JAX"] if torch.cuda.is_available() else None), flush=True)


if __name__ == "__main__":
    main()
