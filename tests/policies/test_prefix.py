"""Policies that continue what is committed: what they are shown, what their losses count, and that they continue it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from robopolicy.data.normalize import Normalizer, fit_normalizer
from robopolicy.errors import UserError
from robopolicy.manifest import read_manifest
from robopolicy.nets.denoiser import Denoiser
from robopolicy.nets.prefix import Prefix, known_actions, split_marks
from robopolicy.policies.bundle import load_bundle, save_bundle
from robopolicy.policies.consistency import ConsistencyConfig, ConsistencyPolicy
from robopolicy.policies.denoising import Noised
from robopolicy.policies.diffusion_unet import DiffusionUnet
from robopolicy.policies.prefix import prefix_steps
from robopolicy.policies.registry import build_policy
from robopolicy.spec import KeySpec, PolicySpec
from robopolicy.training.config import OptimConfig
from robopolicy.training.finetune import load_matching
from robopolicy.training.step import LossModule, build_optimizer, step_generator, train_step
from tests.policies.test_contract import FAMILIES, batch_of, generators
from tests.policies.test_contract import make as make_family

HORIZON, FIRST, ROWS = 8, 1, 64  # FIRST: entry of the newest observation
LONGEST = 3
TIME = torch.arange(HORIZON) / (HORIZON - 1)
CURVE = torch.stack([0.3 + 0.5 * TIME, 0.8 * torch.sin(torch.pi * TIME)], dim=-1)
"""One mode of the toy, (H, 2); the other is its mirror image."""

FLOW = {"process": {"name": "flow"}, "sampler": {"name": "euler", "steps": 6}}
MLP = ("diffusion_mlp", {"width": 64, "blocks": 2} | FLOW)
ONE_CALL = ("consistency_ac", {"hidden_dims": [64, 64], "levels": 20, "sampler": {"name": "consistency", "steps": 1}})
UNET = {"down_dims": [32], "step_embed_dim": 16, "process": {"name": "edm", "sigma_min": 0.02, "sigma_max": 80.0}}


def make(name, config, **changes):
    torch.manual_seed(0)
    spec = PolicySpec((KeySpec("observation.state", (2,)),), KeySpec("action", (2,), role="action"), 10, 2, HORIZON, 4)
    corners = np.array([[-1.0, -1.0], [1.0, 1.0]])
    parts = {key: fit_normalizer(corners, "minmax") for key in ("observation.state", "action")}
    return build_policy(name, config | changes, spec, Normalizer.from_parts(parts))


def sides(rows):
    return torch.tensor([-1.0, 1.0]).repeat(rows // 2)


def two_modes(rows=ROWS):
    """The same observation; half of the demonstrations follow the curve, half its mirror image."""
    return {"observation.state": torch.zeros(rows, 2, 2), "action": sides(rows)[:, None, None] * CURVE}


def fit(policy, steps, lr=3e-3):
    policy.train()
    optimizer, module, batch = build_optimizer(policy, OptimConfig()), LossModule(policy), two_modes()
    for step in range(steps):
        policy.training_progress = step / steps
        draws = policy.draw(ROWS, step_generator(0, step))
        train_step(module, optimizer, batch, draws, lr=lr * (1 - step / steps), clip_norm=1.0)
    return policy.eval()


@torch.no_grad()
def sampled(policy, previous, mask):
    """Chunks of the sampler's graph, from the same noise each time."""
    rows = len(previous)
    graphs = policy.export_graphs({"observation.state": torch.zeros(rows, 2, 2)})
    noise = torch.randn(graphs["sampler"].inputs[0].shape, generator=torch.Generator().manual_seed(0))
    return graphs["sampler"].module(noise, previous, mask, *graphs["encoder"].module(*graphs["encoder"].inputs))


def continued(policy, known, rows=200):
    """Share of chunks that stay in the mode of their first ``known`` actions, to their end."""
    mask = torch.zeros(rows, HORIZON)
    mask[:, FIRST : FIRST + known] = 1
    chunk = sampled(policy, two_modes(rows)["action"], mask)
    rest = chunk[:, FIRST + known :, 0]
    return (rest.sign() == sides(rows)[:, None]).all(dim=1).float().mean().item()


def test_a_multi_step_policy_continues_the_mode_of_its_prefix():
    policy = fit(make(*MLP, prefix_steps=LONGEST), 350)
    assert 0.3 < continued(policy, 0) < 0.6  # free chunks choose for themselves
    assert min(continued(policy, known) for known in (1, 2, 3)) > 0.9


def test_a_one_call_policy_continues_only_if_it_learned_to():
    """One clean estimate decides the whole chunk: keeping its beginning afterwards does not move the rest."""
    trained, plain = (fit(make(*ONE_CALL, prefix_steps=steps), 400) for steps in (LONGEST, 0))
    assert trained.network_calls == plain.network_calls == 1
    assert min(continued(trained, known) for known in (2, 3)) > 0.9
    assert max(continued(plain, known) for known in (1, 2, 3)) < 0.65
    assert 0.3 < continued(trained, 0) < 0.6


def test_a_longer_prefix_than_trained_is_shown_as_far_as_trained():
    policy = fit(make(*MLP, prefix_steps=2), 250)
    previous = two_modes(40)["action"]
    mask = torch.zeros(40, HORIZON)
    mask[:, FIRST : FIRST + 5] = 1
    seen = []
    policy.denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    chunk = sampled(policy, previous, mask)
    _, marks = split_marks(seen[0], 2)
    assert marks[0, :, 0].tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert torch.equal(chunk[:, FIRST : FIRST + 5], previous[:, FIRST : FIRST + 5])
    assert continued(policy, 5) > 0.9


class ExactTeacher(DiffusionUnet):
    """The exact denoiser of the two modes, also where actions are known."""

    def clean(self, x, t, noise, cond, prefix=None):
        free = (x * CURVE).sum((1, 2)) / t**2
        if prefix is not None:
            kept = prefix.known.squeeze(-1)
            inside = torch.where(prefix.known, prefix.actions * CURVE, 0.0).sum((1, 2))
            free = torch.where(kept.any(dim=1), 1e3 * inside, free)
        return torch.tanh(free)[:, None, None] * CURVE


def make_student(steps):
    plain = make("diffusion_unet", UNET, prefix_steps=steps)
    teacher = ExactTeacher(plain.config, plain.spec, plain.normalizer)
    config = ConsistencyConfig(
        down_dims=(32,), step_embed_dim=16, process=plain.config.process, prefix_steps=steps, bins=10
    )
    torch.manual_seed(1)
    return ConsistencyPolicy.student(teacher, config)


def test_a_distilled_policy_continues_as_its_teacher_does_in_one_call():
    student = fit(make_student(LONGEST), 80)
    student.sampler = type(student.sampler)("consistency", 1)
    assert min(continued(student, known) for known in (2, 3)) > 0.9
    assert 0.3 < continued(student, 0) < 0.7


def test_the_teacher_is_shown_what_its_student_is_shown():
    student = make_student(LONGEST)
    batch, draws = two_modes(), student.draw(ROWS, step_generator(0, 0))
    seen = []
    hook = student.denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(split_marks(inputs[0], 2)[1]))
    taught = student.teacher.clean
    student.teacher.clean = lambda *inputs, prefix: (seen.append(prefix.shown(inputs[0])[..., 2:]), taught(*inputs))[1]
    student.loss(batch, draws)
    hook.remove()
    wanted = Prefix(batch["action"], known_actions(student.spec, draws["prefix"])).shown(batch["action"])[..., 2:]
    # g for both losses in one call; the teacher twice (Heun); the student's ways to the end, and the target's two jumps
    assert len(seen) == 6 and len(seen[0]) == 2 * ROWS
    for marks in (*seen[0].chunk(2), *seen[1:]):
        torch.testing.assert_close(marks, wanted, rtol=0, atol=1e-6)


def test_a_student_knows_as_much_as_its_teacher():
    teacher = make("diffusion_unet", UNET, prefix_steps=2)
    config = ConsistencyConfig(down_dims=(32,), step_embed_dim=16, process=teacher.config.process)
    with pytest.raises(UserError, match="prefix_steps is 0, the teacher has 2"):
        ConsistencyPolicy.student(teacher, config)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_sample_knows_0_to_all_of_its_prefix_with_equal_probability(family):
    policy = make_family(family, prefix_steps=LONGEST)
    drawn = policy.draw_prefix(8000, step_generator(0, 0))  # of all draws alone: others can be large
    shares = drawn["prefix"].bincount(minlength=LONGEST + 1) / 8000
    assert len(shares) == LONGEST + 1
    assert (shares - 1 / (LONGEST + 1)).abs().max() < 5 * (0.25 * 0.75 / 8000) ** 0.5
    assert "prefix" in policy.draw(2, step_generator(0, 0))


def test_known_actions_begin_at_the_newest_observation():
    spec = make(*MLP).spec
    known = known_actions(spec, torch.tensor([0, 1, 3]))[..., 0].int().tolist()
    assert known == [[0] * 8, [0, 1, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0, 0, 0]]


def with_noise(draws, where):
    """The draws with other noise where it is said, (B, H, 1)."""
    other = torch.randn(draws["noise"].shape, generator=torch.Generator().manual_seed(9))
    names = [name for name in ("noise", "dsm_noise") if name in draws]
    return draws | {name: torch.where(where, other, draws[name]) for name in names}


@pytest.mark.parametrize("family", [*FAMILIES, "distilled"])
def test_losses_count_and_networks_see_what_is_not_known(family):
    """Nothing depends on the noise that known actions would have; their values are seen."""
    policy = make_student(LONGEST) if family == "distilled" else make_family(family, prefix_steps=LONGEST)
    batch = two_modes() if family == "distilled" else batch_of(policy, 16)
    with torch.no_grad():
        for parameter in policy.parameters():  # heads that start at zero would see nothing
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        draws = policy.draw(len(batch["action"]), step_generator(0, 0))
        known = known_actions(policy.spec, draws["prefix"])
        loss = policy.loss(batch, draws)
        assert known.any() and torch.equal(policy.loss(batch, with_noise(draws, known)), loss)
        assert not torch.equal(policy.loss(batch, with_noise(draws, ~known)), loss)
        unknown = draws | {"prefix": torch.zeros_like(draws["prefix"])}
        assert not torch.equal(policy.loss(batch, with_noise(unknown, known)), policy.loss(batch, unknown))
        moved = batch | {"action": torch.where(known, 0.5 * batch["action"], batch["action"])}
        assert not torch.equal(policy.loss(moved, draws), loss)


@pytest.mark.parametrize("family", [*FAMILIES, "distilled"])
def test_losses_do_not_care_what_is_predicted_for_known_actions(family):
    policy = make_student(LONGEST) if family == "distilled" else make_family(family, prefix_steps=LONGEST)
    batch = two_modes() if family == "distilled" else batch_of(policy, 16)
    draws = policy.draw(len(batch["action"]), step_generator(0, 0))
    known = known_actions(policy.spec, draws["prefix"])
    with torch.no_grad():
        loss = policy.loss(batch, draws)
        for where, counts in ((known, False), (~known, True)):

            def change(_, inputs, prediction, where=where):
                return prediction + where.repeat(len(prediction) // len(where), 1, 1)

            module = policy.denoiser.head if family == "sdp" else policy.denoiser  # sdp's loss calls no forward
            hook = module.register_forward_hook(change)
            assert torch.equal(policy.loss(batch, draws), loss) != counts
            hook.remove()


def test_the_ground_truth_of_known_actions_is_no_target():
    """And every sample counts the same, however much of it is known."""
    target = torch.zeros(2, 4, 1, requires_grad=True)
    known = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool).unsqueeze(-1)
    prediction = torch.tensor([[9.0, 9.0, 2.0, 4.0], [1.0, 1.0, 1.0, 3.0]]).unsqueeze(-1)
    seen = Noised(prediction, torch.zeros(2), (), target, Prefix(target.detach(), known))
    error = seen.error(prediction)
    assert error.item() == ((4 + 16) / 2 + (1 + 1 + 1 + 9) / 4) / 2
    error.backward()
    assert torch.equal(target.grad.squeeze(-1) == 0, known.squeeze(-1))
    assert Noised(prediction, torch.zeros(2), (), target).error(prediction).item() == (81 * 2 + 4 + 16 + 12) / 8


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_committed_comes_back_bit_for_bit(family):
    """Also where it is past, lies beyond what was trained, or outside the range of the data; soft entries are mixed."""
    policy = make_family(family, low=10.0, high=30.0, prefix_steps=2).eval()
    previous = torch.linspace(3.0, 37.0, 4 * 8 * 2).view(4, 8, 2)
    mask = torch.zeros(4, 8)
    mask[1, :2], mask[2, :6], mask[3, :3], mask[3, 3] = 1, 1, 1, 0.5
    chunk, free = sampled(policy, previous, mask), sampled(policy, previous, torch.zeros(4, 8))
    assert torch.equal(chunk[mask == 1], previous[mask == 1])
    torch.testing.assert_close(chunk[0], free[0])
    assert (chunk[3, 3] - free[3, 3]).abs().max() > 1e-3
    assert torch.equal(sampled(policy, torch.full_like(previous, 20.0), torch.zeros(4, 8)), free)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_prefix_a_policy_is_what_it_was(family):
    """The option adds one layer, which the others neither see nor need: a policy can be fine-tuned with it."""
    plain, longer = (make_family(family, prefix_steps=steps).eval() for steps in (0, LONGEST))
    more = set(longer.state_dict()) - set(plain.state_dict())
    assert len(more) == 1 and more.pop().endswith("known.weight")
    assert set(plain.state_dict()) <= set(longer.state_dict())
    assert "prefix" not in plain.draw(4, step_generator(0, 0))
    absent = make_family(family).eval()
    assert all(torch.equal(value, absent.state_dict()[name]) for name, value in plain.state_dict().items())
    load_matching(longer, plain)
    batch = batch_of(plain, 4)
    observations = {key: value for key, value in batch.items() if key != "action"}
    assert torch.equal(plain.sample(observations, generators(4)), longer.sample(observations, generators(4)))
    draws = plain.draw(4, step_generator(0, 0))
    assert torch.equal(plain.loss(batch, draws), longer.loss(batch, draws))


def test_without_a_prefix_the_loss_is_the_plain_one():
    policy = make(*MLP)
    batch, draws = two_modes(), policy.draw(ROWS, step_generator(0, 0))
    process, t, noise = policy.process, draws["t"], draws["noise"]
    clean = policy.normalizer["action"].normalize(batch["action"])
    x = process.network_input(process.add_noise(clean, noise, t), t)
    cond = policy.denoiser.condition(policy.encoder(policy.normalized(batch)))
    prediction = policy.denoiser(x, policy.denoiser.embed(process.network_level(t)), cond)
    wanted = torch.nn.functional.mse_loss(prediction, process.target(clean, noise, t))
    assert torch.equal(policy.loss(batch, draws), wanted)


def test_every_denoiser_takes_marks():
    """A family whose network forgets them would sample as if nothing were committed."""
    for family in FAMILIES:
        policy = make_family(family, prefix_steps=2)
        denoiser = policy.denoiser
        assert isinstance(denoiser, Denoiser)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            batch = batch_of(policy, 2)
            cond = denoiser.condition(policy.encoder(policy.normalized(batch)))
            level = denoiser.embed(policy.process.network_level(torch.tensor([0.5])))
            x = torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(2))
            marked = Prefix(x, known_actions(policy.spec, torch.tensor([0, 2]))).shown(x)  # in place: only the marks
            seen, blind = denoiser(marked, level, cond), denoiser(x, level, cond)
        torch.testing.assert_close(seen[0], blind[0])
        assert (seen[1] - blind[1]).abs().max() > 1e-4, family


def test_impossible_prefixes_are_refused():
    with pytest.raises(UserError, match="prefix_steps=-1 must be at least 0"):
        make(*MLP, prefix_steps=-1)
    with pytest.raises(UserError, match=r"prefix_steps=7 must lie in 0..6 \(horizon 8 - n_obs_steps 2\)"):
        make(*MLP, prefix_steps=7)
    make(*MLP, prefix_steps=6)


def test_a_robot_reads_it_off_the_bundle_and_older_bundles_have_none(tmp_path):
    policy = make(*MLP, prefix_steps=LONGEST).eval()
    save_bundle(policy, tmp_path / "new")
    assert prefix_steps(read_manifest(tmp_path / "new")) == LONGEST
    loaded, _ = load_bundle(tmp_path / "new")
    assert loaded.config.prefix_steps == LONGEST

    plain = make(*MLP).eval()
    save_bundle(plain, tmp_path / "old")
    file = tmp_path / "old" / "bundle.yaml"
    manifest = yaml.safe_load(file.read_text())
    assert manifest["architecture"]["config"].pop("prefix_steps") == 0  # as before there was such an option
    file.write_text(yaml.safe_dump(manifest))
    assert prefix_steps(read_manifest(tmp_path / "old")) == 0
    loaded, _ = load_bundle(tmp_path / "old")
    observations = {"observation.state": np.zeros((3, 2, 2))}
    np.testing.assert_array_equal(loaded.act(observations, generators(3)), plain.act(observations, generators(3)))


def test_reading_it_needs_no_torch():
    code = "import sys; import robopolicy.policies.prefix; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
