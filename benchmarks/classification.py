"""Fine-tuning and feature extraction against timm's plain ViT of the same size, whose attention is fused.

    python benchmarks/classification.py [--model base] [--image-size 224] [--patch-size 16] [--images 8] [--device cpu]

Every model in turn, round after round in one process, so that ratios are of one run; medians. Training is
a step with AdamW and layer-wise rates, without the loader; features are a forward pass without gradients. Data is
synthetic, precision bfloat16 autocast. `none` is our encoder without positions: what the contextual bias costs is the
difference to it.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import nn

from lomar.model import SIZES, Encoder
from lomar.training.optim import layerwise_adamw

CLASSES = 1000


def models(size: str, image_px: int, patch_px: int) -> dict[str, nn.Module]:
    """Name -> a fresh classifier of 1000 classes; all but the positions alike."""
    width, depth, heads = SIZES[size]
    shape = {"img_size": image_px, "patch_size": patch_px, "embed_dim": width, "depth": depth, "num_heads": heads}
    plain = timm.models.VisionTransformer(
        **shape, num_classes=CLASSES, global_pool="avg", fc_norm=True, class_token=True
    )
    ours = {position: Encoder(**shape, num_classes=CLASSES, position=position) for position in ("contextual", "none")}
    return {"timm": plain, "lomar": ours["contextual"], "lomar, no positions": ours["none"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="base", choices=SIZES)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--images", type=int, default=8, help="at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    device = torch.device(args.device)
    synchronise: Callable[[], object] = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    torch.manual_seed(0)
    found = {name: model.to(device) for name, model in models(args.model, args.image_size, args.patch_size).items()}
    optimizers = {name: layerwise_adamw(model, 0.05, (0.9, 0.999), 0.65) for name, model in found.items()}
    images = torch.randn(args.images, 3, args.image_size, args.image_size, device=device)
    targets = torch.full((args.images, CLASSES), 1 / CLASSES, device=device)

    def train(name: str) -> None:
        with torch.autocast(args.device, torch.bfloat16):
            loss = F.cross_entropy(found[name].train()(images), targets)
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    def features(name: str) -> None:
        with torch.inference_mode(), torch.autocast(args.device, torch.bfloat16):
            found[name].eval().forward_features(images)

    took_s: dict[tuple[str, str], list[float]] = {}
    for round_number in range(args.rounds + 1):
        for work in (train, features):
            for name in found:
                began = time.perf_counter()
                work(name)
                synchronise()
                if round_number:  # the first one warms up
                    took_s.setdefault((work.__name__, name), []).append(time.perf_counter() - began)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    sys.stdout.write(
        f"ViT-{args.model}/{args.patch_size} at {args.image_size} px, {args.images} images at once, bfloat16; {where}, "
        f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}; "
        f"median of {args.rounds} rounds\n\n"
        "| model | training step, images/s | against timm | features, images/s | against timm |\n"
        "|---|---|---|---|---|\n"
    )
    for name in found:
        cells = []
        for work in ("train", "features"):
            seconds, plain = (statistics.median(took_s[work, each]) for each in (name, "timm"))
            cells.append(f"{args.images / seconds:.2f} | {plain / seconds:.2f}")
        sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")


if __name__ == "__main__":
    main()
