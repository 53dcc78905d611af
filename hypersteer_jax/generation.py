"""Generation: prefill and cached decoding of the steered base LM, under one jit.

A batch mixes concepts and factors freely: each row has its own vector and factor, and factor 0 is the base LM. The
vector of a row is computed once, from its steering prompt and base prompt, and serves every generated token (release);
a selection head gates it at each token, of the prompt or new.

Letters: B batch, T prompt length, P steering-prompt length, D width, N new tokens, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from hypersteer_jax.config import RunConfig, SteeringConfig
from hypersteer_jax.data.prompts import Prompter
from hypersteer_jax.models.hypernet import Hypernet
from hypersteer_jax.models.lm import LM, KVCache, empty_cache, reserve
from hypersteer_jax.models.selection import Selection
from hypersteer_jax.steering import lower_blocks, read_context, steer, upper_pass

MULTIPLE = 8  # prompt lengths are rounded up to it, so that few shapes are compiled


class Steered(NamedTuple):
    """A base LM with its tokenizer and a trained hypernetwork."""

    lm: LM
    prompter: Prompter
    hypernet: Hypernet
    config: RunConfig


class Request(NamedTuple):
    """One text to generate. Without a steering prompt, or at factor 0, the base LM answers."""

    prompt: str
    steering_prompt: str = ""
    factor: float = 0.0
    seed: int = 0


class Decoding(NamedTuple):
    """How to pick tokens."""

    max_new: int = 128  # tokens, as AxBench
    temperature: float = 0.0  # 0 is greedy
    batch: int = 64  # rows computed together; a row's text does not depend on it


def complete(model: Steered, requests: Sequence[Request], decoding: Decoding) -> list[str]:
    """The generated texts, in the order of the requests, special tokens left out."""
    if not requests:
        return []
    prompter, config = model.prompter, model.config
    in_context = config.hypernet.variant == "in_context"
    base = prompter.prompt_tokens([request.prompt for request in requests])
    concepts = prompter.concept_tokens(
        [request.steering_prompt for request in requests],
        [request.prompt for request in requests] if in_context else None,
    )
    tokens, mask = left_pad(base, prompter.pad_id)
    concept_tokens, concept_mask = left_pad(concepts, prompter.pad_id)
    factor = np.array([request.factor if request.steering_prompt else 0.0 for request in requests], np.float32)
    where = mask.copy()
    if config.steering.inference_positions == "after_prefix":
        where &= np.cumsum(mask, axis=1) > prompter.prefix
    seeds = np.array([request.seed for request in requests], np.uint32)
    arrays = (tokens, mask, where, concept_tokens, concept_mask, factor, seeds)
    texts: list[str] = []
    for start in range(0, len(requests), decoding.batch):
        count = min(decoding.batch, len(requests) - start)
        rows = np.resize(np.arange(start, start + count), decoding.batch)  # a short batch repeats its rows
        new, alive = _complete(
            model.hypernet,
            model.lm,
            *(array[rows] for array in arrays),
            config=config.steering,
            max_new=decoding.max_new,
            temperature=decoding.temperature,
            end_id=-1 if prompter.end_id is None else prompter.end_id,
        )
        for ids, real in zip(np.asarray(new)[:count], np.asarray(alive)[:count], strict=True):
            texts.append(prompter.tokenizer.decode(ids[real], skip_special_tokens=True).strip())
    return texts


def left_pad(rows: Sequence[np.ndarray], pad_id: int) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Rows of tokens as one array that ends with every row's last token, and where its real tokens are."""
    length = -(-max(map(len, rows)) // MULTIPLE) * MULTIPLE
    tokens = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for row, ids in enumerate(rows):
        tokens[row, length - len(ids) :] = ids
        mask[row, length - len(ids) :] = True
    return tokens, mask


@partial(jax.jit, static_argnames=("config", "max_new", "temperature", "end_id"))
def _complete(
    hypernet: Hypernet,
    lm: LM,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    where: Bool[Array, "B T"],
    concept_tokens: Int[Array, "B P"],
    concept_mask: Bool[Array, "B P"],
    factor: Float[Array, " B"],
    seeds: Int[Array, " B"],
    config: SteeringConfig,
    max_new: int,
    temperature: float,
    end_id: int,
) -> tuple[Int[Array, "B N"], Bool[Array, "B N"]]:
    context = read_context(lm, tokens, mask, config)
    vector = hypernet(concept_tokens, concept_mask, context, mask, lm.embedding[...])
    return decode(
        lm, tokens, mask, where, vector, factor, seeds, config, max_new, temperature, end_id, hypernet.selection
    )


def decode(
    lm: LM,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    where: Bool[Array, "B T"],
    vector: Float[Array, "B D"],
    factor: Float[Array, " B"],
    seeds: Int[Array, " B"],
    config: SteeringConfig,
    max_new: int,
    temperature: float,
    end_id: int,
    selection: Selection | None = None,
) -> tuple[Int[Array, "B N"], Bool[Array, "B N"]]:
    """Generates up to `max_new` tokens per row; stops early when every row has ended.

    Args:
        lm: base LM.
        tokens: base prompts, left-padded.
        mask: real tokens.
        where: prompt positions that are steered; generated positions always are.
        vector: one steering vector per row.
        factor: 0 leaves a row unsteered.
        seeds: one per row, so that a sampled text does not depend on its batch.
        config: where the vector is added.
        max_new: N.
        temperature: 0 takes the most likely token.
        end_id: token that ends a row; it is not part of the text.
        selection: gates the vector, if there is such a head.

    Returns:
        The new tokens, and which of them come before the end.
    """
    batch, length = tokens.shape
    keys = jax.vmap(jax.random.key)(seeds)

    def pick(logits: Array, index: Array) -> Array:
        if temperature == 0.0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        now = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        return jax.vmap(jax.random.categorical)(now, logits / temperature).astype(jnp.int32)

    cache = empty_cache(lm.config, batch, length + max_new, lm.embedding[...].dtype)
    logits, cache = _forward(lm, cache, tokens, mask, where, vector, factor, config, selection)
    token = pick(logits, jnp.zeros((), jnp.int32))
    new = jnp.zeros((batch, max_new), jnp.int32)
    kept = jnp.zeros((batch, max_new), bool)

    def going(carry: tuple) -> Array:
        index, _, alive, *_ = carry
        return (index < max_new) & jnp.any(alive)

    def body(carry: tuple) -> tuple:
        index, token, alive, cache, new, kept = carry
        new = new.at[:, index].set(token)
        kept = kept.at[:, index].set(alive)
        one = alive[:, None]
        logits, cache = _forward(lm, cache, token[:, None], one, one, vector, factor, config, selection)
        token = pick(logits, index + 1)
        return index + 1, token, alive & (token != end_id), cache, new, kept

    start = (jnp.zeros((), jnp.int32), token, token != end_id, cache, new, kept)
    *_, new, kept = jax.lax.while_loop(going, body, start)
    return new, kept


def _forward(
    lm: LM,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    where: Bool[Array, "B T"],
    vector: Float[Array, "B D"],
    factor: Float[Array, " B"],
    config: SteeringConfig,
    selection: Selection | None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Logits behind the last column, and the cache with these tokens in it."""
    cache, positions = reserve(cache, mask)

    def run(x: Array, start: int, stop: int) -> Array:
        nonlocal cache
        x, cache = lm.extend(x, cache, positions, start, stop)
        return x

    residual = run(lm.embed(tokens), 0, lower_blocks(config))

    def add(x: Array, layer: int) -> tuple[Array, Array]:
        gate = where if selection is None else where * selection(x, vector, layer)
        return steer(x, vector, factor, gate), gate

    residual, _ = upper_pass(run, add, residual, lm.config.layers, config)
    return lm.unembed(residual[:, -1]), cache
