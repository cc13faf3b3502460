"""Do PyTorch's back ends, chosen by name, get the call they need, and say what they lack at the choice?"""

import contextlib
import json
import sys
import types

import pytest
import torch
from torch.nn.attention import SDPBackend
from typer.testing import CliRunner

from moddiff import kernels
from moddiff.attention import KERNELS, attend, kernel_named, use_kernel
from moddiff.cli import app

NAMES = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
ONLY_ON_A_GPU = ["sdpa-cudnn", "sdpa-efficient"]


class OnAGPU(torch.Tensor):
    """A tensor that says that it lies on a GPU."""

    is_cuda = True


class Model(torch.nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.kernel = "sdpa"
        self.weight = torch.nn.Parameter(torch.zeros(2, dtype=dtype))


def qkv(dtype=torch.float32):
    made = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, rows, 8, generator=made).to(dtype) for rows in (5, 7, 7)]


@pytest.mark.parametrize("name", ["sdpa-flash", "sdpa-math"])
@pytest.mark.parametrize(
    "bias", [None, torch.linspace(-1, 1, 35).view(5, 7), (torch.arange(7) < 4).view(1, 1, 1, 7)]
)
def test_those_that_run_on_a_cpu_are_softmax_attention(name, bias):
    q, k, v = qkv()
    heads = attend(q, k, v, bias=bias, scale=0.3, kernel=name)
    bias = bias.double() if bias is not None and bias.dtype != torch.bool else bias
    exact = attend(q.double(), k.double(), v.double(), bias=bias, scale=0.3, kernel="math")
    torch.testing.assert_close(heads.double(), exact, atol=2e-6, rtol=0)
    assert use_kernel(Model(), name).kernel == name


@pytest.mark.parametrize("name", NAMES)
def test_each_name_opens_its_back_end_and_no_other(name, monkeypatch):
    calls, opened = [], []

    @contextlib.contextmanager
    def open_back_end(backend):
        opened.append(backend)
        yield
        opened.append("closed")

    def fused(q, k, v, attn_mask, scale):
        calls.append((q.shape, k.shape, attn_mask, scale, list(opened)))
        return q

    monkeypatch.setattr(kernels, "sdpa_kernel", open_back_end)
    monkeypatch.setattr(kernels.F, "scaled_dot_product_attention", fused)
    q, k, v = (x.as_subclass(OnAGPU) for x in qkv(torch.bfloat16))
    bias = None if name == "sdpa-flash" else torch.zeros(5, 7)
    KERNELS[name](q, k, v, bias, 0.3)
    ((queries, keys, mask, scale, opened_then),) = calls
    assert (queries, keys, scale) == ((2, 3, 5, 8), (2, 3, 7, 8), 0.3)
    assert mask is None if bias is None else mask.dtype == torch.bfloat16
    assert opened_then == [NAMES[name]] and opened[-1] == "closed"


def test_short_names_are_the_same_kernels():
    assert kernel_named("cudnn") is KERNELS["sdpa-cudnn"]
    assert kernel_named("efficient") is KERNELS["sdpa-efficient"]


@pytest.mark.parametrize("name", [*ONLY_ON_A_GPU, "cudnn", "efficient"])
def test_without_a_gpu_the_choice_is_refused_and_the_model_stays(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", bool)  # False
    model = Model()
    with pytest.raises(ValueError, match="needs a GPU, and PyTorch sees none here; use kernel"):
        use_kernel(model, name)
    assert model.kernel == "sdpa"
    with pytest.raises(ValueError, match="needs a GPU, got cpu"):
        attend(*qkv(), kernel=name)


def test_the_type_is_checked_at_the_choice_and_at_the_call(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="the model is torch.float32; turn it to bfloat16 first"):
        use_kernel(Model(), "cudnn")
    assert use_kernel(Model(torch.bfloat16), "cudnn").kernel == "cudnn"
    assert use_kernel(Model(), "efficient").kernel == "efficient"
    for name in ("sdpa-cudnn", "sdpa-flash"):
        with pytest.raises(ValueError, match="needs float16 or bfloat16 on a GPU, got torch.float32"):
            KERNELS[name](*(x.as_subclass(OnAGPU) for x in qkv()), None, 1.0)


def test_flash_takes_no_mask_on_a_gpu():
    q, k, v = (x.as_subclass(OnAGPU) for x in qkv(torch.bfloat16))
    with pytest.raises(ValueError, match="cannot take a bias or mask on a GPU"):
        KERNELS["sdpa-flash"](q, k, v, torch.zeros(5, 7), 1.0)


def test_the_command_says_of_every_kernel_how_it_does_or_why_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", bool)  # False
    done = CliRunner().invoke(app, ["kernels", "--tokens", "40", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["shape"] == [1, 12, 40, 128] and list(found["kernels"]) == list(KERNELS)
    rows = found["kernels"]
    for name in ("sdpa", "math", "flex", "sdpa-flash", "sdpa-math"):
        assert rows[name]["seconds"] > 0 and 1e-9 < rows[name]["error"] < 1e-6
    assert 1e-4 < rows["sage-math"]["error"] < 0.1  # int8 is coarser, and it shows
    for name in ONLY_ON_A_GPU:
        assert "needs a GPU, got cpu" in rows[name]["why"]

    table = CliRunner().invoke(app, ["kernels", "--tokens", "3"]).stdout
    assert [line.split()[0] for line in table.splitlines()[2:]] == list(KERNELS)
    assert "needs a GPU, got cpu" in table


def test_sage_calls_its_package_as_that_expects(monkeypatch):
    calls = []

    def sageattn(q, k, v, **options):
        calls.append((q.shape, k.shape, q.dtype, options))
        return q

    monkeypatch.setitem(sys.modules, "sageattention", types.SimpleNamespace(sageattn=sageattn))
    q, k, v = (x.as_subclass(OnAGPU) for x in qkv(torch.bfloat16))
    assert KERNELS["sage"](q, k, v, None, 0.3) is q
    options = dict(tensor_layout="HND", is_causal=False, sm_scale=0.3)
    assert calls == [((2, 3, 5, 8), (2, 3, 7, 8), torch.bfloat16, options)]
    with pytest.raises(ValueError, match="got torch.float32 on cpu; use kernel"):
        attend(*qkv(), kernel="sage")
    with pytest.raises(ValueError, match='"sage" cannot take a bias or mask'):
        attend(*qkv(), bias=torch.zeros(5, 7), kernel="sage")


def test_sage_says_that_its_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sageattention", None)
    with pytest.raises(ImportError, match="needs the sageattention package: pip install sageattention"):
        attend(*qkv(), kernel="sage")
