"""Texts, prompts and flags of every kind: taken as they are, or named in one line."""
import io
import random
import resource
import sys

import pytest
import torch

import bench
import generate
import plots
import quantize
import tokenizer
import train
from conftest import TINY, run
from model import load_model
from tokenizer import BasicTokenizer, out_of_memory

attack = pytest.mark.attack


# ---- texts ----

def encoded(codec):
    return lambda text: text.decode().replace("\u2014", "-").encode(codec)


@pytest.mark.parametrize("change, message", [
    (lambda text: b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"), None),
    (lambda text: b"", "text.txt is empty"),
    (lambda text: text.replace(b"\n", b"\0"), "text.txt is binary"),
    (encoded("utf-16"), "text.txt is UTF-16, not UTF-8"),
    (encoded("utf-16-be"), "text.txt is UTF-16, not UTF-8"),
    (encoded("latin-1"), "text.txt is not UTF-8 but Windows-1252"),
    (lambda text: text[:-1] + b"\xc3", "text.txt is not UTF-8 at its end"),
    (lambda text: text[:9999] + b"\xff" + text[9999:], "text.txt is not UTF-8 in one place"),
    (lambda text: b"x", "too short"), (lambda text: text[:160], "smaller --block_size"),
    (lambda text: b"a" * 300, "vocab_size can be")],
    ids=["BOM and CRLF", "empty", "NUL", "UTF-16", "UTF-16-BE", "Latin-1", "cut in a character",
         "a bad byte", "one character", "short", "one letter"])
def test_texts_of_every_kind_are_trained_on_or_named(tiny_text, tmp_path, train_here, change,
                                                     message):
    path, out = tmp_path / "text.txt", tmp_path / "run"
    path.write_bytes(change(tiny_text.read_bytes()))
    flags = [*TINY, "--data_path", path, "--out_dir", out, "--max_iters", 1]
    if message is None:
        train_here(*flags)
        assert b"\r" not in BasicTokenizer(out_dir=out).decode_bytes(range(256, 300))
    else:
        with pytest.raises(ValueError, match=message) as error:
            train_here(*flags)
        assert "\n" not in str(error.value) and not (out / "model.pt").exists()
        assert not out.exists() or "vocab_size" in message  # which the text is tried for


@pytest.mark.parametrize("flags, message", [
    (["--data_path", "no/such/text.txt"], "there is no text at .*no/such/text.txt"),
    (["--block_size", 5000], "smaller --block_size"), (["--device", "tpu"], "--device tpu")])
def test_what_cannot_be_trained_leaves_no_folder(tiny_text, tmp_path, train_here, flags, message):
    with pytest.raises(ValueError, match=message):
        train_here(*TINY, "--data_path", tiny_text, "--out_dir", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def random_text(chance):
    """Returns characters of all of Unicode, surrogates that stand for bytes, and NUL."""
    draw = [lambda: chr(chance.randrange(128)), lambda: chr(chance.randrange(0xD800)),
            lambda: chr(chance.randrange(0xE000, 0x110000)),
            lambda: chr(chance.randrange(0xDC80, 0xDD00)),
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
    b"NUL \0 and \0\0", b"\xef\xbb\xbfBOM\r\nCRLF\r\n", "caf\xe9".encode("latin-1"),
    b"\xff" * 100, b"10 MB \xf0\x9f\x98\x80\n" * 870_000],
    ids=["NUL", "BOM and CRLF", "Latin-1", "0xFF", "10 MB"])
def test_prompt_files_of_any_bytes_are_continued(finished_run, tmp_path, content):
    (tmp_path / "prompt").write_bytes(content)
    process = run("generate.py", "--out_dir", finished_run, "--max_new_tokens", 5,
                  "--device", "cpu", "--prompt_file", tmp_path / "prompt", text=False)
    assert process.returncode == 0 and b"5 tokens in" in process.stderr, process.stderr
    text = content.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").rstrip("\ufffd")
    assert process.stdout.startswith(text.encode())


@pytest.mark.parametrize("ids", [["72, 105"], ["[72, 105]"], ["72,105"], ["[72,", "105]"],
                                 ["72", "105"]])
def test_ids_are_decoded_as_python_prints_them(finished_run, ids):
    assert run("tokenizer.py", "decode", "--out_dir", finished_run, *ids).stdout == "Hi"


# ---- flags ----

NONSENSE = ["", "x", "-", "1.2.3", "0x10", "\N{SNOWMAN}", "None", "1e"]
LARGEST, TOO_LARGE = str(2**63 - 1), str(2**63)
WHOLE, REAL = ["1.5", "nan", "inf", TOO_LARGE, *NONSENSE], ["nan", "inf", "-inf", *NONSENSE]
FROM_1 = (["1", "2", LARGEST], ["0", "-1", *WHOLE])  # values that pass, and that do not
FROM_0 = (["0", "1", LARGEST], ["-1", *WHOLE])
SHARE = (["0", "0.5", "0.999999", "1e-300"], ["-0.1", "1", "1.5", *REAL])
POSITIVE = (["0", "1e-300", "1e300"], ["-1e-300", *REAL])
TEMPERATURE = (["0.1", "1", "1e300"], ["0.09", "0", "-1", *REAL])
MOST = tokenizer.MAX_VOCAB
VOCABULARY = (["256", str(MOST)], ["255", str(MOST + 1), "-1", *WHOLE])
ANY = (["x", "no/such/file"], [])
BOUNDS = {
    "train": {
        **dict.fromkeys(["data_path", "out_dir", "device"], ANY),
        "teacher": ([__file__], ["", "no/such/file"]),
        "init_from": ([str(tokenizer.PRETRAINED / "model.pt")], ["", "no/such/file"]),
        "init_heads": (["0", "1"], ["-1", "2", *WHOLE]),
        "even_windows": (["0", "1"], ["-1", "2", *WHOLE]),
        "preset": (["reference", "fast", "best"], ["", "slow"]),
        "dtype": (["auto", "float32", "bfloat16", "float16"], ["", "int8"]),
        "vocab_size": VOCABULARY, "n_layer": (["1", "1000"], ["0", "1001", *WHOLE]),
        "n_head": (["1", "232"], ["0", "233", *WHOLE]),
        "n_embd": (["6", LARGEST], ["0", "5", *WHOLE]), "seed": FROM_0,
        **dict.fromkeys(["block_size", "batch_size", "max_iters", "eval_interval"], FROM_1),
        **dict.fromkeys(["gradient_accumulation_steps", "warmup_iters", "lr_decay_iters",
                         "eval_iters"], FROM_0),
        **dict.fromkeys(["dropout", "attention_dropout", "bpe_dropout", "beta1", "beta2"], SHARE),
        **dict.fromkeys(["train_temperature", "teacher_temperature"], TEMPERATURE),
        **dict.fromkeys(["learning_rate", "min_lr", "weight_decay", "muon_lr", "init_std",
                         "grad_clip"], POSITIVE)},
    "generate": {
        **dict.fromkeys(["prompt", "prompt_file", "out_dir", "checkpoint", "out", "device"], ANY),
        "max_new_tokens": FROM_1, "temperature": POSITIVE, "top_k": FROM_1, "seed": FROM_0,
        "top_p": (["1e-300", "0.5", "1"], ["0", "1.000001", "-1", *REAL]),
        "num_samples": (["1", "65536"], ["0", "65537", "-1", *WHOLE])},
    "quantize": dict.fromkeys(["out_dir", "checkpoint", "out", "data_path"], ANY),
    "plots": {"out_dir": ANY, "attention": ANY, "format": (["png", "svg"], ["gif", ""])},
    "tokenizer train": {"out_dir": ANY, "data_path": ANY, "vocab_size": VOCABULARY},
    **{f"tokenizer {command}": {"out_dir": ANY} for command in ("encode", "decode", "show")},
    "tokenizer vocab": {"out_dir": ANY, "data_path": ANY},
    "bench tokenizer": {"data_path": ANY, "repeats": FROM_1,
                        "megabytes": (["1", "1,10"], ["0", "1,,2", "1,-1", *WHOLE])},
    "bench train": {"data_path": ANY, "repeats": FROM_1, "batch_size": FROM_1, "device": ANY,
                    "nanogpt": ANY},
    "bench sample": {"repeats": FROM_1, "device": ANY, "llama2c": ANY},
    "bench loss": {"out_dir": ANY, "data_path": ANY},
    "bench quantize": {"repeats": FROM_1, "out_dir": ANY, "data_path": ANY},
}
SWITCHES = {"train": ["resume", "compile", "no-compile"], "tokenizer train": ["verbose"],
            "bench sample": ["beside"]}
MODULES = {module.__name__: module
           for module in (train, generate, quantize, plots, tokenizer, bench)}


@pytest.mark.parametrize("command", BOUNDS)
def test_every_flag_at_below_and_above_its_bounds(command, monkeypatch, capsys):
    name, *sub = command.split()

    def given(*flags):
        """Returns None if the flags pass, else the status, the output and lines of the error."""
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *sub, *flags])
        try:
            MODULES[name].parse_args()
        except SystemExit as end:
            out, err = capsys.readouterr()
            return end.code, out, err.splitlines()

    shown = given("--help")[1]
    flags = {word.strip("[],") for word in shown.split() if word.strip("[]").startswith("--")}
    flags = {flag for flag in flags if f"\n  {flag}" in shown or f", {flag}" in shown} - {"--help"}
    assert flags == {f"--{flag}" for flag in [*BOUNDS[command], *SWITCHES.get(command, [])]}
    for flag, (good, bad) in BOUNDS[command].items():
        for value in good:
            assert given(f"--{flag}={value}") is None, f"--{flag} {value}"
        for value in bad:
            status, _, lines = given(f"--{flag}={value}") or (0, "", [f"--{flag} {value} passed"])
            errors = [line for line in lines if not line.startswith(("usage:", " "))]
            assert status == 2 and errors == lines[-1:] and f"--{flag}" in lines[-1], lines
        assert given(f"--{flag}")[0] == 2  # without its value
    assert given("--nonsense")[0] == 2


def test_patterns_that_the_shell_left_alone_stand_for_their_files(tmp_path, monkeypatch, capsys):
    """On Windows, *.txt reaches a program as it is."""
    files = [tmp_path / name for name in ("best-1.pt", "best-2.pt", "one [1].txt", "[1].txt")]
    for path in files:
        path.touch()
    flags = ["--teacher", str(tmp_path / "best-*.pt"), str(files[2]), str(tmp_path / "?ne*")]
    assert train.parse_args(flags)[0].teacher == [str(files[place]) for place in (0, 1, 2, 2)]
    with pytest.raises(SystemExit):
        train.parse_args(["--teacher", str(tmp_path / "none-*")])
    assert "no file at --teacher" in capsys.readouterr().err
    flags = ["--init_from", str(tmp_path / "*2.pt")]
    assert train.make_parser().parse_args(flags).init_from == files[1].resolve()
    for script, flag in (generate, "--checkpoint"), (generate, "--prompt_file"), (
            quantize, "--checkpoint"):
        for given, expected in (tmp_path / "*2.pt", files[1]), (files[3], files[3]), (
                tmp_path / "none-*", tmp_path / "none-*"):
            monkeypatch.setattr(sys, "argv", ["x", flag, str(given)])
            assert vars(script.parse_args())[flag[2:]] == expected
        monkeypatch.setattr(sys, "argv", ["x", flag, str(tmp_path / "best*")])
        with pytest.raises(SystemExit):
            script.parse_args()
        assert "best* stands for 2 files: name one" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--n_embd", 10**9], ["--batch_size", 10**13],
                                   ["--eval_iters", 10**13], ["--n_embd", 10**18]])
def test_more_than_the_memory_is_known_as_such(tiny_text, tmp_path, train_here, flags):
    with pytest.raises((MemoryError, RuntimeError)) as error:
        train_here(*TINY, "--data_path", tiny_text, "--out_dir", tmp_path, "--max_iters", 1, *flags)
    assert out_of_memory(error.value)


def test_more_samples_than_the_memory_holds_are_one_line():
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))}
    process = run("generate.py", "--out_dir", tokenizer.PRETRAINED, "--device", "cpu",
                  "--num_samples", 2**16, **limit)
    using, refused = process.stderr.splitlines()
    assert process.returncode == 1 and using.startswith("using ")
    assert "not enough memory: use a smaller --num_samples" in refused
