"""Claims about the files that were released. They are made from SPEC.md's lists of keys, not by us."""

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import released
import timm.data
import torch
from golden import fill, filler
from scipy.interpolate import RectBivariateSpline
from timm.layers import resample_abs_pos_embed

import lomar as package
from lomar.errors import UserError
from lomar.interop.official import Official, from_beits_names, official_state, read_official
from lomar.interop.weights import load_reconstructor
from lomar.model import Encoder
from lomar.model.positions import growth, resize_bias

Save = Callable[..., Path]
HEADS = {"heads": 3, "decoder_heads": 4}  # of the fixtures whose tensors do not tell


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write a checkpoint as the released code does: tensors under a key, and what else is there."""

    def write(state: released.State, key: str = "model", name: str = "file.pth", **others: Any) -> Path:
        torch.save({key: state, **others} if key else state, tmp_path / name)
        return tmp_path / name

    return write


def read(path: Path, name: str = "") -> Official:
    """`read_official`, with the heads where a file's name says that its tensors do not tell them."""
    return read_official(
        path, **{k: v for k, v in HEADS.items() if name.startswith(released.SILENT) and (k == "heads" or "pre" in name)}
    )


def options(**values: Any) -> argparse.Namespace:
    return argparse.Namespace(**values)


# Golden vectors, through the file.

LOGITS = {
    ("LoMaR fine-tuned", 0, 32): "-0.21113577 -0.06702526 0.17585611 -0.2839936 -0.1398831 0.10299828 -0.35685144 "
    "-0.21274094 0.03014044 0.07029073",
    ("LoMaR fine-tuned", 1, 32): "-0.06545077 -0.14706238 0.18302997 -0.13835924",
    ("LoMaR fine-tuned", 0, 64): "-0.26261373 -0.02174919 0.18040147 -0.33549985 -0.09463531 0.10751535 -0.40838597 "
    "-0.16752143 0.03462923 0.01872791",
    ("MAE fine-tuned", 0, 32): "-2.01432105 0.57156908 0.36697887 -2.08530173 0.5005884 0.2959982 -1.06476469 "
    "0.42960772 0.22501752 -1.13574537",
    ("BEiT fine-tuned", 0, 32): "-3.27102425 1.33825975 0.95053416 -3.34050786 1.74966936 0.88105054 -3.40999147 "
    "1.68018575 0.81156693 -2.94919307",
}


@pytest.mark.parametrize(("name", "image", "side_px"), LOGITS)
def test_a_fine_tuned_file_gives_the_released_codes_logits(name: str, image: int, side_px: int, save: Save) -> None:
    """H3, H4 and H5; the file rounds the weights to float32."""
    encoder = read(save(released.ALL[name]()), name).encoder.double()
    count = 1 if side_px == 64 else 2
    logits = encoder((4 * filler(count * 3 * side_px**2, j=1000)).reshape(count, 3, side_px, side_px))[image]
    expected = torch.tensor([float(word) for word in LOGITS[name, image, side_px].split()]).double()
    torch.testing.assert_close(logits[: len(expected)], expected, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("name", ["LoMaR pretrained", "MAE pretrained", "BEiT pretrained"])
def test_a_pretrained_file_gives_the_method_of_the_golden_vectors(name: str, save: Save) -> None:
    """The one that tests/methods/test_golden.py fills by our names."""
    found = read(save(released.ALL[name]()), name)
    assert found.method is not None
    expected = found.composition.build()
    fill(expected, name.split()[0].lower())
    for key, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.method.state_dict()[key], tensor, rtol=0.0, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("LoMaR pretrained", 165, 86_428_416),
        ("LoMaR fine-tuned", 163, 86_454_760),
        ("MAE pretrained", 254, 111_907_840),
        ("MAE encoder", 150, 85_798_656),
        ("MAE fine-tuned", 152, 86_567_656),
        ("BEiT pretrained", 190, 91_965_776),
        ("BEiT fine-tuned", 211, 86_530_984),
        ("DINO encoder", 150, 85_798_656),
        ("MoCo v3 encoder", 150, 85_798_656),
    ],
)
def test_the_fixtures_are_the_released_files_in_small(
    name: str, tensors: int, parameters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At base size they have as many tensors and parameters as A.11, B.1 and C count."""
    monkeypatch.setattr(
        released, "filled", lambda shapes: {k: torch.empty(v, device="meta") for k, v in shapes.items()}
    )
    monkeypatch.setattr(released, "CLASSES", 1000)
    monkeypatch.setattr(released, "VOCAB", 8192)
    base = {"width": 768, "depth": 12, "patch": 16, "image": 224}
    base |= {} if name.startswith(released.SILENT) else {"heads": 12}
    state = released.ALL[name](**base, **{"decoder_width": 512, "decoder_depth": 8} if name == "MAE pretrained" else {})
    assert len(state) == tensors
    assert sum(t.numel() for t in state.values() if t.is_floating_point()) == parameters


# Recognition and sizes.

KINDS = {
    "LoMaR pretrained": "LoMaR, pretrained",
    "LoMaR fine-tuned": "LoMaR, fine-tuned",
    "MAE pretrained": "MAE, pretrained",
    "MAE encoder": "MAE, an encoder alone",
    "MAE fine-tuned": "MAE, fine-tuned",
    "MAE fine-tuned, cls": "MAE, fine-tuned",
    "BEiT pretrained": "BEiT, pretrained",
    "BEiT fine-tuned": "BEiT, fine-tuned",
    "DINO encoder": "DINO, an encoder alone",
    "MoCo v3 encoder": "MoCo v3, an encoder alone",
}


@pytest.mark.parametrize("name", released.ALL)
@pytest.mark.parametrize("key", ["model", "module", "", "ddp"])
def test_a_file_is_recognised_wherever_its_tensors_are(name: str, key: str, save: Save) -> None:
    state = released.ALL[name]()
    if key == "ddp":
        state = {f"module.{k}": v for k, v in state.items()}
    others = {} if key == "" else {"epoch": 399, "args": options(lr=np.float64(1e-3)), "scaler": {"scale": 2.0}}
    found = read(save(state, "model" if key == "ddp" else key, **others), name)
    assert found.kind == KINDS[name]
    assert found.encoder.num_classes == (10 if "fine" in name else 0)
    assert found.encoder.global_pool == (
        "token" if name.startswith(("DINO", "MoCo")) or name.endswith("cls") else "avg"
    )
    assert (found.method is not None) == ("pretrained" in name)
    assert set(others) <= set(found.dropped) and not found.encoder.training


@pytest.mark.parametrize("name", released.ALL)
def test_every_dimension_is_read_off_the_tensors(name: str, save: Save) -> None:
    """Odd ones that are in no table; heads where tensors tell them."""
    sizes = {"width": 60, "depth": 3, "patch": 3, "channels": 5, "image": 33, "mlp": 3}
    if not name.startswith(released.SILENT):
        sizes["heads"] = 5
    if name == "MAE pretrained":
        sizes |= {"decoder_width": 20, "decoder_depth": 2}
    found = read(save(released.ALL[name](**sizes)), name)
    made = found.encoder.architecture
    image = 14 * 3 if name == "LoMaR fine-tuned" else 33  # not in that file, and 224 is no multiple of 3
    assert {k: made[k] for k in ("embed_dim", "depth", "patch_size", "in_chans", "img_size", "mlp_ratio")} == {
        "embed_dim": 60,
        "depth": 3,
        "patch_size": 3,
        "in_chans": 5,
        "img_size": image,
        "mlp_ratio": 3.0,
    }
    assert made["num_heads"] == (3 if name.startswith(released.SILENT) else 5)
    composition = found.composition
    if name == "MAE pretrained":
        decoder = composition.decoder_width, composition.decoder_depth, composition.decoder_heads
        assert decoder == (20, 2, 4)
    if name == "BEiT pretrained":
        assert (composition.vocab, composition.target) == (20, "tokens")
    with torch.inference_mode():
        assert found.encoder(torch.randn(1, 5, 33, 33)).isfinite().all()


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1024, 16), (1280, 16), (192, 3)])
def test_maes_heads_are_the_released_ones_unless_they_are_given(width: int, heads: int, save: Save) -> None:
    path = save(released.mae("encoder", width=width, depth=1, image=4, mlp=1))
    found = read_official(path)
    assert found.encoder.architecture["num_heads"] == heads
    assert f"{heads} heads of width {width // heads} are assumed" in found.notes[0]
    given = read_official(path, heads=8)
    assert given.encoder.architecture["num_heads"] == 8 and not given.notes


def test_what_the_run_was_asked_for_is_in_its_composition(save: Save) -> None:
    asked = options(norm_pix_loss=False, mask_ratio=0.6, window_size=5, num_window=8)
    found = read_official(save(released.lomar("pretrain"), args=asked))
    c = found.composition
    assert (c.target, c.mask_ratio, c.window_size, c.views) == ("pixels", 0.6, 5, 8) and not found.notes
    silent = read_official(save(released.lomar("pretrain")))
    c = silent.composition
    assert (c.target, c.mask_ratio, c.window_size, c.views) == ("normalised-pixels", 0.8, 7, 4)
    assert "that it predicts normalised pixels is assumed, not in the file" in silent.notes[0]
    told = read_official(save(released.lomar("pretrain")), target="pixels")
    assert told.composition.target == "pixels" and not told.notes


def test_beits_normalisation_is_its_runs_or_imagenets_with_a_note(save: Save) -> None:
    for flag, mean, noted in ((True, 0.485, False), (False, 0.5, False), (None, 0.485, True)):
        others = {} if flag is None else {"args": options(imagenet_default_mean_and_std=flag)}
        found = read_official(save(released.beit("pretrain"), **others))
        assert found.composition.mean[0] == mean and bool(found.notes) == noted


def test_lomars_dead_positions_are_dropped(save: Save) -> None:
    state = released.lomar("pretrain")
    found = read_official(save(state))
    other = read_official(save(state | {"pos_embed": torch.randn(1, 65, 48)}))
    assert found.encoder.pos_embed is None and found.dropped == ["pos_embed"]
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(found.encoder(images), other.encoder(images))


def test_a_half_precision_file_becomes_float32(save: Save) -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in released.beit("pretrain").items()}
    encoder = read_official(save(state)).encoder
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert torch.equal(encoder.cls_token, state["cls_token"].float())


# The way back.


@pytest.mark.parametrize("name", released.ALL)
@pytest.mark.parametrize("odd", [False, True])
def test_official_to_ours_to_official_is_the_identity(name: str, odd: bool, save: Save) -> None:
    """Names, shapes, types and values; LoMaR's dead positions and BEiT's indices are made anew."""
    state = released.ALL[name](**{"width": 36, "depth": 3, "patch": 5, "image": 35} if odd else {})
    found = read(save(state), name)
    back = official_state(found.method or found.encoder)
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert back[key].shape == tensor.shape and back[key].dtype == tensor.dtype
        torch.testing.assert_close(back[key], tensor, rtol=0.0, atol=1e-6 if key == "pos_embed" else 0.0)


def test_the_index_of_beits_tables_is_the_released_one() -> None:
    """C.1, on the 14x14 grid of the released models."""
    encoder = Encoder(224, 16, 3, 0, embed_dim=8, depth=1, num_heads=1, position="shared-bias", key_bias=False)
    index = official_state(encoder)["rel_pos_bias.relative_position_index"]
    assert index.shape == (197, 197) and index.dtype == torch.int64 and index.sum() == 14_270_119
    assert index[1, 1] == 364 and index[0, 1] == 729 and index[1, 0] == 730 and index[0, 0] == 731


@pytest.mark.parametrize("position", ["shared-bias", "block-bias"])
def test_beits_names_become_ours_again(position: str) -> None:
    """And a name that is nobody's stays, so that loading can complain of it."""
    encoder = Encoder(
        15, 5, 3, 7, embed_dim=8, depth=2, num_heads=2, position=position, key_bias=False, init_values=0.1
    )
    state = {name: t for name, t in official_state(encoder).items() if not name.endswith("relative_position_index")}
    assert set(state) != set(encoder.state_dict())
    ours = from_beits_names(state | {"odd": torch.zeros(1)}, encoder)
    assert set(ours) == {*encoder.state_dict(), "odd"}
    assert all(torch.equal(ours[name], tensor) for name, tensor in encoder.state_dict().items())


def test_a_method_that_is_no_released_one_goes_out_as_its_encoder(save: Save) -> None:
    """Windows, ratios and the layer of the mask tokens are no tensors; a decoder is."""
    import dataclasses

    c = read_official(save(released.lomar("pretrain"))).composition
    late = dataclasses.replace(c, mask_layer=1, window_size=3).build()
    assert official_state(late).keys() == released.lomar("pretrain").keys()
    decoder = {"decoder_width": 20, "decoder_depth": 1, "decoder_heads": 5}
    decoded = dataclasses.replace(c, architecture="encoder-decoder", **decoder).build()
    lost = {"mask_token", "encoder_pred.weight", "encoder_pred.bias"}
    assert official_state(decoded).keys() == released.lomar("pretrain").keys() - lost


def test_what_fine_tuning_lacks_of_our_runs_is_what_it_lacks_of_lomars(save: Save) -> None:
    """A.10: the released code takes a checkpoint whose missing keys are exactly these."""
    ours = official_state(read_official(save(released.lomar("pretrain"))).composition.build())
    missing = released.lomar("finetune").keys() - ours.keys()
    assert missing == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"position": "none"}, "no released code has position 'none'"),
        ({"init_values": 0.1}, "LoMaR's code has contextual position in a transformer that has a key bias"),
        ({"position": "shared-bias"}, "BEiT's code has shared-bias position in a transformer that has no key bias"),
        ({"img_size": (16, 32)}, "takes square images alone, not 4x8 patches"),
    ],
)
def test_what_no_released_code_could_read_is_not_written(made: dict[str, Any], message: str) -> None:
    encoder = Encoder(**{"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 1, "num_heads": 3} | made)
    with pytest.raises(UserError, match=message):
        official_state(encoder)


# Other image sizes.


@pytest.mark.parametrize(("old", "new", "q"), [(27, 47, 1.090307), (27, 55, 1.114428), (13, 27, 1.307619)])
def test_beits_places_grow_as_the_released_ones(old: int, new: int, q: float) -> None:
    """C.6."""
    assert growth(old, new) == pytest.approx(q, abs=1e-6)


@pytest.mark.parametrize(("grid", "new"), [(14, 24), (7, 14), (8, 11)])
def test_beits_tables_are_resized_by_cubic_splines_on_geometric_places(grid: int, new: int) -> None:
    """C.6, by scipy's spline of two variables, with places from q found by bisection here."""
    old_side, side = 2 * grid - 1, 2 * new - 1
    low, high = 1.01, 1.5
    for _ in range(80):
        q = (low + high) / 2
        low, high = (low, q) if sum(q**i for i in range(old_side // 2)) > side // 2 else (q, high)
    steps = np.cumsum([q**i for i in range(old_side // 2)])
    places = np.concatenate([-steps[::-1], [0.0], steps])
    table = torch.randn(old_side**2 + 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(grid))
    wanted = np.arange(-(side // 2), side // 2 + 1)
    resized = resize_bias(table, (grid, grid), (new, new))
    assert torch.equal(resized[-3:], table[-3:])
    for head in range(2):
        spline = RectBivariateSpline(places, places, table[:-3, head].reshape(old_side, old_side).numpy(), s=0)
        expected = torch.from_numpy(spline(wanted, wanted)).flatten()
        torch.testing.assert_close(resized[:-3, head], expected, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("stage", ["encoder", "finetune"])
def test_maes_positions_are_resized_as_timm_does(stage: str, save: Save) -> None:
    state = released.mae(stage)
    encoder = read_official(save(state), heads=3).encoder
    encoder.set_input_size(48)
    expected = resample_abs_pos_embed(state["pos_embed"], [12, 12], num_prefix_tokens=1, antialias=False)
    torch.testing.assert_close(encoder.pos_embed.detach(), expected, rtol=0.0, atol=1e-6)


# `lomar.load`.


@pytest.mark.parametrize("name", ["LoMaR pretrained", "LoMaR fine-tuned", "BEiT pretrained", "BEiT fine-tuned"])
def test_load_takes_released_files(name: str, save: Save) -> None:
    encoder = package.load(save(released.ALL[name]()))
    classes = 10 if "fine" in name else 0
    config = timm.data.resolve_model_data_config(encoder)
    side = 224 if name == "LoMaR fine-tuned" else 32
    assert config["mean"] == (0.485, 0.456, 0.406) and config["input_size"] == (3, side, side)
    assert encoder.num_classes == encoder.pretrained_cfg["num_classes"] == classes and not encoder.training
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, classes or 48)
    encoder.reset_classifier(7)
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_maes_file_whose_heads_cannot_be_told_says_how_to_tell_them(save: Save) -> None:
    with pytest.raises(UserError, match="heads cannot be told from its tensors; `lomar convert --heads N` takes them"):
        package.load(save(released.mae("encoder")))
    with pytest.raises(UserError, match="MoCo v3, an encoder alone, but its heads cannot be told from its tensors"):
        package.load(save(released.moco()))


def test_a_reconstructor_comes_from_a_released_file_if_it_has_one(save: Save) -> None:
    method, composition = load_reconstructor(save(released.lomar("pretrain")))
    assert composition.method == "lomar" and method.head.out_features == 48
    with pytest.raises(UserError, match="holds LoMaR, fine-tuned: without mask token and head nothing can be"):
        load_reconstructor(save(released.lomar("finetune")))


# What is refused.

LOMAR, MAE, BEIT = released.lomar("pretrain"), released.mae("pretrain"), released.beit("pretrain")
RPE = "blocks.0.attn.rpe_k.lookup_table_weight"
TABLE = "rel_pos_bias.relative_position_bias_table"
REFUSED = {
    "something else": (
        {"conv.weight": torch.zeros(3)},
        "no checkpoint of LoMaR, MAE, BEiT, DINO or MoCo v3: of its 1 tensors",
    ),
    "lomar's own": ({"architecture.mask_token": torch.zeros(3)}, "a checkpoint of lomar itself; give the folder"),
    "LoMaR and BEiT": (
        LOMAR | {TABLE: BEIT[TABLE]},
        f"mixes the weights of two models: {RPE} is LoMaR's, {TABLE} is not",
    ),
    "LoMaR and MAE": (LOMAR | {"decoder_pred.weight": torch.zeros(1, 1)}, "LoMaR's, decoder_pred.weight is not"),
    "MAE and LoMaR": (
        released.without(LOMAR, [k for k in LOMAR if "rpe" in k]),
        "mixes the weights of two models: pos_embed is MAE's, encoder_pred.weight is not",
    ),
    "both ends": (LOMAR | {"head.weight": torch.zeros(10, 48)}, "it has encoder_pred.weight and head.weight"),
    "no tensor": (released.without(LOMAR, ["norm.bias"]), "LoMaR, pretrained, but it has no norm.bias"),
    "no tables": (released.without(MAE, ["decoder_pos_embed"]), "it has no decoder_pos_embed"),
    "no block": (released.without(MAE, [k for k in MAE if "s.0." in k]), "it has no blocks.0"),
    "one more": (BEIT | {"pos_embed": torch.zeros(1, 65, 48)}, "BEiT, pretrained, but pos_embed does not belong to it"),
    "two more": (
        BEIT | {"pos_embed": torch.zeros(1, 65, 48), "dist_token": torch.zeros(1)},
        "pos_embed does not belong to it, and 1 more do not fit",
    ),
    "shape": (
        LOMAR | {"norm.bias": torch.zeros(40)},
        "its norm.bias has shape (40,), with (48,) expected",
    ),
    "rpe of 49": (
        LOMAR | {"blocks.1.attn.rpe_k.lookup_table_weight": torch.zeros(1, 16, 49)},
        "its blocks.1.attn.rpe_k.lookup_table_weight has shape (1, 16, 49), with (1, 16, 50) expected",
    ),
    "two rpes in one": (LOMAR | {RPE: torch.zeros(2, 16, 50)}, f"its {RPE} has shape (2, 16, 50)"),
    "rpe that divides nothing": (LOMAR | {RPE: torch.zeros(1, 17, 50)}, f"its {RPE} is for heads of width 17"),
    "no square": (MAE | {"pos_embed": torch.zeros(1, 66, 48)}, "its pos_embed has 65 places, which are no square"),
    "no grid": (BEIT | {TABLE: torch.zeros(19, 3)}, f"its {TABLE} has 19 rows, which is (2 n - 1)^2 + 3 for no grid"),
    "scalar": (LOMAR | {"patch_embed.proj.weight": torch.zeros(())}, "its patch_embed.proj.weight has shape ()"),
    "patches not square": (
        LOMAR | {"patch_embed.proj.weight": torch.zeros(48, 3, 4, 5)},
        "its patch_embed.proj.weight has shape (48, 3, 4, 5), with (48, 3, 4, 4) expected",
    ),
    "ours beside theirs": (LOMAR | {"blocks.0.attn.rpe.table": torch.zeros(16, 50)}, "rpe.table does not belong to it"),
    "no weights": ({"a": 1}, "holds no weights: tensors by name"),
    "nothing": ({}, "holds no weights: tensors by name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_unknown_or_mixed_up_file_is_one_line_that_names_the_key(case: str, save: Save) -> None:
    state, message = REFUSED[case]
    path = save(state)
    with pytest.raises(UserError) as caught:
        read_official(path, heads=3)
    told = str(caught.value)
    assert message in told and str(path) in told and "\n" not in told


def test_options_that_contradict_the_file_are_refused(save: Save) -> None:
    for state, given, message in (
        (LOMAR, {"heads": 4}, f"its {RPE} is for 3 heads, not 4"),
        (BEIT, {"heads": 4}, f"its {TABLE} is for 3 heads, not 4"),
        (MAE, {"heads": 5}, "--heads 5 does not divide its width of 48"),
        (MAE, {"heads": 3, "decoder_heads": 5}, "--decoder-heads 5 does not divide its width of 32"),
        (LOMAR, {"decoder_heads": 4}, "it has no decoder, so --decoder-heads means nothing"),
        (BEIT, {"target": "pixels"}, "it does not predict pixels, so --target means nothing"),
    ):
        with pytest.raises(UserError, match=message.replace("(", r"\(")):
            read_official(save(state), **given)


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_refused_and_nothing_runs(save: Save, tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(Harmful(harm), protocol=2))
    (tmp_path / "old.pkl").write_bytes(pickle.dumps(Harmful(harm), protocol=0))
    for path in (
        save(LOMAR, optimizer=Harmful(harm)),
        save({"pos_embed": Harmful(harm)}, name="inside.pth"),
        tmp_path / "bare.pkl",
        tmp_path / "old.pkl",
    ):
        with pytest.raises(UserError) as caught:
            package.load(path)
        assert "\n" not in str(caught.value) and path.name in str(caught.value)
    with pytest.raises(UserError, match=r"holds \w+\.mkdir, a Python object that could run code, and is not read"):
        package.load(save(LOMAR, optimizer=Harmful(harm)))
    assert not harm.exists()


def test_a_damaged_file_is_one_line(save: Save, tmp_path: Path) -> None:
    whole = save(LOMAR).read_bytes()
    torch.save({"model": LOMAR}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.pth").read_bytes()
    assert read_official(tmp_path / "old.pth").kind == "LoMaR, pretrained"
    for name, content in {
        "half.pth": whole[: len(whole) // 2],
        "old_half.pth": old[: len(old) // 2],
        "text.pth": b"hello",
        "empty.pth": b"",
        "no_name": whole[: len(whole) // 2],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            package.load(tmp_path / name)
        told = str(caught.value)
        assert "is no whole checkpoint of PyTorch: cut short, damaged or something else" in told and "\n" not in told
    with pytest.raises(UserError, match=r"there is no run or file .*nowhere\.pth"):
        package.load(tmp_path / "nowhere.pth")
