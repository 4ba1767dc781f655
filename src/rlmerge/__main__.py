"""`python -m rlmerge`: the command line without its console script."""

from rlmerge.cli.main import script

script()
