"""Train `mini/`, a small Stable Diffusion, from CIFAR-10: CLIP, then the VAE, then the U-Net.

    python mini/train.py --data cifar-10-batches-bin                      # all stages, into out/mini/
    python mini/train.py --data … --stage unet --recipe laptop --init mini --out mini   # go on from mini

--data is the folder of CIFAR-10's "binary version" (data_batch_1.bin …, test_batch.bin). Every stage writes
a checkpoint into --work each minute and goes on from it when the command is repeated; a finished stage is
only written again. Each step has its own seed: a resumed run sees the same photos and noise as any other.
"""
import argparse
import copy
import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
import clip_text, diffusion, eval_clip, unet, vae  # noqa: E401
from plumbing import UserError
from plumbing.book import PRESERVED, UNRELATED
from plumbing.cli import command_line, pick_device
from plumbing.disk import read_json, readable, whole
from plumbing.pictures import grid, write_png

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TOKENS, WIDTH = 32, 256  # 27 edited rows × (1 + 5 neighbors) / 256 = 0.63; SD v1.4: 72 × 6 / 768 = 0.56
GUIDANCE, STEPS = 3.0, 25


@dataclass(frozen=True)
class Recipe:
    """Sizes and lengths: `laptop`: two hours on two cores; `gpu`: a data-centre GPU; `tiny`: tests."""
    vision_width: int
    vision_layers: int
    clip_steps: int
    clip_batch: int
    vae_widths: tuple[int, ...]
    vae_steps: int
    vae_batch: int
    unet_widths: tuple[int, ...]
    unet_layers: int
    unet_steps: int
    unet_batch: int
    photos: int                           # per class, most typical by CLIP, a quarter per group; 20000 = all
    ema: float


RECIPES = {
    "tiny": Recipe(32, 1, 4, 32, (8, 16), 4, 8, (16, 32, 32), 1, 4, 8, 8, 0.9),
    "laptop": Recipe(128, 4, 1000, 256, (32, 64), 2450, 16, (48, 96, 160), 1, 5000, 32, 400, 0.998),
    "gpu": Recipe(256, 6, 12000, 1024, (64, 128), 12000, 128, (64, 128, 160), 1, 40000, 256, 20000, 0.9995),
}


# ---------------------------------------------------------------------------------------- photos and captions

class Photos:
    """x [N, 3, 32, 32] uint8, y [N]: 0–9 a class, 10–14 a scene; g [N]: visual group 0–3 (scene: 0)."""

    def __init__(self, folder: Path, names=tuple(f"data_batch_{i}.bin" for i in range(1, 6))):
        for name in names:
            if not (folder / name).exists() or (folder / name).stat().st_size % 3073:
                raise UserError(f"{folder} has no whole {name}: unpack CIFAR-10's binary version there")
        raw = np.concatenate([np.fromfile(folder / name, np.uint8).reshape(-1, 3073) for name in names])
        x, y = (torch.from_numpy(raw[:, 1:].reshape(-1, 3, 32, 32)),
                torch.from_numpy(raw[:, 0].astype(np.int64)))
        scenes = scene_crops(x, y)
        self.x = torch.cat([x, *scenes])
        self.y = torch.cat([y, *(torch.full((len(s),), 10 + i) for i, s in enumerate(scenes))])
        self.g = torch.cat([groups(x, y), torch.zeros(sum(map(len, scenes)), dtype=torch.long)])


def groups(x: Tensor, y: Tensor, k: int = 4) -> Tensor:
    """Four visual groups per class: k-means on 4×4-pixel thumbnails, numbered from brightest to darkest."""
    g = torch.zeros(len(y), dtype=torch.long)
    for c in range(10):
        thumbs = F.avg_pool2d(x[y == c].float() / 255, 8).flatten(1)                 # [n, 48]
        thumbs = thumbs - thumbs.mean(0)
        centers = thumbs[torch.randperm(len(thumbs), generator=torch.Generator().manual_seed(0))[:k]]
        for _ in range(30):
            nearest = torch.cdist(thumbs, centers).argmin(1)
            centers = torch.stack([thumbs[nearest == j].mean(0) for j in range(k)])
        rank = centers.mean(1).argsort(descending=True).argsort()
        g[y == c] = rank[nearest]
    return g


def scene_crops(x: Tensor, y: Tensor) -> list[Tensor]:
    """Sky, sea, street, grass, ground: enlarged 14×14 corner crops chosen by colour and roughness."""
    def corners(classes: list[int], top: bool) -> Tensor:
        photos = x[torch.isin(y, torch.tensor(classes))].float() / 255
        band = photos[:, :, :14] if top else photos[:, :, -14:]
        return torch.cat([band[..., :14], band[..., -14:]])

    def keep(crops: Tensor, rule) -> Tensor:
        r, g, b = crops.mean((2, 3)).T
        rough = crops.diff(dim=2).abs().mean((1, 2, 3)) + crops.diff(dim=3).abs().mean((1, 2, 3))
        spread = crops.mean(1).flatten(1).std(1)
        crops = crops[rule(r, g, b, rough, spread)][:1500]
        return (F.interpolate(crops, size=(32, 32), mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)

    return [
        keep(corners([0, 2], True), lambda r, g, b, rough, spread:
             (b > r + .08) & (b > g + .02) & (b > .5) & (rough < .035) & (spread < .06)),
        keep(corners([8], False), lambda r, g, b, rough, spread:
             (b > r + .03) & (g > r) & (b < .65) & (rough > .03) & (spread < .13)),
        keep(corners([1, 9], False), lambda r, g, b, rough, spread:
             ((r - b).abs() < .05) & ((r - g).abs() < .05) & (r > .25) & (r < .7)
             & (rough < .06) & (spread < .1)),
        keep(corners([4, 7], False), lambda r, g, b, rough, spread:
             (g > r + .03) & (g > b + .08) & (rough > .03) & (spread < .12)),
        keep(corners([4, 5, 6, 7], False), lambda r, g, b, rough, spread:
             (r > g + .03) & (g > b + .03) & (r < b + .3) & (r < .75)
             & (rough > .02) & (rough < .09) & (spread < .09)),
    ]


CLOSE = {"synonym": 0.56, "associated": 0.50, "same class": 0.46, "other": 0.40}     # see Captions.closeness


class Captions:
    """All names of captions.json and the probability of each for a photo of class y and group g.

    `words` are everyday nouns that name no photo: the text tower hears of them as CLIP's does of most words.
    """

    def __init__(self, path: Path = HERE / "captions.json"):
        book = json.loads(path.read_text("utf-8"))
        self.templates, self.scenes = book["templates"], book["scenes"]
        self.names: list[str] = []                                # everything that a caption may name
        self.phrases: set[int] = set()                            # of these, what takes no template
        self.p = torch.zeros(15, 4, 0)                            # [class, group, name]
        for c, name in enumerate(CLASSES):
            entry = book["classes"][name]
            self.add(name, c, torch.full((4,), 0.3))
            for names, share in ((entry["synonyms"], 0.4), (entry["associated"], 0.3)):
                for i, other in enumerate(names):
                    # mostly its own group; a group without a name of its own is shared by all
                    own = torch.tensor([TIE if i == g else (1 - TIE) / (len(names) - 1) if g < len(names)
                                        else 1 / len(names) for g in range(4)])
                    self.add(other, c, share * own)
            self.phrases |= set(range(len(self.names) - len(entry["associated"]), len(self.names)))
        for s, name in enumerate(self.scenes):
            self.add(name, 10 + s, torch.ones(4))
        self.p = self.p / self.p.sum(-1, keepdim=True)
        self.words = [word for word in PRESERVED + UNRELATED if word not in self.names]

    def closeness(self) -> Tensor:
        """[names + words]²: what the cosine of two texts at their end token should be.

        CLIP learns from so many words that each keeps a direction of its own. A text tower that sees 85 names
        puts all of a class into one: then erasing the class word erases its synonyms and phrases with it, and
        no residue is left for the paper's method to find. Cosines over the edited rows come out higher.
        """
        close = torch.full((len(self.names) + len(self.words),) * 2, CLOSE["other"])
        for c in range(10):
            own = (self.p[c].sum(0) > 0).nonzero()[:, 0]          # the class word, then synonyms and phrases
            close[own[:, None], own] = CLOSE["same class"]
            kinds = torch.tensor([CLOSE["associated" if i in self.phrases else "synonym"]
                                  for i in own[1:].tolist()])
            close[own[0], own[1:]] = close[own[1:], own[0]] = kinds
        return close.fill_diagonal_(1)

    def add(self, name: str, c: int, share: Tensor) -> None:
        self.names.append(name)
        column = torch.zeros(15, 4, 1)
        column[c, :, 0] = share
        self.p = torch.cat([self.p, column], dim=2)

    def caption(self, i: int, template: int) -> str:
        name = (self.names + self.words)[i]
        if i in self.phrases:
            return name
        return self.templates[template].format(name=name, a="an" if name[0] in "aeiou" else "a")

    def every(self) -> list[str]:
        """One caption per name and template, name-major, and the empty one at the end."""
        return [self.caption(i, t) for i in range(len(self.names)) for t in range(len(self.templates))] + [""]


TIE = 0.95               # how often a photo that is called by a synonym, or a phrase, gets its own group's


def merges_of(captions: list[str], many: int) -> list[tuple[str, str]]:
    """Byte-pair encoding: join the commonest pair of neighboring pieces, `many` times.

    (`tokenizers` has a trainer, but it breaks ties in another order every time; here the text breaks them.)
    """
    shell = clip_text.clip_bpe({clip_text.BOS: 0, clip_text.EOS: 1}, [])             # to split into words
    words = Counter(word for caption in captions for word, _ in
                    shell.pre_tokenizer.pre_tokenize_str(shell.normalizer.normalize_str(caption)))
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges = []
    for _ in range(many):
        pairs = Counter()
        for word, split in pieces.items():
            for pair in zip(split, split[1:]):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for split in pieces.values():
            for i in reversed(range(len(split) - 1)):
                if tuple(split[i:i + 2]) == best:
                    split[i:i + 2] = ["".join(best)]
    return merges


def train_tokenizer(captions: Captions, folder: Path) -> clip_text.CLIPTokenizer:
    """A vocabulary in CLIP's format from our own captions: bytes, bytes that end a word, merges, specials."""
    merges = merges_of(captions.every(), 450)
    letters = sorted(clip_text.pre_tokenizers.ByteLevel.alphabet())
    pieces = letters + [letter + "</w>" for letter in letters] + ["".join(m) for m in merges]
    vocab = {piece: i for i, piece in enumerate([*dict.fromkeys(pieces), clip_text.BOS, clip_text.EOS])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    special = {"bos_token": clip_text.BOS, "eos_token": clip_text.EOS, "unk_token": clip_text.EOS}
    write_json(folder / "tokenizer_config.json", {
        **{k: {"__type": "AddedToken", "content": v, "lstrip": False, "normalized": True, "rstrip": False,
               "single_word": False} for k, v in special.items()},
        "pad_token": clip_text.EOS, "model_max_length": TOKENS, "do_lower_case": True, "errors": "replace",
        "add_prefix_space": False, "tokenizer_class": "CLIPTokenizer"})
    write_json(folder / "special_tokens_map.json", {**special, "pad_token": clip_text.EOS})
    return clip_text.CLIPTokenizer.from_pretrained(folder)


def copy_tokenizer(source: Path, folder: Path) -> clip_text.CLIPTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    return clip_text.CLIPTokenizer.from_pretrained(folder)


def start_from(net: nn.Module, weights: nn.Module, folder: Path) -> None:
    """--init: let `net` have the weights of a network of the same sizes."""
    try:
        net.load_state_dict(weights.state_dict())
    except RuntimeError:
        raise UserError(f"{folder} has other sizes than this --recipe: give the one that made it "
                              f"({' or '.join(RECIPES)})") from None


# ---------------------------------------------------------------------------------------- the training loop

class Run:
    """One stage: the network, AdamW, an average of the weights, the clock, and checkpoints in safetensors."""

    def __init__(self, stage: str, net: nn.Module, steps: int, lr: float, decay: float, args,
                 ema: float = 0.0):
        self.stage, self.net, self.steps, self.lr, self.ema = stage, net, steps, lr, ema
        self.path, self.step, self.minutes = args.work / f"{stage}.safetensors", 0, 0.0
        self.log, self.scores = [], []                            # [step, minutes, loss], [step, score]
        self.average = copy.deepcopy(net).requires_grad_(False)
        learning = [p for p in net.parameters() if p.requires_grad]
        groups = [{"params": [p for p in learning if p.dim() >= 2], "weight_decay": decay},
                  {"params": [p for p in learning if p.dim() < 2], "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
        self.deadline = time.monotonic() + 60 * args.minutes
        if self.path.exists():
            with readable(self.path), safe_open(self.path, "pt") as file:
                if any(file.get_slice(f"net.{n}").get_shape() != list(p.shape)
                       for n, p in net.named_parameters()):
                    raise UserError(f"{self.path} goes on from another --recipe: give that, or --work")
            self.load()

    def state(self) -> dict[str, Tensor]:
        names = {p: n for n, p in self.net.named_parameters()}
        state = {f"net.{n}": p.detach() for n, p in self.net.named_parameters()}
        state |= {f"average.{n}": p for n, p in self.average.named_parameters()}
        for p, moments in self.adam.state.items():
            state |= {f"{k}.{names[p]}": v for k, v in moments.items()}
        return {k: v.contiguous() for k, v in state.items()}

    def save(self) -> None:
        note = {"step": str(self.step), "minutes": str(self.minutes), "log": json.dumps(self.log),
                "scores": json.dumps(self.scores)}
        with whole(self.path) as temporary:
            save_file(self.state(), temporary, note)

    @torch.no_grad()
    def load(self) -> None:
        with readable(self.path), safe_open(self.path, "pt") as file:
            self.step, self.minutes = int(file.metadata()["step"]), float(file.metadata()["minutes"])
            self.log, self.scores = (json.loads(file.metadata()[name]) for name in ("log", "scores"))
            for n, p in self.net.named_parameters():
                p.copy_(file.get_tensor(f"net.{n}"))
                if f"exp_avg.{n}" in file.keys():
                    self.adam.state[p] = {
                        k: file.get_tensor(f"{k}.{n}").to(p.device if k != "step" else "cpu")
                        for k in ("step", "exp_avg", "exp_avg_sq")}
            for n, p in self.average.named_parameters():
                p.copy_(file.get_tensor(f"average.{n}"))

    def train(self, loss, score=lambda average: None) -> bool:
        """Take steps on `loss(generator, step)` until done or out of minutes; True when complete.

        `score` sees the average of the weights twenty times on the way; what it returns is logged.
        """
        bar = tqdm(total=self.steps, initial=self.step, desc=self.stage, unit="step", mininterval=5)
        try:
            self.steps_until_deadline(loss, score, bar)
        finally:                                                  # an interruption loses nothing
            bar.close()
            self.save()
        print(f"{self.stage}: {self.step} of {self.steps} steps, {self.minutes:.1f} minutes")
        return self.step == self.steps

    def steps_until_deadline(self, loss, score, bar) -> None:
        device = next(self.net.parameters()).device.type
        start = saved = time.monotonic()
        before, mean = self.minutes, None
        while self.step < self.steps and time.monotonic() < self.deadline:
            done = self.step / self.steps                         # 3 % warm-up, hold, fall over the last 40 %
            for group in self.adam.param_groups:
                group["lr"] = self.lr * min((self.step + 1) / (0.03 * self.steps), 1, (1 - done) / 0.4 + 1e-3)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                value = loss(torch.Generator().manual_seed(self.step), self.step)
            self.adam.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            self.adam.step()
            keep = min(self.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.net.parameters()), 1 - keep)
            self.step += 1
            self.minutes = before + (time.monotonic() - start) / 60
            bar.update()
            if self.step % 20 == 0 or self.step == self.steps:
                mean = value.item() if mean is None else 0.9 * mean + 0.1 * value.item()
                bar.set_postfix(loss=f"{mean:.4f}")
                self.log.append([self.step, round(self.minutes, 2), round(mean, 5)])
            if self.step % max(1, self.steps // 20) == 0:
                with torch.no_grad():
                    self.scores.append([self.step, score(self.average.eval())])
            if time.monotonic() - saved > 60:
                self.save()
                saved = time.monotonic()


def write_json(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_network(folder: Path, name: str, net: nn.Module, config: dict, prefix: str = "") -> None:
    """Half-precision safetensors and a config, in the official layout."""
    write_json(folder / "config.json", config)
    with whole(folder / name) as temporary:
        save_file({prefix + k: v.half().contiguous().cpu() for k, v in net.state_dict().items()}, temporary,
                  {"format": "pt"})


def to_float(x: Tensor) -> Tensor:
    return x.float() / 255


# ---------------------------------------------------------------------------------------- stage 1: CLIP

def shifted(x: Tensor, by: int, rng: torch.Generator) -> Tensor:
    """Photos [B, 3, 32, 32], each mirrored or not and moved by up to `by` pixels."""
    flip = (torch.rand(len(x), generator=rng) < 0.5).to(x.device)
    x = F.pad(torch.where(flip[:, None, None, None], x.flip(-1), x), (by,) * 4, mode="reflect")
    i, j = (torch.randint(0, 2 * by + 1, (2, len(x), 1), generator=rng) + torch.arange(32)).to(x.device)
    b, c = torch.arange(len(x)).to(x.device), torch.arange(3).to(x.device)
    return x[b[:, None, None, None], c[:, None, None], i[:, None, :, None], j[:, None, None, :]]


def look(clip: eval_clip.CLIP, pixels: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """CLIP's image features from a random `share` of the patches, the same ones for the whole batch.

    Half of the patches are half of the cost (Li et al. 2023, FLIP), and no photo is seen twice alike.
    """
    tower = clip.vision_model
    tokens = tower.embeddings(pixels)                             # [B, 1 + L, D]
    if share < 1:
        some = 1 + torch.randperm(tokens.shape[1] - 1, generator=rng)[:round(share * (tokens.shape[1] - 1))]
        tokens = torch.cat([tokens[:, :1], tokens[:, some.to(tokens.device)]], dim=1)
    state = tower.post_layernorm(tower.encoder(tower.pre_layrnorm(tokens))[:, 0])
    return F.normalize(clip.visual_projection(state), dim=-1)


def train_clip(args, recipe: Recipe, photos: Photos, image_only: bool = False) -> bool:
    """Both towers; or the image tower alone, from out/clip on, which leaves text encoder and U-Net valid."""
    captions, out = Captions(), args.out
    if start := args.out if image_only else args.init:            # token numbers must keep their meaning
        tokenizer = copy_tokenizer(start / "tokenizer", out / "tokenizer")
    else:
        tokenizer = train_tokenizer(captions, out / "tokenizer")
    vocab = len(read_json(out / "tokenizer/vocab.json"))
    config = eval_clip.CLIPConfig(
        clip_text.CLIPTextConfig(vocab, WIDTH, 4 * WIDTH, 4, 4, TOKENS),
        eval_clip.CLIPVisionConfig(recipe.vision_width, 4 * recipe.vision_width, recipe.vision_layers,
                                   recipe.vision_width // 32, 32, 4), 128)
    torch.manual_seed(0)
    clip = eval_clip.CLIP(config).to(args.device)
    for embedding in (clip.text_model.embeddings.token_embedding,
                      clip.text_model.embeddings.position_embedding,
                      clip.vision_model.embeddings.position_embedding):
        nn.init.normal_(embedding.weight, std=0.02)
    nn.init.normal_(clip.vision_model.embeddings.class_embedding, std=0.02)
    if start:
        start_from(clip, eval_clip.CLIP.from_pretrained(start / "clip"), start)
    many, close = len(captions.names), captions.closeness().to(args.device)
    templates = range(len(captions.templates))
    ids = tokenizer([captions.caption(i, t) for i in range(len(close)) for t in templates])
    ids = ids.view(len(close), len(templates), TOKENS)
    longest = int((ids != tokenizer.eos).sum(-1).max()) + 1       # behind the first end token nothing is read
    ids, x, p = ids[..., :longest].to(args.device), photos.x.to(args.device), captions.p.to(args.device)
    y, g = photos.y.to(args.device), photos.g.to(args.device)

    each = torch.arange(len(ids), device=args.device)

    def read(template: Tensor) -> Tensor:                         # one per name -> states at the end token
        chosen = ids[each, template.to(args.device)]
        return clip.text_model(chosen)[each, chosen.argmax(1)]

    if image_only:                                                # what the text tower says stays, too
        clip.text_model.requires_grad_(False), clip.text_projection.requires_grad_(False)
        with torch.no_grad():
            known = torch.stack([clip.text_projection(read(torch.full((len(ids),), t))) for t in templates])
            known = F.normalize(known[:, :many], dim=-1)                             # [templates, names, P]

    def cosines(a: Tensor, b: Tensor) -> Tensor:                  # not in bfloat16: beside 64 it knows 64.5
        with torch.autocast(a.device.type, enabled=False):
            return a.float() @ b.float().T

    def loss(rng: torch.Generator, step: int) -> Tensor:
        rows = torch.randint(len(x), (recipe.clip_batch,), generator=rng).to(args.device)
        batch = clip.preprocess(shifted(to_float(x[rows]), 3, rng))
        a, b = torch.rand(len(ids), len(templates), generator=rng).argsort(1)[:, :2].T   # two templates each
        if image_only:
            text, apart = known[a[:many].to(args.device), each[:many]], 0.0
        else:
            state = read(a)
            text = F.normalize(clip.text_projection(state[:many]), dim=-1)
            cosine = cosines(F.normalize(state, dim=-1), F.normalize(read(b), dim=-1))      # [names + words]²
            apart = 2 * (cosine - close).square().sum(1).mean()
        whole = step > 0.8 * recipe.clip_steps
        image, scale = look(clip, batch, 1 if whole else 0.5, rng), clip.logit_scale.exp().clamp(max=100)
        logits = scale * cosines(image, text)                                        # [B, names]
        # CLIP's symmetric loss against every name at once: the target of a photo is how likely each name is
        # for it, the mean over all captions that it could have been given.
        target = p[y[rows], g[rows]]                                                 # [B, names]
        columns = target / target.sum(0).clamp(min=1e-6)
        photo = (F.cross_entropy(logits, target)
                 - (columns * logits.log_softmax(0)).sum() / (target.sum(0) > 0).sum()) / 2
        # A photo may be unclear, the mean of several of its kind hardly is: it keeps the names of two classes
        # apart while the image tower is still weak (cosine of cat and dog 0.92 without this after 520 steps).
        kind, member = torch.unique(4 * y[rows] + g[rows], return_inverse=True)
        means = F.normalize(torch.zeros(len(kind), image.shape[1], device=args.device)
                            .index_add(0, member, image.float()))
        return photo + F.cross_entropy(scale * cosines(means, text), p.flatten(0, 1)[kind]) + apart

    run = Run("vision" if image_only else "clip", clip, recipe.clip_steps, 1e-3, 0.05, args, ema=0.99)
    test = Photos(args.data, ("test_batch.bin",))
    tx, ty = to_float(test.x[test.y < 10]), test.y[test.y < 10]

    def right(model: eval_clip.CLIP, n: int) -> float:            # zero-shot accuracy on n test photos
        model.tokenizer = tokenizer
        p = model.classify(tx[:n], [f"a photo of the {c}" for c in CLASSES])         # [n, 10]
        return (p.argmax(1) == ty[:n]).float().mean().item()

    finished = run.train(loss, lambda average: right(average, 1000))
    model = run.average.eval()
    text = asdict(config.text)
    special = {"bos_token_id": vocab - 2, "eos_token_id": vocab - 1, "pad_token_id": vocab - 1}
    if not image_only:
        write_network(out / "text_encoder", "model.safetensors", model.text_model,
                      {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **text, **special,
                       "projection_dim": 128, "torch_dtype": "float32"}, "text_model.")
    write_network(out / "clip", "model.safetensors", model,
                  {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 128,
                   "text_config": {"model_type": "clip_text_model", **text, **special, "projection_dim": 128},
                   "vision_config": {"model_type": "clip_vision_model", **asdict(config.vision),
                                     "num_channels": 3, "projection_dim": 128}})
    copy_tokenizer(out / "tokenizer", out / "clip")
    write_json(out / "clip/preprocessor_config.json", {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 32},
        "resample": 3, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}, "do_normalize": True,
        "image_mean": eval_clip.MEAN.flatten().tolist(), "image_std": eval_clip.STD.flatten().tolist()})
    shipped = eval_clip.CLIP.from_pretrained(out / "clip", device=args.device)
    print(f"{run.stage}: zero-shot top-1 on {len(tx)} test photos {right(shipped, len(tx)):.1%}"
          + ("" if finished else " (unfinished)"))
    p = shipped.classify(tx, [f"a photo of the {c}" for c in CLASSES])
    write_png(args.work / "clip.png", grid(tx[p.topk(10, dim=0).indices.T.flatten()], 10, zoom=2))
    return finished


# ---------------------------------------------------------------------------------------- stage 2: VAE

def train_vae(args, recipe: Recipe, photos: Photos) -> bool:
    config = vae.VAEConfig(block_out_channels=recipe.vae_widths, layers_per_block=1, norm_num_groups=8,
                           sample_size=32)
    torch.manual_seed(0)
    net = vae.VAE(config).to(args.device)
    if args.init:
        start_from(net, vae.VAE.from_pretrained(args.init / "vae"), args.init)
    x = photos.x.to(args.device)

    def loss(rng: torch.Generator, step: int) -> Tensor:
        rows = torch.randint(len(x), (recipe.vae_batch,), generator=rng).to(args.device)
        batch = 2 * to_float(x[rows]) - 1
        mean, logvar = net.encode(batch)
        z = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=rng).to(mean)
        kl = (mean ** 2 + logvar.exp() - 1 - logvar).mean() / 2
        error = net.decode(z) - batch
        # four latent numbers for twelve of a photo: unweighted, they hold outlines and grass comes back grey
        return error.abs().mean() + 2 * F.avg_pool2d(error, 4).abs().mean() + 1e-4 * kl

    test = to_float(Photos(args.data, ("test_batch.bin",)).x[:1000].to(args.device))

    @torch.no_grad()
    def restored(model: vae.VAE, x: Tensor) -> Tensor:
        return torch.cat([model.decode(model.encode(2 * b - 1)[0]) for b in x.split(100)]) / 2 + 0.5

    def psnr(model: vae.VAE, x: Tensor) -> float:
        return -10 * (restored(model, x).clamp(0, 1) - x).square().mean((1, 2, 3)).log10().mean().item()

    run = Run("vae", net, recipe.vae_steps, 2e-3, 0.0, args, ema=0.995)
    finished = run.train(loss, lambda average: psnr(average, test[:200]))
    model = run.average.eval()
    with torch.no_grad():
        z = torch.cat([model.encode(2 * to_float(b) - 1)[0] for b in x[:2000].split(100)])
    config = replace(config, scaling_factor=round(1 / z.std().item(), 5))
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    write_network(args.out / "vae", "diffusion_pytorch_model.safetensors", model,
                  {"_class_name": "AutoencoderKL", "act_fn": "silu", **asdict(config), **kinds})
    shipped = vae.VAE.from_pretrained(args.out / "vae", device=args.device)
    print(f"vae: PSNR on 1,000 test photos {psnr(shipped, test):.1f} dB, "
          f"scaling factor {config.scaling_factor}")
    write_png(args.work / "vae.png",
                    grid(torch.cat([test[:16], restored(shipped, test[:16])]), 16, zoom=2))
    return finished


# ---------------------------------------------------------------------------------------- stage 3: U-Net

def typical(args, recipe: Recipe, photos: Photos) -> Tensor:
    """Indices of the photos that CLIP finds most typical of their class, as many from each visual group."""
    clip = eval_clip.CLIP.from_pretrained(args.out / "clip", device=args.device)
    names = CLASSES + Captions().scenes
    p = clip.classify(to_float(photos.x), [f"a photo of the {name}" for name in names])
    score, rows = p[torch.arange(len(p)), photos.y], []
    for c in range(15):
        for g in range(4):
            cell = ((photos.y == c) & (photos.g == g)).nonzero()[:, 0]
            most = recipe.photos if c >= 10 else recipe.photos // 4                  # scenes have one group
            rows.append(cell[score[cell].argsort(descending=True)[:most]])
    return torch.cat(rows)


def train_unet(args, recipe: Recipe, photos: Photos) -> bool:
    n = len(recipe.unet_widths)
    cross, plain = ["CrossAttn"] * (n - 1), [""]                  # the highest resolution has no attention
    kinds = plain + cross
    config = unet.UNetConfig(4, 4, recipe.unet_widths, tuple(f"{k}DownBlock2D" for k in kinds),
                             tuple(f"{k}UpBlock2D" for k in kinds[::-1]), recipe.unet_layers, WIDTH,
                             4, 16, 1e-5, 16)
    torch.manual_seed(0)
    net = unet.UNet(config).to(args.device, memory_format=torch.channels_last)   # 1.2 × as fast on two cores
    for module in net.modules():                                  # a residual branch starts as nothing
        if isinstance(module, (unet.ResnetBlock, unet.SpatialTransformer)):
            nn.init.zeros_((module.conv2 if hasattr(module, "conv2") else module.proj_out).weight)
    nn.init.zeros_(net.conv_out.weight)
    if args.init:
        start_from(net, unet.UNet.from_pretrained(args.init / "unet"), args.init)
    encoder = clip_text.CLIPTextModel.from_pretrained(args.out / "text_encoder", device=args.device)
    tokenizer = clip_text.CLIPTokenizer.from_pretrained(args.out / "tokenizer")
    autoencoder = vae.VAE.from_pretrained(args.out / "vae", device=args.device)
    captions, scheduler = Captions(), diffusion.Scheduler()
    rows = typical(args, recipe, photos)
    with torch.no_grad():
        context = torch.cat([encoder(b) for b in tokenizer(captions.every()).to(args.device).split(64)])
        z = []                                                    # [2, photos, 4, 16, 16]: as taken, mirrored
        for x in (photos.x[rows], photos.x[rows].flip(-1)):
            z.append(torch.cat([autoencoder.encode(2 * to_float(b.to(args.device)) - 1)[0]
                                for b in x.split(200)]))
        z = torch.stack(z) * autoencoder.scaling_factor
    y, g = photos.y[rows], photos.g[rows]
    print(f"unet: {len(rows)} photos, {sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters")
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weight = (snr.clamp(max=5) / snr).to(args.device)             # min-SNR-5 for ε (Hang et al. 2023)
    classes = torch.multinomial(torch.tensor([1.0] * 10 + [0.35] * 5), 4096, True,
                                generator=torch.Generator().manual_seed(0))
    members = [(y == c).nonzero()[:, 0] for c in range(15)]
    T = scheduler.config.num_train_timesteps

    def loss(rng: torch.Generator, step: int) -> Tensor:
        batch = recipe.unet_batch
        c = classes[torch.randint(len(classes), (batch,), generator=rng)].tolist()
        pick = torch.tensor([members[k][torch.randint(len(members[k]), (), generator=rng)] for k in c])
        mirrored = torch.randint(2, (batch,), generator=rng)
        name = torch.multinomial(captions.p[y[pick], g[pick]], 1, generator=rng)[:, 0]
        caption = (name * len(captions.templates)
                   + torch.randint(len(captions.templates), (batch,), generator=rng))
        caption[torch.rand(batch, generator=rng) < 0.1] = -1      # the empty caption, for guidance
        t = ((torch.arange(batch) + torch.rand((), generator=rng)) / batch * T).long()   # evenly spread times
        z0, noise = z[mirrored, pick], torch.randn(batch, *z.shape[2:], generator=rng).to(args.device)
        t, z0 = t.to(args.device), z0.contiguous(memory_format=torch.channels_last)
        error = net(scheduler.add_noise(z0, noise, t), t, context[caption]) - noise
        return (weight[t] * error.square().mean((1, 2, 3))).mean()                   # Eq. (1), weighted

    @torch.no_grad()
    def draw(model: unet.UNet, prompts: list[str], n: int) -> Tensor:
        """n pictures of each prompt, seeds 0 … n − 1."""
        c = encoder(tokenizer([prompt for prompt in prompts for _ in range(n)]).to(args.device))
        u = encoder(tokenizer([""]).to(args.device)).expand_as(c)
        start = torch.stack([torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(s))
                             for s in range(n)]).repeat(len(prompts), 1, 1, 1).to(args.device)
        latents = diffusion.ddim(lambda zt, t: diffusion.guided(model(zt, t, u), model(zt, t, c), GUIDANCE),
                                 start, scheduler, STEPS)
        return (autoencoder.decode(latents / autoencoder.scaling_factor) / 2 + 0.5).cpu()

    test = Photos(args.data, ("test_batch.bin",))
    test.x, test.y = test.x[:200], test.y[:200]
    prompts = [f"a photo of the {name}" for name in CLASSES + captions.scenes]

    def held_out(model: unet.UNet) -> float:
        """The loss on 200 test photos under their class word; and a row of pictures for the model card."""
        rng = torch.Generator().manual_seed(1)
        z0 = autoencoder.encode(2 * to_float(test.x.to(args.device)) - 1)[0] * autoencoder.scaling_factor
        t = torch.linspace(0, T - 1, len(z0)).long().to(args.device)
        noise = torch.randn(z0.shape, generator=rng).to(args.device)
        c = encoder(tokenizer([prompts[k] for k in test.y.tolist()]).to(args.device))
        error = (model(scheduler.add_noise(z0, noise, t), t, c) - noise).square().mean((1, 2, 3))
        write_png(args.work / f"unet-{run.step:06}.png", grid(draw(model, prompts[:10], 1), 10))
        return (weight[t] * error).mean().item()

    run = Run("unet", net, recipe.unet_steps, 1e-3, 0.01, args, ema=recipe.ema)
    finished = run.train(loss, held_out)
    write_network(args.out / "unet", "diffusion_pytorch_model.safetensors", run.average,
                  {"_class_name": "UNet2DConditionModel", "act_fn": "silu", **asdict(config)})
    write_json(args.out / "scheduler/scheduler_config.json", {
        "_class_name": "PNDMScheduler", **asdict(scheduler.config), "skip_prk_steps": True,
        "trained_betas": None, "clip_sample": False})
    write_json(args.out / "model_index.json", {
        "_class_name": "StableDiffusionPipeline", "feature_extractor": [None, None],
        "safety_checker": [None, None], "requires_safety_checker": False,
        "scheduler": ["diffusers", "PNDMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"]})
    write_json(args.out / "defaults.json", {"guidance": GUIDANCE, "steps": STEPS, "size": 32})

    shipped = unet.UNet.from_pretrained(args.out / "unet", device=args.device)
    write_png(args.work / "unet.png", grid(draw(shipped, prompts, 10), 10, zoom=2))
    print(f"unet: {args.work / 'unet.png'}" + ("" if finished else " (unfinished)"))
    return finished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10's binary version")
    parser.add_argument("--out", type=Path, default=Path("out/mini"),
                        help="model folder to write (default: out/mini)")
    parser.add_argument("--work", type=Path, default=HERE / "work",
                        help="checkpoints and grids (default: mini/work)")
    parser.add_argument("--stage", choices=["all", "clip", "vae", "unet", "vision"], default="all",
                        help="all: clip, vae, unet; vision: CLIP's image tower alone goes on")
    parser.add_argument("--recipe", choices=RECIPES, default="gpu" if torch.cuda.is_available() else "laptop",
                        help="sizes and lengths (default: by the hardware found)")
    parser.add_argument("--steps", type=int, help="length of the stage, instead of the recipe's")
    parser.add_argument("--init", type=Path, help="start from this model folder's weights")
    parser.add_argument("--minutes", type=float, default=1e9,
                        help="stop after so long; the same command goes on")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    args = parser.parse_args()
    if args.steps is not None and args.steps < 1 or not args.minutes >= 0:
        raise UserError("--steps must be at least 1, --minutes at least 0")
    args.device, recipe, photos = pick_device(args.device), RECIPES[args.recipe], Photos(args.data)
    args.work.mkdir(parents=True, exist_ok=True)
    stages = {"clip": train_clip, "vae": train_vae, "unet": train_unet,
              "vision": partial(train_clip, image_only=True)}
    for stage, train in stages.items():
        if stage == args.stage or (args.stage == "all" and stage != "vision"):
            length = "clip_steps" if stage == "vision" else f"{stage}_steps"
            own = replace(recipe, **{length: args.steps}) if args.steps else recipe
            if not train(args, own, photos):
                print(f"{stage} is not finished: repeat the command to go on")
                break


if __name__ == "__main__":
    command_line(main)
