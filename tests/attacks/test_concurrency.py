"""Beside another process, with a clock that jumps, and for long."""
import itertools
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch

from conftest import FORKS, ROOT, TINY, start
from model import load_checkpoint, load_model, save_checkpoint
from train import load_last, save_last


def save_without_pause(folder, saving):
    """Saves in turn two checkpoints, whose weights are all 1 and all 2."""
    last = load_checkpoint(folder / "last.pt")
    for number in itertools.cycle([1, 2]):
        weights = {name: torch.full_like(w, number) for name, w in last["model"].items()}
        checkpoint = last | {"iteration": number, "model": weights}
        save_checkpoint(folder / "model.pt", checkpoint)
        save_last(folder, checkpoint)
        if number == 2:
            saving.set()


@pytest.mark.attack
def test_loads_while_another_saves_see_whole_checkpoints(tiny_run, capfd):
    seen, saving = set(), FORKS.Event()
    process = FORKS.Process(target=save_without_pause, args=(tiny_run, saving))
    process.start()
    try:
        assert saving.wait(60)
        for number in range(1250):
            last = number % 5 == 0
            if last:
                entries = load_last(tiny_run)
                weights = entries["model"]
            else:
                network, entries = load_model(tiny_run / "model.pt")
                weights = network.state_dict()
            assert all((weight == entries["iteration"]).all() for weight in weights.values())
            seen.add((last, entries["iteration"]))
        assert process.is_alive(), "it saved to the end"
    finally:
        process.kill()
        process.join()
    capfd.readouterr()  # load_last says so where it meets a file that is just being replaced
    assert len(seen) == 4


def test_a_clock_that_jumps_is_not_looked_at(tiny_text, tmp_path, new_trainer, monkeypatch):
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\btime\.time|\bdatetime\b|from time import", text), path
    trainer = new_trainer(*TINY, "--data_path", tiny_text, "--out_dir", tmp_path)
    trainer.mark = 0, 5.0
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)  # so coarse that it stands still
    assert trainer.tokens_per_second() == 0


@pytest.mark.attack
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("script, flags, sign", [
    ("generate.py", ["--max_new_tokens", 100_000], ""),
    ("train.py", ["--resume", "--max_iters", 4000, "--eval_interval", 100], "train loss")])
def test_ten_times_as_long_takes_no_more_memory(tiny_run, script, flags, sign):
    """It is read at each line of the text or of the evaluations."""
    process = start(ROOT / script, *flags, "--out_dir", tiny_run, stderr=subprocess.DEVNULL)
    pages = [int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
             for line in process.stdout if sign in line]
    warm, *later = pages[len(pages) // 10:]
    growth = max(later) / warm
    print(f"\n{script} took at most {growth} times the memory it took when warm")
    assert process.wait() == 0 and len(pages) > 39 and growth < 1.05
