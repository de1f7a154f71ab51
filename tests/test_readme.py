"""README.md: its commands run, its flags, files and links exist, and its figures are those of the network that comes with it."""
import csv
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run

TEXT = re.sub(r" *\\\n *", " ", (ROOT / "README.md").read_text(encoding="utf-8"))  # a command on two lines becomes one
COMMANDS = [line.split("  #")[0].strip() for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
LONG = ("bench.py", "train.py", "pytest", "torchrun")  # not for a test


def python_commands(text):
    """The words of every command of this page that starts one of the scripts, prose included."""
    found = re.findall(r"(?:python3?|torchrun [^`]*?) ((?:data/|tests/)?\w+\.py[^`\n&|#]*)", text)
    return [shlex.split(command) for command in found]


def test_every_script_and_flag_it_names_exists():
    used = {}
    for script, *words in python_commands(TEXT):
        key = (script, *[word for word in words[:1] if script in ("tests/bench.py", "tokenizer.py") and not word.startswith("-")])
        used.setdefault(key, set()).update(word for word in words if word.startswith("--"))
    assert {script for script, *_ in used} >= {"tokenizer.py", "train.py", "generate.py", "quantize.py", "plots.py", "tests/bench.py"}
    for (script, *command), flags in used.items():
        process = run(script, *command, "--help")
        assert process.returncode == 0, (script, command, process.stderr)
        assert flags <= set(re.findall(r"--\w+", process.stdout)), (script, command)


def test_flags_in_its_prose_belong_to_a_script():
    scripts = [*sorted(ROOT.glob("*.py")), ROOT / "tests" / "bench.py"]
    known = {flag for path in scripts for flag in re.findall(r'"(--\w+)"', path.read_text(encoding="utf-8"))}
    known |= {f"--{name}" for name in re.findall(r'flag\(\w+, "(\w+)"', (ROOT / "train.py").read_text(encoding="utf-8"))}
    foreign = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--help"}  # torchrun's, argparse's
    prose = re.sub(r"^```.*?^```", "", TEXT, flags=re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"`[^`]*?(--\w+)", prose)) - foreign <= known


def test_its_links_and_pictures_lead_somewhere():
    targets = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert any(target.endswith(".png") for target in targets)
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in TEXT.splitlines() if line.startswith("#")}
    for target in targets:
        assert target.startswith("https://") or (target[1:] in headings if target.startswith("#") else (ROOT / target).is_file()), target


def test_the_files_it_names_exist():
    for name in set(re.findall(r"`((?:data/|tests/|\.ci/)?\w+\.(?:py|ipynb|txt|md))`", TEXT)) - {"my.txt", "data/input.txt", "samples.txt"}:
        assert (ROOT / name).is_file(), name


def test_the_functions_it_points_at_exist():
    sources = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    names = set(re.findall(r"`(?:[A-Z]\w+\.)?(\w+)`", TEXT[TEXT.index("## How a GPT works"):TEXT.index("## Results")]))
    assert len(names) >= 13
    for name in names:
        assert re.search(rf"(?:def|class) {name}\b", sources), name


@pytest.fixture(scope="module")
def clone(tmp_path_factory, shakespeare):
    """What a new user has: the repository, with the text in its place."""
    folder = tmp_path_factory.mktemp("clone")
    for path in [*ROOT.glob("*.py"), ROOT / "data", ROOT / "checkpoints" / "pretrained"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.relative_to(ROOT))
    return folder


def test_its_quick_commands_run_in_the_order_shown(clone):
    quick = [command for command in COMMANDS if command and not any(word in command for word in LONG)]
    assert len(quick) >= 5
    for command in quick:
        command = command.split("&& ")[-1]  # without setting up
        done = subprocess.run(["bash", "-o", "pipefail", "-c", command.replace("python ", f"{shlex.quote(sys.executable)} ")], cwd=clone,
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (command, done.stderr)


def test_its_python_does_what_it_says(clone):
    code = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.S))
    done = subprocess.run([sys.executable, "-c", code + "\nprint(ids, tokenizer.decode(ids))"], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[72, 105, 261, 77, 265, 110, 97, 378, 279, 84, 262, 102, 105, 107] Hi, My name is Toufik" in done.stdout
    assert "merge 244/244: (292, 256) -> 499 (b'ome ') had 494 occurrences" in done.stdout and "1.50X" in done.stdout


def test_the_loss_it_claims_is_that_of_the_network_it_ships():
    with open(ROOT / "checkpoints" / "pretrained" / "metrics.csv", newline="") as file:
        best = min(csv.DictReader(file), key=lambda row: float(row["val_loss"]))
    row = next(line for line in TEXT.splitlines() if line.startswith("| validation loss, nats per token"))
    assert f"{float(best['val_loss']):.4f}" in row
    row = next(line for line in TEXT.splitlines() if line.startswith("| validation loss, nats per character"))
    assert f"{float(best['val_nats_per_char']):.4f}" in row
