"""The commands of the studies: each is derived from its study's config; see `microglia.cli.derive`."""

from microglia.cli.derive import derived
from microglia.studies import every_study
from microglia.studies.listed import LISTED

globals().update({name: derived(every_study()[name]) for name in LISTED})
