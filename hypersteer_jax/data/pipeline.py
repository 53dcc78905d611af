"""Rows of tokens to batches of a few static shapes, and the endless order in which they come.

    rows = encode(examples, prompter, config.data, config.steering, config.hypernet.variant)
    batches = iterator(rows, config.data, config.train.batch, config.train.seed)
    batch = next(batches)                                      # a SteeringBatch of numpy arrays

Lengths are bucketed, so that padding is not paid for, and the shapes are few, so that little is compiled. The order
is a pure function of (seed, epoch): the iterator's state is one number, every host works out the same plan, and a
restored run sees exactly the batches it would have seen.

Letters: N rows, B batch, T prompt and response, C leading columns that can hold prompt tokens, R response, P steering
prompt.
"""

import functools
import sys
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import grain
import numpy as np
from jaxtyping import Bool, Float, Int

from hypersteer_jax.config import DataConfig, SteeringConfig
from hypersteer_jax.data.batch import DataError, SteeringBatch, SteeringExample
from hypersteer_jax.data.prompts import Prompter, Tokens

MULTIPLE = 8  # every static length is rounded up to it, the sublane count of a TPU tile

Length = TypeVar("Length", int, np.ndarray)


@dataclass(frozen=True, eq=False)
class Rows:
    """Encoded examples and what collating them needs."""

    tokens: list[Tokens]  # prompt, then response
    prompt_lengths: Int[np.ndarray, " N"]
    concepts: list[Tokens]
    factors: Float[np.ndarray, " N"]
    prefix: int  # leading tokens that all prompts share
    pad_id: int
    positions: Literal["after_prefix", "after_bos", "all", "prompt", "response"]
    notices: tuple[str, ...] = ()  # one line for each kind of row that was dropped or cut

    def __len__(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """Tokens of prompt and response together."""
        return np.array([len(tokens) for tokens in self.tokens], np.int32)


class Bucket(NamedTuple):
    """One static shape; each length is a multiple of 8 and T the largest of T, C and R."""

    tokens: int  # T
    context: int  # C
    response: int  # R
    concept: int  # P


def encode(
    examples: list[SteeringExample],
    prompter: Prompter,
    data: DataConfig,
    steering: SteeringConfig,
    variant: Literal["no_context", "in_context", "cross_attention"],
) -> Rows:
    """Tokens of every example that fits.

    A response longer than `data.max_response` is cut, as AxBench cuts generation. A prompt or steering prompt that is
    too long drops its row: cut, it would have lost the opening of the model's turn, or would ask for something else.
    The in_context variant reads the instruction behind the steering prompt, and may use `max_concept` + `max_prompt`.

    Raises:
        DataError: no row is left, or `data.append_end` with a tokenizer that has no end token.
    """
    if data.append_end and prompter.end_id is None:
        raise DataError(
            "data.append_end is set, but the tokenizer has no end-of-turn or end-of-sequence token; unset it"
        )
    prompts = list(dict.fromkeys(example.prompt for example in examples))
    rendered = dict(zip(prompts, map(prompter.render, prompts), strict=True))
    prompt_length = dict(zip(prompts, map(len, prompter.tokenize(list(rendered.values()))), strict=True))
    tokens = prompter.tokenize([rendered[example.prompt] + example.response for example in examples])
    if variant == "in_context":
        concepts = prompter.concept_tokens([e.steering_prompt for e in examples], [e.prompt for e in examples])
        limit, limit_name = data.max_concept + data.max_prompt, "data.max_concept + data.max_prompt"
    else:
        texts = list(dict.fromkeys(example.steering_prompt for example in examples))
        of_text = dict(zip(texts, prompter.concept_tokens(texts), strict=True))
        concepts = [of_text[example.steering_prompt] for example in examples]
        limit, limit_name = data.max_concept, "data.max_concept"

    starts = np.array([prompt_length[example.prompt] for example in examples], np.int32)
    ends = np.array([len(row) for row in tokens], np.int32)
    widths = np.array([len(row) for row in concepts], np.int32)
    dropped = {
        f"prompt longer than data.max_prompt = {data.max_prompt} tokens": starts > data.max_prompt,
        f"steering prompt longer than {limit_name} = {limit} tokens": widths > limit,
        "prompt, response or steering prompt without tokens": (starts == 0) | (ends <= starts) | (widths == 0),
    }
    keep = np.flatnonzero(~np.any(list(dropped.values()), axis=0))
    notices = [f"{rows.sum()} of {len(examples)} rows dropped: {why}" for why, rows in dropped.items() if rows.any()]
    if not len(keep):
        raise DataError("no rows left to use; " + ("; ".join(notices) or "none were given"))
    end = np.array([prompter.end_id] if data.append_end else [], np.int32)
    cut = int((ends[keep] - starts[keep] > data.max_response).sum())
    if cut:
        notices.append(f"{cut} of {len(keep)} responses cut to data.max_response = {data.max_response} tokens")
    return Rows(
        tokens=[np.concatenate([tokens[i], end])[: starts[i] + data.max_response] for i in keep],
        prompt_lengths=starts[keep],
        concepts=[concepts[i] for i in keep],
        factors=np.array([examples[i].factor for i in keep], np.float32),
        prefix=prompter.prefix,
        pad_id=prompter.pad_id,
        positions=steering.train_positions,
        notices=tuple(notices),
    )


def make_buckets(rows: Rows, count: int) -> list[Bucket]:
    """At most `count` shapes, shortest first, that compute the fewest tokens if every row takes the first that fits.

    C and R never fall from one shape to the next, so a row also fits in every later shape. P is the same in all.
    """
    totals = _bucket_lengths(rows.lengths, count)
    bucket = np.searchsorted(totals, rows.lengths)
    concept = _round_up(max(map(len, rows.concepts)))
    shapes = []
    for index, total in enumerate(totals):
        inside = bucket <= index
        context = _round_up(int(rows.prompt_lengths[inside].max()))
        response = _round_up(int((rows.lengths - rows.prompt_lengths)[inside].max()))
        shapes.append(Bucket(total, context, response, concept))
    return shapes


def _bucket_lengths(lengths: Int[np.ndarray, " N"], count: int) -> list[int]:
    """At most `count` ascending lengths that minimise the sum, over rows, of the first length that holds the row.

    Dynamic programming over the sorted distinct lengths: with one more bucket, the best cover of the j shortest ends in
    a bucket of length j that holds what the best cover of some i <= j leaves over.
    """
    choices, rows = np.unique(_round_up(lengths), return_counts=True)
    choices, below = np.append(0, choices), np.append(0, np.cumsum(rows))  # [j]: the j shortest choices
    added = np.where(below[:, None] <= below, (below - below[:, None]) * choices, np.inf)  # [i, j]
    best, cuts = np.where(choices == 0, 0.0, np.inf), []
    for _ in range(count):
        total = best[:, None] + added
        cuts.append(total.argmin(0))
        best = total.min(0)
    end, used = len(choices) - 1, []
    for cut in reversed(cuts):
        if cut[end] < end:  # else this bucket stays empty: fewer are enough
            used.append(int(choices[end]))
        end = cut[end]
    return used[::-1]


def _round_up(length: Length) -> Length:
    """The next multiple of 8, at or above `length`."""
    return -(-length // MULTIPLE) * MULTIPLE


def padding_report(rows: Rows, buckets: list[Bucket]) -> float:
    """Share of the computed tokens [B, T] that are real, when every row sits in the first bucket that holds it."""
    totals = np.array([bucket.tokens for bucket in buckets])
    return float(rows.lengths.sum() / totals[np.searchsorted(totals, rows.lengths)].sum())


def collate(rows: Rows, indices: Int[np.ndarray, " B"], bucket: Bucket) -> SteeringBatch:
    """These rows as one batch of the bucket's shape, which must hold each of them."""
    lengths, prompts = rows.lengths[indices, None], rows.prompt_lengths[indices, None]
    column, slot = np.arange(bucket.tokens, dtype=np.int32), np.arange(bucket.response, dtype=np.int32)
    mask, prompt = column < lengths, column < prompts
    tokens = np.full(mask.shape, rows.pad_id, np.int32)
    tokens[mask] = np.concatenate([rows.tokens[i] for i in indices])
    response_mask = slot < lengths - prompts
    response_index = np.where(response_mask, prompts - 1 + slot, 0).astype(np.int32)
    response_tokens = np.where(response_mask, np.take_along_axis(tokens, response_index + 1, axis=1), rows.pad_id)
    concept_lengths = np.array([len(rows.concepts[i]) for i in indices])[:, None]
    concept_mask = np.arange(bucket.concept) >= bucket.concept - concept_lengths
    concept_tokens = np.full(concept_mask.shape, rows.pad_id, np.int32)
    concept_tokens[concept_mask] = np.concatenate([rows.concepts[i] for i in indices])
    return SteeringBatch(
        tokens=tokens,
        mask=mask,
        steer_mask=_steer_mask(rows, column, mask, prompt),
        context_mask=prompt[:, : bucket.context],
        response_index=response_index,
        response_tokens=response_tokens.astype(np.int32),
        response_mask=response_mask,
        concept_tokens=concept_tokens,
        concept_mask=concept_mask,
        factor=rows.factors[indices],
    )


def _steer_mask(
    rows: Rows, column: Int[np.ndarray, " T"], mask: Bool[np.ndarray, "B T"], prompt: Bool[np.ndarray, "B T"]
) -> Bool[np.ndarray, "B T"]:
    """Positions written in training. "prompt" and "response" are the two halves of "after_prefix"."""
    match rows.positions:
        case "all":
            return mask
        case "after_bos":
            return mask & (column >= 1)
        case "after_prefix":
            return mask & (column >= rows.prefix)
        case "prompt":
            return prompt & (column >= rows.prefix)
        case "response":
            return mask & ~prompt


def epoch_plan(
    bucket_of: Int[np.ndarray, " N"], batch: int, seed: int, epoch: int
) -> list[tuple[int, Int[np.ndarray, " B"]]]:
    """The batches of one epoch as (bucket, rows), each row at most once: N // batch of them, whatever the order.

    Rows are shuffled and fill their buckets. What does not fill a batch moves on to the next longer bucket; the last
    bucket's rest, fewer than `batch` rows, waits for another epoch. Then the batches are shuffled.
    """
    # Raw bits of a counter-based generator, because numpy may change `permutation` between versions but not these.
    bits = np.random.Philox([seed, epoch])
    order = np.argsort(bits.random_raw(len(bucket_of)), kind="stable")
    batches, waiting = [], order[:0]
    for bucket in range(int(bucket_of.max()) + 1):
        waiting = np.concatenate([waiting, order[bucket_of[order] == bucket]])
        full = len(waiting) // batch * batch
        batches += [(bucket, indices) for indices in waiting[:full].reshape(-1, batch)]
        waiting = waiting[full:]
    return [batches[i] for i in np.argsort(bits.random_raw(len(batches)), kind="stable")]


@dataclass(frozen=True, eq=False)
class BatchSource:
    """All batches of all epochs by index, a Grain `RandomAccessDataSource`; batch i belongs to epoch i // (N // B)."""

    rows: Rows
    buckets: tuple[Bucket, ...]
    batch: int
    seed: int

    def __len__(self) -> int:
        return sys.maxsize  # endless, as Grain writes it

    def __getitem__(self, index: int) -> SteeringBatch:
        epoch, position = divmod(index, len(self.rows) // self.batch)
        bucket, indices = _cached_plan(self, epoch)[position]
        return collate(self.rows, indices, self.buckets[bucket])


@functools.lru_cache(maxsize=4)  # prefetching threads stand on both sides of an epoch's end
def _cached_plan(source: BatchSource, epoch: int) -> list[tuple[int, Int[np.ndarray, " B"]]]:
    bucket_of = np.searchsorted([bucket.tokens for bucket in source.buckets], source.rows.lengths)
    return epoch_plan(bucket_of, source.batch, source.seed, epoch)


def iterator(rows: Rows, data: DataConfig, batch: int, seed: int) -> grain.DatasetIterator:
    """Endless training batches. `get_state` and `set_state` give and take the place in the order.

    Raises:
        DataError: there are fewer rows than one batch needs.
    """
    if len(rows) < batch:
        raise DataError(f"train.batch is {batch}, but there are {len(rows)} rows to train on; lower it or add rows")
    source = BatchSource(rows, tuple(make_buckets(rows, data.buckets)), batch, seed)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)  # one thread is enough: under 1 ms a batch
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def evaluation_batches(rows: Rows, batch: int, limit: int) -> list[SteeringBatch]:
    """The first `limit` * `batch` rows in order, all in one shape, so that evaluation compiles once.

    The last batch is filled by repeating its rows with `response_mask` False: token sums and counts stay exact.
    """
    [bucket], batches = make_buckets(rows, 1), []
    for start in range(0, min(len(rows), limit * batch), batch):
        real = np.arange(start, min(start + batch, len(rows)))
        filled = collate(rows, np.resize(real, batch), bucket)
        filled.response_mask[len(real) :] = False
        batches.append(filled)
    return batches
