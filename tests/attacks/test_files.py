"""Damaged files, and files made by one who knows the format: loaded as the truth, or refused."""
import contextlib
import copy
import csv
import io
import itertools
import math
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch

import plots
import train
from conftest import FORKS, complaint, contents, run, same
from model import Int8Linear, load_checkpoint, load_model, save_checkpoint
from tokenizer import BasicTokenizer

attack = pytest.mark.attack


def state_of(network, rest):
    """Returns all that a loaded network computes from, int8 weights unpacked, and its entries."""
    layers = [layer for layer in network.modules() if isinstance(layer, Int8Linear)]
    int8 = [torch.ops.quantized.linear_unpack(layer.packed)[0].int_repr() for layer in layers]
    return [dict(network.state_dict()), int8, rest]


def loaders(folder):
    """Returns {file: how it is loaded from a folder, to something that can be compared}."""
    fingerprint = BasicTokenizer(out_dir=folder).fingerprint

    def pair():
        loaded = BasicTokenizer(out_dir=folder)
        return [list(loaded.merges.items()), loaded.vocab]

    def network(name):
        return lambda: state_of(*load_model(folder / name, fingerprint, 300))

    def figures(read, name, *more):
        return lambda: {key: torch.as_tensor(v) for key, v in read(folder / name, *more).items()}

    return {"merges.pkl": pair, "vocab.pkl": pair, "model.pt": network("model.pt"),
            "model_int8.pt": network("model_int8.pt"), "last.pt": lambda: train.load_last(folder),
            "metrics.csv": figures(plots.read_metrics, "metrics.csv"),
            "histograms.npz": figures(plots.read_histograms, "histograms.npz", 2)}


def print_outcomes(title, outcomes):
    print(f"\n{title}")
    for name, counts in outcomes.items():
        found = ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))
        print(f"  {name:15} {counts.total():6}: {found}")


# ---- mutated ----

def mutate(data, others, chance):
    """Returns a file with bits flipped, cut, spliced with another, or with bytes in or out."""
    at, flipped = chance.randrange(1, len(data)), bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 5, 30])):
        flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    length = min(len(data) - at, chance.choice([1, 1, 2, 8, 64, 4096]))
    before, piece, after = data[:at], data[at:at + length], data[at + length:]
    other, noise = chance.choice(others), chance.randbytes(length)
    spliced = before + other[chance.choice([at, 0, chance.randrange(len(other))]):]
    return bytes(chance.choice([
        flipped, flipped, data[:at - 1], spliced, before + piece + piece + after, before + after,
        before + bytes(length) + after, before + noise + after, before + noise + piece + after]))


def says_what_the_table_says(found, path):
    """Tells whether figures are those of a table, which has no checksum, by another reader."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        said = {name: column for name, *column in zip(*csv.reader(file))}
    for name in plots.KNOWN_COLUMNS + plots.LOSS_COLUMNS:
        values = [plots.parse_number(field, "") for field in said[name]]
        if not np.array_equal(found[name], values, equal_nan=True):
            return False
    return True


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in a damaged pickle
@pytest.mark.parametrize("count", [1_050, pytest.param(10_500, marks=attack)])
def test_mutated_files_are_the_truth_or_refused(quantized_run, tmp_path, count):
    folder = shutil.copytree(quantized_run, tmp_path / "run")
    chance, load = random.Random(count), loaders(folder)
    original = {name: (folder / name).read_bytes() for name in load}
    whole, outcomes = {name: [load[name]()] for name in load}, {name: Counter() for name in load}
    for name, data in itertools.product(load, original.values()):  # a splice may make such a file
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
                assert name == "metrics.csv", f"{name}: another than the truth, in silence"
                assert says_what_the_table_says(found, folder / name)
                outcomes[name]["other figures, as the text has them"] += 1
        (folder / name).write_bytes(original[name])
    print_outcomes("mutated files", outcomes)
    for counts in outcomes.values():
        assert counts.total() == count // len(load) and counts["refused"] > counts.total() // 3


# ---- made by one who knows the format ----

class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


CODE = Call(os.mkdir, "code_ran")
OTHERS = [None, 0, -1, "x", [], {}, 1.5, [1, [2]], CODE, torch.ones(2, 2), KeyError]


def with_entry(checkpoint, path, value):
    """Returns a copy of nested dicts with another entry at the end of a path of keys, or none."""
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
    """Yields (what, checkpoint): an entry is missing or something else, the checksums are right."""
    def each(*path, more=()):
        for other in [*OTHERS, *more]:
            yield f"{path} {other!r:.20}", with_entry(checkpoint, path, other)

    for key in checkpoint:
        yield from each(key)
    for key in checkpoint["config"]:
        yield from each("config", key, more=[10**12, 2**80, math.nan, True])
    for key, weight in checkpoint["model"].items():
        odd = weight.float().flatten().clone()
        odd[chance.randrange(len(odd))] = chance.choice([math.nan, math.inf, -math.inf])
        yield from each("model", key, more=[
            weight[:-1].clone(), weight.flatten()[0].clone(), weight[None].clone(), weight.double(),
            weight.long(), odd.view(weight.shape), torch.zeros(0), torch.zeros(()),
            weight.to_sparse(), weight.float().bfloat16()])
    yield "a weight too many", with_entry(checkpoint, ["model", "extra.weight"], torch.ones(3))
    for flag in checkpoint.get("args", ()):
        yield from each("args", flag, more=[10**12])


def tamper_with_training(last, chance):
    """Yields what `tamper` does of a last.pt, and changes of its optimizer and its metrics."""
    yield from tamper(last, chance)
    for key, moment in last["optimizers"][0]["state"][0].items():
        for other in [*OTHERS, moment[:3].clone() if moment.dim() else torch.ones(5)]:
            state = with_entry(last["optimizers"][0], ["state", 0, key], other)
            yield f"moment {key}", with_entry(last, ["optimizers"], [state])
    for other in OTHERS[:-1]:
        yield "an optimizer", with_entry(last, ["optimizers"], [other])
        yield "a column", with_entry(last, ["columns"], [*last["columns"][:-1], other])


@attack
@pytest.mark.parametrize("name", ["model.pt", "model_int8.pt"])
def test_checkpoints_tampered_with_are_refused(quantized_run, tmp_path, monkeypatch, name):
    """What loads has the true weights: an entry that is as good as the true one is no damage."""
    monkeypatch.chdir(tmp_path)
    tokens, path, counts = BasicTokenizer(out_dir=quantized_run), tmp_path / name, Counter()
    weights = state_of(*load_model(quantized_run / name))[:2]
    for what, changed in tamper(load_checkpoint(quantized_run / name), random.Random(6)):
        torch.save(changed, path)
        try:
            network, rest = load_model(path, tokens.fingerprint, tokens.vocab_size)
        except (ValueError, OSError) as error:
            assert str(path) in str(error) and "\n" not in str(error), what
            counts["refused"] += 1
        else:
            assert same(state_of(network, rest)[:2], weights), what
            assert [type(rest[key]) for key in ("iteration", "val_loss")] == [int, float], what
            counts["loaded, with the true weights"] += 1
    print_outcomes("entries replaced, checksums right", {name: counts})
    assert counts["refused"] > 300 and not (tmp_path / "code_ran").exists()


@attack
def test_a_training_state_tampered_with_resumes_or_is_refused(quantized_run, tmp_path, monkeypatch,
                                                              capsys, new_trainer):
    monkeypatch.chdir(tmp_path)
    folder, counts = shutil.copytree(quantized_run, tmp_path / "run"), Counter()
    chance = random.Random(7)
    cases = [*tamper_with_training(load_checkpoint(folder / "last.pt"), chance)]
    for what, changed in chance.sample(cases, 600):
        for path in folder.glob("last.pt*"):
            path.unlink()
        torch.save(changed, folder / "last.pt")
        capsys.readouterr()
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
    assert counts["refused"] > 300 and not (tmp_path / "code_ran").exists()


def test_a_network_of_another_vocabulary_is_refused_though_it_names_the_tokenizer(tiny_run):
    """Else its ids would be looked up beyond the embeddings."""
    checkpoint = load_checkpoint(tiny_run / "model.pt")
    for name in "token_embedding.weight", "head.weight", "head.bias":
        checkpoint["model"][name] = checkpoint["model"][name][:100].clone()
    checkpoint["config"]["vocab_size"] = 100
    save_checkpoint(tiny_run / "model.pt", checkpoint)
    assert "model.pt" in complaint(run("generate.py", "--out_dir", tiny_run, "--device", "cpu"))


@pytest.mark.parametrize("network", ["model.pt", "last.pt", "model_int8.pt"])
def test_a_trained_network_keeps_its_tokenizer(quantized_run, tiny_text, tmp_path, network):
    for name in network, "merges.pkl", "vocab.pkl":
        shutil.copy(quantized_run / name, tmp_path)
    before = contents(tmp_path)
    train_one = "tokenizer.py", "train", "--data_path", tiny_text, "--out_dir", tmp_path
    line = complaint(run(*train_one, "--vocab_size", 290))
    assert str(tmp_path) in line and "--out_dir" in line and contents(tmp_path) == before
    (tmp_path / "merges.pkl").write_bytes(b"damaged")  # the message for that says: train again
    again = run(*train_one, "--vocab_size", 300)
    assert again.returncode == 0 and again.stdout.count("compression ratio") == 1, again.stderr
    assert contents(tmp_path) == before


# ---- absurd: small files from which gigabytes could be made, and files that are gigabytes ----

def zipped(**members):
    """Returns a compressed archive of the given members, arrays or pickles."""
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "."), data)
    return file.getvalue()


def with_pickle(data):
    """Returns a checkpoint with another pickle in it, of the given bytes."""
    torch.save({}, whole := io.BytesIO())
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(file := io.BytesIO(), "w") as changed:
        for name in archive.namelist():
            changed.writestr(name, data if name.endswith("data.pkl") else archive.read(name))
    return file.getvalue()


def absurd_checkpoints(model, int8, last):
    """Returns {what: (file, a checkpoint to be saved or bytes to be written there)}."""
    def config(**entries):
        return "model.pt", model | {"config": model["config"] | entries}

    def vocabulary(checkpoint, dtype):
        # rows of 16 zeros, all of them the same: no bytes in the file, 3.2 GB if they were laid out
        rows = torch.zeros(1, 1, dtype=dtype).expand(5 * 10**7, 16)
        checkpoint = with_entry(checkpoint, ["config", "vocab_size"], len(rows))
        return with_entry(checkpoint, ["model", "token_embedding.weight"], rows)

    moments = torch.zeros(1, 1, dtype=torch.int8).expand(5 * 10**7, 16)
    scales = with_entry(int8, ["model", "token_embedding.scale"], torch.zeros(10**6))
    return {
        "an unknown call": ("model.pt", model | {"x": Call(bytearray, 10**9)}),
        "an unknown call to resume from": ("last.pt", last | {"x": Call(bytearray, 10**9)}),
        "code": ("model.pt", model | {"x": CODE}),
        "code to resume from": ("last.pt", last | {"x": CODE}),
        "16 MB of lists": ("model.pt", with_pickle(b"\x80\x02(" + b"]" * (2**24 - 10) + b"l.")),
        "60 MB of dicts": ("last.pt", with_pickle(b"\x80\x02(" + b"}" * 60_000_000 + b"l.")),
        "a vocabulary of no bytes": ("model.pt", vocabulary(model, torch.float32)),
        "an int8 vocabulary of no bytes": ("model_int8.pt", vocabulary(int8, torch.int8)),
        "scales for other rows": ("model_int8.pt", scales),
        "moments of no bytes": ("last.pt", last | {"optimizers": [
            with_entry(last["optimizers"][0], ["state", 0, "exp_avg"], moments)]}),
        "20,000 layers": config(n_layer=20_000), "10^12 channels": config(n_embd=10**12),
        "10^12 tokens": config(vocab_size=10**12), "10^9 heads": config(n_head=10**9, n_embd=10**9),
        "a context of 10^12": config(block_size=10**12),
        "a zip bomb": ("model.pt", zipped(archive___data__pkl=bytes(10**9))),
    }


def absurd_tables():
    """Returns {what: (file, bytes to be written there)}."""
    numbers = b"\x80\x04}(" + b"J\xff\xff\xff\x7f" * 12_000_000 + b"u."
    pairs = b"\x80\x04}(" + b"".join(
        struct.pack("<cicicci", b"J", i + 10**6, b"J", i + 10**7, b"\x86", b"J", i + 256)
        for i in range(4_000_000)) + b"u."
    doubling = {(max(new - 1, 97) if new > 256 else 97,) * 2: new for new in range(256, 456)}
    shape = b"{'descr': '<f8', 'fortran_order': False, 'shape': (2, 1000000000)}"
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + shape.ljust(117) + b"\n"
    arrays = [f"relu{grad}_{kind}__npy" for grad in ("", "_grad") for kind in ("counts", "edges")]
    return {
        "60 MB of numbers": ("merges.pkl", numbers), "60 MB of pairs": ("merges.pkl", pairs),
        "60 MB of numbers as spellings": ("vocab.pkl", numbers),
        "tokens that double": ("merges.pkl", pickle.dumps(doubling)),
        "16 MB of line ends": ("metrics.csv", b"\n" * (2**24 - 1)),
        "16 MB of commas": ("metrics.csv", b"," * (2**24 - 9) + b"\n1\n"),
        "a million layers": ("metrics.csv", b"relu_zeros," * 1_400_000 + b"\n1\n"),
        "bombs in the figures": ("histograms.npz", zipped(relu_counts__npy=bytes(10**9))),
        "figures that claim 16 GB": ("histograms.npz", zipped(
            **dict.fromkeys(["iteration__npy", *arrays], header + bytes(999)))),
    }


def measure(whole, path, pipe):
    """Loads a file, for FORKS. Sends by how many bytes the memory grew, and the message."""
    def memory():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    for load in loaders(whole).values():
        load()  # so that all libraries are there
    before, message = memory(), "LOADED"
    try:
        if path.name == "last.pt":
            sys.argv = ["train.py", "--resume", "--out_dir", str(path.parent), "--max_iters", "61"]
            train.Trainer(*train.parse_args()).run()
        else:
            loaders(path.parent)[path.name]()
    except (ValueError, OSError) as error:
        message = str(error)
    pipe.send((memory() - before, message))


def write(path, data):
    """Writes bytes, saves a checkpoint, or makes a file of so many zeros that take no room."""
    path.unlink()
    if isinstance(data, dict):
        torch.save(data, path)
    elif isinstance(data, int):
        path.touch()
        os.truncate(path, data)
    else:
        path.write_bytes(data)


@attack
def test_absurd_files_take_no_gigabytes(quantized_run, tmp_path, monkeypatch):
    """Each is loaded in a process of its own, as the peak of memory never falls.

    It may grow by 300 MB, which a vocabulary of a million takes.
    """
    monkeypatch.chdir(tmp_path)
    names = ("model.pt", "model_int8.pt", "last.pt")
    cases = absurd_checkpoints(*(load_checkpoint(quantized_run / name) for name in names))
    cases |= absurd_tables() | {f"10 GB of zeros as {name}": (name, 10**10)
                                for name in loaders(quantized_run)}
    peaks = {}
    for number, (what, (name, data)) in enumerate(cases.items()):
        folder = shutil.copytree(quantized_run, tmp_path / str(number))
        write(folder / name, data)
        ours, theirs = FORKS.Pipe()
        process = FORKS.Process(target=measure, args=(quantized_run, folder / name, theirs))
        process.start()
        assert ours.poll(100), f"{what}: no answer"
        peaks[what], message = ours.recv()
        process.join()
        assert str(folder / name) in message, f"{what}: {message}"
        shutil.rmtree(folder)
    worst = max(peaks, key=peaks.get)
    print(f"\nabsurd files: {len(peaks)} refused; memory grew by at most "
          f"{peaks[worst] / 1e6:.0f} MB ({worst})")
    assert peaks[worst] < 300e6, sorted((peak, what) for what, peak in peaks.items())[-6:]
    assert not (tmp_path / "code_ran").exists()
