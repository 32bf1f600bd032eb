"""Scenes: the rules that every drawn scene keeps, at rest and in motion, and sets made of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo import datasets
from zoo.datasets.vision import sprites
from zoo.errors import ZooError

OPTIONS = {
    "scenes": {"max_objects": 3},
    "moving_scenes": {"max_objects": 3, "frames": 3, "leave": 0.3},
    "scene_sets": {"max_objects": 3},
    "point_sets": {"points": 3},
}


@pytest.fixture
def drawn():
    """Draw a block of scenes by name."""

    def draw(name: str = "scenes", seed: int = 0, **options: object):
        data = datasets.create(name, **options)
        return data, data.draw(data.block, torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture(params=sorted(OPTIONS))
def build(request: pytest.FixtureRequest):
    def make(**more: object):
        few = {"val_size": 20, "test_size": 13, "batch_size": 6}
        return datasets.create(request.param, **{**few, **OPTIONS[request.param], **more})

    return make


@settings(max_examples=15)
@given(
    height=st.integers(16, 40),
    width=st.integers(16, 40),
    fewest=st.integers(1, 2),
    more=st.integers(0, 2),
    overlap=st.sampled_from([0.2, 0.5, 1.0]),
    visible=st.integers(1, 6),
    background=st.sampled_from(sprites.BACKGROUNDS),
    smooth=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_every_rule_of_a_scene_holds(
    height, width, fewest, more, overlap, visible, background, smooth, seed
):
    data = datasets.create(
        "scenes",
        height=height,
        width=width,
        min_objects=fewest,
        max_objects=fewest + more,
        max_overlap=overlap,
        min_visible=visible,
        background=background,
        smooth=smooth,
        shapes=sprites.SHAPES,
        sizes=[0.25, 0.3],
    )
    scene = data.draw(12, torch.Generator().manual_seed(seed))
    count = scene["count"]
    assert scene["image"].shape == (12, *data.image_shape)
    assert scene["image"].min() >= 0
    assert scene["image"].max() <= 1
    assert scene["masks"].shape == (12, fewest + more, height, width)
    assert (scene["masks"].sum(1) <= 1).all()
    assert ((count >= fewest) & (count <= fewest + more)).all()
    there = torch.arange(fewest + more) < count[:, None]
    assert torch.equal(scene["present"], there)
    area = scene["masks"].flatten(2).sum(-1)
    assert (area[there] >= visible).all()
    assert not area[~there].any()
    for name in ("shape", "colour", "size", "position"):
        assert not scene[name][~there].any()
    assert (scene["shape"] < 5).all()
    assert (scene["colour"] < 6).all()
    assert set(scene["size"][there].tolist()) <= set(torch.tensor([0.25, 0.3]).tolist())
    # Objects lie wholly in the image.
    side = scene["size"][there] * min(height, width) / 2
    place = scene["position"][there] * torch.tensor([width, height])
    assert (place >= side[:, None] - 1e-4).all()
    assert (place <= torch.tensor([width, height]) - side[:, None] + 1e-4).all()


def test_objects_hide_those_before_them_and_leave_them_their_share(drawn):
    data, scene = drawn(max_overlap=0.5, min_visible=8, height=24, width=24)
    look = data._look
    objects, visible, _ = sprites.place(256, look, torch.Generator().manual_seed(0))
    assert torch.equal(visible[:, :, 0], scene["masks"])
    hidden, front = 0, torch.zeros(256, 24, 24, dtype=torch.bool)
    for index in reversed(range(look.max_objects)):
        there = scene["present"][:, index]
        whole = sprites.silhouettes({k: v[there, index] for k, v in objects.items()}, look)[:, 0]
        seen = scene["masks"][there, index]
        assert torch.equal(seen, whole & ~front[there])
        front[there] |= whole
        share = seen.flatten(1).sum(1) / whole.flatten(1).sum(1)
        assert (share >= 0.5).all()
        hidden += int((share < 1).sum())
    assert hidden > 50


def test_the_front_object_is_whole_and_painted_in_its_colour(drawn):
    data, scene = drawn()
    palette = torch.tensor([sprites.COLOURS[name] for name in data.colours])
    front = scene["count"] - 1
    each = torch.arange(256)
    for index in range(data.max_objects):
        mask = scene["masks"][:, index, None].expand(-1, 3, -1, -1)
        colour = palette[scene["colour"][:, index]][..., None, None].expand_as(scene["image"])
        assert torch.equal(scene["image"][mask], colour[mask])
    ground = ~scene["masks"].any(1)[:, None].expand(-1, 3, -1, -1)
    assert not scene["image"][ground].any()
    squares = scene["shape"][each, front] == 0
    area = scene["masks"][each, front].flatten(1).sum(1)[squares]
    side = scene["size"][each, front][squares] * 32
    assert ((area.sqrt() - side).abs() <= 1.0).all()


def test_no_overlap_leaves_every_object_whole(drawn):
    _, scene = drawn(max_overlap=0.0, shapes=["square"], sizes=[0.25])
    area = scene["masks"].flatten(2).sum(-1)[scene["present"]]
    assert set(area.tolist()) == {64}


def test_objects_too_small_to_show_enough_are_not_drawn(drawn):
    # A triangle of side 0.2 has about 20 of the 41 pixels of its box.
    _, scene = drawn(
        min_objects=1, max_objects=1, shapes=["triangle"], sizes=[0.2, 0.5], min_visible=35
    )
    assert set(scene["size"].flatten().tolist()) == {0.5}
    assert (scene["masks"].sum((-1, -2)) >= 35).all()


def test_shapes_by_hand():
    x, y = torch.meshgrid(
        torch.tensor([-0.9, 0.0, 0.9]), torch.tensor([-0.9, 0.0, 0.9]), indexing="xy"
    )
    shapes = torch.arange(5)
    view = (5, 1, 3, 3)
    found = sprites.inside(shapes, x.expand(view), y.expand(view), sprites.SHAPES).int()
    assert found[:, 0].tolist() == [
        [[1, 1, 1], [1, 1, 1], [1, 1, 1]],
        [[0, 1, 0], [1, 1, 1], [0, 1, 0]],
        [[0, 1, 0], [0, 1, 0], [1, 1, 1]],
        [[0, 1, 0], [1, 1, 1], [0, 1, 0]],
        [[0, 1, 0], [1, 1, 1], [0, 1, 0]],
    ]
    # Between the middle of a side and a corner, where circle, diamond and cross differ.
    at = torch.full((5, 1, 1, 1), 0.6)
    assert sprites.inside(shapes, at, at, sprites.SHAPES).flatten().tolist() == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_numbers_of_objects_shapes_colours_and_sizes_are_uniform(drawn):
    scenes = [drawn(seed=seed, height=48, width=48)[1] for seed in range(8)]
    count = torch.cat([scene["count"] for scene in scenes])
    there = torch.cat([scene["present"] for scene in scenes])
    assert (count.bincount(minlength=5)[2:] / len(count) - 1 / 3).abs().max() < 0.06
    for name, kinds in (("shape", 3), ("colour", 6)):
        values = torch.cat([scene[name] for scene in scenes])[there]
        assert (values.bincount(minlength=kinds) / len(values) - 1 / kinds).abs().max() < 0.04


def test_distinct_colours_differ_within_a_scene(drawn):
    _, scene = drawn(
        distinct_colours=True, max_objects=4, min_objects=4, colours=list(sprites.COLOURS)
    )
    assert all(len(set(row)) == 4 for row in scene["colour"].tolist())
    assert len(scene["colour"].unique()) == 8
    with pytest.raises(
        ZooError, match="max_objects=4 objects cannot have distinct_colours: there are 2"
    ):
        datasets.create("scenes", distinct_colours=True, colours=["red", "blue"])


def test_backgrounds_and_smooth_edges(drawn):
    _, plain = drawn()
    _, smooth = drawn(smooth=True)
    assert torch.equal(plain["masks"], smooth["masks"])
    assert len(plain["image"].unique()) < 20
    assert len(smooth["image"].unique()) > 100
    # Far from all edges nothing changes.
    assert ((plain["image"] - smooth["image"]).abs() < 1e-6).float().mean() > 0.7
    for background in ("grey", "texture"):
        _, scene = drawn(background=background)
        ground = ~scene["masks"].any(1)
        assert torch.equal(scene["image"][:, 0][ground], scene["image"][:, 2][ground])
        levels = [image[0][g].unique() for image, g in zip(scene["image"], ground, strict=True)]
        assert all((len(level) == 1) == (background == "grey") for level in levels)


def test_moving_objects_keep_their_identity_and_go_straight(drawn):
    data, film = drawn("moving_scenes", frames=6, enter=0.5, leave=0.5)
    rows, most = 32, 4
    assert film["video"].shape == (rows, 6, 3, 32, 32)
    assert film["masks"].shape == (rows, 6, most, 32, 32)
    assert film["present"].shape == (rows, 6, most)
    assert film["position"].shape == (rows, 6, most, 2)
    assert (film["masks"].sum(2) <= 1).all()
    present = film["present"]
    assert not film["masks"][~present].any()
    assert torch.equal(present.any(1).sum(1), film["count"])
    # In every video an object stays; others come late and go early, once.
    assert present.all(1).any(1).all()
    changes = (present[:, 1:] != present[:, :-1]).sum(1)
    assert changes.max() == 2
    assert (~present[:, 0] & present.any(1)).any()
    assert (~present[:, -1] & present.any(1)).any()
    palette = torch.tensor([sprites.COLOURS[name] for name in data.colours])
    for index in range(most):
        mask = film["masks"][:, :, index, None].expand(-1, -1, 3, -1, -1)
        colour = palette[film["colour"][:, index]][:, None, :, None, None].expand_as(film["video"])
        assert torch.equal(film["video"][mask], colour[mask])
    there = (torch.arange(most) < film["count"][:, None])[:, None].expand(-1, 5, -1)
    step = (film["position"][:, 1:] - film["position"][:, :-1])[there].norm(dim=-1)
    assert step.max() <= 0.15 + 1e-5
    assert step.median() > 0.074
    assert film["position"].min() >= 0
    assert film["position"].max() <= 1


def test_an_object_shows_itself_where_it_appears_and_may_hide_later(drawn):
    _, film = drawn("moving_scenes", frames=8, max_objects=5, min_objects=5, sizes=[0.25, 0.5])
    first = film["present"].int().argmax(1)  # (B, M)
    area = film["masks"].flatten(3).sum(-1)
    assert (area.gather(1, first[:, None])[:, 0] >= 8).all()
    assert (area[film["present"]] == 0).any()


def test_without_entering_or_leaving_all_are_there(drawn):
    _, film = drawn("moving_scenes", enter=0.0, leave=0.0)
    assert torch.equal(film["present"].all(1), film["present"].any(1))


def test_a_wall_sends_objects_back():
    """One object of half the side in a 20x20 image: its middle runs from 5 to 15."""
    look = datasets.create(
        "moving_scenes", frames=30, speed=0.2, height=20, width=20, sizes=[0.5], enter=0.0
    )._look
    way = sprites.draw_objects(
        torch.ones(50, dtype=torch.bool), look, torch.Generator().manual_seed(0)
    )
    centre = way["centre"]
    assert centre.min() >= 5
    assert centre.max() <= 15
    # Away from the walls every step is the same up to its sign.
    step = centre[:, 1:] - centre[:, :-1]
    typical = step.abs().median(1, keepdim=True).values
    same = (step.abs() - typical).abs() < 1e-4
    assert same.float().mean() > 0.6
    assert (step.sign().unique(dim=1).shape[1]) > 1


def test_scene_sets_describe_the_scene(drawn):
    data, batch = drawn("scene_sets")
    _, scene = drawn("scenes")
    assert batch.keys() == {"image", "targets", "present"}
    assert torch.equal(batch["image"], scene["image"])
    assert data.model_facts() == {"image_shape": (3, 32, 32), "max_objects": 4, "properties": 14}
    assert data.task_facts() == {"coordinates": 2, "classes": (2, 3, 6), "flagged": True}
    target, there = batch["targets"], scene["present"]
    assert target.shape == (256, 4, 14)
    assert not target[~there].any()
    place, size, shape, colour, flag = target[there].split([2, 2, 3, 6, 1], dim=-1)
    assert torch.equal(place, scene["position"][there])
    assert torch.equal(torch.tensor([0.25, 0.4])[size.argmax(-1)], scene["size"][there])
    assert torch.equal(shape.argmax(-1), scene["shape"][there])
    assert torch.equal(colour.argmax(-1), scene["colour"][there])
    for one_hot in (size, shape, colour, flag):
        assert (one_hot.sum(-1) == 1).all()


def test_the_mean_of_a_point_set_errs_by_a_quarter(drawn):
    data, batch = drawn("point_sets")
    assert data.model_facts() == {"max_objects": 4, "properties": 4}
    assert data.task_facts() == {"coordinates": 4, "classes": (), "flagged": False}
    points = batch["points"]
    assert points.shape == (256, 4, 4)
    assert points.min() >= -1
    assert points.max() <= 1
    assert torch.equal(points, batch["targets"])
    assert batch["present"].all()
    error = (points - points.mean(1, keepdim=True)).square().mean()
    assert error.item() == pytest.approx(0.25, abs=0.02)


def test_examples_do_not_depend_on_the_batch_size(build, first, same):
    large = first(build(batch_size=70), 1)[0]
    small = first(build(batch_size=7), 10)
    same({k: torch.cat([b[k] for b in small]) for k in small[0]}, large)


def test_examples_by_index_in_any_order(build):
    data = build()
    indices = torch.tensor([2 * data.block + 3, 1, 1, 5])
    taken = data.stream("train").take(indices)
    for row, index in enumerate(indices.tolist()):
        alone = build().stream("train").take(torch.tensor([index]))
        assert all(torch.equal(taken[k][row], alone[k][0]) for k in taken)


def test_streams_differ_by_seed_and_split_and_evaluation_does_not(build, first, whole, same):
    a, b = build(seed=1), build(seed=2)
    same(whole(a.val_dataloader()), whole(b.val_dataloader()))
    parts = [first(a, 1)[0], first(b, 1)[0], next(iter(a.val_dataloader()))]
    parts.append(next(iter(a.test_dataloader()[0])))
    key = next(iter(parts[0]))
    pictures = [tuple(row.flatten().tolist()) for part in parts for row in part[key]]
    assert len(set(pictures)) == len(pictures)


def test_sizes_of_splits_and_the_example(build, first, whole):
    data = build()
    batch = first(data, 1)[0]
    (example,) = data.example()
    key = next(k for k in ("image", "video", "points") if k in batch)
    assert example.shape == (1, *batch[key].shape[1:])
    assert len(whole(data.val_dataloader())[key]) == 20
    assert len(whole(data.test_dataloader()[0])[key]) == 13
    facts = data.model_facts()
    assert facts["max_objects"] == 3
    if "image_shape" in facts:
        assert batch[key].shape[-3:] == facts["image_shape"]


def test_a_finite_training_set_is_the_beginning_of_the_stream(build, first, same):
    data = build(train_size=12)
    batches = first(data, 2)
    (stream,) = first(build(batch_size=12), 1)
    key = next(iter(stream))
    rows = [tuple(row.flatten().tolist()) for batch in batches for row in batch[key]]
    assert sorted(rows) == sorted(tuple(row.flatten().tolist()) for row in stream[key])


def test_fingerprints_notice_options_and_not_the_seed(build):
    def fingerprint(**options: object) -> str:
        data = build(**options)
        data.setup()
        return data.fingerprint

    many = "points" if build().name == "point_sets" else "max_objects"
    changes = [{}, {many: 4}, {"val_size": 21}, {"test_size": 14}, {"train_size": 5}]
    assert len({fingerprint(**change) for change in changes}) == len(changes)
    assert fingerprint() == fingerprint(seed=9, batch_size=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 3}, "height=3 must be a whole number of at least 4"),
        ({"width": 1.5}, "width=1.5 must be a whole number of at least 4"),
        ({"max_objects": 0}, "max_objects=0 must be a whole number of at least 1"),
        ({"min_objects": 5}, "min_objects=5 must be a whole number from 1 to 4"),
        ({"min_visible": 0}, "min_visible=0 must be a whole number of at least 1"),
        ({"min_visible": 65}, r"sizes holds 0.25, a box of 8.0x8.0 pixels, .*min_visible=65"),
        ({"max_overlap": 1.5}, r"max_overlap=1.5 must be a number in \[0, 1\]"),
        ({"smooth": 1}, "smooth=1 must be True or False"),
        ({"background": "gray"}, "unknown background 'gray'; did you mean 'grey'"),
        ({"shapes": []}, r"shapes=\[\] must be at least one of square"),
        ({"shapes": "square"}, "shapes='square' must be a list"),
        ({"shapes": ["disc"]}, "unknown name in shapes 'disc'"),
        ({"colours": ["red", "red"]}, r"colours=.*'red'. must be a list of different values"),
        ({"colours": ["rad"]}, "did you mean 'red'"),
        ({"sizes": []}, r"sizes=\[\] must be a list of at least one"),
        ({"sizes": [0.5, 1.5]}, r"sizes\[1\]=1.5 must be a number in \[0, 1\]"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        datasets.create("scenes", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 1}, "frames=1 must be a whole number of at least 2"),
        ({"speed": -0.1}, r"speed=-0.1 must be a number in \[0, 1\]"),
        ({"enter": 2}, r"enter=2 must be a number in \[0, 1\]"),
        ({"leave": "no"}, r"leave='no' must be a number in \[0, 1\]"),
    ],
)
def test_impossible_options_of_videos_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        datasets.create("moving_scenes", **options)


def test_impossible_point_sets_are_refused():
    for option in ("points", "coordinates"):
        with pytest.raises(ZooError, match=f"{option}=0 must be a whole number of at least 1"):
            datasets.create("point_sets", **{option: 0})


def test_objects_that_find_no_place_are_refused():
    data = datasets.create("scenes", min_objects=6, max_objects=6, sizes=[0.6], max_overlap=0.0)
    with pytest.raises(ZooError, match=r"6 objects find no place in images of 32x32.*max_overlap"):
        data.draw(2, torch.Generator().manual_seed(0))
