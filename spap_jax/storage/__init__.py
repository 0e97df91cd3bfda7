"""Where files are: paths, addresses of stores, and the Hugging Face Hub."""
