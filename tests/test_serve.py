"""nanochat.serve: every endpoint, the limits, the guard, streams, disconnects."""

import asyncio
import contextlib
import http.client
import http.server
import importlib.util
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest
import torch
from hostile import BODIES, HOSTILE
from hypothesis import HealthCheck, given, settings, strategies as st
from parrot import Gated, Parrot, small_tokenizer, wait_for

pytest.importorskip("fastapi", reason="the extra `serve` (fastapi, uvicorn) is not installed")
pytest.importorskip("uvicorn", reason="the extra `serve` (fastapi, uvicorn) is not installed")
httpx = pytest.importorskip("httpx")

from fastapi.testclient import TestClient  # noqa: E402

from nanochat.chat import render_prompt  # noqa: E402
from nanochat.common import UserError  # noqa: E402
from nanochat.engine import Engine  # noqa: E402
from nanochat.model import GPT, GPTConfig  # noqa: E402
from nanochat.serve import (  # noqa: E402
    ApiError,
    Limits,
    Metrics,
    RemoteEngine,
    Slots,
    StopStrings,
    background_server,
    chunk_pieces,
    create_app,
    page,
    read_events,
    remote_engines,
    run_server,
)
from nanochat.ui import ChatSettings, ChatWidget, stream_reply, terminal_chat  # noqa: E402

TOOL = "It is <|python_start|>12*3<|python_end|><|output_start|>36<|output_end|>36."
CHAT = "/v1/chat/completions"


def client(engines=None, **options):
    app = create_app(engines or Parrot(), **options)
    return TestClient(app, base_url="http://127.0.0.1")


def ask(text="hi", **more):
    return {"messages": [{"role": "user", "content": text}], **more}


def stream(web, path, body):
    answer = web.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")
    return list(read_events(iter(answer.text.splitlines())))


def error_of(answer, status):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text and ".py" not in answer.text
    return error


# ---- the endpoints ----------------------------------------------------------------------------


def test_health_and_models():
    web = client({"base": Parrot(), "sft": Parrot()})
    assert web.get("/health").json() == {"status": "ok", "models": 2}
    listed = web.get("/v1/models").json()
    assert listed["object"] == "list" and [m["id"] for m in listed["data"]] == ["base", "sft"]
    assert web.get("/v1/models/sft").json() == listed["data"][1]
    assert "base, sft" in error_of(web.get("/v1/models/gpt-9"), 404)["message"]
    slash = client({"org/model": Parrot()})
    assert slash.get("/v1/models/org/model").json() == slash.get("/v1/models").json()["data"][0]


def test_chat_whole():
    engine = Parrot()
    body = client(engine).post(CHAT, json=ask("the fox", temperature=0, seed=3, top_k=7)).json()
    choice = body["choices"][0]
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    assert choice["message"] == {
        "role": "assistant",
        "content": "You said: the fox",
        "refusal": None,
    }
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    usage, call = body["usage"], engine.calls[0]
    assert usage["prompt_tokens"] == len(call["ids"])
    assert usage["completion_tokens"] == len(small_tokenizer().encode("You said: the fox"))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert (call["temperature"], call["seed"], call["top_k"], call["tools"]) == (0, 3, 7, True)


def test_top_k_zero_keeps_all_tokens():
    engine = Parrot()
    for more in ({"top_k": 0}, {}, {"top_k": None}):
        client(engine).post(CHAT, json=ask(**more))
    assert [call["top_k"] for call in engine.calls] == [None, 50, 50]


def test_chat_stream_has_the_same_text_and_counts():
    events = stream(client(), CHAT, ask("the fox", stream_options={"include_usage": True}))
    assert events[0]["choices"][0]["delta"] == {"content": "", "role": "assistant"}
    assert all(e["object"] == "chat.completion.chunk" for e in events)
    text = "".join(c["delta"].get("content", "") for e in events for c in e["choices"])
    assert text == "You said: the fox"
    reasons = [c["finish_reason"] for e in events for c in e["choices"]]
    assert reasons[-1] == "stop" and not any(reasons[:-1])
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] > 0


def test_tool_calls_travel_beside_the_text():
    web = client(Parrot(reply=TOOL))
    message = web.post(CHAT, json=ask()).json()["choices"][0]["message"]
    assert message["content"] == "It is 36."
    assert [p["type"] for p in message["parts"]] == ["text", "python", "python_output", "text"]
    deltas = [e["choices"][0]["delta"] for e in stream(web, CHAT, ask())]
    assert "".join(d.get("content", "") for d in deltas) == "It is 36."
    calls = [d["part"] for d in deltas if "part" in d and d["part"]["type"] == "python"]
    assert "".join(c["text"] for c in calls) == "12*3" and calls[0]["opens"]


def test_completions_whole_and_streamed():
    engine = Parrot()
    web = client(engine)
    body = web.post("/v1/completions", json={"prompt": "the quick", "max_tokens": 3}).json()
    assert body["object"] == "text_completion" and body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 3
    assert engine.calls[0]["ids"] == small_tokenizer().encode("the quick", bos=True)
    assert engine.calls[0]["tools"] is False
    events = stream(web, "/v1/completions", {"prompt": ["the quick"]})
    assert "".join(e["choices"][0]["text"] for e in events) == " and so on"


def test_logprobs():
    web = client()
    choice = web.post(CHAT, json=ask(logprobs=True)).json()["choices"][0]
    rows = choice["logprobs"]["content"]
    assert "".join(row["token"] for row in rows) == "You said: hi"
    assert all(row["logprob"] == -0.25 for row in rows)
    choice = web.post("/v1/completions", json={"prompt": "a", "logprobs": 1}).json()["choices"][0]
    assert "".join(choice["logprobs"]["tokens"]) == " and so on"


def test_logprobs_do_not_depend_on_a_stop_string_that_never_comes():
    web, plain = client(Parrot(reply="the quick brown fox")), []
    for stop in (None, ["quick red"], ["fox!", "he red"]):
        body = ask(logprobs=True, stop=stop)
        choice = web.post(CHAT, json=body).json()["choices"][0]
        whole = choice["logprobs"]["content"]
        choices = [e["choices"][0] for e in stream(web, CHAT, body)]
        rows = [row for c in choices if c["logprobs"] for row in c["logprobs"]["content"]]
        assert choice["message"]["content"] == "the quick brown fox"
        assert "".join(c["delta"].get("content", "") for c in choices) == "the quick brown fox"
        body = {"prompt": "x", "logprobs": 0, "stop": stop}
        tokens = web.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["tokens"]
        plain.append((whole, rows, tokens))
        assert whole == rows and [row["token"] for row in whole] == tokens
    assert plain[0] == plain[1] == plain[2] and len(plain[0][0]) > 3


def test_stop_strings():
    web = client(Parrot(reply="the quick brown fox"))
    for stop in ("brown", ["zzz", "brown"]):
        choice = web.post(CHAT, json=ask(stop=stop)).json()["choices"][0]
        assert choice["message"]["content"] == "the quick " and choice["finish_reason"] == "stop"
        deltas = [e["choices"][0]["delta"] for e in stream(web, CHAT, ask(stop=stop))]
        assert "".join(d.get("content", "") for d in deltas) == "the quick "


@given(
    st.text("ab", max_size=20),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 3), min_size=20, max_size=20),
)
def test_stop_strings_do_not_depend_on_how_text_is_cut(text, stops, sizes):
    stopper, shown, at, found = StopStrings(stops), "", 0, False
    for size in sizes:
        more, found = stopper.push(text[at : at + size])
        shown, at = shown + more, at + size
        if found:
            break
    if not found:
        shown += stopper.flush()
    first = min((text.find(s) for s in stops if s in text), default=len(text))
    ends = [text.find(s) + len(s) for s in stops if s in text]
    if not ends:
        assert shown == text and not found
    else:  # the cut is at a stop string that begins no later than where the earliest one ended
        assert found and first <= len(shown) <= min(ends) and text.startswith(shown)
        assert not any(s in shown for s in stops)


def test_long_conversations_are_cut_and_the_note_says_so():
    messages = []
    for i in range(12):
        messages += [{"role": "user", "content": f"quick brown {i}"}]
        messages += [{"role": "assistant", "content": "the fox"}]
    messages[-1:] = []
    web = client(Parrot(window=120))
    assert "did not fit" in web.post(CHAT, json={"messages": messages}).json()["note"]
    assert "too long" in error_of(web.post(CHAT, json=ask("fox " * 500)), 400)["message"]


def test_metrics_count():
    web = client()
    web.post(CHAT, json=ask())
    web.get("/nothing/here")
    text = web.get("/metrics").text
    assert f'nanochat_requests_total{{path="{CHAT}",status="200"}} 1' in text
    assert 'path="other",status="404"} 1' in text and "nothing" not in text
    assert "nanochat_replies_total 1" in text and "nanochat_active 0" in text
    for line in text.splitlines():
        assert re.fullmatch(r"# TYPE \S+ (counter|gauge|summary)|[a-z_]+(\{.*\})? [0-9.]+", line)


# ---- bad requests -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": []},
        {"messages": "hi"},
        {"messages": [1]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "root", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}] * 2},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        ask(temperature=3),
        ask(temperature="hot"),
        ask(temperature=True),
        ask(top_k=-1),
        ask(top_k=2.5),
        ask(top_p=-1),
        ask(max_tokens=0),
        ask(max_tokens=10**9),
        ask(n=2),
        ask(stream="yes"),
        ask(seed=2**70),
        ask(stop=[""]),
        ask(stop=["a"] * 5),
        ask(stop={"a": 1}),
        ask(stream_options=[]),
        ask("x" * 8_001),
    ],
)
def test_bad_chat_requests_are_400(body):
    error_of(client().post(CHAT, json=body), 400)


@pytest.mark.parametrize("prompt", [None, 3, [], ["a", "b"], [[1, 2]], "x" * 32_001])
def test_bad_completion_requests_are_400(prompt):
    error_of(client().post("/v1/completions", json={"prompt": prompt}), 400)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000, b'{"a": Infinity}']
    + [b'{"messages": [{"role": "user", "content": "\\ud800"}]}'],
)
def test_broken_bodies_are_400(data):
    answer = client().post(CHAT, content=data, headers={"content-type": "application/json"})
    error_of(answer, 400)


def test_other_errors():
    web = client(limits=Limits(body_bytes=1000, messages=3))
    assert "gpt-9" in error_of(web.post(CHAT, json=ask(model="gpt-9")), 404)["message"]
    error_of(web.post(CHAT, json=ask("x" * 2000)), 413)
    error_of(web.post(CHAT, content="{}", headers={"content-type": "text/plain"}), 415)
    error_of(web.get("/secret"), 404)
    answer = web.get(CHAT)
    error_of(answer, 405)
    assert answer.headers["allow"] == "POST"
    talk = [{"role": r, "content": "x"} for r in ("user", "assistant", "user", "assistant", "user")]
    error_of(web.post(CHAT, json={"messages": talk}), 400)
    assert web.post("/v1/chat/completions/../../etc/passwd", json={}).status_code in (404, 405)


def test_null_fields_mean_the_default():
    body = {name: None for name in ("temperature", "top_k", "max_tokens", "seed", "stop", "model")}
    assert client().post(CHAT, json=ask(**body, frequency_penalty=0, user="me")).status_code == 200


values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5), st.lists(st.integers(), max_size=2), st.dictionaries(st.text(), st.none()),
)  # fmt: skip
names = [
    "model",
    "temperature",
    "top_p",
    "top_k",
    "max_tokens",
    "max_completion_tokens",
    "seed",
    "n",
]
names += ["stream", "stream_options", "stop", "logprobs", "top_logprobs", "messages", "prompt"]
SHARED = {}


@given(st.dictionaries(st.sampled_from(names), values), st.booleans())
@settings(max_examples=150, deadline=None)
def test_no_request_makes_a_500(fields, chat):
    web = SHARED.setdefault("web", client())
    body = {**(ask() if chat else {"prompt": "the"}), **fields}
    answer = web.post(CHAT if chat else "/v1/completions", json=body)
    assert answer.status_code in (200, 400, 404)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_comes_back_as_text(text):
    engine = Parrot()
    web, special = client(engine), small_tokenizer().special
    answer = web.post(CHAT, json=ask(text))
    assert answer.json()["choices"][0]["message"]["content"] == "You said: " + text
    assert answer.headers["content-type"] == "application/json"
    deltas = [e["choices"][0]["delta"] for e in stream(web, CHAT, ask(text))]
    assert "".join(d.get("content", "") for d in deltas) == "You said: " + text
    for name in ("bos", "user_start", "user_end", "assistant_start"):
        assert engine.calls[0]["ids"].count(special(name)) == 1  # the user's own made none
    assert engine.calls[0]["ids"].count(special("python_start")) == 0
    assert error_of(web.post(CHAT, json=ask(model=text)), 404)["param"] == "model"


@pytest.mark.parametrize("data", BODIES.values(), ids=BODIES)
def test_hostile_bodies_are_refused(data):
    headers = {"content-type": "application/json"}
    for path in (CHAT, "/v1/completions"):
        answer = client().post(path, content=data, headers=headers)
        error_of(answer, answer.status_code)
        assert 400 <= answer.status_code < 500


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])  # what the schema allows, and not
def test_fuzz_from_the_published_schema_finds_no_500(mode):
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    app, host = create_app(Parrot(), limits=Limits(max_tokens=20)), {"Host": "localhost"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=host)
    seen = set()
    for operation in (result.ok() for result in schema.get_all_operations()):
        if mode == "NEGATIVE" and "completions" not in operation.path:
            continue  # nothing can be wrong with a request that has no body
        cases = operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode])

        @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
        @given(cases)
        def send(case):
            answer = case.call(headers=host)
            seen.add((case.path, answer.status_code))
            assert answer.status_code < 500, answer.text

        send()
    if mode == "POSITIVE":
        assert {(CHAT, 200), ("/v1/completions", 200), ("/", 200), ("/metrics", 200)} <= seen
    else:
        assert {(CHAT, 400), ("/v1/completions", 400)} <= seen


# ---- the guard --------------------------------------------------------------------------------


def test_token():
    web = client(token="s3cret")
    assert web.get("/").status_code == 200 and web.get("/health").status_code == 200
    for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/nothing"):
        assert error_of(web.get(path), 401)["type"] == "authentication_error"
    for wrong in ("Bearer", "Bearer nope", "s3cret", "bearer s3cret", "Bearer s3cret2"):
        headers = {"authorization": wrong}
        error_of(web.post(CHAT, json=ask(), headers=headers), 401)
    answer = web.post(CHAT, json=ask(), headers={"authorization": "Bearer s3cret"})
    assert answer.status_code == 200 and "s3cret" not in web.get("/").text


@pytest.mark.parametrize(
    "host,fine",
    [("localhost", 1), ("localhost:8000", 1), ("127.0.0.1:1", 1), ("[::1]:8000", 1), ("[::1]", 1)]
    + [("evil.example", 0), ("127.0.0.1.evil.example", 0), ("localhost.evil:80", 0), ("", 0)],
)
def test_without_a_token_only_this_machine_is_named(host, fine):
    answer = client().get("/v1/models", headers={"host": host})
    assert answer.status_code == (200 if fine else 421)


def test_pages_of_other_sites_may_call_only_when_asked():
    ask_first = {"origin": "https://my.site", "access-control-request-method": "POST"}
    for origins, status in ((), 405), (["https://my.site"], 200):
        web = client(origins=origins, token="s3cret")
        if origins:
            assert web.options(CHAT, headers=ask_first).status_code == status
        answer = web.get("/health", headers={"origin": "https://my.site"})
        assert answer.headers.get("access-control-allow-origin") == (*origins, None)[0]
        answer = web.options(CHAT, headers={**ask_first, "origin": "https://other.site"})
        assert "access-control-allow-origin" not in answer.headers


def test_errors_inside_show_nothing(caplog):
    web = client(Parrot(fail_after=2))
    assert error_of(web.post(CHAT, json=ask()), 500)["type"] == "server_error"
    answer = web.post(CHAT, json=ask(stream=True))
    last = list(read_events(iter(answer.text.splitlines())))[-1]
    assert "error" in last and "secret" not in answer.text and "somebody" not in answer.text
    assert "nanochat_active 0" in web.get("/metrics").text
    assert "secret path" in caplog.text  # but the owner of the server can read it


def test_page_policy_and_headers():
    web = client()
    one, two = web.get("/"), web.get("/")
    policy = one.headers["content-security-policy"]
    nonce = re.search(r"script-src 'nonce-([^']+)'", policy)[1]
    assert "default-src 'none'" in policy and "unsafe" not in policy and nonce not in two.text
    assert one.text.count(f'nonce="{nonce}"') == 2 == one.text.count("nonce=")
    assert one.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in one.headers
    for word in ("innerHTML", "insertAdjacentHTML", "document.write", "eval(", "onclick", "style="):
        assert word not in one.text
    addresses = set(re.findall(r"https?://[^\s'\"]+", one.text))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(|<iframe|src=", one.text)
    assert len(page("x")) < 40_000


def test_no_documentation_pages_that_load_from_elsewhere():
    assert client().get("/docs").status_code == 404
    schema = client().get("/openapi.json").json()
    body = schema["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["temperature"]["maximum"] == 2 and body["required"] == ["messages"]


# ---- a real server: streams, disconnects, limits ----------------------------------------------


def test_first_token_comes_before_the_last():
    engine, seen = Gated(free=3), ""
    request = {"json": ask("the fox", stream=True), "timeout": 60}
    with (
        background_server(create_app(engine)) as url,
        httpx.stream("POST", url + CHAT, **request) as answer,
    ):
        for item in read_events(answer.iter_lines()):
            seen += item["choices"][0]["delta"].get("content") or ""
            if seen:
                engine.gate.set()  # the rest is computed only after the first text is here
    assert seen == "You said: the fox"


@pytest.mark.parametrize("streamed", [True, False])
def test_disconnect_frees_the_slot_and_the_engine(streamed):
    engine = Parrot(delay=0.1, reply="the quick brown fox " * 100, window=4096)
    app = create_app(engine, limits=Limits(concurrent=1, seconds=60))
    metrics = app.state.server.metrics
    with background_server(app) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        body = json.dumps(ask(stream=streamed, max_tokens=4000))
        connection.request("POST", CHAT, body, {"content-type": "application/json"})
        assert wait_for(lambda: engine.running == 1)
        if streamed:
            connection.getresponse().read(50)
        connection.close()
        assert wait_for(lambda: engine.running == 0), "the engine kept computing"
        assert wait_for(lambda: metrics.active == 0) and metrics.disconnects == 1
        assert httpx.post(url + CHAT, json=ask(max_tokens=2), timeout=60).status_code == 200


def test_a_client_that_never_reads_is_cut_off():
    engine = Parrot(reply="the quick brown fox" * 20, times=10**5, window=10**7)
    limits = Limits(concurrent=1, seconds=3, max_tokens=10**7)
    app = create_app(engine, limits=limits)
    metrics = app.state.server.metrics
    with background_server(app) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect((host, int(port)))
            body = json.dumps(ask(stream=True)).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert wait_for(lambda: engine.running == 1)
            assert wait_for(lambda: metrics.active == 0)
            assert wait_for(lambda: engine.running == 0)


def test_time_limit_ends_a_reply():
    engine = Parrot(delay=0.02, reply="fox ", times=10**5, window=10**7)
    app = create_app(engine, limits=Limits(seconds=0.5, max_tokens=10**6))
    web = TestClient(app, base_url="http://127.0.0.1")
    choice = web.post(CHAT, json=ask(max_tokens=10**6)).json()["choices"][0]
    assert choice["finish_reason"] == "length"  # without the limit it would speak for an hour
    assert wait_for(lambda: engine.running == 0)


def test_one_runs_one_waits_the_others_get_429():
    engine, statuses = Gated(), []
    app = create_app(engine, limits=Limits(concurrent=1, waiting=1, seconds=60))
    metrics = app.state.server.metrics
    with background_server(app) as url:

        def one():
            statuses.append(httpx.post(url + CHAT, json=ask(), timeout=60).status_code)

        threads = [threading.Thread(target=one) for _ in range(2)]
        for thread, state in zip(threads, ((1, 0), (1, 1)), strict=True):
            thread.start()
            assert wait_for(lambda state=state: (metrics.active, metrics.waiting) == state)
        for _ in range(3):
            error_of(httpx.post(url + CHAT, json=ask(), timeout=60), 429)
        engine.gate.set()
        for thread in threads:
            thread.join()
    assert statuses == [200, 200]


def test_who_waits_too_long_gets_503():
    app = create_app(Parrot(), limits=Limits(concurrent=1, seconds=0.2))
    app.state.server.slots.free = asyncio.Semaphore(0)  # the only slot is never given back
    web = TestClient(app, base_url="http://127.0.0.1")
    error_of(web.post(CHAT, json=ask()), 503)
    assert app.state.server.metrics.waiting == 0 and not app.state.server.slots.clients


@pytest.mark.parametrize("streamed", [True, False])
def test_who_leaves_the_queue_gives_up_the_place(streamed):
    engine = Gated(reply="t")
    app = create_app(engine, limits=Limits(concurrent=1, per_client=2))
    metrics, slots = app.state.server.metrics, app.state.server.slots

    def request(url):
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        body = json.dumps(ask(stream=streamed))
        connection.request("POST", CHAT, body, {"content-type": "application/json"})
        return connection

    with background_server(app) as url:
        first = request(url)
        assert wait_for(lambda: engine.running == 1)
        second = request(url)
        assert wait_for(lambda: metrics.waiting == 1)
        second.close()
        assert wait_for(lambda: metrics.waiting == 0)  # while the first still holds the slot
        assert slots.clients == {"127.0.0.1": 1} and metrics.disconnects == 1
        third = request(url)
        assert wait_for(lambda: metrics.waiting == 1)
        engine.gate.set()
        for connection in (first, third):
            answer = connection.getresponse()
            assert answer.status == 200 and b'"content":' in answer.read()
            connection.close()
        assert wait_for(lambda: metrics.active == 0)
    assert len(engine.calls) == 2 and not slots.clients


@pytest.mark.parametrize("leaves", ["waiting", "as the slot comes", "with the slot", "never"])
def test_a_slot_is_never_lost_to_who_leaves(leaves):
    async def stays():
        return False

    async def scenario():
        slots, left = Slots(Limits(concurrent=1), Metrics()), asyncio.Event()
        give_back = await slots.take("one", stays)

        async def gone():
            if leaves == "as the slot comes" and left.is_set():
                give_back()
                for _ in range(10):  # until the waiting one has been handed the slot
                    await asyncio.sleep(0)
            return left.is_set()

        second = asyncio.create_task(slots.take("two", gone))
        while not slots.metrics.waiting:
            await asyncio.sleep(0)
        if leaves == "with the slot":
            give_back()
        if leaves != "never":
            left.set()
            with pytest.raises(ApiError, match="left"):
                await second
        give_back()
        if leaves == "never":
            (await second)()
        for name in ("three", "four"):  # the slot is there, and it is one
            again = await asyncio.wait_for(slots.take(name, stays), 30)
            assert slots.free.locked() and slots.metrics.active == 1
            again()
        assert not slots.clients and slots.metrics.active == slots.metrics.waiting == 0

    asyncio.run(scenario())


def test_a_cancelled_wait_gives_the_place_back():
    async def scenario():
        slots = Slots(Limits(concurrent=1), Metrics())

        async def stays():
            return False

        give_back = await slots.take("one", stays)
        second = asyncio.create_task(slots.take("two", stays))
        while not slots.metrics.waiting:
            await asyncio.sleep(0)
        give_back()  # and in the same breath
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        (await asyncio.wait_for(slots.take("three", stays), 30))()
        assert not slots.clients and not slots.free.locked()

    asyncio.run(scenario())


def test_one_client_cannot_take_all_slots():
    engine = Parrot(delay=0.1, reply="fox ", times=1000)
    app = create_app(engine, limits=Limits(per_client=2, concurrent=8))
    slots = app.state.server.slots
    with background_server(app) as url, httpx.Client(timeout=60) as web:
        request = ("POST", url + CHAT)
        with (
            web.stream(*request, json=ask(stream=True)) as one,
            web.stream(*request, json=ask(stream=True)) as two,
        ):
            assert one.status_code == two.status_code == 200
            answer = web.post(url + CHAT, json=ask())
            assert "2 requests" in error_of(answer, 429)["message"]
            assert slots.clients == {"127.0.0.1": 2}
        assert wait_for(lambda: not slots.clients and engine.running == 0)
        assert web.post(url + CHAT, json=ask(max_tokens=2)).status_code == 200


def test_a_body_that_does_not_arrive_is_given_up():
    app = create_app(Parrot(), limits=Limits(seconds=0.3))
    with background_server(app) as url, socket.socket() as sock:
        sock.settimeout(60)
        sock.connect(("127.0.0.1", int(url.rsplit(":", 1)[1])))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert sock.recv(100).startswith(b"HTTP/1.1 408")


def test_who_hangs_up_within_the_body_is_no_error_of_ours(caplog):
    app = create_app(Parrot())
    requests = app.state.server.metrics.requests
    with background_server(app) as url:
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as sock:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            sock.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert wait_for(lambda: requests)
    assert requests == {(CHAT, 499): 1} and "Traceback" not in caplog.text


def test_many_streams_do_not_cross_and_take_turns():
    engine = Gated(delay=0.001)
    app = create_app(engine, limits=Limits(concurrent=20, per_client=20))
    order, metrics = [], app.state.server.metrics

    async def one(web, url, number):
        text, body = "", ask(f"fox number {number} " + "quick " * 10, stream=True)
        async with web.stream("POST", url + CHAT, json=body) as answer:
            async for line in answer.aiter_lines():
                for item in read_events(iter([line])):
                    if item["choices"] and (more := item["choices"][0]["delta"].get("content")):
                        text += more
                        order.append(number)
        assert text == f"You said: fox number {number} " + "quick " * 10

    async def everybody(url):
        async with httpx.AsyncClient(timeout=60) as web:
            talks = [asyncio.create_task(one(web, url, number)) for number in range(12)]
            assert await asyncio.to_thread(wait_for, lambda: metrics.active == 12)
            engine.gate.set()
            await asyncio.gather(*talks)

    with background_server(app) as url:
        asyncio.run(everybody(url))
    last_first = max(order.index(n) for n in range(12))
    assert last_first < len(order) / 2  # everybody had begun before half of the work was done
    assert wait_for(lambda: engine.running == 0 and metrics.active == 0)


def test_random_disconnects_leave_nothing_behind():
    engine = Parrot(delay=0.002, reply="the quick brown fox " * 10)
    app = create_app(engine, limits=Limits(concurrent=4, per_client=20))
    with background_server(app) as url:

        async def one(web, number):
            async with web.stream("POST", url + CHAT, json=ask(stream=True)) as answer:
                assert answer.status_code == 200
                async for _ in answer.aiter_lines():
                    if number % 3 == 0:
                        return

        async def everybody():
            async with httpx.AsyncClient(timeout=60) as web:
                await asyncio.gather(*(one(web, number) for number in range(15)))

        asyncio.run(everybody())
        assert wait_for(lambda: app.state.server.metrics.active == 0)
        assert wait_for(lambda: engine.running == 0)


def test_a_short_soak_with_disconnects():
    path = Path(__file__).parent.parent / "benchmarks" / "serve.py"
    spec = importlib.util.spec_from_file_location("benchmark_serve", path)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    engine = bench.random_engine(depth=1, width=64, vocab=512)
    limits = Limits(concurrent=50, per_client=50)
    app = create_app(engine, limits=limits)
    talks = bench.expected_replies(engine, clients=50, tokens=12)
    with background_server(app) as url:
        found = asyncio.run(bench.soak(url, talks, seconds=3, hang_up=0.3, seed=0))
        metrics = app.state.server.metrics
        assert wait_for(lambda: metrics.active == metrics.waiting == 0)
    assert found.errors == [] and found.crossed == 0
    assert found.finished > 0 and found.hung_up > 0
    assert min(found.tokens) > 0  # every client was served


# ---- a widget far from its model --------------------------------------------------------------


def test_remote_engine_gives_the_same_pieces():
    engines = {"calc": Parrot(reply=TOOL), "echo": Parrot()}
    messages, chosen = ask("héllo <b>")["messages"], ChatSettings(0.5, None, 0.9, 50, 3)
    with background_server(create_app(engines, token="tok")) as url:
        remote = remote_engines(url + "/v1", "tok")
        assert list(remote) == ["calc", "echo"]
        for name in remote:
            far = list(stream_reply(remote[name], None, messages, chosen))
            near = list(stream_reply(engines[name], small_tokenizer(), messages, chosen))
            assert [(p.kind, p.text) for p in far if p.text] == [
                (p.kind, p.text) for p in near if p.text
            ]
            assert all(p.logprob == -0.25 for p in far[:-1])
        one, two = engines["echo"].calls
        assert one == two  # the settings have arrived
        widget = ChatWidget(remote)
        widget.controls.box.value = "12*3?"
        widget.controls.send.click()
        assert widget.wait(10)
        kinds = [part["type"] for part in widget.session.messages[1]["content"]]
        assert kinds == ["text", "python", "python_output", "text"]
        assert terminal_chat(remote["echo"], prompt="hi", write=lambda _: None) == "You said: hi"


def test_remote_engine_stops_while_the_server_is_silent():
    engine, stop = Gated(), threading.Event()
    with background_server(create_app(engine)) as url:
        pieces = RemoteEngine(url + "/v1", "nanochat").stream_messages(
            ask()["messages"], ChatSettings(), stop
        )
        threading.Thread(target=lambda: wait_for(lambda: engine.running) and stop.set()).start()
        assert [p.text for p in pieces if p.kind == "end"] == ["cancelled"]
        assert engine.running == 1  # it has not said a word yet
        engine.gate.set()


def test_remote_engine_errors_are_one_sentence():
    messages = ask()["messages"]
    with background_server(create_app(Parrot(fail_after=2), token="tok")) as url:
        for engine, words in (
            (RemoteEngine(url + "/v1", "nanochat", "no"), "token"),
            (RemoteEngine(url + "/v1", "gpt-9", "tok"), "no model"),
            (RemoteEngine(url + "/v1", "nanochat", "tok"), "wrong inside"),
            (RemoteEngine(url + "/nowhere", "nanochat", "tok"), "Not Found"),
        ):
            with pytest.raises(UserError, match=words):
                list(engine.stream_messages(messages, ChatSettings()))
        with pytest.raises(UserError, match="not an OpenAI-compatible"):
            remote_engines(url + "/health?", "tok")
    with pytest.raises(UserError, match="Is the server running"):
        remote_engines(url + "/v1")
    with pytest.raises(UserError, match="http"):
        RemoteEngine("file:///etc/passwd", "x")


@contextlib.contextmanager
def fake_endpoint(*sent, reset=False, hold=None):
    """An endpoint that sends these bytes to whoever asks; yields its address up to /v1."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(65_536)
                        for data in sent:
                            connection.sendall(data)
                        if hold is not None:
                            hold.wait(60)
                        if reset:  # no polite end, as when a machine is switched off
                            now = struct.pack("ii", 1, 0)
                            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"


STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
LIST = b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"
BROKEN = {
    "within a chunk": (STREAM + b"50\r\ndata: {",),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n",),
    "nothing": (),
    "no JSON": (STREAM + b"d\r\ndata: {oops\n\n\r\n0\r\n\r\n",),
    "deep": (STREAM + b"186a6\r\ndata: " + b"[" * 100_000 + b"\r\n0\r\n\r\n",),
    "an error within": (b"HTTP/1.1 500 No\r\nContent-Length: 500\r\n\r\n{",),
    "a deep error": (b"HTTP/1.1 500 No\r\n\r\n" + b"[" * 20_000,),
    "no UTF-8": (STREAM + b"9\r\ndata: \xff\n\n\r\n0\r\n\r\n",),
}


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("sent", BROKEN.values(), ids=BROKEN)
def test_a_broken_endpoint_is_one_sentence(sent, reset):
    with fake_endpoint(*sent, reset=reset) as url:
        with pytest.raises(UserError):
            list(RemoteEngine(url, "m").stream_messages(ask()["messages"], ChatSettings()))
        with pytest.raises(UserError):
            remote_engines(url)


@pytest.mark.parametrize("sent", [b'{"data": [', b'{"data": 3}' + b" " * 489, b"[" * 500])
def test_a_broken_list_of_models_is_one_sentence(sent):
    with fake_endpoint(LIST + sent) as url, pytest.raises(UserError, match="no list of models"):
        remote_engines(url)


def test_an_endpoint_that_falls_silent_is_one_sentence():
    silence = threading.Event()
    with fake_endpoint(STREAM, hold=silence) as url:
        engine = RemoteEngine(url, "m", timeout=0.2)
        with pytest.raises(UserError, match="was lost: timed out"):
            list(engine.stream_messages(ask()["messages"], ChatSettings()))
        silence.set()


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:80a/v1", "http://h/my model", "http://[::1/v1", "http:///v1"]
    + ["http://127.0.0.1:9/\xfc"],
)  # fmt: skip
def test_an_address_that_is_none_is_one_sentence(url):
    with pytest.raises(UserError, match="Cannot reach .* not valid"):
        remote_engines(url)
    with pytest.raises(UserError):
        list(RemoteEngine(url, "m").stream_messages(ask()["messages"], ChatSettings()))


@pytest.mark.parametrize("token", ["s3cr\x7fet", "s3cret\nX: y", "s3cr\u20acet", "s3c ret"])
def test_a_token_that_cannot_be_sent_is_refused_and_not_repeated(token):
    for use in (lambda: RemoteEngine("http://x", "m", token), lambda: create_app({}, token=token)):
        with pytest.raises(UserError, match="access token") as caught:
            use()
        assert "s3c" not in str(caught.value)
    assert RemoteEngine("http://x", "m", " tok\n").token == "tok"
    assert RemoteEngine("http://x", "m", " \n").token == ""
    with pytest.raises(UserError, match="empty"):
        create_app(Parrot(), token="")


def test_the_token_stays_with_the_address_it_was_given_for():
    seen = {}

    class Mover(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen[self.path] = self.headers.get("Authorization")
            self.send_response(302 if self.path == "/v1/models" else 200)
            self.send_header("Location", "/elsewhere")
            self.end_headers()
            self.wfile.write(b'{"data": [{"id": "other"}]}')

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Mover) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = remote_engines(f"http://127.0.0.1:{server.server_port}/v1", "s3cret")
        server.shutdown()
    assert list(found) == ["other"]
    assert seen == {"/v1/models": "Bearer s3cret", "/elsewhere": None}


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), lambda inner: (
    st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(
        ["choices", "delta", "content", "part", "type", "text", "logprobs", "error", "note", "role"]
    ), inner, max_size=4)), max_leaves=12))  # fmt: skip
def test_whatever_an_endpoint_sends_is_pieces_or_one_sentence(chunk):
    with contextlib.suppress(UserError):
        assert all(isinstance(piece.text, str) for piece in chunk_pieces(chunk))


# ---- starting ---------------------------------------------------------------------------------


def test_a_taken_port_is_one_clear_sentence():
    with background_server(create_app(Parrot())) as url, pytest.raises(UserError, match="port"):
        run_server(Parrot(), port=int(url.rsplit(":", 1)[1]))


def test_open_address_makes_a_token(monkeypatch, capsys):
    import uvicorn

    seen = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: seen.append(self.config.app))
    run_server(Parrot(), host="0.0.0.0", port=0)
    run_server(Parrot(), host="127.0.0.1", port=0)
    open_app, local_app = seen
    assert len(open_app.state.token) >= 24 and local_app.state.token is None
    assert f"#token={open_app.state.token}" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("token", ["ab+c/d=", "a&b=c", "100%41", "#?"])
def test_the_printed_address_holds_the_whole_token(monkeypatch, capsys, token):
    import uvicorn

    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    run_server(Parrot(), port=0, token=token)
    address = capsys.readouterr().out.split()[3]
    fragment = address.partition("#")[2]
    assert urllib.parse.parse_qs(fragment) == {"token": [token]}  # as the page reads it


def test_missing_extra_is_one_clear_sentence():
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from nanochat.common import UserError\n"
        "from nanochat.serve import create_app\n"
        "try: create_app({})\n"
        "except UserError as error: print(error)"
    )
    root = Path(__file__).parent.parent
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert "nanochat[serve]" in out.stdout, out.stderr


# ---- the official client ----------------------------------------------------------------------


@pytest.fixture
def openai_client():
    """connect(engine, ...) serves it and returns the official client, nothing about it changed."""
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    with contextlib.ExitStack() as stack:

        def connect(engine, key="tok", **limits):
            app = create_app(engine, token="tok", limits=Limits(**limits))
            url = stack.enter_context(background_server(app))
            return openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0)

        yield connect


ASKED = {"model": "nanochat", "messages": [{"role": "user", "content": "12*3?"}]}


def test_openai_models_chat_and_completions(openai_client):
    web = openai_client(Parrot(reply=TOOL))
    assert [m.id for m in web.models.list()] == ["nanochat"]
    assert web.models.retrieve("nanochat").owned_by == "nanochat"
    whole = web.chat.completions.create(**ASKED, max_completion_tokens=50, seed=3, user="me")
    assert whole.choices[0].message.content == "It is 36." and whole.usage.total_tokens > 0
    assert whole.choices[0].finish_reason == "stop" and whole.choices[0].message.role == "assistant"
    plain = web.completions.create(model="nanochat", prompt="x", max_tokens=2)
    assert plain.usage.completion_tokens == 2 and plain.choices[0].finish_reason == "length"


def test_openai_stream_usage_and_early_close(openai_client):
    engine = Parrot(delay=0.005)
    web = openai_client(engine)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(web.chat.completions.create(**ASKED, **options))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "You said: 12*3?" and chunks[-1].usage.completion_tokens > 0
    assert chunks[-2].choices[0].finish_reason == "stop"
    engine.reply = "fox " * 2000
    with web.chat.completions.create(**ASKED, stream=True) as stream:
        next(stream), next(stream)
    assert wait_for(lambda: engine.running == 0)
    texts = [c.choices[0].text for c in web.completions.create(
        model="nanochat", prompt="x", stream=True, max_tokens=3)]  # fmt: skip
    assert "".join(texts)


def test_openai_stop_and_logprobs(openai_client):
    web = openai_client(Parrot(reply="the quick brown fox"))
    whole = web.chat.completions.create(**ASKED, stop=["zzz", "brown"])
    assert whole.choices[0].message.content == "the quick "
    stream = web.chat.completions.create(**ASKED, stop="brown", stream=True, logprobs=True)
    chunks = [c.choices[0] for c in stream]
    assert "".join(c.delta.content or "" for c in chunks) == "the quick "
    rows = [row for c in chunks if c.logprobs for row in c.logprobs.content]
    assert rows and all(row.logprob == -0.25 for row in rows)
    whole = web.chat.completions.create(**ASKED, logprobs=True, top_logprobs=2)
    rows = whole.choices[0].logprobs.content
    assert "".join(row.token for row in rows) == "the quick brown fox"


@pytest.mark.parametrize("windows", [False, True])
def test_openai_top_logprobs_are_the_models_own(openai_client, windows):
    more = dict(windows="SL", smear=True, value_embeddings=True) if windows else {}
    tokenizer = small_tokenizer()
    config = GPTConfig(tokenizer.vocab_size + 7, 64, 2, n_head=2, n_kv_head=2, n_embd=32, **more)
    model = GPT(config).eval()
    torch.manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    web = openai_client(Engine(model, tokenizer))
    asked = {**ASKED, "temperature": 0, "max_tokens": 12, "logprobs": True}
    whole = web.chat.completions.create(**asked, top_logprobs=3)
    rows = whole.choices[0].logprobs.content
    stream = web.chat.completions.create(**asked, top_logprobs=3, stream=True)
    chunks = [chunk.choices[0].logprobs for chunk in stream]
    streamed = [row for chunk in chunks if chunk for row in chunk.content]
    assert rows == streamed and len(rows) > 1
    prompt = render_prompt({"messages": ASKED["messages"]}, tokenizer)
    answer = [t.id for t in Engine(model, tokenizer).generate(prompt, 12, temperature=0)]
    logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
    expected = logits.detach().log_softmax(-1)[:, : tokenizer.vocab_size].topk(3)
    for row, values, ids in zip(rows, *expected):
        assert [top.token for top in row.top_logprobs] == [tokenizer.decode([i]) for i in ids]
        assert [top.logprob for top in row.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
        assert all(top.bytes == list(top.token.encode()) for top in row.top_logprobs)
    all_twenty = web.chat.completions.create(**asked, top_logprobs=20).choices[0].logprobs.content
    assert [row.top_logprobs[:3] for row in all_twenty] == [row.top_logprobs for row in rows]
    assert {len(row.top_logprobs) for row in all_twenty} == {20}
    plain = web.chat.completions.create(**asked, top_logprobs=0).choices[0].logprobs.content
    assert [row.logprob for row in plain] == [row.logprob for row in rows]
    assert not any(row.top_logprobs for row in plain)


def test_top_logprobs_have_a_range_and_need_logprobs():
    web = client()
    for bad in ({"top_logprobs": 21}, {"top_logprobs": -1}, {"top_logprobs": True}):
        assert error_of(web.post(CHAT, json=ask(logprobs=True, **bad)), 400)["param"] == (
            "top_logprobs"
        )
    assert "logprobs: true" in error_of(web.post(CHAT, json=ask(top_logprobs=2)), 400)["message"]
    rows = web.post(CHAT, json=ask(logprobs=True, top_logprobs=2)).json()["choices"][0]["logprobs"]
    assert all(row["top_logprobs"] == [] for row in rows["content"])  # a parrot has no model


def test_openai_errors_have_their_classes(openai_client):
    openai = pytest.importorskip("openai")
    web = openai_client(Parrot(), body_bytes=5_000)
    for error, change in (
        (openai.NotFoundError, {"model": "gpt-9"}),
        (openai.BadRequestError, {"temperature": 3}),
        (openai.BadRequestError, {"messages": []}),
        (openai.APIStatusError, {"messages": [{"role": "user", "content": "x" * 6_000}]}),
    ):
        with pytest.raises(error) as caught:
            web.chat.completions.create(**{**ASKED, **change})
        assert caught.value.body["message"] and caught.value.status_code < 500
    with pytest.raises(openai.AuthenticationError):
        openai_client(Parrot(), key="no").models.list()
    failing = openai_client(Parrot(fail_after=2))
    with pytest.raises(openai.InternalServerError):
        failing.chat.completions.create(**ASKED)
    with pytest.raises(openai.APIError, match="wrong inside"):
        list(failing.chat.completions.create(**ASKED, stream=True))
    busy = openai_client(Parrot(delay=0.2, reply="fox " * 500), per_client=1)
    stream = busy.chat.completions.create(**ASKED, stream=True)
    with stream, pytest.raises(openai.RateLimitError):
        busy.chat.completions.create(**ASKED)
