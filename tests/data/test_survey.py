import numpy as np
import PIL.Image
import pytest

from lomar.data.decode import PixelFormat
from lomar.data.opening import open_source
from lomar.data.survey import channel_statistics, survey
from lomar.errors import UserError


def write(folder, name, array):
    if name.endswith(".npy"):
        np.save(folder / name, array)
    else:
        PIL.Image.fromarray(array).save(folder / name)


def surveyed(folder, **options):
    return survey(open_source(str(folder)), **options)


def rgb(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_sizes_and_format_of_colour_files(tmp_path):
    for number, (height, width) in enumerate([(31, 97), (41, 37), (53, 59)]):
        write(tmp_path, f"{number}.png", rgb(height, width))
    found = surveyed(tmp_path)
    assert (found.count, found.probed, found.unreadable) == (3, 3, [])
    assert (found.smallest_short_side_px, found.median_short_side_px) == (31, 37)
    assert found.format == PixelFormat(3, "uint8")


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ([rgb(13, 17)[..., 0]], (1, "uint8")),
        ([rgb(13, 17)[..., 0], rgb(13, 17)], (3, "uint8")),
        ([rgb(13, 17), rgb(13, 17)[..., 0].astype(np.uint16)], (3, "uint16")),
        ([rgb(13, 17)[..., 0].astype(np.uint16), rgb(13, 17)[..., 0].astype(np.float32)], (1, "float32")),
        ([np.zeros((13, 17, 5), np.uint8)], (5, "uint8")),
    ],
)
def test_the_format_is_the_one_all_files_can_be_brought_to(tmp_path, arrays, expected):
    for number, array in enumerate(arrays):
        write(tmp_path, f"{number}.npy", array)
    assert surveyed(tmp_path).format == PixelFormat(*expected)


def test_files_are_spread_over_the_whole_source(tmp_path):
    for number in range(11):
        write(tmp_path, f"{number:02d}.png", rgb(11 + number, 29))
    found = surveyed(tmp_path, limit=3)
    assert (found.count, found.probed) == (11, 3)
    assert (found.smallest_short_side_px, found.median_short_side_px) == (11, 16)


def test_a_few_bad_files_are_listed_with_their_reasons(tmp_path):
    for number in range(9):
        write(tmp_path, f"{number}.jpg", rgb(97, 101))
    content = (tmp_path / "4.jpg").read_bytes()
    (tmp_path / "4.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "6.jpg").unlink()
    (tmp_path / "6.jpg").symlink_to(tmp_path / "gone")
    (first, truncated), (second, vanished) = surveyed(tmp_path).unreadable
    assert first.endswith("4.jpg") and "truncated" in truncated
    assert second.endswith("6.jpg") and vanished == "No such file or directory"


def test_too_many_bad_files_are_refused_with_the_share_an_example_and_the_option(tmp_path):
    for number in range(4):
        write(tmp_path, f"{number}.png", rgb(13, 17))
    for number in range(2):
        (tmp_path / f"bad{number}.png").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        surveyed(tmp_path, flag="--eval-data")
    message = str(caught.value)
    assert message.startswith("--eval-data: 2 of 6 files cannot be read (")
    assert "bad0.png: empty file" in message and "--max-bad-share allows 25%" in message
    assert surveyed(tmp_path, max_bad_share=0.5).probed == 6


def test_no_readable_file_at_all_is_refused_even_where_any_share_is_allowed(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"--data: none of 1 files can be read, for example .*a\.jpg: "):
        surveyed(tmp_path, max_bad_share=1.0)


def test_channel_counts_that_differ_are_refused_naming_two_files(tmp_path):
    write(tmp_path, "a.npy", rgb(13, 17))
    write(tmp_path, "b.npy", np.zeros((13, 17, 5), np.uint8))
    write(tmp_path, "c.npy", rgb(13, 17))
    with pytest.raises(UserError, match=r"b\.npy has 5 channels, but .*a\.npy has 3"):
        surveyed(tmp_path)


def test_channels_asked_for_are_given_or_refused(tmp_path):
    write(tmp_path, "a.png", rgb(13, 17))
    assert surveyed(tmp_path, channels=1).format.channels == 1
    with pytest.raises(UserError, match=r"a\.png has 3 channels, but --channels is 4"):
        surveyed(tmp_path, channels=4)


def test_channel_statistics_are_in_units_of_full_scale(tmp_path):
    for dtype, scale in (("uint8", 255), ("uint16", 65_535)):
        folder = tmp_path / dtype
        folder.mkdir()
        flat = np.zeros((64, 64, 2), dtype)
        flat[..., 0] = scale // 5
        flat[:, ::2, 1] = scale  # half of the columns at full scale: mean 1/2, deviation 1/2
        write(folder, "a.npy", flat)
        (folder / "bad.npy").write_bytes(b"")
        mean, std = channel_statistics(open_source(str(folder)), PixelFormat(2, dtype), size_px=56)
        assert mean == pytest.approx((0.2, 0.5), abs=1e-4)
        assert std == pytest.approx((1e-3, 0.5), abs=1e-4)
