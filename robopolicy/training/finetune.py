"""Fine-tuning: a bundle's weights, as far as they fit, trained on new data: all, the head only, or LoRA adapters.

The training loop stays as it is. `initial_policy` makes the policy that it trains, and `merge_adapters` makes of the
averaged policy the one that is judged and saved: an ordinary bundle, which needs neither the old one nor peft.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robopolicy.data.normalize import AffineNormalizer, Normalizer
from robopolicy.errors import UserError, require_extra
from robopolicy.nets.denoiser import Denoiser
from robopolicy.nets.language import encode_instructions
from robopolicy.policies.base import Policy
from robopolicy.policies.bundle import load_bundle
from robopolicy.policies.registry import build_policy
from robopolicy.policies.sdp import Sdp
from robopolicy.spec import KeySpec, PolicySpec, TaskSpec
from robopolicy.training.dataset import TrainingData

log = logging.getLogger(__name__)

ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)
"""Layers that LoRA adapts; weights of other modules, e.g. a mixture's stacked experts, stay as they are."""
EMBEDDINGS = "encoder.instructions.table.weight"
SENTENCES = "encoder.instructions.sentences"
"""Tensors with a row for each task of the spec."""


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (Hu et al. 2022): ``W + alpha / rank B A`` with B starting at zero.

    Attributes:
        rank: of the adapters.
        alpha: their scale, see above.
        encoder: adapt the layers of the observation encoder, too, and not only the denoiser's.
    """

    rank: int = 16
    alpha: int = 16
    encoder: bool = False

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            if getattr(self, name) < 1:
                raise UserError(f"lora.{name}={getattr(self, name)} must be at least 1.")


@dataclass(frozen=True)
class FinetuneConfig:
    """What a fine-tuning starts from, and what of it is trained.

    Attributes:
        bundle: the policy to start from.
        mode: ``full`` trains all weights, ``head`` the denoiser's output layers, ``lora`` adapters of the denoiser's
            layers. Weights that the bundle cannot give, e.g. for another action space, are trained in every mode.
        normalization: ``keep`` converts to the units that the bundle's network knows; ``refit`` fits the new data;
            ``auto`` keeps each key that has the same shape and unit as in the bundle and refits the others.
        lora: adapters, for mode ``lora``.
    """

    bundle: str
    mode: Literal["full", "head", "lora"] = "full"
    normalization: Literal["auto", "keep", "refit"] = "auto"
    lora: LoraSettings = field(default_factory=LoraSettings)


def task_of_bundle(manifest: Mapping[str, Any], dataset_fps: float | None) -> dict[str, Any]:
    """The bundle's task as plain values of `robopolicy.training.dataset.TaskConfig`.

    Args:
        manifest: of the bundle.
        dataset_fps: rate of the new data; the bundle's stands in where the data does not say it.
    """
    spec, judged = PolicySpec.from_dict(manifest["spec"]), manifest["task"]
    several = bool(judged.get("environments"))
    return {
        "name": judged.get("name") or "task",
        "observations": [_task_key(key) for key in spec.observations],
        "action": _task_key(spec.action),
        "n_obs_steps": spec.n_obs_steps,
        "horizon": spec.horizon,
        "n_action_steps": spec.n_action_steps,
        "fps": spec.fps if dataset_fps is None else None,
        "environment": "dataset" if several else judged.get("environment", ""),
        "environment_options": judged.get("environment_options") or {},
        "multitask": True if spec.tasks else None,
        "goals": [key.key for key in spec.goals],
        "goal_horizon": spec.goal_horizon,
        "schema": {},
    }


def _task_key(key: KeySpec) -> dict[str, Any]:
    columns = None if key.columns is None else list(key.columns)
    return {
        "key": key.key,
        "source": key.array,
        "role": key.role,
        "unit": key.unit,
        "columns": columns,
        "angles": list(key.angles),
    }


def initial_policy(config: FinetuneConfig, architecture: Mapping[str, Any], data: TrainingData) -> Policy:
    """The policy to train.

    Args:
        config: what to start from and what to train.
        architecture: ``name`` of the registry and its ``config``, usually the bundle's.
        data: the new data.

    Returns:
        A policy for the new data with the bundle's weights where names and shapes agree. Parameters that are not to be
        trained do not require gradients.

    Raises:
        UserError: nothing of the bundle's denoiser fits, its normalisers cannot be kept, or the policy has no denoiser
            with a head or layers to adapt.
    """
    old, _ = load_bundle(Path(config.bundle))
    tasks, domains = joined_tasks(old.spec, data.spec, keep=config.normalization != "refit")
    if isinstance(old, Sdp) and tasks != old.spec.tasks:
        raise UserError(f"The routers of {config.bundle} belong to its tasks; add tasks with robopolicy extend.")
    spec = replace(data.spec, tasks=tasks)
    _check_fit(old.spec, spec, config)
    normalizer = joined_normalizer(old, data, domains)
    name = architecture["name"]
    policy = build_policy(name, architecture["config"], spec, normalizer, "policy.config", fresh=False)
    fresh = load_matching(policy, old)
    if any(bool(tensor.isnan().any()) for name, tensor in policy.named_buffers() if name == SENTENCES):
        encode_instructions(policy)  # some are new; those of the bundle alone would not need the sentence model
    _report(policy, fresh, config)
    if config.mode != "full":
        denoiser = getattr(policy, "denoiser", None)
        if not isinstance(denoiser, Denoiser):
            raise UserError(f"mode={config.mode} needs a policy with a denoiser; fine-tune '{name}' with mode=full.")
        new = _of_layers(policy, fresh)
        if config.mode == "lora":
            add_adapters(policy, config.lora, new)
        elif isinstance(head := getattr(denoiser, "head", None), nn.Module):
            train_only(policy, [*head.parameters(), *new])
        else:
            raise UserError(f"The network of '{name}' has no output layers of its own; use mode=full or mode=lora.")
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    total = sum(p.numel() for p in policy.parameters())
    log.info("mode=%s trains %.3f M of %.3f M parameters", config.mode, trained / 1e6, total / 1e6)
    return policy


def _check_fit(old: PolicySpec, new: PolicySpec, config: FinetuneConfig) -> None:
    if config.normalization == "keep" and not same_quantity(old.action, new.action):
        raise UserError(
            f"normalization=keep: the action of {config.bundle} is {_described(old.action)}, the new data's is "
            f"{_described(new.action)}. Use normalization=refit, or the unit of the bundle."
        )
    if old.fps != new.fps:
        log.warning(
            "the bundle was trained at %g steps/s, the new data has %g: chunks differ in time", old.fps, new.fps
        )


def _described(key: KeySpec) -> str:
    return f"'{key.key}' {key.shape} {key.unit or 'without unit'}"


def same_quantity(a: KeySpec, b: KeySpec) -> bool:
    """Equal shape, angles, unit and rotation; what one side does not say is not compared."""
    stated = ((a.unit, b.unit), (a.rotation, b.rotation))
    return a.shape == b.shape and a.angles == b.angles and all(x == y or not x or not y for x, y in stated)


@dataclass(frozen=True)
class Domain:
    """Where a normaliser of the fine-tuned policy comes from.

    Attributes:
        bundle: the bundle's domain that is kept; None: the new data's normaliser is used.
        data: domains of the new data that share it.
    """

    bundle: int | None
    data: tuple[int, ...]


def joined_tasks(old: PolicySpec, new: PolicySpec, keep: bool) -> tuple[tuple[TaskSpec, ...], tuple[Domain, ...]]:
    """The tasks of the fine-tuned policy, and its normalisation domains.

    The new data's tasks come first, in its order, so that its task indices hold; then the bundle's others. A task that
    the bundle knows keeps its domain; so do all new ones where the bundle has only one.

    Args:
        old: the bundle's.
        new: the new data's.
        keep: normalisers of the bundle are kept.
    """
    known = {task.instruction: task.domain for task in old.tasks}
    only = 0 if keep and old.domains == 1 else None
    if not new.tasks:
        return (), (Domain(only, (0,)),)
    asked: dict[str, tuple[int | None, int | None]] = {
        task.instruction: (known.get(task.instruction, only) if keep else None, task.domain) for task in new.tasks
    }
    asked |= {text: (domain, None) for text, domain in known.items() if text not in asked}
    index: dict[tuple[int | None, int | None], int] = {}
    members: list[list[int]] = []
    tasks = []
    for text, (kept, fitted) in asked.items():
        place = index.setdefault((kept, None) if kept is not None else (None, fitted), len(index))
        if place == len(members):
            members.append([])
        if fitted is not None and fitted not in members[place]:
            members[place].append(fitted)
        tasks.append(TaskSpec(text, place))
    return tuple(tasks), tuple(Domain(kept, tuple(data)) for (kept, _), data in zip(index, members, strict=True))


def joined_normalizer(old: Policy, data: TrainingData, domains: Iterable[Domain]) -> Normalizer:
    """The bundle's normalisers where domain and key allow to keep them, else the new data's.

    A kept one keeps its scale, which the network knows; its range, to which sampled actions are clipped, grows to hold
    the new data.
    """
    before = {key.key: key for key in old.spec.states}
    parts = {}
    for key in (*data.spec.states, data.spec.action):
        known = old.spec.action if key is data.spec.action else before.get(key.key)
        found = []
        for domain in domains:
            fitted = [_of_domain(data.normalizer[key.key], i) for i in domain.data or (0,)]
            if known is None or domain.bundle is None or not same_quantity(known, key):
                found.append(fitted[0])
                continue
            kept = _of_domain(old.normalizer[known.key], domain.bundle)
            for part in fitted if domain.data else ():
                kept.low.copy_(torch.minimum(kept.low, part.low))
                kept.high.copy_(torch.maximum(kept.high, part.high))
            found.append(kept)
        parts[key.key] = AffineNormalizer.stack(found)
    return Normalizer.from_parts(parts)


def _of_domain(normalizer: AffineNormalizer, domain: int) -> AffineNormalizer:
    """A copy of one domain's normaliser."""
    part = AffineNormalizer(normalizer.scale.shape[-1])
    for name, values in normalizer.named_buffers():
        getattr(part, name).copy_(values if values.ndim == 1 else values[domain])
    return part


@torch.no_grad()
def load_matching(policy: Policy, old: Policy) -> list[str]:
    """Copy the tensors of which name and shape agree, but for the normalisers; rows of tasks go by instruction.

    Returns:
        The names of the policy's parameters that were not, or not wholly, filled.

    Raises:
        UserError: nothing of the denoiser fits.
    """
    source, target = old.state_dict(), policy.state_dict()
    names = [name for name in target if not name.startswith("normalizer.")]
    common = [name for name in names if name in source]
    filled = {name for name in common if name not in (EMBEDDINGS, SENTENCES) and _fits(source, target, name)}
    for name in filled:
        target[name].copy_(source[name])
    for name in (EMBEDDINGS, SENTENCES):
        if name in common and _load_task_rows(policy, old, source[name], target[name]):
            filled.add(name)
    core = [name for name in names if name.startswith("denoiser.")] or names
    if not filled.intersection(core):
        both = [name for name in core if name in source]
        where = f"it has no '{core[0]}'"
        if both:
            where = f"'{both[0]}' is {_shape(source, both[0])}, wanted {_shape(target, both[0])}"
        raise UserError(
            f"Nothing of the bundle's denoiser fits the policy to train: {where}. Leave policy.config as the bundle "
            "has it, or train a new policy with robopolicy train."
        )
    return [name for name, _ in policy.named_parameters() if name not in filled]


def _fits(source: Mapping[str, Tensor], target: Mapping[str, Tensor], name: str) -> bool:
    return source[name].shape == target[name].shape


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    return tuple(tensors[name].shape)


def _load_task_rows(policy: Policy, old: Policy, source: Tensor, target: Tensor) -> bool:
    """Copy the rows of the tasks that both policies know; returns whether all rows were filled."""
    if source.shape[1:] != target.shape[1:]:
        return False
    places = {task.instruction: i for i, task in enumerate(old.spec.tasks)}
    known = [task.instruction in places for task in policy.spec.tasks]
    rows = [places[task.instruction] for task in policy.spec.tasks if task.instruction in places]
    target[torch.tensor(known)] = source[rows]
    return all(known)


def _report(policy: Policy, fresh: list[str], config: FinetuneConfig) -> None:
    sizes = {name: parameter.numel() for name, parameter in policy.named_parameters()}
    kept = sum(sizes.values()) - sum(sizes[name] for name in fresh)
    log.info(
        "from %s: %d of %d tensors, %.3f M of %.3f M parameters",
        config.bundle,
        len(sizes) - len(fresh),
        len(sizes),
        kept / 1e6,
        sum(sizes.values()) / 1e6,
    )
    if fresh:
        shapes = dict(policy.named_parameters())
        log.info(
            "new, since the bundle has none of this name and shape: %s",
            ", ".join(f"{name} {tuple(shapes[name].shape)}" for name in fresh),
        )


def _of_layers(policy: Policy, names: Iterable[str]) -> list[nn.Parameter]:
    """All parameters of the layers that hold the named ones: a bias belongs to its weight."""
    layers = dict.fromkeys(name.rpartition(".")[0] for name in names)
    return [p for layer in layers for p in policy.get_submodule(layer).parameters(recurse=False)]


def train_only(policy: Policy, parameters: Iterable[nn.Parameter]) -> None:
    """Freeze all but the given parameters; what the policy itself has frozen stays so."""
    chosen = {id(parameter) for parameter in parameters}
    for parameter in policy.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in chosen)


def add_adapters(policy: Policy, settings: LoraSettings, also: Iterable[nn.Parameter] = ()) -> None:
    """Give the policy's layers LoRA adapters, which change nothing yet, and freeze everything else.

    Args:
        policy: changed in place.
        settings: which layers, and how.
        also: parameters to train in full; their layers get no adapters.

    Raises:
        UserError: peft is not installed, or there is no layer to adapt.
    """
    peft = require_extra("peft", "lora")
    also = list(also)
    own = {id(parameter) for parameter in also}
    names = ("denoiser", "encoder") if settings.encoder else ("denoiser",)
    parts = nn.ModuleDict({name: policy.get_submodule(name) for name in names})
    layers = [
        name
        for name, layer in parts.named_modules()
        if type(layer) in ADAPTABLE and id(layer.weight) not in own and getattr(layer, "groups", 1) == 1
    ]
    if not layers:
        raise UserError("mode=lora found no linear layer or convolution to adapt; use mode=full.")
    config = peft.LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=layers, bias="none")
    train_only(policy, also)
    peft.inject_adapter_in_model(config, parts)  # replaces the layers; freezes those parts but for the adapters
    for parameter in also:
        parameter.requires_grad_(True)


def merge_adapters(policy: Policy) -> Policy:
    """The policy with its LoRA adapters added to the weights, as an ordinary one; itself where it has none."""
    if not any(isinstance(getattr(module, "base_layer", None), nn.Module) for module in policy.modules()):
        return policy
    merged = copy.deepcopy(policy)
    for name, module in list(merged.named_modules()):
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            module.merge(safe_merge=True)
            merged.set_submodule(name, module.get_base_layer())
    return merged
