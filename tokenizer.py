"""Byte-pair encoding from scratch: learns tokens from a text, and cuts any text into them.

    python tokenizer.py train                     # learn 500 tokens from data/input.txt
    python tokenizer.py show "ROMEO: speak"       # see a text cut into its tokens
    python tokenizer.py encode "ROMEO: speak" | python tokenizer.py decode
    python tokenizer.py vocab                     # the learned tokens, with their counts

Tokens 0 to 255 are the bytes. Each further token is the most frequent pair of neighbours in the
text so far, merged into one (Gage 1994; Sennrich et al. 2016). `TokenSequence` finds and merges a
pair, `learn` chooses the pairs, `BasicTokenizer` applies them to any text. tests/textbook_bpe.py
does the same slowly, in 50 lines: read it first. From "texts larger than memory" on all can wait.
"""
import argparse
import codecs
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import operator
import os
import pickle
import pickletools
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from heapq import heappop, heappush
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
CHECKPOINTS = HERE / "checkpoints"
PRETRAINED = CHECKPOINTS / "pretrained"  # a trained network that comes with the repository
DEFAULT_TEXT = HERE / "data" / "input.txt"

Pair = tuple[int, int]  # of tokens
Merges = dict[Pair, int]  # what each pair is merged into
Vocab = dict[int, bytes]  # what each token spells


# ---- learning ----

BLOCK = 1 << 21  # bytes that are counted or encoded at a time, which bounds the memory
MAX_VOCAB = 1 << 20  # `_encode_short` needs a character for each token: there are 0x110000


class TokenSequence:
    """A text as a sequence of tokens, laid over its bytes so that a merge moves nothing.

    `head[i]` is the token that starts at byte i, or `hole` (a dot below) if none does; `tail[i]` is
    the token that ends there, or out of date (in brackets): it is read only right before a token.

        text         a    b    c    a    b
        head, tail   97   98   99   97   98
        head         256  .    99   256  .         after merging (97, 98) into 256
        tail         (97) 256  99   (97) 256

    `where[token]` holds the places at which a token started when last looked up. A token only ever
    loses places, so no others need be searched; `find` searches those of the rarer of two tokens.
    """

    def __init__(self, data: bytes, vocab_size: int):
        text = np.frombuffer(data, np.uint8)
        self.hole = np.min_scalar_type(vocab_size).type(vocab_size)  # the first unused id
        self.head = np.append(text, self.hole)  # with a hole at the end, for head[n] and tail[-1]
        self.tail = self.head.copy()
        self.size = [1] * 256  # bytes of each token
        blocks = np.array_split(text, len(text) // BLOCK + 1)
        # how often each token occurs, at most
        self.count = sum(np.bincount(block, minlength=256) for block in blocks).tolist()
        self.where = {}
        # int64 is faster, int32 smaller
        self.index = np.int32 if BLOCK < len(text) < 1 << 31 else np.int64

    def places(self, token: int) -> np.ndarray:
        """Returns the byte positions at which a token starts, ascending."""
        if token in self.where:
            places = self.where[token]
            places = places.compress(self.head.take(places) == token)  # twice as fast as [ ]
        else:
            places = np.flatnonzero(self.head == token).astype(self.index)
        self.where[token], self.count[token] = places, len(places)
        return places

    def find(self, pair: Pair) -> np.ndarray:
        """Returns the byte positions at which a pair starts, ascending, overlaps included.

        [1, 2, 3, 1, 2] with (1, 2) -> [0, 3];  [1, 1, 1] with (1, 1) -> [0, 1]
        """
        left, right = pair
        if self.count[left] <= self.count[right]:
            places = self.places(left)
            return places.compress(self.head.take(places + self.size[left]) == right)
        places = self.places(right)
        return places.compress(self.tail.take(places - 1, mode="wrap") == left) - self.size[left]

    def merge(self, pair: Pair, places: np.ndarray, new: int) -> tuple[np.ndarray, np.ndarray]:
        """Makes `new` of the pair at the `places` found, from left to right, each token used once.

        [1, 2, 3, 1, 2] with (1, 2) into 4 -> [4, 3, 4];  [1, 1, 1] with (1, 1) into 4 -> [4, 1]

        Returns the neighbours before and after each `new`, or `hole` at the ends of the text.
        """
        left, right = pair
        if left == right:
            places = every_other(places, self.size[left])
        self.size.append(self.size[left] + self.size[right])
        self.count.append(len(places))
        self.where[new] = places
        self.head[places + self.size[left]] = self.hole
        self.head[places] = new
        self.tail[places + (self.size[new] - 1)] = new
        return self.tail.take(places - 1, mode="wrap"), self.head.take(places + self.size[new])

    def ids(self) -> np.ndarray:
        """Returns the tokens in order, uint16 (uint32 for a vocabulary of more than 65,535)."""
        return self.head.compress(self.head != self.hole)


def every_other(places: np.ndarray, size: int) -> np.ndarray:
    """Keeps every other of a run of places `size` apart: [0, 1, 2, 7] with 1 -> [0, 2, 7]."""
    rank = np.arange(len(places))
    starts = np.diff(places, prepend=-size - 1) != size
    return places[(rank - np.maximum.accumulate(np.where(starts, rank, 0))) % 2 == 0]


def count_pairs(text: np.ndarray) -> dict[Pair, int]:
    """Counts each pair of neighbours: [1, 2, 3, 1, 2] -> {(1, 2): 2, (2, 3): 1, (3, 1): 1}."""
    counts = np.zeros(1 << 16, np.int64)
    for start in range(0, len(text), BLOCK):
        block = text[start:start + BLOCK + 1].astype(np.int64)
        counts += np.bincount(block[:-1] * 256 + block[1:], minlength=1 << 16)
    return {divmod(key, 256): count for key, count in tally(counts)}


def tally(counts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs each count but 0 with its index: [0, 3, 1] -> (1, 3), (2, 1)."""
    keys = np.flatnonzero(counts)
    return zip(keys.tolist(), counts[keys].tolist())


def learn(tokens: TokenSequence, vocab_size: int) -> Iterator[tuple[Pair, int, int]]:
    """Merges the most frequent pair, over and over, until there are `vocab_size` tokens.

    Overlapping occurrences all count, and a tie goes to the pair that occurs first. Yields (pair,
    new token, count) of each merge. Raises ValueError if the text runs out of pairs.

    The textbook counts all pairs anew for each merge. Here a pair is counted when its younger token
    is made, into a heap of (-count, first place, pair). From then on its count only falls and its
    first place only moves on, so the heap never holds less than the truth: if the pair on top stays
    there when it is counted once more, it is the best. Each merge lowers `at_most[pair]`, an upper
    bound of the count, without a look at the text, so that few pairs have to be counted.
    """
    at_most = count_pairs(tokens.head[:-1])
    heap = sorted((-count, 0, pair) for pair, count in at_most.items())  # a sorted list is a heap
    for new in range(256, vocab_size):
        pair, places = pop_best(heap, at_most, tokens)
        if not pair:
            raise ValueError("the text has no pair left to merge: "
                             f"vocab_size can be {new} at most, not {vocab_size}")
        yield pair, new, len(places)
        (left, right), first = pair, int(places[0])
        before, after = tokens.merge(pair, places, new)
        # [:new] leaves out the hole, and `new` itself, as the second loop counts (new, new)
        for token, count in tally(np.bincount(before)[:new]):
            at_most[token, left] -= count
            at_most[token, new] = count
            heappush(heap, (-count, first - tokens.size[token], (token, new)))
        for token, count in tally(np.bincount(after)[:new + 1]):
            if token != new:
                at_most[right, token] -= count
            at_most[new, token] = count
            heappush(heap, (-count, first, (new, token)))


def pop_best(heap: list[tuple[int, int, Pair]], at_most: dict[Pair, int],
             tokens: TokenSequence) -> tuple[Pair | None, np.ndarray | None]:
    """Takes the best pair off the heap of `learn`, with its places; (None, None) at the end."""
    while heap:
        count, first, pair = heappop(heap)
        if at_most[pair] < -count:
            heappush(heap, (-at_most[pair], first, pair))
            continue
        places = tokens.find(pair)
        at_most[pair] = len(places)
        if len(places):
            entry = (-len(places), int(places[0]), pair)
            if not heap or entry < heap[0]:
                return pair, places
            heappush(heap, entry)
    return None, None


# ---- encoding ----

SHORT = 8192  # bytes up to which replacing in a string is faster than an index of the text


class BasicTokenizer:
    """Byte-level BPE without special tokens.

        tokenizer = BasicTokenizer("data/input.txt", vocab_size=500)
        tokenizer = BasicTokenizer()
        tokenizer.decode(tokenizer.encode("Hi")) == "Hi"

    With a `data_path` it learns `vocab_size` tokens from that text and writes merges.pkl and
    vocab.pkl into `out_dir`, if that is not None; without, it loads them from there. Raises
    ValueError if the text or the files are missing or invalid, `vocab_size` is impossible or a
    network in `out_dir` needs the tokenizer that is there, OSError if it cannot write.

    `merges` is {(int, int): int} in the order learned, `vocab` is {int: bytes}, and `fingerprint`
    is the SHA-256 of the merges in hexadecimal: tokenizers are the same if and only if theirs is.
    """

    def __init__(self, data_path: str | Path | None = None, vocab_size: int = 500,
                 verbose: bool = False, out_dir: str | Path | None = CHECKPOINTS):
        self.data_path, self.verbose = data_path, verbose
        self.out_dir = out_dir if out_dir is None else Path(out_dir)
        if data_path is None and out_dir is not None:
            self._use(read_merges(self.out_dir))
        else:
            self.vocab_size = vocab_size
            self.train()

    def train(self, data_path: str | Path | None = None) -> None:
        """Learns from the text, writes the files, prints bytes per token (if verbose, merges)."""
        self.data_path = data_path or self.data_path
        if self.data_path is None:
            raise ValueError("there is no text to learn from: give a data_path")
        if not 256 <= self.vocab_size <= MAX_VOCAB:
            raise ValueError(f"vocab_size must be from 256 (the bytes) to {MAX_VOCAB}, "
                             f"not {self.vocab_size}")
        data, total = learning_text(self.data_path), self.vocab_size - 256
        tokens = TokenSequence(data, self.vocab_size)
        steps = learn(tokens, self.vocab_size)
        merges, vocab, size = {}, spell({}), 0
        for pair, new, count in tqdm(steps, "merges", total, delay=1, leave=False, disable=None):
            merges[pair], vocab[new] = new, vocab[pair[0]] + vocab[pair[1]]
            size += len(vocab[new]) + 32  # more than a file will take for it
            if size > MAX_BYTES:  # where no pair occurs twice, each token is longer than the last
                raise ValueError("the tokens become too long: "
                                 f"vocab_size can be {new} at most, not {self.vocab_size}")
            if self.verbose:
                tqdm.write(f"merge {len(merges)}/{total}: {pair} -> {new} ({vocab[new]}) "
                           f"had {count} occurrences")
        if self.out_dir is not None:
            save_merges(self.out_dir, merges)
        self._use(merges)
        print(compression_ratio(data, tokens.ids()))

    def save(self, out_dir: str | Path) -> None:
        """Writes merges.pkl and vocab.pkl. Raises ValueError if a network there needs others."""
        save_merges(Path(out_dir), self.merges)

    def _use(self, merges):
        self.merges, self.vocab, self.vocab_size = merges, spell(merges), 256 + len(merges)
        self.fingerprint = fingerprint(merges)
        self._as_strings = [(chr(a) + chr(b), chr(new)) for (a, b), new in merges.items()]
        # bytes a token may join
        self._joints = {self.vocab[a][-1:] + self.vocab[b][:1] for a, b in merges}

    def encode(self, text: str | bytes) -> list[int]:
        """Returns the token ids of a text, and prints the compression ratio."""
        data = to_bytes(text)
        ids = self.encode_array(data).tolist()
        print(compression_ratio(data, ids))
        return ids

    def encode_array(self, text: str | bytes, dropout: float = 0.0,
                     rng: np.random.Generator | None = None) -> np.ndarray:
        """Returns the token ids, (tokens,) uint16, or uint32 for a vocabulary of more than 65,535.

        With `dropout` each single merge is left out with that probability, drawn from `rng`: a text
        is spelled anew each time (BPE-dropout, Provilkov et al. 2020, where a merge left out is
        drawn again after each later merge; here it is drawn once).
        """
        data = to_bytes(text)
        if len(data) <= SHORT and not dropout:
            return self._encode_short(data)
        return np.concatenate([self._encode_long(block, dropout, rng)
                               for block in self._blocks([data])])

    def _encode_short(self, data):
        """Applies each merge in order to a string in which each token is a character."""
        string = data.decode("latin-1")  # the byte 97 is the character 97
        for pair, new in self._as_strings:
            if pair in string:
                string = string.replace(pair, new)
        return np.fromiter(map(ord, string), np.min_scalar_type(self.vocab_size), len(string))

    def _encode_long(self, data, dropout=0.0, rng=None):
        """Applies each merge in order, at the places that an index of the text finds."""
        tokens = TokenSequence(data, self.vocab_size)
        for pair, new in self.merges.items():
            places = tokens.find(pair)
            if dropout:
                places = places.compress(rng.random(len(places)) >= dropout)
            tokens.merge(pair, places, new)
        return tokens.ids()

    def _blocks(self, pieces):
        """Joins and cuts pieces of a text, only between two bytes that no token joins."""
        rest = b""
        for piece in pieces:
            data, start, end = rest + piece, 0, max(BLOCK, len(rest))  # no cut in the rest
            while end < len(data):
                if data[end - 1:end + 1] in self._joints:
                    end += 1
                else:
                    yield data[start:end]
                    start, end = end, end + BLOCK
            rest = data[start:]
            if len(rest) > max(UNCUT, len(piece)):
                raise ValueError(f"the text cannot be cut anywhere in {UNCUT / 1e6:.0f} MB, as a "
                                 "token may join any two of its bytes: use one with lines")
        yield rest

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes of token ids: a list, an array or a tensor, (T,) or (1, T).

        Raises ValueError for an id that there is not, and for several rows of ids.
        """
        if hasattr(ids, "tolist"):
            ids = ids.tolist()
        if isinstance(ids, list) and len(ids) == 1 and isinstance(ids[0], list):
            ids = ids[0]
        try:
            return b"".join([self.vocab[token] for token in map(operator.index, ids)])
        except TypeError as error:
            raise ValueError(f"these are not the ids of one text, whole numbers: {error}") from None
        except KeyError as error:
            raise ValueError(f"there is no token {error}: "
                             f"the ids are 0 to {self.vocab_size - 1}") from None

    def count_characters(self, ids: np.ndarray) -> int:
        """Counts the characters of token ids: all bytes but those that continue one."""
        characters = [sum(byte & 0xC0 != 0x80 for byte in spelled)
                      for spelled in self.vocab.values()]
        blocks = (ids[start:start + BLOCK] for start in range(0, len(ids), BLOCK))
        return sum(int(np.bincount(block, minlength=self.vocab_size) @ characters)
                   for block in blocks)


def compression_ratio(data: bytes, ids: list[int] | np.ndarray) -> str:
    """Returns a line with the bytes per token."""
    return f"compression ratio: {len(data) / max(len(ids), 1):.2f}X"


def to_bytes(text: str | bytes) -> bytes:
    """Returns bytes as they are, and a str in UTF-8: a command line's bytes are those given."""
    if isinstance(text, bytes):
        return text
    try:
        return text.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return text.encode("utf-8", errors="surrogatepass")


# ---- texts larger than memory ----
# Only pieces of a long text are learned from. Several processes encode it into a file. This is
# mapped into memory, so that only what is looked at is read.

LONG = 1 << 25   # bytes of a text above which it is long
PIECE = 1 << 16  # bytes of the pieces learned from, which are LONG bytes in all
UNCUT = 1 << 28  # bytes of a long text among which must be a place to cut it
HEADER = 4096    # bytes before the ids in tokens.bin: JSON that says what they were made from


class Tokens(NamedTuple):
    """A text as tokens, and what is known of it."""

    ids: np.ndarray  # (tokens,) uint16 or uint32, in memory or mapped from tokens.bin
    digest: str      # SHA-256 of the ids, in hexadecimal
    size: int        # bytes of the text
    characters: int


def is_long(path: str | Path) -> bool:
    """Returns whether a text is not to be held in memory."""
    return os.path.isfile(path) and os.path.getsize(path) > LONG


def learning_text(path: str | Path) -> bytes:
    """Returns a text or, if long, pieces spread evenly over it: whole lines if it has any."""
    if not is_long(path):
        return read_text(path).encode()
    size, pieces = os.path.getsize(path), []
    print(f"learning from {LONG / 1e6:.0f} MB of {path}, spread evenly over its {size / 1e6:,.0f}")
    for number in range(LONG // PIECE):
        _, text = next(text_pieces(path, number * size // (LONG // PIECE), PIECE))
        pieces.append(text[text.find("\n") + 1:text.rfind("\n") + 1] or text)
    return "".join(pieces).encode()


def load_tokens(tokenizer: BasicTokenizer, path: str | Path, folder: str | Path) -> Tokens:
    """Returns a text as tokens: in memory or, if it is long, mapped from tokens.bin in `folder`.

    That file is written unless there is one of the same tokenizer and of a text of the same size
    and the same time of change or digest. Raises ValueError as `read_text` does or if a text cannot
    be cut, OSError if the file cannot be written.
    """
    if not is_long(path):
        text = read_text(path)
        ids = tokenizer.encode_array(text)
        return Tokens(ids, hashlib.sha256(ids).hexdigest(), len(text.encode()), len(text))
    file, text, of_text = Path(folder) / "tokens.bin", os.stat(path), hashlib.sha256()
    with suppress(FileNotFoundError, ValueError, LookupError, TypeError):  # missing, or damaged
        with open(file, "rb") as header:
            facts = json.loads(header.read(HEADER))
        same = (facts["tokenizer"], facts["size"]) == (tokenizer.fingerprint, text.st_size)
        if same and facts["time"] != text.st_mtime_ns:
            for data, _ in text_pieces(path, 0, BLOCK):
                of_text.update(data)
            same = facts["text"] == of_text.hexdigest()
        if same:
            dtype = np.min_scalar_type(tokenizer.vocab_size)
            ids = np.memmap(file, dtype, "r", HEADER, facts["tokens"])
            return Tokens(ids, facts["ids"], facts["size"], facts["characters"])
    encode_file(tokenizer, path, file)
    return load_tokens(tokenizer, path, folder)


def encode_file(tokenizer: BasicTokenizer, path: str | Path, file: Path) -> None:
    """Writes tokens.bin for `load_tokens`, and raises what that raises."""
    text, of_text, of_ids, characters = os.stat(path), hashlib.sha256(), hashlib.sha256(), 0

    def pieces():
        for data, piece in text_pieces(path, 0, BLOCK):
            of_text.update(data)
            bar.update(len(data))
            yield piece.encode()

    bar = tqdm(None, "encoding", text.st_size, False, unit="B", unit_scale=True, disable=None)
    blocks = encode_blocks(tokenizer, tokenizer._blocks(pieces()))
    with bar, closing(blocks), atomic_write(file) as output:
        output.write(bytes(HEADER))
        for ids in blocks:
            of_ids.update(ids)
            characters += tokenizer.count_characters(ids)
            output.write(ids)
        tokens, now = (output.tell() - HEADER) // ids.itemsize, os.stat(path)
        if (now.st_size, now.st_mtime_ns) != (text.st_size, text.st_mtime_ns):
            raise ValueError(f"{path} was changed while it was read: start again")
        output.seek(0)
        output.write(json.dumps({
            "tokens": tokens, "ids": of_ids.hexdigest(), "characters": characters,
            "tokenizer": tokenizer.fingerprint, "text": of_text.hexdigest(),
            "size": text.st_size, "time": text.st_mtime_ns}).encode().ljust(HEADER))


def encode_blocks(tokenizer: BasicTokenizer, blocks: Iterable[bytes]) -> Iterator[np.ndarray]:
    """Yields the ids of blocks in order, which as many processes as there are cores encode.

    Each runs `answer`: a process of multiprocessing would load PyTorch with the script that runs.
    """
    code = f"import sys; sys.path[:0] = [{str(HERE)!r}]; import tokenizer; tokenizer.answer()"
    cores = usable_cores()
    try:
        with ExitStack() as stack:
            processes = [stack.enter_context(subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, start_new_session=True)) for _ in range(cores)]
            for process in processes:
                pickle.dump(tokenizer.merges, process.stdin)
                process.stdin.flush()
            turns = itertools.cycle(processes)
            for block, process in zip(blocks, turns):
                ids = pickle.load(process.stdout)  # of its last block; after the merges, none
                pickle.dump(block, process.stdin)
                process.stdin.flush()
                yield ids
            for process in itertools.islice(turns, cores):
                yield pickle.load(process.stdout)
    except (EOFError, OSError, pickle.UnpicklingError) as error:
        raise ValueError("a process that encoded the text was ended, for lack of memory perhaps"
                         ) from error


def answer() -> None:
    """Reads merges, then blocks to encode by them, from standard input, for `encode_blocks`."""
    tokenizer = BasicTokenizer.__new__(BasicTokenizer)
    tokenizer._use(pickle.load(sys.stdin.buffer))
    block = b""  # the answer to the merges
    while True:  # until an EOFError, as there is no block left, or a BrokenPipeError
        pickle.dump(tokenizer._encode_long(block), sys.stdout.buffer)
        sys.stdout.flush()
        block = pickle.load(sys.stdin.buffer)


# ---- files ----

MERGES_FILE, VOCAB_FILE = "merges.pkl", "vocab.pkl"  # the second follows from the first
MAX_BYTES = 1 << 26  # limit for a file, and for all tokens: they must not fill the memory
PICKLED_NUMBERS = {"INT", "BININT", "BININT1", "BININT2"}
PICKLE_STRUCTURE = {"PROTO", "FRAME", "MARK", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "TUPLE",
                    "TUPLE2", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "STOP"}


def fingerprint(merges: Merges) -> str:
    """Returns the SHA-256 of the pairs in their order, in hexadecimal."""
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    return hashlib.sha256(lines.encode()).hexdigest()


def digests(folder: Path, name: str) -> dict[Path, str | None]:
    """Returns the SHA-256 of its "tokenizer" or "text" that each network's file in a folder holds.

    It looks for the bytes, as reading such a file takes PyTorch; None where there are none.
    """
    found = {}
    for path in sorted(folder.glob("[!.]*.pt*")):  # model.pt, last.pt, last.pt.old, model_int8.pt
        with suppress(OSError), open(path, "rb") as file:
            digest = re.search(name.encode() + rb"[^0-9a-f].{,15}?([0-9a-f]{64})",
                               file.read(MAX_BYTES), re.DOTALL)
            found[path] = digest and digest[1].decode()
    return found


def save_merges(folder: Path, merges: Merges) -> None:
    """Writes merges.pkl and, for other programs and eyes, vocab.pkl.

    Raises ValueError if a network there needs another tokenizer.
    """
    for network, needed in digests(folder, "tokenizer").items():
        if needed not in (None, fingerprint(merges)):
            raise ValueError(f"{network} was trained with another tokenizer, without which it is "
                             "of no use: choose another --out_dir")
    for name, table in (VOCAB_FILE, spell(merges)), (MERGES_FILE, merges):
        with atomic_write(folder / name) as file:
            pickle.dump(table, file)


def spell(merges: Merges) -> Vocab:
    """Spells each token: {(97, 98): 256} -> {0: b"\\x00", ..., 255: b"\\xff", 256: b"ab"}."""
    vocab = {token: bytes([token]) for token in range(256)}
    for (left, right), new in merges.items():
        vocab[new] = vocab[left] + vocab[right]
    return vocab


def read_merges(folder: Path) -> Merges:
    """Reads merges.pkl, and runs no code that it may hold, as `pickle.load` would.

    It reads nothing but numbers, left, right, new, left, right, new ... Each merge must make the
    next id, from 256 on, of two earlier ones. Raises ValueError if the file is missing, too large
    or damaged.
    """
    path, numbers, merges, sizes, total = folder / MERGES_FILE, [], {}, [1] * 256, 256
    if not path.exists():
        remedy = "run python tokenizer.py train"
        if any(folder.glob("*.pt")):  # a network needs the tokenizer of its own run
            remedy = ("copy merges.pkl and vocab.pkl there from the folder of the network's run, "
                      "or name that with --out_dir")
        raise ValueError(f"there is no tokenizer in {folder}: {remedy}")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES} bytes")
        for instruction, value, _ in pickletools.genops(path.read_bytes()):
            if instruction.name in PICKLED_NUMBERS:
                numbers.append(value)
            elif instruction.name not in PICKLE_STRUCTURE:
                raise ValueError(f"its {instruction.name} has no place in a dict of numbers")
            if len(numbers) > 3 * MAX_VOCAB:
                raise ValueError(f"more than {MAX_VOCAB} tokens")
        for new, (*pair, made) in enumerate(zip(*[iter(numbers)] * 3, strict=True), 256):
            if made != new or not 0 <= min(pair) <= max(pair) < new or tuple(pair) in merges:
                raise ValueError(f"{pair} -> {made} does not make token {new} of two earlier ones")
            merges[tuple(pair)] = new
            sizes.append(sizes[pair[0]] + sizes[pair[1]])
            total += sizes[-1]
            if total > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES} bytes in its tokens")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no tokenizer file ({error!s:.120}): make it anew with python "
                         "tokenizer.py train --vocab_size N --data_path TEXT --out_dir "
                         f"{folder}") from error
    return merges


# ---- commands, described in `parse_args` ----

def train_command(args: argparse.Namespace) -> None:
    BasicTokenizer(args.data_path, args.vocab_size, args.verbose, args.out_dir)


def encode_command(args: argparse.Namespace) -> None:
    data = given_text(args)
    ids = BasicTokenizer(out_dir=args.out_dir).encode_array(data)
    print(*ids.tolist())
    print(compression_ratio(data, ids), file=sys.stderr)


def decode_command(args: argparse.Namespace) -> None:
    text = " ".join(args.ids) if args.ids else sys.stdin.read()  # may be a list with its brackets
    ids = re.sub(r"[\[,\]]", " ", text).split()
    for token in ids:
        if not token.isdecimal():
            raise ValueError(f"{token!r} is not a token id")
    sys.stdout.buffer.write(BasicTokenizer(out_dir=args.out_dir).decode_bytes(map(int, ids)))


def show_command(args: argparse.Namespace) -> None:
    tokenizer, data = BasicTokenizer(out_dir=args.out_dir), given_text(args)
    shaded = "\x1b[30;{0}m{1}\x1b[0m\x1b[2m{2}\x1b[0m"
    form = shaded if sys.stdout.isatty() else "[{2} {1}]"
    for index, token in enumerate(tokenizer.encode_array(data).tolist()):
        spelled = tokenizer.vocab[token]
        print(form.format(46 + index % 2, visible(spelled), token),
              end="\n" * spelled.endswith(b"\n"))
    if not data.endswith(b"\n"):
        print()


def vocab_command(args: argparse.Namespace) -> None:
    tokenizer = BasicTokenizer(out_dir=args.out_dir)
    ids = tokenizer.encode_array(read_text(args.data_path))
    counts = np.bincount(ids, minlength=tokenizer.vocab_size)
    print(f"{'id':>7} {'pair':>16} {'count':>9}  token")
    for pair, new in tokenizer.merges.items():
        print(f"{new:>7} {str(pair):>16} {counts[new]:>9}  [{visible(tokenizer.vocab[new])}]")


def given_text(args: argparse.Namespace) -> bytes:
    """Returns the text given, or standard input."""
    if args.text is None:
        return sys.stdin.buffer.read()
    note_file(args.text, "put < before it to give what the file holds")
    return to_bytes(args.text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Byte-pair encoding: learn tokens from a text, use them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function, summary in (
            (train_command, "learn tokens from a text, and write merges.pkl and vocab.pkl"),
            (encode_command, "print the token ids of a text"),
            (decode_command, "print the text of token ids"),
            (show_command, "print a text cut into its tokens, with their ids"),
            (vocab_command, "list the learned tokens with their counts in a text")):
        name = function.__name__.removesuffix("_command")
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(function=function)
        add = command.add_argument
        folder, others = (CHECKPOINTS, "") if name == "train" else (
            default_run(MERGES_FILE), ", or the pretrained network's if it holds none")
        add("--out_dir", type=Path, default=folder, metavar="FOLDER",
            help=f"folder of merges.pkl and vocab.pkl (default: checkpoints/{others})")
        if name in ("encode", "show"):
            add("text", nargs="?", help="text (default: standard input)")
        if name == "decode":
            add("ids", nargs="*", metavar="ID", help="token ids (default: standard input)")
        if name in ("train", "vocab"):
            add("--data_path", type=Path, default=DEFAULT_TEXT, metavar="FILE",
                help="UTF-8 text to read (default: data/input.txt beside this script)")
        if name == "train":
            add("--vocab_size", type=bounded(int, 256, MAX_VOCAB + 1), default=500, metavar="N",
                help="number of tokens, the 256 bytes included (default: 500)")
            add("--verbose", action="store_true", help="print every merge")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.function(args)


# ---- what all scripts share ----

# Samples shown are drawn at this temperature, at which as many of their words are unknown to the
# training text as of the validation text's (5.6 and 5.7 %; at 0.8 it is 3.4 %, at 1 9.5 %).
TEMPERATURE = 0.9


def run_script(main: Callable[[], None], memory_remedy: str = "close other programs") -> None:
    """Runs a script's `main` and ends the process as all scripts end.

    Ctrl-C means status 130 and a closed pipe status 0, both without a word; a ValueError, an
    OSError or a lack of memory status 1 and one line. Anything else is a bug and shows its
    traceback. What the terminal cannot show is printed as `?`.
    """
    for stream, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, stream) is None:  # closed, and the next file opened would get its number
            setattr(sys, stream, open(os.devnull, mode))
    sys.stdout.reconfigure(errors="replace")
    name, status = Path(sys.argv[0]).name, None
    try:
        main()
        sys.stdout.flush()
    except SystemExit as end:  # of argparse, or with a status of the script's own
        status = end.code
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # `| head` has seen enough
        pass
    except (ValueError, OSError) as error:
        status = f"{name}: {error}"
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        status = f"{name}: not enough memory: {memory_remedy}"
    if isinstance(status, str):
        with suppress(OSError):
            print(status, file=sys.stderr)
        status = 1
    for stream in sys.stdout, sys.stderr:
        try:
            stream.flush()
        except OSError:  # or Python complains, as it ends, of what it could not write
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


def out_of_memory(error: BaseException | None) -> bool:
    """Returns whether an error, or one it came from, tells of a lack of memory, a GPU's or not."""
    phrases = "(out of|enough|allocate) memory|calculation overflowed|Invalid buffer size"
    by_pytorch = isinstance(error, RuntimeError) and re.search(phrases, str(error))
    if by_pytorch or isinstance(error, MemoryError):
        return True
    # an error during the recording of a CUDA graph raises another as the recording ends
    return error is not None and out_of_memory(error.__context__)


def bounded(kind: type, minimum: float,
            below: float | None = None) -> Callable[[str], int | float]:
    """Returns a `type` for argparse: an int or float of at least `minimum` and less than `below`.

    It also refuses nan, inf and whole numbers beyond 2**63 - 1, which PyTorch cannot hold.
    """
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            noun = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a {noun}, not {text!r}") from None
        limit = below if below is not None else 2**63 if kind is int else math.inf
        if not minimum <= value < limit:
            upper = f" and less than {limit}" if below is not None or value >= limit else ""
            raise argparse.ArgumentTypeError(f"must be at least {minimum}{upper}, not {value}")
        return value
    return convert


def usable_cores(cgroup: Path = Path("/proc/self/cgroup"),
                 root: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns how many cores this process may use, by its affinity and its container's quota.

    Linux's control groups set the quota: `cpu.max` in version 2, two files in version 1.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    cores = [len(affinity(0)) if affinity else os.cpu_count() or 1]
    groups = cgroup.read_text().splitlines() if cgroup.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in groups):
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = root / controllers / path.lstrip("/")
        for place in folder, *folder.parents:  # a limit further up holds, too
            files = ["cpu.cfs_quota_us", "cpu.cfs_period_us"] if controllers else ["cpu.max"]
            with suppress(OSError, ValueError):  # ValueError: max or no number, so no limit
                quota, period = " ".join((place / name).read_text() for name in files).split()
                if int(quota) > 0:
                    cores.append(math.ceil(int(quota) / int(period)))
    return min(cores)


def default_run(file: str) -> Path:
    """Returns checkpoints/, or the pretrained network's folder if only that has the `file`."""
    only_there = (PRETRAINED / file).exists() and not (CHECKPOINTS / file).exists()
    return PRETRAINED if only_there else CHECKPOINTS


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a binary file that takes the place of `path` once it is complete.

    With one writer at a time `path` is what it was or all of the new file, whatever happens. An
    exception removes the temporary file beside it, `.{name}.tmp`; a killed process leaves that for
    the next write to replace. Creates the folder, follows a symbolic link, and raises OSError with
    the path in it.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        if target.exists() and not target.is_file():  # /dev/null, say, which root could replace
            raise OSError("it is not a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        if os.name == "posix":  # the new name, too, is to outlast a power cut; Windows cannot
            descriptor = os.open(target.parent, os.O_RDONLY)
            with suppress(OSError):  # some shared drives cannot, either
                os.fsync(descriptor)
            os.close(descriptor)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def visible(token: bytes) -> str:
    """Spells a token in printable characters: b"a\\n\\xff" -> 'a\\\\n\\\\xff'."""
    text = token.decode("utf-8", errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ---- what all scripts share: reading texts ----

ENCODINGS = [  # in the order tried: names, signs of their languages, share of all non-ASCII ones
    ("Shift_JIS CP932 EUC-JP", "[ぁ-ヿ]", 0.3),
    ("EUC-KR CP949", "[가-힣]", 0.7),
    ("GBK Big5", "[的一是不了在人有我他之也其而以]", 0.05),
    ("Windows-1251 KOI8-R", "(?<=[а-я])[аеиностё]", 0.3),
    ("Windows-1252", "(?<![ß-ÿ])[À-ÂÄ-ÏÑ-ÔÖÙ-Üß-ïñ-öø-üœ«»‘’“”–—…°£§]{1,2}(?![ß-ÿ])", 0.9)]
REMEDY = "pass a text with --data_path"
SAMPLE = 1 << 16  # bytes that are enough to tell an encoding
WHOLE = 1 << 25   # bytes of a text that are read at a time


def read_text(path: str | Path) -> str:
    """Returns a UTF-8 text as Python's text mode reads it, without byte-order mark.

    Raises ValueError if it is missing or empty, or as `text_pieces` does.
    """
    pattern = Path(path)
    path, *others = matching(str(path))
    if others:
        raise ValueError(f"{pattern} stands for {len(others) + 1} files: {join_command(pattern)}")
    if path.is_dir():
        texts = path / ("*.txt" if any(path.glob("*.txt")) else "*")
        raise ValueError(f"cannot read {path}: Is a directory; {join_command(texts)}")
    if not path.exists():
        raise ValueError(f"there is no text at {path}: run python data/prepare.py, or {REMEDY}")
    if not (text := "".join(piece for _, piece in text_pieces(path, 0, WHOLE))):
        raise ValueError(f"{path} is empty: {REMEDY}")
    return text


def text_pieces(path: str | Path, start: int, size: int) -> Iterator[tuple[bytes, str]]:
    """Yields a text from byte `start` on: `size` bytes as they are, and the text in them.

    Raises ValueError if it is unreadable, binary, or in another encoding.
    """
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with_newlines = io.IncrementalNewlineDecoder(decoder, translate=True)
    try:
        with open(path, "rb") as file:
            if start:  # a pipe has no other places
                file.seek(start)
            for place in itertools.count(start, size):
                rest = data = file.read(size)
                check_bytes(data, path)
                if 0 in data:
                    raise ValueError(f"{path} is binary (byte {place + data.index(0)} is zero): "
                                     f"{REMEDY}")
                if place == 0:
                    rest = data.removeprefix(codecs.BOM_UTF8)
                elif place == start:  # in the middle of a character perhaps
                    rest = data.lstrip(bytes(range(0x80, 0xC0)))
                text = with_newlines.decode(rest, len(data) < size)
                yield data, text
                if len(data) < size:
                    return
                line += text.count("\n")
    except UnicodeDecodeError as error:
        if start:  # read from the top, it fails at the same byte, whose line is then known
            for _ in text_pieces(path, 0, WHOLE):
                pass
        raise ValueError(f"{path} {not_utf8(error.object, error, path, line)}") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; {REMEDY}") from error


def check_bytes(data: bytes, path: str | Path) -> None:
    """Raises ValueError for UTF-16, and prints a note on line ends other than \\n."""
    zeros, at_even_places = data.count(0, 0, SAMPLE), data[:SAMPLE:2].count(0)
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if marked or zeros > 99 and at_even_places in (0, zeros):
        encoding = "UTF-16" if marked else "UTF-16BE" if at_even_places else "UTF-16LE"
        raise ValueError(f"{path} is UTF-16, not UTF-8: convert it with {recode(path, encoding)}")
    if b"\r" in data:
        note(f"{path} has CRLF or CR line ends, which are read as \\n")


def not_utf8(data: bytes, error: UnicodeDecodeError, path: Path, line: int) -> str:
    """Says why bytes, which begin on `line`, are not UTF-8, and what helps."""
    bad = sum(map(len, re.findall("[\udc80-\udcff]+", data.decode("utf-8", "surrogateescape"))))
    good = len(data.translate(None, bytes(range(128)))) - bad  # bytes of characters beyond ASCII
    cut = error.end == len(data) and error.reason == "unexpected end of data"
    encoding = None if good > 4 * bad or good and cut else other_encoding(data)
    if encoding and (bad > 2 or 100 * bad > len(data)):
        return f"is not UTF-8 but {encoding}, it seems: convert it with {recode(path, encoding)}"
    line += len((data[:error.start] + b".").splitlines()) - 1
    place = f"byte 0x{data[error.start]:02x} on line {line}"
    drop = f"drop what is amiss with {recode(path, 'UTF-8', drop=True)}"
    if cut:
        return f"is not UTF-8 at its end, in the middle of a character: {drop}"
    if bad == 1 or 100 * bad <= good or 1000 * bad <= len(data):
        return f"is not UTF-8 in {bad} byte{'s' * (bad > 1)} (first {place}): {drop}"
    return f"is not UTF-8 ({place}): find out its encoding, and save it as UTF-8 in an editor"


def other_encoding(data: bytes) -> str | None:
    """Names the encoding, if any, in which bytes beyond ASCII read like a language."""
    start = re.search(b"[\x80-\xff]", data).start()
    for names, signs, share in ENCODINGS:
        for name in names.split():
            with suppress(UnicodeDecodeError):
                text = codecs.getincrementaldecoder(name)().decode(data[start:start + SAMPLE])
                if sum(map(len, re.findall(signs, text))) > share * sum(c > "\x7f" for c in text):
                    return name
    return None


def recode(path: str | Path, encoding: str, drop: bool = False) -> str:
    """Returns the command that writes a text in UTF-8, if `drop` without what is amiss."""
    if not os.path.exists(path):  # standard input
        return f"iconv -f {encoding} -t UTF-8"
    new = free_name(f"{Path(path).stem}-utf8")
    if shutil.which("iconv"):
        return (f"iconv {'-c ' * drop}-f {encoding} -t UTF-8 {shlex.quote(str(path))} "
                f"> {shlex.quote(new)}")
    errors = ", errors='ignore'" * drop
    return (f"python -c \"open({new!r}, 'w', encoding='utf-8').write("
            f"open({str(path)!r}, encoding={encoding!r}{errors}).read())\"")


def join_command(pattern: Path) -> str:
    """Says how to make one text of a pattern's files, books/*.txt say."""
    folder = pattern.parent.resolve()
    old, new = str(pattern.parent), free_name(str(folder.parent / (folder.name or "all")))
    name = re.sub(r"[^*?[\]]+", lambda part: shlex.quote(part[0]), pattern.name)
    command = f"cat {shlex.quote(old)}/{name} > {shlex.quote(new)}"
    if os.name == "nt":
        texts = f"[p.read_bytes() for p in Path({old!r}).glob({pattern.name!r})]"
        command = ("python -c \"from pathlib import Path; "
                   f"Path({new!r}).write_bytes(b''.join({texts}))\"")
    return f"put its texts into one file with {command}"


def free_name(stem: str) -> str:
    """Returns the first of stem.txt, stem-2.txt, stem-3.txt ... that does not exist."""
    names = (f"{stem}{f'-{number}' * (number > 1)}.txt" for number in itertools.count(1))
    return next(itertools.filterfalse(os.path.exists, names))


def matching(pattern: str) -> list[Path]:
    """Returns the files that a pattern stands for, which Windows' shells leave to programs.

    What is no pattern, or matches nothing, stands for itself.
    """
    files = [] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    return [Path(file) for file in files or [pattern]]


def one_file(text: str) -> Path:
    """Is a `type` for argparse: a path, or a pattern that matches one file."""
    files = matching(text)
    if len(files) > 1:
        raise argparse.ArgumentTypeError(f"{text} stands for {len(files)} files: name one")
    return files[0]


def note_file(text: str, remedy: str) -> None:
    """Prints a note if a text given is the name of a file, whose contents may be meant."""
    if os.path.isfile(text):
        note(f"{text} is a file's name, taken as the text itself: {remedy}")


@functools.cache
def note(line: str) -> None:
    """Prints a line on standard error, once, and from only one of torchrun's processes."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"note: {line}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
