"""data/prepare.py against servers on this machine: the text lands whole, or a line says why not."""
import hashlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conftest import run

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "prepare.py"
# in the place of Tiny Shakespeare
TEXT = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 5_000


class Server(ThreadingHTTPServer):
    """Answers a GET with `body`; announces `length` bytes; waits after `pause_after` of them."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.body, self.length = 200, TEXT, len(TEXT)
        self.pause_after, self.paused, self.resume = None, threading.Event(), threading.Event()
        self.requests = 0
        self.url = f"http://127.0.0.1:{self.server_port}/input.txt"

    def handle_error(self, request, client_address):
        """A client that hangs up, as ours does when it is killed, is no fault of the server."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests += 1
        self.send_response(server.status)
        self.send_header("Content-Length", str(server.length))
        self.end_headers()
        pause = len(server.body) if server.pause_after is None else server.pause_after
        self.wfile.write(server.body[:pause])
        if server.pause_after is not None:
            server.paused.set()
            server.resume.wait(60)
            self.wfile.write(server.body[pause:])

    def log_message(self, *args):
        """Keeps the output of the tests quiet."""


@pytest.fixture
def servers(monkeypatch):
    """The two sources of the text."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = Server(), Server()
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield servers
    for server in servers:
        server.resume.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(servers):
    """The first source, where the second has nothing."""
    servers[1].status = 404
    return servers[0]


def constants(server, folder, *others):
    """What prepare.py is told instead of the real addresses, hash and place."""
    return {"URLS": [source.url for source in (server, *others)], "SIZE": len(TEXT),
            "SHA256": hashlib.sha256(TEXT).hexdigest(), "PATH": folder / "input.txt",
            "REMEDY": "Put any UTF-8 text at input.txt, or pass --data_path"}


@pytest.fixture
def prepare(servers, tmp_path, monkeypatch):
    """prepare.py as a module that downloads from the servers into `tmp_path`."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    module = importlib.import_module("prepare")
    for name, value in constants(servers[0], tmp_path, servers[1]).items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(sys, "argv", ["prepare.py"])
    return module


def start(server, folder):
    """The same in a process of its own, which can be killed."""
    code = (f"import sys; from pathlib import *; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
            f"import prepare; vars(prepare).update({constants(server, folder)!r})\n"
            "sys.argv = ['prepare.py']; prepare.run_script(prepare.main)")
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def failure(prepare):
    """The line that the script ends with; nothing may have been written."""
    with pytest.raises(ValueError) as error:
        prepare.main()
    assert os.listdir(prepare.PATH.parent) == [] and "\n" not in str(error.value)
    assert "put any utf-8 text at" in str(error.value).lower() and "--data_path" in str(error.value)
    return str(error.value)


def test_a_good_download_is_written_whole_and_leaves_nothing_else(prepare, servers, capsys):
    prepare.main()
    assert prepare.PATH.read_bytes() == TEXT
    assert os.listdir(prepare.PATH.parent) == ["input.txt"]
    assert [server.requests for server in servers] == [1, 0]
    out, err = capsys.readouterr()
    assert f"{len(TEXT):,} bytes" in out
    assert err == ""  # the progress bar is for terminals


def test_the_right_text_is_not_downloaded_again(prepare, server, capsys):
    prepare.main()
    prepare.main()
    assert server.requests == 1
    assert "already" in capsys.readouterr().out


@pytest.mark.parametrize("own_text", [b"my own novel", b"", TEXT[:-1], b"\xff\xfe binary \x00"])
def test_another_text_is_left_alone(prepare, server, capsys, own_text):
    prepare.PATH.write_bytes(own_text)
    prepare.main()
    assert prepare.PATH.read_bytes() == own_text
    assert server.requests == 0
    assert "stays as it is" in capsys.readouterr().out


@pytest.mark.parametrize("blocked", [
    {"status": 404}, {"status": 403, "body": b"", "length": 0}, {"body": TEXT[:-1] + b"?"},
    {"body": TEXT[:100_000]}, {"body": b"<html>please log in</html>", "length": 26},
], ids=["missing", "forbidden", "changed", "cut short", "another page"])
def test_the_second_source_serves_where_the_first_does_not(prepare, servers, blocked):
    vars(servers[0]).update(blocked)
    prepare.main()
    assert prepare.PATH.read_bytes() == TEXT
    assert [server.requests for server in servers] == [1, 1]


def test_a_changed_text_is_not_kept(prepare, servers):
    for server in servers:
        server.body = TEXT[:-1] + b"?"
    line = failure(prepare)
    assert line.count("wrong SHA-256") == 2 and all(server.url in line for server in servers)


def test_an_endless_text_is_refused_after_one_byte_too_many(prepare, server):
    server.body, server.length = TEXT * 2, len(TEXT) * 1_000_000
    server.pause_after = len(TEXT) + 1
    assert "wrong SHA-256" in failure(prepare)  # the server still waits: we did not ask for more


def test_a_download_that_breaks_off_says_how_far_it_came(prepare, server):
    server.body = TEXT[:100_000]
    line = failure(prepare)
    assert "100,000" in line or "IncompleteRead" in line


def test_a_missing_page_is_named(prepare, server):
    server.status = 404
    line = failure(prepare)
    assert "404" in line and server.url in line


def test_no_network_says_what_to_do(prepare, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, but not listening: every connection is refused
        monkeypatch.setattr(prepare, "URLS", [f"http://127.0.0.1:{closed.getsockname()[1]}/"])
        failure(prepare)


def test_a_server_that_falls_silent_is_given_up(prepare, server, monkeypatch):
    monkeypatch.setattr(prepare, "TIMEOUT", 0.2)
    server.pause_after = 1_000
    assert "timed out" in failure(prepare)


@pytest.mark.parametrize("place, make", [("input.txt", Path.mkdir), ("file/input.txt", None)])
def test_a_place_that_cannot_be_written_is_named(prepare, tmp_path, monkeypatch, place, make):
    (tmp_path / "file").touch()
    monkeypatch.setattr(prepare, "PATH", tmp_path / place)
    if make:
        make(tmp_path / place)
    with pytest.raises(OSError, match=place):
        prepare.main()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ended_in_mid_download_nothing_is_there_and_the_next_run_works(
        prepare, server, tmp_path, number):
    server.pause_after = 100_000
    process = start(server, tmp_path)
    assert server.paused.wait(60)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == {signal.SIGINT: 130}.get(number, -number) and err == ""
    assert os.listdir(tmp_path) == []
    server.pause_after = None
    prepare.main()
    assert prepare.PATH.read_bytes() == TEXT


def test_help_and_unknown_flags():
    shown, wrong = run(SCRIPT, "--help"), run(SCRIPT, "--nonsense")
    assert shown.returncode == 0 and "never replaces" in shown.stdout
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr


def test_the_script_knows_the_real_text(shakespeare):
    done = run(SCRIPT, cwd=SCRIPT.anchor)
    assert done.returncode == 0 and "is Tiny Shakespeare already" in done.stdout, done.stderr
