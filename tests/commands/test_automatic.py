"""Claims about what is chosen when an option is not given."""

import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lomar.commands.automatic import Hardware, choose, find_hardware, micro_batch
from lomar.commands.settling import check_fit
from lomar.commands.two_view_settling import fitted_views
from lomar.data.decode import PixelFormat
from lomar.errors import UserError
from lomar.methods.recipes import RECIPES
from lomar.options import PretrainOptions, convert

CPU = Hardware("cpu", "some processor", 8 * 10**9, 2, bf16=False)
GPU = Hardware("cuda", "some GPU", 80 * 10**9, 16, bf16=True)
RGB = PixelFormat(3, "uint8")

hardware = st.builds(
    Hardware,
    st.sampled_from(["cpu", "cuda"]),
    st.just("some device"),
    st.integers(10**6, 10**12),
    st.integers(1, 256),
    st.booleans(),
)
formats = st.builds(PixelFormat, st.integers(1, 20), st.sampled_from(["uint8", "uint16", "float32"]))
# Values that go together with one another and with windows of 7 x 7.
given_options = st.fixed_dictionaries(
    {},
    optional={
        "model": st.sampled_from(["tiny", "base", "huge", "24x4x3"]),
        "image_size": st.integers(7, 1024),
        "batch_size": st.integers(2, 10**5),
        "base_lr": st.floats(1e-6, 1),
        "workers": st.integers(0, 9),
        "precision": st.sampled_from(["fp32", "bf16"]),
    },
) | st.fixed_dictionaries({"patch_size": st.integers(1, 64)}, optional={"max_steps": st.integers(1, 10**6)})


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(
    recipe=st.sampled_from(["lomar", "mae", "beit", "beit-lomar", "fig5-decoder-7", "dino", "mocov3"]),
    asked=given_options,
    count=st.integers(1, 10**8),
    side=st.integers(2, 20_000),
    fmt=formats,
    hw=hardware,
)
def test_the_choices_fit_together_and_leave_alone_what_was_given(
    recipe: str, asked: dict[str, Any], count: int, side: int, fmt: PixelFormat, hw: Hardware
) -> None:
    """Whatever the images and the hardware: a crop of whole patches, a window inside the grid, legal values.

    A crop that cannot be cut into patches well is refused with one that can.
    """
    asked = dict(RECIPES[recipe].options) | {"method": recipe} | asked
    try:
        choices = choose(asked, count, side, fmt, hw)
    except UserError as error:  # a crop of, say, 191 pixels; one near it that would do is named
        told = re.fullmatch(rf"--image-size {asked['image_size']} divides into .*; (\d+) would, .*", str(error))
        assert told
        choices = choose(asked | {"image_size": int(told[1])}, count, side, fmt, hw)
        asked["image_size"] = int(told[1])
    if objective := RECIPES[recipe].objective:
        values = {name: choice.value for name, choice in choices.items()} | asked
        choices |= fitted_views(objective, values, asked, count)
    assert not set(choices) & set(asked)
    values = {name: choice.value for name, choice in choices.items()} | asked
    if fmt.channels == values["patch_size"] == 1:  # a given crop such as 17 divides into nothing else
        with pytest.raises(UserError, match="one number a patch"):
            check_fit(values, None)
    else:
        check_fit(values, None)
    assert values["image_size"] % values["patch_size"] == 0
    for name, choice in choices.items():
        assert choice.value is None or convert(PretrainOptions, name, choice.value) == choice.value
        # A decoder that is not there needs no reason.
        assert choice.reason or (name.startswith("decoder_") and values["architecture"] == "masked-encoder")


@pytest.mark.parametrize(
    ("count", "side", "hw", "model", "image", "patch"),
    [
        (15, 400, CPU, "tiny", 112, 8),
        (9_469, 224, CPU, "tiny", 112, 8),
        (9_469, 224, GPU, "small", 224, 16),
        (1_281_167, 375, GPU, "base", 224, 16),
        (50_000, 32, GPU, "small", 28, 2),
        (50_000, 100, GPU, "small", 56, 4),
        (10, 5, CPU, "tiny", 28, 2),
    ],
)
def test_model_and_crop_follow_count_size_and_hardware(
    count: int, side: int, hw: Hardware, model: str, image: int, patch: int
) -> None:
    choices = choose({}, count, side, RGB, hw)
    assert (choices["model"].value, choices["image_size"].value, choices["patch_size"].value) == (model, image, patch)


def test_a_patch_is_chosen_for_a_given_crop_and_a_crop_for_a_given_patch() -> None:
    assert choose({"image_size": 448}, 10, 500, RGB, GPU)["patch_size"].value == 16
    assert choose({"image_size": 70}, 10, 500, RGB, GPU)["patch_size"].value == 5
    assert choose({"patch_size": 16}, 10, 500, RGB, CPU)["image_size"].value == 224
    assert not {"image_size", "patch_size"} & set(choose({"image_size": 2000, "patch_size": 25}, 9, 9, RGB, CPU))


@pytest.mark.parametrize(
    ("model", "decoder"),
    [("base", (512, 8, 16)), ("large", (512, 8, 16)), ("small", (256, 8, 8)), ("tiny", (128, 4, 4))],
)
def test_a_decoder_is_maes_or_smaller_with_its_encoder(model: str, decoder: tuple[int, int, int]) -> None:
    for asked in ({"model": model}, {"model": model, "decoder_depth": 3}):
        choices = choose(asked | {"architecture": "encoder-decoder"}, 10, 500, RGB, GPU)
        found = [choices[name].value for name in ("decoder_width", "decoder_depth", "decoder_heads") if name in choices]
        assert found == [n for i, n in enumerate(decoder) if i != 1 or "decoder_depth" not in asked]


def test_the_rate_of_a_step_is_moderate_and_never_below_the_papers() -> None:
    assert choose({"batch_size": 128}, 10, 500, RGB, CPU)["base_lr"].value == 2e-3
    assert choose({"batch_size": 512}, 10, 500, RGB, CPU)["base_lr"].value == 5e-4
    assert choose({"batch_size": 4096}, 10, 500, RGB, GPU)["base_lr"].value == 1.5e-4


def test_other_channels_and_depths_get_statistics_of_their_own() -> None:
    assert choose({}, 10, 500, RGB, CPU)["statistics"].value == "imagenet"
    for fmt in (PixelFormat(1, "uint8"), PixelFormat(4, "uint8"), PixelFormat(3, "uint16"), PixelFormat(3, "float32")):
        assert choose({}, 10, 500, fmt, CPU)["statistics"].value == "data"


def test_steps_that_are_given_leave_no_epochs_to_choose() -> None:
    assert choose({"max_steps": 5}, 10, 500, RGB, CPU)["epochs"].value is None


@given(st.integers(1, 10**8), hardware)
def test_small_data_recurs_more_often(count: int, hw: Hardware) -> None:
    fewer, more = (choose({}, images, 500, RGB, hw)["epochs"].value for images in (count, 2 * count))
    assert fewer >= more > 0


@given(st.integers(1, 10**10), st.integers(0, 10**11), st.integers(1, 10_000), hardware)
def test_a_micro_batch_is_an_even_split_of_the_share(image: int, fixed: int, share: int, hw: Hardware) -> None:
    size = micro_batch(image, fixed, share, hw).value
    assert 1 <= size <= share
    assert size == 1 or size * image + fixed <= hw.memory_bytes // 2
    assert size <= (256 if hw.device == "cuda" else 16)
    passes = -(-share // size)
    assert size == -(-share // passes)  # no smaller passes would do with as few


def test_processes_on_one_machine_share_its_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = find_hardware("cpu")
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    half = find_hardware("cpu")
    assert half.cores == max(1, whole.cores // 2)
    assert half.memory_bytes == pytest.approx(whole.memory_bytes / 2, rel=0.2)
