"""Which fused kernel computes the attention?  PyTorch's own, chosen by name, and what each needs."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

HALF = (torch.float16, torch.bfloat16)
# name -> PyTorch's back end, whether it needs a GPU, and the types it takes there (None: any)
BACK_ENDS = {
    "sdpa-cudnn": (SDPBackend.CUDNN_ATTENTION, True, HALF),
    "sdpa-flash": (SDPBackend.FLASH_ATTENTION, False, HALF),
    "sdpa-efficient": (SDPBackend.EFFICIENT_ATTENTION, True, None),
    "sdpa-math": (SDPBackend.MATH, False, None),
}


def back_end(name):
    """The kernel (q, k, v, bias, scale) -> heads that lets PyTorch use that back end and no other."""
    backend, needs_gpu, gpu_types = BACK_ENDS[name]

    def kernel(q, k, v, bias, scale):
        if needs_gpu and not q.is_cuda:
            raise ValueError(f'attention kernel "{name}" needs a GPU, got {q.device}; use kernel="sdpa"')
        if q.is_cuda and gpu_types and q.dtype not in gpu_types:
            raise ValueError(
                f'attention kernel "{name}" needs float16 or bfloat16 on a GPU, got {q.dtype}; '
                'use kernel="sdpa"'
            )
        if q.is_cuda and bias is not None and name == "sdpa-flash":
            raise ValueError(
                'attention kernel "sdpa-flash" cannot take a bias or mask on a GPU; use kernel="sdpa"'
            )
        if bias is not None:
            bias = bias[(None,) * (4 - bias.ndim)]  # PyTorch's flash attention takes two or four axes
            bias = bias if bias.dtype == torch.bool else bias.to(q.dtype)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)

    return kernel


def sage_package(q, k, v, bias, scale):
    """The sageattention package: int8 scores on a GPU, half precision, without a bias."""
    if bias is not None:
        raise ValueError(
            'attention kernel "sage" cannot take a bias or mask; use kernel="sdpa" or "sage-math"'
        )
    try:
        from sageattention import sageattn
    except ImportError as missing:
        raise ImportError(
            'attention kernel "sage" needs the sageattention package: pip install sageattention, '
            'or use kernel="sage-math"'
        ) from missing
    if q.dtype not in HALF or not q.is_cuda:
        raise ValueError(
            f'attention kernel "sage" needs float16 or bfloat16 on a GPU, got {q.dtype} on {q.device}; '
            'use kernel="sage-math"'
        )
    return sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=scale)  # [b, heads, n, d]


def check_choice(model, name):
    """Raise ValueError where a model cannot run on PyTorch's back end of that name, before its first forward.

    A model may rest on the CPU and compute on a GPU, so where it lies is left to the call.
    """
    _, needs_gpu, gpu_types = BACK_ENDS[name]
    if needs_gpu and not torch.cuda.is_available():
        raise ValueError(
            f'attention kernel "{name}" needs a GPU, and PyTorch sees none here; use kernel="sdpa"'
        )
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    on_gpu = needs_gpu or any(p.is_cuda for p in model.parameters())
    if on_gpu and gpu_types and types and not types & set(gpu_types):
        arrived = ", ".join(sorted(map(str, types)))
        raise ValueError(
            f'attention kernel "{name}" needs float16 or bfloat16 on a GPU, and the model is {arrived}; '
            'turn it to bfloat16 first, or use kernel="sdpa"'
        )
