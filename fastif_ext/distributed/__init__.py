"""The same over torch.distributed: ranks share the rows, and all get the same result.

Started by torchrun, after torch.distributed.init_process_group; every function is called on all
ranks with the same arguments.
"""

from fastif_ext.distributed import launch
from fastif_ext.distributed.curvature import DistributedOperator, curvature, mean_gradient
from fastif_ext.distributed.extraction import ExtractedShard, extract, gathered
from fastif_ext.distributed.kmeans import kmeans
from fastif_ext.distributed.passes import SharedPasses
from fastif_ext.distributed.ranks import RankError, Ranks
from fastif_ext.distributed.sampling import sample
from fastif_ext.distributed.scores import influence_scores
from fastif_ext.distributed.shards import shard

__all__ = [
    "DistributedOperator",
    "ExtractedShard",
    "RankError",
    "Ranks",
    "SharedPasses",
    "curvature",
    "extract",
    "gathered",
    "influence_scores",
    "kmeans",
    "launch",
    "mean_gradient",
    "sample",
    "shard",
]
