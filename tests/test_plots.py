"""plots.py as a program: pictures that say what a made-up run says; a mistake is one line."""
import csv
import os
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import plots
from conftest import ROOT, TINY, complaint, run
from model import load_model
from tokenizer import run_script

SCRIPT = ROOT / "plots.py"
pytestmark = pytest.mark.filterwarnings("error")  # a warning of Matplotlib's is noise to a user
NAMES = ["loss", "relu_training", "relu_outputs", "relu_gradients"]
EVALUATIONS = [0, 1000, 2000, 3000, 4000, 4999]
CHARS_PER_TOKEN = 1.9408  # of Tiny Shakespeare in 500 tokens


def make_rows(evaluations=EVALUATIONS, n_layer=5, chars_per_token=CHARS_PER_TOKEN):
    """Returns the rows of metrics.csv as dicts: a loss that falls until the last but one,
    and a few dead ReLUs."""
    rows = []
    for n, iteration in enumerate(evaluations):
        last, tokens = len(evaluations) - 1, iteration * 16384
        train, val = 6.2 * 0.8**n, 6.25 * 0.85**min(n, last - 1) + 0.01 * (n == last)
        row = {"iteration": iteration, "tokens_seen": tokens, "epochs": tokens / 516651,
               "train_loss": train, "val_loss": val, "train_nats_per_char": train / chars_per_token,
               "val_nats_per_char": val / chars_per_token, "learning_rate": 3e-4,
               "grad_norm": "" if n == 0 else 0.8, "tokens_per_second": 4000.0,
               "seconds": 4.1 * iteration}
        for i in range(1, n_layer + 1):
            row |= {f"relu{i}_mean": 0.1 * i, f"relu{i}_std": 0.2 * i,
                    f"relu{i}_zeros": 0.5 + 0.02 * i + 0.001 * n,
                    f"relu{i}_dead": 0.01 * n * (i == 2),
                    f"relu{i}_grad_mean": 1e-9, f"relu{i}_grad_std": 1e-6 * i}
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
    """Writes the files of a finished run."""
    write_rows(folder, make_rows())
    np.savez(folder / "histograms.npz", **make_histograms())
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def svg(tmp_path_factory):
    """The words in the pictures of a finished run, drawn by the program as a user starts it."""
    folder = make_run(tmp_path_factory.mktemp("run"))
    command = [sys.executable, "-W", "error", SCRIPT, "--out_dir", folder, "--format", "svg"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return {name: texts(folder, name) for name in NAMES}


@pytest.fixture
def draw(monkeypatch, capsys):
    """Runs plots.py on a folder, in this process. Returns status, standard output and error."""
    def draw(folder, *flags):
        monkeypatch.setattr(sys, "argv", ["plots.py", "--out_dir", str(folder), *flags])
        with pytest.raises(SystemExit) as end:
            run_script(plots.main)
        out, err = capsys.readouterr()
        if isinstance(end.value.code, str):  # Python prints it to standard error, with status 1
            return 1, out, f"{err}{end.value.code}\n"
        return end.value.code or 0, out, err
    return draw


def texts(folder, name):
    """Returns the words of an SVG picture, with plain spaces."""
    svg = (folder / f"{name}.svg").read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    return re.sub(r"<[^>]*>", "\n", svg).replace("&apos;", "'")


def is_one_line(result, *words):
    """Fails if that is not an error as a user should meet it."""
    status, _, err = result
    assert status == 1 and err.count("\n") == 1 and err.startswith("plots.py: "), result
    for word in words:
        assert word in err


def test_four_pictures_as_wide_as_a_readme_and_their_paths_printed(folder, draw):
    status, out, err = draw(folder)
    assert status == 0 and err == ""
    assert out.split("\n")[:-1] == [str(folder / f"{name}.png") for name in NAMES]
    for name in NAMES:
        with Image.open(folder / f"{name}.png") as image:
            image.load()
            assert image.width == 1245 and image.height > 500
            assert len(image.convert("RGB").getcolors(2**24)) > 50  # not an empty sheet
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]


def test_the_loss_picture_names_the_best_evaluation(svg):
    best = min(make_rows(), key=lambda row: row["val_loss"])
    nats = f"{best['val_nats_per_char']:.4f}"
    assert f"Best validation loss: {nats} nats per character, at iteration 4,000" in svg["loss"]
    assert f"validation: best {best['val_loss']:.4f}" in svg["loss"]
    for label in ["train", "validation", "iteration", "loss, nats per token", "nats per character",
                  "learning", "million tokens seen (passes over the training text)",
                  "published run's best: 2.9428, at 4,500"]:
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
    worst = "at worst 5.0% of a layer (layer 2, iteration 4,999), at the end 5.0%"
    assert worst in svg["relu_training"]


def test_where_no_unit_died_it_says_so(folder, draw):
    write_rows(folder, [row | {"relu2_dead": 0} for row in make_rows()])
    draw(folder, "--format", "svg")
    assert "every unit fired in every evaluation" in texts(folder, "relu_training")


@pytest.mark.parametrize(
    "other", [{"chars_per_token": 2.5}, {"n_layer": 3}, {"evaluations": [0, 100, 300]}])
def test_the_published_run_is_shown_only_beside_what_compares(tmp_path, draw, other):
    write_rows(tmp_path, make_rows(**other))
    layers, last = other.get("n_layer", 5), other.get("evaluations", EVALUATIONS)[-1]
    np.savez(tmp_path / "histograms.npz", **make_histograms(last, layers))
    assert draw(tmp_path, "--format", "svg")[0] == 0
    same_text = "chars_per_token" not in other  # then losses compare, whatever the network
    assert ("published" in texts(tmp_path, "loss")) == same_text
    assert "published" not in texts(tmp_path, "relu_outputs") + texts(tmp_path, "relu_training")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_same_run_gives_the_same_bytes(folder, draw, suffix):
    draw(folder, "--format", suffix)
    first = [(folder / f"{name}.{suffix}").read_bytes() for name in NAMES]
    draw(folder, "--format", suffix)
    assert first == [(folder / f"{name}.{suffix}").read_bytes() for name in NAMES]


def test_one_evaluation_is_enough(tmp_path, draw):
    write_rows(tmp_path, make_rows([0], n_layer=1))
    np.savez(tmp_path / "histograms.npz", **make_histograms(0, n_layer=1))
    status, out, err = draw(tmp_path)
    assert status == 0 and err == ""
    assert all((tmp_path / f"{name}.png").exists() for name in NAMES)


@pytest.mark.parametrize("gap", ["nan", "", "1e300"])
def test_a_loss_that_is_not_a_number_is_a_gap(folder, draw, gap):
    rows = make_rows()
    for name in rows[3]:
        if name not in ("iteration", "tokens_seen", "epochs", "learning_rate"):
            rows[3][name] = gap
    write_rows(folder, rows)
    status, out, err = draw(folder, "--format", "svg")
    assert status == 0 and err == ""
    assert "at iteration 4,000" in texts(folder, "loss")


def test_a_run_that_diverged_altogether_is_drawn_and_named(folder, draw):
    diverged = {name: "nan" for name in make_rows()[0] if name.startswith(("relu", "train", "val"))}
    write_rows(folder, [row | diverged for row in make_rows()])
    status, out, err = draw(folder, "--format", "svg")
    assert status == 0 and err == ""
    assert "training diverged" in texts(folder, "loss")


def test_without_histograms_the_rest_is_drawn(folder, draw):
    (folder / "histograms.npz").unlink()
    status, out, err = draw(folder)
    assert status == 0
    assert err.count("\n") == 1 and "histograms.npz is missing" in err
    assert sorted(path.stem for path in folder.glob("*.png")) == ["loss", "relu_training"]


def test_no_run_says_how_to_get_one(tmp_path, draw):
    is_one_line(draw(tmp_path), str(tmp_path / "metrics.csv"), "python train.py")
    is_one_line(draw(tmp_path / "nowhere"), "nowhere", "python train.py")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("damage, words", [
    (lambda text: "", ["line 1", "column iteration", "missing"]),
    (lambda text: text.split("\n")[0] + "\n", ["holds no evaluation"]),
    (lambda text: text.replace("val_loss", "loss", 1), ["line 1", "column val_loss"]),
    (lambda text: text.replace("relu4_dead", "relu4_d", 1), ["line 1", "column relu4_dead"]),
    (lambda text: text[:-30], ["line 7", "fields instead of 41"]),  # cut off
    (lambda text: text.replace("\n2000,", "\nabc,"), ["line 4", "column iteration", "'abc'"]),
    (lambda text: text.replace("\n2000,", "\n-1,"), ["line 4", "column iteration"]),
    (lambda text: text.replace(",6.25,", ",-6.25,"), ["line 2", "column val_loss", "'-6.25'"]),
    (lambda text: text.replace("\n2000,", "\n,"), ["line 4", "column iteration"]),
    (lambda text: text.replace("\n2000,", "\n1e300,"), ["line 4", "column iteration", "'1e300'"]),
    (lambda text: text.replace("\n2000,", "\n\n2000,"), ["line 4", "0 fields instead of 41"]),
    (lambda text: text.replace("epochs", "iteration", 1), ["line 1", "column epochs"]),
    (lambda text: text.replace("seconds", "iteration", 1), ["line 2", "fields instead of 40"]),
    (lambda text: text.replace("\n2000,", f"\n{2**18 * '0'},"), ["line 4", "field larger than"]),
    (lambda text: text.replace("0.0003", "0,0003", 1), ["line 2", "fields instead of 41"]),
])
def test_damaged_metrics_name_the_line_and_the_column(folder, draw, damage, words):
    path = folder / "metrics.csv"
    path.write_text(damage(path.read_text()))
    is_one_line(draw(folder), str(path), *words)
    assert not list(folder.glob("*.png"))


def test_metrics_that_are_no_text_are_one_line(folder, draw):
    (folder / "metrics.csv").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff")
    is_one_line(draw(folder), "metrics.csv, line 1", "train again")


def zip_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("relu_counts.npy", bytes(10**8))


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
def test_damaged_histograms_are_refused(folder, damage):
    plots.read_histograms(folder / "histograms.npz", n_layer=5)  # whole as yet
    damage(folder / "histograms.npz")
    with pytest.raises(ValueError, match="histograms.npz is damaged.*train again"):
        plots.read_histograms(folder / "histograms.npz", n_layer=5)


def test_damaged_histograms_are_one_line_after_the_rest_is_drawn(folder, draw):
    (folder / "histograms.npz").write_bytes(b"no zip at all")
    is_one_line(draw(folder), "histograms.npz is damaged", "train again")
    assert sorted(path.stem for path in folder.glob("*.png")) == ["loss", "relu_training"]


def test_histograms_of_another_run_are_refused(folder, draw):
    np.savez(folder / "histograms.npz", **make_histograms(iteration=777))
    is_one_line(draw(folder), "histograms.npz", "777")


def test_a_place_that_cannot_be_written_is_one_line(folder, draw):
    (folder / "loss.png").mkdir()
    is_one_line(draw(folder), "loss.png")


def test_help_and_a_wrong_flag():
    shown = run("plots.py", "--help")
    assert shown.returncode == 0 and "--out_dir" in shown.stdout and "default: png" in shown.stdout
    assert "--format" in complaint(run("plots.py", "--format", "gif"), status=2)


def test_no_network_library_is_loaded():
    """Pictures come from files alone, so that drawing starts at once."""
    code = "import sys; import plots; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_how_the_network_reads_a_text(finished_run, tmp_path, draw):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    status, out, err = draw(folder, "--attention", "ROMEO: speak", "--format", "svg")
    assert (status, err) == (0, "")
    assert out.split() == [str(folder / "attention.svg"), str(folder / "expected.svg")]
    words = texts(folder, "attention")
    assert all(name in words for name in ("head 1", "head 2", "head 3", "layer 1", "layer 2"))
    ids, _, weights, probs = plots.read_text_with_network(folder, "ROMEO: speak")
    T = len(ids)
    assert weights.shape == (2, 3, T, T) and np.allclose(weights.sum(-1), 1, atol=1e-5)
    assert not weights[..., ~np.tri(T, dtype=bool)].any()
    model, _ = load_model(folder / "model.pt")
    loss = model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))[1].item()
    assert np.isclose(-np.log(probs[np.arange(T - 1), ids[1:]]).mean(), loss, atol=1e-4)
    assert f"{loss:.2f} nats per token" in texts(folder, "expected")


def test_the_weights_drawn_are_those_the_network_works_with(finished_run):
    """They give what its own attention hands to the projection."""
    ids, _, weights, _ = plots.read_text_with_network(finished_run, "ROMEO: speak")
    model, _ = load_model(finished_run / "model.pt")
    for layer, block in enumerate(model.blocks):
        seen = {}
        block.attn.qkv.register_forward_hook(lambda _, x, y, seen=seen: seen.update(qkv=y[0]))
        block.attn.proj.register_forward_hook(lambda _, x, y, seen=seen: seen.update(y=x[0][0]))
        model(torch.tensor([ids]))
        v = seen["qkv"].view(len(ids), 3, 3, -1)[:, 2].transpose(0, 1)  # (H, T, D)
        expected = (torch.from_numpy(weights[layer]) @ v).transpose(0, 1).flatten(1)
        assert torch.allclose(expected, seen["y"], atol=1e-5)


@pytest.mark.parametrize("text", ["", "x" * 100])
def test_a_text_no_picture_can_hold_is_one_line(finished_run, draw, text):
    is_one_line(draw(finished_run, "--attention", text), "--attention")


def test_tokens_that_cannot_be_printed_have_labels():
    assert [plots.label(b) for b in (b"e ", b"\n", b"\xe2", "\u00e9".encode(), b"\x00")] == [
        "e\N{OPEN BOX}", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\\xe2", "\u00e9", "\\x00"]


def test_characters_that_matplotlib_lacks_come_from_a_font_of_the_system(monkeypatch, capsys):
    import tokenizer

    stix = plots.font_manager.findfont("STIXGeneral")
    monkeypatch.setattr(plots.font_manager, "findSystemFonts", lambda: [stix])
    odd = "\N{LATIN SMALL LETTER D WITH PALATAL HOOK}"  # in STIX alone
    assert plots.fonts_for("ROMEO: But soft \N{OPEN BOX} caf\u00e9 \u03b1 \u0436") == []
    assert plots.fonts_for(f"a{odd}") == ["STIXGeneral"]
    assert plots.fonts_for("\u01fa") == ["DejaVu Sans"]  # which its monospaced sister lacks
    assert capsys.readouterr().err == ""
    for fonts in [stix, "/no/such/font"], []:  # a file that is no font, or has gone
        monkeypatch.setattr(plots.font_manager, "findSystemFonts", lambda fonts=fonts: fonts)
        tokenizer.note.cache_clear()
        assert plots.fonts_for(f"\u4f60{odd}\u597d") == ["STIXGeneral"][:len(fonts)]
        line = capsys.readouterr().err
        assert line.startswith("note: no font here has ") and line.count("\n") == 1
        assert "\u4f60" in line and "\u597d" in line and (odd in line) == (not fonts)


@pytest.fixture(scope="session")
def chinese_run(tmp_path_factory):
    """The folder of a tiny network trained on a text in Chinese, which has characters as tokens."""
    folder = tmp_path_factory.mktemp("chinese")
    lines = [f"\u4f60\u597d\uff0c{who}\u3002\n" for who in "\u5929\u5730\u4eba"]
    (folder / "text.txt").write_text("".join(lines * 130), encoding="utf-8")
    process = run("train.py", *TINY, "--vocab_size", 270, "--data_path", folder / "text.txt",
                  "--out_dir", folder, "--max_iters", 1)
    assert process.returncode == 0, process.stderr
    return folder


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_text_in_chinese_is_drawn_without_a_warning(chinese_run, suffix):
    process = run("plots.py", "--out_dir", chinese_run, "--format", suffix, "--attention",
                  "\u4f60\u597d\uff0c\u5929", env=os.environ | {"PYTHONWARNINGS": "error"})
    assert process.returncode == 0, process.stderr
    if suffix == "svg":
        assert "\u4f60\u597d" in texts(chinese_run, "attention")
    notes = process.stderr.splitlines()
    assert not notes or len(notes) == 1 and notes[0].startswith("note: no font here has ")


def test_labels_and_legends_do_not_outgrow_their_place(folder):
    assert plots.label(b"abcdefghij") == "abcdefghij"
    assert plots.label(b"x" * 10**6) == "xxxxxxxxx\N{HORIZONTAL ELLIPSIS}"
    assert plots.listed(1) == {0} and plots.listed(10) == set(range(10))
    assert len(plots.listed(1000)) == 10 and plots.listed(1000) >= {0, 999}
    metrics = plots.read_metrics(folder / "metrics.csv")
    for name in metrics:
        if name.startswith("relu_"):
            metrics[name] = np.resize(metrics[name], (40, len(metrics["iteration"])))
    legend = plots.draw_relu_training(metrics).axes[0].get_legend()
    named = [text.get_text() for text in legend.get_texts() if "layer" in text.get_text()]
    assert len(named) == 10 and named[0] == "layer 1" and named[-1] == "layer 40"


def test_dollars_are_no_formulas(finished_run, tmp_path, draw):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    assert draw(folder, "--attention", "$$ $x$", "--format", "svg")[::2] == (0, "")
    assert texts(folder, "attention").count("$") >= 4  # tokens of one byte each
    assert plots.label(b"$$") == r"\$\$"


def test_the_published_curve_shows_only_what_was_measured(folder):
    """A line from its first loss, at iteration 0, to the next would hide how fast it fell."""
    lines = plots.draw_loss(plots.read_metrics(folder / "metrics.csv")).axes[0].lines
    published = [line.get_xdata() for line in lines if line.get_linestyle() == "--"]
    assert [list(x) for x in published] == [[*range(500, 5000, 500), 4999]] * 2
