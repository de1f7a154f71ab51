"""plots.py: pictures that say what a made-up run says; a mistake is one line."""
import re

import numpy as np
import pytest
import torch
from PIL import Image

import plots
from conftest import ROOT, complaint, contents, python, run
from model import load_model
from tokenizer import BasicTokenizer

NAMES = ["loss", "relu_training", "relu_outputs", "relu_gradients"]
VAL_LOSSES = {0: 6.25, 1000: 5.0, 2000: 4.0, 3000: 3.5, 4000: 3.0, 4999: 3.1}


# ---- a made-up run ----

def make_rows(evaluations=VAL_LOSSES, n_layer=5, chars_per_token=1.9408):
    """Returns the rows of metrics.csv; some ReLUs of layer 2 die."""
    rows = []
    for n, iteration in enumerate(evaluations):
        train, val, tokens = 6 * 0.8**n, VAL_LOSSES.get(iteration, 6), iteration * 16384
        row = {"iteration": iteration, "tokens_seen": tokens, "epochs": tokens / 516651,
               "train_loss": train, "train_nats_per_char": train / chars_per_token,
               "val_loss": val, "val_nats_per_char": val / chars_per_token,
               "learning_rate": 3e-4}
        for i in range(1, n_layer + 1):
            row |= {f"relu{i}_mean": 0.1 * i, f"relu{i}_std": 0.2 * i,
                    f"relu{i}_zeros": 0.5 + 0.02 * i + 0.001 * n,
                    f"relu{i}_dead": 0.01 * min(n, 8 - n) * (i == 2),
                    f"relu{i}_grad_mean": 1e-9, f"relu{i}_grad_std": 1e-6 * i}
        rows.append(row)
    return rows


def make_histograms(iteration=4999, n_layer=5):
    counts = np.tile(np.arange(60), (n_layer, 1))
    edges = np.outer(np.arange(1, n_layer + 1), np.linspace(0, 3, 61))
    return {"iteration": iteration, "relu_counts": counts, "relu_edges": edges,
            "relu_grad_counts": counts, "relu_grad_edges": 1e-6 * (edges - 1)}


def write_run(folder, rows, histograms):
    lines = [",".join(map(str, cells)) for cells in [rows[0], *map(dict.values, rows)]]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    np.savez(folder / "histograms.npz", **histograms)


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path, make_rows(), make_histograms())
    return tmp_path


def draw(folder, *flags):
    """Returns the lines that plots.py prints; it complains of nothing."""
    process = run("plots.py", "--out_dir", folder, *flags)
    assert (process.returncode, process.stderr) == (0, "")
    return process.stdout.splitlines()


def refusal(folder, *flags):
    return complaint(run("plots.py", "--out_dir", folder, *flags))


def texts(folder, name):
    """Returns the set of texts in an SVG picture, with single spaces."""
    svg = (folder / f"{name}.svg").read_text(encoding="utf-8").replace("&apos;", "'")
    return {" ".join(text.split()) for text in re.findall("(?<=>)[^<]+", svg)}


# ---- pictures of a training ----

def test_four_pictures_as_wide_as_a_readme_and_their_paths_printed(folder):
    for path, name in zip(draw(folder), NAMES, strict=True):
        assert path == str(folder / f"{name}.png")
        with Image.open(path) as image:
            assert image.width == 1245 and image.height > 500
            assert len(image.convert("RGB").getcolors(2**24)) > 50  # not an empty sheet


def test_the_pictures_say_what_the_table_holds_in_the_same_bytes_each_time(folder):
    draw(folder, "--format", "svg")
    before = contents(folder)
    draw(folder, "--format", "svg")
    assert contents(folder) == before
    assert {f"Best validation loss: {3 / 1.9408:.4f} nats per character, at iteration 4,000",
            "validation: best 3.0000", "train", "validation", "iteration", "learning",
            "loss, nats per token", "nats per character", f"20 ({20e6 / 516651:.3g})",
            "million tokens seen (passes over the training text)",
            "published run's best: 2.9428, at 4,500"} <= texts(folder, "loss")
    assert {"Dead ReLUs: at worst 4.0% of a layer (layer 2, iteration 4,000), at the end 3.0%",
            "published", "run's end"} <= texts(folder, "relu_training")
    assert {"ReLU outputs: by layer, 52.5% to 60.5% are exactly zero",
            "mean std dead units zeros (published)",
            "layer 1 0.100 0.200 0.0% 52.5% (58.9%)", "layer 2 0.200 0.400 3.0% 54.5% (60.8%)",
            "layer 3 0.300 0.600 0.0% 56.5% (61.8%)", "layer 4 0.400 0.800 0.0% 58.5% (63.5%)",
            "layer 5 0.500 1.000 0.0% 60.5% (65.9%)"} <= texts(folder, "relu_outputs")
    assert {"Gradients at the ReLUs: layer 5's spread 5.0 times as wide as layer 1's", "mean std",
            *(f"layer {i} 1.0e-09 {i}.0e-06" for i in range(1, 6))
            } <= texts(folder, "relu_gradients")


@pytest.mark.parametrize("evaluations, n_layer, chars", [
    (VAL_LOSSES, 5, 2.5), (VAL_LOSSES, 40, 1.9408), ([0, 100, 300], 5, 1.9408), ([0], 1, 1.9408)])
def test_an_odd_run_is_drawn_with_what_compares(tmp_path, evaluations, n_layer, chars):
    write_run(tmp_path, make_rows(evaluations, n_layer, chars),
              make_histograms([*evaluations][-1], n_layer))
    draw(tmp_path, "--format", "svg")
    loss, training, outputs = (texts(tmp_path, name) for name in NAMES[:3])
    assert ("published" in "".join(loss)) == (chars == 1.9408)
    assert "published" not in "".join(training | outputs)
    none_died = "Dead ReLUs: none, every unit fired in every evaluation"
    assert (none_died in training) == (evaluations == [0])
    named = {int(text[6:]) for text in training if text.startswith("layer ")}
    assert len(named) == min(n_layer, 10) and max(named) == n_layer  # in the legend


def test_the_published_curve_shows_only_what_was_measured(folder):
    lines = plots.draw_loss(plots.read_metrics(folder / "metrics.csv")).axes[0].lines
    published = [list(line.get_xdata()) for line in lines if line.get_linestyle() == "--"]
    assert published == [[*range(500, 5000, 500), 4999]] * 2


@pytest.mark.parametrize("gaps, title", [
    ({1: "nan", 2: "", 3: "inf"}, "at iteration 4,000"),
    (dict.fromkeys(range(6), "nan"), ": training diverged")])
def test_what_is_not_a_number_is_a_gap(tmp_path, gaps, title):
    rows = make_rows()
    measured = [name for name in rows[0] if name.startswith(("train", "val", "grad", "relu"))]
    for place, gap in gaps.items():
        rows[place] |= dict.fromkeys(measured, gap)
    write_run(tmp_path, rows, make_histograms())
    draw(tmp_path, "--format", "svg")
    assert title in "".join(texts(tmp_path, "loss"))


# ---- files missing or damaged ----

def test_no_run_says_how_to_get_one(tmp_path):
    assert re.search("nowhere/metrics.csv .*python train.py", refusal(tmp_path / "nowhere"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pattern, damage, named", [
    ("^.*", "", ""),
    ("^.*", "\udc89PNG\x00\udcff", "no column"),
    ("\n.*", "\n", ""),  # no evaluation
    (".{30}$", "", "line 7"),  # cut off
    ("val_loss", "loss", "val_loss"),
    ("relu4_dead", "relu4_d", "relu4_dead"),
    ("0.0003", "0,0003", "line 2"),
    ("\n2000,", f"\n{2**18 * '0'},", "field larger"),
    ("\n2000,", "\n-1,", "line 4.*iteration"),
    ("\n2000,", "\n,", "line 4.*iteration"),
    (",5.0,", ",abc,", "line 3.*val_loss"),
])
def test_damaged_metrics_name_the_line_and_the_column(folder, pattern, damage, named):
    path = folder / "metrics.csv"
    text = re.sub(pattern, damage, path.read_text(), count=1, flags=re.S)
    path.write_text(text, "utf-8", "surrogateescape")
    with pytest.raises(ValueError, match=f"metrics.csv.*{named}"):
        plots.read_metrics(path)


@pytest.mark.parametrize("damage", [
    {"relu_edges": -make_histograms()["relu_edges"]},
    {"relu_edges": np.full((5, 61), np.nan)},
    {"relu_counts": np.ones(60)},
    {"relu_grad_counts": np.ones((5, 60), dtype=object)},  # would need pickle
    {"iteration": [1, 2]},
    {"more": np.zeros(2**21)},
    make_histograms(n_layer=4),
])
def test_damaged_histograms_are_refused(folder, damage):
    path = folder / "histograms.npz"
    np.savez(path, **make_histograms() | damage)
    with pytest.raises(ValueError, match="histograms.npz is damaged.*train again"):
        plots.read_histograms(path, n_layer=5)


def test_without_histograms_of_this_run_the_rest_is_drawn(folder):
    path = folder / "histograms.npz"
    np.savez(path, **make_histograms(iteration=777))
    assert re.search("histograms.npz .*777", refusal(folder))
    path.write_bytes(b"no zip at all")
    assert f"{path} is damaged" in refusal(folder)
    path.unlink()
    process = run("plots.py", "--out_dir", folder)
    assert process.returncode == 0
    assert re.fullmatch(f".*{path} is missing.*\n", process.stderr)
    assert {path.stem for path in folder.glob("*.png")} == {"loss", "relu_training"}


# ---- how a network reads ----

def test_the_weights_drawn_give_what_attention_hands_to_the_projection(finished_run):
    ids, _, weights, _ = plots.read_text_with_network(finished_run, "ROMEO: speak")
    model, _ = load_model(finished_run / "model.pt")
    seen = []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda _, x, y: seen.append(y[0]))
        block.attn.proj.register_forward_hook(lambda _, x, y: seen.append(x[0][0]))
    model(torch.tensor([ids]))
    for shares, qkv, gathered in zip(weights, seen[::2], seen[1::2], strict=True):
        v = qkv.view(len(ids), 3, 3, -1)[:, 2]  # (T, H, D)
        expected = torch.einsum("hts,shd->thd", torch.from_numpy(shares), v)
        assert torch.allclose(expected.flatten(1), gathered, atol=1e-5)


def test_the_pictures_show_each_head_and_the_loss_of_the_text(tiny_run):
    printed = draw(tiny_run, "--attention", "ROMEO: speak", "--format", "svg")
    assert printed == [str(tiny_run / f"{name}.svg") for name in ("attention", "expected")]
    assert {"head 1", "head 2", "head 3", "layer 1", "layer 2"} <= texts(tiny_run, "attention")
    model, _ = load_model(tiny_run / "model.pt")
    ids = [ord("\n"), *BasicTokenizer(out_dir=tiny_run).encode("ROMEO: speak")]
    loss = model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))[1]
    assert f" {loss:.2f} nats per token," in "".join(texts(tiny_run, "expected"))


@pytest.mark.parametrize("text", ["", "x" * 100])
def test_a_text_no_picture_can_hold_is_one_line(finished_run, text):
    assert "--attention" in refusal(finished_run, "--attention", text)


@pytest.mark.parametrize("token, label", [
    ("é \n".encode(), "é␣↵"), (b"\xe2\x00", r"\xe2\x00"),
    (b"abcdefghij", "abcdefghij"), (b"x" * 10**6, "xxxxxxxxx…"),
    (b"$$", r"\$\$")])  # else it is a formula
def test_every_token_has_a_label_that_can_be_printed(token, label):
    assert plots.label(token) == label


def test_characters_that_matplotlib_lacks_come_from_a_font_of_the_system(monkeypatch, capsys):
    system = [plots.font_manager.findfont("STIXGeneral"), "/no/such/font"]
    monkeypatch.setattr(plots.font_manager, "findSystemFonts", lambda: system)
    odd = "\N{LATIN SMALL LETTER D WITH PALATAL HOOK}"  # in STIX alone
    assert plots.fonts_for("ROMEO: But soft ␣ café α ж") == []
    assert plots.fonts_for("\u01fa") == ["DejaVu Sans"]  # which its monospaced sister lacks
    assert plots.fonts_for(f"a{odd}") == ["STIXGeneral"]
    assert plots.fonts_for(f"你{odd}好") == ["STIXGeneral"]
    notes = capsys.readouterr().err
    assert notes.startswith("note: no font here has 你 好,") and notes.count("\n") == 1


@pytest.mark.filterwarnings("error")
def test_characters_that_no_font_has_are_drawn_without_a_warning(tmp_path):
    figure = plots.draw_attention(["你", "好"], np.ones((1, 1, 2, 2)), [])
    plots.save(figure, tmp_path / "attention.png")


def test_no_network_library_is_loaded():
    code = "import plots, sys; sys.exit('torch' in sys.modules)"
    assert python("-c", code, cwd=ROOT).returncode == 0
