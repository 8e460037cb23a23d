#!/usr/bin/env bash
# Every check that waits for a GPU, in calls under ten minutes on a machine without network; results go to $OUT.
#
#   bash benchmarks/device.sh speed-224  # LoMaR, LoMaR-late and MAE, ours and of timm's blocks, compiled, 224 px
#   bash benchmarks/device.sh speed-views # DINO and MoCo v3 beside MAE at 224 px
#   bash benchmarks/device.sh speed-448  # the same at 448 px
#   bash benchmarks/device.sh figure-4   # methods against resolution: the paper's Fig. 4
#   bash benchmarks/device.sh figure-5   # LoMaR against window size: the paper's Fig. 5 (right)
#   bash benchmarks/device.sh flat       # a step against resolution at four windows
#   bash benchmarks/device.sh bias       # windows with contextual position and without; attention alone
#   bash benchmarks/device.sh run        # a whole run: automatic choices, bf16, resume, k-NN
#   bash benchmarks/device.sh methods    # every method trains there
#   bash benchmarks/device.sh classifier # fine-tuning and features against timm's plain ViT
#   bash benchmarks/device.sh detector   # a detector at 1024 px: what positions cost; a short training on coco_mini
#   bash benchmarks/device.sh study      # lomar study table1 and late as far as the time goes; call it again to go on
#   bash benchmarks/device.sh downstream # pretrain, then fine-tune, probe, embed and export there
#
# Before the call, on a machine with a package registry, put beside the tree what that machine lacks:
#   pip download -q --no-deps -d .device/wheels timm lightning-fabric lightning-utilities simplejpeg tifffile safetensors \
#       pycocotools
#   python ../shared/tools/shrink_images.py ../shared/data/imagenette .device/imagenette.zip
# and carry .device; for `detector` also `cp -r ../shared/data/coco_mini .device/`. Commit what comes back under benchmarks/results/ with date, hardware and this command.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-.device/out}
mkdir -p "$out"
export PYTHONPATH=src:.device/site
python3 -m pip install -q --no-index --no-deps --target .device/site .device/wheels/*.whl
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/hardware.txt"
python3 -c "import torch; print('torch', torch.__version__)" | tee -a "$out/hardware.txt"
case $1 in run | methods | downstream | study) [ -d .device/imagenette ] ||
    python3 -m zipfile -e .device/imagenette.zip .device/imagenette ;;
esac

# After the time it is interrupted, and leaves what it has measured.
benchmark() { timeout -s INT "$1" python3 -m lomar benchmark "${@:2}" --device cuda --precision bf16 --out "$out" || true; }

case $1 in
speed-224) # The bars at 224 px, and images a second of LoMaR-late.
    benchmark 560 --methods lomar lomar-late mae timm-mae --image-sizes 224 --batch-sizes 512 --compile yes --rounds 2
    ;;
speed-448) # The bars at 448 px, with peak memory.
    benchmark 560 --methods lomar lomar-late mae timm-mae --image-sizes 448 --batch-sizes 128 --compile yes --rounds 2
    ;;
speed-views) # DINO and MoCo v3 beside MAE at 224 px: crops distorted on the device, teachers and all.
    benchmark 560 --methods lomar mae dino mocov3 --image-sizes 224 --batch-sizes 128 --compile yes --rounds 2
    ;;
figure-4) # Not compiled, which would take a minute for each of 16 rows.
    benchmark 570 --batch-sizes 16 --compile no --steps 10 --rounds 2
    ;;
figure-5)
    benchmark 560 windows --batch-sizes 256 --compile no --rounds 2
    ;;
flat) # A step costs the windows, not the image.
    benchmark 400 --methods lomar lomar-late --views 4 --image-sizes 224 448 896 --batch-sizes 256 --compile no \
        --rounds 2
    ;;
bias) # What contextual position costs: a step on windows; attention alone by every backend.
    benchmark 280 --methods lomar lomar:position=none --baseline lomar:position=none --image-sizes 224 --batch-sizes 256 \
        --compile yes
    benchmark 280 attention --batch-sizes 64 --rounds 2
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
    for method in lomar lomar-late mae beit beit-lomar dino mocov3; do
        given=""
        case $method in beit*) given="--tokenizer $out/tokenizer.safetensors" ;; esac
        timeout 60 python3 -m lomar pretrain --data .device/imagenette/train --method "$method" --model base $given \
            --image-size 112 --patch-size 8 --batch-size 256 --max-steps 20 --out ".device/runs/$method" || true
    done
    tar -czf "$out/methods.tar.gz" .device/runs/*/metrics.jsonl .device/runs/*/train.log "$out"/tokenizer.jsonl
    rm -rf .device/runs "$out/tokenizer.safetensors"
    ;;
classifier) # A training step and features of ViT-B/16 at 224 and 448 px: what contextual position costs.
    benchmark 560 classifier --image-sizes 224 448 --batch-sizes 64 --compile yes --rounds 2
    ;;
detector) # Mask R-CNN at 1024 px: contextual position against none, with decomposed positions and without; a training.
    timeout 380 python3 benchmarks/detector.py --device cuda --images 2 --steps 5 --rounds 2 | tee "$out/detector.md" || true
    timeout 180 python3 -m lomar detect --model scratch:small --data .device/coco_mini --image-size 512 --max-steps 300 \
        --out .device/runs/detector | tee "$out/detector.log" || true
    cp .device/runs/detector/metrics.jsonl "$out/detector-metrics.jsonl"
    rm -rf .device/runs
    ;;
study) # ViT-small on 112 px, a cell at a time, so that minutes are its own. What is done stays while the machine is warm.
    for name in table1 late; do
        timeout -s TERM 270 python3 -m lomar study $name --data .device/imagenette --out .device/study --epochs 100 \
            --batch-size 512 --finetune-epochs 30 --bank 500 --jobs 1 || true
    done
    cp .device/study/*.md .device/study/*.json .device/study/*.png "$out" || true
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
