"""Rows of tokens to batches of a few static shapes, and the endless order in which they come.

    rows = encode(examples, prompter, config.data, config.steering, config.hypernet.variant)
    layout = make_layout(rows, config.data, config.train.seed)
    batches = iterator(rows, layout, config.train.batch, config.train.seed)
    batch = next(batches)                                      # a SteeringBatch of numpy arrays

Rows are put two into a sequence, a long one with a short one, and sequences are bucketed by length, so that padding is
not paid for; the shapes are few, so that little is compiled. The order is a pure function of (seed, epoch): the
iterator's state is one number, every host works out the same plan, and a restored run sees exactly the batches it would
have seen.

Letters: N rows, M sequences, K rows in each, B rows of a batch, S sequences of it, T their length, C context of a row,
R scored tokens of a sequence, P steering prompt.
"""

import functools
import math
import sys
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import grain
import numpy as np
from jaxtyping import Bool, Float, Int

from hypersteer_jax.config import DataConfig, SteeringConfig
from hypersteer_jax.data.batch import DataError, SteeringBatch, SteeringExample
from hypersteer_jax.data.prompts import Prompter, Tokens
from hypersteer_jax.sharding import Share

ALL = Share()  # of a batch: there is one process
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
    context: bool  # whether the hypernetwork reads one; if not, rows share what is written for their steering prompt
    notices: tuple[str, ...] = ()  # one line for each kind of row that was dropped or cut

    def __len__(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """Tokens of prompt and response together."""
        return np.array([len(tokens) for tokens in self.tokens], np.int32)

    @functools.cached_property
    def concept_ids(self) -> Int[np.ndarray, " N"]:
        """Equal numbers for equal steering prompts, 0 to their number - 1."""
        ids: dict[bytes, int] = {}
        return np.array([ids.setdefault(concept.tobytes(), len(ids)) for concept in self.concepts])


class Bucket(NamedTuple):
    """One static shape; each length is a multiple of 8."""

    tokens: int  # T of a sequence
    context: int  # C of a row
    response: int  # R of a sequence
    concept: int  # P
    rows: int = 1  # in a sequence


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
        context=variant == "cross_attention",
        notices=tuple(notices),
    )


def pair(rows: Rows, inside: Int[np.ndarray, " n"], seed: int) -> Int[np.ndarray, "m 2"]:
    """Rows two by two, the longest with the shortest and so on inwards, so that all pairs are about equally long.

    Which of equally long rows meet depends on the seed. If their number is odd, one of them, drawn by the seed, stays
    out.
    """
    shuffled = inside[_random_order(np.random.Philox(seed), len(inside))][: len(inside) // 2 * 2]
    ordered = shuffled[np.argsort(rows.lengths[shuffled], kind="stable")]
    short, long = np.split(ordered, 2)
    return np.stack([long[::-1], short], axis=1)


class Layout(NamedTuple):
    """How the rows of a run lie in sequences, and these in batches; the same in every epoch."""

    sequences: Int[np.ndarray, "M K"]  # rows in each sequence
    bucket_of: Int[np.ndarray, " M"]  # which shape each sequence has
    buckets: tuple[Bucket, ...]


def make_layout(rows: Rows, data: DataConfig, seed: int) -> Layout:
    """Sequences, and the at most `data.buckets` shapes that compute the fewest tokens for them.

    Rows are grouped by the length of their steering prompts, then within a group by the length of their sequence. The
    last shape holds every sequence, since what does not fill a batch elsewhere goes there (`epoch_plan`).
    """
    layouts = [_layout(rows, groups, data, seed) for groups in range(1, data.buckets + 1)]
    return min(layouts, key=lambda layout: sum(computed_tokens(layout)))


def _layout(rows: Rows, groups: int, data: DataConfig, seed: int) -> Layout:
    """The layout with at most so many groups, the shapes shared out evenly among them."""
    concepts = np.array([len(concept) for concept in rows.concepts])
    widths = bucket_lengths(concepts, groups)
    group_of = np.searchsorted(widths, concepts)
    waiting = np.array([], np.int64)
    sequences, buckets = [], []
    for group, width in enumerate(widths):
        inside = np.concatenate([waiting, np.flatnonzero(group_of == group)])
        members = pair(rows, inside, seed) if data.pack else inside[:, None]
        waiting = np.setdiff1d(inside, members)  # one row at most, which also fits in the next group
        if not len(members):
            continue
        totals = rows.lengths[members].sum(1)
        lengths = bucket_lengths(totals, data.buckets // len(widths))
        bucket_of = np.searchsorted(lengths, totals)
        for index, length in enumerate(lengths):
            sequences.append(members[bucket_of == index])
            buckets.append(_shape(rows, sequences[-1], length, width))
    buckets[-1:] = [Bucket(*(max(sizes) for sizes in zip(*buckets, strict=True)))] if buckets else []
    counts = [len(members) for members in sequences]
    width = 1 + data.pack
    return Layout(
        np.concatenate([np.empty((0, width), np.int64), *sequences]),
        np.repeat(np.arange(len(counts)), counts),
        tuple(buckets),
    )


def _shape(rows: Rows, sequences: Int[np.ndarray, "M K"], tokens: int, concept: int) -> Bucket:
    """The smallest shape of this T and P that holds the sequences."""
    prompts = rows.prompt_lengths[sequences]
    responses = (rows.lengths[sequences] - prompts).sum(1)
    return Bucket(tokens, _round_up(int(prompts.max())), _round_up(int(responses.max())), concept, sequences.shape[1])


def bucket_lengths(lengths: Int[np.ndarray, " N"], count: int) -> list[int]:
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


def _round_up(length: Length, multiple: int = MULTIPLE) -> Length:
    """The next multiple at or above `length`."""
    return -(-length // multiple) * multiple


def computed_tokens(layout: Layout) -> tuple[int, int]:
    """Tokens that an epoch computes, padding included: of sequences, and of steering prompts."""
    shapes = [layout.buckets[bucket] for bucket in layout.bucket_of]
    return sum(shape.tokens for shape in shapes), sum(shape.concept * shape.rows for shape in shapes)


def padding_report(rows: Rows, layout: Layout) -> tuple[float, float]:
    """Share of the computed tokens that are real: of sequences [S, T], and of steering prompts [B, P]."""
    placed = layout.sequences.ravel()
    sequences, concepts = computed_tokens(layout)
    return float(rows.lengths[placed].sum() / sequences), sum(len(rows.concepts[row]) for row in placed) / concepts


def collate(rows: Rows, sequences: Int[np.ndarray, "S K"], bucket: Bucket, share: Share = ALL) -> SteeringBatch:
    """These sequences of rows as one batch of the bucket's shape, which must hold each of them.

    Of a batch that several processes share, only this one's part is made.
    """
    whole = sequences.ravel()
    sequences = share.of(sequences)
    flat = sequences.ravel()
    lengths, prompts = rows.lengths[sequences], rows.prompt_lengths[sequences]
    responses = lengths - prompts
    starts, slots = (np.cumsum(counts, axis=1, dtype=np.int32) - counts for counts in (lengths, responses))
    column, slot = np.arange(bucket.tokens, dtype=np.int32), np.arange(bucket.response, dtype=np.int32)
    shape, scored = (len(sequences), bucket.tokens), (len(sequences), bucket.response)
    tokens, segments = np.full(shape, rows.pad_id, np.int32), np.zeros(shape, np.int32)
    steer_mask = np.zeros(shape, bool)
    response_index, response_share = np.zeros(scored, np.int32), np.zeros(scored, np.float32)
    for k, members in enumerate(sequences.T):
        start, length, prompt, response, first = (x[:, k, None] for x in (starts, lengths, prompts, responses, slots))
        here = (start <= column) & (column < start + length)
        segments[here] = k + 1
        tokens[here] = np.concatenate([rows.tokens[row] for row in members])
        steer_mask |= here & _steered(rows, column - start, prompt)
        here = (first <= slot) & (slot < first + response)
        response_index[here] = (start + prompt - 1 + slot - first)[here]
        response_share[here] = np.broadcast_to(1 / response, scored)[here]
    following = np.take_along_axis(tokens, np.minimum(response_index + 1, bucket.tokens - 1), axis=1)
    context = np.arange(bucket.context, dtype=np.int32)
    context_mask = context < prompts.reshape(-1, 1)
    if rows.context:
        concepts, concept_row = [rows.concepts[row] for row in flat], share.of(np.arange(len(whole)))
    else:
        distinct, concept_row = _distinct(rows, whole, share.ways)
        concepts, concept_row = [rows.concepts[row] for row in share.of(distinct)], share.of(concept_row)
    concept_mask = np.arange(bucket.concept) >= bucket.concept - np.array([len(c) for c in concepts])[:, None]
    concept_tokens = np.full(concept_mask.shape, rows.pad_id, np.int32)
    concept_tokens[concept_mask] = np.concatenate(concepts)
    return SteeringBatch(
        tokens=tokens,
        segments=segments,
        steer_mask=steer_mask,
        context_index=np.where(context_mask, starts.reshape(-1, 1) + context, 0).astype(np.int32),
        context_mask=context_mask,
        response_index=response_index,
        response_tokens=np.where(response_share > 0, following, rows.pad_id).astype(np.int32),
        response_share=response_share,
        concept_tokens=concept_tokens,
        concept_mask=concept_mask,
        concept_row=concept_row.astype(np.int32),
        factor=rows.factors[flat],
        row=flat.astype(np.int32),
    )


def _steered(rows: Rows, position: Int[np.ndarray, "S T"], prompt: Int[np.ndarray, "S 1"]) -> Bool[np.ndarray, "S T"]:
    """Positions of a row that are written in training. "prompt" and "response" are the halves of "after_prefix"."""
    match rows.positions:
        case "all":
            return position >= 0
        case "after_bos":
            return position >= 1
        case "after_prefix":
            return position >= rows.prefix
        case "prompt":
            return (position >= rows.prefix) & (position < prompt)
        case "response":
            return position >= prompt


def _distinct(
    rows: Rows, flat: Int[np.ndarray, " B"], ways: int
) -> tuple[Int[np.ndarray, " U"], Int[np.ndarray, " B"]]:
    """A row for each steering prompt of the batch, and which of them is whose.

    Their number is the same in every batch: that of all the data, or that of the rows if it is smaller; as the rows, it
    is a multiple of the devices that share them. Places left over repeat the first.
    """
    _, firsts, concept_row = np.unique(rows.concept_ids[flat], return_index=True, return_inverse=True)
    places = min(len(flat), _round_up(int(rows.concept_ids.max()) + 1, math.lcm(MULTIPLE, ways)))
    return flat[np.append(firsts, np.repeat(firsts[:1], places - len(firsts)))], concept_row


def epoch_plan(
    bucket_of: Int[np.ndarray, " M"], batch: int, seed: int, epoch: int
) -> list[tuple[int, Int[np.ndarray, " S"]]]:
    """The batches of one epoch as (bucket, sequences), each sequence at most once: M // batch of them in any order.

    Sequences are shuffled and fill their buckets. What does not fill a batch moves on to the last bucket, whose rest,
    fewer than `batch` sequences, waits for another epoch. Then the batches are shuffled.
    """
    # Raw bits of a counter-based generator, because numpy may change `permutation` between versions but not these.
    bits = np.random.Philox([seed, epoch])
    order = _random_order(bits, len(bucket_of))
    last = int(bucket_of.max())
    batches, waiting = [], order[:0]
    for bucket in range(last + 1):
        inside = order[bucket_of[order] == bucket]
        if bucket == last:
            inside = np.concatenate([waiting, inside])
        full = len(inside) // batch * batch
        batches += [(bucket, indices) for indices in inside[:full].reshape(-1, batch)]
        waiting = np.concatenate([waiting, inside[full:]])
    return [batches[i] for i in _random_order(bits, len(batches))]


def _random_order(bits: np.random.Philox, count: int) -> Int[np.ndarray, " count"]:
    return np.argsort(bits.random_raw(count), kind="stable")


@dataclass(frozen=True, eq=False)
class BatchSource:
    """All batches of all epochs by index, a Grain `RandomAccessDataSource`; batch i belongs to epoch i // (M // S)."""

    rows: Rows
    layout: Layout
    batch: int  # sequences, S
    seed: int
    share: Share = ALL

    def __len__(self) -> int:
        return sys.maxsize  # endless, as Grain writes it

    def __getitem__(self, index: int) -> SteeringBatch:
        epoch, position = divmod(index, len(self.layout.sequences) // self.batch)
        bucket, indices = _cached_plan(self, epoch)[position]
        return collate(self.rows, self.layout.sequences[indices], self.layout.buckets[bucket], self.share)


@functools.lru_cache(maxsize=4)  # prefetching threads stand on both sides of an epoch's end
def _cached_plan(source: BatchSource, epoch: int) -> list[tuple[int, Int[np.ndarray, " S"]]]:
    return epoch_plan(source.layout.bucket_of, source.batch, source.seed, epoch)


def iterator(rows: Rows, layout: Layout, batch: int, seed: int, share: Share = ALL) -> grain.DatasetIterator:
    """Endless training batches of `batch` rows. `get_state` and `set_state` give and take the place in the order.

    The order is the same whatever the number of processes; each makes its own `share` of every batch.

    Raises:
        DataError: there are fewer rows than one batch needs, or `batch` is no whole number of sequences, or not the
            same number of them for each device.
    """
    each = layout.sequences.shape[1]
    if batch % each:
        raise DataError(
            f"train.batch is {batch}, but data.pack puts {each} rows into a sequence; give an even number or unset it"
        )
    if layout.sequences.size < batch:
        raise DataError(f"train.batch is {batch}, but there are {len(rows)} rows to train on; lower it or add rows")
    if batch // each % share.ways:
        raise DataError(
            f"train.batch is {batch}, {batch // each} sequences, which {share.ways} devices (mesh.data x mesh.fsdp) "
            f"cannot share evenly; give a multiple of {each * share.ways}, or set mesh.tensor or fewer devices"
        )
    source = BatchSource(rows, layout, batch // each, seed, share)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)  # one thread is enough: under 1 ms a batch
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def evaluation_batches(rows: Rows, batch: int, limit: int, share: Share = ALL) -> list[SteeringBatch]:
    """The first `limit` * `batch` rows in order, all in one shape, so that evaluation compiles once.

    The last batch is filled by repeating its rows with `response_share` 0: token sums and counts stay exact.
    """
    longest = int(rows.lengths.max()), max(len(concept) for concept in rows.concepts)
    bucket, batches = _shape(rows, np.arange(len(rows))[:, None], *map(_round_up, longest)), []
    for start in range(0, min(len(rows), limit * batch), batch):
        real = np.arange(start, min(start + batch, len(rows)))
        filled = collate(rows, np.resize(real, batch)[:, None], bucket, share)
        filled.response_share[share.of(np.arange(batch)) >= len(real)] = 0
        batches.append(filled)
    return batches
