"""``robopolicy export``"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robopolicy.cli.compose import compose_config
from robopolicy.cli.evaluate import Sampler, override_sampler
from robopolicy.errors import UserError, require_extra

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from robopolicy.export.build import Built
    from robopolicy.inference.policy import ExportedPolicy
    from robopolicy.policies.denoising import DenoisingPolicy

HELP = """\
Export a policy for an inference engine: faster, and without torch where it runs.

  robopolicy export bundle=runs/pusht/bundles/last
  robopolicy export bundle=… backend=onnxruntime precision=int8
  robopolicy export bundle=… backend=tensorrt_rtx precision=fp16 device-capability=[sm86,sm89,sm120]
  robopolicy export bundle=… sampler.steps=8 name=fast eval=true episodes=100
  robopolicy export bundle=… rows=null critic=runs/critic/bundles/last candidates=10
  robopolicy export bundle=… 'dynaguide={dynamics: runs/dynamics/bundles/last, positive: [demos.zarr#3]}'

The engine goes into the bundle, BUNDLE/engines/NAME: graphs or compiled plans, engine.yaml, and golden chunks that are
sampled again wherever it is loaded. Before it is written it is compared with the policy itself on real observations
(those of the training data, or of data=…), with the same noise: largest and mean error in the action's unit. An engine
outside the tolerance is refused. With eval=true both play the same episodes, and an engine that does worse is refused.

  onnxruntime    any CPU; fp32, fp16, int8
  openvino       CPUs, usually the fastest there; fp32, fp16 (weights), bf16 where the CPU can, int8
  tensorrt_rtx   RTX GPUs, built without one: device-capability sm75, sm80, sm86, sm89, sm120, sm121
  tensorrt       the GPU of this machine, also Jetson, H100 and Thor
  aot_inductor   native code by torch, for this machine; runs only where the user allows native code

An engine runs in robopolicy eval engine=…, bench and serve, and from Python: robopolicy.inference.policy.open_engine.
"""


EXTRA = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tensorrt_rtx": "tensorrt",
    "tensorrt": "tensorrt-classic",
}
"""What to install for each backend."""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "export",
        help="export a policy for an inference engine",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see above and configs/export.yaml")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Settings:
    """The entries of ``configs/export.yaml``, explained there and in `ExportConfig`."""

    bundle: str
    backend: str
    precision: str
    device_capability: Any
    rows: int | None
    max_rows: int
    exporter: str
    observations: int
    calibration: int
    seed: int
    threads: int
    device: str
    eval: bool
    episodes: int
    first_seed: int
    loop: bool | None = None
    name: str | None = None
    tolerance: float | None = None
    data: str | None = None
    critic: str | None = None
    candidates: int | None = None
    temperature: float | None = None
    dynaguide: dict[str, Any] | None = None
    sampler: Sampler = field(default_factory=Sampler)


def run(args: argparse.Namespace) -> int:
    from robopolicy.configuration import dataclass_from

    overrides = [_with_underscores(override) for override in args.overrides]
    settings = dataclass_from(Settings, compose_config("export", overrides), "")
    for package in ("onnx", "onnxscript"):
        require_extra(package, EXTRA.get(settings.backend, "export"))
    import torch

    from robopolicy.export.build import ExportConfig, build_engine
    from robopolicy.export.observations import find_observations
    from robopolicy.policies.bundle import load_bundle
    from robopolicy.policies.denoising import DenoisingPolicy

    values = {f.name: getattr(settings, f.name) for f in fields(ExportConfig) if hasattr(settings, f.name)}
    values["capabilities"] = _capabilities(settings.device_capability)
    config = dataclass_from(ExportConfig, values, "")
    torch.set_num_threads(config.threads)
    bundle = Path(settings.bundle)
    policy, about = load_bundle(bundle)
    assert isinstance(policy, DenoisingPolicy)  # as all families are
    override_sampler(policy, settings.sampler)
    count = config.observations + (config.calibration if config.precision == "int8" else 0)
    observations = find_observations(policy, about, count, data=settings.data, seed=settings.seed)
    command = shlex.join(["robopolicy", "export", *args.overrides])
    judge = _paired_evaluation(policy, about, settings) if settings.eval else None
    _print(build_engine(policy, about, bundle, config, observations, command, judge))
    return 0


def _with_underscores(override: str) -> str:
    """``device-capability=…`` as ``device_capability=…``."""
    key, given, value = override.partition("=")
    return key.replace("-", "_") + given + value


def _capabilities(value: Any) -> list[str]:
    return [str(value)] if isinstance(value, str) else [str(v) for v in value or ()]


def _paired_evaluation(
    policy: DenoisingPolicy, about: Mapping[str, Any], settings: Settings
) -> Callable[[ExportedPolicy], dict[str, Any]]:
    """Plays the same episodes with the engine and the policy; refuses an engine that does worse for sure."""
    from robopolicy.evaluation.rollout import rollout
    from robopolicy.evaluation.statistics import paired_difference
    from robopolicy.evaluation.tasks import task_places
    from robopolicy.export.engine_policy import EnginePolicy

    places = task_places(about["task"])
    if len(places) != 1 or policy.spec.goals:
        why = "pursues a goal" if policy.spec.goals else f"has {len(places)} environments"
        raise UserError(f"eval=true plays in one environment without goals; this policy {why}. Use eval engine=….")
    world = places[0].world()
    policy.instruction = places[0].instruction or None

    def judge(engine: ExportedPolicy) -> dict[str, Any]:
        engine.instruction = policy.instruction
        seeds = range(settings.first_seed, settings.first_seed + settings.episodes)
        ours, own = (rollout(player, world, seeds) for player in (EnginePolicy(engine), policy))
        scores = [[episode.score for episode in played] for played in (ours, own)]
        successes = [[episode.success for episode in played] for played in (ours, own)]
        found = paired_difference(*scores, *successes)
        rates = [sum(values) / len(values) for values in successes]
        text = (
            f"success on the same {found.n} starts: engine {rates[0]:.3f}, policy {rates[1]:.3f}, difference "
            f"{found.success.value:+.3f} [{found.success.low:+.3f}, {found.success.high:+.3f}]"
        )
        print(text)
        if found.success.high < 0 or found.score.high < 0:
            raise UserError(f"The engine does worse than the policy and is refused: {text}. Nothing was written.")
        return {"environment": places[0].environment, "episodes": found.n, "engine": rates[0], "policy": rates[1]}

    return judge


def _print(built: Built) -> None:
    manifest = built.manifest
    parity = manifest.parity
    for report in built.reports:
        print(report)
    largest = ", ".join(f"{value:.3g}" for value in parity.max_error)
    mean = ", ".join(f"{value:.3g}" for value in parity.mean_error)
    print(f"compared with the policy on {parity.observations} observations ({parity.source}):")
    print(f"  largest error of each entry  {largest}")
    print(f"  mean error of each entry     {mean}")
    print(
        f"  of the action's range        {100 * parity.max_share:.2g} % largest, {100 * parity.mean_share:.2g} % mean"
    )
    size = sum((built.folder / graph.file).stat().st_size for graph in manifest.graphs.values())
    print(f"engine: {built.folder}  ({size / 1e6:.1f} MB; allowed {100 * parity.tolerance:.2g} %)")
