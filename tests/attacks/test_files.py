"""Damaged files, and files made by one who knows the format: loaded as the truth, or refused."""
import copy
import functools
import io
import itertools
import math
import operator
import os
import random
import shutil
import zipfile
from collections import Counter

import pytest
import torch

import plots
import train
from bench import peak_memory
from conftest import FORKS, complaint, run, same
from model import GPT, GPTConfig, load_checkpoint, load_model, save_checkpoint
from tokenizer import BasicTokenizer, out_of_memory

attack = pytest.mark.attack
CHECKPOINTS = ["model.pt", "model_int8.pt", "last.pt"]
NAMES = ["merges.pkl", *CHECKPOINTS, "metrics.csv", "histograms.npz"]


def load(path):
    """Returns what a file of a run holds, for `same`."""
    if path.name == "last.pt":
        return train.load_last(path.parent)
    if path.suffix in (".csv", ".npz"):
        table = path.suffix == ".csv"
        figures = plots.read_metrics(path) if table else plots.read_histograms(path, 2)
        return {key: torch.as_tensor(value) for key, value in figures.items()}
    tokens = BasicTokenizer(out_dir=path.parent)
    if path.suffix == ".pkl":  # only a network knows the merges it was trained with
        path = path.with_name("model.pt")
    network, entries = load_model(path, tokens.fingerprint, tokens.vocab_size)
    every_token = torch.arange(304).view(19, 16) % 300
    return [network(every_token)[0].detach(), entries]


# ---- mutated ----

def mutate(data, other, chance):
    """Returns a file with bits flipped, cut, spliced with another, or with bytes in or out."""
    at, length = chance.randrange(1, len(data)), chance.choice([1, 1, 2, 8, 64, 4096])
    before, piece, after = data[:at], data[at:at + length], data[at + length:]
    flipped, noise = bytearray(data), chance.randbytes(length)
    for _ in range(chance.choice([1, 1, 1, 2, 5, 30])):
        flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    new = chance.choice([b"", piece * 2, bytes(len(piece)), noise, noise + piece])
    spliced = before + other[chance.choice([at, chance.randrange(1, len(other))]):]
    return chance.choice([bytes(flipped), before, spliced, before + new + after])


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in a damaged pickle
@pytest.mark.parametrize("count", [1_050, pytest.param(10_500, marks=attack)])
def test_mutated_files_are_the_truth_or_refused(quantized_run, tmp_path, count):
    """All but metrics.csv, which has no checksum: it holds what the text says."""
    folder, chance = shutil.copytree(quantized_run, tmp_path / "run"), random.Random(count)
    original = {name: (folder / name).read_bytes() for name in NAMES}
    truth, refused = {name: load(folder / name) for name in NAMES}, Counter()
    for name in itertools.islice(itertools.cycle(NAMES), count):
        path = folder / name
        mutated = mutate(original[name], original[chance.choice(NAMES)], chance)
        path.write_bytes(mutated)
        try:
            true = same(load(path), truth[name]) or mutated in original.values()  # a whole other
            assert true or name == "metrics.csv", f"{name}: another than the truth, in silence"
        except (ValueError, OSError) as error:
            assert name in str(error) and str(folder) in str(error), error
            assert "\n" not in str(error)
            refused[name] += 1
        path.write_bytes(original[name])
    print(f"\n{count} mutated files, of which were refused: {refused}")
    assert all(refused[name] > count / 21 for name in NAMES)


# ---- made by one who knows the format ----

class Call(tuple):
    """A function and its arguments, which pickle as a call."""

    def __reduce__(self):
        return tuple(self)


def variants(value):
    """Returns what may stand in the place of a value of a checkpoint; KeyError for nothing."""
    others = [None, 0, -1, "x", [], {}, 1.5, [1, [2]], Call((os.mkdir, ("code_ran",))),
              torch.ones(2, 2), KeyError]
    if type(value) in (int, float):
        others += [10**12, 2**80, math.nan, True]
    if isinstance(value, torch.Tensor):
        odd = value.float().clone()
        odd.view(-1)[-1:] = math.nan
        others += [value.flatten()[:-1].clone(), value[None].clone(), value.double(), odd,
                   value.long(), value.to_sparse(), value.bfloat16(), torch.zeros(0)]
    return others


def with_entry(entries, path, value):
    """Returns a copy of nested dicts and lists with another entry at the end of a path of keys."""
    changed, (*keys, last) = copy.deepcopy(entries), path
    parent = functools.reduce(operator.getitem, keys, changed)
    if value is KeyError:
        del parent[last]
    else:
        parent[last] = value
    return changed


def tamper(entries, *path):
    """Yields (path, value) for each entry; of those that are numbered, the first is like all."""
    keys = [0][:len(entries)] if isinstance(entries, list) or 0 in entries else entries
    for key in keys:
        yield from (((*path, key), other) for other in variants(entries[key]))
        if isinstance(entries[key], (list, dict)):
            yield from tamper(entries[key], *path, key)


@attack
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_tampered_checkpoints_are_refused_or_as_good(quantized_run, tmp_path, monkeypatch, capsys,
                                                     new_trainer, name):
    """Their checksums are right. What loads has the true weights, or can be resumed."""
    monkeypatch.chdir(tmp_path)
    folder, refused = shutil.copytree(quantized_run, tmp_path / "run"), 0
    checkpoint, truth = load_checkpoint(folder / name), load(folder / name)
    for path, value in random.Random(7).sample([*tamper(checkpoint)], 600):
        for file in folder.glob("last.pt*"):
            file.unlink()
        torch.save(with_entry(checkpoint, path, value), folder / name)
        capsys.readouterr()
        try:
            if name == "last.pt":
                new_trainer("--resume", "--out_dir", folder, "--max_iters", 62).run()
            else:
                logits, entries = load(folder / name)
                assert same(logits, truth[0]), path
                assert [type(entries[key]) for key in ("iteration", "val_loss")] == [int, float]
        except (SystemExit, ValueError, OSError) as error:
            line = str(error)
            if isinstance(error, SystemExit):
                line = capsys.readouterr().err.splitlines()[-1]
            assert "--" in line or str(folder) in line, (path, error)
            refused += 1
        except RuntimeError as error:
            assert out_of_memory(error), (path, error)
            refused += 1
    with capsys.disabled():
        print(f"\n600 times {name} with an entry replaced: {refused} refused")
    assert refused > 300 and not (tmp_path / "code_ran").exists()


def test_fewer_tokens_than_the_tokenizer_has_are_refused(tiny_run):
    """Else its ids would be looked up beyond the embeddings."""
    checkpoint = load_checkpoint(tiny_run / "model.pt")
    config = checkpoint["config"] | {"vocab_size": 100}
    weights = GPT(GPTConfig(**config)).state_dict()
    save_checkpoint(tiny_run / "model.pt", checkpoint | {"config": config, "model": weights})
    assert "model.pt" in complaint(run("generate.py", "--out_dir", tiny_run, "--device", "cpu"))


# ---- absurd: small files from which gigabytes could be made, and files that are gigabytes ----

def zipped(name, data, method=zipfile.ZIP_STORED):
    """Returns an archive of data, and of what else a checkpoint needs."""
    with zipfile.ZipFile(file := io.BytesIO(), "w", method) as archive:
        archive.writestr(name, data)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def absurd_files(model, last):
    """Yields (what, file, a checkpoint, bytes or a number of zeros to put there)."""
    # rows of 16 zeros, all the same: no bytes in a file, 3.2 GB if laid out as floats
    moments = torch.zeros(1, 1, dtype=torch.int8).expand(5 * 10**7, 16)
    yield "moments of no bytes", "last.pt", with_entry(
        last, ["optimizers", 0, "state", 0, "exp_avg"], moments)
    yield "rows of no bytes", "last.pt", last | {"metrics": last["metrics"][:1].expand(10**9, -1)}
    yield "20,000 layers", "model.pt", with_entry(model, ["config", "n_layer"], 20_000)
    yield "an unknown call", "model.pt", model | {"x": Call((bytearray, (10**9,)))}
    yield "16 MB of lists", "model.pt", zipped(
        "archive/data.pkl", b"\x80\x02(" + b"]" * (2**24 - 10) + b"l.")
    bomb = bytes(10**9), zipfile.ZIP_DEFLATED
    yield "a bomb", "model.pt", zipped("archive/data.pkl", *bomb)
    yield "a bomb", "histograms.npz", zipped("iteration.npy", *bomb)
    yield "60 MB of numbers", "merges.pkl", (
        b"\x80\x04}(" + b"J\xff\xff\xff\x7f" * 12_000_000 + b"u.")
    yield "16 MB of commas", "metrics.csv", b"," * (2**24 - 9) + b"\n1\n"
    for name in NAMES:
        yield "10 GB of zeros", name, 10**10


def measure(whole, path):
    """Loads a file. Returns by how many bytes the memory grew, and the message."""
    for name in NAMES:
        load(whole / name)  # so that all libraries are there
    before, message = peak_memory(), "LOADED"
    try:
        entries = load(path)
        if path.name == "last.pt":
            flags = ["--resume", "--out_dir", str(path.parent)]
            train.Trainer(train.parse_args(flags)[0], entries)
    except (ValueError, OSError) as error:
        message = str(error)
    return peak_memory() - before, message


@attack
def test_absurd_files_take_no_gigabytes(quantized_run, tmp_path):
    """Each has a process of its own. 300 MB are what a vocabulary of a million takes."""
    model, last = (load_checkpoint(quantized_run / name) for name in ("model.pt", "last.pt"))
    peaks, processes = {}, FORKS.Pool(1, maxtasksperchild=1)
    for what, name, data in absurd_files(model, last):
        path = shutil.copytree(quantized_run, tmp_path / what / name) / name
        path.write_bytes(data if isinstance(data, bytes) else b"")
        if isinstance(data, dict):
            torch.save(data, path)
        elif isinstance(data, int):
            os.truncate(path, data)
        answer = processes.apply_async(measure, (quantized_run, path))
        peaks[what, name], message = answer.get(timeout=100)
        assert name in message and str(path.parent) in message, f"{what}: {message}"
    processes.terminate()
    worst = max(peaks, key=peaks.get)
    print(f"\nabsurd files: {len(peaks)} refused with at most {peaks[worst] / 1e6:.0f} MB, {worst}")
    assert peaks[worst] < 300e6
