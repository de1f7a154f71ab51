"""bench.py: it runs, on what train.py does and makes. The times it measures are not tested."""
import random
import re
import sys

import pytest

import bench
import train
from model import load_checkpoint


@pytest.fixture
def printed(monkeypatch, capsys):
    """Runs bench.py with these flags, in this process. Returns what it prints."""
    def printed(*flags):
        monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, flags)])
        bench.main()
        return capsys.readouterr().out
    return printed


@pytest.fixture
def letters(tmp_path):
    """Returns the path of a text of 12,000 letters at random, which is rich in pairs."""
    path = tmp_path / "letters.txt"
    path.write_text("".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz\n", k=12_000)))
    return path


def test_ours_in_training_is_the_step_of_train(monkeypatch, letters, printed):
    steps, step = [], train.Trainer.step
    monkeypatch.setattr(train.Trainer, "step", lambda self: (steps.append(self), step(self))[1])
    monkeypatch.setattr(bench, "matrix_speed", lambda dtype, device: 1e9)
    lines = printed("train", "--data_path", letters, "--batch_size", 1, "--repeats", 1,
                    "--device", "cpu").splitlines()
    assert lines[0].startswith("an iteration of 1 x 256 tokens on cpu")
    ours = [line.split()[1] for line in lines if line.startswith("ours, ")]
    assert ours == list(dict.fromkeys(str(trainer.dtype)[6:] for trainer in steps))
    assert ours[0] == "float32" and len(steps) == 3 * len(ours)  # two to warm up, one to measure
    assert lines[1].startswith("textbook, float32") and lines[1].endswith("1.00 times the textbook")


def test_the_loss_it_measures_is_that_of_the_checkpoint(finished_run, tiny_text, printed):
    out = printed("loss", "--out_dir", finished_run, "--data_path", tiny_text)
    loss = load_checkpoint(finished_run / "model.pt")["val_loss"]
    assert f"{loss:.4f}" == re.search(r"side by side +([\d.]+)", out)[1]
    assert "the 16 tokens before it" in out and "standard error" in out


def test_every_way_to_quantize_is_a_row(finished_run, tiny_text, printed):
    out = printed("quantize", "--repeats", 1, "--out_dir", finished_run, "--data_path", tiny_text)
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    assert len(rows) == 6 and {len(row) for row in rows} == {6}  # the header is one
    sizes = [float(row[1].removesuffix(" MB")) for row in rows[1:]]
    assert max(sizes[1:]) < sizes[0]


def test_the_textbook_finds_the_same_tokens(letters, printed):
    assert re.search(r"merges and ids +the same", printed("tokenizer", "--data_path", letters))


def test_a_size_is_a_row(letters, printed):
    row = printed("tokenizer", "--data_path", letters, "--megabytes", 1).split(" | ")
    assert row[0] == "| 1 MB" and len(row) == 7 and row[6].endswith(" MB |\n")
