"""What the runtime may be doing, and the one table that says how it gets from there to there."""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """What the runtime is doing.

    Commands are sent in `RUNNING`, `INTERVENTION` and `STOPPING`, and the last one is repeated in `HOLDING`.
    """

    IDLE = "idle"  # sends nothing; streams may be missing
    ARMED = "armed"  # every stream is fresh, the policy is warm, the commanded posture is the measured one
    RUNNING = "running"  # the policy drives
    INTERVENTION = "intervention"  # a person drives; chunks of before are thrown away
    STOPPING = "stopping"  # slowing down within the limits, towards `Machine.after_stop`
    HOLDING = "holding"  # at rest under control; the policy may go on
    FAULT = "fault"  # at rest, latched with a reason until a person resets it


class Event(Enum):
    """What makes the state change."""

    ARM = "arm"
    DISARM = "disarm"
    START = "start"
    HOLD = "hold"
    STOP = "stop"
    INTERVENE = "intervene"
    RELEASE = "release"  # the person lets go
    RESUME = "resume"  # the person lets go and the policy goes on
    FAIL = "fail"
    AT_REST = "at rest"
    RESET = "reset"


TRANSITIONS: dict[tuple[State, Event], tuple[State, State | None]] = {
    # (state, event): (next state, where a stop ends)
    (State.IDLE, Event.ARM): (State.ARMED, None),
    (State.IDLE, Event.FAIL): (State.FAULT, None),
    (State.ARMED, Event.DISARM): (State.IDLE, None),
    (State.ARMED, Event.STOP): (State.IDLE, None),
    (State.ARMED, Event.START): (State.RUNNING, None),
    (State.ARMED, Event.INTERVENE): (State.INTERVENTION, None),
    (State.ARMED, Event.FAIL): (State.FAULT, None),
    (State.RUNNING, Event.HOLD): (State.STOPPING, State.HOLDING),
    (State.RUNNING, Event.STOP): (State.STOPPING, State.IDLE),
    (State.RUNNING, Event.INTERVENE): (State.INTERVENTION, None),
    (State.RUNNING, Event.FAIL): (State.STOPPING, State.FAULT),
    (State.INTERVENTION, Event.RELEASE): (State.STOPPING, State.HOLDING),
    (State.INTERVENTION, Event.RESUME): (State.RUNNING, None),
    (State.INTERVENTION, Event.HOLD): (State.STOPPING, State.HOLDING),
    (State.INTERVENTION, Event.STOP): (State.STOPPING, State.IDLE),
    (State.INTERVENTION, Event.FAIL): (State.STOPPING, State.FAULT),
    (State.HOLDING, Event.START): (State.RUNNING, None),
    (State.HOLDING, Event.INTERVENE): (State.INTERVENTION, None),
    (State.HOLDING, Event.STOP): (State.IDLE, None),
    (State.HOLDING, Event.FAIL): (State.FAULT, None),
    (State.STOPPING, Event.STOP): (State.STOPPING, State.IDLE),
    (State.STOPPING, Event.FAIL): (State.STOPPING, State.FAULT),
    (State.FAULT, Event.RESET): (State.IDLE, None),
}
"""All that may happen; `Event.AT_REST` leads from `STOPPING` to where the stop ends. Anything else is refused."""


class Machine:
    """The state, changed through `TRANSITIONS` only.

    Attributes:
        state: what the runtime is doing.
        after_stop: where `State.STOPPING` leads to.
        reason: why the runtime is not running, for a person; the first cause of a stop is kept.
    """

    def __init__(self) -> None:
        self.state = State.IDLE
        self.after_stop = State.IDLE
        self.reason = ""

    def allows(self, event: Event) -> bool:
        if event is Event.AT_REST:
            return self.state is State.STOPPING
        return (self.state, event) in TRANSITIONS

    def handle(self, event: Event, reason: str = "") -> bool:
        """Change the state.

        A stop that leads to a fault is not turned into a milder one.

        Returns:
            Whether the table allows the event; otherwise nothing changes.
        """
        if not self.allows(event):
            return False
        if event is Event.AT_REST:
            self.state = self.after_stop
            return True
        stopping_for_fault = self.state is State.STOPPING and self.after_stop is State.FAULT
        if stopping_for_fault:
            return True
        after, end = TRANSITIONS[self.state, event]
        self.state = after
        self.reason = reason
        if end is not None:
            self.after_stop = end
        return True
