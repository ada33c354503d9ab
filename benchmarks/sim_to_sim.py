"""Does matching make a simulation rank policies as the "real" robot does? The real robot is a simulation too.

The stand-in differs from the nominal simulation in what a real set-up differs in: soft, sluggish servos, latency,
friction, light, table, background. Matching sees of it only what one can record: expert episodes (commands, measured
states, first images) and one photograph of the empty bench. It then fits

* servo gains, friction and latency from the recordings (`robopolicy identify`),
* the light's strength from the arm's brightness in the first images,
* the background from the photograph.

All policies are judged on the same seeds in the real stand-in, in the nominal and in the matched simulation.

  python benchmarks/sim_to_sim.py --out runs/sim_to_sim --policies weak=runs/a/bundles/last strong=runs/b/bundles/last …
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from PIL import Image
from results import print_table
from scipy.optimize import minimize_scalar

import robopolicy_sim  # noqa: F401  selects the OpenGL backend before mujoco is imported
from robopolicy.cli.main import main as robopolicy
from robopolicy.data.record import record_demonstrations
from robopolicy.data.store import EpisodeStore
from robopolicy.evaluation.environments import environment
from robopolicy.evaluation.evaluate import evaluate
from robopolicy.evaluation.fidelity import fidelity
from robopolicy.evaluation.fidelity_report import write_fidelity
from robopolicy.evaluation.rates import rates_of_results
from robopolicy.evaluation.results import write_json
from robopolicy.policies.bundle import load_bundle
from robopolicy.simulator import task_id
from robopolicy_sim.matching.background import foreground_geoms, photograph

Options = dict[str, Any]
CAMERA = "front"
KEY = f"observation.image.{CAMERA}"
# Known on both sides: where the camera is (robopolicy identify-camera).
SHARED: Options = {"camera_poses": {CAMERA: {"fovy": 28}}}
# Hidden from everything below but `real_environment`.
HIDDEN: Options = {
    "variation": {
        "gain": 0.45,
        "damping": 1.6,
        "action_latency": 0.1,
        "friction": 0.8,
        "lighting": 0.6,
        "table_texture": "walnut",
        "background": "brick",
    }
}


def record_real(task: str, folder: Path, episodes: int, size: int) -> Path:
    """What a person records on the real robot: expert episodes with the camera's images."""
    path = folder / "real.zarr"
    if not path.exists():
        options = SHARED | HIDDEN
        # Without noise: what is stored must be what was commanded.
        record_demonstrations(
            task, path, episodes=episodes, seed=90_000, options=options, cameras=(CAMERA,), image_size=size,
            keep_failures=True,
        )  # fmt: skip
    return path


def take_photograph(task: str, path: Path, size: int) -> None:
    """One photograph of the real bench without robot and objects."""
    env = make(task, SHARED | HIDDEN)
    env.reset(seed=90_000)
    Image.fromarray(photograph(env.unwrapped, CAMERA, (size, size))).save(path)
    env.close()


def make(task: str, options: Mapping[str, Any], **rendering: Any) -> gymnasium.Env:
    return gymnasium.make(task, disable_env_checker=True, **options, **rendering)


def fit_light(task: str, real: Path, options: Options, size: int) -> float:
    """Strength of the light at which the simulated arm is as bright as the recorded one, in the first images."""
    with EpisodeStore.open(real) as store:
        starts = [store.bounds(i)[0] for i in range(8)]
        firsts = [store.read(KEY, start, start + 1)[0] for start in starts]
    measured = np.stack(firsts).astype(float)

    def error(light: float) -> float:
        variation = {**options.get("variation", {}), "lighting": float(light)}
        env = make(task, {**options, "variation": variation}, cameras=(CAMERA,), image_size=size)
        images = np.stack([env.reset(seed=seed)[0][KEY] for seed in range(8)]).astype(float)
        mask = arm_mask(env.unwrapped, size)
        env.close()
        return float(abs(images.mean(0)[mask].mean() - measured.mean(0)[mask].mean()))

    return float(minimize_scalar(error, bounds=(0.3, 2.0), method="bounded", options={"maxiter": 12}).x)


def arm_mask(scene: Any, size: int) -> np.ndarray:
    """Pixels (size, size) that show the arm at its start."""
    import mujoco

    renderer = mujoco.Renderer(scene.model, size, size)
    renderer.enable_segmentation_rendering()
    renderer.update_scene(scene.data, CAMERA)
    segmentation = renderer.render()
    renderer.close()
    arm = set(np.flatnonzero(foreground_geoms(scene.model))) - {
        geom for body in scene.objects for geom in np.flatnonzero(scene.model.geom_bodyid == scene.model.body(body).id)
    }
    is_geom = segmentation[..., 1] == int(mujoco.mjtObj.mjOBJ_GEOM)
    return is_geom & np.isin(segmentation[..., 0], sorted(arm))


def match(task: str, short: str, real: Path, folder: Path, size: int, steps: int) -> Options:
    """Options of the matched simulation, from recordings and the photograph alone."""
    parameters = folder / "robot.json"
    if not parameters.exists():
        words = [str(real), "--task", short, "--out", str(parameters), "--steps", str(steps), "--workers", "1"]
        assert robopolicy(["identify", *words]) == 0
    photo = folder / "photo.png"
    take_photograph(task, photo, 4 * size)
    options: Options = SHARED | {
        "robot_parameters": json.loads(parameters.read_text())["robot_parameters"],
        "background": {"photo": str(photo.resolve()), "camera": CAMERA},
    }
    light = fit_light(task, real, options, size)
    print(f"light: {light:.2f} of the nominal one")
    return {**options, "variation": {"lighting": light}}


def image_gap(task: str, options: Options, size: int) -> float:
    """Mean absolute difference, 0 to 255, of the camera's images from the real ones, at ten equal starts."""
    images = []
    for world in (SHARED | HIDDEN, options):
        env = make(task, world, cameras=(CAMERA,), image_size=size)
        images.append(np.stack([env.reset(seed=seed)[0][KEY] for seed in range(100_000, 100_010)]).astype(float))
        env.close()
    return float(np.abs(images[0] - images[1]).mean())


def judge(name: str, bundle: Path, world: str, options: Options, short: str, out: Path, episodes: int) -> None:
    folder = out / world / name
    if (folder / "summary.json").exists():
        return
    policy, _ = load_bundle(bundle)
    evaluate(policy, environment(short, options), episodes=episodes, out=folder, videos=0, batch_size=25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", required=True, metavar="NAME=BUNDLE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--task", default="lift", help="the task that the policies do")
    parser.add_argument("--motions", default="reach", help="the task that is recorded for matching: free motions")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--recordings", type=int, default=18)
    parser.add_argument("--identify-steps", type=int, default=400)
    parser.add_argument("--image-size", type=int, default=48)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    real = record_real(task_id(args.motions), args.out, args.recordings, args.image_size)
    matched = match(task_id(args.motions), args.motions, real, args.out, args.image_size, args.identify_steps)
    write_json(args.out / "matched.json", matched)
    worlds = {"real": SHARED | HIDDEN, "nominal": SHARED, "matched": matched}
    policies = dict(word.split("=", 1) for word in args.policies)
    for world, options in worlds.items():
        for name, bundle in policies.items():
            judge(name, Path(bundle), world, options, args.task, args.out, args.episodes)
    report(args.out, list(policies))
    gaps = [
        [world, f"{image_gap(task_id(args.task), worlds[world], args.image_size):.1f}"]
        for world in ("nominal", "matched")
    ]
    print_table("difference of the images from the real ones, of 255", ["simulation", "mean"], gaps)


def report(out: Path, names: Sequence[str]) -> None:
    rates = {
        world: rates_of_results([(name, out / world / name) for name in names])
        for world in ("real", "nominal", "matched")
    }
    rows = [[name, *(f"{rates[world].rates[i]:.2f}" for world in rates)] for i, name in enumerate(names)]
    print_table("success rate", ["policy", *rates], rows)
    rows = []
    for world in ("nominal", "matched"):
        found = fidelity(real=rates["real"], simulated=rates[world])
        write_fidelity(found, out / f"fidelity_{world}.html")
        gap = float(np.abs(np.subtract(rates["real"].rates, rates[world].rates)).mean())
        rows.append([world, *(f"{a.value:.3f}" for a in found.agreements), f"{gap:.3f}"])
    print_table("agreement with the real robot", ["simulation", *(a.name for a in found.agreements), "mean gap"], rows)


if __name__ == "__main__":
    main()
