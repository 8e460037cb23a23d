"""`lomar report`: a run, or two side by side, as one HTML file."""

import sys
from collections.abc import Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from lomar.commands.report_pictures import kept_pictures
from lomar.errors import UserError
from lomar.figures.charts import Chart, charts_of, distance_chart
from lomar.files import write_text
from lomar.options import ReportOptions, converted
from lomar.reporting.hints import hints_on
from lomar.reporting.page import QUIET, Picture, labels, render
from lomar.reporting.reading import RunRecord, read_run

REPORT_FILE = "report.html"


def report(**options: Any) -> Path:
    """Write a report; the same keys as the options of `lomar report`, with underscores, and `run` and `other`.

    Returns:
        The file.

    Raises:
        UserError: an option is unknown or wrong, there is no such run, or the file cannot be written.
    """
    return _report(converted(ReportOptions, options))


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar report` with the options that were given; returns the exit status."""
    _report(given)
    return 0


def _report(given: Mapping[str, Any]) -> Path:
    options = ReportOptions(**given)
    if options.run is None:
        raise UserError("RUN is missing: the folder of a run; see lomar report --help")
    records = [read_run(path) for path in (options.run, options.other) if path is not None]
    out = Path(options.out) if options.out else _beside(records[0])
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out is {out}; it must end in .html")
    names = labels(records)
    hints = [hints_on(record) for record in records]
    for name, found in zip(names, hints, strict=True):
        for hint in found:
            _say(f"{name}: {hint.severity}: {hint.text}")
        if not found:
            _say(f"{name}: {QUIET}")
    shown = [kept_pictures(record) for record in records]
    if not options.no_model:
        from lomar.commands.report_model import ask_model  # with torch, for which a report of files does not wait

        for name, record, each in zip(names, records, shown, strict=True):
            ask_model(record, each, options, partial(_tell, name))
    charts = charts_of({name: record.rows for name, record in zip(names, records, strict=True)})
    distances = {name: each.distances for name, each in zip(names, shown, strict=True) if each.distances}
    distance = _picture(distance_chart(distances)) if distances else None
    foreseen, more = ([_picture(chart) for chart in charts if chart.foreseen is kind] for kind in (True, False))
    page = render(records, hints, shown, foreseen, distance, datetime.now(), more)
    try:
        write_text(out, page, errors="replace")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from error
    _say(f"{out}: {len(page.encode(errors='replace')) / 1e6:.1f} MB; open it in a browser")
    return out


def _beside(record: RunRecord) -> Path:
    """Where a report goes that nobody gave a name."""
    if record.path.is_dir():
        return record.path / REPORT_FILE
    return record.path.with_name(f"{record.path.stem}-{REPORT_FILE}")


def _picture(chart: Chart) -> Picture:
    return Picture(chart.title, chart.svg, "image/svg+xml", chart.alt)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _tell(name: str, text: str) -> None:
    """What is done now, for whoever waits."""
    sys.stderr.write(f"lomar: {name}: {text}\n")
