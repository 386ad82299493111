"""Results as pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainonce.pictures import new_figure, save_figure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from trainonce.simulate.study import Result, SpareStudy

# Marker and dash tell policies apart without colour.
_MARKERS = "osD^vPX*"
_DASHES = ("-", "--", "-.", ":")


def plot_sweep(results: Sequence[Result], path: Path) -> None:
    """Draw ETTR and yearly cost over the number of GPUs, a line for each policy.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    figure, (left, right) = _panels(2)
    names = list(dict.fromkeys(r.policy.name for r in results))
    for i, name in enumerate(names):
        rows = [r for r in results if r.policy.name == name]
        sizes = [r.num_gpus for r in rows]
        style: dict[str, Any] = {
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": _DASHES[i % len(_DASHES)],
            "markersize": 5,
            "capsize": 2,
            "label": name,
        }
        left.errorbar(sizes, [r.ettr.mean for r in rows], yerr=[r.ettr.half for r in rows], **style)
        right.errorbar(
            sizes,
            [r.total_usd.mean for r in rows],
            yerr=[r.total_usd.half for r in rows],
            **style,
        )
    sizes = sorted({r.num_gpus for r in results})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{n:,}" for n in sizes], rotation=45)
        axes.set_xlabel("GPUs of the job")
        axes.grid(visible=True, alpha=0.3)
    left.set_ylabel("effective training time ratio")
    left.set_ylim(top=1.0)
    left.legend(frameon=False, fontsize=8)
    right.set_yscale("log")
    right.yaxis.set_major_formatter(_tick)
    right.set_ylabel("wasted GPU time and spares, a year")
    save_figure(figure, path, dpi=130)


def plot_spares(studies: Sequence[SpareStudy], path: Path) -> None:
    """Draw the yearly cost over the number of idle spares, a panel for each policy.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    figure, panels = _panels(len(studies))
    for axes, study in zip(panels, studies, strict=True):
        spares = [r.spares for r in study.results]
        for name, marker, dash, values in (
            ("wasted GPU time", "o", ":", [r.wasted_usd for r in study.results]),
            ("holding spares", "^", "--", [r.spares_usd for r in study.results]),
            ("together", "s", "-", [r.total_usd for r in study.results]),
        ):
            axes.errorbar(
                spares,
                [v.mean for v in values],
                yerr=[v.half for v in values],
                label=name,
                marker=marker,
                linestyle=dash,
                markersize=4,
                capsize=2,
            )
        axes.axvline(study.best.spares, color="0.6", linewidth=1)
        axes.annotate(
            f"{study.best.spares} spares",
            (study.best.spares, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -12),
            textcoords="offset points",
            fontsize=8,
        )
        axes.set_title(f"{study.best.policy.name}, {study.best.num_gpus:,} GPUs", fontsize=9)
        axes.set_xlabel("idle spare nodes")
        axes.set_yscale("log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.set_major_formatter(_tick)
        axes.yaxis.set_minor_formatter("")
        axes.grid(visible=True, alpha=0.3)
    panels[0].set_ylabel("cost of failures, a year")
    panels[0].legend(frameon=False, fontsize=8)
    save_figure(figure, path, dpi=130)


def _tick(usd: float, _: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if usd >= size:
            return f"${usd / size:g}{letter}"
    return f"${usd:g}"


def _panels(count: int) -> tuple[Any, list[Any]]:
    figure = new_figure(5.2 * count, 4.2)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])
