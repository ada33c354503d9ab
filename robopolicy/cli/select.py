"""``robopolicy select``"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robopolicy.errors import UserError

if TYPE_CHECKING:
    from robopolicy.evaluation.rates import SuccessRates
    from robopolicy.evaluation.selection import Candidate, Choice

HELP = """\
Choose a policy before the robot moves: success in simulation, discounted by how strange real observations look to it.

  robopolicy select --real data/real.zarr --policy a=runs/a/bundles/last b=runs/b/bundles/last \\
                    --sim a=results/a b=results/b
  robopolicy select --real data/real.zarr --policy … --sim … --training a=data/moved.zarr --out selection.json

--real is one dataset of observations from the robot, e.g. of teleoperation; no policy is run on it and its actions are
not used. Each policy's encoder is shown these observations and those that it was trained on (the path in its bundle,
or --training). familiarity is the mean distance of held-out training observations from the rest of the training data,
over the same of the real observations, at most 1; score = success in simulation * familiarity.

A high score is no promise: familiarity looks at observations only, not at contact, friction or delays.
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "select",
        help="choose a policy without running it on the robot",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--real", type=Path, required=True, metavar="ZARR", help="observations from the robot")
    parser.add_argument("--policy", required=True, nargs="+", metavar="NAME=BUNDLE", help="the candidates")
    parser.add_argument("--sim", required=True, nargs="+", metavar="NAME=FOLDER", help="results folder of each policy")
    parser.add_argument(
        "--training", nargs="+", default=[], metavar="NAME=ZARR", help="training data that is no longer at its old path"
    )
    parser.add_argument(
        "--distance",
        default="mahalanobis",
        help="mahalanobis (default): to a Gaussian fitted to the features; neighbours: to the fifth nearest of them",
    )
    parser.add_argument(
        "--observations", type=int, default=1000, metavar="N", help="observations to encode per dataset (default 1000)"
    )
    parser.add_argument("--device", default="cpu", help="device of the encoders (default cpu)")
    parser.add_argument("--out", type=Path, metavar="JSON", help="also write the numbers")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from robopolicy.evaluation.rates import rates_of_results
    from robopolicy.evaluation.results import write_json
    from robopolicy.evaluation.selection import select

    if args.observations < 20:
        raise UserError(f"--observations is {args.observations}, wanted at least 20.")
    bundles, folders = named_paths("--policy", args.policy), named_paths("--sim", args.sim)
    training = named_paths("--training", args.training)
    for name in sorted({*bundles} ^ {*folders}) + sorted({*training} - {*bundles}):
        raise UserError(f"'{name}' must be given to both --policy and --sim.")
    rates = rates_of_results([(name, folders[name]) for name in bundles])
    candidates = [
        load_candidate(name, path, folders[name], rates, training.get(name), args) for name, path in bundles.items()
    ]
    choices = select(candidates, distance=args.distance)
    print_choices(choices)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, {"distance": args.distance, "policies": [asdict(choice) for choice in choices]})
        print(f"written: {args.out}")
    return 0


def named_paths(option: str, words: Sequence[str]) -> dict[str, Path]:
    """``NAME=PATH`` words as a mapping.

    Raises:
        UserError: a word of another form, or a name twice.
    """
    paths: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise UserError(f"{option}: found '{word}', wanted NAME=PATH.")
        if name in paths:
            raise UserError(f"{option}: '{name}' is there twice.")
        paths[name] = Path(path)
    return paths


def load_candidate(
    name: str, bundle: Path, results: Path, rates: SuccessRates, training: Path | None, args: argparse.Namespace
) -> Candidate:
    """Load a policy and encode the real observations and its training data.

    Raises:
        UserError: the results are of another policy, or a dataset is missing or does not fit the policy.
    """
    from robopolicy.data.store import EpisodeStore
    from robopolicy.evaluation.features import encode_dataset
    from robopolicy.evaluation.results import Protocol
    from robopolicy.evaluation.selection import Candidate
    from robopolicy.manifest import bundle_fingerprint
    from robopolicy.policies.bundle import load_bundle
    from robopolicy.training.distributed import join_processes

    policy, manifest = load_bundle(bundle, join_processes(args.device).device)
    judged = Protocol.load(results / "protocol.json").policy.get("fingerprint")
    if judged not in (None, bundle_fingerprint(manifest)):
        raise UserError(f"{results} holds the evaluation of another policy than {bundle}; evaluate that bundle.")
    provenance = manifest["provenance"]
    training = training or Path(provenance.get("dataset", {}).get("path", ""))
    if not training.exists() or training == Path():
        raise UserError(
            f"The training data of '{name}' is not at {training}. Say where it is: --training {name}=data/….zarr"
        )
    overrides = provenance.get("config", {}).get("task", {}).get("schema", {})
    encoded = []
    for path in (training, args.real):
        with EpisodeStore.open(path, overrides=overrides) as store:
            encoded.append(encode_dataset(policy, store, args.observations))
    row = rates.policies.index(name)
    return Candidate(name, int(rates.successes[row]), int(rates.trials[row]), *encoded)


def print_choices(choices: Sequence[Choice]) -> None:
    """Print the ranking and what it rests on."""
    width = max(6, *(len(choice.name) for choice in choices))
    print(f"rank  {'policy':<{width}}  score, 95 %             simulated (rank)  familiarity (rank)  outside  best in")
    for c in choices:
        score = f"{c.score.value:.3f} [{c.score.low:.3f}, {c.score.high:.3f}]"
        simulated = f"{c.simulated.value:.3f} ({c.simulated_rank})"
        familiar = f"{c.familiarity.value:.3f} ({c.familiarity_rank})"
        print(
            f"{c.rank:>4}  {c.name:<{width}}  {score:<22}  {simulated:<16}  {familiar:<18}  {c.outside:7.1%}  "
            f"{c.chance:7.1%}"
        )
    print(
        "score: simulated success * familiarity. outside: real observations stranger than 95 % of held-out training "
        "ones (5 % if they were alike). best in: share of resamples in which the policy scores highest."
    )
    best = choices[0]
    simulated_best = min(choices, key=lambda choice: choice.simulated_rank)
    if simulated_best.simulated_rank < best.simulated_rank:
        print(
            f"{best.name} is chosen over {simulated_best.name}, the best in simulation, because real observations are "
            f"more familiar to it ({best.familiarity.value:.3f} against {simulated_best.familiarity.value:.3f})."
        )
