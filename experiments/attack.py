"""What an adversary gets back: erasure, measured by what returns.

    python experiments/attack.py --edit out/airplane                   # all attacks
    python experiments/attack.py --edit out/airplane --attack phrases embedding
    python experiments/attack.py --concept airplane --n 8              # sanity: the untouched model

Each attack offers candidates. The strongest, chosen by --choose pictures from seeds of their own, is drawn
with the same seeds as the plain prompt; success is that CLIP's first choice is the erased concept again.
Found prompts and embeddings are kept in --out, and so is what CLIP sees: a killed run goes on from there.
"""
import hashlib
import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from erasing import make_pairs
from eval_clip import judge
from plumbing import UserError, svg, training
from plumbing.book import CHOSEN, book
from plumbing.cli import DTYPES, EDIT, at_least_1, command_line, measuring_args, pick_device, program
from plumbing.disk import readable, whole
from plumbing.drift import share, text_change
from plumbing.edits import (about_edit, base_hash, cross_attention, erased_by, gram, keys_values, original,
                            read_edit)
from plumbing.models import fingerprint, model_folder
from plumbing.pictures import write_sheet
from plumbing.progress import Clock
from plumbing.prompts import TASKS, row_prompts
from plumbing.results import RANK, barrier, evaluate, rates
from plumbing.stats import as_markdown, wilson, write_tables
from plumbing.weights import check_tensors, put_weights
from realera import Trajectories
from rece import derive
from sample import Model, Text

TRAJECTORIES, BATCH = 8, 8      # pictures of the concept that the gradient attacks learn from, latents a step
TEMPLATES = {"object": ["a photo of the {}", "a picture of the {}", "a photo of a {}", "{}"],
             "style": ["an artwork by {}", "a painting by {}", "in the style of {}", "{}"],
             "celebrity": ["a portrait of {}", "a picture of {}", "a photo of {}", "{}"]}


@dataclass
class Target:
    """What is attacked: `model` holds the edited matrices W; W0 are the original's. `prompt` names the
    concept; the gradient attacks train `length` tokens for `budget` steps."""
    model: object
    W0: dict[str, Tensor]
    W: dict[str, Tensor]
    concept: str
    task: str
    seed: int
    budget: int
    length: int = 3
    anchor: str | None = None   # None: the class's own, or the task's

    @property
    def prompt(self) -> str:
        return TASKS[self.task][0].format(self.concept)

    @cached_property
    def ways(self) -> Trajectories:
        """Latents and noise of the original model while it draws the concept."""
        e, empty = self.model.text([self.prompt, ""]).cpu().double()
        put_weights(self.model.unet, self.W0)
        try:
            return Trajectories(*self.model.trajectories(e, empty, self.seed, TRAJECTORIES))
        finally:
            put_weights(self.model.unet, self.W)


# ------------------------------------------------------------------ attacks: Target -> {name: rows [T, D]}

def phrases(target: Target) -> dict[str, Tensor]:
    """Synonyms, associated phrases and paraphrases, as anybody would type them: black box, no optimisation.

    The paper's "concept residue". Ours are the class's own in the book, or the paper's appendix.
    """
    groups = row_prompts(target.concept, target.task, range(1))
    prompts = [prompt for group in "ga" for _, prompt, _ in groups.get(group, [])]
    prompts += [template.format(target.concept) for template in TEMPLATES[target.task][1:]]
    return dict(zip(prompts, target.model.text(prompts)))


def embedding(target: Target) -> dict[str, Tensor]:
    """RECE's derivation (Gong et al. 2024) as an attack: rows that make W do what W₀ does on the concept.

    White box: both models' cross-attention is needed, but no gradient. Two ridges, relative to G's diagonal.
    """
    W, W0 = keys_values(target.W), keys_values(target.W0)
    G, C = gram(W, W), gram(W, W0)
    e, I = target.model.text([target.prompt])[0].cpu().double(), torch.eye(len(G), dtype=G.dtype)
    size = gram(W0, W0).trace().item() / len(G)
    return {f"embedding, λ = {lam:g}": derive(I, G, C, e, lam * size).float() for lam in (1e-3, 1e-1)}


def vector(target: Target) -> dict[str, Tensor]:
    """Ring-A-Bell (Tsai et al. 2024): the mean difference between prompts with and without the concept,
    scaled and added to a neutral prompt. It needs the text encoder alone, and a model that takes rows.

    Theirs then searches a prompt whose embedding comes near (black box); ours feeds the embedding itself.
    """
    templates, text = TEMPLATES[target.task], target.model.text
    bare = [template.format("").strip() for template in templates]
    v = (text([template.format(target.concept) for template in templates]) - text(bare)).mean(0)
    scales = 0.5, 1, 1.5, 2, 3, -1, -2, -3                        # below 0: past an edit that overshoots
    return {f"“{bare[0]}” + {scale} v": text(bare[:1])[0] + scale * v for scale in scales}


def mirror(target: Target) -> dict[str, Tensor]:
    """Beyond the anchor, away from the concept: e* + m (e* − e). An edit that sends e s times the way to e*,
    s > 1, and leaves e* alone, sends these rows to e where m = 1/(s − 1); with a lid, at m = 1 + 2/(s − 1)
    (docs/mining.md). These two candidates take the weights, the others text encoder and anchor's name."""
    pair = make_pairs(target.concept, target.anchor, target.task, target.model.text, "tail", 0)[0]
    s = share(text_change(keys_values(target.W0), target.W), pair, pair.block())
    found, edited = {}, slice(pair.start_star, pair.start_star + pair.n)
    for m in [1, 2, 3, 5] + ([1 / (s - 1), 1 + 2 / (s - 1)] if s > 1.05 else []):
        rows = pair.e_star.clone()
        rows[edited] += m * (pair.block_star() - pair.block())
        found[f"{m:.3g} times beyond {pair.anchor or 'nothing'}"] = rows.float()
    return found


def emoji(target: Target) -> dict[str, Tensor]:
    """The concept's own emoji, as the book names it, where that is one token: no candidate elsewhere."""
    text, template = target.model.text, TASKS[target.task][0]
    codes = book()["classes"].get(target.concept, {}).get("emoji", [])
    prompts = [template.format(sign) for sign in (chr(int(code.partition("-")[0], 16)) for code in codes)
               if text.tokenizer.count(sign) == 1]
    return dict(zip(prompts, text(prompts))) if prompts else {}


def encode(text, vectors: Tensor) -> Tensor:
    """Token vectors [T, D] -> rows [T, D], with gradients: what CLIP's encoder does after its look-up."""
    encoder = text.encoder
    x = (vectors + encoder.embeddings.position_embedding.weight[:len(vectors)])[None]
    return encoder.final_layer_norm(encoder.encoder(x))[0]


def insert(target: Target, vectors: Tensor) -> Tensor:
    """Put vectors [k, D] between begin-of-text and the concept's prompt, and encode: rows [T, D]."""
    text = target.model.text
    table = text.encoder.embeddings.token_embedding.weight
    looked_up = table[text.tokenizer([target.prompt])[0].to(table.device)]
    return encode(text, torch.cat([looked_up[:1], vectors, looked_up[1:len(looked_up) - len(vectors)]]))


def matching_loss(target: Target, rows: Tensor, generator: torch.Generator) -> Tensor:
    """How far the edited network, shown `rows`, is from the noise that the original saw of the concept.

    UnlearnDiffAtk compares with the noise that was added to a picture; the original's prediction is that
    noise without its chance, and its own latents need no pictures.
    """
    batch, model = BATCH, target.model
    z, t, noise = target.ways.pick(range(len(target.ways.z)), batch, generator)
    context = rows.to(model.dtype).expand(batch, -1, -1)
    return (model.unet(z.to(model.dtype), t, context).to(noise) - noise).square().mean()


def descend(target: Target, free: Tensor, vectors: Callable, lr: float) -> list[float]:
    """Adam on `free`, `budget` steps, through vectors(free) [k, D], the text encoder and the U-Net."""
    generator = torch.Generator().manual_seed(target.seed)
    optimizer = torch.optim.Adam([free.requires_grad_()], lr)

    def loss(step: int) -> Tensor:
        return matching_loss(target, insert(target, vectors(free)), generator)
    return training.descend([free], loss, target.budget, optimizer, "attacking", dtype=target.model.dtype)


def prefix(target: Target) -> dict[str, Tensor]:
    """A few soft tokens before the prompt, by gradient descent through the edited U-Net: white box.

    Nobody can type them: typed tokens in the same place could do no more than the best of them.
    """
    spread = target.model.text.encoder.embeddings.token_embedding.weight.std()
    free = torch.zeros(target.length, target.model.text.encoder.config.hidden_size, device=spread.device)
    descend(target, free, lambda u: spread * u, lr=0.1)
    return {f"{target.length} soft tokens": insert(target, spread * free.detach()).detach()}


def simplex(x: Tensor) -> Tensor:
    """The nearest point with entries ≥ 0 that sum to 1, along the last dimension (Duchi et al. 2008)."""
    ordered = x.sort(-1, descending=True).values
    above = (ordered.cumsum(-1) - 1) / torch.arange(1, x.shape[-1] + 1, device=x.device)
    last = (ordered > above).sum(-1, keepdim=True) - 1
    return (x - above.gather(-1, last)).clamp(min=0)


def straight_through(theta: Tensor) -> Tensor:
    """Forward the one-hot of the largest entry, backward the identity."""
    return F.one_hot(theta.argmax(-1), theta.shape[-1]) + theta - theta.detach()


def tokens(target: Target) -> dict[str, Tensor]:
    """UnlearnDiffAtk (Zhang et al. 2024): real tokens before the prompt. White box.

    A relaxed one-hot per place is kept on the simplex; forward it counts as its largest entry, backward as
    itself (straight-through). Ours uses Adam where theirs takes signs, and offers the three choices of tokens
    that had the lowest mean loss. A name is their text, which need not be cut into the same tokens again.
    """
    text, seen, chosen = target.model.text, {}, []
    table = text.encoder.embeddings.token_embedding.weight
    special = text.tokenizer([""])[0].unique().tolist()
    allowed = torch.tensor([i for i in range(len(table)) if i not in special], device=table.device)
    words, generator = table[allowed], torch.Generator().manual_seed(target.seed)
    free = (1e-3 * torch.rand(target.length, len(words), generator=generator)).to(table)

    def vectors(theta: Tensor) -> Tensor:
        with torch.no_grad():
            theta.copy_(simplex(theta))
        chosen.append(tuple(allowed[theta.argmax(-1)].tolist()))
        return straight_through(theta) @ words

    for ids, loss in zip(chosen, descend(target, free, vectors, lr=0.1)):
        seen.setdefault(ids, []).append(loss)
    best = sorted(seen, key=lambda ids: sum(seen[ids]) / len(seen[ids]))[:3]
    with torch.no_grad():
        return {f"{text.tokenizer.words(ids)} + prompt": insert(target, table[list(ids)]) for ids in best}


ATTACKS = {"phrases": phrases, "emoji": emoji, "embedding": embedding, "vector": vector, "mirror": mirror,
           "prefix": prefix, "tokens": tokens}
BLACK_BOX = ["phrases", "emoji", "vector"]                        # the others work on the weights themselves
TYPED = ["plain", "phrases", "emoji"]                             # whose candidates' names are prompts


# ------------------------------------------------------------------ how often the concept returns

def attack(target: Target, clip, names: list[str], folder: Path, args) -> list[dict]:
    """Every attack's row, plain prompt first: {attack, strongest, success [value, low, high] in %, …}."""
    model, rows, white = target.model, [], [name for name in names if name not in BLACK_BOX]
    if model.worn.drawing and white:
        raise UserError("this edit is of a method that acts while a picture is drawn, and what sees weights "
                        f"alone cannot attack it ({', '.join(white)}): give --attack {' '.join(BLACK_BOX)}")
    settings = [*map(fingerprint, (model.folder, CHOSEN[0], Path(__file__))), base_hash(target.W),
                str(model.dtype), model.defaults, target.task, target.concept, target.anchor, target.seed,
                target.budget, target.length]
    place = folder / "found" / hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    seeds = range(args.seed, args.seed + args.n)
    choosing = range(args.seed + args.n, args.seed + args.n + args.choose)
    for name in ["plain", *names]:
        clock, path = Clock(), place / f"{name}.safetensors"
        typed = bool(model.worn.drawing) and name in TYPED        # such a method may look at the words
        if name == "plain":
            candidates = {target.prompt: model.text([target.prompt])[0].cpu()}
        else:
            if RANK == 0 and not path.exists():                   # one process searches, all draw
                with whole(path) as temporary:
                    save_file({key: x.contiguous().cpu() for key, x in ATTACKS[name](target).items()},
                              temporary)
            barrier()
            with readable(path):
                candidates = load_file(path)
            check_tensors(path, candidates, dict.fromkeys(candidates, model.text([""])[0].shape))
            if not candidates:                                    # emoji that are no tokens
                continue

        def draw(jobs, keep=None):
            return evaluate(model, clip, jobs, folder / "results", args.steps, None, args.batch, keep,
                            f"{target.concept}, {name}", None if typed else candidates)

        best = next(iter(candidates))
        if len(candidates) > 1:
            first = rates(clip, target.concept, target.task, candidates, draw, choosing)
            best = max(sorted(candidates), key=first.get)
        keep = folder / "pictures" / target.concept / name if args.keep_pictures else None
        rate = rates(clip, target.concept, target.task, [best], lambda jobs: draw(jobs, keep),
                     seeds)[best][0]
        clock("")
        rows.append({"concept": target.concept, "attack": name, "strongest": best,
                     "candidates": len(candidates),
                     "success": [round(100 * x, 1) for x in (rate, *wilson(rate, len(seeds)))],
                     "seconds": round(clock.seconds[""], 1), "rows": best if typed else candidates[best]})
    return rows


def main() -> None:
    parser = program(__doc__)
    parser.add_argument("--edit", help=EDIT)
    parser.add_argument("--concept", help="what to bring back; without --edit from the untouched model")
    parser.add_argument("--task", choices=TASKS, default="object", help="what --concept is (default object)")
    parser.add_argument("--attack", nargs="+", choices=["all", *ATTACKS], default=["all"], help="which")
    parser.add_argument("--budget", type=int, default=100, help="steps of prefix and tokens (default 100)")
    parser.add_argument("--choose", type=int, default=4, help="pictures to choose a candidate by (default 4)")
    args = measuring_args(parser)
    if not args.edit and not args.concept:
        raise UserError("give --edit out/NAME, or --concept NAME to attack the untouched model")
    at_least_1(args, "budget", "choose")
    device, folder = pick_device(args.device), model_folder(args.model)
    erased = erased_by([args.edit], [args.concept] if args.concept else [], args.task)
    about = about_edit(args.edit) if args.edit else {}
    anchors = dict(zip(about.get("concepts", []), about.get("anchors", [])))
    text = Text(folder, device)
    W = read_edit(args.edit, folder, text) if args.edit else {}
    W0 = cross_attention(folder) | original(folder, W)            # an edit may change others, too
    names = list(ATTACKS) if "all" in args.attack else list(dict.fromkeys(args.attack))
    name = Path(args.edit).name if args.edit else f"untouched-{args.concept.lower()}"
    out = args.out or Path("out/attack") / name
    for concept, task in erased:
        row_prompts(concept, task, range(1))                      # an unknown one is an error at once
    model, clip = Model(folder, device, DTYPES[args.dtype], text), judge(args.clip, folder, device)
    model.put(W)
    rows, pictures = [], []
    for one in erased:                                            # concept and task
        target = Target(model, W0, W0 | W, *one, args.seed, args.budget, anchor=anchors.get(one[0]))
        rows += attack(target, clip, names, out, args)
    if RANK == 0:
        for row in rows:                                          # the strongest of each, for the eye
            shown, what = min(args.n, 8), row.pop("rows")
            pictures.append(model.draw(what if isinstance(what, str) else what.expand(shown, -1, -1),
                                       list(range(args.seed, args.seed + shown)), args.steps,
                                       batch=args.batch))
        write_sheet(out / "grid.png", torch.cat(pictures).unflatten(0, (-1, shown)))
        svg.write(out / "grid.svg", svg.sheet(
            [[x] for x in pictures], [f"{row['concept']}, {row['attack']}" for row in rows], [name],
            "The strongest of each attack", [[f"success {row['success'][0]:.0f} %"] for row in rows]))
        write_tables(out, "attacks", rows)
        print(f"{as_markdown(rows)}\nwrote {out}/")


if __name__ == "__main__":
    command_line(main, shared=True)
