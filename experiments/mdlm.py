"""mdlm.py - convert the published MDLM teacher (arXiv 2406.07524) to our network, and back.

    python -m experiments.mdlm model.safetensors          # -> out/teacher.pt, then distill.py
    python -m experiments.mdlm out/student.pt --unfold out/mdlm/model.safetensors

MDLM's 169 M parameters, 679 MB, were trained on OpenWebText and are published under Apache 2.0:
https://huggingface.co/kuleshov-group/mdlm-owt/resolve/main/model.safetensors

MDLM gives every layer the noise level (adaLN), but always as 0. What the layers compute from it is
therefore constant: `fold` multiplies it into the weights, exactly.
"""
import json
import pathlib

import torch
import torch.nn.functional as F

import model

try:
    import safetensors.torch
except ImportError:  # optional: main says so
    safetensors = None

# sha256 47149e73f7552f39ea9776dbe74d925d25237bcf2ed2e2ec03cdff9d51c82aa4
ADDRESS = "https://huggingface.co/kuleshov-group/mdlm-owt/resolve/main/model.safetensors"
CONFIG = {  # what the authors' code needs of the published config.json
    "auto_map": {
        "AutoConfig": "configuration_mdlm.MDLMConfig",
        "AutoModelForMaskedLM": "modeling_mdlm.MDLM",
    },
    "model_type": "mdlm",
    "time_conditioning": False,
    "cond_dim": 128,
    "hidden_dim": 768,
    "model_length": 1024,
    "n_blocks": 12,
    "n_heads": 12,
    "vocab_size": 50258,
}
COND = 128  # width of adaLN's input
WAVES = 256  # cosines and sines that encode the noise level
TOKENIZERS = {50257: "gpt2", 257: "bytes"}  # by their number of tokens

# Raw logits of the published weights at the mask, 50257, in float32: candle-mi's reference values
PROMPT = torch.tensor([[464, 3139, 286, 4881, 318, 50257, 13]])
TOKENS = [6342, 14644, 4881]
LOGITS = torch.tensor([19.8361, 18.5939, 17.0668])


# -------------------------------------------------------------------------------- fold and unfold
def fold(theirs, n_layer):
    """Return our Denoiser's tensors: the same function as `theirs`, MDLM's {name: float64}.

    MDLM computes norm(x) * (1 + scale) + shift and x + gate * f(x). Its adaLN layers make scale,
    shift and gate from c, an embedding of the noise level, which is 0.
    """
    # The noise level is encoded as cosines, which are 1 at level 0, and sines, which are 0
    columns = theirs["sigma_map.mlp.0.weight"][:, :WAVES // 2]
    c = F.silu(columns.sum(1) + theirs["sigma_map.mlp.0.bias"])
    c = F.silu(theirs["sigma_map.mlp.2.weight"] @ c + theirs["sigma_map.mlp.2.bias"])  # (COND,)

    adaLN = theirs["output_layer.adaLN_modulation.weight"] @ c
    adaLN += theirs["output_layer.adaLN_modulation.bias"]
    shift, scale = adaLN.chunk(2)  # (D,) each
    ours = {
        "embed.weight": theirs["vocab_embed.embedding"],
        "norm.weight": theirs["output_layer.norm_final.weight"] * (1 + scale),
        "norm.bias": shift,
        "out.weight": theirs["output_layer.linear.weight"][:-1],  # without the mask, by SUBS
        "out.bias": theirs["output_layer.linear.bias"][:-1],
    }

    for i in range(n_layer):
        adaLN = theirs[f"blocks.{i}.adaLN_modulation.weight"] @ c
        adaLN += theirs[f"blocks.{i}.adaLN_modulation.bias"]
        shift1, scale1, gate1, shift2, scale2, gate2 = adaLN.chunk(6)  # (D,) each
        ours |= {
            f"blocks.{i}.norm1.weight": theirs[f"blocks.{i}.norm1.weight"] * (1 + scale1),
            f"blocks.{i}.norm1.bias": shift1,
            f"blocks.{i}.qkv.weight": theirs[f"blocks.{i}.attn_qkv.weight"],
            f"blocks.{i}.proj.weight": theirs[f"blocks.{i}.attn_out.weight"] * gate1[:, None],
            f"blocks.{i}.norm2.weight": theirs[f"blocks.{i}.norm2.weight"] * (1 + scale2),
            f"blocks.{i}.norm2.bias": shift2,
            f"blocks.{i}.up.weight": theirs[f"blocks.{i}.mlp.0.weight"],
            f"blocks.{i}.up.bias": theirs[f"blocks.{i}.mlp.0.bias"],
            f"blocks.{i}.down.weight": theirs[f"blocks.{i}.mlp.2.weight"] * gate2[:, None],
            f"blocks.{i}.down.bias": theirs[f"blocks.{i}.mlp.2.bias"] * gate2,
        }
    return ours


def unfold(net):
    """Return MDLM's tensors, {name: float32}, that compute what our Denoiser `net` computes.

    Its adaLN is constant: scale 0, gate 1, and shift our norm's bias. The mask's logit is 0.
    """
    ours = net.state_dict()
    D = net.config.n_embd
    half = D // net.config.n_head // 2
    zero = torch.zeros(D)
    one = torch.ones(D)
    theirs = {
        "vocab_embed.embedding": ours["embed.weight"],
        "sigma_map.mlp.0.weight": torch.zeros(COND, WAVES),
        "sigma_map.mlp.0.bias": torch.zeros(COND),
        "sigma_map.mlp.2.weight": torch.zeros(COND, COND),
        "sigma_map.mlp.2.bias": torch.zeros(COND),
        "rotary_emb.inv_freq": 10000 ** (-torch.arange(half) / half),
        "output_layer.norm_final.weight": ours["norm.weight"],
        "output_layer.linear.weight": F.pad(ours["out.weight"], (0, 0, 0, 1)),
        "output_layer.linear.bias": F.pad(ours["out.bias"], (0, 1)),
        "output_layer.adaLN_modulation.weight": torch.zeros(2 * D, COND),
        "output_layer.adaLN_modulation.bias": torch.cat((ours["norm.bias"], zero)),
    }

    for i in range(net.config.n_layer):
        theirs |= {
            f"blocks.{i}.norm1.weight": ours[f"blocks.{i}.norm1.weight"],
            f"blocks.{i}.attn_qkv.weight": ours[f"blocks.{i}.qkv.weight"],
            f"blocks.{i}.attn_out.weight": ours[f"blocks.{i}.proj.weight"],
            f"blocks.{i}.norm2.weight": ours[f"blocks.{i}.norm2.weight"],
            f"blocks.{i}.mlp.0.weight": ours[f"blocks.{i}.up.weight"],
            f"blocks.{i}.mlp.0.bias": ours[f"blocks.{i}.up.bias"],
            f"blocks.{i}.mlp.2.weight": ours[f"blocks.{i}.down.weight"],
            f"blocks.{i}.mlp.2.bias": ours[f"blocks.{i}.down.bias"],
            f"blocks.{i}.adaLN_modulation.weight": torch.zeros(6 * D, COND),
            f"blocks.{i}.adaLN_modulation.bias": torch.cat((
                ours[f"blocks.{i}.norm1.bias"], zero, one,
                ours[f"blocks.{i}.norm2.bias"], zero, one)),
        }
    return theirs


# ------------------------------------------------------------------------------------------ files
def read_config(path):
    """Return the Config of MDLM's network in `path`, from the config.json next to it, if any.

    Raises ValueError if the network depends on the noise level.
    """
    described = dict(CONFIG)
    beside = pathlib.Path(path).with_name("config.json")
    if beside.exists():
        described.update(json.loads(beside.read_text("utf-8")))

    if described["time_conditioning"]:
        raise ValueError(f"{beside}: a network with time_conditioning true cannot be folded")
    return model.Config(
        described["vocab_size"] - 1,  # the last one is the mask
        described["model_length"],
        described["n_blocks"],
        described["n_heads"],
        described["hidden_dim"],
        framed=True,
    )


def check_tensors(path, theirs, expected):
    """Raise ValueError, naming a tensor, unless `theirs` have the names and shapes `expected`."""
    wrong = f"{path} does not fit the config.json next to it, or else MDLM's"
    strange = theirs.keys() ^ expected.keys()
    if strange:
        raise ValueError(f"{wrong}: {min(strange)!r} is unknown or missing")

    for name, tensor in expected.items():
        shape = theirs[name].shape
        if shape != tensor.shape:
            raise ValueError(f"{wrong}: {name!r} has {list(shape)}, not {list(tensor.shape)}")

    if not torch.allclose(theirs["rotary_emb.inv_freq"].float(), expected["rotary_emb.inv_freq"]):
        raise ValueError(f"{wrong}: 'rotary_emb.inv_freq' is not of base 10000")


def read(path):
    """Return the MDLM network in a safetensors file as our Denoiser, frozen.

    Raises ValueError if it cannot be read or does not fit.
    """
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}): download {ADDRESS}") from None
    theirs = {name.removeprefix("backbone."): tensor.double() for name, tensor in tensors.items()}

    net = model.Denoiser(read_config(path))
    check_tensors(path, theirs, unfold(net))
    ours = fold(theirs, net.config.n_layer)
    net.load_state_dict(ours | {"lengths": net.lengths})  # rounds to float32, once
    return net.requires_grad_(False)


# --------------------------------------------------------------------------------------- commands
def import_teacher(args):
    """Write an MDLM network as a teacher's checkpoint; print whether it is the published one."""
    model.check_output(args.out, "teacher", args.data)
    net = read(args.file)
    tokenizer = TOKENIZERS.get(net.config.vocab_size)
    if tokenizer is None:
        raise ValueError(f"{args.file} has the vocabulary of none of our tokenizers, {TOKENIZERS}")
    if tokenizer == "gpt2":
        logits = net(PROMPT, PROMPT == net.config.mask_id)[0]  # (V,)
        difference = (logits[TOKENS] - LOGITS).abs().max()
        if difference < 1e-3:
            print("known answers within 1e-3: these are the published weights")
        else:
            print(f"known answers off by {difference:.2g}: these are not the published weights")

    model.save(
        args.out,
        [],
        {"model": net, "ema": net},
        kind="teacher",
        config=vars(net.config),
        tokenizer=tokenizer,
        flags={"data": args.data, "seed": 0},
        step=0,
        seconds=0.0,
    )
    print(f"wrote {args.out}: distil it on {args.data}, which must be made with --framed")


def export(args):
    """Write a checkpoint's average as MDLM's model.safetensors, with its config.json next to it."""
    _, net = model.load(args.file, "student", "teacher")
    config = net.config
    if config.pads:
        raise ValueError(f"{args.file} writes texts of many lengths, which MDLM cannot do")

    path = pathlib.Path(args.unfold)
    beside = path.with_name("config.json")
    if path.exists() or beside.exists():
        raise ValueError(f"{path} or {beside} already exists: name a file in another folder")
    path.parent.mkdir(parents=True, exist_ok=True)

    described = CONFIG | {
        "hidden_dim": config.n_embd,
        "model_length": config.length,
        "n_blocks": config.n_layer,
        "n_heads": config.n_head,
        "vocab_size": config.vocab_size + 1,
    }
    beside.write_text(json.dumps(described, indent=2))
    tensors = {f"backbone.{name}": tensor for name, tensor in unfold(net).items()}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    print(f"wrote {path} and {beside}: transformers also needs MDLM's "
          "configuration_mdlm.py and modeling_mdlm.py next to them")


def main(argv=None):
    parser = model.make_parser(__doc__)
    parser.add_argument("file", help="model.safetensors of MDLM; with --unfold our checkpoint")
    parser.add_argument("--data", default="out/openwebtext", help="its corpus, made with --framed")
    parser.add_argument("--out", default="out/teacher.pt", help="checkpoint to write")
    parser.add_argument("--unfold", metavar="FILE", help="write our checkpoint to FILE as MDLM's")
    args = parser.parse_args(argv)

    if safetensors is None:
        raise ValueError("this needs the optional package safetensors: "
                         "pip install safetensors")

    if args.unfold is None:
        import_teacher(args)
    else:
        export(args)


if __name__ == "__main__":
    model.run(main)
