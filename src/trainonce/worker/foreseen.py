"""What a step will report, found in its variables before its last collective.

`run.mean(loss)` and `return loss` mostly follow the optimizer's step, `loss` is there before the
backward pass. A process that dies in between leaves a step that the others commit, so what it was
about to report has to be known before: by the variable that it came from in earlier executions.
"""

from __future__ import annotations

import struct
import sys
import threading
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch

from trainonce.worker.plain import measures, own_object
from trainonce.worker.scopes import Scope, is_the_users, scope_key
from trainonce.worker.values import LazyMean, filled

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import CodeType, FrameType

# Elements of what a step returned that are looked for, and entries of one dict or object.
_MOST_PLACES = 16
_MOST_ENTRIES = 64
# Executions in which a report may come from nowhere, before it is no longer looked for; and those
# in which it may be the same number as a variable, before it is taken for that.
_MOST_MISSES = 3
_MOST_EXECUTIONS = 8

Place: TypeAlias = tuple[str | int, ...]
"""("mean", its place), or ("value", and the keys that lead to an element of what was returned)."""

Form: TypeAlias = Literal["mean", "number", "tensor"]
"""What the report makes of a variable: `float(x)`, `x.item()` or x itself, or a copy."""


class Origin(NamedTuple):
    """A variable, or an entry of the dict or object that a variable holds.

    Attributes:
        scope: Module and qualified name of the function.
        name: Of the variable.
        key: Of the entry; None for the variable itself.
    """

    scope: str
    name: str
    key: str | int | None


class Scalar(NamedTuple):
    """A number, or a tensor of one element.

    Attributes:
        value: A copy.
        address: Of the tensor's memory; 0 for none.
    """

    value: Any
    address: int


Sight: TypeAlias = dict[Origin, Scalar]
"""What variables held, and where."""


class Report(NamedTuple):
    """One thing that an execution has reported.

    Attributes:
        value: In its form.
        form: What it made of where it came from.
        address: Of the memory of the tensor that was reported; 0 for none.
    """

    value: Any
    form: Form
    address: int


@dataclass
class _Search:
    """Where a report may come from, as long as that is not known."""

    origins: set[Origin] | None = None
    values: set[Any] = field(default_factory=lambda: set())
    executions: int = 0
    misses: int = 0


class Foreseen:
    """Where the reports of one step function come from, as its executions have shown."""

    def __init__(self) -> None:
        self._known: dict[Place, tuple[list[Origin], Form] | None] = {}
        self._searches: dict[Place, _Search] = {}
        self._is_learning = True
        self._wanted: dict[CodeType, list[Origin]] = {}

    # ------------------------------------------------------------------ before the last collective

    def look(self, caller: FrameType, thread: int) -> Sight:
        """Return what the variables of the step hold now.

        Args:
            caller: Where the step is called: its frames are those further inside.
            thread: Which executes it, as DDP reduces gradients of a GPU from another one.
        """
        seen: Sight = {}
        for frame in _frames_inside(caller, thread):
            wanted = self._wanted.get(frame.f_code)
            if wanted is None:
                wanted = self._wanted[frame.f_code] = self._wanted_of(frame)
            if not wanted and not (self._is_learning and is_the_users(frame)):
                continue
            scope = Scope.of(frame)
            found = _scalars(scope) if self._is_learning else _look_up(scope, wanted)
            seen.update((origin, _copied(value)) for origin, value in found if is_scalar(value))
            scope.let_go()
        return seen

    def _wanted_of(self, frame: FrameType) -> list[Origin]:
        key = scope_key(frame)
        origins = [origin for known in self._known.values() if known for origin in known[0]]
        return [origin for origin in origins if origin.scope == key]

    def means(self, seen: Sight, made: list[LazyMean]) -> list[float]:
        """Return what the step averages: of the means that it made, and of those to come.

        A share that is not known is a NaN.
        """
        shares = [mean.local for mean in made]
        while (place := ("mean", len(shares))) in self._known:
            found = self._at(place, seen)
            shares.append(float("nan") if found is None else found[0])
        return shares

    def returned(self, seen: Sight, shape: Any) -> Any:
        """Return the outline `shape` with the elements that are known, each in a list."""

        def known(leaf: Any, place: Place) -> Any:
            return self._at(("value", *place), seen) if leaf is None else leaf

        return filled(shape, known)

    def _at(self, place: Place, seen: Sight) -> list[Any] | None:
        origins, form = self._known.get(place) or ([], "number")
        values = [_in_form(seen[origin].value, form) for origin in origins if origin in seen]
        # Variables that were equal so far and differ now do not tell which of them it is.
        return values[:1] if len(set(map(_bits, values))) == 1 else None

    # ------------------------------------------------------------------ at the commit

    def learn(self, seen: Sight, reports: Iterable[tuple[Place, Report]]) -> None:
        """Find out where the reports of an execution came from.

        Args:
            seen: At the last look.
            reports: All of the execution.
        """
        for place, report in reports:
            if place not in self._known:
                self._search(place, seen, report)
            elif (known := self._known[place]) is not None:
                origins, form = known
                left = [origin for origin in origins if _agrees(seen.get(origin), report)]
                if form != report.form or not left:  # by chance so far
                    self._settle(place, None)
                elif len(left) < len(origins):
                    self._settle(place, (left, form))
        self._is_learning = bool(self._searches)

    def _search(self, place: Place, seen: Sight, report: Report) -> None:
        search = self._searches.setdefault(place, _Search())
        agreeing = {origin for origin, scalar in seen.items() if _agrees(scalar, report)}
        if search.origins is not None and agreeing:
            agreeing &= search.origins
        if not agreeing:
            search.misses += 1
            if search.misses >= _MOST_MISSES:
                self._settle(place, None)
            return
        search.origins = agreeing
        search.values.add(_bits(report.value))
        search.executions += 1
        itself = {origin for origin in agreeing if _is_itself(seen[origin], report)}
        sure = any(_is_proof(seen[origin], report) for origin in agreeing)
        if sure or len(search.values) > 1 or search.executions >= _MOST_EXECUTIONS:
            self._settle(place, (sorted(itself or agreeing, key=str), report.form))

    def _settle(self, place: Place, known: tuple[list[Origin], Form] | None) -> None:
        self._known[place] = known
        self._searches.pop(place, None)
        self._wanted.clear()

    # ------------------------------------------------------------------ for a newcomer

    def to_record(self) -> list[list[Any]]:
        """Return what a newcomer must know, as plain values."""
        return [[list(place), known] for place, known in self._known.items()]

    def load(self, record: list[list[Any]]) -> None:
        """Take over what `to_record` returned on another rank."""
        self._known = {
            tuple(place): None
            if known is None
            else ([Origin(*each) for each in known[0]], known[1])
            for place, known in record
        }
        self._searches.clear()
        self._is_learning = not self._known
        self._wanted.clear()


def reports_of(means: Iterable[tuple[LazyMean, Any]], value: Any) -> Iterator[tuple[Place, Report]]:
    """Yield what an execution has reported.

    Args:
        means: With what each is the mean of.
        value: What the step returned.
    """
    for mean, source in means:
        yield ("mean", mean.place), Report(mean.local, "mean", _address(source))
    for place, element in islice(_elements(value), _MOST_PLACES):
        form = "tensor" if isinstance(element, torch.Tensor) else "number"
        yield place, Report(element, form, _address(element))


def stood_in_variables(seen: Sight, means: Iterable[tuple[LazyMean, Any]], value: Any) -> bool:
    """Tell whether all that an execution has reported was seen, and hardly by chance.

    Args:
        seen: At the last look.
        means: With what each is the mean of.
        value: What the step returned.
    """
    return _is_of_scalars(value) and all(
        any(_agrees(scalar, report) and _is_proof(scalar, report) for scalar in seen.values())
        for _, report in reports_of(means, value)
    )


def _is_of_scalars(value: Any) -> bool:
    if type(value) in (tuple, dict):
        parts = value.values() if type(value) is dict else value
        return len(value) <= _MOST_PLACES and all(map(_is_of_scalars, parts))
    return value is None or isinstance(value, LazyMean) or is_scalar(value)


def _elements(value: Any, place: Place = ("value",)) -> Iterator[tuple[Place, Any]]:
    """Yield the scalars that `value` is made of, if an outline of it has a place for them."""
    if type(value) is tuple:
        for index, each in enumerate(value):
            yield from _elements(each, (*place, index))
    elif type(value) is dict:
        for key, each in value.items():
            yield from _elements(each, (*place, key))
    elif is_scalar(value):
        yield place, value


# ---------------------------------------------------------------------- frames and variables


def _frames_inside(caller: FrameType, thread: int) -> Iterator[FrameType]:
    """Yield the frames of a thread from the innermost one outwards, up to a caller."""
    same = threading.get_ident() == thread
    here = sys._getframe(1) if same else sys._current_frames().get(thread)
    while here is not None and here is not caller:
        yield here
        here = here.f_back


def _scalars(scope: Scope) -> Iterator[tuple[Origin, Any]]:
    """Yield what may be a scalar of the variables of a frame, and in dicts and objects there."""
    for name, value in list(scope.values.items()):
        yield Origin(scope.key, name, None), value
        entries = _entries(value)
        for key, entry in list(entries.items()) if len(entries) <= _MOST_ENTRIES else ():
            if type(key) in (str, int):
                yield Origin(scope.key, name, key), entry


def _look_up(scope: Scope, wanted: list[Origin]) -> Iterator[tuple[Origin, Any]]:
    for origin in wanted:
        value = scope.values.get(origin.name)
        yield origin, value if origin.key is None else _entries(value).get(origin.key)


def _entries(value: Any) -> dict[Any, Any]:
    if type(value) is dict:
        return value
    return vars(value) if measures[type(value)] is own_object else {}


# ---------------------------------------------------------------------- scalars


def is_scalar(value: Any) -> bool:
    """Tell whether `value` is a number, or a tensor of one element."""
    kind = type(value)
    if kind is torch.Tensor:
        return value.numel() == 1 and value.layout is torch.strided
    return kind is float or kind is int or kind is bool


def _copied(value: Any) -> Scalar:
    if type(value) is torch.Tensor:
        return Scalar(value.detach().clone(), value.data_ptr())
    return Scalar(value, 0)


def _address(value: Any) -> int:
    return value.data_ptr() if isinstance(value, torch.Tensor) else 0


def _in_form(value: Any, form: Form) -> Any:
    if form == "tensor":
        return value
    number = value.item() if isinstance(value, torch.Tensor) else value
    return float(number) if form == "mean" else number


def _agrees(scalar: Scalar | None, report: Report) -> bool:
    """Tell whether a variable is what a report was made of: bit for bit, in its type and shape."""
    if scalar is None or (report.form == "tensor" and not isinstance(scalar.value, torch.Tensor)):
        return False
    return _bits(_in_form(scalar.value, report.form)) == _bits(report.value)


def _bits(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device, value.shape, _bits(value.item())
    return struct.pack("<d", value) if type(value) is float else (type(value), value)


def _is_itself(scalar: Scalar, report: Report) -> bool:
    return report.address != 0 and scalar.address == report.address


def _is_proof(scalar: Scalar, report: Report) -> bool:
    """Tell whether a variable that agrees with a report does so hardly by chance.

    It is the tensor reported, or a number that is no multiple of 1 / 4096.
    """
    if _is_itself(scalar, report):
        return True
    value = report.value
    number = value.item() if isinstance(value, torch.Tensor) else value
    return type(number) is float and number % 2**-12 != 0
