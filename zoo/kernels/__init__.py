"""Triton kernels, one file for each family; nothing outside this package imports triton.

Importing this package does not import triton either: mechanisms ask `refuse` whether a kernel can
take their tensors, and import the kernel's own module when it can.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

# Looked up once: a compiler cannot look into the search for modules.
INSTALLED = find_spec("triton") is not None
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def refuse(*tensors: Tensor, head_dim: int = 128, by_name: bool = False) -> str | None:
    """Say why a Triton kernel cannot take these tensors, or None where it can.

    Args:
        tensors: Queries, keys, values, (..., D).
        head_dim: Largest D that the kernel takes.
        by_name: The kernel was asked for by its name: then it may also run in the interpreter.
    """
    if not INSTALLED:
        return "triton is not installed"
    kind = tensors[0].device.type
    if kind == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "a CPU runs Triton kernels in the interpreter only (TRITON_INTERPRET=1)"
        if not by_name:
            return "the interpreter is for tests: on a CPU it runs only where asked for by name"
    elif kind != "cuda":
        return f"Triton kernels need a CUDA device, not {kind!r}"
    for x in tensors:
        if x.device != tensors[0].device:
            return f"tensors are on {tensors[0].device} and {x.device}"
        if x.dtype not in DTYPES:
            return f"dtype {x.dtype} is none of float16, bfloat16 and float32"
        if x.dtype != tensors[0].dtype:
            return f"tensors are of {tensors[0].dtype} and {x.dtype}"
        if x.shape[-1] > head_dim:
            return f"head dim {x.shape[-1]} is above {head_dim}"
        if x.shape[-1] < 1:
            return "head dim is 0"
    return None
