"""Files that were damaged, or made by someone who knows the format: the truth is loaded, or one line refuses them."""
import contextlib
import copy
import csv
import itertools
import math
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, complaint, contents, run, same

import plots
import train
from model import Int8Linear, load_checkpoint, load_model, save_checkpoint
from tokenizer import BasicTokenizer

attack = pytest.mark.attack


def state_of(network, rest):
    """Returns all that a loaded network computes from: weights, int8 ones unpacked, and its other entries."""
    packed = [torch.ops.quantized.linear_unpack(layer.packed)[0].int_repr() for layer in network.modules()
              if isinstance(layer, Int8Linear)]
    return [dict(network.state_dict()), packed, rest]


def loaders(folder):
    """Returns {file: how it is loaded from a folder, to something that can be compared}."""
    def pair():
        loaded = BasicTokenizer(out_dir=folder)
        return [list(loaded.merges.items()), loaded.vocab]

    def figures(arrays):
        return {name: torch.as_tensor(values) for name, values in arrays.items()}

    fingerprint = BasicTokenizer(out_dir=folder).fingerprint
    return {"merges.pkl": pair, "vocab.pkl": pair,
            "model.pt": lambda: state_of(*load_model(folder / "model.pt", fingerprint, 300)),
            "model_int8.pt": lambda: state_of(*load_model(folder / "model_int8.pt", fingerprint, 300)),
            "last.pt": lambda: train.load_last(folder),
            "metrics.csv": lambda: figures(plots.read_metrics(folder / "metrics.csv")),
            "histograms.npz": lambda: figures(plots.read_histograms(folder / "histograms.npz", n_layer=2))}


def print_outcomes(title, outcomes):
    print(f"\n{title}")
    for name, counts in outcomes.items():
        print(f"  {name:15} {counts.total():6}: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))


# ---- mutated ----

def mutate(data, others, chance):
    """Returns a file that is no longer what was written: bits flipped, cut, spliced with another, bytes in or out."""
    data, at = bytearray(data), chance.randrange(1, len(data))
    how = chance.choice(["flip", "flip", "truncate", "splice", "double", "blank", "replace", "insert", "remove"])
    length = min(len(data) - at, chance.choice([1, 1, 2, 8, 64, 4096]))
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
    elif how == "replace":
        data[at:at + length] = chance.randbytes(length)
    elif how == "insert":
        data[at:at] = chance.randbytes(length)
    else:
        del data[at:at + length]
    return bytes(data)


def says_what_the_table_says(found, path):
    """Tells whether figures are those a table of plain text, which has no checksum, holds by the library's reader."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        said = {name: column for name, *column in zip(*csv.reader(file))}
    return all(np.array_equal(found[column], [plots.parse_number(field, "") for field in said[column]], equal_nan=True)
               for column in plots.KNOWN_COLUMNS + plots.LOSS_COLUMNS)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in a damaged pickle
@pytest.mark.parametrize("count", [1_050, pytest.param(10_500, marks=attack)])
def test_mutated_files_are_the_truth_or_refused(quantized_run, tmp_path, count):
    folder = shutil.copytree(quantized_run, tmp_path / "run")
    chance, load = random.Random(count), loaders(folder)
    original = {name: (folder / name).read_bytes() for name in load}
    whole, outcomes = {name: [load[name]()] for name in load}, {name: Counter() for name in load}
    for name, data in itertools.product(load, original.values()):  # a splice can make one of the other files of it
        (folder / name).write_bytes(data)
        with contextlib.suppress(ValueError, OSError):
            whole[name].append(load[name]())
        (folder / name).write_bytes(original[name])
    assert all(same(load[name](), whole[name][0]) for name in load)
    for name in itertools.islice(itertools.cycle(load), count):
        (folder / name).write_bytes(mutate(original[name], list(original.values()), chance))
        try:
            found = load[name]()
        except (ValueError, OSError) as error:
            assert str(folder / name) in str(error) and "\n" not in str(error), error
            outcomes[name]["refused"] += 1
        else:
            if any(same(found, truth) for truth in whole[name]):
                outcomes[name]["the truth"] += 1
            else:
                assert name == "metrics.csv" and says_what_the_table_says(found, folder / name), name
                outcomes[name]["other figures, as the text has them"] += 1
        (folder / name).write_bytes(original[name])
    print_outcomes("mutated files", outcomes)
    assert all(counts.total() == count // 7 and counts["refused"] > count // 21 for counts in outcomes.values())


# ---- made by someone who knows the format ----

class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


CODE = Call(os.mkdir, "code_ran")
NO_TENSORS = [None, 0, -1, "x", [], {}, 1.5, [1, [2]], CODE, torch.ones(2, 2)]


def with_entry(checkpoint, path, value):
    """Returns a copy of nested dicts in which the entry at the end of a path of keys is another, or gone."""
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
    """Yields checkpoints one entry of which is missing or something else, with right checksums: (what, checkpoint)."""
    for key in checkpoint:
        for other in [*NO_TENSORS, KeyError]:
            yield f"{key} {other!r:.20}", with_entry(checkpoint, [key], other)
    for key in checkpoint["config"]:
        for other in [*NO_TENSORS, KeyError, 10**12, 2**80, math.nan, True]:
            yield f"config {key} {other!r:.20}", with_entry(checkpoint, ["config", key], other)
    for key, weight in checkpoint["model"].items():
        odd = weight.float().flatten().clone()
        odd[chance.randrange(len(odd))] = chance.choice([math.nan, math.inf, -math.inf])
        for other in [*NO_TENSORS, KeyError, weight[:-1].clone(), weight.flatten()[0].clone(), weight[None].clone(),
                      weight.double(), weight.long(), odd.view(weight.shape), torch.zeros(0), torch.zeros(()),
                      weight.to_sparse(), weight.float().bfloat16()]:
            yield f"weight {key}", with_entry(checkpoint, ["model", key], other)
    yield "a weight too many", with_entry(checkpoint, ["model", "extra.weight"], torch.ones(3))


@attack
@pytest.mark.parametrize("name", ["model.pt", "model_int8.pt"])
def test_checkpoints_tampered_with_are_refused(quantized_run, tmp_path, monkeypatch, name):
    """What loads has the true weights: an entry that is as good as the true one is no damage."""
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


def tampered_states(last, chance):
    """Yields what `tamper` does of a last.pt, and changes of its flags, its optimizers and its metrics."""
    yield from tamper(last, chance)
    for flag in last["args"]:
        for other in [*NO_TENSORS, KeyError, 10**12]:
            yield f"flag {flag} {other!r:.20}", with_entry(last, ["args", flag], other)
    for entry, moment in last["optimizers"][0]["state"][0].items():
        for other in [*NO_TENSORS, KeyError, moment[:3].clone() if moment.dim() else torch.ones(5)]:
            state = with_entry(last["optimizers"][0], ["state", 0, entry], other)
            yield f"moment {entry}", with_entry(last, ["optimizers"], [state])
    for other in NO_TENSORS:
        yield "an optimizer", with_entry(last, ["optimizers"], [other])
        yield "a column of metrics", with_entry(last, ["columns"], [*last["columns"][:-1], other])


@attack
def test_a_training_state_tampered_with_resumes_or_is_refused(quantized_run, tmp_path, monkeypatch, capsys, new_trainer):
    monkeypatch.chdir(tmp_path)
    folder, counts, chance = shutil.copytree(quantized_run, tmp_path / "run"), Counter(), random.Random(7)
    for what, changed in chance.sample([*tampered_states(load_checkpoint(folder / "last.pt"), chance)], 600):
        for path in folder.glob("last.pt*"):
            path.unlink()
        torch.save(changed, folder / "last.pt")
        try:
            new_trainer("--resume", "--out_dir", folder, "--max_iters", 62).run()
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
    assert counts.total() == 600 and counts["refused"] > 300 and not (tmp_path / "code_ran").exists()


def test_a_network_of_another_vocabulary_is_refused_though_it_names_the_tokenizer(tiny_run):
    """Else its ids would be looked up beyond the embeddings."""
    checkpoint = load_checkpoint(tiny_run / "model.pt")
    for name in "token_embedding.weight", "head.weight", "head.bias":
        checkpoint["model"][name] = checkpoint["model"][name][:100].clone()
    checkpoint["config"]["vocab_size"] = 100
    save_checkpoint(tiny_run / "model.pt", checkpoint)
    line = complaint(run("generate.py", "--out_dir", tiny_run, "--prompt", "\N{SNOWMAN}", "--device", "cpu"))
    assert "model.pt" in line


@pytest.mark.parametrize("network", ["model.pt", "last.pt", "model_int8.pt"])
def test_a_trained_network_keeps_its_tokenizer(quantized_run, tiny_text, tmp_path, network):
    for name in network, "merges.pkl", "vocab.pkl":
        shutil.copy(quantized_run / name, tmp_path)
    before = contents(tmp_path)
    command = "tokenizer.py", "train", "--data_path", tiny_text, "--out_dir", tmp_path, "--vocab_size"
    line = complaint(run(*command, 290))
    assert str(tmp_path) in line and "--out_dir" in line and contents(tmp_path) == before
    (tmp_path / "merges.pkl").write_bytes(b"damaged")  # the message for that says: train again
    again = run(*command, 300)
    assert again.returncode == 0 and again.stdout.count("compression ratio") == 1, again.stderr
    assert contents(tmp_path) == before


# ---- absurd: small files from which gigabytes could be made, and files that are gigabytes themselves ----

def zipped(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "."), data)


def replaced_pickle(path, data):
    """Writes a checkpoint with another pickle in it, of the given bytes."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, old in entries.items():
            archive.writestr(name, data if name.endswith("data.pkl") else old)


def absurd_checkpoints(checkpoint, int8, last):
    """Returns {what: (file, how to write it)}."""
    def changed(source, *path, value):
        return lambda target: torch.save(with_entry(source, path, value), target)

    def config(**entries):
        return "model.pt", changed(checkpoint, "config", value=checkpoint["config"] | entries)

    def vocabulary(source, rows):
        source = with_entry(source, ["config", "vocab_size"], len(rows))
        return changed(source, "model", "token_embedding.weight", value=rows)

    # rows of 16 zeros, all of them the same: no bytes in the file, 3.2 GB if they were laid out
    rows = {dtype: torch.zeros(1, 1, dtype=dtype).expand(5 * 10**7, 16) for dtype in (torch.float32, torch.int8)}
    moments = with_entry(last["optimizers"][0], ["state", 0, "exp_avg"], rows[torch.int8])
    return {
        "an unknown call: bytearray": ("model.pt", changed(checkpoint, "x", value=Call(bytearray, 10**9))),
        "bytearray to resume from": ("last.pt", changed(last, "x", value=Call(bytearray, 10**9))),
        "code": ("model.pt", changed(checkpoint, "x", value=CODE)),
        "code to resume from": ("last.pt", changed(last, "x", value=CODE)),
        "16 MB of lists": ("model.pt", lambda path: replaced_pickle(path, b"\x80\x02(" + b"]" * (2**24 - 10) + b"l.")),
        "60 MB of dicts": ("last.pt", lambda path: replaced_pickle(path, b"\x80\x02(" + b"}" * 60_000_000 + b"l.")),
        "a vocabulary of no bytes": ("model.pt", vocabulary(checkpoint, rows[torch.float32])),
        "an int8 vocabulary of no bytes": ("model_int8.pt", vocabulary(int8, rows[torch.int8])),
        "scales for other rows": ("model_int8.pt", changed(int8, "model", "token_embedding.scale",
                                                           value=torch.zeros(10**6))),
        "moments of no bytes": ("last.pt", changed(last, "optimizers", value=[moments])),
        "20,000 layers": config(n_layer=20_000), "10^12 channels": config(n_embd=10**12),
        "10^12 tokens": config(vocab_size=10**12), "10^9 heads": config(n_head=10**9, n_embd=10**9),
        "a context of 10^12": config(block_size=10**12),
        "a zip bomb": ("model.pt", lambda path: zipped(path, archive___data__pkl=bytes(10**9))),
    }


def absurd_tables():
    """Returns {what: (file, how to write it)}, as `absurd_checkpoints` does."""
    def pickled(data):
        return lambda path: path.write_bytes(b"\x80\x04}(" + data + b"u.")

    numbers = b"J\xff\xff\xff\x7f" * 12_000_000
    triples = b"".join(struct.pack("<cicicci", b"J", i + 10**6, b"J", i + 10**7, b"\x86", b"J", i + 256)
                       for i in range(4_000_000))
    doubling = {(max(new - 1, 97) if new > 256 else 97,) * 2: new for new in range(256, 456)}
    shape = b"{'descr': '<f8', 'fortran_order': False, 'shape': (2, 1000000000)}"
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + shape.ljust(117) + b"\n"
    arrays = ("iteration__npy", "relu_counts__npy", "relu_edges__npy", "relu_grad_counts__npy", "relu_grad_edges__npy")
    cases = {
        "60 MB of numbers": ("merges.pkl", pickled(numbers)), "60 MB of pairs": ("merges.pkl", pickled(triples)),
        "60 MB of numbers as spellings": ("vocab.pkl", pickled(numbers)),
        "tokens that double": ("merges.pkl", lambda path: path.write_bytes(pickle.dumps(doubling))),
        "16 MB of line ends": ("metrics.csv", lambda path: path.write_bytes(b"\n" * (2**24 - 1))),
        "16 MB of commas": ("metrics.csv", lambda path: path.write_bytes(b"," * (2**24 - 9) + b"\n1\n")),
        "a million layers": ("metrics.csv", lambda path: path.write_bytes(b"relu_zeros," * 1_400_000 + b"\n1\n")),
        "bombs in the figures": ("histograms.npz", lambda path: zipped(path, relu_counts__npy=bytes(10**9))),
        "figures that claim 16 GB": ("histograms.npz", lambda path: zipped(path, **dict.fromkeys(arrays, header))),
    }
    return cases | {f"10 GB of zeros as {name}": (name, lambda path: (path.touch(), os.truncate(path, 10**10)))
                    for name in ("model.pt", "last.pt", "merges.pkl", "vocab.pkl", "metrics.csv", "histograms.npz")}


MEASURE = """
import os, resource, signal, sys
from pathlib import Path
sys.path[:0] = {path}
import train
from test_files import loaders
for true in loaders(Path(sys.argv[1])).values():
    true()  # so that all libraries are there
import torch._dynamo  # which the optimizer asks for

def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def load(path):
    if path.name == "last.pt":
        sys.argv = ["train.py", "--resume", "--out_dir", str(path.parent), "--max_iters", "61"]
        train.Trainer(*train.parse_args()).run()
    else:
        loaders(path.parent)[path.name]()

print("ready", flush=True)
for line in sys.stdin:
    if os.fork() == 0:
        signal.alarm(100)
        before, message = memory(), "LOADED"
        try:
            load(Path(line.rstrip()))
        except (ValueError, OSError) as error:
            message = str(error)
        print("RESULT", memory() - before, message, flush=True)
        os._exit(0)
    if os.wait()[1]:
        print("RESULT 0 CRASHED OR TIMED OUT", flush=True)
"""


@attack
def test_absurd_files_take_no_gigabytes(quantized_run, tmp_path):
    """Each is loaded in a process of its own, as the peak of memory never falls.

    It may grow by 300 MB, which a vocabulary of a million takes.
    """
    program = MEASURE.format(path=[str(ROOT), str(ROOT / "tests" / "attacks"), str(ROOT / "tests")])
    process = subprocess.Popen([sys.executable, "-c", program, quantized_run], cwd=tmp_path, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    while process.stdout.readline() not in ("ready\n", ""):
        pass
    checkpoints = (load_checkpoint(quantized_run / name) for name in ("model.pt", "model_int8.pt", "last.pt"))
    peaks = {}
    for number, (what, (name, write)) in enumerate((absurd_checkpoints(*checkpoints) | absurd_tables()).items()):
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
    process.communicate()
    worst = max(peaks, key=peaks.get)
    print(f"\nabsurd files: {len(peaks)} refused; memory grew by at most {peaks[worst] / 1e6:.0f} MB ({worst})")
    assert peaks[worst] < 300e6, sorted((peak, what) for what, peak in peaks.items())[-6:]
    assert not (tmp_path / "code_ran").exists()
