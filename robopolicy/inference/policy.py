"""A policy that was exported: observations in, action chunks out, without torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robopolicy.errors import UserError
from robopolicy.inference.backends.open import cache_folder, open_session
from robopolicy.inference.engine import FOLDER, GOLDEN, STEPS, Candidates, EngineManifest, check_file, read_engine
from robopolicy.inference.golden import check_golden
from robopolicy.inference.observations import checked_observations, task_indices
from robopolicy.inference.session import Session
from robopolicy.spec import INSTRUCTION, TASK, PolicySpec


@dataclass(frozen=True)
class Timings:
    """Seconds of a call: checking and converting, the encoder, the sampler with the critic, the end."""

    preprocess: float = 0.0
    encode: float = 0.0
    denoise: float = 0.0
    postprocess: float = 0.0

    @property
    def total(self) -> float:
        return self.preprocess + self.encode + self.denoise + self.postprocess


class ExportedPolicy:
    """Runs the graphs of a policy. One call at a time.

    Args:
        name: of the engine.
        spec: the policy's.
        sessions: ``encoder`` and ``sampler``; ``critic_encoder`` and ``critic`` where a critic chooses.
        noises: standard normal tensors that the sampler wants for a chunk.
        candidates: how a critic chooses.
        fingerprint: of the bundle.

    Attributes:
        spec, name, sessions, candidates, fingerprint: the arguments.
        instruction: what to do where observations bring no instruction; for policies with tasks.
        goal: values of the spec's goals, by key without prefix, where observations bring none.
        timings: of the last call.
    """

    def __init__(
        self,
        name: str,
        spec: PolicySpec,
        sessions: Mapping[str, Session],
        noises: int,
        candidates: Candidates | None = None,
        fingerprint: str = "",
    ) -> None:
        self.name, self.spec, self.sessions = name, spec, dict(sessions)
        self.candidates, self.fingerprint = candidates, fingerprint
        self.instruction: str | None = None
        self.goal: Mapping[str, np.ndarray] = {}
        self.timings = Timings()
        self._noises = noises
        self._count = candidates.count if candidates else 1

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(N, H, A): the noise of one row; with candidates theirs one after the other for each draw, and one more."""
        chunk = (self.spec.horizon, self.spec.action.dim)
        return (self._noises * self._count + (self.candidates is not None), *chunk)

    def draw_noise(self, rows: int, rng: np.random.Generator) -> np.ndarray:
        """(rows, N, H, A) standard normal float32."""
        return rng.standard_normal((rows, *self.noise_shape), np.float32)

    def check_instruction(self, instruction: str | None) -> None:
        """Raise a `UserError` if this policy is not told what to do, or does not know the instruction."""
        if not self.spec.tasks:
            raise UserError(f"This policy is not told what to do; leave the instruction '{instruction}' out.")
        task_indices(self.spec, [instruction])

    def act(
        self,
        observations: Mapping[str, Any],
        noise: np.ndarray,
        previous: np.ndarray | None = None,
        mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """The executed part (B, n_action_steps, A) of chunks; see `sample`."""
        return self.sample(observations, noise, previous, mask)[:, self.spec.executed]

    def sample(
        self,
        observations: Mapping[str, Any],
        noise: np.ndarray,
        previous: np.ndarray | None = None,
        mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """Sample chunks.

        Args:
            observations: by key, (B, n_obs_steps, *shape), physical units; images uint8. Where the spec has them,
                goals (B, *shape) under ``goal.<key>`` and ``instruction``, B texts.
            noise: (B, N, H, A), see `draw_noise`: the only randomness.
            previous: (B, H, A) a chunk to agree with, physical units, for real-time chunking; entry i is for the same
                time as entry i of the chunk that is sampled.
            mask: (B, H) in [0, 1]: how far each of its actions must be kept; 1 returns it as it is.

        Returns:
            (B, H, A) float32, physical units; entry ``n_obs_steps - 1`` belongs to the newest observation.

        Raises:
            UserError: a key is missing, has a wrong shape or numbers that are not finite; or an instruction is unknown.
            FloatingPointError: the actions are not finite.
        """
        began = time.perf_counter()
        inputs = self._inputs(observations)
        rows = len(next(iter(inputs.values())))
        sampling = self._sampling(rows, noise, previous, mask)
        ready = time.perf_counter()
        found = self._run("encoder", inputs, rows)
        encoded = time.perf_counter()
        chunks = self._chunks(rows, sampling, found, inputs)
        sampled = time.perf_counter()
        result = np.ascontiguousarray(chunks, np.float32)
        if not np.isfinite(result).all():
            raise FloatingPointError(f"The engine {self.name} gave actions that are not finite.")
        self.timings = Timings(ready - began, encoded - ready, sampled - encoded, time.perf_counter() - sampled)
        return result

    def warmup(self, runs: int = 3) -> None:
        """Sample from zeros, so that what backends do once is done."""
        for session in self.sessions.values():
            session.warmup(1)
        blank, noise = self._blank()
        for _ in range(runs):
            self.sample(blank, noise)

    def usual_seconds(self, runs: int = 5) -> float:
        """How long a chunk usually takes that must agree with one before: the median, on zeros."""
        blank, noise = self._blank()
        previous = self.sample(blank, noise)
        mask = np.ones(previous.shape[:2], np.float32)
        seconds = []
        for _ in range(1 + runs):
            self.sample(blank, noise, previous, mask)
            seconds.append(self.timings.total)
        return float(np.median(seconds[1:]))  # gradients are set up in the first

    def close(self) -> None:
        """Release the sessions."""
        for session in self.sessions.values():
            session.close()
        self.sessions.clear()

    def _blank(self) -> tuple[dict[str, Any], np.ndarray]:
        """Observations of one row and its noise, zeros."""
        spec = self.spec
        steps = spec.n_obs_steps
        blank: dict[str, Any] = {
            k.key: np.zeros((1, steps, *k.shape), np.uint8 if k.role == "image" else np.float32)
            for k in spec.observations
        }
        blank |= {f"goal.{k.key}": np.zeros((1, *k.shape)) for k in spec.goals}
        if spec.tasks:
            blank[INSTRUCTION] = [spec.tasks[0].instruction]
        return blank, np.zeros((1, *self.noise_shape), np.float32)

    def _inputs(self, observations: Mapping[str, Any]) -> dict[str, np.ndarray]:
        inputs = checked_observations(self.spec, observations, self.goal)
        if self.spec.tasks:
            rows = len(next(iter(inputs.values())))
            texts = observations.get(INSTRUCTION, [self.instruction] * rows)
            if isinstance(texts, str) or len(texts) != rows:
                raise UserError(f"{INSTRUCTION}: found {texts!r}, wanted {rows} texts, one for each row.")
            inputs[TASK] = task_indices(self.spec, texts)
        return inputs

    def _sampling(
        self, rows: int, noise: np.ndarray, previous: np.ndarray | None, mask: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        spec = self.spec
        chunk = (rows, spec.horizon, spec.action.dim)
        if (previous is None) != (mask is None):
            raise UserError("previous and mask belong together; give both or none.")
        given = {
            "noise": (noise, (rows, *self.noise_shape)),
            "previous": (np.zeros(chunk) if previous is None else previous, chunk),
            "mask": (np.zeros(chunk[:2]) if mask is None else mask, chunk[:2]),
        }
        for name, (value, wanted) in given.items():
            if np.shape(value) != wanted:
                raise UserError(f"{name}: found shape {np.shape(value)}, wanted {wanted}.")
            if not np.isfinite(value).all():
                raise UserError(f"{name}: found numbers that are not finite.")
        if mask is not None and (np.min(mask) < 0 or np.max(mask) > 1):
            raise UserError(f"mask: found numbers from {np.min(mask):g} to {np.max(mask):g}, wanted 0 to 1.")
        return {name: np.asarray(value, np.float32) for name, (value, _) in given.items()}

    def _chunks(
        self, rows: int, sampling: dict[str, np.ndarray], found: dict[str, np.ndarray], inputs: dict[str, np.ndarray]
    ) -> np.ndarray:
        if self.candidates is None:
            return self._sampled(sampling | found, inputs, rows, 1)
        count = self._count
        *each, last = np.split(sampling["noise"], [self._noises * count], axis=1)
        noise = each[0].reshape(rows, self._noises, count, *each[0].shape[2:]).swapaxes(1, 2)
        repeated = {name: np.repeat(value, count, axis=0) for name, value in (sampling | found).items()}
        repeated["noise"] = noise.reshape(rows * count, *noise.shape[2:])
        chunks = self._sampled(repeated, inputs, rows, count)
        features = self._run("critic_encoder", inputs, rows)["features"]
        values = self._run("critic", {"features": np.repeat(features, count, axis=0), "chunk": chunks}, rows * count)
        chosen = choose(values["value"].reshape(rows, count), self.candidates.temperature, last[:, 0, 0, 0])
        return chunks.reshape(rows, count, *chunks.shape[1:])[np.arange(rows), chosen]

    def _sampled(
        self, sampling: Mapping[str, np.ndarray], observations: Mapping[str, np.ndarray], rows: int, count: int
    ) -> np.ndarray:
        """Chunks (rows * count, H, A), ``count`` of each of the observations' rows, which ``sampling`` is for."""
        return self._run("sampler", sampling, rows * count)["chunk"]

    def _run(
        self, graph: str, inputs: Mapping[str, np.ndarray], rows: int, shared: Sequence[str] = ()
    ) -> dict[str, np.ndarray]:
        """Run a graph on any number of rows, in parts where it takes fewer; ``shared`` inputs have none."""
        session = self.sessions[graph]
        fixed = session.inputs[0].shape[0]
        if fixed == rows or (fixed is None and rows <= (session.max_rows or rows)):
            return session(inputs)
        fixed = fixed or session.max_rows or rows
        names = [spec.name for spec in session.inputs]
        parts = []
        for first in range(0, rows, fixed):
            index = np.minimum(np.arange(first, first + fixed), rows - 1)  # the last part repeats the last row
            given = {name: inputs[name] for name in names if name in inputs}
            parts.append(session({name: v if name in shared else v[index] for name, v in given.items()}))
        return {name: np.concatenate([part[name] for part in parts])[:rows] for name in parts[0]}


def choose(values: np.ndarray, temperature: float, normal: np.ndarray) -> np.ndarray:
    """Draw one candidate of each row with probability softmax(value / temperature).

    Args:
        values: (B, K).
        temperature: 0 takes the best.
        normal: (B,) standard normal, the randomness.

    Returns:
        (B,) indices.
    """
    if temperature == 0:
        return values.argmax(axis=1)
    weights = np.exp((values - values.max(axis=1, keepdims=True)) / temperature)
    cumulated = weights.cumsum(axis=1)
    uniform = np.array([0.5 * math.erfc(-float(x) / math.sqrt(2)) for x in normal])
    drawn = (cumulated <= (uniform * cumulated[:, -1])[:, None]).sum(axis=1)
    return np.minimum(drawn, values.shape[1] - 1)


def open_engine(
    bundle: Path,
    name: str,
    *,
    threads: int = 1,
    device: str | None = None,
    verify: bool = True,
    allow_native_code: bool = False,
) -> ExportedPolicy:
    """Load an engine of a bundle.

    Args:
        bundle: folder of the policy's bundle.
        name: of the engine.
        threads: CPU threads.
        device: see `open_session`.
        verify: sample the golden chunks and compare.
        allow_native_code: load native code of AOTInductor, see `AotInductorSession`.

    Raises:
        UserError: see `read_engine` and `open_session`; or the golden chunks come out otherwise.
    """
    engine, spec = read_engine(bundle, name)
    folder = Path(bundle) / FOLDER / name

    def load(graph: str) -> Session:
        file = engine.graphs[graph]
        check_file(folder / file.file, file.sha256, engine)
        return open_session(
            folder / file.file,
            engine,
            threads=threads,
            device=device,
            cache=cache_folder(engine),
            allow_native_code=allow_native_code,
        )

    if engine.guidance is not None:
        check_file(folder / STEPS, engine.guidance.sha256, engine)
    policy = exported_policy(engine, spec, load, folder)
    if verify:
        check_file(folder / GOLDEN, engine.golden, engine)
        check_golden(policy.sample, folder / GOLDEN, engine, spec)
    return policy


def exported_policy(
    engine: EngineManifest, spec: PolicySpec, load: Callable[[str], Session], folder: Path
) -> ExportedPolicy:
    """A policy from those graphs of an engine, in its folder, that sampling needs."""
    critic = ["critic_encoder", "critic"] if engine.candidates else []
    if engine.guidance is None:
        sessions = {graph: load(graph) for graph in ("encoder", "sampler", *critic)}
        return ExportedPolicy(engine.name, spec, sessions, engine.noises, engine.candidates, engine.bundle)
    from robopolicy.inference.guided import GUIDED, GuidedPolicy, GuidedSteps

    sessions = {graph: load(graph) for graph in (*GUIDED, *critic)}
    return GuidedPolicy(
        engine.name,
        spec,
        sessions,
        engine.noises,
        GuidedSteps.load(folder / STEPS),
        engine.guidance,
        engine.sampler["guidance"],
        engine.candidates,
        engine.bundle,
    )
