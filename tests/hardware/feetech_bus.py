"""Feetech STS3215 servos behind a serial port: their protocol and registers on a pseudo terminal.

What is here answers as the servos do, so that a real driver talks to it through a real serial port: instruction packets
``FF FF id length instruction parameters checksum``, status packets with an error byte, little-endian registers with
sign-magnitude numbers. A servo turns to its goal at a finite speed while its torque is on, and stays where it is pushed
while it is off.
"""

from __future__ import annotations

import os
import select
import threading
import time
import tty
from collections.abc import Callable
from dataclasses import dataclass, field

PING, READ, WRITE, SYNC_READ, SYNC_WRITE = 0x01, 0x02, 0x03, 0x82, 0x83
BROADCAST = 0xFE
MODEL = 777

MODEL_NUMBER, ID = 3, 5
MIN_LIMIT, MAX_LIMIT, HOMING_OFFSET = 9, 11, 31
TORQUE_ENABLE, GOAL_POSITION, PRESENT_POSITION = 40, 42, 56
VOLTAGE, TEMPERATURE = 62, 63
EPROM_END = 40
"""Registers below are permanent; the servo ignores writes to them while its torque is on and they are locked."""
LOCK = 55
SPEED = 45 / 60 * 4096
"""Steps per second at 45 rpm."""


@dataclass
class Servo:
    """One servo.

    Attributes:
        id: on the bus.
        actual: angle of its encoder in steps, before the homing offset.
        registers: 128 bytes.
        torque_losses: how often the torque was switched off while it was on.
    """

    id: int
    actual: float = 2048.0
    registers: bytearray = field(default_factory=lambda: bytearray(128))
    torque_losses: int = 0
    _updated: float = 0.0

    def __post_init__(self) -> None:
        self.registers[0:3] = bytes((3, 10, 0))  # firmware 3.10
        self.put(MODEL_NUMBER, MODEL)
        self.registers[ID] = self.id
        self.put(MAX_LIMIT, 4095)
        self.registers[VOLTAGE], self.registers[TEMPERATURE] = 120, 31
        self.registers[LOCK] = 1
        self.put(GOAL_POSITION, round(self.actual))

    def get(self, address: int) -> int:
        return self.registers[address] | self.registers[address + 1] << 8

    def put(self, address: int, value: int) -> None:
        self.registers[address : address + 2] = bytes((value & 0xFF, value >> 8 & 0xFF))

    @property
    def torque(self) -> bool:
        return bool(self.registers[TORQUE_ENABLE])

    @property
    def position(self) -> float:
        """What it reports: the encoder less the homing offset, in steps."""
        return self.actual - _signed(self.get(HOMING_OFFSET), 11)

    def move(self, now: float) -> None:
        """Turn for the time that has passed."""
        elapsed, self._updated = now - self._updated, now
        if self.torque and self._updated:
            goal = _signed(self.get(GOAL_POSITION), 15)
            goal = min(max(goal, self.get(MIN_LIMIT)), self.get(MAX_LIMIT))
            step = min(max(goal - self.position, -SPEED * elapsed), SPEED * elapsed)
            self.actual += step
        self.put(PRESENT_POSITION, _magnitude(round(self.position), 15))

    def write(self, address: int, data: bytes) -> None:
        if address < EPROM_END and self.torque and self.registers[LOCK]:
            return
        was = self.torque
        self.registers[address : address + len(data)] = data
        self.torque_losses += was and not self.torque


class FeetechBus:
    """Servos on a pseudo terminal; a context manager.

    Args:
        servos: on the bus.
        clock: seconds.

    Attributes:
        port: path of the serial port.
        silent: answers nothing, as when the plug is pulled.
        corrupt: answers with wrong checksums.
    """

    def __init__(self, servos: list[Servo], clock: Callable[[], float] = time.monotonic) -> None:
        self.servos = {servo.id: servo for servo in servos}
        self.silent = False
        self.corrupt = False
        self.instructions = 0
        self._clock = clock
        self._end = threading.Event()

    def __enter__(self) -> FeetechBus:
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave)
        self.port = os.ttyname(self._slave)
        now = self._clock()
        for servo in self.servos.values():
            servo._updated = now
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join(5)
        os.close(self._master)
        os.close(self._slave)

    def _serve(self) -> None:
        buffer = b""
        while not self._end.is_set():
            if not select.select([self._master], [], [], 0.02)[0]:
                self._move()
                continue
            buffer += os.read(self._master, 4096)
            packets, buffer = split_packets(buffer)
            for packet in packets:
                self._handle(packet)

    def _move(self) -> None:
        now = self._clock()
        for servo in self.servos.values():
            servo.move(now)

    def _handle(self, packet: bytes) -> None:
        """Carry out ``id length instruction parameters``."""
        self._move()
        self.instructions += 1
        target, instruction, data = packet[0], packet[2], packet[3:]
        if instruction == SYNC_READ:
            address, length = data[:2]
            for wanted in data[2:]:
                if wanted in self.servos:
                    self._answer(wanted, bytes(self.servos[wanted].registers[address : address + length]))
        elif instruction == SYNC_WRITE:
            address, length = data[:2]
            for start in range(2, len(data), length + 1):
                if data[start] in self.servos:
                    self.servos[data[start]].write(address, data[start + 1 : start + 1 + length])
        elif target == BROADCAST and instruction == PING:
            for wanted in self.servos:
                self._answer(wanted, b"")
        elif target in self.servos:
            servo = self.servos[target]
            if instruction == READ:
                self._answer(target, bytes(servo.registers[data[0] : data[0] + data[1]]))
            elif instruction == WRITE:
                servo.write(data[0], data[1:])
                self._answer(target, b"")
            elif instruction == PING:
                self._answer(target, b"")

    def _answer(self, target: int, data: bytes) -> None:
        if self.silent:
            return
        body = bytes((target, len(data) + 2, 0)) + data
        checksum = ~sum(body) & 0xFF
        os.write(self._master, b"\xff\xff" + body + bytes((checksum ^ self.corrupt,)))


def split_packets(buffer: bytes) -> tuple[list[bytes], bytes]:
    """Instruction packets in a stream, without header and checksum, and what is left; damaged ones are skipped."""
    packets = []
    while (start := buffer.find(b"\xff\xff")) >= 0:
        buffer = buffer[start:]
        if len(buffer) < 4 or len(buffer) < 4 + buffer[3]:
            return packets, buffer
        body, checksum = buffer[2 : 3 + buffer[3]], buffer[3 + buffer[3]]
        if ~sum(body) & 0xFF == checksum:
            packets.append(body)
            buffer = buffer[4 + buffer[3] :]
        else:
            buffer = buffer[2:]
    return packets, buffer[-1:] if buffer.endswith(b"\xff") else b""


def _signed(value: int, bit: int) -> int:
    size = value & ~(1 << bit) & 0xFFFF
    return -size if value >> bit & 1 else size


def _magnitude(value: int, bit: int) -> int:
    return abs(value) | (1 << bit if value < 0 else 0)
