"""``robopolicy randomize``"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

pytest.importorskip("robopolicy_sim")

from robopolicy.cli import randomize  # noqa: E402
from robopolicy.errors import UserError  # noqa: E402


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    randomize.add_parser(parser.add_subparsers())
    args = parser.parse_args(["randomize", *words])
    return int(args.run(args))


def test_the_expert_of_lift(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "found" / "lift.json"
    words = ["--task", "lift", "--factor", "friction=0.5:1.5", "gain", "--success", "0.7"]
    assert run(*words, "--rounds", "2", "--episodes", "10", "--out", str(out)) == 0
    printed = capsys.readouterr().out
    assert printed.count("success ") == 3 and "randomization: {friction: {beta: [" in printed
    found = json.loads(out.read_text())
    assert len(found["rounds"]) == 2
    assert found["rounds"][1]["entropy"] > found["rounds"][0]["entropy"]
    assert found["randomization"]["friction"]["beta"][2:] == [0.5, 1.5]
    assert found["success_rate"]["n"] == 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--factor", "friction=1"), "wanted NAME or NAME=LOW:HIGH"),
        (("--factor", "friction=a:b"), "wanted NAME or NAME=LOW:HIGH"),
        (("--factor", "friction", "--success", "1.2"), "wanted above 0, at most 1"),
        (("--factor", "friction", "--episodes", "5"), "at least 10"),
        (("--factor", "friction", "--seed", "-1"), "--seed at least 0"),
        (("--factor", "friction", "--quality", "bad"), "its expert cannot play quality 'bad'"),
        (("--factor", "friction", "--option", "variation=darker"), "variation='darker': wanted values by factor"),
        (("--factor", "table_texture"), "no factor of variation with a range"),
    ],
)
def test_mistakes_are_named(words: tuple[str, ...], message: str):
    with pytest.raises(UserError, match=message):
        run("--task", "lift", *words)
