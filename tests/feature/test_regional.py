"""Regional attention: the border rule of NATTEN 0.15.1, windows against copies, the card's laws."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden_files import read, under
from torch import Tensor

import zoo
from zoo.errors import ZooError
from zoo.feature.regional import RegionalAttention, regional_attention_reference
from zoo.testing.subject import draw
from zoo.testing.tolerances import assert_close

# Windows of 11 x 11 two apart fill a map of 6 x 6 up to 22 x 22; these fit, and leave things out.
CONTRACT_OPTIONS = [
    {"heads": 2, "kernel": 3, "dilation": 2},
    {"kernel": 3, "dilation": 1, "qkv_bias": False, "rel_pos_bias": False},
    {"heads": 1, "kernel": 5, "dilation": 2, "scale": 0.5},
]
BACKENDS = ("torch", "reference")


def a_module(*args: int, **options: object) -> RegionalAttention:
    """In float64, with a table of entries that matter."""
    torch.manual_seed(0)
    module = RegionalAttention(*args, dtype=torch.float64, **options)  # type: ignore[arg-type]
    if module.rpb is not None:
        torch.nn.init.normal_(module.rpb)
    return module


def golden_tags(tensors, metadata):
    return [case["tag"] for case in metadata["config"]["cases"]]


def compare_case(tensors, metadata, tag, backend):
    case = next(c for c in metadata["config"]["cases"] if c["tag"] == tag)
    module = RegionalAttention(
        case["dim"], case["heads"], case["kernel_size"], case["dilation"], backend=backend
    )
    module.load_state_dict(under(tensors, f"param.{tag}."))
    x = tensors[f"in.{tag}.x"].clone().requires_grad_()
    y = module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert_close(y, tensors[f"out.{tag}.y"], "output")
    dx, drpb = torch.autograd.grad((y * tensors[f"in.{tag}.w"]).sum(), (x, module.rpb))
    assert_close(dx, tensors[f"grad.{tag}.x"], "gradient of x", gradient=True)
    assert_close(drpb, tensors[f"grad.{tag}.rpb"], "gradient of the table", gradient=True)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("tag", golden_tags(*read("regional")))
def test_golden(golden, tag, backend):
    compare_case(*golden("regional"), tag, backend)


def test_another_golden_file(other_golden):
    file = other_golden("regional")
    for tag in golden_tags(*file):
        for backend in (*BACKENDS, "auto"):
            compare_case(*file, tag, backend)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (23, 25)),  # the paper's windows, residue classes of two lengths
        ({"kernel": 3, "dilation": 3}, (11, 4)),  # filled up along one axis
        ({"kernel": 5, "dilation": 1, "rel_pos_bias": False}, (5, 9)),
        ({"kernel": 3, "dilation": 2, "qkv_bias": False, "scale": 1.5, "heads": 1}, (13, 10)),
        ({"kernel": 3, "dilation": 2, "key_mask_bias": -1.5}, (9, 5)),
    ],
)
def test_windows_equal_copies(options, size):
    found = []
    for backend in BACKENDS:
        module = a_module(8, **options, backend=backend)
        x = draw(2, 8, *size).requires_grad_()
        mask = draw(2, 1, *size, seed=3) > 0 if "key_mask_bias" in options else None
        y = module(x, mask)
        leaves = [x, *module.parameters()]
        found.append([y, *torch.autograd.grad((y * draw(*y.shape, seed=5)).sum(), leaves)])
    names = ("output", "x", *(name for name, _ in module.named_parameters()))
    for i, (name, a, b) in enumerate(zip(names, *found, strict=True)):
        assert_close(a, b, name, gradient=i > 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_of_the_whole_map_is_full_attention(backend):
    """The bias of a pair is the table's entry of their distance."""
    module = a_module(6, heads=2, kernel=5, dilation=1, backend=backend)
    x = draw(2, 6, 5, 5)
    tokens = x.flatten(2).mT
    q, k, v = module.qkv(tokens).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
    place = torch.arange(25)
    down = place[None] // 5 - place[:, None] // 5 + 4
    right = place[None] % 5 - place[:, None] % 5 + 4
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=module.rpb[:, down, right])
    y = module.proj(y.transpose(1, 2).flatten(2)).mT.view(x.shape)
    assert_close(module(x), y, "full attention")


def reach(length: int, kernel: int, dilation: int) -> Tensor:
    """Which keys each query sees along one axis, (L, L), by the smallest distance in its class."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        own = [j for j in range(length) if j % dilation == i % dilation]
        at = own.index(i)
        first = min(max(at - kernel // 2, 0), len(own) - kernel)
        seen[i, own[first : first + kernel]] = True
    return seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("height", "width", "kernel", "dilation"), [(7, 8, 3, 2), (9, 11, 3, 3)])
def test_a_pixel_changes_what_sees_it_and_nothing_else(height, width, kernel, dilation, backend):
    module = a_module(4, 2, kernel, dilation, backend=backend)
    x = draw(1, 4, height, width)
    down, right = reach(height, kernel, dilation), reach(width, kernel, dilation)
    with torch.no_grad():
        y = module(x)
        for i, j in ((0, 0), (3, 4), (height - 1, width - 2)):
            other = x.clone()
            other[..., i, j] += 1.0
            changed = (module(other) - y).abs().amax((0, 1)) > 1e-9
            assert torch.equal(changed, down[:, i, None] & right[None, :, j])
            if dilation == 2:
                assert not changed[(i + 1) % 2 :: 2].any()  # the other rows' residue class


def test_the_inside_moves_with_the_map():
    module = a_module(4, 2, 3, 2)
    x = draw(1, 4, 16, 14)
    moved = module(x.roll((2, 4), (2, 3)))
    assert_close(moved[..., 4:14, 6:12], module(x)[..., 2:12, 2:8], "away from the border")


def test_what_fills_up_a_small_map_is_seen():
    """One pixel, three zeros beyond each border: nine keys along one axis at the bias's values."""
    module = RegionalAttention(1, 1, 3, 1, dtype=torch.float64)
    with torch.no_grad():
        for x in (module.qkv.weight, module.rpb, module.proj.bias):
            x.zero_()
        module.qkv.weight[2] = 1.0  # v = x + 2; scores are equal
        module.qkv.bias.copy_(torch.tensor([0.0, 0.0, 2.0]))
        module.proj.weight.fill_(1.0)
    y = module(torch.full((1, 1, 1, 1), 9.0, dtype=torch.float64))
    assert y.item() == pytest.approx((11 + 8 * 2) / 9)


def test_a_window_by_hand():
    """Three pixels in a row of 3 x 3, K = 3: scores are the bias of the columns alone."""
    table = torch.full((1, 5, 5), -torch.inf, dtype=torch.float64)
    table[0, 2] = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]).log()  # own row; weights of -2 .. 2
    zero = torch.zeros(1, 1, 3, 3, 1, dtype=torch.float64)
    v = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64).expand(3, 3)[None, None, ..., None]
    y = regional_attention_reference(zero, zero, v, 3, 1, rpb=table)[0, 0, 1, :, 0]
    # The first pixel sees distances 0 .. 2 with 2, 3, 4; the last one -2 .. 0 with 0, 1, 2.
    assert y.tolist() == pytest.approx([432 / 9, 321 / 6, 210 / 3])
    module = RegionalAttention(1, 1, 3, 1, dtype=torch.float64)
    with torch.no_grad():
        module.rpb.copy_(table.clamp(min=-1e4))
    found = module._windows(zero, zero, v, None)[0, 0, 1, :, 0]
    assert found.tolist() == pytest.approx(y.tolist())


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_outside_the_mask_can_be_shut_out(backend):
    module = a_module(4, 2, 3, 1, key_mask_bias=-1e9, backend=backend)
    x = draw(1, 4, 5, 6)
    mask = torch.zeros(1, 1, 5, 6, dtype=torch.bool)
    mask[..., 2, 3] = True
    v = module.qkv(x[0, :, 2, 3])[8:]
    y = module(x, mask)
    for i, j in ((1, 2), (2, 3), (3, 4)):  # all of these see the one key that is left
        assert_close(y[0, :, i, j], module.proj(v), "the one key")
    assert_close(module(x, mask | True), module(x), "all inside")


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_in_training_only(backend):
    module = a_module(4, 2, 3, 1, dropout=0.5, proj_dropout=0.5, backend=backend)
    x = draw(1, 4, 6, 6)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
    y = module(x)
    module.train().proj_dropout.p = 0.0
    assert not torch.allclose(module(x), y)  # on the weights alone


def test_autocast_keeps_the_scores_in_float32():
    module = a_module(8, 2, 3, 2).float()
    x = draw(2, 8, 9, 7, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert_close(y, module(x), "autocast", backend="autocast", dtype=torch.bfloat16)


@pytest.mark.parametrize("size", [(0, 4, 5), (2, 0, 5)])
def test_nothing_at_all(size):
    module = a_module(4, 2, 3, 1)
    y = module(draw(size[0], 4, *size[1:]))
    assert y.shape == (size[0], 4, *size[1:])


def test_it_is_built_by_name_with_the_papers_options():
    module = zoo.create("regional", 128)
    assert (module.heads, module.kernel, module.dilation) == (4, 11, 2)
    assert abs(float(module.rpb.detach().std()) - 0.02) < 0.002
    assert sum(p.numel() for p in module.parameters()) == 4 * 128**2 + 4 * 128 + 4 * 21**2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kernel": 4}, "kernel=4 must be an odd number of at least 3"),
        ({"kernel": 1}, "kernel=1"),
        ({"dilation": 0}, "dilation=0"),
        ({"heads": 3}, "heads=3 must divide channels=8"),
        ({"heads": True}, "heads=True"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"qkv_bias": 1}, "qkv_bias=1"),
        ({"backend": "referense"}, "reference"),
        ({"key_mask_bias": float("-inf")}, "key_mask_bias=-inf"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(zoo.ZooError, match=words):
        RegionalAttention(8, **options)


def test_bad_input():
    module = RegionalAttention(8, 2, 3, 1)
    with pytest.raises(zoo.ZooError, match="channels=8"):
        module(torch.zeros(2, 6, 6, 8))
    for shape in ((8, 6, 6), (2, 36, 8)):
        with pytest.raises(zoo.ZooError, match=r"x of shape .* must be \(batch, channels, height"):
            module(torch.zeros(shape))
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    with pytest.raises(zoo.ZooError, match="key_mask_bias=None"):
        module(torch.zeros(2, 8, 6, 6), mask)
    module = RegionalAttention(8, 2, 3, 1, key_mask_bias=-1.0)
    for bad in (mask[..., 1:], mask.float(), mask[:, 0]):
        with pytest.raises(zoo.ZooError, match="mask of dtype"):
            module(torch.zeros(2, 8, 6, 6), bad)


def test_the_backend_is_its_route():
    module = zoo.create("regional", 8, heads=2, kernel=3)
    assert module.route is None
    module.route = "reference"
    assert module.backend == "reference"
    module.route = None
    assert module.backend == "auto"
    with pytest.raises(ZooError, match="did you mean 'reference'"):
        module.route = "referense"
