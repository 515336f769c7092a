"""`python -m retemper VERB`: the command line without the console script."""

from retemper.cli import main

main()
