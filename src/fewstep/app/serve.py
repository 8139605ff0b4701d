"""Start the page: load, build, listen on one address until Ctrl-C."""

import errno
import ipaddress
import os
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fewstep.app.guard import Guard
from fewstep.app.settings import AppSettings, check_root_path
from fewstep.app.studio import load_studio
from fewstep.errors import UserError, first_line

if TYPE_CHECKING:
    import gradio


def launch_app(settings: AppSettings, *, wait: bool = True) -> "gradio.Blocks":
    """Load the models and serve the page.

    Args:
        settings: what to load and where to listen.
        wait: until Ctrl-C; otherwise return while the page is served, `.local_url` its address, `.close()` its end.

    Raises:
        UserError: gradio is missing, the address is not to be had, or a model cannot be loaded.
    """
    # before the import: nothing is sent anywhere, and no list of requests is kept in the browser
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
    try:
        import gradio
    except ImportError as error:
        raise UserError(f"the web page needs gradio ({error}): pip install gradio") from error
    from fewstep.app.page import CSS, build_page

    check_root_path(os.environ.get("GRADIO_ROOT_PATH", ""), "GRADIO_ROOT_PATH=")
    _check_address(settings.host, settings.port)
    page = build_page(load_studio(settings))
    font = ["ui-sans-serif", "system-ui", "sans-serif"]
    host = settings.host.strip("[]")
    for name in ("NO_PROXY", "no_proxy"):  # gradio asks its own page once, which no proxy could answer
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost", host]))
    from starlette.middleware import Middleware

    root, is_here = settings.root_path or os.environ.get("GRADIO_ROOT_PATH", ""), is_loopback(host)
    hosts = [name for name in (host, urlsplit(root).hostname) if name and name not in _EVERYWHERE]
    rules: dict[str, Any] = {
        "hosts": hosts if is_here else ["*"],
        "gone": _leaves_queue(page),
        "session_of": _session_of(page),
    }
    options: dict[str, Any] = {
        "root_path": root, "app_kwargs": {"middleware": [Middleware(Guard, **rules)]},
        "theme": gradio.themes.Default(font=font, font_mono=["ui-monospace", "monospace"]), "css": CSS,
        "footer_links": [], "share": False, "ssr_mode": False, "enable_monitoring": False, "show_error": False,
        "max_file_size": "1kb", "state_session_capacity": 100,
    }  # fmt: skip
    try:
        page.launch(
            server_name=f"[{host}]" if ":" in host else host, server_port=settings.port or None, prevent_thread_lock=True, quiet=True,
            **options,
        )  # fmt: skip
    except OSError as error:
        raise UserError(_taken(settings.host, settings.port, first_line(error))) from error
    except Exception as error:  # gradio's own check of the page raises a bare one
        raise UserError(f"the page at {host} does not answer ({first_line(error)}); try another --host") from error
    # gradio puts its own answers to foreign origins outside of that one
    page.app.middleware_stack = Guard(page.app.middleware_stack, **rules)
    print(f"fewstep app: {page.local_url} (Ctrl-C ends it)", flush=True)
    if not is_here:
        print(
            "fewstep app: everyone who reaches this address can use the page, there is no password; "
            "docs/app.md shows an ssh tunnel", flush=True,
        )  # fmt: skip
    if wait:
        page.block_thread()
    return page


_EVERYWHERE = ("0.0.0.0", "::")


def _leaves_queue(page: "gradio.Blocks") -> Callable[[str], Awaitable[None]]:
    """Requests of a session that nobody listens to leave the queue before they run."""

    async def gone(session: str) -> None:
        await page._queue.clean_events(session_hash=session)

    return gone


def _session_of(page: "gradio.Blocks") -> Callable[[str], str]:
    """The session of a queued event; its own name where the program that asked has none, as gradio has it."""

    def session_of(event: str) -> str:
        queued = page._queue.event_ids_to_events.get(event)
        return getattr(queued, "session_hash", None) or event

    return session_of


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address: 127.0.0.1, any other of 127.0.0.0/8, ::1, or a name that leads to such alone."""
    try:
        found = {str(place[4][0]).partition("%")[0] for place in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False
    addresses = [ipaddress.ip_address(text) for text in found]
    return all((getattr(address, "ipv4_mapped", None) or address).is_loopback for address in addresses)


def _check_address(host: str, port: int) -> None:
    """Before models are loaded, which takes longer."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            probe.bind(address)
    except (OSError, UnicodeError) as error:  # the latter: no name can be written like this
        if isinstance(error, socket.gaierror | UnicodeError) or error.errno == errno.EADDRNOTAVAIL:
            raise UserError(
                f"--host {host} is no address of this machine; 127.0.0.1 is this machine alone, "
                "0.0.0.0 every network it is in"
            ) from error
        raise UserError(_taken(host, port, error.strerror or first_line(error))) from error


def _taken(host: str, port: int, reason: str) -> str:
    return f"cannot listen on {host}, port {port}: {reason}; choose another --port, 0 takes a free one"
