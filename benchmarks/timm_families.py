"""The smallest member of every family of timm: one model per module of its, by parameter count, without its ``test_`` models.

Building all of them on the meta device takes minutes, so the list of one version is kept here; what a newer version adds is
looked up. Run this file to print a new one.
"""

from __future__ import annotations

import torch

from microglia.zoo.external import import_torchvision

VERSION = "1.0.31"
SMALLEST: dict[str, tuple[str, int]] = {
    "beit": ("beit_base_patch16_224", 86530984),
    "byoanet": ("halonet_h1", 8100056),
    "byobnet": ("mobileone_s1", 4825192),
    "cait": ("cait_xxs24_224", 11956264),
    "coat": ("coat_tiny", 5498540),
    "convit": ("convit_tiny", 5710512),
    "convmixer": ("convmixer_768_32", 21110248),
    "convnext": ("convnext_zepto_rms", 2155656),
    "cpubone": ("cpubone_nano", 6519700),
    "crossvit": ("crossvit_tiny_240", 7014800),
    "csatv2": ("csatv2", 11103444),
    "cspnet": ("cs3darknet_focus_s", 3274728),
    "cspnext": ("cspnext_tiny", 2733700),
    "davit": ("davit_tiny", 28360168),
    "deepseek_vit": ("deepseek_vit_412m", 411842560),
    "deit": ("deit_tiny_patch16_224", 5717416),
    "densenet": ("densenet121", 7978856),
    "dla": ("dla46x_c", 1068440),
    "dpn": ("dpn48b", 9126226),
    "edgenext": ("edgenext_xx_small", 1327216),
    "efficientformer": ("efficientformer_l1", 12289928),
    "efficientformer_v2": ("efficientformerv2_s0", 3600256),
    "efficientnet": ("mobilenetv2_035", 1677128),
    "efficientvim": ("efficientvim_m1", 6679458),
    "efficientvit_mit": ("efficientvit_b0", 3410008),
    "efficientvit_msra": ("efficientvit_m0", 2349436),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", 5489664),
    "fasternet": ("fasternet_t0", 3905500),
    "fastvit": ("fastvit_t8", 4026232),
    "focalnet": ("focalnet_tiny_srf", 28427116),
    "gcvit": ("gcvit_xxtiny", 11995428),
    "gemma4_vit": ("gemma4_vit_167m", 167364608),
    "ghostnet": ("ghostnet_050", 2587292),
    "hardcorenas": ("hardcorenas_b", 5176544),
    "hgnet": ("hgnetv2_b0", 5996550),
    "hiera": ("hiera_tiny_224", 27910216),
    "hieradet_sam2": ("sam2_hiera_tiny", 26851008),
    "hrnet": ("hrnet_w18_small", 13187464),
    "iformer": ("iformer_t", 2886456),
    "inception_next": ("inception_next_atto", 4156520),
    "inception_resnet_v2": ("inception_resnet_v2", 55843464),
    "inception_v3": ("inception_v3", 23834568),
    "inception_v4": ("inception_v4", 42679816),
    "lcnetv2": ("lcnetv2_small", 4128552),
    "levit": ("levit_128s", 7777058),
    "lowformer": ("lowformer_b0", 14100472),
    "mambaout": ("mambaout_femto", 7304536),
    "maxxvit": ("maxvit_pico_rw_256", 7457996),
    "metaformer": ("poolformerv2_s12", 11891712),
    "mlp_mixer": ("gmlp_ti16_224", 5867328),
    "mobilenetv3": ("mobilenetv3_small_050", 1593224),
    "mobilenetv5": ("mobilenetv5_base", 82647976),
    "mobilevit": ("mobilevit_xxs", 1272024),
    "mvitv2": ("mvitv2_tiny", 24173320),
    "naflexvit": ("naflexvit_base_patch16_parfac_gap", 86461672),
    "nasnet": ("nasnetalarge", 88753150),
    "nest": ("nest_tiny", 17057608),
    "nextvit": ("nextvit_small", 31763368),
    "nfnet": ("nf_regnet_b0", 8764288),
    "pit": ("pit_ti_224", 4847272),
    "pnasnet": ("pnasnet5large", 86057668),
    "pvt_v2": ("pvt_v2_b0", 3666760),
    "qwen3_vit": ("qwen3_vit_88m", 87414528),
    "rdnet": ("rdnet_tiny", 23863008),
    "regnet": ("regnetx_002", 2684792),
    "repghost": ("repghostnet_050", 2313968),
    "repvit": ("repvit_m1", 5485248),
    "res2net": ("res2next50", 24671464),
    "resnest": ("resnest14d", 10611688),
    "resnet": ("resnet10t", 5435488),
    "resnetv2": ("resnetv2_18", 11687720),
    "rexnet": ("rexnet_100", 4796873),
    "selecsls": ("selecsls42", 30354952),
    "senet": ("legacy_seresnet18", 11778592),
    "sequencer": ("sequencer2d_s", 27651688),
    "shvit": ("shvit_s1", 6330808),
    "sknet": ("skresnet18", 11958056),
    "starnet": ("starnet_s050", 542728),
    "swiftformer": ("swiftformer_xs", 3475360),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 28288354),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", 28347154),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 28332124),
    "tiny_vit": ("tiny_vit_5m_224", 12082725),
    "tnt": ("tnt_s_legacy_patch16_224", 23755336),
    "tresnet": ("tresnet_m", 31389032),
    "twins": ("twins_svt_small", 24060776),
    "vgg": ("vgg11", 132863336),
    "visformer": ("visformer_tiny", 10321368),
    "vision_transformer": ("vit_tiny_patch16_224", 5717416),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 6337704),
    "vision_transformer_relpos": ("vit_srelpos_small_patch16_224", 21973486),
    "vision_transformer_sam": ("samvit_base_patch16_224", 86457064),
    "vitamin": ("vitamin_small_224", 22173376),
    "volo": ("volo_d1_224", 26632040),
    "vovnet": ("ese_vovnet19b_slim_dw", 1897752),
    "xception": ("legacy_xception", 22855952),
    "xception_aligned": ("xception41p", 26907752),
    "xcit": ("xcit_nano_12_p8_224", 3049016),
}
"""Family -> (smallest member, parameters)."""


def smallest_members(most: float = 40e6) -> list[str]:
    """Returns the smallest member of each family that has at most so many parameters."""
    return [name for name, count in families().values() if count <= most]


def left_out(most: float = 40e6) -> list[str]:
    """Returns the families whose smallest member is larger, as text."""
    return [
        f"{family}: {name} has {count / 1e6:.0f} M parameters" for family, (name, count) in families().items() if count > most
    ]


def families() -> dict[str, tuple[str, int]]:
    import_torchvision()
    import timm

    modules = timm.list_modules()
    known = {family: found for family, found in SMALLEST.items() if family in modules and timm.is_model(found[0])}
    return {family: known.get(family) or look_up(family) for family in modules}


def look_up(family: str) -> tuple[str, int]:
    """Builds every member on the meta device and returns the one of the fewest parameters."""
    import_torchvision()
    import timm

    counts = {}
    for name in timm.list_models(module=family):
        if not name.startswith("test_"):
            with torch.device("meta"):
                counts[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    return min(counts.items(), key=lambda item: item[1])


def main() -> None:
    import_torchvision()
    import timm

    print(f'VERSION = "{timm.__version__}"')
    for family in timm.list_modules():
        name, count = look_up(family)
        print(f'    "{family}": ("{name}", {count}),', flush=True)


if __name__ == "__main__":
    main()
