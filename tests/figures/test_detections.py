"""Claims about pictures of detections."""

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from lomar.figures import detections
from lomar.figures.detections import COLOURS, TILE_PX, Objects, colour_of, detections_sheet, draw_detections

NAMES = [f"kind {i}" for i in range(20)]
GREY = 97


def grey(height: int = 331, width: int = 431) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def has(pixels: np.ndarray, label: int) -> np.ndarray:
    """Where pixels are of a category's full colour."""
    return (pixels == np.array(colour_of(label))).all(axis=-1)


def one(box: list[float], label: int = 2, score: float | None = 0.9, mask: object = None) -> Objects:
    scores = None if score is None else np.array([score])
    return Objects(np.array([box]), np.array([label]), scores, None if mask is None else [mask])  # type: ignore[list-item]


def disc(height: int = 331, width: int = 431) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return (y - 150) ** 2 + (x - 200) ** 2 < 80**2


def test_a_mask_is_coloured_inside_and_nowhere_else() -> None:
    mask = disc()
    box = [120.0, 70.0, 281.0, 231.0]
    picture = draw_detections(grey(), one(box, mask=mask), NAMES)
    inner = (np.hypot(*(np.mgrid[:331, :431] - np.array([150, 200])[:, None, None])) < 70) & mask
    filled = picture[inner]
    assert (filled == filled[0]).all()
    towards = np.array(colour_of(2)).astype(int) - GREY
    # Between the image and the category's colour, nearer to the image: it shows through.
    assert ((filled[0].astype(int) - GREY) * towards > 0).all()
    assert (np.abs(filled[0].astype(int) - GREY) < 0.5 * np.abs(towards) + 1).all()
    outside = np.ones_like(mask)
    outside[40:236, 115:286] = False  # the box with its name above
    assert (picture[outside] == GREY).all()
    corner = picture[74:90, 124:140]
    assert (corner == GREY).all()  # in the box, but not in the mask


@pytest.mark.parametrize("scale", [1, 3])
def test_a_mask_has_an_outline_of_full_colour_inside_its_edge(scale: int) -> None:
    mask = np.zeros((331 * scale, 431 * scale), bool)
    mask[80 * scale : 220 * scale, 150 * scale : 250 * scale] = True
    box = np.array([120.0, 70, 281, 231]) * scale
    picture = draw_detections(grey(*mask.shape), one(box.tolist(), mask=mask), NAMES)
    row = has(picture, 2)[150 * scale, 125 * scale : 275 * scale]  # through the mask, inside the frame
    line = max(1, round(np.sqrt(mask.size) / 280))
    left, right = 150 * scale, 250 * scale
    expected = [*range(left, left + line), *range(right - line, right)]
    assert (np.flatnonzero(row) + 125 * scale).tolist() == expected


def test_a_mask_may_be_a_run_length_code_and_thin_or_empty() -> None:
    thin = np.zeros((331, 431), bool)
    thin[100:200, 50] = True
    for mask in (disc(), thin, np.zeros_like(thin)):
        code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        told = {"size": code["size"], "counts": code["counts"].decode()}
        box = [40.0, 60, 300, 240]
        pictures = [draw_detections(grey(), one(box, mask=m), NAMES) for m in (mask, code, told)]
        assert all((a == b).all() for a, b in pairwise(pictures))
    assert has(draw_detections(grey(), one([40, 60, 300, 240], mask=thin), NAMES), 2)[105:195, 50].all()


def test_a_box_is_framed_where_it_is() -> None:
    picture = draw_detections(grey(), one([100, 120, 250, 270]), NAMES)
    framed = has(picture, 2)
    assert framed[120, 100:250].all() and framed[269, 100:250].all()
    assert framed[120:270, 100].all() and framed[120:270, 249].all()
    assert not framed[271:].any() and (picture[130:260, 110:240] == GREY).all()
    assert not framed[:, :100].any() and not framed[:, 250:].any()


@pytest.mark.parametrize("side", [200, 640, 2003])
def test_lines_and_letters_grow_with_the_image(side: int) -> None:
    picture = draw_detections(grey(side, side), one([0.3 * side, 0.3 * side, 0.8 * side, 0.8 * side]), NAMES)
    middle = has(picture, 2)[:, round(0.7 * side)]
    line = middle[: side // 2].sum()
    assert line == max(1, round(side / 280))
    tag = has(picture, 2)[: round(0.3 * side) - 1].any(axis=1).sum()
    assert 0.018 * side < tag < 0.08 * side and tag >= 9


@pytest.mark.parametrize(
    "box",
    [
        [0, 0, 431, 331],
        [0, 0, 20, 20],
        [411, 0, 431, 20],
        [400, 300, 431, 331],
        [0, 321, 5, 331],
        [-50, -50, 500, 400],
        [425, 150, 600, 170],
    ],
)
def test_a_name_stays_inside_the_picture(box: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    tags = kept_tags(monkeypatch)
    draw_detections(grey(), one(box), NAMES)
    (tag,) = tags
    left, top, right, bottom = tag.box
    assert 0 <= left < right <= 431 and 0 <= top < bottom <= 331
    assert tag.text == "kind 2 0.90" and right - left >= tag.letters.getlength(tag.text)


def kept_tags(monkeypatch: pytest.MonkeyPatch) -> list[detections._Tag]:
    """Names with their places, as they are worked out."""
    tags: list[detections._Tag] = []
    place = detections._tag

    def keeping(*arguments: object) -> tuple[detections._Tag, float]:
        tag, hidden = place(*arguments)  # type: ignore[arg-type]
        if hidden <= detections._HIDDEN:
            tags.append(tag)
        return tag, hidden

    monkeypatch.setattr(detections, "_tag", keeping)
    return tags


def test_names_do_not_cover_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = kept_tags(monkeypatch)
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 300, (40, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 130, (40, 2))], axis=1)
    draw_detections(grey(), Objects(boxes, np.arange(40) % 20, rng.random(40)), NAMES)
    assert len(tags) > 20
    shares = []
    for i, tag in enumerate(tags):
        left, top, right, bottom = tag.box
        for other in tags[:i]:
            across = min(right, other.box[2]) - max(left, other.box[0])
            down = min(bottom, other.box[3]) - max(top, other.box[1])
            shares.append(max(0, across) * max(0, down) / ((right - left) * (bottom - top)))
    assert max(shares) <= 0.05


def test_the_best_scored_are_named_where_there_is_no_room_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = kept_tags(monkeypatch)
    scores = np.linspace(0.1, 0.99, 60)
    draw_detections(grey(90, 120), Objects(np.tile([40.0, 40, 60, 60], (60, 1)), np.zeros(60, int), scores), ["cat"])
    assert 0 < len(tags) < 30 and tags[0].text == "cat 0.99"
    assert [tag.text for tag in tags] == sorted((tag.text for tag in tags), reverse=True)


def test_without_scores_names_stand_alone_and_long_ones_are_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = kept_tags(monkeypatch)
    draw_detections(grey(), one([10, 10, 200, 200], 0, None), ["dog"])
    draw_detections(grey(), one([10, 10, 200, 200], 0, 0.5), ["a very\nlong name " * 9])
    assert tags[0].text == "dog"
    assert tags[1].text.startswith("a very long name a") and tags[1].text.endswith("… 0.50")
    assert tags[1].box[2] <= 0.7 * 431


def luminance(colour: tuple[int, ...]) -> float:
    parts = np.array(colour) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_letters_stand_out_from_every_colour() -> None:
    for label in range(len(COLOURS)):
        pair = sorted((luminance(colour_of(label)), luminance(detections._ink_on(colour_of(label)))))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5  # WCAG's level AA


# What is seen without the long, the middle and the short cones: Machado, Oliveira and Fernandes 2009, severity 1.
SIGHT = {
    "usual": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_are_told_apart(sight: str) -> None:
    from skimage.color import deltaE_ciede2000, rgb2lab

    parts = np.array([colour_of(label) for label in range(len(COLOURS))]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(SIGHT[sight]).T, 0, 1)
    lab = rgb2lab(np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055))
    apart = [deltaE_ciede2000(a, b) for i, a in enumerate(lab) for b in lab[:i]]
    assert min(apart) > 7  # 1 can just be seen side by side


def test_a_category_has_one_colour() -> None:
    assert len({colour_of(label) for label in range(len(COLOURS))}) == len(COLOURS) == 14
    assert colour_of(15) == colour_of(1)


def test_the_image_is_left_as_it_is_and_nothing_found_is_no_change() -> None:
    image = grey()
    nothing = Objects(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0), [])
    assert (draw_detections(image, nothing, NAMES) == image).all()
    picture = draw_detections(image, one([10, 10, 200, 200], mask=disc()), NAMES)
    assert (image == GREY).all() and picture.dtype == np.uint8 and picture.shape == image.shape


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 300), (300, 7)])
def test_images_of_any_size_and_boxes_anywhere_can_be_drawn(size: tuple[int, int]) -> None:
    boxes = np.array([[0, 0, 1, 1], [-9, -9, -5, -5], [1000, 1000, 1001, 1001], [5, 5, 5, 5], [9, 9, 3, 3]], float)
    masks = [np.ones(size, bool)] * 5
    picture = draw_detections(grey(*size), Objects(boxes, np.arange(5), np.ones(5), masks), NAMES)
    assert picture.shape == (*size, 3)


def test_parts_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"boxes \(2, 4\) and parts of lengths \[2, 3\] do not fit"):
        Objects(np.zeros((2, 4)), np.zeros(3, int))
    with pytest.raises(ValueError, match="do not fit"):
        Objects(np.zeros((2, 3)), np.zeros(2, int))
    with pytest.raises(ValueError, match=r"a mask is of \(5, 7\), its image of \(331, 431\)"):
        draw_detections(grey(), one([0, 0, 5, 5], mask=np.zeros((5, 7), bool)), NAMES)


def test_the_sheet_has_truth_beside_what_was_found() -> None:
    truth, found = one([20, 20, 200, 200], 0, None, disc()), one([20, 20, 200, 200], 1, 0.9, disc())
    whole = detections_sheet(
        [(grey(), truth, found)] * 2 + [(grey(431, 331), one([20, 20, 200, 200], 0, None), one([20, 20, 200, 200], 1))],
        NAMES,
        "Caption.",
    )
    assert isinstance(whole, Image.Image) and whole.width > 2 * TILE_PX and whole.height > 3 * TILE_PX
    pixels = np.asarray(whole)
    middle = whole.width // 2
    assert has(pixels, 0)[:, :middle].any() and not has(pixels, 0)[:, middle:].any()
    assert has(pixels, 1)[:, middle:].any() and not has(pixels, 1)[:, :middle].any()
    alone = detections_sheet([(grey(), None, found)], NAMES, "Caption.")
    assert TILE_PX < alone.width < 1.3 * TILE_PX


def test_rows_of_a_sheet_must_be_alike() -> None:
    found = one([20, 20, 200, 200])
    for rows in ([], [(grey(), None, found), (grey(), found, found)]):
        with pytest.raises(ValueError, match="rows have a ground truth"):
            detections_sheet(rows, NAMES, "")
