"""What a robot without torch must know of a policy's prefix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def prefix_steps(manifest: Mapping[str, Any]) -> int:
    """How many committed actions a bundle's policy can continue; 0: it was trained without a prefix.

    Args:
        manifest: of the bundle, from `robopolicy.manifest.read_manifest`.
    """
    return int(manifest["architecture"].get("config", {}).get("prefix_steps", 0))
