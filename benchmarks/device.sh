#!/usr/bin/env bash
# Every check that waits for a GPU, in calls under ten minutes on a machine without network; results go to $OUT.
#
#   bash benchmarks/device.sh steps      # time and memory of a step against resolution
#   bash benchmarks/device.sh run        # a whole run: automatic choices, bf16, resume, k-NN
#   bash benchmarks/device.sh methods    # every method trains there
#   bash benchmarks/device.sh classifier # fine-tuning and features against timm's plain ViT
#   bash benchmarks/device.sh downstream # pretrain, then fine-tune, probe, embed and export there
#
# Before the call, on a machine with a package registry, put beside the tree what that machine lacks:
#   pip download -q --no-deps -d .device/wheels timm lightning-fabric lightning-utilities simplejpeg tifffile safetensors
#   python ../shared/tools/shrink_images.py ../shared/data/imagenette .device/imagenette.zip
# and carry .device. Commit what comes back under benchmarks/results/ with date, hardware and this command.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-.device/out}
mkdir -p "$out"
export PYTHONPATH=src:.device/site
python3 -m pip install -q --no-index --no-deps --target .device/site .device/wheels/*.whl
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/hardware.txt"
python3 -c "import torch; print('torch', torch.__version__)" | tee -a "$out/hardware.txt"
[ "$1" = steps ] || [ -d .device/imagenette ] || python3 -m zipfile -e .device/imagenette.zip .device/imagenette

case $1 in
steps) # A step costs the windows, not the image: at 224, 448 and 896 px.
    python3 benchmarks/resolution.py --device cuda --images 256 --steps 20 | tee "$out/resolution.md"
    python3 benchmarks/resolution.py --device cuda --images 256 --steps 20 --mask-layer 8 | tee "$out/resolution-late.md"
    ;;
run) # A run on a GPU goes through: automatic choices, bf16, pinned transfers, resume, k-NN rising.
    common="--data .device/imagenette/train --eval-data .device/imagenette --model small --image-size 112 --patch-size 8"
    timeout 240 python3 -m lomar pretrain $common --mask-layer 10 --epochs 40 --batch-size 256 --out "$out/late" || true
    timeout 60 python3 -m lomar pretrain --out "$out/late" --resume || true
    python3 -m lomar reconstruct --model "$out/late" --images .device/imagenette/val --out "$out/late.png"
    cp "$out/late/metrics.jsonl" "$out/late-metrics.jsonl"
    cp "$out/late/figures/curves.png" "$out/late-curves.png"
    rm -rf "$out/late"
    ;;
methods) # Every method trains: losses and images a second of twenty steps; a tokenizer of three hundred.
    timeout 120 python3 -m lomar tokenizer train --data .device/imagenette/train --out "$out/tokenizer.safetensors" \
        --max-steps 300 --width 64 --vocab 1024 || true
    mkdir -p .device/runs
    for method in lomar lomar-late mae beit beit-lomar; do
        given=""
        case $method in beit*) given="--tokenizer $out/tokenizer.safetensors" ;; esac
        timeout 60 python3 -m lomar pretrain --data .device/imagenette/train --method "$method" --model base $given \
            --image-size 112 --patch-size 8 --batch-size 256 --max-steps 20 --out ".device/runs/$method" || true
    done
    tar -czf "$out/methods.tar.gz" .device/runs/*/metrics.jsonl .device/runs/*/train.log "$out"/tokenizer.jsonl
    rm -rf .device/runs "$out/tokenizer.safetensors"
    ;;
classifier) # A training step and features of ViT-B/16 at 224 and 448 px: what contextual position costs.
    python3 benchmarks/classification.py --device cuda --images 128 --rounds 10 | tee "$out/classifier-224.md"
    python3 benchmarks/classification.py --device cuda --images 32 --rounds 10 --image-size 448 | tee "$out/classifier-448.md"
    ;;
downstream) # What an encoder is for goes through on a GPU: automatic choices, bf16, resume.
    data=.device/imagenette
    timeout 150 python3 -m lomar pretrain --data $data/train --model small --image-size 112 --patch-size 8 --mask-layer 10 \
        --epochs 20 --batch-size 256 --out .device/runs/pre || true
    timeout 120 python3 -m lomar finetune --model .device/runs/pre --data $data --out .device/runs/tuned --epochs 10 || true
    timeout 60 python3 -m lomar finetune --out .device/runs/tuned --resume || true
    python3 -m lomar evaluate --model .device/runs/tuned --data $data --out "$out/judged"
    python3 -m lomar knn --model .device/runs/pre --data $data --out "$out/knn.json"
    timeout 90 python3 -m lomar probe --model .device/runs/pre --data $data --out "$out/probe"
    python3 -m lomar embed --model .device/runs/pre --data $data/val --out .device/runs/val.safetensors | tee "$out/embed.txt"
    python3 -m lomar export --model .device/runs/tuned --to hub-folder --out .device/runs/hub | tee "$out/export.txt"
    cp .device/runs/tuned/metrics.jsonl "$out/tuned-metrics.jsonl"
    rm -rf .device/runs "$out"/probe/*.safetensors
    ;;
esac
