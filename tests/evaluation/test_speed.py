"""What is measured beside the clock: memory of a process of its own, random weights where they belong."""

import dataclasses
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="not run: what is measured of the PyTorch baseline")

import torch

from hypersteer_jax.data.pipeline import Bucket, collate
from hypersteer_jax.evaluation import speed
from hypersteer_jax.evaluation.compare import comparison_config
from hypersteer_jax.pytorch_baseline.steering import FORMS, release_batch
from tests.conftest import random_rows
from tests.models.tiny import CONFIGS, random_lm

LM = dataclasses.replace(CONFIGS["gemma2"], sliding_window=64)
ROWS = random_rows([4, 7, 5, 6], [9, 12, 13, 11], [3, 6, 4, 5])
BATCH = collate(ROWS, np.arange(4)[:, None], Bucket(tokens=16, context=8, response=8, concept=8))
PAIRS = collate(ROWS, np.arange(4).reshape(2, 2), Bucket(tokens=32, context=8, response=16, concept=8, rows=2))
CONFIG = comparison_config("release", steps=3, seed=0)
CONFIG = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, batch=4))


def test_sides_take_turns_after_one_round() -> None:
    seen: list[str] = []
    work = [[partial(seen.append, f"{side}{batch}") for side in "ab"] for batch in range(3)]
    seconds = speed.in_turns(work)
    assert seconds.shape == (3, 2)
    assert seen == ["a0", "b0", "a1", "b1", "a2", "b2"] * 2


def test_peak_is_what_is_held_and_what_comes_and_goes() -> None:
    if not speed.CLEAR.exists():
        pytest.skip("this system has no /proc/self/clear_refs; not run: peak memory")
    peak = speed._peak([lambda: np.ones(8_000_000).sum(), lambda: np.ones(4_000_000).sum()], held=1000)
    assert peak is not None
    assert abs(peak - 64_001_000) < 1_000_000  # the kernel counts resident pages in batches


def test_each_side_alone() -> None:
    ours = speed.alone(speed.ours_alone, CONFIG, LM, [BATCH], True)
    theirs = speed.alone(speed.baseline_alone, "release", CONFIG, LM, [BATCH], "cpu")
    assert len(ours.seconds) == len(theirs.seconds) == 1
    if speed.CLEAR.exists():
        weights = sum(x.numel() for x in speed.random_baseline("release", CONFIG, LM).hypernet.parameters())
        assert ours.memory is not None
        assert theirs.memory is not None
        assert min(ours.memory, theirs.memory) > 3 * 4 * weights


def test_steps_with_and_without_a_residual() -> None:
    lm, steps = random_lm(LM), []
    step, held = speed.our_step(CONFIG, lm)
    [residual] = speed.read_residuals(CONFIG, lm, [PAIRS])
    assert residual.shape == (2, 32, 32)
    for each in (None, residual):
        step(PAIRS, each)
        steps.append(int(held()[1].step))
    assert steps == [1, 2]


def test_flops_of_pairs_and_of_a_cached_step() -> None:
    config = dataclasses.replace(CONFIG, steering=dataclasses.replace(CONFIG.steering, layers=(2,)))
    whole, cached = (speed.our_flops(LM, config, PAIRS, cached) for cached in (False, True))
    assert 3 * cached.lower == whole.lower
    assert whole.unembed == 2 * 2 * 16 * 32 * 97  # two sequences of 16 scored tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_baseline(dtype: str) -> None:
    hypernet = dataclasses.replace(
        CONFIG.hypernet, init="random", heads=6, kv_heads=3, mlp_width=40, attention_scale=0.25
    )
    config = dataclasses.replace(
        CONFIG, hypernet=hypernet, train=dataclasses.replace(CONFIG.train, compute_dtype=dtype)
    )
    before = torch.get_default_dtype()
    made = speed.random_baseline("hyperstuff", config, LM)
    assert torch.get_default_dtype() == before
    assert {weight.dtype for net in made[1:3] for weight in net.parameters()} == {getattr(torch, dtype)}
    assert made.lm.lm_head.weight is made.lm.model.embed_tokens.weight
    assert not any(weight.requires_grad for weight in made.lm.parameters())
    assert made.hypernet.rotary_emb.inv_freq.dtype == made.lm.model.rotary_emb.inv_freq.dtype == torch.float32
    assert made.hypernet.layers[0].cross_attention.scaling == 0.25
    assert made.hypernet.layers[2].mlp.down_proj.weight.shape == (32, 40)


def test_their_flops_are_of_our_hypernetworks_shape() -> None:
    batch, wide = release_batch(BATCH), dataclasses.replace(CONFIG.hypernet, init="random", mlp_width=49)
    one, other = (
        speed.their_flops(FORMS["release"], dataclasses.replace(CONFIG, hypernet=hypernet), LM, batch)
        for hypernet in (CONFIG.hypernet, wide)
    )
    assert other.hypernet - one.hypernet == 3 * 4 * 6 * 3 * 2 * 32  # blocks, rows, tokens, matrices; 1 wider
    assert other.passes == one.passes


def test_random_lm_has_its_final_dtype() -> None:
    lm = speed.random_lm(LM, "bfloat16")
    assert lm.embedding[...].dtype == lm.blocks.mlp.gate[...].dtype == jnp.bfloat16
