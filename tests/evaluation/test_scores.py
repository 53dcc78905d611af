import numpy as np
import pytest

from hypersteer_jax.evaluation.scores import choose_factors, clustered_interval, interval, mean, spearman


def test_the_first_half_chooses_and_the_second_scores() -> None:
    scores = np.array(
        [
            [[0, 2, 1], [0, 2, 1], [0, 2, 1], [1, 0, 2], [1, 0, 2]],  # three choose, two score
            [[1, 1, 0], [1, 1, 0], [1, 1, 0], [0.5, 2, 2], [0.5, 2, 2]],  # a tie: the smaller factor
        ],
        float,
    )
    found = choose_factors(scores)
    assert found.factor.tolist() == [1, 0]
    assert found.selection.tolist() == [2, 1]
    assert found.score.tolist() == [0, 0.5]


def test_ten_instructions_are_five_and_five() -> None:
    scores = np.zeros((1, 10, 2))
    scores[0, 5:, 0], scores[0, :5, 1] = 2.0, 1.0
    assert choose_factors(scores) == (1, 1.0, 0.0)


def test_a_failed_rating_is_no_zero() -> None:
    scores = np.array([[[np.nan, 1.0], [1.5, 1.0], [np.nan, 0.0], [2.0, 0.0]]])
    assert choose_factors(scores) == (0, 1.5, 2.0)
    scores[0, :2, 0] = np.nan  # nothing is known of this factor
    assert choose_factors(scores) == (1, 1.0, 0.0)
    assert np.isnan(mean(np.array([np.nan, np.nan]), axis=0))


def test_spearman_by_hand() -> None:
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 8.0, 27.0])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])) == pytest.approx(-1)
    # ranks 1.5 1.5 3 4 and 1 2.5 2.5 4, each less 2.5: products 1.5, 0, 0, 2.25; squares 4.5 and 4.5
    assert spearman(np.array([0.0, 0.0, 1.0, 2.0]), np.array([0.0, 1.0, 1.0, 2.0])) == pytest.approx(3.75 / 4.5)
    assert np.isnan(spearman(np.ones(3), np.array([1.0, 2.0, 3.0])))


def test_interval_is_wider_when_rows_of_a_concept_agree() -> None:
    rng = np.random.default_rng(0)
    concept = np.repeat(np.arange(20), 50)
    shared, own = rng.normal(size=20)[concept], rng.normal(size=1000)
    low, high = clustered_interval(lambda rows: own[rows].mean(), concept)
    assert high - low == pytest.approx(2 * 1.96 * own.std() / 1000**0.5, rel=0.3)
    low, high = clustered_interval(lambda rows: shared[rows].mean(), concept)
    assert high - low == pytest.approx(2 * 1.96 * shared.std() / 20**0.5, rel=0.1)


def test_interval_is_that_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(1.0, 0.5, 400)
    score = interval(values)
    assert score.mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert score.low == pytest.approx(values.mean() - half, abs=0.01)
    assert score.high == pytest.approx(values.mean() + half, abs=0.01)
    assert interval(np.ones(5)) == (1.0, 1.0, 1.0, 5)
    assert interval(np.array([np.nan, 1.0, np.nan])) == (1.0, 1.0, 1.0, 1)
    assert np.isnan(interval(np.array([np.nan])).mean)
