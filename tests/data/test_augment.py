import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from lomar.data.augment import centre_crop, random_resized_crop


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
