"""`lomar tokenizer train`: a folder of images -> a tokenizer of their own, where DALL-E's is missing or no use."""

import math
import os
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import MISSING, asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lomar.commands.automatic import Choice, Hardware, find_hardware
from lomar.data.decode import PixelFormat
from lomar.data.loader import CropPlan, MicroBatch, SampleKey, centre_crops, pretraining_batches
from lomar.data.sources import ImageSource, open_source
from lomar.data.survey import Survey, spread, survey
from lomar.errors import TrainingError, UserError
from lomar.figures.png import save_png
from lomar.figures.tokens import tokens_figure
from lomar.interop.tokenizers import save_tokenizer
from lomar.methods.tokenizer import STRIDE, DiscreteVAE
from lomar.methods.tokenizer_loss import losses, prepare, temperature, usage_of
from lomar.methods.views import local_windows
from lomar.options import TokenizerOptions, fields_of, flag
from lomar.seeding import seeded
from lomar.training.checkpoint import load_checkpoint, save_checkpoint
from lomar.training.loop import StopRequest, process_count
from lomar.training.optim import Schedule, decay_groups
from lomar.training.records import Display, Metrics, Row

SUFFIX = ".safetensors"
CROP_SCALE = (0.2, 1.0)
WARMUP_SHARE = 0.05  # of the run
BETAS = (0.9, 0.99)
WEIGHT_DECAY = 1e-4  # DALL-E's
CLIP_GRAD = 1.0
CHECKPOINT_MINUTES = 10.0
EVALUATIONS = 5  # of a run, on the same images
DRAWN_IMAGES = 8


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar tokenizer train` with the options that were given; returns the exit status."""
    asked = {name: value for name, value in given.items() if value != "auto"}
    if process_count() > 1:
        raise UserError("a tokenizer trains in one process; start it without torchrun")
    files = _Files(_out(asked))
    if asked.get("resume"):
        if files.tokenizer.exists() and not files.partial.exists():
            Display(1).say(f"{files.tokenizer} is finished")
            return 0
        options, source, notes = *_resumed(asked, files), list[str]()
    else:
        options, source, notes = _resolved(asked, files)
    with Display(options.log_every) as display, StopRequest() as stop:
        for note in notes:
            display.say(note)
        training = _Training(options, source, files, display)
        training.begin()
        if not training.run(stop):
            go_on = f"lomar tokenizer train --out {files.tokenizer} --resume"
            display.say(f"stopped after step {training.step}; go on with: {go_on}")
            return 128 + stop.signal_number
        training.finish()
    return 0


@dataclass(frozen=True)
class _Files:
    """What is written: the tokenizer, and beside it its metrics, its picture and, until it is done, a checkpoint."""

    tokenizer: Path

    @property
    def metrics(self) -> Path:
        return self.tokenizer.with_suffix(".jsonl")

    @property
    def picture(self) -> Path:
        return self.tokenizer.with_suffix(".png")

    @property
    def partial(self) -> Path:
        return self.tokenizer.with_name(f"{self.tokenizer.name}.partial")

    def all(self) -> tuple[Path, ...]:
        return self.tokenizer, self.partial, self.metrics, self.picture


def _out(asked: Mapping[str, Any]) -> Path:
    if "out" not in asked:
        raise UserError(f"--out is missing: the file to write the tokenizer to, ending in {SUFFIX}")
    out = Path(asked["out"])
    if out.suffix != SUFFIX:
        raise UserError(f"--out is {out}; it must end in {SUFFIX}")
    return out


def _resolved(asked: Mapping[str, Any], files: _Files) -> tuple[TokenizerOptions, ImageSource, list[str]]:
    """Options of a new tokenizer, all settled; its images; and what the user should know."""
    if "data" not in asked:
        raise UserError("--data is missing: a folder of images, a .txt file of paths, or 'sample'")
    there = [path for path in files.all() if path.exists()]
    if there and not asked.get("overwrite"):
        begun = "--resume goes on with it, " if files.partial in there else ""
        raise UserError(f"--out: {there[0]} already exists; {begun}--overwrite deletes it")
    asked = dict(asked)
    if asked["data"] != "sample":  # the run may be resumed from another folder
        asked["data"] = os.path.abspath(asked["data"])  # noqa: PTH100 (links stay as they are)
    hardware = find_hardware(asked.get("device", "auto"), 1)
    source = open_source(asked["data"])
    share = asked.get("max_bad_share", fields_of(TokenizerOptions)["max_bad_share"].default)
    found = survey(source, max_bad_share=share, channels=asked.get("channels"))
    choices = choose(asked, found, hardware)
    values = {name: choice.value for name, choice in choices.items()} | asked
    if found.format.dtype == "float32" and values["pixel_type"] != "float32":
        raise UserError(f"--pixel-type is {values['pixel_type']}; images of float32 can be read as float32 alone")
    fmt = PixelFormat(values["channels"], values["pixel_type"])
    if "black" not in values or "white" not in values:
        black, white = _range(source, fmt, values["image_size"])
        values = {"black": black, "white": white} | values
    _check_fit(values)
    notes = [f"{found.count} images, shorter side {found.median_short_side_px} px (median of {found.probed} read)"]
    if found.unreadable:
        name, reason = found.unreadable[0]
        notes.append(f"{len(found.unreadable)} of them cannot be read and will be skipped, such as {name}: {reason}")
    notes.append("chosen for you (give the option to decide yourself):")
    notes += [f"  {flag(name):<18} {choice.value!s:<10} {choice.reason}" for name, choice in choices.items()]
    return TokenizerOptions(**values), source, notes


def choose(given: Mapping[str, Any], found: Survey, hw: Hardware) -> dict[str, Choice]:
    """Name -> choice for each automatic option that is not in `given`.

    Sizes and steps for a processor are such that a usable codebook takes minutes (docs/tokenizer.md); those for a GPU
    go up to DALL-E's sizes, and have not been tried.
    """
    gpu = hw.device == "cuda"
    small, medium = found.count < 5_000, found.count < 200_000
    by_count, no_gpu = f"{found.count} images", "no GPU"
    side = min(112, max(2 * STRIDE, found.median_short_side_px // STRIDE * STRIDE))
    why_side = (
        "what BEiT gives its tokenizer" if side == 112 else f"their shorter side is {found.median_short_side_px} px"
    )
    width = (64 if small else 128 if medium else 256) if gpu else 32
    grid = given.get("image_size", side) // STRIDE
    choices = {
        "device": Choice(hw.device, hw.name),
        "channels": Choice(found.format.channels, f"the images have {found.format.channels}"),
        "pixel_type": Choice(found.format.dtype, "the images'"),
        "vocab": Choice((1024 if small else 4096 if medium else 8192) if gpu else 512, by_count if gpu else no_gpu),
        "width": Choice(width, by_count if gpu else no_gpu),
        "blocks_per_group": Choice(2 if gpu else 1, "DALL-E's" if gpu else "no GPU: half of DALL-E's"),
        "image_size": Choice(side, why_side),
        "window_size": Choice(grid if gpu else min(8, grid), "the whole crop" if gpu else "no GPU: a part of the crop"),
        "max_steps": Choice(20_000 if gpu else 800, "not tried" if gpu else "some minutes"),
        "batch_size": Choice(64 if gpu else 16, "fits most GPUs" if gpu else no_gpu),
        "lr": Choice(round(4e-3 * min(1.0, 32 / given.get("width", width)), 6), "4e-3, less for more than 32 channels"),
        "workers": Choice(min(16, max(1, hw.cores - 1)) if gpu else min(2, hw.cores // 2), f"{hw.cores} cores"),
    }
    return {name: choice for name, choice in choices.items() if name not in given}


def _range(source: ImageSource, fmt: PixelFormat, size_px: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Black and white of each channel: of 8-bit images their range, of others nearly all of what occurs.

    Sensors fill 16 bits in part, and floats have no range.
    """
    if fmt.dtype == "uint8":
        return (0.0,) * fmt.channels, (255.0,) * fmt.channels
    pixels = _central_crops(source, fmt, size_px, limit=256)
    values = pixels.movedim(1, 0).flatten(1).float().numpy()  # (C, everything)
    low, high = np.percentile(values, (0.1, 99.9), axis=1)
    high = np.maximum(high, low + 1e-6 * np.maximum(1, abs(low)))  # a channel that never changes
    return tuple(low.tolist()), tuple(high.tolist())


def _check_fit(values: Mapping[str, Any]) -> None:
    """Refuse options that do not go together, naming both."""
    for name, unit in (("width", 4), ("image_size", STRIDE)):
        if values[name] % unit:
            near = max(unit, round(values[name] / unit) * unit)
            raise UserError(f"{flag(name)} {values[name]} is not a multiple of {unit}; {near} would be")
    grid = values["image_size"] // STRIDE
    if values["window_size"] > grid:
        raise UserError(
            f"--window-size {values['window_size']} is larger than the {grid}x{grid} tokens of "
            f"--image-size {values['image_size']}"
        )
    for name in ("black", "white"):
        if len(values[name]) != values["channels"]:
            raise UserError(
                f"{flag(name)} has {len(values[name])} numbers; the images have {values['channels']} channels"
            )
    for low, high in zip(values["black"], values["white"], strict=True):
        if low >= high:
            raise UserError(f"--black is {low} where --white is {high}; it must be less")


def _resumed(asked: Mapping[str, Any], files: _Files) -> tuple[TokenizerOptions, ImageSource]:
    """Options of what was begun in --out; those that do not change results may be given anew."""
    if asked.get("overwrite"):
        raise UserError("--resume and --overwrite are both given; give one")
    if not files.partial.exists():
        raise UserError(f"--out: there is nothing to resume, no {files.partial}")
    stored = load_checkpoint(files.partial).get("options", {})
    fields = fields_of(TokenizerOptions)
    for name, value in asked.items():
        if fields[name].metadata["results"] and stored.get(name) != value:
            raise UserError(
                f"{flag(name)} is {value!r}, but what was begun in {files.partial} has {stored.get(name)!r}; "
                "what is resumed keeps what changes its results"
            )
    values = {name: value for name, value in stored.items() if name in fields} | dict(asked)
    if any(field.default is MISSING and name not in values for name, field in fields.items()):
        raise UserError(f"{files.partial} is not what lomar tokenizer train leaves behind")
    return TokenizerOptions(**values), open_source(values["data"])


class _Training:
    """One tokenizer in the making."""

    def __init__(self, options: TokenizerOptions, source: ImageSource, files: _Files, display: Display) -> None:
        self.options, self.source, self.files, self.display = options, source, files, display
        self.fmt = PixelFormat(options.channels, options.pixel_type)
        self.device = torch.device(find_hardware(options.device, 1).device)
        torch.manual_seed(options.seed)
        self.dvae = DiscreteVAE.build(
            channels=options.channels,
            width=options.width,
            vocab=options.vocab,
            blocks_per_group=options.blocks_per_group,
            low=options.black,
            high=options.white,
        )
        prepare(self.dvae)
        # Float32 throughout: bfloat16 would round away what a block adds, 1/64 of its branch. The layout is worth a
        # third of the time on a processor.
        self.dvae.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        groups = decay_groups(self.dvae, WEIGHT_DECAY)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True)
        warmup = WARMUP_SHARE * options.max_steps
        self.schedule = Schedule(peak_lr=options.lr, warmup_steps=warmup, total_steps=options.max_steps)
        self.metrics = Metrics(files.metrics)
        self.step = 0
        self.elapsed_s = 0.0
        self.bad: set[str] = set()

    def begin(self) -> None:
        """Go back to the checkpoint, or clear the way; from here on something is in --out."""
        if self.options.resume:
            self._restore()
            return
        try:
            for path in self.files.all():
                path.unlink(missing_ok=True)
            self.save()
        except OSError as error:
            raise UserError(f"--out {self.files.tokenizer} cannot be written: {error.strerror}") from error

    def _restore(self) -> None:
        state = load_checkpoint(self.files.partial)
        if state.get("fingerprint") != self.source.fingerprint():
            raise UserError(
                f"the images are not those that {self.files.partial} began with: files were added, removed or renamed; "
                "bring them back, or start anew"
            )
        try:
            self.dvae.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise UserError(f"{self.files.partial} is not what lomar tokenizer train leaves behind") from error
        Metrics.cut(self.files.metrics, after_step=self.step)

    def save(self) -> None:
        """Write the checkpoint."""
        about_this_call = ("resume", "overwrite", "out")
        options = {name: value for name, value in asdict(self.options).items() if name not in about_this_call}
        state = {
            "options": options,
            "fingerprint": self.source.fingerprint(),
            "model": self.dvae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
        }
        save_checkpoint(self.files.partial, state)

    def run(self, stop: StopRequest) -> bool:
        """Train to the end, or until `stop` asks; True when finished.

        Raises:
            TrainingError: the loss is not finite, or too many images cannot be read.
        """
        total = self.options.max_steps
        evaluate_every = max(1, total // EVALUATIONS)
        saved = time.monotonic()
        self.display.start(total, self.step)
        with closing(self._batches()) as batches:
            while self.step < total:
                row = self._learn(batches)
                if self.step % evaluate_every == 0 and self.step < total:
                    row |= self._evaluate()
                self.metrics.write([row])
                self.display.step(row, self.elapsed_s / self.step * (total - self.step))
                if stop.signal_number or time.monotonic() - saved > 60 * CHECKPOINT_MINUTES:
                    self.save()
                    saved = time.monotonic()
                if stop.signal_number:
                    return False
        return True

    def _batches(self) -> Generator[MicroBatch, None, None]:
        options = self.options
        grid = options.image_size // STRIDE
        yield from pretraining_batches(
            self.source,
            self.fmt,
            _OneWindow((grid, grid), options.window_size, options.seed),
            plan=CropPlan(options.image_size, CROP_SCALE),
            patch_size_px=STRIDE,
            view_size=(options.window_size, options.window_size),
            seed=options.seed,
            batch_size=options.batch_size,
            micro_batch=options.batch_size,
            first_batch=self.step,
            total_batches=options.max_steps,
            workers=options.workers,
            pin_memory=self.device.type == "cuda",
        )

    def _learn(self, batches: Iterator[MicroBatch]) -> Row:
        """One optimiser step."""
        options, began = self.options, time.monotonic()
        batch = next(batches)
        waited_s = time.monotonic() - began
        self._note_bad(batch.bad)
        lr, warmth = self.schedule.lr(self.step), temperature(self.step / options.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        pixels = self.dvae.unit(batch.inputs["pixels"][:, 0].to(self.device, non_blocking=True))
        # Drawn from the seed and the step, so that a resumed run needs no generator's state.
        noise = torch.Generator(self.device).manual_seed(seeded(options.seed, self.step, "gumbel").initial_seed())
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        found = losses(self.dvae, pixels, warmth, options.usage_weight, noise)
        self.optimizer.zero_grad(set_to_none=True)
        found.total.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.dvae.parameters(), CLIP_GRAD)
        loss, norm = found.total.item(), grad_norm.item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"the loss is not finite at step {self.step + 1}; its batch holds {', '.join(batch.names[:8])}; "
                "a smaller --lr may help"
            )
        self.optimizer.step()
        self.step += 1
        took_s = time.monotonic() - began
        self.elapsed_s += took_s
        return {
            "step": self.step,
            "epoch": round(self.step * options.batch_size / len(self.source), 6),
            "loss": loss,
            "reconstruction": found.reconstruction.item(),
            "usage_divergence": found.usage.item(),
            "temperature": warmth,
            "lr": lr,
            "grad_norm": norm,
            "images_per_s": round(options.batch_size / took_s, 2),
            "data_wait": round(waited_s / took_s, 4),
            "elapsed_s": round(self.elapsed_s, 3),
        }

    def _note_bad(self, found: list[tuple[str, str]]) -> None:
        for name, reason in found:
            if name not in self.bad:
                self.bad.add(name)
                self.display.say(f"skipped an unreadable image: {name}: {reason}")
        if len(self.bad) > self.options.max_bad_share * len(self.source):
            raise TrainingError(
                f"{len(self.bad)} of {len(self.source)} images cannot be read; "
                f"--max-bad-share allows {self.options.max_bad_share:.0%}"
            )

    @cached_property
    def _judged(self) -> Tensor:
        """The images on which usage is counted, as read: about 32 tokens for each of the vocabulary."""
        tokens = (self.options.image_size // STRIDE) ** 2
        limit = min(1024, max(16, math.ceil(32 * self.options.vocab / tokens)))
        return _central_crops(self.source, self.fmt, self.options.image_size, limit)

    def _evaluate(self) -> Row:
        """What the tokenizer makes of the same images each time, from whole tokens alone."""
        ids, error = [], 0.0
        for pixels in self._judged.split(16):
            pixels = pixels.to(self.device)
            ids.append(self.dvae.tokens(pixels))
            error += (self.dvae.decode(ids[-1]) - self.dvae.unit(pixels)).square().sum().item()
        usage = usage_of(torch.cat(ids), self.options.vocab)
        psnr_db = -10 * math.log10(max(1e-10, error / self._judged.numel()))
        self.display.say(
            f"{usage.share:.0%} of {self.options.vocab} tokens used, perplexity {usage.perplexity:.0f}, "
            f"decoded at {psnr_db:.1f} dB ({len(self._judged)} images)"
        )
        return {"vocab_used": usage.share, "perplexity": usage.perplexity, "psnr_db": psnr_db}

    def finish(self) -> None:
        """Write the tokenizer and its picture."""
        numbers = self._evaluate()
        self.metrics.write([{"step": self.step, "elapsed_s": round(self.elapsed_s, 3), **numbers}])
        pixels = self._judged[:DRAWN_IMAGES].to(self.device)
        decoded = self.dvae.decode(self.dvae.tokens(pixels))
        grid = self.options.image_size // STRIDE
        caption = (
            f"Above: images. Below: decoded from their {grid}x{grid} tokens of {self.options.vocab}. "
            f"{numbers['vocab_used']:.0%} of the tokens are used, perplexity {numbers['perplexity']:.0f}."
        )
        picture = tokens_figure(self.dvae.unit(pixels).cpu().numpy(), decoded.cpu().numpy(), caption)
        save_png(picture, self.files.picture)
        save_tokenizer(self.files.tokenizer, self.dvae)
        self.files.partial.unlink()
        self.display.say(
            f"the tokenizer is in {self.files.tokenizer}, what it keeps in {self.files.picture}; to use it:\n"
            f"    lomar pretrain --method beit --tokenizer {self.files.tokenizer} --data {self.options.data} --out run"
        )


@dataclass(frozen=True)
class _OneWindow:
    """Draws one window of each crop."""

    grid: tuple[int, int]
    side: int
    seed: int

    def __call__(self, key: SampleKey) -> dict[str, Tensor]:
        generator = seeded(self.seed, key.epoch, key.index, "window")
        return {"corners": local_windows(self.grid, self.side, 1, generator)}


def _central_crops(source: ImageSource, fmt: PixelFormat, size_px: int, limit: int) -> Tensor:
    """Pixels (n, C, size_px, size_px) of at most `limit` images, spread evenly over the source.

    Raises:
        UserError: none of them can be read.
    """
    some = source.subset(spread(len(source), limit))
    pixels = torch.cat([crops[good] for crops, good in centre_crops(some, fmt, size_px, workers=0)])
    if not len(pixels):
        raise UserError(f"--data: none of {len(some)} images can be read")
    return pixels
