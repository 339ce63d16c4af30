import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from nanochat import kernels
from nanochat.common import UserError
from nanochat.kernels import (
    Float8Linear,
    Float8Matmul,
    attention_backend,
    convert_from_float8,
    convert_to_float8,
    float8_paused,
    has_float8,
    machine_limits,
    memory_bandwidth,
    peak_flops,
    profile_step,
    quantize,
    roofline,
    scaled_matmul,
    time_call,
)
from nanochat.model import GPT, GPTConfig, Linear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_float8(torch.device("cuda"))),
    reason="needs a GPU with 8-bit products",
)


def relative(a, truth):
    return float((a.detach().cpu().double() - truth.detach()).norm() / truth.detach().norm())


def products(x, weight, grad, matmul):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = matmul(x, weight)
    y.backward(grad.to(y.dtype))
    return y, x.grad, weight.grad


@given(
    st.integers(0, 10_000),
    st.floats(-30, 30),
    st.sampled_from([(E4M3, 2.0**-4), (E5M2, 2.0**-3)]),
)
@settings(max_examples=60, deadline=None)
def test_quantize_keeps_half_a_step_of_the_format(seed, exponent, format):
    dtype, half_step = format
    x = torch.randn(257, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (exponent / 3)
    x8, scale = quantize(x, dtype)
    back = x8.double() * scale.double()
    assert x8.dtype == dtype and scale.dtype == torch.float32 and scale.dim() == 0
    assert x8.float().isfinite().all()
    smallest = torch.finfo(dtype).smallest_normal * float(scale)
    bound = (half_step * x.double().abs()).clamp(min=half_step * smallest) * (1 + 1e-5)
    assert ((back - x.double()).abs() <= bound).all()
    top = x.abs().argmax()
    assert math.isclose(float(back[top].abs()), float(x[top].abs()), rel_tol=1e-5)


def test_quantize_zero_and_non_finite():
    x8, scale = quantize(torch.zeros(4))
    assert (x8.float() == 0).all() and scale > 0
    assert quantize(torch.tensor([1.0, math.inf]))[1].isinf()  # not hidden: the loss becomes NaN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_matmul_against_float64(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 48, generator=generator)
    weight = torch.randn(32, 48, generator=generator) / 7
    grad = torch.randn(64, 32, generator=generator) * 1e-6
    truth = products(x.double(), weight.double(), grad.double(), F.linear)
    eight = products(x.to(dtype), weight, grad, Float8Matmul.apply)
    assert eight[0].dtype == eight[1].dtype == dtype and eight[2].dtype == torch.float32
    for result, exact, bound in zip(eight, truth, (0.05, 0.08, 0.08)):
        assert relative(result, exact) < bound


def test_emulation_is_exactly_the_product_of_the_rounded_numbers():
    generator = torch.Generator().manual_seed(1)
    a8, scale_a = quantize(torch.randn(16, 32, generator=generator))
    b8, scale_b = quantize(torch.randn(32, 16, generator=generator), E5M2)
    exact = (a8.double() * scale_a.double()) @ (b8.double() * scale_b.double())
    result = scaled_matmul(a8, b8, scale_a, scale_b, torch.float32)
    assert torch.allclose(result.double(), exact, rtol=1e-5, atol=1e-6)


def small_gpt():
    return GPT(GPTConfig(vocab_size=256, seq_len=16, n_layer=1, n_head=2, n_kv_head=1, n_embd=128))


def test_convert_keeps_parameters_and_is_undone():
    model = small_gpt()
    before = {name: id(p) for name, p in model.named_parameters()}
    assert convert_to_float8(model) == 4  # q, proj, up, down; k and v have 64 outputs
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert type(model.head) is Linear and type(model.blocks[0].attention.k) is Linear
    assert convert_to_float8(small_gpt(), min_dim=64, skip=()) == 7
    with float8_paused(model):
        assert not any(isinstance(m, Float8Linear) for m in model.modules())
    assert sum(isinstance(m, Float8Linear) for m in model.modules()) == 4
    assert convert_from_float8(model) == 4 and type(model.blocks[0].mlp.up) is Linear


def test_a_pause_gives_the_plain_model_and_survives_an_error():
    model = small_gpt()
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.1, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(16)[None]
    plain = model(ids)
    convert_to_float8(model)
    eight = model(ids)
    assert not torch.equal(eight, plain) and relative(eight, plain.detach().double()) < 0.2
    with pytest.raises(KeyError), float8_paused(model):
        assert torch.equal(model(ids), plain)
        raise KeyError
    assert torch.equal(model(ids), eight)
    assert torch.equal(model(ids[:, :7]), model.eval()(ids[:, :7]))  # 7 rows: not in 8 bits


def test_float8_layer_with_a_bias():
    layer = nn.Linear(128, 128)
    x = torch.randn(2, 16, 128, generator=torch.Generator().manual_seed(0))
    truth = F.linear(x.double(), layer.weight.double(), layer.bias.double()).detach()
    assert convert_to_float8(layer, skip=()) == 1
    y = layer(x)
    y.sum().backward()
    assert y.shape == (2, 16, 128) and relative(y, truth) < 0.05
    assert torch.equal(layer.bias.grad, torch.full((128,), 32.0))
    for rows in (16, 5):  # 5 do not divide by 16 and are multiplied in bfloat16
        assert layer(x[0, :rows].bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
        ("NVIDIA H200", torch.float8_e4m3fn, 1978.9),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA GH200 480GB", torch.bfloat16, 989.4),
        ("NVIDIA A100-SXM4-40GB", torch.bfloat16, 312),
        ("NVIDIA A10G", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 3080 Ti", torch.bfloat16, None),
        ("NVIDIA L4", torch.float16, 121),
        ("NVIDIA L40S", torch.float16, 362),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("Tesla T4", torch.float32, 8.1),
        ("NVIDIA A100 80GB PCIe", torch.float8_e5m2, None),
        ("NVIDIA GeForce GTX 1080", torch.float32, None),
    ],
)
def test_peak_flops_by_name(name, dtype, tera):
    peak = peak_flops(name, dtype)
    assert peak is None if tera is None else math.isclose(peak, tera * 1e12)


def test_memory_bandwidth_by_name():
    assert memory_bandwidth("NVIDIA A100-SXM4-80GB") == 2039e9
    assert memory_bandwidth("NVIDIA A100-SXM4-40GB") == 1555e9
    assert memory_bandwidth("something else") is None


@given(st.floats(1, 1e18), st.floats(1, 1e15))
def test_roofline_is_the_slower_of_two(flops, nbytes):
    result = roofline(flops, nbytes, "NVIDIA H200", torch.bfloat16)
    compute, memory = flops / 989.4e12, nbytes / 4.8e12
    assert math.isclose(result.seconds, max(compute, memory))
    assert result.bound == ("memory" if memory > compute else "arithmetic")
    assert (result.intensity < result.ridge) == (result.bound == "memory") or math.isclose(
        result.intensity, result.ridge
    )


def test_limits_of_a_cpu_are_measured_and_of_an_unknown_name_refused():
    limits = machine_limits("cpu")
    assert limits.flops > 1e8 and limits.bandwidth > 1e8
    assert machine_limits("cpu") is limits  # measured once
    with pytest.raises(UserError, match="GPU_SPEEDS"):
        machine_limits("NVIDIA Abacus")


def test_attention_backend_names_a_kernel():
    known = {"flash", "cudnn", "efficient", "math", "overrideable", "unknown"}
    assert attention_backend("cpu") in known
    assert attention_backend(torch.device("cpu"), torch.float32, head_dim=64) in known


def test_time_call_and_profile_find_the_matrix_product():
    a = torch.ones(256, 256)
    assert time_call(torch.mm, a, a, repeats=3) > 0
    rows = profile_step(lambda: torch.mm(a, a), steps=2, top=3)
    assert rows[0].name == "aten::mm" and rows[0].calls == 1
    assert 0 < sum(row.share for row in rows) <= 1 + 1e-9


@needs_gpu
def test_gpu_products_agree_with_their_emulation(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 128, generator=generator).cuda()
    weight = (torch.randn(384, 128, generator=generator) / 11).cuda()
    grad = (torch.randn(256, 384, generator=generator) * 1e-5).cuda()
    for dtype in (torch.bfloat16, torch.float32):
        real = products(x.to(dtype), weight, grad, Float8Matmul.apply)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "has_float8", lambda device: False)
            emulated = products(x.to(dtype), weight, grad, Float8Matmul.apply)
        for a, b in zip(real, emulated):
            assert a.dtype == b.dtype and relative(a, b.cpu().double()) < 0.01


@needs_gpu
def test_gpu_training_step_compiles_in_eight_bits():
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, 64, n_layer=2, n_head=2, n_kv_head=2, n_embd=256)).cuda()
    model.compute_dtype = torch.bfloat16
    ids = torch.randint(0, 256, (4, 65), device="cuda")
    convert_to_float8(model)
    eager = model(ids[:, :-1], ids[:, 1:])
    eager.backward()
    expected = model.blocks[0].mlp.down.weight.grad.clone()
    model.zero_grad()
    loss = torch.compile(model)(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert abs(float(loss.detach()) - float(eager.detach())) < 1e-2
    got = model.blocks[0].mlp.down.weight.grad
    assert relative(got, expected.cpu().double()) < 0.1 or float(expected.norm()) < 1e-6
