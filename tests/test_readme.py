"""README.md and the pages it leads to: what they name exists, their commands run, figures hold."""
import csv
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT, run
from model import GPT, GPTConfig
from tokenizer import BasicTokenizer, read_text

CARD = ROOT / "checkpoints" / "pretrained"
PAGES = {folder / "README.md": (folder / "README.md").read_text(encoding="utf-8")
         for folder in (ROOT, CARD, ROOT / "tests", ROOT / "data")}
README, MODEL_CARD, TESTS, DATA = PAGES.values()
COMMAND = re.compile(r"(?:python3?|torchrun [^`\n]*?) ((?:\w+/)?\w+\.py[^`\n&|#;]*)")
LONG = ("bench.py", "train.py", "pytest")  # not for a test
FOREIGN = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--help"}


def blocks(text, language):
    """The lines of all code blocks of a language."""
    return "".join(re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)).splitlines()


def anchors(text):
    """What GitHub calls the headings of a page in links."""
    headings = re.findall(r"^#+ (.*)", text, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_script_and_flag_they_name_exists():
    used, known = {}, set(FOREIGN)
    for command in COMMAND.findall("\n".join(PAGES.values())):
        script, *words = shlex.split(command)
        subcommand = words[:1] if script in ("tests/bench.py", "tokenizer.py") else []
        flags = used.setdefault((script, *subcommand), set())
        flags.update(word for word in words if word.startswith("--"))
    assert {script for script, *_ in used} == {
        "data/prepare.py", "tokenizer.py", "train.py", "generate.py", "quantize.py", "plots.py",
        "tests/bench.py"}
    for words, flags in used.items():
        process = run(*words, "--help")
        assert process.returncode == 0, (words, process.stderr)
        known |= (has := set(re.findall(r"--\w+", process.stdout)))
        assert flags <= has, words
    for path, text in PAGES.items():
        named = set(re.findall(r"--\w+", " ".join(re.findall(r"`[^`\n]+`", text))))
        assert named <= known, path


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_files_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[path]):
        if not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            there = (path.parent / file).resolve() if file else path
            assert there.is_file(), target
            assert not anchor or anchor in anchors(PAGES[there]), target
    for name in set(re.findall(r"`([\w./]*(?:\.py|\.ipynb|\.md|/run|/))`", PAGES[path])):
        assert (ROOT / name).exists() or (path.parent / name).exists(), name


def test_the_functions_the_tour_points_at_exist():
    tour = README[README.index("## How a GPT works"):README.index("## Results")]
    names = set(re.findall(r"`(?:[A-Z]\w+\.)?(\w+)`", tour))
    sources = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    assert len(names) >= 13
    for name in names:
        assert re.search(rf"^ *(?:def|class) {name}\b", sources, re.M), name


@pytest.fixture(scope="module")
def clone(tmp_path_factory, shakespeare):
    """What a new user has: the repository, with the text in its place."""
    folder = tmp_path_factory.mktemp("clone")
    for path in [*ROOT.glob("*.py"), ROOT / "data", CARD]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.relative_to(ROOT))
    return folder


def test_quick_commands_run_in_the_order_shown_and_print_what_is_shown(clone):
    lines = [line.split("&& ")[-1]  # without setting up
             for text in PAGES.values() for line in blocks(text, "sh")]
    quick = [line for line in dict.fromkeys(lines)
             if line.startswith("python ") and not any(word in line for word in LONG)]
    assert len(quick) >= 8
    for command in quick:
        here = command.replace("python", shlex.quote(sys.executable), 1)
        done = subprocess.run(["bash", "-c", here], cwd=clone, capture_output=True, text=True,
                              timeout=300)
        assert done.returncode == 0, (command, done.stderr)
        if "tokenizer.py" in command:  # it prints the same on every machine
            shown = re.search(rf"^{re.escape(command)}\n((?:# .*\n)+)", README, re.M)[1]
            shown = {line[2:] for line in shown.splitlines()} - {"..."}
            assert shown <= set(done.stdout.splitlines()), command


def test_the_python_does_what_it_says(clone):
    code = "\n".join([*blocks(README, "python"), "print(ids, tokenizer.decode(ids))"])
    done = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "compression ratio: 1.50X\n" in done.stdout
    assert done.stdout.endswith("102, 105, 107] Hi, My name is Toufik\n")


def test_the_figures_are_those_of_the_network_shipped():
    with open(CARD / "metrics.csv", newline="") as file:
        best = min(csv.DictReader(file), key=lambda row: float(row["val_loss"]))
    loss, per_char = (f"{float(best[name]):.4f}" for name in ("val_loss", "val_nats_per_char"))
    size = f"{(CARD / 'model.pt').stat().st_size / 1e6:.2f}"
    parameters = f"{sum(weight.numel() for weight in GPT(GPTConfig()).parameters()):,}"
    for figure, page in ((f"| **{per_char}** | **{loss}** | {parameters} |", README),
                         (f"{loss} nats per token, {per_char} per character", MODEL_CARD),
                         (f"| {size} MB, ", MODEL_CARD), (f"{parameters} parameters", MODEL_CARD)):
        assert figure in page, figure
    for row, figure in (("# size on disk, MB", size), ("# validation loss, nats per token", loss),
                        ("whole split, windows side by side", f"{loss} ({per_char})")):
        assert re.search(rf"^{row} +{re.escape(figure)}", README + MODEL_CARD, re.M), row


def test_the_figures_of_the_text_are_true(shakespeare):
    text, tokenizer = read_text(shakespeare), BasicTokenizer(out_dir=CARD)
    ids = tokenizer.encode_array(text)
    train, val = np.split(ids, [int(0.9 * len(ids))])
    spelled = tokenizer.count_characters(val)
    source = (ROOT / "data" / "prepare.py").read_text(encoding="utf-8")
    for figure in (re.search(r'SHA256 = "(\w+)"', source)[1], f"{len(text):,} bytes",
                   f"{len(ids):,}", f"{len(train):,} tokens", f"{len(val):,} validate",
                   f"{spelled:,} characters, {spelled / len(val):.4f} each"):
        assert figure in DATA, figure


def test_what_they_are_held_to():
    assert README.count("\n") <= 180 and len(README.split()) <= 1800
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert f"PyTorch {re.search(r'^torch>=([0-9.]+)', requirements, re.M)[1]}," in README
    # presets change, what was trained does not
    assert not [command for command in COMMAND.findall(MODEL_CARD) if "--preset" in command]
    for path in (ROOT / "tests").glob("test_*.py"):
        assert f"`{path.name}`" in TESTS, path.name
