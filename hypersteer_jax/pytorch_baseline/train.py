"""The releases' training: AdamW behind a global clip, learning rate linear to zero."""

from collections.abc import Iterable
from typing import NamedTuple

from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from hypersteer_jax.pytorch_baseline.steering import Baseline, Batch, forward


class Training(NamedTuple):
    """A run; a step changes what is in it."""

    baseline: Baseline
    optimizer: AdamW
    schedule: LambdaLR


class Metrics(NamedTuple):
    """What a step reports."""

    loss: float  # nats per response token
    grad_norm: float  # before clipping


def start(baseline: Baseline, learning_rate: float, steps: int) -> Training:
    """A run before its first step: betas .9 and .999, eps 1e-8, no weight decay, `learning_rate * (1 - step / steps)`.

    The moments have the dtype of the hypernetwork; the releases' is bfloat16.
    """
    optimizer = AdamW(baseline.hypernet.parameters(), lr=learning_rate, weight_decay=0.0)
    return Training(baseline, optimizer, LambdaLR(optimizer, lambda step: 1 - step / steps))


def train_step(training: Training, batch: Batch) -> Metrics:
    """One update; it waits for the device, since it reports numbers, as the releases' steps do."""
    baseline, optimizer, schedule = training
    outputs = forward(baseline, batch)
    outputs.loss.backward()
    weights = list(baseline.hypernet.parameters())
    grad_norm = clip_grad_norm_(weights, baseline.form.clip)
    for _ in range(baseline.form.clips - 1):
        clip_grad_norm_(weights, baseline.form.clip)  # changes nothing, but reads all gradients once more
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return Metrics(outputs.loss.item(), grad_norm.item())


def train(training: Training, batches: Iterable[Batch]) -> list[Metrics]:
    """One step on each batch."""
    return [train_step(training, batch) for batch in batches]
