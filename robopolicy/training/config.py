"""What a training run is made of. The Hydra tree ``configs/`` fills these dataclasses; unknown keys are errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from robopolicy.errors import UserError


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule: linear warm-up, then cosine to zero at the last step.

    Attributes:
        name: adamw, or adamw8bit, whose moments take a quarter of the memory (bitsandbytes).
        lr: highest learning rate.
        betas: AdamW's moment decays.
        weight_decay: decoupled weight decay.
        eps: AdamW's epsilon.
        warmup_steps: steps of linear warm-up.
        clip_norm: largest norm of the gradient over all parameters.
    """

    name: Literal["adamw", "adamw8bit"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.95, 0.999)
    weight_decay: float = 1e-6
    eps: float = 1e-8
    warmup_steps: int = 500
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        _at_least(0, self, "train.optim", "lr", "weight_decay", "eps", "warmup_steps")
        if self.clip_norm <= 0:
            raise UserError(f"train.optim.clip_norm={self.clip_norm} must be above 0; a large one never clips.")


@dataclass(frozen=True)
class EmaConfig:
    """Exponential moving average of the weights: decay ``1 - (1 + step)^-power``, at most ``max_decay``."""

    power: float = 0.75
    max_decay: float = 0.9999


@dataclass(frozen=True)
class MixtureEntry:
    """One of several datasets.

    Attributes:
        path: dataset in the Zarr replay-buffer layout.
        weight: how often its windows are drawn, relative to the other datasets', whatever their sizes: equal weights
            give equal shares of every batch.
        instruction: replaces the instructions of its episodes; empty: theirs, or the dataset's name where an episode
            has none.
    """

    path: str
    weight: float = 1.0
    instruction: str = ""


@dataclass(frozen=True)
class DataConfig:
    """Which windows are trained on.

    Attributes:
        path: dataset in the Zarr replay-buffer layout.
        mixture: several datasets, instead of ``path``.
        normalize: several datasets are normalised each by its own ranges (``per_dataset``), which lets them differ in
            scale, or by the ranges of all together (``together``).
        val_ratio: share of episodes held out for the validation loss, of each dataset.
        max_train_episodes: use at most this many training episodes, of each dataset.
        seed: seed of the choice of episodes.
        memory_budget_mb: MiB that images may take in memory before they are streamed from disk; None: half of what is
            free.
        normalization: mode for each role: minmax, gaussian, quantile or identity.
    """

    path: str | None = None
    mixture: tuple[MixtureEntry, ...] = ()
    normalize: Literal["per_dataset", "together"] = "per_dataset"
    val_ratio: float = 0.02
    max_train_episodes: int | None = None
    seed: int = 42
    memory_budget_mb: int | None = None
    normalization: dict[str, str] = field(default_factory=lambda: {"state": "minmax", "action": "minmax"})

    def __post_init__(self) -> None:
        _at_least(0, self, "data", "val_ratio", "seed")
        _at_least(1, self, "data", "max_train_episodes", "memory_budget_mb")
        if self.val_ratio >= 1:
            raise UserError(f"data.val_ratio={self.val_ratio} must be below 1.")
        if (self.path is None) == (not self.mixture):
            found = "neither" if self.path is None else "both"
            raise UserError(
                f"Please give data.path=… or data.mixture=[…], found {found}. Several datasets: "
                "'data.mixture=[{path: a.zarr}, {path: b.zarr, weight: 2}]'."
            )

    @property
    def datasets(self) -> tuple[MixtureEntry, ...]:
        """The datasets: those of the mixture, or the one at `path`."""
        return self.mixture or (MixtureEntry(self.path or ""),)


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast, and what is written when.

    Attributes:
        steps: optimiser updates.
        batch_size: windows of one update, over all processes and accumulation steps.
        accumulate: micro-batches that one update is split into, to save memory.
        seed: seed of weights, order and noise.
        precision: fp32, or bf16 autocast.
        compile: compile the loss with torch.compile (needs a C++ compiler; slower than eager on the CPUs
            that we tried).
        device: auto, cpu, cuda, cuda:1 …
        threads: CPU threads of this process; None leaves torch's default.
        log_every: steps between rows of metrics.jsonl.
        validate_every: steps between validation losses.
        validation_windows: held-out windows that a validation uses.
        evaluate_every: steps between simulated evaluations; 0 only trains.
        checkpoint_every: steps between checkpoints to resume from.
        keep_best: bundles kept, ranked by evaluation score.
        tensorboard: write TensorBoard files.
        wandb: log to Weights & Biases.
        optim: optimiser.
        ema: averaged weights; they are what is validated, evaluated and deployed.
    """

    steps: int = 200_000
    batch_size: int = 64
    accumulate: int = 1
    seed: int = 42
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    device: str = "auto"
    threads: int | None = None
    log_every: int = 50
    validate_every: int = 2000
    validation_windows: int = 512
    evaluate_every: int = 0
    checkpoint_every: int = 2000
    keep_best: int = 3
    tensorboard: bool = True
    wandb: bool = False
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)

    def __post_init__(self) -> None:
        at_least_one = ("steps", "batch_size", "accumulate", "log_every", "validate_every", "validation_windows")
        _at_least(1, self, "train", *at_least_one, "checkpoint_every", "threads")
        _at_least(0, self, "train", "evaluate_every", "keep_best", "seed")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"train.batch_size={self.batch_size} must be a multiple of train.accumulate={self.accumulate}."
            )


def _at_least(least: float, config: object, where: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise UserError(f"{where}.{name}={value} must be at least {least}.")
