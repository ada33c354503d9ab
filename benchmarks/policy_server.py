"""Robots that ask one policy server for chunks: replies, losses and latency, against openpi's way of serving.

Both servers run the same engine, in processes of their own with one thread for the policy; they take turns, so that a
busy machine slows both. The plain server is openpi's: it computes inside the event loop that reads from the sockets.
Each robot is a process that wants a chunk ``hz`` times a second, from fresh images. openpi's public client waits for
its chunk, and lets a tick go that it is late for; latency counts from sending. Our own client sends at every tick,
whether or not the last chunk has come (pipelined); latency counts from the tick, and superseded requests have none. So
its latencies cannot be compared with those of the waiting client. A request without a reply is lost.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from robopolicy.manifest import read_manifest
from robopolicy.serving.client import PolicyClient
from robopolicy.serving.server import PolicyServer, ServerConfig
from robopolicy.spec import GOAL, INSTRUCTION, PolicySpec

FRAMES = 16
"""Different observations of a robot."""


@dataclass
class Tally:
    """What a robot counted; latencies in seconds."""

    requests: int = 0
    replies: int = 0
    superseded: int = 0
    skipped: int = 0
    latencies: list[float] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.requests += other.requests
        self.replies += other.replies
        self.superseded += other.superseded
        self.skipped += other.skipped
        self.latencies += other.latencies


@dataclass(frozen=True)
class Row:
    """A line of the table: latencies in milliseconds of the chunks that came."""

    server: str
    client: str
    requests: int
    replies: int
    lost: int
    superseded: int
    skipped_ticks: int
    p50_ms: float
    p99_ms: float
    max_ms: float


def serve_ours(bundle: str, engine: str | None, port: Any) -> None:
    """Serve with robopolicy until the process is terminated."""
    from robopolicy.export.open import open_policy

    async def run() -> None:
        with closing(open_policy(Path(bundle), engine)) as policy:
            async with PolicyServer(policy, ServerConfig(port=0)) as server:
                port.send((server.port, policy.name))
                await asyncio.Event().wait()

    asyncio.run(run())


def serve_plainly(bundle: str, engine: str | None, port: Any) -> None:
    """Serve as openpi's WebsocketPolicyServer does until the process is terminated."""
    from robopolicy.export.open import open_policy

    with closing(open_policy(Path(bundle), engine)) as policy:
        policy.warmup()
        rng = np.random.default_rng(0)

        async def handle(socket: ServerConnection) -> None:
            packer = msgpack_numpy.Packer()
            await socket.send(packer.pack({}))
            while True:
                try:
                    observation = msgpack_numpy.unpackb(await socket.recv())
                    rows = {k: [v] if isinstance(v, str) else v[None] for k, v in observation.items()}
                    actions = policy.act(rows, policy.draw_noise(1, rng))[0]
                    await socket.send(packer.pack({"actions": actions}))
                except ConnectionClosed:
                    return

        async def run() -> None:
            async with serve(handle, "127.0.0.1", 0, compression=None, max_size=None) as server:
                port.send((next(iter(server.sockets)).getsockname()[1], policy.name))
                await asyncio.Event().wait()

        asyncio.run(run())


def observations(spec: PolicySpec, seed: int) -> list[dict[str, Any]]:
    """Whole histories of noise, and what the policy is told."""
    rng = np.random.default_rng(seed)
    told: dict[str, Any] = {GOAL + k.key: np.zeros(k.shape, np.float32) for k in spec.goals}
    told |= {INSTRUCTION: spec.tasks[0].instruction} if spec.tasks else {}

    def draw(shape: tuple[int, ...], image: bool) -> np.ndarray:
        if image:
            return rng.integers(256, size=shape, dtype=np.uint8)
        return rng.uniform(-0.5, 0.5, shape).astype(np.float32)

    def frame() -> dict[str, Any]:
        keys = spec.observations
        return {k.key: draw((spec.n_obs_steps, *k.shape), k.role == "image") for k in keys} | told

    return [frame() for _ in range(FRAMES)]


def waiting_robot(port: int, spec: PolicySpec, hz: float, seconds: float, begin: float, seed: int) -> Tally:
    """openpi's public client: one request at a time."""
    frames, tally = observations(spec, seed), Tally()
    client = WebsocketClientPolicy("127.0.0.1", port)
    _sleep_until(begin)
    tick, ticks = 0, int(seconds * hz)
    while tick < ticks:
        _sleep_until(begin + tick / hz)
        sent = time.time()
        tally.requests += 1
        reply = client.infer(frames[tick % FRAMES])
        tally.replies += "actions" in reply
        tally.latencies.append(time.time() - sent)
        due = max(tick + 1, int((time.time() - begin) * hz))
        tally.skipped += min(due, ticks) - tick - 1
        tick = due
    client._ws.close()  # it has no close of its own, and would count as a client until this process ends
    return tally


def pipelining_robot(port: int, spec: PolicySpec, hz: float, seconds: float, begin: float, seed: int) -> Tally:
    """Our client: a request at every tick, replies in a thread of their own."""
    frames, tally = observations(spec, seed), Tally()
    ticks = int(seconds * hz)
    sent: SimpleQueue[float] = SimpleQueue()
    with PolicyClient(f"ws://127.0.0.1:{port}", timeout=30) as client:

        def receive() -> None:
            for _ in range(ticks):
                reply = client.receive()
                due = sent.get()
                tally.replies += 1
                if reply.get("superseded"):
                    tally.superseded += 1
                else:
                    tally.latencies.append(time.time() - due)

        receiver = threading.Thread(target=receive)
        receiver.start()
        for tick in range(ticks):
            _sleep_until(begin + tick / hz)
            sent.put(begin + tick / hz)
            tally.requests += 1
            client.send(frames[tick % FRAMES], timestep=tick)
        receiver.join()
    return tally


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.time()))


def _silent() -> None:
    logging.disable(logging.INFO)  # openpi's client says that it connects


def start_server(target: Callable[..., None], bundle: str, engine: str | None) -> tuple[Any, int, str]:
    """The process of a server, its port and the engine's name."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(bundle, engine, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        port, name = ours.recv()
    except EOFError as error:
        raise SystemExit("The server did not start; its error is above.") from error
    return process, port, name


def measure(arguments: argparse.Namespace) -> tuple[list[Row], str]:
    """Let the cases take turns; returns their rows and the engine's name."""
    spec = PolicySpec.from_dict(read_manifest(Path(arguments.bundle))["spec"])
    servers = {
        "robopolicy": start_server(serve_ours, arguments.bundle, arguments.engine),
        "plain, as openpi's": start_server(serve_plainly, arguments.bundle, arguments.engine),
    }
    cases: list[tuple[str, str, Callable[..., Tally]]] = [
        ("robopolicy", "openpi's", waiting_robot),
        ("plain, as openpi's", "openpi's", waiting_robot),
        ("robopolicy", "ours, pipelined", pipelining_robot),
    ]
    tallies = [Tally() for _ in cases]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.clients, mp_context=context, initializer=_silent) as pool:
        for turn in range(-1, arguments.turns):  # turn -1 warms up
            seconds = arguments.seconds / arguments.turns if turn >= 0 else 1.0
            for tally, (server, _, robot) in zip(tallies, cases, strict=True):
                begin = time.time() + (1.0 if turn >= 0 else 10.0)
                port = servers[server][1]
                robots = [
                    pool.submit(robot, port, spec, arguments.hz, seconds, begin, i) for i in range(arguments.clients)
                ]
                for done in robots:
                    counted = done.result()
                    if turn >= 0:
                        tally.add(counted)
    for process, _, _ in servers.values():
        process.terminate()
    rows = [row(server, client, tally) for tally, (server, client, _) in zip(tallies, cases, strict=True)]
    return rows, servers["robopolicy"][2]


def row(server: str, client: str, tally: Tally) -> Row:
    p50, p99 = 1e3 * np.percentile(tally.latencies, [50, 99])
    lost = tally.requests - tally.replies
    counts = tally.requests, tally.replies, lost, tally.superseded, tally.skipped
    return Row(server, client, *counts, float(p50), float(p99), 1e3 * max(tally.latencies))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="of a policy, best one with images")
    parser.add_argument("--engine", help="as for robopolicy serve")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--hz", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each case")
    parser.add_argument("--turns", type=int, default=4, help="pieces in which the cases alternate")
    parser.add_argument("--json", help="where to write the numbers")
    arguments = parser.parse_args()

    from results import machine, print_table, save_json  # here: the robots' processes need no torch

    about = machine()
    before = os.getloadavg()
    rows, engine = measure(arguments)
    after = os.getloadavg()
    columns = ["server", "client", "requests", "replies", "lost", "superseded", "skipped", "p50 ms", "p99 ms", "max ms"]
    title = f"{engine}: {arguments.clients} robots at {arguments.hz:g} Hz for {arguments.seconds:g} s"
    texts = [[f"{v:.1f}" if isinstance(v, float) else str(v) for v in asdict(r).values()] for r in rows]
    print_table(title, columns, texts)
    ratio = rows[1].p99_ms / rows[0].p99_ms
    print(f"p99 of the plain server / p99 of robopolicy, both with openpi's client: {ratio:.2f}")
    one, five = (f"{before[i]:.1f} before, {after[i]:.1f} after" for i in (0, 1))
    print(f"load of the machine in 1 minute: {one}; in 5 minutes: {five}; {os.cpu_count()} cores")
    loads = {"load_before": before, "load_after": after}
    save_json(arguments.json, [asdict(r) for r in rows], about | vars(arguments) | {"p99_ratio": ratio} | loads)


if __name__ == "__main__":
    main()
