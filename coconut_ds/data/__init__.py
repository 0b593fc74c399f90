"""Problems and their grading, token ids, the curriculum, and batches."""
