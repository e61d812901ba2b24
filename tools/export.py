"""An edit for everybody's tools: a whole pipeline folder, and LoRA files that erase on the untouched model.

    python tools/export.py --edit out/airplane --folder out/sd-without-airplane
    python tools/export.py --edit out/airplane --lora 16

`realera.py … --export DIR --export-lora RANK` does the same while it erases.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from plumbing import UserError
from plumbing.cli import command_line, program
from plumbing.edits import about_edit, original, read_edit
from plumbing.formats import export_pipeline, write_lora
from plumbing.models import MINI, model_folder


def main() -> None:
    parser = program(__doc__)
    parser.add_argument("--edit", action="append", required=True,
                        help="an edit folder such as out/airplane")
    parser.add_argument("--model", default=MINI, help="the untouched one: folder or hub id (default: mini)")
    parser.add_argument("--folder", type=Path, help="write a whole pipeline folder; must not exist")
    parser.add_argument("--lora", type=int, metavar="RANK",
                        help="write a LoRA of this rank into the edit folder")
    args = parser.parse_args()
    if not args.folder and args.lora is None:
        raise UserError("give --folder DIR, --lora RANK, or both")
    if len(args.edit) > 1:
        raise UserError(f"one --edit at a time; as one: python tools/merge.py {' '.join(args.edit)}")
    edit, model = args.edit[0], model_folder(args.model)
    W, about = read_edit(edit, model), about_edit(edit)
    if args.lora is not None:
        folder = Path(edit).parent if Path(edit).is_file() else Path(edit)
        write_lora(folder, original(model, W), W, args.lora, about)
        print(f"wrote {folder}/lora_rank{args.lora}.safetensors and its kohya twin")
    if args.folder:
        export_pipeline(args.folder, model, W, about)


if __name__ == "__main__":
    command_line(main)
