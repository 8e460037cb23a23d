"""Images as discrete tokens: the discrete VAE of DALL-E, whose token is the prediction target of BEiT."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 8  # pixels a token's side stands for
GROUPS = 4
EMBEDDING_WIDTH = 128  # what the decoder makes of a token first
MARGIN = 0.1  # pixels of 0 to 1 become 0.1 to 0.9, since the decoder's sigmoid never reaches its ends


class Conv(nn.Module):
    """A convolution that keeps the size; its parameters are called `w` (out, in, k, k) and `b` (out,), as in DALL-E."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(channels_out, channels_in, kernel, kernel))
        self.b = nn.Parameter(torch.zeros(channels_out))
        nn.init.normal_(self.w, std=(channels_in * kernel**2) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class ResidualBlock(nn.Module):
    """identity(x) + gain * four convolutions, each after a ReLU, through a quarter of the width.

    Args:
        channels_in, channels_out: the identity is a 1x1 convolution where they differ.
        kernels: sides of the four convolutions.
        gain: what the residual branch is multiplied by.
    """

    def __init__(self, channels_in: int, channels_out: int, kernels: Sequence[int], gain: float) -> None:
        super().__init__()
        hidden = channels_out // 4
        widths = [channels_in, hidden, hidden, hidden, channels_out]
        self.gain = gain
        self.id_path = Conv(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()
        self.res_path = nn.Sequential()
        for number, ((before, after), kernel) in enumerate(zip(pairwise(widths), kernels, strict=True), start=1):
            self.res_path.add_module(f"relu_{number}", nn.ReLU())
            self.res_path.add_module(f"conv_{number}", Conv(before, after, kernel))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.id_path(x) + self.gain * self.res_path(x))


def _groups(
    widths: Sequence[int], blocks_per_group: int, kernels: Sequence[int], between: nn.Module
) -> Iterator[tuple[str, nn.Module]]:
    """The named groups of blocks from widths[0] over widths[1] ... to widths[-1], with a change of scale between."""
    gain = (GROUPS * blocks_per_group) ** -2
    for number, (before, width) in enumerate(pairwise(widths), start=1):
        group = nn.Sequential()
        for block in range(1, blocks_per_group + 1):
            group.add_module(f"block_{block}", ResidualBlock(before if block == 1 else width, width, kernels, gain))
        if number < GROUPS:
            group.add_module("scale", between)
        yield f"group_{number}", group


def _output(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv(channels_in, channels_out, 1)))


class DVAEEncoder(nn.Module):
    """Pixels (B, C, h, w), prepared by `squeeze`, -> logits (B, vocabulary, h / 8, w / 8).

    Args:
        channels: of the images.
        width: of the first of four groups; the next have 2, 4 and 8 times as much. A multiple of 4.
        vocab: number of tokens.
        blocks_per_group: residual blocks before each halving of the resolution.

    Source: DALL-E (Ramesh et al. 2021), appendix A.1; the released encoder is the defaults.
    """

    def __init__(self, channels: int = 3, width: int = 256, vocab: int = 8192, blocks_per_group: int = 2) -> None:
        super().__init__()
        self.channels, self.width, self.vocab, self.blocks_per_group = channels, width, vocab, blocks_per_group
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.blocks = nn.Sequential()
        self.blocks.add_module("input", Conv(channels, width, 7))
        for name, group in _groups(widths, blocks_per_group, (3, 3, 3, 1), nn.MaxPool2d(2)):
            self.blocks.add_module(name, group)
        self.blocks.add_module("output", _output(widths[-1], vocab))

    @property
    def last(self) -> Conv:
        """The convolution that gives the logits."""
        return cast(Conv, self.get_submodule("blocks.output.conv"))

    def forward(self, pixels: Tensor) -> Tensor:
        return cast(Tensor, self.blocks(pixels))


class DVAEDecoder(nn.Module):
    """Tokens -> (B, 2 C, 8 h, 8 w): for each channel a location, then for each the logarithm of a scale.

    The location is that of the logit of a squeezed pixel, see `squeeze`.

    Args:
        channels, width, vocab, blocks_per_group: as of the encoder.

    Source: as of the encoder.
    """

    def __init__(self, channels: int = 3, width: int = 256, vocab: int = 8192, blocks_per_group: int = 2) -> None:
        super().__init__()
        widths = [EMBEDDING_WIDTH, 8 * width, 4 * width, 2 * width, width]
        self.blocks = nn.Sequential()
        self.blocks.add_module("input", Conv(vocab, EMBEDDING_WIDTH, 1))
        for name, group in _groups(widths, blocks_per_group, (1, 3, 3, 3), nn.Upsample(scale_factor=2)):
            self.blocks.add_module(name, group)
        self.blocks.add_module("output", _output(width, 2 * channels))

    @property
    def embedding(self) -> Conv:
        """The convolution whose weights (128, vocabulary, 1, 1) are what a token is to the decoder."""
        return cast(Conv, self.get_submodule("blocks.input"))

    def forward(self, shares: Tensor) -> Tensor:
        """`shares` (B, vocabulary, h, w): how much of each token is at a place; they add up to 1."""
        return cast(Tensor, self.blocks(shares))

    def from_ids(self, ids: Tensor) -> Tensor:
        """The same for whole tokens, int64 (B, h, w): a look-up in place of a product with 8192 channels."""
        features = F.embedding(ids, self.embedding.w.flatten(1).T) + self.embedding.b  # (B, h, w, 128)
        return cast(Tensor, self.blocks[1:](features.movedim(-1, 1)))


def squeeze(unit_pixels: Tensor) -> Tensor:
    """Pixels of 0 to 1 -> 0.1 to 0.9, as encoder and loss want them."""
    return (1 - 2 * MARGIN) * unit_pixels + MARGIN


def unsqueeze(squeezed: Tensor) -> Tensor:
    """The way back, clamped to 0 to 1."""
    return ((squeezed - MARGIN) / (1 - 2 * MARGIN)).clamp(0, 1)


class DiscreteVAE(nn.Module):
    """Images <-> tokens: what BEiT predicts, and what it looks like.

    Args:
        encoder: gives the tokens.
        decoder: shows them; None where only the encoder is known.
        low, high: for each channel the pixel value that stands for 0 and for 1.
        pixel_type: what the images were read as, "uint8", "uint16" or "float32"; low and high are for no other.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        encoder: DVAEEncoder,
        decoder: DVAEDecoder | None,
        low: Sequence[float],
        high: Sequence[float],
        pixel_type: str = "uint8",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.pixel_type = pixel_type
        # Not in the state dict, which holds what was learnt; `architecture` carries them.
        self.register_buffer("low", torch.tensor(low, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("high", torch.tensor(high, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    @classmethod
    def build(
        cls,
        *,
        channels: int,
        width: int,
        vocab: int,
        blocks_per_group: int,
        low: Sequence[float],
        high: Sequence[float],
        pixel_type: str = "uint8",
        has_decoder: bool = True,
    ) -> "DiscreteVAE":
        """One with fresh weights; `DiscreteVAE.build(**dvae.architecture)` is its like."""
        sizes = (channels, width, vocab, blocks_per_group)
        return cls(DVAEEncoder(*sizes), DVAEDecoder(*sizes) if has_decoder else None, low, high, pixel_type)

    @property
    def architecture(self) -> dict[str, Any]:
        """What `build` needs, as plain values."""
        encoder = self.encoder
        return {
            "channels": encoder.channels,
            "width": encoder.width,
            "vocab": encoder.vocab,
            "blocks_per_group": encoder.blocks_per_group,
            "low": self.low.flatten().tolist(),
            "high": self.high.flatten().tolist(),
            "pixel_type": self.pixel_type,
            "has_decoder": self.decoder is not None,
        }

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return self.encoder.vocab

    def unit(self, pixels: Tensor) -> Tensor:
        """Pixels (..., C, h, w) as read from files, of any type -> float32 in 0 to 1; values beyond are clamped."""
        return ((pixels.float() - self.low) / (self.high - self.low)).clamp(0, 1)

    def logits(self, unit_pixels: Tensor) -> Tensor:
        """Logits (B, vocabulary, h / 8, w / 8) of pixels (B, C, h, w) in 0 to 1; h and w are multiples of 8."""
        return cast(Tensor, self.encoder(squeeze(unit_pixels)))

    @torch.no_grad()
    def tokens(self, pixels: Tensor) -> Tensor:
        """The most likely token at each place, int64 (B, h / 8, w / 8).

        Computed in float32 under autocast too: targets must not depend on the precision of a run.

        Args:
            pixels: (B, C, h, w) as read from files; h and w are multiples of 8.
        """
        with torch.autocast(pixels.device.type, enabled=False):
            return self.logits(self.unit(pixels)).argmax(dim=1)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Tokens, int64 (B, h, w), as pixels (B, C, 8 h, 8 w) in 0 to 1.

        Raises:
            ValueError: there is no decoder.
        """
        if self.decoder is None:
            raise ValueError("this tokenizer has no decoder: its file held an encoder alone")
        with torch.autocast(ids.device.type, enabled=False):
            location, _ = self.decoder.from_ids(ids).chunk(2, dim=1)
            return unsqueeze(location.sigmoid())
