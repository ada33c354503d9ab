import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robopolicy.data.normalize import MODES, Normalizer, fit_normalizer
from robopolicy.errors import UserError

RNG = np.random.default_rng(0)
VALUES = RNG.normal([100, -3, 0.5], [40, 0.1, 2], size=(5000, 3))


def test_minmax_maps_the_range_to_plus_minus_one():
    out = fit_normalizer(VALUES, "minmax").normalize(torch.tensor(VALUES))
    np.testing.assert_allclose(out.min(0).values, -1, atol=1e-5)
    np.testing.assert_allclose(out.max(0).values, 1, atol=1e-5)


def test_gaussian_gives_mean_zero_and_deviation_one():
    out = fit_normalizer(VALUES, "gaussian").normalize(torch.tensor(VALUES)).numpy()
    np.testing.assert_allclose(out.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(out.std(0), 1, atol=1e-4)


def test_quantile_maps_the_quantiles_and_lets_outliers_pass():
    values = np.concatenate([VALUES, [[1e4, 50, 300]]])
    out = fit_normalizer(values, "quantile").normalize(torch.tensor(values)).numpy()
    np.testing.assert_allclose(np.quantile(out, (0.01, 0.99), axis=0), [[-1] * 3, [1] * 3], atol=1e-3)
    assert (out[-1] > 5).all()


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=2), min_size=2, max_size=20))
def test_unnormalize_inverts_normalize(mode, values):
    data = np.array(values)
    normalizer = fit_normalizer(data, mode)
    back = normalizer.unnormalize(normalizer.normalize(torch.tensor(data, dtype=torch.float32)))
    scale = 1 + np.abs(data).max()
    np.testing.assert_allclose(back.numpy(), data, atol=1e-4 * scale)


@pytest.mark.parametrize("mode", ["minmax", "gaussian", "quantile"])
def test_constant_dimension_becomes_zero_and_noise_is_not_blown_up(mode):
    values = VALUES.copy()
    values[:, 1] = 7.0
    normalizer = fit_normalizer(values, mode)
    noisy = torch.tensor([[100.0, 7.0 + 1e-3, 0.5]])
    assert abs(normalizer.normalize(noisy)[0, 1].item()) == pytest.approx(1e-3, rel=1e-2)


def test_angles_are_left_alone():
    normalizer = fit_normalizer(VALUES, "minmax", angles=(2,))
    x = torch.tensor([[0.0, 0.0, 1.25]])
    assert normalizer.normalize(x)[0, 2] == 1.25


def test_not_a_number_is_refused_with_its_place():
    values = VALUES.copy()
    values[17, 1] = np.nan
    with pytest.raises(UserError, match="step 17, dimension 1"):
        fit_normalizer(values, "minmax")


def test_unknown_mode_suggests():
    with pytest.raises(UserError, match="Did you mean 'gaussian'"):
        fit_normalizer(VALUES, "gausian")  # type: ignore[arg-type]


def test_keys_with_dots_are_found():
    part = fit_normalizer(VALUES, "minmax")
    normalizer = Normalizer.from_parts({"observation.state": part})
    assert normalizer["observation.state"] is part
    assert any("observation/state" in name for name in normalizer.state_dict())
