"""`python -m quarkcli` is the `quark` command: torchrun starts modules."""

from quarkcli.cli.main import run

if __name__ == "__main__":
    run()
