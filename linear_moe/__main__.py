"""`python -m linear_moe`: the same as `linear-moe`."""

from linear_moe.cli import main

if __name__ == "__main__":
    main()
