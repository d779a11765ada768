"""The client of F21, a process of its own: takes all there is, keeps the last message of each row, and sees what goes back.

It imports nothing of ours, so that it starts at once. It knows a repeat by row and number: what it has taken of late may come
again, when the answer to its ack was lost or the store crashed.
"""
from __future__ import annotations

import http.client
import json
from array import array
from collections import deque
from http.client import HTTPException
from typing import Any

import psycopg

CONSUMER = "copy"
LATELY = 300  # receives
BATCH = 1_000


class Copy:
    """The rows as the messages say: of each its highest number, and whether it is there."""

    def __init__(self, rows: int) -> None:
        self.numbers = array("q", bytes(8 * (rows + 2)))
        self.present = bytearray(rows + 2)
        self.lately: deque[set[tuple[int, int]]] = deque(maxlen=LATELY)
        self.taken = self.repeats = 0
        self.gone_back: list[str] = []

    def take(self, messages: list[dict[str, Any]]) -> None:
        self.lately.append(set())
        for message in messages:
            data = message["data"]
            record, changes = data["record"], data["changes"] or {}
            self.taken += 1
            key, number = record["id"], record["n"]
            if not self.note(key, number, data["action"]):
                continue
            self.present[key] = data["action"] != "delete"
            if "id" in changes and self.note(changes["id"], changes["n"], "update away"):
                self.present[changes["id"]] = False

    def note(self, key: int, number: int, action: str) -> bool:
        """False when it is a repeat."""
        version = (key, number)
        if number < self.numbers[key]:
            if any(version in taken for taken in self.lately):
                self.repeats += 1
            else:
                self.gone_back.append(f"{action} of {key}: {number} after {self.numbers[key]}")
            return False
        self.numbers[key] = number
        self.lately[-1].add(version)
        return True

    def differing(self, conn: psycopg.Connection[Any]) -> tuple[int, int]:
        """How many rows the table has, and how many are others here."""
        there = wrong = 0
        expected = bytearray(len(self.present))
        with conn.cursor().copy("COPY big (id, n) TO STDOUT") as copy:
            for line in copy.rows():
                key, number = int(line[0]), int(line[1])  # type: ignore[arg-type]
                there += 1
                expected[key] = 1
                wrong += self.numbers[key] != number or not self.present[key]
        wrong += sum(1 for is_there, here in zip(expected, self.present, strict=True) if here and not is_there)
        return there, wrong


def take(port: int, token: str, source: str, rows: int, seen_last: Any, stop: Any, answer: Any) -> None:
    """The client's process."""
    copy = Copy(rows)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    while not stop.is_set():
        conn = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        try:
            while not stop.is_set():
                conn.request("GET", f"/api/http_pull_consumers/{CONSUMER}/receive?batch_size={BATCH}&wait_for=1s", headers=headers)
                response = conn.getresponse()
                body = response.read()
                if response.status != 200:
                    stop.wait(0.1)
                    continue
                messages = json.loads(body)["data"]
                if not messages:
                    continue
                copy.take(messages)
                if copy.present[rows + 1]:
                    seen_last.set()
                conn.request("POST", f"/api/http_pull_consumers/{CONSUMER}/ack", json.dumps({"ack_ids": [m["ack_id"] for m in messages]}), headers)
                conn.getresponse().read()
        except (OSError, HTTPException, ValueError):
            stop.wait(0.1)
        finally:
            conn.close()
    with psycopg.connect(source) as conn:
        answer.send((*copy.differing(conn), copy.taken, copy.repeats, copy.gone_back[:5]))
