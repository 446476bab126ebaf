"""Image sources: folders, archives, shards, Hugging Face, torchvision and IDX files."""
