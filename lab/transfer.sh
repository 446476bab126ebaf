#!/usr/bin/env bash
# Trains a segmenter and a detector on a distilled, a supervised and an untrained backbone: equal budgets, three seeds.
# Skips what is finished.
set -euo pipefail
cd "$(dirname "$0")/.."
run=${SCALEKD:-.venv/bin/scalekd}
python=$(dirname "$run")/python
export HF_HUB_OFFLINE=1

# backbones: the demo's students with the same seeds, from ScaleKD and without a teacher
demo=${DEMO:-runs/demo-5-seeds}
test -f "$demo/summary.json" || "$run" demo --seeds 5 --out "$demo"
test -f runs/transfer/scenes/scenes.json || "$python" -m scalekd.transfer.synthetic_scenes runs/transfer/scenes \
    --train 800 --val 200 --size 96 --items 2 4 --scales 0.75 1 1.5
for seed in 0 1 2; do
    for task in segment detect; do
        for start in distilled supervised scratch; do
            case $start in
                distilled) backbone=(--backbone "$demo/scalekd-seed$seed") ;;
                supervised) backbone=(--backbone "$demo/baseline-seed$seed") ;;
                # the same architecture with random weights
                scratch) backbone=(backbone.model="$demo/baseline-seed$seed" backbone.weights=random) ;;
            esac
            out=runs/transfer/$task-$start-$seed
            test -f "$out/summary.json" || "$run" $task train lab/transfer-$task.yaml seed=$seed "${backbone[@]}" --out "$out"
        done
    done
done
"$python" lab/transfer.py backbones runs/transfer docs/results/transfer
