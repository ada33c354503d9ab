"""The loop that joins device, session and window, one turn for each control period."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from robopolicy import simulator
from robopolicy.errors import UserError, require_extra
from robopolicy.teleoperation.command import Device
from robopolicy.teleoperation.devices.keyboard import SESSION_HINTS, session_keys
from robopolicy.teleoperation.rate import RateKeeper
from robopolicy.teleoperation.session import Phase, Session
from robopolicy.teleoperation.window import GREY, RED, YELLOW, Line, View, Window

log = logging.getLogger(__name__)

_IMAGES = "observation.image."
_PHASE_COLOURS = {Phase.READY: GREY, Phase.RECORDING: RED, Phase.REVIEW: YELLOW}


def make_playable(env_id: str, *, time_limit: float, **options: Any) -> Any:
    """Make an environment that renders, with a time limit of a person instead of the registered one.

    Args:
        env_id: Gymnasium id.
        time_limit: seconds of an episode.
        options: arguments of the environment, e.g. ``cameras``, ``image_size``, ``control``, ``render_size``.

    Raises:
        UserError: the id is unknown or the environment refuses its arguments.
    """
    own = {"max_episode_steps": -1, "render_mode": "rgb_array"}
    for name in own.keys() & options.keys():
        raise UserError(f"The environment option '{name}' is settled by teleoperation; leave it out.")
    env = simulator.make_environment(env_id, **own, **options)
    limit = max(1, round(time_limit * env.metadata["render_fps"]))
    return require_extra("gymnasium", "sim").wrappers.TimeLimit(env, limit)


def view_heading(env: Any, camera: str = "scene") -> float:
    """Direction in which a MuJoCo camera looks, as a rotation about the vertical from the world's x axis, in radians.

    The environment must have been reset. Zero where there is no such camera.
    """
    model, data = getattr(env.unwrapped, "model", None), getattr(env.unwrapped, "data", None)
    if model is None or data is None or camera not in {model.camera(i).name for i in range(model.ncam)}:
        return 0.0
    right = data.camera(camera).xmat.reshape(3, 3)[:, 0]
    return float(np.arctan2(right[0], -right[1]))


def run(session: Session, device: Device, window: Window, env: Any, keeper: RateKeeper) -> None:
    """Let the operator work until the session is finished."""
    shown: Mapping[str, np.ndarray] | None = None
    scene = np.zeros((1, 1, 3), np.uint8)
    while not session.finished:
        events = window.events()
        command = device.read(events)
        session.advance(replace(command, keys=command.keys | session_keys(events)))
        if session.phase is not Phase.RECORDING:
            device.reset()
        if session.observation is not shown:
            scene, shown = env.render(), session.observation
        hints = (*device.hints, *SESSION_HINTS)
        window.show(View(scene, _inset(session.observation), status_lines(session, keeper), hints))
        keeper.wait()
    if keeper.late > 0.1 * keeper.periods:
        log.warning(
            "%d of %d control periods took longer than 1/%g s: the arm moved slower than in real time. The data are "
            "right, they count simulated time; --view-height 240 and fewer or smaller cameras make it faster.",
            keeper.late,
            keeper.periods,
            keeper.rate,
        )


def status_lines(session: Session, keeper: RateKeeper) -> list[Line]:
    """The overlay: what to do, what is going on, how fast."""
    report, colour = session.report, _PHASE_COLOURS[session.phase]
    rate = f"{keeper.measured:.1f} of {keeper.rate:g} Hz"
    return [
        Line(session.instruction),
        Line(f"{session.phase.value}   step {session.steps}   {session.steps / keeper.rate:.1f} s", colour),
        Line(f"{report.episodes_in_dataset} episodes stored, {report.recorded} in this session   seed {session.seed}"),
        Line(f"{rate}: too slow, the arm lags" if keeper.too_slow else rate, RED if keeper.too_slow else GREY),
        Line(session.message, YELLOW),
    ]


def _inset(observation: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """The wrist camera's image, else that of another camera than the scene's, else None."""
    cameras = [name for name in observation if name.startswith(_IMAGES) and name != f"{_IMAGES}scene"]
    wrist = f"{_IMAGES}wrist"
    chosen = wrist if wrist in cameras else next(iter(cameras), None)
    return None if chosen is None else observation[chosen]
