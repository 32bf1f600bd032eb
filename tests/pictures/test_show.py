from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import zoo
from zoo.errors import ZooError
from zoo.models.language.decoder_lm import DecoderLM
from zoo.pictures import show


def test_host_maps_are_the_weights_of_the_host() -> None:
    found = show.host_maps("mha", dim=16, heads=2, length=6, causal=True, seed=3)
    assert list(found) == ["layer 0"]
    weights = found["layer 0"]
    assert weights.shape == (2, 6, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6))
    assert weights.triu(1).abs().max() == 0
    again = show.host_maps("mha", dim=16, heads=2, length=6, causal=True, seed=3)
    assert torch.equal(again["layer 0"], weights)
    other = show.host_maps("mha", dim=16, heads=2, length=6, causal=True, seed=4)
    assert not torch.equal(other["layer 0"], weights)


def test_host_maps_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    show.host_maps("mha", dim=16, heads=2, length=6)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", zoo.list(kind="mixer"))
def test_whole_modules_form_no_weights(name: str) -> None:
    with pytest.raises(ZooError, match=f"'{name}' is a mixer, .*no attention weights"):
        show.host_maps(name)


def test_bad_input() -> None:
    with pytest.raises(ZooError, match="length=0 must be a whole number of at least 1"):
        show.host_maps("mha", length=0)
    with pytest.raises(ZooError, match="did you mean 'mha'"):
        show.host_maps("mhaa")
    with pytest.raises(ZooError, match="no attention layer"):
        show.maps(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(ZooError, match="no attention maps to draw"):
        show.draw({}, title="")


def test_maps_of_a_model_take_the_first_sample_and_leave_the_mode() -> None:
    model = DecoderLM(11, dim=16, depth=2, heads=2, max_len=8, dropout=0.5).train()
    tokens = torch.randint(11, (3, 8))
    found = show.maps(model, tokens)
    assert list(found) == ["layer 0", "layer 1"]
    assert model.training
    alone = show.maps(model, tokens[:1])
    for name, weights in found.items():
        assert weights.shape == (2, 8, 8)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 8))
        torch.testing.assert_close(weights, alone[name])


def test_layers_without_weights_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DecoderLM(11, dim=16, depth=2, heads=2, max_len=8, layers={"first": "linear"})
    tokens = torch.randint(11, (1, 8))
    traits = zoo.Traits(weights=False)
    entry = zoo.info("linear")
    monkeypatch.setitem(zoo.registry._entries, "linear", replaced(entry, traits))
    assert list(show.maps(model, tokens)) == ["layer 1"]
    model = DecoderLM(11, dim=16, depth=1, heads=2, max_len=8, attention="linear")
    with pytest.raises(ZooError, match="'linear' forms no attention weights to show"):
        show.maps(model, tokens)


def replaced(entry: zoo.Entry, traits: zoo.Traits) -> zoo.Entry:
    import dataclasses

    return dataclasses.replace(entry, traits=traits)


def panels(figure: Figure) -> list[object]:
    return [axis for axis in figure.axes if axis.get_images()]


def test_a_panel_for_every_layer_and_head() -> None:
    layers = {"layer 0": torch.rand(3, 5, 5), "layer 1": torch.rand(2, 5, 5)}
    figure = show.draw(layers, title="two layers")
    shown = panels(figure)
    assert len(shown) == 5
    assert [axis.get_title() for axis in shown[:3]] == ["head 0", "head 1", "head 2"]
    assert shown[0].get_ylabel() == "layer 0\nquery"
    assert shown[3].get_ylabel() == "layer 1\nquery"
    assert shown[-1].get_xlabel() == "key"
    assert figure.get_suptitle() == "two layers"
    bar = figure.axes[-1]
    assert bar.get_ylabel() == "attention weight (grey: exactly 0)"
    images = [axis.get_images()[0] for axis in shown]
    assert {image.norm for image in images} == {images[0].norm}
    torch.testing.assert_close(torch.tensor(images[3].get_array().data), layers["layer 1"][0])


def test_zeros_are_masked_and_the_scale_starts_at_zero() -> None:
    weights = show.host_maps("mha", length=8, causal=True)
    image = panels(show.draw(weights, title=""))[0].get_images()[0]
    assert image.norm.vmin == 0
    assert 0 < image.norm.vmax <= 1
    hidden = torch.tensor(image.get_array().mask)
    assert torch.equal(hidden, torch.ones(8, 8).triu(1).bool())


def test_negative_weights_get_a_scale_around_zero() -> None:
    weights = torch.linspace(-0.5, 1.0, 16).view(1, 4, 4)
    norm = panels(show.draw({"layer 0": weights}, title=""))[0].get_images()[0].norm
    assert norm.vmin == -norm.vmax
    assert norm.vcenter == 0


def test_weights_that_are_all_zero_can_be_drawn() -> None:
    assert len(panels(show.draw({"layer 0": torch.zeros(1, 3, 3)}, title=""))) == 1


def test_tokens_stand_along_short_axes_only() -> None:
    tokens = list("abcde")
    axis = panels(show.draw({"layer 0": torch.rand(2, 5, 5)}, title="", tokens=tokens))[0]
    assert [text.get_text() for text in axis.get_xticklabels()] == tokens
    assert [text.get_text() for text in axis.get_yticklabels()] == tokens
    long = show.LABELLED + 1
    axis = panels(show.draw({"layer 0": torch.rand(2, long, long)}, title="", tokens=["a"] * long))
    assert "a" not in [text.get_text() for text in axis[0].get_xticklabels()]


def test_visible() -> None:
    assert show.visible("a b\n\t\x00é") == "a␣b↵⇥·é"
    assert show.visible("$") == r"\$"


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_saved_files(suffix: str, tmp_path: Path) -> None:
    figure = show.draw({"layer 0": torch.rand(1, 3, 3)}, title="cost $x$")
    path = show.save_figure(figure, tmp_path / "new" / f"map.{suffix}")
    magic = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert path.read_bytes().startswith(magic[suffix])


def test_equal_figures_give_equal_svg(tmp_path: Path) -> None:
    for name in ("a", "b"):
        figure = show.draw({"layer 0": torch.eye(3)[None]}, title="same")
        show.save_figure(figure, tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_unwritable_and_unknown_formats(tmp_path: Path) -> None:
    figure = show.draw({"layer 0": torch.rand(1, 3, 3)}, title="")
    with pytest.raises(ZooError, match=r"no known ending; allowed: .*png"):
        show.save_figure(figure, tmp_path / "map.xyz")
    (tmp_path / "file").write_text("")
    with pytest.raises(ZooError, match="cannot write"):
        show.save_figure(figure, tmp_path / "file" / "map.png")
