import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional

from lomar.data.augment import ColorJitter, centre_crop, random_resized_crop


@pytest.mark.parametrize("size", [(331, 503), (503, 331), (7, 997), (997, 7), (2, 2)])
def test_boxes_equal_those_of_torchvision_draw_for_draw(size):
    image = torch.empty(3, *size)
    for seed in range(100):
        torch.manual_seed(seed)
        expected = RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3])
        found = random_resized_crop(*size, (0.2, 1.0), generator=torch.Generator().manual_seed(seed))
        assert found == tuple(expected)


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    low=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**32),
)
def test_a_box_lies_inside_the_image_and_its_area_in_the_range(height, width, low, seed):
    top, left, rows, columns = random_resized_crop(
        height, width, (low, 1.0), generator=torch.Generator().manual_seed(seed)
    )
    assert top >= 0 and left >= 0 and rows >= 1 and columns >= 1
    assert top + rows <= height and left + columns <= width
    # Rounding moves each side by at most half a pixel; only images of extreme shape fall back to a smaller box.
    if 3 / 4 <= width / height <= 4 / 3:
        assert rows * columns >= low * height * width - (rows + columns) / 2 - 1


def test_the_area_is_uniform_and_the_aspect_ratio_log_uniform():
    generator = torch.Generator().manual_seed(0)
    # A tall range of shares would be cut by the image's border and so no longer uniform.
    boxes = [random_resized_crop(1009, 1013, (0.1, 0.5), generator=generator) for _ in range(3000)]
    shares = [rows * columns / (1009 * 1013) for _, _, rows, columns in boxes]
    log_ratios = [math.log(columns / rows) for _, _, rows, columns in boxes]
    assert abs(sum(shares) / len(shares) - 0.3) < 0.01
    assert abs(sum(log_ratios) / len(log_ratios)) < 0.015
    assert min(log_ratios) < -0.27 and max(log_ratios) > 0.27


@pytest.mark.parametrize(
    ("size", "box"), [((256, 256), (16, 16, 224, 224)), ((256, 341), (16, 58, 224, 224)), ((2, 5), (0, 1, 2, 2))]
)
def test_the_centre_crop_is_224_of_256(size, box):
    assert centre_crop(*size) == box


# Colour.


NAMES = ("brightness", "contrast", "saturation")
FACTORS = [(0.6, 1.4, 0.7), (1.4, 0.6, 1.3), (1.2, 1.4, 1.4), (1.0, 1.0, 1.0)]


def torchvisions(pixels, changes):
    """What torchvision makes of (3, H, W): uint8 is cut to whole levels after each change, float32 never."""
    adjusted = torch.from_numpy(pixels)
    for name, factor in changes:
        adjusted = getattr(functional, f"adjust_{name}")(adjusted, factor)
    return adjusted.numpy()


def colours():
    """uint8 (3, 31, 37) with dark and bright parts, so that both ends are cut."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 31, 37), dtype=np.uint8)
    pixels[:, :10] //= 5
    pixels[:, 20:] = 255 - pixels[:, 20:] // 5
    return pixels


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("factors", FACTORS)
def test_colours_change_in_turn_as_torchvisions_do(order, factors):
    """Within one level of torchvision without its cuts; these, times 1.4 in the changes after, make up to four."""
    changes = tuple((NAMES[i], factors[i]) for i in order)
    found = ColorJitter(changes)(colours())
    assert found.dtype == np.uint8 and found.shape == (3, 31, 37)
    exact = 255 * torchvisions(colours().astype(np.float32) / 255, changes)
    assert np.abs(found - exact).max() < 1.001
    assert np.abs(found.astype(int) - torchvisions(colours(), changes)).max() <= 4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [0.6, 0.9, 1.0, 1.2, 1.4])
def test_one_change_of_colour_is_torchvisions_within_a_level(name, factor):
    found = ColorJitter(((name, factor),))(colours())
    assert np.abs(found.astype(int) - torchvisions(colours(), [(name, factor)])).max() <= 1


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("change", [(name, factor) for name in NAMES for factor in (0.6, 1.4)], ids=str)
def test_any_channels_and_types_keep_shape_type_and_range(channels, dtype, change):
    """The same change of any type, in units of full scale; saturation is of three channels alone."""
    top = {"uint8": 255, "uint16": 65_535, "float32": 1}[dtype]
    share = np.random.default_rng(0).random((channels, 13, 17), dtype=np.float32)
    pixels = (share * top).astype(dtype)
    found = ColorJitter((change,))(pixels)
    assert found.shape == pixels.shape and found.dtype == pixels.dtype
    if channels != 3 and change[0] == "saturation":
        assert (found == pixels).all()
        return
    assert not (found == pixels).all()
    as_float = ColorJitter((change,))(pixels.astype(np.float32) / top)
    if dtype != "float32":  # float32 data has no bounds to keep to
        assert change[1] < 1 or change[0] == "saturation" or (found == top).any()
        as_float = as_float.clip(0, 1)
    assert np.abs(found / np.float32(top) - as_float).max() <= (0 if dtype == "float32" else 1.01 / top)


def test_contrast_leaves_the_mean_and_saturation_the_gray():
    pixels = np.random.default_rng(0).random((5, 13, 17), dtype=np.float32)
    changed = ColorJitter((("contrast", 0.5),))(pixels)
    assert np.isclose(changed.mean(), pixels.mean()) and np.allclose(
        changed - changed.mean(), 0.5 * (pixels - pixels.mean()), atol=1e-6
    )
    gray = ColorJitter((("saturation", 0.0),))(pixels[:3])
    luma = 0.2989 * pixels[0] + 0.587 * pixels[1] + 0.114 * pixels[2]
    assert np.allclose(gray, luma, atol=1e-6)


def test_factors_are_uniform_and_every_order_is_as_likely():
    generator = torch.Generator().manual_seed(0)
    drawn = [ColorJitter.draw(0.4, generator).changes for _ in range(3000)]
    orders = Counter(tuple(name for name, _ in changes) for changes in drawn)
    assert orders.keys() == set(itertools.permutations(NAMES))
    assert all(abs(count - 500) < 103 for count in orders.values())  # five deviations
    for name in NAMES:
        factors = [factor for changes in drawn for of, factor in changes if of == name]
        assert 0.6 <= min(factors) < 0.605 and 1.395 < max(factors) <= 1.4
        assert abs(sum(factors) / 3000 - 1) < 0.022  # five deviations
