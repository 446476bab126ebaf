"""Fixtures for tests of data sources."""

from __future__ import annotations

import socket

import datasets
import pytest


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Fails a test that tries to use the network, also without HF_HUB_OFFLINE."""
    connect, tried = socket.socket.connect, []

    def refuse(*args: object, **options: object) -> None:
        tried.append(args)
        raise OSError("a source went to the network")

    def only_local(self: socket.socket, address: object) -> None:  # data loader workers have Unix sockets
        connect(self, address) if self.family == socket.AF_UNIX else refuse()

    monkeypatch.setattr(socket.socket, "connect", only_local)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    yield
    assert not tried
