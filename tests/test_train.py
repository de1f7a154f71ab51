"""Training: it learns, it resumes bit for bit, it follows the same curve on two processes, and it loses nothing."""
import contextlib
import csv
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, complaint, run, wait_for

import train as script
from model import GPT, GPTConfig, choose_device, load_checkpoint, load_model
from tokenizer import PRETRAINED
from train import PRESETS, TEACHER_SHARE, Trainer, parse_args, schedule, soften


def train(folder, text, *args, **options):
    return run("train.py", *TINY, "--data_path", text, "--out_dir", folder, *args, **options)


def metrics(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def losses(folder):
    return {row["iteration"]: (row["train_loss"], row["val_loss"]) for row in metrics(folder)}


def same_weights(a, b):
    a, b = (load_checkpoint(folder / "last.pt")["model"] for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# what a run leaves

def test_a_run_learns_and_leaves_what_the_other_scripts_need(finished_run):
    rows = metrics(finished_run)
    assert [row["iteration"] for row in rows] == [0, 20, 40, 60]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 1
    assert rows[-1]["tokens_seen"] == 60 * 4 * 16 and rows[-1]["tokens_per_second"] > 0 and rows[-1]["grad_norm"] > 0
    for row in rows:
        for layer in 1, 2:
            assert 0 <= row[f"relu{layer}_dead"] <= row[f"relu{layer}_zeros"] <= 1
            assert row[f"relu{layer}_std"] > 0 and row[f"relu{layer}_grad_std"] > 0
    files = {path.name for path in finished_run.iterdir()}
    assert files >= {"merges.pkl", "vocab.pkl", "model.pt", "last.pt", "metrics.csv", "histograms.npz"}
    assert not [name for name in files if name.endswith(".tmp")]


def test_a_histogram_is_that_of_numpy():
    values = torch.randn(3, 70_001, generator=torch.Generator().manual_seed(0))
    for t in values, values.relu(), torch.zeros(5), values[:1, :1]:
        counts, edges = script.histogram(t)
        expected, expected_edges = np.histogram(t.numpy(), 100)
        assert counts.sum() == t.numel() and np.allclose(edges, expected_edges, atol=1e-6)
        assert abs(counts - expected).max() <= 2  # of those on an edge, within rounding


def test_the_histograms_count_every_output(finished_run):
    rows, windows = metrics(finished_run), 4  # as many as in a batch
    with np.load(finished_run / "histograms.npz", allow_pickle=False) as histograms:
        assert histograms["iteration"] == 60 and histograms["relu_edges"].shape == (2, 101)
        assert (histograms["relu_counts"].sum(1) == windows * 16 * 64).all()
        zeros = histograms["relu_counts"][:, 0] / histograms["relu_counts"].sum(1)
    assert zeros[0] >= rows[-1]["relu1_zeros"]


def test_it_prints_nats_per_token_and_per_character_and_a_sample(finished_run):
    printed = (finished_run / "stdout.txt").read_text()
    row = metrics(finished_run)[-1]
    assert f"val loss {row['val_loss']:.4f} nats per token" in printed and f"{row['val_nats_per_char']:.4f} per character" in printed
    assert "a sample" in printed and str(finished_run) in printed


def test_characters_are_characters_not_bytes(finished_run, tiny_text):
    from tokenizer import BasicTokenizer
    tokenizer, text = BasicTokenizer(out_dir=finished_run), tiny_text.read_text(encoding="utf-8")
    tokens = tokenizer.encode_array(text)
    val = tokens[int(0.9 * len(tokens)):]
    row = metrics(finished_run)[-1]
    assert row["val_nats_per_char"] == pytest.approx(row["val_loss"] * len(val) / len(tokenizer.decode(val.tolist())), rel=1e-3)


def test_model_pt_holds_the_best_weights_and_no_optimizer(finished_run):
    best = min(metrics(finished_run), key=lambda row: row["val_loss"])
    checkpoint = torch.load(finished_run / "model.pt", weights_only=True)
    assert checkpoint["iteration"] == best["iteration"] and checkpoint["val_loss"] == best["val_loss"]
    assert not checkpoint.keys() & {"optimizers", "scaler", "batches", "random"}
    GPT(GPTConfig(**checkpoint["config"])).load_state_dict(checkpoint["model"])


# resuming

def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(tiny_text, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tmp_path / name, tiny_text, "--max_iters", 6, "--eval_interval", 3, "--seed", seed)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_a_run_does_not_depend_on_how_many_cores_share_its_batches(tiny_text, tmp_path):
    for cores in "123":
        train(tmp_path / cores, tiny_text, "--batch_size", 10, "--max_iters", 6, env=os.environ | {"OMP_NUM_THREADS": cores})  # three parts
    assert same_weights(tmp_path / "1", tmp_path / "2") and same_weights(tmp_path / "1", tmp_path / "3")


@pytest.mark.parametrize("flags", [[], ["--warmup_iters", "5", "--lr_decay_iters", "30", "--grad_clip", "0.5", "--eval_iters", "2",
                                         "--gradient_accumulation_steps", "2"],
                                   ["--preset", "fast", "--bpe_dropout", "0.1"]], ids=["published", "schedule", "fast"])
def test_a_stopped_and_resumed_run_equals_an_unbroken_one(tiny_text, tmp_path, flags):
    train(tmp_path / "unbroken", tiny_text, "--max_iters", 30, "--eval_interval", 10, *flags)
    train(tmp_path / "stopped", tiny_text, "--max_iters", 10, "--eval_interval", 10, *flags)
    resumed = run("train.py", "--resume", "--out_dir", tmp_path / "stopped", "--max_iters", 30)  # the other flags are kept
    assert "note: --max_iters was 10 when this run was saved and is 30 from here on" in resumed.stdout, resumed.stderr
    assert losses(tmp_path / "stopped") == losses(tmp_path / "unbroken")
    assert same_weights(tmp_path / "stopped", tmp_path / "unbroken")


def test_a_run_made_longer_takes_its_schedule_along(tiny_text, tmp_path, monkeypatch):
    train(tmp_path, tiny_text, "--preset", "fast", "--max_iters", 4)
    for flags, expected in ([], 4), (["--max_iters", "8"], 8), (["--max_iters", "8", "--lr_decay_iters", "4"], 4):
        monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--out_dir", str(tmp_path), *flags])
        args, last = parse_args()
        assert args.lr_decay_iters == expected and last["iteration"] == 4


def test_a_training_temperature_changes_the_training_and_not_the_measure(tiny_text, tmp_path):
    for name, temperature in ("a", 1), ("b", 0.5):
        train(tmp_path / name, tiny_text, "--max_iters", 6, "--eval_interval", 3, "--train_temperature", temperature)
    first, second = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert first[0] == second[0] and first[3] != second[3]


# teachers

def test_what_a_teacher_expects_is_mixed_with_what_came(finished_run):
    teacher, _ = load_model(finished_run / "model.pt")
    idx = torch.randint(300, (3, 16), generator=torch.Generator().manual_seed(1))
    soft = soften(idx, teacher, idx, temperature=0.5)
    expected = TEACHER_SHARE * (teacher(idx)[0] / 0.5).softmax(-1) + (1 - TEACHER_SHARE) * torch.nn.functional.one_hot(idx, 300)
    torch.testing.assert_close(soft, expected)
    student = GPT(GPTConfig(vocab_size=300, block_size=16, n_embd=8, n_head=1, n_layer=1)).eval()
    logits, loss = student(idx, soft)
    torch.testing.assert_close(loss, -(soft * logits.log_softmax(-1)).sum(-1).mean())
    assert student(idx, torch.nn.functional.one_hot(idx, 300).float())[1].item() == pytest.approx(student(idx, idx)[1].item())


def test_a_long_text_is_evaluated_in_part(tiny_text, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "EVAL_TOKENS", 10 * 16 + 5)
    monkeypatch.setattr(script, "Stop", lambda: None)  # this process keeps its signals
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, "--data_path", str(tiny_text), "--out_dir", str(tmp_path / "run")])
    starts = Trainer(*parse_args()).starts
    assert len(starts["val"]) == len(starts["train"]) == 10 and starts["val"][-1] > 20 * 16


def test_teachers_take_turns(tiny_text, finished_run, tmp_path, monkeypatch):
    for name in "abc":
        shutil.copy(finished_run / "model.pt", tmp_path / name)
    asked, turns = [], []
    monkeypatch.setattr(script, "soften", lambda targets, teacher, *rest: asked.append(teacher) or soften(targets, teacher, *rest))
    monkeypatch.setattr(script, "Stop", lambda: None)  # this process keeps its signals
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, "--data_path", str(tiny_text), "--out_dir", str(tmp_path / "run"),
                                      "--gradient_accumulation_steps", "4", "--teacher", *(str(tmp_path / name) for name in "abc")])
    trainer = Trainer(*parse_args())
    for trainer.iteration in range(3):
        turns += [teacher for _, _, teacher in trainer.batch()]
        trainer.step()
    assert len(asked) == 12 and [asked.count(teacher) for teacher in trainer.teachers] == [4, 4, 4]
    assert len({*map(id, turns[:3])}) == len({*map(id, turns[::4])}) == 3  # within an iteration, and from one to the next


def test_a_student_resumes_bit_for_bit_and_learns_faster_than_alone(tiny_text, finished_run, tmp_path):
    flags, teacher, other = ("--eval_interval", 10, "--learning_rate", "3e-3"), tmp_path / "a teacher.pt", tmp_path / "other.pt"
    shutil.copy(finished_run / "model.pt", teacher)
    train(tmp_path / "alone", tiny_text, "--max_iters", 30, *flags)
    shutil.copy(tmp_path / "alone" / "model.pt", other)
    for name, iterations in ("unbroken", 30), ("stopped", 10):
        train(tmp_path / name, tiny_text, "--max_iters", iterations, "--teacher", os.path.relpath(teacher), other, *flags)
    resume = "train.py", "--resume", "--out_dir", tmp_path / "stopped", "--max_iters", 30
    assert run(*resume, cwd=tmp_path).returncode == 0  # from another folder
    assert losses(tmp_path / "stopped") == losses(tmp_path / "unbroken") and same_weights(tmp_path / "stopped", tmp_path / "unbroken")
    assert "not what this run began with" in complaint(run(*resume, "--teacher", teacher))
    shutil.copy(tmp_path / "stopped" / "model.pt", other)
    assert "not what this run began with" in complaint(run(*resume))
    assert losses(tmp_path / "unbroken")[30][1] < losses(tmp_path / "alone")[30][1]


def test_a_teacher_that_cannot_teach_is_refused(tiny_text, tiny_run, finished_run, tmp_path):
    teacher = "--teacher", finished_run / "model.pt"
    assert "trained with another tokenizer" in complaint(train(tmp_path / "a", tiny_text, "--vocab_size", 301, *teacher))
    assert "has a context of 16 tokens" in complaint(train(tmp_path / "b", tiny_text, "--block_size", 17, *teacher))
    assert "no file at --teacher" in complaint(train(tmp_path / "c", tiny_text, "--teacher", tmp_path / "model.pt"), status=2)
    run("quantize.py", "--checkpoint", finished_run / "model.pt", "--out", tmp_path / "model_int8.pt")
    assert "is int8: name the model.pt" in complaint(train(tmp_path / "c", tiny_text, "--teacher", tmp_path / "model_int8.pt"))
    assert "lies in --out_dir" in complaint(train(tiny_run, tiny_text, "--teacher", tiny_run / "model.pt"), status=2)
    (tmp_path / "d").mkdir()
    for name in "merges.pkl", "vocab.pkl":
        shutil.copy(finished_run / name, tmp_path / "d" / name)
    text = tiny_text.read_bytes()
    (tmp_path / "turned.txt").write_bytes(text[len(text) // 5:] + text[:len(text) // 5])  # what it is validated on, the teacher was trained on
    assert "was trained on another text" in complaint(train(tmp_path / "d", tmp_path / "turned.txt", *teacher))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("flags", [["--dtype", "float32", "--no-compile"], ["--dtype", "float16"], ["--dtype", "float16", "--preset", "fast"], []])
def test_a_gpu_trains_and_resumes(tiny_text, tmp_path, flags):
    gpu = "--device", "cuda", "--n_embd", 228, "--n_head", 6
    assert train(tmp_path, tiny_text, *gpu, "--max_iters", 20, "--eval_interval", 10, *flags).returncode == 0
    assert run("train.py", "--resume", "--out_dir", tmp_path, "--max_iters", 30).returncode == 0
    assert losses(tmp_path)[30][1] < losses(tmp_path)[0][1]
    train(tmp_path / "unbroken", tiny_text, *gpu, "--max_iters", 30, "--eval_interval", 10, *flags)
    resumed, unbroken = (load_checkpoint(folder / "last.pt")["random"] for folder in (tmp_path, tmp_path / "unbroken"))
    assert all(map(torch.equal, resumed, unbroken))  # as much dropout was drawn


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_batch_trains_as_its_operations_one_by_one_do(tiny_text, tmp_path):
    flags = ["--device", "cuda", "--dtype", "float32", "--no-compile", "--dropout", 0, "--attention_dropout", 0,
             "--gradient_accumulation_steps", 2, "--max_iters", 40, "--eval_interval", 20]
    assert train(tmp_path / "recorded", tiny_text, *flags).returncode == 0
    code = "import train; train.record = lambda function: function; train.main()"
    subprocess.run([sys.executable, "-c", code, *TINY, *map(str, flags), "--data_path", tiny_text, "--out_dir", tmp_path / "one by one"],
                   cwd=ROOT, check=True, capture_output=True)
    for ours, theirs in zip(losses(tmp_path / "recorded").values(), losses(tmp_path / "one by one").values(), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(tiny_text, tmp_path, number):
    command = [sys.executable, "train.py", *TINY, "--data_path", tiny_text, "--out_dir", tmp_path / "run", "--max_iters", "200",
               "--eval_interval", "100"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for((tmp_path / "run" / "last.pt").exists, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and err == "\nfinishing, then saving\n"
    assert f"go on with: python train.py --resume --out_dir {tmp_path / 'run'}" in out
    assert run("train.py", "--resume", "--out_dir", tmp_path / "run").returncode == 0
    train(tmp_path / "unbroken", tiny_text, "--max_iters", 200, "--eval_interval", 100)
    assert losses(tmp_path / "run") == losses(tmp_path / "unbroken") and same_weights(tmp_path / "run", tmp_path / "unbroken")


def written(path):
    """When a file was written, in ns; None while there is none."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime_ns


def test_killed_ten_times_it_ends_where_an_unbroken_run_ends(tiny_text, tmp_path):
    flags = ["--max_iters", "1000", "--eval_interval", "20"]
    train(tmp_path / "unbroken", tiny_text, *flags)
    chance, last = random.Random(0), tmp_path / "run" / "last.pt"
    for _ in range(10):
        before = written(last)
        process = subprocess.Popen([sys.executable, "train.py", *TINY, "--data_path", tiny_text, "--out_dir", tmp_path / "run", *flags,
                                    *["--resume"] * bool(before)], cwd=ROOT, stdout=subprocess.DEVNULL)
        wait_for(lambda: written(last) not in (None, before), process)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it ended too soon"
    assert run("train.py", "--resume", "--out_dir", tmp_path / "run").returncode == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "unbroken") and same_weights(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(p.read_bytes()[:5000]), lambda p: p.write_bytes(b""), lambda p: p.unlink()])
def test_a_damaged_last_pt_is_noticed_and_its_predecessor_used(tiny_run, damage):
    damage(tiny_run / "last.pt")
    damaged = (tiny_run / "last.pt").exists()
    process = run("train.py", "--resume", "--out_dir", tiny_run)
    assert process.returncode == 0, process.stderr
    assert losses(tiny_run)[60] and load_checkpoint(tiny_run / "last.pt")["iteration"] == 60
    assert ("last.pt is not a checkpoint" in process.stderr) == damaged
    assert (f"going on from {tiny_run / 'last.pt.old'}, iteration 40" in process.stderr) == damaged


def test_resuming_another_network_or_text_is_refused(tiny_run, tmp_path):
    assert "another network" in complaint(run("train.py", "--resume", "--out_dir", tiny_run, "--n_layer", 3))
    (tmp_path / "other.txt").write_text("quite another text. " * 500)
    assert "not those this run began with" in complaint(run("train.py", "--resume", "--out_dir", tiny_run, "--data_path", tmp_path / "other.txt"))
    assert "nothing to resume" in complaint(run("train.py", "--resume", "--out_dir", tmp_path / "empty"))


def test_resuming_with_fewer_iterations_or_another_seed_is_refused(tiny_run):
    assert "at iteration 60 already" in complaint(run("train.py", "--resume", "--out_dir", tiny_run, "--max_iters", 50))
    assert "--seed" in complaint(run("train.py", "--resume", "--out_dir", tiny_run, "--seed", 2), status=2)


def test_flags_given_anew_take_effect_when_resuming(tiny_run):
    flags = ["--weight_decay", "0.5", "--beta2", "0.9", "--dropout", "0", "--batch_size", "8", "--max_iters", "62"]
    process = run("train.py", "--resume", "--out_dir", tiny_run, *flags)
    assert process.returncode == 0 and "--weight_decay was 0.01 when this run was saved and is 0.5" in process.stdout, process.stderr
    last = load_checkpoint(tiny_run / "last.pt")
    assert last["config"]["dropout"] == 0
    assert [(group["weight_decay"], group["betas"][1]) for group in last["optimizers"][0]["param_groups"]] == [(0.5, 0.9), (0.0, 0.9)]
    assert metrics(tiny_run)[-1]["tokens_seen"] == (60 * 4 + 2 * 8) * 16


def test_a_run_of_any_number_of_evaluations_can_be_resumed(tiny_run):
    last = load_checkpoint(tiny_run / "last.pt")
    columns, row = last["columns"], last["metrics"][-1:]
    torch.save(last | {"metrics": row.repeat(30_000, 1)}, tiny_run / "last.pt")
    process = run("train.py", "--resume", "--out_dir", tiny_run, "--max_iters", 62)
    assert process.returncode == 0, process.stderr
    last = load_checkpoint(tiny_run / "last.pt")
    assert last["columns"] == columns and last["metrics"].shape == (30_001, len(columns)) and torch.equal(last["metrics"][:1], row)


def test_a_last_pt_with_weights_of_another_type_or_absurd_metrics_is_refused(tiny_run):
    last = load_checkpoint(tiny_run / "last.pt")
    for change in {"model": {name: weight.bfloat16() for name, weight in last["model"].items()}}, {"metrics": last["metrics"] * torch.inf}:
        torch.save(last | change, tiny_run / "last.pt")
        process = run("train.py", "--resume", "--out_dir", tiny_run, "--max_iters", 62)
        assert "last.pt does not hold the state of this training" in complaint(process)


def test_a_run_saved_on_another_device_goes_on_and_says_so(tiny_run):
    last = torch.load(tiny_run / "last.pt", weights_only=True)
    last |= {"device": "cuda", "batches": torch.zeros(16, dtype=torch.uint8), "random": [torch.zeros(16, dtype=torch.uint8)], "scaler": {}}
    torch.save(last, tiny_run / "last.pt")
    process = run("train.py", "--resume", "--out_dir", tiny_run, "--max_iters", 62)
    assert process.returncode == 0 and "saved on 1 x cuda, going on on 1 x cpu" in process.stdout, process.stderr
    first_batches = torch.Generator().manual_seed(1337)
    for _ in range(2):
        torch.randint(100, (4,), generator=first_batches)
    assert not torch.equal(load_checkpoint(tiny_run / "last.pt")["batches"], first_batches.get_state())  # they are not drawn again


def test_a_new_run_moves_the_earlier_one_aside(tiny_run, tiny_text):
    before = (tiny_run / "model.pt").read_bytes()
    (tiny_run / "notes.txt").write_text("the user's own")
    process = train(tiny_run, tiny_text, "--max_iters", 2)
    assert process.returncode == 0 and "moved the earlier run to" in process.stdout
    assert (tiny_run / "earlier-1" / "model.pt").read_bytes() == before and (tiny_run / "earlier-1" / "merges.pkl").exists()
    assert [row["iteration"] for row in metrics(tiny_run)] == [0, 2] and (tiny_run / "notes.txt").exists()


# what can go wrong

def test_a_second_run_in_the_same_folder_is_refused(tiny_text, tmp_path):
    first = subprocess.Popen([sys.executable, "train.py", *TINY, "--data_path", tiny_text, "--out_dir", tmp_path, "--max_iters", "100000"],
                             cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for((tmp_path / "last.pt").exists, first)
        assert "another training is running in" in complaint(train(tmp_path, tiny_text))
        assert "another training is running in" in complaint(run("train.py", "--resume", "--out_dir", tmp_path))
    finally:
        first.kill()
        first.wait()


def test_a_drive_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def none(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("fcntl.flock", none)
    script.lock(tmp_path).close()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tiny_text, tmp_path):
    line = complaint(train(tmp_path, tiny_text, "--learning_rate", "1e30", "--max_iters", 50))
    assert "not a finite number" in line and "--learning_rate" in line
    weights = load_checkpoint(tmp_path / "last.pt")["model"].values()
    assert all(tensor.isfinite().all() for tensor in weights)


def test_a_full_disk_says_so_and_keeps_the_checkpoint(tiny_run):
    before = {path.name: path.read_bytes() for path in tiny_run.iterdir() if path.suffix == ".pt"}

    def limit():  # no file beyond 20 kB, which metrics fit into and weights do not
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = run("train.py", "--resume", "--out_dir", tiny_run, "--max_iters", 80, preexec_fn=limit)
    assert "cannot write" in complaint(process) and "too large" in complaint(process)
    assert {path.name: path.read_bytes() for path in tiny_run.iterdir() if path.suffix == ".pt"} == before
    assert run("train.py", "--resume", "--out_dir", tiny_run).returncode == 0


def test_a_folder_that_cannot_be_written_says_so(tiny_text, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in complaint(train(tmp_path / "file", tiny_text))
    assert str(tmp_path / "file") in complaint(train(tmp_path / "file" / "sub", tiny_text))


@pytest.mark.parametrize("content, message", [
    (None, "there is no text at"), (b"", "empty"), (b"\x00\x01\x02" * 1000, "binary"), ("caf\xe9 ".encode("latin-1") * 900, "Latin-1"),
    (b"short", "too short")])
def test_a_text_that_cannot_be_trained_on_says_so(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert message in complaint(train(tmp_path / "run", path))
    assert not (tmp_path / "run" / "model.pt").exists()


def test_a_text_whose_validation_part_is_shorter_than_a_window_says_so(tiny_text, tmp_path):
    assert "smaller --block_size" in complaint(train(tmp_path, tiny_text, "--block_size", 5000))


def test_a_tokenizer_of_another_size_is_refused(tiny_run, tiny_text):
    (tiny_run / "model.pt").unlink(), (tiny_run / "last.pt").unlink(), (tiny_run / "last.pt.old").unlink()
    assert "has 300 tokens, not 301" in complaint(train(tiny_run, tiny_text, "--vocab_size", 301))


@pytest.mark.parametrize("flag, value", [
    ("--batch_size", "0"), ("--block_size", "-1"), ("--max_iters", "0"), ("--eval_interval", "0"), ("--learning_rate", "-1"), ("--n_head", "17"),
    ("--dropout", "1"), ("--dropout", "nan"), ("--vocab_size", "255"), ("--n_layer", "x"), ("--beta2", "1"), ("--learning_rate", "inf"),
    ("--grad_clip", "-0.1"), ("--seed", "-1"), ("--dtype", "int8"), ("--max_iterations", "5")])
def test_a_flag_out_of_range_is_named(flag, value, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, flag, value])
    with pytest.raises(SystemExit) as end:
        parse_args()
    assert end.value.code == 2 and flag in capsys.readouterr().err


def test_a_device_that_is_not_there_is_named(tiny_text, tmp_path):
    for device in "tpu", "cpu:x", "cpu:", "cuda:99":
        assert f"--device {device}" in complaint(train(tmp_path, tiny_text, "--device", device))
    assert "--compile is for CUDA" in complaint(train(tmp_path, tiny_text, "--compile"))


def test_a_gpu_is_chosen_with_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, number in ("auto", 0), ("cuda", 0), ("cuda:1", 1):
        assert choose_device(name) == torch.device("cuda", number)  # without one torch.cuda.set_device refuses it
    for name in "cuda:", "cuda:2":
        with pytest.raises(ValueError, match=f"--device {name}: "):
            choose_device(name)


def test_help_names_every_hyperparameter_of_the_published_table():
    text = run("train.py", "--help").stdout
    for name in ("batch_size", "block_size", "max_iters", "eval_interval", "eval_iters", "learning_rate", "n_embd", "n_head", "n_layer",
                 "dropout", "vocab_size"):
        assert f"--{name}" in text


def test_the_defaults_are_the_published_hyperparameters(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    args, _ = parse_args()
    assert (args.batch_size, args.block_size, args.max_iters, args.eval_interval, args.learning_rate) == (64, 256, 5000, 500, 3e-4)
    assert (args.n_embd, args.n_head, args.n_layer, args.dropout, args.vocab_size) == (232, 6, 5, 0.2, 500)
    assert {schedule(i, args) for i in (0, 10, 4999)} == {1.0}


def test_a_preset_gives_the_flags_that_are_not_given(monkeypatch, capsys):
    for preset in PRESETS:
        monkeypatch.setattr(sys, "argv", ["train.py", "--preset", preset, "--weight_decay", "0.7"])
        args, _ = parse_args()
        assert args.weight_decay == 0.7
        expected = PRESETS[preset] | ({} if preset == "reference" else {"lr_decay_iters": args.max_iters}) | {"weight_decay": 0.7}
        assert {name: getattr(args, name) for name in expected} == expected
        assert args.max_iters <= 5000 and (args.batch_size, args.block_size, args.vocab_size) == (64, 256, 500)
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "fast", "--max_iters", "40"])
    assert parse_args()[0].lr_decay_iters == 40
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--preset", "fast"])
    with pytest.raises(SystemExit):
        parse_args()
    assert "--preset is for a new run" in capsys.readouterr().err


def test_the_networks_that_come_with_the_repository_are_never_trained_over(tiny_text):
    before = sorted((path, path.stat().st_mtime_ns) for path in PRETRAINED.glob("*"))
    assert "choose another folder" in complaint(train(PRETRAINED, tiny_text, "--max_iters", 1))
    assert sorted((path, path.stat().st_mtime_ns) for path in PRETRAINED.glob("*")) == before


def test_the_schedule_warms_up_and_follows_a_cosine(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--warmup_iters", "10", "--lr_decay_iters", "110", "--learning_rate", "1", "--min_lr", "0.2"])
    args, _ = parse_args()
    assert schedule(0, args) == 0.1 and schedule(9, args) == 1.0 and schedule(60, args) == pytest.approx(0.6)
    assert schedule(110, args) == schedule(5000, args) == pytest.approx(0.2)


# more than one process

def torchrun(processes, folder, text, *args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), str(ROOT / "train.py"),
               *TINY, "--data_path", text, "--out_dir", folder, *args]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_two_processes_follow_the_curve_of_one(tiny_text, tmp_path):
    flags = ["--max_iters", "20", "--eval_interval", "1", "--dropout", "0", "--attention_dropout", "0", "--learning_rate", "1e-2",
             "--dtype", "float32"]
    assert train(tmp_path / "one", tiny_text, *flags).returncode == 0
    process = torchrun(2, tmp_path / "two", tiny_text, *flags)
    assert process.returncode == 0, process.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 21 and one[20][1] < one[0][1] - 1
    for iteration in one:
        assert two[iteration] == pytest.approx(one[iteration], abs=1e-4)

    assert train(tmp_path / "joined", tiny_text, *flags, "--max_iters", 10).returncode == 0
    process = torchrun(2, tmp_path / "joined", tiny_text, "--resume", "--max_iters", "20")  # with the batches that were to come
    assert process.returncode == 0 and "differs from an unbroken run" in process.stdout, process.stderr
    joined = losses(tmp_path / "joined")
    for iteration in one:
        assert joined[iteration] == pytest.approx(one[iteration], abs=1e-4)


def test_two_processes_with_a_teacher_resume_bit_for_bit(tiny_text, finished_run, tmp_path):
    flags = "--teacher", finished_run / "model.pt", "--eval_interval", 10
    torchrun(2, tmp_path / "unbroken", tiny_text, "--max_iters", 20, *flags)
    torchrun(2, tmp_path / "stopped", tiny_text, "--max_iters", 10, *flags)
    process = torchrun(2, tmp_path / "stopped", tiny_text, "--max_iters", "20", "--resume")
    assert process.returncode == 0, process.stderr
    assert losses(tmp_path / "stopped") == losses(tmp_path / "unbroken") and same_weights(tmp_path / "stopped", tmp_path / "unbroken")


def test_an_interrupt_ends_all_processes_and_saves(tiny_text, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "train.py"), *TINY,
               "--data_path", str(tiny_text), "--out_dir", str(tmp_path), "--max_iters", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for((tmp_path / "last.pt").exists, process)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
    out, _ = process.communicate(timeout=60)
    assert "stopped and saved at iteration" in out
    assert load_checkpoint(tmp_path / "last.pt")["iteration"] > 0


# the first run of a fresh clone

@pytest.fixture
def fresh_clone(tmp_path):
    """The scripts alone, in a folder without a text, and a network where nothing answers."""
    (tmp_path / "data").mkdir()
    for name in "train.py", "model.py", "tokenizer.py", "data/prepare.py":
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path, os.environ | {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTPS_PROXY")}


def test_without_text_and_network_it_says_what_to_do(fresh_clone):
    folder, env = fresh_clone
    process = subprocess.run([sys.executable, folder / "train.py", *TINY], capture_output=True, text=True, env=env, timeout=120)
    assert "--data_path" in complaint(process) and not (folder / "checkpoints" / "model.pt").exists()


def test_the_default_text_is_used_where_it_lies(fresh_clone, tiny_text):
    folder, env = fresh_clone
    shutil.copy(tiny_text, folder / "data" / "input.txt")
    process = subprocess.run([sys.executable, folder / "train.py", *TINY, "--max_iters", "2"], capture_output=True, text=True, env=env, timeout=120)
    assert process.returncode == 0 and (folder / "checkpoints" / "model.pt").exists(), process.stderr
