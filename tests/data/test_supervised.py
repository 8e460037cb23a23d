"""Claims about the augmented, labelled batches that a classifier learns from."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.auto_augment import RandAugment

from lomar.data.decode import PixelFormat
from lomar.data.labels import Labelled
from lomar.data.loader import Batching, MicroBatch
from lomar.data.opening import open_source
from lomar.data.supervised import Augmentation, policy_transform, training_batches
from lomar.errors import UserError

RGB8 = PixelFormat(3, "uint8")
POLICY = "rand-m9-mstd0.5-inc1"
PLAIN = Augmentation(size_px=(24, 16), crop_scale=(0.5, 1.0), classes=3, mean=(0.5, 0.4, 0.3))


def scaled(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 255


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Labelled:
    """Eleven images; image i is all of value 20 i, so that a crop shows whose it is."""
    root = tmp_path_factory.mktemp("images")
    for i in range(11):
        Image.fromarray(np.full((31, 37, 3), 20 * i, dtype=np.uint8)).save(root / f"{i:02}.png")
    return Labelled(open_source(str(root)), np.arange(11) % 3)


def batches(labelled: Labelled, augmentation: Augmentation, fmt: PixelFormat = RGB8, **words: int) -> list[MicroBatch]:
    depth = words.pop("depth", 0)
    batching = Batching(**({"seed": 5, "batch_size": 6, "micro_batch": 6, "total_batches": 4} | words))
    return list(training_batches(labelled, fmt, augmentation, scaled, depth=depth, batching=batching))


def joined(found: list[MicroBatch], name: str) -> torch.Tensor:
    return torch.cat([micro.inputs[name] for micro in found])


def test_an_image_comes_with_the_target_of_its_class(labelled: Labelled) -> None:
    for micro in batches(labelled, PLAIN):
        assert micro.inputs["images"].shape == (6, 3, 24, 16)
        numbers = (micro.inputs["images"][:, 0, 0, 0] * 255 / 20).round().long()
        assert micro.inputs["targets"].argmax(dim=1).tolist() == (numbers % 3).tolist()
        assert torch.equal(micro.inputs["targets"].sum(dim=1), torch.ones(6))
        assert [Path(name).stem for name in micro.names] == [f"{number:02}" for number in numbers]


def test_smoothing_gives_every_class_its_share(labelled: Labelled) -> None:
    """SPEC A.10: off = 0.1 / C, on = 0.9 + 0.1 / C."""
    targets = batches(labelled, replace(PLAIN, smoothing=0.1))[0].inputs["targets"]
    torch.testing.assert_close(targets.sort(dim=1).values[0], torch.tensor([0.1 / 3, 0.1 / 3, 0.9 + 0.1 / 3]))


MIXES = {"mixup": {"mixup": 0.8}, "cutmix": {"cutmix": 1.0}, "both": {"mixup": 0.8, "cutmix": 1.0}}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_a_target_is_mixed_as_its_image_is(labelled: Labelled, mix: dict[str, float]) -> None:
    """Image i is all of one value, so that the mean over its pixels tells how much of whom is in it."""
    labels = Labelled(labelled.source, np.arange(11))
    augmentation = replace(PLAIN, classes=11, **mix)
    images, targets = (joined(batches(labels, augmentation, total_batches=12), n) for n in ("images", "targets"))
    content = images.mean(dim=(1, 2, 3)) * 255 / 20
    expected = (targets * torch.arange(11)).sum(dim=1)
    torch.testing.assert_close(content, expected, atol=2e-4, rtol=0)
    assert ((targets > 0).sum(dim=1) == 2).float().mean() > 0.5  # few batches have a share of 0 or 1


@given(
    seed=st.integers(0, 50),
    micro_batch=st.sampled_from([2, 4, 6, 12]),
    world=st.sampled_from([1, 2, 3]),
    policy=st.sampled_from(["none", POLICY]),
    clamped=st.booleans(),
    repeats=st.sampled_from([1, 3, 5]),
)
@settings(max_examples=15, deadline=None)
def test_neither_micro_batches_nor_processes_change_a_batch(
    labelled: Labelled, seed: int, micro_batch: int, world: int, policy: str, clamped: bool, repeats: int
) -> None:
    augmentation = replace(PLAIN, mixup=0.8, cutmix=1.0, erase=0.5, policy=policy, color_jitter=0.3, clamped=clamped)
    told = {"seed": seed, "batch_size": 12, "depth": 2, "total_batches": 2, "repeats": repeats}
    whole = batches(labelled, augmentation, **told | {"micro_batch": 12})
    ranks = [
        batches(labelled, augmentation, **told | {"micro_batch": micro_batch, "rank": r, "world_size": world})
        for r in range(world)
    ]
    for number in range(2):
        parts = []
        for found in ranks:
            ends = [i for i, micro in enumerate(found) if micro.last]
            parts += found[(ends[number - 1] + 1 if number else 0) : ends[number] + 1]
        for name in ("images", "targets", "paths"):
            assert torch.equal(joined(parts, name), whole[number].inputs[name]), name


@pytest.mark.parametrize("repeats", [1, 4])
def test_workers_and_a_later_start_change_nothing(labelled: Labelled, repeats: int) -> None:
    """Of four times, batches of 6 end between two of them."""
    augmentation = replace(PLAIN, policy=POLICY, erase=0.5, mixup=0.8)
    alone = batches(labelled, augmentation, repeats=repeats)
    for change in ({"workers": 2}, {"first_batch": 2}, {"first_batch": 3}):
        other = batches(labelled, augmentation, repeats=repeats, **change)
        for ours, theirs in zip(alone[-len(other) :], other, strict=True):
            assert torch.equal(ours.inputs["images"], theirs.inputs["images"])


def test_the_callers_random_state_is_left_as_it_was(labelled: Labelled) -> None:
    import random

    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    batches(labelled, replace(PLAIN, policy=POLICY, erase=0.9, mixup=0.8))
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert np.random.get_state()[1].tolist() == before[2]


def test_the_policy_is_timms_with_the_settings_of_the_released_recipe() -> None:
    """SPEC A.10: 2 of 15 increasing operations, each with probability 0.5, m9, mstd 0.5, filled with the mean."""
    transform = policy_transform(POLICY, (224, 224), (0.485, 0.456, 0.406))
    assert isinstance(transform, RandAugment) and transform.num_layers == 2 and len(transform.ops) == 15
    operation = transform.ops[0]
    assert (operation.prob, operation.magnitude, operation.magnitude_std) == (0.5, 9, 0.5)
    assert operation.kwargs["fillcolor"] == (124, 116, 104)
    assert operation.hparams["translate_const"] == 100
    assert operation.kwargs["resample"] == Image.Resampling.BICUBIC


def test_an_unknown_policy_is_named() -> None:
    for policy in ("random", "rand-x9", "v9"):
        with pytest.raises(ValueError, match=f"timm knows no augmentation '{policy}'"):
            policy_transform(policy, (32, 32), (0.5, 0.5, 0.5))


def test_gray_goes_through_a_policy_and_stays_gray(labelled: Labelled) -> None:
    augmentation = replace(PLAIN, policy="rand-m9-p1.0-inc1", mean=(0.5,))
    found = batches(labelled, augmentation, PixelFormat(1, "uint8"))
    assert joined(found, "images").shape == (24, 1, 24, 16)
    assert not torch.equal(
        joined(found, "images"),
        joined(batches(labelled, replace(PLAIN, mean=(0.5,)), PixelFormat(1, "uint8")), "images"),
    )


def test_any_number_of_channels_is_cropped_mirrored_and_erased(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", rng.random((29, 31, 5), dtype=np.float32))
    labelled = Labelled(open_source(str(tmp_path)), np.arange(4) % 2)
    augmentation = replace(PLAIN, erase=1.0, mixup=0.8, classes=2, mean=(0.5,) * 5)
    found = batches(labelled, augmentation, PixelFormat(5, "float32"), batch_size=4, micro_batch=2)
    assert joined(found, "images").shape == (16, 5, 24, 16) and joined(found, "images").isfinite().all()


def test_erasing_fills_a_box_with_noise(labelled: Labelled) -> None:
    black = Labelled(labelled.source.subset([0]), np.array([0]))
    found = joined(batches(black, replace(PLAIN, erase=1.0), total_batches=8), "images")
    share = (found != 0).all(dim=1).flatten(1).float().mean(dim=1)
    assert ((share > 0.01) & (share < 0.45)).all()  # 2 % to a third of the area, in whole pixels
    noise = found[(found != 0).all(dim=1)[:, None].expand_as(found)]
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


def test_a_bad_file_is_replaced_with_the_label_of_its_replacement(tmp_path: Path) -> None:
    for i in range(5):
        Image.fromarray(np.full((20, 20, 3), 40 * i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"no image")
    labelled = Labelled(open_source(str(tmp_path)), np.arange(5))
    found = batches(labelled, replace(PLAIN, classes=5), total_batches=5)
    numbers = (joined(found, "images")[:, 0, 0, 0] * 255 / 40).round().long()
    assert joined(found, "targets").argmax(dim=1).tolist() == numbers.tolist() and 3 not in numbers
    assert {Path(name).name for micro in found for name, _ in micro.bad} == {"3.png"}


def test_nothing_but_bad_files_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    labelled = Labelled(open_source(str(tmp_path)), np.zeros(1, dtype=np.int64))
    with pytest.raises(UserError, match=r"21 files in a row cannot be read, the last .*a.png"):
        batches(labelled, PLAIN)


@pytest.mark.parametrize("odd", [{"batch_size": 5}, {"micro_batch": 3}, {"batch_size": 6, "rank": 1, "world_size": 2}])
def test_an_odd_share_cannot_be_mixed(labelled: Labelled, odd: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="images are mixed two and two"):
        batches(labelled, replace(PLAIN, mixup=0.8), **odd)


@pytest.fixture(scope="module")
def ramps(tmp_path_factory: pytest.TempPathFactory) -> Labelled:
    """Ten images: red tells which, green and blue tell where a pixel is."""
    root = tmp_path_factory.mktemp("ramps")
    rows, columns = np.mgrid[:31, :37]
    for i in range(10):
        pixels = np.stack([np.full_like(rows, 20 * i), 8 * rows, 6 * columns], axis=-1)
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{i:02}.png")
    return Labelled(open_source(str(root)), np.arange(10))


def test_repeated_images_come_as_often_with_crops_of_their_own(ramps: Labelled) -> None:
    told = {"repeats": 3, "batch_size": 12, "micro_batch": 12, "total_batches": 2}
    for micro in batches(ramps, replace(PLAIN, classes=10), **told):
        assert sorted(micro.names.count(name) for name in set(micro.names)) == [3] * 4
        for name in set(micro.names):
            places = [place for place, other in enumerate(micro.names) if other == name]
            images = micro.inputs["images"][places]
            assert len({image[0].mean().item() for image in images}) == 1
            assert len({image[1:].numpy().tobytes() for image in images}) == 3


def test_of_an_epoch_of_repeated_images_a_share_is_met(ramps: Labelled) -> None:
    found = batches(ramps, replace(PLAIN, classes=10), repeats=5, batch_size=2, micro_batch=2, total_batches=5)
    assert len({name for micro in found for name in micro.names}) == 2


def test_repetition_changes_the_order_of_samples_and_nothing_in_them(ramps: Labelled) -> None:
    """Ten images thrice are what three epochs of them are, pixel by pixel."""
    augmentation = replace(PLAIN, classes=10, policy=POLICY, erase=0.5, color_jitter=0.3)
    once, thrice = (
        joined(batches(ramps, augmentation, depth=2, total_batches=5, repeats=repeats), "images") for repeats in (1, 3)
    )
    assert sorted(i.numpy().tobytes() for i in once) == sorted(i.numpy().tobytes() for i in thrice)
    assert not torch.equal(once, thrice)


@pytest.mark.parametrize("batch_size", [2, 4, 10, 12])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_no_repeated_image_is_mixed_with_itself(ramps: Labelled, mix: dict[str, float], batch_size: int) -> None:
    """Also where a batch ends between two of the three times."""
    augmentation = replace(PLAIN, classes=10, **mix)
    told = {"batch_size": batch_size, "micro_batch": 2, "total_batches": 60 // batch_size, "repeats": 3}
    for micro in batches(ramps, augmentation, **told):
        assert micro.names[0] != micro.names[1]
        ours, theirs = (int(Path(name).stem) for name in micro.names)
        assert set(micro.inputs["targets"].nonzero()[:, 1].tolist()) <= {ours, theirs}
