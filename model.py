"""The network: a decoder-only Transformer (GPT), its key/value cache and its checkpoints.

    model = GPT(GPTConfig())                        # 3,514,836 parameters
    logits, loss = model(idx, targets)              # idx, targets: (B, T) int64
    ids = model.generate(idx, max_new_tokens=100)   # (B, T + 100)

To learn how a GPT works, read down to `GPT.generate`; what follows makes it fast and keeps it safe. tests/textbook_gpt.py has the same
network written plainly.

Shapes: B sequences, T tokens each, C = n_embd channels, H heads of D = n_embd // n_head channels, V = vocab_size.
"""
import importlib.util
import math
import pickletools
import re
import secrets
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from tokenizer import atomic_write

LAST_WITH_INT8 = "the last version known to have it is 2.13; pip install torch==2.13.0"
PICKLED = re.compile(r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage")  # all that a checkpoint's pickle names
MAX_PICKLE, MAX_CONTAINERS = 1 << 24, 1 << 20  # bytes of that pickle, lists and dicts in it: a crafted one must not fill the memory
EVAL_TOKENS = 2**18  # of a split that its loss is measured on at most: a long text must not make evaluating cost more than training
CPU_TOKENS = 1024  # that a core of a CPU trains on at once: they take little memory, and no more time than if they were more
this_thread = threading.local()  # its `generator` is what `keep_mask` draws from there; without one, it is PyTorch's own


@dataclass
class GPTConfig:
    """The hyperparameters that fix the network's shape. Raises ValueError for values no network can have."""
    vocab_size: int = 500
    block_size: int = 256   # the longest context, in tokens
    n_embd: int = 232
    n_head: int = 6
    n_layer: int = 5
    dropout: float = 0.2            # after attention and after feed-forward
    attention_dropout: float = 0.2  # on the attention weights

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_embd", "n_head", "n_layer"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.n_head > self.n_embd:
            raise ValueError(f"n_head ({self.n_head}) must not exceed n_embd ({self.n_embd}): each head needs a channel")
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, not {value!r}")

    @property
    def head_size(self) -> int:
        """Channels of a head. Where n_head does not divide n_embd the heads together are a little narrower."""
        return self.n_embd // self.n_head


class Dropout(nn.Dropout):
    """Dropout (Srivastava et al. 2014); on a CPU the mask is that of `keep_mask`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or not self.training or self.p == 0:
            return super().forward(x)
        return (x * keep_mask(x.shape, self.p, x.dtype)).mul_(1 / (1 - self.p))


class CausalSelfAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) in which a token sees itself and the tokens before it.

    In each head it is softmax(q @ k^T / sqrt(D) + future) @ v. Scores are sums of D products: undivided, they would grow with D, until
    softmax chose one token alone. `future`, (T, T), is -inf where the key comes after the query, so that its weight is 0, and 0 elsewhere.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.head_size = config.n_head, config.head_size
        width = config.n_head * config.head_size
        self.qkv = nn.Linear(config.n_embd, 3 * width, bias=False)  # query, key and value of all heads in one product
        self.proj = nn.Linear(width, config.n_embd)
        self.dropout = config.attention_dropout

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None) -> torch.Tensor:
        if x.device.type != "cpu":
            return self.forward_fused(x, cache)
        B, T, _ = x.shape
        q, k, v = qkv = self.qkv(x).view(B, T, 3, self.n_head, self.head_size).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if cache is not None:  # of a Decoder, which will need keys and values
            cache[:, :, :, :T] = qkv[1:]
        with torch.autocast("cpu", enabled=False):  # the operands are in the format wanted, and softmax computes in float32 inside
            y = attend(q, k, v, self.dropout if self.training else 0.0)  # (B, H, T, D)
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, H * D) -> (B, T, C)

    def forward_fused(self, x: torch.Tensor, cache: torch.Tensor | None) -> torch.Tensor:
        """`forward` on a GPU, whose fused kernels want a multiple of 8 channels a head.

        The weights are padded with zeros up to that (38 channels become 40): zeros add nothing to a score, and `proj` ignores them.
        """
        B, T, _ = x.shape
        H, D, more = self.n_head, self.head_size, -self.head_size % 8
        weight = F.pad(self.qkv.weight.view(3 * H, D, -1), (0, 0, 0, more)).flatten(0, 1)  # (3 * H * (D + more), C)
        q, k, v = qkv = F.linear(x, weight).view(B, T, 3, H, D + more).permute(2, 0, 3, 1, 4)  # each (B, H, T, D + more)
        if cache is not None:
            cache[:, :, :, :T] = qkv[1:, ..., :D]
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True, scale=D ** -0.5)
        weight = F.pad(self.proj.weight.view(-1, H, D), (0, more)).flatten(1)  # (C, H * (D + more))
        return F.linear(y.transpose(1, 2).flatten(2), weight, self.proj.bias)


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them, four times as wide inside."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # flattened to (B * T, C), as a ReLU in place costs a copy where the layer before returns a view
        return self.down(self.relu(self.up(x.flatten(0, 1)))).view_as(x)


class Block(nn.Module):
    """Attention, then feed-forward; each normalises its input and adds its output to the residual stream (pre-norm).

    As both only add, gradients have a straight way back through all blocks (He et al. 2016).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.ffwd = FeedForward(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.dropout(self.attn(self.ln_1(x), cache))
        return x + self.dropout(self.ffwd(self.ln_2(x)))


class GPT(nn.Module):
    """The network: embeddings, n_layer blocks, a last norm and an output head.

    It is that of GPT-2 (Radford et al. 2019), but with ReLU, no bias in query, key and value, no dropout on the embeddings, an untied head.
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
        """Draws the matrices from a normal distribution (Radford et al. 2019) in place of PyTorch's default; biases become 0.

        Those that write into the residual stream start smaller, as 2 * n_layer of them add up there.
        """
        for name, p in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):
                nn.init.normal_(p, std=std / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Predicts the token after each token of idx, (B, T) int64 with T <= block_size.

        Returns the logits (B, T, V) and, where targets are given, their mean cross-entropy in nats per token. Targets are the tokens
        that come next, (B, T) int64, or a probability for each token, (B, T, V) float32. The temperature divides the logits in the loss.
        Raises ValueError if T exceeds block_size.
        """
        logits = self.head(self.hidden(idx))  # (B, T, C) -> (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float() / temperature, targets.flatten(0, 1))

    def hidden(self, idx: torch.Tensor, caches: torch.Tensor | None = None) -> torch.Tensor:
        """The normalised residual stream after the last block. idx: (B, T) int64 -> (B, T, C).

        Each layer leaves its keys and values in its part of `caches`, which `Decoder` describes.
        """
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into block_size {self.config.block_size}")
        x = self.token_embedding(idx) + self.position_embedding.weight[:T]  # (B, T, C); attention itself does not see the order of tokens
        for layer, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[layer])
        return self.ln(x)

    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, seed: int | None = None) -> torch.Tensor:
        """Continues idx, (B, T) int64 with T >= 1, by sampling. Returns (B, T + max_new_tokens) int64, the prompt in front.

        The arguments are those of `stream`.
        """
        new = self.stream(idx, max_new_tokens, temperature, top_k, top_p, seed)
        return torch.cat([idx, *(token[:, None] for token in new)], dim=1)

    @torch.inference_mode()
    def stream(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
               top_p: float | None = None, seed: int | None = None) -> Iterator[torch.Tensor]:
        """Yields max_new_tokens times the next token of each row, (B,) int64, as soon as it is sampled.

        temperature divides the logits (0 always takes the likeliest token); top_k keeps the k likeliest tokens, top_p the
        likeliest whose probabilities reach p together (Holtzman et al. 2020). Each row has a random stream of its own,
        made from seed and the row's number, so that, up to rounding, it does not depend on how many rows there are (but for an int8
        network, whose inputs are rounded by a scale that all rows share); without a seed every call differs. Only the last block_size
        tokens of idx count.
        Raises ValueError if idx holds none.
        """
        if idx.shape[1] == 0:
            raise ValueError("nothing to continue: idx must hold at least one token a row")
        seed = secrets.randbits(32) if seed is None else seed
        # the factor keeps row 1 of one seed from being row 0 of the next
        generators = [torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + row) % 2**63) for row in range(len(idx))]
        training, block_size = self.training, self.config.block_size
        self.eval()
        try:
            decoder, window, new = Decoder(self, len(idx)), idx[:, -block_size:], []
            logits = decoder.prefill(window)
            for step in range(max_new_tokens):
                if step % 256 == 0:  # one draw for many steps saves a call for each row and step
                    uniform = torch.stack([torch.rand(256, generator=g) for g in generators], dim=1).to(idx.device)
                token = sample(logits, uniform[step % 256], temperature, top_k, top_p)  # (B, V) -> (B,)
                yield token
                if step + 1 == max_new_tokens:
                    return
                new.append(token)
                if decoder.length < block_size:
                    logits = decoder.step(token)
                else:
                    # A full window cannot slide: a key or value was made with its token's position added, and one place further left
                    # it would be another, as positions are learned. So the recent half is read once more, from the start of the window.
                    window, new = torch.cat([window, torch.stack(new, dim=1)], dim=1)[:, -max(1, block_size // 2):], []
                    logits = decoder.prefill(window)
        finally:
            self.train(training)


def keep_mask(shape: torch.Size, p: float, dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the CPU of ones, with probability 1 - p (to within 2^-16), and zeros.

    Each 64-bit random integer is read as four 16-bit coins: several times as fast as drawing one float a coin,
    which would take a good part of a training step on a CPU.
    """
    n = shape.numel()
    generator = getattr(this_thread, "generator", None)
    coins = torch.empty((n + 3) // 4, dtype=torch.int64).random_(-2**63, None, generator=generator).view(torch.int16)[:n].view(shape)
    kept = coins.ge_(min(round(p * 2**16) - 2**15, 2**15 - 1))  # in place, as 0 and 1: a bool would be converted at each use
    return kept.mul_(0x3F80).view(dtype) if dtype == torch.bfloat16 else kept.to(dtype)  # 0x3F80: the bits of 1.0 in bfloat16


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    """Causal attention on a CPU, whose fused kernel knows no dropout and has a slow backward pass. q, k, v: (B, H, T, D) -> (B, H, T, D).

    Takes 64 queries at a time, so that keys that lie in the future of all 64 are never looked at, and begins with the last: the keys and
    values of each 64 are then a slice of the slice before, and gradients, which become as long as what was sliced, stay short.
    `dropout` is the probability with which each weight is dropped.
    """
    B, H, T, D = q.shape
    v = v * (1 / (1 - dropout))  # in place of scaling the weights, of which there are more
    q, k, v = (t.reshape(B * H, T, D) for t in (q, k, v))
    future = torch.full((T, T), float("-inf"), dtype=v.dtype).triu(1)
    rows, end = [], T
    for queries in reversed(q.split(64, dim=1)):
        start = end - queries.shape[1]
        weights = torch.baddbmm(future[start:end, :end], queries, k.mT, alpha=D ** -0.5).softmax(-1)
        if dropout:
            weights = weights * keep_mask(weights.shape, dropout, weights.dtype)
        rows.append(torch.bmm(weights, v))  # (B * H, 64, D)
        k, v, end = k[:, :start], v[:, :start], start
    return torch.cat(rows[::-1], dim=1).view(B, H, T, D)


class Decoder:
    """Predicts one token after the other, keeping the keys and values of those before in buffers allocated once.

    caches: (n_layer, 2, B, H, block_size, D), the keys and the values, of which `length` positions are filled.
    A step is `GPT.forward` for one position, in as few operations as it takes: in a network this small, starting an operation
    takes as long as its arithmetic. On CUDA all of them are recorded once, as a graph, and started together.
    """

    def __init__(self, model: GPT, batch_size: int):
        self.model, config, self.length = model, model.config, 0
        weight = model.position_embedding.weight
        self.caches = weight.new_empty(config.n_layer, 2, batch_size, config.n_head, config.block_size, config.head_size)
        self.layers = [(norm(block.ln_1), few_rows(block.attn.qkv, batch_size), few_rows(block.attn.proj, batch_size),
                        norm(block.ln_2), few_rows(block.ffwd.up, batch_size), few_rows(block.ffwd.down, batch_size), cache)
                       for block, cache in zip(model.blocks, self.caches)]
        self.ln, self.head = norm(model.ln), few_rows(model.head, batch_size)
        self.replay = None

    @torch.inference_mode()
    def prefill(self, idx: torch.Tensor) -> torch.Tensor:
        """Forgets all, reads idx (B, T) int64 in one pass, and returns the logits of the token after it, (B, V)."""
        self.length = idx.shape[1]
        return self.model.head(self.model.hidden(idx, self.caches)[:, -1])

    @torch.inference_mode()
    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Reads one more token of each row, (B,) int64, and returns the logits of the one after it, (B, V)."""
        t, self.length = self.length, self.length + 1
        if token.device.type != "cuda":
            return self.read(token, slice(t, t + 1), slice(t + 1))
        if self.replay is None:
            self.token, self.at = token.clone(), token.new_full((1,), t)  # what the graph reads
            self.caches[..., t:, :] = 0  # it looks at all positions: those to come have a weight of 0, but 0 * nan is nan

            def read():
                positions = torch.arange(self.caches.shape[4], device=token.device)
                future = torch.zeros(1, 1, len(positions), device=token.device).masked_fill(positions > self.at, float("-inf"))
                return self.read(self.token, self.at, slice(None), future)

            with torch.cuda.device(token.device), torch.autocast("cuda", enabled=False):
                self.replay = record(read)
        self.token.copy_(token)
        self.at.fill_(t)
        return self.replay().clone()

    def read(self, token: torch.Tensor, at: slice | torch.Tensor, seen: slice, future: torch.Tensor | None = None) -> torch.Tensor:
        """Reads token (B,) int64 at position `at`, a slice or (1,) int64, and returns the logits of the one after it, (B, V).

        It sees the T positions in `seen` or, with `future`, (1, 1, T) float32, only those of them where that is 0, not -inf.
        """
        B, H, _, D = self.caches.shape[2:]
        x = F.embedding(token, self.model.token_embedding.weight) + self.model.position_embedding.weight[at]  # (B, C)
        for ln_1, qkv, proj, ln_2, up, down, cache in self.layers:
            new = qkv(ln_1(x)).view(B, 3, H, 1, D).transpose(0, 1)  # (3, B, H, 1, D)
            cache[:, :, :, at] = new[1:]
            k, v = cache[:, :, :, seen]  # each (B, H, T, D)
            if future is None:
                y = F.scaled_dot_product_attention(new[0], k, v)  # (B, H, 1, D)
            else:  # on a GPU that function would start several times as many operations
                weights = torch.baddbmm(future, new[0].flatten(0, 1), k.flatten(0, 1).mT, alpha=D ** -0.5).softmax(-1)  # (B * H, 1, T)
                y = torch.bmm(weights, v.flatten(0, 1))
            x = x + proj(y.reshape(B, H * D))
            x = x + down(up(ln_2(x)).relu_())
        return self.head(self.ln(x))


def record(function: Callable[[], object]) -> Callable[[], object]:
    """Records all that `function` starts on the GPU, as a CUDA graph, so that starting it again costs next to nothing.

    Returns a function that repeats it on whatever the tensors it reads then hold; these must stay alive, and be filled in place. What it
    returns, or leaves elsewhere, as gradients, are always the same tensors, overwritten. `function` is called twice: once for real, as
    libraries set themselves up in a first call (the random numbers drawn in it are drawn again later), and once to be recorded.
    """
    stream = torch.cuda.Stream()  # of its own: graphs recorded on one stream share its cuBLAS workspace
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.random.fork_rng([torch.cuda.current_device()]):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = function()

    def replay():
        graph.replay()
        return result
    return replay


class Workers:
    """Threads that share out the parts of a batch among the cores of a CPU.

    A core with a part of its own does not wait for others, as it would in each operation that all cores do together.
    """

    def __init__(self, parts: int):
        """As many threads as there are cores, or parts, if these are fewer. Where there are twice as many cores, several share a part."""
        cores = torch.get_num_threads()
        self.number = min(cores, parts)

        def start():
            torch.get_num_threads()  # or the first operation would set what is set here to what some other thread set
            torch.set_num_threads(cores // self.number)

        self.pool = ThreadPoolExecutor(self.number, initializer=start)

    def gradients(self, loss: Callable[..., torch.Tensor], parts: list[tuple], weights: list[nn.Parameter],
                  scale: torch.Tensor) -> torch.Tensor:
        """Leaves in the weights the gradient of scale, (), times the sum of loss(*part) over all parts. Returns that sum, unscaled, ()."""

        def compute(part, seed):
            this_thread.generator = torch.Generator().manual_seed(seed)
            try:
                value = loss(*part)
            finally:
                this_thread.generator = None
            return value.detach(), torch.autograd.grad(value, weights, scale)

        # With a seed for each part, and sums in their order, the result does not depend on which thread was first, nor on how many there are.
        total, cores = torch.zeros(()), torch.get_num_threads()
        seeds = torch.randint(2**63 - 1, (len(parts),)).tolist()
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        if self.number > 1:
            torch.set_num_threads(1)  # for the sums of this thread, as all cores are busy
        try:
            for value, gradients in (self.pool.map if self.number > 1 else map)(compute, parts, seeds):
                total += value
                for weight, gradient in zip(weights, gradients):
                    weight.grad += gradient
        finally:
            torch.set_num_threads(cores)
        return total


def norm(layer: nn.LayerNorm) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function a LayerNorm is, without what calling a module costs."""
    shape, weight, bias = layer.normalized_shape, layer.weight, layer.bias
    return lambda x: torch.layer_norm(x, shape, weight, bias)


def few_rows(layer: nn.Module, rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that does what a linear layer does, for an input of so many rows, (rows, in) -> (rows, out)."""
    if isinstance(layer, Int8Linear):
        product, packed, seven_bits = torch.ops.quantized.linear_dynamic.default, layer.packed, layer.seven_bits
        return lambda x: product(x, packed, seven_bits)
    out, bias = layer.out_features, layer.bias if layer.bias is not None else layer.weight.new_zeros(layer.out_features)
    if layer.weight.device.type != "cpu" or rows > 16:
        weight = layer.weight.t()
        return lambda x: torch.addmm(bias, x, weight)
    # a product of one row reads weights and does little else, so each thread gets a part of them, to read from its own cache
    parts = math.gcd(out, torch.get_num_threads())
    weight = layer.weight.view(parts, out // parts, -1).mT.contiguous()  # (parts, in, out / parts)
    bias = bias.view(parts, 1, -1)
    if rows == 1:
        return lambda x: torch.baddbmm(bias, x.expand(parts, 1, -1), weight).view(1, out)
    return lambda x: torch.baddbmm(bias, x.expand(parts, -1, -1), weight).transpose(0, 1).reshape(rows, out)


def sample(logits: torch.Tensor, uniform: torch.Tensor, temperature: float = 1.0, top_k: int | None = None,
           top_p: float | None = None) -> torch.Tensor:
    """Draws for each row the first token whose cumulative probability exceeds `uniform`. logits: (B, V); uniform: (B,) in [0, 1) -> (B,) int64."""
    if temperature < 1e-20:  # or the quotient could be too large for float32
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        likeliest, order = probs.sort(descending=True)
        beyond = likeliest.cumsum(-1) - likeliest >= max(top_p, 1e-30)  # those before it reach p already
        probs = probs.scatter(1, order, likeliest.masked_fill(beyond, 0.0))
    cdf = probs.cumsum(-1)
    # the factor keeps the product below cdf[:, -1] in float32, so that no token of probability 0 is drawn
    return (cdf <= uniform[:, None] * cdf[:, -1:] * (1 - 2**-22)).sum(-1)


def split(tokens: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The first nine tenths of the tokens, to train on, and the rest, to validate on.

    Raises ValueError if the rest is shorter than a window and the token after it.
    """
    n = int(0.9 * len(tokens))
    if len(tokens) - n <= block_size:
        raise ValueError(f"the text is too short: its last tenth, kept for validation, has {len(tokens) - n} tokens at most and must "
                         f"have more than block_size ({block_size}): use a longer text or a smaller --block_size")
    return tokens[:n], tokens[n:]


def windows(data: torch.Tensor, starts: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows of `data` (N,) that begin at `starts` (B,), and the same one token later, the targets: two (B, T) int64."""
    tokens = data[starts[:, None] + torch.arange(block_size + 1, device=data.device)].long()
    return tokens[:, :-1], tokens[:, 1:]


def side_by_side(data: torch.Tensor, block_size: int, most: int | None = None) -> torch.Tensor:
    """Where the windows that tile `data` (N,) begin or, if there are more than `most`, so many of these, evenly spread.

    Returns (windows,) int64 on data's device. A rest at the end that is shorter than a window is left out.
    """
    tiles = (len(data) - 1) // block_size
    return torch.linspace(0, tiles - 1, min(most or tiles, tiles), dtype=torch.float64).long().to(data.device) * block_size


@torch.no_grad()
def mean_loss(model: GPT, data: torch.Tensor, starts: torch.Tensor) -> float:
    """Loss over the windows of `data` (N,) that begin at `starts` (B,), in nats per token, without dropout."""
    training = model.training
    model.eval()
    total = torch.zeros((), device=data.device)
    few = max(1, min(16, 2**22 // (model.config.block_size * model.config.vocab_size)))  # whose logits take 16 MB at most
    for part in starts.split(few):  # takes less memory than all at once, and is faster on a CPU
        total += model(*windows(data, part, model.config.block_size))[1] * len(part)
    model.train(training)
    return total.item() / len(starts)


def choose_device(name: str) -> torch.device:
    """The device asked for, or the fastest there is for `auto`. Raises ValueError if it is not there."""
    there = [f"cuda:{number}" for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    there += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    chosen = {"auto": there[0], "cuda": "cuda:0"}.get(name, name)  # with its number, which set_device wants
    if chosen not in there:
        raise ValueError(f"--device {name}: not on this machine, which has {', '.join(there)}")
    return torch.device(chosen)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format asked for; `auto` is bfloat16 where the hardware has it, else float16 on a CUDA GPU and float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.bfloat16 if getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)() else torch.float32
    if device.type != "cuda":
        return torch.float32
    # torch.cuda.is_bf16_supported() says yes on a T4, too, which emulates it slowly
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile is there and gains something: on a GPU that Triton knows."""
    return (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
            and importlib.util.find_spec("triton") is not None)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one it came from, says that there is not enough memory, of a GPU or of the machine; PyTorch says so in several ways."""
    told = "out of memory", "enough memory", "allocate memory", "calculation overflowed", "Invalid buffer size"
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(words in str(error) for words in told):
        return True
    return error is not None and out_of_memory(error.__context__)  # ending the recording of a CUDA graph raises another error


class Int8Linear(nn.Module):
    """nn.Linear with int8 weights, one scale for each output channel; it quantizes its input, too, with one scale, at each call.

    weight: (out, in) int8; scale: (out,) float32; bias: (out,) float32 or None. Runs on the CPU only.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        torch.backends.quantized.engine = engine = int8_engine()
        self.seven_bits = engine == "x86"  # of the input, as PyTorch does: on processors without VNNI sums of eight would overflow
        zero_points = torch.zeros(len(scale), dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantized tensors are marked deprecated; they work up to PyTorch 2.13 at least
            weight = torch._make_per_channel_quantized_tensor(weight, scale.double(), zero_points, 0)
        self.packed = torch.ops.quantized.linear_prepack(weight, bias)  # the layout its kernel wants
        self.memory_bytes = weight.numel() + 4 * len(scale) * (1 if bias is None else 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.quantized.linear_dynamic.default(x, self.packed, self.seven_bits)


def int8_engine() -> str:
    """The int8 kernels of this machine's processor: x86, or qnnpack on ARM. Raises ValueError if PyTorch has neither."""
    there = [engine for engine in ("x86", "qnnpack") if engine in torch.backends.quantized.supported_engines]
    if not there or not hasattr(torch, "_make_per_channel_quantized_tensor"):
        raise ValueError(f"PyTorch {torch.__version__} has no int8 kernels for this machine: {LAST_WITH_INT8}")
    return there[0]


def quantize_dynamic(model: GPT) -> dict[str, torch.Tensor]:
    """The weights of a network on the CPU with every matrix in int8: what an int8 checkpoint holds as `model`.

    `NAME.weight` is int8 for linear layers and embeddings, and `NAME.scale` (rows,) float32 turns its rows back into floats.
    Raises ValueError where PyTorch has no dynamic quantization any more.
    """
    torch.backends.quantized.engine = int8_engine()
    try:
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic as torch_quantize
    except ImportError as error:
        raise ValueError(f"PyTorch {torch.__version__} has no torch.ao.quantization: {LAST_WITH_INT8}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # marked deprecated
        quantized = torch_quantize(model, {nn.Linear: per_channel_dynamic_qconfig})
    weights = model.state_dict()
    for name, module in quantized.named_modules():
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            weight = module.weight()  # (out, in) of PyTorch's own quantized type
            weights[f"{name}.weight"], weights[f"{name}.scale"] = weight.int_repr(), weight.q_per_channel_scales().float()
        elif isinstance(module, nn.Embedding):
            weight = module.weight.detach()
            scale = (weight.abs().amax(1) / 127).clamp(min=1e-30)  # or a row of zeros would divide by 0
            weights[f"{name}.weight"], weights[f"{name}.scale"] = (weight / scale[:, None]).round().to(torch.int8), scale
    return weights


def use_int8(model: GPT, weights: dict[str, torch.Tensor]) -> None:
    """Replaces the linear layers of `model` by int8 ones, taking out of `weights` what `quantize_dynamic` put there."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            weight, scale, bias = weights.pop(f"{name}.weight"), weights.pop(f"{name}.scale"), weights.pop(f"{name}.bias", None)
            has_bias = getattr(module, "bias", None) is not None
            if weight.shape != module.weight.shape or scale.shape != weight.shape[:1] or has_bias != (bias is not None):
                raise ValueError(f"{name} has the wrong shape")
            if isinstance(module, nn.Linear):
                model.set_submodule(name, Int8Linear(weight, scale, bias))
            else:  # looked up, not multiplied: floats serve it best in memory
                weights[f"{name}.weight"] = weight * scale[:, None]


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Writes a checkpoint so that `path` holds the old file or the new one, whole, whatever happens. Raises OSError."""
    with atomic_write(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch.save ends its archive even where the disk is full, and complains of that instead
            raise error.__context__ if isinstance(error.__context__, OSError) else error


def find_checkpoint(path: Path) -> Path:
    """The path, if there is a file. Raises ValueError, with the remedy, if not."""
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {path}: train one with `python train.py`, or name one with --checkpoint or --out_dir")
    return Path(path)


def load_checkpoint(path: Path) -> dict:
    """Reads a checkpoint: a dict of plain values and tensors, on the CPU; no code in it is run.

    Raises ValueError, with the remedy, for a file that is missing, damaged or something else.
    """
    path = find_checkpoint(path)
    damaged = f"{path} is not a checkpoint of this program, or it is damaged: train again, or name another file"
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load does not look at the checksums that torch.save writes, and it would unpack a zip bomb
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()) or archive.testzip():
                raise ValueError(damaged)
            for entry in archive.infolist():
                if entry.filename.lower().endswith(".pkl"):
                    check_pickle(archive.read(entry))
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in a dozen ways
        if isinstance(error, OSError) and error.filename:  # the file cannot be read at all
            raise
        raise ValueError(damaged) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("config"), dict) or not isinstance(checkpoint.get("model"), dict):
        raise ValueError(damaged)
    if not {type(value) for value in checkpoint["config"].values()} <= {int, float}:
        raise ValueError(damaged)
    return checkpoint


def check_pickle(data: bytes) -> None:
    """Raises ValueError for a pickle that holds more than plain values and tensors, or from which `torch.load` would make gigabytes."""
    containers = 0
    for instruction, value, _ in pickletools.genops(data):
        containers += instruction.name.startswith("EMPTY_")
        if "GLOBAL" in instruction.name and not PICKLED.fullmatch(str(value)) or len(data) > MAX_PICKLE or containers > MAX_CONTAINERS:
            raise ValueError("not what torch.save makes of a checkpoint")


class NoInit(torch.overrides.TorchFunctionMode):
    """While it is on, new modules draw no weights: on the meta device that would import much of PyTorch, for a second or two."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) != "torch.nn.init":
            return function(*args, **(kwargs or {}))


def load_model(path: Path, fingerprint: str | None = None, vocab_size: int | None = None) -> tuple[GPT, dict]:
    """Reads the network in a checkpoint. Returns it, on the CPU and in eval mode, and the checkpoint's other entries.

    `fingerprint` and `vocab_size` are those of the tokenizer to be used with it. Raises ValueError if they do not belong together, if the
    file's config and weights do not fit each other, or as `load_checkpoint` does.
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
        if (type(checkpoint["iteration"]), type(checkpoint["val_loss"]), type(int8)) != (int, float, bool):
            raise ValueError("no word of its training")
        if vocab_size not in (None, config.vocab_size):
            raise ValueError("another vocabulary than the tokenizer's")
        if config.n_layer > len(weights) or sum(w.nbytes for w in weights.values()) > Path(path).stat().st_size:
            raise ValueError("more weights than the file holds")
        if not all(w.dtype == torch.int8 or w.dtype == torch.float32 and w.isfinite().all() for w in weights.values()):
            raise ValueError("weights that are not finite numbers")
        with torch.device("meta"), NoInit():  # allocates nothing, so that a config cannot ask for more than the file holds
            model = GPT(config)
        if int8:
            use_int8(model, weights)
        model.load_state_dict(weights, assign=True)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path}: its config and its weights do not make a network: train again, or name another file") from error
    return model.eval(), checkpoint
