"""Settings of the runtime from plain values: YAML, the command line, ROS parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from robopolicy.configuration import dataclass_from
from robopolicy.errors import UserError, did_you_mean
from robopolicy.runtime.chunk_scheduler import (
    AsynchronousSettings,
    RealTimeChunkingSettings,
    SchedulerSettings,
    SynchronousSettings,
    TemporalEnsemblingSettings,
)

KINDS = (SynchronousSettings, AsynchronousSettings, TemporalEnsemblingSettings, RealTimeChunkingSettings)
SCHEDULERS = tuple(str(kind.name) for kind in KINDS)
"""Names of the schedulers."""


@dataclass(frozen=True)
class _Chosen:
    scheduler: SchedulerSettings


def scheduler_settings(name: str, values: Mapping[str, Any]) -> SchedulerSettings:
    """Settings of the scheduler of a name.

    Raises:
        UserError: there is none of this name, or it has no such setting.
    """
    if name not in SCHEDULERS:
        raise UserError(
            f"There is no scheduler '{name}'; choose one of {', '.join(SCHEDULERS)}.{did_you_mean(name, SCHEDULERS)}"
        )
    return dataclass_from(_Chosen, {"scheduler": {"name": name, **values}}, "").scheduler
