import numpy as np
import pytest

from hypersteer_jax.config import EvaluateConfig
from hypersteer_jax.evaluation.cases import METHODS
from hypersteer_jax.evaluation.judges import Item
from hypersteer_jax.evaluation.rating import choosing_rows, scoring_rows


@pytest.mark.parametrize(("fixed", "expected"), [(1.0, [3, 4, 10, 11]), (2.0, [3, 5, 11])])
def test_places_of_what_is_scored(fixed: float, expected: list[int]) -> None:
    """Two concepts of two instructions; 0.5, 1 and 2 are factors 0 to 2; what chooses is at 0-2 and 6-8."""
    config = EvaluateConfig(per_concept=2, factors=(1.0, 2.0, 0.5), fixed_factor=fixed)
    items = {method: [Item("", "", "")] * 12 for method in METHODS}
    first = choosing_rows(items, config)
    assert first.pop("HyperSteer") == [0, 1, 2, 6, 7, 8]
    assert set(map(tuple, first.values())) == {tuple(range(12))}
    assert scoring_rows(np.array([0, 2]), config) == {"HyperSteer": expected}
