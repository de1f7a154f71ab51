"""Disks that are full, folders nobody can write into, vanish or stand in the place of files: one line, nothing lost."""
import os
import resource
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, TINY, complaint, contents, run, start, wait_for

import train
from tokenizer import BasicTokenizer

attack = pytest.mark.attack


def command(script, out, text, whole):
    """Returns how a script is told to write into the folder `out`, reading what it needs from the run in `whole`."""
    name, *resume = script.split()
    return [name, *resume, *{
        "train.py": [] if resume else [*TINY, "--data_path", text, "--max_iters", 2],
        "tokenizer.py": ["train", "--data_path", text, "--vocab_size", 310],
        "quantize.py": ["--data_path", text, "--checkpoint", whole / "model.pt", "--out", out / "int8.pt"],
        "generate.py": ["--max_new_tokens", 3000, "--device", "cpu", "--out", out / "text.txt"],
        "plots.py": []}[name], "--out_dir", whole if name in ("quantize.py", "generate.py") else out]


SCRIPTS = ["train.py", "tokenizer.py", "quantize.py", "generate.py", "plots.py"]


def failure(process):
    """Returns the one line of a failed script, before which generate.py may have said what it samples from."""
    first, _, rest = process.stderr.partition("\n")
    if first.startswith("using "):
        process.stderr = rest
    return complaint(process)


@pytest.mark.parametrize("script, size", [
    ("train.py --resume --max_iters=80", 20_000), ("quantize.py", 1500),  # 20 kB: its metrics fit, its weights do not
    *(pytest.param(script, size, marks=attack) for script in SCRIPTS for size in (100, 1500))])
def test_a_full_disk_is_one_line_and_changes_no_file(tiny_run, tiny_text, script, size):
    """A limit on the size of files stands for it."""
    if script == "tokenizer.py":  # it trains no tokenizer beside a network of another
        for path in tiny_run.glob("*.pt*"):
            path.unlink()
    before = contents(tiny_run)
    process = run(*command(script, tiny_run, tiny_text, tiny_run),
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    line = failure(process)
    assert "cannot write" in line and str(tiny_run) in line
    after = contents(tiny_run)
    assert {path.name for path in after.keys() - before} <= {"merges.pkl", ".merges.pkl.new"}, "replaced by the next run"
    metrics = {Path("metrics.csv"), Path("histograms.npz")} if "--resume" in script else set()
    assert {path: after[path] for path in before if path not in metrics} == {
        path: data for path, data in before.items() if path not in metrics}
    assert BasicTokenizer(out_dir=tiny_run).vocab_size == 300
    if metrics:
        assert run("train.py", "--resume", "--out_dir", tiny_run).returncode == 0


@pytest.fixture
def sealed(tmp_path):
    """A folder into which nobody can write, not even root, whom permissions do not stop."""
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
@pytest.mark.parametrize("script, name, flags", [
    *(("train.py", name, []) for name in ("merges.pkl", "metrics.csv", "histograms.npz", ".lock", ".metrics.csv.tmp")),
    *(("quantize.py", name, []) for name in ("model_int8.pt", "model.pt", "vocab.pkl")),
    *(("generate.py", name, []) for name in ("model.pt", "merges.pkl")),
    ("generate.py", "text.txt", ["--out"]), ("generate.py", "prompt.txt", ["--prompt_file"]),
    ("tokenizer.py", "vocab.pkl", []), ("tokenizer.py", "merges.pkl", []),
    *(("plots.py", name, []) for name in ("metrics.csv", "histograms.npz", "loss.png", ".relu_outputs.png.tmp"))])
def test_a_folder_in_the_place_of_a_file_is_one_line(tiny_run, tiny_text, script, name, flags):
    if script == "tokenizer.py" or script == "train.py" and name not in ("merges.pkl", ".lock"):
        for path in tiny_run.glob("*.pt*"):  # else the one is refused, and the other moves the earlier run aside
            path.unlink()
    (tiny_run / name).unlink(missing_ok=True)
    (tiny_run / name).mkdir()
    before, text = contents(tiny_run), ["--data_path", tiny_text]
    common = {"train.py": [*TINY, *text, "--max_iters", 2], "quantize.py": text,
              "tokenizer.py": ["train", *text, "--vocab_size", 310]}.get(script, [])
    flags = [*flags, tiny_run / name] if flags else []
    line = failure(run(script, *common, "--out_dir", tiny_run, *flags))
    assert str(tiny_run / name.removeprefix(".").removesuffix(".tmp")) in line or name == ".lock" and str(tiny_run) in line
    after = contents(tiny_run)
    assert all(after[path] == data for path, data in before.items() if path.suffix == ".pt")
    assert not [path for path in tiny_run.glob("*.tmp") if path.is_file()]


# ---- a folder that vanishes ----

def test_a_training_whose_folder_vanishes_ends_and_the_folder_stays_away(tiny_text, tmp_path):
    """Written again it would hold weights without their tokenizer."""
    process = start("train.py", *TINY, "--data_path", tiny_text, "--out_dir", tmp_path / "run", "--eval_interval", 50)
    wait_for((tmp_path / "run" / "last.pt").exists, process)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and len(err.splitlines()) == 1 and str(tmp_path / "run") in err
    assert not (tmp_path / "run").exists() and train.load_last(tmp_path / "elsewhere")["iteration"] >= 0


@attack
def test_a_sampling_whose_folder_vanishes_is_one_line(finished_run, tmp_path):
    out = tmp_path / "out" / "text.txt"
    process = start("generate.py", "--out_dir", finished_run, "--max_new_tokens", 5000, "--out", out)
    wait_for((tmp_path / "out" / ".text.txt.tmp").exists, process)
    shutil.rmtree(tmp_path / "out")
    err = process.communicate(timeout=120)[1].splitlines()
    assert process.returncode == 1 and err[-1].startswith("generate.py: cannot write") and str(out.parent) in err[-1]
