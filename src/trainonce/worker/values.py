"""Values that stand for something a step returned."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict
from typing import TYPE_CHECKING, Any, Final, final

from trainonce.errors import StepError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


_WENT_DOWN = "trainonce.LOST stands for what a step returned whose process died after its update"
_REMEDY = "what later steps need of a step belongs in run.state, set in that step"


@final
class Lost:
    """Stands for the return value of a committed step whose process died with it.

    The step itself is not lost: its update is in the parameters. So that logging code goes on,
    it is a NaN in arithmetic, comparisons and formats, its elements are LOST, it is empty when
    iterated over, and `detach()`, `cpu()`, `to(…)`, `mean()`, `sum()` and `clone()` return
    it. Functions of torch take it as a NaN without dimensions. Where steps return a tuple or
    a dict, each of its elements is LOST instead.
    """

    _instance: Lost | None = None

    def __new__(cls) -> Lost:
        """Return the one instance."""
        if cls._instance is None:
            cls._instance = super().__new__(cls)
        return cls._instance

    def __repr__(self) -> str:
        return "trainonce.LOST"

    def __bool__(self) -> bool:
        return False

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __getitem__(self, key: object) -> Lost:
        return self

    def __float__(self) -> float:
        return math.nan

    def __format__(self, spec: str) -> str:
        return format(math.nan, spec) if spec else repr(self)

    def __reduce__(self) -> str:
        return "LOST"

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{_WENT_DOWN}, and has no {name!r}: {_REMEDY}")

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Take part in functions of torch as the NaN that it is.

        Raises:
            StepError: In one by which something is trained: all would be NaN from then on.
        """
        import torch

        def plain(value: Any) -> Any:
            if type(value) in (list, tuple):
                return type(value)(map(plain, value))
            return torch.tensor(math.nan) if value is LOST else value

        named = {key: plain(each) for key, each in (kwargs or {}).items()}
        try:
            result = function(*plain(args), **named)
        except RuntimeError as error:  # a sum of integers in place: it becomes a NaN, not in place
            raise TypeError(f"{_WENT_DOWN}: {error}") from error
        if isinstance(result, torch.Tensor) and result.requires_grad:
            raise StepError(f"{_WENT_DOWN}, and a step computes with it", hint=_REMEDY)
        return result

    def item(self) -> float:
        """Return NaN, as a tensor's `item` would return a number."""
        return math.nan

    def _nan(self, *_: object) -> float:
        return math.nan

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _nan
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = __neg__ = __abs__ = __round__ = _nan

    def _never(self, other: object) -> bool:
        return False

    __lt__ = __le__ = __gt__ = __ge__ = _never

    def _itself(self, *_: object, **__: object) -> Lost:
        return self

    detach = cpu = to = mean = sum = clone = _itself


LOST: Final = Lost()


def outline(value: Any) -> Any:
    """Return the tuples and dicts that `value` is made of, and None for what is in them.

    A mean is told by its place among those of its step. What is known is in a list, as None is
    where a step returned it. Dicts with other keys than text and integers are not looked into.
    """
    if value is None:
        return [None]
    if isinstance(value, LazyMean):
        return value.place
    if type(value) is tuple:
        return tuple(outline(each) for each in value)
    if type(value) is dict and all(type(key) in (str, int) for key in value):
        return {key: outline(each) for key, each in value.items()}
    return None


def merged(shape: Any, known: Any) -> Any:
    """Return the outline `shape` with what `known`, another of the like, knows beside it.

    `known` is what was expected before the step had ended. That it returns None once more was a
    guess: where only one of the two says so, neither is believed, and what was returned is lost.
    """
    if type(shape) is tuple and type(known) is tuple and len(shape) == len(known):
        return tuple(map(merged, shape, known))
    if type(shape) is dict and type(known) is dict:
        return {key: merged(each, known.get(key)) for key, each in shape.items()}
    if shape is None:
        return known if type(known) is list and known != _NOTHING else None
    if shape == _NOTHING and type(known) is list and known != _NOTHING:
        return None
    return shape


_NOTHING = [None]
"""Outline of None."""


def filled(
    shape: Any, fill: Callable[[Any, tuple[str | int, ...]], Any], place: tuple[str | int, ...] = ()
) -> Any:
    """Return an outline with what `fill` makes of each leaf, told the keys that lead to it."""
    if type(shape) is tuple:
        return tuple(filled(each, fill, (*place, index)) for index, each in enumerate(shape))
    if type(shape) is dict:
        return {key: filled(each, fill, (*place, key)) for key, each in shape.items()}
    return fill(shape, place)


def with_means(shape: Any, means: Sequence[LazyMean]) -> Any:
    """Return an outline with the means of its step in their places."""

    def mean(leaf: Any, _: object) -> Any:
        if type(leaf) is int:
            return means[leaf] if leaf < len(means) else None
        return leaf

    return filled(shape, mean)


def is_complete(shape: Any) -> bool:
    """Tell whether all is known that an outline with means stands for, every share included."""
    if type(shape) is tuple:
        return all(map(is_complete, shape))
    if type(shape) is dict:
        return all(map(is_complete, shape.values()))
    return not math.isnan(shape.local) if isinstance(shape, LazyMean) else shape is not None


def lost(shape: Any) -> Any:
    """Return what an outline with means stands for, and LOST for what is not known."""

    def known(leaf: Any, _: object) -> Any:
        if type(leaf) is list:
            return leaf[0]
        return leaf if isinstance(leaf, LazyMean | float) else LOST

    return filled(shape, known)


MAX_MEANS = 8
"""How many means one step can reduce."""


class LazyMean:
    """A number averaged over all ranks, after the commit.

    Reading it waits for the average: `float(mean)`, `mean.item()`, arithmetic, comparisons,
    formats.

    Args:
        local: This rank's value.
        place: Its place among the means of its step.
    """

    def __init__(self, local: float, place: int) -> None:
        self.local = local
        self.place = place
        self.average: float | None = None
        """None as long as nobody has read it."""
        self._read: Callable[[], float] | None = None

    @classmethod
    def known(cls, average: float) -> LazyMean:
        """Return one of which the average is known."""
        mean = cls(average, 0)
        mean.average = average
        return mean

    def resolve(self, read: Callable[[], float]) -> None:
        """Tell how to read the average once it has been asked for."""
        self._read = read

    def item(self) -> float:
        """Wait for the average and return it; the local value before the commit."""
        if self.average is None and (read := self._read) is not None:
            self.average, self._read = read(), None
        return self.local if self.average is None else self.average

    def __float__(self) -> float:
        return self.item()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec)

    def __repr__(self) -> str:
        return f"LazyMean({self.item()})"

    def __add__(self, other: Any) -> Any:
        return self.item() + _number(other)

    def __radd__(self, other: Any) -> Any:
        return other + self.item()

    def __sub__(self, other: Any) -> Any:
        return self.item() - _number(other)

    def __rsub__(self, other: Any) -> Any:
        return other - self.item()

    def __mul__(self, other: Any) -> Any:
        return self.item() * _number(other)

    def __rmul__(self, other: Any) -> Any:
        return other * self.item()

    def __truediv__(self, other: Any) -> Any:
        return self.item() / _number(other)

    def __rtruediv__(self, other: Any) -> Any:
        return other / self.item()

    def __neg__(self) -> float:
        return -self.item()

    def __abs__(self) -> float:
        return abs(self.item())

    def __round__(self, digits: int | None = None) -> float:
        return round(self.item(), digits)

    def __lt__(self, other: Any) -> bool:
        return self.item() < _number(other)

    def __le__(self, other: Any) -> bool:
        return self.item() <= _number(other)

    def __gt__(self, other: Any) -> bool:
        return self.item() > _number(other)

    def __ge__(self, other: Any) -> bool:
        return self.item() >= _number(other)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, LazyMean) else value


_MEAN = "\0trainonce.mean"
_MEANS = "\0trainonce.means"
_ONLY_MEANS = frozenset((LazyMean,))


def pack_value(value: Any, means: Sequence[LazyMean]) -> Any:
    """Return `value` with its means replaced by their places in `means`, or by the averages.

    Means of earlier steps are no longer reduced anew: they are the averages, and waited for.

    Args:
        value: A tree of containers.
        means: Those of the step that is being committed.
    """
    return _pack(value, means, [])


def pack_settled(value: Any, means: Sequence[LazyMean]) -> tuple[Any, bool]:
    """Do as `pack_value`, and tell whether there are none of `means` in `value`."""
    unsettled: list[LazyMean] = []
    return _pack(value, means, unsettled), not unsettled


def unpack_value(value: Any, means: Sequence[LazyMean]) -> Any:
    """Undo `pack_value`."""
    kind = type(value)
    if kind is list and value and type(value[0]) is str:
        if value[0] == _MEAN:
            return means[value[1]] if len(value) == 2 else LazyMean.known(value[-1])
        if value[0] == _MEANS:
            return [means[at] if type(at) is int else LazyMean.known(at) for at in value[1]]
    if isinstance(value, dict):
        return _with_entries(value, {k: unpack_value(each, means) for k, each in value.items()})
    if kind in (list, tuple):
        return kind(unpack_value(each, means) for each in value)
    return value


def _pack(value: Any, means: Sequence[LazyMean], unsettled: list[LazyMean]) -> Any:
    kind = type(value)
    if kind is LazyMean:
        return [_MEAN, *_read_or_place(value, means, unsettled)]
    if kind is list and value and _ONLY_MEANS.issuperset(map(type, value)):
        packed: list[Any] = [mean.average for mean in value]
        while None in packed:
            at = packed.index(None)
            packed[at] = _read_or_place(value[at], means, unsettled)[-1]
        return [_MEANS, packed]
    if isinstance(value, dict):
        entries = {key: _pack(each, means, unsettled) for key, each in value.items()}
        return _with_entries(value, entries)
    if kind in (list, tuple):
        return kind(_pack(each, means, unsettled) for each in value)
    return value


def _read_or_place(
    mean: LazyMean, means: Sequence[LazyMean], unsettled: list[LazyMean]
) -> tuple[Any, ...]:
    """Return the place of a mean that is among `means`; of another, None and the average."""
    if mean in means:
        unsettled.append(mean)
        return (mean.place,)
    return None, mean.item()


def _with_entries(value: dict[Any, Any], entries: dict[Any, Any]) -> dict[Any, Any]:
    """Return `entries` as a dict of the kind of `value`, where that has an encoding."""
    if type(value) is defaultdict and isinstance(value.default_factory, type):
        made: dict[Any, Any] = defaultdict(value.default_factory)
        made.update(entries)
        return made
    if type(value) is Counter:
        return Counter(entries)
    return OrderedDict(entries) if type(value) is OrderedDict else entries


def holds_means(value: Any) -> bool:
    """Tell whether there is a mean in a tree of containers."""
    kind = type(value)
    if kind is list or kind is tuple:
        kinds = set(map(type, value))
        return LazyMean in kinds or (not kinds.isdisjoint(_TREES) and any(map(holds_means, value)))
    if isinstance(value, dict):
        return any(map(holds_means, value.values()))
    return kind is LazyMean


_TREES = (list, tuple, dict, Counter, OrderedDict, defaultdict)
