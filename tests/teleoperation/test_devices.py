"""Devices without hardware: real events of the window, a virtual gamepad of SDL, reports as a SpaceMouse sends them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pygame
import pytest
from numpy.testing import assert_allclose

from robopolicy.errors import UserError
from robopolicy.teleoperation.command import Command, SessionKey
from robopolicy.teleoperation.devices import gamepad, keyboard, spacemouse
from robopolicy.teleoperation.devices.gamepad import Gamepad
from robopolicy.teleoperation.devices.keyboard import Keyboard, session_keys
from robopolicy.teleoperation.devices.spacemouse import SpaceMouse
from robopolicy.teleoperation.window import Window


def key(*codes: int, down: bool = True) -> None:
    for code in codes:
        pygame.event.post(pygame.event.Event(pygame.KEYDOWN if down else pygame.KEYUP, key=code))


def test_held_keys_move_the_tool_until_they_are_released(window: Window) -> None:
    device, speed = Keyboard(), keyboard.AXES.linear_speed
    key(pygame.K_w)
    for _ in range(3):
        assert_allclose(device.read(window.events()).twist, [speed, 0, 0, 0, 0, 0])
    key(pygame.K_s)  # against each other
    assert not device.read(window.events()).twist.any()
    key(pygame.K_w, pygame.K_s, down=False)
    assert not device.read(window.events()).twist.any()


def test_a_tap_shorter_than_a_control_period_moves_the_tool_once(window: Window) -> None:
    device = Keyboard()
    key(pygame.K_j)
    key(pygame.K_j, down=False)
    assert device.read(window.events()).twist[5] == keyboard.AXES.angular_speed
    assert not device.read(window.events()).twist.any()


def test_shift_is_slow_and_space_is_the_gripper(window: Window) -> None:
    device = Keyboard()
    key(pygame.K_LSHIFT, pygame.K_f, pygame.K_SPACE)
    command = device.read(window.events())
    assert command.twist[2] == pytest.approx(-0.25 * keyboard.AXES.linear_speed)
    assert command.opening == 0.0
    assert device.read(window.events()).opening == 0.0
    device.reset()
    assert device.read(window.events()).opening == 1.0


def test_the_windows_keys_and_its_close_button_speak_to_the_session(window: Window) -> None:
    key(pygame.K_RETURN, pygame.K_y, pygame.K_w)
    assert session_keys(window.events()) == {SessionKey.TOGGLE, SessionKey.SUCCESS}
    pygame.event.post(pygame.event.Event(pygame.QUIT))
    assert session_keys(window.events()) == {SessionKey.QUIT}


class VirtualGamepad:
    """SDL's own virtual game controller; programs cannot tell it from one that is plugged in."""

    def __init__(self) -> None:
        loaded = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libSDL2-2" in line]
        self._sdl = ctypes.CDLL(loaded[0])
        self._sdl.SDL_JoystickOpen.restype = ctypes.c_void_p
        self._number = self._sdl.SDL_JoystickAttachVirtual(1, 6, 15, 0)  # a game controller: axes, buttons, hats
        self._joystick = ctypes.c_void_p(self._sdl.SDL_JoystickOpen(self._number))
        self.push(pygame.CONTROLLER_AXIS_TRIGGERLEFT, -1.0)  # triggers rest at the lower end
        self.push(pygame.CONTROLLER_AXIS_TRIGGERRIGHT, -1.0)

    def push(self, axis: int, deflection: float) -> None:
        self._sdl.SDL_JoystickSetVirtualAxis(self._joystick, axis, ctypes.c_int16(round(32767 * deflection)))

    def press(self, button: int, down: bool = True) -> None:
        self._sdl.SDL_JoystickSetVirtualButton(self._joystick, button, int(down))

    def unplug(self) -> None:
        self._sdl.SDL_JoystickDetachVirtual(self._number)


@pytest.fixture
def pad(monkeypatch: pytest.MonkeyPatch, window: Window) -> Iterator[VirtualGamepad]:
    if not Path("/proc/self/maps").exists():
        pytest.skip("the loaded SDL library is found through /proc")
    monkeypatch.setenv("SDL_JOYSTICK_ALLOW_BACKGROUND_EVENTS", "1")  # this window never has the focus
    pygame.joystick.init()
    virtual = VirtualGamepad()
    yield virtual
    virtual.unplug()
    pygame.event.get()
    pygame.joystick.quit()


def test_sticks_cross_and_shoulders_move_the_tool(window: Window, pad: VirtualGamepad) -> None:
    device = Gamepad()
    linear, angular = gamepad.AXES.linear_speed, gamepad.AXES.angular_speed
    moves = [
        (pygame.CONTROLLER_AXIS_LEFTY, -1.0, [linear, 0, 0, 0, 0, 0]),  # up is away
        (pygame.CONTROLLER_AXIS_LEFTX, -1.0, [0, linear, 0, 0, 0, 0]),
        (pygame.CONTROLLER_AXIS_RIGHTY, -1.0, [0, 0, linear, 0, 0, 0]),
        (pygame.CONTROLLER_AXIS_RIGHTX, 1.0, [0, 0, 0, 0, 0, -angular]),  # to the right is clockwise from above
    ]
    for axis, deflection, wanted in moves:
        pad.push(axis, deflection)
        assert_allclose(device.read(window.events()).twist, wanted, atol=1e-4)
        pad.push(axis, 0.05)  # sticks do not rest at zero
        assert not device.read(window.events()).twist.any()
    pad.press(pygame.CONTROLLER_BUTTON_DPAD_UP)
    pad.press(pygame.CONTROLLER_BUTTON_RIGHTSHOULDER)
    assert_allclose(device.read(window.events()).twist[3:], np.array([1, 1, 0]) * angular / np.sqrt(2), atol=1e-9)
    device.close()


def test_the_trigger_closes_the_gripper_and_buttons_speak_to_the_session(window: Window, pad: VirtualGamepad) -> None:
    device = Gamepad()
    assert device.read(window.events()).opening == 1.0
    pad.push(pygame.CONTROLLER_AXIS_TRIGGERRIGHT, 0.0)  # half pulled
    assert device.read(window.events()).opening == pytest.approx(0.5, abs=0.01)
    pad.push(pygame.CONTROLLER_AXIS_TRIGGERRIGHT, 1.0)
    pad.press(pygame.CONTROLLER_BUTTON_START)
    command = device.read(window.events())
    assert (command.opening, command.keys) == (0.0, {SessionKey.TOGGLE})
    assert not device.read(window.events()).keys  # once for each press, however long it is held
    pad.press(pygame.CONTROLLER_BUTTON_A)
    pad.press(pygame.CONTROLLER_BUTTON_BACK)
    assert device.read(window.events()).keys == {SessionKey.SUCCESS, SessionKey.UNDO}
    device.close()


def test_a_missing_and_an_unplugged_gamepad_are_told(window: Window, pad: VirtualGamepad) -> None:
    device = Gamepad()
    pad.unplug()
    with pytest.raises(UserError, match="gamepad was disconnected. Stored episodes are safe"):
        device.read(window.events())
    device.close()
    with pytest.raises(UserError, match="no gamepad that SDL knows"):
        Gamepad()


class RecordedReports:
    """Plays HID reports in the place of an opened device of easyhid, which returns nothing when none waits."""

    def __init__(self) -> None:
        self.waiting: list[bytes] = []
        self.unplugged = False

    def read(self, size: int) -> bytearray:
        if self.unplugged:
            import easyhid

            raise easyhid.HIDException("Failed to read from HID device: -1")
        return bytearray(self.waiting.pop(0).ljust(size, b"\0")) if self.waiting else bytearray()

    def close(self) -> None: ...


def report(number: int, *values: int) -> bytes:
    """A HID report: its number, then 16-bit little-endian values, as USB SpaceMice send them."""
    return bytes([number]) + b"".join(value.to_bytes(2, "little", signed=True) for value in values)


def make_mouse(model: str) -> tuple[SpaceMouse, RecordedReports]:
    pyspacemouse = pytest.importorskip("pyspacemouse")
    spec = pyspacemouse.apply_axis_convention(pyspacemouse.get_device_specs()[model], pyspacemouse.AxisConvention.ROS)
    reports = RecordedReports()
    return SpaceMouse(pyspacemouse.SpaceMouseDevice(spec, reports)), reports


def read(device: SpaceMouse, reports: RecordedReports, *new: bytes) -> Command:
    reports.waiting += new
    command = device.read([])
    assert not reports.waiting  # old reports must not pile up: the arm would lag more and more
    return command


FULL = 350  # counts of a SpaceMouse at full deflection
AXIS_OF_COUNT = {0: (1, -1), 1: (0, -1), 2: (2, -1), 3: (4, -1), 4: (3, -1), 5: (5, -1)}


@pytest.mark.parametrize("model", ["SpaceMouseCompact", "SpaceMouseWirelessNew"])
@pytest.mark.parametrize("count", range(6))
def test_the_cap_moves_the_tool_as_it_is_moved(model: str, count: int) -> None:
    """Counts are x right, y to the user, z down and rotations about them; the tool's frame is x away, y left, z up."""
    device, reports = make_mouse(model)
    values = [FULL if i == count else 0 for i in range(6)]
    combined = model == "SpaceMouseWirelessNew"  # translation and rotation in one report of 13 bytes
    sent = [report(1, *values)] if combined else [report(1, *values[:3]), report(2, *values[3:])]
    axis, sign = AXIS_OF_COUNT[count]
    wanted = np.zeros(6)
    wanted[axis] = sign * (spacemouse.AXES.linear_speed if axis < 3 else spacemouse.AXES.angular_speed)
    assert_allclose(read(device, reports, *sent).twist, wanted, atol=1e-12)
    assert_allclose(read(device, reports).twist, wanted, atol=1e-12)  # no news: it is still held
    device.close()


def test_the_newest_of_many_reports_counts_and_a_short_press_is_not_lost() -> None:
    device, reports = make_mouse("SpaceMouseCompact")
    pushes = [report(1, 0, -counts, 0) for counts in range(0, FULL + 1, 5)]
    left, none = bytes([3, 1, 0]), bytes([3, 0, 0])
    command = read(device, reports, *pushes, left, none)
    assert command.twist[0] == pytest.approx(spacemouse.AXES.linear_speed)
    assert (command.opening, command.keys) == (0.0, frozenset())
    right = bytes([3, 2, 0])
    assert read(device, reports, right).keys == {SessionKey.TOGGLE}
    assert read(device, reports, right).keys == frozenset()  # held
    device.reset()
    assert read(device, reports, none).opening == 1.0


def test_a_cap_at_rest_does_not_creep() -> None:
    device, reports = make_mouse("SpaceMouseCompact")
    assert not read(device, reports, report(1, 12, -30, 8), report(2, -20, 5, 40)).twist.any()


def test_a_missing_and_an_unplugged_mouse_are_told() -> None:
    device, reports = make_mouse("SpaceMouseCompact")
    reports.unplugged = True
    with pytest.raises(UserError, match="SpaceMouse was disconnected. Stored episodes are safe"):
        device.read([])
    with pytest.raises(UserError, match="(?s)SpaceMouse cannot be opened: .*libhidapi-hidraw0.*udev"):
        SpaceMouse.open()
