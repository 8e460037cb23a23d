"""`lomar pretrain`: a folder of images -> an encoder."""

import logging
import os
import shutil
import signal
from collections.abc import Generator, Mapping
from dataclasses import MISSING, asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning_fabric import Fabric

from lomar import __version__
from lomar.commands.automatic import Choice, Hardware, choose, find_hardware, micro_batch
from lomar.commands.evaluation import Evaluation, evaluation_data
from lomar.data.decode import PixelFormat
from lomar.data.loader import MicroBatch, pretraining_batches
from lomar.data.sources import ImageSource, LabelledSplit, open_source
from lomar.data.survey import Survey, channel_statistics, survey
from lomar.errors import UserError
from lomar.figures.curves import learning_curves
from lomar.files import write_atomically
from lomar.interop.weights import ENCODER_FILE, RECONSTRUCTOR_FILE, save_encoder, save_reconstructor
from lomar.methods.recipes import RECIPES, Composition, Recipe
from lomar.methods.reconstruction import MaskedReconstruction, ViewsAndMask
from lomar.model import SIZES
from lomar.options import PretrainOptions, convert, fields_of, flag, read_config, suggestion
from lomar.training.loop import Course, StopRequest, Trainer, process_count
from lomar.training.memory import saved_bytes
from lomar.training.optim import Schedule, adamw
from lomar.training.records import Display, Metrics, close_log, open_log

CONFIG_FILE = "config.yaml"
# Everything a run may hold; --overwrite deletes these and nothing else.
RUN_FILES = (
    CONFIG_FILE,
    "metrics.jsonl",
    "checkpoints",
    ENCODER_FILE,
    RECONSTRUCTOR_FILE,
    "figures",
    "train.log",
    "tensorboard",
    "bad_files.txt",
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WARMUP_SHARE = 0.025  # of the run: 40 of 1600 epochs, 20 of 800, 10 of 400 (section 6.1)
EVALUATIONS = 20  # at most, when their interval is not given


def pretrain(**options: Any) -> Path:
    """Pretrain an encoder; the same keys as the options of `lomar pretrain`, with underscores.

    Returns:
        The run's folder, for `lomar.load`.

    Raises:
        KeyboardInterrupt: SIGINT came; the run is saved and can be resumed.
        SystemExit: SIGTERM came; likewise.
        UserError: an option is unknown, wrong or does not fit the others, or the images cannot be used.
        TrainingError: the loss is not finite, twice.
    """
    for name in options:
        if name not in fields_of(PretrainOptions):
            raise UserError(f"there is no option {name!r}{suggestion(name, list(fields_of(PretrainOptions)))}")
    asked = _asked({name: convert(PretrainOptions, name, value) for name, value in options.items()})
    status = _run(asked)
    if status == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    if status:
        raise SystemExit(status)
    return Path(asked["out"])


def command(given: Mapping[str, Any]) -> int:
    """Run `lomar pretrain` with the options that were given; returns the exit status."""
    return _run(_asked(given))


def _asked(given: Mapping[str, Any]) -> dict[str, Any]:
    """What flags and --config ask for; "auto" asks for nothing."""
    config = read_config(given["config"], PretrainOptions) if given.get("config") else {}
    automatic = {name for name, field in fields_of(PretrainOptions).items() if "auto" in field.metadata["choices"]}
    return {
        name: value
        for name, value in _merged(config, given).items()
        if value is not None and not (name in automatic and value == "auto")
    }


def _run(asked: dict[str, Any]) -> int:
    if "out" not in asked:
        raise UserError("--out is missing: the folder in which to make the run")
    run = Path(asked["out"])
    resume = bool(asked.get("resume"))
    processes = process_count()
    if resume:
        options, source = _resumed(asked, run)
        hardware = find_hardware(options.device, processes)
        notes: list[str] = []
    else:
        options, source, hardware, notes = _resolved(asked, run)
    labelled = None
    if options.eval_data:
        labelled = evaluation_data(options, _pixel_format(options), hardware.device)
        if labelled is None:
            notes.append(f"--eval-data {options.eval_data} has no two classes: effective rank instead of k-NN")
    fabric = _fabric(options, hardware, processes)
    composition = _composition(options)
    torch.manual_seed(options.seed)
    method = composition.build()
    _begin(fabric, run, options, resume)
    try:
        with Display(options.log_every, enabled=fabric.is_global_zero) as display, StopRequest() as stop:
            for note in notes:
                display.say(note)
            return _train(fabric, run, options, composition, method, source, labelled, display, stop)
    finally:
        close_log()


def _train(
    fabric: Fabric,
    run: Path,
    options: PretrainOptions,
    composition: Composition,
    method: MaskedReconstruction,
    source: ImageSource,
    labelled: LabelledSplit | None,
    display: Display,
    stop: StopRequest,
) -> int:
    fmt = _pixel_format(options)
    course = _course(options, source)
    draw = ViewsAndMask(method.views, method.mask, options.seed)

    def batches(first_step: int) -> Generator[MicroBatch, None, None]:
        yield from pretraining_batches(
            source,
            fmt,
            draw,
            image_size_px=options.image_size,
            patch_size_px=options.patch_size,
            view_size=method.views.size,
            crop_scale=options.crop_scale,
            seed=options.seed,
            batch_size=options.batch_size,
            micro_batch=options.micro_batch,
            first_batch=first_step,
            total_batches=course.total_steps,
            workers=options.workers,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
            pin_memory=fabric.device.type == "cuda",
        )

    def export() -> None:
        save_encoder(run / ENCODER_FILE, method.architecture.encoder, composition)
        save_reconstructor(run / RECONSTRUCTOR_FILE, method, composition)

    optimizer = adamw(method, options.weight_decay)
    evaluation = Evaluation(fabric, method, source, labelled, fmt, options, run)
    trainer = Trainer(fabric, method, optimizer, course, batches, run, display, export, evaluation)
    trainer.restore()
    if trainer.finished:
        display.say(f"the run in {run} is finished: {trainer.progress.step} steps")
        display.say(_how_to_load(run))
        return 0
    if trainer.progress.step == 0:
        trainer.save()  # from here on the run can be loaded, reconstructed from and resumed
    try:
        finished = trainer.run(stop)
    finally:
        trainer.close()
    if fabric.is_global_zero:
        learning_curves(Metrics.read(run / "metrics.jsonl"), run / "figures" / "curves.png")
    if not finished:
        display.say(f"stopped after step {trainer.progress.step}; go on with: lomar pretrain --out {run} --resume")
        return 128 + stop.signal_number
    display.say(_how_to_load(run))
    return 0


def _how_to_load(run: Path) -> str:
    return (
        f"the encoder is in {run / ENCODER_FILE}; to use it:\n"
        f'    import lomar\n    encoder = lomar.load("{run}")      # a timm model; encoder(images) is (B, D)'
    )


def _resolved(asked: Mapping[str, Any], run: Path) -> tuple[PretrainOptions, ImageSource, Hardware, list[str]]:
    """Options of a new run, all settled: what was asked for (flag, then --config), then recipe, then automatic."""
    asked = _merged(_recipe(asked.get("method", "lomar")).options, asked)
    if "data" not in asked:
        raise UserError("--data is missing: a folder of images, a .txt file of paths, or 'sample'")
    if holds_run(run) and not asked.get("overwrite"):
        raise UserError(f"--out {run} already holds a run; --resume goes on with it, --overwrite deletes it")
    if run.exists() and not run.is_dir():
        raise UserError(f"--out {run} is a file; it must be a folder")
    hardware = find_hardware(asked.get("device", "auto"), process_count())
    for name in ("data", "eval_data"):  # the run may be resumed from another folder
        if name in asked and asked[name] != "sample":
            asked[name] = os.path.abspath(asked[name])  # noqa: PTH100 (links stay as they are)
    source = open_source(asked["data"])
    share = asked.get("max_bad_share", fields_of(PretrainOptions)["max_bad_share"].default)
    found = survey(source, max_bad_share=share, channels=asked.get("channels"))
    choices = choose(asked, found.count, found.median_short_side_px, found.format, hardware)
    values = {key: choice.value for key, choice in choices.items()} | asked
    if found.format.dtype == "float32" and values["pixel_type"] != "float32":
        raise UserError(f"--pixel-type is {values['pixel_type']}; images of float32 can be read as float32 alone")
    fmt = PixelFormat(values["channels"], values["pixel_type"])
    _check_fit(values)
    mean, std = _statistics(values, source, fmt)
    values.setdefault("mean", mean)
    values.setdefault("std", std)
    _check_statistics(values)
    values.setdefault("warmup_epochs", WARMUP_SHARE * _epochs(values, found.count))
    values["micro_batch"] = values.get("micro_batch", 1)
    options = PretrainOptions(**values)
    if "micro_batch" not in asked:
        choices["micro_batch"] = _micro_batch(options, hardware)
        options = PretrainOptions(**values | {"micro_batch": choices["micro_batch"].value})
    return options, source, hardware, _notes(found, choices, options)


def _merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """`upper` over `lower`; what is given higher up also beats its rivals: steps and epochs, statistics and numbers."""
    if "epochs" in upper and "max_steps" in upper and upper["epochs"] is not None and upper["max_steps"] is not None:
        raise UserError("--epochs and --max-steps are both given; give one")
    beaten = {"epochs": {"max_steps"}, "max_steps": {"epochs"}, "statistics": {"mean", "std"}}
    rivals = {rival for name, names in beaten.items() if upper.get(name) is not None for rival in names}
    return {key: value for key, value in lower.items() if key not in rivals} | dict(upper)


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise UserError(f"--method is {name!r}; there is {', '.join(RECIPES)}{suggestion(name, list(RECIPES))}")
    return RECIPES[name]


def _resumed(asked: Mapping[str, Any], run: Path) -> tuple[PretrainOptions, ImageSource]:
    """Options of the run in --out; those that do not change results may be given anew."""
    if asked.get("overwrite"):
        raise UserError("--resume and --overwrite are both given; give one")
    file = run / CONFIG_FILE
    if not file.exists():
        raise UserError(f"--out {run} holds no run to resume: there is no {CONFIG_FILE} in it")
    stored = read_config(str(file), PretrainOptions)
    fields = fields_of(PretrainOptions)
    for name, value in asked.items():
        if fields[name].metadata["results"] and stored.get(name) != value:
            raise UserError(
                f"{flag(name)} is {value!r}, but the run in {run} has {stored.get(name)!r}; "
                "a resumed run keeps what changes its results"
            )
    values = stored | dict(asked)
    missing = [name for name, field in fields.items() if field.default is MISSING and name not in values]
    if missing:
        raise UserError(f"{file} is not complete: it lacks {', '.join(missing)}")
    options = PretrainOptions(**values)
    if options.model not in SIZES or (options.epochs is None) == (options.max_steps is None):
        raise UserError(f"{file} is not what a run writes: it must settle model, and one of epochs and max_steps")
    _recipe(options.method)
    _check_fit(asdict(options))
    _check_statistics(asdict(options))
    return options, open_source(options.data)


def holds_run(run: Path) -> bool:
    """Whether a folder holds a run, or what is left of one."""
    return any((run / name).exists() for name in (CONFIG_FILE, "metrics.jsonl", "checkpoints"))


def _check_fit(values: Mapping[str, Any]) -> None:
    """Refuse options that do not go together, naming both."""
    image, patch, window = values["image_size"], values["patch_size"], values["window_size"]
    if image % patch:
        nearest = max(patch, round(image / patch) * patch)
        raise UserError(f"--image-size {image} is not a multiple of --patch-size {patch}; {nearest} would be")
    if patch**2 * values["channels"] < 2:
        raise UserError("--patch-size 1 with 1 channel leaves one number a patch, which cannot be normalised; take 2")
    grid = image // patch
    if window > grid:
        raise UserError(
            f"--window-size {window} is larger than the {grid}x{grid} grid of patches "
            f"(--image-size {image} / --patch-size {patch}); it can be at most {grid}"
        )
    hidden = int(window**2 * values["mask_ratio"])
    if not 0 < hidden < window**2:
        raise UserError(
            f"--mask-ratio {values['mask_ratio']} hides {hidden} of the {window**2} patches of a window; "
            "it must hide some and leave some"
        )
    depth = SIZES[values["model"]][1]
    if values["mask_layer"] >= depth:
        raise UserError(
            f"--mask-layer is {values['mask_layer']}; --model {values['model']} has blocks 0 to {depth - 1}"
        )
    if values["window_layout"] == "released" and values["views"] > grid - window + 1:
        raise UserError(
            f"--views is {values['views']}; with --window-layout released a {grid}x{grid} grid "
            f"has at most {grid - window + 1} windows of side {window}"
        )
    low, high = values.get("crop_scale", (0.2, 1.0))
    if low > high:
        raise UserError(f"--crop-scale is {low} {high}; the smaller share comes first")
    if values["batch_size"] < process_count():
        raise UserError(f"--batch-size {values['batch_size']} is smaller than the {process_count()} processes")


def _check_statistics(values: Mapping[str, Any]) -> None:
    for name in ("mean", "std"):
        if len(values[name]) != values["channels"]:
            raise UserError(
                f"{flag(name)} has {len(values[name])} numbers; the images have {values['channels']} channels"
            )


def _statistics(
    values: Mapping[str, Any], source: ImageSource, fmt: PixelFormat
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if "mean" in values and "std" in values:
        return values["mean"], values["std"]
    if values["statistics"] == "imagenet":
        if fmt.channels != 3:
            raise UserError(f"--statistics imagenet is for 3 channels; the images have {fmt.channels}")
        return IMAGENET_MEAN, IMAGENET_STD
    mean, std = channel_statistics(source, fmt, size_px=values["image_size"])
    return tuple(round(m, 6) for m in mean), tuple(round(s, 6) for s in std)


def _epochs(values: Mapping[str, Any], count: int) -> float:
    return values["epochs"] if values.get("epochs") else values["max_steps"] * values["batch_size"] / count


def _course(options: PretrainOptions, source: ImageSource) -> Course:
    count = len(source)
    steps_per_epoch = count / options.batch_size
    total = options.max_steps or max(1, round((options.epochs or 1) * steps_per_epoch))
    every = options.eval_every * steps_per_epoch if options.eval_every else max(steps_per_epoch, total / EVALUATIONS)
    return Course(
        total_steps=total,
        images=count,
        batch_size=options.batch_size,
        fingerprint=source.fingerprint(),
        schedule=Schedule(
            peak_lr=options.base_lr * options.batch_size / 256,
            warmup_steps=options.warmup_epochs * steps_per_epoch,
            total_steps=total,
        ),
        clip_grad=options.clip_grad,
        checkpoint_steps=options.checkpoint_steps,
        checkpoint_minutes=options.checkpoint_minutes,
        evaluation_steps=max(1, round(every)),
        evaluation_forced=options.eval_every is not None,
        max_bad_share=options.max_bad_share,
    )


def _composition(options: PretrainOptions) -> Composition:
    return Composition(
        method=options.method,
        model=options.model,
        image_size=options.image_size,
        patch_size=options.patch_size,
        window_size=options.window_size,
        views=options.views,
        mask_ratio=options.mask_ratio,
        mask_layer=options.mask_layer,
        window_layout=options.window_layout,
        batch_size=options.batch_size,
        mean=options.mean,
        std=options.std,
        scale=_pixel_format(options).scale,
    )


def _pixel_format(options: PretrainOptions) -> PixelFormat:
    return PixelFormat(options.channels, options.pixel_type)


def _micro_batch(options: PretrainOptions, hardware: Hardware) -> Choice:
    """Measured: what one image keeps for the backward pass, from the difference of two images and one."""
    method = _composition(options).build()
    rows, columns = method.views.size
    patches = rows * columns
    hidden = torch.arange(patches).expand(1, options.views, -1) < method.mask.count
    corners = torch.zeros(1, options.views, 2, dtype=torch.int64)
    shape = (1, options.views, options.channels, rows * options.patch_size, columns * options.patch_size)
    pixels = torch.zeros(shape, dtype=torch.uint8)

    def kept(images: int) -> int:
        batch = [t.expand(images, *t.shape[1:]) for t in (pixels, corners, hidden)]
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            return saved_bytes(partial(method, *batch))

    weights = sum(p.numel() for p in method.parameters())
    share = -(-options.batch_size // process_count())
    return micro_batch(kept(2) - kept(1), 16 * weights, share, hardware)  # weight, gradient and two moments in float32


def _notes(found: Survey, choices: Mapping[str, Choice], options: PretrainOptions) -> list[str]:
    """What the user should know before it starts."""
    notes = [f"{found.count} images, shorter side {found.median_short_side_px} px (median of {found.probed} read)"]
    if found.unreadable:
        name, reason = found.unreadable[0]
        notes.append(
            f"{len(found.unreadable)} of them cannot be read and will be skipped, for example {name}: {reason}"
        )
    if found.smallest_short_side_px < options.image_size:
        notes.append(
            f"warning: the smallest image's shorter side is {found.smallest_short_side_px} px; "
            f"it will be enlarged to --image-size {options.image_size}"
        )
    chosen = {name: choice for name, choice in choices.items() if choice.value is not None}
    if chosen:
        notes.append("chosen for you (give the option to decide yourself):")
        notes += [f"  {flag(name):<14} {choice.value!s:<10} {choice.reason}" for name, choice in chosen.items()]
    return notes


def _fabric(options: PretrainOptions, hardware: Hardware, processes: int) -> Fabric:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces what the run announces itself
    fabric = Fabric(
        accelerator=hardware.device,
        devices=local,
        num_nodes=max(1, processes // local),
        strategy="ddp" if processes > 1 else "auto",
        precision="bf16-mixed" if options.precision == "bf16" else "32-true",
    )
    fabric.launch()
    return fabric


def _begin(fabric: Fabric, run: Path, options: PretrainOptions, resume: bool) -> None:
    """Make the run's folder; from here on the run exists."""
    fabric.barrier()
    if fabric.is_global_zero:
        try:
            if not resume:
                # The configuration goes last and comes first, so that a folder with anything in it is known as a run.
                for name in reversed(RUN_FILES) if options.overwrite and holds_run(run) else ():
                    _delete(run / name)
                run.mkdir(parents=True, exist_ok=True)
                _write_config(run, options)
            log = open_log(run)
        except OSError as error:
            raise UserError(f"--out {run} cannot be written: {error.strerror}") from error
        log.info("lomar %s, options in %s", __version__, run / CONFIG_FILE)
    fabric.barrier()


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_config(run: Path, options: PretrainOptions) -> None:
    about_this_call = ("config", "resume", "overwrite", "out")
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(options).items() if k not in about_this_call}
    text = yaml.safe_dump(values, sort_keys=False)
    write_atomically(run / CONFIG_FILE, lambda temporary: temporary.write_text(text, encoding="utf-8"))
