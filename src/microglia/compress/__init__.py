"""Deep Compression: shared weights, entropy codes, and one small file from which a model is rebuilt bit for bit."""

from microglia.compress.codebook import Clusters, kmeans, share
from microglia.compress.container import Container
from microglia.compress.contents import Contents, Entry
from microglia.compress.packing import bits_for, encode, inspect, measured, open_packed, pack, rounded, unpack

__all__ = [
    "Clusters",
    "Container",
    "Contents",
    "Entry",
    "bits_for",
    "encode",
    "inspect",
    "kmeans",
    "measured",
    "open_packed",
    "pack",
    "rounded",
    "share",
    "unpack",
]
