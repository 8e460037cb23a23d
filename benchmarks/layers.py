"""k-NN accuracy after each block of encoders, beside the random initialisation.

    python benchmarks/layers.py --data DIR --models RUN [RUN ...] [--bank 4000] [--queries 2000]

DIR holds train/ and val/ of class folders. Features are the mean of the patch tokens after the block, normalised by
the encoder's final norm; k = 20, temperature 0.07. Blocks after the mask tokens enter act partly as a decoder, so the
last one need not be the best.
"""

import argparse
import sys

import numpy as np
import torch
from torch import Tensor

import lomar
from lomar.data.decode import PixelFormat
from lomar.data.loader import centre_crops
from lomar.data.sources import ImageSource, labelled_split
from lomar.downstream.knn import knn_top1
from lomar.model import Encoder


def features(encoder: Encoder, source: ImageSource) -> tuple[Tensor, Tensor]:
    """float32 (blocks, N, D) of the readable images, and good bool (N,)."""
    config = encoder.pretrained_cfg or {}
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    size_px = config["input_size"][1]
    blocks, readable = [], []
    for pixels, good in centre_crops(source, PixelFormat(len(mean), "uint8"), size_px, workers=0, batch_size=16):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            maps = encoder.forward_intermediates(
                (pixels / 255 - mean) / std, norm=True, output_fmt="NLC", intermediates_only=True
            )
        blocks.append(torch.stack([tokens.float().mean(1) for tokens in maps]))
        readable.append(good)
    return torch.cat(blocks, 1), torch.cat(readable)


def accuracies(encoder: Encoder, data: str, bank_limit: int, query_limit: int) -> list[float]:
    """Share of queries told right, after each block."""
    split = labelled_split(data, 0, bank_limit, query_limit)
    if split is None:
        raise SystemExit(f"{data} holds no two classes")

    def labelled(source: ImageSource, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        found, good = features(encoder, source)
        return found[:, good], torch.from_numpy(labels)[good]

    bank, bank_labels = labelled(split.bank, split.bank_labels)
    queries, query_labels = labelled(split.queries, split.query_labels)
    return [knn_top1(b, bank_labels, q, query_labels) for b, q in zip(bank, queries, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--bank", type=int, default=4000)
    parser.add_argument("--queries", type=int, default=2000)
    args = parser.parse_args()
    rows = []
    for path in args.models:
        encoder = lomar.load(path)
        if not rows:
            torch.manual_seed(0)
            random = Encoder(num_classes=0, **encoder.architecture).eval()
            random.pretrained_cfg = encoder.pretrained_cfg
            rows.append(("random initialisation", accuracies(random, args.data, args.bank, args.queries)))
        rows.append((path, accuracies(encoder, args.data, args.bank, args.queries)))
    blocks = range(1, len(rows[0][1]) + 1)
    lines = ["| after block | " + " | ".join(map(str, blocks)) + " |", "|---" * (len(blocks) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{100 * a:.1f}" for a in values) + " |" for name, values in rows]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
