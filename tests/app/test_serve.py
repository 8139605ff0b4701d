"""Starting the page: from the command line, from Python, and what an operator is told when it cannot start."""

import importlib.util
import socket
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fewstep.app.serve import launch_app
from fewstep.app.settings import AppSettings
from fewstep.cli.main import app
from fewstep.errors import UserError

EXAMPLE = Path(__file__).parents[2] / "examples/app.py"
Classes = tuple[Path, Path]
# gradio closes its server's loop and sockets in a thread, after the test
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
    pytest.mark.usefixtures("_leftovers"),
]


def test_the_example_serves_a_page(classes: Classes, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("example_app", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.main([str(classes[0]), "--teacher", str(classes[1]), "--port", "0"], wait=False)
    try:
        assert page.local_url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(page.local_url, timeout=60) as answer:
            text = answer.read().decode()
        assert '"title":"fewstep"' in text
        assert "fonts.googleapis.com" not in text
        assert page.share is False
    finally:
        page.close()
    assert "Ctrl-C ends it" in capsys.readouterr().out


def test_a_port_in_use(classes: Classes) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot listen on 127\.0\.0\.1, port {port}: .* choose another --port"):
            launch_app(AppSettings(str(classes[0]), port=port), wait=False)


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "a..b"])
def test_an_address_of_another_machine(host: str) -> None:
    """Said before any model is loaded: there is none of this name."""
    with pytest.raises(UserError, match=rf"--host {host} is no address of this machine"):
        launch_app(AppSettings("nothing", host=host), wait=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "[::1]"])
def test_a_proxy_is_not_asked_for_the_page(
    classes: Classes, host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Servers often have one in their environment; IPv6 has brackets in addresses and none in settings."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "example.org")
    if ":" in host and not _has_ipv6():
        pytest.skip("this machine has no IPv6")
    page = launch_app(AppSettings(str(classes[0]), host=host, port=0), wait=False)
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(page.local_url, timeout=60) as answer:
            assert answer.status == 200
    finally:
        page.close()
    assert "no password" not in capsys.readouterr().out


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_guidance_must_be_finite(scale: float) -> None:
    with pytest.raises(UserError, match=r"--guidance-scale .*: give a finite number"):
        AppSettings("m", guidance_scale=scale)


def test_without_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"the web page needs gradio .* pip install gradio"):
        launch_app(AppSettings("model"))


def test_the_command_hands_its_options_over(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("fewstep.app.serve.launch_app", seen.append)
    given = [
        "app", "m", "--teacher", "t", "--host", "0.0.0.0", "--port", "0", "--max-images", "2", "--max-queue", "3",
        "--max-prompt", "4", "--history", "5", "--teacher-steps", "6", "--guidance-scale", "7", "--tiny-vae", "v",
        "--no-safety-checker", "--device", "cpu", "--precision", "bf16",
    ]  # fmt: skip
    assert CliRunner().invoke(app, given).exit_code == 0
    assert CliRunner().invoke(app, ["app", "m"]).exit_code == 0
    assert seen == [
        AppSettings("m", "t", "0.0.0.0", 0, 2, 3, 4, 5, 6, 7.0, "v", False, "cpu", "bf16"), AppSettings("m"),
    ]  # fmt: skip


def test_the_default_is_this_machine_alone() -> None:
    assert AppSettings("m").host == "127.0.0.1"
