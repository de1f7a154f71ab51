"""Benchmarks: what is compared runs in turn, in one process, and medians are reported.

    python bench.py tokenizer                          # against the textbook algorithm: a minute or two
    python bench.py tokenizer --megabytes 1,10,100     # time and memory against the size of the text
    python bench.py train                              # an iteration, against the textbook network's
    python bench.py sample                             # tokens a second, against the textbook sampler and Hugging Face's
    python bench.py loss                               # the validation loss, exact, of random batches, past the window
    python bench.py quantize                           # ways to quantize a trained network, against float32
"""
import argparse
import contextlib
import copy
import functools
import importlib.util
import io
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tokenizer import DEFAULT_TEXT, BasicTokenizer, default_run, read_text

sys.path.insert(0, str(Path(__file__).resolve().parent / "tests"))  # the reference implementations live there


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alternate(functions, repeats, often=None):
    """Median seconds of each function; they run in turn, so that a drift of the machine meets all alike.

    One that is much the faster runs `often` at each turn, as one short time is mostly chance.
    """
    times = [[] for _ in functions]
    for _ in range(repeats):
        for function, times_of_it, n in zip(functions, times, often or [1] * len(functions)):
            times_of_it.extend(seconds(function) for _ in range(n))
    return [statistics.median(times_of_it) for times_of_it in times]


def peak_memory():
    """The most memory this process has held so far, in bytes; NaN on Windows."""
    with contextlib.suppress(ImportError):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return math.nan


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

    data, results = read_text(data_path).encode(), {}
    tokenizer = train_quietly(data_path, 500)
    for name, textbook, ours in (
        ("train 500 tokens", lambda: results.update(trained=textbook_bpe_train(data, 500)), lambda: train_quietly(data_path, 500)),
        ("encode the text", lambda: results.update(ids=textbook_bpe_encode(data, tokenizer.merges)), lambda: tokenizer.encode_array(data)),
    ):
        slow, fast = alternate([textbook, ours], repeats, [1, 15])
        print(f"{name:18} textbook {slow:5.2f} s, ours {fast:.4f} s: {slow / fast:.0f} times faster", flush=True)
    ids = tokenizer.encode_array(data).tolist()
    same = results == {"trained": (tokenizer.merges, ids), "ids": ids}
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
    print(f"| {megabytes} MB | {train:.2f} s | {megabytes / train:.1f} MB/s | {encode:.2f} s | "
          f"{megabytes / encode:.1f} MB/s | {tokens:,} | {peak_memory() / 1e6:,.0f} MB |")


# ---------------------------------------------------------------------------- network


def bench_train(args):
    """Whole iterations (batch, forward, backward, update) at the published sizes, dropout included, in turn."""
    import torch

    from model import CPU_TOKENS, GPT, GPTConfig, Workers, can_compile, choose_device, choose_dtype, record, windows
    from textbook_gpt import TextbookGPT

    config, device, batch_size = GPTConfig(), choose_device(args.device), args.batch_size
    if device.type == "cuda":
        torch.cuda.set_device(device)
    data = torch.randint(config.vocab_size, (10**6,), dtype=torch.int32, device=device)
    on_cpu, often = data.long().cpu(), 1 if device.type == "cpu" else 20  # iterations between two looks at the clock, which make a GPU wait

    def gathered():
        """A batch, as train.py makes it."""
        return windows(data, torch.randint(len(data) - config.block_size, (batch_size,), device=device), config.block_size)

    def stacked():
        """A batch, as textbooks and nanoGPT make it."""
        starts = torch.randint(len(data) - config.block_size, (batch_size,))
        stacks = [torch.stack([on_cpu[start + i:start + i + config.block_size] for start in starts]) for i in range(2)]
        return [stack.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else stack for stack in stacks]

    def repeat(iteration):
        def run():
            for _ in range(often):
                loss = iteration()
            loss.item()
        return run

    def plain(model, optimizer, dtype, clip=False):
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

        def iteration():
            optimizer.zero_grad(set_to_none=True)
            idx, targets = stacked()
            with autocast:
                loss = model(idx, targets)[1]
            loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return loss
        return repeat(iteration)

    def ours(dtype):
        network, inputs = GPT(config).to(device), gathered()
        if can_compile(device):
            for block in network.blocks:
                block.compile()
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4, fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        weights, at_once = list(network.parameters()), CPU_TOKENS // config.block_size

        def loss(idx, targets):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
                return network(idx, targets)[1] * (len(idx) / batch_size)

        def gradients():
            if device.type == "cpu":
                return workers.gradients(loss, list(zip(*(tensor.split(at_once) for tensor in inputs))), weights, torch.ones(()))
            network.zero_grad(set_to_none=True)
            total = loss(*inputs)
            scaler.scale(total).backward()
            return total.detach()

        workers = Workers(math.ceil(batch_size / at_once))
        again = record(gradients) if device.type == "cuda" else gradients

        def iteration():
            for old, new in zip(inputs, gathered()):
                old.copy_(new)
            total = again()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(weights, math.inf)
            scaler.step(optimizer)
            scaler.update()
            return total
        return repeat(iteration)

    def textbook():
        network = TextbookGPT(config).to(device)
        return plain(network, torch.optim.AdamW(network.parameters(), lr=3e-4), torch.float32)

    def nanogpt(dtype):
        spec = importlib.util.spec_from_file_location("nanogpt", args.nanogpt / "model.py")
        sys.modules["nanogpt"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        width = config.n_head * config.head_size  # which n_head must divide there
        network = module.GPT(module.GPTConfig(config.block_size, config.vocab_size, config.n_layer, config.n_head, width, config.dropout,
                                              bias=False)).to(device)
        return plain(torch.compile(network), network.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device.type), dtype, clip=True)

    auto, runs, memory = choose_dtype("auto", device), {}, {}
    makers = {"textbook, float32": textbook}
    makers |= {f"ours, {str(dtype)[6:]}": functools.partial(ours, dtype) for dtype in (torch.float32, auto)}
    makers |= {f"nanoGPT, {str(auto)[6:]}": functools.partial(nanogpt, auto)} if args.nanogpt else {}
    for name, make in makers.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        runs[name] = make()
        runs[name](), runs[name]()  # warms up, and compiles
        if device.type == "cuda":
            memory[name] = torch.cuda.max_memory_allocated(device) - before
    times = {name: time_ / often for name, time_ in zip(runs, alternate(list(runs.values()), args.repeats))}

    network = GPT(config)
    matrices = sum(p.numel() for name, p in network.named_parameters() if p.dim() == 2 and "embedding" not in name)
    tokens = batch_size * config.block_size
    attention = 2 * config.n_layer * config.n_head * config.head_size * config.block_size  # per token, causal or not
    flops = 6 * tokens * (matrices + attention)  # Kaplan et al. 2020: two forward, four backward
    print(f"an iteration of {batch_size} x {config.block_size} tokens on {device.type}; utilisation is of the speed of a large matrix product")
    for name, time_ in times.items():
        dtype = getattr(torch, name.split(", ")[1])
        a, b = (torch.randn(4096, 4096, device=device, dtype=dtype) for _ in range(2))
        peak = 2 * 4096 ** 3 / statistics.median(seconds(lambda: (a @ b).sum().item()) for _ in range(5))
        held = f", {memory[name] / 1e9:.2f} GB" if memory else ""
        print(f"{name:18}{time_:8.4f} s {1 / time_:8.2f} iterations/s {tokens / time_:10,.0f} tokens/s {flops / time_ / 1e9:9,.0f} GFLOP/s"
              f"  ({flops / time_ / peak:4.0%} of {peak / 1e9:,.0f}){held}   {times['textbook, float32'] / time_:.2f} times the textbook")
    if not memory:
        print(f"peak memory of the process, all networks in it: {peak_memory() / 1e9:.2f} GB")


def bench_sample(args):
    """Tokens a second, in turn: of one stream, past a full context; of 64, and of Hugging Face's network, from one token up to a full one."""
    import torch

    from model import GPT, GPTConfig, choose_device
    from textbook_gpt import TextbookGPT, copy_weights

    config, device = GPTConfig(), choose_device(args.device)
    textbook, network = TextbookGPT(config).eval(), GPT(config).eval()
    copy_weights(textbook, network)
    textbook.to(device), network.to(device)
    prompt = torch.randint(config.vocab_size, (1, config.block_size), device=device)
    samplers = {"textbook": (lambda: textbook.generate(prompt, 60).tolist(), 60),  # tolist waits for a GPU
                "ours, one stream": (lambda: network.generate(prompt, 1000).tolist(), 1000),
                "ours, ten times as long": (lambda: network.generate(prompt, 10_000).tolist(), 10_000),
                "ours, 64 streams": (lambda: network.generate(prompt[:, :1].expand(64, -1), 255).tolist(), 64 * 255)}
    with contextlib.suppress(ImportError):
        from transformers import GPT2Config, GPT2LMHeadModel
        width = config.n_head * config.head_size  # which n_head must divide there
        gpt2 = GPT2LMHeadModel(GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=width, n_head=config.n_head, n_layer=config.n_layer,
            bos_token_id=None, eos_token_id=None)).eval().to(device)
        samplers["Hugging Face GPT-2"] = (
            lambda: gpt2.generate(prompt[:, :1], max_new_tokens=250, min_new_tokens=250, do_sample=True).tolist(), 250)
    for run, _ in samplers.values():  # warms up
        run()
    times = alternate([run for run, _ in samplers.values()], args.repeats)
    rates = {name: count / time_ for (name, (_, count)), time_ in zip(samplers.items(), times)}
    for name, rate in rates.items():
        print(f"{name:24}{rate:10,.0f} tokens/s{rate / rates['textbook']:8.1f} times the textbook")


def bench_loss(args):
    """The validation loss, measured in each of the ways it is spoken of."""
    import torch
    import torch.nn.functional as F

    from model import load_model, mean_loss, side_by_side, split, windows

    tokenizer = BasicTokenizer(out_dir=args.out_dir)
    model, checkpoint = load_model(args.out_dir / "model.pt", tokenizer.fingerprint, tokenizer.vocab_size)
    T = model.config.block_size
    _, val = split(tokenizer.encode_array(read_text(args.data_path)), T)
    per_char = len(val) / tokenizer.count_characters(val)
    val = torch.from_numpy(val.astype(np.int64))
    draw = torch.Generator().manual_seed(1337)
    print(f"{args.out_dir / 'model.pt'}, iteration {checkpoint['iteration']}; nats per token (per character)")
    for name, starts in (("whole split, windows side by side", side_by_side(val, T)),
                         ("200 random batches of 64 windows", torch.randint(len(val) - T, (200 * 64,), generator=draw))):
        loss = mean_loss(model, val, starts)
        print(f"{name:40}{loss:.4f} ({loss * per_char:.4f})", flush=True)

    def losses(starts, first):
        """Of the tokens after positions `first` to T of the windows that begin at starts, by their place in val."""
        places, values = [], []
        with torch.inference_mode():
            for part in starts.split(64):
                idx, targets = windows(val, part, T)
                values.append(F.cross_entropy(model(idx)[0].mT, targets, reduction="none")[:, first - 1:].flatten())
                places.append((part[:, None] + torch.arange(first, T + 1)).flatten())
        return torch.cat(places), torch.cat(values)

    half = max(1, T // 2)
    places, ours = losses(torch.arange(0, len(val) - T, T - half + 1), half)  # contexts of half a window to a whole one, as `stream` has
    some = torch.arange(half, len(places), 40)
    some = some[places[some] >= T]
    if len(some) < 2:
        raise ValueError(f"the last tenth of {args.data_path} is too short to measure more on it")
    _, crop = losses(places[some] - T, T)  # a whole window before each token
    ours = ours[some]
    print(f"{len(some):,} tokens spread over the split, each with")
    for name, loss in (f"the {T} tokens before it (the crop)", crop.mean()), (f"{half} to {T}, as in sampling past {T}", ours.mean()):
        print(f"  {name:38}{loss:.4f} ({loss * per_char:.4f})")
    print(f"  {'difference, and its standard error':38}{(ours - crop).mean():+.4f}, {(ours - crop).std() / len(some) ** 0.5:.4f}")


def bench_quantize(args):
    """Ways to quantize a trained network, as a Markdown table; the speeds of all are measured in turn."""
    import torch

    from model import EVAL_TOKENS, Int8Linear, load_model, mean_loss, quantize_dynamic, side_by_side, split, use_int8, windows

    tokenizer = BasicTokenizer(out_dir=args.out_dir)
    network, checkpoint = load_model(args.out_dir / "model.pt", tokenizer.fingerprint, tokenizer.vocab_size)
    _, val = split(tokenizer.encode_array(read_text(args.data_path)), network.config.block_size)
    val = torch.from_numpy(val.astype(np.int64))
    T = network.config.block_size
    starts = side_by_side(val, T, EVAL_TOKENS // T)
    floats, per_channel = network.state_dict(), quantize_dynamic(network)

    float_embeddings = {name: floats[name] if "embedding" in name else weight for name, weight in per_channel.items()
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

    variants = {
        "float32": (floats, network),
        "**per channel, embeddings too**": (per_channel, build(per_channel)),
        "per channel, embeddings in float32": (float_embeddings, build(float_embeddings)),
        "per tensor": (per_tensor, build(per_tensor)),
        "per channel, inputs in 8 bits, not 7": (per_channel, build(per_channel, seven_bits=False)),
    }
    one, (eight, _) = torch.tensor([tokenizer.encode_array("\n").tolist()]), windows(val, side_by_side(val, T, 8), T)

    @torch.inference_mode()
    def read(model):
        for _ in range(4):
            model(eight)

    jobs = (lambda model: model.generate(one, 400, seed=0)), (lambda model: model.generate(one.expand(64, -1), 100, seed=0)), read
    runs = [functools.partial(job, model) for _, model in variants.values() for job in jobs]
    for run in runs:  # warms up
        run()
    times = np.reshape(alternate(runs, args.repeats), (len(variants), len(jobs)))
    print(f"{args.out_dir / 'model.pt'}, iteration {checkpoint['iteration']}; speeds are ratios to float32\n")
    print("| weights | file | validation loss | one stream | 64 streams | reading 8 windows |\n|---|---:|---:|---:|---:|---:|")
    base_loss = None
    for (name, (weights, model)), taken in zip(variants.items(), times):
        buffer, loss = io.BytesIO(), mean_loss(model, val, starts)
        torch.save({"model": weights}, buffer)
        base_loss = base_loss or loss
        print(f"| {name} | {len(buffer.getvalue()) / 1e6:.2f} MB | {loss:.4f} ({loss / base_loss - 1:+.2%}) | "
              + " | ".join(f"{ratio:.2f}" for ratio in times[0] / taken) + " |")


# ---------------------------------------------------------------------------- command line


def positive(argument):
    """"1" -> 1, for argparse, which reports the ValueError as a usage error."""
    value = int(argument)
    if value < 1:
        raise ValueError
    return value


def sizes(argument):
    """"1,10" -> [1, 10], for argparse as well."""
    return [positive(value) for value in argument.split(",")]


def parse_args():
    parser = argparse.ArgumentParser(description="Benchmarks of each part, against its textbook version.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sub = commands.add_parser("tokenizer", help="training and encoding, against the textbook algorithm")
    sub.set_defaults(function=bench_tokenizer)
    sub.add_argument("--data_path", type=Path, default=DEFAULT_TEXT, metavar="FILE",
                     help="text (default: data/input.txt beside this script)")
    sub.add_argument("--repeats", type=positive, default=1, metavar="N",
                     help="rounds, of which the median counts (default: 1; the textbook takes minutes)")
    sub.add_argument("--megabytes", type=sizes, metavar="N,N,...",
                     help="measure texts of these sizes instead: time and peak memory as a Markdown table")
    for function, summary in ((bench_train, "an iteration of training, against the textbook network's"),
                              (bench_sample, "sampling, against the textbook's and, where installed, Hugging Face transformers'"),
                              (bench_loss, "the validation loss, exact, of random batches, and past the window"),
                              (bench_quantize, "ways to quantize a trained network, against float32")):
        sub = commands.add_parser(function.__name__[6:], help=summary, description=summary)
        sub.set_defaults(function=function)
        if function is not bench_loss:
            sub.add_argument("--repeats", type=positive, default=5, metavar="N", help="rounds, of which the median counts (default: 5)")
        if function in (bench_loss, bench_quantize):
            sub.add_argument("--out_dir", type=Path, default=default_run("model.pt"),
                             help="folder of the trained run (default: checkpoints/, or the pretrained network's)")
            sub.add_argument("--data_path", type=Path, default=DEFAULT_TEXT, help="its text (default: data/input.txt)")
        if function is bench_train:
            sub.add_argument("--batch_size", type=positive, default=64, metavar="N", help="sequences in a batch (default: 64)")
            sub.add_argument("--nanogpt", type=Path, metavar="FOLDER", help="a clone of nanoGPT, to compare with it, too")
        if function in (bench_train, bench_sample):
            sub.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the first of these that is there)")
    return parser.parse_args()


def main():
    args = parse_args()
    try:
        args.function(args)
    except (ValueError, OSError) as error:
        sys.exit(f"bench.py: {error}")
    except subprocess.CalledProcessError:
        sys.exit(1)  # the child has said why
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
