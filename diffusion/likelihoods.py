"""Log-likelihoods and divergences of Gaussians, in nats, element by element."""
import math

import torch


def normal_kl(mean1: torch.Tensor, log_variance1: torch.Tensor, mean2: torch.Tensor,
              log_variance2: torch.Tensor) -> torch.Tensor:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))); the arguments broadcast."""
    return 0.5 * (log_variance2 - log_variance1 + torch.exp(log_variance1 - log_variance2)
                  + (mean1 - mean2) ** 2 * torch.exp(-log_variance2) - 1)


def approximate_normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """The normal distribution function by Page's tanh formula (1977), within 2e-4; the one that ADM's losses use."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def discretized_gaussian_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Log-probability of 8-bit pixels x, scaled to [-1, 1], under a Gaussian (Ho et al. 2020, equation 13).

    Each pixel value owns the interval of 1/255 to either side; the lowest and highest own the tails as well.
    """
    inverse_scale = torch.exp(-log_scale)
    cdf_above = approximate_normal_cdf(inverse_scale * (x - mean + 1 / 255))
    cdf_below = approximate_normal_cdf(inverse_scale * (x - mean - 1 / 255))
    probability = torch.where(x < -0.999, cdf_above, torch.where(x > 0.999, 1 - cdf_below, cdf_above - cdf_below))
    return probability.clamp(min=1e-12).log()


def mean_flat(x: torch.Tensor) -> torch.Tensor:
    """Mean over all but the first dimension, (N,)."""
    return x.flatten(1).mean(dim=1)
