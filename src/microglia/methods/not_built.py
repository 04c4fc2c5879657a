"""Methods of the papers' tables that are not built: their names are answered by the reason. See docs/structured.md."""

from microglia.methods.config import methods

NOT_BUILT = {
    "autopruner": "AutoPruner (Luo, Wu 2018) learns a code for each layer from pooled responses; take sss or gal, which learn "
    "factors of channels in the same way.",
    "cgnn": "Channel gating networks (Hua et al. 2019) decide for each position of a map; take fbs or ftwt, which decide for "
    "each channel.",
    "mlprune": "MLPrune (Zeng, Urtasun 2019) needs the eigenbasis of K-FAC factors; take the score fisher, or ccp for whole "
    "channels.",
}

for _name, _why in NOT_BUILT.items():
    methods.refuse(_name, _why)
