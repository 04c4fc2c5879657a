"""Where the cells of a sweep run: processes of this machine, a Ray cluster, or Slurm. Every cell is durable everywhere."""

from microglia.cluster import ray, slurm
from microglia.cluster.launcher import ClusterError, launcher_of, launchers

__all__ = ["ClusterError", "launcher_of", "launchers", "ray", "slurm"]
