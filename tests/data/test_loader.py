import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lomar.data.decode import PixelFormat, read_image
from lomar.data.loader import (
    Batching,
    CropPlan,
    MicroBatch,
    SampleKey,
    centre_crops,
    cut_windows,
    micro_batch_keys,
    pretraining_batches,
    share_of_batch,
    stream,
)
from lomar.data.opening import open_source
from lomar.data.order import Shuffled
from lomar.data.sources import ImageSource
from lomar.errors import UserError
from lomar.seeding import seeded

RGB8 = PixelFormat(3, "uint8")
GRID, PATCH_PX, VIEW = 5, 7, (3, 2)


class RandomWindows:
    """Two windows of 3 x 2 patches on a grid of 5 x 5, a function of the sample's key alone."""

    def __call__(self, key: SampleKey):
        generator = seeded(key.epoch, key.index, "test")
        rows = torch.randint(0, GRID - VIEW[0] + 1, (2, 1), generator=generator)
        columns = torch.randint(0, GRID - VIEW[1] + 1, (2, 1), generator=generator)
        hidden = torch.rand(2, 6, generator=generator) < 0.5
        return {"corners": torch.cat([rows, columns], dim=1), "hidden": hidden, "paths": torch.full((2, 1), 0.5)}


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(11):
        array = rng.integers(0, 256, (41 + number, 53, 3), dtype=np.uint8)
        PIL.Image.fromarray(array).save(tmp_path / f"{number:02d}.{'jpg' if number % 2 else 'png'}")
    return tmp_path


class FixedWindow:
    """The same one window for every sample."""

    def __call__(self, key: SampleKey):
        return {"corners": torch.tensor([[1, 2]]), "hidden": torch.zeros(1, 6, dtype=torch.bool)}


def batches(folder, fmt=RGB8, draw=None, **options):
    settings = {
        "plan": CropPlan(GRID * PATCH_PX, (0.2, 1.0)),
        "patch_size_px": PATCH_PX,
        "view_size": VIEW,
    }
    settings |= {name: options.pop(name) for name in settings if name in options}
    batching = Batching(**({"seed": 5, "batch_size": 7, "micro_batch": 7, "total_batches": 4} | options))
    source = folder if isinstance(folder, ImageSource) else open_source(str(folder))
    return list(pretraining_batches(source, fmt, draw or RandomWindows(), batching=batching, **settings))


def joined(parts):
    """Inputs and names of many micro-batches as one."""
    tensors = {name: torch.cat([part.inputs[name] for part in parts]) for name in parts[0].inputs}
    return tensors, [name for part in parts for name in part.names]


def assert_same(parts, others):
    (tensors, names), (other_tensors, other_names) = joined(parts), joined(others)
    assert names == other_names and tensors.keys() == other_tensors.keys()
    assert all(torch.equal(tensors[name], other_tensors[name]) for name in tensors)


def test_a_batch_has_the_stated_shapes_and_types(folder):
    batch = batches(folder, total_batches=1)[0]
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.inputs.items()}
    assert found == {
        "pixels": ((7, 2, 3, 21, 14), torch.uint8),
        "corners": ((7, 2, 2), torch.int64),
        "hidden": ((7, 2, 6), torch.bool),
        "paths": ((7, 2, 1), torch.float32),  # whatever is drawn is handed on
    }
    assert len(batch.names) == 7 and batch.bad == [] and batch.last


def test_workers_do_not_change_the_batches(folder):
    assert_same(batches(folder), batches(folder, workers=2))


def test_colour_and_the_tokenizers_pictures_are_the_samples_own_too(folder):
    """Neither workers nor micro-batches nor the batch to begin with change them."""
    plan = CropPlan(GRID * PATCH_PX, (0.2, 1.0), color_jitter=0.4, tokenised_px=40)
    whole = batches(folder, plan=plan)
    assert whole[0].inputs["tokenised"].shape == (7, 3, 40, 40)
    assert_same(whole, batches(folder, plan=plan, workers=2, micro_batch=3))
    assert_same(whole[2:], batches(folder, plan=plan, first_batch=2))
    assert not torch.equal(joined(whole)[0]["pixels"], joined(batches(folder))[0]["pixels"])


class WholePicture:
    """One window that is all of the crop."""

    def __call__(self, key: SampleKey):
        return {"corners": torch.zeros(1, 2, dtype=torch.int64)}


@pytest.mark.parametrize("color_jitter", [0.0, 0.4])
def test_a_tokenizer_sees_the_same_crop_mirrored_and_coloured_alike(tmp_path, color_jitter):
    """A half as large; of smooth pictures, so that the two resizing filters agree."""
    y, x = np.mgrid[:97, :131] / 131
    for number in range(20):
        waves = [np.sin(3 * x + k + number) + np.cos(4 * y * k + number) for k in (1, 2, 3)]
        picture = 127 + 50 * np.stack(waves, axis=-1)
        PIL.Image.fromarray(picture.astype(np.uint8)).save(tmp_path / f"{number:02d}.png")
    plan = CropPlan(80, (0.2, 1.0), color_jitter, tokenised_px=40)
    options = {"plan": plan, "patch_size_px": 8, "view_size": (10, 10), "batch_size": 20, "micro_batch": 20}
    (batch,) = batches(tmp_path, draw=WholePicture(), total_batches=1, **options)
    small = batch.inputs["pixels"][:, 0].unfold(2, 2, 2).unfold(3, 2, 2).float().mean((-2, -1))
    difference = (batch.inputs["tokenised"].float() - small).abs()
    assert difference.mean() < 1 and difference.amax((1, 2, 3)).max() < 12
    # A picture that were mirrored alone would be told apart.
    assert (batch.inputs["tokenised"].flip(3).float() - small).abs().mean((1, 2, 3)).min() > 2


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
def test_micro_batches_are_the_same_samples_and_mark_their_last(folder, micro_batch):
    parts = batches(folder, micro_batch=micro_batch)
    assert_same(batches(folder), parts)
    per_batch = -(-7 // micro_batch)
    assert [part.last for part in parts] == ([False] * (per_batch - 1) + [True]) * 4
    assert all(len(part.names) <= micro_batch for part in parts)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_every_global_batch(folder, world_size):
    alone = batches(folder)
    shares = [batches(folder, rank=rank, world_size=world_size, micro_batch=2) for rank in range(world_size)]
    for rank, parts in enumerate(shares):
        assert sum(part.last for part in parts) == 4, f"rank {rank} must see the end of every batch"
    together = []
    for _ in range(4):
        for parts in shares:
            while True:
                together.append(parts.pop(0))
                if together[-1].last:
                    break
    assert_same(alone, together)


@given(batch_size=st.integers(1, 500), world_size=st.integers(1, 64))
def test_shares_are_contiguous_complete_and_even(batch_size, world_size):
    if batch_size < world_size:
        with pytest.raises(ValueError, match="cannot be shared"):
            share_of_batch(batch_size, 0, world_size)
        return
    shares = [share_of_batch(batch_size, rank, world_size) for rank in range(world_size)]
    assert [slot for share in shares for slot in share] == list(range(batch_size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_run_resumed_at_a_batch_equals_the_tail_of_an_uninterrupted_one(folder):
    assert_same(batches(folder)[2:], batches(folder, first_batch=2))


def test_every_image_comes_once_an_epoch_in_an_order_of_its_own():
    keys = [key for batch in islice(stream(Shuffled(11, 3, 7), 7, 0), 11) for key in batch]  # 7 epochs of 11
    assert [key.epoch for key in keys] == [epoch for epoch in range(7) for _ in range(11)]
    orders = {tuple(key.index for key in keys[start : start + 11]) for start in range(0, 77, 11)}
    assert len(orders) == 7
    assert all(sorted(order) == list(range(11)) for order in orders)
    assert [(key.batch, key.slot) for key in keys] == [(batch, slot) for batch in range(11) for slot in range(7)]


def test_batches_are_full_even_where_the_data_is_smaller():
    batch = next(stream(Shuffled(count=3, seed=0, batch_size=11), 11, 0))
    assert len(batch) == len({(key.epoch, key.index) for key in batch}) == 11


def test_small_data_recurs_with_new_crops(folder):
    (batch,) = batches(open_source(str(folder)).subset([0]), draw=FixedWindow(), total_batches=1)
    assert len(set(batch.names)) == 1
    assert len({crop.tobytes() for crop in batch.inputs["pixels"].numpy()}) == 7


def test_micro_batches_of_a_share_are_cut_from_its_slots_alone():
    keys = list(micro_batch_keys(islice(stream(Shuffled(11, 0, 7), 7, 0), 2), range(2, 7), 3))
    assert [[key.slot for key in part] for part in keys] == [[2, 3, 4], [5, 6]] * 2


@given(
    corners=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 10)), min_size=1, max_size=5),
    mirrored=st.booleans(),
)
@settings(deadline=None)
def test_a_window_is_a_slice_of_the_crop(corners, mirrored):
    crop = np.arange(2 * 11 * 13).reshape(2, 11, 13)[:, :, :: -1 if mirrored else 1]
    windows = np.empty((len(corners), 2, 5, 3), crop.dtype)
    cut_windows(crop, np.array(corners), windows)
    for window, (row, column) in zip(windows, corners, strict=True):
        for r, c in np.ndindex(5, 3):
            assert (window[:, r, c] == crop[:, row + r, column + c]).all()


def test_windows_lie_at_their_corners_in_a_crop_mirrored_half_of_the_time(tmp_path):
    # The whole image is taken (scale 1), so windows must be slices of it or of its mirror image.
    array = np.random.default_rng(0).integers(0, 256, (35, 35, 3), dtype=np.uint8)
    for number in range(40):
        PIL.Image.fromarray(array).save(tmp_path / f"{number}.png")
    (batch,) = batches(tmp_path, plan=CropPlan(35, (1.0, 1.0)), batch_size=40, micro_batch=40, total_batches=1)
    upright = array.transpose(2, 0, 1)
    mirrored = 0
    for windows, corners in zip(
        batch.inputs["pixels"].numpy(), batch.inputs["corners"].numpy() * PATCH_PX, strict=True
    ):
        cut = {}
        for name, crop in (("upright", upright), ("mirrored", upright[:, :, ::-1])):
            cut[name] = [
                (crop[:, r : r + 21, c : c + 14] == w).all() for w, (r, c) in zip(windows, corners, strict=True)
            ]
        # With scale 1 a box of another aspect never fits, so the fallback takes the whole square.
        assert all(cut["upright"]) or all(cut["mirrored"])
        mirrored += all(cut["mirrored"])
    assert 10 <= mirrored <= 30


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("workers", [0, 1])
def test_every_pixel_type_and_channel_count_reaches_the_batch(tmp_path, dtype, workers):
    np.save(tmp_path / "a.npy", np.full((37, 41, 5), 200, dtype))
    (batch,) = batches(tmp_path, PixelFormat(5, dtype), total_batches=1, workers=workers)
    pixels = batch.inputs["pixels"]
    assert pixels.dtype == getattr(torch, dtype)
    assert pixels.shape == (7, 2, 5, 21, 14)
    assert np.abs(pixels.numpy() - np.array(200, np.float32)).max() < (1e-3 if dtype == "float32" else 1e-9)


def test_an_image_smaller_than_the_crop_is_enlarged(tmp_path):
    PIL.Image.new("RGB", (3, 2), (9, 8, 7)).save(tmp_path / "a.png")
    (batch,) = batches(tmp_path, total_batches=1)
    assert batch.inputs["pixels"][0, 0, :, 0, 0].tolist() == [9, 8, 7]


def test_bad_files_are_replaced_alike_everywhere_and_reported(folder):
    (folder / "03.jpg").write_bytes((folder / "03.jpg").read_bytes()[:900])
    (folder / "04.png").write_bytes(b"")
    parts = batches(folder)
    assert_same(parts, batches(folder, workers=2, micro_batch=3))
    bad = dict(entry for part in parts for entry in part.bad)
    assert {Path(name).name for name in bad} == {"03.jpg", "04.png"}
    assert "truncated" in bad[str(folder / "03.jpg")] and bad[str(folder / "04.png")] == "empty file"
    assert all(len(part.names) == 7 and not set(part.names) & set(bad) for part in parts)


def test_a_file_that_vanishes_counts_as_bad(folder):
    source = open_source(str(folder))
    (folder / "00.png").unlink()
    (batch,) = batches(source, batch_size=11, micro_batch=11, total_batches=1)
    assert (str(folder / "00.png"), "No such file or directory") in batch.bad


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_files_without_end_stop_the_run_with_one_line(tmp_path, workers):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"21 files in a row cannot be read, the last .*jpg: empty file") as caught:
        batches(tmp_path, workers=workers)
    assert "\n" not in str(caught.value)


def test_loading_leaves_the_global_random_state_alone(folder):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(folder, total_batches=1, workers=1)
    assert torch.equal(before, torch.get_rng_state())


class SignalsItself:
    """Does in the worker what Ctrl-C and `timeout` do to a process group."""

    def __call__(self, key: SampleKey):
        if multiprocessing.parent_process() is not None and key.slot == 3:
            os.kill(os.getpid(), signal.SIGINT)
            if key.batch == 0:
                os.kill(os.getpid(), signal.SIGTERM)
        return {"corners": torch.zeros(1, 2, dtype=torch.int64)}


def test_workers_outlive_a_signal_to_the_process_group(folder):
    assert len(batches(folder, draw=SignalsItself(), total_batches=3, workers=1)) == 3
    assert not multiprocessing.active_children()


def test_a_micro_batch_moves_to_a_device_whole(folder):
    here = batches(folder, total_batches=1, plan=CropPlan(35, (0.2, 1.0), tokenised_px=40))[0]
    batch = here.to("meta")
    assert isinstance(batch, MicroBatch) and batch.inputs.keys() == here.inputs.keys()
    assert {tensor.device.type for tensor in batch.inputs.values()} == {"meta"}
    assert len(batch.names) == 7 and batch.last


def test_keys_can_be_pickled_for_workers():
    key = SampleKey(1, 2, 3, 4)
    assert pickle.loads(pickle.dumps(key)) == key and key.index == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_centre_crops_come_in_order_with_bad_files_marked(folder, workers):
    (folder / "05.jpg").write_bytes(b"")
    source = open_source(str(folder))
    found = list(centre_crops(source, RGB8, 23, workers, batch_size=4))
    assert [len(pixels) for pixels, _ in found] == [4, 4, 3]
    pixels, good = (torch.cat(parts) for parts in zip(*found, strict=True))
    assert good.tolist() == [number != 5 for number in range(11)]
    assert (pixels[5] == 0).all()
    # 10.jpg is 51 x 53 in pixels: the centre is 45 x 45.
    expected = read_image(source.read(10), "x").crop((3, 4, 45, 45), (23, 23), RGB8)
    assert (pixels[10].numpy() == expected).all()


KILLED = """
import multiprocessing, sys, time, torch
from lomar.data.workers import loaded

class Large(torch.utils.data.Dataset):
    def __getitems__(self, keys):
        return b"x" * 10_000_000  # more than a pipe holds

batches = loaded(Large(), ([0] for _ in range(100)), workers=1, pin_memory=False)
next(batches)
print(multiprocessing.active_children()[0].pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked there")
def test_a_worker_ends_with_a_parent_that_was_killed() -> None:
    """Though it waits to write a batch that nobody will read."""
    parent = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    worker = Path("/proc", parent.stdout.readline().strip())
    assert worker.exists()
    time.sleep(0.5)  # so that it waits
    parent.kill()
    parent.wait()
    end = time.monotonic() + 20
    while worker.exists() and (worker / "stat").read_text().split()[2] != "Z":
        assert time.monotonic() < end, "the worker lives on"
        time.sleep(0.1)
