"""A step of pretraining as `lomar pretrain` makes it, on synthetic images or through the real pipeline."""

from collections.abc import Callable, Iterator, Mapping
from itertools import count, repeat
from typing import Any

import torch
from torch import Tensor, nn

from lomar.benchmark.place import Place
from lomar.benchmark.yardstick import TimmMAE
from lomar.data.decode import PixelFormat
from lomar.data.loader import Batching, CropPlan, SampleKey, pretraining_batches
from lomar.data.multicrop import MultiCropPlan, multicrop_batches
from lomar.data.opening import open_source
from lomar.methods.composition import Composition, TwoViewComposition, composition_from
from lomar.methods.reconstruction import MaskedReconstruction
from lomar.methods.targets import VisualTokens
from lomar.methods.tokenizer import STRIDE, DiscreteVAE
from lomar.methods.two_view import LARGE_CROPS, TwoView
from lomar.training.memory import keep_freed_memory
from lomar.training.optim import adamw
from lomar.training.step import Paced, Step, on_device

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
    clip_each: bool = False,
    of_timm: bool = False,
    with_tokenizer: bool = True,
    data: str | None = None,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    color_jitter: float = 0.0,
    workers: int = 0,
) -> Callable[[], object]:
    """Forward, backward, clipping and update for the next images, and what else a method does in a step.

    Args:
        place: where.
        images: of a step, in each process; all of them at once.
        composition: of the method, as its `to_dict` gives it.
        clip_grad: largest gradient norm; 0 for none.
        clip_each: whether it is that of each tensor.
        of_timm: measure MAE put together from timm's blocks.
        with_tokenizer: for methods that predict tokens: let one of OpenAI's size, with random weights, give them.
        data: what `open_source` takes; without it one batch of noise lies on the device.
        crop_scale, color_jitter: of the real pipeline, for masked reconstruction; the others' composition has them.
        workers: processes that read images.
    """
    c = composition_from(composition)
    method = c.build()
    paced = method if isinstance(method, TwoView) else None
    if isinstance(method, TwoView):
        method.set_course(_MANY, steps_per_epoch=1.0)
    elif isinstance(method.target, VisualTokens) and isinstance(c, Composition):
        method.target.tokenizer = tokenizer(c) if with_tokenizer else KnownTokens()  # type: ignore[assignment]
    trained = TimmMAE(c) if of_timm and isinstance(c, Composition) else method
    if data:
        batches = _real(place, images, c, method, data, crop_scale, color_jitter, workers)
    else:
        batches = repeat({name: each.to(place.device) for name, each in noise(c, method, images).items()})
    optimizer = adamw(trained, 0.05, (0.9, 0.95))
    update = updating(place, trained, optimizer, images, clip_grad, clip_each, paced)
    return lambda: update(next(batches))


def updating(
    place: Place,
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: int,
    clip_grad: float,
    clip_each: bool = False,
    paced: Paced | None = None,
) -> Callable[[Mapping[str, Tensor]], object]:
    """What turns the inputs of a batch into an update of the weights: the step of the training loop.

    Args:
        place: where.
        method: inputs by name -> sum of losses and how many they are.
        optimizer: over its parameters.
        images: of a step, in each process.
        clip_grad, clip_each, paced: as for `Step`.
    """
    if place.device.type == "cpu":
        keep_freed_memory()  # as the training loop does
    batch_size = images * place.fabric.world_size
    step = Step(place.fabric, method, optimizer, batch_size, clip_grad, place.compiled, clip_each, paced)
    numbers = count(_MANY // 2)  # of a long run, no longer in its beginnings: DINO's prototypes learn

    def update(inputs: Mapping[str, Tensor]) -> None:
        step.begin(next(numbers))
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


def noise(c: Composition | TwoViewComposition, method: MaskedReconstruction | TwoView, images: int) -> Inputs:
    """A batch as the loader makes them, of pixels by chance."""
    drawn = [method.draw(seed=0)(SampleKey(0, number, 0, number)) for number in range(images)]
    pictures = {
        name: torch.randint(0, 256, (images, *shape), dtype=torch.uint8) for name, shape in _pictures(c).items()
    }
    return pictures | {name: torch.stack([each[name] for each in drawn]) for name in drawn[0]}


def _pictures(c: Composition | TwoViewComposition) -> dict[str, tuple[int, ...]]:
    """The pixels that a method takes of an image: name -> shape."""
    channels = len(c.mean)
    if isinstance(c, TwoViewComposition):
        shapes: dict[str, tuple[int, ...]] = {"crops": (LARGE_CROPS, channels, c.image_size, c.image_size)}
        small = (c.local_crops, channels, c.local_size, c.local_size)
        return shapes | ({"local_crops": small} if c.local_crops else {})
    rows, columns = c.view_size
    shapes = {"pixels": (c.view_count, channels, rows * c.patch_size, columns * c.patch_size)}
    side = tokenised_px(c)
    return shapes | ({"tokenised": (channels, side, side)} if side else {})


def tokenised_px(c: Composition) -> int:
    """Side in pixels of the picture that a tokenizer sees; 0 where there is none."""
    return STRIDE * c.grid[0] if c.target == "tokens" else 0


def _real(
    place: Place,
    images: int,
    c: Composition | TwoViewComposition,
    method: MaskedReconstruction | TwoView,
    data: str,
    crop_scale: tuple[float, float],
    color_jitter: float,
    workers: int,
) -> Iterator[Inputs]:
    """Batches of files, on the device; read as 8-bit colour."""
    fabric = place.fabric
    source, fmt, draw = open_source(data), PixelFormat(len(c.mean), "uint8"), method.draw(seed=0)
    batching = Batching(
        seed=0,
        batch_size=images * fabric.world_size,
        micro_batch=images,
        total_batches=_MANY,
        workers=workers,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        pin_memory=place.device.type == "cuda",
    )
    if isinstance(c, TwoViewComposition) and isinstance(method, TwoView):
        crops = MultiCropPlan(c.image_size, c.crop_scale, c.local_crops, c.local_size, c.local_scale, method.bilinear)
        batches = multicrop_batches(source, fmt, draw, plan=crops, batching=batching)
    else:
        plan = CropPlan(c.image_size, tuple(crop_scale), color_jitter, tokenised_px(c))  # type: ignore[arg-type]
        batches = pretraining_batches(
            source, fmt, draw, plan=plan, patch_size_px=c.patch_size, view_size=c.view_size, batching=batching
        )
    return (batch.inputs for batch in on_device(batches, place.device))
