"""generate.py as a user meets it: any prompt, streams that break no character, one-line errors."""
import io
import os
import random
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import ROOT, complaint, python, run, start
from generate import main, spelling, take_back, write_stream
from model import load_model
from tokenizer import TEMPERATURE, BasicTokenizer


@pytest.fixture
def sample(finished_run, tmp_path, call, capsys):
    """Runs main() in this process. Returns the bytes it writes to --out, and its notes."""
    def sample(*flags):
        call(main, "--out_dir", finished_run, "--out", tmp_path / "out", "--device", "cpu",
             "--seed", 1, "--max_new_tokens", 5, *flags)
        return (tmp_path / "out").read_bytes(), capsys.readouterr().err

    return sample


def test_samples_depend_on_their_seed_alone_and_without_chance_on_none(sample):
    def samples(number, seed, *flags):
        text, _ = sample("--prompt", "ROMEO:", "--num_samples", number, "--seed", seed,
                         "--max_new_tokens", 40, *flags)
        parts = re.split(rb"--- sample . of . ---\n", text)
        return [part.rstrip(b"\n") for part in parts if part]

    six = samples(6, 5)
    assert samples(1, 5) == six[:1] and samples(3, 5) == six[:3]
    assert len({*six, *samples(3, 6)}) == 9
    for likeliest in ("--temperature", 0), ("--top_k", 1), ("--top_p", 1e-9):
        assert len({*samples(3, 5, *likeliest), *samples(3, 6, *likeliest)}) == 1


@pytest.mark.parametrize("prompt", [
    b"", b"\n", b"R", b"O:", b"caf\xc3\xa9 \xf0\x9f\x98\x80 \x01", b"the caf\xc3",
    b"no UTF-8: \xff", b"ROMEO: what say you \xe2\x80\x94 1 caf\xc3\xa9s." * 30])
def test_what_is_printed_begins_with_the_prompt_byte_for_byte(finished_run, sample, prompt):
    whole = prompt.removesuffix(b"\xc3").decode(errors="replace").encode()  # but for half a letter
    for number, count in (1, 1), (1, 8), (3, 1), (3, 8):
        text, notes = sample("--prompt", os.fsdecode(prompt), "--num_samples", number,
                             "--max_new_tokens", count)
        parts = text.split(b" ---\n")[1:] if number > 1 else [text]
        assert number == 1 or b"--- sample 2 of 3 ---\n" in text
        assert len(parts) == number and all(part.startswith(whole or b"\n") for part in parts)
        assert f"using {finished_run / 'model.pt'}, iteration" in notes
        assert f"\n{count * number} tokens in" in notes and "tokens a second" in notes
        assert ("only the last 16 count" in notes) == (len(prompt) > 20)


# ---- the end of a prompt ----

def test_a_line_ends_where_the_end_of_the_prompt_and_its_own_are_one_token(sample):
    prompt = "NURSE: good night \u2014 12 caf\u00e9s."
    text, _ = sample("--num_samples", 100, "--max_new_tokens", 12, "--prompt", prompt)
    assert text.decode().count(f"{prompt}\n") > 50  # none where nothing is taken back


def test_the_fewest_tokens_that_a_longer_one_could_replace_are_taken_back(finished_run, tiny_text):
    tokenizer, chance, seen = BasicTokenizer(out_dir=finished_run), random.Random(1), set()
    text, vocab = tiny_text.read_bytes(), tokenizer.vocab
    for _ in range(300):
        start = chance.randrange(len(text))
        prompt = text[start:start + chance.randint(1, 40)]
        ids = tokenizer.encode_array(prompt).tolist()
        kept, taken = take_back(ids, vocab)
        assert tokenizer.decode_bytes(kept) + taken == prompt and kept == ids[:len(kept)] != []
        ends = [prompt[n:] for n in range(len(prompt) + 1)]
        reach = max(len(end) for end in ends for token in vocab.values()
                    if token.startswith(end) and token != end)
        assert len(taken) >= reach or len(kept) == 1
        assert not taken or len(taken) - len(vocab[ids[len(kept)]]) < reach
        seen.add(len(ids) - len(kept))
    assert seen >= {0, 1, 2}
    assert take_back([0, 1, 1], {0: b"s", 1: b"e", 2: b"eet"}) == ([0], b"ee")


def test_each_row_spells_the_prompts_end_in_its_own_tokens(finished_run):
    model, _ = load_model(finished_run / "model.pt")
    vocab, end, masks = BasicTokenizer(out_dir=finished_run).vocab, " caf\u00e9s.\n".encode(), []
    allowed = spelling(end, vocab, 200, torch.device("cpu"))
    tokens = model.stream(torch.full((200, 1), ord("1")), 12, 2.0, seed=1,
                          allowed=lambda drawn: masks.append(allowed(drawn)) or masks[-1])
    rows = torch.stack([*tokens], dim=1).tolist()
    assert all(b"".join(vocab[token] for token in row).startswith(end) for row in rows)
    assert len({tuple(row) for row in rows}) > 100 and masks[-1] is None


# ---- where text comes from and goes to ----

def test_a_prompt_file_is_read_like_a_text(sample, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfROMEO:\r\nspeak\r")
    monkeypatch.chdir(tmp_path)
    given, _ = sample("--prompt", "ROMEO:\nspeak\n")
    text, notes = sample("--prompt_file", "pro*")
    assert text == given and "note: prompt.txt has CRLF or CR line ends" in notes
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ROMEO:\nspeak\n")))
    assert sample("--prompt_file", "-")[0] == given
    text, notes = sample("--prompt", "prompt.txt")
    assert text.startswith(b"prompt.txt") and "note: prompt.txt is a file's name" in notes


def test_each_token_is_shown_at_once_but_no_half_character():
    class Terminal(io.BytesIO):
        def flush(self):
            shown.append(self.getvalue().decode())

    shown, terminal = [], Terminal()
    tokens = (torch.tensor([token]) for token in "\u00e9a\u00e9".encode()[1:-1])
    one_byte_each = SimpleNamespace(decode_bytes=bytes)
    assert write_stream(tokens, one_byte_each, list("b\u00e9".encode()[:-1]), terminal) == 3
    assert shown == ["b\u00e9", "b\u00e9a", "b\u00e9a"]
    assert terminal.getvalue().decode() == "b\u00e9a\ufffd\n"
    tokens, terminal = (torch.tensor([token]) for token in b"romeo"), Terminal()
    write_stream(tokens, one_byte_each, list(b"I, rom"), terminal, known=3)  # "rom" comes again
    assert terminal.getvalue() == b"I, romeo\n"


def test_an_interrupt_ends_cleanly_with_what_there_is(finished_run):
    process = start(ROOT / "generate.py", "--out_dir", finished_run, "--max_new_tokens", 10**6)
    first = process.stdout.read(50)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and len(first + out) >= 50
    assert "Traceback" not in err and "tokens a second" in err


@pytest.mark.skipif(sys.platform != "linux" or os.cpu_count() < 2 or "openblas" not in str(
    np.show_config(mode="dicts")), reason="counts OpenBLAS's threads in /proc")
@pytest.mark.parametrize("own, threads", [(None, 1), ("2", 2)])
def test_numpy_gets_one_thread_or_what_it_is_told_and_pytorch_all(monkeypatch, own, threads):
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    if own:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", own)
    code = ("import os, generate as g; print(len(os.listdir('/proc/self/task')), "
            "os.environ.get('OPENBLAS_NUM_THREADS'), g.torch.get_num_threads())")
    said = python("-c", code, cwd=ROOT).stdout
    assert said.split() == [str(threads), str(own), str(torch.get_num_threads())]


def test_training_and_quantizing_show_what_is_sampled_by_default(finished_run, quantized_run):
    def sampled(file, *flags):
        file = quantized_run / file
        return run("generate.py", "--checkpoint", file, "--seed", 1337, *flags).stdout

    shown = (finished_run / "stdout.txt").read_text()
    assert f"):\n{sampled('model.pt', '--max_new_tokens', 200)}\nmodel.pt," in shown
    shown = (quantized_run / "stdout.txt").read_text()
    for name, file in ("float32", "model.pt"), ("int8", "model_int8.pt"):
        text = sampled(file, "--max_new_tokens", 150, "--temperature", TEMPERATURE)
        assert f"--- {name}, seed 1337 ---\n{text}\n" in shown


def test_what_is_missing_or_wrong_is_named(finished_run, tiny_text, tmp_path):
    none, other = tmp_path / "none", tmp_path / "other"
    alone = shutil.copy(finished_run / "model.pt", tmp_path)
    BasicTokenizer(tiny_text, 290, out_dir=other)
    for message, *flags in (
            ("no checkpoint at .*other.model.pt: train one with `python train.py`",
             "--out_dir", other),
            ("other is a folder: name it with --out_dir", "--checkpoint", other),
            ("copy merges.pkl and vocab.pkl", "--out_dir", tmp_path),
            ("another tokenizer", "--out_dir", other, "--checkpoint", alone),
            ("cannot read .*none", "--prompt_file", none), ("--device tpu", "--device", "tpu")):
        assert re.search(message, complaint(run("generate.py", *flags)))
    for file in alone, finished_run / "last.pt.old":
        assert "name another file" in complaint(run("generate.py", "--out", file), 2)
