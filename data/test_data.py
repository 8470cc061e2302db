"""test_data.py - corpora and measures against answers known, or computed in another way.

    python -m pytest -q data/test_data.py

No network: bytes replace GPT-2's tokens, and a server on loopback replaces OpenWebText's.
"""
import dataclasses
import gzip
import http.server
import itertools
import lzma
import math
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import struct
import threading
import zlib

import numpy as np
import pytest
import torch

from data import corpus, fasta, openwebtext, quality, signatures, text

FORK = multiprocessing.get_context("fork")
END = "<|endoftext|>\n"
FASTA = b"; a comment\r\n>\xe9 one\nMKVL\nWAAG*\n\n>two\nmkvlbzuj\n>empty\n>again\nMKVLWAAG\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Run every test in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def gpt2(monkeypatch):
    """Replace GPT-2's tokens, which would have to be downloaded, by bytes."""
    tokenizer = corpus.make_tokenizer("bytes")
    monkeypatch.setattr(corpus, "make_tokenizer", lambda name: tokenizer)


def make(folder, pieces):
    """Write a corpus of packed bytes from (split, tokens) pairs."""
    corpus.write(folder, pieces, "text", "bytes", 0, {})


def start(pieces):
    """Return a process that writes a corpus of these pieces."""
    process = FORK.Process(target=make, args=("c", pieces))
    process.start()
    return process


def tokens(folder, split):
    """Return all tokens of a split, a list."""
    return np.concatenate(getattr(corpus.load(folder), split)).tolist()


def in_memory(train, val, length=0, maker="text", tokenizer="bytes"):
    """Return a corpus of lists of tokens, one list per file."""
    files = [[np.array(ids, "<u2") for ids in split] for split in (train, val)]
    return corpus.Corpus("c", maker, tokenizer, length, {}, *files)


def of_rows(train, val, maker="signatures", tokenizer="bytes"):
    """Return a corpus of rows of 48 tokens with these texts."""
    files = [[corpus.encode(texts, tokenizer, 48)] for texts in (train, val)]
    return in_memory(*files, 48, maker, tokenizer)


def measure(texts, data):
    """Return the quality of these texts as samples."""
    rows = corpus.encode(texts, data.tokenizer, 48).reshape(-1, 48)
    return quality.quality(torch.from_numpy(rows.astype(int)), data)


# --------------------------------------------------------------------------------- a corpus folder
def test_the_files_are_in_the_format_of_llm_c(folder):
    make("c", [("train", range(100)), ("val", range(50))])

    content = (folder / "c/train.bin").read_bytes()
    assert content[:1024] == struct.pack("<256i", 20240520, 1, 100, *[0] * 253)
    assert content[1024:] == struct.pack("<100H", *range(100))


def test_a_large_corpus_goes_on_in_more_files(monkeypatch):
    monkeypatch.setattr(corpus, "SHARD", 25)

    make("c", [*[("train", range(10))] * 6, ("val", [7])])

    assert [len(file) for file in corpus.load("c").train] == [30, 20, 10]
    assert tokens("c", "train") == [*range(10)] * 6


@pytest.mark.parametrize("length, starts", [
    (0, [100, 101, 102, 200]),  # every window of a file that is long enough
    (8, [100, 200])  # every whole row
])
def test_batches_are_rows_or_windows_equally_often(length, starts):
    data = in_memory([range(100, 110), range(50, 53), range(200, 208)], [], length)
    torch.manual_seed(0)

    x = data.batch(1000 * len(starts), 8)

    counts = torch.bincount(x[:, 0])
    assert (x.diff(dim=1) == 1).all()  # neighbours of one file
    assert counts.nonzero().flatten().tolist() == starts
    assert (counts[starts] - 1000).abs().max() < 5 * 1000 ** 0.5


def test_held_out_sequences_do_not_overlap():
    data = in_memory([], [range(30), range(100, 120)])

    x = data.held_out(99, 8)

    assert sorted(x[:, 0].tolist()) == [0, 8, 16, 100, 108]


def test_held_out_sequences_are_always_the_same():
    data = in_memory([], [range(900)])
    state = torch.get_rng_state()

    x = data.held_out(50, 8)

    assert torch.equal(data.held_out(9, 8), x[:9])
    assert torch.equal(torch.get_rng_state(), state)


def test_framed_sequences_begin_and_end_with_an_end_token_and_are_else_as_before():
    bare = in_memory([], [range(200)])

    x = dataclasses.replace(bare, framed=True).held_out(9, 16)

    assert (x[:, [0, -1]] == 256).all()
    assert torch.equal(x[:, 1:-1], bare.held_out(9, 16)[:, 1:-1])


@pytest.mark.parametrize("made_for", [
    ("gpt2", 8, False),
    ("bytes", 9, False),
    ("bytes", 8, True)
])
def test_a_network_for_other_sequences_does_not_fit(made_for):
    data = in_memory([], [], 8)

    data.check_fits("a.pt", "bytes", 8, False)
    with pytest.raises(ValueError, match="c does not fit a.pt"):
        data.check_fits("a.pt", *made_for)


def test_rows_are_texts_with_ends_behind_them():
    texts = [str(i) for i in range(99)]

    corpus.write_rows("c", texts, "text", "bytes", 4, {})

    data = corpus.load("c")
    val = [s for s in texts if zlib.crc32(s.encode()) % 20 == 0]
    assert data.texts("val") == val
    assert sorted(data.texts("train") + val) == sorted(texts)
    assert (data.held_out(9, 4)[:, 2:] == 256).all()


def test_shares_of_lengths_by_hand():
    files = [[7, 256, 7, 7], [256, 256, 0, 256]]

    assert in_memory(files, [], 2).length_shares(2).tolist() == [0.25, 0.5, 0.25]
    assert in_memory(files, []).length_shares(2).tolist() == [0, 0, 1]


def test_tokens_up_to_the_first_end_count():
    x = torch.tensor([[5, 9, 5, 9], [5, 5, 5, 5]])

    assert corpus.until_end(x, 9).sum(1).tolist() == [2, 4]


def test_too_little_for_one_sequence_is_said():
    with pytest.raises(ValueError, match="30 tokens .* sequence of 31"):
        in_memory([range(30)], []).batch(1, 31)


@pytest.mark.parametrize("name", ["none", "file", "."])
def test_what_is_no_corpus_is_refused_with_what_to_do(folder, name):
    (folder / "file").touch()

    with pytest.raises(ValueError, match=f"'{name}'.*python -m data.text FILE"):
        corpus.load(name)


@pytest.mark.parametrize("part", [slice(1222), slice(2, None)])
def test_a_shard_that_is_not_whole_is_refused(folder, part):
    make("c", [("train", range(100)), ("val", [1])])
    path = folder / "c/train.bin"

    path.write_bytes(path.read_bytes()[part])

    with pytest.raises(ValueError, match="train.bin is not a whole"):
        corpus.load("c")


def test_two_processes_make_one_corpus_whole():
    barrier = FORK.Barrier(2)

    def pieces(me):
        yield "train", [me]
        barrier.wait()  # both are in the middle
        yield "train", [me]
        yield "val", [me]
    processes = [start(pieces(me)) for me in range(2)]
    for process in processes:
        process.join()

    assert [process.exitcode for process in processes] == [0, 0]
    assert tokens("c", "train") == tokens("c", "val") * 2
    assert os.listdir() == ["c"]


def test_a_kill_leaves_no_corpus():
    def pieces():
        yield "train", [1]
        yield "val", [1]
        os.kill(os.getpid(), signal.SIGKILL)

    start(pieces()).join()

    left, = os.listdir()
    assert left.endswith(".partial")


def test_what_fails_leaves_nothing():
    with pytest.raises(ValueError, match="0 tokens to train and 3 to validate"):
        make("c", [("val", [1, 2, 3])])

    assert os.listdir() == []


def test_nothing_is_written_over():
    os.mkdir("c")

    with pytest.raises(ValueError, match="'c' already exists"):
        text.main(["a.txt", "--out", "c"])


@pytest.mark.parametrize("error, code, said", [
    (ValueError("no"), 2, "error: no\n"),
    (KeyboardInterrupt, 130, "")
])
def test_what_the_user_can_mend_is_one_line(capsys, error, code, said):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        corpus.run(main)

    assert stop.value.code == code
    assert capsys.readouterr().err == said


# -------------------------------------------------------------------------------- GPT-2's tokens
def test_gpt2s_files_that_are_missing_or_damaged(folder, monkeypatch):
    """tiktoken removes a damaged file, then asks the network."""
    readme = pathlib.Path(__file__).with_name("README.md").read_text()
    name = re.search(r"`vocab.bpe` \| `(\w+)`", readme)[1]
    (folder / name).touch()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr("tiktoken.load.read_file", {}.__getitem__)  # fails

    with pytest.raises(ValueError, match="missing or damaged.*TIKTOKEN_CACHE_DIR"):
        corpus.make_tokenizer.__wrapped__("gpt2")

    assert os.listdir() == []  # so the README has the right name


# -------------------------------------------------------------------------------------------- text
@pytest.mark.parametrize("name, content", [
    ("a.txt", b"caf\xe9 au lait"),
    ("a.gz", gzip.compress(FASTA)[:60]),
    ("a.xz", lzma.compress(FASTA)[:60])
])
def test_what_cannot_be_read_whole_is_refused(folder, name, content):
    (folder / name).write_bytes(content)

    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        list(corpus.read_lines(name))


@pytest.mark.parametrize("main", [fasta.main, text.main])
def test_a_pipe_is_refused(gpt2, main):
    os.mkfifo("pipe")

    with pytest.raises(ValueError, match="pipe is not a file.*save it first"):
        main(["pipe"])


def test_text_becomes_packed_tokens(folder, gpt2, monkeypatch):
    monkeypatch.setattr(text, "SMALL", 1000)  # bytes: so it is a large file
    documents = [f"Article {i}.\ncaf\xe9.\n" for i in range(900)]
    ids = [[*document.encode(), 256] for document in documents]
    (folder / "a.txt").write_text("\ufeff" + END.join(documents), encoding="utf-8")

    text.main(["a.txt"])

    assert tokens("out/a", "val") == sum(ids[::200], [])
    assert tokens("out/a", "train") == sum((x for i, x in enumerate(ids) if i % 200), [])


def test_framed_text_is_for_distillation(folder, capsys):
    (folder / "a.txt").write_text("word " * 100)

    text.main("a.txt --tokenizer bytes --framed".split())

    assert corpus.load("out/a").framed
    assert capsys.readouterr().out.endswith("python distill.py --data out/a\n")


@pytest.mark.parametrize("content", ["x" * 30000, f"one\n{END}" * 60])
def test_a_small_file_is_in_both_splits(folder, content):
    (folder / "a.txt").write_text(content)

    text.prepare("a.txt", "c", "bytes", False)

    assert 0.02 < len(tokens("c", "val")) / len(tokens("c", "train")) < 0.2


def test_long_documents_come_in_pieces(folder):
    (folder / "a.txt").write_text("x" * 200 + f"\n{END}end\n")

    pieces = list(text.documents(["a.txt"], 64))

    assert "".join(piece + "|" * whole for piece, whole in pieces) == "x" * 200 + "\n|end\n|"
    assert max(len(piece) for piece, _ in pieces) < 128


def test_a_folder_is_read_whole_and_each_file_once(folder):
    (folder / "d/e").mkdir(parents=True)
    (folder / "d/1.txt").write_text("first" * 20)
    (folder / "d/e/2.txt.gz").write_bytes(gzip.compress(b"second"))
    (folder / "d/loop").symlink_to(".")

    text.main("d/ --tokenizer bytes".split())

    both = tokens("out/d", "train") + tokens("out/d", "val")
    assert sorted(both) == sorted([*b"first" * 20, 256, *b"second", 256])


def test_ready_made_shards_validate_if_val_is_a_word_of_their_names(folder):
    make("val", [("train", [1, 2]), ("val", [3])])
    for name in ("retrieval_train_0", "x_train_1", "x_val_0"):
        os.link("val/train.bin", f"val/{name}.bin")

    text.main("val --out c --tokenizer bytes".split())

    assert tokens("c", "val") == [3, 1, 2]
    assert tokens("c", "train") == [1, 2] * 3


def test_shards_of_other_tokens_are_refused():
    make("other", [("train", [257]), ("val", [1])])

    with pytest.raises(ValueError, match="other/train.bin has token 257, but bytes has 257"):
        text.prepare("other", "c", "bytes", False)


# ------------------------------------------------------------------------ signatures and proteins
def test_signatures_are_found_on_this_machine(monkeypatch):
    some = list(signatures.source_files(np.__path__[0]))
    monkeypatch.setattr(signatures, "source_files", lambda folder: some)

    found = signatures.find_signatures(48)

    form = re.compile(r"def (?!test)\w+\(.*\).*:", re.ASCII)
    assert len(found) > 200
    assert [s for s in found if len(s) > 47 or not form.fullmatch(s)] == []


@pytest.mark.parametrize("line", [
    "def f(:", "def f(x) return:", "x = 1", "def f():pass\ndef g():", "", "def f(\0):", "class A:"
])
def test_what_is_no_signature(line):
    assert not signatures.is_signature(line)


def test_the_default_corpus_makes_itself(monkeypatch):
    lines = [f"def f{i}(a, b={i}):" for i in range(80)]
    monkeypatch.setattr(signatures, "find_signatures", lambda length: lines)

    data = corpus.load(corpus.DEFAULT)

    assert sorted(data.texts("train") + data.texts("val")) == sorted(lines)


def test_rows_of_no_length_are_refused():
    with pytest.raises(ValueError, match="length of at least 1"):
        corpus.write_rows("c", [], "fasta", "protein", 0, {})


@pytest.mark.parametrize("name, pack", [
    ("p.fasta", bytes),
    ("p.fa.gz", gzip.compress),
    ("p.xz", lzma.compress)
])
def test_fasta_in_all_its_forms(folder, name, pack):
    (folder / name).write_bytes(pack(FASTA))

    assert fasta.read_fasta(name) == ["MKVLWAAG", "MKVLXXXX"]


@pytest.mark.parametrize("content, number", [
    ("hello\n>x\nACD", 1),
    (">x\nACD\nAC-D", 3)
])
def test_what_is_no_fasta_is_named_by_its_line(folder, content, number):
    (folder / "p.fasta").write_text(content)

    with pytest.raises(ValueError, match=f"p.fasta, line {number} is not FASTA"):
        fasta.main(["p.fasta"])


@pytest.mark.parametrize("long, kept", [("drop", 84), ("crop", 85)])
def test_long_sequences_are_dropped_or_cropped_and_counted(folder, capsys, long, kept):
    (folder / "p.fa").write_text("".join(f">\n{'MKV' * i}C\n" for i in range(99)))

    fasta.main(f"p.fa --length 250 --long {long}".split())

    data = corpus.load("out/p")
    texts = data.texts("train") + data.texts("val")
    assert len(texts) == kept
    assert ("MKV" * 83 + "M" in texts) == (long == "crop")
    assert f"15 of them longer than 250: {long}ped, {kept} left" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ openwebtext
class Handler(http.server.BaseHTTPRequestHandler):
    """Serve `body` up to `cut`, from the byte that is asked for."""
    cut = None

    def do_GET(self):
        first = int(self.headers["Range"][6:-1])
        self.send_response(206)
        self.send_header("Content-Length", len(self.body) - first)
        self.end_headers()
        self.wfile.write(self.body[first:self.cut])


@pytest.fixture
def server(folder, gpt2, monkeypatch):
    """Serve a tar of an xz-compressed tar of 120 texts, as in the data set, on loopback."""
    (folder / "pages").mkdir()
    for i in range(120):
        (folder / f"pages/{i:03d}.txt").write_text(f"page {i}")
    shutil.make_archive("tars/0", "xztar", "pages")
    Handler.body = pathlib.Path(shutil.make_archive("all", "tar", "tars")).read_bytes()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        url = f"http://127.0.0.1:{server.server_port}/{{:02d}}.tar"
        monkeypatch.setattr(openwebtext, "URL", url)
        yield
        server.shutdown()


def test_a_broken_download_goes_on_and_is_streamed(server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Handler, "cut", 700)
        with pytest.raises(ValueError, match="00.tar cannot be fetched.*run again"):
            openwebtext.main(["--shards", "1"])
    left = os.path.getsize("out/downloads/00.tar.partial")

    openwebtext.main(["--shards", "1"])

    assert left == 700
    assert tokens("out/openwebtext", "val") == [*b"page 0", 256]
    assert tokens("out/openwebtext", "train")[-9:] == [*b"page 119", 256]


def test_a_damaged_tar_is_named(folder, server):
    (folder / "00.tar").write_bytes(Handler.body[:700])

    with pytest.raises(ValueError, match="00.tar cannot be .* read"):
        openwebtext.main("--shards 1 --cache .".split())


# ---------------------------------------------------------------------------------------- measures
@pytest.mark.parametrize("statistic, of, exact", [
    (quality.entropy, ["aabb"], math.log(2)),
    (quality.entropy, [""], 0),
    (quality.ngrams, [["abab", "b"], 2], {("a", "b"): 2, ("b", "a"): 1}),
    (quality.jensen_shannon, ["ab", "ab"], 0),
    (quality.jensen_shannon, ["ab", ""], math.log(2)),
    (quality.jensen_shannon, ["ab", "a"], quality.entropy("aaab") - math.log(2) / 2),
    (quality.total_variation, ["aab", "abbbcc"], 1 / 2),
    (quality.total_variation, ["aab", "aab" * 9], 0),
    (quality.ks, [[1, 2], [3, 4]], 1),
    (quality.ks, [[10, 9], [9, 10]], 0),
    (quality.repeated, [[1, 2, 3, 4, 1, 2, 3, 4]], 1 / 5),  # 1234 occurs again
    (quality.repeated, ["abc"], 0),
    (quality.features, ["def f(self, *a: int, b=1) -> X:"], (1, 1, 1, 1, 2, 1))
])
def test_statistics_by_hand(statistic, of, exact):
    assert statistic(*of) == pytest.approx(exact)


LINES = ["def a(x) -> int:", "def b(x=1):", "def c(x):", "def d(y):"]


@pytest.mark.parametrize("name, exact", [
    ("valid", 0.5),  # (z)) and (x=: are not Python
    ("post", 0.5 * 0.5 + 0.25 * 0.5 + 0.25 * 0),  # plain, with a default, no ->
    ("tv", 0.25),  # a quarter has = instead of ->
    ("ks", 0.25),  # three of ours have 9 characters, two of theirs
    ("rare", 3 / 38 * 45),  # z, z and 2; theirs count as one of 45
    ("length", 9.5)
])
def test_signatures_beside_validation_lines_by_hand(name, exact):
    data = of_rows(["def known():"], LINES)

    q = measure(["def c(z):", "def c(z))", "def e(x=2):", "def e(x=:"], data)

    assert q[name] == pytest.approx(exact)


def test_shares_of_signatures_by_hand():
    data = of_rows(["def known():"], LINES)

    q = measure(["def known():", "def m(self, a: int):"] * 2 + ["def m(self):"], data)

    exact = {"novel": 0.6, "hints": 0.4, "methods": 0.6, "returns": 0, "distinct": 0.6}
    assert {name: q[name] for name in exact} == pytest.approx(exact)


@pytest.mark.parametrize("texts, name, exact", [
    (["ACDEFGHI", "A" * 16], "ks", 0.5),  # all of theirs have 10 or fewer, half of ours
    (["ACDEFGHMNMM"], "novel", 1),  # three of seven 5-mers are in a training sequence
    (["ACDEFY"], "novel", 0),  # one of two
    (["ACDEACDEACDE", "ACDEFGACDEFG"], "low", 0.5),  # 2 and 2.6 bits
    (["", ""], "js2", math.log(2))
])
def test_measures_of_proteins_by_hand(texts, name, exact):
    known = ["ACDEFGHIKLMNPQ", "WWWWWYYYYY"]
    data = of_rows(known, ["ACDEFGHIKL", "ACDEF"], "fasta", "protein")

    assert measure(texts, data)[name] == pytest.approx(exact)


def test_traits_of_a_passage_by_hand():
    passages = ["He is 12.5. Is he? \u201cNO!\u201d", ""]

    values = quality.traits(passages, {"he", "is"})

    assert values.tolist() == [[3, 4, 1 / 5, 4, 3, 2], [0] * 6]


def test_text_beside_validation_passages_by_hand(monkeypatch):
    monkeypatch.setattr(quality, "COMMON", 3)
    train = [b"it is it was", b"was it is it"]
    val = [b"Go. Do. 4 ab", b"the end was ", b'"No." it is ']
    data = in_memory(map(list, train), map(list, val))

    x = torch.tensor([list(b"the end was "), list(b'IS. is? 7 "x')])
    q = quality.quality(x, data)

    assert quality.common_words(data, 12) == {"it", "is", "was"}
    assert q["tv"] == pytest.approx((1 / 6 + 1 / 2 + 1 / 3 + 1 / 3) / 2)


def test_text_of_one_letter_a_passage_by_hand():
    x = torch.tensor([[97] * 12, [98] * 12, [98] * 12])
    data = in_memory([range(97)], [range(97)])

    q = quality.quality(x, data)

    pairs = quality.entropy("abb")
    exact = {"bigram": pairs, "entropy": 0, "rep4": 8 / 9, "js3": math.log(2), "distinct": 2 / 3}
    assert {name: q[name] for name in exact} == pytest.approx(exact)


# ------------------------------------------------------------------------------------ bad samplers
def check_bad(bad, real, caught, blind):
    """Assert which measures are far from those of real samples, equal in number."""
    far = set()
    for name in bad:
        values = [q[name] for q in real]
        if abs(bad[name] - np.mean(values)) > 0.02 + 7 * np.std(values):
            far.add(name)
    assert set(caught.split()) <= far
    assert not far & set(blind.split())


def people(n):
    """Return n unique signatures as people might write them."""
    draw = random.Random(0).choice
    words = list(map("".join, itertools.permutations("abeginrst", 3)))
    lines = {}
    while len(lines) < n:
        name = draw(["get_", "set_", "make_"]) + draw(words) + draw("abcdeABCDE")
        arguments = draw(["", "self, "]) + draw(words) + draw(["", "=1", ": int"])
        lines[f"def {name}({arguments}){draw([':', ' -> str:'])}"] = None
    return list(lines)


FIRST = people(1)[0]


@pytest.fixture(scope="module")
def lines():
    """Return a corpus of signatures, its training lines, and measures of 20 draws of 500 lines."""
    random.seed(0)
    texts = people(6000)
    train = texts[:5000]
    data = of_rows(train, texts[5000:])
    return data, train, [measure(random.sample(train, 500), data) for _ in range(20)]


@pytest.mark.parametrize("keep, caught, blind", [
    (lambda s: True, "", "valid post tv js3 ks rare distinct entropy length"),
    (lambda s: s == FIRST, "distinct ks js3 tv post", "valid"),
    (lambda s: len(s) == 20, "ks", "valid"),
    (lambda s: s[4:8] == "get_", "js3", "valid tv"),
    (lambda s: "->" not in s, "tv post", "valid distinct"),
    (lambda s: s.islower(), "rare", "valid distinct")
])
def test_bad_samplers_of_signatures_are_caught(lines, keep, caught, blind):
    data, train, real = lines
    kept = [s for s in train if keep(s)] * 500

    bad = measure(kept[:500], data)

    check_bad(bad, real, caught, blind)


@pytest.fixture(scope="module")
def passages():
    """Return a corpus of sentences, 500 of its passages, and measures of 20 other draws of 500."""
    torch.manual_seed(0)
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=2 + i % 7)) for i in range(3000)]
    sentences = ""
    for _ in range(8000):
        some = [words[int(2999 ** draw.random())] for _ in range(draw.randint(4, 11))]
        form = draw.choice(["{}. ", "{}. ", '"{}!" ', "{} 17. "])
        sentences += form.format(" ".join(some).capitalize())

    ids = list(sentences.encode())
    data = in_memory([ids[99999:]], [ids[:99999]])
    real = [quality.quality(data.batch(500, 128), data) for _ in range(20)]
    return data, data.batch(500, 128), real


@pytest.mark.parametrize("worsen, caught, blind", [
    (lambda x: x, "", "entropy distinct bigram rep4 js3 tv"),
    (lambda x: x[:1].expand(500, 128), "distinct bigram js3 tv", ""),
    (lambda x: x[:, :32].repeat(1, 4), "rep4", "distinct"),
    (lambda x: torch.where((x >= 65) & (x <= 90), x + 32, x), "tv", "distinct rep4"),
    (lambda x: x[:, torch.randperm(128)], "js3 bigram", "entropy distinct")
])
def test_bad_samplers_of_text_are_caught(passages, worsen, caught, blind):
    data, x, real = passages

    bad = quality.quality(worsen(x), data)

    check_bad(bad, real, caught, blind)
