"""What a frozen encoder makes of images: a vector an image, or a patch. For any model of timm's contract."""

import inspect
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
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
    """Whether its tokens begin with a cls token; registers, and a cls token that is kept elsewhere, are none."""
    return getattr(model, "cls_token", None) is not None and getattr(model, "num_prefix_tokens", 0) > 0


def has_cls_of_layers(model: nn.Module) -> bool:
    """Whether the cls token can be had after any layer; models whose last layers alone have one give it at the end."""
    return has_cls(model) and _gives_prefix(model)


def feature_reader(model: nn.Module, wanted: Sequence[Wanted]) -> Reader:
    """A function: normalised images (B, C, H, W) -> one tensor for each kind wanted, in one forward pass.

    Each is (B, D), or (B, N, D) of "patches". Tokens have passed the model's final norm, those of earlier layers as
    well, as in DINOv2's linear evaluation. Where it does not apply (a classifier that normalises what it pooled,
    the earlier stages of a model that grows wider) they are as they are. "pooled" is what the model gives its
    classifier; of an earlier layer, the cls token where the model pools by it, else the mean. The last layer is the
    same whether it is named or not.

    Args:
        model: of timm's contract, with or without classifier.
        wanted: what to read.

    Raises:
        ValueError: the model has no cls token, or no such layer. The function raises it where the model's last
            features are neither tokens nor maps; it can be pooled all the same.
    """
    count = layer_count(model)
    for each in wanted:
        if each.features not in FEATURES:
            raise ValueError(f"features are {each.features!r}; they can be {', '.join(FEATURES)}")
        if "cls" in each.features and not has_cls(model):
            raise ValueError(f"the model has no cls token for {each.features!r}; it can be pooled, mean or patches")
        if each.layer is not None and not 1 <= each.layer <= count:
            raise ValueError(f"there is no layer {each.layer}; the model has layers 1 to {count}")
        if "cls" in each.features and each.layer not in (None, count) and not has_cls_of_layers(model):
            raise ValueError(f"the model has no cls token after layer {each.layer}, only after the last")
    wanted = [Wanted(each.features, None if each.layer == count else each.layer) for each in wanted]
    inner = sorted({each.layer - 1 for each in wanted if each.layer is not None})
    ending = any(each.layer is None for each in wanted)
    # Where the last features may hold a cls token that nothing tells of, patches are read where they stand alone.
    apart = getattr(model, "cls_token", None) is not None and not hasattr(model, "num_prefix_tokens")
    if apart and any(each.layer is None and each.features != "pooled" for each in wanted):
        inner = [*inner, count - 1]
    early_pooled = "cls" if has_cls_of_layers(model) and getattr(model, "global_pool", "") == "token" else "mean"
    contract: Any = model

    def read(images: Tensor) -> list[Tensor]:
        last, found = _forward(model, images, inner, ending)
        parts: dict[int | None, _Parts] = {index + 1: _split(each) for index, each in zip(inner, found, strict=True)}
        results = []
        for features, layer in wanted:
            if layer is None and features == "pooled":
                results.append(contract.forward_head(last, pre_logits=True))
                continue
            if layer not in parts:
                parts[layer] = parts[count] if apart else _parts(model, last)
            results.append(_read(early_pooled if features == "pooled" else features, parts[layer]))
        return results

    return read


class _Parts(NamedTuple):
    """Tokens of one layer.

    Args:
        patches: (B, N, D).
        cls: (B, D), or None where there is none.
    """

    patches: Tensor
    cls: Tensor | None


def _gives_prefix(model: nn.Module) -> bool:
    """Whether `forward_intermediates` hands out what stands before the patch tokens."""
    contract: Any = model
    return "return_prefix_tokens" in inspect.signature(contract.forward_intermediates).parameters


def _forward(model: nn.Module, images: Tensor, inner: list[int], ending: bool) -> tuple[Any, list[Any]]:
    """What `forward_features` gives, if asked for, and what is there after each of the inner layers."""
    contract: Any = model
    if not inner:
        return contract.forward_features(images), []
    if not _gives_prefix(model):
        # A norm is for one width. Not all of these end `forward_intermediates` as they end `forward_features`.
        norm = len({info["num_chs"] for info in contract.feature_info}) == 1
        found = contract.forward_intermediates(
            images, indices=inner, norm=norm, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        return contract.forward_features(images) if ending else None, found
    settings = {"indices": inner, "norm": True, "output_fmt": "NLC", "return_prefix_tokens": True}
    if ending:
        return contract.forward_intermediates(images, **settings)
    return None, contract.forward_intermediates(images, **settings, stop_early=True, intermediates_only=True)


def _split(found: Tensor | tuple[Tensor, Tensor]) -> _Parts:
    """The tokens of what `forward_intermediates` gives for one layer."""
    if not isinstance(found, Tensor):
        patches, prefix = found
        return _Parts(patches, prefix[:, 0] if prefix.shape[1] else None)
    return _Parts(found if found.ndim == 3 else found.flatten(2).transpose(1, 2), None)


def _parts(model: nn.Module, tokens: Any) -> _Parts:
    """The tokens of what `forward_features` gives: (B, prefix + N, D), or maps with the channels first or last."""
    if isinstance(tokens, Tensor) and tokens.ndim == 3:
        prefix = getattr(model, "num_prefix_tokens", 0)
        return _Parts(tokens[:, prefix:], tokens[:, 0] if has_cls(model) else None)
    if isinstance(tokens, Tensor) and tokens.ndim == 4:
        channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        return _Parts(tokens.flatten(1, 2) if channels_last else tokens.flatten(2).transpose(1, 2), None)
    raise ValueError("the model's last features are neither tokens nor maps; they can be pooled")


def _read(features: str, parts: _Parts) -> Tensor:
    if features == "patches":
        return parts.patches
    if features == "mean":
        return parts.patches.float().mean(dim=1)
    assert parts.cls is not None  # `feature_reader` has seen to it
    if features == "cls":
        return parts.cls
    return torch.cat([parts.cls.float(), parts.patches.float().mean(dim=1)], dim=1)


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
    features: list[list[Tensor]] = []
    good: list[Tensor] = []
    with undisturbed(model, device):  # the batches too may draw, from whatever makes them
        for found, usable in features_in_batches(model, wanted, batches, normalise, device):
            features.append(found)
            good.append(usable)
    if not features:
        raise ValueError("no batch to take features from")
    # Outside inference mode, so that the result is an ordinary tensor that a probe can train on.
    return [torch.cat(parts) for parts in zip(*features, strict=True)], torch.cat(good)


def features_in_batches(
    model: nn.Module,
    wanted: Sequence[Wanted],
    batches: Iterable[tuple[Tensor, Tensor]],
    normalise: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Generator[tuple[list[Tensor], Tensor], None, None]:
    """What `frozen_features` gives, a batch at a time, so that memory does not grow with the images.

    The tensors cannot be trained on, but copies of them can.
    """
    read = feature_reader(model, wanted)
    for pixels, readable in batches:
        # Entered for each batch: what surrounds a yield would surround the work of whoever asks for the next one.
        with undisturbed(model, device), torch.inference_mode():
            found = [each.float().cpu() for each in read(normalise(pixels.to(device)))]
            finite = [each.flatten(1).isfinite().all(dim=1) for each in found]
            usable = torch.stack([readable.cpu().bool(), *finite]).all(dim=0)
        yield found, usable
