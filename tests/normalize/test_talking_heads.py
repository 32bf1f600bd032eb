"""Talking heads: the identity is multi-head attention, mixing by hand, masks per head."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.models.language.decoder_lm import DecoderLM
from zoo.normalize.talking_heads import talking_heads_reference
from zoo.testing.subject import draw, settle
from zoo.testing.tolerances import assert_close


def noisy(causal=False, heads=3, dim=12):
    attn = zoo.create("talking_heads", dim, heads, causal=causal, dtype=torch.float64)
    with torch.no_grad():
        for seed, matrix in enumerate(attn.normalize.parameters()):
            matrix.add_(0.5 * draw(heads, heads, seed=seed))
    return attn


@pytest.mark.parametrize("causal", [False, True])
def test_identity_is_multi_head_attention(causal):
    attn = zoo.create("talking_heads", 12, 3, causal=causal, dtype=torch.float64)
    plain = zoo.create("mha", 12, 3, causal=causal, dtype=torch.float64)
    plain.load_state_dict({k: v for k, v in attn.state_dict().items() if "mix" not in k})
    x = draw(2, 7, 12)
    assert_close(attn(x), plain(x), "identity mixing")


@pytest.mark.parametrize("causal", [False, True])
def test_equals_reference(causal):
    attn = noisy(causal)
    x = draw(2, 7, 12)
    mask = torch.ones(7, 7).tril().bool()[None, None] if causal else None

    def plainly(x):
        q, k, v = attn.project(x, None, None)
        part = attn.normalize
        y = talking_heads_reference(q, k, v, part.logits_mix, part.weights_mix, mask)
        return attn.combine(y, x)

    found = settle(attn, x)
    attn.forward = plainly
    for name, value in settle(attn, x).items():
        assert_close(found[name], value, name, gradient=name != "output")


def test_mixing_by_hand():
    part = zoo.create("talking_heads", 4, 2, dtype=torch.float64).normalize
    log3 = torch.tensor(3.0, dtype=torch.float64).log()
    scores = torch.zeros(1, 2, 1, 2, dtype=torch.float64)
    scores[0, 0, 0, 1] = log3  # head 0 weighs 1 : 3, head 1 weighs 1 : 1
    quarter = torch.tensor([0.25, 0.75], dtype=torch.float64)
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert_close(part(scores, None)[0, :, 0], torch.stack([quarter, half]), "identity")
    with torch.no_grad():
        # Scores of head 0 go to softmax 1, softmax 1 hands twice its weights to head 0.
        part.logits_mix.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
        part.weights_mix.copy_(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
    assert_close(part(scores, None)[0, :, 0], torch.stack([2 * quarter, half]), "mixed")


def test_rows_sum_to_the_columns_of_the_second_mixing():
    attn = noisy(causal=True)
    _, weights = attn(draw(2, 7, 12), need_weights=True)
    due = attn.normalize.weights_mix.sum(0)[None, :, None].expand(2, 3, 7)
    assert_close(weights.sum(-1), due, "sum of a row")


def test_a_pair_hidden_from_one_head_stays_hidden_from_it():
    attn = noisy()
    x = draw(1, 5, 12)
    mask = torch.ones(1, 3, 5, 5, dtype=torch.bool)
    mask[0, 1, 2, 3] = False
    mask[0, 2, 4] = False  # no key at all for this head
    _, weights = attn(x, mask=mask, need_weights=True)
    assert float(weights[~mask].detach().abs().max()) == 0
    # The empty row of head 2 adds nothing to the others.
    part = attn.normalize
    q, k, _ = attn.project(x, None, None)
    logits = torch.einsum("bgnm,gh->bhnm", q @ k.transpose(-1, -2) * attn.scale, part.logits_mix)
    alone = logits[0, :2, 4].softmax(-1)
    expected = torch.einsum("gm,gh->hm", alone, part.weights_mix[:2])[:2]
    assert_close(weights[0, :2, 4], expected, "weights beside a head without keys")


@pytest.mark.parametrize("causal", [False, True])
def test_many_strips(many_strips, causal):
    attn = noisy(causal)
    x = draw(3, 17, 12)
    attn.route = "dense"
    expected = settle(attn, x)
    attn.route = "engine"
    for name, value in settle(attn, x).items():
        assert_close(value, expected[name], name, gradient=name != "output")


def test_decodes_as_in_parallel():
    attn, cache = noisy(causal=True), zoo.LayerCache()
    x = draw(2, 9, 12)
    with torch.no_grad():
        pieces = [attn(piece, cache=cache) for piece in x.split([4, 1, 1, 3], 1)]
        assert_close(torch.cat(pieces, 1), attn(x), "decoded")


def test_extra_parameters_and_their_start_survive_a_model():
    model = DecoderLM(11, dim=16, depth=2, heads=4, attention="talking_heads")
    part = model.blocks[1].attn.normalize
    assert sum(p.numel() for p in part.parameters()) == 2 * 4**2
    for matrix in part.parameters():
        assert torch.equal(matrix, torch.eye(4))
        with torch.no_grad():
            matrix.zero_()
    model.blocks[1].attn.init_weights()
    assert torch.equal(part.weights_mix, torch.eye(4))


def test_half_precision_softmax_is_in_float32():
    part = zoo.create("talking_heads", 8, 2).normalize
    scores = draw(1, 2, 3, 5).bfloat16()
    assert part(scores, None).dtype == torch.float32
    assert_close(part(scores, None), scores.float().softmax(-1), "weights")


def test_option_is_refused():
    with pytest.raises(zoo.ZooError, match="identity"):
        zoo.create("talking_heads", 8, 2, identity=True)
