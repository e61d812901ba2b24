"""Our networks against diffusers' and transformers': names, shapes, norms and numbers; and bad folders.

Their networks are small, random, and saved by themselves; ours read the folder. Every parameter gets noise,
as a norm that starts with ones and zeros would hide that two norms were swapped.
"""
import json

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_tokenizer import write_vocabulary
from torch import nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from clip_text import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from eval_clip import CLIP, MEAN, STD
from experiments.bench import full_size
from plumbing import UserError
from plumbing.weights import read_config
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

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


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path, change):
    """Let `change` edit the dict of tensors of a safetensors file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def unet_folder(tmp_path):
    theirs_unet(**UNETS["one level"]).save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


@pytest.fixture
def vae_folder(tmp_path):
    theirs_vae(**VAES["one layer"]).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def text_folder(tmp_path):
    theirs_text(**TEXTS["short"]).save_pretrained(tmp_path / "text_encoder")
    return tmp_path / "text_encoder"


# ---- names, shapes and norms at full size, without memory ----

FULL = {
    "unet": (UNet, UNetConfig, OFFICIAL_UNET, 686, 859_520_964,
             lambda: diffusers.UNet2DConditionModel.from_config(OFFICIAL_UNET)),
    "vae": (VAE, VAEConfig, OFFICIAL_VAE, 248, 83_653_863,
            lambda: diffusers.AutoencoderKL.from_config(OFFICIAL_VAE)),
    "text": (CLIPTextModel, CLIPTextConfig, OFFICIAL_TEXT, 196, 123_060_480,
             lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig.from_dict(OFFICIAL_TEXT)))}


@pytest.mark.parametrize("part", FULL)
def test_full_size_names_shapes_and_norms(part, tmp_path):
    ours_class, config_class, official, tensors, parameters, make_theirs = FULL[part]
    (tmp_path / "config.json").write_text(json.dumps(official))
    config = read_config(tmp_path, config_class, {})
    assert config == config_class()                                # our defaults are SD v1.4
    with torch.device("meta"):
        ours, theirs = ours_class(config), make_theirs()
    assert shapes(ours) == shapes(theirs)
    assert len(shapes(ours)) == tensors
    assert sum(parameter.numel() for parameter in ours.parameters()) == parameters
    assert norms(ours) == norms(theirs)


OFFICIAL_UNET_21 = OFFICIAL_UNET | {
    "_diffusers_version": "0.10.0.dev0", "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024,
    "dual_cross_attention": False, "num_class_embeds": None, "only_cross_attention": False,
    "use_linear_projection": True}
OFFICIAL_TEXT_21 = OFFICIAL_TEXT | {
    "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 23, "projection_dim": 512}


@pytest.mark.parametrize("part", ["unet", "text"])
def test_full_size_names_shapes_norms_and_heads_of_sd_2_1_base(part, tmp_path):
    official = {"unet": OFFICIAL_UNET_21, "text": OFFICIAL_TEXT_21}[part]
    ours_class, config_class = FULL[part][:2]
    (tmp_path / "config.json").write_text(json.dumps(official))
    with torch.device("meta"):
        ours = ours_class(read_config(tmp_path, config_class, {}))
        theirs = (diffusers.UNet2DConditionModel.from_config(official) if part == "unet" else
                  transformers.CLIPTextModel(transformers.CLIPTextConfig.from_dict(official)))
    assert shapes(ours) == shapes(theirs)
    assert norms(ours) == norms(theirs)
    assert sum(parameter.numel() for parameter in ours.parameters()) == {
        "unet": 865_910_724, "text": 340_387_840}[part]            # as published
    if part == "unet":
        heads = {name: module.heads for name, module in theirs.named_modules() if hasattr(module, "heads")}
        assert {name: ours.get_submodule(name).heads for name in heads} == heads
        levels = [heads[f"down_blocks.{i}.attentions.0.transformer_blocks.0.attn2"] for i in range(3)]
        assert levels == [5, 10, 20]


# ---- numbers ----

@pytest.mark.parametrize("size", [(24, 40), (25, 41)], ids=str)
@pytest.mark.parametrize("name", UNETS)
def test_unet_numbers(name, size, tmp_path):
    theirs = theirs_unet(**UNETS[name])
    theirs.save_pretrained(tmp_path)
    ours = UNet.from_pretrained(tmp_path)
    assert norms(ours) == norms(theirs)
    x = torch.randn(3, theirs.config.in_channels, *size)
    context = torch.randn(3, 7, theirs.config.cross_attention_dim)
    for t in (torch.tensor([0, 500, 999]), 321, torch.tensor(7)):
        near(ours(x, t, context), theirs(x, t, context).sample)


def test_unet_numbers_where_eps_matters(tmp_path):
    """One channel per group and a faint picture: its variance is below eps, so a wrong eps is seen."""
    theirs = theirs_unet(**UNETS["attention below only"] | {"norm_num_groups": 16, "norm_eps": 1e-5})
    theirs.save_pretrained(tmp_path)
    x, context = 1e-3 * torch.randn(2, 4, 8, 8), torch.randn(2, 7, 20)
    ours = UNet.from_pretrained(tmp_path)
    near(ours(x, 10, context), theirs(x, 10, context).sample)
    ours.down_blocks[0].resnets[0].norm1.eps = 1e-6
    assert (ours(x, 10, context) - theirs(x, 10, context).sample).abs().max() > 1e-3


@pytest.mark.parametrize("name", VAES)
def test_vae_numbers(name, tmp_path):
    theirs = theirs_vae(**VAES[name])
    theirs.save_pretrained(tmp_path)
    ours = VAE.from_pretrained(tmp_path)
    assert norms(ours) == norms(theirs)
    assert ours.scaling_factor == theirs.config.scaling_factor
    assert ours.factor == 2 ** (len(theirs.config.block_out_channels) - 1)
    z = torch.randn(3, theirs.config.latent_channels, 6, 10)
    near(ours.decode(z), theirs.decode(z).sample)
    for height, width in ((24, 40), (51, 70)):                     # 51: odd, so every halving rounds
        x = torch.rand(3, 3, height, width) * 2 - 1
        mean, logvar = ours.encode(x)
        latent = theirs.encode(x).latent_dist
        near(mean, latent.mean), near(logvar, latent.logvar)


def test_vae_numbers_at_a_larger_latent(tmp_path):
    theirs = theirs_vae(**VAES["one layer"])
    theirs.save_pretrained(tmp_path)
    z = torch.randn(2, 4, 24, 40)
    near(VAE.from_pretrained(tmp_path).decode(z), theirs.decode(z).sample)


def test_vae_numbers_where_eps_matters(tmp_path):
    theirs = theirs_vae(**VAES["one layer"] | {"norm_num_groups": 8})
    theirs.save_pretrained(tmp_path)
    ours, x = VAE.from_pretrained(tmp_path), 1e-3 * torch.rand(2, 3, 16, 16)
    near(ours.encode(x)[0], theirs.encode(x).latent_dist.mean)
    ours.encoder.down_blocks[0].resnets[0].norm1.eps = 1e-5
    assert (ours.encode(x)[0] - theirs.encode(x).latent_dist.mean).abs().max() > 1e-3


def test_vae_logvar_is_clamped(vae_folder):
    """Without the clamp a picture far from the training set could overflow exp(logvar)."""
    def far(tensors):
        tensors["quant_conv.bias"][4:] = torch.tensor([1e3, -1e3, 1e3, -1e3])
    edit_tensors(vae_folder / "diffusion_pytorch_model.safetensors", far)
    theirs, ours = diffusers.AutoencoderKL.from_pretrained(vae_folder), VAE.from_pretrained(vae_folder)
    x = torch.zeros(1, 3, 4, 4)
    near(ours.encode(x)[1], theirs.encode(x).latent_dist.logvar)


@pytest.mark.parametrize("name", TEXTS)
def test_text_numbers_in_every_layer(name, tmp_path):
    theirs = theirs_text(**TEXTS[name])
    theirs.save_pretrained(tmp_path)
    ours = CLIPTextModel.from_pretrained(tmp_path)
    assert norms(ours) == norms(theirs)
    rows = []
    for module in (ours.embeddings, *ours.encoder.layers):
        module.register_forward_hook(lambda module, inputs, output: rows.append(output))
    length = theirs.config.max_position_embeddings
    for ids in (torch.randint(theirs.config.vocab_size, (3, length)), torch.randint(50, (2, 5))):
        rows.clear()
        expected = theirs(ids, output_hidden_states=True)
        near(ours(ids), expected.last_hidden_state)
        assert len(rows) == len(expected.hidden_states) == theirs.config.num_hidden_layers + 1
        for row, other in zip(rows, expected.hidden_states):
            near(row, other)


def theirs_clip(text, vision, **changes):
    config = transformers.CLIPConfig(
        text_config=OFFICIAL_TEXT | text, vision_config={"num_attention_heads": 4} | vision, **changes)
    return random_network(lambda: transformers.CLIPModel(config))


CLIPS = {
    "old end-of-text id": (
        TEXTS["as in SD"] | {"eos_token_id": 2},
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "image_size": 32,
         "patch_size": 8}, 24),
    "gelu picture tower": (
        TEXTS["short"] | {"max_position_embeddings": 77},
        {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 3, "image_size": 30,
         "patch_size": 7, "hidden_act": "gelu", "layer_norm_eps": 1e-3, "num_attention_heads": 3}, 40),
    "one layer": (
        TEXTS["gelu"] | {"num_hidden_layers": 1},
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "image_size": 16,
         "patch_size": 16}, 16)}


@pytest.mark.parametrize("name", CLIPS)
def test_clip_numbers(name, tmp_path):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(write_vocabulary(tmp_path))
    text, vision, width = CLIPS[name]
    text = {"eos_token_id": tokenizer.eos_token_id} | text | {"vocab_size": len(tokenizer)}
    theirs = theirs_clip(text, vision, projection_dim=width)
    theirs.save_pretrained(tmp_path)
    ours = CLIP.from_pretrained(tmp_path)
    assert norms(ours) == norms(theirs)
    assert shapes(ours) == shapes(theirs)

    size = theirs.config.vision_config.image_size
    pictures = torch.randint(256, (5, 3, size, size)) / 255
    prompts = ["a photo of a cat", "", "the river 1984, at night", "a very long picture " * 30]
    inputs = dict(tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt"))
    inputs["pixel_values"] = (pictures - MEAN) / STD

    states = []
    for module in (ours.vision_model.pre_layrnorm, *ours.vision_model.encoder.layers):
        module.register_forward_hook(lambda module, inputs, output: states.append(output))
    expected = theirs(**inputs)
    near(ours.image_features(inputs["pixel_values"]), expected.image_embeds)
    near(ours.text_features(inputs["input_ids"]), expected.text_embeds)
    hidden = theirs.vision_model(inputs["pixel_values"], output_hidden_states=True).hidden_states
    assert len(states) == len(hidden) == theirs.config.vision_config.num_hidden_layers + 1
    for state, other in zip(states, hidden):
        near(state, other)
    near(ours.classify(pictures, prompts), expected.logits_per_image.softmax(dim=-1))


@pytest.mark.parametrize("size", [(224, 224), (300, 400), (500, 227), (100, 151), (37, 101), (64, 64),
                                  (230, 225)], ids=str)
@pytest.mark.parametrize("image_size", [224, 32])
def test_preprocess_as_transformers(size, image_size):
    """Within 2/255: Pillow rounds to whole numbers after each of its two passes, and we do not.

    The noise makes a wrong filter visible; no pixel is near black or white, where Pillow also clips twice.
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, size[0] // 8 + 2, size[1] // 8 + 2, generator=generator)
    picture = nn.functional.interpolate(coarse, size=size, mode="bilinear") * 0.2 + 0.25
    picture = (picture + 0.3 * torch.rand(picture.shape, generator=generator)).mul(255).round()
    config = {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}
    image = PIL.Image.fromarray(picture[0].permute(1, 2, 0).numpy().astype(np.uint8))
    theirs = CLIPImageProcessorPil(**config)(image, return_tensors="pt")["pixel_values"]
    with torch.device("meta"):
        clip = CLIP()
    vision = type(clip.config.vision)(image_size=image_size)
    clip.config = type(clip.config)(vision=vision)
    ours = clip.preprocess(picture / 255)
    assert ours.shape == theirs.shape
    assert ((ours - theirs) * STD * 255).abs().max() <= 2


# ---- what official folders contain ----

@pytest.mark.parametrize("style", ["2022", "today"])
def test_vae_attention_names(style, vae_folder):
    """SD v1.4's full-precision file has old names in the middle attention, its fp16 file has new ones."""
    path = vae_folder / "diffusion_pytorch_model.safetensors"
    expected = load_file(path)
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for key in [key for key in tensors if ".mid_block.attentions.0.to_" in key]:
            stem, name = key.split(".attentions.0.")
            name, kind = name.rsplit(".", 1)
            tensors[f"{stem}.attentions.0.{old_names[name]}.{kind}"] = tensors.pop(key)
    if style == "2022":
        edit_tensors(path, rename)
        assert "encoder.mid_block.attentions.0.query.weight" in load_file(path)
    ours = VAE.from_pretrained(vae_folder).state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize("counter", [True, False])
def test_text_prefix_and_counter(prefix, counter, text_folder):
    path = text_folder / "model.safetensors"
    expected = load_file(path)

    def as_official(tensors):
        for key in list(tensors):
            tensors[prefix + key] = tensors.pop(key)
        if counter:
            tensors[prefix + "embeddings.position_ids"] = torch.arange(16)[None]
    edit_tensors(path, as_official)
    ours = CLIPTextModel.from_pretrained(text_folder).state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_half_precision_twin_alone_and_beside(unet_folder):
    full = unet_folder / "diffusion_pytorch_model.safetensors"
    half = unet_folder / "diffusion_pytorch_model.fp16.safetensors"
    tensors = load_file(full)
    save_file({key: tensor.half() for key, tensor in tensors.items()}, half)
    key = "conv_in.weight"
    assert torch.equal(UNet.from_pretrained(unet_folder).state_dict()[key], tensors[key])
    full.unlink()
    ours = UNet.from_pretrained(unet_folder).state_dict()
    assert torch.equal(ours[key], tensors[key].half().float())
    assert ours[key].dtype == torch.float32


def test_short_official_configs(tmp_path):
    """The official config.json files lack every key that came later; reading them must not need those."""
    for make, ours_class, official, small in ((theirs_unet, UNet, OFFICIAL_UNET, UNETS["as in SD"]),
                                              (theirs_vae, VAE, OFFICIAL_VAE, VAES["as in SD"]),
                                              (theirs_text, CLIPTextModel, OFFICIAL_TEXT, TEXTS["as in SD"])):
        theirs = make(**small)
        theirs.save_pretrained(tmp_path / ours_class.__name__)
        (tmp_path / ours_class.__name__ / "config.json").write_text(json.dumps(official | small))
        assert shapes(ours_class.from_pretrained(tmp_path / ours_class.__name__)) == shapes(theirs)


def test_vae_without_scaling_factor(vae_folder):
    config = {key: value for key, value in OFFICIAL_VAE.items() if key != "scaling_factor"}
    config |= {key: value for key, value in VAES["one layer"].items() if key != "scaling_factor"}
    (vae_folder / "config.json").write_text(json.dumps(config))
    assert VAE.from_pretrained(vae_folder).scaling_factor == 0.18215


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype_and_device(dtype, unet_folder, vae_folder, text_folder):
    for ours_class, folder in ((UNet, unet_folder), (VAE, vae_folder), (CLIPTextModel, text_folder)):
        ours = ours_class.from_pretrained(folder, dtype=dtype, device="meta")
        assert {(p.dtype, p.device.type) for p in ours.parameters()} == {(dtype, "meta")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_networks_run_in_other_precisions(dtype, unet_folder, vae_folder, text_folder):
    """bfloat16 keeps 8 bits, so 3 % may get lost; sinusoids in it, where 998 is 1000, would lose more."""
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    for ours_class, folder, inputs in ((UNet, unet_folder, (x, torch.tensor([3, 998]), context)),
                                       (VAE, vae_folder, (x,)),
                                       (CLIPTextModel, text_folder, (torch.arange(16)[None],))):
        results = []
        for kind in (torch.float32, dtype):
            network = ours_class.from_pretrained(folder, dtype=kind)
            cast = [value.to(kind) if value.is_floating_point() else value for value in inputs]
            results.append(network.decode(*cast) if ours_class is VAE else network(*cast))
        assert results[1].dtype == dtype
        if dtype == torch.float64:
            near(results[1].float(), results[0])
        assert (results[1] - results[0]).abs().max() <= 0.03 * results[0].abs().max()


def test_classify_in_another_precision(tmp_path):
    """Pictures come in float32 whatever the network's precision is."""
    tokens = len(transformers.CLIPTokenizer.from_pretrained(write_vocabulary(tmp_path)))
    text, vision, width = CLIPS["one layer"]
    theirs_clip(text | {"vocab_size": tokens}, vision, projection_dim=width).save_pretrained(tmp_path)
    pictures, prompts = torch.rand(2, 3, 16, 16), ["a cat", "the river"]
    expected = CLIP.from_pretrained(tmp_path).classify(pictures, prompts)
    near(CLIP.from_pretrained(tmp_path, dtype=torch.float64).classify(pictures, prompts).float(), expected)


def test_clip_config_without_default_values(tmp_path):
    """transformers 4 left out what equals its defaults: for CLIP's text half 512, 2048 and 8."""
    theirs = theirs_clip({"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
                          "vocab_size": 500, "num_hidden_layers": 1},
                         CLIPS["one layer"][1], projection_dim=16)
    theirs.save_pretrained(write_vocabulary(tmp_path))
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    for key in ("hidden_size", "intermediate_size", "num_attention_heads"):
        del text[key]
    edit_json(tmp_path / "config.json", text_config=text)
    ours = CLIP.from_pretrained(tmp_path)
    assert shapes(ours) == shapes(transformers.CLIPModel.from_pretrained(tmp_path))
    assert ours.config.text.num_attention_heads == 8


def test_loading_draws_nothing_and_copies_nothing(unet_folder, monkeypatch):
    read = {}
    monkeypatch.setattr("plumbing.weights.load_file", lambda path: read.update(load_file(path)) or read)
    state = torch.get_rng_state()
    ours = UNet.from_pretrained(unet_folder)
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.data_ptr() == read[name].data_ptr() for name, parameter in ours.named_parameters())
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert not any(module.training for module in ours.modules())


# ---- bad folders ----

def refuses(ours_class, folder, *words):
    """A UserError whose message has all of `words`."""
    with pytest.raises(UserError) as caught:
        ours_class.from_pretrained(folder)
    missing = [word for word in words if str(word) not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def nan(key, value=float("nan")):
    return lambda tensors: tensors[key].view(-1)[-1:].fill_(value)


@pytest.mark.parametrize("problem, change", [
    ("lacks mid_block.resnets.0.norm1.bias", lambda tensors: tensors.pop("mid_block.resnets.0.norm1.bias")),
    ("has unknown surplus.weight", lambda tensors: tensors.update({"surplus.weight": torch.zeros(2)})),
    ("wrong shape for conv_in.bias", lambda tensors: tensors.update({"conv_in.bias": torch.zeros(33)})),
    ("NaN or infinity in conv_out.weight", nan("conv_out.weight")),
    ("NaN or infinity in conv_norm_out.bias", nan("conv_norm_out.bias", float("inf"))),
    ("NaN or infinity in time_embedding.linear_1.bias", nan("time_embedding.linear_1.bias", -float("inf")))])
def test_bad_tensors_are_named(problem, change, unet_folder):
    path = unet_folder / "diffusion_pytorch_model.safetensors"
    edit_tensors(path, change)
    refuses(UNet, unet_folder, path, problem)


def test_bad_tensors_in_the_other_networks(vae_folder, text_folder):
    edit_tensors(vae_folder / "diffusion_pytorch_model.safetensors", nan("decoder.conv_out.bias"))
    refuses(VAE, vae_folder, "decoder.conv_out.bias")
    edit_tensors(text_folder / "model.safetensors", lambda tensors: tensors.pop("final_layer_norm.bias"))
    refuses(CLIPTextModel, text_folder, "lacks final_layer_norm.bias")


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_weights(keep, unet_folder):
    path = unet_folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refuses(UNet, unet_folder, path, "download")


def test_pointer_instead_of_weights(unet_folder):
    """What `git clone` without LFS leaves in the place of a large file."""
    path = unet_folder / "diffusion_pytorch_model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:145a07e0\nsize 3438167534\n")
    refuses(UNet, unet_folder, path, "download")


UNSUPPORTED = [
    (UNet, "use_linear_projection", "yes"), (UNet, "act_fn", "gelu"), (UNet, "class_embed_type", "timestep"),
    (UNet, "down_block_types", ["AttnDownBlock2D"]), (UNet, "up_block_types", ["SimpleCrossAttnUpBlock2D"]),
    (UNet, "mid_block_type", "UNetMidBlock2D"), (UNet, "resnet_time_scale_shift", "scale_shift"),
    (UNet, "flip_sin_to_cos", False), (UNet, "freq_shift", 1), (UNet, "only_cross_attention", True),
    (UNet, "dual_cross_attention", True), (UNet, "mid_block_scale_factor", 0.5), (UNet, "conv_in_kernel", 1),
    (UNet, "transformer_layers_per_block", 2), (UNet, "addition_embed_type", "text"),
    (UNet, "time_embedding_type", "fourier"), (UNet, "center_input_sample", True),
    (UNet, "time_embedding_act_fn", "silu"), (UNet, "timestep_post_act", "silu"),
    (UNet, "attention_head_dim", "8"), (UNet, "layers_per_block", [1]),
    (VAE, "act_fn", "relu"), (VAE, "mid_block_add_attention", False), (VAE, "use_quant_conv", False),
    (VAE, "shift_factor", 0.1), (VAE, "latents_mean", [0.1, 0.0, 0.0, 0.0]),
    (CLIPTextModel, "hidden_act", "relu")]


@pytest.mark.parametrize("ours_class, key, value", UNSUPPORTED,
                         ids=[f"{ours_class.__name__}-{key}" for ours_class, key, value in UNSUPPORTED])
def test_unsupported_config_is_named(ours_class, key, value, request):
    folder = request.getfixturevalue({UNet: "unet_folder", VAE: "vae_folder"}.get(ours_class, "text_folder"))
    edit_json(folder / "config.json", **{key: value})
    refuses(ours_class, folder, "config.json", key if "types" not in key else value[0])


def test_widths_that_do_not_divide(unet_folder):
    edit_json(unet_folder / "config.json", norm_num_groups=5)
    refuses(UNet, unet_folder, "norm_num_groups")


@pytest.mark.parametrize("key, value", [("block_out_channels", [32, 64]), ("attention_head_dim", [8, 8])])
def test_levels_that_do_not_match(key, value, unet_folder):
    edit_json(unet_folder / "config.json", **{key: value})
    refuses(UNet, unet_folder, key)


def test_heads_of_each_level_must_divide_its_width(tmp_path):
    theirs_unet(**UNETS["as in SD 2.1-base"]).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", attention_head_dim=[2, 4, 8, 7])
    refuses(UNet, tmp_path, "attention_head_dim")


@pytest.mark.parametrize("content", [b'{"in_channels": 4,', b"\xff\xfe", b"", b"[4, 4]"],
                         ids=["cut off", "not UTF-8", "empty", "a list"])
def test_config_is_not_json(content, unet_folder):
    (unet_folder / "config.json").write_bytes(content)
    refuses(UNet, unet_folder, unet_folder / "config.json")


@pytest.mark.parametrize("ours_class", [UNet, VAE, CLIPTextModel, CLIP, CLIPTokenizer])
def test_missing_folder_and_file_for_a_folder(ours_class, tmp_path):
    refuses(ours_class, tmp_path / "nowhere", tmp_path / "nowhere")
    (tmp_path / "sd-v1-4.ckpt").touch()                            # the single file of the original release
    refuses(ours_class, tmp_path / "sd-v1-4.ckpt", "sd-v1-4.ckpt")


def test_missing_files(unet_folder):
    weights = unet_folder / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    refuses(UNet, unet_folder, unet_folder, "diffusion_pytorch_model.safetensors")
    (unet_folder / "config.json").unlink()
    refuses(UNet, unet_folder, unet_folder / "config.json", "missing")


def test_pickle_is_refused_and_the_printed_command_converts_it(unet_folder, monkeypatch):
    weights = unet_folder / "diffusion_pytorch_model.safetensors"
    expected = load_file(weights)
    weights.unlink()
    torch.save(expected, unet_folder / "diffusion_pytorch_model.bin")
    refuses(UNet, unet_folder, "diffusion_pytorch_model.bin", "convert")
    with pytest.raises(UserError) as caught:
        UNet.from_pretrained(unet_folder)
    command = str(caught.value).split('python -c "')[1].split('"')[0]
    monkeypatch.chdir(unet_folder)
    exec(command, {})
    ours = UNet.from_pretrained(unet_folder).state_dict()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


# ---- full size ----

@pytest.mark.slow
def test_full_size_numbers():
    """Random weights; matrices keep their own start, as noise on 859 million of them would explode."""
    def full(part):
        network = full_size(part).eval().requires_grad_(False)
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter += 0.05 * torch.randn_like(parameter)
        return network

    def twin(ours_class, theirs):
        with torch.device("meta"):
            ours = ours_class()
        ours.load_state_dict(theirs.state_dict(), assign=True)     # shares the memory
        return ours.eval().requires_grad_(False)

    theirs = full("text_encoder")
    ids = torch.randint(49408, (2, 77))
    context = twin(CLIPTextModel, theirs)(ids)
    near(context, theirs(ids).last_hidden_state)

    # In float32 theirs and ours are each about 2e-5 from the float64 result: so both in float64 here.
    theirs = full("vae").double()
    ours, x, z = twin(VAE, theirs), torch.rand(1, 3, 64, 64) * 2 - 1, torch.randn(1, 4, 8, 8)
    near(ours.encode(x.double())[0], theirs.encode(x.double()).latent_dist.mean)
    near(ours.decode(z.double()), theirs.decode(z.double()).sample)

    theirs = full("unet")
    near(twin(UNet, theirs)(z, 981, context[:1]), theirs(z, 981, context[:1]).sample)
