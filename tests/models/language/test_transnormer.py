"""TransNormerLLM: the author's small model, its layers, decoding and what is refused."""

from __future__ import annotations

import pytest
import torch
from golden_files import under

import zoo
from zoo import models
from zoo.models._blocks import SGLU, Block
from zoo.models.language.transnormer import SRMSNorm, TransNormer
from zoo.testing.subject import draw
from zoo.testing.tolerances import assert_close

# LRPE in all layers but the first, as the author's code has it (the paper: only in the first).
AUTHOR = {"attention": "lightning(lrpe=True)", "layers": {"first": "lightning(lrpe=False)"}}


def small(**options):
    torch.manual_seed(0)
    return TransNormer(11, **{"dim": 16, "depth": 2, "heads": 2, **options})


def official(tensors, depth):
    """Our parameters by name from those of the author's small model."""
    found = {"embedding.weight": tensors["transnormer.wte.weight"]}
    found["head.weight"] = found["embedding.weight"]
    for i in range(depth):
        theirs, ours = f"transnormer.h.{i}", f"blocks.{i}"
        qkvu = tensors[f"{theirs}.token_mixer.qkvu_proj.weight"]
        width = qkvu.shape[1]
        found[f"{ours}.attn.project.qkv.weight"] = qkvu[: 3 * width]
        found[f"{ours}.attn.attend.gate.weight"] = qkvu[3 * width :]
        found[f"{ours}.attn.combine.proj.weight"] = tensors[f"{theirs}.token_mixer.out_proj.weight"]
        mlp = [tensors[f"{theirs}.channel_mixer.l{n}.weight"] for n in (1, 2, 3)]
        found[f"{ours}.mlp.up.weight"] = torch.cat(mlp[:2])
        found[f"{ours}.mlp.down.weight"] = mlp[2]
        theta = tensors.get(f"{theirs}.token_mixer.lrpe.theta")
        if theta is not None:
            found[f"{ours}.attn.attend.theta"] = theta.squeeze(1)
    return found


def golden_model(tensors, metadata):
    config, theirs = metadata["config"]["tnl1"], under(tensors, "param.tnl1.")
    dim, depth = config["n_embd"], config["n_layer"]
    # The author's code can do no other than these two.
    assert config["lrpe_layers"] == list(range(1, depth))
    assert not config["bias"]
    facts = {"dim": dim, "depth": depth, "heads": config["n_head"]}
    facts["mlp"] = len(theirs["transnormer.h.0.channel_mixer.l1.weight"]) / dim
    module = TransNormer(config["vocab_size"], **facts, **AUTHOR)
    module.load_state_dict(official(theirs, depth))
    return module


def compare_model(tensors, metadata):
    module = golden_model(tensors, metadata)
    logits = module(tensors["in.tnl1.tokens"])
    assert_close(logits, tensors["out.tnl1.logits"], "logits")
    logits.square().mean().backward()
    gradients = under(tensors, "grad.tnl1.transnormer.h.")
    assert gradients
    for name, wanted in gradients.items():
        layer, _, place = name.partition(".token_mixer.")
        part = module.blocks[int(layer)].attn
        if place == "lrpe.theta":
            what, wanted, found = "theta", wanted.squeeze(1), part.attend.theta.grad
        else:
            assert place == "qkvu_proj.weight"
            what = "q, k, v and u"
            found = torch.cat([part.project.qkv.weight.grad, part.attend.gate.weight.grad])
        assert_close(found, wanted, f"gradient of {what}, layer {layer}", gradient=True)


def compare_sglu(tensors, metadata):
    y = golden_model(tensors, metadata).blocks[0].mlp(tensors["in.tnl1.sglu_x"])
    assert_close(y, tensors["out.tnl1.sglu_y"], "sglu")


def compare_srms_norm(tensors, metadata):
    y = SRMSNorm(metadata["config"]["srms_eps"])(tensors["in.srms.x"])
    assert_close(y, tensors["out.srms.y"], "srms")


def test_equals_the_authors_small_model(golden):
    compare_model(*golden("lightning_attention"))


def test_sglu_equals_the_authors(golden):
    compare_sglu(*golden("lightning_attention"))


def test_another_golden_file(other_golden):
    file = other_golden("lightning_attention")
    for compare in (compare_model, compare_sglu, compare_srms_norm):
        compare(*file)


def test_sglu_by_hand():
    module = SGLU(1, 2, dtype=torch.float64)
    with torch.no_grad():
        module.up.weight.copy_(torch.tensor([[1.0], [2.0], [3.0], [-1.0]]))
        module.down.weight.copy_(torch.tensor([[1.0, 10.0]]))
    y = module(torch.tensor([[[2.0]]], dtype=torch.float64))
    assert y.item() == 2 * 6 + 10 * 4 * -2  # (value * gate) of both hidden channels


def test_srms_norm_equals_the_official_one(golden):
    compare_srms_norm(*golden("lightning_attention"))


def test_srms_norm_has_no_weight_and_is_computed_in_float32():
    assert not list(SRMSNorm().parameters())
    y = SRMSNorm()(torch.tensor([300.0, -300.0, 300.0, 300.0], dtype=torch.float16))
    assert y.tolist() == [1, -1, 1, 1]  # 300^2 is more than float16 holds
    assert not bool(SRMSNorm()(torch.zeros(2, 3)).any())


def test_block_adds_both_branches():
    attn = zoo.create("lightning", dim=8, heads=2, causal=True, dtype=torch.float64)
    block = Block(attn, SRMSNorm, mlp=SGLU(8, 12, dtype=torch.float64))
    x = draw(2, 5, 8)
    inner = x + attn(block.norm1(x))
    assert_close(block(x), inner + block.mlp(block.norm2(inner)), "block")


def test_layers_know_their_depth():
    """The last layer hardly forgets, and only the first turns its queries and keys."""
    parts = [block.attn.attend for block in small(depth=3).blocks]
    assert [part.theta is not None for part in parts] == [True, False, False]
    first, middle, last = (part.slopes[0] for part in parts)
    assert first > middle > last > 0
    assert last == pytest.approx(first / (1 + 1e-5) * 1e-5)


def test_all_weights_start_at_a_standard_deviation_of_one_fiftieth():
    module = TransNormer(300, dim=128, depth=1)
    for name, parameter in module.named_parameters():
        if not name.endswith("theta"):
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.05), name


def test_decoding_two_prompts_after_another():
    """No position is left behind on the module, as it is in the author's code."""
    module = small(**AUTHOR).double().eval()
    tokens = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(1))
    whole = module(tokens)
    for _ in range(2):
        cache = zoo.Cache()
        steps = [module(tokens[:, :4], cache=cache)]
        steps += [module(tokens[:, i : i + 1], cache=cache) for i in range(4, 9)]
        assert_close(torch.cat(steps, 1), whole, "decoded")


def test_it_is_made_by_name_and_generates():
    module = models.create("transnormer", vocab_size=5, dim=16, heads=2)
    found = module.generate(torch.tensor([[1, 2]]), 3, temperature=0)
    assert found.shape == (1, 5)
    assert module(found).shape == (1, 5, 5)
    count = sum(p.numel() for p in module.parameters())
    layer = 5 * 16**2 + 3 * 16 * 32
    assert count == 5 * 16 + 2 * layer + 16  # 16 angles in the first layer


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mlp": 0}, "mlp=0"),
        ({"mlp": "2"}, "mlp='2'"),
        ({"mlp": float("nan")}, "mlp=nan"),
        ({"num_outputs": 0}, "num_outputs=0"),
        ({"depth": 0}, "depth=0"),
    ],
    ids=str,
)
def test_what_it_cannot_be_is_refused(options, named):
    with pytest.raises(zoo.ZooError, match=named):
        small(**options)
