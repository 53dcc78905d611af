"""From examples to batches: exact masks, bucket shapes, and an order that can be resumed."""

from itertools import islice, product

import numpy as np
import pytest

from hypersteer_jax.config import DataConfig, SteeringConfig
from hypersteer_jax.data import pipeline
from hypersteer_jax.data.batch import DataError, SteeringBatch, SteeringExample
from hypersteer_jax.data.pipeline import Bucket, Rows
from hypersteer_jax.data.prompts import Prompter, load_tokenizer
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


def rows_of(lengths, prompt=2, concept=3) -> Rows:
    """Rows whose tokens all equal their index + 1, so that a batch tells which rows it holds."""
    return Rows(
        tokens=[np.full(length, index + 1, np.int32) for index, length in enumerate(lengths)],
        prompt_lengths=np.full(len(lengths), prompt, np.int32),
        concepts=[np.full(concept, index + 1, np.int32) for index in range(len(lengths))],
        factors=np.ones(len(lengths), np.float32),
        prefix=1,
        pad_id=0,
        positions="after_prefix",
    )


def assert_same(one: SteeringBatch, two: SteeringBatch) -> None:
    for left, right in zip(one, two, strict=True):
        np.testing.assert_array_equal(left, right)


EXAMPLES = [
    SteeringExample("a b", "c", "d a", concept="x", factor=2.0),
    SteeringExample("d", "c c c", "b", concept="y"),
]


def test_batch_exactly(prompter):
    rows = encode(EXAMPLES, prompter)
    batch = pipeline.collate(rows, np.array([0, 1]), Bucket(tokens=16, context=12, response=3, concept=4))
    np.testing.assert_array_equal(
        batch.tokens, [[*HEAD, C, *TAIL, D, A, 0, 0, 0, 0], [*HEAD, C, C, C, *TAIL, B, 0, 0, 0]]
    )
    assert batch.mask.sum(1).tolist() == [12, 13]
    assert batch.mask[0].tolist() == [True] * 12 + [False] * 4
    assert batch.steer_mask[0].tolist() == [False] * 4 + [True] * 8 + [False] * 4
    assert batch.context_mask[0].tolist() == [True] * 10 + [False] * 2
    assert batch.context_mask[1].tolist() == [True] * 12
    assert batch.response_index.tolist() == [[9, 10, 0], [11, 0, 0]]
    assert batch.response_tokens.tolist() == [[D, A, 0], [B, 0, 0]]
    assert batch.response_mask.tolist() == [[True, True, False], [True, False, False]]
    assert batch.concept_tokens.tolist() == [[0, IDS["<bos>"], A, B], [0, 0, IDS["<bos>"], D]]
    assert batch.concept_mask.tolist() == [[False, True, True, True], [False, False, True, True]]
    assert batch.factor.tolist() == [2.0, 1.0]
    kinds = {name: array.dtype.name for name, array in batch._asdict().items()}
    assert {kinds[name] for name in kinds if name.endswith("mask")} == {"bool"}
    assert {kinds[name] for name in kinds if name.endswith(("tokens", "index"))} == {"int32"}
    assert kinds["factor"] == "float32"


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
    batch = pipeline.collate(rows, np.array([0]), pipeline.make_buckets(rows, 1)[0])
    assert np.flatnonzero(batch.steer_mask[0]).tolist() == list(steered)


def test_logits_of_the_indexed_column_predict_the_response(prompter):
    rows = encode(EXAMPLES, prompter)
    batch = pipeline.collate(rows, np.array([0, 1]), pipeline.make_buckets(rows, 1)[0])
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


def test_buckets_are_optimal_and_nested():
    lengths = np.random.default_rng(0).integers(4, 100, 60)
    choices = sorted({-(-length // 8) * 8 for length in lengths.tolist()})

    def computed(totals: list[int]) -> int:
        return sum(min(total for total in totals if total >= length) for length in lengths)

    for count in (1, 2, 3):
        buckets = pipeline.make_buckets(rows_of(lengths), count)
        totals = [bucket.tokens for bucket in buckets]
        best = min(computed([*cut, choices[-1]]) for cut in product(choices, repeat=count - 1))
        assert computed(totals) == best
        assert len(totals) <= count
        assert totals == sorted(totals)


def test_bucket_shapes():
    rows = Rows(
        tokens=[np.ones(length, np.int32) for length in (10, 16, 30, 40)],
        prompt_lengths=np.array([9, 2, 3, 3], np.int32),
        concepts=[np.ones(length, np.int32) for length in (3, 9, 2, 2)],
        factors=np.ones(4, np.float32),
        prefix=1,
        pad_id=0,
        positions="all",
    )
    # C and R hold every row of this bucket and of the shorter ones, which may be moved here.
    assert pipeline.make_buckets(rows, 2) == [Bucket(16, 16, 16, 16), Bucket(40, 16, 40, 16)]
    assert [bucket.tokens for bucket in pipeline.make_buckets(rows, 9)] == [16, 32, 40]  # no empty shapes
    assert pipeline.padding_report(rows, pipeline.make_buckets(rows, 2)) == 96 / (16 + 16 + 40 + 40)


def test_epoch_plan_uses_each_row_at_most_once():
    bucket_of = np.random.default_rng(0).integers(0, 4, 103)
    for epoch in range(3):
        plan = pipeline.epoch_plan(bucket_of, batch=8, seed=0, epoch=epoch)
        used = np.concatenate([indices for _, indices in plan])
        assert [len(indices) for _, indices in plan] == [8] * (103 // 8)
        assert len(set(used.tolist())) == len(used)
        assert all((bucket_of[indices] <= bucket).all() for bucket, indices in plan)


def test_left_over_rows_move_to_the_next_longer_bucket_and_the_last_rest_waits():
    bucket_of = np.array([0, 0, 0, 1, 1, 2, 2])  # one of bucket 0 moves to 1, one of its three then to 2, and so on
    plan = pipeline.epoch_plan(bucket_of, batch=2, seed=0, epoch=0)
    assert sorted(bucket for bucket, _ in plan) == [0, 1, 2]
    [moved] = [indices for bucket, indices in plan if bucket == 1]
    assert 0 in bucket_of[moved]


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
    rows, data = rows_of(np.random.default_rng(0).integers(4, 60, 50)), DataConfig(buckets=3)
    expected = list(islice(pipeline.iterator(rows, data, batch=8, seed=0), 20))  # an epoch is 6 batches
    for done in (4, 6, 17):
        running = pipeline.iterator(rows, data, batch=8, seed=0)
        for _ in range(done):
            next(running)
        restored = pipeline.iterator(rows, data, batch=8, seed=0)
        restored.set_state(running.get_state())
        for batch in expected[done:]:
            assert_same(next(restored), batch)


def test_iterator_serves_whole_epochs_without_repeats():
    rows = rows_of(np.random.default_rng(0).integers(4, 60, 50))
    batches = list(islice(pipeline.iterator(rows, DataConfig(buckets=3), batch=8, seed=0), 12))
    for epoch in (batches[:6], batches[6:]):
        seen = [row for batch in epoch for row in batch.tokens[:, 0].tolist()]
        assert len(set(seen)) == 48
    assert len({batch.tokens.shape for batch in batches}) <= 3


def test_batch_larger_than_the_data():
    with pytest.raises(DataError, match=r"train\.batch is 8, but there are 7 rows to train on"):
        pipeline.iterator(rows_of([9] * 7), DataConfig(), batch=8, seed=0)


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
    examples, _ = read(shared_data / "axbench" / "pooled_train.parquet")
    rows = encode(examples, Prompter(load_tokenizer(shared_data / "lm" / "stories260K")))
    assert pipeline.padding_report(rows, pipeline.make_buckets(rows, 4)) > 0.88
    assert pipeline.padding_report(rows, pipeline.make_buckets(rows, 6)) > 0.92
