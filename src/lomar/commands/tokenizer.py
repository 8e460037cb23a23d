"""`lomar tokenizer train`: a folder of images -> a tokenizer of their own, where DALL-E's is missing or no use."""

import math
import shutil
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lomar.commands.automatic import find_hardware
from lomar.commands.panels import central_crops
from lomar.commands.runs import goes_on
from lomar.commands.tokenizer_settling import Files, SettledTokenizer, files_of, settle, settle_again
from lomar.data.decode import PixelFormat
from lomar.data.loader import Batching, CropPlan, MicroBatch, SampleKey, pretraining_batches
from lomar.data.survey import spread
from lomar.errors import TrainingError, UserError
from lomar.figures.png import save_png
from lomar.figures.tokens import tokens_figure
from lomar.files import only_writer
from lomar.interop.tokenizers import save_tokenizer
from lomar.launch import launched
from lomar.methods.tokenizer import STRIDE, DiscreteVAE
from lomar.methods.tokenizer_loss import losses, prepare, temperature, usage_of
from lomar.methods.views import local_windows
from lomar.seeding import seeded
from lomar.training.checkpoint import Checkpoints
from lomar.training.keeping import Keeper
from lomar.training.optim import Schedule, adamw
from lomar.training.records import Display, Metrics, Row
from lomar.training.signals import StopRequest

CROP_SCALE = (0.2, 1.0)
WARMUP_SHARE = 0.05  # of the run
BETAS = (0.9, 0.99)
WEIGHT_DECAY = 1e-4  # DALL-E's
CLIP_GRAD = 1.0
EVALUATIONS = 5  # of a run, on the same images
DRAWN_IMAGES = 8


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar tokenizer train` with the options that were given; returns the exit status."""
    asked = {name: value for name, value in given.items() if value != "auto"}
    if launched().count > 1:
        raise UserError("a tokenizer trains in one process; start it without torchrun")
    files = files_of(asked)
    resume = goes_on(files.begun or files.tokenizer.exists(), asked)
    try:
        if resume and files.tokenizer.exists():
            return _finished(files)
        settled = (settle_again if resume else settle)(asked, files)
        with (
            only_writer(files.lock, f"--out {files.tokenizer}"),
            Display(settled.options.log_every) as display,
            StopRequest() as stop,
        ):
            return _train(settled, files, display, stop)
    except OSError as error:
        hint = "; --resume goes on when it can" if Checkpoints(files.partial).steps() else ""
        raise UserError(f"--out {files.tokenizer} cannot be written: {error.strerror or error}{hint}") from error


def _finished(files: Files) -> int:
    """Say so. The tokenizer is written last; what a kill then left beside it goes now."""
    if files.partial.exists() or files.lock.exists():
        with only_writer(files.lock, f"--out {files.tokenizer}"):
            _clear(files)
    Display(1).say(f"{files.tokenizer} is finished")
    return 0


def _clear(files: Files) -> None:
    """Remove the checkpoints."""
    if files.partial.is_dir():
        shutil.rmtree(files.partial)


def _train(settled: SettledTokenizer, files: Files, display: Display, stop: StopRequest) -> int:
    for note in settled.notes:
        display.say(note)
    training = _Training(settled, files, display)
    training.begin()
    if not training.run(stop):
        go_on = f"lomar tokenizer train --out {files.tokenizer} --resume"
        display.say(f"stopped after step {training.step}; go on with: {go_on}")
        return 128 + stop.signal_number
    training.finish()
    return 0


class _Training:
    """One tokenizer in the making."""

    def __init__(self, settled: SettledTokenizer, files: Files, display: Display) -> None:
        options = settled.options
        self.options, self.source, self.checkpoint = options, settled.source, settled.checkpoint
        self.files, self.display = files, display
        self.fmt = PixelFormat(options.channels, options.pixel_type)
        self.device = torch.device(find_hardware(options.device).device)
        torch.manual_seed(options.seed)
        self.dvae = DiscreteVAE.build(
            channels=options.channels,
            width=options.width,
            vocab=options.vocab,
            blocks_per_group=options.blocks_per_group,
            low=options.black,
            high=options.white,
            pixel_type=options.pixel_type,
        )
        prepare(self.dvae)
        # Float32 throughout: bfloat16 would round away what a block adds, 1/64 of its branch. The layout is worth a
        # third of the time on a processor.
        self.dvae.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = adamw(self.dvae, WEIGHT_DECAY, BETAS)
        warmup = WARMUP_SHARE * options.max_steps
        self.schedule = Schedule(peak_lr=options.lr, warmup_steps=warmup, total_steps=options.max_steps)
        metrics, checkpoints = Metrics(files.metrics), Checkpoints(files.partial)
        self.keeper = Keeper(metrics, checkpoints, options.checkpoint_minutes, display.say, files.tokenizer)
        self.step = 0
        self.elapsed_s = 0.0
        self.evaluated: Row = {}  # by the last evaluation
        self.bad: set[str] = set()

    def begin(self) -> None:
        """Go back to the checkpoint, or clear the way; from here on something is in --out.

        Raises:
            UserError: the checkpoint does not fit.
            OSError: --out cannot be written.
        """
        if self.checkpoint:
            self._restore(self.checkpoint)
            return
        _clear(self.files)
        for path in self.files.all():
            path.unlink(missing_ok=True)
        self.save()

    def _restore(self, state: Mapping[str, Any]) -> None:
        try:
            self.dvae.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.elapsed_s, self.evaluated = state["step"], state["elapsed_s"], state["evaluated"]
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise UserError(f"{self.files.partial} is not what lomar tokenizer train leaves behind") from error
        Metrics.cut(self.files.metrics, after_step=self.step)

    def save(self, needed: bool = True) -> None:
        """Write the checkpoint; see `Keeper.save`."""
        about_this_call = ("resume", "overwrite", "out")
        options = {name: value for name, value in asdict(self.options).items() if name not in about_this_call}
        state = {
            "options": options,
            "fingerprint": self.source.fingerprint(),
            "model": self.dvae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "evaluated": self.evaluated,
        }
        self.keeper.save(self.step, state, needed)

    def run(self, stop: StopRequest) -> bool:
        """Train to the end, or until `stop` asks; True when finished.

        Raises:
            TrainingError: the loss is not finite, or too many images cannot be read.
        """
        total = self.options.max_steps
        evaluate_every = max(1, total // EVALUATIONS)
        self.display.start(total, self.step)
        with closing(self._batches()) as batches:
            while self.step < total:
                row = self._learn(batches)
                finished = self.step == total
                if finished or self.step % evaluate_every == 0:
                    self.evaluated = self._evaluate()
                    row |= self.evaluated
                self.keeper.record([row])
                self.display.step(row, self.elapsed_s / self.step * (total - self.step))
                stopping = stop.signal_number > 0
                if finished or stopping or self.keeper.due:
                    self.save(needed=finished or stopping)
                if stopping and not finished:
                    return False
        return True

    def _batches(self) -> Generator[MicroBatch, None, None]:
        options = self.options
        grid = options.image_size // STRIDE
        return pretraining_batches(
            self.source,
            self.fmt,
            _OneWindow((grid, grid), options.window_size, options.seed),
            plan=CropPlan(options.image_size, CROP_SCALE),
            patch_size_px=STRIDE,
            view_size=(options.window_size, options.window_size),
            batching=Batching(
                seed=options.seed,
                batch_size=options.batch_size,
                micro_batch=options.batch_size,
                total_batches=options.max_steps,
                first_batch=self.step,
                workers=options.workers,
                pin_memory=self.device.type == "cuda",
            ),
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
        some = self.source.subset(spread(len(self.source), limit))
        pixels, _ = central_crops(some, self.fmt, self.options.image_size)
        if not len(pixels):
            raise UserError(f"--data: none of {len(some)} images can be read")
        return pixels

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
        pixels = self._judged[spread(len(self._judged), DRAWN_IMAGES)].to(self.device)
        decoded = self.dvae.decode(self.dvae.tokens(pixels))
        grid = self.options.image_size // STRIDE
        caption = (
            f"Above: images. Below: decoded from their {grid}x{grid} tokens of {self.options.vocab}. "
            f"{self.evaluated['vocab_used']:.0%} of the tokens are used, perplexity {self.evaluated['perplexity']:.0f}."
        )
        picture = tokens_figure(self.dvae.unit(pixels).cpu().numpy(), decoded.cpu().numpy(), caption)
        save_png(picture, self.files.picture)
        save_tokenizer(self.files.tokenizer, self.dvae)
        _clear(self.files)
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
