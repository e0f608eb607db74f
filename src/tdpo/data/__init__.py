"""From files and datasets to tokenised pairs, and from those to packed batches."""
