"""`python -m worldloom` is the `worldloom` command, also for launchers such as torchrun."""

from worldloom.cli.main import main

if __name__ == "__main__":
    main()
