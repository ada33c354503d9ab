"""Streams in, aligned observations out: against truth, against a plain implementation, and with what may go wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from robopolicy.errors import UserError
from robopolicy.runtime.alignment import neighbours, resize, rotation_6d, slerp
from robopolicy.runtime.clock import NS
from robopolicy.runtime.contract import Action, CommandTopic, Contract, ObservationKey, Part, Stream
from robopolicy.runtime.observation_buffer import ObservationBuffer
from robopolicy.runtime.samples import Joints, Pose, Wrench

MS = NS // 1000
JOINTS = ("shoulder", "elbow", "wrist")
STREAMS = {
    "joints": Stream("joint_states", "sensor_msgs/msg/JointState", rate=100.0, stale_after=0.2, latency=0.002),
    "gripper": Stream("gripper/joint_states", "sensor_msgs/msg/JointState", rate=25.0, stale_after=0.2),
    "tool": Stream("tool_pose", "geometry_msgs/msg/PoseStamped", rate=50.0, stale_after=0.2, latency=0.01),
    "force": Stream("wrench", "geometry_msgs/msg/WrenchStamped", rate=100.0, stale_after=0.2),
    "camera": Stream("image", "sensor_msgs/msg/Image", rate=30.0, stale_after=0.2, latency=0.05, size=(12, 16)),
}
STATE = ObservationKey(
    (
        Part("joints", "interpolate", "position", ("elbow", "shoulder")),
        Part("joints", "hold", "velocity", ("wrist",)),
        Part("gripper", "interpolate", "position", ("finger",), scale=(25.0,), offset=(-1.0,)),
        Part("tool", "interpolate", "pose"),
        Part("force", "nearest", "wrench"),
    )
)
CONTRACT = Contract(
    robot="test",
    policy_rate=20.0,
    command_rate=100.0,
    joints=JOINTS,
    measured="joints",
    streams=STREAMS,
    observations={
        "observation.state": STATE,
        "observation.image.top": ObservationKey((Part("camera", "nearest", resize=(4, 4)),)),
    },
    action=Action((*JOINTS, "opening")),
    commands={
        "arm": CommandTopic("arm", "trajectory_msgs/msg/JointTrajectory", (0, 1, 2), JOINTS),
        "hand": CommandTopic("hand", "std_msgs/msg/Float64MultiArray", (3,), ("finger",), scale=(25.0,), offset=(0.5,)),
    },
)
JOINTS_ONLY = replace(
    CONTRACT,
    streams={"joints": replace(STREAMS["joints"], latency=0.0)},
    observations={"observation.state": ObservationKey((Part("joints", "interpolate", "position", JOINTS),))},
    action=Action(JOINTS),
    commands={"arm": CONTRACT.commands["arm"]},
)


def joints(*positions: float, names=JOINTS) -> Joints:
    return Joints(names, np.array(positions, float), np.array(positions, float) / 2)


def value_at(stream: str, time: int):
    """What a stream measures at a time; smooth in all of its numbers."""
    t = time / NS
    if stream == "joints":
        return joints(np.sin(t), np.cos(t), t % 1.0)
    if stream == "gripper":
        return Joints(("finger",), np.array([0.02 * np.sin(3 * t)]))
    if stream == "tool":
        rotation = Rotation.from_euler("xyz", [t, 0.5 * np.sin(t), 2 * t])
        return Pose(np.array([t, -t, np.sin(t)]), rotation.as_quat())
    if stream == "force":
        return Wrench(np.array([t, 0, 1]), np.array([0, t, 2]))
    return np.full((12, 16, 3), int(t * 30) % 256, np.uint8)


def schedule(seed: int, seconds: float = 0.6) -> list[tuple[int, int, str]]:
    """(arrival, stamp, stream) of messages with jitter and delays, in order of arrival."""
    rng = np.random.default_rng(seed)
    found = []
    for name, stream in STREAMS.items():
        period = NS / stream.rate
        stamps = np.arange(0, seconds * NS, period) + rng.uniform(0, 0.4 * period, int(np.ceil(seconds * stream.rate)))
        arrivals = np.maximum.accumulate(stamps + rng.exponential(0.01 * NS, len(stamps)))
        found += [(int(a), int(s), name) for a, s in zip(arrivals, stamps, strict=True)]
    return sorted(found)


def feed(buffer: ObservationBuffer, messages) -> None:
    for arrival, stamp, name in messages:
        moment = stamp - round(STREAMS[name].latency * NS)
        assert buffer.add(name, stamp, arrival, value_at(name, moment)) == ""


def filled(seconds: float = 0.6, **options) -> ObservationBuffer:
    buffer = ObservationBuffer(CONTRACT, **options)
    feed(buffer, schedule(0, seconds))
    return buffer


# reading


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.35, 1.0), steps=st.integers(1, 3))
def test_what_is_recorded_is_what_the_policy_saw(seed, share, steps):
    """Rows read live, in the order of arrival, are those of a recording that was fed stream by stream."""
    messages = schedule(seed)
    now = int(share * messages[-1][0])
    live = ObservationBuffer(CONTRACT, n_obs_steps=steps)
    feed(live, [message for message in messages if message[0] <= now])
    seen = live.observation(now)
    offline = ObservationBuffer(CONTRACT, n_obs_steps=20)
    feed(offline, sorted(messages, key=lambda message: (message[2], message[1])))
    if isinstance(seen, str):
        assert "silent" in seen or "measured" in seen or "no message yet" in seen
        return
    arrived = {name: max(s for a, s, n in messages if n == name and a <= now) for name in STREAMS}
    covered = min(stamp - round(STREAMS[name].latency * NS) for name, stamp in arrived.items())
    assert seen.stamps == arrived and seen.time == arrived["camera"] - 50 * MS
    for k in range(steps):
        time = seen.time - (steps - 1 - k) * 50 * MS
        # an image that comes later may be nearer, and the newest image is at seen.time itself
        if time <= covered:
            row = offline.at(time)
            assert row.keys() == seen.values.keys()
            for key, value in row.items():
                np.testing.assert_array_equal(seen.values[key][k], value, strict=True)


def test_a_row_is_close_to_the_truth():
    buffer = filled()
    time = 300 * MS
    row = buffer.at(time)
    t = 0.3
    state = row["observation.state"]
    assert state.dtype == np.float32 and state.shape == CONTRACT.observation_specs["observation.state"].shape
    np.testing.assert_allclose(state[:2], [np.cos(t), np.sin(t)], atol=1e-4)
    assert 0 <= t / 2 - state[2] <= 0.5 * 0.02  # held: up to two periods old
    np.testing.assert_allclose(state[3], 25 * 0.02 * np.sin(3 * t) - 1, atol=1e-2)
    rotation = Rotation.from_euler("xyz", [t, 0.5 * np.sin(t), 2 * t]).as_matrix()
    np.testing.assert_allclose(state[4:13], [t, -t, np.sin(t), *rotation[:, 0], *rotation[:, 1]], atol=1e-3)
    np.testing.assert_allclose(state[13:], [t, 0, 1, 0, t, 2], atol=0.011)
    assert row["observation.image.top"].shape == (4, 4, 3) and abs(int(row["observation.image.top"][0, 0, 0]) - 9) <= 1


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.integers(1, 40), min_size=2, max_size=400),
    asked=st.floats(0, 1),
    align=st.sampled_from(["hold", "nearest", "interpolate"]),
)
def test_the_ring_reads_as_a_list_would(steps, asked, align):
    """Against all samples in a plain list, also when the ring has gone round."""
    key = ObservationKey((Part("joints", align, "position", ("elbow",)),))
    stream = Stream("joint_states", "sensor_msgs/msg/JointState", rate=100.0, stale_after=0.2)
    contract = replace(JOINTS_ONLY, streams={"joints": stream}, observations={"observation.state": key})
    buffer = ObservationBuffer(contract)
    stamps = np.cumsum(steps) * MS
    values = np.arange(len(steps)) ** 2.0
    for stamp, value in zip(stamps.tolist(), values, strict=True):
        assert buffer.add("joints", stamp, stamp, joints(0, value, 0)) == ""
    oldest = max(stamps[-1] - 400 * MS, stamps[0])
    time = int(oldest + asked * (stamps[-1] - oldest))
    before = int(np.searchsorted(stamps, time, side="right")) - 1
    if align == "hold":
        wanted = values[before]
    elif align == "nearest":
        wanted = values[np.argmin(np.abs(stamps - time))]
    else:
        wanted = np.interp(time, stamps, values)
    try:
        np.testing.assert_allclose(buffer.at(time)["observation.state"], [wanted], rtol=1e-6)
    except UserError as error:  # never another value
        assert "more than 2 times" in str(error) and stamps[-1] - time > 10 * MS * 40


def test_neighbours_at_the_edges():
    moments = np.array([10, 20, 40])
    assert neighbours(moments, 5, "interpolate") == (0, 0, 0.0)
    assert neighbours(moments, 20, "interpolate") == (1, 1, 0.0)
    assert neighbours(moments, 25, "interpolate") == (1, 2, 0.25)
    assert neighbours(moments, 45, "interpolate") == (2, 2, 0.0)
    assert [neighbours(moments, time, "nearest")[0] for time in (5, 29, 30, 31, 99)] == [0, 1, 1, 2, 2]
    assert [neighbours(moments, time, "hold")[0] for time in (10, 19, 39, 40)] == [0, 0, 1, 2]


def test_the_newest_sample_is_held_until_the_next_one():
    buffer = filled()
    newest = buffer.at(10 * NS // 16)["observation.image.top"]
    np.testing.assert_array_equal(buffer.at(7 * NS // 10)["observation.image.top"], newest)
    with pytest.raises(UserError, match="was silent for"):
        buffer.at(5 * NS)


def test_latencies_move_the_moment():
    late = replace(JOINTS_ONLY, streams={"joints": replace(STREAMS["joints"], latency=0.03)})
    for contract, shift in ((JOINTS_ONLY, 0), (late, 30 * MS)):
        buffer = ObservationBuffer(contract)
        for k in range(20):
            buffer.add("joints", k * 10 * MS, k * 10 * MS, joints(k, k, k))
        np.testing.assert_allclose(buffer.at(105 * MS - shift)["observation.state"], [10.5] * 3)
        assert buffer.age("joints", 200 * MS) == pytest.approx(0.01 + shift / NS)
        assert buffer.measured()[0] == 190 * MS - shift


def test_only_wanted_keys_are_read_and_waited_for():
    buffer = ObservationBuffer(CONTRACT, keys=["observation.state"])
    feed(buffer, [message for message in schedule(0) if message[2] != "camera"])
    assert buffer.reference == "joints" and buffer.observation(600 * MS).values.keys() == {"observation.state"}
    with pytest.raises(UserError, match=r"no 'observation.stat'. Did you mean 'observation.state'"):
        ObservationBuffer(CONTRACT, keys=["observation.stat"])


# rotations


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1), near=st.booleans())
def test_slerp_and_6d_agree_with_scipy(seed, share, near):
    rng = np.random.default_rng(seed)
    first = Rotation.random(random_state=rng)
    step = Rotation.from_rotvec(rng.normal(size=3) * (1e-5 if near else 0.8))
    second = first * step
    angle = share * step.as_rotvec()
    sign = rng.choice([-1, 1])
    found = slerp(first.as_quat(), sign * second.as_quat(), share)
    assert Rotation.from_quat(found).approx_equal(first * Rotation.from_rotvec(angle), atol=1e-7)
    assert np.linalg.norm(found) == pytest.approx(1)
    np.testing.assert_allclose(rotation_6d(found), Rotation.from_quat(found).as_matrix()[:, :2].T.ravel(), atol=1e-12)


def test_6d_rotations_are_those_of_the_simulator():
    kinematics = pytest.importorskip("robopolicy_sim.kinematics", reason="needs pip install 'robopolicy[sim]'")
    rotation = Rotation.from_euler("xyz", [0.3, -1.0, 2.0])
    np.testing.assert_allclose(
        rotation_6d(rotation.as_quat()), kinematics.to_rotation_6d(rotation.as_matrix()), atol=1e-12
    )


# images


def test_images_shrink_to_the_mean_of_areas():
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    blocks = image.reshape(12, 4, 16, 4, 3).mean((1, 3))
    np.testing.assert_allclose(resize(image, (12, 16)), blocks, atol=0.51)
    odd = resize(image, (48, 10))  # 6.4 columns each: six or seven of them
    target = ((np.arange(64) + 0.5) / 6.4).astype(int)
    wanted = np.stack([image[:, target == column].mean(1) for column in range(10)], 1)
    np.testing.assert_allclose(odd, wanted, atol=0.51)
    assert resize(image, (48, 64)) is image and resize(image, (96, 128)).shape == (96, 128, 3)


def test_images_are_kept_and_resized_once():
    buffer = filled()
    first, second = buffer.at(300 * MS)["observation.image.top"], buffer.at(301 * MS)["observation.image.top"]
    assert first is second
    plain = replace(CONTRACT, observations={"observation.image.top": ObservationKey((Part("camera", "hold"),))})
    buffer = ObservationBuffer(plain)
    image = np.zeros((12, 16, 3), np.uint8)
    assert buffer.add("camera", 0, 0, image) == "" and buffer.at(0)["observation.image.top"] is image


# what is refused


def test_joints_are_found_by_name():
    straight, mixed = ObservationBuffer(JOINTS_ONLY), ObservationBuffer(JOINTS_ONLY)
    names = ("wrist", "extra", "shoulder", "elbow")
    for k in range(10):
        assert straight.add("joints", k * MS, k * MS, joints(1 + k, 2 + k, 3 + k)) == ""
        # drivers that change the order while they run, too
        order = names if k % 3 else JOINTS
        numbers = dict(zip((*JOINTS, "extra"), (1.0 + k, 2.0 + k, 3.0 + k, np.nan), strict=True))
        assert mixed.add("joints", k * MS, k * MS, joints(*(numbers[n] for n in order), names=order)) == ""
        np.testing.assert_array_equal(mixed.at(k * MS)["observation.state"], [1 + k, 2 + k, 3 + k])
    for time in (0, 5 * MS // 2, 9 * MS):
        np.testing.assert_array_equal(mixed.at(time)["observation.state"], straight.at(time)["observation.state"])


@pytest.mark.parametrize(
    ("stream", "value", "reason", "message"),
    [
        ("joints", joints(1, 2, names=("shoulder", "wrist")), "names", "elbow is missing; found shoulder, wrist"),
        ("joints", joints(1, np.nan, 3), "values", "elbow: not a finite number"),
        ("joints", joints(1, 2, np.inf), "values", "wrist: not a finite number"),
        ("joints", Joints(JOINTS, np.zeros(3)), "size", "velocity: found none for 3 names"),
        ("joints", Joints(JOINTS, np.zeros(2), np.zeros(3)), "size", "position: found 2 for 3 names"),
        ("joints", Wrench(np.zeros(3), np.zeros(3)), "kind", "it is a Wrench, wanted a sensor_msgs/msg/JointState"),
        ("tool", joints(1, 2, 3), "kind", "it is a JointState"),
        ("tool", Pose(np.zeros(3), np.zeros(4)), "values", "not of length 1"),
        ("tool", Pose(np.zeros(2), np.array([0, 0, 0, 1.0])), "size", "found a vector (2,), wanted (3,)"),
        ("force", Wrench(np.array([0, 0, np.nan]), np.zeros(3)), "values", "fz: not a finite number"),
        ("camera", np.zeros((16, 12, 3), np.uint8), "size", "it is (16, 12, 3) of uint8, wanted (12, 16, 3)"),
        ("camera", np.zeros((12, 16, 3)), "size", "of float64"),
        ("camera", joints(1, 2, 3), "kind", "it is a Joints, wanted an image"),
    ],
)
def test_messages_that_cannot_be_used_are_refused(stream, value, reason, message):
    buffer, untouched = filled(), filled()
    assert message in buffer.add(stream, NS, NS, value)
    assert buffer.counts[stream].refused == {reason: 1}
    assert buffer.age(stream, NS) == untouched.age(stream, NS)
    for time in range(200 * MS, 600 * MS, 7 * MS):  # the oldest rows were not written over, either
        for key, found in buffer.at(time).items():
            np.testing.assert_array_equal(found, untouched.at(time)[key])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-300, 300), min_size=1, max_size=60))
def test_accepted_stamps_rise_and_never_lie_ahead(jumps):
    buffer, accepted, stamp = ObservationBuffer(JOINTS_ONLY), [], 0
    for k, jump in enumerate(jumps):
        received = k * 10 * MS
        stamp = received + jump * MS
        if not buffer.add("joints", stamp, received, joints(k, k, k)):
            accepted.append(stamp)
            assert stamp <= received + 100 * MS
            assert buffer.measured()[0] == stamp and buffer.measured()[1][0] == k
    assert accepted == sorted(set(accepted))
    counts = buffer.counts["joints"]
    assert counts.accepted == len(accepted) and counts.accepted + counts.refused.total() == len(jumps)


def test_a_clock_that_jumps_back_makes_the_stream_silent():
    buffer = ObservationBuffer(JOINTS_ONLY)
    for k in range(100):
        stamp = k * 10 * MS - (NS if k >= 50 else 0)
        refused = buffer.add("joints", stamp, k * 10 * MS, joints(k, k, k))
        assert bool(refused) == (k >= 50)
        seen = buffer.observation(k * 10 * MS)
        assert isinstance(seen, str) == (k >= 70)  # stale_after is 0.2 s
    assert "is silent" in seen and "Newer ones are refused: its stamp lies" in seen and "before" in seen
    assert buffer.counts["joints"].refused == {"backwards": 50}


@settings(max_examples=50, deadline=None)
@given(lost=st.sets(st.integers(1, 198), max_size=80), seed=st.integers(0, 2**32 - 1))
def test_lost_messages_are_counted(lost, seed):
    jitter = np.random.default_rng(seed).uniform(0, 0.4 * 10 * MS, 200)
    buffer = ObservationBuffer(JOINTS_ONLY)
    for k in range(200):
        if k not in lost:
            stamp = int(k * 10 * MS + jitter[k])
            buffer.add("joints", stamp, stamp, joints(k, k, k))
    assert buffer.counts["joints"].missed == len(lost)


# no observation


def test_every_silent_stream_is_named():
    for silent in STREAMS:
        buffer = ObservationBuffer(CONTRACT)
        feed(buffer, [m for m in schedule(0) if m[2] != silent])
        assert f"streams.{silent} ({STREAMS[silent].topic}): no message has come" in buffer.observation(600 * MS)
        buffer = ObservationBuffer(CONTRACT)
        feed(buffer, [m for m in schedule(0, 0.9) if m[2] != silent or m[1] < 500 * MS])
        assert f"streams.{silent} ({STREAMS[silent].topic}) is silent" in buffer.observation(900 * MS)
    assert not isinstance(filled().observation(610 * MS), str)
    assert "silent" in filled().observation(5 * NS)


def test_a_spread_that_is_too_large_is_told():
    buffer = filled(max_spread=0.02)
    text = buffer.observation(610 * MS)
    assert text.startswith("streams.camera was measured 0.0") and "at most 0.02 s" in text


def test_history_is_padded_after_a_start_only():
    buffer = ObservationBuffer(JOINTS_ONLY, n_obs_steps=3)
    assert isinstance(buffer.observation(0), str)
    for k in range(13):
        buffer.add("joints", k * 10 * MS, k * 10 * MS, joints(k, k, k))
        found = buffer.observation(k * 10 * MS).values["observation.state"][:, 0]
        np.testing.assert_allclose(found, [max(k - 10, 0), max(k - 5, 0), k])
    resumed = (120 + 500) * MS
    buffer.add("joints", resumed, resumed, joints(0, 0, 0))
    assert "was silent for 0.4" in buffer.observation(resumed)
    for k in range(1, 11):
        buffer.add("joints", resumed + k * 10 * MS, resumed + k * 10 * MS, joints(k, k, k))
    np.testing.assert_allclose(
        buffer.observation(resumed + 100 * MS).values["observation.state"][:, 0], [0, 5, 10], atol=1e-6
    )


def test_padding_is_a_whole_observation():
    """Not the oldest sample of each stream: they were not measured together."""
    buffer = ObservationBuffer(CONTRACT, n_obs_steps=3)
    feed(buffer, [m for m in schedule(0) if m[1] < 400 * MS and (m[2] != "camera" or m[1] > 330 * MS)])
    found = buffer.observation(410 * MS)
    assert found.time < 400 * MS - 50 * MS
    for value in found.values.values():
        np.testing.assert_array_equal(value[0], value[1])


def test_a_stream_that_is_faster_than_the_contract_says_so():
    buffer = ObservationBuffer(JOINTS_ONLY, n_obs_steps=10)
    for k in range(3000):
        buffer.add("joints", k * MS // 2, k * MS // 2, joints(k, k, k))
    text = buffer.observation(1500 * MS)
    assert "sends more than 2 times the 100 messages per second" in text
    with pytest.raises(UserError, match="correct its rate"):
        buffer.at(100 * MS)


def test_nothing_is_read_from_before_the_start():
    with pytest.raises(UserError, match=r"streams.camera \(image\) had no message yet"):
        filled().at(-60 * MS)


# where the robot is


def test_the_measured_action_holds_the_robot():
    buffer = ObservationBuffer(CONTRACT)
    assert buffer.measured() is None and buffer.measured_action() is None
    buffer.add("joints", 0, 0, joints(3, 1, 2, names=("wrist", "shoulder", "elbow")))
    np.testing.assert_array_equal(buffer.measured()[1], [1, 2, 3])
    assert buffer.measured_action() is None
    buffer.add("gripper", 0, 0, Joints(("finger",), np.array([0.02])))
    np.testing.assert_allclose(buffer.measured_action(), [1, 2, 3, 25 * 0.02 + 0.5])


def test_a_gripper_among_the_joints_is_found_without_being_observed():
    hand = replace(CONTRACT.commands["hand"], scale=(1.0,), offset=(0.0,))
    commands = {"arm": CONTRACT.commands["arm"], "hand": hand}
    contract = replace(JOINTS_ONLY, action=CONTRACT.action, commands=commands)
    buffer = ObservationBuffer(contract)
    buffer.add("joints", 0, 0, joints(1, 2, 3, 4, names=(*JOINTS, "finger")))
    np.testing.assert_array_equal(buffer.measured_action(), [1, 2, 3, 4])
    buffer.add("joints", 1, 1, joints(1, 2, 3))  # a driver that stops telling it
    assert buffer.measured_action() is None


def test_a_measured_pose_is_an_action_and_no_twist_is_one_too():
    pose = CommandTopic("target", "geometry_msgs/msg/PoseStamped", tuple(range(9)))
    names = ("x", "y", "z", "r11", "r21", "r31", "r12", "r22", "r32")
    contract = replace(CONTRACT, action=Action(names, "tool_pose"), commands={"hand": pose})
    buffer = ObservationBuffer(contract)
    assert buffer.measured_action() is None
    rotation = Rotation.from_euler("xyz", [1, 2, 3])
    buffer.add("tool", 0, 0, Pose(np.array([1.0, 2, 3]), -rotation.as_quat()))
    columns = rotation.as_matrix()[:, :2].T.ravel()
    np.testing.assert_allclose(buffer.measured_action(), [1, 2, 3, *columns], atol=1e-12)

    twist = CommandTopic("twist", "geometry_msgs/msg/TwistStamped", tuple(range(6)))
    contract = replace(CONTRACT, action=Action(tuple("abcdef"), "tool_twist"), commands={"hand": twist})
    buffer = ObservationBuffer(contract)
    np.testing.assert_array_equal(buffer.measured_action(), np.zeros(6))  # the twist that keeps the robot there
