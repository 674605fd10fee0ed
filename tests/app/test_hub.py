"""The uploads go to a local HTTP server. It answers as the hub does and stores the files that it receives."""

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.e2e.conftest import environment

TOKEN = "hf_a-secret-of-this-test"
UPLOAD = "from pathlib import Path; from lcm.app.hub import Repository; print(Repository({!r}).upload(Path({!r})))"


@pytest.fixture
def hub() -> Iterator[Any]:
    """Yield a server with `address`, `requests` (method, path) and `files` (content by name)."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            server.requests.append((self.command, self.path))
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                return self.send(401, {"error": "Invalid credentials"})
            if self.path == "/api/whoami-v2":
                return self.send(200, {"type": "user", "name": "me", "orgs": [{"name": "lab"}]})
            if self.path == "/api/repos/create":
                return self.send(200, {"url": f"{server.address}/lab/model", "name": "lab/model"})
            if "/preupload/" in self.path:
                files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
                return self.send(200, {"files": files})
            if "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                return self.send(200, {"commitUrl": f"{server.address}/lab/model/commit/1", "commitOid": "1"})
            return self.send(200, {})

        do_GET = do_POST = answer

        def send(self, status: int, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.address, server.requests, server.files = f"http://127.0.0.1:{server.server_port}", [], {}
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def run(hub: Any, *args: str, **env: str) -> subprocess.CompletedProcess:
    variables = environment(HF_ENDPOINT=hub.address, HF_HUB_OFFLINE="0", HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1") | env
    return subprocess.run([sys.executable, *args], env=variables, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_folder_is_uploaded(hub: Any, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text("{}")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    done = run(hub, "-c", UPLOAD.format("lab/model", str(tmp_path)))
    assert done.stdout == f"{hub.address}/lab/model\n", done.stderr
    assert hub.files == {"unet/config.json": b"{}", "README.md": (tmp_path / "README.md").read_bytes()}
    assert TOKEN not in done.stdout + done.stderr


WRONG = [
    ("model", TOKEN, "push names no repository of the hub: give push=owner/name"),
    ("lab/a b", TOKEN, "push names no repository of the hub: give push=owner/name"),
    ("lab/model", "", "push=lab/model needs a token with the right to write: set the environment variable HF_TOKEN"),
    ("lab/model", "hf_another", "push=lab/model: the hub refuses the token in HF_TOKEN (status 401)"),
    ("you/model", TOKEN, "push=you/model: the token in HF_TOKEN writes for me, lab: give one of these owners"),
]
TRY_ALL = """
import json, os, sys
from lcm.app.hub import Repository
from lcm.core.errors import UserError
for name, token in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    try:
        Repository(name)
    except UserError as error:
        print(str(error).replace(chr(10), " "))
"""


@pytest.mark.slow
def test_a_wrong_name_or_token_is_refused(hub: Any) -> None:
    done = run(hub, "-c", TRY_ALL, json.dumps([(name, token) for name, token, _ in WRONG]))
    assert [says for (*_, says), line in zip(WRONG, done.stdout.splitlines(), strict=True) if says not in line] == [], done
    assert not [token for _, token, _ in WRONG if token and token in done.stdout + done.stderr]
    assert all(method == "GET" for method, _ in hub.requests)


@pytest.mark.slow
def test_an_export_checks_the_token_first(hub: Any, tmp_path: Path) -> None:
    """The folder of the run does not exist. Without the early check, the export ends in another error."""
    done = run(hub, "-m", "lcm.export", f"run={tmp_path / 'none'}", "push=you/model")
    assert done.returncode == 1
    assert done.stderr.endswith("the token in HF_TOKEN writes for me, lab: give one of these owners\n")
