"""Action keys: what a node computes, as the digest of everything that decides it.

The fields are kept beside the key, so that `why` can tell which one changed. A field that has no
digest means that there is no key: the node is then evaluated and not cached.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainonce.errors import StoreError, UnhashableError
from trainonce.graph import inputs
from trainonce.graph.code import Fingerprint, fingerprint, noting_impure
from trainonce.graph.code_objects import full_name
from trainonce.graph.digest import combine, digest, digest_file
from trainonce.graph.node import Dir, File, Node, Resolver, current
from trainonce.graph.numerics import numerics

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from trainonce.graph.store import Store

ACTION_FORMAT = "action-1"
# Too common as values to say where a result comes from.
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


@dataclass
class ActionKey:
    """The key of one call, and what it is made of.

    Args:
        key: 64 hex digits; empty where a part has no digest.
        parts: Field -> digest.
        shown: Field -> how it is shown.
        lineage: (kind, digest) of each input.
        sources: Path -> digest of each file or folder that went in.
        reasons: Why the result must not be cached; empty if it may.
        notes: Where a whole module counts.
        alone: Whether nothing may run beside it in its process, since it seeds global generators.
    """

    key: str = ""
    parts: dict[str, str] = field(default_factory=lambda: {})
    shown: dict[str, str] = field(default_factory=lambda: {})
    lineage: list[tuple[str, str]] = field(default_factory=lambda: [])
    sources: dict[str, str] = field(default_factory=lambda: {})
    reasons: list[str] = field(default_factory=lambda: [])
    notes: list[str] = field(default_factory=lambda: [])
    alone: bool = False

    def come_from(self, lineage: list[tuple[str, str]], sources: dict[str, str]) -> None:
        """Add what the call was made from by way of another node."""
        self.lineage = list(dict.fromkeys([*self.lineage, *lineage]))
        self.sources = {**sources, **self.sources}


class Keys(Resolver):
    """Makes the keys of one `compute`.

    Args:
        store: Binds digests to its tenant and remembers those of files; None without a store.
        strict: Read every file, whatever its stamps say.
        output_of: Returns the output digest of an evaluated node, None where it has none.
        made_from: Returns what an evaluated node was made from: lineage and sources.
    """

    def __init__(
        self,
        store: Store | None,
        *,
        strict: bool,
        output_of: Callable[[Node[Any]], str | None],
        made_from: Callable[[Node[Any]], tuple[list[tuple[str, str]], dict[str, str]]],
    ) -> None:
        self._store = store
        self._strict = strict
        self._output_of = output_of
        self._made_from = made_from

    def output_of(self, node: Node[Any]) -> str | None:
        """Return the output digest of an evaluated node."""
        return self._output_of(node)

    def content_of(self, file: File) -> str:
        """Return the digest of a file's or folder's content."""
        if isinstance(file, Dir):
            entries = [(name, self._entry(path, file.strict)) for name, path in file.files()]
            return combine("dir", entries)
        return self._file(file.path, file.strict)

    def make(self, node: Node[Any]) -> ActionKey:
        """Return the action key of a node whose inputs are evaluated.

        Raises:
            OSError: An input file cannot be read.
        """
        made = ActionKey()
        with self.resolving():
            try:
                self._add_code(made, node)
                with noting_impure() as impure:
                    self._add_arguments(made, node)
                made.reasons += [one for one in impure if one not in made.reasons]
            except UnhashableError as error:
                made.reasons.append(error.message)
                return made
        options = node.function.options
        for name, value in numerics(options.numerics, options.threads).items():
            self._part(made, f"numerics {name}", value)
            made.shown[f"numerics {name}"] = value if len(value) < 60 else "(long)"
        made.key = self._bound(combine(ACTION_FORMAT, sorted(made.parts.items())))
        return made

    def digest(self, value: object, path: str = "value") -> str:
        """Return the digest of a value that may hold nodes and files, bound to the tenant.

        Raises:
            UnhashableError: A part has no digest.
        """
        with self.resolving():
            return self._bound(digest(value, path=path))

    @contextmanager
    def resolving(self) -> Generator[None]:
        """Let this thread's digests look nodes and files up here."""
        before = getattr(current, "resolver", None)
        current.resolver = self
        try:
            yield
        finally:
            current.resolver = before

    def _add_code(self, made: ActionKey, node: Node[Any]) -> None:
        options = node.function.options
        self._part(made, "node", node.name)
        if options.version is not None:
            self._part(made, "version", options.version)
            made.shown["version"] = options.version
            # Its code does not count, but whether it seeds has to be known.
            made.alone = node.function.alone
            with contextlib.suppress(UnhashableError):
                made.alone |= fingerprint(node.function.function).seeds
            return
        self._part(made, "python", sys.version_info[:2])
        made.shown["python"] = "{}.{}".format(*sys.version_info)
        codes = node.function.code
        if len(codes) > 1:
            self._part(made, "roots", [full_name(code) for code in codes])
        made.alone = node.function.alone
        for number, reached in enumerate(codes):
            code = fingerprint(reached, path=f"code of {node.name}")
            made.alone |= code.seeds
            made.notes += code.notes
            made.reasons += [one for one in code.impure if one not in made.reasons]
            self._add_parts(made, code, number)

    def _add_parts(self, made: ActionKey, code: Fingerprint, number: int) -> None:
        for name, content in code.parts.items():
            kind = "" if name.startswith(("package ", "value ", "module ", "missing ")) else "code "
            field = kind + name
            if made.parts.get(field, self._digest_of(content)) != self._digest_of(content):
                field += f" ({number})"  # two closures of one function, say
            self._part(made, field, content)
            if name.startswith("package "):
                made.shown[field] = content
            elif name in code.places or name.removeprefix("module ") in code.places:
                place = code.places.get(name) or code.places[name.removeprefix("module ")]
                made.shown[field] = place

    def _add_arguments(self, made: ActionKey, node: Node[Any]) -> None:
        for name, value in node.bound.arguments.items():
            if name in node.function.options.ignore:
                continue
            field = f"argument {name}"
            output = self.output_of(value) if isinstance(value, Node) else None
            if output is not None:
                made.parts[field] = output  # the same as if the value itself were given
            else:
                self._part(made, field, value, name)
            found = list(inputs.find(value))
            if not self._has_tenant:
                made.shown[field] = inputs.describe(value)
            if not found and not isinstance(value, _PLAIN):
                made.lineage.append(("value", made.parts[field]))
            lineage: list[tuple[str, str]] = []
            for item in found:
                if isinstance(item, File):
                    lineage.append(self._note_file(made, item))
                else:
                    names, sources = self._made_from(item)
                    lineage += names
                    made.sources.update(sources)
            made.come_from(lineage, {})

    def _note_file(self, made: ActionKey, file: File) -> tuple[str, str]:
        content = self._bound(self.content_of(file))
        path = str(file.path)
        made.sources[self._bound(path) if self._has_tenant else path] = content
        return type(file).__name__.lower(), content

    def _part(self, made: ActionKey, name: str, value: object, path: str = "value") -> None:
        made.parts[name] = self._digest_of(value, path)

    def _digest_of(self, value: object, path: str = "value") -> str:
        return self._bound(digest(value, path=path))

    @property
    def _has_tenant(self) -> bool:
        return self._store is not None and self._store.tenant_key is not None

    def _bound(self, name: str) -> str:
        return name if self._store is None else self._store.bind(name)

    def _entry(self, path: Path, strict: bool) -> str:
        """Return what an entry of a folder counts as."""
        if path.is_dir():
            return "folder"
        if path.is_file():
            return self._file(path, strict)
        if path.is_symlink():
            return combine("link to nothing", [("target", os.readlink(path))])
        raise OSError(errno.EINVAL, "neither a file nor a folder", str(path))

    def _file(self, path: Any, strict: bool) -> str:
        if self._store is not None and not (strict or self._strict):
            try:
                return self._store.file_digest(path)
            except StoreError as error:
                self._store.trouble(str(error))
        return digest_file(path)
