"""test_didi.py - the method against exact answers, in worlds of 3 tokens and 2 or 3 positions that can be enumerated.

A "network" here is a lookup table: row index(z) of a tensor (S, L, V) holds its logits for the state z, S = (V+1)^L. So the law of
every sampler is a product of small matrices, and its gradient comes from autograd. Seeds are fixed; a bound on random numbers is
wide enough that a fresh seed would fail a correct program less than once in 10^5 (5 standard errors, or `check_law`).
The two tests of an effect (the whole loop, guidance) ask for well less than what was seen with a dozen other seeds.
"""
import collections
import functools
import gzip
import http.server
import importlib.util
import io
import itertools
import json
import lzma
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from torch.distributions import Beta, Categorical, kl_divergence

import didi
import distill
import model
import sample
import train_teacher

torch.set_num_threads(1)
V, MASK = 3, 3
Z = {L: torch.cartesian_prod(*[torch.arange(V + 1)] * L) for L in (2, 3)}  # every state, (S, L)
both_positions = pytest.mark.parametrize("positions", ["masked", "all"])


# ------------------------------------------------------------------------------------------------- a world of lookup tables
def index(z):
    """The row of each state z (.., L) in Z[L]."""
    return (z * (V + 1) ** torch.arange(z.shape[-1], device=z.device).flip(0)).sum(-1)


def lookup(table):
    def denoiser(z, where=None):
        logits = table[index(z)]  # (B, L, V)
        return logits if where is None else logits[where] if where.dtype == torch.bool else logits.flatten(0, 1)[where]
    return denoiser


def masks(n, L):
    return torch.full((n, L), MASK)


def random_data(L):
    """A joint law over texts with correlated positions, as a vector (S,) that is 0 on states with masks."""
    p = (torch.rand(len(Z[L])) ** 3 + 0.01) * (Z[L] != MASK).all(-1)
    return p / p.sum()


def stutter(L):
    """A fixed joint law (S,): neighbours like to be equal, and token 0 is the most common. Far from what one step can write."""
    likes = 2.0 * (Z[L][:, 1:] == Z[L][:, :-1]).sum(-1) + 0.8 * (Z[L] == 0).sum(-1)
    p = likes.exp() * (Z[L] != MASK).all(-1)
    return p / p.sum()


def agrees(L):
    """(S, S): could the state of the row be the text of the column with some tokens masked?"""
    return ((Z[L][:, None] == Z[L]) | (Z[L][:, None] == MASK)).all(-1).float()


def exact_table(p, L):
    """Bayes' rule: logits (S, L, V) of the best denoiser of p, log sum over agreeing texts of p(x) [x_i = v]."""
    return torch.einsum("zx,x,xlv->zlv", agrees(L), p, F.one_hot(Z[L])[..., :V].float()).clamp(min=1e-20).log()


def per_position(visible, masked, L):
    """(S, S) matrix of a step that acts on each position alone, by tables (S, L, V+1) for visible and for masked positions."""
    q = torch.where((Z[L] == MASK)[..., None], masked, visible)
    return q[:, torch.arange(L), Z[L]].prod(-1)


def noising(s, t, L):
    """q(z_t | z_s), (S, S): a visible token is masked with probability (t - s)/(1 - s)."""
    same, m = F.one_hot(Z[L]).float(), (t - s) / (1 - s)
    return per_position(same * (1 - m) + m * F.one_hot(torch.tensor(MASK)), same, L)


def denoising(table, t, s):
    """The sampler's law of z_s given z_t, (S, S), differentiable: a mask stays with probability s/t."""
    L = table.shape[1]
    return per_position(F.one_hot(Z[L]).float(), F.pad(table.softmax(-1) * (1 - s / t), (0, 1), value=s / t), L)


def chain(table, times, start=None):
    """Law (S,) of the state after the steps times[0] -> times[1] -> .., from `start` (L,) or from all masks."""
    law = F.one_hot(index(masks(1, table.shape[1])[0] if start is None else start), len(table)).float()
    for t, s in zip(times[:-1], times[1:]):
        law = law @ denoising(table, t, s)
    return law


def check_law(drawn, law):
    """Chi-square test of drawn indices (n,) against law (S,), rare cells merged; false alarm 10^-6 (Wilson-Hilferty)."""
    counts, expected = torch.bincount(drawn, minlength=len(law)).double(), law.double() * len(drawn)
    assert counts[law == 0].sum() == 0, "drew something impossible"
    rare, most = expected < 10, expected.argmax()
    for cells in (counts, expected):
        cells[most] += cells[rare].sum()
    df = int((~rare).sum()) - 1
    chi2 = ((counts - expected) ** 2 / expected)[~rare].sum()
    assert df > 0 and chi2 < df * (1 - 2 / (9 * df) + 4.75 * (2 / (9 * df)) ** 0.5) ** 3


def check_mean(values, expected):
    assert abs(values.mean() - expected) < 5 * values.std() / len(values) ** 0.5


class TableDiscriminator:
    """Logits r (S, L); for soft tokens their mean over independent draws (multilinear in probs). Counts the rows it is shown."""

    def __init__(self, r):
        self.r, self.rows = r, 0

    def __call__(self, z):
        self.rows += len(z)
        return self.r[index(z)]

    def soft(self, z, where, probs):
        self.rows += len(z)
        p = F.one_hot(z, V + 1).float()
        p = p.masked_scatter(where[..., None].expand_as(p), F.pad(probs, (0, 1)))  # (B, L, V+1)
        L = z.shape[1]
        return p[:, torch.arange(L), Z[L]].prod(-1) @ self.r  # (B, S) @ (S, L)


# ----------------------------------------------------------------------------------------------------------- masked diffusion
def test_forward_mask_masks_a_share_t():
    torch.manual_seed(0)
    x, t, n = torch.randint(0, V, (4, 20000)), torch.tensor([0.0, 0.2, 0.7, 1.0]), 20000
    z = didi.forward_mask(x, t, MASK)
    rate = (z == MASK).float().mean(1)
    assert rate[0] == 0 and rate[3] == 1 and ((rate - t).abs() <= 5 * (t * (1 - t) / n).sqrt()).all()
    assert ((z == x) | (z == MASK)).all()
    assert abs((didi.forward_mask(x, 0.2, MASK) == MASK).float().mean() - 0.2) < 5 * (0.16 / (4 * n)) ** 0.5


def test_low_discrepancy_times(monkeypatch):
    torch.manual_seed(0)
    t = torch.stack([didi.low_discrepancy_times(4) for _ in range(4000)])
    assert torch.allclose(t.sort(1).values.diff(dim=1), torch.tensor(0.25), atol=1e-6)  # one in each stratum
    for b in range(4):
        check_law((t[:, b] * 10).long().clamp(max=9), torch.full((10,), 0.1))  # each one uniform
    for u in (0.0, 1 - 2.0 ** -24):  # the extremes of torch.rand
        monkeypatch.setattr(torch, "rand", lambda *size, **kw: torch.tensor(u))
        for t in (didi.low_discrepancy_times(B) for B in (1, 3, 64)):
            assert (t > 0).all() and (t <= 1).all()


def test_nelbo_of_the_exact_denoiser_is_the_entropy_of_the_data():
    torch.manual_seed(0)
    p = random_data(2)
    table, H, x = exact_table(p, 2), Categorical(p).entropy(), Z[2][Categorical(p).sample((60, 4000))]
    check_mean(torch.stack([didi.nelbo(lookup(table), b, MASK)[0] for b in x]) * 2, H)
    worse = table + 0.5 * torch.randn(16, 2, 3)
    assert torch.stack([didi.nelbo(lookup(worse), b, MASK)[0] for b in x]).mean() * 2 > H + 0.02


def test_nelbo_is_the_weighted_sum_and_its_second_value_the_mean_over_masks():
    torch.manual_seed(0)
    table, x, t = torch.randn(16, 2, 3, requires_grad=True), torch.randint(0, V, (6, 2)), torch.linspace(0.3, 0.8, 6)
    torch.manual_seed(1)
    z = didi.forward_mask(x, t, MASK)
    torch.manual_seed(1)  # the same masks again
    bound, mean_nll = didi.nelbo(lookup(table), x, MASK, t)
    nll = [(-table[index(z[b])][i].log_softmax(-1)[x[b, i]], t[b]) for b in range(6) for i in range(2) if z[b, i] == MASK]
    assert 0 < len(nll) < 12
    assert torch.isclose(bound, sum(n / tb for n, tb in nll) / x.numel())
    assert torch.isclose(mean_nll, sum(n for n, _ in nll) / len(nll))
    nothing_masked = didi.nelbo(lookup(table), x, MASK, torch.zeros(6))
    assert torch.stack(nothing_masked).tolist() == [0, 0]
    assert (torch.autograd.grad(sum(nothing_masked), table)[0] == 0).all()
    for size in (12, 11):  # of 12 positions; fewer are masked
        torch.manual_seed(1)
        fixed = didi.nelbo(lookup(table), x, MASK, t, size)
        assert torch.isclose(fixed[0], bound) and torch.isclose(fixed[1], mean_nll)
        assert torch.allclose(*(torch.autograd.grad(value, table, retain_graph=True)[0] for value in (fixed[0], bound)))


@pytest.mark.parametrize("B, L", [(1, 3), (8, 24), (64, 48), (32, 1024)])
def test_most_masks_are_enough_and_few(B, L, monkeypatch):
    torch.manual_seed(0)
    size, rand = didi.most_masks(B, L), torch.rand
    assert size <= B * L and (B * L < 3000 or size < 0.57 * B * L)
    for u in torch.linspace(0, 1 - 2.0 ** -24, 20):  # of low_discrepancy_times: all it can draw
        monkeypatch.setattr(torch, "rand", lambda *shape, u=u, **kw: u if shape == ((),) else rand(*shape, **kw))
        t = didi.low_discrepancy_times(B)
        assert max((didi.forward_mask(torch.zeros(B, L), t, MASK) == MASK).sum() for _ in range(5)) <= size


@pytest.mark.parametrize("causal", [False, True])
def test_a_compiled_loss_is_one_graph_whatever_is_masked(causal):
    torch._dynamo.reset()
    graphs = []
    torch.manual_seed(0)
    net = model.Denoiser(model.Config(V, 24, 1, 2, 16, causal))
    net.bf16 = True
    compiled = torch.compile(train_teacher.losses, fullgraph=True, dynamic=False, backend=lambda g, _: graphs.append(g) or g.forward)
    for seed in range(4):
        x = torch.randint(V, (8, 24))
        torch.manual_seed(seed)
        eager = train_teacher.losses(net, net.config, x)
        torch.manual_seed(seed)
        assert torch.allclose(torch.stack(compiled(net, net.config, x, didi.most_masks(8, 24))), torch.stack(eager), rtol=1e-2)
    assert len(graphs) == 1


# ------------------------------------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize("independent", [True, False])
def test_ancestral_step_is_bayes_rule(independent):
    """q(z_s | z_t) from the forward process, for every z_t: the whole law if positions are independent, else marginals."""
    torch.manual_seed(0)
    t, s, (a, b) = 0.8, 0.3, torch.tensor([[0.6, 0.3, 0.1, 0.0], [0.2, 0.1, 0.7, 0.0]])
    p = torch.outer(a, b).flatten() if independent else random_data(2)
    joint = (p @ noising(0, s, 2))[:, None] * noising(s, t, 2)  # (z_s, z_t)
    bayes = (joint / joint.sum(0)).T  # (z_t, z_s)
    start = torch.randint(0, 16, (40000,))
    end, called = didi.ancestral_step(lookup(exact_table(p, 2)), Z[2][start], t, s, MASK)
    assert torch.equal(called, (end != Z[2][start]).any(1))
    for i in range(2):
        check_law(start * 4 + end[:, i], (bayes @ F.one_hot(Z[2][:, i]).float()).flatten() / 16)
    if independent:
        assert torch.allclose(bayes, denoising(exact_table(p, 2), t, s), atol=1e-5)
        check_law(start * 16 + index(end), bayes.flatten() / 16)
    still, called = didi.ancestral_step(None, masks(50, 3), t, t, MASK)  # no time passes: nothing revealed, nobody asked
    assert (still == MASK).all() and not called.any()


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampler_draws_from_the_enumerated_chain(steps, temperature):
    torch.manual_seed(0)
    table, times = torch.randn(64, 3, 3), [1 - k / steps for k in range(steps + 1)]
    for start in (masks(1, 3)[0], torch.tensor([MASK, 1, MASK])):
        x, _ = didi.sample(lookup(table), start.repeat(20000, 1), steps, MASK, temperature)
        check_law(index(x), chain(table / temperature, times, start))


@pytest.mark.parametrize("steps", [1, 2, 4, 40])
def test_nfe_counts_real_calls_and_what_is_visible_stays(steps):
    torch.manual_seed(0)
    B, L, M = 12, 6, 20  # M: the mask. The first token is visible and names the row, so that the counter knows who asked
    z = torch.full((B, L), M)
    z[:, 0] = torch.arange(B)
    for b in range(B):
        z[b, 1 + b % L:] = 0  # rows with 0 to 5 masks
    n, asked, heads, states = (z == M).sum(1), collections.Counter(), [], [z.clone()]

    def denoiser(z, where):
        asked.update(z[:, 0].tolist())
        heads.append(int(where.sum()))
        assert (z[where] == M).all()
        return torch.randn(heads[-1], M)
    x, nfe = didi.sample(denoiser, z, steps, M, on_step=states.append)
    assert nfe.tolist() == [asked[b] for b in range(B)]
    assert (nfe <= n.clamp(max=steps)).all() and ((nfe > 0) == (n > 0)).all() and (steps < 40 or (nfe >= n - 1).all())
    assert sum(heads) == n.sum()  # every mask passes the head once
    assert (x != M).all() and len(states) == steps + 1 and torch.equal(states[-1], x)
    for before, after in zip(states[:-1], states[1:]):
        assert torch.equal(after[before != M], before[before != M])
    assert torch.equal(z, states[0])  # the caller's own tensor is left alone


def usual_sample(denoiser, z, steps, mask_id, until=None):
    """The usual sampler, an independent reference: head at every position, in each step one categorical over V + 1 outcomes in
    float64, and one more call at the end for what is still masked. `until` stops after so many steps, for timing."""
    for k in range(until or steps):
        t, s = 1 - k / steps, 1 - (k + 1) / steps
        p_x = denoiser(z).double().softmax(-1)  # (B, L, V)
        p = torch.cat((p_x * ((t - s) / t), torch.full_like(p_x[..., :1], s / t)), -1)  # the last outcome: stay masked
        z = torch.where(z == mask_id, (p / torch.empty_like(p).exponential_()).argmax(-1), z)
    return torch.where(z == mask_id, denoiser(z).argmax(-1), z)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_usual_sampler_draws_from_the_same_law(steps):
    torch.manual_seed(0)
    table = torch.randn(64, 3, 3)
    law = chain(table, [1 - k / steps for k in range(steps + 1)])
    check_law(index(usual_sample(lookup(table), masks(20000, 3), steps, MASK)), law)
    check_law(index(didi.sample(lookup(table), masks(20000, 3), steps, MASK)[0]), law)


def test_less_than_one_step_is_refused():
    for call in (lambda: didi.sample(None, masks(1, 2), 0, MASK), lambda: didi.guided_sample(None, None, masks(1, 2), 0, MASK, "all")):
        with pytest.raises(ValueError, match="steps"):
            call()


# -------------------------------------------------------------------------------------------------------------------- rollout
@pytest.mark.parametrize("a", [1.0, 2.0])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_draw_levels(K, a):
    torch.manual_seed(0)
    t = torch.tensor([1.0, 0.6]).repeat_interleave(40000)
    levels, tau, pi = didi.draw_levels(t, K, a, a)
    assert levels.shape == (K + 1, len(t)) and torch.equal(levels[0], t) and (levels[-1] == 0).all()
    assert (levels.diff(dim=0) < 0).all() and (K == 1 or torch.equal(tau, levels[-2]))
    above = levels[-3] if K > 1 else t  # tau is a Beta fraction of the level above, and pi its density given that level
    assert torch.allclose(pi, Beta(a, a).log_prob(tau / above).exp() / above, rtol=1e-4)
    for top in (1.0, 0.6) if K < 3 else ():  # and tau is drawn by pi: E[1/pi; lo < tau < hi] = hi - lo
        for lo, hi in ((0.1 * top, 0.4 * top), (0.4 * top, 0.5 * top)):
            check_mean((((tau > lo) & (tau < hi)) / pi)[t == torch.tensor(top)], hi - lo)


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("G", [1, 3])
def test_rollout_log_prob_is_that_of_the_tokens_revealed(G, K):
    """Recomputed from the states alone, with its gradient; every row has its own levels, and some have nothing to reveal."""
    torch.manual_seed(0)
    B, table, z = 40, torch.randn(64, 3, 3, requires_grad=True), Z[3][torch.randint(0, 64, (40,))]
    z[0], z[1] = MASK, 0
    x, steps = didi.rollout(lookup(table), z, didi.draw_levels(torch.linspace(0.2, 1, B), K)[0], MASK, G)
    states = [z.repeat_interleave(G, 0)] + [step[0] for step in steps[1:]] + [x]
    assert len(steps) == K and torch.equal(steps[0][0], z) and x.shape == (B * G, 3) and (x != MASK).all()
    for (entered, where, log_p_x, log_prob), before, after in zip(steps, states[:-1], states[1:]):
        assert torch.equal(where, entered == MASK) and torch.allclose(log_p_x, table[index(entered)][where].log_softmax(-1))
        assert torch.equal(after[before != MASK], before[before != MASK])
        log_p = table[index(before)].log_softmax(-1)  # (B*G, L, V)
        by_hand = torch.stack([sum([log_p[b, i, after[b, i]] for i in range(3) if before[b, i] != after[b, i]], torch.zeros(()))
                               for b in range(B * G)])
        assert torch.allclose(log_prob, by_hand, atol=1e-5) and (log_prob[G:2 * G] == 0).all()
        mix = torch.randn(B * G)
        ours, theirs = (torch.autograd.grad(v @ mix, table, retain_graph=True)[0] for v in (log_prob, by_hand))
        assert theirs.abs().max() > 0.1 and torch.allclose(ours, theirs, atol=1e-4)


def test_rollout_keeps_each_rows_own_levels():
    torch.manual_seed(0)
    levels, G = torch.tensor([[1.0, 1.0], [0.8, 0.4], [0.1, 0.3], [0.0, 0.0]]), 5000
    _, steps = didi.rollout(lookup(torch.zeros(16, 2, 3)), masks(2, 2), levels, MASK, G)
    for k in (1, 2):
        share = (steps[k][0] == MASK).float().view(2, -1).mean(1)
        assert ((share - levels[k]).abs() < 5 * (0.25 / (2 * G)) ** 0.5).all()


@pytest.mark.parametrize("K", [1, 2, 3])
def test_rollout_law_and_policy_gradient_are_exact(K):
    """The gradient of the expected reward, by autograd through the enumerated chain, is that of policy_loss, with the sign turned,
    on all trajectories weighted by their probability. The trajectories come from `rollout`, which must draw them by that law."""
    torch.manual_seed(0)
    B, G, table, R = 4000, 4, (0.5 * torch.randn(16, 2, 3)).requires_grad_(), torch.randn(16)
    times = [1.0, 0.6, 0.3][:K] + [0.0]
    x, steps = didi.rollout(lookup(table), masks(B, 2), torch.tensor(times)[:, None].expand(-1, B), MASK, G)
    path = torch.stack([index(z) for z in [masks(B * G, 2)] + [step[0] for step in steps[1:]] + [x]])  # (K+1, B*G)
    moves = [denoising(table.detach(), t, s) for t, s in zip(times[:-1], times[1:])]
    prob = torch.stack([move[path[k], path[k + 1]] for k, move in enumerate(moves)]).prod(0)  # (B*G,)
    kinds, kind = torch.unique(path, dim=1, return_inverse=True)
    one_each = torch.zeros(kinds.shape[1], dtype=torch.long).scatter_(0, kind, torch.arange(B * G))
    assert torch.isclose(prob[one_each].sum(), torch.tensor(1.0), atol=1e-4)  # every possible trajectory was seen
    check_law(kind, prob[one_each])
    pair, law = path[1].view(-1, 2), moves[0][path[0, 0]]  # members of a group share their start and nothing else
    check_law(pair[:, 0] * 16 + pair[:, 1], torch.outer(law, law).flatten())
    log_prob = sum(step[3] for step in steps)[one_each]
    loss = didi.policy_loss(log_prob, R[index(x)][one_each], prob[one_each] * len(one_each), L=2)
    ours, = torch.autograd.grad(loss, table)
    exact, = torch.autograd.grad(chain(table, times) @ R, table)
    assert exact.abs().max() > 0.01 and torch.allclose(-ours * 2, exact, atol=1e-5)


# --------------------------------------------------------------------------------------------------- discriminator and reward
def test_what_enters_the_reward_and_the_loss():
    logits, z = torch.tensor([[1.0, 2.0, 6.0], [1.0, 2.0, 6.0]], requires_grad=True), torch.tensor([[MASK, 0, MASK], [0, 1, 2]])
    assert didi.pool(logits, z, MASK, "masked").tolist() == [3.5, 0.0]  # a row without masks gives 0
    assert didi.pool(logits, z, MASK, "all").tolist() == [3.0, 3.0]
    assert didi.reward(logits * 9, z, MASK, "all").tolist() == [8.0, 8.0]
    assert didi.reward(-logits * 9, z, MASK, "masked", clip=5).tolist() == [-5.0, 0.0]
    assert not didi.reward(logits, z, MASK, "all").requires_grad
    even, odd, ln2 = torch.zeros(2, 3), torch.tensor([[0.0, 50.0, 0.0], [50.0, 50.0, 50.0]]), torch.tensor(2.0).log()
    assert torch.isclose(didi.discriminator_loss(even, z, even, z, MASK, "all"), ln2)
    assert torch.isclose(didi.discriminator_loss(odd, z, odd, z, MASK, "masked"), ln2 / 2)


@pytest.mark.parametrize("e", [0.0, 0.1])
@both_positions
def test_best_discriminator_is_the_log_density_ratio(positions, e):
    """Populations with known counts of every state, smoothing e: no gradient at the closed form, and descent gets there from 0."""
    torch.manual_seed(0)
    n_ref, n_fake = torch.randint(1, 20, (2, 16))
    ref, fake = Z[2].repeat_interleave(n_ref, 0), Z[2].repeat_interleave(n_fake, 0)
    q_ref, q_fake = n_ref / n_ref.sum(), n_fake / n_fake.sum()
    best = (((1 - e) * q_ref + e * q_fake) / (e * q_ref + (1 - e) * q_fake)).log()[:, None].expand(16, 2)
    best = best * ((Z[2] == MASK) if positions == "masked" else 1)  # the others never enter: they stay where they start, at 0
    assert best.abs().max() > 0.3 and (e == 0 or best.abs().max() < torch.tensor((1 - e) / e).log())

    def loss(r):
        return didi.discriminator_loss(r[index(ref)], ref, r[index(fake)], fake, MASK, positions, e)

    def closure():
        r.grad = None
        value = loss(r)
        value.backward()
        return value
    at_best, r = best.clone().requires_grad_(), torch.zeros(16, 2, requires_grad=True)
    assert torch.autograd.grad(loss(at_best), at_best)[0].abs().max() < 1e-6
    torch.optim.LBFGS([r], max_iter=300, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe").step(closure)
    assert torch.allclose(r, best, atol=0.02)
    if positions == "all" and e == 0:
        assert torch.allclose(didi.reward(r, Z[2], MASK, positions), (q_ref / q_fake).log(), atol=0.02)


def test_grouped_advantage():
    torch.manual_seed(0)
    r, scale, shift = torch.randn(8, 4), torch.rand(8, 1) + 0.5, torch.randn(8, 1)
    A = didi.grouped_advantage(r.flatten(), 4, clip=99).view(8, 4)
    assert A.mean(1).abs().max() < 1e-5 and (A.std(1, correction=0) - 1).abs().max() < 0.01
    assert torch.equal(A.argsort(1), r.argsort(1))
    assert torch.allclose(didi.grouped_advantage((scale * r + shift).flatten(), 4).view(8, 4), A, atol=0.01)
    outlier = didi.grouped_advantage(torch.tensor([1.0] + [0.0] * 24), 25)
    assert outlier[0] == 3 and torch.allclose(outlier[1:], torch.tensor(-1 / 24 ** 0.5), atol=0.01)
    for G in (1, 2, 3, 4, 7):  # equal rewards: no advantage at all
        assert (didi.grouped_advantage(torch.linspace(-8, 8, 801).repeat_interleave(G), G) == 0).all()


# --------------------------------------------------------------------------------------------------------------- student step
def test_terms_of_the_student_step():
    torch.manual_seed(0)
    assert torch.allclose(didi.weight(torch.tensor([0.001, 0.1, 0.25, 1.0, 20.0])), torch.tensor([10.0, 10.0, 4.0, 1.0, 0.1]))
    student, teacher = (Categorical(logits=torch.randn(5, 7)) for _ in range(2))
    forward, reverse = kl_divergence(teacher, student), kl_divergence(student, teacher)
    for kind, kl in (("forward", forward), ("reverse", reverse), ("jeffreys", (forward + reverse) / 2)):
        assert torch.allclose(didi.kl_to_teacher(student.logits, teacher.logits, kind), kl, atol=1e-6)
    assert torch.allclose(didi.entropy(student.logits), student.entropy(), atol=1e-6)
    log_prob, A = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([1.0, -3.0], requires_grad=True)
    didi.policy_loss(log_prob, A, torch.tensor([2.0, 1.0]), L=4).backward()
    assert log_prob.grad.tolist() == [-2 / 8, 3 / 8] and A.grad is None


# -------------------------------------------------------------------------------------------- self-distillation through time
def test_sdtt_target_comes_from_the_step_that_reveals():
    """Every possible (target of position 0, target of position 1) with its probability, for z_t = two masks."""
    torch.manual_seed(0)
    table, n, t, dt = torch.randn(16, 2, 3), 40000, 0.8, 0.5
    z, log_p = masks(n, 2), table.log_softmax(-1)
    target = didi.sdtt_target(lookup(table), z, torch.full((n,), t), torch.full((n,), dt), MASK).view(n, 2, 3)
    first = denoising(table, t, t - dt / 2)[index(masks(1, 2))[0]]  # law of the state after the first of the two steps, (S,)
    possible = torch.where((Z[2] == MASK)[..., None], log_p, log_p[-1]).flatten(1)  # masked still: from there, else from the start
    kinds, kind = torch.unique(possible, dim=0, return_inverse=True)
    law = torch.zeros(len(kinds)).index_add(0, kind, first)
    near = torch.cdist(target.flatten(1), kinds, compute_mode="donot_use_mm_for_euclid_dist")
    assert near.min(1).values.max() < 1e-4 and len(kinds) == 7  # neither, either or both revealed by the first step: 1 + 3 + 3, both as neither
    check_law(near.argmin(1), law)
    some = torch.tensor([[MASK, 1], [0, 2]])
    assert torch.allclose(didi.sdtt_target(lookup(table), some, torch.ones(2), torch.ones(2), MASK), log_p[index(some[:1])][0, :1])


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_sdtt_is_at_rest_at_the_mean_of_the_targets(kind):
    """Forward KL to their arithmetic mean, which for an exact teacher is its own prediction; reverse KL to the geometric mean."""
    torch.manual_seed(0)
    teacher = exact_table(stutter(2) ** 2, 2)  # strong ties between the positions
    log_p = teacher.log_softmax(-1)
    law = denoising(teacher, 1.0, 0.5)[-1]  # of the state after the first of two steps from all masks, (S,)
    log_target = torch.where((Z[2] == MASK)[..., None], log_p, log_p[-1])  # (S, L, V)
    arithmetic, geometric = torch.einsum("s,slv->lv", law, log_target.exp()), torch.einsum("s,slv->lv", law, log_target).softmax(-1)
    assert torch.allclose(arithmetic, log_p[-1].exp(), atol=1e-5) and (geometric - arithmetic).abs().max() > 0.03
    z, one = masks(100000, 2), torch.ones(100000)
    target = didi.sdtt_target(lookup(teacher), z, one, one, MASK)

    def slope(p):  # of the loss at the student p (L, V), by its logits
        student = p.log().expand(16, 2, 3).clone().requires_grad_()
        loss = didi.kl_to_teacher(didi.predict(lookup(student), z, z == MASK), target, kind).mean()
        return torch.autograd.grad(loss, student)[0].abs().max()
    goal, other = (arithmetic, geometric) if kind == "forward" else (geometric, arithmetic)
    assert slope(goal) < 0.1 * slope(other)


# ------------------------------------------------------------------------------------------------- the whole loop, and the sign
def divergence(table, p):
    """KL(q_student || q_reference) of texts, nats, by enumeration, averaged over a few levels tau of the 2-step student."""
    laws = [chain(table, [1.0, tau, 0.0])[p > 0] for tau in (0.25, 0.5, 0.75)]
    return sum((q * (q / p[p > 0]).log()).sum() for q in laws).item() / 3


def train_student(p, positions, sign, updates, B=64, G=4, L=2):
    """The algorithm on lookup tables; `sign` = -1 turns the reward round. Returns the student's table (S, L, V)."""
    student, r = torch.zeros(16, L, V, requires_grad=True), torch.zeros(16, L, requires_grad=True)
    student_step, discriminator_step = torch.optim.Adam([student], 0.03), torch.optim.Adam([r], 0.1)
    for _ in range(updates):
        levels, tau, pi = didi.draw_levels(torch.ones(B), 2)
        x, steps = didi.rollout(lookup(student), masks(B, L), levels, MASK, G)
        same_tau = tau.repeat_interleave(G)
        z_fake = didi.forward_mask(x, same_tau, MASK)
        z_ref = didi.forward_mask(Z[L][Categorical(p).sample((B * G,))], same_tau, MASK)
        for _ in range(3):
            discriminator_step.zero_grad()
            didi.discriminator_loss(r[index(z_ref)], z_ref, r[index(z_fake)], z_fake, MASK, positions).backward()
            discriminator_step.step()
        A = didi.grouped_advantage(sign * didi.reward(r[index(z_fake)], z_fake, MASK, positions), G)
        student_step.zero_grad()
        didi.policy_loss(sum(step[3] for step in steps), A, (didi.weight(tau) / pi).repeat_interleave(G), L).backward()
        student_step.step()
    return student.detach()


@both_positions
def test_the_student_moves_towards_the_reference_and_away_if_the_reward_is_turned_round(positions):
    torch.manual_seed(0)
    p = stutter(2)
    before = divergence(torch.zeros(16, 2, V), p)
    assert divergence(train_student(p, positions, 1, 80), p) < 0.75 * before
    assert divergence(train_student(p, positions, -1, 20), p) > 1.2 * before


# ------------------------------------------------------------------------------------------------------------- guided sampling
def one_guided_step(table, r, z, t, s, positions, h):
    """Enumerated law (S,) of a step from z (L,), by the set A of positions revealed: tilted by h, or (h=None) re-ranked, M = 2."""
    L, states, law = len(z), Z[len(z)], torch.zeros(len(table))
    enter = (states == MASK).float() if positions == "masked" else torch.ones(states.shape)
    R, log_p = (r * enter).sum(1) / enter.sum(1).clamp(min=1), table[index(z)].log_softmax(-1)  # (S,), (L, V)
    for A in torch.cartesian_prod(*[torch.tensor([False, True])] * L):
        if (A & (z != MASK)).any():
            continue
        out = (((states != MASK) & A) | ((states == z) & ~A)).all(1).nonzero()[:, 0]  # rows of the possible z_s
        p = torch.stack([log_p[i, states[out, i]] for i in range(L) if A[i]] + [torch.zeros(len(out))]).sum(0).exp()
        guided = torch.ones(len(out)) if h is not None else 2 * p * ((R[out][:, None] - R[out]).sigmoid() @ p)
        for i in A.nonzero()[:, 0] if h is not None else ():
            grad = torch.stack([(p * R[out])[states[out, i] == v].sum() / log_p[i, v].exp() for v in range(V)])  # E[R given x_i = v]
            guided = guided * (log_p[i] + h * grad).softmax(-1)[states[out, i]]
        law[out] += guided * (1 - s / t) ** int(A.sum()) * (s / t) ** int(((z == MASK) & ~A).sum())
    return law


@both_positions
@pytest.mark.parametrize("h", [None, 1.0, 3.0])
def test_guided_steps_draw_from_the_enumerated_law(h, positions):
    """Tilting by the enumerated derivative of the reward, or (h=None) re-ranking by the enumerated softmax."""
    torch.manual_seed(0)
    table, r = torch.randn(64, 3, 3), 2 * torch.randn(64, 3)
    for z in (masks(1, 3)[0], torch.tensor([MASK, 2, MASK])):
        z_t, guide = z.repeat(20000, 1), TableDiscriminator(r)
        how = dict(discriminator=guide, mask_id=MASK, positions=positions)
        choose = functools.partial(didi.reranked, M=2, **how) if h is None else functools.partial(didi.tilted, h=h, **how)
        z_s, called = didi.ancestral_step(lookup(table), z_t, 0.9, 0.4, MASK, choose=choose)
        check_law(index(z_s), one_guided_step(table, r, z, 0.9, 0.4, positions, h))
        assert torch.equal(called, (z_s != z_t).any(1)) and guide.rows == called.sum() * (2 if h is None else 1)


@both_positions
@pytest.mark.parametrize("weak", [dict(h=0.0, switch=1.0), dict(M=1, switch=0.0)])
def test_guidance_of_no_strength_is_the_plain_sampler(weak, positions):
    torch.manual_seed(0)
    table, guide = torch.randn(64, 3, 3), TableDiscriminator(torch.randn(64, 3))
    x, _, _ = didi.guided_sample(lookup(table), guide, masks(20000, 3), 3, MASK, positions, **weak)
    check_law(index(x), chain(table, [1, 2 / 3, 1 / 3, 0]))


@both_positions
@pytest.mark.parametrize("guidance", [dict(h=1.0, switch=1.0), dict(M=4, switch=0.0), dict(h=1.0, M=4, switch=0.5)])
def test_guidance_raises_the_true_expected_reward(guidance, positions):
    """Reward = the exact log ratio of the data's law to the plain sampler's, at every state. Turned round, it lowers it."""
    torch.manual_seed(0)
    p, table = stutter(3), 0.3 * torch.randn(64, 3, 3)
    q = chain(table, [1, 0.75, 0.5, 0.25, 0])
    r = ((agrees(3) @ p) / (agrees(3) @ q)).log()  # (S,): nothing in it depends on t
    z = masks(6000, 3)
    z[3000:, 1] = 2  # half of them have a prompt
    for sign in (1, -1):
        guide = TableDiscriminator(sign * r[:, None].repeat(1, 3))
        x, _, _ = didi.guided_sample(lookup(table), guide, z, 4, MASK, positions, **guidance)
        assert (x != MASK).all() and (x[3000:, 1] == 2).all()
        got = r[index(x[:3000])]
        assert sign * (got.mean() - q[q > 0] @ r[q > 0]) > 6 * got.std() / 3000 ** 0.5


@both_positions
def test_guided_sampler_counts_both_networks(positions):
    torch.manual_seed(0)
    table, asked = torch.randn(64, 3, 3), []

    def denoiser(z, where):
        asked.append(len(z))
        return lookup(table)(z, where)
    for z in Z[3][:, None]:  # (1, L): alone, so that who asked is plain
        asked.clear()
        guide = TableDiscriminator(torch.randn(64, 3))
        before = z.clone()
        x, nfe, calls = didi.guided_sample(denoiser, guide, z, 6, MASK, positions, M=4)
        assert nfe.item() == sum(asked) <= (z == MASK).sum() and calls.item() == guide.rows and torch.equal(z, before)
        assert torch.equal(x[z != MASK], z[z != MASK]) and (x != MASK).all()
    guide = TableDiscriminator(torch.randn(64, 3))
    _, _, calls = didi.guided_sample(denoiser, guide, masks(400, 3), 8, MASK, positions, M=4, noise_max=0.25)  # s = 1/4, 1/8, 0: 3 guided
    assert calls.sum() == guide.rows and calls.max() == (1 + 4 if positions == "masked" else 1 + 1 + 4)  # the first half is tilted; masked: blind at 0
    _, nfe, calls = didi.guided_sample(denoiser, guide, masks(400, 3), 1, MASK, positions, M=4, switch=0.0)
    assert (nfe == 1).all() and (calls == (0 if positions == "masked" else 4)).all()  # trained on masks alone: blind at s = 0


# ------------------------------------------------------------------------------------------------------------------- networks
CONFIG = model.Config(vocab_size=7, length=5, n_layer=3, n_head=2, n_embd=8)


def test_denoiser_runs_its_head_where_asked():
    torch.manual_seed(0)
    net, z = model.Denoiser(CONFIG), torch.randint(0, 8, (4, 5))
    assert net(z).shape == (4, 5, 7) and CONFIG.mask_id == 7
    assert torch.allclose(net(z, z > 3), net(z)[z > 3], atol=1e-6)
    with pytest.raises(ValueError, match="n_head"):
        model.Denoiser(model.Config(n_embd=12, n_head=4))


@pytest.mark.parametrize("trainable", [0, 1, 3])
def test_discriminator_trains_a_copys_last_blocks_alone(trainable):
    torch.manual_seed(0)
    teacher = model.Denoiser(CONFIG)
    D = model.Discriminator(teacher, trainable)
    D(torch.randint(0, 8, (4, 5))).square().sum().backward()
    for name, p in D.named_parameters():
        last_block = name.startswith("body.blocks") and int(name.split(".")[2]) >= 3 - trainable
        assert (p.grad is not None and p.grad.abs().max() > 0) == (name.startswith(("score", "body.norm")) or last_block), name
    for name, p in teacher.blocks.named_parameters():
        assert p.requires_grad and p.grad is None and torch.equal(p, D.body.blocks.get_parameter(name))


def test_more_trainable_blocks_than_there_are_is_refused():
    with pytest.raises(ValueError, match="block"):
        model.Discriminator(model.Denoiser(CONFIG), 4)


def test_soft_tokens_that_are_one_hot_are_tokens():
    torch.manual_seed(0)
    D, z = model.Discriminator(model.Denoiser(CONFIG), 1).eval(), torch.randint(0, 8, (4, 5))
    where = (z != 7) & (torch.rand(4, 5) < 0.5)
    probs = F.one_hot(z[where], 7).float().requires_grad_()
    soft = D.soft(z.masked_fill(where, 0), where, probs)
    assert where.any() and torch.allclose(soft, D(z), atol=1e-6)
    assert torch.autograd.grad(soft.sum(), probs)[0].abs().max() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(D.soft(z, where, probs).float(), soft, atol=0.1)


def test_bfloat16_is_near_float32():
    torch.manual_seed(0)
    net, z = model.Denoiser(CONFIG), torch.randint(0, 8, (4, 5))
    exact, trunk = net(z), net.trunk(z)
    net.bf16 = True
    assert net(z).dtype == torch.bfloat16 and net.trunk(z).dtype == torch.float32
    assert torch.allclose(net(z).float(), exact, atol=0.05) and 0 < (net.trunk(z) - trunk).abs().max() < 0.1


@pytest.fixture
def causal():
    torch.manual_seed(0)
    net = model.Denoiser(model.Config(vocab_size=3, length=3, n_layer=2, n_head=2, n_embd=8, causal=True)).eval().requires_grad_(False)
    for p in net.parameters():
        p.mul_(2)  # far from uniform
    return net


def test_a_causal_model_sees_the_past_alone_and_its_cache_changes_nothing(causal):
    x = torch.randint(0, 3, (5, 3))
    z, cache = torch.cat((torch.full((5, 1), 3), x[:, :-1]), 1), causal.new_cache(5)
    step_by_step = torch.stack([causal.head(causal.trunk_next(z[:, i], i, cache)) for i in range(3)], 1)
    assert torch.allclose(step_by_step, causal(z), atol=1e-5)
    nll = -step_by_step.log_softmax(-1).gather(2, x[..., None])[..., 0]
    assert torch.allclose(train_teacher.causal_nll(causal, x, 3), nll, atol=1e-5)
    for i in range(3):
        other = x.clone()
        other[:, i] = (x[:, i] + 1) % 3
        moved = (train_teacher.causal_nll(causal, other, 3) - nll).abs().amax(0) > 1e-6
        assert not moved[:i].any() and moved[i] and moved[i + 1:].all()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_autoregressive_sampler_draws_from_the_models_law(causal, temperature):
    torch.manual_seed(0)
    eos, texts, n = 2, torch.cartesian_prod(*[torch.arange(3)] * 3), 20000
    sharper = lambda z: causal(z) / temperature  # noqa: E731
    until = train_teacher.until_end(texts, eos)
    ends = (texts == torch.where(until, texts, eos)).all(1)  # nothing but eos behind the first eos
    law = torch.where(ends, (-train_teacher.causal_nll(sharper, texts, 3) * until).sum(1).exp(), 0.0)
    assert torch.isclose(law.sum(), torch.tensor(1.0), atol=1e-4)
    x, nfe = train_teacher.autoregress(causal, n, eos, temperature)
    check_law((x * torch.tensor([9, 3, 1])).sum(1), law)
    assert torch.equal(nfe, train_teacher.until_end(x, eos).sum(1))


def test_until_end():
    assert train_teacher.until_end(torch.tensor([[1, 2, 1, 2], [2, 2, 2, 2], [0, 1, 1, 0]]), 2).int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1] * 4]


# ---------------------------------------------------------------------------------------------------------------- checkpoints
def save(path, **parts):
    net = model.Denoiser(CONFIG)
    whole = {"kind": "teacher", "flags": {}, "data": None, "tokenizer": "bytes", "rng": {}, "step": 1, "seconds": 1.0}
    model.save_checkpoint(path, CONFIG, **whole | {"model": net.state_dict(), "ema": net.state_dict()} | parts)
    return net


def test_checkpoint_round_trip_is_exact_and_survives_a_kill(tmp_path, monkeypatch):
    torch.manual_seed(0)
    path, z = str(tmp_path / "teacher.pt"), torch.randint(0, 8, (2, 5))
    net = save(path, step=3)
    assert os.listdir(tmp_path) == ["teacher.pt"]  # no partial file left
    ckpt, config = model.load_checkpoint(path, "teacher")
    assert config == CONFIG and ckpt["step"] == 3 and torch.equal(model.build_denoiser(config, ckpt["model"])(z), net(z))
    with pytest.raises(ValueError, match="fit"):
        model.build_denoiser(model.Config(vocab_size=7, length=5, n_layer=2, n_head=2, n_embd=8), ckpt["model"])

    def killed(obj, file):
        with open(file, "wb") as f:
            f.write(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        save(path, step=4)
    assert model.load_checkpoint(path, "teacher")[0]["step"] == 3


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_missing_truncated_and_foreign_files_say_what_to_do(tmp_path):
    path = tmp_path / "teacher.pt"
    for kind, maker in (("teacher", "train_teacher.py"), ("student", "distill.py")):
        with pytest.raises(FileNotFoundError, match=maker):
            model.load_checkpoint(str(path), kind)
    save(str(path))
    with pytest.raises(ValueError, match="teacher.*student"):
        model.load_checkpoint(str(path), "student")
    whole = path.read_bytes()
    torch.save({"weights": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    old = path.read_bytes()
    contents = [whole[:n] for n in range(0, len(whole), len(whole) // 40)] + [old[:n] for n in range(1, len(old), 40)]
    contents += [b"hello world", b"GIF89a", b"\x80\x04", b"(lp0\n."]
    ours = {"kind": "teacher"}
    for parts in ({"weights": 1}, ours, {**ours, "config": {"odd": 1}}):
        torch.save(parts, path)
        contents.append(path.read_bytes())
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError):
            model.load_checkpoint(str(path), "teacher")


class Evil:
    """Unpickling this makes a directory."""
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_checkpoint_cannot_run_code(tmp_path):
    trace, path = str(tmp_path / "executed"), tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(Evil(trace)))
    with pytest.raises(ValueError):
        model.load_checkpoint(str(path), "teacher")
    torch.save({"kind": "teacher", "x": Evil(trace)}, path)
    with pytest.raises(ValueError):
        model.load_checkpoint(str(path), "teacher")
    assert not os.path.exists(trace)
    torch.load(path, weights_only=False)
    assert os.path.exists(trace)  # so the trap was real


# ------------------------------------------------------------------------------------------ data, metrics and the three scripts
TINY = ["--device", "cpu", "--length", "24", "--n_layer", "1", "--n_head", "2", "--n_embd", "16", "--batch", "8", "--steps", "4",
        "--warmup", "1", "--eval_every", "2", "--eval_samples", "4"]
TINY_DISTILL = ["--device", "cpu", "--groups", "2", "--G", "4", "--disc_batch", "4", "--disc_warmup", "1", "--disc_blocks", "1", "--steps", "3",
                "--eval_every", "2", "--eval_samples", "4"]
LINES = [f"def f{i}(a, b={i}):" for i in range(80)]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder of its own and a corpus of 80 lines: the scripts start in no time. Returns main()s that raise or return 0."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_teacher, "find_signatures", lambda length: [s for s in LINES if len(s) < length])
    handler = signal.getsignal(signal.SIGINT)
    yield tmp_path
    signal.signal(signal.SIGINT, handler)


def refused(main, argv, capsys, *words):
    """main(argv) as the shell would run it: exit code 2, one line on stderr with these words in it, no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        model.run_script(lambda: main(argv))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len([line for line in lines if line.startswith("error: ")]) == 1, lines
    assert not any("Traceback" in line for line in lines) and all(w in lines[-1] for w in words), lines[-1]


def test_corpus_is_signatures_and_the_split_is_by_line():
    lines = train_teacher.find_signatures(48)
    assert len(lines) > 15000 and lines == sorted(set(lines))
    assert all(s.startswith("def ") and s.endswith(":") and len(s) < 48 and s.isascii() for s in lines)
    assert all(train_teacher.is_signature(s) for s in lines[::50])
    for s in ("def f(:", "def f(x) return:", "x = 1", "def f():pass\ndef g():", "", "def f(\0):", "class A:", "def f(x)", "def 1f():"):
        assert not train_teacher.is_signature(s)


def test_tokenizer_and_metrics(tiny):
    tokenizer = train_teacher.make_tokenizer("bytes")
    assert tokenizer.n_vocab == 257 and tokenizer.eot_token == 256
    x = train_teacher.encode(["def f(x):", "def g():", "def g():", "nonsense"], tokenizer, 12)
    assert x.shape == (4, 12) and x[0, 9:].tolist() == [256] * 3
    assert train_teacher.decode(x, tokenizer) == ["def f(x):", "def g():", "def g():", "nonsense"]
    q = train_teacher.quality(x, {"kind": "bytes", "tokenizer": tokenizer, "known": {"def f(x):"}})
    assert (q["valid"], q["distinct"], q["novel"], q["length"]) == (0.75, 0.75, 0.75, (9 + 8 + 8 + 8) / 4)
    counts = [list(collections.Counter(s).values()) for s in ("def f(x):", "def g():", "def g():", "nonsense")]
    assert q["entropy"] == pytest.approx(sum(Categorical(torch.tensor(c).float()).entropy().item() for c in counts) / 4, abs=1e-5)
    data = train_teacher.load_data(None, 24)
    texts = {name: set(train_teacher.decode(data[name], tokenizer)) for name in ("train", "val")}
    assert not texts["train"] & texts["val"] and texts["train"] | texts["val"] == set(LINES) and data["known"] == texts["train"]


def same_checkpoint(a, b):
    a, b = (torch.load(p, weights_only=True) for p in (a, b))
    for name in [n for n in a if n not in ("flags", "rng", "seconds")]:
        x, y = torch.utils._pytree.tree_leaves(a[name]), torch.utils._pytree.tree_leaves(b[name])
        assert len(x) == len(y) and all(torch.equal(u, v) if torch.is_tensor(u) else u == v for u, v in zip(x, y)), name


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_resume_is_the_uninterrupted_run_bit_for_bit(tiny, monkeypatch, stop_after):
    """Ctrl-C after some step, then --resume: the same weights, optimisers and averages, for teacher and student."""
    def press_after(module, n):
        pressed = iter([False] * (n - 1) + [True] + [False] * 99)
        monkeypatch.setattr(model, "catch_interrupt", lambda: lambda: next(pressed))
    for module, flags in ((train_teacher, TINY), (distill, TINY_DISTILL + ["--teacher", "a.pt"])):
        assert not module.main(flags + ["--out", "a.pt" if module is train_teacher else "sa.pt"])
        one, two = ("a.pt", "b.pt") if module is train_teacher else ("sa.pt", "sb.pt")
        press_after(module, stop_after)
        assert module.main(flags + ["--out", two]) == 130
        assert torch.load(two, weights_only=True)["step"] == stop_after
        press_after(module, 99)
        assert not module.main(["--resume", "--out", two])  # the other flags come from the checkpoint
        same_checkpoint(one, two)
        assert len(open(two.replace(".pt", ".jsonl")).readlines()) >= 1


@pytest.mark.parametrize("flags", [["--paper", "--groups", "2", "--reference", "data"], ["--no-ism"], ["--no-group_norm"], ["--kl", "0"], ["--K", "3"],
                                   ["--share", "level"], ["--start", "mask"], ["--positions", "masked"], ["--coupled"], ["--w", "--pi"],
                                   ["--objective", "sdtt", "--disc_warmup", "0", "--rounds", "4", "2"], ["--entropy", ".1"], ["--kl_kind", "jeffreys"], ["--kl_kind", "forward"], ["--beta", "2", "2"]])
def test_every_switch_of_distill_changes_the_student(tiny, flags):
    def run(flags, out):
        assert not distill.main(TINY_DISTILL + flags + ["--out", out])
        ckpt = torch.load(out, weights_only=True)
        assert set(ckpt["ema"]) == set(ckpt["model"]) and all(v.isfinite().all() for v in ckpt["model"].values())
        return ckpt["model"]["blocks.0.up.weight"]
    train_teacher.main(TINY)
    assert not torch.equal(run(["--kl", ".5"], "plain.pt"), run(["--kl", ".5"] + flags, "switched.pt"))


def test_bad_input_is_one_line_and_nothing_is_lost(tiny, capsys):
    refused(distill.main, TINY_DISTILL, capsys, "train_teacher.py")  # no teacher yet
    refused(sample.main, [], capsys, "distill.py")
    refused(train_teacher.main, TINY + ["--device", "abacus"], capsys, "abacus")
    refused(train_teacher.main, TINY + ["--length", "3"], capsys, "corpus")
    refused(train_teacher.main, TINY + ["--n_embd", "15"], capsys, "n_head")
    refused(train_teacher.main, TINY + ["--steps", "0"], capsys, "--steps")
    refused(train_teacher.main, ["--resume"], capsys, "train_teacher.py")
    assert not train_teacher.main(TINY)
    whole = (tiny / "out/teacher.pt").read_bytes()
    refused(train_teacher.main, TINY + ["--lr", "1e30", "--warmup", "0", "--steps", "40"], capsys, "not finite", "step", "--lr")
    assert (tiny / "out/teacher.pt").read_bytes() == whole
    refused(distill.main, TINY_DISTILL + ["--lr", "1e30", "--steps", "9", "--eval_every", "99"], capsys, "not finite", "--lr")
    assert not (tiny / "out/student.pt").exists()
    refused(distill.main, TINY_DISTILL + ["--disc_blocks", "9"], capsys, "--disc_blocks")
    refused(distill.main, TINY_DISTILL + ["--t_range", "0.5", "2"], capsys, "--t_range")
    refused(distill.main, TINY_DISTILL + ["--disc_batch", "99"], capsys, "--disc_batch")
    refused(distill.main, TINY_DISTILL + ["--noise_max", "0"], capsys, "--noise_max")
    refused(distill.main, TINY_DISTILL + ["--G", "1"], capsys, "--no-group_norm")
    refused(distill.main, TINY_DISTILL + ["--beta", "0", "1"], capsys, "--beta")
    refused(distill.main, TINY_DISTILL + ["--teacher", "a{b}.pt"], capsys, "a{b}.pt")
    refused(train_teacher.main, TINY + ["--warmup", "-5"], capsys, "--warmup")
    refused(train_teacher.main, ["--resume", "--n_layer", "2"], capsys, "shape")
    refused(distill.main, TINY_DISTILL + ["--teacher", "test.txt"], capsys, "test.txt")
    assert not distill.main(TINY_DISTILL)
    refused(distill.main, ["--resume", "--objective", "sdtt", "--disc_warmup", "0"], capsys, "--objective")
    refused(distill.main, ["--resume", "--disc_blocks", "0"], capsys, "shape")
    json.dump({"default": {"0": {"rows": [], "flags": {}}}}, open("plain.json", "w"))
    refused(sample.main, ["--table", "plain.json", "--plot", "x.png"], capsys, *["--sweep"] * bool(importlib.util.find_spec("matplotlib")))
    refused(distill.main, TINY_DISTILL + ["--teacher", "out/student.pt"], capsys, "student", "teacher")
    for flags, word in ((["--steps", "0"], "--steps"), (["--num", "0"], "--num"), (["--temperature", "0"], "--temperature"), (["--temperature", "nan"], "--temperature"),
                        (["--prompt", "x" * 25], "24"), (["--prompt", "caf\xe9"], "ASCII"), (["--infill", "a\nb"], "ASCII"), (["--device", "abacus"], "abacus"),
                        (["--prompt", "a", "--infill", "b"], "--infill"), (["--student", "out/teacher.pt"], "teacher"), (["--sampler", "rgas", "--model", "teacher"], "rgas"),
                        (["--sampler", "rgas", "--candidates", "0"], "--candidates"), (["--eval", "--json", "no/such/folder.json"], "no/such/folder.json"), (["--table", "out/teacher.pt"], "results")):
        refused(sample.main, flags, capsys, word)
    cut = whole[:len(whole) // 2]
    (tiny / "cut.pt").write_bytes(cut)
    refused(sample.main, ["--model", "teacher", "--teacher", "cut.pt"], capsys, "cut.pt")
    refused(train_teacher.main, ["--resume", "--out", "cut.pt"], capsys, "cut.pt")
    assert (tiny / "cut.pt").read_bytes() == cut


@pytest.mark.parametrize("sampler", ["ancestral", "rgas"])
def test_given_text_stays_whatever_is_written(tiny, capsys, sampler):
    train_teacher.main(TINY)
    distill.main(TINY_DISTILL)
    capsys.readouterr()
    common = ["--num", "20", "--steps", "4", "--sampler", sampler]
    for flags, pattern in ((["--prompt", "def go("], r"def go\(.*"), (["--infill", "de??go(?)"], r"de.{1,2}go\(.\).*"),
                           (["--infill", "de??go(?)", "--exact"], r"de.{1,2}go\(.\)"), (["--prompt", "x" * 24], "x{24}")):
        runs = []
        for _ in range(2):
            assert not sample.main(common + flags)
            first, *lines = capsys.readouterr().out.splitlines()
            runs.append(lines)
            assert "4 steps" in first and len(lines) == 20 and all(re.fullmatch(pattern, line) for line in lines), lines
            assert flags[-1].startswith("x") or len(set(lines)) > 1
        assert runs[0] == runs[1]  # the seed decides


def test_accumulated_gradients_are_those_of_the_whole_batch(tiny, monkeypatch):
    """With the same rows and masks, in two halves of as many masks each."""
    monkeypatch.setattr(didi, "low_discrepancy_times", lambda B, device: torch.full((B,), 1.0))  # all masked: nothing left to chance
    rows = iter(torch.arange(8).chunk(2))
    monkeypatch.setattr(train_teacher, "draw_rows", lambda train, n, *_: train[torch.arange(8) if n == 8 else next(rows)])
    same = {}
    for flags in ([], ["--accumulate", "2"]):
        assert not train_teacher.main(TINY + ["--steps", "1", "--out", "a.pt"] + flags)
        same[len(flags)] = torch.load("a.pt", weights_only=True)["model"]
    assert all(torch.allclose(same[0][k], same[2][k], atol=1e-5) for k in same[0])
    with pytest.raises(ValueError, match="accumulate"):
        train_teacher.main(TINY + ["--accumulate", "3"])


@pytest.mark.parametrize("flags", [[], ["--share", "level", "--coupled", "--w", "--pi"], ["--objective", "sdtt", "--disc_warmup", "0", "--rounds", "4", "2"]])
def test_parts_of_an_update_give_the_mean_of_their_gradients(tiny, monkeypatch, flags):
    """Each part's gradients alone, by an update of its size with its random numbers, against both together with --accumulate 2."""
    train_teacher.main(TINY)

    def gradients(accumulate, groups, seed=None):
        found, argv = [], TINY_DISTILL + ["--disc_warmup", "0", *flags, "--groups", str(groups), "--disc_batch", "4"]
        args, device, _ = distill.parse_flags(argv)
        args.accumulate = accumulate
        loaded, config = model.load_checkpoint("out/teacher.pt", "teacher")
        teacher = model.build_denoiser(config, loaded["ema"]).requires_grad_(False)
        torch.manual_seed(1)
        nets, reference = distill.networks(args, config, teacher, device, None), train_teacher.load_data(None, config.length)["train"]

        def descend(net, optimizer):
            found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
            return 0.0
        monkeypatch.setattr(distill, "descend", descend)
        if seed is not None:
            torch.manual_seed(seed)
        update = distill.sdtt_update if "sdtt" in flags else distill.didi_update
        row = update(7, 0.0, nets, nets["model"], nets.get("disc"), teacher, reference, args)
        return found, row
    together, row = gradients(2, 2)
    alone = [gradients(1, 2, hash((0, 7, part)) % 2 ** 63) for part in (0, 1)]
    for net, (a, b) in zip(together, zip(*(found for found, _ in alone))):
        assert len(net) == len(a) and all(torch.allclose(g, (x + y) / 2, atol=1e-6) for g, x, y in zip(net, a, b))
        assert not all(torch.allclose(x, y, atol=1e-4) for x, y in zip(a, b))
    assert all(row[k] == pytest.approx((alone[0][1][k] + alone[1][1][k]) / 2, abs=1e-5) for k in row)
    with pytest.raises(ValueError, match="--accumulate 3"):
        distill.main(TINY_DISTILL + flags + ["--accumulate", "3"])


@pytest.mark.parametrize("script, flags, optimizer, lr", [
    (train_teacher, TINY + ["--warmup", "0"], "optimizer", 2e-3), (distill, TINY_DISTILL, "opt", 6e-4),
    (distill, TINY_DISTILL + ["--objective", "sdtt", "--disc_warmup", "0", "--rounds", "4", "2", "1"], "opt", 1e-3)])
def test_minutes_fit_the_schedule_and_resume_counts_them(tiny, monkeypatch, script, flags, optimizer, lr):
    """With a clock of which every step takes 3 seconds, so that 20 make a minute."""
    if script is distill:
        train_teacher.main(TINY)
    clock = itertools.count(0, 3)
    monkeypatch.setattr(model.time, "perf_counter", lambda: next(clock))
    assert not script.main(flags + ["--minutes", "1", "--steps", "3", "--eval_every", "9999", "--out", "a.pt"])
    ckpt = torch.load("a.pt", weights_only=True)
    assert ckpt["step"] == 20 and ckpt["seconds"] == 60
    assert ckpt[optimizer]["param_groups"][0]["lr"] < 0.5 * lr  # near its end, a tenth of the peak
    rounds = [row["round"] for row in map(json.loads, open("a.jsonl")) if "round" in row]
    assert sorted(rounds, reverse=True) == rounds and len(set(rounds)) in (0, 3)
    for _ in range(2):  # the second time there is nothing left to do
        assert not script.main(["--resume", "--minutes", "1.2", "--out", "a.pt"])
        assert torch.load("a.pt", weights_only=True)["step"] == 24


def test_muon_trains_the_matrices_and_resumes(tiny, monkeypatch):
    assert not train_teacher.main(TINY + ["--muon", "--out", "a.pt"])
    ckpt = torch.load("a.pt", weights_only=True)
    assert len(ckpt["muon"]["state"]) == 4 and len(ckpt["muon"]["state"]) + len(ckpt["optimizer"]["state"]) == len(list(model.Denoiser(model.Config(257, 24, 1, 2, 16)).parameters()))
    pressed = iter([False, True])
    monkeypatch.setattr(model, "catch_interrupt", lambda: lambda: next(pressed))
    assert train_teacher.main(TINY + ["--muon", "--out", "b.pt"]) == 130
    monkeypatch.setattr(model, "catch_interrupt", lambda: lambda: False)
    assert not train_teacher.main(["--resume", "--out", "b.pt"])
    same_checkpoint("a.pt", "b.pt")
    with pytest.raises(ValueError, match="--muon"):
        train_teacher.main(["--resume", "--out", "b.pt", "--no-muon"])
    assert not train_teacher.main(TINY + ["--out", "c.pt"])
    muon, adam = (torch.load(name, weights_only=True)["model"] for name in ("a.pt", "c.pt"))
    assert not torch.allclose(muon["blocks.0.up.weight"], adam["blocks.0.up.weight"], atol=1e-4)


def test_resume_writes_where_it_reads_and_takes_new_flags(tiny):
    train_teacher.main(TINY)
    distill.main(TINY_DISTILL)
    shutil.move("out/student.pt", "moved.pt")
    assert not distill.main(["--resume", "--out", "moved.pt", "--steps", "5", "--disc_lr", "1e-7"]) and not os.path.exists("out/student.pt")
    ckpt = torch.load("moved.pt", weights_only=True)
    assert ckpt["step"] == 6 and ckpt["disc_opt"]["param_groups"][0]["lr"] == 1e-7


@pytest.mark.parametrize("script, step_of, flags, dies_at", [
    (train_teacher, "train_step", TINY, 3), (distill, "didi_update", TINY_DISTILL, 3),
    (distill, "sdtt_update", TINY_DISTILL + ["--objective", "sdtt", "--disc_warmup", "0", "--rounds", "4", "2"], 2)])
def test_checkpoints_by_the_clock_survive_kill_9(tiny, monkeypatch, script, step_of, flags, dies_at):
    """Killed in a step, with a checkpoint after every step: resumed, it ends as the run that was not."""
    if script is distill:
        train_teacher.main(TINY)
    flags = flags + ["--eval_every", "99", "--save_minutes", "0"]
    assert not script.main(flags + ["--out", "a.pt"])
    real, calls = getattr(script, step_of), itertools.count()
    monkeypatch.setattr(script, step_of, lambda *args: os._exit(9) if next(calls) == dies_at else real(*args))
    child = os.fork()
    if child == 0:
        script.main(flags + ["--out", "b.pt"])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9 and torch.load("b.pt", weights_only=True)["step"] == dies_at
    monkeypatch.setattr(script, step_of, real)
    assert not script.main(["--resume", "--out", "b.pt"])
    same_checkpoint("a.pt", "b.pt")


def test_compiled_training_is_the_same_training(tiny, monkeypatch):
    """Both scripts with --compile, by a backend that generates no code: the same weights as without."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, real = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled.append(f) or real(f, backend="eager", **how))
    for script, flags in ((train_teacher, TINY), (distill, TINY_DISTILL),
                          (distill, TINY_DISTILL + ["--objective", "sdtt", "--disc_warmup", "0", "--rounds", "4", "2"])):
        for how in ("no-compile", "compile"):
            compiled.clear()
            assert not script.main(flags + [f"--{how}", "--no-bf16", "--out", f"out/{'teacher' if script is train_teacher else 'student'}.pt"])
            name = "teacher" if script is train_teacher else "student"
            shutil.copy(f"out/{name}.pt", f"{how}.pt")
            assert len(compiled) == (how == "compile") * (1 if script is train_teacher else 3)
        one, two = (torch.load(f"{how}.pt", weights_only=True)["ema"] for how in ("no-compile", "compile"))
        assert all(torch.allclose(one[k], two[k], atol=1e-5) for k in one)
        if script is train_teacher:  # one graph for all steps, however many tokens are masked
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_bench_needs_no_text_for_the_speed_of_text(tiny, capsys):
    assert not train_teacher.main(TINY[:-4] + ["--size", "mini", "--bench"])
    assert "cpu:" in capsys.readouterr().out and train_teacher.parse_flags(TINY + ["--size", "mini", "--bench"])[3] == {"kind": "random"}


def torchrun(n, script, flags):
    """A script in n processes on the CPU, as torchrun starts them; its output."""
    here = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", os.path.join(here, script), *flags],
                          capture_output=True, text=True, timeout=150, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": here})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_two_processes_train_as_one_does(tiny, monkeypatch):
    """The same losses and weights, from the start, and where two go on with what one began."""
    write_proteins(tiny / "p.fasta")
    flags = TINY + ["--data", "p.fasta", "--length", "32", "--accumulate", "2"]
    assert not train_teacher.main(flags + ["--out", "one.pt"])
    torchrun(2, "train_teacher.py", flags + ["--out", "two.pt"])
    pressed = iter([False, True])
    monkeypatch.setattr(model, "catch_interrupt", lambda: lambda: next(pressed))
    assert train_teacher.main(flags + ["--out", "mixed.pt"]) == 130
    torchrun(2, "train_teacher.py", ["--resume", "--out", "mixed.pt"])
    one, two, mixed = (torch.load(f"{name}.pt", weights_only=True)["model"] for name in ("one", "two", "mixed"))
    start = model.Denoiser(model.Config(22, 32, 1, 2, 16)).state_dict()
    for k in one:
        assert torch.allclose(one[k], two[k], atol=1e-4) and torch.allclose(one[k], mixed[k], atol=1e-4), k
    assert max((one[k] - start[k]).abs().max() for k in one) > 0.01
    logs = [[json.loads(line)["loss"] for line in open(f"{name}.jsonl")] for name in ("one", "two")]
    assert logs[0] == pytest.approx(logs[1], abs=1e-4) and len(logs[0]) == 2


def test_two_processes_distil_as_one_does(tiny):
    """The same log and weights as one process that takes the same two parts in turn; both processes end with the same student."""
    write_proteins(tiny / "p.fasta")
    train_teacher.main(TINY + ["--data", "p.fasta", "--length", "32"])
    driver = tiny / "driver.py"
    driver.write_text("import os, sys, distill\n"
                      "keep, real = {}, distill.networks\n"
                      "def networks(*args):\n    keep.update(real(*args))\n    return keep\n"
                      "distill.networks = networks\n"
                      "def main():\n    distill.main(sys.argv[1:])\n    total = sum(p.double().sum().item() for p in keep['model'].parameters())\n"
                      "    with open('weights' + os.environ['RANK'], 'w') as f:\n        f.write(str(total))\n"
                      "distill.run_script(main)\n")
    assert not distill.main(TINY_DISTILL + ["--accumulate", "2", "--out", "one.pt"])
    torchrun(2, driver, [*TINY_DISTILL, "--out", "two.pt"])
    one, two = (torch.load(f"{name}.pt", weights_only=True) for name in ("one", "two"))
    for name in ("model", "disc", "ema"):
        assert all(torch.allclose(one[name][k], two[name][k], atol=1e-5) for k in one[name]), name
    logs = [[json.loads(line) for line in open(f"{name}.jsonl")] for name in ("one", "two")]
    for a, b in zip(*logs):
        assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], abs=1e-4) for k in a if k not in ("time", "tokens_per_s"))
    assert len(logs[0]) == len(logs[1]) == 4 and "norm" in logs[0][-1]
    sums = [float((tiny / name).read_text()) for name in ("weights0", "weights1")]
    assert sums[0] == pytest.approx(sums[1], abs=1e-9)


def test_bench_of_training(tiny, capsys):
    assert not train_teacher.main(TINY + ["--bench"]) and not (tiny / "out/teacher.pt").exists()
    train_teacher.main(TINY)
    for flags in ([], ["--objective", "sdtt", "--disc_warmup", "0", "--rounds", "4", "2"]):
        capsys.readouterr()
        assert not distill.main(TINY_DISTILL + ["--bench"] + flags) and not (tiny / "out/student.pt").exists()
        assert re.search(r"cpu: [\d.]+ ms/step, \d+ tokens/s, [\d.e-]+ TFLOP/s, an unknown share of its peak", capsys.readouterr().out)


def test_bench_counts_the_flops_of_a_product(capsys, monkeypatch):
    a, b = torch.randn(64, 128), torch.randn(128, 256)
    clock = iter([0.0, 2.0])
    monkeypatch.setattr(model.time, "perf_counter", lambda: next(clock))
    model.bench(lambda: a @ b, 64, torch.device("cpu"), times=20)
    assert f"{2 * 64 * 128 * 256 / 0.1 / 1e12:.3g} TFLOP/s" in capsys.readouterr().out


def test_evaluation_table_and_file(tiny, capsys):
    train_teacher.main(TINY)
    distill.main(TINY_DISTILL)
    capsys.readouterr()
    assert not sample.main(["--eval", "--eval_samples", "6", "--json", "table.json"])
    out, result = capsys.readouterr().out, json.load(open("table.json"))["default"]["0"]
    names = [r["row"] for r in result["rows"]]
    assert names[0] == "held-out data" and result["rows"][0]["valid"] == 1 and len(names) == 17
    assert {(r["steps"], r["T"]) for r in result["rows"] if r["row"] == "teacher"} == {(n, 1) for n in (4, 8, 16, 32, 64, 256)} | {(8, T) for T in sample.TEMPERATURES}
    assert all(r["nfe"] <= min(r["steps"], 24) for r in result["rows"][1:]) and names[-1] == "student, guided"
    assert 4 < result["rows"][-1]["disc_calls"] <= 1 + 1 + 4 and all(name in out for name in names) and os.listdir(".").count("table.json.partial") == 0
    content = json.load(open("table.json"))
    second = json.loads(json.dumps(content["default"]["0"]))
    content["default"]["1"] = second
    for a, b in zip(content["default"]["0"]["rows"], second["rows"]):
        a["valid"], b["valid"] = 0.25, 0.75
    json.dump(content, open("table.json", "w"))
    assert not sample.main(["--eval", "--eval_samples", "2", "--rows", "student", "--json", "table.json", "--label", "other"])
    capsys.readouterr()
    assert not sample.main(["--table", "table.json"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 17 + 6 and all("0.500 +- 0.354" in line for line in lines[2:19]) and "other (1 seeds)" in lines[-1]


# ------------------------------------------------------------------------------------------------------------------- proteins
FASTA = "; a comment\n>one first\nMKVL\nWAAG*\n\n>two\nmkvlbzuj\n>empty\n>same as one\nMKVLWAAG\n"


@pytest.mark.parametrize("suffix, opener", [(".fasta", open), (".fa.gz", gzip.open), (".xz", lzma.open)])
def test_fasta_in_all_its_forms(tmp_path, suffix, opener):
    path = str(tmp_path / f"p{suffix}")
    with opener(path, "wt") as f:
        f.write(FASTA)
    assert train_teacher.read_fasta(path) == ["MKVLWAAG", "MKVLXXXX"]
    tokenizer = train_teacher.make_tokenizer("protein")
    x = train_teacher.encode(["MKVLXXXX", "ACDE"], tokenizer, 10)
    assert tokenizer.n_vocab == 22 and x[0, 8:].tolist() == [21, 21] and train_teacher.decode(x, tokenizer) == ["MKVLXXXX", "ACDE"]


@pytest.mark.parametrize("content, word", [("hello\n>x\nACD", "line 1"), (">x\nACD\nAC-D", "line 3"), (">x\nAC1", "line 2"), ("\xe9", "FASTA"), ("", "corpus")])
def test_what_is_no_fasta_is_named_by_its_line(tiny, capsys, content, word):
    (tiny / "p.fasta").write_text(content)
    refused(train_teacher.main, TINY + ["--data", "p.fasta"], capsys, "p.fasta", word)
    assert not (tiny / "out/teacher.pt").exists()


def test_broken_compressed_fasta_is_refused(tiny, capsys):
    for name in ("p.fasta.gz", "p.fasta.xz", "none.fasta"):
        if "none" not in name:
            (tiny / name).write_bytes((gzip if name.endswith("gz") else lzma).compress(FASTA.encode() * 99)[:60])
        refused(train_teacher.main, TINY + ["--data", name], capsys, name)


def write_proteins(path, n=120):
    torch.manual_seed(0)
    letters = train_teacher.AMINO_ACIDS[:20]
    texts = ["".join(letters[i] for i in torch.randint(20, (int(length),))) for length in torch.randint(8, 32, (n,))]
    path.write_text("".join(f">{i}\n{s}\n" for i, s in enumerate(texts)))
    return texts


def test_long_sequences_are_dropped_or_cropped_and_counted(tiny, capsys):
    texts = write_proteins(tiny / "p.fasta")
    fit = {s for s in texts if len(s) <= 24}
    dropped = train_teacher.load_data({"kind": "protein", "path": "p.fasta", "long": "drop"}, 24)
    assert dropped["known"] < fit and len(dropped["train"]) + len(dropped["val"]) == len(fit)
    assert f"{len(texts)} unique sequences, {len(texts) - len(fit)} of them longer than 24: dropped, {len(fit)} left" in capsys.readouterr().out
    cropped = train_teacher.load_data({"kind": "protein", "path": "p.fasta", "long": "crop"}, 24)
    assert len(cropped["train"]) + len(cropped["val"]) == len(texts) and max(map(len, cropped["known"])) == 24


def test_protein_metrics_by_hand():
    tokenizer = train_teacher.make_tokenizer("protein")
    val, known = ["ACDEFGHIKL", "ACDEF", "MNPQRSTVWY"], {"ACDEFGHIKLMNPQ", "WWWWWYYYYY"}
    data = {"kind": "protein", "tokenizer": tokenizer, "known": known, "val": train_teacher.encode(val, tokenizer, 20)}
    same = train_teacher.quality(data["val"], data)
    assert same["ks"] == 0 and same["js1"] == same["js2"] == 0 and same["length"] == 25 / 3
    q = train_teacher.quality(train_teacher.encode(["ACDEFGHI", "A" * 16], tokenizer, 20), data)
    assert q["ks"] == pytest.approx(1 / 2)  # up to 10 lie all of the validation lengths (10, 5, 10), and half of ours (8, 16)
    ours, theirs = torch.zeros(20), torch.zeros(20)
    for table, texts in ((ours, ["ACDEFGHI", "A" * 16]), (theirs, val)):
        for c in "".join(texts):
            table[train_teacher.AMINO_ACIDS.index(c)] += 1
    p, r = Categorical(ours), Categorical(theirs)
    mean = Categorical(p.probs / 2 + r.probs / 2)
    assert q["js1"] == pytest.approx((mean.entropy() - p.entropy() / 2 - r.entropy() / 2).item(), abs=1e-5)
    assert q["novel"] == 0.5 and q["low"] == 0.5 and q["js2"] > q["js1"]  # ACDEFGHI is in the training set; only A.. is of low complexity
    mixed = "ACDEFGHMNMM"  # three of seven 5-mers are in a training sequence
    assert train_teacher.quality(train_teacher.encode([mixed], tokenizer, 20), data)["novel"] == 1


def test_proteins_from_fasta_to_fasta(tiny, capsys):
    write_proteins(tiny / "p.fasta")
    flags = TINY + ["--data", "p.fasta", "--length", "32"]
    assert not train_teacher.main(flags) and not train_teacher.main(flags + ["--causal"]) and not distill.main(TINY_DISTILL)
    os.remove("p.fasta")  # samples need the checkpoint alone
    for more, pattern in (([], r"[A-Y]*"), (["--length", "20"], r"[A-Y]{20}"), (["--length", "32", "--sampler", "rgas"], r"[A-Y]{32}"),
                          (["--infill", "??wkv?", "--length", "9"], r"[A-Y]{2}WKV[A-Y]{4}"), (["--prompt", "MK"], r"MK[A-Y]*")):
        assert not sample.main(["--num", "5", "--steps", "4", "--seed", "3", "--out", "s.fasta"] + more)
        lines = open("s.fasta").read().splitlines()
        assert len(lines) == 10 and all("model=student steps=4" in line and "seed=3" in line for line in lines[::2])
        assert all(re.fullmatch(pattern, line) for line in lines[1::2]), lines
        assert not more or train_teacher.read_fasta("s.fasta")
    assert not sample.main(["--num", "3", "--out", "s.txt"]) and len(open("s.txt").readlines()) == 3
    for bad, word in ((["--prompt", "M1"], "amino"), (["--length", "33"], "33"), (["--length", "0"], "0"), (["--out", "no/such/s.fasta"], "folder"),
                      (["--infill", "M?", "--exact", "--length", "3"], "exact"), (["--prompt", "MKV", "--length", "2"], "--length")):
        refused(sample.main, bad, capsys, word)
    refused(sample.main, ["--eval", "--eval_samples", "4"], capsys, "p.fasta")
    write_proteins(tiny / "p.fasta")
    assert not sample.main(["--eval", "--eval_samples", "4", "--json", "r.json"])
    rows = json.load(open("r.json"))["default"]["0"]["rows"]
    assert "valid" not in rows[0] and all({"ks", "js1", "js2", "low", "novel", "judge_ppl"} <= r.keys() for r in rows) and len(rows) == 18
    assert not sample.main(["--table", "r.json"])
    assert "| ks |" in capsys.readouterr().out.replace("ks | js1", "ks |")


# ----------------------------------------------------------------------------------------------------------------------- text
@pytest.fixture
def gpt2(tiny, monkeypatch):
    """A folder of its own, and bytes in the place of GPT-2's tokens, which would have to be downloaded."""
    ranks = {bytes([i]): i for i in range(256)}
    stand_in = tiktoken.Encoding("gpt2", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"gpt2": stand_in}[name])
    return tiny


def text_source(path, **more):
    return {"kind": "gpt2", "path": str(path), "cache": "cache", "shards": None} | more


TEXT = "".join(f"Article {i}.\nIt says {i * i}, caf\xe9.\n<|endoftext|>\n" for i in range(900))


@pytest.mark.parametrize("name, opener", [("a.txt", open), ("a.txt.gz", gzip.open), ("a.xz", lzma.open)])
def test_text_becomes_shards_in_the_format_of_llm_c(gpt2, name, opener):
    with opener(name, "wt", encoding="utf-8") as f:
        f.write(TEXT)
    data = train_teacher.load_data(text_source(gpt2 / name), 16)
    docs = [list(doc.encode()) + [256] for doc in TEXT.split("<|endoftext|>\n")[:-1]]
    train = [i for k, doc in enumerate(docs) if k % 200 for i in doc]
    assert [len(data["train"]), len(data["val"])] == [1, 1]
    assert data["train"][0][:len(train)].tolist() == train and data["val"][0].tolist() == [i for doc in docs[::200] for i in doc]
    file = next((gpt2 / "cache").glob("*/train_000000.bin")).read_bytes()
    head = struct.unpack("<256i", file[:1024])
    assert head[:3] == (20240520, 1, len(data["train"][0])) and not any(head[3:])
    assert struct.unpack(f"<{head[2]}H", file[1024:]) == tuple(data["train"][0].tolist())


def test_a_folder_long_documents_and_small_shards(gpt2):
    (gpt2 / "d/e").mkdir(parents=True)
    (gpt2 / "d/1.txt").write_text("x" * 200000)
    (gpt2 / "d/e/2.txt").write_text("second\n")
    (gpt2 / "d/notes.md").write_text("not a text")
    pieces = list(train_teacher.documents(train_teacher.text_files("d")))
    assert "".join(text for text, _ in pieces) == "x" * 200000 + "second\n" and len(pieces) > 3
    assert sum(whole for _, whole in pieces) == 2 and max(len(text) for text, _ in pieces) < 1 << 18
    folder = train_teacher.prepare(text_source(gpt2 / "d"), tiktoken.get_encoding("gpt2"), shard_size=50000, batch=1)
    shards = [train_teacher.read_shard(os.path.join(folder, n)) for n in sorted(os.listdir(folder)) if n.startswith("train")]
    assert len(shards) > 1 and sum(map(len, shards)) == 200000 + 7 + 2 - sum(len(train_teacher.read_shard(os.path.join(folder, n)))
                                                                            for n in os.listdir(folder) if n.startswith("val"))


def test_shards_are_reused_remade_and_never_half_made(gpt2, monkeypatch):
    (gpt2 / "a.txt").write_text(TEXT)
    source, tokenizer = text_source(gpt2 / "a.txt"), tiktoken.get_encoding("gpt2")

    class Counting:
        eot_token, calls, stop_at = 256, 0, None

        def encode_ordinary_batch(self, texts, num_threads):
            self.calls += 1
            if self.calls == self.stop_at:
                raise KeyboardInterrupt
            return tokenizer.encode_ordinary_batch(texts, num_threads=num_threads)
    counting = Counting()
    counting.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        train_teacher.prepare(source, counting, shard_size=500, batch=50)
    folder = os.path.join("cache", os.listdir("cache")[0])
    assert os.listdir(folder) and "source.json" not in os.listdir(folder)
    counting.stop_at = None
    train_teacher.prepare(source, counting)
    whole, calls = sorted(os.listdir(folder)), counting.calls
    assert whole == ["source.json", "train_000000.bin", "val_000000.bin"]
    train_teacher.prepare(source, counting)
    assert counting.calls == calls  # reused
    (gpt2 / "a.txt").write_text(TEXT + "More.\n")
    train_teacher.prepare(source, counting)
    assert counting.calls > calls


def test_ready_made_shards_and_windows_of_them(gpt2):
    (gpt2 / "fineweb").mkdir()
    for name, low, n in (("fineweb_val_000000.bin", 0, 30), ("fineweb_train_000001.bin", 100, 12), ("fineweb_train_000002.bin", 200, 21), ("fineweb_train_000003.bin", 50, 3)):
        train_teacher.write_shard(f"fineweb/{name}", np.arange(low, low + n))
    data = train_teacher.load_data(text_source(gpt2 / "fineweb"), 8)
    assert not os.path.exists("cache")
    torch.manual_seed(0)
    x = train_teacher.draw_rows(data["train"], 19000, 8, torch.device("cpu"))
    assert (x.diff(dim=1) == 1).all()  # neighbours of one shard
    starts = torch.tensor([*range(100, 105), *range(200, 214)])  # every window of the two shards that are long enough ..
    law = torch.zeros(256).index_fill(0, starts, 1 / 19)  # .. equally often
    check_law(x[:, 0], law)
    assert train_teacher.held_out(data["val"], 99, 8).tolist() == [list(range(i, i + 8)) for i in (0, 8, 16)]


@pytest.mark.parametrize("name, content, word", [("a.txt", b"caf\xe9 au lait", "UTF-8"), ("a.txt", b"", "tokens"), ("a.txt", b"short", "tokens"),
                                                 ("a.txt.gz", gzip.compress(b"hello " * 999)[:50], "a.txt.gz"), ("a.xz", b"no xz", "a.xz"),
                                                 ("none.txt", None, "none.txt"), ("b/x_val.bin", b"x" * 2000, "shard"), ("b/x.md", b"x", ".txt")])
def test_text_that_cannot_be_used_is_refused(gpt2, capsys, name, content, word):
    if content is not None:
        (gpt2 / name).parent.mkdir(exist_ok=True)
        (gpt2 / name).write_bytes(content)
    refused(train_teacher.main, TINY + ["--data", name.split("/")[0]], capsys, word)
    assert not (gpt2 / "out/teacher.pt").exists() and not list(gpt2.glob("**/*.partial"))


def test_gpt2s_tokens_that_cannot_be_had(tiny, monkeypatch, capsys):
    def offline(name):
        raise ConnectionError("no network")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    (tiny / "a.txt").write_text(TEXT)
    refused(train_teacher.main, TINY + ["--data", "a.txt"], capsys, "TIKTOKEN_CACHE_DIR")


@pytest.fixture
def openwebtext_server(gpt2, monkeypatch):
    """Two tars of xz-compressed tars of texts, as in the data set, served on loopback; `served` is a list of (path, first byte)."""
    files = {}
    for k in range(2):
        outer = io.BytesIO()
        with tarfile.open(fileobj=outer, mode="w") as tar:
            for j in range(3):
                inner = io.BytesIO()
                with tarfile.open(fileobj=inner, mode="w:xz") as texts:
                    for i in range(120):
                        blob = f"text {k}.{j}.{i} and some more of it".encode()
                        info = tarfile.TarInfo(f"../../{i}.txt")  # a path that must not be unpacked
                        info.size = len(blob)
                        texts.addfile(info, io.BytesIO(blob))
                info = tarfile.TarInfo(f"{j}_data.xz")
                info.size = len(inner.getvalue())
                tar.addfile(info, io.BytesIO(inner.getvalue()))
        files[f"/urlsf_subset{k:02d}.tar"] = outer.getvalue()
    served = []

    class Handler(http.server.BaseHTTPRequestHandler):
        cut = None

        def do_GET(self):
            body, first = files[self.path], int((self.headers["Range"] or "bytes=0-")[6:-1])
            served.append((self.path, first))
            if first >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(body) - first))
            self.end_headers()
            self.wfile.write(body[first:Handler.cut])

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(train_teacher, "OPENWEBTEXT", (f"http://127.0.0.1:{server.server_port}/urlsf_subset{{:02d}}.tar", 2))
    yield Handler, served
    server.shutdown()
    server.server_close()


def test_openwebtext_is_streamed_and_a_broken_download_goes_on(gpt2, openwebtext_server, capsys):
    handler, served = openwebtext_server
    flags = TINY + ["--data", "openwebtext", "--shards", "1"]
    handler.cut = 700
    refused(train_teacher.main, flags, capsys, "urlsf_subset00.tar", "run again")
    handler.cut = None
    assert not train_teacher.main(flags)
    assert served == [("/urlsf_subset00.tar", 0), ("/urlsf_subset00.tar", 700)]
    assert not list(gpt2.glob("**/*.txt")) and not list(gpt2.glob("**/*.partial"))
    data = train_teacher.load_data(text_source("openwebtext", cache=str(gpt2 / "out/data"), shards=1), 24)
    text = bytes(t for t in data["train"][0].tolist() if t != 256).decode() + bytes(t for t in data["val"][0].tolist() if t != 256).decode()
    assert sum(len(s) for s in data["train"] + data["val"]) == len(text) + 360 and "text 0.2.119 and" in text and len(served) == 2
    assert not train_teacher.main(TINY + ["--data", "openwebtext"]) and served[2:] == [("/urlsf_subset01.tar", 0)]
    whole, = gpt2.glob("**/urlsf_subset01.tar")  # killed between the last byte and the renaming: nothing is left to fetch
    whole.rename(f"{whole}.partial")
    size = os.path.getsize(f"{whole}.partial")
    train_teacher.download(train_teacher.OPENWEBTEXT[0].format(1), str(whole))
    assert served[3:] == [("/urlsf_subset01.tar", size)] and os.path.getsize(whole) == size
    whole.rename(f"{whole}.partial")
    with open(f"{whole}.partial", "ab") as f:
        f.write(b"too much")
    with pytest.raises(ValueError, match="urlsf_subset01"):
        train_teacher.download(train_teacher.OPENWEBTEXT[0].format(1), str(whole))
    assert not whole.exists()


def test_openwebtext_without_a_network_says_where_to_put_the_file(gpt2, monkeypatch, capsys):
    monkeypatch.setattr(train_teacher, "OPENWEBTEXT", ("http://127.0.0.1:9/urlsf_subset{:02d}.tar", 21))
    refused(train_teacher.main, TINY + ["--data", "openwebtext"], capsys, "put the file at", "urlsf_subset00.tar")


def test_text_from_file_to_samples(gpt2, capsys):
    (gpt2 / "a.txt").write_text(TEXT)
    flags = TINY + ["--data", "a.txt"]
    assert not train_teacher.main(flags) and not train_teacher.main(flags + ["--causal"])
    for more in ([], ["--reference", "teacher"], ["--objective", "sdtt", "--disc_warmup", "0", "--rounds", "4", "2"]):
        assert not distill.main(TINY_DISTILL + more)
    assert not distill.main(TINY_DISTILL)
    for more, start in (([], ""), (["--prompt", "It says\n"], "It says\n"), (["--infill", "It ?ays", "--sampler", "rgas"], "It ")):
        capsys.readouterr()
        assert not sample.main(["--num", "3", "--steps", "4", "--out", "s.txt"] + more)
        out = capsys.readouterr().out
        assert all(f"--- {i} ---\n{start}" in out for i in (1, 2, 3)) and (not start.startswith("It ") or "ays" in out)
    refused(sample.main, ["--length", "9"], capsys, "--length")
    assert not sample.main(["--eval", "--eval_samples", "4", "--json", "r.json"])
    rows = json.load(open("r.json"))["default"]["0"]["rows"]
    assert rows[0]["row"] == "held-out data" and all({"entropy", "distinct", "judge_ppl"} <= r.keys() and "valid" not in r for r in rows)
    assert [r["nfe"] for r in rows if r["row"] == "autoregressive"] == [24]  # packed: nothing ends early


def test_a_wide_heads_padding_is_no_token():
    net = model.Denoiser(model.Config(vocab_size=1030, length=4, n_layer=1, n_head=2, n_embd=8))
    assert net.out.weight.shape == (1088, 8) and net(torch.full((1, 4), 1030)).shape == (1, 4, 1030)


def test_equal_entropy_by_hand():
    def row(name, steps, entropy, valid):
        return {"row": name, "steps": steps, "entropy": entropy, "valid": valid}
    rows = [row("held-out data", None, 2.0, 1.0)] + [row("student", 8, e, v) for e, v in ((1.5, 0.9), (2.5, 0.5))]  # at 2.0: .7
    assert sample.at_entropy(rows, "student", 8, 2.0) == pytest.approx(0.7)
    assert all(v != v for v in (sample.at_entropy(rows, "student", 8, 2.6), sample.at_entropy(rows, "student", 4, 2.0)))
    teacher = {4: 0.2, 8: 0.3, 16: 0.5, 32: 0.6, 64: 0.8, 256: 0.9}
    rows += [row("teacher", n, e, v + d) for n, v in teacher.items() for e, d in ((2.2, -0.1), (1.8, 0.1))]
    assert sample.steps_to_match(rows, 2.0) == pytest.approx(2 ** 5.5)  # half-way between .6 at 32 and .8 at 64
    better = [r | {"valid": r["valid"] + 0.25} if r["row"] == "student" else r for r in rows]
    assert sample.steps_to_match(better, 2.0) == float("inf")
    worse = [r | {"valid": r["valid"] - 0.6} if r["row"] == "student" else r for r in rows]
    assert sample.steps_to_match(worse, 2.0) == 4
    assert sample.steps_to_match([r for r in better if (r["row"], r["steps"]) != ("teacher", 4)], 2.0) == float("inf")
    unknown = [r for r in better if (r["steps"], r["entropy"]) != (256, 2.2)]  # the teacher at 256 steps at 2.0: outside what was measured
    no_teacher = [r for r in rows if r["row"] != "teacher"]
    assert all(v != v for v in (sample.steps_to_match(unknown, 2.0), sample.steps_to_match(rows, 2.3), sample.steps_to_match(no_teacher, 2.0)))


def test_sweep_judge_pictures_and_bench(tiny, capsys):
    """The autoregressive model as a baseline and as the judge, the table at equal entropy, and what is drawn from it."""
    train_teacher.main(TINY)
    distill.main(TINY_DISTILL)
    train_teacher.main(TINY + ["--causal"])
    distill.main(TINY_DISTILL + ["--objective", "sdtt", "--steps", "4", "--disc_warmup", "0", "--out", "out/sdtt.pt"])
    few = ["--eval", "--sweep", "--eval_samples", "3", "--json", "r.json"]
    assert not sample.main(few)
    assert not sample.main(few + ["--rows", "student", "--student", "out/sdtt.pt", "--label", "sdtt"])
    results, out = json.load(open("r.json")), capsys.readouterr().out
    rows = results["default"]["0"]["rows"]
    counts = collections.Counter(r["row"] for r in rows)
    assert counts == {"held-out data": 1, "teacher": 36, "student": 24, "student, guided": 4, "autoregressive": 6}
    assert all(r["judge_ppl"] > 1 for r in rows) and "the teacher needs" in out
    ar = [r for r in rows if r["row"] == "autoregressive"][0]
    assert ar["steps"] is None and ar["disc_calls"] == 0 and 1 <= ar["nfe"] <= 24
    assert {r["row"] for r in results["sdtt"]["0"]["rows"]} == {"held-out data", "student"}  # no discriminator, so no guidance
    ckpt, config = model.load_checkpoint("out/causal.pt", "causal")  # the judge's perplexity, by hand
    torch.manual_seed(0)
    val = train_teacher.load_data(None, 24)["val"]
    val = val[torch.randperm(len(val))[:3]]
    keep = [[i for i in range(24) if 256 not in row[:i]] for row in val.tolist()]
    log_p = model.build_denoiser(config, ckpt["ema"])(torch.cat((torch.full((3, 1), 257), val[:, :-1]), 1)).log_softmax(-1)
    nll = [-log_p[b, i, val[b, i]].item() for b in range(3) for i in keep[b]]
    assert rows[0]["judge_ppl"] == pytest.approx(torch.tensor(nll).mean().exp().item(), rel=0.02)  # bfloat16 here, float32 by hand
    pictures = ["--plot", "p.png"] if importlib.util.find_spec("matplotlib") else []
    assert not sample.main(["--table", "r.json"] + pictures)
    table = capsys.readouterr().out
    assert "At the entropy of held-out data" in table and (not pictures or os.path.getsize("p.png") > 5000)
    assert not sample.main(["--bench", "--batch", "3", "--json", "b.json"])
    bench = json.load(open("b.json"))["default"]["0"]["rows"]
    assert [(r["row"], r["steps"], r["batch"]) for r in bench[:3]] == [("teacher", 256, 1), ("teacher", 256, 3), ("teacher", 1024, 1)]
    assert len(bench) == 12 and all(r["tokens_per_s"] > 0 and r["latency"] > 0 and r["nfe"] <= 24 for r in bench)
    refused(sample.main, ["--model", "student", "--student", "out/sdtt.pt", "--sampler", "rgas"], capsys, "discriminator")


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")
def test_animation(tiny, monkeypatch):
    train_teacher.main(TINY)
    distill.main(TINY_DISTILL)
    train_teacher.main(TINY + ["--causal"])
    monkeypatch.setattr(sample.animate, "__defaults__", (2, 1, 2))  # two lines, one second, two frames a second
    assert not sample.main(["--animate", "a.gif"])
    assert open("a.gif", "rb").read(6) in (b"GIF89a", b"GIF87a")


def test_pictures_without_matplotlib_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        sample.pyplot()


def test_gpt2_as_the_judge(tiny, monkeypatch, capsys):
    """A random GPT-2 saved to a folder; bytes stand in for its tokens, which would have to be downloaded."""
    train_teacher.main(TINY)
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(sample.main, ["--eval", "--rows", "teacher", "--judge", "x", "--eval_samples", "2"], capsys, "pip install transformers")
    monkeypatch.undo()
    monkeypatch.chdir(tiny)
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(sample.tiktoken, "get_encoding", lambda name: train_teacher.make_tokenizer("bytes"))
    monkeypatch.setattr(train_teacher, "find_signatures", lambda length: LINES)
    refused(sample.main, ["--eval", "--rows", "teacher", "--judge", "no/such/folder", "--eval_samples", "2"], capsys, "no/such/folder")
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=257, n_positions=64, n_embd=16, n_layer=1, n_head=2)).eval()
    gpt2.save_pretrained("gpt2")
    args, device = sample.parse_flags(["--eval", "--judge", "gpt2"])
    tokenizer, texts = train_teacher.make_tokenizer("bytes"), ["def f(x):", "def go():"]
    judge = sample.make_judge(args, {}, tokenizer, device)
    loss = [gpt2(ids, labels=ids).loss for ids in (torch.tensor([[256, *s.encode(), 256]]) for s in texts)]  # the package's own mean
    by_hand = (sum(n * (len(s) + 1) for n, s in zip(loss, texts)) / sum(len(s) + 1 for s in texts)).exp()
    assert judge(train_teacher.encode(texts, tokenizer, 24)) == pytest.approx(by_hand.item(), rel=1e-4)
    # passages of its own tokens, as long as it can read: each token counts, <|endoftext|> among them, and nothing else
    x = torch.randint(257, (2, 64))
    stand_in = tiktoken.Encoding("gpt2", pat_str=r"[\s\S]", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={"<|endoftext|>": 256})
    log_p = torch.stack([gpt2(torch.cat((torch.tensor([256]), row[:-1]))[None]).logits[0].log_softmax(-1)[range(64), row] for row in x])
    assert sample.make_judge(args, {}, stand_in, device)(x) == pytest.approx((-log_p.mean()).exp().item(), rel=1e-4)


def test_ablation_resumes_and_prints_a_table(tiny, monkeypatch, capsys):
    train_teacher.main(TINY + ["--out", "0.pt"])
    for name in ("1.pt", "2.pt"):
        shutil.copy("0.pt", name)
    monkeypatch.setattr(distill, "CUMULATIVE", {"none": "--paper --no-ism --kl 0 --groups 2 --reference data", "+ ism": "--ism"})
    monkeypatch.setattr(distill, "ONE_CHANGE", {"default": "", "default, guided sampler": ""})
    monkeypatch.setattr(distill.ablate, "__defaults__", (4,))
    trained, real = [], distill.main
    monkeypatch.setattr(distill, "main", lambda argv: trained.append(argv) or real(argv))
    flags = TINY_DISTILL + ["--teacher", "{seed}.pt", "--ablate", "a.json"]
    assert not real(flags) and len(trained) == 9  # 4 labels x 3 seeds, but the guided sampler needs no run of its own
    results = json.load(open("a.json"))
    assert list(results) == ["none", "+ ism", "default", "default, guided sampler"]
    assert [results["none"][s]["flags"]["ism"] for s in "012"] == [False] * 3 and results["+ ism"]["2"]["flags"]["ism"]
    assert results["+ ism"]["1"]["flags"]["kl"] == 0 and "valid@32" in results["none"]["0"]
    del results["default"]["1"]
    json.dump(results, open("a.json", "w"))
    assert not real(flags) and len(trained) == 10
    assert len(json.load(open("a.json"))["default"]) == 3
    table = capsys.readouterr().out
    assert all(f"| {label} |" in table for label in results) and "+-" in table


def readme_commands():
    text = open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "README.md")).read()
    return re.findall(r"^python3 -m venv .*$", text, re.MULTILINE)


def test_the_readmes_first_command_at_toy_size(tmp_path):
    """Each script of the README's command as a process of its own, on the real corpus; and a real Ctrl-C."""
    here = os.path.dirname(os.path.abspath(__file__))
    main_job, tests = readme_commands()
    scripts = re.findall(r"python (\w+\.py)([^&]*)", main_job)
    assert [s for s, _ in scripts] == ["train_teacher.py", "distill.py", "sample.py"] and "test_didi.py" in tests
    toy = {"train_teacher.py": TINY, "distill.py": TINY_DISTILL, "sample.py": ["--num", "3"]}
    for script, flags in scripts:
        done = subprocess.run([sys.executable, os.path.join(here, script), *flags.split(), *toy[script]], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "8 steps" in done.stdout and len(done.stdout.splitlines()) == 4
    run = subprocess.Popen([sys.executable, os.path.join(here, "train_teacher.py"), *TINY, "--steps", "100000", "--eval_every", "100000", "--out", "long.pt"],
                           cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        time.sleep(0.1)
        if os.path.exists(tmp_path / "long.jsonl") and os.path.getsize(tmp_path / "long.jsonl"):
            break
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "--resume" in out and "Traceback" not in err
    assert torch.load(tmp_path / "long.pt", weights_only=True)["step"] >= 10


# --------------------------------------------------------------------------------------------------------------- on a GPU
GPU = "cuda"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_gpu
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_samples_and_rollouts_on_a_gpu_have_the_exact_law(steps):
    torch.manual_seed(20)
    table, L, N = torch.randn(len(Z[3]), 3, V), 3, 40000
    denoiser = lookup(table.to(GPU))
    x, nfe = didi.sample(denoiser, masks(N, L).to(GPU), steps, MASK)
    law = chain(table, didi.time_grid(steps))
    check_law(index(x).cpu(), law)
    assert x.device.type == GPU and nfe.max() <= steps
    levels = torch.tensor(didi.time_grid(steps), device=GPU)[:, None].expand(-1, N // 4)
    x, _ = didi.rollout(denoiser, masks(N // 4, L).to(GPU), levels, MASK, 1)
    check_law(index(x).cpu(), law)


@needs_gpu
def test_losses_and_gradients_on_a_gpu_are_those_of_the_cpu():
    torch.manual_seed(21)
    config = model.Config(vocab_size=50, length=32, n_layer=2, n_head=2, n_embd=64)
    net, x = model.Denoiser(config), torch.randint(50, (8, 32))
    z = didi.forward_mask(x, 0.6, config.mask_id)
    found = {}
    for name, device, bf16 in (("cpu", "cpu", False), ("gpu", GPU, False), ("bf16", GPU, True)):
        net = net.to(device)
        net.bf16 = bf16
        net.zero_grad()
        where = (z == config.mask_id).to(device)
        log_p_x = didi.predict(net, z.to(device), where)
        loss = -log_p_x.gather(1, x.to(device)[where][:, None]).mean()
        loss.backward()
        assert log_p_x.dtype == torch.float32
        found[name] = loss.item(), torch.cat([p.grad.flatten().cpu() for p in net.parameters() if p.grad is not None])
    loss, grad = found["cpu"]
    for name, bound in (("gpu", 1e-2), ("bf16", 5e-2)):  # TF32 is off by default; bfloat16 has 8 bits
        assert found[name][0] == pytest.approx(loss, rel=bound) and (found[name][1] - grad).norm() < bound * grad.norm(), name


@needs_gpu
def test_the_whole_way_on_a_gpu(tiny, capsys):
    """Defaults of a GPU: bfloat16 and torch.compile. Teacher, resumed, student, samples by both samplers, the table, and --bench."""
    gpu = ["--device", GPU]
    teach, learn = TINY + gpu + ["--size", "nano"], TINY_DISTILL + gpu
    assert not train_teacher.main(teach + ["--steps", "12"])
    assert not train_teacher.main(["--resume", "--steps", "15"]) and torch.load("out/teacher.pt", weights_only=True)["step"] == 15
    assert not train_teacher.main(teach + ["--causal"])
    for flags in ([], ["--accumulate", "2", "--paper", "--groups", "2"], ["--objective", "sdtt", "--disc_warmup", "0", "--rounds", "4", "2"]):
        assert not distill.main(learn + flags + ["--out", f"out/{len(flags)}.pt"])
    student = ["--student", "out/0.pt"] + gpu
    for flags in (["--num", "3"], ["--num", "3", "--sampler", "rgas"], ["--eval", "--eval_samples", "8"], ["--bench"]):
        assert not sample.main(student + flags)
    assert not sample.main(["--student", "out/0.pt", "--device", "cpu"])  # checkpoints move between machines
    assert not train_teacher.main(teach + ["--bench"]) and not distill.main(learn + ["--bench"])
    assert "TFLOP/s" in capsys.readouterr().out


def bench_samplers(B=2, timed=8):
    """python test_didi.py: time and memory of the usual sampler against didi.sample, on GPT-2's vocabulary with a random network.

    Each step of the usual one costs the same: beyond `timed` of them the rest is extrapolated.
    """
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    device = model.pick_device(args := model.argparse.Namespace(device="auto", bf16=None))
    net = model.Denoiser(model.Config(vocab_size=50258, length=256, n_layer=6, n_head=6, n_embd=384)).to(device).requires_grad_(False)
    net.bf16, mask_id = args.bf16, net.config.mask_id
    z = torch.full((B, 256), mask_id, device=device)
    print(f"V = 50258, L = 256, 6 blocks x 384, batch {B}, {device}, {'bfloat16' if args.bf16 else 'float32'}")
    for steps in (8, 64, 1024):
        seconds, mib = [], []
        for run in (lambda: usual_sample(net, z, steps, mask_id, min(steps, timed)), lambda: didi.sample(net, z, steps, mask_id)):
            run() if steps == 8 else None  # warm-up
            peak_memory = model.memory_meter(device)
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
            mib.append(peak_memory())
        seconds[0] *= (steps + 1) / (min(steps, timed) + 1)
        print(f"{steps} steps: usual {seconds[0]:.2f} s, {mib[0]:.0f} MiB; reveal-first {seconds[1]:.2f} s, {mib[1]:.0f} MiB; "
              f"ratio of times {seconds[0] / seconds[1]:.1f}, of memory {mib[0] / mib[1]:.1f}", flush=True)


if __name__ == "__main__":
    bench_samplers()
