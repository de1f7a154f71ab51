"""data/prepare.py against servers on this machine: the text lands whole, or a line says why not."""
import hashlib
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import prepare
from conftest import complaint, run

# in the place of Tiny Shakespeare
TEXT = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 5_000
CHANGED = TEXT[:-1] + b"?"


class Server(ThreadingHTTPServer):
    """Answers a GET with `body`, announced as `length` bytes; then falls silent if `silent`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.body, self.length, self.silent = 200, TEXT, len(TEXT), False
        self.requests, self.url = 0, f"http://127.0.0.1:{self.server_port}/input.txt"


class Handler(BaseHTTPRequestHandler):
    timeout = 60  # seconds to wait for a client

    def do_GET(self):
        self.server.requests += 1
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(self.server.length))
        self.end_headers()
        self.wfile.write(self.server.body)
        if self.server.silent:
            self.rfile.read(1)  # until the client hangs up

    def log_message(self, *args):
        """Keeps the output of the tests quiet."""


@pytest.fixture
def servers(tmp_path, monkeypatch):
    """The two sources of the text."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(sys, "argv", ["prepare.py"])
    with Server() as first, Server() as second:
        for name, value in {"URLS": [first.url, second.url], "SIZE": len(TEXT),
                            "SHA256": hashlib.sha256(TEXT).hexdigest(),
                            "PATH": tmp_path / "input.txt"}.items():
            monkeypatch.setattr(prepare, name, value)
        for server in first, second:
            threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        yield first, second
        for server in first, second:
            server.shutdown()


def test_a_good_download_is_written_whole_and_happens_once(servers, tmp_path, capsys):
    prepare.main()
    assert prepare.PATH.read_bytes() == TEXT and os.listdir(tmp_path) == ["input.txt"]
    out, err = capsys.readouterr()
    assert f"{len(TEXT):,} bytes" in out and err == ""  # the progress bar is for terminals
    prepare.main()
    assert "already" in capsys.readouterr().out
    assert [server.requests for server in servers] == [1, 0]


@pytest.mark.parametrize("own_text", [b"", CHANGED])
def test_another_text_is_left_alone(servers, capsys, own_text):
    prepare.PATH.write_bytes(own_text)
    prepare.main()
    assert prepare.PATH.read_bytes() == own_text and servers[0].requests == 0
    assert "stays as it is" in capsys.readouterr().out


@pytest.mark.parametrize("amiss, message", [
    ({"status": 404}, "HTTP Error 404"),
    ({"body": CHANGED}, "wrong SHA-256"),
    ({"body": TEXT[:100_000]}, "100,000 bytes|IncompleteRead"),
    ({"body": TEXT + b"\n", "length": 10**12, "silent": True}, "wrong SHA-256"),
    ({"body": b"", "silent": True}, "timed out"),
], ids=["missing", "changed", "cut short", "endless, of which one byte more is read", "silent"])
def test_what_one_source_cannot_bring_is_named_or_had_from_the_other(
        servers, tmp_path, monkeypatch, amiss, message):
    monkeypatch.setattr(prepare, "TIMEOUT", 1 if "silent" in amiss else 30)
    vars(servers[0]).update(amiss)
    servers[1].status = 404
    with pytest.raises(ValueError, match=rf"{servers[0].url} .*({message}).*404") as error:
        prepare.main()
    assert str(error.value).endswith(prepare.REMEDY) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []
    servers[1].status = 200
    prepare.main()
    assert prepare.PATH.read_bytes() == TEXT


def test_a_place_that_cannot_be_written_is_named(servers, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for place, reason in ("", "Is a directory"), ("file/input.txt", "cannot write"):
        monkeypatch.setattr(prepare, "PATH", tmp_path / place)
        with pytest.raises(OSError, match=f"{reason}.*{tmp_path / place}"):
            prepare.main()


def test_the_script_knows_the_real_text_and_no_flags(shakespeare):
    done = run("data/prepare.py", cwd=shakespeare.anchor)
    assert done.returncode == 0 and "is Tiny Shakespeare already" in done.stdout, done.stderr
    assert "--nonsense" in complaint(run("data/prepare.py", "--nonsense"), 2)
