"""test_didi.py - the method against exact answers, in worlds that can be enumerated.

They have 3 tokens and 2 or 3 positions, and a "network" is a lookup table: row index(z) of a tensor
(S, L, V) holds its logits for the state z, S = (V + 1)^L. So the law of every sampler is a product
of small matrices, and its gradient comes from autograd. Seeds are fixed; a bound on random numbers
is so wide that a fresh seed would fail a correct program less than once in 10^5: 5 standard errors,
or `check_law`. The two tests of an effect, the loop and guidance, ask for well less than is seen.
"""
import collections
import functools
import glob
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Beta, Categorical, kl_divergence

import didi
import distill
import model
import sample
import train_teacher
from data import corpus

torch.set_num_threads(1)
V, MASK = 3, 3
Z = {L: torch.cartesian_prod(*[torch.arange(V + 1)] * L) for L in (2, 3)}  # all states, (S, L)
both_positions = pytest.mark.parametrize("positions", ["masked", "all"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ----------------------------------------------------------------------- a world of lookup tables
def index(z):
    """The row of each state z (.., L) in Z[L]."""
    return (z * (V + 1) ** torch.arange(z.shape[-1]).flip(0)).sum(-1)


def lookup(table):
    """A denoiser with these logits (S, L, V)."""
    return lambda z, where: table[index(z)][where]


def masks(n, L):
    return torch.full((n, L), MASK)


def stutter(L):
    """A law of texts (S,): neighbours like to be equal. Far from what one step can write."""
    likes = 2.0 * (Z[L][:, 1:] == Z[L][:, :-1]).sum(-1) + 0.8 * (Z[L] == 0).sum(-1)
    return (likes - 0.3 * Z[L][:, 0]).masked_fill((Z[L] == MASK).any(-1), -torch.inf).softmax(0)


def agrees(L):
    """(S, S): 1 if the state of the row could be the text of the column, partly masked."""
    return ((Z[L][:, None] == Z[L]) | (Z[L][:, None] == MASK)).all(-1).float()


def exact_table(p, L):
    """Bayes' rule: logits (S, L, V) of p's denoiser, log sum over agreeing x of p(x) [x_i = v]."""
    one_hot = F.one_hot(Z[L])[..., :V].float()
    return torch.einsum("zx,x,xlv->zlv", agrees(L), p, one_hot).clamp(min=1e-20).log()


def noising(s, t, L):
    """q(z_t | z_s), (S, S): a visible token is masked with probability m = (t - s)/(1 - s)."""
    seen, m = (Z[L] != MASK).sum(-1), (t - s) / (1 - s)
    return agrees(L).T * m ** (seen[:, None] - seen) * (1 - m) ** seen


def denoising(table, t, s):
    """The sampler's law of z_s given z_t, (S, S), from logits (S, L, V): a mask stays with s/t."""
    L = table.shape[1]
    moves = F.pad(table.softmax(-1) * (1 - s / t), (0, 1), value=s / t)
    q = torch.where((Z[L] == MASK)[..., None], moves, F.one_hot(Z[L]).float())
    return q[:, torch.arange(L), Z[L]].prod(-1)


def chain(table, times, start=-1):
    """Law (S,) of what the steps times[0] -> times[1] -> .. make of state `start`: all masks."""
    law = torch.eye(len(table))[start]
    for t, s in zip(times[:-1], times[1:]):
        law = law @ denoising(table, t, s)
    return law


def check_law(drawn, law):
    """Chi-square of drawn indices (n,) against law (S,); false alarm 10^-6 (Wilson-Hilferty)."""
    counts = torch.bincount(drawn, minlength=len(law)).double()
    expected = law.double() * len(drawn)
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
    """Logits r (S, L); of soft tokens their mean over independent draws. Counts rows shown."""

    def __init__(self, r, positions="all", noise_max=1.0):
        self.r, self.positions, self.noise_max, self.rows = r, positions, noise_max, 0

    def __call__(self, z):
        self.rows += len(z)
        return self.r[index(z)]

    def soft(self, z, where, probs):
        self.rows += len(z)
        p, L = F.one_hot(z, V + 1).float(), z.shape[1]
        p[where] = F.pad(probs, (0, 1))
        return p[:, torch.arange(L), Z[L]].prod(-1) @ self.r  # (B, S) @ (S, L)

    def enters(self, z):
        return (z == MASK) | (self.positions == "all")

    def knows(self, s):
        return s <= self.noise_max and (self.positions == "all" or s > 0)


# ------------------------------------------------------------------------------- masked diffusion
def test_forward_mask_masks_a_share_t():
    """The masked share of each row against its t; the rest against x."""
    t, x = torch.tensor([0.0, 0.2, 0.7, 1.0]), torch.randint(0, V, (4, 20000))
    z, other = didi.forward_mask(x, t, MASK), didi.forward_mask(x[1], 0.2, MASK)
    rate = (z == MASK).float().mean(1)
    assert ((rate - t).abs() <= 5 * (t * (1 - t) / 20000).sqrt()).all()
    assert ((z == x) | (z == MASK)).all()
    check_mean((other == MASK).float(), 0.2)


def test_low_discrepancy_times(monkeypatch):
    """One time in each stratum, each uniform; within (0, 1] at the extremes of torch.rand."""
    t = torch.stack([didi.low_discrepancy_times(4) for _ in range(4000)])
    assert torch.allclose(t.sort(1).values.diff(dim=1), torch.tensor(0.25), atol=1e-6)
    for b in range(4):
        check_law((t[:, b] * 10).long().clamp(max=9), torch.full((10,), 0.1))
    for u in (0.0, 1 - 2.0 ** -24):
        monkeypatch.setattr(torch, "rand", lambda *size, u=u, **how: torch.tensor(u))
        t = torch.cat([didi.low_discrepancy_times(B) for B in (1, 3, 64)])
        assert (t > 0).all() and (t <= 1).all()


def test_nelbo_of_the_exact_denoiser_is_the_entropy_of_the_data():
    """The bound against the enumerated entropy: equal for the exact denoiser, above for another."""
    p = stutter(2)
    table, x = exact_table(p, 2), Z[2][Categorical(p).sample((60, 4000))]
    H = Categorical(p).entropy()
    check_mean(torch.stack([didi.nelbo(lookup(table), b, MASK)[0] for b in x]) * 2, H)
    worse = lookup(table + 0.5 * torch.randn(16, 2, V))
    assert torch.stack([didi.nelbo(worse, b, MASK)[0] for b in x]).mean() * 2 > H + 0.02


def test_nelbo_is_the_weighted_sum_and_its_second_value_the_mean_over_masks():
    """Both values against sums over the same masks; without masks they and their slopes are 0."""
    table, t = torch.randn(16, 2, V, requires_grad=True), torch.linspace(0.3, 0.8, 6)
    x, rng = torch.randint(0, V, (6, 2)), torch.get_rng_state()
    z = didi.forward_mask(x, t, MASK)
    torch.set_rng_state(rng)  # the same masks again
    bound, mean_nll = didi.nelbo(lookup(table), x, MASK, t)
    log_p, hidden = table[index(z)].log_softmax(-1), (z == MASK).float()  # (B, L, V), (B, L)
    nll = -(log_p * F.one_hot(x)).sum(-1) * hidden
    assert 0 < hidden.sum() < 12 and torch.isclose(mean_nll, nll.sum() / hidden.sum())
    assert torch.isclose(bound, (nll / t[:, None]).sum() / 12)
    none = didi.nelbo(lookup(table), x, MASK, torch.zeros(6))
    slope, = torch.autograd.grad(sum(none), table)
    assert torch.stack(none).tolist() == [0, 0] and (slope == 0).all()


# --------------------------------------------------------------------------------------- sampling
def test_draw_keeps_the_tail_and_draws_nothing_impossible(monkeypatch):
    """Tokens against the cumulative distribution, at given random numbers; NaN is refused."""
    log_p_x = torch.tensor([[0.0, 1.0, 1e-9, 0.0]]).log()  # 1 + 1e-9 is 1 in float32
    for u, token in ((0.0, 1), (1 - 1e-8, 1), (1 - 1e-10, 2), (1 - 2.0 ** -53, 2)):
        monkeypatch.setattr(torch, "rand", lambda *size, u=u, **how: torch.full(size, u, **how))
        assert didi.draw(log_p_x, 2).tolist() == [[token, token]]
    with pytest.raises(FloatingPointError, match="--lr"):
        didi.draw(torch.tensor([[0.0, 1.0], [torch.inf, 0.0]]).log_softmax(-1))


@pytest.mark.parametrize("independent", [True, False])
def test_ancestral_step_is_bayes_rule(independent):
    """Draws against q(z_s | z_t) by Bayes' rule: all of it, or marginals of dependent positions."""
    t, s, p = 0.8, 0.3, stutter(2)
    if independent:
        p = torch.outer(*torch.tensor([[0.6, 0.3, 0.1, 0.0], [0.2, 0.1, 0.7, 0.0]])).flatten()
    joint = (p @ noising(0, s, 2))[:, None] * noising(s, t, 2)  # (z_s, z_t)
    bayes, start = (joint / joint.sum(0)).T, torch.randint(0, 16, (40000,))
    end, called = didi.ancestral_step(lookup(exact_table(p, 2)), Z[2][start], t, s, MASK)
    assert torch.equal(called, (end != Z[2][start]).any(1))
    for i in range(2):
        marginal = bayes @ F.one_hot(Z[2][:, i]).float()  # (z_t, V + 1)
        check_law(start * 4 + end[:, i], marginal.flatten() / 16)
    if independent:
        assert torch.allclose(bayes, denoising(exact_table(p, 2), t, s), atol=1e-5)
        check_law(start * 16 + index(end), bayes.flatten() / 16)
    still, called = didi.ancestral_step(None, masks(50, 3), t, t, MASK)  # no time, nobody asked
    assert (still == MASK).all() and not called.any()


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("T", [1.0, 0.5])
@pytest.mark.parametrize("weak", [None, {"h": 0.0, "switch": 1.0}, {"M": 1, "switch": 0.0}])
def test_sampler_draws_from_the_enumerated_chain(steps, T, weak):
    """The sampler, and guidance of no strength, against the product of the steps' matrices."""
    times, table, sampler = torch.linspace(1, 0, steps + 1), torch.randn(64, 3, V), didi.sample
    if weak:
        guide = TableDiscriminator(torch.randn(64, 3))
        sampler = functools.partial(didi.guided_sample, discriminator=guide, **weak)
    for start in (-1, index(torch.tensor([MASK, 1, MASK]))):  # all masks, or a prompt
        z = Z[3][start].repeat(20000, 1)
        x = sampler(lookup(table), z=z, steps=steps, mask_id=MASK, temperature=T)[0]
        check_law(index(x), chain(table / T, times, start))


@pytest.mark.parametrize("steps", [1, 2, 4, 40])
def test_nfe_counts_real_calls_and_what_is_visible_stays(steps):
    """nfe against the denoiser's own count: the first token, visible, names the row that asked."""
    B, L, M, asked, heads = 12, 6, 20, collections.Counter(), []  # M: the mask
    z = torch.full((B, L), M).where(torch.arange(L) < 1 + torch.arange(B)[:, None] % L, 0)
    z[:, 0] = torch.arange(B)
    n, states = (z == M).sum(1), [z.clone()]  # rows have 0 to 5 masks

    def denoiser(z, where):
        asked.update(z[:, 0].tolist())
        heads.append(int(where.sum()))
        assert (z[where] == M).all()
        return torch.randn(heads[-1], M)
    x, nfe = didi.sample(denoiser, z, steps, M, on_step=states.append)
    assert nfe.tolist() == [asked[b] for b in range(B)] and torch.equal(nfe > 0, n > 0)
    assert (nfe <= n.clamp(max=steps)).all() and (steps < 40 or (nfe >= n - 1).all())
    assert sum(heads) == n.sum()  # every mask passes the head once
    assert (x != M).all() and len(states) == steps + 1 and torch.equal(states[-1], x)
    for before, after in zip(states[:-1], states[1:]):
        assert torch.equal(after[before != M], before[before != M])
    assert torch.equal(z, states[0])  # the caller's own tensor is left alone


@pytest.mark.parametrize("sampler", [didi.sample, functools.partial(didi.guided_sample, None)])
def test_less_than_one_step_is_refused(sampler):
    with pytest.raises(ValueError, match="steps"):
        sampler(None, masks(1, 2), 0, MASK)


# ---------------------------------------------------------------------------------------- rollout
@pytest.mark.parametrize("a", [1.0, 2.0])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_draw_levels(K, a):
    """pi against the Beta density of tau's share of the level above it, and draws against pi."""
    t = torch.tensor([1.0, 0.6]).repeat_interleave(40000)
    levels, tau, pi = didi.draw_levels(t, K, a, a)
    assert levels.shape == (K + 1, len(t)) and torch.equal(levels[0], t)
    assert (levels[-1] == 0).all() and (levels.diff(dim=0) < 0).all()
    above = levels[max(K - 2, 0)]
    assert K == 1 or torch.equal(tau, levels[-2])
    assert torch.allclose(pi, Beta(a, a).log_prob(tau / above).exp() / above, rtol=1e-4)
    for lo, hi in ((0.1, 0.4), (0.4, 0.5)):  # E[1/pi; lo < tau/above < hi] = (hi - lo) above
        share = ((tau > lo * above) & (tau < hi * above)).float() / (pi * above)
        check_mean(share[:40000], hi - lo)
        check_mean(share[40000:], hi - lo)


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("G", [1, 3])
def test_rollout_log_prob_is_that_of_the_tokens_revealed(G, K):
    """log_prob and its gradient against a sum over the tokens that appear from state to state."""
    B, table = 40, torch.randn(64, 3, V, requires_grad=True)
    z, by_hand, mix = Z[3][torch.randint(0, 64, (B,))], 0, torch.randn(B * G)
    z[0], z[1] = MASK, 0  # all to reveal, and nothing
    levels, _, _ = didi.draw_levels(torch.linspace(0.2, 1, B), K)  # each row has its own
    x, log_prob, steps = didi.rollout(lookup(table), z, levels, MASK, G)
    states = [z.repeat_interleave(G, 0)] + [step[0] for step in steps[1:]] + [x]
    assert len(steps) == K and torch.equal(steps[0][0], z)
    assert x.shape == (B * G, 3) and (x != MASK).all()
    for (entered, where, log_p_x), before, after in zip(steps, states[:-1], states[1:]):
        assert torch.equal(where, entered == MASK)
        assert torch.allclose(log_p_x, table[index(entered)][where].log_softmax(-1))
        assert torch.equal(after[before != MASK], before[before != MASK])
        log_p = F.pad(table[index(before)].log_softmax(-1), (0, 1))  # (B*G, L, V + 1)
        new = F.one_hot(after, V + 1) * (before != after).long()[..., None]
        by_hand = by_hand + (log_p * new).sum((1, 2))
    assert torch.allclose(log_prob, by_hand, atol=1e-5) and (log_prob[G:2 * G] == 0).all()
    ours, = torch.autograd.grad(log_prob @ mix, table)
    theirs, = torch.autograd.grad(by_hand @ mix, table)
    assert theirs.abs().max() > 0.1 and torch.allclose(ours, theirs, atol=1e-4)


def test_rollout_keeps_each_rows_own_levels():
    """The share of masks in each row's completions against its levels."""
    levels = torch.tensor([[1.0, 1.0], [0.8, 0.4], [0.1, 0.3], [0.0, 0.0]])
    _, _, steps = didi.rollout(lookup(torch.zeros(16, 2, V)), masks(2, 2), levels, MASK, 5000)
    for level, (z, _, _) in zip(levels[1:], steps[1:]):
        share = (z == MASK).float().view(2, -1).mean(1)
        assert ((share - level).abs() < 5 * (0.25 / 10000) ** 0.5).all()


@pytest.mark.parametrize("K", [1, 2, 3])
def test_rollout_law_and_policy_gradient_are_exact(K):
    """Trajectories against their enumerated law; policy_loss on all, weighted by probability,
    against the gradient of the expected reward, by autograd through the enumerated chain."""
    B, G, table = 4000, 4, (0.5 * torch.randn(16, 2, V)).requires_grad_()
    R, times = torch.randn(16), [1.0, 0.6, 0.3][:K] + [0.0]
    levels = torch.tensor(times)[:, None].expand(-1, B)
    x, log_prob, steps = didi.rollout(lookup(table), masks(B, 2), levels, MASK, G)
    states = [masks(B * G, 2)] + [step[0] for step in steps[1:]] + [x]
    path, prob = torch.stack(list(map(index, states))), 1.0  # (K + 1, B*G)
    for k in range(K):
        prob = prob * denoising(table.detach(), times[k], times[k + 1])[path[k], path[k + 1]]
    kinds, kind = torch.unique(path, dim=1, return_inverse=True)
    one = torch.zeros(kinds.shape[1], dtype=torch.long).scatter_(0, kind, torch.arange(B * G))
    assert torch.isclose(prob[one].sum(), torch.tensor(1.0), atol=1e-4)  # every kind was seen
    check_law(kind, prob[one])
    pair, law = path[1].view(-1, 2), chain(table.detach(), times[:2])  # a group shares its start
    check_law(pair[:, 0] * 16 + pair[:, 1], torch.outer(law, law).flatten())  # and nothing else
    loss = didi.policy_loss(log_prob[one], R[index(x)][one], prob[one] * len(one), L=2)
    ours, = torch.autograd.grad(loss, table)
    exact, = torch.autograd.grad(chain(table, times) @ R, table)
    assert exact.abs().max() > 0.01 and torch.allclose(-ours * 2, exact, atol=1e-5)


# ----------------------------------------------------------------------- discriminator and reward
def test_what_enters_the_reward_and_the_loss():
    """pool, reward and discriminator_loss against numbers worked out by hand."""
    logits = torch.tensor([[1.0, 2.0, 6.0], [1.0, 2.0, 6.0]], requires_grad=True)
    some, every = torch.tensor([[True, False, True], [False] * 3]), torch.ones(2, 3).bool()
    assert didi.pool(logits, some).tolist() == [3.5, 0.0]  # a row in which none enter gives 0
    assert didi.pool(logits, every).tolist() == [3.0, 3.0]
    assert didi.reward(logits * 9, every).tolist() == [8.0, 8.0]
    assert didi.reward(-logits * 9, some, clip=5).tolist() == [-5.0, 0.0]
    assert not didi.reward(logits, every).requires_grad
    even, odd, ln2 = torch.zeros(2, 3), logits.new([[0, 50, 0], [50] * 3]), torch.tensor(2.0).log()
    assert torch.isclose(didi.discriminator_loss(even, every, even, every), ln2)
    assert torch.isclose(didi.discriminator_loss(odd, some, odd, some), ln2 / 2)


@pytest.mark.parametrize("e", [0.0, 0.1])
@both_positions
def test_best_discriminator_is_the_log_density_ratio(positions, e):
    """Populations with known counts of each state, smoothing e: the loss, convex in the logits,
    has no slope at the closed form, and a slope elsewhere wherever the logit enters."""
    n, m = torch.randint(1, 20, (2, 16))  # of the reference and the student
    ref, student = (torch.arange(16).repeat_interleave(counts) for counts in (n, m))
    p, q, enter = n / n.sum(), m / m.sum(), TableDiscriminator(None, positions).enters(Z[2])
    best = (((1 - e) * p + e * q) / (e * p + (1 - e) * q)).log()[:, None].repeat(1, 2)
    assert best.abs().max() > 0.3 and torch.allclose(didi.reward(best, enter)[-1], best[-1, 0])

    def slope(r):
        r = r.requires_grad_()
        loss = didi.discriminator_loss(r[ref], enter[ref], r[student], enter[student], e)
        return torch.autograd.grad(loss, r)[0]
    assert slope(best.clone()).abs().max() < 1e-6
    for shift in (0.1, -0.1):
        assert torch.equal(slope(best + shift).sign(), enter.float() * torch.tensor(shift).sign())


def test_grouped_advantage():
    """Mean 0, deviation 1 and the same order in each group, whatever its scale; clipped at 3."""
    r = torch.randn(8, 4)
    A = didi.grouped_advantage(r.flatten(), 4, clip=99).view(8, 4)
    assert A.mean(1).abs().max() < 1e-5 and (A.std(1, correction=0) - 1).abs().max() < 0.01
    assert torch.equal(A.argsort(1), r.argsort(1))
    moved = (torch.rand(8, 1) + 0.5) * r + torch.randn(8, 1)
    assert torch.allclose(didi.grouped_advantage(moved.flatten(), 4), A.flatten(), atol=0.01)
    outlier = didi.grouped_advantage(torch.tensor([1.0] + [0.0] * 24), 25)
    assert torch.allclose(outlier, torch.tensor([3.0] + [-1 / 24 ** 0.5] * 24), atol=0.01)
    for G in (1, 2, 3, 4, 7):  # equal rewards: no advantage at all
        r = torch.linspace(-8, 8, 801).repeat_interleave(G)
        assert (didi.grouped_advantage(r, G) == 0).all()


# ----------------------------------------------------------------------------------- student step
def test_terms_of_the_student_step():
    """weight and policy_loss by hand; KLs and entropy against torch.distributions."""
    w = didi.weight(torch.tensor([0.001, 0.1, 0.25, 1.0, 20.0]))
    assert torch.allclose(w, torch.tensor([10.0, 10.0, 4.0, 1.0, 0.1]))
    student, teacher = (Categorical(logits=torch.randn(5, 7)) for _ in range(2))
    forward, reverse = kl_divergence(teacher, student), kl_divergence(student, teacher)
    exact = {"forward": forward, "reverse": reverse, "jeffreys": (forward + reverse) / 2}
    for kind, kl in exact.items():
        ours = didi.kl_to_teacher(student.logits, teacher.logits, kind)
        assert torch.allclose(ours, kl, atol=1e-6)
    assert torch.allclose(didi.entropy(student.logits), student.entropy(), atol=1e-6)
    log_prob, A = torch.tensor([[-1.0, -2.0], [1.0, -3.0]]).requires_grad_().unbind()
    loss = didi.policy_loss(log_prob, A, torch.tensor([2.0, 1.0]), L=4)
    slopes = torch.autograd.grad(loss, (log_prob, A), allow_unused=True)
    assert slopes[0].tolist() == [-2 / 8, 3 / 8] and slopes[1] is None


# ------------------------------------------------------------------------ the whole loop, and sign
def divergence(table, p):
    """KL(q_student || q_reference) of texts, nats, enumerated; mean over levels of 2 steps."""
    laws = [chain(table, [1.0, tau, 0.0])[p > 0] for tau in (0.25, 0.5, 0.75)]
    return sum((q * (q / p[p > 0]).log()).sum() for q in laws).item() / 3


def train_student(p, positions, sign, updates, B=64, G=4, L=2):
    """The algorithm on tables; sign -1 turns the reward round. The student's table (S, L, V)."""
    student = torch.zeros(16, L, V, requires_grad=True)
    disc = TableDiscriminator(torch.zeros(16, L, requires_grad=True), positions)
    opt, disc_opt = torch.optim.Adam([student], 0.03), torch.optim.Adam([disc.r], 0.1)
    for _ in range(updates):
        levels, tau, pi = didi.draw_levels(torch.ones(B), 2)
        x, log_prob, _ = didi.rollout(lookup(student), masks(B, L), levels, MASK, G)
        x_ref, same_tau = Z[L][Categorical(p).sample((B * G,))], tau.repeat_interleave(G)
        z, z_ref = (didi.forward_mask(texts, same_tau, MASK) for texts in (x, x_ref))
        enter, enter_ref = disc.enters(z), disc.enters(z_ref)
        for _ in range(3):
            disc_opt.zero_grad()
            didi.discriminator_loss(disc(z_ref), enter_ref, disc(z), enter).backward()
            disc_opt.step()
        A = didi.grouped_advantage(sign * didi.reward(disc(z), enter), G)
        opt.zero_grad()
        didi.policy_loss(log_prob, A, (didi.weight(tau) / pi).repeat_interleave(G), L).backward()
        opt.step()
    return student.detach()


@both_positions
def test_the_student_moves_to_the_reference_and_away_if_the_reward_is_turned_round(positions):
    """The enumerated divergence from the reference, after training against before."""
    p, before = stutter(2), divergence(torch.zeros(16, 2, V), stutter(2))
    assert divergence(train_student(p, positions, 1, 80), p) < 0.75 * before
    assert divergence(train_student(p, positions, -1, 20), p) > 1.2 * before


# -------------------------------------------------------------------------------- guided sampling
def guided_law(log_p, tokens, R, h):
    """Law (n,) of tokens (n, k), all possible draws at k positions: log_p (k, V) + h E[R | x_i];
    or, h = None, of the one of two plain draws that is kept by softmax of R (n,)."""
    joint, law = log_p.gather(1, tokens.T).sum(0).exp(), torch.ones(len(tokens))
    if h is None:
        return 2 * joint * ((R[:, None] - R).sigmoid() @ joint)
    for i in range(len(log_p)):
        given = (joint * R) @ F.one_hot(tokens[:, i], V).float() / log_p[i].exp()  # E[R | x_i]
        law = law * (log_p[i] + h * given).softmax(-1)[tokens[:, i]]
    return law


def one_guided_step(table, guide, z, t, s, h):
    """Enumerated law (S,) of a step from z (L,), over the sets of positions it can reveal."""
    states, law, log_p = Z[len(z)], torch.zeros(len(table)), table[index(z)].log_softmax(-1)
    enter = guide.enters(states).float()
    R = (guide.r * enter).sum(1) / enter.sum(1).clamp(min=1)
    for A in torch.cartesian_prod(*[torch.tensor([False, True])] * len(z)):
        if not (A & (z != MASK)).any():
            out = torch.where(A, states != MASK, states == z).all(1)  # the possible z_s
            chance = (1 - s / t) ** A.sum() * (s / t) ** ((z == MASK) & ~A).sum()
            law[out] += chance * guided_law(log_p[A], states[out][:, A], R[out], h)
    return law


@both_positions
@pytest.mark.parametrize("h", [None, 1.0, 3.0])
def test_guided_steps_draw_from_the_enumerated_law(h, positions):
    """A tilted step against the enumerated derivative; h=None: re-ranked, against its softmax."""
    table, guide = torch.randn(64, 3, V), TableDiscriminator(2 * torch.randn(64, 3), positions)
    choose, passes = functools.partial(didi.tilted, discriminator=guide, h=h), 1
    if h is None:
        choose, passes = functools.partial(didi.reranked, discriminator=guide, M=2), 2
    for z in torch.tensor([[MASK, MASK, MASK], [MASK, 2, MASK]]):
        z_t, guide.rows = z.repeat(20000, 1), 0
        z_s, called = didi.ancestral_step(lookup(table), z_t, 0.9, 0.4, MASK, choose=choose)
        check_law(index(z_s), one_guided_step(table, guide, z, 0.9, 0.4, h))
        assert torch.equal(called, (z_s != z_t).any(1)) and guide.rows == called.sum() * passes


@both_positions
@pytest.mark.parametrize("h, M, switch", [(1.0, 1, 1.0), (0.0, 4, 0.0), (1.0, 4, 0.5)])
def test_guidance_raises_the_true_expected_reward(h, M, switch, positions):
    """The mean of the exact log ratio, data to plain samples, against the plain sampler's mean."""
    p, table, z = stutter(3), 0.3 * torch.randn(64, 3, V), masks(6000, 3)
    q = chain(table, [1, 0.75, 0.5, 0.25, 0])
    r = ((agrees(3) @ p) / (agrees(3) @ q)).log()  # (S,): nothing in it depends on t
    z[3000:, 1] = 2  # half of them have a prompt
    for sign in (1, -1):  # turned round, guidance lowers it
        guide = TableDiscriminator(sign * r[:, None].repeat(1, 3), positions)
        x, _, _ = didi.guided_sample(lookup(table), guide, z, 4, MASK, h, M, switch)
        assert (x != MASK).all() and (x[3000:, 1] == 2).all()
        got = r[index(x[:3000])]
        assert sign * (got.mean() - q[q > 0] @ r[q > 0]) > 6 * got.std() / 3000 ** 0.5


@both_positions
def test_guided_sampler_counts_both_networks(positions):
    """nfe and calls against the networks' own counts, and against the plan of steps by hand."""
    table, r, asked = torch.randn(64, 3, V), torch.randn(64, 3), []

    def denoiser(z, where):
        asked.append(len(z))
        return lookup(table)(z, where)
    for z in Z[3][:, None]:  # (1, L): alone, so that who asked is plain
        guide, before = TableDiscriminator(r, positions), z.clone()
        asked.clear()
        x, nfe, calls = didi.guided_sample(denoiser, guide, z, 6, MASK, M=4)
        assert nfe.item() == sum(asked) <= (z == MASK).sum() and calls.item() == guide.rows
        assert torch.equal(z, before) and (x != MASK).all()
        assert torch.equal(x[z != MASK], z[z != MASK])
    guide = TableDiscriminator(r, positions, noise_max=0.25)  # of s = 1/4, 1/8, 0 half are tilted
    _, _, calls = didi.guided_sample(denoiser, guide, masks(400, 3), 8, MASK, M=4)
    most = {"masked": 1 + 4, "all": 1 + 1 + 4}  # trained on masks alone it is blind at s = 0
    assert calls.sum() == guide.rows and calls.max() == most[positions]
    _, nfe, calls = didi.guided_sample(denoiser, guide, masks(400, 3), 1, MASK, M=4, switch=0.0)
    assert (nfe == 1).all() and (calls == {"masked": 0, "all": 4}[positions]).all()


# --------------------------------------------------------------------------------------- networks
CONFIG = model.Config(vocab_size=7, length=5, n_layer=3, n_head=2, n_embd=8)


@pytest.mark.parametrize("size", [7, 1030])  # the head of 1030 has columns that are cut
def test_denoiser_runs_its_head_where_asked_and_bfloat16_is_near(size):
    """Logits at n positions against those at all; those in bfloat16 against float32."""
    net, z = model.Denoiser(model.Config(size, 5, 3, 2, 8)), torch.randint(0, size + 1, (4, 5))
    e, exact, where, seen = net.embed(z), net(z), torch.rand(4, 5) < 0.5, []
    net.out.register_forward_hook(lambda module, inputs, out: seen.append(len(inputs[0])))
    assert net.config.mask_id == size and exact.shape == (4, 5, size)
    assert torch.allclose(net(z, where), exact[where], atol=1e-6) and seen == [where.sum()]
    trunk, net.bf16 = net.trunk(e), True
    assert net(z).dtype == torch.bfloat16 and net.trunk(e).dtype == torch.float32
    assert torch.allclose(net(z).float(), exact, atol=0.05)
    assert 0 < (net.trunk(e) - trunk).abs().max() < 0.1


@pytest.mark.parametrize("trainable", [0, 1, 3])
def test_discriminator_trains_a_copys_last_blocks_alone(trainable):
    """Parameters with a gradient against their names; the teacher's own stay as they were."""
    teacher = model.Denoiser(CONFIG)
    D, last = model.Discriminator(teacher, trainable), range(max(3 - trainable, 0), 3)
    learns = ("score", "body.norm", *[f"body.blocks.{k}." for k in last])
    D(torch.randint(0, 8, (4, 5))).square().sum().backward()
    for name, p in D.named_parameters():
        trained = p.grad is not None and bool(p.grad.any())
        assert trained == name.startswith(learns), name
    for name, p in teacher.blocks.named_parameters():
        assert p.requires_grad and p.grad is None
        assert torch.equal(p, D.body.blocks.get_parameter(name))
    with pytest.raises(ValueError, match="3 blocks"):
        model.Discriminator(teacher, 4)


def test_what_enters_the_discriminator_and_which_levels_it_knows():
    """enters and knows, by hand."""
    z, teacher, levels = torch.tensor([[7, 0, 7], [1, 2, 3]]), model.Denoiser(CONFIG), (0, 0.5, 0.6)
    masked, every = (model.Discriminator(teacher, 1, name, 0.5) for name in ("masked", "all"))
    assert masked.enters(z).tolist() == [[True, False, True], [False] * 3]
    assert every.enters(z).tolist() == [[True] * 3] * 2
    assert list(map(masked.knows, levels)) == [False, True, False]
    assert list(map(every.knows, levels)) == [True, True, False]


def test_soft_tokens_that_are_one_hot_are_tokens():
    """Logits of one-hot soft tokens against those of the tokens; in bfloat16 nearly so."""
    D, z = model.Discriminator(model.Denoiser(CONFIG), 1).eval(), torch.randint(0, 8, (4, 5))
    where = (z != 7) & (torch.rand(4, 5) < 0.5)
    probs = F.one_hot(z[where], 7).float().requires_grad_()
    soft = D.soft(z.masked_fill(where, 0), where, probs)
    assert where.any() and torch.allclose(soft, D(z), atol=1e-6)
    assert torch.autograd.grad(soft.sum(), probs)[0].abs().max() > 0
    D.body.bf16 = True
    assert 0 < (D.soft(z, where, probs) - soft).abs().max() < 0.1


def test_a_causal_model_sees_the_past_alone():
    """causal_nll by hand; all texts' probabilities add up to 1; what another token changes."""
    net, x = model.Denoiser(model.Config(V, 3, 2, 2, 8, causal=True)), Z[3][(Z[3] < MASK).all(1)]
    nll = train_teacher.causal_nll(net, x, MASK)  # (27, L)
    log_p = net(torch.cat((masks(27, 1), x[:, :-1]), 1)).log_softmax(-1)
    assert torch.allclose(nll, -log_p.gather(2, x[..., None])[..., 0], atol=1e-5)
    assert torch.isclose((-nll.sum(1)).exp().sum(), torch.tensor(1.0), atol=1e-4)
    for i in range(3):
        other = torch.where(torch.arange(3) == i, (x + 1) % V, x)
        moved = (train_teacher.causal_nll(net, other, MASK) - nll).abs().amax(0) > 1e-6
        assert not moved[:i].any() and moved[i:].all()


# ------------------------------------------------------------ checkpoints and the three scripts
HERE = os.path.dirname(os.path.abspath(__file__))
ON_CPU = ["--device", "cpu", "--no-bf16"]
TEACH = "--n_layer 2 --n_head 2 --n_embd 16 --batch 8 --updates 4 --warmup 1".split() + ON_CPU
DISTIL = "--groups 4 --G 2 --disc_blocks 2 --disc_warmup 1 --updates 2".split() + ON_CPU
TEACHER, STUDENT = (train_teacher, TEACH), (distill, DISTIL)
SCRIPTS = ("didi.py", "model.py", "train_teacher.py", "distill.py", "sample.py")
BOTH = pytest.mark.parametrize("script, flags", [TEACHER, STUDENT])


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """A folder with out/signatures of 80 lines, out/teacher.pt and out/student.pt, made once."""
    folder, lines = tmp_path_factory.mktemp("toys"), [f"def f{i}(a, b={i}):" for i in range(80)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        corpus.write_rows(corpus.DEFAULT, lines, "signatures", "bytes", 24, {})
        assert not train_teacher.main(TEACH) and not distill.main(DISTIL)
    return folder


@pytest.fixture
def tiny(toys, tmp_path, monkeypatch):
    """A test's own copy of that folder, entered; the handlers of signals are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def outcome(main, argv, capture):
    """Exit code, stdout and stderr of main(argv), as the shell would see them."""
    capture.readouterr()
    with pytest.raises(SystemExit) as stop:
        model.run_script(lambda: main(argv))
    return (stop.value.code, *capture.readouterr())


def refused(main, argv, capsys, word):
    """Exit code 2, and one line, the last, that has "error: " and this word in it."""
    code, _, err = outcome(main, argv, capsys)
    errors = [line for line in err.splitlines() if "error: " in line]
    assert code == 2 and errors == err.splitlines()[-1:] and word in errors[0], err


def load(path):
    """{name in a checkpoint: finite tensor}, but for what differs from run to run."""
    ckpt = torch.load(path, weights_only=True)
    found, _ = torch.utils._pytree.tree_flatten_with_path(ckpt | {"flags": 0, "seconds": 0})
    kinds = (torch.Tensor, int, float)
    tensors = {str(name): torch.as_tensor(x) for name, x in found if isinstance(x, kinds)}
    assert [name for name, x in tensors.items() if not x.isfinite().all()] == []
    return ckpt, tensors


def assert_same(*paths):
    a, b = (load(path)[1] for path in paths)
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []


def at_update(script, monkeypatch, number, act):
    """Call act(ema, model) at the end of this update of the weights, the first being number 1."""
    real, count = script.update_ema, itertools.count(1)

    def watched(ema, net, decay):
        real(ema, net, decay)
        if next(count) == number:
            act(ema, net)
    monkeypatch.setattr(script, "update_ema", watched)


class Evil:
    """Unpickling this makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_checkpoint_is_exact_and_survives_a_kill_while_it_is_written(tiny, monkeypatch):
    ckpt, ema = model.load_checkpoint("out/teacher.pt", ("teacher",))
    parts = {name: ckpt[name] for name in ("kind", "config", "model")}
    model.save_checkpoint("a.pt", {"ema": ema}, **parts, step=3)
    z = torch.randint(0, 257, (2, 24))
    assert torch.equal(ema(z), model.load_checkpoint("a.pt", ("teacher",))[1](z))
    assert "a.pt.partial" not in os.listdir() and not ema.position.requires_grad
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        model.save_checkpoint("a.pt", {"ema": ema}, **parts, step=4)
    assert load("a.pt")[0]["step"] == 3


def test_foreign_files_say_what_to_do_and_run_no_code(tiny, capsys):
    good, whole = load("out/teacher.pt")[0], (tiny / "out/teacher.pt").read_bytes()
    contents = [whole[:n] for n in range(0, len(whole), len(whole) // 20)]
    contents += [b"hello world", b"GIF89a", b"\x80\x04", b"(lp0\n."]
    for parts in ([], {"kind": "teacher"}, good | {"ema": {}}, good | {"step": Evil()}):
        torch.save(parts, "a.pt")
        contents.append((tiny / "a.pt").read_bytes())
    for content in contents:
        (tiny / "a.pt").write_bytes(content)
        with pytest.raises(ValueError, match="a.pt .*make it again"):
            model.load_checkpoint("a.pt", ("teacher",))
    refused(distill.main, [*DISTIL, "--teacher", "a.pt"], capsys, "a.pt")
    refused(sample.main, ["--model", "a.pt"], capsys, "a.pt")
    refused(train_teacher.main, ["--resume", "--out", "a.pt"], capsys, "a.pt")
    assert (tiny / "a.pt").read_bytes() == contents[-1] and not os.path.exists("executed")
    torch.load("a.pt", weights_only=False)
    assert os.path.exists("executed")  # so the trap was real


@BOTH
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("eval_every, seconds, number", [  # at a table, by the clock, on a signal
    ("1", 600, 0), ("99", -1, 0), ("99", 600, signal.SIGTERM)])
def test_nothing_that_is_not_finite_is_saved(
        tiny, capsys, monkeypatch, script, flags, part, eval_every, seconds, number):
    def spoil(*ema_and_model):
        ema_and_model[part].position.data[0, 0] = torch.nan
        os.kill(os.getpid(), number)
    at_update(script, monkeypatch, 1, spoil)
    monkeypatch.setattr(script, "SAVE_EVERY", seconds)
    refused(script.main, [*flags, "--eval_every", eval_every], capsys, "not finite")
    for path in glob.glob("out/*.pt"):
        load(path)


@pytest.mark.parametrize("script, flags", [TEACHER, (train_teacher, [*TEACH, "--muon"]), STUDENT])
@pytest.mark.parametrize("number, code, step, seconds", [
    (signal.SIGINT, 130, 2, 600), (signal.SIGTERM, 143, 2, 600), (signal.SIGKILL, -9, 1, -1)])
def test_resume_is_the_uninterrupted_run(
        tiny, capfd, monkeypatch, script, flags, number, code, step, seconds):
    """Stopped in its second update; kill -9 leaves what was saved by the clock in the first."""
    flags = [*flags, "--updates", "4", "--eval_every", "99"]
    assert not script.main([*flags, "--out", "a.pt"])
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(script, "SAVE_EVERY", seconds)
        at_update(script, monkeypatch, 2, lambda *_: os.kill(os.getpid(), number))
        found, *said = outcome(script.main, [*flags, "--out", "b.pt"], capfd)
        (tiny / "said").write_text("".join(said))
        os._exit(found)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    assert code < 0 or re.search("--resume", (tiny / "said").read_text())
    assert load("b.pt")[0]["step"] == step + {train_teacher: 0, distill: 1}[script]
    assert not script.main(["--resume", "--out", "b.pt"])  # the other flags: the checkpoint's
    assert_same("a.pt", "b.pt")


@pytest.mark.parametrize("flags", [
    "--paper", "--K 3", "--beta 2 2", "--mask_share 0", "--t_range .8 1", "--coupled",
    "--noise_max .9", "--positions masked", "--smoothing .1", "--disc_blocks 1", "--disc_lr 1e-2",
    "--no-group_norm", "--eps 2", "--w", "--pi", "--kl .5", "--kl_kind forward",
    "--kl_kind jeffreys", "--entropy .1", "--reference teacher", "--accumulate 2"])
def test_every_flag_of_the_method_changes_the_student(tiny, flags):
    assert not distill.main([*DISTIL, *flags.split(), "--out", "a.pt"])
    plain, changed = load("out/student.pt")[0]["model"], load("a.pt")[0]["model"]
    assert not torch.equal(plain["position"], changed["position"])


def test_accumulated_gradients_are_those_of_the_whole_batch(tiny, monkeypatch):
    rows = corpus.load(corpus.DEFAULT).batch(8, 24)
    monkeypatch.setattr(didi, "low_discrepancy_times", lambda B, device=None: torch.ones(B))
    for parts in (1, 2):
        chunks = itertools.cycle(rows.chunk(parts))
        monkeypatch.setattr(corpus.Corpus, "batch", lambda *_: next(chunks))
        argv = [*TEACH, "--updates", "1", "--accumulate", str(parts), "--out", f"{parts}.pt"]
        assert not train_teacher.main(argv)
    one, two = (load(f"{parts}.pt")[0]["optimizer"]["state"] for parts in (1, 2))
    assert all(torch.allclose(one[i]["exp_avg"], two[i]["exp_avg"], atol=1e-6) for i in one)
    assert max(state["exp_avg"].abs().max() for state in one.values()) > 1e-4


@BOTH
def test_minutes_fit_the_schedule_and_resume_counts_them(tiny, monkeypatch, script, flags):
    """With a clock of which every update takes 3 seconds, so that 20 make a minute."""
    clock = types.SimpleNamespace(perf_counter=functools.partial(next, itertools.count(0, 3)))
    monkeypatch.setattr(script, "time", clock)
    flags = [*flags, "--eval_every", "999", "--lr", "1e-3", "--out", "a.pt"]
    name = {train_teacher: "optimizer", distill: "opt"}[script]
    for more, step in (([], 20), (["--resume"], 24), (["--resume"], 24)):  # at last nothing to do
        assert not script.main([*flags, "--minutes", str(step / 20), *more])
        ckpt = load("a.pt")[0]
        assert ckpt["step"] == step and ckpt["seconds"] == 3 * step
        assert 1e-4 <= ckpt[name]["param_groups"][0]["lr"] < 2e-4  # a tenth of the peak, nearly


def test_muon_trains_the_matrices_and_a_compiled_run_is_the_same(tiny, monkeypatch):
    compiled, plain = [], load("out/teacher.pt")[0]["model"]
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled.append(f.__name__) or f)
    assert not train_teacher.main([*TEACH, "--compile", "--out", "a.pt"])
    assert compiled == ["trunk"]
    assert_same("a.pt", "out/teacher.pt")
    assert not train_teacher.main([*TEACH, "--muon", "--out", "a.pt"])
    ckpt, name = load("a.pt")[0], "blocks.0.up.weight"
    assert len(ckpt["muon"]["state"]) == 8 == len(plain) - len(ckpt["optimizer"]["state"])
    assert not torch.allclose(ckpt["model"][name], plain[name], atol=1e-4)


DRIVER = """
import importlib, sys, torch, model
script, real, seen = importlib.import_module(sys.argv[1]), model.average_gradients, []
def flat(net):
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
def watched(net):
    own, weights = flat(net), torch.cat([p.detach().flatten() for p in net.parameters()])
    real(net)
    seen.append((own, flat(net), weights))
    torch.save(seen, f"seen{model.RANK}.pt")
script.average_gradients = watched
model.run_script(lambda: script.main(sys.argv[2:]))
"""


def run(*command, path=""):
    """A command of a toy's size, by this Python; its output."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=150,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path})
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    return done.stdout


@BOTH
def test_two_processes_average_their_gradients(tiny, script, flags):
    """Each one's own differ, for they see other data; both go on with the mean, and stay equal."""
    (tiny / "driver.py").write_text(DRIVER)
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "driver.py",
        script.__name__, *flags, "--out", "new/a.pt", path=HERE)
    assert sorted(os.listdir("new")) == ["a.jsonl", "a.pt"]
    load("new/a.pt")
    seen = torch.load("seen0.pt"), torch.load("seen1.pt")
    assert len(seen[0]) == len(seen[1]) >= 4
    for (own, mean, weights), (own_1, mean_1, weights_1) in zip(*seen):
        assert torch.equal(mean, mean_1) and torch.equal(weights, weights_1)
        assert torch.allclose(mean, (own + own_1) / 2, atol=1e-6)
        assert not torch.allclose(own, own_1, atol=1e-5)


# ------------------------------------------------------------------------------------- sample.py
@pytest.mark.parametrize("flags, given, length", [
    ("--prompt def", "def", None), ("--infill d__o(_) --gap _", "d??o(?)", None),
    ("--infill d??o(?) --length 7", "d??o(?)", 7), ("--prompt def --length 9", "def", 9),
    ("--sampler rgas --infill de?f", "de?f", None)])
def test_given_text_stays_and_the_seed_decides(tiny, capsys, monkeypatch, flags, given, length):
    seen, real = [], corpus.decode
    monkeypatch.setattr(corpus, "decode", lambda x, *how: seen.append(x) or real(x, *how))
    for seed in ("0", "0", "1"):
        argv = ["--num", "12", "--steps", "4", "--seed", seed, *ON_CPU, *flags.split()]
        assert not sample.main(argv)
    x = seen[0]
    assert torch.equal(x, seen[1]) and not torch.equal(x, seen[2]) and x.max() <= 256
    assert all(c == "?" or x[:, i].eq(ord(c)).all() for i, c in enumerate(given))
    assert x[:, :length or len(given)].max() < 256  # the text does not end there ..
    assert length is None or x[:, length:].eq(256).all()  # .. but here
    assert len(capsys.readouterr().out.splitlines()) == 3 * (1 + 12)


def test_samples_are_shown_step_by_step_and_written_to_text_and_fasta(tiny, capsys):
    assert not sample.main(["--num", "5", "--out", "a.fa", *ON_CPU, "--prompt", "def"])
    capsys.readouterr()
    assert not sample.main(["--num", "5", "--out", "a.txt", *ON_CPU, "--prompt", "def", "--watch"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:13] for line in lines[:8]] == [f"step {k}/8: def" for k in range(1, 9)]
    assert "\u2591" in lines[0] and "\u2591" not in lines[7] and "\x1b" not in "".join(lines)
    text, fasta = ((tiny / name).read_text("utf-8").splitlines() for name in ("a.txt", "a.fa"))
    assert text == lines[9:] == fasta[1::2] and len(text) == 5
    assert all(line.startswith(">") for line in fasta[::2])


BAD = ((train_teacher, TEACH, """
    --device abacus, --length 3, --n_embd 15, --n_head 0, --updates 0, --minutes 0, --batch 0
    --lr 1e30, --accumulate 3, --accumulate 0, --eval_every 0, --data none: data.text
    --out out: folder, --data out/teacher.pt: data.text, --resume --out none.pt: train_teacher.py
    --resume --n_layer 1: fit, --resume --out out/student.pt: student"""), (distill, DISTIL, """
    --device abacus, --updates 0, --K 0, --G 1, --beta 0 1, --noise_max 0, --t_range .5 2
    --lr 1e30, --groups 3 --accumulate 2, --groups 0, --eval_every 0, --minutes 0
    --data none: data.text, --teacher none.pt: train_teacher.py, --teacher out/student.pt: student
    --resume --out none.pt: distill.py, --resume --disc_blocks 0: fit"""), (sample, ON_CPU, """
    --device abacus, --steps 0, --num 0, --temperature 0, --temperature nan, --batch 0, --length 25
    --length 2 --prompt def, --prompt def_a_text_of_25_letters_, --watch --sampler rgas
    --candidates 0 --sampler rgas, --model none.pt: distill.py, --out none/a.txt: none/a.txt
    --sampler rgas --model out/teacher.pt: rgas"""))  # argv: a word of the message, or its flag


@pytest.mark.parametrize("script, before, case", [
    (*bad[:2], case) for bad in BAD for case in re.findall(r"--[^,\n]*", bad[2])])
def test_bad_input_is_one_line(tiny, capsys, script, before, case):
    argv, _, word = case.partition(": ")
    if "--resume" not in argv:
        argv = " ".join([*before, argv])
    refused(script.main, argv.split(), capsys, word or case.split()[0])
    for path in glob.glob("out/*.pt"):
        load(path)


def test_the_three_commands_run_without_the_experiments(tiny):
    shutil.copytree(os.path.join(HERE, "data"), "data")
    for path in SCRIPTS:
        shutil.copy(os.path.join(HERE, path), path)
    run("train_teacher.py", *TEACH)
    run("distill.py", *DISTIL)
    assert len(run("sample.py", "--num", "3", *ON_CPU).splitlines()) == 4


# -------------------------------------------------------------------------------------- on a GPU
GPU = "cuda"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_gpu
def test_samples_on_a_gpu_have_the_law_of_a_lookup_table():
    """Two steps at two positions: both revealed at once, or the one or the other first."""
    torch.manual_seed(0)
    table, N = torch.randn(4, 4, 2, 3, device=GPU), 40000  # logits at each z_1, z_2
    p = table.softmax(-1)
    first, second = p[3, 3]
    law = first[:, None] * (second / 2 + p[:3, 3, 1] / 4) + second * p[3, :3, 0].T / 4
    x, _ = didi.sample(lambda z, where: table[z[:, 0], z[:, 1]][where],
                       torch.full((N, 2), 3, device=GPU), 2, 3)
    seen, expected = torch.bincount(x[:, 0] * 3 + x[:, 1], minlength=9), N * law.flatten()
    assert ((seen - expected) ** 2 / expected).sum() < 45  # chi-square, 8 degrees: p < 1e-6


@needs_gpu
def test_losses_and_gradients_on_a_gpu_are_those_of_the_cpu():
    torch.manual_seed(0)
    net, z, found = model.Denoiser(model.Config(50, 32, 2, 2, 64)), torch.full((8, 32), 50), []
    for device, bf16, bound in (("cpu", False, 0), (GPU, False, 1e-2), (GPU, True, 5e-2)):
        net.to(device).bf16 = bf16
        net.zero_grad()
        where = torch.ones(8, 32, dtype=torch.bool, device=device)
        loss = -didi.predict(net, z.to(device), where)[:, 7].mean()
        loss.backward()
        grads = [p.grad.flatten().cpu() for p in net.parameters()]
        found.append(torch.cat([loss.detach().cpu()[None], *grads]))
        assert (found[-1] - found[0]).norm() <= bound * found[0].norm()
        assert (found[-1] - found[0])[0].abs() <= bound * found[0][0]


@needs_gpu
def test_the_whole_way_on_a_gpu(tiny):
    """With a GPU's defaults, bfloat16 and a compiled teacher; checkpoints move between devices."""
    for script, flags in ((train_teacher, TEACH), (distill, DISTIL)):
        gpu = [*flags[:-len(ON_CPU)], "--device", GPU]
        assert not script.main([*gpu, "--out", "a.pt"])
        assert not script.main(["--resume", "--updates", "6", "--out", "a.pt"])
        load("a.pt")
    for flags in (["--device", GPU], ["--device", GPU, "--sampler", "rgas"], ON_CPU):
        assert not sample.main(["--model", "a.pt", "--num", "3", *flags])
