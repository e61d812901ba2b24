"""What an adversary gets back: erasure, measured by what returns.

    python attack.py --edit out/airplane                               # all five attacks
    python attack.py --edit out/airplane --attack phrases embedding
    python attack.py --concept airplane --n 8                          # sanity: the untouched model

Each attack offers candidates. The strongest, chosen by --choose pictures from seeds of their own, is drawn
with the same seeds as the plain prompt; success is that CLIP's first choice is the erased concept again.
Found prompts and embeddings are kept in --out, and so is what CLIP sees: a killed run goes on from there.
"""
import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import trange

from command import DTYPES, Clock, command_line, measuring_args, pick_device
from concepts import BOOK, TASKS, Pair, row_prompts
from eval_clip import judge, write_tables
from files import (UserError, about_edit, base_hash, cross_attention, grid, model_folder, put_weights,
                   read_edit, read_json, whole, write_png)
from metrics import as_markdown, wilson
from realera import Settings, Trajectories, anchor_trajectories
from rece import derive, gram
from scores import RANK, evaluate

TEMPLATES = ["a photo of the {}", "a picture of the {}", "a photo of a {}", "{}"]


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

    @property
    def prompt(self) -> str:
        return TASKS[self.task][0].format(self.concept)

    def trajectories(self) -> Trajectories:
        """Latents and noise of the original model while it draws the concept."""
        e = self.model.text([self.prompt])[0].double().cpu()
        pair = Pair(self.concept, self.concept, e, e, 0, 0, 0, self.seed)
        put_weights(self.model.unet, self.W0)
        try:
            return anchor_trajectories(self.model, pair, self.model.text([""])[0], Settings())
        finally:
            put_weights(self.model.unet, self.W)


# ------------------------------------------------------------------ attacks: Target -> {name: rows [T, D]}

def phrases(target: Target) -> dict[str, Tensor]:
    """Synonyms, associated phrases and paraphrases, as anybody would type them: black box, no optimisation.

    The paper's "concept residue". Ours are the class's own in mini/captions.json, or the paper's appendix.
    """
    groups = row_prompts(target.concept, target.task, range(1))
    prompts = [prompt for group in "ga" for _, prompt, _ in groups.get(group, [])]
    prompts += [template.format(target.concept) for template in TEMPLATES[1:]]
    return dict(zip(prompts, target.model.text(prompts)))


def embedding(target: Target) -> dict[str, Tensor]:
    """RECE's derivation (Gong et al. 2024) as an attack: rows that make W do what W₀ does on the concept.

    White box: both models' cross-attention is needed, but no gradient. Two ridges, relative to G's diagonal.
    """
    G, C = gram(target.W, target.W), gram(target.W, target.W0)
    e, I = target.model.text([target.prompt])[0].double().cpu(), torch.eye(len(G), dtype=G.dtype)
    size = gram(target.W0, target.W0).trace().item() / len(G)
    return {f"embedding, λ = {lam:g}": derive(I, G, C, e, lam * size).float() for lam in (1e-3, 1e-1)}


def vector(target: Target) -> dict[str, Tensor]:
    """Ring-A-Bell (Tsai et al. 2024): the mean difference between prompts with and without the concept,
    scaled and added to a neutral prompt. Black box: only the text encoder is needed.

    Theirs then searches a prompt whose embedding comes near; ours feeds the embedding itself.
    """
    bare, text = [template.format("").strip() for template in TEMPLATES], target.model.text
    v = (text([template.format(target.concept) for template in TEMPLATES]) - text(bare)).mean(0)
    return {f"“{bare[0]}” + {scale} v": text(bare[:1])[0] + scale * v for scale in (0.5, 1, 1.5, 2, 3)}


def encode(text, vectors: Tensor) -> Tensor:
    """Token vectors [T, D] -> rows [T, D], with gradients: what CLIP's encoder does after its look-up."""
    encoder = text.encoder
    x = (vectors + encoder.embeddings.position_embedding.weight)[None]
    return encoder.final_layer_norm(encoder.encoder(x))[0]


def insert(target: Target, vectors: Tensor) -> Tensor:
    """Put vectors [k, D] between begin-of-text and the concept's prompt, and encode: rows [T, D]."""
    text = target.model.text
    table = text.encoder.embeddings.token_embedding.weight
    looked_up = table[text.tokenizer([target.prompt])[0].to(table.device)]
    return encode(text, torch.cat([looked_up[:1], vectors, looked_up[1:len(looked_up) - len(vectors)]]))


def matching_loss(target: Target, ways: Trajectories, rows: Tensor, generator: torch.Generator) -> Tensor:
    """How far the edited network, shown `rows`, is from the noise that the original saw of the concept.

    UnlearnDiffAtk compares with the noise that was added to a picture; the original's prediction is that
    noise without its chance, and its own latents need no pictures.
    """
    batch, model = Settings().batch, target.model
    z, t, noise = ways.pick(range(ways.z.shape[0]), batch, generator)
    context = rows.to(model.dtype).expand(batch, -1, -1)
    return (model.unet(z.to(model.dtype), t, context).float() - noise).square().mean()


def descend(target: Target, free: Tensor, vectors: Callable, lr: float, after: Callable = None) -> None:
    """Adam on `free`, `budget` steps, through vectors(free) [k, D], the text encoder and the U-Net."""
    generator, ways = torch.Generator().manual_seed(target.seed), target.trajectories()
    optimizer = torch.optim.Adam([free.requires_grad_()], lr)
    for _ in trange(target.budget, desc="attacking", unit="step", leave=False, disable=None):
        optimizer.zero_grad()
        loss = matching_loss(target, ways, insert(target, vectors(free)), generator)
        loss.backward()
        optimizer.step()
        if after:
            after(loss.item())


def prefix(target: Target) -> dict[str, Tensor]:
    """A few soft tokens before the prompt, by gradient descent through the edited U-Net: white box.

    Nobody can type them; they bound from above what typed tokens in the same place could do.
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


def tokens(target: Target) -> dict[str, Tensor]:
    """UnlearnDiffAtk (Zhang et al. 2024): real tokens before the prompt. White box.

    A relaxed one-hot per place is kept on the simplex; forward it counts as its largest entry, backward as
    itself (straight-through). Ours uses Adam where theirs takes signs, and offers the three choices of tokens
    that had the lowest mean loss.
    """
    text, seen = target.model.text, {}
    table = text.encoder.embeddings.token_embedding.weight
    special = text.tokenizer([""])[0].unique().tolist()
    allowed = torch.tensor([i for i in range(len(table)) if i not in special], device=table.device)
    free = torch.full((target.length, len(allowed)), 1 / len(allowed), device=table.device)
    free += 1e-3 * torch.rand(free.shape, generator=torch.Generator().manual_seed(target.seed)).to(free)

    def vectors(theta: Tensor) -> Tensor:
        hard = F.one_hot(theta.argmax(-1), len(allowed)).to(theta)
        return (hard + theta - theta.detach()) @ table[allowed]

    def after(loss: float) -> None:
        seen.setdefault(chosen[0], []).append(loss)
        with torch.no_grad():
            free.copy_(simplex(free))
        chosen[0] = tuple(allowed[free.argmax(-1)].tolist())

    chosen = [tuple(allowed[free.argmax(-1)].tolist())]
    descend(target, free, vectors, lr=0.1, after=after)
    best = sorted(seen, key=lambda ids: sum(seen[ids]) / len(seen[ids]))[:3]
    with torch.no_grad():
        return {f"{text.tokenizer.words(ids)} + prompt": insert(target, table[list(ids)]) for ids in best}


ATTACKS = {"phrases": phrases, "embedding": embedding, "vector": vector, "prefix": prefix, "tokens": tokens}


# ------------------------------------------------------------------ how often the concept returns

@torch.no_grad()
def rates(clip, concept: str, candidates: dict, draw: Callable, seeds: range) -> dict[str, float]:
    """Share of pictures whose first choice is the concept, per candidate. `draw`: jobs -> features."""
    book = read_json(BOOK)
    names = list(dict.fromkeys([*book["classes"], *book["scenes"], concept]))
    prompts = clip.tokenizer([f"a photo of the {name}" for name in names])
    text = clip.text_features(prompts.to(clip.logit_scale.device)).cpu()
    found = draw([(name, seed) for name in candidates for seed in seeds])
    return {name: sum((found[name, seed] @ text.T).argmax().item() == names.index(concept) for seed in seeds)
            / len(seeds) for name in candidates}


def attack(target: Target, clip, names: list[str], folder: Path, args) -> list[dict]:
    """Every attack's row, plain prompt first: {attack, strongest, success [value, low, high] in %, …}."""
    settings = json.dumps([base_hash(target.W), target.concept, target.seed, target.budget])
    place = folder / "found" / hashlib.sha256(settings.encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    seeds, rows = range(args.seed, args.seed + args.n), []
    choosing = range(args.seed + args.n, args.seed + args.n + args.choose)
    for name in ["plain", *names]:
        clock, path = Clock(), place / f"{name}.safetensors"
        if not path.exists():
            candidates = ({target.prompt: target.model.text([target.prompt])[0]} if name == "plain"
                          else ATTACKS[name](target))
            with whole(path) as temporary:
                save_file({key: x.contiguous().cpu() for key, x in candidates.items()}, temporary)
        candidates = load_file(path)

        def draw(jobs):
            return evaluate(target.model, clip, jobs, folder / "results", args.steps, None, args.batch,
                            what=f"{target.concept}, {name}", rows=candidates)

        first = rates(clip, target.concept, candidates, draw, choosing) if len(candidates) > 1 else candidates
        best = max(sorted(candidates), key=first.get) if len(candidates) > 1 else next(iter(candidates))
        rate = rates(clip, target.concept, {best: candidates[best]}, draw, seeds)[best]
        clock("")
        rows.append({"concept": target.concept, "attack": name, "strongest": best,
                     "candidates": len(candidates),
                     "success": [round(100 * x, 1) for x in (rate, *wilson(rate, len(seeds)))],
                     "seconds": round(sum(clock.seconds.values()), 1), "rows": candidates[best]})
    return rows


def main() -> None:
    from sample import Model
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edit", help="an edit folder of realera.py or rece.py")
    parser.add_argument("--concept", help="attack the untouched model instead, as a check")
    parser.add_argument("--attack", nargs="+", choices=["all", *ATTACKS], default=["all"])
    parser.add_argument("--budget", type=int, default=100, help="steps of prefix and tokens (default 100)")
    parser.add_argument("--choose", type=int, default=4, help="pictures to choose a candidate by (default 4)")
    args = measuring_args(parser)
    if bool(args.edit) == bool(args.concept):
        raise UserError("give --edit out/NAME, or --concept NAME to attack the untouched model")
    if args.budget < 1 or args.choose < 1:
        raise UserError("--budget and --choose must be at least 1")
    device, folder = pick_device(args.device), model_folder(args.model)
    about = about_edit(args.edit) if args.edit else {"concepts": [args.concept]}
    W0 = cross_attention(folder)
    W = read_edit(args.edit, folder) if args.edit else W0
    names = list(ATTACKS) if "all" in args.attack else args.attack
    name = Path(args.edit).name if args.edit else f"untouched-{args.concept}"
    out = args.out or Path("out/attack") / name
    for concept in about["concepts"]:
        row_prompts(concept, about.get("task", "object"), range(1))      # an unknown one is an error at once
    model, clip = Model(folder, device, DTYPES[args.dtype]), judge(args.clip, folder, device)
    put_weights(model.unet, W)
    rows, pictures = [], []
    for concept in about["concepts"]:
        target = Target(model, W0, W, concept, about.get("task", "object"), args.seed, args.budget)
        rows += attack(target, clip, names, out, args)
    if RANK == 0:
        for row in rows:                                          # the strongest of each, for the eye
            shown = min(args.n, 8)
            pictures.append(model.draw(row.pop("rows").expand(shown, -1, -1),
                                       list(range(args.seed, args.seed + shown)), args.steps))
        write_png(out / "grid.png", grid(torch.cat(pictures), shown, max(1, 96 // pictures[0].shape[-1])))
        write_tables(out, "attacks", rows)
        print(f"{as_markdown(rows)}\nwrote {out}/")


if __name__ == "__main__":
    command_line(main)
