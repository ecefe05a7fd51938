"""Raw collections: lists, folders, foreign tars and TFRecords, read as one stream of videos."""
