"""`lomar detect --dry-run`: two steps on made-up images, and what it tells of shapes, schedule, time and memory."""

import time

import torch
from torch import Tensor

from lomar.benchmark.memory import PeakMemory
from lomar.commands.detect_settling import SettledDetection, pixel_format
from lomar.detection.backbone import global_blocks
from lomar.detection.detector import Detector, DetectorPlan
from lomar.detection.optim import detector_adamw
from lomar.training.optim import StepSchedule

OBJECTS = 7  # of a made-up image: as many as COCO's have


def rehearse(settled: SettledDetection, schedule: StepSchedule) -> list[str]:
    """Lines on what a run would be; nothing is written.

    Args:
        settled: what it is to do.
        schedule: its learning rates.
    """
    options, device = settled.options, torch.device(settled.hardware.device)
    torch.manual_seed(options.seed)
    detector, done = settled.build()
    detector.to(device).train()
    lines = [*done, *_shapes(detector), *_course(settled, schedule)]
    memory = PeakMemory(device)
    optimizer = detector_adamw(detector, options.weight_decay, options.betas, options.layer_decay)
    inputs = made_up(settled.plan, options.micro_batch, device)
    took_s = []
    for _ in range(2):  # the first one fetches memory
        memory.restart()
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            loss, count = detector(**inputs)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = (loss / count).item()  # waits for the device
        took_s.append(time.perf_counter() - began)
    lines.append(
        f"a step of {options.micro_batch} images of {options.image_size} px in {options.precision}: loss {value:.3f}, "
        f"{took_s[-1]:.2f} s, {memory.bytes / 1e9:.2f} GB at the most on {settled.hardware.name}"
    )
    return lines


def made_up(plan: DetectorPlan, images: int, device: torch.device) -> dict[str, Tensor]:
    """Inputs of a step: noise, with boxes of all sizes."""
    side, fmt = plan.image_size, pixel_format(plan)
    generator = torch.Generator().manual_seed(0)
    count = OBJECTS * images
    corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values * side
    boxes = torch.cat([corners[:, 0], corners[:, 1].clamp(min=corners[:, 0] + 1)], dim=1)
    dtype = getattr(torch, fmt.dtype)
    noise = torch.rand(images, fmt.channels, side, side, generator=generator) * plan.scale
    inputs = {
        "pixels": noise.to(dtype),
        "sizes": torch.full((images, 2), side),
        "boxes": boxes,
        "labels": torch.arange(count) % len(plan.classes),
        "counts": torch.full((images,), OBJECTS),
        "seeds": torch.arange(images),
    }
    if plan.masks:
        inputs["masks"] = torch.ones(count, side, side, dtype=torch.uint8)
    if plan.drop_path:
        inputs["paths"] = torch.rand(images, plan.architecture["depth"], 2, generator=generator)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _shapes(detector: Detector) -> list[str]:
    plan = detector.plan
    rows, columns = detector.backbone.grid
    depth = plan.architecture["depth"]
    everywhere = ", ".join(str(i) for i in global_blocks(depth))
    attention = f"windows of {plan.window}, global in blocks {everywhere} of {depth}" if plan.window else "global"
    side, patch = plan.image_size, plan.architecture["patch_size"]
    maps = ", ".join(f"p{level} {int(side * 2 ** (4 - level) / patch)}" for level in range(2, 7))
    parts = [(name, sum(p.numel() for p in part.parameters())) for name, part in detector.named_children()]
    weights = ", ".join(f"{name} {count / 1e6:.1f}" for name, count in parts)
    return [
        f"backbone: {rows}x{columns} patches of {patch} px, {plan.architecture['embed_dim']} wide",
        f"attention: {attention}",
        f"maps of {plan.channels} channels, side in cells: {maps}",
        f"million weights: {weights}",
    ]


def _course(settled: SettledDetection, schedule: StepSchedule) -> list[str]:
    options, total = settled.options, settled.total_steps
    steps = [0, schedule.warmup_steps, *schedule.milestones, total - 1]
    rates = ", ".join(f"{schedule.lr(min(step, total - 1)):.3g} at {step}" for step in dict.fromkeys(steps))
    epochs = total * options.batch_size / len(settled.train)
    return [
        f"{total} steps of {options.batch_size} images, {epochs:.4g} epochs of {len(settled.train)}",
        f"learning rate: {rates}; {options.layer_decay:g} of it in each layer of the encoder for the one after it",
    ]
