"""Raw documents to a corpus: before tokenisation, without PyTorch."""
