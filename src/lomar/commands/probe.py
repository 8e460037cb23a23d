"""`lomar probe`: what a linear classifier can tell from frozen features, for any encoder."""

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lomar.commands.automatic import find_hardware
from lomar.commands.frozen import Part
from lomar.commands.probe_cache import Cached, StoppedError, cache_plan, cached_features, number_type
from lomar.commands.probe_learning import Learner, MaeProbe, SweepProbe
from lomar.commands.probe_results import HEAD_FILE, RESULT_FILE, finish_mae, finish_sweep
from lomar.commands.probe_settling import SettledProbe, asked_for_probe, settle, settle_again
from lomar.commands.runs import CONFIG_FILE, begun, goes_on, holds_run
from lomar.downstream.embedding import partial_of
from lomar.downstream.embedding_writer import discard
from lomar.downstream.probe import Columns, head_inputs, parts_of
from lomar.errors import TrainingError, UserError
from lomar.training.checkpoint import FOLDER, Checkpoints
from lomar.training.keeping import Keeper
from lomar.training.optim import Schedule
from lomar.training.processes import make_fabric
from lomar.training.records import LOG_FILE, Display, Metrics, Row
from lomar.training.signals import StopRequest

METRICS_FILE = "metrics.jsonl"
CACHES = {part: f"features-{part}.safetensors" for part in ("fit", "held", "val")}
# Everything a probe may hold; --overwrite deletes these and nothing else.
PROBE_FILES = (
    CONFIG_FILE,
    METRICS_FILE,
    FOLDER,
    *CACHES.values(),
    *(partial_of(Path(name)).name for name in CACHES.values()),
    HEAD_FILE,
    RESULT_FILE,
    LOG_FILE,
    "report.html",
)
EVALUATIONS = 10  # of a probe, evenly spread
ROWS_AT_ONCE = 50  # of the metrics, written together


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar probe` with the options that were given; returns the exit status."""
    asked = asked_for_probe(given)
    folder = Path(asked["out"])
    resume = goes_on(holds_run(folder), asked)
    finished = (folder / RESULT_FILE).exists()
    settled = (settle_again if resume else settle)(asked, folder)
    fabric = make_fabric(settled.encoder.hardware.device, "fp32")
    with (
        begun(fabric, folder, settled.options, PROBE_FILES, resume, lambda: None),
        Display(settled.options.log_every) as display,
        StopRequest() as stop,
    ):
        if resume and finished:
            _clear(folder)
            display.say(f"the probe in {folder} is finished; its numbers are in {folder / RESULT_FILE}")
            return 0
        for note in settled.notes:
            display.say(note)
        probe = _Probe(settled, folder, display, stop)
        if not probe.run():
            display.say(f"stopped {probe.where}; go on with: lomar probe --out {folder} --resume")
            return 128 + stop.signal_number
    return 0


class _Probe:
    """One probe, from its features to its numbers."""

    def __init__(self, settled: SettledProbe, folder: Path, display: Display, stop: StopRequest) -> None:
        self.settled, self.options, self.folder = settled, settled.options, folder
        self.display, self.stop = display, stop
        self.metrics = Metrics(folder / METRICS_FILE)
        self.checkpoints = Checkpoints(folder / FOLDER)
        self.keeper = Keeper(self.metrics, self.checkpoints, self.options.checkpoint_minutes, display.say, folder)
        layers = self.options.layers
        assert layers is not None  # settled
        self.inputs = head_inputs(self.options.features, layers)
        self.step, self.elapsed_s = 0, 0.0
        self.where = "before the first step"
        self.bad: set[str] = set()
        self._fingerprint = settled.fingerprint()
        self._dtype = np.dtype("float32")  # of the features
        self._state: dict[str, Any] = {}  # of the checkpoint

    def run(self) -> bool:
        """All of it, or until a signal asks to stop; True when finished.

        Raises:
            UserError: the probe cannot go on from what is in its folder, or there is too little memory.
            TrainingError: the loss is not finite.
        """
        parts = parts_of(self.inputs)
        columns = Columns(parts, [width for (width,) in self.settled.encoder.shapes(parts)])
        with self._writing():
            self._begin_or_restore(columns.total)
        try:
            caches = self._caches(columns)
        except StoppedError:
            self.where = "while features were made"
            return False
        learner = self._learner(caches, columns)
        with closing(learner):
            if not self._learn(learner):
                self.where = f"after step {self.step}"
                return False
            about = {"steps": self.step, "training_s": round(self.elapsed_s, 1)}
            with self._writing():
                if isinstance(learner, SweepProbe):
                    told = finish_sweep(learner, caches, self.settled, self.folder, about)
                else:
                    told = finish_mae(learner, caches, self.settled, self.folder, about, sorted(self.bad))
            self.display.say(told)
        _clear(self.folder)
        return True

    def _begin_or_restore(self, width: int) -> None:
        """Back to the last checkpoint, or the first one written.

        Args:
            width: numbers of an image that are kept.
        """
        found = self.checkpoints.load(self.display.say)
        if found is None:
            for name in CACHES.values():  # of a probe that was killed before its first checkpoint
                (self.folder / name).unlink(missing_ok=True)
                discard(self.folder / name)
            self.metrics.path.unlink(missing_ok=True)
            # Settled here, since other memory is free when the probe is resumed.
            self._dtype = number_type(sum(map(len, self._kept().values())), width, _free_bytes())
            self._save()
            return
        _, state = found
        if state.get("fingerprint") != self._fingerprint:
            raise UserError(
                f"the encoder's weights, the names of the images or their labels are not those that {self.folder} "
                "began with; bring them back, or start anew with --overwrite"
            )
        try:
            self.step, self.elapsed_s = state["step"], state["elapsed_s"]
            self._dtype, self.bad = np.dtype(state["dtype"]), set(state["bad"])
        except (KeyError, TypeError) as error:
            raise self._other_checkpoint() from error
        self._state = state
        Metrics.cut(self.metrics.path, after_step=self.step)

    def _other_checkpoint(self) -> UserError:
        return UserError(
            f"the checkpoints in {self.checkpoints.folder} do not fit this probe; start anew with --overwrite"
        )

    def _kept(self) -> dict[str, Part]:
        """Images whose features are made once: of the sweep, all; of MAE's probe, those that judge."""
        parts = self.settled.parts()
        return {"val": parts["val"]} if self.settled.held is None else parts

    def _caches(self, columns: Columns) -> dict[str, Cached]:
        kept, encoder, wanted = self._kept(), self.settled.encoder, parts_of(self.inputs)
        rows = sum(map(len, kept.values()))
        self.display.say(
            f"features of {rows} images, {columns.total} numbers each, are kept as {self._dtype}: "
            f"{rows * columns.total * self._dtype.itemsize / 1e6:.0f} MB in memory and, until the probe is done, "
            f"in {self.folder}"
        )
        caches = {}
        for name, part in kept.items():
            plan = cache_plan(part, wanted, columns.total, self._dtype, self._fingerprint)
            path = self.folder / CACHES[name]
            with self._writing():
                caches[name] = cached_features(encoder, part, wanted, plan, path, self.display.say, self.stop)
        return caches

    def _learner(self, caches: Mapping[str, Cached], columns: Columns) -> SweepProbe | MaeProbe:
        options, settled = self.options, self.settled
        classes = len(settled.data.classes)
        learner: SweepProbe | MaeProbe
        if options.protocol == "mae":
            total, only = self._total(len(settled.fit)), self.inputs[0]
            learner = MaeProbe(
                options, settled.encoder, settled.fit, caches["val"], only, classes, self.step, total, self._note_bad
            )
        else:
            device, rates = settled.encoder.device, len(options.base_lrs)
            learner = SweepProbe(
                options, caches["fit"], caches["held"], self.inputs, columns, classes, device, self.step
            )
            self.display.say(f"{len(self.inputs) * rates} heads: {len(self.inputs)} inputs at {rates} rates each")
        if self.step:
            try:
                learner.restore(self._state)
            except (KeyError, RuntimeError, ValueError) as error:
                learner.close()
                raise self._other_checkpoint() from error
        return learner

    def _total(self, count: int) -> int:
        return max(1, round(self.options.epochs * count / self.options.batch_size))

    def _learn(self, learner: Learner) -> bool:
        """Train to the end, or until a signal asks to stop; True when finished."""
        options = self.options
        total = self._total(learner.count)
        warmup = options.warmup_epochs * learner.count / options.batch_size
        schedule = Schedule(peak_lr=learner.peak_lr, warmup_steps=warmup, total_steps=total)
        every = max(1, total // EVALUATIONS)
        rows: list[Row] = []
        self.display.start(total, self.step)
        while self.step < total:
            row = self._one_step(learner, schedule)
            finished, stopping = self.step == total, self.stop.signal_number > 0
            if finished or self.step % every == 0:
                row |= learner.evaluate()
            rows.append(row)
            self.display.step(row, self.elapsed_s / self.step * (total - self.step))
            due = finished or stopping or self.keeper.due
            if due or len(rows) == ROWS_AT_ONCE:
                self.keeper.record(rows)
                rows = []
            if due:
                self._save(learner, needed=finished or stopping)
            if stopping and not finished:
                return False
        return True

    def _one_step(self, learner: Learner, schedule: Schedule) -> Row:
        began = time.monotonic()
        lr = schedule.lr(self.step)
        found = learner.learn(lr)
        if not math.isfinite(found.loss):
            raise TrainingError(f"the loss is not finite at step {self.step + 1}; smaller --base-lrs may help")
        self.step += 1
        took_s = time.monotonic() - began
        self.elapsed_s += took_s
        return {
            "step": self.step,
            "epoch": round(self.step * self.options.batch_size / learner.count, 6),
            "loss": found.loss,
            "lr": lr,
            "grad_norm": found.grad_norm,
            "images_per_s": round(self.options.batch_size / took_s, 2),
            "data_wait": round(found.waited_s / took_s, 4),
            "elapsed_s": round(self.elapsed_s, 3),
        }

    def _save(self, learner: Learner | None = None, needed: bool = True) -> None:
        """A checkpoint, see `Keeper.save`; the first one is without a learner."""
        state = {
            "fingerprint": self._fingerprint,
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "dtype": self._dtype.name,
            "bad": sorted(self.bad),
        }
        with self._writing():
            self.keeper.save(self.step, state | (learner.state() if learner else {}), needed)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns a full disk and its like into one line that says how to go on."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"--out {self.folder} cannot be written: {error.strerror or error}; "
                f"lomar probe --out {self.folder} --resume goes on when it can"
            ) from error

    def _note_bad(self, found: Sequence[tuple[str, str]]) -> None:
        for name, reason in found:
            if name not in self.bad:
                self.bad.add(name)
                self.display.say(f"skipped an unreadable image: {name}: {reason}")


def _free_bytes() -> int:
    """Memory of the processor, where features are kept."""
    return find_hardware("cpu").memory_bytes


def _clear(folder: Path) -> None:
    """Remove what only an unfinished probe needs."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    for name in CACHES.values():
        (folder / name).unlink(missing_ok=True)
        discard(folder / name)
