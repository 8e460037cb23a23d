import io
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from lomar.data import decode
from lomar.data.decode import PixelFormat, read_image
from lomar.errors import BadImageError

RGB8 = PixelFormat(3, "uint8")
GRAY8 = PixelFormat(1, "uint8")
GRAY16 = PixelFormat(1, "uint16")


def photograph(height=211, width=307):
    """A smooth, colourful uint8 (h, w, 3): what JPEG keeps nearly unchanged."""
    y, x = np.mgrid[:height, :width]
    waves = [
        np.sin(x / 11) + np.cos(y / 17),
        np.sin((x + 2 * y) / 23) + np.cos(x / 29),
        np.cos(y / 13) + np.sin((x - y) / 31),
    ]
    return np.stack([127 + 60 * wave for wave in waves], axis=-1).clip(0, 255).astype(np.uint8)


def encoded(picture, form, **options):
    if not isinstance(picture, PIL.Image.Image):
        picture = PIL.Image.fromarray(picture)
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tiff(array, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def whole(data, fmt, name="x"):
    image = read_image(data, name)
    return image.crop((0, 0, image.height, image.width), (image.height, image.width), fmt)


def pillow_crop(data, box, size):
    """What Pillow makes of the same crop, (3, rows, columns) int."""
    top, left, height, width = box
    picture = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))).convert("RGB")
    part = picture.crop((left, top, left + width, top + height)).resize(size[::-1], PIL.Image.Resampling.BICUBIC)
    return np.asarray(part).transpose(2, 0, 1).astype(int)


# Sides and boxes on the grid of shrunk pixels, whichever way up, so that snapping to it changes nothing.
@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0, 0, 208, 304), (208, 304)),
        ((3, 5, 101, 103), (97, 89)),  # full scale
        ((3, 5, 101, 103), (149, 151)),  # enlarged
        ((6, 10, 196, 250), (97, 89)),  # decoded at a half
        ((4, 0, 204, 300), (51, 53)),  # at a quarter
        ((0, 8, 208, 296), (23, 19)),  # at an eighth
        ((207, 303, 1, 1), (5, 7)),  # the last pixel
    ],
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_crop_equals_pillows_at_every_scale_and_orientation(box, size, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photograph(208, 304), "JPEG", quality=95, exif=exif)
    if orientation >= 5:
        box, size = (box[1], box[0], box[3], box[2]), size[::-1]
    image = read_image(data, "x.jpg")
    assert (image.height, image.width) == ((304, 208) if orientation >= 5 else (208, 304))
    pixels = image.crop(box, size, RGB8)
    assert pixels.shape == (3, *size) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - pillow_crop(data, box, size)).mean() < 1.0


@settings(max_examples=60, deadline=None)
@given(
    orientation=st.sampled_from(range(1, 9)),
    top=st.integers(0, 200),
    left=st.integers(0, 200),
    size=st.tuples(st.integers(2, 61), st.integers(2, 61)),
    stored=st.data(),
)
def test_any_box_of_any_turned_jpeg_lies_where_it_should(orientation, top, left, size, stored):
    ramp = np.broadcast_to(np.linspace(0, 250, 211)[:, None], (211, 223))
    picture = np.stack([ramp, np.linspace(0, 250, 223) + 0 * ramp, 0 * ramp], axis=-1).astype(np.uint8)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture, "JPEG", quality=95, exif=exif)
    image = read_image(data, "x.jpg")
    height = stored.draw(st.integers(1, image.height - top))
    width = stored.draw(st.integers(1, image.width - left))
    box = (top, left, height, width)
    error = np.abs(image.crop(box, size, RGB8).astype(int) - pillow_crop(data, box, size))
    assert error.mean() < 3.0  # a shift of one pixel at an eighth would be 9.5


@pytest.mark.parametrize(
    ("size", "decoded"),
    [
        ((401, 607), (401, 607, 3)),
        ((200, 303), (201, 304, 3)),
        ((97, 101), (101, 152, 3)),
        ((50, 75), (51, 76, 3)),
        ((51, 75), (101, 152, 3)),  # an eighth would fall short of 51 rows
    ],
)
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_covers_the_crop(monkeypatch, size, decoded):
    shapes = []
    original = decode.simplejpeg.decode_jpeg

    def watched(*arguments, **options):
        pixels = original(*arguments, **options)
        shapes.append(pixels.shape)
        return pixels

    monkeypatch.setattr(decode.simplejpeg, "decode_jpeg", watched)
    read_image(encoded(photograph(401, 607), "JPEG"), "x").crop((0, 0, 401, 607), size, RGB8)
    assert shapes == [decoded]


@given(side=st.integers(2, 5000), shrink=st.sampled_from([1, 2, 4, 8]), box=st.data())
def test_snapping_moves_an_edge_by_half_a_shrunk_pixel_at_most(side, shrink, box):
    start = box.draw(st.integers(0, side - 1))
    length = box.draw(st.integers(min(shrink, side - start), side - start))
    end = -(-side // shrink)
    first, last = decode._snapped(start, length, shrink, end)
    assert 0 <= first < last <= end
    if length >= 2 * shrink:
        assert abs(first * shrink - start) <= shrink / 2
        assert abs(last * shrink - (start + length)) <= shrink / 2


def test_gray_jpeg_and_gray_from_colour_jpeg():
    gray = photograph()[..., 0]
    image = read_image(encoded(gray, "JPEG", quality=95), "x")
    assert (image.channels, image.dtype) == (1, "uint8")
    pixels = whole(encoded(gray, "JPEG", quality=95), RGB8)
    assert (pixels[0] == pixels[1]).all() and (pixels[0] == pixels[2]).all()
    assert np.abs(pixels[0].astype(int) - gray).mean() < 2
    luma = np.asarray(PIL.Image.fromarray(photograph()).convert("L")).astype(int)
    assert np.abs(whole(encoded(photograph(), "JPEG", quality=95), GRAY8)[0] - luma).mean() < 1.5


def test_cmyk_jpeg_becomes_rgb():
    data = encoded(PIL.Image.fromarray(photograph()).convert("CMYK"), "JPEG", quality=95)
    assert read_image(data, "x").channels == 3
    assert np.abs(whole(data, RGB8).transpose(1, 2, 0).astype(int) - photograph()).mean() < 4


def test_stray_bytes_before_the_end_of_a_jpeg_do_no_harm():
    data = encoded(photograph(), "JPEG")
    dirty = data[:-2] + b"\0\0\0" + data[-2:]
    with pytest.raises(ValueError, match="extraneous bytes"):
        decode.simplejpeg.decode_jpeg(dirty)
    assert np.abs(whole(dirty, RGB8).astype(int) - whole(data, RGB8)).max() <= 3


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
def test_a_broken_exif_block_does_not_condemn_a_photograph():
    data = encoded(photograph(), "JPEG")
    segment = b"Exif\0\0MM\0*\xff\xff\xff\xff garbage"
    dirty = data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]
    assert whole(dirty, RGB8).shape == (3, 211, 307)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000"])
def test_lossless_formats_are_exact_and_crops_lie_right(form):
    # Few colours, so that a GIF palette holds them.
    picture = (photograph(37, 53) // 128) * 255
    options = {"WEBP": {"lossless": True}, "TIFF": {"compression": "tiff_lzw"}}.get(form, {})
    data = encoded(picture, form, **options)
    assert (whole(data, RGB8) == picture.transpose(2, 0, 1)).all()
    crop = read_image(data, "x").crop((5, 7, 11, 13), (11, 13), RGB8)
    assert (crop == picture[5:16, 7:20].transpose(2, 0, 1)).all()


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_other_formats_are_turned_upright_too(form, orientation):
    picture = photograph(37, 53)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    options = {"tiffinfo": {0x0112: orientation}} if form == "TIFF" else {"exif": exif}
    data = encoded(picture, form, **options, **({"lossless": True} if form == "WEBP" else {}))
    expected = np.rot90(picture, 2 if orientation == 3 else -1)
    image = read_image(data, "x")
    assert (image.height, image.width) == expected.shape[:2]
    assert (whole(data, RGB8) == expected.transpose(2, 0, 1)).all()


def test_an_image_can_be_cropped_twice():
    image = read_image(encoded(photograph(37, 53), "PNG"), "x")
    box, size = (3, 5, 17, 19), (17, 19)
    assert (image.crop(box, size, RGB8) == image.crop(box, size, RGB8)).all()


def test_transparent_pixels_are_laid_on_white():
    rgba = np.zeros((5, 7, 4), np.uint8)
    rgba[:, :3] = (10, 20, 30, 255)  # opaque on the left, transparent black on the right
    for picture in (PIL.Image.fromarray(rgba), PIL.Image.fromarray(rgba).quantize(4)):
        pixels = whole(encoded(picture, "PNG"), RGB8)
        assert pixels[:, 2, 1].tolist() == [10, 20, 30]
        assert pixels[:, 2, 5].tolist() == [255, 255, 255]
    gray = PIL.Image.fromarray(rgba).convert("LA")
    assert read_image(encoded(gray, "PNG"), "x").channels == 1
    assert whole(encoded(gray, "PNG"), GRAY8)[0, 2, 5] == 255


def test_one_bit_pictures_are_black_and_white():
    bits = np.random.default_rng(0).random((13, 17)) < 0.5
    for form in ("PNG", "TIFF"):
        pixels = whole(encoded(PIL.Image.fromarray(bits), form), GRAY8)
        assert (pixels[0] == bits * 255).all()


@pytest.mark.parametrize("make", [lambda a: encoded(a, "PNG"), lambda a: encoded(a, "PPM"), tiff, npy])
def test_sixteen_bit_gray_is_kept_to_the_last_bit(make):
    picture = np.random.default_rng(0).integers(0, 65_536, (13, 17), dtype=np.uint16)
    data = make(picture)
    image = read_image(data, "x")
    assert (image.height, image.width, image.channels, image.dtype) == (13, 17, 1, "uint16")
    assert (whole(data, GRAY16)[0] == picture).all()
    resized = image.crop((0, 0, 13, 17), (7, 11), GRAY16)
    assert resized.dtype == np.uint16 and resized.shape == (1, 7, 11)


def test_resizing_sixteen_bits_does_not_wrap_around_at_edges():
    step = np.zeros((16, 16), np.uint16)
    step[:, 8:] = 65_535
    resized = read_image(npy(step), "x").crop((0, 0, 16, 16), (31, 31), GRAY16)
    # The edge falls on the middle column; beside it bicubic passes below 0 and above 65535.
    assert resized[0, :, :14].max() < 10_000 and resized[0, :, 17:].min() > 55_000


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_npy_has_channels_first_or_last(dtype, order, channels):
    array = np.random.default_rng(0).integers(0, 255, (13, 17, channels)).astype(dtype)
    fmt = PixelFormat(channels, np.dtype(dtype).name)
    last = whole(npy(np.asarray(array, order=order)), fmt)
    first = whole(npy(np.asarray(array.transpose(2, 0, 1), order=order)), fmt)
    assert (last == array.transpose(2, 0, 1)).all() and (first == last).all()
    crop = read_image(npy(array), "x").crop((1, 2, 11, 7), (5, 3), fmt)
    assert crop.shape == (channels, 5, 3) and crop.dtype == dtype


def test_big_endian_half_precision_and_boolean_arrays_are_read():
    array = np.arange(6 * 7).reshape(6, 7)
    assert (whole(npy(array.astype(">u2")), GRAY16)[0] == array).all()
    assert (whole(npy(array.astype(np.float16)), PixelFormat(1, "float32"))[0] == array).all()
    assert (whole(npy(array > 20), GRAY8)[0] == (array > 20) * 255).all()


BANDS = np.random.default_rng(0).integers(0, 60_000, (5, 13, 17), dtype=np.uint16)  # (C, H, W)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize(
    "make",
    [
        lambda a: tiff(a, photometric="minisblack", planarconfig="separate"),
        lambda a: tiff(a.transpose(1, 2, 0), photometric="minisblack", planarconfig="contig"),
        lambda a: tiff(a.transpose(1, 2, 0), photometric="minisblack", planarconfig="contig", compression="zlib"),
        lambda a: tiff(a, photometric="minisblack"),  # one page a band
        lambda a: tiff(a.transpose(1, 2, 0), photometric="minisblack"),  # one page a row
        lambda a: tiff(a, photometric="minisblack", imagej=True),
        lambda a: tiff(a, photometric="minisblack", ome=True, metadata={"axes": "CYX"}),
    ],
)
def test_five_band_tiff_is_exact_in_every_layout(make, dtype):
    bands = BANDS.astype(dtype)
    fmt = PixelFormat(5, dtype)
    image = read_image(make(bands), "x.tif")
    assert (image.height, image.width, image.channels, image.dtype) == (13, 17, 5, dtype)
    assert (whole(make(bands), fmt) == bands).all()


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_sixteen_bit_rgb_tiff_keeps_its_bits(planar):
    bands = BANDS[:3]
    stored = bands if planar == "separate" else bands.transpose(1, 2, 0)
    data = tiff(stored, photometric="rgb", planarconfig=planar)
    assert (whole(data, PixelFormat(3, "uint16")) == bands).all()


def test_pages_without_a_stated_meaning_are_not_channels():
    pages = [PIL.Image.fromarray(photograph(13, 17)[..., channel]) for channel in range(3)]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert (whole(data, GRAY8)[0] == np.asarray(pages[0])).all()


def test_changes_of_type_keep_the_share_of_full_scale():
    bytes_ = np.arange(256, dtype=np.uint8).reshape(16, 16)
    wide = whole(npy(bytes_), GRAY16)
    assert (wide[0] == bytes_.astype(int) * 257).all()
    assert (whole(npy(wide[0]), GRAY8)[0] == bytes_).all()
    assert np.allclose(whole(npy(bytes_), PixelFormat(1, "float32"))[0], bytes_ / 255)
    assert np.allclose(whole(npy(wide[0]), PixelFormat(1, "float32"))[0], bytes_ / 255)
    assert [PixelFormat(1, dtype).scale for dtype in ("uint8", "uint16", "float32")] == [255, 65_535, 1]


def test_luma_is_pillows_and_keeps_gray():
    picture = photograph(37, 53)
    expected = np.asarray(PIL.Image.fromarray(picture).convert("L"))
    assert (whole(encoded(picture, "PNG"), GRAY8)[0] == expected).all()
    white = np.full((5, 7, 3), 65_535, np.uint16)
    assert (whole(npy(white), GRAY16) == 65_535).all()


def test_resizing_equals_pillows():
    picture = photograph(101, 103)
    data = encoded(picture, "PNG")
    for size in ((37, 41), (151, 149)):
        found = read_image(data, "x").crop((3, 5, 89, 83), size, RGB8).astype(int)
        error = np.abs(found - pillow_crop(data, (3, 5, 89, 83), size))
        assert error.max() <= 2 and error.mean() < 0.1


def png_bomb():
    chunks = b""
    for kind, body in ((b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)), (b"IDAT", b"")):
        chunks += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunks


def jpeg_bomb():
    data = bytearray(encoded(photograph(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    return bytes(data)


BAD = {
    "empty": (b"", "empty file"),
    "text": (b"<html>not found</html>", "the content is not an image, despite .jpg"),
    "jpeg of a few bytes": (b"\xff\xd8\xff\xe0\0\x10JFIF", "."),
    "one pixel wide": (encoded(np.zeros((7, 1, 3), np.uint8), "PNG"), "only 7 x 1 pixels"),
    "png bomb": (png_bomb(), "exceeds limit"),
    "jpeg bomb": (jpeg_bomb(), "60000 x 60000 pixels are more than"),
    "npy of objects": (npy(np.array([[object()]])), "Python objects"),
    "npy of four axes": (npy(np.zeros((2, 3, 5, 7), np.uint8)), r"shape \(2, 3, 5, 7\) is not an image"),
    "npy of one axis": (npy(np.zeros(7, np.uint8)), r"shape \(7,\) is not an image"),
    "npy of long integers": (npy(np.zeros((5, 7), np.int64)), "int64 pixels are not supported"),
    "npy cut short": (npy(np.zeros((31, 37), np.uint8))[:-5], "truncated array"),
    "npy header cut short": (npy(np.zeros((5, 7), np.uint8))[:20], "."),
    "npy not finite": (npy(np.full((5, 7), np.nan, np.float32)), "not finite"),
    "tiff of nothing": (b"II*\0\0\0\0\0", "."),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_with_a_short_reason(case):
    data, reason = BAD[case]
    with pytest.raises(BadImageError, match=reason) as caught:
        whole(data, PixelFormat(1, "float32"), name="dir/photo.jpg")
    assert "\n" not in str(caught.value) and 0 < len(str(caught.value)) <= 250


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "JPEG2000"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.97])
def test_truncated_files_are_refused_whatever_the_crop(form, share):
    noise = np.random.default_rng(0).integers(0, 256, (97, 101, 3), dtype=np.uint8)
    data = encoded(noise, form, **({"lossless": True} if form == "WEBP" else {}))
    with pytest.raises(BadImageError):
        read_image(data[: int(share * len(data))], "x").crop((0, 0, 11, 13), (5, 7), RGB8)


def test_a_jpeg_that_lacks_only_its_last_bytes_is_refused():
    with pytest.raises(BadImageError, match="truncated"):
        whole(encoded(photograph(), "JPEG")[:-2], RGB8)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=150, deadline=None)
@given(data=st.data(), form=st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP"]))
def test_damaged_bytes_raise_nothing_but_bad_image_error(data, form):
    content = bytearray(encoded(photograph(23, 29), form))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, min(len(content) - 1, 400)))] = data.draw(st.integers(0, 255))
    try:
        image = read_image(bytes(content), "x")
        image.crop((0, 0, image.height, image.width), (7, 5), PixelFormat(image.channels, image.dtype))
    except BadImageError as error:
        assert "\n" not in str(error)


def test_channel_counts_that_do_not_go_together_are_refused():
    five = npy(np.zeros((13, 17, 5), np.uint8))
    with pytest.raises(BadImageError, match="5 channels where 3 are wanted"):
        whole(five, RGB8)
    with pytest.raises(BadImageError, match="3 channels where 5 are wanted"):
        whole(encoded(photograph(), "JPEG"), PixelFormat(5, "uint8"))


def test_float_pixels_do_not_become_integers():
    with pytest.raises(BadImageError, match="float32 pixels have no fixed range to become uint8"):
        whole(npy(np.zeros((5, 7), np.float32)), GRAY8)


# Lanczos, for tokenizers.


@pytest.mark.parametrize("size", [(37, 41), (8, 7), (151, 149)])
def test_lanczos_is_pillows(size):
    """To the last bit, of a box of a PNG; another filter would be told apart."""
    picture, box = photograph(101, 103), (3, 5, 89, 83)
    noise = np.random.default_rng(0).integers(0, 256, picture.shape, dtype=np.uint8)
    image = read_image(encoded(picture // 2 + noise // 2, "PNG"), "x")
    top, left, height, width = box
    part = PIL.Image.fromarray((picture // 2 + noise // 2)[top : top + height, left : left + width])
    expected = np.asarray(part.resize(size[::-1], PIL.Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    found = image.crop(box, size, RGB8, lanczos=True)
    assert found.dtype == np.uint8 and (found == expected).all()
    assert not (image.crop(box, size, RGB8) == expected).all()


def test_lanczos_of_the_jpeg_decoders_smaller_picture_is_close_to_that_of_the_whole():
    data, box, size = encoded(photograph(208, 304), "JPEG", quality=95), (0, 0, 208, 304), (51, 53)
    whole_picture = PIL.Image.open(io.BytesIO(data)).convert("RGB")
    expected = np.asarray(whole_picture.resize(size[::-1], PIL.Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    found = read_image(data, "x").crop(box, size, RGB8, lanczos=True)
    assert np.abs(found.astype(int) - expected).mean() < 1.0


@pytest.mark.parametrize(("dtype", "scale"), [("uint8", 255), ("uint16", 65_535), ("float32", 1)])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_lanczos_keeps_every_type_and_number_of_channels(dtype, scale, channels):
    """As Pillow a channel at a time; 16-bit pixels, which it does not resize, to the last bit and in their range."""
    share = np.random.default_rng(0).random((29, 31, channels), dtype=np.float32)
    share[:, :10], share[:, 20:] = 0, 1  # edges, where Lanczos overshoots
    array = (share * scale).astype(dtype)
    found = read_image(npy(array), "x").crop((1, 2, 27, 29), (11, 13), PixelFormat(channels, dtype), lanczos=True)
    assert found.shape == (channels, 11, 13) and found.dtype == dtype
    for plane, band in zip(found, array.transpose(2, 0, 1), strict=True):
        picture = PIL.Image.fromarray(band[1:28, 2:31].astype("uint8" if dtype == "uint8" else "float32"))
        exact = np.asarray(picture.resize((13, 11), PIL.Image.Resampling.LANCZOS))
        if dtype == "uint16":
            assert exact.min() < 0 and exact.max() > 65_535
            assert np.abs(plane - exact.clip(0, 65_535)).max() <= 0.5
        else:
            assert (plane == exact).all()
            assert dtype == "uint8" or exact.min() < 0  # no bounds to keep to


def test_lanczos_leaves_a_crop_of_the_right_size_as_it_is():
    picture = photograph(37, 53)
    found = read_image(encoded(picture, "PNG"), "x").crop((5, 7, 11, 13), (11, 13), RGB8, lanczos=True)
    assert (found == picture[5:16, 7:20].transpose(2, 0, 1)).all()


def test_lanczos_makes_colour_of_gray_and_gray_of_colour():
    gray = photograph(37, 53)[..., 0]
    colour = read_image(encoded(gray, "PNG"), "x").crop((0, 0, 37, 53), (11, 13), RGB8, lanczos=True)
    assert colour.shape == (3, 11, 13) and (colour == colour[0]).all()
    assert read_image(encoded(photograph(37, 53), "PNG"), "x").crop(
        (0, 0, 37, 53), (11, 13), GRAY8, lanczos=True
    ).shape == (1, 11, 13)
