"""``robopolicy describe``"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from robopolicy.cli.compose import compose_config
from robopolicy.cli.evaluate import Sampler, override_sampler
from robopolicy.errors import UserError

HELP = """\
Say what a policy is and what it costs.

  robopolicy describe bundle=runs/pusht_state/diffusion_unet-seed42/bundles/last
  robopolicy describe bundle=… sampler.name=ddim sampler.steps=8
  robopolicy describe bundle=… device=cuda --json

Parameters of each part; active parameters: what one network call reads, less than there are where experts are chosen;
GFLOP of one chunk for one robot (two operations for each multiplication and addition of matrix products, convolutions
and attention); network calls of a chunk; the keys that it reads and writes; what it was trained on; and the median
latency of a chunk on this machine.
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "describe",
        help="parameters, GFLOP, latency and origin of a policy",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see above and configs/describe.yaml")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Settings:
    """The entries of ``configs/describe.yaml``, explained there."""

    bundle: str
    device: str
    calls: int
    threads: int | None = None
    sampler: Sampler = field(default_factory=Sampler)

    def __post_init__(self) -> None:
        for name in ("calls", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1.")


def run(args: argparse.Namespace) -> int:
    from robopolicy.configuration import dataclass_from

    settings = dataclass_from(Settings, compose_config("describe", args.overrides), "")
    about = description(settings)
    if args.json:
        print(json.dumps(about, indent=2))
    else:
        print_description(about)
    return 0


def description(settings: Settings) -> dict[str, Any]:
    """All that is said of a bundle, as JSON values."""
    import torch

    from robopolicy.manifest import bundle_fingerprint
    from robopolicy.policies.bundle import load_bundle
    from robopolicy.policies.cost import act_latency, cost
    from robopolicy.training.distributed import join_processes

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    policy, manifest = load_bundle(Path(settings.bundle), join_processes(settings.device).device)
    override_sampler(policy, settings.sampler)
    found = cost(policy)
    return {
        "bundle": settings.bundle,
        "fingerprint": bundle_fingerprint(manifest),
        "architecture": manifest["architecture"],
        "parameters": {
            "total": found.total_parameters,
            "parts": found.parameters,
            "active_per_network_call": found.active_parameters,
        },
        "chunk": {
            "gflop": found.flops / 1e9,
            "network_calls": found.network_calls,
            "sampler": asdict(policy.sampler),
        },
        "latency": asdict(act_latency(policy, settings.calls)),
        "spec": manifest["spec"],
        "task": manifest["task"],
        "provenance": manifest["provenance"],
    }


def print_description(about: Mapping[str, Any]) -> None:
    config, parameters, chunk = about["architecture"]["config"], about["parameters"], about["chunk"]
    process, sampler, latency = config.get("process", {}), chunk["sampler"], about["latency"]
    _line("bundle", f"{about['bundle']}  ({about['fingerprint']})")
    _line("architecture", about["architecture"]["name"])
    _line("process", "  ".join(str(v) if k == "name" else f"{k}={v}" for k, v in process.items()))
    guidance = "" if sampler["guidance"] == 1 else f", guidance {sampler['guidance']:g}"
    _line("sampler", f"{sampler['name']}, {sampler['steps']} steps{guidance}: {chunk['network_calls']} network calls")
    print()
    for name, count in parameters["parts"].items():
        _line(name, f"{count:>14,} parameters")
    _line("total", f"{parameters['total']:>14,} parameters")
    _line("active", f"{parameters['active_per_network_call']:>14,} parameters in a network call")
    _line("chunk", f"{chunk['gflop']:>14.4g} GFLOP for one robot")
    times = (
        f"{1e3 * latency['median']:>14.4g} ms median, {1e3 * latency['slowest']:.4g} ms slowest of {latency['calls']}"
    )
    _line("latency", f"{times}, on {latency['device']}, {_count(latency['threads'], 'thread')}")
    print()
    _print_spec(about["spec"])
    print()
    _print_origin(about["provenance"], about["task"])


def _print_spec(spec: Mapping[str, Any]) -> None:
    for key in spec["observations"]:
        _key("reads", key)
    for key in spec.get("goals", ()):
        _key("goal", key)
    for task in spec.get("tasks", ()):
        _line("instruction", repr(task["instruction"]))
    _key("writes", spec["action"])
    steps = f"{_count(spec['n_obs_steps'], 'observation')} in, {_count(spec['horizon'], 'action')} out"
    _line("chunk", f"{steps}, {spec['n_action_steps']} executed, {spec['fps']:g} steps/s")


def _print_origin(provenance: Mapping[str, Any], task: Mapping[str, Any]) -> None:
    metrics = provenance.get("metrics") or {}
    dataset = provenance.get("dataset") or {}
    started = (provenance.get("config") or {}).get("bundle")
    rows = {
        "task": task.get("name"),
        "environment": task.get("environment"),
        "data": "  ".join(str(v) for v in (dataset.get("path"), dataset.get("fingerprint")) if v),
        "fine-tuned from": started,
        "trained": f"{provenance['step']} steps, seed {provenance.get('seed')}" if "step" in provenance else None,
        "code": "  ".join(f"{k} {provenance[k]}" for k in ("robopolicy", "commit", "torch") if provenance.get(k)),
        "metrics": ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if not k.startswith("speed/")),
    }
    for name, text in rows.items():
        if text:
            _line(name, str(text))


def _key(kind: str, key: Mapping[str, Any]) -> None:
    shape = "x".join(map(str, key["shape"]))
    _line(kind, f"{key['key']:<28} {shape:<12} {key['unit'] or '-':<8} {key['rotation']}".rstrip())


def _line(name: str, text: str) -> None:
    print(f"{name:<16} {text}".rstrip())


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
