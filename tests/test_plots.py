"""plots.py as a program: from a made-up run it draws pictures that say what the run says; a mistake is one line."""
import csv
import os
import random
import re
import shutil
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import plots

SCRIPT = ROOT / "plots.py"
pytestmark = pytest.mark.filterwarnings("error")  # a warning of Matplotlib's would be noise to a user
NAMES = ["loss", "relu_training", "relu_outputs", "relu_gradients"]
EVALUATIONS = [0, 1000, 2000, 3000, 4000, 4999]
CHARS_PER_TOKEN = 1.9408  # of Tiny Shakespeare in 500 tokens


def make_rows(evaluations=EVALUATIONS, n_layer=5, chars_per_token=CHARS_PER_TOKEN):
    """The rows of metrics.csv as dicts: a loss that falls until the last but one evaluation, and a few dead ReLUs."""
    rows = []
    for n, iteration in enumerate(evaluations):
        train, val = 6.2 * 0.8**n, 6.25 * 0.85**min(n, len(evaluations) - 2) + 0.01 * (n == len(evaluations) - 1)
        row = {"iteration": iteration, "tokens_seen": iteration * 16384, "epochs": iteration * 16384 / 516651,
               "train_loss": train, "val_loss": val, "train_nats_per_char": train / chars_per_token,
               "val_nats_per_char": val / chars_per_token, "learning_rate": 3e-4, "grad_norm": "" if n == 0 else 0.8,
               "tokens_per_second": 4000.0, "seconds": 4.1 * iteration}
        for i in range(1, n_layer + 1):
            row |= {f"relu{i}_mean": 0.1 * i, f"relu{i}_std": 0.2 * i, f"relu{i}_zeros": 0.5 + 0.02 * i + 0.001 * n,
                    f"relu{i}_dead": 0.01 * n * (i == 2), f"relu{i}_grad_mean": 1e-9, f"relu{i}_grad_std": 1e-6 * i}
        rows.append(row)
    return rows


def make_histograms(iteration=EVALUATIONS[-1], n_layer=5, bins=60):
    chance = np.random.default_rng(0)
    arrays = {"iteration": iteration}
    for kind, low, scale in [("relu", 0, 1), ("relu_grad", -1e-5, 1e-6)]:
        values = [scale * chance.normal(size=20_000) * i for i in range(1, n_layer + 1)]
        values = [np.maximum(v, 0) if kind == "relu" else v for v in values]
        drawn = [np.histogram(v, bins, (low * i, v.max())) for i, v in enumerate(values, start=1)]
        arrays[f"{kind}_counts"], arrays[f"{kind}_edges"] = map(np.array, zip(*drawn))
    return arrays


def write_rows(folder, rows):
    with open(folder / "metrics.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def make_run(folder):
    """The files of a finished run."""
    write_rows(folder, make_rows())
    np.savez(folder / "histograms.npz", **make_histograms())
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def svg(tmp_path_factory):
    """What the pictures of a finished run say, as name -> words; drawn by the program as a user starts it."""
    folder = make_run(tmp_path_factory.mktemp("run"))
    done = subprocess.run([sys.executable, "-W", "error", SCRIPT, "--out_dir", folder, "--format", "svg"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return {name: texts(folder, name) for name in NAMES}


@pytest.fixture
def draw(monkeypatch, capsys):
    """Runs plots.py on a folder, in this process: returns exit status, standard output, standard error."""
    def draw(folder, *flags):
        monkeypatch.setattr(sys, "argv", ["plots.py", "--out_dir", str(folder), *flags])
        try:
            plots.main()
        except SystemExit as exit:
            return 1, "", f"{exit.code}\n"  # sys.exit(line) prints the line to standard error, status 1
        return 0, *capsys.readouterr()
    return draw


def texts(folder, name):
    """The words of an SVG picture, which are there as text, with plain spaces."""
    svg = (folder / f"{name}.svg").read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    return re.sub(r"<[^>]*>", "\n", svg).replace("&apos;", "'")


def is_one_line(result, *words):
    """An error as a user should meet it."""
    status, _, err = result
    assert status == 1 and err.count("\n") == 1 and err.startswith("plots.py: "), result
    for word in words:
        assert word in err


def test_four_pictures_as_wide_as_a_readme_and_their_paths_printed(run, draw):
    status, out, err = draw(run)
    assert status == 0 and err == ""
    assert out.split("\n")[:-1] == [str(run / f"{name}.png") for name in NAMES]
    for name in NAMES:
        with Image.open(run / f"{name}.png") as image:
            image.load()
            assert image.width == 1245 and image.height > 500
            assert len(image.convert("RGB").getcolors(2**24)) > 50  # not an empty sheet
    assert not [name for name in os.listdir(run) if name.endswith(".tmp")]


def test_the_loss_picture_names_the_best_evaluation(svg):
    best = min(make_rows(), key=lambda row: row["val_loss"])
    nats = f"{best['val_nats_per_char']:.4f}"
    assert f"Best validation loss: {nats} nats per character, at iteration 4,000" in svg["loss"]
    assert f"validation: best {best['val_loss']:.4f}" in svg["loss"]
    for label in ["train", "validation", "iteration", "loss, nats per token", "nats per character", "learning",
                  "million tokens seen (passes over the training text)", "published run's best: 2.9428, at 4,500"]:
        assert f"\n{label}\n" in svg["loss"]


def test_the_second_axis_counts_tokens_and_passes(svg):
    assert f"20 ({20e6 / 516651:.3g})" in svg["loss"]


def test_the_tables_beside_the_histograms_hold_the_figures_of_the_last_evaluation(svg):
    last = make_rows()[-1]
    for i, published in enumerate(["58.9%", "60.8%", "61.8%", "63.5%", "65.9%"], start=1):
        cells = [f"layer {i}", f"{last[f'relu{i}_mean']:.3f}", f"{last[f'relu{i}_std']:.3f}",
                 f"{last[f'relu{i}_dead']:.1%}", f"{last[f'relu{i}_zeros']:.1%}", f"({published})"]
        assert re.search(r"\s+".join(map(re.escape, cells)), svg["relu_outputs"])
        assert re.search(rf"layer {i}\s+1\.0e-09\s+{i}\.0e-06", svg["relu_gradients"])
    lowest, highest = last["relu1_zeros"], last["relu5_zeros"]
    assert f"by layer, {lowest:.1%} to {highest:.1%} are exactly zero" in svg["relu_outputs"]
    assert "layer 5's spread 5.0 times as wide as layer 1's" in svg["relu_gradients"]


def test_the_worst_share_of_dead_units_is_told(svg):
    assert "at worst 5.0% of a layer (layer 2, iteration 4,999), at the end 5.0%" in svg["relu_training"]


def test_where_no_unit_died_it_says_so(run, draw):
    write_rows(run, [row | {"relu2_dead": 0} for row in make_rows()])
    draw(run, "--format", "svg")
    assert "every unit fired in every evaluation" in texts(run, "relu_training")


@pytest.mark.parametrize("other", [{"chars_per_token": 2.5}, {"n_layer": 3}, {"evaluations": [0, 100, 300]}])
def test_the_published_run_is_shown_only_beside_what_compares(tmp_path, draw, other):
    write_rows(tmp_path, make_rows(**other))
    layers, last = other.get("n_layer", 5), other.get("evaluations", EVALUATIONS)[-1]
    np.savez(tmp_path / "histograms.npz", **make_histograms(last, layers))
    assert draw(tmp_path, "--format", "svg")[0] == 0
    assert ("published" in texts(tmp_path, "loss")) == ("chars_per_token" not in other)  # the loss always compares
    assert "published" not in texts(tmp_path, "relu_outputs") + texts(tmp_path, "relu_training")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_same_run_gives_the_same_bytes(run, draw, suffix):
    draw(run, "--format", suffix)
    first = [(run / f"{name}.{suffix}").read_bytes() for name in NAMES]
    draw(run, "--format", suffix)
    assert first == [(run / f"{name}.{suffix}").read_bytes() for name in NAMES]


def test_one_evaluation_is_enough(tmp_path, draw):
    write_rows(tmp_path, make_rows([0], n_layer=1))
    np.savez(tmp_path / "histograms.npz", **make_histograms(0, n_layer=1))
    status, out, err = draw(tmp_path)
    assert status == 0 and err == ""
    assert all((tmp_path / f"{name}.png").exists() for name in NAMES)


@pytest.mark.parametrize("gap", ["nan", "", "1e300"])
def test_a_loss_that_is_not_a_number_is_a_gap(run, draw, gap):
    rows = make_rows()
    for name in rows[3]:
        if name not in ("iteration", "tokens_seen", "epochs", "learning_rate"):
            rows[3][name] = gap
    write_rows(run, rows)
    status, out, err = draw(run, "--format", "svg")
    assert status == 0 and err == ""
    assert "at iteration 4,000" in texts(run, "loss")


def test_a_run_that_diverged_altogether_is_drawn_and_named(run, draw):
    diverged = {name: "nan" for name in make_rows()[0] if name.startswith(("relu", "train", "val"))}
    write_rows(run, [row | diverged for row in make_rows()])
    status, out, err = draw(run, "--format", "svg")
    assert status == 0 and err == ""
    assert "training diverged" in texts(run, "loss")


def test_without_histograms_the_rest_is_drawn(run, draw):
    (run / "histograms.npz").unlink()
    status, out, err = draw(run)
    assert status == 0
    assert err.count("\n") == 1 and "histograms.npz is missing" in err
    assert sorted(path.stem for path in run.glob("*.png")) == ["loss", "relu_training"]


def test_no_run_says_how_to_get_one(tmp_path, draw):
    is_one_line(draw(tmp_path), str(tmp_path / "metrics.csv"), "python train.py")
    is_one_line(draw(tmp_path / "nowhere"), "nowhere", "python train.py")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("damage, words", [
    (lambda text: "", ["holds no evaluation"]),
    (lambda text: text.split("\n")[0] + "\n", ["holds no evaluation"]),
    (lambda text: text.replace("val_loss", "loss", 1), ["line 1", "column val_loss"]),
    (lambda text: text.replace("relu4_dead", "relu4_d", 1), ["line 1", "column relu4_dead"]),
    (lambda text: text[:-30], ["line 7", "fields instead of 41"]),  # a writer that was cut off
    (lambda text: text.replace("\n2000,", "\nabc,"), ["line 4", "column iteration", "'abc'"]),
    (lambda text: text.replace("\n2000,", "\n-1,"), ["line 4", "column iteration"]),
    (lambda text: text.replace(",6.25,", ",-6.25,"), ["line 2", "column val_loss", "'-6.25'"]),
    (lambda text: text.replace("\n2000,", "\n,"), ["line 4", "column iteration"]),
    (lambda text: text.replace("0.0003", "0,0003", 1), ["line 2", "fields instead of 41"]),
])
def test_damaged_metrics_name_the_line_and_the_column(run, draw, damage, words):
    path = run / "metrics.csv"
    path.write_text(damage(path.read_text()))
    is_one_line(draw(run), str(path), *words)
    assert not list(run.glob("*.png"))


def test_metrics_that_are_no_text_are_one_line(run, draw):
    (run / "metrics.csv").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff")
    is_one_line(draw(run), "metrics.csv, line 1", "train again")


def zip_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("relu_counts.npy", "w") as member:
        for _ in range(100):
            member.write(bytes(2**20))


def write_changed(**change):
    return lambda path: np.savez(path, **(make_histograms() | change))


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:-100]),
    lambda path: path.write_bytes(b"no zip at all" * 100),
    zip_bomb,
    write_changed(relu_edges=np.zeros((5, 61))),
    write_changed(relu_edges=np.full((5, 61), np.nan)),
    write_changed(relu_counts=-make_histograms()["relu_counts"]),
    write_changed(relu_grad_counts=np.zeros((5, 60), dtype=object)),  # would need pickle
    write_changed(relu_counts=np.zeros(60)),
    write_changed(iteration="last"),
    lambda path: np.savez(path, **make_histograms(n_layer=4)),
    lambda path: np.savez(path, iteration=4999),
])
def test_damaged_histograms_are_refused(run, damage):
    plots.read_histograms(run / "histograms.npz", n_layer=5)  # whole as yet
    damage(run / "histograms.npz")
    with pytest.raises(ValueError, match="histograms.npz is damaged.*train again"):
        plots.read_histograms(run / "histograms.npz", n_layer=5)


def test_damaged_histograms_are_one_line_after_the_rest_is_drawn(run, draw):
    (run / "histograms.npz").write_bytes(b"no zip at all")
    is_one_line(draw(run), "histograms.npz is damaged", "train again")
    assert sorted(path.stem for path in run.glob("*.png")) == ["loss", "relu_training"]


def test_histograms_of_another_run_are_refused(run, draw):
    np.savez(run / "histograms.npz", **make_histograms(iteration=777))
    is_one_line(draw(run), "histograms.npz", "777")


def test_a_place_that_cannot_be_written_is_one_line(run, draw):
    (run / "loss.png").mkdir()
    is_one_line(draw(run), "loss.png")


def test_killed_at_random_instants_every_picture_is_whole(run, draw):
    chance = random.Random(0)
    begin = time.monotonic()
    draw(run)
    duration = time.monotonic() - begin
    for _ in range(4):
        process = subprocess.Popen([sys.executable, SCRIPT, "--out_dir", run], stdout=subprocess.DEVNULL)
        time.sleep(chance.uniform(0.5, 1.5) * duration)
        process.kill()
        process.wait()
        for name in NAMES:
            with Image.open(run / f"{name}.png") as image:
                image.load()  # raises for a file cut short
    draw(run)
    assert not [name for name in os.listdir(run) if name.endswith(".tmp")]  # strays are replaced, they do not pile up


def test_help_and_a_wrong_flag():
    shown = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "--out_dir" in shown.stdout and "default: png" in shown.stdout
    wrong = subprocess.run([sys.executable, SCRIPT, "--format", "gif"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr


def test_no_network_library_is_loaded():
    """Pictures come from files alone, so that drawing starts at once."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import plots; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_how_the_network_reads_a_text_is_drawn_from_its_own_attention_and_probabilities(finished_run, tmp_path, draw):
    from model import load_model

    folder = shutil.copytree(finished_run, tmp_path / "run")
    status, out, err = draw(folder, "--attention", "ROMEO: speak", "--format", "svg")
    assert (status, err) == (0, "") and out.split() == [str(folder / "attention.svg"), str(folder / "expected.svg")]
    words = texts(folder, "attention")
    assert all(f"head {head}" in words and f"layer {layer}" in words for head in (1, 2, 3) for layer in (1, 2))
    ids, _, weights, probs = plots.read_text_with_network(folder, "ROMEO: speak")
    assert weights.shape == (2, 3, len(ids), len(ids)) and np.allclose(weights.sum(-1), 1, atol=1e-5)
    assert not weights[..., ~np.tri(len(ids), dtype=bool)].any()
    model, _ = load_model(folder / "model.pt")
    loss = model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))[1].item()
    assert np.isclose(-np.log(probs[np.arange(len(ids) - 1), ids[1:]]).mean(), loss, atol=1e-4)
    assert f"{loss:.2f} nats per token" in texts(folder, "expected")
    # the weights are those the network works with: they give its own attention output
    block, seen = model.blocks[0], []
    block.attn.qkv.register_forward_hook(lambda layer, inputs, output: seen.append(output[0]))
    block.attn.proj.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0][0]))
    model(torch.tensor([ids]))
    v = seen[0].view(len(ids), 3, 3, -1)[:, 2].transpose(0, 1)  # (H, T, D)
    assert torch.allclose((torch.from_numpy(weights[0]) @ v).transpose(0, 1).flatten(1), seen[1], atol=1e-5)


@pytest.mark.parametrize("text", ["", "x" * 100])
def test_a_text_no_picture_can_hold_is_one_line(finished_run, draw, text):
    is_one_line(draw(finished_run, "--attention", text), "--attention")


def test_tokens_that_cannot_be_printed_have_labels():
    assert [plots.label(b) for b in (b"e ", b"\n", b"\xe2", "\u00e9".encode(), b"\x00")] == [
        "e\N{OPEN BOX}", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\\xe2", "\u00e9", "\\x00"]


def test_labels_and_legends_do_not_outgrow_their_place(run):
    assert plots.label(b"abcdefghij") == "abcdefghij"
    assert plots.label(b"x" * 10**6) == "xxxxxxxxx\N{HORIZONTAL ELLIPSIS}"
    assert plots.listed(1) == {0} and plots.listed(10) == set(range(10))
    assert len(plots.listed(1000)) == 10 and plots.listed(1000) >= {0, 999}
    metrics = plots.read_metrics(run / "metrics.csv")
    layers = {name: np.resize(values, (40, values.shape[1])) for name, values in metrics.items() if name.startswith("relu_")}
    legend = plots.draw_relu_training(metrics | layers).axes[0].get_legend()
    named = [text.get_text() for text in legend.get_texts() if "layer" in text.get_text()]
    assert len(named) == 10 and named[0] == "layer 1" and named[-1] == "layer 40"


def test_dollars_are_no_formulas(finished_run, tmp_path, draw):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    assert draw(folder, "--attention", "$$ $x$", "--format", "svg")[::2] == (0, "")
    assert texts(folder, "attention").count("$") >= 4  # tokens of one byte each
    assert plots.label(b"$$") == r"\$\$"


def test_the_published_curve_shows_only_what_was_measured(run):
    """No line from its first loss, at iteration 0, to its second, at 500: it would hide how fast that run fell."""
    lines = plots.draw_loss(plots.read_metrics(run / "metrics.csv")).axes[0].lines
    published = [line.get_xdata() for line in lines if line.get_linestyle() == "--"]
    assert [list(x) for x in published] == [[500, 1000, 1500, 2000, 2500, 3000, 3500, 4000, 4500, 4999]] * 2
