"""What one client may cost the server, and the others."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields

from robopolicy.errors import UserError
from robopolicy.spec import KeySpec, PolicySpec


@dataclass(frozen=True)
class Limits:
    """Limits of a policy server; times in seconds.

    Attributes:
        max_message_bytes: longest frame from a client; None: twice what a history of observations takes, and 64 KiB.
        max_connections: clients at a time.
        rate: requests per second of one connection; it may send as many at once after a pause.
        open_timeout: for the handshake, from the first byte to the last; with TLS, for the TLS handshake too.
        message_timeout: for a message in several fragments, from the first to the last.
        write_timeout: a client that has not read its replies for so long is dropped.
        ping_interval: between pings; a client that does not answer within `ping_timeout` is dropped. One that stops
            in the middle of a frame cannot answer.
        ping_timeout: see `ping_interval`.
        close_timeout: for the closing handshake.
        stuck_after: an inference that takes longer makes ``/healthz`` answer 503.
        stop_timeout: how long waiting requests are answered when the server is told to stop.
    """

    max_message_bytes: int | None = None
    max_connections: int = 16
    rate: float = 100.0
    open_timeout: float = 10.0
    message_timeout: float = 10.0
    write_timeout: float = 10.0
    ping_interval: float = 10.0
    ping_timeout: float = 20.0
    close_timeout: float = 5.0
    stuck_after: float = 30.0
    stop_timeout: float = 10.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"{field.name}={value} must be above 0.")

    def message_bytes(self, spec: PolicySpec) -> int:
        """Longest frame from a client of this policy."""
        if self.max_message_bytes is not None:
            return self.max_message_bytes
        history = spec.n_obs_steps * sum(map(_step_bytes, spec.observations))
        others = sum(map(_step_bytes, spec.goals)) + spec.horizon * (_step_bytes(spec.action) + 4)
        return 2 * (history + others) + 2**16


def _step_bytes(key: KeySpec) -> int:
    return math.prod(key.shape) * (1 if key.role == "image" else 4)


class TokenBucket:
    """At most ``rate`` requests per second on average, and as many at once."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.size = max(rate, 1.0)
        self._left = self.size
        self._at = time.monotonic()

    def take(self) -> bool:
        """Whether one more request is within the rate."""
        now = time.monotonic()
        self._left = min(self.size, self._left + self.rate * (now - self._at))
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
