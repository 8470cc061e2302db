"""didi.py - DiDi-Instruct (arXiv 2509.25035) as pure functions on tensors.

Masked diffusion (MDLM, arXiv 2406.07524) corrupts a sequence x by masking each token with probability t; a denoiser learns to
fill masks in. Sampling starts from all masks and reveals a few at a time; tokens revealed in one step are drawn independently
of each other, so few steps mean incoherent text. DiDi-Instruct trains a few-step *student* so that its samples, masked again at
any level, are distributed like the reference: it minimises an integral of KL(q_student(z_t) || q_reference(z_t)) over t.
Text is discrete, so the gradient is a policy gradient; the log density ratio in it comes from a discriminator.

Notation (one name per quantity)         Shapes: B sequences, L tokens, V tokens in the vocabulary, G samples in a group,
  x        clean tokens (B, L)                   n masked positions picked out of (B, L) by a boolean `where`
  z_t      x with tokens masked at level t; mask_id = V
  t,tau,s  diffusion time in [0, 1], 1 = all masked; a float or (B,)
  log_p_x  log p(x_i | z_t) after SUBS, (n, V): only masked positions are ever predicted, and the mask is no outcome
  nfe      calls of the denoiser, counted per sequence
Sign: a reward is always maximised. The discriminator has label 1 on reference text, so its logit estimates
  r(z_t) = log q_reference(z_t) - log q_student(z_t),    and the student ascends r.

A denoiser is any callable (z (B, L), where) -> logits (n, V); `where` is True at n of (B, L) positions, or has the n flat indices.
Random numbers come from torch's global generator: seed with torch.manual_seed.
"""
import functools
import math

import torch
import torch.nn.functional as F


# ------------------------------------------------------------------------------------------------ masked diffusion (MDLM)
def alpha(t):
    """Probability that a token is still visible at time t: the log-linear schedule alpha_t = 1 - t."""
    return 1 - t


def column(t, z):
    """Time as something that broadcasts against z (B, L): a float becomes (1, 1), a tensor (B,) becomes (B, 1)."""
    return torch.as_tensor(t, dtype=torch.float32, device=z.device).reshape(-1, 1)


def forward_mask(x, t, mask_id):
    """Draw z_t ~ q(z_t | x): each token of x (B, L) is masked independently with probability 1 - alpha_t; t float or (B,)."""
    hidden = torch.rand(x.shape, device=x.device) < 1 - alpha(column(t, x))  # (B, L)
    return x.masked_fill(hidden, mask_id)


def low_discrepancy_times(B, device=None):
    """t_b = 1 - frac(u + b/B), (B,), in (0, 1]: stratified over the batch, each one uniform (arXiv 2107.00630, App. I.1)."""
    u = torch.rand((), device=device)
    return 1 - (u + torch.arange(B, device=device) / B) % 1


def predict(denoiser, z, where, temperature=1.0):
    """log_p_x (n, V) in float32 at the n True positions of `where`, all of them masked in z (B, L).

    This is SUBS (arXiv 2406.07524): visible positions are copied, never predicted, and the mask has no column.
    """
    return F.log_softmax(denoiser(z, where).float() / temperature, dim=-1)


def nelbo(denoiser, x, mask_id, t=None, size=None):
    """Negative evidence lower bound of x (B, L), nats per token, and the unweighted masked cross-entropy, nats per masked token.

    NELBO = E_t E_{z_t} (1/t) * sum over masked i of -log p(x_i | z_t), / L.  t (B,) > 0 defaults to low-discrepancy draws.
    exp(NELBO) bounds the perplexity from above. The second value has the same minimiser and less noise: short runs train on it.
    The head runs at the n masked positions only, or at `size` >= n positions: equal shapes for a compiler.
    """
    t = low_discrepancy_times(len(x), x.device) if t is None else t
    z = forward_mask(x, t, mask_id)
    where = (z == mask_id).flatten()
    index = torch.nonzero_static(where, size=size)[:, 0] if size else where.nonzero()[:, 0]  # (n,); -1 where there are fewer masks
    nll = -predict(denoiser, z, index).gather(1, x.flatten()[index][:, None])[:, 0] * (index >= 0)  # (n,)
    return (nll / t[index.clamp(min=0) // x.shape[1]]).sum() / x.numel(), nll.sum() / (index >= 0).sum().clamp(min=1)


def most_masks(B, L):
    """A `size` for nelbo with its own times t: their mean is at most (B + 1)/(2B); six standard deviations come on top."""
    return min(B * L, (B + 1) * L // 2 + math.ceil(6 * math.sqrt(B * L / 6)))


# --------------------------------------------------------------------------------------------------------------- sampling
def draw(log_p_x, num=1):
    """num independent tokens from each row of log_p_x (n, V) -> (n, num). FloatingPointError if there are NaNs in it.

    By inversion of the cumulative distribution in float64 (float32 on MPS): one random number a token instead of V, and no lost tail.
    """
    rows = max(1, 2 ** 27 // log_p_x.shape[1])
    if len(log_p_x) > rows:  # of a large vocabulary, a part at a time: at most 2 GB in float64
        return torch.cat([draw(part, num) for part in log_p_x.split(rows)])
    if log_p_x[:, 0].isnan().any():  # after log_softmax one NaN or +infinity makes the whole row NaN
        raise FloatingPointError("the network's output is not finite: its weights have diverged, train with a lower --lr")
    dtype = torch.float32 if log_p_x.device.type == "mps" else torch.float64
    cdf = log_p_x.exp().cumsum(-1, dtype=dtype)
    u = torch.rand(len(cdf), num, dtype=dtype, device=cdf.device) * cdf[:, -1:]
    return torch.searchsorted(cdf, u, right=True).clamp(max=cdf.shape[1] - 1)  # the first token whose cdf exceeds u


def reveal_positions(z, t, s, mask_id):
    """Which masked positions of z (B, L) a step t -> s reveals: each with (alpha_s - alpha_t)/(1 - alpha_t) = (t - s)/t.

    That probability does not depend on the content, so it can be drawn before the network runs ("reveal first").
    """
    t, s = column(t, z), column(s, z)
    return (z == mask_id) & (torch.rand(z.shape, device=z.device) < (alpha(s) - alpha(t)) / (1 - alpha(t)))


def ancestral_step(denoiser, z, t, s, mask_id, temperature=1.0, choose=None):
    """One exact reverse step z_t -> z_s, z (B, L). Returns z_s and `called` (B,): the rows for which the network ran.

    Rows in which nothing is revealed need no network; the head runs at the revealed positions only. The usual one-shot
    categorical over V + 1 outcomes gives the same distribution but truncates small probabilities in float32 (arXiv 2409.02908).
    choose(z, where, log_p_x) -> z_s for the rows called, instead of independent draws: see `tilted` and `reranked`.
    """
    reveal = reveal_positions(z, t, s, mask_id)
    called = reveal.any(dim=1)  # (B,)
    z_s = z.clone()
    if called.any():
        z_c, where = z[called], reveal[called]
        log_p_x = predict(denoiser, z_c, where, temperature)  # (n, V)
        z_s[called] = choose(z_c, where, log_p_x) if choose else z_c.masked_scatter(where, draw(log_p_x))
    return z_s, called


def time_grid(steps):
    """N + 1 equally spaced times from 1 to 0. Raises ValueError for less than one step."""
    if steps < 1:
        raise ValueError(f"steps is {steps}, but sampling needs at least 1")
    return [1 - k / steps for k in range(steps)] + [0.0]


@torch.no_grad()
def sample(denoiser, z, steps, mask_id, temperature=1.0, on_step=None):
    """Fill the masks of z (B, L) in `steps` ancestral steps; the visible tokens (a prompt) never change.

    Returns x (B, L) and nfe (B,), the denoiser calls each sequence took: at most `steps`, and at most its number of masks.
    on_step(z_s) is called after every step. The last step has s = 0 and reveals all that is left.
    """
    times = time_grid(steps)
    nfe = torch.zeros(len(z), dtype=torch.long, device=z.device)
    for t, s in zip(times[:-1], times[1:]):
        z, called = ancestral_step(denoiser, z, t, s, mask_id, temperature)
        nfe += called
        if on_step:
            on_step(z)
    return z, nfe


# ------------------------------------------------------------------------------- 1. rollout with intermediate-state matching
def draw_levels(t, K, a=1.0, b=1.0):
    """Levels t = l_0 > l_1 > .. > l_K = 0 of a K-step rollout, (K + 1, B); tau = l_{K-1} (B,); and its density pi (B,).

    K = 2: tau = t * u, u ~ Beta(a, b) clamped to [.02, .98]; the paper has t = 1. For K > 2 each level is a Beta fraction of the one
    before, and pi the density given that one. K = 1 has no intermediate state: tau only serves to noise x again.
    """
    levels, pi = [t], torch.ones_like(t)
    beta = torch.distributions.Beta(torch.full_like(t, a), torch.full_like(t, b))
    for _ in range(max(K - 1, 1)):
        u = beta.sample().clamp(0.02, 0.98)
        pi = beta.log_prob(u).exp() / levels[-1]
        levels.append(levels[-1] * u)
    tau = levels[-1]
    return torch.stack((levels if K > 1 else levels[:1]) + [torch.zeros_like(t)]), tau, pi


def rollout(student, z, levels, mask_id, G):
    """Draw G completions of each z (B, L) along levels (K + 1, B), keeping gradients of their log-probabilities.

    Returns x (B*G, L), the G completions of a state side by side, and per step (z, where, log_p_x, log_prob): the states entered
    (B', L), their masked positions, log_p_x (n, V) there, and log_prob (B*G,), the sum of log p(token) over the positions revealed.
    Positions that stay masked contribute nothing: (t - s)/t has no parameters. The sum over steps is log p_student(x) with intermediate-
    state matching; one forward per step serves sampling, log-probability and regulariser, the first one all G completions.
    """
    steps = []
    for t, s in zip(levels[:-1], levels[1:]):
        copies = 1 if steps else G
        t, s = (l if len(l) == len(z) else l.repeat_interleave(G) for l in (t, s))
        where = z == mask_id
        row = where.nonzero()[:, 0]  # (n,)
        log_p_x = predict(student, z, where)  # (n, V)
        tokens = draw(log_p_x.detach(), copies)  # (n, copies)
        reveal = torch.rand(tokens.shape, device=z.device) < ((t - s) / t)[row, None]
        log_prob = torch.zeros(len(z), copies, device=z.device).index_add(0, row, log_p_x.gather(1, tokens) * reveal)
        steps.append((z, where, log_p_x, log_prob.flatten()))
        nxt = z[:, :, None].repeat(1, 1, copies)  # (B', L, copies)
        nxt[where] = torch.where(reveal, tokens, mask_id)
        z = nxt.transpose(1, 2).reshape(-1, z.shape[1])
    return z, steps


# ------------------------------------------------------------------------------------------- 3. discriminator and 4. reward
def pool(logits, z, mask_id, positions):
    """Average per-position values (B, L) of z (B, L) over the positions that enter: "masked" ones or "all"; -> (B,).

    The same rule serves the discriminator's loss, the reward and the guided sampler. A row without such positions gives 0.
    """
    enter = (z == mask_id).float() if positions == "masked" else torch.ones_like(logits)
    return (logits * enter).sum(1) / enter.sum(1).clamp(min=1)


def discriminator_loss(logits_ref, z_ref, logits_fake, z_fake, mask_id, positions, smoothing=0.0):
    """Binary cross-entropy in nats, label 1 on reference states, averaged over positions, then over sequences.

    smoothing e moves the labels to 1 - e and e, which bounds the optimal logit at log((1 - e)/e).
    """
    def bce(logits, z, label):
        loss = F.binary_cross_entropy_with_logits(logits.float(), torch.full(logits.shape, label, device=z.device), reduction="none")
        return pool(loss, z, mask_id, positions).mean()
    return (bce(logits_ref, z_ref, 1 - smoothing) + bce(logits_fake, z_fake, smoothing)) / 2


def reward(logits, z, mask_id, positions, clip=8.0):
    """r(z) (B,), nats: the discriminator's logits averaged over positions and clipped; detached. Higher = more like the reference."""
    return pool(logits.detach().float(), z, mask_id, positions).clamp(-clip, clip)


def grouped_advantage(r, G, clip=3.0, eps=1e-4):
    """A = (r - mean_group)/(std_group + eps), clipped, for rewards r (B*G,) with groups side by side. Equal rewards give 0."""
    r = r.view(-1, G)
    r = r - r[:, :1]  # so that equal rewards are equal to 0, whatever the rounding of their mean
    centred = r - r.mean(1, keepdim=True)
    return (centred / (r.std(1, correction=0, keepdim=True) + eps)).clamp(-clip, clip).flatten()


# --------------------------------------------------------------------------------------------------------- 5. student step
def weight(t):
    """w(t) = -alpha'_t/(1 - alpha_t) = 1/t, clipped to [.1, 10]."""
    return (1 / t).clamp(0.1, 10)


def kl_to_teacher(log_p_student, log_p_teacher, kind):
    """KL divergence (n,), nats, between rows (n, V): "forward" KL(teacher || student), "reverse", or "jeffreys" = their mean."""
    def kl(log_p, log_q):
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if kind == "jeffreys":
        return (kl(log_p_teacher, log_p_student) + kl(log_p_student, log_p_teacher)) / 2
    return kl(log_p_teacher, log_p_student) if kind == "forward" else kl(log_p_student, log_p_teacher)


def entropy(log_p_x):
    """Entropy (n,) of each row of log_p_x (n, V), nats."""
    return -(log_p_x.exp() * log_p_x).sum(-1)


def policy_loss(log_prob, advantage, w, L):
    """Score-function loss whose negative gradient is E[w * A * grad log p_student(x)], per token: all inputs (B*G,)."""
    return -(w * advantage.detach() * log_prob).mean() / L


# ------------------------------------------------------------- another way to fewer steps: self-distillation through time (SDTT)
@torch.no_grad()
def sdtt_target(teacher, z_t, t, dt, mask_id):
    """What two teacher steps t -> t - dt/2 -> t - dt predict, for a student to match in one (SDTT, arXiv 2410.21035).

    z_t (B, L), t and dt <= t (B,). Returns log_p_x (n, V) at the n masked positions of z_t, from the step that reveals them, else from
    the second. Its mean over paths is a consistent teacher's one-step prediction: only a KL that prefers modes ("reverse") gains.
    """
    where = z_t == mask_id
    target = predict(teacher, z_t, where)
    reveal = reveal_positions(z_t, t, t - dt / 2, mask_id)
    z = z_t.masked_scatter(reveal, draw(target[reveal[where]]))
    masked = z == mask_id
    return target.index_put((masked[where],), predict(teacher, z, masked))


# ------------------------------------------------------------------------------------- reward-guided ancestral sampler (RGAS)
def tilted(z, where, log_p_x, discriminator, mask_id, positions, h):
    """z_s (B, L): draws at `where`, n positions of z_t (B, L), from log_p_x (n, V) + h * d r(z_s) / d x_i.

    d r / d x_i (n, V) is taken at the relaxed one-hot tokens' expectation p(x_i | z_t), so h = 1 is the first-order form of
    p_student * exp(r), the reference's own step. The discriminator sees soft tokens where z_s will have new ones, masks where masks stay.
    """
    probs = log_p_x.exp().detach().requires_grad_()
    shown = z.masked_fill(where, 0)  # what stays masked; which token stands at `where` does not matter
    with torch.enable_grad():
        r = pool(discriminator.soft(shown, where, probs).float(), shown, mask_id, positions)
        grad, = torch.autograd.grad(r.sum(), probs)
    return z.masked_scatter(where, draw(F.log_softmax(log_p_x + h * grad, -1)))


def reranked(z, where, log_p_x, discriminator, mask_id, positions, M):
    """z_s (B, L): of M candidates that differ in their draws at `where`, one by softmax of r(z_s). Shapes as in `tilted`."""
    candidates = z[:, :, None].repeat(1, 1, M)
    candidates[where] = draw(log_p_x, M)  # (n, M)
    candidates = candidates.transpose(1, 2).reshape(-1, z.shape[1])  # (B*M, L)
    r = reward(discriminator(candidates), candidates, mask_id, positions, clip=math.inf).view(-1, M)
    choice = draw(F.log_softmax(r, -1))[:, 0]  # (B,)
    return candidates.view(-1, M, z.shape[1])[torch.arange(len(z), device=z.device), choice]


@torch.no_grad()
def guided_sample(denoiser, discriminator, z, steps, mask_id, positions, h=1.0, M=4, switch=0.5, temperature=1.0, noise_max=1.0):
    """RGAS: tilt in the first `switch` share of the guided steps, re-rank in the rest. z (B, L) -> x (B, L), nfe (B,), calls (B,).

    A step to a level the discriminator was not trained on (above noise_max, or without any position that enters) is a plain one.
    calls: discriminator passes per sequence, 1 (with backward) in a tilted step, M in a re-ranked one. Not for inference_mode.
    """
    times = time_grid(steps)
    known = [s <= noise_max and not (positions == "masked" and s == 0) for s in times[1:]]
    nfe = torch.zeros(len(z), dtype=torch.long, device=z.device)
    calls = torch.zeros_like(nfe)
    for k, (t, s) in enumerate(zip(times[:-1], times[1:])):
        tilt = sum(known[:k]) < switch * sum(known)
        guide, strength = (tilted, {"h": h}) if tilt else (reranked, {"M": M})
        z, called = ancestral_step(denoiser, z, t, s, mask_id, temperature, functools.partial(
            guide, discriminator=discriminator, mask_id=mask_id, positions=positions, **strength) if known[k] else None)
        nfe += called
        calls += called * (1 if tilt else M) * known[k]
    return z, nfe, calls
