"""kill -9 at random instants: each file is what was there or what was to come, whole, and the next command works.

Each script is killed a few times with the other tests, and often, counted, with: python -m pytest -q -s tests -m attack
"""
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from conftest import ROOT, TINY, contents, losses, same_weights

import plots
import train
from model import load_checkpoint, load_model, save_checkpoint
from tokenizer import BasicTokenizer

KILLS = pytest.mark.parametrize("kills", [8, pytest.param(40, marks=pytest.mark.attack)])
FORKS = """
import importlib, json, os, signal, sys, time
sys.path[:0] = {path}
module = importlib.import_module(sys.argv[1])
exec(sys.argv[2], vars(module))
quiet = os.open(os.devnull, os.O_WRONLY)
print("ready", flush=True)
for line in sys.stdin:
    arguments, delay = json.loads(line)
    child = os.fork()
    if child == 0:
        sys.argv = [sys.argv[1] + ".py", *arguments]
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        try:
            module.main()
        finally:
            os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Victim:
    """A script that starts at once, to be killed: a process that has loaded its libraries forks for each start."""

    def __init__(self, module, patch=""):
        program = FORKS.format(path=[str(ROOT), str(ROOT / "data")])
        self.process = subprocess.Popen([sys.executable, "-c", program, module, patch], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout.readline() == "ready\n"
        self.module = module

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()

    def run(self, *arguments, kill_after=None):
        """Runs the script to its end, or kills it so many seconds after its start. Returns whether that killed it."""
        self.process.stdin.write(json.dumps([list(map(str, arguments)), kill_after]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()) == signal.SIGKILL

    def duration(self, *arguments):
        """Runs the script to its end. Returns how many seconds that took."""
        begin = time.monotonic()
        self.run(*arguments)
        return time.monotonic() - begin

    def attack(self, commands, kills, longest, look):
        """Runs the script again and again, until so many runs were killed, each within `longest` seconds.

        commands yields the arguments of each run. Returns how often look(), called after each run, found what.
        """
        chance, killed, found = random.Random(0), 0, Counter()
        while killed < kills:
            killed += self.run(*next(commands), kill_after=chance.uniform(0, longest))
            found[look()] += 1
        print(f"\nkill -9, {self.module}.py: {killed} in mid-work, {found.total() - killed} too late; "
              f"found: {dict(found)}")
        return found


def names(folder):
    return {path.name for path in folder.iterdir()}


@KILLS
def test_killed_in_training_a_tokenizer_leaves_one_tokenizer_or_the_other(tiny_text, tmp_path, kills):
    other, folder, known = tmp_path / "other.txt", tmp_path / "run", {}
    other.write_text(tiny_text.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    commands = [["train", "--vocab_size", 400, "--out_dir", folder, "--data_path", text] for text in (tiny_text, other)]

    def look():
        assert names(folder) <= {"merges.pkl", "vocab.pkl", ".merges.pkl.new", "..merges.pkl.new.tmp", ".vocab.pkl.tmp"}
        return known[BasicTokenizer(out_dir=folder).fingerprint]

    with Victim("tokenizer") as victim:
        for number, command in enumerate(commands):
            duration = victim.duration(*command)
            known[BasicTokenizer(out_dir=folder).fingerprint] = f"tokenizer {number}"
        found = victim.attack(itertools.cycle(commands), kills, 1.3 * duration, look)
        victim.run(*commands[0])
    assert len(known) == 2 and names(folder) == {"merges.pkl", "vocab.pkl"} and (len(found) == 2 or kills < 40)


@KILLS
def test_killed_in_training_it_resumes_and_ends_where_an_unbroken_run_ends(tiny_text, tmp_path, kills):
    """It saves at each iteration; whatever the instant, all is whole, and no iteration is lost twice."""
    folder, unbroken, reached = tmp_path / "run", tmp_path / "unbroken", -1
    flags = [*TINY, "--data_path", tiny_text, "--eval_interval", 1]

    def commands():
        while True:
            saved = any((folder / name).exists() for name in ("last.pt", "last.pt.new", "last.pt.old"))
            yield ["--resume", "--out_dir", folder] if saved else [*flags, "--out_dir", folder, "--max_iters", 10**6]

    def look():
        nonlocal reached
        try:
            last = train.load_last(folder)
        except ValueError as error:
            assert "nothing to resume" in str(error) and reached == -1
            return "nothing yet"
        before, reached = reached, last["iteration"]
        assert before <= reached
        model = load_model(folder / "model.pt", BasicTokenizer(out_dir=folder).fingerprint)[1]
        assert model["iteration"] <= reached + 1
        assert plots.read_metrics(folder / "metrics.csv")["iteration"][-1] >= reached
        if (folder / "histograms.npz").exists():
            plots.read_histograms(folder / "histograms.npz", n_layer=2)
        return "went on" if reached > before else "as before"

    with Victim("train", "import torch._dynamo") as victim:  # the optimizer asks for it, and it loads slowly
        duration = victim.duration(*flags, "--out_dir", unbroken, "--max_iters", 2)
        found = victim.attack(commands(), kills, 2 * duration, look)
        assert found["went on"] > kills // 5
        victim.run("--resume", "--out_dir", folder, "--max_iters", reached + 2)
        victim.run(*flags, "--out_dir", unbroken, "--max_iters", reached + 2)
    assert names(folder) == {"merges.pkl", "vocab.pkl", "model.pt", "last.pt", "last.pt.old", "metrics.csv",
                             "histograms.npz", ".lock"}
    assert losses(folder) == losses(unbroken) and same_weights(folder, unbroken)


@KILLS
def test_killed_in_quantizing_leaves_the_weights_of_one_network_or_the_other(tiny_run, tiny_text, kills):
    save_checkpoint(tiny_run / "other.pt", load_checkpoint(tiny_run / "model.pt") | {"iteration": 999})
    commands = [["--out_dir", tiny_run, "--data_path", tiny_text, "--checkpoint", tiny_run / name]
                for name in ("model.pt", "other.pt")]
    before, fingerprint = names(tiny_run), BasicTokenizer(out_dir=tiny_run).fingerprint
    with Victim("quantize", "import torch.ao.quantization; tokens_per_second = lambda *_: 1.0") as victim:
        duration = victim.duration(*commands[0])
        found = victim.attack(itertools.cycle(commands), kills, duration,
                              lambda: load_model(tiny_run / "model_int8.pt", fingerprint)[1]["iteration"])
        victim.run(*commands[0])
    assert names(tiny_run) == before | {"model_int8.pt"} and (len(found) == 2 or kills < 40)


@KILLS
def test_killed_in_plotting_every_picture_is_that_of_one_run_or_the_other(tiny_run, kills):
    whole, table = {}, (tiny_run / "metrics.csv").read_text()
    tables = [table, table.replace("e-05", "e-04").replace("0.003", "0.005")]

    def commands():
        for figures in itertools.cycle(tables):
            (tiny_run / "metrics.csv").write_text(figures)
            yield ["--out_dir", tiny_run]

    def look():
        assert len(list(tiny_run.glob(".*.png.tmp"))) <= 4
        return tuple(whole[path.name][path.read_bytes()] for path in sorted(tiny_run.glob("*.png")))

    with Victim("plots") as victim:
        for number, command in zip(range(2), commands()):
            duration = victim.duration(*command)
            for path in tiny_run.glob("*.png"):
                whole.setdefault(path.name, {})[path.read_bytes()] = number
        assert len(whole) == 4 and len(whole["loss.png"]) == 2
        found = victim.attack(commands(), kills, 1.1 * duration, look)
        victim.run("--out_dir", tiny_run)
    assert not list(tiny_run.glob(".*.tmp")) and (len(found) > 1 or kills < 40)


@KILLS
def test_killed_in_downloading_the_text_is_whole_or_absent(tmp_path, monkeypatch, kills):
    from test_prepare import TEXT, Server, constants

    path = tmp_path / "input.txt"
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def commands():
        while True:
            path.unlink(missing_ok=True)
            yield []

    def look():
        assert names(tmp_path) <= {"input.txt", ".input.txt.tmp"}
        assert not path.exists() or path.read_bytes() == TEXT
        return "whole" if path.exists() else "absent"

    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    patch = f"from pathlib import PosixPath, WindowsPath\nglobals().update({constants(server, tmp_path)!r})"
    with Victim("prepare", patch) as victim:
        duration = victim.duration()
        assert path.read_bytes() == TEXT
        found = victim.attack(commands(), kills, 1.1 * duration, look)
        victim.run(*next(commands()))
    server.shutdown()
    assert contents(tmp_path) == {path.relative_to(tmp_path): TEXT} and (len(found) == 2 or kills < 40)
