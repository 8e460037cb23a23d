"""A classifier made of an encoder: how its weights begin, its loss, and how it is judged."""

import copy
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lomar.downstream.features import undisturbed
from lomar.model import Encoder
from lomar.model.positions import Grid

HEAD_STD = 2e-5  # of a new head on pretrained weights: all classes are almost equally likely at first
TOP = 5


class Classification(nn.Module):
    """Cross-entropy of an encoder with a head against soft targets.

    Args:
        encoder: with `num_classes` outputs.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor, targets: Tensor, paths: Tensor | None = None) -> tuple[Tensor, int]:
        """Sum of the images' losses, and how many they are.

        Args:
            images: normalised (B, C, height, width).
            targets: (B, classes) of sum 1.
            paths: (B, depth, 2) uniform numbers that decide for drop path.
        """
        logits = self.encoder(images, paths)
        return -(targets * logits.float().log_softmax(dim=-1)).sum(), len(images)


def classifier_of(
    encoder: Encoder,
    classes: Sequence[str],
    *,
    size: Grid,
    pool: str = "avg",
    drop_path: float = 0.0,
    pretrained: bool = True,
) -> tuple[Encoder, list[str]]:
    """A classifier that begins with the weights of an encoder, and lines on what was done to them.

    Tables of positions are resized to the image: absolute ones bicubically, BEiT's along a geometric series;
    contextual position needs nothing. A bias that all blocks share becomes one of each block's own, as BEiT fine-tunes;
    sine-cosine positions begin to learn, as MAE's do. The head is new, unless the encoder has one for the same classes.

    Args:
        encoder: what to begin with; left as it is.
        classes: names of the outputs.
        size: (height, width) of the images, in pixels.
        pool: "avg" normalises the mean of the patch tokens (`fc_norm`), "token" takes the cls token after `norm`.
        drop_path: probability of skipping the last block's branches.
        pretrained: whether the weights are worth a head that begins near zero.

    Source: LoMaR's, MAE's and BEiT's fine-tuning.
    """
    notes = []
    had = list((encoder.pretrained_cfg or {}).get("label_names", ()))
    before = encoder.patch_embed.grid_size
    encoder = copy.deepcopy(encoder)
    encoder.set_input_size(size)
    architecture = dict(encoder.architecture)
    state = encoder.state_dict()
    if architecture["position"] == "shared-bias":
        architecture["position"] = "block-bias"
        shared = state.pop("rel_pos_bias.table")
        state |= {f"blocks.{i}.attn.rel_pos_bias.table": shared.clone() for i in range(len(encoder.blocks))}
        notes.append("each block has its own copy of the relative bias that all shared")
    if before != encoder.patch_embed.grid_size and architecture["position"] in ("sincos", "learned", "block-bias"):
        notes.append(
            f"tables of positions were resized from {_by(before)} to {_by(encoder.patch_embed.grid_size)} patches"
        )
    classifier = Encoder(**architecture, num_classes=len(classes), global_pool=pool, drop_path_rate=drop_path)
    keeps_head = had == list(classes) and encoder.global_pool == pool
    if not keeps_head:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        if encoder.num_classes:
            why = f"pools otherwise ({encoder.global_pool})" if had == list(classes) else "is for other classes"
            notes.append(f"the model's head {why}: it was left out")
    own = classifier.state_dict()
    missing, _ = classifier.load_state_dict({n: t for n, t in state.items() if n in own}, strict=False)
    new = [name for name in missing if not name.startswith(("head.", "fc_norm.", "norm."))]
    if new:
        raise ValueError(f"the encoder lacks {', '.join(new)}")
    if "norm.weight" in missing:
        notes.append("the norm before the cls token is new: the model had none")
    if keeps_head:
        notes.append(f"the model's head for these {len(classes)} classes is kept")
    else:
        notes.append(f"the head for {len(classes)} classes is new")
        if pretrained:
            nn.init.trunc_normal_(classifier.head.weight, std=HEAD_STD)  # type: ignore[arg-type]
    if classifier.pos_embed is not None:
        classifier.pos_embed.requires_grad_(True)
    return classifier, notes


def _by(grid: Grid) -> str:
    return f"{grid[0]}x{grid[1]}"


def freeze(classifier: Encoder, blocks: int, head_only: bool) -> None:
    """Let the first blocks, with all that comes before them, or all but the classifier, stay as they are.

    Args:
        classifier: changed in place.
        blocks: how many.
        head_only: train `head`, and the norm right before it where that is new (`fc_norm`), alone.
    """
    trained = ("head.", "fc_norm.")
    for name, parameter in classifier.named_parameters():
        early = name.startswith(("patch_embed.", "cls_token", "pos_embed")) or (
            name.startswith("blocks.") and int(name.split(".")[1]) < blocks
        )
        if (head_only and not name.startswith(trained)) or (blocks and early):
            parameter.requires_grad_(False)


def probabilities(
    classifier: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    normalise: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """What a classifier says, batch by batch: probabilities float32 (B, classes), and good bool (B,), on the CPU.

    Args:
        classifier: images -> logits; on `device`. Its training flags are put back at the end.
        batches: pixels (B, C, H, W), and which of them could be read.
        normalise: pixels on `device` -> the classifier's input.
        device: where it is.
    """
    with undisturbed(classifier, device):
        for pixels, readable in batches:
            with torch.inference_mode():
                logits = classifier(normalise(pixels.to(device))).float()
            finite = logits.isfinite().all(dim=1)
            yield logits.softmax(dim=1).cpu(), readable.cpu().bool() & finite.cpu()


@dataclass(frozen=True)
class Judgement:
    """How a classifier did on labelled images; unreadable ones are left out.

    Args:
        labels: true class of each image, int64 (N,).
        predicted: most probable class, int64 (N,).
        in_top: whether the true class is among the five most probable, bool (N,).
        losses: cross-entropy of each, (N,).
        classes: their number.
        unreadable: images that could not be judged.
    """

    labels: np.ndarray
    predicted: np.ndarray
    in_top: np.ndarray
    losses: np.ndarray
    classes: int
    unreadable: int

    @property
    def top1(self) -> float:
        """Share of images whose most probable class is the true one."""
        return float((self.labels == self.predicted).mean())

    @property
    def top5(self) -> float:
        """Share of images whose true class is among the five most probable."""
        return float(self.in_top.mean())

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return float(self.losses.mean())

    @property
    def counts(self) -> np.ndarray:
        """Images of each class, (classes,)."""
        return np.bincount(self.labels, minlength=self.classes)

    @property
    def per_class(self) -> np.ndarray:
        """Share of each class's images that were recognised, (classes,); NaN of a class without images."""
        hits = np.bincount(self.labels[self.labels == self.predicted], minlength=self.classes)
        with np.errstate(invalid="ignore"):
            return hits / self.counts

    @property
    def balanced(self) -> float:
        """Mean of `per_class` over the classes that have images: each class counts alike."""
        return float(np.nanmean(self.per_class))

    def confusion(self) -> np.ndarray:
        """Images of each true class (row) that were taken for each class (column), int64 (classes, classes)."""
        pairs = np.bincount(self.labels * self.classes + self.predicted, minlength=self.classes**2)
        return pairs.reshape(self.classes, self.classes)

    def mistaken_for(self) -> list[int | None]:
        """For each class the one that its images are most often taken for wrongly; None where that never happens."""
        found: list[int | None] = [None] * self.classes
        wrong = self.labels != self.predicted
        for label in np.unique(self.labels[wrong]):
            found[label] = int(np.bincount(self.predicted[wrong & (self.labels == label)]).argmax())
        return found


def joined_judgement(parts: Sequence[Judgement | None]) -> Judgement | None:
    """The judgement of all images from those of some each; None where no image could be read."""
    some = [part for part in parts if part is not None]
    if not some:
        return None
    names = ("labels", "predicted", "in_top", "losses")
    labels, predicted, in_top, losses = (np.concatenate([getattr(part, name) for part in some]) for name in names)
    unreadable = sum(part.unreadable for part in some)
    return Judgement(labels, predicted, in_top, losses, some[0].classes, unreadable)


def judge(answers: Iterable[tuple[Tensor, Tensor]], labels: np.ndarray, classes: int) -> Judgement | None:
    """How good the answers of `probabilities` are; None if no image could be read.

    Args:
        answers: for the images in order.
        labels: true class of each image, int64 (N,).
        classes: their number.
    """
    told = torch.from_numpy(labels)
    kept: list[tuple[Tensor, ...]] = []
    judged = 0
    for found, good in answers:
        truth = told[judged : judged + len(found)][good]
        judged += len(found)
        found = found[good]
        top = found.topk(min(TOP, classes), dim=1).indices  # (b, 5)
        loss = F.nll_loss(found.clamp_min(torch.finfo(found.dtype).tiny).log(), truth, reduction="none")
        kept.append((truth, top[:, 0], (top == truth[:, None]).any(dim=1), loss))
    truths, predicted, in_top, losses = (torch.cat(each).numpy() for each in zip(*kept, strict=True))
    if not len(truths):
        return None
    return Judgement(truths, predicted, in_top, losses, classes, judged - len(truths))
