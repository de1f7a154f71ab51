"""Beside other processes, on a restless terminal, with a clock that jumps, and for long."""
import ast
import contextlib
import itertools
import os
import random
import resource
import select
import shutil
import signal
import struct
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import train
from conftest import FORKS, ROOT, TINY, metrics, start
from model import load_checkpoint, load_model, save_checkpoint
from tokenizer import BasicTokenizer

attack = pytest.mark.attack


def save_without_pause(folder, checkpoints, saving):
    """Saves checkpoints in turn, for FORKS."""
    for number, checkpoint in enumerate(itertools.cycle(map(load_checkpoint, checkpoints))):
        save_checkpoint(folder / "model.pt", checkpoint)
        train.save_last(folder, checkpoint)
        if number == 3:
            saving.set()


@attack
def test_1000_loads_while_checkpoints_are_saved(quantized_run, tmp_path, capfd):
    """Each sees one checkpoint or the other, whole."""
    folder, paths = shutil.copytree(quantized_run, tmp_path / "run"), []
    for number in 1, 2:
        last = load_checkpoint(folder / "last.pt") | {"iteration": number}
        last["model"] = {name: torch.full_like(w, number) for name, w in last["model"].items()}
        paths.append(tmp_path / f"{number}.pt")
        save_checkpoint(paths[-1], last)
    tokens, seen, saving = BasicTokenizer(out_dir=folder), Counter(), FORKS.Event()
    process = FORKS.Process(target=save_without_pause, args=(folder, paths, saving))
    process.start()
    try:
        assert saving.wait(60)
        for number in range(1000):
            path = folder / "model.pt"
            network, rest = load_model(path, tokens.fingerprint, tokens.vocab_size)
            assert all((w == rest["iteration"]).all() for w in network.state_dict().values())
            seen["model.pt", rest["iteration"]] += 1
            if number % 4 == 0:
                last = train.load_last(folder)
                assert all((w == last["iteration"]).all() for w in last["model"].values())
                seen["last.pt", last["iteration"]] += 1
        assert process.is_alive(), "it saved to the end"
    finally:
        process.kill()
        process.join()
    capfd.readouterr()  # load_last says so where it meets a file that is just being replaced
    with capfd.disabled():
        print(f"\nloads while another process saves: {dict(seen)}")
    assert len(seen) == 4 and seen.total() == 1250


@attack
def test_a_terminal_resized_again_and_again(tiny_text, tmp_path):
    """SIGWINCH, as a terminal sends it, up to 200 times while the progress bar is drawn."""
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    process = start("train.py", *TINY, "--data_path", tiny_text, "--out_dir", tmp_path,
                    "--max_iters", 600, stderr=theirs)
    os.close(theirs)
    drawn, chance, resized = b"", random.Random(9), 0
    while process.poll() is None:
        if select.select([ours], [], [], 0.02)[0]:
            with contextlib.suppress(OSError):  # the other end is closed
                drawn += os.read(ours, 65536)
        if drawn and resized < 200:
            size = struct.pack("HHHH", chance.randrange(50), chance.randrange(200), 0, 0)
            fcntl.ioctl(ours, termios.TIOCSWINSZ, size)
            process.send_signal(signal.SIGWINCH)
            resized += 1
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "iteration 600" in out
    assert resized > 20 and b"Traceback" not in drawn


def test_a_clock_that_jumps_by_years_is_not_looked_at(tiny_text, tmp_path, monkeypatch, train_here,
                                                      new_trainer):
    chance, flags = random.Random(10), [*TINY, "--data_path", tiny_text, "--out_dir", tmp_path]
    monkeypatch.setattr(time, "time", lambda: chance.uniform(-1e9, 1e10))
    train_here(*flags, "--max_iters", 6, "--eval_interval", 2)
    rows = metrics(tmp_path)
    assert len(rows) == 4 and rows[-1]["tokens_per_second"] > 0
    for row in rows:
        assert 0 <= row["seconds"] < 1e6 and 0 <= row["tokens_per_second"] < 1e9
    trainer = new_trainer(*flags)
    trainer.mark = 0, 5.0
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)  # so coarse that it stands still
    assert trainer.tokens_per_second() == 0
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            assert name not in ("time.time", "datetime.now", "time.time_ns"), path


# ---- memory ----

def resident(process):
    """Returns the bytes of memory that a process takes."""
    with open(f"/proc/{process.pid}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def check_memory(what, sizes):
    """Prints how large a process was from its first tenth on, and fails if it grew by 5 %."""
    warm, *later = sizes[len(sizes) // 10:]
    print(f"\nmemory of {what}: {warm / 1e6:.1f} MB when warm, then at most "
          f"{max(later) / 1e6:.1f} MB")
    assert max(later) < 1.05 * warm


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


@attack
@needs_proc
def test_100_000_tokens_take_no_more_memory_than_10_000(finished_run):
    process = start("generate.py", "--out_dir", finished_run, "--max_new_tokens", 100_000,
                    "--device", "cpu", stderr=subprocess.DEVNULL, text=False)
    sizes, read = [], 0
    while piece := os.read(process.stdout.fileno(), 4096):
        read += len(piece)
        if read // 10_000 > len(sizes):
            sizes.append(resident(process))
    assert process.wait() == 0 and len(sizes) > 10
    check_memory("100,000 tokens", sizes)


@attack
@needs_proc
def test_4_000_iterations_take_no_more_memory_than_400(tiny_text, tmp_path):
    process = start("train.py", *TINY, "--data_path", tiny_text, "--out_dir", tmp_path,
                    "--max_iters", 4000, "--eval_interval", 100, stderr=subprocess.DEVNULL)
    sizes = [resident(process) for line in process.stdout if "train loss" in line]
    assert process.wait() == 0 and len(sizes) == 41
    check_memory("4,000 iterations", sizes)
