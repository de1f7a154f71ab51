"""The network as textbooks write it, and the published reference: a module a head, no cache.

It is what the tests compare the network with, and what bench.py times it against.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class Head(nn.Module):
    def __init__(self, config):
        super().__init__()
        size = config.n_embd // config.n_head
        self.key = nn.Linear(config.n_embd, size, bias=False)
        self.query = nn.Linear(config.n_embd, size, bias=False)
        self.value = nn.Linear(config.n_embd, size, bias=False)
        T = config.block_size
        self.register_buffer("tril", torch.tril(torch.ones(T, T)))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        T = x.shape[1]
        k, q, v = self.key(x), self.query(x), self.value(x)
        weights = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        weights = weights.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return self.dropout(F.softmax(weights, dim=-1)) @ v


class MultiHeadAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = nn.ModuleList(Head(config) for _ in range(config.n_head))
        width = config.n_head * (config.n_embd // config.n_head)
        self.proj = nn.Linear(width, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.proj(torch.cat([head(x) for head in self.heads], dim=-1)))


class TextbookBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.sa = MultiHeadAttention(config)
        C = config.n_embd
        self.ffwd = nn.Sequential(nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C),
                                  nn.Dropout(config.dropout))
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)

    def forward(self, x):
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class TextbookGPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.block_size = config.block_size
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding_table = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.Sequential(*(TextbookBlock(config) for _ in range(config.n_layer)))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, idx, targets=None):
        positions = torch.arange(idx.shape[1], device=idx.device)
        x = self.token_embedding_table(idx) + self.position_embedding_table(positions)
        logits = self.lm_head(self.ln_f(self.blocks(x)))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens):
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.block_size:])
            probs = F.softmax(logits[:, -1], dim=-1)
            idx = torch.cat([idx, torch.multinomial(probs, 1)], dim=1)
        return idx


def copy_weights(textbook, model):
    """Gives `model` (a model.GPT) the weights of a TextbookGPT of the same config."""
    ours = {"token_embedding.weight": textbook.token_embedding_table.weight,
            "position_embedding.weight": textbook.position_embedding_table.weight}
    modules = {"ln": textbook.ln_f, "head": textbook.lm_head}
    for i, block in enumerate(textbook.blocks):
        ours[f"blocks.{i}.attn.qkv.weight"] = torch.cat(
            [getattr(head, name).weight for name in ("query", "key", "value")
             for head in block.sa.heads])
        modules |= {f"blocks.{i}.{name}": module for name, module in (
            ("ln_1", block.ln1), ("ln_2", block.ln2), ("attn.proj", block.sa.proj),
            ("ffwd.up", block.ffwd[0]), ("ffwd.down", block.ffwd[2]))}
    for name, module in modules.items():
        ours |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    model.load_state_dict(ours)
