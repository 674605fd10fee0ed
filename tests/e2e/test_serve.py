"""The tests start the server as a user does, and open its page in a real browser."""

import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import warm
from tests.e2e.conftest import command, environment
from tests.e2e.test_errors import complaint
from tests.models.conftest import save_student

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytestmark = pytest.mark.slow
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def address(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("serve")
    student = save_student(folder / "student", tiny_pipeline)
    options = [f"pipeline={student}", f"teacher={tiny_pipeline}", "port=0", "device=cpu", "steps=2", "teacher_steps=4"]
    process = warm.start(command("lcm.serve", *options), folder, environment(), log := folder / "log")
    deadline = time.monotonic() + 300
    try:
        while not (match := re.search(r"page: +(http://\S+)\s", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield match[1]
        process.terminate()
        assert process.wait(60) in (0, -15)
    finally:
        process.kill()


def test_many_clients_at_once(address: str) -> None:
    codes = []

    def ask(number: int) -> None:
        body = json.dumps({"prompt": f"{number}", "steps": 1}).encode()
        request = urllib.request.Request(f"{address}/api/draw", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            codes.append((answer.status, answer.read(4)))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [(200, b"\x89PNG")] * 8


def content(address: str, folder: Path) -> str:
    """Return the page of a real browser, after its scripts have run."""
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    dump = [CHROMIUM, *options, "--virtual-time-budget=60000", "--dump-dom", address]
    return subprocess.run(dump, check=True, capture_output=True, text=True, timeout=180).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_page_shows_its_settings_in_a_browser(address: str, tmp_path: Path) -> None:
    """The page shows its settings before anything is drawn."""
    page = content(address, tmp_path)
    assert '<output id="steps-shown">2</output>' in page
    assert re.search(r'<output id="w-shown">[\d.]+</output>', page)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_page_draws_in_a_browser(address: str, tmp_path: Path) -> None:
    """The student and the teacher draw the prompt in the address, like a typed prompt."""
    page = content(f"{address}/?prompt=rocket", tmp_path)
    shown = dict(re.findall(r'<figure id="(\w+)">.*?src="(blob:[^"]+)" ?.*?</figure>', page, re.DOTALL))
    assert shown.keys() == {"student", "teacher"}, page
    assert "student, 2 steps" in page
    assert re.search(r"teacher, \d+ steps?, \d+ ms", page)
    assert re.search(r'<p id="message" role="status"></p>', page)


def test_wrong_server_option_is_refused(run, tiny_pipeline: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = complaint(run("lcm.serve", f"pipeline={tiny_pipeline}", f"port={port}"))
    assert f"cannot listen on host=127.0.0.1, port={port}" in message
    assert "set port=0 for a free one" in message
