"""The list of other projects' environments: complete, cheap to register, clear when a project is missing."""

from __future__ import annotations

import subprocess
import sys

import gymnasium
import pytest

import robopolicy_sim  # noqa: F401  (registers the environments)
from robopolicy.data.record import record_demonstrations
from robopolicy.errors import UserError
from robopolicy.evaluation.environments import environment
from robopolicy.simulator import simulated_tasks
from robopolicy_sim.peers.catalogue import MT10, MT50, PEERS


def test_every_peer_has_a_short_name():
    tasks = simulated_tasks()
    assert len(MT50) == len(set(MT50)) == 50
    assert set(MT10) < set(MT50) < set(tasks)
    assert tasks["metaworld_peg_insert_side"] == "robopolicy_sim/MetaworldPegInsertSide-v0"
    assert {"aloha_insertion", "aloha_transfer_cube", "robosuite_lift", "robosuite_nut_assembly_square"} < set(tasks)
    assert {gymnasium.spec(f"robopolicy_sim/{peer.name}-v0").kwargs["task"] for peer in PEERS} >= {"reach", "Lift"}


def test_the_lists_are_those_of_metaworld():
    tasks = pytest.importorskip("metaworld.env_dict", reason="Meta-World is not installed")
    for ours, theirs in ((MT50, tasks.MT50_V3), (MT10, tasks.MT10_V3)):
        assert [f"metaworld_{name.removesuffix('-v3').replace('-', '_')}" for name in theirs] == list(ours)


def test_registering_imports_none_of_the_projects():
    code = "import sys, robopolicy_sim; print({'metaworld', 'gym_aloha', 'dm_control', 'robosuite'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("task", "module", "command"),
    [
        ("MetaworldReach", "metaworld.env_dict", "pip install --no-deps metaworld==3.1.1"),
        ("AlohaInsertion", "gym_aloha.constants", r"pip install 'robopolicy\[aloha\]'"),
        ("RobosuiteLift", "robosuite", "pip install --no-deps robosuite==1.5.2"),
    ],
)
def test_a_missing_project_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path, task, module, command):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(gymnasium.error.DependencyNotInstalled, match=command):
        gymnasium.make(f"robopolicy_sim/{task}-v0")
    with pytest.raises(UserError, match=command):
        record_demonstrations(f"robopolicy_sim/{task}-v0", tmp_path / "d.zarr", episodes=1, progress=False)
    with pytest.raises(UserError, match=command):
        environment(next(name for name, env_id in simulated_tasks().items() if f"/{task}-" in env_id))
