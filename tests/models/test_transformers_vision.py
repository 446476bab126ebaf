"""Teachers in folders of Hugging Face transformers, against transformers itself; skipped where it is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scalekd.common.errors import UserError
from scalekd.models.build import build_model
from scalekd.models.inputs import statistics
from scalekd.models.options import Model
from scalekd.models.stages import StageView
from scalekd.models.weights.folder import written_out

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SMALL = {"hidden_size": 48, "num_hidden_layers": 5, "num_attention_heads": 3, "intermediate_size": 96}
SIZES = {"image_size": 64, "patch_size": 16}
MODELS = {  # class in transformers: (its configuration, sizes, class and register tokens)
    "Dinov2Model": ("Dinov2Config", {"image_size": 56, "patch_size": 14}, 1),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersConfig", {"image_size": 56, "patch_size": 14}, 5),
    "DINOv3ViTModel": ("DINOv3ViTConfig", SIZES | {"num_register_tokens": 4}, 5),
    "ViTModel": ("ViTConfig", SIZES, 1),
    "SiglipVisionModel": ("SiglipVisionConfig", SIZES, 0),
    "SiglipModel": ("SiglipConfig", SIZES, 0),
    "Dinov2ForImageClassification": ("Dinov2Config", SIZES, 1),
    "Dinov2WithRegistersForImageClassification": ("Dinov2WithRegistersConfig", SIZES, 5),
    "ViTForImageClassification": ("ViTConfig", SIZES, 1),
    "SiglipForImageClassification": ("SiglipConfig", SIZES, 0),
}
PROCESSOR = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.2, 0.1], "do_normalize": True, "resample": 2}


def saved(name: str, folder: Path) -> Any:
    """A small model with random numbers everywhere, saved in `folder` with an image processor."""
    config, sizes, _ = MODELS[name]
    values: dict[str, Any] = SMALL | sizes
    if config == "SiglipConfig":
        values = {"vision_config": values, "text_config": SMALL | {"vocab_size": 50}}
    model = getattr(transformers, name)(getattr(transformers, config)(**values, num_labels=7)).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=generator)
    model.save_pretrained(folder)
    side = sizes["image_size"]
    size = {"size": {"shortest_edge": side + 8}, "crop_size": {"height": side, "width": side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | size))
    return model


def teacher(folder: Path, classes: int = 7, **section: Any) -> tuple[Any, Model]:
    """The teacher that a recipe with this folder has, in eval mode."""
    spec = Model(**written_out({"model": str(folder)} | section, "teacher", 3))
    size = tuple(spec.image_size)
    model, loaded = build_model(spec, channels=3, image_size=size, classes=classes, where="teacher")
    assert loaded.matched == len(model.state_dict())
    return model.eval(), spec


@pytest.mark.parametrize("name", MODELS)
def test_every_family(name: str, tmp_path: Path) -> None:
    theirs = saved(name, tmp_path)
    classes = 7 if "Classification" in name else 0
    model, spec = teacher(tmp_path, classes=3)  # as many as the data has; the teacher keeps its own
    side, patch = spec.image_size[0], spec.kwargs["config"]["patch_size"]
    view = StageView(model, name=name, image_size=(side, side))
    shape = (48, side // patch, side // patch)
    assert view.shapes.maps == (shape,) * 4 and view.shapes.final == shape and view.shapes.classes == classes
    assert view.indices == (0, 1, 2, 4)

    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1)).requires_grad_()
    features = view(images, resumable=True, classifier=True)
    (gradient,) = torch.autograd.grad(features.final.square().mean(), images, retain_graph=True)
    assert gradient.abs().max() > 0
    with torch.no_grad():
        outputs = theirs.vision_model(images) if name == "SiglipModel" else theirs(images, output_hidden_states=True)
        if classes:
            torch.testing.assert_close(features.logits, outputs.logits)
        else:
            prefix = MODELS[name][2]
            tokens = outputs.last_hidden_state
            torch.testing.assert_close(features.final.flatten(2).mT, tokens[:, prefix:])
            pooled = tokens[:, 0] if name == "ViTModel" else outputs.pooler_output
            torch.testing.assert_close(features.pooled, pooled)
            if outputs.hidden_states:  # of the embeddings and of each layer
                torch.testing.assert_close(features.maps[1].flatten(2).mT, outputs.hidden_states[2][:, prefix:])
        for k in (1, 2, 3):
            assert torch.equal(features.resume(k, features.maps[k - 1]), features.final)
            assert torch.equal(features.resume(k, features.maps[k - 1], end=False), features.maps[3])
        assert not torch.allclose(features.resume(3, features.maps[2].flip(0)), features.final, atol=1e-3)


def test_the_input_is_that_of_the_image_processor(tmp_path: Path) -> None:
    saved("ViTModel", tmp_path)
    model, spec = teacher(tmp_path)
    mean, std = statistics(model, spec, 3, "teacher")
    assert (mean, std, spec.image_size) == ((0.5, 0.4, 0.3), (0.25, 0.2, 0.1), (64, 64))
    _, spec = teacher(tmp_path, image_size=[96, 64], mean=[0.1] * 3)  # the recipe takes precedence
    assert statistics(model, spec, 3, "teacher")[0] == (0.1,) * 3 and spec.image_size == (96, 64)


@pytest.mark.parametrize("name", ["Dinov2Model", "DINOv3ViTModel", "ViTModel", "SiglipVisionModel"])
def test_another_image_size(name: str, tmp_path: Path) -> None:
    theirs = saved(name, tmp_path)
    patch = MODELS[name][1]["patch_size"]
    model, _ = teacher(tmp_path, image_size=[6 * patch, 4 * patch])
    images = torch.randn(1, 3, 6 * patch, 4 * patch)
    more = {"interpolate_pos_encoding": True} if name in ("ViTModel", "SiglipVisionModel") else {}
    with torch.no_grad():
        view = StageView(model, name=name, image_size=tuple(images.shape[-2:]))
        features = view(images, resumable=True)
        want = theirs(images, **more).last_hidden_state[:, model.num_prefix_tokens :]
        torch.testing.assert_close(features.final.flatten(2).mT, want)
        assert torch.equal(features.resume(2, features.maps[1]), features.final)
    with pytest.raises(UserError, match=rf"100x100 is not a multiple of the patch size {patch}"):
        teacher(tmp_path, image_size=[100, 100])


def test_what_is_refused(tmp_path: Path) -> None:
    saved("ViTModel", tmp_path)
    with pytest.raises(UserError, match=r"student.model: .* is a model of transformers, which can only be a teacher"):
        written_out({"model": str(tmp_path)}, "student", 3)
    processor = tmp_path / "preprocessor_config.json"
    text = processor.read_text()
    processor.unlink()
    with pytest.raises(UserError, match=r"teacher.model: .* has no preprocessor_config.json with image_mean"):
        teacher(tmp_path)
    processor.write_text(text)
    config = json.loads((tmp_path / "config.json").read_text())
    for kind, message in (("vivit", "of type vivit are not supported"), (3, "of type 3 are not supported")):
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": kind}))
        with pytest.raises(UserError, match=message):
            teacher(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 60}))
    with pytest.raises(UserError, match=r"teacher.weights: .*model.safetensors does not fit"):
        teacher(tmp_path)


def test_tensors_that_are_missing_or_left_over(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved("Dinov2Model", tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file(state | {"layernorm.more": torch.zeros(3)}, file)
    with pytest.raises(UserError, match=r"1 left over \(layernorm.more\)"):
        teacher(tmp_path)
    state.pop("encoder.layer.2.norm1.weight")
    save_file(state, file)
    with pytest.raises(UserError, match=r"1 missing \(backbone.encoder.layer.\*.norm1.weight\)|1 missing"):
        teacher(tmp_path)


def test_code_named_in_a_configuration_is_not_read(tmp_path: Path) -> None:
    saved("ViTModel", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "code.Model"}, "_attn_implementation": "kernels-community/flash-attn3"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit")
    model, spec = teacher(tmp_path)
    assert model.backbone.config._attn_implementation == "sdpa" and "auto_map" not in spec.kwargs["config"]
