"""Trains the network on a text, and its tokenizer first if there is none.

    python train.py                                             # Tiny Shakespeare with the published hyperparameters
    python train.py --preset fast                               # a lower loss in 600 iterations than that in 5,000; or best
    python train.py --data_path my.txt --out_dir checkpoints/mine
    python train.py --resume                                    # go on where a run was stopped
    torchrun --nproc_per_node 2 train.py                        # each batch shared by two GPUs, or processes

Everything lands in --out_dir: merges.pkl and vocab.pkl (tokenizer), model.pt (weights with the lowest validation loss),
last.pt (all it takes to resume), metrics.csv (a row for each evaluation), histograms.npz (ReLUs at the last evaluation).
"""
import argparse
import contextlib
import csv
import hashlib
import io
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from model import (CPU_TOKENS, EVAL_TOKENS, GPT, GPTConfig, Workers, can_compile, choose_device, choose_dtype, load_checkpoint, load_model,
                   mean_loss, out_of_memory, record, save_checkpoint, side_by_side, split, windows)
from tokenizer import CHECKPOINTS, DEFAULT_TEXT, MAX_VOCAB, PRETRAINED, BasicTokenizer, atomic_write, read_text

RUN_FILES = {"model.pt", "last.pt", "last.pt.new", "last.pt.old", "model_int8.pt", "metrics.csv", "histograms.npz"}
PICTURES = {"loss", "relu_training", "relu_outputs", "relu_gradients", "attention", "expected"}
PRESETS = {  # values of flags (lr_decay_iters None: max_iters); what was tried to find them is in README.md
    "reference": {},
    "fast": {"max_iters": 600, "eval_interval": 100, "muon_lr": 0.02, "learning_rate": 3e-3, "beta2": 0.95, "weight_decay": 0.4,
             "warmup_iters": 50, "lr_decay_iters": None, "min_lr": 0.0, "init_std": 0.02, "dropout": 0.1, "attention_dropout": 0.0,
             "bpe_dropout": 0.1, "train_temperature": 0.85, "teacher_temperature": 0.9},
}
PRESETS["best"] = PRESETS["fast"] | {"max_iters": 2250, "eval_interval": 250, "dropout": 0.2, "bpe_dropout": 0.2}
LESS_THAN = {"dropout": 1, "attention_dropout": 1, "bpe_dropout": 1, "beta1": 1, "beta2": 1, "vocab_size": MAX_VOCAB + 1, "n_layer": 1001}
TEACHER_SHARE = 0.9  # of a teacher in what the network is to predict; the rest is the token that really came next
SAVE_SECONDS = 300  # last.pt is written at every evaluation, and this often in between
LAST_ENTRIES = {"iteration": int, "optimizers": list, "scaler": dict, "batches": torch.Tensor, "random": list, "device": str, "args": dict,
                "text": str, "tokenizer": str, "tokens_seen": int, "best": float, "seconds": float, "columns": list,
                "metrics": torch.Tensor}  # and what they are


# ---------------------------------------------------------------------------------------------------------------- data

def load_tokenizer(out_dir: Path, data_path: Path, vocab_size: int) -> BasicTokenizer:
    """The tokenizer in out_dir, or a new one trained on the text. Raises ValueError if the one there has another size."""
    if not (out_dir / "merges.pkl").exists():
        print(f"training a tokenizer of {vocab_size} tokens on {data_path}")
        return BasicTokenizer(data_path, vocab_size, out_dir=out_dir)
    tokenizer = BasicTokenizer(out_dir=out_dir)
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(f"the tokenizer in {out_dir} has {tokenizer.vocab_size} tokens, not {vocab_size}: "
                         f"use --vocab_size {tokenizer.vocab_size}, or another --out_dir")
    return tokenizer


# ------------------------------------------------------------------------------------------------------------ training

def build_optimizers(model: GPT, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov & Hutter 2019) for all and, with --muon_lr, Muon (Jordan et al. 2024) for the matrices in the blocks.

    Both decay matrices only, not biases and norms.
    """
    for_muon = [p for p in model.blocks.parameters() if p.dim() == 2] if args.muon_lr else []
    for_adamw = [p for p in model.parameters() if all(p is not q for q in for_muon)]
    groups = [{"params": [p for p in for_adamw if p.dim() == 2], "weight_decay": args.weight_decay},
              {"params": [p for p in for_adamw if p.dim() < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(args.beta1, args.beta2), fused=True)
    return [adamw] + ([torch.optim.Muon(for_muon, lr=args.muon_lr, weight_decay=args.weight_decay)] if for_muon else [])


def schedule(iteration: int, args: argparse.Namespace) -> float:
    """Share of the learning rate in use: linear warm-up, then 1, or a cosine (Loshchilov & Hutter 2017) down to min_lr."""
    if iteration < args.warmup_iters:
        return (iteration + 1) / args.warmup_iters
    if not args.lr_decay_iters:
        return 1.0
    progress = min(1.0, (iteration - args.warmup_iters) / max(1, args.lr_decay_iters - args.warmup_iters))
    end = args.min_lr / (args.learning_rate or 1.0)
    return end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def soften(targets: torch.Tensor, teacher: GPT, idx: torch.Tensor, temperature: float) -> torch.Tensor:
    """The tokens that come next, (B, T) int64, as probabilities (B, T, V): mostly what a teacher expects (Hinton et al. 2015).

    The temperature divides the teacher's logits.
    """
    probs = (teacher(idx)[0].float() / temperature).softmax(-1) * TEACHER_SHARE
    return probs.scatter_add_(2, targets[..., None], torch.full_like(probs[..., :1], 1 - TEACHER_SHARE))


def histogram(values: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """How many values (float32, any shape) lie in each of 100 bins, and their edges: (100,) int64, (101,) float32.

    It is that of np.histogram, but made where the values are, so that they need not be copied from a GPU.
    """
    if values.device.type == "mps":  # its histc makes a row of 100 numbers of each value
        values = values.cpu()
    low, high = (value.item() for value in values.aminmax())
    if low == high:  # as in a layer that is dead
        low, high = low - 0.5, high + 0.5
    parts = values.flatten().split(2**24)  # histc counts in float32, which knows no larger odd numbers
    counts = sum(torch.histc(part, 100, low, high).long() for part in parts)
    return counts.cpu().numpy(), np.linspace(low, high, 101, dtype=np.float32)


class Stop:
    """Notes SIGINT (Ctrl-C) and SIGTERM, so that the loop can end between two iterations. A second Ctrl-C ends at once."""

    def __init__(self):
        self.requested, self.number = False, signal.SIGTERM
        signal.signal(signal.SIGINT, self.note)
        signal.signal(signal.SIGTERM, self.note)

    def note(self, number, frame):
        self.requested, self.number = True, number
        print("\nfinishing, then saving", file=sys.stderr)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


# ------------------------------------------------------------------------------------------------- the folder of a run

def lock(out_dir: Path):
    """Holds out_dir, made if need be, until this process ends in whatever way. Raises ValueError if another training holds it."""
    if out_dir.exists() and PRETRAINED.exists() and out_dir.samefile(PRETRAINED):
        raise ValueError(f"--out_dir {out_dir} holds the network that comes with the repository: choose another folder")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        file = open(out_dir / ".lock", "w")
    except OSError as error:
        reason = "it is not a folder" if isinstance(error, FileExistsError) else error.strerror
        raise OSError(f"cannot write into --out_dir {out_dir}: {reason}") from error
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another training is running in {out_dir}: wait for it, or choose another --out_dir") from None
    except (ImportError, OSError):  # Windows has no such lock, nor have some network drives
        pass
    return file


def set_aside(out_dir: Path) -> None:
    """Moves an earlier run in out_dir into a folder of its own, with a copy of its tokenizer, so that nothing is lost."""
    if not any((out_dir / name).exists() for name in ("model.pt", "last.pt", "last.pt.old")):
        return
    number = next(n for n in range(1, 10**6) if not (out_dir / f"earlier-{n}").exists())
    earlier = out_dir / f"earlier-{number}"
    for name in "merges.pkl", "vocab.pkl":  # first, as only this takes room that the disk may not have
        with atomic_write(earlier / name) as file:
            file.write((out_dir / name).read_bytes())
    for path in sorted(out_dir.iterdir()):
        if path.name in RUN_FILES or path.suffix in (".png", ".svg") and path.stem in PICTURES:
            path.replace(earlier / path.name)
    print(f"moved the earlier run to {earlier} (--resume would have continued it)")


def load_last(out_dir: Path) -> dict:
    """What --resume goes on from: last.pt or, where it is missing or damaged, its predecessor. Raises ValueError."""
    errors = []
    for name in "last.pt", "last.pt.new", "last.pt.old":
        try:
            last = load_checkpoint(out_dir / name)
            whole = all(type(last.get(key)) is kind for key, kind in LAST_ENTRIES.items())
            if not whole or any(isinstance(value, torch.Tensor) for value in last["args"].values()):
                raise ValueError(f"{out_dir / name} holds no training to resume")
        except (ValueError, OSError) as error:  # a training that saves just now may have renamed it meanwhile
            errors.append(error)
            continue
        if errors and (out_dir / "last.pt").exists():
            print(f"{errors[0]}\ngoing on from {out_dir / name}, iteration {last['iteration']}, instead", file=sys.stderr)
        return last
    if (out_dir / "last.pt").exists():
        raise errors[0]
    raise ValueError(f"nothing to resume in {out_dir}: start with `python train.py`, or name the run's folder with --out_dir")


def save_last(out_dir: Path, last: dict) -> None:
    """Replaces last.pt and keeps its predecessor as last.pt.old, should the new file turn out to be damaged."""
    save_checkpoint(out_dir / "last.pt.new", last)
    if (out_dir / "last.pt").exists():
        (out_dir / "last.pt").replace(out_dir / "last.pt.old")
    (out_dir / "last.pt.new").replace(out_dir / "last.pt")


def save_metrics(out_dir: Path, rows: list[dict], histograms: dict[str, list[np.ndarray]]) -> None:
    """Writes metrics.csv, a row for each evaluation so far, and histograms.npz of the last one."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, rows[-1], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(out_dir / "metrics.csv") as file:
        file.write(table.getvalue().encode())
    with atomic_write(out_dir / "histograms.npz") as file:
        np.savez_compressed(file, iteration=rows[-1]["iteration"], **histograms)


# ------------------------------------------------------------------------------------------------------------- the run

class Trainer:
    """One training run: the data on its device, the network, the optimizer, and the loop in `run`.

    Under torchrun each process has one; they share every batch, and only the master (rank 0) prints and writes.
    """

    def __init__(self, args: argparse.Namespace, last: dict | None):
        """Starts afresh, or from `last`, the contents of a last.pt. Raises ValueError for what does not fit together."""
        self.args = args
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.master = self.rank == 0
        if self.world_size > 1:
            self.join_others()
        else:
            self.device = choose_device(args.device)
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # whose generator draws the dropout
        self.dtype = choose_dtype(args.dtype, self.device)
        if args.compile and self.device.type != "cuda":
            raise ValueError("--compile is for CUDA: it gains nothing elsewhere")
        self.compiled = can_compile(self.device) if args.compile is None else args.compile
        if args.batch_size % self.world_size:
            raise ValueError(f"--batch_size {args.batch_size} cannot be shared out evenly: make it a multiple of {self.world_size} processes")
        self.load_text()
        self.teachers = [self.load_teacher(Path(path)) for path in args.teacher]
        self.teacher_hashes = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in args.teacher]

        torch.manual_seed(args.seed)
        self.config = GPTConfig(**{field.name: getattr(args, field.name) for field in fields(GPTConfig)})
        self.model = GPT(self.config)
        if args.init_std:
            self.model.init_weights(args.init_std)
        self.model.to(self.device)  # only now, so that the same seed gives the same weights on every device
        self.optimizers = build_optimizers(self.model, args)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.batches = torch.Generator(self.device).manual_seed(args.seed)  # one for all ranks: each takes its part of a batch
        self.random = torch if self.device.type == "cpu" else torch.get_device_module(self.device)  # dropout draws from it
        self.random.manual_seed(args.seed + self.rank)
        self.iteration, self.tokens_seen, self.best, self.seconds, self.metrics = 0, 0, math.inf, 0.0, []
        self.grad_norm = torch.tensor(math.nan)
        if last:
            self.restore(last)
        if self.compiled:
            for block in self.model.blocks:  # which are alike, so that one has to be compiled, not the whole network
                block.compile()
        self.step_model = torch.nn.parallel.DistributedDataParallel(self.model) if self.world_size > 1 else self.model
        self.workers = self.replay = None
        self.stop = Stop()

    def summary(self) -> str:
        """What is about to run, in one line."""
        machine = self.device.type if self.world_size == 1 else f"{self.world_size} x {self.device.type}"
        machine += ", compiled at the first iteration" * self.compiled
        return (f"{sum(p.numel() for p in self.model.parameters()):,} parameters in {str(self.dtype)[6:]} on {machine}; "
                f"{len(self.data['train']):,} tokens to train on, {len(self.data['val']):,} to validate on; "
                f"iterations {self.iteration} to {self.args.max_iters} of {self.args.batch_size} x {self.args.block_size} tokens")

    def join_others(self) -> None:
        """Meets the other processes that torchrun started, each on a GPU of its own or on the CPU."""
        gpu = choose_device(self.args.device).type == "cuda"
        if gpu and int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise ValueError(f"torchrun started more processes than there are GPUs: use --nproc_per_node {torch.cuda.device_count()}")
        self.device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}" if gpu else "cpu")
        if gpu:
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if gpu else "gloo")
        self.flags_group = dist.new_group(backend="gloo")  # for flags that live on the CPU

    def load_text(self) -> None:
        """Puts the text on the device, as tokens, training a tokenizer first if there is none."""
        args = self.args
        text = read_text(args.data_path)
        split(text.encode(), args.block_size)  # with fewer bytes than that it has too few tokens, too
        if self.master:
            self.held = lock(args.out_dir)  # until this process ends; only now, as what is amiss so far leaves no folder
        if self.world_size > 1 and not self.master:
            dist.barrier(self.flags_group)  # the master may have to train the tokenizer
        if self.master and (args.out_dir / "merges.pkl").exists():
            print(f"using the tokenizer that is in {args.out_dir}")
        tokenizer = load_tokenizer(args.out_dir, args.data_path, args.vocab_size)
        if self.world_size > 1 and self.master:
            dist.barrier(self.flags_group)
        tokens = tokenizer.encode_array(text)
        train, val = split(tokens, args.block_size)
        self.tokenizer, self.text_hash = tokenizer, hashlib.sha256(tokens.tobytes()).hexdigest()
        self.tokens_per_char = {name: len(part) / tokenizer.count_characters(part) for name, part in (("train", train), ("val", val))}
        self.data = {name: self.on_device(part) for name, part in (("train", train), ("val", val))}
        self.spelled = None, None  # which pass over the text, and its tokens (see `training_tokens`)
        self.train_text = text.encode()[:-len(tokenizer.decode_bytes(val.tolist()))] if args.bpe_dropout else b""
        self.starts = {"val": side_by_side(self.data["val"], args.block_size, EVAL_TOKENS // args.block_size)}
        self.starts["train"] = side_by_side(self.data["train"], args.block_size, len(self.starts["val"]))

    def load_teacher(self, path: Path) -> GPT:
        """A network that --teacher names, on the device. Raises ValueError if this one cannot learn from it."""
        teacher, entries = load_model(path)
        if entries.get("int8"):
            raise ValueError(f"--teacher {path} is int8: name the model.pt it was made from")
        if (entries.get("tokenizer"), teacher.config.vocab_size) != (self.tokenizer.fingerprint, self.args.vocab_size):
            raise ValueError(f"--teacher {path} was trained with another tokenizer than that in {self.args.out_dir}: "
                             "copy merges.pkl and vocab.pkl from its folder into a new --out_dir, and train there with its --vocab_size")
        if entries.get("text") != self.text_hash:
            raise ValueError(f"--teacher {path} was trained on another text than {self.args.data_path}, perhaps on what this network is "
                             "validated on: use a teacher trained on the same text")
        if teacher.config.block_size < self.args.block_size:
            raise ValueError(f"--teacher {path} has a context of {teacher.config.block_size} tokens: "
                             f"use --block_size {teacher.config.block_size}, or another teacher")
        return teacher.to(self.device)

    def on_device(self, tokens: np.ndarray) -> torch.Tensor:
        """Tokens as an int32 tensor where the network is."""
        return torch.from_numpy(tokens.astype(np.int32)).to(self.device)

    def training_tokens(self) -> torch.Tensor:
        """The training text as tokens (N,); with --bpe_dropout it is spelled in other tokens on each pass over it.

        The dropout follows the learning rate, down to 0 with it, as in the end the text will be spelled in one way alone.
        """
        args, n = self.args, len(self.data["train"])
        if not args.bpe_dropout:
            return self.data["train"]
        epoch = self.tokens_seen // n
        if self.spelled[0] != epoch:
            rng = np.random.default_rng([args.seed, epoch])  # of its own for each pass, so that resuming repeats it
            dropout = args.bpe_dropout * schedule(epoch * n // (args.batch_size * args.block_size), args)
            self.spelled = epoch, self.on_device(self.tokenizer.encode_array(self.train_text, dropout, rng))
        return self.spelled[1]

    def restore(self, last: dict) -> None:
        """Goes on where `last` was saved: exactly there, on the same devices. Raises ValueError for another network or another text."""
        if last["text"] != self.text_hash or last["tokenizer"] != self.tokenizer.fingerprint:
            raise ValueError(f"{self.args.data_path} and the tokenizer in {self.args.out_dir} are not those this run began with: "
                             "restore them, or start a new run in another --out_dir")
        if last.get("teachers", []) != self.teacher_hashes:
            raise ValueError(f"--teacher {shlex.join(self.args.teacher)}: not what this run began with; restore it, or start a new run in "
                             "another --out_dir")
        if last["config"] | {name: getattr(self.config, name) for name in ("dropout", "attention_dropout")} != asdict(self.config):
            raise ValueError(f"the run in {self.args.out_dir} has another network ({last['config']}): leave its sizes as they are, "
                             "or start a new run in another --out_dir")
        if last["iteration"] > self.args.max_iters:
            raise ValueError(f"the run in {self.args.out_dir} is at iteration {last['iteration']} already: give a larger --max_iters")
        if len(last["optimizers"]) != len(self.optimizers):
            began = "with" if len(self.optimizers) == 1 else "without"
            raise ValueError(f"the run in {self.args.out_dir} began {began} Muon: leave --muon_lr as it is")
        try:
            self.restore_state(last)
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{self.args.out_dir / 'last.pt'} does not hold the state of this training: move it away, so that --resume "
                             "takes its predecessor, or start a new run in another --out_dir") from error

    def restore_state(self, last: dict) -> None:
        """Takes over weights, optimizers, random generators and metrics. Raises one of many errors if they do not fit."""
        self.model.load_state_dict(last["model"])
        if not all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in last["model"].values()):
            raise ValueError("weights that are not finite numbers of float32")
        if last["iteration"] < 0:
            raise ValueError("less than no iterations")
        for optimizer, state in zip(self.optimizers, last["optimizers"]):
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            if any(value.shape not in (weights[number].shape, ()) for number, values in state["state"].items() for value in values.values()):
                raise ValueError("moments of other weights")
            if any(values.keys() != state["state"][0].keys() for values in state["state"].values()):
                raise ValueError("a moment that is missing")
            for saved, group in zip(state["param_groups"], optimizer.param_groups):  # these flags may be given anew
                saved |= {name: group[name] for name in ("weight_decay", "betas") if name in group}
            optimizer.load_state_dict(state)
        if last["scaler"]:
            self.scaler.load_state_dict(last["scaler"])
        fresh = self.args.seed + last["iteration"]  # a seed that does not repeat the run's first draws, where their state is of no use
        if last["device"] == self.device.type:
            self.batches.set_state(last["batches"])
        else:
            self.batches.manual_seed(fresh)
        if (last["device"], len(last["random"])) == (self.device.type, self.world_size):
            self.random.set_rng_state(last["random"][self.rank])
        else:
            self.random.manual_seed(fresh + self.rank)
            if self.master:
                print(f"saved on {len(last['random'])} x {last['device']}, going on on {self.world_size} x {self.device.type}: "
                      "from here on it differs from an unbroken run")
        if len({*last["columns"]}) < len(last["columns"]) or not {"train_loss", "val_loss", "val_nats_per_char"} <= {*last["columns"]}:
            raise ValueError("metrics without their columns")
        rows = [dict(zip(last["columns"], row, strict=True)) for row in last["metrics"].tolist()]
        self.metrics = [row | {name: int(row[name]) for name in ("iteration", "tokens_seen")} for row in rows]
        self.iteration, self.tokens_seen, self.best, self.seconds = (last[name] for name in ("iteration", "tokens_seen", "best", "seconds"))

    def run(self) -> None:
        """Trains up to max_iters, or until a signal comes, evaluating and saving on the way."""
        args, saved, shown = self.args, time.monotonic(), 0.0
        self.started, self.mark = time.monotonic() - self.seconds, (self.iteration, time.monotonic())
        with tqdm(total=args.max_iters, initial=self.iteration, unit="it", dynamic_ncols=True,
                  disable=not (self.master and sys.stderr.isatty())) as bar:
            while True:
                if self.iteration % args.eval_interval == 0 or self.iteration >= args.max_iters:
                    if not self.metrics or self.metrics[-1]["iteration"] < self.iteration:
                        line = self.evaluate()
                        self.save()
                        saved = time.monotonic()
                        if self.master:  # only now, as nobody may be reading any more
                            bar.write(line)
                    if self.iteration >= args.max_iters:
                        break
                stop, due = self.agree(self.stop.requested, time.monotonic() - saved > SAVE_SECONDS)
                self.stop.requested |= stop
                if stop or due:
                    self.save()
                    saved = time.monotonic()
                if stop:
                    break
                loss = self.step()
                self.iteration += 1
                self.tokens_seen += args.batch_size * args.block_size
                bar.update()
                if self.device.type == "cpu" or time.monotonic() - shown > 0.5:  # reading the loss makes a GPU wait
                    shown = time.monotonic()
                    if not math.isfinite(loss := loss.item()):
                        raise ValueError(self.not_finite("the loss"))
                    bar.set_postfix_str(f"loss {loss:.3f}, best val loss {self.best:.3f}, {self.tokens_per_second():,.0f} tokens/s")

    def step(self) -> torch.Tensor:
        """One iteration: a batch, its gradients, an update. Returns the loss, a scalar left on the device."""
        args = self.args
        for optimizer, peak in zip(self.optimizers, (args.learning_rate, args.muon_lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * schedule(self.iteration, args)
        batch = self.batch()
        if self.device.type == "cpu" and self.world_size == 1:
            self.workers = self.workers or Workers(len(batch))
            loss = self.workers.gradients(self.loss, batch, list(self.model.parameters()), self.scaler.scale(torch.ones(())))
        elif self.device.type != "cuda" or self.world_size > 1:
            loss = self.gradients(batch)
        else:  # a network this small keeps a GPU busy for less time than Python takes to start all of its operations
            batch = ((idx, self.taught(idx, targets, teacher)) for idx, targets, teacher in batch)  # soft targets are large: one at a time
            if self.replay is None:
                self.inputs = list(batch)
                self.replay = record(lambda: self.gradients(self.inputs))
            else:
                for old, new in zip(self.inputs, batch):
                    for tensor, value in zip(old, new):
                        tensor.copy_(value)
            loss = self.replay()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.grad_clip or math.inf)
        # If gradients overflowed in float16, the scaler skips the optimizer they belong to; of two, both must be skipped. Looking at the
        # norm makes a GPU wait, so it is done only then.
        if len(self.optimizers) == 1 or not self.scaler.is_enabled() or self.grad_norm.isfinite():
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()
        return loss

    def batch(self) -> list[tuple[torch.Tensor, torch.Tensor, GPT | None]]:
        """Draws a batch. Returns this process's share of it, in the parts that it is computed in: inputs, targets, both (B, T), and a teacher."""
        args, data = self.args, self.training_tokens()
        starts = torch.randint(len(data) - args.block_size, (args.batch_size,), generator=self.batches, device=self.device)
        mine = starts.chunk(self.world_size)[self.rank]
        at_once = max(1, CPU_TOKENS // args.block_size) if self.device.type == "cpu" else len(mine)
        parts = mine.chunk(args.gradient_accumulation_steps) if args.gradient_accumulation_steps else mine.split(at_once)
        # teachers take turns: on average that gives the gradient of their mean, as the loss is linear in the targets
        turn, teachers = self.iteration + self.rank * len(parts) + 1, self.teachers or [None]
        return [(*windows(data, part, args.block_size), teachers[(turn + i) % len(teachers)]) for i, part in enumerate(parts)]

    def taught(self, idx: torch.Tensor, targets: torch.Tensor, teacher: GPT | None) -> torch.Tensor:
        """The targets of a part of a batch, as `GPT.forward` wants them: as they are or, with a teacher, soft."""
        with self.autocast():
            return targets if teacher is None else soften(targets, teacher, idx, self.args.teacher_temperature)

    def loss(self, idx: torch.Tensor, targets: torch.Tensor, teacher: GPT | None = None) -> torch.Tensor:
        """What a part of a batch adds to the mean loss of this process's share of it, a scalar."""
        targets = self.taught(idx, targets, teacher)
        with self.autocast():
            return self.step_model(idx, targets, self.args.train_temperature)[1] * (len(idx) * self.world_size / self.args.batch_size)

    def autocast(self) -> torch.autocast:
        """Computes in the number format chosen. Nothing is cached, as threads would share it, and each weight is used but once a part."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False)

    def gradients(self, parts: list[tuple]) -> torch.Tensor:
        """Leaves the gradients of the mean loss in the parameters, scaled. Returns that loss, a scalar left on the device."""
        self.model.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for part in parts:
            wait = self.world_size > 1 and part is not parts[-1]  # the ranks exchange gradients once, after the last part
            with self.step_model.no_sync() if wait else contextlib.nullcontext():
                loss = self.loss(*part)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def tokens_per_second(self) -> float:
        """Speed of training since the last evaluation."""
        iteration, then = self.mark
        seconds = max(time.monotonic() - then, 1e-9)  # as a coarse clock may stand still
        return (self.iteration - iteration) * self.args.batch_size * self.args.block_size / seconds

    def agree(self, *flags: bool) -> list[bool]:
        """Each flag, true where it is true on any rank, so that all ranks do the same."""
        if self.world_size == 1:
            return list(flags)
        union = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(union, dist.ReduceOp.MAX, group=self.flags_group)
        return union.bool().tolist()

    def evaluate(self) -> str:
        """Measures losses and ReLUs, adds a row to the metrics, keeps the weights if they are the best. Returns a line to print."""
        args, grad_norm = self.args, self.grad_norm.item()  # waits for a GPU, so that the speed is true
        speed = self.tokens_per_second()
        with torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext():  # compiled for training alone
            loss = {name: self.mean_loss(name) for name in ("train", "val")}
            if not math.isfinite(loss["val"]):
                raise ValueError(self.not_finite("the validation loss"))
            relus, histograms = self.inspect_relus() if self.master else ({}, {})
        per_char = {name: loss[name] * self.tokens_per_char[name] for name in loss}
        seconds = time.monotonic() - self.started
        self.metrics.append({
            "iteration": self.iteration, "tokens_seen": self.tokens_seen, "epochs": self.tokens_seen / len(self.data["train"]),
            "train_loss": loss["train"], "val_loss": loss["val"],
            "train_nats_per_char": per_char["train"], "val_nats_per_char": per_char["val"],
            "learning_rate": args.learning_rate * schedule(self.iteration, args),
            "grad_norm": grad_norm, "tokens_per_second": speed, "seconds": seconds, **relus})
        if self.master:
            self.check_folder()
            save_metrics(args.out_dir, self.metrics, histograms)
        if loss["val"] < self.best:
            self.best = loss["val"]
            if self.master:
                save_checkpoint(args.out_dir / "model.pt", self.checkpoint())
        self.mark = self.iteration, time.monotonic()
        return (f"iteration {self.iteration}: train loss {loss['train']:.4f}, val loss {loss['val']:.4f} nats per token "
                f"({per_char['train']:.4f}, {per_char['val']:.4f} per character), {seconds:.0f} s")

    def check_folder(self) -> None:
        """Raises OSError if the folder of the run was removed meanwhile: writing would make it anew, but without the tokenizer."""
        if not (self.args.out_dir / "merges.pkl").exists():
            raise OSError(f"{self.args.out_dir} was removed, or its merges.pkl, at iteration {self.iteration} or before: start a new run")

    def mean_loss(self, name: str) -> float:
        """Mean loss, in nats per token, over the evaluation windows of a split or, with --eval_iters, over random batches; in float32."""
        args, data, starts = self.args, self.data[name], self.starts[name]
        if args.eval_iters:
            draw = torch.Generator().manual_seed(args.seed + self.iteration)  # of its own: evaluating must not change the training
            starts = torch.randint(len(data) - args.block_size, (args.eval_iters * args.batch_size,), generator=draw).to(self.device)
        mine = starts[self.rank::self.world_size]
        total = torch.tensor(mean_loss(self.model, data, mine) * len(mine) if len(mine) else 0.0, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.item() / len(starts)

    def inspect_relus(self) -> tuple[dict[str, float], dict[str, list[np.ndarray]]]:
        """Statistics and histograms of each ReLU's outputs for a fixed batch, without dropout, and of the loss's gradient there.

        `zeros` is the share of outputs that are 0, `dead` the share of units that are 0 for every token of the batch.
        """
        outputs, pieces = [], []
        hooks = [block.ffwd.relu.register_forward_hook(lambda module, inputs, output: outputs.append(output))
                 for block in self.model.blocks]
        self.model.eval()
        part_size = self.args.batch_size / self.world_size / (self.args.gradient_accumulation_steps or 1)  # which fits into a GPU
        some = min(64, math.ceil(part_size))
        for part in self.starts["train"][:some].split(8):  # few at once, which takes less memory
            loss = self.model(*windows(self.data["train"], part, self.args.block_size))[1] * (len(part) / some)
            pieces.append([(out.detach(), grad) for out, grad in zip(outputs, torch.autograd.grad(loss, outputs))])
            outputs.clear()
        self.model.train()
        for hook in hooks:
            hook.remove()
        stats, histograms = {}, {}
        for layer, pairs in enumerate(zip(*pieces), 1):
            out, grad = (torch.cat(tensors) for tensors in zip(*pairs))  # each (tokens, units)
            stats |= {f"relu{layer}_mean": out.mean().item(), f"relu{layer}_std": out.std().item(),
                      f"relu{layer}_zeros": (out == 0).float().mean().item(),
                      f"relu{layer}_dead": (out == 0).all(0).float().mean().item(),
                      f"relu{layer}_grad_mean": grad.mean().item(), f"relu{layer}_grad_std": grad.std().item()}
            for name, values in ("relu", out), ("relu_grad", grad):
                for kind, numbers in zip(("counts", "edges"), histogram(values)):
                    histograms.setdefault(f"{name}_{kind}", []).append(numbers)
        return stats, histograms

    def checkpoint(self) -> dict:
        """What a checkpoint for sampling holds: plain values and the weights, on the CPU, so that it loads everywhere."""
        row = self.metrics[-1]
        weights = {name: weight.cpu() for name, weight in self.model.state_dict().items()}
        return {"config": asdict(self.config), "model": weights, "tokenizer": self.tokenizer.fingerprint,
                "text": self.text_hash, "iteration": self.iteration} | {key: row[key] for key in ("train_loss", "val_loss", "val_nats_per_char")}

    def save(self) -> None:
        """Writes last.pt: the checkpoint and all else that resuming bit for bit takes."""
        random = [self.random.get_rng_state()]
        if self.world_size > 1:
            random *= self.world_size
            dist.gather_object(self.random.get_rng_state(), random if self.master else None, group=self.flags_group)
        if not self.master:
            return
        self.check_folder()
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise ValueError(self.not_finite("a weight"))
        args = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self.args).items()}
        save_last(self.args.out_dir, self.checkpoint() | {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers], "scaler": self.scaler.state_dict(),
            "batches": self.batches.get_state(), "random": random, "device": self.device.type, "args": args,
            "teachers": self.teacher_hashes, "best": self.best, "tokens_seen": self.tokens_seen, "seconds": time.monotonic() - self.started,
            "columns": list(self.metrics[0]), "metrics": torch.tensor([[*row.values()] for row in self.metrics], dtype=torch.float64)})

    def not_finite(self, what: str) -> str:
        """The line that explains why the run ends."""
        kept = f"{self.args.out_dir} keeps the checkpoint before" if self.metrics else "nothing was saved"
        return (f"{what} at iteration {self.iteration} is not a finite number: train with a smaller --learning_rate, "
                f"--grad_clip 1 or --dtype float32; {kept}")


# ---------------------------------------------------------------------------------------------------------- the command

def parse_args() -> tuple[argparse.Namespace, dict | None]:
    """The flags and, with --resume, the contents of last.pt, whose flags then stand for those not given."""
    config = GPTConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    at_least = {}  # smallest value of each number

    def flag(group, name, default, minimum, text):
        at_least[name] = minimum
        group.add_argument(f"--{name}", type=type(default), default=default, metavar="N" if type(default) is int else "X",
                           help=f"{text} (default {default})")

    def absolute(path):  # as --resume may be called from another folder
        return Path(path).resolve()

    files = parser.add_argument_group("files")
    files.add_argument("--data_path", type=absolute, default=DEFAULT_TEXT, help="any UTF-8 text (default data/input.txt: Tiny Shakespeare)")
    files.add_argument("--out_dir", type=Path, default=CHECKPOINTS, help="folder for all a run makes (default checkpoints/)")
    files.add_argument("--preset", choices=PRESETS, default="reference",
                       help="values for the flags not given: of the published run (reference, the default), of one that has a lower loss "
                            "after 600 iterations (fast), or of a longer one that gets farther, above all with a --teacher (best)")
    files.add_argument("--teacher", type=lambda path: str(absolute(path)), nargs="+", default=[], metavar="MODEL.PT",
                       help="learn from what these networks, trained with the same tokenizer, expect, too (default: from the text alone)")
    files.add_argument("--resume", action="store_true", help="go on from last.pt in --out_dir, with its flags unless given anew")
    network = parser.add_argument_group("network")
    flag(network, "vocab_size", config.vocab_size, 256, "tokens in the vocabulary")
    flag(network, "block_size", config.block_size, 1, "longest context, in tokens")
    flag(network, "n_embd", config.n_embd, 1, "channels of the residual stream")
    flag(network, "n_head", config.n_head, 1, "attention heads; each has n_embd // n_head channels")
    flag(network, "n_layer", config.n_layer, 1, "blocks of attention and feed-forward")
    flag(network, "dropout", config.dropout, 0, "share of activations dropped while training, after attention and feed-forward; less than 1")
    flag(network, "attention_dropout", config.attention_dropout, 0, "share of attention weights dropped while training, less than 1")
    training = parser.add_argument_group("training")
    flag(training, "batch_size", 64, 1, "sequences in a batch, all processes together")
    flag(training, "gradient_accumulation_steps", 0, 0, "parts a batch is computed in, one after the other, or on a CPU as many "
                                                         f"at once as it has cores; 0: one, or on a CPU parts of {CPU_TOKENS} tokens")
    flag(training, "max_iters", 5000, 1, "iterations in all")
    flag(training, "learning_rate", 3e-4, 0, "step size of AdamW")
    flag(training, "warmup_iters", 0, 0, "iterations over which the learning rate rises from 0")
    flag(training, "lr_decay_iters", 0, 0, "iteration at which a cosine has taken it down to --min_lr; 0: it stays constant; "
                                            "presets but the reference: --max_iters")
    flag(training, "min_lr", 3e-5, 0, "where that cosine ends")
    flag(training, "weight_decay", 0.01, 0, "of AdamW and Muon, on matrices only")
    flag(training, "beta1", 0.9, 0, "AdamW's decay rate of the first moment, less than 1")
    flag(training, "beta2", 0.999, 0, "AdamW's decay rate of the second moment, less than 1")
    flag(training, "muon_lr", 0.0, 0, "step size of Muon, which then trains the matrices in the blocks; 0: AdamW trains all")
    flag(training, "init_std", 0.0, 0, "standard deviation of the initial matrices; 0: PyTorch's default initialisation")
    flag(training, "bpe_dropout", 0.0, 0, "share of merges left out when the training text is cut into tokens, anew on each pass; "
                                      "it follows the learning rate; less than 1")
    flag(training, "train_temperature", 1.0, 0.1, "divides the logits in the loss of training alone, not where it is measured; below 1 the "
                                                  "network ends up less sure of itself")
    flag(training, "teacher_temperature", 1.0, 0.1, "divides the logits of a --teacher; if it is a little above --train_temperature, the network "
                                                    "ends up less sure of itself than the teacher")
    flag(training, "grad_clip", 0.0, 0, "largest norm of the gradient; 0: any")
    flag(training, "seed", 1337, 0, "of initialisation, batches, dropout and BPE-dropout")
    flag(training, "eval_interval", 500, 1, "iterations between two evaluations")
    flag(training, "eval_iters", 0, 0, "random batches to evaluate on, as published: 200; 0: all whole windows "
                                        f"of the validation split, side by side, up to {EVAL_TOKENS:,} tokens, and as many of the training split")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="cuda, cuda:1, mps or cpu (default: the first of these that is there)")
    machine.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
                         help="of the arithmetic (default: bfloat16 where the hardware has it, else float16 on a CUDA GPU, else float32)")
    machine.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                         help="fuse the operations of each block with torch.compile (default: where it can, on CUDA)")

    parser.set_defaults(**PRESETS[parser.parse_args().preset])
    args, last = parser.parse_args(), None
    if args.resume and args.preset != "reference":
        parser.error("--preset is for a new run: --resume goes on with the flags of the run it finds")
    if args.resume:
        last = load_last(args.out_dir)
        saved = {name: value for name, value in last["args"].items() if name in vars(args).keys() - {"resume", "out_dir"}}
        if saved.get("lr_decay_iters", 0) == saved.get("max_iters"):  # and so it stays, should the run be made longer
            parser.set_defaults(lr_decay_iters=None)
            del saved["lr_decay_iters"]
        flags = [f"--{name}={value}" for name, value in saved.items() if name not in ("compile", "teacher")]  # checked as if given
        if type(saved.get("teacher")) is list and saved["teacher"]:
            flags += ["--teacher", *map(str, saved["teacher"])]
        if saved.get("compile") is not None:
            flags.append("--compile" if saved["compile"] else "--no-compile")
        args = parser.parse_args(flags + sys.argv[1:])
        if args.seed != saved.get("seed", args.seed):
            parser.error(f"--seed was {saved['seed']} when this run began, and cannot change any more")
        for name, value in vars(args).items():
            if name in saved.keys() - {"preset"} and str(saved[name]) != str(value) and int(os.environ.get("RANK", 0)) == 0:
                print(f"note: --{name} was {saved[name]} when this run was saved and is {value} from here on")
    if args.lr_decay_iters is None:
        args.lr_decay_iters = args.max_iters
    for name, minimum in at_least.items():
        value = getattr(args, name)
        limit = LESS_THAN.get(name, 2**63 if type(value) is int else math.inf)  # whole numbers beyond that PyTorch cannot hold
        if not minimum <= value < limit:
            upper = f" and less than {limit}" if name in LESS_THAN or value >= minimum else ""
            parser.error(f"--{name} must be at least {minimum}{upper}, not {value}")
    for path in map(Path, args.teacher):
        if not path.is_file():
            parser.error(f"no file at --teacher {path}: name the model.pt of an earlier run")
        if path.parent == args.out_dir.resolve():
            parser.error(f"--teacher {path} lies in --out_dir, whose files this run replaces: train into another --out_dir")
    if args.n_head > args.n_embd:
        parser.error(f"--n_head {args.n_head} must not exceed --n_embd {args.n_embd}: each head needs a channel")
    return args, last


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True, errors="replace")  # every line at once; a sample, whatever the terminal can show
    args, last = parse_args()
    master = int(os.environ.get("RANK", 0)) == 0
    if master and args.data_path == DEFAULT_TEXT and not DEFAULT_TEXT.exists():
        if subprocess.run([sys.executable, DEFAULT_TEXT.with_name("prepare.py")]).returncode:
            sys.exit(1)  # it has said why
    trainer = Trainer(args, last)
    if master:
        if not args.resume:
            set_aside(args.out_dir)
        print(trainer.summary())
        if trainer.iteration == args.max_iters:
            print("this run is complete: a larger --max_iters goes on")
    trainer.run()
    folder = [] if args.out_dir == CHECKPOINTS else ["--out_dir", args.out_dir.as_posix()]
    if master and trainer.stop.requested:
        start = ["python"] if trainer.world_size == 1 else ["torchrun", "--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"]]
        command = [*start, sys.argv[0], "--resume", *folder]
        others = " on each machine, with its --nnodes and --rdzv flags" * (trainer.world_size > int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        print(f"stopped and saved at iteration {trainer.iteration}; go on with: {shlex.join(command)}{others}")
    elif master:
        model, best = load_model(args.out_dir / "model.pt")
        start = torch.tensor([trainer.tokenizer.encode_array("\n").tolist()])
        print(f"\na sample, from the weights of iteration {best['iteration']} (val loss {best['val_loss']:.4f}):")
        print(trainer.tokenizer.decode(model.generate(start, 200, seed=args.seed)[0].tolist()))
        command = ["python", Path(sys.argv[0]).with_name("generate.py").as_posix(), *folder]
        print(f"\nmodel.pt, metrics.csv and all else is in {args.out_dir}; more text: {shlex.join(command)}")
    if trainer.world_size > 1:
        dist.destroy_process_group()
    if trainer.stop.requested:
        sys.exit(128 + trainer.stop.number)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            sys.exit("train.py: not enough memory: use more --gradient_accumulation_steps, a smaller --batch_size, --block_size, --n_embd, "
                     "--n_layer or --eval_iters, or another --device")
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            sys.exit("train.py: torch.compile failed, as it does where there is no C compiler: train with --no-compile")
        raise
    except KeyboardInterrupt:  # before training began, or the second one
        sys.exit(128 + signal.SIGINT)
