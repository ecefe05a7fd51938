"""Late temporal modelling: a 3D backbone, its feature map kept in time, BERT or pooling over it."""
