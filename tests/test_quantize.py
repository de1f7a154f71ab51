"""quantize.py: smaller, as good, loaded like any checkpoint, and never at the cost of a file."""
import shutil

import torch

from conftest import complaint, contents, run
from model import load_checkpoint


def test_it_prints_before_and_after(quantized_run):
    _, *lines = (quantized_run / "stdout.txt").read_text().splitlines()
    rows = {line[:37].strip(): line[37:].split() for line in lines[:5]}
    assert list(rows) == [
        "size on disk, MB", "size in memory, MB", "validation loss, nats per token",
        "validation loss, nats per character", "sampling, tokens a second"]
    before, _, ratio = map(float, rows["validation loss, nats per token"])
    assert abs(before - load_checkpoint(quantized_run / "model.pt")["val_loss"]) < 1e-3
    assert ratio <= 1.003


def test_the_file_keeps_each_matrix_to_half_a_step_the_rest_as_it_was(quantized_run):
    before = load_checkpoint(quantized_run / "model.pt")
    after = load_checkpoint(quantized_run / "model_int8.pt")
    assert after["int8"] is True
    for key in "config", "tokenizer", "iteration", "val_loss":
        assert after[key] == before[key]
    for name, weight in before["model"].items():
        kept = after["model"][name]
        if weight.dim() == 2:
            scale = after["model"][name.replace(".weight", ".scale")][:, None]
            assert (kept.dtype, scale.dtype) == (torch.int8, torch.float32)
            assert ((kept * scale - weight).abs() <= 0.5001 * scale).all()
            assert (kept.int().abs().amax(1) >= 126).all()
        else:
            assert torch.equal(kept, weight)


def test_mistakes_get_one_line_and_overwrite_nothing(quantized_run, tiny_text, tmp_path):
    before, short = contents(quantized_run), tmp_path / "short.txt"
    copied = shutil.copy(quantized_run / "model.pt", tmp_path / "copied.pt")
    short.write_text("too short")
    for message, *flags in (
            ("quantized already", "--checkpoint", quantized_run / "model_int8.pt"),
            *(("name another file", "--out", quantized_run / name) for name in (
                "last.pt", "merges.pkl")),
            ("name another file", "--checkpoint", copied, "--out", copied),
            ("too short", "--data_path", short)):
        process = run("quantize.py", "--out_dir", quantized_run, "--data_path", tiny_text, *flags)
        assert message in complaint(process)
    assert contents(quantized_run) == before
