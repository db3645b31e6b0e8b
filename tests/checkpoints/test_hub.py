"""Files downloaded from a repository, through the hub's client against a small local server."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

COMMIT = "a" * 40
BESIDE = ("config.json", "tokenizer.json", "README.md", "training_args.bin", "optimizer.bin")
REPOSITORIES = {
    "torch": (
        *("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
        *("pytorch_model.bin.index.json", *BESIDE),
    ),
    "whole": ("pytorch_model.bin", *BESIDE),
    "both": ("pytorch_model.bin", "model.safetensors", *BESIDE),
    "sharded": (
        *("model-00001-of-00001.safetensors", "model.safetensors.index.json"),
        *("pytorch_model.bin", "pytorch_model.bin.index.json", *BESIDE),
    ),
}


class Hub(BaseHTTPRequestHandler):
    """Answers what a client asks to list and fetch files."""

    def log_message(self, *arguments):
        del arguments

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = urlsplit(self.path).path
        if path.startswith("/api/models/someone/"):
            name = path.split("/")[4]
            files = [{"rfilename": file} for file in REPOSITORIES[name]]
            if "/tree/" in path:
                files = [
                    {"type": "file", "path": file, "size": len(file), "oid": COMMIT}
                    for file in REPOSITORIES[name]
                ]
                content = json.dumps(files)
            else:
                content = json.dumps({"id": name, "sha": COMMIT, "siblings": files})
        else:
            content = path.rpartition("/")[2]
        body = content.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    """The files that `resolve_path` leaves of each repository, online and then offline."""
    program = (
        "import json, sys\n"
        "from jaxtune.checkpoints.huggingface import resolve_path\n"
        "found = {name: resolve_path(f'someone/{name}') for name in sys.argv[1:]}\n"
        "print(json.dumps({n: sorted(p.name for p in d.iterdir()) for n, d in found.items()}))\n"
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path_factory.mktemp("hub")),
        "HF_HUB_DISABLE_XET": "1",
    }

    def run(**changes):
        command = [sys.executable, "-c", program, *REPOSITORIES]
        done = subprocess.run(
            command, env=environment | changes, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    online = run()
    server.shutdown()
    return online, run(HF_HUB_OFFLINE="1")


def test_torch_files_are_fetched_where_there_are_no_safetensors(fetched):
    beside = {"config.json", "tokenizer.json"}
    expected = {
        "torch": beside | {name for name in REPOSITORIES["torch"] if name.startswith("pytorch_")},
        "whole": beside | {"pytorch_model.bin"},
        "both": beside | {"model.safetensors"},
        "sharded": beside
        | {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}
        | {"pytorch_model.bin.index.json"},  # a few lines, as all JSON
    }
    online, offline = fetched
    assert {name: set(files) for name, files in online.items()} == expected
    assert offline == online
