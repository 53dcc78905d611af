"""Prefill and cached decoding of the steered base LM, under one jit.

Rows differ in what steers them, and what they share is done once: the blocks below the vector read each base prompt
once, and the hypernetwork writes one vector for each pair of a steering prompt and a base prompt, which serves every
factor and every generated token (release). Steering is a function of the residual: rows that another method steers
need another `Steering` and nothing else.

Under `jax.set_mesh` rows, prompts and pairs are split over `data` and `fsdp`, heads and their cache over `tensor`.

Letters: U base prompts, V pairs (or vocabulary, of logits), B rows, T prompt length, P steering-prompt length, D width,
N new tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from hypersteer_jax.config import SteeringConfig
from hypersteer_jax.models.hypernet import Hypernet
from hypersteer_jax.models.lm import LM, KVCache, empty_cache, reserve, spread
from hypersteer_jax.models.selection import Selection
from hypersteer_jax.sharding import batch_spec, split, take
from hypersteer_jax.steering import lower_blocks, steer, upper_pass


class Decoding(NamedTuple):
    """How to pick tokens, and when to stop. A row's text does not depend on the rows beside it."""

    max_new: int = 128  # tokens, as AxBench
    temperature: float = 0.0  # 0 is greedy
    batch: int = 64  # rows computed together
    top_k: int = 0  # sample among the k likeliest tokens; 0: among all
    top_p: float = 1.0  # then among the likeliest whose probabilities together reach this
    stop: tuple[int, ...] = ()  # tokens that end a text besides the tokenizer's end; not part of it


Steering = Callable[[Array, Array, int], Array]  # (residual [B T D], steered positions [B T], layer) -> residual


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Vectors:
    """HyperSteer's `Steering`; another method's is another pytree with a call like this one."""

    vector: Float[Any, "B D"]
    factor: Float[Any, " B"]
    selection: Selection | None = None

    def __call__(self, residual: Float[Array, "B T D"], where: Bool[Array, "B T"], layer: int) -> Array:
        """The residual leaving block `layer`, with the vector added."""
        gate = where if self.selection is None else where * self.selection(residual, self.vector, layer)
        return steer(residual, self.vector, self.factor, gate)


class Concepts(NamedTuple):
    """Pairs of a steering prompt and a base prompt for the hypernetwork to read, and who takes their vectors."""

    hypernet: Hypernet
    tokens: Int[Any, "V P"]
    mask: Bool[Any, "V P"]
    prompt: Int[Any, " V"]  # the base prompt of each pair
    pair: Int[Any, " B"]  # of each row
    factor: Float[Any, " B"]


class GenerationBatch(NamedTuple):
    """Rows to generate, and the base prompts that they share."""

    tokens: Int[Any, "U T"]  # left-padded
    mask: Bool[Any, "U T"]
    where: Bool[Any, "U T"]  # prompt positions that are steered; generated ones always are
    prompt: Int[Any, " B"]  # of each row
    seed: Int[Any, " B"]
    steering: Concepts | Steering  # a Steering is of the rows as they are


class State(NamedTuple):
    """Rows under way."""

    cache: KVCache
    steering: Steering
    seed: Int[Array, " B"]
    token: Int[Array, " B"]  # the last one
    alive: Bool[Array, " B"]  # rows that have not ended
    new: Int[Array, "B N"]
    kept: Bool[Array, "B N"]  # which of the new tokens come before the end
    made: Int[Array, ""]  # new tokens so far


@partial(jax.jit, static_argnames=("config", "decoding", "ends"))
def generate(
    lm: LM,
    batch: GenerationBatch,
    stop: Int[Array, ""],
    config: SteeringConfig,
    decoding: Decoding,
    ends: tuple[int, ...],
) -> State:
    """Prefill, and up to `stop` tokens for each row; fewer when every row has ended.

    Args:
        lm: base LM.
        batch: what to generate.
        stop: 1 to `decoding.max_new`, for which there is room; `proceed` goes on from there.
        config: where vectors are added.
        decoding: how tokens are picked; its `batch` and `stop` are not read.
        ends: tokens that end a row; they are not part of it.
    """
    return _advance(lm, _prefill(lm, batch, config, decoding, ends), stop, config, decoding, ends)


def _advance(
    lm: LM, state: State, stop: Int[Array, ""], config: SteeringConfig, decoding: Decoding, ends: tuple[int, ...]
) -> State:
    """The state with `stop` tokens for each row; fewer when every row has ended."""

    def going(state: State) -> Array:
        return (state.made < stop) & jnp.any(state.alive)

    def step(state: State) -> State:
        alive = state.alive[:, None]
        logits, cache = forward(lm, state.cache, state.token[:, None], alive, alive, state.steering, config)
        return _append(state._replace(cache=cache), logits, decoding, ends)

    return jax.lax.while_loop(going, step, state)


proceed = jax.jit(_advance, static_argnames=("config", "decoding", "ends"), donate_argnames="state")


def _prefill(
    lm: LM,
    batch: GenerationBatch,
    config: SteeringConfig,
    decoding: Decoding,
    ends: tuple[int, ...],
) -> State:
    """All rows with their first token. The blocks up to the first steered one read each base prompt once."""
    tokens, mask, where = split((batch.tokens, batch.mask, batch.where))
    rows, seed = split((batch.prompt, batch.seed))
    first, dtype = config.layers[0] + 1, lm.embedding[...].dtype
    below = replace(lm.config, layers=first)
    shared = empty_cache(below, tokens.shape[0], tokens.shape[1], dtype)
    shared, positions = reserve(shared, mask)
    context, shared = lm.extend(lm.embed(tokens), shared, positions, 0, lower_blocks(config))
    residual, shared = lm.extend(context, shared, positions, lower_blocks(config), first)
    given = batch.steering
    steering = _read(lm, given, context, mask) if isinstance(given, Concepts) else given
    cache = spread(shared, rows, lm.config.layers, tokens.shape[1] + decoding.max_new)
    residual, positions, where = (take(x, rows) for x in (residual, positions, where))
    logits, cache = _above(lm, cache, residual, positions, where, steering, config)
    state = State(
        cache=cache,
        steering=steering,
        seed=seed,
        token=jnp.zeros_like(rows),
        alive=jnp.ones_like(rows, bool),
        new=jnp.zeros((len(rows), decoding.max_new), jnp.int32, out_sharding=batch_spec()),
        kept=jnp.zeros((len(rows), decoding.max_new), bool, out_sharding=batch_spec()),
        made=jnp.zeros((), jnp.int32),
    )
    return _append(state, logits, decoding, ends)


def _read(lm: LM, concepts: Concepts, context: Array, mask: Array) -> Vectors:
    """The vector of each pair, handed to its rows."""
    hypernet, *arrays = concepts
    tokens, concept_mask, prompt, pair, factor = split(arrays)
    vector = hypernet(tokens, concept_mask, take(context, prompt), take(mask, prompt), lm.embedding[...])
    return Vectors(take(vector, pair), factor, hypernet.selection)


def forward(
    lm: LM,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    where: Bool[Array, "B T"],
    steering: Steering,
    config: SteeringConfig,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Logits behind the last column of T more tokens, and the cache with these tokens in it."""
    cache, positions = reserve(cache, mask)
    residual, cache = lm.extend(lm.embed(tokens), cache, positions, 0, config.layers[0] + 1)
    return _above(lm, cache, residual, positions, where, steering, config)


def _above(
    lm: LM, cache: KVCache, residual: Array, positions: Array, where: Array, steering: Steering, config: SteeringConfig
) -> tuple[Float[Array, "B V"], KVCache]:
    """`forward` from the residual leaving the first steered block on."""

    def run(x: Array, start: int, stop: int) -> Array:
        nonlocal cache
        x, cache = lm.extend(x, cache, positions, start, stop)
        return x

    def add(x: Array, layer: int) -> tuple[Array, Array]:
        return steering(x, where, layer), where

    leaving = replace(config, context="leaving")  # where the residual is, whatever the hypernetwork reads
    residual, _ = upper_pass(run, add, residual, lm.config.layers, leaving)
    return lm.unembed(residual[:, -1]), cache


def _append(state: State, logits: Float[Array, "B V"], decoding: Decoding, ends: tuple[int, ...]) -> State:
    """The state with one more token for each row."""
    token = pick(split(logits), state.seed, state.made, decoding)
    alive = state.alive & ~jnp.any(token[:, None] == jnp.array(ends, jnp.int32), axis=1)
    here = jnp.arange(state.new.shape[1]) == state.made
    return state._replace(
        token=token,
        alive=alive,
        new=jnp.where(here, token[:, None], state.new),
        kept=state.kept | (here & alive[:, None]),
        made=state.made + 1,
    )


def pick(
    logits: Float[Array, "B V"], seed: Int[Array, " B"], count: Int[Array, ""], decoding: Decoding
) -> Int[Array, " B"]:
    """The next token of each row: the likeliest, or a draw that depends on the row's own seed and logits only."""
    if decoding.temperature == 0:
        return likeliest(logits)

    def noisy(logits: Array, seed: Array) -> Array:
        """Of which the largest is a draw, as in `jax.random.categorical`."""
        noise = jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), count), logits.shape, logits.dtype)
        return noise + candidates(logits / decoding.temperature, decoding.top_k, decoding.top_p)

    return likeliest(jax.vmap(noisy)(logits, seed))


def likeliest(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """`argmax`, the first of equals, as two plain reductions: XLA makes a slow loop of its own on a CPU."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    last = logits.shape[1] - 1
    return jnp.min(jnp.where(logits == top, jnp.arange(last + 1, dtype=jnp.int32), last), axis=-1)


def candidates(logits: Float[Array, " V"], top_k: int, top_p: float) -> Float[Array, " V"]:
    """The logits, -inf but for the `top_k` largest (0: all), and of these the fewest that hold `top_p` of the mass.

    The temperature comes first and `top_k` before `top_p`, as in transformers. Logits that equal the smallest one that
    stays do stay.
    """
    if top_k:
        logits = jnp.where(logits < jax.lax.top_k(logits, min(top_k, len(logits)))[0][-1], -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, descending=True)
        mass = jax.nn.softmax(ordered)
        before = jnp.cumsum(mass) - mass
        logits = jnp.where(logits < jnp.min(jnp.where(before < top_p, ordered, jnp.inf)), -jnp.inf, logits)
    return logits
