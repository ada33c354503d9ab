import math

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel

from robopolicy.training.config import OptimConfig
from robopolicy.training.step import learning_rate, step_generator


def test_learning_rate_warms_up_and_ends_at_zero():
    config = OptimConfig(lr=1.0, warmup_steps=10)
    rates = [learning_rate(config, s, 110) for s in range(111)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert rates[10] == 1.0 and rates[60] == pytest.approx(0.5) and rates[110] == pytest.approx(0)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_randomness_is_a_function_of_seed_and_step():
    draw = lambda seed, step: torch.rand(4, generator=step_generator(seed, step))  # noqa: E731
    assert torch.equal(draw(1, 2), draw(1, 2))
    assert not torch.equal(draw(1, 2), draw(1, 3)) and not torch.equal(draw(1, 2), draw(2, 2))


def test_average_follows_the_published_decay():
    """decay = 1 - (1 + s)^-0.75 with s = update - 1, zero at the first update."""
    weight = torch.nn.Parameter(torch.zeros(1))
    ema = EMAModel([weight], decay=0.9999, use_ema_warmup=True, power=0.75, foreach=True)
    expected = 0.0
    for update in range(1, 20):
        weight.data.fill_(float(update))
        ema.step([weight])
        decay = 0.0 if update == 1 else 1 - (1 + (update - 1)) ** -0.75
        expected = decay * expected + (1 - decay) * update
        assert math.isclose(ema.shadow_params[0].item(), expected, rel_tol=1e-5)
