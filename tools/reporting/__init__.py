"""Parts of `alignsae report`."""
