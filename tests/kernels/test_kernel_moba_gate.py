"""The kernel of MoBA's gate against the gate in PyTorch: in Triton's interpreter, or on a card.

Whole numbers make every sum exact and many gates equal, so that both have to find the same.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import ZooError
from zoo.testing.tolerances import assert_close

pytest.importorskip("triton", reason="the kernels need triton")

from zoo.kernels import moba_gate
from zoo.kernels.moba_gate import MOST, choose
from zoo.select._moba_gate import gate, lay_blocks
from zoo.select.moba import choose_blocks, moba_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A card's tiles are longer than the interpreter's 32 rows, so it gets longer sequences.
LONG = 5 if DEVICE == "cuda" else 1
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(
    batch: int,
    heads: int,
    groups: int,
    tokens: int,
    width: int,
    block: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Queries and keys of whole numbers, with whole means of blocks of `block`."""
    q = torch.randint(-2, 3, (batch, heads, tokens, width))
    k = torch.randint(-1, 2, (batch, groups, tokens, width)) * block
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype)


def compare(q: Tensor, k: Tensor, block: int, picks: int, cu: Tensor | None = None) -> None:
    """Hold the kernel to the gate in PyTorch, which a CPU always uses."""
    found = choose(q, k, block, picks, None if cu is None else cu.to(DEVICE))
    assert found.dtype == torch.int32
    assert found.device == q.device
    blocks = lay_blocks(q.shape[2], k.shape[2], block, cu, torch.device("cpu"))
    assert torch.equal(found.cpu(), gate(q.cpu(), k.cpu(), blocks, picks))


@pytest.mark.parametrize(
    ("block", "picks"),
    [
        pytest.param(3, 3, id="more than a tile of blocks"),
        pytest.param(5, MOST, id="more choices than blocks"),
        pytest.param(37, 2, id="longer than a tile of queries"),
        pytest.param(53 * LONG, 2, id="all in one block"),
        pytest.param(4000, 2, id="longer than the sequence"),
        pytest.param(5, 0, id="nothing to choose"),
    ],
)
def test_equals_the_gate_in_pytorch(block: int, picks: int) -> None:
    compare(*make(1, 1, 1, 53 * LONG, 16, block), block, picks)


def test_blocks_of_one_token() -> None:
    compare(*make(1, 1, 1, 21, 16, 1), 1, 2)


@pytest.mark.parametrize("dtype", TYPES)
def test_types_samples_and_grouped_heads(dtype: torch.dtype) -> None:
    compare(*make(2, 4, 2, 14, 16, 4, dtype), 4, 3)


@pytest.mark.parametrize(
    ("width", "dtype"),
    [
        (5, torch.float32),
        (40, torch.bfloat16),
        (128, torch.float16),
        (256, torch.float32),
        (256, torch.bfloat16),
    ],
)
def test_widths_of_heads(width: int, dtype: torch.dtype) -> None:
    compare(*make(1, 1, 1, 21, width, 4, dtype), 4, 3)


def test_the_first_of_equal_blocks_wins() -> None:
    k = torch.randn(1, 1, 45, 16, device=DEVICE)
    chosen = choose(torch.zeros_like(k), k, 2, 4)[0, 0]
    for t in (0, 1, 2, 3, 9, 44):
        past = min(4, t // 2)
        assert chosen[t].tolist() == [*range(past), *[-1] * (4 - past)]


def test_equal_blocks_far_apart_keep_their_order() -> None:
    """A better block that comes later moves equals on, in their order."""
    levels = torch.tensor([5, 5, 3, 5, *[1] * 16, 5, 7, 3, 5, 0]).float()
    k = torch.zeros(1, 1, 25, 16)
    k[..., 0] = levels
    chosen = choose(torch.ones_like(k).to(DEVICE), k.to(DEVICE), 1, 8)
    assert chosen[0, 0, 24].tolist() == [21, 0, 1, 3, 20, 23, 2, 22]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences(dtype: torch.dtype) -> None:
    cu = torch.tensor([0, 0, 17, 18, 18, 50, 50], dtype=dtype)
    compare(*make(1, 2, 1, 50, 16, 4), 4, 3, cu)


def test_many_packed_tokens_of_one() -> None:
    q, k = make(1, 1, 1, 9, 16, 4)
    cu = torch.arange(10, device=DEVICE)
    assert choose(q, k, 4, 2, cu).eq(-1).all()


@pytest.mark.parametrize("queries", [1, 13])
def test_fewer_queries_than_keys_are_the_last_ones(queries: int) -> None:
    q, k = make(1, 2, 1, 30, 16, 4)
    compare(q[:, :, -queries:], k, 4, 3)


@pytest.mark.parametrize("dtype", TYPES)
def test_means_are_exact_to_float32(dtype: torch.dtype) -> None:
    """Means (1 + 2^-10 + c 2^-20) / 4 rank by c, which only their third part of bfloat16 holds."""
    ranks = torch.randperm(8)
    k = torch.zeros(1, 1, 34, 16)
    k[0, 0, 0:32:4, 0] = 1.0
    k[0, 0, 1:32:4, 0] = 2.0**-10
    k[0, 0, 2:32:4, 0] = ranks * 2.0**-20
    q = torch.full((1, 1, 34, 16), 1.2345678)
    chosen = choose(q.to(DEVICE, dtype), k.to(DEVICE, dtype), 4, 8)
    assert chosen[0, 0, 33].tolist() == ranks.argsort(descending=True).tolist()


@pytest.mark.parametrize("dtype", TYPES)
def test_queries_are_exact(dtype: torch.dtype) -> None:
    """Blocks of different unit vectors rank by the query's own numbers, to their last bits."""
    ranks = torch.randperm(8)
    k = torch.eye(16).repeat_interleave(2, 0)[None, None, :18]
    step = max(torch.finfo(dtype).eps, 2.0**-20)
    more = 2.0**-10 if dtype == torch.float32 else 0.0  # this much is for the second part
    q = (1 + more + torch.cat([ranks, torch.zeros(8)]) * step).expand(1, 1, 18, 16)
    chosen = choose(q.to(DEVICE, dtype), 1.2345678 * k.to(DEVICE, dtype), 2, 8)
    assert chosen[0, 0, 17].tolist() == ranks.argsort(descending=True).tolist()


def test_the_future_has_no_say() -> None:
    q, k = make(1, 1, 1, 50, 16, 4)
    before = choose(q, k, 4, 3)
    k[:, :, 28:] = 99.0
    assert torch.equal(choose(q, k, 4, 3)[:, :, :32], before[:, :, :32])


def test_inputs_in_any_layout() -> None:
    q, k = make(1, 2, 2, 20, 16, 4)
    expected = choose(q, k, 4, 3)
    for shuffle in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.mT.contiguous().mT,
    ):
        assert torch.equal(choose(shuffle(q), shuffle(k), 4, 3), expected)


@pytest.mark.parametrize(("batch", "tokens"), [(0, 20), (1, 0)], ids=["no samples", "no tokens"])
def test_nothing_in_nothing_out(batch: int, tokens: int) -> None:
    q, k = make(batch, 2, 1, tokens, 16, 4)
    assert choose(q, k, 4, 3).shape == (batch, 2, tokens, 3)
    if batch:
        cu = torch.zeros(2, dtype=torch.int32, device=DEVICE)
        assert choose(q, k, 4, 3, cu).shape == (1, 2, 0, 3)


def test_there_is_no_gradient() -> None:
    q, k = make(1, 1, 1, 20, 16, 4)
    assert not choose(q.requires_grad_(), k.requires_grad_(), 4, 3).requires_grad


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_operator_keeps_its_promises(packed: bool) -> None:
    q, k = make(1, 2, 1, 20, 16, 4)
    cu = torch.tensor([0, 7, 20], device=DEVICE) if packed else None
    opcheck(moba_gate.moba_choose, (q, k, cu, 4, 3))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_whole(dynamic: bool) -> None:
    def run(q: Tensor, k: Tensor, cu: Tensor) -> Tensor:
        return choose(q, k, 4, 3) + choose(q, k, 4, 3, cu)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (20, 24) if dynamic else (20,):
        q, k = make(1, 2, 1, tokens, 16, 4)
        cu = torch.tensor([0, 7, tokens], device=DEVICE)
        assert torch.equal(compiled(q, k, cu), run(q, k, cu))
    torch._dynamo.reset()


def test_counts_operations() -> None:
    q, k = make(1, 2, 1, 27, 16, 8)
    with FlopCounterMode(display=False) as counter:
        choose(q, k, 8, 2)
    assert counter.get_total_flops() == 2 * 2 * 27 * 3 * 16


def test_attention_by_name_chooses_with_the_kernel() -> None:
    q, k = make(1, 2, 1, 30, 16, 4)
    with patch.object(moba_gate, "choose", wraps=choose) as spy:
        y = moba_attention(q, k, k, 4, 3, backend="triton")
        assert spy.call_count == 1
    assert_close(y, moba_attention(q, k, k, 4, 3, backend="torch"), backend="triton")


def test_the_gate_uses_the_kernel_where_it_may() -> None:
    """With a mask, known means or too many choices it does not, nor unasked on a CPU."""
    q, k = make(1, 1, 1, 20, 16, 1)
    blocks = lay_blocks(20, 20, 1, None, q.device)
    mask = torch.ones(1, 1, 1, 20, dtype=torch.bool, device=DEVICE)
    with patch.object(moba_gate, "choose", wraps=choose) as spy:
        gate(q, k, blocks, 2, mask=mask, by_name=True)
        gate(q, k, blocks, 2, means=k, by_name=True)
        many = gate(q, k, blocks, MOST + 1, by_name=True)
        gate(q.double(), k.double(), blocks, 2, by_name=True)
        torch.func.grad(lambda q: q.sum() + gate(q, k, blocks, 2, by_name=True).sum())(q)
        if DEVICE == "cpu":
            choose_blocks(q, k, 1, 3)
        assert not spy.call_count
        few = gate(q, k, blocks, 2, by_name=True)
        assert spy.call_count == 1
    assert torch.equal(few, many[..., :2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"block": 0}, "block is 0"),
        (lambda a: {"picks": -1}, "picks is -1"),
        (lambda a: {"picks": MOST + 1}, f"picks is {MOST + 1}; allowed: 0 to {MOST}"),
        (lambda a: {"q": a["q"][0]}, "3 and 4 axes"),
        (lambda a: {"k": a["k"][:, :, :9]}, "k of shape"),
        (lambda a: {"k": a["k"][..., :9]}, "k of shape"),
        (lambda a: {"k": a["k"][:, :3]}, "k has 3 heads"),
        (lambda a: {"q": a["q"].double()}, "backend 'triton': dtype torch.float64"),
        (lambda a: {"k": a["k"].half()}, "backend 'triton': tensors are of"),
        (lambda a: {"cu_seqlens": torch.tensor([0, 20])}, "cu_seqlens with q of shape"),
        (lambda a: {"cu_seqlens": torch.tensor([0.0, 20.0])}, "cu_seqlens is torch.float32"),
        (lambda a: {"cu_seqlens": torch.tensor([0])}, r"cu_seqlens is torch.int64 of shape \(1,\)"),
        (
            lambda a: {
                **{n: a[n][:1] for n in ("q", "k")},
                "cu_seqlens": torch.zeros(2, device="meta").int(),
            },
            "cu_seqlens is on meta",
        ),
    ],
)
def test_bad_input_is_named(
    change: Callable[[dict[str, object]], dict[str, object]], message: str
) -> None:
    x = torch.zeros(2, 4, 20, 16, device=DEVICE)
    inputs: dict[str, object] = {"q": x, "k": x, "block": 8, "picks": 1}
    with pytest.raises(ZooError, match=message):
        choose(**{**inputs, **change(inputs)})
