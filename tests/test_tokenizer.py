"""tokenizer.py: the textbook's merges and ids, published facts, safe files, clear errors."""
import argparse
import codecs
import errno
import hashlib
import itertools
import os
import pickle
import pickletools
import random
import shutil
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tokenizer as tok
from conftest import ROOT
from textbook_bpe import textbook_bpe_encode, textbook_bpe_train
from tokenizer import (
    BasicTokenizer,
    TokenSequence,
    atomic_write,
    learn,
    load_pair,
    read_text,
    save_pair,
    spell,
    usable_cores,
)

SENTENCE = "Hi, My name is Toufik"
SENTENCE_IDS = [72, 105, 261, 77, 265, 110, 97, 378, 279, 84, 262, 102, 105, 107]


def tokenizer_of(merges):
    """A tokenizer with given merges, without files."""
    tokenizer = BasicTokenizer.__new__(BasicTokenizer)
    tokenizer._use(merges, spell(merges))
    return tokenizer


def trained(data, vocab_size):
    """Merges and ids of bytes; the vocabulary is smaller where the pairs run out."""
    tokens, merges = TokenSequence(data, vocab_size), {}
    try:
        for pair, new, _ in learn(tokens, vocab_size):
            merges[pair] = new
    except ValueError as error:
        assert f"vocab_size can be {256 + len(merges)} at most" in str(error)
    return merges, tokens.ids().tolist()


@pytest.fixture(scope="module")
def text(shakespeare):
    return read_text(shakespeare)


@pytest.fixture(scope="module")
def published(shakespeare, tmp_path_factory):
    return BasicTokenizer(shakespeare, out_dir=tmp_path_factory.mktemp("shakespeare"))


# ---- the same as the textbook ----

runs = st.lists(st.tuples(st.sampled_from(b"ab"), st.integers(1, 40)), max_size=20).map(
    lambda runs: b"".join(bytes([byte]) * length for byte, length in runs))
texts = st.one_of(
    st.binary(max_size=300),
    st.text(st.characters(codec="utf-8"), max_size=100).map(str.encode),
    st.text("ab", max_size=300).map(str.encode),
    st.text("abc ", max_size=300).map(str.encode),
    st.text("é🙂漢字e\u0301\u200d👩", max_size=100).map(str.encode),
    st.integers(0, 300).map(lambda length: b"a" * length),
    runs,
)


@settings(max_examples=500, deadline=None)
@given(texts, st.integers(256, 300))
def test_training_equals_the_textbook(data, vocab_size):
    assert trained(data, vocab_size) == textbook_bpe_train(data, vocab_size)


@settings(max_examples=500, deadline=None)
@given(texts, texts)
def test_encoding_equals_the_textbook_for_short_and_long_texts(data, other):
    merges, _ = textbook_bpe_train(data, 300)
    tokenizer = tokenizer_of(merges)
    for text in (data, other, data + other):
        expected = textbook_bpe_encode(text, merges)
        assert tokenizer._encode_short(text).tolist() == expected
        assert tokenizer._encode_long(text).tolist() == expected


@settings(max_examples=200, deadline=None)
@given(texts, texts, st.integers(1, 20))
def test_blocks_have_the_tokens_of_the_whole(data, other, block):
    """Blocks of a few bytes, so that a cut in the wrong place shows."""
    merges, _ = textbook_bpe_train(data, 300)
    tokenizer = tokenizer_of(merges)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tok, "BLOCK", block)
        patch.setattr(tok, "SHORT", -1)
        ids = tokenizer.encode_array((data + other) or b"x").tolist()
    assert ids == textbook_bpe_encode((data + other) or b"x", merges)


@settings(max_examples=100, deadline=None)
@given(texts, st.integers(1, 20))
def test_pairs_are_counted_across_blocks(data, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tok, "BLOCK", block)
        assert trained(data, 280) == textbook_bpe_train(data, 280)


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8")))
def test_decode_undoes_encode_for_every_text(text):
    tokenizer = tokenizer_of(textbook_bpe_train("é🙂漢字 the the then".encode(), 270)[0])
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("length", [0, 1, 2])
def test_tiny_texts(length):
    assert trained(b"aa"[:length], 300) == textbook_bpe_train(b"aa"[:length], 300)


def test_textbook_case():
    merges, ids = trained(b"aaabdaaabac", 259)
    assert ids == [258, 100, 258, 97, 99]
    assert tokenizer_of(merges).encode("aaabdaaabac") == ids


def test_a_tie_goes_to_the_pair_that_occurs_first():
    assert list(trained(b"xy ab ab xy", 257)[0]) == [(ord("x"), ord("y"))]


def test_worked_examples_of_the_docstrings():
    tokens = TokenSequence(bytes([1, 2, 3, 1, 2]), 257)
    places = tokens.find((1, 2))
    assert places.tolist() == [0, 3]
    before, after = tokens.merge((1, 2), places, 256)
    assert tokens.ids().tolist() == [256, 3, 256]
    assert before.tolist() == [tokens.hole, 3] and after.tolist() == [3, tokens.hole]
    tokens = TokenSequence(bytes([1, 1, 1]), 257)
    places = tokens.find((1, 1))
    assert places.tolist() == [0, 1]
    tokens.merge((1, 1), places, 256)
    assert tokens.ids().tolist() == [256, 1]
    assert tok.every_other(np.array([0, 1, 2, 7]), 1).tolist() == [0, 2, 7]


def test_ids_beyond_the_surrogates_and_16_bits():
    """A token for every two bytes. In _encode_short ids are characters, surrogates among them."""
    tokenizer = tokenizer_of({divmod(new - 256, 256): new for new in range(256, 256 + 256 * 256)})
    data = np.random.default_rng(0).bytes(5000)
    short, long = tokenizer._encode_short(data), tokenizer._encode_long(data)
    assert short.dtype == long.dtype == np.uint32
    assert short.tolist() == long.tolist()
    assert any(0xD800 <= token < 0xE000 for token in short) and max(short) > 0xFFFF
    assert tokenizer.decode_bytes(short.tolist()) == data


# ---- published facts, on the real text ----


def test_published_merges_and_prints(shakespeare, tmp_path, capsys):
    tokenizer = BasicTokenizer(shakespeare, vocab_size=500, verbose=True, out_dir=tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert list(tokenizer.merges)[:4] == [(101, 32), (116, 104), (116, 32), (115, 32)]
    assert lines[243] == "merge 244/244: (292, 256) -> 499 (b'ome ') had 494 occurrences"
    assert lines[244:] == ["compression ratio: 1.94X"]


def test_published_ids(published, text, capsys):
    capsys.readouterr()
    assert published.encode(SENTENCE) == SENTENCE_IDS
    assert capsys.readouterr().out == "compression ratio: 1.50X\n"
    assert published.decode(SENTENCE_IDS) == SENTENCE
    ids = published.encode_array(text)
    assert len(ids) == 574_057 and ids.dtype == np.uint16
    assert published.decode(ids.tolist()) == text


def test_both_ways_of_encoding_agree_on_the_real_text(published, text):
    data = text[:50_000].encode()
    assert published._encode_short(data).tolist() == published._encode_long(data).tolist()


def test_bpe_dropout_spells_the_same_text_in_other_tokens(published, text):
    data = text[:200_000].encode()

    def draw(seed, dropout):
        return published.encode_array(data, dropout, np.random.default_rng(seed))

    once, again, other = draw(1, 0.1), draw(1, 0.1), draw(2, 0.1)
    assert once.tolist() == again.tolist() != other.tolist()
    for ids in once, other, draw(3, 0.9):
        assert published.decode_bytes(ids.tolist()) == data
    plain = published.encode_array(data)
    assert len(plain) < len(once) < 1.2 * len(plain) and len(draw(4, 0.999)) > 0.99 * len(data)
    assert published.encode_array(b"", 0.1, np.random.default_rng(1)).tolist() == []


def test_bpe_dropout_leaves_out_the_share_of_merges_it_is_given():
    ids = tokenizer_of({(97, 98): 256}).encode_array(b"ab" * 100_000, 0.3, np.random.default_rng(0))
    assert abs((ids == 256).sum() / 100_000 - 0.7) < 0.005


# ---- the class ----


@pytest.fixture
def small(tmp_path):
    """A tokenizer of 260 tokens, its text and its files."""
    path = tmp_path / "text.txt"
    path.write_bytes("the thing, the théâtre\n".encode() * 9)
    return BasicTokenizer(path, 260, out_dir=tmp_path)


def test_loading_gives_what_was_trained(small):
    loaded = BasicTokenizer(out_dir=small.out_dir)
    assert (loaded.merges, loaded.vocab, loaded.vocab_size) == (small.merges, small.vocab, 260)
    assert loaded.fingerprint == small.fingerprint
    for name, attribute in (("merges.pkl", small.merges), ("vocab.pkl", small.vocab)):
        assert pickle.loads((small.out_dir / name).read_bytes()) == attribute, "pickle reads it too"
    assert {type(token) for pair, new in small.merges.items() for token in (*pair, new)} == {int}


def test_train_may_be_called_again(small):
    before = dict(small.merges)
    small.train()
    assert small.merges == before
    loaded = BasicTokenizer(out_dir=small.out_dir)
    with pytest.raises(ValueError, match="give train\\(\\) a data_path"):
        loaded.train()
    loaded.train(small.data_path)
    assert loaded.merges == before


def test_the_pretrained_network_serves_until_there_is_a_run_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tok, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(tok, "PRETRAINED", tmp_path / "pretrained")
    assert tok.default_run("model.pt") == tmp_path
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "model.pt").touch()
    assert tok.default_run("model.pt") == tmp_path / "pretrained"
    assert tok.default_run("metrics.csv") == tmp_path
    (tmp_path / "model.pt").touch()
    assert tok.default_run("model.pt") == tmp_path


def network_of(path, fingerprint):
    """Writes what a checkpoint is, as far as a tokenizer is concerned."""
    import torch

    named = {} if fingerprint is None else {"text": "0" * 64, "tokenizer": fingerprint}
    torch.save({"config": {}, "model": {"x": torch.rand(99)}} | named | {"iteration": 1}, path)


@pytest.mark.parametrize("name", ["model.pt", "last.pt", "last.pt.old", "model_int8.pt", "my.pt"])
def test_a_tokenizer_that_a_network_needs_is_not_replaced(small, name):
    network_of(small.out_dir / name, small.fingerprint)
    before = {path: path.read_bytes() for path in small.out_dir.iterdir()}
    with pytest.raises(ValueError, match=f"{name} was trained with another tokenizer"):
        BasicTokenizer(small.data_path, 259, out_dir=small.out_dir)
    BasicTokenizer(small.data_path, 260, out_dir=small.out_dir)  # the same once more
    assert {path: path.read_bytes() for path in small.out_dir.iterdir()} == before
    BasicTokenizer(small.data_path, 259, out_dir=small.out_dir / "another")
    assert BasicTokenizer(small.data_path, 259, out_dir=None).vocab_size == 259  # writes nothing


def test_files_that_name_no_tokenizer_are_no_obstacle(small):
    network_of(small.out_dir / "model.pt", None)  # a published one, say
    (small.out_dir / "last.pt").write_bytes(b"damaged")
    (small.out_dir / "a folder.pt").mkdir()
    BasicTokenizer(small.data_path, 259, out_dir=small.out_dir)
    assert BasicTokenizer(out_dir=small.out_dir).vocab_size == 259


def test_fingerprints_differ_where_merges_do():
    assert tokenizer_of({(97, 98): 256}).fingerprint != tokenizer_of({(97, 99): 256}).fingerprint


def test_256_tokens_are_the_bytes(small):
    tokenizer = BasicTokenizer(small.data_path, 256, out_dir=small.out_dir)
    assert tokenizer.merges == {} and tokenizer.encode("é") == [195, 169]


@pytest.mark.parametrize("vocab_size", [255, 0, -1, tok.MAX_VOCAB + 1])
def test_impossible_vocabulary_sizes(small, vocab_size):
    with pytest.raises(ValueError, match="vocab_size must be from 256"):
        BasicTokenizer(small.data_path, vocab_size, out_dir=small.out_dir)


def test_too_few_pairs_says_how_large_the_vocabulary_can_be(tmp_path):
    (tmp_path / "text.txt").write_text("abcd")
    with pytest.raises(ValueError, match="vocab_size can be 259 at most, not 300"):
        BasicTokenizer(tmp_path / "text.txt", 300, out_dir=tmp_path)
    assert not (tmp_path / "merges.pkl").exists()
    BasicTokenizer(tmp_path / "text.txt", 259, out_dir=tmp_path)


def test_a_vocabulary_too_long_to_load_again_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tok, "MAX_BYTES", 1 << 15)
    (tmp_path / "text.txt").write_bytes(random.Random(0).randbytes(1000).hex().encode())
    message = "the tokens become too long: vocab_size can be [0-9]+ at most, not 2000"
    with pytest.raises(ValueError, match=message) as error:
        BasicTokenizer(tmp_path / "text.txt", 2000, out_dir=tmp_path)
    assert not (tmp_path / "merges.pkl").exists()
    largest = int(str(error.value).split(" at most")[0].split()[-1])
    BasicTokenizer(tmp_path / "text.txt", largest, out_dir=tmp_path)
    assert BasicTokenizer(out_dir=tmp_path).vocab_size == largest


def test_decode_names_an_unknown_id(small):
    for token in (260, -1):
        with pytest.raises(ValueError, match=f"no token {token}: the ids are 0 to 259"):
            small.decode([65, token])


def test_decode_replaces_what_is_not_utf8(small):
    assert small.decode([65, 195, 66]) == "A\ufffdB"
    assert small.decode_bytes([65, 195, 66]) == b"A\xc3B"


def test_decode_takes_ids_as_the_network_returns_them(small):
    torch = pytest.importorskip("torch")
    ids = small.encode("the thing")
    for form in (ids, tuple(ids), iter(ids), np.array(ids), np.array([ids]), np.array(ids, "u2"),
                 torch.tensor(ids), torch.tensor([ids]), [*torch.tensor(ids)],
                 [token[None] for token in torch.tensor(ids)], [*np.array(ids)]):
        assert small.decode(form) == "the thing"
    assert small.decode(torch.empty(0, dtype=torch.int64)) == small.decode([]) == ""
    for form in torch.tensor([ids, ids]), [ids, ids], [torch.tensor(ids)], ["65"], [65.0], 65:
        with pytest.raises(ValueError, match="not the ids of one text"):
            small.decode(form)


def test_surrogates_do_not_crash(small):
    argument = b"caf\xe9".decode(errors="surrogateescape")  # Latin-1 on a command line
    assert small.decode_bytes(small.encode(argument)) == b"caf\xe9"
    small.encode("\ud800")


# ---- reading a text ----


@pytest.mark.parametrize("data, message", [
    (b"", "is empty: pass a text with --data_path"),
    (b"\xef\xbb\xbf", "is empty"),
    (b"\x7fELF\x02\x00\x00", r"is binary \(byte 5 is zero\)"),
    (bytes(range(256)) * 9, "is binary"),
])
def test_what_is_no_text(tmp_path, data, message):
    path = tmp_path / "input.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="input.txt " + message):
        read_text(path)


TEXTS = {  # encodings, and a text to be told by
    "UTF-16 UTF-16LE UTF-16BE": "Was it a car or a cat I saw? " * 9,
    "GBK": "话说天下大势，分久必合，合久必分。他说这是他最喜欢的地方，也是我们的。\n",
    "Big5": "話說天下大勢，分久必合，合久必分。他說這是他最喜歡的地方，也是我們的。\n",
    "Shift_JIS EUC-JP": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n",
    "EUC-KR": "나는 오늘 아침에 일찍 일어나서 학교에 갔습니다. 날씨가 매우 좋았다.\n",
    "CP932": "①吾輩は猫である。～名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n",
    "CP949": "펲시콜라를 마시며 뷁이라고 했다. 날씨가 매우 좋았고 점심을 먹었다.\n",
    "Windows-1251 KOI8-R": "Все счастливые семьи похожи друг на друга.\n",
    "Windows-1252": "Größe, Übermut und Füße; l’été, créée à Noël « là-bas » – où ?\n",
    "": "Στην αρχή ήταν ο λόγος, και ο λόγος ήταν προς τον Θεόν.\n",
}


@pytest.mark.parametrize("text, encoding", [(text, encoding) for encodings, text in TEXTS.items()
                                            for encoding in encodings.split(" ")])
@pytest.mark.parametrize("iconv", [True, False], ids=["iconv", "python"])
def test_an_encoding_is_named_where_it_shows_and_its_command_converts(
        tmp_path, monkeypatch, text, encoding, iconv):
    path, old_which = tmp_path / "my text.txt", shutil.which
    if iconv and not shutil.which("iconv"):
        pytest.skip("no iconv here")
    monkeypatch.setattr(shutil, "which", lambda name: iconv and old_which(name))
    path.write_bytes(text.encode(encoding or "Windows-1253"))
    with pytest.raises(ValueError) as error:
        read_text(path)
    if not encoding:
        assert "find out its encoding" in str(error.value)
        return
    named = "UTF-16, not UTF-8" if "UTF-16" in encoding else f"not UTF-8 but {encoding}, it seems"
    assert f"my text.txt is {named}: " in str(error.value)
    command = str(error.value).split("convert it with ")[1].replace("python", sys.executable)
    assert ("iconv -f" in command) == iconv
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert read_text(tmp_path / "my text-utf8.txt") == text


@pytest.mark.parametrize("change, message", [
    (lambda data: data[:-2], "is not UTF-8 at its end, in the middle of a character"),
    (lambda data: b"x" * 99 + b"\xc3", "is not UTF-8 at its end"),
    (lambda data: b"caf\xc3\xa9 \xc3", "is not UTF-8 at its end"),
    (lambda data: data[:2000] + b"\xff" + data[2000:], r"in one place \(byte 0xff on line 54\)"),
    (lambda data: b"x" * 9 + b"\n" + b"\xe9" + b"x" * 999, r"in one place \(byte 0xe9 on line 2\)"),
    (lambda data: b"\x80" + data + b"\x80" + data, r"in 2 bytes \(first byte 0x80 on line 1\)"),
])
@pytest.mark.parametrize("iconv", [True, False], ids=["iconv", "python"])
def test_a_text_that_is_nearly_utf8_is_told_what_is_amiss_and_how_to_drop_it(
        tmp_path, monkeypatch, change, message, iconv):
    data = change(("théâtre, 你好, \U0001F600\n" * 5 + "x" * 99 + "\n" + "\u2014").encode() * 9)
    path, old_which = tmp_path / "my text.txt", shutil.which
    if iconv and not shutil.which("iconv"):
        pytest.skip("no iconv here")
    monkeypatch.setattr(shutil, "which", lambda name: iconv and old_which(name))
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_text(path)
    command = str(error.value).split("drop what is amiss with ")[1]
    subprocess.run(command.replace("python", sys.executable), shell=True, cwd=tmp_path)
    assert read_text(tmp_path / "my text-utf8.txt") == data.decode(errors="ignore")


def test_a_text_half_in_utf8_gets_no_harmful_advice(tmp_path):
    (tmp_path / "mixed").write_bytes("été\n".encode() * 99 + "été\n".encode("latin-1") * 99)
    with pytest.raises(ValueError, match=r"is not UTF-8 \(byte 0xe9 on line 100\): find out"):
        read_text(tmp_path / "mixed")
    (tmp_path / "mixed").write_bytes("été\n".encode("latin-1") * 99 + "été\n".encode() * 99)
    with pytest.raises(ValueError, match=r"is not UTF-8 \(byte 0xe9 on line 1\): find out"):
        read_text(tmp_path / "mixed")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_a_bad_byte_is_on_the_same_line_wherever_one_begins_to_read(tmp_path, monkeypatch, end):
    path, half = tmp_path / "text.txt", (b"ab" + end) * 40
    path.write_bytes(half + b"\xff" + half)
    with pytest.raises(ValueError, match="byte 0xff on line 41"):
        read_text(path)
    monkeypatch.setattr(tok, "LONG", 100)
    monkeypatch.setattr(tok, "PIECE", 50)
    with pytest.raises(ValueError, match="byte 0xff on line 41"):
        tok.learning_text(path)


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match="no text at .*none.txt: run python data/prepare.py, or"):
        read_text(tmp_path / "none.txt")


@pytest.mark.parametrize("given", ["books", "books/*.txt", "books/", "bo*/?.txt"])
def test_of_several_texts_it_says_how_to_make_one(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    for name in "one", "two":
        (tmp_path / "books" / f"{name[0]}.txt").write_text(f"{name}\n")
    with pytest.raises(ValueError, match="Is a directory|stands for 2 files") as error:
        read_text(given)
    if os.name == "posix" and given != "bo*/?.txt":
        subprocess.run(str(error.value).split("into one file with ")[1], shell=True, check=True)
        assert read_text("books.txt") == "one\ntwo\n"


def test_no_command_shown_overwrites_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    assert tok.convert("books", "GBK").endswith((" books-utf8.txt", '.read())"'))
    for name in "books.txt", "books-2.txt", "books-utf8.txt":
        (tmp_path / name).touch()
    assert "books-3.txt" in tok.together(Path("books/*"))
    assert "books-utf8-2.txt" in tok.convert("books", "GBK")


def test_a_pattern_that_one_text_matches_is_that_text(tmp_path):
    (tmp_path / "one.txt").write_text("one")
    assert read_text(tmp_path / "*.txt") == "one"
    (tmp_path / "*.txt").write_text("named so")
    assert read_text(tmp_path / "*.txt") == "named so"


def test_texts_are_read_as_python_reads_them(tmp_path, capsys):
    path = tmp_path / "input.txt"
    for data in b"\xef\xbb\xbfa\r\nb\n", b"a\rb\r\n\r\r\n\n\rc\r", "é\r\n\u2028\x85".encode():
        path.write_bytes(data)
        assert read_text(path) == read_text(path) == path.read_text("utf-8-sig")
    line = f"note: {path} has CRLF or CR line ends, which are read as \\n\n"
    assert capsys.readouterr().err == line
    path.write_bytes(b"a\nb\n")
    assert read_text(path) == "a\nb\n" and capsys.readouterr().err == ""


def test_a_note_comes_from_one_of_several_processes_alone(monkeypatch, capsys):
    for rank, line in ("1", ""), ("0", "note: the file\n"):
        monkeypatch.setenv("RANK", rank)
        tok.note.cache_clear()
        tok.note("the file")
        assert capsys.readouterr().err == line


def test_the_name_of_a_file_given_as_a_text_is_noted(small):
    shown = run("encode", "text.txt", "--out_dir", ".", cwd=small.out_dir)
    assert shown.stdout.split() == [b"%d" % token for token in small.encode_array("text.txt")]
    note, ratio = shown.stderr.decode().splitlines()
    assert note.startswith("note: text.txt is a file's name") and "put < before it" in note
    assert run("show", "the text", "--out_dir", ".", cwd=small.out_dir).stderr == b""


# ---- texts larger than memory ----

LINES = "To be,\nor not — 日本 😀\u0301 to be: é\n" * 40


@pytest.fixture
def small_limits(monkeypatch):
    """Every text of more than 200 bytes is long, and read and encoded in blocks of 37."""
    for name, value in ("LONG", 200), ("PIECE", 50), ("BLOCK", 37), ("UNCUT", 3000):
        monkeypatch.setattr(tok, name, value)
    monkeypatch.setattr(tok, "usable_cores", lambda: 2)


@pytest.fixture
def in_this_process(monkeypatch):
    def encode_blocks(tokenizer, blocks):
        yield from map(tokenizer._encode_long, blocks)

    monkeypatch.setattr(tok, "encode_blocks", encode_blocks)


def long_tokens(tmp_path, data, merges, **options):
    """Tokens of a file of these bytes, from tokens.bin beside it, and the text in the file."""
    (tmp_path / "text.txt").write_bytes(data)
    tokens = tok.load_tokens(tokenizer_of(merges), tmp_path / "text.txt", tmp_path, **options)
    return tokens, read_text(tmp_path / "text.txt")


awkward = st.lists(st.sampled_from(["a", "b", "é", "日", "😀", "\n", "\r", "\r\n", "ab", "\ufeff"]),
                   min_size=1, max_size=150).map("".join)


@given(awkward, st.integers(3, 60), st.integers(256, 290))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_of_a_file_have_the_ids_of_the_whole(tmp_path, monkeypatch, small_limits,
                                                    in_this_process, text, block, size):
    monkeypatch.setattr(tok, "LONG", 0)
    monkeypatch.setattr(tok, "BLOCK", block)
    data = codecs.BOM_UTF8 + text.encode()
    merges, _ = trained(text.encode(), size)
    (tmp_path / "tokens.bin").unlink(missing_ok=True)
    tokens, whole = long_tokens(tmp_path, data, merges)
    assert whole == text.replace("\r\n", "\n").replace("\r", "\n")
    expected = tokenizer_of(merges).encode_array(whole)
    assert type(tokens.ids) is np.memmap and tokens.ids.dtype == expected.dtype
    assert tokens.ids.tolist() == expected.tolist()
    assert tokens.digest == hashlib.sha256(expected.tobytes()).hexdigest()
    assert (tokens.characters, tokens.size) == (len(whole), len(data))


@pytest.mark.parametrize("cores", [1, 3])
def test_processes_encode_a_long_text_as_one_does(tmp_path, small_limits, monkeypatch, cores):
    monkeypatch.setattr(tok, "usable_cores", lambda: cores)
    merges, _ = trained(LINES.encode(), 300)
    tokens, whole = long_tokens(tmp_path, LINES.encode(), merges)
    assert tokens.ids.tolist() == tokenizer_of(merges).encode_array(whole).tolist()


def test_more_processes_than_blocks(tmp_path, small_limits, monkeypatch):
    monkeypatch.setattr(tok, "BLOCK", 10**6)
    tokens, whole = long_tokens(tmp_path, LINES.encode(), {})
    assert tokens.ids.tolist() == list(whole.encode())


def test_the_processes_load_no_pytorch(tmp_path):
    code = "import sys, tokenizer; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_tokens_of_a_short_text_are_in_memory(tmp_path):
    tokens, whole = long_tokens(tmp_path, "é\r\n".encode(), {})
    assert (tokens.ids.tolist(), tokens.size, tokens.characters) == ([195, 169, 10], 3, 2)
    assert type(tokens.ids) is np.ndarray and os.listdir(tmp_path) == ["text.txt"]


def test_tokens_are_found_again_by_time_or_digest_and_changes_noticed(
        tmp_path, small_limits, in_this_process, monkeypatch):
    path, file = tmp_path / "text.txt", tmp_path / "tokens.bin"
    long_tokens(tmp_path, LINES.encode(), {})
    made, encode = file.read_bytes(), tok.encode_file

    def load(merges, **options):
        return tok.load_tokens(tokenizer_of(merges), path, tmp_path, **options)

    monkeypatch.setattr(tok, "encode_file", None)  # fails if it is called
    assert load({}).ids.tolist() == list(LINES.encode())
    os.utime(path, (1, 1))
    assert load({}).ids.tolist() == list(LINES.encode())
    assert load({(97, 98): 256}, encode=False) is None
    path.write_text(LINES.replace("To", "to"))
    assert load({}, encode=False) is None
    path.write_text(LINES + "!")
    assert load({}, encode=False) is None
    path.write_text(LINES)
    for damaged in made[:-1], made[:9], b"", b"[3]" + made[3:], b"\xff" + made[1:]:
        file.write_bytes(damaged)
        assert load({}, encode=False) is None
    monkeypatch.setattr(tok, "encode_file", encode)
    assert load({}).ids.tolist() == list(LINES.encode())
    assert load({(84, 111): 256}).ids[0] == 256


@pytest.mark.parametrize("data, message", [
    (LINES.encode() + b"\xff", "byte 0xff on line 81"),
    (LINES.encode() + "—".encode()[:2], "at its end, in the middle of a character"),
    (LINES.encode() + b"a\0b", f"byte {len(LINES.encode()) + 1} is zero"),
    (LINES.encode("utf-16"), "UTF-16"),
    (b"a" * 5000, "cannot be cut anywhere"),
])
def test_a_bad_place_far_in_leaves_nothing(tmp_path, small_limits, data, message):
    (tmp_path / "text.txt").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        tok.load_tokens(tokenizer_of({(97, 97): 256}), tmp_path / "text.txt", tmp_path)
    assert os.listdir(tmp_path) == ["text.txt"]


@pytest.mark.parametrize("change", [
    lambda path: os.truncate(path, 1000), lambda path: path.write_text(LINES + LINES)])
def test_a_text_that_changes_while_it_is_encoded_is_refused(
        tmp_path, small_limits, in_this_process, monkeypatch, change):
    path, count = tmp_path / "text.txt", BasicTokenizer.count_characters

    def count_and_change(self, ids):
        monkeypatch.setattr(BasicTokenizer, "count_characters", count)
        change(path)
        return count(self, ids)

    monkeypatch.setattr(BasicTokenizer, "count_characters", count_and_change)
    with pytest.raises(ValueError, match="changed while it was read"):
        long_tokens(tmp_path, LINES.encode(), {})
    assert os.listdir(tmp_path) == ["text.txt"]


@pytest.mark.parametrize("error, raised", [
    (KeyboardInterrupt(), KeyboardInterrupt),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError),
    (None, ValueError)])  # the processes are killed
def test_an_encoding_cut_short_leaves_neither_file_nor_process(
        tmp_path, small_limits, monkeypatch, error, raised):
    processes, popen = [], subprocess.Popen

    def start(*args, **options):
        processes.append(popen(*args, **options))
        return processes[-1]

    def cut_short(self, ids):
        for process in [] if error else processes:
            process.kill()
        if error:
            raise error
        return 0

    monkeypatch.setattr(tok.subprocess, "Popen", start)
    monkeypatch.setattr(BasicTokenizer, "count_characters", cut_short)
    with pytest.raises(raised):
        long_tokens(tmp_path, LINES.encode(), {})
    assert len(processes) == 2 and all(process.poll() is not None for process in processes)
    assert os.listdir(tmp_path) == ["text.txt"]


@pytest.mark.skipif(os.name == "nt", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_while_encoding_is_one_line(tmp_path):
    (tmp_path / "text.txt").write_text(LINES)
    code = """import resource, sys
sys.path[:0] = [sys.argv[1]]
import tokenizer as tok
tok.LONG, tok.BLOCK = 200, 37
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
tokenizer = tok.BasicTokenizer.__new__(tok.BasicTokenizer)
tokenizer._use({}, tok.spell({}))
tok.run_script(lambda: tok.load_tokens(tokenizer, sys.argv[2] + "/text.txt", sys.argv[2]))"""
    done = subprocess.run([sys.executable, "-c", code, ROOT, tmp_path], capture_output=True,
                          text=True)
    assert done.returncode == 1
    assert done.stderr == f"-c: cannot write {tmp_path / 'tokens.bin'}: File too large\n"
    assert os.listdir(tmp_path) == ["text.txt"]


def test_a_long_text_is_learned_from_in_whole_lines_spread_evenly(tmp_path, monkeypatch, capsys):
    lines = [f"line {number:05} — é\n" for number in range(5000)]
    path = tmp_path / "text.txt"
    path.write_text("".join(lines), encoding="utf-8")
    monkeypatch.setattr(tok, "LONG", 10_000)
    monkeypatch.setattr(tok, "PIECE", 1000)
    text = tok.learning_text(path).decode()
    pieces = text.splitlines(keepends=True)
    assert set(pieces) <= set(lines) and 7000 < len(text.encode()) <= 10_000
    numbers = [int(line[5:10]) for line in pieces]
    assert numbers == sorted(numbers) and numbers[0] < 50 and numbers[-1] > 4500
    assert max(b - a for a, b in itertools.pairwise(numbers)) < 500
    assert "learning from" in capsys.readouterr().out
    BasicTokenizer(path, 260, out_dir=tmp_path)
    expected, _ = trained(text.encode(), 260)
    assert BasicTokenizer(out_dir=tmp_path).merges == expected


def test_a_long_text_without_lines_is_learned_from_in_whole_characters(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("日é😀" * 2000, encoding="utf-8")
    for piece in 101, 102, 103, 104:
        monkeypatch.setattr(tok, "LONG", 10 * piece)
        monkeypatch.setattr(tok, "PIECE", piece)
        text = tok.learning_text(path).decode()
        assert set(text) == set("日é😀") and 10 * piece - 70 <= len(text.encode()) <= 10 * piece


def test_a_text_up_to_the_limit_is_learned_from_whole(tmp_path, monkeypatch, capsys):
    path = tmp_path / "text.txt"
    path.write_bytes(b"ab\r\n" * 25)
    monkeypatch.setattr(tok, "LONG", 100)
    assert tok.learning_text(path) == b"ab\n" * 25 and not capsys.readouterr().out


# ---- hostile and damaged files ----

MERGES = {(97, 98): 256, (256, 99): 257}
VOCAB = spell(MERGES)
TWO_62 = struct.pack("<Q", 1 << 62)


class Code:
    def __reduce__(self):
        return os.mkdir, ("code_ran",)


def frame(*parts):
    return b"\x80\x04" + b"".join(parts) + b"."


def one_of(**change):
    return pickle.dumps({**VOCAB, **{int(key[1:]): value for key, value in change.items()}})


NO_TOKEN, MISFIT = "does not make token 256", "vocab.pkl is not what .*merges.pkl spells"
HOSTILE = {  # what is wrong: (merges.pkl, the message), or (vocab.pkl, the message)
    "code in merges": ("merges", pickle.dumps({(97, 98): Code()}), "SHORT_BINUNICODE has no place"),
    "code, protocol 0": ("merges", b"cos\nmkdir\n(S'code_ran'\ntR.", "GLOBAL has no place"),
    "code in vocab": ("vocab", pickle.dumps({0: Code()}, protocol=2), "GLOBAL has no place"),
    "code, extension registry": ("vocab", frame(b"}\x82\x01"), "EXT1 has no place"),
    "persistent id": ("vocab", frame(b"}Pid\n"), "PERSID has no place"),
    "empty file": ("merges", b"", "pickle exhausted before seeing STOP"),
    "truncated": ("vocab", pickle.dumps(VOCAB)[:-9], "not enough data in stream"),
    "text": ("merges", b"First Citizen:\n", "could not convert string to float: b'irst Citizen:'"),
    "zip file": ("merges", b"PK\x03\x04" + bytes(40), "no newline found"),
    "4 GB of bytes": ("vocab", frame(b"}K\x00B\xff\xff\xff\xffab"), "expected 4294967295 bytes"),
    "2^62 bytes": ("vocab", frame(b"}K\x00\x8e" + TWO_62), "expected 461168601842738"),
    "bytearray of 2^62": ("vocab", frame(b"}K\x00\x96" + TWO_62), "expected 461168601842738"),
    "memo of 2^32": ("merges", frame(b"}r\xff\xff\xff\xff"), "vocab.pkl is not what"),
    "integer of 5,000 digits": ("merges", frame(b"}I" + b"9" * 5000 + b"\n"), "4300 digits"),
    "integer of 2^31 bytes": ("merges", frame(b"}\x8b\xff\xff\xff\x7f"), "long4"),
    "tuples 100,000 deep": ("merges", frame(b"}K\x01" + b"K\x01\x86" * 100_000),
                            "TUPLE2 has no place"),
    "a list": ("merges", pickle.dumps([1, 2, 3]), "EMPTY_LIST has no place"),
    "a string": ("merges", pickle.dumps({"ab": 256}), "SHORT_BINUNICODE has no place"),
    "a float": ("merges", pickle.dumps({(97, 98): 256.0}), "BINFLOAT has no place"),
    "a bool": ("merges", pickle.dumps({(True, 98): 256}), "NEWTRUE has no place"),
    "a bool of protocol 0": ("merges", frame(b"}(I01\nK\x62tM\x00\x01s"), "TUPLE has no place"),
    "a key without value": ("merges", frame(b"}K\x01s"), "argument 2 is shorter"),
    "a triple": ("merges", pickle.dumps({(97, 98, 99): 256}), "TUPLE3 has no place"),
    "ids with a gap": ("merges", pickle.dumps({(97, 98): 256, (97, 99): 258}),
                       "-> 258 does not make token 257"),
    "an id below 256": ("merges", pickle.dumps({(97, 98): 255}), "-> 255 " + NO_TOKEN),
    "made of itself": ("merges", pickle.dumps({(97, 256): 256}), NO_TOKEN),
    "made of a later id": ("merges", pickle.dumps({(97, 257): 256, (97, 98): 257}), NO_TOKEN),
    "made of a negative id": ("merges", pickle.dumps({(97, -1): 256}), NO_TOKEN),
    "made of one number": ("merges", pickle.dumps({97: 256}), "97 -> 256 " + NO_TOKEN),
    "made into bytes": ("merges", pickle.dumps({(97, 98): b"ab"}), NO_TOKEN),
    "tokens that double 200 times": (
        "merges", pickle.dumps({(97, 97): 256} | {(id - 1, id - 1): id for id in range(257, 456)}),
        "bytes in them"),
    "vocab as merges": ("merges", pickle.dumps(VOCAB), NO_TOKEN),
    "merges as vocab": ("vocab", pickle.dumps(MERGES), MISFIT),
    "a token spelled otherwise": ("vocab", one_of(_256=b"ba"), MISFIT),
    "a byte spelled otherwise": ("vocab", one_of(_65=b"BB"), MISFIT),
    "a token too many": ("vocab", one_of(_258=b"abc"), MISFIT),
    "an empty vocabulary": ("vocab", pickle.dumps({}), MISFIT),
}


@pytest.mark.parametrize("name, data, message", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_give_one_clear_line(tmp_path, monkeypatch, name, data, message):
    monkeypatch.chdir(tmp_path)
    save_pair(tmp_path, MERGES, VOCAB)
    (tmp_path / f"{name}.pkl").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ValueError, match=message) as caught:
        BasicTokenizer(out_dir=tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    line = str(caught.value)
    print(line)
    assert f"{name}.pkl" in line and "\n" not in line
    assert line.endswith("run python tokenizer.py train")
    assert not (tmp_path / "code_ran").exists()
    assert peak < 1e7 + 50 * len(data), "bytes, and no gigabytes"


@pytest.mark.parametrize("name", ["merges.pkl", "vocab.pkl"])
def test_oversized_missing_and_folders(tmp_path, name):
    save_pair(tmp_path, MERGES, VOCAB)
    os.truncate(tmp_path / name, tok.MAX_BYTES + 1)
    with pytest.raises(ValueError, match=f"{name} is no tokenizer file .it is larger than"):
        load_pair(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="there is no tokenizer in .*: run python tokenizer.py"):
        load_pair(tmp_path)
    (tmp_path / "model.pt").touch()
    with pytest.raises(ValueError, match="there is no tokenizer in .*: copy merges.pkl and vocab."
                       "pkl there from the folder of the network's run, or name that with --out_"):
        load_pair(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"cannot read .*{name}"):
        load_pair(tmp_path)


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_others_load(tmp_path, protocol):
    for optimize in (bytes, pickletools.optimize):
        (tmp_path / "merges.pkl").write_bytes(optimize(pickle.dumps(MERGES, protocol)))
        # protocols up to 2 have no bytes
        (tmp_path / "vocab.pkl").write_bytes(optimize(pickle.dumps(VOCAB, max(protocol, 3))))
        assert load_pair(tmp_path)[:2] == (MERGES, VOCAB)


# ---- written whole or not at all ----

OLD, NEW, NEXT = {(97, 98): 256}, {(120, 121): 256, (256, 122): 257}, {(32, 32): 256}


def save_ended_at(step, how, folder, merges):
    """Saves in a process that ends before its step-th line; returns whether there was one."""
    child = os.fork()
    if child == 0:
        steps = iter(range(step))

        def trace(frame, event, argument):
            if frame.f_code.co_name in ("save_pair", "atomic_write", "sync_folder"):
                if next(steps, None) is None:
                    if how == "killed":
                        os._exit(9)
                    raise KeyboardInterrupt
                return trace

        try:
            sys.settrace(trace)
            save_pair(folder, merges, spell(merges))
            os._exit(0)
        except KeyboardInterrupt:
            os._exit(9)
        finally:
            os._exit(1)
    return {9: True, 0: False}[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]


def is_mixed(folder):
    merges, vocab = (pickle.loads((folder / name).read_bytes())
                     for name in ("merges.pkl", "vocab.pkl"))
    return spell(merges) != vocab


def strays(folder):
    return [path.name for path in folder.iterdir() if path.name not in ("merges.pkl", "vocab.pkl")]


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_a_save_that_ends_at_any_line_leaves_the_old_pair_or_the_new(tmp_path, how):
    found, mixed = [], []
    for step in itertools.count():
        folder = tmp_path / str(step)
        save_pair(folder, OLD, spell(OLD))
        if not save_ended_at(step, how, folder, NEW):
            break
        found.append(load_pair(folder)[0])
        if is_mixed(folder):
            mixed.append(folder)
    old, new = found.count(OLD), found.count(NEW)
    assert found == [OLD] * old + [NEW] * new and old and new
    assert mixed, "a kill between the two renames was among them"
    for step in itertools.count():  # and the save after that one, killed as well
        folder = tmp_path / f"again {step}"
        shutil.copytree(mixed[0], folder)
        if not save_ended_at(step, how, folder, NEXT):
            break
        assert load_pair(folder)[0] in (NEW, NEXT)
    assert load_pair(folder)[0] == NEXT and not is_mixed(folder) and not strays(folder)


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_a_first_save_that_ends_at_any_line_leaves_nothing_or_the_pair(tmp_path, how):
    found = []
    for step in itertools.count():
        folder = tmp_path / str(step)
        folder.mkdir()
        if not save_ended_at(step, how, folder, NEW):
            break
        try:
            found.append(load_pair(folder)[0])
        except ValueError as error:
            assert "there is no tokenizer in" in str(error)
    assert found and all(merges == NEW for merges in found) and len(found) < step


@pytest.mark.parametrize("reads", [1, 2])
def test_a_save_that_happens_between_two_reads_of_a_load(tmp_path, monkeypatch, reads):
    save_pair(tmp_path, OLD, spell(OLD))
    read_pickle, calls = tok.read_pickle, iter(range(1, 9))

    def read_then_save(path):
        result = read_pickle(path)
        if next(calls) == reads:
            with monkeypatch.context() as patch:
                patch.setattr(tok, "read_pickle", read_pickle)
                save_pair(tmp_path, NEW, spell(NEW))
        return result

    monkeypatch.setattr(tok, "read_pickle", read_then_save)
    assert load_pair(tmp_path)[0] == [NEW, OLD][reads - 1]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "new folder" / "file"
    with atomic_write(path) as file:
        file.write(b"old")
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), atomic_write(path) as file:
            file.write(b"half of the new")
            raise error
        assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file"]


def test_a_symbolic_link_is_kept_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    for data in b"first", b"second":
        with atomic_write(tmp_path / "link") as file:
            file.write(data)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "folder" / "file").read_bytes() == data
    assert os.listdir(tmp_path / "folder") == ["file"]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in "file", "pipe":
        with pytest.raises(OSError, match=f"cannot write .*{name}: it is not a file"):
            with atomic_write(tmp_path / name):
                pass
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "text").touch()
    with pytest.raises(OSError, match="cannot write .*text/.*: (Not a directory|File exists)"):
        save_pair(tmp_path / "text", OLD, spell(OLD))
    if Path("/dev/full").exists():
        (tmp_path / ".full.tmp").symlink_to("/dev/full")
        with pytest.raises(OSError, match="cannot write .*full: No space left on device"):
            with atomic_write(tmp_path / "full") as file:
                file.write(b"x")


# ---- command line ----


def run(*arguments, **options):
    command = [sys.executable, ROOT / "tokenizer.py", *arguments]
    return subprocess.run(command, capture_output=True, timeout=60, **options)


def test_commands_are_filters_of_pure_data(small):
    folder = ["--out_dir", small.out_dir]
    text = b"the thing\n\xff\n"
    encoded = run("encode", *folder, input=text)
    assert encoded.stdout.split() == [b"%d" % token for token in small.encode_array(text)]
    assert b"compression ratio" in encoded.stderr
    assert run("decode", *folder, input=encoded.stdout).stdout == text
    assert run("decode", *folder, *encoded.stdout.split()).stdout == text
    assert run("encode", *folder, b"caf\xe9").stdout.split()[-1] == b"233"
    shown = run("show", *folder, "the\x1b é\n").stdout.decode()
    tokens = small.encode_array("the\x1b é\n").tolist()
    assert shown.count("[") == len(tokens) and "\x1b" not in shown and "\\x1b" in shown
    listed = run("vocab", *folder, "--data_path", small.data_path).stdout.decode().splitlines()
    counts = np.bincount(small.encode_array(read_text(small.data_path)), minlength=260)
    assert [int(line.split()[0]) for line in listed[1:]] == [256, 257, 258, 259]
    assert all(f" {counts[token]}  [" in line for token, line in zip(range(256, 260), listed[1:]))


def test_train_on_the_command_line(small, tmp_path):
    out = tmp_path / "made" / "here"
    done = run("train", "--data_path", small.data_path, "--vocab_size", "260", "--out_dir", out,
               "--verbose")
    assert done.returncode == 0 and done.stdout.count(b"occurrences") == 4
    assert BasicTokenizer(out_dir=out).merges == small.merges


@pytest.mark.parametrize("arguments, status, message", [
    ([], 2, "the following arguments are required: COMMAND"),
    (["dance"], 2, "invalid choice: 'dance'"),
    (["train", "--vocab_size", "255"], 2, "argument --vocab_size: must be at least 256 and less"),
    (["train", "--vocab_size", "many"], 2,
     "argument --vocab_size: must be a whole number, not 'many'"),
    (["train", "--data_path", "none.txt"], 1,
     "no text at none.txt: run python data/prepare.py, or pass"),
    (["train", "--data_path", "."], 1, "cannot read .: Is a directory"),
    (["train", "--data_path", "text.txt", "--vocab_size", "9999"], 1, "vocab_size can be"),
    (["train", "--data_path", "text.txt", "--vocab_size", "260", "--out_dir", "text.txt"], 1,
     "cannot write text"),
    (["encode", "a", "--out_dir", "none"], 1,
     "there is no tokenizer in none: run python tokenizer.py train"),
    (["decode", "65", "999", "--out_dir", "."], 1, "there is no token 999: the ids are 0 to 259"),
    (["decode", "65", "x", "--out_dir", "."], 1, "'x' is not a token id"),
    (["decode", "\u00b2", "--out_dir", "."], 1, "'\u00b2' is not a token id"),
    (["vocab", "--out_dir", ".", "--data_path", "merges.pkl"], 1, "merges.pkl is"),
])
def test_mistakes_are_one_line(small, arguments, status, message):
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = run(*arguments, cwd=small.out_dir, text=True, encoding="utf-8", env=environment)
    assert done.returncode == status and message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert status == 2 or len(done.stderr.splitlines()) == 1


def test_the_tokenizer_needs_no_torch():
    program = "import sys, tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


# ---- what all scripts share ----

BUFFERED = {**os.environ, "PYTHONUNBUFFERED": ""}  # as users run scripts: much can fail at the end


def ended(main, **options):
    """Runs a script with this `main`, which prints before."""
    code = ("import sys, tokenizer; sys.argv[0] = 'folder/name.py'\n"
            f"def main():\n print('before')\n {main}\n"
            "tokenizer.run_script(main, 'buy some')")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, timeout=60,
                          **pipes | {"env": BUFFERED} | options)


@pytest.mark.parametrize("main, status, line", [
    ("pass", 0, ""),
    ("sys.exit(3)", 3, ""),
    ("raise KeyboardInterrupt", 130, ""),
    ("raise BrokenPipeError", 0, ""),
    ("raise ValueError('no such thing')", 1, "name.py: no such thing\n"),
    ("open('/none/such')", 1, "name.py: [Errno 2] No such file or directory: '/none/such'\n"),
    ("bytearray(1 << 62)", 1, "name.py: not enough memory: buy some\n"),
    ("raise RuntimeError('CUDA out of memory.')", 1, "name.py: not enough memory: buy some\n"),
])
def test_a_script_ends_with_its_status_and_one_line_at_most(main, status, line):
    process = ended(main)
    assert (process.returncode, process.stdout, process.stderr) == (status, "before\n", line)


def test_a_fault_of_the_script_shows_its_traceback():
    process = ended("raise RuntimeError('a shape of 3')")
    assert process.returncode == 1 and process.stderr.startswith("Traceback")
    assert process.stderr.endswith("RuntimeError: a shape of 3\n")


def test_an_error_while_a_lack_of_memory_is_handled_is_known_to_come_from_it():
    process = ended("""
 try:
  raise MemoryError
 finally:
  raise RuntimeError('ended while recording')""")
    assert process.stderr == "name.py: not enough memory: buy some\n"


@pytest.mark.parametrize("main", ["pass", "print('much' * 100_000)", "sys.exit(0)",
                                  "print('to the same pipe', file=sys.stderr)"])
def test_a_closed_pipe_is_silent(main):
    reader, writer = os.pipe()
    os.close(reader)
    process = ended(main, stdout=writer, stderr=writer if "stderr" in main else subprocess.PIPE)
    os.close(writer)
    assert process.returncode == 0 and not process.stderr


@pytest.mark.parametrize("script", ["data/prepare.py", "tokenizer.py", "train.py", "generate.py",
                                    "quantize.py", "plots.py"])
def test_every_script_ends_in_this_way(script):
    """The help fills no buffer: whoever leaves its end to Python complains of a closed pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run([sys.executable, ROOT / script, "--help"], stdout=writer,
                             stderr=subprocess.PIPE, timeout=120, env=BUFFERED)
    os.close(writer)
    assert (process.returncode, process.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        process = ended("pass", stdout=full)
    assert process.returncode == 1
    assert process.stderr == "name.py: [Errno 28] No space left on device\n"


def test_characters_that_the_terminal_lacks_are_question_marks():
    process = ended("print('caf\\xe9')", env={**BUFFERED, "PYTHONIOENCODING": "ascii"})
    assert (process.returncode, process.stdout) == (0, "before\ncaf?\n")


@pytest.mark.parametrize("kind, minimum, below, texts", [
    (int, 1, None, ["1", "7", "9223372036854775807"]),
    (int, 0, 10, ["0", "9"]),
    (float, 0, None, ["0", "1e-3", "1e300"]),
    (float, 0.5, 1, ["0.5", "0.999"]),
])
def test_bounds_let_pass_what_lies_between(kind, minimum, below, texts):
    for text in texts:
        value = tok.bounded(kind, minimum, below)(text)
        assert value == kind(text) and type(value) is kind


@pytest.mark.parametrize("kind, minimum, below, text, message", [
    (int, 1, None, "0", "must be at least 1, not 0"),
    (int, 1, None, "9223372036854775808",
     "must be at least 1 and less than 9223372036854775808, not 9223372036854775808"),
    (int, 0, 10, "10", "must be at least 0 and less than 10, not 10"),
    (int, 1, None, "1.5", "must be a whole number, not '1.5'"),
    (float, 0, 1, "1", "must be at least 0 and less than 1, not 1.0"),
    (float, 0, None, "-0.1", "must be at least 0, not -0.1"),
    (float, 0, None, "nan", "must be at least 0, not nan"),
    (float, 0, None, "inf", "must be at least 0 and less than inf, not inf"),
    (float, 0, None, "-inf", "must be at least 0, not -inf"),
    (float, 0, None, "a", "must be a number, not 'a'"),
])
def test_bounds_refuse_the_rest_and_say_what_they_are(kind, minimum, below, text, message):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        tok.bounded(kind, minimum, below)(text)
    assert str(error.value) == message


@pytest.mark.parametrize("line, files, cores", [
    ("0::/job", {"job/cpu.max": "150000 100000"}, 2),
    ("0::/job", {"job/cpu.max": "max 100000", "cpu.max": "100000 100000"}, 1),
    ("0::/job", {"job/cpu.max": "max 100000"}, 7),
    ("4:cpu,cpuacct:/job", {"cpu,cpuacct/job/cpu.cfs_quota_us": "300000",
                            "cpu,cpuacct/job/cpu.cfs_period_us": "100000"}, 3),
    ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 7),
    ("5:memory:/job", {"job/cpu.max": "100000 100000"}, 7)])
def test_usable_cores_follow_affinity_and_quota(tmp_path, monkeypatch, line, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)), raising=False)
    (tmp_path / "own").write_text(line + "\n")
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text + "\n")
    assert usable_cores(tmp_path / "own", tmp_path / "root") == cores
