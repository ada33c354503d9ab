"""The whole loop in a real window without a screen, and the verb of the command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pygame
import pytest

from robopolicy.cli import teleoperate
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError
from robopolicy.teleoperation.actions import action_adapter
from robopolicy.teleoperation.command import SessionKey
from robopolicy.teleoperation.live import make_playable, run, status_lines
from robopolicy.teleoperation.rate import RateKeeper
from robopolicy.teleoperation.session import Session, open_dataset
from robopolicy.teleoperation.window import RED, Line, View, Window

from .scripted import ScriptedOperator, expert_commands, press

SCENE = np.tile(np.uint8([[[10, 200, 30]]]), (60, 80, 1))
WRIST = np.tile(np.uint8([[[250, 10, 240]]]), (32, 32, 1))


def test_the_window_shows_scene_inset_and_text(window: Window) -> None:
    window.show(View(SCENE, WRIST, [Line("recording", RED)], [("Enter", "start")]))
    shown = pygame.surfarray.array3d(window.surface).swapaxes(0, 1)
    height, width = shown.shape[:2]
    np.testing.assert_array_equal(shown[height // 2, width // 2], SCENE[0, 0])
    np.testing.assert_array_equal(shown[round(0.15 * height), width - round(0.15 * height)], WRIST[0, 0])
    assert (shown[: height // 20, : width // 4] == RED).all(axis=-1).any()
    np.testing.assert_array_equal(shown[height // 2, 5], SCENE[0, 0])  # 4:3 fills the window


def test_an_image_of_another_shape_is_not_stretched(window: Window) -> None:
    window.show(View(SCENE[:, :30], None, [Line("a")], [("b", "c")]))
    shown = pygame.surfarray.array3d(window.surface).swapaxes(0, 1)
    assert not shown[360, 200].any()
    np.testing.assert_array_equal(shown[360, 480], SCENE[0, 0])


def test_a_missing_display_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "x11")
    monkeypatch.setenv("DISPLAY", ":99999")
    with pytest.raises(UserError, match="window cannot be opened.*have a display"):
        Window("test")


def test_an_operator_records_in_the_window(window: Window, tmp_path: Path) -> None:
    env = make_playable("robopolicy_sim/PushPuck-v0", time_limit=20, cameras=("top",), image_size=32)
    commands = expert_commands(env, 0)
    operator = ScriptedOperator([press(SessionKey.TOGGLE), *commands[:3], press(SessionKey.SUCCESS)])
    shown = []
    keeper = RateKeeper(200)
    with Session(env, open_dataset(tmp_path / "d.zarr", env), action_adapter(env)) as session:
        show = window.show
        window.show = lambda view: (shown.append(view), show(view))[1]  # type: ignore[method-assign]
        run(session, operator, window, env, keeper)
    assert [line.text for line in shown[1].lines][:2] == ["push the puck into the ring", "recording   step 2   0.0 s"]
    assert shown[1].scene.shape == (480, 640, 3)
    assert shown[1].inset is not None and shown[1].inset.shape == (32, 32, 3)
    assert (shown[0].scene != shown[3].scene).any()  # it moves
    assert shown[-1].lines[2].text.startswith("1 episodes stored, 1 in this session")
    with EpisodeStore.open(tmp_path / "d.zarr") as store:
        assert store.episode_lengths.tolist() == [4]
        assert store.read("observation.image.top").shape == (4, 32, 32, 3)
    env.close()


def test_the_overlay_says_when_the_rate_is_not_kept(push_puck: Any, tmp_path: Path) -> None:
    time = [0.0]
    keeper = RateKeeper(10, lambda: time[0], lambda seconds: None)
    with Session(push_puck, open_dataset(tmp_path / "d.zarr", push_puck), action_adapter(push_puck)) as session:
        for _ in range(5):
            time[0] += 0.25
            keeper.wait()
        assert Line("4.0 of 10 Hz: too slow, the arm lags", RED) in status_lines(session, keeper)


def command_line(*words: str) -> int:
    parser = argparse.ArgumentParser()
    teleoperate.add_parser(parser.add_subparsers())
    args = parser.parse_args(["teleoperate", *words])
    return int(args.run(args))


def test_the_verb_records_what_is_typed(window: Window, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def type_in(key: int, milliseconds: int) -> None:
        pygame.time.set_timer(pygame.event.Event(pygame.KEYDOWN, key=key), milliseconds, loops=1)

    path = tmp_path / "d.zarr"
    pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=pygame.K_RETURN))
    pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=pygame.K_w))
    type_in(pygame.K_y, 1500)
    assert command_line("--task", "push_puck", "--out", str(path), "--seed", "7", "--episodes", "1") == 0
    assert "1 episodes" in capsys.readouterr().out
    with EpisodeStore.open(path) as store:
        assert (store.episode_success, store.episode_seeds) == ([True], [7])
        assert store.schema.attributes["device"] == "keyboard"
        state = store.episode(0)["observation.state"]
        assert len(state) > 1
        moved = state[-1, :2] - state[0, :2]
        assert moved[1] > 0.005 > moved[0]  # away from the scene's camera, which looks along y and a little to -x


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--device", "gamepad"), "no gamepad that SDL knows"),
        (("--option", "control=ee_pose"), "environment cannot be made: .*control"),
        (("--seed", "-1"), "--seed must lie in 0 to 99999, found -1"),
        (("--seed", "100000"), "--seed must lie in 0 to 99999, found 100000"),
        (("--time-limit", "0"), "--time-limit must be positive, found 0"),
        (("--dead-zone", "1.5"), "dead_zone=1.5 must lie in 0 to 1"),
        (("--cameras", "rear"), "Camera 'rear' is not in the scene"),
    ],
)
def test_nothing_is_left_behind_by_a_mistake(
    window: Window, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        command_line("--task", "push_puck", "--out", str(tmp_path / "d.zarr"), *words)
    assert not (tmp_path / "d.zarr").exists()
