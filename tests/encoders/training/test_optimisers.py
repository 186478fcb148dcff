from itertools import pairwise

import pytest

from encoders.config.train_config import OptimiserConfig
from encoders.training.optimisers import schedule


def test_schedule_warms_up_then_falls_to_final_fraction() -> None:
    config = OptimiserConfig(warmup_steps=10, final_fraction=0.1)
    factors = [schedule(step, 110, config) for step in range(110)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10] == 1.0
    assert all(a < b for a, b in pairwise(factors[:11]))
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert schedule(110, 110, config) == pytest.approx(0.1)
    assert schedule(60, 110, config) == pytest.approx(0.55)
    assert schedule(60, 110, config, progress=1.0) == pytest.approx(0.1)
