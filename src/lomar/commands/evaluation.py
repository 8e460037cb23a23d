"""What a run shows of itself now and then: k-NN or effective rank, reconstructions, curves."""

from collections.abc import Iterable
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor

from lomar.commands.crops import picture_of_crops
from lomar.commands.panels import caption, central_crops, panels, tokenised_crops
from lomar.data.decode import PixelFormat
from lomar.data.labels import LabelledData, evaluation_split
from lomar.data.loader import centre_crops, share_of
from lomar.data.sources import ImageSource
from lomar.data.survey import spread
from lomar.downstream.features import Wanted, frozen_features
from lomar.downstream.knn import effective_rank, knn_top1
from lomar.errors import UserError
from lomar.figures.crops import CROPS_FILE
from lomar.figures.curves import learning_curves
from lomar.figures.png import save_png
from lomar.figures.reconstruction import figure7
from lomar.methods.reconstruction import MaskedReconstruction
from lomar.methods.two_view import TwoView
from lomar.model.encoder import crop_pct
from lomar.options import PretrainOptions
from lomar.training.processes import gathered
from lomar.training.records import Metrics, Row

TOKENS_AT_ONCE = 64 * 196  # of an evaluation batch: attention grows with their square
RANKED_IMAGES = {"cpu": 512, "cuda": 2048}  # for the effective rank
K_NN_IMAGES = {"cpu": (4000, 2000), "cuda": (10_000, 5_000)}  # most images with known labels, most to be told
PROBED_IMAGES = 16  # of --eval-data, before the run is made
PICTURED_IMAGES = 6
CACHED_BYTES = 2**30  # decoded evaluation images are kept up to this size


def evaluation_data(options: PretrainOptions, fmt: PixelFormat, device: str) -> LabelledData | None:
    """The labelled images of --eval-data; None if they have fewer than two classes.

    Args:
        options: of the run.
        fmt: what the pixels become.
        device: "cpu" or "cuda"; a GPU can afford more images.

    Raises:
        UserError: nothing there, or none of it can be read.
    """
    if options.eval_data is None:
        return None
    split = evaluation_split(options.eval_data, options.seed, *K_NN_IMAGES[device])
    for part in (split.train, split.val) if split else ():
        probed = part.source.subset(spread(len(part), PROBED_IMAGES))
        if not any(good.any() for _, good in centre_crops(probed, fmt, options.image_size, workers=0)):
            raise UserError(
                f"--eval-data {options.eval_data}: none of {len(probed)} files can be read as {fmt.channels} channels "
                f"of {fmt.dtype}, for example {probed.name(0)}"
            )
    return split


class Evaluation:
    """Called with a step; returns named numbers and leaves pictures in the run.

    `knn_top1` (share of 0 to 1) where --eval-data has labels, else `effective_rank` over training images.

    Args:
        fabric: device and precision.
        method: what is trained; its encoder is evaluated.
        source: the training images.
        labelled: what `evaluation_data` found.
        fmt: what all pixels become.
        options: of the run.
        run: the run's folder.
    """

    def __init__(
        self,
        fabric: Fabric,
        method: MaskedReconstruction | TwoView,
        source: ImageSource,
        labelled: LabelledData | None,
        fmt: PixelFormat,
        options: PretrainOptions,
        run: Path,
    ) -> None:
        self.fabric = fabric
        self.method = method
        self.fmt = fmt
        self.options = options
        self.run = run
        self.labelled = labelled
        self.unlabelled = source.subset(spread(len(source), RANKED_IMAGES[fabric.device.type]))
        self.source = source
        self.pictured = source.subset(spread(len(source), PICTURED_IMAGES))
        self._cache: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, step: int) -> Row:
        """Named numbers at a step, of the first process; the others make features for it."""
        with self.fabric.autocast():
            numbers = self._numbers()
            if not self.fabric.is_global_zero:
                return {}
            self._pictures(step)
        rows = Metrics.read(self.run / "metrics.jsonl")
        if rows:
            learning_curves(rows, self.run / "figures" / "curves.png")
        return numbers

    def _numbers(self) -> Row:
        if self.labelled is None:
            features, good = self._features("unlabelled", self.unlabelled)
            if not (good.any() and self.fabric.is_global_zero):
                return {}
            return {"effective_rank": round(effective_rank(features[good]), 3)}
        bank, bank_good = self._features("bank", self.labelled.train.source)
        queries, queries_good = self._features("queries", self.labelled.val.source)
        bank_labels = torch.from_numpy(self.labelled.train.labels)[bank_good]
        query_labels = torch.from_numpy(self.labelled.val.labels)[queries_good]
        if not (bank_good.any() and queries_good.any() and self.fabric.is_global_zero):
            return {}
        return {"knn_top1": round(knn_top1(bank[bank_good], bank_labels, queries[queries_good], query_labels), 5)}

    def _features(self, name: str, source: ImageSource) -> tuple[Tensor, Tensor]:
        """Pooled features float32 (N, D), and bool (N,): which are of a readable image and finite.

        Each process makes those of its share of the images.
        """
        encoder = self.method.encoder
        share = source.subset(share_of(len(source), self.fabric.global_rank, self.fabric.world_size))
        if len(share):
            crops = self._crops(name, share)
            (features,), good = frozen_features(
                encoder,
                [Wanted("cls" if encoder.global_pool == "token" else "mean")],
                crops,
                self.method.normalise,
                self.fabric.device,
            )
        else:
            features, good = torch.zeros(0, encoder.embed_dim), torch.zeros(0, dtype=torch.bool)
        return gathered(self.fabric, features), gathered(self.fabric, good)

    def _crops(self, name: str, source: ImageSource) -> Iterable[tuple[Tensor, Tensor]]:
        """Pixels and which are good, in batches; few images stay decoded for the next time."""
        size_px = self.options.image_size
        batches = self._cache.get(name)
        if batches is None:
            # Whole images go through the encoder here, so that large ones go a few at a time.
            at_once = max(1, TOKENS_AT_ONCE // (size_px // self.options.patch_size) ** 2)
            share = crop_pct((size_px, size_px))
            fresh = centre_crops(source, self.fmt, size_px, self.options.workers, min(64, at_once), share)
            item_bytes = self.fmt.channels * size_px**2 * torch.empty(0, dtype=getattr(torch, self.fmt.dtype)).itemsize
            if len(source) * item_bytes > CACHED_BYTES:
                return fresh
            batches = self._cache[name] = list(fresh)
        return batches

    def _pictures(self, step: int) -> None:
        if isinstance(self.method, TwoView):
            self._picture_of_crops(self.method)
            return
        pixels, _ = central_crops(self.pictured, self.fmt, self.options.image_size)
        if not len(pixels):
            return  # the few that are drawn can all be bad
        tokenised = tokenised_crops(self.method, self.pictured, self.fmt)
        drawn = panels(self.method, pixels, self.options.seed, tokenised)
        if not drawn:
            return
        about = f"Step {step}, {self.options.mask_ratio:.0%} hidden. "
        picture = figure7(drawn, about + caption(self.method))
        save_png(picture, self.run / "figures" / f"reconstruction-{step:07d}.png")
        save_png(picture, self.run / "figures" / "reconstruction.png")

    def _picture_of_crops(self, method: TwoView) -> None:
        """Once: crops depend on no weights."""
        path = self.run / "figures" / CROPS_FILE
        if path.exists():
            return
        chosen = spread(len(self.source), PICTURED_IMAGES)
        picture = picture_of_crops(method, self.options, self.source, self.fmt, chosen)
        if picture:
            save_png(picture, path)
