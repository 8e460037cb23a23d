"""A step of pretraining as `lomar pretrain` makes it, on synthetic images or through the real pipeline."""

from collections.abc import Callable, Iterator, Mapping
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from lomar.benchmark.place import Place
from lomar.benchmark.yardstick import TimmMAE
from lomar.data.decode import PixelFormat
from lomar.data.loader import CropPlan, SampleKey, pretraining_batches
from lomar.data.opening import open_source
from lomar.methods.composition import Composition
from lomar.methods.reconstruction import MaskedReconstruction
from lomar.methods.targets import VisualTokens
from lomar.methods.tokenizer import STRIDE, DiscreteVAE
from lomar.training.memory import keep_freed_memory
from lomar.training.optim import adamw
from lomar.training.step import Step, on_device

OPENAI_WIDTH, OPENAI_BLOCKS = 256, 2  # of OpenAI's tokenizer
_MANY = 1_000_000  # batches: more than anyone times

LEARNING_RATE = 1e-4  # any will do

Inputs = dict[str, Tensor]


class KnownTokens(nn.Module):
    """Stands for a tokenizer whose work is not to be timed: every token is the first one."""

    decoder = None

    def tokens(self, pixels: Tensor) -> Tensor:
        """int64 (B, h / 8, w / 8) of pixels (B, C, h, w)."""
        rows, columns = (side // STRIDE for side in pixels.shape[-2:])
        return torch.zeros(len(pixels), rows, columns, dtype=torch.int64, device=pixels.device)


def training_step(
    place: Place,
    images: int,
    *,
    composition: Mapping[str, Any],
    clip_grad: float,
    of_timm: bool = False,
    with_tokenizer: bool = True,
    data: str | None = None,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    color_jitter: float = 0.0,
    workers: int = 0,
) -> Callable[[], object]:
    """Forward, backward, clipping and update for the next images.

    Args:
        place: where.
        images: of a step, in each process.
        composition: of the method, as `Composition.to_dict` gives it.
        clip_grad: largest gradient norm.
        of_timm: measure MAE put together from timm's blocks.
        with_tokenizer: for methods that predict tokens: let one of OpenAI's size, with random weights, give them.
        data: what `open_source` takes; without it one batch of noise lies on the device.
        crop_scale, color_jitter: of the real pipeline.
        workers: processes that read images.
    """
    c = Composition.from_dict(composition)
    method = c.build()
    if isinstance(method.target, VisualTokens):
        method.target.tokenizer = tokenizer(c) if with_tokenizer else KnownTokens()  # type: ignore[assignment]
    batches = _real(place, images, c, method, data, crop_scale, color_jitter, workers) if data else None
    trained = TimmMAE(c) if of_timm else method
    optimizer = adamw(trained, 0.05, (0.9, 0.95))
    if batches is None:
        batches = repeat({name: each.to(place.device) for name, each in noise(c, method, images).items()})
    update = updating(place, trained, optimizer, images, clip_grad)
    return lambda: update(next(batches))


def updating(
    place: Place, method: nn.Module, optimizer: torch.optim.Optimizer, images: int, clip_grad: float
) -> Callable[[Mapping[str, Tensor]], object]:
    """What turns the inputs of a batch into an update of the weights: the step of the training loop.

    Args:
        place: where.
        method: inputs by name -> sum of losses and how many they are.
        optimizer: over its parameters.
        images: of a step, in each process.
        clip_grad: largest gradient norm.
    """
    if place.device.type == "cpu":
        keep_freed_memory()  # as the training loop does
    step = Step(place.fabric, method, optimizer, images * place.fabric.world_size, clip_grad, place.compiled)

    def update(inputs: Mapping[str, Tensor]) -> None:
        step.learn(inputs)
        step.update(LEARNING_RATE)

    return update


def tokenizer(c: Composition) -> DiscreteVAE:
    """One of OpenAI's size with random weights, which does not learn."""
    channels = len(c.mean)
    made = DiscreteVAE.build(
        channels=channels,
        width=OPENAI_WIDTH,
        vocab=c.vocab,
        blocks_per_group=OPENAI_BLOCKS,
        low=[0.0] * channels,
        high=[c.scale] * channels,
        has_decoder=False,
    )
    return made.requires_grad_(False)


def noise(c: Composition, method: MaskedReconstruction, images: int) -> Inputs:
    """A batch as the loader makes them, of pixels by chance."""
    sides = [patches * c.patch_size for patches in c.view_size]
    pixels = torch.randint(0, 256, (images, c.view_count, len(c.mean), *sides), dtype=torch.uint8)
    drawn = [method.draw(seed=0)(SampleKey(0, number, 0, number)) for number in range(images)]
    inputs = {"pixels": pixels} | {name: torch.stack([each[name] for each in drawn]) for name in drawn[0]}
    if side := tokenised_px(c):
        inputs["tokenised"] = torch.randint(0, 256, (images, len(c.mean), side, side), dtype=torch.uint8)
    return inputs


def tokenised_px(c: Composition) -> int:
    """Side in pixels of the picture that a tokenizer sees; 0 where there is none."""
    return STRIDE * c.grid[0] if c.target == "tokens" else 0


def _real(
    place: Place,
    images: int,
    c: Composition,
    method: MaskedReconstruction,
    data: str,
    crop_scale: tuple[float, float],
    color_jitter: float,
    workers: int,
) -> Iterator[Inputs]:
    """Batches of files, on the device; read as 8-bit colour."""
    fabric = place.fabric
    batches = pretraining_batches(
        open_source(data),
        PixelFormat(len(c.mean), "uint8"),
        method.draw(seed=0),
        plan=CropPlan(c.image_size, tuple(crop_scale), color_jitter, tokenised_px(c)),  # type: ignore[arg-type]
        patch_size_px=c.patch_size,
        view_size=c.view_size,
        seed=0,
        batch_size=images * fabric.world_size,
        micro_batch=images,
        first_batch=0,
        total_batches=_MANY,
        workers=workers,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        pin_memory=place.device.type == "cuda",
    )
    return (batch.inputs for batch in on_device(batches, place.device))
