"""What peftc knows about transformers: building and loading base models, their graphs, training and generation."""
