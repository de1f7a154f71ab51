"""Draws what happened in training, from the files that train.py leaves behind.

    python plots.py                                # loss, relu_training, _outputs, _gradients.png
    python plots.py --format svg                   # the same as vector graphics
    python plots.py --attention "ROMEO: But soft"  # attention, expected.png: how it reads a text

metrics.csv has a row for each evaluation; histograms.npz the ReLU outputs and gradients of the last
one. Only --attention loads the network.
"""
import argparse
import csv
import math
import sys
import warnings
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator

from tokenizer import (
    BasicTokenizer,
    atomic_write,
    bounded,
    default_run,
    note,
    note_file,
    run_script,
    visible,
)

# ---- reading ----

KNOWN = ("iteration", "tokens_seen", "epochs", "learning_rate")  # never empty, never NaN
LOSSES = ("train_loss", "val_loss", "train_nats_per_char", "val_nats_per_char")
RELUS = ("mean", "std", "zeros", "dead", "grad_mean", "grad_std")  # each layer has these
MAX_BYTES = 2**24  # all histograms together, which really are some kilobytes
MAX_TOKENS = 40  # a picture could not show the weights of more
Metrics = dict[str, np.ndarray]


def read_metrics(path: Path) -> Metrics:
    """Reads metrics.csv, a header and a row for each evaluation.

    Returns its KNOWN and LOSSES, (evaluations,) float64, and each of RELUS as "relu_...", all
    layers together, (n_layer, evaluations). An empty cell is NaN, a gap in the curve. Raises
    ValueError, naming line and column.
    """
    columns, name, from_0 = {}, "", bounded(float, 0)
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            lines = iter(partial(file.readline, 2**20), "")  # damage may leave one endless line
            rows = csv.DictReader(lines, restkey="beyond the last", restval="missing")
            for row in rows:
                for name, cell in row.items():
                    number = from_0 if name in KNOWN else float
                    columns.setdefault(name, []).append(number(str(cell or "nan")))
    except (ValueError, argparse.ArgumentTypeError, csv.Error) as error:
        raise ValueError(f"{path}, line {rows.line_num}, column {name}: {error!s:.99}; "
                         "mend that line or train again") from error
    layers = range(1, 1 + max(1, sum(name.endswith("_zeros") for name in columns)))
    try:
        metrics = {name: np.array(columns[name]) for name in KNOWN + LOSSES}
        return metrics | {f"relu_{name}": np.array([columns[f"relu{layer}_{name}"]
                                                    for layer in layers]) for name in RELUS}
    except KeyError as error:
        raise ValueError(f"{path} has no column {error}, or no row: train again") from error


def read_histograms(path: Path, n_layer: int) -> dict[str, int | np.ndarray]:
    """Reads histograms.npz: ReLU outputs, "relu", and gradients, "relu_grad", of one "iteration".

    Returns that number, and of both "..._counts", (n_layer, bins), and "..._edges" of the bins,
    (n_layer, bins + 1), float64. Raises ValueError for a damaged file.
    """
    try:
        with np.load(path) as archive:  # unpickles nothing
            if sum(member.file_size for member in archive.zip.infolist()) > MAX_BYTES:
                raise ValueError("a zip bomb")
            arrays = {name: archive[name].astype(float) for name in archive}
        for kind in ("relu", "relu_grad"):
            counts, widths = arrays[f"{kind}_counts"], np.diff(arrays[f"{kind}_edges"])
            if not (counts.shape == widths.shape == (n_layer, len(widths[0])) and widths.min() > 0):
                raise ValueError("no histogram for each layer")
        return arrays | {"iteration": int(arrays["iteration"])}
    except Exception as error:  # zipfile and NumPy raise a dozen kinds for a damaged file
        raise ValueError(f"{path} is damaged, or of another n_layer; train again") from error


def read_text_with_network(
        out_dir: Path, text: str) -> tuple[list[int], list[str], np.ndarray, np.ndarray]:
    """Lets the network in `out_dir` read a line end and `text`, of T tokens together.

    Returns the ids (T), labels of the whole vocabulary (V), the attention weights (n_layer, n_head,
    T, T), a row for each token that reads, and the probabilities of the next token (T, V), float32.
    Raises ValueError.
    """
    import torch  # takes seconds, and no other picture needs it

    from model import attention, load_model

    tokenizer = BasicTokenizer(out_dir=out_dir)
    model, _ = load_model(out_dir / "model.pt", tokenizer.fingerprint, tokenizer.vocab_size)
    ids = [ord("\n"), *tokenizer.encode_array(text).tolist()]
    longest = min(MAX_TOKENS, model.config.block_size)
    if len(ids) > longest or not text:
        raise ValueError(f"--attention: the text has {len(ids) - 1} tokens, a picture 1 to "
                         f"{longest - 1}: give as many")
    products = []  # each layer's queries, keys and values
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda layer, inputs, qkv: products.append(qkv))
    with torch.inference_mode():
        logits, _ = model(torch.tensor([ids]))
        heads = [qkv.view(1, len(ids), 3, model.config.n_head, -1) for qkv in products]
        weights = torch.cat([attention(*qkv.permute(2, 0, 3, 1, 4))[1] for qkv in heads])
    labels = [label(spelling) for spelling in tokenizer.vocab.values()]
    return ids, labels, weights.numpy(), logits[0].softmax(-1).numpy()


def label(token: bytes) -> str:
    r"""Returns at most ten signs to print: b"e " -> "e␣", b"\n" -> "↵", b"\xff" -> r"\xff"."""
    text = visible(token[:44].replace(b" ", "␣".encode()).replace(b"\n", "↵".encode()))
    text = text if len(text) <= 10 else text[:9] + "…"
    return text.replace("$", r"\$")  # Matplotlib takes what stands between two for a formula


# ---- what compares with the published run ----

# https://github.com/itoufik/Building-a-Custom-GPT-Model-from-Scratch-Using-PyTorch, on Tiny
# Shakespeare: 5 layers, 500 tokens, batches of 64 x 256; losses in nats per token
PUBLISHED_ITERATION = np.array([*range(0, 5000, 500), 4999])
PUBLISHED_TRAIN = np.array([6.3745, 3.5464, 3.0977, 2.7643, 2.5888, 2.4640, 2.3691, 2.2935, 2.2224,
                            2.1560, 2.0976])
PUBLISHED_VAL = np.array([6.3751, 3.7969, 3.4748, 3.2111, 3.0921, 3.0266, 2.9763, 2.9540, 2.9450,
                          2.9428, 2.9551])
PUBLISHED_ZEROS = np.array([0.589, 0.608, 0.618, 0.635, 0.659])  # shares, by layer, at the end
PUBLISHED_CHARS_PER_TOKEN = 1.9408


def chars_per_token(metrics: Metrics) -> float:
    """Returns how many characters of the validation text a token has; NaN if unknown."""
    known = np.isfinite(metrics["val_loss"]) & (metrics["val_nats_per_char"] > 0)
    if not known.any():
        return math.nan
    return np.median(metrics["val_loss"][known] / metrics["val_nats_per_char"][known])


def same_text_and_tokenizer(metrics: Metrics) -> bool:
    """Tells whether losses compare with the published: as many characters a token, to 0.1 %."""
    return abs(chars_per_token(metrics) / PUBLISHED_CHARS_PER_TOKEN - 1) < 0.001


def published_zeros(metrics: Metrics) -> np.ndarray | None:
    """Returns the published shares of zeros, (5,), or None for a run that is not like that one."""
    like_it = len(metrics["relu_zeros"]) == 5 and metrics["iteration"][-1] >= 4500
    return PUBLISHED_ZEROS if like_it and same_text_and_tokenizer(metrics) else None


# ---- drawing ----

TRAIN_COLOR, VAL_COLOR = "#0072B2", "#D55E00"  # told apart by all eyes (Okabe & Ito 2008)
GREY = "#666666"
WIDTH = 8.3  # inches; 1245 pixels at 150 dpi, half as many again as a README is wide
STYLE = {
    "font.size": 9.5, "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.titlecolor": GREY,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e6e6e6", "axes.edgecolor": "#aaaaaa",
    "xtick.color": "#444444", "ytick.color": "#444444", "legend.frameon": False,
    "figure.titlesize": 12, "figure.titleweight": "bold", "figure.constrained_layout.use": True,
    "savefig.dpi": 150, "svg.fonttype": "none", "svg.hashsalt": "plots",
}


def layer_colors(n_layer: int) -> np.ndarray:
    """Returns colors (n_layer, 4): viridis from its dark end, but not to its palest."""
    return matplotlib.colormaps["viridis"](np.linspace(0, 0.87, n_layer))


def listed(n_layer: int) -> set[int]:
    """Returns the layers that a legend names: ten at most, to leave room for the curves."""
    return {round(layer) for layer in np.linspace(0, n_layer - 1, min(n_layer, 10))}


def line_style(metrics: Metrics) -> dict:
    """Returns a style with points if these are few, so that a lone evaluation is seen, too."""
    few = len(metrics["iteration"]) <= 60
    return {"marker": "o", "markersize": 3.5, "linewidth": 1.6} if few else {}


def headline(figure: Figure, axes: Axes, title: str, explanation: str) -> None:
    """Writes what to see, in bold, and under it how to read the picture."""
    figure.suptitle(title, x=0.01, ha="left")
    axes.set_title(explanation)


def table_legend(axes: Axes, handles: list, header: list[str], rows: list[list[str]],
                 **place) -> None:
    """Draws a legend that is a table: a header, then a row beside each of the handles."""
    shown = sorted(listed(len(rows)))
    handles = [*axes.plot([], [], " "), *(handles[layer] for layer in shown)]
    rows = [header, *(rows[layer] for layer in shown)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    lines = [line.replace(" ", "\N{NO-BREAK SPACE}") for line in lines]  # SVG would join spaces
    axes.legend(handles, lines, prop={"family": "monospace", "size": 8.5}, **place)


def plain_ticks(axis: Axis, numbers: str, **which) -> None:
    """Labels an axis with round numbers, 2, 2.5, 3, 4, even if it is logarithmic."""
    axis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], **which))
    axis.set_major_formatter(numbers)
    axis.set_minor_locator(NullLocator())


def draw_published_losses(axes: Axes, last: float) -> None:
    """Draws the published losses up to iteration `last` or just past it, and their best."""
    style = {"linewidth": 1, "alpha": 0.75}
    if last >= PUBLISHED_ITERATION[1]:
        # a straight line from iteration 0 to 500 would be far above what that run really did
        shown = slice(1, 1 + np.searchsorted(PUBLISHED_ITERATION, last))
        for name, losses, color in (("train", PUBLISHED_TRAIN, TRAIN_COLOR),
                                    ("validation", PUBLISHED_VAL, VAL_COLOR)):
            axes.plot(PUBLISHED_ITERATION[shown], losses[shown], ".--", markersize=5, color=color,
                      label=f"{name}, published run", **style)
    best = PUBLISHED_VAL.argmin()
    axes.axhline(PUBLISHED_VAL[best], color=VAL_COLOR, linestyle=":", **style,
                 label=f"published run's best: {PUBLISHED_VAL[best]:.4f}, "
                       f"at {PUBLISHED_ITERATION[best]:,}")


def draw_loss(metrics: Metrics) -> Figure:
    """Draws losses against iterations, tokens and passes, and below them the learning rate."""
    iteration, val = metrics["iteration"], metrics["val_loss"]
    figure, style = Figure(figsize=(WIDTH, 5.6)), line_style(metrics)
    axes, strip = figure.subplots(2, height_ratios=[6, 1], sharex=True)
    axes.plot(iteration, metrics["train_loss"], color=TRAIN_COLOR, label="train", **style)
    axes.plot(iteration, val, color=VAL_COLOR, label="validation", **style)
    if same_text_and_tokenizer(metrics):
        draw_published_losses(axes, iteration[-1])
    axes.set(yscale="log", ylabel="loss, nats per token")  # shows what follows the first drop
    plain_ticks(axes.yaxis, "{x:g}")

    title = "No validation loss is a number: training diverged"
    per_token = chars_per_token(metrics)
    if np.isfinite(per_token):
        best = np.nanargmin(val)
        title = (f"Best validation loss: {val[best] / per_token:.4f} nats per character, "
                 f"at iteration {iteration[best]:,.0f}")
        axes.plot(iteration[best], val[best], "*", color=VAL_COLOR, markersize=15,
                  markeredgecolor="white", zorder=5, label=f"validation: best {val[best]:.4f}")
        right = axes.secondary_yaxis(
            "right", functions=(lambda y: y / per_token, lambda y: y * per_token))
        right.set_ylabel("nats per character")
        plain_ticks(right.yaxis, "{x:g}")
    axes.legend(loc="upper right")
    headline(figure, axes, title,
             "Where validation parts from training, the network learns its text by heart.")

    if iteration[-1] > 0:
        tokens, epochs = (metrics[name][-1] / iteration[-1] for name in ("tokens_seen", "epochs"))
        top = axes.secondary_xaxis(
            "top", functions=(lambda x: x * tokens / 1e6, lambda x: x / tokens * 1e6))
        top.set_xlabel("million tokens seen (passes over the training text)")
        top.xaxis.set_major_formatter(lambda x, _: f"{x:g} ({x * 1e6 * epochs / tokens:.3g})")

    rate = metrics["learning_rate"]
    strip.plot(iteration, rate, color=GREY, **style)
    strip.set(xlabel="iteration", ylabel="learning\nrate",
              ylim=(0, 1.2 * rate.max() or 1), yticks=[0, rate.max()])
    strip.yaxis.set_major_formatter("{x:.3g}")
    plain_ticks(strip.xaxis, "{x:,.0f}", integer=True, min_n_ticks=1)
    return figure


def draw_relu_training(metrics: Metrics) -> Figure:
    """Draws the share of zeros and of dead units of each layer's ReLU against iterations."""
    iteration, zeros = metrics["iteration"], metrics["relu_zeros"]
    dead, style = np.nan_to_num(metrics["relu_dead"], posinf=0), line_style(metrics)
    figure = Figure(figsize=(WIDTH, 5.2))
    upper, lower = figure.subplots(2, sharex=True)
    published = published_zeros(metrics)
    for layer, color in enumerate(layer_colors(len(zeros))):
        name = f"layer {layer + 1}" if layer in listed(len(zeros)) else None
        upper.plot(iteration, zeros[layer], color=color, label=name, **style)
        lower.plot(iteration, dead[layer], color=color, **style)
        if published is not None:
            upper.plot(PUBLISHED_ITERATION[-1], published[layer], "D", color=color,
                       markeredgecolor="black")
    if published is not None:
        upper.plot([], [], "D", color="white", markeredgecolor="black",
                   label="published\nrun's end")
    upper.legend(loc="upper left", bbox_to_anchor=(1, 1))

    layer, row = np.unravel_index(dead.argmax(), dead.shape)
    title = "Dead ReLUs: none, every unit fired in every evaluation"
    if dead.any():
        title = (f"Dead ReLUs: at worst {dead.max():.1%} of a layer (layer {layer + 1}, iteration "
                 f"{iteration[row]:,.0f}), at the end {dead[:, -1].max():.1%}")
    headline(figure, upper, title,
             "Share of outputs that are exactly zero: a unit fires for some tokens only.")
    lower.set_title("Share of dead units: those that fire for no token of the batch, "
                    "and so learn nothing from it.")
    top = max(0.01, 1.1 * dead.max())
    lower.set(xlabel="iteration", ylim=(-0.04 * top, top))  # a line at zero is seen, too
    for axes in (upper, lower):
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    plain_ticks(lower.xaxis, "{x:,.0f}", integer=True, min_n_ticks=1)
    return figure


def draw_histograms(histograms: dict, kind: str) -> tuple[Figure, Axes, list]:
    """Draws "relu" or "relu_grad" of each layer. Returns figure, axes and the lines."""
    figure = Figure(figsize=(WIDTH, 4.6))
    axes = figure.subplots()
    counts, edges = histograms[f"{kind}_counts"], histograms[f"{kind}_edges"]
    density = counts / counts.sum(1, keepdims=True) / np.diff(edges)  # its integral is 1
    density = np.where(density > 0, density, np.nan)  # a gap, not a line down to the log of 0
    handles = [axes.stairs(*layer, color=color, linewidth=1.5, baseline=None)
               for *layer, color in zip(density, edges, layer_colors(len(density)))]
    axes.set(yscale="log", ylabel="probability density")  # shows more than the spike at zero
    return figure, axes, handles


def draw_relu_outputs(metrics: Metrics, histograms: dict, row: int) -> Figure:
    """Draws the distribution of each ReLU's outputs, at the evaluation in a row of `metrics`."""
    figure, axes, handles = draw_histograms(histograms, "relu")
    mean, std, zeros, dead = (metrics[f"relu_{name}"][:, row]
                              for name in ("mean", "std", "zeros", "dead"))
    header = ["", "mean", "std", "dead units", "zeros"]
    rows = [[f"layer {i + 1}", f"{mean[i]:.3f}", f"{std[i]:.3f}", f"{dead[i]:.1%}",
             f"{zeros[i]:.1%}"] for i in range(len(mean))]
    if (published := published_zeros(metrics)) is not None:
        header.append("(published)")
        rows = [[*cells, f"({share:.1%})"] for cells, share in zip(rows, published)]
    table_legend(axes, handles, header, rows, loc="upper right")
    headline(figure, axes, f"ReLU outputs: by layer, {zeros.min():.1%} to {zeros.max():.1%} "
             "are exactly zero", f"Iteration {histograms['iteration']:,}. The spike is the zeros; "
             "beside it, how strongly units fire.")
    axes.set(xlabel="output of the ReLU", xlim=(0, None))
    return figure


def draw_relu_gradients(metrics: Metrics, histograms: dict, row: int) -> Figure:
    """Draws the distribution of the loss's gradient at each ReLU; `row` as in draw_relu_outputs."""
    figure, axes, handles = draw_histograms(histograms, "relu_grad")
    mean, std = metrics["relu_grad_mean"][:, row], metrics["relu_grad_std"][:, row]
    rows = [[f"layer {i + 1}", f"{mean[i]:.1e}", f"{std[i]:.1e}"] for i in range(len(mean))]
    table_legend(axes, handles, ["", "mean", "std"], rows, loc="upper left", bbox_to_anchor=(1, 1))
    title = "Gradients at the ReLUs"
    if std.max() > std.min() > 0:
        title += (f": layer {std.argmax() + 1}'s spread {std.max() / std.min():.1f} times as wide "
                  f"as layer {std.argmin() + 1}'s")
    headline(figure, axes, title, f"Iteration {histograms['iteration']:,}. Curves of like width: "
             "every layer gets its share of the signal. A mere spike: that layer starves.")
    axes.set(xlabel="gradient of the loss with respect to the ReLU's output")
    axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0), useMathText=True)
    return figure


def draw_attention(tokens: list[str], weights: np.ndarray, fonts: list[str]) -> Figure:
    """Draws the weights (n_layer, n_head, T, T): what each of T tokens (rows) takes from others.

    `fonts` are for characters that Matplotlib's own lack.
    """
    n_layer, n_head, T, _ = weights.shape
    side = max(WIDTH / (n_head + 0.7), 0.055 * T)  # inches; wide enough for labels to be read
    figure = Figure(figsize=(side * (n_head + 0.7), side * n_layer + 1))
    grid = figure.subplots(n_layer, n_head, squeeze=False, sharex=True, sharey=True)
    style = {"fontsize": min(7, 75 * side / T), "family": ["sans-serif", *fonts]}
    for (layer, head), axes in np.ndenumerate(grid):
        shares = np.where(np.tri(T, dtype=bool), weights[layer, head], np.nan)
        # the square root sets small shares apart from none
        picture = axes.imshow(shares, cmap="viridis", norm=PowerNorm(0.5, 0, 1))
        axes.grid(False)
        axes.set_xticks(range(T), tokens, **style, rotation=90)
        axes.set_yticks(range(T), tokens, **style)
        axes.tick_params(length=0, pad=1)
        if layer == 0:
            axes.set_title(f"head {head + 1}", fontsize=8)
        if head == 0:
            axes.set_ylabel(f"layer {layer + 1}", fontsize=8)
    figure.colorbar(picture, ax=grid, label="share of attention", shrink=0.4, aspect=30, pad=0.01)
    figure.suptitle("Attention: from which tokens (columns) each token (rows) gathers, "
                    "head by head", x=0.01, ha="left")
    return figure


def draw_expected(ids: list[int], labels: list[str], probs: np.ndarray,
                  fonts: list[str]) -> Figure:
    """Draws a text: each token as dark as it was expected, and above it a likelier one."""
    targets, before = ids[1:], probs[:-1]
    lines = math.ceil(len(targets) / 10)
    per_line = math.ceil(len(targets) / lines)  # lines of about the same length
    figure = Figure(figsize=(WIDTH, 0.75 * lines + 1))
    axes = figure.subplots()
    write = partial(axes.text, ha="center", va="center", family=["monospace", *fonts])
    for place, (token, expected) in enumerate(zip(targets, before)):
        row, column = divmod(place, per_line)
        x, share, likeliest = column + 0.48, expected[token], expected.argmax()
        shade = matplotlib.colormaps["Blues"](0.85 * share)
        black, grey = ("white", "white") if share > 0.55 else ("black", "#444444")
        axes.add_patch(Rectangle((column, row), 0.96, 0.55, color=shade))
        write(x, row + 0.22, labels[token], fontsize=11, color=black)
        write(x, row + 0.44, f"{share:.1%}", family="sans-serif", fontsize=6.5, color=grey)
        if likeliest != token:
            write(x, row - 0.12, f"{labels[likeliest]} {expected[likeliest]:.0%}", fontsize=7,
                  color=GREY)
    nats = -np.log(before[np.arange(len(targets)), targets]).mean()
    axes.set(xlim=(0, per_line), ylim=(lines - 0.35, -0.3))
    axes.axis("off")
    headline(figure, axes, f"What the network expects: {nats:.2f} nats per token, "
             f"a perplexity of {np.exp(nats):.1f}", "The darker a token, the likelier the network "
             "thought it before it read it; above, in grey, a likelier one.")
    return figure


def fonts_for(text: str) -> list[str]:
    """Returns fonts here for characters that Matplotlib's own lack; a note names what none has."""
    own = [font_manager.findfont(name) for name in ("DejaVu Sans", "DejaVu Sans Mono")]
    lacking, names = set(text) - (characters(own[0]) & characters(own[1])), []
    if not lacking:
        return []
    paths = sorted(font_manager.findSystemFonts(), key=lambda path: ("Regular" not in path, path))
    found = {path: characters(path) & lacking for path in [own[0], *paths]}
    for path in sorted(found, key=lambda path: -len(found[path])):
        if found[path] & lacking:
            font_manager.fontManager.addfont(path)
            names.append(font_manager.get_font(path).family_name)
            lacking -= found[path]
    if lacking:
        note(f"no font here has {' '.join(sorted(lacking))}, drawn as boxes: install one that has, "
             "as Noto Sans CJK or Noto Emoji, or draw with --format svg and look at it elsewhere")
    return names


def characters(path: str) -> set[str]:
    """Returns the characters that a font file has; none if it cannot be drawn, as color emoji."""
    try:
        font = font_manager.get_font(path)
        font.set_size(10, 72)
    except (RuntimeError, OSError):
        return set()
    placeholders = "lastresort" in font.family_name.lower().replace(" ", "")  # for all of Unicode
    return set() if placeholders else set(map(chr, font.get_charmap()))


def save(figure: Figure, path: Path) -> None:
    """Writes a figure in the format of the suffix, the same bytes for the same figure."""
    with atomic_write(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a box stands for what the font lacks
        figure.savefig(file, format=path.suffix[1:], metadata={"Date": None})
    print(path)


# ---- command line ----

def draw_all(out_dir: Path, suffix: str) -> None:
    """Draws every picture of a training that a folder holds the figures for."""
    metrics = read_metrics(out_dir / "metrics.csv")
    save(draw_loss(metrics), out_dir / f"loss.{suffix}")
    save(draw_relu_training(metrics), out_dir / f"relu_training.{suffix}")

    path = out_dir / "histograms.npz"
    if not path.exists():
        print(f"plots.py: {path} is missing, so no ReLU histograms: train.py writes it",
              file=sys.stderr)
        return
    histograms = read_histograms(path, n_layer=len(metrics["relu_zeros"]))
    rows = np.flatnonzero(metrics["iteration"] == histograms["iteration"])
    if len(rows) == 0:
        raise ValueError(f"{path} is of iteration {histograms['iteration']}, which metrics.csv "
                         "lacks; train again")
    for draw, name in (draw_relu_outputs, "relu_outputs"), (draw_relu_gradients, "relu_gradients"):
        save(draw(metrics, histograms, rows[-1]), out_dir / f"{name}.{suffix}")


def draw_reading(out_dir: Path, text: str, suffix: str) -> None:
    """Draws how the network in a folder reads a text."""
    note_file(text, "give what the file holds instead")
    ids, labels, weights, probs = read_text_with_network(out_dir, text)
    tokens = [labels[token] for token in ids]
    fonts = fonts_for("".join(tokens + [labels[token] for token in probs.argmax(-1)]))
    save(draw_attention(tokens, weights, fonts), out_dir / f"attention.{suffix}")
    save(draw_expected(ids, labels, probs, fonts), out_dir / f"expected.{suffix}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, help="folder of the run, read and written "
                        "(default: checkpoints/, or the pretrained network's if it holds none)")
    parser.add_argument("--attention", metavar="TEXT",
                        help="draw how the network reads this text instead")
    parser.add_argument("--format", choices=("png", "svg"), default="png",
                        help="png, pixels, or svg, vector graphics (default: png)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    needed = "metrics.csv" if args.attention is None else "model.pt"
    out_dir = args.out_dir or default_run(needed)
    if not (out_dir / needed).exists():
        raise ValueError(f"{out_dir / needed} is missing: train first, with `python train.py`, "
                         "or name a run with --out_dir")
    with matplotlib.rc_context(STYLE):
        if args.attention is None:
            draw_all(out_dir, args.format)
        else:
            draw_reading(out_dir, args.attention, args.format)


if __name__ == "__main__":
    run_script(main, "give a shorter text to --attention")
