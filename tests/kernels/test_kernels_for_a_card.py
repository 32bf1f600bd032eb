"""Every kernel compiles for a card that is not there: the interpreter forgives what that does not.

A variable that changes its type or shape in a loop, for one, runs in the interpreter only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="kernels need triton")

# Kernels are compiled and not launched: their public forms run on CPU tensors whose results are
# never looked at.
PREPARE = """
from types import SimpleNamespace
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
triton.runtime.driver.set_active(SimpleNamespace(
    get_current_device=lambda: 0,
    get_current_stream=lambda device=0: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
))
run = JITFunction.run
def compiled(self, *args, warmup, **kwargs):
    run(self, *args, warmup=True, **kwargs)
    print("compiled", self.__name__)
JITFunction.run = compiled
import zoo.kernels
zoo.kernels.refuse = lambda *args, **kwargs: None
def tensors(*shapes, dtype):
    return [torch.zeros(s, dtype=dtype, requires_grad=True) for s in shapes]
def both(form, *leaves):
    out = form(*leaves)
    torch.autograd.grad(out.sum(), leaves)
"""

CALLS = {
    "moba": """
from zoo.kernels import moba
moba._check_device = lambda q: None
for dtype, d, heads, cu in [(torch.bfloat16, 48, 2, torch.tensor([0, 30, 80]))]:
    chosen = torch.full((1, heads, 80, 1), -1, dtype=torch.int32)
    q, k, v = tensors((1, heads, 80, d), (1, 1, 80, d), (1, 1, 80, d), dtype=dtype)
    both(lambda *x: moba.moba_attention(*x, chosen, 32, 0.1, cu), q, k, v)
""",
    "moba_gate": """
from zoo.kernels import moba, moba_gate
moba_gate.refuse = zoo.kernels.refuse
moba._check_device = lambda q: None
for dtype, cu in [
    (torch.bfloat16, torch.tensor([0, 30, 80])), (torch.float16, None), (torch.float32, None)
]:
    q, k = tensors((1, 2, 80, 48), (1, 1, 80, 48), dtype=dtype)
    moba_gate.choose(q, k, 16, 3, cu)
""",
    "landmark": """
from zoo.kernels import landmark
for dtype, d, heads, cu in [(torch.bfloat16, 48, 2, torch.tensor([0, 30, 80]))]:
    q, k, v = tensors((1, heads, 80, d), (1, 1, 80, d), (1, 1, 80, d), dtype=dtype)
    both(lambda *x: landmark.landmark_attention(*x, 31, 0.1, cu), q, k, v)
""",
    "neighborhood": """
from zoo.kernels import neighborhood
neighborhood.INTERPRET = True  # only asked whether a CPU will do
for dtype, d, shape, kernel, causal in [
    (torch.bfloat16, 64, (80,), (24,), (True,)),
    (torch.bfloat16, 48, (8, 10), (3, 5), (False, False)),
]:
    axes = len(shape)
    q, k, v = tensors((1, 2, 80, d), (1, 1, 80, d), (1, 1, 80, d), dtype=dtype)
    both(lambda *x: neighborhood.neighborhood_attention(
        *x, shape, kernel, (1,) * axes, (1,) * axes, causal, 0.1), q, k, v)
""",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile the kernels")
@pytest.mark.parametrize("name", CALLS)
def test_kernels_compile_for_a_card(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-c", PREPARE + CALLS[name]],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr[-3000:]
    least = 2 if name == "moba_gate" else 3
    assert len(set(run.stdout.split()) - {"compiled"}) >= least, run.stdout
