"""Full disks, folders nobody can write into, that vanish or stand in the place of files."""
import re
import resource

import pytest

from conftest import ROOT, TINY, complaint, contents, run, start, wait_for
from tokenizer import BasicTokenizer
from train import load_last

attack = pytest.mark.attack
FILES = {  # which a script reads or writes
    "train.py": "merges.pkl metrics.csv .lock .metrics.csv.tmp", "tokenizer.py": "vocab.pkl",
    "quantize.py": "int8.pt", "generate.py": "model.pt merges.pkl text.txt prompt.txt",
    "plots.py": "metrics.csv histograms.npz .relu_outputs.png.tmp"}


def flags(script, out, text, whole):
    """Returns how a script is told to write into the folder `out`, reading the run in `whole`."""
    return {
        "train.py": [*TINY, "--data_path", text, "--out_dir", out, "--max_iters", 2],
        "tokenizer.py": ["train", "--data_path", text, "--out_dir", out, "--vocab_size", 310],
        "quantize.py": ["--out_dir", whole, "--data_path", text, "--out", out / "int8.pt"],
        "generate.py": ["--out_dir", whole, "--max_new_tokens", 3000, "--out", out / "text.txt"],
        "plots.py": ["--out_dir", out]}[script]


def networks(folder):
    return {path: data for path, data in contents(folder).items() if ".pt" in path.name}


def remove_networks(folder):
    for path in folder.glob("*.pt*"):
        path.unlink()


def no_file_beyond(size):
    """Returns options of `run` that stand for a full disk."""
    return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}


@pytest.mark.parametrize("script, size", [
    ("quantize.py", 5000),
    *(pytest.param(script, size, marks=attack) for script in FILES for size in (100, 1500))])
def test_a_full_disk_is_one_line_and_changes_no_file(tiny_run, tiny_text, script, size):
    if script == "tokenizer.py":  # it trains none beside another's network
        remove_networks(tiny_run)
    before = contents(tiny_run)
    process = run(script, *flags(script, tiny_run, tiny_text, tiny_run), **no_file_beyond(size))
    line, after = complaint(process), contents(tiny_run)
    assert "cannot write" in line and str(tiny_run) in line
    assert before.items() <= after.items()
    new = {path.name for path in after.keys() - before}
    assert new <= {"merges.pkl", "vocab.pkl"}  # whole ones, which the next run replaces
    assert BasicTokenizer(out_dir=tiny_run).vocab_size == 300


def test_a_disk_that_fills_up_in_training_keeps_what_resumes_it(tiny_run):
    before, resume = networks(tiny_run), ["train.py", "--resume", "--out_dir", tiny_run]
    process = run(*resume, "--max_iters", 80, **no_file_beyond(20_000))  # metrics fit, weights not
    assert re.search("cannot write .*too large", complaint(process))
    assert networks(tiny_run) == before and run(*resume).returncode == 0


@attack
@pytest.mark.parametrize("script, name", [
    (script, name) for script, names in FILES.items() for name in names.split()])
def test_a_folder_in_the_place_of_a_file_is_one_line(tiny_run, tiny_text, script, name):
    if script == "tokenizer.py" or script == "train.py" and "metrics" in name:
        remove_networks(tiny_run)
    (tiny_run / name).unlink(missing_ok=True)
    (tiny_run / name).mkdir()
    before = networks(tiny_run)
    prompt = ["--prompt_file", tiny_run / name] if name == "prompt.txt" else []
    line = complaint(run(script, *flags(script, tiny_run, tiny_text, tiny_run), *prompt))
    named = "" if name == ".lock" else name.removeprefix(".").removesuffix(".tmp")
    assert str(tiny_run / named) in line
    assert before.items() <= networks(tiny_run).items()
    assert not any(path.is_file() for path in tiny_run.glob("*.tmp"))


@pytest.mark.parametrize("script, begun", [
    ("train.py", "last.pt"), pytest.param("generate.py", ".text.txt.tmp", marks=attack)])
def test_a_folder_that_vanishes_is_one_line_and_stays_away(finished_run, tiny_text, tmp_path,
                                                           script, begun):
    """Made again it would hold weights without their tokenizer."""
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    endless = ["--max_iters", 10**6, "--eval_interval", 50] if script == "train.py" else []
    process = start(ROOT / script, *flags(script, out, tiny_text, finished_run), *endless)
    wait_for((out / begun).exists, process)
    out.rename(elsewhere)
    process.stdout, process.stderr = process.communicate(timeout=120)
    assert str(out) in complaint(process) and not out.exists()
    assert script != "train.py" or load_last(elsewhere)["iteration"] >= 0
