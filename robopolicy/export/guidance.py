"""Graphs that guide an engine towards goals: DynaGuide's gradient as plain forward operators.

ONNX has no backward pass. The log weight's gradient with respect to the chunk is therefore traced together with the log
weight itself, operator by operator, until only operators are left that every backend has. It goes through the dynamics
model's perceptron or transformer alone: what is seen is encoded before, without a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import interpolate, pad
from torch.overrides import TorchFunctionMode

from robopolicy.data.goal_file import load_goals
from robopolicy.diffusion.guidance import SMALLEST_SIGNAL, posterior_variance
from robopolicy.diffusion.step_table import step_table
from robopolicy.dynamics.model import OutcomeModel
from robopolicy.errors import UserError
from robopolicy.inference.engine import Guidance
from robopolicy.inference.guided import SHARED, GuidedSteps
from robopolicy.manifest import bundle_fingerprint, read_manifest
from robopolicy.policies.base import ExportGraph
from robopolicy.policies.denoising import DenoisingPolicy
from robopolicy.policies.graphs import ActionMap
from robopolicy.spec import TASK, check_keys
from robopolicy.steering.dynaguide import ChunkUnits, DynaGuide, DynaGuideConfig

PLACES = 16
"""Goals that an engine has room for, if no more are exported: others can be set where it runs."""
_ABSENT = -1e30
_ROWS = 211  # tracing takes equal sizes for the same one: a number that nothing else has


@dataclass(frozen=True)
class GuidanceExport:
    """What guides an engine.

    Attributes:
        guidance: for its manifest, without the hash of the file of steps.
        steps: for that file.
        graphs: ``dynamics_encoder``, ``guidance`` and ``goal_encoder``.
    """

    guidance: Guidance
    steps: GuidedSteps
    graphs: dict[str, ExportGraph]


def export_guidance(
    policy: DenoisingPolicy, config: DynaGuideConfig, observations: Mapping[str, Tensor], free_rows: bool
) -> GuidanceExport:
    """Capture a dynamics model's guidance of a policy.

    Args:
        policy: in evaluation mode, with the sampler to export.
        config: model, goals and strength.
        observations: as for `Policy.sample`; what the example inputs are made from.
        free_rows: the graphs take any number of rows.

    Raises:
        UserError: the model does not fit the policy, sees more than it does, or guides in a way that engines cannot.
    """
    _check(config)
    model = DynaGuide(config, policy).model
    who = f"The observations of the policy and the dynamics {config.dynamics}"
    check_keys({key.key: key for key in policy.spec.observations}, model.spec.observations, who)
    keys = tuple(key.key for key in model.spec.observations)
    seen = tuple(observations[key] for key in keys)
    encoder, goal_encoder = DynamicsEncoderGraph(model, keys), GoalEncoderGraph(model, config)
    positive, negative = _goals(model, config, config.positive), _goals(model, config, config.negative)
    with torch.no_grad():
        features = encoder(*seen)
        goals, sides = _in_places(*(goal_encoder(*side) if side else None for side in (positive, negative)))
    rows = len(features)
    inputs = {
        "chunk": torch.zeros(rows, policy.spec.horizon, policy.spec.action.dim),
        "signal": torch.tensor([0.5]),
        "noise": torch.tensor([0.5]),
        "temperature": torch.tensor([config.temperature]),
        "goals": goals,
        "sides": sides,
        "features": features,
    }
    if policy.spec.domains > 1:
        inputs[TASK] = observations[TASK]
    shared = tuple(name for name in inputs if name in SHARED)
    weight = LogWeight(model, policy, config)
    example = tuple(value[:1].repeat(rows, *[1] * (value.ndim - 1)) for value in positive or negative)
    graphs = {
        "dynamics_encoder": ExportGraph(encoder, seen, keys, ("features",)),
        "guidance": gradient_graph(
            ExportGraph(weight, tuple(inputs.values()), tuple(inputs), ("weight",), shared), free_rows
        ),
        "goal_encoder": ExportGraph(goal_encoder, example, goal_encoder.keys, ("latents",)),
    }
    fingerprint = bundle_fingerprint(read_manifest(Path(config.dynamics), "dynamics"))
    space: Literal["clean", "noisy"] = "noisy" if config.space == "noisy" else "clean"
    guidance = Guidance(fingerprint, config.scale, config.temperature, space)
    return GuidanceExport(guidance, _steps(policy, config, goals, sides), graphs)


class DynamicsEncoderGraph(nn.Module):
    """The policy's observations, in physical units, to what the dynamics model sees of them, (B, F)."""

    def __init__(self, model: OutcomeModel, keys: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.keys = model, keys
        self.resize = _ResizeByProducts()

    def forward(self, *inputs: Tensor) -> Tensor:
        steps = self.model.spec.n_obs_steps
        # TensorRT does nothing with uint8 but convert it
        seen = zip(self.keys, (value.float() for value in inputs), strict=True)
        with self.resize:
            return self.model.encode({key: value[:, -steps:] for key, value in seen})


class GoalEncoderGraph(nn.Module):
    """Goals, by key (G, *shape) in physical units, to the entries of their latents that count, (G, Z)."""

    def __init__(self, model: OutcomeModel, config: DynaGuideConfig) -> None:
        super().__init__()
        self.model, self.keys = model, tuple(key.key for key in model.spec.goals)
        self.entries = model.latent_entries(config.keys, "dynaguide.keys")
        self.resize = _ResizeByProducts()

    def forward(self, *inputs: Tensor) -> Tensor:
        values = (value.float() for value in inputs)
        with self.resize:
            return self.model.target(dict(zip(self.keys, values, strict=True)))[:, self.entries]


class _ResizeByProducts(TorchFunctionMode):
    """Antialiased resizing as products with two matrices: TensorRT has no other form of it.

    The matrices are found in the first call, which must not be one that is traced.
    """

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[tuple[int, int], Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is not interpolate or not options.get("antialias"):
            return func(*args, **options)
        image, size = args[0], options.pop("size")
        pairs = zip(image.shape[-2:], size, strict=True)
        down, across = (self._matrix(int(old), new, options) for old, new in pairs)
        return down @ image @ across.T

    def _matrix(self, old: int, new: int, options: dict[str, Any]) -> Tensor:
        if (old, new) not in self._found:
            self._found[old, new] = interpolate(torch.eye(old)[None, None], (new, old), **options)[0, 0]
        return self._found[old, new]


class LogWeight(nn.Module):
    """DynaGuide's log weight of a policy's chunks, summed over the rows, with goals as inputs.

    Args:
        model: predicts outcomes.
        policy: whose chunks are weighed.
        config: which entries count, and on what the model is evaluated.
    """

    def __init__(self, model: OutcomeModel, policy: DenoisingPolicy, config: DynaGuideConfig) -> None:
        super().__init__()
        self.model, self.policy = model, policy
        self.units = ChunkUnits(model, policy, config)
        self.entries = model.latent_entries(config.keys, "dynaguide.keys")

    def forward(
        self,
        chunk: Tensor,
        signal: Tensor,
        noise: Tensor,
        temperature: Tensor,
        goals: Tensor,
        sides: Tensor,
        features: Tensor,
        task: Tensor | None = None,
    ) -> Tensor:
        """The sum, a scalar.

        Args:
            chunk: (R, H, A), the policy's normalised units.
            signal, noise: (1,) levels of the chunks.
            temperature: (1,) see `robopolicy.steering.dynaguide.goal_log_weight`, whose values these are.
            goals: (G, Z) latents.
            sides: (G,) 1 for those to reach, -1 to avoid, 0 for none.
            features: (R, F) from `DynamicsEncoderGraph`.
            task: (R,) of the policy, where its datasets were normalised apart.
        """
        domain = None if task is None else self.policy.domain({TASK: task})
        x, level = self.units.network_input(chunk, signal.view(1, 1, 1), noise.view(1, 1, 1), domain)
        z = self.model.outcome(features, x, level)[:, self.entries]
        nearness = -torch.linalg.vector_norm(z[:, None] - goals, dim=2) / temperature
        reached, avoided = (torch.where(side, nearness, _ABSENT).logsumexp(dim=1) for side in (sides > 0, sides < 0))
        return (reached - avoided).sum()


def gradient_graph(graph: ExportGraph, free_rows: bool) -> ExportGraph:
    """The gradient of a graph's scalar with respect to its first input, as forward operators alone.

    Args:
        graph: without convolutions, whose gradient ONNX cannot express.
        free_rows: the result takes any number of rows.
    """
    described = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def describe(name: str, value: Tensor) -> Tensor:
        """Sizes are numbers but for the rows, a symbol where they are free."""
        sizes = [DimDynamic.STATIC] * value.ndim
        if free_rows and name not in graph.shared:
            value = value[:1].repeat(_ROWS, *[1] * (value.ndim - 1))
            sizes[0] = DimDynamic.DYNAMIC
        return described.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    def gradient(first: Tensor, *others: Tensor) -> Tensor:
        with torch.enable_grad():
            point = first.detach().requires_grad_()
            return torch.autograd.grad(graph.module(point, *others), point)[0]

    decompositions: dict[Any, Any] = {**core_aten_decompositions()}
    # TensorRT's form has no second output, the deviation that the gradient needs
    decompositions |= get_decompositions([torch.ops.aten.native_layer_norm])
    inputs = [describe(name, value) for name, value in zip(graph.names, graph.inputs, strict=True)]
    # the fused attention of CPUs has a gradient without an ONNX form
    with described, enable_python_dispatcher(), sdpa_kernel(SDPBackend.MATH):
        trace = make_fx(
            gradient,
            decomposition_table=decompositions,
            _allow_non_fake_inputs=True,
        )
        module = trace(*inputs)
    _fold_transposes(module)
    return replace(graph, module=module, outputs=("gradient",))


def _fold_transposes(module: GraphModule) -> None:
    """Give each orientation of a weight a constant of its own.

    OpenVINO 2026.4 multiplies by the wrong one where the forward pass transposes a weight and the gradient transposes
    the result again.
    """
    weights: dict[Node, Tensor] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            weights[node] = getattr(module, node.target)
        elif node.target == torch.ops.aten.permute.default and node.args[0] in weights:
            weights[node] = weights[node.args[0]].permute(node.args[1]).contiguous()
            name = f"folded_{node.name}"
            module.register_buffer(name, weights[node], persistent=False)
            with module.graph.inserting_before(node):
                constant = module.graph.get_attr(name)
            node.replace_all_uses_with(constant)
            module.graph.erase_node(node)
            weights[constant] = weights.pop(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def _check(config: DynaGuideConfig) -> None:
    in_torch = "or guide in torch: robopolicy eval steering=dynaguide"
    if config.space == "denoiser":
        raise UserError(
            "dynaguide.space=denoiser takes the gradient through the policy's network, and ONNX has no form for the "
            f"gradient of a convolution. Set dynaguide.space=noisy or clean, {in_torch}."
        )
    if config.recurrence > 1:
        raise UserError(
            f"dynaguide.recurrence={config.recurrence}: engines take each step once. Set it to 1, {in_torch}."
        )
    if config.scale == 0:
        raise UserError("dynaguide.scale=0 changes nothing. Leave dynaguide out, or set a scale above 0.")


def _goals(model: OutcomeModel, config: DynaGuideConfig, places: Sequence[Any]) -> tuple[Tensor, ...]:
    """Values of goals, (G, *shape) for each of the outcome's keys; empty where there is none."""
    keys, limit = model.spec.goals, config.goals_per_behaviour
    found = [goal for place in places for goal in load_goals(place, keys, limit, f"dynaguide: {place}")]
    return tuple(torch.from_numpy(np.stack([goal[key.key] for goal in found])) for key in keys) if found else ()


def _in_places(positive: Tensor | None, negative: Tensor | None) -> tuple[Tensor, Tensor]:
    """Latents of goals in an engine's places, (G, Z), and their sides (G,)."""
    given = [(latents, side) for latents, side in ((positive, 1.0), (negative, -1.0)) if latents is not None]
    latents = torch.cat([latents for latents, _ in given])
    sides = torch.cat([torch.full((len(latents),), side) for latents, side in given])
    empty = max(0, PLACES - len(sides))
    return pad(latents, (0, 0, 0, empty)), pad(sides, (0, empty))


def _steps(policy: DenoisingPolicy, config: DynaGuideConfig, goals: Tensor, sides: Tensor) -> GuidedSteps:
    process = policy.process
    table = step_table(process, process.solver(policy.sampler))
    signal, noise = (value.flatten() for value in process.signal_and_noise(table.levels))
    if config.space == "noisy":
        gain = noise**2 / signal.clamp(min=SMALLEST_SIGNAL)
    else:
        gain = posterior_variance(signal, noise, process.sigma_data)
        signal, noise = torch.ones_like(signal), torch.zeros_like(noise)
    acts = torch.tensor([config.start <= i / len(table) < config.stop for i in range(len(table))])
    values = {
        "rows": table.rows,
        "draws": torch.tensor(table.draws),
        "levels": table.levels,
        "start": torch.tensor([table.start]),
        "signal": signal,
        "noise": noise,
        "gain": torch.where(acts, gain, 0.0),
        "goals": goals,
        "sides": sides,
        "action_map": _action_map(policy),
    }
    return GuidedSteps(**{name: value.cpu().numpy() for name, value in values.items()})


def _action_map(policy: DenoisingPolicy) -> Tensor:
    """(4, A) scale, offset and bounds; (0, A) where each row has its own."""
    if policy.spec.domains > 1:
        return torch.zeros(0, policy.spec.action.dim)
    maps = ActionMap(policy)
    return torch.stack([maps.scale, maps.offset, maps.low, maps.high])
