from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from scalekd.methods.projectors import (
    CrossAttentionProjector,
    conv_projector,
    default_heads,
    linear_projector,
    make_tokens,
)

STUDENT, TEACHER = (4, 3, 2), (12, 2, 5)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Float64, with every parameter random, so that none can be left out unseen."""
    torch.manual_seed(3)
    for p in module.double().parameters():
        torch.nn.init.normal_(p, std=0.5)
    return module


# ---------------------------------------------------------------- numpy, layer by layer


def weights(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def np_conv3x3(x, weight, bias):
    """(B, C, h, w), zero padding."""
    h, w = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    y = np.zeros((len(x), len(weight), h, w))
    for i in range(3):
        for j in range(3):
            y += np.einsum("bchw,oc->bohw", padded[:, :, i : i + h, j : j + w], weight[:, :, i, j])
    return y if bias is None else y + bias[None, :, None, None]


def np_norm(x, axes, channel_axis, weight, bias, eps):
    y = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)
    shape = [1] * x.ndim
    shape[channel_axis] = -1
    return y * weight.reshape(shape) + bias.reshape(shape)


def np_map_norm(x, norm, weight, bias, eps=None):
    axes, default = ((0, 2, 3), 1e-5) if norm == "batch" else ((1,), 1e-6)
    return np_norm(x, axes, 1, weight, bias, eps or default)


def np_cap(
    cap: CrossAttentionProjector, norm: str, x: np.ndarray, queries: list[np.ndarray], scale: float = 5, eps: Any = None
) -> np.ndarray:
    """Sample by sample, head by head; `queries` is (N, dt) for each sample. Gives (B, N, dt)."""
    p = weights(cap)
    x = np_conv3x3(x, p["conv.weight"], p["conv.bias"])
    x = np.maximum(np_map_norm(x, norm, p["norm.weight"], p["norm.bias"], eps), 0) + p["position"]
    outputs = []
    for sample, query in zip(x, queries, strict=True):
        tokens = np.array([sample[:, i, j] for i in range(sample.shape[1]) for j in range(sample.shape[2])])
        query = np.maximum(query @ p["query_embed.weight"].T + p["query_embed.bias"], 0)
        q, k, v = (y @ p[f"{n}.weight"].T + p[f"{n}.bias"] for n, y in zip("qkv", (query, tokens, tokens)))
        size = q.shape[1] // cap.heads
        heads = []
        for n in range(cap.heads):
            part = slice(n * size, (n + 1) * size)
            e = np.exp(q[:, part] @ k[:, part].T * size**-0.5 * scale)
            heads.append(e / e.sum(axis=1, keepdims=True) @ v[:, part])
        y = np.concatenate(heads, axis=1) @ p["out.weight"].T + p["out.bias"]
        y = np_norm(y, (1,), 1, p["out_norm.weight"], p["out_norm.bias"], 1e-5)
        hidden = np.maximum(y @ p["ffn.0.weight"].T + p["ffn.0.bias"], 0)
        outputs.append(y + hidden @ p["ffn.2.weight"].T + p["ffn.2.bias"])
    return np.array(outputs)


def as_tokens(x: torch.Tensor) -> np.ndarray:
    """(B, D, H, W) to (B, H*W, D)"""
    return x.detach().permute(0, 2, 3, 1).reshape(len(x), -1, x.shape[1]).numpy()


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("heads", [1, 3])
def test_cap_with_learned_queries_against_numpy(norm, heads):
    cap = randomised(CrossAttentionProjector(STUDENT, TEACHER, heads=heads, norm=norm))
    x = random(3, *STUDENT)
    y = cap(x)
    assert y.shape == (3, *TEACHER)
    expected = np_cap(cap, norm, x.numpy(), [cap.queries.detach().numpy()] * 3)
    np.testing.assert_allclose(as_tokens(y), expected, rtol=1e-9, atol=1e-9)


def test_cap_with_given_queries_against_numpy():
    cap = randomised(CrossAttentionProjector(STUDENT, TEACHER, heads=2, learned_queries=False))
    x, queries = random(3, *STUDENT), random(3, *TEACHER)
    expected = np_cap(cap, "batch", x.numpy(), list(as_tokens(queries)))
    np.testing.assert_allclose(as_tokens(cap(x, queries)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_attention_scale_and_eps_against_numpy(norm):
    """An eps that is large, so that it counts."""
    cap = randomised(CrossAttentionProjector(STUDENT, TEACHER, heads=3, norm=norm, attention_scale=0.2, norm_eps=0.3))
    x = random(3, *STUDENT)
    expected = np_cap(cap, norm, x.numpy(), [cap.queries.detach().numpy()] * 3, scale=0.2, eps=0.3)
    np.testing.assert_allclose(as_tokens(cap(x)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_a_skip_adds_the_students_own_position(grad_checkpointing):
    grid = STUDENT[1:]  # the teacher's too: position i of the output gets position i of the student
    given = {"heads": 3, "norm": "layer", "grad_checkpointing": grad_checkpointing}
    cap = randomised(CrossAttentionProjector(STUDENT, (12, *grid), skip=True, **given))
    plain = CrossAttentionProjector(STUDENT, (12, *grid), **given).double()
    plain.load_state_dict({name: value for name, value in cap.state_dict().items() if not name.startswith("skip")})
    x, w = random(2, *STUDENT), weights(cap)
    matrix = np.einsum("bchw,oc->bohw", x.numpy(), w["skip.1.weight"][:, :, 0, 0]) + w["skip.1.bias"][:, None, None]
    np.testing.assert_allclose(cap(x).detach().numpy() - plain(x).detach().numpy(), matrix, rtol=1e-9, atol=1e-9)


def test_learned_queries_are_projected_once():
    cap = CrossAttentionProjector(STUDENT, TEACHER).double()
    seen = []
    for layer in (cap.query_embed, cap.q):
        layer.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    cap(random(6, *STUDENT))
    assert seen == [(1, 10, 12)] * 2


def test_cap_gradients():
    cap = randomised(CrossAttentionProjector((2, 2, 1), (4, 1, 3), heads=2, norm="layer", learned_queries=False))
    inputs = random(2, 2, 2, 1).requires_grad_(), random(2, 4, 1, 3).requires_grad_()
    assert torch.autograd.gradcheck(cap, inputs)
    parameters = dict(cap.named_parameters())
    names = list(parameters)

    def by_parameters(*values):
        return torch.func.functional_call(cap, dict(zip(names, values, strict=True)), tuple(i.detach() for i in inputs))

    assert torch.autograd.gradcheck(by_parameters, tuple(parameters.values()), fast_mode=True)


def test_initial_position_and_queries():
    torch.manual_seed(0)
    cap = CrossAttentionProjector((64, 8, 8), (64, 8, 8))
    assert cap.position.std().item() == pytest.approx(0.02, rel=0.05)
    assert cap.queries.std().item() == pytest.approx(1, rel=0.05)


def parameters_by_hand(ds: int, grid: int, dt: int, teacher_grid: int, table: bool) -> int:
    student_branch = 9 * ds * ds + ds + 2 * ds + ds * grid * grid
    queries = teacher_grid * teacher_grid * dt * table + dt * dt + dt
    attention = (dt * dt + dt) + 2 * (ds * dt + dt) + (dt * dt + dt)
    feed_forward = 2 * dt + (dt * 4 * dt + 4 * dt) + (4 * dt * dt + dt)
    return student_branch + queries + attention + feed_forward


@pytest.mark.parametrize(("dims", "millions"), [((768, 1536), 176), ((384, 768), 119)], ids=["Swin-L", "Swin-S"])
def test_parameters_for_resnet50(dims, millions):
    """Two views of two CAPs; those at stage 4 get their queries from the proxy path."""
    before, last = dims
    with torch.device("meta"):
        caps = [
            CrossAttentionProjector((1024, 14, 14), (before, 14, 14)),
            CrossAttentionProjector((2048, 7, 7), (last, 7, 7), learned_queries=False),
        ]
    counts = [sum(p.numel() for p in cap.parameters()) for cap in caps]
    assert counts == [
        parameters_by_hand(1024, 14, before, 14, table=True),
        parameters_by_hand(2048, 7, last, 7, table=False),
    ]
    assert round(2 * sum(counts) / 1e6) == millions


@pytest.mark.parametrize(("dim", "heads"), [(768, 12), (1536, 24), (384, 6), (1024, 16), (96, 1), (200, 4), (48, 1)])
def test_default_heads(dim, heads):
    assert default_heads(dim) == heads
    assert CrossAttentionProjector((2, 1, 1), (dim, 1, 1)).heads == heads


def test_rejected_options_of_cap():
    with pytest.raises(ValueError, match="5 does not divide the teacher's 12"):
        CrossAttentionProjector(STUDENT, TEACHER, heads=5)
    with pytest.raises(ValueError, match="does not divide"):
        CrossAttentionProjector(STUDENT, TEACHER, heads=0)
    with pytest.raises(ValueError, match="'batch' or 'layer'"):
        CrossAttentionProjector(STUDENT, TEACHER, norm="group")
    with pytest.raises(ValueError, match=r"\(4, 3, 2\) and got \(4, 6, 4\)"):
        CrossAttentionProjector(STUDENT, TEACHER)(torch.zeros(2, 4, 6, 4))


# ---------------------------------------------------------------- linear and conv


def test_linear_projector_is_a_matrix_at_each_position():
    projector = randomised(linear_projector((4, 2, 5), TEACHER))
    x = random(3, 4, 2, 5)
    expected = np.einsum("bchw,oc->bohw", x.numpy(), weights(projector)["1.weight"][:, :, 0, 0])
    expected += weights(projector)["1.bias"][None, :, None, None]
    np.testing.assert_allclose(projector(x).detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_conv_projector_against_numpy(norm):
    projector = randomised(conv_projector((4, 2, 5), TEACHER, norm=norm))
    x, p = random(3, 4, 2, 5), weights(projector)
    y = np_map_norm(np_conv3x3(x.numpy(), p["1.weight"], None), norm, p["2.weight"], p["2.bias"])
    expected = np_conv3x3(np.maximum(y, 0), p["4.weight"], p["4.bias"])
    np.testing.assert_allclose(projector(x).detach().numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("build", [linear_projector, conv_projector])
def test_resampling_to_the_teachers_grid(build):
    x = random(3, 4, 4, 2)

    halve = build((4, 4, 2), (12, 2, 1)).double()
    assert halve(x).shape == (3, 12, 2, 1)
    cells = np.array([x[:, :, :2].mean(dim=(2, 3)).numpy(), x[:, :, 2:].mean(dim=(2, 3)).numpy()])
    np.testing.assert_allclose(halve[0](x)[..., 0].numpy(), cells.transpose(1, 2, 0), rtol=1e-12)

    widen = build((4, 4, 2), (12, 4, 4)).double()
    assert widen(x).shape == (3, 12, 4, 4)
    columns = np.array([[1, 0.75, 0.25, 0], [0, 0.25, 0.75, 1]])  # new centres at 0.25, 0.75, 1.25, 1.75
    np.testing.assert_allclose(widen[0](x).numpy(), x.numpy() @ columns, rtol=1e-12)

    both = build((4, 4, 2), (12, 1, 4)).double()
    expected = x.numpy().mean(axis=2, keepdims=True) @ columns
    np.testing.assert_allclose(both[0](x).numpy(), expected, rtol=1e-12)


# ---------------------------------------------------------------- cheaper forms of CAP

FORMS = ["conv", "grouped", "separable", "pointwise", "reduced"]


@pytest.mark.parametrize("tokens", FORMS)
@pytest.mark.parametrize("student", [(4, 3, 2), (16, 3, 2)], ids=["narrower", "wider"])
def test_the_student_branch_by_hand(tokens, student):
    """Every form is one 3x3 convolution, of a kernel that is put together here from its factors."""
    ds, dt = student[0], TEACHER[0]
    conv, width = make_tokens(tokens, ds, dt)
    conv = randomised(conv)
    assert width == (min(ds, dt) if tokens == "reduced" else ds)
    p, x = weights(conv), random(2, *student)
    bias = p["1.bias"] if "1.bias" in p else p["bias"]
    if tokens == "conv":
        kernel = p["weight"]
    elif tokens == "grouped":  # a quarter of the outputs reads the same quarter of the inputs
        kernel = np.zeros((ds, ds, 3, 3))
        for start in range(0, ds, ds // 4):
            quarter = slice(start, start + ds // 4)
            kernel[quarter, quarter] = p["weight"][quarter]
    elif tokens == "pointwise":
        kernel = np.zeros((ds, ds, 3, 3))
        kernel[:, :, 1, 1] = p["weight"][:, :, 0, 0]
    elif tokens == "separable":  # output o reads channel c through c's own kernel, times the 1x1 from c to o
        kernel = p["1.weight"][:, :, 0, 0][:, :, None, None] * p["0.weight"][:, 0][None]
        bias = p["1.bias"]
    else:  # the kernel of output o, times the 1x1 from each channel to o
        kernel = p["0.weight"][:, :, 0, 0][:, :, None, None] * p["1.weight"][:, 0][:, None]
    expected = np_conv3x3(x.numpy(), kernel, bias)
    np.testing.assert_allclose(conv(x).detach().numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tokens", FORMS)
@pytest.mark.parametrize("expansion", [1, 4])
def test_parameters_of_the_cheaper_forms(tokens, expansion):
    ds, dt, positions = 16, 12, 6
    cap = CrossAttentionProjector((ds, 3, 2), (dt, 1, 3), tokens=tokens, expansion=expansion)
    width = 12 if tokens == "reduced" else ds
    convolution = {
        "conv": 9 * ds * ds + ds,
        "grouped": 9 * ds * ds // 4 + ds,
        "separable": 9 * ds + ds * ds + ds,
        "pointwise": ds * ds + ds,
        "reduced": ds * width + 9 * width + width,
    }[tokens]
    rest = 2 * width + width * positions + 3 * dt + 3 * (dt * dt + dt) + 2 * (width * dt + dt) + 2 * dt
    feed_forward = 2 * expansion * dt * dt + expansion * dt + dt
    assert sum(p.numel() for p in cap.parameters()) == convolution + rest + feed_forward
    assert cap(torch.randn(2, ds, 3, 2)).shape == (2, dt, 1, 3)


def test_rejected_options_of_the_cheaper_forms():
    with pytest.raises(
        ValueError, match="tokens is 'dilated'; choose 'conv', 'grouped', 'separable', 'pointwise' or 'reduced'"
    ):
        CrossAttentionProjector(STUDENT, TEACHER, tokens="dilated")
    with pytest.raises(ValueError, match="expansion is 0 and must be 1 or more"):
        CrossAttentionProjector(STUDENT, TEACHER, expansion=0)


def test_groups_divide_the_students_channels():
    groups = {ds: make_tokens("grouped", ds, 12)[0].groups for ds in (64, 6, 7)}
    assert groups == {64: 4, 6: 2, 7: 1}


def test_keys_and_values_read_one_copy_of_the_tokens():
    """A linear layer copies an input that is not contiguous, and keeps its copy for the backward pass."""
    cap, inputs = CrossAttentionProjector(STUDENT, TEACHER), []
    for layer in (cap.k, cap.v):
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    cap(torch.randn(2, *STUDENT))
    assert inputs[0] is inputs[1] and inputs[0].is_contiguous()
