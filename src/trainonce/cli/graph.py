"""`trainonce graph`: what the store holds, why something hit or missed, and its upkeep."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from typing import TYPE_CHECKING, Any

from trainonce.errors import ConfigError
from trainonce.graph import upkeep
from trainonce.graph.digest import digest_file
from trainonce.graph.index import index_path
from trainonce.graph.places import place_of
from trainonce.graph.store import Store, open_store
from trainonce.graph.why import compare

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainonce.graph.features.tables import Table
    from trainonce.graph.index import Entry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands and their options."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--store", help="folder or URL ($TRAINONCE_STORE)")
    common.add_argument("--tenant", help="the secret the store was written under")
    common.add_argument("--json", action="store_true", help="print JSON")
    commands = parser.add_subparsers(dest="graph_command", required=True, metavar="ACTION")

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=summary, parents=[common])

    add("ls", "list stored results").add_argument("node", nargs="?", help="only this node")
    add("show", "show one result").add_argument(
        "key", help="the beginning of its key, or the name of a node, for its last result"
    )
    add("why", "explain a result against the one nearest to it").add_argument(
        "key", help="the beginning of its key, or the name of a node"
    )
    add("gc", "remove what is not needed").add_argument(
        "--budget", type=int, metavar="BYTES", help="evict beyond this size"
    )
    add("verify", "check every byte; exit code 1 if something is damaged").add_argument(
        "--keep", action="store_true", help="leave damaged files where they are"
    )
    forget = add("forget", "erase all results of a source, and keep them from returning")
    forget.add_argument("--source", action="append", default=[], help="a path, or a digest")
    forget.add_argument("--sample", action="append", default=[], help="digest of a sample")
    forget.add_argument("--list", action="store_true", help="show what was forgotten")


def run(args: argparse.Namespace) -> int:
    """Run the sub-command and return its exit code."""
    actions: dict[str, Callable[[Store, argparse.Namespace], int]] = {
        "ls": _ls, "show": _show, "why": _why, "gc": _gc, "verify": _verify, "forget": _forget,
    }  # fmt: skip
    place = place_of(args.store)
    # Features alone make no index, and looking at their rows is to work all the same.
    only_rows = (place.local / "rows").is_dir() and not index_path(place.local).exists()
    read_only = args.graph_command in ("ls", "show", "why") and not only_rows
    store = open_store(args.store, tenant=args.tenant, read_only=read_only)
    return actions[args.graph_command](store, args)


def _ls(store: Store, args: argparse.Namespace) -> int:
    entries = store.index.entries(args.node)
    tables = [] if args.node else [table for table in upkeep.rows_of(store) if table.name]
    if args.json:
        _print([*(_summary(store, entry) for entry in entries), *map(_table_summary, tables)])
        return 0
    for entry in entries:
        state = "" if store.has_bytes(entry) else "  (bytes evicted)"
        state += "  (nondeterministic)" if entry.nondeterministic else ""
        size = f"{entry.size_bytes:>12,} B"
        print(f"{entry.key[:16]}  {entry.seconds:9.2f} s {size}  {entry.node}{state}")
    total = sum(entry.size_bytes for entry in entries if store.has_bytes(entry))
    for table in tables:
        seconds = table.seconds_per_row * table.num_rows
        size = f"{table.size_bytes:>12,} B"
        print(f"{table.subgraph[:16]}  {seconds:9.2f} s {size}  {table.name}, "
              f"{table.num_rows:,} rows")  # fmt: skip
    total += sum(table.size_bytes for table in tables)
    print(f"{len(entries)} results, {len(tables)} tables of rows, {total:,} bytes in {store.root}")
    return 0


def _show(store: Store, args: argparse.Namespace) -> int:
    table = _table(store, args.key)
    if table is not None:
        return _show_table(table, args)
    entry = _entry(store, args.key)
    if args.json:
        _print({**_summary(store, entry), **dataclasses.asdict(entry)})
        return 0
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.wall_s))
    print(f"node     {entry.node}\nkey      {entry.key}\noutput   {entry.output}")
    print(f"bytes    {entry.size_bytes:,} in blob {entry.blob or '(none)'}")
    print(f"took     {entry.seconds:.3f} s, kept {when}, numerics {entry.numerics}")
    for name, shown in sorted(entry.shown.items()):
        print(f"  {name} = {shown}")
    for path, digest in sorted(entry.sources.items()):
        print(f"  source {path} {digest[:16]}")
    return 0


def _show_table(table: Table, args: argparse.Namespace) -> int:
    if args.json:
        _print(_table_summary(table))
        return 0
    print(f"rows     {table.name}\nsubgraph {table.subgraph}")
    print(f"rows     {table.num_rows:,} in {len(table.segments)} files, {table.size_bytes:,} bytes")
    print(f"took     {table.seconds_per_row * table.num_rows:.3f} s")
    for name, digest in table.parts.items():
        print(f"  {name} = {digest}")
    return 0


def _why_table(store: Store, table: Table, args: argparse.Namespace) -> int:
    """Tell in which parts the digest of a table of rows differs from the nearest other one."""
    others = [t for t in upkeep.rows_of(store) if t.parts and t.subgraph != table.subgraph]
    named = [t for t in others if t.name == table.name]

    def changed(other: Table) -> list[str]:
        names = {**other.parts, **table.parts}
        return [name for name in names if other.parts.get(name) != table.parts.get(name)]

    nearest = min(named or others, key=lambda t: len(changed(t)), default=None)
    changes = {} if nearest is None else {
        name: (nearest.parts.get(name, ""), table.parts.get(name, "")) for name in changed(nearest)
    }  # fmt: skip
    if args.json:
        _print({
            "key": table.subgraph, "node": table.name,
            "nearest": nearest.subgraph if nearest else "", "changes": [
                {"field": name, "before": before, "now": now}
                for name, (before, now) in changes.items()
            ],
        })  # fmt: skip
        return 0
    print(f"{table.name} {table.subgraph[:16]}, {table.num_rows:,} rows")
    if nearest is None:
        print("  it is the only table of rows")
        return 0
    print(f"  against {nearest.subgraph[:16]} ({nearest.name}), the nearest other one:")
    for name, (before, now) in changes.items():
        print(f"  {name} changed: {before[:24]} → {now[:24]}")
    return 0


def _why(store: Store, args: argparse.Namespace) -> int:
    table = _table(store, args.key)
    if table is not None:
        return _why_table(store, table, args)
    entry = _entry(store, args.key)
    others = [other for other in store.index.entries(entry.node) if other.key != entry.key]
    ranked = sorted(others, key=lambda other: len(compare(entry, other)))
    changes = compare(entry, ranked[0]) if ranked else ()
    noted = store.reason_uncached(entry.node)
    if args.json:
        _print({
            "key": entry.key, "node": entry.node, "nearest": ranked[0].key if ranked else "",
            "changes": [dataclasses.asdict(change) for change in changes],
            "nondeterministic": entry.nondeterministic, "last_uncached": noted or "",
        })  # fmt: skip
        return 0
    print(f"{entry.node} {entry.key[:16]}")
    if not ranked:
        print("  it is the only result of this node")
    else:
        print(f"  against {ranked[0].key[:16]}, the nearest other result:")
        for change in changes:
            print(f"  {change}")
    if entry.nondeterministic:
        print("  it is nondeterministic: a re-evaluation gave other bytes, which stand now")
    if noted:
        print(f"  a run was not cached: {noted}")
    return 0


def _gc(store: Store, args: argparse.Namespace) -> int:
    done = upkeep.collect(store, args.budget)
    if args.json:
        _print(dataclasses.asdict(done))
    else:
        print(f"removed {done.blobs} blobs and {done.segments} files of rows, "
              f"{done.size_bytes:,} bytes")  # fmt: skip
        print(f"removed {done.temporary_files} temporary files of dead processes")
        print(f"{done.left_bytes:,} bytes left")
    return 0


def _verify(store: Store, args: argparse.Namespace) -> int:
    found = upkeep.verify(store, heal=not args.keep)
    if args.json:
        _print(dataclasses.asdict(found))
    else:
        print(f"{found.blobs} blobs, {found.rows:,} rows, {found.size_bytes:,} bytes, "
              f"{found.entries} results")  # fmt: skip
        for name in found.damaged:
            print(f"damaged: {name}" + ("" if args.keep else " (removed; it is computed again)"))
        print(f"{len(found.damaged)} damaged, {len(found.missing)} results without their bytes")
    return 1 if found.damaged else 0


def _forget(store: Store, args: argparse.Namespace) -> int:
    if args.list:
        rows = upkeep.tombstones(store)
        if args.json:
            _print([{"digest": d, "what": what, "wall_s": wall_s} for d, what, wall_s in rows])
        elif not rows:
            print("nothing was forgotten")
        for digest, what, wall_s in () if args.json else rows:
            when = time.strftime("%Y-%m-%d", time.localtime(wall_s))
            print(f"{digest[:16]}  {when}  {what}")
        return 0
    if not args.source and not args.sample:
        raise ConfigError("nothing to forget", hint="name a --source or a --sample")
    done = upkeep.forget(store, sources=_digests(args.source), samples=args.sample)
    code = 1 if done.left or done.doubtful else 0
    if args.json:
        _print(dataclasses.asdict(done))
        return code
    for line in done.entries:
        print(f"erased {line}")
    print(f"{len(done.entries)} results and {done.rows} rows erased; "
          f"{len(done.tombstones)} tombstones; a full scan finds {done.left} left")  # fmt: skip
    if done.descendants:
        print("made from it, copies elsewhere included: " + ", ".join(done.descendants))
    for name in done.doubtful:
        print(f"damaged: lineage {name}; rows made from other rows may have been missed")
    return code


def _digests(sources: list[str]) -> list[str]:
    """Return the sources, and the digests of those that are files."""
    found = list(sources)
    for source in sources:
        try:
            found.append(digest_file(source))
        except OSError:
            continue  # a digest, or a file that is gone already
    return found


def _entry(store: Store, prefix: str) -> Entry:
    found = (store.index.find(prefix) if prefix else []) or store.index.entries(prefix)[:1]
    if len(found) != 1:
        raise ConfigError(
            f"{len(found)} results have a key that begins with {prefix!r}, and no node has that "
            "name",
            hint="`trainonce graph ls` lists keys and names",
        )
    return found[0]


def _table(store: Store, key: str) -> Table | None:
    """Return the table of rows whose digest begins with `key`, or whose name it is."""
    tables = [table for table in upkeep.rows_of(store) if table.name]
    found = [table for table in tables if key and table.subgraph.startswith(key)]
    found = found or [table for table in tables if table.name == key]
    return found[0] if found else None


def _table_summary(table: Table) -> dict[str, Any]:
    return {
        "key": table.subgraph, "node": table.name, "rows": table.num_rows,
        "size_bytes": table.size_bytes, "seconds": table.seconds_per_row * table.num_rows,
        "wall_s": table.last_used_s, "has_bytes": True, "parts": table.parts,
    }  # fmt: skip


def _summary(store: Store, entry: Entry) -> dict[str, Any]:
    return {
        "key": entry.key, "node": entry.node, "output": entry.output,
        "size_bytes": entry.size_bytes, "seconds": entry.seconds, "wall_s": entry.wall_s,
        "has_bytes": store.has_bytes(entry), "nondeterministic": entry.nondeterministic,
    }  # fmt: skip


def _print(value: object) -> None:
    print(json.dumps(value, indent=2))
