"""Claims about the discrete VAE and what it learns from."""

import math

import pytest
import torch
from golden import filler
from torch import Tensor, nn
from torch.nn import functional as F

from lomar.methods.tokenizer import DiscreteVAE, DVAEDecoder, DVAEEncoder, squeeze, unsqueeze
from lomar.methods.tokenizer_loss import logit_laplace, losses, prepare, temperature, usage_of


def fill(module: nn.Module) -> None:
    """The golden parameters: weights of unit variance over their inputs, biases of a tenth; keys in order."""
    for j, (name, tensor) in enumerate(sorted(module.state_dict().items())):
        scale = 0.1 if name.endswith(".b") else math.sqrt(12 / tensor[0].numel())
        tensor.copy_(scale * filler(*tensor.shape, j=j))


def small(channels: int = 3, vocab: int = 11, **options: bool) -> DiscreteVAE:
    torch.manual_seed(0)
    ends = {"low": [10.0] * channels, "high": [210.0] * channels}
    return DiscreteVAE.build(channels=channels, width=4, vocab=vocab, blocks_per_group=1, **ends, **options)


def pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_the_encoder_computes_what_dall_e_computes() -> None:
    """Golden vector H6."""
    encoder = DVAEEncoder(width=64, vocab=512)
    fill(encoder)
    images = 0.8 * (filler(1, 3, 112, 112, j=1000) + 0.5) + 0.1
    with torch.no_grad():
        out = encoder(images.float())
    assert out.shape == (1, 512, 14, 14)
    first = torch.tensor([0.28870398, -0.09858368, -0.00631237, -0.00637817, -0.15336178])
    torch.testing.assert_close(out[0, :5, 0, 0], first, rtol=0, atol=1e-6)
    assert out.mean().item() == pytest.approx(0.00053816, abs=1e-6)
    assert out.std().item() == pytest.approx(0.10580656, abs=1e-6)


def test_the_decoder_computes_what_dall_e_computes() -> None:
    """Golden vector made by running the released decoder's class (package DALL-E 0.1) on the same filler."""
    decoder = DVAEDecoder(width=8, vocab=12)
    fill(decoder)
    with torch.no_grad():
        out = decoder(filler(1, 12, 3, 5, j=1000).float().softmax(1))
    assert out.shape == (1, 6, 24, 40)
    first = torch.tensor([0.03557981, -0.01737154, -0.07032289, -0.02327424, -0.07622559, -0.02917694])
    torch.testing.assert_close(out[0, :, 0, 0], first, rtol=0, atol=1e-6)
    assert out.double().sum().item() == pytest.approx(-168.253667, abs=1e-3)
    assert out.std().item() == pytest.approx(0.036953, abs=1e-6)


def test_the_released_sizes_are_the_defaults() -> None:
    with torch.device("meta"):
        encoder, decoder = DVAEEncoder(), DVAEDecoder()
    count = [sum(p.numel() for p in module.parameters()) for module in (encoder, decoder)]
    assert count == [53_786_240, 43_829_766]
    assert len(encoder.state_dict()) == 74


def test_keys_are_those_of_the_released_files() -> None:
    with torch.device("meta"):
        keys = set(DVAEEncoder().state_dict()), set(DVAEDecoder().state_dict())
    ends = {f"blocks.{name}.{p}" for name in ("input", "output.conv") for p in "wb"}
    blocks = [f"blocks.group_{g}.block_{b}" for g in (1, 2, 3, 4) for b in (1, 2)]
    residual = {f"{block}.res_path.conv_{n}.{p}" for block in blocks for n in (1, 2, 3, 4) for p in "wb"}
    identity = {f"blocks.group_{g}.block_1.id_path.{p}" for g in (1, 2, 3, 4) for p in "wb"}
    assert keys[0] == ends | residual | {key for key in identity if "group_1" not in key}
    assert keys[1] == ends | residual | identity


def test_the_gain_of_the_branches_falls_with_their_number() -> None:
    for blocks, gain in ((1, 1 / 16), (2, 1 / 64), (3, 1 / 144)):
        encoder = DVAEEncoder(width=4, vocab=2, blocks_per_group=blocks)
        assert encoder.get_submodule("blocks.group_4.block_1").gain == gain


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_there_is_one_token_for_8_by_8_pixels(dtype: torch.dtype) -> None:
    ids = small().tokens(pixels(2, 3, 24, 40).to(dtype))
    assert ids.shape == (2, 3, 5) and ids.dtype == torch.int64
    assert ids.min() >= 0 and ids.max() < 11


def test_16_bit_pixels_with_five_channels_have_tokens() -> None:
    dvae = DiscreteVAE.build(channels=5, width=4, vocab=7, blocks_per_group=1, low=[0] * 5, high=[65535] * 5)
    ids = dvae.tokens((pixels(1, 5, 16, 24).int() * 257).to(torch.uint16))
    assert ids.shape == (1, 2, 3)


def test_low_and_high_are_black_and_white_and_nothing_lies_beyond() -> None:
    dvae = small()
    values = torch.tensor([0.0, 10, 60, 210, 255]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert dvae.unit(values)[0, 2, 0].tolist() == [0.0, 0.0, 0.25, 1.0, 1.0]
    assert torch.allclose(squeeze(torch.tensor([0.0, 1.0])), torch.tensor([0.1, 0.9]))
    assert torch.allclose(unsqueeze(torch.tensor([0.05, 0.1, 0.5, 0.95])), torch.tensor([0.0, 0.0, 0.5, 1.0]))


def test_tokens_do_not_depend_on_the_precision_of_the_run() -> None:
    dvae, images = small(vocab=300), pixels(4, 3, 64, 64)
    fill(dvae.encoder)
    expected = dvae.tokens(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dvae.tokens(images), expected)
        assert not torch.equal(dvae.logits(dvae.unit(images)).argmax(1), expected)  # it would matter
    assert not dvae.tokens(images).requires_grad


def test_looking_tokens_up_is_the_product_with_one_hot_vectors() -> None:
    dvae = small()
    ids = torch.randint(11, (2, 3, 5))
    dense = dvae.decoder(F.one_hot(ids, 11).movedim(-1, 1).float())
    torch.testing.assert_close(dvae.decoder.from_ids(ids), dense)


def test_decoded_images_lie_in_0_to_1() -> None:
    dvae = small()
    with torch.no_grad():
        dvae.decoder.get_parameter("blocks.output.conv.b").copy_(torch.tensor([-9.0, 0, 9, 5, 5, 5]))
    images = dvae.decode(torch.randint(11, (2, 3, 5)))
    assert images.shape == (2, 3, 24, 40)
    assert images[:, 0].max() == 0 and images[:, 2].min() == 1
    assert images[:, 1].min() > 0 and images[:, 1].max() < 1


def test_without_a_decoder_there_are_tokens_but_no_images() -> None:
    dvae = small(has_decoder=False)
    assert dvae.tokens(pixels(1, 3, 8, 8)).shape == (1, 1, 1)
    with pytest.raises(ValueError, match="no decoder"):
        dvae.decode(torch.zeros(1, 1, 1, dtype=torch.int64))


@pytest.mark.parametrize("has_decoder", [True, False])
def test_the_architecture_rebuilds_it(has_decoder: bool) -> None:
    dvae = small(channels=2, has_decoder=has_decoder)
    like = DiscreteVAE.build(**dvae.architecture)
    like.load_state_dict(dvae.state_dict())
    assert torch.equal(like.tokens(pixels(1, 2, 16, 16)), dvae.tokens(pixels(1, 2, 16, 16)))
    assert like.architecture == dvae.architecture


def test_the_reconstruction_loss_is_minus_the_log_of_a_density() -> None:
    """It integrates to 1 over 0 to 1, and its location is the median."""
    x = torch.linspace(0, 1, 200_001, dtype=torch.float64)[1:-1]
    location, log_scale = 0.7, math.log(0.4)
    parameters = torch.tensor([location, log_scale], dtype=torch.float64).view(1, 2, 1, 1)
    density = torch.tensor([math.exp(-logit_laplace(v.view(1, 1, 1, 1), parameters).item()) for v in x[::200]])
    assert density.sum().item() * 1e-3 == pytest.approx(1, abs=1e-3)
    below = x[::200] < 1 / (1 + math.exp(-location))
    assert density[below].sum().item() * 1e-3 == pytest.approx(0.5, abs=2e-3)


def test_every_parameter_of_both_halves_gets_a_gradient() -> None:
    dvae = small()
    prepare(dvae)
    found = losses(dvae, dvae.unit(pixels(2, 3, 16, 24)), 0.5, 0.2, torch.Generator().manual_seed(0))
    found.total.backward()
    for name, parameter in dvae.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_the_noise_is_the_generators() -> None:
    dvae = small()
    images = dvae.unit(pixels(2, 3, 16, 24))
    a, b, c = (losses(dvae, images, 0.5, 0.2, torch.Generator().manual_seed(s)).total for s in (1, 1, 2))
    assert a == b != c


def test_usage_divergence_is_0_for_tokens_used_alike_and_log_of_the_vocabulary_for_one_alone() -> None:
    dvae = small()
    images = dvae.unit(pixels(2, 3, 16, 24))
    last = dvae.encoder.last
    with torch.no_grad():
        last.w.zero_()
        alike = losses(dvae, images, 1.0, 0.2, torch.Generator())
        last.b[3] = 100
        alone = losses(dvae, images, 1.0, 0.2, torch.Generator())
    assert alike.usage.item() == pytest.approx(0, abs=1e-6)
    assert alone.usage.item() == pytest.approx(math.log(11), abs=1e-5)
    assert alone.total.item() == pytest.approx(alone.reconstruction.item() + 0.2 * math.log(11), abs=1e-5)


def test_the_temperature_falls_from_1_to_a_sixteenth() -> None:
    course = [temperature(step / 10) for step in range(11)]
    assert course[0] == 1 and course[-1] == 1 / 16 and course == sorted(course, reverse=True)


def test_usage_counts_tokens_and_how_evenly_they_occur() -> None:
    usage = usage_of(torch.tensor([[0, 0, 5, 5]]), vocab=8)
    assert (usage.share, usage.perplexity) == (0.25, pytest.approx(2))
    assert usage_of(torch.tensor([3, 3]), vocab=8).perplexity == pytest.approx(1)
