from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from robopolicy.evaluation.compare import compare
from robopolicy.evaluation.evaluate import evaluate
from robopolicy.evaluation.report import write_report
from robopolicy.evaluation.results import EvaluationResult

from .conftest import RandomPusher

VOID = {"meta", "link", "img", "br", "hr", "input", "source"}


class Page(HTMLParser):
    """Collects every address on a page and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.addresses += [v for k, v in values.items() if k in {"src", "href", "xlink:href", "poster", "srcset"}]
        self.ids += [values["id"]] if "id" in values else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def run(out=None, spread=60.0, **kwargs) -> EvaluationResult:
    return evaluate(RandomPusher(spread=spread), "pusht", episodes=4, max_steps=25, out=out, progress=False, **kwargs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    info = {"fingerprint": "abc123", "sampler": "ddim-16"}
    run(out, videos=2, policy_info=info, training_curve=[(0, 0.1), (100, 0.4)])
    return out


def test_everything_is_written(folder):
    assert {p.name for p in folder.iterdir()} == {
        "protocol.json",
        "episodes.jsonl",
        "summary.json",
        "videos",
        "report.html",
    }
    result = EvaluationResult.load(folder)
    filmed = [e.video for e in result.episodes if e.video]
    assert {p.name for p in (folder / "videos").iterdir()} == {"grid.mp4", *(v.removeprefix("videos/") for v in filmed)}
    assert len(filmed) == 2


def test_the_protocol_says_what_was_done(folder):
    protocol = json.loads((folder / "protocol.json").read_text())
    task, policy = protocol["task"], protocol["policy"]
    assert (task["environment"], task["max_steps"], task["seeds"]) == ("pusht", 25, [100000, 100001, 100002, 100003])
    assert set(task["versions"]) >= {"gym-pusht", "pymunk", "numpy"}
    assert (policy["fingerprint"], policy["sampler"], policy["n_action_steps"]) == ("abc123", "ddim-16", 8)
    assert "torch" in policy


def test_an_evaluation_without_folder_gives_the_same_numbers(folder):
    numbers = [(m.value, m.low, m.high, m.n) for m in run().metrics]
    assert str(numbers) == str([(m.value, m.low, m.high, m.n) for m in EvaluationResult.load(folder).metrics])


def test_the_report_is_one_file_that_needs_nothing_else(folder):
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    videos = [a for a in page.addresses if a.startswith("data:video/mp4;base64,")]
    assert len(videos) == 2 and all(len(v) > 1000 for v in videos)
    for address in set(page.addresses) - set(videos):
        assert address.startswith("#") and address[1:] in page.ids, address
    assert not re.search(r"@import|url\((?!#)|<script", text)


def test_the_report_shows_the_numbers_with_intervals_and_every_episode(folder):
    text = (folder / "report.html").read_text()
    result = EvaluationResult.load(folder)
    for name in ("mean_score", "success_rate"):
        metric = result.metric(name)
        assert f"{metric.low:.3f} … {metric.high:.3f}, n = 4" in text
    assert all(f'id="seed-{e.seed}"' in text for e in result.episodes)
    assert result.protocol.hash in text and "abc123" in text and "training step" in text
    assert "against" not in text


def test_a_comparison_becomes_a_section_and_names_are_escaped(folder, tmp_path):
    a, b = EvaluationResult.load(folder), run(spread=5.0)
    path = folder / "compared.html"
    write_report(a, path, comparison=compare(a, b, label_a="<b>$x</b>", label_b="narrow"), title="A & B")
    text = path.read_text()
    assert Page(text).open == []
    assert "<h1>A &amp; B</h1>" in text and "&lt;b&gt;$x&lt;/b&gt; against narrow" in text and "<b>$x" not in text
    assert "McNemar" in text
    path.unlink()
