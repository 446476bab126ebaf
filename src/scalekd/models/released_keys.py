"""Tables of the tensor names in released weights, and timm's names for them.

The ScaleKD authors trained in a fork of mmclassification 1.0 (now mmpretrain). The names are those of mmpretrain's
backbones and, where the fork differs, those of the fork and of cls_KD, its origin. The keys are those of the student.
"""

from __future__ import annotations

TIMM = "timm"

# naming -> a key that only this naming has; the first match decides
SIGNS = {
    "mmpretrain ResNet-D": "backbone.stem.0.conv.weight",
    "mmpretrain ResNet": "backbone.layer1.0.conv1.weight",
    "mmpretrain ConvNeXt": "backbone.downsample_layers.0.0.weight",
    "mmpretrain Swin": "backbone.stages.0.blocks.0.attn.w_msa.qkv.weight",
    "mmpretrain EVA-02": "backbone.layers.0.mlp.w12.weight",
    "mmpretrain MLP-Mixer": "backbone.layers.0.token_mix.layers.0.0.weight",
    "mmpretrain ViT": "backbone.layers.0.ffn.layers.0.0.weight",
    "cls_KD MobileNet-V1": "backbone.model.0.0.weight",
    "ScaleKD MobileNet-V1": "backbone.s1.0.0.weight",
}

# naming -> why no timm model computes the same as the file's model
REFUSED = {
    "mmpretrain EVA-02": (
        "mmpretrain's EVA-02 has a learned key bias and another rotary position table than timm's, "
        "so the outputs would differ"
    ),
}

_RESNET = [
    (r"backbone\.((conv|bn|layer)\d.*)", r"\1"),
    (r"head\.fc\.(.*)", r"fc.\1"),
]
_RESNET_D = [
    (r"backbone\.stem\.0\.conv\.(.*)", r"conv1.0.\1"),
    (r"backbone\.stem\.0\.bn\.(.*)", r"conv1.1.\1"),
    (r"backbone\.stem\.1\.conv\.(.*)", r"conv1.3.\1"),
    (r"backbone\.stem\.1\.bn\.(.*)", r"conv1.4.\1"),
    (r"backbone\.stem\.2\.conv\.(.*)", r"conv1.6.\1"),
    (r"backbone\.stem\.2\.bn\.(.*)", r"bn1.\1"),
    # without a stride mmpretrain has no average pool there; timm has an identity instead
    (r"backbone\.layer1\.0\.downsample\.0\.(.*)", r"layer1.0.downsample.1.\1"),
    (r"backbone\.layer1\.0\.downsample\.1\.(.*)", r"layer1.0.downsample.2.\1"),
    *_RESNET,
]
_CONVNEXT = [
    (r"backbone\.downsample_layers\.0\.(.*)", r"stem.\1"),
    (r"backbone\.downsample_layers\.(\d)\.(.*)", r"stages.\1.downsample.\2"),
    (r"backbone\.stages\.(\d)\.(\d+)\.depthwise_conv\.(.*)", r"stages.\1.blocks.\2.conv_dw.\3"),
    (r"backbone\.stages\.(\d)\.(\d+)\.pointwise_conv([12])\.(.*)", r"stages.\1.blocks.\2.mlp.fc\3.\4"),
    (r"backbone\.stages\.(\d)\.(\d+)\.(norm\..*|gamma)", r"stages.\1.blocks.\2.\3"),
    (r"backbone\.norm3\.(.*)", r"norm_pre.\1"),
    (r"head\.fc\.(.*)", r"head.fc.\1"),
]
_SWIN = [
    (r"backbone\.patch_embed\.projection\.(.*)", r"patch_embed.proj.\1"),
    (r"backbone\.patch_embed\.norm\.(.*)", r"patch_embed.norm.\1"),
    # mmpretrain merges patches at the end of a stage, timm at the start of the next
    (r"backbone\.stages\.0\.downsample\.(.*)", r"layers.1.downsample.\1"),
    (r"backbone\.stages\.1\.downsample\.(.*)", r"layers.2.downsample.\1"),
    (r"backbone\.stages\.2\.downsample\.(.*)", r"layers.3.downsample.\1"),
    (r"backbone\.stages\.(\d)\.blocks\.(\d+)\.attn\.w_msa\.(.*)", r"layers.\1.blocks.\2.attn.\3"),
    (r"backbone\.stages\.(\d)\.blocks\.(\d+)\.ffn\.layers\.0\.0\.(.*)", r"layers.\1.blocks.\2.mlp.fc1.\3"),
    (r"backbone\.stages\.(\d)\.blocks\.(\d+)\.ffn\.layers\.1\.(.*)", r"layers.\1.blocks.\2.mlp.fc2.\3"),
    (r"backbone\.stages\.(\d)\.blocks\.(\d+)\.(norm[12]\..*)", r"layers.\1.blocks.\2.\3"),
    (r"backbone\.norm3\.(.*)", r"norm.\1"),
    (r"head\.fc\.(.*)", r"head.fc.\1"),
]
_VIT = [
    (r"backbone\.(cls_token|pos_embed)", r"\1"),
    (r"backbone\.patch_embed\.projection\.(.*)", r"patch_embed.proj.\1"),
    (r"backbone\.layers\.(\d+)\.ln([12])\.(.*)", r"blocks.\1.norm\2.\3"),
    (r"backbone\.layers\.(\d+)\.attn\.(qkv|proj)\.(.*)", r"blocks.\1.attn.\2.\3"),
    (r"backbone\.layers\.(\d+)\.ffn\.layers\.0\.0\.(.*)", r"blocks.\1.mlp.fc1.\2"),
    (r"backbone\.layers\.(\d+)\.ffn\.layers\.1\.(.*)", r"blocks.\1.mlp.fc2.\2"),
    (r"backbone\.ln1\.(.*)", r"norm.\1"),  # before the average over the tokens
    (r"backbone\.ln2\.(.*)", r"fc_norm.\1"),  # after it
    (r"head\.(?:fc|layers\.head)\.(.*)", r"head.\1"),
]
_MIXER = [
    (r"backbone\.patch_embed\.projection\.(.*)", r"stem.proj.\1"),
    (r"backbone\.layers\.(\d+)\.ln([12])\.(.*)", r"blocks.\1.norm\2.\3"),
    (r"backbone\.layers\.(\d+)\.(token|channel)_mix\.layers\.0\.0\.(.*)", r"blocks.\1.mlp_\2s.fc1.\3"),
    (r"backbone\.layers\.(\d+)\.(token|channel)_mix\.layers\.1\.(.*)", r"blocks.\1.mlp_\2s.fc2.\3"),
    (r"backbone\.ln1\.(.*)", r"norm.\1"),
    (r"head\.fc\.(.*)", r"head.\1"),
]

# MobileNet-V1 is a stem and 13 pairs of convolutions; timm's stage and block of each pair
_PAIRS = ["0.0", "1.0", "1.1", "2.0", "2.1", "3.0", "3.1", "3.2", "3.3", "3.4", "3.5", "4.0", "4.1"]


def _mobilenet(layers: list[str]) -> list[tuple[str, str]]:
    """layers: the names of the stem and of the 13 pairs, in order."""
    stem, *pairs = (layer.replace(".", r"\.") for layer in layers)
    rules = [
        (rf"backbone\.{stem}\.0\.(.*)", r"conv_stem.\1"),
        (rf"backbone\.{stem}\.1\.(.*)", r"bn1.\1"),
        (r"head\.fc\.(.*)", r"classifier.\1"),
    ]
    for theirs, ours in zip(pairs, _PAIRS, strict=True):
        # 2 and 5 are activations
        for number, name in (("0", "conv_dw"), ("1", "bn1"), ("3", "conv_pw"), ("4", "bn2")):
            rules.append((rf"backbone\.{theirs}\.{number}\.(.*)", rf"blocks.{ours}.{name}.\1"))
    return rules


# naming -> (pattern of a whole key, timm's key); the first match decides
RULES: dict[str, list[tuple[str, str]]] = {
    "mmpretrain ResNet-D": _RESNET_D,
    "mmpretrain ResNet": _RESNET,
    "mmpretrain ConvNeXt": _CONVNEXT,
    "mmpretrain Swin": _SWIN,
    "mmpretrain MLP-Mixer": _MIXER,
    "mmpretrain ViT": _VIT,
    "cls_KD MobileNet-V1": _mobilenet([*(f"model.{i}" for i in range(12)), "s4.0", "s4.1"]),
    "ScaleKD MobileNet-V1": _mobilenet([f"s{s}.{i}" for s in (1, 2, 3) for i in range(4)] + ["s4.0", "s4.1"]),
}

# naming -> arguments that timm's model needs to compute the same; names and shapes of the tensors do not show them
KWARGS: dict[str, dict[str, object]] = {
    "mmpretrain ConvNeXt": {"head_norm_first": True},  # the fork's last norm comes before the pooling
    "cls_KD MobileNet-V1": {"act_layer": "relu"},  # timm's has ReLU6
    "ScaleKD MobileNet-V1": {"act_layer": "relu"},
}

# pattern of a whole key, in any naming -> why it is not imported
EXTRAS = {
    r"(.*\.)?relative_position_index": "computed from the window's size",
    r"(.*\.)?attn_mask": "computed from the map's size",
    r"backbone\.norm[0-2]\..*": "norms of earlier maps, which the logits do not use",
    r"steps": "mmengine's count of averaged steps",
}
