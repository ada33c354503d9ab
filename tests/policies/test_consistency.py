"""Consistency policies: what distillation starts from, what it changes, and what both trainings arrive at."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from robopolicy.data.normalize import Normalizer, fit_normalizer
from robopolicy.errors import UserError
from robopolicy.policies.bundle import load_bundle, save_bundle
from robopolicy.policies.consistency import ConsistencyConfig, ConsistencyPolicy
from robopolicy.policies.diffusion_unet import DiffusionUnet, DiffusionUnetConfig
from robopolicy.policies.registry import build_policy
from robopolicy.spec import KeySpec, PolicySpec
from robopolicy.training.config import OptimConfig
from robopolicy.training.step import LossModule, build_optimizer, learning_rate, step_generator, train_step

NET = {"down_dims": [32], "step_embed_dim": 16, "process": {"name": "edm", "sigma_min": 0.02, "sigma_max": 80.0}}
STATE, IMAGE = KeySpec("observation.state", (2,)), KeySpec("observation.image.top", (40, 40, 3), role="image")
ROWS, HORIZON = 64, 4


def make(name, images=False, **config):
    torch.manual_seed(0)
    keys = (STATE, IMAGE) if images else (STATE,)
    spec = PolicySpec(keys, KeySpec("action", (2,), role="action"), 10, 2, HORIZON, 2)
    corners = np.array([[-1.0, -1.0], [1.0, 1.0]])
    parts = {key: fit_normalizer(corners, "minmax") for key in ("observation.state", "action")}
    return build_policy(name, NET | config, spec, Normalizer.from_parts(parts))


def make_student(teacher=None, **changes):
    teacher = teacher or make("diffusion_unet", sampler={"name": "heun", "steps": 8})
    config = ConsistencyConfig(down_dims=(32,), step_embed_dim=16, process=teacher.config.process)
    student = ConsistencyPolicy.student(teacher, replace(config, **changes))
    torch.manual_seed(1)
    return student


def fork():
    """Half of the demonstrations go left, half right; a regression would go straight ahead."""
    side = torch.tensor([-0.8, 0.8]).repeat(ROWS // 2)
    return {"observation.state": torch.zeros(ROWS, 2, 2), "action": side[:, None, None].repeat(1, HORIZON, 2)}


def random_batch(rows=8, images=False):
    batch = {"observation.state": torch.rand(rows, 2, 2), "action": torch.rand(rows, HORIZON, 2)}
    return batch | ({IMAGE.key: torch.randint(0, 256, (rows, 2, *IMAGE.shape), dtype=torch.uint8)} if images else {})


def fit(policy, batch, steps, lr=1e-3):
    config = OptimConfig(lr=lr, warmup_steps=1)
    optimizer, module = build_optimizer(policy, config), LossModule(policy)
    for step in range(steps):
        policy.training_progress = step / steps
        draws = policy.draw(len(batch["action"]), step_generator(0, step))
        train_step(module, optimizer, batch, draws, lr=learning_rate(config, step, steps), clip_norm=1.0)
    return policy.eval()


def act(policy, steps=None, rows=400):
    """The first action's first entry at the fork, with the same noise each time."""
    if steps is not None:
        policy.sampler = replace(policy.sampler, name="consistency", steps=steps)
    generators = [torch.Generator().manual_seed(i) for i in range(rows)]
    return policy.act({"observation.state": np.zeros((rows, 2, 2))}, generators)[:, 0, 0]


def levels(*values):
    return torch.tensor(values)


def test_before_training_the_student_is_its_teacher_for_all_stop_levels():
    student = make_student()
    x, t = torch.randn(4, HORIZON, 2), levels(0.1, 1.0, 10.0, 80.0)
    context = student.encoder(student.normalized(random_batch(4)))
    cond, teacher_cond = student.denoiser.condition(context), student.teacher.denoiser.condition(context)
    wanted = student.teacher.clean(x, t, student.teacher.denoiser.embed(student.process.network_level(t)), teacher_cond)
    for stop in (0.02, 0.05, 0.1):
        assert torch.equal(student.estimate(x, t, torch.full((4,), stop), cond), wanted)
    assert torch.equal(student.jump(x, t, t, cond), x)


def test_training_makes_the_stop_level_matter():
    student = fit(make_student(), random_batch(), 4)
    x, t = torch.randn(4, HORIZON, 2), torch.full((4,), 10.0)
    cond = student.denoiser.condition(student.encoder(student.normalized(random_batch(4))))
    assert not torch.equal(student.estimate(x, t, t, cond), student.estimate(x, t, t / 10, cond))


def test_only_the_students_denoiser_is_trained():
    teacher = make("diffusion_unet", images=True)
    student = make_student(teacher)
    assert not student.teacher.training
    before = copy.deepcopy(student)
    fit(student, random_batch(images=True), 2)
    for name, value in student.encoder.state_dict().items():
        assert torch.equal(value, before.encoder.state_dict()[name])
    for name, value in student.teacher.state_dict().items():
        assert torch.equal(value, teacher.state_dict()[name])
    assert all(p.grad is None for p in student.teacher.parameters())
    moved = [n for n, p in student.denoiser.named_parameters() if not torch.equal(p, before.denoiser.get_parameter(n))]
    assert moved == [n for n, _ in student.denoiser.named_parameters()]


def test_continued_jumps_pass_the_gradient_on_but_take_none():
    student = make_student()
    x = torch.randn(4, HORIZON, 2, requires_grad=True)
    context = student.encoder(student.normalized(random_batch(4)))
    fixed = tuple(c.detach() for c in student.denoiser.condition(context))
    t = levels(0.1, 1.0, 10.0, 80.0)
    end = torch.full((4,), 0.02)
    student.jump(x, t, end, fixed, frozen=True).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in student.parameters())
    torch.testing.assert_close(student.jump(x, t, end, fixed, frozen=True), student.jump(x, t, end, fixed))


class Gaussian(ConsistencyPolicy):
    """A student that jumps along the exact ODE for data N(0.3, 0.6^2), all actions independent, times ``1 + off``."""

    off = 0.0

    def estimate(self, x, t, s, cond, frozen=False):
        t, s = (level.view(-1, 1, 1).double() for level in (t, s))
        s = torch.minimum(s, t * 0.999)  # g(x, t, t) is a limit
        jumped = 0.3 + ((s**2 + 0.36) / (t**2 + 0.36)).sqrt() * (x.double() - 0.3)
        return (1 + self.off) * ((jumped - s / t * x) / (1 - s / t)).float()


class GaussianTeacher(DiffusionUnet):
    def clean(self, x, t, noise, cond):
        return 0.3 + 0.36 / (0.36 + t.view(-1, 1, 1) ** 2) * (x - 0.3)


def test_the_exact_solution_is_the_minimum_of_distillation():
    plain = make("diffusion_unet")
    teacher = GaussianTeacher(plain.config, plain.spec, plain.normalizer)
    config = ConsistencyConfig(down_dims=(32,), step_embed_dim=16, process=teacher.config.process, dsm_weight=0.0)
    student = Gaussian.student(teacher, config)
    batch = {"observation.state": torch.zeros(512, 2, 2), "action": 0.3 + 0.6 * torch.randn(512, HORIZON, 2)}
    draws = student.draw(512, step_generator(0, 0))
    exact = student.loss(batch, draws)
    losses = []
    for off in (-0.1, 0.1):
        student.off = off
        losses.append(student.loss(batch, draws))
    assert exact < 2e-3 and min(losses) > 10 * exact


def test_score_matching_is_weighted_and_has_the_teachers_loss():
    """With the teacher's weights, at equal levels and noise, it is the loss that the teacher was trained with."""
    student = make_student(dsm_weight=3.0)
    batch, draws = random_batch(), student.draw(8, step_generator(0, 0))
    without = make_student(dsm_weight=0.0).loss(batch, draws)
    same = {"t": draws["dsm_t"], "noise": draws["dsm_noise"]}
    wanted = without + 3 * student.teacher.loss(batch, same)
    torch.testing.assert_close(student.loss(batch, draws), wanted)


@pytest.mark.parametrize("distilled", [True, False])
def test_loss_is_a_function_of_batch_and_draws(distilled):
    policy = make_student() if distilled else make("consistency")
    batch, draws = random_batch(16), policy.draw(16, step_generator(0, 5))
    whole = policy.loss(batch, draws)
    assert torch.equal(whole, policy.loss(batch, policy.draw(16, step_generator(0, 5))))
    halves = [
        policy.loss({k: v[part] for k, v in batch.items()}, {k: v[part] for k, v in draws.items()})
        for part in (slice(0, 8), slice(8, 16))
    ]
    torch.testing.assert_close(whole, sum(halves) / 2)


def test_the_teacher_moves_and_copies_with_the_student_and_is_not_saved(tmp_path):
    student = make_student()
    moved = copy.deepcopy(student).double()
    assert moved.teacher.device == moved.device and next(moved.teacher.parameters()).dtype == torch.float64
    assert next(student.teacher.parameters()).dtype == torch.float32
    assert not any("teacher" in name for name in student.state_dict())
    assert len(list(student.parameters())) == len(list(student.teacher.parameters())) + 1
    save_bundle(student.eval(), tmp_path / "bundle")
    loaded, _ = load_bundle(tmp_path / "bundle")
    assert loaded.teacher is None and loaded.config == student.config
    np.testing.assert_array_equal(act(loaded, 2, rows=4), act(student, 2, rows=4))


def test_start_deviation_is_the_noise_that_sampling_starts_from():
    """From little noise, as the paper's release starts, one step hardly depends on it."""
    honest, released = (make_student(start_deviation=deviation).eval() for deviation in (None, 1.0))
    assert (honest.process.largest_noise, released.process.largest_noise) == (80.0, 1.0)
    assert act(released, 1).std() < 0.2 * act(honest, 1).std()


def test_network_calls_are_the_steps():
    policy = make("consistency", sampler={"name": "consistency", "steps": 3})
    assert policy.network_calls == 3
    policy.check_sampler(replace(policy.sampler, steps=1))
    with pytest.raises(UserError, match="Unknown sampler 'heun'"):
        policy.check_sampler(replace(policy.sampler, name="heun"))


def test_impossible_students_are_refused():
    with pytest.raises(UserError, match="process.name='ddpm' must be one of 'edm'"):
        make("consistency", process={"name": "ddpm"})
    with pytest.raises(UserError, match="dsm_weight=-1.0 must be at least 0"):
        make("consistency", dsm_weight=-1.0)
    teacher = make("diffusion_unet")
    other = DiffusionUnetConfig(**{**vars(teacher.config), "down_dims": (16,)})
    with pytest.raises(UserError, match="down_dims"):
        make_student(DiffusionUnet(other, teacher.spec, teacher.normalizer))


class ForkTeacher(DiffusionUnet):
    """The exact denoiser of the fork."""

    def clean(self, x, t, noise, cond):
        return 0.8 * torch.tanh(0.8 * x.sum((1, 2), keepdim=True) / t.view(-1, 1, 1) ** 2).expand_as(x)


def test_a_distilled_policy_gives_its_teachers_chunks_in_one_call():
    plain = make("diffusion_unet")
    teacher = ForkTeacher(plain.config, plain.spec, plain.normalizer)
    student = fit(make_student(teacher, bins=10), fork(), 150, lr=3e-3)
    teacher.sampler = replace(teacher.sampler, name="heun", steps=40)
    slow, fast = act(teacher.eval()), act(student, 1)
    assert ((slow > 0) == (fast > 0)).mean() > 0.9
    assert np.median(np.abs(slow - fast)) < 0.2
    assert 0.4 < (fast > 0).mean() < 0.6 and (np.abs(fast) > 0.4).mean() > 0.9


def test_training_without_a_teacher_finds_both_modes_of_a_fork_and_never_the_mean():
    policy = fit(make("consistency"), fork(), 200, lr=3e-3)
    for steps in (1, 3):
        chunk = act(policy, steps)
        assert 0.4 < (chunk > 0).mean() < 0.6
        assert (np.abs(chunk) > 0.4).mean() > 0.97
