"""The kernel of linear attention with decay, against the sum over all pairs in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import ZooError
from zoo.testing.tolerances import assert_close

pytest.importorskip("triton", reason="kernels need triton")

from zoo.kernels import _linear_launch as launch
from zoo.kernels import linear
from zoo.kernels.linear import linear_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("output", "state", "q", "k", "v", "initial_state")
FORMS = ("whole", "pieces")


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Both shapes of the launch."""
    choose(request.param, monkeypatch)
    return request.param


def choose(form, monkeypatch):
    monkeypatch.setattr(launch, "fill", lambda device: 1 if form == "whole" else 10**6)
    monkeypatch.setattr(launch, "SHORTEST", 32)


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def problem(samples, heads, groups, length, d, e, *, states=None, dtype=torch.float32):
    """q, k, v, an initial state, and the gradients of the output and of the final state."""
    states = samples if states is None else states
    return (
        draw(samples, heads, length, d, seed=1, dtype=dtype),
        draw(samples, groups, length, d, seed=2, dtype=dtype),
        draw(samples, groups, length, e, seed=3, dtype=dtype),
        draw(states, heads, d, e, seed=4),
        draw(samples, heads, length, e, seed=5, dtype=dtype),
        draw(states, heads, d, e, seed=6),
    )


def decays(heads):
    """From almost none to a half-life of a fraction of a token."""
    return -torch.logspace(-3, 0.5, heads, device=DEVICE)


def oracle(q, k, v, log_decay=None, initial_state=None, cu_seqlens=None):
    """The sum over all pairs, with the weight of each pair and of the initial state written out."""
    if cu_seqlens is not None:
        outs, states = [], []
        for s, (i, j) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist())):  # noqa: B905
            first = None if initial_state is None else initial_state[s : s + 1]
            o, state = oracle(q[:, :, i:j], k[:, :, i:j], v[:, :, i:j], log_decay, first)
            outs.append(o)
            states.append(state)
        return torch.cat(outs, 2), torch.cat(states)
    heads, length = q.shape[1:3]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    rate = q.new_zeros(heads, 1, 1) if log_decay is None else log_decay.to(q.dtype)[:, None, None]
    t = torch.arange(length, device=q.device, dtype=q.dtype)
    gap = t[:, None] - t
    o = (q @ k.mT * (rate * gap.clamp(min=0)).exp() * (gap >= 0)) @ v
    state = (k * (rate * (length - 1 - t)[:, None]).exp()).mT @ v
    if initial_state is not None:
        o = o + (rate * (t + 1)[:, None]).exp() * (q @ initial_state)
        state = state + (rate * length).exp() * initial_state
    return o, state


def everything(function, given, wide=False, initial=True, **options):
    """Outputs and all gradients."""
    if wide:
        given = [x.double() for x in given]
    inputs = [x.clone().requires_grad_() for x in given[: 4 if initial else 3]]
    q, k, v, *state = inputs
    outputs = function(q, k, v, initial_state=state[0] if initial else None, **options)
    grads = torch.autograd.grad(outputs, inputs, given[4:])
    return [x.detach() for x in (*outputs, *grads)]


def check(given, dtype=None, **options):
    found = everything(linear_attention, given, **options)
    expected = everything(oracle, given, wide=True, **options)
    for i, (name, x, y) in enumerate(zip(NAMES, found, expected, strict=False)):
        assert_close(x, y, name, gradient=i > 1, backend="triton", dtype=dtype or given[0].dtype)
    assert [x.dtype for x in found[:5]] == [given[0].dtype, torch.float32, *[given[0].dtype] * 3]


@pytest.mark.parametrize(
    ("heads", "groups", "length", "d", "e", "decay", "initial"),
    [
        (1, 1, 150, 16, 16, True, True),
        (1, 1, 130, 16, 17, False, False),
        (2, 1, 70, 24, 33, True, False),  # two heads to a group; widths of no power of two
        (1, 1, 70, 16, 40, False, True),
    ],
)
def test_values_and_gradients(form, heads, groups, length, d, e, decay, initial):
    given = problem(1, heads, groups, length, d, e)
    check(given, log_decay=decays(heads) if decay else None, initial=initial)


@pytest.mark.parametrize(
    ("length", "d", "e"),
    [(1, 16, 16), (2, 5, 3), (64, 16, 1), (40, 80, 81), (40, 160, 20), (40, 20, 200)],
)
def test_odd_sizes(length, d, e):
    """Single tokens, whole chunks, narrow heads, several tiles, and those of shorter chunks."""
    check(problem(1, 1, 1, length, d, e), log_decay=decays(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(form, dtype):
    given = problem(1, 2, 1, 90, 32, 33, dtype=dtype)
    check(given, log_decay=decays(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores(dtype):
    q, k, *rest = problem(1, 2, 2, 80, 16, 16, dtype=dtype)
    check((q * 30, k * 30, *rest), log_decay=decays(2))


def test_states_may_outgrow_half_precision():
    """Sums beyond 65504 are no trouble while outputs and gradients are below it."""
    q, k, v, state, do, dstate = problem(1, 1, 1, 70, 16, 16, dtype=torch.float16)
    given = (q / 1000, k.abs() * 100, v.abs() * 100, state, do / 1000, dstate)
    assert oracle(*(x.double() for x in given[:3]))[1].max() > 65504
    check(given)


@pytest.mark.parametrize("groups", [2, 1])
def test_packed_sequences(form, groups):
    """Of one token, of none, of whole chunks and of more; each with its own states."""
    cu = torch.tensor([0, 1, 1, 65, 65, 150], dtype=torch.int32, device=DEVICE)
    given = problem(1, 2, groups, 150, 16, 18, states=5)
    if groups == 2:
        check(given, log_decay=decays(2), cu_seqlens=cu)
    else:
        check(given, initial=False, cu_seqlens=cu.long())


def test_two_parts_are_the_whole():
    q, k, v, state, *_ = problem(1, 2, 1, 80, 16, 16)
    rate = decays(2)
    whole, end = linear_attention(q, k, v, rate, state)
    first, middle = linear_attention(q[:, :, :37], k[:, :, :37], v[:, :, :37], rate, state)
    second, last = linear_attention(q[:, :, 37:], k[:, :, 37:], v[:, :, 37:], rate, middle)
    assert_close(torch.cat([first, second], 2), whole, backend="triton")
    assert_close(last, end, backend="triton")


def test_by_hand():
    """Decay of a half, q = 1 2 1, k = 1 1 2, v = 1 2 3."""
    q, k, v = (
        torch.tensor(x, device=DEVICE).view(1, 1, 3, 1)
        for x in ([1.0, 2, 1], [1.0, 1, 2], [1.0, 2, 3])
    )
    rate = torch.tensor([0.5], device=DEVICE).log()
    o, state = linear_attention(q, k, v, rate)
    assert_close(o.flatten(), torch.tensor([1.0, 5.0, 7.25]), backend="triton")
    assert_close(state.flatten(), torch.tensor([7.25]), backend="triton")


@pytest.mark.parametrize("rate", [-60.0, -torch.inf])
def test_steep_decay(form, rate):
    """The past is gone at once: o = (q . k) v, with finite gradients."""
    given = problem(1, 1, 1, 70, 16, 16)
    rate = torch.tensor([rate], device=DEVICE)
    found = everything(linear_attention, given, log_decay=rate)
    q, k, v, _, do, dstate = (x.double() for x in given)
    assert_close(found[0], (q * k).sum(-1, keepdim=True) * v, "output", backend="triton")
    last = k[:, :, -1, :, None] * v[:, :, -1, None]
    assert_close(found[1], last, "state", backend="triton")
    assert_close(found[2], (do * v).sum(-1, keepdim=True) * k, "q", backend="triton")
    dk = (do * v).sum(-1, keepdim=True) * q
    dk[:, :, -1] += (dstate @ v[:, :, -1, :, None])[..., 0]
    assert_close(found[3], dk, "k", backend="triton")
    assert found[5].abs().max() < 1e-20


def test_decay_of_zero_is_none():
    given = problem(1, 1, 1, 40, 16, 16)
    some = everything(linear_attention, given, log_decay=torch.zeros(1, device=DEVICE))
    none = everything(linear_attention, given)
    for x, y, name in zip(some, none, NAMES, strict=True):
        assert_close(x, y, name, backend="triton")


def test_many_tokens_with_almost_no_decay():
    """The state of 14 chunks in turn."""
    q, k, v, state, *_ = problem(1, 1, 1, 900, 16, 16)
    rate = torch.tensor([-1e-4], device=DEVICE)
    o, end = linear_attention(q, k, v, rate, state)
    wide = [x.double() for x in (q, k, v)]
    o_wide, end_wide = oracle(*wide, rate, state.double())
    assert_close(o, o_wide, backend="triton")
    assert_close(end, end_wide, backend="triton")


def test_strided_inputs():
    """Heads beside each other, rows that are not contiguous, and a gradient that was expanded."""
    q, k, v, state, *_ = problem(2, 2, 1, 40, 16, 20)
    want = everything(oracle, (q, k, v, state, torch.ones_like(v).repeat(1, 2, 1, 1), state), True)
    views = [
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k.mT.contiguous().mT,
        torch.cat([v, v], -1)[..., :20],
        state.mT.contiguous().mT,
    ]
    inputs = [x.detach().requires_grad_() for x in views]
    o, end = linear_attention(*inputs[:3], initial_state=inputs[3])
    grads = torch.autograd.grad(o.sum() + (end * state).sum(), inputs)
    for x, y, name in zip((o, end, *grads), want, NAMES, strict=True):
        assert_close(x, y, name, gradient=True, backend="triton")


@pytest.mark.parametrize("packed", [False, True])
def test_no_tokens(packed):
    """The state passes through, and so does its gradient."""
    cu = torch.zeros(4, dtype=torch.int32, device=DEVICE) if packed else None
    q, k, v, state, do, dstate = problem(1, 4, 2, 0, 16, 17, states=3 if packed else 1)
    found = everything(linear_attention, (q, k, v, state, do, dstate), cu_seqlens=cu)
    assert found[0].shape == (1, 4, 0, 17)
    assert torch.equal(found[1], state)
    assert torch.equal(found[5], dstate)
    assert [x.shape for x in found[2:5]] == [q.shape, k.shape, v.shape]
    assert not linear_attention(q, k, v, cu_seqlens=cu)[1].any()


@pytest.mark.parametrize("sizes", [(0, 2, 2, 70), (2, 0, 0, 70)])
def test_no_samples_or_heads(sizes):
    given = problem(*sizes, 16, 17)
    found = everything(linear_attention, given)
    assert found[0].shape == (*sizes[:2], 70, 17)
    assert found[1].shape == (*sizes[:2], 16, 17)
    empty = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    q, k, v = (x[:1] for x in problem(1, 1, 1, 0, 16, 16)[:3])
    assert linear_attention(q, k, v, cu_seqlens=empty)[1].shape == (0, 1, 16, 16)


@pytest.mark.parametrize(
    ("wanted", "source"),
    [*((i, "output") for i in range(4)), *((i, "state") for i in range(1, 4))],
)
def test_one_gradient(wanted, source):
    """Of one input only, through one of the outputs only."""
    given = problem(1, 1, 1, 20, 16, 16)
    rate = decays(1)
    results = []
    for function, wide in ((linear_attention, False), (oracle, True)):
        inputs = [x.double() if wide else x.clone() for x in given[:4]]
        x = inputs[wanted].requires_grad_()
        q, k, v, state = inputs
        found = function(q, k, v, rate, state)[source == "state"]
        results.append(torch.autograd.grad(found.sum(), x)[0])
    assert_close(*results, gradient=True, backend="triton")


def test_state_has_no_gradient_of_q():
    q, k, v, *_ = problem(1, 1, 1, 20, 16, 16)
    q.requires_grad_()
    (grad,) = torch.autograd.grad(linear_attention(q, k, v)[1].sum(), q)
    assert not grad.any()


def test_same_bits_in_every_run(monkeypatch):
    choose("pieces", monkeypatch)
    given = problem(1, 2, 1, 66, 16, 16)
    first, second = (everything(linear_attention, given, log_decay=decays(2)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


# The checker itself reads .grad of what it derived from the inputs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("packed", [False, True])
def test_operator_checks(packed):
    cu = torch.tensor([0, 7, 20], dtype=torch.int32, device=DEVICE) if packed else None
    q, k, v, state, do, dstate = problem(1, 2, 1, 20, 16, 17, states=2 if packed else 1)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    rate = decays(2)
    if packed:
        torch.library.opcheck(torch.ops.zoo.linear_fwd, (*inputs, None, None, cu))
        torch.library.opcheck(torch.ops.zoo.linear_bwd, (do, None, q, k, v, rate, None, cu))
    else:
        state_in = state.clone().requires_grad_()
        torch.library.opcheck(torch.ops.zoo.linear_fwd, (*inputs, rate, state_in, None))
        torch.library.opcheck(torch.ops.zoo.linear_bwd, (do, dstate, q, k, v, rate, state, None))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    rate = decays(2)

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def layer(q, k, v, state):
        o, state = linear_attention(q * 2, k, v, rate, state)
        return o * 3, state

    def plain(q, k, v, initial_state):
        o, state = oracle(q * 2, k, v, rate, initial_state)
        return o * 3, state

    for length in (20, 33) if dynamic else (20,):
        given = problem(1, 2, 1, length, 16, 17)
        found = everything(lambda q, k, v, initial_state: layer(q, k, v, initial_state), given)
        for x, y, name in zip(found, everything(plain, given, wide=True), NAMES, strict=True):
            assert_close(x, y, name, gradient=True, backend="triton")


def test_second_derivative_is_refused():
    given = problem(1, 1, 1, 20, 16, 16)
    q, k, v = (x.requires_grad_() for x in given[:3])
    (grad,) = torch.autograd.grad(linear_attention(q, k, v)[0].sum(), q, create_graph=True)
    with pytest.raises(ZooError, match="no second derivative"):
        grad.sum().backward()


def test_operations_are_counted():
    q, k, v, *_ = problem(1, 2, 1, 10, 16, 24)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    with FlopCounterMode(display=False) as counter:
        o, _ = linear_attention(*inputs)
    forward = 2 * 10 * (64 * (16 + 24) + 4 * 16 * 24)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        o.sum().backward()
    assert counter.get_total_flops() == forward * 5 // 2


def test_pieces_cover_every_token(monkeypatch):
    """Each token is in one piece, and pieces go by their sequences."""
    choose("pieces", monkeypatch)
    cu = torch.tensor([0, 0, 5, 133, 133, 390, 400])
    cut = launch.cut_pieces(torch.zeros(1, 1, 400, 16), cu, 4)
    assert not cut.whole
    assert cut.count == cut.bounds.shape[0]
    tokens = [t for start, stop in cut.bounds.tolist() for t in range(start, stop)]
    assert tokens == list(range(400))
    firsts = cut.firsts.tolist()
    for s in range(6):
        own = cut.bounds[firsts[s] : firsts[s + 1]]
        assert len(own) == -(-int(cu[s + 1] - cu[s]) // cut.piece)
        if len(own):
            assert own[0, 0] == cu[s]
            assert own[-1, 1] == cu[s + 1]


@pytest.mark.parametrize(
    ("samples", "length", "programs", "pieces"),
    [(4, 8192, 64, 1), (1, 8192, 264, 1), (1, 8192, 8, 32), (1, 66000, 8, 33), (1, 300, 8, 1)],
)
def test_when_sequences_are_cut(monkeypatch, samples, length, programs, pieces):
    """Enough programs, or too few tokens: whole; else as many pieces as fill the device."""
    monkeypatch.setattr(launch, "fill", lambda device: 264)
    q = torch.zeros(1).expand(samples, 1, length, 16)
    cut = launch.cut_pieces(q, None, programs)
    assert cut.whole == (pieces == 1)
    assert cut.pieces == pieces
    assert cut.count == samples * pieces
    assert (cut.pieces - 1) * cut.piece < length <= cut.pieces * cut.piece


COMPILE = """
from types import SimpleNamespace
import torch, triton
from triton.backends.compiler import GPUTarget
triton.runtime.driver.set_active(SimpleNamespace(
    get_current_device=lambda: 0,
    get_current_stream=lambda device=0: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
))
from zoo.kernels import _linear_launch as launch
for name in ("walk_kernel", "scan_kernel", "grad_kernel"):
    kernel = getattr(launch, name)
    def compiled(*args, grid, kernel=kernel, **kwargs):
        kernel.warmup(*args, grid=grid, **kwargs)
        print(kernel.__name__)
    setattr(launch, name, type("", (), {
        "__getitem__": lambda self, grid, f=compiled: lambda *a, **k: f(*a, grid=grid, **k)})())
launch.SHORTEST = 16
for fill, dtype, heads, packed, given in [
    (1, torch.bfloat16, 2, False, True), (99, torch.bfloat16, 1, True, True),
    (99, torch.float16, 2, False, False), (1, torch.float32, 1, True, False),
]:
    launch.fill = lambda device: fill
    q, k = torch.zeros(1, heads, 40, 16, dtype=dtype), torch.zeros(1, 1, 40, 16, dtype=dtype)
    cu = torch.tensor([0, 40]) if packed else None
    state = torch.zeros(1, heads, 16, 16) if given else None
    rate = torch.zeros(heads) if given else None
    inputs = launch.Inputs(q, k, k, rate, state, cu)
    launch.forward(inputs)
    launch.backward(q, state, inputs)
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="the other tests compile the kernels")
def test_kernels_compile_for_a_card(tmp_path):
    """The interpreter forgives what the compiler does not, such as a variable of two types."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET")
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    names = run.stdout.split()
    assert [names.count(f"{x}_kernel") for x in ("walk", "scan", "grad")] == [10, 6, 4]


Q = torch.zeros(1, 4, 6, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": Q[0]}, "must be"),
        ({"k": Q[:, :, :5]}, "do not fit"),
        ({"k": Q[..., :8]}, "do not fit"),
        ({"v": Q[:, :2]}, "do not fit"),
        ({"k": Q[:, :3], "v": Q[:, :3]}, "must divide"),
        ({"k": Q[:, :0], "v": Q[:, :0]}, "must divide"),
        ({"log_decay": torch.zeros(3)}, "log_decay of"),
        ({"log_decay": torch.zeros(4).double()}, "log_decay of"),
        ({"log_decay": torch.zeros(4, requires_grad=True)}, "requires a gradient"),
        ({"initial_state": torch.zeros(1, 4, 16, 15)}, "initial_state of"),
        ({"initial_state": torch.zeros(1, 4, 16, 16).half()}, "initial_state of"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens of"),
        ({"cu_seqlens": torch.tensor([0, 7])}, "must go from 0 to 6"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, "must go from 0 to 6"),
        ({"q": Q.double(), "k": Q.double(), "v": Q.double()}, "float64"),
        ({"v": Q.half()}, "float16"),
        ({"v": torch.zeros(1, 4, 6, 257)}, "257 is above 256"),
    ],
)
def test_bad_input(monkeypatch, changes, message):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(linear, "INTERPRET", True)  # the arguments are on the CPU everywhere
    with pytest.raises(ZooError, match=message):
        linear_attention(**{"q": Q, "k": Q, "v": Q, **changes})


def test_refused_without_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ZooError, match="interpreter"):
        linear_attention(Q, Q, Q)


def test_lightning_takes_a_state_in_float64():
    from zoo.attend.lightning import lightning_attention

    q, k, v = (torch.randn(1, 2, 9, 16, device=DEVICE) for _ in range(3))
    state = torch.randn(1, 2, 16, 16, device=DEVICE, dtype=torch.float64)
    found, wanted = (
        lightning_attention(q, k, v, 0.3, initial_state=state, backend=name)
        for name in ("triton", "reference")
    )
    assert_close(found, wanted, "output", backend="triton")
