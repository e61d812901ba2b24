"""What programs share: errors as one line, flags, devices, names."""
import argparse
import contextlib
import dataclasses
import os
import re
import signal
import sys
import unicodedata
from pathlib import Path

import torch
from safetensors import SafetensorError

from plumbing import UserError
from plumbing.book import listed, use_book
from plumbing.disk import refuse_existing
from plumbing.models import MINI
from plumbing.prompts import TASKS

# This process's number, and how many there are. Schedulers leave such numbers behind, too: they count where
# torchrun's own sign is.
TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
RANK = int(TORCHRUN and os.environ.get("RANK") or 0)
WORLD = int(TORCHRUN and os.environ.get("WORLD_SIZE") or 1)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def command_line(main, shared: bool = False) -> None:
    """Run a script's `main`: what a user can fix is one line on stderr and exit status 2, no traceback.

    SIGTERM is an interruption like Ctrl-C. A reader of our output that goes away (`| head`) stops nothing.
    shared: torchrun's processes share the work. Where they do not, the first does it, and the others end.
    """
    for stream in (sys.stdout, sys.stderr):                       # not so on Windows; we print ‖ΔW‖ and →
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    left = [name for name in ("RANK", "WORLD_SIZE") if os.environ.get(name, "") not in ("", "0", "1")]
    if left and not TORCHRUN:
        print(f"warning: {' and '.join(left)} are not torchrun's, and are ignored", file=sys.stderr)
    if WORLD > 1 and not shared:
        if RANK > 0:
            return
        print(f"warning: this program shares no work: one of {WORLD} processes does it all", file=sys.stderr)
    signal.signal(signal.SIGTERM, interrupted)
    out, err = Unbreakable(sys.stdout), Unbreakable(sys.stderr)
    try:
        " ".join(sys.argv).encode()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except UserError as error:
        fail(str(error), 2)
    except UnicodeEncodeError:
        fail("an argument is not UTF-8", 2)
    except (OSError, SafetensorError) as error:                   # a full disk, a forbidden or odd path
        where, why = getattr(error, "filename", None), getattr(error, "strerror", None)
        fail(f"cannot read or write {where or 'the output'}: {why or error}; nothing is half-written", 2)
    except torch.OutOfMemoryError:
        fail("out of GPU memory: try --dtype bfloat16, a smaller --batch (realera.py: --low-memory, --set "
             "batch=4 trajectories=4), or --device cpu", 2)
    except MemoryError:
        fail("not enough memory: try --dtype bfloat16 or a smaller --batch", 2)
    except KeyboardInterrupt:
        fail("interrupted; nothing is half-written", 130)


class Unbreakable:
    """stdout or stderr, but a reader that goes away is no error: from then on all is written nowhere."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()                                   # a line at once, also where output is piped
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def interrupted(*_) -> None:
    raise KeyboardInterrupt


def fail(message: str, status: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """Its errors are one line and show the first example of the docstring."""

    def error(self, message: str) -> None:
        examples = [line for line in (self.description or "").splitlines() if line.startswith("    python ")]
        fail(f"{message}; try: {(examples or [self.prog + ' --help'])[0].partition(' #')[0]}", 2)


def program(doc: str, **more) -> Parser:
    """A parser whose --help begins with a file's docstring, as it stands there."""
    return Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **more)


def model_args(parser: argparse.ArgumentParser) -> None:
    """The flags of what reads a model."""
    parser.add_argument("--model", default=MINI, help="folder, file or hub id (default: mini)")
    parser.add_argument("--device", default="auto", help="auto (CUDA or CPU), cpu, cuda, mps")
    parser.add_argument("--dtype", choices=DTYPES, default="float32",
                        help="of U-Net and VAE; text encoder and algebra keep theirs (default float32)")


EDIT = "an edit folder such as out/airplane, a .safetensors file or a diffusers folder"
BOOK = "JSON file of classes, synonyms, phrases and scenes of your own, in the form of mini/captions.json"


def lines_of(path: Path, flag: str = "--preview", what: str = "prompt") -> list[str]:
    """The lines of a text file, each once, without blank ones. Raises UserError if it has none."""
    try:                                                          # -sig: Windows begins files with a mark
        text = path.read_text("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
        raise UserError(f"{flag} {path} is not there, or not a text file in UTF-8") from None
    lines = list(dict.fromkeys(filter(None, map(str.strip, text.splitlines()))))
    if not lines:
        raise UserError(f"{flag} {path} holds no {what}")
    return lines


def concept_and_anchor(line: str) -> tuple[str, str | None]:
    """A line of --concepts: "cat → ground", "cat", tab, "ground", "cat, ground", or "cat" (anchor None)."""
    concept, _, anchor = line.partition(next((m for m in ("→", "->", "\t", ",") if m in line), "\n"))
    return concept.strip(), anchor.strip() or None


def erasing_args(doc: str, settings_class, own: dict[str, dict], suffix: str, anchor: str | None):
    """Parse the flags of every method and its `own` (flag -> add_argument's keywords). Flags and settings."""
    defaults = {field.name: field.default for field in dataclasses.fields(settings_class)}
    lists = {"settings and their defaults": defaults} | {
        f"preset={name} is": values for name, values in presets_of(settings_class).items()}
    parser = program(doc, epilog="\n".join(
        f"{what}: " + (", ".join(f"{name}={value}" for name, value in values.items()) or "the defaults")
        for what, values in lists.items()))
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--concept", action="append", help="what to erase; may be repeated")
    what.add_argument("--concepts", type=Path, metavar="FILE",
                      help="a text file of concepts, one a line: cat, or cat → ground with its anchor")
    what.add_argument("--list", action="store_true", help="print what the book holds, and end")
    parser.add_argument("--anchor", action="append", help="what to draw instead, one each (default: "
                        + ("a class's own in the book, else by task)" if anchor is None else "nothing)"))
    parser.add_argument("--task", choices=TASKS, default="object", help="prompt templates and default anchor")
    parser.add_argument("--book", type=Path, metavar="FILE", help=BOOK)
    parser.add_argument("--out", type=Path, help=f"edit folder to write (default: out/<concept>{suffix})")
    parser.add_argument("--overwrite", action="store_true", help="replace the edit folder if it exists")
    parser.add_argument("--export", type=Path, help="also write a whole pipeline folder for diffusers")
    parser.add_argument("--export-lora", type=int, metavar="RANK", help="also write the edit as a LoRA")
    parser.add_argument("--preview", type=Path, metavar="FILE",
                        help="only print how far the closed form moves each line of a text file")
    parser.add_argument("--n", type=int, default=4, help="pictures per prompt, before and after (default 4)")
    parser.add_argument("--no-pictures", action="store_true", help="only write the edit")
    parser.add_argument("--seed", type=int, default=0, help="of mining, LoRA and pictures (default 0)")
    model_args(parser)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
                        help="change settings, each NAME=VALUE; they are listed below")
    flags = [parser.add_argument(flag, **keywords).dest for flag, keywords in own.items()]
    args = parser.parse_args()
    use_book(args.book)
    if args.list:
        print(listed())
        sys.exit()
    if args.concepts:
        if args.anchor:
            raise UserError("anchors stand in the file of --concepts, as in cat → ground: leave out --anchor")
        lines = lines_of(args.concepts, "--concepts", "concept")
        args.concept, args.anchor = map(list, zip(*map(concept_and_anchor, lines)))
    args.anchor = [anchor if a is None else a for a in args.anchor or [None] * len(args.concept)]
    named = {field.name for field in dataclasses.fields(settings_class)} & set(flags)
    s = parse_settings(settings_class, args.set, **{name: getattr(args, name) for name in named})
    if args.n < 1:
        raise UserError("--n must be at least 1; --no-pictures draws none")
    check_seed(args.seed)
    if args.export_lora is not None and args.export_lora < 1:
        raise UserError("--export-lora is a rank: at least 1")
    args.out = args.out or edit_name(args.concept, suffix)
    if args.preview and (args.export or args.export_lora):
        raise UserError("--preview writes nothing: leave out --export and --export-lora")
    if not args.preview:                                          # say so now, not after minutes
        refuse_existing(args.out, overwrite=args.overwrite)
    return args, s


def quick_or_full(args: argparse.Namespace) -> None:
    """Of --n and --steps what was not typed: 4 and 12 with --quick, else 20 and the model's own."""
    args.n = args.n if args.n is not None else 4 if args.quick else 20
    args.steps = 12 if args.steps is None and args.quick else args.steps


def measuring_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the flags of every script that counts what CLIP sees, beside the parser's own."""
    model_args(parser)
    parser.add_argument("--book", type=Path, metavar="FILE", help=BOOK)
    parser.add_argument("--clip", help="CLIP to judge by: folder or hub id (default: the model's own clip/)")
    parser.add_argument("--n", type=int, help="pictures per prompt (default 20; the paper: 200)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model's; the paper: 50)")
    parser.add_argument("--quick", action="store_true", help="the same as --n 4 --steps 12")
    parser.add_argument("--seed", type=int, default=0, help="seed of a prompt's first picture (default 0)")
    parser.add_argument("--batch", type=int, help="pictures drawn at a time (default: by their size)")
    parser.add_argument("--out", type=Path,
                        help="folder to write; what lies there is gone on from (default: one in out/)")
    parser.add_argument("--keep-pictures", action="store_true", help="keep every picture as a PNG, too")
    args = parser.parse_args()
    use_book(args.book)
    quick_or_full(args)
    check_seed(args.seed)
    at_least_1(args, "n", "steps", "batch")
    if args.out and args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is not a folder")
    there = {path.name for path in args.out.glob("[!.]*")} if args.out else None
    if there and not there & {"results", "edits", "found", "asked.json", "sweep.json"}:
        raise UserError(f"--out {args.out} holds other things than results: choose a new folder")
    return args


def at_least_1(args, *names: str) -> None:
    """Raises UserError for the first of these flags that is given and below 1."""
    for name in names:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2 ** 62:                                   # pictures count on from it, below 2 ** 63
        raise UserError(f"--seed must be at least 0 and below 2 to the 62nd, not {seed}")


def pick_device(name: str) -> torch.device:
    """`auto`: CUDA, else the CPU; Apple's GPU only by its name, mps, as nothing has been tried on one yet.

    `cuda` without a number is the GPU that torchrun's LOCAL_RANK says; it becomes the current device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0     # an old driver counts, too
    if name == "auto":
        name = "cuda" if count else "cpu"
    if name == "cuda" and count:                                  # a process may see one GPU of many
        name = f"cuda:{int(os.environ.get('LOCAL_RANK') or 0) % count}"
    there = {"cpu", *(f"cuda:{i}" for i in range(count)), *(["mps"] * torch.backends.mps.is_available())}
    if name not in there:
        raise UserError(f"--device {name} is not available here: use --device cpu or auto")
    if name.startswith("cuda"):
        torch.cuda.set_device(name)
    return torch.device(name)


def presets_of(settings_class) -> dict[str, dict]:
    """{name: {setting: value}}: a class may name some of its settings, for --set preset=NAME."""
    return getattr(settings_class, "PRESETS", {})


def parse_settings(settings_class, changes: list[str], **flags):
    """`--set D1=0.8 M=3` -> settings_class(D1=0.8, M=3), values in their field's type; flags may be None."""
    fields, values = {field.name: field for field in dataclasses.fields(settings_class)}, {}
    kinds = {name: field.type for name, field in fields.items()}
    kinds |= {"preset": str} if presets_of(settings_class) else {}
    for change in changes:
        name, _, value = change.partition("=")
        if name not in kinds:
            raise UserError(f"--set {change}: there is no setting {name!r}; there are {', '.join(kinds)}")
        kind = kinds[name]
        try:
            values[name] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise UserError(f"--set {change}: give it like {name}={fields[name].default}") from None
    values |= {name: value for name, value in flags.items() if value is not None}
    return settings_of(settings_class, values)


MOST = 1e5                                                        # no setting has a use for more


def settings_of(settings_class, values: dict):
    """settings_class(**values), with "preset" the name of some values, which the others change. Raises
    UserError for NaN, infinity and numbers beyond MOST."""
    values, presets = dict(values), presets_of(settings_class)
    if presets and (name := values.pop("preset", None)) is not None:
        if name not in presets:
            raise UserError(f"the settings need preset = {' or '.join(presets)}, not {name}")
        values = presets[name] | values
    s = settings_class(**values)                                  # its own rules first: they say more
    for name, value in values.items():
        if isinstance(value, (int, float)) and not abs(value) <= MOST:
            raise UserError(f"{name} = {str(value)[:20]}: a setting is a number from -{MOST:g} to {MOST:g}")
    return s


def slug(text: str) -> str:
    """"Van Gogh" -> "van-gogh"; letters and digits of every script stay. 60 bytes at most."""
    text = unicodedata.normalize("NFC", text.lower())
    text = "".join(c if unicodedata.category(c)[0] in "LMN" else "-" for c in text)
    return re.sub("-+", "-", text).strip("-").encode()[:60].decode(errors="ignore")


def edit_name(concepts: list[str], suffix: str = "") -> Path:
    """out/van-gogh, out/airplane+ship, out/airplane+99-more: where an edit goes if --out does not say."""
    names = [slug(concept) or "edit" for concept in concepts]
    if len("+".join(names).encode()) > 120:
        names[1:] = [f"{len(names) - 1}-more"]
    return Path("out") / ("+".join(names) + suffix)


def free_name(path: Path) -> Path:
    """`path`, or `path` with -2, -3, … before its ending if that, or an SVG beside it, exists."""
    candidate, i = path, 2
    while candidate.exists() or candidate.with_suffix(".svg").exists():
        candidate, i = path.with_name(f"{path.stem}-{i}{path.suffix}"), i + 1
    return candidate


class NoFlags(argparse.Namespace):
    """The flags of a job that no command line asked for: None, each."""

    def __getattr__(self, name: str) -> None:
        return None
