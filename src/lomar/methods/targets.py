"""WHAT a hidden patch should become, and how far a prediction is from it."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lomar.methods.tokenizer import STRIDE, DiscreteVAE

PIXEL_EPS = 1e-6


def patchify(pixels: Tensor, patch_size: int) -> Tensor:
    """Patches of images or windows, in raster order.

    Args:
        pixels: (R, C, h, w), sides multiples of `patch_size`.
        patch_size: patch side P, in pixels.

    Returns:
        (R, N, P * P * C), pixels of a patch in order (row, column, channel).
    """
    r, c, h, w = pixels.shape
    p = patch_size
    patches = pixels.reshape(r, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)  # (R, H, W, P, P, C)
    return patches.reshape(r, (h // p) * (w // p), p * p * c)


def unpatchify(patches: Tensor, grid: tuple[int, int], channels: int) -> Tensor:
    """(R, N, P * P * C) -> (R, C, h, w): the inverse of `patchify` for a view of `grid` patches."""
    r = patches.shape[0]
    rows, columns = grid
    p = round((patches.shape[2] // channels) ** 0.5)
    images = patches.reshape(r, rows, columns, p, p, channels).permute(0, 5, 1, 3, 2, 4)  # (R, C, H, P, W, P)
    return images.reshape(r, channels, rows * p, columns * p)


def take(items: Tensor, at: Tensor) -> Tensor:
    """(R, N, d) items and int64 (R, M) indices -> (R, M, d)."""
    return items.gather(1, at[..., None].expand(-1, -1, items.shape[-1]))


class Scene(NamedTuple):
    """What a target may look at.

    Args:
        windows: (R, C, h, w), the views, normalised as the network's input.
        patches: (R, N, P * P * C), the same as patches.
        at: int64 (R, M), raster indices of the hidden patches in their view.
        coordinates: int64 (R, M, 2), their rows and columns in the image.
        tokenised: (B, C, 8 H, 8 W), the images in raw pixels as a tokenizer sees them; None if nobody asked for it.
        normalise: raw pixels (..., C, h, w) -> the network's input.
    """

    windows: Tensor
    patches: Tensor
    at: Tensor
    coordinates: Tensor
    tokenised: Tensor | None
    normalise: Callable[[Tensor], Tensor]


class Target(Protocol):
    """What the head's output is compared with. M hidden patches in each of R views."""

    def width(self, patch_values: int) -> int:
        """Outputs of the head for a patch of P * P * C values."""

    def truth(self, scene: Scene) -> Tensor:
        """What should have come out: (R, M) or (R, M, d)."""

    def loss(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """Loss of each hidden patch: the head's (R, M, width) against `truth` -> float32 (R, M)."""

    def to_pixels(self, prediction: Tensor, scene: Scene) -> Tensor | None:
        """The head's output as normalised pixels (R, M, P * P * C), for pictures; None where there are none."""


class Pixels:
    """The pixels of a patch, as the network's input has them.

    Source: MAE without `norm_pix_loss`, as its weights for visualisation were trained.
    """

    def width(self, patch_values: int) -> int:
        """P * P * C."""
        return patch_values

    def truth(self, scene: Scene) -> Tensor:
        """(R, M, P * P * C)."""
        return take(scene.patches, scene.at)

    def loss(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """Mean squared error of each hidden patch, float32 (R, M)."""
        return (prediction.to(truth.dtype) - truth).square().mean(dim=-1)

    def to_pixels(self, prediction: Tensor, scene: Scene) -> Tensor:
        """The prediction itself."""
        return prediction.to(scene.patches.dtype)


class NormalisedPixels(Pixels):
    """Pixels of a patch, less their mean and over their standard deviation.

    Source: LoMaR section 3.2 ("normalized ground-truth image"), MAE; unbiased variance, epsilon inside the root.
    """

    def truth(self, scene: Scene) -> Tensor:
        """(R, M, P * P * C)."""
        patches = super().truth(scene)
        mean, deviation = self._moments(patches)
        return (patches - mean) / deviation

    def to_pixels(self, prediction: Tensor, scene: Scene) -> Tensor:
        """A prediction as pixels, with the true mean and deviation of each patch: those are not predicted."""
        patches = super().truth(scene)
        mean, deviation = self._moments(patches)
        return prediction.to(patches.dtype) * deviation + mean

    @staticmethod
    def _moments(patches: Tensor) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return mean, (variance + PIXEL_EPS).sqrt()


class VisualTokens(nn.Module):
    """The words that a discrete VAE has for the patches of the image.

    The tokenizer is no part of the state dict: it is fixed, and larger than many an encoder.

    Args:
        vocab: size of the codebook.
        tokenizer: gives the tokens; may be attached later, and is not needed to predict.

    Source: BEiT.
    """

    def __init__(self, vocab: int, tokenizer: DiscreteVAE | None = None) -> None:
        super().__init__()
        self.vocab = vocab
        self.tokenizer: DiscreteVAE | None = None
        if tokenizer:
            self.attach(tokenizer)
        self.register_state_dict_post_hook(_without_tokenizer)
        self.register_load_state_dict_post_hook(_needs_no_tokenizer)

    def attach(self, tokenizer: DiscreteVAE) -> None:
        """Give it the tokenizer, which is not trained from then on."""
        self.tokenizer = tokenizer.requires_grad_(False)

    def width(self, patch_values: int) -> int:
        """The vocabulary."""
        return self.vocab

    def truth(self, scene: Scene) -> Tensor:
        """int64 (R, M), the tokens of the hidden patches."""
        return self._of_views(scene).gather(1, self._places(scene))

    def loss(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """Cross-entropy of each hidden patch, float32 (R, M)."""
        return nn.functional.cross_entropy(prediction.float().transpose(1, 2), truth, reduction="none")

    def to_pixels(self, prediction: Tensor, scene: Scene) -> Tensor | None:
        """The image that the tokenizer decodes from its tokens and the predicted ones, at the hidden patches."""
        if self.tokenizer is None or self.tokenizer.decoder is None or scene.tokenised is None:
            return None
        places = self._places(scene)
        tokens = self._of_views(scene).scatter(1, places, prediction.argmax(dim=-1))
        rows, columns = (side // STRIDE for side in scene.tokenised.shape[-2:])
        unit = self.tokenizer.decode(tokens.view(-1, rows, columns))  # (R, C, 8 H, 8 W)
        low, high = self.tokenizer.low, self.tokenizer.high
        raw = unit * (high - low) + low
        patch = round((scene.patches.shape[-1] // raw.shape[1]) ** 0.5)
        raw = nn.functional.interpolate(
            raw, (rows * patch, columns * patch), mode="bilinear", align_corners=False, antialias=True
        )
        return take(patchify(scene.normalise(raw), patch), places)

    def _of_views(self, scene: Scene) -> Tensor:
        """int64 (R, H * W): all tokens of the image that each view is of."""
        if self.tokenizer is None or scene.tokenised is None:
            raise ValueError("visual tokens need a tokenizer and the images it is to see")
        tokens = self.tokenizer.tokens(scene.tokenised).flatten(1)
        return tokens.repeat_interleave(len(scene.at) // len(tokens), dim=0)

    @staticmethod
    def _places(scene: Scene) -> Tensor:
        """int64 (R, M): raster indices of the hidden patches in their image."""
        assert scene.tokenised is not None
        return scene.coordinates[..., 0] * (scene.tokenised.shape[-1] // STRIDE) + scene.coordinates[..., 1]


def _without_tokenizer(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}tokenizer.")]:
        del state[name]


def _needs_no_tokenizer(module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if ".tokenizer." not in f".{name}"]


# name -> the target for a vocabulary; `--target` takes these names
TARGETS: dict[str, Callable[[int], Target]] = {
    "normalised-pixels": lambda vocab: NormalisedPixels(),
    "pixels": lambda vocab: Pixels(),
    "tokens": VisualTokens,
}
