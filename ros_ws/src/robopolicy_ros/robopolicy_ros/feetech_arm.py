"""An SO-101 arm on its serial bus: angles in radians, the gripper's opening from 0 to 1, through LeRobot's driver."""

from __future__ import annotations

import json
import math
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from robopolicy.configuration import dataclass_from
from robopolicy.errors import UserError, require_extra

MODEL = "sts3215"
_RETRIES = 2
"""Tries more, when a servo does not answer within 50 ms."""
GRIPPER = "gripper"
_IDS = {"shoulder_pan": 1, "shoulder_lift": 2, "elbow_flex": 3, "wrist_flex": 4, "wrist_roll": 5, GRIPPER: 6}

_SETTINGS = {
    "Return_Delay_Time": 0,  # answers after 2 us instead of 500 us
    "Maximum_Acceleration": 254,
    "Operating_Mode": 0,  # position
    "P_Coefficient": 16,  # the factory's 32 shakes
    "I_Coefficient": 0,
    "D_Coefficient": 32,
}
_GRIPPER_SETTINGS = {"Max_Torque_Limit": 500, "Protection_Current": 250, "Overload_Torque": 25}
"""Half of the torque and current; a quarter when overloaded: a closed gripper would burn out (as LeRobot sets it)."""


def read_calibration(file: Path) -> dict[str, Any]:
    """Read what ``lerobot-calibrate`` wrote.

    Raises:
        UserError: it is not there, or not such a file.
    """
    motors = require_extra("lerobot.motors", "lerobot")
    try:
        values = json.loads(file.read_text())
    except OSError as error:
        raise UserError(
            f"{file} cannot be read: {error.strerror}. Calibrate first: lerobot-calibrate --robot.type=so101_follower "
            "--robot.port=… --robot.id=… ; hardware/so101/README.md says where the file is."
        ) from error
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict) or set(values) != set(_IDS):
        raise UserError(f"{file}: wanted the motors {', '.join(_IDS)}, found {', '.join(map(str, values))}.")
    return {name: dataclass_from(motors.MotorCalibration, value, f"{file}: {name}") for name, value in values.items()}


@contextmanager
def _plugged_in() -> Iterator[None]:
    """Of a port whose plug is pulled pyserial lets through what is no OSError."""
    try:
        yield
    except termios.error as error:
        raise ConnectionError(f"the serial port is gone: {error}") from error


class FeetechArm:
    """The six servos of one arm.

    Unlike LeRobot's ``SOFollower`` it never switches the torque off by itself: neither when it connects (``configure``
    there does, and a raised arm falls) nor when it ends.

    Args:
        port: serial port.
        calibration: file that ``lerobot-calibrate`` wrote.
        max_relative_target: largest distance of a command from the measured position [rad, share of the opening].
    """

    names = tuple(_IDS)

    def __init__(self, port: str, calibration: Path, max_relative_target: float) -> None:
        motors = require_extra("lerobot.motors", "lerobot")
        feetech = require_extra("lerobot.motors.feetech", "lerobot")
        require_extra("scservo_sdk", "lerobot")
        modes = motors.MotorNormMode
        self.max_relative_target = max_relative_target
        self._calibration_file = calibration
        self._bus = feetech.FeetechMotorsBus(
            port,
            {
                name: motors.Motor(id_, MODEL, modes.RANGE_0_100 if name == GRIPPER else modes.DEGREES)
                for name, id_ in _IDS.items()
            },
            read_calibration(calibration),
        )
        self._units = np.array([100.0 if name == GRIPPER else math.degrees(1.0) for name in self.names])
        self._measured = np.full(len(self.names), np.nan)

    def connect(self) -> None:
        """Open the port, find all servos, check their calibration, and hold the posture in which the arm is.

        Raises:
            UserError: no port, missing or wrong servos, another calibration, or settings that cannot be changed.
        """
        try:
            if not self._find_servos():
                raise UserError(
                    f"{self._calibration_file} is not the calibration that the servos hold. Is it another arm's? Else "
                    "write it with lerobot-calibrate (ENTER uses the file)."
                )
            self._configure()
            self._hold_here()
        except (ConnectionError, RuntimeError) as error:
            self.close(release=False)
            raise UserError(f"The arm on {self._bus.port} does not answer as it should: {error}") from error
        except UserError:
            self.close(release=False)
            raise

    @_plugged_in()
    def _find_servos(self) -> bool:
        """Open the port and ask every servo; whether they hold the calibration. A first answer is easily lost."""
        for tries_left in range(_RETRIES, -1, -1):
            try:
                self._bus.connect()
                return bool(self._bus.is_calibrated)
            except (ConnectionError, RuntimeError):
                if not tries_left:
                    raise
                self.close(release=False)
        raise AssertionError

    @_plugged_in()
    def _configure(self) -> None:
        """Write permanent settings that differ; that needs the torque off, so it is refused while the arm is held."""
        for name in self.names:
            wanted = _SETTINGS | (_GRIPPER_SETTINGS if name == GRIPPER else {})
            differing = {
                key: value for key, value in wanted.items() if self._bus.read(key, name, num_retry=_RETRIES) != value
            }
            if differing and self._bus.read("Torque_Enable", name, num_retry=_RETRIES):
                raise UserError(
                    f"The servo {name} has other settings ({', '.join(differing)}) and is switched on. Hold the arm, "
                    "switch its power off and on, and start again."
                )
            if differing:
                self._bus.write("Lock", name, 0, num_retry=_RETRIES)
                for key, value in differing.items():
                    self._bus.write(key, name, value, num_retry=_RETRIES)
                self._bus.write("Lock", name, 1, num_retry=_RETRIES)
            self._bus.write("Acceleration", name, 254, num_retry=_RETRIES)

    @_plugged_in()
    def _hold_here(self) -> None:
        # A servo that is switched on turns at once to its last goal, wherever that was.
        held = [name for name in self.names if self._bus.read("Torque_Enable", name, num_retry=_RETRIES)]
        for name in self.names:
            if name not in held:
                here = self._bus.read("Present_Position", name, normalize=False, num_retry=_RETRIES)
                self._bus.write("Goal_Position", name, here, normalize=False, num_retry=_RETRIES)
                self._bus.write("Torque_Enable", name, 1, num_retry=_RETRIES)
        self.read()

    def read(self) -> np.ndarray:
        """Positions (6,), in the order of ``names``: [rad], the gripper's opening 0 to 1.

        Raises:
            ConnectionError: the bus did not answer, nor a second time.
        """
        values = self._read_all("Present_Position")
        self._measured = np.array([values[name] for name in self.names]) / self._units
        return self._measured

    @_plugged_in()
    def write(self, position: np.ndarray) -> np.ndarray:
        """Send goals (6,), at most ``max_relative_target`` from the last measurement; returns what was sent.

        Raises:
            ConnectionError: the bus cannot be written to.
        """
        limit = self.max_relative_target
        sent: np.ndarray = np.clip(position, self._measured - limit, self._measured + limit)
        goals = sent * self._units
        self._bus.sync_write("Goal_Position", dict(zip(self.names, goals.tolist(), strict=True)))
        return sent

    def temperatures(self) -> dict[str, int]:
        """Of each servo [deg C].

        Raises:
            ConnectionError: the bus did not answer.
        """
        return {name: int(value) for name, value in self._read_all("Present_Temperature").items()}

    @_plugged_in()
    def _read_all(self, register: str) -> dict[str, float]:
        """One register of all servos, with a second try."""
        for last in (False, True):
            # Feetech's package leaves late answers in the buffer; they would be taken for those of the next cycle.
            self._bus.port_handler.ser.reset_input_buffer()
            try:
                values: dict[str, float] = self._bus.sync_read(register)
                return values
            except ConnectionError:
                if last:
                    raise
                time.sleep(0.002)
        raise AssertionError

    @_plugged_in()
    def close(self, release: bool) -> None:
        """Close the port; ``release`` switches the torque off first, and an arm that is not at rest falls.

        Raises:
            ConnectionError: the bus did not answer.
        """
        if self._bus.is_connected:
            self._bus.disconnect(disable_torque=release)
