"""Models of transformers whose layers differ in width: after ``import microglia.hugging_face``, the Auto classes open them."""

from microglia.hugging_face.sized import SizedConfig, base_config, open_sized, sized

__all__ = ["SizedConfig", "base_config", "open_sized", "sized"]
