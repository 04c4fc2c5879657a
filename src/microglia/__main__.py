"""``python -m microglia``, also under ``torchrun``."""

from microglia.cli import main

if __name__ == "__main__":
    main()
