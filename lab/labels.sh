#!/usr/bin/env bash
# Distils a real DINOv2 ViT-S/14 with 10, 100, 1,000 and no labels. Skips what is finished.
set -euo pipefail
cd "$(dirname "$0")/.."
weights=$(realpath "${DINOV2:?the file of vit_small_patch14_dinov2, DINOV2=dinov2.safetensors lab/labels.sh}")
fashion=${FASHION_MNIST:-/usr/share/datasets/fashion-mnist}
run=${SCALEKD:-.venv/bin/scalekd}
export HF_HUB_OFFLINE=1
data=(--data "idx:$fashion/train" --val "idx:$fashion/t10k")

mkdir -p runs/labels
ln -sfn "$weights" runs/labels/dinov2.safetensors
for seed in 0 1 2; do
    for labels in 10 100 1000; do
        out=runs/labels/head-$labels-$seed
        test -f "$out/head.json" || "$run" head vit_small_patch14_dinov2 --weights runs/labels/dinov2.safetensors \
            "${data[@]}" --val-limit 1000 --image-size 56 --crop-pct 1.0 --limit $labels --seed $seed --out "$out"
    done
done
"$(dirname "$run")/python" - <<'END'
import json
from pathlib import Path

# the accuracy of each head on its 1,000 validation images
heads = {p.parent.name: json.loads(p.read_text())["validation"]["after"] for p in sorted(Path("runs/labels").glob("head-*/head.json"))}
Path("docs/results/labels").mkdir(exist_ok=True)
Path("docs/results/labels/heads.json").write_text(json.dumps(heads, indent=2) + "\n")
END
"$run" compare lab/labels.yaml --out docs/results/labels --share-teacher
students=()
for seed in 0 1 2; do
    out=runs/labels/none-$seed
    test -f "$out/summary.json" || "$run" train lab/labels-none.yaml seed=$seed data.seed=$seed --out "$out"
    students+=("$out")
done
"$run" probe "${students[@]}" "${data[@]}" --shots 1,10,100 --draws 5 --out docs/results/labels-none
for run_folder in "${students[@]}"; do
    cp "$run_folder/summary.json" "docs/results/labels-none/$(basename "$run_folder").json"
done
