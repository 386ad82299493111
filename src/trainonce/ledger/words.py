"""Numbers as a person would say them, and texts that fit a line."""

from __future__ import annotations

import datetime

_LONGEST = 200


def one_line(text: str) -> str:
    """Return the first line of a text, such as an exception's, and not too much of it."""
    line = text.partition("\n")[0]
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"


def count(number: int, noun: str, plural: str = "s") -> str:
    """Return a number and its noun, in the plural where it is not one."""
    return f"{number} {noun}" + (plural if number != 1 else "")


def when(wall_s: float) -> str:
    """Return local date and time to the minute."""
    return datetime.datetime.fromtimestamp(wall_s).astimezone().strftime("%Y-%m-%d %H:%M")


def day(wall_s: float) -> str:
    """Return the date in UTC."""
    return datetime.datetime.fromtimestamp(wall_s, datetime.UTC).strftime("%Y-%m-%d")


def duration(seconds: float) -> str:
    """Return seconds as a person would say them."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds >= 1 or seconds == 0 else f"{seconds:.3f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def percent(share: float | None) -> str:
    """Return a share as a percentage; "?" where unknown."""
    return "?" if share is None else f"{100 * share:.1f} %"


def usd(amount: float | None) -> str:
    """Return money; "?" where unknown."""
    if amount is None:
        return "?"
    sign = "-" if amount < 0 else ""
    return (
        f"{sign}${abs(amount):,.2f}"
        if abs(amount) >= 0.01 or not amount
        else f"{sign}${abs(amount):.5f}"
    )


def hours(number: float) -> str:
    """Return GPU hours with a sensible number of digits."""
    return f"{number:,.1f} GPU-h" if abs(number) >= 10 else f"{number:.4f} GPU-h"


def quantity(number: float) -> str:
    """Return an amount to four digits, and without an exponent where it is large."""
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"
