"""Claims about the confusion matrix's picture."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lomar.figures.confusion import confusion_matrix


@pytest.mark.parametrize("names", [["a $x_$", "$\\\\frac$", "_^{"], ["猫", "狗", "ꙮ"]], ids=["signs", "scripts"])
def test_any_name_of_a_class_can_be_drawn(names: list[str], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        confusion_matrix(np.eye(3, dtype=np.int64) * 5, names, "5 $ each", tmp_path / "c.png")
    assert min(Image.open(tmp_path / "c.png").size) > 300


def test_the_diagonal_is_dark_where_all_are_recognised(tmp_path: Path) -> None:
    confusion_matrix(np.array([[8, 0], [6, 2]]), ["a", "b"], "16 images", tmp_path / "c.png")
    pixels = np.asarray(Image.open(tmp_path / "c.png").convert("RGB")).astype(int)
    blues = (pixels[:, :, 2] - pixels[:, :, 0] > 40).mean()
    assert 0.05 < blues < 0.7
