"""What stands out in a run, in plain words: a record -> hints, each with the numbers that led to it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from shlex import quote
from statistics import fmean, median

from lomar.reporting.reading import UNKNOWN, RunRecord, is_number, waiting_share

# Of a run's steps: fewer say nothing about a course.
LEAST_STEPS = 20
# The first share of the steps is left out where a course is judged: the rate rises, caches fill, workers start.
START = 0.1
# Waiting for data. A tenth is lost to any loader now and then; from a fifth on, a remedy gains more than it costs, and
# from two fifths on the hardware idles nearly as long as it works.
WAITING, MUCH_WAITING = 0.2, 0.4
# Accuracies as shares. Of 2,000 images judged, the standard error at 50 % is 1.1 points: less is no rise and no fall.
NOISE = 0.01
# Evaluations behind step 0 from which a course can be told from noise.
LEAST_EVALUATIONS = 4
# Without a rise for half of the run: a plateau, no pause.
FLAT = 0.5
# Effective rank: halved against its best behind step 0, directions that were learnt are lost. Random weights do not
# count: theirs is often twice that of a run that learns.
COLLAPSED, LEAST_RANKS = 0.5, 3
# Loss: a step that is half as high again as its neighbours. Where patches are predicted, batches differ by a few per
# cent.
LABEL_FREE = ("pretrain", "tokenizer train")
SPIKE, NEIGHBOURS = 1.5, 25
# Loss: fallen by less than this, the model predicts little more than the mean, which it does after a few steps.
FLAT_LOSS, FLAT_STEPS = 0.02, 200
# Methods that compare views, over the last share of the steps: below such a deviation of features, or where DINO's
# outputs are one prototype or all alike, images are no longer told apart. Healthy runs had deviations of 0.2 to 0.65.
LEAST_DEVIATION, LEAST_ENTROPY, LATELY = 0.05, 0.01, 0.1
# Gradient norm: clipped at nearly every step, --clip-grad and not the schedule decides how far a step goes.
CLIPPED = 0.9
# Learning rate, as a share of its peak, at the last step of a run that was interrupted: what it last learnt was not
# yet settled by small steps.
UNSETTLED = 0.1
# Images. Below, features of augmented copies are learnt more than of the world; docs/pretraining.md says the same.
FEW_IMAGES = 2000
# Epochs: the longest pretraining of the paper has so many.
MANY_EPOCHS = 1600
# Unreadable files, as shares of the images: beyond a hundredth something is wrong with a copy or a format.
BAD, MANY_BAD = 0.01, 0.1
# Images a second in the last quarter against the second quarter. Evaluations are not counted, so it should be even.
SLOWED = 0.7
# Memory of the GPU at its fullest: with more than half of it free, twice the images fit.
LITTLE_MEMORY = 0.5
# Validation loss above its lowest: the classifier is surer of its mistakes.
OVERFITTED = 1.1

SEVERITIES = ("problem", "advice", "note")


@dataclass(frozen=True)
class Hint:
    """Something that stands out.

    Args:
        severity: "problem": the result suffers; "advice": something may be gained; "note": good to know.
        text: a sentence or two, with a remedy where there is one.
        numbers: what led to it, by name.
    """

    severity: str
    text: str
    numbers: dict[str, float]


@dataclass(frozen=True)
class _Judged:
    """A share of right answers that is measured now and then."""

    key: str
    name: str


_JUDGED = (_Judged("knn_top1", "k-NN accuracy"), _Judged("top1", "validation accuracy"), _Judged("box_ap", "box AP"))


def hints_on(run: RunRecord) -> list[Hint]:
    """What stands out in a run, the worst first; none where nothing does."""
    found = [hint for rule in _RULES for hint in rule(run)]
    return sorted(found, key=lambda hint: SEVERITIES.index(hint.severity))


def waiting(run: RunRecord) -> list[Hint]:
    """The share of the time that was spent waiting for data, each step weighted by how long it took."""
    share = waiting_share(run)
    if share is None or share < WAITING or run.kind == "probe":
        return []
    workers = run.option("workers", int)
    now = "" if workers is None else f" (now {workers})"
    prepare = ", or images made smaller once by `lomar prepare`, gain" if run.kind != "detect" else " gain"
    text = (
        f"The loader is the bottleneck: {share:.0%} of the time is spent waiting for data. "
        f"More --workers{now}{prepare} up to that share."
    )
    return [Hint("problem" if share >= MUCH_WAITING else "advice", text, {"waiting": share})]


def quality_course(run: RunRecord) -> list[Hint]:
    """Whether accuracy is still rising at the end, flat for long, or falling."""
    hints = []
    for judged in _JUDGED:
        points = [(step, value) for step, value in run.points(judged.key) if step > 0]
        if len(points) < LEAST_EVALUATIONS:
            continue
        steps, values = [step for step, _ in points], [value for _, value in points]
        best = max(values)
        last, end = values[-1], steps[-1]
        before = [value for step, value in points if step <= 0.75 * end][-1:] or values[:1]
        reached = next(step for step, value in points if value >= best - NOISE)
        numbers = {"last": last, "best": best, "before": before[0], "reached": reached}
        if run.state == "finished" and last - before[0] > NOISE and last >= best - NOISE:
            text = f"{judged.name} is still rising: {_percent(before[0])} to {_percent(last)} in the last quarter. "
            hints.append(Hint("advice", text + "Train longer (--epochs).", numbers))
        elif best - last > 2 * NOISE:
            text = (
                f"{judged.name} falls: {_percent(best)} at step {steps[values.index(best)]}, {_percent(last)} at the "
                f"last evaluation. "
            )
            if run.state == "running":
                hints.append(Hint("note", text + "It may rise again as the rate falls.", numbers))
            else:
                text += f"A shorter run or a lower rate{_rate(run)} may end higher."
                hints.append(Hint("advice", text, numbers))
        elif run.state == "finished" and reached <= (1 - FLAT) * end and not below_random(run):
            text = (
                f"{judged.name} has been flat since step {reached} of {end}, at {_percent(best)}: "
                "a longer run of this kind is not likely to help."
            )
            hints.append(Hint("note", text, numbers))
    return hints


def below_random(run: RunRecord) -> list[Hint]:
    """k-NN accuracy that is no better than at random initialisation."""
    points = run.points("knn_top1")
    if not points or points[0][0] != 0 or len(points) < 2:
        return []
    start, last = points[0][1], points[-1][1]
    if last > start + NOISE / 2 or start > 1 - NOISE or run.option("init", str):  # such weights were not random
        return []
    begins = f"k-NN accuracy is {_percent(last)}, and was {_percent(start)} at random initialisation"
    if run.state == "running":
        return [Hint("note", f"{begins}: nothing is gained yet, which is usual at first.", _pair(start, last))]
    text = (
        f"{begins}: this run has learnt nothing that k-NN can use. Train longer, or see docs/results.md for settings."
    )
    return [Hint("problem", text, _pair(start, last))]


def collapsing_rank(run: RunRecord) -> list[Hint]:
    """Effective rank far below its best."""
    points = [(step, value) for step, value in run.points("effective_rank") if step > 0]
    if len(points) < LEAST_RANKS:
        return []
    best, last = max(value for _, value in points), points[-1][1]
    if last >= COLLAPSED * best:
        return []
    text = (
        f"The effective rank of the features has fallen from {best:.1f} to {last:.1f}: images become alike to the "
        f"encoder. A lower rate{_rate(run)} or a longer warm-up may keep them apart."
    )
    return [Hint("problem", text, {"best": best, "last": last})]


def collapsed(run: RunRecord) -> list[Hint]:
    """Features or outputs that have become the same for all images, behind the first pass over them."""
    rows = [row for row in run.rows if all(is_number(row.get(key)) for key in ("feature_deviation", "output_entropy"))]
    rows = rows[-max(LEAST_STEPS, round(LATELY * len(rows))) :]
    if len(rows) < LEAST_STEPS or (is_number(rows[-1].get("epoch")) and rows[-1]["epoch"] < 1):  # runs may begin so
        return []
    deviation, entropy = (median(row[key] for row in rows) for key in ("feature_deviation", "output_entropy"))
    prototypes = run.option("head_outputs", int) if run.option("teacher_temperature", list) else None  # DINO's
    empty = prototypes is not None and not LEAST_ENTROPY <= entropy <= log(prototypes) - LEAST_ENTROPY
    if deviation >= LEAST_DEVIATION and not empty:
        return []
    text = (
        f"All images look nearly alike to the encoder: over the last {len(rows)} steps features deviate by "
        f"{deviation:.3f} of 1 and outputs have an entropy of {entropy:.3f} nats (medians). The method has collapsed; "
        f"a lower rate{_rate(run)} or a larger --batch-size may keep them apart."
    )
    return [Hint("problem", text, {"deviation": deviation, "entropy": entropy})]


def loss_spikes(run: RunRecord) -> list[Hint]:
    """Steps whose loss is far above that of their neighbours."""
    points = run.points("loss")
    # The losses of classifiers and detectors differ from batch to batch as much as this. Of methods that compare views
    # the loss is against what a teacher says, which changes too.
    if len(points) < 2 * LEAST_STEPS or run.kind not in LABEL_FREE or run.compares_views:
        return []
    values = [value for _, value in points]
    spikes = []
    for place in range(round(START * len(values)), len(values)):
        near = median(values[max(0, place - NEIGHBOURS) : place + NEIGHBOURS + 1])
        if near > 0 and values[place] > SPIKE * near:
            spikes.append((values[place] / near, points[place][0]))
    if not spikes:
        return []
    factor, step = max(spikes)
    count = f"{len(spikes)} steps have" if len(spikes) > 1 else "One step has"
    text = f"{count} a loss far above their neighbours', the highest {factor:.1f} times at step {step}. "
    text = text if len(spikes) > 1 else text.replace("their", "its")
    clipping = " or gradient clipping (--clip-grad)" if "clip_grad" in run.config else ""
    remedy = f"A lower rate{_rate(run)}{clipping} smooths them."
    return [Hint("advice", text + remedy, {"spikes": len(spikes), "factor": factor, "step": step})]


def not_finite(run: RunRecord) -> list[Hint]:
    """Losses that were no numbers."""
    nulls = [row["step"] for row in run.rows if "loss" in row and row["loss"] is None]
    count = len(run.non_finite) or len(nulls)
    if not count:
        return []
    how_often = "once" if count == 1 else f"{count} times"
    precision = " or --precision fp32" if "precision" in run.config else ""
    first = run.non_finite[0] if run.non_finite else f"the loss is not finite at step {nulls[0]}"
    text = f"The loss was not finite {how_often} ({first[:300]}). A lower rate{_rate(run)}{precision} may help."
    return [Hint("problem", text, {"times": count})]


def always_clipped(run: RunRecord) -> list[Hint]:
    """Gradients that are clipped at nearly every step."""
    limit = run.option("clip_grad", float)
    norms = [row["grad_norm"] for row in _settled(run, "grad_norm")]
    # A detector's are, and are meant to be; where each tensor is clipped alone, the norm of all tells nothing of it.
    if not limit or len(norms) < LEAST_STEPS or run.kind == "detect" or run.config.get("clip_by") == "tensor":
        return []
    share = sum(norm > limit for norm in norms) / len(norms)
    if share < CLIPPED:
        return []
    text = (
        f"Gradients were clipped at {share:.0%} of the steps behind the first tenth: their norm is {median(norms):.3g} "
        f"(median), --clip-grad is {limit:g}. A higher limit or a lower rate lets the schedule decide."
    )
    return [Hint("advice", text, {"clipped": share, "norm": median(norms)})]


def ended_early(run: RunRecord) -> list[Hint]:
    """A run that was interrupted while its learning rate was high."""
    rates = run.values("lr")
    if run.state != "interrupted" or not rates or run.kind == UNKNOWN:
        return []
    share = rates[-1] / max(max(rates), 1e-30)
    if share <= UNSETTLED:
        return []
    of = f" of {run.total_steps}" if run.total_steps else ""
    text = (
        f"The run stands still at step {run.last_step}{of}, with the learning rate at {share:.0%} of its highest: what "
        f"it learnt is not settled yet. `lomar {run.kind} --out {quote(str(run.path))} --resume` goes on."
    )
    return [Hint("advice", text, {"share": share, "step": run.last_step})]


def few_images(run: RunRecord) -> list[Hint]:
    """Pretraining on few images, or on the same ones more often than anyone does."""
    if run.kind != "pretrain" or not run.images:
        return []
    epochs = max((row["epoch"] for row in run.rows if is_number(row.get("epoch"))), default=0.0)
    numbers = {"images": run.images, "epochs": epochs}
    if run.images < FEW_IMAGES and epochs >= 1:
        text = (
            f"{run.images:,} images, each seen {epochs:.3g} times, are few: a few thousand are a sensible least. "
            "Weights there are (--init) are a better beginning for so few."
        )
        return [Hint("note", text, numbers)]
    if epochs > MANY_EPOCHS:
        text = f"Each image is seen {epochs:,.0f} times, more often than in the paper's longest run ({MANY_EPOCHS:,})."
        return [Hint("note", text, numbers)]
    return []


def bad_files(run: RunRecord) -> list[Hint]:
    """Many files that could not be read."""
    if not run.images or not run.bad_files:
        return []
    epochs = max((row["epoch"] for row in run.rows if is_number(row.get("epoch"))), default=0.0)
    read = max(1, round(run.images * min(1.0, epochs)))
    share = min(1.0, len(run.bad_files) / read)
    if share < BAD:
        return []
    text = f"{len(run.bad_files):,} of {read:,} images ({share:.1%}) cannot be read; the list is below."
    return [Hint("problem" if share >= MANY_BAD else "advice", text, {"share": share})]


def slowed(run: RunRecord) -> list[Hint]:
    """Fewer images a second at the end than before."""
    rates = run.values("images_per_s")
    quarter = len(rates) // 4
    if quarter < LEAST_STEPS // 2 or run.kind == "probe":
        return []
    before, after = median(rates[quarter : 2 * quarter]), median(rates[-quarter:])
    if after >= SLOWED * before:
        return []
    text = (
        f"It became slower: {before:.3g} images a second in the second quarter, {after:.3g} in the last. Another "
        "program, a hot processor or slow storage may be the reason."
    )
    return [Hint("advice", text, {"before": before, "after": after})]


def spare_memory(run: RunRecord) -> list[Hint]:
    """A GPU of whose memory little was ever used."""
    shares = run.values("gpu_memory")
    if not shares or max(shares) >= LITTLE_MEMORY:
        return []
    text = (
        f"At most {max(shares):.0%} of the GPU's memory was used. A larger --micro-batch may be faster, and there is "
        "room for a larger --batch-size."
    )
    return [Hint("advice", text, {"gpu_memory": max(shares)})]


def flat_loss(run: RunRecord) -> list[Hint]:
    """A reconstruction loss that does not fall from the start."""
    losses = run.values("loss")
    if run.kind not in LABEL_FREE or len(losses) < FLAT_STEPS or run.option("init", str):  # such weights had learnt
        return []
    if run.compares_views:  # a teacher that learns with the student keeps the loss where it is
        return []
    tenth = len(losses) // 10
    first, last = fmean(losses[: min(10, tenth)]), fmean(losses[-tenth:])
    if first <= 0 or last < (1 - FLAT_LOSS) * first:
        return []
    text = (
        f"The loss is flat from the start: {first:.4g} in the first steps, {last:.4g} in the last. The "
        f"rate{_rate(run)} may be too low or far too high, or the images all alike."
    )
    return [Hint("problem", text, {"first": first, "last": last})]


def overfitted(run: RunRecord) -> list[Hint]:
    """A validation loss that has risen again."""
    points = run.points("val_loss")
    if len(points) < LEAST_EVALUATIONS:
        return []
    lowest, at = min((value, step) for step, value in points)
    last = points[-1][1]
    right = [value for step, value in run.points("top1") if step > 0]
    at_its_best = bool(right) and right[-1] >= max(right) - NOISE
    if last <= OVERFITTED * lowest or lowest <= 0 or at_its_best or run.kind != "finetune":
        return []
    text = (
        f"The loss on images that judge rises: {lowest:.3g} at step {at}, {last:.3g} at the end, which is overfitting. "
        "Fewer --epochs, or more of --mixup, --cutmix and --drop-path, help."
    )
    return [Hint("advice", text, {"lowest": lowest, "last": last, "step": at})]


_RULES: Sequence[Callable[[RunRecord], list[Hint]]] = (
    not_finite,
    flat_loss,
    below_random,
    collapsed,
    collapsing_rank,
    waiting,
    quality_course,
    ended_early,
    loss_spikes,
    overfitted,
    always_clipped,
    slowed,
    spare_memory,
    bad_files,
    few_images,
)


def _settled(run: RunRecord, key: str) -> list[dict[str, float]]:
    """The rows that have a number under a key, without the first share of them."""
    rows = [row for row in run.rows if is_number(row.get(key))]
    return rows[round(START * len(rows)) :]


def _rate(run: RunRecord) -> str:
    """The option that sets the rate of a run's kind, in brackets behind a word; "" where there is no one option."""
    named = {"pretrain": "--base-lr", "finetune": "--base-lr", "detect": "--lr", "tokenizer train": "--lr"}
    return f" ({named[run.kind]})" if run.kind in named else ""


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _pair(start: float, last: float) -> dict[str, float]:
    return {"start": start, "last": last}
