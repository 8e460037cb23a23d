"""Parity of a whole pretraining step with the released code: LoMaR, MAE and BEiT (SPEC.md, H2, H4 and H5)."""

import pytest
import torch
from golden import TOLERANCE, fill, filler

from lomar.methods.architectures import EncoderDecoder, MaskedEncoder, View
from lomar.methods.masks import BlockwiseMask, KeptMask, UniformMask, hide_largest, hide_smallest
from lomar.methods.reconstruction import MaskedReconstruction
from lomar.methods.targets import NormalisedPixels, VisualTokens, patchify, take
from lomar.methods.views import LocalWindows, WholeImage, released_windows
from lomar.model import Encoder
from lomar.model.positions import grid_coordinates

IMAGES, VIEWS, SIDE, PATCH = 3, 2, 5, 4


@pytest.fixture
def method() -> MaskedReconstruction:
    encoder = Encoder(32, PATCH, num_classes=0, embed_dim=48, depth=2, num_heads=3)
    model = MaskedReconstruction(
        LocalWindows((8, 8), SIDE, VIEWS),
        UniformMask(SIDE**2, 0.8),
        MaskedEncoder(encoder),
        NormalisedPixels(),
        PATCH,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        scale=1.0,
    ).double()
    fill(model)
    return model


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels (3, 2, 3, 20, 20), corners (3, 2, 2) and hidden (3, 2, 25) in the released layout."""
    images = (4 * filler(IMAGES * 3 * 32 * 32, j=1000)).reshape(IMAGES, 3, 32, 32)
    assert torch.allclose(patchify(images, PATCH)[0, 0, :3], images[0, :, 0, 0])
    torch.testing.assert_close(
        images[0, :, 0, 0], torch.tensor([-0.91881442, -1.4516046, -1.98439479]).double(), **TOLERANCE
    )
    corners = released_windows(torch.tensor([0, 3]), torch.tensor([2, 1]), IMAGES)
    # The released rows are window-major (row = window * images + image); noise is drawn for rows in that order.
    hidden = hide_smallest(filler(IMAGES * VIEWS * SIDE**2, j=2000).reshape(-1, SIDE**2) + 0.5, 20)
    hidden = hidden.view(VIEWS, IMAGES, SIDE**2).transpose(0, 1)
    pixels = torch.stack(
        [
            torch.stack(
                [image[:, r * PATCH : (r + SIDE) * PATCH, c * PATCH : (c + SIDE) * PATCH] for r, c in at.tolist()]
            )
            for image, at in zip(images, corners, strict=True)
        ]
    )
    return pixels, corners, hidden


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """(B, V, ...) -> the released row order (V * B, ...)."""
    return tensor.transpose(0, 1).flatten(0, 1)


def test_windows_and_masks_lie_where_the_released_code_puts_them(batch: tuple[torch.Tensor, ...]) -> None:
    _, corners, hidden = batch
    assert (rows(corners) @ torch.tensor([8, 1])).tolist() == [2, 25, 2, 25, 2, 25]
    assert hidden.sum(-1).eq(20).all()
    assert (~rows(hidden)[0]).nonzero().flatten().tolist() == [4, 9, 12, 17, 22]
    assert (~rows(hidden)[1]).nonzero().flatten().tolist() == [0, 5, 13, 18, 21]


def test_loss_and_gradients_equal_the_released_ones(
    method: MaskedReconstruction, batch: tuple[torch.Tensor, ...]
) -> None:
    total, count = method(*batch)
    assert count == IMAGES * VIEWS * 20
    loss = total / count
    loss.backward()
    assert abs(loss.item() - 1.9002310049698565) < 1e-12
    encoder = method.architecture.encoder
    norms = {
        "table": (encoder.blocks[0].attn.rpe.table, 0.0033227482),
        "mask": (method.architecture.mask_token, 0.8291327250),
        "cls": (encoder.cls_token, 0.0663514998),
        "qkv": (encoder.blocks[1].attn.qkv.weight, 0.8248795990),
        "patch": (encoder.patch_embed.proj.weight, 0.0552221395),
    }
    for name, (parameter, expected) in norms.items():
        assert parameter.grad is not None
        assert abs(parameter.grad.norm().item() - expected) < 1e-9, name


def test_predictions_equal_the_released_ones(method: MaskedReconstruction, batch: tuple[torch.Tensor, ...]) -> None:
    pixels, corners, hidden = (rows(t) for t in batch)
    predicted, scene = method.predict(method.normalise(pixels), corners, hidden)
    at = scene.at
    assert at[0, 0] == 0
    first = torch.tensor([0.68913802, -0.99074634, 0.55409779, 0.61475215]).double()
    torch.testing.assert_close(predicted[0, 0, :4], first, **TOLERANCE)
    assert at[5, -1] == 24
    last = torch.tensor([0.68998677, -0.99267567, 0.55680311, 0.61560792]).double()
    torch.testing.assert_close(predicted[5, -1, :4], last, **TOLERANCE)
    plain_loss = (predicted - take(scene.patches, at)).square().mean()
    assert abs(plain_loss.item() - 2.2546039881040176) < 1e-12


def test_all_tokens_sum_to_the_released_sum(method: MaskedReconstruction, batch: tuple[torch.Tensor, ...]) -> None:
    """The visible tokens' outputs, which the loss does not see, are right too."""
    pixels, corners, hidden = (rows(t) for t in batch)
    patches = patchify(method.normalise(pixels), PATCH)
    coordinates = corners[:, None] + grid_coordinates(SIDE, SIDE)
    order = hidden.to(torch.uint8).argsort(dim=1, stable=True)
    visible, masked = order[:, :5], order[:, 5:]
    tokens = method.architecture.encode(
        View(take(patches, visible), take(coordinates, visible), take(coordinates, masked))
    )
    assert abs(method.head(tokens[:, 1:]).sum().item() + 88.558784309) < 1e-8


PLAIN = {"patch_size": PATCH, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "scale": 1.0}


def images(count: int) -> torch.Tensor:
    return (4 * filler(count * 3 * 32 * 32, j=1000)).reshape(count, 3, 32, 32)


def test_mae_equals_the_released_one() -> None:
    """H4: which patches are kept, the predictions, the loss."""
    encoder = Encoder(32, PATCH, num_classes=0, embed_dim=48, depth=2, num_heads=3, position="sincos")
    decoder = EncoderDecoder(encoder, (8, 8), (8, 8), width=32, depth=1, heads=4)
    mask = KeptMask(64, 0.75)
    model = MaskedReconstruction(WholeImage((8, 8)), mask, decoder, NormalisedPixels(), **PLAIN).double()
    fill(model, "mae")
    hidden = hide_largest(filler(2 * 64, j=2000).reshape(2, 64) + 0.5, mask.count)
    kept = [1, 6, 11, 14, 19, 24, 27, 32, 35, 40, 45, 48, 53, 56, 58, 61]
    assert (~hidden)[0].nonzero().flatten().tolist() == kept
    corners = torch.zeros(2, 1, 2, dtype=torch.int64)
    total, count = model(images(2)[:, None], corners, hidden[:, None])
    # Ours has sines and cosines in float32, which moves the loss by 6e-9.
    assert abs((total / count).item() - 2.178967461755967) < 1e-7
    # The released prediction has all patches in raster order; the first is hidden in image 0, the last in image 1.
    predicted, scene = model.predict(images(2), corners[:, 0], hidden)
    assert (scene.at[0, 0], scene.at[1, -1]) == (0, 63)
    first = torch.tensor([-0.55517592, -1.3074805, 0.50863632, 0.24153367]).double()
    torch.testing.assert_close(predicted[0, 0, :4], first, **TOLERANCE)
    last = torch.tensor([-0.94753808, -1.2664528, 0.65850257, 0.5927168]).double()
    torch.testing.assert_close(predicted[1, -1, :4], last, **TOLERANCE)


def test_beit_equals_the_released_one() -> None:
    """H5, with 20 patches hidden in one image and 25 in the other."""
    encoder = Encoder(
        32,
        PATCH,
        num_classes=0,
        embed_dim=48,
        depth=2,
        num_heads=3,
        position="shared-bias",
        key_bias=False,
        init_values=0.1,
        weight_init="beit",
    )
    mask = BlockwiseMask((8, 8), 25 / 64, 4)
    target = VisualTokens(20)
    model = MaskedReconstruction(WholeImage((8, 8)), mask, MaskedEncoder(encoder), target, **PLAIN).double()
    fill(model, "beit")
    hidden = torch.zeros(2, 64, dtype=torch.bool)
    hidden[0, :20] = hidden[1, 10:35] = True
    predicted, scene = model.predict(images(2), torch.zeros(2, 2, dtype=torch.int64), hidden)
    out = predicted[hidden.gather(1, scene.at)]
    assert out.shape == (45, 20)
    first = torch.tensor([-2.21084437, 1.84720225, -0.11745464, -2.28909642, 1.7689502]).double()
    torch.testing.assert_close(out[0, :5], first, **TOLERANCE)
    last = torch.tensor([-2.21084438, 1.84720225, -0.11745464, -2.28909642, 1.76895021]).double()
    torch.testing.assert_close(out[44, :5], last, **TOLERANCE)
    assert abs(out.sum().item() + 260.4994012497) < 1e-6
