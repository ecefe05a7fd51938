"""From shards to batches: order, clip plan, decoding, augmentation."""
