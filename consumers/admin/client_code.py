"""Ready-to-paste client code with a consumer's name and this server's address in it. Pure.

The token stays a placeholder: tokens are shown once, when they are made.
"""
from __future__ import annotations

from typing import NamedTuple

PULL = {
    "curl": """\
export SEQUIN_TOKEN=…
# Receive up to 10 messages, waiting up to a minute for the first:
curl -s -H "Authorization: Bearer $SEQUIN_TOKEN" \\
  "{url}/api/http_pull_consumers/{name}/receive?batch_size=10&wait_for=60s"
# Acknowledge what you have dealt with, by its ack_id:
curl -s -H "Authorization: Bearer $SEQUIN_TOKEN" -H "Content-Type: application/json" \\
  -d '{{"ack_ids": ["…"]}}' {url}/api/http_pull_consumers/{name}/ack
""",
    "Python": """\
import os, requests

base = "{url}/api/http_pull_consumers/{name}"
session = requests.Session()
session.headers["Authorization"] = "Bearer " + os.environ["SEQUIN_TOKEN"]

while True:
    answer = session.get(base + "/receive", params={{"batch_size": 100, "wait_for": "60s"}}, timeout=70)
    answer.raise_for_status()
    messages = answer.json()["data"]
    for message in messages:
        data = message["data"]
        print(data["action"], data["metadata"]["table_name"], data["record"])
    if messages:
        ids = [message["ack_id"] for message in messages]
        session.post(base + "/ack", json={{"ack_ids": ids}}, timeout=30).raise_for_status()
""",
    "JavaScript": """\
const base = "{url}/api/http_pull_consumers/{name}";
const headers = {{ Authorization: "Bearer " + process.env.SEQUIN_TOKEN, "Content-Type": "application/json" }};

for (;;) {{
  const answer = await fetch(base + "/receive?batch_size=100&wait_for=60s", {{ headers }});
  if (!answer.ok) throw new Error(await answer.text());
  const {{ data: messages }} = await answer.json();
  for (const {{ data }} of messages) console.log(data.action, data.metadata.table_name, data.record);
  if (messages.length) {{
    const ack_ids = messages.map((message) => message.ack_id);
    await fetch(base + "/ack", {{ method: "POST", headers, body: JSON.stringify({{ ack_ids }}) }});
  }}
}}
""",
    "Go": """\
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log"
	"net/http"
	"os"
)

const base = "{url}/api/http_pull_consumers/{name}"

func call(method, path string, body []byte, into any) {{
	request, _ := http.NewRequest(method, base+path, bytes.NewReader(body))
	request.Header.Set("Authorization", "Bearer "+os.Getenv("SEQUIN_TOKEN"))
	request.Header.Set("Content-Type", "application/json")
	answer, err := http.DefaultClient.Do(request)
	if err != nil {{
		log.Fatal(err)
	}}
	defer answer.Body.Close()
	if answer.StatusCode != 200 {{
		log.Fatal(answer.Status)
	}}
	if err := json.NewDecoder(answer.Body).Decode(into); err != nil {{
		log.Fatal(err)
	}}
}}

func main() {{
	for {{
		var received struct {{
			Data []struct {{
				AckID string          `json:"ack_id"`
				Data  json.RawMessage `json:"data"`
			}} `json:"data"`
		}}
		call("GET", "/receive?batch_size=100&wait_for=60s", nil, &received)
		ids := []string{{}}
		for _, message := range received.Data {{
			fmt.Println(string(message.Data))
			ids = append(ids, message.AckID)
		}}
		if len(ids) > 0 {{
			body, _ := json.Marshal(map[string]any{{"ack_ids": ids}})
			var done map[string]any
			call("POST", "/ack", body, &done)
		}}
	}}
}}
""",
}
PUSH = {
    "curl": """\
# Ask for what is waiting or stuck, and have dead letters tried again:
export SEQUIN_TOKEN=…
curl -s -H "Authorization: Bearer $SEQUIN_TOKEN" "{url}/api/consumers/{name}/messages?state=parked"
curl -s -H "Authorization: Bearer $SEQUIN_TOKEN" -H "Content-Type: application/json" \\
  -d '{{"state": "dead"}}' {url}/api/consumers/{name}/messages/retry
""",
    "Python": """\
# pip install standardwebhooks flask
import os
from flask import Flask, request
from standardwebhooks import Webhook

app = Flask(__name__)
webhook = Webhook(os.environ["SIGNING_SECRET"])  # whsec_…, of the endpoint {endpoint}

@app.post("{path}")
def hook():
    body = webhook.verify(request.get_data(), dict(request.headers))
    for message in {python_messages}:
        # The same idempotency_key comes again when a delivery is repeated.
        print(message["metadata"]["idempotency_key"], message["action"], message["record"])
    return "", 204
""",
    "JavaScript": """\
// npm install express standardwebhooks
import express from "express";
import {{ Webhook }} from "standardwebhooks";

const webhook = new Webhook(process.env.SIGNING_SECRET); // whsec_…, of the endpoint {endpoint}
const app = express();
app.post("{path}", express.raw({{ type: "*/*" }}), (request, response) => {{
  const body = webhook.verify(request.body.toString(), request.headers);
  for (const message of {js_messages}) {{
    // The same idempotency_key comes again when a delivery is repeated.
    console.log(message.metadata.idempotency_key, message.action, message.record);
  }}
  response.sendStatus(204);
}});
app.listen(3000);
""",
    "Go": """\
// go get github.com/standard-webhooks/standard-webhooks/libraries
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"

	webhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
)

func main() {{
	webhook, err := webhooks.NewWebhook(os.Getenv("SIGNING_SECRET")) // whsec_…, of the endpoint {endpoint}
	if err != nil {{
		panic(err)
	}}
	http.HandleFunc("{path}", func(answer http.ResponseWriter, request *http.Request) {{
		body, _ := io.ReadAll(request.Body)
		if err := webhook.Verify(body, request.Header); err != nil {{
			answer.WriteHeader(401)
			return
		}}
		fmt.Println(string(body))
		answer.WriteHeader(204)
	}})
	http.ListenAndServe(":3000", nil)
}}
""",
}


class Example(NamedTuple):
    language: str
    text: str


def pull(url: str, name: str) -> list[Example]:
    """Clients that receive and acknowledge."""
    return [Example(language, text.format(url=url, name=name)) for language, text in PULL.items()]


def push(url: str, name: str, *, endpoint: str, path: str, batched: bool) -> list[Example]:
    """Servers that take pushes and check their signature."""
    return [
        Example(
            language,
            text.format(
                url=url, name=name, endpoint=endpoint, path=path,
                python_messages='body["data"]' if batched else "[body]", js_messages="body.data" if batched else "[body]",
            ),
        )
        for language, text in PUSH.items()
    ]  # fmt: skip
