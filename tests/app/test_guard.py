"""Foreign hosts, foreign origins, bodies without end and visitors who have left."""

import asyncio
import http.client
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from fewstep.app import guard as guard_module
from fewstep.app.guard import MAX_BODY_BYTES, Guard
from fewstep.app.serve import is_loopback, launch_app
from fewstep.app.settings import AppSettings
from fewstep.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning", "ignore::DeprecationWarning"
    ),
    pytest.mark.usefixtures("_leftovers"),
]
Classes = tuple[Path, Path]


@pytest.fixture(scope="module")
def port(classes: Classes) -> Iterator[int]:
    """A page of a tiny model on this machine alone."""
    page = launch_app(AppSettings(str(classes[0]), port=0), wait=False)
    yield urlsplit(page.local_url).port or 0
    page.close()


def ask(
    port: int, method: str = "GET", path: str = "/config", body: Any = None, **headers: str
) -> tuple[int, dict[str, str]]:
    """(status, headers) of one request; names of headers with _ for -."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    sent = {"Host": f"127.0.0.1:{port}", **{name.replace("_", "-"): value for name, value in headers.items()}}
    for name, value in sent.items():
        connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    answer.read()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LOCALHOST:80", "[::1]:7860"])
def test_names_of_this_machine(port: int, name: str) -> None:
    assert ask(port, Host=name)[0] == 200


@pytest.mark.parametrize("name", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "[broken"])
def test_foreign_names(port: int, name: str) -> None:
    status, headers = ask(port, Host=name, Origin=f"http://{name}")
    assert status == 403
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("origin", ["http://evil.example", "https://evil.example:1", "null", "file://"])
def test_foreign_origins(port: int, origin: str) -> None:
    status, headers = ask(port, Origin=origin)
    assert (status, "access-control-allow-origin" in headers) == (403, False)
    preflight = {"access_control_request_method": "POST"}
    status, headers = ask(port, "OPTIONS", "/gradio_api/queue/join", Origin=origin, **preflight)
    assert (status, "access-control-allow-origin" in headers) == (403, False)
    assert ask(port, "POST", "/gradio_api/queue/join", Origin=origin)[0] == 403


def test_own_origin(port: int) -> None:
    assert ask(port, Origin=f"http://127.0.0.1:{port}")[0] == 200


def test_long_bodies(port: int) -> None:
    headers = {"content_type": "application/json"}
    path = "/gradio_api/queue/join"
    assert ask(port, "POST", path, content_length=str(MAX_BODY_BYTES + 1), **headers)[0] == 413
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    whole = chunk * (MAX_BODY_BYTES // 0x10000 + 1) + b"0\r\n\r\n"
    assert ask(port, "POST", path, whole, transfer_encoding="chunked", **headers)[0] == 413


def test_a_name_behind_a_proxy() -> None:
    """What --root-path names is answered to, and its origin too."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def status(hosts: list[str], **headers: str) -> int:
        seen: list[int] = []

        async def send(message: Any) -> None:
            if "status" in message:
                seen.append(message["status"])

        pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "path": "/", "query_string": b"", "headers": pairs}
        asyncio.run(Guard(app, hosts=hosts, gone=_nobody)(scope, None, send))  # type: ignore[arg-type]
        return seen[0]

    own = {"host": "example.org", "origin": "https://example.org"}
    assert status(["example.org"], **own) == 200
    assert status([], **own) == 403
    assert status([], host="127.0.0.1", origin="https://example.org", x_forwarded_host="example.org") == 200
    assert status(["*"], host="lab.example", origin="http://lab.example:7860") == 200
    assert status(["*"], host="lab.example", origin="http://evil.example") == 403


async def _nobody(session: str) -> None:
    return None


def test_visitors_who_have_left_are_not_served(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that nobody listens to are in the queue; none of them makes a picture."""
    monkeypatch.setattr("fewstep.app.page.LISTENS_WITHIN_SECONDS", 0.2)
    made: list[Any] = []
    monkeypatch.setattr("fewstep.app.studio.Studio.make", lambda *args: made.append(args))
    config = json.loads(_body(port, "/config"))
    number = next(d["id"] for d in config["dependencies"] if len(d["inputs"]) > 5)
    for session in range(3):
        data = json.dumps(
            {"data": ["", -1, "1", 1, 8, False, False, None], "fn_index": number, "session_hash": f"gone{session}"}
        )
        headers = {"content_type": "application/json", "content_length": str(len(data))}
        assert ask(port, "POST", "/gradio_api/queue/join", data.encode(), **headers)[0] == 200
    time.sleep(3)
    assert made == []


@pytest.mark.parametrize("session", [{}, {"session_hash": "mine"}])
def test_programs_without_a_session_are_served(port: int, session: dict[str, str]) -> None:
    """As gradio documents it for curl: one request asks, another one waits."""
    data = json.dumps({"data": ["", -1, "1", 1], **session}).encode()
    headers = {"Content-Type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/gradio_api/call/generate", data, headers)
    event = json.loads(connection.getresponse().read())["event_id"]
    answer = _body(port, f"/gradio_api/call/generate/{event}")
    assert answer.startswith("event: complete\n")
    assert '"image": {"path": ' in answer


def test_no_files_are_taken(port: int) -> None:
    headers = {"content_type": "multipart/form-data; boundary=x", "content_length": "4"}
    assert ask(port, "POST", "/gradio_api/upload", b"--x-", **headers)[0] == 403


def test_the_end_of_a_stream_empties_the_queue_of_its_session() -> None:
    left: list[str] = []

    async def gone(session: str) -> None:
        left.append(session)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert guard_module.listening["me"] == 1
        raise asyncio.CancelledError

    scope = {
        "type": "http",
        "path": "/gradio_api/queue/data",
        "query_string": b"session_hash=me",
        "headers": [(b"host", b"localhost")],
    }
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(Guard(app, hosts=[], gone=gone)(scope, None, None))  # type: ignore[arg-type]
    assert left == ["me"]
    assert "me" not in guard_module.listening


def _body(port: int, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    return connection.getresponse().read().decode()


def test_root_paths() -> None:
    for path in ("/demo", "https://example.org/demo"):
        assert AppSettings("m", root_path=path).root_path == path
    for path in (
        "demo",
        "//evil.example",
        "http://",
        "https:///x",
        "/a b",
        "/a?b",
        "/a#b",
        "/a/../b",
        "https://me@h/x",
        "ftp://h/x",
    ):
        with pytest.raises(UserError, match=rf"--root-path {re.escape(path)}: give /PATH, or https://HOST/PATH"):
            AppSettings("m", root_path=path)


def test_a_root_path_of_the_environment_is_read_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_ROOT_PATH", "demo")
    with pytest.raises(UserError, match="GRADIO_ROOT_PATH=demo: give /PATH, or https://HOST/PATH"):
        launch_app(AppSettings("nothing"), wait=False)


def test_addresses_of_this_machine_alone() -> None:
    """127.0.0.1 has 16 million siblings, and a name may lead to one: other sites' names are refused there too."""
    for host in ("127.0.0.1", "127.0.0.2", "127.1.2.3", "::1", "localhost", "::ffff:127.0.0.1"):
        assert is_loopback(host), host
    for host in ("0.0.0.0", "192.0.2.1", "::", "no such host"):
        assert not is_loopback(host), host


def _answer(port: int, values: Any, function: str = "generate") -> str:
    """What a program is told that asks with these values."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    path = f"/gradio_api/call/{function}"
    connection.request("POST", path, json.dumps({"data": values}), {"content-type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        return f"{answer.status} {answer.read().decode()}"
    return _body(port, f"{path}/{json.loads(answer.read())['event_id']}")


@pytest.mark.parametrize(
    "values",
    [
        [], [""], ["", -1, "5"], ["", -1, "5", None], ["", -1, "5", "2"], ["", -1, "5", [1]], ["", -1, "5", {"a": 1}],
        ["", -1, "5", 1.5], ["", -1, "5", True], ["", -1, "5", float("nan")], ["", -1, "5", float("inf")],
        ["", -1, None, 1], ["", -1, {"a": 1}, 1], ["", "x", "5", 1], ["", [1], "5", 1], ["", 3.5, "5", 1],
        ["", -1, "5", 99],
    ],
)  # fmt: skip
def test_wrong_values_of_a_program_are_a_sentence(
    port: int, values: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    told = _answer(port, values)
    assert "event: error" in told
    assert '"error": "' in told
    assert "Something went wrong" not in told
    assert "Traceback" not in capfd.readouterr().err


def test_a_function_that_is_not_there(port: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert _answer(port, [], "nothing").startswith("404 there is no such function")
    assert "Traceback" not in capfd.readouterr().err
