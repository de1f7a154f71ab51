"""quantize.py: smaller, as good, loaded like any checkpoint, and never at the cost of a file."""
import pytest
import torch

from conftest import complaint, run
from model import load_checkpoint, load_model


def quantize(folder, text, *args, **options):
    return run("quantize.py", "--out_dir", folder, "--data_path", text, *args, **options)


def test_it_prints_before_and_after_and_two_samples(tiny_run, tiny_text):
    process = quantize(tiny_run, tiny_text)
    assert process.returncode == 0, process.stderr
    rows = {line[:37].strip(): line[37:].split() for line in process.stdout.splitlines()[1:6]}
    assert list(rows) == [
        "size on disk, MB", "size in memory, MB", "validation loss, nats per token",
        "validation loss, nats per character", "sampling, tokens a second"]
    before, _, ratio = map(float, rows["validation loss, nats per token"])
    assert abs(before - load_checkpoint(tiny_run / "model.pt")["val_loss"]) < 1e-3
    assert ratio <= 1.003
    assert "--- float32, seed" in process.stdout and "--- int8, seed" in process.stdout
    assert not process.stderr


def test_the_file_holds_no_floats_but_scales_biases_and_norms(tiny_run, tiny_text):
    quantize(tiny_run, tiny_text)
    weights = torch.load(tiny_run / "model_int8.pt", weights_only=True)["model"]
    assert all(weight.dtype == (torch.int8 if weight.dim() == 2 else torch.float32)
               for weight in weights.values())


def test_every_row_of_every_matrix_is_kept_to_half_a_step(tiny_run, tiny_text):
    quantize(tiny_run, tiny_text)
    before, after = (load_checkpoint(tiny_run / name)["model"]
                     for name in ("model.pt", "model_int8.pt"))
    for name, weight in before.items():
        if weight.dim() == 2:
            scale = after[name.replace(".weight", ".scale")][:, None]
            assert ((after[name] * scale - weight).abs() <= 0.5001 * scale).all()
            assert (after[name].int().abs().amax(1) >= 126).all()
        else:
            assert torch.equal(after[name], weight)


def test_the_tokenizer_and_the_losses_stay_with_it(tiny_run, tiny_text):
    quantize(tiny_run, tiny_text, "--out", tiny_run / "small.pt")
    before, after = (load_checkpoint(tiny_run / name) for name in ("model.pt", "small.pt"))
    assert after["int8"] is True
    for key in "config", "tokenizer", "iteration", "val_loss":
        assert after[key] == before[key]
    with pytest.raises(ValueError, match="another tokenizer"):
        load_model(tiny_run / "small.pt", "0" * 64)


def test_mistakes_get_one_line_and_overwrite_nothing(tiny_run, tiny_text, tmp_path):
    def files():
        return {path.name: path.read_bytes() for path in tiny_run.iterdir() if path.is_file()}

    quantize(tiny_run, tiny_text)
    before = files()
    (tmp_path / "short.txt").write_text("too short")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    for message, text, flags in (
            ("quantized already", tiny_text, ["--checkpoint", tiny_run / "model_int8.pt"]),
            ("name another file", tiny_text, ["--out", tiny_run / "model.pt"]),
            ("no checkpoint at", tiny_text, ["--checkpoint", tmp_path / "none.pt"]),
            ("there is no text at", tmp_path / "none.txt", []),
            ("too short", tmp_path / "short.txt", []),
            ("not a checkpoint of", tiny_text, ["--checkpoint", tmp_path / "foreign.pt"])):
        assert message in complaint(quantize(tiny_run, text, *flags))
    assert files() == before
