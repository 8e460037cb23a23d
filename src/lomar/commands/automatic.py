"""What is chosen when an option is not given, from the data and the hardware, each with its reason.

The rules are plain functions of numbers, so that a reader can check them and a test can fix them.
"""

import contextlib
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lomar.data.decode import PixelFormat
from lomar.errors import UserError
from lomar.launch import launched
from lomar.model.encoder import size_of

PAPER_BASE_LR = 1.5e-4  # for 256 images, at batch 4096 (section 6.1)
SHORT_RUN_LR = 1e-3  # of an optimiser step; the paper's rate is for hundreds of thousands of steps


@dataclass(frozen=True)
class Hardware:
    """What the run computes on.

    Args:
        device: "cpu" or "cuda".
        name: what it calls itself.
        memory_bytes: free memory of one device.
        cores: processor cores for each process.
        bf16: whether it multiplies bfloat16 natively.
    """

    device: str
    name: str
    memory_bytes: int
    cores: int
    bf16: bool


@dataclass(frozen=True)
class Choice:
    """A value and why."""

    value: Any
    reason: str


def find_hardware(device: str) -> Hardware:
    """The hardware behind "auto", "cpu" or "cuda", shared with the other processes of this machine.

    Raises:
        UserError: there is no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch finds no usable GPU here; it can be cpu")
    launch = launched()
    local = launch.local_count
    cores = max(1, _cores() // local)
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        number = launch.local_rank % torch.cuda.device_count()
        free, _ = torch.cuda.mem_get_info(number)
        return Hardware("cuda", torch.cuda.get_device_name(number), free, cores, torch.cuda.is_bf16_supported())
    capability = torch.backends.cpu.get_cpu_capability()
    return Hardware("cpu", f"CPU ({capability})", _available_bytes() // local, cores, _cpu_has_bf16())


def _cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _available_bytes() -> int:
    """Memory that can be had without swapping: the kernel's estimate, within a container's limit.

    8 GB where the system does not say (outside Linux).
    """
    limits = []
    for path, pattern, unit in (
        ("/proc/meminfo", r"MemAvailable:\s+(\d+)", 1024),
        ("/sys/fs/cgroup/memory.max", r"(\d+)", 1),
    ):
        with contextlib.suppress(OSError):
            if found := re.search(pattern, Path(path).read_text()):
                limits.append(int(found[1]) * unit)
    return min(limits, default=8 * 10**9)


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself: AVX-512 BF16 or AMX on x86, else what oneDNN says."""
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def choose(
    given: Mapping[str, Any],
    count: int,
    short_side_px: int,
    fmt: PixelFormat,
    hw: Hardware,
    paper_lr: float = PAPER_BASE_LR,
) -> dict[str, Choice]:
    """Name -> choice for each automatic option that is not in `given`.

    Args:
        given: options that flags, --config and the recipe set.
        count: images.
        short_side_px: median shorter side of the images.
        fmt: their channels and type.
        hw: where the run computes.
        paper_lr: base rate of the method's full run.
    """
    gpu = hw.device == "cuda"
    choices: dict[str, Choice] = {}

    def settle(name: str, value: Any, reason: str) -> Any:
        if name in given:
            return given[name]
        choices[name] = Choice(value, reason)
        return value

    settle("device", hw.device, hw.name)
    settle("precision", "bf16" if hw.bf16 else "fp32", "fast here" if hw.bf16 else "this hardware is slow in bfloat16")
    settle("channels", fmt.channels, f"the images have {fmt.channels}")
    pixel_type = settle("pixel_type", fmt.dtype, "the images'")
    channels = given.get("channels", fmt.channels)
    if "mean" in given and "std" in given:
        settle("statistics", "data", "")
    elif channels == 3 and pixel_type == "uint8":
        settle("statistics", "imagenet", "8-bit colour")
    else:
        settle("statistics", "data", f"{channels} channels of {pixel_type}: estimated from the images")
    model = settle("model", *_model(count, gpu))
    if given.get("architecture") == "encoder-decoder":
        for name, value, reason in decoder_for(size_of(model)[0]):
            settle(name, value, reason)
    elif "architecture" in given:
        choices |= {name: Choice(value, "") for name, value, _ in decoder_for(768) if name not in given}
    image_size, patch_size = image_and_patch(given, short_side_px, gpu)
    settle("image_size", *image_size)
    settle("patch_size", *patch_size)
    batch = settle("batch_size", *_batch_size(count, gpu))
    rate = min(8e-3, max(paper_lr, SHORT_RUN_LR * 256 / batch))
    reason = "the paper's" if rate == paper_lr else f"{rate * batch / 256:.1e} a step; the paper's is for long runs"
    settle("base_lr", float(f"{rate:.3g}"), reason)
    if "max_steps" in given:
        choices["epochs"] = Choice(None, "--max-steps is given")
    else:
        settle("epochs", *_epochs(count, gpu))
    reason = f"{hw.cores} cores" + ("" if gpu else ", which the model needs too")
    settle("workers", loading_workers(hw.cores, gpu), reason)
    settle("compile", *compiling(gpu, given.get("strategy", "ddp")))
    return choices


def compiling(gpu: bool, strategy: str = "ddp") -> tuple[str, str]:
    """Whether the training step is compiled: on a GPU, where what that needs is there."""
    if strategy == "fsdp":
        return "no", "weights are spread over the processes"
    if not gpu:
        return "no", "a few per cent at most on a CPU"  # docs/performance.md
    if lacking := lacking_to_compile("cuda"):
        return "no", f"that takes {lacking}"
    return "yes", "faster on a GPU; the first step with each size of micro-batch takes a minute or two"


def lacking_to_compile(device: str) -> str:
    """What torch.compile needs on a device and does not find; "" where all is there."""
    compilers = ("CXX", "g++", "clang++") if device == "cpu" else ("CC", "gcc", "clang", "cc")
    variable, *names = compilers
    wanted = [os.environ[variable]] if os.environ.get(variable) else names
    if not any(map(shutil.which, wanted)):
        return f"a compiler ({' or '.join(wanted)})"
    if device == "cuda" and find_spec("triton") is None:
        return "Triton"
    if device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (7, 0):
        return "a GPU of compute capability 7.0 or more"
    return ""


def check_compile(asked: Mapping[str, Any], hw: Hardware) -> None:
    """Refuse --compile yes where that cannot be.

    Raises:
        UserError: something is missing, or weights are spread over the processes.
    """
    if asked.get("compile") == "yes" and asked.get("strategy") == "fsdp":
        raise UserError("--compile is yes, which --strategy fsdp does not go with; it can be no")
    if asked.get("compile") == "yes" and (lacking := lacking_to_compile(hw.device)):
        raise UserError(f"--compile is yes, which takes {lacking}, not found here; it can be no")


def loading_workers(cores: int, gpu: bool) -> int:
    """Processes that read images, of each process that trains and has so many cores."""
    return min(16, max(1, cores - 1)) if gpu else min(2, cores // 2)


def _model(count: int, gpu: bool) -> tuple[str, str]:
    if not gpu:
        return "tiny", "no GPU"
    size = "tiny" if count < 5_000 else "small" if count < 200_000 else "base"
    return size, f"{count} images"


def decoder_for(width: int) -> list[tuple[str, int, str]]:
    """MAE's decoder for a base encoder; about two thirds as wide as a smaller one, and less deep."""
    small = max(1, round(width * 2 / 3 / 32))  # heads of 32
    values = (512, 8, 16) if width >= 768 else (256, 8, 8) if width >= 384 else (32 * small, 4, small)
    reason = "MAE's" if width >= 768 else f"for an encoder {width} wide; MAE's 512 x 8 is for one of 768"
    names = ("decoder_width", "decoder_depth", "decoder_heads")
    return [(name, value, reason) for name, value in zip(names, values, strict=True)]


def image_and_patch(given: Mapping[str, Any], short_side_px: int, gpu: bool) -> tuple[tuple[int, str], tuple[int, str]]:
    """Crop and patch side: a grid of about 14 patches, as in the paper, and no needless enlargement."""
    if "image_size" in given and "patch_size" in given:
        return (given["image_size"], ""), (given["patch_size"], "")
    if "image_size" in given:
        image = given["image_size"]
        return (image, ""), (_patch_for(image), _grid_text(image))
    if "patch_size" in given:
        patch = given["patch_size"]
        return (14 * patch, "a grid of 14x14 patches, as in the paper"), (patch, "")
    wanted = 224 if gpu else 112
    image = next((side for side in (224, 112, 56, 28) if side <= min(wanted, short_side_px)), 28)
    why = f"the images' shorter side is {short_side_px} px"
    if image == wanted:
        why = "the paper's" if gpu else "no GPU: a small crop reads fast; a step costs the windows alone"
    return (image, why), (_patch_for(image), _grid_text(image))


def _grid_text(image: int) -> str:
    grid = image // _patch_for(image)
    return f"a grid of {grid}x{grid} patches" + (", as in the paper" if grid == 14 else "")


def _patch_for(image: int) -> int:
    """The patch side that divides the crop into a grid nearest to 14x14, 16 px at most.

    Raises:
        UserError: the crop divides into tiny patches alone.
    """
    fits = [p for p in range(1, 17) if image % p == 0 and image // p >= 7]
    best = min(fits, key=lambda p: abs(image // p - 14), default=0)
    if not fits or (best < 8 and image // best > 28):
        near = max(14, round(image / 14) * 14)
        raise UserError(f"--image-size {image} divides into no useful patches; {near} would, or give --patch-size")
    return best


def _batch_size(count: int, gpu: bool) -> tuple[int, str]:
    """A power of two, about 40 steps an epoch, within bounds."""
    # On a processor a run is short, and many small steps learn more in it than few large ones.
    least, most, steps = (32, 4096, 40) if gpu else (32, 64, 150)
    size = min(most, max(least, 2 ** round(math.log2(max(1, count / steps)))))
    return size, "the largest worth its time here" if size == most else f"{count} images"


def _epochs(count: int, gpu: bool) -> tuple[float, str]:
    """Passes over the data: small data recurs more often; a processor gets what it can do in an hour or two."""
    passes, least, most = (1600, 200_000, 400 * 1_281_167) if gpu else (30, 4_800, 300_000)
    seen = min(max(passes * count, least), most)
    epochs = round(seen / count) if seen >= 10 * count else round(seen / count, 3)
    return epochs, f"{round(epochs * count):,} crops in all"


def micro_batch(per_image_bytes: int, fixed_bytes: int, share: int, hw: Hardware, whole: bool = False) -> Choice:
    """Images per forward pass: the largest even split of a process's share that fits half of the free memory.

    Args:
        per_image_bytes: what the backward pass keeps for one image.
        fixed_bytes: weights, gradients and optimiser state.
        share: images of a step that one process handles.
        hw: where the run computes.
        whole: whether a split costs more than that, since each part is worked out twice.
    """
    room = max(1, (hw.memory_bytes // 2 - fixed_bytes) // max(1, per_image_bytes))
    # Beyond this a larger pass is no faster: a GPU is full, a processor's caches are not helped.
    most = share if whole else 256 if hw.device == "cuda" else 16
    passes = math.ceil(share / max(1, min(room, most)))
    kept = f"{per_image_bytes / 1e6:.0f} MB each, {hw.memory_bytes / 1e9:.0f} GB free"
    return Choice(math.ceil(share / passes), f"{passes} forward pass{'es' * (passes > 1)} a step; {kept}")
