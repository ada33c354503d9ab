import pytest

from robopolicy.errors import UserError
from robopolicy.spec import KeySpec, PolicySpec, check_keys

STATE = KeySpec("observation.state", (5,), unit="px", angles=(4,))
IMAGE = KeySpec("observation.image.top", (96, 96, 3), role="image")
ACTION = KeySpec("action", (2,), role="action", unit="px")
SPEC = PolicySpec((STATE, IMAGE), ACTION, 10)


def test_round_trip_through_plain_values():
    assert PolicySpec.from_dict(SPEC.to_dict()) == SPEC


def test_published_padding_and_executed_part():
    assert (SPEC.pad_before, SPEC.pad_after) == (1, 7)
    assert list(range(16))[SPEC.executed] == list(range(1, 9))


def test_each_angle_counts_twice_for_networks():
    assert STATE.feature_dim == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_obs_steps": 0}, "n_obs_steps=0"),
        ({"n_action_steps": 16}, r"must lie in 1\.\.15"),
        ({"observations": (STATE, STATE)}, "must differ"),
    ],
)
def test_impossible_horizons_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        PolicySpec(**{"observations": (STATE,), "action": ACTION, "fps": 10, **changes})


def test_images_have_three_axes_and_angles_lie_inside():
    with pytest.raises(UserError, match="height, width, 3"):
        KeySpec("observation.image.top", (96, 96), role="image")
    with pytest.raises(UserError, match="outside the vector of 2"):
        KeySpec("observation.state", (2,), angles=(2,))


def test_unknown_and_missing_entries_are_named():
    plain = SPEC.to_dict()
    with pytest.raises(UserError, match="spec: unknown entry 'horizonn'. Did you mean 'horizon'"):
        PolicySpec.from_dict(plain | {"horizonn": 4})
    with pytest.raises(UserError, match="bundle.yaml: the entry 'fps' is missing"):
        PolicySpec.from_dict({k: v for k, v in plain.items() if k != "fps"}, "bundle.yaml")


def test_every_mismatch_is_reported_at_once():
    found = {
        "observation.state": KeySpec("observation.state", (7,), unit="m"),
        "observation.image.to": KeySpec("observation.image.to", (96, 96, 3), role="image"),
        "action": KeySpec("action", (2,)),
    }
    with pytest.raises(UserError) as caught:
        check_keys(found, (STATE, IMAGE, ACTION), "dataset a and task b")
    text = str(caught.value)
    for part in (
        "dataset a and task b",
        "observation.state: found shape (7,), wanted (5,)",
        "observation.state: found unit 'm', wanted 'px'",
        "observation.image.top: not there. Did you mean 'observation.image.to'",
        "action: found role 'state', wanted 'action'",
    ):
        assert part in text


def test_unknown_units_are_not_compared():
    check_keys({"observation.state": KeySpec("observation.state", (5,))}, (STATE,), "dataset and task")
