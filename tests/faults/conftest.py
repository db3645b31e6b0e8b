"""Fixtures of tests that inject faults into real processes."""

import pytest
from forking import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Starts commands of jaxtune; see `Server`."""
    with Server(tmp_path_factory.mktemp("commands")) as server:
        yield server
