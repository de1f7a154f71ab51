"""A GPT: the network, how text is sampled from it, and what makes both fast and safe.

    model = GPT(GPTConfig())                        # 3,514,836 parameters
    logits, loss = model(idx, targets)              # idx, targets: (B, T) int64
    ids = model.generate(idx, max_new_tokens=100)   # (B, T + 100)

Read down to `sample`: that is all there is to a GPT. `split` and `windows`, further down, make what
it is trained on. The rest may wait: it computes the same, faster, or is for files. Who changes the
network changes its stand-ins, too: `cpu_attention`, `gpu_attention`, `Decoder.read`, `numpy_read`.

Shapes: B sequences of T tokens, C = n_embd channels, H heads of D channels, V = vocab_size.
"""
import math
import os
import pickletools
import re
import secrets
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from tokenizer import atomic_write, out_of_memory, usable_cores

# ---- the network ---------------------------------------------------------------------------------


@dataclass
class GPTConfig:
    """The hyperparameters that fix the network's shape. Raises ValueError if no network has it."""
    vocab_size: int = 500           # tokens the network knows
    block_size: int = 256           # the longest context, in tokens
    n_embd: int = 232               # channels: how long the vector of a token is
    n_head: int = 6
    n_layer: int = 5
    dropout: float = 0.2            # after attention and after feed-forward
    attention_dropout: float = 0.2  # on the attention weights

    def __post_init__(self):
        check_config(self)

    @property
    def head_size(self) -> int:
        """Channels of a head, 232 // 6 = 38, so that six heads have 228 of the 232 channels."""
        return self.n_embd // self.n_head


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
              dropout: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal scaled dot-product attention (Vaswani et al. 2017): softmax(q @ k^T / sqrt(D)) @ v.

    Every token looks for something (its query), says what it has (its key) and hands that over
    (its value). The better a key matches a query, the more of its value the query's token gets.

    q, k, v: (B, H, T, D). Returns what each token gathers, (B, H, T, D), and the weights with which
    it does, (B, H, T, T), a row for each query. A share `dropout` of them is set to 0.
    This is the formula; on a CPU and on a CUDA GPU the faster versions below compute the same.
    """
    T, D = q.shape[-2:]
    # A score is a sum of D products, whose spread grows with sqrt(D). Undivided, some would be so
    # large that softmax gave all weight to one token, and no gradient to the others.
    scores = q @ k.transpose(-2, -1) * D ** -0.5  # (B, H, T, T)
    # A token that could see the one it has to predict would learn to copy, not to predict.
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)  # each row adds up to 1
    return F.dropout(weights, dropout) @ v, weights


class CausalSelfAttention(nn.Module):
    """Multi-head attention: each token gathers from itself and those before it what it needs."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.head_size = config.n_head, config.head_size
        width = config.n_head * config.head_size
        self.qkv = nn.Linear(config.n_embd, 3 * width, bias=False)
        self.proj = nn.Linear(width, config.n_embd)
        self.dropout = config.attention_dropout

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None) -> torch.Tensor:
        """x: (B, T, C) -> (B, T, C). A `cache`, in sampling alone, is filled for `Decoder`."""
        if x.device.type == "cuda":
            return gpu_attention(self, x, cache)  # computes the same
        B, T, _ = x.shape
        # One product makes query, key and value of all heads. Each head sees D channels of its own,
        # so that one can look for the word before, say, while another looks for who is speaking.
        qkv = self.qkv(x)  # (B, T, 3 * H * D)
        qkv = qkv.view(B, T, 3, self.n_head, self.head_size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv  # each (B, H, T, D)
        if cache is not None:
            cache[:, :, :, :T] = qkv[1:]
        dropout = self.dropout if self.training else 0.0
        y = cpu_attention(q, k, v, dropout) if x.is_cpu else attention(q, k, v, dropout)[0]
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))  # heads side by side, then mixed


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them, for each token by itself: (B, T, C) both ways."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_flat = x.flatten(0, 1)  # (B * T, C); in three dimensions the in-place ReLU would copy
        return self.down(self.relu(self.up(x_flat))).view_as(x)


class Block(nn.Module):
    """Attention, in which tokens exchange what they know, then feed-forward, which digests it.

    Both add what they find to x, the residual stream (He et al. 2016). Nothing else changes x, so
    gradients flow back through the sum undamped. As x grows with every addition, both read a copy
    that is normalised (pre-norm).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.ffwd = FeedForward(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None) -> torch.Tensor:
        """x: (B, T, C) -> (B, T, C)."""
        x = x + self.dropout(self.attn(self.ln_1(x), cache))
        return x + self.dropout(self.ffwd(self.ln_2(x)))


class GPT(nn.Module):
    """The network: embeddings, n_layer blocks, a last norm and an output head.

    It is that of GPT-2 (Radford et al. 2019), but with ReLU, no bias in query, key and value, no
    dropout on the embeddings, and an output head with weights and a bias of its own.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)

    def init_weights(self, std: float) -> None:
        """Draws the matrices from a normal distribution, as GPT-2 does, in place of PyTorch's.

        Those that write into the residual stream start smaller, as 2 * n_layer of them add up.
        """
        for name, p in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):
                nn.init.normal_(p, std=std / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx: torch.Tensor, caches: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the normalised residual stream after the last block: (B, T) int64 -> (B, T, C).

        Each layer leaves its keys and values in its part of `caches`, see `Decoder`.
        Raises ValueError if T exceeds block_size.
        """
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into block_size {self.config.block_size}")
        # Attention does not see the order of tokens, so each brings its position along.
        x = self.token_embedding(idx) + self.position_embedding.weight[:T]  # (B, T, C)
        for layer, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[layer])
        return self.ln(x)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Predicts the token after each token of idx, (B, T) int64 with T <= block_size.

        Returns the logits (B, T, V) and, where targets are given, their mean cross-entropy in nats
        per token. Targets are the tokens that come next, (B, T) int64, or a probability for each
        token of the vocabulary, (B, T, V) float32. In the loss the logits are divided by the
        temperature. Raises ValueError if T exceeds block_size.
        """
        logits = self.head(self.hidden(idx))  # (B, T, C) -> (B, T, V)
        if targets is None:
            return logits, None
        scaled = logits.flatten(0, 1).float() / temperature
        return logits, F.cross_entropy(scaled, targets.flatten(0, 1))

    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float | None = None,
                 seed: int | None = None) -> torch.Tensor:
        """Returns idx, (B, T) int64, and behind it what `stream` draws: (B, T + max_new_tokens)."""
        new = self.stream(idx, max_new_tokens, temperature, top_k, top_p, seed)
        return torch.cat([idx, *(token[:, None] for token in new)], dim=1)

    @torch.inference_mode()
    def stream(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
               top_k: int | None = None, top_p: float | None = None, seed: int | None = None,
               allowed: Callable = lambda drawn: None) -> Iterator[torch.Tensor]:
        """Yields max_new_tokens times the next token of each row, (B,) int64, once it is drawn.

        temperature, top_k and top_p are `sample`'s. With a seed the text is the same each time, and
        a row's does not depend on the others, up to rounding (int8 rounds the inputs of all
        together). Only the last block_size tokens of idx count. `allowed` gets the tokens drawn
        last, or None at first, and returns which may come next, (B, V) bool, or None for all.
        Raises ValueError if idx holds no token.
        """
        if idx.shape[1] == 0:
            raise ValueError("nothing to continue: idx must hold at least one token a row")
        training = self.training
        self.eval()
        try:
            decoder = Decoder(self, len(idx))  # remembers what it has read
            logits = decoder.prefill(idx[:, -self.config.block_size:])  # (B, V)
            draws, token = uniforms(len(idx), seed, idx.device), None
            for left, uniform in zip(reversed(range(max_new_tokens)), draws):
                if (mask := allowed(token)) is not None:
                    logits = logits.masked_fill(~mask, float("-inf"))
                token = sample(logits, uniform, temperature, top_k, top_p)
                yield token
                if left:
                    logits = decoder.step(token)
        finally:
            self.train(training)


def sample(logits: torch.Tensor, uniform: torch.Tensor, temperature: float = 1.0,
           top_k: int | None = None, top_p: float | None = None) -> torch.Tensor:
    """Draws a token for each row of logits, (B, V), with the help of uniform, (B,) in [0, 1).

    The temperature divides the logits: below 1 the likely tokens become likelier, 0 takes the
    likeliest. top_k keeps the k likeliest tokens, top_p the likeliest whose probabilities reach p
    together (Holtzman et al. 2020). Returns (B,) int64.
    """
    if temperature < 1e-20:  # a quotient might not fit into float32
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        likeliest, order = probs.sort(descending=True)
        beyond = likeliest.cumsum(-1) - likeliest >= max(top_p, 1e-30)  # those before reach p
        probs = probs.scatter(1, order, likeliest.masked_fill(beyond, 0.0))
    # Laid end to end the probabilities fill [0, 1], and the token is drawn whose piece holds
    # `uniform`. The factor keeps it off the very end, where rounding could take it beyond.
    cdf = probs.cumsum(-1)
    return (cdf <= uniform[:, None] * cdf[:, -1:] * (1 - 2**-22)).sum(-1)


# ---- fast dropout and attention ------------------------------------------------------------------
# On a CPU, attention and drawing dropout's masks would take most of a training step. Here both take
# a third of the time, or less, of `attention` and of PyTorch's dropout, forward and backward (two
# cores, float32, this network's sizes). On a GPU a fused kernel attends.

QUERIES = 64  # at a time: fewer mean more operations, more mean more scores of the future
this_thread = threading.local()


@contextmanager
def dropout_from(generator: torch.Generator) -> Iterator[None]:
    """Lets `keep_mask` draw from `generator`, in this thread, in place of PyTorch's own."""
    this_thread.generator = generator
    try:
        yield
    finally:
        this_thread.generator = None


def keep_mask(shape: torch.Size, p: float, dtype: torch.dtype) -> torch.Tensor:
    """Draws a tensor on the CPU: zeros, with probability p to within 2^-16, else ones.

    Each random integer of 64 bits serves as four coins of 16 bits.
    """
    n, generator = shape.numel(), getattr(this_thread, "generator", None)
    integers = torch.empty((n + 3) // 4, dtype=torch.int64)
    coins = integers.random_(-2**63, None, generator=generator).view(torch.int16)[:n].view(shape)
    kept = coins.ge_(min(round(p * 2**16) - 2**15, 2**15 - 1))  # in place, as 0 and 1
    if dtype == torch.bfloat16:
        return kept.mul_(0x3F80).view(dtype)  # the bits of 1.0 in bfloat16
    return kept.to(dtype)


class Dropout(nn.Dropout):
    """Dropout (Srivastava et al. 2014), on a CPU with the mask of `keep_mask`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_cpu or not self.training or self.p == 0:
            return super().forward(x)
        return (x * keep_mask(x.shape, self.p, x.dtype)).mul_(1 / (1 - self.p))


def cpu_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                  dropout: float = 0.0) -> torch.Tensor:
    """Computes what `attention` does, on a CPU. q, k, v: (B, H, T, D) -> (B, H, T, D).

    It takes some queries at a time, so that keys in the future of all of them are never looked at.
    It begins with the last queries and slices keys and values from the slice before: the gradient
    of a slice is as long as what it was cut from, and so becomes shorter each time.
    """
    B, H, T, D = q.shape
    v = v * (1 / (1 - dropout))  # dropout's factor: v has fewer numbers than the weights
    q, k, v = (t.reshape(B * H, T, D) for t in (q, k, v))
    future = torch.full((T, T), float("-inf"), dtype=v.dtype).triu(1)
    rows, end = [], T
    with torch.autocast("cpu", enabled=False):  # q, k and v have the format wanted already
        for queries in reversed(q.split(QUERIES, dim=1)):
            start = end - queries.shape[1]
            scores = torch.baddbmm(future[start:end, :end], queries, k.mT, alpha=D ** -0.5)
            weights = scores.softmax(-1)  # (B * H, QUERIES, end)
            if dropout:
                weights = weights * keep_mask(weights.shape, dropout, weights.dtype)
            rows.append(torch.bmm(weights, v))  # (B * H, QUERIES, D)
            k, v, end = k[:, :start], v[:, :start], start
    return torch.cat(rows[::-1], dim=1).view(B, H, T, D)


def gpu_attention(layer: CausalSelfAttention, x: torch.Tensor,
                  cache: torch.Tensor | None = None) -> torch.Tensor:
    """Computes `CausalSelfAttention.forward` on a CUDA GPU, by PyTorch's fused kernels.

    These want a multiple of 8 channels a head, so the weights get zeros up to that (38 channels
    become 40): zeros add nothing to a score, and `proj` ignores them.
    """
    B, T, _ = x.shape
    H, D, more = layer.n_head, layer.head_size, -layer.head_size % 8
    weight = F.pad(layer.qkv.weight.view(3 * H, D, -1), (0, 0, 0, more)).flatten(0, 1)
    qkv = F.linear(x, weight).view(B, T, 3, H, D + more).permute(2, 0, 3, 1, 4)
    q, k, v = qkv  # each (B, H, T, D + more)
    if cache is not None:
        cache[:, :, :, :T] = qkv[1:, ..., :D]
    dropout = layer.dropout if layer.training else 0.0
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=D ** -0.5)
    weight = F.pad(layer.proj.weight.view(-1, H, D), (0, more)).flatten(1)  # (C, H * (D + more))
    return F.linear(y.transpose(1, 2).flatten(2), weight, layer.proj.bias)


# ---- fast decoding -------------------------------------------------------------------------------
# Sampling asks for one token after the other, and all but the last were read before: `Decoder`
# keeps their keys and values. With that, a text grows 60 times as fast on one CPU core.


class Decoder:
    """Predicts one token after the other; keeps the keys and values of those it has read.

    caches: (n_layer, 2, B, H, block_size, D), keys and values, of which `length` positions are
    filled. A step is `GPT.forward` for one position, in as few operations as it takes: in a network
    this small, starting an operation takes as long as its arithmetic. On CUDA all of them are
    recorded once, as a graph, and started together. One float32 row on a CPU is read by NumPy.
    """

    def __init__(self, model: GPT, batch_size: int):
        self.model, config, B = model, model.config, batch_size
        self.numpy_read = self.replay = None
        weight = model.position_embedding.weight
        if B == 1 and weight.type() == "torch.FloatTensor" and type(model.head) is nn.Linear:
            self.numpy_read = numpy_reader(model)
            return
        self.caches = weight.new_empty(
            config.n_layer, 2, B, config.n_head, config.block_size, config.head_size)
        self.layers = [(block.ln_1.forward, fast_linear(block.attn.qkv, B),
                        fast_linear(block.attn.proj, B), block.ln_2.forward,
                        fast_linear(block.ffwd.up, B), fast_linear(block.ffwd.down, B), cache)
                       for block, cache in zip(model.blocks, self.caches)]
        self.ln, self.head = model.ln.forward, fast_linear(model.head, B)

    @torch.inference_mode()
    def prefill(self, idx: torch.Tensor) -> torch.Tensor:
        """Forgets all, reads idx, (B, T) int64, and returns the next logits, (B, V)."""
        self.tokens, self.length = list(idx.unbind(1)), idx.shape[1]
        if self.numpy_read:
            return self.numpy_read(idx[0], 0)
        with one_core_for_one_row(idx):
            return self.model.head(self.model.hidden(idx, self.caches)[:, -1])

    @torch.inference_mode()
    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Reads one more token of each row, (B,) int64, and returns the next logits, (B, V).

        A full window cannot slide: keys and values were made with the position of their token, and
        one place further left they would be others. So its recent half is read once more.
        """
        self.tokens.append(token)
        if self.length == self.model.config.block_size:
            return self.prefill(torch.stack(self.tokens[-max(1, self.length // 2):], dim=1))
        t, self.length = self.length, self.length + 1
        if self.numpy_read:
            return self.numpy_read(token, t)
        if token.device.type != "cuda":
            with one_core_for_one_row(token):
                return self.read(token, slice(t, t + 1), slice(t + 1))
        if self.replay is None:
            self.record(token, t)
        self.token.copy_(token)
        self.at.fill_(t)
        return self.replay().clone()

    def record(self, token: torch.Tensor, t: int) -> None:
        """Records a step as a CUDA graph, which reads `self.token` and, where it is, `self.at`."""
        self.token, self.at = token.clone(), token.new_full((1,), t)
        self.caches[..., t:, :] = 0  # positions to come are weighed by 0, but 0 * nan is nan

        def read():
            positions = torch.arange(self.caches.shape[4], device=token.device)
            future = torch.zeros(1, 1, len(positions), device=token.device)
            future = future.masked_fill(positions > self.at, float("-inf"))
            return self.read(self.token, self.at, slice(None), future)

        with torch.cuda.device(token.device), torch.autocast("cuda", enabled=False):
            self.replay = cuda_graph(read)

    def read(self, token: torch.Tensor, at: slice | torch.Tensor, seen: slice,
             future: torch.Tensor | None = None) -> torch.Tensor:
        """Reads token, (B,) int64, at position `at`, a slice or (1,) int64. Returns logits, (B, V).

        It sees the T positions in `seen` or, with `future`, (1, 1, T) float32, only those of them
        where that is 0, not -inf.
        """
        B, H, _, D = self.caches.shape[2:]
        x = F.embedding(token, self.model.token_embedding.weight)
        x = x + self.model.position_embedding.weight[at]  # (B, C)
        for ln_1, qkv, proj, ln_2, up, down, cache in self.layers:
            new = qkv(ln_1(x)).view(B, 3, H, 1, D).transpose(0, 1)  # (3, B, H, 1, D)
            cache[:, :, :, at] = new[1:]
            k, v = cache[:, :, :, seen]  # each (B, H, T, D)
            if future is None:
                y = F.scaled_dot_product_attention(new[0], k, v)  # (B, H, 1, D)
            else:  # on a GPU that function would start several times as many operations
                q, k, v = new[0].flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
                weights = torch.baddbmm(future, q, k.mT, alpha=D ** -0.5).softmax(-1)
                y = torch.bmm(weights, v)  # (B * H, 1, D)
            x = x + proj(y.reshape(B, H * D))
            x = x + down(up(ln_2(x)).relu_())
        return self.head(self.ln(x))


@contextmanager
def one_core_for_one_row(idx: torch.Tensor) -> Iterator[None]:
    """Leaves PyTorch one core for a single row: two are 4 % faster, but not beside a training."""
    threads = torch.get_num_threads()
    if len(idx) == 1 and idx.is_cpu:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def numpy_reader(model: GPT) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Returns a reader of one float32 stream: NumPy takes less time to start an operation.

    It reads idx, (T,) int64, from position `start` on, and returns the next logits, (1, V). Of a
    LayerNorm only the division is left: nothing here adds a mean to the residual stream, and gain
    and bias are put into the matrix that follows.
    """
    config = model.config
    C, H, D, eps = config.n_embd, config.n_head, config.head_size, model.ln.eps

    def folded(norm, layer):  # layer(norm(x)) == normed(x) @ weight + bias
        weight, bias = layer.weight.numpy(), 0 if layer.bias is None else layer.bias.numpy()
        return (weight * norm.weight.numpy()).T, weight @ norm.bias.numpy() + bias

    def centred(layer):  # the layer's outputs, less their mean
        weight, bias = layer.weight.numpy(), layer.bias.numpy()
        return (weight - weight.mean(0)).T, bias - bias.mean()

    def normed(x):  # (C,) or (T, C), with a mean of 0
        squares = x.dot(x) if x.ndim == 1 else (x * x).sum(1, keepdims=True)
        return x * (squares / C + eps) ** -0.5

    tokens = model.token_embedding.weight.numpy()
    positions = model.position_embedding.weight.numpy()
    head, head_bias = folded(model.ln, model.head)
    cache = np.empty((config.n_layer, 2, H, config.block_size, D), np.float32)
    layers = [(*folded(block.ln_1, block.attn.qkv), *centred(block.attn.proj),
               *folded(block.ln_2, block.ffwd.up), *centred(block.ffwd.down), kv)
              for block, kv in zip(model.blocks, cache)]

    @np.errstate(all="ignore")  # overflows are no news to PyTorch either
    def read(idx, start):
        T, end = len(idx), start + len(idx)
        x = tokens[idx.numpy()] + positions[start:end]  # (T, C)
        x -= x.mean(1, keepdims=True)
        x = x[0] if T == 1 else x  # a vector is faster than a matrix of one row
        gathered = *x.shape[:-1], H * D  # the shape of all heads' outputs side by side
        for qkv, qkv_bias, proj, proj_bias, up, up_bias, down, down_bias, kv in layers:
            new = (normed(x).dot(qkv) + qkv_bias).reshape(T, 3, H, D).transpose(1, 2, 0, 3)
            kv[:, :, start:end] = new[1:]
            q, (k, v) = new[0] * D ** -0.5, kv[:, :, :end]  # (H, T, D), and (H, end, D) each
            scores = q @ k.swapaxes(1, 2)  # (H, T, end)
            if T > 1:  # then `start` is 0
                scores += np.triu(np.full((T, T), -np.inf, np.float32), 1)
            weights = np.exp(scores - scores.max(2, keepdims=True))
            y = weights @ v / weights.sum(2, keepdims=True)  # (H, T, D)
            x += y.swapaxes(0, 1).reshape(gathered).dot(proj) + proj_bias
            x += np.maximum(normed(x).dot(up) + up_bias, 0).dot(down) + down_bias
        return torch.from_numpy(normed(x.reshape(T, C)[-1]).dot(head) + head_bias)[None]  # (1, V)
    return read


def fast_linear(layer: nn.Module, rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a function that computes a linear layer fast, (rows, in) -> (rows, out)."""
    if isinstance(layer, Int8Linear) or not layer.weight.is_cpu or rows > 16:
        return layer.forward
    # A product of few rows reads weights and does little else, so each thread gets a part of them,
    # to read from its own cache.
    parts, bias = math.gcd(layer.out_features, torch.get_num_threads()), layer.bias
    weight = layer.weight.view(parts, -1, layer.in_features).mT.contiguous()
    bias = weight.new_zeros(1) if bias is None else bias.view(parts, 1, -1)
    return lambda x: torch.baddbmm(
        bias, x.expand(parts, -1, -1), weight).transpose(0, 1).reshape(rows, -1)


def uniforms(rows: int, seed: int | None, device: torch.device) -> Iterator[torch.Tensor]:
    """Yields random numbers in [0, 1) for `rows` rows, (rows,) float32, without end.

    Each row has a generator of its own, made from seed and the row's number, so that its numbers do
    not depend on the other rows. Without a seed every call differs.
    """
    seed = secrets.randbits(32) if seed is None else seed
    # The factor keeps row 1 of one seed from being row 0 of the next.
    generators = [torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + row) % 2**63)
                  for row in range(rows)]
    while True:  # one draw for many steps saves a call for each row and step
        draws = torch.stack([torch.rand(256, generator=g) for g in generators], dim=1)
        yield from draws.to(device)


def cuda_graph(function: Callable[[], object]) -> Callable[[], object]:
    """Records all that `function` starts on the GPU, so that it can be started at once.

    Returns a function that repeats it on what the tensors it reads then hold; these must stay alive
    and be filled in place. What it returns or leaves elsewhere, gradients say, are the same tensors
    each time, overwritten. `function` is called twice: once for real, as libraries set themselves
    up in a first call (random numbers then start over), and once to be recorded. Where
    recording fails it says so and returns `function` itself.
    """
    stream = torch.cuda.Stream()  # its own: graphs recorded on one stream share a cuBLAS workspace
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.random.fork_rng([torch.cuda.current_device()]):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            result = function()
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        reason = str(error).split("\n")[0]
        print(f"note: no CUDA graphs here ({reason}): going on without, slower", file=sys.stderr)
        return function

    def replay():
        graph.replay()
        return result
    return replay


# ---- int8 ----------------------------------------------------------------------------------------
# A network quantized by quantize.py holds every matrix in int8: a quarter of the bytes, in the file
# and in memory. The validation loss of the one in this repository grows by 0.04 %.

LAST_WITH_INT8 = "the last version known to have it is 2.13; pip install torch==2.13.0"


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and a scale for each output channel, on the CPU only.

    It rounds its input, too, with one scale for all of it. weight: (out, in) int8; scale: (out,)
    float32; bias: (out,) float32 or None.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        torch.backends.quantized.engine = engine = int8_engine()
        # PyTorch's default: with inputs of 8 bits, sums overflow on x86 processors without VNNI.
        self.seven_bits = engine == "x86"
        zero_points = torch.zeros(len(scale), dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, but there up to PyTorch 2.13 at least
            weight = torch._make_per_channel_quantized_tensor(
                weight, scale.double(), zero_points, 0)
        self.packed = torch.ops.quantized.linear_prepack(weight, bias)  # in its kernel's layout
        self.memory_bytes = weight.numel() + 4 * len(scale) * (1 if bias is None else 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.quantized.linear_dynamic.default(x, self.packed, self.seven_bits)


def int8_engine() -> str:
    """Returns the int8 kernels for this processor: x86, or qnnpack on ARM. Raises ValueError."""
    supported = torch.backends.quantized.supported_engines
    there = [engine for engine in ("x86", "qnnpack") if engine in supported]
    if not there or not hasattr(torch, "_make_per_channel_quantized_tensor"):
        raise ValueError(f"PyTorch {torch.__version__} has no int8 kernels for this machine: "
                         f"{LAST_WITH_INT8}")
    return there[0]


def use_int8(model: GPT, weights: dict[str, torch.Tensor]) -> None:
    """Replaces the linear layers of `model` by int8 ones, which it takes out of `weights`.

    `NAME.weight` is int8, (rows, columns), for linear layers and embeddings, and `NAME.scale`,
    (rows,) float32, turns its rows back into floats. Raises ValueError for other shapes.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            weight, scale = weights.pop(f"{name}.weight"), weights.pop(f"{name}.scale")
            bias = weights.pop(f"{name}.bias", None)
            has_bias = getattr(module, "bias", None) is not None
            shapes = weight.shape, scale.shape, bias is not None
            if shapes != (module.weight.shape, weight.shape[:1], has_bias):
                raise ValueError(f"{name} has the wrong shape")
            if isinstance(module, nn.Linear):
                model.set_submodule(name, Int8Linear(weight, scale, bias))
            else:  # rows of an embedding are looked up, which floats serve best
                weights[f"{name}.weight"] = weight * scale[:, None]


# ---- checkpoints ---------------------------------------------------------------------------------
# A checkpoint comes from anywhere, and may be cut, damaged or made to do harm. It is read so that
# no code in it runs, no size it claims fills the memory, and what is wrong ends in one clear line.

PICKLED = re.compile(r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage")
MAX_PICKLE = 1 << 24      # bytes of a checkpoint's pickle, which may name only what is in PICKLED
MAX_CONTAINERS = 1 << 20  # lists and dicts in it


def check_config(config: GPTConfig) -> None:
    """Raises ValueError for values that no network can have."""
    for name in ("vocab_size", "block_size", "n_embd", "n_head", "n_layer"):
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    if config.n_head > config.n_embd:
        raise ValueError(f"n_head ({config.n_head}) must not exceed n_embd ({config.n_embd}): "
                         "each head needs a channel")
    for name in ("dropout", "attention_dropout"):
        value = getattr(config, name)
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise ValueError(f"{name} must be at least 0 and less than 1, not {value!r}")


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Writes a checkpoint: `path` holds the old file or the new one, whole. Raises OSError."""
    with atomic_write(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # on a full disk torch.save fails a second time, in ending
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def find_checkpoint(path: Path) -> Path:
    """Returns the path if there is a file. Raises ValueError, with the remedy, if not."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name it with --out_dir, or a checkpoint in it")
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}: train one with `python train.py`, or name one "
                         "with --checkpoint or --out_dir")
    return path


def load_checkpoint(path: Path) -> dict:
    """Reads a checkpoint: a dict of plain values and tensors, on the CPU; no code in it is run.

    Raises ValueError, with the remedy, for a file that is missing, damaged or something else.
    """
    path = find_checkpoint(path)
    damaged = (f"{path} is not a checkpoint of this program, or it is damaged: train again, "
               "or name another file")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # torch.load skips what lies before, looks at no checksum and would unpack a zip bomb.
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            if entries[0].header_offset or packed or archive.testzip():
                raise ValueError(damaged)
            for entry in entries:
                if entry.filename.lower().endswith(".pkl"):
                    check_pickle(archive.read(entry))
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        numbers = {type(value) for value in checkpoint.get("config").values()} <= {int, float}
        if not numbers or not isinstance(checkpoint.get("model"), dict):
            raise ValueError(damaged)
    except Exception as error:  # a damaged file can fail in a dozen ways
        if isinstance(error, OSError) and error.filename:  # the file cannot be read at all
            raise
        raise ValueError(damaged) from error
    return checkpoint


def check_pickle(data: bytes) -> None:
    """Raises ValueError for a pickle of more than values and tensors, or of too many of them."""
    containers = 0
    for instruction, value, _ in pickletools.genops(data):
        containers += instruction.name.startswith("EMPTY_")
        foreign = "GLOBAL" in instruction.name and not PICKLED.fullmatch(str(value))
        if foreign or len(data) > MAX_PICKLE or containers > MAX_CONTAINERS:
            raise ValueError("not what torch.save makes of a checkpoint")


class NoInit(torch.overrides.TorchFunctionMode):
    """While it is on, new modules draw no weights.

    On the meta device that would import much of PyTorch, for a second or two.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) != "torch.nn.init":
            return function(*args, **(kwargs or {}))


def load_model(path: Path, fingerprint: str | None = None,
               vocab_size: int | None = None) -> tuple[GPT, dict]:
    """Reads the network in a checkpoint, on the CPU and in eval mode, and the other entries.

    `fingerprint` and `vocab_size` are those of the tokenizer to be used with it. Raises ValueError
    if they do not belong together, if config and weights do not, or as `load_checkpoint` does.
    """
    checkpoint = load_checkpoint(path)
    if fingerprint is not None and checkpoint.get("tokenizer") != fingerprint:
        raise ValueError(f"{path} was trained with another tokenizer than the merges.pkl given: "
                         "use the folder it was trained in (--out_dir), or train again")
    int8 = checkpoint.get("int8", False)
    if int8 is True:
        int8_engine()  # says so if there is none
    weights = checkpoint.pop("model")
    try:
        config = GPTConfig(**checkpoint["config"])
        entries = type(checkpoint["iteration"]), type(checkpoint["val_loss"]), type(int8)
        if entries != (int, float, bool):
            raise ValueError("no word of its training")
        if vocab_size not in (None, config.vocab_size):
            raise ValueError("another vocabulary than the tokenizer's")
        # tied weights are one in the file
        sizes = {(weight.data_ptr(), weight.nbytes) for weight in weights.values()}
        size = sum(nbytes for _, nbytes in sizes)
        if config.n_layer > len(weights) or size > Path(path).stat().st_size:
            raise ValueError("more weights than the file holds")
        if not all(weight.dtype == torch.int8 or weight.dtype == torch.float32
                   and weight.isfinite().all() for weight in weights.values()):
            raise ValueError("weights that are not finite numbers")
        with torch.device("meta"), NoInit():  # allocates nothing, whatever size the config claims
            model = GPT(config)
        if int8:
            use_int8(model, weights)
        model.load_state_dict(weights, assign=True)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path}: its config and its weights do not make a network: train again, "
                         "or name another file") from error
    return model.eval(), checkpoint


# ---- data and evaluation -------------------------------------------------------------------------
# A text is one long row of tokens. A batch takes windows anywhere in it, an evaluation takes them
# side by side, so that each token counts once, but only some of a long text, or it would cost more
# than training.

EVAL_TOKENS = 2**18  # how many tokens of a split a loss is measured on at most


def split(tokens: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first nine tenths of the tokens, to train on, and the rest, to validate on.

    Raises ValueError if the rest is shorter than a window and the token after it.
    """
    n = int(0.9 * len(tokens))
    if len(tokens) - n <= block_size:
        raise ValueError(
            "the text is too short: its last tenth, kept for validation, has "
            f"{len(tokens) - n} tokens at most and must have more than block_size ({block_size}): "
            "use a longer text or a smaller --block_size")
    return tokens[:n], tokens[n:]


class MappedTokens:
    """Tokens in a file that is mapped into memory, which are read by indexing, as a tensor's are.

    So many of them need no memory, but each batch is gathered and moved to the device anew.
    """

    def __init__(self, ids: np.memmap, device: torch.device | str):
        """ids: (N,) of any unsigned type; `device` is where what is read shall be."""
        self.ids, self.device = np.asarray(ids), torch.device(device)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, places: torch.Tensor | slice) -> torch.Tensor:
        """Returns the tokens at places, int64 of any shape, or in a slice, as int32."""
        if isinstance(places, torch.Tensor):
            places = places.cpu().numpy()
        tokens = torch.from_numpy(self.ids[places].astype(np.int32))
        if self.device.type == "cuda":  # does not wait for the GPU to finish what it is at
            return tokens.pin_memory().to(self.device, non_blocking=True)
        return tokens.to(self.device)


def windows(data: torch.Tensor | MappedTokens, starts: torch.Tensor,
            block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the windows of data, (N,), that begin at starts, (B,), and their targets.

    The targets are the same windows one token later; both are (B, block_size) int64.
    """
    offsets = torch.arange(block_size + 1, device=starts.device)
    tokens = data[starts[:, None] + offsets].long()
    return tokens[:, :-1], tokens[:, 1:]


def tile_starts(data: torch.Tensor | MappedTokens, block_size: int,
                most: int | None = None) -> torch.Tensor:
    """Returns where the windows begin that lie side by side in data, (N,): (windows,) int64.

    Where there are more than `most`, it takes that many, evenly spread. A rest shorter than a
    window is left out.
    """
    tiles = (len(data) - 1) // block_size
    chosen = torch.linspace(0, tiles - 1, min(most or tiles, tiles), dtype=torch.float64)
    return chosen.long().to(data.device) * block_size


@torch.no_grad()
def mean_loss(model: GPT, data: torch.Tensor | MappedTokens, starts: torch.Tensor) -> float:
    """Returns the mean loss over windows of data, in nats per token, without dropout.

    data: (N,); starts, where the windows begin: (B,) int64.
    """
    training, T = model.training, model.config.block_size
    model.eval()
    total = torch.zeros((), device=data.device)
    # Few windows at once take less memory and are faster on a CPU: one, or 16 MB of logits at most.
    for part in starts.split(max(1, min(16, 2**22 // (T * model.config.vocab_size)))):
        total += model(*windows(data, part, T))[1] * len(part)
    model.train(training)
    return total.item() / len(starts)


# ---- devices -------------------------------------------------------------------------------------
# Scripts run on the fastest device there is, or on the one that --device names. One that is not
# there is refused in one line, with what there is; so is a PyTorch before 2.9.

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
    sys.exit(f"PyTorch {torch.__version__} is too old: pip install -r requirements.txt")


def limit_threads() -> None:
    """Takes no more threads than this process may use cores, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))


def works(gpu: str) -> bool:
    """Returns whether PyTorch can compute on a GPU: not if it was built without kernels for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # several lines about the same
        try:
            torch.ones(1, device=gpu).add_(1).item()
        except RuntimeError as error:
            if out_of_memory(error):  # it is there, but full
                return True
            name = torch.cuda.get_device_name(gpu)
            print(f"note: PyTorch {torch.__version__} cannot use {name}: not using it",
                  file=sys.stderr)
            return False
    return True


def choose_device(name: str, own: int = 0) -> torch.device:
    """Returns the device so named, for `auto` the fastest. Raises ValueError if it is missing.

    `own` is the number of the GPU that `auto` and `cuda` stand for. No other is touched, as each
    process that computes on a GPU, be it a single sum, takes some hundred megabytes of it.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [f"cuda:{number}" for number in range(gpus)]
    others = ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name == "auto":
        name = next(device for device in gpus[own:] + others if device in others or works(device))
    chosen = f"cuda:{own}" if name == "cuda" else name  # set_device wants a number
    if chosen not in others and not (chosen in gpus and works(chosen)):
        there = ", ".join(device for device in gpus + others if device != chosen)
        raise ValueError(f"--device {name}: not on this machine, which has {there}")
    return torch.device(chosen)
