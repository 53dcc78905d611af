"""The baseline in its `release` form on a recorded case of the release, as `hypersteer check-golden` shows for JAX.

python -m hypersteer_jax.pytorch_baseline.golden DIR
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import Gemma2Config

from hypersteer_jax.evaluation.golden import (
    FORWARD,
    GRADIENT,
    STEP,
    Golden,
    Row,
    load_golden,
    print_rows,
    relative_error,
    run_rows,
    worst,
)
from hypersteer_jax.pytorch_baseline.hypernet import hypernet_config, load_hypernet, load_lm
from hypersteer_jax.pytorch_baseline.steering import FORMS, Baseline, Batch, base_pass, forward, write_vector
from hypersteer_jax.pytorch_baseline.train import start, train, train_step


def recorded_baseline(golden: Golden) -> Baseline:
    """The release's networks as recorded, before training."""
    lm = load_lm(Gemma2Config(**golden.meta["base_config"]), golden.part("lm."))
    config = hypernet_config(lm.config, golden.meta["hypernet"]["num_hidden_layers"])
    hypernet = load_hypernet(config, golden.part("hypernet.init."))
    return Baseline(FORMS["release"], lm, hypernet, golden.meta["steering_layer"])


def recorded_batch(golden: Golden) -> Batch:
    """The recorded batch, at factor 1."""
    names = {
        "tokens": "input_ids",
        "mask": "attention_mask",
        "labels": "labels",
        "concept_tokens": "concept_input_ids",
        "concept_mask": "concept_attention_mask",
    }
    parts = {ours: torch.tensor(golden.tensors[theirs]).long() for ours, theirs in names.items()}
    locations = torch.tensor(golden.tensors["intervention_locations"][:, 0]).long()
    return Batch(**parts, locations=locations, factor=torch.ones(len(locations)))


def compare(golden: Golden) -> list[Row]:
    """All comparisons of a case, with the errors that `hypersteer_jax.evaluation.golden` allows."""
    return [*_forward(golden), *_training(golden)]


@torch.no_grad()
def _forward(golden: Golden) -> list[Row]:
    baseline, batch, recorded = recorded_baseline(golden), recorded_batch(golden), golden.tensors
    outputs = forward(baseline, batch)
    own_factors = forward(baseline, batch._replace(factor=torch.tensor(recorded["in.factor"])))
    base = base_pass(baseline.lm, batch.tokens, batch.mask).logits

    def row(name: str, ours: Tensor, key: str, where: Tensor | None = None) -> Row:
        theirs = torch.tensor(recorded[key])
        if where is not None:
            ours, theirs = ours[where.bool()], theirs[where.bool()]
        return Row(name, relative_error(ours, theirs.numpy()), FORWARD, 1)

    return [
        row("context at prompt positions", outputs.context, "out.context", batch.prompt_mask),
        row("vector, padded batch", outputs.vector, "out.vector"),
        row("vector, unpadded one by one", _unpadded_vectors(baseline, batch, outputs.context), "out.vector_unpadded"),
        row("base logits", base, "out.base_logits", batch.mask),
        row("steered logits (factor 1)", outputs.logits, "out.steered_logits", batch.mask),
        row("steered logits (own factors)", own_factors.logits, "out.steered_logits_factor", batch.mask),
    ]


def _unpadded_vectors(baseline: Baseline, batch: Batch, context: Tensor) -> Tensor:
    """Steering vectors `[B, D]` of steering prompts that are read one at a time, without padding."""
    vectors = []
    for index, length in enumerate(batch.concept_mask.sum(1)):
        row = Batch(*(part[index : index + 1] for part in batch))
        row = row._replace(concept_tokens=row.concept_tokens[:, -length:], concept_mask=row.concept_mask[:, -length:])
        vectors.append(write_vector(baseline, row, context[index : index + 1]))
    return torch.cat(vectors)


def _training(golden: Golden) -> list[Row]:
    baseline, batch, optimizer = recorded_baseline(golden), recorded_batch(golden), golden.meta["optimizer"]
    forward(baseline, batch).loss.backward()
    parameters = dict(baseline.hypernet.named_parameters())
    grads = {name: parameter.grad.numpy() for name, parameter in parameters.items() if parameter.grad is not None}
    unused = parameters.keys() - grads.keys()
    baseline.hypernet.zero_grad()
    training = start(baseline, optimizer["lr"], optimizer["steps"])
    first = train_step(training, batch)
    stepped = {name: parameter.detach().numpy().copy() for name, parameter in parameters.items()}
    metrics = [first, *train(training, [batch] * (optimizer["steps"] - 1))]
    return [
        worst("gradients of step 0", grads, golden.part("grad.step0."), GRADIENT),
        Row("parameters without gradient", len(unused ^ set(golden.meta["unused_parameters"])), 0, len(unused)),
        worst("weights after one step", stepped, golden.part("hypernet.step1."), STEP),
        *run_rows(golden, [m.loss for m in metrics], [m.grad_norm for m in metrics]),
    ]


def main() -> None:
    """Prints the table of a case; exit status 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="holds golden.json and golden.safetensors")
    directory = parser.parse_args().directory
    agrees = print_rows(f"PyTorch baseline, {directory.name}", compare(load_golden(directory)))
    raise SystemExit(not agrees)


if __name__ == "__main__":
    main()
