"""Methods that learn by telling two views of an image from others': DINO and MoCo v3.

Crops go through an encoder that learns and through one that follows it as a moving average, and what the first makes
of one crop is to agree with what the second makes of another crop of the same image. No pixel is predicted.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lomar.data.loader import SampleKey
from lomar.methods.distortion import Distortion, distort
from lomar.methods.gathering import rows_of_all, summed
from lomar.methods.heads import PrototypeHead
from lomar.model import Encoder
from lomar.seeding import seeded

LARGE_CROPS = 2  # of an image
CENTRE_MOMENTUM = 0.9
# Of features, below which all images look alike; a healthy run may begin so, and leaves it soon.
LEAST_DEVIATION, COLLAPSED_STEPS = 0.05, 50
LEAST_ENTROPY = 0.01  # of DINO's outputs, from nothing or from that of equal shares, in nats


@dataclass(frozen=True)
class CropChanges:
    """What is random of a sample's crops beside their boxes, fixed by (seed, epoch, index). For the loader's workers.

    Args:
        distortions: of each crop.
        seed: of the run.
        drop_path_blocks: blocks for which drop path needs numbers; 0 where there is no drop path.
    """

    distortions: tuple[Distortion, ...]
    seed: int
    drop_path_blocks: int = 0

    def __call__(self, key: SampleKey) -> dict[str, Tensor]:
        """What `TwoView.forward` takes beside the crops.

        Distortions float32 (V, numbers) of V crops; with drop path, paths (V, blocks, 2) uniform in [0, 1).
        """
        generator = seeded(self.seed, key.epoch, key.index, "distortion")
        drawn = {"distortions": torch.stack([each.draw(generator) for each in self.distortions])}
        if self.drop_path_blocks:
            generator = seeded(self.seed, key.epoch, key.index, "drop path")
            drawn["paths"] = torch.rand(len(self.distortions), self.drop_path_blocks, 2, generator=generator)
        return drawn


class Tower(nn.Module):
    """An encoder and what stands behind it.

    Args:
        encoder: pools by its cls token.
        head: (B, D) -> (B, K).
    """

    def __init__(self, encoder: Encoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def features(self, images: Tensor, paths: Tensor | None = None) -> Tensor:
        """Normalised (R, C, h, w) -> (R, D)."""
        pooled: Tensor = self.encoder(images, paths)
        return pooled

    def features_in_pieces(self, images: Tensor, paths: Tensor | None, at_once: int) -> Tensor:
        """The same, so many images at a time; the backward pass works each piece out again and keeps no other."""
        if at_once >= len(images):
            return self.features(images, paths)
        pieces = zip(images.split(at_once), _split(paths, len(images), at_once), strict=True)
        return torch.cat([checkpoint(self.features, *piece, use_reentrant=False) for piece in pieces])


def _split(paths: Tensor | None, rows: int, at_once: int) -> tuple[Tensor | None, ...]:
    return (None,) * -(-rows // at_once) if paths is None else paths.split(at_once)


class Numbers(NamedTuple):
    """What tells a collapse, summed over rows.

    Args:
        rows: how many.
        total, squares: of features of unit length and of their squares (D,).
        entropy: of what a crop is compared with, in nats.
    """

    rows: Tensor
    total: Tensor
    squares: Tensor
    entropy: Tensor

    @classmethod
    def of(cls, features: Tensor, entropy: Tensor) -> "Numbers":
        """Of a batch.

        Args:
            features: (R, D).
            entropy: of as many, in any shape.
        """
        unit = nn.functional.normalize(features.detach().float())
        rows = torch.full((), len(unit), dtype=torch.float32, device=unit.device)
        return cls(rows, unit.sum(dim=0), unit.square().sum(dim=0), entropy.detach().float().mean() * rows)

    def report(self) -> dict[str, Tensor]:
        """`feature_deviation`: 0 where all images have one feature, 1 where each channel varies as much as it can;
        `output_entropy`, the mean."""
        parts = [each.flatten() for each in self]
        rows, total, squares, entropy = summed(torch.cat(parts)).split([len(part) for part in parts])
        variance = (squares / rows - (total / rows).square()).clamp(min=0)
        return {
            "feature_deviation": variance.sqrt().mean() * math.sqrt(len(total)),
            "output_entropy": (entropy / rows).squeeze(),
        }


class TwoView(nn.Module):
    """What the two methods share: crops changed on the device, a tower that learns, and one that follows it.

    A step is `begin`, `forward` of one or more micro-batches with backward passes, `before_update`, the optimiser's
    update, `after_update`.

    Args:
        encoder: of the student, which learns; cls token pooled.
        teacher_encoder: of the teacher, which follows and is not trained; without drop path. Its weights become the
            student's.
        head: (B, D) -> (B, K), what stands behind the student's encoder; the teacher gets a copy.
        distortions: of each crop, large ones first.
        mean, std: per channel, in units of 0 to 1.
        scale: pixel value that stands for 1; 1 of float images, which have no white.
        momentum: of the following at the beginning; it rises to 1 along half a cosine.
    """

    mean: Tensor
    std: Tensor
    whole_share = False  # whether a process's share of a batch must come as one micro-batch
    bilinear = False  # whether crops are resized with the bilinear filter, and not with the bicubic one

    def __init__(
        self,
        encoder: Encoder,
        teacher_encoder: Encoder,
        head: nn.Module,
        distortions: tuple[Distortion, ...],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        scale: float,
        momentum: float,
    ) -> None:
        super().__init__()
        teacher_encoder.load_state_dict(encoder.state_dict())
        self.student = Tower(encoder, head)
        self.teacher = Tower(teacher_encoder, copy.deepcopy(head)).requires_grad_(False)
        self.distortions = distortions
        self.scale = scale
        self.momentum = momentum
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.at_once = 0  # images that go through the encoder at a time; 0 is all
        self.step, self.total_steps, self.steps_per_epoch = 0, 1, 1.0
        self._numbers: Numbers | None = None
        self._alike_steps, self._watched_step = 0, -1.0

    @property
    def encoder(self) -> Encoder:
        """What a run gives away."""
        return self.student.encoder

    def set_course(self, total_steps: int, steps_per_epoch: float) -> None:
        """How long the run is, which momenta and temperatures depend on."""
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch

    def begin(self, step: int) -> None:
        """Called before the forward passes of the update that follows `step` updates."""
        self.step = step

    def before_update(self) -> None:
        """Called when all gradients of a step are there."""

    def after_update(self) -> dict[str, Tensor]:
        """Called when the weights are updated; named numbers of the step, of all processes."""
        assert self._numbers is not None
        numbers, self._numbers = self._numbers.report(), None
        return numbers

    def trouble(self, numbers: Mapping[str, float]) -> str:
        """What is wrong, if the numbers of the last steps tell of a collapse; "" if not."""
        deviation, entropy = numbers["feature_deviation"], numbers["output_entropy"]
        goes_on = numbers["step"] == self._watched_step + 1
        alike = deviation < LEAST_DEVIATION or self.is_empty(entropy)
        self._alike_steps = (self._alike_steps * goes_on + 1) if alike else 0
        self._watched_step = numbers["step"]
        if self._alike_steps < COLLAPSED_STEPS or numbers["step"] < self.steps_per_epoch:
            return ""
        return (
            f"for {self._alike_steps} steps all images have looked nearly alike (deviation of features "
            f"{deviation:.3f} of 1, entropy of outputs {entropy:.3f}): the method has collapsed; "
            "take a lower --base-lr, or a larger --batch-size"
        )

    def is_empty(self, entropy: float) -> bool:
        """Whether outputs of this entropy, in nats, are the same for all images."""
        return False

    def draw(self, seed: int) -> CropChanges:
        """What the loader calls for each sample."""
        drops = self.student.encoder.drop_path_rate > 0
        return CropChanges(self.distortions, seed, len(self.student.encoder.blocks) if drops else 0)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Integer (..., C, h, w) pixels -> the network's input, in the dtype of `mean`."""
        return (pixels.to(self.mean.dtype) / self.scale - self.mean) / self.std

    def seen(self, crops: Tensor, distortions: Tensor) -> Tensor:
        """Crops as the encoder gets them.

        Args:
            crops: integer (B, V, C, h, w).
            distortions: (B, V, numbers).

        Returns:
            float (B * V, C, h, w).
        """
        with torch.autocast(crops.device.type, enabled=False):  # colours are not rounded
            unit = crops.flatten(0, 1).to(self.mean.dtype) / self.scale
            return (distort(unit, distortions.flatten(0, 1), bounded=self.scale != 1) - self.mean) / self.std

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass: less memory, about a third more time."""
        self.student.encoder.set_grad_checkpointing(enable)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """The encoders alone: what is between is little work, and talks to other processes."""
        for tower in (self.student, self.teacher):
            tower.features = torch.compile(tower.features, *args, **kwargs)  # type: ignore[method-assign]

    def accumulate(self, features: Tensor, entropy: Tensor) -> None:
        """Remember what tells a collapse, over the micro-batches of a step."""
        found = Numbers.of(features, entropy)
        self._numbers = found if self._numbers is None else Numbers(*map(torch.add, self._numbers, found))

    @torch.no_grad()
    def ema_update(self, momentum: float) -> None:
        """The teacher's weights, a step nearer to the student's; buffers are its own."""
        theirs = [tensor.detach() for tensor in self.student.parameters()]
        torch._foreach_lerp_(list(self.teacher.parameters()), theirs, 1 - momentum)

    def momentum_at(self, step: int) -> float:
        """Of the following, at the update after `step` others."""
        return 1 - (1 - self.momentum) * (1 + math.cos(math.pi * step / self.total_steps)) / 2


class DINO(TwoView):
    """Self-distillation: what the teacher makes of a large crop, sharpened and centred, is what the student shall make
    of every other crop, among them small ones that the teacher never sees.

    The teacher is what a run gives away.

    Args:
        encoder, teacher_encoder, head, distortions, mean, std, scale, momentum: as for `TwoView`.
        temperature: of the student's softmax.
        teacher_temperature: of the teacher's, at the beginning and at the end of its warm-up.
        temperature_epochs: passes over the images that it rises for, linearly.
        frozen_epochs: passes over the images that the prototypes stay as they are for.

    Source: DINO, section 3.1 and its released code.
    """

    centre: Tensor

    def __init__(
        self,
        encoder: Encoder,
        teacher_encoder: Encoder,
        head: PrototypeHead,
        distortions: tuple[Distortion, ...],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        scale: float,
        momentum: float,
        temperature: float,
        teacher_temperature: tuple[float, float],
        temperature_epochs: float,
        frozen_epochs: float,
    ) -> None:
        super().__init__(encoder, teacher_encoder, head, distortions, mean, std, scale, momentum)
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.temperature_epochs = temperature_epochs
        self.frozen_epochs = frozen_epochs
        self.register_buffer("centre", torch.zeros(1, len(head.prototypes)))
        self._outputs: Tensor | None = None  # of the teacher, summed over the micro-batches of a step
        self._rows = 0

    @property
    def encoder(self) -> Encoder:
        """The teacher's."""
        return self.teacher.encoder

    def forward(
        self, crops: Tensor, distortions: Tensor, local_crops: Tensor | None = None, paths: Tensor | None = None
    ) -> tuple[Tensor, int]:
        """Sum of the images' losses, and how many they are.

        Args:
            crops: integer (B, 2, C, S, S).
            distortions: (B, V, numbers) of V crops, large ones first.
            local_crops: integer (B, V - 2, C, s, s).
            paths: (B, V, depth, 2) uniform numbers that decide for the student's drop path.
        """
        count = len(crops)
        large = self.seen(crops, distortions[:, :LARGE_CROPS])
        with torch.no_grad():
            features = self.teacher.features(large)
            raw = self.teacher.head(features)
        outputs = [self.student.head(self.student.features(large, _of(paths, 0, LARGE_CROPS)))]
        if local_crops is not None:
            small = self.seen(local_crops, distortions[:, LARGE_CROPS:])
            outputs.append(self.student.head(self.student.features(small, _of(paths, LARGE_CROPS, None))))
        student = torch.cat([each.unflatten(0, (count, -1)) for each in outputs], dim=1)
        losses, entropy = self.loss(raw.unflatten(0, (count, -1)), student)
        self._outputs = raw.float().sum(dim=0, keepdim=True) + (0 if self._outputs is None else self._outputs)
        self._rows += len(raw)
        self.accumulate(features, entropy)
        return losses.sum(), count

    def loss(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of an image over pairs of a large crop and another crop, and entropy of the targets.

        In float32, of outputs as the heads gave them.

        Args:
            teacher: (B, 2, K), without gradient.
            student: (B, V, K), large crops first.

        Returns:
            (B,), and (B, 2) in nats.
        """
        targets = ((teacher.float() - self.centre) / self.sharpness).log_softmax(dim=-1)
        predicted = (student.float() / self.temperature).log_softmax(dim=-1)
        with torch.autocast(student.device.type, enabled=False):  # a loss is not rounded
            pairs = -torch.einsum("bik,bvk->biv", targets.exp(), predicted)
        itself = pairs.diagonal(dim1=1, dim2=2).sum(dim=1)
        others = LARGE_CROPS * (student.shape[1] - 1)
        return (pairs.sum(dim=(1, 2)) - itself) / others, -(targets.exp() * targets).sum(dim=-1)

    def is_empty(self, entropy: float) -> bool:
        """One prototype for all images, or all prototypes alike: DINO's two ways to collapse."""
        return entropy < LEAST_ENTROPY or entropy > math.log(self.centre.shape[1]) - LEAST_ENTROPY

    @property
    def sharpness(self) -> float:
        """The teacher's temperature in this step."""
        first, last = self.teacher_temperature
        steps = self.temperature_epochs * self.steps_per_epoch
        return last if self.step >= steps else first + (last - first) * self.step / steps

    def before_update(self) -> None:
        """While they are frozen, the prototypes have no gradient."""
        if self.step < self.frozen_epochs * self.steps_per_epoch:
            head = self.student.head
            assert isinstance(head, PrototypeHead)
            head.freeze()

    def after_update(self) -> dict[str, Tensor]:
        """The teacher follows, and so does the centre the mean of its outputs."""
        self.ema_update(self.momentum_at(self.step))
        assert self._outputs is not None
        rows = summed(torch.full((1, 1), self._rows, dtype=torch.float32, device=self.centre.device))
        self.centre.lerp_(summed(self._outputs) / rows, 1 - CENTRE_MOMENTUM)
        self._outputs, self._rows = None, 0
        return super().after_update()


class MoCoV3(TwoView):
    """Contrast: what the encoder predicts of one crop picks out, among all images of the batch, what the momentum
    encoder makes of the other crop of the same image.

    The encoder that learns is what a run gives away. A batch is compared with itself, and its heads normalise over it,
    so that a process gets its share whole; what goes through the encoder `at_once` bounds the memory.

    Args:
        encoder, teacher_encoder, head, distortions, mean, std, scale, momentum: as for `TwoView`; the teacher is the
            momentum encoder, the head the projector.
        predictor: behind the projector of the encoder that learns, (B, K) -> (B, K).
        temperature: of the softmax over the keys.

    Source: MoCo v3, Algorithm 1 and its released code.
    """

    whole_share = True
    bilinear = True

    def __init__(
        self,
        encoder: Encoder,
        teacher_encoder: Encoder,
        head: nn.Module,
        predictor: nn.Module,
        distortions: tuple[Distortion, ...],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        scale: float,
        momentum: float,
        temperature: float,
    ) -> None:
        super().__init__(encoder, teacher_encoder, head, distortions, mean, std, scale, momentum)
        self.predictor = predictor
        self.temperature = temperature

    def begin(self, step: int) -> None:
        """The momentum encoder follows before it makes keys."""
        super().begin(step)
        self.ema_update(self.momentum_at(step))

    def forward(self, crops: Tensor, distortions: Tensor, paths: Tensor | None = None) -> tuple[Tensor, int]:
        """Sum of the images' losses, and how many they are.

        Args:
            crops: integer (B, 2, C, S, S), the share of the batch that this process has, as large in all of them.
            distortions: (B, 2, numbers).
            paths: (B, 2, depth, 2) uniform numbers that decide for drop path.
        """
        count = len(crops)
        of_images = self.at_once or count
        pieces = zip(crops.split(of_images), distortions.split(of_images), strict=True)
        images = torch.cat([self.seen(*piece) for piece in pieces])
        at_once = LARGE_CROPS * of_images
        features = self.student.features_in_pieces(images, _of(paths, 0, None), at_once)
        with torch.no_grad():
            followed = torch.cat([self.teacher.features(piece) for piece in images.split(at_once)])
        losses, entropies = [], []
        # Batch norm sees the first crops of all images, then the second ones, as in the source.
        first, second = (self.predictor(self.student.head(each)) for each in _views(features, count))
        with torch.no_grad():
            first_key, second_key = (self.teacher.head(each) for each in _views(followed, count))
        for query, key in ((first, second_key), (second, first_key)):
            loss, entropy = self.loss(query, key)
            losses.append(loss)
            entropies.append(entropy)
        self.accumulate(features, torch.cat(entropies))
        return torch.cat(losses).sum(), count

    def loss(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each query over the keys of all processes, times twice the temperature; its entropy.

        In float32, of queries and keys as the heads gave them.

        Args:
            query: (B, K).
            key: (B, K), of the same images.

        Returns:
            (B,), and (B,) in nats.
        """
        keys, first = rows_of_all(nn.functional.normalize(key.float()))
        with torch.autocast(query.device.type, enabled=False):  # a loss is not rounded
            logits = nn.functional.normalize(query.float()) @ keys.T / self.temperature
        own = torch.arange(first, first + len(query), device=logits.device)
        loss = 2 * self.temperature * nn.functional.cross_entropy(logits, own, reduction="none")
        told = logits.detach().log_softmax(dim=1)
        return loss, -(told.exp() * told).sum(dim=1)


def _of(paths: Tensor | None, first: int, last: int | None) -> Tensor | None:
    """(B, V, depth, 2) -> (B * crops, depth, 2) of the crops from `first` to `last`."""
    return None if paths is None else paths[:, first:last].flatten(0, 1)


def _views(rows: Tensor, count: int) -> tuple[Tensor, ...]:
    """(B * 2, D), an image's crops side by side -> those of the first crops and those of the second."""
    return rows.unflatten(0, (count, LARGE_CROPS)).unbind(dim=1)
