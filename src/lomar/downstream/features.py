"""What a frozen encoder makes of images: a vector an image, or a patch. For any model of timm's contract."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# As the model pools itself; the cls token; the mean of the patch tokens; the last two joined; every patch token.
FEATURES = ("pooled", "cls", "mean", "cls+mean", "patches")

Reader = Callable[[Tensor], list[Tensor]]


class Wanted(NamedTuple):
    """One kind of feature.

    Args:
        features: one of `FEATURES`.
        layer: block after which it is taken, counted from 1; None is the last.
    """

    features: str
    layer: int | None = None


def layer_count(model: nn.Module) -> int:
    """Blocks (of a convolutional model: stages) after which features can be taken."""
    return len(model.feature_info)  # type: ignore[arg-type]  # every model of timm has it


def has_cls(model: nn.Module) -> bool:
    """Whether it has a cls token."""
    return getattr(model, "num_prefix_tokens", 0) > 0


def feature_reader(model: nn.Module, wanted: Sequence[Wanted]) -> Reader:
    """A function: normalised images (B, C, H, W) -> one tensor for each kind wanted, in one forward pass.

    Each is (B, D), or (B, N, D) of "patches". Tokens have passed the model's final norm, those of earlier layers as
    well, as in DINOv2's linear evaluation. "pooled" of an earlier layer is the cls token where the model pools by it,
    else the mean.

    Args:
        model: of timm's contract, with or without classifier.
        wanted: what to read.

    Raises:
        ValueError: the model has no cls token, or no such layer.
    """
    count = layer_count(model)
    for each in wanted:
        if each.features not in FEATURES:
            raise ValueError(f"features are {each.features!r}; they can be {', '.join(FEATURES)}")
        if "cls" in each.features and not has_cls(model):
            raise ValueError(f"the model has no cls token for {each.features!r}; it can be pooled, mean or patches")
        if each.layer is not None and not 1 <= each.layer <= count:
            raise ValueError(f"there is no layer {each.layer}; the model has layers 1 to {count}")
    contract: Any = model

    def whole(images: Tensor) -> list[Tensor]:
        tokens = contract.forward_features(images)
        own = Wanted("pooled")
        return [
            contract.forward_head(tokens, pre_logits=True)
            if each == own
            else _read(each.features, *_parts(model, tokens))
            for each in wanted
        ]

    if all(each.layer is None for each in wanted):
        return whole

    layers = sorted({(each.layer or count) - 1 for each in wanted})

    def layered(images: Tensor) -> list[Tensor]:
        found = contract.forward_intermediates(
            images, indices=layers, norm=True, stop_early=True, intermediates_only=True, **_as_tokens(model)
        )
        parts = dict(zip(layers, (_split(each) for each in found), strict=True))
        by_cls = has_cls(model) and getattr(model, "global_pool", "") == "token"
        return [
            _read(
                ("cls" if by_cls else "mean") if each.features == "pooled" else each.features,
                *parts[(each.layer or count) - 1],
            )
            for each in wanted
        ]

    return layered


def _as_tokens(model: nn.Module) -> dict[str, Any]:
    """What a model of tokens takes and a convolutional one does not."""
    return {"output_fmt": "NLC", "return_prefix_tokens": True} if has_cls(model) else {"output_fmt": "NCHW"}


def _split(found: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Patch tokens (B, N, D) and the cls token (B, D), of what `forward_intermediates` gives for one layer."""
    if isinstance(found, Tensor):
        return found.flatten(2).transpose(1, 2), None
    patches, prefix = found
    return patches, prefix[:, 0]


def _parts(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """The same of what `forward_features` gives: tokens (B, 1 + N, D), or maps with the channels first or last."""
    if tokens.ndim == 3:
        prefix = getattr(model, "num_prefix_tokens", 0)
        return tokens[:, prefix:], tokens[:, 0] if prefix else None
    if tokens.ndim == 4:
        channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        return (tokens.flatten(1, 2) if channels_last else tokens.flatten(2).transpose(1, 2)), None
    raise ValueError(f"features of shape {tuple(tokens.shape)} are neither tokens nor maps")


def _read(features: str, patches: Tensor, cls: Tensor | None) -> Tensor:
    if features == "patches":
        return patches
    if features == "cls":
        assert cls is not None
        return cls
    mean = patches.mean(dim=1)
    if features == "cls+mean":
        assert cls is not None
        return torch.cat([cls, mean], dim=1)
    return mean


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode; every module's training flag and torch's random state are as before afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module in training:
            module.training = True


def frozen_features(
    model: nn.Module,
    wanted: Sequence[Wanted],
    batches: Iterable[tuple[Tensor, Tensor]],
    normalise: Callable[[Tensor], Tensor],
    device: torch.device,
) -> tuple[list[Tensor], Tensor]:
    """Features of all images, float32 on the CPU: one tensor (N, ...) for each kind wanted; and good bool (N,).

    An observer only: see `undisturbed`. So evaluating during training does not change the training.

    Args:
        model: of timm's contract, already on `device`.
        wanted: what to read.
        batches: pairs of pixels (B, C, H, W) and good (B,) bool, False where an image could not be read.
        normalise: pixels on `device` to the model's input, float.
        device: where the model is.

    Returns:
        In the order of the batches. The rows of images that are not good are kept, so that labels line up; leave
        them out with `features[good]`. Not good are also images whose features are not finite: a float image can be
        too bright for float32.

    Raises:
        ValueError: there is no batch, or the model lacks what is wanted.
    """
    read = feature_reader(model, wanted)
    features: list[list[Tensor]] = []
    good: list[Tensor] = []
    with undisturbed(model, device), torch.inference_mode():
        for pixels, readable in batches:
            found = [each.float().cpu() for each in read(normalise(pixels.to(device)))]
            features.append(found)
            finite = [each.flatten(1).isfinite().all(dim=1) for each in found]
            good.append(torch.stack([readable.cpu().bool(), *finite]).all(dim=0))
    if not features:
        raise ValueError("no batch to take features from")
    # Outside inference mode, so that the result is an ordinary tensor that a probe can train on.
    return [torch.cat(parts) for parts in zip(*features, strict=True)], torch.cat(good)
