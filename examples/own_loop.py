"""ScaleKD in a training loop of your own: a Distiller is a module that returns losses.

    python examples/own_loop.py

Uses random images and random weights, so it runs anywhere in seconds. Replace the lines marked *.
"""

import timm
import torch

import scalekd

student = timm.create_model("test_resnet", num_classes=10)  # *
teacher = timm.create_model("test_vit", num_classes=10, depth=4, img_size=64)  # * pretrained=True

distiller = scalekd.Distiller(
    student,
    teacher,
    losses={"ce": {"weight": 0.5}, "kd": {"weight": 0.5, "temperature": 1.0}, "scalekd": {}},
    image_size=(64, 64),
)
optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)  # the student and the projectors, not the teacher

for step in range(3):
    images = torch.rand(8, 3, 64, 64)  # * pixels in [0, 1]; each model normalises them with its own mean and std
    targets = torch.randint(10, (8,))  # *
    losses = distiller(images, targets)
    losses["total"].backward()
    optimizer.step()
    optimizer.zero_grad()
    print(step, {name: round(value.item(), 3) for name, value in losses.items()})

deployable = student.state_dict()  # the student alone, with timm's parameter names
