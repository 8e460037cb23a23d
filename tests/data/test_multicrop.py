"""Claims about several crops of an image."""

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lomar.data.augment import Box, random_resized_crop
from lomar.data.decode import PixelFormat, read_image
from lomar.data.loader import Batching, MicroBatch, SampleKey
from lomar.data.multicrop import MultiCropPlan, multicrop_batches
from lomar.data.opening import open_source
from lomar.seeding import seeded

PLAN = MultiCropPlan(20, (0.4, 1.0), local_crops=3, local_px=7, local_scale=(0.05, 0.4))
Read = Callable[..., list[MicroBatch]]


def nothing(key: SampleKey) -> dict[str, torch.Tensor]:
    return {"key": torch.tensor([key.epoch, key.index])}


@pytest.fixture
def read(photos: Path) -> Read:
    def batches(plan: MultiCropPlan = PLAN, **changes: int) -> list[MicroBatch]:
        batching = Batching(seed=5, **({"batch_size": 4, "micro_batch": 4, "total_batches": 3} | changes))
        source = open_source(str(photos))
        return list(multicrop_batches(source, PixelFormat(3, "uint8"), nothing, plan=plan, batching=batching))

    return batches


def test_crops_are_those_of_the_boxes_that_a_sample_draws_each_mirrored_by_its_own_chance(
    read: Read, photos: Path
) -> None:
    batch = read()[0]
    assert batch.inputs["crops"].shape == (4, 2, 3, 20, 20) and batch.inputs["local_crops"].shape == (4, 3, 3, 7, 7)
    fmt = PixelFormat(3, "uint8")
    mirrored = []
    for place, name in enumerate(batch.names):
        image = read_image((photos / name).read_bytes(), name)
        epoch, index = batch.inputs["key"][place].tolist()
        chance = seeded(5, epoch, index, "crop")
        for kind, count, side, scale in (("crops", 2, 20, (0.4, 1.0)), ("local_crops", 3, 7, (0.05, 0.4))):
            for number in range(count):
                box = random_resized_crop(image.height, image.width, scale, generator=chance)
                crop = image.crop(box, (side, side), fmt)
                mirrored.append(torch.rand(1, generator=chance).item() < 0.5)
                crop = crop[:, :, ::-1] if mirrored[-1] else crop
                np.testing.assert_array_equal(batch.inputs[kind][place, number], crop)
    assert 0 < sum(mirrored) < len(mirrored)


def test_batches_are_the_same_in_any_parts_from_any_step_and_of_any_number_of_processes(read: Read) -> None:
    whole = [batch.inputs["local_crops"] for batch in read()]
    in_parts = read(micro_batch=3)
    assert [batch.last for batch in in_parts] == [False, True] * 3
    assert torch.equal(torch.cat([batch.inputs["local_crops"] for batch in in_parts]), torch.cat(whole))
    assert torch.equal(read(first_batch=2)[0].inputs["local_crops"], whole[2])
    shares = [read(rank=rank, world_size=2) for rank in (0, 1)]
    for step, expected in enumerate(whole):
        assert torch.equal(torch.cat([share[step].inputs["local_crops"] for share in shares]), expected)
    assert torch.equal(read(workers=2)[1].inputs["crops"], read()[1].inputs["crops"])


def test_without_small_crops_there_are_none(read: Read) -> None:
    batch = read(MultiCropPlan(20, (0.08, 1.0)))[0]
    assert set(batch.inputs) == {"crops", "key"}


def test_a_damaged_file_is_replaced_and_told(photos: Path, tmp_path: Path) -> None:
    for path in (photos / "red").iterdir():
        Image.open(path).save(tmp_path / path.name)
    (tmp_path / "0.png").write_bytes(b"no image")
    batches = multicrop_batches(
        open_source(str(tmp_path)),
        PixelFormat(3, "uint8"),
        nothing,
        plan=PLAN,
        batching=Batching(seed=5, batch_size=4, micro_batch=4, total_batches=1),
    )
    (batch,) = list(batches)
    assert len(batch.bad) == 1 and batch.bad[0][0].endswith("0.png")
    assert len(batch.names) == 4 and not any(name.endswith("0.png") for name in batch.names)


@pytest.mark.parametrize("side", [40, 900])
def test_an_image_is_decoded_once_for_all_its_crops_which_are_as_fine_as_of_all_its_pixels(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A photograph whose decoder shrinks it when it is large, against boxes of all its pixels."""
    smooth = np.linspace(0, 6, side)
    pixels = 127 + 60 * (np.sin(smooth)[:, None, None] + np.cos(1.7 * smooth)[None, :, None]) * np.ones(3)
    file = BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "jpeg", quality=95)
    image = read_image(file.getvalue(), "photo.jpg")
    decoded: list[tuple[int, ...]] = []

    def decode(box: Box, size: tuple[int, int], channels: int) -> np.ndarray:
        decoded.append(box)
        return image.decode(box, size, channels)

    fmt = PixelFormat(3, "uint8")
    large, small = PLAN(replace(image, decode=decode), fmt, torch.Generator().manual_seed(1))
    assert decoded == [(0, 0, side, side)]
    chance = torch.Generator().manual_seed(1)
    for crops, px, scale in ((large, 20, (0.4, 1.0)), (small, 7, (0.05, 0.4))):
        for found in crops:
            crop = image.crop(random_resized_crop(side, side, scale, generator=chance), (px, px), fmt, finer=8)
            crop = crop[:, :, ::-1] if torch.rand(1, generator=chance).item() < 0.5 else crop
            assert np.abs(found.astype(int) - crop).mean() < 4


def test_crops_of_images_as_small_as_they_get_are_whole() -> None:
    file = BytesIO()
    Image.fromarray(np.full((2, 3, 3), 7, np.uint8)).save(file, "png")
    large, small = PLAN(read_image(file.getvalue(), "dot.png"), PixelFormat(3, "uint8"), torch.Generator())
    assert (large == 7).all() and (small == 7).all()
