"""How far an edit moves prompts, by text alone: no picture is drawn, and no U-Net loaded.

    python tools/preview.py prompts.txt --edit out/airplane

The file has a prompt a line. ‖Δe‖/‖e‖ is over all rows of a prompt; Δ is the change of text that comes
nearest to the edit's keys and values, a LoRA's share included. 0: drawn as before; the concept: near 1.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from plumbing.cli import command_line, lines_of, program
from plumbing.drift import preview, text_change
from plumbing.edits import cross_attention, read_edit
from plumbing.models import MINI, model_folder
from sample import Text


def main() -> None:
    parser = program(__doc__)
    parser.add_argument("prompts", type=Path, help="a text file, one prompt a line")
    parser.add_argument("--edit", required=True, help="an edit folder such as out/airplane")
    parser.add_argument("--model", default=MINI, help="the untouched one: folder or hub id (default: mini)")
    args = parser.parse_args()
    prompts, model = lines_of(args.prompts, "prompts:"), model_folder(args.model)
    preview(text_change(cross_attention(model), read_edit(args.edit, model)), prompts, Text(model))


if __name__ == "__main__":
    command_line(main)
