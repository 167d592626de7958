"""`python -m trilemma` is the command `trilemma`."""

from trilemma.cli import main

main()
