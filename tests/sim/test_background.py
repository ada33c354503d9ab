"""Visual matching: photograph behind the simulation, placed cameras, measured colours."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("robopolicy_sim")

from robopolicy_sim.matching.background import photograph  # noqa: E402
from robopolicy_sim.matching.camera import fit_camera, project  # noqa: E402

SIZE = 64
VIOLET = (140, 20, 160)


@pytest.fixture(scope="module")
def violet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A photograph in one colour that the simulation does not have."""
    path = tmp_path_factory.mktemp("photo") / "violet.png"
    Image.new("RGB", (SIZE, SIZE), VIOLET).save(path)
    return str(path)


def image(task: str = "PickPlace", seed: int = 0, **options) -> np.ndarray:
    env = gymnasium.make(
        f"robopolicy_sim/{task}-v0", disable_env_checker=True, cameras=("scene",), image_size=SIZE, **options
    )
    seen = env.reset(seed=seed)[0]["observation.image.scene"]
    env.close()
    return seen


def is_violet(seen: np.ndarray) -> np.ndarray:
    return (seen == VIOLET).all(axis=-1)


def is_red(seen: np.ndarray) -> np.ndarray:
    """Where the cube is."""
    red, green, blue = np.moveaxis(seen.astype(int), -1, 0)
    return (red > 60) & (red > 3 * green) & (red > 3 * blue)


def test_robot_and_objects_stand_before_the_photograph(violet: str) -> None:
    plain, matched = image(), image(background={"photo": violet})
    behind = is_violet(matched)
    np.testing.assert_array_equal(matched[~behind], plain[~behind])
    assert is_red(plain).sum() > 3
    assert not behind[is_red(plain)].any()
    assert 0.6 < behind.mean() < 0.95


def test_names_to_keep_and_to_overlay_move_the_border(violet: str) -> None:
    def behind(**background):
        return is_violet(image(background={"photo": violet, **background}))

    usual, with_bench = behind(), behind(keep=["bench"])
    only_robot, without_cube = behind(mode="background+object"), behind(overlay=["cube"])
    assert usual.sum() > with_bench.sum() + 500  # most of the image is bench
    assert only_robot.sum() > without_cube.sum() > usual.sum()
    assert behind(mode="background+object", keep=["cube", "bin"]).sum() == usual.sum()


def test_a_photograph_of_the_same_scene_gives_back_the_scene(tmp_path: Path) -> None:
    env = gymnasium.make("robopolicy_sim/PickPlace-v0", disable_env_checker=True)
    env.reset(seed=0)
    before = env.unwrapped.model.geom_group.copy()
    photo = photograph(env.unwrapped, "scene", (SIZE, SIZE))
    np.testing.assert_array_equal(env.unwrapped.model.geom_group, before)
    env.unwrapped.close()
    Image.fromarray(photo).save(tmp_path / "photo.png")
    matched, real = image(background={"photo": str(tmp_path / "photo.png")}), image(render_quality="shadows")
    difference = np.abs(matched.astype(int) - real).mean(axis=-1)
    assert np.median(difference) < 2
    assert np.mean(difference > 25) < 0.2  # the shadows of arm and objects, which a photograph without them lacks
    empty = image("Reach", background={"photo": str(tmp_path / "photo.png"), "overlay": ["base"]})
    assert np.mean(np.abs(empty.astype(int) - photo) > 0) < 0.2  # what Reach has on the bench


def test_debug_blends_half_and_half(violet: str) -> None:
    plain, blend = image(), image(background={"photo": violet, "mode": "debug"})
    np.testing.assert_allclose(blend, (plain + np.array(VIOLET, float)) / 2, atol=0.51)


def test_soft_edges_change_pixels_at_the_border_only(violet: str) -> None:
    sharp, soft = image(background={"photo": violet}), image(background={"photo": violet, "soft_edge": 0.7})
    changed = (sharp != soft).any(axis=-1)
    edges = np.zeros_like(changed)
    behind = is_violet(sharp)
    edges[1:] |= behind[1:] != behind[:-1]
    edges[:, 1:] |= behind[:, 1:] != behind[:, :-1]
    grown = np.pad(edges, 4)
    near = np.any([np.roll(grown, (i, j), (0, 1)) for i in range(-4, 5) for j in range(-4, 5)], axis=0)[4:-4, 4:-4]
    assert changed.sum() > 50
    assert not (changed & ~near).any()


def test_other_cameras_and_videos_of_another_shape_stay_simulation(violet: str) -> None:
    options = {"disable_env_checker": True, "cameras": ("scene", "front", "wrist"), "image_size": SIZE}
    env = gymnasium.make(
        "robopolicy_sim/Lift-v0",
        background={"photo": violet},
        render_mode="rgb_array",
        render_size=(48, 64),
        **options,
    )
    seen, _ = env.reset(seed=0)
    assert is_violet(seen["observation.image.scene"]).any()
    for camera in ("front", "wrist"):
        assert not is_violet(seen[f"observation.image.{camera}"]).any()
    assert not is_violet(env.render()).any()
    env.close()


def test_a_photograph_is_resized_only_to_its_own_shape(tmp_path: Path) -> None:
    Image.new("RGB", (2 * SIZE, 2 * SIZE), VIOLET).save(tmp_path / "large.png")
    assert is_violet(image(background={"photo": str(tmp_path / "large.png")})).mean() > 0.5
    Image.new("RGB", (100, 80), VIOLET).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match=r"wide\.png: the photograph has 100 x 80 pixels.*'scene' 64 x 64\. Crop it"):
        image(background={"photo": str(tmp_path / "wide.png")})


@pytest.mark.parametrize(
    ("background", "message"),
    [
        ({}, "photo is None, wanted the path"),
        ({"photo": "nowhere.png"}, "nowhere.png: the photograph cannot be read"),
        ({"photo": __file__}, "test_background.py: the photograph cannot be read"),
        ({"photo": "VIOLET", "camera": "wrist"}, "camera 'wrist' moves .*choose a fixed camera"),
        ({"photo": "VIOLET", "camera": "side"}, "no camera 'side'; the scene has scene, front, wrist"),
        ({"photo": "VIOLET", "mode": "blend"}, "mode 'blend' is unknown; choose one of background, "),
        ({"photo": "VIOLET", "keep": ["cupboard"]}, "'cupboard' is neither a body nor a geom"),
        ({"photo": "VIOLET", "keep": "bench"}, "wanted a list of names"),
        ({"photo": "VIOLET", "softness": 1}, "'softness' is unknown"),
    ],
)
def test_impossible_backgrounds_are_refused(background: dict, message: str, violet: str) -> None:
    if background.get("photo") == "VIOLET":
        background = background | {"photo": violet}
    with pytest.raises(ValueError, match=message):
        gymnasium.make("robopolicy_sim/Lift-v0", disable_env_checker=True, background=background)


def viewed(camera: str = "scene", **options):
    """Position in the base frame, rotation and field of view of a camera."""
    env = gymnasium.make("robopolicy_sim/Lift-v0", disable_env_checker=True, **options).unwrapped
    env.reset(seed=0)
    pose, fovy = env.data.camera(camera), float(env.model.camera(camera).fovy[0])
    return pose.xpos - env.base_position, pose.xmat.reshape(3, 3).copy(), fovy


@pytest.mark.parametrize("height", [0.0, 0.3])
def test_a_camera_is_found_from_points_and_placed(height: float) -> None:
    position, rotation, fovy = viewed(
        camera_poses={"scene": {"pos": [1.0, -0.7, 0.8], "xyaxes": [0.6, 0.8, 0, -0.4, 0.3, 0.7], "fovy": 50}}
    )
    np.testing.assert_allclose(position, [1.0, -0.7, 0.8], atol=1e-9)
    assert fovy == 50
    # points on the table alone do as well as points at different heights
    points = np.random.default_rng(0).uniform([0.2, -0.3, 0], [0.8, 0.3, height], (8, 3))
    fit = fit_camera(points, project(points, position, rotation, fovy, (480, 640)), (480, 640))
    np.testing.assert_allclose(fit.position, position, atol=1e-6)
    np.testing.assert_allclose(fit.rotation, rotation, atol=1e-6)
    assert fit.fovy == pytest.approx(50, abs=1e-5)
    assert fit.error < 1e-6
    placed = viewed(camera_poses={"scene": fit.to_json()})
    np.testing.assert_allclose(placed[0], position, atol=1e-4)
    np.testing.assert_allclose(placed[1], rotation, atol=1e-4)


def test_a_projected_point_is_where_the_renderer_draws_it() -> None:
    env = gymnasium.make("robopolicy_sim/Lift-v0", disable_env_checker=True, cameras=("scene",), image_size=200)
    rows, columns = np.nonzero(is_red(env.reset(seed=0)[0]["observation.image.scene"]))
    cube = env.unwrapped.position("cube") - env.unwrapped.base_position
    position, rotation, fovy = viewed()
    (pixel,) = project(cube[None], position, rotation, fovy, (200, 200))
    np.testing.assert_allclose(pixel, [columns.mean() + 0.5, rows.mean() + 0.5], atol=1.5)
    env.close()


def test_noisy_points_tell_how_well_the_camera_fits() -> None:
    position, rotation, fovy = viewed()
    rng = np.random.default_rng(1)
    points = rng.uniform([0.2, -0.3, 0], [0.8, 0.3, 0.3], (20, 3))
    pixels = project(points, position, rotation, fovy, (480, 640)) + rng.normal(0, 0.5, (20, 2))
    fit = fit_camera(points, pixels, (480, 640))
    assert 0.3 < fit.error < 1.0
    np.testing.assert_allclose(fit.position, position, atol=0.03)


def test_points_that_tell_too_little_are_refused() -> None:
    points = np.linspace([0.3, 0, 0], [0.6, 0.1, 0], 8)
    with pytest.raises(ValueError, match="at least 6 points"):
        fit_camera(points[:5], np.zeros((5, 2)), (480, 640))
    position, rotation, fovy = viewed()
    with pytest.raises(ValueError, match="do not determine the camera"):
        fit_camera(points, project(points, position, rotation, fovy, (480, 640)), (480, 640))


def test_bodies_and_geoms_take_measured_colours() -> None:
    green = image("Lift", colours={"cube": [0.0, 0.6, 0.0], "table_top": [0.2, 0.2, 0.9]}).astype(int)
    plain = image("Lift").astype(int)
    cube = is_red(plain)
    assert cube.sum() > 3
    assert (green[cube][:, 1] > 2 * green[cube][:, 0]).mean() > 0.8
    wood = (plain[..., 0] > plain[..., 2] + 40) & ~cube
    assert wood.mean() > 0.15
    assert (green[wood][:, 2] > 1.5 * green[wood][:, 0]).mean() > 0.9
    with pytest.raises(ValueError, match="wanted red, green, blue in 0 .. 1"):
        image("Lift", colours={"cube": [200, 30, 30]})


@pytest.mark.parametrize(
    ("poses", "message"),
    [
        ({"side": {}}, "no camera 'side'"),
        ({"wrist": {"fovy": 50}}, "'wrist' moves|only fixed cameras"),
        ({"scene": {"position": [0, 0, 0]}}, "'position'; it has pos, xyaxes, fovy"),
        ({"scene": {"pos": [0, 0]}}, "wanted 3 finite numbers"),
        ({"scene": {"xyaxes": [1, 0, 0, 2, 0, 0]}}, "zero or parallel"),
        ({"scene": {"fovy": 0}}, "wanted degrees between 0 and 180"),
    ],
)
def test_impossible_camera_poses_are_refused(poses: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gymnasium.make("robopolicy_sim/Lift-v0", disable_env_checker=True, camera_poses=poses)
