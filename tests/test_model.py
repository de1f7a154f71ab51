"""The network: same function as the textbook's, cache equals no cache, sampling follows the softmax, checkpoints are safe."""
import math
import pickle
import subprocess
import sys
import zipfile
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import model as model_module
from model import (Decoder, GPT, GPTConfig, Int8Linear, Workers, attend, keep_mask, load_checkpoint, load_model, mean_loss, out_of_memory,
                   quantize_dynamic, sample, save_checkpoint, side_by_side, split, windows)
from textbook_gpt import TextbookGPT, copy_weights

SMALL = GPTConfig(vocab_size=50, block_size=16, n_embd=22, n_head=4, n_layer=2, dropout=0.2)  # 4 does not divide 22


@pytest.fixture
def small():
    torch.manual_seed(0)
    return GPT(SMALL).eval()


def random_ids(*shape, vocab_size=50):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


def test_errors_that_come_from_a_lack_of_memory_are_known_as_such():
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
    except RuntimeError as error:
        assert out_of_memory(error)
    assert out_of_memory(MemoryError()) and not out_of_memory(RuntimeError("CUDA error: unspecified launch failure"))


# the network

def test_has_exactly_the_published_number_of_parameters():
    count = sum(p.numel() for p in GPT(GPTConfig()).parameters())
    print(f"{count:,} parameters")
    assert count == 3_514_836


def test_an_untrained_network_knows_nothing():
    torch.manual_seed(1337)
    idx = random_ids(4, 256, vocab_size=500)
    _, loss = GPT(GPTConfig()).eval()(idx, idx.roll(-1, 1))
    assert abs(loss.item() - math.log(500)) < 0.3


def test_initial_weights_are_normal_and_smaller_where_they_write_into_the_residual_stream():
    torch.manual_seed(0)
    model = GPT(GPTConfig())
    model.init_weights(0.02)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expected = 0.02 / math.sqrt(10) if name.endswith(("proj.weight", "down.weight")) else 0.02
            assert abs(p.std().item() / expected - 1) < 0.02 and abs(p.mean().item()) < expected / 50, name
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name


@pytest.mark.parametrize("config", [GPTConfig(), SMALL], ids=["published", "small"])
def test_same_logits_and_gradients_as_the_textbook(config):
    torch.manual_seed(0)
    textbook, ours = TextbookGPT(config).eval(), GPT(config).eval()
    copy_weights(textbook, ours)
    idx = random_ids(2, config.block_size, vocab_size=config.vocab_size)
    (expected, expected_loss), (logits, loss) = textbook(idx, idx), ours(idx, idx)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert abs(loss.item() - expected_loss.item()) < 1e-5
    expected_loss.backward()
    loss.backward()
    torch.testing.assert_close(ours.head.weight.grad, textbook.lm_head.weight.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.token_embedding.weight.grad, textbook.token_embedding_table.weight.grad, atol=1e-5, rtol=1e-4)


def test_a_token_does_not_see_those_after_it(small):
    idx = random_ids(1, 16)
    changed = idx.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 50
    before, after = small(idx)[0], small(changed)[0]
    assert torch.equal(before[:, :10], after[:, :10]) and not torch.allclose(before[:, 10:], after[:, 10:])


def test_too_long_a_context_is_refused(small):
    with pytest.raises(ValueError, match="17 tokens do not fit into block_size 16"):
        small(random_ids(1, 17))


@pytest.mark.parametrize("bad, message", [
    ({"n_head": 23}, "n_head .23. must not exceed n_embd .22."), ({"n_layer": 0}, "n_layer must be"), ({"dropout": 1.0}, "dropout"),
    ({"block_size": 2.5}, "block_size"), ({"vocab_size": True}, "vocab_size"), ({"dropout": float("nan")}, "dropout")])
def test_impossible_configs_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**asdict(SMALL) | bad)


# dropout

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.2, 1 / 3, 0.5, 0.999999])
def test_dropout_masks_have_the_right_probability(p, dtype, monkeypatch):
    torch.manual_seed(0)
    n = 20_000_000
    mask = keep_mask(torch.Size([n]), p, dtype)
    assert mask.dtype == dtype and set(mask[:1_000_000].unique().tolist()) <= {0.0, 1.0}
    assert abs(mask.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n) + 2**-16  # five standard errors
    # each of the 2^16 values a coin can have, once: the probability itself
    every = torch.arange(-2**15, 2**15, dtype=torch.int16).view(torch.int64)
    monkeypatch.setattr(torch.Tensor, "random_", lambda self, *range, generator: self.copy_(every))
    assert abs(keep_mask(torch.Size([2**16]), p, dtype).double().mean().item() - (1 - p)) < 2e-5


def test_dropout_masks_are_independent_of_their_neighbours():
    torch.manual_seed(0)
    keep = keep_mask(torch.Size([4_000_000]), 0.2, torch.float32).double() - 0.8
    for distance in 1, 2, 3, 4, 5, 8, 64, 256:
        correlation = (keep[:-distance] * keep[distance:]).mean().item() / 0.16
        assert abs(correlation) < 5 / math.sqrt(len(keep))


def test_dropout_keeps_the_mean_and_is_off_in_eval():
    torch.manual_seed(0)
    layer, x = model_module.Dropout(0.2), torch.ones(1_000_003)
    assert abs(layer(x).mean().item() - 1) < 0.003 and set(layer(x).unique().tolist()) == {0.0, 1.25}
    assert torch.equal(layer.eval()(x), x)


def test_attention_with_dropout_is_attention_whose_weights_are_dropped(monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, 2, 100, 7, requires_grad=True) for _ in range(3))
    dropped = torch.rand(5 * 2, 100, 100) < 0.2
    masks = iter([dropped[:, 64:], dropped[:, :64, :64]])  # the last 36 queries, which see all keys, then the 64 before
    monkeypatch.setattr(model_module, "keep_mask", lambda shape, p, dtype: (~next(masks)).to(dtype))
    future = torch.ones(100, 100, dtype=torch.bool).triu(1)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(7)).masked_fill(future, float("-inf")).softmax(-1)
    expected = weights.masked_fill(dropped.view(5, 2, 100, 100), 0) / 0.8 @ v
    ours = attend(q, k, v, dropout=0.2)
    torch.testing.assert_close(ours, expected)
    for mine, theirs in zip(torch.autograd.grad(ours.square().sum(), (q, k, v)), torch.autograd.grad(expected.square().sum(), (q, k, v))):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_attention_in_fewer_pieces_or_padded_as_a_gpu_has_it_is_the_same(small):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 6, 100, 38).unbind()
    torch.testing.assert_close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True))
    layer, x, caches = small.blocks[0].attn, torch.randn(3, 16, 22, requires_grad=True), torch.zeros(2, 2, 3, 4, 16, 5)  # heads of 5, padded to 8
    expected, padded = layer(x, caches[0]), layer.forward_fused(x, caches[1])
    torch.testing.assert_close(padded, expected)
    torch.testing.assert_close(caches[1], caches[0])
    inputs = x, layer.qkv.weight, layer.proj.weight, layer.proj.bias
    for ours, theirs in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (padded, expected))):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_workers_leave_the_gradients_of_the_whole_batch_however_many_they_are(small):
    idx, threads, results = random_ids(7, 16), torch.get_num_threads(), []
    weights, half = list(small.parameters()), torch.tensor(0.5)
    expected = torch.autograd.grad(small(idx, idx)[1], weights)

    def loss(part):
        return small(part, part)[1] * (len(part) / len(idx))

    for training in False, True:
        small.train(training)
        try:
            for cores in 1, 2, 3, 8:
                torch.set_num_threads(cores)
                torch.manual_seed(0)
                total = Workers(4).gradients(loss, [(part,) for part in idx.split(2)], weights, half)
                assert torch.get_num_threads() == cores
                results.append([total] + [weight.grad for weight in weights])
        finally:
            torch.set_num_threads(threads)
    without, dropped = results[:4], results[4:]
    torch.testing.assert_close(without[0][1:], [gradient / 2 for gradient in expected])
    for runs in without, dropped:
        assert all(torch.equal(a, b) for run in runs[:3] for a, b in zip(runs[0], run))  # with eight cores, two share a part
        torch.testing.assert_close(runs[3], runs[0])
    assert not torch.allclose(dropped[0][0], without[0][0])


def test_each_part_of_a_batch_has_dropout_of_its_own():
    masks = {}

    def loss(number):
        masks[number] = keep_mask(torch.Size([1000]), 0.5, torch.float32)
        return weight.sum()

    weight, workers = torch.nn.Parameter(torch.ones(3)), Workers(2)
    for first in 0, 4:
        workers.gradients(loss, [(number,) for number in range(first, first + 4)], [weight], torch.ones(()))
    assert len({tuple(mask.tolist()) for mask in masks.values()}) == 8 and torch.equal(weight.grad, torch.full((3,), 4.0))


# sampling

@pytest.mark.parametrize("int8", [False, True])
def test_logits_with_the_cache_equal_logits_without(small, tmp_path, int8):
    if int8:
        save(tmp_path / "int8.pt", small, model=quantize_dynamic(small), int8=True)
        small, _ = load_model(tmp_path / "int8.pt")
    idx, decoder = random_ids(3, 16), Decoder(small, 3)
    expected, tolerance = small(idx)[0], 0.05 if int8 else 1e-4  # int8 scales its input by the largest number in it
    torch.testing.assert_close(decoder.prefill(idx[:, :5]), expected[:, 4], atol=tolerance, rtol=0)
    for t in range(5, 16):
        torch.testing.assert_close(decoder.step(idx[:, t]), expected[:, t], atol=tolerance, rtol=0)


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_text_and_losses_on_a_gpu_are_those_on_the_cpu(small):
    idx, long = random_ids(2, 3), random_ids(4, 16)
    text, loss = small.generate(idx, 40, temperature=0), small(long, long)[1]
    small.cuda()
    streams = [small.stream(idx.cuda(), 40, temperature=0) for _ in range(2)]  # past the window, so that a graph outlives a prefill
    for pair, expected in zip(zip(*streams), text[:, 3:].T, strict=True):  # two graphs, in turn
        assert all(torch.equal(tokens.cpu(), expected) for tokens in pair)
    torch.testing.assert_close(small(long.cuda(), long.cuda())[1].cpu(), loss, atol=1e-4, rtol=0)


def test_a_block_as_a_gpu_has_it_compiles_as_a_whole(small, monkeypatch):
    monkeypatch.setattr(model_module.CausalSelfAttention, "forward", model_module.CausalSelfAttention.forward_fused)
    monkeypatch.setattr(model_module.Dropout, "forward", torch.nn.Dropout.forward)
    idx = random_ids(3, 16)
    expected = small(idx)[0]
    for block in small.blocks:
        block.compile(backend="aot_eager", fullgraph=True)  # fails where a part would be left out
    torch.testing.assert_close(small(idx)[0], expected)
    small.train()(idx, idx)[1].backward()
    assert all(p.grad is not None for p in small.parameters())


def test_greedy_text_is_that_of_the_textbook_loop(small):
    idx = random_ids(2, 3)
    greedy = idx
    for _ in range(13):
        greedy = torch.cat([greedy, small(greedy)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(small.generate(idx, 13, temperature=0), greedy)


def test_past_the_window_the_recent_half_is_read_again(small):
    idx, new = random_ids(1, 4), 40
    text, start = idx, 0
    for _ in range(new):
        if text.shape[1] - start > 16:
            start = text.shape[1] - 8
        text = torch.cat([text, small(text[:, start:])[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(small.generate(idx, new, temperature=0), text)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
def test_prompts_of_any_length_are_continued(small, length):
    idx = random_ids(2, length)
    out = small.generate(idx, 20, seed=3)
    assert out.shape == (2, length + 20) and torch.equal(out[:, :length], idx) and out.max() < 50


def test_a_network_with_a_context_of_one_token_can_sample():
    assert GPT(GPTConfig(vocab_size=5, block_size=1, n_embd=4, n_head=2, n_layer=1)).generate(torch.zeros(1, 1).long(), 9).shape == (1, 10)


def test_same_seed_same_text_and_no_seed_another(small):
    idx = random_ids(1, 1)
    assert torch.equal(small.generate(idx, 300, seed=7), small.generate(idx, 300, seed=7))
    assert not torch.equal(small.generate(idx, 300, seed=7), small.generate(idx, 300, seed=8))
    assert not torch.equal(small.generate(idx, 300), small.generate(idx, 300))


def test_a_sample_does_not_depend_on_those_beside_it(small):
    five, fifty = (small.generate(random_ids(1, 1).expand(n, -1), 60, seed=7) for n in (5, 50))
    assert torch.equal(five, fifty[:5])
    assert len({tuple(row) for row in fifty.tolist()}) == 50


def test_an_empty_prompt_is_refused(small):
    with pytest.raises(ValueError, match="at least one token"):
        small.generate(torch.empty(1, 0).long(), 3)


def test_sampling_without_a_seed_leaves_the_random_state_of_training_alone(small):
    before = torch.get_rng_state()
    small.generate(random_ids(1, 1), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_sampling_leaves_the_mode_of_the_network_alone(small):
    small.train()
    small.generate(random_ids(1, 1), 3)
    assert small.training


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_ten_thousand_draws_follow_the_softmax(temperature):
    logits = torch.linspace(-1.5, 1.5, 20)
    draws = sample(logits.expand(10_000, -1), torch.rand(10_000, generator=torch.Generator().manual_seed(0)), temperature)
    counts = torch.bincount(draws, minlength=20).double()
    expected = 10_000 * (logits.double() / temperature).softmax(-1)
    assert chi_square(counts, expected) < 43.82  # the 99.9 % quantile for 19 degrees of freedom
    assert chi_square(counts, torch.full((20,), 500.0)) > 43.82  # and the test can tell another distribution


@pytest.mark.parametrize("top_k, top_p", [(1, None), (5, None), (None, 0.5), (None, 1e-9), (7, 0.6), (100, 1.0)])
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
    torch.testing.assert_close(share, (expected / expected.sum()).float(), atol=2e-4, rtol=0)
    assert not share[expected == 0].any()


def test_the_ends_of_the_unit_interval_draw_possible_tokens():
    logits = torch.tensor([[-1e9, 0.0, 1.0, -1e9]])
    assert sample(logits, torch.tensor([0.0])).item() == 1
    assert sample(logits, torch.tensor([1 - 2**-24])).item() == 2


# data

def test_the_split_of_the_published_text():
    train, val = split(np.arange(574_057), 256)
    assert (len(train), len(val)) == (516_651, 57_406) and val[0] == train[-1] + 1


def test_a_text_too_short_for_a_window_is_refused():
    split(np.arange(170), 16)  # 17 tokens to validate on: one window and its last target
    with pytest.raises(ValueError, match="has 16 tokens at most and must have more than block_size .16."):
        split(np.arange(160), 16)


def test_windows_side_by_side_cover_the_split_once():
    data = torch.arange(100)
    starts = side_by_side(data, 16)
    x, y = windows(data, starts, 16)
    assert x.flatten().tolist() == list(range(96)) and torch.equal(y, x + 1) and x.dtype == torch.int64
    assert torch.equal(side_by_side(data, 16, 100), starts)
    few = side_by_side(torch.arange(10_000), 16, 6)
    assert len(set(few.tolist())) == 6 and few[0] == 0 and few[-1] == 9_968 and all(few % 16 == 0)


def test_the_temperature_divides_the_logits_in_the_loss_alone(small):
    idx, targets = random_ids(2, 16), random_ids(2, 16)
    logits, loss = small(idx, targets, temperature=0.5)
    assert torch.equal(logits, small(idx)[0])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1) * 2, targets.flatten()))


def test_mean_loss_is_the_mean_over_all_tokens(small):
    data = random_ids(16 * 70 + 1)
    starts = side_by_side(data, 16)
    logits = small(data[:-1].view(70, 16))[0]
    assert mean_loss(small, data, starts) == pytest.approx(F.cross_entropy(logits.flatten(0, 1), data[1:]).item(), rel=1e-5)


# checkpoints

def save(path, network, **more):
    save_checkpoint(path, {"config": asdict(network.config), "model": network.state_dict(), "tokenizer": "abc", "iteration": 5,
                           "val_loss": 4.0} | more)


def test_a_checkpoint_brings_back_the_network(small, tmp_path):
    save(tmp_path / "model.pt", small)
    loaded, rest = load_model(str(tmp_path / "model.pt"), "abc")
    idx = random_ids(2, 16)
    assert torch.equal(loaded(idx)[0], small(idx)[0]) and rest["iteration"] == 5 and not loaded.training
    again = GPT(GPTConfig(**load_checkpoint(tmp_path / "model.pt")["config"]))
    again.load_state_dict(load_checkpoint(tmp_path / "model.pt")["model"])  # the form that is documented


def test_a_checkpoint_is_loaded_without_importing_the_compiler(small, tmp_path):  # which takes a second or two
    save(tmp_path / "model.pt", small)
    program = "import sys, model; model.load_model(sys.argv[1]); sys.exit('sympy' in sys.modules or 'torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program, tmp_path / "model.pt"], cwd=ROOT).returncode == 0


def test_an_int8_checkpoint_brings_back_the_same_logits(small, tmp_path):
    torch.manual_seed(0)
    published = GPT(GPTConfig()).eval()
    idx = random_ids(2, 64, vocab_size=500)
    save(tmp_path / "model.pt", published)
    save(tmp_path / "int8.pt", published, model=quantize_dynamic(published), int8=True)
    first, second = (load_model(tmp_path / "int8.pt", "abc")[0] for _ in range(2))
    assert torch.equal(first(idx)[0], second(idx)[0]) and isinstance(first.head, Int8Linear)
    error = (first(idx)[0] - published(idx)[0]).norm() / published(idx)[0].norm()
    assert 0 < error < 0.05
    assert (tmp_path / "int8.pt").stat().st_size <= 0.27 * (tmp_path / "model.pt").stat().st_size


@pytest.mark.parametrize("engine", ["x86", "qnnpack"])  # qnnpack is what ARM has; here it runs on any processor
def test_int8_works_with_the_kernels_of_either_processor(tmp_path, monkeypatch, engine):
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this PyTorch was built without {engine}")
    torch.manual_seed(0)
    network, idx = GPT(GPTConfig()).eval(), random_ids(2, 64, vocab_size=500)
    monkeypatch.setattr(model_module, "int8_engine", lambda: engine)
    save(tmp_path / "int8.pt", network, model=quantize_dynamic(network), int8=True)
    int8, _ = load_model(tmp_path / "int8.pt")
    assert (int8(idx)[0] - network(idx)[0]).norm() / network(idx)[0].norm() < 0.05
    assert torch.equal(int8.generate(idx, 5, seed=0), int8.generate(idx, 5, seed=0))


def test_a_pytorch_without_quantization_says_which_version_has_it(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.ao.quantization", None)  # importing it fails
    with pytest.raises(ValueError, match="the last version known to have it is 2.13"):
        quantize_dynamic(small)


def test_quantizing_and_loading_int8_print_no_warning(small, tmp_path, recwarn):
    save(tmp_path / "int8.pt", small, model=quantize_dynamic(small), int8=True)
    load_model(tmp_path / "int8.pt")[0](random_ids(1, 4))
    assert not recwarn.list


def test_a_foreign_tokenizer_is_refused(small, tmp_path):
    save(tmp_path / "model.pt", small)
    with pytest.raises(ValueError, match="another tokenizer"):
        load_model(tmp_path / "model.pt", "abd")


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


def write_bytes(change):
    def write(path, model):
        save(path, model)
        path.write_bytes(change(path.read_bytes()))
    return write


def flip(data):
    data = bytearray(data)
    data[len(data) // 2] ^= 1
    return bytes(data)


def compressed(path, model):
    save(path, model)
    with zipfile.ZipFile(path) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in entries.items():
            target.writestr(name, data)


BROKEN = {
    "empty": write_bytes(lambda data: b""), "truncated": write_bytes(lambda data: data[:-100]), "half": write_bytes(lambda data: data[:5000]),
    "one bit flipped": write_bytes(flip), "text": write_bytes(lambda data: b"no checkpoint"), "compressed": compressed,
    "a pickle that runs code": write_bytes(lambda data: pickle.dumps(Evil())),
    "code in a checkpoint": lambda path, model: torch.save({"config": {}, "model": {}, "x": Evil()}, path),
    "a list": lambda path, model: torch.save([1, 2], path), "no weights": lambda path, model: torch.save({"config": {}}, path),
    "an unknown setting": lambda path, model: save(path, model, config=asdict(model.config) | {"n_experts": 8}),
    "a huge config": lambda path, model: save(path, model, config=asdict(model.config) | {"n_embd": 10**7}),
    "other shapes": lambda path, model: save(path, model, config=asdict(model.config) | {"n_layer": 3}),
    "not finite": lambda path, model: save(path, model, model={k: v * float("nan") for k, v in model.state_dict().items()}),
    "not numbers": lambda path, model: save(path, model, model={k: "x" for k in model.state_dict()}),
    "other dtype": lambda path, model: save(path, model, model={k: v.long() for k, v in model.state_dict().items()}),
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
    with pytest.raises(Exception):
        save(tmp_path / "model.pt", small, bad=lambda: None)  # a function cannot be pickled
    assert (tmp_path / "model.pt").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["model.pt"]
