"""Claims about DINO and MoCo v3: their losses, what learns, what follows, and what tells a collapse."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lomar.data.loader import SampleKey
from lomar.methods.composition import TwoViewComposition
from lomar.methods.distortion import WIDTH, distort
from lomar.methods.heads import PrototypeHead, batch_normed_mlp
from lomar.methods.recipes import RECIPES
from lomar.methods.two_view import DINO, MoCoV3, TwoView
from lomar.training.optim import adamw

SMALL = {"model": "16x2x2", "image_size": 28, "patch_size": 7, "batch_size": 4, "head_width": 11, "head_outputs": 13}
LOCAL = {"local_crops": 3, "local_size": 14}


def made(method: str, **changes: Any) -> TwoView:
    recipe = RECIPES[method]
    values = {"method": method, "mean": (0.5,) * 3, "std": (0.25,) * 3} | dict(recipe.full) | dict(recipe.options)
    values |= SMALL | (LOCAL if method == "dino" else {}) | changes
    composition = recipe.compose(values, 0, scale=255.0)
    assert isinstance(composition, TwoViewComposition)
    torch.manual_seed(0)
    return composition.build()


def batch(method: TwoView, images: int = 4, first: int = 0) -> dict[str, Tensor]:
    draws = [method.draw(seed=0)(SampleKey(0, index, 0, index)) for index in range(first, first + images)]
    inputs = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
    chance = torch.Generator().manual_seed(first)
    inputs["crops"] = torch.randint(0, 256, (images, 2, 3, 28, 28), dtype=torch.uint8, generator=chance)
    if isinstance(method, DINO):
        inputs["local_crops"] = torch.randint(0, 256, (images, 3, 3, 14, 14), dtype=torch.uint8, generator=chance)
    return inputs


def learnt(method: TwoView, steps: int, lr: float = 1e-2) -> list[dict[str, float]]:
    """Some steps as the training loop makes them; the numbers of each."""
    optimizer = adamw(method, 0.0, (0.9, 0.95))
    method.set_course(steps, steps_per_epoch=5)
    found = []
    for step in range(steps):
        method.begin(step)
        losses, count = method(**batch(method, first=4 * step))
        (losses / count).backward()
        method.before_update()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        found.append({name: float(each) for name, each in method.after_update().items()})
    return found


def test_dinos_loss_of_three_vectors_is_that_worked_out_by_hand() -> None:
    """Two large crops and a small one, two prototypes. Centre (0.1, 0); both temperatures such that odds are simple.

    Teacher: outputs (0.1 + T ln 3, 0) and (0.1, 0) -> (3/4, 1/4) and (1/2, 1/2). Student: t ln of (1/2, 1/2),
    (1/5, 4/5), (1/4, 3/4). Pairs of different crops: first large with second and small, second with first and small.
    """
    method = made("dino", teacher_temperature=(0.5, 0.5), temperature=0.25)
    assert isinstance(method, DINO)
    method.centre = torch.tensor([[0.1, 0.0]])
    teacher = torch.tensor([[[0.1 + 0.5 * math.log(3), 0.0], [0.1, 0.0]]])
    student = 0.25 * torch.tensor([[[0.5, 0.5], [0.2, 0.8], [0.25, 0.75]]]).log()
    expected = -(
        (0.75 * math.log(0.2) + 0.25 * math.log(0.8))
        + (0.75 * math.log(0.25) + 0.25 * math.log(0.75))
        + math.log(0.5)
        + (0.5 * math.log(0.25) + 0.5 * math.log(0.75))
    )
    loss, entropy = method.loss(teacher, student)
    torch.testing.assert_close(loss, torch.tensor([expected / 4]))
    torch.testing.assert_close(entropy, torch.tensor([[0.75 * math.log(4 / 3) + 0.25 * math.log(4), math.log(2)]]))


def test_mocos_loss_of_three_vectors_is_that_worked_out_by_hand() -> None:
    """Queries along axes at any length; keys along the first, the first, the second. Cosines 1 or 0, T = 1 / ln 2."""
    method = made("mocov3", temperature=1 / math.log(2))
    assert isinstance(method, MoCoV3)
    query = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
    key = torch.tensor([[1.0, 0.0], [5.0, 0.0], [0.0, 0.5]])
    loss, entropy = method.loss(query, key)
    # softmax over 2^cosine: (2, 2, 1) / 5 with its own 2; (1, 1, 2) / 4 with its own 1; (1, 1, 2) / 4 with its own 2
    expected = torch.tensor([2 / 5, 1 / 4, 2 / 4]).log() * -2 / math.log(2)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(entropy[1], torch.tensor(2 * 0.25 * math.log(4) + 0.5 * math.log(2)))


def views(method: TwoView, inputs: dict[str, Tensor], kind: str, place: int, at: int) -> tuple[Tensor, Tensor]:
    """One crop of every image as the encoder gets it, and its numbers for drop path."""
    unit = inputs[kind][:, place].float() / 255
    seen = (distort(unit, inputs["distortions"][:, at]) - 0.5) / 0.25
    return seen, inputs["paths"][:, at]


def test_a_forward_pass_of_dino_is_every_crop_by_itself() -> None:
    """Each crop with its own distortion and drop path; the teacher has none, and no small crops."""
    method = made("dino", drop_path=0.5)
    assert isinstance(method, DINO)
    inputs = batch(method, images=3)
    student, teacher = [], []
    for at in range(5):
        kind, place = ("crops", at) if at < 2 else ("local_crops", at - 2)
        seen, paths = views(method, inputs, kind, place, at)
        student.append(method.student.head(method.student.encoder.forward_features(seen, paths)[:, 0]))
        if at < 2:
            teacher.append(method.teacher.head(method.teacher.encoder.forward_features(seen)[:, 0]))
    expected, _ = method.loss(torch.stack(teacher, dim=1).detach(), torch.stack(student, dim=1))
    torch.testing.assert_close(method(**inputs)[0], expected.sum())


def test_a_forward_pass_of_moco_compares_each_crop_with_the_keys_of_the_other() -> None:
    method = made("mocov3", drop_path=0.5)
    assert isinstance(method, MoCoV3)
    inputs = batch(method, images=5)
    with torch.no_grad():
        for weight in method.teacher.parameters():
            weight.add_(0.05 * torch.randn(weight.shape))  # so that keys are not the student's
    queries, keys = [], []
    for at in (0, 1):
        seen, paths = views(method, inputs, "crops", at, at)
        features = method.student.encoder.forward_features(seen, paths)[:, 0]
        queries.append(method.predictor(method.student.head(features)))
        keys.append(method.teacher.head(method.teacher.encoder.forward_features(seen)[:, 0]).detach())
    expected = method.loss(queries[0], keys[1])[0] + method.loss(queries[1], keys[0])[0]
    torch.testing.assert_close(method(**inputs)[0], expected.sum())


def test_crops_are_distorted_as_their_kind_is() -> None:
    """SPEC D: blurred are all first crops, a tenth of the second and half of the small; solarised are second ones."""
    first, second, *small = made("dino", color_jitter=0.3).distortions
    assert (first.blur, second.blur) == (1.0, 0.1) and {each.blur for each in small} == {0.5} and len(small) == 3
    assert (first.solarize, second.solarize) == (0.0, 0.2) and {each.solarize for each in small} == {0.0}
    assert {(each.jitter, each.gray, each.size_px) for each in (first, second, *small)} == {(0.3, 0.2, 28)}


def test_floats_have_no_white_that_bounds_them() -> None:
    recipe = RECIPES["mocov3"]
    values = {"method": "mocov3", "mean": (0.0,), "std": (1.0,)} | dict(recipe.full) | dict(recipe.options) | SMALL
    method = recipe.compose(values, 0, scale=1.0).build()
    assert isinstance(method, TwoView)
    plain = torch.zeros(1, 2, WIDTH)
    plain[..., :4] = torch.arange(4.0)
    plain[..., 4:7] = 1
    bright = 100 * torch.rand(1, 2, 1, 28, 28)
    torch.testing.assert_close(method.seen(bright, plain), bright[0])


def test_heads_of_dino_begin_as_in_its_code() -> None:
    head = PrototypeHead(200, 300, 50, bottleneck=64)
    for layer in head.mlp:
        if isinstance(layer, nn.Linear):
            assert abs(float(layer.weight.std()) - 0.02) < 0.001 and not layer.bias.any()
    assert abs(float(head.prototypes.abs().max()) - 64**-0.5) < 0.01  # torch's own, uniform


@pytest.mark.parametrize("name", ["dino", "mocov3"])
def test_every_trained_parameter_gets_a_gradient_and_no_other(name: str) -> None:
    method = made(name, drop_path=0.0)
    losses, _ = method(**batch(method))
    losses.backward()
    trained = {n for n, p in method.named_parameters() if p.requires_grad}
    with_gradient = {n for n, p in method.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    # what a batch norm takes away again, and keys' biases, which a softmax does not see, learn from rounding alone
    assert with_gradient == trained
    assert not any(n.startswith("teacher.") for n in trained)
    frozen = {n for n in trained if "patch_embed" in n}
    assert bool(frozen) == (name == "dino")


@pytest.mark.parametrize("name", ["dino", "mocov3"])
def test_the_teacher_moves_by_the_average_alone(name: str) -> None:
    """By m t + (1 - m) s of the weights it follows; DINO after the update, MoCo v3 before the keys."""
    method = made(name, momentum=0.75)
    method.set_course(8, steps_per_epoch=8)
    optimizer = adamw(method, 0.0, (0.9, 0.95))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for step in range(3):
        before = copy.deepcopy(dict(method.teacher.named_parameters()))
        leading = copy.deepcopy(dict(method.student.named_parameters()))
        method.begin(step)
        losses, _ = method(**batch(method))
        losses.backward()
        optimizer.step()
        optimizer.zero_grad()
        if name == "dino":
            leading = copy.deepcopy(dict(method.student.named_parameters()))
        method.after_update()
        m = 1 - 0.25 * (1 + math.cos(math.pi * step / 8)) / 2
        for key, weight in method.teacher.named_parameters():
            torch.testing.assert_close(weight, m * before[key] + (1 - m) * leading[key])
    pairs = zip(method.teacher.parameters(), method.student.parameters(), strict=True)
    assert any(not torch.equal(own, followed) for own, followed in pairs)


def test_the_momentum_rises_from_its_start_to_one() -> None:
    method = made("dino", momentum=0.9)
    method.set_course(10, steps_per_epoch=5)
    assert method.momentum_at(0) == pytest.approx(0.9)
    assert method.momentum_at(5) == pytest.approx(0.95)
    assert method.momentum_at(10) == pytest.approx(1.0)


def test_both_begin_as_one_and_dino_gives_the_teacher_away_moco_the_learner() -> None:
    for name in ("dino", "mocov3"):
        method = made(name)
        for own, followed in zip(method.student.parameters(), method.teacher.parameters(), strict=True):
            assert torch.equal(own, followed)
        assert method.encoder is (method.teacher if name == "dino" else method.student).encoder
        assert method.teacher.encoder.drop_path_rate == 0


def test_the_centre_is_the_average_of_the_teachers_outputs_whatever_the_micro_batches() -> None:
    whole, parts = made("dino", drop_path=0.0), made("dino", drop_path=0.0)
    assert isinstance(whole, DINO) and isinstance(parts, DINO)
    inputs = batch(whole)
    with torch.no_grad():
        large = whole.seen(inputs["crops"], inputs["distortions"][:, :2])
        mean = whole.teacher.head(whole.teacher.features(large)).mean(dim=0, keepdim=True)
    losses = whole(**inputs)[0]
    in_parts = sum(parts(**{n: each[i : i + 2] for n, each in inputs.items()})[0] for i in (0, 2))
    torch.testing.assert_close(losses, in_parts)
    numbers = [method.after_update() for method in (whole, parts)]
    torch.testing.assert_close(whole.centre, 0.1 * mean)
    torch.testing.assert_close(parts.centre, whole.centre)
    torch.testing.assert_close(numbers[0], numbers[1])


def test_a_micro_batch_bounds_what_goes_through_the_encoder_and_changes_nothing() -> None:
    """MoCo v3 compares a whole batch: pieces of it are worked out again in the backward pass, and give its gradient."""
    gradients = []
    for at_once in (0, 3):
        method = made("mocov3", drop_path=0.3)
        method.at_once = at_once
        losses, _ = method(**batch(method, images=8))
        losses.backward()
        gradients.append({n: p.grad for n, p in method.named_parameters() if p.grad is not None})
    # Of some weights the gradient is rounding alone, and as large as the processor makes it.
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dino", "mocov3"])
def test_a_loss_is_not_rounded_where_products_are(name: str) -> None:
    """What the towers make is bfloat16's; the loss of it is float32's, to the last digits."""
    method = made(name)
    views = (2, 5) if name == "dino" else ()
    first, second = (torch.randn(6, *((views[i],) if views else ()), 13).bfloat16() for i in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = method.loss(first, second)
    for found, expected in zip(rounded, method.loss(first.float(), second.float()), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_teachers_temperature_rises_over_its_epochs_and_stays() -> None:
    method = made("dino", teacher_temperature=(0.04, 0.08), teacher_temperature_epochs=2)
    assert isinstance(method, DINO)
    method.set_course(100, steps_per_epoch=10)
    found = []
    for step in (0, 5, 10, 20, 99):
        method.begin(step)
        found.append(method.sharpness)
    assert found == pytest.approx([0.04, 0.05, 0.06, 0.08, 0.08])


@pytest.mark.parametrize("unit", ["yes", "no"])
def test_prototypes_stay_as_they_are_while_they_are_frozen(unit: str) -> None:
    method = made("dino", freeze_last_layer=0.5, norm_last_layer=unit)
    head = method.student.head
    assert isinstance(head, PrototypeHead)
    watched = [head.prototypes] if head.lengths is None else [head.prototypes, head.lengths]
    assert len(watched) == 1 + (unit == "no")
    began = copy.deepcopy(watched)
    method.set_course(4, steps_per_epoch=4)
    optimizer = adamw(method, 0.1, (0.9, 0.95))
    for step in range(3):
        method.begin(step)
        method(**batch(method))[0].backward()
        method.before_update()
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.step()
        optimizer.zero_grad()
        method.after_update()
        assert [torch.equal(*pair) for pair in zip(began, watched, strict=True)] == [step < 2] * len(watched)


def test_the_numbers_tell_spread_features_from_equal_ones() -> None:
    """Of unit vectors along axes, each channel varies as much as it can; equal ones do not vary."""
    method = made("dino")
    method.accumulate(torch.cat([torch.eye(16), -torch.eye(16)]), torch.full((32,), 2.0))
    found = TwoView.after_update(method)
    assert float(found["feature_deviation"]) == pytest.approx(1.0)
    assert float(found["output_entropy"]) == 2.0
    method.accumulate(torch.ones(5, 16), torch.tensor([1.0, 3.0, 1.0, 3.0, 2.0]))
    found = TwoView.after_update(method)
    assert float(found["feature_deviation"]) == pytest.approx(0.0, abs=1e-3)
    assert float(found["output_entropy"]) == 2.0


@pytest.mark.parametrize("centred", [True, False])
def test_dino_without_its_centre_collapses_and_the_numbers_tell(monkeypatch: pytest.MonkeyPatch, centred: bool) -> None:
    if not centred:
        monkeypatch.setattr("lomar.methods.two_view.CENTRE_MOMENTUM", 1.0)
    method = made("dino", drop_path=0.0, momentum=0.9, freeze_last_layer=0)
    told = [method.trouble({"step": step} | numbers) for step, numbers in enumerate(learnt(method, 75))]
    assert any(told) == (not centred)
    assert centred or "for 50 steps all images have looked nearly alike" in next(filter(None, told))


def test_a_collapse_is_told_after_an_epoch_and_many_steps_of_it() -> None:
    method = made("dino")
    method.set_course(1000, steps_per_epoch=80)
    alike = {"feature_deviation": 0.001, "output_entropy": 1.0}
    told = [bool(method.trouble({"step": step} | alike)) for step in range(100)]
    assert told == [False] * 80 + [True] * 20
    assert method.trouble({"step": 100, "feature_deviation": 0.3, "output_entropy": 1.0}) == ""
    assert method.trouble({"step": 101} | alike) == ""
    told = [bool(method.trouble({"step": step} | alike)) for step in (*range(200, 240), *range(220, 275))]
    assert told == [False] * 89 + [True] * 6  # it went back to a checkpoint in between


@pytest.mark.parametrize("entropy", [0.001, math.log(13) - 0.001])
def test_outputs_that_are_empty_are_dinos_collapse_and_mocos_success(entropy: float) -> None:
    """One prototype, or all alike. MoCo's entropy is low where each crop finds the other crop of its image."""
    for name, collapses in (("dino", True), ("mocov3", False)):
        method = made(name)
        numbers = {"feature_deviation": 0.9, "output_entropy": entropy}
        told = [bool(method.trouble({"step": step} | numbers)) for step in range(60)]
        assert any(told) == collapses


@pytest.mark.parametrize("position", ["contextual", "sincos", "learned", "none"])
@pytest.mark.parametrize("name", ["dino", "mocov3"])
def test_any_position_will_do(name: str, position: str) -> None:
    """Small crops have fewer patches: tables of positions are resized to them."""
    method = made(name, position=position)
    losses, count = method(**batch(method))
    assert count == 4 and losses.isfinite()
    images = torch.rand(2, 3, 28, 28)
    assert method.encoder(images).shape == (2, 16)
    torch.testing.assert_close(method.encoder(images), method.encoder.forward_features(images)[:, 0])


@pytest.mark.parametrize("name", ["dino", "mocov3"])
def test_in_bfloat16_losses_are_near_those_of_float32(name: str) -> None:
    found = []
    for enabled in (False, True):
        method = made(name, drop_path=0.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses, count = method(**batch(method, images=8))
        losses.backward()
        found.append(float(losses) / count)
    assert found[1] == pytest.approx(found[0], rel=0.03)


def test_drop_path_is_the_samples_own() -> None:
    method = made("mocov3", drop_path=0.5)
    drawn = method.draw(seed=3)(SampleKey(1, 2, 3, 4))
    assert drawn["paths"].shape == (2, 2, 2)
    torch.testing.assert_close(drawn, method.draw(seed=3)(SampleKey(1, 2, 9, 0)))
    assert not torch.equal(drawn["distortions"], method.draw(seed=3)(SampleKey(2, 2, 3, 4))["distortions"])


def test_prototypes_are_compared_by_their_direction_alone() -> None:
    head = PrototypeHead(5, 7, 11, bottleneck=3)
    x = torch.randn(2, 5)
    before = head(x)
    with torch.no_grad():
        head.prototypes.mul_(torch.rand(11, 1) + 0.5)
    torch.testing.assert_close(head(x), before)
    assert before.abs().max() <= 1


def test_mocos_heads_have_the_released_layers() -> None:
    """SPEC D.2: linear without bias, batch norm, ReLU; the last norm has no weights."""
    projector = batch_normed_mlp(6, 10, 4, layers=3)
    kinds = [type(layer).__name__ for layer in projector]
    assert kinds == ["Linear", "BatchNorm", "ReLU", "Linear", "BatchNorm", "ReLU", "Linear", "BatchNorm"]
    linear = [layer for layer in projector if isinstance(layer, nn.Linear)]
    assert [(each.in_features, each.out_features, each.bias) for each in linear] == [
        (6, 10, None),
        (10, 10, None),
        (10, 4, None),
    ]
    assert projector[-1].weight is None
    assert [type(layer).__name__ for layer in batch_normed_mlp(4, 10, 4, layers=2)].count("Linear") == 2


def test_plain_values_rebuild_a_composition() -> None:
    composition = RECIPES["dino"].composition("dino")
    assert isinstance(composition, TwoViewComposition)
    assert TwoViewComposition.from_dict(composition.to_dict()) == composition
    assert replace(composition, image_size=112).grid == (7, 7)
    assert composition.local_grid == (6, 6)


def test_prototypes_may_learn_their_lengths() -> None:
    """Outputs are cosines times lengths, which begin as one."""
    fixed, free = (PrototypeHead(6, 10, 12, bottleneck=4, unit_length=unit) for unit in (True, False))
    assert free.load_state_dict(fixed.state_dict(), strict=False).missing_keys == ["lengths"]
    x = torch.randn(5, 6)
    torch.testing.assert_close(free(x), fixed(x))
    assert free.lengths is not None
    free.lengths.data = torch.arange(12.0)[:, None]
    torch.testing.assert_close(free(x), fixed(x) * torch.arange(12.0))


def test_head_and_loss_of_dino_are_lightlys() -> None:
    """Where lightly is installed; it is no dependency."""
    loss = pytest.importorskip("lightly.loss")
    heads = pytest.importorskip("lightly.models.modules.heads")
    ours = PrototypeHead(6, 10, 12, bottleneck=4)
    theirs = heads.DINOProjectionHead(6, 10, 4, 12)
    linear = [layer for layer in theirs.layers if isinstance(layer, nn.Linear)]
    for own, other in zip([layer for layer in ours.mlp if isinstance(layer, nn.Linear)], linear, strict=True):
        own.load_state_dict(other.state_dict())
    ours.prototypes.data = theirs.last_layer.weight_v.data
    x = torch.randn(5, 6)
    torch.testing.assert_close(ours(x), theirs(x))

    method = made("dino", teacher_temperature=(0.06, 0.06), head_outputs=12)
    assert isinstance(method, DINO)
    method.centre = torch.randn(1, 12)
    judge = loss.DINOLoss(12, teacher_temp=0.06, student_temp=0.1)
    judge.center = method.centre[None].clone()
    teacher, student = torch.randn(3, 2, 12), torch.randn(3, 5, 12)
    expected = judge(list(teacher.unbind(1)), list(student.unbind(1)), teacher_temp=0.06)
    torch.testing.assert_close(method.loss(teacher, student)[0].mean(), expected)
