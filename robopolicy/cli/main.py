"""The command line: one verb per step of a user's day."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from robopolicy import __version__
from robopolicy.errors import UserError
from robopolicy.simulator import NAMESPACE

# On a machine that does other work too, threads that spin while they wait cost ten times their gain.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TUTORIAL = """\
From demonstrations to a deployed policy.

  1. get demonstrations     robopolicy record --task push_puck --episodes 200 --out data/push_puck.zarr
                            robopolicy teleoperate --task lift --out data/lift.zarr
                            (datasets of diffusion_policy and UMI, .zarr or .zarr.zip, work as they are)
  2. look at them           robopolicy data show data/push_puck.zarr
                            robopolicy data doctor data/push_puck.zarr
  3. train a policy         robopolicy train task=push_puck policy=diffusion_unet_small data.path=data/push_puck.zarr
  4. judge it               robopolicy eval bundle=runs/push_puck/…/bundles/last episodes=200
  5. compare two policies   robopolicy compare results/a results/b
  6. steer it as it acts    robopolicy train-critic task=push_puck data.path=data/mixed.zarr
                            robopolicy eval bundle=… steering=vgps steering.vgps.critic=runs/…/bundles/last
  7. export it              robopolicy export bundle=… backend=openvino
                            robopolicy bench bundle=…
                            robopolicy serve bundle=…
  8. rehearse with delays   robopolicy rehearse bundle=… delays=[0,0.2]
  9. on an arm              robopolicy hardware check ur5e --bundle runs/…/bundles/last --live
                            ros2 launch robopolicy_ros policy.launch.py robot:=ur5e bundle:=…
 10. trust the simulation?  robopolicy fidelity --real real.csv --sim a=results/a b=results/b c=results/c

All of it on an example, in about ten minutes: robopolicy demo
Every verb explains itself: robopolicy train --help
"""


def build_parser() -> argparse.ArgumentParser:
    from robopolicy.cli import (
        align,
        bench,
        calibrate_guidance,
        compare,
        data,
        demo,
        describe,
        distill,
        evaluate,
        export,
        extend,
        fidelity,
        finetune,
        hardware,
        identify,
        randomize,
        record,
        rehearse,
        select,
        serve,
        teleoperate,
        train,
        train_critic,
        train_dynamics,
        train_rl,
    )

    parser = argparse.ArgumentParser(
        prog="robopolicy", description=TUTORIAL, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"robopolicy {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    daily = (record, teleoperate, data, train, evaluate, compare)
    more_training = (
        distill,
        finetune,
        extend,
        train_rl,
        train_critic,
        train_dynamics,
        describe,
        calibrate_guidance,
        align,
    )
    deployment = (export, bench, serve, rehearse, hardware)
    for module in (*daily, *more_training, *deployment, identify, randomize, fidelity, select, demo):
        module.add_parser(verbs)
    return parser


def run_verb(arguments: Sequence[str] | None) -> int:
    """Parse and run one verb; returns its exit code."""
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    # argparse takes a sub-verb's positional words in one piece only; overrides may also follow an option
    if rest and ("overrides" not in args or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return int(args.run(args))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 2 after an error that the user can fix, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "matplotlib", "PIL", "h5py", "torch"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return run_verb(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__module__.partition(".")[0] != NAMESPACE:
            raise
        print(f"error: {error}", file=sys.stderr)  # the simulator, which knows nothing of UserError
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
