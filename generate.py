"""Samples text from a trained network.

    python generate.py                                          # 500 tokens, after a line end
    python generate.py --prompt "ROMEO:" --temperature 0.8 --top_p 0.95
    python generate.py --num_samples 64 --max_new_tokens 200 --out samples.txt
    echo "To be" | python generate.py --prompt_file -

The text may be longer than the network's context (block_size, 256 tokens as published). Whenever
that is full, the network reads its more recent half once more and goes on from there.
"""
import argparse
import codecs
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

if "OPENBLAS_NUM_THREADS" not in os.environ:
    # NumPy reads tokens on one core. PyTorch, which may obey the setting, too, loads without it.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    import numpy  # noqa: F401
    del os.environ["OPENBLAS_NUM_THREADS"]

import torch

from model import choose_device, find_checkpoint, limit_threads, load_model
from tokenizer import (
    TEMPERATURE,
    BasicTokenizer,
    Vocab,
    atomic_write,
    bounded,
    check_bytes,
    default_run,
    note_file,
    one_file,
    run_script,
)

# ---- the prompt ----


def read_prompt(args: argparse.Namespace) -> str | bytes:
    """Returns the prompt from the command line, a file, or standard input (`-`).

    Its bytes need not be text; line ends and a byte-order mark are read as `read_text` reads them.
    Raises ValueError if it is UTF-16 or cannot be read.
    """
    if args.prompt_file is None:
        note_file(args.prompt, "--prompt_file gives what the file holds")
        return args.prompt
    piped = str(args.prompt_file) == "-"
    try:
        data = sys.stdin.buffer.read() if piped else args.prompt_file.read_bytes()
    except OSError as error:
        reason = f"cannot read --prompt_file {args.prompt_file}: {error.strerror}"
        raise ValueError(reason) from error
    check_bytes(data, "standard input" if piped else args.prompt_file)
    return data.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def take_back(ids: list[int], vocab: Vocab) -> tuple[list[int], bytes]:
    """Takes back the tokens at the end of a prompt that may be the beginning of a longer one.

    In the training text, "O:" may always be part of the token "O:\\n". A network that reads "O" and
    ":" has never seen a line end after them, and does not expect one. So the network gets the
    tokens before, and draws the end of the prompt itself, see `spelling`. Returns the tokens that
    stay, one at least, and the bytes taken back, b"" where no token goes on beyond the prompt.
    """
    longest = max(map(len, vocab.values()))
    end = b"".join(vocab[token] for token in ids[-longest:])
    reach = max(overlap(end, token) for token in vocab.values())
    kept, taken = ids[:], b""
    while len(taken) < reach and len(kept) > 1:
        taken = vocab[kept.pop()] + taken
    return kept, taken


def overlap(text: bytes, token: bytes) -> int:
    """Counts the bytes at the end of a text that a token begins with and goes on from.

    (b"ROMEO:", b"O:\\n") -> 2;  (b"ROMEO:", b"O:") -> 0
    """
    lengths = range(min(len(text), len(token) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(token[:length])), 0)


def spelling(text: bytes, vocab: Vocab, rows: int,
             device: torch.device) -> Callable[[torch.Tensor | None], torch.Tensor | None]:
    """Returns an `allowed` for `GPT.stream` with which each row spells `text` first, as it likes.

    The token that completes it may go on beyond it.
    """
    left = [text] * rows  # what each row has yet to spell

    @functools.cache
    def fitting(rest: bytes) -> torch.Tensor:  # (V,) bool
        return torch.tensor([token.startswith(rest) or rest.startswith(token)
                             for token in vocab.values()], device=device)

    def allowed(drawn: torch.Tensor | None) -> torch.Tensor | None:
        if any(left) and drawn is not None:
            left[:] = [rest[len(vocab[token]):] for rest, token in zip(left, drawn.tolist())]
        return torch.stack([fitting(rest) for rest in left]) if any(left) else None
    return allowed


# ---- the text ----

def write_stream(tokens: Iterator[torch.Tensor], tokenizer: BasicTokenizer, prompt: list[int],
                 file: BinaryIO, known: int = 0) -> int:
    """Writes the prompt and each token, (1,) int64, as it comes, but never half a character.

    The first `known` bytes that come are the prompt's last ones, and not written twice. Returns how
    many tokens came.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    file.write(decoder.decode(tokenizer.decode_bytes(prompt)).encode())
    count = 0
    with suppress(KeyboardInterrupt):  # keeps what there is
        for token in tokens:
            new = tokenizer.decode_bytes(token.tolist())
            file.write(decoder.decode(new[known:]).encode())
            file.flush()
            count, known = count + 1, max(0, known - len(new))
    file.write(decoder.decode(b"", final=True).encode() + b"\n")
    return count


def write_samples(tokens: Iterator[torch.Tensor], tokenizer: BasicTokenizer, prompt: list[int],
                  number: int, file: BinaryIO, known: int = 0) -> int:
    """Writes samples one after the other when all are done; `tokens` yields (number,) int64.

    The first `known` bytes of each are the prompt's last ones. Returns how many tokens came.
    """
    steps = []
    with suppress(KeyboardInterrupt):  # keeps what there is
        for token in tokens:
            steps.append(token.tolist())
    for i in range(number):
        new = tokenizer.decode_bytes(step[i] for step in steps)[known:]
        text = (tokenizer.decode_bytes(prompt) + new).decode(errors="replace")
        file.write(f"--- sample {i + 1} of {number} ---\n{text}\n".encode())
    return len(steps) * number


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="\n", help="text to continue (default: a line end)")
    prompt.add_argument("--prompt_file", type=one_file,
                        help="file with the text to continue; - for standard input")
    parser.add_argument("--max_new_tokens", type=bounded(int, 1), default=500, metavar="N",
                        help="tokens to sample (default: 500)")
    parser.add_argument("--temperature", type=bounded(float, 0), default=TEMPERATURE,
                        metavar="X", help="below 1 plays safe, above 1 takes risks, 0 always takes "
                        f"the likeliest token (default: {TEMPERATURE})")
    parser.add_argument("--top_k", type=bounded(int, 1), metavar="N",
                        help="sample among the N likeliest tokens only (default: all)")
    parser.add_argument("--top_p", type=bounded(float, 0), metavar="X",
                        help="sample among the likeliest tokens that have probability X together "
                        "(default: all)")
    parser.add_argument("--num_samples", type=bounded(int, 1, 2**16 + 1), default=1, metavar="N",
                        help="texts to sample side by side, printed when all are done (default: 1)")
    parser.add_argument("--seed", type=bounded(int, 0), metavar="N",
                        help="same seed, same text (default: another each time)")
    parser.add_argument("--out_dir", type=Path, help="folder of the run "
                        "(default: checkpoints/, or the pretrained network's if it holds none)")
    parser.add_argument("--checkpoint", type=one_file,
                        help="weights to use, float or int8 (default: model.pt in --out_dir)")
    parser.add_argument("--out", type=Path, help="file to write to (default: the terminal)")
    parser.add_argument("--device", default="auto",
                        help="cuda, mps or cpu (default: the first of these that is there)")
    args = parser.parse_args()
    if args.top_p is not None and not 0 < args.top_p <= 1:  # beyond `bounded`: 0 is out, 1 is in
        parser.error(f"argument --top_p: must be more than 0 and at most 1, not {args.top_p}")
    of_run = {".pt", ".pkl", ".csv", ".npz"}
    if args.out and args.out.exists() and of_run & {*args.out.suffixes}:  # last.pt.old, too
        parser.error(f"argument --out: {args.out} may be a file of a run: name another file")
    return args


def main() -> None:
    limit_threads()
    args = parse_args()
    out_dir = args.checkpoint.parent if args.checkpoint else default_run("model.pt")
    out_dir = args.out_dir or out_dir
    device = choose_device(args.device)
    prompt = read_prompt(args)
    path = find_checkpoint(args.checkpoint or out_dir / "model.pt")
    tokenizer = BasicTokenizer(out_dir=out_dir)
    model, checkpoint = load_model(path, tokenizer.fingerprint, tokenizer.vocab_size)
    if checkpoint.get("int8") and device.type != "cpu":
        print("int8 weights run on the CPU: not using the GPU", file=sys.stderr)
        device = torch.device("cpu")
    model.to(device)
    print(f"using {path}, iteration {checkpoint['iteration']}, "
          f"validation loss {checkpoint['val_loss']:.4f}"
          + " before quantizing" * checkpoint.get("int8", False), file=sys.stderr)

    ids, block_size = tokenizer.encode_array(prompt or "\n").tolist(), model.config.block_size
    if len(ids) > block_size:
        print(f"the prompt has {len(ids)} tokens: only the last {block_size} count",
              file=sys.stderr)
    kept, taken = take_back(ids, tokenizer.vocab)
    again, rows = len(ids) - len(kept), args.num_samples
    tokens = model.stream(torch.tensor([kept], device=device).expand(rows, -1),
                          args.max_new_tokens + again, args.temperature, args.top_k, args.top_p,
                          args.seed, spelling(taken, tokenizer.vocab, rows, device))
    started = time.perf_counter()
    with atomic_write(args.out) if args.out else nullcontext(sys.stdout.buffer) as file:
        if rows == 1:
            count = write_stream(tokens, tokenizer, ids, file, len(taken))
        else:
            count = write_samples(tokens, tokenizer, ids, rows, file, len(taken))
        file.flush()
    seconds, count = time.perf_counter() - started, max(0, count - again * rows)
    print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.0f} tokens a second",
          file=sys.stderr)


if __name__ == "__main__":
    run_script(main, "use a smaller --num_samples, or another --device")
