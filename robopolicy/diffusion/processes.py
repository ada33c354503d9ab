"""The noise processes by name; a new one is one line here."""

from __future__ import annotations

from robopolicy.diffusion.ddpm import DdpmConfig, DdpmProcess
from robopolicy.diffusion.edm import EdmConfig, EdmProcess
from robopolicy.diffusion.flow import FlowConfig, FlowProcess
from robopolicy.diffusion.process import Process

ProcessConfig = DdpmConfig | EdmConfig | FlowConfig


def build_process(config: ProcessConfig) -> Process:
    """The noise process that a configuration describes."""
    if isinstance(config, EdmConfig):
        return EdmProcess(config)
    if isinstance(config, FlowConfig):
        return FlowProcess(config)
    return DdpmProcess(config)
