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

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

import didi
import model
import train_teacher

torch.set_num_threads(1)
V, MASK = 3, 3
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
    powers = (V + 1) ** torch.arange(z.shape[-1]).flip(0)
    return (z * powers).sum(-1)


def lookup(table, row=index):
    """Return a denoiser with these logits (S, L, V); its .seen lists the states it was given."""

    def denoiser(z, where=...):
        denoiser.seen.append(z)
        return table[row(z)][where]

    denoiser.seen = []
    return denoiser


def masks(n, L):
    return torch.full((n, L), MASK)


def stutter(L):
    """Return a law of texts (S,) that favours equal neighbours: far from what one step writes."""
    equal_neighbours = (Z[L][:, 1:] == Z[L][:, :-1]).sum(-1)
    zeros = (Z[L] == 0).sum(-1)
    score = 2.0 * equal_neighbours + 0.8 * zeros - 0.3 * Z[L][:, 0]
    return score.masked_fill((Z[L] == MASK).any(-1), -torch.inf).softmax(0)


def agrees(L):
    """Return (S, S): 1 if the state of the row could be the text of the column, partly masked."""
    z = Z[L][:, None]
    return ((z == Z[L]) | (z == MASK)).all(-1).float()


def exact_table(p, L):
    """Return the logits (S, L, V) of p's denoiser by Bayes' rule: the log of the sum of
    p(x) [x_i = v] over the texts x that agree."""
    one_hot = F.one_hot(Z[L])[..., :V].float()
    return (
        torch.einsum("zx,x,xlv->zlv", agrees(L), p, one_hot)
        .clamp(min=1e-20)
        .log()
    )


def noising(s, t, L):
    """Return q(z_t | z_s) (S, S): a visible token is masked with probability (t - s)/(1 - s)."""
    visible = (Z[L] != MASK).sum(-1)
    m = (t - s) / (1 - s)
    return (
        agrees(L).T * m ** (visible[:, None] - visible) * (1 - m) ** visible
    )


def denoising(table, t, s):
    """Return the sampler's law of z_s given z_t (S, S): a mask stays with probability s/t."""
    L = table.shape[1]
    moves = F.pad(table.softmax(-1) * (1 - s / t), (0, 1), value=s / t)
    q = torch.where((Z[L] == MASK)[..., None], moves, F.one_hot(Z[L]).float())
    return q[:, torch.arange(L), Z[L]].prod(-1)


def chain(table, times, start=-1):
    """Return the law (S,) of the state after steps times[0] -> times[1] -> .. from the state
    `start`, by default the last: all masks."""
    law = torch.eye(len(table))[start]
    for t, s in zip(times[:-1], times[1:]):
        law = law @ denoising(table, t, s)
    return law


# Texts of varying length, with the ids of a model: its last token is the pad, the mask comes after.
TEXTS = model.Config(V + 1, 3, n_layer=1, n_head=1, n_embd=8, pads=True)
PAD, HIDDEN = TEXTS.pad_id, TEXTS.mask_id
LENGTHS = torch.tensor([0, 0.2, 0.5, 0.3])
ROWS = {
    1: slice(4),
    2: slice(4, 20),
    3: slice(20, 84),
}  # rows of each length in STATES
STATES = torch.cat(
    [F.pad(Z[n].where(Z[n] < MASK, HIDDEN), (0, 3 - n), value=PAD) for n in Z]
)


def row(z):
    """Return the row of each state z (.., 3) in STATES (84, 3)."""
    n = (z != PAD).sum(-1)
    return (4**n - 4) // 3 + index(z.clamp(max=MASK)) // 4 ** (3 - n)


def mix_lengths(law):
    """Return the law (84,) of states, given law(n) (S,) of those with n tokens."""
    return torch.cat([LENGTHS[n] * law(n) for n in Z])


def check_law(drawn, law):
    """Assert by chi-square that indices (n,) come from law (S,); false-alarm rate 10^-6
    (Wilson-Hilferty)."""
    counts = torch.bincount(drawn, minlength=len(law)).double()
    expected = law.double() * len(drawn)
    assert counts[law == 0].sum() == 0, "drew something impossible"

    rare, most = expected < 10, expected.argmax()
    for cells in (counts, expected):
        cells[most] += cells[rare].sum()
    df = int((~rare).sum()) - 1
    chi2 = ((counts - expected) ** 2 / expected)[~rare].sum()
    assert df > 0
    assert chi2 < df * (1 - 2 / (9 * df) + 4.75 * (2 / (9 * df)) ** 0.5) ** 3


def check_mean(values, expected):
    """Assert that the mean of independent values (n,) is the one expected."""
    assert (
        abs(values.mean() - expected) < 5 * values.std() / len(values) ** 0.5
    )


class TableDiscriminator:
    """Look up logits in r (S, L), for soft tokens their mean over independent draws; count rows."""

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
        return (
            p[:, torch.arange(L), Z[L]].prod(-1) @ self.r
        )  # (B, S) @ (S, L)


def every(z):
    """Return (B, L) bool, all True: every position is text."""
    return torch.ones_like(z, dtype=torch.bool)


# ------------------------------------------------------------------------------- masked diffusion
def test_forward_mask_masks_a_share_t_of_the_text():
    t = torch.tensor([0.0, 0.2, 0.7, 1.0])
    x = torch.randint(0, V + 1, (4, 20000))

    z = didi.forward_mask(x, t, HIDDEN, PAD)

    n = (x != PAD).sum(1)
    share = (z == HIDDEN).sum(1) / n
    assert ((share - t).abs() <= 5 * (t * (1 - t) / n).sqrt()).all()


def test_forward_mask_leaves_pads_and_the_rest_as_they_are():
    x = torch.randint(0, V + 1, (4, 200))

    z = didi.forward_mask(x, 0.5, HIDDEN, PAD)

    assert torch.equal(z == PAD, x == PAD)
    assert ((z == x) | (z == HIDDEN)).all()


def test_low_discrepancy_times_are_one_in_each_stratum():
    t = torch.stack([didi.low_discrepancy_times(4) for _ in range(4000)])

    assert torch.allclose(
        t.sort(1).values.diff(dim=1), torch.tensor(0.25), atol=1e-6
    )


def test_each_low_discrepancy_time_is_uniform():
    t = torch.stack([didi.low_discrepancy_times(4) for _ in range(4000)])

    for b in range(4):
        check_law((t[:, b] * 10).long().clamp(max=9), torch.full((10,), 0.1))


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-24])
def test_low_discrepancy_times_are_above_0_and_at_most_1(monkeypatch, u):
    monkeypatch.setattr(torch, "rand", lambda *size, **how: torch.tensor(u))

    t = torch.cat([didi.low_discrepancy_times(B) for B in (1, 3, 64)])

    assert (t > 0).all()
    assert (t <= 1).all()


def nats_per_text(table):
    """Return 60 estimates of the bound, nats per text with its length, on 4,000 texts each."""
    p = mix_lengths(stutter)
    bounds = []
    for x in STATES[Categorical(p).sample((60, 4000))]:
        bound, _ = didi.nelbo(lookup(table, row), x, HIDDEN, PAD)
        bounds.append(bound * (x != PAD).sum() / 4000)
    return torch.stack(bounds) + Categorical(LENGTHS).entropy()


def exact_texts_table():
    """Return the logits (84, 3, V) of the exact denoiser of the texts of all lengths."""
    tables = [
        F.pad(exact_table(stutter(n), n), (0, 0, 0, 3 - n), value=torch.nan)
        for n in Z
    ]
    return torch.cat(tables)


def test_the_bound_of_the_exact_denoiser_is_the_entropy_of_the_data():
    """The entropy comes from the enumerated law of all 39 texts of 1 to 3 tokens."""
    entropy = Categorical(mix_lengths(stutter)).entropy()

    check_mean(nats_per_text(exact_texts_table()), entropy)


def test_the_bound_of_another_denoiser_is_above_the_entropy():
    entropy = Categorical(mix_lengths(stutter)).entropy()
    wrong = exact_texts_table() + 0.5 * torch.randn(84, 3, V)

    assert nats_per_text(wrong).mean() > entropy + 0.02


def nll_of_masks(table, z, x):
    """Return -log p(x_i | z) (B, L) at the masks of z, 0 elsewhere."""
    log_p = table[row(z)].log_softmax(-1)  # (B, L, V)
    return -(log_p * F.one_hot(x)[..., :V]).sum(-1) * (z == HIDDEN)


def test_nelbo_is_the_weighted_sum_and_its_loss_the_mean_over_masks():
    table = torch.randn(84, 3, V)
    t = torch.linspace(0.3, 0.8, 6)
    x = torch.cat(
        [STATES[ROWS[n]][:2] for n in Z]
    )  # 2 texts each of 1, 2, 3 tokens: 12 tokens
    rng = torch.get_rng_state()
    z = didi.forward_mask(x, t, HIDDEN, PAD)
    torch.set_rng_state(rng)  # the same masks again

    bound, loss = didi.nelbo(lookup(table, row), x, HIDDEN, PAD, t)

    nll = nll_of_masks(table, z, x)
    assert 0 < (z == HIDDEN).sum() < 12
    assert torch.isclose(bound, (nll / t[:, None]).sum() / 12)
    assert torch.isclose(loss, nll.sum() / (z == HIDDEN).sum())


def test_nelbo_without_masks_is_0_and_so_is_its_slope():
    table = torch.randn(84, 3, V, requires_grad=True)

    bound, loss = didi.nelbo(
        lookup(table, row), STATES[:3], HIDDEN, PAD, torch.zeros(3)
    )

    (slope,) = torch.autograd.grad(bound + loss, table)
    assert bound == 0
    assert loss == 0
    assert (slope == 0).all()


# --------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize(
    "u, token", [(0.0, 1), (1 - 1e-8, 1), (1 - 1e-10, 2), (1 - 2.0**-53, 2)]
)
def test_draw_keeps_the_tail_and_draws_nothing_impossible(
    monkeypatch, u, token
):
    log_p_x = torch.tensor(
        [[0.0, 1.0, 1e-9, 0.0]]
    ).log()  # 1 + 1e-9 is 1 in float32
    monkeypatch.setattr(
        torch, "rand", lambda *size, **how: torch.full(size, u, **how)
    )

    assert didi.draw(log_p_x, 2).tolist() == [[token, token]]


def test_draw_refuses_what_is_not_a_number():
    log_p_x = torch.tensor([[0.0, 1.0], [torch.inf, 0.0]]).log_softmax(-1)

    with pytest.raises(FloatingPointError, match="not finite"):
        didi.draw(log_p_x)


def bayes_step(p, t, s):
    """Return q(z_s | z_t) (S, S) for the law p by Bayes' rule: a row for each z_t."""
    joint = (p @ noising(0, s, 2))[:, None] * noising(s, t, 2)  # (z_s, z_t)
    return (joint / joint.sum(0)).T


def test_an_ancestral_step_of_independent_tokens_is_bayes_rule():
    first, second = torch.tensor([[0.6, 0.3, 0.1, 0.0], [0.2, 0.1, 0.7, 0.0]])
    p = torch.outer(first, second).flatten()
    start = torch.randint(0, 16, (40000,))

    end, _ = didi.ancestral_step(
        lookup(exact_table(p, 2)), Z[2][start], 0.8, 0.3, MASK
    )

    check_law(start * 16 + index(end), bayes_step(p, 0.8, 0.3).flatten() / 16)


@pytest.mark.parametrize("i", [0, 1])
def test_an_ancestral_step_has_the_marginals_of_bayes_rule(i):
    p = stutter(2)
    start = torch.randint(0, 16, (40000,))

    end, _ = didi.ancestral_step(
        lookup(exact_table(p, 2)), Z[2][start], 0.8, 0.3, MASK
    )

    marginal = (
        bayes_step(p, 0.8, 0.3) @ F.one_hot(Z[2][:, i]).float()
    )  # (z_t, V + 1)
    check_law(start * 4 + end[:, i], marginal.flatten() / 16)


PROMPT = index(torch.tensor([MASK, 1, MASK]))
WEAK = [
    None,
    {"h": 0.0, "switch": 1.0},
    {"M": 1, "switch": 0.0},
]  # guidance without effect


@pytest.mark.parametrize("start", [-1, PROMPT])
@pytest.mark.parametrize("steps, T", [(1, 1.0), (2, 0.5), (3, 1.0), (5, 0.5)])
@pytest.mark.parametrize("weak", WEAK)
def test_samplers_draw_from_the_enumerated_chain(start, steps, T, weak):
    table = torch.randn(64, 3, V)
    z = Z[3][start].repeat(20000, 1)

    if weak is None:
        x, _ = didi.sample(lookup(table), z, steps, MASK, T)
    else:
        guide = TableDiscriminator(torch.randn(64, 3))
        x, _, _ = didi.guided_sample(
            lookup(table), guide, z, steps, MASK, temperature=T, **weak
        )

    check_law(
        index(x), chain(table / T, torch.linspace(1, 0, steps + 1), start)
    )


@pytest.mark.parametrize("steps", [1, 3])
def test_samples_have_the_law_of_their_length_and_then_of_its_chain(steps):
    net = model.Denoiser(TEXTS)
    net.lengths.copy_(LENGTHS)
    table = torch.randn(84, 3, V)
    times = torch.linspace(1, 0, steps + 1)

    z = net.start(net.draw_lengths(40000))
    x, _ = didi.sample(lookup(table, row), z, steps, HIDDEN)

    check_law(row(x), mix_lengths(lambda n: chain(table[ROWS[n], :n], times)))


class Recorder:
    """Denoise 12 texts at random; the first token, visible, is a text's number. Count the calls
    by text and the positions that pass the head."""

    def __init__(self, mask_id):
        self.mask_id = mask_id
        self.calls = torch.zeros(12, dtype=torch.long)
        self.head = 0

    def __call__(self, z, where):
        assert (z[where] == self.mask_id).all()
        self.calls[z[:, 0]] += 1
        n = int(where.sum())
        self.head += n
        return torch.randn(n, self.mask_id)


@pytest.fixture
def numbered():
    """Return twelve states of 6 positions with 0 to 5 masks each; the mask is 20."""
    number = torch.arange(12)
    z = torch.full((12, 6), 20).where(
        torch.arange(6) < 1 + number[:, None] % 6, 0
    )
    z[:, 0] = number
    return z


@pytest.mark.parametrize("steps", [1, 2, 4, 40])
def test_nfe_is_the_denoisers_own_count(numbered, steps):
    denoiser = Recorder(mask_id=20)

    _, nfe = didi.sample(denoiser, numbered, steps, 20)

    assert torch.equal(nfe, denoiser.calls)
    assert (nfe <= (numbered == 20).sum(1).clamp(max=steps)).all()


@pytest.mark.parametrize("steps", [1, 4])
def test_every_mask_passes_the_head_once(numbered, steps):
    denoiser = Recorder(mask_id=20)

    didi.sample(denoiser, numbered, steps, 20)

    assert denoiser.head == (numbered == 20).sum()


@pytest.mark.parametrize("steps", [1, 4])
def test_what_is_visible_stays_in_every_state(numbered, steps):
    before, states = numbered.clone(), [numbered]

    x, _ = didi.sample(
        Recorder(20), numbered, steps, 20, on_step=states.append
    )

    for earlier, later in zip(states[:-1], states[1:]):
        assert torch.equal(later[earlier != 20], earlier[earlier != 20])
    assert len(states) == steps + 1
    assert torch.equal(states[-1], x)
    assert torch.equal(numbered, before)  # the caller's tensor is unchanged


# ---------------------------------------------------------------------------------------- rollout
@pytest.mark.parametrize("K", [1, 2, 3])
def test_levels_fall_from_1_to_0(K):
    levels, _, _ = didi.draw_levels(4000, K)

    assert levels.shape == (K + 1, 4000)
    assert (levels[0] == 1).all()
    assert (levels[-1] == 0).all()
    assert (levels.diff(dim=0) < 0).all()


@pytest.mark.parametrize("K", [1, 2, 3])
def test_tau_is_uniform_below_the_level_before_and_pi_its_density(K):
    levels, tau, pi = didi.draw_levels(40000, K)

    above = levels[max(K - 2, 0)]
    assert K == 1 or torch.equal(tau, levels[-2])
    check_law((tau / above * 10).long(), torch.full((10,), 0.1))
    assert torch.allclose(pi, 1 / above)


def test_no_level_is_nearly_the_one_before_or_nearly_nothing():
    levels, tau, _ = didi.draw_levels(4000, 3)

    for share in (levels[1], tau / levels[1]):
        assert share.min() == pytest.approx(0.02)
        assert share.max() == pytest.approx(0.98)


def test_a_state_without_masks_adds_nothing_to_the_regularisers():
    """The first of two steps reveals every mask, so half of its mean is left."""
    table = torch.randn(16, 2, V, requires_grad=True)
    teacher = torch.randn(16, 2, V)
    levels = torch.tensor([1.0, 0.0, 0.0])[:, None].expand(-1, 3)
    _, _, states = didi.rollout(
        lookup(table), masks(3, 2), levels, MASK, keep_states=True
    )

    kl, entropy = didi.regularisers(states, lookup(teacher), MASK)

    p, q = Categorical(logits=teacher[-1]), Categorical(logits=table[-1])
    assert torch.isclose(kl, kl_divergence(p, q).mean() / 2)
    assert torch.isclose(entropy, q.entropy().mean() / 2)


TIMES = {1: [1.0, 0.0], 2: [1.0, 0.6, 0.0], 3: [1.0, 0.6, 0.3, 0.0]}


def path_probability(table, lengths, states, times):
    """Return the enumerated probability (B,) of paths through states, rows (K + 1, B)."""
    prob = LENGTHS[lengths]
    for k in range(len(times) - 1):
        moves = [
            denoising(table[ROWS[n], :n], times[k], times[k + 1]) for n in Z
        ]
        prob = prob * torch.block_diag(*moves)[states[k], states[k + 1]]
    return prob


@pytest.fixture(params=[1, 2, 3])
def paths(request):
    """Return all paths of K-step rollouts from all masks; each occurs at least once in 240,000.

    That is: K; the student's table; for every rollout, the number of its path; for every path, its
    probability by enumeration, one rollout's log_prob and its last state.
    """
    K, B = request.param, 240_000
    table = (0.2 * torch.randn(84, 3, V)).requires_grad_()
    lengths = torch.multinomial(LENGTHS, B, True)
    z = model.Denoiser(TEXTS).start(lengths)
    net = lookup(table, row)
    levels = torch.tensor(TIMES[K])[:, None].expand(-1, B)
    x, log_prob, _ = didi.rollout(net, z, levels, HIDDEN)

    states = torch.stack([row(z) for z in [*net.seen, x]])  # (K + 1, B)
    prob = path_probability(table.detach(), lengths, states, TIMES[K])
    kinds, kind = torch.unique(states, dim=1, return_inverse=True)
    one = torch.zeros(kinds.shape[1], dtype=torch.long)
    one[kind] = torch.arange(B)
    return K, table, kind, prob[one], log_prob[one], states[-1, one]


def test_a_rollout_takes_each_path_as_often_as_its_law_says(paths):
    K, _, kind, prob, _, _ = paths

    assert torch.isclose(
        prob.sum(), torch.tensor(1.0), atol=1e-4
    )  # every path was seen
    check_law(kind, prob)


def test_the_policy_gradient_is_the_gradient_of_the_expected_reward(paths):
    """Compare policy_loss on all paths, weighted by probability, with the enumerated gradient."""
    K, table, _, prob, log_prob, last = paths
    R = torch.randn(84)

    loss = didi.policy_loss(log_prob, R[last], prob * len(prob), length=2)

    (ours,) = torch.autograd.grad(loss, table)
    law = mix_lengths(lambda n: chain(table[ROWS[n], :n], TIMES[K]))
    (exact,) = torch.autograd.grad(law @ R, table)
    assert exact.abs().max() > 0.01
    assert torch.allclose(-ours * 2, exact, atol=1e-5)


def test_a_rollout_keeps_each_rows_own_levels():
    levels = torch.tensor([[1.0, 1.0], [0.8, 0.4], [0.1, 0.3], [0.0, 0.0]])
    net = lookup(torch.zeros(16, 2, V))

    didi.rollout(
        net, masks(10000, 2), levels.repeat_interleave(5000, 1), MASK
    )

    for level, z in zip(levels[1:], net.seen[1:]):
        for half, expected in zip((z == MASK).float().chunk(2), level):
            check_mean(half.flatten(), expected)


# ----------------------------------------------------------------------- discriminator and reward
def test_the_mean_over_text_leaves_pads_out():
    values = torch.tensor([[1.0, 2.0, 6.0], [1.0, 2.0, 6.0]])
    text = torch.tensor([[True, False, True], [False, False, False]])

    assert didi.mean_over_text(values, text).tolist() == [3.5, 0.0]


def test_the_reward_is_clipped_after_the_mean_over_positions():
    logits = torch.tensor([[14.0, 0.0], [50.0, 0.0], [-50.0, 0.0]])

    assert didi.reward(logits, every(logits)).tolist() == [7.0, 8.0, -8.0]


def test_no_gradient_flows_through_the_reward():
    logits = torch.ones(2, 3, requires_grad=True)

    assert not didi.reward(logits, every(logits)).requires_grad


@pytest.mark.parametrize("e", [0.0, 0.1])
def test_the_best_discriminator_is_the_log_density_ratio(e):
    """In populations with known counts of each state, the loss with smoothing e, convex in the
    logits, has no slope at the closed form."""
    best, slope, _ = populations(e)

    assert best.abs().max() > 0.3
    assert slope(best).abs().max() < 1e-6


@pytest.mark.parametrize("e", [0.0, 0.1])
@pytest.mark.parametrize("shift", [0.1, -0.1])
def test_the_loss_has_a_slope_wherever_text_is(e, shift):
    best, slope, text = populations(e)

    sign = torch.tensor(shift).sign()
    assert torch.equal(slope(best + shift).sign(), text.float() * sign)


def populations(e):
    """Return the optimal logits (16, 2) of two populations of 16 states; the slope of the loss as
    a function of logits; which positions (16, 2) are text."""
    n, m = torch.randint(
        1, 20, (2, 16)
    )  # counts of each state in the reference, the student's
    ref = torch.arange(16).repeat_interleave(n)
    student = torch.arange(16).repeat_interleave(m)
    p, q = n / n.sum(), m / m.sum()
    text = torch.rand(16, 2) < 0.7
    best = (
        (((1 - e) * p + e * q) / (e * p + (1 - e) * q))
        .log()[:, None]
        .repeat(1, 2)
    )

    def slope(logits):
        logits = logits.clone().requires_grad_()
        loss = didi.discriminator_loss(
            logits[ref], text[ref], logits[student], text[student], e
        )
        return torch.autograd.grad(loss, logits)[0]

    return best, slope, text


@pytest.mark.parametrize("a", [0, 0.5, 1, 2, 3])
def test_a_power_of_the_ratio_descends_its_divergence(a):
    """Compare E_q[reward * grad log q] with autograd of the alpha-divergence of enumerated laws."""
    p = torch.randn(9).double().softmax(0)
    theta = torch.randn(9).double().requires_grad_()
    q = theta.softmax(0)
    known = {
        0: (q * (q / p).log()).sum(),
        1: (p * (p / q).log()).sum(),
        2: (p**2 / q).sum() / 2,
    }
    divergence = known.get(
        a, -(q ** (1 - a) * p**a).sum() / (a * (1 - a or 1))
    )
    (exact,) = torch.autograd.grad(divergence, theta, retain_graph=True)

    reward = didi.ratio_power((p / q).log().detach(), a)

    (ours,) = torch.autograd.grad(
        (q.detach() * reward * q.log()).sum(), theta
    )
    assert torch.allclose(ours, -exact, atol=1e-12)


def test_advantages_have_mean_0_deviation_1_and_the_order_of_the_rewards_in_each_group():
    r = torch.randn(8, 4)

    A = didi.grouped_advantage(r.flatten(), 4, clip=99).view(8, 4)

    assert A.mean(1).abs().max() < 1e-5
    assert (A.std(1, correction=0) - 1).abs().max() < 0.01
    assert torch.equal(A.argsort(1), r.argsort(1))


def test_eps_is_added_to_the_deviation():
    A = didi.grouped_advantage(torch.tensor([0.0, 2.0]), 2, eps=1.0)

    assert A.tolist() == [-0.5, 0.5]


def test_advantages_are_clipped():
    r = torch.tensor(
        [1.0] + [0.0] * 24
    )  # the first is 24 ** .5 = 4.9 deviations from the mean

    A = didi.grouped_advantage(r, 25)

    assert A[0] == 3
    assert torch.allclose(A[1:], torch.tensor(-1 / 24**0.5), atol=0.01)


@pytest.mark.parametrize("G", [1, 2, 3, 7])
def test_equal_rewards_have_no_advantage(G):
    r = torch.linspace(-8, 8, 801).repeat_interleave(G)

    assert (didi.grouped_advantage(r, G) == 0).all()


# ----------------------------------------------------------------------------------- student step
def test_the_weight_is_1_over_t_and_at_most_10():
    w = didi.weight(torch.tensor([0.001, 0.1, 0.25, 1.0]))

    assert torch.allclose(w, torch.tensor([10.0, 10.0, 4.0, 1.0]))


# ------------------------------------------------------------------------ the whole loop, and sign
def divergence(table, p):
    """Return the enumerated KL(q_student || q_reference) of texts, nats, averaged over levels of
    two-step rollouts."""
    text = p > 0
    total = 0.0
    for tau in (0.25, 0.5, 0.75):
        q = chain(table, [1.0, tau, 0.0])[text]
        total += (q * (q / p[text]).log()).sum().item() / 3
    return total


def train_student(p, sign, updates, groups=64, G=4, L=2):
    """Run the algorithm on tables; sign -1 reverses the reward. Returns the student's table."""
    student = torch.zeros(16, L, V, requires_grad=True)
    disc = TableDiscriminator(torch.zeros(16, L, requires_grad=True))
    opt = torch.optim.Adam([student], 0.03)
    disc_opt = torch.optim.Adam([disc.r], 0.1)
    text = every(masks(groups * G, L))

    for _ in range(updates):
        levels, tau, pi = didi.draw_levels(groups, 2)
        x, log_prob, _ = didi.rollout(
            lookup(student),
            masks(groups * G, L),
            levels.repeat_interleave(G, 1),
            MASK,
        )
        tau, pi = tau.repeat_interleave(G), pi.repeat_interleave(G)
        z = didi.forward_mask(x, tau, MASK)
        x_ref = Z[L][Categorical(p).sample((groups * G,))]
        z_ref = didi.forward_mask(x_ref, tau, MASK)

        for _ in range(3):
            disc_opt.zero_grad()
            didi.discriminator_loss(
                disc(z_ref), text, disc(z), text
            ).backward()
            disc_opt.step()

        A = didi.grouped_advantage(sign * didi.reward(disc(z), text), G)
        opt.zero_grad()
        didi.policy_loss(log_prob, A, didi.weight(tau) / pi, L).backward()
        opt.step()
    return student.detach()


def test_the_student_moves_to_the_reference():
    p = stutter(2)

    student = train_student(p, sign=1, updates=80)

    assert divergence(student, p) < 0.75 * divergence(
        torch.zeros(16, 2, V), p
    )


def test_the_student_moves_away_if_the_reward_is_turned_round():
    p = stutter(2)

    student = train_student(p, sign=-1, updates=20)

    assert divergence(student, p) > 1.2 * divergence(torch.zeros(16, 2, V), p)


# -------------------------------------------------------------------------------- guided sampling
def tilted_law(log_p, tokens, R, h):
    """Return the law (n,) of tokens (n, k), all possible draws at k positions, when each position
    is drawn from log_p (k, V) + h E[R | x_i]."""
    joint = log_p.gather(1, tokens.T).sum(0).exp()  # (n,)
    law = torch.ones(len(tokens))
    for i in range(len(log_p)):
        given = (
            (joint * R) @ F.one_hot(tokens[:, i], V).float() / log_p[i].exp()
        )  # E[R | x_i]
        law = law * (log_p[i] + h * given).softmax(-1)[tokens[:, i]]
    return law


def reranked_law(log_p, tokens, R):
    """Return the law (n,) of the draw that softmax of R (n,) chooses from two plain ones."""
    joint = log_p.gather(1, tokens.T).sum(0).exp()  # (n,)
    return 2 * joint * ((R[:, None] - R).sigmoid() @ joint)


def guided_step_law(table, guide, z, t, s, token_law):
    """Return the enumerated law (S,) of a guided step from z (L,): a sum over the sets of positions
    that it can reveal."""
    states = Z[len(z)]
    log_p = table[index(z)].log_softmax(-1)
    R = guide.r.mean(1)
    law = torch.zeros(len(table))
    for reveal in torch.cartesian_prod(
        *[torch.tensor([False, True])] * len(z)
    ):
        if (reveal & (z != MASK)).any():
            continue
        possible = torch.where(reveal, states != MASK, states == z).all(1)
        stay = (z == MASK) & ~reveal
        chance = (1 - s / t) ** reveal.sum() * (s / t) ** stay.sum()
        tokens = states[possible][:, reveal]
        law[possible] += chance * token_law(
            log_p[reveal], tokens, R[possible]
        )
    return law


@pytest.mark.parametrize("z", [[MASK, MASK, MASK], [MASK, 2, MASK]])
@pytest.mark.parametrize("h", [1.0, 3.0])
def test_a_tilted_step_draws_from_the_enumerated_law(z, h):
    table = torch.randn(64, 3, V)
    guide = TableDiscriminator(2 * torch.randn(64, 3))
    choose = functools.partial(
        didi.tilted, discriminator=guide, pad_id=-1, h=h
    )
    z = torch.tensor(z)

    z_s, called = didi.ancestral_step(
        lookup(table), z.repeat(20000, 1), 0.9, 0.4, MASK, choose=choose
    )

    law = guided_step_law(
        table, guide, z, 0.9, 0.4, functools.partial(tilted_law, h=h)
    )
    check_law(index(z_s), law)
    assert guide.rows == called.sum()


@pytest.mark.parametrize("z", [[MASK, MASK, MASK], [MASK, 2, MASK]])
def test_a_reranked_step_draws_from_the_enumerated_law(z):
    table = torch.randn(64, 3, V)
    guide = TableDiscriminator(2 * torch.randn(64, 3))
    choose = functools.partial(
        didi.reranked, discriminator=guide, pad_id=-1, M=2
    )
    z = torch.tensor(z)

    z_s, called = didi.ancestral_step(
        lookup(table), z.repeat(20000, 1), 0.9, 0.4, MASK, choose=choose
    )

    check_law(
        index(z_s), guided_step_law(table, guide, z, 0.9, 0.4, reranked_law)
    )
    assert guide.rows == 2 * called.sum()


@pytest.mark.parametrize(
    "steps, switch, most",
    [(1, 0.0, 4), (1, 0.5, 1), (3, 0.5, 1 + 1 + 4), (4, 0.0, 3 * 4)],
)
def test_the_guided_sampler_counts_both_networks(steps, switch, most):
    """Compare with the networks' own counts, and with the plan of steps by hand; M is 4."""
    guide = TableDiscriminator(torch.randn(64, 3))
    net = lookup(torch.randn(64, 3, V))

    _, nfe, disc_calls = didi.guided_sample(
        net, guide, masks(400, 3), steps, MASK, switch=switch
    )

    assert nfe.sum() == sum(len(z) for z in net.seen)
    assert disc_calls.sum() == guide.rows
    assert disc_calls.max() == most
    assert nfe.max() == min(steps, 3)


def test_guidance_tilts_first_and_reranks_then():
    plan = []

    def discriminator(z, where=None, probs=None):
        plan.append(where is not None)
        values = torch.zeros(z.shape)
        if where is not None:
            values[where] = probs[:, 0]
        return values

    didi.guided_sample(
        lookup(torch.zeros(16, 2, V)),
        discriminator,
        masks(500, 2),
        4,
        MASK,
        switch=0.3,
    )

    assert plan == [True, True, False, False]


def test_reranking_sees_rewards_beyond_the_clip_of_training():
    """The best of 20 candidates wins, 30 nats above the next, not any that is above 8."""

    def discriminator(z):
        return 60.0 * (z == 0)

    x, _, _ = didi.guided_sample(
        lookup(torch.zeros(16, 2, V)),
        discriminator,
        masks(200, 2),
        1,
        MASK,
        M=20,
        switch=0.0,
    )

    chance = 1 - (1 - 1 / 9) ** 20  # that (0, 0) is among them
    share = (x == 0).all(1).float().mean()
    assert abs(share - chance) < 5 * (chance * (1 - chance) / 200) ** 0.5


# --------------------------------------------------------------------------------------- networks
CONFIG = model.Config(vocab_size=7, length=5, n_layer=3, n_head=2, n_embd=8)


def test_the_denoiser_runs_its_head_only_where_asked():
    net = model.Denoiser(CONFIG)
    z = torch.randint(0, 8, (4, 5))
    where = torch.rand(4, 5) < 0.5
    sizes = []
    everywhere = net(z)
    net.out.register_forward_hook(
        lambda module, inputs, out: sizes.append(len(inputs[0]))
    )

    logits = net(z, where)

    assert torch.allclose(logits, everywhere[where], atol=1e-6)
    assert sizes == [where.sum()]


def test_the_denoiser_has_no_column_for_the_mask_and_the_pad():
    assert model.Denoiser(CONFIG)(
        torch.full((1, 5), CONFIG.mask_id)
    ).shape == (1, 5, 7)
    assert model.Denoiser(TEXTS)(STATES).shape == (84, 3, V)


@pytest.mark.parametrize("trainable", [0, 1, 3, 4])
def test_the_discriminator_trains_a_copys_last_blocks_alone(trainable):
    teacher = model.Denoiser(CONFIG)
    disc = model.Discriminator(teacher, trainable)
    blocks = range(max(3 - trainable, 0), 3)
    learns = ("score", "body.norm", *[f"body.blocks.{k}." for k in blocks])

    disc(torch.randint(0, 8, (4, 5))).square().sum().backward()

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

    (slope,) = torch.autograd.grad(soft.sum(), probs)
    assert torch.allclose(soft, disc(z), atol=1e-6)
    assert slope.abs().max() > 0


def test_a_causal_model_gives_all_texts_together_probability_1():
    """Sum over all texts that end or fill L; a text's nll covers its tokens and its end."""
    net = model.Denoiser(dataclasses.replace(TEXTS, causal=True))
    empty = torch.full((1, 3), PAD)
    texts = torch.cat((empty, STATES[(STATES != HIDDEN).all(1)]))

    nll = train_teacher.causal_nll(net, texts, HIDDEN)

    ends = torch.arange(3) <= (texts != PAD).sum(1)[:, None]
    total = (-(nll * ends).sum(1)).exp().sum()
    assert len(texts) == 40
    assert torch.isclose(total, torch.tensor(1.0), atol=1e-5)


def test_the_causal_bound_counts_the_first_end():
    net = model.Denoiser(dataclasses.replace(TEXTS, causal=True))
    x = STATES[[0, 4]]  # texts of one and of two tokens
    nll = train_teacher.causal_nll(net, x, HIDDEN)

    bound, loss = train_teacher.bound_and_loss(net, x)

    nats = nll[0, :2].sum() + nll[1, :3].sum()
    assert torch.isclose(bound, nats / 3)
    assert torch.isclose(loss, nats / 5)


def test_the_bound_reported_includes_the_length(monkeypatch):
    """All texts are fully masked, so that the bound is a sum by hand."""
    net = model.Denoiser(TEXTS)
    net.lengths.copy_(LENGTHS)
    x = STATES[(STATES != HIDDEN).all(1)]
    monkeypatch.setattr(
        didi, "low_discrepancy_times", lambda B, device=None: torch.ones(B)
    )

    bound, loss = train_teacher.bound_and_loss(net, x)

    text = x != PAD
    n = text.sum(1)
    log_p = (
        net(net.start(n))
        .log_softmax(-1)
        .gather(2, (x * text)[..., None])[..., 0]
    )
    assert torch.isclose(
        bound, (-log_p[text].sum() - LENGTHS[n].log().sum()) / n.sum()
    )
    assert torch.isclose(loss, -log_p[text].mean())


def test_no_sampler_and_no_rollout_moves_a_pad():
    net = model.Denoiser(TEXTS)
    disc = model.Discriminator(net)
    z = STATES.repeat(20, 1)
    levels = torch.tensor([[1.0], [0.5], [0.0]]).expand(-1, len(z))

    sampled, _ = didi.sample(net, z, 2, HIDDEN)
    guided, _, _ = didi.guided_sample(net, disc, z, 2, HIDDEN, PAD)
    rolled, _, _ = didi.rollout(net, z, levels, HIDDEN)

    for x in (sampled, guided, rolled):
        assert torch.equal(x == PAD, z == PAD)
        assert (x != HIDDEN).all()


def test_the_average_moves_by_its_decay():
    net = model.Denoiser(CONFIG)
    average = model.Denoiser(CONFIG)
    expected = 0.75 * average.norm.bias + 0.25 * (net.norm.bias + 1)
    net.norm.bias.data += 1

    didi.update_ema(average, net, 0.75)

    assert torch.allclose(average.norm.bias, expected)
