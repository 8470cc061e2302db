"""fuzz.py - nonsense for every command: each case must end in a result, or in one line.

    python -m experiments.fuzz                                 # 2,500 cases of each kind, an hour
    python -m experiments.fuzz lines data --count 300 --seed 7 --minutes 2
    python -m experiments.fuzz checkpoints --only 1234         # this case again, shown, files kept

Kinds: lines (flags), data (texts, FASTA, shards, corpora), results (JSON), checkpoints. A case ends
well with exit code 0; or with 2 and one last line that has "error: " in it; or, if it was still
training after 8 seconds and got SIGTERM, with 143. Faults are tracebacks, signals, more than 20
seconds, files half-written or left over, inputs changed, an old log lost, control characters on
the terminal, and a flipped bit under a checkpoint's CRC that goes unnoticed. A case is made by its
seed, kind and number alone, and runs in a forked child with 3 GiB more than torch itself takes.
Left out on purpose: absolute paths (a fault could eat the machine's files), network and --compile.
"""
import argparse
import collections
import contextlib
import copy
import gzip
import importlib
import io
import json
import lzma
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from data import corpus
from data.command import FROM_0, FROM_1, RATE, make_parser, run_script
from experiments import common

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process that has used a GPU cannot fork
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TERM_AFTER, KILL_AFTER, MEMORY = 8, 20, 3 * 2 ** 30  # seconds, seconds, bytes
CPU = ["--device", "cpu", "--no-bf16"]
TEACH = "--n_layer 1 --n_head 2 --n_embd 16 --batch 8 --updates 2 --warmup 1".split() + CPU
DISTIL = "--groups 4 --G 2 --disc_blocks 1 --disc_warmup 1 --updates 2".split() + CPU
COMMANDS = {  # name of the module: a command line that works
    "train_teacher": ["--data", "corpus", "--out", "new/t.pt", *TEACH],
    "distill": ["--teacher", "out/teacher.pt", "--out", "new/s.pt", *DISTIL],
    "sample": ["--model", "out/student.pt", "--num", "3", "--steps", "3", *CPU],
    "data.text": ["text.txt", "--tokenizer", "bytes", "--out", "new/text"],
    "data.fasta": ["p.fasta", "--length", "16", "--out", "new/p"],
    "experiments.sdtt": ["--teacher", "out/teacher.pt", "--out", "new/x.pt", "--batch", "4",
                         "--rounds", "4", "2", "--updates", "2", *CPU],
    "experiments.autoregressive": ["--model", "out/causal.pt", "--num", "3", *CPU],
    "experiments.table": ["r.json"],
    "experiments.evaluate": ["--rows", "student", "--samples", "8",
                             "--student", "out/student.pt", "--json", "new.json", *CPU]}
OFTEN = ["train_teacher", "distill", "sample"] * 3 + [*COMMANDS]
INPUTS = ("--teacher", "--model", "--data", "--student", "--causal")
UNTRIED = ("--help", "-h", "--compile", "--judge", "--size")
Case = collections.namedtuple("Case", "module argv must_refuse", defaults=(False,))

NUMBERS = ["0", "-1", "1", "2", "3", "7", "0.5", "1.0", ".999", "1e-9", "nan", "inf", "-inf",
           "1e308", "-1e308", "1e-320", "-0.0", "1e400", "999999999", "1000000000", "4294967297",
           "1" + "0" * 20, "-1" + "0" * 20, "9" * 5000, "", " ", "1,5", "0x10", "1_0", "\xbd",
           "\u0663", "True", "1e9", "--", "1 2"]
TEXTS = ["out/teacher.pt", "out/student.pt", "out/causal.pt", "out/teacher.jsonl", "corpus",
         "corpus/", "corpus/meta.json", "corpus/train.bin", "text.txt", "p.fasta", "r.json", "out",
         "out/", "new/", "none/none.pt", "", " ", ".", "./", "-", "*", "%s", "{seed}", "~",
         "$HOME", "a\nb.pt", "new/\x1b[31mred.pt", "new/" + "a" * 300, "text.txt/below", "\xe9.pt",
         "\udcff.pt", "x.jsonl", "run.v1", "a" * 5000, "?", "def ?", "\u202eabc", "\x07",
         "<|endoftext|>"]
WEIRD = [None, True, -1, 0, 1, 2, 10 ** 9, 10 ** 30, -10 ** 30, 0.5, float("nan"), float("inf"),
         "", "x", "1", "\x1b[31m", "a\nb", "a" * 10000, [], {}, [1, 2], {"a": 1}, [[[]]], "bytes",
         "gpt2", "protein", "signatures", "student", "causal"]


# ------------------------------------------------------------------------------------ making cases
def parser_of(module):
    """The argparse parser of a command, caught before it parses."""
    real, caught = argparse.ArgumentParser.parse_known_args, []

    def catch(self, *args, **how):
        caught.append(self)
        raise KeyboardInterrupt
    argparse.ArgumentParser.parse_known_args = catch
    with contextlib.suppress(KeyboardInterrupt):
        importlib.import_module(module).main([])
    argparse.ArgumentParser.parse_known_args = real
    return caught[0]


def a_line(rng, folder):
    """A command line that works, with one to four flags more, or a word lost, doubled or added."""
    module = rng.choice(OFTEN)
    argv = list(COMMANDS[module])
    flags = [action for action in parser_of(module)._actions
             if action.option_strings and action.option_strings[0] not in UNTRIED]
    for action in rng.choices(flags, k=rng.choice((1, 1, 1, 2, 2, 4))):
        words = NUMBERS if action.type else TEXTS
        if rng.random() < 0.15:
            words = NUMBERS + TEXTS
        if action.choices:
            words = [*action.choices, "none"]
        count = {None: 1, 0: 0}.get(action.nargs, rng.choice((1, 2, 2, 2, 3)))
        argv += [rng.choice(action.option_strings), *rng.choices(words, k=count)]
    if rng.random() < 0.1:
        k = rng.randrange(len(argv))
        argv[k:k + 1] = rng.choice(([], [argv[k]] * 2, [argv[k], rng.choice(NUMBERS + TEXTS)]))
    argv = [word for word in argv if word != "gpt2"]
    return Case(module, argv)


def mutated(rng, content, weird):
    """A copy of nested dicts and lists with something in it replaced, renamed, lost or added."""
    content = copy.copy(content)
    keys = list(range(len(content))) if isinstance(content, list) else list(content)
    if not keys:
        return rng.choice(weird)
    key, what = rng.choice(keys), rng.random()
    inner = content[key]
    if isinstance(inner, (dict, list)) and what < 0.75:
        content[key] = mutated(rng, inner, weird)
    elif what < 0.9:
        content[key] = rng.choice(weird)
    elif isinstance(content, list) or what < 0.94:
        del content[key]
    else:
        content[rng.choice((7, "", "x", None, "a\nb"))] = content.pop(key)
    return content


def spoiled(rng, content):
    """Bytes with some flipped, lost, doubled or put in; or all of others."""
    data, what = bytearray(content), rng.randrange(7)
    at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    if what == 0:
        return bytes(data[:at])
    if what == 1:
        return bytes(data[:at] + data[to:])
    if what == 2:
        return bytes(data[:to] + data[at:])
    if what == 3:
        return rng.choice((b"", b"\0", b"\xff\xfe", b"\x1f\x8b", b"\xfd7zXZ\0", b"PK\3\4",
                           b"\n" * 99, rng.randbytes(5000)))
    if what == 4:
        return bytes(data[:at]) + rng.randbytes(rng.choice((1, 9, 999))) + bytes(data[at:])
    for _ in range(rng.choice((1, 1, 5, 200))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def compressed(rng, content):
    """As it is, or by gzip or xz, whole, cut off or spoiled."""
    how = rng.choice((bytes, bytes, gzip.compress, lzma.compress))
    return rng.choice((bytes, lambda c: c[:-9], lambda c: spoiled(rng, c)))(how(content))


def a_text(rng, folder):
    """data.text or data.fasta on a file that was spoiled, is of another kind, odd or a bomb."""
    line = rng.choice(("\x1b[31m", "\ufeff", "<|endoftext|>\n", "a" * 10 ** 6, "\r", "\0", ">",
                       ">a\n", "*\n", "ACDE1\n", "\u0130\n", ";\n", "\x85\u2028",
                       "acdef\n" * 99)) * 9
    texts = [(folder / "text.txt").read_bytes(), (folder / "p.fasta").read_bytes(), line.encode(),
             line.encode("utf-16"), line.encode("latin-1", "replace")]
    content = rng.choice(texts)
    if rng.random() < 0.6:
        content = spoiled(rng, content)
    content = compressed(rng, content)
    if rng.random() < 0.02:  # 200 MB in a few KB, on one line
        content = rng.choice((gzip, lzma)).compress(b">a\nA"[rng.choice((0, 3)):] * 2 ** 20) * 50
    name = rng.choice(("a.txt", "a.gz", "a.fasta", "b/a.txt", "b/a.txt.xz", "a\nb", "a"))
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    if rng.random() < 0.5:
        length = rng.choice(("1", "16", "999"))
        return Case("data.fasta", [name, "--length", length, "--out", "new/p"])
    return Case("data.text", [rng.choice((name, name.split("/")[0])), "--out", "new/t",
                              "--tokenizer", "bytes"])


def a_shard(rng, tokens):
    """A file of tokens in llm.c's format that may lie in its header, or have ids out of bounds."""
    head, n = np.zeros(256, "<i4"), len(tokens)
    head[:3] = corpus.MAGIC, corpus.VERSION, n
    if rng.random() < 0.4:
        head[rng.randrange(3)] = rng.choice((0, 1, -1, 2 ** 31 - 1, n + 1, n - 1))
    tokens = tokens.copy()
    if rng.random() < 0.4 and len(tokens):
        tokens[rng.randrange(len(tokens))] = rng.choice((257, 258, 50257, 65535))
    content = head.tobytes() + tokens.astype("<u2").tobytes()
    return spoiled(rng, content) if rng.random() < 0.3 else content


def a_corpus(rng, folder):
    """A corpus whose meta.json or tokens are not right, trained on; or such shards, made one."""
    meta, path = json.loads((folder / "corpus/meta.json").read_text()), folder / "corpus"
    for name in rng.sample(("train.bin", "val.bin"), rng.choice((0, 1, 2))):
        tokens = np.fromfile(path / name, "<u2")[512:]
        tokens = tokens[:rng.choice((None, None, 0, 1, -1, 24))]
        (path / name).write_bytes(a_shard(rng, tokens))
    if rng.random() < 0.1:
        (path / rng.choice(("train.bin", "val.bin", "meta.json"))).unlink()
    if rng.random() < 0.1:
        (path / rng.choice(("train_x.bin", "val.bin.bin"))).mkdir()
    if rng.random() < 0.5:
        content = a_json(rng, meta)
        (path / "meta.json").write_bytes(content)
    module = rng.choice(("train_teacher", "train_teacher", "distill", "data.text"))
    if module == "data.text":
        return Case(module, ["corpus", "--out", "new/t"])
    return Case(module, [*COMMANDS[module], "--data", "corpus"])


def a_json(rng, content):
    """Bytes of this JSON, changed in its values or its letters, or too deep, or too large."""
    text = json.dumps(mutated(rng, content, WEIRD) if rng.random() < 0.9 else content)
    if rng.random() < 0.25:
        return spoiled(rng, text.encode())
    if rng.random() < 0.1:
        text = rng.choice(("[" * 10 ** 5, '{"a":' * 10 ** 5, "9" * 5000, "NaN",
                           '{"a": ' + "9" * 5000 + "}", "null", "[]", "{}", '"\\ud800"',
                           '{"\\u001b[31m": {"0": {}}}'))
    return text.encode("utf-8", "surrogatepass")


def a_results(rng, folder):
    """A results file of any JSON, read by the table or added to."""
    content = json.loads((folder / "r.json").read_text())
    (folder / "r.json").write_bytes(a_json(rng, content))
    if rng.random() < 0.1:
        flags = COMMANDS["experiments.evaluate"]
        return Case("experiments.evaluate", [*flags, "--json", "r.json"])
    return Case("experiments.table", ["r.json"])


def a_data_file(rng, folder):
    return rng.choice((a_text, a_corpus))(rng, folder)


def odd_tensors(rng, like):
    """What could stand in the place of a tensor."""
    turned = like[None]
    if like.dim() > 1:
        turned = like.mT.contiguous()
    return [torch.zeros(1), torch.zeros(0), torch.zeros(()), like.double(), like.half(), like.int(),
            like.bool(), like.to(torch.complex64), torch.full(like.shape, torch.nan), like * 1e38,
            torch.full(like.shape, -1.0), torch.zeros(1).expand(10 ** 9), like[None],
            like.flatten()[:-1], turned,
            torch.zeros(5, dtype=torch.uint8), torch.zeros(5000, dtype=torch.uint8),
            torch.zeros(3, 3).to_sparse(), torch.empty(9, device="meta")]


def flipped(rng, path):
    """The file with one bit flipped where the archive's own CRC must see it."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        member = rng.choice([info for info in archive.infolist() if info.file_size])
    at = member.header_offset
    start = at + 30 + sum(np.frombuffer(data[at + 26:at + 30], "<u2").tolist())  # behind its header
    data[start + rng.randrange(member.file_size)] ^= 1 << rng.randrange(8)
    return bytes(data)


def a_checkpoint(rng, folder):
    """A checkpoint with an entry, a tensor or a byte changed, sampled, distilled or resumed."""
    name = rng.choice(("teacher", "student", "student", "causal"))
    path, what = folder / f"out/{name}.pt", rng.random()
    if what < 0.1:
        path.write_bytes(flipped(rng, path))
    elif what < 0.2:
        path.write_bytes(spoiled(rng, path.read_bytes()))
    else:
        ckpt = torch.load(path, weights_only=True)
        tensor = rng.choice([x for x in torch.utils._pytree.tree_leaves(ckpt)
                             if isinstance(x, torch.Tensor)])
        weird = rng.choice((WEIRD, odd_tensors(rng, tensor), [b"", (1,), torch.float32, {1: 2}]))
        torch.save(mutated(rng, ckpt, weird), path)
    use = {"teacher": "train_teacher", "student": "distill", "causal": "train_teacher"}[name]
    resume = ["--resume", "--out", f"out/{name}.pt", "--updates", "3", *CPU]
    cases = [Case(use, resume), Case(use, resume)]
    for module in ("sample", "distill", "experiments.sdtt"):
        flag = {"sample": "--model"}.get(module, "--teacher")
        cases.append(Case(module, [*COMMANDS[module], flag, f"out/{name}.pt"]))
    cases.append(Case("sample", [*cases[2].argv, "--sampler", "rgas"]))
    if name == "causal":
        cases.append(Case("experiments.autoregressive", COMMANDS["experiments.autoregressive"]))
    return rng.choice(cases)._replace(must_refuse=what < 0.1)


KINDS = {"lines": a_line, "data": a_data_file, "results": a_results, "checkpoints": a_checkpoint}


# ----------------------------------------------------------------------------------- running a case
def forked(act, limit=600, term_after=600):
    """Run act() in a forked child: (exit code, or "hang"; got SIGTERM?)."""
    sys.stdout.flush()
    child, begin, termed, done = os.fork(), time.monotonic(), False, 0
    if child == 0:
        with contextlib.suppress(BaseException):
            act()
        os._exit(99)
    while not done:
        seconds = time.monotonic() - begin
        if seconds > term_after and not termed:
            os.kill(child, signal.SIGTERM)
            termed = True
        if seconds > limit:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hang", termed
        done, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(status), termed


def as_a_program(module, argv, folder, says):
    """What the shell would run, in this process, to be forked: ends it. says: folder of its words.

    A traceback goes to stderr as always, and where it was raised into says/fault.
    """
    limit = common.process_bytes("VmSize") + MEMORY
    for what, most in ((resource.RLIMIT_AS, limit), (resource.RLIMIT_CORE, 0),
                       (resource.RLIMIT_FSIZE, 2 ** 30)):
        resource.setrlimit(what, (most, most))
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(says / name, os.O_CREAT | os.O_WRONLY), number)
        setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(folder)
    tiktoken.get_encoding = lambda name: corpus.make_tokenizer("bytes")  # no case needs a network
    sys.argv, code = [module], 1  # of a traceback
    try:
        main = importlib.import_module(module).main
        run_script(lambda: main(argv), resumes=module in ("train_teacher", "distill"))
    except SystemExit as e:
        code = e.code
        if code is None:
            code = 0
    except BaseException as e:
        ours = [frame for frame in traceback.extract_tb(e.__traceback__)
                if frame.filename.startswith(HERE) and not frame.filename.endswith("fuzz.py")]
        where = f"{os.path.relpath(ours[-1].filename, HERE)}, {ours[-1].name}"
        (says / "fault").write_text(f"{type(e).__name__} in {where}")
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code))


def snapshot(folder):
    """{path: bytes} of the files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def value(argv, flag):
    """The last value of a flag in argv, or None."""
    found = [after for word, after in zip(argv, argv[1:]) if word == flag]
    return found[-1] if found else None


def whole(path, content):
    """Can what a command has written be read? Of checkpoints, logs and results; all else can."""
    try:
        if content.startswith(b"PK"):
            return zipfile.ZipFile(io.BytesIO(content)).testzip() is None
        if path.endswith(".jsonl"):
            return all(map(json.loads, content.decode().splitlines()))
        if path.endswith(".json"):
            return json.loads(content) is not None
    except (ValueError, zipfile.BadZipFile):
        return False
    return True


def faults_of_files(case, code, before, after):
    """What a command must not have done to files."""
    out, found = value(case.argv, "--out"), []
    written = {path for path in after if before.get(path) != after[path]}
    log = None if out is None else out.removesuffix(".pt") + ".jsonl"
    given = [*case.argv[:1], *(value(case.argv, flag) for flag in INPUTS)]
    mine = [out, log, *(value(case.argv, flag) for flag in ("--json", "--plot"))]
    inputs = [os.path.normpath(path) for path in given if path]
    for path in sorted(before):
        gone = before[path] != after.get(path)
        if gone and (path not in mine or path in inputs or os.path.dirname(path) in inputs):
            found.append("an input or another's file was changed")
        if gone and path == log and code == 2 and before.get(out) == after.get(out):
            found.append("an old log was lost")
    found += ["a .partial is left over" for path in written if ".partial" in path]
    texts = (out,) if case.module == "sample" else ()  # under any name
    found += ["a file is not whole" for path in written
              if path not in texts and not whole(path, after[path])]
    return found


def faults_of_words(code, out, err):
    """What a command must not have said; out and err: text."""
    found, lines = [], err.splitlines()
    errors = [line for line in lines if "error: " in line]
    if "Traceback" in err:
        found.append("a traceback")
    elif code == 2 and (len(errors) != 1 or lines[-1:] != errors):
        found.append("the error is not one last line")
    if any(not (c.isprintable() or c in "\n\r\t") for c in err + out):
        found.append("control characters")
    return found


def run_case(kind, seed, number, toys, keep=None):
    """Make and run a case: it, its exit code, and its faults, a list of texts."""
    rng, fault = random.Random(f"{seed} {kind} {number}"), None
    with tempfile.TemporaryDirectory() as scratch:
        folder, says = pathlib.Path(keep or scratch, "work"), pathlib.Path(keep or scratch, "says")
        shutil.copytree(toys, folder)
        says.mkdir()
        with warnings.catch_warnings(action="ignore"):
            case = KINDS[kind](rng, folder)
        before = snapshot(folder)
        code, termed = forked(lambda: as_a_program(case.module, case.argv, folder, says),
                              KILL_AFTER, TERM_AFTER)
        after = snapshot(folder)
        out, err = ((says / name).read_text("utf-8", "replace") for name in ("stdout", "stderr"))
        if (says / "fault").exists():
            fault = (says / "fault").read_text()
    found = faults_of_words(code, out, err) + faults_of_files(case, code, before, after)
    if fault:
        found = [fault, *(text for text in found if text != "a traceback")]
    elif code not in (0, 2) and not (termed and code == 143):
        found.append(f"exit code {code}")
    if case.must_refuse and code == 0:
        found.append("a flipped bit went unnoticed")
    return case, code, found


@contextlib.contextmanager
def make_toys():
    """A folder with a corpus, a text, a FASTA file, results, and three tiny models in out/."""
    def in_a_child():
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        for argv in (["--out", "out/teacher.pt"], ["--out", "out/causal.pt", "--causal"]):
            importlib.import_module("train_teacher").main([*COMMANDS["train_teacher"], *argv])
        importlib.import_module("distill").main([*COMMANDS["distill"], "--out", "out/student.pt"])
        os._exit(0)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        lines = [f"def f{i}(a, b={i}):" for i in range(80)]
        corpus.write_rows("corpus", lines, "signatures", "bytes", 24, {})
        text = "".join(f"Text {i} says {i * i}, caf\xe9.\n<|endoftext|>\n" for i in range(99))
        pathlib.Path("text.txt").write_text(text, "utf-8")
        records = [f">p{i}\nACDEFGHIK{'LMNPQRST'[i % 8]}{'VWY'[i % 3]}\n" for i in range(99)]
        pathlib.Path("p.fasta").write_text("".join(records))
        rows = [{"row": "held-out data", "entropy": 1.0, "post": 0.9}]
        rows += [{"row": row, "steps": steps, "T": T, "nfe": 3.5, "entropy": T, "post": T / steps}
                 for row in ("teacher", "student") for steps, T in ((8, 1.0), (8, 0.8), (4, 1.0))]
        run = {"rows": rows, "flags": {"sweep": True, "seed": 0}, "training": {}}
        pathlib.Path("r.json").write_text(json.dumps({"default": {"0": run, "1": run}}))
        if forked(in_a_child)[0] != 0:
            raise ValueError("the models to spoil cannot be made: run the tests")
        yield folder


# --------------------------------------------------------------------------------------- the script
def fuzz(args, kind, toys):
    """All cases of a kind; prints the failing ones as they come. {how it ended: cases}, failing."""
    ends, failing, begin = collections.Counter(), collections.Counter(), time.monotonic()
    for number in tqdm(range(args.count), kind, disable=None):
        if time.monotonic() - begin > 60 * args.minutes:
            break
        case, code, found = run_case(kind, args.seed, number, toys)
        name = {0: "done", 2: "refused", 143: "stopped when asked"}.get(code, f"exit code {code}")
        ends["failing" if found else name] += 1
        for fault in sorted(set(found)):
            failing[fault] += 1
            tqdm.write(f"{kind} --seed {args.seed} --only {number}: {fault}: {case.module} "
                       f"{ascii(case.argv)[:200]}", sys.stdout)
    ended = ", ".join(f"{n} {name}" for name, n in ends.most_common())
    print(f"{kind}: {ends.total()} cases in {time.monotonic() - begin:.0f} s: {ended}", flush=True)
    return ends, failing


def show(args, toys):
    """Run one case again, with all that it says; its files are kept."""
    keep = tempfile.mkdtemp()
    case, code, found = run_case(args.kinds[0], args.seed, args.only, toys, keep)
    print(f"{case.module} {ascii(case.argv)}\nexit code {code}, faults: {found}, files: {keep}")
    for name in ("stdout", "stderr"):
        text = pathlib.Path(keep, "says", name).read_text("utf-8", "replace")
        print(f"{name}:\n" + text.encode("unicode_escape").decode().replace("\\n", "\n"))
    return found


def parse_flags(argv=None):
    p, add = make_parser("Nonsense for every command.")
    add("--count", type=FROM_1, default=2500, help="cases of each kind")
    add("--minutes", type=RATE, default=60.0, help="stop each kind then")
    add("--only", type=FROM_0, help="run the case of this number alone, and show it")
    return parse_kinds(p, add, KINDS, argv)


def parse_kinds(p, add, kinds, argv):
    """The flags of p and, of this script and of kill.py, which of the kinds and what seed."""
    add("kinds", nargs="*", default=list(kinds), help=f"some of {', '.join(kinds)} [all]")
    add("--seed", type=FROM_0, default=0, help="makes the same cases again")
    args = p.parse_args(argv)
    if set(args.kinds) - set(kinds):
        raise ValueError(f"there are no such kinds, choose some of {', '.join(kinds)}")
    return args


def main(argv=None):
    args, total = parse_flags(argv), collections.Counter()
    torch.set_num_threads(1)
    with make_toys() as toys:
        if args.only is not None:
            total.update(show(args, toys))
            args.kinds = []
        for kind in args.kinds:
            total += fuzz(args, kind, toys)[1]
    for fault, n in total.most_common():
        print(f"{n:6} {fault}")
    if total:
        raise ValueError("there are faults: run one again with the line above")


if __name__ == "__main__":
    run_script(main)
