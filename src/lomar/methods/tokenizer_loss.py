"""What a discrete VAE learns from: pixels through a relaxed choice of tokens and back."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lomar.methods.tokenizer import DiscreteVAE, squeeze

COLDEST = 1 / 16  # final temperature; that of DALL-E
FIRST_LOGITS = 3.0  # how much larger the encoder's first logits are than DALL-E's


def temperature(progress: float) -> float:
    """Of the choice of tokens: half a cosine from 1 at the start (progress 0) to 1/16 at the end (progress 1).

    Source: DALL-E (Ramesh et al. 2021), appendix A.2.
    """
    return COLDEST + (1 - COLDEST) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def prepare(dvae: DiscreteVAE) -> None:
    """Initial weights from which a run of minutes gets somewhere.

    DALL-E's own would be 1 / sqrt(vocabulary) for a token's embedding, though of all its inputs one alone is on, and
    give logits that drown in Gumbel noise. Both can be learnt, but slowly.
    """
    if dvae.decoder is not None:
        nn.init.normal_(dvae.decoder.embedding.w)
    dvae.encoder.last.w.mul_(FIRST_LOGITS)


@dataclass(frozen=True)
class Losses:
    """One batch's loss and its parts, scalars.

    Args:
        total: to be minimised.
        reconstruction: negative log-likelihood of the pixels, nats for each number.
        usage: divergence of the batch's mean choice from one that uses all tokens alike, nats; log(vocabulary) if
            all is one token.
    """

    total: Tensor
    reconstruction: Tensor
    usage: Tensor


def losses(
    dvae: DiscreteVAE, unit_pixels: Tensor, temperature: float, usage_weight: float, generator: torch.Generator
) -> Losses:
    """The losses of one batch under Gumbel-softmax.

    DALL-E holds each place's choice near the uniform one, which is its information plus the divergence of the mean
    choice. Only the latter is weighed here: it keeps tokens alive, and the former would keep them from saying
    anything, which a short run does not recover from.

    Args:
        dvae: with a decoder.
        unit_pixels: (B, C, h, w) in 0 to 1.
        temperature: of the choice.
        usage_weight: of the divergence.
        generator: of the Gumbel noise, on the pixels' device.
    """
    if dvae.decoder is None:
        raise ValueError("a tokenizer without a decoder cannot learn")
    logits = dvae.logits(unit_pixels)  # (B, vocabulary, h / 8, w / 8)
    gumbel = -torch.empty_like(logits).exponential_(generator=generator).log()
    shares = ((logits + gumbel) / temperature).softmax(dim=1)
    reconstruction = logit_laplace(squeeze(unit_pixels), dvae.decoder(shares))
    mean = logits.softmax(dim=1).mean(dim=(0, 2, 3))
    usage = (mean * mean.clamp(min=1e-30).log()).sum() + math.log(dvae.vocab)
    return Losses(reconstruction + usage_weight * usage, reconstruction.detach(), usage.detach())


def logit_laplace(squeezed: Tensor, parameters: Tensor) -> Tensor:
    """Mean of -log p(x), x being distributed so that logit(x) is Laplace.

    -log p(x) = log(2 s x (1 - x)) + |logit(x) - m| / s

    Args:
        squeezed: x, (B, C, h, w), above 0 and below 1.
        parameters: (B, 2 C, h, w): m of all channels, then log s of all.

    Source: DALL-E, appendix A.3.
    """
    location, log_scale = parameters.chunk(2, dim=1)
    density = (2 * squeezed * (1 - squeezed)).log() + log_scale
    return (density + (squeezed.logit() - location).abs() * (-log_scale).exp()).mean()


@dataclass(frozen=True)
class Usage:
    """How much of the vocabulary some tokens use.

    Args:
        share: tokens that occur at all, 0 to 1.
        perplexity: 2 to the entropy in bits: as many tokens used alike would say as much.
    """

    share: float
    perplexity: float


def usage_of(ids: Tensor, vocab: int) -> Usage:
    """Of tokens of any shape."""
    counts = torch.bincount(ids.flatten(), minlength=vocab).double()
    shares = counts[counts > 0] / counts.sum()
    return Usage(len(shares) / vocab, math.exp(-(shares * shares.log()).sum().item()))
