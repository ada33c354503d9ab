"""A deployment rehearsed in simulation: the runner of the robot, its delays and limits, against a simulated world.

Time is simulated, so that an inference takes exactly as long as it is told to and every episode can be repeated. The
world does not wait: it moves on at the command rate while the policy thinks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from robopolicy.errors import UserError
from robopolicy.evaluation.statistics import Interval, wilson
from robopolicy.runtime.chunk_scheduler import SchedulerSettings
from robopolicy.runtime.clock import NS, SimulatedClock, nanoseconds
from robopolicy.runtime.contract import Action, CommandTopic, Contract, ObservationKey, Part, Stream
from robopolicy.runtime.exchange import Command
from robopolicy.runtime.limits import AxisLimits, Limits
from robopolicy.runtime.runner import Runner, RunnerSettings
from robopolicy.runtime.samples import Joints, Value
from robopolicy.runtime.simulated_worker import SimulatedWorker
from robopolicy.runtime.states import State
from robopolicy.simulator import make_environment, task_id
from robopolicy.spec import PolicySpec

log = logging.getLogger(__name__)

_STILL = 0.02  # share of the velocity limit below which an axis stands still
_SILENCE = 10.0  # s; in simulation no stream falls silent


@dataclass(frozen=True)
class Motion:
    """Limits of every axis of the action, in its unit: what `safety.yaml` holds for a robot.

    Attributes:
        velocity: None takes the arm's own, where the simulator knows it.
        acceleration, jerk: of every axis.
    """

    velocity: float | None = None
    acceleration: float = 10.0
    jerk: float = 200.0


@dataclass(frozen=True)
class Delays:
    """How long things take, in simulated seconds.

    Attributes:
        inference: of every chunk.
        jitter: standard deviation of what is added to it, half normal.
    """

    inference: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if self.inference < 0 or self.jitter < 0:
            raise UserError(f"delays: inference={self.inference} and jitter={self.jitter} must not be negative.")

    def drawn(self, seed: int) -> Callable[[int], float]:
        """The delay of the chunk with an id; deterministic."""
        return lambda id: self.inference + self.jitter * abs(np.random.default_rng((seed, id)).standard_normal())


@dataclass(frozen=True)
class RealtimeEpisode:
    """One episode.

    Attributes:
        seed: of its start.
        success: of the task, within the time limit.
        seconds: until its end.
        pause: seconds in which the robot stood still after it had begun to move.
        jerk: root mean square of the commands' jerk, over time and axes, in shares of the axes' jerk limits.
        acceleration: largest commanded acceleration, in shares of the limits; 1 is never exceeded.
        seam: largest change of the commanded acceleration's cause at a chunk border: the jump of the velocity between
            two successive commands there, in shares of what the acceleration limit allows in one period.
        chunks: that were executed.
        state: in which the runner ended.
        reason: of a fault.
    """

    seed: int
    success: bool
    seconds: float
    pause: float
    jerk: float
    acceleration: float
    seam: float
    chunks: int
    state: str
    reason: str = ""


@dataclass(frozen=True)
class RealtimeResult:
    """Episodes of one way to deploy a policy.

    Attributes:
        scheduler: its settings.
        delays: that were simulated.
        episodes: in the order of their seeds.
    """

    scheduler: SchedulerSettings
    delays: Delays
    episodes: tuple[RealtimeEpisode, ...] = field(default=())

    @property
    def success(self) -> Interval:
        return wilson(sum(e.success for e in self.episodes), len(self.episodes))

    def mean(self, name: str) -> float:
        """Mean over the episodes of a number."""
        return float(np.mean([getattr(e, name) for e in self.episodes]))

    @property
    def faults(self) -> int:
        """Episodes that ended because the runner stopped."""
        return sum(e.state == State.FAULT.value for e in self.episodes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "scheduler": asdict(self.scheduler),
            "delays": asdict(self.delays),
            "success": asdict(self.success),
            "episodes": [asdict(episode) for episode in self.episodes],
        }


def evaluate_realtime(
    policy: Any,
    env_name: str,
    options: Mapping[str, Any],
    scheduler: SchedulerSettings,
    delays: Delays,
    seeds: Sequence[int],
    *,
    command_rate: float = 100.0,
    motion: Motion | None = None,
    runner: RunnerSettings | None = None,
    time_limit: float | None = None,
    prefix_steps: int | None = None,
    goal: Mapping[str, np.ndarray] | None = None,
    progress: bool = True,
) -> RealtimeResult:
    """Play one episode for each seed in simulated real time.

    Args:
        policy: an `ExportedPolicy`, or what has its interface.
        env_name: short name or Gymnasium id of a task that takes ``control_hz`` and whose actions are absolute.
        options: of the environment.
        scheduler, delays: see there.
        command_rate: commands per second; the environment is stepped that often.
        motion: limits.
        runner: settings of the runner.
        time_limit: seconds; None takes the task's own.
        prefix_steps: longest prefix that the policy was trained with; None: unknown.
        goal: of a goal-conditioned policy, by key, ``(*key.shape)``.

    Raises:
        UserError: the task cannot be run in real time, or the policy does not fit it.
    """
    env_id = task_id(env_name)
    limit = time_limit or _time_limit(env_id, options)
    with closing(_make(env_id, options, command_rate)) as env:
        contract = environment_contract(env, policy.spec, command_rate)
        limits = environment_limits(env, contract, motion or Motion(), scheduler, policy.spec)
        episodes = []
        with tqdm(seeds, unit="episode", desc=f"{scheduler.name} {delays.inference:g} s", disable=not progress) as bar:
            for seed in bar:
                world = _World(env, contract, seed)
                made = partial(Runner, contract, limits, prefix_steps=prefix_steps)
                episode = _play(world, policy, made, scheduler, delays, runner or RunnerSettings(), limit, goal or {})
                episodes.append(episode)
                bar.set_postfix_str(f"success {np.mean([e.success for e in episodes]):.1%}")
    return RealtimeResult(scheduler, delays, tuple(episodes))


class _World:
    """The environment as a robot: it takes one command each period and publishes what it measures."""

    def __init__(self, env: Any, contract: Contract, seed: int) -> None:
        self.env, self.seed = env, seed
        self._names = env.metadata["names"]
        self._contract = contract
        self._space = env.action_space
        self.observation, _ = env.reset(seed=seed)
        self.success = self.ended = False

    def publish(self, runner: Runner, now: int) -> None:
        """Feed the runner with the newest measurements."""
        for key, value in self.observation.items():
            if key not in self._contract.streams:
                continue
            sample: Value = value
            if value.ndim == 1:
                sample = Joints(tuple(self._names[key]), np.asarray(value, np.float64))
            runner.observe(key, now, sample)

    def step(self, action: np.ndarray) -> None:
        """Let the world move on by one command period."""
        self.observation, _, terminated, _, info = self.env.step(action.astype(self._space.dtype))
        self.success = self.success or bool(info["success"])
        self.ended = self.success or bool(terminated)


def _play(
    world: _World,
    policy: Any,
    made: Callable[..., Runner],
    settings: SchedulerSettings,
    delays: Delays,
    how: RunnerSettings,
    time_limit: float,
    goal: Mapping[str, np.ndarray],
) -> RealtimeEpisode:
    clock = SimulatedClock(NS)
    worker = SimulatedWorker(policy, clock, delays.drawn(world.seed))
    seeded = RunnerSettings(world.seed * 10_000, how.lookahead)  # as many chunks an episode may have
    runner = made(worker, settings, clock, seeded)
    runner.goal = goal
    runner.instruction = str(getattr(world.env.unwrapped, "instruction", "")) if policy.spec.tasks else None
    period = nanoseconds(runner.period)
    world.publish(runner, clock.now())
    if why := runner.start():
        raise UserError(f"The runner does not start in this environment: {why}")
    holding = runner.filter.state.position.copy()
    commands: list[Command] = []
    seams: list[int] = []
    while not world.ended and (clock.now() - NS) / NS < time_limit and runner.machine.state is State.RUNNING:
        command = runner.tick()
        runner.think()
        if command is not None:
            if runner.trajectory_due:
                seams.append(len(commands))
                runner.trajectory_due = False
            commands.append(command)
            holding = command.position
        world.step(holding)
        clock.advance(period)
        world.publish(runner, clock.now())
    seconds = (clock.now() - NS) / NS
    state = runner.machine.state
    return RealtimeEpisode(
        seed=world.seed,
        success=world.success,
        seconds=seconds,
        chunks=runner.status().counters.get("chunks", 0),
        state=state.value,
        reason=runner.machine.reason if state is not State.RUNNING else "",
        **_smoothness(commands, seams, runner.contract, runner.limits),
    )


def _smoothness(
    commands: Sequence[Command], seams: Sequence[int], contract: Contract, limits: Limits
) -> dict[str, float]:
    """Pauses and what the commands ask of the robot; see `RealtimeEpisode`."""
    axes = [limits.axes[name] for name in contract.action.names]
    period = 1 / contract.command_rate
    velocity = np.array([c.velocity for c in commands]) / [axis.velocity for axis in axes]
    acceleration = np.array([c.acceleration for c in commands])
    jerk = np.diff(acceleration, axis=0) / period / [axis.jerk for axis in axes]
    jumps = np.abs(np.diff([c.velocity for c in commands], axis=0)) / period / [axis.acceleration for axis in axes]
    still: np.ndarray = np.all(np.abs(velocity) < _STILL, axis=1)
    moving = np.flatnonzero(~still)
    pause = float(still[moving[0] :].sum() * period) if len(moving) else 0.0
    at_seams = [i - 1 for i in seams if 0 < i <= len(jumps)]
    return {
        "pause": pause,
        "jerk": float(np.sqrt(np.mean(jerk**2))) if len(jerk) else 0.0,
        "acceleration": float((np.abs(acceleration) / [axis.acceleration for axis in axes]).max()),
        "seam": float(jumps[at_seams].max()) if at_seams else 0.0,
    }


def environment_contract(env: Any, spec: PolicySpec, command_rate: float) -> Contract:
    """The contract of a simulated environment: each observation key is a stream of its own.

    Raises:
        UserError: the action's entries are not measured, or are no absolute positions.
    """
    names = env.metadata["names"]
    action = tuple(names["action"])
    measured = next((key for key, entries in names.items() if key != "action" and set(action) <= set(entries)), None)
    if measured is None:
        raise UserError(
            f"{env.spec.id}: the action's entries {', '.join(action)} are not measured, so where the robot is "
            "cannot be told. Use absolute positions, e.g. environment_options.control=joint_position."
        )
    units = env.metadata.get("units", {})
    streams, observations = {}, {}
    for key, space in env.observation_space.spaces.items():
        image = space.dtype == np.uint8
        streams[key] = Stream(
            topic=key.replace(".", "/"),
            type="sensor_msgs/msg/Image" if image else "sensor_msgs/msg/JointState",
            rate=command_rate,
            stale_after=_SILENCE,
            size=space.shape[:2] if image else None,
        )
        part = Part(key, "nearest") if image else Part(key, "interpolate", "position", tuple(names[key]))
        observations[key] = ObservationKey((part,), "" if image else units.get(key, ""))
    return Contract(
        robot=env.spec.id,
        policy_rate=spec.fps,
        command_rate=command_rate,
        joints=action,
        measured=measured,
        streams=streams,
        observations=observations,
        action=Action(action, unit=units.get("action", "")),
        commands={"robot": CommandTopic("command", "sensor_msgs/msg/JointState", tuple(range(len(action))), action)},
        reference=measured,
    )


def environment_limits(
    env: Any, contract: Contract, motion: Motion, scheduler: SchedulerSettings, spec: PolicySpec
) -> Limits:
    """Limits of a simulated environment: positions from its action space, the rest from ``motion``."""
    space, arm = env.action_space, getattr(env.unwrapped, "arm", None)
    speeds = dict(zip(arm.joints, arm.max_velocity, strict=True)) if arm is not None else {}
    axes = {}
    for i, name in enumerate(contract.action.names):
        velocity = motion.velocity or speeds.get(name) or _default_velocity(env, space, i)
        low, high = float(space.low[i]), float(space.high[i])
        axes[name] = AxisLimits(low, high, velocity, motion.acceleration, motion.jerk)
    return Limits(
        source=f"{env.spec.id} and the options of the rehearsal",
        axes=axes,
        max_start_jump=math.inf,
        max_tracking_error=math.inf,
        max_chunk_age=_SILENCE,
        max_open_loop=spec.horizon / spec.fps,
        policy_timeout=_SILENCE,
        heartbeat_timeout=math.inf,
        max_spread=_SILENCE,
        ramp=0.0,
    )


def _default_velocity(env: Any, space: Any, i: int) -> float:
    """The whole range in half a second, unless the environment has a speed limit of its own."""
    config = getattr(env.unwrapped, "config", None)
    return float(getattr(config, "max_speed", 2 * (space.high[i] - space.low[i])))


def _time_limit(env_id: str, options: Mapping[str, Any]) -> float:
    """Seconds of an episode as registered."""
    from gymnasium import registry

    with closing(make_environment(env_id, **options)) as env:
        steps = registry[env.spec.id].max_episode_steps
        if steps is None:
            raise UserError(f"{env_id} was registered without a limit; give time_limit=… in seconds.")
        return steps / float(env.metadata["render_fps"])


def _make(env_id: str, options: Mapping[str, Any], command_rate: float) -> Any:
    if "control_hz" in options:
        raise UserError("environment_options.control_hz is settled by command_rate here; leave it out.")
    return make_environment(env_id, control_hz=command_rate, max_episode_steps=-1, **options)
