"""test_didi.py - the method against exact answers, in worlds that can be enumerated.

They have 3 tokens and 1 to 3 positions, and a "network" is a lookup table: row index(z) of a tensor
(S, L, V) holds its logits for the state z, S = (V + 1)^L. So the law (the distribution) of every
sampler is a product of small matrices, and its gradient comes from autograd. Texts of 1 to 3
tokens, padded to 3, have a table of 4 + 16 + 64 rows; their length is drawn first. Seeds are fixed;
bounds on random numbers are so wide that a fresh seed fails a correct program less than once in
10^5: 5 standard errors, or `check_law`. Tests of an effect, the loop and guidance, require clearly
less than is observed.
"""

import dataclasses
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

import didi
import model
import train_teacher

torch.set_num_threads(1)
V, MASK = 3, 3
ORDERS = ["random", "interlaced"]
BOTH_ORDERS = pytest.mark.parametrize("order", ORDERS)
Z = {
    L: torch.cartesian_prod(*[torch.arange(V + 1)] * L).view(-1, L)
    for L in (1, 2, 3)
}  # (S, L)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ----------------------------------------------------------------------- a world of lookup tables
def index(z):
    """Return the row of each state z (.., L) in Z[L]."""
    L = z.shape[-1]
    powers = (V + 1) ** torch.arange(L, device=z.device).flip(0)
    return (z * powers).sum(-1)


def lookup(table, row=index):
    """Return a denoiser with these logits (S, L, V); it lists the z and `where` it was given."""

    def denoiser(z, where=...):
        denoiser.seen.append(z)
        denoiser.asked.append(where)
        return table[row(z)][where]

    denoiser.seen = []
    denoiser.asked = []
    return denoiser


def masks(n, L):
    return torch.full((n, L), MASK)


def stutter(L):
    """Return a law of texts (S,) that favours equal neighbours: far from what one step writes."""
    texts = Z[L]
    equal_neighbours = (texts[:, 1:] == texts[:, :-1]).sum(-1)
    zeros = (texts == 0).sum(-1)
    score = 2.0 * equal_neighbours + 0.8 * zeros - 0.3 * texts[:, 0]
    masked = (texts == MASK).any(-1)
    return score.masked_fill(masked, -torch.inf).softmax(0)


def agrees(L):
    """Return (S, S): 1 if the state of the row could be the text of the column, partly masked."""
    z = Z[L][:, None]
    could_be = (z == Z[L]) | (z == MASK)  # (S, S, L)
    return could_be.all(-1).float()


def exact_table(p, L):
    """Return the logits (S, L, V) of p's denoiser by Bayes' rule: the log of the sum of
    p(x) [x_i = v] over the texts x that agree."""
    one_hot = F.one_hot(Z[L])[..., :V].float()
    sums = torch.einsum("zx,x,xlv->zlv", agrees(L), p, one_hot)
    return sums.clamp(min=1e-20).log()


def noising(s, t, L):
    """Return q(z_t | z_s) (S, S): a visible token is masked with probability (t - s)/(1 - s)."""
    visible = (Z[L] != MASK).sum(-1)
    hidden = visible[:, None] - visible
    m = (t - s) / (1 - s)
    return agrees(L).T * m**hidden * (1 - m) ** visible


def grid(steps, exponent=1):
    """Return the times of a sampler's steps."""
    return [1 - (k / steps) ** exponent for k in range(steps + 1)]


def plans(n, times, order, L):
    """Return all ways to reveal the first n of L positions along times: pairs of a probability and
    a plan (n,), the step of each position. The interlaced ones are found by cutting the range of u
    where a reveal time crosses a level."""
    levels = torch.tensor(times)
    if order == "random":
        share = -levels.diff()
        steps = itertools.product(range(len(share)), repeat=n)
        found = torch.tensor(list(steps))  # (plans, n)
        return list(zip(share[found].prod(1), found))

    base = torch.tensor({2: [0, 1], 3: [0, 2, 1, 3]}[L])
    M = len(base)
    cuts = [M * s - j for s in times for j in range(M)]
    cuts = torch.tensor(cuts).unique()  # sorted
    cuts = cuts[(cuts >= 0) & (cuts <= 1)]
    found = []
    for low, high in itertools.pairwise(cuts):
        for shift in range(M):
            j = base[(torch.arange(n) + shift) % M]
            a = (j + (low + high) / 2) / M
            plan = (a[:, None] < levels[1:]).sum(1)
            found.append(((high - low) / M, plan))
    return found


def chain(table, times, start=-1, order="random", L=None):
    """Return the law (S,) of texts after steps times[0] -> times[1] -> .. -> 0 from the state
    `start`, by default the last, all masks: a mixture over plans."""
    n = table.shape[1]
    texts = Z[n]
    hidden = texts[start] == MASK
    agree = (texts == texts[start]) | hidden
    possible = (agree & (texts != MASK)).all(1)
    log_p = F.pad(table.log_softmax(-1), (0, 1))
    law = torch.zeros(len(texts))
    for chance, plan in plans(n, times, order, L or n):
        log_prob = 0.0
        for i in hidden.nonzero()[:, 0]:
            earlier = (plan < plan[i]) | ~hidden
            z = torch.where(earlier, texts, MASK)
            log_prob = log_prob + log_p[index(z), i, texts[:, i]]
        law = law + chance * log_prob.exp() * possible
    return law


# Texts of varying length, with the ids of a model: its last token is the pad, the mask comes after.
TEXTS = model.Config(
    V + 1, 3, n_layer=1, n_head=1, n_embd=8, pads=True
)
PAD, HIDDEN = TEXTS.pad_id, TEXTS.mask_id
LENGTHS = torch.tensor([0, 0.2, 0.5, 0.3])
STATES = torch.cat([
    F.pad(Z[n].where(Z[n] < MASK, HIDDEN), (0, 3 - n), value=PAD)
    for n in Z
])
COMPLETE = STATES[(STATES != HIDDEN).all(1)]  # the 39 texts of 1 to 3 tokens


def row(z):
    """Return the row of each state z (.., 3) in STATES (84, 3)."""
    n = (z != PAD).sum(-1)
    first = (4**n - 4) // 3  # of those with n tokens
    return first + index(z.clamp(max=MASK)) // 4 ** (3 - n)


def mix_lengths(law):
    """Return the law (84,) of states, given law(n) (S,) of those with n tokens."""
    return torch.cat([LENGTHS[n] * law(n) for n in Z])


def chain_of_lengths(table, times, order):
    """Return the law (84,) of texts when a length is drawn first, then its `chain`."""
    tables = dict(zip(Z, table.split([4, 16, 64])))

    def law(n):
        return chain(tables[n][:, :n], times, order=order, L=3)

    return mix_lengths(law)


def check_law(drawn, law):
    """Assert by chi-square that indices (n,) come from law (S,); false-alarm rate 10^-6
    (Wilson-Hilferty)."""
    counts = torch.bincount(drawn, minlength=len(law)).double()
    expected = law.double() * len(drawn)
    assert counts[law == 0].sum() == 0, "drew something impossible"

    rare, most = expected < 10, expected.argmax()
    for cells in (counts, expected):
        cells[most] += cells[rare].sum()
    df = (~rare).sum() - 1
    chi2 = ((counts - expected) ** 2 / expected)[~rare].sum()
    variance = 2 / (9 * df)
    assert df > 0
    assert chi2 < df * (1 - variance + 4.75 * variance**0.5) ** 3


def check_uniform(values):
    """Assert by chi-square that values (n,) are uniform in [0, 1]."""
    tenths = (values * 10).long().clamp(max=9)
    check_law(tenths, torch.full((10,), 0.1))


def check_mean(values, expected, rounding=0):
    """Assert that the mean of independent values (n,) is the one expected."""
    error = 5 * values.std() / len(values) ** 0.5
    assert abs(values.mean() - expected) < error + rounding


class TableDiscriminator:
    """Look up logits in r (S, L), for soft tokens their mean over independent draws.

    Count the rows.
    """

    def __init__(self, r):
        self.r = r
        self.rows = 0

    def __call__(self, z, where=None, probs=None):
        self.rows += len(z)
        if where is None:
            return self.r[index(z)]
        p = F.one_hot(z, V + 1).float()
        p[where] = F.pad(probs, (0, 1))
        L = z.shape[1]
        of_states = p[:, torch.arange(L), Z[L]].prod(-1)  # (B, S)
        return of_states @ self.r


# ------------------------------------------------------------------------------- masked diffusion
@BOTH_ORDERS
@pytest.mark.parametrize("L", [1, 2, 3, 48])
def test_each_reveal_time_is_uniform(order, L):
    a = didi.reveal_times(masks(20000, L), order)

    for i in {0, L // 2, L - 1}:
        check_uniform(a[:, i])


@pytest.mark.parametrize("N", [2, 4, 8, 16])
def test_interlaced_tokens_of_a_step_are_at_least_N_apart(N):
    a = didi.reveal_times(masks(500, 48), "interlaced")

    for step in range(N):
        row, i = ((a * N).long() == step).nonzero().T
        same = row[1:] == row[:-1]
        assert i.diff()[same].min() >= N


@pytest.mark.parametrize("t", [
    0.4,
    torch.tensor([0.0, 0.2, 0.7, 1.0])
])
@BOTH_ORDERS
def test_forward_mask_masks_the_text_that_is_revealed_below_t(monkeypatch, t, order):
    a = {order: torch.rand(4, 200)}
    monkeypatch.setattr(didi, "reveal_times", lambda x, order: a[order])
    x = torch.randint(0, V + 1, (4, 200))

    z = didi.forward_mask(x, t, HIDDEN, PAD, order)

    hidden = a[order] < torch.as_tensor(t).view(-1, 1)
    assert torch.equal(z, x.masked_fill(hidden & (x != PAD), HIDDEN))


@pytest.fixture
def batches():
    """Return the times (4000, 4) of batches of four."""
    return torch.stack([
        didi.low_discrepancy_times(4)
        for _ in range(4000)
    ])


def test_low_discrepancy_times_are_one_in_each_stratum(batches):
    gaps = batches.sort(1).values.diff(dim=1)

    assert torch.allclose(gaps, torch.tensor(0.25), atol=1e-6)


def test_each_low_discrepancy_time_is_uniform(batches):
    for t in batches.T:
        check_uniform(t)


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-24])
def test_low_discrepancy_times_are_above_0_and_at_most_1(monkeypatch, u):
    monkeypatch.setattr(torch, "rand", lambda *size, **how: torch.tensor(u))

    t = torch.cat([didi.low_discrepancy_times(B) for B in (1, 3, 64)])

    assert (t > 0).all()
    assert (t <= 1).all()


def test_the_bound_of_the_exact_denoiser_is_the_entropy_of_the_data():
    """Compare 60 bounds, nats per text with its length, each on 4,000 texts, with the entropy of
    the enumerated law of all texts."""
    p = mix_lengths(stutter)
    tables = []
    for n in Z:
        table = exact_table(stutter(n), n)
        tables.append(F.pad(table, (0, 0, 0, 3 - n), value=torch.nan))
    net = lookup(torch.cat(tables), row)

    nats = []
    for x in STATES[Categorical(p).sample((60, 4000))]:
        bound, _ = didi.nelbo(net, x, HIDDEN, PAD, order="random")
        nats.append(bound / 4000)

    bounds = torch.stack(nats) + Categorical(LENGTHS).entropy()
    check_mean(bounds, Categorical(p).entropy())


def test_nelbo_is_the_weighted_sum_and_its_loss_the_mean_over_masks():
    table = torch.randn(84, 3, V)
    net = lookup(table, row)
    t = torch.linspace(0.3, 0.8, 6)
    x = STATES[[0, 1, 4, 5, 20, 21]]  # 2 texts each of 1, 2, 3 tokens: 12 tokens

    bound, loss = didi.nelbo(net, x, HIDDEN, PAD, t)

    z, = net.seen
    log_p = table[row(z)].log_softmax(-1)  # (B, L, V)
    log_p_token = (log_p * F.one_hot(x)[..., :V]).sum(-1)
    masked = z == HIDDEN
    nll = -log_p_token * masked
    assert 0 < masked.sum() < 12
    assert torch.isclose(bound, (nll / t[:, None]).sum())
    assert torch.isclose(loss, nll.sum() / masked.sum())


def test_nelbo_masks_in_the_order_given():
    """At t = 1/2 an interlaced text of 2 tokens has exactly one mask."""
    net = lookup(torch.randn(16, 2, V))
    x = torch.zeros(100, 2).long()

    didi.nelbo(net, x, MASK, t=torch.full([100], 0.5), order="interlaced")

    assert ((net.seen[0] == MASK).sum(1) == 1).all()


def test_nelbo_without_masks_is_0_and_so_is_its_slope():
    table = torch.randn(84, 3, V, requires_grad=True)
    net = lookup(table, row)
    t = torch.zeros(3)

    bound, loss = didi.nelbo(net, STATES[:3], HIDDEN, PAD, t)

    slope, = torch.autograd.grad(bound + loss, table)
    assert bound == 0
    assert loss == 0
    assert (slope == 0).all()


# --------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize("u, token", [
    (0.0, 1),
    (1 - 1e-8, 1),
    (1 - 1e-10, 2),
    (1 - 2.0**-53, 2)
])
def test_draw_keeps_the_tail_and_draws_nothing_impossible(monkeypatch, u, token):
    log_p_x = torch.tensor([[0.0, 1.0, 1e-9, 0.0]]).log()  # 1 + 1e-9 is 1 in float32
    monkeypatch.setattr(
        torch, "rand", lambda *size, **how: torch.full(size, u, **how)
    )

    assert didi.draw(log_p_x, 2).tolist() == [[token, token]]


def step_from(table, z, t, s, **how):
    """Take a step in random order: the masks of z have times below t."""
    a = t * torch.rand(z.shape)
    return didi.ancestral_step(lookup(table), z, a, s, MASK, **how)


def step_beside_bayes(p):
    """Take a step from .8 to .3 with the exact denoiser of p, from states whose rows are drawn.

    Return these rows (40000,), z_s, and q(z_s | z_t) (S, S) by Bayes' rule: a row for each z_t.
    """
    table = exact_table(p, 2)
    start = torch.randint(0, 16, (40000,))
    z_s, _ = step_from(table, Z[2][start], 0.8, 0.3)
    q = p @ noising(0, 0.3, 2)
    joint = q[:, None] * noising(0.3, 0.8, 2)  # (z_s, z_t)
    return start, z_s, (joint / joint.sum(0)).T


def test_an_ancestral_step_of_independent_tokens_is_bayes_rule():
    first = torch.tensor([0.6, 0.3, 0.1, 0.0])
    second = torch.tensor([0.2, 0.1, 0.7, 0.0])
    p = torch.outer(first, second).flatten()

    start, z_s, bayes = step_beside_bayes(p)

    check_law(start * 16 + index(z_s), bayes.flatten() / 16)


@pytest.mark.parametrize("i", [0, 1])
def test_an_ancestral_step_has_the_marginals_of_bayes_rule(i):
    start, z_s, bayes = step_beside_bayes(stutter(2))

    marginal = bayes @ F.one_hot(Z[2][:, i]).float()  # (z_t, V + 1)
    check_law(start * 4 + z_s[:, i], marginal.flatten() / 16)


PROMPT = 55  # the row of [MASK, 1, MASK]


def guide(z, where=None, probs=torch.ones(1)):
    return z + probs.sum()


SAMPLERS = [  # the last two are guided, but without effect
    didi.sample,
    functools.partial(didi.guided_sample, discriminator=guide, h=0, switch=1),
    functools.partial(didi.guided_sample, discriminator=guide, M=1, switch=0)
]


@pytest.mark.parametrize("L, start", [(2, -1), (3, -1), (3, PROMPT)])
@pytest.mark.parametrize("steps, T", [(1, 1.0), (2, 0.5), (3, 1.0), (5, 0.5)])
@pytest.mark.parametrize("sampler", SAMPLERS)
@BOTH_ORDERS
def test_samplers_draw_from_the_enumerated_chain(L, start, steps, T, sampler, order):
    table = torch.randn(len(Z[L]), L, V)

    x, *_ = sampler(
        denoiser=lookup(table),
        z=Z[L][start].repeat(20000, 1),
        steps=steps,
        mask_id=MASK,
        temperature=T,
        order=order,
        exponent=2
    )

    law = chain(table / T, grid(steps, 2), start, order)
    check_law(index(x), law)


@BOTH_ORDERS
@pytest.mark.parametrize("steps", [1, 3])
def test_samples_have_the_law_of_their_length_and_then_of_its_chain(steps, order):
    net = model.Denoiser(TEXTS)
    net.lengths.copy_(LENGTHS)
    table = torch.randn(84, 3, V)

    z = net.start(net.draw_lengths(40000))
    x, _ = didi.sample(
        lookup(table, row), z, steps, HIDDEN, order=order, exponent=1
    )

    check_law(row(x), chain_of_lengths(table, grid(steps), order))


@pytest.fixture(params=[1, 2, 4, 40])
def written(request):
    """Fill five of each state of texts in so many steps.

    Return the number of steps, the states (steps + 1, 420, 3), x and nfe, and the denoiser.
    """
    net = lookup(torch.randn(84, 3, V), row)
    z = STATES.repeat(5, 1)
    states = [z]
    x, nfe = didi.sample(
        net, z, request.param, HIDDEN, on_step=states.append
    )
    return request.param, torch.stack(states), x, nfe, net


def test_each_step_shows_a_state_and_the_last_one_the_texts(written):
    steps, states, x, _, _ = written

    assert len(states) == steps + 1
    assert torch.equal(states[0], STATES.repeat(5, 1))  # the caller's tensor is unchanged
    assert torch.equal(states[-1], x)
    assert (x != HIDDEN).all()


def test_what_is_visible_stays_in_every_state(written):
    _, states, _, _, _ = written

    earlier, later = states[:-1], states[1:]
    assert torch.equal(later[earlier != HIDDEN], earlier[earlier != HIDDEN])


def test_the_denoiser_is_called_where_tokens_appear_and_nowhere_else(written):
    _, states, _, nfe, net = written

    before = states[:-1]
    appear = states[1:] != before  # (steps, 420, 3)
    called = appear.any(-1)
    assert torch.equal(nfe, called.sum(0))
    assert torch.equal(torch.cat(net.seen), before[called])
    assert torch.equal(torch.cat(net.asked), appear[called])


# ---------------------------------------------------------------------------------------- rollout
@pytest.mark.parametrize("K", [1, 2, 3])
def test_levels_fall_from_1_to_0(K):
    levels, _ = didi.draw_levels(4000, K)

    assert levels.shape == (K + 1, 4000)
    assert (levels[0] == 1).all()
    assert (levels[-1] == 0).all()
    assert (levels.diff(dim=0) < 0).all()


@pytest.mark.parametrize("K", [1, 2, 3])
def test_tau_is_uniform_below_the_level_before(K):
    levels, tau = didi.draw_levels(40000, K)

    above = levels[max(K - 2, 0)]
    assert K == 1 or torch.equal(tau, levels[-2])
    check_uniform(tau / above)


def test_no_level_is_nearly_the_one_before_or_nearly_nothing():
    levels, tau = didi.draw_levels(4000, 3)

    for share in (levels[1], tau / levels[1]):
        assert share.min() == pytest.approx(0.02)
        assert share.max() == pytest.approx(0.98)


def test_a_state_without_masks_adds_nothing_to_the_regularisers():
    """The first of two steps reveals every mask, so half of its mean is left."""
    table = torch.randn(16, 2, V)
    teacher = torch.randn(16, 2, V)
    _, _, states = didi.rollout(
        lookup(table), masks(3, 2), [1.0, 0.0, 0.0], MASK, keep_states=True
    )

    kl, entropy = didi.regularisers(states, lookup(teacher), MASK)

    p = Categorical(logits=teacher[-1])
    q = Categorical(logits=table[-1])
    assert torch.isclose(kl, kl_divergence(p, q).mean() / 2)
    assert torch.isclose(entropy, q.entropy().mean() / 2)


TIMES = [
    [1.0, 0.0],
    [1.0, 0.6, 0.0],
    [1.0, 0.6, 0.3, 0.0]
]


def path_probability(table, states, times, order):
    """Return the enumerated probability (B,) of paths through states (K + 1, B, 3)."""
    lengths = (states[0] == HIDDEN).sum(1)
    prob = LENGTHS[lengths]
    for z, z_s in itertools.pairwise(states):
        p = F.pad(table[row(z)].softmax(-1), (0, 2))  # (B, 3, ids)
        p_token = p.gather(2, z_s[..., None])[..., 0]
        revealed = (z == HIDDEN) & (z_s != HIDDEN)
        prob = prob * p_token.where(revealed, 1).prod(1)

    steps = (states[1:] == HIDDEN).sum(0)  # (B, 3): the step that reveals each position
    for n in Z:
        for b in (lengths == n).nonzero()[:, 0]:
            prob[b] *= sum(
                chance
                for chance, plan in plans(n, times, order, 3)
                if torch.equal(plan, steps[b, :n])
            )
    return prob


def roll_out(table, times, order):
    """Roll 240,000 texts out from all masks; return the rows of their states (K + 1, B), and
    log_prob (B,)."""
    lengths = torch.multinomial(LENGTHS, 240_000, True)
    z = model.Denoiser(TEXTS).start(lengths)
    x, log_prob, states = didi.rollout(
        lookup(table, row), z, times, HIDDEN, order, keep_states=True
    )
    rows = [row(z) for z, _ in states]
    return torch.stack([*rows, row(x)]), log_prob


@pytest.fixture(params=itertools.product(TIMES, ORDERS))
def paths(request):
    """Return all paths of rollouts from all masks; each occurs at least once in 240,000.

    That is: times and order; the student's table; for every rollout, the number of its path; for
    every path, its probability by enumeration, one rollout's log_prob and its text's row.
    """
    times, order = request.param
    table = (0.2 * torch.randn(84, 3, V)).requires_grad_()
    rows, log_prob = roll_out(table, times, order)

    kinds, kind = rows.unique(dim=1, return_inverse=True)
    one = torch.zeros(kinds.shape[1], dtype=torch.long)
    one[kind] = torch.arange(len(kind))
    prob = path_probability(table.detach(), STATES[kinds], times, order)
    return times, order, table, kind, prob, log_prob[one], kinds[-1]


def test_a_rollout_takes_each_path_as_often_as_its_law_says(paths):
    _, _, _, kind, prob, _, _ = paths

    total = prob.sum()
    assert total.item() == pytest.approx(1, abs=1e-4)  # every path was seen
    check_law(kind, prob)


def test_the_policy_gradient_is_the_gradient_of_the_expected_reward(paths):
    """Compare policy_loss on all paths, weighted by probability, with the enumerated gradient."""
    times, order, table, _, prob, log_prob, last = paths
    R = torch.randn(84)
    w = prob * len(prob)

    loss = didi.policy_loss(log_prob, R[last], w, length=2)

    ours, = torch.autograd.grad(loss, table)
    expected = chain_of_lengths(table, times, order) @ R
    exact, = torch.autograd.grad(expected, table)
    assert exact.abs().max() > 0.01
    assert torch.allclose(-ours * 2, exact, atol=1e-5)


@BOTH_ORDERS
def test_a_rollout_keeps_each_rows_own_levels(monkeypatch, order):
    levels = torch.tensor([
        [1.0, 1.0],
        [0.8, 0.4],
        [0.1, 0.3],
        [0.0, 0.0]
    ]).repeat_interleave(100, 1)
    a = {order: torch.rand(200, 3)}
    monkeypatch.setattr(didi, "reveal_times", lambda z, order: a[order])
    net = lookup(torch.zeros(64, 3, V))

    _, _, states = didi.rollout(
        net, masks(200, 3), levels, MASK, order, keep_states=True
    )

    for level, (z, _) in zip(levels, states):
        assert torch.equal(z == MASK, a[order] < level[:, None])


def test_a_rollout_that_keeps_its_states_is_the_same():
    net = lookup(torch.randn(84, 3, V), row)
    z = STATES.repeat(5, 1)

    runs = []
    for keep in (False, True):
        torch.manual_seed(1)
        run = didi.rollout(net, z, TIMES[2], HIDDEN, keep_states=keep)
        runs.append(run)

    (x, log_prob, _), (kept_x, kept_log_prob, _) = runs
    assert torch.equal(kept_x, x)
    assert torch.equal(kept_log_prob, log_prob)


def test_equal_rows_are_run_once_and_predicted_alike():
    table = torch.randn(84, 3, V, requires_grad=True)
    net = lookup(table, row)
    z = STATES.repeat_interleave(3, 0)[torch.randperm(252)]
    where = (z == HIDDEN) & (torch.rand(z.shape) < 0.7)
    weights = torch.randn(where.sum(), V)

    ours = didi.predict_once(net, z, where)

    plain = didi.predict(net, z, where)
    slope, = torch.autograd.grad((ours * weights).sum(), table)
    expected, = torch.autograd.grad((plain * weights).sum(), table)
    assert torch.equal(ours, plain)
    assert torch.allclose(slope, expected, atol=1e-5)
    assert [len(rows) for rows in net.seen] == [84, 252]


# ------------------------------------------------------------------------------ few-step likelihood
@BOTH_ORDERS
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_few_step_likelihood_is_the_enumerated_one(order, steps):
    """Each text's mean probability over its reveal times is its probability under the sampler."""
    table = 0.5 * torch.randn(84, 3, V)
    net = lookup(table, row)
    x = COMPLETE.repeat(4000, 1)

    nll = didi.few_step_nll(net, x, steps, HIDDEN, PAD, order, exponent=2)

    law = chain_of_lengths(table, grid(steps, 2), order)[row(COMPLETE)]
    law = law / LENGTHS[(COMPLETE != PAD).sum(1)]
    p = (-nll).exp().view(4000, 39)
    for values, expected in zip(p.T, law):
        check_mean(values, expected, 1e-6)


def test_with_one_step_per_token_the_likelihood_is_the_chain_rule(monkeypatch):
    """The tokens 0, 1, 2 appear in the order 2, 0, 1."""
    a = torch.tensor([[0.6, 0.1, 0.9]])
    monkeypatch.setattr(didi, "reveal_times", lambda z, order: a)
    log_p = torch.randn(64, 3, V).log_softmax(-1)
    x = torch.tensor([[0, 1, 2]])

    nll = didi.few_step_nll(lookup(log_p), x, 3, MASK, exponent=1)

    nats = -log_p[[63, 62, 14], [2, 0, 1], [2, 0, 1]]  # of ???, ??2 and 0?2
    assert torch.isclose(nll, nats.sum())


# ----------------------------------------------------------------------- discriminator and reward
def test_the_reward_is_clipped_after_the_mean_over_text():
    logits = torch.tensor([
        [14.0, 0.0, 99.0],
        [50.0, 0.0, 0.0],
        [-50.0, 0.0, 0.0],
        [5.0, 6.0, 7.0]
    ])
    lengths = torch.tensor([[2], [2], [2], [0]])

    r = didi.reward(logits, torch.arange(3) < lengths)

    assert r.tolist() == [7, 8, -8, 0]


def test_no_gradient_flows_through_the_reward():
    logits = torch.ones(2, 3, requires_grad=True)

    assert not didi.reward(logits, logits > 0).requires_grad


@pytest.mark.parametrize("e", [0.0, 0.1])
@pytest.mark.parametrize("shift", [-0.1, 0.0, 0.1])
def test_the_best_discriminator_is_the_log_density_ratio(e, shift):
    """In populations of 16 states with known counts, the loss with smoothing e, convex in the
    logits, has no slope at the closed form, and one on either side of it, but only at text."""
    n, m = torch.randint(1, 20, (2, 16))  # in the reference, of the student
    ref = torch.arange(16).repeat_interleave(n)
    student = torch.arange(16).repeat_interleave(m)
    text = torch.rand(16, 2) < 0.7
    p = n / n.sum()
    q = m / m.sum()
    label_1 = (1 - e) * p + e * q
    label_0 = e * p + (1 - e) * q
    best = (label_1 / label_0).log()
    logits = best[:, None].repeat(1, 2) + shift
    logits.requires_grad_()

    loss = didi.discriminator_loss(
        logits[ref], text[ref], logits[student], text[student], e
    )

    slope, = torch.autograd.grad(loss, logits)
    slope[slope.abs() < 1e-6] = 0
    expected = text * torch.tensor(shift).sign()
    assert torch.equal(slope.sign(), expected)


def test_advantages_have_mean_0_deviation_1_and_the_order_of_the_rewards_in_each_group():
    r = torch.randn(8, 4)

    A = didi.grouped_advantage(r.flatten(), 4)

    A = A.view(8, 4)
    deviation = A.std(1, correction=0)
    assert A.mean(1).abs().max() < 1e-5
    assert (deviation - 1).abs().max() < 0.01
    assert torch.equal(A.argsort(1), r.argsort(1))


@pytest.mark.parametrize("G", [1, 2, 3, 7])
def test_equal_rewards_have_no_advantage(G):
    r = torch.linspace(-8, 8, 801).repeat_interleave(G)

    assert (didi.grouped_advantage(r, G) == 0).all()


# ----------------------------------------------------------------------------------- student step
def test_the_weight_is_1_over_t_and_at_most_10():
    t = torch.tensor([0.001, 0.1, 0.25, 1.0])

    w = didi.weight(t)

    assert w.tolist() == pytest.approx([10, 10, 4, 1])


def test_weighted_levels_have_the_density_of_the_weight():
    """The area below min(1/t, 10) is 1 up to .1, and ln(t/s) from s to t."""
    t = didi.draw_weighted_levels(40000)

    edges = torch.arange(1, 11) / 10
    area = torch.cat((torch.ones(1), edges.log().diff()))
    check_law((t * 10).long().clamp(max=9), area / area.sum())


# ------------------------------------------------------------------------ the whole loop, and sign
def divergence(table, p):
    """Return the enumerated KL(q_student || q_reference) of texts, nats, averaged over levels of
    two-step rollouts."""
    text = p > 0
    total = 0.0
    for tau in (0.25, 0.5, 0.75):
        q = chain(table, [1.0, tau, 0.0])[text]
        log_ratio = (q / p[text]).log()
        total += (q * log_ratio).sum().item() / 3
    return total


def train_discriminator(r, opt, z_ref, z):
    """Take three steps of a discriminator, the table r; return its rewards of z (B, 2)."""
    text = torch.ones_like(z)
    for _ in range(3):
        opt.zero_grad()
        logits = r[index(z)]
        logits_ref = r[index(z_ref)]
        loss = didi.discriminator_loss(logits_ref, text, logits, text)
        loss.backward()
        opt.step()
    return didi.reward(r[index(z)], text)


def train_student(references, sign):
    """Run the algorithm on tables, an update for each 256 of the references (updates, 256, 2);
    sign -1 reverses the reward. Returns the student's table."""
    student = torch.zeros(16, 2, V, requires_grad=True)
    disc = torch.zeros(16, 2, requires_grad=True)
    opt = torch.optim.Adam([student], 0.03)
    disc_opt = torch.optim.Adam([disc], 0.1)

    for x_ref in references:
        levels, tau = didi.draw_levels(64, 2)
        levels = levels.repeat_interleave(4, 1)
        tau = tau.repeat_interleave(4)
        w = didi.weight(tau)
        x, log_prob, _ = didi.rollout(
            lookup(student), masks(256, 2), levels, MASK, "random"
        )
        z = didi.forward_mask(x, tau, MASK, order="random")
        z_ref = didi.forward_mask(x_ref, tau, MASK, order="random")

        r = train_discriminator(disc, disc_opt, z_ref, z)
        A = didi.grouped_advantage(sign * r, 4)
        opt.zero_grad()
        didi.policy_loss(log_prob, A, w, length=2).backward()
        opt.step()
    return student.detach()


@pytest.mark.parametrize("sign, updates, least, most", [
    (1, 80, 0, 0.75),
    (-1, 20, 1.2, torch.inf)
])
def test_the_student_moves_to_the_reference_or_away_if_the_reward_is_turned_round(
    sign, updates, least, most
):
    p = stutter(2)
    references = Z[2][Categorical(p).sample((updates, 256))]

    student = train_student(references, sign)

    before = divergence(torch.zeros(16, 2, V), p)
    assert least < divergence(student, p) / before < most


# -------------------------------------------------------------------------------- guided sampling
def tilted_law(log_p, tokens, R, h):
    """Return the law (n,) of tokens (n, k), all possible draws at k positions, when each position
    is drawn from log_p (k, V) + h E[R | x_i]."""
    joint = log_p.gather(1, tokens.T).sum(0).exp()  # (n,)
    law = torch.ones(len(tokens))
    for i in range(len(log_p)):
        token = tokens[:, i]
        sums = (joint * R) @ F.one_hot(token, V).float()
        given = sums / log_p[i].exp()  # E[R | x_i]
        tilted = (log_p[i] + h * given).softmax(-1)
        law = law * tilted[token]
    return law


def reranked_law(log_p, tokens, R, M):
    """Return the law (n,) of the draw that softmax of R (n,) chooses from M = 3 plain ones."""
    joint = log_p.gather(1, tokens.T).sum(0).exp()  # (n,)
    others = torch.logaddexp(R[:, None], R)  # (n, n)
    chosen = (R[:, None, None] - others).sigmoid()  # (n, n, n): the first of three
    return M * joint * (chosen @ joint @ joint)


def guided_step_law(table, r, z, t, s, token_law, **how):
    """Return the enumerated law (S,) of a guided step from z (L,): a sum over the sets of positions
    that it can reveal."""
    states = Z[len(z)]
    log_p = table[index(z)].log_softmax(-1)
    R = r.mean(1)
    masked = z == MASK
    law = torch.zeros(len(table))
    for reveal in itertools.product([False, True], repeat=len(z)):
        reveal = torch.tensor(reveal)
        if (reveal & ~masked).any():
            continue
        stay = masked & ~reveal
        chance = (1 - s / t) ** reveal.sum() * (s / t) ** stay.sum()
        possible = torch.where(reveal, states != MASK, states == z).all(1)
        tokens = states[possible][:, reveal]
        drawn = token_law(log_p[reveal], tokens, R[possible], **how)
        law[possible] += chance * drawn
    return law


@pytest.mark.parametrize("z", [
    [MASK, MASK, MASK],
    [MASK, 2, MASK]
])
@pytest.mark.parametrize("rule, how, scale, token_law", [
    (didi.tilted, {"h": 1.0}, 2, tilted_law),
    (didi.tilted, {"h": 3.0}, 2, tilted_law),
    (didi.reranked, {"M": 3}, 2, reranked_law),
    (didi.reranked, {"M": 3}, 30, reranked_law)  # beyond the clip of training
])
def test_a_guided_step_draws_from_the_enumerated_law(z, rule, how, scale, token_law):
    table = torch.randn(64, 3, V)
    guide = TableDiscriminator(scale * torch.randn(64, 3))
    choose = functools.partial(rule, discriminator=guide, pad_id=-1, **how)
    z = torch.tensor(z)
    start = z.repeat(20000, 1)

    z_s, called = step_from(table, start, 0.9, 0.4, choose=choose)

    law = guided_step_law(table, guide.r, z, 0.9, 0.4, token_law, **how)
    check_law(index(z_s), law)
    assert guide.rows == how.get("M", 1) * called.sum()


@pytest.mark.parametrize("steps, switch, most", [
    (1, 0.0, 4),
    (1, 0.5, 1),
    (3, 0.5, 1 + 1 + 4),
    (4, 0.0, 3 * 4)
])
def test_the_guided_sampler_counts_both_networks(steps, switch, most):
    """Compare with the networks' own counts, and with the plan of steps by hand; M is 4."""
    guide = TableDiscriminator(torch.randn(64, 3))
    net = lookup(torch.randn(64, 3, V))

    _, nfe, disc_calls = didi.guided_sample(
        net, guide, masks(400, 3), steps, MASK, switch=switch
    )

    assert nfe.sum() == sum(map(len, net.seen))
    assert disc_calls.sum() == guide.rows
    assert disc_calls.max() == most


# --------------------------------------------------------------------------------------- networks
CONFIG = model.Config(
    vocab_size=7, length=5, n_layer=3, n_head=2, n_embd=8
)


def test_the_denoiser_runs_its_head_only_where_asked():
    net = model.Denoiser(CONFIG)
    z = torch.randint(0, 8, (4, 5))
    where = torch.rand(4, 5) < 0.5
    sizes = []
    everywhere = net(z)
    net.out.register_forward_hook(
        lambda module, inputs, out: sizes.append(len(out))
    )

    logits = net(z, where)

    assert torch.allclose(logits, everywhere[where], atol=1e-6)
    assert sizes == [where.sum()]


def test_the_denoiser_has_no_column_for_the_mask_and_the_pad():
    packed = model.Denoiser(CONFIG)
    texts = model.Denoiser(TEXTS)
    mask = torch.tensor([[CONFIG.mask_id]])

    assert packed(mask).shape == (1, 1, 7)
    assert texts(STATES).shape == (84, 3, V)


@pytest.mark.parametrize("trainable", [0, 1, 3, 4])
def test_the_discriminator_trains_a_copys_last_blocks_alone(trainable):
    teacher = model.Denoiser(CONFIG)
    disc = model.Discriminator(teacher, trainable)
    blocks = range(max(3 - trainable, 0), 3)
    learns = ("score", "body.norm", *[f"body.blocks.{k}." for k in blocks])

    logits = disc(torch.randint(0, 8, (4, 5)))
    logits.square().sum().backward()

    for name, p in disc.named_parameters():
        trained = p.grad is not None and bool(p.grad.any())
        assert trained == name.startswith(learns), name
    assert all(p.grad is None for p in teacher.parameters())


def test_soft_tokens_that_are_one_hot_are_tokens():
    disc = model.Discriminator(model.Denoiser(CONFIG), 1).eval()
    z = torch.randint(0, 8, (4, 5))
    where = (z != 7) & (torch.rand(4, 5) < 0.5)
    probs = F.one_hot(z[where], 7).float().requires_grad_()

    soft = disc(z.masked_fill(where, 0), where, probs)

    slope, = torch.autograd.grad(soft.sum(), probs)
    assert torch.allclose(soft, disc(z), atol=1e-6)
    assert slope.abs().max() > 0


def test_a_causal_model_gives_all_texts_together_probability_1():
    """Sum over all texts that end or fill L; a text's nll covers its tokens and its end."""
    net = model.Denoiser(dataclasses.replace(TEXTS, causal=True))
    empty = torch.full((1, 3), PAD)
    texts = torch.cat((empty, COMPLETE))

    nll = train_teacher.causal_nll(net, texts, HIDDEN)

    n = (texts != PAD).sum(1)
    counted = torch.arange(3) <= n[:, None]
    p = (-nll * counted).sum(1).exp()
    assert len(p) == 40
    assert p.sum().item() == pytest.approx(1, abs=1e-5)


def test_the_causal_bound_counts_the_first_end():
    net = model.Denoiser(dataclasses.replace(TEXTS, causal=True))
    x = STATES[[0, 4]]  # texts of one and of two tokens
    nll = train_teacher.causal_nll(net, x, HIDDEN)

    bound, loss = train_teacher.bound_and_loss(net, x)

    nats = nll[0, :2].sum() + nll[1, :3].sum()
    assert torch.isclose(bound, nats)
    assert torch.isclose(loss, nats / 5)


def test_the_bound_reported_includes_the_length(monkeypatch):
    """All texts are fully masked, so that the bound is a sum by hand."""
    net = model.Denoiser(TEXTS)
    net.lengths.copy_(LENGTHS)
    monkeypatch.setattr(didi, "low_discrepancy_times", lambda B, device: torch.ones(B))

    bound, loss = train_teacher.bound_and_loss(net, COMPLETE)

    text = COMPLETE != PAD
    n = text.sum(1)
    log_p = net(net.start(n)).log_softmax(-1)
    nll = F.nll_loss(log_p[text], COMPLETE[text], reduction="sum")
    nats = nll - LENGTHS[n].log().sum()
    assert torch.isclose(bound, nats)
    assert torch.isclose(loss, nll / n.sum())


def test_guidance_moves_no_pad():
    net = model.Denoiser(TEXTS)
    disc = model.Discriminator(net)
    z = STATES.repeat(20, 1)

    x, _, _ = didi.guided_sample(net, disc, z, 2, HIDDEN, PAD)

    assert torch.equal(x == PAD, z == PAD)
    assert (x != HIDDEN).all()


def test_the_average_moves_by_its_decay():
    net = torch.nn.Linear(3, 2)
    average = torch.nn.Linear(3, 2)
    expected = 0.75 * average.weight + 0.25 * net.weight

    didi.update_ema(average, net, 0.75)

    assert torch.allclose(average.weight, expected)
