"""`python -m bco_fast.cli` is `bco-fast`."""

from . import main

if __name__ == "__main__":
    raise SystemExit(main())
