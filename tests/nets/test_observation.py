import math

import pytest
import torch

from robopolicy.data.augment import AugmentConfig
from robopolicy.errors import UserError
from robopolicy.nets.images import ResNetKeypointEncoder, SpatialSoftmax
from robopolicy.nets.language import LanguageConfig
from robopolicy.nets.observation import ImageEncoderConfig, ObservationEncoder, angle_features
from robopolicy.spec import KeySpec, PolicySpec

TOP = KeySpec("observation.image.top", (64, 64, 3), role="image")
WRIST = KeySpec("observation.image.wrist", (64, 64, 3), role="image")
STATE = KeySpec("observation.state", (3,), angles=(1,))
ACTION = KeySpec("action", (2,), role="action")


def test_angles_become_sine_and_cosine_and_wrap():
    x = torch.tensor([[1.0, 0.3, 2.0], [1.0, 0.3 + 2 * math.pi, 2.0]])
    out = angle_features(x, (1,))
    torch.testing.assert_close(out[0], torch.tensor([1.0, 2.0, math.sin(0.3), math.cos(0.3)]))
    torch.testing.assert_close(out[0], out[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("row", "col"), [(0, 0), (7, 2), (3, 9)])
def test_spatial_softmax_finds_a_peak(row, col):
    pool = SpatialSoftmax(1, 1, 8, 10)
    pool.to_keypoints.weight.data.fill_(1)
    pool.to_keypoints.bias.data.zero_()
    heat = torch.zeros(1, 1, 8, 10)
    heat[0, 0, row, col] = 50
    x, y = pool(heat)[0].tolist()
    assert (x, y) == pytest.approx((col / 9 * 2 - 1, row / 7 * 2 - 1), abs=1e-3)


def test_no_batch_statistics():
    net = ResNetKeypointEncoder(40, 40)
    assert not [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    images = torch.rand(3, 40, 40, 3)
    torch.testing.assert_close(net(images)[1:2], net(images[1:2]), rtol=1e-3, atol=1e-4)


def test_images_without_room_for_keypoints_are_refused():
    with pytest.raises(UserError, match="feature map of 1x2"):
        ResNetKeypointEncoder(32, 64)


@pytest.mark.parametrize("shared", [False, True])
def test_several_cameras_share_or_own_their_encoder(shared):
    spec = PolicySpec((STATE, TOP, WRIST), ACTION, 10)
    encoder = ObservationEncoder(
        spec, ImageEncoderConfig(feature_dim=8, shared=shared), AugmentConfig(crop=0.75), LanguageConfig()
    )
    assert len(encoder.image_encoders) == (1 if shared else 2)
    batch = {
        STATE.key: torch.rand(4, 2, 3),
        TOP.key: torch.randint(0, 256, (4, 2, 64, 64, 3), dtype=torch.uint8),
        WRIST.key: torch.randint(0, 256, (4, 2, 64, 64, 3), dtype=torch.uint8),
    }
    features = encoder(batch).flat()
    assert features.shape == (4, encoder.size.flat) == (4, 2 * (4 + 8 + 8))
    swapped = encoder(batch | {TOP.key: batch[WRIST.key], WRIST.key: batch[TOP.key]}).flat()
    top, wrist = features.view(4, 2, -1)[..., 4:].chunk(2, dim=-1)
    assert torch.allclose(swapped.view(4, 2, -1)[..., 4:12], wrist, atol=1e-5) == shared
    assert not torch.allclose(top, wrist, atol=1e-3)
