"""Requests drawn from the server's own description of its endpoints: none of them ends in an error 500."""

from __future__ import annotations

from typing import Any

import pytest
from asking_http import answered, completion
from running import ADMIN_KEY

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

EXAMPLES = 25


def test_no_request_to_the_operators_side_is_an_error_of_the_server(server: Any) -> None:
    with server.http(ADMIN_KEY) as http:
        described = http.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(described).include(path_regex="^/v1/steerings")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 6
    statuses: set[int] = set()

    def asks(operation: Any) -> None:
        modes = st.one_of(
            *(operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode)
        )

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(modes)
        def ask(case: Any) -> None:
            response = case.call(base_url=server.root, headers={"Authorization": f"Bearer {ADMIN_KEY}"})
            statuses.add(response.status_code)
            assert response.status_code < 500, response.text

        ask()

    for operation in operations:
        asks(operation)
    assert statuses & {200, 201}
    assert statuses & {400, 404}
    with server.http() as http:
        assert answered(http, completion("the tower", "experts"))["steersman"]["steering"] == "experts"
