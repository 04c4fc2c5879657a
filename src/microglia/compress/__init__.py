"""Deep Compression: shared weights, entropy codes, and one small file from which a model is rebuilt bit for bit."""

from microglia.compress.codebook import Clusters, kmeans, share
from microglia.compress.container import Container
from microglia.compress.packing import Contents, Entry, encode, inspect, measured, open_packed, pack, unpack

__all__ = [
    "Clusters",
    "Container",
    "Contents",
    "Entry",
    "encode",
    "inspect",
    "kmeans",
    "measured",
    "open_packed",
    "pack",
    "share",
    "unpack",
]
