"""
The network: a decoder-only Transformer (GPT), its key/value cache and its checkpoints.

    model = GPT(GPTConfig())                        # 3,514,836 parameters
    logits, loss = model(idx, targets)              # idx, targets: (B, T) int64
    ids = model.generate(idx, max_new_tokens=100)   # (B, T + 100)

Shapes: B sequences, T tokens each, C = n_embd channels, H heads of D = n_embd // n_head channels, V = vocab_size.
"""
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from tokenizer import atomic_write


@dataclass
class GPTConfig:
    """The hyperparameters that fix the network's shape. Raises ValueError for values no network can have."""
    vocab_size: int = 500
    block_size: int = 256   # the longest context, in tokens
    n_embd: int = 232
    n_head: int = 6
    n_layer: int = 5
    dropout: float = 0.2

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_embd", "n_head", "n_layer"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.n_head > self.n_embd:
            raise ValueError(f"n_head ({self.n_head}) must not exceed n_embd ({self.n_embd}): each head needs a channel")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, not {self.dropout!r}")

    @property
    def head_size(self) -> int:
        """Channels of a head. Where n_head does not divide n_embd the heads together are a little narrower."""
        return self.n_embd // self.n_head


def keep_mask(shape: torch.Size, p: float) -> torch.Tensor:
    """A bool tensor on the CPU, True with probability 1 - p (to within 2^-17).

    Each 64-bit random integer is read as four 16-bit coins: ten times as fast as drawing one float a coin,
    and drawing these masks is what most of a training step on a CPU would otherwise go to.
    """
    n = shape.numel()
    coins = torch.empty((n + 3) // 4, dtype=torch.int64).random_(-2**63, None).view(torch.int16)[:n].view(shape)
    return coins >= round(p * 2**16) - 2**15


class Dropout(nn.Dropout):
    """Dropout (Srivastava et al. 2014), drawing its masks in bulk on the CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or not self.training or self.p == 0:
            return super().forward(x)
        return (x * keep_mask(x.shape, self.p)).mul_(1 / (1 - self.p))


class CausalSelfAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) in which a token sees itself and the tokens before it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.head_size = config.n_head, config.head_size
        width = config.n_head * config.head_size
        self.qkv = nn.Linear(config.n_embd, 3 * width, bias=False)  # query, key and value of all heads in one product
        self.proj = nn.Linear(width, config.n_embd)
        self.dropout = config.dropout

    def forward(self, x: torch.Tensor, cache: "LayerCache | None" = None) -> torch.Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, self.head_size).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, tokens so far, D)
        y = attend(q, k, v, self.dropout if self.training else 0.0)  # (B, H, T, D)
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, H * D) -> (B, T, C)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    """Causal scaled dot-product attention. q: (B, H, T, D); k, v: (B, H, S, D), S = T or, for one query, S >= 1.

    `dropout` is the probability with which each attention weight is dropped. Returns (B, H, T, D).
    """
    if q.device.type == "cpu" and dropout:
        return attend_in_pieces(q, k, v, dropout)
    causal = q.shape[2] > 1  # a single query is the last token: it may see every key
    D = q.shape[-1]
    if q.device.type == "cuda" and D % 8:
        # the fused kernels for half precision want a multiple of 8 channels; zeros change neither scores nor values
        q, k, v = (F.pad(t, (0, -D % 8)) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal, scale=D ** -0.5)[..., :D]


def attend_in_pieces(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
    """`attend` for training on a CPU, where PyTorch has no fused kernel with dropout. q, k, v: (B, H, T, D) -> (B, H, T, D).

    Four sequences and 64 queries at a time keep the weights in the processor's cache, and keys that lie in the future of
    all 64 are never looked at: four times as fast as the whole (B, H, T, T) tensor at once.
    """
    B, H, T, D = q.shape
    v = v * (1 / (1 - dropout))  # in place of scaling the weights, of which there are more
    q, k, v = (t.reshape(B * H, T, D).split(4 * H) for t in (q, k, v))
    future = torch.full((T, T), float("-inf"), dtype=v[0].dtype).triu(1)
    y = []
    for q, k, v in zip(q, k, v):  # each (4 * H, T, D)
        rows = []
        for start in range(0, T, 64):
            end = min(start + 64, T)
            weights = torch.baddbmm(future[start:end, :end], q[:, start:end], k[:, :end].transpose(1, 2), alpha=D ** -0.5).softmax(-1)
            rows.append(torch.bmm(weights * keep_mask(weights.shape, dropout), v[:, :end]))  # (4 * H, 64, D)
        y.append(torch.cat(rows, dim=1))
    return torch.cat(y).view(B, H, T, D)


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them, four times as wide inside."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.relu(self.up(x)))


class Block(nn.Module):
    """Attention, then feed-forward; each normalises its input and adds its output to the residual stream (pre-norm)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.ffwd = FeedForward(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: torch.Tensor, cache: "LayerCache | None" = None) -> torch.Tensor:
        x = x + self.dropout(self.attn(self.ln_1(x), cache))
        return x + self.dropout(self.ffwd(self.ln_2(x)))


class LayerCache:
    """The keys and values one attention layer has seen, in buffers allocated once. k, v: (B, H, block_size, D)."""

    def __init__(self, batch_size: int, config: GPTConfig, like: torch.Tensor):
        shape = batch_size, config.n_head, config.block_size, config.head_size
        self.k, self.v, self.length = like.new_empty(shape), like.new_empty(shape), 0

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds k and v, (B, H, T, D), and returns all there are so far, (B, H, length, D)."""
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start:self.length] = k
        self.v[:, :, start:self.length] = v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]


class GPT(nn.Module):
    """The network (Radford et al. 2018): embeddings, n_layer blocks, a last norm and an output head of its own."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Predicts the token after each token of idx, (B, T) int64 with T <= block_size.

        Returns the logits (B, T, V) and, where targets (B, T) int64 are given, their mean cross-entropy in nats per token.
        Raises ValueError if T exceeds block_size.
        """
        logits = self.head(self.hidden(idx))  # (B, T, C) -> (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def hidden(self, idx: torch.Tensor, caches: list[LayerCache] | None = None) -> torch.Tensor:
        """The normalised residual stream after the last block. idx: (B, T) int64 -> (B, T, C).

        With `caches`, one for each layer, idx continues the tokens that went through them before.
        """
        T, start = idx.shape[1], caches[0].length if caches else 0
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit into block_size {self.config.block_size}")
        x = self.token_embedding(idx) + self.position_embedding.weight[start:start + T]  # (B, T) -> (B, T, C)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks)):
            x = block(x, cache)
        return self.ln(x)

    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, seed: int | None = None) -> torch.Tensor:
        """Continues idx, (B, T) int64 with T >= 1, by sampling. Returns (B, T + max_new_tokens) int64, the prompt in front.

        The arguments are those of `stream`.
        """
        new = self.stream(idx, max_new_tokens, temperature, top_k, top_p, seed)
        return torch.cat([idx, *(token[:, None] for token in new)], dim=1)

    @torch.no_grad()
    def stream(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
               top_p: float | None = None, seed: int | None = None) -> Iterator[torch.Tensor]:
        """Yields max_new_tokens times the next token of each row, (B,) int64, as soon as it is sampled.

        temperature divides the logits (0 always takes the likeliest token); top_k keeps the k likeliest tokens, top_p the
        likeliest whose probabilities reach p together (Holtzman et al. 2020). Each row has a random stream of its own,
        made from seed and the row's number; without a seed every call differs. Only the last block_size tokens of idx count.
        """
        seed = torch.seed() if seed is None else seed
        generators = [torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + row) % 2**63) for row in range(len(idx))]
        training, block_size = self.training, self.config.block_size
        self.eval()
        try:
            window = idx[:, -block_size:]
            logits, caches = self.prefill(window)
            for step in range(max_new_tokens):
                if step % 256 == 0:  # one draw for many steps: a call for each row and step would cost more than the step
                    uniform = torch.stack([torch.rand(256, generator=g) for g in generators]).to(idx.device)
                token = sample(logits, uniform[:, step % 256], temperature, top_k, top_p)  # (B, V) -> (B,)
                yield token
                window = torch.cat([window[:, 1 - block_size:], token[:, None]], dim=1)
                if caches[0].length < block_size:
                    logits = self.head(self.hidden(token[:, None], caches)[:, -1])
                else:
                    # Positions are learned, so a full window cannot slide: keep its recent half, read once, and go on.
                    logits, caches = self.prefill(window[:, -max(1, block_size // 2):])
        finally:
            self.train(training)

    def prefill(self, idx: torch.Tensor) -> tuple[torch.Tensor, list[LayerCache]]:
        """Reads a prompt in one pass. idx: (B, T) int64 -> logits of the token after it (B, V), and the filled caches."""
        caches = [LayerCache(len(idx), self.config, self.position_embedding.weight) for _ in self.blocks]
        return self.head(self.hidden(idx, caches)[:, -1]), caches


def sample(logits: torch.Tensor, uniform: torch.Tensor, temperature: float = 1.0, top_k: int | None = None,
           top_p: float | None = None) -> torch.Tensor:
    """Draws a token for each row by inverse transform sampling. logits: (B, V); uniform: (B,) in [0, 1) -> (B,) int64."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        likeliest, order = probs.sort(descending=True)
        beyond = likeliest.cumsum(-1) - likeliest >= top_p  # those before it reach p already
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
        raise ValueError(f"the text is too short: its last tenth, kept for validation, has {len(tokens) - n} tokens and must have "
                         f"more than block_size ({block_size}): use a longer text or a smaller --block_size")
    return tokens[:n], tokens[n:]


def windows(data: torch.Tensor, starts: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows of `data` (N,) that begin at `starts` (B,), and the token after each of theirs: two (B, T) int64."""
    tokens = data[starts[:, None] + torch.arange(block_size + 1, device=data.device)].long()
    return tokens[:, :-1], tokens[:, 1:]


def side_by_side(data: torch.Tensor, block_size: int, count: int | None = None) -> torch.Tensor:
    """Where the windows that tile `data` (N,) begin, or `count` of these, evenly spread. (count,) int64 on data's device."""
    tiles = (len(data) - 1) // block_size
    return torch.linspace(0, tiles - 1, count or tiles, dtype=torch.float64).long().to(data.device) * block_size


@torch.no_grad()
def mean_loss(model: GPT, data: torch.Tensor, starts: torch.Tensor) -> float:
    """Loss over the windows of `data` (N,) that begin at `starts` (B,), in nats per token, without dropout."""
    training = model.training
    model.eval()
    total = torch.zeros((), device=data.device)
    for part in starts.split(64):
        total += model(*windows(data, part, model.config.block_size))[1] * len(part)
    model.train(training)
    return total.item() / len(starts)


def choose_device(name: str) -> torch.device:
    """The device asked for, or the fastest there is for `auto`. Raises ValueError if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(kind for kind, ok in there.items() if ok) if name == "auto" else name.split(":")[0]
    if not there.get(kind):
        raise ValueError(f"--device {name}: not on this machine, which has {', '.join(kind for kind, ok in there.items() if ok)}")
    return torch.device(kind if name == "auto" else name)


class Int8Linear(nn.Module):
    """nn.Linear with int8 weights, one scale for each output channel; it quantizes its input, too, each time it is called.

    weight: (out, in) int8; scale: (out,) float32; bias: (out,) float32 or None. Runs on the CPU only.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        torch.backends.quantized.engine = "x86" if "x86" in torch.backends.quantized.supported_engines else "qnnpack"
        zero_points = torch.zeros(len(scale), dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantized tensors are marked deprecated; they work up to PyTorch 2.13 at least
            weight = torch._make_per_channel_quantized_tensor(weight, scale.double(), zero_points, 0)
        self.packed = torch.ops.quantized.linear_prepack(weight, bias)  # the layout its kernel wants
        self.memory_bytes = weight.numel() + 4 * len(scale) * (1 if bias is None else 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.quantized.linear_dynamic(x, self.packed)


def quantize_dynamic(model: GPT) -> dict[str, torch.Tensor]:
    """The weights of a network on the CPU with every matrix in int8: what an int8 checkpoint holds as `model`.

    `NAME.weight` is int8 for linear layers and embeddings, and `NAME.scale` (rows,) float32 turns its rows back into floats.
    Raises RuntimeError where PyTorch has no dynamic quantization any more.
    """
    try:
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
    except ImportError as error:
        raise RuntimeError(f"PyTorch {torch.__version__} has no torch.ao.quantization any more: install torch 2.13") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # marked deprecated
        quantized = quantize_dynamic(model, {nn.Linear: per_channel_dynamic_qconfig})
    weights = model.state_dict()
    for name, module in quantized.named_modules():
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            weight = module.weight()  # (out, in) of PyTorch's own quantized type
            weights[f"{name}.weight"], weights[f"{name}.scale"] = weight.int_repr(), weight.q_per_channel_scales().float()
        elif isinstance(module, nn.Embedding):
            scale = module.weight.detach().abs().amax(1) / 127
            weights[f"{name}.weight"], weights[f"{name}.scale"] = (module.weight.detach() / scale[:, None]).round().to(torch.int8), scale
    return weights


def use_int8(model: GPT, weights: dict[str, torch.Tensor]) -> None:
    """Replaces the linear layers of `model` by int8 ones, taking out of `weights` what `quantize_dynamic` put there."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parts = weights.pop(f"{name}.weight"), weights.pop(f"{name}.scale"), weights.pop(f"{name}.bias", None)
            if parts[0].shape != module.weight.shape or (parts[2] is None) != (module.bias is None):
                raise ValueError(f"{name} has the wrong shape")
            model.set_submodule(name, Int8Linear(*parts))
        elif isinstance(module, nn.Embedding):  # looked up, not multiplied: floats serve it best in memory
            weights[f"{name}.weight"] = weights[f"{name}.weight"] * weights.pop(f"{name}.scale")[:, None]


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Writes a checkpoint so that `path` holds the old file or the new one, whole, whatever happens. Raises OSError."""
    with atomic_write(path) as file:
        torch.save(checkpoint, file)


def load_checkpoint(path: Path) -> dict:
    """Reads a checkpoint: a dict of plain values and tensors, on the CPU; no code in it is run.

    Raises ValueError, with the remedy, for a file that is missing, damaged or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}: train one with `python train.py`, or name one with --checkpoint")
    damaged = f"{path} is not a checkpoint of this program, or it is damaged: train again, or name another file"
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load does not look at the checksums that torch.save writes, and it would unpack a zip bomb
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()) or archive.testzip():
                raise ValueError(damaged)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file can fail in a dozen ways
        raise ValueError(damaged) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("config"), dict) or not isinstance(checkpoint.get("model"), dict):
        raise ValueError(damaged)
    return checkpoint


def load_model(path: Path, fingerprint: str | None = None) -> tuple[GPT, dict]:
    """Reads the network in a checkpoint. Returns it, on the CPU and in eval mode, and the checkpoint's other entries.

    `fingerprint` is that of the tokenizer to be used with it. Raises ValueError if they do not belong together, if the
    file's config and weights do not fit each other, or as `load_checkpoint` does.
    """
    checkpoint = load_checkpoint(path)
    if fingerprint is not None and checkpoint.get("tokenizer") != fingerprint:
        raise ValueError(f"{path} was trained with another tokenizer than the merges.pkl given: "
                         "use the folder it was trained in (--out_dir), or train again")
    weights = checkpoint.pop("model")
    try:
        config = GPTConfig(**checkpoint["config"])
        if not all(w.dtype == torch.int8 or w.dtype == torch.float32 and w.isfinite().all() for w in weights.values()):
            raise ValueError("weights that are not finite numbers")
        with torch.device("meta"):  # allocates nothing, so that a config cannot ask for more than the file holds
            model = GPT(config)
        if checkpoint.get("int8"):
            use_int8(model, weights)
        model.load_state_dict(weights, assign=True)
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: its config and its weights do not make a network: train again, or name another file") from error
    return model.eval(), checkpoint
