"""The files that LoMaR, MAE, BEiT, DINO and MoCo v3 released: recognised, read into our modules, and written again.

No table of sizes: every dimension is read off a tensor. Nothing but tensors and plain values is unpickled.
"""

import argparse
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from lomar.errors import UserError
from lomar.methods.architectures import EncoderDecoder
from lomar.methods.composition import Composition
from lomar.methods.recipes import IMAGENET_MEAN, IMAGENET_STD, RECIPES, compose
from lomar.methods.reconstruction import MaskedReconstruction
from lomar.methods.targets import VisualTokens
from lomar.model import Encoder
from lomar.model.positions import RelativeBias, grid_coordinates, relative_index, sincos_table

SUFFIXES = {".pth", ".pt", ".bin", ".pkl", ".ckpt", ".tar"}


@dataclass(frozen=True)
class Family:
    """One project's files.

    Args:
        name: of the project.
        recipe: our name of its pretraining; "" where its files are read for their encoder alone.
        mark: part of a key that tells its files from the others'; what tells those apart that share it is `_owner`.
        predictor: its name of the last layer in pretraining; "" as above.
        positions: kinds of position its encoders have, in our words.
        weight_init: how its encoders begin, in our words.
    """

    name: str
    recipe: str
    mark: str
    predictor: str
    positions: tuple[str, ...]
    weight_init: str = "xavier"


LOMAR = Family("LoMaR", "lomar", "rpe_k.lookup_table_weight", "encoder_pred", ("contextual",))
MAE = Family("MAE", "mae", "pos_embed", "decoder_pred", ("sincos",))
BEIT = Family("BEiT", "beit", "relative_position_bias_table", "lm_head", ("shared-bias", "block-bias"), "beit")
DINO = Family("DINO", "", MAE.mark, "", ("learned",), "dino")
MOCO = Family("MoCo v3", "", MAE.mark, "", ("sincos",), "mocov3")  # after MAE, whose names it has
FAMILIES = (LOMAR, MAE, BEIT, DINO, MOCO)

# What tensors may be under; DINO's student stands beside its teacher, whose features are the better ones.
_HOLDERS = ("model", "module", "teacher", "state_dict")
# What an encoder's names begin with where a file holds more networks than that: DINO, MoCo v3.
_ENCODERS = ("backbone.", "base_encoder.")
# A table nearer than this to one of sines and cosines, over its norm, began as that and was moved by fine-tuning; one
# that has nothing to do with it is 1 away or more.
_NEAR = 0.5
# Width of the released heads where it is not 64, by the width of a token.
_HEAD_WIDTHS = {(MAE, 1280): 80, (MOCO, 1280): 80, (MOCO, 384): 32}

# Parts of names in an encoder: ours, theirs. The first that occurs counts.
_PARTS = (
    ("attn.rpe.table", "attn.rpe_k.lookup_table_weight"),
    ("attn.rel_pos_bias.table", "attn.relative_position_bias_table"),
    ("rel_pos_bias.table", "rel_pos_bias.relative_position_bias_table"),
    (".ls1.gamma", ".gamma_1"),
    (".ls2.gamma", ".gamma_2"),
)
# Beginnings of names in a whole method, beside the predictor's: ours, theirs.
_BEGINNINGS = (
    ("architecture.encoder.", ""),
    ("architecture.mask_token", "mask_token"),
    ("architecture.decoder_embed.", "decoder_embed."),
    ("architecture.decoder.pos_embed", "decoder_pos_embed"),
    ("architecture.decoder.blocks.", "decoder_blocks."),
    ("architecture.decoder.norm.", "decoder_norm."),
)
# What checkpoints hold beside tensors: the options of their run, and numbers of NumPy before and since its version 2.
_SCALAR = np.float64(0).__reduce__()[0]
_PLAIN: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float32", "float64", "int64")),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


@dataclass(frozen=True)
class Official:
    """What a released file became.

    Args:
        kind: what it is, in words.
        encoder: with its classifier, where it was fine-tuned.
        method: the whole of pretraining, whose encoder is `encoder`; None where an encoder is all that is read.
        composition: the method's, or None.
        mean, std: of each channel of its pixels.
        dropped: names of what else the file holds.
        notes: what the file does not tell, and what was assumed.
        scale: pixel value that stands for 1.
    """

    kind: str
    encoder: Encoder
    method: MaskedReconstruction | None
    composition: Composition | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dropped: list[str]
    notes: list[str]
    scale: float = 255.0


def is_torch_file(path: Path) -> bool:
    """Whether `path` is what `torch.save` writes, by its ending or else its first bytes."""
    if path.suffix in SUFFIXES or path.suffix == ".safetensors" or not path.is_file():
        return path.suffix in SUFFIXES
    with path.open("rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"\x80\x02\x8a\x0a")


def read_official(
    path: str | Path, heads: int | None = None, decoder_heads: int | None = None, target: str | None = None
) -> Official:
    """A released checkpoint, or one of the released code's runs, as our modules in float32.

    Args:
        path: the file.
        heads: attention heads; MAE's, DINO's and MoCo v3's tensors do not tell, and others than the released ones must
            be given.
        decoder_heads: likewise, of MAE's decoder.
        target: "normalised-pixels" or "pixels", what LoMaR or MAE predicted, if the file does not say.

    Raises:
        UserError: the file is damaged, holds more than tensors and plain values, or is no whole checkpoint of one of
            `FAMILIES`; the line names the key that decides.
    """
    file = _recognise(Path(path))
    file.check_asked(decoder_heads, target)
    made = file.architecture(heads)
    mean, std = file.statistics(made["in_chans"])
    try:
        composition = file.composition(made, mean, std, decoder_heads, target) if file.whole else None
        method = None if composition is None else composition.build()
        encoder = file.encoder(made) if method is None else method.architecture.encoder
    except ValueError as error:
        file.fail(f"its sizes do not fit together: {error}")
    module = encoder if method is None else method
    file.fill(module)
    module.eval()
    dropped = [*filter(file.is_derived, file.state), *file.others]
    return Official(file.kind, encoder, method, composition, mean, std, dropped, file.notes)


def official_state(module: Encoder | MaskedReconstruction) -> dict[str, Tensor]:
    """Weights under the names that the released code reads: the inverse of `read_official`.

    A method that is not wholly its family's (LoMaR and MAE predict pixels, BEiT tokens; MAE has a decoder) gives its
    encoder alone, which is all that fine-tuning takes. MoCo v3 has MAE's names.

    Raises:
        UserError: no released code has such an encoder.
    """
    encoder = module if isinstance(module, Encoder) else module.architecture.encoder
    family = family_of(encoder)
    whole = isinstance(module, MaskedReconstruction) and (
        bool(family.recipe)
        and isinstance(module.architecture, EncoderDecoder) == (family is MAE)
        and isinstance(module.target, VisualTokens) == (family is BEIT)
    )
    ours = (module if whole else encoder).state_dict()
    state = {_released_name(name, family, whole): tensor for name, tensor in ours.items()}
    if family is LOMAR:
        state = {name: tensor[None] if LOMAR.mark in name else tensor for name, tensor in state.items()}
        if not encoder.num_classes and encoder.embed_dim % 4 == 0:
            state["pos_embed"] = sincos_table(encoder.grid, encoder.embed_dim)  # never read, but its place is kept
    for name, part in encoder.named_modules():
        if isinstance(part, RelativeBias):
            table = _released_name(f"{name}.table", family, whole=False)
            index = relative_index(grid_coordinates(*part.grid)[None], part.grid)[0]
            state[table.replace("bias_table", "index")] = index
    return state


def from_beits_names(state: Mapping[str, Tensor], encoder: Encoder) -> dict[str, Tensor]:
    """An encoder's weights under our names, from those that `official_state` gives a BEiT.

    Args:
        state: name -> tensor, without `relative_position_index`; what is no name of BEiT's is kept as it is.
        encoder: whose state it is to become.
    """
    ours = {_released_name(name, BEIT, whole=False): name for name in encoder.state_dict()}
    return {ours.get(name, name): tensor for name, tensor in state.items()}


def family_of(encoder: Encoder) -> Family:
    """Whose code has such an encoder.

    Raises:
        UserError: nobody's.
    """
    made = encoder.architecture
    family = next((family for family in FAMILIES if made["position"] in family.positions), None)
    if family is None:
        raise UserError(f"no released code has position {made['position']!r}; LoMaR, MAE, BEiT and DINO have others")
    if made["key_bias"] != (family is not BEIT) or (made["init_values"] and family is not BEIT):
        raise UserError(
            f"{family.name}'s code has {made['position']} position in a transformer that "
            f"{'has no key bias' if family is BEIT else 'has a key bias and no layer scale'}, unlike this one"
        )
    if encoder.grid[0] != encoder.grid[1]:
        raise UserError(f"the released code takes square images alone, not {'x'.join(map(str, encoder.grid))} patches")
    return family


def _released_name(name: str, family: Family, whole: bool) -> str:
    """Our name of a tensor -> theirs.

    Args:
        name: in a state dict of ours.
        family: whose name is wanted.
        whole: whether the state dict is a method's, or an encoder's.
    """
    beginnings = (("head.", f"{family.predictor}."), *_BEGINNINGS) if whole else ()
    ours, theirs = next((pair for pair in beginnings if name.startswith(pair[0])), ("", ""))
    name = theirs + name.removeprefix(ours)
    ours, theirs = next((pair for pair in _PARTS if pair[0] in name), ("", ""))
    return name.replace(ours, theirs) if ours else name


@dataclass
class _File:
    """A checkpoint whose family is known.

    Args:
        path: where it is.
        family: whose it is.
        state: name -> tensor.
        others: names of what else it holds.
        arguments: options of the run that wrote it, where they are there.
        notes: what had to be assumed, filled on the way.
    """

    path: Path
    family: Family
    state: dict[str, Tensor]
    others: list[str]
    arguments: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether it holds all of pretraining."""
        return "mask_token" in self.state or f"{self.family.predictor}.weight" in self.state

    @property
    def classes(self) -> int:
        """Outputs of its classifier, or 0."""
        return self.shape("head.weight", 2)[0] if "head.weight" in self.state else 0

    @property
    def kind(self) -> str:
        """What it is, in words."""
        stage = "pretrained" if self.whole else "fine-tuned" if "head.weight" in self.state else "an encoder alone"
        return f"{self.family.name}, {stage}"

    def fail(self, text: str) -> NoReturn:
        """Refuse the file."""
        raise UserError(f"{self.path} looks like {self.kind}, but {text}")

    def is_derived(self, name: str) -> bool:
        """Whether nothing is lost without a tensor: indices follow from the grid, LoMaR's positions are never read."""
        return name.endswith("relative_position_index") or (self.family is LOMAR and name == "pos_embed")

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """Of a tensor that must be there."""
        if name not in self.state:
            self.fail(f"it has no {name}")
        shape = tuple(self.state[name].shape)
        if len(shape) != dimensions or 0 in shape:
            self.fail(f"its {name} has shape {shape}")
        return shape

    def check_asked(self, decoder_heads: int | None, target: str | None) -> None:
        """Refuse what means nothing of such a file."""
        if decoder_heads and not (self.whole and self.family is MAE):
            self.fail("it has no decoder, so --decoder-heads means nothing")
        if target and (not self.whole or self.family is BEIT):
            self.fail("it does not predict pixels, so --target means nothing")

    def architecture(self, heads: int | None) -> dict[str, Any]:
        """The arguments of `Encoder` that the tensors tell; drop path is no part of weights."""
        width, channels, patch, _ = self.shape("patch_embed.proj.weight", 4)
        depth = self._depth("blocks")
        grid, heads = {LOMAR: self._lomar, BEIT: self._beit}.get(self.family, self._absolute)(width, patch, heads)
        hidden = self.shape("blocks.0.mlp.fc1.weight", 2)[0]
        ratio = hidden / width
        return {
            "img_size": grid * patch,
            "patch_size": patch,
            "in_chans": channels,
            "embed_dim": width,
            "depth": depth,
            "num_heads": heads,
            "mlp_ratio": ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf),
            "position": "block-bias" if f"blocks.0.attn.{BEIT.mark}" in self.state else self.family.positions[0],
            "key_bias": self.family is not BEIT,
            "init_values": 0.1 if "blocks.0.gamma_1" in self.state else None,  # a start that no longer matters
            "weight_init": self.family.weight_init,
        }

    def encoder(self, made: Mapping[str, Any]) -> Encoder:
        """An encoder of this architecture, with a classifier where the file has one."""
        pool = "token" if self.family in (DINO, MOCO) else "avg"  # what their losses look at
        encoder = Encoder(**made, num_classes=0, global_pool=pool)
        if self.classes:
            encoder.reset_classifier(self.classes, "token" if "norm.weight" in self.state else "avg")
        return encoder

    def composition(
        self,
        made: Mapping[str, Any],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        decoder_heads: int | None,
        target: str | None,
    ) -> Composition:
        """The method that the tensors were pretrained by.

        Raises:
            ValueError: its sizes do not fit together.
        """
        recipe = RECIPES[self.family.recipe]
        values = {
            **recipe.options,
            **recipe.full,
            "method": self.family.recipe,
            "model": f"{made['embed_dim']}x{made['depth']}x{made['num_heads']}",
            "mlp_ratio": made["mlp_ratio"],
            "image_size": made["img_size"],
            "patch_size": made["patch_size"],
            "position": made["position"],
            "drop_path": 0.0,
            "layer_scale": made["init_values"] or 0.0,
            "mean": mean,
            "std": std,
            **self._asked(made["img_size"] // made["patch_size"], target),
        }
        if self.family is MAE:
            width = self.shape("decoder_embed.weight", 2)[0]
            values["decoder_width"], values["decoder_depth"] = width, self._depth("decoder_blocks")
            values["decoder_heads"] = self._assumed_heads(width, 32, decoder_heads, "--decoder-heads")
        return compose(values, self.shape("lm_head.weight", 2)[0] if self.family is BEIT else 0, scale=255.0)

    def statistics(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of the pixels it was trained with."""
        half = (0.5,) * channels
        if channels != 3:
            self.notes.append(f"mean and deviation of its {channels} channels are not in the file: 0.5 is assumed")
            return half, half
        if self.family is BEIT:
            of_imagenet = self.arguments.get("imagenet_default_mean_and_std")
            if of_imagenet is False:
                return half, half
            if of_imagenet is None:
                self.notes.append("mean and deviation are not in the file: ImageNet's are assumed, not 0.5")
        return IMAGENET_MEAN, IMAGENET_STD

    def fill(self, module: Encoder | MaskedReconstruction) -> None:
        """Copy all tensors into a module of the same shape."""
        own = module.state_dict()
        wanted = {_released_name(name, self.family, self.whole): name for name in own}
        given = {name: tensor for name, tensor in self.state.items() if not self.is_derived(name)}
        problems = [f"it has no {name}" for name in wanted if name not in given]
        problems += [f"{name} does not belong to it" for name in given if name not in wanted]
        tensors = {}
        for name in [name for name in wanted if name in given]:
            ours, shape = wanted[name], tuple(own[wanted[name]].shape)
            shape = (1, *shape) if LOMAR.mark in name else shape
            if given[name].shape == shape:
                tensors[ours] = given[name].reshape(own[ours].shape)
            else:
                problems.append(f"its {name} has shape {tuple(given[name].shape)}, with {shape} expected")
        if problems:
            self.fail(problems[0] + (f", and {len(problems) - 1} more do not fit" if problems[1:] else ""))
        module.load_state_dict(tensors)

    def _lomar(self, width: int, patch: int, heads: int | None) -> tuple[int, int]:
        """Side of the grid, in patches, and heads."""
        name = f"blocks.0.attn.{LOMAR.mark}"
        head_width = self.shape(name, 3)[1]
        if width % head_width:
            self.fail(f"its {name} is for heads of width {head_width}, which does not divide {width}")
        self._check_heads(name, width // head_width, heads)
        if "pos_embed" in self.state:
            return self._side("pos_embed", self.shape("pos_embed", 3)[1] - 1), width // head_width
        grid = 224 // patch if 224 % patch == 0 else 14
        self.notes.append(f"its image size is not in the file: {grid * patch} px are assumed, any other works too")
        return grid, width // head_width

    def _absolute(self, width: int, patch: int, heads: int | None) -> tuple[int, int]:
        """Side of the grid, in patches, and heads, where each place has its own row of a table."""
        grid = self._side(MAE.mark, self.shape(MAE.mark, 3)[1] - 1)
        return grid, self._assumed_heads(width, _HEAD_WIDTHS.get((self.family, width), 64), heads, "--heads")

    def _beit(self, width: int, patch: int, heads: int | None) -> tuple[int, int]:
        """Side of the grid, in patches, and heads."""
        name = next(name for name in self.state if name.endswith(BEIT.mark))
        rows, found = self.shape(name, 2)
        side = self._side(name, rows - 3)
        if side % 2 == 0:
            self.fail(f"its {name} has {rows} rows, which is (2 n - 1)^2 + 3 for no grid of n x n patches")
        self._check_heads(name, found, heads)
        return (side + 1) // 2, found

    def _assumed_heads(self, width: int, head_width: int, given: int | None, option: str) -> int:
        if not given:
            if width % head_width:
                self.fail(f"its heads cannot be told from its tensors; `lomar convert {option} N` takes them")
            given = width // head_width
            self.notes.append(f"{given} heads of width {head_width} are assumed, as released; {option} says otherwise")
        if width % given:
            self.fail(f"{option} {given} does not divide its width of {width}")
        return given

    def _check_heads(self, name: str, found: int, given: int | None) -> None:
        if given and given != found:
            self.fail(f"its {name} is for {found} heads, not {given}")

    def _depth(self, prefix: str) -> int:
        """Number of blocks, which must be 0, 1, 2, ..."""
        numbers = {int(m[1]) for name in self.state if (m := re.match(rf"{prefix}\.(\d+)\.", name))}
        if not numbers or numbers != set(range(len(numbers))):
            missing = next(i for i in range(len(numbers) + 1) if i not in numbers)
            self.fail(f"it has no {prefix}.{missing}")
        return len(numbers)

    def _side(self, name: str, places: int) -> int:
        """Side of a square of so many places."""
        side = math.isqrt(max(0, places))
        if not side or side**2 != places:
            self.fail(f"its {name} has {places} places, which are no square")
        return side

    def _asked(self, grid: int, target: str | None) -> dict[str, Any]:
        """What its run was asked to do, where pixels are predicted; the rest is as in the released command."""
        if self.family is BEIT:
            return {}
        options: dict[str, tuple[str, type]] = {"mask_ratio": ("mask_ratio", float)}
        if self.family is LOMAR:
            options |= {"window_size": ("window_size", int), "num_window": ("views", int)}
        values = {
            ours: self.arguments[theirs]
            for theirs, (ours, kind) in options.items()
            if type(self.arguments.get(theirs)) is kind
        }
        if self.family is LOMAR:
            values["window_size"] = min(grid, values.get("window_size", 7))
        if not target:
            normalised = self.arguments.get("norm_pix_loss")
            target = "pixels" if normalised is False else "normalised-pixels"
            if normalised is None:
                self.notes.append(
                    "that it predicts normalised pixels is assumed, not in the file; --target says otherwise"
                )
        return values | {"target": target}


def _recognise(path: Path) -> _File:
    """Whose file it is.

    Raises:
        UserError: nobody's, or more than one project's.
    """
    state, others, arguments = _open(path)
    marks = {family.mark: name for family in FAMILIES for name in reversed(state) if family.mark in name}
    if len(marks) > 1:
        marks.pop(MAE.mark, None)  # LoMaR has positions too, and never reads them
    if not marks:
        wanted = ", ".join(dict.fromkeys(family.mark for family in FAMILIES))
        raise UserError(
            f"{path} is no checkpoint of LoMaR, MAE, BEiT, DINO or MoCo v3: of its {len(state)} tensors (the first is "
            f"{next(iter(state))}) none is called {wanted}"
        )
    mark, name = next(iter(marks.items()))
    family = _owner(state) if mark == MAE.mark else next(family for family in FAMILIES if family.mark == mark)
    predictors = {f"{family.predictor}.weight" for family in FAMILIES if family.predictor}
    ends = {name for name in (*predictors, "head.weight") if name in state}
    foreign = [*list(marks.values())[1:], *sorted(ends - {f"{family.predictor}.weight", "head.weight"})]
    if foreign:
        raise UserError(f"{path} mixes the weights of two models: {name} is {family.name}'s, {foreign[0]} is not")
    if len(ends) > 1:
        raise UserError(f"{path} is neither a pretrained nor a fine-tuned model: it has {' and '.join(sorted(ends))}")
    notes = []
    if family is DINO and "head.weight" in state:
        notes.append("a classifier on learned positions is read as DINO's encoder fine-tuned; DeiT's are no different")
    return _File(path, family, state, others, arguments, notes)


def _owner(state: Mapping[str, Tensor]) -> Family:
    """MAE, DINO or MoCo v3: their encoders have the same names, so what stands beside them tells, or the positions.

    MAE's are sines and cosines of the column, then of the row; MoCo v3's of the row first; DINO's neither.
    """
    if MAE.mark not in state or any(name.startswith(("decoder_", "mask_token", "fc_norm.")) for name in state):
        return MAE
    table = state[MAE.mark]
    if table.ndim != 3 or table.shape[-1] % 4:
        return DINO
    _, places, width = table.shape
    side = math.isqrt(max(0, places - 1))
    if not side or side**2 != places - 1:
        return DINO
    of_mae = sincos_table((side, side), width)
    distances = {MAE: (table - of_mae).norm(), MOCO: (table - of_mae.roll(width // 2, dims=-1)).norm()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] < _NEAR * of_mae.norm() else DINO


def _open(path: Path) -> tuple[dict[str, Tensor], list[str], dict[str, Any]]:
    """A checkpoint's tensors by name, the names of what else it holds, and the options of its run if it has them.

    Raises:
        UserError: there is no such file, it is damaged, or would have to run code to be read.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_PLAIN):
            warnings.simplefilter("ignore")  # of torch's, about files that it then refuses
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file leads the unpickler to
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} holds {found[1]}, a Python object that could run code, and is not read; where you trust it, "
                "save its tensors alone: torch.save({'model': state_dict}, FILE)"
            ) from None
        raise UserError(f"{path} is no whole checkpoint of PyTorch: cut short, damaged or something else") from error
    holder = loaded if isinstance(loaded, dict) else {}
    key = next((key for key in _HOLDERS if isinstance(holder.get(key), dict)), None)
    state = holder[key] if key else holder
    if not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(
            f"{path} holds no weights: tensors by name, at its top or under {', '.join(map(repr, _HOLDERS))}"
        )
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if any(name.startswith("architecture.") for name in state):
        raise UserError(f"{path} is a checkpoint of lomar itself; give the folder of its run")
    arguments = holder.get("args") if key else None
    others = [str(name) for name in holder if name != key] if key else []
    if encoder := next((prefix for prefix in _ENCODERS if any(name.startswith(prefix) for name in state)), None):
        own = {name for name in state if name.startswith(encoder) and not name.startswith(f"{encoder}head.")}
        others += dict.fromkeys(_network(name) for name in state if name not in own)
        state = {name.removeprefix(encoder): tensor for name, tensor in state.items() if name in own}
    return state, others, vars(arguments) if isinstance(arguments, argparse.Namespace) else {}


def _network(name: str) -> str:
    """Which network a tensor belongs to: the first part of its name; with the second, where the first is an encoder."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if f"{first}." in _ENCODERS else first
