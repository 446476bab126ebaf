"""Four maps of any backbone: their grids, what they are made of, and that gradients come through."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from scalekd.common.errors import UserError
from scalekd.transfer.pyramid import Pyramid, SimplePyramid, any_size_kwargs

FIVE = [
    ("resnet50", [256, 512, 1024, 2048], "conv1.weight"),
    ("swin_tiny_patch4_window7_224", [96, 192, 384, 768], "patch_embed.proj.weight"),
    ("convnext_tiny", [96, 192, 384, 768], "stem.0.weight"),
    ("vit_base_patch16_224", [192, 384, 768, 768], "patch_embed.proj.weight"),
    ("mixer_s16_224", [128, 256, 512, 512], "stem.proj.weight"),
]


def grids(maps: list[torch.Tensor]) -> list[tuple[int, ...]]:
    return [tuple(m.shape[-2:]) for m in maps]


@pytest.mark.usefixtures("cheap_initial_values")
@pytest.mark.parametrize(("name", "channels", "first"), FIVE)
def test_the_maps_of_the_papers_students_and_the_gradient_in_every_parameter(name, channels, first):
    torch.manual_seed(0)
    fixed = name.startswith("mixer")
    kwargs = {"img_size": 64} if fixed else any_size_kwargs(name)
    pyramid = Pyramid(timm.create_model(name, **kwargs), (64, 64)).train()
    assert pyramid.strides == [4, 8, 16, 32] and pyramid.channels == channels
    assert pyramid.canvas == ((64, 64) if fixed else None)

    maps = pyramid(torch.randn(2, 3, 64, 64) if fixed else torch.randn(2, 3, 64, 96))
    assert [m.shape[1] for m in maps] == channels
    assert grids(maps) == ([(16, 16), (8, 8), (4, 4), (2, 2)] if fixed else [(16, 24), (8, 12), (4, 6), (2, 3)])
    torch.stack([(m * torch.randn_like(m)).sum() for m in maps]).sum().backward()
    without = [n for n, p in pyramid.named_parameters() if p.grad is None]
    assert not without
    assert pyramid.backbone.get_parameter(first).grad.abs().sum() > 0


def test_a_cnn_gives_its_own_stages():
    model = timm.create_model("test_resnet").eval()
    apart = timm.create_model("test_resnet", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    apart.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 96)
    maps = Pyramid(model, (64, 64)).eval()(x)
    for ours, theirs in zip(maps, apart(x)):
        assert torch.equal(ours, theirs)


def test_a_cnn_with_dilated_stages_gives_its_own_maps_and_pools_the_coarser_ones():
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", output_stride=8).eval()
    x = torch.randn(1, 3, 50, 72)
    raw = model.forward_intermediates(F.pad(x, (0, 0, 0, 6)), intermediates_only=True)  # strides 2, 4, 8, 8, 8
    pyramid = Pyramid(model, (64, 64)).eval()
    maps = pyramid(x)
    assert pyramid.channels == [m.shape[1] for m in maps] == [64, 512, 512, 512]
    assert grids(maps) == [(13, 18), (7, 9), (4, 5), (2, 3)]
    assert torch.equal(maps[0], raw[1][..., :13, :18]) and torch.equal(maps[1], raw[4])
    assert torch.equal(maps[2], F.max_pool2d(raw[4], 2, ceil_mode=True))
    assert torch.equal(maps[3], F.max_pool2d(raw[4], 4, ceil_mode=True))
    torch.stack([m.sum() for m in pyramid.train()(x)]).sum().backward()
    assert all(p.grad is not None for p in pyramid.parameters())


def test_a_vit_of_patch_4_is_pooled_from_its_last_map():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=2, **any_size_kwargs("test_vit"))
    pyramid = Pyramid(model.eval(), (32, 32)).eval()
    maps = pyramid(torch.randn(1, 3, 32, 40))
    assert grids(maps) == [(8, 10), (4, 5), (2, 3), (1, 2)] and pyramid.channels == [192] * 4
    assert torch.equal(maps[1], F.max_pool2d(maps[0], 2, ceil_mode=True))


def test_the_maps_of_a_model_without_batch_norm_are_normalised():
    model = timm.create_model("test_convnext").eval()
    x = torch.randn(1, 3, 64, 64)
    raw = model.forward_intermediates(x, intermediates_only=True)
    for ours, theirs in zip(Pyramid(model, (64, 64))(x), raw[-4:]):
        wanted = F.layer_norm(theirs.permute(0, 2, 3, 1), theirs.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours, wanted)


def test_a_plain_vits_maps_come_from_its_last_one():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", **any_size_kwargs("test_vit")).eval()
    x = torch.randn(1, 3, 64, 96)
    (raw,) = model.forward_intermediates(x, indices=1, intermediates_only=True)
    pyramid = Pyramid(model, (160, 160)).eval()
    maps = pyramid(x)
    last = F.layer_norm(raw.permute(0, 2, 3, 1), (64,), eps=1e-6).permute(0, 3, 1, 2)
    torch.testing.assert_close(maps[2], last)  # stride 16 is the patch
    torch.testing.assert_close(maps[3], last.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2)))
    up = pyramid.simple.levels[1][0]  # stride 8: every cell becomes 2x2 by a matrix of its own
    wanted = torch.einsum("bdhw,dcij->bchiwj", last, up.weight).reshape(1, 32, 8, 12) + up.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(maps[1], wanted)
    assert maps[0].shape == (1, 16, 16, 24)


@pytest.mark.parametrize(
    ("patch", "channels"),
    [(8, [32, 64, 64, 64]), (16, [16, 32, 64, 64]), (32, [8, 16, 32, 64]), (14, [16, 32, 64, 64])],
)
def test_simple_pyramid_of_any_patch(patch, channels):
    pyramid = SimplePyramid(64, patch)
    assert pyramid.channels == channels
    maps = pyramid(torch.randn(1, 64, -(-224 // patch), -(-448 // patch)))
    for m, width, stride in zip(maps, channels, (4, 8, 16, 32)):
        assert m.shape[1] == width and m.shape[2] >= 224 / stride and m.shape[3] >= 448 / stride


def test_patch_14_is_resampled_without_moving_anything():
    along = 14 * (torch.arange(16) + 0.5)  # the pixel at the middle of each cell
    x = along.expand(1, 1, 16, 16)
    level = SimplePyramid(8, 14)
    level.levels = nn.ModuleList([nn.Identity()])
    (resampled,) = level(x)
    middles = 16 * (torch.arange(14) + 0.5)
    torch.testing.assert_close(resampled[0, 0, 3, 1:13], middles[1:13])
    assert resampled.shape[-1] * 16 >= 16 * 14


def test_other_sizes_are_padded_and_cropped():
    pyramid = Pyramid(timm.create_model("test_resnet"), (64, 64)).eval()
    x = torch.randn(1, 3, 50, 70)
    maps, whole = pyramid(x), pyramid(F.pad(x, (0, 26, 0, 14)))
    assert grids(maps) == [(13, 18), (7, 9), (4, 5), (2, 3)]
    for small, large in zip(maps, whole):
        assert torch.equal(small, large[..., : small.shape[-2], : small.shape[-1]])


def test_a_model_of_one_size_pads_to_it_and_refuses_more():
    model = timm.create_model("mixer_s16_224", img_size=(64, 96))
    pyramid = Pyramid(model, (64, 96)).eval()
    assert pyramid.canvas == (64, 96)
    assert grids(pyramid(torch.randn(1, 3, 40, 96))) == [(10, 24), (5, 12), (3, 6), (2, 3)]
    with pytest.raises(UserError, match=r"MlpMixer only accepts 64x96 pixels, not 65x96; resize"):
        pyramid(torch.randn(1, 3, 65, 96))
    assert Pyramid(timm.create_model("vit_tiny_patch16_224"), (224, 224)).canvas == (224, 224)  # not built for any size


def test_what_gives_no_maps_is_refused():
    with pytest.raises(UserError, match=r"Linear cannot be a backbone: this class has no forward_intermediates"):
        Pyramid(nn.Linear(3, 3), (64, 64))
    with pytest.raises(UserError, match=r"MlpMixer gives no maps at 64x64: .*224"):
        Pyramid(timm.create_model("mixer_s16_224"), (64, 64))
    dropping = timm.create_model("test_vit", patch_drop_rate=0.5)
    with pytest.raises(UserError, match=r"it drops patches in training"):
        Pyramid(dropping, (160, 160))


def test_any_size_kwargs():
    assert any_size_kwargs("test_vit") == {"dynamic_img_size": True}
    assert any_size_kwargs("swin_tiny_patch4_window7_224")  # by either name, as this timm has it
    assert any_size_kwargs("mixer_s16_224") == any_size_kwargs("test_resnet") == {}
