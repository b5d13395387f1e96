"""``python -m specattn`` is the command line."""

from specattn.cli import main

if __name__ == "__main__":
    main()
