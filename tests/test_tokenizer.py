"""tokenizer.py: the textbook's merges and ids, safe files, clear errors."""
import argparse
import hashlib
import io
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tokenizer as tok
from conftest import ROOT, complaint, run
from textbook_bpe import textbook_bpe_encode, textbook_bpe_train
from tokenizer import BasicTokenizer, atomic_write, read_merges, read_text, save_merges


def tokenizer_of(merges):
    tokenizer = BasicTokenizer.__new__(BasicTokenizer)
    tokenizer._use(merges)
    return tokenizer


def trained(data, vocab_size):
    """Merges and ids of bytes; the vocabulary is smaller where the pairs run out."""
    tokens, merges = tok.TokenSequence(data, vocab_size), {}
    with suppress(ValueError):
        merges.update((pair, new) for pair, new, _ in tok.learn(tokens, vocab_size))
    return merges, tokens.ids().tolist()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "text.txt"


@pytest.fixture
def small(path):
    """A tokenizer of 260 tokens, its text and its files."""
    path.write_bytes("the thing, the théâtre\n".encode() * 9)
    return BasicTokenizer(path, 260, out_dir=path.parent)


# ---- the same as the textbook ----

texts = st.one_of(
    st.binary(max_size=300),
    st.text("abc ", max_size=300).map(str.encode),
    st.text("é🙂漢字e\u0301\u200d👩", max_size=100).map(str.encode),
    st.lists(st.tuples(st.sampled_from([b"a", b"b"]), st.integers(1, 40)), max_size=20).map(
        lambda runs: b"".join(byte * length for byte, length in runs)),
)


blocks = st.integers(1, 20) | st.just(tok.BLOCK)  # if small, a cut in a wrong place shows


@settings(max_examples=500, deadline=None)
@given(texts, st.integers(256, 300), blocks)
def test_training_equals_the_textbook_whatever_the_blocks(data, vocab_size, block):
    with patch.multiple(tok, BLOCK=block):
        assert trained(data, vocab_size) == textbook_bpe_train(data, vocab_size)


@settings(max_examples=500, deadline=None)
@given(texts, texts, blocks)
def test_encoding_equals_the_textbook_and_decoding_undoes_it(data, other, block):
    merges, _ = textbook_bpe_train(data, 300)
    tokenizer = tokenizer_of(merges)
    for text in data, other, data + other:
        expected = textbook_bpe_encode(text, merges)
        assert tokenizer._encode_short(text).tolist() == expected
        with patch.multiple(tok, SHORT=0, BLOCK=block):
            assert tokenizer.encode_array(text).tolist() == expected
        assert tokenizer.decode_bytes(expected) == text


def test_ids_among_the_surrogates_and_beyond_16_bits():
    """A token for every two bytes: for _encode_short each is a character."""
    tokenizer = tokenizer_of({divmod(new - 256, 256): new for new in range(256, 256 + 256 * 256)})
    data = bytes(range(256))
    short, long = tokenizer._encode_short(data), tokenizer._encode_long(data)
    assert short.dtype == long.dtype == np.uint32
    assert short.tolist() == long.tolist() and short[-1] == 0xFEFF + 256


# ---- the class ----

def test_bpe_dropout_leaves_out_its_share_of_merges_and_keeps_the_text(small):
    def draw(tokenizer, data, seed=0):
        return tokenizer.encode_array(data, 0.3, np.random.default_rng(seed)).tolist()

    data = small.data_path.read_bytes()
    assert draw(small, data) == draw(small, data) != draw(small, data, seed=1)
    assert small.decode_bytes(draw(small, data)) == data
    ids = draw(tokenizer_of({(97, 98): 256}), b"ab" * 4000)
    assert abs(ids.count(256) / 4000 - 0.7) < 0.02
    assert draw(small, b"") == []


def test_a_loaded_tokenizer_is_the_one_trained_and_can_be_trained_again(small):
    loaded, learned = BasicTokenizer(out_dir=small.out_dir), dict(small.merges)
    assert (loaded.merges, loaded.vocab, loaded.vocab_size) == (learned, small.vocab, 260)
    for without_text in loaded.train, lambda: BasicTokenizer(out_dir=None):
        with pytest.raises(ValueError, match="no text to learn from: give a data_path"):
            without_text()
    loaded.train(small.data_path)
    small.train()
    assert loaded.merges == small.merges == learned


def test_the_pretrained_network_serves_until_there_is_a_run_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tok, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(tok, "PRETRAINED", tmp_path / "pretrained")
    assert tok.default_run("model.pt") == tmp_path
    for folder in tok.PRETRAINED, tok.CHECKPOINTS:
        folder.mkdir(exist_ok=True)
        (folder / "model.pt").touch()
        assert tok.default_run("model.pt") == folder


def test_a_tokenizer_that_a_network_needs_is_not_replaced(small):
    folder = small.out_dir
    (folder / "published.pt").write_bytes(b"it names no tokenizer")
    (folder / "a folder.pt").mkdir()
    BasicTokenizer(small.data_path, 259, out_dir=folder)
    small.save(folder)
    (folder / "best.pt.old").write_bytes(b"...tokenizer..." + small.fingerprint.encode())
    with pytest.raises(ValueError, match="best.pt.old was trained with another tokenizer"):
        BasicTokenizer(small.data_path, 259, out_dir=folder)
    assert BasicTokenizer(out_dir=folder).merges == small.merges
    BasicTokenizer(small.data_path, 259, out_dir=None)  # writes nothing


def test_the_vocabulary_is_at_least_the_bytes_and_at_most_what_the_text_gives(path):
    path.write_text("abcd")
    for size, message in (([255], "must be from 256"), ([tok.MAX_VOCAB + 1], "must be from 256"),
                          ([], "can be 259 at most, not 500")):
        with pytest.raises(ValueError, match=f"vocab_size {message}"):
            BasicTokenizer(path, *size, out_dir=path.parent)
    assert os.listdir(path.parent) == ["text.txt"]
    assert BasicTokenizer(path, 256, out_dir=path.parent).encode("é") == [195, 169]


def test_a_vocabulary_too_long_to_load_again_is_refused(path, monkeypatch):
    monkeypatch.setattr(tok, "MAX_BYTES", 1 << 15)
    path.write_text(np.random.default_rng(0).bytes(1000).hex())
    with pytest.raises(ValueError, match="tokens become too long.* at most, not 2000") as error:
        BasicTokenizer(path, 2000, out_dir=path.parent)
    assert os.listdir(path.parent) == ["text.txt"]
    largest = int(re.search("can be ([0-9]+)", str(error.value))[1])
    BasicTokenizer(path, largest, out_dir=path.parent)
    assert BasicTokenizer(out_dir=path.parent).vocab_size == largest


def test_decode_takes_the_ids_of_one_text_in_the_forms_a_network_returns(small):
    torch = pytest.importorskip("torch")
    ids = small.encode("the thing")
    for form in (iter(ids), np.array(ids, "u2"), np.array([ids]), torch.tensor([ids]),
                 [*torch.tensor([ids]).T]):
        assert small.decode(form) == "the thing"
    assert small.decode([]) == ""
    for form in torch.tensor([ids, ids]), [65.0], 65:
        with pytest.raises(ValueError, match="not the ids of one text"):
            small.decode(form)
    for token in 260, -1:
        with pytest.raises(ValueError, match=f"no token {token}: the ids are 0 to 259"):
            small.decode([65, token])


def test_what_is_not_utf8_is_kept_in_bytes_and_replaced_in_text(small):
    assert small.decode([65, 195, 66]) == "A\ufffdB"
    argument = b"caf\xe9".decode(errors="surrogateescape")
    assert small.decode_bytes(small.encode(argument)) == b"caf\xe9"
    assert small.encode("\ud800") == [0xED, 0xA0, 0x80]


# ---- reading a text ----

@pytest.mark.parametrize("data, message", [
    (None, "no text at .*text.txt: run python data/prepare.py, or pass"),
    (b"\xef\xbb\xbf", "text.txt is empty: pass a text with --data_path"),
    (b"\x7fELF\x02" + b"\0\xff" * 9, "text.txt is binary .byte 5 is zero"),
    ("Was it a car?".encode("utf-16"), "text.txt is UTF-16, not UTF-8"),
    ("Στην αρχή ήταν ο λόγος".encode("cp1253"), "line 1.: find out its encoding"),
    ("été\n".encode() * 99 + b"\xe9t\xe9\n" * 99, r"\(byte 0xe9 on line 100\): find out"),
])
def test_what_is_no_text_is_named(path, data, message):
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_text(path)


TEXTS = {  # encodings, and a text to be told by
    "GBK": "他说这是他最喜欢的地方，也是我们的。\n",
    "Big5": "他說這是他最喜歡的地方，也是我們的。\n",
    "Shift_JIS EUC-JP": "吾輩は猫である。名前はまだ無い。\n",
    "EUC-KR": "나는 오늘 아침에 학교에 갔습니다.\n",
    "CP932": "①吾輩は猫である。～名前はまだ無い。\n",
    "CP949": "펲시콜라를 마시며 뷁이라고 했다.\n",
    "Windows-1251 KOI8-R": "Все счастливые семьи похожи друг на друга.\n",
    "Windows-1252": "Größe und Füße; l’été, créée à Noël « là-bas » – où ?\n",
    "UTF-16LE UTF-16BE": "Was it a car or a cat I saw? " * 9,
}
GOOD = ("théâtre, 你好, \U0001F600\n" * 5 + "x" * 99 + "\n" + "\u2014").encode() * 9
AMISS = [  # nearly UTF-8, and what is said of it
    (GOOD[:-2], "at its end, in the middle of a character"),
    (b"caf\xc3\xa9 \xc3", "at its end"),
    (GOOD[:2000] + b"\xff" + GOOD[2000:], r"in 1 byte \(first byte 0xff on line 54\)"),
    (b"x" * 9 + b"\n\xe9" + b"x" * 999, r"in 1 byte \(first byte 0xe9 on line 2\)"),
    (b"\x80" + GOOD + b"\x80" + GOOD, r"in 2 bytes \(first byte 0x80 on line 1\)"),
]


@pytest.mark.parametrize("data, encoding, message", [
    *((text.encode(encoding), encoding, f"(but {encoding}, it seems|not UTF-8): convert it with")
      for encodings, text in TEXTS.items() for encoding in encodings.split()),
    *((data, "UTF-8", message) for data, message in AMISS)])
@pytest.mark.parametrize("iconv", [True, False])
def test_what_is_amiss_is_named_and_the_command_shown_makes_it_utf8(
        path, monkeypatch, data, encoding, message, iconv):
    if iconv and not shutil.which("iconv"):
        pytest.skip("no iconv here")
    monkeypatch.setattr(shutil, "which", lambda name: iconv)
    monkeypatch.chdir(path.parent)
    Path("my text.txt").write_bytes(data)
    with pytest.raises(ValueError, match=f"my text.txt is .*{message}") as error:
        read_text("my text.txt")
    command = re.search("(iconv|python) -.*", str(error.value))[0]
    assert command.startswith("iconv") == iconv
    subprocess.run(command.replace("python", sys.executable, 1), shell=True)
    assert read_text("my text-utf8.txt") == data.decode(encoding, errors="ignore")
    assert "my text-utf8-2.txt" in tok.recode("my text.txt", encoding)  # overwrites no file


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_a_bad_byte_is_on_the_same_line_wherever_one_begins_to_read(path, end):
    half = (b"ab" + end) * 40
    path.write_bytes(half + b"\xff" + half)
    for long in tok.LONG, 100:
        with patch.multiple(tok, PIECE=50, LONG=long):
            with pytest.raises(ValueError, match="byte 0xff on line 41"):
                tok.learning_text(path)


def test_of_several_texts_it_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("books").mkdir()
    Path("books/a b 1.txt").write_text("one\n")
    assert read_text("books/*.txt") == "one\n"
    Path("books/a b 2.txt").write_text("two\n")
    for pattern, message, made in (("books", "Is a directory", "books.txt"),
                                   ("books/a b*.txt", "stands for 2 files", "books-2.txt")):
        with pytest.raises(ValueError, match=message) as error:
            read_text(pattern)
        subprocess.run(str(error.value).split("into one file with ")[1], shell=True, check=True)
        assert read_text(made) == "one\ntwo\n"
    Path("books/*.txt").write_text("named so")
    assert read_text("books/*.txt") == "named so"


def test_texts_are_read_as_python_reads_them_with_one_note_on_line_ends(path, monkeypatch, capsys):
    path.write_bytes(b"a\nb\n")
    assert read_text(path) == "a\nb\n" and capsys.readouterr().err == ""
    for data in b"\xef\xbb\xbfa\r\nb\n", b"a\rb\r\n\r\r\n\n\rc\r", "é\r\n\u2028\x85".encode():
        path.write_bytes(data)
        assert read_text(path) == path.read_text("utf-8-sig")
    monkeypatch.setenv("RANK", "1")
    tok.note("this comes from one of several processes alone")
    line = f"note: {path} has CRLF or CR line ends, which are read as \\n\n"
    assert capsys.readouterr().err == line


# ---- texts larger than memory ----

LINES = "To be,\nor not — 日本 😀\u0301 to be: é\n" * 40


@pytest.fixture
def small_limits(monkeypatch):
    """Every text of more than 200 bytes is long, and encoded in blocks of 37."""
    limits = {"LONG": 200, "PIECE": 50, "BLOCK": 37, "UNCUT": 3000, "usable_cores": lambda: 2}
    for name, value in limits.items():
        monkeypatch.setattr(tok, name, value)


def long_tokens(path, data, merges):
    """Tokens of a file of these bytes, from tokens.bin, and as if it were short."""
    path.write_bytes(data)
    mapped = tok.load_tokens(tokenizer_of(merges), path, path.parent)
    with patch.multiple(tok, LONG=len(data)):
        return mapped, tok.load_tokens(tokenizer_of(merges), path, path.parent / "none")


awkward = st.lists(st.sampled_from(["a", "b", "é", "日", "😀", "\n", "\r", "\r\n", "ab", "\ufeff"]),
                   min_size=1, max_size=150).map("".join)


@given(awkward, st.integers(3, 60), st.integers(256, 290))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_of_a_file_have_the_ids_of_the_whole(path, text, block, size):
    def encode_here(tokenizer, blocks):
        yield from map(tokenizer._encode_long, blocks)

    path.with_name("tokens.bin").unlink(missing_ok=True)
    data = b"\xef\xbb\xbf" + text.encode()
    with patch.multiple(tok, LONG=0, BLOCK=block, encode_blocks=encode_here):
        long, short = long_tokens(path, data, trained(text.encode(), size)[0])
    assert (type(long.ids), type(short.ids)) == (np.memmap, np.ndarray)
    assert long.ids.dtype == short.ids.dtype and long.ids.tolist() == short.ids.tolist()
    assert long.digest == short.digest == hashlib.sha256(short.ids).hexdigest()
    assert long.characters == short.characters == len(read_text(path))
    assert (long.size, short.size) == (len(data), len(read_text(path).encode()))


def test_fewer_blocks_than_processes_are_encoded_alike(path, small_limits, monkeypatch):
    monkeypatch.setattr(tok, "BLOCK", 10**6)
    long, short = long_tokens(path, LINES.encode(), trained(LINES.encode(), 300)[0])
    assert long.ids.tolist() == short.ids.tolist()


def test_tokens_are_found_again_by_time_or_digest_and_changes_noticed(
        path, small_limits, monkeypatch):
    encode_file = MagicMock(wraps=tok.encode_file)
    monkeypatch.setattr(tok, "encode_file", encode_file)

    def load(merges):
        """Returns the tokens, and whether the text was encoded for them."""
        encode_file.reset_mock()
        tokens = tok.load_tokens(tokenizer_of(merges), path, path.parent)
        return tokens.ids.tolist(), encode_file.called

    for text in LINES.replace("To", "to"), LINES:
        path.write_text(text)
        data = list(text.encode())
        assert load({}) == (data, True) and load({}) == (data, False)
        os.utime(path, (1, 1))
        assert load({}) == (data, False)
    assert load({(84, 111): 256})[1] and load({}) == (data, True)
    file = path.with_name("tokens.bin")
    for damaged in file.read_bytes()[:-1], b"", b"{}", b"[3]":
        file.write_bytes(damaged)
        assert load({}) == (data, True)
    monkeypatch.setattr(np, "memmap", MagicMock(side_effect=OSError("no mapping on this drive")))
    with pytest.raises(OSError, match="no mapping"):  # and not encoded again, without end
        load({})


@pytest.mark.parametrize("data, message", [
    (LINES.encode() + b"\xff", "byte 0xff on line 81"),
    (LINES.encode() + b"a\0b", f"byte {len(LINES.encode()) + 1} is zero"),
    (b"a" * 5000, "cannot be cut anywhere"),
])
def test_a_bad_place_far_in_leaves_nothing(path, small_limits, data, message):
    with pytest.raises(ValueError, match=message):
        long_tokens(path, data, {(97, 97): 256})
    assert os.listdir(path.parent) == ["text.txt"]


@pytest.mark.parametrize("happens, error, message", [
    (lambda path, process: signal.raise_signal(signal.SIGINT), KeyboardInterrupt, None),
    (lambda path, process: process.kill(), ValueError, "was ended, for lack of memory"),
    (lambda path, process: setattr(process, "stdout", io.BytesIO(pickle.dumps(np.zeros(9))[:-9])),
     ValueError, "was ended, for lack of memory"),  # in the middle of an answer
    (lambda path, process: os.utime(path, (1, 1)), ValueError, "was changed while it was read")])
def test_an_encoding_that_fails_leaves_neither_file_nor_process(
        path, small_limits, monkeypatch, happens, error, message):
    processes, popen = [], subprocess.Popen

    def start(*args, **options):
        processes.append(popen(*args, **options))
        return processes[-1]

    monkeypatch.setattr(tok.subprocess, "Popen", start)
    monkeypatch.setattr(BasicTokenizer, "count_characters",
                        lambda self, ids: happens(path, processes[0]) or 0)
    with pytest.raises(error, match=message):
        long_tokens(path, LINES.encode(), {})
    assert len(processes) == 2 and all(process.poll() is not None for process in processes)
    assert os.listdir(path.parent) == ["text.txt"]


def test_a_long_text_is_learned_from_in_pieces_spread_evenly(path, monkeypatch, capsys):
    lines = [f"line {number:05} — é\n" for number in range(5000)]
    path.write_text("".join(lines), encoding="utf-8")
    monkeypatch.setattr(tok, "LONG", 10_000)
    monkeypatch.setattr(tok, "PIECE", 1000)
    text = tok.learning_text(path)
    assert "learning from" in capsys.readouterr().out and 7000 < len(text) <= 10_000
    places = [lines.index(line) for line in text.decode().splitlines(keepends=True)]  # whole lines
    assert places == sorted(places) and max(np.diff([0, *places, 5000])) < 500
    path.write_text("日é😀" * 2000, encoding="utf-8")  # has none
    for piece in 101, 102, 103, 104:
        monkeypatch.setattr(tok, "PIECE", piece)
        assert set(tok.learning_text(path).decode()) == set("日é😀")


# ---- hostile and damaged files ----

MERGES = {(97, 98): 256, (256, 99): 257}
HOSTILE = {  # what merges.pkl holds: (bytes, or what was pickled, and the message)
    "code": (b"cos\nmkdir\n(S'code_ran'\ntR.", "GLOBAL has no place"),
    "a key without value": (b"\x80\x04}K\x01s.", "argument 2 is shorter"),
    "a pair twice": (b"\x80\x04}(" + b"KaKb\x86M\x00\x01KaKb\x86M\x01\x01u.",
                     "does not make token 257"),
    "ids with a gap": ({(97, 98): 256, (97, 99): 258}, "-> 258 does not make token 257"),
    "made of itself": ({(97, 256): 256}, "does not make token 256"),
    "made of a negative id": ({(97, -1): 256}, "does not make token 256"),
    "made of one number": ({97: 256}, "argument 3 is shorter"),
    "tokens that double": ({(97, 97): 256} | {(new - 1, new - 1): new for new in range(257, 456)},
                           "bytes in its tokens"),
}


@pytest.mark.parametrize("content, message", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_give_one_clear_line(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    data = content if isinstance(content, bytes) else pickle.dumps(content)
    (tmp_path / "merges.pkl").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_merges(tmp_path)
    line = str(error.value)
    assert "merges.pkl" in line and "\n" not in line
    assert line.endswith(f"train --vocab_size N --data_path TEXT --out_dir {tmp_path}")
    assert not (tmp_path / "code_ran").exists()


def test_a_tokenizer_that_is_too_large_missing_or_a_folder_is_named(tmp_path):
    def load_fails(message):
        with pytest.raises(ValueError, match=message):
            BasicTokenizer(out_dir=tmp_path)

    path = tmp_path / "merges.pkl"
    path.touch()
    os.truncate(path, tok.MAX_BYTES + 1)
    load_fails("merges.pkl is no tokenizer file .it is larger than")
    path.unlink()
    load_fails("there is no tokenizer in .*: run python tokenizer.py train$")
    (tmp_path / "model.pt").touch()
    load_fails("there is no tokenizer in .*: copy merges.pkl and vocab.pkl there")
    path.mkdir()
    load_fails("cannot read .*merges.pkl")


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_others_load_with_or_without_what_they_spell(tmp_path, protocol):
    (tmp_path / "merges.pkl").write_bytes(pickle.dumps(MERGES, protocol))
    for _ in "without", "with":
        loaded = BasicTokenizer(out_dir=tmp_path)
        assert loaded.merges == MERGES and loaded.vocab[257] == b"abc"
        (tmp_path / "vocab.pkl").write_bytes(b"damaged")


# ---- written whole or not at all ----

OLD, NEW = {(97, 98): 256}, {(120, 121): 256, (256, 122): 257}


def save_killed_at(step, folder, merges):
    """Saves in a process killed before its step-th line; tells whether there is one."""
    def trace(frame, event, argument):
        if frame.f_code.co_name in ("save_merges", "atomic_write"):
            if next(steps, None) is None:
                os._exit(9)
            return trace

    def save():
        sys.settrace(trace)
        save_merges(folder, merges)

    steps, process = iter(range(step)), multiprocessing.get_context("fork").Process(target=save)
    process.start()
    process.join()
    return {9: True, 0: False}[process.exitcode]


@pytest.mark.parametrize("before", [None, OLD])
def test_a_save_killed_at_any_line_leaves_the_old_tokenizer_or_the_new(tmp_path, before):
    found, killed = [], True
    while killed:
        folder = tmp_path / str(len(found))
        folder.mkdir()
        if before:
            save_merges(folder, before)
        killed = save_killed_at(len(found), folder, NEW)
        found.append(read_merges(folder) if (folder / "merges.pkl").exists() else None)
        save_merges(folder, NEW)  # the next save leaves nothing behind of the one killed
        assert sorted(os.listdir(folder)) == ["merges.pkl", "vocab.pkl"]
    old = found.count(before)
    assert found == [before] * old + [NEW] * (len(found) - old) and 0 < old < len(found) - 1


def test_a_failed_write_keeps_the_old_file_and_every_write_keeps_a_link(tmp_path):
    file, link = tmp_path / "new folder" / "file", tmp_path / "link"
    link.symlink_to(file)
    for path, data in (file, b"old"), (link, b"new"):
        with atomic_write(path) as output:
            output.write(data)
        with pytest.raises(KeyboardInterrupt), atomic_write(path) as output:
            output.write(b"half of the next")
            raise KeyboardInterrupt
        assert file.read_bytes() == data and os.listdir(file.parent) == ["file"]
    assert link.is_symlink()


def test_what_is_not_a_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="cannot write .*pipe: it is not a file"):
        with atomic_write(tmp_path / "pipe") as file:
            file.write(b"x")


# ---- command line ----

def test_commands_are_filters_of_pure_data(small, tmp_path):
    def command(*arguments, **options):
        done = run("tokenizer.py", *arguments, "--out_dir", tmp_path / "made" / "here", text=False,
                   **options)
        return done.stdout, done.stderr

    data = "--data_path", small.data_path
    command("train", *data, "--vocab_size", 260)
    text = b"the thing\n\xff\n"
    ids, ratio = command("encode", input=text, stdin=None)
    assert ids.split() == [b"%d" % token for token in small.encode_array(text)]
    assert b"compression ratio" in ratio
    assert command("decode", input=ids, stdin=None) == (text, b"")
    assert command("decode", "[72,", "105]", "[33,33]") == (b"Hi!!", b"")  # as Python prints them
    _, note = command("encode", "text.txt", cwd=small.out_dir)
    assert b"note: text.txt is a file's name, taken as the text itself: put < " in note
    shown, note = command("show", "the\x1b é\n")
    assert b"\x1b" not in shown and rb"\x1b" in shown and note == b""
    _, *rows = command("vocab", *data)[0].decode().splitlines()
    assert len(rows) == 4
    assert rows[3].split(maxsplit=4) == ["259", "(256,", "258)", "9", "[the th]"]


def test_mistakes_are_one_line():
    assert "required: COMMAND" in complaint(run("tokenizer.py"), 2)
    assert "'²' is not a token id" in complaint(run("tokenizer.py", "decode", "²"))


# ---- what all scripts share ----

# as users run scripts: much can fail at the end
BUFFERED = os.environ | {"PYTHONUNBUFFERED": "", "PYTHONIOENCODING": "ascii"}
NO_MEMORY = "name.py: not enough memory: buy some\n"


def ended(main, stdout=subprocess.PIPE, stderr=subprocess.PIPE):
    """Runs a script with this `main`, which prints before."""
    code = ("import sys, tokenizer; sys.argv[0] = 'folder/name.py'\n"
            f"def main():\n print('caf\\xe9')\n {main}\n"
            "tokenizer.run_script(main, 'buy some')")
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, env=BUFFERED,
                          stdout=stdout, stderr=stderr)


@pytest.mark.parametrize("main, status, line", [
    ("pass", 0, ""),
    ("sys.exit(3)", 3, ""),
    ("raise KeyboardInterrupt", 130, ""),
    ("raise ValueError('no such thing')", 1, "name.py: no such thing\n"),
    ("bytearray(1 << 62)", 1, NO_MEMORY),
    ("raise RuntimeError('CUDA out of memory.')", 1, NO_MEMORY),
    ("try: raise MemoryError\n finally: raise RuntimeError('ended while recording')", 1, NO_MEMORY),
    ("raise RuntimeError('a fault')", 1, "Traceback (?s:.*)RuntimeError: a fault\n"),
])
def test_a_script_ends_with_its_status_and_one_line(main, status, line):
    process = ended(main)
    assert process.returncode == status and re.fullmatch(line, process.stderr)
    assert process.stdout == "caf?\n"  # the terminal lacks a character


@pytest.fixture
def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("main", ["pass", "print('much' * 100_000)"])
def test_a_closed_pipe_is_silent(closed_pipe, main):
    process = ended(main, stdout=closed_pipe)
    assert process.returncode == 0 and not process.stderr
    assert ended(f"print(file=sys.stderr); {main}", closed_pipe, closed_pipe).returncode == 0


def test_prepare_ends_in_this_way(closed_pipe):  # as do the scripts whose errors are one line
    process = subprocess.run([sys.executable, ROOT / "data/prepare.py", "--help"], env=BUFFERED,
                             stdout=closed_pipe, stderr=subprocess.PIPE)
    assert (process.returncode, process.stderr) == (0, b"")


def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        process = ended("pass", full)
    line = "name.py: [Errno 28] No space left on device\n"
    assert (process.returncode, process.stderr) == (1, line)


@pytest.mark.parametrize("kind, text, message", [
    (int, str(2**63), f"must be at least 1 and less than {2**63}, not {2**63}"),
    (int, "1.5", "must be a whole number, not '1.5'"),
    (float, "inf", "must be at least 1 and less than inf, not inf"),
    (float, "a", "must be a number, not 'a'"),
])
def test_a_number_out_of_its_bounds_is_told_of_them(kind, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        tok.bounded(kind, 1)(text)


@pytest.mark.parametrize("line, files, cores", [
    ("0::/job", {"job/cpu.max": "max 100000", "cpu.max": "150000 100000"}, 2),
    ("4:cpu,cpuacct:/job", {"cpu,cpuacct/job/cpu.cfs_quota_us": "300000",
                            "cpu,cpuacct/job/cpu.cfs_period_us": "100000",
                            "cpu,cpuacct/cpu.cfs_quota_us": "-1",
                            "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 3)])
def test_usable_cores_follow_affinity_and_quota(tmp_path, monkeypatch, line, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)))
    (tmp_path / "own").write_text(line + "\n")
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text + "\n")
    assert tok.usable_cores(tmp_path / "own", tmp_path / "root") == cores
