"""Distillation end to end: from a teacher's bundle to a student's, and what it says where a teacher does not fit."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from robopolicy.cli.compose import compose_config
from robopolicy.cli.distill import compose, distill
from robopolicy.cli.train import SECTIONS, start
from robopolicy.configuration import dataclass_from
from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError
from robopolicy.policies.bundle import load_bundle, save_bundle
from robopolicy.policies.consistency import ConsistencyPolicy
from robopolicy.policies.registry import build_policy
from robopolicy.training.best import BestBundles
from robopolicy.training.distill import load_teacher, student_of
from robopolicy.training.distributed import join_processes
from robopolicy.training.loop import Run, RunConfig
from tests.training.conftest import OVERRIDES, rows

SHORT = [
    "train.batch_size=16",
    "train.threads=1",
    "train.optim.warmup_steps=1",
    "train.tensorboard=false",
    "train.log_every=2",
    "train.validation_windows=16",
    "train.checkpoint_every=2",
    "train.steps=4",
    "data.val_ratio=0.2",
    "student.bins=12",
    "student.sampler.steps=2",
]


@pytest.fixture(scope="session")
def trained(circles, tmp_path_factory):
    """The bundle of a U-Net that was trained for a moment with EDM's noise."""
    run = tmp_path_factory.mktemp("teachers") / "teacher"
    plain = compose_config("train", [*OVERRIDES, "process=edm", "train.steps=2", f"data.path={circles}", f"out={run}"])
    start(plain, resume=False)
    return run / "bundles" / "last"


@pytest.fixture
def teacher(trained, tmp_path):
    """Its copy in a run of its own."""
    return Path(shutil.copytree(trained, tmp_path / "teacher" / "bundles" / "last"))


@pytest.fixture
def settings(teacher, circles):
    """The composed configuration of a short distillation."""

    def make(**changes):
        given = [f"{k}={v}" for k, v in {"data.path": circles, **changes}.items()]
        return compose([f"teacher={teacher}", *SHORT, *given])

    return make


def weights(run):
    folder = run / "checkpoints" / (run / "checkpoints" / "last").read_text()
    return {f"{file.stem}.{k}": v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same_weights(a, b):
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert [k for k in left if not torch.equal(left[k], right[k])] == []


def write(path, fps=10, **dims):
    arrays = [ArraySpec(k, (dim,), "float32", "action" if k == "action" else "state") for k, dim in dims.items()]
    rng = np.random.default_rng(0)
    with EpisodeStore.create(path, arrays, fps=fps) as store:
        for _ in range(5):
            store.append({k: rng.normal(size=(20, dim)).astype(np.float32) for k, dim in dims.items()})
    return path


def test_a_distillation_writes_a_student_beside_its_teachers_run(settings, teacher, tmp_path):
    distill(settings(), resume=False)
    run = tmp_path / "teacher-consistency"
    student, manifest = load_bundle(run / "bundles" / "last")
    known, taught = load_bundle(teacher)
    assert isinstance(student, ConsistencyPolicy) and student.teacher is None
    assert student.spec == known.spec and student.config.process == known.config.process
    assert student.config.bins == 12 and student.network_calls == 2
    for name, value in known.normalizer.state_dict().items():
        assert torch.equal(value, student.normalizer.state_dict()[name])
    assert manifest["task"] == taught["task"]
    assert manifest["provenance"]["config"]["teacher"] == str(teacher)
    assert [r["step"] for r in rows(run)] == [2, 4] and "val/action_error" in rows(run)[-1]


def test_an_interrupted_distillation_goes_on_bit_for_bit(settings, tmp_path):
    distill(settings(out=tmp_path / "whole"), resume=False)
    half = settings(out=tmp_path / "half")
    taught = load_teacher(tmp_path / "teacher" / "bundles" / "last")
    config = dataclass_from(RunConfig, {name: half[name] for name in SECTIONS}, "")
    stopped = Run(config, half, join_processes("cpu"), lambda data: student_of(taught, half["policy"], data))
    for batch in itertools.islice(stopped.data.training.batches(), 2):
        stopped.update(batch)
    stopped.save(BestBundles(stopped.out / "bundles", 0))
    distill(half, resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "half")


@pytest.mark.parametrize(
    ("name", "process", "message"),
    [
        ("diffusion_unet", "ddpm", r"process 'ddpm', wanted 'edm'. Train a teacher with: robopolicy train policy="),
        ("consistency", "edm", "holds a 'consistency', wanted a 'diffusion_unet'. Train a teacher with: robopolicy"),
    ],
)
def test_policies_that_cannot_teach_are_refused(teacher, tmp_path, name, process, message):
    known, _ = load_bundle(teacher)
    config = {"down_dims": [16, 32], "step_embed_dim": 16, "process": {"name": process}}
    bundle = save_bundle(build_policy(name, config, known.spec, known.normalizer), tmp_path / "other")
    with pytest.raises(UserError, match=message):
        load_teacher(bundle)


@pytest.mark.parametrize(
    ("fps", "dims", "message"),
    [
        (10, {"observation.state": 3, "action": 2}, r"observation.state: found shape \(3,\), wanted \(2,\)"),
        (10, {"state": 2, "action": 2}, "no array 'observation.state'"),
        (50, {"observation.state": 2, "action": 2}, "The data has 50 steps/s, the teacher .* 10"),
    ],
)
def test_data_that_the_teacher_does_not_know_is_refused(settings, tmp_path, fps, dims, message):
    path = write(tmp_path / "other.zarr", fps, **dims)
    with pytest.raises(UserError, match=message):
        distill(settings(**{"data.path": path}), resume=False)


def test_a_run_does_not_go_on_with_another_teacher(settings):
    with pytest.raises(UserError, match="The run started with a teacher 0000; .* now. Restore it"):
        distill({**settings(), "teacher_fingerprint": "0000"}, resume=True)


def test_mistakes_in_the_command_are_named(settings, tmp_path):
    with pytest.raises(UserError, match="Unknown key 'student.bin'. Did you mean 'student.bins'"):
        settings(**{"student.bin": 12})
    with pytest.raises(UserError, match="Unknown sampler 'heun'"):
        distill(settings(**{"student.sampler.name": "heun"}), resume=False)
    with pytest.raises(UserError, match="not a bundle"):
        settings(teacher=tmp_path)
