"""Versions of what the library stands on, held against what its metadata asks for."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion

import zoo
from zoo.doctor.lines import Line, note, ok, problem, reason

DISTRIBUTION = "attention-zoo"
EXTRAS = {
    "hf": "the transformers library",
    "ray": "sweeps on a Ray cluster",
    "dev": "tests, linters and the build",
}


def versions() -> Iterator[Line]:
    """Say which Python, zoo and libraries there are, and whether they are new enough."""
    python = platform.python_version()
    try:
        installed = metadata.version(DISTRIBUTION)
        wanted = (metadata.metadata(DISTRIBUTION).get_all("Requires-Python") or [""])[0]
    except metadata.PackageNotFoundError:
        yield _python(python, "")
        yield note(
            "zoo",
            f"zoo {zoo.__version__} is not installed but run from its folder, so it is not known "
            "which versions it wants",
            "install it: pip install -e .",
            version=zoo.__version__,
        )
        return
    yield _python(python, wanted)
    yield _zoo(installed)
    for requirement in _requirements():
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement)


def extras() -> Iterator[Line]:
    """Say which optional extras are there, and how to install the others."""
    for extra, use in _extras():
        wanted = [
            requirement
            for requirement in _requirements()
            if requirement.marker is not None
            and requirement.marker.evaluate({"extra": extra})
            and not requirement.marker.evaluate({"extra": ""})
        ]
        lines = [_package(requirement, load=False) for requirement in wanted]
        bad = [line for line in lines if line.level == "problem"]
        lacking = [
            f"'{one.name}{one.specifier}'"
            for one, line in zip(wanted, lines, strict=True)
            if line.level == "problem"
        ]
        facts = {line.name: line.facts for line in lines}
        if bad:
            text = f"{extra} ({use}) is not complete: {'; '.join(line.text for line in bad)}"
            yield note(extra, text, " ".join(["pip install", *lacking]), packages=facts)
        else:
            listed = ", ".join(line.text for line in lines)
            yield ok(extra, f"{extra} ({use}): {listed}", packages=facts)


def _extras() -> list[tuple[str, str]]:
    try:
        named = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        named = []
    return [(name, EXTRAS.get(name, "optional")) for name in named]


def _requirements() -> list[Requirement]:
    """Return what the metadata asks for; a line that cannot be read asks for nothing."""
    found = []
    try:
        texts = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        texts = []
    for text in texts:
        try:
            found.append(Requirement(text))
        except InvalidRequirement:
            continue
    return found


def _python(version: str, wanted: str) -> Line:
    if _holds(version, wanted) is False:
        text = f"python {version} is outside {wanted}"
        return problem("python", text, f"use a Python {wanted}", version=version, wanted=wanted)
    return ok("python", _shown("python", version, wanted), version=version, wanted=wanted)


def _zoo(installed: str) -> Line:
    if installed != zoo.__version__:
        return note(
            "zoo",
            f"zoo is {zoo.__version__}, but its metadata says {installed}",
            "install it again: pip install -e .",
            version=zoo.__version__,
        )
    return ok("zoo", f"zoo {zoo.__version__}", version=zoo.__version__)


def _package(requirement: Requirement, load: bool = True) -> Line:
    """Say whether one package is there, is new enough and, if it is to be loaded, can be."""
    name, wanted = requirement.name, str(requirement.specifier)
    module = _module(name)
    install = f"pip install '{name}{wanted}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = None
    facts = {"version": version, "wanted": wanted}
    if version is None and not _there(module):
        return problem(name, f"{name} is not installed", install, **facts)
    if load:
        try:
            imported = importlib.import_module(module)
        except Exception as error:  # a library that is broken can raise anything
            text = f"{name} {version or ''} cannot be imported: {reason(error)}"
            return problem(name, text, f"install it again: {install}", **facts)
        if version is None:
            version = getattr(imported, "__version__", None)
    facts["version"] = version
    if version is None or _holds(version, wanted) is None:
        text = f"{name} is there, but its version ({version or 'no metadata'}) cannot be judged"
        return note(name, text, f"install it again: {install}", **facts)
    if not _holds(version, wanted):
        return problem(name, f"{name} {version} is outside {wanted}", install, **facts)
    return ok(name, _shown(name, version, wanted), **facts)


def _module(name: str) -> str:
    """Return what to import of a package, which need not be called what one installs."""
    plain = canonicalize_name(name).replace("-", "_")
    found = [
        module
        for module, owners in metadata.packages_distributions().items()
        if canonicalize_name(name) in map(canonicalize_name, owners)
    ]
    if plain in found or not found:
        return plain
    public = sorted(module for module in found if not module.startswith("_"))
    return public[0] if public else found[0]


def _there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _holds(version: str, wanted: str) -> bool | None:
    """Whether a version is a wanted one; None if that cannot be told."""
    try:
        # A version before a release is what its user has chosen.
        return SpecifierSet(wanted).contains(version, prereleases=True)
    except (InvalidVersion, InvalidSpecifier):
        return None


def _shown(name: str, version: str, wanted: str) -> str:
    return f"{name} {version} ({wanted})" if wanted else f"{name} {version}"
