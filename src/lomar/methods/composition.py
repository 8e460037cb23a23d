"""All that rebuilds a method: plain values, and the parts they name."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from lomar.methods.architectures import Architecture, EncoderDecoder, MaskedEncoder, Stage
from lomar.methods.distortion import Distortion
from lomar.methods.heads import PrototypeHead, batch_normed_mlp
from lomar.methods.masks import BlockwiseMask, KeptMask, Share, UniformMask
from lomar.methods.reconstruction import MaskedReconstruction
from lomar.methods.targets import TARGETS
from lomar.methods.two_view import DINO, LARGE_CROPS, MoCoV3
from lomar.methods.views import LocalWindows, ReleasedWindows, WholeImage
from lomar.model import Encoder
from lomar.model.positions import Grid


@dataclass(frozen=True, kw_only=True)
class EncoderComposition:
    """What all methods have: an encoder, and how pixels become its input.

    Args:
        method: the recipe it came from.
        embed_dim, depth, num_heads, mlp_ratio: of the encoder.
        image_size: crop side, in pixels.
        patch_size: patch side P, in pixels.
        batch_size: global batch size (the released layout of windows depends on it).
        position: one of `lomar.model.transformer.POSITIONS`.
        layer_scale: initial value of layer scale; 0 for none.
        drop_path: probability of skipping the last block's branches.
        mean, std: per channel, in units of 0 to 1.
        scale: pixel value that stands for 1.
    """

    method: str
    embed_dim: int
    depth: int
    num_heads: int
    image_size: int
    patch_size: int
    batch_size: int
    position: str
    layer_scale: float
    drop_path: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float
    mlp_ratio: float = 4.0

    @property
    def grid(self) -> Grid:
        """(rows, columns) of a crop, in patches."""
        side = self.image_size // self.patch_size
        return side, side

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)

    def _encoder_of(self, **particular: Any) -> Encoder:
        return Encoder(
            self.image_size,
            self.patch_size,
            len(self.mean),
            num_classes=0,
            embed_dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            position=self.position,
            init_values=self.layer_scale or None,
            **{"drop_path_rate": self.drop_path} | particular,
        )


@dataclass(frozen=True, kw_only=True)
class Composition(EncoderComposition):
    """One choice for each part of masked reconstruction; saved beside the weights.

    Args:
        window_size: window side K, in patches; 0 is the whole image.
        views: windows per image V.
        window_layout: "independent" or "released".
        mask: "uniform", "uniform-kept" or "blockwise".
        mask_ratio: share of a view's patches that are hidden.
        mask_min_block: smallest block of a blockwise mask, in patches.
        architecture: "masked-encoder" or "encoder-decoder".
        mask_layer: block before which mask tokens enter a masked encoder.
        decoder_width, decoder_depth, decoder_heads: of an encoder-decoder.
        transformer: "vit", or "beit": no key bias, and BEiT's initialisation.
        target: a name in `lomar.methods.targets.TARGETS`.
        vocab: size of the tokenizer's codebook; 0 where the target is no tokens.
        predict_share: share of a view's hidden patches that are predicted.
        predict_choice: which they are, a name in `lomar.methods.masks.CHOICES`.
    """

    window_size: int
    views: int
    window_layout: str
    mask: str
    mask_ratio: float
    mask_min_block: int
    architecture: str
    mask_layer: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    transformer: str
    target: str
    vocab: int
    predict_share: float = 1.0
    predict_choice: str = "furthest"

    @property
    def view_size(self) -> Grid:
        """(rows, columns) of a view, in patches."""
        return self._views().size

    @property
    def view_count(self) -> int:
        """Views of an image."""
        return self._views().count

    @property
    def hidden(self) -> int:
        """Hidden patches of a view; the most of them where views differ."""
        return self._mask(self.view_size).count

    @property
    def predicted(self) -> int:
        """Of them those that are predicted; at least one."""
        return max(1, round(self.hidden * self.predict_share))

    @property
    def latent_width(self) -> int:
        """Width of what the head gets."""
        return self.decoder_width if self.architecture == "encoder-decoder" else self.embed_dim

    @property
    def outputs(self) -> int:
        """Outputs of the head for a patch."""
        return TARGETS[self.target](self.vocab).width(self.patch_size**2 * len(self.mean))

    def build(self) -> MaskedReconstruction:
        """The method with fresh weights; visual tokens still need their tokenizer.

        Raises:
            ValueError: the parts do not fit together.
        """
        views = self._views()
        return MaskedReconstruction(
            views,
            self._mask(views.size),
            self._architecture(views.size),
            TARGETS[self.target](self.vocab),
            self.patch_size,
            self.mean,
            self.std,
            self.scale,
            None if self.predicted == self.hidden else Share(views.size, self.predicted, self.predict_choice),
        )

    def encoder(self) -> Encoder:
        """A fresh encoder without classifier."""
        return self._encoder(self._views().size)

    def with_mask_ratio(self, method: MaskedReconstruction, ratio: float) -> MaskedReconstruction:
        """The method's weights under a mask of the same kind with another ratio.

        Raises:
            ValueError: it would hide nothing, or all.
        """
        return method.with_mask(self._mask(method.views.size, ratio))

    def stages(self) -> list[Stage]:
        """The tokens of an image, all views and the cls token of each counted, through the blocks."""
        method = self.build()
        return [stage._replace(tokens=stage.tokens * method.views.count) for stage in method.stages()]

    def _views(self) -> LocalWindows:
        if not self.window_size:
            return WholeImage(self.grid)
        if self.window_layout == "released":
            return ReleasedWindows(self.grid, self.window_size, self.views, self.batch_size)
        return LocalWindows(self.grid, self.window_size, self.views)

    def _mask(self, size: Grid, ratio: float | None = None) -> UniformMask | BlockwiseMask:
        ratio = ratio or self.mask_ratio
        if self.mask == "blockwise":
            return BlockwiseMask(size, ratio, self.mask_min_block)
        return {"uniform": UniformMask, "uniform-kept": KeptMask}[self.mask](size[0] * size[1], ratio)

    def _architecture(self, size: Grid) -> Architecture:
        encoder = self._encoder(size)
        if self.architecture == "masked-encoder":
            return MaskedEncoder(encoder, self.mask_layer)
        decoder = self.decoder_width, self.decoder_depth, self.decoder_heads
        return {"encoder-decoder": EncoderDecoder}[self.architecture](encoder, self.grid, size, *decoder)

    def _encoder(self, size: Grid) -> Encoder:
        beit = {"vit": False, "beit": True}[self.transformer]
        return self._encoder_of(bias_grid=size, key_bias=not beit, weight_init="beit" if beit else "xavier")


@dataclass(frozen=True, kw_only=True)
class TwoViewComposition(EncoderComposition):
    """One choice for each part of a method that compares views.

    Args:
        objective: "dino" or "mocov3".
        patch_embed: "learned", or "frozen" at its initial weights.
        crop_scale: smallest and largest share of an image's area that a large crop takes.
        local_crops: small crops of an image; 0 for MoCo v3.
        local_size: their side, in pixels.
        local_scale: as `crop_scale`, of them.
        color_jitter, grayscale, solarize: see `lomar.methods.distortion.Distortion`; solarize is of the second crop.
        blur: share of blurred ones among first, second and small crops.
        head_width: of the layers within a head.
        head_outputs: what a head gives: prototypes, or the width of queries and keys.
        momentum: of the teacher or momentum encoder, at the beginning.
        temperature: of the student, or of the contrast.
        teacher_temperature: DINO's teacher's, at the beginning and the end of its warm-up.
        teacher_temperature_epochs: passes over the images that it lasts.
        freeze_last_layer: passes over the images that DINO's prototypes are frozen for.
        norm_last_layer: "yes" where they keep unit length, "no" where each learns its own.
    """

    objective: str
    patch_embed: str
    crop_scale: tuple[float, float]
    local_crops: int = 0
    local_size: int = 0
    local_scale: tuple[float, float] = (0.0, 0.0)
    color_jitter: float
    grayscale: float
    blur: tuple[float, float, float]
    solarize: float
    head_width: int
    head_outputs: int
    momentum: float
    temperature: float
    teacher_temperature: tuple[float, float] = (1.0, 1.0)
    teacher_temperature_epochs: float = 0.0
    freeze_last_layer: float = 0.0
    norm_last_layer: str = "yes"

    @property
    def view_size(self) -> Grid:
        """(rows, columns) of a large crop, in patches."""
        return self.grid

    @property
    def view_count(self) -> int:
        """Crops of an image."""
        return LARGE_CROPS + self.local_crops

    @property
    def local_grid(self) -> Grid:
        """(rows, columns) of a small crop, in patches."""
        side = self.local_size // self.patch_size
        return side, side

    def build(self) -> DINO | MoCoV3:
        """The method with fresh weights."""
        common: dict[str, Any] = {
            "encoder": self.encoder(),
            "teacher_encoder": self._encoder_of(**self._kind(), drop_path_rate=0.0),
            "distortions": self._distortions(),
            "mean": self.mean,
            "std": self.std,
            "scale": self.scale,
            "momentum": self.momentum,
            "temperature": self.temperature,
        }
        width, outputs = self.head_width, self.head_outputs
        if self.objective == "mocov3":
            projector = batch_normed_mlp(self.embed_dim, width, outputs, layers=3)
            return MoCoV3(**common, head=projector, predictor=batch_normed_mlp(outputs, width, outputs, layers=2))
        unit_length = {"yes": True, "no": False}[self.norm_last_layer]
        return DINO(
            **common,
            head=PrototypeHead(self.embed_dim, width, outputs, unit_length=unit_length),
            teacher_temperature=self.teacher_temperature,
            temperature_epochs=self.teacher_temperature_epochs,
            frozen_epochs=self.freeze_last_layer,
        )

    def encoder(self) -> Encoder:
        """A fresh encoder without classifier."""
        encoder = self._encoder_of(**self._kind())
        encoder.patch_embed.requires_grad_({"learned": True, "frozen": False}[self.patch_embed])
        return encoder

    def _kind(self) -> dict[str, str]:
        return {"weight_init": self.objective, "global_pool": "token"}

    def _distortions(self) -> tuple[Distortion, ...]:
        first, second, small = (
            Distortion(self.color_jitter, self.grayscale, blur, solarize, self.image_size)
            for blur, solarize in zip(self.blur, (0.0, self.solarize, 0.0), strict=True)
        )
        return first, second, *[small] * self.local_crops


def composition_from(values: Mapping[str, Any]) -> Composition | TwoViewComposition:
    """The inverse of `to_dict`, of either kind."""
    if "objective" in values:
        return TwoViewComposition.from_dict(values)
    return Composition.from_dict(values)
