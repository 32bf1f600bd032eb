"""The HTML pages in a browser: sorting, filters and links, by address, by click and by key."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_html import Page, drawn

from zoo.leaderboard.page import html

ROOT = Path(__file__).parents[3]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
TABLE = "t-mqar-g0"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pages(make):
    figures = {
        "mha": (0.5, 0.5, 0.6),
        "linear": (0.9, 0.8, 0.9),
        "no_mixing": (0.1, 0.1, 0.2),
        "mha+rope": (1.0, 1.0, 0.9),
        "gone_plugin": (0.05, 0.06, 0.07),
    }
    records = [
        make(attention=name, seed=seed, report=figure, parameters=10_000 + len(name))
        for name, row in figures.items()
        for seed, figure in enumerate(row)
    ]
    records.append(make(attention="cog", status="nan"))
    return html.render(records, draw=drawn)


@pytest.fixture(scope="module")
def opened(pages, tmp_path_factory):
    """Opens a page at an address, after doing something there, and returns what has become."""
    command = next(filter(None, map(shutil.which, BROWSERS)), None)
    if command is None:
        pytest.skip(f"no browser on the PATH: none of {', '.join(BROWSERS)}")

    def run(address="", doing="", script=None, *, name="index.html", site=pages, size=(1400, 900)):
        folder = tmp_path_factory.mktemp("page")
        for other, text in site.items():
            (folder / other).parent.mkdir(exist_ok=True)
            (folder / other).write_text(text, encoding="utf-8")
        content = site[name]
        if doing:
            # The page refuses every script but its own, so this copy does without that rule.
            content = re.sub(r"<meta http-equiv=[^>]*>", "", content)
            content = content.replace(
                "</body>",
                f"<script>{doing}\ndocument.documentElement.dataset.hash = location.hash;"
                "</script></body>",
            )
        if script:
            content = content.replace("</body>", f"<script>{script}</script></body>")
        path = folder / name
        path.write_text(content, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
        options += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000"]
        options += [f"--window-size={size[0]},{size[1]}"]
        done = subprocess.run(
            [command, *options, "--dump-dom", f"{path.as_uri()}{address}"],
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return Page(done.stdout), [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return run


def specs(page):
    """Visible rows of the table of the recipe, in their order."""
    found = []
    for row in page.all("tr", inside=TABLE):
        if row["around"][-1]["tag"] == "tbody" and "hidden" not in row:
            cells = [c for c in page.all("td", inside=TABLE) if c["around"][-1] is row]
            found.append(cells[1]["text"].split()[0])
    return found


def summarised(page):
    """Visible rows of the first table, the summary."""
    rows = [row for row in page.all("tr", inside="t-places-mha") if "data-kinds" in row]
    return [row for row in rows if "hidden" not in row]


def sorted_by(page):
    heads = page.all("th", inside=TABLE)
    return {one["data-key"]: one["aria-sort"] for one in heads if one["aria-sort"] != "none"}


def click(key, times=1):
    return f"""for (let i = 0; i < {times}; i++)
        document.querySelector('#{TABLE} th[data-key="{key}"] button').click();"""


RANKED = ["mha+rope", "linear", "mha", "no_mixing", "gone_plugin", "cog"]


def test_the_page_opens_without_a_word_on_the_console(opened):
    page, console = opened()
    assert console == []
    assert specs(page) == RANKED
    assert sorted_by(page) == {"place": "ascending"}
    assert "hidden" not in page.all("form", id="controls")[0]
    count = page.all("output", id="count")[0]["text"]
    rows, mechanisms = (tuple(map(int, pair)) for pair in re.findall(r"(\d+) of (\d+)", count))
    assert rows[0] == rows[1] > 5
    assert mechanisms[0] == mechanisms[1] > 30


def test_an_error_would_be_seen_on_the_console(opened):
    _, console = opened(doing="setTimeout(() => missing(), 0);")
    assert "missing is not defined" in " ".join(console)


def test_a_script_that_is_not_the_pages_own_does_not_run(opened):
    page, console = opened(script="document.title = 'taken over'")
    assert page.all("title")[0]["text"] == "Attention zoo: leaderboard"
    assert "Content Security Policy" in " ".join(console)


@pytest.mark.parametrize(
    ("address", "wanted", "aria"),
    [
        ("mean:up", ["gone_plugin", "no_mixing", "mha", "linear", "mha+rope", "cog"], "ascending"),
        ("mean:down", RANKED, "descending"),
        ("parameters:up", ["mha", "linear", "mha+rope", "no_mixing", "gone_plugin"], "ascending"),
        ("attention:down", ["no_mixing", "mha+rope", "mha", "linear", "gone_plugin"], "descending"),
    ],
)
def test_the_address_sorts(opened, address, wanted, aria):
    page, console = opened(f"#sort={TABLE}:{address}")
    assert console == []
    assert [name for name in specs(page) if name != "cog"] == [n for n in wanted if n != "cog"]
    assert sorted_by(page) == {address.split(":")[0]: aria}
    if address.startswith("mean"):
        assert specs(page)[-1] == "cog"


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("#kind=position", ["mha+rope"]),
        ("#kind=mixer", ["no_mixing"]),
        ("#kind=unregistered", ["gone_plugin"]),
        ("#kind=slots", []),
        ("#q=rope", ["mha+rope"]),
        ("#q=mha+rope", ["mha+rope"]),
        ("#q=ROFORMER%20mha", ["mha+rope"]),
        ("#trait=weights", ["mha+rope", "linear", "mha", "cog"]),
        ("#trait=no-weights", ["no_mixing", "gone_plugin"]),
        ("#trait=weights,no-equivariant", ["mha+rope"]),
        ("#trait=weights&kind=project&q=rope", ["mha+rope"]),
        ("#trait=nonsense&kind=&q=%E0%A4%A&x=1", []),
        ("#kind=mixer&at=t-mqar-g0-linear", ["linear", "no_mixing"]),
    ],
)
def test_the_address_filters(opened, address, wanted):
    page, console = opened(address)
    assert console == []
    assert specs(page) == wanted
    empty = next(one for one in page.all("p") if one.get("class") == "nothing")
    assert ("hidden" in empty) == bool(summarised(page))


def test_a_filter_hides_mechanisms_too(opened):
    page, _ = opened("#kind=position")
    lines = [row for row in page.all("tr", inside="t-mechanisms") if "data-kinds" in row]
    shown = [row["id"] for row in lines if "hidden" not in row]
    assert "m-rope" in shown
    assert "m-mha" not in shown
    count = page.all("output", id="count")[0]["text"]
    assert count.endswith(f"{len(shown)} of {len(lines)} mechanisms")


def test_a_click_on_a_heading_sorts_and_says_so_in_the_address(opened):
    page, console = opened(doing=click("mean", 2))
    assert console == []
    assert specs(page)[0] == "gone_plugin"
    assert sorted_by(page) == {"mean": "ascending"}
    assert page.all("html")[0]["data-hash"] == f"#sort={TABLE}:mean:up"


def test_the_first_click_puts_the_best_on_top(opened):
    page, _ = opened(doing=click("mean"))
    assert specs(page)[0] == "mha+rope"
    assert sorted_by(page) == {"mean": "descending"}


def test_headings_are_buttons_that_the_keyboard_reaches(opened):
    page, _ = opened(
        doing=f"""const button = document.querySelector('#{TABLE} th[data-key="mean"] button');
        button.focus();
        document.title = document.activeElement === button && button.tabIndex === 0 ? 'yes' : 'no';
        """
    )
    assert page.all("title")[0]["text"] == "yes"


def test_controls_filter_and_reset(opened):
    page, console = opened(
        doing="""document.querySelector('[data-trait="weights"]').click();
        const kind = document.getElementById('kind');
        kind.value = 'position'; kind.dispatchEvent(new Event('change'));
        const query = document.getElementById('query');
        query.value = 'a+b &c'; query.dispatchEvent(new Event('input'));"""
    )
    assert console == []
    assert page.all("html")[0]["data-hash"] == "#kind=position&trait=weights&q=a%2Bb%20%26c"
    assert specs(page) == []
    page, _ = opened("#kind=position&q=rope", "document.getElementById('reset').click();")
    assert specs(page) == RANKED
    assert page.all("html")[0]["data-hash"] in ("", "#")


def test_a_trait_is_asked_for_then_refused_then_let_go(opened):
    button = """document.querySelector('[data-trait="weights"]').click();"""
    page, _ = opened(doing=button * 2)
    assert specs(page) == ["no_mixing", "gone_plugin"]
    assert page.all("button", **{"data-trait": "weights"})[0]["aria-pressed"] == "mixed"
    assert specs(opened(doing=button * 3)[0]) == RANKED


def test_a_link_keeps_the_view_and_shows_what_the_filter_hides(opened):
    page, console = opened(
        f"#kind=mixer&sort={TABLE}:mean:up",
        """const link = document.querySelector('nav a[href="#mechanisms"]');
        link.setAttribute('href', '#m-rope');
        link.click();""",
    )
    assert console == []
    (line,) = page.all("tr", id="m-rope")
    assert "hidden" not in line
    assert line["class"] == "chosen"
    assert page.all("html")[0]["data-hash"] == f"#kind=mixer&sort={TABLE}:mean:up&at=m-rope"


def test_a_plain_anchor_works(opened):
    page, console = opened("#m-rope")
    assert console == []
    assert page.all("tr", id="m-rope")[0]["class"] == "chosen"
    assert specs(page) == RANKED


# What is at the top of the window, below the bar if that stays there.
WHERE = """setTimeout(() => {
    const top = (id) => Math.round(document.getElementById(id).getBoundingClientRect().top);
    const bar = document.getElementById('controls').getBoundingClientRect();
    const last = innerHeight + scrollY >= document.documentElement.scrollHeight - 2;
    document.title = [top('%s'), Math.round(bar.bottom), bar.height, last].join(' ');
}, 500);"""


@pytest.mark.parametrize("anchor", ["track-recall", f"{TABLE}-linear", "summary"])
@pytest.mark.parametrize("width", [1400, 760, 520])
def test_the_bar_hides_nothing_that_an_address_points_to(opened, anchor, width):
    page, console = opened(f"#{anchor}", WHERE % anchor, size=(width, 400))
    assert console == []
    top, bottom, _, last = page.all("title")[0]["text"].split()
    assert last == "false"
    assert max(0, int(bottom)) <= int(top) < max(0, int(bottom)) + 40


def test_the_bar_takes_two_lines_in_a_narrow_window(opened):
    heights = [
        float(opened("", WHERE % "summary", size=(w, 400))[0].all("title")[0]["text"].split()[2])
        for w in (1400, 760)
    ]
    assert heights[1] > 1.4 * heights[0]


def test_the_page_of_a_mechanism_opens_and_sorts(opened):
    options = {"name": "mechanisms/mha.html"}
    page, console = opened("#records", **options)
    assert console == []
    order = [row["attention"] for row in page.rows("t-records")]
    assert sorted(order) == ["mha", "mha+rope"]
    page, console = opened("#sort=t-records:figure:down", **options)
    assert console == []
    assert [row["attention"] for row in page.rows("t-records")] == ["mha+rope", "mha"]
    page, _ = opened("#sort=t-records:figure:up", **options)
    assert [row["attention"] for row in page.rows("t-records")] == ["mha", "mha+rope"]


def test_a_click_leads_to_a_mechanism_and_back_to_a_row(opened):
    script = """document.querySelector('%s').click();"""
    page, console = opened("", script % 'td a[href="mechanisms/rope.html"]')
    assert console == []
    assert page.all("title")[0]["text"] == "rope: Attention zoo"
    page, console = opened("", script % "#records td a", name="mechanisms/rope.html")
    assert console == []
    assert page.all("title")[0]["text"] == "Attention zoo: leaderboard"
    (row,) = page.all("tr", id=f"{TABLE}-mha-rope")
    assert row["class"] == "chosen"


def test_no_published_page_is_endless_or_wider_than_a_window(opened):
    published, _ = html.pages(ROOT / "data" / "runs")
    size = """const root = document.documentElement;
        document.title = [root.scrollHeight, root.scrollWidth - innerWidth].join(' ');"""
    for width, most in ((1400, 30_000), (500, 42_000)):
        for name in ("index.html", *(f"mechanisms/{n}.html" for n in ("mha", "landmark", "mesh"))):
            page, console = opened("", size, name=name, site=published, size=(width, 900))
            assert console == []
            height, over = map(int, page.all("title")[0]["text"].split())
            assert 500 < height < (most if name == "index.html" else 6000), (name, width)
            assert over <= 0, (name, width)
