"""A chunk of LeRobot's DiffusionPolicy, computed as its users do on a robot."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.diffusion.processor_diffusion import make_diffusion_pre_post_processors
from lerobot.utils.control_utils import predict_action

from peers.lerobot_policy import Batch, _statistics


def lerobot_chunk(policy: DiffusionPolicy, example: Batch) -> Callable[[dict[str, np.ndarray]], torch.Tensor]:
    """A call in which a chunk is computed; LeRobot makes one in each `n_action_steps` control steps.

    It is `predict_action` of LeRobot 0.4.4, which its recording and evaluation on robots call: NumPy arrays to tensors,
    pre-processor (which normalises), `select_action`, post-processor. With empty queues, as here, `select_action`
    computes a chunk and returns its first action; the queue of observations is filled with copies of this one, which
    costs LeRobot nothing.

    Args:
        policy: the policy.
        example: a batch whose statistics stand for those of the dataset.

    Returns:
        A function of one observation by LeRobot's keys, without a batch: states (D,) float32, images (H, W, 3) uint8.
    """
    preprocess, postprocess = make_diffusion_pre_post_processors(policy.config, _statistics(example))
    device = torch.device("cpu")
    policy.eval()

    def chunk(observation: dict[str, np.ndarray]) -> torch.Tensor:
        policy.reset()
        return predict_action(observation, policy, device, preprocess, postprocess, use_amp=False)

    return chunk
