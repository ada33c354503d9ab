"""A simulated arm and its task behind a contract, without ROS: what its controllers do and what its sensors see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from robopolicy.data.record import disturbances
from robopolicy.errors import UserError
from robopolicy.runtime.clock import NS
from robopolicy.runtime.commanded import CommandedMotion, Points, Setpoint
from robopolicy.runtime.contract import Contract, Stream
from robopolicy.runtime.samples import Joints, Pose, Value
from robopolicy.simulator import make_environment, registered_id, task_id
from robopolicy_ros.joint_trajectory_controller import JointTrajectoryController

SUCCESS_HOLD = 0.1
"""Seconds that a task must be done: three control steps at 20 Hz, as in the environment at its own rate."""

TEST_PATTERN = "none"
_TRAJECTORY = "trajectory_msgs/msg/JointTrajectory"


class SimulatedRobot:
    """Steps a task of ``robopolicy_sim`` at the contract's command rate.

    Entries of the contract's action are those of the environment with ``control=joint_position``: joints from base to
    hand, then the gripper's opening. Names are the contract's.

    Args:
        contract: of the robot; ``kind: joint_position``.
        task: short name or Gymnasium id.
        options: of the environment, e.g. ``{"arm": "ur5e"}``.
        start: the clock [ns].
        seed: of the first episode.
        time_limit: seconds of an episode; None: the task's.
        disturbance: while the expert plays, the arm is pushed about: standard deviation of what is added to its set
            points, as a share of half their range, so that the demonstrations show how to recover (DART; the commands
            that are recorded stay clean).
        render_quality: of the cameras: ``fast``, ``shadows``, ``full``, or ``none`` for a moving test pattern, which
            costs nothing and tests what carries images.

    Attributes:
        time: of the present state [ns].
        seed, success, demonstrating, frozen: of the present episode.
        fresh: nothing was commanded since the reset.
        refusals: commands that the controllers refused.

    Raises:
        UserError: contract and task do not fit.
    """

    def __init__(
        self,
        contract: Contract,
        task: str,
        options: Mapping[str, Any],
        *,
        start: int,
        seed: int = 0,
        time_limit: float | None = None,
        disturbance: float = 0.0,
        render_quality: str = "fast",
    ) -> None:
        self.contract = contract
        env_id = task_id(task)
        self._env = make_environment(
            env_id, **{**options, "control": "joint_position", "control_hz": contract.command_rate}
        ).unwrapped
        self._every = round(contract.command_rate / contract.policy_rate)
        self._check_fit(task)
        self._period = round(NS / contract.command_rate)
        self.time_limit = time_limit or _time_limit(env_id)
        self._disturbance = disturbance
        self._quality = render_quality
        self._renderer: Any = None
        names = self._env.metadata["names"]
        self._columns = {
            name: (key, i) for key, entries in names.items() if key != "action" for i, name in enumerate(entries)
        }
        self._sources = {name: self._source(name) for name in self._joint_state_names()}
        self._controllers: dict[str, JointTrajectoryController | CommandedMotion] = {
            name: JointTrajectoryController() if command.type == _TRAJECTORY else CommandedMotion()
            for name, command in contract.commands.items()
        }
        self.frozen, self.refusals, self.episode = False, 0, -1
        self.reset(seed, start)

    @property
    def instruction(self) -> str:
        return str(getattr(self._env, "instruction", ""))

    @property
    def elapsed(self) -> float:
        """Seconds of the present episode."""
        return self._steps / self.contract.command_rate

    @property
    def over(self) -> bool:
        """The episode was a success, or its time is over."""
        return self.success or self.elapsed >= self.time_limit

    def reset(self, seed: int, now: int) -> None:
        """Begin an episode at rest."""
        self.seed, self.time = seed, now
        self._observation, _ = self._env.reset(seed=seed)
        self._steps = self._done_steps = 0
        self.success = self.demonstrating = False
        self.fresh = True
        self._expert: Any = None
        self.episode += 1
        self._measured = self._last_measured = self._read_measured()
        self._hold(self._measured)

    def command(self, name: str, received: int, points: Points) -> str:
        """Give a controller what came on its topic.

        Returns:
            Empty, or why it is refused.
        """
        if self.frozen:
            return "the emergency stop is pressed"
        self.fresh = False
        controller = self._controllers[name]
        if isinstance(controller, CommandedMotion):
            controller.follow(received, points)
            controller.forget(received - NS)
            return ""
        problem = controller.accept(received, points)
        self.refusals += bool(problem)
        return problem

    def freeze(self) -> None:
        """The emergency stop: the servos hold where they are, and commands are refused until `release`."""
        if not self.frozen:
            self._hold(self._commanded(self.time))
        self.frozen = True
        self.demonstrating = False

    def release(self) -> None:
        self.frozen = False

    def demonstrate(self) -> None:
        """Let the task's scripted expert play the present episode through `expert_action`."""
        self._expert = self._env.make_expert(self.seed)
        rng, rate = np.random.default_rng((self.seed, 1)), self.contract.command_rate
        self._pushes = disturbances(self._env.action_space, self._disturbance, rate, rng)
        self.demonstrating, self._expert_began = True, self._steps

    def expert_action(self) -> np.ndarray | None:
        """What the expert wants to reach one control step of the policy from now (A,); None where it says nothing."""
        if not self.demonstrating or (self._steps - self._expert_began) % self._every:
            return None
        return np.asarray(self._expert.act(self._observation), dtype=np.float64)

    def step(self) -> None:
        """Go on by one period of the command rate."""
        self.time += self._period
        action = self._commanded(self.time)
        if self.demonstrating:
            action = action + next(self._pushes)
        action = action.astype(np.float32)
        self._observation, _, _, _, info = self._env.step(
            np.clip(action, self._env.action_space.low, self._env.action_space.high)
        )
        self._last_measured, self._measured = self._measured, self._read_measured()
        self._steps += 1
        self._done_steps = self._done_steps + 1 if info["success"] else 0
        self.success |= self._done_steps >= SUCCESS_HOLD * self.contract.command_rate
        self.demonstrating &= not self.over

    def sample(self, name: str) -> Value:
        """What a stream's sensor sees now."""
        stream = self.contract.streams[name]
        if stream.image:
            return self._image(name, stream)
        if stream.type == "sensor_msgs/msg/JointState":
            return self._joints(self.joint_names(name))
        state = self._env.tool_state()
        return Pose(state.position - self._env.base_position, _quaternion(state.rotation))

    def joint_names(self, stream: str) -> tuple[str, ...]:
        """Entries of a ``JointState`` stream: what observations read of it; of the measured one also what is moved."""
        names = [n for o in self.contract.observations.values() for p in o.parts if p.stream == stream for n in p.names]
        if stream == self.contract.measured:
            names = [*self.contract.joints, *(n for c in self.contract.commands.values() for n in c.names), *names]
        return tuple(dict.fromkeys(names))

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
        self._env.close()

    def _commanded(self, time: int) -> np.ndarray:
        action = np.empty(len(self.contract.action.names))
        for name, controller in self._controllers.items():
            state: Setpoint | None = controller.at(time)
            assert state is not None  # `_hold` gave every controller a set point
            action[list(self.contract.commands[name].entries)] = state.position
        return action

    def _hold(self, action: np.ndarray) -> None:
        for name, controller in self._controllers.items():
            position = action[list(self.contract.commands[name].entries)]
            if isinstance(controller, CommandedMotion):
                controller.clear()
                controller.follow(self.time, Points(np.array([self.time]), position[None], hold=True))
            else:
                controller.hold(self.time, position)

    def _read_measured(self) -> np.ndarray:
        """Where joints and gripper are, as entries of the action."""
        return np.append(self._env.tool_state().joints, self._env.opening())

    def _joints(self, names: tuple[str, ...]) -> Joints:
        velocity = (self._measured - self._last_measured) * self.contract.command_rate
        positions, velocities = [], []
        for name in names:
            source = self._sources[name]
            if isinstance(source[0], str):
                positions.append(float(self._observation[source[0]][source[1]]))
                continue
            entry, scale, offset = source
            positions.append((self._measured[entry] - offset) / scale)
            velocities.append(velocity[entry] / scale)
        moves = len(velocities) == len(names)
        return Joints(names, np.array(positions), np.array(velocities) if moves else None)

    def _source(self, name: str) -> tuple[str, int] | tuple[int, float, float]:
        """Where a named number comes from: an entry of the action (with scale and offset), or of the observation."""
        for command in self.contract.commands.values():
            if name in command.names:
                i = command.names.index(name)
                return command.entries[i], _each(command.scale, i), _each(command.offset, i)
        if name in self.contract.joints:
            return self.contract.joints.index(name), 1.0, 0.0
        if name in self._columns:
            return self._columns[name]
        known = ", ".join([*self.contract.joints, *self._columns])
        raise UserError(f"The simulated task knows no '{name}' that a stream of the contract has; it knows {known}.")

    def _joint_state_names(self) -> list[str]:
        states = [n for n, s in self.contract.streams.items() if s.type == "sensor_msgs/msg/JointState"]
        return list(dict.fromkeys(name for state in states for name in self.joint_names(state)))

    def _image(self, name: str, stream: Stream) -> np.ndarray:
        assert stream.size is not None
        if self._quality == TEST_PATTERN:
            return _test_pattern(stream.size, self.time)
        if self._renderer is None:
            from robopolicy_sim.rendering import CameraRenderer, find_quality

            self._renderer = CameraRenderer(self._env.model, find_quality(self._quality))
        image: np.ndarray = self._renderer.render(self._env.data, name, stream.size)
        return image

    def _check_fit(self, task: str) -> None:
        contract, width = self.contract, self._env.action_space.shape[0]
        if contract.action.kind != "joint_position" or len(contract.action.names) != width:
            raise UserError(
                f"The simulated task {task} takes {width} entries, joints and an opening; the contract's action is "
                f"{len(contract.action.names)} entries of the kind {contract.action.kind}."
            )
        if len(contract.joints) != width - 1:
            raise UserError(f"The simulated arm has {width - 1} joints, the contract {len(contract.joints)}.")
        if abs(self._every * contract.policy_rate - contract.command_rate) > 1e-6:
            raise UserError(f"command_rate={contract.command_rate} must be a multiple of {contract.policy_rate=}.")
        cameras = [self._env.model.camera(i).name for i in range(self._env.model.ncam)]
        for name, stream in contract.streams.items():
            if stream.image and name not in cameras:
                raise UserError(f"streams.{name}: the simulated scene has the cameras {', '.join(cameras)}.")
            if stream.type == "geometry_msgs/msg/WrenchStamped":
                raise UserError(f"streams.{name}: the simulated arm measures no wrench.")


def _test_pattern(size: tuple[int, int], time: int) -> np.ndarray:
    """A gradient that wanders by a hundred pixels a second, (*size, 3) uint8."""
    height, width = size
    row = ((np.arange(width) + time * 100 // NS) % 256).astype(np.uint8)
    image = np.empty((height, width, 3), np.uint8)
    image[..., 0] = row
    image[..., 1] = row[::-1]
    image[..., 2] = np.linspace(0, 255, height).astype(np.uint8)[:, None]
    return image


def _each(values: tuple[float, ...], i: int) -> float:
    return values[i] if len(values) > 1 else values[0]


def _time_limit(env_id: str) -> float:
    import gymnasium

    spec = gymnasium.spec(registered_id(env_id))
    if not spec.max_episode_steps:
        return 30.0
    return spec.max_episode_steps / 20.0  # the tasks count steps of 20 Hz


def _quaternion(rotation: np.ndarray) -> np.ndarray:
    from scipy.spatial.transform import Rotation

    quaternion: np.ndarray = Rotation.from_matrix(rotation).as_quat()
    return quaternion
