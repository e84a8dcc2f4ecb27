"""`python -m gpu_aware_tune` is `tune`, also where another package's `tune` is first on the PATH."""

from gpu_aware_tune.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
