"""What rank a LoRA of an edit needs: the edit of one class and its truncations, seen by `mini/clip`.

    python experiments/lora_rank.py --edit out/airplane --n 8
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from eval_clip import CLIP, shown
from experiments.preview_worth import prompts_of
from plumbing.cli import at_least_1, command_line, program
from plumbing.edits import erased_by, original, read_edit
from plumbing.formats import low_rank
from plumbing.models import MINI
from sample import Model


def main() -> None:
    parser = program(__doc__)
    parser.add_argument("--edit", default="out/airplane", help="an edit of one class (default out/airplane)")
    parser.add_argument("--n", type=int, default=4, help="pictures a prompt (default 4)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model's)")
    args = parser.parse_args()
    at_least_1(args, "n", "steps")
    W, concept = read_edit(args.edit, MINI), erased_by([args.edit], [])[0][0]
    W0 = original(MINI, W)
    model, clip, groups = Model(Path(MINI)), CLIP.from_pretrained(Path(MINI) / "clip"), prompts_of(concept)
    prompts = [prompt for group in groups.values() for prompt in group]
    print(f"| rank | relative error | {' | '.join(f'Acc_{group}' for group in groups)} | pixels off |\n"
          + "|---" * (3 + len(groups)) + "|")
    whole = None                                                  # the pictures of the whole edit
    for rank in ("all", 0, 1, 2, 4, 8, 16, 32, 64):
        factors, error = ({}, 0) if rank == "all" else low_rank(W0, W, rank)
        model.put({name: W0[name].float() + B @ A for name, (B, A) in factors.items()} or W)
        right, pictures = shown(model, clip, prompts, args.n, args.steps)
        whole = pictures if whole is None else whole
        cells = [f"{100 * part.mean():.0f}" for part in right.split(list(map(len, groups.values())))]
        off = (pictures - whole).abs().mean()
        print(f"| {rank} | {error:.3f} | {' | '.join(cells)} | {off:.3f} |", flush=True)


if __name__ == "__main__":
    command_line(main)
