"""The PyTorch baseline: the release's recorded numbers, our JAX step, and what its two forms do differently."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from hypersteer_jax.config import HypernetConfig, RunConfig, SteeringConfig, TrainConfig
from hypersteer_jax.data.batch import SteeringBatch
from hypersteer_jax.data.pipeline import Bucket, collate
from hypersteer_jax.evaluation.golden import Row, load_golden, relative_error
from hypersteer_jax.models.hypernet import Hypernet
from hypersteer_jax.models.presets import to_hugging_face
from hypersteer_jax.models.weights import hypernet_tensors, lm_tensors
from hypersteer_jax.pytorch_baseline import golden as baseline_golden
from hypersteer_jax.pytorch_baseline import hypernet as baseline_hypernet
from hypersteer_jax.pytorch_baseline.steering import (
    FORMS,
    Baseline,
    Outputs,
    forward,
    release_batch,
    steer,
    steered,
)
from hypersteer_jax.pytorch_baseline.train import start, train, train_step
from hypersteer_jax.training.train import TrainState, make_optimizer
from hypersteer_jax.training.train import train_step as jax_train_step
from tests.conftest import random_hypernet, random_rows
from tests.models.tiny import CONFIGS, random_lm

torch.set_num_threads(1)

LAYER, PREFIX = 2, 2
# The baseline knows no sliding window in the hypernetwork; it never binds on texts of the real lengths.
LM_CONFIG = dataclasses.replace(CONFIGS["gemma2"], sliding_window=64)
LM = random_lm(LM_CONFIG)
OWN = HypernetConfig(blocks=2, positions="padded")
SHARED = dataclasses.replace(OWN, embedding="shared")
PROMPTS, LENGTHS, CONCEPTS = [4, 7, 5], [9, 12, 13], [3, 6, 4]
ROWS = random_rows(PROMPTS, LENGTHS, CONCEPTS, factors=[1.0, -0.5, 1.5])


def jax_batch(concept: int = max(CONCEPTS)) -> SteeringBatch:
    """The rows in a bucket that is longer than they are, but for the concepts: there padding changes the vector."""
    return collate(ROWS, np.arange(3)[:, None], Bucket(tokens=16, context=8, response=8, concept=concept))


BATCH = release_batch(jax_batch())


def release_tensors(hypernet: Hypernet) -> dict[str, np.ndarray]:
    """Weights by the release's names; a table that the network does not have is zero."""
    missing = {"embed_tokens.weight": np.zeros((LM_CONFIG.vocab, LM_CONFIG.width), np.float32)}
    return missing | hypernet_tensors(hypernet)


def baseline(form: str, dtype: Any = torch.float32, **changed: np.ndarray) -> Baseline:
    """One form on the tiny LM, with a random hypernetwork but for the weights in `changed` (dots spelled `__`)."""
    lm = baseline_hypernet.load_lm(transformers.Gemma2Config(**to_hugging_face(LM_CONFIG)), lm_tensors(LM), dtype)
    config = baseline_hypernet.hypernet_config(lm.config, OWN.blocks)
    tensors = release_tensors(random_hypernet(OWN, LM_CONFIG))
    tensors |= {name.replace("__", "."): value for name, value in changed.items()}
    return Baseline(FORMS[form], lm, baseline_hypernet.load_hypernet(config, tensors, dtype), LAYER)


def with_gradients(one: Baseline) -> tuple[Outputs, dict[str, Any]]:
    outputs = forward(one, BATCH)
    outputs.loss.backward()
    return outputs, {name: weight.grad for name, weight in one.hypernet.named_parameters()}


LM_TABLE = {"embed_tokens__weight": np.asarray(LM.embedding[...])}


# The release


def test_golden_case_passes(golden_dir: Path) -> None:
    rows = baseline_golden.compare(load_golden(golden_dir))
    assert all(row.agrees for row in rows), rows
    assert [row.tensors for row in rows] == [1, 1, 1, 1, 1, 1, 37, 1, 38, 20, 20]
    assert max(row.allowed for row in rows) <= 1e-4


def test_golden_case_sees_another_form(golden_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMS, "release", FORMS["hyperstuff"])
    monkeypatch.setattr(baseline_golden, "_training", lambda _: [])
    agrees = {row.name: row.agrees for row in baseline_golden.compare(load_golden(golden_dir))}
    assert {name for name, same in agrees.items() if same} == {"context at prompt positions", "base logits"}


@pytest.mark.parametrize(("error", "status"), [(1e-5, 0), (1.1e-5, 1), (float("nan"), 1)])
def test_exit_status(
    golden_dir: Path, error: float, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(baseline_golden, "compare", lambda _: [Row("all", 0.0, 1.0, 1), Row("one", error, 1e-5, 1)])
    monkeypatch.setattr("sys.argv", ["golden", str(golden_dir)])
    with pytest.raises(SystemExit) as stopped:
        baseline_golden.main()
    assert int(stopped.value.code) == status
    assert ("DIFFERS" in capsys.readouterr().out) == bool(status)


# JAX


@pytest.mark.parametrize(("form", "config"), [("release", OWN), ("hyperstuff", SHARED)])
def test_one_step_equals_ours(form: str, config: HypernetConfig) -> None:
    run = RunConfig(
        hypernet=config,
        steering=SteeringConfig(layers=(LAYER,)),
        train=TrainConfig(steps=10, learning_rate=1e-2, clip=FORMS[form].clip, compute_dtype="float32"),
    )
    hypernet = random_hypernet(config, LM_CONFIG)
    state = TrainState(jnp.zeros((), jnp.int32), hypernet, make_optimizer(run.train).init(hypernet))
    with jax.default_matmul_precision("highest"):
        state, ours = jax.jit(partial(jax_train_step, config=run))(state, LM, jax_batch())
    before, after = release_tensors(hypernet), release_tensors(state.hypernet)

    one = baseline(form, **{name.replace(".", "__"): value for name, value in before.items()})
    theirs = train_step(start(one, learning_rate=1e-2, steps=10), BATCH)
    assert theirs.loss == pytest.approx(float(ours["loss"]), rel=1e-5)
    assert theirs.grad_norm == pytest.approx(float(ours["grad_norm"]), rel=1e-5)
    assert theirs.grad_norm > 2  # so that the release's clip changes something
    stepped = {name: weight.detach().numpy() for name, weight in one.hypernet.named_parameters()}
    assert stepped.keys() == after.keys()
    for name, weight in after.items():
        assert relative_error(stepped[name], weight) <= 1e-5, name
    moved = {name for name in after if relative_error(after[name], before[name]) > 1e-3}
    still = {"norm.weight"} | ({"embed_tokens.weight"} if form == "hyperstuff" else set())
    assert moved == after.keys() - still


def test_batch_by_hand() -> None:
    """Three rows of the bucket of 16, as the release would have padded them: to 13 tokens and a pad."""
    ours = jax_batch(concept=8)
    batch = release_batch(ours)
    assert batch.tokens.shape == batch.labels.shape == (3, 14)
    assert batch.mask.sum(1).tolist() == LENGTHS
    assert batch.prompt_mask.sum(1).tolist() == PROMPTS  # pads are not prompt, though they have no label either
    for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        tokens = ROWS.tokens[row].tolist()
        assert batch.tokens[row].tolist() == tokens + [0] * (14 - length)
        assert batch.labels[row].tolist() == [-100] * prompt + tokens[prompt:] + [-100] * (14 - length)
        wanted = [*range(PREFIX, length)]
        assert batch.locations[row].tolist() == wanted + [length] * (13 - PREFIX - len(wanted))
        concept = ROWS.concepts[row].tolist()
        assert batch.concept_tokens[row].tolist() == [0] * (6 - len(concept)) + concept
    assert batch.concept_mask.sum(1).tolist() == CONCEPTS
    assert batch.factor.tolist() == [1.0, -0.5, 1.5]


# The passes


@pytest.mark.parametrize(
    ("form", "seen"), [("release", [PROMPTS, LENGTHS]), ("hyperstuff", [LENGTHS, LENGTHS, LENGTHS])]
)
def test_passes_per_step(form: str, seen: list[list[int]]) -> None:
    """Two and three, by how many tokens of each row they see; all of them make all logits."""
    one = baseline(form)
    masks, logits = [], []
    one.lm.register_forward_pre_hook(lambda _, args, given: masks.append(given["attention_mask"]), with_kwargs=True)
    one.lm.lm_head.register_forward_hook(lambda _, inputs, output: logits.append(tuple(output.shape)))
    train_step(start(one, learning_rate=1e-3, steps=10), BATCH)
    assert [mask.sum(1).tolist() for mask in masks] == seen
    assert logits == [(3, 14, LM_CONFIG.vocab)] * len(seen)


def test_both_forms_give_the_same_gradients() -> None:
    """Of one network whose own table is the base LM's, which only one of the forms reads."""
    (release, ours), (hyperstuff, theirs) = (with_gradients(baseline(form, **LM_TABLE)) for form in FORMS)
    torch.testing.assert_close(release.vector, hyperstuff.vector, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(release.loss, hyperstuff.loss, rtol=1e-6, atol=0)
    assert {name for name, grad in ours.items() if grad is None} == {"norm.weight"}
    assert {name for name, grad in theirs.items() if grad is None} == {"norm.weight", "embed_tokens.weight"}
    compared = [name for name, grad in theirs.items() if grad is not None]
    assert len(compared) == 2 * 17 + 2  # per block 4 + 4 attention, 3 MLP, 6 norms; and the head
    for name in compared:
        assert ours[name].abs().max() > 1e-6, name
        assert relative_error(ours[name].numpy(), theirs[name].numpy()) <= 1e-5, name


@pytest.mark.parametrize(("form", "reads_its_own"), [("release", True), ("hyperstuff", False)])
def test_whose_table_embeds_the_steering_prompt(form: str, reads_its_own: bool) -> None:
    with torch.no_grad():
        same, other = (forward(baseline(form, **table), BATCH).vector for table in (LM_TABLE, {}))
    assert bool((same != other).any()) == reads_its_own


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_factor_zero_is_the_base_lm(form: str) -> None:
    one = baseline(form)
    outputs, silent = forward(one, BATCH), forward(one, BATCH._replace(factor=torch.zeros(3)))
    base = one.lm(BATCH.tokens, attention_mask=BATCH.mask).logits
    assert torch.equal(silent.logits, base)
    assert (outputs.logits - base).abs().max() > 0.1
    if form == "hyperstuff":
        assert torch.equal(outputs.unsteered_logits, base)
    else:
        assert outputs.unsteered_logits is None


def test_steer_adds_once_where_it_is_told() -> None:
    residual, vector = torch.randn(2, 5, 3), torch.randn(2, 3)
    result = steer(residual, vector, torch.tensor([1.0, -2.0]), torch.tensor([[1, 3, 3], [0, 1, 2]]))
    expected = residual.clone()
    expected[0, [1, 3]] += vector[0]
    expected[1, :3] -= 2 * vector[1]
    torch.testing.assert_close(result, expected)


def test_the_hook_goes_even_if_a_pass_fails() -> None:
    block = torch.nn.Identity()
    residual, ones = torch.zeros(1, 2, 3), torch.ones(1, 3)

    def fail() -> None:
        with steered(block, ones, torch.ones(1), torch.tensor([[1]])):
            assert block(residual).tolist() == [[[0.0] * 3, [1.0] * 3]]
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert torch.equal(block(residual), residual)


# Training


def test_learning_rate_falls_linearly_to_zero() -> None:
    training = start(baseline("release"), learning_rate=0.4, steps=4)
    rates = []
    for _ in range(4):
        rates.append(training.optimizer.param_groups[0]["lr"])
        train_step(training, BATCH)
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert training.optimizer.param_groups[0]["lr"] == 0


@pytest.mark.parametrize(("form", "clip"), [("release", 1.0), ("hyperstuff", 100.0)])
@pytest.mark.parametrize("scale", [1, 1000])
def test_clip(form: str, clip: float, scale: int) -> None:
    """After one step Adam's first moment is a tenth of the clipped gradient, whose steps would not show its size."""
    one = baseline(form)
    one.hypernet.register_forward_hook(lambda _, inputs, vector: scale * vector - (scale - 1) * vector.detach())
    training = start(one, learning_rate=1e-3, steps=10)
    grad_norm = train_step(training, BATCH).grad_norm
    assert 2 * scale < grad_norm < 100 * scale
    moments = [state["exp_avg"].flatten() for state in training.optimizer.state.values()]
    assert 10 * torch.cat(moments).norm().item() == pytest.approx(min(grad_norm, clip), rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_it_learns_in_the_dtype_of_the_releases(form: str) -> None:
    one = baseline(form, torch.bfloat16)
    frozen = {name: weight.clone() for name, weight in one.lm.named_parameters()}
    training = start(one, learning_rate=2e-2, steps=30)
    metrics = train(training, [BATCH] * 10)
    assert metrics[-1].loss < 0.8 * metrics[0].loss
    weights = dict(one.hypernet.named_parameters())
    moments = [value for state in training.optimizer.state.values() for name, value in state.items() if name != "step"]
    assert {value.dtype for value in (*weights.values(), *moments)} == {torch.bfloat16}
    assert one.hypernet.rotary_emb.inv_freq.dtype == torch.float32  # rounded, positions would be wrong
    exact = forward(baseline(form), BATCH).loss.item()
    assert metrics[0].loss == pytest.approx(exact, rel=0.05)
    assert metrics[0].loss != exact
    for name, weight in one.lm.named_parameters():
        assert torch.equal(weight, frozen[name]), name
        assert weight.grad is None


@pytest.mark.parametrize(
    ("blocks", "sizes", "millions"),
    [
        (22, {}, 2620),
        (4, {}, 963),
        (8, baseline_hypernet.HYPERSTUFF_SIZES, 2558),  # 590 of them in the table that nothing reads
    ],
)
def test_sizes_of_the_releases(blocks: int, sizes: dict[str, int], millions: int) -> None:
    """On Gemma-2-2B, whose config is the default."""
    with torch.device("meta"):
        net = baseline_hypernet.Hypernet(
            baseline_hypernet.hypernet_config(transformers.Gemma2Config(), blocks, **sizes)
        )
    assert round(sum(weight.numel() for weight in net.parameters()) / 1e6) == millions
