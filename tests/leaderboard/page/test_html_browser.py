"""The HTML page in a browser: sorting, filters and links, by address, by click and by key."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from test_html import Page, drawn

from zoo.leaderboard.page import html

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
TABLE = "t-mqar-g0"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def text(make):
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
def opened(text, tmp_path_factory):
    """Opens the page at an address, after doing something there, and returns what has become."""
    command = next(filter(None, map(shutil.which, BROWSERS)), None)
    if command is None:
        pytest.skip(f"no browser on the PATH: none of {', '.join(BROWSERS)}")

    def run(address="", doing="", script=None):
        folder = tmp_path_factory.mktemp("page")
        content = text
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
        path = folder / "page.html"
        path.write_text(content, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
        options += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000"]
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


def test_a_filter_hides_sections_too(opened):
    page, _ = opened("#kind=position")
    shown = [one["id"] for one in page.all("article") if "hidden" not in one]
    assert "m-rope" in shown
    assert "m-mha" not in shown
    chips = [one["href"] for one in page.all("a") if "data-kinds" in one and "hidden" not in one]
    assert sorted(chips) == sorted(f"#{name}" for name in shown)


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
        """document.querySelector('td a[href="#m-rope"]').click();""",
    )
    assert console == []
    (section,) = page.all("article", id="m-rope")
    assert "hidden" not in section
    assert section["class"] == "chosen"
    assert page.all("html")[0]["data-hash"] == f"#kind=mixer&sort={TABLE}:mean:up&at=m-rope"


def test_a_plain_anchor_works(opened):
    page, console = opened("#m-rope")
    assert console == []
    assert page.all("article", id="m-rope")[0]["class"] == "chosen"
    assert specs(page) == RANKED
