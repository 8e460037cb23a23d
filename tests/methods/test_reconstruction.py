"""Masked reconstruction: what it may see, what it costs, and what it gives back."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lomar.data.loader import SampleKey
from lomar.methods.architectures import Architecture, EncoderDecoder, MaskedEncoder, Stage, View
from lomar.methods.composition import Composition
from lomar.methods.masks import BlockwiseMask, KeptMask, Share, UniformMask
from lomar.methods.recipes import RECIPES, compose
from lomar.methods.reconstruction import MaskedReconstruction, ViewsAndMask
from lomar.methods.targets import TARGETS, VisualTokens, patchify, unpatchify
from lomar.methods.tokenizer import DiscreteVAE
from lomar.methods.views import LocalWindows, WholeImage
from lomar.model import Encoder
from lomar.model.positions import grid_coordinates
from lomar.model.transformer import POSITIONS, Block

DEPTH, PATCH, SIDE, CHANNELS = 5, 2, 3, 2
GRID, IMAGES = (7, 11), 3
WIDTH, HEADS = 12, 3
DECODER_WIDTH, DECODER_DEPTH, DECODER_HEADS = 8, 2, 2
MASKS = {"uniform": UniformMask, "uniform-kept": KeptMask}


def small(
    position: str = "contextual",
    mask_layer: int | None = 0,
    mask: str = "uniform",
    target: str = "normalised-pixels",
    grid: tuple[int, int] = GRID,
    whole: bool = False,
    drop_path: float = 0.0,
    beit: bool = False,
    share: int | None = None,
) -> MaskedReconstruction:
    """A small method of two channels; without a mask layer it has a decoder."""
    torch.manual_seed(0)
    views = WholeImage(grid) if whole else LocalWindows(grid, SIDE, 2)
    patches = views.size[0] * views.size[1]
    encoder = Encoder(
        (grid[0] * PATCH, grid[1] * PATCH),
        PATCH,
        CHANNELS,
        num_classes=0,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        drop_path_rate=drop_path,
        position=position,
        bias_grid=views.size,
        key_bias=not beit,
        init_values=0.1 if beit else None,
        weight_init="beit" if beit else "xavier",
    )
    architecture: Architecture
    if mask_layer is None:
        architecture = EncoderDecoder(encoder, grid, views.size, DECODER_WIDTH, DECODER_DEPTH, DECODER_HEADS)
    else:
        architecture = MaskedEncoder(encoder, mask_layer)
    method = MaskedReconstruction(
        views,
        BlockwiseMask(views.size, 0.6, 2) if mask == "blockwise" else MASKS[mask](patches, 0.6),
        architecture,
        TARGETS[target](16 if target == "tokens" else 0),
        PATCH,
        mean=(0.4, 0.5),
        std=(0.2, 0.3),
        scale=255.0,
        share=Share(views.size, share) if share else None,
    )
    return prepared(method, CHANNELS)


def tiny(name: str) -> MaskedReconstruction:
    """A recipe in all that it is but for the size: windows on a grid one patch larger, whole images of 7 x 7."""
    torch.manual_seed(0)
    full = RECIPES[name].composition(name)
    sizes: dict[str, Any] = {"embed_dim": 16, "depth": 3, "num_heads": 2, "patch_size": PATCH}
    sizes |= {"decoder_width": 8, "decoder_depth": 2, "decoder_heads": 2}
    side = full.window_size + 1 if full.window_size else 7
    sizes |= {"image_size": side * PATCH, "mask_layer": min(full.mask_layer, 2), "vocab": full.vocab and 16}
    return prepared(replace(full, **sizes).build(), 3)


def prepared(method: MaskedReconstruction, channels: int) -> MaskedReconstruction:
    """With a tokenizer where it needs one, and tables of positions that say something: zeros would hide errors."""
    if isinstance(method.target, VisualTokens):
        ends = {"low": [0] * channels, "high": [255] * channels}
        tokenizer = DiscreteVAE.build(channels=channels, width=8, vocab=16, blocks_per_group=1, **ends)
        with torch.no_grad():  # a fresh one has a word or two for all patches; this one uses most of its words
            logits = tokenizer.logits(tokenizer.unit(mosaics(20, channels, (5, 5))))
            tokenizer.encoder.last.b -= logits.mean((0, 2, 3))
        method.target.attach(tokenizer)
    for name, parameter in method.named_parameters():
        if name.endswith(".table"):
            torch.nn.init.normal_(parameter)
    return method


def mosaics(images: int, channels: int, grid: tuple[int, int]) -> Tensor:
    """uint8 images with a square of 8 x 8 px of one colour for each place of a grid."""
    colours = torch.randint(0, 256, (images, channels, *grid), dtype=torch.uint8)
    return colours.repeat_interleave(8, 2).repeat_interleave(8, 3)


def batch(method: MaskedReconstruction) -> dict[str, Tensor]:
    """What the loader would give for three images of noise."""
    torch.manual_seed(1)
    drawn = [method.draw(seed=0)(SampleKey(0, i, 0, i)) for i in range(IMAGES)]
    inputs = {name: torch.stack([each[name] for each in drawn]) for name in drawn[0]}
    sides = [patches * method.patch_size for patches in method.views.size]
    shape = IMAGES, method.views.count, len(method.mean), *sides
    inputs["pixels"] = torch.randint(0, 256, shape, dtype=torch.uint8)
    if isinstance(method.target, VisualTokens):
        inputs["tokenised"] = mosaics(IMAGES, len(method.mean), method.views.grid)
    if not method.mask.even:  # the first view hides two patches, so that counts are sure to differ
        first = inputs["hidden"][0, 0]
        first[first.nonzero()[2:]] = False
        assert first.sum() == 2 and method.mask.count > 2
    return inputs


def views_of(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Pixels, corners, masks and numbers for drop path, a row for each view."""
    paths = inputs["paths"].flatten(0, 1) if "paths" in inputs else None
    pixels, corners, hidden = (inputs[name].flatten(0, 1) for name in ("pixels", "corners", "hidden"))
    return pixels, corners, hidden, paths


CASES: dict[str, dict[str, Any]] = {
    f"{position}, {kind}": {"position": position, **options}
    for position in POSITIONS
    for kind, options in {
        "masks at block 0": {},
        "masks at block 3": {"mask_layer": 3},
        "decoder": {"mask_layer": None},
        "blocks": {"mask": "blockwise"},
    }.items()
}
CASES |= {f"masks at block {layer}": {"mask_layer": layer} for layer in (1, 2, 4)}
CASES |= {
    "as mae": {"position": "sincos", "mask_layer": None, "mask": "uniform-kept", "whole": True, "grid": (3, 5)},
    "as beit": {"position": "shared-bias", "mask": "blockwise", "whole": True, "grid": (3, 5), "beit": True}
    | {"target": "tokens", "drop_path": 0.2},
    "pixels": {"target": "pixels"},
    "tokens of windows": {"target": "tokens"},
    "a share": {"mask_layer": 3, "share": 2},
    "a share with a decoder": {"mask_layer": None, "share": 2},
}
METHODS: dict[str, Callable[[], MaskedReconstruction]] = {name: partial(small, **CASES[name]) for name in CASES}
MASKED = [name for name, recipe in RECIPES.items() if not recipe.objective]
METHODS |= {f"recipe {name}": partial(tiny, name) for name in MASKED}


@pytest.mark.parametrize("name", METHODS)
def test_changing_hidden_patches_changes_no_output(name: str) -> None:
    """And changing visible ones does."""
    method = METHODS[name]()
    pixels, corners, hidden, paths = views_of(batch(method))
    windows = method.normalise(pixels)
    patches = patchify(windows, method.patch_size)

    def predicted(patches: Tensor) -> Tensor:
        views = unpatchify(patches, method.views.size, windows.shape[1])
        with torch.no_grad():
            return method.predict(views, corners, hidden, paths)[0]

    before = predicted(patches)
    noise = torch.randn_like(patches)
    assert torch.equal(predicted(torch.where(hidden[..., None], noise, patches)), before)
    assert not torch.allclose(predicted(torch.where(hidden[..., None], patches, noise)), before)


@pytest.mark.parametrize("name", METHODS)
def test_every_trainable_parameter_gets_a_finite_gradient(name: str) -> None:
    method = METHODS[name]()
    total, count = method(**batch(method))
    (total / count).backward()
    trained = [(name, parameter) for name, parameter in method.named_parameters() if parameter.requires_grad]
    assert len(trained) > 40 and not any("tokenizer" in name for name, _ in trained)
    for parameter_name, parameter in trained:
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_counts_hidden_patches_alone(name: str) -> None:
    """Each once, whatever a view hides; how far the predictions of others are off does not matter.

    Where a share of them is predicted, that share is what counts.
    """
    method = METHODS[name]()
    inputs = batch(method)
    pixels, corners, hidden, paths = views_of(inputs)
    predicted = inputs["predicted"].flatten(0, 1) if "predicted" in inputs else None
    with torch.no_grad():
        total, count = method(**inputs)
        views = method.normalise(pixels)
        prediction, scene = method.predict(views, corners, hidden, paths, inputs.get("tokenised"), predicted)
        losses = method.target.loss(prediction, method.target.truth(scene))
    if predicted is not None:
        assert method.share and (predicted <= hidden).all() and (predicted.sum(1) == method.share.count).all()
        hidden = predicted
    assert count == hidden.sum()
    summed = torch.zeros(())
    for row, places in enumerate(scene.at.tolist()):
        assert len(set(places)) == len(places) == (method.share or method.mask).count
        assert set(hidden[row].nonzero().flatten().tolist()) <= set(places)
        summed += sum(losses[row, i] for i, place in enumerate(places) if hidden[row, place])
    torch.testing.assert_close(total, summed)


@pytest.mark.parametrize("case", ["contextual, masks at block 0", "contextual, blocks", "sincos, decoder", "pixels"])
def test_the_loss_is_the_mean_squared_error_of_the_target(case: str) -> None:
    """By hand, with torch's own variance (unbiased) and 1e-6 inside the root; pixels as they are in "pixels"."""
    method = small(**CASES[case])
    inputs = batch(method)
    pixels, corners, hidden, _ = views_of(inputs)
    predicted, scene = method.predict(method.normalise(pixels), corners, hidden)
    total, count = method(**inputs)
    errors = []
    for row, window in enumerate(pixels.double() / 255):
        window = (window - torch.tensor([0.4, 0.5]).view(2, 1, 1)) / torch.tensor([0.2, 0.3]).view(2, 1, 1)
        for i, place in enumerate(scene.at[row].tolist()):
            if not hidden[row, place]:
                continue
            r, c = divmod(place, SIDE)
            patch = window[:, r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH].permute(1, 2, 0).flatten()
            truth = patch if case == "pixels" else (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            errors.append((predicted[row, i] - truth).square().mean())
    assert count == len(errors) == hidden.sum() <= 6 * 5
    torch.testing.assert_close(total / count, torch.stack(errors).mean().float())


@pytest.mark.parametrize("case", ["tokens of windows", "as beit"])
def test_the_loss_of_tokens_is_the_cross_entropy_at_their_places_in_the_image(case: str) -> None:
    """By hand: token (r, c) of the whole image is that of a view's patch at its corner plus the place in the view."""
    method = small(**CASES[case])
    assert isinstance(method.target, VisualTokens) and method.target.tokenizer is not None
    inputs = batch(method)
    pixels, corners, hidden, paths = views_of(inputs)
    predicted, scene = method.predict(method.normalise(pixels), corners, hidden, paths)
    total, count = method(**inputs)
    tokens = method.target.tokenizer.tokens(inputs["tokenised"])
    assert tokens.shape == (IMAGES, *method.views.grid) and len(tokens.unique()) > 8
    losses = []
    for row, (top, left) in enumerate(corners.tolist()):
        for i, place in enumerate(scene.at[row].tolist()):
            if hidden[row, place]:
                r, c = divmod(place, method.views.size[1])
                token = tokens[row // method.views.count, top + r, left + c]
                losses.append(-predicted[row, i].softmax(0)[token].log())
    assert count == len(losses)
    torch.testing.assert_close(total, torch.stack(losses).sum())


@pytest.mark.parametrize("case", [case for case in CASES if "," in case])
def test_shifting_all_coordinates_changes_nothing_unless_positions_are_absolute(case: str) -> None:
    """The same pixels elsewhere in the image give the same loss; under sines and cosines another."""
    method = small(**CASES[case])
    inputs = batch(method)
    here = inputs["corners"] // 2  # so that there is room below and to the right
    there = here + torch.tensor([2, 4])
    with torch.no_grad():
        losses = [method(**inputs | {"corners": corners})[0] for corners in (here, there)]
    if method.architecture.encoder.pos_embed is None:
        torch.testing.assert_close(*losses)
    else:
        assert abs(losses[0] - losses[1]) > 1e-3 * losses[0]


@pytest.mark.parametrize("case", [case for case in CASES if "," in case])
def test_positions_matter_if_there_are_any(case: str) -> None:
    """Moving what is visible to other places changes the predictions; without positions it cannot be noticed."""
    method = small(**CASES[case])
    pixels, corners, hidden, _ = views_of(batch(method))
    order = torch.tensor([2, 1, 0, 5, 4, 3, 8, 7, 6])  # mirrored left to right
    patches = patchify(method.normalise(pixels), PATCH)
    mirrored = unpatchify(patches[:, order], (SIDE, SIDE), CHANNELS)
    with torch.no_grad():
        moved = method.predict(mirrored, corners, hidden[:, order])[0].sort(dim=1).values
        straight = method.predict(method.normalise(pixels), corners, hidden)[0].sort(dim=1).values
    assert torch.allclose(moved, straight, atol=1e-4) == (CASES[case]["position"] == "none")


@pytest.mark.parametrize("position", ["contextual", "sincos", "learned", "shared-bias", "none"])
@pytest.mark.parametrize("mask_layer", [*range(DEPTH), None])
def test_only_the_tokens_that_are_there_cost(mask_layer: int | None, position: str) -> None:
    """Counted products of a forward pass equal the sum over blocks of (1 + visible) or (1 + all) tokens."""
    method = small(position, mask_layer)
    inputs = batch(method)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        method(**inputs)
    rows, n, m = 6, SIDE**2, method.mask.count

    def block(tokens: int, width: int, heads: int, asked: int | None = None) -> int:
        asked = tokens if asked is None else asked
        linear = 2 * width * width * (2 * tokens + (1 + 1 + 4 + 4) * asked)
        contextual = 2 * heads * asked * (width // heads) * 50 if position == "contextual" else 0
        attention = 2 * 2 * heads * asked * tokens * (width // heads)
        return linear + contextual + attention

    few, all_ = 1 + n - m, 1 + n
    if mask_layer is None:
        stages = [Stage(few, DEPTH, WIDTH), Stage(all_, DECODER_DEPTH, DECODER_WIDTH)]
        expected = DEPTH * block(few, WIDTH, HEADS)
        expected += 2 * few * WIDTH * DECODER_WIDTH  # from one width to the other
    else:
        stages = [Stage(few, mask_layer, WIDTH)] * (mask_layer > 0) + [Stage(all_, DEPTH - mask_layer, WIDTH)]
        expected = mask_layer * block(few, WIDTH, HEADS)
    _, blocks, width = stages[-1]
    heads = DECODER_HEADS if mask_layer is None else HEADS
    expected += (blocks - 1) * block(all_, width, heads) + block(
        all_, width, heads, asked=m
    )  # in the last, hidden alone
    expected += 2 * (n - m) * PATCH**2 * CHANNELS * WIDTH  # only visible patches are embedded
    expected += 2 * m * stages[-1].width * PATCH**2 * CHANNELS  # only hidden ones are predicted
    assert counter.get_total_flops() == rows * expected
    assert method.stages() == stages


@pytest.mark.parametrize("mask_layer", [0, 3, None])
@pytest.mark.parametrize("position", POSITIONS)
def test_what_the_last_block_spares_changes_nothing(position: str, mask_layer: int | None) -> None:
    """Latents and gradients of the hidden patches are those of a pass that asks for every token."""
    architecture = small(position, mask_layer).double().architecture
    patches, at = torch.randn(2, 4, PATCH**2 * CHANNELS).double(), grid_coordinates(SIDE, SIDE).expand(2, -1, -1)
    view = View(patches, at[:, :4], at[:, 4:])
    every = architecture.encode if isinstance(architecture, MaskedEncoder) else architecture.decode
    trained = [p for p in architecture.parameters() if p.requires_grad]
    results = []
    for latents in (architecture(view), every(view)[:, 5:]):
        weights = torch.linspace(-1, 1, latents.numel()).view(latents.shape).double()
        results.append([latents, *torch.autograd.grad((latents * weights).sum(), trained)])
    torch.testing.assert_close(*results)


def test_patches_that_are_left_out_might_as_well_not_exist() -> None:
    """The predictions of a share are those of views that have no other hidden patch."""
    method = small(mask_layer=3, share=2)
    inputs = batch(method)
    pixels, corners, hidden, _ = views_of(inputs)
    predicted = inputs["predicted"].flatten(0, 1)
    with torch.no_grad():
        prediction, scene = method.predict(method.normalise(pixels), corners, hidden, predicted=predicted)
        places = corners[:, None] + grid_coordinates(SIDE, SIDE)
        visible = torch.stack([each.nonzero().flatten() for each in ~hidden])
        shown = scene.patches.gather(1, visible[..., None].expand(-1, -1, scene.patches.shape[-1]))
        seen_at, asked_at = (places.gather(1, each[..., None].expand(-1, -1, 2)) for each in (visible, scene.at))
        alone = method.head(method.architecture(View(shown, seen_at, asked_at)))
    torch.testing.assert_close(prediction, alone)


def test_a_mask_of_blocks_goes_with_no_share() -> None:
    with pytest.raises(ValueError, match="all hidden patches are predicted"):
        small(mask="blockwise", share=2)


def test_pictures_predict_all_that_is_hidden() -> None:
    method = small(mask_layer=3, share=2)
    pixels, corners, hidden, _ = views_of(batch(method))
    with torch.no_grad():
        restored = method.reconstruct(pixels, corners, hidden)
    assert restored is not None
    changed = patchify(restored - method.denormalise(method.normalise(pixels)), PATCH).abs().amax(-1) > 1e-5
    assert torch.equal(changed, hidden)
    assert method.with_mask(UniformMask(SIDE**2, 0.3)).share is None


@pytest.mark.parametrize("name", ["contextual, masks at block 0", "a share", "block-bias, blocks", "as mae", "as beit"])
def test_the_forward_pass_is_one_graph(name: str) -> None:
    """torch.compile breaks it nowhere, and gives what the pass itself gives."""
    method = METHODS[name]()
    inputs = batch(method)
    torch.compiler.reset()
    with torch.no_grad():
        found = torch.compile(method, fullgraph=True, backend="eager")(**inputs)
        torch.testing.assert_close(found, method(**inputs))


def test_gradients_with_checkpointing_are_those_without() -> None:
    for mask_layer in (3, None):
        method = small(mask_layer=mask_layer)
        trained = [p for p in method.parameters() if p.requires_grad]
        kept = torch.autograd.grad(method(**batch(method))[0], trained)
        method.set_grad_checkpointing()
        again = torch.autograd.grad(method(**batch(method))[0], trained)
        torch.testing.assert_close(kept, again)


@pytest.mark.parametrize("position", POSITIONS)
def test_an_encoder_beside_a_decoder_sees_nothing_of_what_is_hidden(position: str) -> None:
    """Its latents of some patches are the same whatever, and however much, is hidden; a masked encoder's are not."""
    patches = torch.randn(2, 4, PATCH**2 * CHANNELS)
    places = grid_coordinates(*GRID).expand(2, -1, -1)
    hidden_at = [places[:, 4:7], places[:, 30:33], places[:, 4:60]]
    for mask_layer, seen in ((None, False), (0, True)):
        architecture = small(position, mask_layer, whole=True).architecture
        latents: list[Tensor] = []
        architecture.encoder.norm.register_forward_hook(lambda *call, kept=latents: kept.append(call[2][:, :5]))
        with torch.no_grad():
            for at in hidden_at:
                architecture(View(patches, places[:, :4], at))
        assert torch.equal(latents[0], latents[2]) != seen
        # Without positions mask tokens are alike, so that only their number could be noticed.
        assert torch.equal(latents[0], latents[1]) != (seen and position != "none")


@pytest.mark.parametrize("position", POSITIONS)
def test_a_visible_patch_among_the_hidden_ones_is_encoded_as_any_other(position: str) -> None:
    """As blocks leave some: only what a patch shows and where it is counts, not the place of its token."""
    architecture = small(position).architecture
    assert isinstance(architecture, MaskedEncoder)
    patches, at = torch.randn(2, 9, PATCH**2 * CHANNELS), grid_coordinates(SIDE, SIDE).expand(2, -1, -1)
    is_visible = torch.tensor([True, True, False, False, False]).expand(2, -1)
    with torch.no_grad():
        before = architecture.encode(View(patches[:, :6], at[:, :6], at[:, 6:]))
        among = architecture.encode(View(patches[:, :4], at[:, :4], at[:, 4:], (patches[:, 4:], is_visible)))
        hidden = architecture.encode(View(patches[:, :4], at[:, :4], at[:, 4:]))
    torch.testing.assert_close(among, before)
    assert not torch.allclose(hidden, before, atol=1e-3)


def test_drop_path_is_decided_by_the_numbers_in_the_batch() -> None:
    method = small(drop_path=0.5)
    inputs = batch(method)
    assert inputs["paths"].shape == (IMAGES, 2, DEPTH, 2)
    with torch.no_grad():
        losses = [method(**inputs)[0] for _ in range(2)]
        other = method(**inputs | {"paths": inputs["paths"].flip(0)})[0]
        parts = [method(**{name: tensor[part] for name, tensor in inputs.items()})[0] for part in ([0], [1, 2])]
    assert losses[0] == losses[1] != other
    torch.testing.assert_close(sum(parts), losses[0])  # micro-batches do not matter
    assert "paths" not in batch(small())


@pytest.mark.parametrize("case", ["contextual, masks at block 3", "shared-bias, blocks", "sincos, decoder"])
def test_a_branch_is_dropped_below_its_rate_and_scaled_up_above(case: str) -> None:
    """Rates grow from 0 to 0.5; what stays is divided by 1 - rate, so that its mean is as without drop path."""
    method = small(**CASES[case], drop_path=0.5)
    inputs = batch(method)
    rates = [0, 0.125, 0.25, 0.375, 0.5]

    def with_branches_times(factors: list[float]) -> Tensor:
        plain = small(**CASES[case])
        for block, factor in zip(plain.architecture.encoder.blocks, factors, strict=True):
            for layer in block.attn.proj, block.mlp.fc2:
                layer.weight.data *= factor
                layer.bias.data *= factor
        return plain(**{k: v for k, v in inputs.items() if k != "paths"})[0]

    with torch.no_grad():
        all_kept = method(**inputs | {"paths": torch.full_like(inputs["paths"], 0.9999)})[0]
        torch.testing.assert_close(all_kept, with_branches_times([1 / (1 - rate) for rate in rates]))
        at_the_rate = torch.tensor(rates).view(DEPTH, 1).expand_as(inputs["paths"])
        torch.testing.assert_close(method(**inputs | {"paths": at_the_rate})[0], all_kept)
        none_kept = method(**inputs | {"paths": torch.zeros_like(inputs["paths"])})[0]
        torch.testing.assert_close(none_kept, with_branches_times([1, 0, 0, 0, 0]))


@pytest.mark.parametrize("case", ["contextual, masks at block 0", "sincos, decoder", "contextual, blocks", "pixels"])
def test_reconstruction_keeps_visible_pixels_and_gives_pixels_for_a_perfect_prediction(case: str) -> None:
    """Normalised pixels come back with the true mean and deviation of each patch, which are not predicted."""
    method = small(**CASES[case])
    pixels, corners, hidden, _ = views_of(batch(method))
    with torch.no_grad():
        picture = method.reconstruct(pixels, corners, hidden)
        _, scene = method.predict(method.normalise(pixels), corners, hidden)
    assert picture is not None
    restored, true = patchify(picture, PATCH), patchify(pixels / 255, PATCH)
    torch.testing.assert_close(restored[~hidden], true[~hidden], atol=1e-5, rtol=0)
    assert not torch.allclose(restored[hidden], true[hidden], atol=1e-2)
    truth = method.target.truth(scene)
    at = scene.at[..., None].expand_as(truth)
    perfect = method.target.to_pixels(truth, scene)
    torch.testing.assert_close(perfect, patchify(method.normalise(pixels), PATCH).gather(1, at), atol=1e-5, rtol=0)
    assert method.target.loss(truth, truth).max() == 0


@pytest.mark.parametrize("case", ["tokens of windows", "as beit"])
def test_reconstruction_by_tokens_shows_what_the_tokenizer_decodes(case: str) -> None:
    """Patches of 8 px need no resizing: right tokens give its picture at the places of the hidden patches."""
    method = small(**CASES[case])
    assert isinstance(method.target, VisualTokens) and method.target.tokenizer is not None
    tokenizer = method.target.tokenizer
    method.patch_size = 8
    method.architecture.encoder.patch_embed.proj.weight.data = torch.randn(WIDTH, CHANNELS, 8, 8)
    inputs = batch(method)
    pixels, corners, hidden, _ = views_of(inputs)
    tokenised = inputs["tokenised"]
    with torch.no_grad():
        picture = method.reconstruct(pixels, corners, hidden, tokenised)
        assert picture is not None
        true = patchify(pixels / 255, 8)
        torch.testing.assert_close(patchify(picture, 8)[~hidden], true[~hidden], atol=1e-5, rtol=0)
        _, scene = method.predict(method.normalise(pixels), corners, hidden, tokenised=tokenised)
        right = torch.nn.functional.one_hot(method.target.truth(scene), 16).float()
        shown = method.target.to_pixels(right, scene)
        decoded = method.normalise(255 * tokenizer.decode(tokenizer.tokens(tokenised)))  # (B, C, 8 H, 8 W)
    assert shown is not None
    for row, (top, left) in enumerate(corners.tolist()):
        for i, place in enumerate(scene.at[row].tolist()):
            r, c = divmod(place, method.views.size[1])
            r, c = 8 * (top + r), 8 * (left + c)
            expected = decoded[row // method.views.count, :, r : r + 8, c : c + 8].permute(1, 2, 0).flatten()
            torch.testing.assert_close(shown[row, i], expected, atol=1e-5, rtol=1e-4)
    assert method.reconstruct(pixels, corners, hidden) is None  # nothing for the tokenizer to see


def test_patchify_is_row_column_channel_and_unpatchify_its_inverse() -> None:
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    assert patches[0, 0].tolist() == [images[0, c, r, k] for r in (0, 1) for k in (0, 1) for c in (0, 1, 2)]
    assert torch.equal(unpatchify(patches, (2, 3), 3), images)


def test_visible_patches_come_first_and_both_kinds_in_raster_order() -> None:
    hidden = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1, 1, 1]]).bool()
    visible, at = small().order(hidden)
    assert torch.cat([visible, at], dim=1).tolist() == [[1, 4, 5, 8, 0, 2, 3, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7, 8]]


def test_sixteen_bit_and_eight_bit_pixels_of_one_image_are_one_input() -> None:
    method = small()
    eight = torch.randint(0, 256, (2, CHANNELS, 6, 6), dtype=torch.uint8)
    sixteen = (eight.int() * 257).to(torch.uint16)
    as_eight = method.normalise(eight)
    method.scale = 65535.0
    torch.testing.assert_close(method.normalise(sixteen), as_eight)
    torch.testing.assert_close(method.denormalise(as_eight), eight / 255)


def test_mask_tokens_outside_the_depth_are_refused() -> None:
    with pytest.raises(ValueError, match="mask layer 5 is outside the encoder's blocks 0 to 4"):
        small(mask_layer=5)


@pytest.mark.parametrize("mask_layer", [1, None])
def test_unequal_counts_are_refused_where_hidden_tokens_enter_late(mask_layer: int | None) -> None:
    with pytest.raises(ValueError, match="hides more in one view than in another needs mask tokens from block 0 on"):
        small(mask_layer=mask_layer, mask="blockwise")


def test_tokens_without_a_tokenizer_can_be_predicted_but_not_judged() -> None:
    method = small(target="tokens")
    inputs = batch(method)
    method.target = TARGETS["tokens"](16)
    pixels, corners, hidden, _ = views_of(inputs)
    assert method.predict(method.normalise(pixels), corners, hidden)[0].shape == (6, 5, 16)
    assert method.reconstruct(pixels, corners, hidden, inputs["tokenised"]) is None
    with pytest.raises(ValueError, match="need a tokenizer"):
        method(**inputs)


def test_a_tokenizer_is_no_part_of_a_methods_weights() -> None:
    method, without = small(target="tokens"), small(target="tokens")
    without.target = TARGETS["tokens"](16)
    assert method.state_dict().keys() == without.state_dict().keys()
    method.load_state_dict(without.state_dict())
    without.load_state_dict(method.state_dict())
    with pytest.raises(RuntimeError, match="mask_token"):
        method.load_state_dict({k: v for k, v in without.state_dict().items() if "mask_token" not in k})


def test_windows_masks_and_drop_path_are_drawn_apart() -> None:
    """Another mask or count of blocks leaves the windows of a sample where they are."""
    key = SampleKey(epoch=2, index=7, batch=0, slot=0)
    views = LocalWindows((14, 14), 7, 4)
    one = ViewsAndMask(views, UniformMask(49, 0.8), seed=3)(key)
    other = ViewsAndMask(views, UniformMask(49, 0.5), seed=3, drop_path_blocks=12)(key)
    blocks = ViewsAndMask(views, BlockwiseMask((7, 7), 0.39, 4), seed=3, drop_path_blocks=12)(key)
    assert torch.equal(one["corners"], other["corners"]) and torch.equal(one["corners"], blocks["corners"])
    assert (other["hidden"] <= one["hidden"]).all()  # what the lower ratio hides, the higher hides too
    assert torch.equal(other["paths"], blocks["paths"]) and other["paths"].shape == (4, 12, 2)
    assert other["paths"].min() >= 0 and other["paths"].max() < 1
    again = ViewsAndMask(views, UniformMask(49, 0.5), seed=3, drop_path_blocks=12)
    assert not torch.equal(again(key._replace(index=8))["paths"], other["paths"])


@pytest.mark.parametrize(("name", "hidden"), [("lomar", 24), ("mae", 98), ("beit", 98)])
def test_another_mask_ratio_keeps_the_weights_and_the_kind_of_mask(name: str, hidden: int) -> None:
    with torch.device("meta"):
        composition = replace(RECIPES[name].composition(name), depth=1, decoder_depth=1)
        method = composition.build()
    other = composition.with_mask_ratio(method, 0.5)
    assert other.mask.count == hidden and type(other.mask) is type(method.mask)
    assert method.mask.count == {"lomar": 39, "mae": 147, "beit": 75}[name]
    for a, b in zip(method.parameters(), other.parameters(), strict=True):
        assert a is b


@pytest.mark.parametrize("name", MASKED)
def test_a_composition_survives_its_plain_form(name: str) -> None:
    there = replace(RECIPES[name].composition(name), window_layout="released")
    back = Composition.from_dict(json.loads(json.dumps(there.to_dict())))
    assert back == there


@pytest.mark.parametrize("name", ["lomar", "lomar-late", "mae", "beit", "fig5-ape-7", "fig5-decoder-7"])
def test_what_blocks_add_up_to_is_float32_under_autocast_in_every_method(name: str) -> None:
    """Else rounding would tell methods apart (SPEC.md, A.2: tokens are float32 even under autocast)."""
    values = dict(RECIPES[name].options) | {"method": name, "model": "16x2x2", "image_size": 56, "patch_size": 8}
    values |= {"batch_size": 2, "mask_layer": int(name == "lomar-late"), "mean": (0.5,) * 3, "std": (0.2,) * 3}
    values |= {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}
    method = compose(values, vocab=16, scale=255.0).build()
    seen = []
    for module in method.modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda block, given, out: seen.extend([given[0].dtype, out.dtype]))
    drawn = method.draw(0)(SampleKey(0, 0, 0, 0))
    windows = torch.zeros(len(drawn["corners"]), 3, *(8 * side for side in method.views.size))
    with torch.autocast("cpu", torch.bfloat16):
        method.predict(windows, drawn["corners"], drawn["hidden"])
        method.architecture.encoder(torch.zeros(1, 3, 56, 56))
    assert set(seen) == {torch.float32}
