"""Claims about the command line itself: help, wrong words, exit status, and what is not imported."""

import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lomar import __version__
from lomar.cli import COMMANDS, main, parse, program
from lomar.errors import TrainingError, UserError
from lomar.options import fields_of, flag

# The names that issue 2 fixes; other commands are judged by their options class alone.
INTERFACE = {
    "pretrain": (
        "--data --out --method --model --image-size --patch-size --window-size --views --mask-ratio --mask-layer "
        "--crop-scale --window-layout --epochs --max-steps --warmup-epochs --batch-size --micro-batch --base-lr "
        "--weight-decay --workers --precision --device --seed --checkpoint-steps --log-every --eval-data --config "
        "--resume --overwrite"
    ),
    "reconstruct": "--model --images --out --mask-ratios --seed",
}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS) and "lomar pretrain --data sample" in out


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lomar {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option_of_the_interface(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([*name.split(), "--help"])
    assert done.value.code == 0
    arguments, options = re.split(r"^options:$", capsys.readouterr().out, flags=re.M)
    fields = fields_of(COMMANDS[name][0]).values()
    named = {flag(field.name) for field in fields if not field.metadata["positional"]}
    assert set(INTERFACE.get(name, "").split()) <= named
    for text, names in (
        (options, named),
        (arguments, [field.name.upper() for field in fields if field.metadata["positional"]]),
    ):
        for option in names:
            # It begins a line, stands alone or before its value, and has a text.
            assert re.search(rf"^  {option}( [A-Z][^\n]*?)?(\n)? {{2,}}\w", text, flags=re.M), option


def test_help_says_what_is_chosen_when_an_option_is_not_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for text in (
        "tiny, small, base, large, huge, or WIDTHxDEPTHxHEADS [chosen from the data and the hardware]",
        "independent, released [lomar: independent]",
        "[lomar: 0.2 1]",
        "AdamW's weight decay [lomar, mae, beit: 0.05; dino: 0.04; mocov3: 0.1]",
    ):
        assert text in out


def test_help_and_import_load_neither_torch_nor_timm() -> None:
    code = """
import sys, lomar
from lomar.cli import main
from lomar.cli import COMMANDS
for arguments in ([], ["--help"], *([*name.split(), "--help"] for name in COMMANDS), ["pretrian"]):
    try:
        main(arguments)
    except SystemExit:
        pass
heavy = {"torch", "timm", "numpy", "PIL", "matplotlib"} & set(sys.modules)
sys.exit(f"loaded {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_module_runs_as_the_command_and_hands_on_its_status() -> None:
    done = subprocess.run([sys.executable, "-m", "lomar", "pretrian"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("lomar: error: there is no command 'pretrian' (did you mean pretrain?); try lomar --help\n")


def test_the_installed_command_is_main_and_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C, while the process ends, has the system's handler: no traceback of Python's."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"lomar": "lomar.cli:program"}
    monkeypatch.setattr("lomar.cli.main", lambda: 130)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as done:
            program()
        assert (done.value.code, signal.getsignal(signal.SIGINT)) == (130, signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--batch-sise 3", "there is no option --batch-sise (did you mean --batch-size?)"),
        ("--bat 3", "there is no option --bat (did you mean --batch-size?)"),
        ("--bat=3", "there is no option --bat=3 (did you mean --batch-size?)"),
        ("--zzz", "there is no option --zzz"),
        ("photos", "there is no option photos"),
        ("--batch-size", "argument --batch-size: expected one argument"),
        ("--crop-scale 0.5", "argument --crop-scale: expected 2 arguments"),
        ("--batch-size x", "--batch-size is 'x'; it must be a whole number, at least 1"),
        ("--batch-size 2.5", "--batch-size is '2.5'; it must be a whole number, at least 1"),
        ("--batch-size 0", "--batch-size is '0'; it must be a whole number, at least 1"),
        ("--epochs 0", "--epochs is '0'; it must be a number, above 0"),
        ("--epochs nan", "--epochs is 'nan'; it must be a number, above 0"),
        ("--epochs inf", "--epochs is 'inf'; it must be a number, above 0"),
        ("--max-steps 0", "--max-steps is '0'; it must be a whole number, at least 1"),
        ("--mask-ratio 0", "--mask-ratio is '0'; it must be a number, above 0 and below 1"),
        ("--mask-ratio 1", "--mask-ratio is '1'; it must be a number, above 0 and below 1"),
        ("--mask-ratio nan", "--mask-ratio is 'nan'; it must be a number, above 0 and below 1"),
        ("--mask-layer -1", "--mask-layer is '-1'; it must be a whole number, at least 0"),
        ("--seed -1", "--seed is '-1'; it must be a whole number, at least 0"),
        ("--seed 4294967296", "--seed is '4294967296'; it must be a whole number, at most 4,294,967,295"),
        ("--crop-scale 0 1", "--crop-scale is '0'; it must be a number, above 0 and at most 1"),
        (
            "--model tinny",
            "--model 'tinny' is no size; it can be tiny, small, base, large, huge, or WIDTHxDEPTHxHEADS such as "
            "768x12x12 (did you mean tiny?)",
        ),
        ("--model 13x2x3", "--model '13x2x3': a width of 13 is not a multiple of 3 heads"),
        ("--mask unifrm", "--mask is 'unifrm'; it can be uniform, uniform-kept, blockwise (did you mean uniform?)"),
        ("--betas 0.9", "argument --betas: expected 2 arguments"),
        ("--betas 0.9 1", "--betas is '1'; it must be a number, at least 0 and below 1"),
        ("--precision fp16", "--precision is 'fp16'; it can be auto, fp32, bf16 (did you mean bf16?)"),
        ("--resume=yes", "argument --resume: ignored explicit argument 'yes'"),
    ],
)
def test_a_wrong_word_is_one_line_and_status_2(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["pretrain", "--data", "sample", "--out", str(out), *words.split()]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"lomar: error: {message}\n")
    assert not out.exists()


def test_values_reach_the_command_with_their_types() -> None:
    words = "--out run --views 3 --base-lr 1e-3 --crop-scale 0.1 0.9 --mean 0.5 --resume"
    typed = parse("pretrain", words.split())
    assert typed == {
        "out": "run",
        "views": 3,
        "base_lr": 1e-3,
        "crop_scale": (0.1, 0.9),
        "mean": (0.5,),
        "resume": True,
    }


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (UserError("no"), 2, "lomar: error: no\n"),
        (TrainingError("no"), 1, "lomar: failed: no\n"),
        (KeyboardInterrupt(), 130, "lomar: interrupted\n"),
        (MemoryError(), 1, "lomar: failed: no memory is left; a smaller --micro-batch takes less\n"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to "
                "allocate 4000 bytes. Error code 12 (Cannot allocate memory)"
            ),
            1,
            "lomar: failed: no memory is left: 4000 bytes more were asked for; a smaller --micro-batch takes less\n",
        ),
    ],
)
def test_each_kind_of_failure_has_its_status(
    error: BaseException,
    status: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import lomar.commands.pretrain

    def fail(given: object) -> int:
        raise error

    monkeypatch.setattr(lomar.commands.pretrain, "command", fail)
    assert main(["pretrain"]) == status
    assert capsys.readouterr().err == text


def test_a_reader_that_goes_away_is_no_error() -> None:
    """As in `lomar recipes | head -1`."""
    code = "import sys; from lomar.cli import main; sys.exit(main(['--help']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # before anything is written
        assert process.stderr.read() == b"" and process.wait() == 128 + signal.SIGPIPE
