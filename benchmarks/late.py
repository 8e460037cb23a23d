"""What later and fewer mask tokens cost and what they keep: LoMaR's settings pretrained alike, then judged three ways.

    python benchmarks/late.py --data imagenette --out late [--seeds 0 1 2] [--epochs 6]

Each setting is pretrained on train/ for equal epochs with each seed, then judged on val/: by k-NN and by a linear probe
of frozen features with 300 labels of each class (the probe's layer and rate are chosen on a tenth of those that is held
out), and by fine-tuning with 100 labels of each class. Seeds come one by one, so that a run that is cut has whole
rows; what is done is not done again. A table of means and standard deviations ends it; `--settings` without names
prints that of what there is.
"""

import argparse
import csv
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = "--model 128x6x4 --image-size 56 --patch-size 4 --batch-size 64 --workers 0 --eval-every 1000"
BANK_OF_CLASS = 300  # training photographs of each class, for k-NN and probe
LABELS_OF_CLASS = 100  # for fine-tuning
# name -> options beside the paper's; a depth of 6 makes block 4 what 8 is of 12, and 5 what 10 is
SETTINGS = {
    "late 5, half": "--mask-layer 5 --predict-share 0.5",
    "paper": "",
    "late 4, half": "--mask-layer 4 --predict-share 0.5",
    "late 4, all": "--mask-layer 4",
    "late 5, all": "--mask-layer 5",
    "late 5, quarter": "--mask-layer 5 --predict-share 0.25",
    "late 5, half, uniform": "--mask-layer 5 --predict-share 0.5 --predict-choice uniform",
}


def lomar(*words: str) -> str:
    """What a command of lomar prints."""
    command = [sys.executable, "-m", "lomar", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def some_labels(data: Path, count: int, table: Path) -> None:
    """A .csv of some training photographs of each class, and all of val/ to judge by."""
    chance = random.Random(0)
    rows = [("path", "label", "split")]
    for folder in sorted((data / "train").iterdir()):
        files = sorted(folder.iterdir())
        rows += [(str(file.resolve()), folder.name, "train") for file in chance.sample(files, count)]
    rows += [(str(file.resolve()), file.parent.name, "val") for file in sorted((data / "val").glob("*/*"))]
    with table.open("w", newline="") as out:
        csv.writer(out).writerows(rows)


def cell(setting: str, seed: int, epochs: str, data: Path, out: Path) -> dict[str, Any]:
    """One setting, pretrained with one seed and judged."""
    name = re.sub(r"\W+", "-", setting)
    run = out / f"{name}-{seed}"
    began = time.monotonic()
    given = f"{MODEL} --epochs {epochs} --seed {seed} {SETTINGS[setting]}".split()
    resume = ["--resume"] if (run / "config.yaml").exists() else [*given, "--data", str(data / "train")]
    lomar("pretrain", "--out", str(run), *resume)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result: dict[str, Any] = {
        "setting": setting,
        "seed": seed,
        "pretraining_s": rows[-1]["elapsed_s"],
        "loss": statistics.mean([row["loss"] for row in rows if "loss" in row][-50:]),
        "sitting_s": time.monotonic() - began,
    }
    judged = run / "judged"
    bank = str(out / "bank.csv")
    lomar("knn", "--model", str(run), "--data", bank, "--layers", "5", "6", "--out", f"{judged}.json", "--workers", "0")
    result["knn"] = json.loads(Path(f"{judged}.json").read_text())["results"]
    lomar("probe", "--model", str(run), "--data", bank, "--out", str(judged), "--overwrite", "--workers", "0",
          "--features", "pooled")  # fmt: skip
    result["probe"] = json.loads((judged / "probe.json").read_text())["chosen"]
    tuned = run / "tuned"
    few = str(out / "few.csv")
    lomar("finetune", "--model", str(run), "--data", few, "--out", str(tuned), "--epochs", "6", "--eval-every", "6",
          "--batch-size", "32", "--workers", "0", "--seed", str(seed), "--overwrite")  # fmt: skip
    rows = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    result["finetuned"] = rows[-1]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="train/ and val/ of class folders")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", default="6")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    some_labels(args.data, BANK_OF_CLASS, args.out / "bank.csv")
    some_labels(args.data, LABELS_OF_CLASS, args.out / "few.csv")
    results = args.out / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for seed in args.seeds:
        for setting in args.settings:
            if any((each["setting"], each["seed"]) == (setting, seed) for each in done):
                continue
            with results.open("a") as out:
                out.write(json.dumps(cell(setting, seed, args.epochs, args.data, args.out)) + "\n")
    print(table([json.loads(line) for line in results.read_text().splitlines()]))  # noqa: T201


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: a row for each setting, the mean over its seeds and, in brackets, the standard deviation."""
    values: dict[str, Callable[[dict[str, Any]], float]] = {
        "pretraining, min": lambda cell: cell["pretraining_s"] / 60,
        "k-NN, last block": lambda cell: 100 * cell["knn"][1]["top1"],
        "k-NN, one before": lambda cell: 100 * cell["knn"][0]["top1"],
        "linear probe": lambda cell: 100 * cell["probe"]["val"]["top1"],
        "fine-tuned": lambda cell: 100 * cell["finetuned"]["top1"],
    }
    lines = [f"| setting | seeds | {' | '.join(values)} |", "|---|---|" + "---|" * len(values)]
    for setting in SETTINGS:
        rows = [cell for cell in cells if cell["setting"] == setting]
        found = [[value(row) for row in rows] for value in values.values()]
        if rows:
            shown = [f"{statistics.mean(each):.1f}" + _deviation(each) for each in found]
            lines.append(f"| {setting} | {len(rows)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _deviation(values: list[float]) -> str:
    return f" ({statistics.stdev(values):.1f})" if len(values) > 1 else ""


if __name__ == "__main__":
    main()
