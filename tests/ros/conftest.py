"""What the tests of the nodes share: an isolated domain, tiny bundles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

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
    made: dict[tuple[float, bool], Path] = {}

    def bundle(reach: float = 0.08, engine: bool = True) -> Path:
        if (reach, engine) not in made:
            path = tmp_path_factory.mktemp("bundle") / "policy"
            made[reach, engine] = _make_bundle(path, reach, engine)
        return made[reach, engine]

    return bundle


def _make_bundle(path: Path, reach: float, engine: bool) -> Path:
    """An untrained policy whose actions lie within ``reach`` of zero."""
    import numpy as np
    import torch

    from robopolicy.data.normalize import Normalizer, fit_normalizer
    from robopolicy.export.build import ExportConfig, build_engine
    from robopolicy.export.observations import find_observations
    from robopolicy.policies.bundle import load_bundle, save_bundle
    from robopolicy.policies.registry import build_policy
    from robopolicy.spec import KeySpec, PolicySpec

    torch.manual_seed(0)
    state = KeySpec("observation.state", (3,), unit="rad")
    image = KeySpec("observation.image.top", (40, 40, 3), role="image")
    spec = PolicySpec((state, image), KeySpec("action", (4,), role="action", unit="rad"), 10, 2, 16, 8)
    ranges = {"observation.state": np.ones(3), "action": np.full(4, reach)}
    parts = {key: fit_normalizer(np.stack([-high, high]), "minmax") for key, high in ranges.items()}
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
