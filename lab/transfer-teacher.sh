#!/usr/bin/env bash
# Trains detectors and a segmenter alone and beside a frozen DINOv2, on coloured scenes: equal budgets, five seeds.
# Skips what is finished. Call it as
#     DINOV2=dinov2.safetensors lab/transfer-teacher.sh
# with the weights of vit_small_patch14_dinov2. SEEDS="0 1", TASKS="detect retinanet segment" and STARTS="alone mlp cap"
# choose what is trained.
set -euo pipefail
weights=$(realpath "${DINOV2:?the file of vit_small_patch14_dinov2, DINOV2=dinov2.safetensors lab/transfer-teacher.sh}")
cd "$(dirname "$0")/.."
run=${SCALEKD:-.venv/bin/scalekd}
python=$(dirname "$run")/python
export HF_HUB_OFFLINE=1

all=runs/transfer-teacher
test -f $all/scenes/scenes.json || "$python" -m scalekd.transfer.synthetic_scenes $all/scenes \
    --train 800 --val 200 --size 96 --items 2 4 --scales 0.75 1 1.5 --background textured --rgb
ln -sfn "$weights" $all/dinov2.safetensors
for seed in ${SEEDS:-0 1 2 3 4}; do
    for task in ${TASKS:-detect segment}; do
        for start in ${STARTS:-alone mlp}; do
            case $start in
                alone) teacher=(teacher=null) ;;
                *) teacher=(teacher.projector=$start) ;;
            esac
            case $task in retinanet) command=detect ;; *) command=$task ;; esac
            out=$all/$task-$start-$seed
            test -f "$out/summary.json" ||
                "$run" $command train lab/transfer-teacher-$task.yaml seed="$seed" "${teacher[@]}" --out "$out"
        done
    done
done
"$python" lab/transfer.py teachers $all docs/results/transfer-teacher
