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
from plumbing.disk import refuse_existing
from plumbing.edits import about_edit, edit_labels, original, read_edit
from plumbing.formats import export_pipeline, pipeline_files, write_lora
from plumbing.models import MINI, model_folder


def main() -> None:
    parser = program(__doc__)
    parser.add_argument("--edit", action="append", required=True,
                        help="an edit folder such as out/airplane")
    parser.add_argument("--model", default=MINI, help="the untouched one: folder or hub id (default: mini)")
    parser.add_argument("--folder", type=Path, help="write a whole pipeline folder; must not exist")
    parser.add_argument("--link", action="store_true",
                        help="with --folder: hard links in place of copies of VAE and text encoder, which saves "
                             "space; but a program that overwrites them there overwrites the model's own")
    parser.add_argument("--lora", type=int, metavar="RANK",
                        help="write LoRAs of this rank into the edit folder, for web UIs and for diffusers")
    args = parser.parse_args()
    if not args.folder and args.lora is None:
        raise UserError("give --folder DIR, --lora RANK, or both")
    if args.link and not args.folder:
        raise UserError("--link goes with --folder")
    if len(args.edit) > 1:
        raise UserError(f"one --edit at a time; as one: python tools/merge.py {' '.join(args.edit)}")
    edit, model = args.edit[0], model_folder(args.model)
    W, about = read_edit(edit, model), about_edit(edit)
    if args.folder:                                               # refuse it before the LoRA is written
        refuse_existing(args.folder, "an export replaces nothing, choose another folder")
        pipeline_files(model)
    if args.lora is not None:
        folder = Path(edit).parent if Path(edit).is_file() else Path(edit)
        write_lora(folder, edit_labels([edit])[0], original(model, W), W, args.lora, about)
    if args.folder:
        export_pipeline(args.folder, model, W, about, args.link)


if __name__ == "__main__":
    command_line(main)
