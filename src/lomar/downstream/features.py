"""One vector per image from a frozen encoder."""

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn


def pooled_features(
    encoder: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    normalise: Callable[[Tensor], Tensor],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Mean of the patch tokens of every image, after the final norm; the cls token is left out.

    An observer only: every module's training flag and torch's global random state are as before when it returns,
    so that evaluating during training does not change the training.

    Args:
        encoder: its `forward_features` maps normalised images (B, C, S, S) to tokens (B, 1 + N, D), cls first;
            already on `device`.
        batches: pairs of integer pixels (B, C, S, S) and good (B,) bool, False where an image could not be read.
        normalise: integer pixels on `device` to the encoder's input, float.
        device: where the encoder is.

    Returns:
        features float32 (N, D) and good bool (N,), both on the CPU, in the order of the batches. The rows of
        images that are not good are kept, so that labels line up; leave them out with `features[good]`.

    Raises:
        ValueError: there is no batch.
    """
    # nn.Module declares no such method; every encoder of timm has it.
    forward_features = cast(Callable[[Tensor], Tensor], encoder.forward_features)
    features: list[Tensor] = []
    good: list[Tensor] = []
    training = [module for module in encoder.modules() if module.training]
    generators = [device] if device.type == "cuda" else []
    encoder.eval()
    try:
        # The iterator is made inside the fork: a DataLoader draws a base seed from the global generator.
        with torch.inference_mode(), torch.random.fork_rng(devices=generators):
            for pixels, readable in batches:
                tokens = forward_features(normalise(pixels.to(device)))  # (B, 1 + N, D)
                features.append(tokens[:, 1:].float().mean(dim=1).cpu())
                good.append(readable.cpu())
    finally:
        for module in training:
            module.training = True
    if not features:
        raise ValueError("no batch to take features from")
    # Outside inference mode, so that the result is an ordinary tensor that a probe can train on.
    return torch.cat(features), torch.cat(good)
