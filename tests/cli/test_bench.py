"""``robopolicy bench``: what it prints and writes, its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from robopolicy.cli.main import main


def test_table_and_files(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["bench", f"bundle={bundle}", "runs=3", "warmup=1", f"out={out}"]) == 0
    text = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("engine")}
    assert lines["engine"][1:6] == ["open", "s", "first", "s", "memory"]  # the second table
    saved = json.loads((out / "bench.json").read_text())
    (engine,) = saved["engines"]
    latency, costs = (line.split() for line in text.splitlines() if line.startswith("torch "))
    assert latency[1:3] == [f"{1e3 * engine['latency'][name]:.2f}" for name in ("min", "p50")]
    assert latency[10:12] == [f"{engine[name]:.0%}" for name in ("fraction", "best_fraction")]
    assert costs[-2:] == ["ddim", "16"] and engine["work"]["network_calls"] == 16
    assert (out / "bench.png").stat().st_size > 5000
    assert text.endswith(f"results: {out / 'bench.json'}, {out / 'bench.png'}\n")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["runs=0"], "runs=0 must be at least 1"),
        (["threads=0"], "threads=0 must be at least 1"),
        (["engines=[]"], "engines=[] measures nothing"),
        (["engines=[torhc]"], "no engine 'torhc'. Did you mean 'torch'"),
        (["run=3"], "Unknown key 'run'. Did you mean 'runs'"),
    ],
)
def test_errors(fails, bundle: Path, words: list[str], wanted: str) -> None:
    assert wanted in fails("bench", f"bundle={bundle}", *words)


def test_no_bundle(fails, tmp_path: Path) -> None:
    assert "is not a bundle" in fails("bench", f"bundle={tmp_path}")
