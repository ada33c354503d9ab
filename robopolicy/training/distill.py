"""Distillation: a diffusion policy's bundle, and data like that it was trained on, become a consistency policy.

The training loop stays as it is: `student_of` makes the policy that it trains, whose loss knows the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robopolicy.configuration import dataclass_from
from robopolicy.diffusion.edm import EdmConfig
from robopolicy.errors import UserError
from robopolicy.manifest import bundle_fingerprint
from robopolicy.policies.bundle import load_bundle
from robopolicy.policies.consistency import ConsistencyConfig, ConsistencyPolicy
from robopolicy.policies.diffusion_unet import DiffusionUnet
from robopolicy.policies.registry import policy_name
from robopolicy.spec import PolicySpec, check_keys
from robopolicy.training.dataset import TrainingData


@dataclass(frozen=True)
class Teacher:
    """A policy to distil, with the averaged weights that its bundle holds.

    Attributes:
        path: its bundle.
        policy: the policy.
        manifest: the bundle's.
    """

    path: Path
    policy: DiffusionUnet
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return bundle_fingerprint(self.manifest)

    @property
    def run(self) -> Path:
        """The folder of its training run; of a bundle elsewhere, the bundle."""
        return self.path.parent.parent if self.path.parent.name == "bundles" else self.path


def load_teacher(path: Path) -> Teacher:
    """Load a bundle to distil.

    Raises:
        UserError: no bundle, another architecture than a U-Net, or another process than EDM.
    """
    path = path.resolve()
    policy, manifest = load_bundle(path)
    if type(policy) is not DiffusionUnet:
        raise UserError(f"{path} holds a '{policy_name(policy)}', wanted a 'diffusion_unet'. {_TRAIN}")
    if not isinstance(policy.config.process, EdmConfig):
        raise UserError(f"{path} was trained with process '{policy.config.process.name}', wanted 'edm'. {_TRAIN}")
    return Teacher(path, policy, manifest)


_TRAIN = "Train a teacher with: robopolicy train policy=diffusion_unet process=edm …"


def student_architecture(teacher: Teacher, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values of a student: the teacher's network and noise process, and the settings.

    Args:
        teacher: the teacher.
        settings: plain values of the entries of `ConsistencyConfig` that a teacher does not have, and the sampler.
    """
    return {"name": "consistency", "config": {**teacher.manifest["architecture"]["config"], **settings}}


def student_of(teacher: Teacher, architecture: Mapping[str, Any], data: TrainingData) -> ConsistencyPolicy:
    """The policy to train. Its units are the teacher's: the data's own normalisers are not used.

    Raises:
        UserError: the data does not fit the teacher, or the configuration is impossible.
    """
    check_data(data.spec, teacher)
    config = dataclass_from(ConsistencyConfig, architecture["config"], "policy.config")
    return ConsistencyPolicy.student(teacher.policy, config)


def check_data(found: PolicySpec, teacher: Teacher) -> None:
    """Compare what the data offers with what the teacher knows.

    Raises:
        UserError: keys, their shapes or units, the rate, or the tasks differ.
    """
    wanted = teacher.policy.spec
    keys = {key.key: key for key in (*found.observations, found.action)}
    check_keys(keys, (*wanted.observations, wanted.action), f"The data and the teacher {teacher.path}")
    if found.fps != wanted.fps:
        raise UserError(f"The data has {found.fps:g} steps/s, the teacher {teacher.path} {wanted.fps:g}. Convert it.")
    if found.tasks != wanted.tasks:
        raise UserError(
            f"The data's tasks and those of the teacher {teacher.path} differ: found {_tasks(found)}, wanted "
            f"{_tasks(wanted)}. Give its datasets, in the same order, and the same data.normalize."
        )


def _tasks(spec: PolicySpec) -> str:
    return ", ".join(f"'{task.instruction}' (normaliser {task.domain})" for task in spec.tasks) or "none"
