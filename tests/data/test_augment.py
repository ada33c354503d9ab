import numpy as np
import pytest
import torch

from robopolicy.data.augment import AugmentConfig, augment, draw_augmentation

GENERATOR = torch.Generator().manual_seed(0)


def coordinate_images(batch=64, frames=2, size=24):
    """Images whose red and green channels hold row and column, so that a crop tells where it was taken."""
    rows, cols = np.mgrid[:size, :size]
    image = np.stack([rows, cols, np.full_like(rows, 200)], axis=-1).astype(np.uint8)
    return torch.from_numpy(np.broadcast_to(image, (batch, frames, size, size, 3)).copy())


def test_inference_takes_the_centre():
    out = augment(coordinate_images(), AugmentConfig(crop=0.5), None)
    assert out.shape == (64, 2, 12, 12, 3)
    assert (out[0, 0, 0, 0] * 255).round().tolist() == [6, 6, 200]


def test_random_crops_are_windows_of_the_image_and_reach_every_corner():
    out = (augment(coordinate_images(2000), AugmentConfig(crop=0.75), draw_augmentation(2000, GENERATOR)) * 255).round()
    top, left = out[:, 0, 0, 0, 0].int(), out[:, 0, 0, 0, 1].int()
    assert set(top.tolist()) == set(left.tolist()) == set(range(7))
    rows = top[:, None] + torch.arange(18)
    assert torch.equal(out[:, 0, :, 5, 0].int(), rows.int())
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.1


def test_all_frames_of_a_window_share_the_crop():
    out = augment(coordinate_images(), AugmentConfig(crop=0.5), draw_augmentation(64, GENERATOR))
    assert torch.equal(out[:, 0], out[:, 1])
    assert len({tuple(w[0, 0, 0].tolist()) for w in out}) > 10


def test_shift_repeats_the_edge():
    out = (augment(coordinate_images(500), AugmentConfig(shift=3), draw_augmentation(500, GENERATOR)) * 255).round()
    assert out.shape == (500, 2, 24, 24, 3)
    first = out[:, 0, :, 0, 0].int()
    assert set((first[:, 12] - 12).tolist()) == set(range(-3, 4))
    assert first.min() == 0 and first.max() == 23


def test_brightness_scales_and_nothing_else_changes():
    config = AugmentConfig(brightness=0.5)
    draws = torch.full((4, 5), 0.5)
    draws[:, 2] = torch.tensor([0.0, 0.5, 0.75, 1.0])
    image = torch.full((4, 1, 2, 2, 3), 100, dtype=torch.uint8)
    image[..., 1] = 40
    out = augment(image, config, draws)
    expected = torch.tensor([0.5, 1.0, 1.25, 1.5])[:, None] * torch.tensor([100, 40, 100]) / 255
    torch.testing.assert_close(out[:, 0, 0, 0], expected)


def test_contrast_keeps_the_mean_grey_and_saturation_the_luma():
    image = torch.randint(60, 180, (3, 2, 8, 8, 3), dtype=torch.uint8, generator=GENERATOR)
    luma = torch.tensor([0.299, 0.587, 0.114])
    plain = image.float() / 255
    draws = torch.tensor([[0.5, 0.5, 0.5, 0.9, 0.1]]).expand(3, 5)
    contrast = augment(image, AugmentConfig(contrast=0.3), draws)
    torch.testing.assert_close((contrast @ luma).mean((1, 2, 3)), (plain @ luma).mean((1, 2, 3)))
    assert (contrast.flatten(1).std(1) > plain.flatten(1).std(1) * 1.15).all()
    saturation = augment(image, AugmentConfig(saturation=0.5), draws)
    torch.testing.assert_close(saturation @ luma, plain @ luma)
    assert not torch.allclose(saturation, plain)


def test_same_draws_same_pictures_for_any_split_of_the_batch():
    images = coordinate_images()
    config = AugmentConfig(crop=0.8, shift=2, brightness=0.3, contrast=0.3, saturation=0.3)
    draws = draw_augmentation(64, torch.Generator().manual_seed(3))
    whole = augment(images, config, draws)
    parts = torch.cat([augment(images[i : i + 16], config, draws[i : i + 16]) for i in range(0, 64, 16)])
    assert torch.equal(whole, parts)


def test_no_augmentation_changes_nothing():
    images = coordinate_images(4)
    out = augment(images, AugmentConfig(), draw_augmentation(4, GENERATOR))
    torch.testing.assert_close(out, images.float() / 255)
    assert pytest.approx(out.max().item()) == 200 / 255
