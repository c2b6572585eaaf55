"""Parts of `alignsae extract`: which places are read, and units of work as folders."""
