"""Whatever the schema allows, and what it does not: nothing makes the server fail."""

from __future__ import annotations

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from support.studio import Actor, finishes, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    class Finishing(Actor):
        def tell(self, **message):
            if message["do"] == "draw":
                finishes(self, message)
            elif message["do"] == "plan":
                self.say("plan", id=message["id"], kind="request", message="no plan")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sfumato.jobs.queue.Process", Finishing)
        patch.setattr("sfumato.jobs.queue.MOST_JOBS", 10**6)
        patch.setattr("sfumato.jobs.queue.MOST_OF_CLIENT", 10**6)
        with serving(tmp_path_factory.mktemp("studio")) as (client, queue):
            client.queue = queue
            yield client


@pytest.fixture(scope="module")
def described(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_no_request_makes_the_server_fail(described):
    asked = set()
    for found in described.exclude(path="/api/events").get_all_operations():
        operation = found.ok()

        @settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def check(case):
            answer = case.call(timeout=20)
            starting = case.path == "/api/plan" and answer.status_code == 503
            assert answer.status_code < 500 or starting, answer.text
            if answer.status_code >= 400 and answer.text:
                assert json.loads(answer.text)["error"].keys() == {"message", "type", "param", "code"}
            asked.add((case.method, case.path))

        check()
    assert len(asked) > 40


def test_every_route_is_in_the_schema(server):
    paths = server.get("/openapi.json")["paths"]
    wanted = {
        "/api/health", "/api/models", "/api/samplers", "/api/plan", "/api/jobs", "/api/jobs/{id}", "/api/events",
        "/api/images", "/api/images/{key}", "/api/images/{key}/file", "/api/images/{key}/thumb",
        "/api/images/{key}/restore", "/api/recipe", "/v1/images/generations", "/v1/images/edits", "/v1/models",
        "/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/sdapi/v1/progress", "/sdapi/v1/options", "/sdapi/v1/png-info",
    }  # fmt: skip
    assert wanted <= paths.keys()
