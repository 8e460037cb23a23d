"""Masked reconstruction: what it may see, what it costs, and what it gives back."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lomar.data.loader import SampleKey
from lomar.methods.architectures import MaskedEncoder
from lomar.methods.masks import UniformMask
from lomar.methods.recipes import RECIPES, Composition
from lomar.methods.reconstruction import MaskedReconstruction, ViewsAndMask
from lomar.methods.targets import NormalisedPixels, patchify, unpatchify
from lomar.methods.views import LocalWindows
from lomar.model import Encoder

DEPTH, PATCH, SIDE, CHANNELS = 5, 2, 3, 2


def small(mask_layer: int = 0, ratio: float = 0.6) -> MaskedReconstruction:
    torch.manual_seed(0)
    encoder = Encoder((14, 22), PATCH, CHANNELS, 0, embed_dim=12, depth=DEPTH, num_heads=3)
    method = MaskedReconstruction(
        LocalWindows((7, 11), SIDE, 2),
        UniformMask(SIDE**2, ratio),
        MaskedEncoder(encoder, mask_layer),
        NormalisedPixels(),
        PATCH,
        mean=(0.4, 0.5),
        std=(0.2, 0.3),
        scale=255.0,
    )
    for block in method.architecture.encoder.blocks:  # zero tables would hide errors of position
        torch.nn.init.normal_(block.attn.rpe.table)
    return method


def batch(method: MaskedReconstruction, images: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = ViewsAndMask(method.views, method.mask, seed=0)
    corners, hidden = zip(*(draw(SampleKey(0, i, 0, i)) for i in range(images)), strict=True)
    side = SIDE * PATCH
    pixels = torch.randint(0, 256, (images, 2, CHANNELS, side, side), dtype=torch.uint8)
    return pixels, torch.stack(corners), torch.stack(hidden)


@pytest.mark.parametrize("mask_layer", range(DEPTH))
def test_changing_a_hidden_patch_changes_no_output(mask_layer: int) -> None:
    method = small(mask_layer)
    pixels, corners, hidden = (t.flatten(0, 1) for t in batch(method))
    before = method.predict(method.normalise(pixels), corners, hidden)[0]
    patches = patchify(method.normalise(pixels), PATCH)
    secret = torch.where(hidden[..., None], torch.randn_like(patches), patches)
    after = method.predict(unpatchify(secret, (SIDE, SIDE), CHANNELS), corners, hidden)[0]
    assert torch.equal(before, after)
    shown = torch.where(hidden[..., None], patches, torch.randn_like(patches))
    assert not torch.allclose(before, method.predict(unpatchify(shown, (SIDE, SIDE), CHANNELS), corners, hidden)[0])


@pytest.mark.parametrize("mask_layer", range(DEPTH))
def test_every_trainable_parameter_gets_a_gradient(mask_layer: int) -> None:
    method = small(mask_layer)
    total, _ = method(*batch(method))
    total.backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("mask_layer", [0, 3])
def test_shifting_a_window_changes_nothing(mask_layer: int) -> None:
    """Positions are relative: the same pixels elsewhere in the image give the same loss."""
    method = small(mask_layer)
    pixels, corners, hidden = batch(method)
    here, there = method(pixels, corners, hidden)[0], method(pixels, corners + torch.tensor([2, 5]), hidden)[0]
    torch.testing.assert_close(here, there)


def test_positions_matter() -> None:
    """Moving what is visible to other places changes the predictions: the coordinates are used."""
    method = small()
    pixels, corners, hidden = (t.flatten(0, 1) for t in batch(method))
    order = torch.tensor([2, 1, 0, 5, 4, 3, 8, 7, 6])  # mirrored left to right
    patches = patchify(method.normalise(pixels), PATCH)
    mirrored = method.predict(unpatchify(patches[:, order], (SIDE, SIDE), CHANNELS), corners, hidden[:, order])[0]
    straight = method.predict(method.normalise(pixels), corners, hidden)[0]
    assert not torch.allclose(mirrored.sort(dim=1).values, straight.sort(dim=1).values, atol=1e-4)


@pytest.mark.parametrize("mask_layer", range(DEPTH))
def test_before_the_mask_layer_only_visible_tokens_cost(mask_layer: int) -> None:
    """Counted products of a forward pass equal the sum over blocks of (1 + visible) or (1 + all) tokens."""
    method = small(mask_layer)
    pixels, corners, hidden = batch(method)
    with FlopCounterMode(display=False) as counter:
        method(pixels, corners, hidden)
    width, heads, rows = 12, 3, 6
    n, m = SIDE**2, method.mask.count

    def block(tokens: int) -> int:
        linear = 2 * tokens * width * width * (3 + 1 + 4 + 4)
        position = 2 * heads * tokens * (width // heads) * 50
        attention = 2 * 2 * heads * tokens * tokens * (width // heads)
        return linear + position + attention

    expected = mask_layer * block(1 + n - m) + (DEPTH - mask_layer) * block(1 + n)
    expected += 2 * (n - m) * PATCH**2 * CHANNELS * width  # only visible patches are embedded
    expected += 2 * m * width * PATCH**2 * CHANNELS  # only hidden ones are predicted
    assert counter.get_total_flops() == rows * expected


def test_loss_is_the_mean_error_of_normalised_hidden_patches() -> None:
    """By hand, with torch's own variance (unbiased) and 1e-6 inside the root."""
    method = small()
    pixels, corners, hidden = batch(method)
    predicted, _, at = method.predict(
        method.normalise(pixels.flatten(0, 1)), corners.flatten(0, 1), hidden.flatten(0, 1)
    )
    total, count = method(pixels, corners, hidden)
    errors = []
    for row, window in enumerate(pixels.flatten(0, 1).double() / 255):
        window = (window - torch.tensor([0.4, 0.5]).view(2, 1, 1)) / torch.tensor([0.2, 0.3]).view(2, 1, 1)
        for i, place in enumerate(at[row].tolist()):
            r, c = divmod(place, SIDE)
            patch = window[:, r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH].permute(1, 2, 0).flatten()
            target = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            errors.append((predicted[row, i] - target).square().mean())
    assert count == len(errors) == 6 * 5
    torch.testing.assert_close(total / count, torch.stack(errors).mean().float())


def test_reconstruction_keeps_visible_pixels_and_true_moments_of_hidden_ones() -> None:
    method = small()
    pixels, corners, hidden = (t.flatten(0, 1) for t in batch(method))
    restored = patchify(method.reconstruct(pixels, corners, hidden), PATCH)
    true = patchify(pixels / 255, PATCH)
    torch.testing.assert_close(restored[~hidden], true[~hidden], atol=1e-5, rtol=0)
    assert not torch.allclose(restored[hidden], true[hidden], atol=1e-2)
    # A perfect prediction, which is the normalised target, gives back the pixels.
    patches = patchify(method.normalise(pixels), PATCH)
    deviation = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    perfect = (patches - patches.mean(-1, keepdim=True)) / deviation
    torch.testing.assert_close(method.target.to_pixels(perfect, patches), patches)
    assert method.target.loss(perfect, patches).max() < 1e-10


def test_patchify_is_row_column_channel_and_unpatchify_its_inverse() -> None:
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    assert patches[0, 0].tolist() == [images[0, c, r, k] for r in (0, 1) for k in (0, 1) for c in (0, 1, 2)]
    assert torch.equal(unpatchify(patches, (2, 3), 3), images)


def test_sixteen_bit_and_eight_bit_pixels_of_one_image_are_one_input() -> None:
    method = small()
    eight = torch.randint(0, 256, (2, CHANNELS, 6, 6), dtype=torch.uint8)
    sixteen = (eight.int() * 257).to(torch.uint16)
    as_eight = method.normalise(eight)
    method.scale = 65535.0
    torch.testing.assert_close(method.normalise(sixteen), as_eight)


def test_masks_outside_the_depth_are_refused() -> None:
    with pytest.raises(ValueError, match="mask layer 5 is outside the encoder's blocks 0 to 4"):
        small(mask_layer=5)


def composition(**changes: object) -> Composition:
    values: dict = {
        "method": "lomar",
        "model": "base",
        "image_size": 224,
        "patch_size": 16,
        "batch_size": 4096,
        "mean": (0.5,) * 3,
        "std": (0.2,) * 3,
        "scale": 255.0,
    }
    return Composition(**values | dict(RECIPES["lomar"].options) | changes)


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [({}, 86_277_120), ({"model": "large"}, 303_964_928), ({"patch_size": 8}, 85_391_808)],
)
def test_the_recipe_at_full_size_has_the_released_number_of_parameters(changes: dict, parameters: int) -> None:
    """SPEC.md A.1, trainable parameters of B/16, L/16 and B/8."""
    with torch.device("meta"):
        method = composition(**changes).build()
    assert sum(p.numel() for p in method.parameters()) == parameters


def test_the_recipe_is_the_papers() -> None:
    method = composition(model="tiny").build()
    assert method.views == LocalWindows((14, 14), 7, 4)
    assert (method.mask.count, method.mask.patches) == (39, 49)
    assert method.architecture.mask_layer == 0


def test_a_composition_survives_its_plain_form() -> None:
    import json

    there = composition(window_layout="released")
    assert Composition.from_dict(json.loads(json.dumps(there.to_dict()))) == there


def test_windows_and_masks_are_drawn_apart() -> None:
    """Another mask ratio or count of views leaves the windows of a sample where they are."""
    key = SampleKey(epoch=2, index=7, batch=0, slot=0)
    one = ViewsAndMask(LocalWindows((14, 14), 7, 4), UniformMask(49, 0.8), seed=3)(key)
    other = ViewsAndMask(LocalWindows((14, 14), 7, 4), UniformMask(49, 0.5), seed=3)(key)
    assert torch.equal(one[0], other[0])
    assert (other[1] <= one[1]).all()  # what the lower ratio hides, the higher hides too
