"""Where code comes from: the standard library, an installed package, or the user's project.

Library code counts by its version, project code by its content. What lies outside the
interpreter's package folders is project code, so an editable install is, too.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import site
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Origin:
    """Where a module comes from.

    Args:
        kind: "stdlib", "package" or "project".
        package: The top-level name.
        version: Of the distribution; empty for the standard library and the project.
    """

    kind: str
    package: str
    version: str = ""

    @property
    def is_project(self) -> bool:
        """Whether edits of it must be looked for."""
        return self.kind == "project"


def module_name(name: str) -> str:
    """Return the name that a module has in every process.

    The script is `__mp_main__` in the children that `multiprocessing` spawns.
    """
    return "__main__" if name == "__mp_main__" else name


@functools.lru_cache(maxsize=4096)
def origin_of(name: str) -> Origin:
    """Return where a module comes from, without importing it."""
    top = name.partition(".")[0]
    if top == "trainonce":
        from trainonce import __version__

        return Origin("package", top, __version__)
    if module_name(top) == "__main__":
        return Origin("project", top)
    if top in sys.stdlib_module_names:
        return Origin("stdlib", top)
    return _package(top)


@functools.lru_cache(maxsize=1024)
def _package(top: str) -> Origin:
    locations = _locations(top)
    if locations and not any(_is_library(path) for path in locations):
        return Origin("project", top)
    if not locations:
        # Made at run time, or gone: what it holds is fingerprinted like the project's own code.
        return Origin("project", top)
    version = _version(top)
    # An installed module without a version: its content has to stand for it.
    return Origin("package", top, version) if version else Origin("project", top)


def _locations(top: str) -> list[Path]:
    module = sys.modules.get(top)
    spec = getattr(module, "__spec__", None)
    if spec is None and module is None:
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            spec = None
    found = [getattr(spec, "origin", None), getattr(module, "__file__", None)]
    found += list(getattr(spec, "submodule_search_locations", None) or [])
    return [Path(p).resolve() for p in found if p and p not in ("built-in", "frozen", "namespace")]


def is_library_file(path: str | Path) -> bool:
    """Tell whether a file belongs to the interpreter or an installed package."""
    return _is_library(Path(path).resolve())


def _is_library(path: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in _library_folders())


@functools.cache
def _library_folders() -> tuple[Path, ...]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    folders = [sysconfig.get_path(name) for name in names]
    folders += [*site.getsitepackages(), site.getusersitepackages()]
    return tuple({Path(folder).resolve() for folder in folders if folder})


def _version(top: str) -> str:
    # Not the module's own `__version__` first: whether it is imported yet must not matter.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(top)
    for name in _distributions().get(top, []):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    version = getattr(sys.modules.get(top), "__version__", None)
    return str(version) if version is not None else ""


@functools.cache
def _distributions() -> dict[str, list[str]]:
    return {
        name: list(found) for name, found in importlib.metadata.packages_distributions().items()
    }
