"""test_didi.py - the method against exact answers, in worlds that can be enumerated.

They have 3 tokens and 2 or 3 positions, and a "network" is a lookup table: row index(z) of a tensor
(S, L, V) holds its logits for the state z, S = (V + 1)^L. So the law of every sampler is a product
of small matrices, and its gradient comes from autograd. Texts of 1 to 3 tokens, padded to 3, have a
table of 4 + 16 + 64 rows, and their length comes first. Seeds are fixed; a bound on random numbers
is so wide that a fresh seed would fail a correct program less than once in 10^5: 5 standard errors,
or `check_law`. The two tests of an effect, the loop and guidance, ask for well less than is seen.
"""
import collections
import dataclasses
import functools
import os
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
Z = {L: torch.cartesian_prod(*[torch.arange(V + 1)] * L).view(-1, L) for L in (1, 2, 3)}  # (S, L)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ----------------------------------------------------------------------- a world of lookup tables
def index(z):
    """The row of each state z (.., L) in Z[L]."""
    return (z * (V + 1) ** torch.arange(z.shape[-1]).flip(0)).sum(-1)


def lookup(table, row=index):
    """A denoiser with these logits (S, L, V), its head passes them on; .seen: states asked for."""
    def denoiser(z, where):
        denoiser.seen.append(z)
        return table[row(z)][where]
    denoiser.hidden, denoiser.head, denoiser.seen = denoiser, lambda logits: logits, []
    denoiser.in_parts = lambda function, *rows: function(*rows)
    return denoiser


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


# texts of varying length: ids as of a model, whose last token is the pad, and the mask behind it
TEXTS = model.Config(V + 1, 3, n_layer=1, n_head=1, n_embd=8, pads=True)
PAD, HIDDEN = TEXTS.pad_id, TEXTS.mask_id
LENGTHS, ROWS = torch.tensor([0, 0.2, 0.5, 0.3]), (slice(0), slice(4), slice(4, 20), slice(20, 84))
SHORT = [F.pad(Z[n].where(Z[n] < MASK, HIDDEN), (0, 3 - n), value=PAD) for n in Z]  # (S, 3) each
STATES = torch.cat(SHORT)  # (84, 3)


def row(z):
    """The row of each state z (.., 3) in STATES."""
    n = (z != PAD).sum(-1)
    return (4 ** n - 4) // 3 + index(z.clamp(max=MASK)) // 4 ** (3 - n)


def of_lengths(law):
    """Law (84,) of states, from law(n) (S,), that of those of n tokens, for n = 1, 2, 3."""
    return torch.cat([LENGTHS[n] * law(n) for n in Z])


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

    def __init__(self, r):
        self.r, self.rows = r, 0

    def __call__(self, z, where=None, probs=None):
        self.rows += len(z)
        if where is None:
            return self.r[index(z)]
        p, L = F.one_hot(z, V + 1).float(), z.shape[1]
        p[where] = F.pad(probs, (0, 1))
        return p[:, torch.arange(L), Z[L]].prod(-1) @ self.r  # (B, S) @ (S, L)

    def enters(self, z):
        return torch.ones_like(z, dtype=torch.bool)


# ------------------------------------------------------------------------------- masked diffusion
def test_forward_mask_masks_a_share_t_of_the_text():
    """The masked share of each row against its t; the rest, all pads among it, against x."""
    t, x = torch.tensor([0.0, 0.2, 0.7, 1.0]), torch.randint(0, V + 1, (4, 20000))
    z, other = didi.forward_mask(x, t, HIDDEN, PAD), didi.forward_mask(x[1], 0.2, HIDDEN)
    n = (x != PAD).sum(1)
    rate = (z == HIDDEN).sum(1) / n
    assert ((rate - t).abs() <= 5 * (t * (1 - t) / n).sqrt()).all()
    assert ((z == x) | (z == HIDDEN)).all() and torch.equal(z == PAD, x == PAD)
    check_mean((other[0, x[1] == PAD] == HIDDEN).float(), 0.2)  # packed text has none


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


def test_nelbo_and_the_entropy_of_the_length_are_the_entropy_of_the_data():
    """Nats per text against the enumerated entropy of all 39 texts of 1 to 3 tokens: equal for the
    exact denoiser, above for another."""
    tables = [F.pad(exact_table(stutter(n), n), (0, 0, 0, 3 - n), value=torch.nan) for n in Z]
    exact, p = torch.cat(tables), of_lengths(stutter)  # (84, 3, V), (84,)
    x, H = STATES[Categorical(p).sample((60, 4000))], Categorical(p).entropy()

    def nats(table):
        bounds = torch.stack([didi.nelbo(lookup(table, row), b, HIDDEN, PAD)[0] for b in x])
        return bounds * (x != PAD).sum((1, 2)) / 4000 + Categorical(LENGTHS).entropy()
    check_mean(nats(exact), H)
    assert nats(exact + 0.5 * torch.randn(84, 3, V)).mean() > H + 0.02


def test_nelbo_is_the_weighted_sum_and_its_second_value_the_mean_over_masks():
    """Both values against sums over the same masks; without masks they and their slopes are 0."""
    table, t = torch.randn(84, 3, V, requires_grad=True), torch.linspace(0.3, 0.8, 6)
    x, rng = torch.cat([SHORT[n][:2] for n in range(3)]), torch.get_rng_state()
    z = didi.forward_mask(x, t, HIDDEN, PAD)
    torch.set_rng_state(rng)  # the same masks again
    bound, mean_nll = didi.nelbo(lookup(table, row), x, HIDDEN, PAD, t)
    log_p, hidden = table[row(z)].log_softmax(-1), (z == HIDDEN).float()  # (B, L, V), (B, L)
    nll = -(log_p * F.one_hot(x)[..., :V]).sum(-1) * hidden
    assert 0 < hidden.sum() < 12 and torch.isclose(mean_nll, nll.sum() / hidden.sum())
    assert torch.isclose(bound, (nll / t[:, None]).sum() / 12)  # of 2 texts each of 1, 2, 3 tokens
    none = didi.nelbo(lookup(table, row), x, HIDDEN, PAD, torch.zeros(6))
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
    with pytest.raises(ValueError, match="steps"):
        sampler(None, z=z, steps=0, mask_id=MASK)


@pytest.mark.parametrize("steps", [1, 3])
def test_samples_have_the_law_of_their_length_and_then_of_its_chain(steps):
    """From the start states of a real network with p(length), against the product of matrices."""
    net, table = model.Denoiser(TEXTS), torch.randn(84, 3, V)
    times = torch.linspace(1, 0, steps + 1)
    net.lengths.copy_(LENGTHS)
    z = net.start(net.draw_lengths(40000))
    x, nfe = didi.sample(lookup(table, row), z, steps, HIDDEN)
    assert torch.equal(x == PAD, z == PAD) and (nfe <= (z != PAD).sum(1)).all()
    check_law(row(x), of_lengths(lambda n: chain(table[ROWS[n], :n], times)))


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
    """log_prob and its gradient against a sum over the tokens that appear from state to state, KL
    and entropy against torch's own."""
    B, table = 90, torch.randn(84, 3, V, requires_grad=True)
    z, by_hand, mix = STATES[torch.randint(0, 84, (B,))], 0, torch.randn(B * G)
    z[:2] = SHORT[2][[-1, 0]]  # all to reveal, and nothing, in texts of 3
    levels, _, _ = didi.draw_levels(torch.linspace(0.2, 1, B), K)  # each row has its own
    net, teacher, terms = lookup(table, row), torch.randn(84, 3, V), []
    x, log_prob, regular = didi.rollout(net, z, levels, HIDDEN, G, lookup(teacher, row), "forward")
    states = [z.repeat_interleave(G, 0), *net.seen[1:], x]
    assert len(net.seen) == K and torch.equal(net.seen[0], z) and (x != HIDDEN).all()
    assert x.shape == (B * G, 3) and torch.equal(x == PAD, states[0] == PAD)
    for entered, before, after in zip(net.seen, states[:-1], states[1:]):
        p, q = (Categorical(logits=of[row(entered)][entered == HIDDEN]) for of in (teacher, table))
        terms.append(torch.stack((kl_divergence(p, q).mean(), q.entropy().mean())))
        assert torch.equal(after[before != HIDDEN], before[before != HIDDEN])
        log_p = F.pad(table[row(before)].log_softmax(-1), (0, 2))  # (B*G, L, V + 2)
        new = F.one_hot(after, V + 2) * (before != after).long()[..., None]
        by_hand = by_hand + (log_p * new).sum((1, 2))
    assert torch.allclose(log_prob, by_hand, atol=1e-5) and (log_prob[G:2 * G] == 0).all()
    assert torch.allclose(regular, sum(terms) / K, atol=1e-5)
    ours, = torch.autograd.grad(log_prob @ mix + regular[0] - 2 * regular[1], table)
    by_hand = by_hand @ mix + torch.tensor([1.0, -2.0]) @ sum(terms) / K
    theirs, = torch.autograd.grad(by_hand, table)
    assert theirs.abs().max() > 0.1 and torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("K", [1, 2, 3])
def test_rollout_law_and_policy_gradient_are_exact(K):
    """Trajectories against their enumerated law; policy_loss on all, weighted by probability,
    against the gradient of the expected reward, by autograd through the enumerated chain."""
    B, G, table = 60000, 4, (0.2 * torch.randn(84, 3, V)).requires_grad_()
    R, times, n = torch.randn(84), [1.0, 0.6, 0.3][:K] + [0.0], torch.multinomial(LENGTHS, B, True)
    levels = torch.tensor(times)[:, None].expand(-1, B)
    z = model.Denoiser(TEXTS).start(n)
    net = lookup(table, row)
    x, log_prob, _ = didi.rollout(net, z, levels, HIDDEN, G)
    states = [z.repeat_interleave(G, 0), *net.seen[1:], x]
    path = torch.stack(list(map(row, states)))  # (K + 1, B*G)
    prob = LENGTHS[n].repeat_interleave(G)  # (B*G,)
    for k in range(K):
        moves = [denoising(table[ROWS[m], :m].detach(), times[k], times[k + 1]) for m in Z]
        prob = prob * torch.block_diag(*moves)[path[k], path[k + 1]]
    code = (path * 84 ** torch.arange(K + 1)[:, None]).sum(0)
    kinds, kind = torch.unique(code, return_inverse=True)
    one = torch.zeros(len(kinds), dtype=torch.long).scatter_(0, kind, torch.arange(B * G))
    assert torch.isclose(prob[one].sum(), torch.tensor(1.0), atol=1e-4)  # every kind was seen
    check_law(kind[::G], prob[one])  # one of each group, whose lengths are the same
    pair, q = path[1].view(-1, G)[:, :2], [chain(table[ROWS[m], :m].detach(), times[:2]) for m in Z]
    law = [LENGTHS[m] * torch.outer(q[m - 1], q[m - 1]) for m in Z]  # a group shares its start ..
    check_law(pair @ torch.tensor([84, 1]), torch.block_diag(*law).flatten())  # .. and nothing else
    loss = didi.policy_loss(log_prob[one], R[path[-1, one]], prob[one] * len(one), L=2)
    ours, = torch.autograd.grad(loss, table)
    law = of_lengths(lambda m: chain(table[ROWS[m], :m], times))
    exact, = torch.autograd.grad(law @ R, table)
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
def test_best_discriminator_is_the_log_density_ratio(e):
    """Populations with known counts of each state, smoothing e: the loss, convex in the logits,
    has no slope at the closed form, and a slope elsewhere wherever the logit enters."""
    n, m = torch.randint(1, 20, (2, 16))  # of the reference and the student
    ref, student = (torch.arange(16).repeat_interleave(counts) for counts in (n, m))
    p, q, enter = n / n.sum(), m / m.sum(), torch.rand(16, 2) < 0.7
    best = (((1 - e) * p + e * q) / (e * p + (1 - e) * q)).log()[:, None].repeat(1, 2)
    assert best.abs().max() > 0.3 and 0 < enter.sum() < 32
    assert torch.allclose(didi.reward(best, enter), best[:, 0] * enter.any(1))

    def slope(r):
        r = r.requires_grad_()
        loss = didi.discriminator_loss(r[ref], enter[ref], r[student], enter[student], e)
        return torch.autograd.grad(loss, r)[0]
    assert slope(best.clone()).abs().max() < 1e-6
    for shift in (0.1, -0.1):
        assert torch.equal(slope(best + shift).sign(), enter.float() * torch.tensor(shift).sign())


@pytest.mark.parametrize("a", [0, 0.5, 1, 2, 3])
def test_a_power_of_the_ratio_descends_its_divergence(a):
    """E_q[reward * grad log q] against autograd of the alpha-divergence of enumerated laws."""
    p, theta = torch.randn(9).double().softmax(0), torch.randn(9).double().requires_grad_()
    q = theta.softmax(0)
    exact = {0: (q * (q / p).log()).sum(), 1: (p * (p / q).log()).sum(), 2: (p ** 2 / q).sum() / 2}
    divergence = exact[a] if a in exact else -(q ** (1 - a) * p ** a).sum() / (a * (1 - a))
    slope, = torch.autograd.grad(divergence, theta, retain_graph=True)
    reward = didi.ratio_power((p / q).log().detach(), a)
    ours, = torch.autograd.grad((q.detach() * reward * q.log()).sum(), theta)
    assert torch.allclose(ours, -slope, atol=1e-12)
    assert torch.equal(reward.argsort(), (p / q).argsort())


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
    for kind, kl in (("forward", forward), ("reverse", reverse)):
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


def train_student(p, sign, updates, B=64, G=4, L=2):
    """The algorithm on tables; sign -1 turns the reward round. The student's table (S, L, V)."""
    student = torch.zeros(16, L, V, requires_grad=True)
    disc = TableDiscriminator(torch.zeros(16, L, requires_grad=True))
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


def test_the_student_moves_to_the_reference_and_away_if_the_reward_is_turned_round():
    """The enumerated divergence from the reference, after training against before."""
    p, before = stutter(2), divergence(torch.zeros(16, 2, V), stutter(2))
    assert divergence(train_student(p, 1, 80), p) < 0.75 * before
    assert divergence(train_student(p, -1, 20), p) > 1.2 * before


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
    R = guide.r.mean(1)
    for A in torch.cartesian_prod(*[torch.tensor([False, True])] * len(z)):
        if not (A & (z != MASK)).any():
            out = torch.where(A, states != MASK, states == z).all(1)  # the possible z_s
            chance = (1 - s / t) ** A.sum() * (s / t) ** ((z == MASK) & ~A).sum()
            law[out] += chance * guided_law(log_p[A], states[out][:, A], R[out], h)
    return law


@pytest.mark.parametrize("h", [None, 1.0, 3.0])
def test_guided_steps_draw_from_the_enumerated_law(h):
    """A tilted step against the enumerated derivative; h=None: re-ranked, against its softmax."""
    table, guide = torch.randn(64, 3, V), TableDiscriminator(2 * torch.randn(64, 3))
    choose, passes = functools.partial(didi.tilted, discriminator=guide, h=h), 1
    if h is None:
        choose, passes = functools.partial(didi.reranked, discriminator=guide, M=2), 2
    for z in torch.tensor([[MASK, MASK, MASK], [MASK, 2, MASK]]):
        z_t, guide.rows = z.repeat(20000, 1), 0
        z_s, called = didi.ancestral_step(lookup(table), z_t, 0.9, 0.4, MASK, choose=choose)
        check_law(index(z_s), one_guided_step(table, guide, z, 0.9, 0.4, h))
        assert torch.equal(called, (z_s != z_t).any(1)) and guide.rows == called.sum() * passes


@pytest.mark.parametrize("h, M, switch", [(1.0, 1, 1.0), (0.0, 4, 0.0), (1.0, 4, 0.5)])
def test_guidance_raises_the_true_expected_reward(h, M, switch):
    """The mean of the exact log ratio, data to plain samples, against the plain sampler's mean."""
    p, table, z = stutter(3), 0.3 * torch.randn(64, 3, V), masks(6000, 3)
    q = chain(table, [1, 0.75, 0.5, 0.25, 0])
    r = ((agrees(3) @ p) / (agrees(3) @ q)).log()  # (S,): nothing in it depends on t
    z[3000:, 1] = 2  # half of them have a prompt
    for sign in (1, -1):  # turned round, guidance lowers it
        guide = TableDiscriminator(sign * r[:, None].repeat(1, 3))
        x, _, _ = didi.guided_sample(lookup(table), guide, z, 4, MASK, h, M, switch)
        assert (x != MASK).all() and (x[3000:, 1] == 2).all()
        got = r[index(x[:3000])]
        assert sign * (got.mean() - q[q > 0] @ r[q > 0]) > 6 * got.std() / 3000 ** 0.5


def test_guided_sampler_counts_both_networks():
    """nfe and calls against the networks' own counts, and against the plan of steps by hand."""
    table, r, asked = torch.randn(64, 3, V), torch.randn(64, 3), []

    def denoiser(z, where):
        asked.append(len(z))
        return lookup(table)(z, where)
    for z in Z[3][:, None]:  # (1, L): alone, so that who asked is plain
        guide, before = TableDiscriminator(r), z.clone()
        asked.clear()
        x, nfe, calls = didi.guided_sample(denoiser, guide, z, 6, MASK, M=4)
        assert nfe.item() == sum(asked) <= (z == MASK).sum() and calls.item() == guide.rows
        assert torch.equal(z, before) and (x != MASK).all()
        assert torch.equal(x[z != MASK], z[z != MASK])
    for steps, switch, most in ((1, 0.0, 4), (1, 0.5, 1), (3, 0.5, 1 + 1 + 4), (4, 0.0, 3 * 4)):
        guide = TableDiscriminator(r)
        z, how = masks(400, 3), {"M": 4, "switch": switch}
        _, nfe, calls = didi.guided_sample(denoiser, guide, z, steps, MASK, **how)
        assert calls.sum() == guide.rows and calls.max() == most and nfe.max() == min(steps, 3)


# --------------------------------------------------------------------------------------- networks
CONFIG = model.Config(vocab_size=7, length=5, n_layer=3, n_head=2, n_embd=8)


def test_denoiser_runs_its_head_where_asked_and_bfloat16_is_near():
    """Logits at n positions against those at all; those in bfloat16 against float32."""
    net, z = model.Denoiser(CONFIG), torch.randint(0, 8, (4, 5))
    e, exact, where, seen = net.embed(z), net(z), torch.rand(4, 5) < 0.5, []
    net.out.register_forward_hook(lambda module, inputs, out: seen.append(len(inputs[0])))
    assert net.config.mask_id == 7 and exact.shape == (4, 5, 7)
    assert torch.allclose(net(z, where), exact[where], atol=1e-6) and seen == [where.sum()]
    trunk, net.bf16 = net.trunk(e), True
    assert net(z).dtype == torch.bfloat16 and net.trunk(e).dtype == torch.float32
    assert torch.allclose(net(z).float(), exact, atol=0.05)
    assert 0 < (net.trunk(e) - trunk).abs().max() < 0.1


@pytest.mark.parametrize("trainable", [0, 1, 3, 4])
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


def test_a_causal_model_sees_the_past_alone_and_says_where_a_text_ends():
    """Nats of a text and its end, by hand: all texts that end, or fill L, add up to probability 1;
    what another token changes."""
    net, total = model.Denoiser(dataclasses.replace(TEXTS, causal=True)), 0.0
    texts = [torch.full((1, 3), PAD), *(SHORT[n][(Z[n + 1] < MASK).all(1)] for n in range(3))]
    for n, x in enumerate(texts):  # of n tokens
        log_p = net(F.pad(x[:, :-1], (1, 0), value=HIDDEN)).log_softmax(-1)
        nats = -log_p.gather(2, x[..., None])[:, :n + 1].sum((1, 2))
        total += (-nats).exp().sum()
        bound, loss = train_teacher.bound_and_loss(net, x)
        assert torch.isclose(loss, nats.mean() / min(n + 1, 3))
        assert n == 0 or torch.isclose(bound, nats.mean() / n)
    assert len(torch.cat(texts)) == 40 and torch.isclose(total, torch.tensor(1.0), atol=1e-5)
    nll = train_teacher.causal_nll(net, x, HIDDEN)  # of all 27 texts of 3 tokens
    for i in range(3):
        other = torch.where(torch.arange(3) == i, (x + 1) % V, x)
        moved = (train_teacher.causal_nll(net, other, HIDDEN) - nll).abs().amax(0) > 1e-6
        assert not moved[:i].any() and moved[i:].all()


def test_the_bound_reported_includes_the_length(monkeypatch):
    """Of texts all masked, so that it is a sum by hand; in parts as in the whole; the loss."""
    net, x = model.Denoiser(TEXTS), STATES[(STATES != HIDDEN).all(1)].repeat(3, 1)
    net.lengths.copy_(LENGTHS)
    data = types.SimpleNamespace(held_out=lambda n, L: x, measures=lambda *_: {"extra": 1})
    monkeypatch.setattr(didi, "low_discrepancy_times", lambda B, device=None: torch.ones(B))
    n, text = (x != PAD).sum(1), x != PAD  # 117 texts, in parts of 64
    log_p = net(net.start(n)).detach().log_softmax(-1).gather(2, (x * text)[..., None])[..., 0]
    bound = (-log_p[text].sum() - LENGTHS[n].log().sum()) / n.sum()
    found, loss = train_teacher.bound_and_loss(net, x)
    assert torch.isclose(found, bound) and torch.isclose(loss, -log_p[text].mean())
    row = train_teacher.validate(net, data, torch.device("cpu"))
    assert row == {"val_nelbo": pytest.approx(bound.item(), 1e-5), "extra": 1,
                   "val_ppl": pytest.approx(bound.exp().item(), 1e-5)}


def test_pads_stay_where_they_are_and_no_network_writes_or_judges_them():
    """Pads before against after in all that moves states; the head's columns; what enters."""
    net, z = model.Denoiser(TEXTS), STATES.repeat(20, 1)
    D, levels = model.Discriminator(net, 1), torch.tensor([[1.0], [0.5], [0.0]])
    assert net(z).shape == (1680, 3, V) and torch.equal(D.enters(z), z != PAD)
    for x in (didi.sample(net, z, 2, HIDDEN)[0], didi.guided_sample(net, D, z, 2, HIDDEN)[0],
              didi.rollout(net, z, levels.expand(-1, 1680), HIDDEN, 1)[0]):
        assert torch.equal(x == PAD, z == PAD) and (x != HIDDEN).all()


def test_lengths_are_drawn_from_the_histogram_and_packed_text_fills_the_passage():
    """draw_lengths against p(length); states by hand; packed text's bound against a plain sum."""
    net, packed = model.Denoiser(TEXTS), model.Denoiser(dataclasses.replace(TEXTS, pads=False))
    net.lengths.copy_(LENGTHS)
    check_law(net.draw_lengths(20000), LENGTHS)
    assert net.start(torch.tensor([1, 3])).tolist() == [[4, 3, 3], [4, 4, 4]]
    z = packed.start(packed.draw_lengths(6))
    assert (z == HIDDEN).all() and packed(z).shape == (6, 3, V + 1)
    x, found = torch.randint(0, V + 1, (6, 3)), []  # the last token is one like any other
    for bound in (train_teacher.bound_and_loss, functools.partial(didi.nelbo, mask_id=HIDDEN)):
        torch.manual_seed(1)
        found.append(bound(packed, x))
    torch.manual_seed(1)
    t = didi.low_discrepancy_times(6)[:, None]
    z = x.masked_fill(torch.rand(6, 3) < t, HIDDEN)
    nll = F.cross_entropy(packed(z).transpose(1, 2), x, reduction="none") * (z == HIDDEN)
    assert found[0] == found[1] and torch.isclose(found[0][0], (nll / t).sum() / 18)


# ------------------------------------------------------------ checkpoints and the three scripts
HERE = os.path.dirname(os.path.abspath(__file__))
ON_CPU = ["--device", "cpu", "--no-bf16"]
TEACH = "--n_layer 2 --n_head 2 --n_embd 16 --batch 8 --updates 4 --warmup 1".split() + ON_CPU
DISTIL = "--groups 4 --G 2 --disc_blocks 2 --disc_warmup 1 --updates 2 --kl .5".split()
DISTIL += ["--lr", "1e-3", *ON_CPU]


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


def load(path):
    """{name in a checkpoint: finite tensor}, but for what differs from run to run."""
    ckpt = torch.load(path, weights_only=True)
    found, _ = torch.utils._pytree.tree_flatten_with_path(ckpt | {"flags": 0, "seconds": 0})
    kinds = (torch.Tensor, int, float)
    tensors = {str(name): torch.as_tensor(x) for name, x in found if isinstance(x, kinds)}
    assert [name for name, x in tensors.items() if not x.isfinite().all()] == []
    return ckpt, tensors


class Evil:
    """Unpickling this makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_checkpoint_is_exact_and_survives_a_kill_while_it_is_written(tiny, monkeypatch):
    ckpt, ema = model.load_checkpoint("out/teacher.pt", ("teacher",))
    nets = {"model": ema, "ema": ema}
    parts = {name: ckpt[name] for name in ("kind", "config", "tokenizer", "flags", "seconds")}
    model.save_checkpoint("a.pt", nets, **parts, step=3)
    z = torch.randint(0, 257, (2, 24))
    assert torch.equal(ema(z), model.load_checkpoint("a.pt", ("teacher",))[1](z))
    assert "a.pt.partial" not in os.listdir() and not ema.norm.weight.requires_grad
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        model.save_checkpoint("a.pt", nets, **parts, step=4)
    assert load("a.pt")[0]["step"] == 3


def test_foreign_files_say_what_to_do_and_run_no_code(tiny):
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
    assert not os.path.exists("executed")
    torch.load("a.pt", weights_only=False)
    assert os.path.exists("executed")  # so the trap was real


@pytest.mark.parametrize("flags", [
    "--paper", "--K 2", "--beta 2 2", "--no-coupled", "--smoothing .1", "--disc_blocks 1",
    "--disc_lr 1e-3", "--no-group_norm", "--eps 2", "--w", "--pi", "--kl 0",
    "--kl_kind forward", "--power 1", "--entropy .1", "--temperature 2",
    "--reference teacher", "--accumulate 2"])
def test_every_flag_of_the_method_changes_the_student(tiny, flags):
    assert not distill.main([*DISTIL, *flags.split(), "--out", "a.pt"])
    plain, changed = load("out/student.pt")[0]["model"], load("a.pt")[0]["model"]
    assert not torch.equal(plain["norm.weight"], changed["norm.weight"])


def test_the_students_losses_are_means_over_text(tiny, monkeypatch):
    """Over the 15 or 17 tokens of each toy, not over all 24 positions: the rest are pads."""
    per_text, policy, entering, loss = [], didi.policy_loss, [], didi.discriminator_loss
    monkeypatch.setattr(didi, "policy_loss", lambda *a: per_text.append(a[3]) or policy(*a))
    monkeypatch.setattr(didi, "discriminator_loss", lambda *a: entering.append(a[1]) or loss(*a))
    assert not distill.main([*DISTIL, "--out", "a.pt"])
    counts = [*map(float, per_text), *torch.cat(entering).sum(1).tolist()]
    assert len(counts) == 2 + 3 * 4 and all(15 <= n <= 17 for n in counts)


def run(*command, path=""):
    """A command of a toy's size, by this Python; its output."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=150,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path})
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    return done.stdout


def starts(net, *flags):
    """Lengths (5000,) of the texts that `sample.py flags` begins, what is given in its place."""
    args = sample.parse_flags(["--num", "5000", *flags])
    ids = sample.given_tokens(args, corpus.make_tokenizer("bytes"), 257)
    z = sample.start_states(args, net, ids)
    n = (z != 256).sum(1)
    assert torch.equal(z[:, :len(ids)], torch.tensor([ids] * 5000).long())
    assert torch.equal(z[:, len(ids):] == 257, torch.arange(len(ids), 8) < n[:, None])
    return n


def test_the_length_of_a_sample_is_given_or_drawn():
    """Drawn lengths, with and without a prompt, against p(length); the others by hand."""
    net = model.Denoiser(model.Config(length=8, n_layer=1, n_head=1, n_embd=8, pads=True))
    packed = model.Denoiser(dataclasses.replace(net.config, pads=False))
    net.lengths.copy_(torch.tensor([0, 0.1, 0.2, 0, 0.4, 0.3, 0, 0, 0]))
    check_law(starts(net), net.lengths)
    check_law(starts(net, "--prompt", "ab"), net.lengths.masked_fill(torch.arange(9) < 2, 0) / 0.9)
    for flags, n in (("--prompt ab --length 8", 8), ("--infill a?b", 3), ("--infill ???????", 7)):
        assert (starts(net, *flags.split()) == n).all()
    for flags in ("--prompt abc", "--infill a?b"):
        assert (starts(packed, *flags.split()) == 8).all()
    for of, flags in ((net, "--prompt abc --length 2"), (net, "--prompt abcdef"),
                      (net, "--infill a?b --length 3"), (net, "--length 9"),
                      (net, "--infill ?????????"), (packed, "--length 8")):
        with pytest.raises(ValueError, match="--length"):
            starts(of, *flags.split())


def test_the_three_commands_run_without_the_experiments(tiny):
    shutil.copytree(os.path.join(HERE, "data"), "data")
    for path in ("didi.py", "model.py", "train_teacher.py", "distill.py", "sample.py"):
        shutil.copy(os.path.join(HERE, path), path)
    run("train_teacher.py", *TEACH)
    run("distill.py", *DISTIL)
    assert len(run("sample.py", "--num", "3", *ON_CPU).splitlines()) == 4
