"""Masked reconstruction: WHERE (views, mask) x HOW (architecture) x WHAT (target)."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lomar.data.loader import SampleKey
from lomar.methods.architectures import Architecture, Stage, View
from lomar.methods.masks import BlockwiseMask, Share, UniformMask
from lomar.methods.targets import Scene, Target, patchify, take, unpatchify
from lomar.methods.views import LocalWindows
from lomar.model import Encoder
from lomar.model.positions import grid_coordinates
from lomar.model.transformer import Transformer
from lomar.seeding import seeded


@dataclass(frozen=True)
class ViewsAndMask:
    """The views of a sample and what is hidden of them, fixed by (seed, epoch, index). Goes to the loader's workers.

    Args:
        views: where to look.
        mask: what is hidden there.
        seed: of the run.
        drop_path_blocks: blocks for which drop path needs numbers; 0 where there is no drop path.
        share: what is predicted of that; None for all.
    """

    views: LocalWindows
    mask: UniformMask | BlockwiseMask
    seed: int
    drop_path_blocks: int = 0
    share: Share | None = None

    def __call__(self, key: SampleKey) -> dict[str, Tensor]:
        """What `MaskedReconstruction.forward` takes beside the pixels.

        Corners int64 (V, 2), row and column in patches; hidden bool (V, N); where a share of it is predicted, predicted
        bool (V, N); with drop path, paths (V, blocks, 2) uniform in [0, 1).
        """
        corners = self.views.corners(key, self.seed)
        mask = self.mask.draw(len(corners), seeded(self.seed, key.epoch, key.index, "mask"))
        drawn = {"corners": corners, "hidden": mask}
        if self.share:
            drawn["predicted"] = self.share.draw(mask, seeded(self.seed, key.epoch, key.index, "predicted"))
        if self.drop_path_blocks:
            generator = seeded(self.seed, key.epoch, key.index, "drop path")
            drawn["paths"] = torch.rand(len(corners), self.drop_path_blocks, 2, generator=generator)
        return drawn


class MaskedReconstruction(nn.Module):
    """Predicts the hidden patches of each view.

    Args:
        views: where to look.
        mask: what is hidden there.
        architecture: visible patches and coordinates -> latents of hidden patches.
        target: what the head's output is compared with.
        patch_size: patch side P, in pixels.
        mean, std: per channel, in units of 0 to 1.
        scale: pixel value that stands for 1: 255 for uint8, 65535 for uint16, 1 for floats.
        share: which of the hidden patches are predicted; None for all.

    Raises:
        ValueError: the mask hides different numbers of patches, and architecture or share cannot have that.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        views: LocalWindows,
        mask: UniformMask | BlockwiseMask,
        architecture: Architecture,
        target: Target,
        patch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        scale: float,
        share: Share | None = None,
    ) -> None:
        super().__init__()
        if not mask.even and len(architecture.stages(1, 1)) > 1:
            raise ValueError("a mask that hides more in one view than in another needs mask tokens from block 0 on")
        if not mask.even and share:
            raise ValueError("of a mask that hides more in one view than in another all hidden patches are predicted")
        self.views = views
        self.mask = mask
        self.share = share
        self.architecture = architecture
        self.target = target
        self.patch_size = patch_size
        self.scale = scale
        self.head = nn.Linear(architecture.width, target.width(patch_size**2 * len(mean)))
        architecture.encoder.initialisation.linear(self.head)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @property
    def encoder(self) -> Encoder:
        """What a run gives away."""
        return self.architecture.encoder

    def with_mask(self, mask: UniformMask | BlockwiseMask) -> "MaskedReconstruction":
        """The same weights under another mask, of which all is predicted."""
        other = copy.copy(self)
        other.mask, other.share = mask, None
        return other

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass: less memory, about a third more time."""
        for module in self.modules():
            if isinstance(module, Transformer):
                module.grad_checkpointing = enable

    def normalise(self, pixels: Tensor) -> Tensor:
        """Integer (..., C, h, w) pixels -> the network's input, in the dtype of `mean`."""
        return (pixels.to(self.mean.dtype) / self.scale - self.mean) / self.std

    def denormalise(self, images: Tensor) -> Tensor:
        """The network's input (..., C, h, w) -> values of 0 to 1."""
        return images * self.std + self.mean

    def draw(self, seed: int) -> ViewsAndMask:
        """What the loader calls for each sample."""
        drops = self.architecture.encoder.drop_path_rate > 0
        blocks = len(self.architecture.encoder.blocks) if drops else 0
        return ViewsAndMask(self.views, self.mask, seed, blocks, self.share)

    def stages(self) -> list[Stage]:
        """The tokens of one view (cls among them) through the blocks, at the most hidden patches."""
        predicted = self.share.count if self.share else self.mask.count
        return self.architecture.stages(self.mask.patches - self.mask.count, predicted)

    def forward(
        self,
        pixels: Tensor,
        corners: Tensor,
        hidden: Tensor,
        paths: Tensor | None = None,
        tokenised: Tensor | None = None,
        predicted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | int]:
        """Sum of the predicted patches' losses, and how many they are.

        Args:
            pixels: integer (B, V, C, h, w), the views.
            corners: int64 (B, V, 2), their top-left patches.
            hidden: bool (B, V, N).
            paths: (B, V, depth, 2) uniform numbers that decide for drop path; not given, torch's generator does.
            tokenised: integer (B, C, 8 H, 8 W), the images for a tokenizer.
            predicted: bool (B, V, N), the hidden patches that are predicted; None for all.
        """
        windows = self.normalise(pixels.flatten(0, 1))
        paths = None if paths is None else paths.flatten(0, 1)
        predicted = None if predicted is None else predicted.flatten(0, 1)
        prediction, scene = self.predict(
            windows, corners.flatten(0, 1), hidden.flatten(0, 1), paths, tokenised, predicted
        )
        losses = self.target.loss(prediction, self.target.truth(scene))  # (R, M)
        if self.mask.even:
            return losses.sum(), losses.numel()
        counted = hidden.flatten(0, 1).gather(1, scene.at)
        return (losses * counted).sum(), counted.sum()

    def order(self, hidden: Tensor, predicted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Raster indices in the order of the tokens: int64 of the visible patches, and (R, M) of those predicted.

        Where rows hide fewer than M, the first of a row's M are patches that are visible.

        Args:
            hidden: bool (R, N).
            predicted: bool (R, N), the hidden patches that are predicted; None for all.
        """
        visible, asked = self.mask.patches - self.mask.count, self.mask.count
        rank = hidden.to(torch.uint8)
        if predicted is not None and self.share:
            rank = 2 * rank - predicted.to(torch.uint8)  # those left out come last
            asked = self.share.count
        order = rank.argsort(dim=1, stable=True)
        return order[:, :visible], order[:, visible : visible + asked]

    def predict(
        self,
        windows: Tensor,
        corners: Tensor,
        hidden: Tensor,
        paths: Tensor | None = None,
        tokenised: Tensor | None = None,
        predicted: Tensor | None = None,
    ) -> tuple[Tensor, Scene]:
        """The head's output for the hidden patches, or for those of them that are predicted.

        Args:
            windows: normalised (R, C, h, w).
            corners: int64 (R, 2).
            hidden: bool (R, N); M in each row, or at most M where the mask is uneven.
            paths: (R, depth, 2).
            tokenised: integer (B, C, 8 H, 8 W), B dividing R.
            predicted: bool (R, N), the hidden patches that are predicted, which M counts then; None for all.

        Returns:
            Prediction (R, M, head width), and the scene with what should have come out. Where a row hides fewer than M,
            the first of its M are patches that are visible.
        """
        patches = patchify(windows, self.patch_size)  # (R, N, P * P * C)
        coordinates = corners[:, None] + grid_coordinates(*self.views.size, device=corners.device)  # (R, N, 2)
        visible, at = self.order(hidden, predicted)
        spared = None if self.mask.even else (take(patches, at), ~hidden.gather(1, at))
        view = View(take(patches, visible), take(coordinates, visible), take(coordinates, at), spared)
        prediction = self.head(self.architecture(view, paths))
        return prediction, Scene(windows, patches, at, view.hidden_at, tokenised, self.normalise)

    def reconstruct(
        self, pixels: Tensor, corners: Tensor, hidden: Tensor, tokenised: Tensor | None = None
    ) -> Tensor | None:
        """Views with their hidden patches predicted and their visible ones as they are.

        Args:
            pixels: integer (R, C, h, w).
            corners: int64 (R, 2).
            hidden: bool (R, N).
            tokenised: integer (B, C, 8 H, 8 W), B dividing R, for a tokenizer.

        Returns:
            float (R, C, h, w), values of about 0 to 1; None if the target has no pictures.
        """
        windows = self.normalise(pixels)
        prediction, scene = self.predict(windows, corners, hidden, tokenised=tokenised)
        predicted = self.target.to_pixels(prediction, scene)
        if predicted is None:
            return None
        at = scene.at[..., None].expand_as(predicted)
        shown = torch.where(take(hidden[..., None], scene.at), predicted, take(scene.patches, scene.at))
        restored = scene.patches.scatter(1, at, shown)
        return self.denormalise(unpatchify(restored, self.views.size, windows.shape[1]))
