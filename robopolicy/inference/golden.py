"""Golden chunks: a few observations and noises with the chunks that the policy itself makes of them.

They lie beside every engine and are sampled again on the machine that loads it, on the backend that it will use: wrong
drivers, kernels or instruction sets show before the arm moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from robopolicy.errors import UserError
from robopolicy.inference.engine import EngineManifest
from robopolicy.spec import INSTRUCTION, TASK, PolicySpec

_OBSERVATION = "observation/"


def save_golden(
    path: Path, observations: Mapping[str, np.ndarray], sampling: Mapping[str, np.ndarray], scale: np.ndarray
) -> None:
    """Write golden chunks.

    Args:
        path: of the file.
        observations: inputs of the policy, (B, ...), physical units; ``task`` as an index.
        sampling: ``noise`` (B, N, H, A), ``previous`` (B, H, A) and ``mask`` (B, H), and the ``chunk`` (B, H, A), in
            physical units, that the policy makes of them.
        scale: (B, 1, A) range of each entry of the action in the training data.
    """
    tensors = {_OBSERVATION + key: value for key, value in observations.items()}
    tensors |= dict(sampling) | {"scale": scale}
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)


def check_golden(
    sample: Callable[..., np.ndarray],
    path: Path,
    engine: EngineManifest,
    spec: PolicySpec,
) -> None:
    """Sample the golden chunks again and compare.

    Raises:
        UserError: one is further off than the engine's tolerance, or the file cannot be read.
    """
    try:
        tensors = load_file(path)
        noise, previous, mask, chunk, scale = (tensors.pop(n) for n in ("noise", "previous", "mask", "chunk", "scale"))
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {error}. Build the engine again: {engine.command}") from error
    observations: dict[str, object] = {key.removeprefix(_OBSERVATION): value for key, value in tensors.items()}
    if spec.tasks:
        tasks = tensors[_OBSERVATION + TASK]
        observations[INSTRUCTION] = [spec.tasks[i].instruction for i in tasks.tolist()]
    found = sample(observations, noise, previous, mask)
    share = np.abs(found - chunk) / scale
    if not share.max() <= engine.parity.tolerance:  # also where it is not a number
        row, step, entry = np.unravel_index(np.nan_to_num(share, nan=np.inf).argmax(), share.shape)
        raise UserError(
            f"The engine {path.parent} does not compute on this machine what the policy does: golden chunk {row}, "
            f"action {step}, entry {entry} is {found[row, step, entry]:.6g}, wanted {chunk[row, step, entry]:.6g} "
            f"{spec.action.unit} (off by {100 * share.max():.2g} % of the entry's range, allowed "
            f"{100 * engine.parity.tolerance:.2g} %). Build it again here: {engine.command}"
        )
