"""Our training against the PyTorch baseline's, from the same weights on the same batches (`hypersteer compare`).

Numbers are compared on identical arrays: the baseline gets the rows as its collator pads them, but for the steering
prompts, which it pads as ours are, since its vector depends on their padding. Times are taken with its own padding.

Letters: B batch, R scored tokens, D width, V vocabulary.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import torch
from rich.console import Console
from rich.markdown import Markdown

from hypersteer_jax.config import RECIPES, ConfigError, LMConfig, RunConfig, check
from hypersteer_jax.data.batch import SteeringBatch
from hypersteer_jax.data.prompts import Prompter
from hypersteer_jax.data.sources import TrainData, load_base, load_data
from hypersteer_jax.decoding import Concepts, Decoding, GenerationBatch, generate
from hypersteer_jax.evaluation.compare_report import Comparison, Form, Text, write_report
from hypersteer_jax.evaluation.golden import FORWARD, Row, relative_error
from hypersteer_jax.evaluation.speed import alone, baseline_alone, ours_alone, time_steps
from hypersteer_jax.generation import left_pad
from hypersteer_jax.models.hypernet import Hypernet
from hypersteer_jax.models.lm import LM
from hypersteer_jax.pytorch_baseline.generation import greedy
from hypersteer_jax.pytorch_baseline.steering import (
    FORMS,
    Baseline,
    Batch,
    baseline_of,
    forward,
    read_context,
    release_batch,
    write_vector,
)
from hypersteer_jax.pytorch_baseline.train import start
from hypersteer_jax.pytorch_baseline.train import train_step as baseline_step
from hypersteer_jax.steering import read_context as our_context
from hypersteer_jax.steering import steered_logits, write_vectors
from hypersteer_jax.training.train import batch_loss, init_state, train_step

RUN = 1e-3  # relative error allowed to losses of a run: rounding grows with every step
COSINE = 5e-7  # allowed to 1 - cosine after training: it is 1.000000
TEXTS, MAX_NEW = 3, 32  # texts of each evaluation set, and their tokens at most
TIMED = 9  # batches
MEASURED = 3  # batches, for memory


class Sides(NamedTuple):
    """Both sides before training."""

    config: RunConfig
    lm: LM
    baseline: Baseline


def comparison_config(form: Form, steps: int, seed: int) -> RunConfig:
    """The tiny world's recipe as a form of the baseline computes it: float32, padded positions, its table and clip."""
    recipe = RECIPES["tinyworld"][1]
    hypernet = dataclasses.replace(
        recipe.hypernet,
        variant="cross_attention",
        blocks=3,
        init="base_lm",
        embedding="shared" if FORMS[form].lm_embedding else "own",
        head="linear",
        final_norm=False,
        memory_norm=False,
        positions="padded",
    )
    data = dataclasses.replace(recipe.data, pack=False)
    steering = dataclasses.replace(recipe.steering, layers=(0,), context="entering", inference_positions="after_prefix")
    train = dataclasses.replace(
        recipe.train,
        steps=steps,
        batch=16,
        learning_rate=3e-4,  # at 1e-3 rounding grows within 50 steps until a vector differs in the sixth digit
        schedule="linear",
        warmup=0,
        clip=FORMS[form].clip,
        weight_decay=0.0,
        loss="token",
        factor_range=None,
        seed=seed,
        compute_dtype="float32",
    )
    return dataclasses.replace(recipe, hypernet=hypernet, steering=steering, data=data, train=train)


def make_sides(config: RunConfig, lm: LM, form: Form) -> Sides:
    """Both sides with the weights of our start."""
    hypernet = jax.jit(partial(init_state, config))(lm).hypernet
    return Sides(config, lm, baseline_of(form, lm, hypernet, config.steering.layers[0]))


def compare(sides: Sides, data: TrainData, prompter: Prompter) -> Comparison:
    """Forward pass, training, vectors, texts and times. The baseline is trained in place."""
    batches = [next(data.batches) for _ in range(sides.config.train.steps)]
    with jax.default_matmul_precision("highest"):
        rows = forward_rows(sides, batches[0])
        losses, norms, hypernet = train_both(sides, batches)
        cosines = vector_cosines(sides, hypernet, data)
        texts = greedy_texts(sides, hypernet, data, prompter)
        *speeds, faster = time_steps(sides.config, sides.lm, sides.baseline, batches[:TIMED])
    rows += [
        Row(f"losses of {len(batches)} steps", _largest(losses), RUN, len(batches)),
        Row(f"gradient norms of {len(batches)} steps", _largest(norms), 10 * RUN, len(batches)),
        Row("1 - cosine of vectors after training", 1 - min(cosines), COSINE, len(cosines)),
    ]
    seen = {row.tobytes() for batch in _evaluation(data) for row in batch.concept_tokens}
    return Comparison(rows, losses, cosines, len(seen), texts, (speeds[0], speeds[1]), faster)


def peak_memory(form: Form, config: RunConfig, lm: LMConfig, data: TrainData) -> tuple[int | None, int | None]:
    """Bytes that training takes, ours and the baseline's, each in a process of its own (`speed.alone`)."""
    batches = [next(data.batches) for _ in range(MEASURED)]
    ours = alone(ours_alone, config, lm, batches)
    theirs = alone(baseline_alone, form, config, lm, batches, torch.get_default_device().type)
    return ours.memory, theirs.memory


def same_batch(batch: SteeringBatch) -> Batch:
    """The rows as the baseline's collator pads them, steering prompts as they are padded here."""
    return release_batch(batch)._replace(
        concept_tokens=torch.tensor(np.asarray(batch.concept_tokens, np.int64)),
        concept_mask=torch.tensor(np.asarray(batch.concept_mask, np.int64)),
    )


def forward_rows(sides: Sides, batch: SteeringBatch) -> list[Row]:
    """Relative L2 errors of one forward pass before training."""
    config, lm = sides.config, sides.lm
    padded = same_batch(batch)
    with torch.no_grad():
        theirs = forward(sides.baseline, padded)
    hypernet = jax.jit(partial(init_state, config))(lm).hypernet
    context = np.asarray(our_context(lm, batch.tokens, batch.segments, config.steering))
    prompts = context[:, : batch.context_mask.shape[1]][batch.context_mask]  # one row in a sequence, so it starts there
    logits = np.asarray(steered_logits(hypernet, lm, batch, config.steering))[batch.response_mask]
    their_logits = np.take_along_axis(theirs.logits.numpy(), batch.response_index[..., None], 1)[batch.response_mask]
    loss, _ = batch_loss(hypernet, lm, batch, config)
    pairs = {
        "context at prompt positions": (prompts, theirs.context[padded.prompt_mask.bool()].numpy()),
        "vector": (_vectors(hypernet, lm, batch, config), theirs.vector.numpy()),
        "steered logits of the response": (logits, their_logits),
        "loss": (loss, theirs.loss.numpy()),
    }
    return [Row(name, relative_error(ours, other), FORWARD, 1) for name, (ours, other) in pairs.items()]


@partial(jax.jit, static_argnames="config")
def _vectors(hypernet: Hypernet, lm: LM, batch: SteeringBatch, config: RunConfig) -> jax.Array:
    return write_vectors(hypernet, lm, batch, our_context(lm, batch.tokens, batch.segments, config.steering))


def train_both(
    sides: Sides, batches: Sequence[SteeringBatch]
) -> tuple[list[tuple[float, float]], list[tuple[float, float]], Hypernet]:
    """Losses and gradient norms of each step, ours and the baseline's, and our trained hypernetwork."""
    config, lm = sides.config, sides.lm
    state = jax.jit(partial(init_state, config))(lm)
    step = jax.jit(partial(train_step, config=config), donate_argnums=0)
    training = start(sides.baseline, config.train.learning_rate, config.train.steps)
    losses, norms = [], []
    for batch in batches:
        state, ours = step(state, lm, batch)
        theirs = baseline_step(training, same_batch(batch))
        losses.append((float(ours["loss"]), theirs.loss))
        norms.append((float(ours["grad_norm"]), theirs.grad_norm))
    return losses, norms, state.hypernet


def _largest(pairs: Iterable[tuple[float, float]]) -> float:
    """Largest relative difference."""
    ours, theirs = np.array(list(pairs)).T
    return float(np.max(np.abs(ours - theirs) / np.abs(theirs)))


def _evaluation(data: TrainData) -> list[SteeringBatch]:
    return [batch for batches in data.evaluation.values() for batch in batches]


@torch.no_grad()
def vector_cosines(sides: Sides, hypernet: Hypernet, data: TrainData) -> list[float]:
    """Cosine of both sides' vectors for every row of the evaluation sets, in float64."""
    cosines: list[float] = []
    for batch in _evaluation(data):
        padded = same_batch(batch)
        theirs = write_vector(sides.baseline, padded, read_context(sides.baseline, padded)).numpy()
        ours = np.asarray(_vectors(hypernet, sides.lm, batch, sides.config), np.float64)
        theirs = theirs.astype(np.float64)
        cosine = (ours * theirs).sum(1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))
        cosines += cosine[batch.response_mask.any(1)].tolist()  # a last batch is filled with rows that score nothing
    return cosines


def greedy_texts(sides: Sides, hypernet: Hypernet, data: TrainData, prompter: Prompter) -> list[Text]:
    """Greedy texts at factor 1 for the first rows of every evaluation set."""
    firsts = [batches[0] for batches in data.evaluation.values()]
    prompts, concepts = [], []
    for batch in firsts:
        for row in range(TEXTS):
            prompts.append(batch.tokens[row][: batch.context_mask.shape[1]][batch.context_mask[row]])
            concepts.append(batch.concept_tokens[row][batch.concept_mask[row]])
    end = -1 if prompter.end_id is None else prompter.end_id
    tokens, mask = left_pad(prompts, prompter.pad_id)
    concept_tokens, concept_mask = left_pad(concepts, prompter.pad_id)
    rows, factor = np.arange(len(prompts)), np.ones(len(prompts), np.float32)
    read = Concepts(hypernet, concept_tokens, concept_mask, prompt=rows, pair=rows, factor=factor)
    where = mask & (np.cumsum(mask, axis=1) > prompter.prefix)
    together = GenerationBatch(tokens, mask, where, prompt=rows, seed=np.zeros(len(rows), np.uint32), steering=read)
    state = generate(sides.lm, together, MAX_NEW, sides.config.steering, Decoding(MAX_NEW), (end,))
    new, kept = np.asarray(state.new), np.asarray(state.kept)
    texts = []
    for row in range(len(prompts)):
        ours = new[row][kept[row]].tolist()
        prompt, concept = prompts[row].tolist(), concepts[row].tolist()
        pads = concept_tokens.shape[1] - len(concept)
        theirs = greedy(sides.baseline, prompt, concept, pads, prompter.prefix, MAX_NEW, end)
        asked = prompt[: prompt.index(end)] if end in prompt else prompt  # without the opening of the model's turn
        shown = [
            prompter.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (concept, asked, ours, theirs)
        ]
        texts.append(Text(shown[0], shown[1], shown[2], shown[3], first_difference(ours, theirs)))
    return texts


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    """Index of the first token that differs, or where the shorter text ends; None if they are identical."""
    if ours == theirs:
        return None
    same = zip(ours, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(same) if a != b), min(len(ours), len(theirs)))


def run_comparison(form: Form, steps: int, seed: int, out: Path) -> bool:
    """Compares on the tiny world and leaves FORM.md, FORM.png and FORM.json in `out`; True if everything agrees.

    Raises:
        ConfigError: `out` cannot be a folder, or a number is out of range.
    """
    config = comparison_config(form, steps, seed)
    lm, prompter = load_base(config.lm, config.train.compute_dtype)
    check(config, lm.config)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out is {out}, where no folder can be made ({error}); give another") from error
    console = Console()
    data = load_data(config, prompter, console.print)
    sides = make_sides(config, lm, form)
    with console.status("comparing"):
        found = compare(sides, data, prompter)
        found = found._replace(memory=peak_memory(form, config, lm.config, data))
    write_report(form, config, lm.config, found, out)
    console.print(Markdown((out / f"{form}.md").read_text()))
    return found.agrees
