"""What the tests share: running a script as a user does, the real text, and a tiny network trained in seconds."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what it runs in the background deaf to Ctrl-C
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

TINY = ["--n_embd", "16", "--n_head", "3", "--n_layer", "2", "--block_size", "16", "--batch_size", "4", "--vocab_size", "300",
        "--device", "cpu"]


def pytest_configure(config):
    config.addinivalue_line("markers", "attack: takes minutes, and runs only with -m attack")


def pytest_collection_modifyitems(config, items):
    if "attack" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("attack")])
        items[:] = [item for item in items if not item.get_closest_marker("attack")]


def run(script, *args, **options):
    """Runs a script of the repository. Returns the finished process, with its output as text."""
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], text=True, capture_output=True,
                          **{"timeout": 300, "stdin": subprocess.DEVNULL} | options)


def complaint(process, status=1):
    """The one line a failed script leaves on standard error; fails if there is anything else, a traceback say."""
    assert process.returncode == status, process.stdout + process.stderr
    lines = [line for line in process.stderr.splitlines() if status == 1 or not line.startswith(("usage:", " "))]
    assert len(lines) == 1 and "Traceback" not in process.stderr, process.stderr
    return lines[0]


def wait_for(event, process):
    """Waits until event() is true; fails if the process ends before."""
    while not event():
        assert process.poll() is None, "it ended too soon"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def shakespeare():
    """Path of the real text; where it is missing the test is skipped, but in CI it fails."""
    path = ROOT / "data" / "input.txt"
    if not path.exists():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("data/input.txt is missing: run python data/prepare.py")
    return path


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory):
    """A text of 20,000 characters with something to learn in it, accents and a long dash included."""
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    lines = [f"{who}: {what} \N{EM DASH} {number * number % 97} caf\N{LATIN SMALL LETTER E WITH ACUTE}s.\n" for number in range(700)
             for who, what in [(("ROMEO", "JULIET", "NURSE")[number % 3], ("speak", "be gone", "good night", "what say you")[number % 4])]]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished_run(tiny_text, tmp_path_factory):
    """The folder of a run of 60 iterations with a tiny network. Read it, don't change it."""
    folder = tmp_path_factory.mktemp("run")
    process = run("train.py", *TINY, "--data_path", tiny_text, "--out_dir", folder, "--max_iters", 60, "--eval_interval", 20,
                  "--learning_rate", "3e-3")
    assert process.returncode == 0, process.stderr
    (folder / "stdout.txt").write_text(process.stdout)
    return folder


@pytest.fixture
def tiny_run(finished_run, tmp_path):
    """A copy of that folder, to change at will."""
    return shutil.copytree(finished_run, tmp_path / "run")
