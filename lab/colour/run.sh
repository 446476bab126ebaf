#!/usr/bin/env bash
# Runs the second laboratory, on colour images with a real DINOv2 teacher; skips what is finished. lab/README.md describes it.
#
#     DINOV2=dinov2.safetensors lab/colour/run.sh [prepare | options of scalekd compare]
#
# prepare: images, teacher's classifier and pre-trained student only. Options: such as --students CNN, --jobs 1
set -euo pipefail
cd "$(dirname "$0")/../.."
weights=$(realpath "${DINOV2:?the file of vit_small_patch14_dinov2, DINOV2=dinov2.safetensors lab/colour/run.sh}")
run=${SCALEKD:-.venv/bin/scalekd}
python=${PYTHON:-.venv/bin/python}
ladders=${LADDERS:-steps-300 newer-300 pre-trained-300 steps-1500 pre-trained-1500 steps-6000}
out=runs/colour
export HF_HUB_OFFLINE=1

mkdir -p $out
ln -sfn "$weights" $out/dinov2.safetensors
test -d $out/python || {
    "$python" -m pip install --quiet --no-deps --require-hashes --requirement lab/colour/requirements.txt --target $out/python.part
    mv $out/python.part $out/python
}
with_packages() { PYTHONPATH="$PWD/$out/python${PYTHONPATH:+:$PYTHONPATH}" "$python" "$@"; }
test -d $out/data || {
    with_packages lab/colour/data.py $out/packages $out/data.part
    mv $out/data.part $out/data
}
test -f $out/efficientnet_lite0.safetensors || with_packages lab/colour/student.py $out/efficientnet_lite0.safetensors
test -f $out/head/head.json || "$run" head vit_small_patch14_dinov2 --weights $out/dinov2.safetensors \
    --data tar:$out/data/train.tar --val tar:$out/data/test.tar --image-size 56 --crop-pct 1.0 --out $out/head
test "${1:-}" != prepare || exit 0
for ladder in $ladders; do
    known=()
    test "$ladder" != newer-300 || known=(--known docs/results/lab-colour/steps-300) # two of its rows
    for seeds in 1 2 3; do # one more each time, so that the disk holds the teacher's outputs of one seed only
        "$run" compare "lab/colour/$ladder.yaml" --out "docs/results/lab-colour/$ladder" --share-teacher --seeds $seeds \
            "${known[@]}" "$@"
    done
done
