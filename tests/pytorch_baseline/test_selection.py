"""The selection head against PyTorch: gates, steered residual, logits, loss and all gradients, every weight random."""

import jax
import numpy as np
import pytest
import torch
import transformers

from hypersteer_jax.config import RunConfig, SelectionConfig, SteeringConfig, TrainConfig
from hypersteer_jax.evaluation.golden import relative_error
from hypersteer_jax.models.presets import to_hugging_face
from hypersteer_jax.models.weights import hypernet_tensors, lm_tensors
from hypersteer_jax.pytorch_baseline import hypernet as baseline_hypernet
from hypersteer_jax.pytorch_baseline.selection import Settings, penalty
from hypersteer_jax.pytorch_baseline.steering import FORMS, Baseline, forward, steer
from hypersteer_jax.steering import steer as our_steer
from hypersteer_jax.steering import steered_logits, steered_residual
from hypersteer_jax.training.train import objective
from tests.conftest import random_hypernet
from tests.pytorch_baseline.test_baseline import BATCH, LAYER, LM, LM_CONFIG, OWN, jax_batch

FORM = [
    pytest.param(layer_norm, straight, id=f"{'norm' if layer_norm else 'no norm'}, {'hard' if straight else 'soft'}")
    for layer_norm in (True, False)
    for straight in (True, False)
]


def settings_of(selection: SelectionConfig) -> Settings:
    return Settings(
        selection.layer_norm, selection.straight_through, selection.learnable_temperature, selection.sparsity
    )


def selection_of(layer_norm: bool, straight: bool) -> SelectionConfig:
    return SelectionConfig(
        True, layer_norm, noise=False, learnable_temperature=True, straight_through=straight, sparsity=3.0
    )


@pytest.mark.parametrize(("layer_norm", "straight"), FORM)
def test_step_equals_ours(layer_norm: bool, straight: bool) -> None:
    selection = selection_of(layer_norm, straight)
    hypernet = random_hypernet(OWN, LM_CONFIG, seed=2, selection=selection)  # about half of the gates are on
    run = RunConfig(
        hypernet=OWN,
        steering=SteeringConfig(layers=(LAYER,)),
        selection=selection,
        train=TrainConfig(compute_dtype="float32"),
    )
    batch = jax_batch()

    @jax.jit
    def ours(hypernet, batch):
        (total, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(hypernet, LM, batch, run)
        _, [gates] = steered_residual(hypernet, LM, batch, run.steering)
        return total, metrics, gradient, gates, steered_logits(hypernet, LM, batch, run.steering)

    with jax.default_matmul_precision("highest"):
        total, metrics, gradient, gates, logits = ours(hypernet, batch)

    lm = baseline_hypernet.load_lm(transformers.Gemma2Config(**to_hugging_face(LM_CONFIG)), lm_tensors(LM))
    config = baseline_hypernet.hypernet_config(lm.config, OWN.blocks)
    network = baseline_hypernet.load_hypernet(config, hypernet_tensors(hypernet), selection=settings_of(selection))
    outputs = forward(Baseline(FORMS["release"], lm, network, LAYER), BATCH)
    outputs.loss.backward()

    where = batch.steer_mask
    used = np.arange(BATCH.locations.shape[1]) < where.sum(1)[:, None]
    their_gates = network.selection_head.gates.detach().numpy()
    np.testing.assert_allclose(np.asarray(gates)[where], their_gates[used], atol=1e-5)
    assert not np.asarray(gates)[~where].any()
    on = np.mean(their_gates[used] > 0.5)
    assert 0.2 < on < 0.8
    assert float(metrics["selected"]) == pytest.approx(on)
    their_logits = np.take_along_axis(outputs.logits.detach().numpy(), batch.response_index[..., None], 1)
    scored = batch.response_mask
    assert relative_error(np.asarray(logits)[scored], their_logits[scored]) <= 1e-5
    assert outputs.loss.item() == pytest.approx(float(total), rel=1e-5)
    assert float(metrics["penalty"]) > 0.3
    assert float(total) == pytest.approx(float(metrics["loss"] + metrics["penalty"]))
    grads = hypernet_tensors(gradient)
    theirs = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
    assert theirs.keys() == grads.keys() - {"norm.weight"}
    for name, grad in theirs.items():
        assert grad.abs().max() > 1e-6, name
        assert relative_error(grads[name], grad.numpy()) <= 1e-4, name


@pytest.mark.parametrize(("layer_norm", "straight"), FORM)
def test_steered_residual_equals_ours(layer_norm: bool, straight: bool) -> None:
    selection = selection_of(layer_norm, straight)
    net = random_hypernet(OWN, LM_CONFIG, selection=selection)
    rng = np.random.default_rng(0)
    residual, vector = rng.normal(size=(2, 9, 32)).astype(np.float32), rng.normal(size=(2, 32)).astype(np.float32)
    factor, locations = np.array([0.7, -1.5], np.float32), np.array([[2, 3, 5, 8], [0, 1, 4, 7]])
    where = (locations[..., None] == np.arange(9)).any(1)
    gates = where * net.selection(residual, vector, LAYER)
    ours = our_steer(residual, vector, factor, gates)

    config = baseline_hypernet.hypernet_config(transformers.Gemma2Config(**to_hugging_face(LM_CONFIG)), OWN.blocks)
    head = baseline_hypernet.load_hypernet(
        config, hypernet_tensors(net), selection=settings_of(selection)
    ).selection_head
    theirs = steer(*map(torch.tensor, (residual, vector, factor, locations)), head)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-5)
    np.testing.assert_array_equal(np.asarray(ours)[~where], residual[~where])


def test_penalty_by_hand() -> None:
    """Three and two real tokens; the unused slots name the first pad."""
    gates, locations = torch.tensor([[0.5, 0.25], [0.8, 0.9]]), torch.tensor([[1, 2], [1, 2]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert penalty(gates, locations, mask).item() == pytest.approx((0.75 / 3 + 0.8 / 2) / 2)
