"""train.py: it learns, resumes bit for bit, is the same on two processes, and loses nothing."""
import contextlib
import errno
import fcntl
import json
import math
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tokenizer
import train as script
from conftest import ROOT, TINY, complaint, losses, metrics, run, same_weights, start, wait_for
from model import GPT, GPTConfig, attention, keep_mask, load_checkpoint, load_model
from tokenizer import PRETRAINED, BasicTokenizer
from train import PRESETS, TEACHER_SHARE, CoreThreads, parse_args, schedule, soft_targets

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def train(train_here, tiny_text):
    """Trains a tiny network on the tiny text, in this process, into a folder."""
    def train_into(folder, *flags):
        train_here(*TINY, "--data_path", tiny_text, "--out_dir", folder, *flags)

    return train_into


@pytest.fixture
def resume(train_here):
    """Goes on with the run in a folder."""
    return lambda folder, *flags: train_here("--resume", "--out_dir", folder, *flags)


# ---- what a run leaves ----

def test_a_run_learns_and_leaves_what_the_other_scripts_need(finished_run):
    rows = metrics(finished_run)
    assert [row["iteration"] for row in rows] == [0, 20, 40, 60]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 1
    assert rows[-1]["tokens_seen"] == 60 * 4 * 16
    assert rows[-1]["tokens_per_second"] > 0 and rows[-1]["grad_norm"] > 0
    for row in rows:
        for layer in 1, 2:
            assert 0 <= row[f"relu{layer}_dead"] <= row[f"relu{layer}_zeros"] <= 1
            assert row[f"relu{layer}_std"] > 0 and row[f"relu{layer}_grad_std"] > 0
    assert {path.name for path in finished_run.iterdir()} == {
        "merges.pkl", "vocab.pkl", "model.pt", "last.pt", "last.pt.old", "metrics.csv",
        "histograms.npz", ".lock", "stdout.txt"}


def test_a_histogram_is_that_of_numpy():
    values = torch.randn(3, 70_001, generator=torch.Generator().manual_seed(0))
    for t in values, values.relu(), torch.zeros(5), values[:1, :1]:
        counts, edges = script.histogram(t)
        expected, expected_edges = np.histogram(t.numpy(), 100)
        assert counts.sum() == t.numel() and np.allclose(edges, expected_edges, atol=1e-6)
        assert abs(counts - expected).max() <= 2  # of those on an edge, within rounding


def test_the_histograms_count_every_output(finished_run):
    row, windows = metrics(finished_run)[-1], 4  # as many as in a batch
    with np.load(finished_run / "histograms.npz", allow_pickle=False) as histograms:
        counts = histograms["relu_counts"]
        assert histograms["iteration"] == 60 and histograms["relu_edges"].shape == (2, 101)
        assert (counts.sum(1) == windows * 16 * 64).all()
        assert counts[0, 0] / counts[0].sum() >= row["relu1_zeros"]


def test_gradients_at_the_relus_are_of_the_mean_over_the_windows_there_are(
        tiny_text, tmp_path, new_trainer):
    stats = []
    for batch_size in 3, 64:
        trainer = new_trainer(*TINY, "--data_path", tiny_text, "--out_dir", tmp_path,
                              "--batch_size", batch_size)
        trainer.starts["train"] = trainer.starts["train"][:3]
        stats.append(trainer.inspect_relus()[0])
    assert stats[0] == pytest.approx(stats[1], rel=1e-4, abs=1e-9)


def test_it_prints_nats_per_token_and_per_character_and_a_sample(finished_run):
    printed, row = (finished_run / "stdout.txt").read_text(), metrics(finished_run)[-1]
    assert f"val loss {row['val_loss']:.4f} nats per token" in printed
    assert f"{row['val_nats_per_char']:.4f} per character" in printed
    assert "a sample" in printed and str(finished_run) in printed


def test_characters_are_characters_not_bytes(finished_run, tiny_text):
    tokenizer = BasicTokenizer(out_dir=finished_run)
    tokens = tokenizer.encode_array(tiny_text.read_text(encoding="utf-8"))
    val, row = tokens[int(0.9 * len(tokens)):], metrics(finished_run)[-1]
    per_char = row["val_loss"] * len(val) / len(tokenizer.decode(val.tolist()))
    assert row["val_nats_per_char"] == pytest.approx(per_char, rel=1e-3)


def test_model_pt_holds_the_best_weights_and_no_optimizer(finished_run):
    best = min(metrics(finished_run), key=lambda row: row["val_loss"])
    checkpoint = torch.load(finished_run / "model.pt", weights_only=True)
    assert checkpoint["iteration"] == best["iteration"]
    assert checkpoint["val_loss"] == best["val_loss"]
    assert not checkpoint.keys() & {"optimizers", "scaler", "batches", "random"}
    GPT(GPTConfig(**checkpoint["config"])).load_state_dict(checkpoint["model"])


def test_a_long_text_is_evaluated_in_part(tiny_text, tmp_path, monkeypatch, new_trainer):
    monkeypatch.setattr(script, "EVAL_TOKENS", 10 * 16 + 5)
    starts = new_trainer(*TINY, "--data_path", tiny_text, "--out_dir", tmp_path).starts
    assert len(starts["val"]) == len(starts["train"]) == 10 and starts["val"][-1] > 20 * 16


def test_even_windows_leave_no_part_of_the_text_out(tiny_text, tmp_path, new_trainer):
    starts = {}
    for seed in 1, 2:
        trainer = new_trainer(*TINY, "--data_path", tiny_text, "--out_dir", tmp_path / str(seed),
                              "--even_windows", 1, "--seed", seed)
        drawn, B, T = [], trainer.args.batch_size, trainer.args.block_size
        for trainer.tokens_seen in range(7 * B * T, 27 * B * T, B * T):
            drawn.append(trainer.window_starts(10**6))
        starts[seed] = torch.cat(drawn).sort().values
        edges = torch.tensor([0]), starts[seed], torch.tensor([10**6])
        assert 0 <= starts[seed][0] and torch.cat(edges).diff().max() < 3 * 10**6 / (20 * B)
    assert not torch.equal(starts[1], starts[2])


# ---- gradients ----

@pytest.fixture
def small():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=50, block_size=16, n_embd=22, n_head=4, n_layer=2)).eval()


def test_cores_leave_the_gradients_of_the_whole_batch_however_many_they_are(small):
    idx = torch.randint(50, (7, 16), generator=torch.Generator().manual_seed(1))
    weights, half = list(small.parameters()), torch.tensor(0.5)
    expected = torch.autograd.grad(small(idx, idx)[1], weights)
    threads, results = torch.get_num_threads(), []

    def loss(part):
        return small(part, part)[1] * (len(part) / len(idx))

    for training in False, True:
        small.train(training)
        try:
            for cores in 1, 2, 3, 8:
                torch.set_num_threads(cores)
                torch.manual_seed(0)
                parts = [(part,) for part in idx.split(2)]
                total = CoreThreads(4).gradients(loss, parts, weights, half)
                assert torch.get_num_threads() == cores
                results.append([total] + [weight.grad for weight in weights])
        finally:
            torch.set_num_threads(threads)
    without, dropped = results[:4], results[4:]
    torch.testing.assert_close(without[0][1:], [gradient / 2 for gradient in expected])
    for runs in without, dropped:
        assert all(torch.equal(a, b) for run in runs[:3] for a, b in zip(runs[0], run))
        torch.testing.assert_close(runs[3], runs[0])  # of eight cores, two share a part
    assert not torch.allclose(dropped[0][0], without[0][0])


def test_each_part_of_a_batch_has_dropout_of_its_own():
    masks, weight = {}, torch.nn.Parameter(torch.ones(3))

    def loss(number):
        masks[number] = keep_mask(torch.Size([1000]), 0.5, torch.float32)
        return weight.sum()

    threads = CoreThreads(2)
    for first in 0, 4:
        parts = [(number,) for number in range(first, first + 4)]
        threads.gradients(loss, parts, [weight], torch.ones(()))
    assert len({tuple(mask.tolist()) for mask in masks.values()}) == 8
    assert torch.equal(weight.grad, torch.full((3,), 4.0))


def graph_stand_in(function):
    """Does without a GPU what `cuda_graph` does: a first call for real, whose draws come again."""
    with torch.random.fork_rng():
        function()
    return function


def test_gradients_are_those_of_the_whole_batch_whichever_way_they_are_computed(
        tiny_text, tmp_path, new_trainer, monkeypatch):
    monkeypatch.setattr(script, "cuda_graph", graph_stand_in)
    trainer = new_trainer(*TINY, "--data_path", tiny_text, "--out_dir", tmp_path, "--batch_size", 9,
                          "--gradient_accumulation_steps", 3, "--dtype", "float32",
                          "--dropout", 0, "--attention_dropout", 0)
    weights, recorded = list(trainer.model.parameters()), trainer.recorded(trainer.plain_gradients)
    for _ in range(2):  # a second time the graph's inputs are filled anew
        batch = trainer.batch()
        idx, targets = (torch.cat(parts) for parts in list(zip(*batch))[:2])
        expected_loss = trainer.model(idx, targets)[1]
        expected = torch.autograd.grad(expected_loss, weights)
        for gradients in trainer.plain_gradients, trainer.core_gradients, recorded:
            torch.testing.assert_close(gradients(batch), expected_loss.detach())
            for p, gradient in zip(weights, expected, strict=True):
                torch.testing.assert_close(p.grad, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("muon_lr", [0, 0.02])
def test_recording_an_iteration_is_no_step(tiny_text, tmp_path, new_trainer, monkeypatch, muon_lr):
    monkeypatch.setattr(script, "cuda_graph", graph_stand_in)
    trainers = []
    for record in False, True:
        trainer = new_trainer(*TINY, "--data_path", tiny_text, "--out_dir", tmp_path,
                              "--muon_lr", muon_lr, "--gradient_accumulation_steps", 2)
        trainer.gradients = trainer.plain_gradients
        if record:
            trainer.learn = trainer.recorded(trainer.learn)
        for trainer.iteration in range(3):
            trainer.step()
        trainers.append(trainer)
    assert all(map(torch.equal, *(trainer.model.parameters() for trainer in trainers)))


@pytest.mark.parametrize("muon_lr", [0, 0.02])  # with Muon only one optimizer may overflow
def test_a_gradient_that_overflows_float16_is_skipped_and_the_scale_halved(
        tiny_text, tmp_path, new_trainer, muon_lr):
    trainer = new_trainer(*TINY, "--data_path", tiny_text, "--out_dir", tmp_path,
                          "--dtype", "float16", "--learning_rate", 1e-3, "--muon_lr", muon_lr)
    scale, skipped = 2.0**40, 0  # far too large
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    before = [p.clone() for p in trainer.model.parameters()]
    for _ in range(60):
        assert math.isfinite(trainer.step().item())
        if trainer.scaler.get_scale() < scale:
            assert skipped or all(map(torch.equal, before, trainer.model.parameters()))
            skipped, scale = skipped + 1, trainer.scaler.get_scale()
    assert skipped > 5 and not all(map(torch.equal, before, trainer.model.parameters()))
    assert all(p.isfinite().all() for p in trainer.model.parameters())


# ---- initial values ----

def test_heads_that_begin_by_looking_find_what_they_look_for():
    torch.manual_seed(0)
    network, tokens = GPT(GPTConfig(dropout=0.0)).eval(), torch.arange(500).repeat_interleave(3)
    network.init_weights(0.02)
    script.init_heads(network, tokens)
    assert torch.allclose(network.head.bias.softmax(0), torch.full((500,), 1 / 500))
    idx = torch.randperm(500, generator=torch.Generator().manual_seed(1))[:64].repeat(2)[None]
    weights = []
    for block in network.blocks:
        block.attn.qkv.register_forward_hook(lambda layer, inputs, output: weights.append(
            attention(*output.view(1, 128, 3, 6, 38).permute(2, 0, 3, 1, 4))[1][0]))
    network(idx)
    late = torch.arange(80, 128)
    for head in range(6):  # in the first layer each looks at one place before
        assert weights[0][head, late, late - head - 1].mean() > 0.5
    for head in range(2):  # in the second layer two look at what followed this token before
        assert weights[1][head, late, late - 63].mean() > 0.5


@pytest.mark.parametrize("sizes", [
    (1, 1, 1), (2, 1, 1), (3, 1, 2), (7, 7, 2), (12, 2, 3), (16, 3, 1), (230, 2, 2)])
def test_networks_of_all_sizes_can_begin_so(sizes):
    n_embd, n_head, n_layer = sizes
    network = GPT(GPTConfig(50, 8, n_embd, n_head, n_layer))
    script.init_heads(network, torch.arange(50))
    assert network(torch.zeros(1, 8).long())[0].isfinite().all()


# ---- optimizers ----

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_muon_is_that_of_pytorch_up_to_rounding(small, dtype, monkeypatch):
    """PyTorch's gets the matrices of queries, keys and values one by one, and the same format."""
    monkeypatch.setattr(script, "choose_dtype", lambda name, device: dtype)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.to(dtype))
    threefold = [block.attn.qkv.weight for block in small.blocks]
    others = [p for p in small.blocks.parameters()
              if p.dim() == 2 and all(p is not q for q in threefold)]
    ours = [part for p in threefold for part in p.detach().chunk(3)]
    ours += [p.detach() for p in others]  # views: they change with the network
    theirs = [torch.nn.Parameter(p.clone()) for p in ours]
    before = [p.clone() for p in ours]
    optimizers = [script.Muon(threefold + others, torch.tensor(0.02), 0.4, threefold),
                  torch.optim.Muon(theirs, 0.02, 0.4, ns_steps=script.MUON_STEPS)]
    for step in range(3):
        torch.manual_seed(step)
        for p in threefold + others:
            p.grad = torch.randn_like(p)
        grads = [part for p in threefold for part in p.grad.chunk(3)] + [p.grad for p in others]
        for q, grad in zip(theirs, grads):
            q.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, first in zip(ours, theirs, before):
        tolerance = max(1e-5, 3 * torch.finfo(dtype).eps)
        assert (p - q).norm() < tolerance * (q - first).norm()


def test_what_muon_makes_orthogonal_has_singular_values_near_one():
    torch.manual_seed(0)
    for shape in (3, 40, 30), (3, 30, 40), (1, 8, 8):
        values = torch.linalg.svdvals(script.orthogonal(torch.randn(shape), torch.float32))
        assert values.max() < 1.3 and values.median() > 0.6


def test_muon_computes_in_the_format_the_hardware_is_fast_in(small, monkeypatch):
    matrices = [p for p in small.blocks.parameters() if p.dim() == 2]
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    assert script.Muon(matrices, torch.tensor(0.1), 0.0, []).dtype == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert script.Muon(matrices, torch.tensor(0.1), 0.0, []).dtype == torch.bfloat16
    for capability, dtype in ((6, 0), torch.float16), ((7, 5), torch.float16), (
            (8, 0), torch.bfloat16), ((9, 0), torch.bfloat16):  # (7, 5) is a T4
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert script.choose_dtype("auto", torch.device("cuda:0")) == dtype


def test_a_run_saved_with_the_muon_of_pytorch_is_resumed(train, resume, tmp_path):
    flags = "--preset", "fast", "--max_iters", 8, "--eval_interval", 4, "--lr_decay_iters", 16
    train(tmp_path / "a", *flags)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    last = load_checkpoint(tmp_path / "b" / "last.pt")
    adamw, muon = (state["param_groups"] for state in last["optimizers"])
    for group in adamw:
        group |= {"lr": 1e-4, "capturable": False}
    muon[0] |= {"lr": 1e-3, "momentum": 0.95, "nesterov": True, "ns_steps": 5, "eps": 1e-7,
                "ns_coefficients": (3.4445, -4.775, 2.0315), "adjust_lr_fn": None}
    torch.save(last, tmp_path / "b" / "last.pt")
    for name in "ab":
        resume(tmp_path / name, "--max_iters", 16)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert same_weights(tmp_path / "a", tmp_path / "b")


# ---- the same run again ----

def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(train, tmp_path):
    for name, seed in ("a", 1), ("b", 1), ("c", 2):
        train(tmp_path / name, "--max_iters", 6, "--eval_interval", 3, "--seed", seed)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_a_run_does_not_depend_on_how_many_cores_share_its_batches(train, tmp_path):
    threads = torch.get_num_threads()
    try:
        for cores in 1, 2, 3:
            torch.set_num_threads(cores)
            train(tmp_path / str(cores), "--gradient_accumulation_steps", 3, "--max_iters", 6)
    finally:
        torch.set_num_threads(threads)
    assert same_weights(tmp_path / "1", tmp_path / "2")
    assert same_weights(tmp_path / "1", tmp_path / "3")


@pytest.mark.parametrize("flags", [
    [], ["--warmup_iters", 5, "--lr_decay_iters", 30, "--grad_clip", 0.5, "--eval_iters", 2,
         "--gradient_accumulation_steps", 2],
    ["--preset", "fast", "--bpe_dropout", 0.1]], ids=["published", "schedule", "fast"])
def test_a_stopped_and_resumed_run_equals_an_unbroken_one(train, resume, tmp_path, capsys, flags):
    train(tmp_path / "unbroken", "--max_iters", 30, "--eval_interval", 10, *flags)
    train(tmp_path / "stopped", "--max_iters", 10, "--eval_interval", 10, *flags)
    resume(tmp_path / "stopped", "--max_iters", 30)  # the other flags are kept
    note = "note: --max_iters was 10 when this run was saved and is 30 from here on"
    assert note in capsys.readouterr().out
    assert losses(tmp_path / "stopped") == losses(tmp_path / "unbroken")
    assert same_weights(tmp_path / "stopped", tmp_path / "unbroken")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(train, resume, tiny_text, tmp_path, number):
    flags = ["--max_iters", 200, "--eval_interval", 100]
    process = start("train.py", *TINY, "--data_path", tiny_text, "--out_dir", tmp_path / "run",
                    *flags)
    wait_for((tmp_path / "run" / "last.pt").exists, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and err == "\nfinishing, then saving\n"
    assert f"train.py --resume --out_dir {tmp_path / 'run'}" in out
    resume(tmp_path / "run")
    train(tmp_path / "unbroken", *flags)
    assert losses(tmp_path / "run") == losses(tmp_path / "unbroken")
    assert same_weights(tmp_path / "run", tmp_path / "unbroken")


# ---- stopping, whoever reads ----

@pytest.fixture
def long_run(tiny_text, tmp_path):
    """Starts a long training, waits until it trains, and kills it in the end if it still does."""
    processes, command = [], ["train.py", *TINY, "--data_path", tiny_text, "--out_dir", tmp_path,
                              "--max_iters", 100_000]

    def start_one(*flags, **options):
        processes.append(start(*command, *flags, **options))
        wait_for((tmp_path / "last.pt").exists, processes[-1])
        time.sleep(0.5)
        return processes[-1]

    yield start_one
    for process in processes:
        process.kill()
        process.wait()


def saved_after_the_start(folder):
    return load_checkpoint(folder / "last.pt")["iteration"] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("output", ["closed", "a pipe nobody reads any more"])
def test_a_stop_is_saved_whatever_the_output_is(long_run, tmp_path, output, number):
    if output == "closed":
        process = long_run(preexec_fn=lambda: (os.close(1), os.close(2)))
    else:
        process = long_run(stderr=subprocess.STDOUT)
        process.stdout.close()
    process.send_signal(number)
    assert process.wait(60) == 128 + number or output.startswith("a pipe")
    assert saved_after_the_start(tmp_path)


def test_a_full_disk_under_its_output_ends_no_run(monkeypatch, tmp_path):
    monkeypatch.setattr(script.signal, "signal", lambda *args: None)
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        stop = script.Stop()
        stop.tell("iteration 20: ...")
        stop.tell("iteration 40: ...")
        monkeypatch.undo()
        assert not stop.requested
        with pytest.raises(OSError):
            full.close()


def test_a_terminal_that_is_closed_ends_the_run_saved(long_run, tmp_path):
    terminal, line = pty.openpty()

    def take_terminal():
        fcntl.ioctl(line, termios.TIOCSCTTY, 0)

    process = long_run(stdin=line, stdout=line, stderr=line, start_new_session=True,
                       preexec_fn=take_terminal)
    os.close(line), os.close(terminal)  # the system sends SIGHUP, and writing fails from now on
    assert process.wait(60) == 128 + signal.SIGHUP and saved_after_the_start(tmp_path)


def test_ctrl_c_that_ends_the_reader_of_the_pipe_too_is_saved(tiny_text, tmp_path):
    command = [sys.executable, ROOT / "train.py", *TINY, "--data_path", tiny_text,
               "--out_dir", tmp_path / "run", "--max_iters", 100_000, "--eval_interval", 20]
    pipeline = f"{shlex.join(map(str, command))} 2>&1 | tee {tmp_path / 'log'}"
    process = subprocess.Popen(["bash", "-c", pipeline], start_new_session=True,
                               stdout=subprocess.DEVNULL)
    wait_for((tmp_path / "run" / "last.pt.old").exists, process)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    while True:  # the shell need not wait for it
        with contextlib.suppress(ValueError):
            script.lock(tmp_path / "run").close()
            break
        time.sleep(0.1)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["iteration"] > 20


def test_a_run_ends_saved_where_its_reader_has_gone(long_run, tmp_path):
    process = long_run("--eval_interval", 1)
    process.stdout.close()
    assert process.wait(60) == 0 and not process.stderr.read()
    assert saved_after_the_start(tmp_path)


def test_a_signal_ignored_from_the_start_stays_ignored(long_run, tmp_path):
    process = long_run(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))  # nohup
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM and saved_after_the_start(tmp_path)


def test_a_second_ctrl_c_ends_at_once_unless_it_is_the_first_passed_on(monkeypatch, capfd):
    clock = iter([10, 12, 14])
    monkeypatch.setattr(script.signal, "signal", lambda *args: None)
    monkeypatch.setattr(script.time, "monotonic", lambda: next(clock))
    stop = script.Stop()
    stop.note(signal.SIGINT, None)
    stop.note(signal.SIGINT, None)  # from torchrun, say, after the terminal's
    with pytest.raises(KeyboardInterrupt):
        stop.note(signal.SIGINT, None)
    assert stop.requested and stop.status == 130
    assert capfd.readouterr().err == "\nfinishing, then saving\n"


# ---- resuming what is damaged, moved or another ----

@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:5000]),
                                    lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_a_damaged_last_pt_is_noticed_and_its_predecessor_used(resume, tiny_run, capsys, damage):
    damage(tiny_run / "last.pt")
    damaged = (tiny_run / "last.pt").exists()
    resume(tiny_run)
    assert losses(tiny_run)[60] and load_checkpoint(tiny_run / "last.pt")["iteration"] == 60
    err = capsys.readouterr().err
    assert ("last.pt is not a checkpoint" in err) == damaged
    assert (f"going on from {tiny_run / 'last.pt.old'}, iteration 40" in err) == damaged


def test_resuming_what_is_not_that_run_is_refused(resume, tiny_run, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("quite another text. " * 500)
    for flags, message in (["--n_layer", 3], "another network"), (
            ["--data_path", tmp_path / "other.txt"], "not those this run began with"), (
            ["--max_iters", 50], "at iteration 60 already"), (["--muon_lr", 0.1], "without Muon"):
        with pytest.raises(ValueError, match=message):
            resume(tiny_run, *flags)
    with pytest.raises(ValueError, match="nothing to resume"):
        resume(tmp_path / "empty")
    for flags in ["--seed", 2], ["--preset", "fast"]:
        with pytest.raises(SystemExit):
            resume(tiny_run, *flags)
        assert flags[0] in capsys.readouterr().err.splitlines()[-1]


def test_flags_given_anew_take_effect_when_resuming(resume, tiny_run, capsys):
    resume(tiny_run, "--weight_decay", 0.5, "--beta2", 0.9, "--dropout", 0, "--batch_size", 8,
           "--max_iters", 62)
    note = "--weight_decay was 0.01 when this run was saved and is 0.5"
    assert note in capsys.readouterr().out
    last = load_checkpoint(tiny_run / "last.pt")
    groups = last["optimizers"][0]["param_groups"]
    assert last["config"]["dropout"] == 0
    assert [(group["weight_decay"], group["betas"][1]) for group in groups] == [(0.5, 0.9),
                                                                                (0.0, 0.9)]
    assert metrics(tiny_run)[-1]["tokens_seen"] == (60 * 4 + 2 * 8) * 16


def test_a_run_of_any_number_of_evaluations_can_be_resumed(resume, tiny_run):
    last = load_checkpoint(tiny_run / "last.pt")
    columns, row = last["columns"], last["metrics"][-1:]
    torch.save(last | {"metrics": row.repeat(30_000, 1)}, tiny_run / "last.pt")
    resume(tiny_run, "--max_iters", 62)
    last = load_checkpoint(tiny_run / "last.pt")
    assert last["columns"] == columns and last["metrics"].shape == (30_001, len(columns))
    assert torch.equal(last["metrics"][:1], row)


def test_a_last_pt_with_weights_of_another_type_or_absurd_metrics_is_refused(resume, tiny_run):
    last = load_checkpoint(tiny_run / "last.pt")
    weights = {name: weight.bfloat16() for name, weight in last["model"].items()}
    for change in {"model": weights}, {"metrics": last["metrics"] * torch.inf}:
        torch.save(last | change, tiny_run / "last.pt")
        with pytest.raises(ValueError, match="last.pt does not hold the state of this training"):
            resume(tiny_run, "--max_iters", 62)


def test_a_run_saved_on_another_device_goes_on_and_says_so(resume, tiny_run, capsys):
    last, state = load_checkpoint(tiny_run / "last.pt"), torch.zeros(16, dtype=torch.uint8)
    other = {"device": "cuda", "batches": state, "random": [state], "scaler": {}}
    torch.save(last | other, tiny_run / "last.pt")
    resume(tiny_run, "--max_iters", 62)
    assert "saved on 1 x cuda, going on on 1 x cpu" in capsys.readouterr().out
    first_batches = torch.Generator().manual_seed(1337)
    for _ in range(2):
        torch.randint(100, (4,), generator=first_batches)
    batches = load_checkpoint(tiny_run / "last.pt")["batches"]
    assert not torch.equal(batches, first_batches.get_state())  # they are not drawn again


def test_a_run_made_longer_takes_its_schedule_along(train, tmp_path):
    train(tmp_path, "--preset", "fast", "--max_iters", 4)
    for flags, expected in ([], 4), (["--max_iters", "8"], 8), (
            ["--max_iters", "8", "--lr_decay_iters", "4"], 4):
        args, last = parse_args(["--resume", "--out_dir", str(tmp_path), *flags])
        assert args.lr_decay_iters == expected and last["iteration"] == 4


def test_a_new_run_moves_the_earlier_one_aside(train, tiny_run, capsys):
    before = (tiny_run / "model.pt").read_bytes()
    (tiny_run / "notes.txt").write_text("the user's own")
    train(tiny_run, "--max_iters", 2)
    assert "moved the earlier run to" in capsys.readouterr().out
    assert (tiny_run / "earlier-1" / "model.pt").read_bytes() == before
    assert (tiny_run / "earlier-1" / "merges.pkl").exists() and (tiny_run / "notes.txt").exists()
    assert [row["iteration"] for row in metrics(tiny_run)] == [0, 2]


def test_the_run_moved_aside_could_be_resumed_only_where_it_could(train, tiny_run, capsys):
    train(tiny_run, "--max_iters", 1)
    assert "(--resume would have continued it)" in capsys.readouterr().out
    for path in tiny_run.glob("last.pt*"):
        path.unlink()
    train(tiny_run, "--max_iters", 1)
    printed = capsys.readouterr().out
    assert "moved the earlier run to" in printed and "--resume would" not in printed


def test_a_refused_run_prints_no_note_of_a_changed_flag(resume, tiny_run, capsys):
    with pytest.raises(ValueError, match="has another network"):
        resume(tiny_run, "--n_layer", 3)
    assert "note:" not in capsys.readouterr().out


def test_a_run_is_resumed_where_it_was_moved_with_its_text_and_teacher(
        train, resume, tiny_text, tiny_run, tmp_path, monkeypatch, capsys):
    project = tmp_path / "project"
    (project / "runs").mkdir(parents=True)
    shutil.copy(tiny_text, project / "text.txt")
    shutil.copytree(tiny_run, project / "runs" / "teacher")
    train(project / "runs" / "a", "--data_path", project / "text.txt", "--max_iters", 2,
          "--teacher", project / "runs" / "teacher" / "model.pt")
    monkeypatch.chdir(tmp_path)
    for number, place in enumerate(("renamed", "deep/er/renamed"), 3):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        project = project.rename(tmp_path / place)
        resume(f"{place}/runs/a", "--max_iters", number)  # seen from here
        assert capsys.readouterr().out.count("note:") == 1  # --max_iters
    shutil.move(project / "runs" / "a", tmp_path / "alone")
    resume(tmp_path / "alone", "--max_iters", 5)  # text and teacher are where they were
    assert losses(tmp_path / "alone")[5]
    (project / "text.txt").unlink()
    with pytest.raises(ValueError, match=f"no text at {project / 'text.txt'}"):
        resume(tmp_path / "alone", "--max_iters", 6)


def test_the_default_text_of_a_moved_repository_is_found_at_the_default_place(
        train, resume, tiny_text, tmp_path, monkeypatch, capsys):
    old, new = tmp_path / "old" / "input.txt", tmp_path / "new" / "input.txt"
    for path in old, new:
        path.parent.mkdir()
        shutil.copy(tiny_text, path)
    train(tmp_path / "a", "--data_path", old, "--max_iters", 2)
    old.unlink()
    monkeypatch.setattr(script, "DEFAULT_TEXT", new)
    resume(tmp_path / "a", "--max_iters", 3)
    new.write_text("quite another text. " * 500)
    with pytest.raises(ValueError, match="not those this run began with"):
        resume(tmp_path / "a", "--max_iters", 4)


# ---- which tokenizer ----

@pytest.fixture
def other_text(tmp_path):
    path = tmp_path / "other.txt"
    path.write_text("".join(f"{n * n} bottles hang on wall {n}\n" for n in range(600)))
    return path


def test_another_text_sets_aside_the_run_and_its_tokenizer_together(train, tiny_run, other_text,
                                                                    capsys):
    old = BasicTokenizer(out_dir=tiny_run)
    shutil.copy(tiny_run / "model.pt", tiny_run / "best.pt")  # a name of the user's
    train(tiny_run, "--data_path", other_text, "--max_iters", 2)
    assert "is on another text" in capsys.readouterr().out
    new = BasicTokenizer(out_dir=tiny_run)
    assert new.merges == BasicTokenizer(other_text, 300, out_dir=None).merges != old.merges
    load_model(tiny_run / "model.pt", new.fingerprint)
    for name in "model.pt", "best.pt":
        load_model(tiny_run / "earlier-1" / name, old.fingerprint)
    assert BasicTokenizer(out_dir=tiny_run / "earlier-1").merges == old.merges
    train(tiny_run, "--data_path", other_text, "--max_iters", 2)  # the same text: the same tokens
    assert BasicTokenizer(out_dir=tiny_run / "earlier-2").merges == new.merges
    assert "bytes a token of this text" in capsys.readouterr().out


def test_a_tokenizer_alone_is_used_and_told_of(train, tiny_run, other_text, capsys):
    for path in tiny_run.glob("*.pt*"):
        path.unlink()
    before = (tiny_run / "merges.pkl").read_bytes()
    train(tiny_run, "--data_path", other_text, "--max_iters", 1)
    assert (tiny_run / "merges.pkl").read_bytes() == before
    tokens = BasicTokenizer(out_dir=tiny_run).encode_array(other_text.read_bytes())
    ratio = other_text.stat().st_size / len(tokens)
    assert f"using the tokenizer that is in {tiny_run}: {ratio:.2f} bytes a token" in (
        capsys.readouterr().out)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_network_whose_tokenizer_was_lost_is_filed_with_no_other(train, tiny_run, other_text,
                                                                   replaced):
    for name in "merges.pkl", "vocab.pkl":
        (tiny_run / name).unlink()
    if replaced:  # by hand
        BasicTokenizer(other_text, 300, out_dir=tiny_run / "other")
        for name in "merges.pkl", "vocab.pkl":
            shutil.copy(tiny_run / "other" / name, tiny_run)
    train(tiny_run, "--data_path", other_text, "--max_iters", 1)
    assert not (tiny_run / "earlier-1" / "merges.pkl").exists()
    assert (tiny_run / "earlier-1" / "model.pt").exists()


def test_a_tokenizer_that_was_lost_and_is_learned_again_is_filed_with_its_network(train, tiny_run):
    (tiny_run / "merges.pkl").unlink()
    train(tiny_run, "--max_iters", 1)
    fingerprint = BasicTokenizer(out_dir=tiny_run / "earlier-1").fingerprint
    load_model(tiny_run / "earlier-1" / "model.pt", fingerprint)


def test_a_start_that_is_refused_leaves_nothing(train, finished_run, other_text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("the cat sat on the mat. " * 20)  # long enough in bytes, not in tokens
    for flags, message in ((["--data_path", short, "--vocab_size", 270], "too short"),
                           (["--data_path", other_text, "--vocab_size", 10_000], "vocab_size can"),
                           (["--data_path", other_text, "--teacher", finished_run / "model.pt"],
                            "with another tokenizer")):
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "run", *flags)
        assert not (tmp_path / "run").exists()


# ---- texts larger than memory ----

@pytest.fixture
def mapped(monkeypatch):
    """Every text is long, and read and encoded in blocks of 3,000 bytes."""
    for name, value in ("LONG", 6000), ("PIECE", 1000), ("BLOCK", 3000):
        monkeypatch.setattr(tokenizer, name, value)
    monkeypatch.setattr(tokenizer, "usable_cores", lambda: 2)


def test_a_text_mapped_from_a_file_trains_as_one_in_memory(train, resume, tmp_path, mapped,
                                                           monkeypatch, capsys):
    train(tmp_path / "mapped", "--max_iters", 4, "--eval_interval", 2)
    assert "learning from" in capsys.readouterr().out
    (tmp_path / "memory").mkdir()
    for name in "merges.pkl", "vocab.pkl":
        shutil.copy(tmp_path / "mapped" / name, tmp_path / "memory")
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "LONG", 10**6)
        train(tmp_path / "memory", "--max_iters", 4, "--eval_interval", 2)
    columns = [[{name: row[name] for name in row.keys() - {"seconds", "tokens_per_second"}}
                for row in metrics(tmp_path / folder)] for folder in ("mapped", "memory")]
    assert repr(columns[0]) == repr(columns[1])  # nan is not equal to itself
    assert same_weights(tmp_path / "mapped", tmp_path / "memory")
    assert not (tmp_path / "memory" / "tokens.bin").exists()
    # Either goes on from the other, and from the file that is there.
    (tmp_path / "mapped" / "tokens.bin").rename(tmp_path / "memory" / "tokens.bin")
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "encode_file", None)
        resume(tmp_path / "memory", "--max_iters", 6)
        patch.setattr(tokenizer, "LONG", 10**6)
        resume(tmp_path / "mapped", "--max_iters", 6)
    assert same_weights(tmp_path / "mapped", tmp_path / "memory")


def test_the_tokens_of_a_long_text_stay_where_they_are(train, tmp_path, mapped, monkeypatch):
    train(tmp_path, "--max_iters", 1)
    made = (tmp_path / "tokens.bin").stat().st_ino
    monkeypatch.setattr(tokenizer, "encode_file", None)
    train(tmp_path, "--max_iters", 1)
    assert (tmp_path / "tokens.bin").stat().st_ino == made
    assert not list(tmp_path.glob("earlier-1/tokens.bin")) and (tmp_path / "earlier-1").exists()


def test_another_long_text_gets_a_tokenizer_without_encoding_it_by_the_old_one(
        train_here, tiny_text, tmp_path, mapped, capsys):
    train_here(*TINY, "--data_path", tiny_text, "--out_dir", tmp_path, "--max_iters", 1)
    other = tmp_path / "other.txt"
    other.write_text(tiny_text.read_text(encoding="utf-8").upper(), encoding="utf-8")
    capsys.readouterr()
    train_here(*TINY, "--data_path", other, "--out_dir", tmp_path, "--max_iters", 1)
    said = capsys.readouterr().out
    assert "is on another text" in said and "moved the earlier run" in said
    old, new = (BasicTokenizer(out_dir=folder) for folder in (tmp_path / "earlier-1", tmp_path))
    assert old.fingerprint != new.fingerprint
    assert json.loads((tmp_path / "tokens.bin").read_bytes()[:4096])["tokenizer"] == new.fingerprint


def test_presets_train_on_a_long_text_without_bpe_dropout_and_say_so(
        new_trainer, tiny_text, tmp_path, mapped, capsys):
    flags = *TINY, "--data_path", tiny_text, "--out_dir", tmp_path / "a", "--preset", "best"
    trainer = new_trainer(*flags)
    assert trainer.args.bpe_dropout == 0
    assert capsys.readouterr().out.count("without BPE-dropout") == 1
    assert trainer.training_tokens() is trainer.data["train"]


def test_a_network_on_a_long_text_is_quantized_alike(finished_run, tiny_text, tmp_path, mapped,
                                                     monkeypatch, capsys):
    import quantize

    said = []
    for limit in 10**6, 6000:
        monkeypatch.setattr(tokenizer, "LONG", limit)
        run = shutil.copytree(finished_run, tmp_path / str(limit))
        flags = "--out_dir", run, "--data_path", tiny_text
        monkeypatch.setattr(sys, "argv", ["quantize.py", *map(str, flags)])
        quantize.main()
        captured = capsys.readouterr()
        said += [[line for line in captured.out.splitlines() if "loss" in line], captured.err]
    assert said[:2] == said[2:] and len(said[0]) == 2 and not said[1]
    assert (run / "tokens.bin").exists()


# ---- starting from another network ----

def test_a_run_starts_from_another_network_on_another_text(train, train_here, resume, finished_run,
                                                           tiny_text, other_text, tmp_path):
    model = shutil.copytree(finished_run, tmp_path / "source") / "model.pt"
    _, entries = load_model(model)
    flags = ["--device", "cpu", "--batch_size", 4, "--init_from", model]
    train_here(*flags, "--data_path", tiny_text, "--out_dir", tmp_path / "same", "--max_iters", 1)
    assert losses(tmp_path / "same")[0][1] == pytest.approx(entries["val_loss"])
    flags += ["--data_path", other_text, "--preset", "fast", "--max_iters", 4]
    train_here(*flags, "--out_dir", tmp_path / "run")
    train(tmp_path / "nothing", "--data_path", other_text, "--max_iters", 1)
    assert losses(tmp_path / "run")[0][1] < losses(tmp_path / "nothing")[0][1]
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    assert last["config"] == entries["config"] | {"dropout": 0.05, "attention_dropout": 0.0}
    assert last["tokenizer"] == entries["tokenizer"] != load_checkpoint(
        tmp_path / "nothing" / "last.pt")["tokenizer"]
    train_here(*flags, "--out_dir", tmp_path / "stopped", "--max_iters", 2, "--lr_decay_iters", 4)
    shutil.rmtree(tmp_path / "source")
    resume(tmp_path / "stopped", "--max_iters", 4)  # which needs the other network no more
    assert same_weights(tmp_path / "stopped", tmp_path / "run")


def test_a_network_that_no_run_can_start_from_is_refused(train_here, quantized_run, tiny_text,
                                                         tmp_path, capsys):
    (tmp_path / "alone").mkdir()
    alone = shutil.copy(quantized_run / "model.pt", tmp_path / "alone")
    flags = ["--device", "cpu", "--data_path", tiny_text, "--out_dir", tmp_path / "run"]
    for model, message in ((quantized_run / "model_int8.pt", "is int8: name the model.pt"),
                           (tiny_text, "is not a checkpoint"), (alone, "no merges.pkl beside")):
        with pytest.raises(ValueError, match=message):
            train_here(*flags, "--init_from", model)
    shutil.copy(PRETRAINED / "vocab.pkl", tmp_path / "alone")
    shutil.copy(PRETRAINED / "merges.pkl", tmp_path / "alone")
    with pytest.raises(ValueError, match="was trained with another tokenizer"):
        train_here(*flags, "--init_from", alone)
    model = quantized_run / "model.pt"
    for more, message in ((["--n_layer", 3], "--n_layer 3 differs from that of --init_from"),
                          (["--vocab_size", 500], "--vocab_size 500 differs"),
                          (["--out_dir", quantized_run], "lies in --out_dir"),
                          (["--init_from", tmp_path / "none.pt"], "no file at --init_from"),
                          (["--resume", "--out_dir", quantized_run], "needs it no more")):
        with pytest.raises(SystemExit) as end:
            train_here(*flags, "--init_from", model, *more)
        assert end.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- teachers ----

def test_what_a_teacher_expects_is_mixed_with_what_came(finished_run):
    teacher, _ = load_model(finished_run / "model.pt")
    idx = torch.randint(300, (3, 16), generator=torch.Generator().manual_seed(1))
    soft, came = soft_targets(idx, teacher, idx, temperature=0.5), F.one_hot(idx, 300).float()
    expected = (teacher(idx)[0] / 0.5).softmax(-1)
    torch.testing.assert_close(soft, TEACHER_SHARE * expected + (1 - TEACHER_SHARE) * came)
    student = GPT(GPTConfig(vocab_size=300, block_size=16, n_embd=8, n_head=1, n_layer=1)).eval()
    logits, loss = student(idx, soft)
    torch.testing.assert_close(loss, -(soft * logits.log_softmax(-1)).sum(-1).mean())
    torch.testing.assert_close(student(idx, came)[1], student(idx, idx)[1])


def test_teachers_take_turns(tiny_text, finished_run, tmp_path, monkeypatch, new_trainer):
    for name in "abc":
        shutil.copy(finished_run / "model.pt", tmp_path / name)
    asked, turns = [], []

    def ask(targets, teacher, *rest):
        asked.append(teacher)
        return soft_targets(targets, teacher, *rest)

    monkeypatch.setattr(script, "soft_targets", ask)
    trainer = new_trainer(*TINY, "--data_path", tiny_text, "--out_dir", tmp_path / "run",
                          "--gradient_accumulation_steps", 4,
                          "--teacher", *(tmp_path / name for name in "abc"))
    for trainer.iteration in range(3):
        turns += [teacher for _, _, teacher in trainer.batch()]
        trainer.step()
    assert len(asked) == 12
    assert [asked.count(teacher) for teacher in trainer.teachers] == [4, 4, 4]
    assert len({*map(id, turns[:3])}) == 3  # within an iteration
    assert len({*map(id, turns[::4])}) == 3  # and from one to the next


def test_a_student_resumes_bit_for_bit_and_learns_faster_than_alone(train, resume, finished_run,
                                                                    tmp_path, monkeypatch):
    teacher, other = tmp_path / "a teacher.pt", tmp_path / "other.pt"
    flags = ("--eval_interval", 10, "--learning_rate", "3e-3")
    shutil.copy(finished_run / "model.pt", teacher)
    train(tmp_path / "alone", "--max_iters", 30, *flags)
    shutil.copy(tmp_path / "alone" / "model.pt", other)
    for name, iterations in ("unbroken", 30), ("stopped", 10):
        train(tmp_path / name, "--max_iters", iterations, *flags,
              "--teacher", os.path.relpath(teacher), other)
    monkeypatch.chdir(tmp_path)
    resume(tmp_path / "stopped", "--max_iters", 30)  # from another folder
    assert losses(tmp_path / "stopped") == losses(tmp_path / "unbroken")
    assert same_weights(tmp_path / "stopped", tmp_path / "unbroken")
    assert losses(tmp_path / "unbroken")[30][1] < losses(tmp_path / "alone")[30][1]
    with pytest.raises(ValueError, match="not what this run began with"):
        resume(tmp_path / "stopped", "--teacher", teacher)
    shutil.copy(tmp_path / "stopped" / "model.pt", other)
    with pytest.raises(ValueError, match="not what this run began with"):
        resume(tmp_path / "stopped")


def test_a_teacher_that_cannot_teach_is_refused(train, train_here, tiny_text, quantized_run,
                                                tmp_path, capsys):
    model, text = quantized_run / "model.pt", tiny_text.read_bytes()
    (tmp_path / "same").mkdir()
    for name in "merges.pkl", "vocab.pkl":
        shutil.copy(quantized_run / name, tmp_path / "same")
    # the text turned: the teacher was trained on what the student would be validated on
    (tmp_path / "turned.txt").write_bytes(text[len(text) // 5:] + text[:len(text) // 5])
    for flags, message in ((["--teacher", model, "--vocab_size", 301], "with another tokenizer"),
                           (["--teacher", model, "--block_size", 17], "a context of 16 tokens"),
                           (["--teacher", quantized_run / "model_int8.pt"], "name the model.pt"),
                           (["--teacher", model, "--data_path", tmp_path / "turned.txt",
                             "--out_dir", tmp_path / "same"], "was trained on another text")):
        with pytest.raises(ValueError, match=message):
            train(tmp_path / message, *flags)
    for flags, message in ((["--teacher", tmp_path / "model.pt"], "no file at --teacher"),
                           (["--teacher", model, "--out_dir", quantized_run], "lies in --out_dir")):
        with pytest.raises(SystemExit):
            train(tmp_path, *flags)
        assert message in capsys.readouterr().err


# ---- what can go wrong ----

def test_a_second_run_in_the_same_folder_is_refused(train, resume, tiny_text, tmp_path):
    first = start("train.py", *TINY, "--data_path", tiny_text, "--out_dir", tmp_path,
                  "--max_iters", 100_000, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for((tmp_path / "last.pt").exists, first)
        for second in train, resume:
            with pytest.raises(ValueError, match="another training is running in"):
                second(tmp_path)
    finally:
        first.kill()
        first.wait()


def test_a_drive_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def none(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("fcntl.flock", none)
    script.lock(tmp_path).close()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(train, tmp_path):
    with pytest.raises(ValueError, match="not a finite number: .*--learning_rate"):
        train(tmp_path, "--learning_rate", "1e30", "--max_iters", 50)
    weights = load_checkpoint(tmp_path / "last.pt")["model"].values()
    assert all(tensor.isfinite().all() for tensor in weights)


def test_a_folder_that_cannot_be_written_says_so(train, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in tmp_path / "file", tmp_path / "file" / "sub":
        with pytest.raises(OSError, match=f"cannot write into --out_dir {folder}"):
            train(folder)


def test_a_tokenizer_of_another_size_is_refused(train, tiny_run):
    for path in tiny_run.glob("*.pt*"):
        path.unlink()
    with pytest.raises(ValueError, match="has 300 tokens, not 301"):
        train(tiny_run, "--vocab_size", 301)


def test_compiling_is_for_cuda(train, tmp_path):
    with pytest.raises(ValueError, match="--compile is for CUDA"):
        train(tmp_path, "--compile")


def test_where_compiling_fails_training_goes_on_unless_it_was_asked_for(
        tiny_text, tmp_path, new_trainer, monkeypatch, capsys):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    trainer = new_trainer(*TINY, "--data_path", tiny_text, "--out_dir", tmp_path)
    trainer.compiled = True
    trainer.compile_blocks()
    assert not trainer.compiled and math.isfinite(trainer.step().item())
    assert "note: torch.compile failed" in capsys.readouterr().out
    trainer.args.compile = True
    with pytest.raises(ValueError, match="torch.compile failed.*: train with --no-compile"):
        trainer.compile_blocks()


def test_the_networks_that_come_with_the_repository_are_never_trained_over(train):
    before = sorted((path, path.stat().st_mtime_ns) for path in PRETRAINED.glob("*"))
    with pytest.raises(ValueError, match="choose another folder"):
        train(PRETRAINED, "--max_iters", 1)
    assert sorted((path, path.stat().st_mtime_ns) for path in PRETRAINED.glob("*")) == before


def test_without_a_terminal_lines_tell_how_far_it_is(train, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "TELL_SECONDS", 0)
    train(tmp_path, "--max_iters", 3)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("iteration 2")]
    assert re.fullmatch(r"iteration 2 of 3: loss \d\.\d+, [\d,]+ tokens/s, 00:00 left", told[0])


def test_a_lack_of_memory_while_compiling_is_told_as_such(tiny_text, tmp_path, new_trainer,
                                                           monkeypatch):
    def compile_badly(module):
        def fail(*inputs):
            raise torch.OutOfMemoryError("CUDA out of memory")

        module._compiled_call_impl = fail

    trainer = new_trainer(*TINY, "--data_path", tiny_text, "--out_dir", tmp_path)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_badly)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.compile_blocks()


# ---- flags ----

def test_the_defaults_are_the_published_hyperparameters():
    args, _ = parse_args([])
    assert (args.batch_size, args.block_size, args.max_iters) == (64, 256, 5000)
    assert (args.eval_interval, args.learning_rate, args.vocab_size) == (500, 3e-4, 500)
    assert (args.n_embd, args.n_head, args.n_layer, args.dropout) == (232, 6, 5, 0.2)
    assert {schedule(i, args) for i in (0, 10, 4999)} == {1.0}
    network = GPTConfig()
    assert {name: getattr(args, name) for name in vars(network)} == vars(network)


def test_a_preset_gives_the_flags_that_are_not_given():
    for preset, flags in PRESETS.items():
        args, _ = parse_args(["--preset", preset, "--weight_decay", "0.7"])
        assert args.weight_decay == 0.7
        expected = flags | {"weight_decay": 0.7}
        if preset != "reference":
            expected["lr_decay_iters"] = args.max_iters
        assert {name: getattr(args, name) for name in expected} == expected
        assert args.max_iters <= 5000
        assert (args.block_size, args.vocab_size) == (256, 500)
    assert parse_args(["--preset", "fast", "--max_iters", "40"])[0].lr_decay_iters == 40


def test_the_schedule_warms_up_and_follows_a_cosine():
    args, _ = parse_args(["--warmup_iters", "10", "--lr_decay_iters", "110",
                          "--learning_rate", "1", "--min_lr", "0.2"])
    assert schedule(0, args) == 0.1 and schedule(9, args) == 1.0
    assert schedule(60, args) == pytest.approx(0.6)
    assert schedule(110, args) == schedule(5000, args) == pytest.approx(0.2)


def test_a_training_temperature_changes_the_training_and_not_the_measure(train, tmp_path):
    for name, temperature in ("a", 1), ("b", 0.5):
        train(tmp_path / name, "--max_iters", 6, "--eval_interval", 3,
              "--train_temperature", temperature)
    first, second = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert first[0] == second[0] and first[3] != second[3]


# ---- more than one process ----

def torchrun(folder, text, *args, script=ROOT / "train.py"):
    """Returns the command that trains on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2,
               script, *TINY, "--data_path", text, "--out_dir", folder, *args]
    return [*map(str, command)]


def run_two(*args, **options):
    """Trains on two processes, to the end. Returns what was printed."""
    process = subprocess.run(torchrun(*args, **options), capture_output=True, text=True,
                             timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_two_processes_follow_the_curve_of_one(train, tiny_text, tmp_path):
    flags = ["--max_iters", 20, "--eval_interval", 1, "--dropout", 0, "--attention_dropout", 0,
             "--learning_rate", "1e-2", "--dtype", "float32"]
    train(tmp_path / "one", *flags)
    run_two(tmp_path / "two", tiny_text, *flags)
    train(tmp_path / "joined", *flags, "--max_iters", 10)
    printed = run_two(tmp_path / "joined", tiny_text, "--resume", "--max_iters", 20)
    assert "differs from an unbroken run" in printed  # though not in its batches
    one, two, joined = (losses(tmp_path / name) for name in ("one", "two", "joined"))
    assert len(one) == len(two) == len(joined) == 21 and one[20][1] < one[0][1] - 1
    for iteration in one:
        assert two[iteration] == pytest.approx(one[iteration], abs=1e-4)
        assert joined[iteration] == pytest.approx(one[iteration], abs=1e-4)


def test_one_of_two_processes_encodes_a_long_text_and_both_map_it(train, tiny_text, tmp_path):
    short = tmp_path / "limits.py"
    short.write_text(f"import os, sys\nsys.path[:0] = [{str(ROOT)!r}]\nimport tokenizer, train\n"
                     "tokenizer.LONG, tokenizer.PIECE, encode = 6000, 1000, tokenizer.encode_file\n"
                     "def encode_file(*args):\n"
                     "    print('encoding on rank', os.environ['RANK'])\n"
                     "    encode(*args)\n"
                     "tokenizer.encode_file = encode_file\n"
                     "tokenizer.run_script(train.main)\n")
    flags = ("--max_iters", 4, "--eval_interval", 2, "--dropout", 0, "--attention_dropout", 0,
             "--dtype", "float32")
    printed = run_two(tmp_path / "long", tiny_text, *flags, script=short)
    assert printed.count("encoding on rank 0") == 1 and "encoding on rank 1" not in printed
    (tmp_path / "short").mkdir()
    for name in "merges.pkl", "vocab.pkl":
        shutil.copy(tmp_path / "long" / name, tmp_path / "short")
    train(tmp_path / "short", *flags)
    one, two = losses(tmp_path / "short"), losses(tmp_path / "long")
    assert two[4] == pytest.approx(one[4], abs=1e-4)


def test_two_processes_with_a_teacher_resume_bit_for_bit(tiny_text, finished_run, tmp_path):
    run_two(tmp_path / "unbroken", tiny_text, "--teacher", finished_run / "model.pt",
            "--max_iters", 20, "--eval_interval", 10)
    stopped = shutil.copytree(tmp_path / "unbroken", tmp_path / "stopped")
    (stopped / "last.pt.old").replace(stopped / "last.pt")  # as it was at iteration 10
    assert load_checkpoint(stopped / "last.pt")["iteration"] == 10
    run_two(stopped, tiny_text, "--resume")
    assert losses(stopped) == losses(tmp_path / "unbroken")
    assert same_weights(stopped, tmp_path / "unbroken")


def test_two_processes_start_from_another_network_with_a_teacher(finished_run, tiny_text, tmp_path):
    model = finished_run / "model.pt"
    run_two(tmp_path / "two", tiny_text, "--init_from", model, "--teacher", model, "--max_iters", 1)
    expected = min(row["val_loss"] for row in metrics(finished_run))
    assert losses(tmp_path / "two")[0][1] == pytest.approx(expected, abs=1e-4)


def test_an_interrupt_ends_all_processes_and_saves(tiny_text, tmp_path):
    process = subprocess.Popen(torchrun(tmp_path, tiny_text, "--max_iters", 100_000), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    wait_for((tmp_path / "last.pt").exists, process)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
    out, _ = process.communicate(timeout=60)
    assert "stopped and saved at iteration" in out
    assert load_checkpoint(tmp_path / "last.pt")["iteration"] > 0


# ---- on a GPU ----

@needs_gpu
@pytest.mark.parametrize("flags", [["--dtype", "float32", "--no-compile"], ["--dtype", "float16"],
                                   ["--dtype", "float16", "--preset", "fast"], []])
def test_a_gpu_trains_and_resumes(train, resume, tmp_path, flags):
    flags = ["--device", "cuda", "--n_embd", 228, "--n_head", 6, "--eval_interval", 10, *flags]
    train(tmp_path / "stopped", *flags, "--max_iters", 20)
    resume(tmp_path / "stopped", "--max_iters", 30)
    assert losses(tmp_path / "stopped")[30][1] < losses(tmp_path / "stopped")[0][1]
    train(tmp_path / "unbroken", *flags, "--max_iters", 30)
    resumed, unbroken = (load_checkpoint(tmp_path / name / "last.pt")["random"]
                         for name in ("stopped", "unbroken"))
    assert all(map(torch.equal, resumed, unbroken))  # as much dropout was drawn


@needs_gpu
def test_a_recorded_batch_trains_as_its_operations_one_by_one_do(train, tmp_path, monkeypatch):
    flags = ["--device", "cuda", "--dtype", "float32", "--no-compile", "--dropout", 0,
             "--attention_dropout", 0, "--gradient_accumulation_steps", 2, "--max_iters", 40,
             "--eval_interval", 20]
    train(tmp_path / "recorded", *flags)
    monkeypatch.setattr(script, "cuda_graph", lambda function: function)
    train(tmp_path / "one by one", *flags)
    recorded, one_by_one = losses(tmp_path / "recorded"), losses(tmp_path / "one by one")
    for iteration in recorded:
        assert recorded[iteration] == pytest.approx(one_by_one[iteration], abs=1e-4)


# ---- the first run of a fresh clone ----

@pytest.fixture
def fresh_clone(tmp_path):
    """The scripts alone, in a folder without a text, and a network where nothing answers."""
    (tmp_path / "data").mkdir()
    for name in "train.py", "model.py", "tokenizer.py", "data/prepare.py":
        shutil.copy(ROOT / name, tmp_path / name)
    proxies = ("http_proxy", "https_proxy", "HTTPS_PROXY")
    return tmp_path, os.environ | dict.fromkeys(proxies, "http://127.0.0.1:9")


def test_without_text_and_network_it_says_what_to_do(fresh_clone):
    folder, env = fresh_clone
    assert "--data_path" in complaint(run(folder / "train.py", *TINY, env=env))
    assert not (folder / "checkpoints" / "model.pt").exists()


def test_the_default_text_is_used_where_it_lies(fresh_clone, tiny_text):
    folder, env = fresh_clone
    shutil.copy(tiny_text, folder / "data" / "input.txt")
    process = run(folder / "train.py", *TINY, "--max_iters", 2, env=env)
    assert process.returncode == 0, process.stderr
    assert (folder / "checkpoints" / "model.pt").exists()
