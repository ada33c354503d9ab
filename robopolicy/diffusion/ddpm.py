"""DDPM noise process (Ho et al. 2020) with the squared-cosine schedule (Nichol & Dhariwal 2021).

diffusers owns the schedule and the solvers. A process adds noise, says what the network regresses, and turns a
prediction into the estimate of the clean sample; samplers see only that estimate, so that clipping and guidance act
in one place for every kind of prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor

from robopolicy.errors import UserError, did_you_mean


@dataclass(frozen=True)
class DdpmConfig:
    """The noise process.

    Attributes:
        train_steps: number of noise levels K.
        schedule: diffusers' name of the beta schedule.
        prediction: what the network regresses: the noise, the clean sample, or the velocity (Salimans & Ho 2022).
    """

    train_steps: int = 100
    schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear"] = "squaredcos_cap_v2"
    prediction: Literal["epsilon", "sample", "v_prediction"] = "epsilon"

    def __post_init__(self) -> None:
        if self.train_steps < 2:
            raise UserError(f"process.train_steps={self.train_steps} must be at least 2.")


@dataclass(frozen=True)
class SamplerConfig:
    """How a chunk is sampled.

    Attributes:
        name: ``ddim`` (Song et al. 2021), ``ddpm`` (ancestral) or ``dpmsolver++`` (2M, Lu et al. 2022).
        steps: network calls per chunk, at most ``train_steps``.
    """

    name: str = "ddim"
    steps: int = 16


# DDIM is the first-order DPM-Solver++ (Lu et al. 2022, sec. 4); unlike diffusers' DDIMScheduler this one is exact for
# every number of steps, and "trailing" starts at the noisiest level, where x is the pure noise that we start from.
_SOLVER = {"algorithm_type": "dpmsolver++", "timestep_spacing": "trailing", "final_sigmas_type": "zero"}
SAMPLERS: dict[str, tuple[type, dict[str, Any]]] = {
    "ddim": (DPMSolverMultistepScheduler, {**_SOLVER, "solver_order": 1}),
    "ddpm": (DDPMScheduler, {"clip_sample": False, "variance_type": "fixed_small"}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {**_SOLVER, "solver_order": 2}),
}


class DdpmProcess:
    """Noise levels ``t`` in 0..K-1; ``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise``."""

    def __init__(self, config: DdpmConfig) -> None:
        self.config = config
        self._schedule = {
            "num_train_timesteps": config.train_steps,
            "beta_schedule": config.schedule,
            "beta_start": 1e-4,
            "beta_end": 0.02,
        }
        self.alphas_cumprod: Tensor = DDPMScheduler(**self._schedule).alphas_cumprod

    def signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``sqrt(abar_t)`` and ``sqrt(1 - abar_t)`` for t (B,), each (B, 1, 1)."""
        if self.alphas_cumprod.device != t.device:
            self.alphas_cumprod = self.alphas_cumprod.to(t.device)  # once, not at every denoising step
        abar = self.alphas_cumprod[t].view(-1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noise clean chunks x0 (B, H, A) to the levels t (B,)."""
        a, s = self.signal_and_noise(t)
        return a * x0 + s * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict, (B, H, A)."""
        if self.config.prediction == "epsilon":
            return noise
        if self.config.prediction == "sample":
            return x0
        a, s = self.signal_and_noise(t)
        return a * noise - s * x0

    def clean_estimate(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The estimate of x_0 (B, H, A) that a prediction at x (B, H, A), t (B,) implies."""
        if self.config.prediction == "sample":
            return prediction
        a, s = self.signal_and_noise(t)
        if self.config.prediction == "epsilon":
            return (x - s * prediction) / a
        return a * x - s * prediction

    def solver(self, sampler: SamplerConfig) -> Any:
        """A fresh diffusers scheduler that takes clean-sample estimates.

        Raises:
            UserError: unknown sampler, or more steps than noise levels.
        """
        if sampler.name not in SAMPLERS:
            raise UserError(f"Unknown sampler '{sampler.name}'.{did_you_mean(sampler.name, SAMPLERS)}")
        if not 1 <= sampler.steps <= self.config.train_steps:
            raise UserError(f"sampler.steps={sampler.steps} must lie in 1..{self.config.train_steps}.")
        kind, options = SAMPLERS[sampler.name]
        scheduler = kind(**self._schedule, **options, prediction_type="sample")
        scheduler.set_timesteps(sampler.steps)
        return scheduler
