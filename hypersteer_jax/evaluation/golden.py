"""Agreement with the PyTorch release, measured on recorded cases (`hypersteer check-golden DIR`).

A case is a directory with golden.json (shapes, lengths, optimizer, losses) and golden.safetensors (weights, inputs,
outputs, gradients), recorded from AxBench at dc57b9b in float32 on a tiny model whose weights are all random.
Everything is compared in float32 at the highest matmul precision, in the release's own padded positions but for
one row: the vectors of the padded batch with true positions must be those that the release gives to unpadded prompts.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.numpy import load_file

from hypersteer_jax.config import HypernetConfig, RunConfig, SteeringConfig, TrainConfig
from hypersteer_jax.data.batch import SteeringBatch
from hypersteer_jax.models.hypernet import Hypernet
from hypersteer_jax.models.lm import LM
from hypersteer_jax.models.presets import from_hugging_face
from hypersteer_jax.models.weights import hypernet_from_tensors, hypernet_tensors, lm_from_tensors
from hypersteer_jax.steering import read_context, steered_logits
from hypersteer_jax.training.train import TrainState, batch_loss, make_optimizer, train_step

FORWARD, GRADIENT, STEP, RUN = 1e-5, 1e-4, 5e-5, 2e-5  # relative errors allowed; see `compare`

OUTPUTS = (
    "out.context",
    "out.vector",
    "out.vector_unpadded",
    "out.base_logits",
    "out.steered_logits",
    "in.factor",
    "out.steered_logits_factor",
)


class GoldenError(ValueError):
    """A golden case cannot be read."""


class Row(NamedTuple):
    """One comparison: the largest relative L2 error of its tensors against what is allowed."""

    name: str
    error: float
    allowed: float
    tensors: int

    @property
    def agrees(self) -> bool:
        """Whether the error is within what is allowed; NaN never is."""
        return self.error <= self.allowed


class Golden(NamedTuple):
    """One case, read."""

    meta: dict[str, Any]
    tensors: dict[str, np.ndarray]
    lm: LM
    batch: SteeringBatch  # scores every position, so that whole logits come out
    config: RunConfig

    def part(self, prefix: str) -> dict[str, np.ndarray]:
        """Tensors below a prefix, without it."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def hypernet(self, positions: Literal["true", "padded"] = "padded") -> Hypernet:
        """The hypernetwork before training."""
        config = HypernetConfig(blocks=self.config.hypernet.blocks, positions=positions)
        return hypernet_from_tensors(config, self.lm.config, self.part("hypernet.init."))


def load_golden(directory: Path) -> Golden:
    """Reads a case.

    Raises:
        GoldenError: a file is missing or damaged, or lacks a field.
    """
    try:
        meta = json.loads((directory / "golden.json").read_text())
        tensors = load_file(directory / "golden.safetensors")
        lm_config = from_hugging_face({"model_type": "gemma2", **meta["base_config"]})
        lm = lm_from_tensors(
            lm_config, {k.removeprefix("lm."): v for k, v in tensors.items() if k.startswith("lm.")}, jnp.float32
        )
        optimizer, layer = meta["optimizer"], meta["steering_layer"]
        config = RunConfig(
            hypernet=HypernetConfig(blocks=meta["hypernet"]["num_hidden_layers"], positions="padded"),
            steering=SteeringConfig(layers=(layer,)),
            train=TrainConfig(
                steps=optimizer["steps"],
                learning_rate=optimizer["lr"],
                clip=optimizer["clip_global_norm"],
                weight_decay=optimizer["weight_decay"],
                compute_dtype="float32",
            ),
        )
        missing = [name for name in OUTPUTS if name not in tensors]
        missing += [name for name in ("losses", "grad_norms", "unused_parameters") if name not in meta]
        if missing:
            raise GoldenError(f"{directory}: the golden case lacks {', '.join(missing)}; record it again")
        return Golden(meta, tensors, lm, _batch(tensors), config)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise GoldenError(
            f"{directory}: not a golden case ({error}); give a directory with golden.json and .safetensors"
        ) from error
    except KeyError as error:
        raise GoldenError(f"{directory}: the golden case lacks {error}; record it again") from error


def _batch(tensors: dict[str, np.ndarray]) -> SteeringBatch:
    tokens, mask, labels = tensors["input_ids"], tensors["attention_mask"] > 0, tensors["labels"]
    columns, rows = np.arange(tokens.shape[1]), np.arange(len(tokens))
    steered = (tensors["intervention_locations"][:, 0, :, None] == columns).any(1)
    scored = np.roll(labels != -100, -1, axis=1)
    return SteeringBatch(
        tokens=tokens,
        segments=mask.astype(np.int32),
        steer_mask=steered & mask,  # unused slots of the record point at the first pad
        context_index=np.broadcast_to(columns, tokens.shape),
        context_mask=mask & (labels == -100),
        response_index=np.broadcast_to(columns, tokens.shape),
        response_tokens=np.roll(tokens, -1, axis=1),
        response_share=(scored / scored.sum(1, keepdims=True)).astype(np.float32),
        concept_tokens=tensors["concept_input_ids"],
        concept_mask=tensors["concept_attention_mask"] > 0,
        concept_row=rows,
        factor=np.ones(len(tokens), np.float32),
        row=rows,
    )


def compare(golden: Golden) -> list[Row]:
    """All comparisons of a case.

    Allowed are relative L2 errors of 1e-5 for vectors and logits, 1e-4 for gradients, 5e-5 for weights after a step,
    and 2e-5 for the losses and gradient norms of the whole run. The case's own rounding is far below: moving every
    weight by one part in 10^7 moves losses by 1e-7, gradients by 2e-6 and stepped weights by 3e-6.
    """
    with jax.default_matmul_precision("highest"):
        return [*_forward(golden), *_training(golden)]


def _forward(golden: Golden) -> list[Row]:
    lm, batch, steering, recorded = golden.lm, golden.batch, golden.config.steering, golden.tensors
    context = jax.jit(partial(read_context, config=steering))(lm, batch.tokens, batch.mask)
    logits = jax.jit(partial(steered_logits, config=steering))

    def vectors(positions: Literal["true", "padded"]) -> jax.Array:
        hypernet = golden.hypernet(positions)
        return jax.jit(Hypernet.__call__)(
            hypernet, batch.concept_tokens, batch.concept_mask, context, batch.context_mask, lm.embedding[...]
        )

    def at_factor(factor: np.ndarray) -> np.ndarray:
        return np.asarray(logits(golden.hypernet(), lm, batch._replace(factor=factor)))[batch.mask]

    ones = batch.factor
    outputs = {
        "context at prompt positions": (
            np.asarray(context)[batch.context_mask],
            recorded["out.context"][batch.context_mask],
        ),
        "vector, padded positions": (vectors("padded"), recorded["out.vector"]),
        "vector, true positions": (vectors("true"), recorded["out.vector_unpadded"]),
        "base logits (factor 0)": (at_factor(0 * ones), recorded["out.base_logits"][batch.mask]),
        "steered logits (factor 1)": (at_factor(ones), recorded["out.steered_logits"][batch.mask]),
        "steered logits (own factors)": (
            at_factor(recorded["in.factor"]),
            recorded["out.steered_logits_factor"][batch.mask],
        ),
    }
    return [Row(name, relative_error(ours, theirs), FORWARD, 1) for name, (ours, theirs) in outputs.items()]


def _training(golden: Golden) -> list[Row]:
    config, lm, batch = golden.config, golden.lm, golden.batch
    hypernet = golden.hypernet()
    grads = jax.jit(jax.grad(partial(batch_loss, config=config), has_aux=True))(hypernet, lm, batch)[0]
    unused = set(golden.meta["unused_parameters"])
    recorded = {name: grad for name, grad in golden.part("grad.step0.").items() if name not in unused}
    ours = hypernet_tensors(grads)
    rows = [worst("gradients of step 0", ours, recorded, GRADIENT)]
    silent = max((float(np.abs(ours[name]).max()) for name in unused), default=0.0)
    rows.append(Row("gradient of unused parameters", silent, 0.0, len(unused)))

    state = TrainState(jnp.zeros((), jnp.int32), hypernet, make_optimizer(config.train).init(hypernet))
    step = jax.jit(partial(train_step, config=config))
    losses, norms = [], []
    for index in range(config.train.steps):
        state, metrics = step(state, lm, batch)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
        if index == 0:
            rows.append(
                worst("weights after one step", hypernet_tensors(state.hypernet), golden.part("hypernet.step1."), STEP)
            )
    return [*rows, *run_rows(golden, losses, norms)]


def run_rows(golden: Golden, losses: list[float], grad_norms: list[float]) -> list[Row]:
    """A whole run's losses and gradient norms, step by step, against the record."""
    rows = []
    for name, values, key in (
        ("losses of the run", losses, "losses"),
        ("gradient norms of the run", grad_norms, "grad_norms"),
    ):
        theirs = np.array(golden.meta[key])
        rows.append(Row(name, float(np.max(np.abs(np.array(values) - theirs) / theirs)), RUN, len(theirs)))
    return rows


def worst(name: str, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], allowed: float) -> Row:
    """The largest error over tensors of the same name; every recorded one must exist."""
    errors = [relative_error(ours[key], value) for key, value in theirs.items()]
    return Row(name, float(np.max(errors)), allowed, len(errors))


def relative_error(ours: Any, theirs: np.ndarray) -> float:
    """L2 norm of the difference over that of the record, in float64."""
    theirs = np.asarray(theirs, np.float64)
    size = float(np.linalg.norm(theirs))
    return float(np.linalg.norm(np.asarray(ours, np.float64) - theirs)) / max(size, 1e-30)


def print_comparison(directory: Path) -> bool:
    """Prints the table of a case; True if everything agrees.

    Raises:
        GoldenError: the case cannot be read.
    """
    return print_rows(directory.name, compare(load_golden(directory)))


def print_rows(title: str, rows: list[Row]) -> bool:
    """Prints comparisons as a table; True if all of them agree."""
    table = Table(title=f"{title}: largest relative error against the PyTorch release, float32")
    table.add_column("what")
    table.add_column("tensors", justify="right")
    table.add_column("error", justify="right")
    table.add_column("allowed", justify="right")
    table.add_column("")
    for row in rows:
        verdict = "[green]agrees[/]" if row.agrees else "[bold red]DIFFERS[/]"
        table.add_row(row.name, str(row.tensors), f"{row.error:.1e}", f"{row.allowed:.0e}", verdict)
    Console().print(table)
    return all(row.agrees for row in rows)
