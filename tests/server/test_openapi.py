"""The server keeps its own OpenAPI document: whatever the document allows, or almost allows, gives no 500."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import status_code_conformance

from tests.server.fakes import FakeEngine, fake_app

SCHEMA = schemathesis.openapi.from_asgi(
    "/openapi.json", fake_app(FakeEngine(lambda prompt, params: [["a"]] * params.n))
)
OPERATIONS = {f"{found.ok().method} {found.ok().path}": found.ok() for found in SCHEMA.get_all_operations()}
BODIES = [(name, mode) for name in OPERATIONS if name.startswith("post") for mode in GenerationMode]
PLAIN = [(name, GenerationMode.POSITIVE) for name in OPERATIONS if name.startswith("get")]


@pytest.mark.parametrize(("operation", "mode"), BODIES + PLAIN)
def test_no_request_is_a_fault_of_the_server(operation: str, mode: GenerationMode) -> None:
    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(OPERATIONS[operation].as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=[not_a_server_error, status_code_conformance])

    check()
