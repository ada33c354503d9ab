"""``robopolicy fidelity`` and ``robopolicy select``: what they print, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from robopolicy.cli.main import main
from robopolicy.data.normalize import Normalizer, fit_normalizer
from robopolicy.data.schema import ArraySpec
from robopolicy.data.store import EpisodeStore
from robopolicy.manifest import bundle_fingerprint, read_manifest
from robopolicy.policies.bundle import save_bundle
from robopolicy.policies.registry import build_policy
from robopolicy.spec import KeySpec, PolicySpec
from tests.evaluation.test_results import result

REAL = "policy,rate,n\nrt-2-x,0.907,75\nconverged,0.853,75\nbegin,0.133,75\nocto <base>,0.293,75\nother,0.6,75\n"
SIM = "policy,rate,n\nconverged,0.857,75\nrt-2-x,0.787,75\nbegin,0.027,75\nocto <base>,0.170,75\nother,0.5,75\n"


@pytest.fixture
def tables(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "real.csv").write_text(REAL)
    (tmp_path / "sim.csv").write_text(SIM)
    return tmp_path / "real.csv", tmp_path / "sim.csv"


def test_fidelity_prints_measures_and_wrong_pairs(tables, capsys: pytest.CaptureFixture[str]) -> None:
    real, sim = tables
    assert main(["fidelity", "--real", str(real), "--sim", str(sim)]) == 0
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if line.startswith("MMRV")]
    assert "0.022" in line  # (0.054 + 0.054) / 5
    assert "orders the other way; 0 is best" in line
    assert "rt-2-x over converged: real +0.054, simulated -0.070" in text


def test_fidelity_writes_a_page_that_needs_nothing_else(tables, tmp_path: Path) -> None:
    real, sim = tables
    out = tmp_path / "out" / "fidelity.html"
    assert main(["fidelity", "--real", str(real), "--sim", str(sim), "--out", str(out)]) == 0
    page = out.read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "octo <base>" not in page
    assert "octo &lt;base&gt;" in page
    svg = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    dots = {(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in svg.iter("circle")}
    assert len(dots) == 5
    assert (round(420 * 0.787, 1), round(420 * (1 - 0.907), 1)) in dots  # across simulated, up real
    assert len([line for line in svg.iter("line") if line.attrib["class"] == "error"]) == 10
    assert [line.attrib["class"] for line in svg.iter("line")].count("identity") == 1


def test_fidelity_writes_the_numbers(tables, tmp_path: Path) -> None:
    real, sim = tables
    out = tmp_path / "fidelity.json"
    assert main(["fidelity", "--real", str(real), "--sim", str(sim), "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["agreement"]["mmrv"]["value"] == pytest.approx(0.0216)
    assert found["real"]["policies"]["begin"] == {"rate": 0.133, "n": 75}
    assert [(p["better"], p["worse"]) for p in found["wrong_pairs"]] == [("rt-2-x", "converged")]


def test_fidelity_reads_results_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "real.json").write_text('{"a": 0.2, "b": 0.6, "c": {"rate": 0.5, "n": 20}}')
    for name, scores in (("a", [0.1, 0.2]), ("b", [1.0, 0.2]), ("c", [1.0, 1.0])):
        result(scores).save(tmp_path / name)
    folders = [f"{name}={tmp_path / name}" for name in "abc"]
    assert main(["fidelity", "--real", str(tmp_path / "real.json"), "--sim", *folders]) == 0
    text = capsys.readouterr().out
    assert "b over c: real +0.100, simulated -0.500" in text
    assert "n unknown" in text  # of the policies without n


def test_fidelity_refuses(tables, tmp_path: Path, fails) -> None:
    real, sim = tables
    (tmp_path / "short.csv").write_text("policy,rate\nrt-2-x,0.5\nconverge,0.2\n")
    message = fails("fidelity", "--real", real, "--sim", tmp_path / "short.csv")
    assert f"{tmp_path / 'short.csv'} lacks 'converged', which {real} has. Did you mean 'converge'?" in message
    assert "name it .html or .json" in fails("fidelity", "--real", real, "--sim", sim, "--out", tmp_path / "f.png")
    assert "is not there" in fails("fidelity", "--real", tmp_path / "absent.csv", "--sim", sim)


STATE, CUE = "observation.state", "observation.cue"


def write_world(path: Path, lamp: float) -> Path:
    """Six random walks; ``lamp`` is added to the cue."""
    rng = np.random.default_rng(0)
    arrays = [
        ArraySpec(key, (2,), "float32", "action" if key == "action" else "state") for key in (STATE, CUE, "action")
    ]
    with EpisodeStore.create(path, arrays, fps=10) as store:
        for _ in range(6):
            steps = rng.normal(size=(20, 2)).astype(np.float32)
            store.append({STATE: steps, CUE: steps + np.float32(lamp), "action": steps})
    return path


@pytest.fixture
def worlds(tmp_path: Path) -> tuple[Path, Path]:
    """Data for training, and real data with other lamps."""
    return write_world(tmp_path / "train.zarr", 0.0), write_world(tmp_path / "real.zarr", 9.0)


@pytest.fixture
def candidates(worlds, tmp_path: Path) -> list[str]:
    """Two policies: ``cue`` reads what the lamps change and is better in simulation, ``state`` does not."""
    words: dict[str, list[str]] = {"--policy": [], "--sim": []}
    for name, key, scores in (("cue", CUE, [1.0] * 9 + [0.0]), ("state", STATE, [1.0] * 7 + [0.0] * 3)):
        torch.manual_seed(0)
        spec = PolicySpec((KeySpec(key, (2,)),), KeySpec("action", (2,), role="action"), 10, 2, 8, 4)
        parts = {
            k.key: fit_normalizer(np.array([[-3.0] * 2, [3.0] * 2]), "minmax") for k in (*spec.states, spec.action)
        }
        config = {"down_dims": [16, 32], "step_embed_dim": 16}
        policy = build_policy("diffusion_unet", config, spec, Normalizer.from_parts(parts))
        bundle = save_bundle(policy, tmp_path / name, provenance={"dataset": {"path": str(worlds[0])}})
        fingerprint = bundle_fingerprint(read_manifest(bundle))
        result(scores, policy={"fingerprint": fingerprint}).save(tmp_path / f"results-{name}")
        words["--policy"].append(f"{name}={bundle}")
        words["--sim"].append(f"{name}={tmp_path / f'results-{name}'}")
    return [word for option, values in words.items() for word in (option, *values)]


def test_select_prefers_the_policy_to_which_reality_is_familiar(
    candidates, worlds, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "selection.json"
    assert main(["select", "--real", str(worlds[1]), *candidates, "--out", str(out)]) == 0
    assert "state is chosen over cue, the best in simulation" in capsys.readouterr().out
    first, second = json.loads(out.read_text())["policies"]
    assert (first["name"], first["simulated_rank"], first["simulated"]["value"]) == ("state", 2, 0.7)
    assert (second["name"], second["simulated_rank"], second["outside"]) == ("cue", 1, 1.0)
    assert second["familiarity"]["value"] < 0.3 < 0.8 < first["familiarity"]["value"]
    for choice in (first, second):
        assert choice["score"]["value"] == pytest.approx(choice["simulated"]["value"] * choice["familiarity"]["value"])


def test_select_follows_the_simulation_where_reality_is_like_it(candidates, worlds, tmp_path: Path) -> None:
    out = tmp_path / "selection.json"
    like_it = write_world(tmp_path / "same.zarr", 0.0)
    assert main(["select", "--real", str(like_it), *candidates, "--distance", "neighbours", "--out", str(out)]) == 0
    assert [choice["name"] for choice in json.loads(out.read_text())["policies"]] == ["cue", "state"]


def test_select_refuses(candidates, worlds, tmp_path: Path, fails) -> None:
    train, real = worlds
    assert "wanted NAME=PATH" in fails("select", "--real", real, "--policy", "a", "--sim", "a=b")
    assert "'cue' is there twice" in fails("select", "--real", real, "--policy", "cue=a", "cue=b", "--sim", "cue=c")
    assert "'b' must be given to both" in fails("select", "--real", real, "--policy", "a=a", "--sim", "a=a", "b=b")
    assert "Did you mean 'mahalanobis'?" in fails("select", "--real", real, *candidates, "--distance", "mahalanobi")
    swapped = [f"cue={tmp_path / 'results-state'}", f"state={tmp_path / 'results-cue'}"]
    message = fails("select", "--real", real, *candidates[:3], "--sim", *swapped)
    assert "results-state holds the evaluation of another policy than" in message
    train.rename(tmp_path / "moved.zarr")
    assert "--training cue=data/….zarr" in fails("select", "--real", real, *candidates)
    moved = [f"{name}={tmp_path / 'moved.zarr'}" for name in ("cue", "state")]
    assert main(["select", "--real", str(real), *candidates, "--training", *moved]) == 0
