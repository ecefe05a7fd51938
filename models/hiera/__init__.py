"""Hiera: a hierarchical vision transformer of mask units, and masked pretraining with it.

    create_model("hiera_base", num_classes=0, pretraining=True)              an encoder to pretrain (variants.py)
    encoder.unit_grid(frames, height) -> TokenGrid(frames, rows, columns)    mask units of a clip (model.py)
    unit_mask(grid, draws, ratio=0.9) -> (B, U) bool, True = hidden          (decoder.py)
    HieraMaskedAutoencoder(encoder)(clips, visible) -> Reconstruction        visible: unit numbers (B, u)

Read in the order model, decoder, variants; public weights are in weights.py.
"""
