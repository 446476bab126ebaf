#!/bin/bash
# Trains on eight GPUs of one machine. Edit the two lines below. Start it again to resume.
#   bash launch/one-node.sh
GPUS=${GPUS:-8}
RUN=(own-data --data photos --student resnet50 --out runs/photos)

# if a process is killed, all restart from the last checkpoint, up to three times
exec torchrun --standalone --nproc-per-node "$GPUS" --max-restarts 3 -m scalekd train "${RUN[@]}" "$@"
