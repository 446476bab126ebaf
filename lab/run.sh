#!/usr/bin/env bash
# Runs the laboratory; skips what is finished. Each line is a separate command.
set -euo pipefail
cd "$(dirname "$0")/.."
fashion=${FASHION_MNIST:-/usr/share/datasets/fashion-mnist}
run=${SCALEKD:-.venv/bin/scalekd}
python=${PYTHON:-.venv/bin/python}
export HF_HUB_OFFLINE=1

test -d runs/lab/data || "$python" lab/data.py "$fashion" runs/lab/data
(cd runs/lab/data && sha256sum --check --quiet ../../../lab/data.sha256)
for teacher in teacher teacher-small teacher-middle; do # delete a folder in lab/ to train that teacher again
    out=runs/lab/$teacher
    test -d "$out" || ! test -d "lab/$teacher" || cp -r "lab/$teacher" "$out"
    test -f "$out/summary.json" || "$run" train "lab/$teacher.yaml" --out "$out"
done
known=()
for ladder in rates vit-rates search edges ladder forms narrow grouped precision beta methods cnn-methods pitfall sizes vit; do
    "$python" lab/ladders.py
    "$run" compare "lab/$ladder.yaml" --out "docs/results/lab/$ladder" --share-teacher "${known[@]}"
    known+=(--known "docs/results/lab/$ladder")
done
for ladder in newer-search newer-edges newer label-free vit-search newer-vit; do
    "$python" lab/newer.py
    "$run" compare "lab/$ladder.yaml" --out "docs/results/lab/$ladder" --share-teacher "${known[@]}"
    known+=(--known "docs/results/lab/$ladder")
done
"$python" lab/measure.py docs/results/lab/ladder
for ladder in ladder beta methods cnn-methods pitfall sizes vit; do
    "$python" lab/order.py "docs/results/lab/$ladder"
done
