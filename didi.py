"""didi.py - DiDi-Instruct (arXiv 2509.25035) as pure functions on tensors.

Masked diffusion (MDLM, arXiv 2406.07524) masks each token of x with probability t; a denoiser
learns to fill masks in. Sampling starts from all masks and reveals a few at a time, those of one
step independently of each other: few steps mean incoherent text. DiDi-Instruct trains a few-step
*student* so that its samples, masked again, are distributed like a reference: it minimises the
integral over t of KL(q_student(z_t) || q_reference(z_t)). Text is discrete, so the gradient is a
policy gradient; the log density ratio in it comes from a discriminator.

x, z_t, mask_id   clean tokens (B, L); the same masked at level t; the mask token
pad_id            fills short texts up to L; never masked, never predicted; -1 if there is none
t, tau, s         diffusion time in [0, 1], 1 = all masked: a float or (B,)
log_p_x           log p(x_i | z_t) after SUBS (n, V), at n positions picked out of (B, L)
B, L, V, G, K     sequences, tokens of each, tokens to predict (no mask, no pad), group, steps
Sign: a reward is always maximised. The discriminator has label 1 on the reference, so its logit
estimates r(z_t) = log q_reference(z_t) - log q_student(z_t); the student ascends r or its power.

The networks are passed in: denoiser(z (B, L), where (B, L) bool) -> logits (n, V) at the n True
positions, its halves .hidden(z, where) -> (n, D) and .head(hidden) -> logits, .in_parts(f, ..) ->
f(..) in little memory; discriminator(z) -> logits (B, L), with (.., where, probs (n, V)) the same
for soft tokens, .enters(z) -> (B, L) bool, the positions that count. Random numbers: torch's.
"""
import functools
import math

import torch
import torch.nn.functional as F


# ----------------------------------------------------------------------- masked diffusion (MDLM)
def alpha(t):
    """Probability that a token is still visible at time t: log-linear schedule alpha_t = 1 - t."""
    return 1 - t


def column(t, z):
    """Time, a float or (B,), as (1, 1) or (B, 1), to go with z (B, L)."""
    return torch.as_tensor(t, dtype=torch.float32, device=z.device).reshape(-1, 1)


def forward_mask(x, t, mask_id, pad_id=-1):
    """Draw z_t ~ q(z_t | x): each token of x (B, L) but pads is masked with chance 1 - alpha_t."""
    hidden = torch.rand(x.shape, device=x.device) < 1 - alpha(column(t, x))
    return x.masked_fill(hidden & (x != pad_id), mask_id)


def low_discrepancy_times(B, device=None):
    """t_b = 1 - frac(u + b/B), (B,), in (0, 1]: uniform, stratified (arXiv 2107.00630, I.1)."""
    u = torch.rand((), device=device)
    return 1 - (u + torch.arange(B, device=device) / B) % 1


def predict(denoiser, z, where, temperature=1.0):
    """log_p_x (n, V), float32, at the n True positions of `where`, all of them masked in z (B, L).

    SUBS (arXiv 2406.07524): visible tokens are copied; the mask has no column, so is no outcome.
    """
    return F.log_softmax(denoiser(z, where).float() / temperature, dim=-1)


def nelbo(denoiser, x, mask_id, pad_id=-1, t=None):
    """Bound of x (B, L), nats per text token, and the unweighted cross-entropy per masked token.

    NELBO = E_t E_{z_t} (1/t) * sum over masked i of -log p(x_i | z_t), t (B,): of p(x | length).
    The second has the same minimiser and less noise: short runs train on it.
    """
    if t is None:
        t = low_discrepancy_times(len(x), x.device)
    z = forward_mask(x, t, mask_id, pad_id)
    where = z == mask_id  # (B, L)
    nll = F.cross_entropy(denoiser(z, where).float(), x[where], reduction="none")  # (n,)
    weighted = nll / t[where.nonzero()[:, 0]]  # (n,)
    return weighted.sum() / (x != pad_id).sum().clamp(min=1), nll.sum() / max(len(nll), 1)


# -------------------------------------------------------------------------------------- sampling
def draw(log_p_x, num=1):
    """num independent tokens from each row of log_p_x (n, V) -> (n, num), by inversion of the
    cumulative distribution in float64: no tail is lost. Raises FloatingPointError for NaN."""
    rows = max(1, 2 ** 27 // log_p_x.shape[1])
    if len(log_p_x) > rows:  # a part at a time: at most 1 GiB of float64
        return torch.cat([draw(part, num) for part in log_p_x.split(rows)])
    if log_p_x[:, 0].isnan().any():  # log_softmax makes a whole row NaN for one NaN or +infinity
        raise FloatingPointError("the network's output is not finite: its weights have diverged, "
                                 "train with a lower --lr")
    cdf = log_p_x.exp().cumsum(-1, dtype=torch.float64)
    u = torch.rand(len(cdf), num, dtype=torch.float64, device=cdf.device) * cdf[:, -1:]
    return torch.searchsorted(cdf, u, right=True).clamp(max=cdf.shape[1] - 1)  # first cdf > u


def reveal_positions(z, t, s, mask_id):
    """(B, L) bool: the masked positions of z that a step t -> s reveals, each with (t - s)/t,
    whatever the content: drawn before the network runs ("reveal first")."""
    t, s = column(t, z), column(s, z)
    share = (alpha(s) - alpha(t)) / (1 - alpha(t))
    return (z == mask_id) & (torch.rand(z.shape, device=z.device) < share)


def ancestral_step(denoiser, z, t, s, mask_id, temperature=1.0, choose=None):
    """One exact reverse step z_t -> z_s of z (B, L), with choose(z, where, log_p_x) -> z_s for the
    independent draws. Returns z_s and the rows called, (B,) bool: those with something to reveal.

    The usual categorical over V + 1 outcomes has the same law, but in float32 truncates small
    probabilities (arXiv 2409.02908).
    """
    reveal = reveal_positions(z, t, s, mask_id)
    called = reveal.any(dim=1)  # (B,)
    z_s = z.clone()
    if called.any():
        z_c, where = z[called], reveal[called]
        log_p_x = predict(denoiser, z_c, where, temperature)  # (n, V)
        if choose is None:
            z_s[called] = z_c.masked_scatter(where, draw(log_p_x))
        else:
            z_s[called] = choose(z_c, where, log_p_x)
    return z_s, called


def time_grid(steps):
    """N + 1 equally spaced times from 1 to 0. Raises ValueError for less than one step."""
    if steps < 1:
        raise ValueError(f"steps is {steps}, but sampling needs at least 1")
    return [1 - k / steps for k in range(steps)] + [0.0]


@torch.no_grad()
def sample(denoiser, z, steps, mask_id, temperature=1.0, on_step=None):
    """Fill the masks of z (B, L) in `steps` ancestral steps; the last, to 0, reveals all.

    Returns x (B, L) and nfe (B,), denoiser calls: at most `steps`, and at most a row's masks.
    on_step(z_s) is called after each.
    """
    times, nfe = time_grid(steps), torch.zeros(len(z), dtype=torch.long, device=z.device)
    for t, s in zip(times[:-1], times[1:]):
        z, called = ancestral_step(denoiser, z, t, s, mask_id, temperature)
        nfe += called
        if on_step:
            on_step(z)
    return z, nfe


# ------------------------------------------------------ 1. rollout with intermediate-state matching
def draw_levels(t, K, a=1.0, b=1.0):
    """Levels t = l_0 > l_1 > .. > l_K = 0 of K-step rollouts, (K + 1, B); tau (B,); its density pi.

    Each level above 0 is u ~ Beta(a, b), clamped to [.02, .98], of the one before; tau is the last,
    pi its density given that. The paper has K = 2, t = 1; with K = 1 tau only masks x again.
    """
    beta = torch.distributions.Beta(torch.full_like(t, a), torch.full_like(t, b))
    levels = [t]
    for _ in range(max(K - 1, 1)):
        u = beta.sample().clamp(0.02, 0.98)
        levels.append(levels[-1] * u)
    pi = beta.log_prob(u).exp() / levels[-2]  # u's density, stretched from [0, 1] to [0, level]
    return torch.stack([*levels[:K], torch.zeros_like(t)]), levels[-1], pi


def draw_and_compare(h, h_teacher=None, *, student, teacher, kl_kind, num):
    """num tokens of each of the hidden states h (n, D), and their log p, both (n, num); and (n, 2),
    nats, KL to the teacher, whose hidden states are h_teacher, 0 without one, and entropy."""
    log_p_x = F.log_softmax(student.head(h).float(), -1)  # (n, V)
    tokens = draw(log_p_x.detach(), num)
    log_p_token, kl = log_p_x.gather(1, tokens), log_p_x.new_zeros(len(h))
    if teacher is not None:
        log_p_teacher = F.log_softmax(teacher.head(h_teacher).float(), -1)
        kl = kl_to_teacher(log_p_x, log_p_teacher, kl_kind)
    return tokens, log_p_token, torch.stack((kl, entropy(log_p_x)), -1)


def rollout(student, z, levels, mask_id, G, teacher=None, kl_kind="reverse"):
    """Draw G completions of each z (B, L) along levels (K + 1, B), with gradients.

    Returns x (B*G, L), the completions of a state side by side; log_prob (B*G,), over all steps the
    sum of log p(token) at the positions revealed, so log p_student(x) with intermediate-state
    matching; and (2,), KL to the teacher and entropy, means over the masks of the states. One
    forward a step serves all.
    """
    log_prob, regular, copies, K = 0, 0, G, len(levels) - 1
    compare = functools.partial(draw_and_compare, student=student, teacher=teacher, kl_kind=kl_kind)
    for t, s in zip(levels[:-1], levels[1:]):
        t, s = (of.repeat_interleave(G // copies) for of in (t, s))  # of each state
        where = z == mask_id
        row = where.nonzero()[:, 0]  # (n,)
        hidden = [net.hidden(z, where) for net in (student, teacher) if net is not None]  # (n, D)
        tokens, log_p, values = compare(*hidden, num=copies)
        reveal = torch.rand(tokens.shape, device=z.device) < ((t - s) / t)[row, None]
        log_p_step = torch.zeros(len(z), copies, device=z.device).index_add(0, row, log_p * reveal)
        z_s = z[:, :, None].repeat(1, 1, copies)  # (B, L, copies)
        z_s[where] = torch.where(reveal, tokens, mask_id)
        z = z_s.transpose(1, 2).flatten(0, 1)  # (B*G, L) from the first step on
        log_prob = log_prob + log_p_step.flatten()  # (B*G,)
        regular = regular + values.sum(0) / (max(len(row), 1) * K)
        copies = 1
    return z, log_prob, regular


# ------------------------------------------------------------------ 3. discriminator and 4. reward
def pool(values, enter):
    """Mean of values (B, L) over the positions that enter, (B, L) bool -> (B,); 0 if none do."""
    enter = enter.float()
    return (values * enter).sum(1) / enter.sum(1).clamp(min=1)


def discriminator_loss(logits_ref, enter_ref, logits_student, enter_student, smoothing=0.0):
    """Binary cross-entropy in nats, label 1 on reference states, of logits and enter (B, L): a mean
    of positions that enter, then of sequences. smoothing e: labels 1 - e and e, which bound the
    optimal logit at log((1 - e)/e)."""
    def cross_entropy(logits, enter, label):
        labels = torch.full_like(logits, label, dtype=torch.float32)
        loss = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none")
        return pool(loss, enter).mean()
    loss_ref = cross_entropy(logits_ref, enter_ref, 1 - smoothing)
    loss_student = cross_entropy(logits_student, enter_student, smoothing)
    return (loss_ref + loss_student) / 2


def reward(logits, enter, clip=8.0):
    """r(z) (B,), nats: logits (B, L) pooled, clipped, detached: high = like the reference."""
    return pool(logits.detach().float(), enter).clamp(-clip, clip)


def ratio_power(r, a):
    """((q_ref/q_student)^a - 1)/a of the log ratio r; r for a = 0. Bare, it descends KL(q_student
    || q_ref) for 0 (the paper), KL(q_ref || q_student) for 1, chi^2(q_ref || q_student)/2 for 2."""
    return torch.expm1(a * r) / a if a else r


def grouped_advantage(r, G, clip=3.0, eps=1e-4):
    """A = (r - mean)/(std + eps) within groups, clipped; r (B*G,), groups side by side."""
    r = r.view(-1, G)
    r = r - r[:, :1]  # so that equal rewards are 0, whatever the rounding of their mean
    centred = r - r.mean(1, keepdim=True)
    return (centred / (r.std(1, correction=0, keepdim=True) + eps)).clamp(-clip, clip).flatten()


# ------------------------------------------------------------------------------- 5. student step
KL_KINDS = ("forward", "reverse")


def weight(t):
    """w(t) = -alpha'_t/(1 - alpha_t) = 1/t, clipped to [.1, 10]."""
    return (1 / t).clamp(0.1, 10)


def kl_to_teacher(log_p_student, log_p_teacher, kind):
    """KL (n,), nats, of rows (n, V): "forward" = KL(teacher || student), or "reverse"."""
    if kind == "reverse":
        log_p_student, log_p_teacher = log_p_teacher, log_p_student
    return (log_p_teacher.exp() * (log_p_teacher - log_p_student)).sum(-1)


def entropy(log_p_x):
    """Entropy (n,) of each row of log_p_x (n, V), nats."""
    return -(log_p_x.exp() * log_p_x).sum(-1)


def policy_loss(log_prob, advantage, w, L):
    """Its negative gradient is E[w * A * grad log p_student(x)] / L; inputs (B*G,); L, a mean."""
    return -(w * advantage.detach() * log_prob).mean() / L


# ------------------------------------------------------- reward-guided ancestral sampler (RGAS)
def tilted(z, where, log_p_x, discriminator, h):
    """z_s (B, L): draws at `where`, n positions of z, from log_p_x (n, V) + h * d r(z_s)/d x_i at
    p(x_i | z_t), the mean token: h = 1 is p_student * exp(r) to first order."""
    probs = log_p_x.exp().detach().requires_grad_()
    shown = z.masked_fill(where, 0)  # which token stands at `where` does not matter
    with torch.enable_grad():
        logits = discriminator(shown, where, probs).float()
        r = pool(logits, discriminator.enters(shown))
        grad, = torch.autograd.grad(r.sum(), probs)
    return z.masked_scatter(where, draw(F.log_softmax(log_p_x + h * grad, -1)))


def reranked(z, where, log_p_x, discriminator, M):
    """z_s (B, L): of M candidates that differ in their draws at `where` one, by softmax of r."""
    B, L = z.shape
    candidates = z[:, :, None].repeat(1, 1, M)
    candidates[where] = draw(log_p_x, M)  # (n, M)
    candidates = candidates.transpose(1, 2).reshape(B * M, L)
    r = reward(discriminator(candidates), discriminator.enters(candidates), clip=math.inf)
    choice = draw(F.log_softmax(r.view(B, M), -1))[:, 0]  # (B,)
    return candidates.view(B, M, L)[torch.arange(B, device=z.device), choice]


@torch.no_grad()
def guided_sample(denoiser, discriminator, z, steps, mask_id, h=1.0, M=4, switch=0.5,
                  temperature=1.0, on_step=None):
    """RGAS: tilt in the first `switch` share of the steps, re-rank in the rest; z (B, L) -> x, nfe
    (B,), and calls (B,), the discriminator's passes: 1 (with backward) to tilt, M to re-rank."""
    tilt = functools.partial(tilted, discriminator=discriminator, h=h)
    rerank = functools.partial(reranked, discriminator=discriminator, M=M)
    times, tilts = time_grid(steps), math.ceil(switch * steps)
    plan = [(tilt, 1)] * tilts + [(rerank, M)] * (steps - tilts)
    nfe, calls = torch.zeros(2, len(z), dtype=torch.long, device=z.device)
    for t, s, (choose, passes) in zip(times[:-1], times[1:], plan):
        z, called = ancestral_step(denoiser, z, t, s, mask_id, temperature, choose)
        nfe += called
        calls += called * passes
        if on_step:
            on_step(z)
    return z, nfe, calls
