"""`python -m jaxtune` is `jaxtune`."""

from jaxtune.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
