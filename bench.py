"""Benchmarks: what is compared runs in turn, in one process, and medians are reported.

    python bench.py tokenizer                          # against the textbook algorithm: three minutes
    python bench.py tokenizer --megabytes 1,10,100     # time and memory against the size of the text
"""

import argparse
import contextlib
import io
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tokenizer import DEFAULT_TEXT, BasicTokenizer, read_text

sys.path.insert(0, str(Path(__file__).resolve().parent / "tests"))  # the reference implementations live there


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alternate(a, b, repeats, of_b=1):
    """Median seconds of two functions that run in turn, so that a drift of the machine meets both alike.

    Where b is much the faster, it runs `of_b` times at each turn, as one short time is mostly chance.
    """
    times_a, times_b = [], []
    for _ in range(repeats):
        times_a.append(seconds(a))
        times_b.extend(seconds(b) for _ in range(of_b))
    return statistics.median(times_a), statistics.median(times_b)


# ---------------------------------------------------------------------------- tokenizer


def bench_tokenizer(args):
    if not args.megabytes:
        compare_with_textbook(args.data_path, args.repeats)
    elif len(args.megabytes) == 1:
        measure_size(args.data_path, args.megabytes[0])
    else:
        print("| text | train | | encode | | tokens | peak memory |\n" + "|---:" * 7 + "|", flush=True)
        for size in args.megabytes:  # each in a process of its own, as the peak of memory never falls
            subprocess.run([sys.executable, __file__, "tokenizer", "--data_path", args.data_path,
                            "--megabytes", str(size)], check=True)


def train_quietly(data_path, vocab_size):
    """A tokenizer of a text file, made as always: reads the text, writes merges.pkl and vocab.pkl."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        return BasicTokenizer(data_path, vocab_size, out_dir=folder)


def compare_with_textbook(data_path, repeats):
    from textbook_bpe import textbook_bpe_encode, textbook_bpe_train

    data = read_text(data_path).encode()
    tokenizer = train_quietly(data_path, 500)
    merges = tokenizer.merges
    results = {}

    def textbook_train():
        results["textbook"] = textbook_bpe_train(data, 500)

    def textbook_encode():
        results["ids"] = textbook_bpe_encode(data, merges)

    for name, textbook, ours in (
        ("train 500 tokens", textbook_train, lambda: train_quietly(data_path, 500)),
        ("encode the text", textbook_encode, lambda: tokenizer.encode_array(data)),
    ):
        slow, fast = alternate(textbook, ours, repeats, of_b=15)
        print(f"{name:18} textbook {slow:5.2f} s, ours {fast:.4f} s: {slow / fast:.0f} times faster", flush=True)
    ids = tokenizer.encode_array(data).tolist()
    same = results["textbook"] == (merges, ids) and results["ids"] == ids
    print(f"{'merges and ids':18} {'the same' if same else 'DIFFERENT'}, {len(ids):,} tokens")

    line = max(data[:4096].splitlines(), key=len)
    fast = statistics.median(seconds(lambda: tokenizer.encode_array(line)) for _ in range(1000))
    print(f"{'encode one line':18} {1e6 * fast:.0f} us for {len(line)} bytes")
    print(f"{'train 5,000 tokens':18} {seconds(lambda: train_quietly(data_path, 5000)):.2f} s")


def write_text(path, source, size):
    """A text of `size` bytes: the source over and over, each time with 5 % of its bytes drawn anew from it."""
    rng = np.random.default_rng(1337)
    source = np.frombuffer(source, np.uint8)
    with open(path, "wb") as file:
        for start in range(0, size, len(source)):
            copy = source.copy()
            copy[rng.integers(len(source), size=len(source) // 20)] = rng.choice(source, len(source) // 20)
            file.write(copy[:size - start])
        os.fsync(file.fileno())  # or the disk would still be busy with it while the training is timed


def measure_size(data_path, megabytes):
    source = read_text(data_path)
    if not source.isascii():
        raise ValueError(f"{data_path} is not ASCII: drawing its bytes anew would not leave a text")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        write_text(path, source.encode(), megabytes * 10**6)
        train = seconds(lambda: train_quietly(path, 500))
        tokenizer, text = train_quietly(data_path, 500), read_text(path)
        encode = seconds(lambda: tokenizer.encode_array(text))
        tokens = len(tokenizer.encode_array(text))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"| {megabytes} MB | {train:.2f} s | {megabytes / train:.1f} MB/s | {encode:.2f} s | "
          f"{megabytes / encode:.1f} MB/s | {tokens:,} | {peak / 1e6:,.0f} MB |")


# ---------------------------------------------------------------------------- command line


def sizes(argument):
    """"1,10" -> [1, 10], for argparse, which reports the ValueError as a usage error."""
    values = [int(value) for value in argument.split(",")]
    if min(values) < 1:
        raise ValueError
    return values


def parse_args():
    parser = argparse.ArgumentParser(description="Benchmarks of each part, against its textbook version.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sub = commands.add_parser("tokenizer", help="training and encoding, against the textbook algorithm")
    sub.set_defaults(function=bench_tokenizer)
    sub.add_argument("--data_path", type=Path, default=DEFAULT_TEXT, metavar="FILE",
                     help="text (default: data/input.txt beside this script)")
    sub.add_argument("--repeats", type=int, default=1, metavar="N",
                     help="rounds, of which the median counts (default: 1; the textbook takes minutes)")
    sub.add_argument("--megabytes", type=sizes, metavar="N,N,...",
                     help="measure texts of these sizes instead: time and peak memory as a Markdown table")
    return parser.parse_args()


def main():
    args = parse_args()
    try:
        args.function(args)
    except (ValueError, OSError) as error:
        sys.exit(f"bench.py: {error}")
    except subprocess.CalledProcessError:
        sys.exit(1)  # the child has said why


if __name__ == "__main__":
    main()
