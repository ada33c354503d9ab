"""The node that drives an arm with a policy: topics in, `robopolicy.runtime.runner.Runner`, topics out.

It is a lifecycle node. Configuring reads the robot's contract and limits, compares them with the policy and loads it in
a process of its own; activating subscribes and starts the command loop; nothing moves before ``~/start``.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock as RosClock
from rclpy.clock_type import ClockType
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.serialization import serialize_message
from sensor_msgs.msg import JointState, Joy
from std_msgs.msg import Bool, Float64MultiArray, String
from std_srvs.srv import Trigger

from robopolicy.errors import UserError
from robopolicy.export.open import TORCH, engine_names
from robopolicy.inference.engine import read_engine
from robopolicy.manifest import bundle_fingerprint, read_manifest
from robopolicy.policies.prefix import prefix_steps
from robopolicy.runtime.chunk_scheduler import RealTimeChunkingSettings
from robopolicy.runtime.clock import NS, MonotonicClock, nanoseconds
from robopolicy.runtime.contract import CONTRACT, CommandTopic, Contract, Signal, Stream
from robopolicy.runtime.exchange import Chunk, Command
from robopolicy.runtime.limits import Limits
from robopolicy.runtime.robots import Robot, read_robot
from robopolicy.runtime.runner import Runner, check_fit
from robopolicy.runtime.states import Event, State
from robopolicy.runtime.worker import ProcessWorker
from robopolicy.spec import PolicySpec
from robopolicy_ros import parameters, qos, spin
from robopolicy_ros.diagnostics import ChunkTimes, LoopTimes, diagnostics
from robopolicy_ros.messages import (
    MESSAGE_TYPES,
    chunk_message,
    command_message,
    joints_message,
    read_sample,
    trajectory_message,
)
from robopolicy_ros.stamps import Stamps

log = logging.getLogger(__name__)

DDS_PROFILE = "FASTDDS_DEFAULT_PROFILES_FILE"
TRAJECTORY = "trajectory_msgs/msg/JointTrajectory"
_POLL = 0.02  # s between looks at a policy that is loading
_LONGEST_STOP = 10.0  # s for a controlled stop; it takes less within any sensible limits
_HELD_UP = nanoseconds(0.008)  # beyond twice the usual time of making a message
_MOVING = (State.RUNNING, State.INTERVENTION, State.STOPPING)


@dataclass
class _Active:
    """What exists while the node is configured."""

    robot: Robot
    runner: Runner
    worker: ProcessWorker
    about: dict[str, str]
    outputs: list[tuple[CommandTopic, Any]]
    loop: LoopTimes
    chunks: ChunkTimes
    unreadable: Counter[str] = field(default_factory=Counter)
    started: bool = False
    chunk: Chunk | None = None
    said: tuple[State, str] | None = None

    @property
    def trajectories(self) -> bool:
        """Whether a controller follows trajectories."""
        return any(topic.type == TRAJECTORY for topic, _ in self.outputs)


class PolicyNode(LifecycleNode):
    """See the module.

    Args:
        interrupted: set when the process should end; loading a policy is given up then.
    """

    def __init__(self, interrupted: spin.Interrupted | None = None) -> None:
        super().__init__("policy")
        self._interrupted = interrupted
        self._stamps = Stamps.measure()
        self._monotonic = MonotonicClock()
        self._quickest = math.inf  # ns to make a point of a trajectory's message
        self._steady = RosClock(clock_type=ClockType.STEADY_TIME)
        self._active: _Active | None = None
        self._inputs: list[Callable[[], object]] = []  # what takes subscriptions and timers down again
        self._resources: list[Callable[[], object]] = []  # and the worker and the publishers of commands
        parameters.declare(self)
        self.add_on_set_parameters_callback(self._check_parameters)
        self.add_post_set_parameters_callback(self._take_parameters)
        self._state = self.create_publisher(String, "~/state", qos.LATCHED)
        self._contract = self.create_publisher(String, "~/contract", qos.LATCHED)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._chunk = self.create_publisher(Float64MultiArray, "~/chunk", 10)
        self._latency = self.create_publisher(JointState, "~/latency", 10)
        for name, ask in (
            ("start", self._start),
            ("stop", lambda active: active.runner.stop()),
            ("hold", lambda active: active.runner.hold()),
            ("estop", self._estop),
            ("reset_fault", lambda active: active.runner.reset()),
        ):
            self.create_service(Trigger, f"~/{name}", partial(self._serve, ask))

    # Begin and end of the process.

    def begin(self) -> bool:
        """Configure and activate, if that is wanted."""
        if not self.get_parameter("auto_activate").value:
            return True
        success = TransitionCallbackReturn.SUCCESS
        return bool(self.trigger_configure() == success and self.trigger_activate() == success)

    def end(self, reason: str) -> None:
        """Stop the robot, then the policy."""
        try:
            if self._active is not None:
                self._come_to_rest(self._active, reason)
        finally:
            self._take_down()

    # Transitions.

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Read, compare, load; returns when the policy is warm."""
        try:
            self._configure(parameters.read(self))
        except UserError as error:
            self.get_logger().error(str(error))
            self._take_down()
            return TransitionCallbackReturn.FAILURE
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribe, and start the command loop."""
        active = self._active
        assert active is not None
        gc.collect()
        gc.freeze()  # what lives now is never looked at again, so that later collections are short
        result = super().on_activate(state)
        contract = active.robot.contract
        for name, stream in contract.streams.items():
            self._subscribe(MESSAGE_TYPES[stream.type], stream.topic, partial(self._observe, name, stream), stream)
        for name in ("estop", "deadman"):
            signal: Signal | None = getattr(contract.signals, name)
            if signal is not None:
                kind = Bool if signal.type == "std_msgs/msg/Bool" else Joy
                self._subscribe(kind, signal.topic, partial(self._signal, name, signal), None)
        if contract.intervention:
            self._subscribe(JointState, contract.intervention, self._intervene, None)
        self._every(1 / contract.command_rate, self._cycle)
        self._every(1.0, self._report)
        self._say(active)
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Bring the robot to rest, then stop sending."""
        assert self._active is not None
        self._come_to_rest(self._active, "The node is deactivated.")
        self._unsubscribe()
        gc.unfreeze()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """End the policy's process."""
        self._take_down()
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Bring the robot to rest, and end the policy's process."""
        self.end("The node is shut down.")
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """A transition failed: bring the robot to rest, and give up what was configured."""
        self.end("A transition of the node failed.")
        return TransitionCallbackReturn.SUCCESS

    # Configuring.

    def _configure(self, values: dict[str, parameters.Value]) -> None:
        log = self.get_logger()
        for name in ("robot", "bundle"):
            if not values[name]:
                raise UserError(
                    f"The parameter '{name}' is not set. Give it with -p {name}:=…, or {name}:=… to launch."
                )
        robot = read_robot(str(values["robot"]))
        bundle, engine = Path(str(values["bundle"])).expanduser(), str(values["engine"])
        engine, spec, fingerprint = policy_of(bundle, engine)
        check_fit(robot.contract, spec)
        scheduling, rtc = parameters.scheduler_settings(values), None
        if isinstance(scheduling, RealTimeChunkingSettings):
            scheduling.check_engine(engine)
            rtc = scheduling.guidance
        settings = parameters.runner_settings(values)
        instruction = parameters.instruction_of(str(values["instruction"]), spec)
        goal = parameters.goal_of(str(values["goal"]), spec)
        dry_run = bool(values["dry_run"])
        robot = dataclasses.replace(robot, limits=scaled(robot.limits, float(values["speed_scale"]), dry_run))
        self._warn_of_transport(robot.contract)
        log.info(f"Loading {bundle} ({engine}) for the robot '{robot.contract.robot}' …")
        worker = ProcessWorker(
            bundle,
            engine,
            threads=int(values["threads"]),
            allow_native_code=bool(values["allow_native_code"]),
            extra_delay=float(values["extra_delay"]),
            rtc=rtc,
        )
        self._resources.append(worker.close)
        trained = prefix_steps(read_manifest(bundle, verify=False))
        made = partial(
            Runner, robot.contract, robot.limits, worker, scheduling, self._monotonic, settings, prefix_steps=trained
        )
        made()  # a misfit that has nothing to do with the delay is told at once
        runner = made(prior_delay=self._wait_for(worker, float(values["configure_timeout"])))
        runner.instruction, runner.goal = instruction, goal
        about = {
            "robot": robot.contract.robot,
            "bundle": str(bundle),
            "fingerprint": fingerprint,
            "engine": engine,
            "scheduler": scheduling.name,
            "dry run": str(dry_run),
        }
        self._active = _Active(
            robot,
            runner,
            worker,
            about,
            [(command, self._output(command, dry_run)) for command in robot.contract.commands.values()],
            LoopTimes(runner.period),
            ChunkTimes(),
        )
        self._contract.publish(String(data=(robot.folder / CONTRACT).read_text()))
        where = "~/shadow/ (dry run)" if dry_run else "the robot"
        log.info(f"Ready; commands go to {where}. Policy {fingerprint}, {engine}, {scheduling.name}.")

    def _wait_for(self, worker: ProcessWorker, timeout: float) -> float:
        """Until the policy is warm; meanwhile the node does not answer. Returns the seconds of a usual inference."""
        began = time.monotonic()
        while True:
            health = worker.health()
            if health.ready:
                return health.usual
            if health.error or not health.alive:
                raise UserError(f"The policy cannot be loaded. {health.error}".strip())
            if self._interrupted is not None and self._interrupted.is_set():
                raise UserError("Interrupted while the policy was loaded.")
            if time.monotonic() - began > timeout:
                raise UserError(f"The policy was not ready after configure_timeout={timeout:g} s.")
            time.sleep(_POLL)

    def _output(self, command: CommandTopic, dry_run: bool) -> Any:
        topic = f"~/shadow/{command.topic.lstrip('/')}" if dry_run else command.topic
        publisher: Any = self.create_lifecycle_publisher(MESSAGE_TYPES[command.type], topic, qos.COMMAND)
        self._resources.append(partial(self.destroy_lifecycle_publisher, publisher))
        return publisher

    def _warn_of_transport(self, contract: Contract) -> None:
        log, profile = self.get_logger(), os.environ.get(DDS_PROFILE, "")
        raw = [name for name, stream in contract.streams.items() if stream.type == "sensor_msgs/msg/Image"]
        if profile:
            log.info(f"Profile of Fast DDS: {profile}")
        elif raw and "fastrtps" in rclpy.get_rmw_implementation_identifier():
            log.warning(
                f"{DDS_PROFILE} is not set: with its defaults Fast DDS loses raw images ({', '.join(raw)}). Set it to "
                "config/fastdds.xml of robopolicy_ros in every process, or send compressed images."
            )
        if "/opt/ros" in os.environ.get("AMENT_PREFIX_PATH", "") and not rclpy.__file__.startswith("/opt/ros"):
            log.warning(f"A ROS distribution is sourced, but rclpy is {rclpy.__file__}: do not mix the two.")

    def _take_down(self) -> None:
        self._unsubscribe()
        while self._resources:
            self._resources.pop()()
        self._active = None
        self._state.publish(String(data=json.dumps({"state": "unconfigured", "reason": ""})))

    # Subscriptions and timers, while active.

    def _subscribe(self, kind: type, topic: str, callback: Callable[[Any], None], stream: Stream | None) -> None:
        profile = qos.SIGNAL if stream is None else qos.subscription(stream)
        subscription = self.create_subscription(kind, topic, callback, profile)
        self._inputs.append(partial(self.destroy_subscription, subscription))

    def _every(self, seconds: float, callback: Callable[[], None]) -> None:
        timer = self.create_timer(seconds, callback, clock=self._steady)
        self._inputs.append(partial(self.destroy_timer, timer))

    def _unsubscribe(self) -> None:
        while self._inputs:
            self._inputs.pop()()

    def _observe(self, name: str, stream: Stream, message: Any) -> None:
        active = self._active
        assert active is not None
        try:
            value = read_sample(message, stream.type)
        except UserError as error:
            active.unreadable[name] += 1
            self.get_logger().warning(f"{stream.topic}: {error}", throttle_duration_sec=5.0)
            return
        now = self._monotonic.now()
        stamp = now if stream.stamp == "receive" else self._stamps.to_monotonic(message.header.stamp)
        active.runner.observe(name, stamp, value)

    def _signal(self, name: str, signal: Signal, message: Bool | Joy) -> None:
        active = self._active
        assert active is not None
        if isinstance(message, Bool):
            return active.runner.signal(name, message.data)
        if signal.button < len(message.buttons):
            active.runner.signal(name, bool(message.buttons[signal.button]))

    def _intervene(self, message: JointState) -> None:
        active = self._active
        assert active is not None
        names = active.robot.contract.action.names
        found = dict(zip(message.name, message.position, strict=False))
        if not message.name:
            active.runner.intervene(None)
        elif all(name in found for name in names):
            active.runner.intervene(np.array([found[name] for name in names]))
        else:
            missing = ", ".join(name for name in names if name not in found)
            self.get_logger().warning(
                f"{active.robot.contract.intervention}: {missing} is missing.", throttle_duration_sec=5.0
            )

    # The command loop.

    def _cycle(self) -> None:
        active = self._active
        assert active is not None
        active.loop.begin(self._monotonic.now())
        self._send(active)
        active.loop.end(self._monotonic.now())
        self._say(active)

    def _send(self, active: _Active) -> None:
        """Advance the runner by one period and publish what it wants."""
        runner = active.runner
        command = runner.tick()
        if command is not None:
            self._publish_set_points(active, command)
            if runner.trajectory_due and active.trajectories:
                self._publish_trajectories(active)
        runner.think()
        if runner.chunk is not None and runner.chunk is not active.chunk:
            active.chunk = runner.chunk
            times = active.chunks.add(runner.chunk, self._monotonic.now())
            stamp = self._stamps.to_stamp(runner.chunk.observed_at)
            self._chunk.publish(chunk_message(runner.chunk.actions))
            self._latency.publish(joints_message(tuple(times), np.array(list(times.values())), stamp=stamp))

    def _publish_set_points(self, active: _Active, command: Command) -> None:
        stamp = self._stamps.to_stamp(command.time)
        for topic, publisher in active.outputs:
            if topic.type != TRAJECTORY:
                publisher.publish(command_message(command, topic, stamp))

    def _publish_trajectories(self, active: _Active) -> None:
        """Publish what `Runner.preview` gives, unless this process is held up for too long on the way.

        Points count from the arrival of their message, so that being late moves them all: messages are serialized
        first, and made anew when that took longer than usual.
        """
        trajectory = active.runner.preview()
        if trajectory is None:
            return
        outputs = [(topic, publisher) for topic, publisher in active.outputs if topic.type == TRAJECTORY]
        while not active.runner.too_late_to_send:
            now = self._monotonic.now()
            messages = [trajectory_message(trajectory, topic, now) for topic, _ in outputs]
            if None in messages:
                break
            serialized = [serialize_message(message) for message in messages]
            passed = self._monotonic.now() - now
            points = len(messages) * len(trajectory.times)
            self._quickest = min(self._quickest, passed / points)
            if passed < 2 * self._quickest * points + _HELD_UP:
                for (_, publisher), message in zip(outputs, serialized, strict=True):
                    publisher.publish(message)
                return
        active.runner.take_back()

    def _come_to_rest(self, active: _Active, reason: str) -> None:
        """The controlled stop, in this thread; needs neither the executor nor the policy."""
        machine = active.runner.machine
        try:
            active.runner.stop(reason)
            self._say(active)
            self._until(lambda: machine.state is not State.STOPPING, active, partial(self._send, active))
        except Exception:
            log.exception("The stop failed; what is left is braking.")
            if machine.state in _MOVING:
                self._brake(active)
                machine.handle(Event.STOP, reason)
                machine.handle(Event.AT_REST)
        self._say(active)

    def _brake(self, active: _Active) -> None:
        """Slow down with as little of the runner as possible; trajectories that were sent end at rest by themselves."""
        runner = active.runner

        def brake() -> None:
            point = runner.filter.brake()
            time = self._monotonic.now() + nanoseconds(runner.period)
            self._publish_set_points(active, Command(time, point.position, point.velocity, point.acceleration))

        self._until(lambda: runner.filter.at_rest, active, brake)

    def _until(self, rests: Callable[[], bool], active: _Active, send: Callable[[], None]) -> None:
        """Send in every period of the command loop until the robot rests."""
        period = nanoseconds(active.runner.period)
        following = self._monotonic.now()
        give_up = following + nanoseconds(_LONGEST_STOP)
        while not rests() and following < give_up:
            send()
            following = max(following + period, self._monotonic.now() - period)
            time.sleep(max(0, following - self._monotonic.now()) / NS)

    # What the node says.

    def _say(self, active: _Active) -> None:
        """Publish the state when it changed."""
        machine = active.runner.machine
        said = (machine.state, machine.reason)
        if said != active.said:
            active.said = said
            self._state.publish(String(data=json.dumps({"state": machine.state.value, "reason": machine.reason})))

    def _report(self) -> None:
        active = self._active
        assert active is not None
        runner, now = active.runner, self._monotonic.now()
        if runner.machine.state in _MOVING and (why := self._other_publishers(active)):
            runner.estop(why)
        waits = not active.started and runner.machine.state in (State.IDLE, State.ARMED)
        if waits and self.get_parameter("auto_start").value:
            self._start(active)
        streams = {
            name: {"messages": counts.accepted, "gaps": counts.missed, "unreadable": active.unreadable[name]}
            | {f"refused {reason}": count for reason, count in counts.refused.items()}
            for name, counts in runner.buffer.counts.items()
        }
        health = active.worker.health()
        stamp = self.get_clock().now().to_msg()
        name, status = self.get_fully_qualified_name(), runner.status()
        self._diagnostics.publish(
            diagnostics(name, stamp, status, health, streams, active.loop, active.chunks, active.about, now)
        )

    # What people ask for.

    def _serve(
        self, ask: Callable[[_Active], str], request: Trigger.Request, response: Trigger.Response
    ) -> Trigger.Response:
        active = self._active
        if active is None or not self._inputs:
            response.message = "The node is not active; run its transitions configure and activate first."
            return response
        why = ask(active)
        response.success, response.message = not why, why or active.runner.machine.state.value
        if why:
            self.get_logger().warning(why)
        self._say(active)
        return response

    def _start(self, active: _Active) -> str:
        runner = active.runner
        if why := self._other_publishers(active):
            return why
        if runner.spec.tasks and runner.instruction is None:
            known = ", ".join(repr(task.instruction) for task in runner.spec.tasks)
            return f"This policy needs an instruction; set the parameter 'instruction' to one of: {known}."
        if runner.spec.goals and not runner.goal:
            return f"This policy needs a goal; set the parameter 'goal' to {{{runner.spec.goals[0].key}: …}}."
        why = runner.start()
        active.started = active.started or not why
        return why

    def _estop(self, active: _Active) -> str:
        active.runner.estop("The service ~/estop was called.")
        return ""

    def _other_publishers(self, active: _Active) -> str:
        """Who else commands the robot; commands of two nodes would fight."""
        own = self.get_fully_qualified_name()
        for _, publisher in active.outputs:
            found = self.get_publishers_info_by_topic(publisher.topic_name)
            names = [f"{info.node_namespace.rstrip('/')}/{info.node_name}" for info in found]
            if own in names:
                names.remove(own)
            if names:
                return f"Another node publishes on {publisher.topic_name}, too: {', '.join(names)}. Stop it first."
        return ""

    # Parameters.

    def _check_parameters(self, changes: list[Parameter]) -> SetParametersResult:
        active = self._active
        if why := parameters.refusal((change.name for change in changes), active is not None):
            return SetParametersResult(successful=False, reason=why)
        try:
            self._read_live(changes)
        except UserError as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _take_parameters(self, changes: list[Parameter]) -> None:
        if self._active is not None:
            for name, value in self._read_live(changes).items():
                setattr(self._active.runner, name, value)

    def _read_live(self, changes: list[Parameter]) -> dict[str, Any]:
        """Instruction and goal among the changes; raises a `UserError` where they do not fit the policy."""
        if self._active is None:
            return {}
        readers = {"instruction": parameters.instruction_of, "goal": parameters.goal_of}
        spec = self._active.runner.spec
        return {c.name: readers[c.name](c.value, spec) for c in changes if c.name in readers}


def policy_of(bundle: Path, engine: str) -> tuple[str, PolicySpec, str]:
    """The engine that is meant, what the policy reads and writes, and the bundle's fingerprint.

    Raises:
        UserError: there is no such bundle or engine; or it has several and none is named.
    """
    manifest = read_manifest(bundle, verify=False)
    if not engine:
        known = engine_names(bundle)
        if len(known) > 1:
            raise UserError(f"{bundle} has several engines, {', '.join(known)}; name one with the parameter 'engine'.")
        engine = known[0] if known else TORCH[0]
    if engine not in TORCH:
        read_engine(bundle, engine)
    return engine, PolicySpec.from_dict(manifest["spec"], str(bundle)), bundle_fingerprint(manifest)


def scaled(limits: Limits, speed: float, dry_run: bool) -> Limits:
    """Limits with a share of the velocities.

    In a dry run the robot does not follow, so that its distance from the commands means nothing.
    """
    axes = {name: dataclasses.replace(axis, velocity=speed * axis.velocity) for name, axis in limits.axes.items()}
    rotation = limits.rotation
    if rotation is not None:
        rotation = dataclasses.replace(rotation, velocity=speed * rotation.velocity)
    limits = dataclasses.replace(limits, axes=axes, rotation=rotation)
    return dataclasses.replace(limits, max_tracking_error=math.inf) if dry_run else limits


def main(args: list[str] | None = None) -> int:
    """Run the node; its exit code is 0 after an interruption, 1 after a failure, 2 if it could not begin."""
    return spin.run(PolicyNode, args)


if __name__ == "__main__":
    sys.exit(main())
