"""From examples to batches: exact masks, bucket shapes, and an order that can be resumed."""

import dataclasses
from itertools import islice, product

import numpy as np
import pytest

from hypersteer_jax.config import DataConfig, SteeringConfig
from hypersteer_jax.data import pipeline
from hypersteer_jax.data.batch import DataError, SteeringBatch, SteeringExample
from hypersteer_jax.data.pipeline import Bucket, Rows
from hypersteer_jax.data.prompts import Prompter
from hypersteer_jax.data.readers import read

from .test_prompts import IDS, tokenizer

A, B, C, D = (IDS[word] for word in "abcd")
HEAD = [IDS[word] for word in ("<bos>", "<start_of_turn>", "user", "\n")]
TAIL = [IDS[word] for word in ("<end_of_turn>", "\n", "<start_of_turn>", "model", "\n")]


@pytest.fixture(scope="module")
def prompter() -> Prompter:
    return Prompter(tokenizer())


def encode(examples, prompter, variant="cross_attention", positions="after_prefix", **data) -> Rows:
    return pipeline.encode(examples, prompter, DataConfig(**data), SteeringConfig(train_positions=positions), variant)


def rows_of(lengths, prompt=2, concept=3, context=True) -> Rows:
    """Rows whose tokens all equal their index + 1, so that a batch tells which rows it holds."""
    return Rows(
        tokens=[np.full(length, index + 1, np.int32) for index, length in enumerate(lengths)],
        prompt_lengths=np.full(len(lengths), prompt, np.int32),
        concepts=[np.full(concept, index + 1, np.int32) for index in range(len(lengths))],
        factors=np.ones(len(lengths), np.float32),
        prefix=1,
        pad_id=0,
        positions="after_prefix",
        context=context,
    )


def one_each(*rows: int) -> np.ndarray:
    """One row in each sequence."""
    return np.array(rows)[:, None]


def layout_of(rows: Rows, buckets: int, pack: bool = False) -> pipeline.Layout:
    return pipeline.make_layout(rows, DataConfig(buckets=buckets, pack=pack), seed=0)


def bucket_of(rows: Rows) -> Bucket:
    return layout_of(rows, 1).buckets[0]


def assert_same(one: SteeringBatch, two: SteeringBatch) -> None:
    for left, right in zip(one, two, strict=True):
        np.testing.assert_array_equal(left, right)


EXAMPLES = [
    SteeringExample("a b", "c", "d a", concept="x", factor=2.0),
    SteeringExample("d", "c c c", "b", concept="y"),
]


def test_batch_exactly(prompter):
    rows = encode(EXAMPLES, prompter)
    batch = pipeline.collate(rows, one_each(0, 1), Bucket(tokens=16, context=12, response=3, concept=4))
    np.testing.assert_array_equal(
        batch.tokens, [[*HEAD, C, *TAIL, D, A, 0, 0, 0, 0], [*HEAD, C, C, C, *TAIL, B, 0, 0, 0]]
    )
    assert batch.mask.sum(1).tolist() == [12, 13]
    assert batch.mask[0].tolist() == [True] * 12 + [False] * 4
    assert batch.steer_mask[0].tolist() == [False] * 4 + [True] * 8 + [False] * 4
    assert batch.context_mask[0].tolist() == [True] * 10 + [False] * 2
    assert batch.context_mask[1].tolist() == [True] * 12
    assert batch.context_index.tolist() == [[*range(10), 0, 0], [*range(12)]]
    assert batch.response_index.tolist() == [[9, 10, 0], [11, 0, 0]]
    assert batch.response_tokens.tolist() == [[D, A, 0], [B, 0, 0]]
    assert batch.response_share.tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]
    assert batch.response_mask.tolist() == [[True, True, False], [True, False, False]]
    assert batch.concept_tokens.tolist() == [[0, IDS["<bos>"], A, B], [0, 0, IDS["<bos>"], D]]
    assert batch.concept_mask.tolist() == [[False, True, True, True], [False, False, True, True]]
    assert batch.factor.tolist() == [2.0, 1.0]
    assert batch.concept_row.tolist() == batch.row.tolist() == [0, 1]
    kinds = {name: array.dtype.name for name, array in batch._asdict().items()}
    assert {kinds[name] for name in kinds if name.endswith("mask")} == {"bool"}
    assert {kinds[name] for name in kinds if name.endswith(("tokens", "segments", "index", "row"))} == {"int32"}
    assert kinds["factor"] == kinds["response_share"] == "float32"


def test_two_rows_in_a_sequence_exactly(prompter):
    rows = encode([*EXAMPLES, SteeringExample("a", "b", "c d a", concept="z")], prompter)
    shape = Bucket(tokens=28, context=12, response=6, concept=4, rows=2)
    batch = pipeline.collate(rows, np.array([[0, 1], [2, 0]]), shape)
    first, second, third = rows.tokens
    np.testing.assert_array_equal(batch.tokens[0], [*first, *second, 0, 0, 0])
    np.testing.assert_array_equal(batch.tokens[1], [*third, *first, 0, 0, 0])
    assert batch.segments.tolist() == [[1] * 12 + [2] * 13 + [0] * 3, [1] * 13 + [2] * 12 + [0] * 3]
    assert batch.steer_mask[0].tolist() == [False] * 4 + [True] * 8 + [False] * 4 + [True] * 9 + [False] * 3
    assert batch.context_mask.sum(1).tolist() == [10, 12, 10, 10]
    assert batch.context_index[1].tolist() == [*range(12, 24)]
    assert batch.context_index[3].tolist() == [*range(13, 23), 0, 0]
    assert batch.response_index.tolist() == [[9, 10, 23, 0, 0, 0], [9, 10, 11, 22, 23, 0]]
    assert batch.response_tokens.tolist() == [[D, A, B, 0, 0, 0], [C, D, A, D, A, 0]]
    third_each = np.float32(1 / 3)
    np.testing.assert_array_equal(batch.response_share[1], [third_each, third_each, third_each, 0.5, 0.5, 0])
    assert batch.concept_mask.sum(1).tolist() == [3, 2, 2, 3]
    assert batch.factor.tolist() == [2.0, 1.0, 1.0, 2.0]
    assert batch.row.tolist() == [0, 1, 2, 0]


def test_steering_prompts_without_a_context_stand_in_the_batch_once():
    rows = rows_of([9] * 40, context=False)
    rows = dataclasses.replace(rows, concepts=[rows.concepts[row % 3] for row in range(40)])
    batch = pipeline.collate(rows, one_each(*range(16, 32)), bucket_of(rows))
    assert batch.concept_tokens.shape == (8, 8)  # three, and places up to a multiple of eight
    for row, concept in zip(range(16, 32), batch.concept_row.tolist(), strict=True):
        np.testing.assert_array_equal(batch.concept_tokens[concept][batch.concept_mask[concept]], rows.concepts[row])
    few = pipeline.collate(rows, one_each(4, 5), bucket_of(rows))
    assert few.concept_tokens.shape == (2, 8)  # never more than rows
    whole = pipeline.collate(dataclasses.replace(rows, context=True), one_each(*range(16)), bucket_of(rows))
    assert whole.concept_tokens.shape == (16, 8)
    assert whole.concept_row.tolist() == list(range(16))


@pytest.mark.parametrize(
    ("positions", "steered"),
    [
        ("all", range(0, 12)),
        ("after_bos", range(1, 12)),
        ("after_prefix", range(4, 12)),
        ("prompt", range(4, 10)),
        ("response", range(10, 12)),
    ],
)
def test_steered_positions(prompter, positions, steered):
    rows = encode(EXAMPLES, prompter, positions=positions)
    batch = pipeline.collate(rows, one_each(0), bucket_of(rows))
    assert np.flatnonzero(batch.steer_mask[0]).tolist() == list(steered)
    packed = pipeline.collate(rows, np.array([[1, 0]]), Bucket(tokens=32, context=16, response=8, concept=8, rows=2))
    behind = packed.steer_mask[0][len(rows.tokens[1]) :]
    assert np.flatnonzero(behind).tolist() == list(steered)  # counted from the row's own first token


def test_logits_of_the_indexed_column_predict_the_response(prompter):
    rows = encode(EXAMPLES, prompter)
    batch = pipeline.collate(rows, one_each(0, 1), bucket_of(rows))
    following = np.take_along_axis(batch.tokens, batch.response_index + 1, axis=1)
    np.testing.assert_array_equal(following[batch.response_mask], batch.response_tokens[batch.response_mask])


def test_prompt_length_is_that_of_the_prompt_alone(prompter):
    """A response that merges with the end of the prompt, as in the release: the merged token counts as prompt."""
    rows = encode([SteeringExample("a", "c", "\nd", concept="x")], prompter)
    assert rows.tokens[0].tolist() == [*HEAD, C, *TAIL[:-1], IDS["\n\n"], D]
    assert rows.prompt_lengths.tolist() == [10]


def test_long_responses_are_cut(prompter):
    rows = encode([SteeringExample("a", "c", "a b c d", concept="x"), EXAMPLES[0]], prompter, max_response=3)
    assert rows.tokens[0][10:].tolist() == [A, B, C]
    assert rows.notices == ("1 of 2 responses cut to data.max_response = 3 tokens",)


def test_end_token_is_scored_unless_the_response_is_cut(prompter):
    examples = [SteeringExample("a", "c", text, concept="x") for text in ("a", "a b", "a b c")]
    rows = encode(examples, prompter, max_response=2, append_end=True)
    end = IDS["<end_of_turn>"]
    assert [row[10:].tolist() for row in rows.tokens] == [[A, end], [A, B], [A, B]]


def test_no_end_token_by_default(prompter):
    assert encode(EXAMPLES, prompter).tokens[0][-1] == A


def test_long_prompts_and_steering_prompts_drop_the_row(prompter):
    rows = encode([*EXAMPLES, SteeringExample("a a a", "c", "d", concept="z")], prompter, max_prompt=10, max_concept=3)
    assert len(rows) == 1
    assert rows.tokens[0].tolist() == [*HEAD, C, *TAIL, D, A]
    assert rows.notices == (
        "1 of 3 rows dropped: prompt longer than data.max_prompt = 10 tokens",
        "1 of 3 rows dropped: steering prompt longer than data.max_concept = 3 tokens",
    )
    with pytest.raises(
        DataError, match=r"no rows left to use; 2 of 2 rows dropped: prompt longer than data\.max_prompt"
    ):
        encode(EXAMPLES, prompter, max_prompt=5)


def test_response_without_tokens_drops_the_row(prompter):
    rows = encode([*EXAMPLES, SteeringExample("a", "c", " ", concept="z")], prompter)
    assert len(rows) == 2
    assert "response or steering prompt without tokens" in rows.notices[0]


def test_in_context_rows_hold_the_instruction(prompter):
    rows = encode(EXAMPLES, prompter, variant="in_context")
    assert rows.concepts[0].tolist() == [IDS[word] for word in ("<bos>", "a", "b", "\n\n", "Input:", "c")]


def test_missing_end_token(prompter):
    ending = Prompter(prompter.tokenizer)
    ending.end_id = None
    with pytest.raises(DataError, match=r"data\.append_end is set, but the tokenizer has no end"):
        encode(EXAMPLES, ending, append_end=True)


def test_buckets_are_optimal():
    lengths = np.random.default_rng(0).integers(4, 100, 60)
    choices = sorted({-(-length // 8) * 8 for length in lengths.tolist()})

    def computed(totals: list[int]) -> int:
        return sum(min(total for total in totals if total >= length) for length in lengths)

    for count in (1, 2, 3):
        totals = [bucket.tokens for bucket in layout_of(rows_of(lengths), count).buckets]
        best = min(computed([*cut, choices[-1]]) for cut in product(choices, repeat=count - 1))
        assert computed(totals) == best
        assert len(totals) <= count
        assert totals == sorted(totals)


def test_shapes_hold_their_sequences_and_the_last_one_all():
    rows = Rows(
        tokens=[np.ones(length, np.int32) for length in (30, 30, 20, 31)],
        prompt_lengths=np.array([9, 2, 3, 3], np.int32),
        concepts=[np.ones(length, np.int32) for length in (3, 33, 2, 2)],
        factors=np.ones(4, np.float32),
        prefix=1,
        pad_id=0,
        positions="all",
        context=True,
    )
    # The row of the long steering prompt goes alone, in a shape that holds all others, too.
    layout = layout_of(rows, 2)
    assert layout.buckets == (Bucket(32, 16, 32, 8), Bucket(32, 16, 32, 40))
    assert layout.sequences.tolist() == [[0], [2], [3], [1]]
    assert layout.bucket_of.tolist() == [0, 0, 0, 1]
    assert pipeline.padding_report(rows, layout) == (111 / (4 * 32), 40 / (3 * 8 + 40))
    assert layout_of(rows, 1).buckets == (Bucket(32, 16, 32, 40),)


@pytest.mark.parametrize("pack", [False, True])
def test_every_row_fits_in_its_shape(pack):
    rng = np.random.default_rng(1)
    rows = rows_of(rng.integers(8, 90, 301), prompt=7)
    rows = dataclasses.replace(rows, concepts=[np.ones(length, np.int32) for length in rng.integers(2, 60, 301)])
    layout = layout_of(rows, 6, pack)
    assert 4 <= len(layout.buckets) <= 6
    placed = layout.sequences.ravel().tolist()
    assert len(set(placed)) == len(placed) == (300 if pack else 301)
    for row, bucket in zip(layout.sequences, layout.bucket_of, strict=True):
        for shape in (layout.buckets[bucket], layout.buckets[-1]):
            assert rows.lengths[row].sum() <= shape.tokens
            assert max(len(rows.concepts[each]) for each in row) <= shape.concept
            pipeline.collate(rows, row[None], shape)  # C and R hold it as well, or this raises


def test_pairs_are_about_equally_long_and_drawn_by_the_seed():
    lengths = np.random.default_rng(0).integers(8, 90, 200)
    lengths[::2] = 50
    rows = rows_of(lengths)
    pairs = [pipeline.pair(rows, np.arange(200), seed) for seed in (0, 1, 0)]
    np.testing.assert_array_equal(pairs[0], pairs[2])
    assert (pairs[0] != pairs[1]).any()
    totals = lengths[pairs[0]].sum(1)
    assert totals.std() < 0.3 * lengths[np.arange(200).reshape(-1, 2)].sum(1).std()
    assert (lengths[pairs[0][:, 0]] >= lengths[pairs[0][:, 1]]).all()


def test_epoch_plan_uses_each_row_at_most_once():
    bucket_of = np.random.default_rng(0).integers(0, 4, 103)
    for epoch in range(3):
        plan = pipeline.epoch_plan(bucket_of, batch=8, seed=0, epoch=epoch)
        used = np.concatenate([indices for _, indices in plan])
        assert [len(indices) for _, indices in plan] == [8] * (103 // 8)
        assert len(set(used.tolist())) == len(used)
        assert all((bucket_of[indices] == bucket).all() for bucket, indices in plan if bucket < 3)


def test_left_over_sequences_move_to_the_last_bucket_and_its_rest_waits():
    bucket_of = np.array([0, 0, 0, 1, 1, 1, 2])  # one of bucket 0 and one of 1 move to 2, which has three of them then
    plan = pipeline.epoch_plan(bucket_of, batch=2, seed=0, epoch=0)
    assert sorted(bucket for bucket, _ in plan) == [0, 1, 2]
    [moved] = [indices for bucket, indices in plan if bucket == 2]
    assert sorted(bucket_of[moved].tolist()) == [0, 1]


def test_epoch_plan_is_a_pure_function():
    """These literals were made by another process; a change here breaks the resuming of running experiments."""
    plan = pipeline.epoch_plan(np.array([0, 0, 0, 1, 1, 1, 1, 0]), batch=2, seed=7, epoch=3)
    assert [(bucket, indices.tolist()) for bucket, indices in plan] == [
        (0, [0, 2]),
        (1, [3, 5]),
        (1, [6, 4]),
        (0, [7, 1]),
    ]


def test_epoch_plan_differs_between_epochs_and_seeds():
    plans = [pipeline.epoch_plan(np.zeros(64, int), 4, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    orders = {tuple(np.concatenate([indices for _, indices in plan]).tolist()) for plan in plans}
    assert len(orders) == 4


def test_iterator_resumes_exactly_within_and_across_epochs():
    rows = rows_of(np.random.default_rng(0).integers(4, 60, 50))
    layout = layout_of(rows, 3, pack=True)
    expected = list(islice(pipeline.iterator(rows, layout, batch=8, seed=0), 20))  # an epoch is 6 batches
    for done in (4, 6, 17):
        running = pipeline.iterator(rows, layout, batch=8, seed=0)
        for _ in range(done):
            next(running)
        restored = pipeline.iterator(rows, layout_of(rows, 3, pack=True), batch=8, seed=0)
        restored.set_state(running.get_state())
        for batch in expected[done:]:
            assert_same(next(restored), batch)


def test_iterator_serves_whole_epochs_without_repeats():
    rows = rows_of(np.random.default_rng(0).integers(4, 60, 50))
    batches = list(islice(pipeline.iterator(rows, layout_of(rows, 3, pack=True), batch=8, seed=0), 12))
    for epoch in (batches[:6], batches[6:]):
        seen = [row for batch in epoch for row in batch.row.tolist()]
        assert len(set(seen)) == 48
        assert all(np.isin(batch.tokens[batch.mask], batch.row + 1).all() for batch in epoch)
    assert len({batch.tokens.shape for batch in batches}) <= 3


def test_batch_larger_than_the_data():
    with pytest.raises(DataError, match=r"train\.batch is 8, but there are 7 rows to train on"):
        pipeline.iterator(rows := rows_of([9] * 7), layout_of(rows, 1), batch=8, seed=0)
    with pytest.raises(DataError, match=r"train\.batch is 8, but there are 1 rows to train on"):
        pipeline.iterator(rows := rows_of([9]), layout_of(rows, 1, pack=True), batch=8, seed=0)


def test_odd_batch_of_pairs():
    rows = rows_of([9] * 7)
    with pytest.raises(DataError, match=r"train\.batch is 3, but data\.pack puts 2 rows into a sequence"):
        pipeline.iterator(rows, layout_of(rows, 1, pack=True), batch=3, seed=0)


def test_evaluation_batches_count_every_row_once():
    rows = rows_of([9, 12, 30, 9, 9])
    batches = pipeline.evaluation_batches(rows, batch=2, limit=9)
    assert [batch.tokens[:, 0].tolist() for batch in batches] == [[1, 2], [3, 4], [5, 5]]
    assert [batch.response_mask.any(axis=1).tolist() for batch in batches] == [
        [True, True],
        [True, True],
        [True, False],
    ]
    assert sum(batch.response_mask.sum() for batch in batches) == (rows.lengths - rows.prompt_lengths).sum()
    assert {batch.tokens.shape for batch in batches} == {(2, 32)}
    assert len(pipeline.evaluation_batches(rows, batch=2, limit=1)) == 1


def test_evaluation_with_fewer_rows_than_a_batch():
    [batch] = pipeline.evaluation_batches(rows_of([9, 12]), batch=5, limit=1)
    assert batch.tokens[:, 0].tolist() == [1, 2, 1, 2, 1]
    assert batch.response_mask.any(axis=1).tolist() == [True, True, False, False, False]


def test_release_data_wastes_little_on_padding(shared_data):
    """With the lengths of a vocabulary of real size: about 4.5 characters a token, and 9 tokens of chat template."""
    examples, _ = read(shared_data / "axbench" / "pooled_train.parquet")
    data = DataConfig()

    def length(text: str) -> int:
        return max(1, round(len(text) / 4.5))

    kept = [e for e in examples if length(e.steering_prompt) < data.max_concept]
    prompts = np.array([9 + length(e.prompt) for e in kept], np.int32)
    answers = np.array([min(length(e.response), data.max_response) for e in kept])
    rows = rows_of(prompts + answers)
    concepts = [np.ones(1 + length(e.steering_prompt), np.int32) for e in kept]
    rows = dataclasses.replace(rows, prompt_lengths=prompts, concepts=concepts)
    assert 100 < rows.lengths.mean() < 130  # as that of a 32,000-piece SentencePiece vocabulary on these texts: 112
    tokens, steering_prompts = pipeline.padding_report(rows, layout_of(rows, 6, pack=True))
    assert tokens > 0.92
    assert steering_prompts > 0.7
    assert pipeline.padding_report(rows, layout_of(rows, 6))[0] < tokens - 0.05  # which is why rows are paired
