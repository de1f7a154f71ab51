"""kill -9 at random instants: files are what was there or what was to come, and all goes on.

Each script is killed a few times with the other tests, and often where attacks are asked for.
"""
import itertools
import random
import signal
import threading
import time
from collections import Counter

import pytest

import plots
import train
from conftest import FORKS, TINY, contents, losses, run_main, same_weights
from model import load_checkpoint, load_model, save_checkpoint
from test_prepare import TEXT, Server, constants
from tokenizer import BasicTokenizer

KILLS = pytest.mark.parametrize("kills", [8, pytest.param(40, marks=pytest.mark.attack)])


def end(module, args, kill_after=None, **patch):
    """Runs main() of a script, whose names in `patch` are replaced, to its end.

    Or kills it so many seconds after its start. Returns whether that killed it.
    """
    environment = {"no_proxy": "127.0.0.1"}
    process = FORKS.Process(target=run_main, args=(module, [*map(str, args)], patch, environment))
    process.start()
    if kill_after is not None:
        process.join(kill_after)
        process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def attack(module, commands, kills, look, **patch):
    """Runs a script twice to its end, then until so many runs were killed, then once more.

    commands yields the arguments of each run. look() returns a set of what is there after it, and
    all of that must have been there after one of the first two. Returns what was there then.
    """
    chance, whole, found, durations, instants = random.Random(0), set(), Counter(), [], []
    for _ in range(2):
        begin = time.monotonic()
        end(module, next(commands), **patch)
        durations.append(time.monotonic() - begin)
        whole |= look()
    while len(instants) < kills:
        instant = chance.uniform(0, 1.3 * min(durations))
        if end(module, next(commands), instant, **patch):
            instants.append(instant)
        there = look()
        assert there <= whole
        found.update(there)
    print(f"\nkill -9, {module}.py: {kills} times, after {min(instants):.2f} to "
          f"{max(instants):.2f} s; whole files were there {[found[file] for file in whole]} times")
    assert found.keys() == whole or kills < 40
    end(module, next(commands), **patch)
    return whole


def names(folder):
    return {path.name for path in folder.iterdir()}


def files(folder, pattern):
    """Returns what the files are that match a pattern, byte for byte."""
    return {(path.name, path.read_bytes()) for path in folder.glob(pattern)}


@KILLS
def test_killed_in_training_a_tokenizer_leaves_one_or_the_other(tiny_text, tmp_path, kills):
    other, folder = tmp_path / "other.txt", tmp_path / "run"
    other.write_text(tiny_text.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    commands = [["train", "--vocab_size", 400, "--out_dir", folder, "--data_path", text]
                for text in (tiny_text, other)]

    def look():
        assert names(folder) <= {"merges.pkl", "vocab.pkl", ".merges.pkl.new", ".vocab.pkl.tmp",
                                 "..merges.pkl.new.tmp"}
        return {BasicTokenizer(out_dir=folder).fingerprint}

    attack("tokenizer", itertools.cycle(commands), kills, look)
    assert names(folder) == {"merges.pkl", "vocab.pkl"}


@KILLS
def test_killed_in_training_it_resumes_and_ends_as_an_unbroken_run(tiny_text, tmp_path, kills):
    """It saves at each iteration; whatever the instant, all is whole, and none is lost twice."""
    folder, unbroken, reached = tmp_path / "run", tmp_path / "unbroken", []
    new = [*TINY, "--data_path", tiny_text, "--eval_interval", 1]

    def commands():
        yield from [[*new, "--out_dir", unbroken, "--max_iters", 2]] * 2
        while True:
            if any((folder / name).exists() for name in ("last.pt", "last.pt.new", "last.pt.old")):
                yield ["--resume", "--out_dir", folder, "--max_iters",
                       10**6 if len(reached) < kills else reached[-1] + 2]
            else:
                yield [*new, "--out_dir", folder, "--max_iters", 10**6]

    def look():
        try:
            last = train.load_last(folder)
        except ValueError as error:
            assert "nothing to resume" in str(error) and not reached
            return set()
        assert last["iteration"] >= max(reached, default=0)
        reached.append(last["iteration"])
        best = load_model(folder / "model.pt", BasicTokenizer(out_dir=folder).fingerprint)[1]
        assert best["iteration"] <= reached[-1] + 1
        assert plots.read_metrics(folder / "metrics.csv")["iteration"][-1] >= reached[-1]
        if (folder / "histograms.npz").exists():
            plots.read_histograms(folder / "histograms.npz", n_layer=2)
        return set()

    attack("train", commands(), kills, look)
    print(f"it went on {len({*reached})} times, to iteration {reached[-1]}")
    assert len({*reached}) > kills // 10
    end("train", ["--resume", "--out_dir", folder, "--max_iters", reached[-1] + 2])
    end("train", ["--resume", "--out_dir", unbroken, "--max_iters", reached[-1] + 2])
    assert names(folder) == {"merges.pkl", "vocab.pkl", "model.pt", "last.pt", "last.pt.old",
                             "metrics.csv", "histograms.npz", ".lock"}
    assert losses(folder) == losses(unbroken) and same_weights(folder, unbroken)


@KILLS
def test_killed_in_quantizing_leaves_the_weights_of_one_network_or_the_other(
        tiny_run, tiny_text, kills):
    other = load_checkpoint(tiny_run / "model.pt") | {"iteration": 999}
    save_checkpoint(tiny_run / "other.pt", other)
    commands = [["--out_dir", tiny_run, "--data_path", tiny_text, "--checkpoint", tiny_run / name]
                for name in ("model.pt", "other.pt")]
    before = names(tiny_run)
    attack("quantize", itertools.cycle(commands), kills, lambda: files(tiny_run, "model_int8.pt"),
           compare=print)  # in place of measuring, which takes the most time
    assert names(tiny_run) == before | {"model_int8.pt"}


@KILLS
def test_killed_in_plotting_every_picture_is_that_of_one_run_or_the_other(tiny_run, kills):
    table = (tiny_run / "metrics.csv").read_text()
    before = names(tiny_run)

    def commands():
        for figures in itertools.cycle([table, table.replace("0.", "0.1")]):
            (tiny_run / "metrics.csv").write_text(figures)
            yield ["--out_dir", tiny_run]

    whole = attack("plots", commands(), kills, lambda: files(tiny_run, "*.png"))
    assert len(whole) == 2 * 4 and len(names(tiny_run) - before) == 4


@KILLS
def test_killed_in_downloading_the_text_is_whole_or_absent(tmp_path, kills):
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def commands():
        while True:
            (tmp_path / "input.txt").unlink(missing_ok=True)
            yield []

    attack("prepare", commands(), kills, lambda: files(tmp_path, "*.txt"),
           **constants(server, tmp_path))
    server.shutdown()
    server.server_close()
    assert [*contents(tmp_path).values()] == [TEXT]
