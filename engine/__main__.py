"""`python -m retemper.engine VERB`: the command line without the console script."""

from retemper.engine.cli import main

main()
