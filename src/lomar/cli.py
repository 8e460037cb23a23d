"""The command `lomar`: command name -> options and function. Torch is imported when a command runs, not before."""

import argparse
import importlib
import os
import re
import signal
import sys
import typing
from collections.abc import Sequence
from dataclasses import MISSING
from typing import Any, NoReturn

from lomar import __version__
from lomar.errors import TrainingError, UserError, is_out_of_memory
from lomar.launch import Launch, launched
from lomar.options import (
    AttentionOptions,
    BenchmarkOptions,
    ConvertOptions,
    DetectEvaluateOptions,
    DetectOptions,
    DetectPredictOptions,
    EmbedOptions,
    EvaluateOptions,
    ExportOptions,
    FinetuneOptions,
    KnnOptions,
    MapOptions,
    PredictOptions,
    PrepareOptions,
    PretrainOptions,
    ProbeOptions,
    RecipesOptions,
    ReconstructOptions,
    ReportOptions,
    StudyOptions,
    TokenizerOptions,
    convert,
    fields_of,
    flag,
    kind_of,
    suggestion,
)

# name -> its options, and the module whose `command(given) -> exit status` runs it
COMMANDS: dict[str, tuple[type, str]] = {
    "prepare": (PrepareOptions, "lomar.commands.prepare"),
    "pretrain": (PretrainOptions, "lomar.commands.pretrain"),
    "recipes": (RecipesOptions, "lomar.commands.recipes"),
    "finetune": (FinetuneOptions, "lomar.commands.finetune"),
    "evaluate": (EvaluateOptions, "lomar.commands.evaluate"),
    "predict": (PredictOptions, "lomar.commands.predict"),
    "detect": (DetectOptions, "lomar.commands.detect"),
    "detect-evaluate": (DetectEvaluateOptions, "lomar.commands.detect_evaluate"),
    "detect-predict": (DetectPredictOptions, "lomar.commands.detect_predict"),
    "knn": (KnnOptions, "lomar.commands.knn"),
    "probe": (ProbeOptions, "lomar.commands.probe"),
    "embed": (EmbedOptions, "lomar.commands.embed"),
    "map": (MapOptions, "lomar.commands.map"),
    "export": (ExportOptions, "lomar.commands.export"),
    "reconstruct": (ReconstructOptions, "lomar.commands.reconstruct"),
    "attention": (AttentionOptions, "lomar.commands.attention"),
    "report": (ReportOptions, "lomar.commands.report"),
    "convert": (ConvertOptions, "lomar.commands.convert"),
    "benchmark": (BenchmarkOptions, "lomar.commands.benchmark"),
    "study": (StudyOptions, "lomar.commands.study"),
    "tokenizer train": (TokenizerOptions, "lomar.commands.tokenizer"),
}

BAD_INPUT = 2


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parser_for(name: str) -> Parser:
    """The parser of one command, made from its options class; values stay text until `convert` reads them."""
    options, _ = COMMANDS[name]
    parser = Parser(
        prog=f"lomar {name}",
        description=options.__doc__,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
    )
    hints = typing.get_type_hints(options)
    for field in fields_of(options).values():
        text = field.metadata["help"]
        if field.metadata["choices"]:
            text += f": {', '.join(field.metadata['choices'])}"
        if field.metadata["auto"]:
            text += f" [{field.metadata['auto']}]"
        elif field.default is not MISSING and field.default is not None and field.default is not False:
            default = field.default
            text += f" [{' '.join(map(str, default)) if isinstance(default, tuple) else default}]"
        text = text.replace("%", "%%")
        hint, _ = kind_of(hints[field.name])
        if field.metadata["positional"]:
            parser.add_argument(field.name, nargs="?", metavar=field.name.upper(), help=text)
        elif hint is bool:
            parser.add_argument(flag(field.name), action="store_true", help=text)
        elif typing.get_origin(hint) is tuple and ... not in typing.get_args(hint):
            names = tuple(field.metadata["metavar"].split()) or ("MIN", "MAX")
            parser.add_argument(flag(field.name), nargs=len(typing.get_args(hint)), metavar=names, help=text)
        elif typing.get_origin(hint) is tuple:
            parser.add_argument(flag(field.name), nargs="+", metavar=field.metadata["metavar"], help=text)
        else:
            parser.add_argument(flag(field.name), metavar=field.metadata["metavar"] or None, help=text)
    return parser


def parse(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Option name -> value for the options that were typed.

    Raises:
        UserError: an option is unknown or has a wrong value.
    """
    options, _ = COMMANDS[name]
    typed, unknown = parser_for(name).parse_known_args(arguments)
    if unknown:
        known = [flag(field) for field in fields_of(options)]
        raise UserError(f"there is no option {unknown[0]}{suggestion(unknown[0].split('=')[0], known)}")
    return {key: convert(options, key, raw) for key, raw in vars(typed).items()}


def overview() -> str:
    """What `lomar --help` shows."""
    lines = [f"  {name:<17}{options.__doc__}" for name, (options, _) in COMMANDS.items()]
    return "\n".join(
        [
            f"lomar {__version__}: self-supervised vision transformers by local masked reconstruction",
            "",
            "usage: lomar COMMAND [options]      lomar COMMAND --help      lomar --version",
            "",
            *lines,
            "",
            "A first run:  lomar pretrain --data sample --out run",
        ]
    )


def command_in(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The name of the command, one word or two, and the words after it.

    Raises:
        UserError: there is no such command.
    """
    name, *rest = arguments
    if name in COMMANDS:
        return name, rest
    seconds = [known.split()[1] for known in COMMANDS if known.startswith(f"{name} ")]
    if not seconds:
        raise UserError(f"there is no command {name!r}{suggestion(name, list(COMMANDS))}; try lomar --help")
    if not rest or rest[0].startswith("-"):
        raise UserError(f"{name!r} needs a second word: lomar {name} {' or '.join(seconds)}; try lomar --help")
    if rest[0] not in seconds:
        raise UserError(f"there is no command '{name} {rest[0]}'{suggestion(rest[0], seconds)}; try lomar --help")
    return f"{name} {rest[0]}", rest[1:]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 bad input, 128 + n stopped by signal n."""
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read what is printed has gone, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 128 + signal.SIGPIPE
    return status


def _run(arguments: Sequence[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        sys.stdout.write(overview() + "\n")
        return 0
    if name in ("-V", "--version"):
        sys.stdout.write(f"lomar {__version__}\n")
        return 0
    try:
        name, rest = command_in(arguments)
        given = parse(name, rest)
        status: int = importlib.import_module(COMMANDS[name][1]).command(given)
        return status
    except UserError as error:
        _tell("error", error)
        return BAD_INPUT
    except TrainingError as error:
        _tell("failed", error)
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("lomar: interrupted\n")
        return 130
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _tell("failed", _without_memory(error, COMMANDS[name][0]))
        return 1


def program() -> NoReturn:
    """`main` as a process of its own: another Ctrl-C while it ends is not worth a traceback."""
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)


def _without_memory(error: BaseException, options: type) -> TrainingError:
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    smaller = [flag(name) for name in ("micro_batch", "batch_size") if name in fields_of(options)]
    text = f"no memory is left{f': {asked[1]} more were asked for' if asked else ''}"
    return TrainingError(f"{text}; a smaller {smaller[0]} takes less" if smaller else text)


def _tell(kind: str, error: UserError | TrainingError) -> None:
    """One line on standard error; of what all processes of a run meet with, one line of one of them."""
    try:
        launch = launched()
    except UserError:
        launch = Launch()
    torch = sys.modules.get("torch")
    begun = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    # Before the processes know each other, those of one machine see the same files.
    if launch.rank if error.shared else launch.local_rank if not begun else 0:
        return
    who = f"process {launch.rank} of {launch.count}: " if launch.rank else ""
    sys.stderr.write(f"lomar: {kind}: {who}{error}\n")


if __name__ == "__main__":
    program()
