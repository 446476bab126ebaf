"""The contract of `StageView`, held against one small model of each family, every number in it random.

A fresh timm model hides mistakes: heads, layer scales and position tables start at zero, so that wrong
wiring gives the same output. `randomise` fills them all.
"""

import pytest
import timm
import torch
from torch import nn

from scalekd.models import stages
from scalekd.models.stages import StageView
from scalekd.models.tails import TEACHER_TAILS

SMALL_VIT = {"embed_dim": 48, "depth": 5, "num_heads": 3}
SMALL_SWIN = {"embed_dim": 24, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 3, 6)}
SMALL_CONV = {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48)}
WIDE, PATCH14 = {"img_size": (64, 96)}, {"img_size": (56, 84)}

FAMILIES = {  # timm name or class, a dot, a remark: (what makes it small, image height and width)
    "resnet18": ({}, (64, 96)),
    "resnet50": ({"layers": (1, 2, 1, 2), "base_width": 16}, (64, 96)),
    "resnet18d": ({}, (64, 96)),
    "mobilenetv1_100": ({}, (64, 96)),
    "mobilenetv2_050": ({}, (64, 96)),
    "mobilenetv3_small_050": ({}, (64, 96)),
    "mobilenetv4_conv_small_035": ({}, (64, 96)),
    "efficientnet_b0": ({}, (64, 96)),
    "regnetx_002": ({}, (64, 96)),
    "regnety_002": ({}, (64, 96)),
    "convnext_atto": (SMALL_CONV, (64, 96)),
    "convnextv2_atto": (SMALL_CONV, (64, 96)),
    "repvit_m0_9": ({}, (64, 96)),
    "mobilevit_xxs": ({}, (64, 128)),
    "poolformer_s12": ({}, (64, 96)),
    "poolformerv2_s12": ({}, (64, 96)),
    "MetaFormer.small": ({"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48)}, (64, 96)),
    "maxvit_pico_rw_256": ({"img_size": (64, 128)}, (64, 128)),
    "swin_tiny_patch4_window7_224": ({"img_size": (112, 168)} | SMALL_SWIN, (112, 168)),
    "swin_s3_tiny_224": ({"img_size": (112, 168)} | SMALL_SWIN, (112, 168)),
    "swinv2_tiny_window8_256": ({"img_size": (128, 192)} | SMALL_SWIN, (128, 192)),
    "vit_tiny_patch16_224": (WIDE | SMALL_VIT, (64, 96)),
    "vit_small_patch8_224": ({"img_size": (32, 48)} | SMALL_VIT, (32, 48)),
    "hiera_tiny_224": ({"img_size": (64, 96), "embed_dim": 24, "stages": (1, 1, 1, 1)}, (64, 96)),
    "vit_tiny_patch16_224.dynamic": ({"dynamic_img_size": True} | SMALL_VIT, (64, 96)),
    "vit_medium_patch16_gap_240": (WIDE | SMALL_VIT, (64, 96)),
    "vit_base_patch16_siglip_224": (WIDE | SMALL_VIT, (64, 96)),
    "vit_base_patch16_clip_224": (WIDE | SMALL_VIT, (64, 96)),
    "deit_tiny_patch16_224": (WIDE | SMALL_VIT, (64, 96)),
    "deit_tiny_distilled_patch16_224": (WIDE | SMALL_VIT, (64, 96)),
    "vit_wide_last": (WIDE | SMALL_VIT | {"last_dim": 64, "last_heads": 4}, (64, 96)),
    "vit_lift": (WIDE | SMALL_VIT | {"last_dim": 64}, (64, 96)),
    "deit3_small_patch16_224": (WIDE | SMALL_VIT, (64, 96)),
    "vit_small_patch14_dinov2": (PATCH14 | SMALL_VIT, (56, 84)),
    "vit_small_patch14_reg4_dinov2": (PATCH14 | SMALL_VIT, (56, 84)),
    "beit_base_patch16_224": (WIDE | SMALL_VIT, (64, 96)),
    "beitv2_base_patch16_224": (WIDE | SMALL_VIT, (64, 96)),
    "beit_base_patch16_224.shared_bias": (
        WIDE | SMALL_VIT | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
        (64, 96),
    ),
    "eva_large_patch14_196": (PATCH14 | SMALL_VIT, (56, 84)),
    "eva02_tiny_patch14_224": (PATCH14 | SMALL_VIT, (56, 84)),
    "vit_small_patch16_dinov3": (WIDE | SMALL_VIT, (64, 96)),
    "vit_small_patch16_rope_mixed_224": (WIDE | SMALL_VIT, (64, 96)),
    "vit_pe_core_tiny_patch16_384": (WIDE | SMALL_VIT, (64, 96)),
    "mixer_s16_224": (WIDE, (64, 96)),
    "MlpMixer.patch14": (PATCH14 | {"patch_size": 14, "embed_dim": 48, "num_blocks": 5}, (56, 84)),
    "gmlp_ti16_224": (WIDE, (64, 96)),
    "resmlp_12_224": (WIDE, (64, 96)),
}


NO_TAIL = {"hiera_tiny_224"}


def randomise(model, size, seed=0, channels=3):
    """Random numbers in every parameter, and batch norm statistics to match, so that activations stay near
    one and differ from image to image and from place to place through any depth."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if p.ndim > 1 and name.endswith("weight") and p.shape[0] > 1:
                p.copy_(noise * 1.2 / p[0].numel() ** 0.5)  # convolutions, linear layers
            elif p.ndim <= 1 and "bias" not in name:
                p.copy_(1 + 0.2 * noise)  # norms and layer scales
            else:
                p.copy_(0.3 * noise)  # biases, tokens, position and relative bias tables
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for m in norms:
            m.momentum = 0.9
        if norms:
            model.train()(torch.randn(4, channels, *size, generator=g))
        for m in norms:
            m.momentum = 0.1
            m.num_batches_tracked.zero_()
    return model.eval()


def build(name, seed=0, **more):
    kwargs, size = FAMILIES[name]
    kwargs = {"num_classes": 7} | kwargs | more
    source = name.split(".")[0]
    is_class = hasattr(timm.models, source) and source[0].isupper()
    model = getattr(timm.models, source)(**kwargs) if is_class else timm.create_model(source, **kwargs)
    return randomise(model, size, seed, kwargs.get("in_chans", 3)), size


def view_of(name, **more):
    model, size = build(name, **more)
    return StageView(model, name=name, image_size=size), torch.randn(
        2, 3, *size, generator=torch.Generator().manual_seed(1)
    )


def close(a, b, tol=1e-5):
    """Equal to `tol` of the spread of `b`."""
    return (a - b).abs().max() <= tol * b.std()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return view_of(request.param)


def test_four_maps_of_every_family(family):
    view, images = family
    assert view.refusal is None
    images = images.clone().requires_grad_()
    f = view(images)

    # Logits are the model's own, and say something.
    with torch.no_grad():
        assert close(f.logits, view.model(images))
        assert torch.equal(view(images, maps=False).logits, view.model(images))
    assert f.logits.shape == (2, view.shapes.classes) == (2, 7)
    assert not close(f.logits[0], f.logits[1], 1e-3) and f.logits.std() > 1e-3

    # Four maps, shaped as declared, of the channels and strides that timm declares.
    assert tuple(tuple(m.shape[1:]) for m in f.maps) == view.shapes.maps
    assert tuple(f.final.shape[1:]) == view.shapes.final
    assert f.final.shape[-2:] == f.maps[-1].shape[-2:]
    for index, (channels, height, width) in zip(view.indices, view.shapes.maps, strict=True):
        info = view.model.feature_info[index]
        assert channels == info["num_chs"]
        assert (height, width) == tuple(-(-s // int(info["reduction"])) for s in images.shape[-2:])

    # Maps are what they were when taken: nothing later wrote into them. They vary over image and place.
    for index, m in zip(view.indices, f.maps, strict=True):
        alone = view.model.forward_intermediates(images, indices=[index], intermediates_only=True, stop_early=True)
        assert close(m, alone[0])
    for m in (*f.maps, f.final):
        assert not close(m[0], m[1], 1e-3) and m.std(dim=(2, 3)).mean() > 1e-3 and m.isfinite().all()

    # Every map is on the path from the images.
    for m in (*f.maps, f.final):
        (grad,) = torch.autograd.grad(m.square().mean(), images, retain_graph=True)
        assert grad.isfinite().all() and grad.abs().max() > 0


def test_teacher_runs_on_from_its_own_stages(family):
    view, images = family
    if view.name in NO_TAIL:
        assert not view.shapes.can_resume
        return
    assert view.shapes.can_resume
    view.model.requires_grad_(False)
    with torch.no_grad():
        f = view(images, resumable=True)
    for k in (1, 2, 3):
        own = f.maps[k - 1].clone().requires_grad_()
        final = f.resume(k, own)
        assert torch.equal(final, f.final), (final - f.final).abs().max()  # the same operations, in order
        assert torch.equal(f.resume(k, own, end=False), f.maps[3])
        (grad,) = torch.autograd.grad(final.square().mean(), own)
        assert grad.isfinite().all() and (grad.abs().amax(dim=(2, 3)) > 0).float().mean() > 0.5  # ReLU kills some
        assert all(p.grad is None for p in view.model.parameters())

    # Two views in one batch, the first being the teacher's own; the second gets the same prefix tokens.
    own = f.maps[2]
    other = own + 0.5 * torch.randn(own.shape, generator=torch.Generator().manual_seed(2))
    both = f.resume(3, torch.cat([own, other]))
    assert close(both[:2], f.final) and not close(both[2:], f.final, 1e-2)
    assert close(both[2:], f.resume(3, other))


@pytest.mark.parametrize(
    "name, tokens",
    [
        ("deit_tiny_patch16_224", 1),
        ("deit_tiny_distilled_patch16_224", 2),
        ("vit_small_patch14_reg4_dinov2", 5),
        ("beit_base_patch16_224", 1),
        ("eva02_tiny_patch14_224", 1),
        ("vit_small_patch16_dinov3", 5),
    ],
)
def test_prefix_tokens_stand_beside_the_maps_and_are_used(name, tokens):
    view, images = view_of(name)
    with torch.no_grad():
        f = view(images, resumable=True)
        assert [tuple(p.shape) for p in f.prefix] == [(2, tokens, 48)] * 4
        tail = TEACHER_TAILS[type(view.model)]
        for wrong in (torch.zeros_like(f.prefix[2]), f.prefix[2].flip(0)):
            assert not close(tail(view.model, view.indices[2], f.maps[2], wrong, True), f.final, 1e-3)


def test_no_prefix_without_tokens():
    view, images = view_of("resnet18")
    assert view(images).prefix == (None,) * 4
    view, images = view_of("vit_base_patch16_siglip_224")
    assert view(images).prefix == (None,) * 4


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "deit_tiny_distilled_patch16_224"])
def test_looking_changes_nothing_and_training_is_the_models_own(name):
    model, size = build(name)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    view = StageView(model, name=name, image_size=size)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    twin, _ = build(name)
    twin.train()
    images = torch.randn(4, 3, *size)
    assert close(view(images).logits, twin(images))
    for (key, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), key  # batch norm has seen the batch, once


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_drop_path_acts_in_training(name):
    view, images = view_of(name, drop_path_rate=0.5)
    view.model.train()
    assert not close(view(images).final, view(images).final, 1e-3)
    torch.manual_seed(3)
    ours = view(images).logits
    torch.manual_seed(3)
    assert close(ours, view.model(images))


def test_distilled_deit_gives_both_heads_in_training_only_if_asked():
    view, images = view_of("deit_tiny_distilled_patch16_224")
    view.model.train()
    view.model.set_distilled_training(True)
    first, second = view.model(images)
    for features in (view(images), view(images, maps=False)):
        assert close(features.logits, first) and close(features.distilled, second)
    view.model.set_distilled_training(False)
    for features in (view(images), view(images, maps=False)):
        assert close(features.logits, (first + second) / 2) and features.distilled is None


@pytest.mark.parametrize("depth, ends", [(4, (0, 1, 2, 3)), (5, (0, 1, 2, 4)), (6, (0, 2, 3, 5)),
                                         (12, (2, 5, 8, 11)), (24, (5, 11, 17, 23))])  # fmt: skip
def test_plain_models_are_cut_in_quarters(depth, ends):
    view, _ = view_of("vit_tiny_patch16_224", depth=depth)
    assert view.indices == ends


def test_own_cuts():
    model, size = build("vit_tiny_patch16_224", depth=6)
    view = StageView(model, name="vit", image_size=size, cuts=[1, 2, 4, 5])
    images = torch.randn(2, 3, *size)
    f = view(images, resumable=True)
    (alone,) = model.forward_intermediates(images, indices=[4], intermediates_only=True)
    assert close(f.maps[2], alone)
    assert torch.equal(f.resume(1, f.maps[0]), f.final)
    for bad in ([0, 1, 2], [0, 1, 2, 4], [1, 1, 2, 5], [2, 1, 3, 5], [-3, 1, 2, 5], [1, 2, 4, 6]):
        with pytest.raises(ValueError, match=r"four block indices.*5, the last of vit's 6 blocks"):
            StageView(model, name="vit", image_size=size, cuts=bad)
    model, size = build("resnet18")
    with pytest.raises(ValueError, match="resnet18 has stages of its own"):
        StageView(model, name="resnet18", image_size=size, cuts=[0, 1, 2, 3])


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224",
                                  "vit_small_patch16_dinov3", "beit_base_patch16_224"])  # fmt: skip
def test_shapes_of_a_large_model_are_found_without_computing(name, monkeypatch):
    model, size = build(name)
    computed = StageView(model, name=name, image_size=size).shapes
    monkeypatch.setattr(stages, "LARGE", 0)
    on_devices = []
    model.register_forward_pre_hook(lambda _, args: on_devices.append(args[0].device.type))
    assert StageView(model, name=name, image_size=size).shapes == computed
    assert on_devices == ["meta"]
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_one_channel_and_no_head():
    model, size = build("resnet18", in_chans=1, num_classes=0)
    view = StageView(model, name="resnet18", image_size=size)
    images = torch.randn(2, 1, *size)
    assert view.shapes.classes == 0
    assert torch.equal(view(images).logits, model(images)) and view(images).logits.shape == (2, 512)
    bare = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    assert StageView(bare, name="bare", image_size=(8, 8)).shapes.classes == 3


def refused(model, name, size, reason):
    view = StageView(model.eval(), name=name, image_size=size)
    first, second = view.refusal.split("\n")
    assert name in first and type(model).__name__ in first and reason in first
    assert "Use logit methods" in second
    assert view.shapes.maps == () and view.shapes.final is None and not view.shapes.can_resume
    images = torch.randn(2, 3, *size)
    assert torch.equal(view(images, maps=False).logits, model(images))
    assert view(images, maps=False).maps == ()
    with pytest.raises(ValueError, match="has no stage maps"):
        view(images)
    with pytest.raises(ValueError, match="has no tail"):
        view(images, resumable=True)


def test_refusals_name_the_reason_and_leave_the_logits():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    refused(plain, "plain", (16, 16), "no forward_intermediates")
    shallow, size = build("vit_tiny_patch16_224", depth=3)
    refused(shallow, "vit", size, "3 blocks, but four are needed")
    dropping, size = build("vit_tiny_patch16_224", patch_drop_rate=0.25)
    refused(dropping, "vit", size, "patch_drop_rate")
    broken, size = build("resnet18")
    broken.forward_intermediates = lambda *args, **kwargs: (None, [])
    refused(broken, "resnet18", size, "its forward_intermediates fails")


def test_wrong_sizes_are_said():
    model, _ = build("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="vit cannot be used at 224x224: Input height"):
        StageView(model, name="vit", image_size=(224, 224))


def test_what_a_model_says_of_a_size_ends_with_one_stop():
    model = timm.create_model("vgg11", num_classes=3)
    with pytest.raises(ValueError, match=r"[^.]\. Use a larger data\.image_size\.$"):
        StageView(model, name="vgg11", image_size=(16, 16))
    model, _ = build("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"\(64\)\.$"):
        StageView(model, name="vit", image_size=(224, 224))


def test_ghostnet_s_maps_leave_out_what_follows_the_first_block_of_a_stride():
    """As the docstring of `StageView` says; its final map has all of it."""
    model = timm.create_model("ghostnet_050", num_classes=3).eval()
    view, images = StageView(model, name="ghostnet", image_size=(64, 64)), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        f = view(images)
        x = model.act1(model.bn1(model.conv_stem(images)))
        ends = [x := block(x) for block in model.blocks]
    assert len(ends) == 10
    for taken, block in zip(f.maps, (1, 3, 5, 7), strict=True):
        assert close(taken, ends[block])
    assert ends[6].shape[-1] == ends[5].shape[-1] and close(f.final, ends[-1])


def test_resuming_needs_a_tail_and_eval_mode():
    view, images = view_of("resnet18")
    view.model.train()
    with pytest.raises(ValueError, match="train mode"):
        view(images, resumable=True)

    class OwnViT(timm.models.VisionTransformer):
        pass

    own = OwnViT(img_size=32, num_classes=3, **SMALL_VIT).eval()
    view = StageView(own, name="own", image_size=(32, 32))
    assert not view.shapes.can_resume and view.refusal is None
    with pytest.raises(ValueError, match=r"own cannot run from a stage to its end.*OwnViT has no tail"):
        view(torch.randn(1, 3, 32, 32), resumable=True)


WORK = """
    resnetv2_18 seresnet18 resnest14d skresnet18 dla34 hgnetv2_b0 cs3darknet_s ghostnet_050 lcnet_050
    hrnet_w18_small rexnet_100 starnet_s1 efficientformer_l1 efficientformerv2_s0 edgenext_xx_small
    fastvit_t8 pvt_v2_b0 mambaout_femto tiny_vit_5m_224 inception_next_atto xcit_nano_12_p16_224
    mobilevitv2_050 nf_regnet_b0 efficientvit_b0 hiera_tiny_224 volo_d1_224 ese_vovnet19b_slim_dw
    vit_relpos_small_patch16_224 davit_tiny
"""
REFUSE = "levit_128s pit_ti_224 visformer_tiny crossvit_tiny_240 efficientvit_m0 shvit_s1"


@pytest.mark.usefixtures("cheap_initial_values")  # `randomise` replaces them
@pytest.mark.parametrize("name", WORK.split() + REFUSE.split())
def test_other_families_work_or_are_refused(name):
    """Whatever timm has, a view of it is right or says why there is none."""
    model = timm.create_model(name, pretrained=False, num_classes=7)
    config = model.pretrained_cfg
    size = config["input_size"][-2:] if config.get("fixed_input_size") else (128, 128)
    randomise(model, size)
    view = StageView(model, name=name, image_size=size)
    if name in REFUSE.split():
        return refused(model, name, size, "four are needed" if "crossvit" not in name else "not one tensor")
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        f = view(images)
        assert close(f.logits, model(images))
    assert tuple(tuple(m.shape[1:]) for m in f.maps) == view.shapes.maps
    for index, m in zip(view.indices, f.maps, strict=True):
        assert m.shape[1] == model.feature_info[index]["num_chs"]
    if "hiera" in name:  # its tokens are kept by window, and are put back by row; head.norm acts after pooling
        normed = model.head.norm(f.maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        assert torch.equal(f.final, normed)


@pytest.mark.parametrize(
    "name, norm, kwargs",
    [
        ("vit_tiny_patch16_224", lambda m: m.norm, {}),
        ("vit_tiny_patch16_224", lambda m: m.fc_norm, {"global_pool": "avg", "class_token": False, "fc_norm": True}),
        ("convnext_atto", lambda m: m.head.norm, {}),
        ("swin_tiny_patch4_window7_224", lambda m: m.norm, {"depths": (1, 1, 1, 1)}),
    ],
)
def test_final_is_the_last_map_after_the_final_norm_wherever_that_is_kept(name, norm, kwargs):
    model = timm.create_model(name, num_classes=3, **kwargs)
    randomise(model, (224, 224))
    model.eval()
    with torch.no_grad():
        f = StageView(model, name=name, image_size=(224, 224))(torch.randn(1, 3, 224, 224))
        layer = norm(model)
        rows = f.maps[-1].permute(0, 2, 3, 1)
        by_hand = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, unbiased=False, keepdim=True) + layer.eps).sqrt()
        by_hand = (by_hand * layer.weight + layer.bias).permute(0, 3, 1, 2)
    assert not close(f.final, f.maps[-1], 1e-2) and close(f.final, by_hand, 1e-4)
