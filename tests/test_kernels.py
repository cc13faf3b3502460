"""Do fused kernels, chosen by name, get the call they need, and say at the choice what they lack?"""

import contextlib
import json
import sys
import types

import pytest
import small
import torch
from torch.nn.attention import SDPBackend
from typer.testing import CliRunner

from moddiff import kernels
from moddiff.attention import KERNELS, attend, kernel_named, use_kernel
from moddiff.cli import app
from moddiff.kernels import lacking
from moddiff.text import TextConfig, TextEncoder

NAMES = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-fa3": SDPBackend.FLASH_ATTENTION,
    "sdpa-fa4": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
ONLY_ON_A_GPU = ["sdpa-cudnn", "sdpa-efficient"]
# name -> what is imported for it, what to install, and what to use instead
PACKAGES = {
    "flash": ("flash_attn", 'pip install "moddiff[flash]"', "sdpa"),
    "sage": ("sageattention", "pip install sageattention, and triton", "sage-math"),
    "sdpa-fa3": ("flash_attn_interface", "from the folder hopper of github.com/Dao-AILab/", "sdpa"),
    "sdpa-fa4": ("flash_attn.cute.interface", "pip install flash-attn-4", "sdpa"),
}
NO_BIAS = [*PACKAGES, "sdpa-flash"]


class OnAGPU(torch.Tensor):
    """A tensor that says that it lies on a GPU."""

    is_cuda = True


class Model(torch.nn.Module):
    def __init__(self, dtype=torch.float32, biased=False):
        super().__init__()
        self.kernel, self.biased = "sdpa", biased
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
    monkeypatch.setattr(kernels, "switch_flash", lambda version: None)
    monkeypatch.setattr(kernels.F, "scaled_dot_product_attention", fused)
    q, k, v = (x.as_subclass(OnAGPU) for x in qkv(torch.bfloat16))
    bias = None if name in NO_BIAS else torch.zeros(5, 7)
    KERNELS[name](q, k, v, bias, 0.3)
    ((queries, keys, mask, scale, opened_then),) = calls
    assert (queries, keys, scale) == ((2, 3, 5, 8), (2, 3, 7, 8), 0.3)
    assert mask is None if bias is None else mask.dtype == torch.bfloat16
    assert opened_then == [NAMES[name]] and opened[-1] == "closed"


def test_short_names_are_the_same_kernels():
    assert kernel_named("cudnn") is KERNELS["sdpa-cudnn"]
    assert kernel_named("efficient") is KERNELS["sdpa-efficient"]


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says that it has a GPU of that compute capability, and every package."""

    def seen(major, minor=0):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, minor))
        for module, _, _ in PACKAGES.values():
            for name in (module.partition(".")[0], module):
                monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    return seen


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", bool)  # False
    for module, _, _ in PACKAGES.values():
        monkeypatch.setitem(sys.modules, module.partition(".")[0], None)


@pytest.mark.parametrize("name", [*ONLY_ON_A_GPU, "cudnn", "efficient"])
def test_without_a_gpu_the_choice_is_refused_and_the_model_stays(name, no_gpu):
    model = Model()
    with pytest.raises(ValueError, match=r"needs a GPU \(PyTorch sees none here\); use kernel"):
        use_kernel(model, name)
    assert model.kernel == "sdpa"
    with pytest.raises(ValueError, match="needs a GPU, got torch.float32 on cpu"):
        attend(*qkv(), kernel=name)


@pytest.mark.parametrize("name", PACKAGES)
def test_without_its_package_the_choice_says_what_to_install_and_what_else_is_missing(name, no_gpu):
    module, install, instead = PACKAGES[name]
    model = Model(torch.bfloat16)
    with pytest.raises(ImportError) as refused:
        use_kernel(model, name)
    said = str(refused.value)
    assert install in said and module.partition(".")[0] in said and "a GPU (PyTorch sees none here)" in said
    assert said.endswith(f'use kernel="{instead}"') and model.kernel == "sdpa"
    assert lacking(name) in said


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_there_and_does_not_load_is_missing_too(name, gpu, monkeypatch):
    def broken(module):
        raise OSError(f"{module}: libcudart.so.12: cannot open shared object file")

    gpu(9)
    monkeypatch.setattr(kernels.importlib, "import_module", broken)
    with pytest.raises(ImportError, match="libcudart.so.12: cannot open"):
        use_kernel(Model(torch.bfloat16), name)


@pytest.mark.parametrize(
    ("name", "major", "said"),
    [
        ("sdpa-fa3", 8, r"compute capability 9 \(this one has 8.6\)"),
        ("sdpa-fa3", 10, r"compute capability 9 \(this one has 10.6\)"),
        ("sdpa-fa4", 12, r"compute capability 9 or 10 \(this one has 12.6\)"),
        ("flash", 7, r"compute capability 8 or higher \(this one has 7.6\)"),
        ("sage", 7, r"compute capability 8 or higher \(this one has 7.6\)"),
        ("cudnn", 7, r"compute capability 8 or higher \(this one has 7.6\)"),
    ],
)
def test_a_gpu_of_another_kind_is_refused_at_the_choice(name, major, said, gpu):
    gpu(major, 6)
    with pytest.raises(ValueError, match=said):
        use_kernel(Model(torch.bfloat16), name)
    assert use_kernel(Model(torch.bfloat16), "efficient").kernel == "efficient"  # any GPU will do


def test_flash_on_an_old_gpu_is_refused_for_a_model_that_is_there_alone(gpu, monkeypatch):
    gpu(7, 5)
    assert use_kernel(Model(torch.bfloat16), "sdpa-flash").kernel == "sdpa-flash"  # it may stay on the CPU
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True)
    with pytest.raises(ValueError, match=r"compute capability 8 or higher \(this one has 7.5\)"):
        use_kernel(Model(torch.bfloat16), "sdpa-flash")


@pytest.mark.parametrize("name", [*PACKAGES, "sdpa-cudnn", "sdpa-efficient"])
def test_with_all_it_needs_a_kernel_is_taken(name, gpu):
    gpu(9)
    assert lacking(name) == "" and use_kernel(Model(torch.bfloat16), name).kernel == name


@pytest.mark.parametrize("name", ["sdpa-fa3", "sdpa-fa4"])
def test_a_pytorch_without_the_switch_is_refused(name, gpu, monkeypatch):
    gpu(9)
    monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl")
    with pytest.raises(ValueError, match="a PyTorch with torch.nn.attention.activate_flash_attention_impl"):
        use_kernel(Model(torch.bfloat16), name)


def test_the_type_is_checked_at_the_choice_and_at_the_call(gpu):
    gpu(9)
    for name in ("cudnn", *PACKAGES):
        with pytest.raises(ValueError, match="the model is torch.float32; turn it to bfloat16 first"):
            use_kernel(Model(), name)
    assert use_kernel(Model(), "efficient").kernel == "efficient"
    for name in ("sdpa-cudnn", "sdpa-flash", *PACKAGES):
        with pytest.raises(ValueError, match="needs float16 or bfloat16 on a GPU, got torch.float32"):
            KERNELS[name](*(x.as_subclass(OnAGPU) for x in qkv()), None, 1.0)


@pytest.mark.parametrize("name", NO_BIAS)
def test_a_bias_is_refused_at_the_choice_and_at_the_call(name, gpu):
    gpu(9)
    q, k, v = (x.as_subclass(OnAGPU) for x in qkv(torch.bfloat16))
    with pytest.raises(ValueError, match="cannot take a bias or mask"):
        KERNELS[name](q, k, v, torch.zeros(5, 7), 1.0)
    if name != "sdpa-flash":  # on a CPU it takes one, and where a model will compute is not known yet
        with pytest.raises(ValueError, match="cannot take a bias or mask, which layers.0.attn has"):
            use_kernel(TextEncoder(TextConfig(**small.TEXT), None).bfloat16(), name)


def test_the_switch_is_turned_once_and_back(monkeypatch):
    turned, current = [], [None]

    def activate(version):
        turned.append(version)
        current[0] = version

    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: current[0])
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", lambda: activate(None))
    monkeypatch.setattr(kernels.F, "scaled_dot_product_attention", lambda q, k, v, **_: q)
    q, k, v = (x.as_subclass(OnAGPU) for x in qkv(torch.bfloat16))
    for name in ("sdpa-flash", "sdpa-fa3", "sdpa-fa3", "sdpa-fa4", "sdpa-cudnn", "sdpa-flash", "sdpa-flash"):
        KERNELS[name](q, k, v, None, 1.0)
    assert turned == ["FA3", "FA4", None]


def test_pytorch_knows_the_versions_that_are_asked_for():
    assert set(kernels.VERSIONS.values()) <= set(torch.nn.attention.list_flash_attention_impls())


def test_the_command_says_of_every_kernel_how_it_does_or_why_not(no_gpu):
    done = CliRunner().invoke(app, ["kernels", "--tokens", "40", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["shape"] == [1, 12, 40, 128] and list(found["kernels"]) == list(KERNELS)
    rows = found["kernels"]
    for name in ("sdpa", "math", "flex", "sdpa-flash", "sdpa-math"):
        assert rows[name]["seconds"] > 0 and 1e-9 < rows[name]["error"] < 1e-6
    assert 1e-4 < rows["sage-math"]["error"] < 0.1  # int8 is coarser, and it shows
    for name in ONLY_ON_A_GPU:
        assert rows[name]["why"] == "needs a GPU (PyTorch sees none here)"
    for name, (_, install, _) in PACKAGES.items():
        assert install in rows[name]["why"]

    table = CliRunner().invoke(app, ["kernels", "--tokens", "3"]).stdout
    assert [line.split()[0] for line in table.splitlines()[2:]] == list(KERNELS)
    assert "needs a GPU (PyTorch sees none here)" in table


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
    with pytest.raises(ValueError, match='got torch.float32 on cpu; use kernel="sage-math"'):
        attend(*qkv(), kernel="sage")
    with pytest.raises(ValueError, match='"sage" cannot take a bias or mask'):
        attend(*qkv(), bias=torch.zeros(5, 7), kernel="sage")


def test_flash_calls_its_package_as_that_expects(monkeypatch):
    calls = []

    def flash_attn_func(q, k, v, **options):
        calls.append((q.shape, k.shape, options))
        return q

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash_attn_func))
    q, k, v = (x.as_subclass(OnAGPU) for x in qkv(torch.bfloat16))
    assert torch.equal(KERNELS["flash"](q, k, v, None, 0.3), q)
    assert calls == [((2, 5, 3, 8), (2, 7, 3, 8), {"softmax_scale": 0.3})]


@pytest.mark.parametrize("name", ["flash", "sage"])
def test_a_call_by_hand_says_that_the_package_is_missing(name, no_gpu):
    q, k, v = (x.as_subclass(OnAGPU) for x in qkv(torch.bfloat16))
    with pytest.raises(ImportError) as refused:
        KERNELS[name](q, k, v, None, 1.0)
    assert PACKAGES[name][1] in str(refused.value) and PACKAGES[name][2] in str(refused.value)
