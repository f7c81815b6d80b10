"""`python -m narseal`."""

from narseal.cli import main

main()
