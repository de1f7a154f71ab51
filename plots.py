"""Draw what happened in training, from the files that train.py leaves behind.

    python plots.py                                # draws loss, relu_training, relu_outputs and relu_gradients.png
    python plots.py --format svg                   # the same as vector graphics
    python plots.py --attention "ROMEO: But soft"  # draws attention.png and expected.png, how the network reads a text

metrics.csv has a row per evaluation; histograms.npz the ReLU outputs and gradients of the last one. Only --attention
loads the network.
"""
import argparse
import math
import sys
import warnings
import zipfile
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from tokenizer import atomic_write, default_run, visible

MAX_TOKENS = 40  # whose attention can be told apart in a picture
MAX_BYTES = 2**24  # both files are some kilobytes; anything near this is not one of ours

KNOWN_COLUMNS = ("iteration", "tokens_seen", "epochs", "learning_rate")  # never empty, even if training diverges
LOSS_COLUMNS = ("train_loss", "val_loss", "train_nats_per_char", "val_nats_per_char")
RELU_COLUMNS = ("mean", "std", "zeros", "dead", "grad_mean", "grad_std")
HISTOGRAMS = ("relu", "relu_grad")

# The published run on Tiny Shakespeare: 5 layers, 500 tokens, batches of 64 x 256; losses in nats per token
REFERENCE_ITERATION = np.array([0, 500, 1000, 1500, 2000, 2500, 3000, 3500, 4000, 4500, 4999])
REFERENCE_TRAIN = np.array([6.3745, 3.5464, 3.0977, 2.7643, 2.5888, 2.4640, 2.3691, 2.2935, 2.2224, 2.1560, 2.0976])
REFERENCE_VAL = np.array([6.3751, 3.7969, 3.4748, 3.2111, 3.0921, 3.0266, 2.9763, 2.9540, 2.9450, 2.9428, 2.9551])
REFERENCE_ZEROS = np.array([0.589, 0.608, 0.618, 0.635, 0.659])  # share of ReLU outputs, layer by layer, at the end
REFERENCE_CHARS_PER_TOKEN = 1.9408

TRAIN_COLOR, VAL_COLOR, GREY = "#0072B2", "#D55E00", "#666666"  # Okabe & Ito (2008): told apart by all eyes
WIDTH = 8.3  # inches; 1245 pixels at 150 dpi, half as many again as a README is wide
STYLE = {
    "font.size": 9.5, "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.titlecolor": GREY,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e6e6e6", "axes.edgecolor": "#aaaaaa",
    "xtick.color": "#444444", "ytick.color": "#444444", "legend.frameon": False,
    "figure.titlesize": 12, "figure.titleweight": "bold", "figure.constrained_layout.use": True,
    "savefig.dpi": 150, "svg.fonttype": "none", "svg.hashsalt": "plots",
}


# ---- reading --------------------------------------------------------------------------------------------------------

def parse_number(field, where):
    """A field of metrics.csv as a float. Empty, or too large to be drawn, counts as NaN: a gap in the curve."""
    try:
        value = float(field or "nan")
    except ValueError:
        raise ValueError(f"{where}: {field[:20]!r} is not a number; delete the line or train again") from None
    return value if abs(value) < 1e15 else np.nan


def read_metrics(path):
    """Read metrics.csv, a header and a row per evaluation.

    Returns a dict of float64 arrays: KNOWN_COLUMNS and LOSS_COLUMNS of shape (evaluations,), and for each of
    RELU_COLUMNS "relu_..." of shape (n_layer, evaluations). Raises ValueError, naming line and column.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: train first, with `python train.py`, or name a run with --out_dir")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} is too large to draw, with {path.stat().st_size >> 20} MiB: train with a larger --eval_interval")
    with path.open(encoding="utf-8", errors="replace") as file:
        header, rows = file.readline(2**17).rstrip("\n").split(","), list(file)
    if not rows:
        raise ValueError(f"{path} holds no evaluation: train until the first one, with `python train.py`")

    n_layer = max(1, sum(name.startswith("relu") and name.endswith("_zeros") for name in header))
    relu_names = {f"relu_{name}": [f"relu{i}_{name}" for i in range(1, n_layer + 1)] for name in RELU_COLUMNS}
    for name in [*KNOWN_COLUMNS, *LOSS_COLUMNS, *sum(relu_names.values(), [])]:
        if name not in header:
            raise ValueError(f"{path}, line 1: column {name} is missing; train again")

    columns = {name: np.empty(len(rows)) for name in header}
    for index, line in enumerate(rows):
        where, row = f"{path}, line {index + 2}", line.rstrip("\n").split(",")
        if len(row) != len(header):
            raise ValueError(f"{where}: {len(row)} fields instead of {len(header)}; delete the line or train again")
        for name, field in zip(header, row):
            value = columns[name][index] = parse_number(field, f"{where}, column {name}")
            if value < 0 and name in LOSS_COLUMNS or not value >= 0 and name in KNOWN_COLUMNS:
                raise ValueError(f"{where}, column {name}: {field[:20]!r} is not a number from 0 up; delete the line")
    return columns | {name: np.stack([columns[c] for c in layers]) for name, layers in relu_names.items()}


def read_histograms(path, n_layer):
    """Read histograms.npz, the ReLU outputs and gradients of one evaluation, a histogram per layer.

    Returns a dict: "iteration" (int), and for each of HISTOGRAMS "..._density" (n_layer, bins), which integrates to 1
    over "..._edges" (n_layer, bins + 1). Raises ValueError if the file is damaged or is not of `n_layer` layers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > MAX_BYTES:
                raise ValueError("a zip bomb")
        with np.load(path, allow_pickle=False) as archive:
            histograms = {"iteration": int(archive["iteration"])}
            for kind in HISTOGRAMS:
                counts, edges = archive[f"{kind}_counts"], archive[f"{kind}_edges"].astype(np.float64)
                if counts.shape[0] != n_layer or edges.shape != (n_layer, counts.shape[1] + 1):
                    raise ValueError("shapes that do not fit")
                if not (np.isfinite(edges).all() and (np.diff(edges) > 0).all() and (counts >= 0).all()):
                    raise ValueError("no histogram")
                histograms[f"{kind}_edges"] = edges
                histograms[f"{kind}_density"] = counts / counts.sum(axis=1, keepdims=True) / np.diff(edges)
    except Exception as error:  # zipfile and NumPy raise a dozen kinds for a file that is not what it says
        raise ValueError(f"{path} is damaged, or of a network with another n_layer; train again") from error
    return histograms


def read_text_with_network(out_dir, text):
    """Let the network in `out_dir` read a line end and `text`, of T tokens together.

    Returns the ids (T), the labels of the vocabulary (vocab_size strings), the attention weights (n_layer, n_head, T, T),
    a row per reading token, and the probabilities of the next token (T, vocab_size), float32. Raises ValueError.
    """
    import torch  # here, as no other picture needs the network, which takes seconds to load

    from model import load_model
    from tokenizer import BasicTokenizer

    path = out_dir / "model.pt"
    if not path.exists():
        raise ValueError(f"{path} is missing: train first, with `python train.py`, or name a run with --out_dir")
    tokenizer = BasicTokenizer(out_dir=out_dir)
    model, _ = load_model(path, tokenizer.fingerprint, tokenizer.vocab_size)
    ids = [ord("\n"), *tokenizer.encode_array(text).tolist()]
    longest = min(MAX_TOKENS, model.config.block_size)
    if len(ids) > longest or not text:
        raise ValueError(f"--attention: the text has {len(ids) - 1} tokens, a picture 1 to {longest - 1}: give another text")
    products = []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda layer, inputs, output: products.append(output[0]))
    with torch.inference_mode():
        logits, _ = model(torch.tensor([ids]))
        q, k, _ = torch.stack(products).view(len(products), len(ids), 3, model.config.n_head, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * model.config.head_size ** -0.5  # (n_layer, n_head, T, T)
        weights = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    return ids, [label(spelling) for spelling in tokenizer.vocab.values()], weights.numpy(), logits[0].softmax(-1).numpy()


def label(spelling):
    """A token's bytes as something to print: b"e " -> "e␣", a line end as an arrow, other bytes in hexadecimal; ten signs at most."""
    text = visible(spelling[:44].replace(b" ", "␣".encode()).replace(b"\n", "↵".encode()))
    return (text if len(text) <= 10 else text[:9] + "…").replace("$", r"\$")  # or it would set formulas


# ---- what compares with the published run ---------------------------------------------------------------------------

def chars_per_token(metrics):
    """Of the validation text: turns nats per character into nats per token. NaN if no loss is known."""
    known = (metrics["val_loss"] > 0) & (metrics["val_nats_per_char"] > 0)
    return np.median(metrics["val_loss"][known] / metrics["val_nats_per_char"][known]) if known.any() else np.nan


def same_text_and_tokenizer(metrics):
    """Whether nats per token compare with the published ones: as many characters a token, within 0.1 %."""
    return abs(chars_per_token(metrics) / REFERENCE_CHARS_PER_TOKEN - 1) < 0.001


def reference_zeros(metrics):
    """The published shares of zeros at the end of training (5,), or None for a run that is not like it."""
    like_it = len(metrics["relu_zeros"]) == len(REFERENCE_ZEROS) and metrics["iteration"][-1] >= 4500
    return REFERENCE_ZEROS if like_it and same_text_and_tokenizer(metrics) else None


# ---- drawing --------------------------------------------------------------------------------------------------------

def layer_colors(n_layer):
    """From the first layer, dark, to the last, bright; the palest end of viridis would vanish on white."""
    return matplotlib.colormaps["viridis"](np.linspace(0, 0.87, n_layer))


def listed(n_layer):
    """The layers that a legend names, ten at most: it must leave room for the curves."""
    return {round(layer) for layer in np.linspace(0, n_layer - 1, min(n_layer, 10))}


def line_style(metrics):
    """Points where they are few enough to be told apart, and a lone evaluation needs one to be seen."""
    return {"marker": "o", "markersize": 3.5, "linewidth": 1.6} if len(metrics["iteration"]) <= 60 else {}


def headline(figure, axes, title, explanation):
    """What to see, in bold, and under it how to read the picture."""
    figure.suptitle(title, x=0.01, horizontalalignment="left")
    axes.set_title(explanation)


def table_legend(axes, handles, header, rows, **place):
    """A legend that is a table: a line of `header`, then a line of `rows` beside each of the handles."""
    handles, rows = ([item for layer, item in enumerate(items) if layer in listed(len(rows))] for items in (handles, rows))
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in [header, *rows]]
    lines = [line.replace(" ", "\N{NO-BREAK SPACE}") for line in lines]  # SVG shrinks a run of plain spaces to one
    no_handle = axes.plot([], [], " ")[0]
    axes.legend([no_handle, *handles], lines, prop={"family": "monospace", "size": 8.5}, **place)


def iteration_ticks(axis):
    """Whole numbers, with a comma for the thousands."""
    axis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axis.set_major_formatter("{x:,.0f}")


def loss_ticks(axis):
    """Plain numbers on a logarithmic axis: 2, 2.5, 3, 4, 5, 6 instead of powers of ten."""
    axis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def draw_loss(metrics):
    """Losses against iterations, tokens and passes over the text, and the learning rate in a strip below."""
    iteration, val = metrics["iteration"], metrics["val_loss"]
    figure = Figure(figsize=(WIDTH, 5.6))
    axes, strip = figure.subplots(2, height_ratios=[6, 1], sharex=True)
    axes.plot(iteration, metrics["train_loss"], color=TRAIN_COLOR, label="train", **line_style(metrics))
    axes.plot(iteration, val, color=VAL_COLOR, label="validation", **line_style(metrics))
    if same_text_and_tokenizer(metrics):
        if iteration[-1] >= REFERENCE_ITERATION[1]:
            end = np.searchsorted(REFERENCE_ITERATION, iteration[-1])  # its first point at or past our end
            shown = slice(1, end + 1)  # from 500: a straight line from 0 to there would be far above what it really did
            thin = {"linestyle": "--", "linewidth": 1, "marker": ".", "markersize": 5, "alpha": 0.75}
            x = REFERENCE_ITERATION[shown]
            axes.plot(x, REFERENCE_TRAIN[shown], color=TRAIN_COLOR, label="train, published run", **thin)
            axes.plot(x, REFERENCE_VAL[shown], color=VAL_COLOR, label="validation, published run", **thin)
        best = REFERENCE_VAL.argmin()
        axes.axhline(REFERENCE_VAL[best], color=VAL_COLOR, linestyle=":", linewidth=1, alpha=0.75,
                     label=f"published run's best: {REFERENCE_VAL[best]:.4f}, at {REFERENCE_ITERATION[best]:,}")
    axes.set(yscale="log", ylabel="loss, nats per token")  # logarithmic, or the first drop would flatten all the rest
    loss_ticks(axes.yaxis)

    title, per_token = "No validation loss is a number: training diverged", chars_per_token(metrics)
    if np.isfinite(per_token):
        best = np.nanargmin(val)
        title = (f"Best validation loss: {val[best] / per_token:.4f} nats per character, "
                 f"at iteration {iteration[best]:,.0f}")
        axes.plot(iteration[best], val[best], "*", color=VAL_COLOR, markersize=15, markeredgecolor="white", zorder=5,
                  label=f"validation: best {val[best]:.4f}")
        right = axes.secondary_yaxis("right", functions=(lambda y: y / per_token, lambda y: y * per_token))
        right.set_ylabel("nats per character")
        loss_ticks(right.yaxis)
    axes.legend(loc="upper right")
    headline(figure, axes, title, "Where validation parts from training, the network learns its text by heart.")

    if iteration[-1] > 0:
        tokens, epochs = metrics["tokens_seen"][-1] / iteration[-1], metrics["epochs"][-1] / iteration[-1]
        top = axes.secondary_xaxis("top", functions=(lambda x: x * tokens / 1e6, lambda x: x / tokens * 1e6))
        top.set_xlabel("million tokens seen (passes over the training text)")
        top.xaxis.set_major_formatter(lambda x, _: f"{x:g} ({x * 1e6 * epochs / tokens:.3g})")

    rate = metrics["learning_rate"]
    strip.plot(iteration, rate, color=GREY, **line_style(metrics))
    strip.set(xlabel="iteration", ylabel="learning\nrate", ylim=(0, 1.2 * rate.max() or 1), yticks=[0, rate.max()])
    strip.yaxis.set_major_formatter("{x:.3g}")
    iteration_ticks(strip.xaxis)
    return figure


def draw_relu_training(metrics):
    """Share of zeros and of dead units of each layer's ReLU against iterations."""
    iteration, zeros, dead = metrics["iteration"], metrics["relu_zeros"], np.nan_to_num(metrics["relu_dead"])
    figure = Figure(figsize=(WIDTH, 5.2))
    upper, lower = figure.subplots(2, sharex=True)
    published = reference_zeros(metrics)
    for layer, color in enumerate(layer_colors(len(zeros))):
        upper.plot(iteration, zeros[layer], color=color, **line_style(metrics),
                   label=f"layer {layer + 1}" if layer in listed(len(zeros)) else None)
        lower.plot(iteration, dead[layer], color=color, **line_style(metrics))
        if published is not None:
            upper.plot(REFERENCE_ITERATION[-1], published[layer], "D", color=color, markeredgecolor="black")
    if published is not None:
        upper.plot([], [], "D", color="white", markeredgecolor="black", label="published\nrun's end")
    upper.legend(loc="upper left", bbox_to_anchor=(1, 1))

    layer, row = np.unravel_index(dead.argmax(), dead.shape)
    title = "Dead ReLUs: none, every unit fired in every evaluation"
    if dead.any():
        title = (f"Dead ReLUs: at worst {dead.max():.1%} of a layer (layer {layer + 1}, iteration {iteration[row]:,.0f}), "
                 f"at the end {dead[:, -1].max():.1%}")
    headline(figure, upper, title, "Share of outputs that are exactly zero: a unit fires for some tokens only.")
    lower.set_title("Share of dead units: those that fire for no token of the batch, and so learn nothing from it.")
    top = max(0.01, 1.1 * dead.max())
    lower.set(xlabel="iteration", ylim=(-0.04 * top, top))  # so that a line at zero is seen
    for axes in (upper, lower):
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    iteration_ticks(lower.xaxis)
    return figure


def draw_histograms(histograms, kind):
    """A figure with the `kind` of HISTOGRAMS overlaid, layer by layer. Returns figure, axes and the lines' handles."""
    figure = Figure(figsize=(WIDTH, 4.6))
    axes = figure.subplots()
    density, edges = histograms[f"{kind}_density"], histograms[f"{kind}_edges"]
    density = np.where(density > 0, density, np.nan)  # an empty bin is a gap, not a line down to the logarithm of 0
    handles = [axes.stairs(*layer, color=color, linewidth=1.5, baseline=None)
               for *layer, color in zip(density, edges, layer_colors(len(density)))]
    axes.set(yscale="log", ylabel="probability density")  # logarithmic, or nothing shows beside the spike at zero
    return figure, axes, handles


def draw_relu_outputs(metrics, histograms, row):
    """The distribution of each ReLU's outputs; `row` is the evaluation in `metrics` that the histograms are of."""
    figure, axes, handles = draw_histograms(histograms, "relu")
    mean, std, zeros, dead = (metrics[f"relu_{name}"][:, row] for name in ("mean", "std", "zeros", "dead"))
    header = ["", "mean", "std", "dead units", "zeros"]
    rows = [[f"layer {i + 1}", f"{mean[i]:.3f}", f"{std[i]:.3f}", f"{dead[i]:.1%}", f"{zeros[i]:.1%}"]
            for i in range(len(mean))]
    if (published := reference_zeros(metrics)) is not None:
        header.append("(published)")
        rows = [[*cells, f"({share:.1%})"] for cells, share in zip(rows, published)]
    table_legend(axes, handles, header, rows, loc="upper right")
    headline(figure, axes, f"ReLU outputs: by layer, {zeros.min():.1%} to {zeros.max():.1%} are exactly zero",
             f"Iteration {histograms['iteration']:,}. The spike is the zeros; beside it, how strongly units fire.")
    axes.set(xlabel="output of the ReLU", xlim=(0, None))
    return figure


def draw_relu_gradients(metrics, histograms, row):
    """The distribution of the loss's gradient at each ReLU; `row` as in draw_relu_outputs."""
    figure, axes, handles = draw_histograms(histograms, "relu_grad")
    mean, std = metrics["relu_grad_mean"][:, row], metrics["relu_grad_std"][:, row]
    rows = [[f"layer {i + 1}", f"{mean[i]:.1e}", f"{std[i]:.1e}"] for i in range(len(mean))]
    table_legend(axes, handles, ["", "mean", "std"], rows, loc="upper left", bbox_to_anchor=(1, 1))
    title = "Gradients at the ReLUs"
    if std.max() > std.min() > 0:
        title += (f": layer {std.argmax() + 1}'s spread {std.max() / std.min():.1f} times as wide "
                  f"as layer {std.argmin() + 1}'s")
    headline(figure, axes, title, f"Iteration {histograms['iteration']:,}. Curves of like width: every layer gets its "
             "share of the signal. A mere spike: that layer starves.")
    axes.set(xlabel="gradient of the loss with respect to the ReLU's output")
    axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0), useMathText=True)
    return figure


def draw_attention(tokens, weights):
    """Each head of each layer: which earlier tokens (columns) a token (rows) takes how much from."""
    n_layer, n_head, T, _ = weights.shape
    side = max(WIDTH / (n_head + 0.7), 0.055 * T)  # wider than the others, if labels were too small to be read
    figure = Figure(figsize=(side * (n_head + 0.7), side * n_layer + 1))
    grid = figure.subplots(n_layer, n_head, squeeze=False, sharex=True, sharey=True)
    for layer, row in enumerate(grid):
        for head, axes in enumerate(row):
            shares = np.where(np.tri(T, dtype=bool), weights[layer, head], np.nan)
            picture = axes.imshow(shares, cmap="viridis", norm=PowerNorm(0.5, 0, 1))  # the root, or small shares were all dark
            axes.grid(False)
            axes.set_xticks(range(T), tokens, fontsize=min(7, 75 * side / T), rotation=90)
            axes.set_yticks(range(T), tokens, fontsize=min(7, 75 * side / T))
            axes.tick_params(length=0, pad=1)
            if layer == 0:
                axes.set_title(f"head {head + 1}", fontsize=8)
        row[0].set_ylabel(f"layer {layer + 1}", fontsize=8)
    figure.colorbar(picture, ax=grid, label="share of attention", shrink=0.4, aspect=30, pad=0.01)
    figure.suptitle("Attention: from which tokens (columns) each token (rows) gathers, head by head", x=0.01,
                    horizontalalignment="left")
    return figure


def draw_expected(ids, labels, probs):
    """The text, each token shaded by the probability the network gave it, and above it what it thought likeliest."""
    lines = math.ceil((len(ids) - 1) / 10)
    per_line = math.ceil((len(ids) - 1) / lines)  # lines of about the same length
    figure = Figure(figsize=(WIDTH, 0.75 * lines + 1))
    axes = figure.subplots()
    colors, center = matplotlib.colormaps["Blues"], {"horizontalalignment": "center", "verticalalignment": "center"}
    for place, (token, before) in enumerate(zip(ids[1:], probs)):
        row, column = divmod(place, per_line)
        x, share, likeliest = column + 0.48, before[token], before.argmax()
        axes.add_patch(matplotlib.patches.Rectangle((column, row), 0.96, 0.55, color=colors(0.85 * share)))
        axes.text(x, row + 0.22, labels[token], family="monospace", fontsize=11, color="white" if share > 0.55 else "black", **center)
        axes.text(x, row + 0.44, f"{share:.1%}", fontsize=6.5, color="white" if share > 0.55 else "#444444", **center)
        if likeliest != token:
            axes.text(x, row - 0.12, f"{labels[likeliest]} {before[likeliest]:.0%}", family="monospace", fontsize=7, color=GREY, **center)
    nats = -np.log(probs[np.arange(len(ids) - 1), ids[1:]]).mean()
    axes.set(xlim=(0, per_line), ylim=(lines - 0.35, -0.3))
    axes.axis("off")
    headline(figure, axes, f"What the network expects: {nats:.2f} nats per token, a perplexity of {np.exp(nats):.1f}",
             "The darker a token, the likelier the network thought it before it read it; above, in grey, a likelier one.")
    return figure


def save(figure, path):
    """Write `figure` to `path`, in the format of its suffix, the same bytes for the same figure."""
    with atomic_write(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a box stands for a character that Matplotlib's font lacks
        figure.savefig(file, format=path.suffix[1:], metadata={"Date": None})
    print(path)


# ---- command line ---------------------------------------------------------------------------------------------------

def draw_all(out_dir, suffix):
    """Draw every picture for which `out_dir` holds the figures. Raises ValueError or OSError."""
    metrics = read_metrics(out_dir / "metrics.csv")
    save(draw_loss(metrics), out_dir / f"loss.{suffix}")
    save(draw_relu_training(metrics), out_dir / f"relu_training.{suffix}")

    path = out_dir / "histograms.npz"
    if not path.exists():
        print(f"plots.py: {path} is missing, so no ReLU histograms: train.py writes it", file=sys.stderr)
        return
    histograms = read_histograms(path, n_layer=len(metrics["relu_zeros"]))
    rows = np.flatnonzero(metrics["iteration"] == histograms["iteration"])
    if len(rows) == 0:
        raise ValueError(f"{path} is of iteration {histograms['iteration']}, which metrics.csv lacks; train again")
    save(draw_relu_outputs(metrics, histograms, rows[-1]), out_dir / f"relu_outputs.{suffix}")
    save(draw_relu_gradients(metrics, histograms, rows[-1]), out_dir / f"relu_gradients.{suffix}")


def draw_reading(out_dir, text, suffix):
    """Draw how the network in `out_dir` reads `text`. Raises ValueError or OSError."""
    ids, labels, weights, probs = read_text_with_network(out_dir, text)
    save(draw_attention([labels[token] for token in ids], weights), out_dir / f"attention.{suffix}")
    save(draw_expected(ids, labels, probs), out_dir / f"expected.{suffix}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, help="folder of the run, read and written "
                        "(default: checkpoints/, or the pretrained network's if it holds none)")
    parser.add_argument("--attention", metavar="TEXT", help="draw how the network reads this text instead")
    parser.add_argument("--format", choices=("png", "svg"), default="png",
                        help="png, pixels, or svg, vector graphics (default: png)")
    return parser.parse_args()


def main():
    args = parse_args()
    try:
        with matplotlib.rc_context(STYLE):
            if args.attention is None:
                draw_all(args.out_dir or default_run("metrics.csv"), args.format)
            else:
                draw_reading(args.out_dir or default_run("model.pt"), args.attention, args.format)
    except (ValueError, OSError) as error:
        sys.exit(f"plots.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a path, whatever the terminal can show
    main()
