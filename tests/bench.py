"""Benchmarks: what is compared runs in turn, in one process, and medians are reported.

README.md in this folder shows what they print. On one core, beside a training, for example:

    OMP_NUM_THREADS=1 python tests/bench.py sample --beside
"""
import argparse
import contextlib
import copy
import io
import math
import os
import re
import runpy
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if sys.argv[1:2] != ["tokenizer"]:  # PyTorch would add to the memory that is measured there
    import generate  # noqa: F401  # comes first, as it sees to NumPy's threads
    # isort: split
    import torch
    import torch.nn.functional as F

    import model
    import train
    from model import GPT, GPTConfig, mean_loss, tile_starts, windows
    from quantize import quantize_dynamic
    from textbook_gpt import TextbookGPT

    CONFIG = GPTConfig()  # the published sizes
    WIDTH = CONFIG.n_head * CONFIG.head_size
    SHAPE = {"vocab_size": CONFIG.vocab_size, "n_layer": CONFIG.n_layer, "n_head": CONFIG.n_head,
             "n_embd": WIDTH}  # of networks whose n_head must divide n_embd

import numpy as np

from textbook_bpe import textbook_bpe_encode, textbook_bpe_train
from tokenizer import (
    DEFAULT_TEXT,
    BasicTokenizer,
    bounded,
    default_run,
    load_tokens,
    read_text,
    run_script,
)

# ---- measuring ----

def seconds(function: Callable[[], object]) -> float:
    """Returns how long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alternate(functions: Iterable[Callable], repeats: int,
              measure: Callable[[Callable], float] = seconds) -> np.ndarray:
    """Returns each function's median measure; they run in turn, so that drift meets all alike."""
    turns = [[measure(function) for function in functions] for _ in range(repeats)]
    return np.median(turns, axis=0)


def peak_memory() -> float:
    """Returns the most bytes this process has held so far; NaN on Windows."""
    try:
        import resource
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextlib.contextmanager
def sampled_memory() -> Iterator[list[int]]:
    """Yields a list that grows, five times a second, by the bytes this process and its children
    hold, without pages mapped from files; zeros where there is no Linux to tell."""
    samples, ended = [0], threading.Event()
    children = Path(f"/proc/self/task/{os.getpid()}/children")

    def held(process):
        with contextlib.suppress(OSError):  # it has just ended
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
            return 1024 * int(re.search(r"Pss_Anon: +(\d+)", rollup)[1])
        return 0

    def sample():
        while children.exists() and not ended.wait(0.2):
            samples.append(sum(map(held, ["self", *children.read_text().split()])))

    threading.Thread(target=sample, daemon=True).start()
    yield samples
    ended.set()


# ---- tokenizer ----

def bench_tokenizer(args: argparse.Namespace) -> None:
    """Times training and encoding, against the textbook algorithm."""
    if not args.megabytes:
        compare_with_textbook(args.data_path, args.repeats)
    elif len(args.megabytes) == 1:
        measure_size(args.data_path, args.megabytes[0])
    else:
        print("| text | train | | encode | | tokens | peak memory |")
        print("|---:" * 7 + "|", flush=True)
        for size in args.megabytes:  # a process for each, as the peak of memory never falls
            command = [sys.executable, __file__, "tokenizer", "--data_path", args.data_path]
            if subprocess.run([*command, "--megabytes", str(size)]).returncode:
                sys.exit(1)  # the process has said why


def learn(data_path: Path, vocab_size: int) -> BasicTokenizer:
    """Trains a tokenizer as users do: it reads the text and writes two files."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        return BasicTokenizer(data_path, vocab_size, out_dir=folder)


def compare_with_textbook(data_path: Path, repeats: int) -> None:
    """Prints how long training and encoding take, the textbook's way and ours."""
    data, found, tokenizer = read_text(data_path).encode(), {}, learn(data_path, 500)
    for name, textbook, ours in (
        ("train 500 tokens", lambda: found.update(trained=textbook_bpe_train(data, 500)),
         lambda: learn(data_path, 500)),
        ("encode the text", lambda: found.update(ids=textbook_bpe_encode(data, tokenizer.merges)),
         lambda: tokenizer.encode_array(data)),
    ):
        slow, *fast = alternate([textbook] + [ours] * 15, repeats)  # one short time is chance
        fast = np.median(fast)
        print(f"{name:18} textbook {slow:5.2f} s, ours {fast:.4f} s: "
              f"{slow / fast:.0f} times faster", flush=True)
    ids = tokenizer.encode(data)
    same = found == {"trained": (tokenizer.merges, ids), "ids": ids}
    print(f"{'merges and ids':18} {'the same' if same else 'DIFFERENT'}, {len(ids):,} tokens")

    line = max(data[:4096].splitlines(), key=len)
    [fast] = alternate([lambda: tokenizer.encode_array(line)], 1000)
    print(f"encode one line    {1e6 * fast:.0f} us for {len(line)} bytes")
    print(f"train 5,000 tokens {seconds(lambda: learn(data_path, 5000)):.2f} s")


def write_text(path: Path, source: bytes, size: int) -> None:
    """Writes `size` bytes: the source again and again, with 5 % of its bytes drawn anew from it."""
    rng, source = np.random.default_rng(1337), np.frombuffer(source, np.uint8)
    with path.open("wb") as file:
        for start in range(0, size, len(source)):
            piece, drawn = source.copy(), len(source) // 20
            piece[rng.integers(len(source), size=drawn)] = rng.choice(source, drawn)
            file.write(piece[:size - start])
        os.fsync(file.fileno())  # keeps the disk from being busy while the training is timed


def measure_size(data_path: Path, megabytes: int) -> None:
    """Prints times and peak memory for a text of that size, as a row of a table."""
    with tempfile.TemporaryDirectory() as folder, sampled_memory() as samples:
        path = Path(folder) / "text.txt"
        write_text(path, read_text(data_path).encode(), megabytes * 10**6)
        train, tokenizer = seconds(lambda: learn(path, 500)), learn(data_path, 500)
        encode = seconds(lambda: load_tokens(tokenizer, path, folder))
        tokens = len(load_tokens(tokenizer, path, folder).ids)
    memory = max(samples) or peak_memory()
    print(f"| {megabytes} MB | {train:.2f} s | {megabytes / train:.1f} MB/s | {encode:.2f} s | "
          f"{megabytes / encode:.1f} MB/s | {tokens:,} | {memory / 1e6:,.0f} MB |")


# ---- training ----
# Each step makes an iteration in a number format, and returns its loss.

def train_step(args: argparse.Namespace, dtype: str) -> Callable:
    """Returns the step of a real run of train.py."""
    flags = ["--data_path", args.data_path, "--batch_size", args.batch_size,
             "--device", args.device, "--dtype", dtype, "--out_dir", args.out_dir / dtype]
    with contextlib.redirect_stdout(None):
        return train.Trainer(*train.parse_args([*map(str, flags)])).step


def textbook_step(args: argparse.Namespace, dtype: str) -> Callable:
    network = TextbookGPT(CONFIG).to(args.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4)
    return plain_step(args, dtype, network, optimizer)


def nanogpt_step(args: argparse.Namespace, dtype: str) -> Callable:
    names = runpy.run_path(args.nanogpt / "model.py")
    config = names["GPTConfig"](block_size=CONFIG.block_size, dropout=CONFIG.dropout, bias=False,
                                **SHAPE)
    network = names["GPT"](config).to(args.device)
    optimizer = network.configure_optimizers(0.1, 1e-3, (0.9, 0.99), args.device.type)
    return plain_step(args, dtype, torch.compile(network), optimizer, clip=True)


def plain_step(args: argparse.Namespace, dtype: str, network: Callable, optimizer: object,
               clip: bool = False) -> Callable:
    """Returns a step as textbooks and nanoGPT have it."""
    data, T = torch.randint(CONFIG.vocab_size, (10**6,)), CONFIG.block_size
    kind = args.device.type
    autocast = torch.autocast(kind, getattr(torch, dtype), enabled=dtype != "float32")

    def batch():
        starts = torch.randint(len(data) - T, (args.batch_size,))
        for shift in range(2):
            part = torch.stack([data[start + shift:start + shift + T] for start in starts])
            part = part.pin_memory() if kind == "cuda" else part
            yield part.to(args.device, non_blocking=True)

    def step():
        optimizer.zero_grad()
        idx, targets = batch()
        with autocast:
            loss = network(idx, targets)[1]
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return loss
    return step


def matrix_speed(dtype: str, device: object) -> float:
    """Returns the operations a second of a large matrix product."""
    a, b = torch.randn(2, 4096, 4096, device=device, dtype=getattr(torch, dtype))
    [time_] = alternate([lambda: (a @ b).sum().item()], 5)
    return 2 * 4096**3 / time_


def bench_train(args: argparse.Namespace) -> None:
    """Times an iteration of training, against the textbook network's."""
    args.device = device = model.choose_device(args.device)
    auto = str(train.choose_dtype("auto", device)).removeprefix("torch.")
    makers = {"textbook, float32": textbook_step, "ours, float32": train_step,
              f"ours, {auto}": train_step}
    if args.nanogpt:
        makers[f"nanoGPT, {auto}"] = nanogpt_step
    on_gpu = device.type == "cuda"
    often = 20 if on_gpu else 1  # iterations between two looks at the clock, which make a GPU wait
    runs, held = {}, {}

    def repeat(step):
        for _ in range(often):
            loss = step()
        loss.item()

    with tempfile.TemporaryDirectory() as folder:
        args.out_dir = Path(folder)
        for name, make in makers.items():
            if on_gpu:
                torch.cuda.set_device(device)
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            runs[name] = partial(repeat, make(args, name.split()[1]))
            runs[name](), runs[name]()  # warms up, and compiles
            if on_gpu:
                memory = torch.cuda.max_memory_allocated() - before
                held[name] = f", {memory / 1e9:.2f} GB"
        times = alternate(runs.values(), args.repeats) / often

    tokens = args.batch_size * CONFIG.block_size
    matrices = sum(weight.numel() for name, weight in GPT(CONFIG).named_parameters()
                   if weight.dim() == 2 and "embedding" not in name)
    attention = 2 * CONFIG.n_layer * WIDTH * CONFIG.block_size
    # 2 forward and 4 backward for each weight and product, causal or not (Kaplan et al. 2020)
    operations = 6 * tokens * (matrices + attention)
    print(f"an iteration of {args.batch_size} x {CONFIG.block_size} tokens on {device.type}; "
          "utilisation is of the speed of a large matrix product")
    for name, time_ in zip(runs, times):
        speed, peak = operations / time_, matrix_speed(name.split()[1], device)
        print(f"{name:18}{time_:8.4f} s {1 / time_:8.2f} iterations/s "
              f"{tokens / time_:10,.0f} tokens/s {speed / 1e9:9,.0f} GFLOP/s"
              f"  ({speed / peak:4.0%} of {peak / 1e9:,.0f}){held.get(name, '')}"
              f"   {times[0] / time_:.2f} times the textbook")
    if not on_gpu:
        print(f"peak memory of the process, all networks in it: {peak_memory() / 1e9:.2f} GB")


# ---- sampling ----

@contextlib.contextmanager
def training() -> Iterator[subprocess.Popen]:
    """Lets train.py run beside, with its defaults, as soon as it has measured its first loss."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends it, too
    env = os.environ.copy()
    env.pop("OMP_NUM_THREADS", None)
    with tempfile.TemporaryDirectory() as folder, subprocess.Popen(
            [sys.executable, ROOT / "train.py", "--out_dir", folder, "--device", "cpu"],
            stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            if not any("loss" in line for line in process.stdout):
                raise ValueError("train.py ended before its first loss")
            yield process
        finally:
            process.kill()


def llama2c(folder: Path, inner: int) -> Callable[[], float]:
    """Returns a function that lets llama2.c, `run` in the folder, fill a context, and returns its
    tokens a second. LLaMA's feed-forward has three matrices, here `inner` wide and untrained."""
    C, H, L, V = CONFIG.n_embd, CONFIG.n_head, CONFIG.n_layer, CONFIG.vocab_size
    T, weights, tokens = CONFIG.block_size, folder / f"{inner}.bin", folder / "tokens.bin"
    sizes = np.array([C, inner, L, H, H, -V, T], np.int32)  # -V: a head of its own
    n = 2 * V * C + L * (4 * C * C + 3 * C * inner + 2 * C) + C + T * C
    numbers = np.random.default_rng(0).normal(0, 0.02, n).astype(np.float32)
    weights.write_bytes(sizes.tobytes() + numbers.tobytes())
    tokens.write_bytes(struct.pack("i", 4) + b"".join(
        struct.pack("fi4s", 0, 4, b"%04d" % token) for token in range(V)))
    command = [folder / "run", weights, "-z", tokens, "-n", str(T), "-p", "1"]  # no top_p

    def run():
        process = subprocess.run(command, check=True, capture_output=True)
        return float(process.stderr.split()[-1])  # "achieved tok/s: X", but for its start
    return run


def bench_sample(args: argparse.Namespace) -> None:
    """Times sampling, against the textbook's and, where it is installed, Hugging Face's."""
    def sample(network, start, n, **flags):
        time_ = seconds(lambda: network.generate(start, max_new_tokens=n, **flags).tolist())
        return len(start) * n / time_  # `tolist` has waited for a GPU

    device = model.choose_device(args.device)
    textbook, network = (kind(CONFIG).eval().to(device) for kind in (TextbookGPT, GPT))
    full = torch.randint(CONFIG.vocab_size, (1, CONFIG.block_size), device=device)
    one = full[:, :1]
    runs = {name: partial(sample, *what) for name, what in {
        "textbook": (textbook, full, 60),
        "ours, one context": (network, one, 255),
        "ours, one stream": (network, full, 1000),
        "ours, ten times as long": (network, full, 10_000),
        "ours, 64 streams": (network, one.expand(64, -1), 255),
    }.items()}
    with contextlib.suppress(ImportError):
        from transformers import GPT2Config, GPT2LMHeadModel

        gpt2 = GPT2LMHeadModel(GPT2Config(
            n_positions=CONFIG.block_size, bos_token_id=None, eos_token_id=None, **SHAPE,
        )).eval().to(device)
        runs["Hugging Face GPT-2"] = partial(sample, gpt2, one, 250, min_new_tokens=250,
                                             do_sample=True)
    beside = training() if args.beside else contextlib.nullcontext()
    with beside, tempfile.TemporaryDirectory() as folder:
        if args.llama2c:
            subprocess.run(["cc", "-Ofast", "-march=native", "-fopenmp", args.llama2c / "run.c",
                            "-o", f"{folder}/run", "-lm"], check=True)
            runs["llama2.c, as wide"] = llama2c(Path(folder), 4 * CONFIG.n_embd)
            runs["llama2.c, as many weights"] = llama2c(Path(folder), round(8 * CONFIG.n_embd / 3))
        for run in runs.values():  # warms up
            run()
        rates = alternate(runs.values(), args.repeats, measure=lambda run: run())
    print(f"{torch.get_num_threads()} threads" + ", a training beside" * args.beside)
    for name, rate in zip(runs, rates):
        print(f"{name:26}{rate:10,.0f} tokens/s{rate / rates[0]:8.1f} times the textbook")


# ---- loss ----

def load_run(args: argparse.Namespace, note: str) -> tuple:
    """Returns a run's tokenizer, network and validation split, (N,), and prints which it is."""
    tokenizer, path = BasicTokenizer(out_dir=args.out_dir), args.out_dir / "model.pt"
    network, checkpoint = model.load_model(path, tokenizer.fingerprint, tokenizer.vocab_size)
    tokens = load_tokens(tokenizer, args.data_path, args.out_dir)
    _, val = model.split(tokens.ids, network.config.block_size)
    print(f"{path}, iteration {checkpoint['iteration']}; {note}")
    return tokenizer, network, model.MappedTokens(val, "cpu")


def token_losses(network: Callable, val: object, starts: object, first: int) -> tuple:
    """Returns places in `val` and losses, in nats, of the tokens that have `first` to T tokens of a
    window at `starts` before them: both (len(starts) * (T - first + 1),)."""
    places, losses, T = [], [], network.config.block_size
    for part in starts.split(64):
        idx, targets = windows(val, part, T)
        with torch.inference_mode():
            logits = network(idx)[0]
        loss = F.cross_entropy(logits.mT, targets, reduction="none")  # (B, T)
        losses.append(loss[:, first - 1:].flatten())
        places.append((part[:, None] + torch.arange(first, T + 1)).flatten())
    return torch.cat(places), torch.cat(losses)


def bench_loss(args: argparse.Namespace) -> None:
    """Prints the validation loss: exact, of random batches, and past the window."""
    tokenizer, network, val = load_run(args, "nats per token (per character)")
    T, per_char = network.config.block_size, len(val) / tokenizer.count_characters(val)

    def show(name, loss):
        print(f"{name:40}{loss:.4f} ({loss * per_char:.4f})", flush=True)

    draw = torch.Generator().manual_seed(1337)
    random = torch.randint(len(val) - T, (200 * 64,), generator=draw)
    show("whole split, windows side by side", mean_loss(network, val, tile_starts(val, T)))
    show("200 random batches of 64 windows", mean_loss(network, val, random))

    half = T // 2  # contexts of half a window to a whole one, as sampling has
    places, sampling = token_losses(network, val, torch.arange(0, len(val) - T, T - half + 1), half)
    some = torch.arange(T - half, len(places), 40)  # a whole window lies before each of them
    _, crop = token_losses(network, val, places[some] - T, T)
    print(f"{len(some):,} tokens spread over the split, each with")
    show(f"  the {T} tokens before it (the crop)", crop.mean())
    show(f"  {half} to {T}, as in sampling past {T}", sampling[some].mean())
    more = sampling[some] - crop
    print(f"{'  difference, and its standard error':40}{more.mean():+.4f}, "
          f"{more.std() / len(some) ** 0.5:.4f}")


# ---- quantize ----

def quantized_variants(network: Callable) -> dict[str, tuple]:
    """Returns ways to quantize a network, each as the weights of a file and a network."""
    floats, per_channel = network.state_dict(), quantize_dynamic(network)
    embeddings = {name: weight for name, weight in floats.items() if "embedding" in name}
    ones = {name.replace("weight", "scale"): torch.ones(len(weight))
            for name, weight in embeddings.items()}
    float_embeddings = {name: weight for name, weight in (per_channel | embeddings).items()
                        if name not in ones}
    per_tensor = dict(per_channel)
    for name, weight in per_channel.items():
        if weight.dtype == torch.int8 and name not in embeddings:
            scale = floats[name].abs().max() / 127
            per_tensor[name] = (floats[name] / scale).round().to(torch.int8)
            per_tensor[name.replace("weight", "scale")] = scale.repeat(len(weight))

    def build(weights, seven_bits=True):
        rest, quantized = ones | weights, copy.deepcopy(network)
        model.use_int8(quantized, rest)
        quantized.load_state_dict(rest, assign=True)
        for layer in quantized.modules():
            if isinstance(layer, model.Int8Linear):
                layer.seven_bits &= seven_bits
        return weights, quantized

    return {
        "float32": (floats, network),
        "**per channel, embeddings too**": build(per_channel),
        "per channel, embeddings in float32": build(float_embeddings),
        "per tensor": build(per_tensor),
        "per channel, inputs in 8 bits, not 7": build(per_channel, seven_bits=False),
    }


def bench_quantize(args: argparse.Namespace) -> None:
    """Compares ways to quantize a trained network with float32, as a Markdown table."""
    tokenizer, network, val = load_run(args, "speeds are ratios to float32\n")
    variants, T = quantized_variants(network), network.config.block_size
    one = torch.tensor([tokenizer.encode("\n")])
    eight, _ = windows(val, tile_starts(val, T, 8), T)

    @torch.inference_mode()
    def read(network):
        for _ in range(4):
            network(eight)

    jobs = (lambda network: network.generate(one, 400, seed=0),
            lambda network: network.generate(one.expand(64, -1), 100, seed=0), read)
    runs = [partial(job, network) for _, network in variants.values() for job in jobs]
    for run in runs:  # warms up
        run()
    times = alternate(runs, args.repeats).reshape(len(variants), len(jobs))
    print("| weights | file | validation loss | one stream | 64 streams | reading 8 windows |\n"
          "|---|---:|---:|---:|---:|---:|")
    starts, base = tile_starts(val, T, model.EVAL_TOKENS // T), None
    for (name, (weights, network)), ratios in zip(variants.items(), times[0] / times):
        buffer, loss = io.BytesIO(), mean_loss(network, val, starts)
        torch.save({"model": weights}, buffer)
        base = base or loss
        print(f"| {name} | {len(buffer.getvalue()) / 1e6:.2f} MB | {loss:.4f} "
              f"({loss / base - 1:+.2%}) | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")


# ---- command line ----

def parse_args() -> argparse.Namespace:
    count = bounded(int, 1)
    flags = {  # type, default, metavar, help
        "repeats": (count, 5, "N", "rounds, of which the median counts (default: %(default)s)"),
        "data_path": (Path, DEFAULT_TEXT, "FILE", "text (default: data/input.txt)"),
        "out_dir": (Path, default_run("model.pt"), "FOLDER", "folder of the trained run (default: "
                    "checkpoints/, or the pretrained network's if it holds none)"),
        "device": (str, "auto", None,
                   "cuda, mps or cpu (default: the first of these that is there)"),
        "megabytes": (lambda text: [count(size) for size in text.split(",")], None, "N,N,...",
                      "measure texts of these sizes instead: time and peak memory as a table"),
        "batch_size": (count, 64, "N", "sequences in a batch (default: 64)"),
        "nanogpt": (Path, None, "FOLDER", "a clone of nanoGPT, to compare with it, too"),
        "llama2c": (Path, None, "FOLDER",
                    "a clone of llama2.c, to compare with it, too: needs a C compiler"),
    }
    parser = argparse.ArgumentParser(description="Benchmarks, each against a textbook's version.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function, names in (
        (bench_tokenizer, "repeats data_path megabytes"),
        (bench_train, "repeats data_path device batch_size nanogpt"),
        (bench_sample, "repeats device llama2c"),
        (bench_loss, "data_path out_dir"),
        (bench_quantize, "repeats data_path out_dir"),
    ):
        sub = commands.add_parser(function.__name__.removeprefix("bench_"),
                                  help=function.__doc__, description=function.__doc__)
        for name in names.split():
            kind, default, metavar, text = flags[name]
            sub.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=text)
        sub.set_defaults(function=function)
        if function is bench_tokenizer:
            sub.set_defaults(repeats=1)
        if function is bench_sample:
            sub.add_argument("--beside", action="store_true",
                             help="while train.py runs, on all cores")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.function(args)


if __name__ == "__main__":
    run_script(main, "use a smaller --batch_size or --megabytes, or another --device")
