"""Parts of `alignsae export`: the card of a dictionary."""
