"""bench.py: it runs, on what train.py does and makes. The times it measures are not tested."""
import random
import re
import signal
from string import ascii_lowercase

import pytest

import bench
import train
from conftest import metrics


@pytest.fixture
def printed(call, capsys):
    """Runs bench.py in this process. Returns what it prints."""
    def printed(command):
        call(bench.main, *command.split())
        return capsys.readouterr().out
    return printed


@pytest.fixture
def letters(tmp_path):
    """Path of a text of 12,000 random letters, which is rich in pairs."""
    (tmp_path / "text").write_text("".join(random.Random(0).choices(ascii_lowercase, k=12_000)))
    return tmp_path / "text"


def test_tokens_are_those_of_the_textbook_and_a_size_is_a_row(letters, printed):
    command = f"tokenizer --data_path {letters}"
    assert re.search(r"merges and ids +the same", printed(command))
    row = printed(f"{command} --megabytes 1").split(" | ")
    assert row[0] == "| 1 MB" and len(row) == 7 and row[6].endswith(" MB |\n")


def test_ours_in_training_is_the_step_of_train(monkeypatch, letters, printed):
    dtypes, step = [], train.Trainer.step

    def noted(trainer):
        dtypes.append(str(trainer.dtype).removeprefix("torch."))
        return step(trainer)

    monkeypatch.setattr(train.Trainer, "step", noted)
    monkeypatch.setattr(bench, "matrix_speed", lambda dtype, device: 1e9)
    out = printed(f"train --data_path {letters} --batch_size 1 --repeats 1 --device cpu")
    assert out.startswith("an iteration of 1 x 256 tokens on cpu")
    ours = re.findall(r"^ours, (\w+)", out, re.M)
    assert ours[0] == "float32" and sorted(dtypes) == sorted(3 * ours)  # two of three warm up
    assert re.search(r"^textbook, float32.* 1.00 times the textbook$", out, re.M)


def test_sigterm_ends_the_training_beside(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text("print('loss', flush=True); import time; time.sleep(300)")
    handlers = {}
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    with pytest.raises(SystemExit), bench.training() as process:
        handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert process.poll() is not None


def test_losses_are_those_of_the_run_and_ways_to_quantize_it_are_rows(
        finished_run, tiny_text, printed):
    flags = f"--out_dir {finished_run} --data_path {tiny_text}"
    out = printed(f"loss {flags}")
    loss = min(row["val_loss"] for row in metrics(finished_run))
    assert re.search(rf"side by side +{loss:.4f}", out)
    assert "the 16 tokens before it" in out and "standard error" in out
    out = printed(f"quantize --repeats 1 {flags}")
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    assert [len(row) for row in rows] == [6] * 6  # the header is one
    sizes = [float(row[1].removesuffix(" MB")) for row in rows[1:]]
    assert max(sizes[1:]) < sizes[0]
