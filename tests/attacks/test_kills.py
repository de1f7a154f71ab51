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


def end(module, *args, kill_after=None, **patch):
    """Runs main() of a script to its end, or kills it so many seconds after its start.

    Returns whether that killed it. The names in `patch` are replaced in the script.
    """
    environment = {"no_proxy": "127.0.0.1"}
    process = FORKS.Process(target=run_main, args=(module, [*map(str, args)], patch, environment))
    process.start()
    if kill_after is not None:
        process.join(kill_after)
        process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def duration(module, *args, **patch):
    """Runs main() of a script to its end. Returns how many seconds that took."""
    begin = time.monotonic()
    end(module, *args, **patch)
    return time.monotonic() - begin


def attack(module, commands, kills, longest, look, **patch):
    """Runs a script until so many runs were killed, each within `longest` seconds.

    commands yields the arguments of each run. look(), called after each, returns what it found.
    Returns how often it found what.
    """
    chance, killed, found = random.Random(0), 0, Counter()
    while killed < kills:
        killed += end(module, *next(commands), kill_after=chance.uniform(0, longest), **patch)
        found[look()] += 1
    print(f"\nkill -9, {module}.py: {killed} in mid-work, {found.total() - killed} too late; "
          f"found: {dict(found)}")
    return found


def names(folder):
    return {path.name for path in folder.iterdir()}


@KILLS
def test_killed_in_training_a_tokenizer_leaves_one_or_the_other(tiny_text, tmp_path, kills):
    other, folder, known = tmp_path / "other.txt", tmp_path / "run", {}
    other.write_text(tiny_text.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    commands = [["train", "--vocab_size", 400, "--out_dir", folder, "--data_path", text]
                for text in (tiny_text, other)]

    def look():
        assert names(folder) <= {"merges.pkl", "vocab.pkl", ".merges.pkl.new", ".vocab.pkl.tmp",
                                 "..merges.pkl.new.tmp"}
        return known[BasicTokenizer(out_dir=folder).fingerprint]

    for number, command in enumerate(commands):
        longest = 1.3 * duration("tokenizer", *command)
        known[BasicTokenizer(out_dir=folder).fingerprint] = f"tokenizer {number}"
    found = attack("tokenizer", itertools.cycle(commands), kills, longest, look)
    end("tokenizer", *commands[0])
    assert len(known) == 2 and names(folder) == {"merges.pkl", "vocab.pkl"}
    assert len(found) == 2 or kills < 40


@KILLS
def test_killed_in_training_it_resumes_and_ends_as_an_unbroken_run(tiny_text, tmp_path, kills):
    """It saves at each iteration; whatever the instant, all is whole, and none is lost twice."""
    folder, unbroken, reached = tmp_path / "run", tmp_path / "unbroken", -1
    new = [*TINY, "--data_path", tiny_text, "--eval_interval", 1]

    def commands():
        while True:
            if any((folder / name).exists() for name in ("last.pt", "last.pt.new", "last.pt.old")):
                yield ["--resume", "--out_dir", folder]
            else:
                yield [*new, "--out_dir", folder, "--max_iters", 10**6]

    def look():
        nonlocal reached
        try:
            last = train.load_last(folder)
        except ValueError as error:
            assert "nothing to resume" in str(error) and reached == -1
            return "nothing yet"
        before, reached = reached, last["iteration"]
        assert before <= reached
        best = load_model(folder / "model.pt", BasicTokenizer(out_dir=folder).fingerprint)[1]
        assert best["iteration"] <= reached + 1
        assert plots.read_metrics(folder / "metrics.csv")["iteration"][-1] >= reached
        if (folder / "histograms.npz").exists():
            plots.read_histograms(folder / "histograms.npz", n_layer=2)
        return "went on" if reached > before else "as before"

    longest = 2 * duration("train", *new, "--out_dir", unbroken, "--max_iters", 2)
    found = attack("train", commands(), kills, longest, look)
    assert found["went on"] > kills // 5
    end("train", "--resume", "--out_dir", folder, "--max_iters", reached + 2)
    end("train", *new, "--out_dir", unbroken, "--max_iters", reached + 2)
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
    before, fingerprint = names(tiny_run), BasicTokenizer(out_dir=tiny_run).fingerprint

    def look():
        return load_model(tiny_run / "model_int8.pt", fingerprint)[1]["iteration"]

    quick = {"compare": print}  # in place of measuring, which takes the most time
    longest = duration("quantize", *commands[0], **quick)
    found = attack("quantize", itertools.cycle(commands), kills, longest, look, **quick)
    end("quantize", *commands[0], **quick)
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

    for number, command in zip(range(2), commands()):
        longest = 1.1 * duration("plots", *command)
        for path in tiny_run.glob("*.png"):
            whole.setdefault(path.name, {})[path.read_bytes()] = number
    assert len(whole) == 4 and len(whole["loss.png"]) == 2
    found = attack("plots", commands(), kills, longest, look)
    end("plots", "--out_dir", tiny_run)
    assert not list(tiny_run.glob(".*.tmp")) and (len(found) > 1 or kills < 40)


@KILLS
def test_killed_in_downloading_the_text_is_whole_or_absent(tmp_path, kills):
    path, server = tmp_path / "input.txt", Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def commands():
        while True:
            path.unlink(missing_ok=True)
            yield []

    def look():
        assert names(tmp_path) <= {"input.txt", ".input.txt.tmp"}
        assert not path.exists() or path.read_bytes() == TEXT
        return "whole" if path.exists() else "absent"

    patch = constants(server, tmp_path)
    longest = 1.1 * duration("prepare", **patch)
    assert path.read_bytes() == TEXT
    found = attack("prepare", commands(), kills, longest, look, **patch)
    end("prepare", *next(commands()), **patch)
    server.shutdown()
    server.server_close()
    assert contents(tmp_path) == {path.relative_to(tmp_path): TEXT}
    assert len(found) == 2 or kills < 40
