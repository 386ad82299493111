"""Results as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainonce.simulate.study import Estimate, Result, SpareStudy


def money(usd: float) -> str:
    """Return an amount as people say it: $5.97M, $83k, $12."""
    if abs(usd) >= 999_500:
        return f"${usd / 1e6:.2f}M" if abs(usd) < 99.5e6 else f"${usd / 1e6:.0f}M"
    return f"${usd / 1e3:.0f}k" if abs(usd) >= 1e3 else f"${usd:.0f}"


def _plus_minus(estimate: Estimate) -> str:
    return f"{money(estimate.mean)} ±{money(estimate.half)}"


def lay_out(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines: list[str] = []
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def comparison_table(results: Sequence[Result]) -> str:
    """Return a row for each policy: what it wastes in a year, and where the time went."""
    head = (
        "policy", "ETTR", "wasted a year", "spares", "held a year", "total", "no rollback",
        "lost h", "saving h", "unnoticed h", "waiting h", "recovering h", "degraded h",
    )  # fmt: skip
    rows = [
        (
            r.policy.name,
            f"{r.ettr.mean:.4f} ±{r.ettr.half:.4f}",
            _plus_minus(r.wasted_usd),
            str(r.spares) if r.policy.spare_source == "idle" else "borrowed",
            money(r.spares_usd.mean),
            money(r.total_usd.mean),
            f"{r.live_share.mean:.0%}",
            *(
                f"{r.hours[part]:.0f}"
                for part in ("lost", "checkpoint", "detect", "wait", "recover", "degraded")
            ),
        )
        for r in results
    ]
    return lay_out(head, rows)


def sweep_table(results: Sequence[Result]) -> str:
    """Return a row for each size, a column for each policy: ETTR and total cost a year."""
    names = list(dict.fromkeys(r.policy.name for r in results))
    by_size: dict[int, dict[str, Result]] = {}
    for result in results:
        by_size.setdefault(result.num_gpus, {})[result.policy.name] = result
    rows = [
        (
            f"{num_gpus:,}",
            f"{next(iter(row.values())).mttf_h:.1f} h",
            *(f"{row[name].ettr.mean:.3f} {money(row[name].total_usd.mean)}" for name in names),
        )
        for num_gpus, row in by_size.items()
    ]
    return lay_out(("GPUs", "MTTF", *names), rows)


def spares_table(study: SpareStudy) -> str:
    """Return a row for each number of spares, and the answer below."""
    rows = [
        (
            str(r.spares),
            f"{r.ettr.mean:.4f} ±{r.ettr.half:.4f}",
            f"{r.hours['wait'] + r.hours['degraded']:.1f}",
            money(r.wasted_usd.mean),
            money(r.spares_usd.mean),
            _plus_minus(r.total_usd),
            "<- pays off best" if r is study.best else "",
        )
        for r in study.results
    ]
    head = ("spares", "ETTR", "waiting or degraded h", "wasted a year", "held a year", "total", "")
    best = study.best
    nodes = best.spares / (best.num_gpus / best.gpus_per_node)
    return (
        f"{lay_out(head, rows)}\n\n{best.spares} idle spare nodes ({nodes:.1%} of the job's) pay "
        f"off best under {best.policy.name}; the closed form says {study.closed_form}."
    )
