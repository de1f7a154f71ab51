"""train.ipynb: saved as it ran, from top to bottom, with commands that exist and nothing of the machine it ran on."""
import ast
import json
import re

import pytest
from conftest import ROOT, run

PATH = ROOT / "train.ipynb"
NOTEBOOK = json.loads(PATH.read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:bin|content|etc|home|mnt|opt|private|root|srv|tmp|usr|var|Users)/|\b[A-Z]:\\")


def commands():
    """What the notebook passes to its python(): every command as one string, with the parts that depend on QUICK."""
    calls = [node for cell in CODE for node in ast.walk(ast.parse("".join(cell["source"])))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "python"]
    return ["".join(node.value for node in ast.walk(call) if isinstance(node, ast.Constant)) for call in calls]


def texts():
    """Every text of the notebook, without its pictures."""
    for cell in NOTEBOOK["cells"]:
        yield "".join(cell["source"])
        for output in cell.get("outputs", []):
            yield "".join(output.get("text", []))
            yield from ("".join(value) for kind, value in output.get("data", {}).items() if kind.startswith("text/"))


def test_it_is_a_notebook_of_format_4_and_not_large():
    assert NOTEBOOK["nbformat"] == 4 and NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"
    assert PATH.stat().st_size < 1_000_000


def test_all_its_code_ran_in_order_and_without_an_error():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs)
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
    assert not any(map(MACHINE_PATH.search, ["checkpoints/tmp/x", "https://github.com/home/x", "and/or"]))
