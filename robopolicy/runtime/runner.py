"""The runner: watches, asks the policy, follows its plan, stops. It has no threads; its owner calls `tick`."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from robopolicy.errors import UserError
from robopolicy.runtime.chunk_scheduler import SchedulerSettings, action_latency, make_scheduler
from robopolicy.runtime.clock import NS, Clock, nanoseconds
from robopolicy.runtime.contract import Contract
from robopolicy.runtime.exchange import Chunk, Command, Request, Trajectory, Worker
from robopolicy.runtime.limits import Limits
from robopolicy.runtime.observation_buffer import ObservationBuffer
from robopolicy.runtime.plan import Plan
from robopolicy.runtime.safety import Path, SafetyFilter, SetPoint
from robopolicy.runtime.samples import Value
from robopolicy.runtime.states import Event, Machine, State
from robopolicy.spec import GOAL, PolicySpec, check_keys

log = logging.getLogger(__name__)

_KEPT_PREVIEWS = 20
_SETTLING = 0.5  # s for which the robot may lag behind its last command
_LONGEST_LEAD = 0.2  # s; a stop is delayed by the lead
_LEAST_LEAD = 0.02  # s from a tick until its trajectory is at the controller
_COMMANDING = (State.RUNNING, State.INTERVENTION, State.STOPPING, State.HOLDING)
_SPACING = 0.02  # s between the points of a trajectory


@dataclass(frozen=True)
class RunnerSettings:
    """How the runner drives.

    Attributes:
        seed: of the noise; request ``i`` uses ``seed + i``.
        lookahead: seconds ahead at which the plan is aimed at; longer is smoother and cuts corners. At least four
            command periods.
        resume_after_intervention: the policy goes on when a person lets go; otherwise the robot holds until it is
            started again.
        intervention_timeout: seconds without a target of the person after which they have let go.
    """

    seed: int = 0
    lookahead: float = 0.1
    resume_after_intervention: bool = False
    intervention_timeout: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.lookahead <= 1 or self.intervention_timeout <= 0:
            raise UserError(
                f"lookahead={self.lookahead} must lie in 0 to 1 s and intervention_timeout="
                f"{self.intervention_timeout} above 0."
            )


@dataclass(frozen=True)
class Status:
    """What the runner is doing, for diagnostics.

    Attributes:
        state, reason: see `Machine`.
        counters: what happened how often since the runner was made.
        ages: seconds since the newest sample of each stream.
        delay: seconds from an observation to its chunk that the scheduler reckons with.
        plan_left: seconds until the plan is used up.
        waiting: why no observation could be made for the policy; empty when it could.
    """

    state: State
    reason: str
    counters: Mapping[str, int]
    ages: Mapping[str, float]
    delay: float
    plan_left: float
    waiting: str = ""


@dataclass
class _Person:
    target: np.ndarray
    time: int


@dataclass
class _Signals:
    values: dict[str, bool] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)


class Runner:
    """Drives a robot with a policy.

    The owner feeds `observe`, `signal` and `intervene` as messages come. At the contract's command rate it calls
    `tick`, sends what that returns and then calls `think`. Where a command is a trajectory, it sends `preview` whenever
    ``trajectory_due`` is set.

    Args:
        contract, limits: of the robot.
        worker: computes chunks.
        scheduler: how chunks are executed.
        clock: of everything.
        settings: see `RunnerSettings`.
        prefix_steps: longest prefix that the policy was trained with, see `robopolicy.policies.prefix`; None: unknown.
        prior_delay: seconds from an observation to its chunk that are expected before the first was measured, see
            `robopolicy.runtime.exchange.Health.usual`.

    Attributes:
        machine: the state and its reason.
        buffer: of observations.
        filter: what every command passes.
        instruction: what to do, for policies with tasks.
        goal: values by key without prefix, for goal-conditioned policies.
        trajectory_due: `preview` has news: another plan, a stop, a person's target.
        chunk: the newest that was accepted.

    Raises:
        UserError: policy and contract do not fit; every mismatch is named. Or the scheduler does not fit the policy or
            the delay.
    """

    def __init__(
        self,
        contract: Contract,
        limits: Limits,
        worker: Worker,
        scheduler: SchedulerSettings,
        clock: Clock,
        settings: RunnerSettings | None = None,
        *,
        prefix_steps: int | None = None,
        prior_delay: float = 0.0,
    ) -> None:
        self.contract, self.limits, self.clock = contract, limits, clock
        self.settings = settings or RunnerSettings()
        self._worker = worker
        self.spec = worker.spec
        check_fit(contract, self.spec)
        self._scheduler = make_scheduler(
            scheduler,
            self.spec,
            latency=action_latency(contract),
            lookahead=self.settings.lookahead,
            prior_delay=prior_delay,
            prefix_steps=prefix_steps,
        )
        self.machine = Machine()
        self.buffer = ObservationBuffer(
            contract,
            n_obs_steps=self.spec.n_obs_steps,
            keys=[key.key for key in self.spec.observations],
            max_stamp_ahead=limits.max_stamp_ahead,
            max_spread=limits.max_spread,
        )
        self.period = 1 / contract.command_rate
        if self.settings.lookahead < 4 * self.period:
            raise UserError(
                f"lookahead={self.settings.lookahead} must be at least four command periods, {4 * self.period:g} s."
            )
        self.filter = SafetyFilter(contract, limits, self.period, self.spec.n_obs_steps)
        self.instruction: str | None = None
        self.goal: Mapping[str, np.ndarray] = {}
        self.trajectory_due = False
        self.chunk: Chunk | None = None
        self._used = {part.stream for key in self.spec.observations for part in contract.observations[key.key].parts}
        self._used.add(contract.measured)
        self._signals = _Signals()
        self._person: _Person | None = None
        self._turned_away = self._settling = False
        self._last_target = 0
        self._counters: Counter[str] = Counter()
        self._preview_times: deque[float] = deque([0.0], maxlen=_KEPT_PREVIEWS)
        self._epoch = self._id = 0
        self._asked: int | None = None  # id of the request in flight
        self._waiting = ""
        self._invalid = self._failures = 0
        self._ramp_from = np.zeros(len(contract.action.names))
        self._cut_short = self._path_sent = False
        self._before: Path | None = None
        self._send_until = 0
        self._wanted_since: int | None = None
        self._ramp_began = self._last_chunk = self._last_trajectory = self._commanded_at = self._ticked = 0

    # What comes in.

    def observe(self, stream: str, stamp: int, value: Value) -> None:
        """Take a message of a stream; ``stamp`` in nanoseconds of the runner's clock. Unusable ones are counted."""
        if refused := self.buffer.add(stream, stamp, self.clock.now(), value):
            self._counters[f"refused {stream}"] += 1
            log.debug("%s: %s", stream, refused)

    def signal(self, name: str, value: bool) -> None:
        """Take a message of a signal, ``estop`` (true: pressed) or ``deadman`` (true: held)."""
        self._signals.values[name], self._signals.times[name] = value, self.clock.now()
        if name == "estop" and value:
            self.estop("The e-stop is pressed.")
        if name == "deadman" and not value and self.machine.state is State.RUNNING:
            self._handle(Event.HOLD, "The dead man's switch is not held.")

    def intervene(self, target: np.ndarray | None) -> None:
        """A person drives to ``target`` (A,), in action space, or lets go (None)."""
        now, last = self.clock.now(), self._last_target
        if target is None:
            self._turned_away = False
            return self._let_go("")
        self._last_target = now
        if now - last > nanoseconds(self.settings.intervention_timeout):
            self._turned_away = False
        if self._turned_away:
            return
        if not np.isfinite(target).all() or np.shape(target) != (len(self.contract.action.names),):
            self._counters["refused interventions"] += 1
            return
        if self.machine.allows(Event.INTERVENE):
            if why := self._take_over(np.asarray(target, np.float64)):
                self._counters["refused interventions"] += 1
                self._waiting = why
                return
            self._handle(Event.INTERVENE, "A person drives.")
            self._begin_ramp()
            self._counters["interventions"] += 1
        if self.machine.state is State.INTERVENTION:
            self._person = _Person(np.asarray(target, np.float64), now)

    def _take_over(self, target: np.ndarray) -> str:
        """Why a person may not take over there: they would move the robot at once and far."""
        if self.machine.state is State.ARMED and (why := self._take_over_measured()):
            return why
        return self.filter.distance_problem(target)

    # What an operator asks for. Each returns why it was refused, or nothing.

    def arm(self) -> str:
        """Get ready: every stream is fresh, the policy warm, the posture inside its limits."""
        if self.machine.state is State.ARMED:
            return ""
        if not self.machine.allows(Event.ARM):
            return self._refusal("arm")
        if why := self._not_ready():
            return why
        self._handle(Event.ARM)
        return ""

    def start(self) -> str:
        """Let the policy drive, from idle (after arming), armed or holding."""
        if why := self._deadman_problem():
            return why
        if self.machine.state is State.IDLE and (why := self.arm()):
            return why
        if not self.machine.allows(Event.START):
            return self._refusal("start")
        if why := self._not_ready():
            return why
        if self.machine.state is State.ARMED and (why := self._take_over_measured()):
            return why
        self._handle(Event.START)
        self._begin_policy()
        return ""

    def hold(self) -> str:
        """Slow down, then hold the posture. A person who drives must let go before they can take over again."""
        self._turned_away = self.machine.state is State.INTERVENTION
        return "" if self._handle(Event.HOLD, "Held by the operator.") else self._refusal("hold")

    def stop(self, reason: str = "Stopped by the operator.") -> str:
        """Slow down, then send nothing more."""
        self._turned_away = self.machine.state is State.INTERVENTION
        return "" if self._handle(Event.STOP, reason) else self._refusal("stop")

    def estop(self, reason: str = "Emergency stop.") -> None:
        """Slow down as fast as the limits allow, then latch until `reset`."""
        self._fail(reason)

    def reset(self) -> str:
        """Leave the fault, if its cause is gone as far as can be seen."""
        if not self.machine.allows(Event.RESET):
            return self._refusal("reset")
        if why := self._estop_problem():
            return why
        self._handle(Event.RESET)
        self._invalid = 0
        return ""

    # The command loop.

    def tick(self) -> Command | None:
        """Advance by one command period. Send what it returns, then call `think`.

        Returns:
            What to send for the end of the period; None where nothing is to be sent.
        """
        now = self._ticked = self.clock.now()
        self._watch(now)
        self._collect(now)
        state = self.machine.state
        if state not in _COMMANDING:
            return None
        self._commanded_at = now + nanoseconds(self.period)
        point = self._advance(state, now)
        if state is State.STOPPING and self.filter.at_rest and not (self._path_sent and self.trajectory_due):
            self._handle(Event.AT_REST)
        return Command(self._commanded_at, point.position, point.velocity, point.acceleration)

    def think(self) -> None:
        """Send the newest observation to the policy, if a chunk is due; resizing images may take milliseconds."""
        if self.machine.state is State.RUNNING:
            self._ask(self.clock.now())

    def preview(self) -> Trajectory | None:
        """The commands to come, ending at rest: what a trajectory controller follows if nothing more arrives.

        From now on `tick` goes where that controller is, by the time, also when the owner is late. It begins with what
        is followed already, for about as long as previews take, so that the controller finds no seam.

        Returns:
            None when it took longer than that: the controller would find a jump. ``trajectory_due`` stays set, and the
            next one reckons with the time that this one took.
        """
        now, began, before = self._ticked, self.clock.now(), self.filter.path
        plan, duration = self._aim(now)
        lead = min(_LEAST_LEAD + 1.5 * max(self._preview_times), _LONGEST_LEAD)
        trajectory = self.filter.preview(
            plan, self._commanded_at, duration, _SPACING, self.settings.lookahead, lead=lead
        )
        self._path_sent = True
        ended = self.clock.now()
        self._preview_times.append((ended - began) / NS)
        self._before, self._send_until = before, now + nanoseconds(lead)
        if ended > self._send_until:
            self.take_back()
            return None
        self.trajectory_due, self._last_trajectory = False, now
        return trajectory

    @property
    def too_late_to_send(self) -> bool:
        """Whether the controller would find a jump, because the trajectory of `preview` was held up on its way."""
        return self.clock.now() > self._send_until

    def take_back(self) -> None:
        """The trajectory that `preview` made last is not sent: go on along the one before, and make another."""
        self.filter.stay_on_path(self._before, self._commanded_at)
        self._counters["late trajectories"] += 1
        self.trajectory_due = True

    def status(self) -> Status:
        """What the runner is doing."""
        now = self.clock.now()
        plan = self._scheduler.plan()
        health = self._worker.health()
        counters = dict(self._counters) | dict(self.filter.counts) | dict(self._scheduler.counters)
        counters |= {"policy failures": health.failures, "superseded requests": health.superseded}
        return Status(
            state=self.machine.state,
            reason=self.machine.reason,
            counters=counters,
            ages={name: self.buffer.age(name, now) for name in self.contract.streams},
            delay=self._scheduler.delay.seconds,
            plan_left=max(0.0, (plan.end - now) / NS) if plan else 0.0,
            waiting=self._waiting,
        )

    # Watching.

    def _watch(self, now: int) -> None:
        state = self.machine.state
        if state in (State.IDLE, State.FAULT):
            return
        if state is State.STOPPING:  # its owner may be ending, deaf already
            if self._signals.values.get("estop"):
                self._fail("The e-stop is pressed.")
            return
        if why := self._estop_problem():
            return self._fail(why)
        if why := self._silence(now) or self._policy_problem(now):
            if state is State.ARMED:
                self._handle(Event.DISARM, why)
            else:
                self._fail(why)
            return
        if state is State.ARMED:
            return
        measured = self.buffer.measured_action()
        if measured is not None and (why := self.filter.tracking_problem(measured)):
            return self._fail(why)
        if state is State.RUNNING and (why := self._deadman_problem()):
            self._handle(Event.HOLD, why)
        if state is State.INTERVENTION:
            timeout = nanoseconds(self.settings.intervention_timeout)
            if self._person is not None and now - self._person.time > timeout:
                self._let_go(" (no target any more)")

    def _silence(self, now: int) -> str:
        """Which stream has been silent for too long."""
        for name in self._used:
            stream = self.contract.streams[name]
            allowed = stream.stale_after * self.limits.stream_grace
            age = self.buffer.age(name, now) - stream.latency
            if age > allowed:
                return f"The stream '{name}' ({stream.topic}) is silent for {age:.2f} s, allowed are {allowed:.2f} s."
        return ""

    def _policy_problem(self, now: int) -> str:
        health = self._worker.health()
        if not health.alive:
            return f"The policy's process has ended. {health.error}".strip()
        if health.ready and (now - health.beat) / NS > self.limits.heartbeat_timeout:
            return f"The policy's process gave no sign of life for {(now - health.beat) / NS:.2f} s."
        if self.machine.state is not State.RUNNING:
            return ""
        if health.busy_since is not None and (now - health.busy_since) / NS > self.limits.policy_timeout:
            return f"One inference takes longer than policy_timeout={self.limits.policy_timeout} s."
        if self._wanted_since is not None and (now - self._wanted_since) / NS > self.limits.policy_timeout:
            because = self._waiting or health.error
            return f"No usable chunk came for policy_timeout={self.limits.policy_timeout} s. {because}".strip()
        return ""

    def _estop_problem(self) -> str:
        signal = self.contract.signals.estop
        if signal is None:
            return ""
        if self._signals.values.get("estop"):
            return "The e-stop is pressed."
        silent = self._signal_silence("estop", signal.stale_after)
        return f"The e-stop's topic {signal.topic} is silent{silent}." if silent else ""

    def _deadman_problem(self) -> str:
        signal = self.contract.signals.deadman
        if signal is None:
            return ""
        if silent := self._signal_silence("deadman", signal.stale_after):
            return f"The dead man's switch {signal.topic} is silent{silent}."
        return "" if self._signals.values.get("deadman") else "The dead man's switch is not held."

    def _signal_silence(self, name: str, stale_after: float) -> str:
        if name not in self._signals.times:
            return ": nothing came"
        age = (self.clock.now() - self._signals.times[name]) / NS
        return f" for {age:.2f} s" if age > stale_after else ""

    def _not_ready(self) -> str:
        now = self.clock.now()
        self._used |= self.buffer.action_streams
        if why := self._estop_problem() or self._silence(now):
            return why
        health = self._worker.health()
        if not health.ready:
            return f"The policy is not loaded yet. {health.error}".strip()
        if why := self._policy_problem(now):
            return why
        observed = self.buffer.observation(now)
        if isinstance(observed, str):
            return observed
        measured = self.buffer.measured_action()
        if measured is None:
            return (
                "Where the robot is cannot be told from the contract's streams; every commanded joint must be measured."
            )
        return self._posture_problem(measured)

    def _posture_problem(self, measured: np.ndarray) -> str:
        """Why the robot cannot start from where it is."""
        far = self.limits.max_start_jump
        for name, value in zip(self.contract.action.names, measured, strict=True):
            axis = self.limits.axes.get(name)
            if axis is not None and not axis.lower - far <= value <= axis.upper + far:
                return (
                    f"{name} is at {value:.3f}, its limits are {axis.lower} to {axis.upper}. Move the robot back, or "
                    "check the unit that the driver publishes."
                )
        return ""

    # The policy.

    def _collect(self, now: int) -> None:
        """Take the newest chunk into the plan."""
        chunk = self._worker.poll()
        failures = self._worker.health().failures
        if failures > self._failures:
            self._failures = failures
            self._asked = None
            self._scheduler.lost()
            self._count_invalid(f"The policy failed: {self._worker.health().error}")
        if chunk is None:
            return
        if self._asked == chunk.id:
            self._asked = None
        if chunk.epoch != self._epoch or self.machine.state is not State.RUNNING:
            self._counters["chunks of before"] += 1
            return
        if why := self.filter.check_chunk(chunk.actions, chunk.observed_at, now, self.filter.state.position):
            self._scheduler.lost()
            return self._count_invalid(why)
        self._invalid = 0
        if not self._scheduler.accept(chunk, now):
            return
        self._last_chunk, self.chunk, self._cut_short, self._wanted_since = now, chunk, False, None
        self._counters["chunks"] += 1
        self.trajectory_due = True

    def _count_invalid(self, why: str) -> None:
        self._counters["invalid chunks"] += 1
        self._invalid += 1
        log.warning("A chunk was thrown away (%d in a row): %s", self._invalid, why)
        if self._invalid >= self.limits.invalid_chunks:
            self._fail(f"{self._invalid} unusable chunks in a row. {why}")

    def _ask(self, now: int) -> None:
        """Send the newest observation off, if the scheduler wants a chunk."""
        if self._settling:
            if not self.filter.at_rest:
                return
            self._begin_policy()
        if self._asked is not None or not self._scheduler.wants(now):
            return
        if self._wanted_since is None:
            self._wanted_since = now
        observed = self.buffer.observation(now)
        if isinstance(observed, str):
            self._counters["no observation"] += self._waiting == ""
            self._waiting = observed
            return
        self._waiting = ""
        agreement = self._scheduler.request(now, observed.time)
        values = {key.key: observed.values[key.key] for key in self.spec.observations}
        values |= {f"{GOAL}{key}": np.asarray(value) for key, value in self.goal.items()}
        self._id += 1
        request = Request(
            id=self._id,
            epoch=self._epoch,
            observed_at=observed.time,
            values=values,
            previous=agreement.previous,
            mask=agreement.mask,
            seed=self.settings.seed + self._id,
            instruction=self.instruction,
        )
        self._worker.submit(request)
        self._asked = request.id

    # Moving.

    def _advance(self, state: State, now: int) -> SetPoint:
        if self._path_sent:
            if state is State.INTERVENTION and now - self._last_trajectory >= nanoseconds(1 / self.spec.fps):
                self.trajectory_due = True
            return self.filter.follow(self._commanded_at)
        if state is State.RUNNING:
            return self._follow(now)
        if state is State.INTERVENTION:
            return self._follow_person(now)
        return self.filter.brake()

    def _follow(self, now: int) -> SetPoint:
        """One step along the plan; braking where there is none, or where it has become too old."""
        plan = self._scheduler.plan()
        if plan is None:
            return self.filter.brake()
        if self._trust(now) <= 0:
            if not self._cut_short and now < plan.end:
                self._counters["plans cut short"] += 1
                self._cut_short = True
            return self.filter.brake()
        return self._step_towards(plan, now)

    def _follow_person(self, now: int) -> SetPoint:
        if self._person is None:
            return self.filter.brake()
        return self._step_towards(_Stay(self._person.target), now)

    def _step_towards(self, plan: Plan, now: int) -> SetPoint:
        ahead = self.settings.lookahead
        position, velocity = self._blended(plan, now + nanoseconds(ahead))
        return self.filter.step(position, velocity, ahead)

    def _blended(self, plan: Plan, time: int) -> tuple[np.ndarray, np.ndarray]:
        """The plan at a time, faded in from the posture at the take-over."""
        position, velocity = plan.at(time)
        share = (time - self._ramp_began) / NS / self.limits.ramp if self.limits.ramp > 0 else 1.0
        if share >= 1:
            return position, velocity
        away = position - self._ramp_from
        return self._ramp_from + share * away, share * velocity + away / self.limits.ramp

    def _trust(self, now: int) -> float:
        """Seconds for which the plan may still be followed."""
        return self.limits.max_open_loop - (now - self._last_chunk) / NS

    def _aim(self, now: int) -> tuple[Plan, float]:
        """What is followed without news, and for how many seconds."""
        state, plan = self.machine.state, self._scheduler.plan()
        if state is State.INTERVENTION and self._person is not None:
            return _Held(self, _Stay(self._person.target)), self.settings.intervention_timeout
        if state is State.RUNNING and plan is not None:
            return _Held(self, plan), max(0.0, self._trust(now))
        return _Stay(self.filter.state.position), 0.0

    def _begin_policy(self) -> None:
        now = self.clock.now()
        self._epoch += 1
        self._asked = None
        self._settling = self._settling and not self.filter.at_rest
        self._invalid = 0
        self._wanted_since = None
        self._last_chunk = now
        self._scheduler.reset(now, self.filter.state.position)
        self._begin_ramp()

    def _begin_ramp(self) -> None:
        self._ramp_from = self.filter.state.position.copy()
        self._ramp_began = self.clock.now()

    def _take_over_measured(self) -> str:
        measured = self.buffer.measured_action()
        if measured is None:
            return "Where the robot is cannot be told."
        left = _SETTLING - (self.clock.now() - self._commanded_at) / NS
        if self._commanded_at and left > 0:
            return f"The robot comes to rest after its last command; try again in {left:.1f} s."
        self.filter.start(measured)
        self._path_sent = False
        return ""

    def _let_go(self, how: str) -> None:
        self._person = None
        if self.settings.resume_after_intervention:
            self._settling = self._handle(Event.RESUME)
            if self._settling:
                self._begin_policy()
        else:
            self._handle(Event.RELEASE, f"The person let go{how}.")

    # Changing the state.

    def _fail(self, reason: str) -> None:
        if self.machine.state is State.STOPPING and self.machine.after_stop is State.FAULT:
            return
        if self.machine.state is not State.FAULT and self._handle(Event.FAIL, reason):
            log.error("%s", reason)
            self._counters["faults"] += 1

    def _handle(self, event: Event, reason: str = "") -> bool:
        before = self.machine.state
        done = self.machine.handle(event, reason)
        if done and self.machine.state is not before:
            log.debug("%s -> %s %s", before.value, self.machine.state.value, reason)
            self._epoch += 1
            self.trajectory_due = self.machine.state in (State.STOPPING, State.INTERVENTION) or event is Event.RESUME
        return done

    def _refusal(self, what: str) -> str:
        return f"Cannot {what} while {self.machine.state.value}. {self.machine.reason}".strip()


class _Stay:
    """The plan to be at one place."""

    start, end = 0, np.iinfo(np.int64).max

    def __init__(self, position: np.ndarray) -> None:
        self._position = position

    def at(self, time: int) -> tuple[np.ndarray, np.ndarray]:
        return self._position, np.zeros_like(self._position)


class _Held:
    """A plan as the runner follows it: faded in, and held at its end."""

    start, end = 0, np.iinfo(np.int64).max

    def __init__(self, runner: Runner, plan: Plan) -> None:
        self._runner, self._plan = runner, plan

    def at(self, time: int) -> tuple[np.ndarray, np.ndarray]:
        return self._runner._blended(self._plan, time)


def check_fit(contract: Contract, spec: PolicySpec) -> None:
    """Compare a policy with the robot.

    Raises:
        UserError: rates, keys, shapes, units or the action differ; every mismatch is named.
    """
    who = f"The policy and the contract of the robot '{contract.robot}'"
    if spec.fps != contract.policy_rate:
        raise UserError(
            f"{who} do not fit: the policy was trained at {spec.fps:g} steps a second, the contract says policy_rate="
            f"{contract.policy_rate:g}."
        )
    check_keys({**contract.observation_specs, "action": contract.action_spec}, (*spec.observations, spec.action), who)
