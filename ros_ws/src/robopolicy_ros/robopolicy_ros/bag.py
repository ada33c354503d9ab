"""From a rosbag2 file to a dataset: the same topics through the same recorder as live give the same rows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robopolicy.errors import UserError, require_extra
from robopolicy.runtime.clock import nanoseconds
from robopolicy.runtime.contract import Contract
from robopolicy.runtime.recorder import EpisodeRecorder, Phase, open_recording
from robopolicy.runtime.robots import read_robot
from robopolicy_ros.ingest import Ingest, topics
from robopolicy_ros.stamps import Stamps

MARKS = "/recorder/marks"
_RETRY = nanoseconds(0.1)  # between tries to begin an episode while streams are silent


class BagWriter:
    """Writes serialised messages to a rosbag2 folder (MCAP).

    Raises:
        UserError: the folder exists, or ``rosbags`` is not installed.
    """

    def __init__(self, path: Path) -> None:
        require_extra("rosbags", "ros")
        from rosbags.rosbag2 import StoragePlugin, Writer
        from rosbags.typesys import Stores, get_typestore

        if path.exists():
            raise UserError(f"{path} exists already; choose another folder for the bag.")
        if path.suffix == ".bag":
            raise UserError(f"{path}: a name that ends in .bag means a bag of ROS 1; choose another one.")
        self._types = get_typestore(Stores.ROS2_KILTED)
        self._writer = Writer(path, version=9, storage_plugin=StoragePlugin.MCAP)
        self._writer.open()
        self._connections: dict[str, Any] = {}

    def write(self, topic: str, kind: str, time: int, data: bytes) -> None:
        """Append a message that was received at ``time`` (wall clock, ns)."""
        if topic not in self._connections:
            self._connections[topic] = self._writer.add_connection(topic, kind, typestore=self._types)
        self._writer.write(self._connections[topic], time, self._trimmed(kind, data))

    def _trimmed(self, kind: str, data: bytes) -> bytes:
        """Without the bytes that rclpy's serialisation leaves at the end, which readers refuse."""
        definition = self._types.get_msgdef(kind)
        _, size = definition.deserialize_cdr_le(data[4:], 0, definition.cls, self._types)
        return data[: 4 + size]

    def close(self) -> None:
        self._writer.close()


@dataclass(frozen=True)
class Conversion:
    """Outcome of a conversion.

    Attributes:
        episodes, rows: that were stored.
        skipped: why episodes of the bag were left out.
        refused: messages, by topic and reason.
    """

    episodes: int
    rows: int
    skipped: tuple[str, ...]
    refused: dict[str, int]


def convert(
    bag: Path,
    contract: Contract,
    out: Path,
    *,
    task: str = "",
    append: bool = False,
    namespace: str = "/",
    marks: str = MARKS,
    policy_state: str = "",
    progress: bool = False,
) -> Conversion:
    """Convert a bag.

    With marks, as ``recorder_node`` writes them, the bag's episodes are those that were recorded, with their labels.
    Without, the whole bag is one episode without a label's word for it: it counts as a success.

    Args:
        bag: folder of a rosbag2.
        contract: of the robot.
        out: the dataset.
        task: instruction where the marks tell none.
        append: add to an existing dataset.
        namespace: in which the contract's relative topics lie.
        marks: topic of the marks.
        policy_state: topic of the policy node's state, to store who drove; empty: no such array.
        progress: show a progress bar.

    Raises:
        UserError: the bag cannot be read or lacks a topic of the contract, or the dataset does not fit.
    """
    require_extra("rosbags", "ros")
    from rosbags.highlevel import AnyReader, AnyReaderError
    from rosbags.rosbag2 import ReaderError
    from rosbags.typesys import Stores, get_typestore

    wanted = {topic: name for name, (topic, _) in topics(contract, lambda t: _resolve(t, namespace)).items()}
    try:
        with AnyReader([bag], default_typestore=get_typestore(Stores.ROS2_KILTED)) as reader:
            _check_topics(bag, reader.topics, contract, namespace)
            store = open_recording(
                out, contract, append=append, intervention=bool(policy_state), attributes={"bag": bag.name}
            )
            with store:
                recorder = EpisodeRecorder(contract, store, task=task, max_seconds=24 * 3600)
                chosen = [c for c in reader.connections if c.topic in wanted or c.topic in (marks, policy_state)]
                played = _messages(reader, chosen, progress)
                marked = any(c.topic == marks for c in chosen)
                return _replay(played, recorder, contract, wanted, marks if marked else None, policy_state)
    except (AnyReaderError, ReaderError, FileNotFoundError) as error:
        raise UserError(f"{bag} cannot be read as a rosbag2: {error}") from error


def _replay(
    messages: Iterator[tuple[str, int, Any]],
    recorder: EpisodeRecorder,
    contract: Contract,
    wanted: dict[str, str],
    marks: str | None,
    policy_state: str,
) -> Conversion:
    ingest = Ingest(contract, recorder, Stamps(0))
    rows_before, episodes_before = recorder.store.n_steps, recorder.store.n_episodes
    skipped: list[str] = []
    next_try = time = 0
    for topic, time, message in messages:
        if topic == marks:
            _obey(json.loads(message.data), recorder, skipped)
            continue
        if topic == policy_state:
            ingest.take_state(message, time)
            continue
        if marks is None and recorder.phase is Phase.IDLE and time >= next_try:
            next_try = time + _RETRY
            _try(recorder, time)
        ingest.take(wanted[topic], message, time)
        recorder.advance(time)
    if marks is None:
        _end(recorder, time, skipped)
    store = recorder.store
    return Conversion(
        store.n_episodes - episodes_before, store.n_steps - rows_before, tuple(skipped), dict(recorder.counts)
    )


def _obey(mark: dict[str, Any], recorder: EpisodeRecorder, skipped: list[str]) -> None:
    try:
        if mark["event"] == "start":
            recorder.task = mark.get("task") or recorder.task
            recorder.start(int(mark["time"]))
        elif mark["event"] == "discard":
            recorder.discard()
        else:
            recorder.finish(int(mark["time"]), mark["event"] == "success", rows=mark.get("rows"))
    except UserError as error:
        skipped.append(str(error))
        recorder.discard()


def _try(recorder: EpisodeRecorder, time: int) -> None:
    try:
        recorder.start(time)
    except UserError:
        return  # a stream has not begun yet


def _end(recorder: EpisodeRecorder, time: int, skipped: list[str]) -> None:
    try:
        recorder.finish(time, True)
    except UserError as error:
        skipped.append(str(error))


def _messages(reader: Any, connections: Sequence[Any], progress: bool) -> Iterator[tuple[str, int, Any]]:
    from tqdm import tqdm

    total = sum(connection.msgcount for connection in connections)
    played = reader.messages(connections=connections) if connections else ()
    for connection, time, data in tqdm(played, total=total, unit="message", disable=not progress):
        yield connection.topic, time, reader.deserialize(data, connection.msgtype)


def _check_topics(bag: Path, found: dict[str, Any], contract: Contract, namespace: str) -> None:
    problems = []
    for topic, kind in topics(contract, lambda t: _resolve(t, namespace)).values():
        if topic not in found:
            problems.append(f"{topic} is not there")
        elif found[topic].msgtype != kind:
            problems.append(f"{topic} is a {found[topic].msgtype}, wanted {kind}")
    if problems:
        raise UserError(
            f"{bag} does not fit the contract: {'; '.join(problems)}. It has {', '.join(sorted(found))}. Is the robot "
            "the right one, and --namespace?"
        )


def _resolve(topic: str, namespace: str) -> str:
    return topic if topic.startswith("/") else f"{namespace.rstrip('/')}/{topic}"


def main(args: Sequence[str] | None = None) -> int:
    """Command line of the conversion."""
    parser = argparse.ArgumentParser(prog="python -m robopolicy_ros.bag", description=__doc__)
    parser.add_argument("--bag", type=Path, required=True, help="folder of a rosbag2 (MCAP or SQLite)")
    parser.add_argument("--robot", "--contract", required=True, help="name of a shipped arm, or folder with its files")
    parser.add_argument("--out", type=Path, required=True, help="the dataset, a Zarr folder")
    parser.add_argument("--task", default="", help="instruction of the episodes, where the bag's marks tell none")
    parser.add_argument("--append", action="store_true", help="add to an existing dataset")
    parser.add_argument("--namespace", default="/", help="in which the contract's relative topics lie; default /")
    parser.add_argument("--marks", default=MARKS, help=f"topic that tells where episodes lie; default {MARKS}")
    parser.add_argument("--policy-state", default="", help="topic of the policy node's state, to store who drove")
    chosen = parser.parse_args(args)
    try:
        done = convert(
            chosen.bag,
            read_robot(chosen.robot).contract,
            chosen.out,
            task=chosen.task,
            append=chosen.append,
            namespace=chosen.namespace,
            marks=chosen.marks,
            policy_state=chosen.policy_state,
            progress=True,
        )
    except UserError as error:
        parser.exit(1, f"{error}\n")
    print(f"{chosen.out}: {done.episodes} episodes, {done.rows} rows")
    for reason in done.skipped:
        print(f"  left out: {reason}")
    for what, count in done.refused.items():
        print(f"  {what}: {count} messages")
    return 0 if done.episodes else 1


if __name__ == "__main__":
    raise SystemExit(main())
