"""The engine that follows the published guidance of real-time chunking, and what it is told; without torch."""

from __future__ import annotations

from dataclasses import dataclass

from robopolicy.errors import UserError

GUIDED_ENGINE = "torch-rtc"
"""The engine that follows the published guidance; all others project (``soft``)."""


@dataclass(frozen=True)
class RtcConfig:
    """How chunks agree with the one before.

    Attributes:
        beta: largest weight of the guidance; None: the number of network calls, 5 in the paper. 0: no guidance.
        warm_start: network calls to leave out: sampling starts from the chunk before, noised to the level of the first
            call that is made (RTI-DP, arXiv 2508.05396; STEP, arXiv 2602.08245). 0: from pure noise.
    """

    beta: float | None = None
    warm_start: int = 0

    def __post_init__(self) -> None:
        if (self.beta is not None and self.beta < 0) or self.warm_start < 0:
            raise UserError(
                f"scheduler.beta={self.beta} and scheduler.warm_start={self.warm_start} must not be negative."
            )
