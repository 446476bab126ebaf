"""ScaleKD in a loop with Lightning Fabric, on one device or several.

    python examples/fabric_loop.py        or        fabric run --devices 2 examples/fabric_loop.py

Uses random images and random weights, so it runs anywhere in seconds. Replace the lines marked *.
"""

import timm
import torch
from lightning_fabric import Fabric
from torch.utils.data import DataLoader, TensorDataset

import scalekd

fabric = Fabric()
fabric.launch()
student = timm.create_model("test_resnet", num_classes=10)  # *
teacher = timm.create_model("test_vit", num_classes=10, depth=4, img_size=64)  # * pretrained=True
data = TensorDataset(torch.rand(48, 3, 64, 64), torch.randint(10, (48,)))  # * pixels in [0, 1], not normalised

distiller = scalekd.Distiller(student, teacher, losses={"ce": {}, "kd": {}, "scalekd": {}}, image_size=(64, 64))
optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)  # the student and the projectors, not the teacher
# setup moves the teacher too, but does not wrap it: it is no sub-module and has no gradients to average
distiller, optimizer = fabric.setup(distiller, optimizer)
loader = fabric.setup_dataloaders(DataLoader(data, batch_size=8, shuffle=True))

for step, (images, targets) in enumerate(loader):
    losses = distiller(images, targets)
    fabric.backward(losses["total"])
    optimizer.step()
    optimizer.zero_grad()
    fabric.print(step, {name: round(value.item(), 3) for name, value in losses.items()})

deployable = student.state_dict()  # the student alone, with timm's parameter names
