"""The decoder language model: shapes, cache, layouts, positions, initialisation."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch

import zoo
from zoo import models
from zoo.models._blocks import ShortConv
from zoo.models.language.decoder_lm import DecoderLM


def build(**options):
    torch.manual_seed(0)
    defaults = {"dim": 32, "depth": 2, "heads": 4, "max_len": 32}
    return DecoderLM(11, **{**defaults, **options})


TOKENS = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(1))


def test_logits_have_the_shape_of_the_tokens_and_the_vocabulary():
    assert build()(TOKENS).shape == (2, 9, 11)


@pytest.mark.parametrize("conv", [0, 3])
def test_a_later_token_changes_nothing_before_it(conv):
    model = build(conv=conv)
    changed = TOKENS.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    a, b = model(TOKENS), model(changed)
    torch.testing.assert_close(a[:, :5], b[:, :5], rtol=0, atol=0)
    assert (a[:, 5:] != b[:, 5:]).any(-1).all()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conv": 3},
        {"position": "none", "conv": 4},
        {"kv_heads": 2, "qk_norm": True},
        {"mlp": 0},
    ],
    ids=str,
)
def test_decoding_with_the_cache_equals_the_parallel_form(options, grad):
    model = build(**options).eval()
    with torch.set_grad_enabled(grad):
        whole = model(TOKENS)
        cache = zoo.Cache()
        steps = [model(TOKENS[:, :4], cache=cache)]
        steps += [model(TOKENS[:, i : i + 1], cache=cache) for i in range(4, 7)]
        steps.append(model(TOKENS[:, 7:], cache=cache))
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-5, atol=1e-5)
    assert cache.length == 9
    assert len(cache) == 2


def test_tied_embeddings_share_one_tensor():
    tied, untied = build(), build(tie=False)
    assert tied.head.weight is tied.embedding.weight
    extra = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
    assert extra == 11 * 32


def test_layers_differ_as_the_layout_says():
    model = build(depth=5, attention="mha", layers={"first": "gqa", "every": 2, "other": "mqa"})
    assert [block.attn.spec for block in model.blocks] == ["gqa", "mqa", "mha", "mqa", "mha"]
    assert [block.attn.kv_heads for block in model.blocks] == [1, 1, 4, 1, 4]


def test_heads_can_be_narrower_than_the_model_has_room_for():
    model = build(heads=1, head_dim=8)
    for block in model.blocks:
        assert block.attn.layout.qk_dim == block.attn.layout.v_dim == 8
        assert block.attn.project.qkv.weight.shape == (3 * 8, 32)
    assert model(TOKENS).shape == (*TOKENS.shape, 11)


def test_a_position_that_embeds_is_added_once_below_the_layers():
    model = build(position="learned")
    assert model.position is not None
    assert [block.attn.spec for block in model.blocks] == ["mha", "mha"]
    assert sum(p.numel() for p in model.position.parameters()) == 32 * 32


def test_a_position_in_the_spec_replaces_the_default():
    model = build(attention="mha+rope", position="learned")
    assert model.position is None
    assert [block.attn.spec for block in model.blocks] == ["mha+rope", "mha+rope"]


def test_layers_that_disagree_on_the_embedding_are_refused():
    with pytest.raises(zoo.ZooError, match="disagree"):
        build(attention="mha+sinusoidal", layers={"first": "mha+learned"})


def test_layers_that_disagree_on_jumps_of_positions_are_refused():
    with pytest.raises(zoo.ZooError, match="disagree on pos_jump: 0 and 50"):
        build(
            attention="landmark(block=4, pos_jump=50)",
            layers={"first": "landmark(block=4)"},
            position="rope",
        )


def test_initialisation_goes_by_width_and_residual_outputs_are_scaled():
    model = build(dim=64, depth=8)
    assert model.embedding.weight.std().item() == pytest.approx(1 / 8, rel=0.1)
    assert model.blocks[3].attn.project.qkv.weight.std().item() == pytest.approx(1 / 8, rel=0.1)
    proj = model.blocks[0].attn.combine.proj.weight
    assert proj.std().item() == pytest.approx(1 / 8 / 4, rel=0.1)
    down = model.blocks[0].mlp.down.weight
    assert down.std().item() == pytest.approx(down.shape[1] ** -0.5 / 4, rel=0.1)


def test_a_special_initialisation_survives_the_models_own():
    model = build(attention="differential")
    plain = zoo.create("differential", 32, 4, causal=True)
    for name, parameter in model.blocks[0].attn.normalize.named_parameters():
        if name.startswith("lambda"):
            reference = dict(plain.normalize.named_parameters())[name]
            assert parameter.std().item() == pytest.approx(reference.std().item(), rel=1.5)
            assert parameter.std() > 0.03


def test_the_short_convolution_by_hand():
    conv = ShortConv(1, 2)
    with torch.no_grad():
        conv.conv.weight.copy_(torch.tensor([[[10.0, 1.0]]]))
    x = torch.tensor([[[1.0], [2.0], [3.0]]])
    # y_t = x_t + 10 x_{t-1} + 1 x_t
    assert conv(x).flatten().tolist() == [2.0, 14.0, 26.0]


def test_round_trips():
    model = build(conv=3)
    model(TOKENS).sum().backward()
    other = build(conv=3)
    other.load_state_dict(copy.deepcopy(model).state_dict())
    torch.testing.assert_close(other(TOKENS), model(TOKENS), rtol=0, atol=0)


def test_padding_at_the_end_does_not_reach_the_real_tokens():
    model = build(conv=3)
    mask = zoo.padding_mask(torch.tensor([9, 5]))
    padded = model(TOKENS, mask=mask)
    torch.testing.assert_close(padded[1:, :5], model(TOKENS[1:, :5]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 30}, "not divisible by heads"),
        ({"conv": 1}, "conv=1 must be a whole number of at least 2, or 0"),
        ({"mlp": -1}, "mlp=-1 must be a number of at least 0, 0 for none"),
        ({"attention": "mah"}, "unknown mechanism 'mah'"),
        ({"position": "mha"}, "must be one position part"),
        ({"layers": {"frist": "mha"}}, "did you mean 'first'"),
        ({"layers": {"every": 2}}, "go together"),
        ({"layers": {"every": 0, "other": "mha"}}, "every=0"),
        ({"depth": 0}, "depth=0"),
        ({"num_outputs": 0}, "num_outputs=0 must be a whole number .*, or None for logits"),
        ({"attention": "gru", "head_dim": 4}, "head_dim=4: 'gru' is a whole module"),
        ({"attention": "gru", "kv_heads": 2}, "kv_heads=2: 'gru' is a whole module"),
        ({"attention": "gru", "qk_norm": True}, "qk_norm=True: 'gru' is a whole module"),
        ({"head_dim": 0}, "head_dim"),
        ({"dropout": 1.5}, "dropout"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises((zoo.ZooError, ValueError), match=message):
        build(**options)


def test_a_model_of_numbers_gives_them_at_every_position_and_samples_nothing():
    model = build(num_outputs=3)
    assert model(TOKENS).shape == (*TOKENS.shape, 3)
    assert model.embedding.weight is not model.head.weight
    with pytest.raises(zoo.ZooError, match="num_outputs=3: the model gives no tokens"):
        model.generate(TOKENS, 1)


def test_the_output_layer_reads_the_hidden_representation():
    model = build()
    hidden = model.hidden(TOKENS)
    assert hidden.shape == (*TOKENS.shape, 32)
    torch.testing.assert_close(model.head(hidden), model(TOKENS), rtol=0, atol=0)


def test_a_sequence_longer_than_the_table_is_refused():
    with pytest.raises(zoo.ZooError, match="max_len"):
        build(max_len=8)(TOKENS)


def test_models_are_made_by_name_and_bad_names_are_refused():
    model = models.create("decoder_lm", vocab_size=5, dim=16, heads=2)
    assert {"decoder_lm", "resnet", "vit"} <= set(models.names())
    with pytest.raises(zoo.ZooError, match="is taken"):
        models.model("vit")(DecoderLM)
    assert isinstance(model, DecoderLM)
    with pytest.raises(zoo.ZooError, match="did you mean 'decoder_lm'"):
        models.create("decoder")
    with pytest.raises(zoo.ZooError, match="did you mean 'depth'"):
        models.create("decoder_lm", vocab_size=5, dpth=3)
    with pytest.raises(zoo.ZooError, match="vocab_size"):
        models.create("decoder_lm")


LONG = torch.randint(0, 11, (2, 17), generator=torch.Generator().manual_seed(2))


def landmarks(options="block=4", position="rope", **others):
    return build(attention=f"landmark({options})", position=position, depth=2, **others)


def test_inserted_tokens_take_part_but_are_not_seen_outside():
    model = landmarks()
    assert model.inserted.every == 4
    assert model.feed_every is None
    logits = model(LONG)
    assert logits.shape == (2, 17, 11)
    with model.blocks[0].attn.capture() as passes:
        model(LONG)
    assert passes[0].x.shape == (2, 17 + 4, 32)
    model.zero_grad()
    logits.square().sum().backward()
    assert float(model.inserted.embedding.weight.grad.abs().max()) > 0
    plain = build(position="rope")
    extra = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert extra == 32
    assert plain.inserted is None


def test_inserted_tokens_come_with_the_next_ordinary_one():
    """By hand: embed, put the landmark after every fourth, run the blocks, drop it again."""
    model = landmarks(conv=3).eval()
    rows = []
    for i, x in enumerate(model.embedding(LONG).unbind(1)):
        if i and i % 4 == 0:
            rows.append(model.inserted.embedding.weight.expand(2, -1))
        rows.append(x)
    x = torch.stack(rows, 1)
    for block in model.blocks:
        x = block(x)
    kept = [i for i in range(21) if i % 5 != 4]
    expected = model.head(model.norm(x[:, kept]))
    torch.testing.assert_close(model(LONG), expected, rtol=1e-5, atol=1e-5)


def test_inserted_tokens_keep_causality():
    model = landmarks()
    changed = LONG.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 11
    a, b = model(LONG), model(changed)
    torch.testing.assert_close(a[:, :9], b[:, :9], rtol=0, atol=0)
    assert (a[:, 9:] != b[:, 9:]).any(-1).all()
    for length in (0, 1, 4, 5):
        short = model(LONG[:, :length])
        torch.testing.assert_close(short, a[:, :length], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal"])
@pytest.mark.parametrize("conv", [0, 3])
def test_decoding_with_inserted_tokens_equals_the_parallel_form(conv, position):
    model = landmarks(conv=conv, position=position, max_len=17).eval()
    whole = model(LONG)
    for pieces in ([1] * 17, [4, 4, 1, 8], [3, 2, 7, 5]):
        cache = zoo.Cache()
        with torch.no_grad():
            steps = [model(piece, cache=cache) for piece in LONG.split(pieces, 1)]
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-5, atol=1e-5)
        assert cache.length == 21


def test_tables_of_positions_have_room_for_jumps():
    model = build(attention="landmark(block=3, pos_jump=6)", max_len=17, position="learned")
    # 5 landmarks, after each of which positions may move on by 5.
    assert model.position.table.num_embeddings == 17 + 5 + 5 * 5
    with patch("torch.randint", lambda high, *args, **options: torch.full(*args, high - 1)):
        assert bool(model(LONG).isfinite().all())


def test_generation_with_inserted_tokens():
    model = landmarks().eval()
    found = model.generate(LONG, 7, temperature=0)
    assert found.shape == (2, 24)
    tokens = LONG
    for _ in range(7):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, tokens)
    full = torch.tensor([17, 17])
    assert torch.equal(model.generate(LONG, 7, temperature=0, lengths=full), tokens)
    with pytest.raises(zoo.ZooError, match=r"lengths=\[17, 9\].*left"):
        model.generate(LONG, 2, lengths=torch.tensor([17, 9]))


def test_padding_behind_inserted_tokens():
    model = landmarks(conv=3).eval()
    mask = zoo.padding_mask(torch.tensor([17, 9]))
    logits = model(LONG, mask=mask)
    torch.testing.assert_close(logits[:1], model(LONG[:1]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[1:, :9], model(LONG[1:, :9]), rtol=1e-5, atol=1e-5)
    cache = zoo.Cache()
    with torch.no_grad():
        parts = [model(LONG[:, :8], mask=mask[..., :8], cache=cache)]
        parts.append(model(LONG[:, 8:], mask=mask, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1)[1, :9], logits[1, :9], rtol=1e-5, atol=1e-5)
    front = mask.clone()
    front[1] = mask[1].flip(-1)
    refused = {
        "left": {"mask": front},
        "keys": {"mask": torch.ones(17, 17, dtype=torch.bool)},
        "positions": {"positions": torch.arange(17)},
    }
    for word, inputs in refused.items():
        with pytest.raises(zoo.ZooError, match=word):
            model(LONG, **inputs)


def test_positions_jump_alike_in_all_layers():
    model = landmarks("block=4, pos_jump=9").train()
    seen = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(kwargs["positions"]), with_kwargs=True
        )
    model(LONG)
    assert torch.equal(seen[0], seen[1])
    assert seen[0].shape == (2, 21)
    steps = seen[0].diff(dim=1)
    assert bool((steps[:, 4::5] > 1).any())
    assert bool((steps[:, 3::5] == 1).all())
    model.eval()(LONG)
    assert torch.equal(seen[2], torch.arange(21))


def test_layers_may_differ_but_not_in_what_they_insert():
    mixed = build(attention="landmark(block=4)", layers={"first": "mha"}, position="rope")
    assert mixed.inserted.every == 4
    assert mixed(LONG).shape == (2, 17, 11)
    with pytest.raises(zoo.ZooError, match=r"insert_every: 4 and 5"):
        build(attention="landmark(block=4)", layers={"first": "landmark(block=5)"})


def test_a_model_that_retrieves_feeds_itself():
    """Outside training long input goes through a cache, in chunks, and sees what it retrieves."""
    model = landmarks("block=4, retrieve=1, chunk=8").eval()
    found = model(LONG)
    cache = zoo.Cache()
    steps = [model(piece, cache=cache) for piece in LONG.split(8, 1)]
    torch.testing.assert_close(found, torch.cat(steps, 1), rtol=1e-5, atol=1e-5)
    whole = landmarks("block=4").eval()
    whole.load_state_dict(model.state_dict())
    torch.testing.assert_close(found[:, :8], whole(LONG[:, :8]), rtol=1e-5, atol=1e-5)
    assert float((found - whole(LONG))[:, 8:].detach().abs().max()) > 1e-3
    torch.testing.assert_close(model.train()(LONG), whole(LONG), rtol=1e-5, atol=1e-5)
    every = landmarks("block=4, retrieve=9, chunk=8", "none").eval()
    plain = landmarks("block=4", "none").eval()
    plain.load_state_dict(every.state_dict())
    torch.testing.assert_close(every(LONG), plain(LONG), rtol=1e-5, atol=1e-5)
    assert every.generate(LONG, 5, temperature=0).equal(plain.generate(LONG, 5, temperature=0))
    with pytest.raises(zoo.ZooError, match=r"feed_every=8.*no mask"):
        every(LONG, mask=zoo.padding_mask(torch.tensor([17, 9])))
