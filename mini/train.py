"""Train a `mini/`, a small Stable Diffusion: words, autoencoder, U-Net, and CLIP to judge it.

    python mini/train.py --data emoji --sentences all-MiniLM-L6-v2 --stage text # words: an hour
    python mini/train.py --data emoji --stage vae                               # pictures: three hours
    python mini/train.py --data emoji --stage unet                              # a day, in pieces
    python mini/train.py --data emoji --stage clip                              # the judge: forty minutes

--data is the folder that `render.mjs` makes, --sentences the folder of a sentence encoder in safetensors.
Every stage writes a checkpoint into --work each minute and goes on from it when the command is repeated. Each
step has its own seed: a resumed run sees the same pictures, captions and noise as an uninterrupted one.
"""
import argparse
import copy
import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
import clip_text, diffusion, eval_clip, unet, vae  # noqa: E401
from mini.emoji import SIZE, Book, Icons, compose
from mini.muon import Muon
from plumbing import UserError
from plumbing.cli import command_line, pick_device
from plumbing.disk import read_json, readable, whole
from plumbing.pictures import grid, write_png

TOKENS, WIDTH, PROJECTION = 32, 256, 128
GUIDANCE, STEPS = 3.0, 25
FLOOR, EMPTY_TEXT, PULL = 0.3, 0.45, 0.5                          # of the text space: see `closeness`


@dataclass(frozen=True)
class Recipe:
    """Sizes and lengths: `laptop`: two cores and patience; `tiny`: tests."""
    text_steps: int
    text_batch: int
    vae_widths: tuple[int, ...]
    vae_steps: int
    vae_batch: int
    unet_widths: tuple[int, ...]
    unet_steps: int
    unet_batch: int
    block: int                                                    # latents a block; see Latents
    vision_width: int
    vision_layers: int
    clip_steps: int
    clip_batch: int


RECIPES = {
    "tiny": Recipe(5, 16, (8, 16, 16), 5, 4, (16, 32, 32), 5, 8, 16, 32, 1, 5, 16),
    "laptop": Recipe(2400, 96, (32, 64, 96), 4500, 8, (64, 128, 192), 20_000, 32, 1000, 192, 6, 2000, 128),
}


# ---------------------------------------------------------------------------------------- the training loop

class Run:
    """One stage: the network, its optimizers, averages of its weights, the clock, and checkpoints.

    decays: one average of the weights for each; the first is the one that is used. muon: the modules whose
    matrices Muon trains; AdamW has the rest.
    """

    def __init__(self, stage: str, net: nn.Module, steps: int, lr: float, decay: float, args,
                 decays: tuple[float, ...] = (0.0,), muon: tuple[str, ...] = ()):
        self.stage, self.net, self.steps, self.lr, self.decays = stage, net, steps, lr, decays
        self.path, self.step, self.minutes = args.work / f"{stage}.safetensors", 0, 0.0
        self.log, self.scores = [], []                            # [step, minutes, loss], [step, score]
        self.averages = [copy.deepcopy(net).requires_grad_(False) for _ in decays]
        inner = {p for n, p in net.named_parameters() if muon and n.startswith(muon) and p.dim() >= 2}
        learning = [p for p in net.parameters() if p.requires_grad and p not in inner]
        groups = [{"params": [p for p in learning if p.dim() >= 2], "weight_decay": decay},
                  {"params": [p for p in learning if p.dim() < 2], "weight_decay": 0.0}]
        self.optimizers = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)]
        if inner:
            self.optimizers.append(Muon([p for p in net.parameters() if p in inner], lr))
        self.deadline = time.monotonic() + 60 * args.minutes
        if self.path.exists():
            with readable(self.path), safe_open(self.path, "pt") as file:
                if any(file.get_slice(f"net.{n}").get_shape() != list(p.shape)
                       for n, p in net.named_parameters()):
                    raise UserError(f"{self.path} goes on from another --recipe: give that, or --work")
            self.load()

    @property
    def average(self) -> nn.Module:
        return self.averages[0]

    def state(self) -> dict[str, Tensor]:
        names = {p: n for n, p in self.net.named_parameters()}
        state = {f"net.{n}": p.detach() for n, p in self.net.named_parameters()}
        for k, average in enumerate(self.averages):
            state |= {f"average{k}.{n}": p for n, p in average.named_parameters()}
        for optimizer in self.optimizers:
            for p, moments in optimizer.state.items():
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
            names, kept = {p: n for n, p in self.net.named_parameters()}, set(file.keys())
            for p, n in names.items():
                p.copy_(file.get_tensor(f"net.{n}"))
            for state, p in ((optimizer.state, p) for optimizer in self.optimizers
                             for group in optimizer.param_groups for p in group["params"]):
                for k in ("exp_avg", "exp_avg_sq", "step"):
                    if f"{k}.{names[p]}" in kept:                 # moments: as the parameter lies in memory
                        value = file.get_tensor(f"{k}.{names[p]}").to(p.device)
                        state[p][k] = value if k == "step" else torch.empty_like(p).copy_(value)
            for k, average in enumerate(self.averages):
                for n, p in average.named_parameters():
                    p.copy_(file.get_tensor(f"average{k}.{n}"))

    def train(self, loss, score=lambda average: None, scores: int = 20) -> bool:
        """Take steps on `loss(generator, step)` until done or out of minutes; True when complete.

        `score` sees the first average `scores` times on the way; what it returns is logged.
        """
        bar = tqdm(total=self.steps, initial=self.step, desc=self.stage, unit="step", mininterval=10)
        try:
            self.steps_until_deadline(loss, score, max(1, self.steps // scores), bar)
        finally:                                                  # an interruption loses nothing
            bar.close()
            self.save()
        print(f"{self.stage}: {self.step} of {self.steps} steps, {self.minutes:.1f} minutes")
        return self.step == self.steps

    def steps_until_deadline(self, loss, score, often: int, bar) -> None:
        device = next(self.net.parameters()).device.type
        start = saved = time.monotonic()
        before, mean = self.minutes, None
        while self.step < self.steps and time.monotonic() < self.deadline:
            done = self.step / self.steps                         # warm-up, hold, fall over the last 40 %
            warm = min(1000, 0.03 * self.steps)
            for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                group["lr"] = self.lr * min((self.step + 1) / warm, 1, (1 - done) / 0.4 + 1e-3)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                value = loss(torch.Generator().manual_seed(self.step), self.step)
            if not torch.isfinite(value):
                raise UserError(f"{self.stage}: the loss became {value.item()} at step {self.step}; "
                                      "the last checkpoint is whole")
            self.net.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.step += 1
            if self.step % 5 == 0:                                # five steps' share of an average at once
                with torch.no_grad():
                    for average, decay in zip(self.averages, self.decays):
                        keep = min(decay, self.step / (10 + self.step)) ** 5
                        torch._foreach_lerp_(list(average.parameters()), list(self.net.parameters()),
                                             1 - keep)
            self.minutes = before + (time.monotonic() - start) / 60
            bar.update()
            if self.step % 20 == 0 or self.step == self.steps:
                mean = value.item() if mean is None else 0.9 * mean + 0.1 * value.item()
                bar.set_postfix(loss=f"{mean:.4f}")
                self.log.append([self.step, round(self.minutes, 2), round(mean, 5)])
            if self.step % often == 0:
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


# ---------------------------------------------------------------------------------------- stage 1: words

def merges_of(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding: join the commonest pair of neighboring pieces until every word is one token.

    (`tokenizers` has a trainer, but it breaks ties in another order every time; here the text breaks them.)
    """
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges = []
    while pairs := Counter(pair for split in pieces.values() for pair in zip(split, split[1:])):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for split in pieces.values():
            for i in reversed(range(len(split) - 1)):
                if tuple(split[i:i + 2]) == best:
                    split[i:i + 2] = ["".join(best)]
    return merges


def words_of(book: Book) -> list[str]:
    """Every word that a caption may say, as CLIP's tokenizer splits them."""
    captions = [book.caption(name, t) for name in book.names + book.scenes + book.words for t in (0, 1)]
    captions += [book.caption(None, 0, place, style) for place in book.places.values()
                 for style in book.styles.values()] + book.templates
    shell = clip_text.clip_bpe({clip_text.BOS: 0, clip_text.EOS: 1}, [])             # to split into words
    return sorted({word for caption in captions for word, _ in
                   shell.pre_tokenizer.pre_tokenize_str(shell.normalizer.normalize_str(caption))})


def train_tokenizer(book: Book, folder: Path) -> clip_text.CLIPTokenizer:
    """A vocabulary in CLIP's format: bytes, bytes that end a word, merges, specials. Every word that a
    caption may say is one token."""
    words = words_of(book)
    merges = merges_of(words)
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


def copy_tokenizer(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes((source / name).read_bytes())


@torch.no_grad()
def sentence_vectors(folder: Path, texts: list[str]) -> Tensor:
    """A public sentence encoder's unit vectors [N, d]: the mean of its last states, all-MiniLM's recipe."""
    from transformers import AutoModel, AutoTokenizer             # development only
    tokenizer, net = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order, rows = sorted(range(len(texts)), key=lambda i: len(texts[i])), {}
    for some in tqdm([order[i:i + 256] for i in range(0, len(order), 256)], desc="sentences"):
        batch = tokenizer([texts[i] for i in some], padding=True, truncation=True, return_tensors="pt")
        state, mask = net(**batch).last_hidden_state, batch["attention_mask"][..., None]
        rows |= dict(zip(some, F.normalize((state * mask).sum(1) / mask.sum(1), dim=-1)))
    return torch.stack([rows[i] for i in range(len(texts))])


def closeness(c: Tensor, shared: Tensor, empty: Tensor) -> Tensor:
    """What the cosine of two captions should be in our text space.

    c: the sentence encoder's cosine, which knows language; shared: how far the two name the same pictures
    (the cosine of their shares among all emoji), which it does not know: a name of the same picture comes
    nearer, by PULL of what is missing. FLOOR, because no two texts are opposites in CLIP; the empty one is
    EMPTY_TEXT from all. PULL and FLOOR fit the cosines that are published for SD v1.4's tower (README).
    """
    c = c.clamp(min=0)
    target = FLOOR + (1 - FLOOR) * (c + PULL * (1 - c) * shared)
    return torch.where(empty, EMPTY_TEXT, target)


def text_config(vocab: int) -> clip_text.CLIPTextConfig:
    return clip_text.CLIPTextConfig(vocab, WIDTH, 4 * WIDTH, 4, 4, TOKENS)


def train_text(args, recipe: Recipe) -> bool:
    """The text tower: rows of captions at the cosines of `closeness`; the book's words and many more."""
    book, rng = Book(), torch.Generator().manual_seed(0)
    if not (args.out / "tokenizer/vocab.json").exists():
        train_tokenizer(book, args.out / "tokenizer")
    tokenizer = clip_text.CLIPTokenizer.from_pretrained(args.out / "tokenizer")
    places, styles = list(book.places.values()), list(book.styles.values())

    def pick(options: list[str]) -> str:
        return options[torch.randint(len(options), (), generator=rng)]
    kinds = []                                                    # (name, place, style) of each caption
    for name in book.names + book.words:
        kinds += [(name, "", ""), (name, pick(places), ""), (name, pick(places), "")]
        kinds += [(name, "", pick(styles)), (name, pick(places), pick(styles))]
    kinds += [(scene, "", "") for scene in book.scenes for _ in range(20)]
    kinds += [(None, "", style) for style in ["", *styles] for _ in range(20)] + [("", "", "")] * 40
    bare = [f"{'artwork' if name is None else name} {place}".strip() + (f" by {style}" if style else "")
            for name, place, style in kinds]
    words = [word for word in words_of(book) if word.isalpha()]
    vectors = args.work / "sentences.safetensors"
    if not vectors.exists():
        different = sorted({*bare, *words})
        found = sentence_vectors(args.sentences, different)
        where = {text: i for i, text in enumerate(different)}
        with whole(vectors) as temporary:
            save_file({kind: found[[where[text] for text in texts]] for kind, texts in
                       (("rows", bare), ("words", words))}, temporary)
    rows, of_words = (load_file(vectors)[kind] for kind in ("rows", "words"))    # [captions, d], [words, d]
    column = {h: i for i, h in enumerate(book.things)}
    shares = {}                                                   # name -> its share among the emoji
    for h, called in book.called.items():
        for name, share in called.items():
            shares.setdefault(name, torch.zeros(len(column)))[column[h]] = share
    names = list(dict.fromkeys(name for name, _, _ in kinds))
    number = {name: k for k, name in enumerate(names)}
    owner = torch.tensor([number[name] for name, _, _ in kinds])                     # [captions]
    of_name = [[] for _ in names]                                 # the captions of each name, its own first
    for i, k in enumerate(owner.tolist()):
        of_name[k].append(i)
    profile = F.normalize(torch.stack([shares.get(n, torch.zeros(len(column))) for n in names]), dim=-1)
    empty = owner == number[""]
    alone = rows[[mine[0] for mine in of_name]]
    near = closeness(alone @ alone.T, profile @ profile.T, torch.tensor(False)).fill_diagonal_(0)
    near = near.topk(24).indices                                  # [names, 24]: the nearest names of each
    vocab = read_json(args.out / "tokenizer/vocab.json")
    torch.manual_seed(0)
    net = clip_text.CLIPTextModel(text_config(len(vocab))).to(args.device)
    for embedding in (net.embeddings.token_embedding, net.embeddings.position_embedding):
        nn.init.normal_(embedding.weight, std=0.02)
    # A word's embedding starts where the wanted cosines put it (their Gram matrix's best 256 dimensions):
    # with random ones, 600 steps had left every word beside strangers.
    known = F.normalize(torch.stack([shares.get(w, torch.zeros(len(column))) for w in words]), dim=-1)
    gram = closeness(of_words @ of_words.T, known @ known.T, torch.tensor(False)).fill_diagonal_(1)
    values, axes = torch.linalg.eigh(gram.double())
    start = (axes[:, -WIDTH:] * values[-WIDTH:].clamp(min=0).sqrt()).float()         # [words, 256]
    with torch.no_grad():
        net.embeddings.token_embedding.weight[[vocab[f"{word}</w>"] for word in words]] = 0.6 * start

    def wanted(i: Tensor) -> Tensor:                              # captions i [n] -> cosines [n, n]
        return closeness(rows[i] @ rows[i].T, profile[owner[i]] @ profile[owner[i]].T,
                         empty[i][:, None] != empty[i]).to(args.device)

    def states(chosen: list[int], rng: torch.Generator, whole: bool, net=net):
        templates = torch.randint(len(book.templates), (len(chosen),), generator=rng).tolist()
        ids = tokenizer(["" if empty[i] else book.caption(kinds[i][0], t, *kinds[i][1:])
                         for i, t in zip(chosen, templates)])
        end = ids.argmax(1)                                       # the end token has the largest id
        long = TOKENS if whole else min(TOKENS, int(end.max()) + 3)
        return net(ids[:, :long].to(args.device)), end.to(args.device), long

    def error(chosen: list[int], rng: torch.Generator, whole: bool) -> Tensor:
        h, end, long = states(chosen, rng, whole)
        target = wanted(torch.tensor(chosen))
        each = torch.arange(len(chosen), device=args.device)
        later = end + torch.randint(1, TOKENS, (), generator=rng).item()             # a row of the padding
        total = 0.0
        for row, weight in ((end, 1.0), (later.clamp(max=long - 1), 0.5), ((end - 1).clamp(min=1), 0.25)):
            e = F.normalize(h[each, row], dim=-1)
            total = total + weight * (e @ e.T - target).square().sum(1).mean()
        # the begin row is the same for all and much longer than the others, as in SD's tower
        return total + (h[:, 0].norm(dim=-1) / h[:, 1:].norm(dim=-1).mean() - 1.7).square().mean()

    def loss(rng: torch.Generator, step: int) -> Tensor:
        half = recipe.text_batch // 2
        chosen = torch.randint(len(kinds), (half,), generator=rng).tolist()
        for i in list(chosen):                                    # and as many near ones
            name = near[owner[i], torch.randint(near.shape[1], (), generator=rng)]
            chosen.append(of_name[name][torch.randint(len(of_name[name]), (), generator=rng)])
        return error(chosen, rng, step % 4 == 0)

    def held(average: nn.Module) -> float:                        # root mean square error of 400 captions
        rng = torch.Generator().manual_seed(10 ** 6)
        chosen = torch.randperm(len(kinds), generator=rng)[:400].tolist()
        h, end, _ = states(chosen, rng, False, average)
        e = F.normalize(h[torch.arange(len(h)), end], dim=-1)
        return (e @ e.T - wanted(torch.tensor(chosen))).square().mean().sqrt().item()

    run = Run("text", net, recipe.text_steps, 1e-3, 0.01, args, decays=(0.99,))
    finished = run.train(loss, held)
    special = {"bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1, "pad_token_id": len(vocab) - 1}
    write_network(args.out / "text_encoder", "model.safetensors", run.average,
                  {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model",
                   **asdict(net.config), **special, "projection_dim": PROJECTION, "torch_dtype": "float32"},
                  "text_model.")
    print(f"text: {len(kinds)} captions, cosines to {run.scores[-1][1] if run.scores else float('nan'):.3f}")
    return finished


# ---------------------------------------------------------------------------------------- stage 2: VAE

def train_vae(args, recipe: Recipe) -> bool:
    icons = Icons(args.data, Book())
    config = vae.VAEConfig(block_out_channels=recipe.vae_widths, layers_per_block=1, norm_num_groups=8,
                           sample_size=SIZE)
    torch.manual_seed(0)
    net = vae.VAE(config).to(args.device, memory_format=torch.channels_last)

    def loss(rng: torch.Generator, step: int) -> Tensor:
        x = 2 * compose(icons, recipe.vae_batch, rng)[0].to(args.device) - 1
        mean, logvar = net.encode(x.contiguous(memory_format=torch.channels_last))
        z = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=rng).to(mean)
        kl = (mean ** 2 + logvar.exp() - 1 - logvar).mean() / 2
        error = net.decode(z) - x
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        return error.abs().mean() + error.square().mean() + 0.5 * edges + 1e-4 * kl

    x, _, _ = compose(icons, 400, torch.Generator().manual_seed(10 ** 6))            # never trained on

    @torch.no_grad()
    def restored(model: vae.VAE) -> Tensor:
        parts = [model.decode(model.encode(2 * b - 1)[0]) for b in x.to(args.device).split(40)]
        return torch.cat(parts) / 2 + 0.5

    def psnr(model: vae.VAE) -> float:
        return -10 * (restored(model).clamp(0, 1).cpu() - x).square().mean((1, 2, 3)).log10().mean().item()

    run = Run("vae", net, recipe.vae_steps, 2e-3, 0.0, args, decays=(0.995,))
    finished = run.train(loss, psnr)
    model = run.average.eval()
    with torch.no_grad():
        z = torch.cat([model.encode(2 * b - 1)[0] for b in x.to(args.device).split(40)])
    config = replace(config, scaling_factor=round(1 / z.std().item(), 5))
    n = len(config.block_out_channels)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n}
    write_network(args.out / "vae", "diffusion_pytorch_model.safetensors", model,
                  {"_class_name": "AutoencoderKL", "act_fn": "silu", **asdict(config), **kinds})
    print(f"vae: PSNR on 400 held-out compositions {psnr(model):.1f} dB, "
          f"scaling factor {config.scaling_factor}")
    write_png(args.work / "vae.png", grid(torch.cat([x[:16], restored(model)[:16].cpu()]), 16, zoom=2))
    return finished


# ---------------------------------------------------------------------------------------- stage 3: U-Net

class Latents:
    """Compositions as latents, in blocks that are made on demand and kept in files: block k is of seed k.

    Encoding costs half a training step, so a picture is used again: after s steps FIRST + s // EVERY blocks
    are known, and a batch is drawn from all of them.
    """
    FIRST, EVERY = 16, 400

    def __init__(self, args, icons: Icons, block: int):
        self.folder, self.icons, self.block = args.work / "latents", icons, block
        self.autoencoder = vae.VAE.from_pretrained(args.out / "vae", device=args.device)
        self.autoencoder.to(memory_format=torch.channels_last)
        self.z, self.which, self.scene = (torch.empty(0, 4, 16, 16, dtype=torch.float16),
                                          torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long))

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        device = next(self.autoencoder.parameters()).device
        return torch.cat([self.autoencoder.encode((2 * b - 1).to(device))[0] for b in x.split(50)]
                         ) * self.autoencoder.scaling_factor

    def grow(self, step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        while (k := len(self.z) // self.block) < self.FIRST + step // self.EVERY:
            path = self.folder / f"{k:04}.safetensors"
            if not path.exists():
                x, which, scene = compose(self.icons, self.block, torch.Generator().manual_seed(k),
                                          self.icons.weight * self.icons.drawn)
                with whole(path) as temporary:
                    z = self.encode(x).half().cpu().contiguous()
                    save_file({"z": z, "which": which, "scene": scene}, temporary)
            block = load_file(path)
            self.z = torch.cat([self.z, block["z"]])
            self.which, self.scene = (torch.cat([self.which, block["which"]]),
                                      torch.cat([self.scene, block["scene"]]))


def spread_times(n: int, T: int, rng: torch.Generator) -> Tensor:
    """Times [n] from 0 to T − 1, evenly spread. In float32 the last may round up to T, once in a million."""
    return ((torch.arange(n) + torch.rand((), generator=rng)) / n * T).long().clamp(max=T - 1)


def train_unet(args, recipe: Recipe) -> bool:
    n = len(recipe.unet_widths)
    kinds = [""] + ["CrossAttn"] * (n - 1)                        # the highest resolution has no attention
    config = unet.UNetConfig(4, 4, recipe.unet_widths, tuple(f"{k}DownBlock2D" for k in kinds),
                             tuple(f"{k}UpBlock2D" for k in kinds[::-1]), 1, WIDTH, 4, 16, 1e-5, 16)
    torch.manual_seed(0)
    net = unet.UNet(config).to(args.device, memory_format=torch.channels_last)
    for module in net.modules():                                  # a residual branch starts as nothing
        if isinstance(module, (unet.ResnetBlock, unet.SpatialTransformer)):
            nn.init.zeros_((module.conv2 if hasattr(module, "conv2") else module.proj_out).weight)
    nn.init.zeros_(net.conv_out.weight)
    encoder = clip_text.CLIPTextModel.from_pretrained(args.out / "text_encoder", device=args.device)
    tokenizer = clip_text.CLIPTokenizer.from_pretrained(args.out / "tokenizer")
    book, scheduler = Book(), diffusion.Scheduler()
    icons = Icons(args.data, book, args.without)
    latents, known = Latents(args, icons, recipe.block), {}       # known: caption -> its rows
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weight = (snr.clamp(max=5) / snr).to(args.device)             # min-SNR-5 for ε (Hang et al. 2023)
    T = scheduler.config.num_train_timesteps
    print(f"unet: {icons.drawn.sum()} icons, {sum(p.numel() for p in net.parameters()):,} parameters")

    @torch.no_grad()
    def read(captions: list[str]) -> Tensor:
        new = [c for c in dict.fromkeys(captions) if c not in known]
        if len(known) + len(new) > 40_000:                        # some 650 MB
            known.clear()
            new = list(dict.fromkeys(captions))
        if new:
            known.update(zip(new, encoder(tokenizer(new).to(args.device)).half()))
        return torch.stack([known[c] for c in captions]).float()

    def loss(rng: torch.Generator, step: int) -> Tensor:
        latents.grow(step)
        pick = torch.randint(len(latents.z), (recipe.unet_batch,), generator=rng)
        context = read([book.caption_of(icons, w, s, rng) for w, s in
                        zip(latents.which[pick].tolist(), latents.scene[pick].tolist())])
        t = spread_times(len(pick), T, rng)
        z0, noise = latents.z[pick].float(), torch.randn(len(pick), 4, 16, 16, generator=rng)
        zt = scheduler.add_noise(z0, noise, t).to(args.device, memory_format=torch.channels_last)
        error = net(zt, t.to(args.device), context) - noise.to(args.device)
        return (weight[t] * error.square().mean((1, 2, 3))).mean()                   # Eq. (1), weighted

    @torch.no_grad()
    def draw(model: unet.UNet, prompts: list[str], n: int) -> Tensor:
        """n pictures of each prompt, seeds 0 … n − 1."""
        c = read([prompt for prompt in prompts for _ in range(n)]).to(args.device)
        u = read([""]).to(args.device).expand_as(c)
        start = torch.stack([torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(s))
                             for s in range(n)]).repeat(len(prompts), 1, 1, 1).to(args.device)
        pictures = []
        for i in range(0, len(c), 50):
            some = slice(i, i + 50)
            z = diffusion.ddim(lambda zt, t: diffusion.guided(model(zt, t, u[some]), model(zt, t, c[some]),
                                                              GUIDANCE), start[some], scheduler, STEPS)
            pictures.append(latents.autoencoder.decode(z / latents.autoencoder.scaling_factor) / 2 + 0.5)
        return torch.cat(pictures).cpu().clamp(0, 1)

    rng = torch.Generator().manual_seed(10 ** 6)                  # held-out compositions with their captions
    x, which, scene = compose(icons, 256, rng, icons.weight * icons.drawn)
    held_captions = [book.caption_of(icons, w, s, rng) for w, s in zip(which.tolist(), scene.tolist())]
    held_z, held_noise = latents.encode(x), torch.randn(256, 4, 16, 16, generator=rng).to(args.device)
    held_t = torch.linspace(0, T - 1, 256).long().to(args.device)
    others = "pizza rose castle guitar lion bear elephant train rocket banana house dagger robot".split()
    words = [f"a photo of the {name}" for name in [*book.classes, *others]]

    def held_out(model: unet.UNet) -> list[float]:
        """The losses of all averages on held-out compositions, unweighted; and a sheet for the eye."""
        c = read(held_captions).to(args.device)
        zt = scheduler.add_noise(held_z, held_noise, held_t)
        losses = []
        for average in run.averages:
            parts = [average(zt[i:i + 64], held_t[i:i + 64], c[i:i + 64]) for i in range(0, 256, 64)]
            losses.append(round((torch.cat(parts) - held_noise).square().mean().item(), 5))
        write_png(args.work / f"unet-{run.step:06}.png", grid(draw(model, words, 6), 12))
        return losses

    run = Run("unet", net, recipe.unet_steps, 8e-4, 0.01, args, decays=(0.9995, 0.998, 0.9999),
              muon=("down_blocks", "mid_block", "up_blocks"))
    finished = run.train(loss, held_out, scores=10)
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
    write_json(args.out / "defaults.json", {"guidance": GUIDANCE, "steps": STEPS, "size": SIZE})
    shipped = unet.UNet.from_pretrained(args.out / "unet", device=args.device)
    write_png(args.work / "unet.png", grid(draw(shipped, words[:len(book.classes)], 10), 10))
    return finished


# ---------------------------------------------------------------------------------------- stage 4: CLIP

def look(clip: eval_clip.CLIP, pixels: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Image features from a random `share` of the patches, the same ones for the whole batch: half of them
    are less than half of the cost (Li et al. 2023, FLIP), and no picture is seen twice alike."""
    tower = clip.vision_model
    tokens = tower.embeddings(pixels)                             # [B, 1 + L, D]
    patches = torch.randperm(tokens.shape[1] - 1, generator=rng)[:round(share * (tokens.shape[1] - 1))]
    tokens = torch.cat([tokens[:, :1], tokens[:, 1 + patches.to(tokens.device)]], dim=1)
    state = tower.post_layernorm(tower.encoder(tower.pre_layrnorm(tokens))[:, 0])
    return F.normalize(clip.visual_projection(state), dim=-1)


def train_clip(args, recipe: Recipe) -> bool:
    """CLIP's image tower and both projections; the text tower stays as it is, and with it the U-Net."""
    book = Book()
    icons = Icons(args.data, book)
    weight = icons.weight * icons.drawn * ~icons.kept             # one icon in twenty is never seen
    tokenizer = clip_text.CLIPTokenizer.from_pretrained(args.out / "tokenizer")
    text = clip_text.CLIPTextModel.from_pretrained(args.out / "text_encoder")
    width = recipe.vision_width
    config = eval_clip.CLIPConfig(text.config, eval_clip.CLIPVisionConfig(
        width, 4 * width, recipe.vision_layers, width // 32, SIZE, 8), PROJECTION)
    torch.manual_seed(0)
    clip = eval_clip.CLIP(config).to(args.device)
    nn.init.normal_(clip.vision_model.embeddings.position_embedding.weight, std=0.02)
    nn.init.normal_(clip.vision_model.embeddings.class_embedding, std=0.02)
    clip.text_model.load_state_dict(text.state_dict())
    clip.text_model.requires_grad_(False)

    @torch.no_grad()
    def states(captions: list[str]) -> Tensor:
        ids = tokenizer(captions)
        ids = ids[:, :int(ids.argmax(1).max()) + 1].to(args.device)
        return clip.text_model(ids)[torch.arange(len(ids)), ids.argmax(1)]

    right = torch.tensor([[name in book.called[h] or name == book.things[h].get("class")
                           for name in book.own] for h, _ in icons.which]).float()   # [icons, names that fit]
    of_names = states([f"a photo of the {name}" for name in book.own])

    def loss(rng: torch.Generator, step: int) -> Tensor:
        x, which, scene = compose(icons, recipe.clip_batch, rng, weight)
        captions = [book.words_of(icons, w, s, rng) for w, s in zip(which.tolist(), scene.tolist())]
        image = look(clip, clip.preprocess(x.to(args.device)), 0.5 if step < 0.8 * run.steps else 1, rng)
        words, names = (F.normalize(clip.text_projection(s), dim=-1) for s in (states(captions), of_names))
        scale = clip.logit_scale.exp().clamp(max=100)
        same = torch.tensor([[a == b for b in captions] for a in captions]).float().to(args.device)
        same = same / same.sum(1, keepdim=True)                   # a caption of two pictures fits both
        logits = scale * image @ words.T
        thing = (which >= 0).to(args.device)                      # and pictures against all names at once
        called = F.normalize(right[which], p=1, dim=1).to(args.device)[thing]
        return ((F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
                + F.cross_entropy(scale * image[thing] @ names.T, called))

    x, which, _ = compose(icons, 1000, torch.Generator().manual_seed(10 ** 6), weight)
    x, which = x[which >= 0], which[which >= 0]

    @torch.no_grad()
    def score(model: eval_clip.CLIP) -> float:                    # zero-shot top-1 among all things
        words = F.normalize(model.text_projection(of_names), dim=-1)
        seen = torch.cat([model.image_features(model.preprocess(b.to(args.device))) for b in x.split(100)])
        return right[which, (seen @ words.T).argmax(1).cpu()].mean().item()

    run = Run("clip", clip, recipe.clip_steps, 1e-3, 0.05, args, decays=(0.998,),
              muon=("vision_model.encoder",))
    finished = run.train(loss, score)
    model = run.average.eval()
    special = {"bos_token_id": tokenizer.eos - 1, "eos_token_id": tokenizer.eos,
               "pad_token_id": tokenizer.eos}
    write_network(args.out / "clip", "model.safetensors", model,
                  {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": PROJECTION,
                   "text_config": {"model_type": "clip_text_model", **asdict(config.text), **special,
                                   "projection_dim": PROJECTION},
                   "vision_config": {"model_type": "clip_vision_model", **asdict(config.vision),
                                     "num_channels": 3, "projection_dim": PROJECTION}})
    copy_tokenizer(args.out / "tokenizer", args.out / "clip")
    write_json(args.out / "clip/preprocessor_config.json", {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": SIZE},
        "resample": 3, "do_center_crop": True, "crop_size": {"height": SIZE, "width": SIZE},
        "do_normalize": True, "image_mean": eval_clip.MEAN.flatten().tolist(),
        "image_std": eval_clip.STD.flatten().tolist()})
    print(f"clip: zero-shot top-1 among {len(book.own)} things {score(model):.1%}")
    return finished


STAGES = {"text": train_text, "vae": train_vae, "unet": train_unet, "clip": train_clip}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="emoji mosaics: render.mjs makes them")
    parser.add_argument("--sentences", type=Path, help="folder of a sentence encoder, for --stage text")
    parser.add_argument("--out", type=Path, default=Path("out/mini"),
                        help="model folder to write (default: out/mini)")
    parser.add_argument("--work", type=Path, default=HERE / "work",
                        help="checkpoints and sheets (default: mini/work)")
    parser.add_argument("--stage", choices=STAGES, required=True, help="in this order")
    parser.add_argument("--recipe", choices=RECIPES, default="laptop",
                        help="sizes and lengths (default laptop)")
    parser.add_argument("--without", metavar="CLASS", help="of the U-Net: it sees no picture of this class; "
                        "give --work and --out, too, so that it does not go on from another")
    parser.add_argument("--steps", type=int, help="length of the stage, instead of the recipe's")
    parser.add_argument("--minutes", type=float, default=1e9,
                        help="stop after so long; the same command goes on")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    args = parser.parse_args()
    if args.steps is not None and args.steps < 1 or not args.minutes >= 0:
        raise UserError("--steps must be at least 1, --minutes at least 0")
    args.device = pick_device(args.device)
    args.work.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES[args.recipe]
    if args.steps:
        recipe = replace(recipe, **{f"{args.stage}_steps": args.steps})
    if not STAGES[args.stage](args, recipe):
        print(f"{args.stage} is not finished: repeat the command to go on")


if __name__ == "__main__":
    command_line(main)
