"""Arithmetic of a run on many machines: what a step computes and sends, an epoch, and what must be read for it.

    python benchmarks/plan.py [--images 1e8] [--machines 1 8 64] [--batch-size 16384] [--image-mb 0.04] ...

Nothing is measured here: hardware is given by its peak and the share of it that is hoped for; gradients go around a
ring once a step and overlap with nothing. Prints tables.
"""

import argparse

from lomar.methods.composition import Composition
from lomar.methods.cost import step_flops, trained_parameters
from lomar.methods.recipes import IMAGENET_MEAN, IMAGENET_STD, RECIPES, compose, mask_layer_for
from lomar.model.encoder import SIZES

GPUS = 8  # of a machine


def composition(method: str, model: str) -> Composition:
    """A recipe's method at another size, 224 px."""
    recipe = RECIPES[method]
    values = {"method": method, "mean": IMAGENET_MEAN, "std": IMAGENET_STD} | dict(recipe.full) | dict(recipe.options)
    values |= {"model": model, "patch_size": 14 if model == "huge" else 16}
    values["mask_layer"] = mask_layer_for(values.get("mask_layer", 0), SIZES[model][1])
    return compose(values, vocab=0, scale=255.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=float, default=1e8)
    parser.add_argument("--machines", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--batch-size", type=int, default=16384)
    parser.add_argument("--image-mb", type=float, default=0.04, help="of a prepared image")
    parser.add_argument("--tflops", type=float, default=989, help="peak of a GPU, bfloat16")
    parser.add_argument("--share", type=float, default=0.4, help="of that peak")
    parser.add_argument("--gbit", type=float, default=400, help="of a GPU's network connection")
    parser.add_argument("--core", type=float, default=1100, help="images a second that a core reads and crops")
    args = parser.parse_args()
    columns = (
        "method | model | machines | images a GPU | computed, ms | sent, ms | images/s | an epoch | cores a machine"
    )
    print(f"| {columns} | read, MB/s a machine |\n|{'---|' * 10}")  # noqa: T201
    for method in ("lomar", "lomar-late"):
        for model in ("base", "large", "huge"):
            c = composition(method, model)
            flops, weights = step_flops(c), trained_parameters(c)
            for machines in args.machines:
                count = machines * GPUS
                computed_s = args.batch_size / count * flops / (args.tflops * 1e12 * args.share)
                sent_s = 2 * 4 * weights / (args.gbit / 8 * 1e9) if machines > 1 else 0.0  # within one: NVLink
                rate = args.batch_size / (computed_s + sent_s)
                minutes = args.images / rate / 60
                cells = (
                    f"{method} | {model} | {machines} | {args.batch_size // count} | {1000 * computed_s:.0f} | "
                    f"{1000 * sent_s:.0f} | {rate:,.0f} | {minutes:.1f} min | {rate / machines / args.core:.0f} | "
                    f"{rate / machines * args.image_mb:,.0f}"
                )
                print(f"| {cells} |")  # noqa: T201


if __name__ == "__main__":
    main()
