"""What the tests of the nodes share: an isolated domain, tiny bundles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from robopolicy.runtime.contract import Contract, read_contract
from tests.ros_domain import domain_environment, own_domain

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "ros_ws" / "src" / "robopolicy_ros"
BENCH = Path(__file__).parent / "bench_robot"


@pytest.fixture(autouse=True, scope="session")
def domain() -> Iterator[int]:
    """The domain of this process and those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in domain_environment().items():
            patch.setenv(name, value)
        yield own_domain()


@pytest.fixture(scope="session")
def bench_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes bundles for ``bench_robot/``; the same arguments give the same bundle."""
    made: dict[tuple[float, float], Path] = {}

    def bundle(reach: float = 0.08, gain: float = 1.0) -> Path:
        """Actions lie within ``reach`` of zero; states are multiplied by ``gain``. With a gain it has no engine."""
        if (reach, gain) not in made:
            path = tmp_path_factory.mktemp("bundle") / "policy"
            ranges = {"observation.state": np.ones((1, 3)), "action": np.full((1, 4), reach)}
            both = {key: np.concatenate([-high, high]) for key, high in ranges.items()}
            made[reach, gain] = make_bundle(path, read_contract(BENCH), both, engine=gain == 1.0, gain=gain)
        return made[reach, gain]

    return bundle


def make_bundle(
    path: Path, contract: Contract, ranges: Mapping[str, np.ndarray], *, engine: bool = False, gain: float = 1.0
) -> Path:
    """An untrained policy for a robot.

    Args:
        path: where to save it.
        contract: of the robot.
        ranges: (2, D) lowest and highest values of each vector; actions lie between them.
        engine: with an engine of ONNX Runtime.
        gain: that damages the normaliser of ``observation.state``.
    """
    import torch

    from robopolicy.data.normalize import Normalizer, fit_normalizer
    from robopolicy.export.build import ExportConfig, build_engine
    from robopolicy.export.observations import find_observations
    from robopolicy.policies.bundle import load_bundle, save_bundle
    from robopolicy.policies.registry import build_policy
    from robopolicy.spec import PolicySpec

    torch.manual_seed(0)
    observations = tuple(contract.observation_specs.values())
    spec = PolicySpec(observations, contract.action_spec, contract.policy_rate, 2, 16, 8)
    parts = {key: fit_normalizer(rows, "minmax") for key, rows in ranges.items()}
    parts["observation.state"].scale.mul_(gain)
    config = {"width": 32, "blocks": 1, "process": {"name": "flow"}, "sampler": {"name": "euler", "steps": 2}}
    policy = build_policy("diffusion_mlp", config, spec, Normalizer.from_parts(parts)).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    save_bundle(policy, path)
    if engine:
        loaded, about = load_bundle(path)
        export = ExportConfig(exporter="torchscript", observations=4, backend="onnxruntime")
        seen = find_observations(loaded, about, 8)
        build_engine(loaded, about, path, export, seen, "robopolicy export")
    return path
