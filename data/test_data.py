"""test_data.py - corpora against answers that are known, or computed in another way.

    python -m pytest -q data/test_data.py

No network: GPT-2's tokens are replaced by bytes, and OpenWebText's server by one on loopback.
"""
import collections
import gzip
import hashlib
import http.server
import inspect
import io
import itertools
import json
import lzma
import os
import re
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import traceback
import types
import zlib

import numpy as np
import pytest
import tiktoken
import torch
from tiktoken_ext import openai_public
from torch.distributions import Categorical

from data import command, corpus, fasta, openwebtext, signatures, text

if "ON_A_GPU" not in os.environ:  # a process that has used a GPU cannot fork: see test_gpu.py
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LINES = [f"def f{i}(a, b={i}):" for i in range(80)]
TEXT = "".join(f"Article {i}.\nIt says {i * i}, caf\xe9.\n<|endoftext|>\n" for i in range(900))
DOCUMENTS = [list(doc.encode()) + [256] for doc in TEXT.split("<|endoftext|>\n")[:-1]]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def lines(monkeypatch):
    """80 signatures in the place of 30,000."""
    short = [s for s in LINES if len(s) < 24]
    monkeypatch.setattr(signatures, "find_signatures", lambda length: short)
    return short


def outcome(main, argv, capture, **how):
    """Exit code, stdout and stderr of main(argv), as the shell would see them."""
    capture.readouterr()
    with pytest.raises(SystemExit) as stop:
        command.run_script(lambda: main(argv), **how)
    return (stop.value.code, *capture.readouterr())


@pytest.fixture
def gpt2(monkeypatch):
    """Bytes in the place of GPT-2's tokens, which would have to be downloaded."""
    ranks = {bytes([i]): i for i in range(256)}
    stand_in = tiktoken.Encoding("gpt2", pat_str=r"[\s\S]", mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 256})
    corpus.make_tokenizer.cache_clear()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"gpt2": stand_in}[name])
    yield stand_in
    corpus.make_tokenizer.cache_clear()


def refused(main, argv, capsys, *words):
    """main(argv) as the shell would run it: exit code 2 and one `error:` line with these words."""
    code, _, err = outcome(main, argv, capsys)
    last = err.strip().splitlines()[-1]
    assert code == 2 and err.count("error: ") == 1 and last.startswith("error: "), err
    assert all(word in last for word in words) and "Traceback" not in err, last


def tokens(folder, split):
    """All tokens of a split, a list."""
    return np.concatenate(getattr(corpus.load(folder), split)).tolist()


def make(folder="c", pieces=(("train", range(100)), ("val", range(50))), length=0):
    """A corpus of these tokens: packed text of bytes, or rows."""
    return corpus.write(folder, iter(pieces), "text", "bytes", length, {})


def forked(work):
    """Start work() in another process, whose exit code it returns, or None; its number."""
    child, code = os.fork(), 1
    if child:
        return child
    try:
        code = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# --------------------------------------------------------------------------------- a corpus folder
def test_the_files_are_in_the_format_of_llm_c():
    assert make() == {"train": 100, "val": 50}
    assert sorted(os.listdir("c")) == ["meta.json", "train.bin", "val.bin"]
    with open("c/train.bin", "rb") as f:
        content = f.read()
    head = struct.unpack("<256i", content[:1024])
    assert head[:3] == (20240520, 1, 100) and not any(head[3:])
    assert struct.unpack("<100H", content[1024:]) == tuple(range(100))


def test_a_large_corpus_goes_on_in_more_files(monkeypatch):
    monkeypatch.setattr(corpus, "SHARD", 25)
    pieces = [("train", range(i, i + 10)) for i in range(0, 60, 10)] + [("val", [7])]
    assert make("c", pieces) == {"train": 60, "val": 1}
    files = ["train.bin", "train_001.bin", "train_002.bin"]
    assert sorted(os.listdir("c")) == ["meta.json", *files, "val.bin"]
    assert list(map(len, corpus.load("c").train)) == [30, 20, 10]
    assert tokens("c", "train") == list(range(60))


def files_of(*spans):
    return [np.arange(low, high).astype("<u2") for low, high in spans]


def in_memory(train, val, length):
    return corpus.Corpus("c", "text", "bytes", length, {}, train, val)


@pytest.mark.parametrize("length, starts", [
    (0, [*range(100, 105), *range(200, 214)]),  # every window of a file that is long enough
    (8, [100, 200, 208])])  # every whole row
def test_batches_are_rows_or_windows_equally_often(length, starts):
    train = files_of((100, 112), (200, 221), (50, 53))
    data, n = in_memory(train, train, length), 1000 * len(starts)
    torch.manual_seed(0)
    x = data.batch(n, 8)
    assert x.shape == (n, 8) and x.dtype == torch.int64
    assert (x.diff(dim=1) == 1).all()  # neighbours of one file
    counts = torch.bincount(x[:, 0], minlength=256)
    assert counts.nonzero().flatten().tolist() == starts
    sd = (n * (1 / len(starts)) * (1 - 1 / len(starts))) ** 0.5
    assert (counts[starts] - 1000).abs().max() < 5 * sd


def test_held_out_is_always_the_same_and_without_overlap():
    val = files_of((0, 30), (100, 120))
    data = in_memory(val, val, 0)
    state = torch.get_rng_state()
    x = data.held_out(99, 8)
    assert sorted(x.tolist()) == [list(range(i, i + 8)) for i in (0, 8, 16, 100, 108)]
    assert torch.equal(data.held_out(3, 8), x[:3]) and torch.equal(state, torch.get_rng_state())
    rows = in_memory(val, val, 10)
    assert sorted(rows.held_out(99, 10)[:, 0].tolist()) == [0, 10, 20, 100, 110]


def test_framed_sequences_begin_and_end_with_an_end_token_and_are_else_as_before(folder):
    """Of a corpus made by the command with --framed: batch and held_out against those without."""
    with open("a.txt", "w", encoding="utf-8") as f:
        f.write("the quick brown fox\n" * 200)
    for name, flags in (("bare", []), ("framed", ["--framed"])):
        text.main(["a.txt", "--tokenizer", "bytes", "--out", name, *flags])
    bare, framed = corpus.load("bare"), corpus.load("framed")
    for read in (lambda data: data.batch(50, 16), lambda data: data.held_out(50, 16)):
        torch.manual_seed(0)
        theirs = read(bare)
        torch.manual_seed(0)
        ours = read(framed)
        assert (ours[:, [0, -1]] == 256).all() and not (theirs[:, 0] == 256).all()
        assert torch.equal(ours[:, 1:-1], theirs[:, 1:-1])
    net = types.SimpleNamespace(row_length=0, framed=True)
    framed.check_fits("a.pt", "bytes", net)
    for data, tokenizer, fault in ((framed, "gpt2", "bytes tokens for its gpt2"),
                                   (bare, "bytes", "no ends: make it with --framed")):
        with pytest.raises(ValueError, match=f"{data.folder} does not fit a.pt: it has {fault}"):
            data.check_fits("a.pt", tokenizer, net)
    net.framed = False
    with pytest.raises(ValueError, match="it has ends: make it without --framed"):
        framed.check_fits("a.pt", "bytes", net)
    net.row_length = 9
    with pytest.raises(ValueError, match="it has rows of another length"):
        bare.check_fits("a.pt", "bytes", net)


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_rows_are_texts_with_ends_behind_them_only(gpt2, tokenizer):
    texts = [f"{i} <|endoftext|> caf\xe9 {i}"[:i] for i in range(26)] + ["x" * 32]
    corpus.write_rows("c", texts, "text", tokenizer, 32, {})
    data = corpus.load("c")
    assert data.pad_id == 256 and data.val_texts == data.rows(data.val)
    for files in (data.train, data.val):
        rows = np.concatenate(files).reshape(-1, 32)
        for row, written in zip(rows.tolist(), data.rows(files)):
            ids = list(written.encode())
            assert row == ids + [256] * (32 - len(ids))
    assert sorted(data.rows(data.train) + data.val_texts) == sorted(texts)


def test_shares_of_lengths_by_hand():
    rows = [[7, 256, 256, 256], [7, 7, 7, 7], [7, 8, 256, 256], [0, 256, 256, 256]]
    files = [np.array(rows[:3], "<u2").reshape(-1), np.array(rows[3], "<u2")]
    shares = in_memory(files, files[:1], 4).length_shares(4)
    assert shares.dtype == torch.float32 and shares.tolist() == [0, 0.5, 0.25, 0, 0.25]
    packed = in_memory(files, files, 0)
    assert packed.pad_id == -1 and packed.length_shares(3).tolist() == [0, 0, 0, 1]


def test_too_little_for_one_sequence_is_said():
    data = in_memory(files_of((0, 30)), files_of((0, 5)), 0)
    with pytest.raises(ValueError, match="5 tokens .* sequence of 8"):
        data.held_out(1, 8)
    with pytest.raises(ValueError, match="30 tokens .* sequence of 31"):
        data.batch(1, 31)


def test_what_is_no_corpus_is_refused_with_what_to_do():
    for name, content, maker in (("a.txt", b"text", "text"), ("a.fasta", b">a\nM\n", "fasta"),
                                 ("b.FAS.gz", gzip.compress(b"\xef\xbb\xbf>a\nM"), "fasta"),
                                 ("c.gz", gzip.compress(b">" * 99)[:12], "text")):
        with open(name, "wb") as f:
            f.write(content)
        with pytest.raises(ValueError, match=f"python -m data.{maker} {name}"):
            corpus.load(name)
    with pytest.raises(ValueError, match="no corpus at 'none'.*data.text"):
        corpus.load("none")
    os.mkdir("empty")
    with pytest.raises(ValueError, match="no corpus at 'empty'"):
        corpus.load("empty")
    make()
    os.remove("c/val.bin")
    with pytest.raises(ValueError, match="no corpus at 'c'"):
        corpus.load("c")


META = {"maker": "text", "tokenizer": "bytes", "length": 0, "made_from": {}}


@pytest.mark.parametrize("content, word", [
    ("{", "no corpus"), ("\udcff", "no corpus"), ("[]", "no corpus"), ('{"maker": 1}', "no corpus"),
    (json.dumps(META | {"maker": "os"}), "maker"), (json.dumps(META | {"length": -1}), "length"),
    (json.dumps(META | {"framed": 1}), "maker"),
    (json.dumps(META | {"length": "1"}), "length"), (json.dumps(META | {"more": 1}), "no corpus")])
def test_a_damaged_meta_file_is_refused(content, word):
    make()
    with open("c/meta.json", "w", encoding="utf-8", errors="surrogateescape") as f:
        f.write(content)
    with pytest.raises(ValueError, match=word):
        corpus.load("c")


@pytest.mark.parametrize("head, size, word", [
    ((20240520, 1, 101), 100, "not as long"), ((20240520, 1, 99), 100, "not as long"),
    ((20240520, 1, -1), 100, "no tokens"), ((20240520, 1, 0), 0, "no tokens"),
    ((20240520, 2, 100), 100, "no tokens"), ((1, 1, 100), 100, "no tokens")])
def test_a_lying_header_is_refused(head, size, word):
    make()
    with open("c/val.bin", "wb") as f:
        f.write(struct.pack("<3i", *head) + bytes(1012) + bytes(2 * size))
    with pytest.raises(ValueError, match=f"val.bin.*{word}"):
        corpus.load("c")


def test_two_processes_make_one_corpus_whole():
    """Both write at the same time: each waits in the middle for the other."""
    def work(me):
        def pieces():
            yield "train", [me] * 1000
            open(f"started{me}", "w").close()
            while not os.path.exists(f"started{1 - me}"):
                time.sleep(0.01)
            yield "train", [me] * 1000
            yield "val", [me]
        assert make("c", pieces()) == {"train": 2000, "val": 1}
    children = [forked(lambda: work(0)), forked(lambda: work(1))]
    assert list(map(exit_code, children)) == [0, 0]
    assert len(tokens("c", "train")) == 2000
    assert set(tokens("c", "train")) == set(tokens("c", "val"))  # the two were not mixed
    assert sorted(os.listdir(".")) == ["c", "started0", "started1"]


@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_a_half_made_corpus_has_no_name(how):
    def pieces():
        yield "train", range(1000)
        yield "val", range(1000)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyboardInterrupt
    assert exit_code(forked(lambda: make("c", pieces()))) == {"kill": -9, "interrupt": 1}[how]
    left = os.listdir(".")
    assert all(name.endswith(".partial") for name in left) and len(left) == int(how == "kill")
    make()
    assert tokens("c", "train") == list(range(100))


def test_what_cannot_be_written_is_one_error():
    os.makedirs("c/other")  # no corpus, but something
    with pytest.raises(ValueError, match="'c' cannot be written"):
        make()
    with pytest.raises(ValueError, match="0 tokens to train and 3 to validate"):
        make("d", [("val", [1, 2, 3])])
    with pytest.raises(ValueError, match="'c' is there already"):
        corpus.refuse_existing("c")
    assert os.listdir(".") == ["c"] and os.listdir("c") == ["other"]


def test_a_full_disk_is_one_error():
    resource = pytest.importorskip("resource")

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with pytest.raises(ValueError, match="'c' cannot be written"):
            make("c", [("train", range(9999)), ("val", range(9))])
    assert exit_code(forked(work)) == 0 and os.listdir(".") == []


# ---------------------------------------------------------------------------------------- measures
def test_measures_by_hand():
    assert corpus.unigram_entropy("aabb") == pytest.approx(np.log(2))
    assert corpus.unigram_entropy("") == 0 and corpus.unigram_entropy([1, 1]) == 0
    assert corpus.ngrams(["abab", "b"], 2) == {("a", "b"): 2, ("b", "a"): 1}
    a, b = collections.Counter("aab"), collections.Counter("abbbcc")
    p, q = (torch.tensor([c[x] for x in "abc"]) / c.total() for c in (a, b))
    entropy = [Categorical(v).entropy() for v in ((p + q) / 2, p, q)]
    exact = entropy[0] - (entropy[1] + entropy[2]) / 2
    assert corpus.divergence(a, b) == pytest.approx(exact.item(), abs=1e-6)
    assert corpus.divergence(a, a) == 0
    assert corpus.divergence(a, collections.Counter()) == np.log(2)
    assert corpus.divergence(a, collections.Counter("x")) == pytest.approx(np.log(2))
    assert corpus.ks([1, 2, 3, 4], [3, 4, 5, 6]) == 0.5 and corpus.ks([2, 1], [1, 2]) == 0
    assert corpus.ks([1], [2]) == 1
    assert corpus.entropy(collections.Counter("aabb")) == pytest.approx(np.log(2))
    assert corpus.entropy(collections.Counter()) == 0


def test_divergence_is_the_same_number_whatever_the_hashes():
    """Those of strings differ from process to process, and with them the order of a set."""
    class Other(int):
        def __hash__(self):
            return hash(f"{int(self)}")
    counts = np.random.default_rng(0).integers(1, 99, (2, 300)).tolist()
    found = {corpus.divergence(*(collections.Counter(dict(zip(map(kind, range(300)), part)))
                                 for part in counts)) for kind in (int, Other)}
    assert len(found) == 1


def test_total_variation_by_hand():
    a, b = collections.Counter("aab"), collections.Counter("abbbcc")
    assert corpus.total_variation(a, b) == pytest.approx((3 / 6 + 1 / 6 + 2 / 6) / 2)
    assert corpus.total_variation(a, collections.Counter("aab" * 9)) == 0
    assert corpus.total_variation(a, collections.Counter("x")) == 1


def test_post_stratified_by_hand():
    """Cell a is good in 1 of 2, b in 1 of 1, c isn't theirs, d has no text."""
    theirs = collections.Counter({"a": 5, "b": 2, "d": 3})
    good = [True, False, True, True]
    assert corpus.post_stratified(good, list("aabc"), theirs) == pytest.approx(0.5 * 0.5 + 0.2)
    same = collections.Counter("aabc")
    assert corpus.post_stratified(good, list("aabc"), same) == pytest.approx(3 / 4)


N, REAL = 500, 20  # samples, and draws of so many real ones, whose spread says what is far


def caught(bad, real, name):
    """Is this measure far outside of what as many real samples get?"""
    values = [q[name] for q in real]
    return abs(bad[name] - np.mean(values)) > 0.02 + 7 * np.std(values)


def test_far_is_far():
    real = [{"m": value} for value in (0.4, 0.6)]  # mean .5, standard deviation .1
    assert caught({"m": 1.23}, real, "m") and caught({"m": -0.23}, real, "m")
    assert not caught({"m": 1.21}, real, "m") and not caught({"m": 0.5}, real, "m")


# -------------------------------------------------------------------------------------- signatures
def test_signatures_are_found_on_this_machine():
    found = signatures.find_signatures(48)
    assert len(found) > 15000 and found == sorted(set(found))
    form = re.compile(r"def (?!test)\w+\(.*\).*:", re.ASCII)
    assert all(form.fullmatch(s) and len(s) < 48 and s.isascii() for s in found)
    assert all(map(signatures.is_signature, found[::50]))


@pytest.mark.parametrize("line", ["def f(:", "def f(x) return:", "x = 1", "def f():pass\ndef g():",
                                  "", "def f(\0):", "class A:", "def f(x)", "def 1f():"])
def test_what_is_no_signature(line):
    assert not signatures.is_signature(line) and signatures.is_signature("def f(x):")


def test_the_default_corpus_makes_itself_and_the_split_is_by_line(lines):
    data = corpus.load(corpus.DEFAULT)
    val = {s for s in lines if zlib.crc32(s.encode()) % 20 == 0}
    assert data.length == 48 and not data.packed and set(data.rows(data.val)) == val
    assert data.known == set(lines) - val and sorted(data.val_lengths) == sorted(map(len, val))
    ordered = [s for s in lines if s not in val]
    rows = [list(s.encode()) + [256] * (48 - len(s)) for s in ordered]
    assert data.train[0].reshape(-1, 48).tolist() == rows
    assert set(data.made_from) == {"python", "torch", "numpy"}


def test_signatures_main(lines, capsys):
    assert not signatures.main(["--out", "s", "--length", "30"])
    out = capsys.readouterr().out
    assert out.splitlines()[-1].endswith("python train_teacher.py --data s")
    counts = [int(n) for n in re.findall(r"(\d+) (?:lines )?to", out)]
    assert sum(counts) == len(lines) and corpus.load("s").length == 30
    refused(signatures.main, ["--out", "s"], capsys, "'s'", "--out")


def test_signatures_of_samples(lines):
    tokenizer = corpus.make_tokenizer("bytes")
    assert tokenizer.n_vocab == 257 and tokenizer.eot_token == 256
    texts = [LINES[1], "def g():", "def g():", "nonsense", ""]
    x = torch.from_numpy(corpus.encode(texts, "bytes", 48).astype(int)).view(5, 48)
    data = corpus.load(corpus.DEFAULT)
    assert data.decode(x) == texts and LINES[1] in data.known
    q = data.quality(x)
    assert (q["valid"], q["distinct"], q["novel"]) == (0.6, 0.8, 0.8)
    lengths = torch.tensor([len(LINES[1]), 8, 8, 8, 0]).double()
    assert q["length"] == pytest.approx(lengths.mean().item())
    assert q["length_sd"] == pytest.approx(lengths.std(correction=0).item())
    counts = [torch.tensor(list(collections.Counter(s).values())).float() for s in texts[:4]]
    exact = sum(Categorical(c).entropy().item() for c in counts) / 5
    assert q["entropy"] == pytest.approx(exact, abs=1e-5)
    assert data.shown(x) == {name: q[name] for name in ("valid", "post", "tv", "js3")}


@pytest.mark.parametrize("line, kind, features", [
    ("def f():", (False, False), (False, False, False, False, 0, False)),
    ("def f(a, *b):", (False, False), (False, False, False, False, 1, False)),
    ("def f(self, *a: int, b=1) -> X:", (True, True), (True, True, True, True, 2, True)),
    ("def f(a,b,c,d) -> x:", (True, False), (True, False, False, False, 2, False)),
    ("def f(**k : x):", (False, True), (False, False, True, False, 0, False)),
    ("def f(a=1):", (False, True), (False, True, False, False, 0, False))])
def test_features_of_a_signature(line, kind, features):
    assert signatures.kind(line) == kind and signatures.features(line) == features


def of_lines(train, val):
    """A corpus of these signatures, in memory, and its quality as a function of texts."""
    rows = [[corpus.encode(texts, "bytes", 48)] for texts in (train, val)]
    data = corpus.Corpus("c", "signatures", "bytes", 48, {}, *rows)

    def quality(texts):
        x = corpus.encode(texts, "bytes", 48).astype(int).reshape(-1, 48)
        return data.quality(torch.from_numpy(x))
    return quality


def test_signatures_beside_validation_lines_by_hand():
    val = ["def a(x) -> int:", "def b(x=1):", "def c(x):", "def d(y):"]
    quality = of_lines(["def known():"], val)
    q = quality(["def c(z):", "def c(z))", "def e(x=2):", "def e(x=:"])
    assert q["valid"] == 0.5  # (z)) and (x=: are no Python
    assert q["post"] == 0.5 * 0.5 + 0.25 * 0.5 + 0.25 * 0  # plain, with a default, no ->
    assert q["tv"] == 0.25  # a quarter has = instead of ->
    assert (q["returns"], q["hints"], q["methods"], q["novel"]) == (0, 0, 0, 1)
    assert q["ks"] == 0.25  # three of ours have 9 characters, two of theirs
    assert q["rare"] == pytest.approx(3 / 38 * 45)  # z, z and 2: counted as one of their 45
    same = quality(val)
    names = ("valid", "post", "tv", "js3", "ks", "returns", "rare")
    assert [same[name] for name in names] == [1, 1, 0, 0, 0, 0.25, 1]
    q = of_lines(["def known():"], [f"def {'m' * 30}(a{i}):" for i in range(10)])(["def m(a7):"])
    assert q["rare"] == pytest.approx(39 / 10)  # digits are each one in 390 of theirs
    q = quality(["def known():", "def m(self):", "def m(self, a: int):", "def h(a: int):"])
    assert (q["novel"], q["methods"], q["hints"]) == (0.75, 0.5, 0.5)


def people(n):
    """n unique signatures as people might write them."""
    rng, found = np.random.default_rng(0), {}
    syllables = ["".join(pair) for pair in itertools.product("bdfklmnprst", "aeiou")]
    verbs = ["get", "set", "make", "is", "load", "run", "read", "find"]
    while len(found) < n:
        words = ["".join(rng.choice(syllables, rng.integers(1, 3))) for _ in range(3)]
        last = words[1] + rng.choice(["", "=1", "=None", ": int"])
        arguments = [rng.choice(["", "self"]), rng.choice(["", words[2]]), last]
        arguments, end = ", ".join(filter(None, arguments)), rng.choice([":", ":", " -> str:"])
        line = f"def {rng.choice(verbs)}_{words[0]}({arguments}){end}"
        found[line] = len(line) < 48
    return [line for line, fits in found.items() if fits]


def noise(texts):
    """Texts of the same lengths, of random characters."""
    letters = np.random.default_rng(1).integers(32, 127, (len(texts), 48))
    return ["".join(map(chr, row[:len(s)])) for row, s in zip(letters.tolist(), texts)]


BAD_LINES = {  # name: (sampler of real lines, what catches it, what doesn't)
    "one line": (lambda lines: lines[:1] * N, ("distinct", "ks", "js3", "tv", "post"), ["valid"]),
    "one length": (lambda lines: [s for s in lines if len(s) == 28], ["ks"], ["valid", "length"]),
    "one word": (lambda lines: [s for s in lines if s[4:8] == "get_"], ["js3"], ["valid", "tv"]),
    "no ->": (lambda lines: [s for s in lines if "->" not in s], ("tv", "post"),
              ["valid", "distinct"]),
    "no rare letter": (lambda lines: [s for s in lines if "g" not in s], ["rare"],
                       ["valid", "ks", "distinct", "tv"]),
    "noise": (noise, ("valid", "post", "tv", "js3"), ["ks", "distinct"])}


def test_bad_samplers_of_signatures_are_caught():
    lines = people(6000)
    train, val = lines[1000:], lines[:1000]
    quality, rng = of_lines(train, val), np.random.default_rng(2)
    real = [quality(rng.permutation(train)[:N].tolist()) for _ in range(REAL)]
    fresh = quality(rng.permutation(train)[:N].tolist())
    assert not any(caught(fresh, real, name) for name in fresh)
    for what, (sampler, names, blind) in BAD_LINES.items():
        bad = quality(sampler(train)[:N])
        assert all(caught(bad, real, name) for name in names), (what, bad, fresh)
        assert not any(caught(bad, real, name) for name in blind), (what, bad, fresh)


# ---------------------------------------------------------------------------------------- proteins
FASTA = ("; a comment\n>one first\nMKVL\nWAAG*\n\n>two\nmkvlbzuj\n>empty\n"
         ">same as one\nMKVLWAAG\n").encode()
STOP = b">stop\nMK*\n*\n"


@pytest.mark.parametrize("name, pack", [("p.fasta", bytes), ("p.fa.gz", gzip.compress),
                                        ("p.xz", lzma.compress), ("p.PEP", bytes), ("p", bytes)])
def test_fasta_in_all_its_forms(folder, name, pack):
    for content in (FASTA, b"\xef\xbb\xbf" + FASTA, FASTA.replace(b"\n", b"\r\n"),
                    FASTA.replace(b"first", "caf\xe9".encode("latin-1")),
                    FASTA.replace(b"first", "\u03b2-lactamase\u2028".encode())):
        (folder / name).write_bytes(pack(content))
        assert fasta.read_fasta(name) == (["MKVLWAAG", "MKVLXXXX"], set("MKVLWAGBZUJ"))
    (folder / name).write_bytes(pack(STOP))
    assert fasta.read_fasta(name)[0] == ["MK"]


def test_tokens_of_proteins():
    tokenizer = corpus.make_tokenizer("protein")
    x = torch.from_numpy(corpus.encode(["MKVLXXXX", "ACDEFGHIKL"], "protein", 10).astype(int))
    assert tokenizer.n_vocab == 22 and x[8:].tolist() == [21, 21, *range(10)]
    assert corpus.decode(x.view(2, 10), "protein", False) == ["MKVLXXXX", "ACDEFGHIKL"]
    with pytest.raises(ValueError, match="'dna'.*protein"):
        corpus.make_tokenizer("dna")


@pytest.mark.parametrize("content, word", [
    ("hello\n>x\nACD", "line 1"), (">x\nACD\nAC-D", "line 3"), (">x\nAC1", "line 2"),
    (">x\n\xe9", "line 2"), ("*", "line 1"), ("", "0 tokens"), (">x\nA", "tokens")])
def test_what_is_no_fasta_is_named_by_its_line(folder, capsys, content, word):
    (folder / "p.fasta").write_text(content, encoding="utf-8")
    refused(fasta.main, ["p.fasta"], capsys, "p.fasta", word)
    assert not os.path.exists("out/p")


def test_broken_files_are_refused(folder, capsys):
    (folder / "p.gz").write_bytes(gzip.compress(FASTA * 99)[:60])  # cut off
    (folder / "p.xz").write_bytes(lzma.compress(FASTA * 99)[:60])
    for name in ("p.gz", "p.xz", "none.fasta", "."):
        refused(fasta.main, [name, "--out", "o"], capsys, name)


def write_proteins(path, n=120):
    torch.manual_seed(0)
    texts = []
    for length in torch.randint(8, 32, (n,)).tolist():
        ids = torch.randint(20, (length,)).tolist()
        texts.append("".join(corpus.AMINO_ACIDS[i] for i in ids))
    path.write_text("".join(f">{s}\n{s}\n" for s in texts), encoding="utf-8")
    return texts


def test_long_sequences_are_dropped_or_cropped_and_counted(folder, capsys):
    texts = write_proteins(folder / "p.FASTA")
    fit = {s for s in texts if len(s) <= 24}
    for long, kept in (("drop", fit), ("crop", {s[:24] for s in texts})):
        assert not fasta.main(["p.FASTA", "--length", "24", "--long", long, "--out", long])
        data, out = corpus.load(long), capsys.readouterr()
        val = {s for s in kept if zlib.crc32(s.encode()) % 20 == 0}
        assert set(data.rows(data.val)) == val and data.known == kept - val
        counts = f"{len(texts)} unique sequences, {len(texts) - len(fit)} of them longer than 24"
        assert f"{counts}: {long}ped, {len(kept)} left" in out.out and not out.err
        assert out.out.endswith(f"python train_teacher.py --data {long}\n")
        assert (data.tokenizer, data.length) == ("protein", 24)


def test_dna_is_warned_of(folder, capsys):
    records = [f">{i}\nACGT{'acgtn'[i % 5] * (i // 5 + 1)}\n" for i in range(60)]
    (folder / "genome.fna").write_text("".join(records), encoding="utf-8")
    assert not fasta.main(["genome.fna"])
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("warning: genome.fna") and " ACGNT:" in err
    assert corpus.load("out/genome").tokenizer == "protein"


def test_scripts_run_where_the_locale_knows_ascii_only(folder):
    """As `python -m`, with a name and a header beyond ASCII."""
    write_proteins(folder / "caf\xe9.fasta")
    with open("caf\xe9.fasta", "ab") as f:
        f.write(">\u03b2\nMKVL\n".encode())
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
                        "PYTHONPATH": HERE}
    done = subprocess.run([sys.executable, "-m", "data.fasta", "caf\xe9.fasta"], env=env,
                          capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert corpus.load("out/caf\xe9").made_from["path"].startswith("caf")


def composition(letters):
    """The distribution of the amino acids in them."""
    return Categorical(torch.tensor([letters.count(c) for c in corpus.AMINO_ACIDS]).float())


def test_protein_metrics_by_hand():
    val, known = ["ACDEFGHIKL", "ACDEF", "MNPQRSTVWY"], ["ACDEFGHIKLMNPQ", "WWWWWYYYYY"]
    rows = [corpus.encode(texts, "protein", 20) for texts in (known, val)]
    data = corpus.Corpus("c", "fasta", "protein", 20, {}, rows[:1], rows[1:])

    def quality(*texts):
        x = corpus.encode(texts, "protein", 20).astype(int).reshape(-1, 20)
        return data.quality(torch.from_numpy(x))
    same = quality(*val)
    assert same["ks"] == same["js1"] == same["js2"] == 0 and same["length"] == 25 / 3
    assert same["distinct"] == 1 and same["low"] == 0
    q = quality("ACDEFGHI", "A" * 16)
    assert q["ks"] == 0.5  # up to 10 lie all of the validation lengths, and half of ours (8, 16)
    p, r = composition("ACDEFGHI" + "A" * 16), composition("".join(val))
    mean = Categorical(p.probs / 2 + r.probs / 2)
    exact = mean.entropy() - p.entropy() / 2 - r.entropy() / 2
    assert q["js1"] == pytest.approx(exact.item(), abs=1e-5) and q["js2"] > q["js1"]
    assert q["novel"] == q["low"] == 0.5  # one is part of a training sequence, A.. is simple
    assert q["entropy"] == pytest.approx(np.log(8) / 2)
    assert quality("ACDEFGHMNMM")["novel"] == 1  # three of seven 5-mers are in a training sequence
    assert quality("ACDEFY")["novel"] == 0  # one of two
    assert quality("ACDEACDEACDE", "ACDEFGACDEFG")["low"] == 0.5  # 2 and 2.6 bits
    assert quality("", "")["js2"] == np.log(2) and quality("", "A")["distinct"] == 1
    x = torch.zeros(1, 20, dtype=int)
    assert set(data.shown(x)) == {"entropy", "length", "ks", "js2"}


# -------------------------------------------------------------------------------------------- text
@pytest.mark.parametrize("name, pack", [("a.txt", bytes), ("a.txt.gz", gzip.compress),
                                        ("a.xz", lzma.compress), ("a.log", bytes)])
def test_text_becomes_packed_tokens(folder, gpt2, monkeypatch, capsys, name, pack):
    monkeypatch.setattr(text, "SMALL", 1000)  # bytes: so it is a large file
    monkeypatch.setattr(text, "GROUP", 7)
    (folder / name).write_bytes(pack(b"\xef\xbb\xbf" + TEXT.encode()))
    assert not text.main([name])
    train = [doc for number, doc in enumerate(DOCUMENTS) if number % 200]
    assert tokens("out/a", "train") == sum(train, [])
    assert tokens("out/a", "val") == sum(DOCUMENTS[::200], [])
    data, shown = corpus.load("out/a"), capsys.readouterr()
    assert (data.maker, data.tokenizer, data.length) == ("text", "gpt2", 0)
    assert shown.out.endswith("python train_teacher.py --data out/a\n") and "token/s" in shown.err
    x = torch.tensor(DOCUMENTS[0])[None]
    assert data.decode(x) == ["Article 0.\nIt says 0, caf\xe9.\n<|endoftext|>"]


@pytest.mark.parametrize("content", ["x" * 30000, "word " * 100, "one\ntwo\n" * 2000,
                                     "a\n<|endoftext|>\nb\n", "one\n<|endoftext|>\n" * 30])
def test_a_small_file_is_in_both_splits(folder, gpt2, content):
    (folder / "a.txt").write_text(content, encoding="utf-8")
    counts = text.prepare("a.txt", "c")
    share = counts["val"] / counts.total()
    both = bytes(t for t in tokens("c", "val") + tokens("c", "train") if t < 256).decode()
    assert sorted(both) == sorted(content.replace("<|endoftext|>\n", ""))
    assert 0.02 < share < 0.2 or len(content) < 100


def test_long_documents_come_in_pieces_and_folders_whole(folder, gpt2):
    (folder / "d/e").mkdir(parents=True)
    (folder / "d/1.txt").write_text("x" * 200000 + "\n<|endoftext|>\n\xe9\n", encoding="utf-8")
    (folder / "d/e/2.txt.gz").write_bytes(gzip.compress(b"second\n"))
    (folder / "d/notes.md").write_text("not a text", encoding="utf-8")
    pieces = list(text.documents(text.text_files("d")))
    whole = "".join(piece + "|" * end for piece, end in pieces)
    assert whole == "x" * 200000 + "\n|\xe9\n|second\n|"
    assert len(pieces) > 4 and max(len(piece) for piece, _ in pieces) < 1 << 18
    assert not text.main(["d/"])
    assert len(tokens("out/d", "train") + tokens("out/d", "val")) == 200000 + 1 + 3 + 7 + 3


def test_ready_made_shards(folder, gpt2, capsys):
    for name, span in (("x_val_000000", (0, 30)), ("x_train_000001", (100, 112)),
                       ("x_train_000002", (200, 221))):
        make(name, [("train", range(*span)), ("val", [1])])
        (folder / "fineweb").mkdir(exist_ok=True)
        os.rename(f"{name}/train.bin", f"fineweb/{name}.bin")
    assert not text.main(["fineweb"])
    assert tokens("out/fineweb", "val") == list(range(30))
    assert tokens("out/fineweb", "train") == [*range(100, 112), *range(200, 221)]
    make("large", [("train", [257]), ("val", [1])])
    refused(text.main, ["large", "--out", "o"], capsys, "large/train.bin", "257")
    assert not os.path.exists("o")


@pytest.mark.parametrize("name, content, word", [
    ("a.txt", b"caf\xe9 au lait", "UTF-8"), ("a.txt", b"", "0 tokens"),
    ("a.txt", b"short", "a.txt"),
    ("a.txt.gz", gzip.compress(b"hello " * 999)[:50], "a.txt.gz"), ("none.txt", None, "none.txt"),
    ("a.xz", b"\xfd7zXZ\0no", "a.xz"), ("b/x_val.bin", b"x" * 2000, "llm.c"),
    ("b/x.md", b"no text", ".txt"),
    ("p.txt", FASTA[FASTA.index(b">"):], "python -m data.fasta p.txt"),
    ("p.xz", lzma.compress(b"\xef\xbb\xbf>a\nMK\n"), "python -m data.fasta p.xz")])
def test_text_that_cannot_be_used_is_refused(folder, gpt2, capsys, name, content, word):
    if content is not None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    refused(text.main, [name.split("/")[0], "--out", "out/o"], capsys, word)
    assert not os.path.exists("out/o") and not list(folder.glob("**/*.partial"))


def test_text_as_bytes(folder, monkeypatch, capsys):
    monkeypatch.setattr(text, "SMALL", 1000)
    (folder / "a.txt").write_text(TEXT, encoding="utf-8")
    assert not text.main(["a.txt", "--tokenizer", "bytes"])
    data = corpus.load("out/a")
    assert (data.maker, data.tokenizer, data.length) == ("text", "bytes", 0)
    assert tokens("out/a", "val") == sum(DOCUMENTS[::200], [])
    everything = "".join(map(chr, range(300))) + "\u20ac \U0001f600 <|endoftext|> \r\n"
    tokenizer = corpus.make_tokenizer("bytes")
    ids = tokenizer.encode_ordinary(everything)
    assert text.encode_batch([everything, ""], "bytes") == [ids, []]
    make("shards")
    refused(text.main, ["shards", "--tokenizer", "bytes", "--out", "o"], capsys, "GPT-2")
    assert not os.path.exists("o")


def test_a_passage_may_begin_and_end_within_a_character():
    x = torch.tensor([list("\xe9tt\xe9".encode())[1:-1], list("\u20ac".encode()) + [256]])
    data = in_memory([x.flatten().numpy().astype("<u2")] * 2, [x[1].numpy().astype("<u2")], 0)
    assert data.decode(x) == ["\ufffdtt\ufffd", "\u20ac<|endoftext|>"] and data.quality(x)


def of_passages(*passages):
    """Passages of the same length -> (B, L) bytes."""
    return torch.tensor([list(passage.encode()) for passage in passages])


def test_measures_within_text_by_hand():
    assert text.repeated([1, 2, 3, 4, 1, 2, 3, 4]) == 1 / 5  # 1234 is there again
    assert text.repeated("aaaaaa") == 2 / 3 and text.repeated("abc") == 0
    common = {"he", "is"}
    assert text.traits("He is 12.5. Is he? \u201cNO!\u201d", common) == (3, 4, 1 / 5, 4, 3, 2)
    assert text.traits('a.b, "Go." 7', common) == (1, 1, 1, 1, 1, 2)
    assert text.traits("", common) == (0, 0, 0, 0, 0, 0)
    values = np.array([[0, 2, 0.5], [1, 3, 0.6], [0, 1, 0.1], [0, 3, 0.6]])
    cells = text.cells(values, np.array([0, 2, 0.5]))
    assert cells == {(False, False, False): 2, (True, True, True): 1, (False, True, True): 1}


def test_measures_of_text_beside_validation_passages_by_hand(monkeypatch):
    monkeypatch.setattr(text, "COMMON", 3)
    train = of_passages("it is it was", "was it is it")
    val = of_passages("Go. Do. 4 ab", "the end was ", '"No." it is ')
    files = [[x.numpy().astype("<u2").reshape(-1)] for x in (train, val)]
    data = in_memory(*files, 0)
    assert text.common_words(data, 12) == {"it", "is", "was"}
    cuts, cells, ngrams = text.real(data, 12)  # rare words: all, two thirds and a third
    assert cuts.tolist() == [1, 1, pytest.approx(2 / 3), 0, 0, 0]
    no, yes = (False,) * 3, (True,) * 3
    assert cells == {(*yes, True, True, False): 1, (*no, *no): 1, (*no, True, False, True): 1}
    x = of_passages("the end was ", 'IS. is? 7 "x')
    q = data.quality(x)
    assert q["tv"] == pytest.approx((1 / 6 + 1 / 2 + 1 / 3 + 1 / 3) / 2)
    assert q["distinct"] == 1 and q["rep4"] == 0 and ngrams.total() == 30
    assert q["js3"] == pytest.approx(corpus.divergence(corpus.ngrams(x.tolist(), 3), ngrams))
    assert data.quality(val)["js3"] == data.quality(val)["tv"] == 0
    x = torch.tensor([[97, 97, 98, 98] * 3, [99] * 12, [99] * 12])
    q = data.quality(x)
    assert q["distinct"] == 2 / 3 and q["entropy"] == pytest.approx(np.log(2) / 3)
    pairs = torch.tensor([3, 3, 3, 2, 22])  # aa, ab, bb, ba of 11, and cc
    assert q["bigram"] == pytest.approx(Categorical(pairs / 33).entropy().item(), abs=1e-5)
    assert q["rep4"] == pytest.approx((5 / 9 + 8 / 9 + 8 / 9) / 3)
    assert q["js3"] == pytest.approx(np.log(2))
    assert data.shown(x) == {name: q[name] for name in ("entropy", "tv", "js3", "rep4")}


def articles(n):
    """n documents of sentences, with frequent and rare words, numbers and quotes."""
    rng = np.random.default_rng(0)
    letters = rng.choice(list("etaoinshrdlu"), (3000, 8))
    words = ["".join(row[:2 + i % 7]) for i, row in enumerate(letters)]
    share = 1 / np.arange(1, 3001)
    drawn = iter(rng.choice(words, n * 100, p=share / share.sum()).tolist())
    documents = []
    for _ in range(n):
        sentences = []
        for size in rng.integers(4, 12, 8).tolist():
            sentence = " ".join(itertools.islice(drawn, size)).capitalize()
            form = rng.choice(["{}.", "{}.", "{}.", '"{}!"', "{} {n}.", "{n}: {}."])
            sentences.append(form.format(sentence, n=rng.integers(2000)))
        documents.append(" ".join(sentences) + "\n<|endoftext|>\n")
    return "".join(documents)


def only(x, low, high, instead):
    """x (B, L) with other tokens for those from low to high."""
    return torch.where((x >= ord(low)) & (x <= ord(high)), instead, x)


BAD_TEXT = {  # name: (what it makes of real passages, what catches it, what doesn't)
    "one passage": (lambda x: x[:1].expand_as(x), ("distinct", "bigram", "js3", "tv"), ["entropy"]),
    "repeated words": (lambda x: x[:, :32].repeat(1, 4), ["rep4"], ["distinct"]),
    "no capitals": (lambda x: only(x, "A", "Z", x + 32), ["tv"], ["distinct", "rep4"]),
    "no digits": (lambda x: only(x, "0", "9", ord("e")), ["tv"], ["distinct", "rep4"]),
    "shuffled": (lambda x: x[:, torch.randperm(128)], ("js3", "bigram"), ["entropy", "distinct"])}


def test_bad_samplers_of_text_are_caught(folder, capsys):
    (folder / "a.txt").write_text(articles(2500), encoding="utf-8")
    text.prepare("a.txt", "c", "bytes")
    data = corpus.load("c")
    torch.manual_seed(0)
    real = [data.quality(data.batch(N, 128)) for _ in range(REAL)]
    x = data.batch(N, 128)
    fresh = data.quality(x)
    assert not any(caught(fresh, real, name) for name in fresh)
    for what, (worsen, names, blind) in BAD_TEXT.items():
        bad = data.quality(worsen(x))
        assert all(caught(bad, real, name) for name in names), (what, bad, fresh)
        assert not any(caught(bad, real, name) for name in blind), (what, bad, fresh)
    assert data.quality(BAD_TEXT["shuffled"][0](x))["entropy"] == pytest.approx(fresh["entropy"])


def test_gpt2s_tokens_that_cannot_be_had(folder, gpt2, monkeypatch, capsys):
    def offline(name):
        raise ConnectionError("no network")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    (folder / "a.txt").write_text(TEXT, encoding="utf-8")
    source = inspect.getsource(openai_public.gpt2)
    for file in ("vocab.bpe", "encoder.json"):
        address = re.search(rf'"(https://\S+/{file})"', source)[1]
        name = hashlib.sha1(address.encode()).hexdigest()  # as tiktoken/load.py calls its copy
        refused(text.main, ["a.txt"], capsys, "TIKTOKEN_CACHE_DIR", f"{file} named {name}")
        with open(os.path.join(HERE, "data/README.md"), encoding="utf-8") as f:
            assert name in f.read()
    make()
    meta = (folder / "c/meta.json").read_text().replace('"bytes"', '"gpt2"')
    (folder / "c/meta.json").write_text(meta)
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR"):  # before anything is trained on it
        corpus.load("c")


def test_gpt2s_tokens_if_they_are_on_this_machine(folder):
    names = [os.path.join(os.environ.get("TIKTOKEN_CACHE_DIR", ""), sha1)
             for sha1 in corpus.GPT2_FILES.values()]
    if not all(map(os.path.exists, names)):
        pytest.skip("TIKTOKEN_CACHE_DIR has no files of GPT-2")
    corpus.make_tokenizer.cache_clear()
    (folder / "a.txt").write_text("hello world\n<|endoftext|>\n" * 40, encoding="utf-8")
    text.prepare("a.txt", "c")
    assert tokens("c", "val") == [31373, 995, 198, 50256] * 2  # "hello", " world", newline, end
    assert tokens("c", "train") == [31373, 995, 198, 50256] * 38


# ------------------------------------------------------------------------------------- openwebtext
def tar(members, mode):
    """A tar in memory of {name: content}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as f:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            f.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def pages(k, j):
    """120 texts, under names that must not be unpacked."""
    return {f"../../{i}.txt": f"text {k}.{j}.{i} and some more".encode() for i in range(120)}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files`; `cut` bytes of them at most, with or without their length."""
    files, served, cut, says_length = {}, [], None, True

    def do_GET(self):
        body, first = self.files[self.path], int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.served.append((self.path[-6:], first))
        if first >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response({True: 206, False: 200}[first > 0])
        if self.says_length:
            self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        self.wfile.write(body[first:self.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(gpt2, monkeypatch):
    """Two tars of xz-compressed tars of texts, as in the data set, served on loopback."""
    files = {}
    for k in range(2):
        inner = {f"{j}_data.xz": tar(pages(k, j), "w:xz") for j in range(3)}
        files[f"/subset{k:02d}.tar"] = tar(inner | {"readme": b"no archive"}, "w")
    handler = type("Handler", (Handler,), {"files": files, "served": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/subset{{:02d}}.tar"
    monkeypatch.setattr(openwebtext, "URL", url)
    monkeypatch.setattr(openwebtext, "SHARDS", 2)
    yield handler
    server.shutdown()
    server.server_close()


def test_openwebtext_is_streamed_and_a_broken_download_goes_on(folder, server, capsys):
    flags = ["--shards", "1", "--out", "one"]
    server.cut = 700
    refused(openwebtext.main, flags, capsys, "subset00.tar", "run again")
    server.cut = None
    assert not openwebtext.main(flags)
    assert server.served == [("00.tar", 0), ("00.tar", 700)]
    assert not list(folder.glob("**/*.txt")) and not list(folder.glob("**/*.partial"))
    served = itertools.chain.from_iterable(pages(0, j).values() for j in range(3))
    docs = [list(page) + [256] for page in served]
    train = sum(docs[1:200] + docs[201:], [])
    assert tokens("one", "train") == train and tokens("one", "val") == docs[0] + docs[200]
    assert corpus.load("one").maker == "text" and not corpus.load("one").framed
    assert not openwebtext.main([]) and server.served[2:] == [("01.tar", 0)]  # 00 is there
    assert tokens("out/openwebtext", "train")[:len(train)] == train
    refused(openwebtext.main, [], capsys, "out/openwebtext", "--out")


def test_openwebtext_from_a_server_that_says_no_length(server):
    server.says_length = False
    assert not openwebtext.main(["--shards", "1", "--framed"])
    assert len(tokens("out/openwebtext", "val")) > 0 and corpus.load("out/openwebtext").framed


def test_a_download_that_is_all_there_or_too_long(server):
    url = openwebtext.URL.format(1)
    content = server.files["/subset01.tar"]
    with open("t.partial", "wb") as f:
        f.write(content)  # killed between the last byte and the renaming: nothing is left to fetch
    openwebtext.download(url, "t")
    with open("t", "rb") as f:
        assert f.read() == content
    with open("u.partial", "wb") as f:
        f.write(content + b"too much")
    with pytest.raises(ValueError, match="subset01.tar cannot be fetched"):
        openwebtext.download(url, "u")
    assert not os.path.exists("u")


def test_damaged_tars_and_no_network(folder, gpt2, monkeypatch, capsys):
    monkeypatch.setattr(openwebtext, "URL", "http://127.0.0.1:9/subset{:02d}.tar")
    refused(openwebtext.main, [], capsys, "put the file at", "subset00.tar")
    whole = tar({"0.xz": tar(pages(0, 0), "w:xz")}, "w")
    for content in (b"no tar" * 500, whole.replace(b"\xfd7zXZ\0", b"\xfd7zXZ\1"), whole[:-11000]):
        (folder / "out/downloads/subset00.tar").write_bytes(content)
        refused(openwebtext.main, ["--shards", "1"], capsys, "subset00.tar is damaged")
    assert os.listdir("out") == ["downloads"]
