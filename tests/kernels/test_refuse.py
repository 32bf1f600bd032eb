"""Why a kernel cannot take some tensors, and what a host does then."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import zoo
from zoo import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _x(dim: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(1, 2, 5, dim, dtype=dtype, device=DEVICE)


def test_what_a_kernel_takes_is_not_refused() -> None:
    pytest.importorskip("triton", reason="without it everything is refused")
    for dtype in kernels.DTYPES:
        assert kernels.refuse(_x(128, dtype), _x(16, dtype), by_name=True) is None


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([_x(129)], "head dim 129 is above 128"),
        ([_x(64), _x(256)], "head dim 256 is above 128"),
        ([_x(0)], "head dim is 0"),
        ([_x(dtype=torch.float64)], "dtype torch.float64 is none of"),
        ([_x(), _x(dtype=torch.bfloat16)], "tensors are of torch.float32 and torch.bfloat16"),
        ([_x(), _x().to("meta")], "tensors are on"),
        ([_x().to("meta")], "need a CUDA device, not 'meta'"),
    ],
)
def test_what_it_does_not_take_is_refused_with_a_reason(
    tensors: list[Tensor], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="without it there is another reason")
    found = kernels.refuse(*tensors, by_name=True)
    assert found is not None
    assert reason in found
    monkeypatch.setattr(kernels, "INSTALLED", False)
    assert kernels.refuse(*tensors, by_name=True) == "triton is not installed"


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a card")
def test_a_cpu_runs_kernels_by_name_and_in_the_interpreter_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton", reason="without it there is another reason")
    assert "only where asked for by name" in str(kernels.refuse(_x()))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "in the interpreter only" in str(kernels.refuse(_x(), by_name=True))


SPECS = {
    "moba(block=4, topk=2)": ("moba_triton", "sdpa_strips"),
    "landmark(block=3)": ("landmark_triton", "landmark_blocks"),
    "lightning(lrpe=False)": ("lightning_triton", "lightning"),
    "neighborhood(kernel=3)": ("neighborhood_triton", "sdpa_strips"),
}


@pytest.fixture
def _as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the CPU and its interpreter for a card, so that they are not what is in the way."""
    refuse = kernels.refuse

    def found(*tensors: Tensor, head_dim: int = 128, by_name: bool = False) -> str | None:
        return refuse(*tensors, head_dim=head_dim, by_name=True)

    for place in (
        *("kernels.refuse", "select.moba.refuse_kernel", "select._moba_attention.refuse"),
        "attend._lightning_form.refuse",
    ):
        monkeypatch.setattr(f"zoo.{place}", found)


@pytest.mark.usefixtures("_as_on_a_card")
@pytest.mark.parametrize("spec", SPECS)
def test_wide_heads_fall_back_under_auto_and_the_explanation_says_so(spec: str) -> None:
    pytest.importorskip("triton", reason="without it there is another reason")
    width = 264  # above the limit of every kernel
    host = zoo.create(spec, 16, 2, head_dim=width, causal=True, device=DEVICE)
    assert isinstance(host, zoo.Attention)
    x = torch.randn(1, 9, 16, device=DEVICE)
    kernel, instead = SPECS[spec]
    told = host.explain(x)
    assert f"{width}" in told.refused[kernel]
    assert told.route == instead or DEVICE == "cuda"
    expected = host(x)
    host.route = kernel
    with pytest.raises(zoo.ZooError, match=f"{width}"):
        host(x)
    host.route = instead
    assert torch.equal(host(x), expected)
