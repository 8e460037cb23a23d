"""Claims about what is timed: it is a step of training that changes every weight, and the yardstick computes MAE."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lomar.benchmark import attention, classifier, loading, pretraining, products
from lomar.benchmark.cells import Cell
from lomar.benchmark.child import timed
from lomar.benchmark.place import Place
from lomar.benchmark.yardstick import TimmMAE
from lomar.methods.composition import Composition, TwoViewComposition
from lomar.methods.cost import trained_parameters
from lomar.methods.recipes import RECIPES
from lomar.methods.two_view import TwoView
from lomar.model.attention import BACKENDS

SMALL = {"image_size": 56, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "vocab": 0}
SMALL |= {"decoder_width": 20, "decoder_depth": 2, "decoder_heads": 5}
SMALL_VIEWS = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SMALL_VIEWS |= {"head_width": 20, "head_outputs": 28}


def small_views(name: str) -> TwoViewComposition:
    own = {"local_size": 16, "local_crops": 3} if name == "dino" else {}
    return replace(RECIPES[name].composition(name), **SMALL_VIEWS | own)


def small(name: str, **changes: Any) -> Composition:
    composition = RECIPES[name].composition(name)
    vocab = {"vocab": 17} if composition.target == "tokens" else {}
    return replace(composition, **SMALL | vocab | changes)


@pytest.fixture
def place(miniature: None) -> Place:
    return Place.found(Cell("nothing", device="cpu", precision="fp32"))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that the next steps train."""
    found: list[nn.Module] = []
    for module in (pretraining, classifier):
        updating = module.updating

        def watched(place: Place, method: nn.Module, *rest: Any, updating: Any = updating, **more: Any) -> Any:
            found.append(method)
            return updating(place, method, *rest, **more)

        monkeypatch.setattr(module, "updating", watched)
    return found


def changed_by(step: Any, model: nn.Module, steps: int = 2) -> set[str]:
    """Names of the trained weights that a few steps change, at a rate of 0.01: a table may begin to learn after one."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with pytest.MonkeyPatch.context() as patch:
        update = torch.optim.AdamW.step

        def at_rate(self: Any, *args: Any) -> Any:
            for group in self.param_groups:
                group["lr"] = 0.01
            return update(self, *args)

        patch.setattr(torch.optim.AdamW, "step", at_rate)
        for _ in range(steps):
            step()
    return {name for name, p in model.named_parameters() if name in before and not torch.equal(before[name], p)}


@pytest.mark.parametrize("name", ["lomar", "lomar-late", "mae", "beit", "timm-mae"])
def test_a_step_changes_every_weight(name: str, place: Place, trained: list[nn.Module]) -> None:
    recipe = "mae" if name == "timm-mae" else name
    composition = small(recipe, mask_layer=1 if name == "lomar-late" else 0, drop_path=0.0)
    step = pretraining.training_step(
        place,
        3,
        composition=composition.to_dict(),
        clip_grad=3.0,
        of_timm=name == "timm-mae",
        with_tokenizer=False,
    )
    weights = {each for each, p in trained[0].named_parameters() if p.requires_grad}
    # A key's bias adds the same to all logits of a query: it has no gradient but rounding.
    assert changed_by(step, trained[0]) >= {each for each in weights if not each.endswith("qkv.bias")}


def test_a_place_computes_in_the_cells_precision(miniature: None) -> None:
    found = []
    for precision in ("fp32", "bf16"):
        place = Place.found(Cell("nothing", device="cpu", precision=precision))
        layer = place.fabric.setup_module(nn.Linear(8, 8, bias=False))
        torch.nn.init.constant_(layer.weight, 1.001)
        found.append(float(layer(torch.ones(1, 8))[0, 0].detach()))
    assert found[0] == pytest.approx(8.008, abs=1e-4) and found[1] != pytest.approx(8.008, abs=1e-4)


@pytest.mark.parametrize("data", [None, "photos"])
@pytest.mark.parametrize("name", ["dino", "mocov3"])
def test_a_step_of_two_views_changes_every_weight_and_the_teacher_follows(
    name: str, data: str | None, place: Place, trained: list[nn.Module], photos: Path
) -> None:
    """Prototypes among them, which are frozen at first; the loader's batches are those of noise."""
    c = small_views(name)
    given: dict[str, Any] = {"composition": c.to_dict(), "clip_grad": 3.0, "clip_each": name == "dino"}
    step = pretraining.training_step(place, 3, **given, data=data and str(photos))
    (method,) = trained
    assert isinstance(method, TwoView)
    weights = {each for each, p in method.named_parameters() if p.requires_grad}
    followers = [p.detach().clone() for p in method.teacher.parameters()]
    assert changed_by(step, method) >= {each for each in weights if not each.endswith("qkv.bias")}
    after = list(method.teacher.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(followers, after, strict=True))
    assert method.momentum < method.momentum_at(method.step) < 1


def test_noise_is_like_the_batches_of_the_loader(place: Place, photos: Path) -> None:
    for name in ("dino", "mocov3"):
        c = small_views(name)
        method = c.build()
        made = pretraining.noise(c, method, images=3)
        read = next(pretraining._real(place, 3, c, method, str(photos), (0.2, 1.0), 0.0, 0))
        assert {key: (each.shape, each.dtype) for key, each in made.items()} == {
            key: (each.shape, each.dtype) for key, each in read.items()
        }


def test_a_step_of_beit_asks_its_tokenizer_of_openais_size(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    composition = small("beit", image_size=32)
    made = pretraining.tokenizer(composition)
    assert (made.encoder.width, made.encoder.blocks_per_group, made.vocab) == (256, 2, 17)
    assert not any(p.requires_grad for p in made.parameters())
    asked: list[tuple[int, ...]] = []
    known = pretraining.KnownTokens()
    monkeypatch.setattr(
        known, "tokens", lambda pixels: (asked.append(pixels.shape), type(known).tokens(known, pixels))[1]
    )
    monkeypatch.setattr(pretraining, "tokenizer", lambda composition: known)
    pretraining.training_step(place, 2, composition=composition.to_dict(), clip_grad=3.0)()
    assert asked == [(2, 3, 32, 32)]  # 8 pixels for each of 4x4 patches


def test_a_step_on_files_takes_the_real_pipeline(place: Place, photos: Path) -> None:
    composition = small("lomar", window_size=3, views=2)
    step = pretraining.training_step(
        place, 3, composition=composition.to_dict(), clip_grad=3.0, data=str(photos), crop_scale=(0.2, 1.0)
    )
    for _ in range(4):  # more images than there are: they recur
        step()


def test_the_yardstick_is_mae(place: Place) -> None:
    """With the weights of ours it gives our loss, and it has as many weights that are trained."""
    composition = small("mae")
    ours, theirs = composition.build(), TimmMAE(composition)
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == trained_parameters(composition)
    names = {"architecture.encoder.": "", "architecture.decoder.blocks.": "decoder_blocks."}
    names |= {"architecture.decoder.norm.": "decoder_norm.", "architecture.": "", "head.": "decoder_pred."}
    state = {}
    for name, tensor in ours.state_dict().items():
        prefix = next(prefix for prefix in names if name.startswith(prefix))
        state[names[prefix] + name.removeprefix(prefix)] = tensor
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not missing and {name.rsplit(".", 1)[-1] for name in unexpected} == {"pos_embed"}
    inputs = pretraining.noise(composition, ours, images=3)
    losses, count = theirs(**inputs)
    expected, expected_count = ours(**inputs)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    assert count == expected_count == 3 * composition.hidden


SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.mark.parametrize("name", classifier.CLASSIFIERS)
def test_a_step_of_fine_tuning_changes_every_weight(name: str, place: Place, trained: list[nn.Module]) -> None:
    step = classifier.training_step(place, 2, name=name, shape=SHAPE)
    weights = {each for each, p in trained[0].named_parameters() if p.requires_grad}
    assert changed_by(step, trained[0]) >= {each for each in weights if not each.endswith("qkv.bias")}
    classifier.feature_step(place, 2, name=name, shape=SHAPE)()


def test_the_classifiers_differ_in_their_positions_alone() -> None:
    timm, ours, bare = (
        sum(p.numel() for p in classifier.classifier(n, SHAPE).parameters()) for n in classifier.CLASSIFIERS
    )
    assert ours - bare == 2 * 8 * 50  # a table in each block
    assert timm - bare == (1 + 4 * 4) * 24  # timm's learned positions of cls and patches


@pytest.mark.parametrize("backend", [attention.NO_BIAS, *(name for name in BACKENDS if name != "fused")])
@pytest.mark.parametrize(("views", "side"), [(3, 2), (1, 5)])
def test_attention_goes_forward_and_back(backend: str, views: int, side: int, place: Place) -> None:
    step = attention.attention_step(place, 2, backend=backend, views=views, side=side, heads=3, head_width=4)
    step()
    step()


@pytest.mark.parametrize("path", [loading.LOMAR, loading.PILLOW, loading.TENSOR])
def test_a_pass_of_the_loader_reads_every_file(path: str, place: Place, photos: Path, monkeypatch: Any) -> None:
    if path != loading.LOMAR:
        pytest.importorskip("torchvision")
    read: list[int] = []
    once = loading.ImageSource.read

    def watched(self: Any, index: int) -> bytes:
        read.append(index)
        return once(self, index)

    monkeypatch.setattr(loading.ImageSource, "read", watched)
    step = loading.loading_step(place, 5, path=path, data=str(photos), image_px=112, views=2)
    step()
    step()
    assert sorted(read) == sorted(2 * list(range(5)))


def test_a_product_is_two_flops_for_each_multiplication(place: Place) -> None:
    assert products.product_flops(3) == 2 * 27
    assert products.product_step(place, 1, side=3)().shape == (3, 3)


def test_every_step_is_timed_by_itself() -> None:
    done: list[int] = []
    assert len(timed(lambda: done.append(1), 5, torch.device("cpu"))) == len(done) == 5
