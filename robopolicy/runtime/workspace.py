"""Whether the tool of an arm stays in its box while the joints move and can be stopped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from robopolicy.errors import UserError
from robopolicy.runtime.braking import Motion, stopping_path
from robopolicy.runtime.contract import Contract
from robopolicy.runtime.kinematics import forward
from robopolicy.runtime.limits import Limits

SPACING = 0.01
"""Seconds between the samples of a stop."""


class ToolBox:
    """The box of a tool that is moved by joint commands.

    Args:
        contract: with commands for all of its joints.
        limits: with workspace and kinematics.

    Raises:
        UserError: there are no kinematics, or a joint is not commanded.
    """

    def __init__(self, contract: Contract, limits: Limits) -> None:
        if limits.workspace is None or limits.kinematics is None:
            raise UserError("workspace: the tool's position is computed from joints; give kinematics, or no workspace.")
        self._kinematics = limits.kinematics
        box = np.array([limits.workspace.x, limits.workspace.y, limits.workspace.z])
        self._lower, self._upper = box[:, 0], box[:, 1]
        self._entries, self._scale, self._offset = _joint_entries(contract)
        axes = [limits.axes[contract.action.names[entry]] for entry in self._entries]
        size = np.abs(self._scale)
        self._acceleration = np.array([axis.acceleration for axis in axes]) / size
        self._jerk = np.array([axis.jerk for axis in axes]) / size
        links = [joint.xyz for joint in limits.kinematics.joints[1:]] + [limits.kinematics.tool_xyz]
        self._reach = np.cumsum(np.linalg.norm(links, axis=1)[::-1])[::-1]
        self._anchor: tuple[np.ndarray, float] = np.zeros(len(axes)), -np.inf

    def arm(self, motions: Sequence[Motion]) -> np.ndarray:
        """(n, 3) position, velocity and acceleration of the joints' entries, out of all axes."""
        return np.array([motions[entry] for entry in self._entries])

    def stays(self, before: np.ndarray, after: np.ndarray, period: float) -> bool:
        """Whether the tool stays in the box until ``after``, and while the arm is stopped from there.

        Between two samples of the stop the tool is off their straight line by less than an eighth of its largest
        acceleration times the spacing squared; the box is that much smaller. A tool that is outside must not go
        farther out.

        Args:
            before, after: (n, 3) position, velocity and acceleration of the joints' entries, one period apart.
            period: seconds between them.
        """
        before, after = self._joints(before), self._joints(after)
        if self._far(before, after, period):
            return True
        tool = forward(self._kinematics, before[:, 0])[0]
        self._anchor = before[:, 0], float(np.min([tool - self._lower, self._upper - tool]))
        if self._far(before, after, period):
            return True
        path, velocities = stopping_path(after, self._acceleration, self._jerk, SPACING)
        tools = forward(self._kinematics, path)[0]
        # Of the tool's acceleration: r a of each joint, and r v v of each two, with r the links behind a joint.
        speed = float(np.max(np.sum(np.abs(velocities), axis=1) + SPACING * np.sum(self._acceleration)))
        bulge = SPACING**2 / 8 * (float(self._acceleration @ self._reach) + float(self._reach[0]) * speed**2)
        lower, upper = np.minimum(self._lower + bulge, tool), np.maximum(self._upper - bulge, tool)
        return bool(np.all(tools >= lower) and np.all(tools <= upper))

    def _far(self, before: np.ndarray, after: np.ndarray, period: float) -> bool:
        """Whether the tool cannot get to a side of the box, however the joints' ways go together.

        No joint moves the tool farther than its angle times the length of the links behind it. A joint stops within
        ``u (|a| / jerk + u / 2 A + A / 2 jerk)`` where ``u = |v| + a^2 / 2 jerk`` is the most its speed can become.
        """
        joints, clearance = self._anchor
        (q, v, _), (_, v_after, a_after) = before.T, np.abs(after.T)
        u = v_after + a_after**2 / (2 * self._jerk)
        stop = u * (a_after / self._jerk + u / (2 * self._acceleration) + self._acceleration / (2 * self._jerk))
        step = period * (np.abs(v) + period * self._acceleration)
        way = np.maximum(np.abs(q - joints) + step, np.abs(after[:, 0] - joints) + stop)
        return bool(way @ self._reach < clearance)

    def _joints(self, motions: np.ndarray) -> np.ndarray:
        joints = motions / self._scale[:, None]
        joints[:, 0] -= self._offset / self._scale
        return joints


def _joint_entries(contract: Contract) -> tuple[list[int], np.ndarray, np.ndarray]:
    """For each joint: its entry of the action, and the scale and offset of ``entry = scale * angle + offset``."""
    found: dict[str, tuple[int, float, float]] = {}
    for command in contract.commands.values():
        count = len(command.entries)
        scales, offsets = (np.broadcast_to(values, count) for values in (command.scale, command.offset))
        for name, entry, scale, offset in zip(command.names, command.entries, scales, offsets, strict=False):
            found.setdefault(name, (entry, float(scale), float(offset)))
    if missing := [name for name in contract.joints if name not in found]:
        raise UserError(f"workspace: the joints {', '.join(missing)} are not commanded, so the tool is not known.")
    entries, scale, offset = zip(*(found[name] for name in contract.joints), strict=True)
    return list(entries), np.array(scale), np.array(offset)
