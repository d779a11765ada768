"""The transforms of the documents do what is said of them."""
from __future__ import annotations

import json
import re
from typing import Any

import pytest

from consumers.lua.transformer import Transformer, check
from tests.conftest import ROOT
from tests.lua.world import call

DOCUMENTS = ("moving.md", "transform.md")
METADATA = {"table_schema": "public", "table_name": "orders", "commit_timestamp": "2026-11-24T10:00:00Z"}


def transforms(document: str) -> list[str]:
    return re.findall(r"^```lua\n(.*?)^```$", (ROOT / "docs" / document).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_each_compiles(document: str) -> None:
    found = [text for text in transforms(document) if "function transform" in text]
    assert found
    for text in found:
        assert check(text) is None


@pytest.mark.parametrize(("action", "record", "changes", "expected"), [
    ("insert", {"id": 1, "note": None}, None, {"type": "INSERT", "record": {"id": 1, "note": None}, "old_record": None}),
    ("update", {"id": 1, "note": "b"}, {"note": None}, {"type": "UPDATE", "record": {"id": 1, "note": "b"}, "old_record": {"id": 1, "note": None}}),
    ("delete", {"id": 1}, None, {"type": "DELETE", "record": None, "old_record": {"id": 1}}),
])  # fmt: skip
def test_the_payload_of_supabase(action: str, record: Any, changes: Any, expected: dict[str, Any]) -> None:
    [text] = transforms("moving.md")
    one = Transformer(text)
    try:
        [result] = one.run([call(record, action=action, changes=changes, metadata=METADATA)])
    finally:
        one.close()
    assert isinstance(result, bytes), result
    assert json.loads(result) == {"schema": "public", "table": "orders", **expected}
