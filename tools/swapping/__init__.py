"""Parts of `alignsae swap`: which prompts, which methods, what they did, the table."""
