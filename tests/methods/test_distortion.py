"""Claims about random changes of crops; the judges are torchvision and SciPy's definition of a Gaussian."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as torchvision

from lomar.methods.distortion import (
    CONTRAST,
    FACTORS,
    GRAY,
    HUE,
    ORDER,
    SIGMA,
    SOLARISED,
    WIDTH,
    Distortion,
    blurred,
    distort,
)

OPERATIONS = (
    torchvision.adjust_brightness,
    torchvision.adjust_contrast,
    torchvision.adjust_saturation,
    torchvision.adjust_hue,
)


def crops(count: int, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, 7, 5, generator=torch.Generator().manual_seed(1))


def unchanged(count: int) -> Tensor:
    rows = torch.zeros(count, WIDTH)
    rows[:, ORDER] = torch.arange(4.0)
    rows[:, FACTORS] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    return rows


def drawn(count: int, distortion: Distortion) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([distortion.draw(generator) for _ in range(count)])


def test_colours_change_as_torchvisions_one_after_the_other_in_each_crops_own_order() -> None:
    images, rows = crops(24), drawn(24, Distortion(0.4, gray=0, blur=0, solarize=0, size_px=7))
    found = distort(images, rows)
    for image, row, changed in zip(images, rows, found, strict=True):
        for place in row[ORDER].int().tolist():
            factor = float(row[FACTORS][place])
            if factor != (place != HUE):
                image = OPERATIONS[place](image, factor)
        torch.testing.assert_close(changed, image, rtol=1e-4, atol=2e-5)
    assert len({tuple(row[ORDER].tolist()) for row in rows}) > 10


@given(st.floats(-0.5, 0.5), st.integers(0, 2**16))
def test_hue_turns_as_torchvisions(turn: float, seed: int) -> None:
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    images[0, :, 0] = torch.tensor([0.3, 0.3, 0.3])[:, None]  # gray has no hue
    images[1, :, 0] = 0.0
    rows = unchanged(3)
    rows[:, FACTORS.start + HUE] = turn
    torch.testing.assert_close(distort(images, rows), torchvision.adjust_hue(images, turn), rtol=1e-4, atol=2e-5)


def test_gray_and_solarisation_are_torchvisions_where_they_are_drawn() -> None:
    images, rows = crops(4), unchanged(4)
    rows[1, GRAY] = rows[2, SOLARISED] = rows[3, GRAY] = rows[3, SOLARISED] = 1
    found = distort(images, rows)
    assert torch.equal(found[0], images[0])
    gray = [torchvision.rgb_to_grayscale(image, num_output_channels=3) for image in images]
    torch.testing.assert_close(found[1], gray[1])
    torch.testing.assert_close(found[2], torchvision.solarize(images[2], 128 / 255))
    torch.testing.assert_close(found[3], torchvision.solarize(gray[3], 128 / 255))


@pytest.mark.parametrize("sigma", [0.3, 1.0, 1.7])
def test_blur_is_torchvisions_with_each_crops_own_deviation_whatever_the_others_have(sigma: float) -> None:
    images = torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(2))
    found = blurred(images, torch.tensor([sigma, 1.7]))
    for image, blurry, each in zip(images, found, (sigma, 1.7), strict=True):
        side = 2 * int(3 * each + 0.5) + 1
        torch.testing.assert_close(blurry, torchvision.gaussian_blur(image, [side, side], [each, each]))
    torch.testing.assert_close(blurred(images[:1], torch.tensor([sigma])), found[:1], rtol=0, atol=1e-6)


def test_crops_are_blurred_before_they_are_solarised_and_gray_before_both() -> None:
    images, rows = torch.rand(1, 3, 16, 12, generator=torch.Generator().manual_seed(3)), unchanged(1)
    rows[0, GRAY], rows[0, SIGMA], rows[0, SOLARISED] = 1, 1.5, 1
    expected = torchvision.gaussian_blur(torchvision.rgb_to_grayscale(images, 3), [11, 11], [1.5, 1.5])
    torch.testing.assert_close(distort(images, rows), torchvision.solarize(expected, 128 / 255), rtol=0, atol=1e-5)


def test_each_change_has_its_own_chance() -> None:
    rows = drawn(3000, Distortion(0.4, gray=0.5, blur=0.5, solarize=0.5, size_px=7))
    jittered = (rows[:, FACTORS] != torch.tensor([1.0, 1.0, 1.0, 0.0])).any(dim=1)
    chosen = torch.stack([jittered, rows[:, GRAY] > 0, rows[:, SIGMA] > 0, rows[:, SOLARISED] > 0]).double()
    assert (torch.corrcoef(chosen) - torch.eye(4)).abs().max() < 0.06
    factors = torch.corrcoef(rows[jittered][:, FACTORS].T.double())
    assert (factors - torch.eye(4)).abs().max() < 0.06


def test_crops_smaller_than_a_blurs_reach_are_blurred_within_themselves() -> None:
    images = torch.rand(1, 3, 4, 3, generator=torch.Generator().manual_seed(2))
    found = blurred(images, torch.tensor([2.0]))
    assert found.shape == images.shape and found.std() < images.std()
    one_pixel = torch.rand(1, 3, 1, 1)
    assert torch.equal(blurred(one_pixel, torch.tensor([2.0])), one_pixel)


def test_shares_and_ranges_are_those_that_were_asked_for() -> None:
    rows = drawn(2000, Distortion(0.4, gray=0.2, blur=0.5, solarize=0.1, size_px=112))
    jittered = (rows[:, FACTORS] != torch.tensor([1.0, 1.0, 1.0, 0.0])).any(dim=1)
    sigma = rows[:, SIGMA]
    for found, share in (
        (jittered, 0.8),
        (rows[:, GRAY], 0.2),
        (sigma > 0, 0.5),
        (rows[:, SOLARISED], 0.1),
    ):
        assert abs(float(found.float().mean()) - share) < 0.03
    low, high = rows[:, FACTORS].amin(dim=0).numpy(), rows[:, FACTORS].amax(dim=0).numpy()
    np.testing.assert_allclose(low, [0.6, 0.6, 0.8, -0.1], atol=0.01)
    np.testing.assert_allclose(high, [1.4, 1.4, 1.2, 0.1], atol=0.01)
    some = sigma[sigma > 0]
    assert 0.05 <= float(some.min()) < 0.07 and 0.97 < float(some.max()) <= 1.0  # half of those at 224 px


def test_crops_of_other_channels_keep_their_colours_and_floats_have_no_white() -> None:
    five, rows = crops(2, channels=5), unchanged(2)
    rows[:, GRAY] = 1
    rows[:, FACTORS.start + HUE] = 0.1
    assert torch.equal(distort(five, rows), five)
    rows[:, FACTORS.start + CONTRAST] = 0.5
    mean = five.mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(distort(five, rows), (five + mean) / 2)
    bright, rows = 100 * crops(1), unchanged(1)
    rows[:, SOLARISED] = 1
    rows[:, FACTORS.start] = 1.4
    torch.testing.assert_close(distort(bright, rows, bounded=False), 1.4 * bright)


def test_what_goes_in_is_not_changed() -> None:
    images = crops(8)
    before = images.clone()
    distort(images, drawn(8, Distortion(0.4, gray=0.5, blur=1.0, solarize=1.0, size_px=7)))
    assert torch.equal(images, before)
