"""Large variables of the script, such as the best weights so far, for whoever takes the rank over.

Plain variables are small, and published with every commit. What is larger is copied when it has
changed, into the memory of the mirror beside its records, which say where it lies. What changes in
every step, as a batch does, is left alone: a newcomer comes by it as all ranks do.
"""

from __future__ import annotations

import operator
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from trainonce import settings
from trainonce.errors import EncodingError
from trainonce.wire import encoding
from trainonce.worker import torch_private
from trainonce.worker.mirror import Place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_MOST_PARTS = 8192
_DEEPEST = 16
_MOST_MB = 1000.0
# Unchanged for so many steps, a variable is none that changes in every one.
_REST = 2
# One that changes all the time is looked at less often, as far as once in so many steps.
_MOST_SKIPPED = 16
# A copy is let go where no step was called from the variable's scope for so long.
_LET_GO_AFTER = 1000
_PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes))
_CONTAINERS = frozenset((dict, OrderedDict, list, tuple))
_TENSORS = {torch.Tensor}
_COMPOUND = _CONTAINERS | _TENSORS

_version = operator.attrgetter("_version")


class Kept(NamedTuple):
    """What a predecessor left of one variable.

    Attributes:
        key: Of its scope.
        name: Its name.
        data: Its value, encoded.
        place: Where that lies in the rank's mirror; None: it is to be kept anew.
    """

    key: str
    name: str
    data: bytes
    place: Place | None


class _Fingerprint:
    """Tells later whether a value is the same and unchanged, and does not keep it alive."""

    __slots__ = ("_died", "_identities", "_refs", "_shape", "_versions")

    def __init__(self, value: Any) -> None:
        self._shape, tensors = _taken_apart(value)
        self._identities = list(map(id, tensors))
        self._versions = list(map(_version, tensors))
        # Another object may have the identity of one that is gone.
        self._died = False
        self._refs = [weakref.ref(each, self._on_death) for each in tensors]

    def _on_death(self, _ref: weakref.ref[torch.Tensor]) -> None:
        self._died = True

    def is_of(self, value: Any) -> bool:
        """Tell whether `value` is what it was made of, as it was then."""
        kind = type(value)
        if self._died or kind is not self._shape[0]:
            return False
        if kind in _CONTAINERS and len(value) != self._shape[1]:
            return False
        shape, tensors = _taken_apart(value)
        return (
            shape == self._shape
            and list(map(id, tensors)) == self._identities
            and list(map(_version, tensors)) == self._versions
        )


@dataclass(slots=True)
class _Seen:
    """What is known of one variable."""

    fingerprint: _Fingerprint
    """At the last change."""
    changed_at: int
    """In which step that was."""
    has_changed: bool
    """Whether it has since the first look at its scope."""
    is_settled: bool = False
    """Whether it was copied as it is now, or cannot be."""
    is_refused: bool = False
    """Whether there was no room for that, or no encoding."""
    place: Place | None = None
    """Where its copy is."""
    looked_at: int = 0
    """In which step it was there last."""
    changes: int = 0
    """How often it has changed without a rest."""
    skip_to: int = 0
    """It is not looked at before this step."""


class LargeVariables:
    """What is known of the large variables around the calls of steps.

    Args:
        keep: Writes bytes to memory that outlives this process, beside what lies at the places of
            its second argument; returns where, or None where there is no room.
    """

    def __init__(self, keep: Callable[[bytes, list[Place]], Place | None]) -> None:
        self.owned: Callable[[], frozenset[int]] = frozenset
        """Addresses of the memory that is protected anyway."""
        self.present: list[tuple[str, str, Place]] = []
        """Scope, name and place of those that come along, as of the last look."""
        self.num_changes = 0
        """How often one was found to be another than before, or new."""
        self._keep = keep
        self._seen: dict[tuple[str, str], _Seen] = {}
        self._restored: dict[str, dict[str, tuple[Any, Place | None]]] = {}
        self._step = 0
        self._most_bytes = settings.megabytes(settings.LARGE_VARIABLES_MB, _MOST_MB)

    # ------------------------------------------------------------------ taking

    def begin(self, *, step: bool) -> None:
        """Begin a look at all variables around a call; `step`: where a step begins."""
        self.present = []
        self._step += step
        if step and self._step % _LET_GO_AFTER == 0:
            for seen in self._seen.values():
                if seen.place is not None and seen.looked_at <= self._step - _LET_GO_AFTER:
                    seen.is_settled, seen.place = False, None

    def first(self, key: str, name: str, value: Any, *, takes: bool) -> None:
        """Note a variable that is there at the first look at its scope.

        Args:
            key: Of its scope.
            name: Of the variable.
            value: What it holds.
            takes: The step that is called now is executed, and was begun; else the next one is.
        """
        if self._most_bytes and _size_of(value) is not None:
            begun = self._step if takes else self._step + 1
            seen = _Seen(_Fingerprint(value), begun, has_changed=False)
            self._seen.setdefault((key, name), seen)

    def look(self, key: str, name: str, value: Any) -> bool:
        """Copy a variable if it has changed; tell whether a newcomer will have it.

        Args:
            key: Of its scope.
            name: Of the variable.
            value: What it holds.
        """
        seen = self._seen.get((key, name))
        if seen is not None and self._step < seen.skip_to:
            return False
        rested = seen is None or self._step - max(seen.changed_at, seen.skip_to) >= _REST
        if seen is None or not seen.fingerprint.is_of(value):
            if not self._most_bytes or _size_of(value) is None:
                self._seen.pop((key, name), None)
                return False
            changes = 0 if rested or seen is None else seen.changes + 1
            seen = _Seen(_Fingerprint(value), self._step, has_changed=True, changes=changes)
            self.num_changes += 1
            seen.skip_to = self._step + min(2**changes // 2, _MOST_SKIPPED)
            self._seen[key, name] = seen
        seen.looked_at = self._step
        if not seen.has_changed:
            return True
        if rested and not seen.is_settled:
            seen.is_settled = True
            # What is protected changes with each step, and is there anyway: `net.state_dict()`.
            if not self._any_owned(_taken_apart(value)[1]):
                seen.place = self._copy(value)
                seen.is_refused = seen.place is None
        if seen.place is not None:
            self.present.append((key, name, seen.place))
        return seen.place is not None

    def is_refused(self, key: str, name: str) -> bool:
        """Tell whether a variable was to be copied as it is now, and could not be."""
        seen = self._seen.get((key, name))
        return seen is not None and seen.is_refused

    def _copy(self, value: Any) -> Place | None:
        used = [seen.place for seen in self._seen.values() if seen.place is not None]
        free = self._most_bytes - sum(place.size for place in used)
        if (_size_of(value) or 0) > free:
            return None
        try:
            data = encoding.encode(value)
        except EncodingError:
            return None
        return self._keep(data, used) if len(data) <= free else None  # texts may be long, too

    def is_apart(self, module: torch.nn.Module) -> bool:
        """Tell whether a module has parameters, and none of them is protected: a copy."""
        parameters = list(module.parameters())
        return bool(parameters) and not self._any_owned(parameters)

    def _any_owned(self, tensors: Iterable[torch.Tensor]) -> bool:
        local = map(torch_private.local_of, tensors)
        return not self.owned().isdisjoint(each.untyped_storage().data_ptr() for each in local)

    # ------------------------------------------------------------------ taking over

    def restore(self, found: Iterable[Kept]) -> list[str]:
        """Remember what a predecessor kept, for `of`; return the names of what is damaged."""
        self._restored, self.present = {}, []
        damaged: list[str] = []
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for key, name, data, place in found:
            try:
                value = encoding.decode(data, device=device)
            except EncodingError:
                damaged.append(name)
                continue
            place = place or self._keep(data, [used for *_, used in self.present])
            self._restored.setdefault(key, {})[name] = value, place
            if place is not None:
                self.present.append((key, name, place))
        return damaged

    def of(self, key: str) -> dict[str, Any]:
        """Return what a predecessor had in a scope, by name."""
        return {name: value for name, (value, _) in self._restored.get(key, {}).items()}

    def adopt(self, key: str, name: str, value: Any) -> None:
        """Go on with a variable of `of`, which was assigned as `value`."""
        _, place = self._restored[key][name]
        self._seen[key, name] = _Seen(
            _Fingerprint(value), self._step - _REST, has_changed=True,
            is_settled=place is not None, place=place, looked_at=self._step,
        )  # fmt: skip

    def forget_restored(self) -> None:
        """All that a predecessor had is assigned."""
        self._restored = {}


def _size_of(value: Any) -> int | None:
    """Return of how many bytes the tensors of a value are; None if it cannot be kept."""
    found: list[torch.Tensor] = []
    return sum(each.nbytes for each in found) if _can_be_kept(value, found, _DEEPEST) else None


def _can_be_kept(value: Any, tensors: list[torch.Tensor], deep: int) -> bool:
    kind = type(value)
    if kind is torch.Tensor:
        tensors.append(value)
        is_plain = value.layout is torch.strided and not value.requires_grad
        return is_plain and not value.is_inference()  # those have no version
    if kind not in _CONTAINERS:
        return kind in _PLAIN or isinstance(value, np.generic)
    if not deep or len(value) + len(tensors) > _MOST_PARTS:
        return False
    if isinstance(value, dict):
        if not _PLAIN.issuperset(map(type, value)):
            return False
        value = value.values()
    if _PLAIN.issuperset(map(type, value)):
        return True
    return all(_can_be_kept(each, tensors, deep - 1) for each in value)


def _taken_apart(value: Any) -> tuple[list[Any], list[torch.Tensor]]:
    """Return all that is not tensors in a value, with its types and keys; and its tensors."""
    shape: list[Any] = []
    tensors: list[torch.Tensor] = []
    _take_apart(value, shape, tensors, _DEEPEST)
    return shape, tensors


def _take_apart(value: Any, shape: list[Any], tensors: list[torch.Tensor], deep: int) -> None:
    kind = type(value)
    shape.append(kind)  # ahead of the value: only what is of equal types is compared
    if kind is torch.Tensor:
        tensors.append(value)
    elif kind not in _CONTAINERS or not deep or len(value) > _MOST_PARTS:
        shape.append(value)
    else:
        shape.append(len(value))
        if isinstance(value, dict):
            shape += map(type, value)
            shape += value
            value = value.values()
        kinds = set(map(type, value))
        if kinds == _TENSORS:
            shape.append(_TENSORS)
            tensors += value
        elif kinds.isdisjoint(_COMPOUND):
            shape += map(type, value)
            shape += value
        else:
            for each in value:
                _take_apart(each, shape, tensors, deep - 1)


def first_fit(used: Iterable[Place], size: int, capacity: int) -> Place | None:
    """Return the first place of `size` bytes that overlaps none that is used; None for none."""
    begin = 0
    for place in sorted(used):
        if place.offset - begin >= size:
            break
        begin = max(begin, place.offset + place.size)
    return Place(begin, size) if begin + size <= capacity else None
