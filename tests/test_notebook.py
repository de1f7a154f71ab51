"""train.ipynb: saved as it ran, from top to bottom, with nothing of the machine it ran on."""
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from conftest import ROOT, TINY, complaint, python, run, start, wait_for
from model import load_checkpoint

TEXT = (ROOT / "train.ipynb").read_text(encoding="utf-8")
NOTEBOOK = json.loads(TEXT)
CODE = {cell["id"]: cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"}
SOURCES = {name: "".join(cell["source"]) for name, cell in CODE.items()}
FOLDERS = "bin|content(?!/drive)|etc|home|mnt|opt|private|root|srv|tmp|usr|var|Users"
UNTIDY = re.compile(rf"\\r|\\u001b|it/s|Traceback|Warning|pypi|(?<![\w.:/])/(?:{FOLDERS})/"
                    r"|\b[A-Z]:\\\\")  # as JSON spells it


def test_it_is_saved_as_it_ran_without_errors_or_traces_of_the_machine():
    assert NOTEBOOK["nbformat"] == 4 and NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"
    assert [cell["execution_count"] for cell in CODE.values()] == [*range(1, len(CODE) + 1)]
    outputs = [output for cell in CODE.values() for output in cell["outputs"]]
    assert not {"error", "stderr"} & {x.get("name", x["output_type"]) for x in outputs}
    assert sum("image/png" in x.get("data", {}) for x in outputs) == 4
    assert not any(cell["metadata"] for cell in NOTEBOOK["cells"])
    assert len(TEXT.encode()) < 1_000_000
    words = re.sub(r'"image/png": "[^"]*"', "", TEXT).replace(r"\n", "\n")
    assert not UNTIDY.search(words)


def test_it_runs_every_script_with_flags_that_it_has():
    flags = defaultdict(set)
    for source in SOURCES.values():
        for script in re.findall(r"^python\(f?[\"']([\w/]+\.py)", source, re.M):
            flags[script].update(re.findall(r"--\w+", source))
    assert set(flags) == {"data/prepare.py", "train.py", "plots.py", "generate.py", "quantize.py"}
    for script, used in flags.items():
        assert used <= set(re.findall(r"--\w+", run(script, "--help").stdout)), script


# ---- what its cells do ----

def test_its_first_cell_says_what_to_put_there(tmp_path):
    process = python("-c", SOURCES["setup"], cwd=tmp_path)
    assert "put the address of your own copy" in complaint(process)


KERNEL = """
import sys
try:
    exec(sys.argv[1])
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr, flush=True)
    sys.stdin.read()  # lives on
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_training_cell_interrupted_or_killed_goes_on_if_run_again(tiny_text, tmp_path, number):
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    folder = tmp_path / "checkpoints" / "notebook"
    flags = " ".join([*TINY, f"--data_path {tiny_text} --max_iters 20000 --eval_interval 20"])
    code = SOURCES["setup"] + "\n" + SOURCES["train-code"].replace("--preset fast", flags)

    def iteration():
        try:
            return load_checkpoint(folder / "last.pt")["iteration"]
        except (ValueError, OSError):
            return 0

    for _ in range(2):
        before = iteration()
        kernel = start("-c", KERNEL, code, cwd=tmp_path, stdin=subprocess.PIPE,
                       stdout=subprocess.DEVNULL)
        wait_for(lambda before=before: iteration() > before, kernel)
        kernel.send_signal(number)
        at_once = number == signal.SIGINT
        assert ("interrupted\n" in kernel.stderr) == at_once
        with open(folder / ".lock") as lock:  # free once the training has ended
            fcntl.flock(lock, fcntl.LOCK_EX | at_once * fcntl.LOCK_NB)
        assert before < iteration() < 20_000
        kernel.communicate()
    assert not (folder / "earlier-1").exists()


def test_a_run_on_colab_is_kept_where_asked(tmp_path, monkeypatch):
    colab = MagicMock()
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.chdir(tmp_path)
    os.mkdir("run")
    Path("run/last.pt").write_text("weights")
    code = SOURCES["keep-code"].replace("/content/drive", str(tmp_path))
    assert code.startswith('KEEP = ""')  # off by default
    for keep in "", "drive", "download":
        exec(code.replace('""', f'"{keep}"', 1), {"shutil": shutil, "FOLDER": "run"})
    [mounted], [archive] = colab.drive.mount.call_args.args, colab.files.download.call_args.args
    shutil.unpack_archive(archive, "unpacked")
    for kept in f"{mounted}/MyDrive/gpt-from-scratch", "unpacked":
        assert Path(kept, "last.pt").read_text() == "weights"
