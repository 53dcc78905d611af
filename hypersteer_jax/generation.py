"""Generation: texts of the steered base LM, whole or as a stream.

A batch mixes concepts and factors freely, and factor 0 is the base LM. Requests are put in an order in which those of
one batch share as much as they can (`decoding.py` does it once), and few shapes are compiled.

Letters: U base prompts, T their length.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Int

from hypersteer_jax.config import ConfigError, RunConfig
from hypersteer_jax.data.prompts import Prompter
from hypersteer_jax.decoding import Concepts, Decoding, GenerationBatch, Vectors, generate, proceed
from hypersteer_jax.models.hypernet import Hypernet
from hypersteer_jax.models.lm import LM
from hypersteer_jax.sharding import batch_ways

Item = TypeVar("Item")

SHORTEST = 8  # tokens; lengths are rounded up to powers of two from here on, so that few shapes are compiled


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


class Piece(NamedTuple):
    """What a streamed text grew by."""

    request: int  # its index
    text: str
    tokens: list[int]
    done: bool  # no more will come


def complete(model: Steered, requests: Sequence[Request], decoding: Decoding) -> list[str]:
    """The generated texts, in the order of the requests, special tokens left out.

    Raises:
        ConfigError: a field of `decoding` is out of range, or the devices of the mesh cannot share its batch.
    """
    texts = [""] * len(requests)
    for piece in stream(model, requests, decoding, decoding.max_new):
        texts[piece.request] = piece.text
    return texts


def stream(model: Steered, requests: Sequence[Request], decoding: Decoding, every: int = 8) -> Iterator[Piece]:
    """The same texts in pieces, as they come: those of one batch side by side, one batch after the other.

    The pieces of a request, joined, are what `complete` gives. Its last piece may be empty.

    Args:
        model: what to generate with.
        requests: in any order; those that share base prompts are computed together.
        decoding: how.
        every: tokens from one look at the rows to the next.

    Raises:
        ConfigError: a field of `decoding` is out of range, or the devices of the mesh cannot share its batch.
    """
    _check(decoding, every)
    tokenizer, config = model.prompter.tokenizer, model.config.steering
    ends = decoding.stop if model.prompter.end_id is None else (model.prompter.end_id, *decoding.stop)
    run = partial(generate, config=config, decoding=decoding, ends=ends)
    for rows, batch in make_batches(model, requests, decoding.batch):
        shown, told, going = [""] * len(rows), [0] * len(rows), [True] * len(rows)
        state = run(model.lm, batch, stop=min(every, decoding.max_new))
        while True:
            new, kept, alive, made = map(np.asarray, (state.new, state.kept, state.alive, state.made))
            for row, request in enumerate(rows):
                if not going[row]:
                    continue
                going[row] = bool(alive[row] and made < decoding.max_new)
                tokens = new[row][kept[row]].tolist()
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                # What ends in a character that is not whole yet, or in a space, may go on otherwise, or not at all.
                text = (text.rstrip("\ufffd") if going[row] else text).strip()
                yield Piece(request, text[len(shown[row]) :], tokens[told[row] :], not going[row])
                shown[row], told[row] = text, len(tokens)
            if not any(going):
                break
            stop = min(int(made) + every, decoding.max_new)
            state = proceed(model.lm, state, stop, config=config, decoding=decoding, ends=ends)


def _check(decoding: Decoding, every: int) -> None:
    """Refuses what cannot be done before any work starts."""
    ways = batch_ways()
    bounds = {
        "max_new": (decoding.max_new >= 1, "at least 1"),
        "temperature": (decoding.temperature >= 0, "0 (greedy) or a value above 0"),
        "batch": (decoding.batch >= 1 and decoding.batch % ways == 0, f"a multiple of {ways}, for as many devices"),
        "top_k": (decoding.top_k >= 0, "0 (off) or a number of tokens"),
        "top_p": (0 < decoding.top_p <= 1, "a value above 0, and 1 (off) at most"),
    }
    for name, (right, fix) in bounds.items():
        if not right:
            raise ConfigError(f"decoding.{name} is {getattr(decoding, name)}; give {fix}")
    if every < 1:
        raise ConfigError(f"every is {every}; give at least 1")


def make_batches(model: Steered, requests: Sequence[Request], size: int) -> Iterator[tuple[list[int], GenerationBatch]]:
    """Batches of `size` rows, and which request each row is; a last batch is filled up with its own rows.

    Requests of one base prompt stand together, and prompts of like length do. Prompts, pairs and lengths are rounded
    up, so that few shapes are compiled.
    """
    prompter, in_context = model.prompter, model.config.hypernet.variant == "in_context"
    texts = list(dict.fromkeys(request.prompt for request in requests))
    known = dict(zip(texts, prompter.prompt_tokens(texts), strict=True))

    def place(index: int) -> tuple[int, str, str]:
        request = requests[index]
        return len(known[request.prompt]), request.prompt, request.steering_prompt

    order = sorted(range(len(requests)), key=place)
    for start in range(0, len(order), size):
        own = order[start : start + size]
        rows = [requests[own[row % len(own)]] for row in range(size)]
        prompts = list(dict.fromkeys(row.prompt for row in rows))
        tokens, mask = left_pad([known[prompt] for prompt in _fill(prompts)], prompter.pad_id)
        where = mask.copy()
        if model.config.steering.inference_positions == "after_prefix":
            where &= np.cumsum(mask, axis=1) > prompter.prefix
        factor = np.array([row.factor if row.steering_prompt else 0.0 for row in rows], np.float32)
        steered = [row for row, by in zip(rows, factor, strict=True) if by]
        pairs = list(dict.fromkeys((row.steering_prompt, row.prompt) for row in steered))
        steering: Concepts | Vectors = Vectors(np.zeros((size, model.lm.config.width), np.float32), factor)
        if pairs:
            concepts, asked = map(list, zip(*_fill(pairs), strict=True))
            read = prompter.concept_tokens(concepts, asked if in_context else None)
            number = {pair: index for index, pair in enumerate(pairs)}
            steering = Concepts(
                model.hypernet,
                *left_pad(read, prompter.pad_id),
                prompt=np.array([prompts.index(prompt) for prompt in asked], np.int32),
                pair=np.array([number.get((row.steering_prompt, row.prompt), 0) for row in rows], np.int32),
                factor=factor,
            )
        prompt = np.array([prompts.index(row.prompt) for row in rows], np.int32)
        yield (
            own,
            GenerationBatch(tokens, mask, where, prompt, np.array([row.seed for row in rows], np.uint32), steering),
        )


def _fill(items: list[Item]) -> list[Item]:
    """The items, and some of them again, so that few different numbers of them occur."""
    return [items[index % len(items)] for index in range(_room(len(items), batch_ways()))]


def _room(count: int, unit: int) -> int:
    """The least power of two times `unit` that is not below `count`."""
    return unit * 2 ** (-(-count // unit) - 1).bit_length()


def left_pad(rows: Sequence[np.ndarray], pad_id: int) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Rows of tokens as one array that ends with every row's last token, and where its real tokens are."""
    length = _room(max(map(len, rows)), SHORTEST)
    tokens = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for row, ids in enumerate(rows):
        tokens[row, length - len(ids) :] = ids
        mask[row, length - len(ids) :] = True
    return tokens, mask
