"""One video: decoding, regular frame rates, encoding, cutting, checking."""
