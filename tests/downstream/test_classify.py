"""Claims about a classifier made of an encoder, and about how it is judged."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import fill
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score

from lomar.downstream.classify import (
    Classification,
    Judgement,
    classifier_of,
    freeze,
    judge,
    probabilities,
)
from lomar.interop.weights import describe
from lomar.methods.recipes import RECIPES
from lomar.model import Encoder
from lomar.model.positions import resize_absolute, resize_bias

CPU = torch.device("cpu")
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 0}
CLASSES = ["ant", "bee", "cat", "dog", "elk"]
BEIT = {"key_bias": False, "init_values": 0.1, "weight_init": "beit"}


def encoder(position: str = "contextual", **words: object) -> Encoder:
    made = Encoder(**SMALL | {"position": position} | words)  # type: ignore[arg-type]
    fill(made)
    return made.float()


def images(*size: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("recipe", "parameters", "tensors"),
    [("lomar", 86_454_760, 163), ("mae", 86_567_656, 152), ("beit", 86_530_984, 211)],
)
def test_a_base_classifier_has_the_parameters_of_the_released_ones(recipe: str, parameters: int, tensors: int) -> None:
    """SPEC A.10 and A.11, B.1, C.6. Of 1000 classes; a released BEiT's 211 tensors count 12 index buffers."""
    with torch.device("meta"):
        whole = RECIPES[recipe].composition(recipe).encoder()
        classifier, _ = classifier_of(whole, [str(i) for i in range(1000)], size=(224, 224))
    learnt = [p for p in classifier.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learnt) == parameters
    assert len(learnt) == tensors - (12 if recipe == "beit" else 0)


def test_a_new_head_begins_near_zero_on_pretrained_weights_and_at_002_from_scratch() -> None:
    names = [str(i) for i in range(500)]
    for pretrained, std in ((True, 2e-5), (False, 0.02)):
        classifier, notes = classifier_of(encoder(), names, size=(32, 32), pretrained=pretrained)
        weight = classifier.head.weight
        assert isinstance(weight, torch.Tensor) and weight.std().item() == pytest.approx(std, rel=0.03)
        assert not classifier.head.bias.any() and notes == ["the head for 500 classes is new"]  # type: ignore[union-attr,operator]
        assert torch.equal(classifier.fc_norm.weight, torch.ones(24))


def test_pooling_takes_the_patches_through_a_new_norm_or_the_cls_token_through_the_old_one() -> None:
    whole = encoder().eval()
    before = whole.run_blocks(*whole._tokens(images(32, 32)))
    mean, _ = classifier_of(whole, CLASSES, size=(32, 32), pool="avg")
    features = mean.forward_head(mean.forward_features(images(32, 32)), pre_logits=True)
    torch.testing.assert_close(features, F.layer_norm(before[:, 1:].mean(dim=1), (24,), eps=1e-6))
    token, _ = classifier_of(whole, CLASSES, size=(32, 32), pool="token")
    features = token.forward_head(token.forward_features(images(32, 32)), pre_logits=True)
    torch.testing.assert_close(features, whole.norm(before)[:, 0])


def test_a_shared_bias_becomes_one_of_each_block_with_the_same_tokens() -> None:
    shared = encoder("shared-bias", **BEIT).eval()
    classifier, notes = classifier_of(shared, CLASSES, size=(32, 32), pool="token")
    assert classifier.architecture["position"] == "block-bias"
    assert notes[0] == "each block has its own copy of the relative bias that all shared"
    assert len({id(block.attn.rel_pos_bias.table) for block in classifier.blocks}) == 3  # type: ignore[union-attr]
    x = images(32, 32)
    torch.testing.assert_close(classifier.eval().forward_features(x), shared.forward_features(x))


def test_tables_are_resized_to_a_rectangle_and_contextual_position_needs_nothing() -> None:
    sines, table = encoder("sincos"), encoder("sincos").pos_embed
    classifier, notes = classifier_of(sines, CLASSES, size=(40, 24))
    assert notes[0] == "tables of positions were resized from 4x4 to 5x3 patches"
    assert classifier_of(sines, CLASSES, size=(40, 24))[1] == notes and sines.grid == (4, 4)  # it is left as it was
    assert table is not None and classifier.pos_embed is not None and classifier.pos_embed.requires_grad
    torch.testing.assert_close(classifier.pos_embed.detach(), resize_absolute(table, (4, 4), (5, 3)))
    assert classifier_of(encoder("learned"), CLASSES, size=(40, 24))[1] == notes
    biased = encoder("block-bias", **BEIT)
    old = biased.blocks[1].attn.rel_pos_bias.table.detach().clone()  # type: ignore[union-attr]
    classifier, _ = classifier_of(biased, CLASSES, size=(48, 40))
    new = classifier.blocks[1].attn.rel_pos_bias.table  # type: ignore[union-attr]
    torch.testing.assert_close(new.detach(), resize_bias(old, (4, 4), (6, 5)))  # type: ignore[operator]
    classifier, notes = classifier_of(encoder(), CLASSES, size=(40, 24))
    assert notes == ["the head for 5 classes is new"]
    assert classifier(images(40, 24)).shape == (2, 5)


def test_a_head_for_the_same_classes_is_kept_and_any_other_is_new() -> None:
    first, _ = classifier_of(encoder(), CLASSES, size=(32, 32), pretrained=False)
    describe(first, (0.5,) * 3, (0.5,) * 3, 255.0, CLASSES)
    again, notes = classifier_of(first, CLASSES, size=(32, 32))
    assert notes == ["the model's head for these 5 classes is kept"]
    assert torch.equal(again.head.weight, first.head.weight)  # type: ignore[arg-type]
    other, notes = classifier_of(first, [*CLASSES[:4], "fox"], size=(32, 32))
    assert notes == ["the model's head is for other classes: it was left out", "the head for 5 classes is new"]
    assert torch.equal(other.fc_norm.weight, first.fc_norm.weight)  # type: ignore[arg-type]
    _, notes = classifier_of(first, CLASSES, size=(32, 32), pool="token")
    assert notes[:2] == [
        "the model's head pools otherwise (avg): it was left out",
        "the norm before the cls token is new: the model had none",
    ]


def test_the_loss_is_torchs_cross_entropy_of_soft_targets() -> None:
    classifier, _ = classifier_of(encoder(), CLASSES, size=(32, 32), pretrained=False)
    x, targets = images(32, 32, count=3), torch.rand(3, 5).softmax(dim=1)
    loss, count = Classification(classifier)(x, targets)
    assert count == 3
    torch.testing.assert_close(loss, F.cross_entropy(classifier(x), targets, reduction="sum"))


def test_drop_path_obeys_the_numbers_of_the_sample() -> None:
    """Rates grow from 0 to the last block's; a number below the rate drops a branch, the rest is scaled up."""
    classifier, _ = classifier_of(encoder(), CLASSES, size=(32, 32), drop_path=0.5)
    assert classifier.drop_rates.tolist() == [0.0, 0.25, 0.5]
    x = images(32, 32, count=1)
    kept = torch.ones(1, 3, 2)
    dropped = kept.clone()
    dropped[:, 1:] = 0.0  # both branches of the last two blocks
    first_only = classifier.norm(classifier.run_blocks(*classifier._tokens(x), first=0, last=1))
    torch.testing.assert_close(classifier.train().forward_features(x, dropped), first_only)
    assert not torch.allclose(classifier.forward_features(x, kept), classifier.eval().forward_features(x))


@pytest.mark.parametrize(
    ("blocks", "head_only", "trained"),
    [
        (0, False, {"cls_token", "patch_embed", "0", "1", "2", "fc_norm", "head"}),
        (2, False, {"2", "fc_norm", "head"}),
        (3, False, {"fc_norm", "head"}),
        (0, True, {"fc_norm", "head"}),
    ],
)
def test_what_is_frozen_stays(blocks: int, head_only: bool, trained: set[str]) -> None:
    classifier, _ = classifier_of(encoder(), CLASSES, size=(32, 32))
    freeze(classifier, blocks, head_only)
    parts = {name.removeprefix("blocks.").split(".")[0] for name, p in classifier.named_parameters() if p.requires_grad}
    assert parts == trained


def answers(shares: torch.Tensor, good: torch.Tensor, batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(shares.split(batch), good.split(batch), strict=True))


@given(seed=st.integers(0, 1000), classes=st.integers(2, 9), count=st.integers(1, 40), batch=st.integers(1, 13))
@settings(max_examples=40, deadline=None)
def test_accuracies_are_scikit_learns(seed: int, classes: int, count: int, batch: int) -> None:
    rng = np.random.default_rng(seed)
    shares = torch.from_numpy(rng.dirichlet(np.ones(classes), count)).float()
    labels = rng.integers(0, classes, count)
    good = torch.from_numpy(rng.random(count) < 0.8)
    found = judge(answers(shares, good, batch), labels, classes)
    if not good.any():
        assert found is None
        return
    assert found is not None
    truth, told = labels[good.numpy()], shares[good].numpy().astype(np.float64)
    told /= told.sum(axis=1, keepdims=True)
    every = list(range(classes))
    assert np.array_equal(found.confusion(), confusion_matrix(truth, told.argmax(axis=1), labels=every))
    if classes > 5:
        assert found.top5 == pytest.approx(top_k_accuracy_score(truth, told, k=5, labels=every))
    assert found.top1 == pytest.approx((truth == told.argmax(axis=1)).mean())
    assert found.loss == pytest.approx(log_loss(truth, told, labels=every), rel=1e-4)
    seen = np.isin(told.argmax(axis=1), truth)  # scikit-learn warns of classes that are predicted alone
    if seen.all() and len(set(truth)) > 1:
        assert found.balanced == pytest.approx(balanced_accuracy_score(truth, told.argmax(axis=1)))
    assert found.unreadable == count - int(good.sum())


def test_what_a_class_is_mistaken_for() -> None:
    labels, predicted = np.array([0, 0, 0, 1, 2, 2]), np.array([2, 2, 1, 1, 0, 2])
    found = Judgement(labels, predicted, labels == predicted, np.zeros(6), classes=4, unreadable=0)
    assert found.mistaken_for() == [2, None, 0, None]
    assert found.per_class.tolist()[:3] == [0.0, 1.0, 0.5] and np.isnan(found.per_class[3])
    assert found.balanced == 0.5 and found.counts.tolist() == [3, 1, 2, 0]


def test_probabilities_of_an_image_too_bright_are_not_good_and_training_goes_on() -> None:
    classifier, _ = classifier_of(encoder(), CLASSES, size=(32, 32))
    classifier.train()
    x = images(32, 32, count=3)
    x[1] = torch.inf
    found, good = next(iter(probabilities(classifier, [(x, torch.tensor([True, True, False]))], lambda p: p, CPU)))
    assert good.tolist() == [True, False, False] and found[0].sum().item() == pytest.approx(1)
