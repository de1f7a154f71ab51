"""model.py: the network is the textbook's, each fast path is the lesson's, checkpoints are safe."""
import math
import pickle
import subprocess
import sys
import zipfile
from dataclasses import asdict
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model as model_module
import quantize
from conftest import ROOT
from model import (
    GPT,
    CausalSelfAttention,
    Decoder,
    Dropout,
    GPTConfig,
    Int8Linear,
    attention,
    choose_device,
    cpu_attention,
    gpu_attention,
    keep_mask,
    load_checkpoint,
    load_model,
    mean_loss,
    sample,
    save_checkpoint,
    split,
    tile_starts,
    windows,
)
from quantize import quantize_dynamic
from textbook_gpt import TextbookGPT, copy_weights

SMALL = GPTConfig(vocab_size=50, block_size=16, n_embd=22, n_head=4, n_layer=2)  # a rest of 2
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def small():
    torch.manual_seed(0)
    return GPT(SMALL).eval()


@pytest.fixture
def by_the_lesson(monkeypatch):
    """Lets networks on the CPU compute with the lesson's `attention`, not with a fast one."""
    monkeypatch.setattr(model_module, "cpu_attention", lambda *args: attention(*args)[0])


def random_ids(*shape, vocab_size=50):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


def gradients(y, inputs):
    """Returns the gradients of a scalar that depends on every number of y."""
    return torch.autograd.grad(y.square().sum(), inputs)


def assert_all_close(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


# ---- the network ----

def test_has_exactly_the_published_number_of_parameters():
    assert sum(p.numel() for p in GPT(GPTConfig()).parameters()) == 3_514_836


def test_an_untrained_network_knows_nothing():
    torch.manual_seed(1337)
    idx = random_ids(4, 256, vocab_size=500)
    _, loss = GPT(GPTConfig()).eval()(idx, idx.roll(-1, 1))
    assert abs(loss.item() - math.log(500)) < 0.3


def test_initial_weights_are_smaller_where_they_write_into_the_residual_stream():
    torch.manual_seed(0)
    model = GPT(GPTConfig())
    model.init_weights(0.02)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            writes = name.endswith(("proj.weight", "down.weight"))
            expected = 0.02 / math.sqrt(10) if writes else 0.02
            assert abs(p.std().item() / expected - 1) < 0.02, name
            assert abs(p.mean().item()) < expected / 50, name
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name


def check_against_the_textbook(config):
    """Compares logits, loss and gradients."""
    torch.manual_seed(0)
    textbook, ours = TextbookGPT(config).eval(), GPT(config).eval()
    copy_weights(textbook, ours)
    idx = random_ids(2, config.block_size, vocab_size=config.vocab_size)
    (expected, expected_loss), (logits, loss) = textbook(idx, idx), ours(idx, idx)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert abs(loss.item() - expected_loss.item()) < 1e-5
    expected_loss.backward()
    loss.backward()
    for mine, theirs in ((ours.head, textbook.lm_head),
                         (ours.token_embedding, textbook.token_embedding_table)):
        torch.testing.assert_close(mine.weight.grad, theirs.weight.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [GPTConfig(), SMALL], ids=["published", "small"])
def test_the_lesson_is_the_textbook(config, by_the_lesson):
    check_against_the_textbook(config)


@pytest.mark.parametrize("config", [GPTConfig(), SMALL], ids=["published", "small"])
def test_the_network_as_a_cpu_has_it_is_the_textbook(config):
    check_against_the_textbook(config)


def test_a_token_does_not_see_those_after_it(small):
    idx = random_ids(1, 16)
    changed = idx.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 50
    before, after = small(idx)[0], small(changed)[0]
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_too_long_a_context_is_refused(small):
    with pytest.raises(ValueError, match="17 tokens do not fit into block_size 16"):
        small(random_ids(1, 17))


@pytest.mark.parametrize("bad, message", [
    ({"n_head": 23}, "n_head .23. must not exceed n_embd .22."),
    ({"n_layer": 0}, "n_layer must be a whole number of at least 1"),
    ({"block_size": 2.5}, "block_size"), ({"vocab_size": True}, "vocab_size"),
    ({"dropout": 1.0}, "dropout"), ({"dropout": float("nan")}, "dropout")])
def test_impossible_configs_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**asdict(SMALL) | bad)


def test_the_temperature_divides_the_logits_in_the_loss_alone(small):
    idx, targets = random_ids(2, 16), random_ids(2, 16)
    logits, loss = small(idx, targets, temperature=0.5)
    assert torch.equal(logits, small(idx)[0])
    expected = F.cross_entropy(logits.flatten(0, 1) * 2, targets.flatten())
    torch.testing.assert_close(loss, expected)


# ---- dropout ----

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.2, 1 / 3, 0.5, 0.999999])
def test_dropout_masks_have_the_right_probability(p, dtype, monkeypatch):
    torch.manual_seed(0)
    n = 2_000_000
    mask = keep_mask(torch.Size([n]), p, dtype)
    assert mask.dtype == dtype and set(mask.unique().tolist()) <= {0.0, 1.0}
    errors = 5 * math.sqrt(p * (1 - p) / n)  # five standard errors
    assert abs(mask.double().mean().item() - (1 - p)) < errors + 2**-16
    # each of the 2^16 values a coin can have, once: the probability itself
    every = torch.arange(-2**15, 2**15, dtype=torch.int16).view(torch.int64)
    monkeypatch.setattr(torch.Tensor, "random_", lambda self, *_, generator: self.copy_(every))
    kept = keep_mask(torch.Size([2**16]), p, dtype).double().mean().item()
    assert abs(kept - (1 - p)) < 2e-5


def test_dropout_masks_are_independent_of_their_neighbours():
    torch.manual_seed(0)
    keep = keep_mask(torch.Size([4_000_000]), 0.2, torch.float32).double() - 0.8
    for distance in 1, 2, 3, 4, 5, 8, 64, 256:
        correlation = (keep[:-distance] * keep[distance:]).mean().item() / 0.16
        assert abs(correlation) < 5 / math.sqrt(len(keep))


def test_dropout_keeps_the_mean_and_is_off_in_eval():
    torch.manual_seed(0)
    layer, x = Dropout(0.2), torch.ones(1_000_003)
    assert abs(layer(x).mean().item() - 1) < 0.003
    assert set(layer(x).unique().tolist()) == {0.0, 1.25}
    assert torch.equal(layer.eval()(x), x)


# ---- attention ----

def queries_keys_and_values(T=100, requires_grad=False):
    torch.manual_seed(0)
    return [torch.randn(5, 2, T, 7, requires_grad=requires_grad) for _ in range(3)]


def test_where_no_key_matches_better_attention_is_the_mean_of_what_came_before():
    _, _, v = queries_keys_and_values()
    y, weights = attention(torch.zeros_like(v), torch.zeros_like(v), v)
    count = torch.arange(1, 101)
    torch.testing.assert_close(y, v.cumsum(2) / count[:, None])
    torch.testing.assert_close(weights[0, 0], torch.ones(100, 100).tril() / count[:, None])


def test_attention_drops_the_share_of_weights_it_is_given():
    q, k, v = queries_keys_and_values()
    everything = torch.eye(100).expand(5, 2, 100, 100)  # as values, it shows the weights
    y, weights = attention(q, k, everything, dropout=0.2)
    kept = y > 0
    torch.testing.assert_close(y[kept], weights[kept] / 0.8)
    assert abs(kept.sum() / (weights > 0).sum() - 0.8) < 0.01


@pytest.mark.parametrize("T", [1, 63, 64, 65, 100, 256])
def test_attention_as_a_cpu_has_it_is_that_of_the_lesson(T):
    inputs = queries_keys_and_values(T, requires_grad=True)
    ours, expected = cpu_attention(*inputs), attention(*inputs)[0]
    torch.testing.assert_close(ours, expected)
    assert_all_close(gradients(ours, inputs), gradients(expected, inputs))


def test_attention_with_dropout_as_a_cpu_has_it_drops_weights_of_the_lesson(monkeypatch):
    inputs = queries_keys_and_values(requires_grad=True)
    dropped = torch.rand(5 * 2, 100, 100) < 0.2
    masks = iter([dropped[:, 64:], dropped[:, :64, :64]])  # it begins with the last 36 queries
    monkeypatch.setattr(model_module, "keep_mask", lambda _, p, dtype: (~next(masks)).to(dtype))
    ours, weights = cpu_attention(*inputs, dropout=0.2), attention(*inputs)[1]
    expected = weights.masked_fill(dropped.view_as(weights), 0) / 0.8 @ inputs[2]
    torch.testing.assert_close(ours, expected)
    assert_all_close(gradients(ours, inputs), gradients(expected, inputs))


def test_attention_as_a_gpu_has_it_is_that_of_the_lesson(small, by_the_lesson):
    layer, x = small.blocks[0].attn, torch.randn(3, 16, 22, requires_grad=True)
    caches = torch.zeros(2, 2, 3, 4, 16, 5)  # heads of 5 channels, which a GPU pads to 8
    expected, ours = layer(x, caches[0]), gpu_attention(layer, x, caches[1])
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(caches[1], caches[0])
    inputs = x, layer.qkv.weight, layer.proj.weight, layer.proj.bias
    assert_all_close(gradients(ours, inputs), gradients(expected, inputs))


def test_a_block_as_a_gpu_has_it_compiles_as_a_whole(small, monkeypatch, by_the_lesson):
    idx = random_ids(3, 16)
    expected = small(idx)[0]
    monkeypatch.setattr(CausalSelfAttention, "forward", gpu_attention)
    monkeypatch.setattr(Dropout, "forward", torch.nn.Dropout.forward)
    for block in small.blocks:
        block.compile(backend="aot_eager", fullgraph=True)  # fails where a part would be left out
    torch.testing.assert_close(small(idx)[0], expected)
    small.train()(idx, idx)[1].backward()
    assert all(p.grad is not None for p in small.parameters())


# ---- decoding ----

@pytest.mark.parametrize("batch_size, int8", [(1, False), (3, False), (17, False), (3, True)])
def test_logits_with_the_cache_equal_logits_without(small, tmp_path, batch_size, int8):
    if int8:
        save(tmp_path / "int8.pt", small, model=quantize_dynamic(small), int8=True)
        small, _ = load_model(tmp_path / "int8.pt")
    idx, decoder = random_ids(batch_size, 16), Decoder(small, batch_size)
    close = {"atol": 0.05 if int8 else 1e-4, "rtol": 0}  # int8 scales inputs by their largest
    expected = small(idx)[0]
    torch.testing.assert_close(decoder.prefill(idx[:, :5]), expected[:, 4], **close)
    for t in range(5, 16):
        torch.testing.assert_close(decoder.step(idx[:, t]), expected[:, t], **close)


def test_one_stream_reads_scores_whose_exponentials_would_overflow(small):
    idx = random_ids(1, 16)
    for block in small.blocks:
        block.attn.qkv.weight.data[:2 * 20] *= 30  # queries and keys of 4 heads of 5 channels
    q, k, _ = small.blocks[0].attn.qkv(small.blocks[0].ln_1(small.token_embedding(idx))).chunk(3, 2)
    assert (q[0, :, :5] @ k[0, :, :5].T).max() * 5 ** -0.5 > 89  # exp(89) is inf in float32
    decoder, expected = Decoder(small, 1), small(idx)[0]
    decoder.prefill(idx[:, :5])
    for t in range(5, 16):
        torch.testing.assert_close(decoder.step(idx[:, t]), expected[:, t], atol=1e-4, rtol=0)


def test_a_step_of_fixed_shapes_as_a_cuda_graph_has_it_gives_the_same_logits(small):
    idx, decoder = random_ids(3, 16), Decoder(small, 3)
    expected = small(idx)[0]
    decoder.prefill(idx[:, :5])
    decoder.caches[..., 5:, :] = 0
    with torch.inference_mode():
        for t in range(5, 16):
            future = torch.zeros(1, 1, 16).masked_fill(torch.arange(16) > t, float("-inf"))
            logits = decoder.read(idx[:, t], torch.tensor([t]), slice(None), future)
            torch.testing.assert_close(logits, expected[:, t], atol=1e-4, rtol=0)


@needs_gpu
def test_text_and_losses_on_a_gpu_are_those_on_the_cpu(small):
    idx, long = random_ids(2, 3), random_ids(4, 16)
    text, loss = small.generate(idx, 40, temperature=0), small(long, long)[1]
    small.cuda()
    # past the window, so that a graph outlives a prefill; two graphs, in turn
    streams = [small.stream(idx.cuda(), 40, temperature=0) for _ in range(2)]
    for pair, expected in zip(zip(*streams), text[:, 3:].T, strict=True):
        assert all(torch.equal(tokens.cpu(), expected) for tokens in pair)
    on_gpu = small(long.cuda(), long.cuda())[1].cpu()
    torch.testing.assert_close(on_gpu, loss, atol=1e-4, rtol=0)


def test_greedy_text_is_that_of_the_textbook_loop(small, by_the_lesson):
    """Past the window the recent half is read again."""
    idx, new = random_ids(2, 3), 40
    text, start = idx, 0
    for _ in range(new):
        if text.shape[1] - start > 16:
            start = text.shape[1] - 8
        likeliest = small(text[:, start:])[0][:, -1].argmax(-1, keepdim=True)
        text = torch.cat([text, likeliest], dim=1)
    assert torch.equal(small.generate(idx, new, temperature=0), text)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
def test_prompts_of_any_length_are_continued(small, length):
    idx = random_ids(2, length)
    out = small.generate(idx, 20, seed=3)
    assert out.shape == (2, length + 20) and torch.equal(out[:, :length], idx) and out.max() < 50


def test_a_network_with_a_context_of_one_token_can_sample():
    network = GPT(GPTConfig(vocab_size=5, block_size=1, n_embd=4, n_head=2, n_layer=1))
    assert network.generate(torch.zeros(1, 1).long(), 9).shape == (1, 10)


def test_same_seed_same_text_and_no_seed_another(small):
    idx = random_ids(1, 1)
    assert torch.equal(small.generate(idx, 300, seed=7), small.generate(idx, 300, seed=7))
    assert not torch.equal(small.generate(idx, 300, seed=7), small.generate(idx, 300, seed=8))
    assert not torch.equal(small.generate(idx, 300), small.generate(idx, 300))


def test_a_sample_does_not_depend_on_those_beside_it(small):
    idx = random_ids(1, 1)
    five, fifty = (small.generate(idx.expand(n, -1), 60, seed=7) for n in (5, 50))
    assert torch.equal(five, fifty[:5])
    assert len({tuple(row) for row in fifty.tolist()}) == 50


def test_an_empty_prompt_is_refused(small):
    with pytest.raises(ValueError, match="at least one token"):
        small.generate(torch.empty(1, 0).long(), 3)


def test_sampling_leaves_the_random_state_and_the_mode_of_the_network_alone(small):
    before = torch.get_rng_state()
    small.train()
    small.generate(random_ids(1, 1), 3)
    assert small.training and torch.equal(torch.get_rng_state(), before)


# ---- sampling ----

def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_ten_thousand_draws_follow_the_softmax(temperature):
    logits = torch.linspace(-1.5, 1.5, 20)
    uniform = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    draws = sample(logits.expand(10_000, -1), uniform, temperature)
    counts = torch.bincount(draws, minlength=20).double()
    expected = 10_000 * (logits.double() / temperature).softmax(-1)
    assert chi_square(counts, expected) < 43.82  # the 99.9 % quantile for 19 degrees of freedom
    assert chi_square(counts, torch.full((20,), 500.0)) > 43.82  # it can tell another distribution


@pytest.mark.parametrize("top_k, top_p", [(1, None), (5, None), (None, 0.5), (None, 1e-9), (7, 0.6),
                                          (100, 1.0)])
def test_top_k_and_top_p_against_a_plain_computation(top_k, top_p):
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(4)) * 2
    probs = dict(enumerate(logits[0].double().softmax(-1).tolist()))
    kept = sorted(probs, key=probs.get, reverse=True)[:top_k]
    if top_p is not None:
        total, nucleus = 0.0, []
        for token in kept:
            if total / sum(probs[t] for t in kept) >= top_p:
                break
            nucleus.append(token)
            total += probs[token]
        kept = nucleus
    uniform = (torch.arange(20_000) + 0.5) / 20_000  # a fine comb in place of chance
    draws = sample(logits.expand(20_000, -1), uniform, top_k=top_k, top_p=top_p)
    share = torch.bincount(draws, minlength=30) / 20_000
    expected = torch.tensor([probs[t] if t in kept else 0.0 for t in range(30)])
    expected = (expected / expected.sum()).float()
    torch.testing.assert_close(share, expected, atol=2e-4, rtol=0)
    assert not share[expected == 0].any()


def test_the_ends_of_the_unit_interval_draw_possible_tokens():
    logits = torch.tensor([[-1e9, 0.0, 1.0, -1e9]])
    assert sample(logits, torch.tensor([0.0])).item() == 1
    assert sample(logits, torch.tensor([1 - 2**-24])).item() == 2


@pytest.mark.parametrize("tiny", [1e-30, 1e-45, 1e-320, 5e-324])
def test_temperatures_and_probabilities_too_small_for_float32_take_the_likeliest(tiny):
    logits, uniform = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([0.999])
    assert sample(logits, uniform, temperature=tiny).tolist() == [1]
    assert sample(logits, uniform, top_p=tiny).tolist() == [1]


# ---- data ----

def test_the_split_of_the_published_text():
    train, val = split(np.arange(574_057), 256)
    assert (len(train), len(val)) == (516_651, 57_406) and val[0] == train[-1] + 1


def test_a_text_too_short_for_a_window_is_refused():
    split(np.arange(170), 16)  # 17 tokens to validate on: one window and its last target
    with pytest.raises(ValueError, match="16 tokens at most and must have more than block_size"):
        split(np.arange(160), 16)


def test_windows_side_by_side_cover_the_split_once():
    data = torch.arange(100)
    starts = tile_starts(data, 16)
    x, y = windows(data, starts, 16)
    assert x.flatten().tolist() == list(range(96)) and torch.equal(y, x + 1)
    assert x.dtype == torch.int64 and torch.equal(tile_starts(data, 16, 100), starts)
    few = tile_starts(torch.arange(10_000), 16, 6)
    assert len(set(few.tolist())) == 6 and few[0] == 0 and few[-1] == 9_968
    assert all(few % 16 == 0)


def test_mean_loss_is_the_mean_over_all_tokens(small):
    data = random_ids(16 * 70 + 1)
    logits = small(data[:-1].view(70, 16))[0]
    expected = F.cross_entropy(logits.flatten(0, 1), data[1:]).item()
    assert mean_loss(small, data, tile_starts(data, 16)) == pytest.approx(expected, rel=1e-5)


# ---- devices ----

def test_a_gpu_is_chosen_with_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(model_module, "works", lambda gpu: True)
    for name, number in ("auto", 0), ("cuda", 0), ("cuda:1", 1):
        assert choose_device(name) == torch.device("cuda", number)  # as set_device wants it
    for name in "cuda:", "cuda:2", "tpu", "cpu:", "cpu:x":
        with pytest.raises(ValueError, match=f"--device {name}: not on this machine, which has"):
            choose_device(name)


def test_a_process_touches_no_gpu_but_its_own(monkeypatch):
    touched = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(model_module, "works", lambda gpu: not touched.append(gpu))
    for name, own in ("auto", 2), ("cuda", 1), ("cuda:3", 0), ("cpu", 0):
        choose_device(name, own)
    assert set(touched) == {"cuda:1", "cuda:2", "cuda:3"}


def test_a_gpu_that_pytorch_has_no_kernels_for_counts_as_absent(monkeypatch, capsys):
    def no_kernels(*shape, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: "Tesla P100")
    monkeypatch.setattr(torch, "ones", no_kernels)
    assert choose_device("auto").type != "cuda"
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "cannot use Tesla P100" in told[0]
    with pytest.raises(ValueError, match="--device cuda: not on this machine"):
        choose_device("cuda")


@pytest.mark.parametrize("message", ["operation not permitted when stream is capturing",
                                     "CUDA out of memory"])
def test_where_recording_a_graph_fails_it_goes_on_without(monkeypatch, capsys, message):
    def fail(graph, stream):
        raise RuntimeError(message)

    stream = MagicMock()
    for name in "Stream", "current_stream", "stream":
        monkeypatch.setattr(torch.cuda, name, lambda *args: stream)
    for name in "CUDAGraph", "current_device":
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: stream)
    monkeypatch.setattr(torch.cuda, "graph", fail)
    calls = []
    if "memory" in message:
        with pytest.raises(RuntimeError, match="out of memory"):
            model_module.cuda_graph(lambda: calls.append(1))
        return
    replay = model_module.cuda_graph(lambda: calls.append(1) or len(calls))
    assert replay() == 2 and replay() == 3  # after the call that libraries set themselves up in
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and f"no CUDA graphs here ({message})" in told[0]


def test_threads_are_no_more_than_the_cores_that_may_be_used(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(model_module, "usable_cores", lambda: 1)
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "2")  # a user's own choice
        torch.set_num_threads(2)
        model_module.limit_threads()
        assert torch.get_num_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        model_module.limit_threads()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_a_pytorch_too_old_is_told_in_one_line():
    program = "import torch; torch.__version__ = '2.8.1'; import model"
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True,
                             text=True)
    assert process.returncode == 1
    assert process.stderr == "PyTorch 2.8.1 is too old: pip install -r requirements.txt\n"


# ---- checkpoints ----

def save(path, network, **more):
    save_checkpoint(path, {"config": asdict(network.config), "model": network.state_dict(),
                           "tokenizer": "abc", "iteration": 5, "val_loss": 4.0} | more)


def test_a_checkpoint_brings_back_the_network(small, tmp_path):
    save(tmp_path / "model.pt", small)
    loaded, rest = load_model(str(tmp_path / "model.pt"), "abc")
    idx = random_ids(2, 16)
    assert torch.equal(loaded(idx)[0], small(idx)[0]) and not loaded.training
    assert rest["iteration"] == 5
    checkpoint = load_checkpoint(tmp_path / "model.pt")  # the form that is documented
    again = GPT(GPTConfig(**checkpoint["config"]))
    again.load_state_dict(checkpoint["model"])


@pytest.mark.parametrize("scale", [1e-40, 0.0, 1e30])
def test_weights_at_the_ends_of_float32_are_kept_exactly_and_sampled_from(small, tmp_path, scale):
    weights = {name: weight * scale for name, weight in small.state_dict().items()}
    save(tmp_path / "model.pt", small, model=weights)
    network, _ = load_model(tmp_path / "model.pt")
    kept = network.state_dict()
    assert kept.keys() == weights.keys()
    assert all(torch.equal(kept[name], weights[name]) for name in weights)
    if scale < 1:
        assert network.generate(random_ids(1, 1), 30, seed=1).unique().numel() > 1


def test_a_checkpoint_is_loaded_without_importing_the_compiler(small, tmp_path):
    save(tmp_path / "model.pt", small)
    program = ("import sys, model; model.load_model(sys.argv[1]); "
               "sys.exit('sympy' in sys.modules or 'torch._dynamo' in sys.modules)")
    command = [sys.executable, "-c", program, tmp_path / "model.pt"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0


def relative_error(network, reference, idx):
    expected = reference(idx)[0]
    return ((network(idx)[0] - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("engine", [None, "x86", "qnnpack"])  # qnnpack is what ARM has
def test_an_int8_checkpoint_is_a_quarter_and_brings_back_the_same_logits(tmp_path, monkeypatch,
                                                                         engine):
    if engine not in (None, *torch.backends.quantized.supported_engines):
        pytest.skip(f"this PyTorch was built without {engine}")
    if engine:
        for module in model_module, quantize:
            monkeypatch.setattr(module, "int8_engine", lambda: engine)
    torch.manual_seed(0)
    published, idx = GPT(GPTConfig()).eval(), random_ids(2, 64, vocab_size=500)
    save(tmp_path / "model.pt", published)
    save(tmp_path / "int8.pt", published, model=quantize_dynamic(published), int8=True)
    first, second = (load_model(tmp_path / "int8.pt", "abc")[0] for _ in range(2))
    assert torch.equal(first(idx)[0], second(idx)[0]) and isinstance(first.head, Int8Linear)
    assert 0 < relative_error(first, published, idx) < 0.05
    assert torch.equal(first.generate(idx, 5, seed=0), second.generate(idx, 5, seed=0))
    size, whole = ((tmp_path / name).stat().st_size for name in ("int8.pt", "model.pt"))
    assert size <= 0.27 * whole


def test_quantizing_and_loading_int8_print_no_warning(small, tmp_path, recwarn):
    save(tmp_path / "int8.pt", small, model=quantize_dynamic(small), int8=True)
    load_model(tmp_path / "int8.pt")[0](random_ids(1, 4))
    assert not recwarn.list


def test_a_foreign_tokenizer_is_refused(small, tmp_path):
    save(tmp_path / "model.pt", small)
    with pytest.raises(ValueError, match="another tokenizer"):
        load_model(tmp_path / "model.pt", "abd")


class Evil:
    """Pickles as code that ends the process which loads it."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


def compressed(path, model):
    save(path, model)
    with zipfile.ZipFile(path) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in entries.items():
            target.writestr(name, data)


def config(**entries):
    return lambda path, model: save(path, model, config=asdict(model.config) | entries)


def weights(change):
    return lambda path, model: save(path, model, model={
        name: change(weight) for name, weight in model.state_dict().items()})


BROKEN = {  # how a file comes to be; tests/attacks has those that were whole once
    "empty": lambda path, model: path.touch(), "compressed": compressed,
    "text": lambda path, model: path.write_bytes(b"no checkpoint"),
    "a pickle that runs code": lambda path, model: path.write_bytes(pickle.dumps(Evil())),
    "code in a checkpoint": lambda path, model: save(path, model, x=Evil()),
    "a list": lambda path, model: torch.save([1, 2], path),
    "no weights": lambda path, model: torch.save({"config": {}}, path),
    "an unknown setting": config(n_experts=8), "a huge config": config(n_embd=10**7),
    "other shapes": config(n_layer=3), "not finite": weights(lambda w: w * float("nan")),
    "not numbers": weights(lambda w: "x"), "other dtype": weights(lambda w: w.long()),
    "int8 without scales": lambda path, model: save(path, model, int8=True),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_checkpoint_gets_one_clear_line(small, tmp_path, how):
    path = tmp_path / "model.pt"
    BROKEN[how](path, small)
    with pytest.raises(ValueError) as error:
        load_model(path, "abc")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_checkpoint_says_how_to_get_one(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint at .*python train.py"):
        load_model(tmp_path / "model.pt")


def test_a_failed_save_leaves_the_old_checkpoint(small, tmp_path):
    save(tmp_path / "model.pt", small)
    before = (tmp_path / "model.pt").read_bytes()
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        save(tmp_path / "model.pt", small, bad=lambda: None)  # a function cannot be pickled
    assert (tmp_path / "model.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
