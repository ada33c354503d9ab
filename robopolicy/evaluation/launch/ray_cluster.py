"""The same evaluation on a Ray cluster: one task per shard, what a lost worker played is played again.

Nothing needs a shared disk: the policy travels as the files of its bundle (YAML and safetensors), the environment as
its name and options, files that the options name as their bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import socket
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import robopolicy
from robopolicy.diffusion.process import SamplerConfig
from robopolicy.errors import UserError, require_extra
from robopolicy.evaluation.environments import FILE_OPTIONS, Environment, absolute_files, environment
from robopolicy.evaluation.episode import EpisodeResult
from robopolicy.evaluation.launch.shards import SHARD_SIZE, Results, collecting, describe_seeds, split_seeds
from robopolicy.evaluation.rollout import ChunkPolicy, rollout
from robopolicy.policies.base import Policy
from robopolicy.policies.bundle import load_bundle, save_bundle

log = logging.getLogger(__name__)

Files = dict[str, bytes]  # by path relative to a folder


@dataclass(frozen=True)
class RayCluster:
    """Plays evaluations on a Ray cluster; `play` takes the place of `rollout`.

    Attributes:
        address: ``local`` starts Ray on this machine, for this process only; ``auto`` joins the cluster that this
            machine belongs to; ``host:port`` or ``ray://host:port`` joins another one.
        shard_size: episodes per task.
        threads: CPU threads of the policy in each task, and so the CPUs that a task asks for.
        gpus: share of a GPU that a task asks for when the policy is on a GPU.
        retries: times that a shard is played again after its worker was lost.
    """

    address: str = "local"
    shard_size: int = SHARD_SIZE
    threads: int = 1
    gpus: float = 1.0
    retries: int = 3

    def play(
        self,
        policy: ChunkPolicy,
        environment: Environment,
        seeds: Sequence[int],
        *,
        batch_size: int = 50,
        workers: int = 0,
        progress: bool = True,
    ) -> list[EpisodeResult]:
        """Play one episode for each seed; the results equal those of `rollout` with the same settings.

        Args:
            policy: of a kind that bundles can hold.
            seeds, batch_size: see `rollout`.
            workers: shards that are played at the same time, at most; 0 for as many as the cluster has room for.

        Raises:
            UserError: see `rollout`; also Ray is not installed or not there, the cluster has no room for a task, its
                machines have other package versions, or a shard's worker was lost more than ``retries`` times.
        """
        shards = split_seeds(seeds, self.shard_size)
        if batch_size < 1 or workers < 0:
            raise UserError(f"batch_size={batch_size} must be at least 1 and workers={workers} at least 0.")
        if not isinstance(policy, Policy):
            raise UserError(f"launcher=ray plays policies that bundles can hold, found {type(policy).__name__}.")
        environment.check(policy.spec)
        ray = connect(self.address, workers * self.threads or None)
        gpus = self.gpus if policy.device.type == "cuda" else 0
        _check_room(ray, self.threads, gpus)
        options, option_files = packed_options(environment.options)
        job = Job(
            environment.name,
            options,
            environment.max_steps,
            batch_size,
            self.threads,
            policy.device.type,
            asdict(policy.sampler),
            _versions(environment),
            **told(policy),
        )
        bundle = bundle_files(policy)
        # Retries are ours, so that a person learns of them, and results that are lost later are computed again too.
        task = ray.remote(num_cpus=self.threads, num_gpus=gpus, max_retries=0)(play_shard)
        fixed = (json.dumps(asdict(job)), Stored(_digest(bundle), ray.put(bundle)), ray.put(option_files))
        with collecting(environment.name, len(seeds), progress) as results:
            run = _Run(ray, lambda shard: task.remote(*fixed, shard), results, self.retries)
            run.play(shards, workers or len(shards))
        log.info(
            "%d episodes of %s in %.1f s on Ray: %.0f steps/s, %d shards lost and played again, processors: %s",
            len(seeds), environment.name, results.seconds, results.steps / results.seconds, run.lost,
            ", ".join(sorted(run.processors)),
        )  # fmt: skip
        if len(run.processors) > 1:
            log.warning("Networks may differ in the last digits between these kinds of processor, and so may results.")
        return results.in_order(seeds)


def connect(address: str, cpus: int | None) -> Any:
    """Join a Ray cluster, or start one on this machine; a process that is in one already stays there.

    Usage statistics are off. A cluster that is started here has no dashboard and, unless Ray was imported before,
    listens on the loopback interface only.

    Args:
        address: see `RayCluster`.
        cpus: of a cluster that is started; None for all of this machine.

    Raises:
        UserError: Ray is not installed, or the cluster cannot be reached.
    """
    _check_reachable(address)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    own: dict[str, Any] = {}
    if address == "local":
        own = {"num_cpus": cpus, "include_dashboard": False}
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # read on import: all ports on the loopback interface
    ray = require_extra("ray", "ray")
    if ray.is_initialized():
        return ray
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _unusable(address, error) from error
    return ray


def _check_reachable(address: str) -> None:
    """Raises a `UserError` where nobody listens at ``host:port``; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or "/" in host or host in ("localhost", "127.0.0.1"):  # Ray looks at another interface
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise _unusable(address, error) from error


def _unusable(address: str, error: Exception) -> UserError:
    return UserError(
        f"The Ray cluster at ray_address={address} cannot be used: {error}. "
        "Start one with `ray start --head`, or use ray_address=local."
    )


def _check_room(ray: Any, cpus: int, gpus: float) -> None:
    """Raises a `UserError` where no machine can hold a task, which would otherwise wait forever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        found = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise UserError(
            f"A shard needs {cpus} CPUs and {gpus:g} GPUs on one machine, the Ray cluster has {found}. "
            "Use fewer threads, device=cpu, or larger machines."
        )


# ------------------------------------------------------------------------------------------------------ this process


class _Run:
    """The tasks of one evaluation.

    Attributes:
        lost: tasks that were lost with their worker.
        processors: kinds of processor that results came from.
    """

    def __init__(self, ray: Any, submit: Callable[[tuple[int, ...]], Any], results: Results, retries: int) -> None:
        self._ray, self._submit, self._results, self._retries = ray, submit, results, retries
        self._losses: dict[tuple[int, ...], int] = {}
        self.processors: set[str] = set()

    @property
    def lost(self) -> int:
        return sum(self._losses.values())

    def play(self, shards: Sequence[tuple[int, ...]], at_once: int) -> None:
        """Play all shards, at most ``at_once`` at the same time."""
        waiting = deque(shards)
        running: dict[Any, tuple[int, ...]] = {}  # seeds by Ray's reference to their results
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    shard = waiting.popleft()
                    running[self._submit(shard)] = shard
                (done,), _ = self._ray.wait(list(running), num_returns=1)
                shard = running.pop(done)
                if not self._collect(done, shard):
                    waiting.appendleft(shard)
        finally:  # after an error or Ctrl-C
            for reference in running:
                self._ray.cancel(reference, force=True)

    def _collect(self, reference: Any, shard: tuple[int, ...]) -> bool:
        """Take the results of a task that ended; False when they were lost."""
        errors = self._ray.exceptions
        try:
            played = self._ray.get(reference)
        except errors.RayTaskError as error:  # raised in the task; the same would happen again
            raise error.cause or error from None
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.ObjectLostError, errors.OutOfMemoryError) as e:
            self._note_loss(shard, e)
            return False
        except errors.RayError as error:
            raise UserError(f"Ray failed while it played the seeds {describe_seeds(shard)}: {error}") from error
        self.processors.add(played.processor)
        self._results.add(played.results)
        return True

    def _note_loss(self, shard: tuple[int, ...], error: Exception) -> None:
        self._losses[shard] = losses = self._losses.get(shard, 0) + 1
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        lost = f"A Ray worker was lost while it played the seeds {describe_seeds(shard)} ({reason})"
        if losses > self._retries:
            raise UserError(
                f"{lost}; that makes {losses} times. Play one of these seeds with launcher=local to see the error; if "
                "memory ran out, use a smaller batch_size or fewer workers. Ray's logs: /tmp/ray/session_latest/logs."
            )
        log.warning("%s; they are played again (%d of %d).", lost, losses, self._retries)


def bundle_files(policy: Policy) -> Files:
    """The files of a policy's bundle."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = save_bundle(policy, Path(folder) / "bundle")
        return {file.name: file.read_bytes() for file in bundle.iterdir()}


def told(policy: Policy) -> dict[str, Any]:
    """Fields of a `Job`: what the policy is asked to do."""
    goal = {key: np.asarray(value).tolist() for key, value in policy.goal.items()}
    return {"instruction": policy.instruction, "goal": goal}


def packed_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], Files]:
    """Options whose files (`FILE_OPTIONS`) have relative names, and these files; `absolute_files` undoes it."""
    files: Files = {}

    def packed(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: packed(k, v) for k, v in value.items()}
        if name not in FILE_OPTIONS or not isinstance(value, str) or not Path(value).is_file():
            return value
        content = Path(value).read_bytes()
        relative = f"{hashlib.sha256(content).hexdigest()}/{Path(value).name}"
        files[relative] = content
        return relative

    return {name: packed(name, value) for name, value in options.items()}, files


def _versions(environment: Environment) -> dict[str, str]:
    return {**environment.versions(), "robopolicy": robopolicy.__version__, "torch": torch.__version__}


def _digest(files: Files) -> str:
    return hashlib.sha256(json.dumps({k: hashlib.sha256(v).hexdigest() for k, v in files.items()}).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------------- the worker


@dataclass(frozen=True)
class Job:
    """What every shard of an evaluation needs besides its seeds and the policy's files; plain JSON values.

    Attributes:
        environment, options, max_steps: see `environments.environment`; files in options have relative names.
        batch_size, threads: see `rollout`.
        device: torch's device type, ``cpu`` or ``cuda``.
        sampler: the policy's present `SamplerConfig`, which may differ from its bundle's.
        versions: of the packages that decide the outcome, on the machine that asks.
        instruction, goal: the policy's; the goal's arrays as lists.
    """

    environment: str
    options: dict[str, Any]
    max_steps: int
    batch_size: int
    threads: int
    device: str
    sampler: dict[str, Any]
    versions: dict[str, str]
    instruction: str | None = None
    goal: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stored:
    """Files in Ray's object store, fetched only by who does not have them yet."""

    digest: str
    reference: Any = field(compare=False)


@dataclass(frozen=True)
class Played:
    """A shard's results, and the kind of processor that computed them."""

    results: list[EpisodeResult]
    processor: str


def play_shard(job_text: str, bundle: Stored, option_files: Files, seeds: Sequence[int]) -> Played:
    """A Ray task: play the episodes of one shard.

    Args:
        job_text: a `Job` as JSON.
        bundle: of the policy.
        option_files: what the job's options name.
        seeds: of the shard.

    Raises:
        UserError: see `rollout`; also this machine's packages have other versions than the asking one's.
    """
    job = Job(**json.loads(job_text))
    with tempfile.TemporaryDirectory() as folder:
        _write(option_files, Path(folder))
        world = environment(job.environment, absolute_files(job.options, Path(folder)))
        _check_versions(job.versions, _versions(world))
        policy = _loaded(bundle, job.device)
        policy.sampler = SamplerConfig(**job.sampler)
        policy.instruction = job.instruction
        policy.goal = {key: np.array(value) for key, value in job.goal.items()}
        results = rollout(
            policy,
            replace(world, max_steps=job.max_steps),
            seeds,
            batch_size=job.batch_size,
            shard_size=len(seeds),
            threads=job.threads,
            progress=False,
        )
    return Played(results, _processor(job.device))


@lru_cache(maxsize=1)  # a worker process plays many shards of one policy
def _loaded(bundle: Stored, device: str) -> Policy:
    with tempfile.TemporaryDirectory() as folder:
        _write(require_extra("ray", "ray").get(bundle.reference), Path(folder))
        return load_bundle(Path(folder), device)[0]


def _write(files: Files, folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _check_versions(wanted: Mapping[str, str], found: Mapping[str, str]) -> None:
    differing = [
        f"{name} {found.get(name)} instead of {version}"
        for name, version in wanted.items()
        if found.get(name) != version
    ]
    if differing:
        raise UserError(
            f"The Ray worker on {platform.node()} has {', '.join(differing)}; results would not be those of this "
            "machine. Install the same versions on all machines."
        )


def _processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
