#!/bin/bash
# Eight GPUs of one machine. Edit the two lines below; started again, it goes on where it stopped.
#   bash launch/one-node.sh
GPUS=${GPUS:-8}
RUN=(own-data --data photos --student resnet50 --out runs/photos)

# a process that is killed brings all of them back from the last checkpoint, up to three times
exec torchrun --standalone --nproc-per-node "$GPUS" --max-restarts 3 -m scalekd train "${RUN[@]}" "$@"
