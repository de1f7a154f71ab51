"""Benchmarks: what is compared runs in turn, in one process, and medians are reported.

    python tests/bench.py tokenizer                        # against the textbook: a minute or two
    python tests/bench.py tokenizer --megabytes 1,10,100   # time and memory against the text's size
    python tests/bench.py train         # an iteration, against the textbook network's
    python tests/bench.py sample        # tokens a second, against the textbook's and Hugging Face's
    OMP_NUM_THREADS=1 python tests/bench.py sample --beside     # on one core, beside a training
    python tests/bench.py loss          # the validation loss in each way in which it is spoken of
    python tests/bench.py quantize      # ways to quantize a trained network, against float32

PyTorch is imported only where it is used: the memory that the tokenizer takes is measured, too.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import io
import math
import os
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if "OPENBLAS_NUM_THREADS" not in os.environ:  # as in generate.py
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    import numpy  # noqa: F401
    del os.environ["OPENBLAS_NUM_THREADS"]

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts

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

if TYPE_CHECKING:
    import torch

    from model import GPT, GPTConfig, MappedTokens

# ---- measuring ----

def seconds(function: Callable) -> float:
    """Returns how long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alternate(functions: list[Callable], repeats: int, often: tuple = ()) -> list[float]:
    """Returns the median seconds of each function; they run in turn, so that drift meets all alike.

    A function that is much faster runs `often` in each turn, as one short time is mostly chance.
    """
    times = [[] for _ in functions]
    for _ in range(repeats):
        for function, its_times, n in zip(functions, times, often or (1,) * len(functions)):
            its_times.extend(seconds(function) for _ in range(n))
    return [statistics.median(its_times) for its_times in times]


def peak_memory() -> float:
    """Returns the most memory this process has held so far, in bytes; NaN on Windows."""
    with contextlib.suppress(ImportError):
        import resource
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return math.nan


# ---- tokenizer ----

def bench_tokenizer(args: argparse.Namespace) -> None:
    """Compares with the textbook or, with --megabytes, measures texts of these sizes."""
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


def train_quietly(data_path: Path, vocab_size: int) -> BasicTokenizer:
    """Trains a tokenizer as always: it reads the text and writes merges.pkl and vocab.pkl."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        return BasicTokenizer(data_path, vocab_size, out_dir=folder)


def compare_with_textbook(data_path: Path, repeats: int) -> None:
    """Prints how long training and encoding take, the textbook's way and ours."""
    data, found = read_text(data_path).encode(), {}
    tokenizer = train_quietly(data_path, 500)
    for name, textbook, ours in (
        ("train 500 tokens", lambda: found.update(trained=textbook_bpe_train(data, 500)),
         lambda: train_quietly(data_path, 500)),
        ("encode the text", lambda: found.update(ids=textbook_bpe_encode(data, tokenizer.merges)),
         lambda: tokenizer.encode_array(data)),
    ):
        slow, fast = alternate([textbook, ours], repeats, (1, 15))
        print(f"{name:18} textbook {slow:5.2f} s, ours {fast:.4f} s: "
              f"{slow / fast:.0f} times faster", flush=True)
    ids = tokenizer.encode_array(data).tolist()
    same = found == {"trained": (tokenizer.merges, ids), "ids": ids}
    print(f"{'merges and ids':18} {'the same' if same else 'DIFFERENT'}, {len(ids):,} tokens")

    line = max(data[:4096].splitlines(), key=len)
    fast = statistics.median(seconds(lambda: tokenizer.encode_array(line)) for _ in range(1000))
    print(f"{'encode one line':18} {1e6 * fast:.0f} us for {len(line)} bytes")
    print(f"{'train 5,000 tokens':18} {seconds(lambda: train_quietly(data_path, 5000)):.2f} s")


def write_text(path: Path, source: bytes, size: int) -> None:
    """Writes `size` bytes: the source again and again, with 5 % of its bytes drawn anew from it."""
    rng = np.random.default_rng(1337)
    source = np.frombuffer(source, np.uint8)
    with path.open("wb") as file:
        for start in range(0, size, len(source)):
            piece, drawn = source.copy(), len(source) // 20
            piece[rng.integers(len(source), size=drawn)] = rng.choice(source, drawn)
            file.write(piece[:size - start])
        os.fsync(file.fileno())  # keeps the disk from being busy while the training is timed


def measure_size(data_path: Path, megabytes: int) -> None:
    """Prints time and peak memory for a text of that size, as a row of a Markdown table."""
    source = read_text(data_path)
    if not source.isascii():
        raise ValueError(f"{data_path} is not ASCII: drawing its bytes anew would not leave a text")
    with tempfile.TemporaryDirectory() as folder, sampled_memory() as samples:
        path = Path(folder) / "text.txt"
        write_text(path, source.encode(), megabytes * 10**6)
        train = seconds(lambda: train_quietly(path, 500))
        tokenizer = train_quietly(data_path, 500)
        encode = seconds(lambda: load_tokens(tokenizer, path, folder))
        tokens = len(load_tokens(tokenizer, path, folder).ids)
    memory = max(samples) or peak_memory()
    print(f"| {megabytes} MB | {train:.2f} s | {megabytes / train:.1f} MB/s | {encode:.2f} s | "
          f"{megabytes / encode:.1f} MB/s | {tokens:,} | {memory / 1e6:,.0f} MB |")


@contextlib.contextmanager
def sampled_memory() -> Iterator[list[int]]:
    """Yields a list that grows, five times a second, by the bytes this process and its children
    hold, without pages mapped from files; zeros where there is no Linux to tell."""
    samples, ended = [0], threading.Event()

    def held(folder: Path) -> int:
        parent = folder.joinpath("stat").read_text().rpartition(")")[2].split()[1]
        if str(os.getpid()) not in (parent, folder.name):
            return 0
        rollup = folder.joinpath("smaps_rollup").read_text()
        return 1024 * int(re.search(r"Pss_Anon: +(\d+)", rollup)[1])

    def sample() -> None:
        while not ended.wait(0.2):
            total = 0
            for folder in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):  # it has just ended
                    total += held(folder)
            samples.append(total)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


# ---- training ----

def name_of(dtype: torch.dtype) -> str:
    """Returns "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def trainer_step(dtype: torch.dtype, device: torch.device, args: argparse.Namespace,
                 folder: str) -> Callable:
    """Returns the iteration of a real run of train.py, by default at the published sizes."""
    import train

    flags = {"data_path": args.data_path, "batch_size": args.batch_size, "device": device,
             "dtype": name_of(dtype), "out_dir": Path(folder) / name_of(dtype)}
    with contextlib.redirect_stdout(None):
        parsed = train.parse_args([f"--{name}={value}" for name, value in flags.items()])
        return train.Trainer(*parsed).step


def plain_step(network: torch.nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype,
               batch_size: int, clip: bool = False) -> Callable:
    """Returns an iteration as textbooks and nanoGPT have it, at the published sizes."""
    import torch

    from model import GPTConfig

    data, T = torch.randint(GPTConfig.vocab_size, (10**6,)), GPTConfig.block_size
    device = next(network.parameters()).device
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def batch():
        starts = torch.randint(len(data) - T, (batch_size,))
        idx, targets = (torch.stack([data[start + i:start + i + T] for start in starts])
                        for i in range(2))
        if device.type == "cuda":
            idx, targets = idx.pin_memory(), targets.pin_memory()
        return idx.to(device, non_blocking=True), targets.to(device, non_blocking=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        idx, targets = batch()
        with autocast:
            loss = network(idx, targets)[1]
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return loss
    return step


def textbook_step(device: torch.device, batch_size: int) -> Callable:
    """Returns an iteration of the textbook network, in float32."""
    import torch

    from model import GPTConfig
    from textbook_gpt import TextbookGPT

    network = TextbookGPT(GPTConfig()).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4)
    return plain_step(network, optimizer, torch.float32, batch_size)


def nanogpt_step(dtype: torch.dtype, device: torch.device, args: argparse.Namespace) -> Callable:
    """Returns an iteration of the network in the clone of nanoGPT, compiled."""
    import torch

    from model import GPTConfig

    spec = importlib.util.spec_from_file_location("nanogpt", args.nanogpt / "model.py")
    sys.modules["nanogpt"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = GPTConfig()
    network = module.GPT(module.GPTConfig(
        config.block_size, config.vocab_size, config.n_layer, config.n_head,
        config.n_head * config.head_size,  # the width, which n_head must divide there
        config.dropout, bias=False)).to(device)
    optimizer = network.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device.type)
    return plain_step(torch.compile(network), optimizer, dtype, args.batch_size, clip=True)


def flops_per_token() -> int:
    """Returns the operations of training on a token: 2 forward and 4 backward for each weight and
    each product of attention, causal or not (Kaplan et al. 2020)."""
    from model import GPT, GPTConfig

    config = GPTConfig()
    matrices = sum(p.numel() for name, p in GPT(config).named_parameters()
                   if p.dim() == 2 and "embedding" not in name)
    attention = 2 * config.n_layer * config.n_head * config.head_size * config.block_size
    return 6 * (matrices + attention)


def matrix_speed(dtype: torch.dtype, device: torch.device) -> float:
    """Returns the operations a second of a large matrix product."""
    import torch

    a, b = (torch.randn(4096, 4096, device=device, dtype=dtype) for _ in range(2))
    return 2 * 4096**3 / statistics.median(seconds(lambda: (a @ b).sum().item()) for _ in range(5))


def bench_train(args: argparse.Namespace) -> None:
    """Times whole iterations (batch, forward, backward, update) at the published sizes, in turn."""
    import torch

    from model import choose_device
    from train import choose_dtype

    device = choose_device(args.device)
    auto = choose_dtype("auto", device)
    on_gpu = device.type == "cuda"
    often = 20 if on_gpu else 1  # iterations between two looks at the clock, which make a GPU wait
    runs, memory = {}, {}

    def repeat(step):
        for _ in range(often):
            loss = step()
        loss.item()

    with tempfile.TemporaryDirectory() as folder:
        makers = {"textbook, float32": partial(textbook_step, device, args.batch_size)}
        for dtype in torch.float32, auto:
            makers[f"ours, {name_of(dtype)}"] = partial(trainer_step, dtype, device, args, folder)
        if args.nanogpt:
            makers[f"nanoGPT, {name_of(auto)}"] = partial(nanogpt_step, auto, device, args)
        for name, make in makers.items():
            if on_gpu:
                torch.cuda.set_device(device)
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            runs[name] = partial(repeat, make())
            runs[name](), runs[name]()  # warms up, and compiles
            if on_gpu:
                memory[name] = torch.cuda.max_memory_allocated() - before
        times = alternate(list(runs.values()), args.repeats)
    print_training({name: time_ / often for name, time_ in zip(runs, times)}, memory, device, args)


def print_training(times: dict[str, float], memory: dict[str, int], device: torch.device,
                   args: argparse.Namespace) -> None:
    """Prints a line for each network's seconds an iteration and bytes of GPU memory."""
    import torch

    from model import GPTConfig

    tokens = args.batch_size * GPTConfig.block_size
    print(f"an iteration of {args.batch_size} x {GPTConfig.block_size} tokens on {device.type}; "
          "utilisation is of the speed of a large matrix product")
    for name, time_ in times.items():
        peak = matrix_speed(getattr(torch, name.split(", ")[1]), device)
        flops = tokens * flops_per_token() / time_
        held = f", {memory[name] / 1e9:.2f} GB" if memory else ""
        print(f"{name:18}{time_:8.4f} s {1 / time_:8.2f} iterations/s "
              f"{tokens / time_:10,.0f} tokens/s {flops / 1e9:9,.0f} GFLOP/s"
              f"  ({flops / peak:4.0%} of {peak / 1e9:,.0f}){held}"
              f"   {times['textbook, float32'] / time_:.2f} times the textbook")
    if not memory:
        print(f"peak memory of the process, all networks in it: {peak_memory() / 1e9:.2f} GB")


# ---- sampling ----

def hugging_face_gpt2(config: GPTConfig, device: torch.device) -> torch.nn.Module:
    """Returns a network of the same sizes, untrained. Raises ImportError without transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    width = config.n_head * config.head_size  # n_head must divide it there
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=width,
        n_head=config.n_head, n_layer=config.n_layer, bos_token_id=None, eos_token_id=None,
    )).eval().to(device)


@contextlib.contextmanager
def training() -> Iterator[None]:
    """Lets train.py run beside, with its defaults, as soon as it has measured its first loss."""
    script = Path(__file__).resolve().parent.parent / "train.py"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, script, "--out_dir", folder, "--device", "cpu"]
        env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        try:
            if not any("loss" in line for line in process.stdout):
                raise ValueError("train.py ended before its first loss")
            yield
        finally:
            process.kill()
            process.wait()


def llama2c(folder: Path, inner: int, config: GPTConfig, rates: list[float]) -> Callable:
    """Returns a function that lets llama2.c fill a context and appends its tokens a second.

    The network is LLaMA's, untrained, with three matrices to its feed-forward, `inner` wide. Writes
    it to folder, where `run` is the program.
    """
    C, H, L, V = config.n_embd, config.n_head, config.n_layer, config.vocab_size
    T, weights, tokens = config.block_size, folder / f"{inner}.bin", folder / "tokens.bin"
    sizes = np.array([C, inner, L, H, H, -V, T], np.int32)  # -V: a head of its own
    n = 2 * V * C + L * (4 * C * C + 3 * C * inner + 2 * C) + C + T * C
    numbers = np.random.default_rng(0).normal(0, 0.02, n).astype(np.float32)
    weights.write_bytes(sizes.tobytes() + numbers.tobytes())
    tokens.write_bytes(struct.pack("i", 4) + b"".join(
        struct.pack("fi4s", 0, 4, b"%04d" % token) for token in range(V)))
    command = [folder / "run", weights, "-z", tokens, "-n", str(T), "-p", "1"]  # no top_p

    def run():
        process = subprocess.run(command, check=True, capture_output=True)
        rates.append(float(process.stderr.split()[-1]))  # "achieved tok/s: X", but for its start
    return run


def bench_sample(args: argparse.Namespace) -> None:
    """Prints tokens a second: past a full context; of 64 streams and others, up to a full one."""
    with training() if args.beside else contextlib.nullcontext():
        compare_samplers(args)


def compare_samplers(args: argparse.Namespace) -> None:
    import torch

    from model import GPT, GPTConfig, choose_device
    from textbook_gpt import TextbookGPT, copy_weights

    config, device = GPTConfig(), choose_device(args.device)
    textbook, network = TextbookGPT(config).eval(), GPT(config).eval()
    copy_weights(textbook, network)
    textbook.to(device), network.to(device)
    full = torch.randint(config.vocab_size, (1, config.block_size), device=device)
    one = full[:, :1]
    samplers = {  # a function, in which tolist waits for a GPU, and how many tokens it makes
        "textbook": (lambda: textbook.generate(full, 60).tolist(), 60),
        "ours, one context": (lambda: network.generate(one, 255).tolist(), 255),
        "ours, one stream": (lambda: network.generate(full, 1000).tolist(), 1000),
        "ours, ten times as long": (lambda: network.generate(full, 10_000).tolist(), 10_000),
        "ours, 64 streams": (lambda: network.generate(one.expand(64, -1), 255).tolist(), 64 * 255),
    }
    with contextlib.suppress(ImportError):
        gpt2 = hugging_face_gpt2(config, device)
        samplers["Hugging Face GPT-2"] = (lambda: gpt2.generate(
            one, max_new_tokens=250, min_new_tokens=250, do_sample=True).tolist(), 250)
    own = {}  # tokens a second as llama2.c itself counts them, without its start
    with tempfile.TemporaryDirectory() as folder:
        if args.llama2c:
            subprocess.run(["cc", "-Ofast", "-march=native", "-fopenmp", args.llama2c / "run.c",
                            "-o", f"{folder}/run", "-lm"], check=True)
            for name, inner in (("llama2.c, as wide", 4 * config.n_embd),
                                ("llama2.c, as many weights", round(8 * config.n_embd / 3))):
                own[name] = []
                samplers[name] = llama2c(Path(folder), inner, config, own[name]), 0
        for run, _ in samplers.values():  # warms up
            run()
        times = alternate([run for run, _ in samplers.values()], args.repeats)
    rates = {name: count / time_ for (name, (_, count)), time_ in zip(samplers.items(), times)}
    rates |= {name: statistics.median(rates[1:]) for name, rates in own.items()}
    print(f"{torch.get_num_threads()} threads" + ", a training beside" * args.beside)
    for name, rate in rates.items():
        print(f"{name:26}{rate:10,.0f} tokens/s{rate / rates['textbook']:8.1f} times the textbook")


# ---- loss ----

def load_run(args: argparse.Namespace) -> tuple[BasicTokenizer, GPT, dict, MappedTokens]:
    """Returns a run's tokenizer, network, checkpoint and validation split, (N,)."""
    from model import MappedTokens, load_model, split

    tokenizer = BasicTokenizer(out_dir=args.out_dir)
    path = args.out_dir / "model.pt"
    network, checkpoint = load_model(path, tokenizer.fingerprint, tokenizer.vocab_size)
    tokens = load_tokens(tokenizer, args.data_path, args.out_dir)
    _, val = split(tokens.ids, network.config.block_size)
    return tokenizer, network, checkpoint, MappedTokens(val, "cpu")


def token_losses(network: GPT, val: MappedTokens, starts: torch.Tensor,
                 first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns where in `val` the tokens lie that have `first` to T tokens of a window at `starts`
    before them, and their losses in nats: both (len(starts) * (T - first + 1),)."""
    import torch
    import torch.nn.functional as F

    from model import windows

    places, losses, T = [], [], network.config.block_size
    with torch.inference_mode():
        for part in starts.split(64):
            idx, targets = windows(val, part, T)
            loss = F.cross_entropy(network(idx)[0].mT, targets, reduction="none")  # (B, T)
            losses.append(loss[:, first - 1:].flatten())
            places.append((part[:, None] + torch.arange(first, T + 1)).flatten())
    return torch.cat(places), torch.cat(losses)


def bench_loss(args: argparse.Namespace) -> None:
    """Prints the validation loss: exact, of random batches, and past the window."""
    import torch

    from model import mean_loss, tile_starts

    tokenizer, network, checkpoint, val = load_run(args)
    T, per_char = network.config.block_size, len(val) / tokenizer.count_characters(val)
    draw = torch.Generator().manual_seed(1337)
    print(f"{args.out_dir / 'model.pt'}, iteration {checkpoint['iteration']}; "
          "nats per token (per character)")
    random = torch.randint(len(val) - T, (200 * 64,), generator=draw)
    for name, starts in (("whole split, windows side by side", tile_starts(val, T)),
                         ("200 random batches of 64 windows", random)):
        loss = mean_loss(network, val, starts)
        print(f"{name:40}{loss:.4f} ({loss * per_char:.4f})", flush=True)

    half = max(1, T // 2)  # contexts of half a window to a whole one, as sampling has
    places, sampling = token_losses(network, val, torch.arange(0, len(val) - T, T - half + 1), half)
    some = torch.arange(half, len(places), 40)
    some = some[places[some] >= T]
    if len(some) < 2:
        raise ValueError(f"the last tenth of {args.data_path} is too short to measure more on it")
    _, crop = token_losses(network, val, places[some] - T, T)  # a whole window before each token
    sampling = sampling[some]
    print(f"{len(some):,} tokens spread over the split, each with")
    for name, loss in ((f"the {T} tokens before it (the crop)", crop.mean()),
                       (f"{half} to {T}, as in sampling past {T}", sampling.mean())):
        print(f"  {name:38}{loss:.4f} ({loss * per_char:.4f})")
    differences = sampling - crop
    print(f"  {'difference, and its standard error':38}{differences.mean():+.4f}, "
          f"{differences.std() / len(some) ** 0.5:.4f}")


# ---- quantize ----

def quantized_variants(network: GPT) -> dict[str, tuple[dict[str, torch.Tensor], GPT]]:
    """Returns ways to quantize a network, each as the weights of a file and a network."""
    import torch

    from model import Int8Linear, use_int8
    from quantize import quantize_dynamic

    floats, per_channel = network.state_dict(), quantize_dynamic(network)
    float_embeddings = {name: floats[name] if "embedding" in name else weight
                        for name, weight in per_channel.items()
                        if not name.endswith("embedding.scale")}
    per_tensor = dict(per_channel)
    for name, weight in per_channel.items():
        if weight.dtype == torch.int8 and "embedding" not in name:
            scale = floats[name].abs().max() / 127
            per_tensor[name] = (floats[name] / scale).round().to(torch.int8)
            per_tensor[name.replace(".weight", ".scale")] = scale.repeat(len(floats[name]))

    def build(weights, seven_bits=True):
        weights, model = dict(weights), copy.deepcopy(network)
        for name in "token_embedding", "position_embedding":  # `use_int8` expects them quantized
            if f"{name}.scale" not in weights:
                weights[f"{name}.scale"] = torch.ones(len(weights[f"{name}.weight"]))
        use_int8(model, weights)
        model.load_state_dict(weights, assign=True)
        for layer in model.modules():
            if isinstance(layer, Int8Linear):
                layer.seven_bits &= seven_bits
        return model

    return {
        "float32": (floats, network),
        "**per channel, embeddings too**": (per_channel, build(per_channel)),
        "per channel, embeddings in float32": (float_embeddings, build(float_embeddings)),
        "per tensor": (per_tensor, build(per_tensor)),
        "per channel, inputs in 8 bits, not 7": (per_channel, build(per_channel, seven_bits=False)),
    }


def bench_quantize(args: argparse.Namespace) -> None:
    """Prints the variants as a Markdown table; their speeds are all measured in turn."""
    import torch

    from model import EVAL_TOKENS, mean_loss, tile_starts, windows

    tokenizer, network, checkpoint, val = load_run(args)
    variants, T = quantized_variants(network), network.config.block_size
    one = torch.tensor([tokenizer.encode_array("\n").tolist()])
    eight, _ = windows(val, tile_starts(val, T, 8), T)

    @torch.inference_mode()
    def read(model):
        for _ in range(4):
            model(eight)

    jobs = (lambda model: model.generate(one, 400, seed=0),
            lambda model: model.generate(one.expand(64, -1), 100, seed=0), read)
    runs = [partial(job, model) for _, model in variants.values() for job in jobs]
    for run in runs:  # warms up
        run()
    times = np.reshape(alternate(runs, args.repeats), (len(variants), len(jobs)))
    print(f"{args.out_dir / 'model.pt'}, iteration {checkpoint['iteration']}; "
          "speeds are ratios to float32\n")
    print("| weights | file | validation loss | one stream | 64 streams | reading 8 windows |\n"
          "|---|---:|---:|---:|---:|---:|")
    starts, base = tile_starts(val, T, EVAL_TOKENS // T), None
    for (name, (weights, model)), taken in zip(variants.items(), times):
        buffer, loss = io.BytesIO(), mean_loss(model, val, starts)
        torch.save({"model": weights}, buffer)
        base = base or loss
        print(f"| {name} | {len(buffer.getvalue()) / 1e6:.2f} MB | {loss:.4f} "
              f"({loss / base - 1:+.2%}) | "
              + " | ".join(f"{ratio:.2f}" for ratio in times[0] / taken) + " |")


# ---- command line ----

def sizes(text: str) -> list[int]:
    """Returns [1, 10] for "1,10", as argparse wants a `type`."""
    return [bounded(int, 1)(size) for size in text.split(",")]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Benchmarks, each against a textbook's version.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function, summary, repeats=None):
        name = function.__name__.removeprefix("bench_")
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(function=function)
        if repeats:
            sub.add_argument("--repeats", type=bounded(int, 1), default=repeats, metavar="N",
                             help=f"rounds, of which the median counts (default: {repeats})")
        if function is not bench_sample:
            sub.add_argument("--data_path", type=Path, default=DEFAULT_TEXT, metavar="FILE",
                             help="text (default: data/input.txt)")
        if function in (bench_loss, bench_quantize):
            sub.add_argument("--out_dir", type=Path, default=default_run("model.pt"),
                             metavar="FOLDER", help="folder of the trained run (default: "
                             "checkpoints/, or the pretrained network's if it holds none)")
        if function in (bench_train, bench_sample):
            sub.add_argument("--device", default="auto",
                             help="cuda, mps or cpu (default: the first of these that is there)")
        return sub

    sub = command(bench_tokenizer, "training and encoding, against the textbook algorithm", 1)
    sub.add_argument("--megabytes", type=sizes, metavar="N,N,...", help="measure texts of these "
                     "sizes instead: time and peak memory as a Markdown table")
    sub = command(bench_train, "an iteration of training, against the textbook network's", 5)
    sub.add_argument("--batch_size", type=bounded(int, 1), default=64, metavar="N",
                     help="sequences in a batch (default: 64)")
    sub.add_argument("--nanogpt", type=Path, metavar="FOLDER",
                     help="a clone of nanoGPT, to compare with it, too")
    sub = command(bench_sample, "sampling, against the textbook's and, where it is installed, that "
                  "of Hugging Face's transformers", 5)
    sub.add_argument("--llama2c", type=Path, metavar="FOLDER",
                     help="a clone of llama2.c, to compare with it, too: needs a C compiler")
    sub.add_argument("--beside", action="store_true", help="while train.py runs, on all cores")
    command(bench_loss, "the validation loss, exact, of random batches, and past the window")
    command(bench_quantize, "ways to quantize a trained network, against float32", 5)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.function(args)


if __name__ == "__main__":
    run_script(main, "use a smaller --batch_size or --megabytes, or another --device")
