#!/bin/bash
# Trains on several nodes. Run the same command on each, with its number, the first node's address and a free port there.
#   NODE=0 bash launch/several-nodes.sh      on 10.0.0.1
#   NODE=1 bash launch/several-nodes.sh      on 10.0.0.2
NODES=${NODES:-4}
NODE=${NODE:?set NODE to the number of this node, from 0}
GPUS=${GPUS:-8}
FIRST=${FIRST:-10.0.0.1:29500}
RUN=(imagenet-swin-l-resnet50-advanced --data /data/imagenet --out /shared/runs/resnet50) # a folder that all nodes share

exec torchrun --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node "$GPUS" \
    --master-addr "${FIRST%:*}" --master-port "${FIRST#*:}" -m scalekd train "${RUN[@]}" "$@"
