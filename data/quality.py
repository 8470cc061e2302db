"""quality.py - measure samples without another model: quality(x, corpus).

Most measures compare with the validation split. Those over many samples, which catch a collapse,
depend on their number: compare them with the value for the same number of training sequences. A
measure is a function of texts or of token ids; statistics of held-out data are cached.
"""
import functools
import math
import re
from collections import Counter, defaultdict
from statistics import fmean

import numpy as np
import torch

from data.corpus import read_sequences
from data.signatures import is_signature

ANNOTATION = re.compile(r"[(,]\s*\**\w+\s*:")  # of an argument

HELD_OUT = 1000  # passages of real text that samples are compared with
COMMON = 1000  # most frequent words; all others are rare
WORD = re.compile(r"[^\W\d_]+")
QUOTE = re.compile(r"[\"\u201c\u201d]")
SENTENCE_END = re.compile(r"[.!?][\"\u201d]?(?=\s|$)")

K, SAME = 5, 0.5  # a protein is novel if no training sequence has half of its 5-mers
WINDOW, LOW = 12, 2.2  # low complexity: 12 residues below 2.2 bits, SEG's trigger


# ------------------------------------------------------------------------------------- statistics
def entropy(sequence):
    """Return the entropy, nats, of the items of a sequence or Counter; 0 if it is empty."""
    counts = Counter(sequence)
    total = counts.total()
    return -sum(n / total * math.log(n / total) for n in counts.values())


def ngrams(sequences, n):
    """Return a Counter of the overlapping n-grams, tuples, pooled over all sequences."""
    counts = Counter()
    for s in sequences:
        counts.update(zip(*(s[i:] for i in range(n))))
    return counts


def shares(ours, theirs):
    """Return the shares (2, items), float64, of the sorted items in two iterables or Counters."""
    counters = [Counter(ours), Counter(theirs)]
    items = sorted(counters[0] | counters[1])
    counts = torch.tensor([[counter[item] for item in items] for counter in counters]).double()
    return counts / counts.sum(1, keepdim=True)


def jensen_shannon(ours, theirs):
    """Return the Jensen-Shannon divergence, nats, between two Counters; ln 2 if one is empty."""
    if not ours or not theirs:
        return math.log(2)
    both = shares(ours, theirs)
    entr = torch.special.entr  # -p log p
    return (entr(both.mean(0)) - entr(both).mean(0)).sum().item()


def total_variation(ours, theirs):
    """Return the total variation, 0 to 1, between the shares of items in two iterables."""
    return shares(ours, theirs).diff(dim=0).abs().sum().item() / 2


def ks(ours, theirs):
    """Return the Kolmogorov-Smirnov statistic: the largest gap between cumulative shares."""
    return shares(ours, theirs).diff(dim=0).cumsum(1).abs().max().item()


def distinct(texts):
    """Return the number of different texts divided by the number of texts."""
    return len(set(texts)) / len(texts)


@functools.lru_cache
def val_ngrams(corpus, n):
    """Return a Counter of the n-grams of the validation texts."""
    return ngrams(corpus.texts("val"), n)


# -------------------------------------------------------------------------------------- signatures
def kind(text):
    """Return what makes a line hard: (has a return type, has a default or an annotation)."""
    return "->" in text, "=" in text or has_hint(text)


def has_hint(text):
    """Return whether an argument has an annotation."""
    return bool(ANNOTATION.search(text))


def features(text):
    """Return the cell for `tv`: six features that one sees at a glance."""
    return ("->" in text, "=" in text, has_hint(text), "(self" in text,
            min(text.count(","), 2), text.lower() != text)


def post(texts, real):
    """Return `valid`, post-stratified: each kind is weighted by its share of the real texts.

    A kind without texts counts as invalid, so that avoiding it gains nothing.
    """
    valid = defaultdict(list)
    for text in texts:
        valid[kind(text)].append(is_signature(text))
    count = Counter(map(kind, real))
    return sum(count[k] * fmean(valid[k]) for k in valid) / len(real)


def rare(texts, real):
    """Return the frequency of rare characters in texts, divided by that in real ones.

    A character is rare, as most digits and capitals are, if it makes up less than one in 200 of
    the real ones. A low temperature loses them. At least one is counted on either side.
    """
    counts = Counter("".join(real))
    common = {c for c, n in counts.items() if n >= counts.total() / 200}

    def share(characters):
        number = sum(c not in common for c in characters)
        return max(number, 1) / max(len(characters), 1)
    return share("".join(texts)) / share("".join(real))


def measure_signatures(x, corpus):
    """Return the measures of samples x (B, L) of signatures.

    valid: share that Python's parser accepts; tv: total variation of the `features`' joint cells;
    js3: Jensen-Shannon divergence of pooled 3-grams, nats; ks: Kolmogorov-Smirnov statistic of the
    lengths; returns, hints, methods: shares with `->`, with an annotation, with `(self`; novel:
    share not in the training split; length: characters; entropy: within a text, nats.
    """
    texts = corpus.decode(x)
    real = corpus.texts("val")
    known = set(corpus.texts("train"))
    return {
        "valid": fmean(map(is_signature, texts)),
        "post": post(texts, real),
        "tv": total_variation(map(features, texts), map(features, real)),
        "js3": jensen_shannon(ngrams(texts, 3), val_ngrams(corpus, 3)),
        "ks": ks(map(len, texts), map(len, real)),
        "rare": rare(texts, real),
        "returns": fmean("->" in text for text in texts),
        "hints": fmean(map(has_hint, texts)),
        "methods": fmean("(self" in text for text in texts),
        "novel": 1 - fmean(text in known for text in texts),
        "distinct": distinct(texts),
        "length": fmean(map(len, texts)),
        "entropy": fmean(map(entropy, texts)),
    }


# -------------------------------------------------------------------------------------------- text
@functools.lru_cache
def common_words(corpus, L):
    """Return the set of most frequent words, lower case, in passages across the training split."""
    last = corpus.count(corpus.train, L, L) - 1
    index = np.linspace(0, last, HELD_OUT).astype(int)
    passages = corpus.decode(read_sequences(corpus.train, index, L, L))
    words = Counter(WORD.findall(" ".join(passages).lower()))
    return {word for word, _ in words.most_common(COMMON)}


def traits(passages, common):
    """Return (N, 6): sentence ends, capitals, share of rare words; capitals, digits, quotes."""
    values = []
    for passage in passages:
        words = WORD.findall(passage.lower())
        rare_words = sum(word not in common for word in words)
        capitals = sum(map(str.isupper, passage))
        values.append((
            len(SENTENCE_END.findall(passage)), capitals, rare_words / max(len(words), 1),
            capitals, sum(map(str.isdigit, passage)), len(QUOTE.findall(passage)),
        ))
    return np.array(values)


def cells(values, cuts):
    """Return N tuples that say which of the traits (N, 6) are above their cuts (6,)."""
    return list(map(tuple, (values > cuts).tolist()))


@functools.lru_cache
def real_passages(corpus, L):
    """Return the cuts (6,) of validation passages' traits, their cells, and a Counter of 3-grams.

    The first three traits are cut at their medians, the others at 0: present or not. More classes,
    such as thirds, would show less: with 1,000 passages in more cells, tv is mostly chance.
    """
    x = corpus.held_out(HELD_OUT, L)
    values = traits(corpus.decode(x), common_words(corpus, L))
    cuts = np.median(values, axis=0)
    cuts[3:] = 0
    return cuts, cells(values, cuts), ngrams(x.tolist(), 3)


def repeated(ids):
    """Return the share of a text's 4-grams that occurred earlier in it; 0 if it has none."""
    counts = ngrams([ids], 4)
    return (counts.total() - len(counts)) / max(counts.total(), 1)


def measure_text(x, corpus):
    """Return the measures of samples x (B, L) of packed text.

    entropy: of the tokens within a text, nats; bigram: of the pairs of tokens, pooled over texts,
    nats; rep4: share of a text's 4-grams that occurred in it before; js3: Jensen-Shannon
    divergence of pooled 3-grams of tokens, nats; tv: total variation of the joint cells of six
    yes/no traits: more sentence ends, more capitals, a larger share of words not among the 1,000
    most frequent than the median validation passage has; any capital, digit, double quote. bigram
    and js3 also depend on L. With GPT-2's tokens js3 is near its maximum, ln 2 = 0.693, even for
    real passages, as most of their 3-grams are unique.
    """
    L = x.shape[1]
    passages = corpus.decode(x)
    ids = x.tolist()
    cuts, real_cells, real_ngrams = real_passages(corpus, L)
    values = traits(passages, common_words(corpus, L))
    return {
        "entropy": fmean(map(entropy, ids)),
        "distinct": distinct(passages),
        "bigram": entropy(ngrams(ids, 2)),
        "rep4": fmean(map(repeated, ids)),
        "js3": jensen_shannon(ngrams(ids, 3), real_ngrams),
        "tv": total_variation(cells(values, cuts), real_cells),
    }


# ---------------------------------------------------------------------------------------- proteins
@functools.lru_cache
def kmer_index(corpus):
    """Return {5-mer: numbers of the training sequences that contain it}."""
    index = defaultdict(list)
    for number, text in enumerate(corpus.texts("train")):
        for kmer in ngrams([text], K):
            index[kmer].append(number)
    return index


def best_match(text, index):
    """Return the largest share of a sequence's 5-mers that one training sequence contains."""
    kmers = ngrams([text], K)
    hits = Counter(number for kmer in kmers for number in index.get(kmer, ()))
    return max(hits.values(), default=0) / max(len(kmers), 1)


def is_low(text):
    """Return whether a window has low complexity (Wootton and Federhen 1993)."""
    return any(entropy(window) < LOW * math.log(2) for window in ngrams([text], WINDOW))


def measure_proteins(x, corpus):
    """Return the measures of samples x (B, L) of proteins.

    ks: Kolmogorov-Smirnov statistic of the lengths; js1, js2: Jensen-Shannon divergence of the
    amino acids and of their pairs, nats; novel: share with fewer than half of their 5-mers in any
    one training sequence; low: share with a stretch of low complexity; length: residues;
    entropy: within a sequence, nats.
    """
    texts = corpus.decode(x)
    return {
        "ks": ks(map(len, texts), map(len, corpus.texts("val"))),
        "js1": jensen_shannon(ngrams(texts, 1), val_ngrams(corpus, 1)),
        "js2": jensen_shannon(ngrams(texts, 2), val_ngrams(corpus, 2)),
        "novel": fmean(best_match(text, kmer_index(corpus)) < SAME for text in texts),
        "low": fmean(map(is_low, texts)),
        "distinct": distinct(texts),
        "length": fmean(map(len, texts)),
        "entropy": fmean(map(entropy, texts)),
    }


# ------------------------------------------------------------------------------------- all of them
MEASURES = {"signatures": measure_signatures, "text": measure_text, "fasta": measure_proteins}
SHOWN = {  # what training tables show
    "signatures": ("valid", "post", "tv", "js3"),
    "text": ("entropy", "rep4", "js3", "tv"),
    "fasta": ("ks", "js2", "length", "entropy"),
}


def quality(x, corpus):
    """Return all measures, {name: value}, of samples x (B, L) against a Corpus."""
    return MEASURES[corpus.maker](x, corpus)


def shown(x, corpus):
    """Return only the measures that training tables show."""
    measures = quality(x, corpus)
    return {name: measures[name] for name in SHOWN[corpus.maker]}
