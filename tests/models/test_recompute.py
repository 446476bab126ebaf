"""`train.grad_checkpointing`: values, gradients and running statistics are the same, bit for bit; less is saved."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from scalekd.common.errors import UserError
from scalekd.models.recompute import recompute_blocks
from scalekd.models.stages import StageView

IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
STUDENTS = {
    "test_resnet": {},
    "test_efficientnet": {"drop_path_rate": 0.3},
    "test_vit": {"img_size": 64, "drop_path_rate": 0.3, "proj_drop_rate": 0.1},
    "test_convnext": {"drop_path_rate": 0.3},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2), "window_size": 2},
}  # fmt: skip


def randomised(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **STUDENTS[name])
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2)
        for buffer_name, b in model.named_buffers():
            if "running" in buffer_name:
                b.uniform_(0.5, 1.5)
    return model.train()


def step(model: nn.Module, name: str) -> tuple[list[torch.Tensor], int]:
    """Loss, gradients and buffers after a step, and the bytes saved for the backward pass."""
    view = StageView(model, name=name, image_size=(64, 64))
    kept: dict[int, torch.UntypedStorage] = {}
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept.setdefault(storage.data_ptr(), storage)
        return tensor

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = view(IMAGES)
        loss = features.logits.square().mean() + sum(m.float().abs().mean() for m in features.maps)
    loss.backward()
    results = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return results + [b.clone() for b in model.buffers()], sum(s.nbytes() for s in kept.values())


@pytest.mark.parametrize("name", STUDENTS)
def test_the_step_is_the_same_and_saves_less(name):
    plain = randomised(name)
    ours, twin = copy.deepcopy(plain), copy.deepcopy(plain)
    keys = list(ours.state_dict())
    recompute_blocks(ours, "student.model")
    wanted, all_bytes = step(plain, name)
    found, fewer_bytes = step(ours, name)
    assert list(ours.state_dict()) == keys
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted):
        assert torch.equal(a, b)
    assert fewer_bytes < 0.8 * all_bytes
    for buffer_name, before in twin.named_buffers():
        if "num_batches" in buffer_name:
            assert ours.get_buffer(buffer_name) == before + 1


def test_a_copy_runs_its_own_blocks():
    """As the averaged model does, which is a copy of the student."""
    model = randomised("test_resnet")
    recompute_blocks(model, "student.model")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    twin(IMAGES).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert any(p.grad is not None for p in twin.parameters())
    assert model(IMAGES).abs().max() > 0


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match=r"student\.model: timm does not list the blocks of Linear(.|\n)*accumulate"):
        recompute_blocks(nn.Linear(2, 2), "student.model")
