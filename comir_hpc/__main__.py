"""`python -m comir_hpc` is the same as `comir-hpc`."""

from comir_hpc.commands import main

if __name__ == "__main__":
    main()
