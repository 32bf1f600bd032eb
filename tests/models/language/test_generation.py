"""Generation: sampling, prompts of different lengths, where it stops, and what is refused."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.models.language.decoder_lm import DecoderLM
from zoo.models.language.generation import generate, sample


def build(**options):
    torch.manual_seed(0)
    defaults = {"dim": 32, "depth": 2, "heads": 4, "max_len": 32}
    return DecoderLM(11, **{**defaults, **options})


TOKENS = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(1))


def test_generation_is_reproducible_and_keeps_the_prompt():
    model = build(conv=3)
    runs = [
        model.generate(TOKENS, 6, top_k=5, top_p=0.9, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    ]
    assert torch.equal(*runs)
    assert runs[0].shape == (2, 15)
    assert torch.equal(runs[0][:, :9], TOKENS)
    assert model.training


def test_greedy_generation_follows_the_parallel_argmax():
    model = build().eval()
    tokens = TOKENS
    for _ in range(5):
        tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(TOKENS, 5, temperature=0), tokens)


def test_generation_stops_when_every_sequence_has_ended():
    model = build().eval()
    first = int(model(TOKENS[:1])[0, -1].argmax())
    assert model.generate(TOKENS[:1], 9, temperature=0, eos=first).shape == (1, 10)


def test_sampling_keeps_to_top_k_and_top_p():
    logits = torch.tensor([[3.0, 2.0, 1.0, -5.0]]).repeat(200, 1)
    generator = torch.Generator().manual_seed(0)
    assert set(sample(logits, 1.0, 2, None, generator).flatten().tolist()) == {0, 1}
    assert set(sample(logits, 1.0, None, 0.6, generator).flatten().tolist()) == {0}
    assert set(sample(logits, 1.0, None, 0.7, generator).flatten().tolist()) == {0, 1}


def test_prompts_of_different_lengths_are_refused_where_blocks_are_counted():
    model = build(attention="moba(block=2, topk=2)").eval()
    with pytest.raises(zoo.ZooError, match=r"lengths=\[9, 5\].*left.*MoBA cuts blocks"):
        model.generate(TOKENS, 2, lengths=torch.tensor([9, 5]))
    same = model.generate(TOKENS, 2, temperature=0, lengths=torch.tensor([9, 9]))
    assert torch.equal(same, model.generate(TOKENS, 2, temperature=0))
    model.blocks[0].attn.select.set_mode("full")
    model.blocks[1].attn.select.set_mode("full")
    assert model.generate(TOKENS, 2, lengths=torch.tensor([9, 5])).shape == (2, 11)


@pytest.mark.parametrize("attention", ["mha", "mha+rope", "linear", "sliding_window(window=4)"])
def test_prompts_of_different_lengths_continue_as_they_would_alone(attention):
    model = build(attention=attention, conv=3).eval()
    lengths = torch.tensor([9, 5])
    together = model.generate(TOKENS, 6, temperature=0, lengths=lengths)
    for row, size in enumerate(lengths.tolist()):
        alone = model.generate(TOKENS[row : row + 1, -size:], 6, temperature=0)
        assert torch.equal(together[row, -6:], alone[0, -6:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"steps": -1}, "steps"),
        ({"lengths": torch.tensor([9, 10])}, "lengths"),
    ],
)
def test_bad_sampling_arguments_are_refused(options, message):
    with pytest.raises(zoo.ZooError, match=message):
        build().generate(TOKENS, **{"steps": 2, **options})


def test_the_method_of_the_model_is_the_function():
    model = build().eval()
    found = generate(model, TOKENS, 4, temperature=0)
    assert torch.equal(found, model.generate(TOKENS, 4, temperature=0))
    assert not found.requires_grad


def test_a_sequence_that_has_ended_repeats_its_end_until_the_others_have():
    model = build().eval()
    plain = model.generate(TOKENS, 6, temperature=0)[:, 9:]
    eos = int(plain[0, 0])
    found = model.generate(TOKENS, 6, temperature=0, eos=eos)[:, 9:]
    for row, wanted in zip(found, plain, strict=True):
        ends = (wanted == eos).nonzero().flatten().tolist()
        length = min(ends[0] + 1 if ends else len(wanted), len(row))
        assert torch.equal(row[:length], wanted[:length])
        assert (row[length:] == eos).all()
    assert (found[0] == eos).all()


def test_the_mode_of_the_model_is_kept_when_a_step_fails():
    model = build(max_len=10)
    with pytest.raises(zoo.ZooError):
        model.generate(TOKENS, 5)
    assert model.training
