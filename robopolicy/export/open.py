"""Opening a policy for inference: one of its engines, or its own weights in torch."""

from __future__ import annotations

from pathlib import Path

from robopolicy.errors import UserError
from robopolicy.export.rtc_config import GUIDED_ENGINE, RtcConfig
from robopolicy.inference.engine import engine_names
from robopolicy.inference.policy import ExportedPolicy, open_engine
from robopolicy.inference.session import Session

TORCH = ("torch", "torch-compile", GUIDED_ENGINE)

__all__ = ["TORCH", "engine_names", "open_policy"]


def open_policy(
    bundle: Path,
    engine: str | None = None,
    *,
    threads: int = 1,
    device: str | None = None,
    verify: bool = True,
    allow_native_code: bool = False,
    rtc: RtcConfig | None = None,
) -> ExportedPolicy:
    """Load a policy behind the interface of engines.

    Args:
        bundle: its folder.
        engine: name of an engine; ``torch``, ``torch-compile`` or ``torch-rtc`` (real-time chunking by its published
            guidance), which need no file and import torch; None: the only engine, or torch where there is none.
        threads: CPU threads.
        device: of torch ``cpu``, ``cuda`` …; see `open_engine`.
        verify: sample the golden chunks and compare.
        allow_native_code: see `open_engine`.
        rtc: strength and start of ``torch-rtc``; None: its defaults.

    Raises:
        UserError: there is no such engine, or several and none is named; ``rtc`` is given to another engine than its
            own, or does not fit the policy's sampler; see `open_engine`.
    """
    bundle = Path(bundle)
    if engine is None:
        known = engine_names(bundle)
        if len(known) > 1:
            raise UserError(
                f"{bundle} has several engines, {', '.join(known)}; name one with engine=…, or engine=torch."
            )
        engine = known[0] if known else TORCH[0]
    if rtc is not None and engine != GUIDED_ENGINE:
        raise UserError(
            f"engine={engine} does not compute the published guidance of real-time chunking (scheduler.mode=vjp, beta, "
            f"warm_start). Use engine={GUIDED_ENGINE}, or scheduler.mode=soft."
        )
    if engine not in TORCH:
        return open_engine(
            bundle, engine, threads=threads, device=device, verify=verify, allow_native_code=allow_native_code
        )
    if device is not None and device.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"device={device}: torch runs here on cpu or cuda.")
    return _open_torch(bundle, engine, threads, device or "cpu", rtc)


def _open_torch(bundle: Path, engine: str, threads: int, device: str, rtc: RtcConfig | None) -> ExportedPolicy:
    from robopolicy.export.borders import torch_session
    from robopolicy.export.critic import own_candidates
    from robopolicy.export.observations import made_up
    from robopolicy.manifest import bundle_fingerprint
    from robopolicy.policies.bundle import load_bundle
    from robopolicy.policies.denoising import DenoisingPolicy

    policy, about = load_bundle(bundle, device)
    assert isinstance(policy, DenoisingPolicy)  # as all families are
    if engine == GUIDED_ENGINE:
        from robopolicy.export.rtc_policy import rtc_policy

        return rtc_policy(policy, rtc, device=device, threads=threads, fingerprint=bundle_fingerprint(about))
    batch = {key: value.to(policy.device) for key, value in made_up(policy, 1, seed=0).items()}
    graphs = policy.export_graphs(batch)
    sessions: dict[str, Session] = {
        name: torch_session(graph, device=device, compiled=engine == "torch-compile", threads=threads)
        for name, graph in graphs.items()
        if name != "denoiser"
    }
    noises = graphs["sampler"].inputs[0].shape[1]
    return ExportedPolicy(engine, policy.spec, sessions, noises, own_candidates(policy), bundle_fingerprint(about))
