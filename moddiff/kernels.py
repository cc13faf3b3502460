"""Which fused kernel computes the attention?  Each by its name, with what it needs, and why it is refused."""

import importlib
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .hooks import walk

HALF = (torch.float16, torch.bfloat16)
ANY = float("inf")


class Needs(NamedTuple):
    """What a kernel asks of a machine and a model.

    gpu      does it run on GPUs alone?
    types    that it takes on a GPU; None: any
    bias     does it take a bias or mask on a GPU?
    cards    the lowest and highest compute capability (major) of the GPUs that it runs on
    module   that has to be imported for it; None: PyTorch is enough
    install  how to get that
    instead  the kernel to use where this one cannot be had
    """

    gpu: bool = True
    types: tuple | None = HALF
    bias: bool = False
    cards: tuple = (8, ANY)
    module: str | None = None
    install: str = ""
    instead: str = "sdpa"


SOURCE = "from the folder hopper of github.com/Dao-AILab/flash-attention"
# A kernel that is not here runs everywhere.
NEEDS = {
    "flash": Needs(module="flash_attn", install='the flash-attn package: pip install "moddiff[flash]"'),
    "sage": Needs(
        module="sageattention",
        install="the sageattention package: pip install sageattention, and triton",
        instead="sage-math",
    ),
    "sdpa-cudnn": Needs(bias=True),
    "sdpa-flash": Needs(gpu=False),
    "sdpa-efficient": Needs(types=None, bias=True, cards=(0, ANY)),
    "sdpa-fa3": Needs(
        cards=(9, 9), module="flash_attn_interface", install=f"FlashAttention 3, built {SOURCE}"
    ),
    "sdpa-fa4": Needs(
        cards=(9, 10),
        module="flash_attn.cute.interface",
        install="FlashAttention 4, a beta: pip install flash-attn-4",
    ),
}


# ---- the kernels: each (q, k, v, bias, scale) -> heads ---------------------------------------------------

BACK_ENDS = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-fa3": SDPBackend.FLASH_ATTENTION,
    "sdpa-fa4": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
# Which FlashAttention PyTorch's flash back end shall be; its own, the second, where nothing is said.
VERSIONS = {"sdpa-fa3": "FA3", "sdpa-fa4": "FA4"}


def back_end(name):
    """The kernel that lets PyTorch use that back end and no other."""
    backend = BACK_ENDS[name]

    def kernel(q, k, v, bias, scale):
        check_call(name, q, bias)
        if bias is not None:
            bias = bias[(None,) * (4 - bias.ndim)]  # PyTorch's flash attention takes two or four axes
            bias = bias if bias.dtype == torch.bool else bias.to(q.dtype)
        if backend == SDPBackend.FLASH_ATTENTION and q.is_cuda:
            switch_flash(VERSIONS.get(name))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)

    return kernel


def switch_flash(version):
    """Let PyTorch's flash attention be "FA3" or "FA4", or its own (None).

    The switch is PyTorch's, and one for the whole process: kernel "sdpa" takes what was chosen last, too.
    """
    switch = torch.nn.attention
    current = getattr(switch, "current_flash_attention_impl", None)  # an older PyTorch has no switch
    if current is None or current() == version:
        return
    if version is None:
        switch.restore_flash_attention_impl()
    else:
        switch.activate_flash_attention_impl(version)


def flash_package(q, k, v, bias, scale):
    """The flash-attn package."""
    check_call("flash", q, bias)
    try:
        from flash_attn import flash_attn_func
    except ImportError as missing:
        raise ImportError(_refused("flash", f"needs {NEEDS['flash'].install}")) from missing
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # that package has [b, n, heads, d]
    return flash_attn_func(q, k, v, softmax_scale=scale).transpose(1, 2)


def sage_package(q, k, v, bias, scale):
    """The sageattention package: int8 scores on a GPU."""
    check_call("sage", q, bias)
    try:
        from sageattention import sageattn
    except ImportError as missing:  # it, or the triton that it needs
        raise ImportError(_refused("sage", f"needs {NEEDS['sage'].install}")) from missing
    return sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=scale)  # [b, heads, n, d]


def flex_kernel(q, k, v, bias, scale):
    """PyTorch's flex attention; compiled on a GPU, unfused on a CPU."""
    flex = flex_function(compiled=q.is_cuda)
    if bias is None:
        return flex(q, k, v, scale=scale)
    bias = bias.expand(*q.shape[:-1], k.shape[-2])  # a view: nothing is copied

    def added(score, b, head, i, j):
        return score + bias[b, head, i, j]

    def allowed(score, b, head, i, j):
        return torch.where(bias[b, head, i, j], score, float("-inf"))

    # PyTorch's own tiles, with tiles of the bias beside them, need more shared memory than an H100 has (torch
    # 2.11: 240 KiB of 227).
    tiles = dict(BLOCK_M=32, BLOCK_N=32) if q.is_cuda else None
    score_mod = allowed if bias.dtype == torch.bool else added
    return flex(q, k, v, score_mod=score_mod, scale=scale, kernel_options=tiles)


@lru_cache(maxsize=2)
def flex_function(compiled):
    from torch.nn.attention.flex_attention import flex_attention  # seconds, so only who asks for it waits

    return torch.compile(flex_attention) if compiled else flex_attention


# ---- what is refused -------------------------------------------------------------------------------------


def lacking(name):
    """What this machine lacks for the kernel of that name, in words; "" where it can run.

    It imports the package that the kernel comes from: one that is installed may still fail there.
    """
    if name not in NEEDS:
        return ""
    needs, found = NEEDS[name], []
    if needs.module is not None and (why := not_imported(needs.module)):
        found.append(f"{needs.install} ({why})")
    if name in VERSIONS and not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        found.append(
            f"a PyTorch with torch.nn.attention.activate_flash_attention_impl, not {torch.__version__}"
        )
    if needs.gpu and not torch.cuda.is_available():
        found.append("a GPU (PyTorch sees none here)")
    elif needs.gpu and (card := another_card(needs)):
        found.append(card)
    return ", and ".join(found)


def another_card(needs):
    """Which kind of GPU is needed in place of the one here; "" where that one will do."""
    (least, most), (major, minor) = needs.cards, torch.cuda.get_device_capability()
    if least <= major <= most:
        return ""
    wanted = f"{least} or higher" if most == ANY else " or ".join(map(str, range(least, most + 1)))
    return f"a GPU of compute capability {wanted} (this one has {major}.{minor})"


def not_imported(module):
    """Why a module cannot be imported; "" when it can."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a library that it was built with is not there
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return ""


def check_choice(model, name):
    """Raise where a model cannot run on the kernel of that name on this machine, before its first forward.

    A model may rest on the CPU and compute on a GPU, so where it lies is left to the call.

    Raises ImportError (a package is missing), ValueError (no such GPU, another type, a bias that it has).
    """
    if name not in NEEDS:
        return
    needs = NEEDS[name]
    if lack := lacking(name):
        missing = needs.module is not None and not_imported(needs.module)
        raise (ImportError if missing else ValueError)(_refused(name, f"needs {lack}"))
    on_gpu = needs.gpu or any(p.is_cuda for p in model.parameters())
    if not on_gpu:
        return
    if card := another_card(needs):  # one that runs on a CPU, too, and the model is on a GPU
        raise ValueError(_refused(name, f"needs {card}"))
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if needs.types and types and not types & set(needs.types):
        arrived = ", ".join(sorted(map(str, types)))
        raise ValueError(
            f'attention kernel "{name}" needs float16 or bfloat16 on a GPU, and the model is {arrived}; '
            f'turn it to bfloat16 first, or use kernel="{needs.instead}"'
        )
    if not needs.bias and (biased := [path for path, part in walk(model) if has_bias(part)]):
        raise ValueError(_refused(name, f"cannot take a bias or mask, which {biased[0] or 'it'} has"))


def has_bias(module):
    """Does this attention always add a bias or a mask to its scores?  An attribute `biased` says so."""
    return hasattr(module, "kernel") and getattr(module, "biased", False)


def check_call(name, q, bias):
    """Raise ValueError where a kernel cannot take this call: its bias, its device, its type."""
    needs = NEEDS.get(name)
    if needs is None or not (needs.gpu or q.is_cuda):
        return
    if bias is not None and not needs.bias:
        where = "" if needs.gpu else " on a GPU"
        raise ValueError(_refused(name, "cannot take a bias or mask" + where))
    if needs.gpu and not q.is_cuda:
        raise ValueError(_refused(name, f"needs a GPU, got {q.dtype} on {q.device}"))
    if needs.types and q.dtype not in needs.types:
        raise ValueError(_refused(name, f"needs float16 or bfloat16 on a GPU, got {q.dtype}"))


def _refused(name, why):
    return f'attention kernel "{name}" {why}; use kernel="{NEEDS[name].instead}"'
