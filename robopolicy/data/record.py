"""Recording demonstrations of a scripted expert in any Gymnasium environment that offers one.

Seeds: episode ``i`` of a recording with seed ``s`` starts from ``env.reset(seed=s + i)``, whatever the number of
workers. Evaluation uses seeds from `EVALUATION_SEEDS_FROM` on, and recording refuses them, so that a policy is never
judged on a start that it has been shown.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore
from robopolicy.errors import UserError, require_extra
from robopolicy.simulator import make_environment

log = logging.getLogger(__name__)

EVALUATION_SEEDS_FROM = 100_000
_NOISE_TIME_CONSTANT = 0.5  # seconds; white noise would be filtered away by the robot


@dataclass(frozen=True)
class RecordReport:
    """Outcome of a recording.

    Attributes:
        path: the dataset.
        attempted: episodes that were played.
        succeeded: those of them in which the expert succeeded.
        stored: episodes that were written by this recording.
        steps: steps that were written by this recording.
        episodes_in_dataset: episodes in the dataset now.
    """

    path: Path
    attempted: int
    succeeded: int
    stored: int
    steps: int
    episodes_in_dataset: int


@dataclass(frozen=True)
class EnvironmentRecipe:
    """Everything a worker needs to build the environment.

    Attributes:
        env_id: Gymnasium id.
        cameras, image_size: images to observe; not passed when there are none.
        options: further arguments of the environment, as JSON.
    """

    env_id: str
    cameras: tuple[str, ...] = ()
    image_size: int = 96
    options: str = "{}"

    def make(self) -> Any:
        """Make the Gymnasium environment.

        Raises:
            UserError: the id is unknown, the environment refuses its arguments or has no scripted expert.
        """
        images = {"cameras": self.cameras, "image_size": self.image_size} if self.cameras else {}
        env = make_environment(self.env_id, **(images | json.loads(self.options)))
        if not hasattr(env.unwrapped, "make_expert"):
            env.close()
            raise UserError(
                f"{self.env_id}: the environment has no scripted expert (no make_expert(seed)), so it cannot be "
                "recorded this way. Choose another task or import recorded demonstrations."
            )
        return env


@dataclass(frozen=True)
class Manner:
    """How the expert shall play.

    Attributes:
        noise: see `record_demonstrations`.
        qualities, modes: names with their shares, as pairs; empty leaves the choice to the expert.
    """

    noise: float = 0.0
    qualities: tuple[tuple[str, float], ...] = ()
    modes: tuple[tuple[str, float], ...] = ()

    def choices(self, seed: int) -> dict[str, str]:
        """Quality and mode of the episode with this seed, as arguments of ``make_expert``."""
        rng = np.random.default_rng((seed, 4))  # a stream of its own
        return {
            name: str(rng.choice([key for key, _ in shares], p=np.array([share for _, share in shares])))
            for name, shares in (("quality", self.qualities), ("mode", self.modes))
            if shares
        }


@dataclass(frozen=True)
class Episode:
    """One played episode: arrays by name, each ``(T, ...)``, and how it ended."""

    arrays: Mapping[str, np.ndarray]
    task: str
    success: bool
    seed: int
    behaviour: str = ""


def record_demonstrations(
    env_id: str,
    path: str | os.PathLike[str],
    *,
    episodes: int,
    seed: int = 0,
    workers: int = 1,
    cameras: Sequence[str] = (),
    image_size: int = 96,
    options: Mapping[str, Any] | None = None,
    noise: float = 0.0,
    qualities: Mapping[str, float] | None = None,
    modes: Mapping[str, float] | None = None,
    keep_failures: bool = False,
    append: bool = False,
    progress: bool = True,
) -> RecordReport:
    """Play episodes with the environment's scripted expert and write them to a dataset.

    Per step are stored the observation before the action under the environment's keys, the expert's ``action``, and
    the ``reward`` that followed. With noise the environment executes the expert's action plus a disturbance while the
    clean action is stored, so that the data show how to recover (DART, Laskey et al., CoRL 2017).

    Args:
        env_id: Gymnasium id, e.g. ``robopolicy_sim/PushPuck-v0``.
        path: the dataset, a Zarr folder.
        episodes: number of episodes to play; the stored ones are fewer when the expert fails.
        seed: episode ``i`` uses ``seed + i``.
        workers: processes that play; the dataset does not depend on it.
        cameras, image_size: images to record, passed to the environment.
        options: further arguments of the environment, JSON values, e.g. ``{"control": "joint_position"}``.
        noise: standard deviation of the disturbance as a share of half the action range, per action entry.
        qualities: shares of the expert's qualities, e.g. ``{"good": 0.7, "sloppy": 0.3}``; by default it is good.
        modes: shares of the ways to do the task, e.g. ``{"left": 0.8, "right": 0.2}``; by default the seed decides.
        keep_failures: store failed episodes too, marked as such.
        append: add to an existing dataset.
        progress: show a progress bar on standard error.

    Raises:
        UserError: the dataset exists, the environment cannot be recorded, or the arguments do not fit.
    """
    path = Path(path)
    _check_arguments(episodes, seed, workers, noise)
    if "failing" in (qualities or {}) and not keep_failures:
        raise UserError("Episodes of the quality 'failing' would all be left out; add --keep-failures.")
    manner = Manner(noise, _shares("quality", qualities or {}), _shares("mode", modes or {}))
    recipe = EnvironmentRecipe(env_id, tuple(cameras), image_size, json.dumps(dict(options or {}), sort_keys=True))
    seeds = range(seed, seed + episodes)
    with _open_store(path, recipe, seeds, manner, append) as store:
        first = store.n_steps
        succeeded = stored = 0
        played = _play_all(recipe, seeds, manner, min(workers, episodes))
        with tqdm(played, total=episodes, unit="episode", desc=env_id, disable=not progress) as bar:
            for attempted, episode in enumerate(bar, start=1):
                succeeded += episode.success
                if episode.success or keep_failures:
                    store.append(
                        episode.arrays,
                        task=episode.task,
                        success=episode.success,
                        seed=episode.seed,
                        behaviour=episode.behaviour,
                    )
                    stored += 1
                bar.set_postfix_str(f"success {succeeded / attempted:.1%}")
        report = RecordReport(path, episodes, succeeded, stored, store.n_steps - first, store.n_episodes)
    if succeeded < episodes:
        log.info("%s: the expert failed in %d of %d episodes", env_id, episodes - succeeded, episodes)
    return report


def play_episode(env: Any, seed: int, manner: Manner) -> Episode:
    """Play one episode with the scripted expert."""
    rng = np.random.default_rng((seed, 1))  # a stream of its own: the environment draws from default_rng(seed)
    disturbance = disturbances(env.action_space, manner.noise, env.metadata["render_fps"], rng)
    observation, _ = env.reset(seed=seed)
    expert = make_expert(env, seed, manner.choices(seed))
    steps: list[dict[str, Any]] = []
    ended = False
    while not ended:
        action = np.asarray(expert.act(observation))
        executed = np.clip(action + next(disturbance), env.action_space.low, env.action_space.high)
        step = {**observation, "action": action}
        observation, reward, terminated, truncated, info = env.step(executed.astype(env.action_space.dtype))
        steps.append({**step, "reward": np.float32(reward)})
        ended = terminated or truncated
    arrays = {name: np.stack([step[name] for step in steps]) for name in steps[0]}
    behaviour = ":".join(filter(None, (getattr(expert, "quality", ""), getattr(expert, "mode", ""))))
    return Episode(arrays, getattr(env.unwrapped, "instruction", ""), bool(info["success"]), seed, behaviour)


def make_expert(env: Any, seed: int, choices: Mapping[str, str]) -> Any:
    """The environment's scripted expert.

    Args:
        choices: ``quality`` and ``mode``, where they are not left to the expert.

    Raises:
        UserError: it does not know the quality or mode.
    """
    try:
        return env.unwrapped.make_expert(seed, **choices)
    except (TypeError, ValueError) as error:
        if not choices:
            raise
        asked = ", ".join(f"{name} '{value}'" for name, value in choices.items())
        raise UserError(f"{env.spec.id}: its expert cannot play {asked}: {error}") from error


def _shares(name: str, shares: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """Shares that sum to 1, as pairs."""
    total = sum(shares.values())
    if shares and (total <= 0 or min(shares.values()) < 0):
        raise UserError(f"The shares of {name} must be at least 0 and not all 0, found {dict(shares)}.")
    return tuple((key, share / total) for key, share in shares.items())


def _check_arguments(episodes: int, seed: int, workers: int, noise: float) -> None:
    if episodes < 1 or workers < 1:
        raise UserError(f"Recording needs at least one episode and one worker, found {episodes} and {workers}.")
    if not 0 <= seed <= EVALUATION_SEEDS_FROM - episodes:
        raise UserError(
            f"The seeds {seed} to {seed + episodes - 1} do not lie in 0 to {EVALUATION_SEEDS_FROM - 1}; the seeds "
            f"from {EVALUATION_SEEDS_FROM} on are kept for evaluation. Choose another seed."
        )
    if not 0 <= noise < 1:
        raise UserError(f"noise={noise} must lie in 0 (none) to 1 (half the action range).")


def _open_store(path: Path, recipe: EnvironmentRecipe, seeds: range, manner: Manner, append: bool) -> EpisodeStore:
    if path.exists():
        if not append:
            raise UserError(
                f"{path} exists already. Append to it (--append, append=True) or choose another path; nothing is "
                "ever overwritten."
            )
        return _open_to_append(path, recipe, seeds)
    with closing(recipe.make()) as env:
        arrays, fps = array_specs(env), float(env.metadata["render_fps"])
    provenance = {
        "source": "scripted expert",
        "env_id": recipe.env_id,
        "environment_options": json.loads(recipe.options),
        "noise": manner.noise,
        "qualities": dict(manner.qualities),
        "modes": dict(manner.modes),
    }
    return EpisodeStore.create(path, arrays, fps=fps, attributes=provenance)


def check_same_environment(store: EpisodeStore, env_id: str, options: Mapping[str, Any]) -> None:
    """Compare with the environment that a dataset says it was recorded in; equal shapes do not make equal actions.

    Raises:
        UserError: the id or an option differs; the store is closed.
    """
    attributes = store.schema.attributes
    there = (str(attributes.get("env_id", env_id)).rpartition(":")[2], attributes.get("environment_options", {}))
    wanted = (env_id.rpartition(":")[2], json.loads(json.dumps(dict(options))))
    if "env_id" in attributes and there != wanted:
        store.close()
        raise UserError(
            f"{store.path} was recorded in {there[0]} with the options {json.dumps(there[1])}, this is {wanted[0]} "
            f"with {json.dumps(wanted[1])}. Use the same task and options, or another path; 'robopolicy data "
            "merge' joins datasets."
        )


def _open_to_append(path: Path, recipe: EnvironmentRecipe, seeds: range) -> EpisodeStore:
    store = EpisodeStore.open(path, "a")
    check_same_environment(store, recipe.env_id, json.loads(recipe.options))
    known = {seed for seed in store.episode_seeds if seed is not None}
    if not known.isdisjoint(seeds):
        store.close()
        raise UserError(
            f"{path} holds episodes with seeds from {seeds.start} to {seeds.stop - 1} already; recording them again "
            f"would repeat them. Use --seed {max(known) + 1} (seed={max(known) + 1})."
        )
    return store


def array_specs(env: Any) -> tuple[ArraySpec, ...]:
    """Describe what an environment's recording stores; units and column names come from ``env.metadata``.

    Raises:
        UserError: observations are no dictionary of boxes or actions no box.
    """
    gymnasium = require_extra("gymnasium", "sim")
    spaces, action = env.observation_space, env.action_space
    boxes = gymnasium.spaces.Box
    if not (
        isinstance(spaces, gymnasium.spaces.Dict)
        and all(isinstance(space, boxes) for space in spaces.values())
        and isinstance(action, boxes)
    ):
        raise UserError(f"{env.spec.id}: recording wants a Dict of Box observations and a Box action, found {spaces}.")
    return (
        *(_array_spec(env, key, space, _observation_role(space)) for key, space in spaces.items()),
        _array_spec(env, "action", action, "action"),
        ArraySpec("reward", (), "float32", "reward"),
    )


def _array_spec(env: Any, name: str, space: Any, role: Literal["image", "state", "action"]) -> ArraySpec:
    units, names = env.metadata.get("units", {}), env.metadata.get("names", {})
    return ArraySpec(name, space.shape, space.dtype.name, role, unit=units.get(name, ""), names=names.get(name, ()))


def _observation_role(space: Any) -> Literal["image", "state"]:
    return "image" if space.dtype == np.uint8 and len(space.shape) == 3 else "state"


def disturbances(space: Any, noise: float, fps: float, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Stationary first-order autoregressive Gaussian noise in action units, one array of the action's shape a step."""
    scale = noise * (space.high.astype(np.float64) - space.low) / 2
    if noise > 0 and not np.isfinite(scale).all():
        raise UserError("noise is a share of the action range, and this environment's actions have no limits.")
    keep = np.exp(-1 / (fps * _NOISE_TIME_CONSTANT))
    value = np.zeros(space.shape)
    while True:
        value = keep * value + np.sqrt(1 - keep**2) * rng.standard_normal(space.shape)
        yield value * scale if noise > 0 else np.zeros(space.shape)


def _play_all(recipe: EnvironmentRecipe, seeds: range, manner: Manner, workers: int) -> Iterator[Episode]:
    """Play one episode for each seed, in the order of the seeds."""
    if workers == 1:
        with closing(recipe.make()) as env:
            yield from (play_episode(env, seed, manner) for seed in seeds)
        return
    # spawn: a forked child would inherit an OpenGL context that only works in its parent.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        yield from _in_order(pool, partial(_play_in_worker, recipe, manner), seeds, ahead=2 * workers)
    except BrokenProcessPool as error:
        raise UserError(
            f"{recipe.env_id}: a recording process died; its own message is above. Use fewer workers if memory ran "
            "out. Stored episodes are safe; go on with --append and the next seed."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, play: Callable[[int], Episode], seeds: range, ahead: int) -> Iterator[Episode]:
    """Yield results in the order of the seeds, with a bounded number of episodes waiting in memory."""
    waiting: deque[Future[Episode]] = deque()
    for seed in seeds:
        waiting.append(pool.submit(play, seed))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _play_in_worker(recipe: EnvironmentRecipe, manner: Manner, seed: int) -> Episode:
    return play_episode(_worker_environment(recipe), seed, manner)


@cache
def _worker_environment(recipe: EnvironmentRecipe) -> Any:
    """The environment that a worker process keeps from episode to episode."""
    # One software-rendering thread per process: more would compete with the other workers.
    os.environ["LP_NUM_THREADS"] = "1"
    return recipe.make()
