"""generate.py as a user meets it: any prompt, streams that break no character, one-line errors."""
import os
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT, complaint, run
from generate import main, overlap, spelling, take_back
from model import load_model
from tokenizer import TEMPERATURE, BasicTokenizer


def generate(folder, *args, **options):
    return run("generate.py", "--out_dir", folder, "--device", "cpu", *args, **options)


def test_it_continues_the_prompt_and_tells_its_speed(finished_run):
    process = generate(finished_run, "--prompt", "ROMEO:", "--max_new_tokens", 30, "--seed", 1)
    assert process.returncode == 0
    assert process.stdout.startswith("ROMEO:") and len(process.stdout) > 30
    assert f"using {finished_run / 'model.pt'}, iteration" in process.stderr
    assert "30 tokens in" in process.stderr and "tokens a second" in process.stderr


@pytest.mark.parametrize("prompt", ["\n", "ROMEO:"])
def test_same_seed_same_text(finished_run, prompt):
    first, second, other = (generate(finished_run, "--seed", seed, "--max_new_tokens", 50,
                                     "--prompt", prompt).stdout for seed in (1, 1, 2))
    assert first == second != other


@pytest.mark.parametrize("prompt", ["\n", "ROMEO:"])
def test_samples_are_independent_of_their_number(finished_run, prompt):
    def samples(number):
        out = generate(finished_run, "--num_samples", number, "--seed", 5,
                       "--max_new_tokens", 40, "--prompt", prompt).stdout
        return [part.split(" ---\n")[1].rstrip("\n") for part in out.split("--- sample ")[1:]]

    three, six = samples(3), samples(6)
    assert six[:3] == three and len(set(six)) == len(six) == 6


def test_temperature_zero_is_greedy_whatever_the_seed(finished_run):
    first, other = (generate(finished_run, "--temperature", 0, "--seed", seed,
                             "--max_new_tokens", 20).stdout for seed in (1, 2))
    assert first == other


@pytest.mark.parametrize("prompt", [
    "", "\n", "\N{SNOWMAN} \U0001F600 \u4f60\u597d", "never in the text: ~^{}\x01",
    "\udce9 not UTF-8", "x" * 3000,
], ids=["empty", "line end", "unicode", "unseen bytes", "raw byte", "long"])
def test_prompts_of_every_kind(finished_run, prompt):
    process = generate(finished_run, "--prompt", prompt, "--max_new_tokens", 5,
                       env=os.environ | {"PYTHONUTF8": "1"})
    assert process.returncode == 0 and "5 tokens in" in process.stderr
    assert ("only the last 16 count" in process.stderr) == (len(prompt) > 20)
    if "\udce9" not in prompt:
        assert process.stdout.startswith(prompt or "\n")


# ---- the end of a prompt ----

@pytest.fixture(scope="module")
def plain_run(shakespeare, tmp_path_factory):
    """The folder of a small network trained on the real text without BPE-dropout."""
    folder = tmp_path_factory.mktemp("plain")
    process = run("train.py", "--data_path", shakespeare, "--out_dir", folder, "--device", "cpu",
                  "--n_embd", 32, "--n_head", 4, "--n_layer", 1, "--block_size", 16,
                  "--dropout", 0, "--attention_dropout", 0, "--batch_size", 32,
                  "--learning_rate", "1e-2", "--max_iters", 150, "--eval_iters", 4)
    assert process.returncode == 0, process.stderr
    return folder


@pytest.mark.parametrize("prompt", ["ROMEO:", "GLOUCESTER:", "BENVOLIO:"])
def test_the_line_ends_after_a_name_though_its_colon_and_the_line_end_are_one_token(
        plain_run, prompt):
    def line_ends(ids, text):
        tokens = model.stream(torch.tensor([ids]).expand(500, -1), 5, seed=1,
                              allowed=spelling(text, vocab, 500, torch.device("cpu")))
        texts = (b"".join(vocab[token] for token in row)
                 for row in torch.stack([*tokens], dim=1).tolist())
        return sum(row[len(text):].startswith(b"\n") for row in texts) / 500

    model, vocab = load_model(plain_run / "model.pt")[0], BasicTokenizer(out_dir=plain_run).vocab
    ids = BasicTokenizer(out_dir=plain_run).encode_array(prompt).tolist()
    assert line_ends(ids, b"") < 0.1 and line_ends(*take_back(ids, vocab)) > 0.9
    flags = ["--num_samples", 100, "--max_new_tokens", 1, "--seed", 1, "--prompt", prompt]
    assert generate(plain_run, *flags).stdout.count(f"\n{prompt}\n") > 90


def test_the_fewest_tokens_are_taken_back_that_a_longer_one_could_replace(plain_run, shakespeare):
    tokenizer = BasicTokenizer(out_dir=plain_run)
    text, vocab, chance = shakespeare.read_bytes(), tokenizer.vocab, random.Random(1)
    tokens = tokenizer.encode_array("ROMEO:").tolist()
    assert take_back(tokens, vocab) == (tokens[:-2], b"O:")
    seen = set()
    for _ in range(300):
        start = chance.randrange(10**6)
        prompt = text[start:start + chance.randint(1, 40)]
        ids = tokenizer.encode_array(prompt).tolist()
        kept, taken = take_back(ids, vocab)
        assert tokenizer.decode_bytes(kept) + taken == prompt and kept == ids[:len(kept)] != []
        reach = max(length for length in range(len(prompt) + 1) if length == 0 or any(
            token.startswith(prompt[-length:]) and token != prompt[-length:]
            for token in vocab.values()))
        assert len(taken) >= reach or len(kept) == 1
        if taken:
            assert len(taken) - len(vocab[ids[len(kept)]]) < reach
        seen.add(len(ids) - len(kept))
    assert seen >= {0, 1, 2}


def test_worked_examples_of_the_docstring():
    assert overlap(b"ROMEO:", b"O:\n") == 2 and overlap(b"ROMEO:", b"O:") == 0


def test_each_row_spells_the_end_of_the_prompt_by_itself(finished_run):
    model = load_model(finished_run / "model.pt")[0]
    vocab, end, rows = BasicTokenizer(out_dir=finished_run).vocab, "caf\u00e9s.\n".encode(), 200
    masks, allowed = [], spelling(end, vocab, rows, torch.device("cpu"))

    def watched(drawn):
        masks.append(allowed(drawn))
        return masks[-1]

    idx = torch.full((rows, 1), ord(" "))
    tokens = torch.stack([*model.stream(idx, 12, 2.0, seed=1, allowed=watched)])
    texts = [b"".join(vocab[token] for token in row) for row in tokens.T.tolist()]
    assert all(text.startswith(end) for text in texts)
    assert len({tuple(row) for row in tokens.T.tolist()}) > 100, "in tokens of its own"
    assert masks[0].shape == (rows, len(vocab)) and masks[-1] is None
    for mask, drawn in zip(masks, tokens):
        assert mask is None or mask[torch.arange(rows), drawn].all()
        assert mask is None or not mask.all()


@pytest.mark.parametrize("prompt", [
    b"R", b"O:", b"ROMEO:", b"caf\xc3\xa9", b"\xf0\x9f\x98\x80", b"the caf\xc3",
    b"no UTF-8: \xff", b"ROMEO: what say you \xe2\x80\x94 1 caf\xc3\xa9s." * 30,
])
def test_what_is_printed_begins_with_the_prompt_byte_for_byte(
        finished_run, tmp_path, monkeypatch, prompt):
    (tmp_path / "prompt").write_bytes(prompt)
    whole = prompt.removesuffix(b"\xc3").decode(errors="replace").encode()  # but for half a letter
    for number, count in (1, 1), (1, 8), (3, 1), (3, 8):
        flags = ["--prompt_file", tmp_path / "prompt", "--num_samples", number, "--seed", 1,
                 "--max_new_tokens", count, "--out", tmp_path / "out", "--out_dir", finished_run]
        monkeypatch.setattr(sys, "argv", ["generate.py", "--device", "cpu", *map(str, flags)])
        main()
        text = (tmp_path / "out").read_bytes()
        parts = text.split(b" ---\n")[1:] if number > 1 else [text]
        assert len(parts) == number and all(part.startswith(whole) for part in parts)


# ---- where text comes from and goes to ----

def test_a_prompt_from_a_file_and_from_standard_input(finished_run, tmp_path):
    (tmp_path / "prompt.txt").write_text("JULIET: speak")
    flags = ["--max_new_tokens", 10, "--seed", 1]
    given = generate(finished_run, "--prompt", "JULIET: speak", *flags)
    from_file = generate(finished_run, "--prompt_file", tmp_path / "prompt.txt", *flags)
    piped = generate(finished_run, "--prompt_file", "-", *flags, stdin=None, input="JULIET: speak")
    assert given.stdout == from_file.stdout == piped.stdout


def test_a_prompt_file_is_read_like_a_text(finished_run, tmp_path, monkeypatch, capsys):
    def sampled(*flags):
        monkeypatch.setattr(sys, "argv", [
            "generate.py", "--out_dir", str(finished_run), "--out", str(tmp_path / "out"),
            "--device", "cpu", "--seed", "1", "--max_new_tokens", "5", *map(str, flags)])
        main()
        return (tmp_path / "out").read_bytes(), capsys.readouterr().err

    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfROMEO:\r\nspeak\r")
    (tmp_path / "saved.txt").write_bytes("ROMEO:".encode("utf-16"))
    monkeypatch.chdir(tmp_path)
    text, notes = sampled("--prompt_file", "pro*.txt")
    assert text == sampled("--prompt", "ROMEO:\nspeak\n")[0]
    assert "note: prompt.txt has CRLF or CR line ends" in notes
    text, notes = sampled("--prompt", "prompt.txt")
    assert text.startswith(b"prompt.txt") and "note: prompt.txt is a file's name" in notes
    with pytest.raises(ValueError, match="saved.txt is UTF-16, not UTF-8: convert it with"):
        sampled("--prompt_file", "saved.txt")
    with pytest.raises(SystemExit):
        sampled("--prompt_file", "*.txt")
    assert "*.txt stands for 2 files: name one" in capsys.readouterr().err


def test_out_writes_the_text_to_a_file(finished_run, tmp_path):
    flags, path = ["--seed", 1, "--max_new_tokens", 10], tmp_path / "text.txt"
    text = generate(finished_run, *flags).stdout
    assert generate(finished_run, *flags, "--out", path).stdout == ""
    assert path.read_text(encoding="utf-8") == text


def test_the_output_is_valid_utf8_at_every_flush(finished_run):
    """A high temperature draws bytes at random, so that broken characters are likely."""
    command = [sys.executable, ROOT / "generate.py", "--out_dir", finished_run,
               "--temperature", "50", "--max_new_tokens", "400", "--seed", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    pieces = iter(lambda: os.read(process.stdout.fileno(), 65536), b"")
    text = "".join(piece.decode("utf-8") for piece in pieces)  # raises for a piece that ends inside
    assert "\ufffd" in text
    process.wait()


@pytest.mark.skipif(sys.platform != "linux" or os.cpu_count() < 2 or "openblas" not in str(
    np.show_config(mode="dicts")), reason="counts OpenBLAS's threads in /proc")
@pytest.mark.parametrize("own, threads", [(None, 1), ("2", 2)])
def test_numpy_gets_one_thread_unless_told_otherwise_and_pytorch_all(own, threads):
    environ = os.environ | {"OPENBLAS_NUM_THREADS": own or ""}
    if own is None:
        del environ["OPENBLAS_NUM_THREADS"]
    code = ("import os, generate as g; print(len(os.listdir('/proc/self/task')), "
            "os.environ.get('OPENBLAS_NUM_THREADS'), g.torch.get_num_threads())")
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, text=True,
                             capture_output=True, check=True)
    assert process.stdout.split() == [str(threads), str(own), str(torch.get_num_threads())]


def test_a_closed_pipe_is_no_error(finished_run):
    script = f"{sys.executable} {ROOT / 'generate.py'} --out_dir {finished_run}"
    command = ["bash", "-o", "pipefail", "-c", f"{script} --max_new_tokens 3000 | head -c 20"]
    process = subprocess.run(command, capture_output=True, timeout=120)
    assert process.returncode == 0 and len(process.stdout) == 20
    assert process.stderr.startswith(b"using") and process.stderr.count(b"\n") == 1


def test_an_interrupt_ends_cleanly_with_what_there_is(finished_run):
    command = [sys.executable, ROOT / "generate.py", "--out_dir", finished_run,
               "--max_new_tokens", "1000000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = process.stdout.read(50)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and len(first + out) >= 50
    assert b"Traceback" not in err and b"tokens a second" in err


def test_training_and_quantizing_show_the_text_that_is_sampled_by_default(tiny_run, tiny_text):
    sample = generate(tiny_run, "--seed", 1337, "--max_new_tokens", 200).stdout
    assert f"):\n{sample}\nmodel.pt," in (tiny_run / "stdout.txt").read_text()
    quantized = run("quantize.py", "--out_dir", tiny_run, "--data_path", tiny_text).stdout
    sample = generate(tiny_run, "--seed", 1337, "--max_new_tokens", 150,
                      "--temperature", TEMPERATURE).stdout
    assert f"--- float32, seed 1337 ---\n{sample}\n---" in quantized


def test_an_int8_checkpoint_is_sampled_like_any_other(tiny_run, tiny_text):
    assert run("quantize.py", "--out_dir", tiny_run, "--data_path", tiny_text).returncode == 0
    process = run("generate.py", "--checkpoint", tiny_run / "model_int8.pt", "--prompt", "ROMEO:",
                  "--max_new_tokens", 20)
    assert process.returncode == 0 and "20 tokens in" in process.stderr
    assert process.stdout.startswith("ROMEO:")


def test_what_is_missing_or_wrong_is_named(tiny_run, tmp_path):
    for flags in (["--out_dir", tiny_run, "--checkpoint", tmp_path / "none.pt"],
                  ["--out_dir", tmp_path], ["--checkpoint", tmp_path / "none.pt"]):
        assert "no checkpoint at" in complaint(run("generate.py", *flags))
    (tmp_path / "model.pt").write_bytes((tiny_run / "model.pt").read_bytes())
    assert "copy merges.pkl and vocab.pkl" in complaint(run("generate.py", "--out_dir", tmp_path))
    assert "prompt.txt" in complaint(generate(tiny_run, "--prompt_file", tmp_path / "prompt.txt"))
    assert "--device" in complaint(generate(tiny_run, "--device", "tpu"))
    (tiny_run / "model.pt").write_bytes(b"not a checkpoint")
    assert "model.pt is not a checkpoint" in complaint(generate(tiny_run))


def test_a_tokenizer_that_does_not_fit_is_named(tiny_run, tiny_text, tmp_path):
    BasicTokenizer(tiny_text, 290, out_dir=tmp_path / "other")
    shutil.copytree(tmp_path / "other", tiny_run, dirs_exist_ok=True)
    assert "another tokenizer" in complaint(generate(tiny_run))
