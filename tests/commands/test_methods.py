"""Every method through the command line: it trains, can be resumed exactly, drawn from and loaded."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from kept import last_state

import lomar as package
from lomar.commands import settling
from lomar.interop.tokenizers import save_tokenizer
from lomar.methods.tokenizer import DiscreteVAE

# A 4 x 4 grid of patches, 8 images, 2 steps an epoch.
SMALL = (
    "--model 16x3x2 --image-size 32 --patch-size 8 --batch-size 4 --micro-batch 4 --workers 0 --precision fp32 "
    "--device cpu --base-lr 0.05 --warmup-epochs 1 --eval-every 1000"
)
WINDOWS = "--window-size 3"
METHODS = {
    "lomar": WINDOWS,
    "lomar-late": WINDOWS,  # block 10 of 12 becomes the last of three
    "mae": "--decoder-width 8 --decoder-depth 1 --decoder-heads 2",
    "beit": "--mask-min-block 2",
    "beit-lomar": f"{WINDOWS} --mask-min-block 2",
    "fig5-ape-7": WINDOWS,
    "fig5-decoder-7": f"{WINDOWS} --decoder-width 8 --decoder-depth 1 --decoder-heads 2",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    dvae = DiscreteVAE.build(channels=3, width=8, vocab=16, blocks_per_group=1, low=[0] * 3, high=[255] * 3)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.safetensors"
    save_tokenizer(path, dvae)
    return path


@pytest.fixture
def words(photos, tokenizer, miniature, no_pictures):
    """The command line of a method, but for --out."""

    def of(name: str) -> list[str | Path]:
        given = ["--tokenizer", tokenizer] if name.startswith("beit") else []
        return ["pretrain", "--data", photos, f"--method {name}", SMALL, METHODS[name], *given]

    return of


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_and_its_encoder_is_loaded(name: str, lomar, words, rows, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = lomar(*words(name), "--max-steps 2 --out", run)
    assert done.status == 0, done.err
    losses = [row["loss"] for row in rows(run) if "loss" in row]
    assert len(losses) == 2
    encoder = package.load(run)
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 16)
    assert encoder(torch.zeros(1, 3, 48, 64)).shape == (1, 16)  # any other size, without a word


@pytest.mark.parametrize("name", ["mae", "beit", "beit-lomar"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    name: str, lomar, words, course, interrupted_at, tmp_path: Path
) -> None:
    """Blocks, drop path, colours and tokens are drawn by the sample, so that nothing is lost with the process."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert lomar(*words(name), "--max-steps 4 --out", whole).status == 0
    interrupted_at(2)
    assert lomar(*words(name), "--max-steps 4 --checkpoint-steps 1 --out", parts).status == 130
    assert lomar("pretrain --resume --out", parts).status == 0
    assert course(parts) == course(whole)


def test_micro_batches_do_not_change_a_run_with_drop_path(lomar, words, course, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert lomar(*words("beit"), "--drop-path 0.5 --max-steps 2 --out", one).status == 0
    assert lomar(*words("beit"), "--drop-path 0.5 --micro-batch 1 --max-steps 2 --out", two).status == 0
    for a, b in zip(course(one), course(two), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_a_run_keeps_its_own_tokenizer(lomar, words, tokenizer: Path, tmp_path: Path) -> None:
    """The file it was given may go."""
    run, copy = tmp_path / "run", tmp_path / "copy.safetensors"
    copy.write_bytes(tokenizer.read_bytes())
    given = [copy if word == tokenizer else word for word in words("beit")]
    assert lomar(*given, "--max-steps 2 --out", run).status == 0
    copy.unlink()
    assert lomar("pretrain --resume --out", run).status == 0
    assert "target" not in " ".join(last_state(run)["model"])


def test_predicted_tokens_are_drawn_as_the_tokenizer_decodes_them(lomar, words, photos, tmp_path: Path) -> None:
    run, picture = tmp_path / "run", tmp_path / "picture.png"
    assert lomar(*words("beit-lomar"), "--max-steps 1 --out", run).status == 0
    done = lomar("reconstruct --model", run, "--images", photos / "red", "--mask-ratios 0.4 0.6 --out", picture)
    assert done.status == 0, done.err
    assert picture.exists()


REFUSED = {
    "--method bait": "--method is 'bait'; `lomar recipes` lists what there is (did you mean beit?)",
    "--method beit": "--tokenizer is missing: visual tokens need one; `lomar tokenizer train",
    "--target pixel": "--target is 'pixel'; it can be normalised-pixels, pixels, tokens (did you mean pixels?)",
    "--tokenizer x.safetensors": "--tokenizer is for --target tokens; this run predicts normalised-pixels",
    "--method mae --views 2": "--views is 2; with --window-size 0 the whole image is the one view",
    "--method mae --mask-layer 1": "--mask-layer 1 is for --architecture masked-encoder",
    "--method mae --mask blockwise": "which --architecture encoder-decoder cannot have; take --mask uniform",
    "--window-size 3 --mask blockwise --mask-layer 1": "which --mask-layer 1 cannot have; take --mask uniform",
    "--method mae --decoder-width 30 --decoder-heads 4": "--decoder-width 30 is not a multiple of --decoder-heads 4",
    "--method mae --decoder-width 6 --decoder-heads 2": "--decoder-width is 6",
    "--position sincos --model 18x2x2 --window-size 3": "needs widths that 4 divides; --model is 18x2x2",
    "--window-size 3 --decoder-width 64": "--decoder-width is for --architecture encoder-decoder, which this method",
    "--window-size 3 --mask-min-block 2": "--mask-min-block is for --mask blockwise, which this method does not have",
    "--method mae --window-layout released": "--window-layout is for windows (--window-size), which this method does",
    "--window-size 3 --mask blockwise --mask-min-block 8": "--mask-min-block 8 is more than the 7 patches",
    "--model 18x2x4": "--model '18x2x4': a width of 18 is not a multiple of 4 heads",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(typed: str, lomar, photos, miniature, tmp_path) -> None:
    run = tmp_path / "run"
    done = lomar("pretrain --data", photos, SMALL, "--max-steps 1", typed, "--out", run)
    assert done.status == 2
    assert REFUSED[typed] in done.err
    assert done.err.count("\n") == 1
    assert not run.exists()


def test_a_tokenizer_for_other_images_is_refused(lomar, words, photos, tmp_path: Path) -> None:
    dvae = DiscreteVAE.build(channels=1, width=8, vocab=16, blocks_per_group=1, low=[0], high=[255])
    save_tokenizer(tmp_path / "gray.safetensors", dvae)
    done = lomar(*words("beit"), "--tokenizer", tmp_path / "gray.safetensors", "--out", tmp_path / "run")
    assert done.status == 2
    assert "--tokenizer was made for images of 1 channels; these have 3" in done.err


def config_of(run: Path) -> dict:
    return yaml.safe_load((run / "config.yaml").read_text())


def test_a_run_killed_before_its_first_checkpoint_still_begins_with_its_init(lomar, words, course, tmp_path) -> None:
    first, run = tmp_path / "first", tmp_path / "run"
    assert lomar(*words("lomar"), "--max-steps 2 --out", first).status == 0
    assert lomar(*words("lomar"), "--seed 5 --max-steps 2 --init", first, "--out", run).status == 0
    whole = course(run)
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    assert lomar("pretrain --resume --out", run).status == 0
    assert course(run) == whole


def test_the_whole_command_may_be_repeated_to_resume(lomar, words, tmp_path: Path, monkeypatch) -> None:
    """With the paths as they were typed."""
    monkeypatch.chdir(tmp_path)
    assert lomar(*words("lomar"), "--max-steps 2 --out first").status == 0
    again = [*words("lomar"), "--max-steps 2 --init first --out run"]
    assert lomar(*again).status == 0
    done = lomar(*again, "--resume")
    assert done.status == 0, done.err


def test_a_warm_up_is_for_the_length_it_was_given_with(lomar, photos, tmp_path: Path, miniature, no_pictures) -> None:
    """40 epochs of warm-up are the paper's for 1600, and not for the two steps asked for here."""
    paper, run = tmp_path / "mae.yaml", tmp_path / "run"
    paper.write_text(lomar("recipes mae-400e").out)
    small = SMALL.replace("--warmup-epochs 1 ", "")
    done = lomar("pretrain --config", paper, "--data", photos, small, METHODS["mae"], "--max-steps 2 --out", run)
    assert done.status == 0, done.err
    assert config_of(run)["warmup_epochs"] == pytest.approx(0.025 * 2 * 4 / 8)
    done = lomar("pretrain --config", paper, "--method beit --data", photos, "--out", tmp_path / "other")
    assert done.status == 2
    assert "is of mae-400e, which --method beit would only rename" in done.err


def test_what_a_recipe_says_of_one_size_is_fitted_to_another(lomar, words, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert lomar(*words("mae"), "--window-size 3 --max-steps 1 --out", run).status == 0
    assert config_of(run)["views"] == 22  # 196 / 9: about as many patches as the whole image of the paper
    run = tmp_path / "beit"
    blocks = [word for word in words("beit") if word != METHODS["beit"]]
    assert lomar(*blocks, "--max-steps 1 --out", run).status == 0
    assert config_of(run)["mask_min_block"] == 1  # 16 of 196, of 16


def test_layer_scale_of_a_large_beit_begins_small(tokenizer, photos, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(settling, "SIZES", {"large": (16, 3, 2)})
    asked = {"method": "beit", "tokenizer": str(tokenizer), "data": str(photos), "model": "16x3x2", "out": "run"}
    sizes = {"image_size": 32, "patch_size": 8, "batch_size": 4, "max_steps": 1, "micro_batch": 4}
    assert settling.settle(asked | sizes, tmp_path / "run").options.layer_scale == 1e-5
    assert settling.settle(asked | sizes | {"layer_scale": 0.1}, tmp_path / "run").options.layer_scale == 0.1
