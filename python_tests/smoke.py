"""Run the built extension where it is, without pytest: every operator once, against its twin.

    python smoke.py

CI runs it under a torch other than the one the extension was built with.
"""

from __future__ import annotations

import torch

import fastif_ext as fi


def close(got: object, want: object) -> None:
    if isinstance(want, torch.Tensor):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    else:
        for g, w in zip(got, want, strict=False):  # type: ignore[call-overload]
            close(g, w)


def main() -> None:
    torch.manual_seed(0)
    x, centroids = torch.randn(300, 17), torch.randn(9, 17)
    logits = 3 * torch.randn(300, 7)
    probs = logits.softmax(1)
    twin = fi.reference

    labels, _ = assigned = fi.kmeans_assign(x, centroids)
    close(assigned, twin.kmeans_assign(x, centroids))
    close(fi.kmeans_update(x, labels, 9), twin.kmeans_update(x, labels, 9))
    close(fi.kmeans_nearest(x, centroids, 4), twin.kmeans_nearest(x, centroids, 4))
    close(
        fi.kmeans_weighted(x, centroids, 4, seed=1), twin.kmeans_weighted(x, centroids, 4, seed=1)
    )

    for replacement in (False, True):
        sample = fi.class_multinomial(logits, 5, replacement=replacement, seed=1)
        close(sample, twin.class_multinomial(logits, 5, replacement=replacement, seed=1))
    close(
        fi.curvature_multinomial(logits, 5, seed=1), twin.curvature_multinomial(logits, 5, seed=1)
    )
    close(fi.bottom_k(probs.T, 5, seed=1), twin.bottom_k(probs.T, 5, seed=1))
    halves = [
        fi.class_multinomial(logits[:100], 5, seed=2),
        fi.class_multinomial(logits[100:], 5, seed=2, row_offset=100),
    ]
    close(fi.merge_samples(*halves), fi.class_multinomial(logits, 5, seed=2))

    z, v, w = torch.randn(2, 300, 7), torch.randn(2, 7, 18), torch.rand(300)
    close(fi.softmax_hvp(probs, z, w), twin.softmax_hvp(probs, z, w))
    close(fi.linear_softmax_hvp(x, probs, v, w), twin.linear_softmax_hvp(x, probs, v, w))
    h = torch.zeros(2, 126)
    fi.hvp_accumulate_(h, [v], 0.5)
    close(h, 0.5 * v.flatten(1))
    fi.lissa_update_(h, h.clone(), [v], damping=0.1, scale=2.0)
    close(h, 0.5 * v.flatten(1) * 1.95 - v.flatten(1) / 2)

    info = fi.build_info()
    print(
        f"fastif_ext {info['version']}, built with torch {info['built_with_torch']}, "
        f"runs under torch {torch.__version__}: all operators agree with their twins"
    )


if __name__ == "__main__":
    main()
