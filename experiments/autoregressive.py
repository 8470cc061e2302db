"""autoregressive.py - the baseline: one token after the other, with a key-value cache.

    python train_teacher.py --causal                         # makes out/causal.pt
    python -m experiments.autoregressive --num 16            # 16 samples of it

Nothing at the top needs this: there a causal model is only trained, and it is a judge without a
cache. Left out on purpose: prompts, top-k and top-p; it is compared at --temperature alone.
"""

import torch
import torch.nn.functional as F

import didi
from data import corpus, memory
from data.command import RATE, SIZE, add_device_flags, make_parser, run_script, setup
from model import load_checkpoint, rotate


def new_cache(model, B):
    """Keys and values for `next_logits`: (n_layer, 2, B, H, L, D/H), nothing in it yet."""
    c, like = model.config, model.embed.weight
    dtype = like.dtype
    if model.bf16 and like.is_cuda:  # as in model.Block, which attends in float32 on a CPU
        dtype = torch.bfloat16
    shape = (c.n_layer, 2, B, c.n_head, c.length, c.n_embd // c.n_head)
    return like.new_zeros(shape, dtype=dtype)


def attend(block, h, cos, sin, kv, i):
    """model.Block at position i alone: h (B, 1, D); kv (2, B, H, L, D/H) gets its column i."""
    B, _, D = h.shape
    qkv = block.qkv(block.norm1(h)).view(B, 1, 3, block.n_head, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, 1, D/H) each
    kv[0, :, :, i:i + 1], kv[1, :, :, i:i + 1] = rotate(k, cos, sin), v
    keys, values = kv[:, :, :, :i + 1]
    with torch.autocast(h.device.type, enabled=False):
        a = F.scaled_dot_product_attention(rotate(q, cos, sin).to(kv.dtype), keys, values)
    h = h + block.proj(a.transpose(1, 2).reshape(B, 1, D))
    return h + block.down(F.gelu(block.up(block.norm2(h)), approximate="tanh"))


def next_logits(model, token, i, cache):
    """Logits (B, V) that follow token (B,), at position i of what a causal model reads."""
    h = model.embed(token[:, None])
    with torch.autocast(h.device.type, torch.bfloat16, enabled=model.bf16):
        for block, kv in zip(model.blocks, cache):
            h = attend(block, h, model.cos[i:i + 1], model.sin[i:i + 1], kv, i)
        return model.out(model.norm(h))[:, 0]


@torch.no_grad()
def autoregress(model, B, eos, temperature=1.0, on_step=None):
    """Write B sequences: x (B, L), padded with eos, and nfe (B,), calls until each has ended.

    eos is -1 where texts are packed and nothing ends. on_step(x so far) is called after each token.
    """
    x = torch.full((B, model.config.length), eos, device=model.lengths.device)
    token = torch.full_like(x[:, 0], model.config.mask_id)  # the mask stands before x_1
    cache, nfe = new_cache(model, B), torch.zeros_like(token)
    going = torch.ones_like(token, dtype=torch.bool)
    for i in range(x.shape[1]):
        logits = next_logits(model, token, i, cache)
        log_p = F.log_softmax(logits.float() / temperature, -1)  # (B, V)
        token = torch.where(going, didi.draw(log_p)[:, 0], eos)
        x[:, i] = token
        nfe += going
        going &= token != eos
        if on_step:
            on_step(x[:, :i + 1])
        if not going.any():
            break
    return x, nfe


def parse_flags(argv=None):
    p, add = make_parser("Sample from the autoregressive baseline.")
    add("--model", default="out/causal.pt", help="checkpoint of train_teacher.py --causal")
    add("--num", type=SIZE, default=16, help="samples, all at once")
    add("--temperature", type=RATE, default=1.0, help="divides the logits; 1 = the model's law")
    add_device_flags(add)
    return p.parse_args(argv)


def main(argv=None):
    args = parse_flags(argv)
    device, bf16 = setup(args)
    ckpt, model = load_checkpoint(args.model, ("causal",), device, bf16)
    token = 4 * model.config.n_layer * model.config.n_embd  # bytes of the cache
    memory.check(model.config, device, 0, args.num, token, "--num")
    x, nfe = autoregress(model, args.num, model.config.pad_id, args.temperature)
    print(f"autoregressive, temperature {args.temperature:g}, seed {args.seed}: "
          f"{nfe.float().mean():.2f} network calls per sequence")
    for text in corpus.decode(x, ckpt["tokenizer"], not model.config.pads):
        print(text.encode("unicode_escape").decode())  # no sample may steer the terminal


if __name__ == "__main__":
    run_script(main)
