"""train.py: it learns, resumes bit for bit, is the same on two processes, and loses nothing."""
import errno
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import time
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import quantize
import tokenizer
import train as script
from conftest import ROOT, TINY, losses, metrics, same_weights, start, wait_for
from model import GPT, GPTConfig, attention, keep_mask, load_checkpoint, load_model
from tokenizer import PRETRAINED, BasicTokenizer
from train import PRESETS, CoreThreads, load_last, parse_args, schedule

PLAIN = "--dtype", "float32", "--dropout", 0, "--attention_dropout", 0
NOHUP = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def train(train_here, tiny_text):
    """Trains a tiny network on the tiny text, here, for an iteration unless told otherwise."""
    default = *TINY, "--data_path", tiny_text, "--max_iters", 1
    return lambda folder, *flags: train_here(*default, "--out_dir", folder, *flags)


@pytest.fixture
def resume(train_here):
    """Goes on with the run in a folder."""
    return lambda folder, *flags: train_here("--resume", "--out_dir", folder, *flags)


@pytest.fixture
def make_trainer(new_trainer, tiny_text, tmp_path):
    """Makes a Trainer of a tiny network on the tiny text."""
    default = *TINY, "--data_path", tiny_text, "--out_dir", tmp_path
    return lambda *flags: new_trainer(*default, *flags)


@pytest.fixture
def refusal(capsys):
    """Returns the message with which train or resume is refused, usage errors included."""
    def refusal_of(call, *args):
        capsys.readouterr()
        with pytest.raises((ValueError, OSError, SystemExit)) as caught:
            call(*args)
        out, err = capsys.readouterr()
        assert "note:" not in out
        return err if caught.type is SystemExit else str(caught.value)

    return refusal_of


@pytest.fixture
def other_text(tmp_path):
    path = tmp_path / "other.txt"
    path.write_text("".join(f"{n * n} bottles hang on wall {n}\n" for n in range(600)))
    return path


def same_run(a, b):
    return losses(a) == losses(b) and same_weights(a, b)


# ---- what a run leaves ----

def test_a_run_learns_and_leaves_what_scripts_need(finished_run):
    rows, (_, entries) = metrics(finished_run), load_model(finished_run / "model.pt")
    best, last = min(rows, key=lambda row: row["val_loss"]), rows[-1]
    assert [row["iteration"] for row in rows] == [0, 20, 40, 60]
    assert last["val_loss"] < rows[0]["val_loss"] - 1
    assert last["tokens_per_second"] > 0 and last["grad_norm"] > 0
    assert (entries["iteration"], entries["val_loss"]) == (best["iteration"], best["val_loss"])
    assert not entries.keys() & {"optimizers", "scaler", "batches", "random"}


def test_it_prints_losses_per_token_and_character(finished_run, tiny_text):
    printed, row = (finished_run / "stdout.txt").read_text(), metrics(finished_run)[-1]
    tokenizer = BasicTokenizer(out_dir=finished_run)
    tokens = tokenizer.encode_array(tiny_text.read_bytes())
    val = tokens[int(0.9 * len(tokens)):]
    per_char = row["val_loss"] * len(val) / len(tokenizer.decode(val.tolist()))  # not per byte
    assert row["val_nats_per_char"] == pytest.approx(per_char, rel=1e-3)
    for text in (f"val loss {row['val_loss']:.4f} nats per token",
                 f"{row['val_nats_per_char']:.4f} per character", str(finished_run)):
        assert text in printed


def test_a_histogram_is_that_of_numpy():
    values = torch.randn(3, 70_001, generator=torch.Generator().manual_seed(0))
    for t in values, values.relu(), torch.zeros(5):
        counts, edges = script.histogram(t)
        expected, expected_edges = np.histogram(t.numpy(), 100)
        assert counts.sum() == t.numel() and np.allclose(edges, expected_edges, atol=1e-6)
        assert abs(counts - expected).max() <= 2  # of those on an edge, within rounding


def test_every_output_of_every_relu_is_measured(finished_run):
    row = metrics(finished_run)[-1]
    with np.load(finished_run / "histograms.npz") as histograms:
        assert histograms["iteration"] == 60
        for layer, counts in enumerate(histograms["relu_counts"], 1):
            dead, zeros, grad_std = (row[f"relu{layer}_{name}"]
                                     for name in ("dead", "zeros", "grad_std"))
            assert counts.sum() == 4 * 16 * 64  # as many windows as in a batch
            assert 0 <= dead <= zeros <= counts[0] / counts.sum() and grad_std > 0


def test_relu_gradients_are_of_the_mean_over_the_windows(make_trainer):
    stats = []
    for batch_size in 3, 64:
        trainer = make_trainer("--batch_size", batch_size)
        trainer.starts["train"] = trainer.starts["train"][:3]
        stats.append(trainer.inspect_relus()[0])
    assert stats[0] == pytest.approx(stats[1], rel=1e-4, abs=1e-9)


def test_a_long_text_is_evaluated_in_part(monkeypatch, make_trainer):
    monkeypatch.setattr(script, "EVAL_TOKENS", 10 * 16 + 5)
    starts = make_trainer().starts
    assert len(starts["val"]) == len(starts["train"]) == 10 and starts["val"][-1] > 20 * 16


def test_even_windows_leave_no_part_of_the_text_out(make_trainer):
    drawn = {}
    for seed in 1, 2:
        trainer = make_trainer("--even_windows", 1, "--seed", seed)
        batches = range(7 * 64, 27 * 64, 64)  # of 4 windows of 16 tokens
        starts = [trainer.window_starts(10**6) for trainer.tokens_seen in batches]
        drawn[seed] = torch.cat([*starts, torch.tensor([0, 10**6])]).sort().values
        assert drawn[seed][0] == 0 and drawn[seed].diff().max() < 3 * 10**6 / (20 * 4)
    assert not torch.equal(drawn[1], drawn[2])


# ---- gradients ----

def test_each_part_of_a_batch_has_dropout_of_its_own():
    masks, weight = [], torch.nn.Parameter(torch.ones(3))

    def loss():
        masks.append(keep_mask(torch.Size([1000]), 0.5, torch.float32))
        return weight.sum()

    threads = CoreThreads(2)
    for _ in range(2):
        threads.gradients(loss, [()] * 4, [weight], torch.ones(()))
    assert len({tuple(mask.tolist()) for mask in masks}) == 8


def graph_stand_in(function):
    """Does without a GPU what `cuda_graph` does: a first call for real, whose draws come again."""
    with torch.random.fork_rng():
        function()
    return function


def test_gradients_are_those_of_the_whole_batch_however_computed(make_trainer, monkeypatch):
    monkeypatch.setattr(script, "cuda_graph", graph_stand_in)
    trainer = make_trainer("--batch_size", 9, "--gradient_accumulation_steps", 3,
                           "--train_temperature", 0.5, *PLAIN)
    weights, recorded = list(trainer.model.parameters()), trainer.recorded(trainer.plain_gradients)
    for _ in range(2):  # a second time the graph's inputs are filled anew
        batch = trainer.batch()
        idx, targets = (torch.cat(parts) for parts in list(zip(*batch))[:2])
        expected_loss = trainer.model(idx, targets, 0.5)[1]
        expected = torch.autograd.grad(expected_loss, weights)
        for gradients in trainer.plain_gradients, trainer.core_gradients, recorded:
            torch.testing.assert_close(gradients(batch), expected_loss.detach())
            for p, gradient in zip(weights, expected, strict=True):
                torch.testing.assert_close(p.grad, gradient, atol=1e-6, rtol=1e-4)


def test_recording_an_iteration_is_no_step(make_trainer, monkeypatch):
    monkeypatch.setattr(script, "cuda_graph", graph_stand_in)
    trainers = []
    for record in False, True:
        trainer = make_trainer("--muon_lr", 0.02, "--gradient_accumulation_steps", 2)
        trainer.gradients = trainer.plain_gradients
        if record:
            trainer.learn = trainer.recorded(trainer.learn)
        for trainer.iteration in range(3):
            trainer.step()
        trainers.append(trainer)
    assert all(map(torch.equal, *(trainer.model.parameters() for trainer in trainers)))


@pytest.mark.parametrize("muon_lr", [0, 0.02])  # with Muon only one optimizer may overflow
def test_a_gradient_that_overflows_float16_is_skipped(make_trainer, muon_lr):
    trainer = make_trainer("--dtype", "float16", "--learning_rate", 1e-3, "--muon_lr", muon_lr)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # far too large
    weights = list(trainer.model.parameters())
    before = [p.clone() for p in weights]
    trainer.step()
    assert trainer.scaler.get_scale() == 2.0**39 and all(map(torch.equal, before, weights))
    for _ in range(59):
        assert math.isfinite(trainer.step().item())
    assert trainer.scaler.get_scale() < 2.0**34 and not all(map(torch.equal, before, weights))


# ---- initial values ----

def test_initial_heads_find_what_they_look_for():
    torch.manual_seed(0)
    network, tokens = GPT(GPTConfig(dropout=0.0)).eval(), torch.arange(999) % 500
    network.init_weights(0.02)
    script.init_heads(network, tokens)
    counts = torch.tensor([3.0] * 499 + [2.0])  # one more than there are
    assert torch.allclose(network.head.bias.softmax(0), counts / 1499)
    idx = torch.randperm(500, generator=torch.Generator().manual_seed(1))[:64].repeat(2)[None]
    weights, late = [], torch.arange(80, 128)
    for block in network.blocks:
        block.attn.qkv.register_forward_hook(lambda layer, inputs, output: weights.append(
            attention(*output.view(1, 128, 3, 6, 38).permute(2, 0, 3, 1, 4))[1][0]))
    network(idx)
    for head in range(6):  # in the first layer each looks at one place before
        assert weights[0][head, late, late - head - 1].mean() > 0.5
    for head in range(2):  # in the second layer two look at what followed this token before
        assert weights[1][head, late, late - 63].mean() > 0.5


@pytest.mark.parametrize("n_embd, n_head, n_layer", [
    (1, 1, 1), (3, 1, 2), (7, 7, 2), (12, 2, 3), (16, 3, 1), (230, 2, 2)])
def test_networks_of_all_sizes_can_have_initial_heads(n_embd, n_head, n_layer):
    network = GPT(GPTConfig(50, 8, n_embd, n_head, n_layer))
    script.init_heads(network, torch.arange(50))
    assert network(torch.zeros(1, 8).long())[0].isfinite().all()


# ---- optimizers ----

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_muon_is_that_of_pytorch_up_to_rounding(dtype, monkeypatch):
    """PyTorch's gets the matrices of queries, keys and values one by one, and the same format."""
    def one_by_one(tensors):
        return [part for t in tensors for part in t.detach().chunk(3 if len(t) == 60 else 1)]

    monkeypatch.setattr(script, "choose_dtype", lambda name, device: {"auto": dtype}[name])
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.to(dtype))
    args, _ = parse_args(["--muon_lr", "0.02", "--weight_decay", "0.4"])
    torch.manual_seed(0)
    network = GPT(GPTConfig(vocab_size=50, block_size=16, n_embd=22, n_head=4, n_layer=2))
    matrices = [p for p in network.blocks.parameters() if p.dim() == 2]
    before = [p.clone() for p in one_by_one(matrices)]
    theirs = [torch.nn.Parameter(p.clone()) for p in before]
    optimizers = [script.build_optimizers(network, args)[1],
                  torch.optim.Muon(theirs, 0.02, 0.4, ns_steps=3)]
    for _ in range(3):
        for p in matrices:
            p.grad = torch.randn_like(p)
        for q, grad in zip(theirs, one_by_one(p.grad for p in matrices)):
            q.grad = grad
        for optimizer in optimizers:
            optimizer.step()
    for p, q, first in zip(one_by_one(matrices), theirs, before):
        tolerance = max(1e-5, 3 * torch.finfo(dtype).eps)
        assert (p - q).norm() < tolerance * (q - first).norm()


@pytest.mark.parametrize("on_cpu, capability, formats", [
    (False, (7, 5), [torch.float32, torch.float16]),  # (7, 5) is a T4
    (True, (8, 0), [torch.bfloat16, torch.bfloat16])])
def test_the_number_format_is_one_the_hardware_is_fast_in(on_cpu, capability, formats, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: on_cpu, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert [script.choose_dtype("auto", torch.device(name)) for name in ("cpu", "cuda")] == formats


# ---- the same run again ----

def test_a_run_depends_on_its_seed_and_not_on_the_cores(train, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "limit_threads", lambda: None)
    a, b, c, d = (tmp_path / name for name in "abcd")
    threads = torch.get_num_threads()
    for folder, cores, seed in (a, 1, 1), (b, 2, 1), (c, 3, 1), (d, 3, 2):
        torch.set_num_threads(cores)
        train(folder, "--gradient_accumulation_steps", 3, "--max_iters", 6, "--seed", seed)
        assert torch.get_num_threads() == cores
    torch.set_num_threads(threads)
    assert same_run(a, b) and same_run(b, c) and losses(c) != losses(d)


@pytest.mark.parametrize("flags", [
    ["--preset", "fast", "--bpe_dropout", 0.1],
    ["--preset", "fast", "--lr_decay_iters", 30, "--init_from", "MODEL", "--data_path", "OTHER"],
    ["--warmup_iters", 5, "--lr_decay_iters", 30, "--grad_clip", 0.5, "--eval_iters", 2,
     "--gradient_accumulation_steps", 2, "--teacher", "MODEL", "MODEL"]])
def test_a_stopped_and_resumed_run_equals_an_unbroken_one(
        train, resume, tiny_run, other_text, tmp_path, monkeypatch, capsys, flags):
    unbroken, stopped, model = tmp_path / "unbroken", tmp_path / "stopped", tiny_run / "model.pt"
    files = {"MODEL": os.path.relpath(model), "OTHER": other_text}
    flags = [files.get(flag, flag) for flag in flags]
    for folder, iterations in (unbroken, 30), (stopped, 10):
        train(folder, "--max_iters", iterations, "--eval_interval", 10, *flags)
    if "--init_from" in flags:
        model.unlink()  # it is needed no more
    last = load_last(stopped)
    for group in (group for state in last["optimizers"] for group in state["param_groups"]):
        group |= {"lr": 1e-4, "capturable": False, "ns_steps": 5}  # as PyTorch's own leave it
    torch.save(last, stopped / "last.pt")
    monkeypatch.chdir(tmp_path)
    resume("stopped", "--max_iters", 30)  # the other flags are kept
    note = "note: --max_iters was 10 when this run was saved and is 30 from here on"
    assert note in capsys.readouterr().out and same_run(stopped, unbroken)
    last, expected = (load_last(folder)["args"] for folder in (stopped, unbroken))
    assert last["lr_decay_iters"] == expected["lr_decay_iters"]  # the schedule, too, is longer now


# ---- stopping, whoever reads ----

@pytest.fixture
def long_run(tiny_text, tmp_path):
    """Starts long trainings, waits until they train, and kills them in the end."""
    processes = []

    def start_one(*flags, **options):
        process = start(ROOT / "train.py", *TINY, "--data_path", tiny_text, "--out_dir", tmp_path,
                        "--max_iters", 100_000, *flags, **options)
        processes.append(process)
        wait_for((tmp_path / "last.pt").exists, process)
        time.sleep(0.5)
        return process

    yield start_one
    for process in processes:
        process.kill()
        process.wait()


def test_under_nohup_a_run_holds_its_folder_until_ctrl_c_saves_it_and_says_how_to_go_on(
        long_run, train, resume, tmp_path, refusal):
    process = long_run(preexec_fn=NOHUP)
    for second in train, resume:
        assert "another training is running in" in refusal(second, tmp_path)
    for number in signal.SIGHUP, signal.SIGINT:  # the first stays ignored
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT and err == "\nfinishing, then saving\n"
    assert f"train.py --resume --out_dir {tmp_path}" in out
    last = load_last(tmp_path)
    assert math.isnan(last["val_loss"]) == (last["iteration"] % 500 > 0)  # not of these weights
    flags = "--max_iters", last["iteration"] + 5
    resume(tmp_path, *flags)
    train(tmp_path / "unbroken", *flags)
    assert same_run(tmp_path, tmp_path / "unbroken")


@pytest.mark.parametrize("output, number", [("closed", signal.SIGHUP), ("unread", signal.SIGTERM)])
def test_a_stop_is_saved_whatever_the_output_is(long_run, tmp_path, output, number):
    if output == "closed":
        process = long_run(preexec_fn=lambda: (os.close(1), os.close(2)))
    else:
        process = long_run(stderr=subprocess.STDOUT)
        process.stdout.close()
    process.send_signal(number)
    assert process.wait(60) == 128 + number or output == "unread"
    assert load_last(tmp_path)["iteration"] > 0


def test_a_run_ends_saved_where_its_reader_has_gone(long_run, tmp_path):
    process = long_run("--eval_interval", 1)
    process.stdout.close()
    assert process.wait(60) == 0 and not process.stderr.read()
    assert load_last(tmp_path)["iteration"] > 0


def fail(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_under_its_output_ends_no_run(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setattr(script.tqdm, "write", fail)
    stop = script.Stop()
    stop.tell("iteration 20: ...")
    assert not stop.requested


def test_a_second_ctrl_c_ends_at_once_unless_passed_on(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setattr(time, "monotonic", iter([10, 12, 14]).__next__)
    stop = script.Stop()
    stop.note(signal.SIGINT, None)
    stop.note(signal.SIGINT, None)  # from torchrun, say, after the terminal's
    with pytest.raises(KeyboardInterrupt):
        stop.note(signal.SIGINT, None)


# ---- resuming what is damaged, moved or another ----

@pytest.mark.parametrize("gone", [False, True])
def test_where_last_pt_is_damaged_or_gone_its_predecessor_serves(resume, tiny_run, capsys, gone):
    last = tiny_run / "last.pt"
    last.write_bytes(last.read_bytes()[:5000])
    if gone:
        last.unlink()
    resume(tiny_run)
    assert load_last(tiny_run)["iteration"] == 60
    err = capsys.readouterr().err
    assert gone or "last.pt is not a checkpoint" in err
    assert (f"going on from {last}.old, iteration 40" in err) != gone


def test_resuming_what_is_not_that_run_is_refused(resume, tiny_run, tmp_path, other_text, refusal):
    for message, *flags in (("another network", "--n_layer", 3),
                            (f"{other_text}: not what this run", "--data_path", other_text),
                            ("at iteration 60 already", "--max_iters", 50),
                            ("without Muon", "--muon_lr", 0.1),
                            ("error: --seed was 1337", "--seed", 2),
                            ("error: --preset is", "--preset", "fast"),
                            ("needs it no more", "--init_from", tiny_run / "model.pt")):
        assert message in refusal(resume, tiny_run, *flags)
    assert "nothing to resume" in refusal(resume, tmp_path / "empty")
    last = load_last(tiny_run)
    weights = {name: weight.bfloat16() for name, weight in last["model"].items()}
    for change in ({"model": weights}, {"metrics": last["metrics"] * torch.inf},
                   {"metrics": last["metrics"][:1].expand(10**6, -1)}):  # a row's bytes in a file
        torch.save(last | change, tiny_run / "last.pt")
        assert "last.pt does not hold the state of this training" in refusal(resume, tiny_run)


def test_a_run_of_any_length_takes_flags_given_anew(resume, tiny_run, capsys):
    last = load_last(tiny_run)
    row = last["metrics"][-1:]
    torch.save(last | {"metrics": row.repeat(30_000, 1)}, tiny_run / "last.pt")
    resume(tiny_run, "--weight_decay", 0.5, "--beta2", 0.9, "--dropout", 0, "--batch_size", 8,
           "--max_iters", 62)
    note = "--weight_decay was 0.01 when this run was saved and is 0.5"
    assert note in capsys.readouterr().out
    last = load_last(tiny_run)
    groups = last["optimizers"][0]["param_groups"]
    assert last["config"]["dropout"] == 0
    assert [group["weight_decay"] for group in groups] == [0.5, 0]
    assert {group["betas"][1] for group in groups} == {0.9}
    assert len(last["metrics"]) == 30_001 and torch.equal(last["metrics"][:1], row)
    assert metrics(tiny_run)[-1]["tokens_seen"] == (60 * 4 + 2 * 8) * 16


def test_a_run_saved_on_another_device_goes_on_and_says_so(resume, tiny_run, capsys):
    last, state = load_last(tiny_run), torch.zeros(16, dtype=torch.uint8)
    other = {"device": "cuda", "batches": state, "random": [state], "scaler": {}}
    torch.save(last | other, tiny_run / "last.pt")
    resume(tiny_run, "--max_iters", 61)
    assert "saved on 1 x cuda, going on on 1 x cpu" in capsys.readouterr().out
    first = torch.Generator().manual_seed(1337)
    torch.randint(100, (4,), generator=first)
    batches = load_last(tiny_run)["batches"]
    assert not torch.equal(batches, first.get_state())  # the first batch is not drawn again


def test_a_moved_run_finds_its_text_and_teacher(
        train, resume, tiny_text, tiny_run, tmp_path, monkeypatch, capsys, refusal):
    monkeypatch.setattr(script, "DEFAULT_TEXT", tmp_path / "input.txt")
    monkeypatch.chdir(tmp_path)
    project = tmp_path / "project"
    shutil.copytree(tiny_run, project / "runs" / "teacher")
    shutil.copy(tiny_text, project / "input.txt")
    train(project / "runs" / "a", "--data_path", project / "input.txt",
          "--teacher", project / "runs" / "teacher" / "model.pt")
    for number, place in enumerate(("renamed", "deep/er/renamed"), 2):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        project = project.rename(tmp_path / place)
        resume(f"{place}/runs/a", "--max_iters", number)  # seen from here
        assert capsys.readouterr().out.count("note:") == 1  # --max_iters
    a = project / "runs" / "a"
    text = (project / "input.txt").rename(tmp_path / "text.txt")
    assert f"no text at {project / 'input.txt'}" in refusal(resume, a)
    text.rename(script.DEFAULT_TEXT)
    resume(a, "--max_iters", 4)
    shutil.copy(a / "model.pt", project / "runs" / "teacher")
    assert "not what this run began with" in refusal(resume, a)


# ---- what lies there already ----

def test_a_new_run_moves_the_earlier_one_aside(train, tiny_run, tiny_text, capsys):
    (tiny_run / "notes.txt").write_text("the user's own")
    train(tiny_run)
    printed, moved = capsys.readouterr().out, f"moved the earlier run to {tiny_run / 'earlier-'}"
    assert f"{moved}1 (--resume would have continued it)\n" in printed
    tokens = BasicTokenizer(out_dir=tiny_run).encode_array(tiny_text.read_bytes())
    ratio = tiny_text.stat().st_size / len(tokens)
    assert f"using the tokenizer that is in {tiny_run}: {ratio:.2f} bytes a token" in printed
    assert [row["iteration"] for row in metrics(tiny_run)] == [0, 1]
    for path in tiny_run.glob("last.pt*"):
        path.unlink()
    train(tiny_run)
    assert f"{moved}2\n" in capsys.readouterr().out and (tiny_run / "notes.txt").exists()


@pytest.mark.parametrize("there, text, filed", [
    ("its own", "the same", ["merges.pkl"]), ("its own", "another", ["merges.pkl", "best.pt"]),
    ("none", "the same", ["merges.pkl", "best.pt"]), ("none", "another", ["best.pt"]),
    ("another", "the same", [])])
def test_an_earlier_run_keeps_its_own_tokenizer_and_no_other(
        train, tiny_run, tiny_text, other_text, there, text, filed):
    earlier, old = tiny_run / "earlier-1", BasicTokenizer(out_dir=tiny_run)
    other = BasicTokenizer(other_text, 300, out_dir=None)
    shutil.copy(tiny_run / "model.pt", tiny_run / "best.pt")  # a name of the user's
    if there == "none":
        (tiny_run / "merges.pkl").unlink()
    if there == "another":
        (tiny_run / "merges.pkl").write_bytes(pickle.dumps(other.merges))
    train(tiny_run, "--data_path", other_text if text == "another" else tiny_text)
    now = (other if "another" in (there, text) else old).fingerprint
    assert load_model(tiny_run / "model.pt", now)[1]["iteration"] <= 1
    assert load_model(earlier / "model.pt", old.fingerprint)[1]["iteration"] > 1
    assert BasicTokenizer(out_dir=tiny_run).fingerprint == now
    assert [name for name in ("merges.pkl", "best.pt") if (earlier / name).exists()] == filed
    if "merges.pkl" in filed:
        assert BasicTokenizer(out_dir=earlier).fingerprint == old.fingerprint


# ---- texts larger than memory ----

@pytest.fixture
def mapped(monkeypatch):
    """Every text is long, and read and encoded in blocks of 3,000 bytes."""
    for name, value in ("LONG", 6000), ("PIECE", 1000), ("BLOCK", 3000):
        monkeypatch.setattr(tokenizer, name, value)
    monkeypatch.setattr(tokenizer, "usable_cores", lambda: 2)


def test_a_mapped_text_trains_as_one_in_memory_without_bpe_dropout(
        train, resume, tmp_path, mapped, monkeypatch, capsys):
    mapped, memory = tmp_path / "mapped", tmp_path / "memory"
    flags = "--max_iters", 4, "--eval_interval", 2
    train(mapped, *flags, "--bpe_dropout", 0.2)
    assert capsys.readouterr().out.count("without BPE-dropout") == 1
    BasicTokenizer(out_dir=mapped).save(memory)
    with patch.multiple(tokenizer, LONG=10**6):
        train(memory, *flags)
    rows = [[row | {"seconds": 0, "tokens_per_second": 0} for row in metrics(folder)]
            for folder in (mapped, memory)]
    assert repr(rows[0]) == repr(rows[1])  # nan is not equal to itself
    # Either goes on from the other, and from the file that is there.
    (mapped / "tokens.bin").rename(memory / "tokens.bin")
    monkeypatch.setattr(tokenizer, "encode_file", None)
    resume(memory, "--max_iters", 6)
    monkeypatch.setattr(tokenizer, "LONG", 10**6)
    resume(mapped, "--max_iters", 6)
    assert same_weights(mapped, memory)


def test_another_long_text_gets_tokens_of_a_tokenizer_of_its_own(
        train, other_text, tmp_path, mapped, capsys):
    train(tmp_path)
    train(tmp_path, "--data_path", other_text)
    assert "is on another text" in capsys.readouterr().out
    old, new = (BasicTokenizer(out_dir=folder) for folder in (tmp_path / "earlier-1", tmp_path))
    assert old.fingerprint != new.fingerprint
    head = (tmp_path / "tokens.bin").read_bytes()[:4096]
    assert json.loads(head)["tokenizer"] == new.fingerprint


def test_a_network_on_a_long_text_is_quantized_alike(tiny_run, tiny_text, mapped, call, capsys):
    small = tiny_run / "small.pt"
    call(quantize.main, "--out_dir", tiny_run, "--data_path", tiny_text, "--out", small)
    out, err = capsys.readouterr()
    loss = re.search(r"validation loss, nats per token +(\S+)", out)[1]
    _, entries = load_model(small)
    assert float(loss) == pytest.approx(entries["val_loss"], abs=1e-3) and not err


# ---- starting from another network, and teachers ----

def test_a_network_to_start_from_gives_its_sizes_but_not_its_dropout(finished_run):
    model = finished_run / "model.pt"
    args, _ = parse_args(["--init_from", str(model), "--preset", "fast"])
    config = load_checkpoint(model)["config"] | {"dropout": 0.05, "attention_dropout": 0.0}
    assert config.items() <= vars(args).items()


def test_teachers_take_turns_and_soften_the_targets(make_trainer, finished_run):
    trainer = make_trainer("--gradient_accumulation_steps", 4, "--teacher_temperature", 0.5,
                           *PLAIN, "--teacher", *[finished_run / "model.pt"] * 3)
    turns = []
    for trainer.iteration in range(3):
        batch = trainer.batch()
        turns += [teacher for _, _, teacher in batch]
    assert [turns.count(teacher) for teacher in trainer.teachers] == [4, 4, 4]
    assert len({*turns[:3]}) == len({*turns[::4]}) == 3  # in an iteration, and from one to the next
    idx, targets, teacher = batch[0]
    soft = 0.9 * (teacher(idx)[0] / 0.5).softmax(-1) + 0.1 * F.one_hot(targets, 300)
    torch.testing.assert_close(trainer.training_targets(*batch[0]), soft)
    loss = -(soft * trainer.model(idx)[0].log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(trainer.loss(*batch[0]), loss / 4)  # of four parts


# ---- what can go wrong ----

def test_a_start_that_is_refused_says_why_and_leaves_nothing(
        train, quantized_run, tiny_text, other_text, tmp_path, refusal):
    model, int8 = quantized_run / "model.pt", quantized_run / "model_int8.pt"
    short, turned, same, strange = (tmp_path / name for name in "abcd")
    short.write_text("the cat sat on the mat. " * 20)  # long enough in bytes, not in tokens
    # the text turned: a teacher was trained on what the student would be validated on
    text = tiny_text.read_bytes()
    turned.write_bytes(text[len(text) // 5:] + text[:len(text) // 5])
    BasicTokenizer(out_dir=quantized_run).save(same)
    BasicTokenizer(out_dir=PRETRAINED).save(strange)
    for folder in tmp_path, strange:
        shutil.copy(model, folder)
    for message, *flags in (
            ("too short", "--data_path", short, "--vocab_size", 270),
            ("--compile is for CUDA", "--compile"),
            ("has 300 tokens, not 301", "--out_dir", same, "--vocab_size", 301),
            ("choose another folder", "--out_dir", PRETRAINED),
            (f"cannot write into --out_dir {short}: it is not", "--out_dir", short),
            (f"cannot write into --out_dir {short / 'sub'}", "--out_dir", short / "sub"),
            ("with another tokenizer", "--teacher", model, "--data_path", other_text),
            ("a context of 16 tokens", "--teacher", model, "--block_size", 17),
            ("is int8: name the model.pt", "--teacher", int8),
            ("on another text", "--teacher", model, "--data_path", turned, "--out_dir", same),
            ("error: no file at --teacher", "--teacher", tmp_path / "none.pt"),
            ("is int8: name the model.pt", "--init_from", int8),
            ("copy merges.pkl and vocab.pkl there", "--init_from", tmp_path / "model.pt"),
            ("with another tokenizer", "--init_from", strange / "model.pt"),
            ("error: --n_layer 3 differs", "--init_from", model, "--n_layer", 3),
            ("lies in --out_dir", "--init_from", model, "--out_dir", quantized_run)):
        assert message in refusal(train, tmp_path / "run", *flags)
        assert not (tmp_path / "run").exists()


def test_without_a_text_it_ends_as_prepare_does(train_here, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "DEFAULT_TEXT", tmp_path / "input.txt")
    (tmp_path / "prepare.py").write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match="3"):
        train_here(*TINY, "--out_dir", tmp_path)


def test_a_drive_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", fail)
    script.lock(tmp_path).close()


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(train, tmp_path):
    with pytest.raises(ValueError, match="not a finite number: .*--learning_rate"):
        train(tmp_path, "--learning_rate", "1e30", "--max_iters", 50)
    weights = load_last(tmp_path)["model"].values()
    assert all(tensor.isfinite().all() for tensor in weights)


def test_training_goes_on_where_compiling_fails_unless_asked_for(make_trainer, monkeypatch, capsys):
    def fail(*inputs):
        raise error

    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda module: setattr(module, "_compiled_call_impl", fail))
    trainer, error = make_trainer(), RuntimeError("no such compiler")
    trainer.compiled = True
    trainer.compile_blocks()
    assert not trainer.compiled and math.isfinite(trainer.step().item())
    assert "note: torch.compile failed" in capsys.readouterr().out
    trainer.args.compile = True
    with pytest.raises(ValueError, match="--no-compile"):
        trainer.compile_blocks()
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        trainer.compile_blocks()


def test_without_a_terminal_lines_tell_how_far_it_is(train, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "TELL_SECONDS", 0)
    train(tmp_path, "--max_iters", 3)
    line = r"(?m)^iteration 2 of 3: loss \d\.\d+, [\d,]+ tokens/s, 00:00 left$"
    assert re.search(line, capsys.readouterr().out)


# ---- flags ----

def test_the_defaults_are_the_published_hyperparameters():
    args, _ = parse_args([])
    assert (args.batch_size, args.max_iters, args.eval_interval) == (64, 5000, 500)
    assert (args.learning_rate, args.dropout) == (3e-4, 0.2)
    assert {schedule(i, args) for i in (0, 10, 4999)} == {1.0}
    assert vars(GPTConfig()).items() <= vars(args).items()


def test_a_preset_gives_the_flags_that_are_not_given():
    for preset, flags in PRESETS.items():
        args, _ = parse_args(["--preset", preset, "--weight_decay", "0.7", "--max_iters", "40"])
        expected = flags | {"weight_decay": 0.7, "max_iters": 40, "block_size": 256,
                            "lr_decay_iters": 40 * (preset != "reference")}
        assert {name: getattr(args, name) for name in expected} == expected


def test_the_schedule_warms_up_and_follows_a_cosine():
    args, _ = parse_args(["--warmup_iters", "10", "--lr_decay_iters", "110",
                          "--learning_rate", "1", "--min_lr", "0.2"])
    assert schedule(0, args) == 0.1 and schedule(9, args) == 1.0
    assert schedule(60, args) == pytest.approx(0.6)
    assert schedule(110, args) == schedule(5000, args) == pytest.approx(0.2)


# ---- more than one process ----

def start_two(folder, text, *args, script=ROOT / "train.py"):
    return start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, script,
                 *TINY, "--data_path", text, "--out_dir", folder, *args, start_new_session=True,
                 env=os.environ | {"OMP_NUM_THREADS": "1"})


def run_two(*args, **options):
    process = start_two(*args, **options)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


def test_two_processes_follow_the_curve_of_one_on_a_mapped_text(
        train, resume, tiny_text, tmp_path, capsys):
    limits, one, two = (tmp_path / name for name in ("limits.py", "one", "two"))
    limits.write_text(f"import sys\nsys.path[:0] = [{str(ROOT)!r}]\nimport tokenizer, train\n"
                      "tokenizer.LONG, tokenizer.PIECE = 6000, 1000\n"
                      "tokenizer.run_script(train.main)\n")
    flags = "--eval_interval", 1, "--learning_rate", "1e-2", *PLAIN
    run_two(two, tiny_text, *flags, "--max_iters", 10, script=limits)
    resume(two, "--max_iters", 20)
    assert "saved on 2 x cpu, going on on 1 x cpu" in capsys.readouterr().out
    BasicTokenizer(out_dir=two).save(one)
    train(one, *flags, "--max_iters", 20)
    expected = {key: pytest.approx(value, abs=1e-4) for key, value in losses(one).items()}
    assert losses(two) == expected and losses(one)[20][1] < losses(one)[0][1] - 1
    assert (two / "tokens.bin").exists()


def test_two_processes_resume_what_started_from_a_network_with_a_teacher_and_was_interrupted(
        tiny_text, finished_run, tmp_path):
    model, stopped, unbroken = (finished_run / "model.pt", tmp_path / "stopped",
                                tmp_path / "unbroken")
    flags = ("--init_from", model, "--teacher", model, "--eval_interval", 10,
             "--train_temperature", 0.5, "--max_iters")
    process = start_two(stopped, tiny_text, *flags, 100_000)
    wait_for((stopped / "last.pt").exists, process)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
    out, _ = process.communicate(timeout=60)
    iterations = load_last(stopped)["iteration"]
    assert f"stopped and saved at iteration {iterations};" in out
    run_two(stopped, tiny_text, "--resume", "--max_iters", iterations + 5)
    run_two(unbroken, tiny_text, *flags, iterations + 5)
    loss = load_checkpoint(model)["val_loss"]  # whatever the temperature
    assert losses(unbroken)[0][1] == pytest.approx(loss, abs=1e-4)
    assert same_run(stopped, unbroken)


# ---- on a GPU ----

@needs_gpu
@pytest.mark.parametrize("flags", [["--dtype", "float32", "--no-compile"], ["--dtype", "float16"],
                                   ["--dtype", "float16", "--preset", "fast"], []])
def test_a_gpu_trains_and_resumes(train, resume, tmp_path, flags):
    stopped, unbroken = tmp_path / "stopped", tmp_path / "unbroken"
    for folder, iterations in (unbroken, 30), (stopped, 20):
        train(folder, "--device", "cuda", "--n_embd", 228, "--n_head", 6, "--eval_interval", 10,
              "--max_iters", iterations, *flags)
    resume(stopped, "--max_iters", 30)
    assert losses(stopped)[30][1] < losses(stopped)[0][1]
    random = (load_last(folder)["random"] for folder in (stopped, unbroken))
    assert all(map(torch.equal, *random))  # as much dropout was drawn


@needs_gpu
def test_a_recorded_batch_trains_as_one_that_is_not(train, tmp_path, monkeypatch):
    flags = ("--device", "cuda", "--no-compile", *PLAIN, "--gradient_accumulation_steps", 2,
             "--max_iters", 40)
    train(tmp_path / "recorded", *flags)
    monkeypatch.setattr(script, "cuda_graph", lambda function: function)
    train(tmp_path / "one by one", *flags)
    recorded, one_by_one = (losses(tmp_path / name)[40] for name in ("recorded", "one by one"))
    assert recorded == pytest.approx(one_by_one, abs=1e-4)
