"""Short names of simulated tasks, and the Gymnasium ids behind them. The simulator is an extra, imported only
when a simulated task is asked for; any package that registers Gymnasium environments under its own name works too."""

from __future__ import annotations

import importlib
import re
from typing import Any

from robopolicy.errors import UserError, did_you_mean, require_extra

NAMESPACE = "robopolicy_sim"


def registered_id(env_id: str) -> str:
    """Make sure that ``env_id`` is registered and return it.

    Gymnasium registers an environment when its package is imported; by convention the package has the name of the
    id's namespace, so an unknown namespace is imported.

    Raises:
        UserError: that package exists but cannot be imported.
    """
    gymnasium = require_extra("gymnasium", "sim")
    namespace, _, _ = env_id.rpartition("/")
    if namespace.isidentifier() and env_id not in gymnasium.registry:
        try:
            importlib.import_module(namespace)
        except ModuleNotFoundError as error:
            if error.name != namespace:
                raise UserError(f"{env_id}: the package '{namespace}' cannot be imported: {error}.") from error
    return env_id


def make_environment(env_id: str, /, **arguments: Any) -> Any:
    """Make a Gymnasium environment, without Gymnasium's checker.

    Args:
        env_id: a Gymnasium id.
        arguments: of ``gymnasium.make`` and of the environment.

    Raises:
        UserError: the id is unknown, or the environment refuses its arguments.
    """
    gymnasium = require_extra("gymnasium", "sim")
    try:
        return gymnasium.make(registered_id(env_id), disable_env_checker=True, **arguments)
    except (gymnasium.error.Error, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{env_id}: the environment cannot be made: {error}") from error


def simulated_tasks() -> dict[str, str]:
    """Gymnasium id by short name: ``push_puck`` is ``robopolicy_sim/PushPuck-v0``, the newest version.

    Raises:
        UserError: the simulator or MuJoCo is not installed.
    """
    require_extra(NAMESPACE, "sim")
    registry = require_extra("gymnasium", "sim").registry
    found = [spec for spec in registry.values() if spec.namespace == NAMESPACE]
    found.sort(key=lambda spec: spec.version or 0)
    return {_snake_case(spec.name): spec.id for spec in found}


def task_id(task: str) -> str:
    """The Gymnasium id of a short name; a full id passes.

    Raises:
        UserError: no such task, or the simulator is not installed.
    """
    if "/" in task or ":" in task:
        return task
    tasks = simulated_tasks()
    if task not in tasks:
        raise UserError(f"There is no simulated task '{task}'.{did_you_mean(task, tasks)}")
    return tasks[task]


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
