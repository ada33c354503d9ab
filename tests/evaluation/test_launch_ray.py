"""Evaluation on a real Ray cluster of this machine, with workers that are killed."""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from robopolicy.data.normalize import Normalizer, fit_normalizer
from robopolicy.diffusion.process import SamplerConfig
from robopolicy.errors import UserError
from robopolicy.evaluation import pusht
from robopolicy.evaluation.environments import PUSHT, absolute_files
from robopolicy.evaluation.launch.launcher import player
from robopolicy.evaluation.launch.ray_cluster import Job, RayCluster, Stored, connect, packed_options, play_shard
from robopolicy.evaluation.rollout import rollout
from robopolicy.policies.registry import build_policy
from robopolicy.spec import PolicySpec

from .conftest import same

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed", allow_module_level=True)

SHORT_PUSHT = replace(PUSHT, max_steps=24)
SEEDS = list(range(100_000, 100_006))
SHARD_SIZE = 2


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    spec = PolicySpec((pusht.STATE,), pusht.ACTION, fps=10)
    parts = {
        k.key: fit_normalizer(np.array([[0.0] * k.dim, [512.0] * k.dim]), "minmax") for k in (*spec.states, spec.action)
    }
    config = {"down_dims": [16, 32], "step_embed_dim": 16}
    policy = build_policy("diffusion_unet", config, spec, Normalizer.from_parts(parts)).eval()
    policy.sampler = SamplerConfig("dpmsolver++", 4)  # not that of its configuration
    return policy


@pytest.fixture(scope="module", autouse=True)
def ray_of_this_file():
    shut_down()
    yield
    shut_down()


def shut_down() -> None:
    if "ray" in sys.modules:  # the first import must be that of `connect`
        sys.modules["ray"].shutdown()


def play_on_ray(policy, seeds=SEEDS, retries=3, **settings):
    cluster = RayCluster(shard_size=SHARD_SIZE, retries=retries)
    return cluster.play(policy, SHORT_PUSHT, seeds, batch_size=2, workers=2, progress=False, **settings)


@contextmanager
def killing(times: float) -> Iterator[list[int]]:
    """Kill as many Ray workers as have begun to play a shard; gives the list of those that were killed."""
    killed: list[int] = []
    over = threading.Event()

    def hunt() -> None:
        while len(killed) < times and not over.wait(0.02):
            for process in psutil.Process().children(recursive=True):
                try:
                    if process.pid not in killed and process.cmdline()[0].startswith("ray::play_shard"):
                        process.kill()
                        killed.append(process.pid)
                        break
                except (psutil.NoSuchProcess, psutil.ZombieProcess, IndexError):
                    continue

    hunter = threading.Thread(target=hunt)
    hunter.start()
    try:
        yield killed
    finally:
        over.set()
        hunter.join()


def test_results_equal_those_of_one_process_though_a_worker_is_killed(policy, caplog):
    reference = rollout(policy, SHORT_PUSHT, SEEDS, batch_size=2, shard_size=SHARD_SIZE, threads=1, progress=False)
    with caplog.at_level(logging.WARNING), killing(1) as killed:
        results = play_on_ray(policy)
    assert len(killed) == 1
    assert caplog.text.count("A Ray worker was lost while it played the seeds") == 1
    assert same(reference, results)
    assert len({result.actions.tobytes() for result in results}) == len(SEEDS), "or equality means little"


def test_ray_listens_on_the_loopback_interface_only(policy):
    play_on_ray(policy, SEEDS[:1])
    listening = {
        connection.laddr.ip
        for process in psutil.Process().children(recursive=True)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    addresses = [ipaddress.ip_address(ip.removeprefix("::ffff:")) for ip in listening]
    assert addresses and all(address.is_loopback for address in addresses), listening


def test_what_a_user_can_mend_is_raised_as_it_is_without_retries(policy, caplog):
    broken = build_policy("diffusion_unet", asdict(policy.config), policy.spec, policy.normalizer)
    torch.nn.init.constant_(next(broken.denoiser.parameters()), torch.nan)
    with pytest.raises(UserError, match="^The policy's action is not finite in the episode of seed 100001"):
        play_on_ray(broken, [100_001])
    assert "again" not in caplog.text


def test_a_shard_that_is_lost_again_and_again_is_an_error_naming_its_seeds(policy):
    with killing(np.inf), pytest.raises(UserError, match=r"played the seeds 100000, 100001 .* that makes 2 times"):
        play_on_ray(policy, SEEDS[:2], retries=1)


def test_a_cluster_that_is_not_there_is_reported_at_once():
    with pytest.raises(UserError, match="ray_address=127.0.0.2:1 cannot be used: .*refused. Start one with"):
        connect("127.0.0.2:1", None)


def test_a_task_that_no_machine_can_hold_is_refused(policy):
    with pytest.raises(UserError, match=r"needs 1000 CPUs and 0 GPUs on one machine, the Ray cluster has 2 CPUs"):
        RayCluster(threads=1000).play(policy, SHORT_PUSHT, SEEDS, workers=2, progress=False)


def test_a_policy_that_no_bundle_holds_is_refused(pusher):
    with pytest.raises(UserError, match="bundles can hold, found RandomPusher"):
        player("ray")(pusher, SHORT_PUSHT, SEEDS, progress=False)


def test_a_worker_with_other_package_versions_is_refused():
    job = Job("pusht", {}, 24, 2, 1, "cpu", {}, PUSHT.versions() | {"pymunk": "1.0"})
    with pytest.raises(UserError, match=r"has pymunk \S+ instead of 1.0"):
        play_shard(json.dumps(asdict(job)), Stored("", None), {}, SEEDS)


def test_files_that_options_name_travel_with_them(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/a.png"):
        (here / name).write_text(name)
    options = {"background": {"photo": str(here / "a.png"), "camera": "scene"}, "photo": str(here / "sub/a.png")}
    packed, files = packed_options(options)
    assert str(here) not in json.dumps(packed)
    for name, content in files.items():
        (there / name).parent.mkdir(parents=True)
        (there / name).write_bytes(content)
    unpacked = absolute_files(packed, there)
    assert Path(unpacked["background"]["photo"]).read_text() == "a.png"
    assert Path(unpacked["photo"]).read_text() == "sub/a.png"
    assert unpacked["background"]["camera"] == "scene"
