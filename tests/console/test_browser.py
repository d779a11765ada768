"""The console in a browser: from nothing to a message, a broken endpoint found and mended; wide, narrow, light and dark."""
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from playwright.sync_api import Browser, expect
from psycopg import sql

from tests.conftest import wait_until
from tests.console.browser import PASSWORD, POOR_CONTRAST, Console, chromium
from tests.installation import Installation, temporary
from tests.push.endpoint import Endpoint, status

EVIL = "<img src=x onerror=\"window.pwned=1\"><script>window.pwned=1</script>'\"><svg onload=alert(1)>"
EVIL_NAME = 'o<img src=x onerror="window.pwned=1">'  # of a table; without a dot


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def installation(browser: Browser) -> Iterator[Installation]:
    with temporary("--no-playground", SEQUIN_ADMIN_PASSWORD=PASSWORD, SEQUIN_WORKERS="1") as made:
        yield made


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.close()


@pytest.fixture(scope="module")
def shop(installation: Installation) -> Iterator[psycopg.Connection[Any]]:
    """A database of a user's, with a role that may replicate."""
    with installation.store() as server:
        server.execute("CREATE ROLE shop LOGIN REPLICATION PASSWORD 'shop-password'")
        server.execute("CREATE DATABASE shop OWNER shop")
        host, port = server.info.host, server.info.port
    with psycopg.connect(host=host, port=port, user="shop", password="shop-password", dbname="shop", autocommit=True) as conn:
        conn.execute("CREATE TABLE orders (id int PRIMARY KEY, status text, total numeric)")
        conn.execute(sql.SQL("CREATE TABLE {} (id int PRIMARY KEY, text text)").format(sql.Identifier(EVIL_NAME)))
        yield conn


@pytest.fixture(scope="module")
def console(browser: Browser, installation: Installation) -> Console:
    return Console(browser, installation.url)


def test_the_whole_way(console: Console, installation: Installation, shop: Any, endpoint: Endpoint) -> None:
    """From an empty product to both kinds of consumer; a change arrives; the endpoint breaks, the reason is found, and mended."""
    page = console.page
    expect(page.get_by_role("heading", name="From your database to a message")).to_be_visible()

    page.get_by_role("link", name="Connect a database").first.click()
    page.get_by_label("Name").fill("shop")
    page.get_by_label("Connection URL").fill(f"postgresql://shop:wrong@{shop.info.host}:{shop.info.port}/shop")
    page.get_by_role("button", name="Check the connection").click()
    expect(page.locator("#checked")).to_contain_text("Not ready yet")
    expect(page.locator("#checked")).to_contain_text("password authentication failed")
    page.get_by_label("Connection URL").fill(f"postgresql://shop:shop-password@{shop.info.host}:{shop.info.port}/shop")
    page.get_by_role("button", name="Check the connection").click()
    expect(page.get_by_role("heading", name="Ready to connect")).to_be_visible()
    page.get_by_label("public.orders").check()
    page.get_by_role("button", name="Connect", exact=True).click()
    page.wait_for_url(re.compile(r"/admin/consumers/source/[0-9a-f-]{36}/$"))
    expect(page.locator("#findings")).to_contain_text("wal_level is logical")
    assert "shop-password" not in page.content()

    page.get_by_role("link", name="Add a consumer").click()
    page.get_by_label("Name", exact=True).fill("orders-pull")
    page.get_by_label("public.orders").check()
    page.get_by_role("button", name="Create the consumer").click()
    page.wait_for_url(re.compile(r"tab=code"))
    expect(page.locator("pre").first).to_contain_text("/api/http_pull_consumers/orders-pull/receive")

    console.go("/admin/consumers/consumer/add/")
    page.get_by_label("Name", exact=True).fill("orders-push")
    page.get_by_label("public.orders").check()
    page.get_by_label("Push", exact=False).check()
    page.get_by_label("URL", exact=True).fill(endpoint.url)
    page.get_by_label("Secret headers").fill("authorization: Bearer hush-hush")
    page.get_by_role("button", name="Send a test message").click()
    expect(page.locator("#tried")).to_contain_text("answered 204")
    assert endpoint.got[-1].headers["authorization"] == "Bearer hush-hush" and endpoint.got[-1].json["metadata"]["test"]
    page.get_by_role("button", name="Create the consumer").click()
    page.wait_for_url(re.compile(r"tab=code"))
    assert "hush-hush" not in page.content()

    # A change, seen by both.
    page.get_by_role("link", name="Messages").click()
    expect(page.locator("#messages")).to_contain_text("No message yet")
    shop.execute("INSERT INTO orders VALUES (1, 'pending', 10.50)")
    expect(page.locator("#messages")).to_contain_text("Delivered")  # by itself: the list is live
    expect(page.locator("#messages")).to_contain_text("10.50")
    assert [m["data"]["record"]["id"] for m in installation.receive("orders-pull", wait="10s")] == [1]

    # The endpoint breaks; the reason is two clicks away.
    endpoint.answer = status(500)
    shop.execute("UPDATE orders SET status = 'paid' WHERE id = 1")
    expect(page.locator("#messages")).to_contain_text("To be retried")
    expect(page.locator("#messages")).to_contain_text("answered 500")
    expect(page.locator("#state")).to_have_text("Needs a look")  # by itself too
    console.go("/admin/")
    expect(page.get_by_role("heading", name="Needs you")).to_be_visible()
    page.locator(".sq-needs").get_by_role("link", name="orders-push").first.click()
    with installation.store() as store:  # no attempt comes in between: there is nothing to be retried during one
        later = "UPDATE parked SET not_before = now() + interval '1 hour', due_at = now() + interval '1 hour'"
        wait_until(lambda: store.execute(later).rowcount, 10, "the message to be parked")
    page.get_by_label("State").select_option("parked")
    page.get_by_role("button", name="Search").click()
    page.locator("#messages td[data-label=Message] a").first.click()
    history = page.locator(".sq-history")
    expect(history).to_contain_text("Attempt 1: answered 500")
    expect(history).to_contain_text("Failed, and is tried again")
    history.get_by_text("Request headers").first.click()
    page.evaluate("document.querySelector('#happened').dataset.old = '1'")
    expect(page.locator("#happened:not([data-old])")).to_be_attached()  # fetched anew; what was unfolded stays so
    expect(history.get_by_text("webhook-timestamp: ").first).to_be_visible()
    expect(history).to_contain_text("webhook-timestamp: ")
    expect(history).to_contain_text("authorization: ********")
    assert "hush-hush" not in page.content()

    # Mended, retried, delivered.
    endpoint.answer = status(204)
    page.get_by_role("button", name="Retry now").click()
    expect(page.get_by_text("to be tried again")).to_be_visible()
    expect(history).to_contain_text("Delivered and acknowledged")
    expect(page.locator("#standing")).to_contain_text("Delivered")  # state and buttons follow by themselves
    expect(page.get_by_role("button", name="Deliver once more")).to_be_visible()
    expect(page.get_by_role("button", name="Retry now")).not_to_be_attached()
    console.go("/admin/")
    expect(page.get_by_text("All is well.")).to_be_visible()
    assert console.complaints == [] and console.elsewhere == []


def test_dead_letters_are_retried_and_discarded_after_a_question(console: Console, shop: Any, endpoint: Endpoint) -> None:
    page = console.page
    console.go("/admin/consumers/consumer/")
    page.get_by_role("link", name="orders-push").click()
    page.get_by_role("link", name="Settings").click()
    page.get_by_label("Max deliver").fill("1")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_text("orders-push is saved.")).to_be_visible()
    endpoint.answer = status(400)
    shop.execute("INSERT INTO orders SELECT n, 'dead', n FROM generate_series(10, 12) n")
    here = page.url.partition("?")[0]
    page.goto(f"{here}?state=dead")
    expect(page.locator("#messages tbody tr")).to_have_count(3)
    # A list that was asked for before the tick comes after it.
    page.route("**/messages/?*", lambda route: None)
    with page.expect_request("**/messages/?*"):
        pass
    page.locator("#messages [name=id]").first.check()
    page.evaluate("window.swapped = new Promise((done) => document.addEventListener('htmx:afterOnLoad', done, { once: true })).then(() => 1)")
    page.unroute("**/messages/?*")  # which lets go of it
    assert page.evaluate("window.swapped") == 1
    expect(page.locator("#messages [name=id]").first).to_be_checked()
    page.get_by_role("button", name="Discard these…").click()
    expect(page.get_by_text("Discard 1 message of orders-push?")).to_be_visible()
    page.get_by_role("button", name="Discard 1").click()
    expect(page.get_by_text("1 message discarded.")).to_be_visible()
    endpoint.answer = status(204)
    page.goto(f"{here}?state=dead")
    page.get_by_role("button", name="Retry all…").click()
    expect(page.get_by_text("Retry 2 dead letters of orders-push?")).to_be_visible()
    page.get_by_role("button", name="Retry 2").click()
    expect(page.get_by_text("to be tried again")).to_be_visible()
    page.goto(f"{here}?state=passed&text=dead")
    expect(page.locator("#messages")).to_contain_text("Delivered")
    assert console.complaints == []


def test_nothing_that_strangers_write_becomes_markup(
    console: Console, installation: Installation, shop: Any, endpoint: Endpoint
) -> None:
    """Rows, keys, table names, headers, answers, transaction annotations: shown as text on every page, and nothing runs."""
    shop.execute(sql.SQL("ALTER PUBLICATION sequin_pub ADD TABLE {}").format(sql.Identifier(EVIL_NAME)))

    def answer(got: Any, handler: Any) -> None:
        body = EVIL.encode()
        handler.send_response(500)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    endpoint.answer = answer
    made = installation.call("POST", "/api/http_endpoints", {"name": "evil", "url": endpoint.url, "headers": {"x-evil": EVIL.replace("\n", "")}})
    assert made[0] == 201, made
    consumer = installation.call(
        "POST", "/api/consumers", {"name": "evil", "source": "shop", "kind": "push", "endpoint": "evil", "tables": [f"public.{EVIL_NAME}"]}
    )[1]
    with shop.transaction():
        annotations = json.dumps({"user": EVIL})
        shop.execute("SELECT pg_logical_emit_message(true, 'sequin:transaction_annotations.set', %s)", [annotations])
        shop.execute(sql.SQL("INSERT INTO {} VALUES (7, %s)").format(sql.Identifier(EVIL_NAME)), [EVIL])
    listed = wait_until(
        lambda: installation.call("GET", "/api/consumers/evil/messages?state=parked")[1]["data"], 30, "the push to fail"
    )  # fmt: skip
    endpoint.answer = status(204)
    source = consumer["source_id"]
    pages = [
        "/admin/", f"/admin/consumers/consumer/{consumer['id']}/", f"/admin/consumers/consumer/{consumer['id']}/?tab=code",
        f"/admin/consumers/consumer/{consumer['id']}/?text={EVIL_NAME}&key={EVIL_NAME}", f"/admin/consumers/consumer/{consumer['id']}/change/",
        f"/admin/consumers/consumer/{consumer['id']}/message/{listed[0]['id']}/", f"/admin/consumers/source/{source}/",
        f"/admin/consumers/source/{source}/erase/", "/admin/consumers/consumer/", "/admin/consumers/consumer/add/",
        "/admin/consumers/message/", f"/admin/consumers/message/{listed[0]['id']}/change/", "/admin/consumers/parked/",
        "/admin/consumers/attempt/", "/admin/consumers/httpendpoint/", "/admin/consumers/auditentry/", "/admin/consumers/alertepisode/",
    ]  # fmt: skip
    shown = 0
    for path in pages:
        console.go(path)
        console.settle()
        assert console.page.evaluate("window.pwned") is None, path
        assert console.page.locator("#main img[onerror], #main img[src=x], #main svg[onload]").count() == 0, path
        shown += "onerror=" in console.page.inner_text("body")
    assert shown >= 8  # it was there to be seen, as text
    assert console.complaints == []
    assert installation.call("DELETE", "/api/consumers/evil?discard=true")[0] == 204


PAGES = (
    "/admin/", "/admin/consumers/source/add/", "/admin/consumers/consumer/add/", "/admin/consumers/consumer/",
    "/admin/consumers/alertrule/", "/admin/consumers/auditentry/", "/admin/consumers/apitoken/add/",
)  # fmt: skip


@pytest.mark.parametrize("width, scheme", [(390, "light"), (1440, "light"), (1440, "dark")])
def test_pages_fit_and_are_readable(browser: Browser, installation: Installation, shop: Any, width: int, scheme: str) -> None:
    console = Console(browser, installation.url, width=width, scheme=scheme)
    found = installation.call("GET", "/api/consumers/orders-push")[1]
    own = [f"/admin/consumers/consumer/{found['id']}/", f"/admin/consumers/consumer/{found['id']}/?tab=code", f"/admin/consumers/source/{found['source_id']}/"]
    messages = installation.call("GET", "/api/consumers/orders-push/messages?state=passed")[1]["data"]
    own.append(f"/admin/consumers/consumer/{found['id']}/message/{messages[0]['id']}/")
    for path in (*PAGES, *own):
        console.go(path)
        console.settle()
        assert not console.is_too_wide(), path
        assert console.page.evaluate(POOR_CONTRAST) == [], path
    assert console.complaints == []
    console.context.close()


def test_the_keyboard_suffices(console: Console) -> None:
    page = console.page
    console.go("/admin/")
    link = page.locator("#consumers ~ .sq-cards, .sq-cards").last.get_by_role("link").first
    link.focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"/admin/consumers/consumer/[0-9a-f-]{36}/"))
    page.get_by_label("State").focus()
    for _ in range(4):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent.trim()") == "Search"
    page.set_viewport_size({"width": 390, "height": 800})
    menu = page.get_by_role("button", name="Menu").locator("visible=true")
    expect(page.get_by_role("link", name="Endpoints")).not_to_be_visible()
    menu.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("link", name="Endpoints")).to_be_visible()
    page.set_viewport_size({"width": 1440, "height": 900})
    console.go("/admin/consumers/consumer/add/")
    page.locator("[data-editor=sql] .cm-content").focus()
    page.keyboard.type("status = 'paid'")
    page.keyboard.press("Escape")
    assert page.locator("[name=where]").input_value() == "status = 'paid'"
    page.keyboard.press("Tab")  # the editor is no trap
    assert page.evaluate("!document.activeElement.shadowRoot")
