"""A run in words and numbers: what was trained on what, its key results, its options, and what two runs differ in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean, median
from typing import Any

from lomar.options import flag
from lomar.reporting.reading import KINDS, RunRecord, is_number, waiting_share

Pairs = list[tuple[str, str]]

NOTHING = "\N{EN DASH}"  # where a table has no value

_MADE = {
    "pretrain": "an encoder, pretrained without labels",
    "finetune": "a classifier, fine-tuned",
    "detect": "a detector",
    "probe": "linear classifiers on frozen features",
    "tokenizer train": "a tokenizer (discrete VAE)",
}
_STATES = {
    "finished": "finished",
    "running": "still running",
    "interrupted": "not finished, and no process works on it",
}


@dataclass(frozen=True)
class Option:
    """One option of a run.

    Args:
        name: as typed, such as --batch-size.
        value: as shown.
        help: what it means; empty where this version does not know it.
        results: whether another value leads to other results.
    """

    name: str
    value: str
    help: str
    results: bool


@dataclass(frozen=True)
class Difference:
    """An option in which runs differ."""

    name: str
    values: Sequence[str]
    results: bool


def summary(run: RunRecord) -> Pairs:
    """What was trained, on what, how far, and how long it took; what is not known is left out."""
    found: Pairs = [("Command", f"lomar {run.kind}"), ("What", _MADE.get(run.kind, "not known")), ("State", state(run))]
    for name, label in (("method", "Method"), ("framework", "Framework"), ("protocol", "Protocol"), ("model", "Model")):
        if (value := run.config.get(name)) is not None:
            found.append((label, shown(value)))
    if (init := run.config.get("init")) is not None:
        found.append(("Weights to begin with", shown(init)))
    images = f"{run.images:,} images" if run.images else "images"
    data = run.config.get("data") or run.results.get("data")
    if data is not None or run.images:
        found.append(("Trained on", f"{images} of {shown(data)}" if data is not None else images))
    judged = run.config.get("eval_data") or run.config.get("val")
    if judged is not None:
        found.append(("Judged on", shown(judged)))
    if sizes := _sizes(run):
        found.append(("Sees", sizes))
    found += _views(run)
    if (batch := run.option("batch_size", int)) is not None:
        found.append(("Batch", f"{batch:,} images a step"))
    found += _time(run)
    if run.hardware:
        found.append(("On", run.hardware))
    if run.bad_files:
        found.append(("Unreadable files", f"{len(run.bad_files):,}"))
    return found


def state(run: RunRecord) -> str:
    """How far a run is."""
    step = f"step {run.last_step:,}"
    if run.total_steps and run.total_steps >= run.last_step:
        step += f" of {run.total_steps:,}"
    epochs = [row["epoch"] for row in run.rows if is_number(row.get("epoch"))]
    passes = f", {epochs[-1]:.3g} {'epoch' if epochs[-1] == 1 else 'epochs'}" if epochs else ""
    return f"{_STATES[run.state]}: {step}{passes}"


def key_results(run: RunRecord) -> Pairs:
    """The numbers that a run is judged by."""
    found: Pairs = []
    for key, label in (
        ("knn_top1", "k-NN top-1"),
        ("top1", "Validation top-1"),
        ("top5", "Validation top-5"),
        ("mean_class_top1", "Mean over classes"),
        ("box_ap", "Box AP"),
        ("mask_ap", "Mask AP"),
        ("held_out_top1", "Held-out top-1"),
        ("val_top1", "Validation top-1"),
        ("vocab_used", "Tokens used"),
    ):
        points = run.points(key)
        if points:
            found.append((label, _judged(points, lambda value: f"{100 * value:.1f} %")))
    for key, label in (("effective_rank", "Effective rank"), ("psnr_db", "Decoded at (dB)"), ("val_loss", "Val. loss")):
        if points := run.points(key):
            found.append((label, _judged(points, lambda value: f"{value:.3g}", best=key != "val_loss")))
    chosen = run.results.get("chosen")
    val = chosen.get("val") if isinstance(chosen, dict) else None
    if isinstance(val, dict) and is_number(val.get("top1")):
        found.append(("Probe's top-1", f"{100 * val['top1']:.1f} %"))
    for key, label, unit in (
        ("feature_deviation", "Deviation of features", "of 1"),
        ("output_entropy", "Entropy of outputs", "nats"),
    ):
        if values := run.values(key):
            few = max(1, len(values) // 20)
            found.append((label, f"{fmean(values[:few]):.3g} → {fmean(values[-few:]):.3g} {unit}"))
    if losses := run.values("loss"):
        few = max(1, len(losses) // 20)
        first, last = fmean(losses[:few]), fmean(losses[-few:])
        means = f" (means of the first and last {few} steps)" if few > 1 else ""
        found.append(("Loss", f"{first:.4g} → {last:.4g}{means}"))
    if rates := run.values("images_per_s"):
        rate = median(rates)
        found.append(("Throughput", f"{f'{rate:,.0f}' if rate >= 1000 else f'{rate:.3g}'} images a second (median)"))
    if (share := waiting_share(run)) is not None:
        found.append(("Waiting for data", f"{share:.0%} of the time"))
    return found


def _judged(points: Sequence[tuple[int, float]], text: Any, best: bool = True) -> str:
    """First (at step 0), best and last value."""
    values = [value for _, value in points]
    said = text(values[-1])
    if points[0][0] == 0 and len(points) > 1:
        said = f"{text(values[0])} before training → {said}" if best else said
    top = max(values)
    if best and text(top) != text(values[-1]) and len(points) > 1:
        said += f" (best {text(top)} at step {points[values.index(top)][0]:,})"
    return said


def options(run: RunRecord) -> list[Option]:
    """Every option in the configuration, in its order."""
    kind = KINDS.get(run.kind)
    known = {each.name: each.metadata for each in fields(kind)} if kind else {}
    return [
        Option(
            flag(name),
            shown(value),
            str(known[name]["help"]) if name in known else "",
            bool(known[name]["results"]) if name in known else True,
        )
        for name, value in run.config.items()
    ]


def differences(runs: Sequence[RunRecord]) -> list[Difference]:
    """The options that are not the same in all runs, those that change results first."""
    tables = [{option.name: option for option in options(run)} for run in runs]
    names = dict.fromkeys(name for table in tables for name in table)
    found = []
    for name in names:
        values = [table[name].value if name in table else NOTHING for table in tables]
        if len(set(values)) > 1:
            found.append(Difference(name, values, any(name in table and table[name].results for table in tables)))
    return sorted(found, key=lambda difference: not difference.results)


def measured_unlike(runs: Sequence[RunRecord]) -> str:
    """A sentence where the runs' losses measure different things; "" where they can be compared."""
    kinds = {
        (run.kind, run.config.get("method") if run.compares_views else run.config.get("target"), run.compares_views)
        for run in runs
    }
    if len(kinds) < 2:
        return ""
    return "Their losses measure different things: that one is lower tells nothing of which is better."


def compared_results(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Label -> what each run has; runs of unlike commands have few in common."""
    tables = [dict([*_time(run), *key_results(run)]) for run in runs]
    labels = dict.fromkeys(label for table in tables for label in table)
    return [(label, [table.get(label, NOTHING) for table in tables]) for label in labels]


def class_rows(results: Mapping[str, Any], most: int = 30) -> tuple[list[tuple[str, str, str, str]], int]:
    """Of a classifier's evaluation, the classes that are recognised least: name, images, accuracy, taken for.

    Returns:
        The rows, and how many classes there are.
    """
    classes = results.get("classes")
    rows = [each for each in classes if isinstance(each, dict)] if isinstance(classes, list) else []
    known = sorted((row for row in rows if is_number(row.get("accuracy"))), key=lambda row: row["accuracy"])
    shown_rows = [
        (
            str(row.get("class")),
            f"{row.get('images')}",
            f"{100 * row['accuracy']:.1f} %",
            str(row.get("most_often_taken_for") or NOTHING),
        )
        for row in known[:most]
    ]
    return shown_rows, len(rows)


def result_numbers(results: Mapping[str, Any]) -> Pairs:
    """The plain numbers of evaluation.json or probe.json."""
    found = [(name.replace("_", " "), _number(name, value)) for name, value in results.items() if is_number(value)]
    chosen = results.get("chosen")
    if isinstance(chosen, dict):
        for part in ("held_out", "val"):
            numbers = chosen.get(part)
            for name, value in numbers.items() if isinstance(numbers, dict) else ():
                if is_number(value):
                    found.append((f"{part.replace('_', ' ')} {name}", _number(name, value)))
        if isinstance(chosen.get("input"), str):
            found.append(("chosen input", chosen["input"]))
        if is_number(chosen.get("base_lr")):
            found.append(("chosen --base-lrs", f"{chosen['base_lr']:g}"))
    return found


def _number(name: str, value: float) -> str:
    """Accuracies and average precisions in percent, counts as they are."""
    if "top" in name or name.startswith(("box_", "mask_")):
        return f"{100 * value:.1f} %"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def shown(value: Any) -> str:
    """An option's value as text."""
    if isinstance(value, list | tuple):
        return " ".join(map(shown, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not given"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def _sizes(run: RunRecord) -> str:
    side, patch = run.config.get("image_size"), run.config.get("patch_size")
    if side is None:
        return ""
    if run.compares_views:
        return _crops(run)
    parts = [f"{shown(side).replace(' ', ' x ')} pixels"]
    if patch is not None:
        parts.append(f"patches of {shown(patch)}")
    window, views, ratio = (run.config.get(name) for name in ("window_size", "views", "mask_ratio"))
    if run.kind == "pretrain":
        if window:
            windows = f"{shown(views)} windows" if views else "windows"
            parts.append(f"{windows} of {shown(window)} x {shown(window)} patches")
        elif window == 0:
            parts.append("whole images")
        if is_number(ratio):
            parts.append(f"{ratio:.0%} hidden")
    return ", ".join(parts)


def _crops(run: RunRecord) -> str:
    """What a method that compares views sees of an image."""
    parts = [f"two large crops of {shown(run.config['image_size'])} pixels{_area(run.config.get('crop_scale'))}"]
    if count := run.option("local_crops", int):
        small = f"{count} small {'one' if count == 1 else 'ones'} of {shown(run.config.get('local_size'))}"
        parts.append(f"{small}{_area(run.config.get('local_scale'))}")
    if (patch := run.config.get("patch_size")) is not None:
        parts.append(f"patches of {shown(patch)}")
    return ", ".join(parts)


def _area(scale: Any) -> str:
    """Shares of an image's area, in brackets behind a word."""
    known = isinstance(scale, list | tuple) and len(scale) == 2 and all(map(is_number, scale))
    return f" ({scale[0]:.0%} to {scale[1]:.0%} of the area)" if known else ""


def _views(run: RunRecord) -> Pairs:
    """What stands behind the encoder, and how its teacher follows and tells, of methods that compare views."""
    if not run.compares_views:
        return []
    outputs, width = shown(run.config["head_outputs"]), run.config.get("head_width")
    within = f", layers {shown(width)} wide" if width is not None else ""
    teacher = run.config.get("teacher_temperature")
    distils = teacher is not None  # as DINO does; MoCo v3 contrasts
    found = [("Heads", (f"{outputs} prototypes" if distils else f"queries and keys {outputs} wide") + within)]
    if (momentum := run.config.get("momentum")) is not None:
        follower = "Teacher" if distils else "Momentum encoder"
        found.append((follower, f"follows with a momentum of {shown(momentum)}, which rises to 1"))
    if (temperature := run.config.get("temperature")) is not None:
        said = f"{shown(temperature)} of the {'student' if distils else 'softmax over the keys'}"
        found.append(("Temperatures" if distils else "Temperature", said + _warming(run) if distils else said))
    return found


def _warming(run: RunRecord) -> str:
    """The teacher's temperature, behind the student's."""
    steps = run.config["teacher_temperature"]
    first, last = (steps[0], steps[-1]) if isinstance(steps, list | tuple) and steps else (steps, steps)
    if first == last:
        return f", {shown(first)} of the teacher"
    epochs = run.config.get("teacher_temperature_epochs")
    over = f" over {shown(epochs)} epochs" if epochs is not None else ""
    return f", {shown(first)} to {shown(last)} of the teacher{over}"


def _time(run: RunRecord) -> Pairs:
    found: Pairs = []
    if elapsed := run.values("elapsed_s"):
        found.append(("Time", f"{_duration(elapsed[-1])}{_left(run, elapsed[-1])}"))
    if run.begun and run.heard:
        again = f", in {run.sittings} sittings" if run.sittings > 1 else ""
        found.append(("From, to", f"{run.begun:%Y-%m-%d %H:%M} to {run.heard:%Y-%m-%d %H:%M}{again}"))
    return found


def _left(run: RunRecord, elapsed_s: float) -> str:
    if run.state != "running" or not run.total_steps or not run.last_step:
        return ""
    return f", about {_duration(elapsed_s / run.last_step * max(0, run.total_steps - run.last_step))} left"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
