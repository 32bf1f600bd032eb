"""Landmark attention: golden values, routes against the reference, the card's properties."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from golden_files import read, under
from torch import nn
from torch.func import grad, vmap

import zoo
from zoo.models.language.decoder_lm import DecoderLM
from zoo.normalize.landmark import (
    grouped_softmax,
    insert_landmarks,
    landmark_attention,
    landmark_attention_reference,
    landmark_targets,
)
from zoo.testing.subject import draw, settle, tiny_strips
from zoo.testing.tolerances import assert_close

CONTRACT_OPTIONS = [{"block": 3}]
ROUTES = ("engine", "dense", "landmark_blocks", "reference")
BACKENDS = ("reference", "torch")
NONE = torch.zeros(5, dtype=torch.bool)  # landmarks
NAMES = ("output", "q", "k", "v")


def build(spec="landmark(block=3)", heads=4, **options):
    options = {"dim": 8 * heads, "heads": heads, "causal": True, "dtype": torch.float64, **options}
    return zoo.create(spec, **options)


def tensors_of(lengths=(23, 23), width=5, dtype=torch.float64, heads=3, samples=2):
    """Queries, keys, values and a cotangent of odd shapes."""
    n, m = lengths
    shapes = ((n, 8), (m, 8), (m, width), (n, width))
    return [draw(samples, heads, *s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]


def both(form, q, k, v, cotangent, *args, **options):
    """Output and gradients of a functional form."""
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    y = form(*inputs, *args, **options)
    return [y, *torch.autograd.grad((y * cotangent).sum(), inputs)]


def line_by_line(scores, block):
    """Weights of square scores (N, N), one row and one block after the other."""
    length, span = len(scores), block + 1
    weights = torch.zeros_like(scores)
    for i in range(length):
        own = i // span
        local = [j for j in range(own * span, i + 1) if j % span != block]
        marks = [b * span + block for b in range(own)]
        share = scores[i, local + marks].softmax(-1)
        weights[i, local] = share[: len(local)]
        for b in range(own):
            inside = slice(b * span, b * span + block)
            weights[i, inside] = share[len(local) + b] * scores[i, inside].softmax(-1)
    return weights


def golden_spec(config, **options):
    """The layer of the official model; its rotary base stands in the code and in no file."""
    given = {"block": config["mem_freq"], **options}
    words = ", ".join(f"{name}={value}" for name, value in given.items())
    position = {"rotary": "rope(style=interleaved)"}[config["positional_encoder"]]
    return f"landmark({words})+{position}"


class GoldenGPT(nn.Module):
    """The official model around the zoo's hosts: pre-norm, GELU, tied head."""

    def __init__(self, tensors, config, **options):
        super().__init__()
        self.param = under(tensors, "param.transformer.")
        facts = {"dim": config["n_embd"], "heads": config["n_head"], "bias": config["bias"]}
        spec = golden_spec(config, **options)
        self.attn = nn.ModuleList(
            zoo.create(spec, causal=True, **facts) for _ in range(config["n_layer"])
        )
        for i, attn in enumerate(self.attn):
            names = {"project.qkv": "c_attn", "combine.proj": "c_proj"}
            kinds = ("weight", "bias")[: 1 + config["bias"]]
            attn.load_state_dict(
                {
                    f"{a}.{c}": self.param[f"h.{i}.attn.{b}.{c}"]
                    for a, b in names.items()
                    for c in kinds
                }
            )

    def of(self, name):
        """Weight and bias of a layer, where it has one."""
        return self.param[f"{name}.weight"], self.param.get(f"{name}.bias")

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], *self.of(name))

    def forward(self, tokens, cache=None):
        words = self.param["wte.weight"]
        x = F.embedding(tokens, words)
        for i, attn in enumerate(self.attn):
            x = x + attn(self.norm(x, f"h.{i}.ln_1"), cache=None if cache is None else cache[i])
            y = F.linear(self.norm(x, f"h.{i}.ln_2"), *self.of(f"h.{i}.mlp.c_fc"))
            x = x + F.linear(F.gelu(y), *self.of(f"h.{i}.mlp.c_proj"))
        return F.linear(self.norm(x, "ln_f"), words)


def compare_softmax(tensors, metadata):
    scores = tensors["in.softmax.scores"]
    weights = grouped_softmax(scores, tensors["in.attn.is_mem"].bool())
    assert_close(weights, tensors["out.softmax.probs"], "weights")
    part = build(f"landmark(block={metadata['config']['mem_freq']})").normalize
    assert_close(part(scores, None), tensors["out.softmax.probs"], "part")


def compare_attention(tensors, metadata, route):
    attn = GoldenGPT(tensors, metadata["config"]).attn[0]
    attn.route = route
    x = tensors["in.attn.x"].clone().requires_grad_()
    y = attn(x)
    y.sum().backward()
    assert_close(y, tensors["out.attn.y"], "output")
    assert_close(x.grad, tensors["grad.attn.x"], "x", gradient=True)
    expected = tensors["grad.attn.c_attn.weight"]
    assert_close(attn.project.qkv.weight.grad, expected, "q, k, v", gradient=True)


def compare_language_model(tensors, metadata):
    config = metadata["config"]
    block = config["mem_freq"]
    tokens, marks = insert_landmarks(tensors["in.lm.tokens"], block, config["landmark_id"])
    assert torch.equal(tokens, tensors["in.lm.tokens_with_landmarks"])
    places = torch.arange(block, tokens.shape[1], block + 1)
    assert torch.equal(marks.nonzero()[:, 0], places)
    assert_close(GoldenGPT(tensors, config)(tokens), tensors["out.lm.logits"], "logits")


def retrieved(tensors, metadata):
    """How many blocks the cached runs of a file retrieve."""
    start = "out.cached_topk"
    return sorted(int(name.split(".")[0]) for name in under(tensors, start))


def compare_retrieval(tensors, metadata, k):
    """Chunks of ordinary tokens; each comes with the landmarks of the blocks that it finishes."""
    config = metadata["config"]
    block, chunk = config["mem_cache_freq"], config["chunk"]
    methods = {
        "per_token_and_head": "token_head",
        "max_over_heads": "max_heads",
        "max_over_tokens": "max_tokens",
    }
    options = {"retrieve": k, "cache_blocks": config["mem_cache_size"]}
    options["selection"] = methods[config["cache_selection_method"]]
    model = GoldenGPT(tensors, config, **options).eval()
    stream, cache = tensors["in.lm.tokens_with_landmarks"], zoo.Cache()
    starts = range(chunk, tensors["in.lm.tokens"].shape[1], chunk)
    pieces = stream.tensor_split([n + n // block for n in starts], 1)
    with torch.no_grad():
        logits = torch.cat([model(piece, cache) for piece in pieces], 1)
    ordinary = torch.arange(stream.shape[1]) % (block + 1) != block
    assert_close(logits[:, ordinary], tensors[f"out.cached_topk{k}.logits"], "logits")


def test_golden_softmax(golden):
    compare_softmax(*golden("landmark"))


@pytest.mark.parametrize("route", ROUTES)
def test_golden_attention(golden, route):
    compare_attention(*golden("landmark"), route)


def test_golden_language_model(golden):
    compare_language_model(*golden("landmark"))


@pytest.mark.parametrize("k", retrieved(*read("landmark")))
def test_golden_retrieval(golden, k):
    compare_retrieval(*golden("landmark"), k)


def test_another_golden_file(other_golden):
    file = other_golden("landmark")
    compare_softmax(*file)
    for route in ROUTES:
        compare_attention(*file, route)
    compare_language_model(*file)
    for k in retrieved(*file):
        compare_retrieval(*file, k)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 30])
def test_weights_line_by_line(block):
    scores = 3 * draw(2, 3, 23, 23)
    expected = torch.stack([line_by_line(s, block) for s in scores.flatten(0, 1)])
    marks = torch.arange(23) % (block + 1) == block
    found = grouped_softmax(scores, marks)
    assert_close(found.flatten(0, 1), expected, "scattered")
    part = build(f"landmark(block={block})").normalize
    assert_close(part(scores, None), found, "reshaped")
    assert_close(part(scores[:, :, 17:], None), found[:, :, 17:], "the last rows")
    assert_close(found.sum(-1), torch.ones(2, 3, 23), "sums", dtype=torch.float64)
    assert float(found[..., marks].abs().sum()) == 0


def test_by_hand():
    """t0 0, t1 log 2, landmark 0, t3 log 3, t4 0: the landmark's fifth goes to t0 and t1, 1 : 2."""
    row = torch.tensor([0, math.log(2), 0, math.log(3), 0], dtype=torch.float64)
    expected = torch.tensor([1 / 15, 2 / 15, 0, 3 / 5, 1 / 5], dtype=torch.float64)
    marks = torch.tensor([False, False, True, False, False])
    assert_close(grouped_softmax(row[None, None, None], marks).flatten(), expected, "weights")
    q, v = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    for backend in BACKENDS:
        k = row[None, None, :, None]
        y = landmark_attention(q, k, v[None, None], 2, scale=1.0, backend=backend)
        assert_close(y.flatten(), expected, backend)


@pytest.mark.parametrize("size", [1, 60], ids=["small scores", "scores that need their maximum"])
@pytest.mark.parametrize("lengths", [(23, 23), (4, 23), (1, 16), (17, 33)])
@pytest.mark.parametrize("block", [1, 3, 7, 40])
def test_blocks_equal_the_reference(lengths, block, size):
    q, k, v, cotangent = tensors_of(lengths)
    q = size * q
    expected = both(landmark_attention, q, k, v, cotangent, block, backend="reference")
    for cut in (False, True):
        if cut:
            with tiny_strips():
                found = both(landmark_attention, q, k, v, cotangent, block, backend="torch")
        else:
            found = both(landmark_attention, q, k, v, cotangent, block, backend="torch")
        for name, a, e in zip(NAMES, found, expected, strict=True):
            assert_close(a, e, f"{name}, cut={cut}", gradient=name != "output")


@pytest.mark.parametrize("block", [9, 63, 150])
def test_blocks_equal_the_reference_with_default_tiles(block):
    q, k, v, cotangent = tensors_of((389, 389), dtype=torch.float32)
    expected = both(landmark_attention, q, k, v, cotangent, block, backend="reference")
    found = both(landmark_attention, q, k, v, cotangent, block)
    for name, a, e in zip(NAMES, found, expected, strict=True):
        assert_close(a, e, name, gradient=name != "output")


def test_grouped_heads_and_layouts():
    q, k, v, _ = tensors_of(heads=4)
    full = [x[:, ::2].repeat_interleave(2, 1) for x in (k, v)]
    expected = landmark_attention(q, *full, 3, backend="reference")
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k[:, ::2], v[:, ::2])]
    for backend in BACKENDS:
        assert_close(landmark_attention(*strided, 3, backend=backend), expected, backend)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_routes_agree_in_the_host(many_strips, kv_heads):
    attn = build("landmark(block=3)+rope", kv_heads=kv_heads)
    x = draw(2, 13, 32)
    attn.route = "reference"
    expected = settle(attn, x)
    for route in ("engine", "dense", "landmark_blocks"):
        attn.route = route
        for name, value in settle(attn, x).items():
            assert_close(value, expected[name], f"{route} {name}", gradient=name != "output")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_equals_the_reference(dtype):
    kernel = pytest.importorskip("zoo.kernels.landmark", reason="Triton is not installed")
    assert callable(kernel.landmark_attention)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v, g = (x.to(device) for x in tensors_of((23, 23), 16, dtype, samples=1))
    found = both(landmark_attention, q, k, v, g, 7, backend="triton")
    exact = [x.double() for x in (q, k, v, g)]
    expected = both(landmark_attention, *exact, 7, backend="reference")
    for name, a, e in zip(NAMES, found, expected, strict=True):
        assert_close(a, e, name, gradient=name != "output", backend="triton", dtype=dtype)


def test_own_backward_and_its_derivative_against_finite_differences(many_strips):
    q, k, v, _ = tensors_of((5, 7), width=3, heads=1, samples=1)
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def form(q, k, v):
        return landmark_attention(q, k, v, 2, backend="torch")

    assert torch.autograd.gradcheck(form, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(form, inputs, fast_mode=True)
    inputs[1].requires_grad_(False)
    assert torch.autograd.gradgradcheck(form, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_landmarks_it_is_plain_attention(backend):
    q, k, v, cotangent = tensors_of((9, 9))
    found = both(landmark_attention, q, k, v, cotangent, 9, backend=backend)
    plain = both(F.scaled_dot_product_attention, q, k, v, cotangent, is_causal=True)
    for name, a, e in zip(NAMES, found, plain, strict=True):
        assert_close(a, e, name, gradient=name != "output")
    none = torch.zeros(9, dtype=torch.bool)
    y = landmark_attention(q, k, v, 2, is_landmark=none, backend="reference")
    assert_close(y, plain[0], "no landmarks at all")


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_of_landmarks_and_the_order_in_a_block_do_not_matter(backend):
    q, k, v, cotangent = tensors_of()
    _, _, dk, dv = both(landmark_attention, q, k, v, cotangent, 3, backend=backend)
    marks = torch.arange(23) % 4 == 3
    assert float(dv[:, :, marks].abs().max()) == 0
    # Values of the latest landmark's block are used, and so are the keys of all landmarks but it.
    assert float(dk[:, :, marks][:, :, :-1].abs().amax((0, 1, 3)).min()) > 0
    order = torch.arange(23)
    order[4:7] = torch.tensor([6, 4, 5])
    y = landmark_attention(q, k, v, 3, backend=backend)
    z = landmark_attention(q, k[:, :, order], v[:, :, order], 3, backend=backend)
    assert_close(z[:, :, 8:], y[:, :, 8:], "rows after the block")
    assert float((z - y)[:, :, 4:7].abs().max()) > 0.01


def test_landmarks_anywhere_and_different_in_every_sample():
    q, k, v, _ = tensors_of()
    places = torch.zeros(2, 23, dtype=torch.bool)
    places[0, [3, 7, 11, 15, 19]] = True
    places[1, [2, 5, 6, 20]] = True
    y = landmark_attention(q, k, v, 3, is_landmark=places, backend="reference")
    assert_close(y[0], landmark_attention(q, k, v, 3)[0], "regular ones")
    one = landmark_attention(q[1:], k[1:], v[1:], 1, is_landmark=places[1], backend="reference")
    assert_close(y[1:], one, "the sample alone")
    weights = grouped_softmax(q @ k.mT, places)
    # Landmark 6 ends a block of no token at all, so that it has nothing to give.
    assert_close(weights.sum(-1), torch.ones(2, 3, 23), "sums", dtype=torch.float64)


@pytest.mark.parametrize("route", ["engine", "dense"])
def test_masks_keep_the_sum(route):
    """Hidden blocks give up their share: what is left still sums to one."""
    attn = build(route=route)
    x, mask = draw(2, 13, 32), torch.ones(2, 1, 1, 13, dtype=torch.bool)
    mask[0, ..., 4:7] = False  # a whole block, but not its landmark
    mask[1, ..., 3] = False  # a landmark: its block is closed
    _, weights = attn(x, mask=mask, need_weights=True)
    weights = weights.detach()
    total = weights.sum(-1)
    assert_close(total, torch.ones_like(total), "sums")
    assert float(weights[0, ..., 4:8].abs().sum()) == 0
    assert float(weights[1, :, 4:, :4].abs().sum()) == 0


def test_packed_sequences_equal_each_alone():
    attn = build("landmark(block=3)+rope")
    x, ends = draw(1, 31, 32), [0, 10, 10, 17, 31]
    bounds = torch.tensor(ends, dtype=torch.int32)
    expected = [attn(x[:, a:b]) for a, b in pairwise(ends)]
    for route in ("auto", "engine", "landmark_blocks"):
        attn.route = route
        assert_close(attn(x, cu_seqlens=bounds), torch.cat(expected, 1), route)
        with tiny_strips():
            assert_close(attn(x, cu_seqlens=bounds), torch.cat(expected, 1), f"{route} in strips")
    attn.route = "reference"
    with pytest.raises(zoo.ZooError, match="packed"):
        attn(x, cu_seqlens=bounds)


def test_what_is_kept_for_the_backward_pass():
    q, k, v, _ = (x.requires_grad_() for x in tensors_of())
    kept = []

    def pack(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = landmark_attention(q, k, v, 3)
        assert sorted(kept) == sorted(x.numel() for x in (q, k, v, y, y[..., 0]))
        kept.clear()
        with torch.no_grad():
            assert torch.equal(landmark_attention(q, k, v, 3), y)
        assert kept == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    q, k, v, _ = tensors_of(dtype=dtype)
    y = landmark_attention(60 * q, k, v, 3)
    assert y.dtype == dtype
    exact = landmark_attention_reference(60 * q.double(), k.double(), v.double(), 3)
    assert_close(y, exact, "60 times as large scores", dtype=dtype)


def test_gradients_that_have_gradients_are_not_rounded_by_autocast():
    q, k, v, cotangent = tensors_of(dtype=torch.float32)
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def gradients(create_graph):
        y = landmark_attention(*inputs, 3, backend="torch")
        return torch.autograd.grad((y * cotangent).sum(), inputs, create_graph=create_graph)

    with torch.autocast("cpu", torch.bfloat16):
        pairs = zip(NAMES[1:], gradients(True), gradients(False), strict=True)
    for name, found, expected in pairs:
        assert_close(found, expected, name, gradient=True)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_tensors_without_values(backend):
    q, k, v = (torch.empty(1, 2, 9, 4, device="meta") for _ in range(3))
    assert landmark_attention(q, k, v, 2, backend=backend).shape == q.shape


@pytest.mark.parametrize("size", [(0, 5, 32), (2, 0, 32)])
@pytest.mark.parametrize("route", ["landmark_blocks", "engine", "reference"])
def test_empty_input(size, route):
    found = settle(build(route=route), draw(*size))
    assert found["output"].shape == size
    assert not any(bool(value.any()) for value in found.values())


def test_torch_func_takes_the_engine():
    attn, x = build(), draw(3, 9, 32)
    each = vmap(grad(lambda x: attn(x[None]).square().sum()))(x)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(attn(x).square().sum(), x)
    assert_close(each, expected, "gradient", gradient=True)
    attn.route = "landmark_blocks"
    with pytest.raises(zoo.ZooError, match=r"landmark_blocks.*torch\.func"):
        grad(lambda x: attn(x).sum())(x)


def test_routes_and_why_not():
    x, attn = draw(2, 9, 32), build()
    assert attn.explain(x).route == "landmark_blocks"
    assert "landmark_triton" in attn.explain(x).refused
    refused = {
        "bias": attn.explain(x, bias=draw(9, 9)),
        "mask": attn.explain(x, mask=torch.ones(9, 9, dtype=torch.bool)),
        "dropout on the weights": build(dropout=0.5).train().explain(x),
        "shares": build("landmark(group_dropout=0.5)").train().explain(x),
        "sliding_window": build("landmark+sliding_window(window=4)").explain(x),
        "alibi": build("landmark+alibi").explain(x),
    }
    for word, found in refused.items():
        assert found.route == "engine"
        assert word in found.refused["landmark_blocks"]
    with torch.no_grad():
        attn(x, cache=(cache := zoo.LayerCache()))
        assert "one row" in attn.explain(x[:, :1], cache=cache).refused["landmark_blocks"]
        assert attn.explain(x, cache=cache).route == "landmark_blocks"
    with pytest.raises(zoo.ZooError, match="causal"):
        build(causal=False)


def test_group_dropout_drops_whole_blocks():
    attn = build("landmark(block=3, group_dropout=0.4)")
    x = draw(2, 16, 32)
    plain = build("landmark(block=3)")
    plain.load_state_dict(attn.state_dict())
    _, expected = plain(x, need_weights=True)
    _, weights = attn.train()(x, need_weights=True)
    span = torch.arange(16) // 4
    own = span[:, None] == span
    assert_close(weights[..., own], expected[..., own], "own block")
    ratio = (weights / expected)[..., (span[:, None] > span) & (torch.arange(16) % 4 != 3)]
    kept = ratio.detach() > 0
    assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / 0.6), "what is kept")
    assert 0.4 < float(kept.double().mean()) < 0.8
    blocks = kept.view(*kept.shape[:2], -1, 3)
    assert torch.equal(blocks.any(-1), blocks.all(-1)), "a block is dropped as one"
    assert torch.equal(attn.eval()(x), attn(x))
    assert_close(attn(x), plain(x), "outside training")
    with tiny_strips():  # recomputed strips have to drop the same
        torch.manual_seed(3)
        a = settle(attn.train(), x)
        torch.manual_seed(3)
        x.requires_grad_()
        y = attn(x)
        (dx,) = torch.autograd.grad((y * draw(*y.shape, seed=7)).sum(), x)
    assert_close(dx, a["x"], "x", gradient=True)
    direction = draw(*x.shape, seed=9)
    with tiny_strips(), torch.no_grad():
        ends = []
        for sign in (1, -1):
            torch.manual_seed(3)
            ends.append((attn(x + sign * 1e-6 * direction) * draw(*y.shape, seed=7)).sum())
    slope = (ends[0] - ends[1]) / 2e-6
    assert float((slope - (dx * direction).sum()).abs()) < 1e-6 * float(slope.abs() + 1)


def test_position_jumps():
    part = build("landmark(block=3, pos_jump=5)").normalize
    positions = torch.arange(17)
    assert part.eval().place(positions, 4, True) is positions
    found = part.train().place(positions, 400, True)
    steps = found.diff(dim=1) - 1
    after = torch.arange(16) % 4 == 3  # the step away from a landmark
    assert int(steps[:, ~after].abs().max()) == 0
    assert sorted(set(steps[:, after].flatten().tolist())) == [0, 1, 2, 3, 4]
    assert bool((found[:, 0] == 0).all())
    attn, plain = build("landmark(block=3, pos_jump=50)+rope"), build("landmark(block=3)+rope")
    plain.load_state_dict(attn.state_dict())
    x = draw(2, 9, 32)
    torch.manual_seed(0)
    y = attn.train()(x)
    torch.manual_seed(0)
    at = attn.normalize.place(torch.arange(9), 2, True)
    assert_close(y, plain(x, positions=at), "the positions drawn")
    assert_close(attn.eval()(x), plain(x), "outside training")
    for inputs in ({"cache": zoo.LayerCache()}, {"cu_seqlens": torch.tensor([0, 9])}):
        with pytest.raises(zoo.ZooError, match=r"pos_jump=50.*no cache"):
            attn.train()(x[:1], **inputs)


def test_insert_landmarks():
    tokens, marks = insert_landmarks(torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]), 2, 0)
    assert tokens.tolist() == [[1, 2, 0, 3, 4, 0, 5], [6, 7, 0, 8, 9, 0, 10]]
    assert marks.tolist() == [False, False, True, False, False, True, False]
    assert landmark_targets(tokens, marks).tolist()[0] == [2, 3, -100, 4, 5, -100, -100]
    found = landmark_targets(tokens, marks, ignore=-1, include_landmarks=True)
    assert found.tolist()[0] == [2, 0, 3, 4, 0, 5, -1]
    assert insert_landmarks(torch.arange(4), 2, 9)[0].tolist() == [0, 1, 9, 2, 3, 9]
    assert insert_landmarks(torch.zeros(2, 0, dtype=torch.long), 2, 9)[0].shape == (2, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: insert_landmarks(torch.arange(5), 0, 9), r"block=0"),
        (lambda t: insert_landmarks(torch.arange(5), 2, 3), r"landmark_id=3"),
        (lambda t: insert_landmarks(torch.ones(5), 2, 9), r"float32.*integers"),
        (lambda t: insert_landmarks(torch.arange(5), 2, "9"), r"landmark_id='9'"),
        (lambda t: insert_landmarks(torch.arange(5).to(torch.int8), 2, 300), r"landmark_id=300"),
        (lambda t: grouped_softmax(draw(1, 5, 5), NONE), r"\(1, 5, 5\) must be"),
        (lambda t: grouped_softmax(draw(1, 1, 7, 5), NONE), r"last R of M"),
        (lambda t: grouped_softmax(draw(1, 1, 5, 5), NONE, dropout=2.0), r"dropout=2.0"),
        (lambda t: grouped_softmax(draw(1, 1, 5, 5), NONE, torch.ones(5, 5)), r"mask.*float32"),
        (lambda t: grouped_softmax(draw(1, 1, 5, 5), NONE, NONE[:4]), r"mask.*\(4,\)"),
        (lambda t: landmark_attention(*(x.long() for x in t), 3), r"int64.*floating"),
        (lambda t: landmark_targets(torch.arange(5), torch.ones(4).bool()), r"\(4,\).*5 tokens"),
        (lambda t: grouped_softmax(draw(1, 1, 5, 5), torch.ones(5)), r"float32.*boolean \(5,\)"),
        (lambda t: landmark_attention(*t, True), r"block=True"),
        (lambda t: landmark_attention(*t, 3, backend="fast"), r"fast"),
        (lambda t: landmark_attention(t[0], t[1], t[2][:, :, :9], 3), r"do not fit"),
        (lambda t: landmark_attention(t[0], t[1][:, :2], t[2][:, :2], 3), r"do not fit"),
        (
            lambda t: landmark_attention(*t, 3, is_landmark=torch.arange(23) % 5 == 4),
            r"wrong places: backend='auto'.*block=3.*token 3",
        ),
        (
            lambda t: landmark_attention(*t, 3, is_landmark=torch.ones(22).bool()),
            r"\(22,\).*\(23,\)",
        ),
        (lambda t: landmark_attention(*t, 3, backend="triton"), r"triton.*float64"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(zoo.ZooError, match=message):
        call(tensors_of()[:3])


def test_a_functional_form_under_torch_func_says_so():
    q, k, v, _ = tensors_of()
    with pytest.raises(zoo.ZooError, match=r"torch\.func"):
        grad(lambda q: landmark_attention(q, k, v, 3).sum())(q)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("block=0", r"block=0"),
        ("block=2.5", r"block=2.5"),
        ("group_dropout=1.0", r"group_dropout=1.0"),
        ("pos_jump=-1", r"pos_jump=-1"),
        ("retrieve=-1", r"retrieve=-1"),
        ("retrieve=4, cache_blocks=3", r"cache_blocks=3.*at least 4"),
        ("cache_blocks=3", r"cache_blocks=3 has no effect"),
        ("offload=True", r"offload=True has no effect"),
        ("chunk=10", r"chunk=10 has no effect"),
        ("selection=max_heads", r"selection='max_heads' has no effect"),
        ("retrieve=2, selection=best", r"best"),
        ("retrieve=2, chunk=0", r"chunk=0"),
        ("retrieve=all", r"retrieve='all'"),
        ("retrieve=all, cache_blocks=3", r"retrieve='all'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(zoo.ZooError, match=message):
        build(f"landmark({options})")


def test_every_option_is_shown():
    text = repr(build("landmark(block=3, pos_jump=4, retrieve=2, selection=max_heads)").normalize)
    for option in ("block=3", "pos_jump=4", "retrieve=2", "chunk=250", "selection='max_heads'"):
        assert option in text


def test_a_model_uses_it():
    model = DecoderLM(11, dim=16, depth=2, heads=2, attention="landmark(block=3)", position="rope")
    assert model.inserted.every == 3
