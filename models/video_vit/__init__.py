"""Video vision transformers, their masks, and what masked and latent pretraining put on top of them.

    create_model("video_vit_base_16", num_classes=0, final_norm="tokens")    an encoder to pretrain (variants.py)
    encoder.grid(frames, height) -> TokenGrid(frames, rows, columns)         tokens of a clip (positions.py)
    encoder.forward_tokens(clips, keep) -> (B, n, D)                         of the tokens numbered by keep (B, n)
    encoder.forward_levels(clips, keep, layers=...) -> [(B, n, D), ...]      after several blocks, each normed

    MaskDraws.of(seed, epoch=e, positions=[...])                             what masks depend on (masks.py)
    tube_mask | random_mask | running_cell_mask(grid, draws, ratio=...) -> (B, N) bool, True = hidden
    token_numbers(mask) -> visible (B, n), hidden (B, m)
    block_numbers(grid, draws, SHORT_RANGE | LONG_RANGE) -> context (B, n), targets (B, m)
    shortest_of_batch(block_mask(grid, draws, SHORT_RANGE, size_draws=...)) -> the same, the released V-JEPA's rule

    MaskedAutoencoder(encoder, width=384, depth=4, heads=6)                  VideoMAE, v2 (decoder.py)
        (clips, visible, decoded=None) -> Reconstruction(loss, loss_of_clip, prediction, target, decoded, counted)
    LatentPredictor.of(encoder, ...) | LatentPredictor(encoder_width, ...)   V-JEPA 2, 2.1 (latent.py)
        (context, context_numbers, target_numbers, grid) -> prediction (B, m, F), of the context (B, n, F) or None
    LatentPrediction(encoder, predictor)                                     their loss, with a teacher (latent.py)
        (clips, [(context, targets), ...]) -> Prediction(loss, loss_of_clip, target)
    VisibleAlignment | HiddenPrediction(encoder, widths, ...)                image teachers' features (distil.py)
        (clips, visible, targets) -> Distilled(loss, loss_of_clip, cosine_of_clip)
    image_targets(network, frames, layers=K) -> maps, attention              what a teacher says (distil.py)
    create_model("image_vit_base_16", style="clip", projection=512)          CLIP, DINO, MAE (image_teachers.py)
    AttentiveProbe(width, num_classes=K)(tokens) -> (B, K)                   (attentive.py)

Read in the order positions, blocks, model, variants, masks, decoder, latent, image_teachers, distil, attentive;
weights from other projects' files are in weights.py, to Hugging Face's format in huggingface.py.
"""
