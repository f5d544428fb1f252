"""Training data: files and data sets -> batches of queries and documents."""
