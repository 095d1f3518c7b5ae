"""`python -m bco_fast` is `bco-fast`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
