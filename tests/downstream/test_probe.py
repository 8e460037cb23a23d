"""Claims about linear heads on frozen features."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from lomar.downstream.features import Wanted
from lomar.downstream.probe import (
    EPSILON,
    Columns,
    HeadInput,
    MaeHead,
    Sweep,
    head_inputs,
    lars,
    parts_of,
    standard_of,
    top_hits,
)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_inputs_are_each_layer_and_the_cls_tokens_of_the_last_four_joined() -> None:
    inputs = head_inputs(["pooled", "cls+mean"], [7, 3, 5, 9, 11])
    assert [each.name for each in inputs] == [
        *(f"{kind} of layer {layer}" for layer in (3, 5, 7, 9, 11) for kind in ("pooled", "cls+mean")),
        "cls of layers 5 7 9 11",
        "cls of layers 5 7 9 11 + mean of 11",
    ]
    assert inputs[1].parts == (Wanted("cls", 3), Wanted("mean", 3))
    assert inputs[-1].parts == (*(Wanted("cls", layer) for layer in (5, 7, 9, 11)), Wanted("mean", 11))
    assert len(parts_of(inputs)) == 15  # pooled, cls and mean of five layers, each read once


def test_without_cls_or_with_one_layer_nothing_is_joined() -> None:
    assert len(head_inputs(["pooled", "mean"], [1, 2])) == 4
    assert len(head_inputs(["cls", "cls"], [2])) == 1
    assert [each.name for each in head_inputs(["cls"], [1, 2])][-1] == "cls of layers 1 2"


def test_columns_find_the_parts_of_an_input_in_a_row() -> None:
    columns = Columns([Wanted("cls", 1), Wanted("mean", 1), Wanted("cls", 2)], [2, 3, 2])
    rows = torch.arange(14).view(2, 7)
    cut = columns.cut(rows, HeadInput("", (Wanted("cls", 2), Wanted("cls", 1))))
    assert columns.total == 7 and cut.tolist() == [[5, 6, 0, 1], [12, 13, 7, 8]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_features_are_standardised_as_scikit_learn_does(dtype: torch.dtype) -> None:
    rows = (draws(53, 5) * torch.tensor([1.0, 3, 0.5, 7, 2]) + 4).to(dtype)
    rows[7] = torch.nan  # an image that could not be read
    chosen = torch.tensor([i for i in range(53) if i not in (7, 11)])
    standard = standard_of(rows, chosen, at_once=10)
    judge = StandardScaler().fit(rows[chosen].double())
    np.testing.assert_allclose(standard(rows[chosen]), judge.transform(rows[chosen].double()), atol=1e-4)


def test_a_feature_that_never_changes_becomes_zero() -> None:
    rows = torch.full((5, 2), 3.0)
    assert torch.equal(standard_of(rows, torch.arange(5))(rows), torch.zeros(5, 2))


def test_the_sweep_trains_every_head_as_torchs_sgd_trains_it_alone() -> None:
    """With momentum and a falling rate, heads of several inputs and rates at once."""
    inputs, labels = [draws(4, 31, 3), draws(4, 31, 5, seed=1)], torch.arange(4 * 31).view(4, 31) % 7
    rates, shares = [0.02, 0.7, 3.0], [1.0, 0.6, 0.25, 0.1]
    sweep = Sweep([3, 5], 7, rates, seed=2)
    alone = {(place, rate): nn.Linear(width, 7) for place, width in enumerate((3, 5)) for rate in range(3)}
    for (place, rate), linear in alone.items():
        weight, bias = sweep.head(place, rate)
        linear.weight.data.copy_(weight)
        linear.bias.data.copy_(bias)
    together = sweep.optimizer()
    singly = {key: torch.optim.SGD(linear.parameters(), lr=0.0, momentum=0.9) for key, linear in alone.items()}
    for step, share in enumerate(shares):
        seen = [each[step] for each in inputs]
        losses = sweep.losses(seen, labels[step])
        together.zero_grad()
        (losses * sweep.rates).sum().backward()
        together.param_groups[0]["lr"] = share
        together.step()
        for key, linear in alone.items():
            loss = F.cross_entropy(linear(seen[key[0]]), labels[step])
            torch.testing.assert_close(losses[key].detach(), loss.detach())
            singly[key].zero_grad()
            loss.backward()
            singly[key].param_groups[0]["lr"] = share * rates[key[1]]
            singly[key].step()
    for key, linear in alone.items():
        weight, bias = sweep.head(*key)
        torch.testing.assert_close(weight, linear.weight.data)
        torch.testing.assert_close(bias, linear.bias.data)


def test_a_head_of_the_sweep_ends_where_scikit_learns_logistic_regression_does() -> None:
    rows = draws(200, 3)
    labels = (rows @ draws(3, 3, seed=1) + draws(200, 3, seed=2)).argmax(dim=1)
    sweep = Sweep([3], 3, [0.5], seed=0)
    optimizer = sweep.optimizer()
    optimizer.param_groups[0]["lr"] = 1.0
    for _ in range(800):
        optimizer.zero_grad()
        (sweep.losses([rows], labels) * sweep.rates).sum().backward()
        optimizer.step()
    judge = LogisticRegression(C=np.inf, max_iter=1000, tol=1e-8).fit(rows, labels)
    shares = sweep([rows])[0, 0].detach().softmax(dim=1)
    np.testing.assert_allclose(shares, judge.predict_proba(rows), atol=1e-3)


def test_heads_begin_alike_at_all_seeds_but_not_equal() -> None:
    one, again, other = (Sweep([40], 11, [0.1, 0.2], seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.weights[0], again.weights[0]) and not torch.equal(one.weights[0], other.weights[0])
    assert one.weights[0].std().item() == pytest.approx(0.01, rel=0.1) and not one.biases[0].any()


def lars_by_hand(p: np.ndarray, u: np.ndarray, g: np.ndarray, lr: float) -> tuple[np.ndarray, np.ndarray]:
    """SPEC B.7: one step of one tensor; parameter and buffer come back."""
    if p.ndim > 1:
        norms = np.linalg.norm(p), np.linalg.norm(g)
        g = g * (0.001 * norms[0] / norms[1] if min(norms) > 0 else 1.0)
    u = 0.9 * u + g
    return p - lr * u, u


def test_lars_is_that_of_mae() -> None:
    head = nn.Linear(5, 3)
    head.weight.data.mul_(0.01)
    optimizer = lars(head)
    state = {name: (p.detach().double().numpy(), np.zeros(p.shape)) for name, p in head.named_parameters()}
    for step, lr in enumerate((0.0, 6.4, 3.0, 0.01)):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, p in head.named_parameters():
            # Small as those of a trained head are, for which timm's own guard against zero would matter.
            p.grad = draws(*p.shape, seed=step) * (1e-7 if step == 2 else 1.0)
            state[name] = lars_by_hand(*state[name], p.grad.double().numpy(), lr)
        optimizer.step()
        for name, p in head.named_parameters():
            np.testing.assert_allclose(p.detach(), state[name][0], rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize(("weight", "gradient"), [(0.0, 1.0), (1.0, 0.0)])
def test_lars_does_not_scale_where_a_norm_is_zero(weight: float, gradient: float) -> None:
    head = nn.Linear(2, 2, bias=False)
    head.weight.data.fill_(weight)
    head.weight.grad = torch.full((2, 2), gradient)
    optimizer = lars(head)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    optimizer.step()
    assert torch.equal(head.weight.data, torch.full((2, 2), weight - 0.5 * gradient))


def test_the_head_of_mae_normalises_and_has_no_weights_but_the_linear_ones() -> None:
    head = MaeHead(60, 11, seed=3)
    assert [(name, tuple(p.shape)) for name, p in head.named_parameters()] == [
        ("linear.weight", (11, 60)),
        ("linear.bias", (11,)),
    ]
    assert head.linear.weight.std().item() == pytest.approx(0.01, rel=0.1) and not head.linear.bias.any()
    rows = draws(29, 60) * 5 + 2
    logits = head.train()(rows)
    normalised = (rows - rows.mean(dim=0)) / (rows.var(dim=0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(logits, normalised @ head.linear.weight.T)
    torch.testing.assert_close(head.norm.running_mean, 0.1 * rows.mean(dim=0))
    torch.testing.assert_close(head.eval()(rows), head.standard()(rows) @ head.linear.weight.T, atol=1e-6, rtol=1e-5)
    assert head.norm.eps == EPSILON == 1e-6


def test_hits_count_the_first_and_the_first_five() -> None:
    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5, 6], [0, 0, 9, 0, 0, 0, 0]])
    assert [int(each) for each in top_hits(logits, torch.tensor([0, 1, 2]))] == [2, 2]
    assert [int(each) for each in top_hits(logits, torch.tensor([4, 2, 2]))] == [1, 3]
    assert [int(each) for each in top_hits(logits[:, :2], torch.tensor([1, 1, 1]))] == [1, 3]
