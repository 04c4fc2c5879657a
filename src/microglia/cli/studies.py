"""The commands of the studies: each is derived from its study's config; see `microglia.cli.derive`."""

from microglia.cli.app import command
from microglia.cli.derive import derived
from microglia.studies import every_study
from microglia.studies.listed import LISTED

globals().update({n: command(derived(s), example=s.example or None) for n in LISTED for s in [every_study()[n]]})
