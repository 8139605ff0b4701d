"""`python -m fewstep` is the command `fewstep`."""

from fewstep.cli.main import main

if __name__ == "__main__":
    main()
