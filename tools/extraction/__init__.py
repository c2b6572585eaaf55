"""Parts of `alignsae extract`: what is read, and what identifies an extraction."""
