"""The store against a model of itself: a dictionary that forgets bytes but never outputs."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

import trainonce as once
from trainonce.graph import upkeep
from trainonce.graph.digest import digest
from trainonce.graph.index import Entry

keys = st.sampled_from([f"key{n}" for n in range(5)])
contents = st.integers(0, 3)


class StoreMachine(RuleBasedStateMachine):
    """Commits, evicts, damages, deletes, collects, reopens, in any order."""

    claims = Bundle("claims")

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = once.open_store(self.folder)
        self.outputs: dict[str, str] = {}
        self.values: dict[str, list] = {}
        self.held: dict[str, object] = {}
        self.pinned: set[str] = set()

    def teardown(self):
        self.store.close()
        shutil.rmtree(self.folder)

    @rule(target=claims, key=keys)
    def claim(self, key):
        claim = self.store.claim(key, "owner")
        assert (claim is None) == (key in self.held)
        if claim is not None:
            self.held[key] = claim
        return key

    @rule(key=consumes(claims), content=contents, seconds=st.floats(0, 9))
    def commit(self, key, content, seconds):
        claim = self.held.pop(key, None)
        value = [key, np.full(10 + content, content)]
        before = self.outputs.get(key)
        has_bytes = before is not None and self.load(key) is not None
        entry = Entry(key=key, node="n", output=digest(value), seconds=seconds)
        stands = self.store.commit(entry, value, claim=claim)
        if has_bytes and before != entry.output:
            assert stands.output == before  # the first writer wins
        else:
            assert stands.output == entry.output
            self.outputs[key], self.values[key] = stands.output, value
            # Other bytes than the pinned ones: the pin stays with the old blob.
            if before != entry.output:
                self.pinned.discard(key)

    @rule(key=consumes(claims))
    def release(self, key):
        claim = self.held.pop(key, None)
        if claim is not None:
            self.store.release(claim)

    @rule(budget=st.integers(0, 2000))
    def collect(self, budget):
        upkeep.collect(self.store, budget)
        assert all(self.load(key) is not None for key in self.pinned)

    @rule(key=keys)
    def pin(self, key):
        if self.load(key) is not None:
            self.store.pin(key)
            self.pinned.add(key)

    @rule(key=keys, how=st.sampled_from(["flip", "delete", "truncate"]))
    def damage(self, key, how):
        entry = self.store.lookup(key)
        path = self.store.blobs._path(entry.blob) if entry else None
        if path is None or not path.exists():
            return
        data = bytearray(path.read_bytes())
        path.unlink()
        if how == "flip":
            data[len(data) // 2] ^= 4
            path.write_bytes(data)
        elif how == "truncate":
            path.write_bytes(data[:-1])
        self.pinned -= {k for k in self.pinned if self.store.lookup(k).blob == entry.blob}

    @rule()
    def reopen(self):
        self.store.close()
        self.store = once.open_store(self.folder)

    @rule()
    def verify(self):
        upkeep.verify(self.store)
        assert upkeep.verify(self.store).damaged == []

    @invariant()
    def outputs_outlive_bytes_and_bytes_are_right(self):
        for key, output in self.outputs.items():
            assert self.store.lookup(key).output == output
            value = self.load(key)
            assert value is None or digest(value) == output == digest(self.values[key])

    def load(self, key):
        entry = self.store.lookup(key)
        loaded = self.store.load(entry) if entry is not None else None
        return None if loaded is None else loaded.value


StoreMachine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestStore = StoreMachine.TestCase
