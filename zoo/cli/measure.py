"""`zoo bench` and `zoo show`: figures and pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.cli.errors import Failed
from zoo.cli.output import console, notes
from zoo.errors import ZooError


def bench(
    context: typer.Context,
    specs: Annotated[
        list[str],
        typer.Argument(
            help="SPEC or SPEC@ROUTE; 'handwritten' is plain code, 'plain' a bare --host."
        ),
    ],
    lengths: Annotated[str, typer.Option(help="Tokens N, separated by commas.")] = (
        "512,1024,2048,4096"
    ),
    dim: Annotated[int, typer.Option(help="Channels.")] = 512,
    heads: Annotated[int, typer.Option(help="Heads.")] = 8,
    batch: Annotated[int, typer.Option(help="Samples.")] = 1,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="Shape of the input: B,C,H,W for feature modules and hosts, B,N,C for slots; "
            "may be repeated."
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="timm model to put the contenders into, such as resnet18.")
    ] = None,
    slots: Annotated[int, typer.Option(help="Slots, for slots.")] = 7,
    causal: Annotated[bool, typer.Option(help="Causal or bidirectional.")] = True,
    causal_baseline: Annotated[
        bool, typer.Option("--causal-baseline", help="Only the baseline is causal.")
    ] = False,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    forward_only: Annotated[
        bool, typer.Option("--forward-only", help="Leave out forward+backward.")
    ] = False,
    core: Annotated[
        bool, typer.Option("--core", help="From q, k, v to the heads only, without projections.")
    ] = False,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="What the others are compared with; default mha, plain in a host, and else "
            "the first, or the first named @reference."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Rounds, at least.")] = 5,
    min_time: Annotated[
        float, typer.Option(help="Seconds of measurement for each length and pass, at least.")
    ] = 1.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    give_up: Annotated[
        float | None,
        typer.Option(help="Seconds of a call above which greater lengths are left out."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results; default runs/bench/NAME.")
    ] = None,
) -> None:
    """Measure time, memory and FLOPs of mechanisms, or of models with them, side by side."""
    from zoo import bench as measuring
    from zoo.bench import report as reporting

    common: dict[str, Any] = {
        "specs": specs,
        "threads": threads,
        "backward": not forward_only,
        "rounds": repeats,
        "seconds": min_time,
        "device": device,
        "dtype": dtype,
    }
    setting: measuring.Setting | measuring.ShapeSetting
    if host is not None or measuring.sort_of(specs) is not None:
        _refuse_sizes(context)
        shapes = [tuple(_numbers(text, "shape", "8,64,56,56")) for text in shape or ()]
        setting = measuring.ShapeSetting(
            shapes=shapes, host=host, slots=slots, baseline=baseline, **common
        )
    else:
        if shape:
            raise ZooError(
                f"shape={shape[0]} is for feature modules, slots and hosts; token mixers have "
                "lengths, dim, heads and batch"
            )
        setting = measuring.Setting(
            lengths=_numbers(lengths),
            dim=dim,
            heads=heads,
            batch=batch,
            causal=causal and not causal_baseline,
            causal_baseline=causal_baseline,
            core=core,
            baseline=baseline or "mha",
            give_up=give_up,
            **common,
        )
    # Plain lines: a spinner would be a second thread that takes time from what is measured.
    report = measuring.measure(setting, lambda stage: notes().print(f"measuring {stage}"))
    reporting.show(report, console())
    folder = output or Path("runs/bench") / reporting.slug(report)
    for path in reporting.save(report, folder):
        notes().print(f"wrote {path}", soft_wrap=True)
    if report.failed:
        raise Failed(f"no figures for {', '.join(map(repr, report.failed))}; the table says why")


# Options that say how large token mixers are, and nothing to others.
_SIZES = ("lengths", "dim", "heads", "batch", "causal", "causal_baseline", "core", "give_up")


def _refuse_sizes(context: typer.Context) -> None:
    """Refuse options that would say nothing."""
    for name in _SIZES:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ZooError(
                f"--{name.replace('_', '-')} is for token mixers; feature modules, slots and "
                "hosts take --shape"
            )


def _numbers(text: str, name: str = "lengths", example: str = "512,1024") -> list[int]:
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise ZooError(
            f"{name}={text!r} must be whole numbers separated by commas, e.g. {example}"
        ) from None


def show(
    spec: Annotated[
        str | None, typer.Argument(help="Specification; left out when a run is shown.")
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Show a trained run: its folder, or its id.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Show the untrained model of a recipe.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
    output: Annotated[
        Path | None, typer.Option(help="Picture; default runs/show/NAME.png.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens shown; default 32, or the whole example.")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Heads of a single host, default 4.")] = None,
    dim: Annotated[int | None, typer.Option(help="Channels of a single host, default 64.")] = None,
    causal: Annotated[
        bool | None, typer.Option(help="Whether a single host is causal; default it is not.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of an untrained host's weights and input.")] = 0,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change of the recipe, such as model=resnet.")
    ] = None,
) -> None:
    """Draw attention maps, gates, slots or restored images of a mechanism, recipe or run."""
    from zoo.pictures import show as drawing

    name = re.sub(r"[^A-Za-z0-9_.=-]+", "-", Path(run).name if run else spec or str(recipe))
    path = output or Path("runs/show") / f"{name.strip('-')[:120]}.png"
    if run is None and recipe is None:
        if spec is None:
            raise ZooError("nothing to show; give a specification, --run or --recipe")
        if changes:
            raise ZooError(f"--set {changes[0]}: changes belong to --recipe")
        paths = [_show_single(spec, path, length, heads, dim, causal, seed)]
    else:
        if run is not None and recipe is not None:
            raise ZooError("--run and --recipe are two models; give one of them")
        for option, value in (("heads", heads), ("dim", dim), ("causal", causal)):
            if value is not None:
                raise ZooError(f"--{option} belongs to a single host; a run or recipe sets its own")
        from zoo.cli.models import attention_maps, opened, saved_pictures

        found, title = opened(spec, run, recipe, runs, seed, changes or [])
        paths = [] if length is not None else saved_pictures(found, path)
        if not paths:
            maps, tokens = attention_maps(found, length)
            figure = drawing.draw(maps, title=f"{title}, first validation example", tokens=tokens)
            paths = [drawing.save_figure(figure, path)]
    for path in paths:
        notes().print(f"wrote {path}", soft_wrap=True)


def _show_single(
    spec: str,
    path: Path,
    length: int | None,
    heads: int | None,
    dim: int | None,
    causal: bool | None,
    seed: int,
) -> Path:
    """Draw one untrained mechanism."""
    from zoo.host.spec import parse
    from zoo.pictures import show as drawing

    kind = parse(spec)[0].entry.kind
    if kind in ("feature", "slots"):
        from zoo.pictures.figures import module_figure

        for option, value in (("heads", heads), ("length", length), ("causal", causal)):
            if value is not None:
                raise ZooError(f"--{option} belongs to token mixers; {spec!r} is of kind {kind!r}")
        figure = module_figure(spec, channels=64 if dim is None else dim, seed=seed)
        return drawing.save_figure(figure, path)
    maps = drawing.host_maps(
        spec,
        dim=64 if dim is None else dim,
        heads=4 if heads is None else heads,
        length=32 if length is None else length,
        causal=bool(causal),
        seed=seed,
    )
    title = f"{spec}, untrained, random input{', causal' if causal else ''}"
    return drawing.save_figure(drawing.draw(maps, title=title), path)
