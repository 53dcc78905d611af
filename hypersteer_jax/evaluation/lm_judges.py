"""Judges that need no network: an instruct model's probabilities, the tiny world's rules, and simple proxies.

Letters: B batch, T length, K ratings (3), V vocabulary, D width.
"""

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from hypersteer_jax.data.prompts import Prompter, Tokens
from hypersteer_jax.data.tinyworld.judge import Bounds, mean_nll, rate_concept, rate_fluency, rate_instruction
from hypersteer_jax.data.tinyworld.world import (
    INSTRUCTIONS,
    MANNER_FRAMES,
    TOPIC_FRAMES,
    Concept,
    Manner,
    Subject,
    Topic,
    load_world,
)
from hypersteer_jax.evaluation.cache import Rating
from hypersteer_jax.evaluation.judges import HIGHEST, Ask, Judge, JudgeError, Rubric, fill, plain_prompt
from hypersteer_jax.models.lm import LM, ranks

OPENING = "Rating: [["  # what the instruct model's answer is made to begin with
CHOICES = ("0", "1", "2")
BATCH, MULTIPLE = 16, 64  # rows computed together, and what their lengths are rounded up to
NLL_ROWS = 256  # texts of similar length whose likelihoods are computed in one shape


def local_judge(lm: LM, prompter: Prompter, rubric: Rubric, name: str) -> Judge:
    """An instruct model that has to rate at once: the expected rating under its probabilities of "0", "1" and "2".

    Args:
        lm: the model.
        prompter: its tokenizer and chat template.
        rubric: what it is asked.
        name: of the model, for the cache.

    Raises:
        JudgeError: the tokenizer has no different tokens for the three ratings.
    """
    _context(prompter, OPENING)

    def rate(asks: Sequence[Ask]) -> Iterator[tuple[int, Rating]]:
        contexts = [_context(prompter, prompter.render(ask.prompt) + OPENING) for ask in asks]
        for rows, tokens, mask in _batches([tokens for tokens, _ in contexts], prompter.pad_id):
            choices = np.array([contexts[row][1] for row in np.resize(rows, BATCH)])
            found = np.asarray(_next_token(lm, tokens, mask, choices), np.float64)
            for row, probabilities in zip(rows, found, strict=False):
                yield row, _expected(probabilities)

    return Judge(f"local {name}", partial(fill, rubric), rate)


def _context(prompter: Prompter, text: str) -> tuple[Tokens, list[int]]:
    """Tokens of the text that come before a rating, and each rating's token; a rating may merge with what precedes."""
    rows = prompter.tokenize([text + choice for choice in CHOICES])
    first = next((column for column, ids in enumerate(zip(*rows, strict=False)) if len(set(ids)) > 1), 0)
    ids = [int(row[first]) for row in rows]
    if len(set(ids)) < len(CHOICES):
        raise JudgeError(f"the tokenizer has no different tokens for {', '.join(CHOICES)} after {text[-20:]!r}")
    return rows[0][:first], ids


def _batches(
    rows: Sequence[Tokens], pad_id: int
) -> Iterator[tuple[list[int], Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]]:
    """Indices, tokens and masks of batches of similar length, left-padded; a last batch is filled with its own rows."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        length = -(-len(rows[chosen[-1]]) // MULTIPLE) * MULTIPLE
        tokens, mask = np.full((BATCH, length), pad_id, np.int32), np.zeros((BATCH, length), bool)
        for place, row in enumerate(np.resize(chosen, BATCH)):
            tokens[place, length - len(rows[row]) :] = rows[row]
            mask[place, length - len(rows[row]) :] = True
        yield chosen, tokens, mask


@jax.jit
def _next_token(
    lm: LM, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], choices: Int[Array, "B K"]
) -> Float[Array, "B K"]:
    """Probabilities of the choices behind the last column."""
    residual = lm.run(lm.embed(tokens), ranks(mask), mask, 0, lm.config.layers)
    return jnp.take_along_axis(jax.nn.softmax(lm.unembed(residual[:, -1])), choices, axis=1)


def _expected(probabilities: Float[np.ndarray, " K"]) -> Rating:
    """Expected rating; a failure if the model gives all three no probability at all."""
    together = probabilities.sum()
    said = ", ".join(f"{choice}: {p:.3g}" for choice, p in zip(CHOICES, probabilities, strict=True))
    if not together > 0:
        return Rating(None, said)
    return Rating(float(probabilities @ np.arange(len(CHOICES)) / together), said)


def proxy_judge(lm: LM, prompter: Prompter, name: str) -> Judge:
    """Crude stand-ins for the three questions that any LM can give; how crude: `experiments/calibration.py`.

    concept, instruction: how near each of its tokens comes to some token of the text, by the cosine of their input
    embeddings, averaged over its tokens (the recall of BERTScore, arXiv 1904.09675, on input embeddings), times 2.
    fluency: 2 / perplexity, so twice the geometric mean of the probabilities of the text's tokens as an answer to the
    instruction.
    """
    table = np.asarray(lm.embedding[...], np.float32)
    table = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)

    def rate(asks: Sequence[Ask]) -> Iterator[tuple[int, Rating]]:
        for index, ask in enumerate(asks):
            if ask.question != "fluency":
                asked = ask.item.concept if ask.question == "concept" else ask.item.instruction
                yield index, _similarity(table, *_without_bos(prompter, [asked, ask.item.text]))
        for index, nll in _likelihoods(lm, prompter, asks):
            empty = not asks[index].item.text.strip()
            yield index, Rating(0.0 if empty else HIGHEST * float(np.exp(-nll)), f"{nll:.4f} nats a token")

    return Judge(f"proxy {name}", plain_prompt, rate)


def _without_bos(prompter: Prompter, texts: Sequence[str]) -> list[Tokens]:
    return [tokens[len(prompter.bos) :] for tokens in prompter.tokenize(texts)]


def _similarity(table: Float[np.ndarray, "V D"], asked: Tokens, text: Tokens) -> Rating:
    if not len(asked) or not len(text):
        return Rating(0.0, "nothing to compare")
    nearest = (table[asked] @ table[np.unique(text)].T).max(axis=1)
    cosine = float(nearest.mean())
    return Rating(HIGHEST * min(1.0, max(0.0, cosine)), f"mean cosine {cosine:.4f}")


def _likelihoods(lm: LM, prompter: Prompter, asks: Sequence[Ask]) -> Iterator[tuple[int, float]]:
    """Index and nats per token of the texts whose fluency is asked for, those of similar length together."""
    rows = [index for index, ask in enumerate(asks) if ask.question == "fluency"]
    rows.sort(key=lambda row: len(asks[row].item.instruction) + len(asks[row].item.text))
    for start in range(0, len(rows), NLL_ROWS):
        chosen = rows[start : start + NLL_ROWS]
        items = [asks[row].item for row in chosen]
        nlls = mean_nll(lm, prompter, [item.instruction for item in items], [item.text for item in items])
        yield from zip(chosen, nlls, strict=True)


def rules_judge(lm: LM, prompter: Prompter, bounds: Bounds) -> Judge:
    """The tiny world's rules, for texts about its concepts and subjects; any other item is a failure.

    Args:
        lm: the tiny world's base LM, unsteered, which measures fluency.
        prompter: its tokenizer.
        bounds: of fluency.
    """

    def rate(asks: Sequence[Ask]) -> Iterator[tuple[int, Rating]]:
        for index, ask in enumerate(asks):
            if ask.question != "fluency":
                found = _by_rule(ask)
                yield index, Rating(None, "not of the tiny world") if found is None else Rating(found, "by rule")
        for index, nll in _likelihoods(lm, prompter, asks):
            rating = rate_fluency(nll, asks[index].item.text, bounds)
            yield index, Rating(float(rating), f"{nll:.4f} nats a token")

    return Judge("rules", plain_prompt, rate)


def _by_rule(ask: Ask) -> int | None:
    """Rating of concept or instruction; None if the tiny world has no such thing."""
    if ask.question == "concept":
        concept = find_concept(ask.item.concept)
        return None if concept is None else rate_concept(concept, ask.item.text)
    subject = _names().subjects.get(ask.item.instruction)
    return None if subject is None else rate_instruction(subject, ask.item.text)


class Names(NamedTuple):
    """Every phrase of the tiny world, and what it names."""

    topics: dict[str, Topic]
    manners: dict[str, Manner]
    subjects: dict[str, Subject]


@cache
def _names() -> Names:
    world = load_world()
    return Names(
        {frame.format(name): topic for topic in world.topics for name in topic.names for frame in TOPIC_FRAMES},
        {frame.format(name): manner for manner in world.manners for name in manner.names for frame in MANNER_FRAMES},
        {frame.format(subject.name): subject for subject in world.subjects for frame in INSTRUCTIONS},
    )


def find_concept(steering_prompt: str) -> Concept | None:
    """The tiny world's concept that a steering prompt, in any phrasing, means."""
    names = _names()
    if steering_prompt in names.topics:
        return Concept(names.topics[steering_prompt], None)
    if steering_prompt in names.manners:
        return Concept(None, names.manners[steering_prompt])
    topic, _, manner = steering_prompt.partition(", in ")
    pair = topic in names.topics and manner in names.manners
    return Concept(names.topics[topic], names.manners[manner]) if pair else None
