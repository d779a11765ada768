"""What the API answers is what its OpenAPI document says, errors included: no field more, no status more."""
from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from tests.api.test_management import Api, source_body
from tests.conftest import SourceDatabase

pytestmark = pytest.mark.django_db(transaction=True)


class Checked:
    """Calls the API, and holds each answer against the document."""

    def __init__(self) -> None:
        self.api = Api()
        answer = self.api.client.get("/api/schema?format=json", headers={"authorization": f"Bearer {self.api.plain}"})
        self.document = strict(answer.json())

    def __call__(self, method: str, path: str, body: Any = None, *, at: str | None = None, expect: int = 200) -> Any:
        status, answer = self.api(method, path, body)
        assert status == expect, answer
        operation = self.document["paths"][f"/api/{at or path.partition('?')[0]}"][method.lower()]
        content = operation["responses"][str(status)].get("content")
        if content is None:
            assert answer is None
        else:
            schema = {**content["application/json"]["schema"], "components": self.document["components"]}
            jsonschema.validate(answer, schema)
        return answer


def strict(part: Any) -> Any:
    """OpenAPI 3.0 as JSON schema, with nothing allowed that is not named."""
    if isinstance(part, list):
        return [strict(item) for item in part]
    if not isinstance(part, dict):
        return part
    made = {name: strict(value) for name, value in part.items()}
    if isinstance(made.get("properties"), dict):
        made.setdefault("additionalProperties", False)
    if made.pop("nullable", False):
        made = {"anyOf": [made, {"type": "null"}]}
    return made


def test_every_answer_is_as_the_document_says(transactional_db: None, source_database: SourceDatabase) -> None:
    source_database.execute("CREATE TABLE orders (id int PRIMARY KEY, status text)")
    call = Checked()
    call("POST", "sources", source_body(source_database), expect=201)
    call("POST", "sources", {}, expect=422)
    call("GET", "sources")
    call("GET", "sources/none", at="sources/{name}", expect=404)
    paused = call("PATCH", "sources/shop", {"status": "paused"}, at="sources/{name}")
    assert paused["warning"] and call("PATCH", "sources/shop", paused, at="sources/{name}")["status"] == "paused"
    call("PATCH", "sources/shop", {"status": "active"}, at="sources/{name}")
    for what in ("tables", "events"):
        call("GET", f"sources/shop/{what}", at=f"sources/{{name}}/{what}")
    for what in ("check", "acknowledge_gap"):
        call("POST", f"sources/shop/{what}", at=f"sources/{{name}}/{what}")
    call("POST", "http_endpoints", {"name": "hook", "url": "https://example.com/"}, expect=201)
    call("GET", "http_endpoints?limit=x", expect=400)
    consumer = {"name": "c", "source": "shop", "kind": "pull", "tables": ["public.orders"], "where": "old.status = 'x'"}
    assert call("POST", "consumers", consumer, expect=201)["notices"]
    call("GET", "consumers")
    one = "consumers/{name}"
    read = call("GET", "consumers/c", at=one)
    assert call("PATCH", "consumers/c", read, at=one)["id"] == read["id"], "what was read may be sent back"
    call("PATCH", "consumers/c", {"ack_wait_ms": 5000}, at=one)
    for what in ("pause", "resume"):
        call("POST", f"consumers/c/{what}", at=f"{one}/{what}")
    of = "consumers/{consumer}"
    message = {"record": {"id": 1, "status": "x"}, "metadata": {"table_schema": "public", "table_name": "orders"}}
    call("POST", "consumers/c/test", {"messages": [message]}, at=f"{of}/test")
    call("POST", "consumers/c/test", {"where": "1 / (id - 1) = 1", "messages": [message]}, at=f"{of}/test")
    call("GET", "consumers/c/messages", at=f"{of}/messages")
    call("POST", "consumers/c/messages/retry", {"state": "dead"}, at=f"{of}/messages/retry")
    call("POST", "consumers/c/rewind", {"to": "beginning"}, at=f"{of}/rewind")
    call("POST", "consumers/c/rewind", {"to": {"pk": ["1"]}}, at=f"{of}/rewind", expect=409)
    call("POST", "consumers/c/republish", {"from": "table", "dry_run": True}, at=f"{of}/republish")
    call("POST", "consumers/c/republish", {"from": "table"}, at=f"{of}/republish", expect=201)
    backfill = call("POST", "backfills", {"consumer": "c", "table": "public.orders"}, expect=201)["id"]
    call("GET", f"backfills/{backfill}", at="backfills/{backfill}")
    call("PATCH", f"backfills/{backfill}", {"status": "paused"}, at="backfills/{backfill}")
    call("POST", f"backfills/{backfill}/pause", at="backfills/{backfill}/pause", expect=409)
    call("DELETE", f"backfills/{backfill}", at="backfills/{backfill}", expect=204)
    for prefix in ("http_pull_consumers", "sequin_streams"):
        call("POST", f"{prefix}/c/receive", {"batch_size": 1}, at=f"{prefix}/{{consumer}}/receive")
        for word in ("ack", "nack", "extend"):
            call("POST", f"{prefix}/c/{word}", {"ack_ids": ["x"]}, at=f"{prefix}/{{consumer}}/{word}")
    call("DELETE", "sources/shop", at="sources/{name}", expect=409)
    call("DELETE", "consumers/c?discard=true", at=one, expect=204)
