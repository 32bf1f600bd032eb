"""The HTML page: what is in it, that nothing gets out of its cell, and that nothing is loaded."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest

from zoo import registry
from zoo.claims.schema import Claim
from zoo.claims.trials import Published
from zoo.claims.verdicts import judge
from zoo.errors import ZooError
from zoo.leaderboard.page import _html_pictures, html
from zoo.leaderboard.page._html_grid import Ids
from zoo.leaderboard.page._html_mechanisms import GONE, parts
from zoo.leaderboard.page._html_pictures import Picture
from zoo.leaderboard.page._html_text import arguments, docstring, markdown
from zoo.runs.records import write

ROOT = Path(__file__).parents[3]
EVIL = "<script>alert(1)</script>\"'"
VOID = {"meta", "link", "input", "br", "wbr", "img", "hr"}


class Page(HTMLParser):
    """Every element of a page with its attributes, its text, and the elements around it."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        one = {"tag": tag, **dict(attributes), "text": "", "around": list(self.open)}
        self.elements.append(one)
        if tag not in VOID:
            self.open.append(one)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for one in self.open:
            one["text"] += data

    def all(self, tag, inside=None, **attributes):
        return [
            one
            for one in self.elements
            if one["tag"] == tag
            and all(one.get(name) == value for name, value in attributes.items())
            and (inside is None or any(outer.get("id") == inside for outer in one["around"]))
        ]

    def rows(self, table):
        """Texts of the cells of a table by the keys of its columns."""
        keys = [one["data-key"] for one in self.all("th", inside=table)]
        body = [row for row in self.all("tr", inside=table) if row["around"][-1]["tag"] == "tbody"]
        cells = self.all("td", inside=table)
        found = [[c["text"] for c in cells if c["around"][-1] is row] for row in body]
        return [dict(zip(keys, row, strict=True)) for row in found]


def seeds(make, attention, figures, **changes):
    return [make(attention=attention, seed=s, report=f, **changes) for s, f in enumerate(figures)]


@pytest.fixture
def records(make):
    return [
        *seeds(make, "mha", [0.50, 0.51, 0.52]),
        *seeds(make, "linear", [0.80, 0.82, 0.81]),
        *seeds(make, "sliding_window(window=8)+rope", [0.20, 0.22, 0.21]),
        *seeds(make, "no_mixing", [0.10, 0.11, 0.12]),
        *seeds(make, "cog", [0.3], recipe="bytes", track="language", group="g1"),
    ]


@pytest.fixture
def claims(make, tmp_path):
    claim = Claim(
        statement=f"It is better {EVIL}.",
        mechanism="cog",
        source="Table 1 <b>",
        variants={"ours": ["attention=cog"], "base": []},
        figures={"loss": "test/loss"},
        criterion=["ours.loss < base.loss"],
        seeds=1,
    )
    for name, loss in (("ours", 0.1), ("base", 0.4)):
        rest = {"val/accuracy": 0.5, "test/accuracy": 0.5, "test/loss": loss}
        write(make(id=f"{name}-0", metrics=rest), tmp_path)
    found = judge("better", claim, {"ours": ["ours-0"], "base": ["base-0"]}, tmp_path)
    return [Published(found, False)]


def drawn(entry):
    return Picture(f"picture of {entry.name}", "data:image/png;base64,AAAA")


def test_a_row_has_its_figures(records):
    rows = Page(html.render(records, draw=None)).rows("t-mqar-g0")
    assert [row["attention"].split()[0] for row in rows] == [
        *("linear", "mha", "sliding_window(window=8)+rope", "no_mixing")
    ]
    assert rows[0]["mean"] == "0.8100 ± 0.0100 (3)"
    assert rows[0]["solved"] == "0/3"
    assert rows[0]["difference"] == "+0.3000 [+0.2752, +0.3248] (3)"
    assert (rows[0]["outcome"], rows[2]["outcome"]) == ("win", "loss")
    assert (rows[1]["difference"], rows[1]["attention"]) == ("baseline", "mha baseline")
    assert rows[3]["attention"] == "no_mixing floor"
    assert [row["place"] for row in rows] == ["1", "2", "3", "4"]
    assert rows[0]["parameters"] == "18.2k"


def test_the_same_records_give_the_same_bytes(records, claims):
    first = html.render(records, claims, draw=drawn)
    shuffled = [*records, records[3]]
    random.Random(0).shuffle(shuffled)
    assert html.render(shuffled, claims, draw=drawn).encode() == first.encode()
    assert html.render(records[:-1], claims, draw=drawn) != first


def test_every_link_has_a_target_and_every_target_its_own_name(records, claims):
    page = Page(html.render(records, claims, draw=None))
    ids = [one["id"] for one in page.elements if "id" in one]
    assert len(ids) == len(set(ids))
    targets = [one["href"][1:] for one in page.all("a") if one["href"].startswith("#")]
    assert len(targets) > 100
    assert not set(targets) - set(ids)
    for wanted in ("m-linear", "m-rope", "t-mqar-g0-linear", "c-better"):
        assert wanted in targets


def test_nothing_is_loaded_from_anywhere(records, claims):
    text = html.render(records, claims, draw=drawn)
    page = Page(text)
    for one in page.elements:
        for name in ("src", "srcset", "action", "data", "poster", "background"):
            assert one.get(name, "data:").startswith("data:"), one
        assert one["tag"] not in ("iframe", "object", "embed", "base")
        assert "style" not in one
        assert not [name for name in one if name.startswith("on")]
    assert [one["href"] for one in page.all("link")] == ["data:,"]
    outside = {one["href"] for one in page.all("a") if not one["href"].startswith("#")}
    assert outside
    assert all(re.fullmatch(r"https://arxiv\.org/abs/[\d.]+", link) for link in outside)
    (style,), (script,) = page.all("style"), page.all("script")
    assert not re.search(r"url\(|@import|@font-face", style["text"])
    assert not re.search(r"fetch|XMLHttp|import\(|https?:", script["text"])
    policy = next(m for m in page.all("meta") if m.get("http-equiv"))["content"]
    assert policy.startswith("default-src 'none'; img-src data:;")
    for one in (script, style):
        assert f"'sha256-{html._hash(one['text'])}'" in policy


def test_hostile_names_stay_text(make, claims):
    records = [
        *seeds(make, "mha", [0.5, 0.5, 0.5], recipe=EVIL, track=EVIL, group=EVIL),
        *seeds(make, EVIL, [0.5, 0.4, 0.5], recipe=EVIL, track=EVIL, group=EVIL),
        *seeds(make, "a](http://x.y)![z](http://x.y)", [0.5], recipe=EVIL, track=EVIL, group=EVIL),
    ]
    page = Page(html.render(records, claims, draw=None))
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert not [one for one in page.all("a") if not re.match("#|https://arxiv", one["href"])]
    rows = [one for one in page.all("tr") if one.get("data-words", "").startswith("<script>")]
    assert rows
    assert all(EVIL in row["text"] for row in rows)
    (article,) = [a for a in page.all("article") if a["data-words"] == "<script>alert"]
    assert "nothing of that name is registered here" in article["text"]


def test_a_mechanism_that_is_gone_has_a_section_with_its_records(make):
    records = [*seeds(make, "mha", [0.5]), *seeds(make, "from_a_plugin(x=1)+rope", [0.9])]
    page = Page(html.render(records, draw=None))
    (section,) = page.all("article", id="m-from_a_plugin")
    assert (section["data-kinds"], section["data-traits"]) == (GONE, "")
    assert [row["attention"] for row in page.rows("t-m-from_a_plugin")] == [
        "from_a_plugin(x=1)+rope"
    ]
    (row,) = page.all("tr", id="t-mqar-g0-from_a_plugin-x-1-rope")
    assert (row["data-kinds"], row["data-traits"]) == (f"{GONE} position", "")
    links = [a["href"] for a in page.all("a", inside="t-mqar-g0-from_a_plugin-x-1-rope")]
    assert links == ["#m-from_a_plugin", "#m-rope"]


def test_a_record_cannot_make_the_page_import_anything(make, tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    page = Page(html.render(seeds(make, "trap:Class", [0.5]), draw=None))
    assert page.all("article", id="m-trap-Class")


def test_every_mechanism_has_a_section_with_or_without_records(records, claims):
    page = Page(html.render(records, claims, draw=None))
    for name in registry.list_names():
        entry = registry.info(name)
        (section,) = page.all("article", id=f"m-{name}")
        assert section["data-kinds"] == entry.kind
        for text in (entry.parameters, entry.traits.cost, *entry.options):
            assert text in section["text"]
        if entry.paper and entry.paper.url:
            assert page.all("a", inside=f"m-{name}", href=entry.paper.url)
    (rope,) = page.all("article", id="m-rope")
    assert "(a cos t w_m - b sin t w_m, a sin t w_m + b cos t w_m)" in rope["text"]
    assert "causal" in rope["data-traits"].split()
    assert "equivariant" not in rope["data-traits"].split()
    (alibi,) = page.all("article", id="m-alibi")
    assert "No table has a record of it." in alibi["text"]
    (cog,) = page.all("article", id="m-cog")
    assert "better: reproduced" in " ".join(cog["text"].split())
    assert [row["table"] for row in page.rows("t-m-cog")] == ["bytes"]


def test_a_row_has_the_traits_that_all_its_parts_have(records):
    page = Page(html.render(records, draw=None))
    (row,) = page.all("tr", id="t-mqar-g0-sliding_window-window-8-rope")
    both = [registry.info(name).traits for name in ("sliding_window", "rope")]
    assert row["data-kinds"] == "select position"
    held = row["data-traits"].split()
    for name in ("causal", "cross", "bias", "decode", "equivariant"):
        assert (name in held) == all(getattr(one, name) for one in both)
    assert "roformer" in row["data-words"]


def test_a_claim_has_all_that_the_ledger_says(records, claims):
    page = Page(html.render(records, claims, draw=None))
    (row,) = page.rows("t-claims")
    assert row["mechanism"] == "cog"
    assert row["claim"] == f"better: It is better {EVIL}. (Table 1 <b>)"
    assert row["criterion"] == "ours.loss < base.loss"
    assert row["figures"] == "ours loss 0.1000 (1)base loss 0.4000 (1)"
    assert row["verdict"] == "reproducedthe criterion holds on 1 of 1 seeds"
    assert row["again"] == "zoo claims better"
    stale = [dataclasses.replace(claims[0], stale=True)]
    assert (
        "stale: the claim"
        in Page(html.render(records, stale, draw=None)).rows("t-claims")[0]["verdict"]
    )


def test_the_summary_has_places_by_track(records):
    page = Page(html.render(records, draw=None))
    rows = page.rows("t-places-mha")
    assert [row["attention"] for row in rows][:2] == ["linear", "mha"]
    assert rows[0]["place-recall"] == "1.0 ± 0.0 (3)"
    assert (rows[0]["win"], rows[0]["loss"], rows[1]["win"]) == ("1", "0", "—")


def test_without_records_there_is_still_a_page():
    page = Page(html.render([], draw=None))
    assert "There are no records yet." in page.all("section", id="summary")[0]["text"]
    assert page.all("article", id="m-rope")


def test_measurements_and_figures_are_in_the_page(records):
    measured = json.loads((ROOT / "docs/performance/baselines.json").read_text())
    page = Page(html.render(records, measured={"layers": measured}, draw=drawn))
    (section,) = page.all("section", id="efficiency")
    assert "linear" in section["text"]
    assert page.all("td", inside="efficiency")
    captions = [one["alt"] for one in page.all("img") if "svg+xml" in one["src"]]
    assert "Mean place by track" in " ".join(captions)
    assert "against training throughput" in " ".join(captions)


def test_equal_pictures_are_drawn_once_and_failing_ones_left_out():
    asked = []

    def draw(entry):
        asked.append(entry.name)
        if entry.name == "cog":
            raise ZooError("no")
        return drawn(entry)

    page = Page(html.render([], draw=draw))
    assert len({"mha", "dot", "softmax", "all", "concat", "none"} & set(asked)) == 1
    assert not page.all("img", inside="m-cog")
    assert not page.all("img", inside="m-gru")
    assert page.all("img", inside="m-linear")
    owner = page.all("a", inside="m-softmax")
    assert "#m-mha" in [one["href"] for one in owner]


@pytest.mark.parametrize("name", ["neighborhood", "slot"])
def test_a_picture_is_the_same_every_time(name):
    entry = registry.info(name)
    first = _html_pictures.picture(entry)
    assert first.address.startswith("data:image/png;base64,iVBOR")
    assert _html_pictures.picture(entry) == first
    assert len(first.address) < 200_000


def test_what_forms_no_weights_is_not_drawn():
    assert _html_pictures.shown(registry.info("gru")) is None
    assert _html_pictures.shown(registry.info("lightning")) is None
    assert _html_pictures.shown(registry.info("rope")) == "mha+rope"


def test_parts_of_a_specification_are_found_by_name():
    assert parts("moba(block=8, topk=2)+rope") == [
        ("moba(block=8, topk=2)", "moba"),
        ("rope", "rope"),
    ]
    assert parts("x(a='+')+y") == [("x(a='+')", "x"), ("y", "y")]
    assert parts("broken(") == [("broken(", "broken")]


def test_a_docstring_is_cut_after_its_first_formula():
    lead, rest = docstring("""Title with `name` and a * b * c_d <x>.

    Text:

        y = x ** 2

    - one
    - two
    """)
    assert lead == (
        "<p>Title with <code>name</code> and a * b * c_d &lt;x&gt;.</p>\n<p>Text:</p>\n"
        "<pre><code>y = x ** 2\n</code></pre>\n"
    )
    assert rest == "<ul>\n<li>\n<p>one</p>\n</li>\n<li>\n<p>two</p>\n</li>\n</ul>\n" or (
        rest == "<ul>\n<li>one</li>\n<li>two</li>\n</ul>\n"
    )
    assert docstring("Only this.") == ("<p>Only this.</p>\n", "")


def test_arguments_are_read_from_a_docstring():
    text = "Is.\n\nArgs:\n    a: First\n        and more.\n    b: Second.\n\nRaises:\n    E: no.\n"
    assert arguments(text) == {"a": "First and more.", "b": "Second."}


def test_markdown_makes_no_links_and_no_elements_of_its_own():
    made = markdown("**a** `b` <i>c</i> [d](http://x.y) ![e](http://x.y) <http://x.y>")
    assert set(re.findall(r"<(\w+)", made)) == {"p", "strong", "code"}


def test_ids_are_safe_and_never_given_twice():
    ids = Ids()
    assert [ids.new("t", 'a "b"'), ids.new("t", "a <b>"), ids.new("t", "a-b")] == [
        *("t-a-b", "t-a-b-2", "t-a-b-3")
    ]


def test_a_folder_becomes_a_file(records, tmp_path, monkeypatch):
    monkeypatch.setattr(html, "render", partial(html.render, draw=None))
    for record in records:
        write(record, tmp_path / "runs")
    path, count = html.write(tmp_path / "runs", tmp_path / "page.html")
    assert count == len(records)
    assert Page(path.read_text()).rows("t-mqar-g0")
    with pytest.raises(ZooError, match="nowhere"):
        html.write(tmp_path / "nowhere", path)
