"""Capture is tested against every Postgres there is: the embedded one, and the system's."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster import Cluster, installed_servers
from tests.conftest import StoreServer

EMBEDDED = "18"
SERVERS = {EMBEDDED: None, **{major: binaries for major, binaries in installed_servers().items() if major != EMBEDDED}}


@pytest.fixture(scope="session")
def servers() -> Iterator[dict[str, Any]]:
    """The servers that run already, by major version."""
    running: dict[str, Any] = {EMBEDDED: StoreServer()}
    yield running
    for server in running.values():
        if isinstance(server, Cluster):
            server.remove()


@pytest.fixture(params=sorted(SERVERS, reverse=True))
def source_server(request: pytest.FixtureRequest, servers: dict[str, Any]) -> Any:
    major = request.param
    if major not in servers:
        servers[major] = Cluster(f"postgres-{major}", SERVERS[major]).start()
    return servers[major]


@pytest.fixture
def quick_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers of this process come round often, so that a test need not wait for them."""
    from capture import reader

    monkeypatch.setattr(reader, "IDLE_WAIT_S", 0.03)
    monkeypatch.setattr(reader, "LOOK_AT_WISHES_EVERY_S", 0.03)
