"""One server for all tests of this folder that only talk to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.server import Server, serve


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("server"), max_model_len=2048) as running:
        yield running
