"""Bundles: a folder with everything that later steps need of a trained model.

``bundle.yaml`` (format version, kind, architecture, spec, task, provenance, checksums) and safetensors files. The kinds
are ``policy``, ``critic`` and ``dynamics``; each is written and rebuilt by its own package. Reading executes no code
from the files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from robopolicy.data.durable import sync_path
from robopolicy.errors import UserError
from robopolicy.manifest import FORMAT_VERSION, Kind, file_sha256


def write_bundle(
    model: nn.Module,
    path: Path,
    kind: Kind,
    *,
    architecture: Mapping[str, Any],
    spec: Mapping[str, Any],
    task: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model; an existing bundle at ``path`` is replaced only once the new one is complete.

    Args:
        model: with the weights to deploy; those under its attribute ``normalizer`` get a file of their own.
        path: folder of the bundle.
        kind: what it is.
        architecture: ``name`` and ``config``, plain values from which the model is built again.
        spec: keys, shapes, units and horizons, plain values.
        task: plain values that evaluation needs: the task's name, environment, episode length.
        provenance: plain values: dataset fingerprint, commit, seed, step, metrics.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    split: dict[str, dict[str, torch.Tensor]] = {"model": {}, "normalizer": {}}
    for name, value in model.state_dict().items():
        group, _, rest = name.partition(".")
        tensor = value.detach().cpu().contiguous()
        if group == "normalizer":
            split["normalizer"][rest] = tensor
        else:
            split["model"][name] = tensor
    for name, tensors in split.items():
        save_file(tensors, partial / f"{name}.safetensors")
    content = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "architecture": _plain(dict(architecture)),
        "spec": _plain(dict(spec)),
        "task": _plain(dict(task or {})),
        "provenance": _plain(dict(provenance or {})),
        "files": {f"{name}.safetensors": file_sha256(partial / f"{name}.safetensors") for name in split},
    }
    (partial / "bundle.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    for written in (*partial.iterdir(), partial):
        sync_path(written)
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(partial, path)
    sync_path(path.parent)
    shutil.rmtree(old, ignore_errors=True)
    return path


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill a model, built as its manifest says, with the weights of the bundle at ``path``.

    Raises:
        UserError: the weights cannot be read or do not fit.
    """
    try:
        state = load_file(path / "model.safetensors")
        state |= {f"normalizer.{k}": v for k, v in load_file(path / "normalizer.safetensors").items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"The weights in {path} cannot be read: {error}") from error
    _check_shapes(state, model, path)
    model.load_state_dict(state)


def _check_shapes(found: Mapping[str, torch.Tensor], model: nn.Module, path: Path) -> None:
    wanted = model.state_dict()
    for name in sorted(found.keys() | wanted.keys()):
        a, b = (tuple(side[name].shape) if name in side else "nothing" for side in (found, wanted))
        if a != b:
            raise UserError(
                f"The weights in {path} do not fit its architecture: '{name}' holds {a}, wanted {b}. "
                "Was bundle.yaml edited, or the bundle written by another version of robopolicy?"
            )


def _plain(value: Any) -> Any:
    """Tuples to lists: YAML keeps only plain values."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
