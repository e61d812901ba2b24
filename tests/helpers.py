"""What several test files share: programs as typed, small reference networks, model folders."""
import json
import os
import re
import shutil
import socket
from collections import Counter

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from clip_text import BOS, EOS, CLIPTextModel
from erasing import Pair
from plumbing import UserError
from plumbing.book import BOOK
from plumbing.disk import read_json
from plumbing.weights import read_config
from sample import Model
from starts import ROOT, run
from unet import UNet
from vae import VAE

# ---- programs, as a user types them ----

MINI = ROOT / "mini"
SIZE = read_json(MINI / "defaults.json")["size"]
CLASSES = list(read_json(BOOK)["classes"])
ENV = os.environ | {"OMP_NUM_THREADS": "1"}                       # bytes may depend on the number of threads
QUICK = ["--lora-steps", "2", "--n", "1", "--set", "trajectories=2", "batch=2"]
AIRPLANE = ["--concept", "airplane", "--anchor", "sky"]
SHIP = ["--concept", "ship", "--anchor", "street"]
CLOSED = ["--lora-steps", "0", "--no-pictures"]
UNET = "unet/diffusion_pytorch_model.safetensors"


def erase(folder, concept):
    run("realera.py", "--concept", concept, "--anchor", "sky", "--lora-steps", 0, "--no-pictures", "--out",
        folder / concept, cwd=folder)
    return folder / concept


def link_mini(folder, steps):
    """mini/, linked into a folder, but for the number of steps."""
    for path in MINI.iterdir():
        if path.name != "defaults.json":
            (folder / path.name).symlink_to(path)
    (folder / "defaults.json").write_text(json.dumps(read_json(MINI / "defaults.json") | {"steps": steps}))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def no_drawing(*args, **kwargs):
    raise AssertionError("a picture is drawn")


# ---- tensors ----

def quick_model(steps):
    """mini/, whose pictures take few steps."""
    model = Model(MINI)
    model.defaults["steps"] = steps
    return model



def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(name="airplane", seed=7, T=10, D=16, n=6):
    g = rng(seed)
    e, e_star = (torch.randn(T, D, generator=g, dtype=torch.float64) for _ in range(2))
    return Pair(name, "sky", e, e_star, T - n, T - n - 1, n, seed)


# ---- a small vocabulary in CLIP's form ----

CORPUS = """a photo of a cat and a photo of the dog, an oil painting of the river at night by van gogh.
the quick brown fox jumps over the lazy dog; pictures, pictured, picturing! don't, they've, we'll, it's, i'm.
an astronaut riding a horse on the moon in the style of claude monet, highly detailed, 8k, 1984, trending.
café naïve façade señor über straße garçon résumé 日本語 日本 の 写真 привет мир مرحبا 😀 😀 👍 ελλάς — “quoted” …"""


def byte_symbols():
    """OpenAI's printable stand-in for each byte, in the order of the official vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return dict(zip(plain + others, map(chr, plain + [256 + i for i in range(len(others))])))


def symbols(word):
    """A word before any merge: one symbol a byte, the last with the mark of a word's end."""
    letters = [byte_symbols()[byte] for byte in word.encode()]
    return letters[:-1] + [letters[-1] + "</w>"]


def merge(pieces, pair):
    done, i = [], 0
    while i < len(pieces):
        both = tuple(pieces[i:i + 2]) == pair
        done.append("".join(pair) if both else pieces[i])
        i += 2 if both else 1
    return done


def learn_merges(text, n=150):
    words = Counter(re.findall(r"[^\W\d_]+|\d|[^\s\w]+", text.lower()))
    split = {word: symbols(word) for word in words}
    merges = []
    for _ in range(n):
        pairs = Counter()
        for word, pieces in split.items():
            for pair in zip(pieces, pieces[1:]):
                pairs[pair] += words[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = {word: merge(pieces, best) for word, pieces in split.items()}
    return merges


TOKEN = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
SPECIALS = {"bos_token": {"content": BOS} | TOKEN, "eos_token": {"content": EOS} | TOKEN,
            "unk_token": {"content": EOS} | TOKEN, "pad_token": EOS}
SETTINGS = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77,
            "name_or_path": "openai/clip-vit-large-patch14", "tokenizer_class": "CLIPTokenizer",
            "special_tokens_map_file": "./special_tokens_map.json"}
MERGES = learn_merges(CORPUS)


def write_vocabulary(folder, merges=MERGES):
    """The four files of an official tokenizer folder."""
    base = list(byte_symbols().values())
    tokens = [*base, *(symbol + "</w>" for symbol in base), *("".join(pair) for pair in merges), BOS, EOS]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    official = {key: {"__type": "AddedToken"} | value if isinstance(value, dict) else value
                for key, value in SPECIALS.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS | official))
    (folder / "special_tokens_map.json").write_text(json.dumps(SPECIALS))
    return folder


def reference(folder):
    return transformers.CLIPTokenizer.from_pretrained(folder)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_padding(folder, style):
    """A tokenizer folder whose padding is "!", id 0, in the ways that are around."""
    write_vocabulary(folder)
    settings, specials = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    if style == "SD 2.1-base":                                     # its tokenizer_config.json says EOS
        edit_json(specials, pad_token="!")
    if style == "one file":
        edit_json(settings, pad_token="!")
        specials.unlink()
    if style == "full entry":
        edit_json(specials, pad_token={"content": "!"} | TOKEN | {"normalized": False})
    if style in ("listed", "listed last"):                         # as SDXL's second tokenizer has it
        plain = TOKEN | {"normalized": False, "special": True}
        ids = json.loads((folder / "vocab.json").read_text())
        listed = {str(ids[BOS]): {"content": BOS} | plain | {"normalized": True},
                  str(ids[EOS]): {"content": EOS} | plain | {"normalized": True},
                  "0": {"content": "!"} | plain}
        edit_json(settings, added_tokens_decoder=listed, pad_token="!")
        edit_json(specials, pad_token="!" if style == "listed" else EOS)       # which is not looked at
    return folder


# ---- networks: theirs are small, random, and saved by themselves; ours read the folder ----

DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
# The official config.json files, whole: every key that later versions of diffusers added is absent.
OFFICIAL_UNET = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.2.2", "act_fn": "silu",
    "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False,
    "cross_attention_dim": 768, "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
    "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4,
    "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32,
    "out_channels": 4, "sample_size": 64, "up_block_types": [UP, CROSS_UP, CROSS_UP, CROSS_UP]}
OFFICIAL_VAE = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.2.2", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "out_channels": 3, "sample_size": 512,
    "scaling_factor": 0.18215, "up_block_types": ["UpDecoderBlock2D"] * 4}
OFFICIAL_TEXT = {
    "_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
    "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0, "initializer_range": 0.02,
    "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
    "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
    "torch_dtype": "float32", "transformers_version": "4.21.0.dev0", "vocab_size": 49408}
OFFICIAL_UNET_21 = OFFICIAL_UNET | {
    "_diffusers_version": "0.10.0.dev0", "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024,
    "dual_cross_attention": False, "num_class_embeds": None, "only_cross_attention": False,
    "use_linear_projection": True}
OFFICIAL_TEXT_21 = OFFICIAL_TEXT | {
    "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 23, "projection_dim": 512}
# With one channel per group a norm would take the time embedding away again: so fewer groups than channels.
UNETS = {
    "as in SD": {"block_out_channels": [32, 64, 64, 96], "norm_num_groups": 16, "cross_attention_dim": 24},
    "attention below only": {
        "block_out_channels": [16, 32, 48], "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
        "up_block_types": [CROSS_UP, CROSS_UP, UP], "layers_per_block": 1, "attention_head_dim": 4,
        "norm_num_groups": 8, "norm_eps": 1e-3, "cross_attention_dim": 20},
    "narrowing": {
        "block_out_channels": [64, 32], "down_block_types": [CROSS_DOWN, CROSS_DOWN],
        "up_block_types": [CROSS_UP, CROSS_UP], "attention_head_dim": 2, "norm_num_groups": 16,
        "in_channels": 5, "out_channels": 3, "cross_attention_dim": 32},
    "up unlike down": {
        "block_out_channels": [16, 32, 32], "down_block_types": [CROSS_DOWN, DOWN, CROSS_DOWN],
        "up_block_types": [UP, CROSS_UP, UP], "layers_per_block": 3, "attention_head_dim": 1,
        "norm_num_groups": 4, "cross_attention_dim": 8},
    "as in SD 2.1-base": {
        "block_out_channels": [32, 64, 96, 96], "norm_num_groups": 16, "cross_attention_dim": 40,
        "attention_head_dim": [2, 4, 8, 6], "use_linear_projection": True, "upcast_attention": True,
        "dual_cross_attention": False, "num_class_embeds": None, "only_cross_attention": False},
    "one level": {
        "block_out_channels": [32], "down_block_types": [CROSS_DOWN], "up_block_types": [CROSS_UP],
        "layers_per_block": 1, "attention_head_dim": 8, "norm_num_groups": 8, "cross_attention_dim": 16}}


def vae_blocks(*widths):
    n = len(widths)
    return {"block_out_channels": list(widths), "down_block_types": ["DownEncoderBlock2D"] * n,
            "up_block_types": ["UpDecoderBlock2D"] * n}


VAES = {
    "as in SD": vae_blocks(32, 32, 64, 64),
    "one layer": vae_blocks(8, 24) | {"layers_per_block": 1, "norm_num_groups": 4, "scaling_factor": 0.3},
    "narrowing": vae_blocks(32, 16, 24) | {"norm_num_groups": 8, "latent_channels": 7},
    "one level": vae_blocks(16) | {"norm_num_groups": 2, "layers_per_block": 3}}
TEXTS = {
    "as in SD": {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 3, "vocab_size": 300},
    "gelu": {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
             "vocab_size": 100, "hidden_act": "gelu", "layer_norm_eps": 1e-3},
    "as in SD 2.1-base": {
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 5, "num_attention_heads": 4,
        "vocab_size": 200, "hidden_act": "gelu", "pad_token_id": 1, "eos_token_id": 2, "projection_dim": 32},
    "short": {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 1,
              "vocab_size": 50, "max_position_embeddings": 16}}


def theirs_unet(**changes):
    return random_network(lambda: diffusers.UNet2DConditionModel.from_config(OFFICIAL_UNET | changes))


def theirs_vae(**changes):
    return random_network(lambda: diffusers.AutoencoderKL.from_config(OFFICIAL_VAE | changes))


def theirs_text(**changes):
    config = transformers.CLIPTextConfig.from_dict(OFFICIAL_TEXT | changes)
    return random_network(lambda: transformers.CLIPTextModel(config))


def random_network(make, noise=0.05):
    torch.manual_seed(0)
    network = make().eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter += noise * torch.randn_like(parameter)
    return network


def near(ours, theirs):
    """Equal shapes, and no number further than 1e-5 apart."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() <= 1e-5


def norms(network):
    """Name -> (groups, eps). The names are those of the weights, so two libraries' can be compared."""
    found = {name: m for name, m in network.named_modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))}
    return {name: (getattr(module, "num_groups", None), module.eps) for name, module in found.items()}


def shapes(network):
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def same_at_full_size(ours_class, config_class, official, theirs_of, parameters, folder):
    """Names, shapes, norms and the number of parameters, without memory. Returns config and networks."""
    (folder / "config.json").write_text(json.dumps(official))
    config = read_config(folder, config_class, {})
    with torch.device("meta"):
        ours, theirs = ours_class(config), theirs_of(official)
    assert shapes(ours) == shapes(theirs)
    assert sum(parameter.numel() for parameter in ours.parameters()) == parameters
    assert norms(ours) == norms(theirs)
    return config, ours, theirs


def edit_tensors(path, change):
    """Let `change` edit the dict of tensors of a safetensors file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refuses(ours_class, folder, *words):
    """A UserError whose message has all of `words`."""
    with pytest.raises(UserError) as caught:
        ours_class.from_pretrained(folder)
    missing = [word for word in words if str(word) not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def nan(key, value=float("nan")):
    return lambda tensors: tensors[key].view(-1)[-1:].fill_(value)


# ---- whole models: a folder, and an original single file ----

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
             "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
             "steps_offset": 1}
V1 = {"unet": UNETS["as in SD"], "text": {"hidden_act": "quick_gelu"}, "padding": "SD 1"}
V2 = {"unet": UNETS["as in SD 2.1-base"], "text": {"hidden_act": "gelu"}, "padding": "SD 2.1-base"}


def write_model(folder, version):
    """A pipeline's folder with random weights: 4 levels of 2 layers as SD has them, 32×32 pictures."""
    (folder / "tokenizer").mkdir(parents=True)
    write_padding(folder / "tokenizer", version["padding"])
    tokenizer = reference(folder / "tokenizer")
    text = theirs_text(hidden_size=version["unet"]["cross_attention_dim"], intermediate_size=64,
                       num_attention_heads=4, num_hidden_layers=3, vocab_size=len(tokenizer),
                       **version["text"])
    vae = theirs_vae(block_out_channels=[16, 16, 32, 32], norm_num_groups=8)
    scheduler = diffusers.PNDMScheduler.from_config(SCHEDULER)
    scheduler.register_to_config(clip_sample=False)                # as in the official file: for DDIM
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=theirs_unet(**version["unet"]),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    shutil.move(folder / "tokenizer", folder / "official")
    pipe.save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")                            # written in the form of today
    shutil.move(folder / "official", folder / "tokenizer")
    (folder / "defaults.json").write_text(json.dumps({"guidance": 3.0, "steps": 3, "size": 64}))
    return folder


def write_plain_book(path):
    """mini's classes with anchor, synonyms and phrases alone: a book without lists of its own."""
    classes = {name: {key: entry[key] for key in ("anchor", "synonyms", "associated")}
               for name, entry in read_json(BOOK)["classes"].items()}
    path.write_text(json.dumps({"classes": classes, "scenes": read_json(BOOK)["scenes"]}))


def write_narrow(folder):
    """mini/ with a U-Net and a VAE of as many layers, but narrow and random; a picture takes one step."""
    without = shutil.ignore_patterns("unet", "vae", "work", "*.py", "*.mjs", "*.csv", "*.md", "*.jpg")
    shutil.copytree(MINI, folder, ignore=without, dirs_exist_ok=True)
    edit_json(folder / "defaults.json", steps=1)
    for part, make, width in (("unet", theirs_unet, 16), ("vae", theirs_vae, 8)):
        config = read_json(MINI / part / "config.json")
        narrow = {"block_out_channels": [width] * len(config["block_out_channels"])}
        make(**config | narrow).save_pretrained(folder / part)


def same_pictures(model, pipe):
    """Two prompts drawn by both, from the same noise: at most 1/255 apart."""
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a photo of a cat!", "an oil painting of the river at night, unseen"]
    expected = pipe(prompts, latents=model.noise([1, 2]), num_inference_steps=4, guidance_scale=3.0,
                    height=64, width=64, output_type="pt").images
    ours = model.draw(prompts, [1, 2], steps=4, guidance=3.0)
    assert (ours - expected.float()).abs().max() <= 1 / 255
    other = model.draw(prompts[::-1], [1, 2], steps=4, guidance=3.0)
    assert (ours - other).abs().max() > 10 / 255                   # the text matters in this model


def original_key(part, key):
    """A model folder's key under its original name. That it is right, diffusers' own conversion says."""
    if part == "text_encoder":
        return "cond_stage_model.transformer.text_model." + key.removeprefix("text_model.")
    if part == "unet":
        def count(found):
            way, i, what, j, rest = found.groups()
            i, j = int(i), int(j)
            if what == "downsamplers":
                return f"input_blocks.{3 * i + 3}.0.op.{rest.removeprefix('conv.')}"
            if what == "upsamplers":
                return f"output_blocks.{3 * i + 2}.{1 if i == 0 else 2}.{rest}"
            n, index = 3 * i + j + (way == "down"), {"resnets": 0, "attentions": 1}[what]
            return f"{'input' if way == 'down' else 'output'}_blocks.{n}.{index}.{rest}"
        key = re.sub(r"^(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", count, key)
        words = {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
                 "mid_block.resnets.1": "middle_block.2", "conv_in": "input_blocks.0.0",
                 "conv_norm_out": "out.0", "conv_out": "out.2",
                 "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
                 "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0",
                 "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
        if "transformer_blocks" in key:                            # inside, names are the same
            words = {"mid_block.attentions.0": "middle_block.1"}
    else:
        key = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{3 - int(found[1])}", key)
        words = {"down_blocks.": "down.", "resnets.": "block.", "downsamplers.0": "downsample",
                 "upsamplers.0": "upsample", "mid_block.block.0": "mid.block_1", "conv_norm_out": "norm_out",
                 "mid_block.block.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1", "to_q": "q",
                 "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm",
                 "conv_shortcut": "nin_shortcut"}
    for new, old in words.items():
        key = key.replace(new, old)
    return {"unet": "model.diffusion_model.", "vae": "first_stage_model."}[part] + key


NETWORKS = {"unet": (UNet, "diffusion_pytorch_model"), "vae": (VAE, "diffusion_pytorch_model"),
            "text_encoder": (CLIPTextModel, "model")}
EXTRA = {"betas": torch.zeros(1000), "alphas_cumprod": torch.zeros(1000),
         "sqrt_recipm1_alphas_cumprod": torch.ones(2), "posterior_mean_coef1": torch.ones(2),
         "model_ema.decay": torch.tensor(0.9999),
         "model_ema.diffusion_modelinput_blocks00weight": torch.ones(3),
         "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}


def write_single_file(path, parts, dtype=torch.float32):
    """The three networks' tensors (by part and today's name) as CompVis wrote them, and what else they do."""
    tensors = dict(EXTRA)
    for part, network in parts.items():
        for key, tensor in network.items():
            square = part == "vae" and "attentions.0.to_" in key and tensor.ndim == 2
            tensors[original_key(part, key)] = (tensor[:, :, None, None] if square else tensor).to(dtype)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path
