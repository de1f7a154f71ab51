"""Texts, prompts and flags of every kind: taken as they are, or named in one line."""
import math
import re
import resource

import pytest

import bench
import generate
import quantize
import tokenizer
import train
from conftest import TINY, run
from tokenizer import MAX_VOCAB, PRETRAINED, out_of_memory

# ---- texts ----

@pytest.mark.parametrize("text, message", [
    (b"", "text.txt is empty"), (b"ab" * 80, "smaller --block_size"),
    (b"a" * 300, "vocab_size can be")])
def test_a_text_that_cannot_be_trained_on_is_named(tmp_path, train_here, text, message):
    path, folder = tmp_path / "text.txt", tmp_path / "run"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message):
        train_here(*TINY, "--data_path", path, "--out_dir", folder)
    assert not folder.exists()


# ---- flags ----

NONSENSE = ["", "x", "-", "1.2.3", "0x10", "\N{SNOWMAN}", "nan", "inf", "-inf"]
FLAGS = {  # the least value that passes and the next that does not, of which flags
    (1, 2**63): "block_size batch_size max_iters eval_interval max_new_tokens top_k repeats",
    (0, 2**63): "gradient_accumulation_steps warmup_iters lr_decay_iters eval_iters seed",
    (6, 2**63): "n_embd", (1, 233): "n_head", (1, 1001): "n_layer", (1, 2**16 + 1): "num_samples",
    (256, MAX_VOCAB + 1): "vocab_size", (0, 2): "init_heads even_windows",
    (0.0, 1.0): "dropout attention_dropout bpe_dropout beta1 beta2",
    (0.0, math.inf): "learning_rate min_lr weight_decay muon_lr init_std grad_clip temperature",
    (0.1, math.inf): "train_temperature teacher_temperature",
    (5e-324, math.nextafter(1, 2)): "top_p"}
BOUNDS = {flag: bounds for bounds, flags in FLAGS.items() for flag in flags.split()}
PARSERS = {"train": train, "generate": generate, "tokenizer train": tokenizer,
           **{f"bench {name}": bench for name in ("tokenizer", "train", "sample", "quantize")}}


def test_every_number_at_below_and_above_its_bounds(call, capsys):
    def refused(command, *flags):
        """Returns the output, or the error beside the usage; nothing if the flags pass."""
        try:
            call(PARSERS[command].parse_args, *command.split()[1:], *flags)
        except SystemExit as end:
            out, err = capsys.readouterr()
            assert end.code == 2 or flags == ("--help",)
            return out or re.sub("^(usage:| ).*\n", "", err, flags=re.M)

    checked = set()
    for flag, value in ("--preset", "slow"), ("--dtype", "int8"):
        assert "invalid choice" in refused("train", flag, value)
    for command in PARSERS:
        for flag in re.findall(r"^  --(\w+) [NX]\s", refused(command, "--help"), re.M):
            least, limit = BOUNDS[flag]
            if isinstance(least, int):
                most, bad = limit - 1, [least - 1, limit, 1.5]
            else:
                most, bad = math.nextafter(limit, 0), [math.nextafter(least, -1), limit]
            for value in least, most:
                assert not refused(command, f"--{flag}={value}")
            for value in bad + NONSENSE:
                line = refused(command, f"--{flag}={value}")
                assert line and line.count("\n") == 1 and f" --{flag}" in line, (flag, value)
            checked.add(flag)
    assert checked == BOUNDS.keys()


def test_patterns_left_alone_by_the_shell_stand_for_files(tmp_path, monkeypatch, call, capsys):
    """On Windows it leaves *.txt alone."""
    monkeypatch.chdir(tmp_path)
    for name in "best-1.pt", "best-2.pt", "[1].txt", "1.txt":
        (tmp_path / name).touch()
    paths = train.parse_args(["--teacher", "best-*.pt", "[1].txt"])[0].teacher
    assert paths == [str(tmp_path / name) for name in ("best-1.pt", "best-2.pt", "[1].txt")]
    for flag, parse in (("init_from", train.make_parser().parse_args),
                        ("checkpoint", generate.parse_args), ("prompt_file", generate.parse_args),
                        ("checkpoint", quantize.parse_args)):
        for given, found in ("*2.pt", "best-2.pt"), ("[1].txt", "[1].txt"), ("none*", "none*"):
            assert vars(call(parse, f"--{flag}", given))[flag].name == found
        with pytest.raises(SystemExit):
            call(parse, f"--{flag}", "best*")
        assert "best* stands for 2 files: name one" in capsys.readouterr().err


# ---- memory ----

@pytest.mark.parametrize("flags", [["--n_embd", 10**9], ["--batch_size", 10**13],
                                   ["--eval_iters", 10**13], ["--n_embd", 10**18]])
def test_more_than_the_memory_is_known_as_such(tiny_text, tmp_path, train_here, flags):
    with pytest.raises((MemoryError, RuntimeError)) as error:
        train_here(*TINY, "--data_path", tiny_text, "--out_dir", tmp_path, "--max_iters", 1, *flags)
    assert out_of_memory(error.value)


def test_more_samples_than_the_memory_holds_are_one_line():
    process = run("generate.py", "--out_dir", PRETRAINED, "--device", "cpu", "--num_samples", 2**16,
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33)))
    refused = process.stderr.splitlines()[-1]  # libraries may complain of the limit before
    assert process.returncode == 1
    assert "not enough memory: use a smaller --num_samples" in refused
