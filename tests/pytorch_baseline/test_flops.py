"""The baseline's formula against PyTorch's own counter, to the last product."""

import dataclasses

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma2Config

from hypersteer_jax.config import HypernetConfig
from hypersteer_jax.data.pipeline import Bucket, collate
from hypersteer_jax.models.presets import to_hugging_face
from hypersteer_jax.models.weights import hypernet_tensors, lm_tensors
from hypersteer_jax.pytorch_baseline.flops import baseline_flops
from hypersteer_jax.pytorch_baseline.hypernet import hypernet_config, load_hypernet, load_lm
from hypersteer_jax.pytorch_baseline.steering import FORMS, Baseline, release_batch
from hypersteer_jax.pytorch_baseline.train import start, train_step
from tests.conftest import random_hypernet, random_rows
from tests.models.tiny import CONFIGS, random_lm

LM = dataclasses.replace(CONFIGS["gemma2"], sliding_window=64)
OWN = {"heads": 6, "kv_heads": 3, "mlp_width": 40}
THEIRS = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 40}
ROWS = random_rows([4, 7, 5], [9, 12, 13], [3, 6, 4])
BATCH = release_batch(collate(ROWS, np.arange(3)[:, None], Bucket(tokens=16, context=8, response=8, concept=8)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("own", [False, True], ids=["base sizes", "own sizes"])
def test_formula_is_pytorchs_count(form: str, layer: int, own: bool) -> None:
    lm = load_lm(Gemma2Config(**to_hugging_face(LM)), lm_tensors(random_lm(LM)))
    ours = HypernetConfig(blocks=3, init="random", **(OWN if own else {}))
    config = hypernet_config(lm.config, 3, **(THEIRS if own else {}))
    hypernet = load_hypernet(config, hypernet_tensors(random_hypernet(ours, LM)))
    training = start(Baseline(FORMS[form], lm, hypernet, layer), 1e-3, 10)
    with FlopCounterMode(display=False) as counter:
        train_step(training, BATCH)
    assert counter.get_total_flops() == baseline_flops(FORMS[form], lm.config, config, layer, BATCH).total
