"""Claims about `lomar convert`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import released
import torch

import lomar as package
from lomar.interop.weights import load_most, load_reconstructor

Command = Callable[..., Any]


def saved(path: Path, state: released.State, **others: Any) -> Path:
    torch.save({"model": state, **others}, path)
    return path


@pytest.mark.parametrize("name", ["LoMaR fine-tuned", "BEiT fine-tuned", "LoMaR pretrained", "BEiT pretrained"])
def test_an_encoder_file_loads_as_what_it_came_from(name: str, lomar: Command, tmp_path: Path) -> None:
    """Its classifier too."""
    file, out = saved(tmp_path / "file.pth", released.ALL[name]()), tmp_path / "deep" / "mine.safetensors"
    outcome = lomar("convert --model", file, "--out", out)
    assert outcome.status == 0 and outcome.out.endswith(f"{out} written\n")
    made, source = package.load(out), package.load(file)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(made(images), source(images))
    assert made.pretrained_cfg == source.pretrained_cfg and made.num_classes == (10 if "fine" in name else 0)


def test_maes_classifier_of_the_cls_token_loads(lomar: Command, tmp_path: Path) -> None:
    file, out = saved(tmp_path / "file.pth", released.mae("finetune-cls")), tmp_path / "mine.safetensors"
    assert lomar("convert --model", file, "--out", out, "--heads 3").status == 0
    encoder = package.load(out)
    assert (encoder.num_classes, encoder.global_pool, encoder.blocks[0].attn.heads) == (10, "token", 3)
    assert encoder(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def test_a_folder_is_like_a_runs(lomar: Command, tmp_path: Path, photos: Path) -> None:
    """`lomar.load` and `lomar reconstruct` take it."""
    file, out = saved(tmp_path / "mae.pth", released.mae("pretrain")), tmp_path / "run"
    outcome = lomar("convert --model", file, "--out", out, "--heads 3 --decoder-heads 4")
    assert outcome.status == 0 and sorted(p.name for p in out.iterdir()) == [
        "encoder.safetensors",
        "reconstructor.safetensors",
    ]
    assert package.load(out).embed_dim == 48 and load_reconstructor(out)[1].decoder_heads == 4
    drawn = lomar("reconstruct --model", out, "--images", photos / "red", "--out", tmp_path / "figure.png")
    assert drawn.status == 0, drawn.err


def test_what_was_found_is_said(lomar: Command, tmp_path: Path) -> None:
    file = saved(tmp_path / "mae.pth", released.mae("pretrain", width=64), epoch=3, optimizer={})
    outcome = lomar("convert --model", file, "--out", tmp_path / "run", "--decoder-heads 4 --image-size 48")
    tensors = sum(t.numel() for t in released.mae("pretrain", width=64).values())
    assert outcome.out.splitlines() == [
        f"{file}: MAE, pretrained; {len(released.mae('pretrain'))} tensors, {tensors / 1e6:.1f} million numbers",
        "  encoder: 64 wide, 2 deep, 1 heads; 4-pixel patches of 3 channels, 32 px",
        "  decoder: 32 wide, 1 deep, 4 heads",
        "  left out: epoch, optimizer",
        "  note: 1 heads of width 64 are assumed, as released; --heads says otherwise",
        "  note: that it predicts normalised pixels is assumed, not in the file; --target says otherwise",
        "  resized to 48 px: pos_embed, decoder.pos_embed",
        f"{tmp_path / 'run' / 'encoder.safetensors'} and reconstructor.safetensors written",
    ]


@pytest.mark.parametrize("name", ["LoMaR pretrained", "LoMaR fine-tuned", "BEiT pretrained", "BEiT fine-tuned"])
def test_another_image_size_is_that_of_the_files(name: str, lomar: Command, tmp_path: Path) -> None:
    file, out = saved(tmp_path / "file.pth", released.ALL[name]()), tmp_path / "run"
    assert lomar("convert --model", file, "--out", out, "--image-size 48").status == 0
    encoder = package.load(out)
    source = package.load(file)
    source.set_input_size(48)
    assert encoder.pretrained_cfg["input_size"] == (3, 48, 48)
    assert all(torch.equal(tensor, source.state_dict()[key]) for key, tensor in encoder.state_dict().items())
    if "pretrained" in name:
        method, composition = load_reconstructor(out)
        assert composition.image_size == 48
        expected = method.architecture.encoder.state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in encoder.state_dict().items())


def test_windows_do_not_exceed_a_smaller_image(lomar: Command, tmp_path: Path) -> None:
    file = saved(tmp_path / "file.pth", released.lomar("pretrain"))
    assert lomar("convert --model", file, "--out", tmp_path / "run", "--image-size 16").status == 0
    assert load_reconstructor(tmp_path / "run")[1].window_size == 4


@pytest.mark.parametrize("name", ["LoMaR pretrained", "LoMaR fine-tuned", "BEiT pretrained", "BEiT fine-tuned"])
def test_there_and_back_is_the_released_file(name: str, lomar: Command, tmp_path: Path) -> None:
    state = released.ALL[name]()
    file, run, back = saved(tmp_path / "file.pth", state), tmp_path / "run", tmp_path / "back.pth"
    assert lomar("convert --model", file, "--out", run).status == 0
    outcome = lomar("convert --to official --model", run, "--out", back)
    family = name.split()[0]
    what = "the whole of pretraining" if "pretrained" in name else "the encoder"
    assert (outcome.status, outcome.out) == (
        0,
        f"{back} written: {what}, {len(state)} tensors under {family}'s names\n",
    )
    found = torch.load(back, weights_only=True)["model"]
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k], state[k]) or k == "pos_embed" for k in state)


def test_a_run_goes_out_and_comes_back(lomar: Command, finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "official.pth"
    assert lomar("convert --to official --model", finished_run, "--out", out).status == 0
    ours, _, _ = load_most(finished_run)
    back, _, _ = load_most(out)
    assert back.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(t, ours.state_dict()[k]) for k, t in back.state_dict().items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--out {tmp}/x", "--model is missing"),
        ("--model {file}", "--out is missing"),
        ("--model nowhere.pth --out {tmp}/x", "there is no file nowhere.pth"),
        ("--model {run} --out {tmp}/x", "is lomar's own already; --to official writes it under the released names"),
        ("--model {run}/encoder.safetensors --out {tmp}/x", "is lomar's own already"),
        ("--model {run}/config.yaml --out {tmp}/x", "is no checkpoint of PyTorch, which ends in .bin, .ckpt"),
        ("--model {file} --out {tmp}/x.pth", "it must end in .safetensors, or be a folder"),
        ("--model {file} --out {file}/x", "cannot be written: Not a directory"),
        ("--model {file} --out {run}", "encoder.safetensors exists already; delete it, or give another --out"),
        ("--model {file} --out {run}/encoder.safetensors", "encoder.safetensors exists already"),
        ("--model {file} --out {tmp}/x --image-size 33", "--image-size 33 is not a multiple of the patches of 4 px"),
        ("--model {file} --out {tmp}/x --image-size 4", "--image-size 4 does not do: a ratio of 0.8 hides 0 of 1"),
        ("--model {file} --out {tmp}/x --heads 4", "is for 3 heads, not 4"),
        ("--model {file} --out {tmp}/x --to mine", "--to is 'mine'; it can be lomar, official"),
        ("--model {run} --to official --out {tmp}/x", "with --to official it must end in .pth"),
        ("--model {run} --to official --out {file}", "file.pth exists already"),
        ("--model {run} --to official --out {tmp}/x.pth --heads 2", "--heads is for reading a released checkpoint"),
        ("--model nowhere --to official --out {tmp}/x.pth", "there is no run or file nowhere"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    words: str, message: str, lomar: Command, finished_run: Path, tmp_path: Path
) -> None:
    file = saved(tmp_path / "file.pth", released.lomar("pretrain"))
    before = sorted(tmp_path.iterdir())
    outcome = lomar("convert", words.format(file=file, run=finished_run, tmp=tmp_path))
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and message in outcome.err
    assert sorted(tmp_path.iterdir()) == before
