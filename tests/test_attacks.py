"""Nothing lost, no one let in: a hostile world against the whole, from outside.

The short attacks run with the other tests; the long ones, counted, with: python -m pytest -q -s tests -m attack
"""
import argparse
import ast
import contextlib
import copy
import csv
import io
import itertools
import json
import math
import os
import pickle
import random
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, complaint, run, wait_for

import bench
import generate
import model
import plots
import quantize
import tokenizer
import train
from model import load_checkpoint, load_model, save_checkpoint
from tokenizer import BasicTokenizer

attack = pytest.mark.attack


def contents(folder):
    """{path: bytes} of every file below a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(a, b):
    """Whether two values of checkpoints are equal, tensors bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b


# ---------------------------------------------------------------------------- weaknesses that were mended


@pytest.mark.parametrize("network", ["model.pt", "last.pt", "model_int8.pt"])
def test_a_trained_network_keeps_its_tokenizer(tiny_run, tiny_text, network):
    shutil.copy(tiny_run / "model.pt", tiny_run / "model_int8.pt")
    for path in tiny_run.glob("*.pt*"):
        if path.name != network:
            path.unlink()
    before = contents(tiny_run)
    line = complaint(run("tokenizer.py", "train", "--data_path", tiny_text, "--vocab_size", 290, "--out_dir", tiny_run))
    assert str(tiny_run) in line and "--out_dir" in line and contents(tiny_run) == before
    (tiny_run / "merges.pkl").write_bytes(b"damaged")  # the message for that says: train again
    again = run("tokenizer.py", "train", "--data_path", tiny_text, "--vocab_size", 300, "--out_dir", tiny_run)
    assert again.returncode == 0 and again.stdout.count("compression ratio") == 1, again.stderr
    assert contents(tiny_run) == before


def test_a_text_that_cannot_be_trained_on_leaves_no_folder(tiny_text, tmp_path):
    (tmp_path / "one.txt").write_text("x")
    for flags, message in ((["--data_path", tmp_path / "none.txt"], "none.txt"), (["--data_path", tmp_path / "one.txt"], "too short"),
                           (["--data_path", tiny_text, "--block_size", "5000"], "too short"),
                           (["--data_path", tiny_text, "--device", "tpu"], "--device tpu")):
        assert message in complaint(run("train.py", *TINY, "--out_dir", tmp_path / "run", *flags))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ids", [["72, 105"], ["[72, 105]"], ["72,105"], ["[72,", "105]"], ["72", "105"]])
def test_ids_are_decoded_as_python_prints_them(finished_run, ids):
    assert run("tokenizer.py", "decode", "--out_dir", finished_run, *ids).stdout == "Hi"
    assert run("tokenizer.py", "decode", "--out_dir", finished_run, stdin=None, input=" ".join(ids) + "\n").stdout == "Hi"


def test_a_folder_that_vanishes_in_mid_run_ends_the_run_and_stays_away(tiny_text, tmp_path):
    """Written again it would hold weights without their tokenizer."""
    process = subprocess.Popen([sys.executable, "train.py", *TINY, "--data_path", tiny_text, "--out_dir", tmp_path / "run", "--eval_interval",
                                "50"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for((tmp_path / "run" / "last.pt").exists, process)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and len(err.splitlines()) == 1 and str(tmp_path / "run") in err
    assert not (tmp_path / "run").exists() and train.load_last(tmp_path / "elsewhere")["iteration"] >= 0


def test_text_that_the_output_cannot_hold_is_no_error(tiny_run, tiny_text, tmp_path):
    """A sample can hold any character, and the output's encoding may know few."""
    ascii_only, text = os.environ | {"PYTHONIOENCODING": "ascii"}, ["--data_path", tiny_text]
    for command in (["train.py", *TINY, *text, "--out_dir", tmp_path / "new", "--max_iters", 1],
                    ["quantize.py", *text, "--out_dir", tiny_run],
                    ["tokenizer.py", "vocab", *text, "--out_dir", tiny_run],
                    ["tokenizer.py", "show", "caf\N{LATIN SMALL LETTER E WITH ACUTE}s \N{EM DASH}", "--out_dir", tiny_run]):
        process = run(*command, env=ascii_only)
        assert process.returncode == 0 and "?" in process.stdout, process.stderr


@pytest.mark.parametrize("tiny", [1e-30, 1e-45, 1e-320, 5e-324])
def test_temperatures_and_probabilities_too_small_for_float32(tiny):
    logits, uniform = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([0.999])
    assert model.sample(logits, uniform, temperature=tiny).tolist() == [1]
    assert model.sample(logits, uniform, top_p=tiny).tolist() == [1]


def test_a_network_of_another_vocabulary_is_refused_though_it_names_the_tokenizer(tiny_run):
    """Else its ids would be looked up beyond the embeddings."""
    checkpoint = load_checkpoint(tiny_run / "model.pt")
    for name in "token_embedding.weight", "head.weight", "head.bias":
        checkpoint["model"][name] = checkpoint["model"][name][:100].clone()
    checkpoint["config"]["vocab_size"] = 100
    save_checkpoint(tiny_run / "model.pt", checkpoint)
    assert "model.pt" in complaint(run("generate.py", "--out_dir", tiny_run, "--prompt", "\N{SNOWMAN}", "--device", "cpu"))


# ---------------------------------------------------------------------------- kill -9

FORKS = """
import importlib, json, os, signal, sys, time
sys.path[:0] = {path}
module = importlib.import_module(sys.argv[1])
exec(sys.argv[2], vars(module))
quiet = os.open(os.devnull, os.O_WRONLY)
print("ready", flush=True)
for line in sys.stdin:
    arguments, delay = json.loads(line)
    child = os.fork()
    if child == 0:
        sys.argv = [sys.argv[1] + ".py", *arguments]
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        try:
            module.main()
        finally:
            os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Victim:
    """A script that starts at once, again and again, to be killed: a process that has loaded its libraries forks for each start."""

    def __init__(self, module, patch=""):
        program = FORKS.format(path=[str(ROOT), str(ROOT / "data")])
        self.process = subprocess.Popen([sys.executable, "-c", program, module, patch], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)
        assert self.process.stdout.readline() == "ready\n"
        self.kills, self.ended = 0, 0

    def run(self, *arguments, kill_after=None):
        """Runs the script to its end, or kills it so many seconds after its start. Returns how long it took."""
        begin = time.monotonic()
        self.process.stdin.write(json.dumps([list(map(str, arguments)), kill_after]) + "\n")
        self.process.stdin.flush()
        killed = int(self.process.stdout.readline()) == signal.SIGKILL
        self.kills, self.ended = self.kills + killed, self.ended + (kill_after is not None and not killed)
        return time.monotonic() - begin

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()


def report(what, victim, seen):
    print(f"\nkill -9, {what}: {victim.kills} in mid-work (and {victim.ended} ended before); found: {dict(seen)}")


@attack
def test_kill_training_a_tokenizer(tiny_text, tmp_path):
    """Two texts in turn: after each kill there is one tokenizer or the other, whole, and the next training works."""
    other, folder, chance, seen = tmp_path / "other.txt", tmp_path / "run", random.Random(1), Counter()
    other.write_text(tiny_text.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    flags = {text: ["train", "--vocab_size", 400, "--out_dir", folder, "--data_path", text] for text in (tiny_text, other)}
    with Victim("tokenizer") as victim:
        spans, known = [], {}
        for text in tiny_text, other:
            spans.append(victim.run(*flags[text]))
            known[BasicTokenizer(out_dir=folder).fingerprint] = text.name
        assert len(known) == 2
        for text in itertools.cycle(flags):
            victim.run(*flags[text], kill_after=chance.uniform(0.2, 1.4) * min(spans))
            seen[known[BasicTokenizer(out_dir=folder).fingerprint]] += 1
            assert {path.name for path in folder.iterdir()} <= {"merges.pkl", "vocab.pkl", ".merges.pkl.new", "..merges.pkl.new.tmp",
                                                                ".vocab.pkl.tmp"}
            if victim.kills == 30:
                break
        victim.run(*flags[other])
    report("training a tokenizer", victim, seen)
    assert set(contents(folder)) == {Path("merges.pkl"), Path("vocab.pkl")} and len(seen) == 2


@attack
def test_kill_training(tiny_text, tmp_path):
    """A run that saves at every iteration: whatever the instant, all is whole, --resume goes on, and no iteration is lost twice."""
    folder, chance, seen, reached = tmp_path / "run", random.Random(2), Counter(), -1
    flags = [*TINY, "--data_path", tiny_text, "--out_dir", folder, "--eval_interval", 1, "--max_iters", 10**6]
    with Victim("train", "import torch._dynamo") as victim:  # which the optimizer asks for, and which loads slowly
        while victim.kills < 40:
            resumes = any((folder / name).exists() for name in ("last.pt", "last.pt.new", "last.pt.old"))
            victim.run(*(["--resume", "--out_dir", folder] if resumes else flags), kill_after=chance.uniform(0, 0.8))
            assert victim.ended == 0, "it ended by itself"
            try:
                last = train.load_last(folder)
            except ValueError as error:
                assert "nothing to resume" in str(error) and reached == -1
                seen["nothing yet"] += 1
                continue
            assert last["iteration"] >= reached
            seen["went on" if last["iteration"] > reached else "as before"] += 1
            reached = last["iteration"]
            fingerprint = BasicTokenizer(out_dir=folder).fingerprint
            assert load_model(folder / "model.pt", fingerprint)[1]["iteration"] <= reached + 1
            assert plots.read_metrics(folder / "metrics.csv")["iteration"][-1] >= reached
            if (folder / "histograms.npz").exists():
                plots.read_histograms(folder / "histograms.npz", n_layer=2)
    report("saving checkpoints", victim, seen)
    assert run("train.py", "--resume", "--out_dir", folder, "--max_iters", reached + 3).returncode == 0
    assert set(map(str, contents(folder))) == {"merges.pkl", "vocab.pkl", "model.pt", "last.pt", "last.pt.old", "metrics.csv", "histograms.npz",
                                               ".lock"}
    assert seen["went on"] > 10


@attack
def test_kill_quantizing(tiny_run, tiny_text):
    """Two networks in turn: the int8 file is that of one or the other, whole."""
    chance, seen, out = random.Random(3), Counter(), tiny_run / "model_int8.pt"
    other = load_checkpoint(tiny_run / "model.pt") | {"iteration": 999}
    save_checkpoint(tiny_run / "other.pt", other)
    flags = [["--out_dir", tiny_run, "--data_path", tiny_text, "--checkpoint", tiny_run / name] for name in ("model.pt", "other.pt")]
    before, fingerprint = set(contents(tiny_run)), BasicTokenizer(out_dir=tiny_run).fingerprint
    with Victim("quantize", "import torch.ao.quantization") as victim:
        victim.run(*flags[0])
        begin, clock = out.stat().st_mtime_ns, time.monotonic()
        thread = threading.Thread(target=victim.run, args=flags[1], kwargs={"kill_after": 10})
        thread.start()
        while out.stat().st_mtime_ns == begin:
            assert thread.is_alive(), "it ended too soon"
            time.sleep(0.002)
        span = time.monotonic() - clock  # from the start to the file
        thread.join()
        victim.kills = victim.ended = 0
        for command in itertools.cycle(flags):
            victim.run(*command, kill_after=chance.uniform(0, 1.3 * span))
            seen[load_model(out, fingerprint)[1]["iteration"]] += 1
            if victim.kills == 30:
                break
        victim.run(*flags[0])
    report("quantizing", victim, seen)
    assert set(contents(tiny_run)) == before | {Path("model_int8.pt")} and len(seen) == 2


@attack
def test_kill_plotting(tiny_run):
    """Two runs' figures in turn: every picture is that of one or the other, byte for byte."""
    chance, seen, whole = random.Random(4), Counter(), {}
    table = (tiny_run / "metrics.csv").read_text()
    tables = [table, table.replace("e-05", "e-04").replace("0.003", "0.005")]
    with Victim("plots") as victim:
        for number, figures in enumerate(tables):
            (tiny_run / "metrics.csv").write_text(figures)
            span = victim.run("--out_dir", tiny_run)
            for path in tiny_run.glob("*.png"):
                whole.setdefault(path.name, {})[path.read_bytes()] = number
        assert len(whole) == 4 and len(whole["loss.png"]) == 2
        for figures in itertools.cycle(tables):
            (tiny_run / "metrics.csv").write_text(figures)
            victim.run("--out_dir", tiny_run, kill_after=chance.uniform(0, 1.1 * span))
            for path in tiny_run.glob("*.png"):
                seen[whole[path.name][path.read_bytes()]] += 1
            assert len(list(tiny_run.glob(".*.png.tmp"))) <= 4
            if victim.kills == 25:
                break
        victim.run("--out_dir", tiny_run)
    report("plotting", victim, seen)
    assert not list(tiny_run.glob(".*.tmp")) and len(seen) == 2


@attack
def test_kill_downloading(tmp_path, monkeypatch):
    from test_prepare import TEXT, Server, constants
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server, chance, seen = Server(), random.Random(5), Counter()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    patch = f"from pathlib import PosixPath, WindowsPath\nglobals().update({constants(server, tmp_path)!r})"
    with Victim("prepare", patch) as victim:
        span = victim.run()
        assert (tmp_path / "input.txt").read_bytes() == TEXT
        while victim.kills < 30:
            (tmp_path / "input.txt").unlink(missing_ok=True)
            victim.run(kill_after=chance.uniform(0, 1.1 * span))
            assert {path.name for path in tmp_path.iterdir()} <= {"input.txt", ".input.txt.tmp"}
            whole = (tmp_path / "input.txt").exists()
            assert not whole or (tmp_path / "input.txt").read_bytes() == TEXT
            seen["whole" if whole else "absent"] += 1
        (tmp_path / "input.txt").unlink(missing_ok=True)
        victim.run()
    server.shutdown()
    report("downloading", victim, seen)
    assert contents(tmp_path) == {Path("input.txt"): TEXT}


# ---------------------------------------------------------------------------- files: mutated


def mutate(data, others, chance):
    """A file that is no longer what was written: bits flipped, cut, spliced with another, doubled, blanked or with bytes in or out."""
    data, at = bytearray(data), chance.randrange(1, len(data))
    how = chance.choice(["flip", "flip", "truncate", "splice", "double", "blank", "insert", "remove"])
    length = min(len(data) - at, chance.choice([1, 2, 8, 64, 4096]))
    if how == "flip":
        for _ in range(chance.choice([1, 1, 1, 2, 5, 30])):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif how == "truncate":
        del data[at - 1:]
    elif how == "splice":
        data[at:] = (other := chance.choice(others))[chance.choice([at, 0, chance.randrange(len(other))]):]
    elif how == "double":
        data[at:at] = data[at:at + length]
    elif how == "blank":
        data[at:at + length] = bytes(length)
    elif how == "insert":
        data[at:at] = chance.randbytes(length)
    else:
        del data[at:at + length]
    return bytes(data)


def read_as_written(path):
    """The columns of metrics.csv by the library's own reader, for comparison."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        return {name: column for name, *column in zip(*csv.reader(file))}


def state_of(network, rest):
    """All that a loaded network computes from: weights, int8 ones unpacked."""
    packed = [torch.ops.quantized.linear_unpack(layer.packed)[0].int_repr() for layer in network.modules()
              if isinstance(layer, model.Int8Linear)]
    return [dict(network.state_dict()), packed, rest]


def loaders(folder):
    """{file: how it is loaded from a folder, to something that can be compared}"""
    def pair():
        loaded = BasicTokenizer(out_dir=folder)
        return [list(loaded.merges.items()), loaded.vocab]

    fingerprint = BasicTokenizer(out_dir=folder).fingerprint
    return {"merges.pkl": pair, "vocab.pkl": pair,
            "model.pt": lambda: state_of(*load_model(folder / "model.pt", fingerprint, 300)),
            "model_int8.pt": lambda: state_of(*load_model(folder / "model_int8.pt", fingerprint, 300)),
            "last.pt": lambda: train.load_last(folder),
            "metrics.csv": lambda: {k: torch.from_numpy(v) for k, v in plots.read_metrics(folder / "metrics.csv").items()},
            "histograms.npz": lambda: {k: torch.as_tensor(v) for k, v in plots.read_histograms(folder / "histograms.npz", n_layer=2).items()}}


@pytest.fixture(scope="session")
def quantized_run(finished_run, tiny_text, tmp_path_factory):
    """A copy of the finished run with model_int8.pt, and without last.pt.old, which would hide a damaged last.pt."""
    folder = shutil.copytree(finished_run, tmp_path_factory.mktemp("quantized") / "run")
    assert run("quantize.py", "--out_dir", folder, "--data_path", tiny_text).returncode == 0
    (folder / "last.pt.old").unlink()
    return folder


def attack_files(source, folder, count, seed):
    """Loads `count` mutated files, of each kind in turn, and fails at any that is neither truth nor refusal.

    Returns {file: Counter of outcomes}.
    """
    shutil.copytree(source, folder)
    chance, load = random.Random(seed), loaders(folder)
    original = {name: (folder / name).read_bytes() for name in load}
    truth, outcomes = {name: load[name]() for name in load}, {name: Counter() for name in load}
    assert all(same(load[name](), truth[name]) for name in load)
    for name in itertools.islice(itertools.cycle(load), count):
        while (data := mutate(original[name], list(original.values()), chance)) in original.values():
            pass  # spliced where two files are equal up to there: a whole one
        (folder / name).write_bytes(data)
        try:
            found = load[name]()
        except (ValueError, OSError) as error:
            assert str(folder / name) in str(error) and "\n" not in str(error), error
            outcomes[name]["refused"] += 1
        else:
            if same(found, truth[name]):
                outcomes[name]["the truth"] += 1
            else:  # a table of plain text has no checksum: what it says is what it says
                assert name == "metrics.csv", f"{name}: another than the truth, in silence"
                said = read_as_written(folder / name)
                for column in plots.KNOWN_COLUMNS + plots.LOSS_COLUMNS:
                    assert np.array_equal(found[column].numpy(), [plots.parse_number(field, "") for field in said[column]], equal_nan=True)
                outcomes[name]["other figures, as the text has them"] += 1
        (folder / name).write_bytes(original[name])
    return outcomes


def print_outcomes(title, outcomes):
    print(f"\n{title}")
    for name, counts in outcomes.items():
        print(f"  {name:15} {sum(counts.values()):6}: " + ", ".join(f"{count} {what}" for what, count in sorted(counts.items())))


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in a damaged pickle
def test_700_mutated_files_are_the_truth_or_refused(quantized_run, tmp_path):
    outcomes = attack_files(quantized_run, tmp_path / "run", 700, seed=0)
    assert all(sum(counts.values()) == 100 and counts["refused"] > 30 for counts in outcomes.values())


@attack
@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in a damaged pickle
def test_10_500_mutated_files_are_the_truth_or_refused(quantized_run, tmp_path):
    outcomes = attack_files(quantized_run, tmp_path / "run", 10_500, seed=1)
    print_outcomes("mutated files", outcomes)
    assert sum(sum(counts.values()) for counts in outcomes.values()) == 10_500
    assert all(sum(counts.values()) == 1500 and counts["refused"] > 500 for counts in outcomes.values())


# ---------------------------------------------------------------------------- files: made by someone who knows the format


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


CODE = Call(os.mkdir, "code_ran")
NO_TENSORS = [None, 0, -1, "x", [], {}, 1.5, [1, [2]], CODE, torch.ones(2, 2)]


def with_entry(checkpoint, path, value):
    """A copy of nested dicts in which the entry at the end of a path of keys is another, or gone."""
    changed = copy.copy(checkpoint)
    key, *rest = path
    if rest:
        changed[key] = with_entry(changed[key], rest, value)
    elif value is KeyError:
        del changed[key]
    else:
        changed[key] = value
    return changed


def tamper(checkpoint, chance):
    """Checkpoints one entry of which is missing or something else, with right checksums: (what, checkpoint)."""
    for key, value in checkpoint.items():
        for other in [*NO_TENSORS, KeyError]:
            yield f"{key} {other!r:.20}", with_entry(checkpoint, [key], other)
    for key in checkpoint["config"]:
        for other in [*NO_TENSORS, KeyError, 10**12, 2**80, math.nan, True]:
            yield f"config {key} {other!r:.20}", with_entry(checkpoint, ["config", key], other)
    for key, weight in checkpoint["model"].items():
        odd = weight.float().flatten().clone()
        odd[chance.randrange(len(odd))] = chance.choice([math.nan, math.inf, -math.inf])
        for other in [*NO_TENSORS, KeyError, weight[:-1].clone(), weight.flatten()[0].clone(), weight[None].clone(), weight.double(),
                      weight.long(), odd.view(weight.shape), torch.zeros(0), torch.zeros(()), weight.to_sparse(), weight.float().bfloat16()]:
            yield f"weight {key}", with_entry(checkpoint, ["model", key], other)
    yield "a weight too many", with_entry(checkpoint, ["model", "extra.weight"], torch.ones(3))


@attack
@pytest.mark.parametrize("name", ["model.pt", "model_int8.pt"])
def test_checkpoints_tampered_with_are_refused(quantized_run, tmp_path, monkeypatch, name):
    """What loads has the truth's weights, or at least a network's: an entry that is as good as the true one is no damage."""
    monkeypatch.chdir(tmp_path)
    tokens, path, counts = BasicTokenizer(out_dir=quantized_run), tmp_path / name, Counter()
    checkpoint = load_checkpoint(quantized_run / name)
    weights = state_of(*load_model(quantized_run / name))[:2]
    for what, changed in tamper(checkpoint, random.Random(6)):
        torch.save(changed, path)
        try:
            network, rest = load_model(path, tokens.fingerprint, tokens.vocab_size)
        except (ValueError, OSError) as error:
            assert str(path) in str(error) and "\n" not in str(error), what
            counts["refused"] += 1
        else:
            assert same(state_of(network, rest)[:2], weights), what
            assert {type(rest["iteration"]), type(rest["val_loss"])} == {int, float}, what
            counts["loaded, with the true weights"] += 1
    print_outcomes("entries replaced, checksums right", {name: counts})
    assert counts["refused"] > 300 and not (tmp_path / "code_ran").exists()


def resume(folder, iterations, monkeypatch):
    """train.py --resume in this process: what it would do, without its signals."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--out_dir", str(folder), "--max_iters", str(iterations)])
    monkeypatch.setattr(train, "Stop", lambda: argparse.Namespace(requested=False))
    trainer = train.Trainer(*train.parse_args())
    try:
        trainer.run()
    finally:
        trainer.held.close()
    return trainer


@attack
def test_a_training_state_tampered_with_resumes_or_is_refused(quantized_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder, counts, chance = shutil.copytree(quantized_run, tmp_path / "run"), Counter(), random.Random(7)
    last = load_checkpoint(folder / "last.pt")
    moments = last["optimizers"][0]["state"]
    cases = [case for case in tamper(last, chance)]
    for flag in last["args"]:
        cases += [(f"flag {flag} {other!r:.20}", with_entry(last, ["args", flag], other)) for other in [*NO_TENSORS, KeyError, 10**12]]
    for entry in moments[0]:
        for other in [*NO_TENSORS, KeyError, moments[0][entry][:3].clone() if moments[0][entry].dim() else torch.ones(5)]:
            state = with_entry(last["optimizers"][0], ["state", 0, entry], other)
            cases.append((f"moment {entry}", with_entry(last, ["optimizers"], [state])))
    for other in NO_TENSORS:
        cases.append(("an optimizer", with_entry(last, ["optimizers"], [other])))
        cases.append(("a column of metrics", with_entry(last, ["columns"], [*last["columns"][:-1], other])))
    for what, changed in chance.sample(cases, 600):
        for name in "last.pt", "last.pt.old", "last.pt.new":
            (folder / name).unlink(missing_ok=True)
        torch.save(changed, folder / "last.pt")
        try:
            resume(folder, 62, monkeypatch)
            counts["resumed"] += 1
        except SystemExit as usage:
            assert usage.code == 2 and "error: " in capsys.readouterr().err.splitlines()[-1], what
            counts["refused, as a flag"] += 1
        except (ValueError, OSError) as error:
            assert str(folder) in str(error) or "--" in str(error), (what, error)
            counts["refused"] += 1
        except Exception as error:
            if "can't allocate memory" not in str(error):  # train.py makes a line of that
                raise AssertionError(f"{what}: {error!r}") from error
            counts["refused, as more than the memory"] += 1
    with capsys.disabled():
        print_outcomes("entries replaced, checksums right", {"last.pt": counts})
    assert sum(counts.values()) == 600 and counts["refused"] > 300 and not (tmp_path / "code_ran").exists()


def zipped(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "."), data)


def replaced_pickle(path, data):
    """A checkpoint with another pickle in it, of the given bytes."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, old in entries.items():
            archive.writestr(name, data if name.endswith("data.pkl") else old)


def absurd(checkpoint, int8, last):
    """{what: (file, how to write it)}: small files from which gigabytes could be made, and files that are gigabytes themselves."""
    def changed(source, *path, value):
        return lambda target: torch.save(with_entry(source, path, value), target)

    def config(**entries):
        return changed(checkpoint, "config", value=checkpoint["config"] | entries)

    def sparse(target):
        target.touch()
        os.truncate(target, 10**10)

    huge = 5 * 10**7  # rows of 16 zeros, all of them the same: no bytes in the file, 3.2 GB if they were laid out
    many = with_entry(checkpoint, ["config", "vocab_size"], huge)
    many = with_entry(many, ["model", "token_embedding.weight"], torch.zeros(1, 1).expand(huge, 16))
    spread = with_entry(with_entry(int8, ["model", "token_embedding.weight"], torch.zeros(1, 1, dtype=torch.int8).expand(huge, 16)),
                        ["config", "vocab_size"], huge)
    wide = with_entry(int8, ["model", "token_embedding.scale"], torch.zeros(10**6))
    moments = last["optimizers"][0]
    moments = with_entry(moments, ["state", 0, "exp_avg"], torch.zeros(1, 1, dtype=torch.int8).expand(huge, 16))
    numbers = b"J\xff\xff\xff\x7f" * 12_000_000
    triples = b"".join(b"J" + struct.pack("<i", i + 10**6) + b"J" + struct.pack("<i", i + 10**7) + b"\x86" + b"J" + struct.pack("<i", i + 256)
                       for i in range(4_000_000))
    shape = b"{'descr': '<f8', 'fortran_order': False, 'shape': (2, 1000000000)}"
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + shape.ljust(117) + b"\n"
    cases = {
        "an unknown call: bytearray": ("model.pt", changed(checkpoint, "x", value=Call(bytearray, 10**9))),
        "bytearray to resume from": ("last.pt", changed(last, "x", value=Call(bytearray, 10**9))),
        "code": ("model.pt", changed(checkpoint, "x", value=CODE)), "code to resume from": ("last.pt", changed(last, "x", value=CODE)),
        "16 MB of lists": ("model.pt", lambda target: replaced_pickle(target, b"\x80\x02(" + b"]" * (2**24 - 10) + b"l.")),
        "60 MB of dicts": ("last.pt", lambda target: replaced_pickle(target, b"\x80\x02(" + b"}" * 60_000_000 + b"l.")),
        "a vocabulary of no bytes": ("model.pt", lambda target: torch.save(many, target)),
        "an int8 vocabulary of no bytes": ("model_int8.pt", lambda target: torch.save(spread, target)),
        "scales for other rows": ("model_int8.pt", lambda target: torch.save(wide, target)),
        "moments of no bytes": ("last.pt", changed(last, "optimizers", value=[moments])),
        "20,000 layers": ("model.pt", config(n_layer=20_000)), "10^12 channels": ("model.pt", config(n_embd=10**12)),
        "10^12 tokens": ("model.pt", config(vocab_size=10**12)), "10^9 heads": ("model.pt", config(n_head=10**9, n_embd=10**9)),
        "a context of 10^12": ("model.pt", config(block_size=10**12)),
        "zip bomb": ("model.pt", lambda target: zipped(target, archive___data__pkl=bytes(10**9))),
        "60 MB of numbers": ("merges.pkl", lambda target: target.write_bytes(b"\x80\x04}(" + numbers + b"u.")),
        "60 MB of pairs": ("merges.pkl", lambda target: target.write_bytes(b"\x80\x04}(" + triples + b"u.")),
        "60 MB of numbers as spellings": ("vocab.pkl", lambda target: target.write_bytes(b"\x80\x04}(" + numbers + b"u.")),
        "tokens that double": ("merges.pkl", lambda target: target.write_bytes(pickle.dumps(
            {(max(new - 1, 97) if new > 256 else 97,) * 2: new for new in range(256, 456)}))),
        "16 MB of line ends": ("metrics.csv", lambda target: target.write_bytes(b"\n" * (2**24 - 1))),
        "16 MB of commas": ("metrics.csv", lambda target: target.write_bytes(b"," * (2**24 - 9) + b"\n1\n")),
        "a million layers": ("metrics.csv", lambda target: target.write_bytes(b"relu_zeros," * 1_400_000 + b"\n1\n")),
        "bombs in the figures": ("histograms.npz", lambda target: zipped(target, relu_counts__npy=bytes(10**9))),
        "figures that claim 16 GB": ("histograms.npz", lambda target: zipped(
            target, iteration__npy=header, relu_counts__npy=header + bytes(999), relu_edges__npy=header, relu_grad_counts__npy=header,
            relu_grad_edges__npy=header)),
    }
    return cases | {f"10 GB of zeros as {name}": (name, sparse) for name in
                    ("model.pt", "last.pt", "merges.pkl", "vocab.pkl", "metrics.csv", "histograms.npz")}


MEASURE = """
import os, resource, signal, sys
from pathlib import Path
sys.path[:0] = {path}
import model, plots, tokenizer, train
from test_attacks import loaders
whole = Path(sys.argv[1])
for load in loaders(whole).values():
    load()  # the true ones, so that all libraries are there
import torch._dynamo  # which the optimizer asks for
tokens = tokenizer.BasicTokenizer(out_dir=whole)

def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def load(folder, name):
    if name == "last.pt":
        sys.argv = ["train.py", "--resume", "--out_dir", str(folder), "--max_iters", "61"]
        train.Trainer(*train.parse_args()).run()
    elif name.endswith(".pt"):
        model.load_model(folder / name, tokens.fingerprint, tokens.vocab_size)
    elif name.endswith(".pkl"):
        tokenizer.BasicTokenizer(out_dir=folder)
    elif name.endswith(".csv"):
        plots.read_metrics(folder / name)
    else:
        plots.read_histograms(folder / name, 2)

print("ready", flush=True)
for line in sys.stdin:
    path = Path(line.rstrip())
    if os.fork() == 0:
        signal.alarm(100)
        before, message = memory(), "LOADED"
        try:
            load(path.parent, path.name)
        except (ValueError, OSError) as error:
            message = str(error)
        print("RESULT", memory() - before, message, flush=True)
        os._exit(0)
    if os.wait()[1]:
        print("RESULT 0 CRASHED OR TIMED OUT", flush=True)
"""


@attack
def test_absurd_files_take_no_gigabytes(quantized_run, tmp_path):
    """Each in a process of its own, as the peak of memory never falls; it may grow by 300 MB, which a vocabulary of a million takes."""
    peaks, program = {}, MEASURE.format(path=[str(ROOT), str(ROOT / "tests")])
    process = subprocess.Popen([sys.executable, "-c", program, quantized_run], cwd=tmp_path, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    while process.stdout.readline() not in ("ready\n", ""):
        pass
    cases = absurd(*(load_checkpoint(quantized_run / name) for name in ("model.pt", "model_int8.pt", "last.pt")))
    for number, (what, (name, write)) in enumerate(cases.items()):
        folder = shutil.copytree(quantized_run, tmp_path / str(number))
        (folder / name).unlink()
        write(folder / name)
        process.stdin.write(f"{folder / name}\n")
        process.stdin.flush()
        while not (line := process.stdout.readline()).startswith("RESULT "):
            assert line, f"{what}: the process ended"
        peaks[what], message = int(line.split()[1]), line.split(maxsplit=2)[2]
        assert str(folder / name) in message, f"{what}: {message}"
        shutil.rmtree(folder)
    process.stdin.close()
    process.wait()
    worst = max(peaks, key=peaks.get)
    print(f"\nabsurd files: {len(peaks)} refused; memory grew by at most {peaks[worst] / 1e6:.0f} MB ({worst})")
    assert peaks[worst] < 300e6, sorted((peak, what) for what, peak in peaks.items())[-6:]
    assert not (tmp_path / "code_ran").exists()


# ---------------------------------------------------------------------------- disk

DISK = {"train.py": lambda out, text, run: [*TINY, "--data_path", text, "--out_dir", out, "--max_iters", "2"],
        "tokenizer.py": lambda out, text, run: ["train", "--data_path", text, "--out_dir", out, "--vocab_size", "300"],
        "quantize.py": lambda out, text, run: ["--data_path", text, "--out_dir", run, "--out", out / "int8.pt"],
        "generate.py": lambda out, text, run: ["--out_dir", run, "--max_new_tokens", "3000", "--device", "cpu", "--out", out / "text.txt"],
        "plots.py": lambda out, text, run: ["--out_dir", out]}


@pytest.fixture(params=DISK)
def disk(request, finished_run, tiny_text):
    """A script, and how it is told to write into a folder."""
    return request.param, lambda out: DISK[request.param](out, tiny_text, finished_run)


def failure(process):
    """The one line of a failed script; before it, generate.py may have said what it samples from."""
    first, _, rest = process.stderr.partition("\n")
    if first.startswith("using "):
        process.stderr = rest
    return complaint(process)


def no_file_beyond(size):
    return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}


@attack
@pytest.mark.parametrize("size", [100, 1500])
def test_a_full_disk_is_one_line_and_changes_no_file(disk, tiny_run, size):
    script, flags = disk
    if script == "tokenizer.py":
        for path in tiny_run.glob("*.pt*"):
            path.unlink()
    before = contents(tiny_run)
    process = run(script, *flags(tiny_run) + (["--vocab_size", "310"] if script == "tokenizer.py" else []), **no_file_beyond(size))
    line = failure(process)
    assert "cannot write" in line and str(tiny_run) in line
    after = contents(tiny_run)
    assert {path: after[path] for path in before} == before
    assert {path.name for path in after.keys() - before} <= {"merges.pkl", ".merges.pkl.new"}, "whole ones, which the next run replaces"
    assert BasicTokenizer(out_dir=tiny_run).vocab_size == 300


@pytest.fixture
def sealed(tmp_path):
    """A folder into which nobody can write, not even root, whom permissions do not stop."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        if not Path("/proc/self").is_dir():
            pytest.skip("root may write into every folder here")
        yield Path("/proc/self")
    else:
        (tmp_path / "sealed").mkdir(mode=0o555)
        yield tmp_path / "sealed"


@attack
def test_a_folder_nobody_can_write_into_is_one_line(disk, sealed):
    script, flags = disk
    line = failure(run(script, *flags(sealed / "run" if script != "plots.py" else sealed)))
    assert str(sealed) in line


@attack
@pytest.mark.parametrize("script, name, flags", [
    ("train.py", "merges.pkl", []), ("train.py", "metrics.csv", []), ("train.py", "histograms.npz", []), ("train.py", ".lock", []),
    ("train.py", ".metrics.csv.tmp", []),
    ("quantize.py", "model_int8.pt", []), ("quantize.py", "model.pt", []), ("quantize.py", "vocab.pkl", []),
    ("generate.py", "model.pt", []), ("generate.py", "merges.pkl", []), ("generate.py", "text.txt", ["--out"]),
    ("generate.py", "prompt.txt", ["--prompt_file"]), ("tokenizer.py", "vocab.pkl", ["--vocab_size", "310"]),
    ("tokenizer.py", "merges.pkl", []), ("plots.py", "metrics.csv", []), ("plots.py", "histograms.npz", []), ("plots.py", "loss.png", []),
    ("plots.py", ".relu_outputs.png.tmp", [])])
def test_a_folder_in_the_place_of_a_file_is_one_line(tiny_run, tiny_text, script, name, flags):
    if script == "tokenizer.py" or name in ("metrics.csv", "histograms.npz", ".metrics.csv.tmp") and script == "train.py":
        for path in tiny_run.glob("*.pt*"):  # else the one is refused, and the other moves the earlier run aside
            path.unlink()
    if (tiny_run / name).exists():
        (tiny_run / name).unlink()
    (tiny_run / name).mkdir()
    before = contents(tiny_run)
    flags = [*flags, tiny_run / name] if flags in (["--out"], ["--prompt_file"]) else flags
    text = ["--data_path", tiny_text]
    common = {"train.py": [*TINY, *text, "--max_iters", "2"], "quantize.py": text, "tokenizer.py": ["train", *text, "--vocab_size", "300"]}
    line = failure(run(script, *common.get(script, []), "--out_dir", tiny_run, *flags))
    assert str(tiny_run / name.removeprefix(".").removesuffix(".tmp")) in line or name == ".lock" and str(tiny_run) in line
    after = contents(tiny_run)
    assert all(after[path] == data for path, data in before.items() if path.suffix == ".pt")
    assert not [path for path in tiny_run.glob("*.tmp") if path.is_file()]


@attack
def test_a_sampling_whose_folder_vanishes_is_one_line(tiny_run, tmp_path):
    command = [sys.executable, ROOT / "generate.py", "--out_dir", tiny_run, "--max_new_tokens", "5000", "--out", tmp_path / "out" / "text.txt"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for((tmp_path / "out" / ".text.txt.tmp").exists, process)
    shutil.rmtree(tmp_path / "out")
    err = process.communicate(timeout=120)[1].splitlines()
    assert process.returncode == 1 and err[-1].startswith("generate.py: cannot write") and str(tmp_path / "out") in err[-1]


# ---------------------------------------------------------------------------- input


def random_text(chance):
    """Characters of all of Unicode, surrogates that stand for bytes, and NUL."""
    draw = [lambda: chr(chance.randrange(128)), lambda: chr(chance.randrange(0xD800)), lambda: chr(chance.randrange(0xE000, 0x110000)),
            lambda: chr(chance.randrange(0xDC80, 0xDD00)), lambda: chance.choice("\0\r\n\ufeff\u200d\u0301\U0001F600")]
    return "".join(chance.choice(draw)() for _ in range(chance.randrange(40)))


@attack
def test_3000_random_texts_come_back_byte_for_byte(quantized_run):
    chance, tokens = random.Random(8), BasicTokenizer(out_dir=quantized_run)
    network, _ = load_model(quantized_run / "model.pt", tokens.fingerprint)
    for number in range(3000):
        text = random_text(chance)
        ids = tokens.encode_array(text).tolist()
        assert tokens.decode_bytes(ids) == text.encode("utf-8", "surrogateescape")
        if ids and number % 10 == 0:
            out = io.BytesIO()
            assert generate.write_stream(network.stream(torch.tensor([ids]), 5, seed=number), tokens, ids, out) == 5
            assert out.getvalue().decode("utf-8").startswith(tokens.decode(ids).rstrip("\ufffd"))
    tokens.encode_array("\ud800 and \udfff alone")
    print("\nrandom texts: 3,000 encoded, decoded and, every tenth, continued")


@attack
@pytest.mark.parametrize("content", [
    b"NUL \0 and \0\0", b"\xef\xbb\xbfBOM\r\nCRLF\r\n", "Latin-1: caf\xe9".encode("latin-1"), "UTF-16".encode("utf-16"), b"\xff" * 100,
    b"10 MB \xf0\x9f\x98\x80\n" * 870_000], ids=["NUL", "BOM", "Latin-1", "UTF-16", "0xFF", "10 MB"])
def test_prompt_files_of_any_bytes_are_continued(finished_run, tmp_path, content):
    (tmp_path / "prompt").write_bytes(content)
    command = [sys.executable, ROOT / "generate.py", "--out_dir", finished_run, "--max_new_tokens", "5", "--device", "cpu"]
    process = subprocess.run([*command, "--prompt_file", tmp_path / "prompt"], capture_output=True, timeout=120)
    assert process.returncode == 0 and process.stdout.startswith(content.decode(errors="replace").rstrip("\ufffd").encode())
    assert b"5 tokens in" in process.stderr and b"Traceback" not in process.stderr


@attack
@pytest.mark.parametrize("change, message", [
    (lambda text: b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"), None), (lambda text: text.replace(b"\n", b"\0"), "binary"),
    (lambda text: text.decode().encode("utf-16"), "is UTF-16, not UTF-8"),
    (lambda text: text.decode().encode("utf-16-be"), "is UTF-16, not UTF-8"),
    (lambda text: text.decode().replace("\u2014", "-").encode("latin-1"), "Latin-1"), (lambda text: b"x", "too short"),
    (lambda text: text[:200], "too short"), (lambda text: b"a" * 300, "vocab_size can be"), (lambda text: text[:-1] + b"\xc3", "not UTF-8")],
    ids=["BOM and CRLF", "NUL", "UTF-16", "UTF-16-BE", "Latin-1", "one character", "short", "one letter", "cut in a character"])
def test_texts_of_every_kind_are_trained_on_or_named(tiny_text, tmp_path, change, message):
    (tmp_path / "text.txt").write_bytes(change(tiny_text.read_bytes()))
    process = run("train.py", *TINY, "--data_path", tmp_path / "text.txt", "--out_dir", tmp_path / "run", "--max_iters", 1)
    if message is None:
        assert process.returncode == 0 and b"\r\n" in BasicTokenizer(out_dir=tmp_path / "run").decode_bytes(range(300)), process.stderr
    else:
        line = complaint(process)
        assert message in line and ("text.txt" in line or "--" in line or "vocab_size" in line)
        assert not (tmp_path / "run" / "model.pt").exists()


# ---------------------------------------------------------------------------- flags

NONSENSE = ["", "x", "-", "1.2.3", "0x10", "\N{SNOWMAN}", "None", "1e"]
LARGEST, TOO_LARGE = str(2**63 - 1), str(2**63)
WHOLE, REAL = ["1.5", "nan", "inf", *NONSENSE], NONSENSE
FROM_1 = (["1", "2", str(10**30)], ["0", "-1", *WHOLE])  # whole numbers: values that pass, and that do not
FROM_0 = (["0", "1", str(10**30)], ["-1", *WHOLE])
SHARE = (["0", "0.5", "0.999999", "1e-300"], ["-0.1", "1", "1.5", "nan", "inf", "-inf", *REAL])
POSITIVE = (["0", "1e-300", "1e300"], ["-1e-300", "nan", "inf", *REAL])
ANY = ([*NONSENSE[1:2], "no/such/file"], [])
BOUNDS = {
    "train": {"data_path": ANY, "out_dir": ANY, "teacher": ([__file__], ["", "no/such/file"]), "device": ANY,
              "preset": (["reference", "fast"], ["", "slow"]),
              "dtype": (["auto", "float32", "bfloat16", "float16"], ["", "int8"]),
              "vocab_size": (["256", str(tokenizer.MAX_VOCAB)], ["255", str(tokenizer.MAX_VOCAB + 1), "-1", *WHOLE]),
              "n_layer": (["1", "1000"], ["0", "1001", str(10**30), *WHOLE]), "seed": (["0", LARGEST], ["-1", TOO_LARGE, *WHOLE]),
              "n_head": (["1", "232"], ["0", "233", *WHOLE]), "n_embd": (["6", LARGEST], ["0", "5", TOO_LARGE, *WHOLE])}
    | dict.fromkeys(["block_size", "batch_size", "max_iters", "eval_interval"], (["1", "2", LARGEST], ["0", "-1", TOO_LARGE, *WHOLE]))
    | dict.fromkeys(["gradient_accumulation_steps", "warmup_iters", "lr_decay_iters", "eval_iters"],
                    (["0", "1", LARGEST], ["-1", TOO_LARGE, *WHOLE]))
    | dict.fromkeys(["dropout", "attention_dropout", "bpe_dropout", "beta1", "beta2"], SHARE)
    | dict.fromkeys(["train_temperature", "teacher_temperature"], (["0.1", "1", "1e300"], ["0.09", "0", "-1", "nan", "inf", *REAL]))
    | dict.fromkeys(["learning_rate", "min_lr", "weight_decay", "muon_lr", "init_std", "grad_clip"], POSITIVE),
    "generate": {"prompt": ANY, "prompt_file": ANY, "out_dir": ANY, "checkpoint": ANY, "out": ANY, "device": ANY, "max_new_tokens": FROM_1,
                 "temperature": POSITIVE, "top_k": FROM_1, "seed": FROM_0,
                 "top_p": (["1e-300", "0.5", "1"], ["0", "1.000001", "-1", "nan", *REAL]),
                 "num_samples": (["1", "65536"], ["0", "65537", "-1", *WHOLE])},
    "quantize": dict.fromkeys(["out_dir", "checkpoint", "out", "data_path"], ANY),
    "plots": {"out_dir": ANY, "attention": ANY, "format": (["png", "svg"], ["gif", ""])},
    "tokenizer train": {"out_dir": ANY, "data_path": ANY,
                        "vocab_size": (["256", str(tokenizer.MAX_VOCAB)], ["255", str(tokenizer.MAX_VOCAB + 1), *WHOLE])},
    **{f"tokenizer {command}": {"out_dir": ANY} for command in ("encode", "decode", "show")},
    "tokenizer vocab": {"out_dir": ANY, "data_path": ANY},
    "bench tokenizer": {"data_path": ANY, "repeats": FROM_1, "megabytes": (["1", "1,10"], ["0", "1,,2", "1,-1", *WHOLE])},
    "bench train": {"repeats": FROM_1, "batch_size": FROM_1, "device": ANY, "nanogpt": ANY}, "bench sample": {"repeats": FROM_1, "device": ANY},
    "bench quantize": {"repeats": FROM_1, "out_dir": ANY, "data_path": ANY}, "bench loss": {"out_dir": ANY, "data_path": ANY},
}
SWITCHES = {"train": ["resume", "compile", "no-compile"], "tokenizer train": ["verbose"]}


@pytest.mark.parametrize("command", BOUNDS)
def test_every_flag_at_below_and_above_its_bounds(command, monkeypatch, capsys):
    name, *sub = command.split()
    parse = {"train": train, "generate": generate, "quantize": quantize, "plots": plots, "tokenizer": tokenizer, "bench": bench}[name]

    def given(*flags):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *sub, *flags])
        try:
            parse.parse_args()
        except SystemExit as end:
            out, err = capsys.readouterr()
            return end.code, out, err.splitlines()
        return None

    shown = given("--help")[1]
    flags = {word.strip("[],") for word in shown.split() if word.strip("[]").startswith("--")} - {"--help", "--nproc_per_node"}
    flags = {flag for flag in flags if f"\n  {flag}" in shown or f", {flag}" in shown}
    assert flags == {f"--{flag}" for flag in [*BOUNDS[command], *SWITCHES.get(command, [])]}, "every flag is in the table"
    for flag, (good, bad) in BOUNDS[command].items():
        for value in good:
            assert given(f"--{flag}={value}") is None, f"--{flag} {value}"
        for value in bad:
            status, _, lines = given(f"--{flag}={value}")
            assert status == 2 and len([line for line in lines if not line.startswith(("usage:", " "))]) == 1, (flag, value, lines)
            assert f"--{flag}" in lines[-1], (flag, value, lines)
        assert given(f"--{flag}")[0] == 2  # without its value
    assert given("--nonsense")[0] == 2


@pytest.mark.parametrize("flags", [["--n_embd", str(10**9)], ["--batch_size", str(10**13)], ["--eval_iters", str(10**13)],
                                   ["--n_embd", str(10**18)]])
def test_more_than_the_memory_is_one_line(tiny_text, tmp_path, flags):
    assert "not enough memory" in complaint(run("train.py", *TINY, "--data_path", tiny_text, "--out_dir", tmp_path, "--max_iters", 1, *flags))


def test_more_samples_than_the_memory_holds_are_one_line():
    def with_8_gb():
        resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))

    process = run("generate.py", "--out_dir", tokenizer.PRETRAINED, "--device", "cpu", "--num_samples", 2**16, preexec_fn=with_8_gb)
    using, refused = process.stderr.splitlines()
    assert process.returncode == 1 and using.startswith("using ") and "not enough memory: use a smaller --num_samples" in refused


def test_a_network_that_cannot_be_compiled_is_one_line(tiny_text, tmp_path):
    script = f"""
import os, sys
sys.argv = ["train.py", *{TINY}, "--data_path", {str(tiny_text)!r}, "--out_dir", {str(tmp_path)!r}, "--max_iters", "1"]
sys.path.insert(0, {str(ROOT)!r})
import runpy, model
model.can_compile = lambda device: True
os.environ["CXX"] = "no-such-compiler"
os.environ["TORCHINDUCTOR_CACHE_DIR"] = {str(tmp_path / "cache")!r}
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert process.returncode == 1 and process.stderr.splitlines()[-1].startswith("train.py: torch.compile failed")


@attack
@pytest.mark.parametrize("flags", [["--top_k", "10000"], ["--top_k", "1"], ["--top_p", "1e-300"], ["--temperature", "1e-300"],
                                   ["--temperature", "1e300"], ["--seed", str(10**30)], ["--num_samples", "3", "--top_k", "301"]])
def test_extreme_flags_of_sampling_sample(finished_run, flags):
    process = run("generate.py", "--out_dir", finished_run, "--device", "cpu", "--max_new_tokens", 20, *flags)
    count = 60 if "--num_samples" in flags else 20
    assert process.returncode == 0 and f"\n{count} tokens in" in process.stderr, process.stderr


# ---------------------------------------------------------------------------- numbers


def trainer_of(folder, text, monkeypatch, *flags):
    """A new training in this process, without its signals."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*TINY, "--data_path", text, "--out_dir", folder, *flags])])
    monkeypatch.setattr(train, "Stop", lambda: argparse.Namespace(requested=False))
    return train.Trainer(*train.parse_args())


@pytest.mark.parametrize("muon_lr", [0, 0.02])  # with Muon there are two optimizers, and the gradients of one alone may overflow
def test_a_gradient_that_overflows_float16_is_skipped_and_the_scale_halved(tiny_text, tmp_path, monkeypatch, muon_lr):
    trainer = trainer_of(tmp_path, tiny_text, monkeypatch, "--dtype", "float16", "--learning_rate", "1e-3", "--muon_lr", muon_lr)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # far too large
    before, scale = [p.clone() for p in trainer.model.parameters()], 2.0**40
    skipped = 0
    for _ in range(60):
        assert math.isfinite(trainer.step().item())
        if trainer.scaler.get_scale() < scale:
            assert skipped or all(map(torch.equal, before, trainer.model.parameters()))
            skipped, scale = skipped + 1, trainer.scaler.get_scale()
    assert skipped > 5 and not all(map(torch.equal, before, trainer.model.parameters()))
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("scale", [1e-40, 0.0, 1e30])
def test_weights_at_the_ends_of_float32_are_kept_exactly_and_sampled_from(quantized_run, tmp_path, scale):
    checkpoint, tokens = load_checkpoint(quantized_run / "model.pt"), BasicTokenizer(out_dir=quantized_run)
    checkpoint["model"] = {name: weight * scale for name, weight in checkpoint["model"].items()}
    save_checkpoint(tmp_path / "model.pt", checkpoint)
    network, _ = load_model(tmp_path / "model.pt", tokens.fingerprint, tokens.vocab_size)
    assert same(dict(network.state_dict()), checkpoint["model"])
    if scale < 1:
        assert 0 <= network.generate(torch.tensor([[10]]), 30, seed=1).min() <= network.generate(torch.tensor([[10]]), 30, seed=1).max() < 300


# ---------------------------------------------------------------------------- side by side

SAVES = """
import itertools, sys
from pathlib import Path
sys.path[:0] = {path}
from model import load_checkpoint, save_checkpoint
from train import save_last
folder = Path(sys.argv[1])
two = [load_checkpoint(folder / name) for name in ("a.pt", "b.pt")]
for number, checkpoint in enumerate(itertools.cycle(two)):
    save_checkpoint(folder / "model.pt", checkpoint)
    save_last(folder, checkpoint)
    if number == 3:
        print("saving", flush=True)
"""


@attack
def test_1000_loads_while_checkpoints_are_saved(quantized_run, tmp_path):
    """Each sees one checkpoint or the other, whole."""
    folder, tokens = shutil.copytree(quantized_run, tmp_path / "run"), BasicTokenizer(out_dir=quantized_run)
    for name, shift in (("a.pt", 1), ("b.pt", 2)):
        checkpoint = load_checkpoint(folder / "last.pt") | {"iteration": shift}
        checkpoint["model"] = {key: torch.full_like(weight, shift) for key, weight in checkpoint["model"].items()}
        save_checkpoint(folder / name, checkpoint)
    process = subprocess.Popen([sys.executable, "-c", SAVES.format(path=[str(ROOT)]), folder], stdout=subprocess.PIPE)
    seen = Counter()
    try:
        process.stdout.readline()
        for number in range(1000):
            network, rest = load_model(folder / "model.pt", tokens.fingerprint, tokens.vocab_size)
            assert all((weight == rest["iteration"]).all() for weight in network.state_dict().values())
            seen["model.pt", rest["iteration"]] += 1
            if number % 4 == 0:
                last = train.load_last(folder)
                assert all((weight == last["iteration"]).all() for weight in last["model"].values())
                seen["last.pt", last["iteration"]] += 1
        assert process.poll() is None, "it saved to the end"
    finally:
        process.kill()
        process.wait()
    print(f"\nloads while another process saves: {dict(seen)}")
    assert len(seen) == 4 and sum(seen.values()) == 1250


@attack
def test_a_terminal_resized_again_and_again(tiny_text, tmp_path):
    """SIGWINCH, as a terminal sends it, up to 200 times while the progress bar is drawn."""
    import fcntl
    import pty
    import termios
    ours, theirs = pty.openpty()
    command = [sys.executable, ROOT / "train.py", *TINY, "--data_path", tiny_text, "--out_dir", tmp_path, "--max_iters", "600"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    drawn, chance, resized = b"", random.Random(9), 0
    while process.poll() is None:
        if select.select([ours], [], [], 0.02)[0]:
            with contextlib.suppress(OSError):  # the other end is closed
                drawn += os.read(ours, 65536)
        if drawn and resized < 200:
            fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", chance.randrange(50), chance.randrange(200), 0, 0))
            process.send_signal(signal.SIGWINCH)
            resized += 1
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "iteration 600" in out and resized > 20 and b"Traceback" not in drawn


def test_a_clock_that_jumps_by_years_is_not_looked_at(tiny_text, tmp_path, monkeypatch):
    chance = random.Random(10)
    monkeypatch.setattr(time, "time", lambda: chance.uniform(-1e9, 1e10))
    trainer = trainer_of(tmp_path, tiny_text, monkeypatch, "--max_iters", 6, "--eval_interval", 2)
    trainer.run()
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)  # one so coarse that it stands still
    assert trainer.tokens_per_second() >= 0
    assert all(0 <= row["seconds"] < 1e6 and 0 <= row["tokens_per_second"] < 1e9 for row in trainer.metrics)
    assert trainer.metrics[-1]["tokens_per_second"] > 0
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node) in ("time.time", "datetime.now", "time.time_ns")), path


# ---------------------------------------------------------------------------- memory


def resident(pid):
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here to read memory from")


@attack
@needs_proc
def test_100_000_tokens_take_no_more_memory_than_10_000(finished_run):
    command = [sys.executable, ROOT / "generate.py", "--out_dir", finished_run, "--max_new_tokens", "100000", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    sizes, read = [], 0
    while piece := os.read(process.stdout.fileno(), 4096):
        read += len(piece)
        if read // 10_000 > len(sizes):
            sizes.append(resident(process.pid))
    assert process.wait() == 0 and len(sizes) > 10
    warm = sizes[len(sizes) // 10]
    print(f"\nmemory of 100,000 tokens: {warm / 1e6:.1f} MB when warm, then at most {max(sizes[len(sizes) // 10:]) / 1e6:.1f} MB")
    assert max(sizes[len(sizes) // 10:]) < 1.05 * warm


@attack
@needs_proc
def test_4_000_iterations_take_no_more_memory_than_500(tiny_text, tmp_path):
    command = [sys.executable, ROOT / "train.py", *TINY, "--data_path", tiny_text, "--out_dir", tmp_path, "--max_iters", "4000",
               "--eval_interval", "100"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    sizes = []
    for line in process.stdout:
        if line.startswith("iteration"):
            sizes.append(resident(process.pid))
    assert process.wait() == 0 and len(sizes) == 41
    print(f"\nmemory of 4,000 iterations: {sizes[5] / 1e6:.1f} MB when warm, then at most {max(sizes[5:]) / 1e6:.1f} MB")
    assert max(sizes[5:]) < 1.05 * sizes[5]
