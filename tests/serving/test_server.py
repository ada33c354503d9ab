"""A server on a real socket, spoken to by openpi's public client and by ours."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import re
import socket
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from robopolicy.errors import UserError
from robopolicy.serving import server
from robopolicy.serving.client import PolicyClient, ServerRefusal
from robopolicy.serving.limits import Limits
from robopolicy.serving.wire import pack, unpack
from tests.serving.conftest import IMAGE_SPEC, TASK_SPEC, Echo, Running, state, task_frame, wait_until


def page(running: Running, path: str, **headers: str) -> tuple[int, str]:
    address = running.address.replace("ws", "http", 1) + path
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_openpis_client_gets_chunks(serve, exported) -> None:
    openpi = pytest.importorskip("openpi_client.websocket_client_policy")
    running = serve(exported)
    client = openpi.WebsocketClientPolicy("127.0.0.1", running.port)
    about = client.get_server_metadata()
    assert about["horizon"] == 8 and about["n_action_steps"] == 4 and about["engine"] == "torch"
    assert [k["key"] for k in about["observations"]] == ["observation.state", "observation.image.top"]
    rng = np.random.default_rng(0)
    image = rng.integers(256, size=(36, 48, 3), dtype=np.uint8)
    reply = client.infer({"observation.state": np.array([0.1, -0.2]), "observation.image.top": image, "seed": 7})
    assert reply["actions"].dtype == np.float32 and reply["actions"].shape == (4, 2)
    assert reply["server_timing"]["infer_ms"] > 0 and reply["server_timing"]["queue_ms"] >= 0
    again = client.infer({"observation": {"state": np.array([0.1, -0.2]), "image": {"top": image}}, "seed": 7})
    np.testing.assert_array_equal(again["actions"], reply["actions"])
    assert again["server_timing"]["prev_total_ms"] >= reply["server_timing"]["infer_ms"]


@pytest.mark.parametrize("host", ["0.0.0.0", "localhost", "ws://127.0.0.1"])
def test_openpis_client_by_any_name_of_this_machine(serve, host: str) -> None:
    openpi = pytest.importorskip("openpi_client.websocket_client_policy")
    client = openpi.WebsocketClientPolicy(host, serve().port)
    assert client.infer(state(1, 2))["actions"][0].tolist() == [101, 102]


def test_openpis_client_sees_an_error_and_goes_on(serve) -> None:
    openpi = pytest.importorskip("openpi_client.websocket_client_policy")
    client = openpi.WebsocketClientPolicy("127.0.0.1", serve().port)
    with pytest.raises(RuntimeError, match="lacks 'observation.state'"):
        client.infer({})
    assert client.infer(state(1, 2))["actions"][0].tolist() == [101, 102]


def test_openpis_client_with_a_token(serve) -> None:
    openpi = pytest.importorskip("openpi_client.websocket_client_policy")
    running = serve(token="0123456789abcdef")
    client = openpi.WebsocketClientPolicy("127.0.0.1", running.port, api_key="0123456789abcdef")
    assert client.infer(state(1, 2))["actions"].shape == (4, 2)


def test_a_chunk_is_what_the_policy_samples(serve, exported) -> None:
    rng = np.random.default_rng(1)
    states = rng.normal(size=(2, 2)).astype(np.float32)
    images = rng.integers(256, size=(2, 36, 48, 3), dtype=np.uint8)
    observation = {"observation.state": states, "observation.image.top": images}
    rows = {k: v[None] for k, v in observation.items()}
    noise = exported.draw_noise(1, np.random.default_rng(5))
    chunk = exported.sample(rows, noise)
    moved = exported.sample(rows, noise, chunk + 1, np.full((1, 8), 0.5, np.float32))
    with serve(exported).client() as client:
        np.testing.assert_array_equal(client.act(observation, seed=5), chunk[0, 1:5])
        np.testing.assert_array_equal(client.act(observation, seed=5, full=True), chunk[0, 1:])
        continued = client.act(observation, seed=5, previous=chunk[0] + 1, mask=np.full(8, 0.5), full=True)
    np.testing.assert_array_equal(continued, moved[0, 1:])
    assert not np.array_equal(moved, chunk)


def test_metadata_describes_the_policy(serve) -> None:
    with serve(Echo(TASK_SPEC)).client() as client:
        about = client.metadata
    assert about["fingerprint"] == "abc123" and about["fps"] == 10
    assert about["instructions"] == ["open the drawer", "push the cup"]
    image = next(k for k in about["observations"] if k["role"] == "image")
    assert image == {
        "key": "observation.image.top",
        "role": "image",
        "unit": "",
        "rotation": "",
        "shape": [36, 48, 3],
        "dtype": "uint8",
    }
    assert about["action"]["unit"] == "m" and about["goals"][0]["key"] == "observation.state"
    json.dumps(about)


def test_goals_instructions_and_chunks_reach_the_policy(serve) -> None:
    policy = Echo(TASK_SPEC)
    previous, mask = np.full((8, 2), 3.0, np.float32), np.linspace(1, 0, 8)
    with serve(policy).client() as client:
        client.act(task_frame(), previous=previous, mask=mask)
    (seen,) = policy.seen
    assert seen["instruction"] == ["push the cup"] and seen["goal.observation.state"].tolist() == [[1, 1]]
    np.testing.assert_array_equal(seen["previous"], previous[None])
    np.testing.assert_array_equal(seen["mask"], mask[None].astype(np.float32))


def test_actions_are_labelled_with_their_timestep(serve) -> None:
    with serve().client() as client:
        client.send(state(1, 2), timestep=40)
        reply = client.receive()
        assert reply["timestep"] == 40 and reply["timesteps"].tolist() == [40, 41, 42, 43]
        # row 1 of a chunk belongs to the newest of two observations
        assert reply["actions"][:, 0].tolist() == [101, 201, 301, 401]
        client.send(state(1, 2), timestep=41, full=True)
        reply = client.receive()
        assert reply["timesteps"].tolist() == list(range(41, 48)) and reply["actions"].shape == (7, 2)
        client.send(state(1, 2))
        assert set(client.receive()) == {"actions", "server_timing"}


def test_a_connection_has_its_own_history(serve) -> None:
    policy = Echo()
    running = serve(policy)
    with running.client() as one, running.client() as two:
        for client, value in ((one, 1), (two, 50), (one, 2), (two, 60), (one, 3)):
            client.act(state(value, 0))
        one.act(state(9, 0), reset=True)
    rows = [seen["observation.state"][0, :, 0].tolist() for seen in policy.seen]
    assert rows == [[1, 1], [50, 50], [1, 2], [50, 60], [2, 3], [9, 9]]


def test_noise_follows_the_seed(serve) -> None:
    policy = Echo()
    with serve(policy).client() as client:
        for seed in (1, 1, 2):
            client.act(state(0, 0), seed=seed)
        client.act(state(0, 0))
        client.act(state(0, 0))
    noise = [seen["noise"].tobytes() for seen in policy.seen]
    assert noise[0] == noise[1] and len(set(noise)) == 4


def test_the_newest_observation_wins(serve) -> None:
    policy = Echo()
    running = serve(policy)
    policy.hold.clear()
    with running.client() as client:
        client.send(state(1, 0), timestep=1)
        policy.started.wait(20)
        for timestep in range(2, 6):
            client.send(state(timestep, 0), timestep=timestep)
        wait_until(lambda: running.count("requests_total") == 5, "all are received")
        policy.hold.set()
        replies = [client.receive() for _ in range(5)]
        assert [r["timestep"] for r in replies] == [1, 2, 3, 4, 5]
        assert [r.get("superseded", False) for r in replies] == [False, True, True, True, False]
        assert replies[-1]["actions"][0, 0] == 105
    # superseded observations are history all the same
    assert [seen["observation.state"][0, :, 0].tolist() for seen in policy.seen] == [[1, 1], [4, 5]]
    assert running.count("superseded_total") == 3


def test_connections_take_turns(serve) -> None:
    policy = Echo()
    running = serve(policy)
    policy.hold.clear()
    clients = [running.client() for _ in range(4)]
    clients[0].send(state(0, 0))
    policy.started.wait(20)
    expected = 1
    for turn in (1, 2, 3):  # the first to come in the line stay first, with their newest observation
        for client, value in zip(clients, (10, 20, 30, 40), strict=True):
            client.send(state(value + turn, 0))
            expected += 1
            wait_until(lambda: running.count("requests_total") == expected, "the request is received")  # noqa: B023
    policy.hold.set()
    for client, replies in zip(clients, (4, 3, 3, 3), strict=True):
        superseded = [client.receive().get("superseded", False) for _ in range(replies)]
        assert superseded[-1] is False and sum(superseded) == 2
        client.close()
    assert [seen["observation.state"][0, 1, 0] for seen in policy.seen] == [0, 13, 23, 33, 43]


def test_a_busy_client_does_not_starve_others(serve) -> None:
    """While one client keeps the line full, another one's request is next after the running one."""
    policy = Echo()
    running = serve(policy)
    policy.hold.clear()
    with running.client() as busy, running.client() as calm:
        busy.send(state(1, 0))
        policy.started.wait(20)
        busy.send(state(2, 0))
        wait_until(lambda: running.count("requests_total") == 2, "the busy client waits in line")
        calm.send(state(100, 0))
        wait_until(lambda: running.count("requests_total") == 3, "the calm client waits in line")
        busy.send(state(3, 0))
        wait_until(lambda: running.count("requests_total") == 4, "the busy client sent more")
        policy.hold.set()
        assert calm.receive()["actions"][0, 0] == 200
        for _ in range(3):
            busy.receive()
    assert [seen["observation.state"][0, 1, 0] for seen in policy.seen] == [1, 3, 100]


def test_several_clients_get_their_own_chunks(serve) -> None:
    running = serve(Echo(IMAGE_SPEC), limits=Limits(rate=10_000))
    wrong: list[str] = []

    def robot(number: int) -> None:
        with running.client() as client:
            for i in range(50):
                value = 1000.0 * number + i
                image = np.full((36, 48, 3), number, np.uint8)
                client.send({"observation.state": np.array([value, 0]), "observation.image.top": image}, timestep=i)
                reply = client.receive()
                if reply["timestep"] != i or reply["actions"][0, 0] != np.float32(value + 100):
                    wrong.append(f"robot {number}, step {i}: {reply}")

    robots = [threading.Thread(target=robot, args=(n,)) for n in range(6)]
    for thread in robots:
        thread.start()
    for thread in robots:
        thread.join(60)
    assert not wrong and running.count("requests_total") == 300
    assert running.count("inference_seconds_count") == 300
    seen = running.policy.seen
    assert all((s["observation.image.top"][0, -1] == s["observation.state"][0, -1, 0] // 1000).all() for s in seen)


def test_errors_of_the_user_keep_the_connection(serve) -> None:
    running = serve()
    with running.client() as client:
        for frame, message in [
            (state(1, 2, 3), r"found shape \(3,\)"),
            (state(1, float("nan")), "NaN"),
            (state(-14, 0), "-14 is not reachable"),  # the policy's own
            (state(1, 2) | {"observation.stat": 1}, "Did you mean"),
        ]:
            with pytest.raises(ServerRefusal, match=message):
                client.act(frame)
        assert client.act(state(1, 2)).shape == (4, 2)
    assert running.count("errors_total", kind="user") == 4


@pytest.mark.parametrize("bad", [-13, -15], ids=["raises", "answers NaN"])
def test_a_failing_policy_ends_one_connection(serve, caplog: pytest.LogCaptureFixture, bad: int) -> None:
    running = serve()
    with running.client() as unlucky, running.client() as other:
        with pytest.raises(ServerRefusal, match="log says why") as error:
            unlucky.act(state(bad, 0))
        assert "secret" not in str(error.value)
        with pytest.raises(UserError, match="1011"):
            unlucky.receive()
        assert other.act(state(1, 2)).shape == (4, 2)
    assert running.count("errors_total", kind="internal") == 1
    record = next(r for r in caplog.records if r.message == "The policy failed.")
    assert record.exc_info is not None


def test_health_and_metrics(serve) -> None:
    policy = Echo()
    running = serve(policy, limits=Limits(stuck_after=0.2))
    assert page(running, "/healthz") == (200, "OK\n")
    with running.client() as client:
        client.act(state(1, 2))
        status, text = page(running, "/metrics?x=1")
        assert status == 200
        assert "robopolicy_requests_total 1.0" in text and "robopolicy_connections 1.0" in text
        assert 'robopolicy_inference_seconds_bucket{le="+Inf"} 1.0' in text
        policy.hold.clear()
        client.send(state(1, 2))
        wait_until(lambda: page(running, "/healthz")[0] == 503, "a stuck policy is noticed")
        policy.hold.set()
        client.receive()
        assert page(running, "/healthz")[0] == 200
    assert page(running, "/other")[0] == 404
    assert page(running, "/")[0] == 426


def test_the_log_says_how_fast_requests_are_answered(serve, caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(server, "REPORT_EVERY", 0.2)
    caplog.set_level(logging.INFO, server.__name__)
    with serve().client() as client:
        for i in range(4):
            client.act(state(i, 0))
        wait_until(lambda: bool(caplog.messages), "a line is logged")
    pattern = r"[\d.]+ requests/s, latency p50 [\d.]+ ms, p99 [\d.]+ ms, clients: 1"
    assert re.fullmatch(pattern, caplog.messages[0]), caplog.messages


def test_two_servers_count_apart(serve) -> None:
    one, two = serve(), serve()
    with one.client() as client:
        client.act(state(1, 2))
    assert (one.count("requests_total"), two.count("requests_total")) == (1, 0)


def test_stopping_answers_what_waits(serve) -> None:
    policy = Echo()
    running = serve(policy)
    policy.hold.clear()
    with running.client() as one, running.client() as two:
        one.send(state(1, 0))
        policy.started.wait(20)
        two.send(state(2, 0))
        wait_until(lambda: running.count("requests_total") == 2, "both wait")
        stopped = asyncio.run_coroutine_threadsafe(running.server.stop(), running.loop)
        wait_until(lambda: page(running, "/healthz")[0] == 503, "the server says that it stops")
        with pytest.raises(UserError, match="503"):
            running.client()
        one.send(state(3, 0))
        wait_until(lambda: running.count("refused_total", reason="stopping") == 2, "the late request is received")
        policy.hold.set()
        assert one.receive()["actions"][0, 0] == 101 and two.receive()["actions"][0, 0] == 102
        with pytest.raises(ServerRefusal, match="stopping"):
            one.receive()
        for client in (one, two):
            with pytest.raises(UserError, match="1001"):
                client.receive()
    stopped.result(20)


def test_stopping_does_not_wait_for_a_client_that_leaves(serve) -> None:
    policy = Echo()
    running = serve(policy, limits=Limits(stop_timeout=600))
    policy.hold.clear()
    client = running.client()
    client.send(state(1, 0))
    policy.started.wait(20)
    stopped = asyncio.run_coroutine_threadsafe(running.server.stop(), running.loop)
    wait_until(lambda: page(running, "/healthz")[0] == 503, "the server says that it stops")
    client.close()
    wait_until(lambda: running.count("connections") == 0, "the client has left")
    policy.hold.set()
    stopped.result(20)


def test_a_client_that_leaves_is_forgotten(serve) -> None:
    policy = Echo()
    running = serve(policy)
    policy.hold.clear()
    with running.client() as stays:
        stays.send(state(1, 0))
        policy.started.wait(20)
        leaves = running.client()
        leaves.send(state(2, 0))
        wait_until(lambda: running.count("requests_total") == 2, "both are received")
        leaves.close()
        wait_until(lambda: running.count("connections") == 1, "one has left")
        policy.hold.set()
        stays.receive()
        assert stays.act(state(3, 0))[0, 0] == 103
    assert [seen["observation.state"][0, 1, 0] for seen in policy.seen] == [1, 3]


def test_a_message_in_fragments(serve) -> None:
    frame = pack(state(1, 2))
    with connect(serve().address, compression=None) as socket:
        socket.recv()
        socket.send([frame[:10], frame[10:20], frame[20:]])
        assert unpack(socket.recv())["actions"][0].tolist() == [101, 102]


def test_a_port_that_is_taken(serve) -> None:
    class Unused(Echo):
        def warmup(self, runs: int = 3) -> None:
            raise AssertionError("the port comes first")

    port = serve().port
    with pytest.raises(UserError, match=f"127.0.0.1:{port} cannot be listened on"):
        serve(Unused(), port=port)


def test_a_port_that_is_taken_during_the_warm_up(serve) -> None:
    class Slow(Echo):
        def warmup(self, runs: int = 3) -> None:
            socket_of_other.listen()

    with socket.socket() as socket_of_other:
        socket_of_other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        socket_of_other.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match="cannot be listened on"):
            serve(Slow(), port=socket_of_other.getsockname()[1])


def test_nobody_waits_for_the_warm_up(serve) -> None:
    """Until the policy is ready a client is refused, as by a server that is not there."""
    refused = []

    class Asked(Echo):
        def warmup(self, runs: int = 3) -> None:
            with socket.socket() as client:
                refused.append(client.connect_ex(("127.0.0.1", port)))

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve(Asked(), port=port)
    assert refused == [errno.ECONNREFUSED]


def test_stopping_says_whether_the_policy_is_at_rest(serve) -> None:
    policy = Echo()
    running = serve(policy, limits=Limits(stop_timeout=0.2))
    policy.hold.clear()
    with running.client() as client:
        client.send(state(1, 0))
        policy.started.wait(20)
        assert running.do(running.server.stop()) is False
        policy.hold.set()
        wait_until(lambda: running.do(running.server.stop()) is True, "the call ends")


def test_a_policy_that_cannot_warm_up(serve) -> None:
    class Broken(Echo):
        def warmup(self, runs: int = 3) -> None:
            raise UserError("The engine does not fit this machine.")

    with pytest.raises(UserError, match="does not fit"):
        serve(Broken())


def test_no_server(serve) -> None:
    with pytest.raises(UserError, match="No connection to the policy server"):
        PolicyClient("ws://127.0.0.1:9", timeout=5)


def test_a_reply_that_does_not_come(serve) -> None:
    policy = Echo()
    running = serve(policy)
    policy.hold.clear()
    with running.client(timeout=0.2) as client:
        with pytest.raises(UserError, match="No reply"):
            client.act(state(1, 2))
        policy.hold.set()


def test_a_late_reply_is_not_taken_for_the_next_one(serve) -> None:
    policy = Echo()
    running = serve(policy)
    with running.client() as client:
        policy.hold.clear()
        client._timeout = 0.05
        for value in (1, 2):
            with pytest.raises(UserError, match="No reply"):
                client.act(state(value, 0))
        client._timeout = 20
        policy.hold.set()
        assert [client.act(state(value, 0))[0, 0] for value in (3, 4, 5)] == [103, 104, 105]


def test_act_skips_replies_to_earlier_requests(serve) -> None:
    with serve().client() as client:
        client.send(state(1, 0))
        client.send(state(1, 0, 0))  # refused
        client.send(state(2, 0))
        assert client.act(state(3, 0))[0, 0] == 103
        client.send(state(4, 0))
        assert client.receive()["actions"][0, 0] == 104
        with pytest.raises(ServerRefusal, match="shape"):
            client.act(state(5, 0, 0))
        assert client.act(state(6, 0))[0, 0] == 106


def test_act_says_that_another_thread_sent_something_newer(serve) -> None:
    policy = Echo()
    running = serve(policy)
    policy.hold.clear()
    refusals: list[ServerRefusal] = []
    with running.client() as client:

        def act() -> None:
            with pytest.raises(ServerRefusal, match="took the place") as error:
                client.act(state(2, 0))
            refusals.append(error.value)

        client.send(state(1, 0))
        policy.started.wait(20)
        thread = threading.Thread(target=act)
        thread.start()
        wait_until(lambda: running.count("requests_total") == 2, "the request of act is received")
        client.send(state(3, 0))
        wait_until(lambda: running.count("requests_total") == 3, "the newer one is received")
        policy.hold.set()
        thread.join(20)
        assert refusals and client.receive()["actions"][0, 0] == 103


def test_text_frames_are_answered_in_words(serve) -> None:
    with connect(serve().address, compression=None) as socket:
        socket.recv()
        socket.send("hello")
        assert "binary frames" in socket.recv()
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv()
        assert closed.value.rcvd.code == 1007
