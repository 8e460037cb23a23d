"""Claims about `lomar reconstruct`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Command = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("miniature")


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("source", [".", "reconstructor.safetensors"])
def test_several_ratios_are_columns_of_one_picture(
    source: str, lomar: Command, finished_run: Path, photos: Path, tmp_path: Path
) -> None:
    """From a run's folder and from the file alone: the same picture."""
    out = tmp_path / "deep" / "figure.png"
    outcome = lomar("reconstruct --model", finished_run / source, "--images", photos / "red", "--out", out)
    assert (outcome.status, outcome.out) == (0, f"{out}: 4 images at 4 mask ratios\n")
    drawn = picture(out)
    assert drawn.shape[0] > 4 * 32 and drawn.shape[1] > 4 * 32 and drawn.std() > 5


def test_one_ratio_draws_another_picture_than_several(
    lomar: Command, finished_run: Path, photos: Path, tmp_path: Path
) -> None:
    image = photos / "red" / "0.png"
    for name, ratios in (("one", "0.8"), ("two", "0.6 0.8")):
        words = ("reconstruct --model", finished_run, "--images", image, "--out", tmp_path / f"{name}.png")
        assert lomar(*words, f"--mask-ratios {ratios}").status == 0
    one, two = picture(tmp_path / "one.png"), picture(tmp_path / "two.png")
    assert one.shape != two.shape and one.std() > 5 and two.std() > 5


def test_the_seed_decides_windows_and_masks(lomar: Command, finished_run: Path, photos: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        words = ("reconstruct --model", finished_run, "--images", photos, "--out", tmp_path / f"{name}.png")
        assert lomar(*words, f"--seed {seed}").status == 0
    a, b, c = (picture(tmp_path / f"{name}.png") for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_a_run_that_is_not_finished_can_be_drawn_from(
    lomar: Command, pretrain: Command, interrupted_at: Callable[[int], None], photos: Path, tmp_path: Path
) -> None:
    interrupted_at(0)  # after the first evaluation, before any update
    assert pretrain(tmp_path / "run", "--max-steps 2").status == 130
    words = ("reconstruct --model", tmp_path / "run", "--images", photos / "red" / "0.png")
    assert lomar(*words, "--out", tmp_path / "figure.png").status == 0


def test_an_image_whose_name_is_no_text_is_drawn(
    lomar: Command, finished_run: Path, photos: Path, tmp_path: Path
) -> None:
    odd = Path(f"{tmp_path}/odd\udcff.png")
    odd.write_bytes((photos / "red" / "0.png").read_bytes())
    words = ("reconstruct --model", finished_run, "--out", tmp_path / "figure.png", "--images")
    assert lomar(*words, odd).status == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--images {photos} --out {out}", "--model is missing"),
        ("--model {run} --out {out}", "--images is missing"),
        ("--model {run} --images {photos}", "--out is missing"),
        ("--model nowhere --images {photos} --out {out}", "there is no run or file nowhere"),
        ("--model {photos} --images {photos} --out {out}", "holds no reconstructor.safetensors"),
        ("--model {run}/encoder.safetensors --images {photos} --out {out}", "holds encoder, not the reconstructor"),
        ("--model {run}/config.yaml --images {photos} --out {out}", "is not a safetensors file"),
        ("--model {run} --images nowhere --out {out}", "--images: there is no file or folder nowhere"),
        ("--model {run} --images {run} --out {out}", "no image in this folder"),  # a run's own pictures are no data
        ("--model {run} --images {run}/config.yaml --out {out}", "--images: none of 1 can be read, for example"),
        ("--model {run} --images {photos} --out figure.jpg", "--out is figure.jpg; it must end in .png"),
        ("--model {run} --images {photos} --out {photos}/red/0.png/x.png", "cannot be written"),
        ("--model {run} --images {photos} --out {out} --mask-ratios 0.05", "--mask-ratios: a ratio of 0.05 hides 0"),
        ("--model {run} --images {photos} --out {out} --mask-ratios 1", "--mask-ratios is '1'; it must be a number"),
        ("--model {run} --images {photos} --out {out} --mask-ratio 0.5", "did you mean --mask-ratios?"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    words: str, message: str, lomar: Command, finished_run: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "figure.png"
    outcome = lomar("reconstruct", words.format(photos=photos, run=finished_run, out=out))
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and message in outcome.err
    assert not out.exists()


def test_an_unreadable_image_among_good_ones_is_passed_over(
    lomar: Command, finished_run: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_text("no")
    out = tmp_path / "figure.png"
    images = (tmp_path / "bad.png", photos / "red" / "0.png")
    outcome = lomar("reconstruct --model", finished_run, "--out", out, "--images", *images)
    assert outcome.status == 0 and outcome.out.startswith(f"{out}: 1 images")
    assert outcome.err == f"lomar: skipped an unreadable image: {tmp_path / 'bad.png'}\n"
