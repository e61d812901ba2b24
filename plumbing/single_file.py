"""The names in an original checkpoint of Stable Diffusion v1: one file, all networks, older names.

    tensors = part_of(load_file("dream.safetensors"), "unet")       # {"conv_in.weight": …}, as in unet/

CompVis's own releases and most fine-tunes come so. The networks are the same; their code counted layers where
today's names say what a layer is: `input_blocks.5.1` is the transformer (1) of the second layer of the second
level down, `down_blocks.1.attentions.1`. Nothing is copied: the tensors stay in the one file, renamed.
"""
from torch import Tensor

PARTS = {"unet": "model.diffusion_model.", "vae": "first_stage_model.",
         "text_encoder": "cond_stage_model.transformer."}         # the text encoder's names are today's

# What lies among the networks' tensors without being theirs: leftovers of training. What begins like no network
# is not looked at: the noise schedule, the U-Net's running mean (EMA), LoRAs and embeddings merged long ago, …
# Releases that are made for drawing hold that mean in the U-Net's place.
IGNORED = ("loss.", "model_ema.", "text_projection", "logit_scale")
OTHERS = {"cond_stage_model.model.": "Stable Diffusion 2: give it as a folder in the diffusers layout",
          "conditioner.embedders.": "SDXL, which is not supported",
          "model.diffusion_model.joint_blocks.": "Stable Diffusion 3, which is not supported"}
CHANNELS = {8: "an InstructPix2Pix model, which is not supported",           # what the U-Net takes; SD v1: 4
            9: "an inpainting model, which is not supported"}
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"

UNET = {"time_embed.0.": "time_embedding.linear_1.", "time_embed.2.": "time_embedding.linear_2.",
        "input_blocks.0.0.": "conv_in.", "middle_block.0.": "mid_block.resnets.0.",
        "middle_block.1.": "mid_block.attentions.0.", "middle_block.2.": "mid_block.resnets.1.",
        "out.0.": "conv_norm_out.", "out.2.": "conv_out."}
VAE = {}
for i in range(4):                                                # levels: down from the finest, up to it
    UNET |= {f"input_blocks.{3 * i + 3}.0.op.": f"down_blocks.{i}.downsamplers.0.conv.",
             f"output_blocks.{3 * i + 2}.1.conv.": f"up_blocks.{i}.upsamplers.0.conv.",    # no attention
             f"output_blocks.{3 * i + 2}.2.conv.": f"up_blocks.{i}.upsamplers.0.conv."}    # behind it
    for j in range(3):                                            # layers; on the way down there are two
        UNET |= {f"input_blocks.{3 * i + j + 1}.0.": f"down_blocks.{i}.resnets.{j}.",
                 f"input_blocks.{3 * i + j + 1}.1.": f"down_blocks.{i}.attentions.{j}.",
                 f"output_blocks.{3 * i + j}.0.": f"up_blocks.{i}.resnets.{j}.",
                 f"output_blocks.{3 * i + j}.1.": f"up_blocks.{i}.attentions.{j}."}
        VAE |= {f"encoder.down.{i}.block.{j}.": f"encoder.down_blocks.{i}.resnets.{j}.",
                f"decoder.up.{i}.block.{j}.": f"decoder.up_blocks.{3 - i}.resnets.{j}."}     # finest is 0
    VAE |= {f"encoder.down.{i}.downsample.": f"encoder.down_blocks.{i}.downsamplers.0.",
            f"decoder.up.{i}.upsample.": f"decoder.up_blocks.{3 - i}.upsamplers.0."}
for half in ("encoder", "decoder"):
    VAE |= {f"{half}.mid.block_1.": f"{half}.mid_block.resnets.0.",
            f"{half}.mid.block_2.": f"{half}.mid_block.resnets.1.",
            f"{half}.mid.attn_1.": f"{half}.mid_block.attentions.0.",
            f"{half}.norm_out.": f"{half}.conv_norm_out."}
BEGINNINGS = {"unet": UNET, "vae": VAE, "text_encoder": {}}       # of keys, in the file: in a model folder
INSIDE = {                                                        # what they go on with
    "unet": {".in_layers.0.": ".norm1.", ".in_layers.2.": ".conv1.", ".emb_layers.1.": ".time_emb_proj.",
             ".out_layers.0.": ".norm2.", ".out_layers.3.": ".conv2.",
             ".skip_connection.": ".conv_shortcut."},
    "vae": {".nin_shortcut.": ".conv_shortcut.", ".norm.": ".group_norm.", ".q.": ".to_q.", ".k.": ".to_k.",
            ".v.": ".to_v.", ".proj_out.": ".to_out.0."},
    "text_encoder": {}}


def what_else(shapes: dict[str, list[int]]) -> str:
    """What a file with tensors of these shapes is if not SD v1, in a few words; "" if it is."""
    for prefix, name in OTHERS.items():
        if any(key.startswith(prefix) for key in shapes):
            return name
    absent = [prefix for prefix in PARTS.values() if not any(key.startswith(prefix) for key in shapes)]
    if absent:
        return f"not SD v1 in a single file: no key begins with {absent[0]}"
    return CHANNELS.get(shapes.get(CONV_IN, [0, 4])[1], "")


def part_of(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """One network's tensors ("unet", "vae" or "text_encoder") by the names that they have in a model folder.

    A file without any of the networks' prefixes holds a VAE alone, in the original names or in today's. An
    unknown key inside the network stays as it is, so that strict loading can complain.
    """
    prefix, found = PARTS[part], {}
    if part == "vae" and not any(key.startswith(tuple(PARTS.values())) for key in tensors):
        prefix = ""
    for key, tensor in tensors.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name.startswith(IGNORED):
            continue
        begin = max((old for old in BEGINNINGS[part] if name.startswith(old)), key=len, default="")
        name = BEGINNINGS[part].get(begin, "") + name.removeprefix(begin)
        for old, new in INSIDE[part].items():
            name = name.replace(old, new)
        if part == "vae" and ".attentions." in name and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]                           # a 1×1 convolution then, a matrix today
        found[name] = tensor
    return found
