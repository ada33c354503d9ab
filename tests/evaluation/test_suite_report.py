"""The report of a suite is one file; it shows every setting, factor, stage and episode, and its videos say where."""

from __future__ import annotations

import re
import shutil

import pytest

pytest.importorskip("robopolicy_sim", reason="needs the simulator: pip install 'robopolicy[sim]'")
from robopolicy.cli.main import main
from robopolicy.errors import UserError
from robopolicy.evaluation.evaluate import evaluate, evaluate_suite
from robopolicy.evaluation.suite import load_suite
from robopolicy.evaluation.suite_results import SuiteResult

from . import sliding
from .sliding import Slider
from .test_evaluate import Page
from .test_suite import written

SUITE = """
name: two_kinds
settings:
  - {factor: base}
  - {factor: friction, levels: [0.2, 0.4], at_base: 0}
  - {factor: camera_yaw, level: 0.1, in_aggregate: false}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    suite = load_suite(written(folder, SUITE))
    with sliding.registered():
        for name, speed in (("fast", 1.0), ("slow", 0.5)):
            evaluate_suite(
                Slider(speed), "slide", suite, folder / name, episodes=12, videos=5, progress=False,
                policy_info={"fingerprint": f"{name}123"},
            )  # fmt: skip
        evaluate(Slider(), "slide", episodes=2, videos=0, out=folder / "single", progress=False)
    return folder


@pytest.fixture(scope="module")
def text(folder) -> str:
    return (folder / "fast" / "report.html").read_text()


def test_the_report_is_one_file_that_needs_nothing_else(text):
    page = Page(text)
    assert page.open == []
    videos = [a for a in page.addresses if a.startswith("data:video/mp4;base64,")]
    assert all(len(v) > 1000 for v in videos)
    for address in set(page.addresses) - set(videos):
        assert address.startswith("#") and address[1:] in page.ids, address
    assert not re.search(r"@import|url\((?!#)|<script", text)


def test_a_report_without_the_videos_that_somebody_deleted(folder, tmp_path):
    for kind, single in (("suite", "fast"), ("setting", "fast/settings/base")):
        copy = tmp_path / kind
        shutil.copytree(folder / single, copy)
        for video in copy.rglob("*.mp4"):
            video.unlink()
        assert main(["compare", str(copy), str(copy), "--out", str(tmp_path / f"{kind}.html")]) == 0
        assert "<video" not in (tmp_path / f"{kind}.html").read_text()


def test_one_setting_is_not_written_over_a_suite(folder):
    with sliding.registered(), pytest.raises(UserError, match="holds a suite"):
        evaluate(Slider(), "slide", episodes=2, videos=0, out=folder / "fast", progress=False)


def test_every_setting_has_a_bar_an_interval_and_a_drop(folder, text):
    result = SuiteResult.load(folder / "fast")
    for s in result.settings:
        assert f"<strong>{s.rate.value:.3f}</strong>" in text and f"{s.rate.low:.3f} … {s.rate.high:.3f}" in text
    for factor in result.factors:
        assert f"{factor.drop.value:+.3f}" in text
    bars = re.findall(r'<b style="width:([\d.]+)%"></b>.*?<u style="left:([\d.]+)%">', text, re.DOTALL)
    assert {float(left) for _, left in bars} == {100 * result.base.rate.value}
    widths = [result.base.rate, result.factors[0].rate, *(s.rate for s in result.settings[1:])]
    assert [float(width) for width, _ in bars] == pytest.approx([100 * m.value for m in widths])
    assert text.count("not in the aggregate") == 1


def test_videos_come_failures_first_over_all_settings_and_name_theirs(text):
    captions = re.findall(r"<figcaption>.*?>(success|failure)<.*?<strong>(.*?)</strong>", text, re.DOTALL)
    assert len(captions) == 8  # five, spread over four settings and rounded up
    outcomes = [outcome for outcome, _ in captions]
    assert outcomes == sorted(outcomes)
    assert {name for _, name in captions} == {"base", "friction 0.2", "friction 0.4", "camera yaw 0.1"}


def test_stages_episodes_curve_and_protocol_are_there(folder, text):
    result = SuiteResult.load(folder / "fast")
    assert "halfway" in text and "at the middle" in text
    assert len(re.findall(r'<i class="(?:yes|no)" title=', text)) == 4 * 12
    assert 'aria-label="Success rate against friction"' in text
    assert 'aria-label="Success rate against camera yaw"' not in text  # one level is no curve
    assert result.protocol.hash in text and "fast123" in text and "mujoco" in text


def test_the_report_of_a_setting_shows_stages_and_instructions(folder):
    text = (folder / "fast" / "settings" / "base" / "report.html").read_text()
    assert Page(text).open == []
    assert "Stages reached" in text and "go left" in text and "Success by instruction" in text


def test_compare_on_two_suites(folder, tmp_path, capsys):
    out = tmp_path / "comparison.html"
    assert main(["compare", str(folder / "fast"), str(folder / "slow"), "--out", str(out)]) == 0
    a, b = (SuiteResult.load(folder / name) for name in ("fast", "slow"))
    printed, page = capsys.readouterr().out, out.read_text()
    difference = f"{a.aggregate.value - b.aggregate.value:+.3f}"
    assert re.search(rf"aggregate +\{difference} ", printed)
    assert Page(page).open == [] and f"<strong>{difference}</strong>" in page and "data:video/mp4" in page


def test_a_suite_is_not_compared_with_one_setting(folder, capsys):
    assert main(["compare", str(folder / "single"), str(folder / "fast")]) == 2
    assert f"{folder / 'fast'} holds a suite, {folder / 'single'} the evaluation of one" in capsys.readouterr().err
