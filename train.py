"""Trains the network on a text, and its tokenizer first if there is none.

    python train.py                                   # Tiny Shakespeare, as it was published
    python train.py --preset fast                     # a lower loss in some minutes
    python train.py --data_path my.txt --out_dir checkpoints/mine
    python train.py --resume                          # goes on where a run was stopped
    torchrun --nproc_per_node 2 train.py              # two GPUs, or processes, share each batch

All lands in --out_dir: the tokenizer, model.pt (the weights with the lowest validation loss),
last.pt (all it takes to resume), metrics.csv (a row for each evaluation) and histograms.npz.

To learn how training works, read `schedule`, then `Trainer.run`, `step`, `learn`, `batch`, `loss`,
`plain_gradients`, `update` and `evaluate`, as if there were one process, no teacher and no scaler.
The rest makes it better, faster or safe.
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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from model import (EVAL_TOKENS, GPT, GPTConfig, MappedTokens, choose_device, cuda_graph,
                   dropout_from, limit_threads, load_checkpoint, load_model, mean_loss,
                   save_checkpoint, split, tile_starts, windows)
from tokenizer import (CHECKPOINTS, DEFAULT_TEXT, MAX_VOCAB, PRETRAINED, TEMPERATURE,
                       BasicTokenizer, Tokens, atomic_write, bounded, digests, is_long, load_tokens,
                       matching, one_file, out_of_memory, read_text, run_script)

# ---- what is trained, and how --------------------------------------------------------------------

FLAGS = [  # name, default (the published run's), smallest, meaning
    ("vocab_size", 500, 256, "tokens in the vocabulary"),
    ("block_size", 256, 1, "longest context, in tokens"),
    ("n_embd", 232, 1, "channels of the residual stream"),
    ("n_head", 6, 1, "attention heads, each of n_embd // n_head channels"),
    ("n_layer", 5, 1, "blocks of attention and feed-forward"),
    ("dropout", 0.2, 0, "share of activations dropped after attention and feed-forward"),
    ("attention_dropout", 0.2, 0, "share of attention weights dropped"),
    ("batch_size", 64, 1, "sequences in a batch, all processes together"),
    ("even_windows", 0, 0, "1: windows are spread evenly over the text; 0: drawn at random"),
    ("gradient_accumulation_steps", 0, 0, "parts that a batch is split into, to save memory; 0: "
     "one, or on a CPU, whose cores each compute one at a time, parts of about 1,024 tokens"),
    ("max_iters", 5000, 1, "iterations in all"),
    ("learning_rate", 3e-4, 0, "step size of AdamW"),
    ("warmup_iters", 0, 0, "iterations over which the learning rates rise from 0"),
    ("lr_decay_iters", 0, 0, "iteration at which a cosine has taken them to min_lr; 0: never"),
    ("min_lr", 3e-5, 0, "learning rate at which that cosine ends"),
    ("weight_decay", 0.01, 0, "weight decay of both optimizers, on matrices only"),
    ("beta1", 0.9, 0, "AdamW's decay rate of the first moment"),
    ("beta2", 0.999, 0, "AdamW's decay rate of the second moment"),
    ("muon_lr", 0.0, 0, "step size of Muon, which then trains the blocks' matrices; 0: AdamW"),
    ("init_std", 0.0, 0, "standard deviation of the initial matrices; 0: PyTorch's defaults"),
    ("init_heads", 0, 0, "1: some heads begin by looking back, others for repetitions; 0: none"),
    ("bpe_dropout", 0.0, 0, "share of merges left out, anew on each pass over the text"),
    ("train_temperature", 1.0, 0.1, "divides the logits in the loss, while training only"),
    ("teacher_temperature", 1.0, 0.1, "divides the logits of a --teacher"),
    ("grad_clip", 0.0, 0, "largest norm of the gradient; 0: any"),
    ("seed", 1337, 0, "seed of initialisation, batches, dropout and BPE-dropout"),
    ("eval_interval", 500, 1, "iterations between two evaluations"),
    ("eval_iters", 0, 0, "random batches to evaluate on; 0: windows that cover the split"),
]

TUNED = {"muon_lr": 0.02, "learning_rate": 3e-3, "beta2": 0.95, "weight_decay": 0.4, "min_lr": 0.0,
         "warmup_iters": 50, "lr_decay_iters": None, "init_std": 0.02, "attention_dropout": 0.0,
         "train_temperature": 0.85, "teacher_temperature": 0.9}  # None becomes max_iters
PRESETS = {  # what differs from the defaults
    "reference": {},
    "fast": TUNED | {"batch_size": 8, "max_iters": 1200, "eval_interval": 300, "muon_lr": 0.006,
                     "learning_rate": 6e-3, "init_heads": 1, "even_windows": 1, "dropout": 0.05},
    "best": TUNED | {"max_iters": 2250, "eval_interval": 250, "bpe_dropout": 0.2},
}


def schedule(iteration: int, args: argparse.Namespace) -> float:
    """Returns the share of the learning rate in use: a warm-up, then 1 or a cosine to min_lr."""
    if iteration < args.warmup_iters:
        return (iteration + 1) / args.warmup_iters
    if not args.lr_decay_iters:
        return 1.0
    steps = max(1, args.lr_decay_iters - args.warmup_iters)
    progress = min(1.0, (iteration - args.warmup_iters) / steps)
    end = args.min_lr / (args.learning_rate or 1.0)
    return end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2  # Loshchilov & Hutter 2017


# ---- optimizers and teachers ---------------------------------------------------------------------

MUON_MOMENTUM = 0.95
MUON_STEPS = 3  # Newton-Schulz's
TEACHER_SHARE = 0.9  # how much of a soft target is the teacher's


def build_optimizers(model: GPT, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Makes AdamW (Loshchilov & Hutter 2019) for all weights or, with --muon_lr, for some.

    Muon then trains the matrices in the blocks. Both decay matrices only, not biases and norms.
    Learning rates are tensors, so that a CUDA graph reads what they are at each replay.
    """
    device = model.head.weight.device
    rates = [torch.tensor(rate, device=device) for rate in (args.learning_rate, args.muon_lr)]
    for_muon = [p for p in model.blocks.parameters() if p.dim() == 2] if args.muon_lr else []
    for_adamw = [p for p in model.parameters() if all(p is not q for q in for_muon)]
    matrices = [p for p in for_adamw if p.dim() == 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay},
              {"params": [p for p in for_adamw if p.dim() < 2], "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=rates[0], betas=(args.beta1, args.beta2), fused=True,
                                    capturable=device.type == "cuda")]
    if for_muon:
        threefold = [block.attn.qkv.weight for block in model.blocks]
        optimizers.append(Muon(for_muon, rates[1], args.weight_decay, threefold))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Moves each matrix along its momentum, made orthogonal (Jordan et al. 2024).

    A gradient changes a matrix mostly in a few directions. Made orthogonal, it goes about equally
    far in all. This differs from `torch.optim.Muon`: three Newton-Schulz steps, not five, give the
    same loss to 0.003, and all matrices of one shape are multiplied at once, in the format the
    hardware is fast in. Without bfloat16 instructions a step takes a thirtieth of PyTorch's time.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: torch.Tensor, weight_decay: float,
                 threefold: list[torch.nn.Parameter]):
        """Takes apart those `threefold`: they hold queries', keys' and values' matrices."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype, self.threefold = choose_dtype("auto", params[0].device), set(threefold)

    @torch.no_grad()
    def step(self) -> None:
        """Updates the weights by their gradients, all of which must be there."""
        for group in self.param_groups:
            shapes, lr = {}, group["lr"]
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                parts = [tensor.chunk(3 if p in self.threefold else 1)
                         for tensor in (p, p.grad, self.state[p]["momentum_buffer"])]
                shapes.setdefault(parts[0][0].shape, []).extend(zip(*parts))
            for (rows, columns), matrices in shapes.items():
                weights, grads, momentum = map(list, zip(*matrices))
                torch._foreach_lerp_(momentum, grads, 1 - MUON_MOMENTUM)
                ahead = torch._foreach_lerp(grads, momentum, MUON_MOMENTUM)  # Nesterov's
                updates = orthogonal(torch.stack(ahead), self.dtype).float()
                updates *= lr * math.sqrt(max(1, rows / columns))
                torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
                torch._foreach_sub_(weights, list(updates))


def orthogonal(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Brings the singular values of each matrix towards 1, none above 1.3: (N, rows, columns).

    Each Newton-Schulz step applies a polynomial to them that is steep at 0, in `dtype`. Those of at
    least a fiftieth of the matrix's norm end between 0.68 and 1.21, up to rounding.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)  # none exceeds 1 now
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(MUON_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@torch.no_grad()
def soft_targets(targets: torch.Tensor, teacher: GPT, idx: torch.Tensor,
                 temperature: float) -> torch.Tensor:
    """Turns the tokens that come next into probabilities, mostly those a teacher expects.

    The rest is for the token that really came (Hinton et al. 2015). The temperature divides the
    teacher's logits. targets, idx: (B, T) int64 -> (B, T, V) float32.
    """
    probs = (teacher(idx)[0].float() / temperature).softmax(-1) * TEACHER_SHARE
    rest = torch.full_like(probs[..., :1], 1 - TEACHER_SHARE)
    return probs.scatter_add_(2, targets[..., None], rest)


# ---- training ------------------------------------------------------------------------------------

CPU_TOKENS = 1024   # a core trains on at once: more take more memory and are no faster
TELL_SECONDS = 30   # without a terminal, a line says how far training is this often
SAVE_SECONDS = 300  # last.pt is written at every evaluation, and this often in between
GOLDEN_SECTION = (math.sqrt(5) - 1) / 2


class Trainer:
    """One training run: the data on its device, the network, the optimizers, the loop in `run`.

    A step sets the learning rates, draws a batch, and moves the weights against the gradient of its
    loss. `plain_gradients` computes that as textbooks do, `core_gradients` shares it out among the
    cores of a CPU, and `recorded` plays it back, or all of `learn`, from a CUDA graph. Under
    torchrun each process has one; they share every batch, and the master (rank 0) alone writes.
    """

    def __init__(self, args: argparse.Namespace, last: dict | None):
        """Starts afresh, or from `last`, the contents of a last.pt. Raises ValueError."""
        self.args = args
        self.find_device()
        self.load_text()
        self.load_teachers()
        torch.manual_seed(args.seed)
        self.config = GPTConfig(**{field.name: getattr(args, field.name)
                                   for field in fields(GPTConfig)})
        self.model = GPT(self.config)
        if args.init_std:
            self.model.init_weights(args.init_std)
        if args.init_heads:
            init_heads(self.model, self.data["train"][:2**20].cpu())
        if args.init_from:
            start, _ = load_model(args.init_from, self.tokenizer.fingerprint)
            self.model.load_state_dict(start.state_dict())
        self.model.to(self.device)  # only now, so that a seed gives the same weights everywhere
        if self.compiled:
            self.compile_blocks()
        self.optimizers = build_optimizers(self.model, args)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        # All ranks draw the same batch, of which each takes its part. Dropout each draws by itself.
        mapped = isinstance(self.data["train"], MappedTokens)
        self.batch_rng = torch.Generator("cpu" if mapped else self.device).manual_seed(args.seed)
        on_cpu = self.device.type == "cpu"
        # Dropout draws from PyTorch's own generator, of which each device has one.
        self.dropout_rng = torch if on_cpu else torch.get_device_module(self.device)
        self.dropout_rng.manual_seed(args.seed + self.rank)
        self.iteration, self.tokens_seen, self.seconds = 0, 0, 0.0
        self.best, self.metrics, self.grad_norm = math.inf, [], torch.tensor(math.nan)
        if last:
            self.restore(last)
        self.step_model, self.gradients = self.model, self.plain_gradients
        if self.world_size > 1:
            self.step_model = torch.nn.parallel.DistributedDataParallel(self.model)
        elif on_cpu:
            self.threads, self.gradients = None, self.core_gradients
        elif self.device.type == "cuda" and self.scaler.is_enabled():  # which makes the CPU wait
            self.gradients = self.recorded(self.plain_gradients)
        elif self.device.type == "cuda":
            self.learn = self.recorded(self.learn)

    def run(self) -> None:
        """Trains up to max_iters, or until a signal comes, evaluating and saving on the way."""
        args, saved, shown = self.args, time.monotonic(), 0.0
        self.started = time.monotonic() - self.seconds
        self.mark, self.told = (self.iteration, time.monotonic()), time.monotonic()
        self.stop = Stop()
        with tqdm(total=args.max_iters, initial=self.iteration, unit="it", dynamic_ncols=True,
                  disable=not (self.master and sys.stderr.isatty())) as bar:
            while True:
                ended = self.iteration >= args.max_iters
                evaluated = self.metrics and self.metrics[-1]["iteration"] == self.iteration
                if (ended or self.iteration % args.eval_interval == 0) and not evaluated:
                    line = self.evaluate()
                    self.save()
                    saved = time.monotonic()
                    if self.master:
                        self.stop.tell(line)
                if ended:
                    break
                due = time.monotonic() - saved > SAVE_SECONDS
                stop, due = self.agree(self.stop.requested, due)
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
                if self.device.type == "cpu" or time.monotonic() - shown > 0.5:  # a GPU has to wait
                    shown = time.monotonic()
                    self.show(bar, loss.item())

    def step(self) -> torch.Tensor:
        """Makes one iteration: learning rates, a batch, an update. Returns the loss, a scalar."""
        for optimizer, peak in zip(self.optimizers, (self.args.learning_rate, self.args.muon_lr)):
            for group in optimizer.param_groups:
                group["lr"].fill_(peak * schedule(self.iteration, self.args))
        return self.learn(self.batch())

    def learn(self, batch: list[tuple]) -> torch.Tensor:
        """Moves the weights against the gradients of a batch's loss, and returns that, a scalar."""
        loss = self.gradients(batch)  # `plain_gradients`, or the same, faster
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(),
                                                        self.args.grad_clip or math.inf)
        self.update()
        return loss

    def batch(self) -> list[tuple[torch.Tensor, torch.Tensor, GPT | None]]:
        """Draws a batch. Returns this process's share, in the parts that it is computed in.

        A part is inputs and targets, both (B, T) int64, and the teacher whose turn it is.
        """
        args, data = self.args, self.training_tokens()
        starts = self.window_starts(len(data) - args.block_size)
        mine = starts.chunk(self.world_size)[self.rank]
        idx, targets = windows(data, mine, args.block_size)
        at_once = len(idx)
        if args.gradient_accumulation_steps:
            at_once = math.ceil(len(idx) / args.gradient_accumulation_steps)
        elif self.device.type == "cpu":
            at_once = max(1, CPU_TOKENS // args.block_size)
        parts = list(zip(idx.split(at_once), targets.split(at_once)))
        # Each part asks one teacher, in turn. On average that gives the gradient of their mean, as
        # the loss is linear in the targets.
        turn, teachers = self.iteration + self.rank * len(parts) + 1, self.teachers or [None]
        return [(*part, teachers[(turn + i) % len(teachers)]) for i, part in enumerate(parts)]

    def window_starts(self, n: int) -> torch.Tensor:
        """Returns where the windows of a batch begin, (batch_size,) int64, each less than n."""
        args, device = self.args, self.batch_rng.device
        if not args.even_windows:
            return torch.randint(n, (args.batch_size,), generator=self.batch_rng, device=device)
        # Multiples of the golden section, modulo 1: any run of them is nearly evenly spread. They
        # go on from batch to batch, from a place that the seed chooses.
        there = "cpu" if device.type == "mps" else device  # MPS has no float64
        number = torch.arange(args.batch_size, dtype=torch.float64, device=there)
        number += self.tokens_seen // args.block_size
        first = np.random.default_rng(args.seed).random()
        return ((first + number * GOLDEN_SECTION) % 1 * n).long().to(device)

    def training_targets(self, idx: torch.Tensor, targets: torch.Tensor,
                         teacher: GPT | None) -> torch.Tensor:
        """Returns the targets of a part of a batch as they are or, with a teacher, soft."""
        if teacher is None:
            return targets
        with self.autocast():
            return soft_targets(targets, teacher, idx, self.args.teacher_temperature)

    def loss(self, idx: torch.Tensor, targets: torch.Tensor,
             teacher: GPT | None = None) -> torch.Tensor:
        """Returns what a part of a batch adds to the mean loss of this process, a scalar.

        That is the part's mean, weighed by its share of the sequences of this process.
        """
        targets = self.training_targets(idx, targets, teacher)
        share = len(idx) * self.world_size / self.args.batch_size
        with self.autocast():
            return self.step_model(idx, targets, self.args.train_temperature)[1] * share

    def autocast(self) -> torch.autocast:
        """Computes in the number format chosen.

        Nothing is cached: threads would share it, and a part uses each weight but once.
        """
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32,
                              cache_enabled=False)

    def plain_gradients(self, batch: list[tuple]) -> torch.Tensor:
        """Leaves the gradients of the mean loss in the parameters, scaled. Returns that loss."""
        self.model.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for part in batch:
            # Processes exchange gradients once, after the last part.
            wait = self.world_size > 1 and part is not batch[-1]
            with self.step_model.no_sync() if wait else contextlib.nullcontext():
                loss = self.loss(*part)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def core_gradients(self, batch: list[tuple]) -> torch.Tensor:
        """Does the same, the parts shared out among the cores of a CPU."""
        self.threads = self.threads or CoreThreads(len(batch))
        scale = self.scaler.scale(torch.ones(()))
        return self.threads.gradients(self.loss, batch, list(self.model.parameters()), scale)

    def recorded(self, work: Callable[[list[tuple]], torch.Tensor]) -> Callable:
        """Returns `work`, a function of a batch, recorded as a CUDA graph when it is first called.

        A network this small keeps a GPU busy for less time than Python takes to start all of its
        operations. Soft targets are made outside, one part at a time, as they are large.
        """
        inputs, replay = [], None

        def call(batch: list[tuple]) -> torch.Tensor:
            nonlocal replay
            parts = ((idx, self.training_targets(idx, targets, teacher))
                     for idx, targets, teacher in batch)
            if replay is None:
                inputs.extend(parts)
                with self.weights_kept():
                    replay = cuda_graph(lambda: work(inputs))
            else:
                for old, new in zip(inputs, parts):
                    for tensor, value in zip(old, new):
                        tensor.copy_(value)
            return replay()
        return call

    @contextlib.contextmanager
    def weights_kept(self) -> Iterator[None]:
        """Takes weights and optimizers back to what they were, as recording is no step."""
        def tensors():
            yield from self.model.parameters()
            for optimizer in self.optimizers:
                for moments in optimizer.state.values():
                    yield from moments.values()

        kept = {id(tensor): tensor.detach().clone() for tensor in tensors()}
        yield
        with torch.no_grad():
            for tensor in tensors():
                tensor.copy_(kept.get(id(tensor), torch.zeros_like(tensor)))  # moments begin at 0

    def update(self) -> None:
        """Lets the optimizers move the weights.

        If gradients overflowed in float16, the scaler skips the optimizer they belong to. Of two,
        both must be skipped: only with two the norm is looked at, which makes a GPU wait.
        """
        two = len(self.optimizers) > 1 and self.scaler.is_enabled()
        if not two or self.grad_norm.isfinite():
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()

    def show(self, bar: tqdm, loss: float) -> None:
        """Shows a loss in the progress bar. Raises ValueError if it is not a finite number."""
        if not math.isfinite(loss):
            raise ValueError(self.not_finite("the loss"))
        speed = self.tokens_per_second()
        speed_shown = f"{speed:,.0f} tokens/s"
        bar.set_postfix_str(f"loss {loss:.3f}, best val loss {self.best:.3f}, {speed_shown}")
        if self.master and bar.disable and time.monotonic() - self.told > TELL_SECONDS:
            self.told = time.monotonic()
            left = (self.args.max_iters - self.iteration) * self.args.batch_size
            left = tqdm.format_interval(left * self.args.block_size / speed)
            self.stop.tell(f"iteration {self.iteration} of {self.args.max_iters}: loss {loss:.3f}, "
                           f"{speed_shown}, {left} left")

    def tokens_per_second(self) -> float:
        """Returns the speed of training since the last evaluation."""
        iteration, then = self.mark
        seconds = max(time.monotonic() - then, 1e-9)  # a coarse clock may stand still
        tokens = (self.iteration - iteration) * self.args.batch_size * self.args.block_size
        return tokens / seconds

    def agree(self, *flags: bool) -> list[bool]:
        """Returns each flag, true where it is true on any rank, so that all ranks do the same."""
        if self.world_size == 1:
            return list(flags)
        union = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(union, dist.ReduceOp.MAX, group=self.flags_group)
        return union.bool().tolist()

    def evaluate(self) -> str:
        """Adds a row to the metrics, saves the weights if best, and returns a line to print."""
        args, grad_norm = self.args, self.grad_norm.item()  # waits for a GPU, so the speed is true
        speed, data = self.tokens_per_second(), self.data
        eager = torch.compiler.set_stance if self.compiled else contextlib.nullcontext
        with eager("force_eager"):  # compiled for training alone
            loss = {name: self.mean_loss(name) for name in ("train", "val")}
            if not math.isfinite(loss["val"]):
                raise ValueError(self.not_finite("the validation loss"))
            relus, histograms = self.inspect_relus() if self.master else ({}, {})
        per_char = {name: loss[name] * self.tokens_per_char[name] for name in loss}
        seconds = time.monotonic() - self.started
        self.metrics.append({
            "iteration": self.iteration, "tokens_seen": self.tokens_seen,
            "epochs": self.tokens_seen / len(data["train"]),
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
        return (f"iteration {self.iteration}: train loss {loss['train']:.4f}, "
                f"val loss {loss['val']:.4f} nats per token ({per_char['train']:.4f}, "
                f"{per_char['val']:.4f} per character), {seconds:.0f} s")

    def mean_loss(self, name: str) -> float:
        """Returns the mean loss, in nats per token, on the evaluation windows of a split.

        It is computed in float32. With --eval_iters the windows are random ones.
        """
        args, data, starts = self.args, self.data[name], self.starts[name]
        if args.eval_iters:  # drawn apart, as evaluating must not change the training
            draw = torch.Generator().manual_seed(args.seed + self.iteration)
            starts = torch.randint(len(data) - args.block_size,
                                   (args.eval_iters * args.batch_size,), generator=draw)
            starts = starts.to(self.device)
        mine = starts[self.rank::self.world_size]
        total = mean_loss(self.model, data, mine) * len(mine) if len(mine) else 0.0
        total = torch.tensor(total, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.item() / len(starts)

    def inspect_relus(self) -> tuple[dict[str, float], dict[str, list[np.ndarray]]]:
        """Measures each ReLU's outputs for a fixed batch, without dropout, and the gradients there.

        Returns statistics and histograms. `zeros` is the share of outputs that are 0, `dead` the
        share of units that are 0 for every token of the batch.
        """
        outputs, pieces = [], []
        hooks = [block.ffwd.relu.register_forward_hook(
            lambda module, inputs, output: outputs.append(output)) for block in self.model.blocks]
        self.model.eval()
        part_size = (self.args.batch_size / self.world_size
                     / (self.args.gradient_accumulation_steps or 1))  # fits into a GPU
        starts = self.starts["train"][:min(64, math.ceil(part_size))]
        for part in starts.split(8):  # few at once take less memory
            idx, targets = windows(self.data["train"], part, self.args.block_size)
            loss = self.model(idx, targets)[1] * (len(part) / len(starts))
            gradients = torch.autograd.grad(loss, outputs)
            pieces.append([(out.detach(), grad) for out, grad in zip(outputs, gradients)])
            outputs.clear()
        self.model.train()
        for hook in hooks:
            hook.remove()
        stats, histograms = {}, {}
        for layer, pairs in enumerate(zip(*pieces), 1):
            out, grad = (torch.cat(tensors) for tensors in zip(*pairs))  # each (tokens, units)
            zero = out == 0
            measured = {"mean": out.mean(), "std": out.std(), "zeros": zero.float().mean(),
                        "dead": zero.all(0).float().mean(), "grad_mean": grad.mean(),
                        "grad_std": grad.std()}
            stats |= {f"relu{layer}_{name}": value.item() for name, value in measured.items()}
            for name, values in ("relu", out), ("relu_grad", grad):
                for kind, numbers in zip(("counts", "edges"), histogram(values)):
                    histograms.setdefault(f"{name}_{kind}", []).append(numbers)
        return stats, histograms

    # ---- saving and resuming ----

    def checkpoint(self) -> dict:
        """Returns what a checkpoint for sampling holds: plain values, and weights on the CPU."""
        row = self.metrics[-1]
        weights = {name: weight.cpu() for name, weight in self.model.state_dict().items()}
        measured = row["iteration"] == self.iteration
        losses = {key: row[key] if measured else math.nan  # between two evaluations
                  for key in ("train_loss", "val_loss", "val_nats_per_char")}
        return {"config": asdict(self.config), "model": weights, "text": self.text_hash,
                "tokenizer": self.tokenizer.fingerprint, "iteration": self.iteration} | losses

    def save(self) -> None:
        """Writes last.pt: the checkpoint and all else that resuming bit for bit takes."""
        random = [self.dropout_rng.get_rng_state()]
        if self.world_size > 1:
            random *= self.world_size  # a place for each rank's
            dist.gather_object(self.dropout_rng.get_rng_state(), random if self.master else None,
                               group=self.flags_group)
        if not self.master:
            return
        self.check_folder()
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise ValueError(self.not_finite("a weight"))
        args = {name: str(value) if isinstance(value, Path) else value
                for name, value in vars(self.args).items()}
        args["out_dir"] = str(self.args.out_dir.resolve())  # the files' places are seen from there
        rows = torch.tensor([[*row.values()] for row in self.metrics], dtype=torch.float64)
        save_last(self.args.out_dir, self.checkpoint() | {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(), "batches": self.batch_rng.get_state(),
            "random": random, "device": self.device.type, "args": args,
            "teachers": self.teacher_hashes, "best": self.best, "tokens_seen": self.tokens_seen,
            "seconds": time.monotonic() - self.started,
            "columns": list(self.metrics[0]), "metrics": rows})

    def not_finite(self, what: str) -> str:
        """Returns the line that explains why the run ends."""
        kept = "nothing was saved"
        if self.metrics:
            kept = f"{self.args.out_dir} keeps the checkpoint before"
        return (f"{what} at iteration {self.iteration} is not a finite number: train with a "
                f"smaller --learning_rate, --grad_clip 1 or --dtype float32; {kept}")

    def check_folder(self) -> None:
        """Raises OSError if the run's folder was removed; a new one would lack the tokenizer."""
        if not (self.args.out_dir / "merges.pkl").exists():
            raise OSError(f"{self.args.out_dir} was removed, or its merges.pkl, at iteration "
                          f"{self.iteration} or before: start a new run")

    def restore(self, last: dict) -> None:
        """Goes on exactly where `last` was saved. Raises ValueError if it is of another run."""
        args, anew = self.args, "or start a new run in another --out_dir"
        teachers = f"--teacher {shlex.join(args.teacher)}"
        for what, then, now in (
                (f"the tokenizer in {args.out_dir}", last["tokenizer"], self.tokenizer.fingerprint),
                (args.data_path, last["text"], self.text_hash),
                (teachers, last.get("teachers", []), self.teacher_hashes)):
            if then != now:
                raise ValueError(f"{what}: not what this run began with; restore it, {anew}")
        free = {name: getattr(self.config, name) for name in ("dropout", "attention_dropout")}
        began = "without" if args.muon_lr else "with"
        for differs, how in (
                (last["config"] | free != asdict(self.config),
                 f"has another network ({last['config']}): leave its sizes as they are, {anew}"),
                (last["iteration"] > args.max_iters,
                 f"is at iteration {last['iteration']} already: give a larger --max_iters"),
                (len(last["optimizers"]) != len(self.optimizers),
                 f"began {began} Muon: leave --muon_lr as it is")):
            if differs:
                raise ValueError(f"the run in {args.out_dir} {how}")
        try:
            self.restore_weights(last)
            self.restore_metrics(last)
            self.restore_random(last)
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError,
                RuntimeError) as error:
            raise ValueError(f"{args.out_dir / 'last.pt'} does not hold the state of this "
                             "training: move it away, so that --resume takes its predecessor, "
                             f"{anew}") from error

    def restore_weights(self, last: dict) -> None:
        """Takes over weights and optimizers. Raises one of many errors if they do not fit."""
        self.model.load_state_dict(last["model"])
        if not all(weight.dtype == torch.float32 and weight.isfinite().all()
                   for weight in last["model"].values()):
            raise ValueError("weights that are not finite numbers of float32")
        for optimizer, state in zip(self.optimizers, last["optimizers"]):
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            for number, moments in state["state"].items():
                shapes = {weights[number].shape, torch.Size([])}
                if not {moment.shape for moment in moments.values()} <= shapes:
                    raise ValueError("moments of other weights")
                if moments.keys() != state["state"][0].keys():
                    raise ValueError("a moment that is missing")
            for saved, group in zip(state["param_groups"], optimizer.param_groups):
                saved |= {name: group[name] for name in group.keys() - {"params"}}  # given anew
            optimizer.load_state_dict(state)
        if last["scaler"]:
            self.scaler.load_state_dict(last["scaler"])

    def restore_random(self, last: dict) -> None:
        """Goes on with the random numbers that were to come, or says why that cannot be."""
        fresh = self.args.seed + last["iteration"]  # does not repeat the run's first draws
        if last["device"] == self.device.type:
            self.batch_rng.set_state(last["batches"])
        else:
            self.batch_rng.manual_seed(fresh)
        if (last["device"], len(last["random"])) == (self.device.type, self.world_size):
            self.dropout_rng.set_rng_state(last["random"][self.rank])
            return
        self.dropout_rng.manual_seed(fresh + self.rank)
        if self.master:
            print(f"saved on {len(last['random'])} x {last['device']}, going on on "
                  f"{self.world_size} x {self.device.type}: from here on it differs from an "
                  "unbroken run")

    def restore_metrics(self, last: dict) -> None:
        """Takes over the rows of metrics.csv and how far the run came."""
        if not {"train_loss", "val_loss", "val_nats_per_char"} <= {*last["columns"]}:
            raise ValueError("metrics without their columns")
        held = last["metrics"].untyped_storage().nbytes()  # a row could stand for millions
        if held < 8 * len(last["metrics"]) * len(last["columns"]):
            raise ValueError("more metrics than the file holds")
        for values in last["metrics"].tolist():
            row = dict(zip(last["columns"], values, strict=True))
            whole = {name: int(row[name]) for name in ("iteration", "tokens_seen")}
            self.metrics.append(row | whole)
        self.iteration, self.tokens_seen = last["iteration"], last["tokens_seen"]
        self.best, self.seconds = last["best"], last["seconds"]

    # ---- loading ----

    def find_device(self) -> None:
        """Finds device and number format and, under torchrun, the other processes."""
        args = self.args
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.master = self.rank == 0
        if self.world_size > 1:
            self.join_others()
        else:
            self.device = choose_device(args.device)
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # dropout is drawn by the current one
        self.dtype = choose_dtype(args.dtype, self.device)
        on_gpu = self.device.type == "cuda"
        if args.compile and not on_gpu:
            raise ValueError("--compile is for CUDA: it gains nothing elsewhere")
        self.compiled = on_gpu if args.compile is None else args.compile
        if args.batch_size % self.world_size:
            raise ValueError(f"--batch_size {args.batch_size} cannot be shared out evenly: make it "
                             f"a multiple of {self.world_size} processes")

    def compile_blocks(self) -> None:
        """Compiles a block, which is like the others, by trying it; goes on without if it fails.

        Raises ValueError where --compile was given.
        """
        for block in self.model.blocks:
            block.compile()
        rows = self.args.batch_size // self.world_size
        rows = math.ceil(rows / (self.args.gradient_accumulation_steps or 1))
        shape = rows, self.args.block_size, self.args.n_embd
        try:
            with self.autocast():
                x = torch.zeros(shape, device=self.device, requires_grad=True)
                self.model.blocks[0](x).sum().backward()
        except Exception as error:  # no C compiler, no Triton, a GPU it does not know ...
            if out_of_memory(error):
                raise
            reason = f"torch.compile failed ({type(error).__name__})"
            if self.args.compile:
                raise ValueError(f"{reason}: train with --no-compile") from error
            self.compiled = False
            for block in self.model.blocks:
                block._compiled_call_impl = None  # what block.compile() had set
            if self.master:
                print(f"note: {reason}: training without it, somewhat slower")
        self.model.zero_grad()

    def join_others(self) -> None:
        """Meets the other processes of torchrun, each on a GPU of its own or on the CPU."""
        name, own = self.args.device, int(os.environ["LOCAL_RANK"])
        gpus = torch.cuda.device_count() if torch.cuda.is_available() and name != "cpu" else 0
        if own >= gpus > 0:
            raise ValueError("torchrun started more processes than there are GPUs: use "
                             f"--nproc_per_node {gpus}")
        if name in [f"cuda:{number}" for number in range(gpus)]:
            name = "cuda"  # each process has a GPU of its own
        gpu = choose_device(name, own).type == "cuda"
        self.device = torch.device("cuda", own) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if gpu else "gloo")
        self.flags_group = dist.new_group(backend="gloo")  # for flags, which live on the CPU

    def load_text(self) -> None:
        """Puts the text on the device, as tokens. Writes nothing but a long text's tokens.bin."""
        args, long, shared = self.args, is_long(self.args.data_path), [None]
        if not long:  # a text too short even in bytes is refused before its tokens are learned
            split(read_text(args.data_path).encode(), args.block_size)
        elif args.bpe_dropout:
            args.bpe_dropout = 0.0
            if self.master:
                print("training without BPE-dropout: so long a text is not learned by heart")
        if self.master:  # it alone writes: a long text's tokens
            self.lock_file = lock(args.out_dir) if long else None
            shared[0], tokens = choose_tokenizer(args)
        if self.world_size > 1:
            dist.broadcast_object_list(shared, group=self.flags_group)
        self.tokenizer, = shared
        if not self.master:
            tokens = load_tokens(self.tokenizer, args.data_path, args.out_dir)
        self.text_hash = tokens.digest
        parts = dict(zip(("train", "val"), split(tokens.ids, args.block_size)))
        val_characters = self.tokenizer.count_characters(parts["val"])
        self.tokens_per_char = {
            "train": len(parts["train"]) / (tokens.characters - val_characters),
            "val": len(parts["val"]) / val_characters}
        self.data = {name: self.on_device(part) for name, part in parts.items()}
        self.epoch_tokens = None, None  # see `training_tokens`
        if args.bpe_dropout:
            self.train_text = self.tokenizer.decode_bytes(parts["train"].tolist())
        val = tile_starts(self.data["val"], args.block_size, EVAL_TOKENS // args.block_size)
        train = tile_starts(self.data["train"], args.block_size, len(val))
        self.starts = {"train": train, "val": val}

    def on_device(self, tokens: np.ndarray) -> torch.Tensor | MappedTokens:
        """Returns tokens as an int32 tensor where the network is; those of a file stay there."""
        if isinstance(tokens, np.memmap):
            return MappedTokens(tokens, self.device)
        return torch.from_numpy(tokens.astype(np.int32)).to(self.device)

    def training_tokens(self) -> torch.Tensor:
        """Returns the training text as tokens, (N,), spelled anew on each pass by --bpe_dropout.

        The dropout follows the learning rate down to 0, as in the end there is one spelling alone.
        """
        args, n = self.args, len(self.data["train"])
        if not args.bpe_dropout:
            return self.data["train"]
        epoch = self.tokens_seen // n
        if self.epoch_tokens[0] != epoch:
            rng = np.random.default_rng([args.seed, epoch])  # the same for a run that is resumed
            began = epoch * n // (args.batch_size * args.block_size)
            tokens = self.tokenizer.encode_array(self.train_text,
                                                 args.bpe_dropout * schedule(began, args), rng)
            self.epoch_tokens = epoch, self.on_device(tokens)
        return self.epoch_tokens[1]

    def load_teachers(self) -> None:
        """Loads the networks that --teacher names, and a digest of each for last.pt."""
        paths = [Path(path) for path in self.args.teacher]
        self.teachers = [self.load_teacher(path) for path in paths]
        self.teacher_hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]

    def load_teacher(self, path: Path) -> GPT:
        """Loads a teacher. Raises ValueError if this network cannot learn from it."""
        args, (teacher, entries) = self.args, load_model(path)
        tokenizer, context = entries.get("tokenizer"), teacher.config.block_size
        for unfit, why in (
                (entries.get("int8"), "is int8: name the model.pt it was made from"),
                (tokenizer != self.tokenizer.fingerprint
                 or teacher.config.vocab_size != args.vocab_size,
                 f"was trained with another tokenizer than that in {args.out_dir}: copy merges.pkl "
                 "and vocab.pkl from its folder into a new --out_dir, and train there with its "
                 "--vocab_size"),
                (entries.get("text") != self.text_hash,
                 f"was trained on another text than {args.data_path}, perhaps on what this network "
                 "is validated on: use a teacher trained on the same text"),
                (context < args.block_size, f"has a context of {context} tokens: use --block_size "
                 f"{context}, or another teacher")):
            if unfit:
                raise ValueError(f"--teacher {path} {why}")
        return teacher.to(self.device)

    def summary(self) -> str:
        """Returns what is about to run, in one line."""
        several = f"{self.world_size} x " * (self.world_size > 1)
        machine = several + self.device.type + ", compiled" * self.compiled
        return (f"{sum(p.numel() for p in self.model.parameters()):,} parameters in "
                f"{str(self.dtype)[6:]} on {machine}; {len(self.data['train']):,} tokens to train "
                f"on, {len(self.data['val']):,} to validate on; iterations {self.iteration} to "
                f"{self.args.max_iters} of {self.args.batch_size} x {self.args.block_size} tokens")


# ---- initial values ------------------------------------------------------------------------------
# A network from scratch first has to learn which token came before, and where the last tokens
# occurred earlier. That takes it a million tokens and more, in which the loss hardly falls. Here
# both are written into the initial weights; training may change them.


@torch.no_grad()
def init_heads(model: GPT, tokens: torch.Tensor) -> None:
    """Lets some heads look back, others for repetitions, and the output expect frequent tokens.

    Positions are sinusoids (Vaswani et al. 2017) in half of the channels. In the first layer, head
    h looks at the token h + 1 places back; heads 0 and 1 copy what they see there into channels of
    their own. In the second layer, head 0 looks for places that follow the same token as the one
    just read, head 1 for those that follow the same two: there stands what came next that time
    (induction heads, Olsson et al. 2022). All other matrices by which blocks add something start
    at 0. The factors were found by trial. tokens, of the text: (N,) int64 or int32.
    """
    C, H, D = model.config.n_embd, model.config.n_head, model.config.head_size
    # pairs of a sine and a cosine: in all positions, and in a head
    pairs, half = C // 4, min(D, C // 2) // 2
    frequencies = math.pi * 100 ** (-torch.arange(pairs) / pairs)
    angles = torch.arange(model.config.block_size)[:, None] * frequencies
    positions = model.position_embedding.weight.zero_()
    positions[:, :pairs], positions[:, pairs:2 * pairs] = 0.15 * angles.sin(), 0.15 * angles.cos()
    torch.nn.init.normal_(model.token_embedding.weight, std=0.06)
    counts = torch.bincount(tokens, minlength=model.config.vocab_size) + 1
    model.head.bias.copy_((counts / counts.sum()).log())
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
        torch.nn.init.zeros_(block.ffwd.down.weight)
    q, k, v = model.blocks[0].attn.qkv.weight.view(3, H, D, C)
    q.zero_(), k.zero_()
    i, sine = torch.arange(half), torch.linspace(0, pairs - 1, half).long()
    for h in range(H):  # a query is its position, turned back by h + 1 tokens
        turn, cosine = frequencies[sine] * (h + 1), sine + pairs
        k[h, i, sine] = k[h, i + half, cosine] = 1.0
        q[h, i, sine] = q[h, i + half, cosine] = turn.cos()
        q[h, i, cosine], q[h, i + half, sine] = -turn.sin(), turn.sin()
    if min(H, len(model.blocks)) < 2:
        return
    # What follows are lists of channels: of a token, and of the tokens one and two places before.
    n = min(D, C // 5) // 2
    i = torch.arange(2 * n)
    token, before, before_that = C // 2 + i, C // 2 + 2 * n + i, C // 2 + 4 * n + i[:n]
    out = model.blocks[0].attn.proj.weight.view(C, H, D)
    v[:2] = 0
    v[0, i, token] = v[1, i[:n], token[:n]] = 1.0
    out[before, 0, i] = out[before_that, 1, i[:n]] = 0.3
    q, k, _ = model.blocks[1].attn.qkv.weight.view(3, H, D, C)
    q[:2], k[:2] = 0, 0
    q[0, i, token] = k[0, i, before] = 1.5
    q[1, i[:n], token[:n]] = k[1, i[:n], before[:n]] = 1.5
    q[1, n + i[:n], before[:n]] = k[1, n + i[:n], before_that] = 1.5


# ---- what a run needs ----------------------------------------------------------------------------


class CoreThreads:
    """Threads that share out the parts of a batch among the cores of a CPU.

    A core with a part of its own does not wait for others, as it would in each operation that all
    do together: an iteration takes a tenth less time in float32, a quarter less in bfloat16.
    """

    def __init__(self, parts: int):
        """Starts a thread for each core or, if there are fewer parts, for each of these."""
        cores = torch.get_num_threads()
        self.number = min(cores, parts)

        def start():
            torch.get_num_threads()  # or PyTorch, in its first operation, would set its own number
            torch.set_num_threads(cores // self.number)

        self.pool = ThreadPoolExecutor(self.number, initializer=start)

    def gradients(self, loss: Callable[..., torch.Tensor], parts: list[tuple],
                  weights: list[torch.nn.Parameter], scale: torch.Tensor) -> torch.Tensor:
        """Leaves in the weights the gradient of `scale` times the sum of loss(*part).

        Returns that sum over all parts, unscaled, a scalar. Each part has a seed of its own, and
        they are added up in their order: up to one core a part, their number changes nothing.
        """
        def compute(part, seed):
            with dropout_from(torch.Generator().manual_seed(seed)):
                value = loss(*part)
            return value.detach(), torch.autograd.grad(value, weights, scale)

        total, cores = torch.zeros(()), torch.get_num_threads()
        seeds = torch.randint(2**63 - 1, (len(parts),)).tolist()
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        map_parts = self.pool.map if self.number > 1 else map
        if self.number > 1:
            torch.set_num_threads(1)  # for the sums of this thread, as all cores are busy
        try:
            for value, gradients in map_parts(compute, parts, seeds):
                total += value
                for weight, gradient in zip(weights, gradients):
                    weight.grad += gradient
        finally:
            torch.set_num_threads(cores)
        return total


class Stop:
    """Notes what asks a run to end, so that the loop can end between two iterations, and save.

    That is Ctrl-C, SIGTERM, a terminal that is closed, or a pipe whose reader has gone. A signal
    ignored from the start, as `nohup` does, stays ignored. A second Ctrl-C ends at once, but not
    within three seconds: a terminal and torchrun, or a notebook, may both pass on the same one.
    """

    def __init__(self):
        self.requested, self.status, self.since = False, 128 + signal.SIGTERM, math.inf
        for name in "SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK":  # the last on Windows
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.note)

    def note(self, number: int, frame: object) -> None:
        """Handles a signal; `print` could fail here, or meet itself half done."""
        now = time.monotonic()
        if not self.requested:
            self.requested, self.status, self.since = True, 128 + number, now
            with contextlib.suppress(OSError):
                os.write(2, b"\nfinishing, then saving\n")
        elif number == signal.SIGINT and now - self.since > 3:
            raise KeyboardInterrupt

    def tell(self, line: str) -> None:
        """Prints a line above the progress bar; a run does not fail where nobody can read it."""
        try:
            tqdm.write(line)
        except BrokenPipeError:
            self.requested, self.status = True, 0
        except OSError:  # a full disk, a terminal that has gone
            pass


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the number format of that name, for `auto` the fastest that trains well.

    That is bfloat16 where the hardware has it, else float16 on a CUDA GPU, float32 elsewhere.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        has_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        return torch.bfloat16 if has_bfloat16 else torch.float32
    if device.type != "cuda":
        return torch.float32
    # torch.cuda.is_bf16_supported() says yes on a T4, too, which emulates it slowly.
    new = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if new else torch.float16


def histogram(values: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Counts the values, float32 of any shape, in 100 bins: counts (100,) int64, edges (101,).

    It is np.histogram, but made where the values are, so that a GPU need not hand them over.
    """
    if values.device.type == "mps":  # its histc makes a row of 100 numbers of each value
        values = values.cpu()
    low, high = (value.item() for value in values.aminmax())
    if low == high:  # a dead layer
        low, high = low - 0.5, high + 0.5
    parts = values.flatten().split(2**24)  # histc counts in float32, which knows no larger odd ones
    counts = sum(torch.histc(part, 100, low, high).long() for part in parts)
    return counts.cpu().numpy(), np.linspace(low, high, 101, dtype=np.float32)


def choose_tokenizer(args: argparse.Namespace) -> tuple[BasicTokenizer, Tokens]:
    """Returns the tokenizer of --init_from or, without it, the one in --out_dir; and the text.

    If there is none, or it is that of a run on another text, it learns one, and does not write it.
    Raises ValueError if the one there has another size.
    """
    folder = args.init_from.parent if args.init_from else args.out_dir
    fixed = args.init_from or args.resume
    if fixed or (folder / "merges.pkl").exists():
        tokenizer = BasicTokenizer(out_dir=folder)
        texts, needed = digests(folder, "text"), digests(folder, "tokenizer")
        texts = {texts[network] for network in texts
                 if needed.get(network) == tokenizer.fingerprint}  # one may just have been renamed
        tokens = load_tokens(tokenizer, args.data_path, args.out_dir)
        if fixed or texts <= {None} or tokens.digest in texts:
            if not args.init_from and tokenizer.vocab_size != args.vocab_size:
                raise ValueError(f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, "
                                 f"not {args.vocab_size}: use --vocab_size "
                                 f"{tokenizer.vocab_size}, or another --out_dir")
            print(f"using the tokenizer that is in {folder}: "
                  f"{tokens.size / len(tokens.ids):.2f} bytes a token of this text")
            return tokenizer, tokens
        print(f"the run in {folder} is on another text, and so is its tokenizer")
    print(f"training a tokenizer of {args.vocab_size} tokens on {args.data_path}")
    tokenizer = BasicTokenizer(args.data_path, args.vocab_size, out_dir=None)
    return tokenizer, load_tokens(tokenizer, args.data_path, args.out_dir)


# ---- the folder of a run -------------------------------------------------------------------------

RUN_FILES = {"model.pt", "last.pt", "last.pt.new", "last.pt.old", "model_int8.pt", "metrics.csv",
             "histograms.npz"}
PICTURES = {"loss", "relu_training", "relu_outputs", "relu_gradients", "attention", "expected"}
LAST_ENTRIES = {  # what resuming needs, and its type
    "iteration": int, "optimizers": list, "scaler": dict, "batches": torch.Tensor, "random": list,
    "device": str, "args": dict, "text": str, "tokenizer": str, "tokens_seen": int, "best": float,
    "seconds": float, "columns": list, "metrics": torch.Tensor}


def lock(out_dir: Path) -> io.TextIOWrapper:
    """Holds out_dir, made if need be, until this process ends in whatever way.

    Raises ValueError if another training holds it, OSError if it cannot be written.
    """
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
        raise ValueError(f"another training is running in {out_dir}: wait for it, or choose "
                         "another --out_dir") from None
    except (ImportError, OSError):  # Windows has no such lock, nor have some network drives
        pass
    return file


def make_room(out_dir: Path, tokenizer: BasicTokenizer) -> None:
    """Moves an earlier run into a folder of its own, and writes the tokenizer of the new one.

    The tokenizer of the earlier run goes with it, and stays, too, if it is the same. All is kept.
    """
    old = BasicTokenizer(out_dir=out_dir) if (out_dir / "merges.pkl").exists() else None
    keep = old is not None and old.fingerprint == tokenizer.fingerprint
    needed = digests(out_dir, "tokenizer")
    networks = [path for path in needed if path.name in RUN_FILES or needed[path] and not keep]
    if networks or old and not keep:
        named = {needed[path] for path in networks} - {None}
        if tokenizer.fingerprint in named:
            old = tokenizer  # theirs was lost, perhaps, and is now learned once more
        elif named and keep:
            old = None  # another than theirs, so it must not lie beside them
        move_aside(out_dir, networks, old, keep)
    if not keep:
        tokenizer.save(out_dir)


def move_aside(out_dir: Path, networks: list[Path], tokenizer: BasicTokenizer | None,
               keep: bool) -> None:
    """Moves networks, their tokenizer and all else a run made; `keep` leaves the tokenizer, too."""
    number = next(n for n in range(1, 10**6) if not (out_dir / f"earlier-{n}").exists())
    earlier = out_dir / f"earlier-{number}"
    if tokenizer:  # first, as only this may find the disk full
        tokenizer.save(earlier)
    earlier.mkdir(exist_ok=True)
    for path in sorted(out_dir.iterdir()):
        picture = path.suffix in (".png", ".svg") and path.stem in PICTURES
        if path in networks or path.name in RUN_FILES or picture:
            path.replace(earlier / path.name)
    if not keep:
        for name in "merges.pkl", "vocab.pkl":
            (out_dir / name).unlink(missing_ok=True)
    resumable = any(path.name.startswith("last.pt") for path in networks)
    print(f"moved the earlier run to {earlier}"
          + " (--resume would have continued it)" * resumable)


def load_last(out_dir: Path) -> dict:
    """Reads what --resume goes on from: last.pt or, if it is missing or damaged, its predecessor.

    Raises ValueError if there is neither.
    """
    errors = []
    for path in (out_dir / name for name in ("last.pt", "last.pt.new", "last.pt.old")):
        try:
            last = load_checkpoint(path)
            whole = all(type(last.get(key)) is kind for key, kind in LAST_ENTRIES.items())
            if not whole or any(isinstance(value, torch.Tensor) for value in last["args"].values()):
                raise ValueError(f"{path} holds no training to resume")
        except (ValueError, OSError) as error:  # a training that saves now may have renamed it
            errors.append(error)
            continue
        if errors and (out_dir / "last.pt").exists():
            print(f"{errors[0]}\ngoing on from {path}, iteration {last['iteration']}, instead",
                  file=sys.stderr)
        return last
    if (out_dir / "last.pt").exists():
        raise errors[0]
    raise ValueError(f"nothing to resume in {out_dir}: start with `python train.py`, or name the "
                     "run's folder with --out_dir")


def save_last(out_dir: Path, last: dict) -> None:
    """Replaces last.pt and keeps its predecessor, should the new file turn out to be damaged."""
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


# ---- the command line ----------------------------------------------------------------------------

LESS_THAN = {"dropout": 1, "attention_dropout": 1, "bpe_dropout": 1, "beta1": 1, "beta2": 1,
             "init_heads": 2, "even_windows": 2, "vocab_size": MAX_VOCAB + 1, "n_layer": 1001}


def make_parser() -> argparse.ArgumentParser:
    """Declares the flags: those of FLAGS, and those that are not numbers."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("files").add_argument
    # paths become absolute, as --resume may be called from another folder
    add("--data_path", type=lambda path: Path(path).resolve(), default=DEFAULT_TEXT,
        help="any UTF-8 text (default: data/input.txt, Tiny Shakespeare)")
    add("--out_dir", type=Path, default=CHECKPOINTS,
        help="folder for all a run makes (default: checkpoints/)")
    add("--preset", choices=PRESETS, default="reference",
        help="values for the flags not given: those of the published run (reference), of one that "
        "has a lower loss in minutes (fast), or of a longer one that gets farther, above all with "
        "a --teacher (best) (default: reference)")
    add("--teacher", type=os.path.realpath, nargs="+", default=[], metavar="MODEL.PT",
        help="networks of the same tokenizer, whose expectations this one learns, too (default: "
        "from the text alone)")
    add("--init_from", type=lambda path: one_file(path).resolve(), metavar="MODEL.PT",
        help="network whose weights, and the tokenizer beside it, a new run starts from, on any "
        "text (default: random weights)")
    add("--resume", action="store_true",
        help="go on from last.pt in --out_dir, with its flags unless given anew")
    network = parser.add_argument_group("network")
    training = parser.add_argument_group("training")
    of_network = {field.name for field in fields(GPTConfig)}
    for name, default, smallest, meaning in FLAGS:
        kind, less_than = type(default), LESS_THAN.get(name)
        limit = f", less than {less_than}" if less_than == 1 else ""
        group = network if name in of_network else training
        group.add_argument(f"--{name}", type=bounded(kind, smallest, less_than), default=default,
                           metavar="N" if kind is int else "X",
                           help=f"{meaning}{limit} (default: {default})")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto",
        help="cuda, cuda:1, mps or cpu (default: the first of these that is there)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="number format of the arithmetic (default: bfloat16 where the hardware has it, else "
        "float16 on a CUDA GPU, else float32)")
    add("--compile", action=argparse.BooleanOptionalAction, default=None,
        help="fuse the operations of each block with torch.compile (default: where it can, on "
        "CUDA)")
    return parser


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict | None]:
    """Returns the flags and, with --resume, the contents of last.pt.

    The flags of that run then stand for those not given.
    """
    parser, last = make_parser(), None
    args = parser.parse_args(argv)
    if args.resume:
        if args.preset != "reference":
            parser.error("--preset is for a new run: --resume goes on with the flags of the run it "
                         "finds")
        if args.init_from:
            parser.error("--init_from is for a new run: --resume needs it no more")
        last = load_last(args.out_dir)
        args = resumed_args(parser, argv, last, args.out_dir)
    else:
        parser.set_defaults(**PRESETS[args.preset])
        sizes = initial_sizes(parser, args) if args.init_from else {}
        parser.set_defaults(**sizes)
        args = parser.parse_args(argv)
        for name, size in sizes.items():
            if getattr(args, name) != size:
                parser.error(f"--{name} {getattr(args, name)} differs from that of --init_from "
                             f"{args.init_from}, {size}, which stands: leave it out")
    if args.lr_decay_iters is None:
        args.lr_decay_iters = args.max_iters
    check_args(parser, args)
    return args, last


def initial_sizes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, int]:
    """Returns the sizes of the network in --init_from. Raises ValueError if it is of no use."""
    check_network(parser, "--init_from", args.init_from, args.out_dir)
    model, entries = load_model(args.init_from)
    if entries.get("int8"):
        raise ValueError(f"--init_from {args.init_from} is int8: name the model.pt it was made "
                         "from")
    sizes = "vocab_size", "block_size", "n_embd", "n_head", "n_layer"
    return {name: getattr(model.config, name) for name in sizes}


def found_again(saved: object, out_dir: Path, saved_out_dir: object) -> str:
    """Returns where a file of a run is now, whose folder was saved_out_dir and is now out_dir.

    That is where it was or, if all was moved, beside out_dir as before, or the default text.
    """
    path = Path(str(saved))
    places = [path]
    with contextlib.suppress(ValueError):  # another drive, on Windows
        places.append(out_dir / os.path.relpath(path, str(saved_out_dir)))
    if path.name == DEFAULT_TEXT.name:
        places.append(DEFAULT_TEXT)
    return str(next((place for place in places if place.exists()), path).resolve())


def resumed_args(parser: argparse.ArgumentParser, argv: list[str] | None, last: dict,
                 out_dir: Path) -> argparse.Namespace:
    """Returns the flags given and, where none is, those saved, which are checked as if given.

    Leaves in last["args"] those saved that there still are, with files where they are now.
    """
    known = vars(parser.parse_args([])).keys() - {"resume", "out_dir", "init_from"}
    then = last["args"].get("out_dir")
    saved = last["args"] = {name: value for name, value in last["args"].items() if name in known}
    flags = []
    if "data_path" in saved:
        saved["data_path"] = found_again(saved["data_path"], out_dir, then)
    if type(saved.get("teacher")) is list and saved["teacher"]:
        saved["teacher"] = [found_again(path, out_dir, then) for path in saved["teacher"]]
        flags = ["--teacher", *saved["teacher"]]
    if saved.get("lr_decay_iters", 0) == saved.get("max_iters"):
        parser.set_defaults(lr_decay_iters=None)  # the cosine goes on ending with the run
        del saved["lr_decay_iters"]
    flags += [f"--{name}={value}" for name, value in saved.items()
              if name not in ("compile", "teacher")]
    if saved.get("compile") is not None:
        flags.append("--compile" if saved["compile"] else "--no-compile")
    args = parser.parse_args(flags + (sys.argv[1:] if argv is None else argv))
    if args.seed != saved.get("seed", args.seed):
        parser.error(f"--seed was {saved['seed']} when this run began, and cannot change any more")
    return args


def changed_flags(args: argparse.Namespace, saved: dict) -> list[str]:
    """Returns a note for each flag that is not what it was when the run was saved."""
    return [f"note: --{name} was {saved[name]} when this run was saved and is {value} from here on"
            for name, value in vars(args).items()
            if name in saved.keys() - {"preset"} and str(saved[name]) != str(value)]


def check_network(parser: argparse.ArgumentParser, flag: str, path: Path, out_dir: Path) -> None:
    """Ends with a usage error where there is no such file or this run would replace it."""
    if not path.is_file():
        parser.error(f"no file at {flag} {path}: name the model.pt of an earlier run")
    if path.parent == out_dir.resolve():
        parser.error(f"{flag} {path} lies in --out_dir, whose files this run replaces: train into "
                     "another --out_dir")


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with a usage error where flags do not go together.

    Raises ValueError for the folder of the pretrained network.
    """
    if args.out_dir.exists() and PRETRAINED.exists() and args.out_dir.samefile(PRETRAINED):
        raise ValueError(f"--out_dir {args.out_dir} holds the network that comes with the "
                         "repository: choose another folder")
    args.teacher = [str(path) for pattern in args.teacher for path in matching(pattern)]
    for path in args.teacher:
        check_network(parser, "--teacher", Path(path), args.out_dir)
    if args.n_head > args.n_embd:
        parser.error(f"--n_head {args.n_head} must not exceed --n_embd {args.n_embd}: each head "
                     "needs a channel")


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # each line at once, into a pipe, too
    limit_threads()
    args, last = parse_args()
    master = int(os.environ.get("RANK", 0)) == 0
    if master and args.data_path == DEFAULT_TEXT and not DEFAULT_TEXT.exists():
        prepare = [sys.executable, DEFAULT_TEXT.with_name("prepare.py")]
        if status := subprocess.run(prepare).returncode:
            sys.exit(status)  # it has said why
    trainer = Trainer(args, last)
    if master:
        trainer.lock_file = trainer.lock_file or lock(args.out_dir)  # late: refused, none is made
        if args.resume:
            for note in changed_flags(args, last["args"]):
                print(note)
        else:
            make_room(args.out_dir, trainer.tokenizer)
        print(trainer.summary())
        if trainer.iteration == args.max_iters:
            print("this run is complete: a larger --max_iters goes on")
    trainer.run()
    if master:
        trainer.stop.tell(farewell(trainer))
    status = trainer.stop.status if trainer.stop.requested else 0
    if trainer.world_size > 1:
        dist.barrier(trainer.flags_group)  # a process that left before the master aborted at times
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(status)  # threads of the group live on, and aborted a Python that was ending
    if status:
        sys.exit(status)


def farewell(trainer: Trainer) -> str:
    """Returns the last words: how to go on with a run that was stopped, or a sample."""
    args = trainer.args
    folder = [] if args.out_dir == CHECKPOINTS else ["--out_dir", args.out_dir.as_posix()]
    if trainer.stop.requested:
        start, others = ["python"], ""
        if trainer.world_size > 1:
            processes = os.environ["LOCAL_WORLD_SIZE"]
            start = ["torchrun", "--nproc_per_node", processes]
            if trainer.world_size > int(processes):
                others = " on each machine, with its --nnodes and --rdzv flags"
        command = shlex.join([*start, sys.argv[0], "--resume", *folder])
        return (f"stopped and saved at iteration {trainer.iteration}; go on with: "
                f"{command}{others}")
    model, best = load_model(args.out_dir / "model.pt")
    start = torch.tensor([trainer.tokenizer.encode_array("\n").tolist()])
    ids = model.generate(start, 200, TEMPERATURE, seed=args.seed)[0].tolist()
    text = trainer.tokenizer.decode(ids)
    script = Path(sys.argv[0]).with_name("generate.py").as_posix()
    command = shlex.join(["python", script, *folder])
    return (f"\na sample, from the weights of iteration {best['iteration']} (val loss "
            f"{best['val_loss']:.4f}):\n{text}\n\nmodel.pt, metrics.csv and all else is in "
            f"{args.out_dir}; more text: {command}")


if __name__ == "__main__":
    run_script(main, "use more --gradient_accumulation_steps, a smaller --batch_size, "
               "--block_size, --n_embd, --n_layer or --eval_iters, or another --device")
