"""The HTML pages: what is in them, that nothing gets out of its cell, and nothing is loaded."""

from __future__ import annotations

import dataclasses
import json
import os
import posixpath
import random
import re
from functools import partial
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest

from zoo import registry
from zoo.claims.schema import Claim
from zoo.claims.trials import Published
from zoo.claims.verdicts import judge
from zoo.errors import ZooError
from zoo.leaderboard.page import html
from zoo.leaderboard.page._html_fill import digest
from zoo.leaderboard.page._html_grid import Ids
from zoo.leaderboard.page._html_mechanisms import GONE, parts
from zoo.leaderboard.page._html_patterns import Panel, Pattern
from zoo.leaderboard.page._html_text import arguments, docstring, markdown
from zoo.runs.records import RecordWarning, write

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
    return Pattern(f"pattern of {entry.name}", (Panel("panel", ((1.0, 0.0), (0.3, 1.0))),))


def index(*args, **options):
    """The page of the tables, parsed."""
    return Page(html.render(*args, **options)["index.html"])


def about(name, *args, **options):
    """The page of a mechanism, parsed."""
    return Page(html.render(*args, **options)[f"mechanisms/{name}.html"])


def test_a_row_has_its_figures(records):
    rows = index(records, draw=None).rows("t-mqar-g0")
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
    first = html.render(records, claims)
    shuffled = [*records, records[3]]
    random.Random(0).shuffle(shuffled)
    again = html.render(shuffled, claims)
    assert list(again) == list(first)
    assert {name: text.encode() for name, text in again.items()} == {
        name: text.encode() for name, text in first.items()
    }
    fewer = html.render(records[:-1], claims)
    assert {name for name in first if fewer[name] != first[name]} == {
        *("index.html", "mechanisms/cog.html")
    }


@pytest.mark.parametrize("place", [("index.html", "mechanisms"), ("my page.html", "my page_x")])
def test_every_link_leads_to_a_page_and_to_a_place_on_it(records, claims, place):
    first, folder = place
    pages = html.render(records, claims, draw=drawn, index=first, folder=folder)
    parsed = {name: Page(text) for name, text in pages.items()}
    ids = {name: [e["id"] for e in page.elements if "id" in e] for name, page in parsed.items()}
    targets = set()
    for name, page in parsed.items():
        assert len(ids[name]) == len(set(ids[name]))
        for link in page.all("a"):
            if link["href"].startswith("https://arxiv.org/abs/"):
                continue
            address, _, anchor = unquote(link["href"]).partition("#")
            to = posixpath.normpath(posixpath.join(posixpath.dirname(name), address))
            to = to if address else name
            assert to in pages, link["href"]
            assert not anchor or anchor in ids[to], link["href"]
            targets.add((to, anchor))
    # Every page is reached, and so are the rows of tables and claims.
    assert {to for to, _ in targets} == set(pages)
    assert (first, "t-mqar-g0-linear") in targets
    assert (f"{folder}/cog.html", "c-better") in targets
    # Addresses of the time when all was one page still find a line.
    assert {f"m-{name}" for name in registry.list_names()} <= set(ids[first])


def test_every_page_leads_to_its_neighbours(records):
    pages = html.render(records, draw=None)
    names = [name for name in pages if name.startswith("mechanisms/")]
    for before, after in pairwise(names):
        (back,) = {a["href"] for a in Page(pages[after]).all("a", rel="prev")}
        (on,) = {a["href"] for a in Page(pages[before]).all("a", rel="next")}
        assert (f"mechanisms/{back}", f"mechanisms/{on}") == (before, after)
    assert not Page(pages[names[0]]).all("a", rel="prev")
    assert not Page(pages[names[-1]]).all("a", rel="next")


def test_nothing_is_loaded_from_anywhere(records, claims):
    measured = json.loads((ROOT / "docs/performance/baselines.json").read_text())
    pages = html.render(records, claims, measured={"layers": measured}, draw=drawn)
    outside = set()
    for text in pages.values():
        page = Page(text)
        for one in page.elements:
            for name in ("src", "srcset", "action", "data", "poster", "background", "xlink:href"):
                assert one.get(name, "data:").startswith("data:"), one
            assert one["tag"] not in ("iframe", "object", "embed", "base", "use", "image")
            assert "style" not in one, one
            assert not [name for name in one if name.startswith("on")]
        assert [one["href"] for one in page.all("link")] == ["data:,"]
        outside |= {a["href"] for a in page.all("a") if ":" in a["href"]}
        (style,), (script,) = page.all("style"), page.all("script")
        assert not re.search(r"url\(|@import|@font-face", style["text"])
        assert not re.search(r"fetch|XMLHttp|import\(|https?:", script["text"])
        policy = next(m for m in page.all("meta") if m.get("http-equiv"))
        assert policy["http-equiv"] == "Content-Security-Policy"
        assert policy["content"].startswith("default-src 'none'; img-src data:;")
        for one in (script, style):
            assert f"'sha256-{digest(one['text'])}'" in policy["content"]
    assert outside
    assert all(re.fullmatch(r"https://arxiv\.org/abs/[\d.]+", link) for link in outside)


def test_hostile_names_stay_text(make, claims):
    records = [
        *seeds(make, "mha", [0.5, 0.5, 0.5], recipe=EVIL, track=EVIL, group=EVIL),
        *seeds(make, EVIL, [0.5, 0.4, 0.5], recipe=EVIL, track=EVIL, group=EVIL),
        *seeds(make, "a](http://x.y)![z](http://x.y)", [0.5], recipe=EVIL, track=EVIL, group=EVIL),
        *seeds(make, "../../up", [0.5], recipe=EVIL, track=EVIL, group=EVIL),
        *seeds(make, "x" * 400, [0.5], recipe=EVIL, track=EVIL, group=EVIL),
        *seeds(make, "MHA", [0.5], recipe=EVIL, track=EVIL, group=EVIL),
    ]
    pages = html.render(records, claims, draw=None)
    for name, text in pages.items():
        page = Page(text)
        assert len(page.all("script")) == 1
        assert not page.all("img")
        links = [one["href"] for one in page.all("a")]
        assert not [link for link in links if ":" in link and not link.startswith("https://arxiv")]
        assert re.fullmatch(r"index\.html|mechanisms/[\w-]{1,120}\.html", name)
    # No two pages would share a file where letters have no case.
    assert len({name.lower() for name in pages}) == len(pages)
    page = Page(pages["index.html"])
    rows = [one for one in page.all("tr") if one.get("data-words", "").startswith("<script>")]
    assert any(EVIL in row["text"] for row in rows)
    (row,) = [r for r in page.all("tr", inside="t-mechanisms") if "alert" in r["text"]]
    assert row["data-words"] == "<script>alert"
    (address,) = [a["href"] for a in page.all("a", inside=row["id"])]
    assert "nothing of that name is registered here" in pages[address]


def test_a_mechanism_that_is_gone_has_a_page_with_its_records(make):
    records = [*seeds(make, "mha", [0.5]), *seeds(make, "from_a_plugin(x=1)+rope", [0.9])]
    page = index(records, draw=None)
    (line,) = page.all("tr", id="m-from_a_plugin")
    assert (line["data-kinds"], line["data-traits"]) == (GONE, "")
    (row,) = page.all("tr", id="t-mqar-g0-from_a_plugin-x-1-rope")
    assert (row["data-kinds"], row["data-traits"]) == (f"{GONE} position", "")
    links = [a["href"] for a in page.all("a", inside="t-mqar-g0-from_a_plugin-x-1-rope")]
    assert links == ["mechanisms/from_a_plugin.html", "mechanisms/rope.html"]
    own = about("from_a_plugin", records, draw=None)
    assert [row["attention"] for row in own.rows("t-records")] == ["from_a_plugin(x=1)+rope"]


def test_a_record_cannot_make_the_page_import_anything(make, tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    page = index(seeds(make, "trap:Class", [0.5]), draw=None)
    assert page.all("tr", id="m-trap-Class")


def test_every_mechanism_has_a_page_with_or_without_records(records, claims):
    pages = html.render(records, claims, draw=None)
    parsed = {name: Page(text) for name, text in pages.items()}
    for name in registry.list_names():
        entry = registry.info(name)
        page = parsed[f"mechanisms/{name}.html"]
        (line,) = parsed["index.html"].all("tr", id=f"m-{name}")
        assert line["data-kinds"] == entry.kind
        (address,) = [a["href"] for a in parsed["index.html"].all("a", inside=f"m-{name}")]
        assert address == f"mechanisms/{name}.html"
        (main,) = page.all("main")
        for text in (entry.parameters, entry.traits.cost, *entry.options):
            assert text in main["text"]
        if entry.paper and entry.paper.url:
            assert page.all("a", href=entry.paper.url)
    rope = parsed["mechanisms/rope.html"].all("section", id="definition")[0]
    assert "(a cos t w_m - b sin t w_m, a sin t w_m + b cos t w_m)" in rope["text"]
    (line,) = parsed["index.html"].all("tr", id="m-rope")
    assert "causal" in line["data-traits"].split()
    assert "equivariant" not in line["data-traits"].split()
    alibi = parsed["mechanisms/alibi.html"]
    assert "No table has a record of it." in alibi.all("section", id="records")[0]["text"]
    cog = parsed["mechanisms/cog.html"]
    assert [row["verdict"].split("the")[0] for row in cog.rows("t-claims")] == ["reproduced"]
    assert [row["table"] for row in cog.rows("t-records")] == ["bytes"]
    rows = {row["mechanism"]: row for row in parsed["index.html"].rows("t-mechanisms")}
    assert (rows["cog"]["rows"], rows["cog"]["claims"]) == ("1", "1")
    assert (rows["alibi"]["rows"], rows["alibi"]["claims"]) == ("0", "0")
    assert rows["rope"]["year"] == "2021"


def test_a_row_has_the_traits_that_all_its_parts_have(records):
    page = index(records, draw=None)
    (row,) = page.all("tr", id="t-mqar-g0-sliding_window-window-8-rope")
    both = [registry.info(name).traits for name in ("sliding_window", "rope")]
    assert row["data-kinds"] == "select position"
    held = row["data-traits"].split()
    for name in ("causal", "cross", "bias", "decode", "equivariant"):
        assert (name in held) == all(getattr(one, name) for one in both)
    assert "roformer" in row["data-words"]


def test_a_claim_has_all_that_the_ledger_says(records, claims):
    pages = html.render(records, claims, draw=None)
    (short,) = Page(pages["index.html"]).rows("t-claims")
    (row,) = Page(pages["mechanisms/cog.html"]).rows("t-claims")
    assert short["mechanism"] == "cog"
    assert short["claim"] == f"better: It is better {EVIL}."
    assert row["claim"] == f"better: It is better {EVIL}. (Table 1 <b>)"
    assert row["criterion"] == "ours.loss < base.loss"
    assert row["figures"] == "ours loss 0.1000 (1)base loss 0.4000 (1)"
    assert row["verdict"] == "reproducedthe criterion holds on 1 of 1 seeds" == short["verdict"]
    assert row["again"] == "zoo claims better"
    stale = html.render(records, [dataclasses.replace(claims[0], stale=True)], draw=None)
    for name in ("index.html", "mechanisms/cog.html"):
        assert "stale: the claim" in Page(stale[name]).rows("t-claims")[0]["verdict"]


def test_the_summary_has_places_by_track(records):
    rows = index(records, draw=None).rows("t-places-mha")
    assert [row["attention"] for row in rows][:2] == ["linear", "mha"]
    assert rows[0]["place-recall"] == "1.0 ± 0.0 (3)"
    assert (rows[0]["win"], rows[0]["loss"], rows[1]["win"]) == ("1", "0", "—")


def test_without_records_there_are_still_pages():
    pages = html.render([], draw=None)
    page = Page(pages["index.html"])
    assert "There are no records yet." in page.all("section", id="summary")[0]["text"]
    assert page.all("tr", id="m-rope")
    assert "mechanisms/rope.html" in pages


def test_measurements_and_figures_are_in_the_page(records):
    measured = json.loads((ROOT / "docs/performance/baselines.json").read_text())
    page = index(records, measured={"layers": measured}, draw=drawn)
    (section,) = page.all("section", id="efficiency")
    assert "linear" in section["text"]
    cells = page.all("td", inside="efficiency")
    assert {cell.get("class") for cell in cells} == {None, "number"}
    captions = [one["alt"] for one in page.all("img") if "svg+xml" in one["src"]]
    assert "Mean place by track" in " ".join(captions)
    assert "against training throughput" in " ".join(captions)


def test_patterns_are_drawn_where_there_are_any():
    def draw(entry):
        if entry.name == "cog":
            raise ZooError("no")
        if entry.name == "gru":
            return None
        return Pattern("Why.") if entry.name == "t5" else drawn(entry)

    pages = {name: Page(text) for name, text in html.render([], draw=draw).items()}
    for name in ("cog", "gru"):
        assert not pages[f"mechanisms/{name}.html"].all("section", id="pairs")
    (section,) = pages["mechanisms/t5.html"].all("section", id="pairs")
    assert "Why." in section["text"]
    assert not pages["mechanisms/t5.html"].all("svg")
    (svg,) = pages["mechanisms/mha.html"].all("svg")
    assert [t["text"] for t in pages["mechanisms/mha.html"].all("text")].count("query") == 1
    assert [t["text"] for t in pages["mechanisms/mha.html"].all("text")].count("key") == 1
    paths = {p.get("fill-opacity"): p["d"] for p in pages["mechanisms/mha.html"].all("path")}
    assert paths == {
        "1": "M0 0h1v1h-1zM1 1h1v1h-1z",
        "0.3": "M0 1h1v1h-1z",
        None: "M0 0h2v2h-2z",
    }
    assert "queries downwards" in svg["aria-label"]


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


def test_names_of_files_are_safe_and_never_given_twice():
    ids = Ids()
    names = [ids.file(text, ".html") for text in ("a:B", "A/b", "..", "", "a" * 300)]
    assert names[:4] == ["a-B.html", "A-b-2.html", "unnamed.html", "unnamed-2.html"]
    assert len(names[4]) < 120


@pytest.fixture
def folder(records, tmp_path, monkeypatch):
    monkeypatch.setattr(html, "render", partial(html.render, draw=None))
    for record in records:
        write(record, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("path", "first", "beside"),
    [
        ("site", "site/index.html", "site/mechanisms"),
        ("deep/site.v1/", "deep/site.v1/index.html", "deep/site.v1/mechanisms"),
        ("site/index.html", "site/index.html", "site/mechanisms"),
        ("new/page.html", "new/page.html", "new/page_mechanisms"),
    ],
)
def test_a_folder_of_records_becomes_pages(records, folder, tmp_path, path, first, beside):
    found, others, count = html.write(folder, tmp_path / path)
    assert (found, count) == (tmp_path / first, len(records))
    assert Page(found.read_text()).rows("t-mqar-g0")
    pages = {one.name for one in (tmp_path / beside).iterdir()}
    assert {f"{name}.html" for name in registry.list_names()} <= pages
    assert len(pages) == others
    before = {one: one.read_bytes() for one in (tmp_path / beside).iterdir()}
    html.write(folder, tmp_path / path)
    assert {one: one.read_bytes() for one in (tmp_path / beside).iterdir()} == before


def test_a_page_of_no_mechanism_is_named_and_left(folder, tmp_path):
    html.write(folder, tmp_path / "site")
    (tmp_path / "site" / "mechanisms" / "renamed.html").write_text("")
    with pytest.warns(RecordWarning, match=r"pages of no mechanism: renamed\.html"):
        html.write(folder, tmp_path / "site")
    assert (tmp_path / "site" / "mechanisms" / "renamed.html").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("file", "is a file, not a folder; allowed: a folder"),
        ("file/site", "is a file, not a folder"),
        ("file/page.html", "is a file, not a folder"),
        ("taken.html", "is a folder, not a page"),
        ("blocked", "is a file, not a folder"),
        ("closed", "is a folder, not a page"),
        ("page.md", "is no HTML page"),
        ("x" * 300, "name too long"),
    ],
)
def test_a_wrong_path_is_refused_before_anything_is_read(folder, tmp_path, path, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken.html").mkdir()
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "mechanisms").write_text("")
    (tmp_path / "closed" / "index.html").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ZooError, match=re.compile(message, re.I)) as caught:
        html.write(folder, tmp_path / path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ZooError, match=re.compile(message, re.I)):
        html.write(tmp_path / "nowhere", tmp_path / path)
    assert sorted(tmp_path.rglob("*")) == before


def test_without_records_to_read_nothing_is_written(tmp_path):
    with pytest.raises(ZooError, match="nowhere"):
        html.write(tmp_path / "nowhere", tmp_path / "site")
    assert list(tmp_path.iterdir()) == []


def test_pages_that_cannot_be_written_leave_the_old_ones_whole(folder, tmp_path, monkeypatch):
    html.write(folder, tmp_path / "site")
    before = {one: one.read_bytes() for one in (tmp_path / "site").rglob("*.html")}
    for one in sorted(folder.glob("*.json"))[:3]:
        one.unlink()
    real, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    for path in ("site", "new/site"):
        with pytest.raises(ZooError, match="No space left on device"):
            html.write(folder, tmp_path / path)
    assert {one: one.read_bytes() for one in (tmp_path / "site").rglob("*.*")} == before
    assert not (tmp_path / "new").exists()
