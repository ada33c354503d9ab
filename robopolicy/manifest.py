"""Reading ``bundle.yaml``, without torch: what a bundle holds, and whether its files are whole."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from robopolicy.errors import UserError

Kind = Literal["policy", "critic", "dynamics"]
FORMAT_VERSION = 2  # 1: the encoder concatenated its features in another order
WEIGHTS = ("model.safetensors", "normalizer.safetensors")
_ENTRIES = ("format_version", "kind", "architecture", "spec", "task", "provenance", "files")
_VERB = {"policy": "train", "critic": "train-critic", "dynamics": "train-dynamics"}


def read_manifest(path: Path, kind: Kind | None = "policy", verify: bool = True) -> dict[str, Any]:
    """Read and check ``bundle.yaml``, also for its kind unless that is None.

    Args:
        path: of the bundle.
        kind: that is wanted.
        verify: compare the files that it lists with their checksums, too.

    Raises:
        UserError: not a bundle, one of another kind or format version, missing or damaged files.
    """
    path = Path(path)
    file = path / "bundle.yaml"
    if not file.is_file():
        found = sorted(p.name for p in path.iterdir()) if path.is_dir() else "nothing"
        raise UserError(
            f"{path} is not a bundle: there is no bundle.yaml, found {found}. A run's bundles lie in RUN/bundles/."
        )
    try:
        manifest = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(manifest, dict):
        raise UserError(f"{file} is damaged: expected a mapping, found {type(manifest).__name__}.")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{file} has format_version {manifest.get('format_version')!r}, this version of robopolicy reads "
            f"{FORMAT_VERSION}. Train it again, or use the version that wrote it."
        )
    for entry in _ENTRIES:
        if entry not in manifest:
            raise UserError(f"{file}: the entry '{entry}' is missing.")
    if kind is not None and manifest["kind"] != kind:
        raise UserError(f"{file} holds a '{manifest['kind']}', wanted a {kind}: what robopolicy {_VERB[kind]} writes.")
    for entry in _ENTRIES[2:]:
        if not isinstance(manifest[entry], dict):
            raise UserError(f"{file}: '{entry}' is damaged: expected a mapping, found {manifest[entry]!r}.")
    for name in WEIGHTS:
        if name not in manifest["files"]:
            raise UserError(f"{file}: 'files' lacks the checksum of '{name}'.")
    for name in manifest["files"]:
        if Path(name).name != name:
            raise UserError(f"{file}: the file name '{name}' points outside the bundle.")
    for name, wanted in manifest["files"].items():
        if not (path / name).is_file():
            raise UserError(f"{path} is incomplete: '{name}' is missing. Copy the bundle again.")
        found = file_sha256(path / name) if verify else wanted
        if found != wanted:
            raise UserError(
                f"{path / name} is truncated or changed: its SHA-256 is {found[:12]}…, bundle.yaml says "
                f"{str(wanted)[:12]}…. Copy the bundle again."
            )
    return manifest


def bundle_fingerprint(manifest: Mapping[str, Any]) -> str:
    """Identity of a bundle: a hash over architecture, spec and weights."""
    parts = yaml.safe_dump({k: manifest[k] for k in ("architecture", "spec", "files")}, sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
