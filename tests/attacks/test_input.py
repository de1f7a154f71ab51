"""Texts, prompts and flags of every kind: taken as they are, or named in one line."""
import io
import os
import random
import resource
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, complaint, run

import bench
import generate
import plots
import quantize
import tokenizer
import train
from model import load_model
from tokenizer import BasicTokenizer

attack = pytest.mark.attack


# ---- texts ----

@pytest.mark.parametrize("change, message", [
    (lambda text: b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"), None),
    (lambda text: b"", "text.txt is empty"), (lambda text: text.replace(b"\n", b"\0"), "text.txt is binary"),
    (lambda text: text.decode().encode("utf-16"), "text.txt is UTF-16, not UTF-8"),
    (lambda text: text.decode().encode("utf-16-be"), "text.txt is UTF-16, not UTF-8"),
    (lambda text: text.decode().replace("\u2014", "-").encode("latin-1"), "text.txt is not UTF-8 .*Latin-1"),
    (lambda text: text[:-1] + b"\xc3", "text.txt is not UTF-8"), (lambda text: b"x", "too short.*--block_size"),
    (lambda text: text[:160], "too short.*smaller --block_size"), (lambda text: b"a" * 300, "vocab_size can be")],
    ids=["BOM and CRLF", "empty", "NUL", "UTF-16", "UTF-16-BE", "Latin-1", "cut in a character", "one character", "short",
         "one letter"])
def test_texts_of_every_kind_are_trained_on_or_named(tiny_text, tmp_path, new_trainer, change, message):
    (tmp_path / "text.txt").write_bytes(change(tiny_text.read_bytes()))
    flags = [*TINY, "--data_path", tmp_path / "text.txt", "--out_dir", tmp_path / "run", "--max_iters", 1]
    if message is None:
        new_trainer(*flags).run()
        assert b"\r\n" in BasicTokenizer(out_dir=tmp_path / "run").decode_bytes(range(300))
    else:
        with pytest.raises(ValueError, match=message) as error:
            new_trainer(*flags)
        assert "\n" not in str(error.value) and (not (tmp_path / "run").exists() or "vocab_size" in message)


def test_what_cannot_be_trained_on_leaves_no_folder(tiny_text, tmp_path):
    for flags, message in (["--data_path", tmp_path / "none.txt"], "there is no text at"), (
            ["--data_path", tiny_text, "--block_size", 5000], "smaller --block_size"), (
            ["--data_path", tiny_text, "--device", "tpu"], "--device tpu"):
        assert message in complaint(run("train.py", *TINY, "--out_dir", tmp_path / "run", *flags))
        assert not (tmp_path / "run").exists()


def test_text_that_the_output_cannot_hold_is_no_error(tiny_run, tiny_text, tmp_path):
    """A sample can hold any character, and the output's encoding may know few."""
    ascii_only, text = os.environ | {"PYTHONIOENCODING": "ascii"}, ["--data_path", tiny_text]
    word = "caf\N{LATIN SMALL LETTER E WITH ACUTE}s \N{EM DASH}"
    for command in (["train.py", *TINY, *text, "--out_dir", tmp_path / "new", "--max_iters", 1],
                    ["quantize.py", *text, "--out_dir", tiny_run],
                    ["tokenizer.py", "vocab", *text, "--out_dir", tiny_run],
                    ["tokenizer.py", "show", word, "--out_dir", tiny_run]):
        process = run(*command, env=ascii_only)
        assert process.returncode == 0 and "?" in process.stdout, process.stderr


@pytest.mark.parametrize("ids", [["72, 105"], ["[72, 105]"], ["72,105"], ["[72,", "105]"], ["72", "105"]])
def test_ids_are_decoded_as_python_prints_them(finished_run, ids):
    assert run("tokenizer.py", "decode", "--out_dir", finished_run, *ids).stdout == "Hi"
    piped = run("tokenizer.py", "decode", "--out_dir", finished_run, stdin=None, input=" ".join(ids) + "\n")
    assert piped.stdout == "Hi"


def random_text(chance):
    """Returns characters of all of Unicode, surrogates that stand for bytes, and NUL."""
    draw = [lambda: chr(chance.randrange(128)), lambda: chr(chance.randrange(0xD800)),
            lambda: chr(chance.randrange(0xE000, 0x110000)), lambda: chr(chance.randrange(0xDC80, 0xDD00)),
            lambda: chance.choice("\0\r\n\ufeff\u200d\u0301\U0001F600")]
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
            out, new = io.BytesIO(), network.stream(torch.tensor([ids]), 5, seed=number)
            assert generate.write_stream(new, tokens, ids, out) == 5
            assert out.getvalue().decode("utf-8").startswith(tokens.decode(ids).rstrip("\ufffd"))
    tokens.encode_array("\ud800 and \udfff alone")
    print("\nrandom texts: 3,000 encoded, decoded and, every tenth, continued")


@attack
@pytest.mark.parametrize("content", [
    b"NUL \0 and \0\0", b"\xef\xbb\xbfBOM\r\nCRLF\r\n", "Latin-1: caf\xe9".encode("latin-1"), "UTF-16".encode("utf-16"),
    b"\xff" * 100, b"10 MB \xf0\x9f\x98\x80\n" * 870_000], ids=["NUL", "BOM", "Latin-1", "UTF-16", "0xFF", "10 MB"])
def test_prompt_files_of_any_bytes_are_continued(finished_run, tmp_path, content):
    (tmp_path / "prompt").write_bytes(content)
    process = run("generate.py", "--out_dir", finished_run, "--max_new_tokens", 5, "--device", "cpu", "--prompt_file",
                  tmp_path / "prompt", text=False)
    assert process.returncode == 0 and b"5 tokens in" in process.stderr and b"Traceback" not in process.stderr
    assert process.stdout.startswith(content.decode(errors="replace").rstrip("\ufffd").encode())


# ---- flags ----

NONSENSE = ["", "x", "-", "1.2.3", "0x10", "\N{SNOWMAN}", "None", "1e"]
LARGEST, TOO_LARGE = str(2**63 - 1), str(2**63)
WHOLE, REAL = ["1.5", "nan", "inf", *NONSENSE], NONSENSE
FROM_1 = (["1", "2", LARGEST], ["0", "-1", TOO_LARGE, *WHOLE])  # whole numbers: values that pass, and that do not
FROM_0 = (["0", "1", LARGEST], ["-1", TOO_LARGE, *WHOLE])
SHARE = (["0", "0.5", "0.999999", "1e-300"], ["-0.1", "1", "1.5", "nan", "inf", "-inf", *REAL])
POSITIVE = (["0", "1e-300", "1e300"], ["-1e-300", "nan", "inf", *REAL])
TEMPERATURE = (["0.1", "1", "1e300"], ["0.09", "0", "-1", "nan", "inf", *REAL])
VOCABULARY = (["256", str(tokenizer.MAX_VOCAB)], ["255", str(tokenizer.MAX_VOCAB + 1), "-1", *WHOLE])
ANY = (["x", "no/such/file"], [])
BOUNDS = {
    "train": {
        "data_path": ANY, "out_dir": ANY, "device": ANY, "teacher": ([__file__], ["", "no/such/file"]),
        "preset": (["reference", "fast", "best"], ["", "slow"]), "vocab_size": VOCABULARY, "seed": FROM_0,
        "dtype": (["auto", "float32", "bfloat16", "float16"], ["", "int8"]),
        "n_layer": (["1", "1000"], ["0", "1001", str(10**30), *WHOLE]), "n_head": (["1", "232"], ["0", "233", *WHOLE]),
        "n_embd": (["6", LARGEST], ["0", "5", TOO_LARGE, *WHOLE]),
        **dict.fromkeys(["block_size", "batch_size", "max_iters", "eval_interval"], FROM_1),
        **dict.fromkeys(["gradient_accumulation_steps", "warmup_iters", "lr_decay_iters", "eval_iters"], FROM_0),
        **dict.fromkeys(["dropout", "attention_dropout", "bpe_dropout", "beta1", "beta2"], SHARE),
        **dict.fromkeys(["train_temperature", "teacher_temperature"], TEMPERATURE),
        **dict.fromkeys(["learning_rate", "min_lr", "weight_decay", "muon_lr", "init_std", "grad_clip"], POSITIVE)},
    "generate": {
        **dict.fromkeys(["prompt", "prompt_file", "out_dir", "checkpoint", "out", "device"], ANY),
        "max_new_tokens": FROM_1, "temperature": POSITIVE, "top_k": FROM_1, "seed": FROM_0,
        "top_p": (["1e-300", "0.5", "1"], ["0", "1.000001", "-1", "nan", *REAL]),
        "num_samples": (["1", "65536"], ["0", "65537", "-1", *WHOLE])},
    "quantize": dict.fromkeys(["out_dir", "checkpoint", "out", "data_path"], ANY),
    "plots": {"out_dir": ANY, "attention": ANY, "format": (["png", "svg"], ["gif", ""])},
    "tokenizer train": {"out_dir": ANY, "data_path": ANY, "vocab_size": VOCABULARY},
    **{f"tokenizer {command}": {"out_dir": ANY} for command in ("encode", "decode", "show")},
    "tokenizer vocab": {"out_dir": ANY, "data_path": ANY},
    "bench tokenizer": {"data_path": ANY, "repeats": FROM_1, "megabytes": (["1", "1,10"], ["0", "1,,2", "1,-1", *WHOLE])},
    "bench train": {"repeats": FROM_1, "batch_size": FROM_1, "device": ANY, "nanogpt": ANY},
    "bench sample": {"repeats": FROM_1, "device": ANY}, "bench loss": {"out_dir": ANY, "data_path": ANY},
    "bench quantize": {"repeats": FROM_1, "out_dir": ANY, "data_path": ANY},
}
SWITCHES = {"train": ["resume", "compile", "no-compile"], "tokenizer train": ["verbose"]}
MODULES = {"train": train, "generate": generate, "quantize": quantize, "plots": plots, "tokenizer": tokenizer,
           "bench": bench}


@pytest.mark.parametrize("command", BOUNDS)
def test_every_flag_at_below_and_above_its_bounds(command, monkeypatch, capsys):
    name, *sub = command.split()

    def given(*flags):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *sub, *flags])
        try:
            MODULES[name].parse_args()
        except SystemExit as end:
            out, err = capsys.readouterr()
            return end.code, out, err.splitlines()
        return None

    shown = given("--help")[1]
    flags = {word.strip("[],") for word in shown.split() if word.strip("[]").startswith("--")}
    flags = {flag for flag in flags - {"--help"} if f"\n  {flag}" in shown or f", {flag}" in shown}
    expected = {f"--{flag}" for flag in [*BOUNDS[command], *SWITCHES.get(command, [])]}
    assert flags == expected, "every flag is in the table"
    for flag, (good, bad) in BOUNDS[command].items():
        for value in good:
            assert given(f"--{flag}={value}") is None, f"--{flag} {value}"
        for value in bad:
            status, _, lines = given(f"--{flag}={value}")
            complaints = [line for line in lines if not line.startswith(("usage:", " "))]
            assert status == 2 and complaints == lines[-1:] and f"--{flag}" in lines[-1], (flag, value, lines)
        assert given(f"--{flag}")[0] == 2  # without its value
    assert given("--nonsense")[0] == 2


@pytest.mark.parametrize("flags", [["--n_embd", 10**9], ["--batch_size", 10**13], ["--eval_iters", 10**13],
                                   ["--n_embd", 10**18]])
def test_more_than_the_memory_is_one_line(tiny_text, tmp_path, flags):
    process = run("train.py", *TINY, "--data_path", tiny_text, "--out_dir", tmp_path, "--max_iters", 1, *flags)
    assert "not enough memory" in complaint(process)


def test_more_samples_than_the_memory_holds_are_one_line():
    process = run("generate.py", "--out_dir", tokenizer.PRETRAINED, "--device", "cpu", "--num_samples", 2**16,
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33)))
    using, refused = process.stderr.splitlines()
    assert process.returncode == 1 and using.startswith("using ")
    assert "not enough memory: use a smaller --num_samples" in refused


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
@pytest.mark.parametrize("flags", [
    ["--top_k", 10_000], ["--top_k", 1], ["--top_p", 1e-300], ["--temperature", 1e-300], ["--temperature", 1e300],
    ["--seed", LARGEST], ["--num_samples", 3, "--top_k", 301]])
def test_extreme_flags_of_sampling_sample(finished_run, flags):
    process = run("generate.py", "--out_dir", finished_run, "--device", "cpu", "--max_new_tokens", 20, *flags)
    count = 60 if "--num_samples" in flags else 20
    assert process.returncode == 0 and f"\n{count} tokens in" in process.stderr, process.stderr
