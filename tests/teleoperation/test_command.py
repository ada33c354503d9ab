from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose

from robopolicy.errors import UserError
from robopolicy.teleoperation.command import AxisMap

AXES = AxisMap(linear_speed=0.2, angular_speed=1.0)


def along(axis: int, deflection: float) -> np.ndarray:
    return deflection * np.eye(6)[axis]


def test_full_deflection_gives_full_speed() -> None:
    assert_allclose(AXES.twist(along(0, 1.0)), [0.2, 0, 0, 0, 0, 0])
    assert_allclose(AXES.twist(along(5, -1.0)), [0, 0, 0, 0, 0, -1.0])
    assert_allclose(AXES.twist(along(1, 1.7)), [0, 0.2, 0, 0, 0, 0])


def test_a_diagonal_is_not_faster() -> None:
    twist = AXES.twist(np.ones(6))
    assert np.linalg.norm(twist[:3]) == pytest.approx(0.2)
    assert np.linalg.norm(twist[3:]) == pytest.approx(1.0)


def test_the_response_starts_at_zero_at_the_edge_of_the_dead_zone() -> None:
    axes = replace(AXES, dead_zone=0.2)
    assert not axes.twist(np.full(6, 0.2)).any()
    assert not axes.twist(np.full(6, -0.19)).any()
    assert 0 < axes.twist(along(0, 0.21))[0] < 0.2 * 0.02
    assert axes.twist(along(0, -0.6))[0] == pytest.approx(-0.1)


def test_expo_is_finer_about_the_centre_and_as_fast_at_the_end() -> None:
    axes = replace(AXES, expo=0.5)
    deflections = np.linspace(0, 1, 21)
    speeds = np.array([axes.twist(along(0, d))[0] for d in deflections])
    assert_allclose(speeds, 0.2 * (0.5 * deflections + 0.5 * deflections**3), atol=1e-12)
    assert np.all(np.diff(speeds) > 0)


def test_axes_are_swapped_and_turned_round() -> None:
    axes = replace(AXES, axes=((1, -1), (0, 1), (2, 1), (5, 1), (4, 1), (3, -1)))
    assert_allclose(axes.twist(along(0, 0.5)), [0, 0.1, 0, 0, 0, 0])
    assert_allclose(axes.twist(along(1, 0.5)), [-0.1, 0, 0, 0, 0, 0])
    assert_allclose(axes.twist(along(3, 0.5)), [0, 0, 0, 0, 0, -0.5])


def test_away_from_an_operator_who_looks_along_y_is_y() -> None:
    axes = replace(AXES, heading=np.pi / 2)
    assert_allclose(axes.twist(along(0, 1.0)), [0, 0.2, 0, 0, 0, 0], atol=1e-12)
    assert_allclose(axes.twist(along(1, 1.0)), [-0.2, 0, 0, 0, 0, 0], atol=1e-12)
    assert_allclose(axes.twist(along(2, 1.0)), [0, 0, 0.2, 0, 0, 0], atol=1e-12)
    assert_allclose(axes.twist(along(3, 1.0)), [0, 0, 0, 0, 1.0, 0], atol=1e-12)  # tilting turns with the operator


@pytest.mark.parametrize("wrong", [{"dead_zone": 1.0}, {"expo": -0.1}, {"linear_speed": 0.0}, {"angular_speed": -1.0}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="must"):
        AxisMap(**wrong)  # type: ignore[arg-type]
