import numpy as np
import pytest
import torch

from diffusers_ext.metrics.reconstruction import multi_scale_ssim, psnr, ssim


def draw(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_a_known_error():
    x = draw(2, 3, 8, 8)
    assert psnr(x, x + 0.1).tolist() == pytest.approx([20.0, 20.0], rel=1e-5)
    assert psnr(x, x).isinf().all()


def ssim_by_loops(x, y, size, std):
    """The paper's formula, window by window, in numpy."""
    place = np.arange(size) - size // 2
    window = np.exp(-(place[:, None] ** 2 + place[None] ** 2) / (2 * std**2))
    window /= window.sum()
    values = []
    for a, b in zip(x, y, strict=True):
        for top in range(a.shape[0] - size + 1):
            for left in range(a.shape[1] - size + 1):
                p, q = (image[top : top + size, left : left + size] for image in (a, b))
                m, n = (window * p).sum(), (window * q).sum()
                v, w, c = (
                    (window * (p - m) ** 2).sum(),
                    (window * (q - n) ** 2).sum(),
                    (window * (p - m) * (q - n)).sum(),
                )
                values.append((2 * m * n + 1e-4) * (2 * c + 9e-4) / ((m * m + n * n + 1e-4) * (v + w + 9e-4)))
    return np.mean(values)


@pytest.mark.parametrize("shape, size", [((1, 16, 20), 11), ((3, 13, 12), 11), ((1, 8, 8), 7), ((1, 11, 11), 11)])
def test_ssim_is_the_paper_s_formula_at_each_window(shape, size):
    """On images smaller than the window it shrinks to the largest odd side that fits."""
    x = draw(2, *shape)
    y = (x + 0.2 * draw(2, *shape, seed=1)).clamp(0, 1)
    expected = [ssim_by_loops(a, b, size, 1.5) for a, b in zip(x.double().numpy(), y.double().numpy(), strict=True)]
    assert ssim(x, y).tolist() == pytest.approx(expected, rel=1e-9)


def test_ssim_of_equal_and_of_opposite_images():
    x = draw(2, 1, 16, 16)
    assert ssim(x, x).tolist() == pytest.approx([1, 1])
    assert (ssim(x, 1 - x) < -0.5).all()
    torch.testing.assert_close(ssim(x, 1 - x), ssim(1 - x, x))


def test_images_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        ssim(draw(1, 1, 8, 8), draw(1, 1, 8, 9))


def test_multi_scale_ssim_is_the_product_over_the_scales():
    """Of contrast and structure at each, by a window of loops, and of the luminance at the last."""

    def terms(a, b, size, std):
        place = np.arange(size) - size // 2
        window = np.exp(-(place[:, None] ** 2 + place[None] ** 2) / (2 * std**2))
        window /= window.sum()
        both, contrast = [], []
        for top in range(a.shape[0] - size + 1):
            for left in range(a.shape[1] - size + 1):
                p, q = (image[top : top + size, left : left + size] for image in (a, b))
                m, n = (window * p).sum(), (window * q).sum()
                v, w = (window * (p - m) ** 2).sum(), (window * (q - n) ** 2).sum()
                contrast.append((2 * (window * (p - m) * (q - n)).sum() + 9e-4) / (v + w + 9e-4))
                both.append((2 * m * n + 1e-4) / (m * m + n * n + 1e-4) * contrast[-1])
        return np.mean(both), np.mean(contrast)

    x = draw(1, 1, 24, 26)
    y = (x + 0.3 * draw(1, 1, 24, 26, seed=1)).clamp(0, 1)
    a, b = x[0, 0].double().numpy(), y[0, 0].double().numpy()

    def halved(image):
        return image.reshape(image.shape[0] // 2, 2, image.shape[1] // 2, 2).mean((1, 3))

    fine, coarse = terms(a, b, 11, 1.5)[1], terms(halved(a), halved(b), 11, 1.5)[0]
    total = sum((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)) / (0.0448 + 0.2856)
    expected = fine ** (0.0448 * total) * coarse ** (0.2856 * total)
    assert multi_scale_ssim(x, y).item() == pytest.approx(expected, rel=1e-9)


def test_multi_scale_ssim_of_equal_images_is_one_and_of_small_ones_that_of_one_scale():
    x, y = draw(2, 3, 12, 12), draw(2, 3, 12, 12, seed=1)
    assert multi_scale_ssim(x, x).tolist() == pytest.approx([1, 1])
    near = (x + 0.1 * y).clamp(0, 1)
    # All of the weight on one scale.
    assert multi_scale_ssim(x, near).tolist() == pytest.approx((ssim(x, near) ** 1.0001).tolist(), rel=1e-3)
    assert (multi_scale_ssim(x, 1 - x) == 0).all()
