"""`lomar study`: the paper's comparisons on images of one's own: a grid of recipes and seeds, told in one table."""

import json
import shlex
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from lomar import __version__
from lomar.benchmark.machine import hardware, versions
from lomar.commands.study_settling import SettledStudy, keep_settings, settle
from lomar.commands.tables import aligned, versions_and_date
from lomar.errors import UserError
from lomar.figures.study import Point, bars, lines
from lomar.files import LOCK_FILE, write_text
from lomar.options import StudyOptions, command_line
from lomar.study.cells import NEIGHBOURS, needs_tokenizer, result_of, steps
from lomar.study.plan import Results
from lomar.study.queue import TOKENIZER_FOLDER, Children, Queue, in_turn
from lomar.study.splits import draw_lists, keep_lists
from lomar.study.table import JUDGED, Row, cells, rows, values


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar study` with the options that were given; returns the exit status."""
    settled = settle(given)
    if settled.options.dry_run:
        sys.stdout.write(rehearsal(settled))
        return 0
    out, options = settled.setup.out, settled.options
    data, lists = draw_lists(options.data, options.bank, options.labels)
    try:
        with in_turn(out / LOCK_FILE):
            keep_settings(settled)
            keep_lists(lists, out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from error
    about = {
        "command": command_line("study", StudyOptions, given),
        "classes": len(data.classes),
        "train_images": len(data.train),
        "val_images": len(data.val),
        "val_drawn_from_train": data.drawn,
    }
    children, telling = Children(), threading.Lock()

    def tell() -> str:
        with telling, in_turn(out / LOCK_FILE):
            return write_table(settled, queue.found(), about)

    queue = Queue(
        plan=settled.plan,
        setup=settled.setup,
        tokenizer=settled.tokenizer,
        run=children.run,
        stopping=children.stopping,
        stop=children.stop,
        say=_note,
        done=tell,
    )
    stopped_by = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped_by
        if not stopped_by:
            _note("stopping: the commands that run are asked to save; the same command goes on")
        stopped_by = number
        children.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _note(f"{len(queue.remaining())} cells can run now, {len(settled.places)} at a time")
        queue.work(settled.places)
        sys.stdout.write(tell())
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for name, reason in queue.failed.items():
        _note(f"{name}: failed: {reason}")
    return 128 + stopped_by if stopped_by else int(bool(queue.failed))


def _note(text: str) -> None:
    sys.stderr.write(f"lomar: {time.strftime('%H:%M:%S')} {text}\n")


def rehearsal(settled: SettledStudy) -> str:
    """What would be run, as far as it is known before anything is: rows, rates, seeds, and a row's commands."""
    plan = settled.plan
    lines_ = [
        f"{settled.name}: {settled.study.about} ({settled.study.paper})",
        f"{len(plan.entries)} rows, rates {' '.join(f'{rate:g}' for rate in plan.base_lrs)} for 256 images, seeds "
        f"{' '.join(map(str, plan.seeds))}; {len(settled.places)} cells at a time",
        "",
    ]
    for entry in plan.entries:
        changes = " ".join(f"{name}={value}" for name, value in entry.changes.items())
        length = plan.length(entry, {})
        course = "" if not entry.method else f"{length:g} epochs" if length else f"as long as {entry.as_long_as}"
        told = [entry.method or "no pretraining", changes, course]
        lines_.append(f"  {entry.name}: {', '.join(word for word in told if word)}")
    job = next((job for job in plan.jobs({}) if job.cell.method), None)
    if job:
        lines_ += ["", "the first cell; LAYER is the one that its probe chooses:"]
        lines_ += [f"  lomar {shlex.join(step.words)}" for step in steps(job, settled.setup)]
    return "\n".join(lines_) + "\n"


def write_table(settled: SettledStudy, found: Results, about: Mapping[str, Any]) -> str:
    """Write table, JSON and picture of what is known by now; returns the table as it is shown."""
    asked = {entry.name for entry in settled.plan.entries}
    # Rows of an earlier call stay in the table.
    table = [row for row in rows(settled.whole, found) if row.entry.name in asked or row.seeds]
    names = dict.fromkeys(job.cell.name for job in settled.whole.jobs(found))
    place = hardware(settled.hardware.device)
    report = {
        "lomar": __version__,
        "study": settled.name,
        **about,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": place,
        "versions": versions(),
        "tokenizer": result_of(settled.setup.out / TOKENIZER_FOLDER),
        "rows": [values(row) for row in table],
        "cells": {name: found[name] for name in names if name in found},
    }
    text = page(settled, table, report)
    out = settled.setup.out
    content = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    write_text(out / f"{settled.name}.json", content)
    write_text(out / f"{settled.name}.md", text)
    draw(settled, table, out / f"{settled.name}.png")
    return text


def page(settled: SettledStudy, table: Sequence[Row], report: Mapping[str, Any]) -> str:
    """The study in Markdown: table, what a reader should know, hardware, versions and command."""
    options, plan = settled.options, settled.plan
    place = report["hardware"]
    learnt = f"{options.bank} images of each class" if options.bank else "all of them"
    tuned = f"{options.labels} of each class" if options.labels else "all of them"
    drawn = " (a fifth, drawn from all)" if report["val_drawn_from_train"] else ""
    rates = ", ".join(f"{rate:g}" for rate in plan.base_lrs)
    hosts = {step["host"] for cell in report["cells"].values() for step in cell.values() if "host" in step}
    notes = [
        f"{settled.study.paper}: {settled.study.about}. Top-1 in per cent of {report['val_images']} val images{drawn} "
        f"of {report['classes']} classes; the mean over seeds and, in brackets, the standard deviation.",
        f"Encoder {options.model}, {options.image_size} px, patches of {options.patch_size} px, batch "
        f"{options.batch_size}, pretrained on {report['train_images']} images. k-NN (k = {NEIGHBOURS}) and linear "
        f"probe learn from {learnt}; fine-tuning from {tuned}, for {options.finetune_epochs:g} epochs, with what "
        "`lomar finetune` chooses for the encoder.",
        f"Rates tried for every row, but for those that take another's: {rates} for 256 images. Rate and layer were "
        "chosen by a linear probe, on a tenth of the images that it learns from, held out; never on val. Weights are "
        "always the last ones.",
    ]
    if any(row.at_edge for row in table):
        notes.append("* the best rate is the lowest or the highest that was tried.")
    notes += [
        f"{row.entry.name} diverged at {', '.join(f'{rate:g}' for rate in row.diverged)}."
        for row in table
        if row.diverged
    ]
    notes.append(
        "Minutes and images/s are those of all steps, without evaluations, checkpoints and pauses, beside the other "
        "cells; FLOPs are of forward and backward pass"
        + (", of rows that predict tokens with their tokenizer's forward pass" if any(map(_of_tokens, table)) else "")
        + "."
    )
    machine = f"{len(hosts)} machines, one of them {place.get('gpu', place['processor'])}"
    notes.append(
        f"{machine if len(hosts) > 1 else place.get('gpu', place['processor'])}, {_at_a_time(settled)}, "
        f"{options.precision}, " + versions_and_date(report["versions"], report["lomar"], report["date"])
    )
    return "\n".join([*aligned(cells(table)), "", *(f"{note}\n" for note in notes), f"    {report['command']}"]) + "\n"


def _of_tokens(row: Row) -> bool:
    return needs_tokenizer(row.entry.method)


def _at_a_time(settled: SettledStudy) -> str:
    """So many cells, each with so many threads."""
    count, threads = len(settled.places), settled.places[0].get("OMP_NUM_THREADS")
    cells = f"{count} cell{'s' * (count > 1)} at a time"
    return f"{cells} of {threads} thread{'s' * (threads != '1')} each" if threads else cells


def draw(settled: SettledStudy, table: Sequence[Row], path: Path) -> None:
    """The picture of the rows that are judged, if there are any."""
    along = settled.study.along
    points = [
        Point(
            name=row.entry.name,
            group=row.entry.group,
            at=(row.minutes or 0.0) if along == "minutes" else row.entry.at,
            accuracy={
                JUDGED[name]: (100 * each.mean, 100 * (each.deviation or 0.0)) for name, each in row.accuracy.items()
            },
        )
        for row in table
        if row.accuracy
    ]
    if not points:
        return
    if along:
        lines(points, "pretraining, minutes" if along == "minutes" else along, path)
    else:
        bars(points, path)
