"""`lomar benchmark`: time and memory, measured in fresh processes, as a table, JSON and the paper's figures."""

import json
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from lomar import __version__
from lomar.benchmark.cells import OUT_OF_MEMORY, measured
from lomar.benchmark.machine import hardware, versions
from lomar.benchmark.products import product_flops
from lomar.benchmark.rounds import Row, base_of, measure_rounds, ratio
from lomar.commands.benchmark_settling import MACHINE, Plan, plan
from lomar.commands.tables import aligned, versions_and_date
from lomar.errors import UserError
from lomar.figures.benchmark import against_image_size, against_window_size
from lomar.files import write_text
from lomar.options import BenchmarkOptions, command_line

Values = dict[str, Any]
# measure -> its picture, what is drawn along, and how
PICTURES: dict[str, tuple[str, str, Callable[[list[Values], Path], None]]] = {
    "steps": ("figure-4.png", "image_px", against_image_size),
    "windows": ("figure-5-right.png", "window", against_window_size),
}


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar benchmark` with the options that were given; returns the exit status."""
    planned = plan(given)
    out = Path(given["out"]) if "out" in given else None
    found = report(planned, given)

    def keep() -> None:
        found["rows"] = summaries(planned.rows, planned.precision)
        if out:
            _write(found, out)

    status = 0
    # So that no child outlives this process; SIGINT is ignored by what a script starts in the background.
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, _terminated),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
    }
    try:
        if out and out.exists() and not out.is_dir():
            raise UserError(f"--out {out} is a file; it must be a folder")
        keep()  # a folder that cannot be written shows before the work
        _note(f"{len(planned.rows)} rows, {planned.rounds} rounds, a fresh process for each row of each round")
        measure_rounds(planned.rows, planned.rounds, measured, _note, keep)
        status = int(any(row.failed not in ("", OUT_OF_MEMORY) for row in planned.rows))
    except (KeyboardInterrupt, SystemExit) as ended:
        _note("interrupted; this is what was measured so far")
        keep()
        status = 128 + (signal.SIGINT if isinstance(ended, KeyboardInterrupt) else signal.SIGTERM)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    sys.stdout.write(page(found))
    if out:
        draw(found, out)
    return status


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def report(planned: Plan, given: Mapping[str, Any]) -> Values:
    """What the JSON holds beside its rows."""
    return {
        "lomar": __version__,
        "measure": planned.measure,
        "command": command_line("benchmark", BenchmarkOptions, given),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "precision": planned.precision,
        "rounds": planned.rounds,
        "hardware": hardware(planned.hardware.device),
        "versions": versions(),
        "notes": planned.notes,
    }


def summaries(rows: list[Row], precision: str) -> list[Values]:
    """The rows as plain values: what they are, every time that was measured, and what follows from them.

    Args:
        rows: measured as far as they are.
        precision: whose matrix products the use of the machine is measured by.
    """
    rate = max(
        (
            product_flops(row.about["side"]) / row.step_s
            for row in rows
            if row.group == MACHINE and row.step_s and row.about["precision"] == precision
        ),
        default=None,
    )
    return [_summary(row, rows, rate) for row in rows]


def _summary(row: Row, rows: list[Row], rate: float | None) -> Values:
    values = row.about | {
        "group": row.group,
        "is_base": row.is_base,
        "warmup": row.cell.warmup,
        "steps": row.cell.steps,
        "failed": row.failed,
        "rounds": [asdict(each) for each in row.rounds],
    }
    if row.step_s is None or row.images_per_s is None or row.peak_bytes is None:
        return values
    if row.group == MACHINE:
        return values | {"step_s": row.step_s, "flops_per_s": product_flops(row.about["side"]) / row.step_s}
    values |= {
        "step_s": row.step_s,
        "images_per_s": row.images_per_s,
        "s_per_image": 1 / row.images_per_s,
        "peak_bytes": row.peak_bytes,
        "peak_bytes_per_image": row.peak_bytes / row.cell.images,
    }
    base = base_of(row, rows)
    if base and (compared := ratio(row, base)):
        values |= {"base": base.about["name"], "ratio": compared._asdict()}
    smallest = _least(row, rows, "image_px")
    if smallest.images_per_s:
        values["time_of_smallest"] = smallest.images_per_s / row.images_per_s
    fewest = _least(row, rows, "batch")
    further = row.cell.images - fewest.cell.images
    if further and fewest.peak_bytes is not None:
        values["peak_bytes_per_further_image"] = (row.peak_bytes - fewest.peak_bytes) / further
    if rate and "step_flops" in row.about:
        flops_per_s = row.about["step_flops"] * row.images_per_s / row.cell.processes
        values |= {"flops_per_s": flops_per_s, "utilisation": flops_per_s / rate}
    return values


def _least(row: Row, rows: list[Row], name: str) -> Row:
    """The row with the least of something among those measured that differ from `row` in that alone."""
    others = {"name", "work", "image_px", "batch", "views", "processes", "window"} - {name}
    if name == "image_px":
        others -= {"views"}  # which go with the size

    def alike(other: Row) -> bool:
        return all(row.about.get(each) == other.about.get(each) for each in others)

    return min((each for each in rows if each.rounds and alike(each)), key=lambda each: each.about.get(name, 0))


def page(found: Values) -> str:
    """The report in Markdown: table, what a reader should know, hardware, versions and command."""
    machine = found["hardware"]
    shown = [row for row in found["rows"] if row["group"] != MACHINE or found["measure"] == "products"]
    lines = [*table(_columns(found["measure"], shown), shown), ""]
    rates = [row for row in found["rows"] if row["group"] == MACHINE and "flops_per_s" in row]
    if rates and found["measure"] != "products":
        best = max(row["flops_per_s"] for row in rates)
        lines.append(f"Matrix products in {found['precision']}: {best / 1e12:.3g} TFLOP/s.")
    lines += found["notes"]
    done = min((len(row["rounds"]) for row in shown if not row["failed"]), default=0)
    steps = max((row["steps"] for row in shown), default=0)
    lines += [
        f"Medians of {_counted(done, 'round')} of {_counted(steps, 'step')}, in brackets the range. "
        f"{found['precision']}, {machine.get('gpu', machine['processor'])}, {_counted(machine['threads'], 'thread')}, "
        + versions_and_date(found["versions"], found["lomar"], found["date"]),
        "",
        f"    {found['command']}",
    ]
    return "\n".join(lines) + "\n"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def table(columns: Mapping[str, Callable[[Values], str]], rows: list[Values]) -> list[str]:
    """Lines of a Markdown table whose columns are aligned.

    Args:
        columns: title -> text of a row's cell.
        rows: from `summaries`.
    """
    return aligned([list(columns), *([text(row) for text in columns.values()] for row in rows)])


def _columns(measure: str, rows: list[Values]) -> dict[str, Callable[[Values], str]]:
    """Title -> text, for a measure."""

    def shown(key: str, form: str = "{}", factor: float | None = None) -> Callable[[Values], str]:
        return lambda row: "-" if row.get(key) is None else form.format(row[key] * factor if factor else row[key])

    def time(row: Values) -> str:
        return row["failed"] or shown("step_s", "{:.4g}")(row)

    def against(row: Values) -> str:
        compared = row.get("ratio")
        return "{median:.2f} ({low:.2f} to {high:.2f})".format(**compared) if compared else "-"

    name = {"steps": "method", "windows": "method", "processes": "method", "products": "what"}.get(measure, "what")
    bases = dict.fromkeys(str(row.get("method", row["name"])) for row in rows if row["is_base"])
    windows = dict.fromkeys("{0}x{0}".format(row["window"]) for row in rows if row["is_base"] and "window" in row)
    base = {"windows": "".join(windows), "processes": "fewest processes"}.get(measure, " or ".join(bases))
    of_image = {"image": shown("image_px", "{} px"), "batch": shown("batch")}
    speed = {"step, s": time, "images/s": shown("images_per_s", "{:.4g}")}
    compared = {f"images/s against {base}": against}
    memory = {"peak, GB": shown("peak_bytes", "{:.2f}", 1e-9)}
    memory_of_image = {"peak an image, MB": shown("peak_bytes_per_image", "{:.0f}", 1e-6)}
    cost = {
        "GFLOP an image": shown("forward_flops", "{:.1f}", 1e-9),
        "of matrix products": shown("utilisation", "{:.0%}"),
    }
    if len({row["batch"] for row in rows if "batch" in row}) > 1:
        memory_of_image |= {"a further image, MB": shown("peak_bytes_per_further_image", "{:.0f}", 1e-6)}
    kept = {"kept at least, MB": shown("kept_floor_bytes", "{:.0f}", 1e-6)}
    smallest = min((row["image_px"] for row in rows if "image_px" in row), default=0)
    sizes = {f"time against {smallest} px": shown("time_of_smallest", "{:.2f}")}
    columns: dict[str, dict[str, Callable[[Values], str]]] = {
        "steps": of_image
        | {"views": shown("views"), "tokens": shown("tokens")}
        | speed
        | compared
        | sizes
        | cost
        | memory
        | memory_of_image
        | kept,
        "windows": of_image
        | {"window": shown("window", "{0}x{0}"), "views": shown("views"), "tokens": shown("tokens")}
        | speed
        | compared
        | cost
        | memory,
        "classifier": {"work": shown("work")} | of_image | {"tokens": shown("tokens")} | speed | compared | memory,
        "attention": of_image | {"views": shown("views"), "tokens": shown("tokens")} | speed | compared | memory,
        "loader": {"crop": shown("image_px", "{} px"), "pass, s": time, "images/s": speed["images/s"]} | compared,
        "processes": {"processes": shown("processes")}
        | of_image
        | speed
        | compared
        | {"of a perfect gain": lambda row: _gain(row, rows)},
        "products": {
            "precision": shown("precision"),
            "sides": shown("side", "{0} x {0}"),
            "s": time,
            "TFLOP/s": shown("flops_per_s", "{:.4g}", 1e-12),
        },
    }
    return {name: shown("name")} | columns[measure]


def _gain(row: Values, rows: list[Values]) -> str:
    """What several processes gain over what as many would that do not wait for each other."""
    fewest = min(each["processes"] for each in rows if each["group"] == row["group"])
    return f"{row['ratio']['median'] * fewest / row['processes']:.0%}" if "ratio" in row else "-"


def draw(found: Values, out: Path) -> None:
    """Write the measure's picture, if it has one and there are two sizes to draw it along."""
    if found["measure"] not in PICTURES:
        return
    name, along, drawn = PICTURES[found["measure"]]
    rows = [row for row in found["rows"] if "s_per_image" in row]
    if len({row[along] for row in rows}) > 1:
        several = [
            (key, unit)
            for key, unit in (("image_px", "px"), ("batch", "images"))
            if key != along and len({row[key] for row in rows}) > 1
        ]
        curves = [", ".join([row["name"], *(f"{row[key]} {unit}" for key, unit in several)]) for row in rows]
        drawn([row | {"name": curve} for row, curve in zip(rows, curves, strict=True)], out / name)
        _note(f"drawn: {out / name}")


def _write(found: Values, out: Path) -> None:
    """The JSON and the table, replaced whole."""
    texts = {".json": json.dumps(found, indent=1) + "\n", ".md": page(found)}
    for ending, text in texts.items():
        write_text(out / f"{found['measure']}{ending}", text)


def _note(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
