"""model.py: the network is the textbook's, each fast path is the lesson's, checkpoints are safe."""
import math
import os
import shutil
from dataclasses import asdict, replace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from conftest import ROOT, complaint, python, same
from model import (
    GPT,
    Decoder,
    Dropout,
    GPTConfig,
    attention,
    choose_device,
    cpu_attention,
    cuda_graph,
    gpu_attention,
    keep_mask,
    limit_threads,
    load_model,
    mean_loss,
    sample,
    save_checkpoint,
    split,
    tile_starts,
    use_int8,
)
from quantize import quantize_dynamic
from textbook_gpt import TextbookGPT, copy_weights

SMALL = GPTConfig(vocab_size=50, block_size=16, n_embd=22, n_head=4, n_layer=2)  # a rest of 2


@pytest.fixture
def small():
    torch.manual_seed(0)
    return GPT(SMALL).eval()


def random_ids(*shape, vocab_size=50):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


# ---- the network ----

def test_untrained_it_knows_nothing_and_may_start_as_gpt_2():
    torch.manual_seed(0)
    model, idx = GPT(GPTConfig()), random_ids(4, 256, vocab_size=500)
    assert abs(model(idx, idx.roll(-1, 1))[1].item() - math.log(500)) < 0.3
    model.init_weights(0.02)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            writes = name.endswith(("proj.weight", "down.weight"))  # into the residual stream
            std = 0.02 / math.sqrt(10) if writes else 0.02
            assert abs(p.std() / std - 1) < 0.02 and abs(p.mean()) < std / 50, name
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name


def test_the_network_is_the_textbook(small):
    textbook, idx = TextbookGPT(SMALL).eval(), random_ids(2, 16)
    copy_weights(textbook, small)
    logits, loss = small(idx, idx, temperature=0.5)
    expected, _ = textbook(idx)
    assert_close(logits, expected, atol=1e-5, rtol=0)
    expected_loss = F.cross_entropy(expected.flatten(0, 1) * 2, idx.flatten())
    assert_close(loss, expected_loss)
    loss.backward()
    expected_loss.backward()
    for ours, theirs in ((small.head, textbook.lm_head),
                         (small.token_embedding, textbook.token_embedding_table)):
        assert_close(ours.weight.grad, theirs.weight.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bad, message", [
    ({"n_head": 23}, "n_head .23. must not exceed n_embd .22."),
    ({"n_layer": 0}, "n_layer must be a whole number of at least 1"),
    ({"vocab_size": True}, "vocab_size"), ({"dropout": 1.0}, "dropout"),
    ({"dropout": math.nan}, "dropout")])
def test_impossible_configs_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **bad)


def test_contexts_too_long_or_empty_are_refused(small):
    with pytest.raises(ValueError, match="17 tokens do not fit into block_size 16"):
        small(random_ids(1, 17))
    with pytest.raises(ValueError, match="at least one token"):
        small.generate(random_ids(1, 0), 3)


# ---- dropout ----

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.2, 1 / 3, 0.999999])
def test_dropout_masks_have_the_right_probability(p, dtype, monkeypatch):
    every = torch.arange(-2**15, 2**15, dtype=torch.int16).view(torch.int64)  # value of a coin
    monkeypatch.setattr(torch.Tensor, "random_", lambda self, *_, generator: self.copy_(every))
    mask = keep_mask(torch.Size([2**16]), p, dtype)
    assert mask.dtype == dtype and set(mask.unique().tolist()) == {0.0, 1.0}
    assert abs(mask.double().mean().item() - (1 - p)) < 2e-5


def test_dropout_draws_independently_and_is_off_in_eval():
    torch.manual_seed(0)
    layer, x = Dropout(0.2), torch.ones(4_000_003)
    y = layer(x).double()
    assert set(y.unique().tolist()) == {0.0, 1.25} and abs(y.mean() - 1) < 0.003
    for distance in 1, 2, 3, 4, 5, 8, 64, 256:
        correlation = ((y[:-distance] - 1) * (y[distance:] - 1)).mean() / 0.25
        assert abs(correlation) < 5 / math.sqrt(len(x))  # five standard errors
    assert torch.equal(layer.eval()(x), x)


# ---- attention ----

@pytest.mark.parametrize("dropout", [0, 0.2])
@pytest.mark.parametrize("T", [1, 64, 65, 256])
def test_attention_on_a_cpu_is_that_of_the_lesson(T, dropout, monkeypatch):
    torch.manual_seed(0)
    inputs = [torch.randn(5, 2, T, 7, requires_grad=True) for _ in range(3)]
    kept = torch.rand(5, 2, T, T) >= dropout

    def part_of_kept(shape, p, dtype):
        _, queries, end = shape
        return kept.flatten(0, 1)[:, end - queries:end, :end].to(dtype)

    monkeypatch.setattr("model.keep_mask", part_of_kept)
    monkeypatch.setattr(F, "dropout", lambda weights, p: weights * kept / (1 - p))
    results = cpu_attention(*inputs, dropout), attention(*inputs, dropout)[0]
    assert_close(*results)
    gradients = [torch.autograd.grad(y.square().sum(), inputs) for y in results]
    assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_blocks_on_a_gpu_compile_whole_and_compute_the_same(small, monkeypatch):
    idx, weights = random_ids(3, 16), list(small.blocks.parameters())
    caches = torch.zeros(2, 2, 2, 3, 4, 16, 5)  # heads of 5 channels, which a GPU pads to 8

    def results(caches):
        with torch.inference_mode():
            logits = small.hidden(idx, caches)
        return logits, caches, *torch.autograd.grad(small(idx, idx)[1], weights)

    expected = results(caches[0])
    monkeypatch.setattr("model.CausalSelfAttention.forward", gpu_attention)
    monkeypatch.setattr(Dropout, "forward", torch.nn.Dropout.forward)
    for block in small.blocks:
        block.compile(backend="aot_eager", fullgraph=True)  # fails where a part would be left out
    assert_close(results(caches[1]), expected, atol=1e-4, rtol=1e-4)
    small.train()(idx, idx)[1].backward()


# ---- decoding ----

def check_decoding(network, batch_size, step=lambda decoder, token, t: decoder.step(token),
                   atol=1e-4):
    """Compares the logits of a decoder with those of the network, which has no cache."""
    idx, decoder = random_ids(batch_size, 16), Decoder(network, batch_size)
    logits = [decoder.prefill(idx[:, :5])]
    with torch.inference_mode():
        logits += [step(decoder, idx[:, t], t) for t in range(5, 16)]
    assert_close(torch.stack(logits, 1), network(idx)[0][:, 4:], atol=atol, rtol=0)


@pytest.mark.parametrize("batch_size, sharpness", [(1, 1), (1, 30), (3, 1), (17, 1)])
def test_logits_with_the_cache_equal_those_without(small, batch_size, sharpness):
    for p in small.parameters():
        p.data += 0.1 * torch.randn_like(p)  # norms, too, are as a training leaves them
    for block in small.blocks:
        block.attn.qkv.weight.data[:2 * 20] *= sharpness  # exp(score) may not fit into float32
    check_decoding(small, batch_size)


@pytest.mark.parametrize("rows, threads", [(1, 1), (3, 2)])
def test_a_single_int8_row_takes_one_thread_and_gives_the_others_back(small, rows, threads):
    use_int8(small, quantize_dynamic(small))
    decoder, idx = Decoder(small, rows), random_ids(rows, 1)
    before, seen = torch.get_num_threads(), []

    def look(*args):
        seen.append(torch.get_num_threads())

    small.head.register_forward_hook(look)
    torch.set_num_threads(2)
    decoder.prefill(idx)
    decoder.read = look
    decoder.step(idx[:, 0])
    look()
    torch.set_num_threads(before)
    assert seen == [threads, threads, 2]


def test_steps_of_fixed_shapes_for_a_cuda_graph_give_the_same_logits(small):
    def step(decoder, token, t):
        decoder.caches[..., t:, :] = 0
        future = torch.zeros(1, 1, 16).masked_fill(torch.arange(16) > t, float("-inf"))
        return decoder.read(token, torch.tensor([t]), slice(None), future)

    check_decoding(small, 3, step)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_text_and_losses_on_a_gpu_are_those_on_the_cpu(small):
    idx = random_ids(2, 3)
    text, loss = small.generate(idx, 40, temperature=0), small(idx, idx)[1]
    small.cuda()
    # past the window, so that a graph outlives a prefill; two graphs, in turn
    streams = [small.stream(idx.cuda(), 40, temperature=0) for _ in range(2)]
    for pair, expected in zip(zip(*streams), text[:, 3:].T, strict=True):
        assert all(torch.equal(tokens.cpu(), expected) for tokens in pair)
    assert_close(small(idx.cuda(), idx.cuda())[1].cpu(), loss, atol=1e-4, rtol=0)


@pytest.mark.parametrize("length, window", [(1, 16), (100, 16), (1, 1)])
def test_greedy_text_is_that_of_a_loop_that_rereads_half_a_full_window(length, window):
    torch.manual_seed(0)
    network = GPT(replace(SMALL, block_size=window)).eval()
    text = idx = random_ids(2, length)
    start = max(0, length - window)
    for _ in range(40):
        if text.shape[1] - start > window:
            start = text.shape[1] - max(1, window // 2)
        likeliest = network(text[:, start:])[0][:, -1].argmax(-1, keepdim=True)
        text = torch.cat([text, likeliest], dim=1)
    assert torch.equal(network.generate(idx, 40, temperature=0), text)


def test_a_sample_depends_on_its_seed_and_row_alone(small):
    idx, state = random_ids(1, 1), torch.get_rng_state()
    small.train()
    five, fifty = (small.generate(idx.expand(n, -1), 300, seed=7) for n in (5, 50))
    assert torch.equal(five, fifty[:5])
    others = small.generate(idx.expand(5, -1), 300, seed=8)
    unseeded = [small.generate(idx, 300) for _ in range(2)]
    assert len({tuple(row) for row in torch.cat([fifty, others, *unseeded]).tolist()}) == 57
    assert small.training and torch.equal(torch.get_rng_state(), state)


# ---- sampling ----

@pytest.mark.parametrize("temperature, top_k, top_p", [
    (0.7, None, None), (1.5, 1, None), (1, 5, None), (1, None, 0.5), (1, 7, 0.6), (1, 100, 1.0)])
def test_draws_follow_the_softmax_of_the_likeliest(temperature, top_k, top_p):
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(4)) * 2
    expected = (logits[0].double() / temperature).softmax(-1)
    likeliest = expected.sort(descending=True).indices
    expected[likeliest[top_k or 30:]] = 0
    before = expected[likeliest].cumsum(0) - expected[likeliest]
    expected[likeliest[before >= (top_p or 1) * expected.sum()]] = 0
    uniform = (torch.arange(20_000) + 0.5) / 20_000  # a fine comb in place of chance
    draws = sample(logits.expand(20_000, -1), uniform, temperature, top_k, top_p)
    share = torch.bincount(draws, minlength=30) / 20_000
    assert_close(share.double(), expected / expected.sum(), atol=2e-4, rtol=0)
    assert not share[expected == 0].any()


@pytest.mark.parametrize("uniform, bounds, token", [
    (0, {}, 1), (1 - 2**-24, {}, 2), *((0, {name: tiny}, 2) for name in ("temperature", "top_p")
                                       for tiny in (0, 1e-9, 1e-45, 5e-324))])
def test_the_ends_of_chance_and_tiny_bounds_draw_possible_tokens(uniform, bounds, token):
    logits = torch.tensor([[-1e9, 0.0, 1.0, -1e9]])
    assert sample(logits, torch.tensor([float(uniform)]), **bounds).item() == token


# ---- data ----

def test_the_last_tenth_validates_and_holds_a_window_and_its_target():
    train, val = split(np.arange(574_057), 256)
    assert (len(train), len(val)) == (516_651, 57_406) and val[0] == train[-1] + 1
    split(np.arange(170), 16)
    with pytest.raises(ValueError, match="16 tokens at most and must have more than block_size"):
        split(np.arange(160), 16)


def test_mean_loss_is_that_of_windows_side_by_side_or_of_some_spread_evenly(small):
    data = random_ids(16 * 70 + 1)
    logits = small(data[:-1].view(70, 16))[0]
    expected = F.cross_entropy(logits.flatten(0, 1), data[1:]).item()
    starts = tile_starts(data, 16, 100)
    assert mean_loss(small, data.int(), starts) == pytest.approx(expected, rel=1e-5)
    few = tile_starts(torch.arange(10_000), 16, 6)
    assert len(few.unique()) == 6 and few[0] == 0 and few[-1] == 9_968 and all(few % 16 == 0)


# ---- devices ----

def test_no_gpu_is_touched_but_the_chosen_one(monkeypatch, capsys):
    """PyTorch has no kernels for the last of four, which counts as absent."""
    touched = set()

    def ones(*shape, device):
        touched.add(device)
        if device == "cuda:3":
            raise RuntimeError("no kernel image is available")
        return torch.zeros(shape)

    monkeypatch.setattr(torch, "cuda", MagicMock(
        device_count=lambda: 4, get_device_name=lambda gpu: "P100"))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch, "ones", ones)
    for name, own, chosen in (("auto", 0, "cuda:0"), ("auto", 2, "cuda:2"), ("auto", 3, "cpu"),
                              ("cuda", 1, "cuda:1"), ("cuda:2", 0, "cuda:2"), ("cpu", 0, "cpu")):
        touched.clear()
        assert choose_device(name, own) == torch.device(chosen)  # as set_device wants it
        assert touched <= {chosen, "cuda:3"}
    assert capsys.readouterr().err.count("cannot use P100: not using it\n") == 1
    for name in "cuda:", "cuda:3", "cuda:4", "tpu", "cpu:x":
        with pytest.raises(ValueError, match=f"--device {name}: not on this machine, which has"):
            choose_device(name)


def test_it_goes_on_without_a_graph_that_fails(monkeypatch, capsys):
    cuda, calls = MagicMock(), []
    cuda.graph.side_effect = RuntimeError("not permitted\nwhen capturing")
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch.random, "fork_rng", MagicMock())
    replay = cuda_graph(lambda: calls.append(1) or len(calls))
    assert replay() == 2 and replay() == 3  # after the call that libraries set themselves up in
    assert capsys.readouterr().err.count("no CUDA graphs here (not permitted): ") == 1
    cuda.graph.side_effect = RuntimeError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        cuda_graph(calls.clear)


def test_threads_are_no_more_than_usable_cores(monkeypatch):
    threads = []
    monkeypatch.setattr("model.usable_cores", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # a user's own choice
    limit_threads()
    assert not threads
    monkeypatch.delenv("OMP_NUM_THREADS")
    limit_threads()
    assert threads == [1]


def test_a_pytorch_too_old_is_told_in_one_line():
    process = python("-c", "import torch; torch.__version__ = '2.8.1'; import model", cwd=ROOT)
    assert complaint(process) == "PyTorch 2.8.1 is too old: pip install -r requirements.txt"


# ---- checkpoints ----

def save(path, network, **more):
    save_checkpoint(path, {"config": asdict(network.config), "model": network.state_dict(),
                           "tokenizer": "abc", "iteration": 5, "val_loss": 4.0} | more)


@pytest.mark.parametrize("scale", [1, 1e-40, 0, 1e30])
def test_a_checkpoint_brings_back_the_network_bit_for_bit(small, tmp_path, scale):
    weights = {name: weight * scale for name, weight in small.state_dict().items()}
    save(tmp_path / "model.pt", small, model=weights)
    network, rest = load_model(tmp_path / "model.pt", "abc")
    assert same(dict(network.state_dict()), weights)
    assert not network.training and rest["iteration"] == 5
    if scale < 1:
        assert network.generate(random_ids(1, 1), 30, seed=1).unique().numel() > 1


def test_a_head_tied_to_the_embedding_is_loaded(tmp_path):
    network = GPT(GPTConfig(vocab_size=5000, n_embd=16, n_head=2, n_layer=1))
    network.head.weight = network.token_embedding.weight
    save(tmp_path / "model.pt", network)
    loaded, _ = load_model(tmp_path / "model.pt")
    assert same(dict(loaded.state_dict()), dict(network.state_dict()))


def test_loading_does_not_import_the_compiler(small, tmp_path):
    save(tmp_path / "model.pt", small)
    code = ("import sys, model; model.load_model(sys.argv[1]); "
            "sys.exit('sympy' in sys.modules or 'torch._dynamo' in sys.modules)")
    assert python("-c", code, tmp_path / "model.pt", cwd=ROOT).returncode == 0


@pytest.mark.parametrize("engine", ["x86", "qnnpack"])  # which is what ARM has
def test_an_int8_checkpoint_is_small_and_nearly_the_same(tmp_path, monkeypatch, recwarn, engine):
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this PyTorch was built without {engine}")
    for module in "model", "quantize":
        monkeypatch.setattr(f"{module}.int8_engine", lambda: engine)
    torch.manual_seed(0)
    published, idx = GPT(GPTConfig()).eval(), random_ids(2, 64, vocab_size=500)
    whole, int8 = tmp_path / "model.pt", tmp_path / "int8.pt"
    save(whole, published)
    save(int8, published, model=quantize_dynamic(published), int8=True)
    loaded, _ = load_model(int8)
    logits, expected = loaded(idx)[0], published(idx)[0]
    assert 0 < (logits - expected).norm() / expected.norm() < 0.05
    check_decoding(loaded, 3, atol=0.1)  # a layer rounds its inputs of all rows together
    assert int8.stat().st_size <= 0.27 * whole.stat().st_size and not recwarn.list


def compress(path):
    shutil.unpack_archive(path, path.parent / "parts", "zip")
    shutil.make_archive(path, "zip", path.parent / "parts")
    os.replace(f"{path}.zip", path)


CONFIG, WEIGHTS = asdict(SMALL), GPT(SMALL).state_dict()
BROKEN = {  # entries of a checkpoint, or what becomes of one; tests/attacks has damaged ones
    "compressed": compress, "a list": lambda path: torch.save([1, 2], path),
    "code": {"x": print},
    "no weights": {"model": None}, "int8 without scales": {"int8": True},
    "an unknown setting": {"config": CONFIG | {"n_experts": 8}},
    "a huge config": {"config": CONFIG | {"n_embd": 10**7}},
    "other shapes": {"config": CONFIG | {"n_layer": 3}},
    "not finite": {"model": {name: weight * math.nan for name, weight in WEIGHTS.items()}},
    "not numbers": {"model": dict.fromkeys(WEIGHTS, "x")},
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_checkpoint_gets_one_clear_line(small, tmp_path, how):
    path, change = tmp_path / "model.pt", BROKEN[how]
    save(path, small, **(change if isinstance(change, dict) else {}))
    if callable(change):
        change(path)
    with pytest.raises(ValueError) as error:
        load_model(path, "abc")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
