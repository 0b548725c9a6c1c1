"""Run the built extension where it is, without pytest: every operator once, against its twin.

    python smoke.py [--device cuda]

CI runs it under a torch other than the one the extension was built with; on a GPU it is what the
sanitizers of CUDA watch.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist

import fastif_ext as fi


def close(got: object, want: object) -> None:
    if isinstance(want, torch.Tensor):
        assert isinstance(got, torch.Tensor)
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)
    else:
        for g, w in zip(got, want, strict=False):  # type: ignore[call-overload]
            close(g, w)


def check(device: str, n: int, d: int, clusters: int, classes: int) -> None:
    """The twins run on the CPU."""

    def there(t: torch.Tensor) -> torch.Tensor:
        return t.to(device)

    x, centroids = torch.randn(n, d), torch.randn(clusters, d)
    logits = 3 * torch.randn(n, classes)
    probs = logits.softmax(1)
    twin = fi.reference
    X, C, Z, P = there(x), there(centroids), there(logits), there(probs)

    labels, sqdist = fi.kmeans_assign(X, C)
    close((labels, sqdist), twin.kmeans_assign(x, centroids))
    close(fi.kmeans_update(X, labels, clusters), twin.kmeans_update(x, labels.cpu(), clusters))
    close(fi.kmeans_nearest(X, C, 4), twin.kmeans_nearest(x, centroids, 4))
    close(fi.kmeans_weighted(X, C, 4, seed=1), twin.kmeans_weighted(x, centroids, 4, seed=1))
    close(
        fi.ops.kmeans_candidates(X, C[:3], sqdist),
        twin.kmeans_candidates(x, centroids[:3], sqdist.cpu()),
    )

    for replacement in (False, True):
        sample = fi.class_multinomial(Z, 5, replacement=replacement, seed=1)
        close(sample, twin.class_multinomial(logits, 5, replacement=replacement, seed=1))
    close(fi.curvature_sizes(Z), twin.curvature_sizes(logits))
    close(fi.curvature_multinomial(Z, 5, seed=1), twin.curvature_multinomial(logits, 5, seed=1))
    close(fi.bottom_k(P.T, 5, seed=1), twin.bottom_k(probs.T, 5, seed=1))
    cut = n // 3
    parts = [
        fi.class_multinomial(Z[:cut], 5, seed=2),
        fi.class_multinomial(Z[cut:], 5, seed=2, row_offset=cut),
    ]
    close(fi.merge_samples(*parts), twin.class_multinomial(logits, 5, seed=2))

    z, v, w = torch.randn(2, n, classes), torch.randn(2, classes, d + 1), torch.rand(n)
    close(fi.softmax_hvp(P, there(z), there(w)), twin.softmax_hvp(probs, z, w))
    product = fi.linear_softmax_hvp(X, P, there(v), there(w))
    close(product / n, twin.linear_softmax_hvp(x, probs, v, w) / n)
    V = there(v)
    h = torch.zeros(2, v[0].numel(), device=device)
    fi.hvp_accumulate_(h, [V], 0.5)
    close(h, 0.5 * v.flatten(1))
    fi.lissa_update_(h, h.clone(), [V], damping=0.1, scale=2.0)
    close(h, 0.5 * v.flatten(1) * 1.95 - v.flatten(1) / 2)


def check_ranks() -> None:
    """One rank of torch.distributed, whose interfaces below the surface differ between versions."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ranks = fi.distributed.Ranks(timeout=20)
        own = torch.randn(30, 4), torch.arange(30) % 3
        local = fi.Hessian(torch.nn.Linear(4, 3), torch.nn.functional.cross_entropy, own)
        H = fi.distributed.DistributedOperator(local, group=ranks)
        v = torch.randn(2, H.dim)
        close(H @ v, local @ v)
        labels = fi.distributed.kmeans(own[0], 3, group=ranks).labels_
        assert labels.bincount(minlength=3).min() > 0
        assert ranks.gather_rows("rows", own[1]).equal(own[1])
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    torch.manual_seed(0)
    check(device, 300, 17, 9, 7)
    check(device, 700, 64, 130, 33)
    check_ranks()

    info = fi.build_info()
    print(
        f"fastif_ext {info['version']}, built with torch {info['built_with_torch']}, "
        f"runs under torch {torch.__version__} on {device}: all operators agree with their twins"
    )


if __name__ == "__main__":
    main()
