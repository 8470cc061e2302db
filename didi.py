"""didi.py - DiDi-Instruct (arXiv 2509.25035) as functions of tensors.

Masked diffusion (MDLM, arXiv 2406.07524) masks each token of a text x with probability t; a
denoiser learns to fill the masks in. Sampling starts from all masks and reveals a few at a time.
Tokens revealed in one step are drawn independently, so few steps give incoherent text.

DiDi-Instruct trains a few-step *student* whose samples, masked again, are distributed like a
masked reference: it minimises the integral over t of w(t) KL(q_student(z_t) || q_reference(z_t)),
w(t) = 1/t, here at most 10. Text is discrete, so the gradient is a policy gradient, whose reward
comes from a discriminator. Label 1 stands for the reference. Without label smoothing, at every
position the best logit is the log density ratio of the whole z_t,
r(z_t) = log q_reference(z_t) - log q_student(z_t). The student ascends r. The numbered sections
below are the steps of the README.

x            clean token ids (B, L)
z_t          x masked at level t (B, L)
mask_id      the mask token
pad_id       pads short texts to L, is never masked or predicted; -1 if there is none
is_text      where there is a token, masked or not, and no pad (B, L) bool
t, tau, s    diffusion times, also called levels, in [0, 1], 1 = all masked: a float or (B,)
a            the reveal times (B, L) of a text: at time t the positions with a < t are masked
log_p_x      log p(x_i | z_t) (n, V), at n positions selected from (B, L)
B, L, V      batch size, sequence length, number of tokens that can be predicted
G, K         samples in a group, steps of a rollout

The networks are any callables. denoiser(z (B, L), where (B, L) bool) -> logits (n, V) at the n True
positions. discriminator(z) -> logits (B, L); with (z, where, probs (n, V)) the tokens at `where`
are soft: mixtures with these probabilities. Random numbers come from torch's default generator.
"""
import functools
import math

import torch
import torch.nn.functional as F


# ----------------------------------------------------------------------- masked diffusion (MDLM)
def column(t, z):
    """Return the time t, a float or (B,), as (1, 1) or (B, 1), to broadcast against z (B, L)."""
    return torch.as_tensor(t, device=z.device).reshape(-1, 1)


def reveal_times(z, order):
    """Draw the reveal times a (B, L) of the positions of z (B, L), each uniform in [0, 1].

    "random" draws them independently (MDLM, the paper). "interlaced" reveals neighbours at distant
    times, since they depend on each other most and tokens revealed together are drawn
    independently. With M the first power of two from L on, the time of position i is number
    (i + shift) mod M of the van der Corput numbers 0, 1/2, 1/4, 3/4, .. plus u/M. shift and u are
    drawn once a text, so each time is uniform. In N = 2^k even steps, tokens revealed together are
    at least N apart.
    """
    B, L = z.shape
    if order == "random":
        return torch.rand(B, L, device=z.device)

    M = 1
    van_der_corput = torch.zeros(M, device=z.device)
    while M < L:  # 0, then 0, 1/2, then 0, 1/2, 1/4, 3/4
        van_der_corput = torch.cat((van_der_corput, van_der_corput + 0.5 / M))
        M *= 2
    shift = torch.randint(M, (B, 1), device=z.device)
    i = (torch.arange(L, device=z.device) + shift) % M  # (B, L)
    u = torch.rand(B, 1, device=z.device)
    return van_der_corput[i] + u / M


def forward_mask(x, t, mask_id, pad_id=-1, order="random"):
    """Draw z_t ~ q(z_t | x): mask each token of x (B, L), except pads, with chance t.

    This is the log-linear schedule of MDLM: alpha_t, the chance to be visible, is 1 - t.
    """
    masked = reveal_times(x, order) < column(t, x)  # (B, L)
    return x.masked_fill(masked & (x != pad_id), mask_id)


def low_discrepancy_times(B, device=None):
    """Draw t_b = 1 - frac(u + b/B) (B,) in (0, 1]: each is uniform, together they are stratified
    (arXiv 2107.00630, I.1)."""
    u = torch.rand((), device=device)
    return 1 - (u + torch.arange(B, device=device) / B) % 1


def predict(denoiser, z, where, temperature=1.0):
    """Return log_p_x (n, V), float32, at the n True positions of `where`, which are masks in z
    (B, L). The mask itself is never predicted: it has no column. `temperature` divides the logits.
    """
    logits = denoiser(z, where).float()
    if temperature != 1:  # a division copies (n, V)
        logits = logits / temperature
    return F.log_softmax(logits, dim=-1)


def nelbo(denoiser, x, mask_id, pad_id=-1, t=None, order="random"):
    """Mask x (B, L) once at t (B,), drawn if None; return (bound, loss).

    bound, the negative ELBO, is the sum over the texts of (1/t) * the sum over masked i of
    -log p(x_i | z_t), nats. In random order its mean over t and z_t is at least -log p(x | lengths)
    of all B texts; in another it is no bound, since there the masks depend on each other. loss,
    which training descends, is the unweighted mean over masks: the exact network minimises it,
    too, and this loss has less noise.
    """
    if t is None:
        t = low_discrepancy_times(len(x), x.device)
    z = forward_mask(x, t, mask_id, pad_id, order)
    masked = z == mask_id  # (B, L)

    logits = denoiser(z, masked).float()  # (n, V)
    nll = F.cross_entropy(logits, x[masked], reduction="none")  # (n,)

    row = masked.nonzero()[:, 0]  # (n,): the text of each mask
    bound = (nll / t[row]).sum()
    loss = nll.sum() / max(len(nll), 1)
    return bound, loss


# -------------------------------------------------------------------------------------- sampling
def draw(log_p_x, num=1):
    """Draw `num` independent tokens (n, num) from each row of log_p_x (n, V).

    The cumulative distribution is inverted in float64, which keeps its tail.
    """
    n, V = log_p_x.shape
    cdf = log_p_x.exp().double().cumsum_(-1)  # in place: (n, V) can be large
    total = cdf[:, -1:]  # 1 but for rounding
    u = torch.rand(n, num, dtype=torch.float64, device=cdf.device)
    first_above = torch.searchsorted(cdf, u * total, right=True)
    return first_above.clamp(max=V - 1)  # u * total may be rounded up to total


def ancestral_step(denoiser, z, a, s, mask_id, temperature=1.0, choose=None):
    """Step to z_s, s a float: reveal the masks of z (B, L) whose reveal times a (B, L) are >= s.

    Returns z_s (B, L) and called (B,) bool: the rows that reveal a token, for which the denoiser
    runs. choose(z, where, log_p_x (n, V)), z and where of those rows alone, returns their z_s in
    place of independent draws. If z is z_t, a mask is revealed with chance (t - s)/t; in random
    order this is the model's exact reverse step.
    """
    reveal = (z == mask_id) & (a >= s)
    called = reveal.any(dim=1)  # (B,)
    if not called.any():
        return z, called

    z_called, where = z[called], reveal[called]
    log_p_x = predict(denoiser, z_called, where, temperature)  # (n, V)
    z_s = z.clone()
    if choose is None:
        z_s[called] = z_called.masked_scatter(where, draw(log_p_x))  # (n, 1), row by row
    else:
        z_s[called] = choose(z_called, where, log_p_x)
    return z_s, called


def time_grid(steps, exponent=1.5):
    """Return times t_k = 1 - (k/steps)^exponent, k = 0 .. steps, from 1 to 0.

    Above exponent 1 the first steps, which see little text, reveal less: better for short texts.
    """
    return [1 - (k / steps) ** exponent for k in range(steps + 1)]


@torch.no_grad()
def sample(denoiser, z, steps, mask_id, temperature=1.0, order="interlaced", exponent=1.5,
           on_step=None):
    """Fill the masks of z (B, L) in `steps` ancestral steps; the last, to 0, reveals the rest.

    Returns x (B, L) and nfe (B,), the denoiser calls per text: at most `steps`, and at most the
    number of its masks. on_step(z_s) is called after each step.
    """
    a = reveal_times(z, order)
    nfe = torch.zeros_like(z[:, 0])
    for s in time_grid(steps, exponent)[1:]:
        z, called = ancestral_step(denoiser, z, a, s, mask_id, temperature)
        nfe += called
        if on_step:
            on_step(z)
    return z, nfe


# ------------------------------------------------------ 1. rollout with intermediate-state matching
def draw_levels(n, K, device=None):
    """Return random levels (K + 1, n), falling from 1 to 0 for each of n rollouts, and tau (n,).

    Each intermediate level is u times the one before, u uniform but clamped to [.02, .98], as in
    the paper. tau, the last of them, is where coupled time masks x again; if K is 1, it is no level
    of the rollout. The paper divides the weight w(tau) by tau's density pi(tau), which is left out
    here: it is 1, but for the clamp, if K is 1 or 2; if K is larger, small tau count for more.
    """
    levels = [torch.ones(n, device=device)]
    for _ in range(max(K - 1, 1)):
        u = torch.rand(n, device=device).clamp(0.02, 0.98)
        levels.append(levels[-1] * u)
    tau = levels[-1]
    levels = [*levels[:K], torch.zeros_like(tau)]  # [:K] leaves tau out if K is 1
    return torch.stack(levels), tau


def rollout(student, z, levels, mask_id, order="interlaced", given=None, keep_states=False):
    """Fill the masks of z (B, L) along K + 1 levels, each a float or (B,), as `sample` does, but
    with gradients; the tokens of `given` (B, L), if any, are written instead of drawn ones.

    Returns x (B, L), log_prob (B,) and states. log_prob is the path's log probability, the sum of
    log p(token) over all tokens, each in the step that reveals it (the paper: intermediate-state
    matching). states, empty unless keep_states, are for `regularisers`: a pair (z (B, L), log_p_x
    (n, V) at its n masks) of each step.
    """
    a = reveal_times(z, order)
    log_prob = torch.zeros(len(z), device=z.device)
    states = []
    for s in levels[1:]:
        masked = z == mask_id
        reveal = masked & (a >= column(s, z))  # (B, L)
        if keep_states:
            log_p_x = predict_once(student, z, masked)  # (n, V)
            states.append((z, log_p_x))
            revealed = reveal[masked]  # (n,) bool: which of the masks this step reveals
            log_p_revealed = log_p_x[revealed]  # (m, V), m of them
        else:
            log_p_revealed = predict_once(student, z, reveal)

        if given is None:
            token = draw(log_p_revealed.detach())  # (m, 1)
        else:
            token = given[reveal][:, None]
        log_p_token = log_p_revealed.gather(1, token)[:, 0]
        row = reveal.nonzero()[:, 0]  # (m,): the text of each token
        log_prob = log_prob.index_add(0, row, log_p_token)
        z = z.masked_scatter(reveal, token)
    return z, log_prob, states


def predict_once(denoiser, z, where):
    """Return log_p_x (n, V) as `predict` does, but run the denoiser on the distinct rows of z.

    Equal rows that ask for the positions {0, 3} and {3, 5} become one that asks for {0, 3, 5}. A
    group begins with equal rows, masks of one length: this saves most of the first step.
    """
    distinct, index = z.unique(dim=0, return_inverse=True)  # U distinct rows (U, L), (B,)
    if len(distinct) == len(z):
        return predict(denoiser, z, where)
    b, i = where.nonzero().T  # (n,) each: row and position
    needed = torch.zeros_like(distinct, dtype=torch.bool)  # (U, L)
    needed[index[b], i] = True
    log_p_x = predict(denoiser, distinct, needed)
    row = needed.flatten().cumsum(0).view_as(distinct) - 1  # (U, L): in log_p_x
    return log_p_x.index_select(0, row[index[b], i])


@torch.no_grad()
def few_step_nll(denoiser, x, steps, mask_id, pad_id=-1, order="interlaced", exponent=1.5):
    """Return nll@steps (B,), nats per text: -log p(x | length, a) when `sample` writes x (B, L) in
    `steps` steps, for reveal times a drawn once per text.

    Its mean over a is an upper bound on that sampler's -log p(x | length).
    """
    z = x.masked_fill(x != pad_id, mask_id)
    levels = time_grid(steps, exponent)
    _, log_prob, _ = rollout(denoiser, z, levels, mask_id, order, given=x)
    return -log_prob


# ------------------------------------------------------- 2. the levels at which x is masked again
def weight(t):
    """Return w(t) = -alpha'_t/(1 - alpha_t) = 1/t, at most 10."""
    return (1 / t).clamp(max=10)


def draw_weighted_levels(n, device=None):
    """Draw levels (n,) whose density is w(t)/(1 + log 10), which is less noisy than weighting
    uniform levels by w(t)."""
    area = torch.rand(n, device=device) * (1 + math.log(10))  # under w, left of the level
    return torch.where(area < 1, area, (area - 1).exp()) / 10  # the area up to .1 is 1


# -------------------------------------------------------------------- 3. discriminator, 4. reward
def mean_over_text(values, is_text):
    """Return the mean (B,) of `values` (B, L) where is_text (B, L) is True; 0 without text."""
    count = is_text.sum(1).clamp(min=1)
    return (values * is_text).sum(1) / count


def binary_cross_entropy(logits, is_text, label):
    """Return the binary cross-entropy, nats, of logits (B, L) against `label`: the mean over a
    text's tokens, then over texts."""
    labels = torch.full_like(logits, label)
    loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return mean_over_text(loss, is_text).mean()


def discriminator_loss(logits_ref, is_text_ref, logits, is_text, smoothing=0.0):
    """Return the loss, nats, with label 1 for the reference. The number of texts may differ.

    Smoothing e makes the labels 1 - e and e, which bounds the optimal |logit| by log((1 - e)/e).
    """
    loss_ref = binary_cross_entropy(logits_ref, is_text_ref, 1 - smoothing)
    loss_student = binary_cross_entropy(logits, is_text, smoothing)
    return (loss_ref + loss_student) / 2


def reward(logits, is_text, clip=8.0):
    """Return r(z) (B,), nats, detached: the mean of logits (B, L) over text, clipped to +-clip."""
    r = mean_over_text(logits.detach(), is_text)
    return r.clamp(-clip, clip)


def grouped_advantage(r, G, eps=1e-4):
    """Return A = (r - mean)/(std + eps) (B,) for rewards r (B,).

    The mean and the std are those of a group: G rewards that follow one another. |A| is at most
    sqrt(G - 1), so that up to G = 10 the paper's clip at 3 changes nothing. If a group's texts are
    masked at one level t, dividing by std makes the gradients of all levels about equally large:
    in effect the weight of a level is w(t)/std(t).
    """
    groups = r.view(-1, G)
    groups = groups - groups[:, :1]  # so that equal rewards give exactly 0, despite rounding
    centred = groups - groups.mean(1, keepdim=True)
    variance = centred.square().mean(1, keepdim=True)
    A = centred / (variance.sqrt() + eps)
    return A.flatten()


# ------------------------------------------------------------------------------- 5. student step
def policy_loss(log_prob, advantage, w, length):
    """Return the REINFORCE loss per text token, for log_prob, advantage A and weight w (B,).

    Its negative gradient is E[w * A * grad log_prob] / length; length is the texts' mean length.
    """
    return -(w * advantage * log_prob).mean() / length


def regularisers(states, teacher, mask_id):
    """Return KL(teacher || student) and the student's entropy, nats per mask, for the states of a
    rollout: means over the masks of each step, then over steps."""
    kl = 0.0
    entropy = 0.0
    for z, log_p_x in states:
        log_p_teacher = predict(teacher, z, z == mask_id)  # (n, V)
        n = max(len(log_p_x), 1)
        kl += F.kl_div(log_p_x, log_p_teacher, reduction="sum", log_target=True) / n
        entropy -= (log_p_x.exp() * log_p_x).sum() / n
    return kl / len(states), entropy / len(states)


@torch.no_grad()
def update_ema(average, net, decay):
    """Move the weights of `average` in place: average = decay * average + (1 - decay) * net."""
    for mean, p in zip(average.parameters(), net.parameters()):
        mean.lerp_(p, 1 - decay)


# ------------------------------------------------------- reward-guided ancestral sampler (RGAS)
def tilted(z, where, log_p_x, discriminator, pad_id, h):
    """Draw z_s (B, L): the tokens at `where` come from softmax(log_p_x (n, V) + h * dr/dp).

    dr/dp (n, V) is the gradient of the unclipped reward with respect to the probabilities of soft
    tokens, taken at p(x_i | z_t). To first order, h = 1 draws from p_student * exp(r).
    """
    probs = log_p_x.exp().detach().requires_grad_()
    with torch.enable_grad():
        logits = discriminator(z, where, probs)
        r = mean_over_text(logits, z != pad_id)
        grad, = torch.autograd.grad(r.sum(), probs)
    tilted_log_p = F.log_softmax(log_p_x + h * grad, -1)
    return z.masked_scatter(where, draw(tilted_log_p))


def reranked(z, where, log_p_x, discriminator, pad_id, M):
    """Draw z_s (B, L): M candidates differ at `where`; one is kept, with probability softmax(r)."""
    B, L = z.shape
    candidates = z[:, :, None].repeat(1, 1, M)  # (B, L, M)
    candidates[where] = draw(log_p_x, M)
    rows = candidates.transpose(1, 2).reshape(B * M, L)  # M rows of a text, then of the next

    logits = discriminator(rows)
    r = reward(logits, rows != pad_id, clip=math.inf)  # clipped ones would tie
    choice = draw(F.log_softmax(r.view(B, M), -1))  # (B, 1)
    return candidates.take_along_dim(choice[:, None], 2)[..., 0]  # (B, L, 1) -> (B, L)


@torch.no_grad()
def guided_sample(denoiser, discriminator, z, steps, mask_id, pad_id=-1, temperature=1.0, h=1.0,
                  M=4, switch=0.5, order="interlaced", exponent=1.5, on_step=None):
    """Fill the masks of z (B, L): tilt by h in the first fraction `switch` of the steps, while most
    masks are left, then re-rank M candidates, as in the paper. The discriminator was trained on
    masks in random order, so in the interlaced order it sees states that are new to it.

    Returns x (B, L), nfe (B,) and disc_calls (B,), the discriminator's passes: 1 (with a backward
    pass) to tilt, M to re-rank.
    """
    a = reveal_times(z, order)
    tilt = functools.partial(tilted, discriminator=discriminator, pad_id=pad_id, h=h)
    rerank = functools.partial(reranked, discriminator=discriminator, pad_id=pad_id, M=M)
    nfe = torch.zeros_like(z[:, 0])
    disc_calls = torch.zeros_like(nfe)
    for k, s in enumerate(time_grid(steps, exponent)[1:]):
        tilting = k < switch * steps
        choose = tilt if tilting else rerank
        z, called = ancestral_step(denoiser, z, a, s, mask_id, temperature, choose)
        nfe += called
        disc_calls += called * (1 if tilting else M)
        if on_step:
            on_step(z)
    return z, nfe, disc_calls
