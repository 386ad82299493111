"""The shared half of a store, over every service that is at hand.

A folder always; an S3 server where moto is installed, or where TRAINONCE_TEST_S3 names the
endpoint of one (moto's `moto_server`, say) on the loopback interface.
"""

import importlib.util
import os
import socket
import subprocess
import sys
import urllib.request

import numpy as np
import obstore
import pytest

import trainonce as once
from trainonce.clock import FakeClock
from trainonce.errors import LeaseLostError
from trainonce.graph import upkeep
from trainonce.graph.places import Place
from trainonce.graph.remote import Remote, open_remote
from trainonce.graph.store import Store


@once.node(version="1")
def square(n):
    return np.arange(n) ** 2


@pytest.fixture(scope="module")
def endpoint():
    given = os.environ.get("TRAINONCE_TEST_S3")
    if given:
        yield given
        return
    if importlib.util.find_spec("moto") is None:
        pytest.skip("needs moto's S3 server: pip install 'moto[server]', or TRAINONCE_TEST_S3")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        while "Running on" not in server.stderr.readline():
            assert server.poll() is None, "the S3 server ended"
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


@pytest.fixture(params=["folder", "s3"])
def shared(request, tmp_path):
    """Return a function that opens the same shared service anew."""
    if request.param == "folder":
        return lambda: open_remote((tmp_path / "shared").as_uri())
    endpoint = request.getfixturevalue("endpoint")
    bucket = f"b{os.getpid()}-{abs(hash(str(tmp_path))) % 10**9}"
    put = urllib.request.Request(f"{endpoint}/{bucket}", method="PUT")
    urllib.request.urlopen(put).close()
    options = {
        "endpoint": endpoint, "access_key_id": "x", "secret_access_key": "x",
        "region": "us-east-1", "client_options": {"allow_http": True},
    }  # fmt: skip
    return lambda: open_remote(f"s3://{bucket}/store", **options)


@pytest.fixture
def host(shared, tmp_path):
    """Return a function that gives another host its store: a front of its own, one back."""
    made = []

    def take(**options):
        made.append(None)
        return Store(Place(tmp_path / f"host{len(made)}"), remote=shared(), **options)

    return take


def test_what_one_host_computed_another_reads(host):
    first, second = host(), host()
    expected = once.compute(square(20), store=first)
    plan = once.compute(square(20), store=second, dry_run=True)
    assert [step.action for step in plan.steps] == ["hit"]
    assert np.array_equal(once.compute(square(20), store=second), expected)
    assert second.blobs.has(second.index.entries()[0].blob)  # read through, and kept
    assert not first.troubles
    assert not second.troubles


def test_a_claim_of_one_host_is_seen_by_the_other_and_fenced_when_it_stalls(shared):
    clock = FakeClock()
    hosts = [Remote(shared(), expiry_s=10.0, clock=clock) for _ in range(3)]
    lease = hosts[0].claim("k", "a")
    assert hosts[1].claim("k", "b") is None
    clock.advance(9.0)
    lease.renew()
    assert hosts[1].claim("k", "b") is None
    assert hosts[2].claim("k", "c") is None
    clock.advance(10.0)
    taken = [hosts[1].claim("k", "b"), hosts[2].claim("k", "c")]
    assert [t is not None for t in taken] == [True, False]
    with pytest.raises(LeaseLostError, match="token 2"):
        lease.renew()
    taken[0].release()
    assert not hosts[0].is_claimed("k")
    assert hosts[0].claim("k", "a").token == 3


def test_the_first_host_to_commit_wins(shared):
    hosts = [Remote(shared()) for _ in range(2)]
    assert hosts[0].create_entry("k", {"output": "a"})
    assert not hosts[1].create_entry("k", {"output": "b"})
    assert hosts[1].get_entry("k") == {"output": "a"}


def test_a_damaged_or_forged_object_is_a_miss(shared, host):
    first = host()
    once.compute(square(8), store=first)
    service = shared()
    names = [item["path"] for batch in obstore.list(service) for item in batch]
    for name in names:
        if name.startswith(("blobs/", "entries/")):
            data = bytearray(obstore.get(service, name).bytes())
            data[-3] ^= 1
            obstore.put(service, name, bytes(data))
    second = host()
    assert once.compute(square(8), store=second).tolist() == [n * n for n in range(8)]
    third = host()
    assert once.compute(square(8), store=third, dry_run=True).steps[0].action == "hit"
    assert third.load(third.lookup(third.remote.get_entry and first.index.entries()[0].key))


def test_tenants_of_one_service_share_nothing(host):
    stores = [host(tenant="a"), host(tenant="b"), host()]
    for store in stores:
        assert once.compute(square(5), store=store, dry_run=True).steps[0].action == "run"
        once.compute(square(5), store=store)
    assert once.compute(square(5), store=host(tenant="a"), dry_run=True).steps[0].action == "hit"


def test_forgetting_reaches_the_fronts_of_other_hosts_when_they_open(host, tmp_path):
    source = tmp_path / "source"
    source.write_text("abc")

    @once.node(version="1")
    def size(path):
        with open(path) as file:
            return len(file.read())

    first, second = host(), host()
    once.compute(size(once.File(source)), store=first)
    once.compute(size(once.File(source)), store=second)
    assert upkeep.forget(first, sources=[str(source)]).left == 0
    again = Store(second.place, remote=second.remote._store)
    assert once.compute(size(once.File(source)), store=again, dry_run=True).steps[0].action == "run"
    assert (
        once.compute(size(once.File(source)), store=host(), dry_run=True).steps[0].action == "run"
    )


def test_a_service_that_is_gone_costs_only_the_sharing(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    service = open_remote(
        "s3://bucket/store", endpoint=f"http://127.0.0.1:{port}", access_key_id="x",
        secret_access_key="x", region="us-east-1", client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )  # fmt: skip
    store = Store(Place(tmp_path), remote=service)
    assert once.compute(square(3), store=store).tolist() == [0, 1, 4]
    assert any("shared store" in trouble for trouble in store.troubles)
    assert once.compute(square(3), store=store, dry_run=True).steps[0].action == "hit"
