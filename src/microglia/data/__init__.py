"""Image data sets in memory, and batches of them that are the same for every number of processes."""

from microglia.data.augmentation import Augmentation, Crops
from microglia.data.batches import Batches
from microglia.data.images import ImageData, ImageSet
from microglia.data.load import load_data
from microglia.data.normalization import Normalization
from microglia.data.splits import stratified_split

__all__ = ["Augmentation", "Batches", "Crops", "ImageData", "ImageSet", "Normalization", "load_data", "stratified_split"]
