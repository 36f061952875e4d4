"""One studio for all tests of a process that need a worker, which takes seconds to start."""

from __future__ import annotations

import pytest

from support.studio import serving


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("studio")) as (client, queue):
        client.folder, client.queue = queue.folder, queue
        yield client
