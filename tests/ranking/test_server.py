"""The page's server: what it serves, whom it refuses, and that mistakes leave it standing."""

import http.client
import importlib.resources
import json
import socket
import threading
import urllib.parse

import pytest
from desks import items_of

from chatyuan.errors import UserError
from chatyuan.ranking import server as serving
from chatyuan.ranking.server import Server


@pytest.fixture
def served(tmp_path, desk_of):
    """A server on a free port, answering."""
    server = Server("127.0.0.1", 0)
    server.desk = desk_of(tmp_path, items_of(tmp_path))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ask(server, method, path, body=None, **headers):
    """(status, headers, body) of one request; headers are given with _ for -."""
    host, port = server.server_address
    connection = http.client.HTTPConnection(host, port, timeout=10)
    try:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            given = {"Content-Type": "application/json", **given}
        connection.request(method, path, body, given)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def test_the_page_loads_nothing_from_elsewhere(served):
    for path, (name, kind) in serving.FILES.items():
        status, headers, body = ask(served, "GET", path)
        assert status == 200 and headers["Content-Type"] == f"{kind}; charset=utf-8"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        text = body.decode("utf-8")
        assert "http:" not in text and "https:" not in text and "//cdn" not in text, name
    assert ask(served, "GET", "/server.py")[0] == 404
    assert ask(served, "GET", "/../items.py")[0] == 404
    assert ask(served, "HEAD", "/")[2] == b""


def test_the_page_never_makes_markup_of_texts():
    code = (importlib.resources.files("chatyuan.ranking") / "page.js").read_text(encoding="utf-8")
    for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert danger not in code


def test_calls_answer_and_save(served):
    name = json.dumps({"annotator": "甲"})
    assert json.loads(ask(served, "POST", "/api/start", "{}")[2])["reasons"][0] == "all_bad"
    status, _, body = ask(served, "POST", "/api/next", name)
    item = json.loads(body)["item"]
    assert status == 200 and len(item["answers"]) == 3
    good = {"annotator": "甲", "item": item["key"], "ranks": [2, 1, 2], "seconds": 1}
    status, _, body = ask(served, "POST", "/api/save", json.dumps(good))
    assert status == 200 and json.loads(body)["item"]["key"] != item["key"]
    assert served.desk.log.by_item[item["key"]]["甲"].ranks == (1, 0, 1)


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({"Host": "localhost:9000"}, True),  # through an ssh tunnel from another port
        ({"Host": "evil.example"}, False),
        ({"Host": "127.0.0.1.evil.example"}, False),
        ({"Host": ""}, False),
        ({"Host": "[::1"}, False),
        ({"Origin": "https://evil.example"}, False),
        ({"Origin": "null"}, False),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, True),
        ({"Host": "localhost:1", "Origin": "http://localhost:2"}, False),
        ({"Sec_Fetch_Site": "cross-site"}, False),
        ({"Sec_Fetch_Site": "same-origin"}, True),
    ],
)
def test_other_web_pages_are_refused(served, headers, allowed):
    body = json.dumps({"annotator": "甲"})
    assert ask(served, "POST", "/api/next", body, **headers)[0] == (200 if allowed else 403)
    assert not served.desk.log.by_item


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/api/next", "{}", {"Content_Type": "text/plain"}, 415),
        ("/api/next", "[]", {}, 400),
        ("/api/next", "{", {}, 400),
        ("/api/next", "[" * 60_000, {}, 400),
        ("/api/next", "{}", {}, 400),
        ("/api/next", b"\xff", {}, 400),
        ("/api/next", "x" * (serving.MAX_BODY + 1), {}, 413),
        ("/api/next", "{}", {"Content_Length": "-1"}, 411),
        ("/api/next", "{}", {"Content_Length": "9" * 5000}, 413),
        ("/api/save", '{"annotator": "a", "item": {}}', {}, 400),
        ("/api/close", "{}", {}, 404),
    ],
)
def test_requests_without_sense_are_refused(served, path, body, headers, status):
    assert ask(served, "POST", path, body, **headers)[0] == status
    assert ask(served, "GET", "/")[0] == 200


def test_a_full_disk_is_told_to_the_page(served, monkeypatch):
    item = served.desk.next("甲")["item"]

    def full(annotation):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(served.desk.log, "append", full)
    request = {"annotator": "甲", "item": item["key"], "ranks": [1, 2, 3]}
    status, _, body = ask(served, "POST", "/api/save", json.dumps(request))
    assert status == 507
    assert json.loads(body) == {"error": "not_saved", "detail": "No space left on device"}


def test_what_comes_after_the_end_is_refused(served):
    item = served.desk.next("甲")["item"]
    served.desk.close()
    request = {"annotator": "甲", "item": item["key"], "ranks": [1, 2, 3]}
    assert ask(served, "POST", "/api/save", json.dumps(request))[0] == 409


def test_a_browser_that_leaves_is_no_event(served, capfd):
    half = b"POST /api/next HTTP/1.1\r\nContent-Length: 90\r\n"
    for text in (b"", half, b"\x16\x03nonsense\r\n"):
        with socket.create_connection(served.server_address) as connection:
            connection.sendall(text)
    assert ask(served, "GET", "/")[0] == 200
    assert capfd.readouterr().err == ""


def test_a_port_in_use_and_wrong_addresses_are_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"in use.*rank\.Config\.port={port + 1}"):
            Server("127.0.0.1", port)
    for host, port, told in (
        ("0.0.0.0", 0, "every address"),
        ("192.0.2.1", 0, "cannot be listened on"),
        ("127.0.0.1", 70000, "not in 0..65535"),
    ):
        with pytest.raises(UserError, match=told):
            Server(host, port)


def test_another_address_is_its_own_name():
    server = Server("127.0.0.2", 0)
    try:
        assert urllib.parse.urlsplit(server.url).hostname == "127.0.0.2"
        assert server.names == {"127.0.0.2"}
    finally:
        server.server_close()
