"""`python -m lomar` is the command `lomar`."""

from lomar.cli import program

program()
