"""`python -m tokenprune_ext` is `tokenprune`: what torchrun starts is a module."""

from tokenprune_ext.cli import main

main(prog_name="tokenprune")
