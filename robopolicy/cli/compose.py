"""Hydra configurations from the command line, with errors that say what was meant."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra import main as hydra_main
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import robopolicy
from robopolicy.errors import UserError, did_you_mean


def config_folder() -> Path:
    """The Hydra tree: inside the installed package, or beside it in a source checkout."""
    package = Path(robopolicy.__file__).parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def compose_config(name: str, overrides: Sequence[str], config_dir: Path | None = None) -> dict[str, Any]:
    """Compose a configuration.

    Args:
        name: the primary configuration, e.g. ``train``.
        overrides: Hydra overrides, e.g. ``task=pusht_image``, ``train.steps=500``.
        config_dir: the user's own tree, searched too.

    Returns:
        Plain values, interpolations resolved.

    Raises:
        UserError: an unknown key or group option (with a did-you-mean), a bad value, a value that must be given, or
            ``config_dir`` is no folder.
    """
    if config_dir is not None and not config_dir.is_dir():
        raise UserError(f"--config-dir {config_dir} is no folder; wanted one with task/, policy/ or train/ YAML files.")
    extra = [f"hydra.searchpath=[file://{config_dir.resolve()}]"] if config_dir else []
    parsed = _parse(overrides)
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        try:
            config = compose(name, [*extra, *overrides])
        except MissingConfigException as error:
            raise UserError(_unknown_option(parsed, config_dir, error)) from error
        except (ConfigCompositionException, HydraException, OmegaConfBaseException) as error:
            raise UserError(_unknown_key(name, parsed, extra, error)) from error
    return resolve(config)


def compose_with_texts(name: str, overrides: Sequence[str], keys: Sequence[str]) -> dict[str, Any]:
    """`compose_config`, where some entries are plain text, whose commas and signs Hydra would read as its own.

    Args:
        keys: of these entries, on the first level.
    """
    texts: dict[str, str | None] = {}
    for override in overrides:
        key, given, text = override.partition("=")
        if given and key in keys:
            quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
            texts[key] = text[1:-1] if quoted else None if text in ("", "null") else text
    others = [override for override in overrides if override.partition("=")[0] not in texts]
    return compose_config(name, others) | texts


def resolve(config: DictConfig) -> dict[str, Any]:
    """Plain values of a configuration.

    Raises:
        UserError: an entry that must be given is missing, or an interpolation fails.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise UserError(f"Please give {', '.join(f'{key}=…' for key in missing)} on the command line.")
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"The configuration cannot be resolved: {error}") from error
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items()}


def override_plain(plain: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply ``key=value`` overrides to a stored configuration.

    Raises:
        UserError: an unknown key.
    """
    config = OmegaConf.create(plain)
    known = _dotted(plain)
    for override in _parse(overrides):
        if override.key_or_group not in known:
            raise UserError(f"Unknown key '{override.key_or_group}'.{did_you_mean(override.key_or_group, known)}")
        OmegaConf.update(config, override.key_or_group, override.value())
    return resolve(config)


def multirun(
    name: str, overrides: Sequence[str], run: Callable[[dict[str, Any]], None], config_dir: Path | None = None
) -> None:
    """Run every combination of comma-separated overrides through Hydra's sweeper and launcher."""

    def job(config: DictConfig) -> None:
        try:
            run(resolve(config))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)  # raised, it would get Hydra's traceback and exit code 1
            sys.exit(2)

    # Typos end here, before any job. What Hydra knows only inside a job cannot be resolved yet.
    compose_config(
        name, [_first_choice(o) for o in _parse(overrides) if "${hydra:" not in str(o.input_line)], config_dir
    )
    own = ["--config-dir", str(config_dir.resolve())] if config_dir else []
    sys.argv = [sys.argv[0], "--multirun", *own, *overrides]
    hydra_main(version_base="1.3", config_path=str(config_folder()), config_name=name)(job)()


def _parse(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for override in overrides:
        try:
            parsed.append(parser.parse_override(override))
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"Cannot read '{override}' ({reason}). Write key=value, e.g. train.steps=500; quote values with "
                "special characters: 'data.path=\"my demos.zarr\"'."
            ) from error
    return parsed


def sweep_name(overrides: Sequence[str]) -> str:
    """Name of a sweep's job by what differs between jobs, e.g. ``train.seed-1``, as Hydra interpolations."""
    groups = {folder.name for folder in config_folder().iterdir() if folder.is_dir()}
    keys = [o.key_or_group for o in _parse(overrides) if o.is_sweep_override()]
    if not keys:
        raise UserError("A sweep needs a key with several values, e.g. train.seed=1,2,3.")
    values = [f"hydra:runtime.choices.{key}" if key in groups else key for key in keys]
    return "_".join(f"{key}-${{{value}}}" for key, value in zip(keys, values, strict=True))


def _first_choice(override: Override) -> str:
    if override.is_sweep_override():
        return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
    return str(override.input_line)


def _unknown_option(overrides: list[Override], config_dir: Path | None, error: MissingConfigException) -> str:
    folders = [config_folder(), *([config_dir] if config_dir else [])]
    for override in overrides:
        options = {file.stem for folder in folders for file in (folder / override.key_or_group).glob("*.yaml")}
        if options and override.value() not in options:
            hint, known = did_you_mean(str(override.value()), options), f" Known: {', '.join(sorted(options))}."
            return f"There is no {override.key_or_group} '{override.value()}'.{hint.removesuffix(known)}{known}"
    return str(error)


def _unknown_key(name: str, overrides: list[Override], extra: list[str], error: Exception) -> str:
    groups = {folder.name for folder in config_folder().iterdir() if folder.is_dir()}
    chosen = [o.input_line for o in overrides if o.key_or_group in groups and o.input_line]
    known = _dotted(OmegaConf.to_container(compose(name, [*extra, *chosen])))
    for override in overrides:
        key = override.key_or_group
        if key not in known and key not in groups and not override.is_add() and not key.startswith("hydra"):
            return f"Unknown key '{key}'.{did_you_mean(key, known | groups)}"
    return str(error).splitlines()[0]


def _dotted(plain: Any, prefix: str = "") -> set[str]:
    """All keys of nested mappings, as Hydra writes them."""
    names: set[str] = set()
    for key, value in plain.items():
        names.add(prefix + str(key))
        if isinstance(value, dict):
            names |= _dotted(value, f"{prefix}{key}.")
    return names
