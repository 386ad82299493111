"""Figures of matplotlib, which is optional: made without a display, and written to a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainonce.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of so many inches.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "drawing needs matplotlib, which is not installed",
            hint="pip install 'trainonce[plot]', or use --json",
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path, *, dpi: int) -> None:
    """Write `figure` to a .png, .svg or .pdf file.

    Raises:
        ConfigError: The file cannot be written.
    """
    try:
        figure.savefig(path, dpi=dpi)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot write the plot to {path}: {error}", hint="a .png, .svg or .pdf file"
        ) from error
