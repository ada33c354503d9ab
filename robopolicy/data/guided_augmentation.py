"""More demonstrations out of few: moved, replayed in the simulator, kept where they still succeed.

After Corrado et al., "Guided Data Augmentation for Offline Reinforcement Learning and Imitation Learning" (GuDA, 2023):
random augmentations of a demonstration mostly show bad behaviour; guided ones are restricted to those that look like an
expert, which a person can tell from the progress that they make. Here the person chooses the transforms and their
ranges (`Guidance`), and the simulator checks the progress: each moved demonstration is carried out from its moved
start, and only one that succeeds within half a second of the end of its actions is kept. GuDA augments segments; here
whole demonstrations are moved, so that success can be judged. What is stored is what the simulator observed, so
physics that is not symmetric (joint limits, walls) cannot enter the data wrongly.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from robopolicy.data.durable import check_free
from robopolicy.data.planar import PlanarLayout, PlanarTransform
from robopolicy.data.record import EnvironmentRecipe, Episode, array_specs
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError, did_you_mean

TRANSFORMS = ("rotate", "mirror", "shift", "pace")
_SETTLE_TIME = 0.5  # seconds for which the last action is held: a moved episode may need a step or two more
_START_TOLERANCE = 0.005  # of a start state that was asked for: metres, and entries of rotation matrices


@dataclass(frozen=True)
class Guidance:
    """What a person allows.

    Attributes:
        transforms: any of `TRANSFORMS`; all that are named are drawn together.
        centre: point (x, y) in metres about which scenes are rotated and mirrored, in the frame of the observations.
        max_angle: rotations are uniform in +- this, in radians.
        max_shift: shifts are uniform in +- this along x and y, in metres.
        max_pace: paces are log-uniform from 1 / this to this.
    """

    transforms: tuple[str, ...] = ("rotate", "mirror")
    centre: tuple[float, float] = (0.0, 0.0)
    max_angle: float = np.pi
    max_shift: float = 0.05
    max_pace: float = 1.25

    def __post_init__(self) -> None:
        for name in self.transforms:
            if name not in TRANSFORMS:
                raise UserError(f"--transforms: there is no '{name}'.{did_you_mean(name, TRANSFORMS)}")
        if not self.transforms:
            raise UserError(f"--transforms: name at least one of {', '.join(TRANSFORMS)}.")
        if not 0 <= self.max_angle <= np.pi or self.max_shift < 0 or self.max_pace < 1:
            raise UserError(
                f"Ranges: found {np.rad2deg(self.max_angle):g} degrees, shift {self.max_shift:g} m, pace "
                f"{self.max_pace:g}; wanted 0 to 180 degrees, a shift of at least 0 and a pace of at least 1."
            )

    def draw(self, rng: np.random.Generator) -> PlanarTransform:
        """Draw one transform; every entry is drawn, so that one seed gives the same angles for any set of names."""
        angle = rng.uniform(-self.max_angle, self.max_angle)
        mirror = bool(rng.random() < 0.5)
        x, y = rng.uniform(-self.max_shift, self.max_shift, 2).tolist()
        pace = float(self.max_pace ** rng.uniform(-1, 1))
        return PlanarTransform(
            angle=angle if "rotate" in self.transforms else 0.0,
            # Alone, half of the mirrored copies would be copies of the source.
            mirror="mirror" in self.transforms and (mirror or self.transforms == ("mirror",)),
            shift=(x, y) if "shift" in self.transforms else (0.0, 0.0),
            pace=pace if "pace" in self.transforms else 1.0,
            centre=self.centre,
        )


@dataclass(frozen=True)
class AugmentationReport:
    """Outcome.

    Attributes:
        path: the new dataset; None when nothing was kept.
        sources: demonstrations that were moved; failed ones in the dataset are not.
        reproduced: of them, those that succeed when replayed unchanged. When many do not, the dataset's actions are
            not what was executed (recorded with noise, other settings), and the copies fail for the same reason.
        impossible: copies whose start or actions are outside what the environment allows.
        failed: copies that did not succeed.
        kept: copies that were stored.
    """

    path: Path | None
    sources: int
    reproduced: int
    impossible: int
    failed: int
    kept: int

    @property
    def tried(self) -> int:
        return self.impossible + self.failed + self.kept


class _Impossible(Exception):
    """The environment does not allow a start or an action."""


@dataclass(frozen=True)
class _Replayer:
    """Plays moved demonstrations; ``start_key`` is the observation that an episode can be started from."""

    env: Any
    start_key: str
    start_layout: PlanarLayout
    action_layout: PlanarLayout

    @classmethod
    def of(cls, env: Any) -> _Replayer:
        keys, names = env.observation_space.spaces, env.unwrapped.metadata.get("names", {})
        start_key = "observation.environment_state" if "observation.environment_state" in keys else "observation.state"
        layouts = [PlanarLayout.of(names.get(key, ()), f"{env.spec.id}, {key}") for key in (start_key, "action")]
        return cls(env, start_key, *layouts)

    def play(self, source: Mapping[str, np.ndarray], transform: PlanarTransform, seed: int) -> Episode:
        """Replay a demonstration under a transform.

        Raises:
            _Impossible: the start or an action is outside what the environment allows.
        """
        env = self.env
        start = transform.move(source[self.start_key][0], self.start_layout)
        moved = transform.move(
            transform.repace(source["action"].astype(np.float64), self.action_layout), self.action_layout
        )
        actions = moved.astype(env.action_space.dtype)
        if not ((actions >= env.action_space.low) & (actions <= env.action_space.high)).all():
            raise _Impossible
        try:
            observation, _ = env.reset(seed=seed, options={self.start_key.removeprefix("observation."): start})
        except ValueError as error:
            raise _Impossible from error
        self._check_start(observation[self.start_key], start)
        settle = round(_SETTLE_TIME * env.metadata["render_fps"])
        steps: list[dict[str, Any]] = []
        info: Mapping[str, Any] = {}
        for action in (*actions, *[actions[-1]] * settle):
            step = {**observation, "action": action}
            observation, reward, terminated, truncated, info = env.step(action)
            steps.append({**step, "reward": np.float32(reward)})
            if terminated or truncated:
                break
        arrays = {name: np.stack([step[name] for step in steps]) for name in steps[0]}
        return Episode(arrays, getattr(env.unwrapped, "instruction", ""), bool(info["success"]), seed)

    def _check_start(self, observed: np.ndarray, wanted: np.ndarray) -> None:
        """A copy must start where it was asked to, or its actions belong to another scene."""
        wrong = np.flatnonzero(np.abs(observed - wanted) > _START_TOLERANCE)
        if len(wrong):
            names = self.env.unwrapped.metadata["names"][self.start_key]
            raise UserError(
                f"{self.env.spec.id}: reset(options=...) did not place {', '.join(names[i] for i in wrong)} as asked "
                f"(found {observed[wrong]}, wanted {wanted[wrong]}); this task cannot be augmented."
            )


def augment_demonstrations(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    env_id: str,
    guidance: Guidance,
    *,
    copies: int,
    seed: int = 0,
    progress: bool = True,
) -> AugmentationReport:
    """Write moved copies of a dataset's demonstrations to a new dataset of the same arrays (`merge` joins the two).

    All copies are judged without rendering first, then the kept ones are played once more with the source's cameras.
    The attribute ``episodes`` of the new dataset tells each episode's source and transform.

    Args:
        source: recorded in the environment ``env_id``, with absolute actions.
        out: the new dataset, a Zarr folder; not written when nothing is kept.
        guidance: which transforms to draw.
        copies: transforms drawn for each demonstration.
        seed: of the draws.
        progress: show a progress bar on standard error.

    Raises:
        UserError: the dataset does not fit the environment, or it is not known how its columns move in the plane.
    """
    out = Path(out)
    if copies < 1:
        raise UserError(f"--copies: found {copies}, wanted at least 1.")
    check_free(out)
    with EpisodeStore.open(source) as store:
        options = dict(store.schema.attributes.get("environment_options", {}))
        recipe = EnvironmentRecipe(env_id, options=json.dumps(options))
        chosen, report = _choose(store, recipe, guidance, copies, seed, progress)
        if chosen:
            attributes = {
                "source": "guided augmentation",
                "augmented": {"dataset": store.path.name, "fingerprint": store.fingerprint()},
                "env_id": env_id,
                "environment_options": options,
                "seed": seed,
                "guidance": asdict(guidance),
                "episodes": [{"source_episode": e, **transform.to_dict()} for e, transform in chosen],
            }
            cameras, image_size = _cameras(store)
            with_images = replace(recipe, cameras=cameras, image_size=image_size)
            _store(store, out, with_images, chosen, attributes, progress)
    return AugmentationReport(path=out if chosen else None, kept=len(chosen), **report)


Chosen = list[tuple[int, PlanarTransform]]


def _choose(
    store: EpisodeStore, recipe: EnvironmentRecipe, guidance: Guidance, copies: int, seed: int, progress: bool
) -> tuple[Chosen, dict[str, int]]:
    """Judge every copy without rendering; returns those to keep and the counts of the others."""
    sources = [i for i, success in enumerate(store.episode_success) if success is not False]
    counts = {"sources": len(sources), "reproduced": 0, "impossible": 0, "failed": 0}
    chosen: Chosen = []
    with closing(recipe.make()) as env:
        _check_fits(store, env)
        replayer = _Replayer.of(env)
        for episode in _bar(sources, "judging", progress):
            demonstration = store.episode(episode, (replayer.start_key, "action"))
            rng = np.random.default_rng((seed, episode))
            unchanged, *moved = [PlanarTransform(), *(guidance.draw(rng) for _ in range(copies))]
            counts["reproduced"] += _judge(replayer, demonstration, unchanged, _seed(store, episode)) == "kept"
            for transform in moved:
                verdict = _judge(replayer, demonstration, transform, _seed(store, episode))
                if verdict == "kept":
                    chosen.append((episode, transform))
                else:
                    counts[verdict] += 1
    return chosen, counts


def _judge(replayer: _Replayer, source: Mapping[str, np.ndarray], transform: PlanarTransform, seed: int) -> str:
    """``kept``, ``failed`` or ``impossible``."""
    try:
        return "kept" if replayer.play(source, transform, seed).success else "failed"
    except _Impossible:
        return "impossible"


def _store(
    store: EpisodeStore,
    out: Path,
    recipe: EnvironmentRecipe,
    chosen: Chosen,
    attributes: Mapping[str, Any],
    progress: bool,
) -> None:
    with closing(recipe.make()) as env:
        replayer = _Replayer.of(env)
        fps = float(env.metadata["render_fps"])
        with EpisodeStore.create(out, array_specs(env), fps=fps, attributes=attributes) as target:
            for episode, transform in _bar(chosen, "writing", progress):
                source = store.episode(episode, (replayer.start_key, "action"))
                played = replayer.play(source, transform, _seed(store, episode))
                if not played.success:
                    raise UserError(
                        f"{recipe.env_id}: an episode that succeeded failed when it was repeated. Copies can only be "
                        f"judged where the same seed and actions give the same episode. {out} is incomplete; delete it."
                    )
                target.append(played.arrays, task=played.task, success=played.success)


def _check_fits(store: EpisodeStore, env: Any) -> None:
    """The dataset's vectors must be those of the environment, column by column."""
    problems = []
    for wanted in array_specs(env):
        found = store.schema.arrays.get(wanted.name)
        if wanted.role == "reward":
            continue
        if found is None:
            problems.append(f"{wanted.name}: not in the dataset.")
        elif found.shape != wanted.shape or (found.names and wanted.names and found.names != wanted.names):
            problems.append(
                f"{wanted.name}: the dataset has {', '.join(found.columns)}; the environment has "
                f"{', '.join(wanted.columns)}."
            )
    if problems:
        raise UserError(f"{store.path} was not recorded in {env.spec.id}:\n  " + "\n  ".join(problems))


def _cameras(store: EpisodeStore) -> tuple[tuple[str, ...], int]:
    """Names and side of the dataset's images."""
    images = store.schema.of_role("image")
    names = tuple(spec.name.removeprefix("observation.image.") for spec in images)
    return names, (images[0].shape[0] if images else 96)


def _seed(store: EpisodeStore, episode: int) -> int:
    """What a start state leaves open (a puck's yaw, an arm's posture) stays as it was in the source."""
    seed = store.episode_seeds[episode]
    return episode if seed is None else seed


def _bar(items: Sequence[Any], text: str, progress: bool) -> Iterator[Any]:
    return iter(tqdm(items, unit="episode", desc=text, disable=not progress))
