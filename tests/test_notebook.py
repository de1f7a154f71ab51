"""train.ipynb: saved as it ran, from top to bottom, with nothing of the machine it ran on."""
import ast
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
from jupyter_client.manager import start_new_kernel

from conftest import ROOT, TINY, run
from model import load_checkpoint

PATH = ROOT / "train.ipynb"
NOTEBOOK = json.loads(PATH.read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
FOLDERS = "bin|content(?!/drive)|etc|home|mnt|opt|private|root|srv|tmp|usr|var|Users"
MACHINE_PATH = re.compile(rf"(?<![\w.:/])/(?:{FOLDERS})/|\b[A-Z]:\\")


def commands():
    """Every command that the notebook passes to its python(), with the parts for QUICK alone."""
    nodes = [node for cell in CODE for node in ast.walk(ast.parse("".join(cell["source"])))]
    calls = [node for node in nodes if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Name) and node.func.id == "python"]
    return ["".join(node.value for node in ast.walk(call) if isinstance(node, ast.Constant))
            for call in calls]


def texts():
    """Every text of the notebook, without its pictures."""
    for cell in NOTEBOOK["cells"]:
        yield "".join(cell["source"])
        for output in cell.get("outputs", []):
            yield "".join(output.get("text", []))
            data = output.get("data", {})
            yield from ("".join(data[kind]) for kind in data if kind.startswith("text/"))


def test_it_is_a_notebook_of_format_4_and_not_large():
    assert NOTEBOOK["nbformat"] == 4 and NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"
    assert PATH.stat().st_size < 1_000_000


def test_all_its_code_ran_in_order_and_without_an_error():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert all(output["output_type"] != "error" for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4


def test_it_runs_every_script_with_flags_that_it_has():
    flags = {}
    for command in commands():
        script, *words = command.split()
        flags.setdefault(script, set()).update(word for word in words if word.startswith("--"))
    assert set(flags) == {"data/prepare.py", "train.py", "plots.py", "generate.py", "quantize.py"}
    for script, used in flags.items():
        process = run(script, "--help")
        assert process.returncode == 0, process.stderr
        assert used <= set(re.findall(r"--\w+", process.stdout)), script


@pytest.mark.parametrize("mark", ["\r", "\x1b", "it/s", "Traceback", "Warning", "pypi"])
def test_its_outputs_are_tidy(mark):
    assert not [text for text in texts() if mark in text]


def test_it_tells_nothing_of_the_machine_it_ran_on():
    assert not [text for text in texts() if MACHINE_PATH.search(text)]
    assert all(set(cell["metadata"]) == set() for cell in NOTEBOOK["cells"])


def test_the_pattern_knows_a_path_of_a_machine():
    assert all(map(MACHINE_PATH.search, ["in /tmp/x", '"/home/me/gpt"', "C:\\gpt"]))
    harmless = ["checkpoints/tmp/x", "https://github.com/home/x", "and/or"]
    assert not any(map(MACHINE_PATH.search, harmless))


# ---- what its cells do ----

def source(name):
    """Returns the source of the cell of that name."""
    return next("".join(cell["source"]) for cell in CODE if cell["id"] == name)


def test_its_first_cell_says_what_to_put_there(tmp_path):
    process = subprocess.run([sys.executable, "-c", source("setup")], cwd=tmp_path, text=True,
                             capture_output=True, timeout=60)
    assert process.returncode == 1 and len(process.stderr.splitlines()) == 1
    assert "put the address of your own copy" in process.stderr


@pytest.fixture
def kernel(tiny_text, tmp_path):
    """A kernel in a clone, where the training cell takes a tiny network and long.

    Gives a function that starts a cell, the kernel's manager, and the folder of the run.
    """
    clone = tmp_path / "clone"
    (clone / "data").mkdir(parents=True)
    for name in "train.py", "model.py", "tokenizer.py":
        shutil.copy(ROOT / name, clone)
    shutil.copy(tiny_text, clone / "data" / "input.txt")
    manager, client = start_new_kernel(cwd=clone)
    long = " ".join([" --max_iters 100000 --eval_interval 20", *TINY])

    def run_cell(name):
        """Starts a cell. Returns a function that waits for it to end and gives the reply."""
        message = client.execute(source(name).replace(" --preset fast", long))

        def wait():
            while True:
                reply = client.get_shell_msg(timeout=120)
                if reply["parent_header"]["msg_id"] == message:
                    return reply["content"]
        return wait

    assert run_cell("setup")()["status"] == "ok"
    yield run_cell, manager, clone / "checkpoints" / "notebook"
    manager.shutdown_kernel(now=True)
    client.stop_channels()


def iteration(folder):
    """Returns how far the run in a folder was saved; -1 while nothing is."""
    with contextlib.suppress(ValueError, OSError):
        return load_checkpoint(folder / "last.pt")["iteration"]
    return -1


def wait_until(event):
    end = time.monotonic() + 120
    while not event():
        assert time.monotonic() < end
        time.sleep(0.1)


def is_free(folder):
    """Tells whether no training holds a folder."""
    import train
    with contextlib.suppress(ValueError):
        train.lock(folder).close()
        return True
    return False


@pytest.mark.parametrize("group", [True, False], ids=["the kernel's group", "the kernel alone"])
def test_an_interrupted_training_cell_saves_and_goes_on_when_run_again(kernel, group):
    run_cell, manager, folder = kernel
    for _ in range(2):
        before = iteration(folder)
        wait = run_cell("train-code")
        wait_until(lambda before=before: iteration(folder) > max(before, 1))
        interrupt = os.killpg if group else os.kill
        interrupt(manager.provisioner.pid, signal.SIGINT)
        assert wait()["ename"] == "KeyboardInterrupt"
        assert is_free(folder) and iteration(folder) > before
    assert not (folder / "earlier-1").exists()


def test_a_training_whose_kernel_dies_is_saved_and_lets_go_of_its_folder(kernel):
    run_cell, manager, folder = kernel
    run_cell("train-code")
    wait_until(lambda: iteration(folder) > 1)
    os.kill(manager.provisioner.pid, signal.SIGKILL)
    wait_until(lambda: is_free(folder))
    assert iteration(folder) > 1


@pytest.mark.parametrize("keep", ["", "drive", "download"])
def test_a_run_on_colab_is_kept_where_one_asks_for_it(keep, tmp_path, monkeypatch):
    """Colab is not here: in its place stands what the cell needs of it."""
    calls = []
    colab = types.ModuleType("google.colab")
    colab.drive = types.SimpleNamespace(mount=lambda place: calls.append(("mount", place)))
    colab.files = types.SimpleNamespace(download=lambda path: calls.append(("download", path)))
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").write_text("weights")
    code = source("keep-code")
    assert code.startswith('KEEP = ""')  # off, unless one asks for it
    code = code.replace('KEEP = ""', f"KEEP = {keep!r}").replace("/content/drive", str(tmp_path))
    exec(code, {"shutil": shutil, "FOLDER": "run"})
    if keep == "drive":
        assert calls == [("mount", str(tmp_path))]
        kept = tmp_path / "MyDrive" / "gpt-from-scratch"
        assert (kept / "last.pt").read_text() == "weights"
    elif keep == "download":
        assert [name for name, _ in calls] == ["download"]
        shutil.unpack_archive(calls[0][1], tmp_path / "unpacked")
        assert (tmp_path / "unpacked" / "last.pt").read_text() == "weights"
    else:
        assert not calls
