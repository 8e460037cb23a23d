"""The two ways to train linear heads on frozen features: the sweep on cached ones, and MAE's on new crops."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lomar.commands.frozen import FrozenEncoder
from lomar.commands.probe_cache import Cached
from lomar.data.labels import Labelled
from lomar.data.loader import Batching, stream
from lomar.data.order import Shuffled
from lomar.data.supervised import Augmentation, training_batches
from lomar.downstream.features import feature_reader
from lomar.downstream.probe import Columns, HeadInput, MaeHead, Standard, Sweep, lars, standard_of, top_hits
from lomar.errors import TrainingError
from lomar.options import ProbeOptions
from lomar.training.records import Row

_ROWS_AT_ONCE = 1024  # of cached features that heads judge
_MAE_CROP_SCALE = (0.08, 1.0)
_IMAGES_AT_ONCE = {"cpu": 64, "cuda": 256}  # of a batch, in one pass of the encoder


class Scores(NamedTuple):
    """How heads do on some images; each is of the shape of the heads.

    Args:
        top1, top5: share of images, 0 to 1; NaN of a head whose loss is not finite.
        loss: cross-entropy.
    """

    top1: Tensor
    top5: Tensor
    loss: Tensor


class Learned(NamedTuple):
    """What one step was like.

    Args:
        loss: cross-entropy of the batch; of the sweep, of the head that does best on it.
        grad_norm: of the gradient; of the sweep, of all heads that have not diverged.
        waited_s: seconds for images.
    """

    loss: float
    grad_norm: float
    waited_s: float


class Learner(Protocol):
    """What trains, step by step; `count` images make an epoch."""

    count: int
    peak_lr: float

    def learn(self, lr: float) -> Learned:
        """One optimiser step at a learning rate."""

    def evaluate(self) -> Row:
        """Numbers for the metrics."""

    def state(self) -> dict[str, Any]:
        """All that goes on from here, beside the number of steps done."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Back to a state.

        Raises:
            KeyError, RuntimeError, ValueError: it is another probe's.
        """

    def close(self) -> None:
        """Let go of what reads images."""


class _Trained:
    """A module and its optimiser."""

    module: nn.Module
    optimizer: torch.optim.Optimizer

    def state(self) -> dict[str, Any]:
        return {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _update(self, loss: Tensor, lr: float) -> float:
        """One step down the gradient of a loss, whose norm comes back."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return self._grad_norm()

    def _grad_norm(self) -> float:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).item()


class SweepProbe(_Trained):
    """Heads of all inputs and rates, on cached features that are standardised by those that heads learn from.

    Standardised as by the batch norm of MAE's probe, but with exact statistics: the features are all there, and so a
    head does not depend on which images share its batches.

    Args:
        options: settled.
        fit: what heads learn from.
        held: by which one is chosen.
        inputs: what they see.
        columns: where that stands in a row.
        classes: outputs.
        device: where to train.
        first_step: steps already done.
    """

    def __init__(
        self,
        options: ProbeOptions,
        fit: Cached,
        held: Cached,
        inputs: Sequence[HeadInput],
        columns: Columns,
        classes: int,
        device: torch.device,
        first_step: int,
    ) -> None:
        self.fit, self.held, self.inputs, self.columns, self.device = fit, held, inputs, columns, device
        whole = standard_of(fit.rows, fit.usable)
        self.standard = Standard(whole.mean.to(device), whole.std.to(device))
        widths = [sum(place.stop - place.start for place in columns.of(each)) for each in inputs]
        self.rates = [rate * options.batch_size / 256 for rate in options.base_lrs]
        self.sweep = Sweep(widths, classes, self.rates, options.seed).to(device)
        self.module, self.optimizer = self.sweep, self.sweep.optimizer()
        self.count = len(fit)
        self.peak_lr = 1.0  # the module has the rates; what is scheduled is the share of them
        order = Shuffled(self.count, options.seed, options.batch_size)  # of features, which are all at hand
        self._batches = stream(order, options.batch_size, first_step)

    def _seen(self, rows: Tensor) -> list[Tensor]:
        """Rows as cached -> what each kind of head sees."""
        standard = self.standard(rows.to(self.device))
        return [self.columns.cut(standard, each) for each in self.inputs]

    def learn(self, lr: float) -> Learned:
        """One step of all heads; `lr` is the share of each one's peak rate."""
        places = torch.tensor([key.index for key in next(self._batches)])
        seen = self._seen(self.fit.rows[self.fit.usable[places]])
        losses = self.sweep.losses(seen, self.fit.labels[places].to(self.device))
        # A head that diverges stays alone with it: heads share no weights, and features have no gradient.
        grad_norm = self._update((losses * self.sweep.rates).sum(), lr)
        return Learned(losses.nan_to_num(torch.inf, torch.inf).min().item(), grad_norm, 0.0)

    def _grad_norm(self) -> float:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]  # (rates, ...) each
        norms = torch.stack([grad.flatten(1).norm(dim=1) for grad in gradients])
        return norms[norms.isfinite()].norm().item()

    def scores(self, cached: Cached) -> Scores:
        """How every head (inputs, rates) does on images."""
        return _scores(cached, lambda rows: self.sweep(self._seen(rows)), self.device)

    def evaluate(self) -> Row:
        """The best of the heads on the images held out.

        Raises:
            TrainingError: all of them have diverged.
        """
        found = self.scores(self.held)
        return {"held_out_top1": round(found.top1[best_head(found)].item(), 6)}

    def close(self) -> None:
        """Nothing is open."""


class MaeProbe(_Trained):
    """MAE's linear probe: new crops of the images go through the frozen encoder in each epoch.

    Args:
        options: settled.
        encoder: frozen.
        fit: the images to learn from.
        val: features of those that judge.
        only: what the head sees.
        classes: outputs.
        first_step: steps already done.
        total_steps: of the whole probe.
        note_bad: told of files that were replaced.
    """

    def __init__(
        self,
        options: ProbeOptions,
        encoder: FrozenEncoder,
        fit: Labelled,
        val: Cached,
        only: HeadInput,
        classes: int,
        first_step: int,
        total_steps: int,
        note_bad: Callable[[Sequence[tuple[str, str]]], None],
    ) -> None:
        self.encoder, self.val, self.only, self.note_bad = encoder, val, only, note_bad
        self.device = encoder.device
        width = val.rows.shape[1]
        self.head = MaeHead(width, classes, options.seed).to(self.device)
        self.module, self.optimizer = self.head, lars(self.head)
        self.count = len(fit)
        self.peak_lr = options.base_lrs[0] * options.batch_size / 256
        self._read = feature_reader(encoder.model, only.parts)
        self._batches = training_batches(
            fit,
            encoder.fmt,
            Augmentation(encoder.input.size, _MAE_CROP_SCALE, classes, clamped=True),
            encoder.input.normalise,
            depth=0,
            batching=Batching(
                seed=options.seed,
                batch_size=options.batch_size,
                micro_batch=_IMAGES_AT_ONCE[encoder.hardware.device],
                total_batches=total_steps,
                first_batch=first_step,
                workers=encoder.workers,
                pin_memory=encoder.hardware.device == "cuda",
            ),
        )

    def learn(self, lr: float) -> Learned:
        """One step: the encoder takes a part of the batch at a time, the head all of it."""
        features, targets, waited_s, last = [], [], 0.0, False
        while not last:
            asked = time.monotonic()
            batch = next(self._batches)
            waited_s += time.monotonic() - asked
            last = batch.last
            self.note_bad(batch.bad)
            with torch.inference_mode(), self.encoder.autocast():
                images = batch.inputs["images"].to(self.device, non_blocking=True)
                features.append(torch.cat([part.float() for part in self._read(images)], dim=1))
            targets.append(batch.inputs["targets"])
        # Copied out of inference mode, so that the head can be trained on them.
        logits = self.head.train()(torch.cat(features).clone())
        loss = F.cross_entropy(logits, torch.cat(targets).to(self.device))
        return Learned(loss.item(), self._update(loss, lr), waited_s)

    def scores(self, cached: Cached) -> Scores:
        """How the head does on images."""
        self.head.eval()
        return _scores(cached, lambda rows: self.head(rows.to(self.device).float()), self.device)

    def evaluate(self) -> Row:
        """How it does on the images that judge.

        Raises:
            TrainingError: it has diverged.
        """
        found = self.scores(self.val)
        best_head(found)
        return {"val_top1": round(found.top1.item(), 6), "val_loss": round(found.loss.item(), 6)}

    def close(self) -> None:
        """End the loading processes."""
        self._batches.close()


def _scores(cached: Cached, logits_of: Callable[[Tensor], Tensor], device: torch.device) -> Scores:
    sums: list[Any] = [0.0, 0.0, 0.0]
    with torch.no_grad():
        for places in torch.arange(len(cached)).split(_ROWS_AT_ONCE):
            logits = logits_of(cached.rows[cached.usable[places]])  # (..., B, classes)
            labels = cached.labels[places].to(device)
            top1, top5 = top_hits(logits, labels)
            wanted = labels.expand(logits.shape[:-1])
            loss = F.cross_entropy(logits.flatten(0, -2), wanted.flatten(), reduction="none").view(wanted.shape).sum(-1)
            for place, part in enumerate((top1, top5, loss)):
                sums[place] = sums[place] + part.double()
    top1, top5, loss = ((each / len(cached)).cpu() for each in sums)
    # Without this, logits that are no numbers would count as class 0.
    known = loss.isfinite()
    return Scores(top1.where(known, torch.nan), top5.where(known, torch.nan), loss)


def best_head(scores: Scores) -> tuple[int, ...]:
    """The place of the head with the largest top-1 accuracy, among equals of the one with the lowest loss.

    Heads whose loss is not finite are left out.

    Raises:
        TrainingError: all are.
    """
    heads = scores.loss.isfinite().nonzero().tolist()
    if not heads:
        raise TrainingError("no classifier has a finite loss on the images that judge; smaller --base-lrs may help")
    return max(map(tuple, heads), key=lambda head: (scores.top1[head].item(), -scores.loss[head].item()))
