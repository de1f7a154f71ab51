"""generate.py as a user meets it: any prompt, streams that break no character, one-line errors."""
import os
import signal
import subprocess
import sys

import pytest

from conftest import ROOT, complaint, run
from tokenizer import BasicTokenizer


def generate(folder, *args, **options):
    return run("generate.py", "--out_dir", folder, "--device", "cpu", *args, **options)


def test_it_continues_the_prompt_and_tells_its_speed(finished_run):
    process = generate(finished_run, "--prompt", "ROMEO:", "--max_new_tokens", 30, "--seed", 1)
    assert process.returncode == 0
    assert process.stdout.startswith("ROMEO:") and len(process.stdout) > 30
    assert f"using {finished_run / 'model.pt'}, iteration" in process.stderr
    assert "30 tokens in" in process.stderr and "tokens a second" in process.stderr


def test_same_seed_same_text(finished_run):
    first, second, other = (generate(finished_run, "--seed", seed, "--max_new_tokens", 50).stdout
                            for seed in (1, 1, 2))
    assert first == second != other


def test_samples_are_independent_of_their_number(finished_run):
    def samples(number):
        out = generate(finished_run, "--num_samples", number, "--seed", 5,
                       "--max_new_tokens", 40).stdout
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


def test_a_prompt_from_a_file_and_from_standard_input(finished_run, tmp_path):
    (tmp_path / "prompt.txt").write_text("JULIET: speak")
    flags = ["--max_new_tokens", 10, "--seed", 1]
    given = generate(finished_run, "--prompt", "JULIET: speak", *flags)
    from_file = generate(finished_run, "--prompt_file", tmp_path / "prompt.txt", *flags)
    piped = generate(finished_run, "--prompt_file", "-", *flags, stdin=None, input="JULIET: speak")
    assert given.stdout == from_file.stdout == piped.stdout


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


def test_an_int8_checkpoint_is_sampled_like_any_other(tiny_run, tiny_text):
    assert run("quantize.py", "--out_dir", tiny_run, "--data_path", tiny_text).returncode == 0
    process = run("generate.py", "--checkpoint", tiny_run / "model_int8.pt", "--max_new_tokens", 20)
    assert process.returncode == 0 and "20 tokens in" in process.stderr


@pytest.mark.parametrize("flag, value", [
    ("--max_new_tokens", "0"), ("--temperature", "-0.1"), ("--temperature", "nan"),
    ("--top_k", "0"), ("--top_p", "0"), ("--top_p", "1.01"), ("--num_samples", "0"),
    ("--num_samples", "65537"), ("--seed", "-1"), ("--prompts", "x"),
])
def test_a_flag_out_of_range_is_named(finished_run, flag, value):
    assert flag in complaint(generate(finished_run, flag, value), status=2)


def test_what_is_missing_or_wrong_is_named(tiny_run, tmp_path):
    for flags in (["--out_dir", tiny_run, "--checkpoint", tmp_path / "none.pt"],
                  ["--out_dir", tmp_path], ["--checkpoint", tmp_path / "none.pt"]):
        assert "no checkpoint at" in complaint(run("generate.py", *flags))
    (tmp_path / "model.pt").write_bytes((tiny_run / "model.pt").read_bytes())
    assert "there is no tokenizer in" in complaint(run("generate.py", "--out_dir", tmp_path))
    assert "prompt.txt" in complaint(generate(tiny_run, "--prompt_file", tmp_path / "prompt.txt"))
    assert "--device" in complaint(generate(tiny_run, "--device", "tpu"))
    (tiny_run / "model.pt").write_bytes(b"not a checkpoint")
    assert "model.pt is not a checkpoint" in complaint(generate(tiny_run))


def test_a_tokenizer_that_does_not_fit_is_named(tiny_run, tiny_text):
    BasicTokenizer(tiny_text, 290, out_dir=tiny_run)
    assert "another tokenizer" in complaint(generate(tiny_run))
