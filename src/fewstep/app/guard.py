"""Who may speak to the page: its own hosts and origins, in short requests, as long as somebody listens to the answer."""

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_BODY_BYTES = 2**20  # a prompt and a few numbers are far below; uploads there are none
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_STREAM = "/queue/data"  # the path on which a browser listens to its requests
_CALL = re.compile(r"/call/(?:v2/)?[^/]+/([^/]+)/?")  # on which a program listens to one of its own
_UPLOAD = "/upload"
_NO_ENDPOINT = "FnIndexInferError"  # gradio's word for a name or number that no function has


class Guard:
    """ASGI middleware in front of the page.

    A page on this machine alone answers only to names of this machine, or a web site elsewhere could reach it through
    the visitor's browser (DNS rebinding). A page on other addresses answers to any name; foreign origins are refused
    on both.

    Args:
        app: what answers.
        hosts: names the page answers to besides those of this machine; "*": to any.
        gone: called with a session when nobody listens to it any more.
        session_of: the session of an event in the queue.
    """

    def __init__(
        self, app: Any, *, hosts: Iterable[str], gone: Callable[[str], Awaitable[None]],
        session_of: Callable[[str], str] = lambda event: event,
    ) -> None:  # fmt: skip
        self.app, self.gone, self.session_of = app, gone, session_of
        self.hosts = LOOPBACK | {name.lower() for name in hosts}

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer 403 or 413, or hand on."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if refusal := self._foreign(headers):
            await _answer(scope, send, 403, refusal)
        elif _content_length(headers) > MAX_BODY_BYTES:
            await _answer(scope, send, 413, f"a request has at most {MAX_BODY_BYTES} bytes")
        elif scope["path"].endswith(_UPLOAD):
            await _answer(scope, send, 403, "this page takes no files")
        elif scope["type"] == "http" and (session := self._listened_to(scope)):
            await self._stream(session, scope, receive, send)
        else:
            await self._counted(scope, receive, send)

    def _listened_to(self, scope: MutableMapping[str, Any]) -> str:
        """The session whose answers a request waits for; "" where it is no such request."""
        if scope["path"].endswith(_STREAM):
            return parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        call = _CALL.search(scope["path"]) if scope.get("method") == "GET" else None
        return self.session_of(call[1]) if call else ""

    def _foreign(self, headers: MutableMapping[str, str]) -> str:
        """Why a request is not from this page; "" where it is."""
        host = _name(f"//{headers.get('host', '')}")
        if "*" not in self.hosts and host not in self.hosts:
            return f"this page does not answer to the name {host!r}; see --root-path in docs/app.md"
        origin = headers.get("origin", "")
        allowed = self.hosts | {host, _name(f"//{headers.get('x-forwarded-host', '')}")}
        if origin and _name(origin) not in allowed - {""}:
            return f"requests from {origin} are not answered"
        return ""

    async def _counted(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """A body without a stated length ends where the limit is, whatever the application makes of its end."""
        size, started = 0, False

        async def counted() -> Message:
            nonlocal size
            message = {"type": "http.disconnect"} if size > MAX_BODY_BYTES else await receive()
            size += len(message.get("body", b""))
            return {"type": "http.disconnect"} if size > MAX_BODY_BYTES else message

        async def noted(message: Message) -> None:
            nonlocal started
            if size <= MAX_BODY_BYTES or started:
                started = True
                await send(message)

        try:
            await self.app(scope, counted, noted)
        except Exception as error:
            if type(error).__name__ == _NO_ENDPOINT and not started and scope["type"] == "http":
                await _answer(scope, send, 404, "there is no such function; docs/app.md says which there is")
                return
            if size <= MAX_BODY_BYTES:
                raise
        if size > MAX_BODY_BYTES and not started:
            await _answer(scope, send, 413, f"a request has at most {MAX_BODY_BYTES} bytes")

    async def _stream(self, session: str, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Somebody listens to a session until this returns."""
        listening[session] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            listening[session] -= 1
            if listening[session] <= 0:
                del listening[session]
                await asyncio.shield(self.gone(session))


listening: Counter[str] = Counter()  # open streams of each session, over all pages of this process


def _content_length(headers: MutableMapping[str, str]) -> int:
    text = headers.get("content-length", "0")
    return int(text) if text.isascii() and text.isdigit() else 0


def _name(address: str) -> str:
    """The host of an address without its port, in small letters; "" where there is none."""
    try:
        return (urlsplit(address).hostname or "").lower()
    except ValueError:
        return ""


async def _answer(scope: MutableMapping[str, Any], send: Send, status: int, words: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": words.encode()})
