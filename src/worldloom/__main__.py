"""`python -m worldloom` is the command `worldloom`."""

from worldloom.cli.main import main

if __name__ == "__main__":
    main()
