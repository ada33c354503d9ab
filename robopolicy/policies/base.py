"""What every policy family shares: the public call in physical units, and the loss as a pure function of its draws."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robopolicy.data.augment import AugmentConfig
from robopolicy.data.normalize import Normalizer
from robopolicy.diffusion.process import SamplerConfig
from robopolicy.diffusion.sampling import Generators
from robopolicy.errors import UserError
from robopolicy.inference.observations import checked_observations
from robopolicy.nets.language import LANGUAGE, instruction_encoder
from robopolicy.spec import GOAL, INSTRUCTION, TASK, KeySpec, PolicySpec

Draws = dict[str, Tensor]


@dataclass(frozen=True)
class ExportGraph:
    """One graph of a policy.

    Attributes:
        module: its forward takes ``inputs`` and returns a tensor or a tuple of tensors.
        inputs: example inputs, rows first, but for ``shared``.
        names: names of the inputs.
        outputs: names of the outputs.
        shared: inputs that all rows have in common.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    names: tuple[str, ...]
    outputs: tuple[str, ...]
    shared: tuple[str, ...] = ()


class Policy(nn.Module, ABC):
    """An observation history goes in, an action chunk comes out, both in physical units.

    Attributes:
        spec: keys, shapes, units and horizons.
        normalizer: the affine maps between physical units and what networks see.
        config: the architecture's dataclass, saved in bundles.
        augmentation: changes to images while training; the crop's size applies at inference too.
        sampler: how chunks are sampled; may be replaced after training.
        instruction: what `act` does where observations bring no instruction; for policies with tasks.
        goal: values of the spec's goals, by key without prefix, that `act` pursues where observations bring none.
        training_progress: share of the training run that is done, in [0, 1]; the loop sets it before every `draw`.
        task_offset: index of the training data's first task among the spec's; above 0 where tasks are added.
    """

    config: Any
    augmentation: AugmentConfig
    sampler: SamplerConfig
    _domains: Tensor

    def __init__(self, spec: PolicySpec, normalizer: Normalizer) -> None:
        super().__init__()
        self.spec = spec
        self.normalizer = normalizer
        self.instruction: str | None = None
        self.training_progress = 0.0
        self.task_offset = 0
        self.goal: Mapping[str, np.ndarray] = {}
        domains = torch.tensor([task.domain for task in spec.tasks], dtype=torch.long)
        self.register_buffer("_domains", domains, persistent=False)

    @abstractmethod
    def draw(self, batch_size: int, generator: torch.Generator) -> Draws:
        """Draw all randomness of one training batch, on the CPU; the first dimension is the batch."""

    @abstractmethod
    def loss(self, batch: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """Mean training loss of a batch of windows in physical units; a pure function of its arguments."""

    @abstractmethod
    def check_sampler(self, sampler: SamplerConfig) -> None:
        """Raise a `UserError` if this policy cannot be sampled so."""

    @abstractmethod
    def sample(self, observations: Mapping[str, Tensor], generators: Generators) -> Tensor:
        """Sample chunks.

        Args:
            observations: by key, (B, n_obs_steps, *shape), physical units; images uint8. Goals (B, *shape) under
                ``goal.<key>`` and the index ``task`` (B,) int64, where the spec has them; beside it, ``language``
                (B, 384) sentence vectors, where an instruction is not one of the tasks'.
            generators: one generator for the batch, or one for each row.

        Returns:
            (B, horizon, A) actions in physical units; entry ``n_obs_steps - 1`` belongs to the newest observation.
        """

    @abstractmethod
    def encode(self, observations: Mapping[str, Tensor]) -> Tensor:
        """Features (B, F) of observation histories (as for `sample`, without goals and instructions).

        Where datasets were normalised apart, the first one's normaliser is used.
        """

    @property
    @abstractmethod
    def network_calls(self) -> int:
        """Calls of the denoising network for one chunk with the present sampler."""

    @abstractmethod
    def export_graphs(
        self, observations: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> dict[str, ExportGraph]:
        """The parts of the policy that an inference engine runs, see `robopolicy.policies.graphs`.

        Each module takes and returns tensors only and draws no random numbers.

        Args:
            observations: as for `sample`; what the example inputs are made from.
            dtype: in which networks compute; everything that crosses a border, and the solver, stays float32.
        """

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def normalized(self, observations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Normalise the states of observations and goals; images and the task pass unchanged."""
        domain = self.domain(observations)
        goals = {GOAL + k.key: self._normalized(k, observations[GOAL + k.key], domain) for k in self.spec.goals}
        told = {key: observations[key] for key in (TASK, LANGUAGE) if self.spec.tasks and key in observations}
        return self.normalized_history(observations, domain) | goals | told

    def normalized_history(self, observations: Mapping[str, Tensor], domain: Tensor | None) -> dict[str, Tensor]:
        """Normalise the states of the observation history alone."""
        return {k.key: self._normalized(k, observations[k.key], domain) for k in self.spec.observations}

    def domain(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Which normaliser each row (B,) uses; None where there is one for all."""
        return self._domains[batch[TASK]] if self.spec.domains > 1 else None

    def _normalized(self, key: KeySpec, values: Tensor, domain: Tensor | None) -> Tensor:
        return values if key.role == "image" else self.normalizer[key.key].normalize(values, domain)

    @torch.inference_mode()
    def act(self, observations: Mapping[str, np.ndarray], generators: Sequence[torch.Generator]) -> np.ndarray:
        """The executed part of a chunk for each row.

        Args:
            observations: by key, (B, n_obs_steps, *shape), physical units; images uint8. Where the spec has them,
                goals (B, *shape) under ``goal.<key>`` and ``instruction``, B texts; `goal` and `instruction` of the
                policy stand in for those that are not there.
            generators: one for each row; a row's chunk depends on its own generator and observation only.

        Returns:
            (B, n_action_steps, A) float32, physical units.

        Raises:
            UserError: a key is missing or has a wrong shape, or the policy does not know the instruction.
        """
        batch = {k: torch.as_tensor(v) for k, v in self.checked(observations).items()}
        chunk = self.sample({k: v.to(self.device) for k, v in batch.items()}, generators)
        return chunk[:, self.spec.executed].float().cpu().numpy()

    def checked(self, observations: Mapping[str, Any]) -> dict[str, Any]:
        """What `sample` needs of the observations that `act` gets, on the CPU; raises as `act` does."""
        checked: dict[str, Any] = dict(checked_observations(self.spec, observations, self.goal))
        rows = len(next(iter(checked.values())))
        if self.spec.tasks:
            texts = observations.get(INSTRUCTION, [self.instruction] * rows)
            if isinstance(texts, str) or len(texts) != rows:
                raise UserError(f"{INSTRUCTION}: found {texts!r}, wanted {rows} texts, one for each row.")
            checked |= self._told(texts)
        return checked

    def check_instruction(self, instruction: str | None) -> None:
        """Raise a `UserError` if this policy is not told what to do, or does not understand the instruction."""
        if not self.spec.tasks:
            raise UserError(f"This policy is not told what to do; leave the instruction '{instruction}' out.")
        self._told([instruction])

    def _told(self, texts: Sequence[str | None]) -> dict[str, Tensor]:
        """``task`` (B,) and, where a text is not one of the tasks', ``language`` (B, 384)."""
        known = [task.instruction for task in self.spec.tasks]
        given = [str(text) for text in texts if text is not None]
        if len(given) < len(texts):
            raise UserError(f"This policy needs an instruction, one of: {', '.join(map(repr, known))}.")
        encoder = instruction_encoder(self)
        assert encoder is not None  # of every family that takes tasks
        task, language = encoder.understand(given)
        return {TASK: task} if language is None else {TASK: task, LANGUAGE: language}
