"""autoregressive.py - how the baseline writes: one token at a time, with a key-value cache.

The scripts at the top only train a causal model, and judging needs no cache. Left out on purpose:
prompts, top-k and top-p; comparisons vary the temperature alone.
"""
import torch
import torch.nn.functional as F

import didi
from model import rotate


def new_cache(net, B):
    """Return an empty cache for `next_logits`: keys and values (n_layer, 2, B, H, L, D/H)."""
    config = net.config
    weight = net.embed.weight
    dtype = torch.float32
    if net.bf16 and weight.is_cuda:  # as in model.Block, which attends in float32 on a CPU
        dtype = torch.bfloat16

    D = config.n_embd // config.n_head
    shape = (config.n_layer, 2, B, config.n_head, config.length, D)
    return torch.zeros(shape, dtype=dtype, device=weight.device)


def attend(block, h, cos, sin, kv, i):
    """Return model.Block's output (B, 1, D) for h (B, 1, D) at position i; store its key and value
    in kv (2, B, H, L, D/H)."""
    qkv = block.qkv(block.norm1(h))
    qkv = qkv.view(len(h), 3, block.n_head, 1, -1)
    q, k, v = qkv.unbind(1)  # (B, H, 1, D/H) each
    q = rotate(q, cos, sin).to(kv.dtype)

    seen = slice(i + 1)
    keys, values = kv
    keys[:, :, i:i + 1] = rotate(k, cos, sin)
    values[:, :, i:i + 1] = v
    with torch.autocast(h.device.type, enabled=False):
        a = F.scaled_dot_product_attention(q, keys[:, :, seen], values[:, :, seen])

    h = h + block.proj(a.reshape(h.shape))
    up = block.up(block.norm2(h))
    return h + block.down(F.gelu(up, approximate="tanh"))


def next_logits(net, token, i, cache):
    """Return the logits (B, V) for the token after `token` (B,), which stands at position i."""
    h = net.embed(token[:, None])  # (B, 1, D)
    with torch.autocast(h.device.type, torch.bfloat16, enabled=net.bf16):
        for block, kv in zip(net.blocks, cache):
            cos = net.cos[i]
            sin = net.sin[i]
            h = attend(block, h, cos, sin, kv, i)
        h = net.norm(h)
        return net.out(h)[:, 0]


@torch.no_grad()
def autoregress(net, B, pad_id, temperature=1.0):
    """Return B texts x (B, L), padded with pad_id, and nfe (B,), the calls until each has ended.

    pad_id is -1 where texts are packed and never end.
    """
    x = torch.full((B, net.config.length), pad_id, device=net.lengths.device)
    token = torch.full_like(x[:, 0], net.config.mask_id)  # the mask stands before x_1
    nfe = torch.zeros_like(token)
    going = torch.ones_like(token, dtype=torch.bool)
    cache = new_cache(net, B)

    for i in range(x.shape[1]):
        logits = next_logits(net, token, i, cache)
        log_p = F.log_softmax(logits.float() / temperature, -1)  # (B, V)
        drawn = didi.draw(log_p)[:, 0]
        token = torch.where(going, drawn, pad_id)
        x[:, i] = token
        nfe += going
        going &= token != pad_id
        if not going.any():
            break
    return x, nfe
