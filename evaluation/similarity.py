"""How alike two images are, pixel by pixel: PSNR and SSIM of 8-bit images. Tensors in, one number per pair out."""

import torch

LARGEST_PSNR = 100.0  # dB, of equal images, whose own would be infinite and make every mean so
WINDOW, SIGMA = 11, 1.5  # pixels: side and standard deviation of SSIM's Gaussian window
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # SSIM's constants, of K1 = 0.01, K2 = 0.03 and the range 255


def check_pair(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4 or a.dtype != torch.uint8 or b.dtype != torch.uint8:
        raise ValueError(f"images are {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}, wanted uint8 alike")


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """10 log10(255^2 / MSE) in dB of each pair of images (N, H, W, C) uint8: (N,) float64, at most LARGEST_PSNR.

    The mean squared error is over all pixels and channels of one pair; papers report the mean of these over images.
    """
    check_pair(a, b)
    error = (a.float() - b.float()).square().flatten(1).mean(dim=1, dtype=torch.float64)
    return (10 * torch.log10(255**2 / error)).clamp(max=LARGEST_PSNR)


def window() -> list[float]:
    """The weights of SSIM's window along one axis."""
    places = torch.arange(WINDOW, dtype=torch.float64) - (WINDOW - 1) / 2
    weights = torch.exp(-places.square() / (2 * SIGMA**2))
    return (weights / weights.sum()).tolist()


def window_means(images: torch.Tensor) -> torch.Tensor:
    """Means (N, H - 10, W - 10, C) of images (N, H, W, C) under the Gaussian window at each place where it fits.

    Sums of shifted images, not a convolution: on GPUs that would round its factors to TF32, whose error is as large as
    the variances that SSIM compares.
    """
    for axis in (1, 2):
        size = images.shape[axis] - WINDOW + 1
        images = sum(weight * images.narrow(axis, start, size) for start, weight in enumerate(window()))
    return images


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each pair of images (N, H, W, C) uint8 (Wang et al. 2004): (N,) float64.

    With Wang's constants and Gaussian window of 11 x 11 pixels, sigma 1.5, at places where it lies within the image,
    and variances weighted by it; computed for each colour channel, and averaged over places and channels.

    Raises ValueError for images smaller than the window.
    """
    check_pair(a, b)
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs images of {WINDOW} x {WINDOW} pixels or more, these have {tuple(a.shape[1:3])}")
    a, b = a.double(), b.double()  # the variances are differences of large squares
    mean_a, mean_b = window_means(a), window_means(b)  # (N, H - 10, W - 10, C)
    variances = window_means(a.square()) - mean_a.square() + window_means(b.square()) - mean_b.square()
    covariance = window_means(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a.square() + mean_b.square() + C1)
    structure = (2 * covariance + C2) / (variances + C2)
    return (luminance * structure).flatten(1).mean(dim=1)
