"""kill -9 at random instants: files are what was there or what was to come, and all goes on.

Each script is killed a few times with the other tests, and often with -m attack.
"""
import importlib
import itertools
import math
import os
import random
import signal
import sys
import threading
import time

import pytest
from tqdm import tqdm

import plots
from conftest import TINY, fork, losses, run, same_weights
from model import load_checkpoint, load_model, save_checkpoint
from tokenizer import BasicTokenizer
from train import load_last

KILLS = pytest.mark.parametrize("kills", [8, pytest.param(40, marks=pytest.mark.attack)])


def run_main(module, args, patch):
    """Runs main() of a script, some of its names replaced, without output, for `fork`."""
    tqdm.set_lock(threading.RLock())  # else a killed process leaves a semaphore
    script = importlib.import_module(module)
    vars(script).update(patch)
    sys.argv = [f"{module}.py", *map(str, args)]
    sys.stdout = sys.stderr = open(os.devnull, "w")
    script.main()


def attack(module, commands, kills, look, **patch):
    """Runs a script twice to its end, then until it was killed so often, then once more.

    It runs with each of the `commands` in turn, its names in `patch` replaced. look() returns a
    set of what it left, all of which must have been there after one of the first two runs.
    """
    commands, chance = itertools.cycle(commands), random.Random(0)

    def status(kill_after=None):
        return fork(run_main, module, next(commands), patch, seconds=kill_after)

    whole, found, shortest, killed = set(), set(), math.inf, 0
    for _ in range(2):
        begin = time.monotonic()
        assert status() == 0
        shortest = min(shortest, time.monotonic() - begin)
        whole |= look()
    while killed < kills:
        killed += status(chance.uniform(0, 1.3 * shortest)) == -signal.SIGKILL
        found |= look()
        assert found <= whole
    assert found == whole or kills < 40
    assert status() == 0


def names(folder):
    return {path.name for path in folder.iterdir()}


@KILLS
def test_killed_in_training_a_tokenizer_leaves_a_whole_one(tiny_text, tmp_path, kills):
    other, folder = tmp_path / "other.txt", tmp_path / "run"
    other.write_text(tiny_text.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    commands = [["train", "--vocab_size", 400, "--out_dir", folder, "--data_path", text]
                for text in (tiny_text, other)]
    attack("tokenizer", commands, kills, lambda: {BasicTokenizer(out_dir=folder).fingerprint})
    assert names(folder) == {"merges.pkl", "vocab.pkl"}


@KILLS
def test_killed_in_training_it_ends_as_an_unbroken_run(tiny_text, tmp_path, kills):
    """It saves at each iteration: all is whole at any instant, and none is lost twice."""
    folder, unbroken, reached = tmp_path / "run", tmp_path / "unbroken", []
    new = [*TINY, "--data_path", tiny_text, "--eval_interval", 1, "--out_dir"]

    def commands():
        yield from [[*new, unbroken, "--max_iters", 2]] * 2
        while True:
            flags = ["--resume", "--out_dir"] if any(folder.glob("last.pt*")) else new
            last = 10**6 if len(reached) < 2 + kills else reached[-1] + 2
            yield [*flags, folder, "--max_iters", last]

    def look():
        try:
            last = load_last(folder)["iteration"]
        except ValueError as error:  # before it first saved
            assert "nothing to resume" in str(error) and not any(reached)
            reached.append(0)
            return set()
        assert last >= max(reached)
        reached.append(last)
        best = load_model(folder / "model.pt", BasicTokenizer(out_dir=folder).fingerprint)[1]
        assert best["iteration"] <= last + 1
        assert plots.read_metrics(folder / "metrics.csv")["iteration"][-1] >= last
        if (folder / "histograms.npz").exists():
            plots.read_histograms(folder / "histograms.npz", n_layer=2)
        return set()

    attack("train", commands(), kills, look)
    assert len({*reached}) > kills // 10
    for out in folder, unbroken:
        run("train.py", "--resume", "--out_dir", out, "--max_iters", reached[-1] + 2)
    # killed before its first last.pt, it leaves a model.pt, which the next start moves aside
    assert names(folder) - {"earlier-1"} == {
        "merges.pkl", "vocab.pkl", "model.pt", "last.pt", "last.pt.old", "metrics.csv",
        "histograms.npz", ".lock"}
    assert losses(folder) == losses(unbroken) and same_weights(folder, unbroken)


@KILLS
def test_killed_in_quantizing_leaves_a_whole_network(tiny_run, tiny_text, kills):
    model, other, int8 = (tiny_run / name for name in ("model.pt", "other.pt", "model_int8.pt"))
    save_checkpoint(other, load_checkpoint(model) | {"iteration": 999})
    commands = [["--out_dir", tiny_run, "--data_path", tiny_text, "--checkpoint", path]
                for path in (model, other)]
    before = names(tiny_run)
    # print stands in for measuring, which takes the most time
    attack("quantize", commands, kills, lambda: {int8.read_bytes()}, compare=print)
    assert names(tiny_run) == before | {int8.name}
