"""Shrinks a trained network to a quarter: every matrix in int8 (PyTorch's dynamic quantization).

    python quantize.py                                          # model.pt of your run, or of the pretrained network -> model_int8.pt
    python generate.py --checkpoint checkpoints/model_int8.pt

Prints what it costs and what it saves, measured, and a sample of each network from the same seed.
"""
import argparse
import hashlib
import os
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

from model import EVAL_TOKENS, GPT, find_checkpoint, load_model, mean_loss, quantize_dynamic, save_checkpoint, side_by_side, split
from tokenizer import DEFAULT_TEXT, BasicTokenizer, default_run, read_text

KEPT = {"config", "tokenizer", "text", "iteration", "train_loss", "val_loss", "val_nats_per_char"}  # of the float checkpoint


def memory_bytes(model: GPT) -> int:
    """Bytes the weights take in memory, those packed for the int8 kernels included."""
    return sum(p.nbytes for p in model.parameters()) + sum(
        layer.memory_bytes for layer in model.modules() if hasattr(layer, "memory_bytes"))


def tokens_per_second(model: GPT, start: torch.Tensor) -> float:
    """Speed of sampling 200 tokens after start, (1, T) int64."""
    started = time.perf_counter()
    model.generate(start, 200, seed=0)
    return 200 / (time.perf_counter() - started)


def compare(before: GPT, after: GPT, paths: tuple[Path, Path], val: torch.Tensor, tokens_per_char: float, start: torch.Tensor) -> str:
    """The table of size, loss and speed before and after. val: (N,) int64; start: (1, T) int64, what speed is measured from."""
    speeds = [[tokens_per_second(model, start) for model in (before, after)] for _ in range(5)]  # in turn
    T = before.config.block_size
    losses = [mean_loss(model, val, side_by_side(val, T, EVAL_TOKENS // T)) for model in (before, after)]
    rows = [("size on disk, MB", *(path.stat().st_size / 1e6 for path in paths), 2),
            ("size in memory, MB", memory_bytes(before) / 1e6, memory_bytes(after) / 1e6, 2),
            ("validation loss, nats per token", *losses, 4),
            ("validation loss, nats per character", *(loss * tokens_per_char for loss in losses), 4),
            ("sampling, tokens a second", *(statistics.median(speed) for speed in zip(*speeds)), 0)]
    lines = [f"{'':37}{'float32':>10}{'int8':>10}{'ratio':>9}"]
    lines += [f"{name:37}{a:10.{digits}f}{b:10.{digits}f}{b / a:9.4f}" for name, a, b, digits in rows]
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, help="folder of the run (default checkpoints/, or the pretrained network's if it holds none)")
    parser.add_argument("--checkpoint", type=Path, help="weights to quantize (default: model.pt in --out_dir)")
    parser.add_argument("--out", type=Path, help="file to write (default: model_int8.pt in --out_dir)")
    parser.add_argument("--data_path", type=Path, default=DEFAULT_TEXT,
                        help="the text trained on, whose last tenth measures the loss (default data/input.txt)")
    return parser.parse_args()


def main() -> None:
    sys.stdout.reconfigure(errors="replace")  # the samples, whatever the terminal can show
    args = parse_args()
    out_dir = args.out_dir or (args.checkpoint.parent if args.checkpoint else default_run("model.pt"))
    path, out = find_checkpoint(args.checkpoint or out_dir / "model.pt"), args.out or out_dir / "model_int8.pt"
    tokenizer = BasicTokenizer(out_dir=out_dir)
    before, checkpoint = load_model(path, tokenizer.fingerprint, tokenizer.vocab_size)
    if checkpoint.get("int8"):
        raise ValueError(f"{path} is quantized already: name a float checkpoint with --checkpoint")
    if out.exists() and out.samefile(path):
        raise ValueError(f"--out {out} is the checkpoint to be quantized: name another file")
    tokens = tokenizer.encode_array(read_text(args.data_path))
    _, val = split(tokens, before.config.block_size)
    if checkpoint.get("text") not in (None, hashlib.sha256(tokens.tobytes()).hexdigest()):
        print(f"note: {args.data_path} is not the text this network was trained on; name that with --data_path", file=sys.stderr)

    save_checkpoint(out, {key: value for key, value in checkpoint.items() if key in KEPT} | {"model": quantize_dynamic(before), "int8": True})
    after, _ = load_model(out, tokenizer.fingerprint, tokenizer.vocab_size)

    start = torch.tensor([tokenizer.encode_array("\n").tolist()])
    tokens_per_char = len(val) / tokenizer.count_characters(val)
    print(compare(before, after, (path, out), torch.from_numpy(val.astype("int64")), tokens_per_char, start))
    for name, model in ("float32", before), ("int8", after):
        print(f"\n--- {name}, seed 1337 ---\n{tokenizer.decode(model.generate(start, 150, seed=1337)[0].tolist())}")
    command = ["python", Path(sys.argv[0]).with_name("generate.py").as_posix(), "--checkpoint", out.as_posix()]
    if not out.parent.samefile(out_dir):
        command += ["--out_dir", out_dir.as_posix()]
    print(f"\nwrote {out}; sample from it with: {shlex.join(command)}")


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.exit(f"quantize.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
