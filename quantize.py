"""Shrinks a trained network to a quarter: every matrix in int8 (PyTorch's dynamic quantization).

    python quantize.py                          # model.pt of your run -> model_int8.pt
    python generate.py --checkpoint checkpoints/model_int8.pt

Takes the pretrained network while there is no run of your own. Prints what it costs and what it
saves, measured, and a sample of each network from the same seed.
"""
import argparse
import shlex
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from model import (
    EVAL_TOKENS,
    GPT,
    LAST_WITH_INT8,
    MappedTokens,
    find_checkpoint,
    int8_engine,
    limit_threads,
    load_model,
    mean_loss,
    save_checkpoint,
    split,
    tile_starts,
)
from tokenizer import (
    DEFAULT_TEXT,
    TEMPERATURE,
    BasicTokenizer,
    default_run,
    load_tokens,
    one_file,
    run_script,
)

# what an int8 checkpoint keeps of the float one
KEPT = "config", "tokenizer", "text", "iteration", "train_loss", "val_loss", "val_nats_per_char"


def quantize_dynamic(model: GPT) -> dict[str, torch.Tensor]:
    """Returns the weights of a network on the CPU as an int8 checkpoint holds them.

    `NAME.weight` is int8 for linear layers and embeddings; `NAME.scale`, (rows,) float32, turns its
    rows back into floats. Raises ValueError where PyTorch has no dynamic quantization any more.
    """
    torch.backends.quantized.engine = int8_engine()
    try:
        from torch.ao.quantization import per_channel_dynamic_qconfig
        from torch.ao.quantization import quantize_dynamic as torch_quantize
    except ImportError as error:
        raise ValueError(f"PyTorch {torch.__version__} has no torch.ao.quantization: "
                         f"{LAST_WITH_INT8}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # marked deprecated
        quantized = torch_quantize(model, {nn.Linear: per_channel_dynamic_qconfig})
    weights = model.state_dict()
    for name, module in quantized.named_modules():
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            weight = module.weight()  # (out, in) of PyTorch's own quantized type
            weights[f"{name}.weight"] = weight.int_repr()
            weights[f"{name}.scale"] = weight.q_per_channel_scales().float()
        elif isinstance(module, nn.Embedding):
            weight = module.weight.detach()
            scale = (weight.abs().amax(1) / 127).clamp(min=1e-30)  # so that 0 / scale is 0
            weights[f"{name}.weight"] = (weight / scale[:, None]).round().to(torch.int8)
            weights[f"{name}.scale"] = scale
    return weights


def memory_bytes(model: GPT) -> int:
    """Returns the bytes of the weights in memory, those packed for the int8 kernels included."""
    packed = sum(getattr(layer, "memory_bytes", 0) for layer in model.modules())
    return packed + sum(weight.nbytes for weight in model.parameters())


def tokens_per_second(model: GPT, start: torch.Tensor) -> float:
    """Returns the speed of sampling 200 tokens after `start`, (1, T) int64."""
    started = time.perf_counter()
    model.generate(start, 200, seed=0)
    return 200 / (time.perf_counter() - started)


def compare(before: GPT, after: GPT, paths: tuple[Path, Path], val: MappedTokens,
            tokens_per_char: float, start: torch.Tensor) -> str:
    """Returns a table of size, loss on `val`, (N,), and speed after `start`, (1, T) int64."""
    models = before, after
    speeds = [[tokens_per_second(model, start) for model in models] for _ in range(5)]  # in turn
    T = before.config.block_size
    losses = [mean_loss(model, val, tile_starts(val, T, EVAL_TOKENS // T)) for model in models]
    rows = [("size on disk, MB", *(path.stat().st_size / 1e6 for path in paths), 2),
            ("size in memory, MB", *(memory_bytes(model) / 1e6 for model in models), 2),
            ("validation loss, nats per token", *losses, 4),
            ("validation loss, nats per character", *(x * tokens_per_char for x in losses), 4),
            ("sampling, tokens a second", *map(statistics.median, zip(*speeds)), 0)]
    lines = [f"{'':37}{'float32':>10}{'int8':>10}{'ratio':>9}"]
    for name, a, b, digits in rows:
        lines.append(f"{name:37}{a:10.{digits}f}{b:10.{digits}f}{b / a:9.4f}")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, help="folder of the run "
                        "(default: checkpoints/, or the pretrained network's if it holds none)")
    parser.add_argument("--checkpoint", type=one_file,
                        help="weights to quantize (default: model.pt in --out_dir)")
    parser.add_argument("--out", type=Path,
                        help="file to write (default: model_int8.pt in --out_dir)")
    parser.add_argument("--data_path", type=Path, default=DEFAULT_TEXT,
                        help="the text trained on, whose last tenth measures the loss "
                        "(default: data/input.txt)")
    return parser.parse_args()


def main() -> None:
    limit_threads()
    args = parse_args()
    out_dir = args.checkpoint.parent if args.checkpoint else default_run("model.pt")
    out_dir = args.out_dir or out_dir
    path = find_checkpoint(args.checkpoint or out_dir / "model.pt")
    out = args.out or out_dir / "model_int8.pt"
    tokenizer = BasicTokenizer(out_dir=out_dir)
    before, checkpoint = load_model(path, tokenizer.fingerprint, tokenizer.vocab_size)
    if checkpoint.get("int8"):
        raise ValueError(f"{path} is quantized already: name a float checkpoint with --checkpoint")
    of_run = out.suffix != ".pt" or out.name in ("model.pt", "last.pt")
    if out.exists() and (of_run or out.samefile(path)):
        raise ValueError(f"--out {out} may be a file of a run: name another file")
    tokens = load_tokens(tokenizer, args.data_path, out_dir)
    _, val = split(tokens.ids, before.config.block_size)
    if checkpoint.get("text") not in (None, tokens.digest):
        print(f"note: {args.data_path} is not the text this network was trained on; "
              "name that with --data_path", file=sys.stderr)

    kept = {key: value for key, value in checkpoint.items() if key in KEPT}
    save_checkpoint(out, kept | {"model": quantize_dynamic(before), "int8": True})
    after, _ = load_model(out, tokenizer.fingerprint, tokenizer.vocab_size)

    start = torch.tensor([tokenizer.encode_array("\n").tolist()])
    tokens_per_char = len(val) / tokenizer.count_characters(val)
    val = MappedTokens(val, "cpu")
    print(compare(before, after, (path, out), val, tokens_per_char, start))
    for name, model in ("float32", before), ("int8", after):
        ids = model.generate(start, 150, TEMPERATURE, seed=1337)[0].tolist()
        print(f"\n--- {name}, seed 1337 ---\n{tokenizer.decode(ids)}")
    script = Path(sys.argv[0]).with_name("generate.py").as_posix()
    command = ["python", script, "--checkpoint", out.as_posix()]
    if not out.parent.samefile(out_dir):
        command += ["--out_dir", out_dir.as_posix()]
    print(f"\nwrote {out}; sample from it with: {shlex.join(command)}")


if __name__ == "__main__":
    run_script(main)
