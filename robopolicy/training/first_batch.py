"""One picture of what the network sees in the first batch; most data mistakes show at a glance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

from robopolicy.data.augment import augment
from robopolicy.policies.base import Draws, Policy
from robopolicy.spec import PolicySpec

WINDOWS = 8


def draw_first_batch(policy: Policy, batch: Mapping[str, Tensor], draws: Draws, path: Path) -> None:
    """Write a PNG: for some windows, the augmented newest frame of each camera and the normalised vectors.

    Args:
        policy: its normalisers, and its augmentation if it has one.
        batch: a training batch in physical units, on the CPU.
        draws: the batch's randomness.
        path: file to write.
    """
    spec = policy.spec
    count = min(WINDOWS, len(batch[spec.action.key]))
    batch = {key: value[:count] for key, value in batch.items()}
    rows = len(spec.images) + 1 + bool(spec.states)
    figure, axes = plt.subplots(rows, count, figsize=(2.2 * count, 2.3 * rows), squeeze=False, layout="constrained")
    for row, key in enumerate(spec.images):
        seen = augment(batch[key.key], policy.augmentation, draws["augmentation"][:count])[:, -1].numpy()
        for column in range(count):
            axes[row, column].imshow(seen[column], interpolation="nearest")
            axes[row, column].set_axis_off()
        axes[row, 0].set_title(f"{key.key}\n{seen.shape[2]}x{seen.shape[1]} px", fontsize=8, loc="left")
    first = len(spec.images)
    if spec.states:
        _draw_states(axes[first], policy.normalized(batch), spec)
    action = policy.normalizer[spec.action.key].normalize(batch[spec.action.key], policy.domain(batch)).numpy()
    for column in range(count):
        axis = axes[-1, column]
        axis.plot(action[column], linewidth=1)
        axis.axvspan(spec.executed.start, spec.executed.stop - 1, alpha=0.12, color="tab:green", linewidth=0)
        _frame(axis)
    axes[-1, 0].set_title("action, normalised\n(green: executed)", fontsize=8, loc="left")
    figure.suptitle(f"first batch, windows 1 to {count}", fontsize=10)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _draw_states(axes: np.ndarray, seen: Mapping[str, Tensor], spec: PolicySpec) -> None:
    for column, axis in enumerate(axes):
        for key in spec.states:
            axis.plot(seen[key.key][column].numpy().T, marker="o", markersize=2, linewidth=0.8)
        _frame(axis)
        axis.set_xlabel("dimension", fontsize=7)
    names = ", ".join(k.key for k in spec.states)
    axes[0].set_title(f"{names}, normalised\n(one line per step)", fontsize=8, loc="left")


def _frame(axis: plt.Axes) -> None:
    bottom, top = axis.get_ylim()
    axis.set_ylim(min(bottom, -1.3), max(top, 1.3))
    axis.tick_params(labelsize=6)
    axis.grid(alpha=0.3)
