"""Full disks, folders nobody can write into, that vanish or stand in the place of files."""
import os
import resource
import shutil
from pathlib import Path

import pytest

import train
from conftest import TINY, complaint, contents, run, start, wait_for
from tokenizer import BasicTokenizer

attack = pytest.mark.attack
SCRIPTS = ["train.py", "tokenizer.py", "quantize.py", "generate.py", "plots.py"]


def command(script, out, text, whole):
    """Returns how a script is told to write into the folder `out`, reading the run in `whole`."""
    reads = ["--out_dir", whole]
    return [script, *{
        "train.py": [*TINY, "--data_path", text, "--out_dir", out, "--max_iters", 2],
        "tokenizer.py": ["train", "--data_path", text, "--out_dir", out, "--vocab_size", 310],
        "quantize.py": [*reads, "--data_path", text, "--out", out / "int8.pt"],
        "generate.py": [*reads, "--max_new_tokens", 3000, "--out", out / "text.txt"],
        "plots.py": ["--out_dir", out]}[script]]


def failure(process):
    """Returns the one line of a failed script, but for what generate.py samples from."""
    first, _, rest = process.stderr.partition("\n")
    if first.startswith("using "):
        process.stderr = rest
    return complaint(process)


def no_file_beyond(size):
    """Returns options of `run` that stand for a full disk."""
    return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}


@pytest.mark.parametrize("script, size", [
    ("quantize.py", 5000),
    *(pytest.param(script, size, marks=attack) for script in SCRIPTS for size in (100, 1500))])
def test_a_full_disk_is_one_line_and_changes_no_file(tiny_run, tiny_text, script, size):
    if script == "tokenizer.py":  # which trains none beside the network of another
        for path in tiny_run.glob("*.pt*"):
            path.unlink()
    before = contents(tiny_run)
    process = run(*command(script, tiny_run, tiny_text, tiny_run), **no_file_beyond(size))
    line, after = failure(process), contents(tiny_run)
    assert "cannot write" in line and str(tiny_run) in line
    assert {path: after[path] for path in before} == before
    new = {path.name for path in after.keys() - before}
    assert new <= {"merges.pkl", ".merges.pkl.new"}  # whole ones, which the next run replaces
    assert BasicTokenizer(out_dir=tiny_run).vocab_size == 300


def test_a_disk_that_fills_up_in_training_keeps_the_checkpoint(tiny_run):
    before = {path: path.read_bytes() for path in tiny_run.glob("*.pt*")}
    resume = "train.py", "--resume", "--out_dir", tiny_run
    process = run(*resume, "--max_iters", 80, **no_file_beyond(20_000))  # metrics fit, weights not
    line = complaint(process)
    assert "cannot write" in line and "too large" in line
    assert {path: path.read_bytes() for path in tiny_run.glob("*.pt*")} == before
    assert run(*resume).returncode == 0


@pytest.fixture
def sealed(tmp_path):
    """A folder nobody can write into, not even root, whom permissions do not stop."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        if not Path("/proc/self").is_dir():
            pytest.skip("root may write into every folder here")
        return Path("/proc/self")
    (tmp_path / "sealed").mkdir(mode=0o555)
    return tmp_path / "sealed"


@attack
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_nobody_can_write_into_is_one_line(finished_run, tiny_text, sealed, script):
    out = sealed if script == "plots.py" else sealed / "run"
    assert str(sealed) in failure(run(*command(script, out, tiny_text, finished_run)))


@attack
@pytest.mark.parametrize("script, name", [
    *(("train.py", name) for name in ("merges.pkl", "metrics.csv", "histograms.npz", ".lock",
                                      ".metrics.csv.tmp")),
    *(("tokenizer.py", name) for name in ("vocab.pkl", "merges.pkl")),
    *(("quantize.py", name) for name in ("int8.pt", "model.pt", "vocab.pkl")),
    *(("generate.py", name) for name in ("model.pt", "merges.pkl", "text.txt", "prompt.txt")),
    *(("plots.py", name) for name in ("metrics.csv", "histograms.npz", "loss.png",
                                      ".relu_outputs.png.tmp"))])
def test_a_folder_in_the_place_of_a_file_is_one_line(tiny_run, tiny_text, script, name):
    if script == "tokenizer.py" or script == "train.py" and name not in ("merges.pkl", ".lock"):
        for path in tiny_run.glob("*.pt*"):  # else one is refused, the other moves them aside
            path.unlink()
    (tiny_run / name).unlink(missing_ok=True)
    (tiny_run / name).mkdir()
    before = contents(tiny_run)
    prompt = ["--prompt_file", tiny_run / name] if name == "prompt.txt" else []
    line = failure(run(*command(script, tiny_run, tiny_text, tiny_run), *prompt))
    named = name.removeprefix(".").removesuffix(".tmp") if name != ".lock" else ""
    assert str(tiny_run / named) in line
    after = contents(tiny_run)
    assert all(after[path] == data for path, data in before.items() if path.suffix == ".pt")
    assert not [path for path in tiny_run.glob("*.tmp") if path.is_file()]


def test_a_training_whose_folder_vanishes_ends_and_the_folder_stays_away(tiny_text, tmp_path):
    """Written again it would hold weights without their tokenizer."""
    process = start("train.py", *TINY, "--data_path", tiny_text, "--out_dir", tmp_path / "run",
                    "--eval_interval", 50)
    wait_for((tmp_path / "run" / "last.pt").exists, process)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and len(err.splitlines()) == 1 and str(tmp_path / "run") in err
    assert not (tmp_path / "run").exists()
    assert train.load_last(tmp_path / "elsewhere")["iteration"] >= 0


@attack
def test_a_sampling_whose_folder_vanishes_is_one_line(finished_run, tmp_path):
    out = tmp_path / "out" / "text.txt"
    process = start("generate.py", "--out_dir", finished_run, "--max_new_tokens", 5000,
                    "--out", out)
    wait_for(out.with_name(".text.txt.tmp").exists, process)
    shutil.rmtree(out.parent)
    line = process.communicate(timeout=120)[1].splitlines()[-1]
    assert process.returncode == 1
    assert line.startswith("generate.py: cannot write") and str(out.parent) in line
