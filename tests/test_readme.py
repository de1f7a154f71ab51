"""README.md and the pages it leads to: what they name exists, their commands run, figures hold."""
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict

import prepare
from conftest import ROOT, metrics, run
from model import GPT, GPTConfig
from tokenizer import BasicTokenizer, read_text

CARD = ROOT / "checkpoints" / "pretrained"
PAGES = {path: path.read_text(encoding="utf-8") for path in (
    ROOT / "README.md", CARD / "README.md", ROOT / "tests/README.md", ROOT / "data/README.md")}
README, MODEL_CARD, _, DATA = PAGES.values()
COMMAND = re.compile(r"(?:python3?|torchrun [^`\n]*?) ((?:\w+/)?\w+\.py[^`\n&|#;]*)")
FLAG = re.compile(r"--\w+")


def blocks(text, language):
    """Returns all code blocks of a language."""
    return "".join(re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M))


# ---- what they name ----

def test_every_script_and_flag_they_name_exists():
    used = defaultdict(set)
    known = {"--help", "--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}
    for command in COMMAND.findall("\n".join(PAGES.values())):
        script, *words = shlex.split(command)
        subcommand = words[:1] if script in ("tests/bench.py", "tokenizer.py") else []
        used[(script, *subcommand)].update(FLAG.findall(command))
    assert {script for script, *_ in used} == {
        "tokenizer.py", "train.py", "generate.py", "quantize.py", "plots.py",
        "data/prepare.py", "tests/bench.py"}
    for words, flags in used.items():
        shown = run(*words, "--help")
        has = set(FLAG.findall(shown.stdout))
        assert shown.returncode == 0 and flags <= has, words
        known |= has
    for path, text in PAGES.items():
        assert set(FLAG.findall(" ".join(re.findall(r"`[^`\n]+`", text)))) <= known, path


def test_links_files_and_functions_they_name_exist():
    anchors = {path: {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
                      for heading in re.findall(r"^#+ (.*)", text, re.M)}
               for path, text in PAGES.items()}
    for path, text in PAGES.items():
        for file, anchor in re.findall(r"\]\((?!https://)([^)#]*)#?([^)]*)\)", text):
            there = (path.parent / file).resolve() if file else path
            assert there.is_file() and (not anchor or anchor in anchors[there]), (file, anchor)
        for name in re.findall(r"`([\w./]*(?:\.py|\.ipynb|\.md|/run|/))`", text):
            assert (ROOT / name).exists() or (path.parent / name).exists(), name
    tour = README[README.index("## How a GPT works"):README.index("## Results")]
    names = set(re.findall(r"`(?:[A-Z]\w+\.)?(\w+)`", tour))
    sources = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    assert len(names) >= 13 and names <= set(re.findall(r"\b(?:def|class) (\w+)", sources))


# ---- what they show ----

def test_quick_commands_and_code_print_what_is_shown_in_a_clone(tmp_path, shakespeare):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for folder in "data", "checkpoints/pretrained":
        shutil.copytree(ROOT / folder, tmp_path / folder)

    def output(*command):
        return subprocess.check_output(command, cwd=tmp_path, text=True)

    printed, command = {}, ""
    for line in "".join(blocks(text, "sh") for text in PAGES.values()).splitlines():
        if not line.startswith("#"):
            command = line.split("&& ")[-1]  # without setting up
            if re.match(r"python (?!.*(bench\.py|train\.py|pytest))", command):
                here = command.replace("python", shlex.quote(sys.executable), 1)
                printed[command] = printed.get(command) or output("bash", "-c", here)
        elif "tokenizer.py" in command:  # it prints the same on every machine
            assert line[2:] in ["...", *printed[command].splitlines()]
    assert len(printed) >= 8
    code = blocks(README, "python") + "print(ids, tokenizer.decode(ids))"
    shown = r"ratio: 1\.50X\n.* 102, 105, 107\] Hi, My name is Toufik\n$"
    assert re.search(shown, output(sys.executable, "-c", code), re.S)


def test_the_figures_are_those_of_the_network_shipped():
    loss, per_char = min((row["val_loss"], row["val_nats_per_char"]) for row in metrics(CARD))
    size = (CARD / "model.pt").stat().st_size / 1e6
    parameters = f"{sum(weight.numel() for weight in GPT(GPTConfig()).parameters()):,}"
    for page, figures in (
            (README, [f"| **{per_char:.4f}** | **{loss:.4f}** | {parameters} |",
                      f"# size on disk, MB {size:.2f}",
                      f"# validation loss, nats per token {loss:.4f}"]),
            (MODEL_CARD, [f"{loss:.4f} nats per token, {per_char:.4f} per character",
                          f"windows side by side {loss:.4f} ({per_char:.4f})",
                          f"| {size:.2f} MB, ", f"{parameters} parameters"])):
        for figure in figures:
            assert figure in re.sub(" +", " ", page)


def test_the_figures_of_the_text_are_true(shakespeare):
    text, tokenizer = read_text(shakespeare), BasicTokenizer(out_dir=CARD)
    ids = tokenizer.encode_array(text)
    train = int(0.9 * len(ids))
    val, spelled = len(ids) - train, tokenizer.count_characters(ids[train:])
    for figure in (prepare.SHA256, f"{len(text):,} bytes", f"{len(ids):,}", f"{train:,} tokens",
                   f"{val:,} validate", f"{spelled:,} characters, {spelled / val:.4f} each"):
        assert figure in DATA


def test_what_they_are_held_to():
    assert README.count("\n") <= 180 and len(README.split()) <= 1800
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert f"PyTorch {re.search('torch>=([0-9.]+)', requirements)[1]}," in README
