"""Parts of `alignsae finetune-lm`: token batches, models from scratch, checkpoints and answer accuracy."""
