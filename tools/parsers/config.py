"""Every key of a configuration with its default and its meaning, read from the code that uses it.

alignsae config                  all sections
alignsae config data optim.lr    what begins with these names
alignsae config --markdown       the text of docs/configuration.md
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `alignsae config`."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="only keys that begin so (default: all)")
    parser.add_argument("--markdown", action="store_true", help="as a document")
