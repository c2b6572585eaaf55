"""Parts of `alignsae explore`: what is written of a slot, and the files of the pages."""
