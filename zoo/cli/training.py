"""`zoo run`, `sweep`, `leaderboard` and `sample`: from a recipe to a table and to text."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zoo.cli.errors import Failed
from zoo.cli.output import console, notes
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.runs.records import Record

Records = Annotated[Path, typer.Option(help="Folder of the records.")]
Runs = Annotated[Path, typer.Option(help="Folder of the run folders.")]


def run(
    recipe: Annotated[
        str | None, typer.Argument(help="Name or YAML file; 'zoo list --recipes' names them.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes such as attention=linear seed=1 lr=1e-3 model.dim=128."),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="Go on with a run: its folder, or its id.")
    ] = None,
    records: Records = Path("runs/records"),
    runs: Runs = Path("runs"),
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
    resume_if_possible: Annotated[
        bool, typer.Option("--resume-if-possible", help="Go on where the same run was left.")
    ] = False,
) -> None:
    """Train one model by a recipe and write its record."""
    from zoo.runs import config, train, training

    work: Callable[..., Record]

    if resume is not None:
        folder = _resumable(resume, runs, recipe, overrides or [])
        work = partial(train.resume, folder)
    elif recipe is None:
        raise ZooError("nothing to run; give a recipe or --resume RUN")
    else:
        if not overrides:
            from zoo.claims import recipes

            recipes.load(recipe)  # of a recipe as it stands, the claim has to hold water too
        folder = runs / config.run_id(recipe, overrides or [])
        work = partial(
            train.run,
            recipe,
            overrides or [],
            runs=runs,
            resume_if_possible=resume_if_possible,
        )
    begun = datetime.now(UTC)
    try:
        record = work(records=records, quiet=quiet, progress=not quiet)
    except ZooError:
        raise
    except KeyboardInterrupt:
        notes().print(f"go on with: zoo run --resume {folder}", soft_wrap=True)
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise Failed(f"the run failed: {type(error).__name__}: {text}") from error
    if not quiet and training.is_main():
        before = "done before: " if datetime.fromisoformat(record.created) < begun else ""
        console().print(before + _line(record), markup=False, soft_wrap=True)


def _resumable(name: str, runs: Path, recipe: str | None, overrides: list[str]) -> Path:
    """Folder of a run to go on with, which must be what the recipe says if there is one."""
    from zoo.cli.models import run_folder
    from zoo.runs import build, config

    folder = run_folder(name, runs)
    if recipe is not None:
        held = config.identify(build.read_config(folder))
        if config.identify(config.load(recipe, overrides)) != held:
            raise ZooError(
                f"the run {held.id!r} is not what the recipe {recipe!r} with these overrides "
                "gives; --resume RUN alone goes on with it as it is"
            )
    return folder


def _line(record: Record) -> str:
    """What came out, in one line."""
    if record.status != "finished":
        return f"{record.id}: {record.status} after {record.steps} steps: {record.error or ''}"
    first = (record.metric["select"], record.metric["report"])
    keys = [*first, *sorted(key for key in record.metrics if key not in first)]
    figures = ", ".join(f"{key} {record.metrics[key]:.4g}" for key in keys)
    return f"{record.id}: {figures} after {record.steps} steps"


def sweep(
    recipe: Annotated[
        str, typer.Argument(help="Name or YAML file; 'leaderboard' is every recipe of its tracks.")
    ],
    grid: Annotated[
        list[str] | None,
        typer.Argument(
            help="Axes such as attention=mha,linear seeds=3 lr=1e-3,3e-3; of the leaderboard what "
            "to keep to, such as track=recall,state recipe=mqar attention=moba,cog seeds=3."
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(help="Runs at once; default 1, or as many as there is room for with --ray."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Run on Ray: HOST:PORT, ray://HOST:PORT or auto for a cluster; without an address "
            "on an instance on this machine.",
        ),
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option(help="Folder of the records; default runs/records, data/runs of the board."),
    ] = None,
    runs: Runs = Path("runs"),
    minutes: Annotated[
        float | None, typer.Option(help="Time allowed to a run; one that takes more has failed.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Train every cell of a grid, or all of the leaderboard, that has no record yet."""
    from zoo.cli.cluster import spawner

    if recipe != "leaderboard" and not grid:
        raise ZooError("nothing to vary; give axes such as attention=mha,linear seeds=3")
    with spawner(ray, jobs) as (ours, count):  # first, so that a wrong address is soon told
        if recipe == "leaderboard":
            from zoo.leaderboard.tournament import plan, tournament

            result = tournament(
                plan(grid or []),
                jobs=count,
                records=records or Path("data/runs"),
                runs=runs,
                minutes=minutes,
                spawner=ours,
                progress=not quiet,
            )
        else:
            from zoo.runs import config
            from zoo.sweeps.grid import cells, parse_grid
            from zoo.sweeps.sweep import sweep_cells

            result = sweep_cells(
                [(recipe, cell) for cell in cells(parse_grid(grid or []))],
                jobs=count,
                records=records or Path("runs/records"),
                runs=runs,
                spawner=ours,
                identify=config.run_id,
                minutes=minutes,
                title=None if quiet else recipe,
            )
    console().print(result.report(), markup=False, soft_wrap=True)
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def leaderboard(
    page: Annotated[
        Path | None,
        typer.Argument(
            help="Where HTML pages go, with --html: a folder, or a file that ends in .html and has "
            "the pages of mechanisms in a folder beside it; default leaderboard.html."
        ),
    ] = None,
    records: Records = Path("data/runs"),
    output: Annotated[Path | None, typer.Option(help="The page; default leaderboard.md.")] = None,
    figures: Annotated[
        bool,
        typer.Option(
            "--figures", help="Make the folder of figures beside the records; it is kept up after."
        ),
    ] = False,
    show: Annotated[
        bool, typer.Option("--print", help="Print the page; it is written only with --output.")
    ] = False,
    html: Annotated[
        bool,
        typer.Option(
            "--html", help="Write HTML pages that need no network instead, one for each mechanism."
        ),
    ] = False,
) -> None:
    """Make the leaderboard from the records alone."""
    from zoo.leaderboard.page import markdown_page as board

    if page is not None and not html:
        raise ZooError(f"page={str(page)!r} belongs to --html; --output names the Markdown page")
    if html:
        from zoo.leaderboard.page import html as pages

        path, others, count = pages.write(records, page or Path("leaderboard.html"))
        notes().print(
            f"wrote {path} and {others} pages beside it from {count} records", soft_wrap=True
        )
    if show:
        typer.echo(board.page(records)[0], nl=False)
    if output is not None or not (show or html):
        path, count = board.write(records, output or Path("leaderboard.md"), figures=figures)
        notes().print(f"wrote {path} from {count} records", soft_wrap=True)


def sample(
    run: Annotated[str, typer.Argument(help="Folder or id of a run of a language recipe.")],
    prompt: Annotated[str, typer.Option(help="Beginning of the text.")],
    tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among so many tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among tokens of together this probability.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    runs: Runs = Path("runs"),
) -> None:
    """Let a trained language model continue a prompt."""
    from zoo.cli.models import continuation, run_folder

    text = continuation(
        run_folder(run, runs),
        prompt,
        tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    typer.echo(text)
