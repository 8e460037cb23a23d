"""`lomar convert`: checkpoints that LoMaR, MAE, BEiT, DINO and MoCo v3 released -> our files, and the way back."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lomar.errors import UserError
from lomar.files import write_atomically
from lomar.interop.initial import listed, match_grids
from lomar.interop.official import SUFFIXES, Official, family_of, is_torch_file, official_state, read_official
from lomar.interop.weights import (
    ENCODER_FILE,
    RECONSTRUCTOR_FILE,
    load_most,
    save_encoder,
    save_reconstructor,
)
from lomar.model import Encoder
from lomar.options import ConvertOptions, flag


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar convert` with the options that were given; returns the exit status."""
    for name in ("model", "out"):
        if name not in given:
            raise UserError(f"--{name} is missing; see lomar convert --help")
    options = ConvertOptions(**given)
    try:
        lines = _to_official(options) if options.to == "official" else _to_lomar(options)
    except OSError as error:
        raise UserError(f"--out {options.out} cannot be written: {error.strerror or error}") from error
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def _to_lomar(options: ConvertOptions) -> list[str]:
    """Read a released checkpoint, write our files; returns what to tell."""
    path, out = Path(options.model), Path(options.out)
    if path.is_dir() or path.suffix == ".safetensors":
        raise UserError(f"--model {path} is lomar's own already; --to official writes it under the released names")
    if out.suffix in SUFFIXES:
        raise UserError(f"--out is {out}; it must end in .safetensors, or be a folder")
    if path.is_file() and not is_torch_file(path):
        raise UserError(f"--model {path} is no checkpoint of PyTorch, which ends in {', '.join(sorted(SUFFIXES))}")
    single = out.suffix == ".safetensors"
    files = [out] if single else [out / ENCODER_FILE, out / RECONSTRUCTOR_FILE]
    _refuse_existing(files)
    found = read_official(path, options.heads, options.decoder_heads, options.target)
    lines = list(_described(path, found))
    if options.image_size:
        found, resized = _resized(found, options.image_size)
        lines += [f"  resized to {options.image_size} px: {listed(resized)}"] if resized else []
    save_encoder(files[0], found.encoder, found)
    if single or found.method is None or found.composition is None:
        return [*lines, f"{files[0]} written"]
    save_reconstructor(files[1], found.method, found.composition)
    return [*lines, f"{files[0]} and {files[1].name} written"]


def _to_official(options: ConvertOptions) -> list[str]:
    """Read our files, write a checkpoint of the released form; returns what to tell."""
    out = Path(options.out)
    for name in ("image_size", "heads", "decoder_heads", "target"):
        if getattr(options, name):
            raise UserError(f"{flag(name)} is for reading a released checkpoint, not for --to official")
    if out.suffix != ".pth":
        raise UserError(f"--out is {out}; with --to official it must end in .pth")
    _refuse_existing([out])
    module, _, _ = load_most(options.model)
    state = official_state(module)
    write_atomically(out, lambda temporary: torch.save({"model": state}, temporary))
    encoder = module if isinstance(module, Encoder) else module.architecture.encoder
    what = "the whole of pretraining" if "mask_token" in state else "the encoder"
    return [f"{out} written: {what}, {len(state)} tensors under {family_of(encoder).name}'s names"]


def _refuse_existing(files: list[Path]) -> None:
    for file in files:
        if file.exists():
            raise UserError(f"--out: {file} exists already; delete it, or give another --out")


def _resized(found: Official, image_px: int) -> tuple[Official, list[str]]:
    """The same weights for another image size, and the names of the tables that changed."""
    patch = found.encoder.architecture["patch_size"]
    if image_px % patch:
        raise UserError(f"--image-size {image_px} is not a multiple of the patches of {patch} px")
    if found.method is None or found.composition is None:
        before = {name: tensor.shape for name, tensor in found.encoder.state_dict().items()}
        found.encoder.set_input_size(image_px)
        after = found.encoder.state_dict()
        return found, [name for name, shape in before.items() if after[name].shape != shape]
    try:
        window = min(found.composition.window_size, image_px // patch)
        composition = replace(found.composition, image_size=image_px, window_size=window)
        method = composition.build().eval()
    except ValueError as error:
        raise UserError(f"--image-size {image_px} does not do: {error}") from None
    resized = match_grids(found.method.architecture, method.architecture)
    method.load_state_dict(found.method.state_dict())
    return replace(found, composition=composition, method=method, encoder=method.architecture.encoder), resized


def _described(path: Path, found: Official) -> Iterator[str]:
    """Lines that say what a file is."""
    made, encoder = found.encoder.architecture, found.encoder
    tensors = (found.method or encoder).state_dict().values()
    yield f"{path}: {found.kind}; {len(tensors)} tensors, {sum(t.numel() for t in tensors) / 1e6:.1f} million numbers"
    yield (
        f"  encoder: {made['embed_dim']} wide, {made['depth']} deep, {made['num_heads']} heads; "
        f"{made['patch_size']}-pixel patches of {made['in_chans']} channels, {made['img_size']} px"
    )
    c = found.composition
    if c is not None and c.architecture == "encoder-decoder":
        yield f"  decoder: {c.decoder_width} wide, {c.decoder_depth} deep, {c.decoder_heads} heads"
    if encoder.num_classes:
        pooled = "its cls token" if encoder.global_pool == "token" else "the mean of its patches"
        yield f"  classifier: {encoder.num_classes} classes from {pooled}"
    if found.dropped:
        yield f"  left out: {listed(found.dropped)}"
    for note in found.notes:
        yield f"  note: {note}"
