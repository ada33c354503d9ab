"""Adding tasks to a trained policy without changing what it does in the ones it knows (SDP, Wang et al., CoRL 2024).

For each new task a router is added and, in each layer, new experts; only these are trained. Old experts can be chosen
by the new routers, old routers do not know the new experts. Without new experts only the routers are trained, which
the paper calls transfer.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from robopolicy.data.normalize import AffineNormalizer, Normalizer
from robopolicy.errors import UserError
from robopolicy.policies.base import Policy
from robopolicy.policies.sdp import Sdp
from robopolicy.spec import PolicySpec, TaskSpec, check_keys

FIRST_PREFERENCE = 1.0
"""Logit with which a new router starts for one of the new experts, the others at 0; see `extend_policy`."""


def extend_policy(old: Policy, spec: PolicySpec, normalizer: Normalizer, new_experts: int) -> Sdp:
    """A copy of a policy with tasks added, in which only what is new can be trained.

    In the old tasks the copy gives bit for bit the same actions, before and after training. All weights that were there
    have ``requires_grad=False``. The copy has the old sampler, and its `task_offset` is the number of old tasks.

    Each new router starts with a preference for one new expert. The published method leaves the start to chance: the
    first choice can be old experts alone, and then hardly anything is learned but the router.

    Args:
        old: trained on tasks, see `robopolicy.policies.sdp`.
        spec: of the new tasks' data, with its tasks; otherwise equal to the old one.
        normalizer: of the new tasks' data alone.
        new_experts: experts added in each layer; 0: transfer.

    Raises:
        UserError: a policy without task routers or without tasks, new data that does not fit it, or an instruction
            that it knows already.
    """
    if not isinstance(old, Sdp):
        raise UserError(
            f"Only policies with task routers can be extended, found {type(old).__name__}. Train one with policy=sdp "
            "on the first tasks."
        )
    if not old.spec.tasks:
        raise UserError(
            "The policy has no tasks: it was not told what it learned. Train it with task.multitask=true, so that its "
            "task has an instruction."
        )
    if new_experts < 0:
        raise UserError(f"new_experts={new_experts} must be at least 0.")
    check_fits(old.spec, spec)
    tasks = tuple(TaskSpec(task.instruction, old.spec.domains + task.domain) for task in spec.tasks)
    known = old.config.router_experts or (old.config.experts,) * len(old.spec.tasks)
    experts = old.config.experts + new_experts
    config = replace(old.config, experts=experts, router_experts=(*known, *(experts for _ in tasks)))
    keys = [k.key for k in (*old.spec.states, old.spec.action)]
    joined = Normalizer.from_parts({key: _followed_by(old.normalizer[key], normalizer[key]) for key in keys})
    policy = Sdp(config, replace(old.spec, tasks=(*old.spec.tasks, *tasks)), joined).to(old.device)
    parameters = dict(policy.named_parameters())
    with torch.no_grad():
        for name, value in old.named_parameters():
            parameters[name].copy_(value)
            parameters[name].requires_grad_(False)
        for i in range(len(tasks) if new_experts else 0):
            policy.denoiser.prefer(len(known) + i, old.config.experts + i % new_experts, FIRST_PREFERENCE)
    policy.denoiser.usage.continue_from(old.denoiser.usage)
    policy.sampler = old.sampler
    policy.task_offset = len(old.spec.tasks)
    return policy


def check_fits(old: PolicySpec, new: PolicySpec) -> None:
    """Compare the specs of a policy and of data to extend it with.

    Raises:
        UserError: keys, goals, horizons or rates differ, or there is no new task.
    """
    found = {k.key: k for k in (*new.observations, new.action)}
    wanted = (*old.observations, old.action)
    check_keys(found, wanted, "The new data and the policy")
    if extra := found.keys() - {k.key for k in wanted}:
        raise UserError(f"The policy does not know the new data's keys {sorted(extra)}; leave them out of the task.")
    for key in wanted:
        if found[key.key].angles != key.angles:
            raise UserError(f"{key.key}: found angles {found[key.key].angles} in the new data, wanted {key.angles}.")
    for name in ("n_obs_steps", "horizon", "n_action_steps", "fps", "goal_horizon"):
        ours, theirs = getattr(old, name), getattr(new, name)
        if ours != theirs:
            raise UserError(
                f"{name}: found {theirs} in the new task, wanted {ours}, as the policy has. Set task.{name}."
            )
    if {k.key for k in new.goals} != {k.key for k in old.goals}:
        goals = ",".join(k.key for k in old.goals)
        raise UserError(f"The new task and the policy differ in their goals. Set 'task.goals=[{goals}]'.")
    if not new.tasks:
        raise UserError("The new data has no tasks; set task.multitask=true.")
    for instruction in (task.instruction for task in new.tasks):
        if instruction in {task.instruction for task in old.tasks}:
            raise UserError(f"The policy already knows '{instruction}'. Name the new task with instruction=…")


def _followed_by(first: AffineNormalizer, second: AffineNormalizer) -> AffineNormalizer:
    """The domains of one normaliser, then those of another."""
    rows = {
        name: torch.cat([getattr(part, name).view(-1, part.scale.shape[-1]) for part in (first, second)])
        for name in ("scale", "offset", "low", "high")
    }
    domains, dim = rows["scale"].shape
    joined = AffineNormalizer(dim, domains)
    joined.load_state_dict(rows)
    return joined
