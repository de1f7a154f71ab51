"""What the tests share: running a script, the real text, and a tiny network trained in seconds."""
import csv
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

# a shell starts what it runs in the background deaf to Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # and `nohup` to a terminal that is closed
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in (".", "data", "tests")]

TINY = ("--n_embd 16 --n_head 3 --n_layer 2 --block_size 16 --batch_size 4 --vocab_size 300 "
        "--device cpu").split()


def pytest_configure(config):
    config.addinivalue_line("markers", "attack: takes minutes, and runs only with -m attack")
    config.option.markexpr = config.option.markexpr or "not attack"


# ---- scripts ----

def python(*arguments, **options):
    """Runs Python. Returns the finished process, with its output as text."""
    defaults = {"text": True, "capture_output": True, "stdin": subprocess.DEVNULL, "timeout": 300}
    return subprocess.run([sys.executable, *map(str, arguments)], **defaults | options)


def start(*arguments, **options):
    """Starts Python, with pipes for its output as text."""
    defaults = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *map(str, arguments)], **defaults | options)


def run(script, *args, **options):
    """Runs a script of the repository as `python` does.

    On Linux and without options FORKS does it, as most of the time goes into loading PyTorch.
    """
    argv = [str(ROOT / script), *map(str, args)]
    if options or sys.platform != "linux":
        return python(*argv, **options)
    with tempfile.TemporaryDirectory() as folder:
        output = [Path(folder) / "stdout", Path(folder) / "stderr"]
        status = fork(run_file, argv, output, dict(os.environ), seconds=300)
        texts = [path.read_text(encoding="utf-8") for path in output]
    return subprocess.CompletedProcess(argv, status, *texts)


FORKS = multiprocessing.get_context("forkserver")  # has libraries loaded: scripts start at once
FORKS.set_forkserver_preload(["matplotlib.figure", "torch._dynamo", "torch.ao.quantization"])


def fork(function, *args, seconds=None):
    """Calls a function in a process, killed after so many seconds. Returns its status."""
    process = FORKS.Process(target=function, args=args)
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


def run_file(argv, output, environment):
    """Runs a script as Python does, its output and errors into two files, for `fork`."""
    for number, path in enumerate(output, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(environment)
    sys.argv = argv
    sys.path.insert(0, os.path.dirname(argv[0]))
    runpy.run_path(argv[0], run_name="__main__")


def complaint(process, status=1):
    """Returns the one line of a failed script, beside usage or what generate.py samples from."""
    assert process.returncode == status, process.stdout + process.stderr
    others = "using " if status == 1 else ("usage:", " ")
    lines = [line for line in process.stderr.splitlines() if not line.startswith(others)]
    assert len(lines) == 1, process.stderr
    return lines[0]


def wait_for(event, process):
    """Waits until event() is true; fails if the process ends before."""
    while not event():
        assert process.poll() is None, "it ended too soon"
        time.sleep(0.01)


# ---- what a run leaves ----

def contents(folder):
    """Returns {path: bytes} of every file below a folder."""
    return {path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def metrics(folder):
    """Returns the rows of metrics.csv as dicts of floats."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def losses(folder):
    """Returns {iteration: (training loss, validation loss)}."""
    return {row["iteration"]: (row["train_loss"], row["val_loss"]) for row in metrics(folder)}


def same(a, b):
    """Tells whether two checkpoints or parts of them are equal, bit for bit."""
    import torch

    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        a, b = ((x.dtype, x.shape, x.numpy().tobytes()) for x in (a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_weights(a, b):
    """Tells whether two runs ended with the same weights, bit for bit."""
    from model import load_checkpoint

    return same(*(load_checkpoint(folder / "last.pt")["model"] for folder in (a, b)))


# ---- fixtures ----

@pytest.fixture(scope="session")
def shakespeare():
    """Path of the real text, fetched if need be. Without it tests are skipped, but fail in CI."""
    fetched = run("data/prepare.py")
    if fetched.returncode or "another text" in fetched.stdout:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(fetched.stdout + fetched.stderr)
    return ROOT / "data" / "input.txt"


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory):
    """A text of 20,000 characters with something to learn, an accent and a dash in it."""
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    who = "ROMEO", "JULIET", "NURSE"
    what = "speak", "be gone", "good night", "what say you"
    lines = [f"{who[n % 3]}: {what[n % 4]} \u2014 {n * n % 97} caf\u00e9s.\n" for n in range(700)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished_run(tiny_text, tmp_path_factory):
    """The folder of 60 iterations of a tiny network. Read it, don't change it."""
    folder = tmp_path_factory.mktemp("run")
    process = run("train.py", *TINY, "--data_path", tiny_text, "--out_dir", folder,
                  "--max_iters", 60, "--eval_interval", 20, "--learning_rate", "3e-3")
    assert process.returncode == 0, process.stderr
    (folder / "stdout.txt").write_text(process.stdout)
    return folder


@pytest.fixture
def tiny_run(finished_run, tmp_path):
    """A copy of it, to change at will."""
    return shutil.copytree(finished_run, tmp_path / "run")


@pytest.fixture(scope="session")
def quantized_run(finished_run, tiny_text, tmp_path_factory):
    """A copy with model_int8.pt, without last.pt.old, which would hide a damaged last.pt."""
    folder = shutil.copytree(finished_run, tmp_path_factory.mktemp("quantized") / "run")
    process = run("quantize.py", "--out_dir", folder, "--data_path", tiny_text)
    assert (process.returncode, process.stderr) == (0, "")
    (folder / "stdout.txt").write_text(process.stdout)
    (folder / "last.pt.old").unlink()
    return folder


@pytest.fixture
def call(monkeypatch):
    """Calls main() or parse_args() of a script in this process, with these words after its name."""
    def call_with(function, *words):
        monkeypatch.setattr(sys, "argv", [f"{function.__module__}.py", *map(str, words)])
        return function()

    return call_with


@pytest.fixture
def new_trainer(monkeypatch):
    """Makes a Trainer in this process that hears no signal and lets go of its folder at once."""
    import train

    lock = train.lock
    monkeypatch.setattr(train, "lock", lambda out_dir: lock(out_dir).close())
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    return lambda *flags: train.Trainer(*train.parse_args([*map(str, flags)]))


@pytest.fixture
def train_here(new_trainer, call):
    """Runs main() of train.py with such a Trainer."""
    import train

    return lambda *flags: call(train.main, *flags)
